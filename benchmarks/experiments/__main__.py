"""Small reproductions of what is published on training with few exchanges, by the production numerics on one core.

    python -m benchmarks.experiments NAME [--rounds N] [--seeds N …] [--only ARM …] [--json FILE] [--plot FILE]

docs/experiments.md says what there is of NAME, and what each of them runs. The table goes to standard output, the log
is written after every run, so that one that is stopped leaves what it has.
"""

import argparse
import sys
from pathlib import Path

import torch

from benchmarks.experiments.catalogue import EXPERIMENTS, make_arms
from benchmarks.experiments.report import write_log
from shoal.protocol.errors import ConfigError

ROUNDS = 24
SEEDS = (0, 1)
PLOT_SUFFIXES = (".svg", ".png")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.experiments", description=__doc__.splitlines()[0])
    parser.add_argument("name", metavar="NAME", choices=EXPERIMENTS, help=", ".join(EXPERIMENTS))
    parser.add_argument(
        "--rounds", type=int, default=ROUNDS, help=f"of 16 inner steps, or of 600 s in churn (default {ROUNDS})"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="one run each (default: 0 and 1)")
    parser.add_argument("--only", nargs="+", default=(), metavar="ARM", help="these arms, by their names in the table")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every point of every run there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw it there, as .svg or .png")
    options = parser.parse_args(arguments)
    # Products this small are slower on several threads, and their sums then depend on how many there are.
    torch.set_num_threads(1)
    try:
        arms = make_arms(options.name, options.rounds, tuple(options.only))
        _check(options)
        experiment, runs = EXPERIMENTS[options.name], []
        for seed in options.seeds:
            for arm in arms:
                run = experiment.run(arm, seed)
                runs.append(run)
                print(f"{arm.name}, seed {seed}: {run.told} ({run.wall_s:.0f} s)", file=sys.stderr, flush=True)
                if options.json is not None:
                    write_log(options.json, options.name, arms, runs)
    except ConfigError as error:
        parser.error(str(error))
    print(experiment.format(arms, runs))
    if options.plot is not None and not experiment.draw(options.plot, experiment.question, arms, runs):
        print("no plot: matplotlib is missing (the extra `plot`)", file=sys.stderr)


def _check(options: argparse.Namespace) -> None:
    """What would end a run after it was made; raises ConfigError."""
    if any(not 0 <= seed < 2**63 for seed in options.seeds):
        raise ConfigError("--seeds", f"are {options.seeds}", "use numbers from 0 to 2**63 - 1")
    if options.plot is not None and options.plot.suffix not in PLOT_SUFFIXES:
        raise ConfigError("--plot", f"is {options.plot.name}", f"end it in {' or '.join(PLOT_SUFFIXES)}")
    for option, path in (("--json", options.json), ("--plot", options.plot)):
        if path is not None and not path.parent.is_dir():
            raise ConfigError(option, f"{path.parent} is no folder", "make it, or give another")


if __name__ == "__main__":
    main()
