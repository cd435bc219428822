"""The relaying member's side of tensor links between two members that can neither dial nor punch each other.

    ask         one of the two asks for a way to the other one, over the control plane
    call        the other one is told, over the control plane, which reaches it through relays where it must
    preamble    each of the two connects to this peer's tensor port and names its token
    splice      from then on their bytes pass; their handshake is from end to end, as on any link

So who sits here sees only sealed records, and can neither read nor forge them: all that it can do is to end the link.

Invariants: only members are served, both of them, and only while this peer itself can be dialled: never an open relay;
a token is of one use, of one peer and of JOIN_TIMEOUT_S; splices, promised ones included, connections that have not
named a token, asks of a peer and bytes of an hour are bounded; each splice ends within IDLE_TIMEOUT_S of silence and
LIFE_S_MAX at all; after `close` no connection is left.
"""

import asyncio
import logging
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from shoal.node.allowances import Allowances
from shoal.node.config import TensorTable
from shoal.node.control import ControlPlane, PeerUnreachable, RequestRefused
from shoal.node.links import TensorLinks
from shoal.node.relay_budget import RelayBudget
from shoal.node.reminders import Reminders
from shoal.node.splice import MAGIC, TOKEN_BYTES, Side, Splice
from shoal.node.status import ReasonCount, TensorRelayStatus
from shoal.protocol.errors import Failure, ProtocolError, Refusal
from shoal.protocol.identity import PeerId, short_peer_id
from shoal.protocol.messages import AskRelay, RelayCall, RelayTicket, decode_message_untrusted, encode_message

MIB = 1024 * 1024
CALL_TIMEOUT_S = 3.0  # for the other one's answer
JOIN_TIMEOUT_S = 5.0  # from the promise until both connections are there
IDLE_TIMEOUT_S = 60.0  # without a byte in either direction: a link pings every 5 s
LIFE_S_MAX = 3600.0
CHECK_PERIOD_S = 5.0  # of both peers' membership
DRAIN_TIMEOUT_S = 5.0  # for what was taken when a splice ends in order
REPLACE_AFTER_S = 5.0  # an older splice of two peers that want another one is of no use to them
UNNAMED_MAX = 32  # connections that have not named their token
ASKS_BURST = 16  # of one peer at once
ASKS_PER_S = 0.5  # and for long
BUDGET_BYTES_MIN = MIB  # with less than that left nothing new is begun

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class RelayPorts:
    """What relaying needs of the daemon."""

    refusal: Callable[[PeerId], Refusal | None]  # NOT_A_MEMBER or BANNED; None for a member
    reached: Callable[[], bool]  # whether others can dial this peer's tensor port
    now: Callable[[], float]


class TensorRelay:
    """All calls on the event loop."""

    def __init__(
        self,
        me: PeerId,
        swarm: bytes,
        config: TensorTable,
        control: ControlPlane,
        links: TensorLinks,
        ports: RelayPorts,
    ) -> None:
        self._me = me
        self._swarm = swarm
        self._config = config
        self._control = control
        self._links = links
        self._ports = ports
        self._budget = RelayBudget(
            bytes_max=config.relay_mib_per_hour * MIB, bytes_per_peer_max=config.relay_peer_mib_per_hour * MIB
        )
        self._asks: Allowances[PeerId] = Allowances(burst=ASKS_BURST, per_s=ASKS_PER_S)
        self._splices: dict[frozenset[PeerId], Splice] = {}
        self._tickets: dict[bytes, tuple[Splice, int]] = {}  # by token: whose connection it names
        self._unnamed: dict[Side, None] = {}
        self._sides: set[Side] = set()  # every connection whose socket is still there
        self.opened = 0
        self.relayed_bytes = 0
        self.ends: Counter[Failure] = Counter()
        self.refusals: Counter[Refusal] = Counter()
        self._reminders: Reminders[tuple[PeerId, Refusal]] = Reminders()

    @property
    def carried(self) -> int:
        """Splices through which bytes pass now."""
        return sum(splice.is_open for splice in self._splices.values())

    @property
    def budget_bytes(self) -> int:
        """How many more bytes this peer passes on within the hour."""
        return self._budget.left((), self._ports.now()) if self._config.relay else 0

    def status(self) -> TensorRelayStatus:
        """For people."""
        return TensorRelayStatus(
            active=self._config.relay and self._ports.reached(),
            links=self.carried,
            relayed_bytes=self.relayed_bytes,
            budget_bytes=self.budget_bytes,
            refusals=tuple(ReasonCount(reason=one.value, count=count) for one, count in sorted(self.refusals.items())),
            ends=tuple(ReasonCount(reason=one.value, count=count) for one, count in sorted(self.ends.items())),
        )

    # -- the promise -------------------------------------------------------------------------------------------------

    async def take_ask(self, asker: PeerId, ask: AskRelay) -> RelayTicket:
        """A way from the asker to the peer that it names; raises ProtocolError."""
        splice = self._promise(asker, ask.peer)
        tokens = [os.urandom(TOKEN_BYTES) for _ in splice.pair]
        self._tickets |= {token: (splice, index) for index, token in enumerate(tokens)}
        self._links.spawn(self._watch(splice))
        if not await self._call(ask.peer, RelayCall(peer=asker, token=tokens[1])):
            splice.end(Failure.PEER_UNREACHABLE)
            self._refuse(asker, Refusal.NOT_READY, f"{short_peer_id(ask.peer)} does not take part")
        return RelayTicket(token=tokens[0])

    def _promise(self, asker: PeerId, other: PeerId) -> Splice:
        """Room for the two; raises ProtocolError."""
        pair, now = frozenset((asker, other)), self._ports.now()
        if len(pair) != 2 or self._me in pair:
            raise ProtocolError(Refusal.MALFORMED, "a relay is asked for a way between two others")
        if not self._config.relay or not self._ports.reached():
            self._refuse(asker, Refusal.NOT_READY, "this peer relays nothing")
        for peer in (asker, other):
            refusal = self._ports.refusal(peer)
            if refusal is not None:
                self._refuse(asker, refusal, f"{short_peer_id(peer)}: relaying is for members")
        if not self._asks.take(asker, now):
            self._refuse(asker, Refusal.LIMIT, f"{ASKS_BURST} asks at once")
        if self._budget.left(pair, now) < BUDGET_BYTES_MIN:
            self._refuse(asker, Refusal.BUDGET_SPENT, "no bytes are left for this hour")
        known = self._splices.get(pair)
        if known is not None and known.is_wanted(now - REPLACE_AFTER_S):
            self._refuse(asker, Refusal.DUPLICATE, "there is one between the two")
        others = [one for key, one in self._splices.items() if key != pair]
        busiest = max(sum(peer in one.pair for one in others) for peer in pair)
        if len(others) >= self._config.relay_links_max or busiest >= self._config.relay_links_per_peer_max:
            self._refuse(asker, Refusal.LIMIT, f"{len(others)} links are relayed")
        if known is not None:
            known.cut()
        self._splices[pair] = Splice((asker, other), now, self._spend)
        return self._splices[pair]

    async def _call(self, peer: PeerId, call: RelayCall) -> bool:
        """Whether the other one comes."""
        try:
            raw = await self._control.request(peer, encode_message(self._swarm, call), CALL_TIMEOUT_S)
            answer = decode_message_untrusted(self._swarm, raw)
        except (PeerUnreachable, RequestRefused, ProtocolError) as error:
            log.debug("%s is not called: %s", short_peer_id(peer), error)
            return False
        return isinstance(answer, RelayTicket) and answer.token == call.token

    def _refuse(self, asker: PeerId, refusal: Refusal, detail: str) -> NoReturn:
        self.refusals[refusal] += 1
        if (ending := self._reminders.take((asker, refusal), self._ports.now())) is not None:
            log.info("a link is not relayed for %s: %s: %s%s", short_peer_id(asker), refusal, detail, ending)
        raise ProtocolError(refusal, detail)

    # -- the connections ---------------------------------------------------------------------------------------------

    def take_connection(self, transport: asyncio.BaseTransport, first: memoryview) -> bool:
        """Whether a connection that begins with these bytes is one to be spliced; it is then taken over."""
        if first[:1] != MAGIC[:1]:
            return False
        side = Side(transport, self._name)
        transport.set_protocol(side)
        self._sides.add(side)
        side.closed.add_done_callback(lambda _: self._forget(side))
        self._unnamed[side] = None
        if len(self._unnamed) > UNNAMED_MAX:
            self._turn_away(next(iter(self._unnamed)), Refusal.LIMIT)
        asyncio.get_running_loop().call_later(JOIN_TIMEOUT_S, self._expire, side)
        side.begin(bytes(first))
        return True

    def _name(self, side: Side, token: bytes, rest: bytes) -> None:
        if side not in self._unnamed:
            return  # turned away already
        ticket = self._tickets.pop(token, None)
        if ticket is None:
            self._turn_away(side, Refusal.EXPIRED)
            return
        del self._unnamed[side]
        splice, index = ticket
        splice.join(index, side, rest)

    def _expire(self, side: Side) -> None:
        if side in self._unnamed:
            self._turn_away(side, Refusal.EXPIRED)

    def _turn_away(self, side: Side, refusal: Refusal) -> None:
        """Nothing proves who that was."""
        del self._unnamed[side]
        self.refusals[refusal] += 1
        self._links.sink.on_refusal(None, refusal)
        side.transport.abort()

    def _forget(self, side: Side) -> None:
        self._sides.discard(side)
        self._unnamed.pop(side, None)

    # -- the splice --------------------------------------------------------------------------------------------------

    def _spend(self, splice: Splice, nbytes: int) -> bool:
        if not self._budget.spend(splice.pair, nbytes, self._ports.now()):
            return False
        self.relayed_bytes += nbytes
        return True

    async def _watch(self, splice: Splice) -> None:
        """From the promise to the end."""
        try:
            if await _wait(splice.joined, JOIN_TIMEOUT_S):
                self.opened += splice.is_open
                await self._judge(splice)
            else:
                splice.end(Failure.RELAY_HALF_OPEN)
            if splice.sides:
                await asyncio.wait([side.closed for side in splice.sides], timeout=DRAIN_TIMEOUT_S)
        finally:
            self._strike(splice)

    async def _judge(self, splice: Splice) -> None:
        """Until it has ended, or has to."""
        moved_s, moved_bytes = self._ports.now(), 0
        while not await _wait(splice.ended, CHECK_PERIOD_S):
            now = self._ports.now()
            if splice.relayed_bytes != moved_bytes:
                moved_s, moved_bytes = now, splice.relayed_bytes
            if now - moved_s >= IDLE_TIMEOUT_S:
                splice.end(Failure.RELAY_IDLE)
            elif now - splice.made_s >= LIFE_S_MAX:
                splice.end(Failure.RELAY_EXPIRED)
            elif any(self._ports.refusal(peer) is not None for peer in splice.pair):
                splice.end(Failure.PEER_LOST)

    def _strike(self, splice: Splice) -> None:
        splice.cut()
        self._tickets = {token: ticket for token, ticket in self._tickets.items() if ticket[0] is not splice}
        if self._splices.get(frozenset(splice.pair)) is splice:
            del self._splices[frozenset(splice.pair)]
        one, two = map(short_peer_id, splice.pair)
        if splice.reason is not None:
            self.ends[splice.reason] += 1
        log.info(
            "the link of %s and %s is relayed no more: %s, %d bytes", one, two, splice.reason or "closed",
            splice.relayed_bytes,
        )  # fmt: skip

    async def close(self) -> None:
        """Cut every connection, and wait until they are gone, for DRAIN_TIMEOUT_S at most."""
        for splice in self._splices.values():
            splice.cut()
        for side in self._sides:
            side.transport.abort()
        if self._sides:
            await asyncio.wait([side.closed for side in self._sides], timeout=DRAIN_TIMEOUT_S)


async def _wait(event: asyncio.Future[None], timeout_s: float) -> bool:
    """Whether it has happened by then; the future stays as it is."""
    done, _ = await asyncio.wait([event], timeout=timeout_s)
    return bool(done)
