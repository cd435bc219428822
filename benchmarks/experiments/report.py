"""What an experiment shows: a Markdown table, a JSON log and a plot.

Every run stands in the table beside the mean: two seeds tell whether a difference is one.
"""

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from benchmarks.experiments.arms import Arm, Run
from benchmarks.experiments.churn import ChurnArm, ChurnRun


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
        rounds = "–" if arm.synchronous else str(max(run.rounds for run in own))
        sent = "–" if arm.synchronous else f"{own[0].contribution_bytes / 1e3:.1f}"
        shown = "diverged" if mean is None else f"{mean:.4f}"
        apart = "–" if mean is None or first is None else f"{mean / first - 1:+.2%}".replace("%", " %")
        each = ", ".join(_show_run(run) for run in own)
        tokens = max(run.points[-1].tokens for run in own) / 1e6
        lines.append(f"| {arm.name} | {tokens:.2f} | {rounds} | {sent} | {shown} | {each} | {apart} |")
    return "\n".join(lines)


def format_times(arms: Sequence[Arm], runs: Sequence[Run]) -> str:
    """One row for each arm with speeds that has a run. The times are those after which the loss was for the first time
    what the first arm's was at its end, with the same seed."""
    goals = {run.seed: run.points[-1].loss for run in runs if run.arm == arms[0].name and not run.problem}
    lines = [
        "| arm | M tokens | rounds | held-out loss | each seed | to the first | s to the first one's loss, each seed |",
        "|---|---|---|---|---|---|---|",
    ]
    first = find_mean([run for run in runs if run.arm == arms[0].name])
    for arm in arms:
        own = [run for run in runs if run.arm == arm.name]
        if not own:
            continue
        mean = find_mean(own)
        shown = "diverged" if mean is None else f"{mean:.4f}"
        apart = "–" if mean is None or first is None else f"{mean / first - 1:+.2%}".replace("%", " %")
        tokens, rounds = max(run.points[-1].tokens for run in own) / 1e6, max(run.rounds for run in own)
        each, times = (", ".join(show(run) for run in own) for show in (_show_run, lambda run: _show_time(run, goals)))
        lines.append(f"| {arm.name} | {tokens:.2f} | {rounds} | {shown} | {each} | {apart} | {times} |")
    return "\n".join(lines)


def format_churn(arms: Sequence[ChurnArm], runs: Sequence[ChurnRun]) -> str:
    """One row for each arm that has a run; goodput is the share of the steps of workers that never die."""
    lines = [
        "| arm | deaths | workers up | rounds | goodput | each seed | of what those up could do |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm in arms:
        own = [run for run in runs if run.arm == arm.name]
        if not own:
            continue
        deaths, rounds = (
            ", ".join(str(one) for one in of) for of in zip(*((r.deaths, r.rounds) for r in own), strict=True)
        )
        rounds = rounds if arm.checkpoint_s is None else "–"
        up, goodput = (float(np.mean(of)) for of in zip(*((run.alive, run.goodput) for run in own), strict=True))
        each = ", ".join(f"{run.goodput:.3f}" for run in own)
        lines.append(f"| {arm.name} | {deaths} | {up:.3f} | {rounds} | {goodput:.3f} | {each} | {goodput / up:.3f} |")
    return "\n".join(lines)


def find_mean(runs: Sequence[Run]) -> float | None:
    """The mean of the last losses; None where a run diverged, or where there is none."""
    if not runs or any(run.problem for run in runs):
        return None
    return float(np.mean([run.points[-1].loss for run in runs]))


def write_log(path: Path, name: str, arms: Sequence[Arm | ChurnArm], runs: Sequence[Run | ChurnRun]) -> None:
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
    """The losses by tokens, or by simulated time where arms have speeds, the mean of the seeds, as SVG or PNG by the
    file's name; False, and nothing drawn, where matplotlib is not installed (it comes with the extra `plot`)."""
    in_time = any(arm.speeds for arm in arms)
    lines = []
    for arm in arms:
        # A run that diverged is drawn as far as it went, by itself.
        own = [run for run in runs if run.arm == arm.name]
        whole = [run for run in own if not run.problem] or own
        if not whole:
            continue
        shown = range(1, min(len(run.points) for run in whole))
        across = [point.time_s if in_time else point.tokens / 1e6 for point in whole[0].points]
        losses = [float(np.mean([run.points[at].loss for run in whole])) for at in shown]
        lines.append((arm.name, [across[at] for at in shown], losses))
    across_name = "simulated seconds" if in_time else "million tokens, all workers together"
    return _draw_lines(path, title, across_name, "held-out loss, nats a byte", lines)


def draw_churn(path: Path, title: str, arms: Sequence[ChurnArm], runs: Sequence[ChurnRun]) -> bool:
    """Goodput by how long a worker lives, a line for each side, likewise."""
    sides: dict[str, tuple[list[float], list[float]]] = {}
    for arm in arms:
        own = [run.goodput for run in runs if run.arm == arm.name]
        if own and arm.mtbf_rounds is not None:
            lives, goodputs = sides.setdefault(arm.name.rsplit(",", 1)[0], ([], []))
            lives.append(arm.mtbf_rounds)
            goodputs.append(float(np.mean(own)))
    lines = [(name, *line) for name, line in sides.items()]
    return _draw_lines(path, title, "rounds between the deaths of a worker, mean", "goodput", lines)


def _draw_lines(
    path: Path, title: str, across: str, up: str, lines: Sequence[tuple[str, list[float], list[float]]]
) -> bool:
    """Each line with its name; False without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, xs, ys in lines:
        axes.plot(xs, ys, marker=".", label=name)
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.set_title(title, fontsize="medium")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=120)
    return True


def _show_run(run: Run) -> str:
    last = run.points[-1]
    return f"diverged after {last.steps} steps" if run.problem else f"{last.loss:.4f}"


def _show_time(run: Run, goals: Mapping[int, float]) -> str:
    """When the loss was first at its seed's goal."""
    goal = goals.get(run.seed, -np.inf)
    return next((f"{point.time_s:.0f}" for point in run.points if point.loss <= goal), "not reached")
