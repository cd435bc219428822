"""What a step costs with several processes behind one trainer, and with a compiled loss.

    OMP_WAIT_POLICY=PASSIVE python -m benchmarks.ranks [--layers N] [--width N] [--context N] [--batch N]
        [--threads N] [--steps N] [--json FILE]

On the CPU, with so many threads for all processes together; they sleep while they wait, as the daemon has it. One and
two processes take turns of a step. The compiled loss is made in a new folder, then once more in a new process that
finds it there.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from shoal.node.bench.commands import describe_machine
from shoal.node.training.compiled import open_compiled
from shoal.node.training.loop import InnerLoop
from shoal.node.training.messages import Begin, Start, Work
from shoal.node.training.ranks import Ranks
from shoal.node.training.tasks import describe
from shoal.protocol.identity import PeerId
from shoal.protocol.layout import initialise
from shoal.protocol.manifest import Task, Training


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ranks", description=__doc__.splitlines()[0])
    sizes = (("layers", 4), ("width", 128), ("context", 128), ("batch", 16), ("threads", 2), ("steps", 20))
    for name, value in sizes:
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default {value}")
    parser.add_argument("--compiled", type=Path, help="only compile, into this folder, and print two times")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    if options.steps < 2:
        parser.error("--steps: use 2 or more; the first is told apart from the others")
    if options.compiled:
        open_compiled(options.compiled)
        first_s, *later_s = measure(make_loop(options, compiled=str(options.compiled)), options.steps)
        print(json.dumps({"first_s": first_s, "median_s": statistics.median(later_s)}))
        return
    with tempfile.TemporaryDirectory() as folder:
        figures: dict[str, object] = {"processes": compare_processes(options, Path(folder))}
        command = [sys.executable, "-m", "benchmarks.ranks", "--compiled", f"{folder}/compiled"]
        command += [word for name, _ in sizes for word in (f"--{name}", str(getattr(options, name)))]
        for name in ("nothing kept", "kept from before"):
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found = json.loads(done.stdout)
            print(f"compiled, {name}: first step {found['first_s']:.1f} s, then {found['median_s']:.3f} s a step")
            figures[f"compiled, {name}"] = found
    if options.json:
        options.json.write_text(json.dumps({**describe_machine(), **figures}, indent=2) + "\n")


def compare_processes(options: argparse.Namespace, folder: Path) -> dict[int, list[float]]:
    """One and two processes, in turns of a step each; the seconds of each step."""
    start = make_start(options, rendezvous=str(folder / "rendezvous"))
    ranks = Ranks(start, 2, lambda detail: print(detail, file=sys.stderr))
    try:
        two, one = make_loop(options, ranks, rendezvous=start.rendezvous), make_loop(options)
        times_s: dict[int, list[float]] = {1: [], 2: []}
        for turn in range(options.steps + 1):
            for count, loop in ((1, one), (2, two)):
                torch.set_num_threads(max(1, options.threads // count))
                (step_s,) = measure(loop, 1)
                if turn:
                    times_s[count].append(step_s)
        print(f"{describe(start.work.task).elements / 1e6:.2f} M parameters, {options.threads} threads in all")
        for count, found in times_s.items():
            print(f"{count} process(es): {statistics.median(found):.3f} s a step (median of {len(found)})")
        return times_s
    finally:
        ranks.close()


def make_start(options: argparse.Namespace, rendezvous: str | None = None, compiled: str | None = None) -> Start:
    shape = {"layers": options.layers, "heads": 4, "width": options.width, "context": options.context}
    task = Task(kind="byte_gpt", options=json.dumps(shape))
    training = Training(inner_steps=100_000, round_time_s=86_400.0, batch_size=options.batch)
    work = Work(task=task, training=training, layout_digest=describe(task).digest, seed=1, peer=PeerId(bytes(32)))
    return Start(work=work, device="cpu", threads=options.threads, text=None, rendezvous=rendezvous, compiled=compiled)


def make_loop(options: argparse.Namespace, ranks: Ranks | None = None, **changes: str | None) -> InnerLoop:
    start = make_start(options, **changes)
    layout = describe(start.work.task)
    memory = np.zeros((2, layout.elements), np.float32)
    memory[0] = initialise(layout, 1)
    loop = InnerLoop(start, memory, ranks)
    list(loop.handle(Begin(round=1, adopt=True), time.monotonic()))
    return loop


def measure(loop: InnerLoop, steps: int) -> list[float]:
    """The seconds of each step."""
    times_s = []
    for _ in range(steps):
        began_s = time.monotonic()
        list(loop.step(began_s))
        times_s.append(time.monotonic() - began_s)
    return times_s


if __name__ == "__main__":
    main()
