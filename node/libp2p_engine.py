"""The trio side of the libp2p host: its life, its connections, its streams, its gossip and its DHT.

Invariants: a peer is reported connected once before it is reported lost once, however many connections it has, and no
message of it is passed on outside of that time; a peer without an Ed25519 key may use the DHT and is otherwise not
there; every task here ends with the run.
"""

import collections
import errno
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

import trio
from libp2p.abc import INetConn, INetStream, INetwork, INotifee
from libp2p.custom_types import TProtocol
from libp2p.network.connection.swarm_connection import SwarmConn
from libp2p.network.exceptions import SwarmException
from libp2p.peer.id import ID
from libp2p.peer.peerstore import PeerStoreError
from libp2p.pubsub.pb import rpc_pb2
from libp2p.rcmgr import Direction
from libp2p.utils.address_validation import expand_wildcard_address
from multiaddr import Multiaddr

from shoal.dht.addresses import Address, keep_dialable, parse_address, parse_peer_address
from shoal.dht.keys import presence_topic
from shoal.node.control import (
    LOOKUP_TIMEOUT_S,
    PRESENCE_BYTES_MAX,
    PROVIDERS_MAX,
    REQUEST_TIMEOUT_S,
    ControlConfig,
    ControlHandlers,
    PeerAddresses,
    PeerUnreachable,
    Reachability,
    RelayCounts,
)
from shoal.node.libp2p_connections import is_relayed, transport_of
from shoal.node.libp2p_dialer import Dialer
from shoal.node.libp2p_hop import HOP_PROTOCOL, STOP_PROTOCOL, HopService
from shoal.node.libp2p_relays import CircuitTransport, RelayClient
from shoal.node.libp2p_stack import (
    LISTEN_BACKLOG,
    build_dht,
    build_gossip,
    build_host,
    forget_strangers,
    quiet_libp2p,
    run_service,
)
from shoal.node.libp2p_streams import (
    CONTROL_PROTOCOL,
    REQUEST_PROTOCOL,
    STREAM_ERRORS,
    Asker,
    Completion,
    FrameReader,
    Outbox,
    PeerLink,
    answer_requests,
    receive_messages,
)
from shoal.node.libp2p_tls import add_tls
from shoal.protocol.errors import ConfigError, Failure, ProtocolError, Refusal, ShoalError
from shoal.protocol.identity import PeerId, decode_libp2p_peer_id, encode_libp2p_peer_id, format_peer_id

UPKEEP_INTERVAL_S = 60.0
PROVIDER_QUERIES_MAX = 10
# How long the circuits to a peer stay that can be reached directly by now: what was asked over them is answered then.
RETIRE_S = REQUEST_TIMEOUT_S
IDLE_CONNECTION_S = 600.0
PRESENCES_WAITING_MAX = 1024
# Opening a stream has its own limits; this one is for what the library forgot to limit.
OPEN_STREAM_TIMEOUT_S = 6.0


class AsyncioSide(Protocol):
    """What the engine needs of the bridge."""

    def deliver(self, fn: Callable[..., object], *args: object) -> None:
        """Run `fn(*args)` on the asyncio loop, in order."""

    async def flush(self) -> None:
        """Return when what was delivered has run."""

    async def ask(self, async_fn: Callable[[PeerId, bytes], Awaitable[bytes]], peer: PeerId, question: bytes) -> bytes:
        """Run a coroutine on the asyncio loop and return its result."""


@dataclass(slots=True, kw_only=True)
class _ConnectedPeer:
    addresses: tuple[str, ...]
    relayed: bool = False
    used_s: float = field(default_factory=trio.current_time)
    lost: trio.Event = field(default_factory=trio.Event)


class _ConnectionEvents(INotifee):
    """Hands the swarm's connection events to the engine."""

    def __init__(self, on_connected: Callable[[INetConn], None], on_closed: Callable[[INetConn], None]) -> None:
        self._on_connected = on_connected
        self._on_closed = on_closed

    async def connected(self, network: INetwork, conn: INetConn) -> None:
        self._on_connected(conn)

    async def disconnected(self, network: INetwork, conn: INetConn) -> None:
        self._on_closed(conn)

    async def opened_stream(self, network: INetwork, stream: INetStream) -> None:
        return

    async def closed_stream(self, network: INetwork, stream: INetStream) -> None:
        return

    async def listen(self, network: INetwork, multiaddr: Multiaddr) -> None:
        return

    async def listen_close(self, network: INetwork, multiaddr: Multiaddr) -> None:
        return


class ControlEngine:
    """One libp2p node. Enter `running`, then use it; every method but the two snapshots belongs to the trio run."""

    def __init__(self, config: ControlConfig, handlers: ControlHandlers, asyncio_side: AsyncioSide) -> None:
        quiet_libp2p()
        self._config = config
        self._handlers = handlers
        self._asyncio = asyncio_side
        self._me = config.identity.peer
        self._topic = presence_topic(config.swarm)
        self._interfaces: tuple[Multiaddr, ...] = ()
        self._host, self._swarm = build_host(config, self._announced)
        add_tls(self._swarm, config.identity)
        self._router, self._pubsub = build_gossip(self._host, self._topic, config.presences_per_s_max)
        self._dht = build_dht(self._host, config.serves_dht)
        self._dialer = Dialer(self._swarm, self._me)
        self._swarm.dial_known = self._dial_known
        self._relays = RelayClient(self._me, self._swarm, self._open_direct_stream, self._refresh_addresses)
        self._swarm.transport_manager.add_transport(
            CircuitTransport(self._relays, partial(self._dialer.connect, directly=True))
        )
        self._hop: HopService | None = None
        if config.relay is not None:
            self._hop = HopService(
                config.relay, self._own_addresses, self._open_connected_stream, self._swarm.is_directly_connected
            )
        self._peers: dict[PeerId, _ConnectedPeer] = {}
        self._outboxes: dict[PeerId, Outbox] = {}
        self._askers: dict[PeerId, Asker] = {}
        self._presences: collections.deque[tuple[PeerId, bytes]] = collections.deque(maxlen=PRESENCES_WAITING_MAX)
        self._tasks: trio.Nursery | None = None
        # Snapshots for the asyncio thread: replaced as a whole, never changed.
        self.addresses: tuple[str, ...] = ()
        self.peers: tuple[PeerAddresses, ...] = ()

    @asynccontextmanager
    async def running(self) -> AsyncIterator["ControlEngine"]:
        """Listen, serve and keep bootstrapped; on leaving, hang up on everybody. Raises ConfigError or UriError."""
        bootstraps = self._bootstraps()
        sockets = await open_listeners(self._config)
        self._swarm.register_notifee(_ConnectionEvents(self._note_connected, self._note_closed))
        self._host.set_stream_handler(CONTROL_PROTOCOL, self._serve_messages)
        self._host.set_stream_handler(REQUEST_PROTOCOL, self._serve_requests)
        self._host.set_stream_handler(STOP_PROTOCOL, self._relays.serve)
        if self._hop is not None and self._config.reachability is not Reachability.PRIVATE:
            self._host.set_stream_handler(HOP_PROTOCOL, self._hop.serve)
        self._host.on_identified = self._note_identified
        self._pubsub.set_topic_validator(self._topic, self._is_presence_valid, is_async_validator=False)
        self._pubsub.on_message = self._receive_presence
        async with AsyncExitStack() as services:
            for service in (self._swarm, self._dht, self._router, self._pubsub):
                await services.enter_async_context(run_service(service))
            async with trio.open_nursery() as self._tasks:
                for opened in sockets:
                    self._swarm.add_listener(opened, self._tasks)
                self._refresh_addresses()
                await self._pubsub.subscribe(self._topic)
                self._tasks.start_soon(self._keep_up)
                self._tasks.start_soon(self._relays.keep_reserved, self._count_relays_wanted, self._known_relays)
                for peer, addresses in bootstraps.items():
                    self._tasks.start_soon(self._keep_bootstrapped, peer, addresses)
                yield self
                await self._close()

    # -- connections

    async def connect(self, peer: PeerId, addresses: Sequence[Address]) -> None:
        """Connect to `peer`; raises PeerUnreachable."""
        self._note_use(peer)
        await self._dialer.connect(peer, addresses)

    async def disconnect(self, peer: PeerId) -> None:
        """Close the peer's sockets. The rest follows as if it had hung up."""
        for connection in self._swarm.get_connections(_libp2p_id(peer)):
            await _close_socket(connection)

    async def _close(self) -> None:
        self._dialer.close()
        # Circuits end with the connections that they run in.
        for connection in sorted(self._swarm.get_connections(), key=lambda one: is_relayed(one.muxed_conn)):
            await _close_socket(connection)
        assert self._tasks is not None
        self._tasks.cancel_scope.cancel()

    async def _keep_bootstrapped(self, peer: PeerId, addresses: Sequence[Address]) -> None:
        report = partial(self._asyncio.deliver, self._handlers.on_bootstrap_failed)
        await self._dialer.keep_bootstrapped(peer, addresses, self._loss_of, report)

    def _note_use(self, peer: PeerId) -> None:
        if connected := self._peers.get(peer):
            connected.used_s = trio.current_time()

    async def _make_room(self) -> None:
        """Once most places are taken, hang up on the peers of least use: look-ups connect and never let go."""
        excess = len(self._peers) - self._config.connections_max * 3 // 4
        unused_since_s = trio.current_time() - IDLE_CONNECTION_S
        unbound = [peer for peer in self._peers if not self._is_bound(peer)]
        for peer in sorted(unbound, key=lambda peer: self._peers[peer].used_s)[: max(0, excess)]:
            if self._peers[peer].used_s < unused_since_s:
                await self.disconnect(peer)

    def _is_bound(self, peer: PeerId) -> bool:
        """Whether others are reached through this peer, or it is reached through this node."""
        relaying = self._hop is not None and self._hop.is_used_by(_libp2p_id(peer))
        return relaying or self._relays.is_bound_to(peer)

    def _bootstraps(self) -> dict[PeerId, list[Address]]:
        by_peer: dict[PeerId, list[Address]] = {}
        for text in self._config.bootstrap:
            peer, address = parse_peer_address(text)
            if peer != self._me:
                by_peer.setdefault(peer, []).append(address)
        return by_peer

    def _loss_of(self, peer: PeerId) -> trio.Event:
        if connected := self._peers.get(peer):
            return connected.lost
        lost = trio.Event()
        lost.set()
        return lost

    def _note_connected(self, connection: INetConn) -> None:
        peer = _ed25519_peer(connection.muxed_conn.peer_id)
        if peer is None or peer == self._me or connection.is_closed:
            return
        relayed = is_relayed(connection.muxed_conn)
        if peer in self._peers:
            if self._peers[peer].relayed and not relayed:
                self._prefer_direct(peer)
            return
        dialled = isinstance(connection, SwarmConn) and connection.direction is Direction.OUTBOUND
        remote = [str(address) for address in connection.get_transport_addresses()] if dialled else []
        addresses = _with_peer(keep_dialable(remote, peer), peer)
        self._peers[peer] = _ConnectedPeer(addresses=addresses, relayed=relayed)
        self._publish_peers()
        self._asyncio.deliver(self._handlers.on_peer_connected, peer)

    def _note_closed(self, connection: INetConn) -> None:
        peer_id = connection.muxed_conn.peer_id
        peer = _ed25519_peer(peer_id)
        if not self._swarm.is_directly_connected(peer_id):
            if self._hop is not None:
                self._hop.forget(peer_id)
            if peer is not None:
                self._relays.forget(peer)
        if peer is None or peer not in self._peers:
            return
        if self._dialer.is_connected(peer):
            self._peers[peer].relayed = not self._dialer.is_directly_connected(peer)
            # The library opens its gossip stream with a peer's first connection only, and this may have been that.
            self._pubsub._schedule_peer_stream_retry(peer_id)
            self._publish_peers()
            return
        lost = self._peers.pop(peer)
        self._askers.pop(peer, None)
        if outbox := self._outboxes.pop(peer, None):
            outbox.close()
        self._publish_peers()
        self._asyncio.deliver(self._handlers.on_peer_lost, peer)
        lost.lost.set()

    def _prefer_direct(self, peer: PeerId) -> None:
        """The peer that was reached through a relay is reached directly by now."""
        assert self._tasks is not None
        self._peers[peer].relayed = False
        self._publish_peers()
        if outbox := self._outboxes.get(peer):
            outbox.move()
        if asker := self._askers.get(peer):
            self._tasks.start_soon(asker.move)
        self._tasks.start_soon(self._retire_circuits, peer)

    async def _retire_circuits(self, peer: PeerId) -> None:
        await trio.sleep(RETIRE_S)
        for connection in self._swarm.get_connections(_libp2p_id(peer)):
            if is_relayed(connection.muxed_conn) and self._dialer.is_directly_connected(peer):
                await _close_socket(connection)

    async def _note_identified(self, peer_id: ID) -> None:
        self._relays.wake()
        await self._dht.add_peer(peer_id)
        peer = _ed25519_peer(peer_id)
        if peer is None or peer not in self._peers:
            return
        if addresses := self._dialer.known_addresses(peer):
            self._peers[peer].addresses = _with_peer(addresses, peer)
            self._publish_peers()

    def _publish_peers(self) -> None:
        self.peers = tuple(
            PeerAddresses(peer=peer, addresses=known.addresses, relayed=known.relayed)
            for peer, known in self._peers.items()
        )

    # -- messages and requests

    def send(self, peer: PeerId, payload: bytes, done: Completion) -> None:
        """Send a message to `peer`, in the order of the calls."""
        self._note_use(peer)
        outbox = self._outboxes.get(peer)
        if outbox is None or outbox.is_closed:
            outbox = self._outboxes[peer] = Outbox(self._link(peer))
            assert self._tasks is not None
            self._tasks.start_soon(self._run_outbox, peer, outbox)
        outbox.put(payload, done)

    async def request(self, peer: PeerId, question: bytes) -> bytes:
        """Ask `peer`; the caller sets the time limit."""
        self._note_use(peer)
        asker = self._askers.setdefault(peer, Asker(self._link(peer)))
        try:
            return await asker.ask(question)
        finally:
            if peer not in self._peers:
                self._askers.pop(peer, None)

    async def _run_outbox(self, peer: PeerId, outbox: Outbox) -> None:
        await outbox.run()
        if self._outboxes.get(peer) is outbox:
            del self._outboxes[peer]

    def _link(self, peer: PeerId) -> PeerLink:
        return PeerLink(peer=peer, connect=self._dialer.connect, open_stream=self._open_stream, hang_up=self.disconnect)

    async def _open_stream(self, peer: PeerId, protocol: TProtocol) -> INetStream:
        with trio.fail_after(OPEN_STREAM_TIMEOUT_S):
            return await self._host.new_stream(_libp2p_id(peer), [protocol])

    async def _open_direct_stream(self, peer: PeerId, protocol: TProtocol) -> INetStream:
        if not self._dialer.is_directly_connected(peer):
            raise PeerUnreachable(peer, Failure.PEER_LOST, "not connected")
        return await self._open_stream(peer, protocol)

    async def _open_connected_stream(self, peer_id: ID, protocol: TProtocol) -> INetStream:
        return await self._host.new_stream(peer_id, [protocol])

    async def _dial_known(self, peer_id: ID) -> None:
        peer = _ed25519_peer(peer_id)
        if peer is None:
            raise SwarmException("only peers with Ed25519 keys are dialled")
        try:
            await self._dialer.connect(peer)
        except PeerUnreachable as error:
            raise SwarmException(error.detail) from error

    async def _serve_messages(self, stream: INetStream) -> None:
        if (peer := await self._admit(stream)) is None:
            return
        deliver = partial(self._asyncio.deliver, self._handlers.on_message, peer)
        await self._contain(peer, stream, receive_messages(FrameReader(stream), deliver, self._asyncio.flush))

    async def _serve_requests(self, stream: INetStream) -> None:
        if (peer := await self._admit(stream)) is None:
            return
        answer = partial(self._asyncio.ask, self._handlers.on_request, peer)
        await self._contain(peer, stream, answer_requests(self._link(peer), stream, answer))

    async def _admit(self, stream: INetStream) -> PeerId | None:
        # The stream of a connection may be served before its connection event has come round.
        peer_id = stream.muxed_conn.peer_id
        for connection in self._swarm.get_connections(peer_id):
            self._note_connected(connection)
        peer = _ed25519_peer(peer_id)
        if peer in self._peers:
            self._note_use(peer)
            return peer
        await stream.reset()
        return None

    async def _contain(self, peer: PeerId, stream: INetStream, serving: Awaitable[None]) -> None:
        try:
            await serving
        except ProtocolError as error:
            self._asyncio.deliver(self._handlers.on_misbehaviour, peer, error)
            await stream.reset()
        except (*STREAM_ERRORS, ShoalError):
            await stream.reset()
        else:
            await stream.close()

    # -- gossip

    async def publish(self, payload: bytes) -> None:
        """Gossip one presence of this peer."""
        await self._pubsub.publish(self._topic, payload)

    def _is_presence_valid(self, forwarder_id: ID, message: rpc_pb2.Message) -> bool:
        source, forwarder = _ed25519_peer(ID(message.from_id)), _ed25519_peer(forwarder_id)
        if source is None or forwarder == self._me:
            return source is not None
        try:
            if len(message.data) > PRESENCE_BYTES_MAX:
                raise ProtocolError(Refusal.OVERSIZED, f"a presence of {len(message.data)} bytes")
            self._handlers.check_presence(source, message.data)
        except ProtocolError as error:
            if forwarder is not None:
                self._asyncio.deliver(self._handlers.on_misbehaviour, forwarder, error)
            return False
        return True

    def _receive_presence(self, message: rpc_pb2.Message) -> None:
        source = _ed25519_peer(ID(message.from_id))
        if source is not None and source != self._me:
            # While the loop is held up, a newer presence is worth more than an older one.
            self._presences.append((source, message.data))
            self._asyncio.deliver(self._pass_presence)

    def _pass_presence(self) -> None:
        # Runs on the asyncio loop.
        if self._presences:
            self._handlers.on_presence(*self._presences.popleft())

    # -- discovery

    async def provide(self, key: bytes) -> bool:
        """Store this peer as a provider of `key` at the nodes closest to it; whether one took it."""
        stored = False
        with trio.move_on_after(LOOKUP_TIMEOUT_S):
            stored = await self._dht.provider_store.provide(key)
        # When to announce what again is the daemon's schedule; the library would do so for ever.
        self._dht.provider_store.providing_keys.discard(key)
        return stored

    async def find_providers(self, key: bytes) -> tuple[PeerAddresses, ...]:
        """Ask the nodes closest to `key`. (The library's own look-up is content with what this node has stored.)"""
        found: dict[PeerId, tuple[str, ...]] = {}

        def add(peer_id: ID, addresses: Sequence[Multiaddr]) -> None:
            peer = _ed25519_peer(peer_id)
            if peer is not None and peer != self._me and (peer in found or len(found) < PROVIDERS_MAX):
                found[peer] = keep_dialable((*found.get(peer, ()), *map(str, addresses)), peer)

        async def query(node: ID) -> None:
            async with places:
                providers, _ = await self._dht.provider_store._get_providers_from_peer_with_closers(node, key)
            for provider in providers:
                add(provider.peer_id, provider.addrs)

        for stored in self._dht.provider_store.get_providers(key):
            add(stored.peer_id, stored.addrs)
        places = trio.CapacityLimiter(PROVIDER_QUERIES_MAX)
        with trio.move_on_after(LOOKUP_TIMEOUT_S):
            closest = await self._dht.peer_routing.find_closest_peers_network(key)
            async with trio.open_nursery() as queries:
                for node in closest:
                    queries.start_soon(query, node)
        return tuple(PeerAddresses(peer=peer, addresses=_with_peer(texts, peer)) for peer, texts in found.items())

    async def find_peer(self, peer: PeerId) -> PeerAddresses | None:
        """Ask the nodes closest to `peer` for its addresses."""
        texts: tuple[str, ...] = ()
        with trio.move_on_after(LOOKUP_TIMEOUT_S):
            found = await self._dht.peer_routing.find_peer(_libp2p_id(peer))
            texts = keep_dialable(map(str, found.addrs), peer) if found is not None else ()
        return PeerAddresses(peer=peer, addresses=_with_peer(texts, peer)) if texts else None

    # -- addresses and upkeep

    async def _keep_up(self) -> None:
        while True:
            await trio.sleep(UPKEEP_INTERVAL_S)
            self._refresh_addresses()
            forget_strangers(self._swarm, self._router)
            await self._make_room()

    def _count_relays_wanted(self) -> int:
        return self._config.relays_wanted if self._config.reachability is Reachability.PRIVATE else 0

    def _known_relays(self) -> list[PeerId]:
        """Connected peers that relay for others, bootstrap peers first."""
        relays = []
        for peer in self._peers:
            with suppress(PeerStoreError):
                protocols = self._swarm.peerstore.get_protocols(_libp2p_id(peer))
                if HOP_PROTOCOL in protocols and self._dialer.is_directly_connected(peer):
                    relays.append(peer)
        bootstraps = self._bootstraps()
        return sorted(relays, key=lambda peer: peer not in bootstraps)

    def relay_counts(self) -> RelayCounts:
        """What is relayed for others now. Callable from any thread."""
        return self._hop.counts() if self._hop is not None else RelayCounts()

    def _own_addresses(self) -> list[Multiaddr]:
        """Where others reach this node by itself."""
        return [address for address in self._host.get_addrs() if not parse_address(str(address)).is_relayed]

    def _refresh_addresses(self) -> None:
        interfaces: dict[str, Multiaddr] = {}
        for listener in self._swarm.listeners.values():
            for bound in listener.get_addrs():
                interfaces |= {str(address): address for address in _dialable_forms(bound)}
        self._interfaces = tuple(interfaces.values())
        self._host.refresh_addrs()
        self.addresses = tuple(str(address) for address in self._host.get_addrs())

    def _announced(self, candidates: list[Multiaddr]) -> list[Multiaddr]:
        """What the host advertises: the configured addresses, or its own and those that others saw it by."""
        circuits = [Multiaddr(str(replace(address, peer=None))) for address in self._relays.addresses()]
        if self._config.announce:
            given = (replace(parse_address(text), peer=None) for text in self._config.announce)
            return [*(Multiaddr(str(address)) for address in given), *circuits]
        known = {str(address) for address in self._interfaces}
        observed = [
            address
            for address in candidates
            if str(address) not in known and not parse_address(str(address)).is_wildcard
        ]
        return [*self._interfaces, *observed, *circuits]


async def open_listeners(config: ControlConfig) -> list[Sequence[trio.SocketListener]]:
    """The sockets of `config.listen`, bound and listening; raises ConfigError naming the address that is taken."""
    opened: list[Sequence[trio.SocketListener]] = []
    for text in config.listen:
        address = parse_address(text)
        try:
            opened.append(await trio.open_tcp_listeners(address.port, host=address.host, backlog=LISTEN_BACKLOG))
        except OSError as error:
            if (
                address.net == "ip6"
                and error.errno in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)
                and address.host == "::"
            ):
                continue
            for sockets in opened:
                for listener in sockets:
                    await listener.aclose()
            raise _listen_error(config.listen_field, address, error) from error
    if not opened:
        raise ConfigError(config.listen_field, "no address to listen on", "give one, such as /ip4/0.0.0.0/tcp/4001")
    return opened


def _listen_error(config_field: str, address: Address, error: OSError) -> ConfigError:
    if error.errno == errno.EADDRINUSE:
        problem = f"port {address.port} of {address.host} is in use by another program"
        return ConfigError(config_field, problem, "choose another port, or 0 for any that is free")
    problem = f"cannot listen on port {address.port} of {address.host}: {error.strerror or error}"
    return ConfigError(config_field, problem, "choose an address of this machine and a port above 1023")


async def _close_socket(connection: INetConn) -> None:
    await transport_of(connection.muxed_conn).abort()


def _dialable_forms(bound: Multiaddr) -> list[Multiaddr]:
    """The address itself, or what a wildcard stands for: this machine's addresses, loopback only for want of others."""
    if not parse_address(str(bound)).is_wildcard:
        return [bound]
    forms = [form for form in expand_wildcard_address(bound) if not parse_address(str(form)).is_wildcard]
    outward = [form for form in forms if not parse_address(str(form)).is_loopback]
    return outward or forms


def _libp2p_id(peer: PeerId) -> ID:
    return ID(encode_libp2p_peer_id(peer))


def _ed25519_peer(peer_id: ID) -> PeerId | None:
    try:
        return decode_libp2p_peer_id(peer_id.to_bytes())
    except ProtocolError:
        return None


def _with_peer(texts: Sequence[str], peer: PeerId) -> tuple[str, ...]:
    tail = f"/p2p/{format_peer_id(peer)}"
    return tuple(dict.fromkeys(text if text.endswith(tail) else text + tail for text in texts))
