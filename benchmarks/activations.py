"""What `trainer.checkpoint_activations` saves and costs: bytes kept for the backward pass, processor time of a step.

    python -m benchmarks.activations [--layers N] [--width N] [--context N] [--batch N] [--repeats N]
        [--json FILE]

One thread on the CPU; the two ways take turns, and the first turn of each is not counted. Bytes are those of all
tensors that the forward pass leaves behind, without the parameters. Where blocks are computed again, the backward pass
has those of one block beside them at any time.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from shoal.node.bench.commands import describe_machine
from shoal.node.training.local_parameters import load_parameters
from shoal.node.training.model import Gpt
from shoal.node.training.tasks import Task as TrainedTask
from shoal.node.training.tasks import describe, make_task
from shoal.protocol.layout import initialise
from shoal.protocol.manifest import Task


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.activations", description=__doc__.splitlines()[0])
    for name, value in (("layers", 6), ("width", 256), ("context", 256), ("batch", 8), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default {value}")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    sizes = {"layers": options.layers, "heads": 4, "width": options.width, "context": options.context}
    choice = Task(kind="byte_gpt", options=json.dumps(sizes))
    task, layout = make_task(choice), describe(choice)
    model = task.build_model()
    assert isinstance(model, Gpt)
    load_parameters(model, initialise(layout, 0))
    batch = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (options.batch, options.context + 1)))
    kept = {False: 0, True: 0}
    times_s: dict[bool, list[float]] = {False: [], True: []}
    for turn in range(options.repeats + 1):
        for again in (False, True):
            model.recomputes_blocks = again
            kept[again] = count_kept_bytes(task, model, batch)
            began_s = time.process_time()
            task.loss(model, batch).backward()  # type: ignore[no-untyped-call]  # torch leaves it so
            if turn:
                times_s[again].append(time.process_time() - began_s)
            model.zero_grad()
    print(f"{layout.elements / 1e6:.1f} M parameters")
    figures: dict[str, object] = {"parameters": layout.elements}
    for again, name in ((False, "kept"), (True, "computed again")):
        median_s = statistics.median(times_s[again])
        print(f"{name}: {kept[again] / 1e6:.1f} MB, {median_s:.2f} s a step (median of {len(times_s[again])})")
        figures[name] = {"kept_bytes": kept[again], "steps_s": times_s[again], "median_s": median_s}
    if options.json:
        options.json.write_text(json.dumps({**describe_machine(), **figures}, indent=2) + "\n")


def count_kept_bytes(task: TrainedTask, model: Gpt, batch: torch.Tensor) -> int:
    """What the forward pass leaves behind for the backward pass, each storage once."""
    parameters = {one.untyped_storage().data_ptr() for one in model.parameters()}
    kept: dict[int, int] = {}
    tensors = []  # alive until the end, so that no address is used twice

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
            tensors.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        task.loss(model, batch)
    return sum(kept.values())


if __name__ == "__main__":
    main()
