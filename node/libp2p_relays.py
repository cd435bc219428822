"""The client's side of circuit relay v2: places at relays, connections through them, and those that come in.

After libp2p's circuit-v2 specification. While nobody can dial this peer it keeps places at a few relays: bootstrap
peers first, then other peers that relay. A connection through a relay is an ordinary one, with Noise from end to end.

Invariants: a place is renewed before it ends and given up with its relay's connection; what `addresses` names is held
at that moment; a relay that refuses is left alone for REFUSED_PAUSE_S; only relays at which this peer holds a place may
bring connections; everything has a time limit.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from time import time

import trio
from libp2p.abc import IListener, INetStream, IRawConnection, ITransport
from libp2p.custom_types import THandler, TProtocol
from libp2p.peer.id import ID
from libp2p.relay.circuit_v2.pb.circuit_pb2 import HopMessage, Status, StopMessage
from libp2p.transport.exceptions import OpenConnectionError
from multiaddr import Multiaddr

from shoal.dht.addresses import Address, keep_dialable, parse_address
from shoal.node.control import PeerUnreachable
from shoal.node.libp2p_connections import CircuitStream, format_multiaddr_untrusted, is_relayed, make_raw_connection
from shoal.node.libp2p_hop import (
    EXCHANGE_TIMEOUT_S,
    HOP_PROTOCOL,
    MESSAGE_BYTES_MAX,
    read_message,
    write_message,
)
from shoal.node.libp2p_stack import BoundedSwarm
from shoal.node.libp2p_streams import STREAM_ERRORS, FrameReader
from shoal.protocol.errors import ProtocolError, ShoalError, UriError
from shoal.protocol.identity import PeerId, encode_libp2p_peer_id

ADDRESSES_PER_RELAY_MAX = 2
CHECK_PERIOD_S = 30.0
REFUSED_PAUSE_S = 60.0
# The relay says until when by its own clock, which may be wrong.
RESERVATION_MIN_S = 60.0
RESERVATION_MAX_S = 2 * 3600.0
RENEW_SHARE = 0.6

OpenStream = Callable[[PeerId, TProtocol], Awaitable[INetStream]]


class RelayRefused(ShoalError):
    """The relay is there and does not do what was asked; the reason is its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reservation:
    """A place at a relay: where this peer can be dialled through it, and when to ask again."""

    addresses: tuple[Address, ...]
    renew_at_s: float
    ends_at_s: float


class RelayClient:
    """The relays of one host. `open_stream` opens on a direct connection to the relay; it never dials."""

    def __init__(
        self, me: PeerId, swarm: BoundedSwarm, open_stream: OpenStream, on_changed: Callable[[], None]
    ) -> None:
        self._me = me
        self._swarm = swarm
        self._open_stream = open_stream
        self._on_changed = on_changed
        self._held: dict[PeerId, Reservation] = {}
        self._asked: PeerId | None = None
        self._refused_until_s: dict[PeerId, float] = {}
        self._wake = trio.Event()
        self._circuits: set[CircuitStream] = set()

    # -- places

    @property
    def relays(self) -> tuple[PeerId, ...]:
        """Where this peer holds a place now."""
        return tuple(self._held)

    def is_bound_to(self, relay: PeerId) -> bool:
        """Whether this peer is reached through the relay, or has a connection through it."""
        relay_id = ID(encode_libp2p_peer_id(relay))
        return relay in self._held or any(one.stream.muxed_conn.peer_id == relay_id for one in self._circuits)

    def addresses(self) -> tuple[Address, ...]:
        """Where this peer can be dialled through relays, the best of each relay first."""
        each = [held.addresses for held in self._held.values()]
        return tuple(row[place] for place in range(ADDRESSES_PER_RELAY_MAX) for row in each if len(row) > place)

    def wake(self) -> None:
        """Something has changed: look at once whether a relay is needed or can be had."""
        self._wake.set()

    def forget(self, relay: PeerId) -> None:
        """The relay has no direct connection any more."""
        if self._held.pop(relay, None) is not None:
            self._on_changed()
            self.wake()

    async def keep_reserved(
        self, wanted: Callable[[], int], relays: Callable[[], Sequence[PeerId]], leads_here: Callable[[PeerId], bool]
    ) -> None:
        """Hold places at as many of `relays`, the best first, as are `wanted`, and only where that `leads_here`; for
        ever."""
        while True:
            self._wake = trio.Event()
            now_s = trio.current_time()
            before = self.addresses()
            for relay in [relay for relay, until_s in self._refused_until_s.items() if until_s <= now_s]:
                del self._refused_until_s[relay]
            for relay, held in list(self._held.items()):
                if held.ends_at_s <= now_s or not wanted() or not leads_here(relay):
                    del self._held[relay]
            for relay in [relay for relay, held in self._held.items() if held.renew_at_s <= now_s]:
                await self._try(relay)
            for relay in relays():
                if len(self._held) >= wanted():
                    break
                if relay not in self._held and relay not in self._refused_until_s:
                    await self._try(relay)
            if self.addresses() != before:
                self._on_changed()
            deadlines = [held.renew_at_s for held in self._held.values()]
            with trio.move_on_at(min(deadlines, default=now_s + CHECK_PERIOD_S)), trio.move_on_after(CHECK_PERIOD_S):
                await self._wake.wait()

    async def _try(self, relay: PeerId) -> None:
        try:
            self._asked = relay
            held = await self._reserve(relay)
        except (*STREAM_ERRORS, ShoalError, trio.TooSlowError):
            # A place that could not be renewed stands until it ends.
            self._refused_until_s[relay] = trio.current_time() + REFUSED_PAUSE_S
            if known := self._held.get(relay):
                self._held[relay] = replace(known, renew_at_s=min(known.ends_at_s, self._refused_until_s[relay]))
        else:
            self._held[relay] = held
        finally:
            self._asked = None

    async def _reserve(self, relay: PeerId) -> Reservation:
        with trio.fail_after(EXCHANGE_TIMEOUT_S):
            stream = await self._open_stream(relay, HOP_PROTOCOL)
            try:
                await write_message(stream, HopMessage(type=HopMessage.RESERVE))
                answer = await read_message(FrameReader(stream, MESSAGE_BYTES_MAX), HopMessage())
            finally:
                with trio.CancelScope(shield=True):
                    await stream.reset()
        _check_status(answer)
        now_s = trio.current_time()
        lasts_s = min(max(answer.reservation.expire - time(), RESERVATION_MIN_S), RESERVATION_MAX_S)
        texts = [text for raw in answer.reservation.addrs if (text := format_multiaddr_untrusted(raw))]
        addresses = _circuit_addresses(texts, relay) or _circuit_addresses(self._dialled_addresses(relay), relay)
        if not addresses:
            raise RelayRefused("the relay names no address of its own")
        return Reservation(
            addresses=tuple(replace(address, peer=self._me) for address in addresses),
            renew_at_s=now_s + lasts_s * RENEW_SHARE,
            ends_at_s=now_s + lasts_s,
        )

    def _dialled_addresses(self, relay: PeerId) -> list[str]:
        connections = self._swarm.get_connections(ID(encode_libp2p_peer_id(relay)))
        return [str(address) for connection in connections for address in connection.get_transport_addresses()]

    # -- circuits

    async def dial(self, target: Address) -> CircuitStream:
        """Bytes to `target.peer` through its relay, which is connected; raises RelayRefused or STREAM_ERRORS."""
        assert target.relay is not None and target.peer is not None, f"no circuit: {target}"
        stream = await self._open_stream(target.relay, HOP_PROTOCOL)
        is_made = False
        try:
            question = HopMessage(type=HopMessage.CONNECT)
            question.peer.id = encode_libp2p_peer_id(target.peer)
            await write_message(stream, question)
            reader = FrameReader(stream, MESSAGE_BYTES_MAX)
            _check_status(await read_message(reader, HopMessage()))
            is_made = True
        finally:
            if not is_made:
                with trio.CancelScope(shield=True):
                    await stream.reset()
        return self._make_circuit(stream, Multiaddr(str(target)), reader.take_rest())

    async def serve(self, stream: INetStream) -> None:
        """A relay brings a connection: accept it, and serve it to its end."""
        reader = FrameReader(stream, MESSAGE_BYTES_MAX)
        with trio.fail_after(EXCHANGE_TIMEOUT_S):
            question = await read_message(reader, StopMessage())
            status = self._judge(stream, question)
            await write_message(stream, StopMessage(type=StopMessage.STATUS, status=status))
        if status != Status.OK:
            await stream.close()
            return
        relay = stream.muxed_conn.peer_id
        remote = stream.muxed_conn.get_transport_addresses()
        address = Multiaddr(f"{remote[0] if remote else ''}/p2p/{relay}/p2p-circuit")
        circuit = self._make_circuit(stream, address, reader.take_rest())
        try:
            await self._swarm.accept(circuit)
        finally:
            await circuit.close()

    def _judge(self, stream: INetStream, question: StopMessage) -> Status.ValueType:
        relays = [ID(encode_libp2p_peer_id(relay)) for relay in (*self._held, self._asked) if relay is not None]
        if stream.muxed_conn.peer_id not in relays or is_relayed(stream.muxed_conn):
            return Status.PERMISSION_DENIED
        if question.type != StopMessage.CONNECT or not question.peer.id:
            return Status.UNEXPECTED_MESSAGE
        return Status.OK

    def _make_circuit(self, stream: INetStream, address: Multiaddr, unread: bytes) -> CircuitStream:
        circuit = CircuitStream(stream, address, unread)
        self._circuits.add(circuit)
        self._swarm.manager.run_task(self._mind, circuit)
        return circuit

    async def _mind(self, circuit: CircuitStream) -> None:
        try:
            await circuit.linger()
        finally:
            self._circuits.discard(circuit)


class CircuitTransport(ITransport):
    """Dials /p2p-circuit addresses for the swarm, which secures and multiplexes what comes of it as ever."""

    def __init__(self, client: RelayClient, connect: Callable[[PeerId, Sequence[Address]], Awaitable[None]]) -> None:
        self._client = client
        self._connect = connect

    async def dial(self, maddr: Multiaddr) -> IRawConnection:
        """Connect to the relay if need be, then through it."""
        try:
            target = parse_address(str(maddr))
            assert target.relay is not None
            await self._connect(target.relay, [replace(target, peer=target.relay, relay=None)])
            with trio.fail_after(EXCHANGE_TIMEOUT_S):
                return make_raw_connection(await self._client.dial(target), is_initiator=True)
        except (*STREAM_ERRORS, ShoalError, trio.TooSlowError) as error:
            detail = error.detail if isinstance(error, PeerUnreachable) else str(error) or "no answer"
            raise OpenConnectionError(f"by the relay: {detail}") from None

    def create_listener(self, handler_function: THandler) -> IListener:
        raise AssertionError("connections through relays come in by streams")

    def can_dial(self, maddr: Multiaddr) -> bool:
        return "p2p-circuit" in {protocol.name for protocol in maddr.protocols()}

    def can_listen(self, maddr: Multiaddr) -> bool:
        return False

    def protocols(self) -> list[str]:
        return ["p2p-circuit"]


def _check_status(answer: HopMessage) -> None:
    if answer.type != HopMessage.STATUS or answer.status != Status.OK:
        raise RelayRefused(Status.Name(answer.status) if answer.status in Status.values() else "no status")


def _circuit_addresses(texts: Sequence[str], relay: PeerId) -> list[Address]:
    """What makes circuits of a relay's addresses: those that everybody can dial, where there are such."""
    direct: list[Address] = []
    for text in keep_dialable(texts, relay):
        try:
            address = parse_address(text)
        except (UriError, ProtocolError):
            continue
        if not address.is_relayed:
            direct.append(address)
    chosen = [address for address in direct if address.is_global] or direct
    made = dict.fromkeys(replace(address, relay=relay, peer=None) for address in chosen)
    return list(made)[:ADDRESSES_PER_RELAY_MAX]
