"""A model and a text that train in milliseconds, for every test of the compute plane."""

import argparse
import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch

from shoal.node.training.loop import InnerLoop
from shoal.node.training.messages import Start, Work
from shoal.node.training.tasks import describe
from shoal.protocol.identity import PeerId
from shoal.protocol.layout import Layout, initialise
from shoal.protocol.manifest import Task, Training

# More threads than one only wait for each other on products this small.
torch.set_num_threads(1)

OPTIONS = {"layers": 1, "heads": 2, "width": 32, "context": 32}
TASK = Task(kind="byte_gpt", options=json.dumps(OPTIONS))
TRAINING = Training(inner_steps=4, steps_min=2, round_time_s=60.0, batch_size=8, learning_rate=3e-3, warmup_steps=5)
PEER = PeerId(b"p" * 32)
SEED = 7
# 100 kB of English and Python that every interpreter has.
TEXT = str(argparse.__file__)


@cache
def layout() -> Layout:
    return describe(TASK)


def make_work(training: Training = TRAINING, changes: Mapping[str, Any] = {}) -> Work:
    return replace(Work(task=TASK, training=training, layout_digest=layout().digest, seed=SEED, peer=PEER), **changes)


def make_start(work: Work | None = None, device: str = "cpu", text: str | None = TEXT) -> Start:
    return Start(work=work or make_work(), device=device, threads=1, text=text)


def make_memory() -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    """Base as the seed gives it; `local` is full of NaN, so that a test sees what was written."""
    memory = np.full((2, layout().elements), np.nan, dtype=np.float32)
    memory[0] = initialise(layout(), SEED)
    return memory


def make_loop(training: Training = TRAINING) -> tuple[InnerLoop, np.ndarray[tuple[int, int], np.dtype[np.float32]]]:
    memory = make_memory()
    return InnerLoop(make_start(make_work(training)), memory), memory
