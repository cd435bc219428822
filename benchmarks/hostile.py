"""What a thousand clients that mean ill cost a running swarm: the median time of a round with them and without.

    python -m benchmarks.hostile [--clients N] [--peers N] [--rounds N] [--turns N] [--json FILE]

Real daemons on loopback; the clients (silent, slow, oversized, malformed) come from 200 addresses in a process of their
own, to the control and the tensor port of every peer, and come again a second after they were hung up on. Quiet and
flooded stretches of `--rounds` rounds take turns, so that a machine that grows slower slows both. Trainers are paced: a
step every tenth of a second, rounds by time.
"""

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from tests.e2e.hostile_clients import open_flood
from tests.e2e.swarm import Peer, Swarm, vary_draft
from tests.e2e.test_hostile import find_ports

CLIENTS, PEERS, ROUNDS, TURNS = 1000, 3, 8, 3
ROUND_TIME_S = 3.0
SETTLE_S = 5.0  # after a flood begins or ends: neither side's first rounds count
STRETCH_LIMIT_S = 300.0
POLL_S = 0.02
CONFIG = "[trainer]\nstep_period_s = 0.1\n"


def start_swarm(folder: Path, peers: int) -> Swarm:
    """A swarm that has certified its first rounds."""
    swarm = Swarm(folder, founders=peers, draft=vary_draft(round_time_s=ROUND_TIME_S, inner_steps=100_000))
    config = folder / "config.toml"
    config.write_text(CONFIG)
    members = [swarm.add(f"peer{number}") for number in range(1, peers + 1)]
    for member in members:
        member.options += ["--config", str(config)]
    members[0].start("up", "--manifest", str(swarm.manifest))
    swarm.wait("the first peer answers", lambda: members[0].status() is not None)
    status = members[0].status()
    assert status is not None
    for member in members[1:]:
        member.start("join", status.uri)
    swarm.wait("three rounds", lambda: all(member.round >= 3 for member in members))
    return swarm


def time_rounds(watched: Peer, rounds: int) -> list[float]:
    """How long each of the next rounds took, as the peer's status shows them."""
    seen: list[float] = []
    last, ends_s = watched.round, time.monotonic() + STRETCH_LIMIT_S
    while len(seen) <= rounds:
        if time.monotonic() > ends_s:
            raise AssertionError(f"{len(seen)} rounds in {STRETCH_LIMIT_S:.0f} s")
        now = watched.round
        if now > last:
            seen.append(time.monotonic())
            last = now
        time.sleep(POLL_S)
    return [later - earlier for earlier, later in itertools.pairwise(seen)]


def memory_bytes(swarm: Swarm) -> list[int]:
    """Of each daemon, without its trainer."""
    return [psutil.Process(peer.pid).memory_info().rss for peer in swarm.peers]


def failed_attempts(swarm: Swarm) -> int:
    """Of all peers so far."""
    statuses = [peer.status() for peer in swarm.peers]
    return sum(one.count for status in statuses if status is not None for one in status.aborted)


def measure(clients: int, peers: int, rounds: int, turns: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Quiet and flooded stretches in turn."""
    with tempfile.TemporaryDirectory(prefix="shoal-hostile-") as name:
        swarm = start_swarm(Path(name), peers)
        try:
            quiet: list[float] = []
            flooded: list[float] = []
            came: dict[str, int] = {}
            before = memory_bytes(swarm)
            targets = [target for peer in swarm.peers for target in find_ports(peer)]
            for turn in range(turns):
                time.sleep(SETTLE_S)
                quiet += time_rounds(swarm.peers[0], rounds)
                with open_flood(clients, targets) as flood:
                    time.sleep(SETTLE_S)
                    flooded += time_rounds(swarm.peers[0], rounds)
                for kind, count in flood.counts.items():
                    came[kind] = came.get(kind, 0) + count
                medians = [statistics.median(times) for times in (quiet, flooded)]
                say(f"turn {turn + 1}: quiet {medians[0]:.2f} s, flooded {medians[1]:.2f} s")
            for peer in swarm.peers:
                peer.status()
            return {
                "clients": clients,
                "peers": peers,
                "ports": len(targets),
                "rounds_each": len(quiet),
                "quiet_s": statistics.median(quiet),
                "flooded_s": statistics.median(flooded),
                "quiet_longest_s": max(quiet),
                "flooded_longest_s": max(flooded),
                "ratio": statistics.median(flooded) / statistics.median(quiet),
                "failed_attempts": failed_attempts(swarm),
                "memory_before_bytes": before,
                "memory_after_bytes": memory_bytes(swarm),
                "connections": came,
            }
        finally:
            swarm.end()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=CLIENTS)
    parser.add_argument("--peers", type=int, default=PEERS)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of each stretch")
    parser.add_argument("--turns", type=int, default=TURNS)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    found = measure(options.clients, options.peers, options.rounds, options.turns, lambda text: print(text, flush=True))
    print(json.dumps(found, indent=1))
    if options.json:
        options.json.write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
