"""What the tests of the tensor links share: a recording sink, a peer that may lie, a proxy that may harm."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import uvloop
from blake3 import blake3

from shoal.node.link_port import Address, LinkConfig, LinkEnd, LinkLost
from shoal.node.link_records import RecordKind
from shoal.node.links import TensorLinks
from shoal.protocol.errors import ProtocolError, Refusal
from shoal.protocol.frames import FrameHeader, FrameKind, decode_header_untrusted, encode_header
from shoal.protocol.identity import Identity, PeerId
from shoal.protocol.secure_channel import (
    PREFIX_BYTES,
    RECORD_BYTES_MAX,
    RECORD_OVERHEAD_BYTES,
    ChannelKeys,
    Handshake,
    SecureChannel,
    decode_prefix_untrusted,
)

PATIENCE_S = 60.0
SWARM = b"s" * 32
ALICE, BOB, CAROL = (Identity(seed * 32) for seed in (b"a", b"b", b"c"))
# Deadlines that no healthy test meets and no ailing one waits long for.
CONFIG = LinkConfig(host="127.0.0.1", tick_s=0.02, goodbye_timeout_s=5.0, half_open_per_host_max=32)


def on_both_loops(test: Callable[[], Awaitable[None]]) -> Callable[..., None]:
    """Run an async test on asyncio's own loop and on uvloop; it must leave no task and no file descriptor behind."""

    async def bounded() -> None:
        async with asyncio.timeout(PATIENCE_S):
            await test()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    @pytest.mark.parametrize("make_loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
    def run(make_loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
        before = open_sockets()
        problems: list[object] = []
        with asyncio.Runner(loop_factory=make_loop) as runner:
            runner.get_loop().set_exception_handler(lambda _, context: problems.append(context))
            runner.run(bounded())
        assert problems == []
        assert open_sockets() == before

    run.__name__, run.__doc__, run.__module__ = test.__name__, test.__doc__, test.__module__
    return run


def open_sockets() -> int:
    """How many sockets this process holds."""
    count = 0
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            count += os.readlink(f"/proc/self/fd/{descriptor}").startswith("socket:")
    return count


def describe(payload: bytes | memoryview, kind: FrameKind = FrameKind.CONTRIBUTION, part: int = 0) -> FrameHeader:
    """The header of a pushed payload."""
    return FrameHeader(kind=kind, round=7, part=part, nbytes=len(payload), digest=blake3(payload).digest())


@dataclass
class RecordingSink:
    """Keeps what arrives, and answers as the test says."""

    payloads: list[tuple[PeerId, FrameHeader, bytes]] = field(default_factory=list)
    reserved: list[FrameHeader] = field(default_factory=list)
    aborts: list[FrameHeader] = field(default_factory=list)
    refusals_heard: list[FrameHeader] = field(default_factory=list)
    refusals_made: list[tuple[PeerId | None, Refusal]] = field(default_factory=list)
    ups: list[PeerId] = field(default_factory=list)
    ends: list[tuple[PeerId, LinkEnd]] = field(default_factory=list)
    blobs: dict[bytes, memoryview | Refusal] = field(default_factory=dict)
    admission: Refusal | None = None
    answer: Refusal | ProtocolError | None = None
    completing: asyncio.Event | None = None
    serving: asyncio.Event | None = None
    serves: int = 0
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def until(self, condition: Callable[[], object]) -> None:
        """Wait until something that the links said makes this true."""
        while not condition():
            self._changed.clear()
            await self._changed.wait()

    def admit(self, peer: PeerId) -> Refusal | None:
        return self.admission

    def reserve(self, peer: PeerId, header: FrameHeader) -> memoryview | Refusal:
        self._changed.set()
        if isinstance(self.answer, ProtocolError):
            raise self.answer
        if self.answer is not None:
            return self.answer
        self.reserved.append(header)
        return memoryview(bytearray(header.nbytes))

    async def complete(self, peer: PeerId, header: FrameHeader, buffer: memoryview) -> None:
        if self.completing is not None:
            await self.completing.wait()
        self.payloads.append((peer, header, bytes(buffer)))
        self._changed.set()

    def aborted(self, peer: PeerId, header: FrameHeader) -> None:
        self.aborts.append(header)
        self._changed.set()

    def refused(self, peer: PeerId, header: FrameHeader) -> None:
        self.refusals_heard.append(header)
        self._changed.set()

    async def serve(self, peer: PeerId, digest: bytes) -> memoryview | Refusal | None:
        self.serves += 1
        self._changed.set()
        if self.serving is not None:
            await self.serving.wait()
        return self.blobs.get(digest)

    def link_up(self, peer: PeerId) -> None:
        self.ups.append(peer)
        self._changed.set()

    def link_lost(self, peer: PeerId, reason: LinkEnd) -> None:
        self.ends.append((peer, reason))
        self._changed.set()

    def on_refusal(self, peer: PeerId | None, refusal: Refusal) -> None:
        self.refusals_made.append((peer, refusal))
        self._changed.set()


@dataclass
class Node:
    """One peer's links with its sink."""

    identity: Identity
    sink: RecordingSink
    links: TensorLinks
    address: Address

    @property
    def peer(self) -> PeerId:
        return self.identity.peer

    @property
    def addresses(self) -> tuple[Address, ...]:
        return (self.address,)

    async def push(self, to: "Node", payload: bytes | memoryview, part: int = 0) -> None:
        await self.links.send(to.peer, to.addresses, describe(payload, part=part), memoryview(payload))


@contextlib.asynccontextmanager
async def node(
    identity: Identity, config: LinkConfig = CONFIG, *, swarm: bytes = SWARM, **changes: Any
) -> AsyncIterator[Node]:
    """A started peer; stopped at the end, whatever happened."""
    sink = RecordingSink()
    links = TensorLinks(identity, swarm, replace(config, **changes), sink)
    made = Node(identity, sink, links, await links.start())
    try:
        yield made
    finally:
        await links.stop()


@contextlib.asynccontextmanager
async def pair(**changes: Any) -> AsyncIterator[tuple[Node, Node]]:
    """Alice and Bob, both started, not yet linked."""
    async with node(ALICE, **changes) as alice, node(BOB, **changes) as bob:
        yield alice, bob


class RawPeer:
    """A peer that knows the protocol and need not keep it: frames and records are made by hand."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, channel: SecureChannel) -> None:
        self.reader = reader
        self.writer = writer
        self.channel = channel

    @classmethod
    @contextlib.asynccontextmanager
    async def dialled(cls, to: Node, identity: Identity = CAROL) -> AsyncIterator["RawPeer"]:
        reader, writer = await asyncio.open_connection(*to.address)
        try:
            handshake = Handshake(ChannelKeys(identity, b"k" * 32), SWARM, dialer=True, expected=to.peer)
            channel = None
            while channel is None:
                writer.write(handshake.take_outgoing())
                channel = handshake.receive(await reader.read(4096))
            writer.write(handshake.take_outgoing())
            await to.sink.until(lambda: identity.peer in to.sink.ups)
            yield cls(reader, writer, channel)
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    def write_record(self, kind: int, plain: bytes) -> None:
        record = bytearray(len(plain) + RECORD_OVERHEAD_BYTES)
        self.channel.sealer.seal_into(kind, plain, memoryview(record))
        self.writer.write(record)

    def write_header(self, header: FrameHeader) -> None:
        self.write_record(RecordKind.HEADER, encode_header(header))

    def write_frame(self, header: FrameHeader, payload: bytes) -> None:
        self.write_header(header)
        for at in range(0, len(payload), RECORD_BYTES_MAX):
            self.write_record(RecordKind.PAYLOAD, payload[at : at + RECORD_BYTES_MAX])

    async def read_record(self) -> tuple[int, bytes]:
        prefix = await self.reader.readexactly(PREFIX_BYTES)
        kind, nbytes = decode_prefix_untrusted(prefix)
        sealed = await self.reader.readexactly(nbytes + RECORD_OVERHEAD_BYTES - PREFIX_BYTES)
        plain = bytearray(nbytes)
        self.channel.opener.open_into(memoryview(prefix + sealed), memoryview(plain))
        return kind, bytes(plain)

    async def read_header(self, kind: FrameKind) -> FrameHeader:
        """The next header of this kind; payload and other headers are skipped."""
        while True:
            record_kind, plain = await self.read_record()
            if record_kind == RecordKind.HEADER and (header := decode_header_untrusted(plain)).kind is kind:
                return header


class Proxy:
    """A TCP proxy in front of a peer that can alter, hold back or cut what the dialer sends."""

    def __init__(self, target: Address) -> None:
        self.target = target
        self.flip_at: int | None = None
        self.forwarded_bytes = 0
        self.flowing = asyncio.Event()
        self.flowing.set()
        self._tasks: list[asyncio.Task[None]] = []
        self._writers: list[asyncio.StreamWriter] = []

    @classmethod
    @contextlib.asynccontextmanager
    async def before(cls, target: Address) -> AsyncIterator[tuple["Proxy", Address]]:
        proxy = cls(target)
        server = await asyncio.start_server(proxy._accept, "127.0.0.1", 0)
        try:
            yield proxy, server.sockets[0].getsockname()
        finally:
            server.close()
            proxy.cut()
            await asyncio.gather(*proxy._tasks, return_exceptions=True)
            for writer in proxy._writers:
                with contextlib.suppress(OSError):
                    await writer.wait_closed()
            await server.wait_closed()

    def cut(self) -> None:
        """Reset every connection."""
        for task in self._tasks:
            task.cancel()
        for writer in self._writers:
            writer.transport.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(*self.target)
        self._writers += [writer, far_writer]
        loop = asyncio.get_running_loop()
        self._tasks.append(loop.create_task(self._pump(reader, far_writer, altered=True)))
        self._tasks.append(loop.create_task(self._pump(far_reader, writer, altered=False)))

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, altered: bool) -> None:
        with contextlib.suppress(OSError):
            while data := bytearray(await reader.read(65536)):
                await self.flowing.wait()
                if altered:
                    at = None if self.flip_at is None else self.flip_at - self.forwarded_bytes
                    if at is not None and 0 <= at < len(data):
                        data[at] ^= 0x10
                    self.forwarded_bytes += len(data)
                writer.write(bytes(data))
                await writer.drain()
            writer.write_eof()


async def lost_reason(work: Awaitable[None]) -> tuple[LinkEnd, Refusal | None]:
    """Why a send or a fetch lost its link."""
    with pytest.raises(LinkLost) as caught:
        await work
    return caught.value.reason, caught.value.refusal
