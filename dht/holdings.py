"""When to announce in the DHT what this peer holds of the log, so that who lacks it finds donors that it never met.

A core without a clock, like `announcements`: the owner calls `poll`, provides the keys that it returns and reports each
outcome. Presence says the same to whoever is in sight, sooner and round by round; this is for the rest.

Invariants: at most KEYS_MAX keys are announced and remembered; one key at a time is outstanding; a key that nobody
stored is tried again after a pause that doubles.
"""

from dataclasses import dataclass

from shoal.dht.keys import SEGMENT_ROUNDS, snapshots_key, updates_key

KEYS_MAX = 8  # the newest segments; older ones are found by those who hold them being asked
REANNOUNCE_S = 20 * 60
RETRY_MIN_S = 10.0
RETRY_MAX_S = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Holdings:
    """What is on this disk: every update from `updates_from` (0: none) to `head`, and snapshots of these rounds."""

    head: int = 0
    updates_from: int = 0
    snapshots: tuple[int, ...] = ()


@dataclass(slots=True)
class _Announced:
    due_s: float
    pause_s: float = RETRY_MIN_S


class HoldingsSchedule:
    """The schedule of one peer in one swarm. Times are wall-clock seconds."""

    def __init__(self, swarm: bytes) -> None:
        self._swarm = swarm
        self._keys: dict[bytes, _Announced] = {}
        self._outstanding: bytes | None = None

    def poll(self, holdings: Holdings, now_s: float) -> bytes | None:
        """A key to provide now, or None. Report it by `note_announced`, whatever came of it."""
        wanted = list_keys(self._swarm, holdings)
        self._keys = {key: self._keys.get(key) or _Announced(due_s=now_s) for key in wanted}
        if self._outstanding is not None:
            return None
        due = [key for key in wanted if self._keys[key].due_s <= now_s]
        self._outstanding = due[0] if due else None
        return self._outstanding

    def note_announced(self, stored: bool, now_s: float) -> None:
        """The announcement ended; `stored` when another node took it."""
        key, self._outstanding = self._outstanding, None
        announced = None if key is None else self._keys.get(key)
        if announced is None:
            return  # it went by meanwhile
        if stored:
            announced.due_s, announced.pause_s = now_s + REANNOUNCE_S, RETRY_MIN_S
        else:
            announced.due_s = now_s + announced.pause_s
            announced.pause_s = min(2 * announced.pause_s, RETRY_MAX_S)


def list_keys(swarm: bytes, holdings: Holdings) -> list[bytes]:
    """Under what this is announced: the newest snapshots' segments, then those of the updates, newest first."""
    keys = [snapshots_key(swarm, number) for number in sorted(holdings.snapshots, reverse=True)]
    number = holdings.head
    while holdings.updates_from and number >= holdings.updates_from and len(keys) < 2 * KEYS_MAX:
        # The oldest segment counts only when all of it is here.
        if number // SEGMENT_ROUNDS * SEGMENT_ROUNDS >= holdings.updates_from or holdings.updates_from == 1:
            keys.append(updates_key(swarm, number))
        number = number // SEGMENT_ROUNDS * SEGMENT_ROUNDS - 1
    return list(dict.fromkeys(keys))[:KEYS_MAX]


def donor_keys(swarm: bytes, first: int, last: int) -> tuple[bytes, ...]:
    """Where to look for donors of the rounds `first` to `last`: of their newest snapshots, then of their updates from
    the oldest on; at most KEYS_MAX."""
    segments = range(first // SEGMENT_ROUNDS, last // SEGMENT_ROUNDS + 1)[: KEYS_MAX - 1]
    keys = [snapshots_key(swarm, last), *(updates_key(swarm, one * SEGMENT_ROUNDS) for one in segments)]
    return tuple(dict.fromkeys(keys))
