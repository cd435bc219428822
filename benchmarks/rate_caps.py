"""How well the caps on a machine's line hold: payloads from one peer to others, and from others to one.

    python -m benchmarks.rate_caps [--mbit N …] [--peers N] [--seconds N] [--json FILE]

Real tensor links on loopback, all peers in this process; each row is one run with as many payloads under way as there
are peers. The rate is what TCP and IP make of the records that arrived, over the time after the first second.
"""

import argparse
import asyncio
import contextlib
import json
import os
import time
from pathlib import Path

import uvloop

from shoal.node.pacer import BYTES_PER_MBIT, WIRE_SHARE
from shoal.node.rate_caps import Caps
from shoal.protocol.identity import Identity
from tests.unit.node.link_harness import Node, describe, node

PAYLOAD_BYTES = 4 * 1024 * 1024
WARM_UP_S = 1.0


async def send_for(seconds: float, sender: Node, receiver: Node) -> None:
    """One payload after the other until the time is over."""
    payload = os.urandom(PAYLOAD_BYTES)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while True:
                await sender.links.send(receiver.peer, (receiver.address,), describe(payload), memoryview(payload))


async def measure(mbit: float, peers: int, seconds: float, *, upload: bool) -> float:
    """Mbit/s on the line of the capped peer."""
    async with contextlib.AsyncExitStack() as stack:
        one, *others = [
            await stack.enter_async_context(node(Identity(bytes([number + 1]) * 32), tick_s=0.5))
            for number in range(peers + 1)
        ]
        one.links.set_caps(Caps(upload_mbit=mbit) if upload else Caps(download_mbit=mbit))
        pairs = [(one, other) if upload else (other, one) for other in others]

        receivers = {receiver.peer: receiver for _, receiver in pairs}.values()

        def moved() -> int:
            # What has been opened, payloads under way included.
            statistics = [receiver.links.statistics() for receiver in receivers]
            return sum(traffic.payload_bytes_in for one in statistics for traffic in one.peers)

        sending = [asyncio.create_task(send_for(seconds, *pair)) for pair in pairs]
        await asyncio.sleep(WARM_UP_S)
        before, began_s = moved(), time.monotonic()
        await asyncio.sleep(seconds - WARM_UP_S - 0.5)
        rate = (moved() - before) / (time.monotonic() - began_s)
        await asyncio.gather(*sending)
    return rate * WIRE_SHARE / BYTES_PER_MBIT


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--mbit", type=float, nargs="+", default=[2.0, 20.0, 200.0])
    parser.add_argument("--peers", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=21.5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    for mbit in options.mbit:
        for upload in (True, False):
            work = measure(mbit, options.peers, options.seconds, upload=upload)
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                rate = runner.run(work)
            rows.append({"way": "upload" if upload else "download", "cap_mbit": mbit, "mbit": round(rate, 2)})
            print(f"{rows[-1]['way']:9} capped at {mbit:6g} Mbit/s: {rate:8.2f}, {100 * (rate / mbit - 1):+.1f} %")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
