"""How often somebody may do something: a burst at once, and a rate for long, for each key.

No clock in here: time is an argument, in seconds. Invariant: at most `keys_max` keys are remembered; who was not seen
for longest is forgotten, and has the whole burst again.
"""

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

KEYS_MAX = 4096

K = TypeVar("K", bound=Hashable)


@dataclass(slots=True)
class _Allowance:
    left: float
    as_of_s: float


class Allowances(Generic[K]):
    """One allowance for each key."""

    def __init__(self, *, burst: int, per_s: float, keys_max: int = KEYS_MAX) -> None:
        self._burst = float(burst)
        self._per_s = per_s
        self._keys_max = keys_max
        self._known: OrderedDict[K, _Allowance] = OrderedDict()

    def take(self, key: K, now: float) -> bool:
        """Use one up, where there is one."""
        allowance = self._fill(key, now)
        if allowance.left < 1:
            return False
        allowance.left -= 1
        return True

    def reserve(self, key: K, now: float) -> float:
        """Use one up that may only come later: the seconds to wait for it."""
        allowance = self._fill(key, now)
        allowance.left -= 1
        return max(0.0, -allowance.left / self._per_s)

    def _fill(self, key: K, now: float) -> _Allowance:
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = _Allowance(self._burst, now)
            if len(self._known) > self._keys_max:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        known.left = min(self._burst, known.left + (now - known.as_of_s) * self._per_s)
        known.as_of_s = now
        return known
