"""What a peer does that is ready while its swarm has no quorum: it mixes with another one, and trains on.

Where for `training.gossip_after_s` too few voters were in sight for any round, a peer that has handed over its work
and waits offers it to others that wait (protocol.pairing), for `rounds.grace_s` at least. With a partner each fetches
the other's encoded contribution over a tensor link and moves its own parameters to the mean of the two; without one it
goes on as it is. Either way the READY is taken back first, and said anew when the trainer is due again. When a quorum
comes back, rounds go on from the base that they left, with all of the work in the next contributions.

Invariants: a trainer's parameters move when the whole of the partner's contribution is here and decodes, or not at all;
no more is held of a partner than its encoded contribution; a turn lasts as long as the training before it, or
`grace_s`, and `exchange_timeout_s` at most.
"""

import asyncio
import logging
import secrets
from collections.abc import Callable
from functools import partial

from shoal.node.control import PeerUnreachable, RequestRefused
from shoal.node.exchange import PartExchange
from shoal.node.link_port import FetchFailed, LinkLost
from shoal.node.local_state import LocalState
from shoal.node.membership import Membership
from shoal.node.own_presence import OwnPresence
from shoal.node.round_driver import RoundDriver
from shoal.protocol.codecs import CODECS, Float32s
from shoal.protocol.errors import Failure, ProtocolError, Refusal
from shoal.protocol.identity import PeerId
from shoal.protocol.manifest import Manifest
from shoal.protocol.messages import Presence, decode_message_untrusted, encode_message
from shoal.protocol.pairing import AskPair, PairAnswer, Pairing, PairOffer, Partner, find_move, find_share

LOOK_S = 0.5  # how often it is looked whether there is a quorum, and who is ready
FETCHES_AT_ONCE = 4

log = logging.getLogger(__name__)


class PairMixing:
    """All calls on the event loop. `run` for as long as the daemon trains."""

    def __init__(
        self,
        *,
        manifest: Manifest,
        driver: RoundDriver,
        state: LocalState,
        exchange: PartExchange,
        membership: Membership,
        presence: OwnPresence,
        misbehaved: Callable[[PeerId, ProtocolError], None],
        tell: Callable[[PeerId | None, Failure | None], None],
    ) -> None:
        """`tell` hears of every turn: with whom it mixed, or why with nobody."""
        self._manifest = manifest
        self._swarm = presence.swarm
        self._control = presence.control
        self._driver = driver
        self._core = driver.core
        self._state = state
        self._exchange = exchange
        self._compute = presence.compute
        self._membership = membership
        self._presence = presence
        self._misbehaved = misbehaved
        self._tell = tell
        self._pairing = Pairing(presence.identity.peer, secrets.choice)
        self._alone_since_s: float | None = None
        self._began_s: float | None = None  # to train after the last turn since there was a quorum

    async def run(self) -> None:
        """Until cancelled; at once where the manifest has peers wait."""
        if self._manifest.training.gossip_after_s == 0:
            return
        while True:
            await asyncio.sleep(LOOK_S)
            if self._is_alone() and (offer := self._find_offer()) is not None:
                await self._take_turn(offer)

    def answer(self, peer: PeerId, ask: AskPair) -> PairAnswer:
        """Raises ProtocolError for what no honest peer asks."""
        return self._pairing.take_ask(peer, ask) if self._is_alone() else PairAnswer(offer=None)

    def _is_alone(self) -> bool:
        """Whether no round could be certified for so long that it is not waited for any more."""
        now = self._driver.now()
        if self._core.sees_quorum:
            self._alone_since_s = self._began_s = None
        elif self._alone_since_s is None:
            self._alone_since_s = now
        since_s = self._alone_since_s
        return since_s is not None and now >= since_s + self._manifest.training.gossip_after_s

    def _find_offer(self) -> PairOffer | None:
        """What this peer has to offer, if it waits with it."""
        signed, frozen = self._presence.ready, self._exchange.frozen
        if signed is None or frozen is None or self._presence.leaving or not self._compute.waits:
            return None
        ready = signed.ready
        if frozen.root != ready.contribution_root or ready.round != self._core.round or not self._core.may_withdraw:
            return None
        return PairOffer(
            round=ready.round,
            base_root=ready.base_root,
            tokens=ready.tokens,
            steps=ready.steps,
            digests=frozen.digests,
        )

    async def _take_turn(self, offer: PairOffer) -> None:
        frozen = self._exchange.frozen
        assert frozen is not None, "it is offered"
        self._exchange.lend(frozen)
        self._pairing.open(offer)
        try:
            partner = await self._find_partner(offer)
        finally:
            self._pairing.close()
        if partner is None and not self._is_alone():
            return  # a round is to be had again, and this peer is ready for it
        theirs = None if partner is None else await self._fetch(partner)
        if self._find_offer() != offer:
            return  # the round has moved on meanwhile
        was_planned = self._core.withdraw(self._driver.now())
        if was_planned is None:
            return
        self._presence.ready = None
        self._membership.announce()
        self._driver.pump()
        if not was_planned:
            await self._state.release(frozen)
        find = None
        if partner is not None and theirs is not None:
            find = partial(self._find_move, tuple(frozen.encoded), theirs, find_share(offer, partner.offer))
        try:
            is_shifted = await self._compute.train_alone(find)
        except ProtocolError as error:
            assert partner is not None, "nothing else is decoded"
            self._misbehaved(partner.peer, error)
            is_shifted = False
        self._began_s = self._driver.now()
        peer = None if partner is None else partner.peer
        failure = Failure.NO_PARTNER if peer is None else Failure.PARTNER_LOST
        outcome = None if is_shifted else failure
        self._compute.note_pair(outcome)
        self._tell(peer, outcome)

    async def _find_partner(self, offer: PairOffer) -> Partner | None:
        """Within `grace_s`, in which a quorum may come back, too; while others are about to be ready, within the time
        that its own training took, if that is longer: from then on they are ready together."""
        now = self._driver.now()
        ends_s = now + self._manifest.rounds.grace_s
        others_end_s = max(ends_s, now if self._began_s is None else 2 * now - self._began_s)
        while True:
            if self._pairing.partner is not None:
                return self._pairing.partner
            if not self._is_alone() or self._find_offer() != offer:
                return None
            live = self._membership.table.live()
            ready = {peer: one.ready.ready for peer, one in live.items() if one.ready is not None}
            ask = self._pairing.choose({peer: (one.round, one.base_root) for peer, one in ready.items()})
            if ask is not None:
                await self._ask(ask)
            elif self._driver.now() >= (others_end_s if any(map(self._is_about, live.values())) else ends_s):
                return None
            else:
                await asyncio.sleep(LOOK_S)

    def _is_about(self, other: Presence) -> bool:
        """Whether this peer trains upon the same base and will be ready."""
        trains = other.trains and not other.leaving and other.ready is None
        return trains and other.state_root == self._core.head.state_root

    async def _ask(self, ask: AskPair) -> None:
        peer = self._pairing.asked
        assert peer is not None, "somebody was chosen"
        try:
            raw = await self._control.request(peer, encode_message(self._swarm, ask))
            answer = decode_message_untrusted(self._swarm, raw)
            if not isinstance(answer, PairAnswer):
                raise ProtocolError(Refusal.UNKNOWN_TYPE, f"{type(answer).__name__} is no answer to AskPair")
            self._pairing.take_answer(peer, answer)
        except (PeerUnreachable, RequestRefused) as error:
            log.debug("no answer to an offer to mix: %s", error)
            self._pairing.fail(peer)
        except ProtocolError as error:
            self._misbehaved(peer, error)
            self._pairing.fail(peer)

    async def _fetch(self, partner: Partner) -> tuple[memoryview, ...] | None:
        """The partner's encoded parts; None where they did not come within `exchange_timeout_s`."""
        numbers = self._manifest.list_parts(partner.offer.round)
        places = asyncio.Semaphore(FETCHES_AT_ONCE)

        async def fetch(number: int, digest: bytes) -> memoryview | None:
            async with places:
                buffer = self._state.memory.take(self._manifest.contribution_bytes(number))
                try:
                    await self._exchange.fetch_lent(partner.peer, digest, buffer)
                except (LinkLost, FetchFailed) as error:
                    log.debug("a part of a pair's contribution did not come: %s", error)
                    return None
                return buffer

        pairs = zip(numbers, partner.offer.digests, strict=True)
        try:
            async with asyncio.timeout(self._manifest.rounds.exchange_timeout_s):
                found = await asyncio.gather(*(fetch(number, digest) for number, digest in pairs))
        except TimeoutError:
            return None
        whole = tuple(one for one in found if one is not None)
        return whole if len(whole) == len(found) else None

    def _find_move(
        self, own: tuple[memoryview, ...], other: tuple[memoryview, ...], share: float, move: Float32s
    ) -> None:
        """Blocking. Raises ProtocolError."""
        ranges = [self._manifest.part_range(part) for part in self._manifest.list_parts(self._core.round)]
        if len(ranges) < self._manifest.parts:
            move[:] = 0.0  # what the round does not exchange stays
        find_move(CODECS[self._manifest.rounds.codec], own, other, share, [move[first:end] for first, end in ranges])
