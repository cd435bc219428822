"""`shoal evaluate`: exported models on a text of one's own, each by itself and all of them together.

It needs torch, and no daemon. Invariant: nothing is written, and nothing of a file is run.
"""

import argparse
import importlib.util
from collections.abc import Callable
from pathlib import Path

from shoal.protocol.errors import ConfigError

SAMPLE_TOKENS = 256
WINDOWS_MAX = 1 << 16


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
    from shoal.node.progress import show_progress
    from shoal.node.trainer import INSTALL_TORCH

    check_evaluate_arguments(options)
    if importlib.util.find_spec("torch") is None:
        raise ConfigError("torch", "is not installed", INSTALL_TORCH)
    lines = []
    with show_progress("models") as tell:
        tell("starting torch")
        from shoal.node.training.mixture import Mixture, describe, encode_json, read_windows

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


def check_evaluate_arguments(options: argparse.Namespace) -> None:
    """What can be said before torch is waited for; raises ConfigError."""
    if not 1 <= options.windows <= WINDOWS_MAX:
        raise ConfigError("--windows", f"is {options.windows}", f"use 1 to {WINDOWS_MAX}")
    if options.text is None and options.sample is None:
        raise ConfigError("--text", "is missing", "name a text to measure on, or give --sample PROMPT")
    for model in options.model:
        if not model.is_file():
            raise ConfigError("MODEL", f"{model} is no file", "name files that `shoal export` wrote")
    if options.text is not None and not options.text.exists():
        raise ConfigError("--text", f"{options.text} does not exist", "name a text")
    if options.tokenizer is not None and not options.tokenizer.is_file():
        raise ConfigError("--tokenizer", f"{options.tokenizer} is no file", "give the swarms' tokenizer.json")
    if options.weights is not None and not options.weights.is_dir():
        fix = "give that of the trained weights that the swarms started from"
        raise ConfigError("--weights", f"{options.weights} is no folder", fix)
