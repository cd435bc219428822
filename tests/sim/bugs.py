"""Does the simulator bite? Search for the planted bugs.

python -m tests.sim.bugs                 search every bug from random seeds; print a table
python -m tests.sim.bugs --only NAME     one of them
python -m tests.sim.bugs --first-seed N  the seeds from N on
"""

import argparse
import functools
import itertools
import os
import secrets
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from shoal.protocol.errors import ProtocolError
from tests.sim import planted_exchange, planted_lies, planted_state, planted_votes
from tests.sim.checkers import InvariantBroken, broken
from tests.sim.clusters import Cluster
from tests.sim.drills import Drill
from tests.sim.faults import CALM, Lie, Rates
from tests.sim.planted import BUGS, Arena, Bug, planted
from tests.sim.schedules import Schedule
from tests.sim.world import World

ROUNDS_MAX = 20_000
ROOT = Path(__file__).parents[2]
CLUSTER = Cluster(founders=4, first=5, everybody=8, elements=900)
STORM = Rates(
    loss=0.03,
    duplicate=0.05,
    delay_mean_s=0.1,
    partition=0.01,
    one_way=0.01,
    crash=0.008,
    crash_at_moment=0.1,
    restart_s=3.0,
    pause=0.002,
)
PLANTED_IN = (planted_exchange, planted_lies, planted_state, planted_votes)  # importing them fills BUGS


@dataclass(frozen=True, slots=True, kw_only=True)
class Catch:
    """`rounds` were simulated until `seed` broke `invariant`."""

    seed: int
    rounds: int
    invariant: str
    detail: str


def open_game(arena: Arena, seed: int) -> World | Schedule | Drill:
    match arena:
        case Arena.STORM:
            return World(seed, STORM, cluster=CLUSTER)
        case Arena.LIARS:
            liars = replace(CLUSTER, quorum="two_thirds", liars=(seed % CLUSTER.founders,))
            return World(seed, replace(CALM, lies=tuple(Lie)), cluster=liars)
        case Arena.SCHEDULE:
            return Schedule(seed)
        case Arena.DRILL:
            return Drill(seed)
    return World(seed)


def play(arena: Arena, seed: int) -> tuple[int, InvariantBroken | None]:
    """Simulate one seed: how many rounds were certified, and what broke, if anything."""
    game = open_game(arena, seed)
    problem = None
    try:
        game.run()
    except InvariantBroken as error:
        problem = error
    except ProtocolError as error:
        problem = broken("a core refuses others, not itself", str(error))
    return len(game.checker.results if isinstance(game, World) else game.results), problem


def compare_hash_seeds(one: Bug, seed: int) -> tuple[int, InvariantBroken | None]:
    """Play one seed of the world in two processes that order sets otherwise."""
    command = [sys.executable, "-m", "tests.sim.bugs", "--only", one.name, "--trace", str(seed)]
    outputs = []
    for hash_seed in ("0", "1"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        outputs.append(done.stdout.split())
    (rounds, *first), (_, *second) = outputs
    return int(rounds), broken("same seed, same trace", "two hash seeds, two traces") if first != second else None


@functools.lru_cache(maxsize=1 << 10)
def is_clean(arena: Arena, seed: int) -> bool:
    """Whether nothing breaks in this seed without a bug; otherwise it is no proof that the bug was seen."""
    return arena is Arena.HASH_SEEDS or play(arena, seed)[1] is None


def find(one: Bug, seeds: Iterable[int], rounds_max: int = ROUNDS_MAX) -> Catch | None:
    """The first of `seeds` that catches the bug, within a budget of simulated rounds."""
    total = 0
    for seed in seeds:
        if one.arena is Arena.HASH_SEEDS:
            rounds, problem = compare_hash_seeds(one, seed)
        else:
            with planted(one):
                rounds, problem = play(one.arena, seed)
        total += rounds
        if problem is not None and is_clean(one.arena, seed):
            return Catch(seed=seed, rounds=total, invariant=problem.name, detail=str(problem))
        if total >= rounds_max:
            break
    return None


def search(bugs: Iterable[Bug], first_seed: int, rounds_max: int) -> int:
    """Print what catches each bug; 1 when one was not caught."""
    print("| planted bug | what is wrong | arena | rounds until caught | invariant |\n|---|---|---|---|---|")
    failed = 0
    for one in bugs:
        catch = find(one, itertools.count(first_seed), rounds_max)
        failed += catch is None
        found = f"{catch.rounds} | {catch.invariant}" if catch else f"over {rounds_max} | -"
        print(f"| {one.name} | {one.wrong} | {one.arena} | {found} |", flush=True)
        if catch:
            print(f"{one.name}: seed {catch.seed}: {catch.detail[:300]}", file=sys.stderr, flush=True)
    return 1 if failed else 0


def main() -> int:
    parser = argparse.ArgumentParser(description="search for the planted bugs")
    parser.add_argument("--only", choices=sorted(BUGS), help="search for one bug")
    parser.add_argument("--first-seed", type=int, help="the first of the seeds; default: random")
    parser.add_argument("--rounds", type=int, default=ROUNDS_MAX, help="give up after so many simulated rounds")
    parser.add_argument("--trace", type=int, metavar="SEED", help="play one seed of the world and print its trace")
    options = parser.parse_args()
    bugs = [BUGS[options.only]] if options.only else list(BUGS.values())
    if options.trace is not None:
        with planted(bugs[0]):
            outcome = World(options.trace).run()
        print(outcome.rounds, outcome.trace)
        return 0
    return search(bugs, secrets.randbits(32) if options.first_seed is None else options.first_seed, options.rounds)


if __name__ == "__main__":
    sys.exit(main())
