"""Fetch plans: who is asked for what, in virtual time."""

from collections import Counter

import pytest

from shoal.protocol.fetch_plan import (
    ASKS_PER_PIECE_MAX,
    BENCH_S,
    FAILURES_MAX,
    LATE_MIN_S,
    MISSES_MAX,
    WINDOW_MAX,
    WINDOW_MIN,
    AskFailure,
    FetchPlan,
    Piece,
)
from tests.unit.protocol.samples import PEERS
from tests.unit.protocol.transfer import BYTES_MAX, Donor, Transfer, make_pieces

A, B, C = PEERS[:3]
MIB = 1 << 20


def begin(*pieces: Piece, donors: tuple[tuple[bytes, float | None], ...]) -> FetchPlan:
    plan = FetchPlan()
    plan.add(pieces)
    for donor, rate in donors:
        plan.add_donor(donor, rate)  # type: ignore[arg-type]
    return plan


def transfer(count: int, **donors: Donor) -> Transfer:
    """`count` pieces of a MiB from donors a, b, c of which nothing is known."""
    by_peer = {{"a": A, "b": B, "c": C}[name]: donor for name, donor in donors.items()}
    plan = FetchPlan()
    plan.add(make_pieces(count))
    for peer in by_peer:
        plan.add_donor(peer, None)
    return Transfer(plan, by_peer)


def bytes_from(done: Transfer, peer: bytes) -> int:
    return done.plan.figures()[peer].delivered_bytes  # type: ignore[index]


# -- who takes the next piece ----------------------------------------------------------------------------------------


def test_who_has_the_next_piece_soonest_takes_it() -> None:
    pieces = make_pieces(8)
    plan = begin(*pieces, donors=((B, 1e6), (A, 5e6), (C, None)))
    asks = plan.take_asks(0.0, BYTES_MAX)
    assert [ask.donor for ask in asks] == [A, C, A, C, B, B], "of C, as of anybody unknown, 4 MB/s are assumed"
    assert [ask.piece for ask in asks[: len(pieces)]] == pieces[: len(asks)]
    assert len({(ask.donor, ask.piece.digest) for ask in asks}) == len(asks)


def test_donors_give_in_proportion_to_their_rates() -> None:
    done = transfer(300, a=Donor(rate=60e6), b=Donor(rate=30e6), c=Donor(rate=10e6))
    assert done.run()
    total = sum(one.delivered_bytes for one in done.plan.figures().values())
    shares = [bytes_from(done, peer) / total for peer in (A, B, C)]
    assert shares == [pytest.approx(0.6, abs=0.06), pytest.approx(0.3, abs=0.05), pytest.approx(0.1, abs=0.04)]
    assert done.now < 1.1 * total / 100e6, "all lines are busy to the end"


def test_what_fits_into_two_windows_is_still_shared_by_three() -> None:
    plan = begin(*make_pieces(30), donors=((A, 40e6), (B, 40e6), (C, 40e6)))
    asks = plan.take_asks(0.0, BYTES_MAX)
    assert Counter(ask.donor for ask in asks) == {A: 10, B: 10, C: 10}


def test_a_slow_donor_does_not_hold_up_the_end() -> None:
    alone = transfer(64, a=Donor(rate=50e6))
    helped = transfer(64, a=Donor(rate=50e6), b=Donor(rate=0.2e6))
    assert alone.run() and helped.run()
    assert helped.now < 1.5 * alone.now, "its pieces are asked of the fast one at the end"


def test_a_fast_line_has_a_wider_window_than_a_slow_one() -> None:
    plan = begin(*make_pieces(64), donors=((A, 100e6), (B, 1e5)))
    asks = plan.take_asks(0.0, BYTES_MAX)
    assert sum(ask.donor == A for ask in asks) == WINDOW_MAX
    assert sum(ask.donor == B for ask in asks) == WINDOW_MIN


def test_open_bytes_are_bounded() -> None:
    plan = begin(*make_pieces(64), donors=((A, 100e6), (B, 100e6)))
    plan.take_asks(0.0, 5 * MIB)
    assert plan.open_bytes == 5 * MIB
    assert plan.take_asks(0.0, 5 * MIB) == []


def test_one_piece_is_asked_for_whatever_the_bound() -> None:
    plan = begin(*make_pieces(2, 8 * MIB), donors=((A, 1e6),))
    assert plan.take_asks(0.0, 0) == [] == plan.take_asks(0.0, -MIB)
    assert len(plan.take_asks(0.0, MIB)) == 1


def test_a_digest_is_fetched_once_and_what_is_held_is_not() -> None:
    pieces = make_pieces(3)
    plan = begin(*pieces, *pieces, donors=((A, None),))
    plan.note_held(pieces[0].digest)
    plan.add(pieces)
    done = Transfer(plan, {A: Donor()})
    assert done.run()
    assert set(done.first) == {piece.digest for piece in pieces[1:]} and set(done.asked.values()) == {1}


def test_pieces_may_be_added_while_it_runs() -> None:
    first, second = make_pieces(4)[:2], make_pieces(4)[2:]
    plan = begin(*first, donors=((A, None),))
    done = Transfer(plan, {A: Donor()})
    assert done.run()
    plan.add(second)
    assert not plan.is_done
    assert done.run() and len(done.first) == 4


def test_a_donor_is_not_asked_for_rounds_that_it_has_not_kept() -> None:
    plan = FetchPlan()
    plan.add(make_pieces(2, first_round=4))
    plan.add_donor(A, None, first_round=5)
    assert plan.take_asks(0.0, BYTES_MAX) == []
    assert plan.find_unobtainable() is not None
    plan.add_donor(B, None, first_round=4)
    assert plan.find_unobtainable() is None
    assert {ask.donor for ask in plan.take_asks(0.0, BYTES_MAX)} == {B}


# -- donors that fail ------------------------------------------------------------------------------------------------


def test_a_donor_that_dies_costs_its_open_pieces_and_nothing_else() -> None:
    done = transfer(40, a=Donor(dies_s=1.0), b=Donor())
    assert done.run()
    assert bytes_from(done, A) > 0
    assert sum(done.asked.values()) <= 40 + FAILURES_MAX * WINDOW_MAX + 2 * WINDOW_MAX


def test_a_donor_that_stalls_is_overtaken_long_before_its_asks_time_out() -> None:
    done = transfer(40, a=Donor(stalls_s=1.0), b=Donor())
    assert done.run()
    alone = transfer(40, b=Donor())
    assert alone.run()
    assert done.now < alone.now + 1.0


def test_a_liar_is_asked_nothing_more() -> None:
    done = transfer(40, a=Donor(lies=True, rate=100e6), b=Donor())
    assert done.run()
    figures = done.plan.figures()
    assert figures[A].is_out and figures[A].delivered_bytes == 0 and not figures[B].is_out
    done.plan.readmit(A)
    assert done.plan.figures()[A].is_out
    assert sum(done.asked.values()) <= 40 + 2 * WINDOW_MAX


def test_a_piece_that_nobody_has_ends_the_transfer() -> None:
    missing = make_pieces(5)[2]
    done = transfer(5, a=Donor(missing=frozenset({missing.digest})), b=Donor(missing=frozenset({missing.digest})))
    assert not done.run()
    assert done.plan.find_unobtainable() == missing and len(done.first) == 4


def test_a_donor_without_anything_is_given_up() -> None:
    pieces = make_pieces(100)
    done = transfer(100, a=Donor(missing=frozenset(piece.digest for piece in pieces)), b=Donor())
    assert done.run()
    assert done.plan.figures()[A].is_out
    assert sum(done.asked.values()) <= 100 + MISSES_MAX + WINDOW_MAX + 3


def test_a_donor_that_fails_is_left_alone_longer_each_time() -> None:
    plan = begin(*make_pieces(1), donors=((A, None),))
    now, pauses = 0.0, []
    for _ in range(FAILURES_MAX):
        (ask,) = plan.take_asks(now, BYTES_MAX)
        plan.failed(ask, AskFailure.LOST, now)
        assert plan.take_asks(now, BYTES_MAX) == []
        due = plan.next_deadline(now)
        if due is not None:
            pauses.append(due - now)
            now = due
    assert pauses == [BENCH_S * 2**number for number in range(FAILURES_MAX - 1)]
    assert plan.figures()[A].is_out and plan.find_unobtainable() is not None
    plan.readmit(A)
    assert plan.find_unobtainable() is None and len(plan.take_asks(now, BYTES_MAX)) == 1


def test_one_lost_link_is_one_failure() -> None:
    plan = begin(*make_pieces(4), donors=((A, 100e6),))
    for ask in plan.take_asks(0.0, BYTES_MAX):
        plan.failed(ask, AskFailure.LOST, 0.0)
    assert plan.next_deadline(0.0) == BENCH_S


def test_a_donor_that_was_dropped_is_not_asked() -> None:
    plan = begin(*make_pieces(4), donors=((A, None), (B, None)))
    plan.drop_donor(A)
    assert {ask.donor for ask in plan.take_asks(0.0, BYTES_MAX)} == {B}


# -- second asks -----------------------------------------------------------------------------------------------------


def test_a_late_piece_is_asked_of_one_more_donor_and_not_of_a_third() -> None:
    (piece,) = make_pieces(1)
    plan = begin(piece, donors=((A, 10e6), (B, 9e6), (C, 8e6)))
    (first,) = plan.take_asks(0.0, BYTES_MAX)
    late_s = plan.next_deadline(0.0)
    assert first.donor == A and late_s is not None and late_s < first.timeout_s
    (second,) = plan.take_asks(late_s, BYTES_MAX)
    assert second.donor == B and plan.open_asks == ASKS_PER_PIECE_MAX
    assert plan.next_deadline(late_s) is None and plan.take_asks(late_s + 1, BYTES_MAX) == []
    assert plan.delivered(second, late_s + 0.1)
    assert not plan.is_wanted(first) and plan.open_asks == 1
    plan.withdrawn(first)
    assert plan.is_done and plan.figures()[A].delivered_bytes == 0


def test_a_second_copy_is_no_delivery() -> None:
    (piece,) = make_pieces(1)
    plan = begin(piece, donors=((A, 10e6), (B, 9e6)))
    (first,) = plan.take_asks(0.0, BYTES_MAX)
    (second,) = plan.take_asks(5.0, BYTES_MAX)
    assert plan.delivered(second, 5.1)
    assert not plan.delivered(first, 5.2)
    assert plan.figures()[A].delivered_bytes == 0


def test_the_last_piece_is_asked_of_whoever_brings_it_sooner() -> None:
    (piece,) = make_pieces(1)
    plan = begin(piece, donors=((A, 1e4),))
    (slow,) = plan.take_asks(0.0, BYTES_MAX)
    plan.add_donor(B, 10e6)
    (fast,) = plan.take_asks(0.0, BYTES_MAX)
    assert (slow.donor, fast.donor) == (A, B)


def test_what_is_overdue_is_asked_of_an_idle_donor_though_nothing_else_happens() -> None:
    (piece,) = make_pieces(1)
    plan = begin(piece, donors=((A, 1e5), (B, 9e4)))
    (first,) = plan.take_asks(0.0, BYTES_MAX)
    due_s, overdue_s = piece.nbytes / 1e5, plan.next_deadline(0.0)
    assert overdue_s == pytest.approx(due_s + piece.nbytes / 9e4 + LATE_MIN_S)
    assert plan.take_asks(due_s, BYTES_MAX) == [], "it may come any moment"
    (second,) = plan.take_asks(overdue_s, BYTES_MAX)
    assert (first.donor, second.donor) == (A, B)


def test_who_has_let_an_ask_time_out_is_not_taken_for_fast_again() -> None:
    first, second = make_pieces(2)
    plan = begin(first, donors=((A, None),))
    (ask,) = plan.take_asks(0.0, BYTES_MAX)
    plan.failed(ask, AskFailure.LOST, ask.timeout_s)
    assert plan.figures()[A].bytes_per_s <= first.nbytes / ask.timeout_s
    plan.add_donor(B, 1e6)
    assert [one.donor for one in plan.take_asks(ask.timeout_s + BENCH_S, BYTES_MAX)] == [B]
    lost = begin(second, donors=((A, 1e3),))
    (ask,) = lost.take_asks(0.0, BYTES_MAX)
    lost.failed(ask, AskFailure.LOST, 0.001)
    assert lost.figures()[A].bytes_per_s == 1e3, "a link that is lost at once says nothing of the line"


def test_an_ask_is_given_up_in_bounded_time() -> None:
    plan = begin(*make_pieces(4), donors=((A, 1.0), (B, 1e9)))
    timeouts = [ask.timeout_s for ask in plan.take_asks(0.0, BYTES_MAX)]
    assert all(10.0 <= timeout_s <= 60.0 for timeout_s in timeouts)


def test_a_failed_piece_is_asked_for_before_those_behind_it() -> None:
    pieces = make_pieces(40)
    plan = begin(*pieces, donors=((A, 10e6),))
    asks = plan.take_asks(0.0, BYTES_MAX)
    plan.failed(asks[0], AskFailure.MISSING, 0.0)
    assert [ask.piece for ask in plan.take_asks(0.0, BYTES_MAX)] == [pieces[len(asks)]]
    plan.add_donor(B, 10e6)
    assert plan.take_asks(0.0, BYTES_MAX)[0].piece == pieces[0]
