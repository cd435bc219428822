"""Pairs without a quorum: who becomes whose partner, and how far each of two moves."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from shoal.protocol.codecs import CODECS
from shoal.protocol.errors import ProtocolError, Refusal
from shoal.protocol.identity import PeerId
from shoal.protocol.messages import PARTS_MAX
from shoal.protocol.pairing import (
    CLAIM_RATIO_MAX,
    DIGESTS_MAX,
    NORM_RATIO_MAX,
    AskPair,
    PairAnswer,
    Pairing,
    PairOffer,
    find_lengths,
    find_move,
    find_share,
)
from tests.unit.protocol.samples import PEERS, make_digests, make_head

HEAD = make_head()
STANDS = 1, HEAD.state_root
LOW, MIDDLE, HIGH = PEERS[:3]
DECLINED = PairAnswer(offer=None)


def make_offer(peer: PeerId, *, tokens: int = 300, steps: int = 10) -> PairOffer:
    digests = make_digests(peer.hex())
    return PairOffer(round=1, base_root=HEAD.state_root, tokens=tokens, steps=steps, digests=digests)


def take_first(peers: Sequence[PeerId]) -> PeerId:
    return peers[0]


def wait_for(peer: PeerId) -> Pairing:
    """A peer that has something to offer, and asks whoever has the lowest id first."""
    pairing = Pairing(peer, take_first)
    pairing.open(make_offer(peer))
    return pairing


def ask(pairing: Pairing, *ready: PeerId) -> AskPair:
    asked = pairing.choose(dict.fromkeys(ready, STANDS))
    assert asked is not None
    return asked


def partner_of(pairing: Pairing) -> PeerId | None:
    return None if pairing.partner is None else pairing.partner.peer


# -- who with whom --------------------------------------------------------------------------------------------------


def test_who_asks_and_who_answers_are_a_pair() -> None:
    low, high = wait_for(LOW), wait_for(HIGH)
    asked = ask(low, LOW, HIGH)
    assert low.asked == HIGH, "nobody asks itself"
    answer = high.take_ask(LOW, asked)
    low.take_answer(HIGH, answer)
    assert (partner_of(low), partner_of(high)) == (HIGH, LOW)
    assert low.partner is not None and low.partner.offer == make_offer(HIGH)
    assert high.partner is not None and high.partner.offer == make_offer(LOW)


def test_one_of_those_who_fit_is_drawn() -> None:
    seen: list[Sequence[PeerId]] = []

    def take_last(peers: Sequence[PeerId]) -> PeerId:
        seen.append(tuple(peers))
        return peers[-1]

    pairing = Pairing(LOW, take_last)
    pairing.open(make_offer(LOW))
    assert pairing.choose({HIGH: STANDS, MIDDLE: STANDS, PEERS[3]: (2, HEAD.state_root)}) is not None
    assert (seen, pairing.asked) == ([(MIDDLE, HIGH)], HIGH)


def test_nobody_is_asked_twice_at_once_nor_by_who_has_a_partner() -> None:
    low, middle = wait_for(LOW), wait_for(MIDDLE)
    asked = ask(low, MIDDLE, HIGH)
    assert low.choose({HIGH: STANDS}) is None, "an ask is open"
    low.take_answer(MIDDLE, middle.take_ask(LOW, asked))
    assert low.choose({HIGH: STANDS}) is None, "it has a partner"
    assert middle.choose({HIGH: STANDS}) is None, "and so has the other one"


def test_who_is_busy_declines() -> None:
    low, middle, high = wait_for(LOW), wait_for(MIDDLE), wait_for(HIGH)
    asked = ask(low, MIDDLE)
    assert low.take_ask(HIGH, ask(high, LOW)) == DECLINED, "its own ask is open"
    middle.take_ask(LOW, asked)
    high.fail(LOW)
    assert middle.take_ask(HIGH, ask(high, MIDDLE)) == DECLINED, "it has a partner"
    assert partner_of(middle) == LOW
    middle.close()
    assert middle.take_ask(HIGH, AskPair(offer=make_offer(HIGH))) == DECLINED, "it does not wait"


@pytest.mark.parametrize(("asker", "answerer"), [(LOW, HIGH), (HIGH, LOW)], ids=["low first", "high first"])
@pytest.mark.parametrize("answer_overtakes", [False, True])
def test_of_two_that_ask_each_other_exactly_one_ask_counts(
    asker: PeerId, answerer: PeerId, answer_overtakes: bool
) -> None:
    one, other = wait_for(asker), wait_for(answerer)
    first, second = ask(one, answerer), ask(other, asker)
    answer_to_second = one.take_ask(answerer, second)
    if answer_overtakes:
        other.take_answer(asker, answer_to_second)
    answer_to_first = other.take_ask(asker, first)
    assert [answer_to_first.offer, answer_to_second.offer].count(None) == 1
    one.take_answer(answerer, answer_to_first)
    other.take_answer(asker, answer_to_second)
    assert (partner_of(one), partner_of(other)) == (answerer, asker)


def test_the_ask_of_the_lower_id_is_the_one_that_counts() -> None:
    low, high = wait_for(LOW), wait_for(HIGH)
    of_low, of_high = ask(low, HIGH), ask(high, LOW)
    assert low.take_ask(HIGH, of_high) == DECLINED
    assert high.take_ask(LOW, of_low) == PairAnswer(offer=make_offer(HIGH))
    assert high.asked is None and partner_of(high) == LOW
    high.take_answer(LOW, DECLINED)
    assert partner_of(high) == LOW, "what comes of the ask that does not count changes nothing"


def test_three_that_ask_one_another_in_a_ring_find_a_pair_later() -> None:
    ring = {peer: wait_for(peer) for peer in (LOW, MIDDLE, HIGH)}
    asks = [(peer, other, ask(ring[peer], other)) for peer, other in pairwise((LOW, MIDDLE, HIGH, LOW))]
    answers = [(peer, other, ring[other].take_ask(peer, asked)) for peer, other, asked in asks]
    assert [answer.offer for _, _, answer in answers] == [None] * 3
    for peer, other, answer in answers:
        ring[peer].take_answer(other, answer)
    asked = ask(ring[HIGH], MIDDLE)
    ring[HIGH].take_answer(MIDDLE, ring[MIDDLE].take_ask(HIGH, asked))
    assert [partner_of(one) for one in ring.values()] == [None, HIGH, MIDDLE]


def test_who_has_declined_or_not_answered_is_asked_again_when_all_have() -> None:
    pairing = wait_for(LOW)
    ready = dict.fromkeys((LOW, MIDDLE, HIGH), STANDS)
    for _ in range(2):
        assert pairing.choose(ready) is not None and pairing.asked == MIDDLE
        pairing.take_answer(MIDDLE, DECLINED)
        assert pairing.choose(ready) is not None and pairing.asked == HIGH
        pairing.fail(HIGH)
        assert pairing.choose(ready) is None and pairing.asked is None, "once nobody is left"
    pairing.choose(ready)
    pairing.fail(MIDDLE)
    pairing.open(make_offer(LOW))
    assert pairing.choose(ready) is not None and pairing.asked == MIDDLE, "and with something else to offer"


@pytest.mark.parametrize("changes", [{"round": 2}, {"base_root": b"o" * 32}])
def test_who_stands_elsewhere_is_not_asked_and_is_declined(changes: dict[str, object]) -> None:
    other = replace(make_offer(HIGH), **changes)  # type: ignore[arg-type]
    pairing = wait_for(LOW)
    assert pairing.choose({HIGH: (other.round, other.base_root)}) is None
    assert pairing.take_ask(HIGH, AskPair(offer=other)) == DECLINED
    ask(pairing, HIGH)
    pairing.take_answer(HIGH, PairAnswer(offer=other))
    assert pairing.partner is None and pairing.asked is None
    # Of a contribution to another round the number of parts says nothing.
    short = replace(other, digests=other.digests[:1])
    assert pairing.take_ask(HIGH, AskPair(offer=short)) == DECLINED


def test_another_number_of_parts_is_what_no_honest_peer_offers() -> None:
    digests = make_digests("more", 5)
    lie = replace(make_offer(HIGH), digests=digests)
    pairing = wait_for(LOW)
    with pytest.raises(ProtocolError, match="5 parts, not 4") as caught:
        pairing.take_ask(HIGH, AskPair(offer=lie))
    assert caught.value.refusal is Refusal.WRONG_LENGTH
    ask(pairing, HIGH)
    with pytest.raises(ProtocolError, match="5 parts, not 4"):
        pairing.take_answer(HIGH, PairAnswer(offer=lie))
    assert pairing.partner is None and pairing.asked is None, "others can be asked"
    assert pairing.choose({HIGH: STANDS}) is None, "before the one that has answered so"


def test_only_who_was_asked_answers() -> None:
    pairing = wait_for(LOW)
    ask(pairing, MIDDLE)
    pairing.take_answer(HIGH, PairAnswer(offer=make_offer(HIGH)))
    assert (pairing.partner, pairing.asked) == (None, MIDDLE)


def test_nothing_outlasts_the_offer() -> None:
    pairing = wait_for(LOW)
    assert pairing.take_ask(HIGH, AskPair(offer=make_offer(HIGH))).offer == make_offer(LOW)
    pairing.close()
    assert pairing.partner is None and pairing.choose({HIGH: STANDS}) is None
    pairing.open(make_offer(LOW))
    ask(pairing, MIDDLE)
    pairing.close()
    pairing.take_answer(MIDDLE, PairAnswer(offer=make_offer(MIDDLE)))
    assert pairing.partner is None, "an answer that comes too late"
    pairing.open(make_offer(LOW))
    assert pairing.asked is None


# -- how far --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("own", "other", "share"),
    [
        ((300, 10), (300, 10), 1 / 2),
        ((300, 10), (300, 20), 1 / 3),  # of as many tokens those count more that were made in fewer steps
        ((300, 20), (300, 10), 2 / 3),
        ((400, 10), (500, 10), 25 / 41),
        ((300, 10), (2**63 - 1, 1), 2 / 3),
        ((2**63 - 1, 1), (0, 2**40), 1 / 3),
        ((0, 7), (0, 7), 1 / 2),
        ((0, 1), (1, 1), 1 / 2),
    ],
)
def test_the_share_is_the_others_part_of_the_weight(own: tuple[int, int], other: tuple[int, int], share: float) -> None:
    offers = [make_offer(LOW, tokens=tokens, steps=steps) for tokens, steps in (own, other)]
    assert find_share(offers[0], offers[1]) == pytest.approx(share, rel=1e-15)
    assert find_share(offers[1], offers[0]) == pytest.approx(1 - share, rel=1e-15)
    assert CLAIM_RATIO_MAX == 2.0, "so that shares are between a third and two thirds"


@pytest.mark.parametrize(
    ("own", "other", "lengths"),
    [
        (1.0, 1.0, (1.0, 1.0)),
        (1.0, 4.0, (1.0, 1.0)),
        (1.0, 8.0, (1.0, 0.5)),
        (40.0, 1.0, (0.1, 1.0)),
        (0.0, 1.0, (1.0, 0.0)),  # who has done nothing is not moved, whatever the other one says
        (0.0, 0.0, (1.0, 1.0)),
    ],
)
def test_what_is_too_long_beside_the_other_is_shortened(own: float, other: float, lengths: tuple[float, float]) -> None:
    assert find_lengths(own, other) == lengths
    assert find_lengths(other, own) == lengths[::-1], "both come to the same"
    assert lengths[1] * other <= NORM_RATIO_MAX * own or own == 0.0


def test_the_move_is_the_same_everywhere() -> None:
    # If this fails, two versions of shoal mix differently. Norms are 5 and 26 over both parts, and no part's own.
    codec = CODECS["fp32"]
    short = [np.array([3.0, 0.0], np.float32), np.array([4.0], np.float32)]
    long = [np.array([10.0, 0.0], np.float32), np.array([-24.0], np.float32)]
    for own, other, lengths in ((short, long, (1.0, 4.0 * 5.0 / 26.0)), (long, short, (4.0 * 5.0 / 26.0, 1.0))):
        parts = [np.empty(2, np.float32), np.empty(1, np.float32)]
        find_move(codec, [codec.encode(one) for one in own], [codec.encode(one) for one in other], 0.6, parts)
        gain_own, gain_other = (np.float32(0.6 * length) for length in lengths)
        for move, mine, theirs in zip(parts, own, other, strict=True):
            assert move.tobytes() == (gain_own * mine - gain_other * theirs).tobytes()


def test_every_contribution_can_be_offered() -> None:
    assert DIGESTS_MAX == PARTS_MAX
