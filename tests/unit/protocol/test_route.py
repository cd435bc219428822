"""The way to the head: replay or a snapshot, by bytes, rates and computing time."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.protocol.route import Distance, SnapshotOffer, choose_route

ELEMENTS = 30_000_000
UPDATE_BYTES = ELEMENTS + ELEMENTS // 64  # int8
STATE_BYTES = 8 * ELEMENTS  # eight updates' worth
LINE = 125e6


def distance(rounds: int, **changes: object) -> Distance:
    usual = Distance(
        head=100,
        target=100 + rounds,
        elements=ELEMENTS,
        update_bytes=UPDATE_BYTES,
        updates_from=1,
        bytes_per_s=LINE,
        apply_s=0.1,
        install_s=0.1,
    )
    return replace(usual, **changes)  # type: ignore[arg-type]


def offer(number: int, **changes: object) -> SnapshotOffer:
    return replace(SnapshotOffer(round=number, nbytes=STATE_BYTES), **changes)  # type: ignore[arg-type]


def snapshot_of(where: Distance, *offers: SnapshotOffer) -> int | None:
    """The round of the snapshot that is chosen."""
    route = choose_route(where, offers)
    assert route is not None
    return None if route.snapshot is None else route.snapshot.round


@pytest.mark.parametrize(("rounds", "chosen"), [(1, None), (6, None), (20, 120), (100, 200)])
def test_few_rounds_are_replayed_and_many_are_not(rounds: int, chosen: int | None) -> None:
    assert snapshot_of(distance(rounds), offer(100 + rounds)) == chosen


def test_bytes_and_seconds_are_told() -> None:
    route = choose_route(distance(2), [])
    assert route is not None and route.nbytes == 2 * UPDATE_BYTES
    assert route.seconds == pytest.approx(2 * UPDATE_BYTES / LINE + 0.1)
    route = choose_route(distance(40), [offer(138)])
    assert route is not None and route.nbytes == STATE_BYTES + 2 * UPDATE_BYTES


def test_a_snapshot_far_behind_the_head_is_not_worth_its_bytes() -> None:
    assert snapshot_of(distance(20), offer(104)) is None
    assert snapshot_of(distance(20), offer(104), offer(119)) == 119


def test_updates_and_chunks_that_are_held_cost_nothing() -> None:
    assert snapshot_of(distance(20, updates_held=18, apply_s=0.01), offer(120)) is None
    assert snapshot_of(distance(7), offer(107)) is None
    assert snapshot_of(distance(7), offer(107, held_bytes=STATE_BYTES)) == 107


def test_slow_computing_speaks_for_the_snapshot() -> None:
    assert snapshot_of(distance(6), offer(106)) is None
    assert snapshot_of(distance(6, apply_s=3.0), offer(106)) == 106


def test_a_snapshot_that_only_slow_donors_have_is_left() -> None:
    assert snapshot_of(distance(20), offer(120, bytes_per_s=LINE / 8)) is None


def test_without_the_updates_there_is_only_the_snapshot() -> None:
    assert snapshot_of(distance(3, updates_from=103), offer(102)) == 102
    assert snapshot_of(distance(3, updates_from=102), offer(101)) == 101
    assert choose_route(distance(3, updates_from=103), []) is None
    assert choose_route(distance(3, updates_from=104), [offer(102)]) is None


@pytest.mark.parametrize("number", [50, 100, 101, 121])
def test_a_snapshot_that_leads_nowhere_is_not_taken(number: int) -> None:
    assert snapshot_of(distance(20), offer(number)) is None


def test_who_has_measured_nothing_goes_by_bytes() -> None:
    unmeasured = {"bytes_per_s": None, "apply_s": None, "install_s": None}
    assert snapshot_of(distance(4, **unmeasured), offer(104)) is None
    assert snapshot_of(distance(30, **unmeasured), offer(130)) == 130


def test_at_the_head_there_is_nothing_to_do() -> None:
    route = choose_route(distance(0), [offer(100)])
    assert route is not None and (route.snapshot, route.nbytes, route.seconds) == (None, 0, 0.0)


@given(
    rounds=st.integers(0, 500),
    back=st.integers(0, 50),
    rate=st.floats(1e4, 1e9),
    apply_s=st.floats(0, 100),
    first=st.integers(0, 700),
)
def test_the_choice_is_never_much_worse_than_the_other(
    rounds: int, back: int, rate: float, apply_s: float, first: int
) -> None:
    where = distance(rounds, bytes_per_s=rate, apply_s=apply_s, updates_from=first)
    offers = [offer(max(0, where.target - back))]
    chosen = choose_route(where, offers)
    alone = choose_route(where, [])
    only = choose_route(replace(where, updates_from=where.head + 2), offers) if first <= offers[0].round + 1 else None
    if chosen is None:
        assert alone is None and first > where.head + 1
        return
    for other in (alone, only):
        assert other is None or chosen.seconds <= 1.1 * other.seconds + 1e-9
