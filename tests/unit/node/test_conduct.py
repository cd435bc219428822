"""The accounts of misbehaving peers, with time as an argument: liars are refused for a while, the merely late never."""

import pytest

from shoal.node.conduct import (
    HONEST,
    LATE_MAX,
    LATE_PER_PART_MAX,
    LIES_MAX,
    PEERS_MAX,
    REFUSED_S,
    WINDOW_S,
    Conduct,
    Fault,
    judge,
)
from shoal.protocol.errors import Refusal
from shoal.protocol.identity import PeerId
from shoal.protocol.round_state import RESENDS_MAX

ME, ANN, BOB = (PeerId(letter * 32) for letter in (b"m", b"a", b"b"))
# What nobody sends who runs this program, speaks this version and belongs to this swarm.
LIES = set(Refusal) - HONEST


def lie(conduct: Conduct, peer: PeerId, now: float, times: int = 1) -> list[bool]:
    return [conduct.note(peer, Refusal.BAD_SIGNATURE, Fault.LIE, now) for _ in range(times)]


@pytest.mark.parametrize("refusal", list(Refusal))
def test_every_reason_is_either_what_honest_peers_cause_or_a_lie(refusal: Refusal) -> None:
    assert judge(refusal) is (Fault.LATE if refusal in HONEST else Fault.LIE)


def test_forgery_and_nonsense_are_lies_and_lateness_is_none() -> None:
    assert {
        Refusal.MALFORMED,
        Refusal.NON_CANONICAL,
        Refusal.BAD_SIGNATURE,
        Refusal.WRONG_LENGTH,
        Refusal.WRONG_DIGEST,
        Refusal.EQUIVOCATION,
        Refusal.NOT_FINITE,
        Refusal.OVERSIZED,
    } <= LIES
    # Anybody on the path can flip a bit; a healed partition is on another base for a while.
    assert {Refusal.WRONG_ROUND, Refusal.DUPLICATE, Refusal.NOT_AUTHENTIC, Refusal.WRONG_BASE} <= HONEST


def test_the_last_of_too_many_lies_says_hang_up_once() -> None:
    conduct = Conduct(ME)
    assert lie(conduct, ANN, 5.0, LIES_MAX + 3) == [False] * (LIES_MAX - 1) + [True] + [False] * 3
    assert conduct.refusal(ANN, 5.0) is Refusal.BAD_SIGNATURE
    assert conduct.refusal(BOB, 5.0) is None
    assert conduct.list_refused(6.0) == {ANN: (Refusal.BAD_SIGNATURE, REFUSED_S - 1.0)}


def test_what_is_rare_never_adds_up() -> None:
    conduct = Conduct(ME)
    spacing_s = WINDOW_S / (LIES_MAX - 1)
    assert not any(conduct.note(ANN, Refusal.MALFORMED, Fault.LIE, number * spacing_s) for number in range(10_000))


def test_a_little_faster_than_that_adds_up() -> None:
    conduct = Conduct(ME)
    spacing_s = WINDOW_S / (LIES_MAX + 1)
    assert any(conduct.note(ANN, Refusal.MALFORMED, Fault.LIE, number * spacing_s) for number in range(1_000))


def test_a_refused_peer_gets_another_chance_and_no_sooner_for_knocking() -> None:
    conduct = Conduct(ME)
    lie(conduct, ANN, 0.0, LIES_MAX)
    for now in range(int(REFUSED_S)):
        assert lie(conduct, ANN, float(now)) == [False]
        assert conduct.refusal(ANN, float(now)) is Refusal.BAD_SIGNATURE
    assert conduct.refusal(ANN, REFUSED_S) is None
    assert conduct.list_refused(REFUSED_S) == {}
    assert lie(conduct, ANN, REFUSED_S, LIES_MAX) == [False] * (LIES_MAX - 1) + [True], "the account began empty"


@pytest.mark.parametrize("parts", [1, 64, 4096])
def test_a_peer_that_sends_every_part_too_late_round_after_round_is_never_hung_up_on(parts: int) -> None:
    conduct = Conduct(ME)
    conduct.expect_parts(parts)
    rounds_per_window = LATE_PER_PART_MAX // (1 + RESENDS_MAX)
    assert rounds_per_window >= 8
    for number in range(2 * rounds_per_window):
        now = number * WINDOW_S / rounds_per_window
        for _ in range(parts * (1 + RESENDS_MAX)):
            assert not conduct.note(ANN, Refusal.WRONG_ROUND, Fault.LATE_PART, now)


def test_a_dozen_duplicates_a_second_after_reconnects_cost_nothing() -> None:
    conduct = Conduct(ME)
    for number in range(12 * 3600):
        assert not conduct.note(ANN, Refusal.DUPLICATE, Fault.LATE, number / 12)


def test_a_flood_of_late_messages_is_one_too_many() -> None:
    conduct = Conduct(ME)
    noted = [conduct.note(ANN, Refusal.WRONG_ROUND, Fault.LATE, 0.0) for _ in range(LATE_MAX)]
    assert noted == [False] * (LATE_MAX - 1) + [True]


def test_a_flood_of_late_parts_is_one_too_many() -> None:
    conduct = Conduct(ME)
    conduct.expect_parts(3)
    flood = LATE_MAX + 3 * LATE_PER_PART_MAX
    noted = [conduct.note(ANN, Refusal.DUPLICATE, Fault.LATE_PART, 0.0) for _ in range(flood)]
    assert noted == [False] * (flood - 1) + [True]


def test_lateness_and_lies_fill_one_account() -> None:
    conduct = Conduct(ME)
    for _ in range(LATE_MAX // 2):
        assert not conduct.note(ANN, Refusal.WRONG_ROUND, Fault.LATE, 0.0)
    assert lie(conduct, ANN, 0.0, LIES_MAX // 2)[-1]


def test_nobody_accuses_himself() -> None:
    conduct = Conduct(ME)
    assert not any(lie(conduct, ME, 0.0, 10 * LIES_MAX))
    assert conduct.refusal(ME, 0.0) is None


def test_strangers_are_forgotten_before_those_that_are_refused() -> None:
    conduct = Conduct(ME)
    lie(conduct, ANN, 0.0, LIES_MAX)
    lie(conduct, BOB, 0.0, LIES_MAX - 1)
    for number in range(PEERS_MAX + 100):
        lie(conduct, PeerId(number.to_bytes(32, "big")), 1.0)
        assert len(conduct) <= PEERS_MAX
    assert conduct.refusal(ANN, 1.0) is Refusal.BAD_SIGNATURE
    assert lie(conduct, BOB, 1.0, 2)[-1], "who has lied most is remembered longest"


def test_when_all_are_refused_the_one_whose_time_is_up_first_makes_room() -> None:
    conduct = Conduct(ME)
    for number in range(PEERS_MAX):
        lie(conduct, PeerId(number.to_bytes(32, "big")), number / PEERS_MAX, LIES_MAX)
    assert len(conduct.list_refused(1.0)) == PEERS_MAX
    lie(conduct, ANN, 1.0, LIES_MAX)
    assert len(conduct) == PEERS_MAX
    refused = conduct.list_refused(1.0)
    assert ANN in refused and PeerId(bytes(32)) not in refused
