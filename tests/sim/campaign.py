"""The command line of the simulator: replay one seed, or run many on all cores and sum up."""

import argparse
import itertools
import json
import secrets
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field, fields
from pathlib import Path

from tests.sim.faults import Rates
from tests.sim.shrink import name_failure, run_seed, shrink_seed
from tests.sim.world import World

SEEDS_AT_ONCE = 4  # that a worker runs before it reports
WAITING_PER_JOB = 2  # pieces of work that lie ready for each worker
PROGRESS_S = 15.0
QUIET_S = 2.0  # what is over within this needs no progress line


@dataclass(slots=True)
class Tally:
    """What some seeds came to."""

    seeds: int = 0
    rounds: int = 0
    cpu_s: float = 0.0
    virtual_s: float = 0.0
    participants: float = 0.0  # summed over rounds
    live_shares: float = 0.0  # summed over the rounds with parts
    shared_rounds: int = 0
    attempts_failed: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)
    reroots: Counter[str] = field(default_factory=Counter)  # and how often a peer went over to another log
    rates: Counter[str] = field(default_factory=Counter)  # summed over seeds
    rates_on: Counter[str] = field(default_factory=Counter)  # seeds in which a rate was not 0
    broken: list[tuple[int, str, str]] = field(default_factory=list)  # seed, name, detail

    def add(self, other: "Tally") -> None:
        for one in fields(self):
            value = getattr(other, one.name)
            if isinstance(value, list):
                getattr(self, one.name).extend(value)
            elif isinstance(value, Counter):
                getattr(self, one.name).update(value)
            else:
                setattr(self, one.name, getattr(self, one.name) + value)

    def summary(self) -> dict[str, object]:
        seeds, rounds = max(self.seeds, 1), max(self.rounds, 1)
        return {
            "seeds": self.seeds,
            "rounds": self.rounds,
            "broken": [{"seed": seed, "name": name, "detail": detail} for seed, name, detail in self.broken],
            "rounds_per_minute_and_core": round(self.rounds / max(self.cpu_s, 1e-9) * 60),
            "cpu_s": round(self.cpu_s, 1),
            "virtual_hours": round(self.virtual_s / 3600, 2),
            "participants_per_round": round(self.participants / rounds, 3),
            "live_taking_part": round(self.live_shares / max(self.shared_rounds, 1), 4),
            "attempts_failed": dict(sorted(self.attempts_failed.items())),
            "faults": dict(sorted(self.faults.items())),
            "reroots": dict(sorted(self.reroots.items())),
            "refused_of_liars": dict(sorted(self.refusals.items())),
            "rates_mean": {name: float(f"{total / seeds:.4g}") for name, total in sorted(self.rates.items())},
            "rates_on_share": {name: round(count / seeds, 3) for name, count in sorted(self.rates_on.items())},
        }


def run_seeds(first: int, count: int) -> Tally:
    """Run seeds one after the other; a failure ends none of the others."""
    tally = Tally()
    started = time.process_time()
    for seed in range(first, first + count):
        world, end = run_seed(seed)
        tally.seeds += 1
        tally.faults += world.struck
        tally.attempts_failed += world.failures
        tally.refusals += world.checker.refusals
        tally.reroots += world.checker.reroots
        tally.rounds += len(world.checker.results)
        tally.participants += sum(world.checker.participants.values())
        tally.live_shares += sum(world.checker.shares)
        tally.shared_rounds += len(world.checker.shares)
        tally.virtual_s += world.now
        for one in fields(Rates):
            value = getattr(world.rates, one.name)
            if isinstance(value, float) and value:
                tally.rates[one.name] += value  # type: ignore[assignment]
                tally.rates_on[one.name] += 1
        if isinstance(end, BaseException):
            tally.broken.append((seed, name_failure(end), f"{type(end).__name__}: {end}"))
    tally.cpu_s = time.process_time() - started
    return tally


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    rounds: int
    seconds: float
    jobs: int
    keep_going: bool


def run_many(first_seed: int, limits: Limits) -> tuple[Tally, float]:
    """Seeds from `first_seed` on until a limit is reached; the sum, and the seconds it took."""
    tally, started = Tally(), time.monotonic()
    last_line = started - PROGRESS_S + QUIET_S
    for part in _run_pieces(first_seed, limits.jobs):
        tally.add(part)
        seconds = time.monotonic() - started
        if tally.rounds >= limits.rounds or seconds >= limits.seconds or (tally.broken and not limits.keep_going):
            break
        if time.monotonic() - last_line >= PROGRESS_S:
            last_line = time.monotonic()
            speed = tally.rounds / seconds * 60
            left_s = min((limits.rounds - tally.rounds) / max(speed, 1) * 60, limits.seconds - seconds)
            print(
                f"{tally.rounds} rounds, {speed:.0f}/min, {len(tally.broken)} broken, {left_s:.0f} s left", flush=True
            )
    return tally, time.monotonic() - started


def _run_pieces(first_seed: int, jobs: int) -> Iterator[Tally]:
    firsts = itertools.count(first_seed, SEEDS_AT_ONCE)
    if jobs == 1:
        while True:
            yield run_seeds(next(firsts), SEEDS_AT_ONCE)
    with ProcessPoolExecutor(jobs) as pool:
        running: set[Future[Tally]] = set()
        try:
            while True:
                while len(running) < jobs * WAITING_PER_JOB:
                    running.add(pool.submit(run_seeds, next(firsts), SEEDS_AT_ONCE))
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for one in done:
                    yield one.result()
        finally:
            for one in running:
                one.cancel()


def name_commit() -> str:
    command, here = ["git", "describe", "--always", "--dirty"], Path(__file__).parent
    found = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def report_failure(seed: int, name: str, detail: str) -> None:
    """Seed, commit, the faults that suffice, and the command that replays them."""
    chosen = shrink_seed(seed, name)
    faults = World(seed).faults
    print(f"\nFAILED seed {seed}, commit {name_commit()}: {detail}")
    print(f"{len(chosen)} of its {len(faults)} faults suffice:")
    for index in chosen:
        print(f"  {index:3}  {faults[index]}")
    print(f"replay: make sim SEED={seed} FAULTS={','.join(map(str, chosen)) or 'none'}", flush=True)


def replay(seed: int, faults: str | None, trace: bool) -> int:
    world = World(seed, verbose=trace)
    if faults is not None:
        chosen = [int(text) for text in faults.split(",") if text != "none"]
        world = World(seed, faults=[world.faults[index] for index in chosen], verbose=trace)
    print(f"{world.cluster}\n{world.rates}")
    print("\n".join(f"fault {index:3}  {fault}" for index, fault in enumerate(world.faults)))
    try:
        outcome = world.run()
    finally:
        print("\n".join(world.trace.lines if trace else world.happenings))
    print(outcome)
    return 0


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="simulate rounds under faults")
    parser.add_argument("--seed", type=int, help="replay this seed and print what happened")
    parser.add_argument("--faults", help="with --seed: only these of its faults, by number, as 3,7,9 or none")
    parser.add_argument("--trace", action="store_true", help="with --seed: print every message and effect")
    parser.add_argument("--rounds", type=int, default=5000, help="simulate at least this many rounds over many seeds")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after this time all the same")
    parser.add_argument("--first-seed", type=int, help="the first of the seeds; default: random")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--json", type=Path, help="write the summary to this file")
    parser.add_argument("--keep-going", action="store_true", help="run on after a failure")
    return parser.parse_args()


def main() -> int:
    options = parse_options()
    if options.seed is not None:
        return replay(options.seed, options.faults, options.trace)
    first = secrets.randbits(32) if options.first_seed is None else options.first_seed
    print(f"seeds from {first} on, {options.jobs} processes, commit {name_commit()}", flush=True)
    limits = Limits(rounds=options.rounds, seconds=options.seconds, jobs=options.jobs, keep_going=options.keep_going)
    tally, seconds = run_many(first, limits)
    summary = {
        "commit": name_commit(),
        "first_seed": first,
        "jobs": options.jobs,
        "seconds": round(seconds, 1),
        "rounds_per_minute": round(tally.rounds / seconds * 60),
        **tally.summary(),
    }
    if options.json:
        options.json.write_text(json.dumps(summary, indent=2) + "\n")
    # One of each kind is shrunk; the summary names the others.
    kinds = {name: (seed, name, detail) for seed, name, detail in reversed(tally.broken)}
    for seed, name, detail in kinds.values():
        report_failure(seed, name, detail)
    print(
        f"{tally.rounds} rounds of {tally.seeds} seeds in {seconds:.0f} s, {len(tally.broken)} seeds broken; "
        f"{summary['rounds_per_minute_and_core']} rounds a minute and core, "
        f"{summary['participants_per_round']} participants a round, {summary['live_taking_part']:.1%} of those who "
        "were there all through it"
    )
    print(f"failed attempts: {dict(tally.attempts_failed)}\nfaults: {dict(tally.faults)}", file=sys.stderr)
    print(f"re-roots: {dict(tally.reroots)}", file=sys.stderr)
    return 1 if tally.broken else 0
