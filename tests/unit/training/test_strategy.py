"""DiLoCo's inner optimizer and merge, against plain references."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from shoal.node.training.local_parameters import included_ranges
from shoal.node.training.optimizers import ADAM_BETAS
from shoal.node.training.strategy import DiLoCo
from shoal.protocol.layout import Layout, TensorSpec, make_layout
from shoal.protocol.manifest import Training
from shoal.protocol.quorum import make_bitmap

TRAINING = Training(learning_rate=0.01, warmup_steps=4, weight_decay=0.1, gradient_clip=1.0)
LAYOUT: Layout = make_layout((TensorSpec(name="weight", shape=(5, 7)), TensorSpec(name="bias", shape=(5,))))
ELEMENTS = 40


def make(training: Training = TRAINING) -> tuple[nn.Linear, DiLoCo]:
    model = nn.Linear(7, 5)
    strategy = DiLoCo(model, LAYOUT, training)
    strategy.adopt(np.linspace(-1, 1, ELEMENTS, dtype=np.float32))
    return model, strategy


def read_local(strategy: DiLoCo) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    local = np.full(ELEMENTS, np.nan, dtype=np.float32)
    assert strategy.export(local)
    return local


def quadratic(model: nn.Linear) -> torch.Tensor:
    return sum(((parameter - 3.0) ** 2).sum() for parameter in model.parameters())  # type: ignore[return-value]


def take_step(strategy: DiLoCo, *losses: torch.Tensor) -> bool:
    for loss in losses:
        strategy.gather(loss)
    return strategy.step(torch.stack(losses).sum().detach(), 1)


def test_steps_are_clipped_adamw_with_warm_up() -> None:
    model, strategy = make()
    values = read_local(strategy).astype(np.float64)
    decay = np.where(np.arange(ELEMENTS) < 35, 0.1, 0.0)  # of the weight, not of the bias
    first, second = np.zeros(ELEMENTS), np.zeros(ELEMENTS)
    for step in range(1, 8):
        assert take_step(strategy, quadratic(model))
        gradient = 2.0 * (values - 3.0)
        gradient /= max(1.0, float(np.linalg.norm(gradient)))
        rate = 0.01 * min(1.0, step / 4)
        first = ADAM_BETAS[0] * first + (1.0 - ADAM_BETAS[0]) * gradient
        second = ADAM_BETAS[1] * second + (1.0 - ADAM_BETAS[1]) * gradient**2
        direction = (first / (1.0 - ADAM_BETAS[0] ** step)) / (np.sqrt(second / (1.0 - ADAM_BETAS[1] ** step)) + 1e-8)
        values = values * (1.0 - rate * decay) - rate * direction
    assert read_local(strategy) == pytest.approx(values, abs=1e-5)


@pytest.mark.parametrize("part_elements", [1, 3, 8, 35, 39, 40, 1000])
def test_included_parts_adopt_the_base_and_the_others_stay(part_elements: int) -> None:
    parts = -(-ELEMENTS // part_elements)
    generator = np.random.Generator(np.random.Philox(part_elements))
    for _ in range(5):
        model, strategy = make()
        take_step(strategy, quadratic(model))
        local = read_local(strategy)
        base = generator.random(ELEMENTS, dtype=np.float32)
        chosen = frozenset(np.flatnonzero(generator.random(parts) < 0.5).tolist())
        strategy.merge(base, make_bitmap(chosen, parts), part_elements, 0.5)
        expected = local.copy()
        for part in chosen:
            span = slice(part * part_elements, (part + 1) * part_elements)
            expected[span] = base[span]
        assert (read_local(strategy) == expected).all()


def test_runs_of_parts_are_joined_and_bits_past_the_end_mean_nothing() -> None:
    assert list(included_ranges(b"\xff", 16, 40)) == [(0, 40)]
    assert list(included_ranges(b"\x05", 16, 40)) == [(0, 16), (32, 40)]
    assert list(included_ranges(b"", 16, 40)) == []


def test_the_inner_optimizer_survives_a_merge_and_not_a_restart() -> None:
    base = np.zeros(ELEMENTS, dtype=np.float32)
    strides = {}
    for name in ("merge", "restart"):
        model, strategy = make(replace(TRAINING, warmup_steps=100))
        for _ in range(50):
            take_step(strategy, quadratic(model))
        if name == "merge":
            strategy.merge(base, b"\x01", ELEMENTS, 0.5)
        else:
            strategy.restart(base)
        assert (read_local(strategy) == 0.0).all()
        take_step(strategy, quadratic(model))
        strides[name] = float(np.abs(read_local(strategy)).max())
    assert strides["merge"] > 10 * strides["restart"], "a restart warms up again"


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_changes_nothing(poison: float) -> None:
    model, strategy = make()
    take_step(strategy, quadratic(model))
    before = read_local(strategy)
    assert not take_step(strategy, quadratic(model) * poison)
    assert (read_local(strategy) == before).all()
    assert take_step(strategy, quadratic(model)), "and the optimizer still works"
    assert (read_local(strategy) != before).all()


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    model, strategy = make()
    before = read_local(strategy)
    # sqrt at 0 has a finite value and an infinite slope.
    assert not take_step(strategy, ((model.weight - model.weight.detach()).abs().sum()).sqrt())
    assert (read_local(strategy) == before).all()


def test_a_parameter_that_takes_no_part_in_a_batch_stays_where_it_is() -> None:
    model, strategy = make()
    before = read_local(strategy)
    assert take_step(strategy, (model.weight**2).sum())
    changed = read_local(strategy) != before
    assert changed[:35].all()
    assert not changed[35:].any()


def test_losses_that_are_gathered_make_the_step_of_their_sum() -> None:
    ends = []
    for shares in ((1.0,), (0.25, 0.75)):
        model, strategy = make()
        for _ in range(3):
            assert take_step(strategy, *(quadratic(model) * share for share in shares))
        ends.append(read_local(strategy))
    assert ends[1] == pytest.approx(ends[0], abs=1e-6)


def test_one_loss_of_several_that_is_not_finite_changes_nothing() -> None:
    model, strategy = make()
    before = read_local(strategy)
    assert not take_step(strategy, quadratic(model), quadratic(model) * math.nan)
    assert (read_local(strategy) == before).all()


def test_what_was_dropped_is_in_no_step() -> None:
    ends = []
    for gathers_first in (True, False):
        model, strategy = make()
        if gathers_first:
            strategy.gather((model.weight**3).sum())
            strategy.drop()
        take_step(strategy, quadratic(model))
        ends.append(read_local(strategy))
    assert (ends[0] == ends[1]).all()


def test_a_restart_takes_the_steps_of_a_new_start() -> None:
    ends = []
    for is_new in (True, False):
        model, strategy = make()
        base = read_local(strategy)
        if not is_new:
            take_step(strategy, quadratic(model))
            strategy.restart(base)
        for _ in range(5):
            take_step(strategy, quadratic(model))
        ends.append(read_local(strategy))
    assert (ends[0] == ends[1]).all()


def test_parameters_that_are_not_finite_are_not_exported() -> None:
    model, strategy = make()
    with torch.no_grad():
        model.bias[3] = math.nan
    local = np.full(ELEMENTS, 7.0, dtype=np.float32)
    assert not strategy.export(local)
    assert (local == 7.0).all()
