"""What connections cost one node that does nothing else: memory and processor time.

    python -m benchmarks.connections [--count 200] [--seconds 30] [--json FILE]

The node is a production libp2p host in a process of its own; the others are hosts in two further processes, and dial
it. Whoever has heard nothing for four seconds pings. Memory is the resident set, CPU the share of one core over
`--seconds`.
"""

import argparse
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import psutil

from benchmarks.libp2p_hosts import HostProcess

CLIENT_PROCESSES = 2
SETTLE_S = 10.0


@contextmanager
def processes(count: int) -> Iterator[list[HostProcess]]:
    """Host processes that end with the block."""
    made = [HostProcess() for _ in range(count)]
    try:
        yield made
    finally:
        for one in made:
            one.end()


def measure(process: psutil.Process, seconds: float) -> tuple[float, float]:
    """Resident MB, and the share of a core that is used over these seconds."""
    before = process.cpu_times()
    began = time.perf_counter()
    time.sleep(seconds)
    after = process.cpu_times()
    used = after.user + after.system - before.user - before.system
    return process.memory_info().rss / 1e6, used / (time.perf_counter() - began)


def run(count: int, seconds: float) -> dict[str, float]:
    """The figures by name."""
    with processes(1 + CLIENT_PROCESSES) as (node, *clients):
        (address,) = node.call("start", [0], count * 2).values()
        probe = psutil.Process(node.pid)
        time.sleep(SETTLE_S)
        alone_mb, alone_cpu = measure(probe, seconds)

        def join(number: int) -> None:
            one, share = clients[number], list(range(1 + number, 1 + count, CLIENT_PROCESSES))
            one.call("start", share, 16)
            for host in share:
                one.call("connect", host, [address])

        began = time.perf_counter()
        with ThreadPoolExecutor() as pool:
            list(pool.map(join, range(CLIENT_PROCESSES)))
        joined_s = time.perf_counter() - began
        time.sleep(SETTLE_S)
        connected = node.call("count_connections", 0)
        full_mb, full_cpu = measure(probe, seconds)
    return {
        "connections": connected,
        "joined_s": joined_s,
        "alone_mb": alone_mb,
        "alone_cpu": alone_cpu,
        "connected_mb": full_mb,
        "connected_cpu": full_cpu,
        "mb_per_connection": (full_mb - alone_mb) / max(1, connected),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    figures = run(arguments.count, arguments.seconds)
    for name, value in figures.items():
        print(f"{name:20} {value:10.3f}")
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(figures, file, indent=2)


if __name__ == "__main__":
    main()
