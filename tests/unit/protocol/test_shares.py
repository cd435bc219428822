"""Shares: misses in a row shrink what a peer owns, then it owns nothing, then it gets another chance."""

import pytest

from shoal.protocol import shares as module
from shoal.protocol.shares import PROBATION_ROUNDS, SMALL_SHARE, Shares, assign_parts, balance_uploads
from tests.unit.protocol.samples import PEERS

A, B, C, D = PEERS[:4]
ALL = frozenset(PEERS[:4])
NOBODY: frozenset[bytes] = frozenset()


def miss(shares: Shares, *rounds: int) -> None:
    for number in rounds:
        shares.note_round(number, ALL, frozenset({A}))


def test_two_misses_in_a_row_shrink_a_share_and_the_third_stops_it() -> None:
    shares = Shares()
    seen = []
    for number in range(1, 5):
        miss(shares, number)
        seen.append(shares.share(A))
    assert seen == [1.0, SMALL_SHARE, 0.0, 0.0]
    assert [shares.share(peer) for peer in (B, C, D, PEERS[5])] == [1.0] * 4


@pytest.mark.parametrize("misses", [1, 2])
def test_a_round_that_a_peer_keeps_up_in_makes_good_for_its_misses(misses: int) -> None:
    shares = Shares()
    miss(shares, *range(misses))
    shares.note_round(5, ALL, frozenset())
    assert shares.share(A) == 1.0
    miss(shares, 6)
    assert shares.share(A) == 1.0, "they are counted in a row"


def test_a_round_in_which_it_owns_nothing_makes_good_for_nothing() -> None:
    shares = Shares()
    miss(shares, 1, 2)
    shares.note_round(3, ALL - {A}, frozenset())
    assert shares.share(A) == SMALL_SHARE
    miss(shares, 4)
    shares.note_round(5, ALL, frozenset())
    assert shares.share(A) == 0.0, "not even one that it was given when nobody else was left"


def test_after_its_probation_a_peer_has_a_small_share_again_and_one_miss_ends_it() -> None:
    shares = Shares()
    miss(shares, 1, 2, 3)
    for number in range(4, 3 + PROBATION_ROUNDS):
        shares.note_round(number, ALL - {A}, frozenset())
        assert shares.share(A) == 0.0
    back = 3 + PROBATION_ROUNDS
    shares.note_round(back, ALL - {A}, frozenset())
    assert shares.share(A) == SMALL_SHARE
    miss(shares, back + 1)
    assert shares.share(A) == 0.0
    for number in range(back + 2, back + 2 + PROBATION_ROUNDS):
        shares.note_round(number, ALL - {A}, frozenset())
    assert shares.share(A) == SMALL_SHARE
    shares.note_round(100, ALL, frozenset())
    assert shares.share(A) == 1.0


def test_rounds_that_were_missed_do_not_lengthen_a_probation() -> None:
    shares = Shares()
    miss(shares, 1, 2, 3)
    shares.note_round(500, frozenset(), frozenset())
    assert shares.share(A) == SMALL_SHARE


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PEERS_MAX", 3)
    shares = Shares()
    for peer in PEERS:
        for number in (1, 2, 3):
            shares.note_round(number, frozenset({peer}), frozenset({peer}))
    assert len(shares._misses) == 3 and set(shares._stopped_at) == set(shares._misses)
    assert [shares.share(peer) for peer in PEERS] == [1.0] * 5 + [0.0] * 3, "the oldest are forgotten"


# -- parts ----------------------------------------------------------------------------------------------------------


def test_parts_go_round_and_are_not_bunched() -> None:
    assert assign_parts((A, B, C), {}, 7) == (A, B, C, A, B, C, A)
    owners = assign_parts((A, B), {A: SMALL_SHARE}, 10)
    assert owners.count(A) == 2
    first, second = (part for part, owner in enumerate(owners) if owner == A)
    assert second - first == 5


def test_whoever_has_no_share_owns_nothing_while_others_can() -> None:
    assert set(assign_parts((A, B, C), {B: 0.0}, 20)) == {A, C}
    assert set(assign_parts((A, B, C), dict.fromkeys((A, B, C), 0.0), 20)) == {A, B, C}, "somebody has to"
    assert assign_parts((A,), {A: 0.0}, 2) == (A, A)


# -- lines of different rates ------------------------------------------------------------------------------------------


def upload_ends(
    speeds: dict[bytes, float], shares: dict[bytes, float], members: int, ratio: float
) -> dict[bytes, float]:
    """When each owner has sent what it sends, by counting that: a contribution takes 1 at speed 1."""
    own = {peer: share / len(speeds) for peer, share in shares.items()}
    return {peer: ((1 - own[peer]) + own[peer] * (members - 1) * ratio) / speeds[peer] for peer in speeds}


@pytest.mark.parametrize("ratio", [0.5, 1.0, 36.0], ids=["smaller updates", "the same codec", "sparse"])
@pytest.mark.parametrize("rates", [(1, 1, 1, 0.6), (1, 1, 0.5, 0.5), (1, 0.9, 0.3, 0.05), (2, 1, 1, 1, 1, 0.5)])
def test_owners_have_sent_everything_at_one_time_or_own_nothing(rates: tuple[float, ...], ratio: float) -> None:
    speeds = dict(zip(PEERS, rates, strict=False))
    for members in (len(rates), len(rates) + 2):  # some may not own parts
        shares = balance_uploads(speeds, members, ratio)
        assert sum(shares.values()) == pytest.approx(len(rates))
        ends = upload_ends(speeds, shares, members, ratio)
        working = [ends[peer] for peer in speeds if shares[peer] > 0]
        assert working == pytest.approx([working[0]] * len(working))
        assert all(end >= working[0] for peer, end in ends.items() if shares[peer] == 0)
        even = upload_ends(speeds, dict.fromkeys(speeds, 1.0), members, ratio)
        assert max(ends.values()) <= max(even.values()) + 1e-9


@pytest.mark.parametrize(("members", "ratio"), [(2, 1.0), (2, 0.5), (4, 0.25)])
def test_where_owning_parts_costs_no_upload_all_have_the_same(members: int, ratio: float) -> None:
    assert balance_uploads({A: 1.0, B: 0.05}, members, ratio) == {A: 1.0, B: 1.0}


def test_equal_lines_have_equal_shares_to_the_bit_and_nobody_has_none() -> None:
    assert balance_uploads(dict.fromkeys(PEERS[:3], 0.3), 3, 1.0) == dict.fromkeys(PEERS[:3], 1.0)
    assert balance_uploads({}, 3, 1.0) == {}
    assert balance_uploads({A: 0.05}, 3, 1.0) == {A: 1.0}


def test_a_line_a_fifth_as_fast_owns_nothing_among_three_fast_ones() -> None:
    shares = balance_uploads({A: 1.0, B: 1.0, C: 1.0, D: 0.2}, 4, 1.0)
    assert shares == pytest.approx({A: 4 / 3, B: 4 / 3, C: 4 / 3, D: 0.0})
