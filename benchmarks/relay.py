"""What a relay costs: `shoal relay` as its own process, and peers in this one that are reached through it.

    python -m benchmarks.relay --peers 40 [--json FILE]

Half of the peers connect to the other half through the relay. Printed: the relay's memory before and after and its CPU
time while nothing is asked, the time of a small request through it, and how fast one large request after another goes.
Every peer shares this machine with the relay.
"""

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import psutil

from shoal.dht.addresses import parse_address
from shoal.node.bench.commands import describe_machine
from shoal.node.control import FRAME_BYTES_MAX, ControlConfig, ControlHandlers
from shoal.node.libp2p_host import Libp2pHost
from shoal.node.reachability import ReachState
from shoal.protocol.identity import Identity, PeerId

SWARM = bytes(range(32))
REQUESTS = 50
IDLE_S = 20.0


async def answer(peer: PeerId, question: bytes) -> bytes:
    return question


def make_host(number: int, relay: str) -> Libp2pHost:
    config = ControlConfig(
        identity=Identity(number.to_bytes(32, "big")),
        swarm=SWARM,
        listen=("/ip4/127.0.0.1/tcp/0",),
        bootstrap=(relay,),
        reachability=ReachState.PRIVATE,
    )

    def ignore(*_: object) -> None:
        return

    handlers = ControlHandlers(
        on_message=ignore, on_request=answer, on_presence=ignore, on_peer_connected=ignore, on_peer_lost=ignore
    )
    return Libp2pHost(config, handlers)


def list_circuits(host: Libp2pHost) -> list[str]:
    return [text for text in host.addresses() if parse_address(text).is_relayed]


async def measure(peers: int, folder: Path) -> dict[str, object]:
    command = (sys.executable, "-m", "shoal.node", "relay", "--data-dir", str(folder), "--control-host", "127.0.0.1")
    config = folder / "relay.toml"
    config.write_text("[control]\nconnections_max = 600\nrelay_reservations_max = 250\n")
    ports = ("--control-port", "0", "--web-port", "0", "--config", str(config))
    process = await asyncio.create_subprocess_exec(*command, *ports, stdout=asyncio.subprocess.PIPE)
    hosts: list[Libp2pHost] = []
    try:
        assert process.stdout is not None
        address = ""
        while not address.startswith("/"):
            address = (await process.stdout.readline()).decode().strip()
        relay = psutil.Process(process.pid)
        before = relay.memory_info().rss
        hosts = [make_host(number, address) for number in range(1, peers + 1)]
        for host in hosts:
            await host.start()
            while not list_circuits(host):
                await asyncio.sleep(0.05)
        half = len(hosts) // 2
        pairs = list(zip(hosts[:half], hosts[half:], strict=False))
        dialled_s = []
        for one, other in pairs:
            began_s = time.perf_counter()
            target = await one.connect(list_circuits(other))
            dialled_s.append(time.perf_counter() - began_s)
        cpu_s = sum(relay.cpu_times()[:2])
        await asyncio.sleep(IDLE_S)
        idle = (sum(relay.cpu_times()[:2]) - cpu_s) / IDLE_S
        one, _ = pairs[-1]
        small_s = []
        for _ in range(REQUESTS):
            began_s = time.perf_counter()
            await one.request(target, b"there?")
            small_s.append(time.perf_counter() - began_s)
        large = bytes(FRAME_BYTES_MAX - 64)
        began_s = time.perf_counter()
        for _ in range(REQUESTS // 5):
            await one.request(target, large)
        moved = 2 * len(large) * (REQUESTS // 5) / (time.perf_counter() - began_s)
        return {
            "peers": peers,
            "circuits": len(pairs),
            "rss_before_mib": round(before / 2**20, 1),
            "rss_after_mib": round(relay.memory_info().rss / 2**20, 1),
            "idle_cpu_percent": round(100 * idle, 1),
            "dial_median_ms": round(1e3 * statistics.median(dialled_s), 1),
            "request_median_ms": round(1e3 * statistics.median(small_s), 1),
            "one_after_another_mb_s": round(moved / 1e6, 2),
        }
    finally:
        await asyncio.gather(*(host.stop() for host in hosts))
        process.terminate()
        await process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", type=int, default=40)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = asyncio.run(measure(options.peers, Path(folder)))
    print(json.dumps(figures))
    if options.json:
        options.json.write_text(json.dumps({**describe_machine(), **figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
