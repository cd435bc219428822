"""Frames, the outbox and the asker, over a stream that exists in memory only."""

from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import pytest
import trio
import trio.testing

from shoal.node.control import FRAME_BYTES_MAX, SENDS_QUEUED_MAX, PeerUnreachable, RequestRefused
from shoal.node.libp2p_streams import (
    BATCH_BYTES_MAX,
    UNDELIVERED_FRAMES_MAX,
    Asker,
    FrameReader,
    Outbox,
    PeerLink,
    encode_frame,
    receive_messages,
)
from shoal.protocol.errors import Failure, ProtocolError, Refusal
from shoal.protocol.identity import Identity, PeerId

PEER = Identity(b"p" * 32).peer


class MemoryStream:
    """What was written to it, and chunks to read from it; the last chunk is followed by the end of the stream."""

    def __init__(self, chunks: Iterable[bytes] = (), error: Exception | None = None) -> None:
        self.written: list[bytes] = []
        self.was_reset = False
        self._chunks = list(chunks)
        self._error = error

    async def read(self, count: int) -> bytes:
        if not self._chunks:
            raise self._error or EOFError
        chunk = self._chunks.pop(0)
        if len(chunk) > count:
            self._chunks.insert(0, chunk[count:])
        return chunk[:count]

    async def write(self, data: bytes) -> None:
        if self._error is not None:
            raise self._error
        self.written.append(data)

    async def reset(self) -> None:
        self.was_reset = True


class Done:
    """A completion that remembers."""

    def __init__(self, abandoned: bool = False) -> None:
        self.outcomes: list[PeerUnreachable | None] = []
        self.abandoned = abandoned

    def __call__(self, error: PeerUnreachable | None) -> None:
        self.outcomes.append(error)


def link_over(stream: MemoryStream, connect_error: PeerUnreachable | None = None) -> PeerLink:
    async def connect(peer: PeerId) -> None:
        if connect_error is not None:
            raise connect_error

    async def open_stream(peer: PeerId, protocol: object) -> Any:
        return stream

    async def hang_up(peer: PeerId) -> None:
        return

    return PeerLink(peer=PEER, connect=connect, open_stream=open_stream, hang_up=hang_up)


def read_all(chunks: Iterable[bytes]) -> list[bytes]:
    stream: Any = MemoryStream(chunks)

    async def read() -> list[bytes]:
        reader, bodies = FrameReader(stream), []
        while (body := await reader.read()) is not None:
            bodies.append(body)
        return bodies

    return trio.run(read)


@pytest.mark.parametrize("length", [0, 1, 127, 128, 16383, 16384, FRAME_BYTES_MAX])
def test_a_frame_comes_back_however_it_is_cut(length: int) -> None:
    body = bytes(length)
    frame = encode_frame(body)
    assert read_all([frame + frame]) == [body, body]
    assert read_all([frame[:1], frame[1:2], frame[2:]]) == [body]
    assert read_all(frame[index : index + 1000] for index in range(0, len(frame), 1000)) == [body]


def test_no_frames_are_no_bodies() -> None:
    assert read_all([]) == []


@pytest.mark.parametrize("cut", [b"\x05abc", b"\x80", encode_frame(bytes(300))[:100]])
def test_a_stream_that_ends_within_a_frame_is_broken(cut: bytes) -> None:
    with pytest.raises(EOFError):
        read_all([cut])


@pytest.mark.parametrize("head", [b"\xff\xff\xff", b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", b"\x81\x82\x10"])
def test_a_length_out_of_bounds_is_refused_before_its_bytes(head: bytes) -> None:
    with pytest.raises(ProtocolError) as caught:
        read_all([head])
    assert caught.value.refusal is Refusal.OVERSIZED


def test_receiving_waits_for_the_loop_now_and_then() -> None:
    frames = [encode_frame(b"x")] * (2 * UNDELIVERED_FRAMES_MAX + 1)
    log: list[str] = []

    async def flush() -> None:
        log.append("flush")

    async def receive() -> None:
        stream: Any = MemoryStream(frames)
        await receive_messages(FrameReader(stream), lambda _: log.append("message"), flush)

    trio.run(receive)
    burst = ["message"] * UNDELIVERED_FRAMES_MAX + ["flush"]
    assert log == [*burst, *burst, "message"]


def run_outbox(stream: MemoryStream, use: Callable[[Outbox], Awaitable[None]], **link: Any) -> None:
    async def run() -> None:
        outbox = Outbox(link_over(stream, **link))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(outbox.run)
            await use(outbox)
            outbox.close()

    trio.run(run)


def test_messages_that_wait_together_leave_together() -> None:
    stream, done = MemoryStream(), [Done() for _ in range(5)]
    payloads = [b"a", b"b", bytes(BATCH_BYTES_MAX), b"c", b"d"]

    async def use(outbox: Outbox) -> None:
        for payload, completion in zip(payloads, done, strict=True):
            outbox.put(payload, completion)
        await trio.testing.wait_all_tasks_blocked()

    run_outbox(stream, use)
    frames = [encode_frame(payload) for payload in payloads]
    assert stream.written == [frames[0] + frames[1], frames[2], frames[3] + frames[4]]
    assert [completion.outcomes for completion in done] == [[None]] * 5


def test_a_message_that_nobody_waits_for_is_not_sent() -> None:
    stream, abandoned, wanted = MemoryStream(), Done(abandoned=True), Done()

    async def use(outbox: Outbox) -> None:
        outbox.put(b"old", abandoned)
        outbox.put(b"new", wanted)
        await trio.testing.wait_all_tasks_blocked()

    run_outbox(stream, use)
    assert stream.written == [encode_frame(b"new")] and abandoned.outcomes == []


def test_a_full_outbox_refuses_and_a_closed_one_fails_what_it_holds() -> None:
    outbox = Outbox(link_over(MemoryStream()))
    held = [Done() for _ in range(SENDS_QUEUED_MAX)]
    for completion in held:
        outbox.put(b"", completion)
    late = Done()
    outbox.put(b"", late)
    assert late.outcomes[0] is not None and late.outcomes[0].failure is Failure.PEER_SLOW
    outbox.close()
    trio.run(outbox.run)
    assert {completion.outcomes[0].failure for completion in held if completion.outcomes[0]} == {Failure.PEER_LOST}
    assert all(len(completion.outcomes) == 1 for completion in held)


@pytest.mark.parametrize(
    ("stream", "connect_error", "failure"),
    [
        (MemoryStream(error=OSError("broken")), None, Failure.PEER_LOST),
        (MemoryStream(), PeerUnreachable(PEER, Failure.PEER_UNREACHABLE, "no address"), Failure.PEER_UNREACHABLE),
    ],
)
def test_a_peer_that_cannot_be_reached_fails_its_messages(
    stream: MemoryStream, connect_error: PeerUnreachable | None, failure: Failure
) -> None:
    done = [Done(), Done()]

    async def use(outbox: Outbox) -> None:
        for completion in done:
            outbox.put(b"x", completion)
        await trio.testing.wait_all_tasks_blocked()
        assert outbox.is_closed

    run_outbox(stream, use, connect_error=connect_error)
    for completion in done:
        assert completion.outcomes[0] is not None and completion.outcomes[0].failure is failure


def ask(answer: bytes) -> tuple[bytes, MemoryStream]:
    stream = MemoryStream([answer])
    return trio.run(Asker(link_over(stream)).ask, b"question"), stream


def test_an_answer_is_what_follows_its_status() -> None:
    answer, stream = ask(encode_frame(b"\0yes"))
    assert answer == b"yes"
    assert stream.written == [encode_frame(b"question")] and not stream.was_reset


def test_a_refusal_has_a_name() -> None:
    with pytest.raises(RequestRefused) as caught:
        ask(encode_frame(b"\1wrong_swarm"))
    assert caught.value.refusal is Refusal.WRONG_SWARM


@pytest.mark.parametrize("answer", [b"", b"\1no such refusal", b"\2yes", b"\1\xff"])
def test_what_is_neither_answer_nor_refusal_is_malformed(answer: bytes) -> None:
    with pytest.raises(ProtocolError) as caught:
        ask(encode_frame(answer))
    assert caught.value.refusal is Refusal.MALFORMED


def test_no_answer_is_a_lost_peer_and_the_stream_is_not_used_again() -> None:
    stream = MemoryStream()
    with pytest.raises(PeerUnreachable) as caught:
        trio.run(Asker(link_over(stream)).ask, b"question")
    assert caught.value.failure is Failure.PEER_LOST and stream.was_reset
