"""The project's two stream protocols over libp2p: messages and requests. Everything here runs in trio.

/shoal/control/1   a long-lived stream, one way: frames, each a message
/shoal/request/1   question frame, answer frame, and again; one question at a time, several streams side by side

A frame is an unsigned varint length and that many bytes, at most FRAME_BYTES_MAX (libp2p's own framing). An answer
frame starts with a status byte: 0 and the answer, or 1 and the name of a Refusal.

Invariants: the length is checked before anything is read for it; a write that was cut short closes the connection,
since half a frame of the secure channel may be on the wire; queues and streams per peer are bounded.
"""

import collections
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import trio
from libp2p.abc import INetStream
from libp2p.custom_types import TProtocol
from libp2p.exceptions import BaseLibp2pError
from libp2p.network.stream.net_stream import NetStream

from shoal.node.control import FRAME_BYTES_MAX, REQUESTS_PER_PEER_MAX, SENDS_QUEUED_MAX, PeerUnreachable, RequestRefused
from shoal.protocol.errors import Failure, ProtocolError, Refusal
from shoal.protocol.identity import PeerId

CONTROL_PROTOCOL = TProtocol("/shoal/control/1")
REQUEST_PROTOCOL = TProtocol("/shoal/request/1")
WRITE_TIMEOUT_S = 5.0
# Frames that are queued together leave together, up to one frame of the secure channel.
BATCH_BYTES_MAX = 60 * 1024
READ_BYTES = 64 * 1024
# How much of one stream may be on its way to the asyncio loop before the stream is read on.
UNDELIVERED_BYTES_MAX = 1024 * 1024
UNDELIVERED_FRAMES_MAX = 64
HANDLER_TIMEOUT_S = 30.0

_ANSWER, _REFUSED = b"\0", b"\1"
_LENGTH_BYTES_MAX = 3
assert 2 * FRAME_BYTES_MAX < 1 << 7 * _LENGTH_BYTES_MAX

STREAM_ERRORS = (BaseLibp2pError, OSError, EOFError, ValueError, trio.BrokenResourceError, trio.ClosedResourceError)


def encode_frame(body: bytes) -> bytes:
    """The frame of `body`."""
    assert len(body) <= FRAME_BYTES_MAX + 1, f"a frame of {len(body)} bytes"
    length, prefix = len(body), bytearray()
    while length >= 0x80:
        prefix.append(length & 0x7F | 0x80)
        length >>= 7
    prefix.append(length)
    return bytes(prefix) + body


async def end_writing(stream: INetStream) -> None:
    """Tell the other side that nothing follows; its own bytes still come."""
    assert isinstance(stream, NetStream)
    await stream.close_write()


class FrameReader:
    """Reads frames off a stream."""

    def __init__(self, stream: INetStream, body_bytes_max: int = FRAME_BYTES_MAX) -> None:
        self._stream = stream
        self._body_bytes_max = body_bytes_max
        self._unread = bytearray()

    async def read(self) -> bytes | None:
        """The next frame's body; None when the peer ended the stream between two frames.

        Raises ProtocolError for a frame out of bounds, or one of STREAM_ERRORS when the stream broke.
        """
        while (header := self._parse_length()) is None:
            if not await self._fill():
                if self._unread:
                    raise EOFError("the stream ended within a frame")
                return None
        start, length = header
        while len(self._unread) < start + length:
            if not await self._fill():
                raise EOFError("the stream ended within a frame")
        body = bytes(self._unread[start : start + length])
        del self._unread[: start + length]
        return body

    def take_rest(self) -> bytes:
        """What was read beyond the last frame, where the stream goes on in another protocol."""
        rest, self._unread = bytes(self._unread), bytearray()
        return rest

    async def _fill(self) -> bool:
        try:
            chunk = await self._stream.read(READ_BYTES)
        except EOFError:
            return False
        self._unread += chunk
        return bool(chunk)

    def _parse_length(self) -> tuple[int, int] | None:
        length = 0
        for index, byte in enumerate(self._unread[:_LENGTH_BYTES_MAX]):
            length |= (byte & 0x7F) << 7 * index
            if not byte & 0x80:
                if length > self._body_bytes_max:
                    raise ProtocolError(Refusal.OVERSIZED, f"a frame of {length} bytes, at most {self._body_bytes_max}")
                return index + 1, length
        if len(self._unread) >= _LENGTH_BYTES_MAX:
            raise ProtocolError(Refusal.OVERSIZED, f"a frame of more than {1 << 7 * _LENGTH_BYTES_MAX} bytes")
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerLink:
    """What the stream protocols need to know of one peer's connection."""

    peer: PeerId
    connect: Callable[[PeerId], Awaitable[None]]
    open_stream: Callable[[PeerId, TProtocol], Awaitable[INetStream]]
    hang_up: Callable[[PeerId], Awaitable[None]]

    async def open(self, protocol: TProtocol) -> INetStream:
        """A new stream; dials if need be. Raises PeerUnreachable."""
        await self.connect(self.peer)
        # Not to be cancelled from outside: opening a stream writes, too.
        with trio.CancelScope(shield=True):
            try:
                return await self.open_stream(self.peer, protocol)
            except (*STREAM_ERRORS, trio.TooSlowError) as error:
                raise self.unreachable(Failure.PEER_LOST, f"no stream: {error}") from error

    async def write(self, stream: INetStream, frames: bytes) -> None:
        """Write whole frames; raises PeerUnreachable."""
        try:
            await self._finish_or_hang_up(stream.write(frames))
        except STREAM_ERRORS as error:
            raise self.unreachable(Failure.PEER_LOST, f"write failed: {error}") from error

    async def finish(self, stream: INetStream) -> None:
        """Say that nothing follows, and return when the other side has read everything or is gone."""
        with suppress(*STREAM_ERRORS), trio.move_on_after(WRITE_TIMEOUT_S):
            await end_writing(stream)
            await stream.read(1)
        await self.reset(stream)

    async def reset(self, stream: INetStream) -> None:
        """Give the stream up, whatever state it is in."""
        with suppress(PeerUnreachable):
            await self._finish_or_hang_up(stream.reset())

    async def _finish_or_hang_up(self, writing: Awaitable[None]) -> None:
        with trio.move_on_after(WRITE_TIMEOUT_S) as scope:
            scope.shield = True
            await writing
        if scope.cancelled_caught:
            await self.hang_up(self.peer)
            raise self.unreachable(Failure.PEER_SLOW, f"took no bytes for {WRITE_TIMEOUT_S:.0f} s")

    def unreachable(self, failure: Failure, detail: str) -> PeerUnreachable:
        """The error to raise about this peer."""
        return PeerUnreachable(self.peer, failure, detail)


class Completion(Protocol):
    """Where the fate of a message is reported, once: None, or why it did not go out."""

    @property
    def abandoned(self) -> bool:
        """Whether nobody waits any more; the message need not be sent."""

    def __call__(self, error: PeerUnreachable | None) -> None: ...


@dataclass(frozen=True, slots=True)
class _Message:
    payload: bytes
    done: Completion


class Outbox:
    """The messages to one peer, in order, over one stream that is opened when the first is there."""

    def __init__(self, link: PeerLink) -> None:
        self._link = link
        self._queue: collections.deque[_Message] = collections.deque()
        self._wake = trio.Event()
        self._closed = False
        self._moving = False

    @property
    def is_closed(self) -> bool:
        """Whether messages must go to a new outbox."""
        return self._closed

    def put(self, payload: bytes, done: Completion) -> None:
        """Queue a message; when too many wait already it fails at once."""
        if len(self._queue) >= SENDS_QUEUED_MAX:
            done(self._link.unreachable(Failure.PEER_SLOW, f"{SENDS_QUEUED_MAX} messages are waiting"))
            return
        self._queue.append(_Message(payload, done))
        self._wake.set()

    def close(self) -> None:
        """The peer is gone: `run` fails what is queued and ends."""
        self._closed = True
        self._wake.set()

    def move(self) -> None:
        """The peer has a better connection: use that one for what comes next, in order as ever."""
        self._moving = True
        self._wake.set()

    async def run(self) -> None:
        """Send until `close`, or until the peer cannot be reached."""
        stream: INetStream | None = None
        batch: list[_Message] = []
        error = self._link.unreachable(Failure.PEER_LOST, "the connection closed")
        try:
            while not self._closed:
                if self._moving:
                    self._moving = False
                    if stream is not None:
                        await self._link.finish(stream)
                        stream = None
                if not self._queue:
                    self._wake = trio.Event()
                    await self._wake.wait()
                    continue
                if stream is None:
                    stream = await self._link.open(CONTROL_PROTOCOL)
                batch = self._take_batch()
                await self._link.write(stream, b"".join(encode_frame(message.payload) for message in batch))
                for message in batch:
                    message.done(None)
                batch = []
        except PeerUnreachable as raised:
            error = raised
        finally:
            self._closed = True
            for message in (*batch, *self._queue):
                message.done(error)
            self._queue.clear()

    def _take_batch(self) -> list[_Message]:
        batch: list[_Message] = []
        size = 0
        while self._queue and (not batch or size + len(self._queue[0].payload) <= BATCH_BYTES_MAX):
            message = self._queue.popleft()
            if not message.done.abandoned:
                batch.append(message)
                size += len(message.payload)
        return batch


class Asker:
    """The requests to one peer. Streams are kept for the next question."""

    def __init__(self, link: PeerLink) -> None:
        self._link = link
        self._places = trio.CapacityLimiter(REQUESTS_PER_PEER_MAX)
        self._idle: list[tuple[INetStream, FrameReader]] = []
        self._moves = 0

    async def move(self) -> None:
        """The peer has a better connection: what is asked from now on goes there."""
        self._moves += 1
        left, self._idle = self._idle, []
        for stream, _ in left:
            await self._link.reset(stream)

    async def ask(self, question: bytes) -> bytes:
        """The answer to `question`; the caller sets the time limit. Raises as ControlPlane.request does."""
        async with self._places:
            stream, reader = self._idle.pop() if self._idle else await self._open()
            answered, moves = False, self._moves
            try:
                await self._link.write(stream, encode_frame(question))
                answer = await self._read_answer(reader)
                answered = True
            finally:
                if answered and moves == self._moves:
                    self._idle.append((stream, reader))
                else:
                    await self._link.reset(stream)
        status, body = answer[:1], answer[1:]
        if status == _ANSWER:
            return body
        try:
            refusal = Refusal(body.decode("ascii", "replace"))
        except ValueError as error:
            raise ProtocolError(Refusal.MALFORMED, "an answer that is neither an answer nor a refusal") from error
        raise RequestRefused(self._link.peer, refusal)

    async def _open(self) -> tuple[INetStream, FrameReader]:
        stream = await self._link.open(REQUEST_PROTOCOL)
        return stream, FrameReader(stream, FRAME_BYTES_MAX + 1)

    async def _read_answer(self, reader: FrameReader) -> bytes:
        try:
            answer = await reader.read()
        except STREAM_ERRORS as error:
            raise self._link.unreachable(Failure.PEER_LOST, f"no answer: {error}") from error
        if answer is None:
            raise self._link.unreachable(Failure.PEER_LOST, "the peer hung up on a request")
        return answer


async def receive_messages(
    reader: FrameReader, deliver: Callable[[bytes], None], flush: Callable[[], Awaitable[None]]
) -> None:
    """Pass every message on to `deliver`; ends with the stream. Raises ProtocolError or one of STREAM_ERRORS."""
    frames = size = 0
    while (message := await reader.read()) is not None:
        deliver(message)
        frames, size = frames + 1, size + len(message)
        if frames >= UNDELIVERED_FRAMES_MAX or size >= UNDELIVERED_BYTES_MAX:
            await flush()
            frames = size = 0


async def answer_requests(link: PeerLink, stream: INetStream, answer: Callable[[bytes], Awaitable[bytes]]) -> None:
    """Answer every question on the stream; ends with it. Raises ProtocolError, PeerUnreachable or STREAM_ERRORS."""
    reader = FrameReader(stream)
    while (question := await reader.read()) is not None:
        reply = _REFUSED + Refusal.LIMIT.encode("ascii")
        with trio.move_on_after(HANDLER_TIMEOUT_S):
            try:
                reply = _ANSWER + await answer(question)
            except ProtocolError as refused:
                reply = _REFUSED + refused.refusal.encode("ascii")
        await link.write(stream, encode_frame(reply))
