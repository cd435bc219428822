"""How often the log says the same: at once, and then now and then, with the count of what was left out.

A peer that is refused may come again many times a second; the metrics count all of that, the log is for people.

No clock in here: time is an argument, in seconds, monotonic. Invariant: at most `keys_max` keys are remembered, and at
most so many lines are said within `every_s`, however many peers come: one whose turn is over makes room.
"""

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

REMIND_S = 60.0  # from one line to the next of the same
KEYS_MAX = 1024

K = TypeVar("K", bound=Hashable)


@dataclass(slots=True)
class _Said:
    at_s: float
    left_out: int = 0


class Reminders(Generic[K]):
    """Keys say what is the same: mostly a peer and a reason."""

    def __init__(self, *, every_s: float = REMIND_S, keys_max: int = KEYS_MAX) -> None:
        self._every_s = every_s
        self._keys_max = keys_max
        self._said: OrderedDict[K, _Said] = OrderedDict()  # what was said last stands last

    def take(self, key: K, now: float) -> str | None:
        """What ends the line that is said now; None: it is left out."""
        known = self._said.get(key)
        if known is not None and now - known.at_s < self._every_s:
            known.left_out += 1
            return None
        if known is None and len(self._said) >= self._keys_max:
            if now - next(iter(self._said.values())).at_s < self._every_s:
                return None
            self._said.popitem(last=False)
        self._said[key] = _Said(at_s=now)
        self._said.move_to_end(key)
        return f" (and {known.left_out} times more since it was last said)" if known and known.left_out else ""
