"""What members' words about addresses add up to."""

import pytest

from shoal.node.reachability import (
    VERDICT_LIFE_S,
    VERDICTS_MAX,
    NatMapping,
    Reachability,
    ReachReason,
    ReachState,
    judge_mapping,
)
from shoal.protocol.identity import PeerId

PUBLIC, OTHER, HOME = ("8.8.8.8", 9461), ("8.8.4.4", 9461), ("192.168.1.5", 9461)
ANN, BOB, CARA = (PeerId(bytes([number]) * 32) for number in range(3))
YES, NO = ReachReason.DIALLED_BACK, ReachReason.DIAL_BACK_FAILED


def made(*addresses: tuple[str, int]) -> Reachability:
    known = Reachability()
    known.set_candidates(addresses or (PUBLIC, HOME))
    return known


def tell(known: Reachability, address: tuple[str, int], *words: tuple[PeerId, bool], now: float = 0.0) -> None:
    for peer, reached in words:
        known.note(address, peer, reached=reached, reason=YES if reached else NO, now=now)


def test_without_a_word_nothing_is_known_and_everything_is_announced() -> None:
    known = made()
    assert known.judge(0.0) == (ReachState.UNKNOWN, ReachReason.NOT_ASKED)
    assert known.announced(0.0) == (PUBLIC, HOME)


def test_without_an_address_nobody_can_come() -> None:
    known = Reachability()
    assert known.judge(0.0) == (ReachState.PRIVATE, ReachReason.NO_ADDRESS)
    assert known.announced(0.0) == ()


@pytest.mark.parametrize(
    ("address", "words", "state"),
    [
        (PUBLIC, [(ANN, True)], ReachState.REACHABLE),
        (PUBLIC, [(ANN, False)], ReachState.PRIVATE),
        (PUBLIC, [(ANN, True), (BOB, False)], ReachState.REACHABLE),
        (HOME, [(ANN, True), (BOB, False)], ReachState.PRIVATE),
        (HOME, [(ANN, True), (BOB, True), (CARA, False)], ReachState.REACHABLE),
        (PUBLIC, [(ANN, True), (BOB, False), (CARA, False)], ReachState.PRIVATE),
        (PUBLIC, [(ANN, True), (ANN, False)], ReachState.PRIVATE),
        (PUBLIC, [(ANN, False), (ANN, True)], ReachState.REACHABLE),
    ],
)
def test_the_majority_of_newest_words_decides(
    address: tuple[str, int], words: list[tuple[PeerId, bool]], state: ReachState
) -> None:
    known = made(address)
    tell(known, address, *words)
    assert known.judge(0.0)[0] is state


def test_a_peer_is_as_reachable_as_its_best_address_and_announces_what_is_open_first() -> None:
    known = made(HOME, OTHER, PUBLIC)
    tell(known, HOME, (ANN, False))
    tell(known, PUBLIC, (ANN, True))
    assert known.judge(0.0) == (ReachState.REACHABLE, YES)
    assert known.announced(0.0) == (PUBLIC, OTHER), "what was found closed is not announced"
    assert [one.state for one in known.describe(0.0)] == [
        ReachState.PRIVATE,
        ReachState.UNKNOWN,
        ReachState.REACHABLE,
    ]


def test_an_address_that_was_tried_says_more_than_one_that_was_not() -> None:
    known = made(OTHER, HOME)
    tell(known, HOME, (ANN, False))
    assert known.judge(0.0) == (ReachState.PRIVATE, NO)


def test_words_are_forgotten_in_time() -> None:
    known = made(PUBLIC)
    tell(known, PUBLIC, (ANN, True), now=10.0)
    assert known.judge(10.0 + VERDICT_LIFE_S - 1)[0] is ReachState.REACHABLE
    assert known.judge(10.0 + VERDICT_LIFE_S)[0] is ReachState.UNKNOWN


def test_a_change_outdates_what_was_said_before_it() -> None:
    known = made(PUBLIC, HOME)
    tell(known, PUBLIC, (ANN, True), now=10.0)
    tell(known, HOME, (BOB, True), now=20.0)
    known.forget_before(20.0)
    assert [one.state for one in known.describe(20.0)] == [ReachState.UNKNOWN, ReachState.REACHABLE]


def test_who_stays_a_candidate_keeps_what_is_known_of_it() -> None:
    known = made(PUBLIC, HOME)
    tell(known, PUBLIC, (ANN, True))
    assert not known.set_candidates((PUBLIC, HOME, PUBLIC))
    assert known.set_candidates((OTHER, PUBLIC))
    assert known.candidates == (OTHER, PUBLIC)
    assert known.judge(0.0)[0] is ReachState.REACHABLE
    tell(known, HOME, (ANN, True))
    assert known.set_candidates((HOME,))
    assert known.judge(0.0)[0] is ReachState.UNKNOWN, "it was no candidate when it was noted"


def test_words_of_many_are_bounded_and_the_oldest_goes() -> None:
    known = made(PUBLIC)
    tell(known, PUBLIC, (ANN, True))
    others = [(PeerId(bytes([100 + number]) * 32), number % 2 == 0) for number in range(VERDICTS_MAX)]
    tell(known, PUBLIC, *others)
    # As many yes as no: had Ann's word stayed, a private address would be reachable, too.
    assert len(known._candidates[PUBLIC].verdicts) == VERDICTS_MAX
    assert ANN not in known._candidates[PUBLIC].verdicts


@pytest.mark.parametrize(
    ("observed", "mapping"),
    [
        ((), NatMapping.UNKNOWN),
        ((HOME,), NatMapping.NONE),
        ((PUBLIC,), NatMapping.UNKNOWN),
        ((PUBLIC, PUBLIC), NatMapping.ENDPOINT_INDEPENDENT),
        ((("8.8.8.8", 1024), ("8.8.8.8", 1025)), NatMapping.ENDPOINT_DEPENDENT),
        ((("192.168.1.5", 1024),), NatMapping.UNKNOWN),
    ],
)
def test_what_routers_make_of_the_port(observed: tuple[tuple[str, int], ...], mapping: NatMapping) -> None:
    assert judge_mapping(("192.168.1.5",), observed, 9461) is mapping
