"""Throughput, latency and CPU share of tensor links between two processes on loopback.

    python benchmarks/tensor_links.py [--megabytes N] [--repeats N] [--json FILE]

One process sends frames of one size over one link, each awaited before the next (`in flight 1`) or two at a time; the
other one reserves a buffer per frame, so that decryption writes where a reduction would read. MB = 10^6 bytes. What one
core could carry is given per CPU second, system time included: on a busy machine trust that figure alone.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import resource
import statistics
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection

import uvloop
from blake3 import blake3

from shoal.node.link_port import LinkConfig, LinkEnd
from shoal.node.links import TensorLinks
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
        self._free = [bytearray(8 * 1024 * 1024) for _ in range(8)]
        self.blob = memoryview(b"")

    def admit(self, peer: PeerId) -> Refusal | None:
        return None

    def reserve(self, peer: PeerId, header: FrameHeader) -> memoryview | Refusal:
        return memoryview(self._free.pop())[: header.nbytes]

    async def complete(self, peer: PeerId, header: FrameHeader, buffer: memoryview) -> None:
        self._free.append(buffer.obj)
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
    uvloop.run(receive(pipe))


async def measure_connect(address: tuple[str, int], repeats: int) -> dict[str, float]:
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
    return {
        "connect_and_fetch_ms": statistics.median(connects) * 1e3,
        "fetch_64_bytes_ms": statistics.median(fetches) * 1e3,
    }


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


async def measure(pipe: Connection, megabytes: int, repeats: int) -> dict[str, object]:
    loop = asyncio.get_running_loop()
    address = await loop.run_in_executor(None, pipe.recv)
    results: dict[str, object] = dict(await measure_connect(address, max(repeats, 20)))
    links = TensorLinks(SENDER, SWARM, CONFIG, Sink())
    await links.start()
    for frame_bytes in FRAME_BYTES:
        frames = max(1, megabytes * 1_000_000 // frame_bytes)
        for in_flight in (1, 2):
            runs = [await transfer(pipe, links, address, frame_bytes, frames, in_flight) for _ in range(repeats + 1)]
            rates, sender_cpu, receiver_cpu = zip(*runs[1:], strict=True)
            results[f"{frame_bytes // 1024} KiB, in flight {in_flight}"] = {
                "megabytes_per_s": [round(rate / 1e6) for rate in sorted(rates)],
                "sender_cpu_percent": round(100 * statistics.median(sender_cpu)),
                "receiver_cpu_percent": round(100 * statistics.median(receiver_cpu)),
                "sender_megabytes_per_cpu_s": per_cpu_s(rates, sender_cpu),
                "receiver_megabytes_per_cpu_s": per_cpu_s(rates, receiver_cpu),
            }
    await links.stop()
    await loop.run_in_executor(None, pipe.send, None)
    return results


def per_cpu_s(rates: tuple[float, ...], shares: tuple[float, ...]) -> int:
    """Megabytes per CPU second, the median of the runs."""
    return round(statistics.median(rate / share / 1e6 for rate, share in zip(rates, shares, strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description="tensor links between two processes on loopback")
    parser.add_argument("--megabytes", type=int, default=1000, help="per run (default 1000)")
    parser.add_argument("--repeats", type=int, default=5, help="measured runs per case (default 5)")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    receiver = context.Process(target=run_receiver, args=(there,), daemon=True)
    receiver.start()
    results = uvloop.run(measure(here, arguments.megabytes, arguments.repeats))
    receiver.join()
    print(json.dumps(results, indent=2))
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=2)


if __name__ == "__main__":
    main()
