"""What an experiment shows: a Markdown table, a JSON log and a plot of the losses by tokens.

Every run stands in the table beside the mean: two seeds tell whether a difference is one.
"""

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from benchmarks.experiments.arms import Arm, Run


def format_table(arms: Sequence[Arm], runs: Sequence[Run]) -> str:
    """One row for each arm that has a run; losses in nats a byte, and the difference to the first arm in percent."""
    lines = [
        "| arm | M tokens | rounds | kB a worker and round | held-out loss | each seed | to the first |",
        "|---|---|---|---|---|---|---|",
    ]
    first: float | None = None
    for number, arm in enumerate(arms):
        own = [run for run in runs if run.arm == arm.name]
        if not own:
            continue
        mean = find_mean(own)
        first = mean if number == 0 else first
        rounds = "–" if arm.synchronous else str(len(arm.workers))
        sent = "–" if arm.synchronous else f"{own[0].contribution_bytes / 1e3:.1f}"
        shown = "diverged" if mean is None else f"{mean:.4f}"
        apart = "–" if mean is None or first is None else f"{mean / first - 1:+.2%}".replace("%", " %")
        each = ", ".join(_show_run(run) for run in own)
        tokens = max(run.points[-1].tokens for run in own) / 1e6
        lines.append(f"| {arm.name} | {tokens:.2f} | {rounds} | {sent} | {shown} | {each} | {apart} |")
    return "\n".join(lines)


def find_mean(runs: Sequence[Run]) -> float | None:
    """The mean of the last losses; None where a run diverged."""
    if any(run.problem for run in runs):
        return None
    return float(np.mean([run.points[-1].loss for run in runs]))


def write_log(path: Path, name: str, arms: Sequence[Arm], runs: Sequence[Run]) -> None:
    """All that is needed to do it again, and every point of every run, as JSON."""
    log = {
        "experiment": name,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "arms": [asdict(arm) for arm in arms],
        "runs": [asdict(run) for run in runs],
    }
    path.write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")


def draw_plot(path: Path, title: str, arms: Sequence[Arm], runs: Sequence[Run]) -> bool:
    """The losses by tokens, the mean of the seeds, as SVG or PNG by the file's name; False, and nothing drawn, where
    matplotlib is not installed (it comes with the extra `plot`)."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for arm in arms:
        # A run that diverged is drawn as far as it went, by itself.
        own = [run for run in runs if run.arm == arm.name]
        whole = [run for run in own if not run.problem] or own
        if not whole:
            continue
        shown = min(len(run.points) for run in whole)
        tokens = [point.tokens / 1e6 for point in whole[0].points[:shown]]
        losses = np.mean([[point.loss for point in run.points[:shown]] for run in whole], axis=0)
        axes.plot(tokens[1:], losses[1:], marker=".", label=arm.name)
    axes.set_xlabel("million tokens, all workers together")
    axes.set_ylabel("held-out loss, nats a byte")
    axes.set_title(title, fontsize="medium")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=120)
    return True


def _show_run(run: Run) -> str:
    last = run.points[-1]
    return f"diverged after {last.steps} steps" if run.problem else f"{last.loss:.4f}"
