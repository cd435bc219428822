"""For how long somebody with whom something has failed is left alone: a first pause, doubled by each further failure.

No clock in here: time is an argument, in seconds. Invariant: at most `keys_max` keys are remembered; whose last
failure is longest ago is forgotten, and its next pause is a first one.
"""

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

KEYS_MAX = 1024

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True, slots=True)
class _Pause:
    until_s: float
    next_s: float


class Pauses(Generic[K]):
    """One pause for each key. With `last_s` the longest; without, every one is like the first."""

    def __init__(self, *, first_s: float, last_s: float | None = None, keys_max: int = KEYS_MAX) -> None:
        self._first_s = first_s
        self._last_s = first_s if last_s is None else last_s
        self._keys_max = keys_max
        self._known: OrderedDict[K, _Pause] = OrderedDict()

    def begin(self, key: K, now: float) -> float:
        """After a failure; until when."""
        known = self._known.pop(key, None)
        length_s = self._first_s if known is None else known.next_s
        self._known[key] = _Pause(now + length_s, min(2 * length_s, self._last_s))
        if len(self._known) > self._keys_max:
            self._known.popitem(last=False)
        return now + length_s

    def has(self, key: K, now: float) -> bool:
        """Whether `key` is to be left alone."""
        known = self._known.get(key)
        return known is not None and now < known.until_s

    def end(self, key: K) -> None:
        """After a success: the next pause is a first one."""
        self._known.pop(key, None)

    def clear(self) -> None:
        """What failed may work now, for everybody."""
        self._known.clear()
