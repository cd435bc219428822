"""Shares: misses in a row shrink what a peer owns, then it owns nothing, then it gets another chance."""

import pytest

from shoal.protocol import shares as module
from shoal.protocol.shares import PROBATION_ROUNDS, SMALL_SHARE, Shares, assign_parts
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
