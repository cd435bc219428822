"""A DHT of many nodes on this machine: look-up success and latency, quiet and after a share of the nodes has gone.

    python -m benchmarks.dht [--nodes 100] [--keys 100] [--finds 60] [--churn 0,0.2,0.5] [--json FILE] [--no-hivemind]

Nodes are production libp2p hosts on loopback, spread over processes. Each dials three earlier ones and looks for its
own neighbourhood. Each key is provided by one node; then, for each share, so many of the nodes stop at once, and a
look-up from a node that is left succeeds when it names the provider of a key, whether that one lives or not. Nobody
announces again meanwhile. Look-ups run one after the other in each process. The shares are of all nodes and add up:
those of 0.2 are gone in 0.5.

hivemind's DHT is measured after it in the same way (benchmarks/dht_hivemind.py), in a venv that is made for it under
build/bench; where that cannot be had, the reason is printed instead.
"""

import argparse
import hashlib
import json
import random
import statistics
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.connections import processes
from benchmarks.hivemind_venv import run_in_hivemind
from benchmarks.libp2p_hosts import HostProcess

PROCESSES = 4
CONNECTIONS_MAX = 200
BOOTSTRAPS = 3
# Not every four seconds, as in life: so many nodes that know each other on so few cores would do little else.
PING_PERIOD_S = 120.0
SEED = 1


def summarise(outcomes: list[tuple[bool, float]]) -> dict[str, float]:
    """Success and latencies."""
    times = sorted(seconds for _, seconds in outcomes)
    return {
        "count": len(outcomes),
        "success": sum(done for done, _ in outcomes) / len(outcomes),
        "median_s": statistics.median(times),
        "p95_s": times[min(len(times) - 1, int(len(times) * 0.95))],
    }


class Dht:
    """The nodes of one run."""

    def __init__(self, workers: list[HostProcess], nodes: int) -> None:
        self._workers = workers
        self.alive = list(range(1, nodes + 1))
        self._chance = random.Random(SEED)

    def worker_of(self, number: int) -> HostProcess:
        return self._workers[number % len(self._workers)]

    def start(self) -> float:
        """Start and join all nodes; seconds."""
        began = time.perf_counter()
        addresses: dict[int, str] = {}
        for worker in self._workers:
            own = [number for number in self.alive if self.worker_of(number) is worker]
            addresses |= worker.call("start", own, CONNECTIONS_MAX, PING_PERIOD_S)
        for number in self.alive[1:]:
            known = self._chance.sample(range(1, number), min(BOOTSTRAPS, number - 1))
            self.worker_of(number).call("connect", number, [addresses[one] for one in known])
        self.each([("join", number) for number in self.alive])
        return time.perf_counter() - began

    def each(self, calls: list[tuple[Any, ...]]) -> list[Any]:
        """Make these calls, those of one process one after the other; the second item of each is the node."""
        results: list[Any] = [None] * len(calls)

        def run(worker: HostProcess) -> None:
            for place, (name, number, *args) in enumerate(calls):
                if self.worker_of(number) is worker:
                    results[place] = worker.call(name, number, *args)

        with ThreadPoolExecutor() as pool:
            list(pool.map(run, self._workers))
        return results

    def stop_until_left(self, count: int) -> None:
        """Stop random nodes until so many are left."""
        going = self._chance.sample(self.alive, len(self.alive) - count)
        self.alive = [number for number in self.alive if number not in going]
        for worker in self._workers:
            worker.call("stop", [number for number in going if self.worker_of(number) is worker])

    def choose(self, count: int) -> list[int]:
        """Random living nodes."""
        return self._chance.choices(self.alive, k=count)

    def choose_other(self, than: int) -> int:
        """A random living node; it does not look for itself."""
        return self._chance.choice([number for number in self.alive if number != than])


def run(nodes: int, keys: int, finds: int, churns: list[float]) -> dict[str, Any]:
    """The figures of our DHT."""
    with processes(PROCESSES) as workers:
        dht = Dht(workers, nodes)
        figures: dict[str, Any] = {"joined_s": dht.start()}
        print(f"all joined in {figures['joined_s']:.0f} s", flush=True)
        digests = [b"\x12\x20" + hashlib.sha256(b"%d" % number).digest() for number in range(keys)]
        providers = dht.choose(keys)
        pairs = list(zip(digests, providers, strict=True))
        figures["provide"] = summarise(dht.each([("provide", provider, key) for key, provider in pairs]))
        for churn in churns:
            dht.stop_until_left(round(nodes * (1 - churn)))
            sought = random.Random(SEED).choices(pairs, k=finds)
            calls = [("find", dht.choose_other(than=provider), key, provider) for key, provider in sought]
            figures[f"find after {churn:.0%} gone"] = summarise(dht.each(calls))
    return figures


def run_hivemind(nodes: int, keys: int, finds: int, churns: list[float]) -> dict[str, Any] | str:
    """hivemind's figures, or why there are none."""
    try:
        figures: dict[str, Any] = run_in_hivemind("dht_hivemind.py", nodes, keys, finds, *churns)
    except (subprocess.SubprocessError, OSError) as error:
        return f"hivemind was not measured: {error}"
    return figures


def show(name: str, figures: dict[str, Any] | str) -> None:
    """Print one side's figures."""
    if isinstance(figures, str):
        print(figures)
        return
    print(f"{name}: all joined in {figures['joined_s']:.1f} s")
    for what, row in figures.items():
        if isinstance(row, dict):
            print(
                f"  {what:24} {row['success']:7.1%} of {row['count']:4}   "
                f"median {row['median_s'] * 1000:7.0f} ms   95 % {row['p95_s'] * 1000:7.0f} ms"
            )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--nodes", type=int, default=100)
    parser.add_argument("--keys", type=int, default=100)
    parser.add_argument("--finds", type=int, default=60)
    parser.add_argument("--churn", default="0,0.2,0.5")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--no-hivemind", action="store_true")
    arguments = parser.parse_args()
    churns = [float(text) for text in arguments.churn.split(",")]
    shape = (arguments.nodes, arguments.keys, arguments.finds, churns)
    figures: dict[str, Any] = {"shoal": run(*shape)}
    show("shoal", figures["shoal"])
    if not arguments.no_hivemind:
        figures["hivemind"] = run_hivemind(*shape)
        show("hivemind", figures["hivemind"])
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
