"""Albums that are searched twice, with damage to the index between the two."""

from random import Random

from fastvlm_mlx.album.database import index_path
from tests.fuzz import damage
from tests.fuzz.pictures import files
from tests.fuzz.room import Room
from tests.fuzz.subject import Refused, Wrong, command

_PAGE = 4096


def album(random: Random, room: Room) -> None:
    """Every picture is found again, or the index is refused as it is; what is found is there."""
    pictures = room.input / "pictures"
    (pictures / "sub").mkdir(parents=True)
    for name, kind in (("a.png", "PNG RGB 4"), ("sub/b c.png", "PNG RGB 7")):
        (pictures / name).write_bytes(files()[kind])
    own = random.random() < 0.5
    path = room.work / "mine.sqlite" if own else index_path(pictures)
    arguments = ["search", str(pictures), "a cat", "-m", str(room.folder("apple")), "-r", "64", "--threshold", "0"]
    arguments += ["--no-captions", *(("--index", str(path)) if own else ())]
    room.written.update((room.work, room.cache))
    expected = set(command(arguments).splitlines())
    if len(expected) != 2:
        raise Wrong(f"album: {len(expected)} of 2 pictures found")
    damaged = _damaged(random, path.read_bytes())
    path.write_bytes(damaged)
    try:
        found = command(arguments).splitlines()
    except Refused:
        if own and path.read_bytes() == damaged:
            return
        raise
    if len(set(found)) < len(found) or not set(found) <= expected:
        raise Wrong(f"album: found {found}")


def _damaged(random: Random, data: bytes) -> bytes:
    """An index with changed bytes, without its end, or with a page that is empty or in the place of another."""
    if random.random() < 0.5:
        return damage.some_bytes(random, data)
    pages = [data[start : start + _PAGE] for start in range(0, len(data), _PAGE)]
    place, other = random.randrange(len(pages)), random.randrange(len(pages))
    match random.randrange(4):
        case 0:
            pages[place] = bytes(_PAGE)
        case 1:
            pages[place] = random.randbytes(_PAGE)
        case 2:
            pages[place] = pages[other]
        case 3:
            del pages[place:]
    return b"".join(pages)
