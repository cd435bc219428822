"""What faults cost: certified tokens a second under faults over those without, and who takes part in each round.

    python -m benchmarks.goodput [--peers N] [--seconds N] [--round-time S] [--seed N] [--only NAME …] [--json FILE]

Three runs of the same swarm of real daemons, each of `--seconds`:

    calm        no faults
    hourly      125 faults an hour per 32 peers (the rate of the published anchor: 97.7 % throughput, half of the peers
                taking part), scaled to `--peers`
    per_round   each peer is lost with 10 % in each round (anchor: 88 % goodput, Decoupled DiLoCo's harshest setting)

A fault is SIGKILL; the peer starts again from its folder at once. Trainers are paced (a step every 0.1 s, of which most
is rest, and rounds by time): a dead peer's processor time is of no use to the others, as on machines of their own.
Tokens are those of the certificates on the peers' disks: a contribution counts by the share of its parts that went in.
A peer counts as live in a round if its daemon has answered for the whole of it, from the certificate before to its own.
Whoever is killed loses what it takes to start again, which is seconds whatever a round takes: so long rounds lose less.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import chaos_checks as checks
from benchmarks.chaos_swarm import ChaosSwarm, Member, Standing

FAULTS_PER_HOUR, PEERS_OF_ANCHOR = 125.0, 32
SHARE_LOST_PER_ROUND = 0.1
ROUND_TIME_S = 10.0  # unless told otherwise
POLL_S = 0.1
CALM, HOURLY, PER_ROUND = RUNS = ("calm", "hourly", "per_round")


class Faults:
    """When whom to kill, drawn from a seed before anything is known of the run."""

    def __init__(self, kind: str, swarm: ChaosSwarm, seed: int) -> None:
        self.killed: list[tuple[float, str]] = []
        self.held_back = 0
        self.back_s: list[float] = []  # from each death to the first answer
        self._down: dict[str, float] = {}
        self._kind = kind
        self._swarm = swarm
        self._entropy = random.Random(seed)
        self._next_s = time.monotonic() + self._pause_s()
        self._round = swarm.round()

    def _pause_s(self) -> float:
        per_hour = FAULTS_PER_HOUR / PEERS_OF_ANCHOR * len(self._swarm.members)
        return self._entropy.expovariate(per_hour / 3600.0)

    def poll(self) -> None:
        """Kill whoever is due, as far as a quorum is left; everybody starts again at once."""
        if self._kind == HOURLY and time.monotonic() >= self._next_s:
            self._next_s = time.monotonic() + self._pause_s()
            self._kill(self._entropy.choice(self._swarm.members))
        elif self._kind == PER_ROUND and self._swarm.round() > self._round:
            self._round = self._swarm.round()
            for member in self._swarm.members:
                if self._entropy.random() < SHARE_LOST_PER_ROUND:
                    self._kill(member)

    def _kill(self, victim: Member) -> None:
        if victim.standing is not Standing.UP or not self._swarm.spares(victim):
            self.held_back += 1
            return
        self._swarm.kill(victim)
        self.killed.append((time.monotonic(), victim.name))
        self._down[victim.name] = time.monotonic()
        self._swarm.start(victim)

    def note_back(self, now: float) -> None:
        """Who answers again."""
        for member in self._swarm.up():
            if member.answered_s and member.name in self._down:
                self.back_s.append(now - self._down.pop(member.name))


def measure(kind: str, peers: int, seconds: float, round_time_s: float, seed: int) -> dict[str, Any]:
    """One run and its figures."""
    with tempfile.TemporaryDirectory(prefix="shoal-goodput-") as folder:
        swarm = ChaosSwarm(Path(folder), peers, seed=seed, round_time_s=round_time_s)
        answering: list[tuple[float, frozenset[str]]] = []
        try:
            swarm.begin()
            swarm.swarm.wait("a round with everybody", lambda: swarm.round() >= 3)
            faults = Faults(kind, swarm, seed)
            began_s, first = time.monotonic(), swarm.round()
            while time.monotonic() < began_s + seconds:
                faults.poll()
                now = time.monotonic()
                faults.note_back(now)
                answering.append((now, frozenset(one.name for one in swarm.up() if one.answered_s)))
                time.sleep(POLL_S)
            took_s, last = time.monotonic() - began_s, swarm.round()
            # Whoever was killed last is still starting, and would not hear that it is to leave.
            swarm.swarm.wait("everybody answers", lambda: all(one.answered_s for one in swarm.up()))
            ids = {status.peer: one.name for one in swarm.members if (status := one.peer.status()) is not None}
            codes = swarm.leave(swarm.up())
        finally:
            swarm.end()
        log, _, problems = checks.merge_logs(swarm.folders())
        problems += checks.check_roots(swarm.roots, log)[1]
        problems += [*checks.check_logs(swarm.logs()), *checks.check_progress(swarm.stuck_s)]
        problems += [f"{name} left with {code}" for name, code in codes.items() if code != 0]
        measured = [log[number] for number in range(first + 1, last + 1)]
        shares = [_share_of_live(one, swarm.round_seen_s, answering, ids) for one in measured]
        # From one certificate to another: a round more or less at the ends is not a matter of faults.
        rounds_s = swarm.round_seen_s[last] - swarm.round_seen_s[first]
        return {
            "seconds": round(took_s, 1),
            "rounds": len(measured),
            "tokens": sum(one.tokens for one in measured),
            "tokens_per_s": round(sum(one.tokens for one in measured) / rounds_s, 2),
            "faults": len(faults.killed),
            "faults_per_hour": round(len(faults.killed) / took_s * 3600, 1),
            "faults_held_back": faults.held_back,
            "back_after_s": round(statistics.median(faults.back_s), 2) if faults.back_s else None,
            # What faults cost beyond the time in which a dead peer is not there at all.
            "answering_share": round(statistics.mean(len(names) for _, names in answering) / peers, 4),
            "members_mean": round(statistics.mean(len(one.members) for one in measured), 2),
            "live_taking_part": round(statistics.mean(share for share in shares if share is not None), 4),
            "rounds_with_all_live": round(sum(share == 1.0 for share in shares) / len(shares), 4),
            "between_rounds": checks.describe_gaps({n: swarm.round_seen_s[n] for n in range(first, last + 1)}),
            "problems": problems,
        }


def _share_of_live(
    one: checks.CertifiedRound,
    seen_s: dict[int, float],
    answering: list[tuple[float, frozenset[str]]],
    ids: dict[str, str],
) -> float | None:
    """Of those who answered all through a round, how many are in its result."""
    begin_s, end_s = seen_s[one.round - 1], seen_s[one.round]
    during = [names for at_s, names in answering if begin_s <= at_s <= end_s]
    live = frozenset.intersection(*during) if during else frozenset()
    members = {ids.get(peer, peer) for peer in one.members}
    return len(live & members) / len(live) if live else None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="measure what faults cost")
    parser.add_argument("--peers", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=600.0, help="of each of the runs")
    parser.add_argument("--round-time", type=float, default=ROUND_TIME_S, help="seconds of training a round")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", nargs="*", choices=RUNS, default=list(RUNS))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    results: dict[str, Any] = {"peers": options.peers, "round_time_s": options.round_time, "seed": options.seed}
    for kind in options.only:
        results[kind] = figures = measure(kind, options.peers, options.seconds, options.round_time, options.seed)
        if kind != CALM and CALM in results:
            figures["goodput"] = round(figures["tokens_per_s"] / results[CALM]["tokens_per_s"], 4)
            figures["goodput_of_the_answering"] = round(figures["goodput"] / figures["answering_share"], 4)
        print(f"{kind}: {json.dumps(figures)}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2), encoding="utf-8")
    problems = [problem for kind in options.only for problem in results[kind]["problems"]]
    for problem in problems:
        print(f"FAILED: {problem}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
