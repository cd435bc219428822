"""`shoal bench links`: throughput, latency and CPU share of tensor links between two processes on loopback.

One process sends frames of one size over one link, one or two at a time; the other one reserves a buffer per frame, so
that decryption writes where a reduction would read. MB = 10^6 bytes. What one core could carry is given per CPU second,
system time included: on a busy machine trust that figure alone.
"""

import asyncio
import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection

from blake3 import blake3

from shoal.node.link_port import LinkConfig, LinkEnd
from shoal.node.links import TensorLinks
from shoal.node.process import loop_factory
from shoal.protocol.errors import Refusal
from shoal.protocol.frames import FrameHeader, FrameKind
from shoal.protocol.identity import Identity, PeerId

SWARM = bytes(32)
CONFIG = LinkConfig(host="127.0.0.1")
SENDER, RECEIVER = Identity(b"s" * 32), Identity(b"r" * 32)
FRAME_BYTES = (64 * 1024, 1024 * 1024, 8 * 1024 * 1024)


class Sink:
    """Reserves one of a few buffers and counts what is complete."""

    def __init__(self) -> None:
        self.payload_bytes = 0
        self.done = asyncio.Event()
        self.expected_bytes = 0
        self._free = [memoryview(bytearray(FRAME_BYTES[-1])) for _ in range(8)]
        self._used: list[memoryview] = []
        self.blob = memoryview(b"")

    def admit(self, peer: PeerId) -> Refusal | None:
        return None

    def reserve(self, peer: PeerId, header: FrameHeader) -> memoryview | Refusal:
        self._used.append(self._free.pop())
        return self._used[-1][: header.nbytes]

    async def complete(self, peer: PeerId, header: FrameHeader, buffer: memoryview) -> None:
        self._free.append(self._used.pop(0))  # which one does not matter: nobody reads them
        self.payload_bytes += header.nbytes
        if self.payload_bytes >= self.expected_bytes:
            self.done.set()

    def aborted(self, peer: PeerId, header: FrameHeader) -> None:
        raise SystemExit("a payload was aborted")

    def refused(self, peer: PeerId, header: FrameHeader) -> None:
        raise SystemExit(f"a frame was refused: {header.refusal}")

    async def serve(self, peer: PeerId, digest: bytes) -> memoryview | Refusal | None:
        return self.blob

    def link_up(self, peer: PeerId) -> None:
        pass

    def link_lost(self, peer: PeerId, reason: LinkEnd) -> None:
        pass

    def on_refusal(self, peer: PeerId | None, refusal: Refusal) -> None:
        raise SystemExit(f"refused: {refusal}")


@dataclass(frozen=True, slots=True)
class Usage:
    """CPU seconds and wall time of this process at one moment."""

    cpu_s: float
    wall_s: float

    @classmethod
    def now(cls) -> "Usage":
        used = resource.getrusage(resource.RUSAGE_SELF)
        return cls(used.ru_utime + used.ru_stime, time.perf_counter())

    def share_since(self, earlier: "Usage") -> float:
        """CPU seconds per second."""
        return (self.cpu_s - earlier.cpu_s) / (self.wall_s - earlier.wall_s)


async def receive(pipe: Connection) -> None:
    """The other process: expect what the pipe announces, answer with the CPU share."""
    sink = Sink()
    sink.blob = memoryview(bytes(64))
    links = TensorLinks(RECEIVER, SWARM, CONFIG, sink)
    address = await links.start()
    pipe.send(address)
    await count_arrivals(pipe, sink)
    await links.stop()


async def count_arrivals(pipe: Connection, sink: Sink) -> None:
    """Wait for as many bytes as the pipe announces, answer with the CPU share, until it announces None."""
    loop = asyncio.get_running_loop()
    while (expected := await loop.run_in_executor(None, pipe.recv)) is not None:
        sink.payload_bytes, sink.expected_bytes = 0, expected
        sink.done.clear()
        began = Usage.now()
        pipe.send("ready")
        await sink.done.wait()
        pipe.send(Usage.now().share_since(began))


def run_receiver(pipe: Connection) -> None:
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(receive(pipe))


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkRates:
    """Medians. Rates in MB (10^6 bytes) a second of wall time, and of a CPU second of either process."""

    frame_bytes: int
    in_flight: int
    rate: float
    rate_min: float
    rate_max: float
    sender_per_cpu_s: float
    receiver_per_cpu_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkFigures:
    """`connect_ms`: connection, handshake and a first small blob; `fetch_ms`: the same blob once it is open."""

    connect_ms: float
    fetch_ms: float
    rates: tuple[LinkRates, ...]


def measure_links(megabytes: int, repeats: int, say: Callable[[str], None]) -> LinkFigures:
    """`megabytes` a run. The other process ends with this call."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    receiver = context.Process(target=run_receiver, args=(there,), daemon=True)
    receiver.start()
    try:
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            return runner.run(_measure(here, megabytes, repeats, say))
    finally:
        here.close()
        receiver.join()


async def _measure(pipe: Connection, megabytes: int, repeats: int, say: Callable[[str], None]) -> LinkFigures:
    loop = asyncio.get_running_loop()
    address = await loop.run_in_executor(None, pipe.recv)
    say("connections")
    connect_ms, fetch_ms = await _measure_connect(address, max(repeats, 20))
    links = TensorLinks(SENDER, SWARM, CONFIG, Sink())
    await links.start()
    rates = []
    for frame_bytes in FRAME_BYTES:
        for in_flight in (1, 2):
            say(f"frames of {frame_bytes >> 10} KiB, {in_flight} at a time")
            frames = max(1, megabytes * 1_000_000 // frame_bytes)
            runs = [await transfer(pipe, links, address, frame_bytes, frames, in_flight) for _ in range(repeats + 1)]
            walls, sender, receiver = zip(*runs[1:], strict=True)
            rates.append(
                LinkRates(
                    frame_bytes=frame_bytes,
                    in_flight=in_flight,
                    rate=statistics.median(walls) / 1e6,
                    rate_min=min(walls) / 1e6,
                    rate_max=max(walls) / 1e6,
                    sender_per_cpu_s=per_cpu_s(walls, sender),
                    receiver_per_cpu_s=per_cpu_s(walls, receiver),
                )
            )
    await links.stop()
    await loop.run_in_executor(None, pipe.send, None)
    return LinkFigures(connect_ms=connect_ms, fetch_ms=fetch_ms, rates=tuple(rates))


async def _measure_connect(address: tuple[str, int], repeats: int) -> tuple[float, float]:
    """Milliseconds from nothing to the first small blob, and for the same blob on the open link."""
    connects, fetches = [], []
    blob = bytes(64)
    digest, into = blake3(blob).digest(), memoryview(bytearray(64))
    for _ in range(repeats):
        links = TensorLinks(SENDER, SWARM, CONFIG, Sink())
        await links.start()
        began_s = time.perf_counter()
        await links.fetch(RECEIVER.peer, (address,), digest, into, 5.0)
        middle_s = time.perf_counter()
        await links.fetch(RECEIVER.peer, (address,), digest, into, 5.0)
        connects.append(middle_s - began_s)
        fetches.append(time.perf_counter() - middle_s)
        await links.stop()
    return 1e3 * statistics.median(connects), 1e3 * statistics.median(fetches)


async def transfer(
    pipe: Connection, links: TensorLinks, address: tuple[str, int], frame_bytes: int, frames: int, in_flight: int
) -> tuple[float, float, float]:
    """Bytes per second, sender's and receiver's CPU share."""
    payload = memoryview(os.urandom(frame_bytes))
    header = FrameHeader(kind=FrameKind.CONTRIBUTION, nbytes=frame_bytes, digest=blake3(payload).digest())
    left = frames
    loop = asyncio.get_running_loop()
    pipe.send(frames * frame_bytes)
    await loop.run_in_executor(None, pipe.recv)
    began = Usage.now()

    async def push() -> None:
        nonlocal left
        while left:
            left -= 1
            await links.send(RECEIVER.peer, (address,), header, payload)

    await asyncio.gather(*(push() for _ in range(in_flight)))
    receiver_cpu = await loop.run_in_executor(None, pipe.recv)
    ended = Usage.now()
    return frames * frame_bytes / (ended.wall_s - began.wall_s), ended.share_since(began), receiver_cpu


def per_cpu_s(rates: tuple[float, ...], shares: tuple[float, ...]) -> int:
    """Megabytes per CPU second, the median of the runs."""
    return round(statistics.median(rate / share / 1e6 for rate, share in zip(rates, shares, strict=True)))
