"""The command line of the simulator: replay one seed, or run many on all cores and sum up."""

import argparse
import itertools
import secrets
import sys
import time

from tests.sim.checkers import InvariantBroken
from tests.sim.world import World


def main() -> int:
    parser = argparse.ArgumentParser(description="simulate rounds under faults")
    parser.add_argument("--seed", type=int, help="replay this seed and print what happened")
    parser.add_argument("--rounds", type=int, default=5000, help="simulate at least this many rounds over many seeds")
    parser.add_argument("--first-seed", type=int, help="the first of the seeds; default: random")
    options = parser.parse_args()
    if options.seed is not None:
        world = World(options.seed)
        try:
            outcome = world.run()
        finally:
            print("\n".join(world.happenings))
        print(outcome)
        return 0
    rounds, started = 0, time.monotonic()
    for seed in itertools.count(options.first_seed or secrets.randbits(32)):
        try:
            rounds += World(seed).run().rounds
        except (InvariantBroken, AssertionError, KeyError) as error:
            print(f"FAILED seed {seed}: {type(error).__name__} {error}", file=sys.stderr)
            return 1
        if rounds >= options.rounds:
            break
    print(rounds, seed, rounds / (time.monotonic() - started) * 60)
    return 0
