"""The latest results of something that is asked for again and again."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

_Key = TypeVar("_Key", bound=Hashable)
_Value = TypeVar("_Value")


class Recent(Generic[_Key, _Value]):
    """Keeps the values that were asked for last; any thread may ask.

    Args:
        count: How many are kept.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._lock = threading.Lock()
        self._values: OrderedDict[_Key, _Value] = OrderedDict()

    def __reduce__(self) -> tuple[type[Recent[_Key, _Value]], tuple[int]]:
        """Pickles and copies as an empty one: a lock stays in its process, and what is kept can be made again."""
        return type(self), (self._count,)

    def get(self, key: _Key, make: Callable[[], _Value]) -> _Value:
        """The value of a key; `make` makes it if it is not there, and raises what it raises."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
        value = make()  # two threads may make the same
        with self._lock:
            self._values[key] = value
            while len(self._values) > self._count:
                self._values.popitem(last=False)
        return value
