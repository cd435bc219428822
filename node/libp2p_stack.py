"""py-libp2p's parts, set up and hardened for a long-running public node.

What this module adds to 0.8.1, because without it a peer could end, deafen or fill the node:

- tasks that remote bytes can make fail are contained (the library ends the whole swarm when one of them raises);
- an accepted connection gives its place back when it closes (the library keeps it until the swarm stops);
- bounds on unread bytes per connection, streams per peer, provider records, known peers and seen messages;
- a listen port that is taken is an error (the library shares it by SO_REUSEPORT), links that died are noticed by the
  kernel (TCP user timeout) or, where something on the way answers for a peer that is gone, by pings without an answer,
  and nothing dials peers that nobody asked for, or who have gone while they were to be told of something.

Secure channel: Noise, and TLS (libp2p_tls). Multiplexer: Yamux only. Discovery: identify, ping, kad-dht, gossipsub,
by their standard protocol ids (libp2p specifications). Imported only in a process that starts a host: importing libp2p
takes a second.
"""

import collections
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from contextvars import ContextVar
from typing import Any

import libp2p.network.connection.swarm_connection
import libp2p.stream_muxer.yamux.yamux
import trio
from libp2p.abc import INetConn, INetStream
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_noise_key_pair
from libp2p.custom_types import TProtocol
from libp2p.host.basic_host import BasicHost
from libp2p.host.observed_addr_manager import ObservedAddrManager
from libp2p.identity.identify_push.identify_push import ID_PUSH, identify_push_handler_for, push_identify_to_peer
from libp2p.io.abc import ReadWriteCloser
from libp2p.kad_dht.kad_dht import DHTMode, KadDHT
from libp2p.kad_dht.pb.kademlia_pb2 import Message
from libp2p.kad_dht.provider_store import ProviderStore
from libp2p.metrics.swarm import SwarmEvent
from libp2p.network.auto_connector import AutoConnector
from libp2p.network.config import ConnectionConfig, RetryConfig
from libp2p.network.connection.swarm_connection import SwarmConn
from libp2p.network.exceptions import SwarmException
from libp2p.network.swarm import Swarm
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import PeerInfo
from libp2p.peer.peerstore import PeerStoreError
from libp2p.pubsub.gossipsub import PROTOCOL_ID_V11, GossipSub
from libp2p.pubsub.pb import rpc_pb2
from libp2p.pubsub.pubsub import Pubsub
from libp2p.pubsub.score import ScoreParams, TopicScoreParams
from libp2p.rcmgr import Direction
from libp2p.records.validator import NamespacedValidator
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE_PROTOCOL_ID
from libp2p.security.noise.transport import Transport as NoiseTransport
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX_PROTOCOL_ID
from libp2p.stream_muxer.yamux.yamux import Yamux
from libp2p.tools.anyio_service import TrioManager
from libp2p.tools.anyio_service.api import ServiceAPI
from libp2p.tools.anyio_service.exceptions import LifecycleError
from libp2p.tools.timed_cache.last_seen_cache import LastSeenCache
from libp2p.utils.multiaddr_utils import multiaddr_from_socket
from multiaddr import Multiaddr

from shoal.node.arrivals import ArrivalLimits, Arrivals
from shoal.node.control import ControlConfig
from shoal.node.libp2p_connections import (
    DOUBT_TIMEOUT_S,
    BoundedYamux,
    CircuitStream,
    Contained,
    SteadyWindowStream,
    TcpListener,
    TcpTransport,
    Transport,
    YamuxUpgrader,
    is_relayed,
    make_raw_connection,
)
from shoal.node.libp2p_limits import BoundedDht, BoundedPeerStore, cap_readers
from shoal.protocol.identity import encode_libp2p_peer_id

HANDSHAKE_TIMEOUT_S = 5.0
NEGOTIATION_TIMEOUT_S = 5.0
LISTEN_BACKLOG = 128
STREAMS_PER_PEER_MAX = 64
CONNECTIONS_PER_PEER_MAX = 3
PROVIDED_KEYS_MAX = 4096
ADDRESSES_PER_PROVIDER_MAX = 8
KNOWN_PEERS_MAX = 1024
SEEN_MESSAGES_MAX = 65536
SEEN_MESSAGES_TTL_S = 120.0
GOSSIP_RPC_BYTES_MAX = 256 * 1024
GOSSIP_RPCS_QUEUED_MAX = 512
HEARTBEAT_S = 1
PUSHES_AT_ONCE_MAX = 8
PUSH_TIMEOUT_S = 5.0

_log = logging.getLogger(__name__)

# Whether what runs here is for peers that are connected: the library would call back who has gone meanwhile.
_dials_nobody: ContextVar[bool] = ContextVar("dials_nobody", default=False)


@contextmanager
def connected_only() -> Iterator[None]:
    """Within it the library dials nobody."""
    before = _dials_nobody.set(True)
    try:
        yield
    finally:
        _dials_nobody.reset(before)


def quiet_libp2p() -> None:
    """Keep the library's log to itself: it has an ERROR line for every ordinary hang-up."""
    for name in ("libp2p", "libp2p.network.auto_connector"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # This module logs to the root logger, and so would configure it.
    module: Any = libp2p.network.connection.swarm_connection
    module.logging = logging.getLogger(module.__name__)


class ContainedTasks(TrioManager):
    """A service manager in which a failed task costs that task: remote bytes must not be able to end the service.

    Tasks go straight to the service's nursery; the library searches all of its tasks for the parent of each new one.
    """

    def run_task(
        self, async_fn: Callable[..., Awaitable[Any]], *args: Any, daemon: bool = False, **kwargs: Any
    ) -> None:
        if daemon or kwargs.get("_internal"):
            super().run_task(async_fn, *args, daemon=daemon, **kwargs)
            return
        if self._task_nursery is None or not self.is_running:
            raise LifecycleError("the service is not running")
        self._task_nursery.start_soon(self._run_contained, async_fn, args)

    async def _run_contained(self, async_fn: Callable[..., Awaitable[Any]], args: tuple[Any, ...]) -> None:
        with Contained("a task of py-libp2p"):
            await async_fn(*args)


@asynccontextmanager
async def run_service(service: ServiceAPI) -> AsyncIterator[None]:
    """Run one of the library's services under `ContainedTasks`."""
    async with trio.open_nursery() as nursery:
        manager = ContainedTasks(service)
        service._manager = manager
        nursery.start_soon(manager.run)
        await manager.wait_started()
        try:
            yield
        finally:
            await manager.stop()


class _NoAutoConnector(AutoConnector):
    """Dials nobody: whom to connect to is the daemon's choice."""

    async def run_background_task(self, nursery: trio.Nursery) -> None:
        return

    async def maybe_connect(self) -> None:
        return

    def record_disconnect(self, peer_id: ID) -> None:
        return


class BoundedSwarm(Swarm):
    """A swarm that listens on given sockets and frees the place of an accepted connection when it closes.

    Whatever in the library needs a connection gets it from `dial_known`, unless it must use one that is there.
    """

    dial_known: Callable[[ID], Awaitable[None]]

    def _init_connection_management(self) -> None:
        super()._init_connection_management()
        self.arrivals: Arrivals[ReadWriteCloser] = Arrivals(ArrivalLimits())
        self.auto_connector = _NoAutoConnector(swarm=self)
        # While both sides dial at once: from where a peer's packets come, on whose connection this side is the client.
        self.punching: dict[tuple[str, int], ID] = {}

    async def dial_peer(self, peer_id: ID) -> list[INetConn]:
        if _dials_nobody.get():
            raise SwarmException(f"no connection to {peer_id} is left")
        await self.dial_known(peer_id)
        return self.get_connections(peer_id)

    async def accept(self, circuit: CircuitStream) -> None:
        """Serve a connection that a relay has brought, until it closes."""
        await self._handle_inbound_connection(circuit, circuit.address)

    def is_directly_connected(self, peer_id: ID) -> bool:
        """Whether a connection to the peer stands that goes through nobody else."""
        return any(
            not connection.is_closed and not is_relayed(connection.muxed_conn)
            for connection in self.get_connections(peer_id)
        )

    async def doubt_others(self, connection: INetConn) -> None:
        """This is another connection with its peer: the older ones are dropped unless the peer answers on them soon."""
        peer_id = connection.muxed_conn.peer_id
        async with trio.open_nursery() as pings:
            for other in self.get_connections(peer_id):
                if other is not connection and isinstance(other.muxed_conn, BoundedYamux):
                    pings.start_soon(other.muxed_conn.prove_alive, DOUBT_TIMEOUT_S)

    def is_dialled_by_relay(self, peer_id: ID) -> bool:
        """Whether the peer has dialled this one through a relay, and that connection stands."""
        return any(
            not one.is_closed and is_relayed(one.muxed_conn) and one.direction is Direction.INBOUND
            for one in self.get_connections(peer_id)
            if isinstance(one, SwarmConn)
        )

    def add_listener(self, sockets: Sequence[trio.SocketListener], nursery: trio.Nursery) -> None:
        """Accept connections on these sockets from now on."""
        maddr = multiaddr_from_socket(sockets[0].socket)

        async def handle(stream: ReadWriteCloser) -> None:
            remote = stream.get_remote_address()
            gone = self.arrivals.arrive(stream, remote[0] if remote else "", trio.current_time())
            if gone is not None:
                assert isinstance(gone, Transport)
                await gone.abort()
            if gone is stream:
                return
            try:
                if remote is not None and (peer_id := self.punching.get(remote)) is not None:
                    await self._serve_as_client(stream, peer_id)
                else:
                    await self._handle_inbound_connection(stream, maddr)
            finally:
                self.arrivals.leave(stream)

        listener = TcpListener(handle, sockets)
        self.listeners[str(maddr)] = listener
        nursery.start_soon(listener.listen, maddr)

    async def _serve_as_client(self, stream: ReadWriteCloser, peer_id: ID) -> None:
        connection = await self.upgrade_outbound_raw_conn(make_raw_connection(stream, is_initiator=True), peer_id)
        assert isinstance(connection.muxed_conn, Yamux)
        self.arrivals.prove(stream)
        await connection.muxed_conn.event_closed.wait()

    async def _do_handle_inbound_connection(
        self, read_write_closer: ReadWriteCloser, maddr: Multiaddr, failure_event: SwarmEvent
    ) -> None:
        muxed = await self.upgrade_inbound_raw_conn(make_raw_connection(read_write_closer, is_initiator=False), maddr)
        assert isinstance(muxed, Yamux)
        self.arrivals.prove(read_write_closer)
        await muxed.event_closed.wait()


class BoundedHost(BasicHost):
    """A host with a bound on the streams of one peer, that says when a peer has identified itself."""

    def __init__(
        self, swarm: BoundedSwarm, announced: Callable[[], list[Multiaddr]], observations: ObservedAddrManager | None
    ) -> None:
        self._streams: collections.Counter[ID] = collections.Counter()
        self._advertised: list[Multiaddr] = []
        self.on_identified: Callable[[ID], Awaitable[None]] | None = None
        self._announced = announced
        super().__init__(swarm, negotiate_timeout=int(NEGOTIATION_TIMEOUT_S))
        self._observed_addr_manager = observations
        self._take_push = identify_push_handler_for(self)
        self.set_stream_handler(ID_PUSH, self._serve_push)

    def get_addrs(self) -> list[Multiaddr]:
        # Asked for at every message; what makes up the answer changes rarely.
        return list(self._advertised)

    def refresh_addrs(self) -> bool:
        """Work out anew what to advertise; whether that has changed."""
        # The library would cut a circuit address off at its relay, and so claim the relay's.
        me = Multiaddr(f"/p2p/{self.get_id()}")
        advertised = [address.encapsulate(me) for address in self._announced()]
        changed, self._advertised = advertised != self._advertised, advertised
        return changed

    async def push_identify(self) -> None:
        """Tell every connected peer what has changed here."""
        places = trio.CapacityLimiter(PUSHES_AT_ONCE_MAX)

        async def push(peer_id: ID) -> None:
            with connected_only(), Contained(f"telling {peer_id}"), trio.move_on_after(PUSH_TIMEOUT_S):
                await push_identify_to_peer(self, peer_id, limit=places)

        async with trio.open_nursery() as pushes:
            for peer_id in self.get_connected_peers():
                pushes.start_soon(push, peer_id)

    async def open_connected_stream(self, peer_id: ID, protocol: TProtocol) -> INetStream:
        """A stream on a connection that stands; raises the library's errors where there is none (any more)."""
        with connected_only():
            return await self.new_stream(peer_id, [protocol])

    async def _serve_push(self, stream: INetStream) -> None:
        await self._take_push(stream)
        await self._tell_identified(stream.muxed_conn.peer_id)

    async def _tell_identified(self, peer_id: ID) -> None:
        if self.on_identified is not None and self._network.get_connections(peer_id):
            with Contained(f"identifying {peer_id}"):
                await self.on_identified(peer_id)

    async def _identify_peer(self, peer_id: ID, *, reason: str) -> None:
        await super()._identify_peer(peer_id, reason=reason)
        await self._tell_identified(peer_id)

    async def _swarm_stream_handler(self, net_stream: INetStream) -> None:
        peer_id = net_stream.muxed_conn.peer_id
        if self._streams[peer_id] >= STREAMS_PER_PEER_MAX:
            await net_stream.reset()
            return
        self._streams[peer_id] += 1
        try:
            with Contained(f"a stream of {peer_id}") as handling:
                await super()._swarm_stream_handler(net_stream)
            if handling.failed:
                await net_stream.reset()
        finally:
            self._streams[peer_id] -= 1
            if not self._streams[peer_id]:
                del self._streams[peer_id]


class BoundedProviders(ProviderStore):
    """Provider records with a bound on their number; the key that came first goes first."""

    def add_provider(self, key: bytes, provider: PeerInfo) -> None:
        if key not in self.providers and len(self.providers) >= PROVIDED_KEYS_MAX:
            del self.providers[next(iter(self.providers))]
        super().add_provider(key, PeerInfo(provider.peer_id, provider.addrs[:ADDRESSES_PER_PROVIDER_MAX]))


class ServersDht(BoundedDht):
    """A DHT node whose routing table has no place for those that only ask, and that names nobody without an address."""

    async def add_peer(self, peer_id: ID, *, skip_server_mode_check: bool = False) -> bool:
        # The library takes whoever asks for one that answers, too.
        return await super().add_peer(peer_id)

    def _add_closer_peers_to_response(
        self, response: Message, closest_peers: Sequence[ID], exclude_peer_id: ID | None = None
    ) -> None:
        # The library names the peer that is looked for, itself among them, whether or not it knows where that is, and
        # who asked takes that for the answer. go-libp2p leaves out whoever has no addresses.
        places = {peer_id: self._list_addresses(peer_id) for peer_id in closest_peers}
        named = [peer_id for peer_id in closest_peers if places[peer_id]]
        super()._add_closer_peers_to_response(response, named, exclude_peer_id)
        for peer in response.closerPeers:
            peer.addrs[:] = places[ID(peer.id)]

    def _list_addresses(self, peer_id: ID) -> list[bytes]:
        if peer_id == self.host.get_id():
            suffix = Multiaddr(f"/p2p/{peer_id}")
            return [address.decapsulate(suffix).to_bytes() for address in self.host.get_addrs()]
        with suppress(PeerStoreError):
            return [address.to_bytes() for address in self.host.get_peerstore().addrs(peer_id)]
        return []


class SeenMessages(LastSeenCache):
    """Which gossip messages came by already: bounded, and without the library's sweeper thread."""

    def __init__(self) -> None:
        self._seen_until: collections.OrderedDict[bytes, float] = collections.OrderedDict()

    def add(self, key: bytes) -> bool:
        is_new = not self.has(key)
        self._seen_until[key] = time.monotonic() + SEEN_MESSAGES_TTL_S
        self._seen_until.move_to_end(key)
        while len(self._seen_until) > SEEN_MESSAGES_MAX or next(iter(self._seen_until.values())) < time.monotonic():
            self._seen_until.popitem(last=False)
        return is_new

    def has(self, key: bytes) -> bool:
        return self._seen_until.get(key, 0.0) >= time.monotonic()

    def length(self) -> int:
        return len(self._seen_until)

    def stop(self) -> None:
        return


class LeanGossip(GossipSub):
    """GossipSub that sends its own messages to every neighbour, and no message with more than it needs.

    Without the former (flood publishing, gossipsub 1.1) a node that all its neighbours have pruned is not heard. Left
    out is the sender's signed address record, which identify has told and which costs a signature check each time.
    """

    def send_rpc(self, peer_id: ID, rpc: rpc_pb2.RPC, priority: bool = False) -> None:
        rpc.ClearField("senderRecord")
        super().send_rpc(peer_id, rpc, priority)

    def _get_peers_to_send(
        self, topic_ids: Iterable[str], msg_forwarder: ID, origin: ID, msg_id: bytes | None = None
    ) -> Iterable[ID]:
        topics = tuple(topic_ids)
        chosen = set(super()._get_peers_to_send(topics, msg_forwarder, origin, msg_id))
        if self.pubsub is not None and origin == self.pubsub.my_id:
            for topic in topics:
                chosen |= self.pubsub.peer_topics.get(topic, set())
        return chosen - {origin}

    def _perform_opportunistic_grafting(self, topic: str, peers_to_graft: dict[ID, list[str]]) -> int:
        # Of peers with equal scores it grafts all, and then everybody forwards every message to everybody.
        return 0


class DirectPubsub(Pubsub):
    """Pubsub that hands every message on at once; the library's two queues of 32 drop what comes in a burst."""

    on_message: Callable[[rpc_pb2.Message], None]

    def notify_subscriptions(self, publish_message: rpc_pb2.Message) -> None:
        self.on_message(publish_message)

    async def _handle_new_peer(self, peer_id: ID) -> None:
        with connected_only():  # the library tries this again for a while, and by then the peer may have gone
            await super()._handle_new_peer(peer_id)
        if queue := self.peer_queues.get(peer_id):
            queue._queue.max_size = GOSSIP_RPCS_QUEUED_MAX

    def _forget_all_subscriptions(self, peer_id: ID) -> None:
        # A peer subscribes once, on the stream that it opens. Who is back on a new connection, before the end of its
        # old one was noticed here, would be sent nothing more when that one ends.
        if not self._peer_is_connected(peer_id):
            super()._forget_all_subscriptions(peer_id)


def build_host(
    config: ControlConfig,
    announced: Callable[[], list[Multiaddr]],
    observations: ObservedAddrManager | None = None,
) -> tuple[BoundedHost, BoundedSwarm]:
    """A host with the identity of `config` that advertises `announced` and notes how others see it."""
    # Yamux makes its streams from whatever stands under this name.
    yamux: Any = libp2p.stream_muxer.yamux.yamux
    yamux.YamuxStream = SteadyWindowStream
    keys = create_new_key_pair(config.identity.seed)
    peer_id = ID.from_pubkey(keys.public_key)
    assert peer_id.to_bytes() == encode_libp2p_peer_id(config.identity.peer), "both stacks derive the same peer id"
    cap_readers()
    peerstore = BoundedPeerStore()
    peerstore.add_key_pair(peer_id, keys)
    noise = NoiseTransport(keys, noise_privkey=create_noise_key_pair().private_key)
    upgrader = YamuxUpgrader(
        secure_transports_by_protocol={TProtocol(NOISE_PROTOCOL_ID): noise},
        muxer_transports_by_protocol={TProtocol(YAMUX_PROTOCOL_ID): BoundedYamux},
        negotiate_timeout=int(NEGOTIATION_TIMEOUT_S),
    )
    # A quarter of the places stays for connections that this node makes.
    reserved = config.connections_max // 4
    limits = ConnectionConfig(
        max_connections=config.connections_max,
        min_connections=reserved,
        low_watermark=reserved,
        high_watermark=config.connections_max,
        max_connections_per_peer=CONNECTIONS_PER_PEER_MAX,
        inbound_upgrade_timeout=HANDSHAKE_TIMEOUT_S,
        outbound_upgrade_timeout=HANDSHAKE_TIMEOUT_S,
        outbound_stream_protocol_negotiation_timeout=NEGOTIATION_TIMEOUT_S,
        inbound_stream_protocol_negotiation_timeout=NEGOTIATION_TIMEOUT_S,
    )
    swarm = BoundedSwarm(
        peer_id,
        peerstore,
        upgrader,
        [TcpTransport()],
        retry_config=RetryConfig(max_retries=0),
        connection_config=limits,
    )
    return BoundedHost(swarm, announced, observations), swarm


def build_gossip(host: BoundedHost, topic: str, presences_per_s_max: float) -> tuple[LeanGossip, DirectPubsub]:
    """Gossip of one topic. A peer that forwards refused presences is heeded less and then not at all."""
    scores = ScoreParams(
        # Counted linearly and subtracted here: a positive weight is a penalty.
        p4_invalid_messages=TopicScoreParams(weight=10.0, cap=100.0, decay=0.98),
        publish_threshold=-50.0,
        gossip_threshold=-50.0,
        graylist_threshold=-80.0,
        accept_px_threshold=0.0,
    )
    router = LeanGossip(
        # Not 1.2: its IDONTWANT, sent to everybody for every message, is as large as a presence.
        protocols=[PROTOCOL_ID_V11],
        # Forwarding is a reserve here: most presences arrive from their source. The upper bound is for a bootstrap
        # peer, the only one that many others know at first: whom it prunes hears of nobody for a while.
        degree=3,
        degree_low=2,
        degree_high=32,
        heartbeat_interval=HEARTBEAT_S,
        score_params=scores,
        # This would stretch the heartbeat to a minute whenever few messages flow.
        adaptive_gossip_enabled=False,
        max_messages_per_topic_per_second=presences_per_s_max,
        # A swarm may well live behind one address.
        eclipse_protection_enabled=False,
    )
    pubsub = DirectPubsub(
        host,
        router,
        strict_signing=True,
        max_subscriptions_per_rpc=16,
        max_subscriptions_per_peer=16,
        max_inbound_rpc_size=GOSSIP_RPC_BYTES_MAX,
        allowed_topics={topic},
    )
    # Messages are told apart by source and number. The library's numbers begin at the time in seconds: a peer that
    # publishes more often and starts again would repeat those of its life before, and not be heard for minutes.
    pubsub.counter = time.time_ns()
    pubsub.seen_messages.stop()
    pubsub.seen_messages = SeenMessages()
    return router, pubsub


def build_dht(host: BoundedHost, serves: bool) -> KadDHT:
    """A DHT node for providers and peers. It takes no values: nobody reads them, and they would fill it."""
    dht = ServersDht(
        host,
        DHTMode.SERVER if serves else DHTMode.CLIENT,
        validator=NamespacedValidator({}, strict_validation=True),
        validator_changed=True,
        strict_validation=True,
    )
    dht.provider_store = BoundedProviders(host, dht.peer_routing)
    return dht


def forget_strangers(swarm: BoundedSwarm, router: GossipSub) -> None:
    """Keep what the library only ever adds to within its bounds; call about once a minute."""
    known = swarm.peerstore.peer_ids()
    for peer_id in known[: max(0, len(known) - KNOWN_PEERS_MAX)]:
        if peer_id != swarm.self_id and not swarm.get_connections(peer_id):
            swarm.peerstore.clear_peerdata(peer_id)
    router.recent_message_deliveries.clear()
