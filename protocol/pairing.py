"""Pairs of peers that mix what they would contribute, while their swarm has too few voters in sight for any round.

A peer that is ready offers its contribution; two that stand on the same base and are ready for the same round make a
pair, and each moves towards the other until both stand at their weighted mean (randomized gossip, Boyd et al., IEEE
Trans. Inf. Theory 52(6), 2006; for training: AD-PSGD, arXiv 1710.06952, and NoLoCo, arXiv 2506.10911). It is made from
what is encoded of both contributions, which both have, so that what one gains is to the bit what codecs let through and
the weighted sum of all peers' parameters stays what it was, up to rounding: a round that comes later is the round that
would have come of it, and nothing here is certified or needs to be. Where an answer, or a part, reaches only one of the
two, that one moves alone, within the bound below.

Invariants: a peer is in one pair at a time; it accepts no ask while its own one is open, but for the ask of the very
peer that it asks, of which one of both counts; a partner moves a peer by no more than NORM_RATIO_MAX + 1 times the
norm of its own contribution, whatever it declares and sends.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np

from shoal.protocol.aggregators import squared_norm
from shoal.protocol.codecs import Codec, Encoded, Float32s
from shoal.protocol.errors import ProtocolError, Refusal
from shoal.protocol.identity import PeerId
from shoal.protocol.wire import U63, Bound, Bytes32

DIGESTS_MAX = 1024  # the most parts that a contribution has
CLAIM_RATIO_MAX = 2.0  # one of a pair counts at most so many times as much as the other
NORM_RATIO_MAX = 4.0  # a contribution that is longer than so many times the other one is shortened to that


@dataclass(frozen=True, slots=True, kw_only=True)
class PairOffer:
    """A frozen contribution to `round`, made of so many tokens and steps upon the base with this root. Its parts can be
    fetched over tensor links by their digests."""

    round: U63
    base_root: Bytes32
    tokens: U63
    steps: Annotated[int, Bound(1, 2**40)]
    digests: Annotated[tuple[Bytes32, ...], Bound(1, DIGESTS_MAX)]


@dataclass(frozen=True, slots=True, kw_only=True)
class AskPair:
    """Asks the other one to be a pair with this peer."""

    offer: PairOffer


@dataclass(frozen=True, slots=True, kw_only=True)
class PairAnswer:
    """What the other one offers; None: it is in another pair, or does not wait."""

    offer: PairOffer | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Partner:
    peer: PeerId
    offer: PairOffer


class Pairing:
    """Who is whose partner, as one peer sees it. `draw` picks one of at least one peers.

    `open` with what there is to offer, then `choose` and ask until there is a `partner`; `close` when it is over."""

    def __init__(self, me: PeerId, draw: Callable[[Sequence[PeerId]], PeerId]) -> None:
        self._me = me
        self._draw = draw
        self._offer: PairOffer | None = None
        self._asked: PeerId | None = None
        self._declined: set[PeerId] = set()
        self.partner: Partner | None = None

    def open(self, offer: PairOffer) -> None:
        """This is what the peer has, until `close`."""
        self.close()
        self._offer = offer

    def close(self) -> None:
        """Whatever comes now is declined."""
        self._offer = self._asked = self.partner = None
        self._declined.clear()

    def choose(self, ready: Mapping[PeerId, tuple[int, bytes]]) -> AskPair | None:
        """What to ask `asked`, one of those who are ready for this round upon this base; None: nobody is left, or none
        is needed. Who has declined is asked again when everybody has."""
        offer = self._offer
        if offer is None or self.partner is not None or self._asked is not None:
            return None
        stands = (offer.round, offer.base_root)
        fitting = sorted(peer for peer, where in ready.items() if where == stands and peer != self._me)
        fresh = [peer for peer in fitting if peer not in self._declined]
        if not fresh:
            self._declined.clear()
            return None
        self._asked = self._draw(fresh)
        return AskPair(offer=offer)

    @property
    def asked(self) -> PeerId | None:
        """Who has been asked and has not answered yet."""
        return self._asked

    def take_ask(self, peer: PeerId, ask: AskPair) -> PairAnswer:
        """Raises ProtocolError for an offer that no honest peer makes."""
        offer = self._offer
        if offer is None or self.partner is not None or not _is_fitting(offer, ask.offer):
            return PairAnswer(offer=None)
        # Of two that ask each other the ask of the one with the lower id counts, and the other one is declined.
        if self._asked is not None and not (self._asked == peer and peer < self._me):
            return PairAnswer(offer=None)
        self._asked = None
        self.partner = Partner(peer=peer, offer=ask.offer)
        return PairAnswer(offer=offer)

    def take_answer(self, peer: PeerId, answer: PairAnswer) -> None:
        """Of who was asked, unless that has become a pair meanwhile. Raises ProtocolError as `take_ask`."""
        if self._asked != peer:
            return
        self._asked = None
        self._declined.add(peer)
        assert self._offer is not None, "who has asked is open"
        if answer.offer is not None and _is_fitting(self._offer, answer.offer):
            self.partner = Partner(peer=peer, offer=answer.offer)

    def fail(self, peer: PeerId) -> None:
        """No answer came."""
        self.take_answer(peer, PairAnswer(offer=None))


def _is_fitting(own: PairOffer, other: PairOffer) -> bool:
    if (own.round, own.base_root) != (other.round, other.base_root):
        return False
    if len(own.digests) != len(other.digests):
        detail = f"the contribution of a pair has {len(other.digests)} parts, not {len(own.digests)}"
        raise ProtocolError(Refusal.WRONG_LENGTH, detail)
    return True


def find_share(own: PairOffer, other: PairOffer) -> float:
    """How far the own parameters go towards the other's: the other's share of the pair's weight, 1/3 to 2/3. A claim is
    tokens^2 / steps, as in a round."""
    mine, theirs = (max(one.tokens, 1) ** 2 / one.steps for one in (own, other))
    mine, theirs = min(mine, CLAIM_RATIO_MAX * theirs), min(theirs, CLAIM_RATIO_MAX * mine)
    return theirs / (mine + theirs)


def find_lengths(own_norm: float, other_norm: float) -> tuple[float, float]:
    """By what factor the own and the other contribution count: 1, but for one that is too long beside the other."""
    own = min(1.0, NORM_RATIO_MAX * other_norm / own_norm) if own_norm else 1.0
    other = min(1.0, NORM_RATIO_MAX * own_norm / other_norm) if other_norm else 1.0
    return own, other


def find_move(
    codec: Codec, own: Sequence[Encoded], other: Sequence[Encoded], share: float, parts: Sequence[Float32s]
) -> None:
    """Write what is to be added to the local parameters in each of these parts, float32[elements of the part].

    Contributions are base minus local, encoded: local goes by share * (own - other). Raises ProtocolError where the
    other one does not decode; then `parts` holds anything."""
    squares = [0.0, 0.0]
    for mine, theirs, part in zip(own, other, parts, strict=True):
        for which, raw in enumerate((mine, theirs)):
            codec.decode_untrusted(raw, part.size, part)
            squares[which] += squared_norm(part)
    lengths = find_lengths(math.sqrt(squares[0]), math.sqrt(squares[1]))
    gains = np.float32(share * lengths[0]), np.float32(share * lengths[1])
    for mine, theirs, part in zip(own, other, parts, strict=True):
        other_values = np.empty_like(part)
        codec.decode_range(mine, part.size, 0, part)
        codec.decode_range(theirs, part.size, 0, other_values)
        part *= gains[0]
        other_values *= gains[1]
        part -= other_values
