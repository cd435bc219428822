"""What it costs a member to pass on a tensor link between two others: three processes on loopback.

    python -m benchmarks.tensor_relay [--megabytes N] [--repeats N] [--json FILE]

Frames of 1 MiB and 8 MiB, two in flight, first over a direct link and then through the relaying member; all three
share the machine's cores, so on a busy machine trust what the relaying member moves in a CPU second alone, system time
included. MB = 10^6 bytes.
"""

import argparse
import asyncio
import json
import multiprocessing
import socket
import statistics
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import uvloop

from shoal.node.bench.commands import describe_machine
from shoal.node.bench.links import (
    CONFIG,
    RECEIVER,
    SENDER,
    SWARM,
    Sink,
    Usage,
    count_arrivals,
    per_cpu_s,
    run_receiver,
    transfer,
)
from shoal.node.config import TensorTable
from shoal.node.link_port import LinkPath
from shoal.node.links import TensorLinks
from shoal.node.splice import MAGIC
from shoal.node.tensor_relay import RelayPorts, TensorRelay
from shoal.protocol.identity import Identity, PeerId
from shoal.protocol.messages import AskRelay, RelayCall, RelayTicket, decode_message_untrusted, encode_message

RELAY = Identity(b"m" * 32)
FRAME_BYTES = (1024 * 1024, 8 * 1024 * 1024)
UNBOUNDED = TensorTable(relay_mib_per_hour=1 << 24, relay_peer_mib_per_hour=1 << 24)


class _Agreeing:
    """A control plane on which everybody who is called agrees; the tokens are kept."""

    token = b""

    async def request(self, peer: PeerId, payload: bytes, timeout_s: float) -> bytes:
        call = decode_message_untrusted(SWARM, payload)
        assert isinstance(call, RelayCall)
        self.token = call.token
        return encode_message(SWARM, RelayTicket(token=call.token))


async def relay(pipe: Connection) -> None:
    """The process in the middle: tell both tokens, then the CPU share from one word to the next."""
    links, control = TensorLinks(RELAY, SWARM, CONFIG, Sink()), _Agreeing()
    anybody: Any = control
    ports = RelayPorts(refusal=lambda peer: None, reached=lambda: True, now=time.monotonic)
    made = TensorRelay(RELAY.peer, SWARM, UNBOUNDED, anybody, links, ports)
    links.relay = made
    address = await links.start()
    ticket = await made.take_ask(SENDER.peer, AskRelay(peer=RECEIVER.peer))
    pipe.send((address, ticket.token, control.token))
    loop, began = asyncio.get_running_loop(), Usage.now()
    while await loop.run_in_executor(None, pipe.recv):
        pipe.send(Usage.now().share_since(began))
        began = Usage.now()
    await links.stop()


def run_relay(pipe: Connection) -> None:
    uvloop.run(relay(pipe))


async def join(links: TensorLinks, peer: PeerId, address: tuple[str, int], token: bytes, *, dialer: bool) -> None:
    """One end's connection to the relaying member."""
    connection = socket.create_connection(address)
    connection.sendall(MAGIC + token)
    connection.setblocking(False)
    await links.adopt(connection, peer, dialer=dialer, path=LinkPath.RELAYED)


async def receive(pipe: Connection, address: tuple[str, int], token: bytes) -> None:
    """The far end: as in shoal.node.bench.links, over a relayed link."""
    sink = Sink()
    links = TensorLinks(RECEIVER, SWARM, CONFIG, sink)
    await links.start()
    await join(links, SENDER.peer, address, token, dialer=False)
    pipe.send(None)
    await count_arrivals(pipe, sink)
    await links.stop()


def run_far_end(pipe: Connection, address: tuple[str, int], token: bytes) -> None:
    uvloop.run(receive(pipe, address, token))


async def measure(megabytes: int, repeats: int) -> dict[str, object]:
    context, loop = multiprocessing.get_context("spawn"), asyncio.get_running_loop()
    results: dict[str, object] = {}
    for way in ("direct", "relayed"):
        far, far_end = context.Pipe()
        links, middle = TensorLinks(SENDER, SWARM, CONFIG, Sink()), None
        await links.start()
        if way == "direct":
            process = context.Process(target=run_receiver, args=(far_end,), daemon=True)
            process.start()
            address = await loop.run_in_executor(None, far.recv)
        else:
            middle, middle_end = context.Pipe()
            context.Process(target=run_relay, args=(middle_end,), daemon=True).start()
            address, token, far_token = await loop.run_in_executor(None, middle.recv)
            process = context.Process(target=run_far_end, args=(far_end, address, far_token), daemon=True)
            process.start()
            await join(links, RECEIVER.peer, address, token, dialer=True)
            await loop.run_in_executor(None, far.recv)
        for frame_bytes in FRAME_BYTES:
            frames = max(1, megabytes * 1_000_000 // frame_bytes)
            rates, shares = [], []
            for number in range(repeats + 1):
                if middle is not None:
                    await loop.run_in_executor(None, _ask, middle)
                rate, _, _ = await transfer(far, links, address, frame_bytes, frames, 2)
                share = await loop.run_in_executor(None, _ask, middle) if middle is not None else 0.0
                if number:  # the first one warms up
                    rates.append(rate)
                    shares.append(share)
            found: dict[str, object] = {"megabytes_per_s": [round(rate / 1e6) for rate in sorted(rates)]}
            if middle is not None:
                found["relay_cpu_percent"] = round(100 * statistics.median(shares))
                found["relay_megabytes_per_cpu_s"] = per_cpu_s(tuple(rates), tuple(shares))
            results[f"{way}, {frame_bytes // 1024} KiB"] = found
        await links.stop()
        far.send(None)
        if middle is not None:
            middle.send(False)
        await loop.run_in_executor(None, process.join)
    return results


def _ask(pipe: Connection) -> float:
    pipe.send(True)
    share = pipe.recv()
    assert isinstance(share, float)
    return share


def main() -> None:
    parser = argparse.ArgumentParser(description="a tensor link that a third process passes on")
    parser.add_argument("--megabytes", type=int, default=1000, help="per run (default 1000)")
    parser.add_argument("--repeats", type=int, default=5, help="measured runs per case (default 5)")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    figures = uvloop.run(measure(arguments.megabytes, arguments.repeats))
    print(json.dumps(figures, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps({**describe_machine(), **figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
