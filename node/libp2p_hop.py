"""The relay's side of circuit relay v2: reservations, and circuits between two peers.

After libp2p's circuit-v2 specification, over py-libp2p's messages and not its service: that one keeps one circuit per
peer, writes its refusals into the bytes that it relays, and frees places only for some ways of ending.

Invariants: nobody is reached here who has not reserved a place and is not connected; no circuit runs over another one;
reservations, circuits, their time and their bytes stay within RelayLimits; whatever ends a circuit gives its places
back; a slow reader holds up its own circuit and nothing else.
"""

import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

import trio
from google.protobuf.message import DecodeError, Message
from libp2p.abc import INetStream
from libp2p.custom_types import TProtocol
from libp2p.peer.id import ID
from libp2p.relay.circuit_v2.pb.circuit_pb2 import HopMessage, Limit, Status, StopMessage
from multiaddr import Multiaddr

from shoal.node.arrivals import group_of
from shoal.node.control import RelayCounts, RelayLimits
from shoal.node.libp2p_connections import is_relayed, transport_of, undisturbed
from shoal.node.libp2p_streams import STREAM_ERRORS, FrameReader, encode_frame, end_writing
from shoal.protocol.errors import ProtocolError, Refusal

HOP_PROTOCOL = TProtocol("/libp2p/circuit/relay/0.2.0/hop")
STOP_PROTOCOL = TProtocol("/libp2p/circuit/relay/0.2.0/stop")
MESSAGE_BYTES_MAX = 4096
# From the first byte of a question to the last of its answer.
EXCHANGE_TIMEOUT_S = 5.0
PUMP_BYTES = 32 * 1024
ADDRESSES_MAX = 8


M = TypeVar("M", bound=Message)


async def read_message(reader: FrameReader, message: M) -> M:
    """Fill `message` from the stream's next frame; raises ProtocolError, EOFError or one of STREAM_ERRORS."""
    frame = await reader.read()
    if frame is None:
        raise EOFError("the stream ended before its message")
    try:
        message.ParseFromString(frame)
    except DecodeError as error:
        raise ProtocolError(Refusal.MALFORMED, f"not a {type(message).__name__}") from error
    return message


async def write_message(stream: INetStream, message: Message) -> None:
    """Write one frame."""
    await stream.write(encode_frame(message.SerializeToString()))


@dataclass(slots=True)
class _Reservation:
    host: str
    until_s: float


class HopService:
    """Serves one host's HOP streams. `open_stream` must open on a connection that is there, never dial."""

    def __init__(
        self,
        limits: RelayLimits,
        addresses: Callable[[], list[Multiaddr]],
        open_stream: Callable[[ID, TProtocol], Awaitable[INetStream]],
        is_directly_connected: Callable[[ID], bool],
    ) -> None:
        self._limits = limits
        self._addresses = addresses
        self._open_stream = open_stream
        self._is_directly_connected = is_directly_connected
        self._reservations: dict[ID, _Reservation] = {}
        self._circuits: Counter[ID] = Counter()
        self._circuit_count = 0
        self._relayed_bytes = 0

    def counts(self) -> RelayCounts:
        """What is relayed now."""
        return RelayCounts(
            reservations=len(self._reservations), circuits=self._circuit_count, relayed_bytes=self._relayed_bytes
        )

    def is_used_by(self, peer: ID) -> bool:
        """Whether the peer is reached through here, or reaches others."""
        return peer in self._reservations or self._circuits[peer] > 0

    def forget(self, peer: ID) -> None:
        """The peer has no direct connection any more, and with it goes its place."""
        self._reservations.pop(peer, None)

    async def serve(self, stream: INetStream) -> None:
        """Answer one HOP stream; of a circuit, until it is over."""
        reader = FrameReader(stream, MESSAGE_BYTES_MAX)
        with trio.move_on_after(EXCHANGE_TIMEOUT_S) as limit:
            try:
                question = await read_message(reader, HopMessage())
            except ProtocolError:
                await self._refuse(stream, Status.MALFORMED_MESSAGE)
                return
        if limit.cancelled_caught:
            await stream.reset()
        elif is_relayed(stream.muxed_conn):
            await self._refuse(stream, Status.PERMISSION_DENIED)
        elif question.type == HopMessage.RESERVE:
            await self._reserve(stream)
        elif question.type == HopMessage.CONNECT and question.peer.id:
            await self._connect(stream, reader, ID(question.peer.id))
        else:
            await self._refuse(stream, Status.UNEXPECTED_MESSAGE)

    async def _refuse(self, stream: INetStream, status: Status.ValueType) -> None:
        with trio.move_on_after(EXCHANGE_TIMEOUT_S) as limit:
            await write_message(stream, HopMessage(type=HopMessage.STATUS, status=status))
            await stream.close()
        if limit.cancelled_caught:
            await stream.reset()

    # -- reservations

    async def _reserve(self, stream: INetStream) -> None:
        peer, now_s = stream.muxed_conn.peer_id, trio.current_time()
        for known in [known for known, place in self._reservations.items() if place.until_s <= now_s]:
            del self._reservations[known]
        remote = transport_of(stream.muxed_conn).get_remote_address()
        host = group_of(remote[0]) if remote else ""
        others = [place for known, place in self._reservations.items() if known != peer]
        same_host = sum(place.host == host for place in others)
        if len(others) >= self._limits.reservations_max or same_host >= self._limits.reservations_per_host_max:
            await self._refuse(stream, Status.RESERVATION_REFUSED)
            return
        self._reservations[peer] = _Reservation(host, now_s + self._limits.reservation_s)
        answer = HopMessage(type=HopMessage.STATUS, status=Status.OK, limit=self._limit())
        answer.reservation.expire = int(time.time() + self._limits.reservation_s)
        answer.reservation.addrs.extend(address.to_bytes() for address in self._addresses()[:ADDRESSES_MAX])
        with trio.move_on_after(EXCHANGE_TIMEOUT_S):
            await write_message(stream, answer)
            await stream.close()

    def _limit(self) -> Limit:
        return Limit(duration=int(self._limits.circuit_s), data=self._limits.circuit_bytes_max)

    # -- circuits

    async def _connect(self, source: INetStream, reader: FrameReader, target: ID) -> None:
        asker = source.muxed_conn.peer_id
        place = self._reservations.get(target)
        if place is None or place.until_s <= trio.current_time() or not self._is_directly_connected(target):
            await self._refuse(source, Status.NO_RESERVATION)
            return
        busiest = max(self._circuits[asker], self._circuits[target])
        if self._circuit_count >= self._limits.circuits_max or busiest >= self._limits.circuits_per_peer_max:
            await self._refuse(source, Status.RESOURCE_LIMIT_EXCEEDED)
            return
        self._circuit_count += 1
        self._circuits.update((asker, target))
        try:
            await self._run_circuit(source, reader, target)
        finally:
            self._circuit_count -= 1
            self._circuits.subtract((asker, target))
            for peer in (asker, target):
                if not self._circuits[peer]:
                    del self._circuits[peer]

    async def _run_circuit(self, source: INetStream, reader: FrameReader, target: ID) -> None:
        opened = await self._open_target(source.muxed_conn.peer_id, target)
        if opened is None:
            await self._refuse(source, Status.CONNECTION_FAILED)
            return
        sink, answers = opened
        try:
            with trio.fail_after(EXCHANGE_TIMEOUT_S):
                await write_message(source, HopMessage(type=HopMessage.STATUS, status=Status.OK, limit=self._limit()))
            with trio.move_on_after(self._limits.circuit_s):
                await self._relay(_Way(source, sink, reader.take_rest()), _Way(sink, source, answers.take_rest()))
        except (*STREAM_ERRORS, trio.TooSlowError):
            pass  # one of the two has gone, and that is how circuits end
        finally:
            # What has ended properly on both sides is not there any more to be reset.
            with undisturbed(EXCHANGE_TIMEOUT_S):
                await sink.reset()
                await source.reset()

    async def _open_target(self, asker: ID, target: ID) -> tuple[INetStream, FrameReader] | None:
        stream: INetStream | None = None
        question = StopMessage(type=StopMessage.CONNECT, limit=self._limit())
        question.peer.id = asker.to_bytes()
        with trio.move_on_after(EXCHANGE_TIMEOUT_S):
            try:
                stream = await self._open_stream(target, STOP_PROTOCOL)
                await write_message(stream, question)
                reader = FrameReader(stream, MESSAGE_BYTES_MAX)
                answer = await read_message(reader, StopMessage())
                if answer.type == StopMessage.STATUS and answer.status == Status.OK:
                    return stream, reader
            except (*STREAM_ERRORS, ProtocolError, trio.TooSlowError):
                pass  # the asker is told that it failed; why is the target's affair
        if stream is not None:
            await stream.reset()
        return None

    async def _relay(self, *ways: "_Way") -> None:
        left = self._limits.circuit_bytes_max

        async def pump(way: _Way) -> None:
            nonlocal left
            chunk = way.first
            while True:
                left -= len(chunk)
                self._relayed_bytes += len(chunk)
                if left < 0:
                    raise EOFError("the circuit's bytes are used up")
                if chunk:
                    await way.sink.write(chunk)
                try:
                    chunk = await way.source.read(PUMP_BYTES)
                except EOFError:
                    chunk = b""
                if not chunk:
                    await end_writing(way.sink)
                    return

        async def run(way: _Way) -> None:
            try:
                await pump(way)
            except STREAM_ERRORS:
                pumps.cancel_scope.cancel()

        async with trio.open_nursery() as pumps:
            for way in ways:
                pumps.start_soon(run, way)


@dataclass(frozen=True, slots=True)
class _Way:
    source: INetStream
    sink: INetStream
    first: bytes
