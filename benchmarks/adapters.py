"""What adapters save: bytes of a contribution, a trainer's memory and time, beside the whole model from these weights.

    python -m benchmarks.adapters [--layers N] [--width N] [--vocabulary N] [--rank N ...] [--steps N] [--batch N]
        [--stored TYPE] [--adapters-only] [--json FILE]

A GPT-2 of the given size (that of the published one by default) with random values is written to a temporary folder, in
float32 or in the type that is given.
Each way trains in a process of its own, with one thread on the CPU, for a round of `--steps` steps, of which the first
is not timed, and a look at the base. Encoded are the pseudo-gradients of that round, part by part as a
contribution is. Memory is the process's largest resident size, with the two rows that are shared with a daemon.
"from nothing" is the model without weights to start from.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from shoal.node.bench.commands import describe_machine
from shoal.protocol.codecs import CODECS
from shoal.protocol.layout import initialise
from shoal.protocol.manifest import Task, Training

CONTEXT = 128
PART_ELEMENTS = 65_536
STORED = ("float32", "float16", "bfloat16")
CODECS_TOLD = ("fp32", "int8", "e3m0")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.adapters", description=__doc__.splitlines()[0])
    for name, value in (("layers", 12), ("width", 768), ("vocabulary", 50_257), ("steps", 3), ("batch", 2)):
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default {value}")
    parser.add_argument("--rank", type=int, nargs="+", default=[8, 16], help="default 8 16")
    parser.add_argument("--stored", choices=STORED, default=STORED[0], help="the type of the files (default float32)")
    parser.add_argument("--adapters-only", action="store_true", help="leave the two ways of the whole model out")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.steps < 2:
        parser.error("--steps: use 2 or more; the first is not counted")
    if options.way:
        print(json.dumps(measure(**json.loads(options.way))))
        return
    config = {
        "model_type": "gpt2",
        "n_layer": options.layers,
        "n_embd": options.width,
        "n_head": max(1, options.width // 64),
        "n_positions": CONTEXT,
        "vocab_size": options.vocabulary,
    }
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        digest = write_weights(Path(folder), config, options.stored)
        ways: list[tuple[str, dict[str, Any]]] = [("from nothing", {}), ("whole model", {"weights": digest})]
        ways = [] if options.adapters_only else ways
        ways += [(f"rank {rank}", {"weights": digest, "lora_rank": rank}) for rank in options.rank]
        for name, task in ways:
            way = {"task": {"config": config, "context": CONTEXT, **task}, "folder": folder}
            way |= {"steps": options.steps, "batch": options.batch}
            command = [sys.executable, "-m", "benchmarks.adapters", "--way", json.dumps(way)]
            told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
            print(name, told, flush=True)
            figures[name] = json.loads(told)
    if options.json:
        options.json.write_text(json.dumps({**describe_machine(), "ways": figures}, indent=2) + "\n")


def write_weights(folder: Path, config: dict[str, Any], stored: str) -> str:
    """As save_pretrained names and shapes them; returns the digest."""
    import torch
    from safetensors.torch import save_file

    from shoal.node.training.tasks import describe
    from shoal.node.training.tokenizer import write_digest
    from shoal.node.training.weights import WEIGHTS_FILE, WeightsFolder

    layout = describe(make_task(config=config, context=CONTEXT))
    flat = initialise(layout, 1)
    tensors = zip(layout.tensors, layout.offsets, strict=True)
    dtype = getattr(torch, stored)
    named = {
        spec.name: torch.from_numpy(flat[first : first + spec.elements].reshape(spec.shape)).to(dtype, copy=True)
        for spec, first in tensors
    }
    save_file(named, folder / WEIGHTS_FILE)
    return write_digest(WeightsFolder(folder).load(())[0])


def make_task(**options: Any) -> Task:
    return Task(kind="causal_lm", options=json.dumps(options))


def measure(task: dict[str, Any], folder: str, steps: int, batch: int) -> dict[str, Any]:
    """One round of one trainer."""
    from shoal.node.training.loop import InnerLoop
    from shoal.node.training.messages import Begin, Sample, Start, Work
    from shoal.node.training.tasks import describe
    from shoal.protocol.identity import PeerId

    layout = describe(make_task(**task))
    memory = np.zeros((2, layout.elements), dtype=np.float32)
    memory[0] = initialise(layout, 1)
    training = Training(inner_steps=steps, steps_min=1, batch_size=batch, warmup_steps=1, learning_rate=1e-4)
    work = Work(
        task=make_task(**task), training=training, layout_digest=layout.digest, seed=1, peer=PeerId(bytes([1] * 32))
    )
    text = str(Path(argparse.__file__))
    began_s = time.monotonic()
    loop = InnerLoop(Start(work=work, device="cpu", threads=1, text=text, weights=folder), memory)
    start_s = time.monotonic() - began_s
    assert not list(loop.handle(Begin(round=1, adopt=True), 0.0))
    list(loop.step(0.0))
    began_s = time.process_time()
    while loop.training:
        list(loop.step(0.0))
    step_s = (time.process_time() - began_s) / (steps - 1)
    list(loop.handle(Sample(prompt=b"def ", size_bytes=1), 0.0))  # in a second model, as it is evaluated
    change = memory[0] - memory[1]
    assert np.isfinite(change).all() and change.any()
    return {
        "parameters": layout.elements,
        "contribution_bytes": {name: count_bytes(name, change) for name in CODECS_TOLD},
        "start_s": round(start_s, 1),
        "step_s": round(step_s, 2),
        "memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 // 1_000_000,
    }


def count_bytes(codec: str, change: Any) -> int:
    """All parts of a contribution, encoded."""
    parts = range(0, change.size, PART_ELEMENTS)
    return sum(len(CODECS[codec].encode(change[first : first + PART_ELEMENTS])) for first in parts)


if __name__ == "__main__":
    main()
