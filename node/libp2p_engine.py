"""The trio side of the libp2p host: its life, its connections, its streams, its gossip and its DHT.

Invariants: a peer is reported connected once before it is reported lost once, however many connections it has, and no
message of it is passed on outside of that time; a peer without an Ed25519 key may use the DHT and is otherwise not
there; every task here ends with the run.
"""

import collections
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

import trio
from libp2p.abc import INetConn, INetStream
from libp2p.custom_types import TProtocol
from libp2p.network.connection.swarm_connection import SwarmConn
from libp2p.network.exceptions import SwarmException
from libp2p.peer.id import ID
from libp2p.peer.peerstore import PeerStoreError
from libp2p.pubsub.pb import rpc_pb2
from libp2p.rcmgr import Direction
from multiaddr import Multiaddr

from shoal.dht.addresses import Address, keep_dialable, parse_address, parse_peer_address, with_peer
from shoal.dht.keys import presence_topic
from shoal.node.control import (
    PRESENCE_BYTES_MAX,
    REQUEST_TIMEOUT_S,
    ControlConfig,
    ControlHandlers,
    ControlReach,
    PeerAddresses,
    PeerUnreachable,
    RelayCounts,
)
from shoal.node.libp2p_addresses import OwnAddresses, open_listeners
from shoal.node.libp2p_connections import ConnectionEvents, is_relayed, transport_of
from shoal.node.libp2p_dcutr import DCUTR_PROTOCOL, DirectUpgrades
from shoal.node.libp2p_dialer import Dialer
from shoal.node.libp2p_discovery import Discovery, ed25519_peer, libp2p_id
from shoal.node.libp2p_hop import HOP_PROTOCOL, STOP_PROTOCOL, HopService
from shoal.node.libp2p_reach import AUTONAT_PROTOCOL, DialBacks, Observations, ReachCheck
from shoal.node.libp2p_relays import CircuitTransport, RelayClient
from shoal.node.libp2p_stack import (
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
from shoal.node.reachability import ReachState
from shoal.protocol.errors import Failure, ProtocolError, Refusal, ShoalError
from shoal.protocol.identity import PeerId

UPKEEP_INTERVAL_S = 60.0
# Changes that come together are told together.
SETTLE_S = 0.3
# Peers behind relays that are dialled directly once more, each UPKEEP_INTERVAL_S.
DIRECT_TRIES_MAX = 4
# A peer that nobody has checked asks for relays, too, but leaves others this long to check it.
UNKNOWN_GRACE_S = 10.0
# Places that a peer which others can dial holds at relays, for those who have only an address family that it has not.
BRIDGES_WANTED = 1
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
    dialled: bool = False
    ending: bool = False
    used_s: float = field(default_factory=trio.current_time)
    lost: trio.Event = field(default_factory=trio.Event)


class ControlEngine:
    """One libp2p node. Enter `running`, then use it; every method but the two snapshots belongs to the trio run."""

    def __init__(self, config: ControlConfig, handlers: ControlHandlers, asyncio_side: AsyncioSide) -> None:
        quiet_libp2p()
        self._config = config
        self._handlers = handlers
        self._asyncio = asyncio_side
        self._me = config.identity.peer
        self._topic = presence_topic(config.swarm)
        self._own = OwnAddresses(config)
        observations = Observations()
        self._host, self._swarm = build_host(config, self._announced, observations)
        add_tls(self._swarm, config.identity)
        self._router, self._pubsub = build_gossip(self._host, self._topic, config.presences_per_s_max)
        self._dht = build_dht(self._host, config.serves_dht)
        self._reach = ReachCheck(self._me, observations, self._open_direct_stream, config.reachability)
        self._dial_backs = DialBacks(self._swarm.upgrader)
        self._changed = trio.Event()
        self._started_s = 0.0
        self._dialer = Dialer(self._swarm, self._me)
        self.discovery = Discovery(self._dht, self._me, self._swarm, self._dialer, self._open_stream)
        self._swarm.dial_known = self._dial_known
        self._relays = RelayClient(self._me, self._swarm, self._open_direct_stream, self._refresh_addresses)
        self._swarm.transport_manager.add_transport(
            CircuitTransport(self._relays, partial(self._dialer.connect, directly=True))
        )
        self._upgrades = DirectUpgrades(
            self._swarm, self._dialer, self._open_stream, self._candidates, lambda: self._own.bound
        )
        self._hop: HopService | None = None
        if config.relay is not None:
            self._hop = HopService(
                config.relay,
                self._direct_addresses,
                self._host.open_connected_stream,
                self._swarm.is_directly_connected,
            )
        self._peers: dict[PeerId, _ConnectedPeer] = {}
        self._outboxes: dict[PeerId, Outbox] = {}
        self._askers: dict[PeerId, Asker] = {}
        self._presences: collections.deque[tuple[PeerId, bytes]] = collections.deque(maxlen=PRESENCES_WAITING_MAX)
        self._tasks: trio.Nursery | None = None
        # Snapshots for the asyncio thread: replaced as a whole, never changed.
        self._reach_told = ControlReach()
        self.addresses: tuple[str, ...] = ()
        self.peers: tuple[PeerAddresses, ...] = ()

    @asynccontextmanager
    async def running(self) -> AsyncIterator["ControlEngine"]:
        """Listen, serve and keep bootstrapped; on leaving, hang up on everybody. Raises ConfigError or UriError."""
        bootstraps = self._bootstraps()
        sockets = await open_listeners(self._config)
        self._swarm.register_notifee(ConnectionEvents(self._note_connected, self._note_closed))
        self._host.set_stream_handler(CONTROL_PROTOCOL, self._serve_messages)
        self._host.set_stream_handler(REQUEST_PROTOCOL, self._serve_requests)
        self._host.set_stream_handler(STOP_PROTOCOL, self._relays.serve)
        self._host.set_stream_handler(AUTONAT_PROTOCOL, self._dial_backs.serve)
        if self._config.upgrades_circuits:
            self._host.set_stream_handler(DCUTR_PROTOCOL, self._upgrades.serve)
        self._host.on_identified = self._note_identified
        self._pubsub.set_topic_validator(self._topic, self._is_presence_valid, is_async_validator=False)
        self._pubsub.on_message = self._receive_presence
        async with AsyncExitStack() as services:
            for service in (self._swarm, self._dht, self._router, self._pubsub):
                await services.enter_async_context(run_service(service))
            async with trio.open_nursery() as self._tasks:
                for opened in sockets:
                    self._swarm.add_listener(opened, self._tasks)
                self._started_s = trio.current_time()
                self._refresh_addresses()
                await self._note_reach()
                await self._pubsub.subscribe(self._topic)
                self._tasks.start_soon(self._keep_up)
                self._tasks.start_soon(self._keep_told)
                self._tasks.start_soon(
                    self._reach.keep_checked,
                    partial(self._find_serving, AUTONAT_PROTOCOL),
                    self._candidates,
                    self._note_reach,
                )
                self._tasks.start_soon(
                    self._relays.keep_reserved, self._count_relays_wanted, self._find_relays, self._leads_here
                )
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
        """Close the peer's sockets, also any that comes about meanwhile. The rest follows as if it had hung up."""
        if connected := self._peers.get(peer):
            connected.ending = True
        await self._hang_up(peer)

    async def _hang_up(self, peer: PeerId) -> None:
        for connection in self._swarm.get_connections(libp2p_id(peer)):
            await transport_of(connection.muxed_conn).abort()

    async def _drop_stranded(self) -> None:
        # Their silence would be noticed, but only after a while, and no other connection be made before.
        for connection in self._swarm.get_connections():
            if transport_of(connection.muxed_conn).is_stranded():
                await transport_of(connection.muxed_conn).abort()

    async def _close(self) -> None:
        self._dialer.close()
        # Circuits end with the connections that they run in.
        for connection in sorted(self._swarm.get_connections(), key=lambda one: is_relayed(one.muxed_conn)):
            await transport_of(connection.muxed_conn).abort()
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
        relaying = self._hop is not None and self._hop.is_used_by(libp2p_id(peer))
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
        peer = ed25519_peer(connection.muxed_conn.peer_id)
        if peer is None or peer == self._me or connection.is_closed:
            return
        relayed = is_relayed(connection.muxed_conn)
        if peer in self._peers:
            if self._peers[peer].relayed and not relayed and not self._peers[peer].ending:
                self._prefer_direct(peer)
            if self._tasks is not None and self._peers[peer].ending:
                self._tasks.start_soon(transport_of(connection.muxed_conn).abort)
            elif self._tasks is not None:
                self._tasks.start_soon(self._swarm.doubt_others, connection)
            return
        dialled = isinstance(connection, SwarmConn) and connection.direction is Direction.OUTBOUND
        remote = [str(address) for address in connection.get_transport_addresses()] if dialled else []
        addresses = with_peer(keep_dialable(remote, peer), peer)
        self._peers[peer] = _ConnectedPeer(addresses=addresses, relayed=relayed, dialled=dialled)
        self._publish_peers()
        self._asyncio.deliver(self._handlers.on_peer_connected, peer)

    def _note_closed(self, connection: INetConn) -> None:
        peer_id = connection.muxed_conn.peer_id
        peer = ed25519_peer(peer_id)
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
        for connection in self._swarm.get_connections(libp2p_id(peer)):
            if is_relayed(connection.muxed_conn) and self._dialer.is_directly_connected(peer):
                await transport_of(connection.muxed_conn).abort()

    async def _note_identified(self, peer_id: ID) -> None:
        self._relays.wake()
        self._reach.wake()
        protocols = self._protocols_of(peer_id)
        await self.discovery.meet(peer_id, protocols)
        peer = ed25519_peer(peer_id)
        if peer is None or peer not in self._peers:
            return
        upgrades = self._config.upgrades_circuits and DCUTR_PROTOCOL in protocols
        if upgrades and self._swarm.is_dialled_by_relay(peer_id):
            assert self._tasks is not None
            self._tasks.start_soon(self._upgrades.upgrade, peer)
        if addresses := self._dialer.known_addresses(peer):
            self._peers[peer].addresses = with_peer(addresses, peer)
            self._publish_peers()

    def _publish_peers(self) -> None:
        self.peers = tuple(
            PeerAddresses(
                peer=peer,
                addresses=known.addresses,
                relayed=known.relayed,
                dialled=known.dialled,
                relays=self._serves(peer, HOP_PROTOCOL),
            )
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
        return PeerLink(peer=peer, connect=self._dialer.connect, open_stream=self._open_stream, hang_up=self._hang_up)

    async def _open_stream(self, peer: PeerId, protocol: TProtocol) -> INetStream:
        with trio.fail_after(OPEN_STREAM_TIMEOUT_S):
            return await self._host.new_stream(libp2p_id(peer), [protocol])

    async def _open_direct_stream(self, peer: PeerId, protocol: TProtocol) -> INetStream:
        if not self._dialer.is_directly_connected(peer):
            raise PeerUnreachable(peer, Failure.PEER_LOST, "not connected")
        with trio.fail_after(OPEN_STREAM_TIMEOUT_S):
            return await self._host.open_connected_stream(libp2p_id(peer), protocol)

    async def _dial_known(self, peer_id: ID) -> None:
        peer = ed25519_peer(peer_id)
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
        peer = ed25519_peer(peer_id)
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
        source, forwarder = ed25519_peer(ID(message.from_id)), ed25519_peer(forwarder_id)
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
        source = ed25519_peer(ID(message.from_id))
        if source is not None and source != self._me:
            # While the loop is held up, a newer presence is worth more than an older one.
            self._presences.append((source, message.data))
            self._asyncio.deliver(self._pass_presence)

    def _pass_presence(self) -> None:
        # Runs on the asyncio loop.
        if self._presences:
            self._handlers.on_presence(*self._presences.popleft())

    # -- addresses and upkeep

    async def _keep_up(self) -> None:
        while True:
            await trio.sleep(UPKEEP_INTERVAL_S)
            await self._note_reach()
            forget_strangers(self._swarm, self._router)
            await self._make_room()
            await self._try_direct()

    async def _try_direct(self) -> None:
        """A peer that is reached through a relay may have become reachable, or this one's network another."""
        relayed = [peer for peer, known in self._peers.items() if known.relayed]
        for peer in random.sample(relayed, min(len(relayed), DIRECT_TRIES_MAX)):
            with suppress(PeerUnreachable):
                await self._dialer.connect(peer, directly=True)

    async def _keep_told(self) -> None:
        """Tell the connected peers of what has changed, once for changes that come together."""
        while True:
            await self._changed.wait()
            await trio.sleep(SETTLE_S)
            self._changed = trio.Event()
            await self._host.push_identify()

    def refresh(self) -> None:
        """What was true of this machine's addresses may be so no more."""
        assert self._tasks is not None
        self._reach.forget()
        self._tasks.start_soon(self._drop_stranded)
        self._upgrades.forget_pauses()
        self._dialer.retry()
        self._tasks.start_soon(self._note_reach)

    def offer(self, addresses: Sequence[Address]) -> None:
        """Addresses to be announced once others have dialled them."""
        self._own.offered = tuple(replace(address, peer=None) for address in addresses)
        self.refresh()

    async def _note_reach(self) -> None:
        """Act on whether this peer can be dialled."""
        state = self._reach.state
        serves = self._hop is not None and (
            state is ReachState.REACHABLE or (state is ReachState.UNKNOWN and self._config.relays_unconfirmed)
        )
        if serves != (HOP_PROTOCOL in self._host.get_mux().get_protocols()):
            self._changed.set()
            if serves and self._hop is not None:
                self._host.set_stream_handler(HOP_PROTOCOL, self._hop.serve)
            else:
                self._host.remove_stream_handler(HOP_PROTOCOL)
        self._refresh_addresses()
        self._relays.wake()

    def _is_hidden(self) -> bool:
        waits = trio.current_time() < self._started_s + UNKNOWN_GRACE_S
        state = self._reach.state
        return state is ReachState.PRIVATE or (state is ReachState.UNKNOWN and not waits)

    def _count_relays_wanted(self) -> int:
        if self._is_hidden():
            return self._config.relays_wanted
        is_bridged = self._reach.state is ReachState.REACHABLE and self._own.lacks is not None
        return min(BRIDGES_WANTED, self._config.relays_wanted) if is_bridged else 0

    def _leads_here(self, relay: PeerId) -> bool:
        """Whether a place at this relay is of any use: a peer that others can dial has none of it, but for those who
        have only the family that this machine lacks."""
        return self._is_hidden() or self._own.is_bridge(self._dialer.known_addresses(relay))

    def _find_relays(self) -> list[PeerId]:
        """Who may be asked for a place, the best first."""
        serving = filter(self._leads_here, self._find_serving(HOP_PROTOCOL))
        return sorted(serving, key=lambda peer: not self._own.is_bridge(self._dialer.known_addresses(peer)))

    def _protocols_of(self, peer_id: ID) -> Sequence[str]:
        try:
            return self._swarm.peerstore.get_protocols(peer_id)
        except PeerStoreError:
            return ()

    def _find_serving(self, protocol: TProtocol) -> list[PeerId]:
        """Peers that serve this, connected without a relay between; bootstrap peers first."""
        connected = [peer for peer in self._peers if self._dialer.is_directly_connected(peer)]
        bootstraps = self._bootstraps()
        serving = (peer for peer in connected if self._serves(peer, protocol))
        return sorted(serving, key=lambda peer: peer not in bootstraps)

    def _serves(self, peer: PeerId, protocol: TProtocol) -> bool:
        return protocol in self._protocols_of(libp2p_id(peer))

    def _candidates(self) -> list[Address]:
        return self._own.candidates(self._reach.seen_hosts())

    def reach(self) -> ControlReach:
        """How others reach this peer. Callable from any thread."""
        served = self._hop.counts() if self._hop is not None else RelayCounts()
        return replace(self._reach_told, served=served, checked_s=self._reach.checked_ago_s())

    def _direct_addresses(self) -> list[Multiaddr]:
        """Where others reach this node without a relay."""
        return [address for address in self._host.get_addrs() if not parse_address(str(address)).is_relayed]

    def _refresh_addresses(self) -> None:
        if self._own.read(bound for listener in self._swarm.listeners.values() for bound in listener.get_addrs()):
            self._reach.forget()
        if self._host.refresh_addrs():
            self._changed.set()
            self.addresses = tuple(str(address) for address in self._host.get_addrs())
        reach = ControlReach(
            state=self._reach.state,
            confirmed=tuple(str(address) for address in self._reach.confirmed()),
            seen_hosts=self._reach.seen_hosts(),
            relays=self._relays.relays,
            servers=self._reach.count(),
            serves=HOP_PROTOCOL in self._host.get_mux().get_protocols(),
        )
        if reach != self._reach_told or self._changed.is_set():
            self._reach_told = reach
            self._asyncio.deliver(self._handlers.on_reach_changed)

    def _announced(self) -> list[Multiaddr]:
        # A router's word counts until others have tried.
        unknown = self._reach.state is ReachState.UNKNOWN
        confirmed = self._own.offered if unknown else self._reach.confirmed()
        addresses = self._own.announced(confirmed, self._relays.addresses())
        return [Multiaddr(str(address)) for address in addresses]
