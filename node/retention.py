"""What stays on the disk of the log, and what goes: rounds by number and by bytes, oldest first.

Two floors. The manifest's `rounds_kept` is what every peer keeps for others that replay; this peer's own limits may ask
for more rounds, and may bound the bytes, but never below that floor. Of the retained rounds every one can be rebuilt:
a snapshot before the oldest of them stays (the anchor), and a few between it and the newest, so that the next anchor is
there when the window has moved on. Of certificates node.certificate_trail keeps more.

Invariant: what goes is never the newest snapshot, nor an update after it or within the manifest's floor, nor a blob
that a retained round shares, nor a snapshot that somebody is fetching.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

GIB = 1 << 30
ANCHORS_A_WINDOW = 2  # snapshots between the anchor and the newest: each costs eight bytes a parameter

Sizes = Mapping[bytes, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """`rounds_min` is the manifest's word; the rest this peer's own. 0 `bytes_max` is no limit."""

    rounds_min: int
    rounds_kept: int = 0
    snapshots_kept: int = 2
    bytes_max: int = 0

    @property
    def rounds(self) -> int:
        """The window of rounds that stay where the bytes allow it."""
        return max(self.rounds_min, self.rounds_kept)


@dataclass(frozen=True, slots=True, kw_only=True)
class Holdings:
    """What is on the disk: rounds of snapshots, of `snapshot_bytes` each, those that are being fetched, and the blobs
    of each round's update."""

    head: int
    snapshots: Collection[int]
    snapshot_bytes: int
    lent: Collection[int]
    updates: Mapping[int, Sizes]


@dataclass(frozen=True, slots=True, kw_only=True)
class Removal:
    """What is to go."""

    snapshots: tuple[int, ...]
    rounds: tuple[int, ...]
    blobs: frozenset[bytes]


def first_rebuildable(held: Holdings) -> int | None:
    """The oldest round from which on every round up to the head can be rebuilt; None where the head itself cannot."""
    reached = _reach(held)
    starts = [number for number in held.snapshots if number >= reached]
    if reached == 0:
        return 0
    return min(starts, default=None)


def plan_removal(held: Holdings, limits: Limits) -> Removal:
    """What the limits make unnecessary, until there is no more of it: without a snapshot that went for its bytes the
    updates up to the next one are of no use."""
    left = held
    while (keeps := _keep(left, limits)) is not left:
        left = keeps
    kept = {digest for sizes in left.updates.values() for digest in sizes}
    gone = tuple(sorted(set(held.updates) - set(left.updates)))
    return Removal(
        snapshots=tuple(sorted(set(held.snapshots) - set(left.snapshots))),
        rounds=gone,
        blobs=frozenset(digest for number in gone for digest in held.updates[number] if digest not in kept),
    )


def _keep(held: Holdings, limits: Limits) -> Holdings:
    """What is left of it: `held` itself where nothing goes."""
    snapshots = _choose_snapshots(held, limits)
    window = held.head - limits.rounds
    newest = max(held.snapshots, default=0)
    last_gone = min(window, newest, *_oldest_start(held, snapshots, window))
    rounds = [number for number in held.updates if number > last_gone]
    if limits.bytes_max:
        needed = min(held.head - limits.rounds_min, newest)
        protected = {newest, *held.lent}
        goers = sorted(
            [(number, 0) for number in rounds if number <= needed]
            + [(number, 1) for number in snapshots if number not in protected]
        )
        for number, is_snapshot in goers:
            if _count_bytes(held, snapshots, rounds) <= limits.bytes_max:
                break
            (snapshots if is_snapshot else rounds).remove(number)
    if len(snapshots) == len(set(held.snapshots)) and len(rounds) == len(held.updates):
        return held
    return replace(held, snapshots=snapshots, updates={number: held.updates[number] for number in rounds})


def _reach(held: Holdings) -> int:
    """The round after which every update up to the head is here."""
    number = held.head
    while number in held.updates:
        number -= 1
    return number


def _choose_snapshots(held: Holdings, limits: Limits) -> list[int]:
    """The newest ones, those that are being fetched, the anchor and a few after it."""
    known = sorted(held.snapshots)
    chosen = {*known[-limits.snapshots_kept :], *held.lent}
    reached = _reach(held)
    usable = [number for number in known if number >= reached]
    window = held.head - limits.rounds
    anchor = max((number for number in usable if number <= window), default=0 if reached == 0 else None)
    at = anchor if anchor is not None else min(usable, default=held.head)
    spacing = max(1, limits.rounds // ANCHORS_A_WINDOW)
    while at < held.head:
        chosen.add(at)
        following = [number for number in usable if number > at]
        near = [number for number in following if number <= at + spacing]
        at = max(near) if near else min(following, default=held.head)
    return sorted(chosen & set(known))


def _oldest_start(held: Holdings, snapshots: Iterable[int], window: int) -> tuple[int, ...]:
    """The oldest state from which the updates are to stay: of the chosen snapshots, or round 0 where none is before the
    window yet."""
    reached = _reach(held)
    usable = [number for number in snapshots if number >= reached]
    if reached == 0 and not any(number <= window for number in usable):
        return (0,)
    return (min(usable),) if usable else ()


def _count_bytes(held: Holdings, snapshots: Collection[int], rounds: Iterable[int]) -> int:
    blobs = {digest: size for number in rounds for digest, size in held.updates[number].items()}
    return len(snapshots) * held.snapshot_bytes + sum(blobs.values())
