"""`shoal evaluate`: exported models on a text of one's own, each by itself and all of them together.

It needs torch, and no daemon. Invariant: nothing is written, and nothing of a file is run.
"""

import argparse
import importlib.util
from collections.abc import Callable
from pathlib import Path

from shoal.protocol.errors import ConfigError

SAMPLE_TOKENS = 256


def add_evaluate_arguments(evaluate: argparse.ArgumentParser) -> None:
    """What `run_evaluate` reads."""
    evaluate.add_argument("model", type=Path, nargs="+", metavar="MODEL", help="files that `shoal export` wrote")
    evaluate.add_argument("--text", type=Path, help="a file or folder: text, .jsonl, .parquet")
    evaluate.add_argument("--windows", type=int, default=256, help="at most so many, spread over the text; default 256")
    evaluate.add_argument("--sample", metavar="PROMPT", help="let them write together after this")
    evaluate.add_argument("--tokenizer", type=Path, help="the swarms' tokenizer.json")
    evaluate.add_argument("--weights", type=Path, help="the trained weights that the swarms started from")
    evaluate.add_argument("--json", action="store_true", help="for programs")


def run_evaluate(options: argparse.Namespace, told: Callable[[str], object]) -> int:
    """Tell what was found; raises ConfigError for what a person must mend."""
    from shoal.node.terminal import show_progress
    from shoal.node.trainer import INSTALL_TORCH

    if importlib.util.find_spec("torch") is None:
        raise ConfigError("torch", "is not installed", INSTALL_TORCH)
    from shoal.node.training.mixture import WINDOWS_MAX, Mixture, describe, encode_json, read_windows

    if not 1 <= options.windows <= WINDOWS_MAX:
        raise ConfigError("--windows", f"is {options.windows}", f"use 1 to {WINDOWS_MAX}")
    if options.text is None and options.sample is None:
        raise ConfigError("--text", "is missing", "name a text to measure on, or give --sample PROMPT")
    lines = []
    with show_progress("models") as tell:
        mixture = Mixture(options.model, options.tokenizer, options.weights)
        if options.text is not None:
            windows = read_windows(options.text, mixture.tokenizer, mixture.context, options.windows)
            measured = mixture.measure(windows, tell)
            lines += [encode_json(mixture, measured)] if options.json else describe(mixture, measured)
        if options.sample is not None:
            tell("writing")
            lines.append(mixture.sample(options.sample, SAMPLE_TOKENS).decode(errors="replace"))
    told("\n".join(lines))
    return 0
