"""Blocks that are computed again in the backward pass: the same training from less memory."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from shoal.node.training.gpt_config import parse_options, read_gpt_config
from shoal.node.training.local_parameters import load_parameters
from shoal.node.training.loop import InnerLoop
from shoal.node.training.messages import Begin, Ready
from shoal.node.training.model import Gpt
from shoal.node.training.tasks import describe, make_task
from shoal.protocol.errors import ConfigError
from shoal.protocol.layout import initialise
from shoal.protocol.manifest import Task
from tests.unit.training.tiny import TRAINING, make_memory, make_start, make_work

DEEP = Task(kind="byte_gpt", options=json.dumps({"layers": 4, "heads": 2, "width": 32, "context": 32}))


def compute_gradients(recomputes: bool) -> tuple[float, list[torch.Tensor], int]:
    """The loss of a batch, its gradients, and how many bytes were kept for the backward pass."""
    task = make_task(DEEP)
    model = task.build_model()
    assert isinstance(model, Gpt)
    layout = describe(DEEP)
    start = initialise(layout, 3)
    start += np.random.default_rng(3).normal(0, 0.02, start.size).astype(np.float32)  # no projection is zero
    load_parameters(model, start)
    model.recomputes_blocks = recomputes
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    batch = torch.from_numpy(np.random.default_rng(4).integers(0, 256, (8, 33)))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = task.loss(model, batch)
    loss.backward()
    return loss.item(), [one.grad for one in model.parameters() if one.grad is not None], sum(kept.values())


def test_gradients_are_the_same_to_the_bit_and_less_is_kept() -> None:
    (loss, gradients, kept), (loss_again, again, kept_again) = (compute_gradients(one) for one in (False, True))
    assert loss == loss_again
    layers = read_gpt_config(parse_options(DEEP.options)).layers
    assert len(gradients) == len(again) == 4 * layers + 2
    for one, other in zip(gradients, again, strict=True):
        assert one.abs().sum() > 0
        assert torch.equal(one, other)
    assert kept_again < kept / 3


def test_the_model_looks_at_held_out_data_as_before() -> None:
    task = make_task(DEEP)
    model = task.build_model()
    load_parameters(model, initialise(describe(DEEP), 3))
    batch = torch.zeros((1, 33), dtype=torch.int64)
    with torch.no_grad():
        plain = task.loss(model, batch)
        model.recomputes_blocks = True
        assert torch.equal(task.loss(model, batch), plain)


@pytest.mark.parametrize("micro_batch", [0, 3])
def test_a_round_ends_with_the_same_parameters(micro_batch: int) -> None:
    ends = []
    for wanted in (False, True):
        memory = make_memory()
        start = replace(make_start(), checkpoint_activations=wanted, micro_batch=micro_batch)
        loop = InnerLoop(start, memory)
        assert not list(loop.handle(Begin(round=1, adopt=True), 0.0))
        reports = [report for _ in range(TRAINING.inner_steps) for report in loop.step(0.0)]
        assert isinstance(reports[-1], Ready)
        ends.append(memory[1].copy())
    assert np.array_equal(*ends) and np.isfinite(ends[0]).all()


def test_a_task_whose_model_cannot_do_it_is_refused_by_name() -> None:
    digits = Task(kind="digits")
    work = make_work(TRAINING, {"task": digits, "layout_digest": describe(digits).digest})
    memory = np.zeros((2, describe(digits).elements), np.float32)
    start = replace(make_start(work), text=None, checkpoint_activations=True)
    with pytest.raises(ConfigError, match=r"trainer\.checkpoint_activations: is for byte_gpt, .* digits"):
        InnerLoop(start, memory)
