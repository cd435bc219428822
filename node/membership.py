"""Who is in the swarm: publish the own presence, take others', find peers and stay connected to them.

Presence doubles as the heartbeat: nothing in the transports notices a peer that vanished. A closed control connection
is checked at once by dialling anew, so that a killed process is lost in moments and a flaky link is not.

Invariants: every table is bounded (presence table, peer book); no dial is tried twice at once; the loop of no task ends
on a failure of somebody else.
"""

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass

from shoal.dht.addresses import keep_dialable
from shoal.dht.announcements import Announce, AnnouncementSchedule, LookUp
from shoal.dht.peer_book import PeerBook
from shoal.node.control import ControlPlane, PeerUnreachable, RequestRefused
from shoal.node.endpoints import parse_endpoints_untrusted
from shoal.node.link_port import Address
from shoal.protocol.errors import ProtocolError, Refusal, UriError
from shoal.protocol.identity import PeerId, format_peer_id, short_peer_id
from shoal.protocol.messages import (
    PEERS_PER_ANSWER,
    GetPeers,
    PeersAnswer,
    Presence,
    decode_message_untrusted,
    encode_message,
)
from shoal.protocol.presence import PeerLost, PresenceTable

DIALS_AT_ONCE_MAX = 8
DISCOVERY_PERIOD_S = 5.0
EXCHANGE_PERIODS = 6  # of these from one exchange of known peers to the next
CONNECTIONS_WANTED = 16
CLOCK_SKEW_WARN_S = 30.0

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class MembershipPorts:
    """What membership asks of the daemon, and tells it."""

    describe: Callable[[], Presence]  # the own presence, signed, with a new sequence number
    observed: Callable[[Presence, bool], None]  # a newer presence; whether the peer was not alive before
    lost: Callable[[PeerLost], None]
    misbehaved: Callable[[PeerId, ProtocolError], None]
    refuses: Callable[[PeerId], bool]  # whether nothing of it is wanted for now
    shuns: Callable[[PeerId], bool]  # whether it is not even dialled, as who only is not admitted yet may be
    meet: Callable[[Presence], None]  # before that is asked: it may bring an invitation; raises ProtocolError
    spawn: Callable[[Coroutine[object, object, object]], None]
    may_dial: Callable[[PeerId], bool] = lambda peer: True  # rarely, where this peer is banned itself
    own: Callable[[Presence], None] = lambda presence: None  # a presence of this peer, as others know it, unchecked


class Membership:
    """All calls on the event loop."""

    def __init__(
        self,
        *,
        me: PeerId,
        swarm: bytes,
        control: ControlPlane,
        table: PresenceTable,
        book: PeerBook,
        presence_period_s: float,
        ports: MembershipPorts,
    ) -> None:
        self.table = table
        self.book = book
        self.clock_skew_s: dict[PeerId, float] = {}
        self._me = me
        self._swarm = swarm
        self._control = control
        self._period_s = presence_period_s
        self._ports = ports
        self._schedule = AnnouncementSchedule(swarm, me, time.time())
        self._dialling: dict[PeerId, frozenset[str]] = {}  # by which addresses
        self._unreached: set[PeerId] = set()  # peers of the table that were dialled, and nobody has answered
        self._changed = asyncio.Event()

    # -- own presence ----------------------------------------------------------------------------------------------

    def announce(self) -> None:
        """The own presence has changed: publish it now rather than at the next beat."""
        self._changed.set()

    async def beat(self) -> None:
        """Publish the presence at every period and at every change; find peers whose deadline has passed."""
        loop = asyncio.get_running_loop()
        while True:
            self._changed.clear()
            await self._control.publish(encode_message(self._swarm, self._ports.describe()))
            for lost in self.table.handle_deadline(loop.time()):
                self._lose(lost)
            # Not wait_for: Python 3.11's swallows a cancellation that meets the event.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._period_s):
                    await self._changed.wait()

    # -- others' presence ------------------------------------------------------------------------------------------

    def take_presence(self, payload: bytes, source: PeerId) -> None:
        """A presence from gossip or from an exchange; raises nothing: what is wrong with it costs `source`."""
        try:
            message = decode_message_untrusted(self._swarm, payload)
            if not isinstance(message, Presence):
                raise ProtocolError(Refusal.UNKNOWN_TYPE, f"{type(message).__name__} is no presence")
            if message.peer != source and self._ports.refuses(source):
                return  # a stranger may speak for itself alone
            known = self.table.newest(message.peer)
            if known and (message.incarnation, message.sequence) < (known.incarnation, known.sequence):
                raise ProtocolError(Refusal.REPLAYED, "a presence older than one that is known")
            self._take(message)
        except ProtocolError as error:
            self._ports.misbehaved(source, error)

    def _take(self, presence: Presence) -> None:
        if presence.peer == self._me:
            self._ports.own(presence)
        self._ports.meet(presence)
        if self._ports.refuses(presence.peer):
            return
        before = self.table.newest(presence.peer)
        seen = self.table.receive(presence, asyncio.get_running_loop().time())
        if seen is None:
            return
        told = frozenset(presence.control_addresses) - frozenset(before.control_addresses if before else ())
        self.clock_skew_s[presence.peer] = presence.sent_at_s - time.time()
        self.book.hear(presence.peer, keep_dialable(presence.control_addresses, presence.peer), time.time())
        self._ports.observed(presence, seen.first)
        # Who has just started tells the way through its relay only when it has one: the first dial did not know it.
        if seen.first or (told and presence.peer in self._unreached):
            self._ports.spawn(self.connect(presence.peer))

    def _lose(self, lost: PeerLost) -> None:
        self._unreached.discard(lost.peer)
        self.clock_skew_s.pop(lost.peer, None)
        self._ports.lost(lost)

    # -- connections -----------------------------------------------------------------------------------------------

    def connection_opened(self, peer: PeerId) -> None:
        """The control plane has a connection to this peer."""
        addresses = next((one.addresses for one in self._control.peers() if one.peer == peer), ())
        self.book.note_success(peer, keep_dialable(addresses, peer), time.time())
        self._unreached.discard(peer)
        self.note_peers()
        self.announce()
        self._ports.spawn(self.exchange_peers(peer))

    def connection_lost(self, peer: PeerId) -> None:
        """The control connection is gone: gone for good, unless the peer can be dialled anew."""
        self.note_peers()
        self._ports.spawn(self._check(peer))

    async def _check(self, peer: PeerId) -> None:
        known = self.table.newest(peer)
        if known is None:
            return
        if known.leaving or self._ports.refuses(peer) or not await self.connect(peer):
            lost = self.table.suspect(peer, asyncio.get_running_loop().time())
            if lost is not None:
                self._lose(lost)

    async def connect(self, peer: PeerId) -> bool:
        """Whether there is a control connection to this peer now; dials the addresses that it announced."""
        if any(one.peer == peer for one in self._control.peers()):
            return True
        addresses = self._control_addresses_of(peer)
        fresh = frozenset(addresses) - self._dialling.get(peer, frozenset())
        if not fresh or self._ports.shuns(peer) or not self._ports.may_dial(peer):
            return False
        self._dialling[peer] = self._dialling.get(peer, frozenset()) | fresh
        if self.table.newest(peer) is not None:
            self._unreached.add(peer)
        try:
            await self._control.connect(addresses)
        except (PeerUnreachable, UriError) as error:
            log.debug("%s", error)
            self.book.note_failure(peer, time.time())
            return False
        finally:
            self._dialling[peer] -= fresh
            if not self._dialling[peer]:
                del self._dialling[peer]
        self._unreached.discard(peer)
        return True

    def _control_addresses_of(self, peer: PeerId) -> tuple[str, ...]:
        """What it says now, and what has worked before."""
        known, told = self.book.get(peer), self.table.newest(peer)
        announced = keep_dialable(told.control_addresses, peer) if told else ()
        tail = f"/p2p/{format_peer_id(peer)}"
        texts = (*announced, *(known.addresses if known else ()))
        return tuple(dict.fromkeys(text if text.endswith(tail) else text + tail for text in texts))

    def addresses_changed(self) -> None:
        """This peer can be dialled elsewhere than before: say so in the next presence, which is now, and in the DHT."""
        self._schedule.note_addresses(time.time())
        self.announce()

    def note_peers(self) -> None:
        """Peers have come or gone."""
        self._schedule.note_peers(len(self._control.peers()), time.time())

    async def introduce(self, peer: PeerId) -> None:
        """Show one peer who this one is, before it has heard that from anybody."""
        try:
            await self._control.send(peer, encode_message(self._swarm, self._ports.describe()))
        except PeerUnreachable as error:
            log.debug("not introduced: %s", error)

    async def exchange_peers(self, peer: PeerId) -> None:
        """Ask a new neighbour whom it knows, rather than wait for their next beat."""
        try:
            raw = await self._control.request(peer, encode_message(self._swarm, GetPeers()))
            answer = decode_message_untrusted(self._swarm, raw)
            if isinstance(answer, PeersAnswer):
                for presence in answer.presences:
                    self._take(presence)
        except (PeerUnreachable, RequestRefused) as error:
            log.debug("no peer exchange: %s", error)
        except ProtocolError as error:
            self._ports.misbehaved(peer, error)

    def answer_peers(self) -> PeersAnswer:
        """The own and the newest known presences."""
        live = tuple(self.table.live().values())[: PEERS_PER_ANSWER - 1]
        return PeersAnswer(presences=(self._ports.describe(), *live))

    def hear(self, peer: PeerId, addresses: tuple[str, ...]) -> None:
        """Nobody vouches for it, but this peer may be at these addresses: see."""
        self.book.hear(peer, keep_dialable(addresses, peer), time.time())
        self._ports.spawn(self.connect(peer))

    # -- discovery -------------------------------------------------------------------------------------------------

    def head_of(self, peer: PeerId) -> int:
        """The newest round that this peer has announced."""
        known = self.table.newest(peer)
        return known.head_round if known else 0

    def tensor_addresses_of(self, peer: PeerId) -> tuple[Address, ...]:
        """Where this peer's tensor port can be dialled; nowhere while nothing of it is wanted."""
        known = self.table.newest(peer)
        if known is None or self._ports.refuses(peer):
            return ()
        return parse_endpoints_untrusted(known.tensor_addresses)

    async def discover(self) -> None:
        """Announce in the DHT, look up others there, keep dialling peers from the book, and ask now and then whom
        others know: they may know of another process with this peer's key."""
        for period in itertools.count(1):
            for intent in self._schedule.poll(time.time()):
                match intent:
                    case Announce():
                        stored = await self._control.provide(intent.key)
                        self._schedule.note_announced(stored, time.time())
                    case LookUp():
                        await self._look_up(intent)
            await self._dial_known()
            connected = [one for one in self._control.peers() if not self._ports.refuses(one.peer)]
            if period % EXCHANGE_PERIODS == 0 and connected:
                self._ports.spawn(self.exchange_peers(connected[period // EXCHANGE_PERIODS % len(connected)].peer))
            await asyncio.sleep(DISCOVERY_PERIOD_S)

    async def _look_up(self, intent: LookUp) -> None:
        found = 0
        for key in intent.keys:
            for provider in await self._control.find_providers(key):
                if provider.peer != self._me and self.book.get(provider.peer) is None:
                    found += 1
                    log.debug("the DHT names %s", short_peer_id(provider.peer))
                self.book.hear(provider.peer, keep_dialable(provider.addresses, provider.peer), time.time())
        self._schedule.note_looked_up(found, time.time())

    async def _dial_known(self) -> None:
        connected = {one.peer for one in self._control.peers()}
        if len([peer for peer in connected if not self._ports.refuses(peer)]) >= CONNECTIONS_WANTED:
            return
        due = self.book.candidates(time.time(), DIALS_AT_ONCE_MAX, connected)
        await asyncio.gather(*(self.connect(known.peer) for known in due))
