"""Direct connections between two peers that have met through a relay, after libp2p's DCUtR specification. Runs in trio.

    CONNECT   both sides tell at which addresses they may be dialled
    SYNC      both dial at once, from the port on which they listen, so that each router takes the other side's packets
              for answers

Whoever was dialled through the relay begins. It tries the public addresses alone first. On the connection that comes
about, whoever has dialled through the relay is the client.

Invariants: only connections through relays are upgraded; one session of a peer at a time in each role, SESSIONS_MAX at
all; a peer makes this one dial at ADDRESSES_MAX addresses, KNOCKS_MAX times each within WINDOW_S, and no sooner again
than the allowance for it has grown; a host that the world may dial is made to dial nothing in its own network or on
its own machine; after ATTEMPTS_MAX attempts there is a pause that doubles up to PAUSE_S_MAX.
"""

import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import replace

import trio
from libp2p.abc import INetStream
from libp2p.custom_types import TProtocol
from libp2p.exceptions import BaseLibp2pError
from libp2p.peer.id import ID
from libp2p.relay.circuit_v2.pb.dcutr_pb2 import HolePunch
from multiaddr import Multiaddr

from shoal.dht.addresses import Address, keep_dialable, parse_address
from shoal.node.allowances import Allowances
from shoal.node.control import PeerUnreachable
from shoal.node.libp2p_connections import format_multiaddr_untrusted, is_relayed
from shoal.node.libp2p_dialer import Dialer
from shoal.node.libp2p_hop import read_message, write_message
from shoal.node.libp2p_reach import SCOPE_MAX, scope_of
from shoal.node.libp2p_stack import BoundedSwarm
from shoal.node.libp2p_streams import STREAM_ERRORS, FrameReader
from shoal.node.pauses import Pauses
from shoal.protocol.errors import ProtocolError, Refusal, ShoalError
from shoal.protocol.identity import PeerId, decode_libp2p_peer_id, encode_libp2p_peer_id

DCUTR_PROTOCOL = TProtocol("/libp2p/dcutr")

MESSAGE_BYTES_MAX = 4096
EXCHANGE_TIMEOUT_S = 5.0  # of what is said in one attempt
WINDOW_S = 3.0  # in which both dial: the kernel sends its first packet again after one second
KNOCKS_MAX = 6  # dials of one address, where it is refused at once
KNOCK_PAUSE_S = 0.2
ADDRESSES_MAX = 8
ATTEMPTS_MAX = 3
SESSIONS_MAX = 16
PAUSE_S = 60.0  # after a failure, twice as long after each further one
PAUSE_S_MAX = 3600.0
# What another peer may begin: all attempts of one session at once, and a session a minute for long.
OFFERS_PER_S = ATTEMPTS_MAX / 60.0
PEERS_MAX = 1024

_log = logging.getLogger(__name__)

OpenStream = Callable[[PeerId, TProtocol], Awaitable[INetStream]]
Dial = Callable[[Multiaddr, ID, tuple[str, int]], Awaitable[object]]


class DirectUpgrades:
    """Both roles for one host. `open_stream` opens on the best connection that is there; `own` are the addresses at
    which this host may be dialled; `bound` are those on which it listens."""

    def __init__(
        self,
        swarm: BoundedSwarm,
        dialer: Dialer,
        open_stream: OpenStream,
        own: Callable[[], Sequence[Address]],
        bound: Callable[[], Sequence[Address]],
    ) -> None:
        self._swarm = swarm
        self._dialer = dialer
        self._open_stream = open_stream
        self._own = own
        self._bound = bound
        self._begun: set[PeerId] = set()
        self._answering: set[PeerId] = set()
        self._offers: Allowances[PeerId] = Allowances(burst=ATTEMPTS_MAX, per_s=OFFERS_PER_S, keys_max=PEERS_MAX)
        self._pauses: Pauses[PeerId] = Pauses(first_s=PAUSE_S, last_s=PAUSE_S_MAX, keys_max=PEERS_MAX)

    def forget_pauses(self) -> None:
        """What failed may work now: this machine's addresses have changed."""
        self._pauses.clear()

    # -- the side that was dialled through the relay

    async def upgrade(self, peer: PeerId) -> None:
        """Try to reach the peer directly that has dialled this one through a relay; gives up without a word."""
        is_busy = peer in self._begun or len(self._begun) >= SESSIONS_MAX
        if is_busy or self._pauses.has(peer, trio.current_time()) or self._dialer.is_directly_connected(peer):
            return
        self._begun.add(peer)
        try:
            await self._try_alone(peer)
            for _ in range(ATTEMPTS_MAX):
                if self._dialer.is_directly_connected(peer) or not self._dialer.is_connected(peer):
                    break
                try:
                    await self._begin(peer)
                except (*STREAM_ERRORS, ShoalError, trio.TooSlowError) as error:
                    _log.debug("no direct connection to %s: %r", peer.hex(), error)
                    break
        finally:
            self._begun.discard(peer)
        if self._dialer.is_directly_connected(peer):
            self._pauses.end(peer)
        else:
            self._pauses.begin(peer, trio.current_time())

    async def _try_alone(self, peer: PeerId) -> None:
        known = (parse_address(text) for text in self._dialer.known_addresses(peer))
        public = [one for one in known if one.is_global and not one.is_relayed]
        if public:
            try:
                await self._dialer.connect(peer, public, directly=True)
            except PeerUnreachable as error:
                _log.debug("%s", error)

    async def _begin(self, peer: PeerId) -> None:
        with trio.fail_after(EXCHANGE_TIMEOUT_S):
            stream = await self._open_stream(peer, DCUTR_PROTOCOL)
            try:
                if not is_relayed(stream.muxed_conn):
                    return
                asked_s = trio.current_time()
                await write_message(stream, self._make_offer())
                answer = await read_message(FrameReader(stream, MESSAGE_BYTES_MAX), HolePunch())
                round_trip_s = trio.current_time() - asked_s
                targets = self._read_offer(answer, peer)
                await write_message(stream, HolePunch(type=HolePunch.SYNC))
            finally:
                with trio.CancelScope(shield=True):
                    await stream.close()
        await trio.sleep(round_trip_s / 2)
        await self._knock_at_all(peer, targets, self._swarm.dial_addr_as_responder)

    # -- the side that has dialled through the relay

    async def serve(self, stream: INetStream) -> None:
        """Answer one session."""
        peer = decode_libp2p_peer_id(stream.muxed_conn.peer_id.to_bytes())
        is_busy = peer in self._answering or len(self._answering) >= SESSIONS_MAX
        may_ask = is_relayed(stream.muxed_conn) and not is_busy and self._offers.take(peer, trio.current_time())
        if not may_ask:
            await stream.reset()
            return
        self._answering.add(peer)
        try:
            with trio.fail_after(EXCHANGE_TIMEOUT_S):
                reader = FrameReader(stream, MESSAGE_BYTES_MAX)
                targets = self._read_offer(await read_message(reader, HolePunch()), peer)
                await write_message(stream, self._make_offer())
                if (await read_message(reader, HolePunch())).type != HolePunch.SYNC:
                    raise ProtocolError(Refusal.UNKNOWN_TYPE, "no SYNC after CONNECT")
                await stream.close()
            expected = {(one.host, one.port): stream.muxed_conn.peer_id for one in targets}
            self._swarm.punching |= expected
            try:
                await self._knock_at_all(peer, targets, self._swarm.dial_addr)
            finally:
                for one in expected:
                    self._swarm.punching.pop(one, None)
        finally:
            self._answering.discard(peer)

    # -- both

    def _make_offer(self) -> HolePunch:
        own = [Multiaddr(str(replace(one, peer=None))).to_bytes() for one in self._own()[:ADDRESSES_MAX]]
        return HolePunch(type=HolePunch.CONNECT, ObsAddrs=own)

    def _read_offer(self, offer: HolePunch, peer: PeerId) -> list[Address]:
        """The IP addresses in a CONNECT that are as far away as this host's own; raises ProtocolError."""
        if offer.type != HolePunch.CONNECT:
            raise ProtocolError(Refusal.UNKNOWN_TYPE, "no CONNECT")
        texts = [text for raw in offer.ObsAddrs[:ADDRESSES_MAX] if (text := format_multiaddr_untrusted(raw))]
        found = (parse_address(text) for text in keep_dialable(texts, peer))
        # Anybody may offer: what only this machine or its network can dial is not knocked at for strangers.
        scope = max((scope_of(one.host) for one in self._own()), default=SCOPE_MAX)
        return [
            replace(one, peer=peer)
            for one in found
            if not one.is_relayed and one.net in ("ip4", "ip6") and scope_of(one.host) >= scope
        ]

    async def _knock_at_all(self, peer: PeerId, targets: Iterable[Address], dial: Dial) -> None:
        """Dial all of them until there is a direct connection, or the time is over."""
        with trio.move_on_after(WINDOW_S):
            async with trio.open_nursery() as knocks:
                for target in targets:
                    knocks.start_soon(self._knock, peer, target, dial, knocks.cancel_scope)

    async def _knock(self, peer: PeerId, target: Address, dial: Dial, all_knocks: trio.CancelScope) -> None:
        source = self._find_source(target)
        if source is None:
            return
        for _ in range(KNOCKS_MAX):
            try:
                await dial(Multiaddr(str(target)), ID(encode_libp2p_peer_id(peer)), source)
            except (BaseLibp2pError, OSError) as error:
                _log.debug("knocking at %s: %s", target, error)
            if self._dialer.is_directly_connected(peer):
                all_knocks.cancel()
                return
            await trio.sleep(KNOCK_PAUSE_S)

    def _find_source(self, target: Address) -> tuple[str, int] | None:
        return next(((one.host, one.port) for one in self._bound() if one.net == target.net), None)
