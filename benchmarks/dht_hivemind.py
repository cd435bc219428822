"""hivemind's side of benchmarks.dht: runs in a venv of its own and prints one line of JSON. Not part of our packages.

Each node is what hivemind.DHT starts: a process of Python and one of its Go daemon. A key is stored by one node and
found by another; success is the stored value. As in benchmarks.dht, look-ups run one after the other in each of four
lanes.
"""

import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import hivemind
from hivemind.utils.timed_storage import get_dht_time

LANES = 4
BOOTSTRAPS = 3
SEED = 1
STARTUP_TIMEOUT_S = 120
LIFE_S = 3600
LOOPBACK = "/ip4/127.0.0.1/tcp/0"

Pair = tuple[Any, str]  # a node and a key; hivemind's classes are unknown where it is not installed
Outcome = tuple[bool, float]  # whether it succeeded, and its seconds


def summarise(outcomes: Sequence[Outcome]) -> dict[str, float]:
    times = sorted(seconds for _, seconds in outcomes)
    return {
        "count": len(outcomes),
        "success": sum(done for done, _ in outcomes) / len(outcomes),
        "median_s": statistics.median(times),
        "p95_s": times[min(len(times) - 1, int(len(times) * 0.95))],
    }


def each(function: Callable[[Any, str], object], pairs: Sequence[Pair]) -> list[Outcome]:
    """Call the function with each (node, ...) of `pairs`, a lane of them at a time."""
    results: dict[int, Outcome] = {}

    def run(lane: int) -> None:
        for place in range(lane, len(pairs), LANES):
            began = time.perf_counter()
            results[place] = (bool(function(*pairs[place])), time.perf_counter() - began)

    with ThreadPoolExecutor(LANES) as pool:
        list(pool.map(run, range(LANES)))
    return [results[place] for place in range(len(pairs))]


def start(count: int, chance: random.Random) -> list[Any]:
    nodes: list[Any] = []
    for number in range(count):
        known = chance.sample(nodes, min(BOOTSTRAPS, number))
        nodes.append(
            hivemind.DHT(
                initial_peers=[str(address) for node in known for address in node.get_visible_maddrs()],
                host_maddrs=[LOOPBACK],
                startup_timeout=STARTUP_TIMEOUT_S,
                start=True,
            )
        )
    return nodes


def main() -> None:
    nodes_count, keys, finds = (int(text) for text in sys.argv[1:4])
    churns = [float(text) for text in sys.argv[4:]]
    chance = random.Random(SEED)
    began = time.perf_counter()
    alive = start(nodes_count, chance)
    figures: dict[str, object] = {"joined_s": time.perf_counter() - began}
    names = [f"key {number}" for number in range(keys)]
    pairs = [(chance.choice(alive), name) for name in names]
    end = get_dht_time() + LIFE_S
    figures["provide"] = summarise(each(lambda node, name: node.store(name, name, end), pairs))
    for churn in churns:
        going = chance.sample(alive, len(alive) - round(nodes_count * (1 - churn)))
        alive = [node for node in alive if node not in going]
        for node in going:
            node.shutdown()

        def find(node: Any, name: str) -> bool:
            found = node.get(name, latest=True)
            return bool(found is not None and found.value == name)

        sought = [(chance.choice(alive), chance.choice(names)) for _ in range(finds)]
        figures[f"find after {churn:.0%} gone"] = summarise(each(find, sought))
    print(json.dumps(figures), flush=True)
    for node in alive:
        node.shutdown()


if __name__ == "__main__":
    main()
