"""Pairs without a quorum: whatever is said in whatever order, and whatever is sent, a peer has one partner at a time,
moves by so much and no more, and what one of two gains the other one loses.

The reference is plain NumPy in float64: it knows neither codecs nor parts, and mixes parameters instead of moves.
"""

import random
from collections.abc import Sequence
from itertools import combinations

import numpy as np
import numpy.typing as npt
from hypothesis import event, given, settings
from hypothesis import strategies as st

from shoal.protocol.codecs import CODECS, Codec, Encoded, Float32s
from shoal.protocol.errors import ProtocolError
from shoal.protocol.identity import PeerId
from shoal.protocol.pairing import (
    NORM_RATIO_MAX,
    AskPair,
    PairAnswer,
    Pairing,
    PairOffer,
    find_lengths,
    find_move,
    find_share,
)

Float64s = npt.NDArray[np.float64]
ROUNDED = 2.0**-22  # what a few float32 operations may be wrong by, of what goes into them
TINY = 2.0**-140  # and beside that, where the result is subnormal
ROOT = b"r" * 32

codecs = st.sampled_from(sorted(CODECS)).map(CODECS.__getitem__)
seeds = st.integers(0, 2**32 - 1)
sizes = st.lists(st.integers(1, 300), min_size=1, max_size=3)
# Below 2^-40 beside the largest that a partner may send, factors are subnormal, and all of them mean nothing.
exponents = st.integers(-36, 60)
claims = st.tuples(st.integers(0, 2**63 - 1) | st.integers(0, 1000), st.integers(1, 2**40) | st.integers(1, 100))


def offer_of(claim: tuple[int, int], digest: bytes = bytes(32)) -> PairOffer:
    return PairOffer(round=1, base_root=ROOT, tokens=claim[0], steps=claim[1], digests=(digest,))


@st.composite
def contributions(draw: st.DrawFn, parts: Sequence[int]) -> list[Float32s]:
    """Zeros, or values around one magnitude, some of them zeros."""
    rng = np.random.default_rng(draw(seeds))
    if draw(st.integers(0, 9)) == 0:
        return [np.zeros(size, np.float32) for size in parts]
    exponent, kept = draw(exponents), draw(st.sampled_from([1.0, 0.5, 0.02]))
    values = [np.ldexp(rng.standard_normal(size), exponent) * (rng.random(size) < kept) for size in parts]
    return [one.astype(np.float32) for one in values]


@st.composite
def anything(draw: st.DrawFn, parts: Sequence[int]) -> list[Float32s]:
    """What a liar may send: any magnitudes, up to the largest that its codec has."""
    rng = np.random.default_rng(draw(seeds))
    low, high = sorted((draw(st.integers(-149, 120)), draw(st.integers(-149, 120))))
    values = [np.ldexp(rng.standard_normal(size), rng.integers(low, high, size, endpoint=True)) for size in parts]
    return [one.astype(np.float32) for one in values]


def encode(codec: Codec, parts: Sequence[Float32s]) -> list[Encoded]:
    return [codec.encode(one) for one in parts]


def move(
    codec: Codec, own: Sequence[Encoded], other: Sequence[Encoded], share: float, parts: Sequence[int]
) -> Float32s:
    moved = [np.full(size, np.nan, np.float32) for size in parts]
    find_move(codec, own, other, share, moved)
    return np.concatenate(moved)


def decode(codec: Codec, raw: Sequence[Encoded], parts: Sequence[int]) -> Float64s:
    out = [np.empty(size, np.float32) for size in parts]
    for one, values in zip(raw, out, strict=True):
        codec.decode_untrusted(one, values.size, values)
    return np.concatenate(out).astype(np.float64)


def norm(values: npt.NDArray[np.floating]) -> float:
    return float(np.linalg.norm(values.astype(np.float64)))


# -- how far --------------------------------------------------------------------------------------------------------


@given(codec=codecs, parts=sizes, claim=claims, other_claim=claims, data=st.data())
@settings(max_examples=150, deadline=None)
def test_what_one_gains_the_other_loses(
    codec: Codec, parts: list[int], claim: tuple[int, int], other_claim: tuple[int, int], data: st.DataObject
) -> None:
    raw = [encode(codec, data.draw(contributions(parts))) for _ in range(2)]
    offers = offer_of(claim), offer_of(other_claim)
    shares = find_share(offers[0], offers[1]), find_share(offers[1], offers[0])
    assert 1 / 3 - 1e-12 <= shares[0] <= 2 / 3 + 1e-12
    assert abs(sum(shares) - 1.0) < 1e-12
    moves = move(codec, raw[0], raw[1], shares[0], parts), move(codec, raw[1], raw[0], shares[1], parts)
    # Of the pair's weight each has what the other one goes towards it.
    total = shares[1] * moves[0].astype(np.float64) + shares[0] * moves[1].astype(np.float64)
    values = [decode(codec, one, parts) for one in raw]
    lengths = find_lengths(norm(values[0]), norm(values[1]))
    sizes_of = [length * np.abs(one) for length, one in zip(lengths, values, strict=True)]
    assert np.all(np.abs(total) <= ROUNDED * (sizes_of[0] + sizes_of[1]) + TINY)
    expected = shares[0] * (lengths[0] * values[0] - lengths[1] * values[1])
    assert np.all(np.abs(moves[0] - expected) <= ROUNDED * (sizes_of[0] + sizes_of[1]) + TINY)


@given(parts=sizes, seed=seeds, ratio=st.floats(0.3, 3.0), claim=claims, other_claim=claims)
@settings(max_examples=100, deadline=None)
def test_in_full_precision_both_come_to_stand_at_their_weighted_mean(
    parts: list[int], seed: int, ratio: float, claim: tuple[int, int], other_claim: tuple[int, int]
) -> None:
    rng = np.random.default_rng(seed)
    size = sum(parts)
    base = rng.standard_normal(size).astype(np.float32)
    deltas = rng.standard_normal((2, size))
    deltas /= np.linalg.norm(deltas, axis=1, keepdims=True)
    deltas[1] *= ratio
    locals_ = [base - delta.astype(np.float32) for delta in deltas]
    codec, cuts = CODECS["fp32"], np.cumsum(parts)[:-1]
    raw = [encode(codec, np.split(base - one, cuts)) for one in locals_]
    offers = offer_of(claim), offer_of(other_claim)
    share = find_share(offers[0], offers[1])
    ends = [
        locals_[0] + move(codec, raw[0], raw[1], share, parts),
        locals_[1] + move(codec, raw[1], raw[0], find_share(offers[1], offers[0]), parts),
    ]
    mean = (1 - share) * locals_[0].astype(np.float64) + share * locals_[1]
    for end in ends:
        np.testing.assert_allclose(end, mean, rtol=0, atol=1e-5)


@given(codec=codecs, parts=sizes, claim=claims, other_claim=claims, data=st.data())
@settings(max_examples=200, deadline=None)
def test_no_partner_moves_a_peer_by_more_than_its_own_contribution_allows(
    codec: Codec, parts: list[int], claim: tuple[int, int], other_claim: tuple[int, int], data: st.DataObject
) -> None:
    own, other = encode(codec, data.draw(contributions(parts))), encode(codec, data.draw(anything(parts)))
    share = find_share(offer_of(claim), offer_of(other_claim))
    moved = move(codec, own, other, share, parts)
    assert np.all(np.isfinite(moved))
    own_norm = norm(decode(codec, own, parts))
    event("other is too long", norm(decode(codec, other, parts)) > NORM_RATIO_MAX * own_norm)
    assert norm(moved) <= share * (NORM_RATIO_MAX + 1) * own_norm * (1 + 1e-5) + TINY


@given(codec=codecs, parts=sizes, which=st.integers(0, 2), hostile=st.binary(min_size=1, max_size=64), data=st.data())
@settings(max_examples=200, deadline=None)
def test_what_does_not_decode_is_refused_and_nothing_else(
    codec: Codec, parts: list[int], which: int, hostile: bytes, data: st.DataObject
) -> None:
    own = encode(codec, data.draw(contributions(parts)))
    other = encode(codec, data.draw(contributions(parts)))
    which %= len(parts)
    bent = bytearray(other[which])
    length = len(bent)
    at = data.draw(st.integers(0, len(bent) - 1))
    bent[at : at + len(hostile)] = hostile  # in place, or longer by some bytes
    if data.draw(st.booleans()):
        bent = bent[:length]
    other[which] = memoryview(bytes(bent))
    try:
        decode(codec, other, parts)
        decodes = True
    except ProtocolError:
        decodes = False
    assert not decodes or len(bent) == length
    event("decodes", decodes)
    try:
        moved = move(codec, own, other, 0.5, parts)
    except ProtocolError:
        assert not decodes
    else:
        assert decodes and np.all(np.isfinite(moved))


# -- many peers -----------------------------------------------------------------------------------------------------


def mix(base: Float64s, params: list[Float64s], weights: list[float], one: int, other: int) -> bool:
    """The reference: both go to their weighted mean, as far as the longer one's way from the base counts. Returns
    whether all of it does."""
    ways = [params[peer] - base for peer in (one, other)]
    norms = [float(np.sqrt(np.sum(way * way))) for way in ways]
    cuts = [min(1.0, 4.0 * norms[1 - place] / norms[place]) if norms[place] else 1.0 for place in (0, 1)]
    counted = [cut * way for cut, way in zip(cuts, ways, strict=True)]
    share = weights[other] / (weights[one] + weights[other])
    params[one] = params[one] + share * (counted[1] - counted[0])
    params[other] = params[other] + (1 - share) * (counted[0] - counted[1])
    return cuts == [1.0, 1.0]


@given(
    seed=seeds,
    peers=st.integers(2, 6),
    parts=sizes,
    drawn=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 5)), max_size=12),
    steps=st.lists(st.integers(20, 40), min_size=6, max_size=6),
    lengths=st.lists(st.sampled_from([0.0, 0.01, 1.0, 30.0]), min_size=6, max_size=6),
)
@settings(max_examples=100, deadline=None)
def test_pairs_do_what_the_reference_does_and_come_closer(
    seed: int,
    peers: int,
    parts: list[int],
    drawn: list[tuple[int, int]],
    steps: list[int],
    lengths: list[float],
) -> None:
    rng = np.random.default_rng(seed)
    size, cuts, codec = sum(parts), np.cumsum(parts)[:-1], CODECS["fp32"]
    base = rng.standard_normal(size).astype(np.float32)
    # Claims within a factor of two are counted as they are, and every peer's weight is the same in each of its pairs.
    offers = [offer_of((300, count)) for count in steps[:peers]]
    weights = [300.0**2 / count for count in steps[:peers]]
    params = [base + (rng.standard_normal(size) * length).astype(np.float32) for length in lengths[:peers]]
    expected = [one.astype(np.float64) for one in params]
    mean = np.average(expected, axis=0, weights=weights)

    def spread() -> float:
        return sum(weight * norm(one - mean) ** 2 for weight, one in zip(weights, params, strict=True))

    is_whole, first = True, spread()
    before = first
    pairs = [(one % peers, (one + step) % peers) for one, step in drawn]
    sweeps = 8 * list(combinations(range(peers), 2))
    for one, other in [pair for pair in (*pairs, *sweeps) if pair[0] != pair[1]]:
        raw = {peer: encode(codec, np.split(base - params[peer], cuts)) for peer in (one, other)}
        for peer, partner in ((one, other), (other, one)):
            share = find_share(offers[peer], offers[partner])
            params[peer] = params[peer] + move(codec, raw[peer], raw[partner], share, parts)
        is_whole = mix(base.astype(np.float64), expected, weights, one, other) and is_whole
        after = spread()
        assert after <= before + 1e-6 * (first + 1.0), "no pair drives peers apart"
        before = after
    for found, wanted in zip(params, expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)
    np.testing.assert_allclose(np.average(params, axis=0, weights=weights), mean, rtol=0, atol=1e-4)
    event("nothing was too long", is_whole)
    if is_whole:
        assert spread() <= first / 100 + 1e-6


# -- who with whom --------------------------------------------------------------------------------------------------


class Crowd:
    """Some peers and what is on its way between them. An ask is open until it is answered or lost, as a question of the
    daemon's is. A turn ends when its peer has a partner or gives up, and the next one begins when nothing from it or to
    it is on its way any more: between the two it trains, and that takes longer than a question may."""

    def __init__(self, peers: int, seed: int) -> None:
        rng = random.Random(seed)
        self.ids = [PeerId(bytes([number + 1]) * 32) for number in range(peers)]
        self.pairings = {peer: Pairing(peer, rng.choice) for peer in self.ids}
        self.offers: dict[PeerId, PairOffer] = {}
        self.travelling: list[tuple[PeerId, PeerId, AskPair | PairAnswer]] = []
        self.alone: set[PeerId] = set()  # who has a partner that knows nothing of it, or has ended its turn
        self.turns = 0
        for peer in self.ids:
            self.begin(peer)

    def begin(self, peer: PeerId) -> None:
        self.turns += 1
        self.alone.discard(peer)
        self.alone |= {other for other, one in self.pairings.items() if one.partner and one.partner.peer == peer}
        self.offers[peer] = offer_of((self.turns, 1))
        self.pairings[peer].open(self.offers[peer])

    def choose(self, peer: PeerId) -> None:
        ask = self.pairings[peer].choose(dict.fromkeys(self.ids, (1, ROOT)))
        asked = self.pairings[peer].asked
        if ask is not None:
            assert asked is not None and asked != peer
            self.travelling.append((peer, asked, ask))

    def deliver(self, number: int) -> None:
        sender, target, message = self.travelling.pop(number)
        if isinstance(message, AskPair):
            self.travelling.append((target, sender, self.pairings[target].take_ask(sender, message)))
        else:
            self.pairings[target].take_answer(sender, message)

    def lose(self, number: int) -> None:
        sender, target, message = self.travelling.pop(number)
        if isinstance(message, AskPair):
            self.pairings[sender].fail(target)
            return
        if message.offer is not None:
            self.alone.add(sender)
        self.pairings[target].fail(sender)

    def is_talking(self, peer: PeerId) -> bool:
        return any(peer in (sender, target) for sender, target, _ in self.travelling)

    def check(self, partners: dict[PeerId, PeerId | None]) -> None:
        for peer, pairing in self.pairings.items():
            partner = pairing.partner
            assert partners[peer] is None or (partner and partner.peer == partners[peer]), "a partner stays"
            if partner is None:
                continue
            assert partner.peer != peer and pairing.asked is None
            back = self.pairings[partner.peer].partner
            if back is not None and back.peer == peer:
                assert partner.offer == self.offers[partner.peer] and back.offer == self.offers[peer]
        if not self.travelling:
            for peer in set(self.ids) - self.alone:
                partner = self.pairings[peer].partner
                back = self.pairings[partner.peer].partner if partner else None
                assert partner is None or (back is not None and back.peer == peer), "pairs are mutual"

    def partners(self) -> dict[PeerId, PeerId | None]:
        return {peer: one.partner.peer if one.partner else None for peer, one in self.pairings.items()}


acts = st.sampled_from(["choose", "choose", "deliver", "deliver", "deliver", "lose", "turn"])
scripts = st.lists(st.tuples(acts, st.integers(0, 2**16)), min_size=20, max_size=60)


@given(peers=st.integers(2, 5), seed=seeds, script=scripts)
@settings(max_examples=300, deadline=None)
def test_nobody_ever_has_two_partners_and_a_pair_knows_each_others_offers(
    peers: int, seed: int, script: list[tuple[str, int]]
) -> None:
    # Where an answer is lost, whoever gave it believes in a pair of which the other one knows nothing: it moves alone.
    crowd = Crowd(peers, seed)
    for what, number in script:
        before = crowd.partners()
        peer = crowd.ids[number % peers]
        if what == "choose":
            crowd.choose(peer)
        elif what == "turn" and not crowd.is_talking(peer):
            before[peer] = None
            crowd.begin(peer)
        elif what != "turn" and crowd.travelling:
            (crowd.deliver if what == "deliver" else crowd.lose)(number % len(crowd.travelling))
        crowd.check(before)


@given(peers=st.integers(2, 7), seed=seeds, script=scripts)
@settings(max_examples=200, deadline=None)
def test_whatever_came_before_all_find_partners_but_one_of_an_odd_number(
    peers: int, seed: int, script: list[tuple[str, int]]
) -> None:
    crowd = Crowd(peers, seed)
    for what, number in script:
        if what == "choose":
            crowd.choose(crowd.ids[number % peers])
        elif what == "deliver" and crowd.travelling:
            crowd.deliver(number % len(crowd.travelling))
    while crowd.travelling:
        crowd.deliver(0)
    # From now on one after the other, until each has asked all of the others.
    for peer in crowd.ids * 2 * peers:
        crowd.choose(peer)
        while crowd.travelling:
            crowd.deliver(0)
    crowd.check(crowd.partners())
    assert list(crowd.partners().values()).count(None) == peers % 2
