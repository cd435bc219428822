"""The command line of the simulator: replay one seed, or run many on all cores and sum up.

A long run keeps its place in a file, so that an interrupted night is not lost: same command, and it goes on.
"""

import argparse
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
SAVE_PERIOD_S = 30.0


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


@dataclass(slots=True)
class Place:
    """Where a run stands: what was counted, and which seeds were not."""

    commit: str
    first_seed: int
    next_seed: int  # from here on nobody has been given any
    given: list[int] = field(default_factory=list)  # the first seeds of the pieces that are being run
    left: list[int] = field(default_factory=list)  # of those that were under way when the run was stopped
    sittings: int = 0  # how often it was started
    seconds: float = 0.0
    tally: Tally = field(default_factory=Tally)

    def take(self) -> int:
        """The first seed of the next piece of work."""
        if self.left:
            first = self.left.pop()
        else:
            first, self.next_seed = self.next_seed, self.next_seed + SEEDS_AT_ONCE
        self.given.append(first)
        return first

    def save(self, path: Path) -> None:
        fresh = path.with_name(path.name + ".new")
        fresh.write_text(json.dumps(_describe(self)) + "\n")
        fresh.replace(path)


def _describe(one: Place | Tally) -> dict[str, object]:
    values = {each.name: getattr(one, each.name) for each in fields(one)}
    return {name: _describe(value) if isinstance(value, Tally) else value for name, value in values.items()}


def open_place(path: Path | None, first_seed: int | None) -> Place:
    """The place that `path` keeps, or a new one; raises SystemExit when it is of other code or other seeds."""
    commit = name_commit()
    if path is None or not path.exists():
        first = secrets.randbits(32) if first_seed is None else first_seed
        return Place(commit=commit, first_seed=first, next_seed=first)
    kept = json.loads(path.read_text())
    if kept["commit"] != commit or first_seed not in (None, kept["first_seed"]):
        raise SystemExit(
            f"{path} is of commit {kept['commit']}, seeds from {kept['first_seed']} on, and this is commit {commit}. "
            f"Fix: go on at that commit, or remove {path}"
        )
    kept["left"] += kept.pop("given")
    counted = kept.pop("tally")
    broken = [(seed, name, detail) for seed, name, detail in counted.pop("broken")]
    counters = {name: Counter(value) for name, value in counted.items() if isinstance(value, dict)}
    return Place(**kept, tally=Tally(**{**counted, **counters, "broken": broken}))


def run_many(place: Place, limits: Limits, path: Path | None = None) -> None:
    """Seeds from where `place` stands until a limit is reached, counted in `place` and kept in `path`."""
    tally, started, before_s, before_rounds = place.tally, time.monotonic(), place.seconds, place.tally.rounds
    last_line, last_save = started - PROGRESS_S + QUIET_S, started
    place.sittings += 1
    for part in _run_pieces(place, limits.jobs):
        tally.add(part)
        now = time.monotonic()
        place.seconds = before_s + now - started
        over = tally.rounds >= limits.rounds or now - started >= limits.seconds
        if over or (tally.broken and not limits.keep_going):
            break
        if now - last_line >= PROGRESS_S:
            last_line = now
            speed = (tally.rounds - before_rounds) / (now - started) * 60
            left_s = min((limits.rounds - tally.rounds) / max(speed, 1) * 60, limits.seconds - (now - started))
            print(
                f"{tally.rounds} rounds, {speed:.0f}/min, {len(tally.broken)} broken, {left_s:.0f} s left", flush=True
            )
        if path is not None and now - last_save >= SAVE_PERIOD_S:
            last_save = now
            place.save(path)
    if path is not None:
        place.save(path)


def _run_pieces(place: Place, jobs: int) -> Iterator[Tally]:
    if jobs == 1:
        while True:
            first = place.take()
            part = run_seeds(first, SEEDS_AT_ONCE)
            place.given.remove(first)
            yield part
    with ProcessPoolExecutor(jobs) as pool:
        running: dict[Future[Tally], int] = {}
        try:
            while True:
                while len(running) < jobs * WAITING_PER_JOB:
                    first = place.take()
                    running[pool.submit(run_seeds, first, SEEDS_AT_ONCE)] = first
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for one in done:
                    place.given.remove(running.pop(one))
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
    parser.add_argument("--resume", type=Path, metavar="FILE", help="keep the place in this file and go on from it")
    return parser.parse_args()


def main() -> int:
    options = parse_options()
    if options.seed is not None:
        return replay(options.seed, options.faults, options.trace)
    place = open_place(options.resume, options.first_seed)
    since = f" ({place.tally.rounds} rounds are done)" if place.sittings else ""
    print(f"seeds from {place.first_seed} on, {options.jobs} processes, commit {place.commit}{since}", flush=True)
    limits = Limits(rounds=options.rounds, seconds=options.seconds, jobs=options.jobs, keep_going=options.keep_going)
    run_many(place, limits, options.resume)
    tally, seconds = place.tally, place.seconds
    summary = {
        "commit": place.commit,
        "first_seed": place.first_seed,
        "sittings": place.sittings,
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
