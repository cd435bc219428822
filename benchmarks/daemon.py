"""The daemon's figures: start, idle cost, round overhead, bytes, swarm speed, catch-up.

    python -m benchmarks.daemon [--json FILE] [--only NAME …] [--repeats N]

Real daemon processes on loopback. Every figure is the median of its repeats, which are given, too; on a shared machine
quote ratios from one run.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from tests.e2e import swarm as harness

TINY = {"layers": 2, "heads": 4, "width": 192, "context": 128, "batch_size": 8, "part_elements": 65536}
SMALL = {"layers": 10, "heads": 8, "width": 512, "context": 64, "batch_size": 1, "part_elements": 262144}
IDLE_S = 30.0


def draft(model: dict[str, int], steps: int, **rounds: Any) -> str:
    """A manifest draft for a model and a number of inner steps a round."""
    more = "\n".join(f"{key} = {json.dumps(value)}" for key, value in rounds.items())
    return f"""
name = "bench"
seed = 1
[task]
kind = "byte_gpt"
layers = {model["layers"]}
heads = {model["heads"]}
width = {model["width"]}
context = {model["context"]}
[training]
inner_steps = {steps}
steps_min = 1
round_time_s = 600.0
batch_size = {model["batch_size"]}
[rounds]
part_elements = {model["part_elements"]}
sender_timeout_s = 60.0
owner_timeout_s = 60.0
exchange_timeout_s = 300.0
commit_timeout_s = 60.0
presence_period_s = 1.0
presence_timeout_s = 20.0
{more}
"""


class Bench:
    """One swarm in a folder that is removed afterwards."""

    def __init__(self, text: str, founders: int) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="shoal-bench-")
        harness.WAIT_S = 400.0
        self.swarm = harness.Swarm(Path(self._folder.name), founders, draft=text)
        self.swarm.text = None  # the source of the running Python

    def __enter__(self) -> harness.Swarm:
        return self.swarm

    def __exit__(self, *_: object) -> None:
        self.swarm.end()
        self._folder.cleanup()


def start_peers(swarm: harness.Swarm, count: int) -> list[harness.Peer]:
    first = swarm.add("peer1").start("up", "--manifest", str(swarm.manifest))
    swarm.wait("the first peer answers", lambda: first.status() is not None)
    status = first.status()
    assert status is not None
    return [first, *(swarm.add(f"peer{n}").start("join", status.uri) for n in range(2, count + 1))]


def metric(peer: harness.Peer, name: str) -> float:
    """The value of one series of a peer's /metrics."""
    import urllib.request

    web = json.loads((peer.folder / "running.json").read_text())["web"]
    with urllib.request.urlopen(f"http://{web}/metrics", timeout=10) as answer:
        for line in answer.read().decode().splitlines():
            if line.startswith(f"shoal_{name} "):
                return float(line.split()[-1])
    raise KeyError(name)


def measure_start(repeats: int) -> dict[str, Any]:
    """Seconds from `shoal up` to ready, resident memory and CPU share of an idle bootstrap daemon."""
    starts = [_start_idle() for _ in range(repeats)]
    return {name: [one[name] for one in starts] for name in starts[0]}


def _start_idle() -> dict[str, float]:
    with Bench(draft(TINY, 10, peers_min=1), 1) as swarm:
        began = time.monotonic()
        peer = swarm.add("peer1").start("up", "--role", "bootstrap", "--manifest", str(swarm.manifest))
        swarm.wait("it answers", lambda: peer.status() is not None)
        ready_s = time.monotonic() - began
        time.sleep(5)
        assert peer.process is not None
        process = psutil.Process(peer.process.pid)
        used = sum(process.cpu_times()[:2])
        time.sleep(IDLE_S)
        cpu_percent = (sum(process.cpu_times()[:2]) - used) / IDLE_S * 100
        return {
            "ready_s": ready_s,
            "idle_rss_mib": process.memory_info().rss / 2**20,
            "idle_cpu_percent": cpu_percent,
        }


def measure_rounds(model: dict[str, int], rounds: int, steps: int) -> dict[str, Any]:
    """Four peers: overhead (a round's time minus its inner steps), bytes a round, memory, first contribution."""
    with Bench(draft(model, steps, peers_min=4, grace_s=5.0), 4) as swarm:
        began = time.monotonic()
        peers = start_peers(swarm, 4)
        swarm.wait("the first round", lambda: min(peer.round for peer in peers) >= 1)
        first_s = time.monotonic() - began
        before = [(metric(p, "round_overhead_seconds_sum"), metric(p, "round_overhead_seconds_count")) for p in peers]
        traffic = [peer.status() for peer in peers]
        at = peers[0].round
        swarm.wait("the measured rounds", lambda: min(peer.round for peer in peers) >= at + rounds)
        overheads = []
        for peer, (total, count) in zip(peers, before, strict=True):
            counted = metric(peer, "round_overhead_seconds_count") - count
            overheads.append((metric(peer, "round_overhead_seconds_sum") - total) / max(counted, 1))
        sent = encoded = fp32 = 0
        for peer, earlier in zip(peers, traffic, strict=True):
            now = peer.status()
            assert now is not None and earlier is not None
            sent += now.traffic.tensor_sent_bytes - earlier.traffic.tensor_sent_bytes
            encoded += now.traffic.contribution_bytes - earlier.traffic.contribution_bytes
            fp32 += now.traffic.fp32_bytes - earlier.traffic.fp32_bytes
        done = min(peer.round for peer in peers) - at
        memory = [_memory_mib(peer) for peer in peers]
        swarm.check_roots()
        return {
            "first_contributing_round_s": first_s,
            "overhead_s": overheads,
            "tensor_bytes_per_peer_and_round": sent / done / 4,
            "fp32_bytes_per_peer_and_round": fp32 / done / 4,
            "compression": fp32 / encoded,
            "daemon_rss_mib": [one[0] for one in memory],
            "trainer_rss_mib": [one[1] for one in memory],
        }


def _memory_mib(peer: harness.Peer) -> tuple[float, float]:
    assert peer.process is not None
    daemon = psutil.Process(peer.process.pid)
    trainer = sum(child.memory_info().rss for child in daemon.children(recursive=True))
    return daemon.memory_info().rss / 2**20, trainer / 2**20


def measure_speed(repeats: int) -> dict[str, Any]:
    """Tokens/s of one process alone and of a swarm of four, on the same machine."""
    results: dict[str, list[float]] = {"alone_tokens_per_s": [], "swarm_of_4_tokens_per_s": []}
    for _ in range(repeats):
        for count, key in ((1, "alone_tokens_per_s"), (4, "swarm_of_4_tokens_per_s")):
            results[key].append(_train_together(count))
    return results


def _train_together(count: int) -> float:
    """Tokens/s of a swarm of so many."""
    with Bench(draft(TINY, 20, peers_min=count, grace_s=3.0), count) as swarm:
        peers = start_peers(swarm, count)
        swarm.wait("two rounds", lambda: min(peer.round for peer in peers) >= 2)
        begin = [(peer.status(), time.monotonic()) for peer in peers]
        at = peers[0].round
        swarm.wait("four more", lambda: min(peer.round for peer in peers) >= at + 4)
        total = 0.0
        for peer, (earlier, since) in zip(peers, begin, strict=True):
            now = peer.status()
            assert now is not None and earlier is not None
            total += (now.training.tokens - earlier.training.tokens) / (time.monotonic() - since)
        return total


def measure_catch_up(repeats: int) -> dict[str, Any]:
    """Seconds from the start of a peer that missed n rounds until it stands at the head that it then sees."""
    results: dict[str, list[float]] = {"missed_1_s": [], "missed_20_s": []}
    for _ in range(repeats):
        for missed, key in ((1, "missed_1_s"), (20, "missed_20_s")):
            results[key].append(_come_back(missed))
    return results


def _come_back(missed: int) -> float:
    with Bench(draft(TINY, 3, peers_min=2, grace_s=0.5), 3) as swarm:
        peers = start_peers(swarm, 3)
        swarm.wait("two rounds", lambda: min(peer.round for peer in peers) >= 2)
        victim = peers[2]
        victim.kill()
        at = peers[0].round
        swarm.wait("missed rounds", lambda: peers[0].round >= at + missed)
        began = time.monotonic()
        victim.start("up", "--manifest", str(swarm.manifest))
        swarm.wait("it is back", lambda: victim.round >= peers[0].round - 1 > 0)
        return time.monotonic() - began


BENCHES: dict[str, Callable[[int], dict[str, Any]]] = {
    "start": measure_start,
    "rounds_1m": lambda repeats: measure_rounds(TINY, 5 * repeats, 10),
    "rounds_30m": lambda repeats: measure_rounds(SMALL, max(3, repeats), 1),
    "speed": measure_speed,
    "catch_up": measure_catch_up,
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="measure the daemon")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", nargs="*", choices=tuple(BENCHES), default=list(BENCHES))
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args(arguments)
    results: dict[str, Any] = {"cpus": os.cpu_count(), "python": sys.version.split()[0], "repeats": options.repeats}
    for name in options.only:
        results[name] = BENCHES[name](options.repeats)
        for key, value in results[name].items():
            many = value if isinstance(value, list) else [value]
            runs = ", ".join(f"{one:.2f}" for one in many)
            print(f"{name:12} {key:34} {statistics.median(many):14.2f}   ({runs})", flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
