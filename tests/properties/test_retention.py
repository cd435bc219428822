"""Retention: what the swarm needs never goes, what is kept can be rebuilt, and the bytes stay bounded."""

from dataclasses import replace

from hypothesis import example, given
from hypothesis import strategies as st

from shoal.node.retention import ANCHORS_A_WINDOW, Holdings, Limits, Removal, first_rebuildable, plan_removal

SNAPSHOT = 80


@st.composite
def limits(draw: st.DrawFn) -> Limits:
    return Limits(
        rounds_min=draw(st.integers(2, 20)),
        rounds_kept=draw(st.sampled_from([0, 0, 5, 30])),
        snapshots_kept=draw(st.integers(1, 4)),
        bytes_max=draw(st.sampled_from([0, 0, 1, 300, 1000])),
    )


@st.composite
def holdings(draw: st.DrawFn) -> Holdings:
    """Anything that a disk may hold: gaps, blobs that rounds share, snapshots without their updates."""
    head = draw(st.integers(1, 60))
    blobs = st.sampled_from([bytes([number]) for number in range(20)])
    rounds = draw(st.sets(st.integers(1, head), max_size=60))
    updates = {number: dict.fromkeys(draw(st.sets(blobs, max_size=3)), 10) for number in sorted(rounds)}
    snapshots = draw(st.sets(st.integers(1, head), max_size=6))
    lent = draw(st.sets(st.sampled_from(sorted(snapshots)), max_size=2)) if snapshots else set()
    return Holdings(head=head, snapshots=snapshots, snapshot_bytes=SNAPSHOT, lent=lent, updates=updates)


def after(held: Holdings, removal: Removal) -> Holdings:
    updates = {number: sizes for number, sizes in held.updates.items() if number not in removal.rounds}
    return replace(held, updates=updates, snapshots=set(held.snapshots) - set(removal.snapshots))


def count_bytes(held: Holdings) -> int:
    blobs = {digest: size for sizes in held.updates.values() for digest, size in sizes.items()}
    return len(held.snapshots) * held.snapshot_bytes + sum(blobs.values())


@given(held=holdings(), limits=limits())
def test_what_the_swarm_needs_never_goes(held: Holdings, limits: Limits) -> None:
    removal = plan_removal(held, limits)
    newest = max(held.snapshots, default=0)
    assert newest not in removal.snapshots
    assert not set(removal.snapshots) & set(held.lent)
    for number in removal.rounds:
        assert number <= newest and number <= held.head - limits.rounds_min
    kept = after(held, removal)
    shared = {digest for sizes in kept.updates.values() for digest in sizes}
    assert not removal.blobs & shared
    assert removal.blobs == {digest for number in removal.rounds for digest in held.updates[number]} - shared


@given(held=holdings(), limits=limits())
def test_the_bytes_are_bounded_as_far_as_they_may_be_oldest_first(held: Holdings, limits: Limits) -> None:
    free = plan_removal(held, replace(limits, bytes_max=0))
    removal = plan_removal(held, limits)
    kept = after(held, removal)
    assert set(free.rounds) <= set(removal.rounds) and set(free.snapshots) <= set(removal.snapshots)
    if not limits.bytes_max:
        return
    newest = max(held.snapshots, default=0)
    needed = min(held.head - limits.rounds_min, newest)
    more = {(number, 0) for number in set(removal.rounds) - set(free.rounds)}
    more |= {(number, 1) for number in set(removal.snapshots) - set(free.snapshots)}
    left = {(number, 0) for number in kept.updates if number <= needed}
    left |= {(number, 1) for number in kept.snapshots if number != newest and number not in held.lent}
    assert count_bytes(kept) <= limits.bytes_max or not left
    assert not more or not left or max(more) < min(left), "nothing goes before what is older"


@example(
    held=Holdings(
        head=8,
        snapshots={1, 2, 3},
        snapshot_bytes=SNAPSHOT,
        lent=(),
        updates={number: {bytes([number]): 10 if number > 1 else 0} for number in range(1, 9)},
    ),
    limits=Limits(rounds_min=2, snapshots_kept=3, bytes_max=300),
)
@given(held=holdings(), limits=limits())
def test_planning_again_finds_nothing_more(held: Holdings, limits: Limits) -> None:
    kept = after(held, plan_removal(held, limits))
    again = plan_removal(kept, limits)
    assert (again.rounds, again.blobs, again.snapshots) == ((), frozenset(), ())


@given(
    limits=limits().map(lambda one: replace(one, bytes_max=0)),
    every=st.integers(1, 9),
    joined=st.sampled_from([0, 7, 50]),
)
def test_every_round_of_the_window_can_be_rebuilt_all_along(limits: Limits, every: int, joined: int) -> None:
    """A life of rounds, a snapshot every so many, from round 0 or from the snapshot that the peer joined with."""
    held = Holdings(head=joined, snapshots={joined} - {0}, snapshot_bytes=SNAPSHOT, lent=(), updates={})
    anchors_max = limits.snapshots_kept + 2 * ANCHORS_A_WINDOW + 3
    slack = (limits.snapshots_kept + 2) * every
    for number in range(joined + 1, joined + 150):
        held = replace(held, head=number, updates={**held.updates, number: {number.to_bytes(2, "big"): 10}})
        if number % every == 0:
            held = replace(held, snapshots={*held.snapshots, number})
            held = after(held, plan_removal(held, limits))
            assert len(held.snapshots) <= anchors_max
            assert len(held.updates) <= limits.rounds + limits.rounds // ANCHORS_A_WINDOW + slack
        first = first_rebuildable(held)
        assert first is not None and first <= max(joined, number - limits.rounds)


def test_shared_blobs_stay_until_the_last_round_that_has_them_goes() -> None:
    updates = {1: {b"a": 1, b"b": 1}, 2: {b"b": 1}, 3: {b"c": 1}, 4: {b"b": 1}, 5: {b"d": 1}, 6: {b"e": 1}}
    held = Holdings(head=6, snapshots={4, 6}, snapshot_bytes=8, lent=(), updates=updates)
    removal = plan_removal(held, Limits(rounds_min=2, snapshots_kept=1))
    assert (removal.rounds, removal.snapshots) == ((1, 2, 3, 4), ())
    assert removal.blobs == {b"a", b"b", b"c"}
    removal = plan_removal(replace(held, updates={**updates, 5: {b"b": 1}}), Limits(rounds_min=2, snapshots_kept=1))
    assert removal.blobs == {b"a", b"c"}


def test_limits_ask_for_more_never_for_less() -> None:
    assert Limits(rounds_min=64, rounds_kept=8).rounds == 64
    assert Limits(rounds_min=64, rounds_kept=200).rounds == 200
