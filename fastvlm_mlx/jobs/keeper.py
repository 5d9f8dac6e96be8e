"""Looks after several servers: which of them answer, and whether they all hold the same."""

import ssl
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from fastvlm_mlx import __version__
from fastvlm_mlx.errors import ServerError
from fastvlm_mlx.formatting import counted, printable
from fastvlm_mlx.jobs.exchange import ANSWER_SECONDS, Address, Exchange, LostError
from fastvlm_mlx.jobs.peer import Peer, State
from fastvlm_mlx.jobs.remote import BusyError, Holds, OtherError, look_at
from fastvlm_mlx.jobs.task import Task

PATIENCE = 600.0
"""Seconds without any server after which the work ends."""
_TICK = 1.0


class Keeper:
    """Looks after servers, each in a thread of its own.

    Args:
        addresses: The servers.
        key: For all of them; empty for none.
        most: The most questions on their way to each; None for what suits it.
        lock: Protects the peers.
        notify: Called with lines for the user.
        opened: Called, with the lock, when a server can take questions.
        ended: Called when there is no server any more, with the reason.

    Attributes:
        peers: The servers.
    """

    def __init__(
        self,
        addresses: Sequence[Address],
        *,
        key: str,
        most: int | None,
        lock: threading.RLock,
        notify: Callable[[str], None],
        opened: Callable[[Peer], None],
        ended: Callable[[ServerError], None],
    ) -> None:
        context = ssl.create_default_context() if any(each.scheme == "https" for each in addresses) else None
        self.peers = [Peer(each, key, context, most, lock) for each in dict.fromkeys(addresses)]
        self._lock = lock
        self._notify, self._opened, self._ended = notify, opened, ended
        self._reference: Holds | None = None
        self._task: Task | None = None
        self._closed = False
        self._answered = time.monotonic()

    @property
    def holds(self) -> Holds:
        """What all servers hold, once they are connected."""
        assert self._reference is not None
        return self._reference

    def connect(self) -> None:
        """Looks at the servers for the first time.

        Servers that do not answer are noted, if one answers. If models are being loaded, this waits for one of them.

        Raises:
            ServerError: If none answers, one is of another version or wants another key, or they hold different
                models.
        """
        deadline = time.monotonic() + PATIENCE
        while True:
            with ThreadPoolExecutor(min(len(self.peers), 32)) as threads:
                found = list(zip(self.peers, threads.map(_look, self.peers), strict=True))
            for peer, seen in found:
                if isinstance(seen, OtherError):
                    raise ServerError(f"{peer.address}: {seen}")
            ready = [(peer, seen) for peer, seen in found if isinstance(seen, Holds)]
            if ready:
                break
            is_loading = any(isinstance(seen, BusyError) for _, seen in found)
            if not is_loading or time.monotonic() > deadline:
                reasons = ", ".join(f"{peer.address} ({seen})" for peer, seen in found[:5])
                raise ServerError(f"no server answers: {reasons}; start them with `fastvlm serve`")
            time.sleep(_TICK)
        first, self._reference = ready[0]
        for peer, holds in ready:
            if reason := _difference(holds, self._reference, f"that of {first.address}"):
                raise ServerError(f"{peer.address}: {reason}; give all servers the same")
        with self._lock:
            for peer, seen in found:
                if isinstance(seen, Holds):
                    peer.opened(seen)
                else:
                    peer.closed(State.RESTING, str(seen))
                    self._notify(f"{peer.address}: {seen}; it is tried again")

    def start(self, task: Task) -> None:
        """Checks that servers allow what a task asks for, and begins to look after them.

        Raises:
            ServerError: If one does not.
        """
        self._task = task
        for peer in self.peers:
            if peer.state is State.OPEN and peer.holds is not None and (reason := self._unfit(peer.holds)):
                raise ServerError(f"{peer.address}: {reason}")
        for peer in self.peers:
            threading.Thread(target=self._keep, args=[peer], name="fastvlm-keeper", daemon=True).start()

    def close(self) -> None:
        """Ends all that is on its way, and the threads."""
        with self._lock:
            self._closed = True
            for peer in self.peers:
                for exchange, _ in peer.questions.values():
                    exchange.cut()
                peer.idle.notify_all()
                peer.changed.notify_all()

    def leave_out(self, peer: Peer, reason: str) -> None:
        """Uses a server no more that holds something else now; call it with the lock."""
        if peer.state is not State.OUT:
            peer.closed(State.OUT, reason)
            self._notify(f"{peer.address}: {reason}; it is left out")

    def _keep(self, peer: Peer) -> None:
        """Looks after a server; for a thread of its own."""
        exchange = peer.exchange()
        tries = 0
        while not self._closed:
            with self._lock:
                if peer.state is not State.OPEN:
                    peer.changed.wait(peer.rest(tries))
                elif not peer.suspect:
                    peer.changed.wait(_TICK)
                is_well = peer.is_well
                is_silent = is_well and peer.is_silent
                if is_well:
                    self._look_after(peer)
            if self._closed:
                break
            if is_silent:
                tries = self._probe(peer, exchange, tries)
            elif not is_well:
                tries = self._try_again(peer, exchange, tries)
            else:
                tries = 0
            self._check_alone()
        exchange.close()

    def _look_after(self, peer: Peer) -> None:
        """Ends what takes too long, and has a server take what waits."""
        now = time.monotonic()
        for exchange, began in peer.questions.values():
            if now - began > ANSWER_SECONDS:
                exchange.cut()
        if peer.takes:
            self._opened(peer)

    def _probe(self, peer: Peer, exchange: Exchange, tries: int) -> int:
        """Asks a server that owes answers how it is; one that does not say it twice is left out for a while."""
        exchange.renew()
        try:
            status, _ = exchange.get("/health")
            reason = "" if status == 200 else "its engine has stopped"
        except LostError as error:
            reason = str(error)
        with self._lock:
            if not reason:
                peer.heard()
                return 0
            if tries and peer.state is State.OPEN:
                self._rest(peer, reason)
                return 0
        return tries + 1

    def _try_again(self, peer: Peer, exchange: Exchange, tries: int) -> int:
        """Looks whether a server answers again, and as before; returns how often it has not."""
        exchange.renew()
        seen = _look_with(exchange)
        if isinstance(seen, Holds):
            reason = _difference(seen, self.holds, "those of the others") or self._unfit(seen)
            seen = OtherError(reason) if reason else seen
        with self._lock:
            if isinstance(seen, OtherError):
                self.leave_out(peer, str(seen))
            elif isinstance(seen, Holds) and peer.is_bad and peer.state is State.OPEN:
                self._rest(peer, f"fails again and again ({peer.reason})")
                return 0
            elif isinstance(seen, Holds):
                was_away = peer.state is not State.OPEN
                peer.opened(seen)
                if was_away:
                    self._notify(f"{peer.address} answers again, after {time.monotonic() - peer.since:.0f} s")
                self._opened(peer)
                return 0
            elif peer.state is State.OPEN:
                self._rest(peer, str(seen))
        return tries + 1

    def _rest(self, peer: Peer, reason: str) -> None:
        """Leaves a server out for a while."""
        peer.closed(State.RESTING, reason)
        goes_on = any(other.state is State.OPEN for other in self.peers)
        self._notify(f"{peer.address}: {reason}; {'the others go on, and ' if goes_on else ''}it is tried again")

    def _check_alone(self) -> None:
        """Ends the work if there is no server any more."""
        with self._lock:
            states = {peer.state for peer in self.peers}
            now = time.monotonic()
            if State.OPEN in states:
                self._answered = now
            if State.OPEN in states or (State.RESTING in states and now - self._answered <= PATIENCE):
                return
            reasons = ", ".join(f"{peer.address} ({peer.reason})" for peer in self.peers[:5])
        what = "no server is left" if states == {State.OUT} else f"no server for {PATIENCE / 60:.0f} minutes"
        self.close()
        self._ended(ServerError(f"{what}: {reasons}; the same command goes on when there is one"))

    def _unfit(self, holds: Holds) -> str:
        """What a server does not allow and the task needs; empty if nothing."""
        if self._task is None:
            return ""
        tokens, resolution = self._task.config.max_tokens, self._task.resolution
        if holds.max_tokens < tokens:
            allowed = counted(holds.max_tokens, "token")
            return f"answers with at most {allowed}, not {tokens}; start it with --max-tokens {tokens}"
        if isinstance(resolution, int) and holds.max_resolution < resolution:
            allowed = f"{holds.max_resolution} pixels"
            return f"shows pictures at up to {allowed}; start it with --max-resolution {resolution}"
        return ""


def _look_with(exchange: Exchange) -> Holds | ServerError:
    """What a server holds, or why it is not known."""
    try:
        holds = look_at(exchange)
    except ServerError as error:
        return error
    if holds.version != __version__:
        return OtherError(f"is of version {printable(holds.version, 40)}, but this program of {__version__}")
    return holds


def _look(peer: Peer) -> Holds | ServerError:
    exchange = peer.exchange()
    try:
        return _look_with(exchange)
    finally:
        exchange.close()


def _difference(holds: Holds, reference: Holds, whose: str) -> str:
    """What sets two servers apart, of what answers depend on; empty if nothing."""
    for name in ("weights", "dtype"):
        mine, other = getattr(holds, name), getattr(reference, name)
        if mine != other:
            return f"its {name} {printable(mine, 40)} is not {whose}, {printable(other, 40)}"
    return ""
