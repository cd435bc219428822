"""Inner optimizers against references: numpy for moments, singular value decompositions for Muon."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from shoal.node.training.loop import InnerLoop
from shoal.node.training.messages import EVERYTHING, Begin, Ready
from shoal.node.training.optimizers import (
    ADAM_BETAS,
    ADAM_EPSILON,
    ADAM_RMS,
    INNER_OPTIMIZERS,
    MUON_MOMENTUM,
    NEWTON_SCHULZ,
    NEWTON_SCHULZ_STEPS,
    SLOW_BETA,
    SLOW_SHARE,
    AdamW,
    InnerOptimizer,
    MtDao,
    Muon,
    Named,
    orthogonalise,
)
from shoal.node.training.strategy import load_tensors
from shoal.protocol import manifest
from shoal.protocol.layout import TensorSpec
from shoal.protocol.manifest import COSINE, MUON, Training
from tests.unit.training.tiny import TRAINING, layout, make_memory, make_start, make_work

PLAIN = Training(weight_decay=0.1)
RATE = 0.01
SHAPES = {"embedding.weight": (9, 4), "blocks.0.mlp_in.weight": (12, 4), "blocks.0.gain": (12,), "head.weight": (9, 4)}


def make(shapes: dict[str, tuple[int, ...]] = SHAPES) -> list[Named]:
    generator = torch.Generator().manual_seed(1)
    return [
        (TensorSpec(name=name, shape=shape), nn.Parameter(torch.randn(shape, generator=generator)))
        for name, shape in shapes.items()
    ]


def draw(shape: Sequence[int], number: int) -> Tensor:
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(1000 + number))


def run(optimizer: InnerOptimizer, parameters: Sequence[Named], steps: range) -> None:
    """Steps down gradients that are the same for every run."""
    for step in steps:
        for number, (_, parameter) in enumerate(parameters):
            assert parameter.grad is not None, "the optimizer has made it"
            parameter.grad.copy_(draw(parameter.shape, 10 * step + number))
        optimizer.step(RATE)


def values(parameters: Sequence[Named]) -> dict[str, Tensor]:
    return {spec.name: parameter.detach().clone() for spec, parameter in parameters}


def test_every_optimizer_of_the_manifest_is_in_the_table() -> None:
    assert set(INNER_OPTIMIZERS) == set(manifest.INNER_OPTIMIZERS)


@pytest.mark.parametrize("name", INNER_OPTIMIZERS)
def test_the_tensors_are_the_whole_state_and_zeros_are_a_new_one(name: str) -> None:
    parameters = make()
    first = INNER_OPTIMIZERS[name](parameters, PLAIN)
    assert not any(one.any() for one in first.tensors().values())
    run(first, parameters, range(3))
    saved, stood = {key: one.clone() for key, one in first.tensors().items()}, values(parameters)
    run(first, parameters, range(3, 6))

    again = make()
    second = INNER_OPTIMIZERS[name](again, PLAIN)
    assert load_tensors(second.tensors(), saved)
    with torch.no_grad():
        for spec, parameter in again:
            parameter.copy_(stood[spec.name])
    run(second, again, range(3, 6))
    assert all(torch.equal(one, values(again)[key]) for key, one in values(parameters).items())


@pytest.mark.parametrize("name", INNER_OPTIMIZERS)
def test_every_optimizer_finds_the_bottom_of_a_bowl(name: str) -> None:
    parameters = make()
    optimizer = INNER_OPTIMIZERS[name](parameters, replace(PLAIN, weight_decay=0.0))

    def height() -> float:
        return sum(float(parameter.detach().square().sum()) for _, parameter in parameters)

    with torch.no_grad():
        for _, parameter in parameters:
            parameter.mul_(0.3)
    before = height()
    for _ in range(300):
        for _, parameter in parameters:
            assert parameter.grad is not None
            parameter.grad.copy_(2.0 * parameter.detach())
        optimizer.step(RATE)
    assert height() < 0.05 * before


@pytest.mark.parametrize("name", INNER_OPTIMIZERS)
def test_a_step_without_a_gradient_only_decays_what_is_a_matrix(name: str) -> None:
    parameters = make()
    before = values(parameters)
    INNER_OPTIMIZERS[name](parameters, PLAIN).step(RATE)
    for key, one in values(parameters).items():
        kept = 1.0 - RATE * 0.1 if one.dim() >= 2 else 1.0
        assert torch.allclose(one, before[key] * kept, rtol=1e-6, atol=0.0), key


# -- mtdao -----------------------------------------------------------------------------------------------------------


def test_mtdao_mixes_a_slow_momentum_with_the_gradient() -> None:
    parameters = make()
    stood = {key: one.double().numpy() for key, one in values(parameters).items()}
    run(MtDao(parameters, PLAIN), parameters, range(7))
    for number, (spec, parameter) in enumerate(parameters):
        value, slow, second = stood[spec.name], np.zeros(spec.shape), np.zeros(spec.shape)
        for step in range(7):
            gradient = draw(spec.shape, 10 * step + number).double().numpy()
            slow = SLOW_BETA * slow + (1.0 - SLOW_BETA) * gradient
            second = ADAM_BETAS[1] * second + (1.0 - ADAM_BETAS[1]) * gradient**2
            mean, square = slow / (1.0 - SLOW_BETA ** (step + 1)), second / (1.0 - ADAM_BETAS[1] ** (step + 1))
            direction = ((1.0 - SLOW_SHARE) * gradient + SLOW_SHARE * mean) / (np.sqrt(square) + ADAM_EPSILON)
            value = value * (1.0 - RATE * (0.1 if len(spec.shape) >= 2 else 0.0)) - RATE * direction
        assert parameter.detach().numpy() == pytest.approx(value, abs=2e-5)


def test_mtdao_takes_no_more_memory_than_adamw() -> None:
    sizes = [sum(one.nbytes for one in kind(make(), PLAIN).tensors().values()) for kind in (MtDao, AdamW)]
    assert sizes[0] == sizes[1]


# -- muon ------------------------------------------------------------------------------------------------------------


def make_matrix(rows: int, columns: int, singular: Tensor) -> Tensor:
    left, _ = torch.linalg.qr(draw((rows, rows), 1))
    right, _ = torch.linalg.qr(draw((columns, columns), 2))
    return (left[:, : len(singular)] * singular) @ right[: len(singular)]


def polish(matrix: Tensor) -> Tensor:
    """What the iteration makes of the singular values, computed on these alone, in float64."""
    left, singular, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    singular = singular / singular.norm()
    a, b, c = NEWTON_SCHULZ
    for _ in range(NEWTON_SCHULZ_STEPS):
        singular = a * singular + b * singular**3 + c * singular**5
    return (left * singular) @ right


@pytest.mark.parametrize(("rows", "columns"), [(16, 16), (48, 16), (16, 48), (1, 20), (20, 1)])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_an_orthogonalised_matrix_has_its_directions_and_singular_values_near_1(
    rows: int, columns: int, size: float
) -> None:
    matrix = make_matrix(rows, columns, size * torch.logspace(0, -1.5, min(rows, columns)))
    made = orthogonalise(matrix)
    singular = torch.linalg.svdvals(made)
    assert float(singular.min()) > 0.6 and float(singular.max()) < 1.3
    assert torch.allclose(made.double(), polish(matrix), atol=1e-3)


def test_a_matrix_of_zeros_stays_one() -> None:
    assert not orthogonalise(torch.zeros(3, 5)).any()


def test_muon_orthogonalises_the_momentum_of_hidden_weights() -> None:
    parameters = make()
    value = values(parameters)["blocks.0.mlp_in.weight"].double()
    run(Muon(parameters, PLAIN), parameters, range(5))
    momentum = torch.zeros_like(value)
    for step in range(5):
        gradient = draw(value.shape, 10 * step + 1).double()
        momentum = MUON_MOMENTUM * momentum + gradient
        ahead = gradient + MUON_MOMENTUM * momentum
        value = value * (1.0 - RATE * 0.1) - RATE * ADAM_RMS * math.sqrt(12) * polish(ahead)
    assert torch.allclose(values(parameters)["blocks.0.mlp_in.weight"].double(), value, atol=1e-4)


def test_muon_leaves_embeddings_heads_and_vectors_to_adamw() -> None:
    ends = []
    for kind in (Muon, AdamW):
        parameters = make()
        run(kind(parameters, PLAIN), parameters, range(5))
        ends.append(values(parameters))
    same = {key for key, one in ends[0].items() if torch.equal(one, ends[1][key])}
    assert same == set(SHAPES) - {"blocks.0.mlp_in.weight"}


def test_the_hidden_weights_of_the_byte_level_gpt_are_those_of_its_blocks() -> None:
    assert {spec.name.split(".")[0] for spec in layout().tensors if spec.is_hidden} == {"blocks"}
    assert {spec.name for spec in layout().tensors if not spec.is_hidden} == {"embedding.weight", "head.weight"}


def test_muon_takes_steps_as_long_as_adamws_whatever_the_shape() -> None:
    for shape in ((8, 8), (64, 8), (8, 64)):
        parameters = make({"blocks.0.weight": shape})
        before = values(parameters)["blocks.0.weight"]
        run(Muon(parameters, replace(PLAIN, weight_decay=0.0)), parameters, range(1))
        stride = (values(parameters)["blocks.0.weight"] - before).square().mean().sqrt()
        assert float(stride) == pytest.approx(RATE * ADAM_RMS, rel=0.3)


def test_muon_takes_a_kernel_as_a_matrix_of_its_first_dimension_by_the_others() -> None:
    kernel, matrix = make({"layers.0.kernel": (8, 2, 3)}), make({"layers.0.kernel": (8, 6)})
    with torch.no_grad():
        matrix[0][1].copy_(kernel[0][1].flatten(1))
    for parameters in (kernel, matrix):
        optimizer = Muon(parameters, PLAIN)
        for step in range(3):
            gradient = parameters[0][1].grad
            assert gradient is not None
            gradient.copy_(draw((8, 6), step).view_as(gradient))
            optimizer.step(RATE)
    assert torch.equal(kernel[0][1].flatten(1), matrix[0][1])


# -- in the loop -----------------------------------------------------------------------------------------------------


def find_ready(loop: InnerLoop) -> Ready:
    while True:
        for report in loop.step(0.0):
            if isinstance(report, Ready):
                return report


@pytest.mark.parametrize("name", INNER_OPTIMIZERS)
def test_a_restart_goes_on_to_the_same_bits(name: str, tmp_path: Path) -> None:
    training = replace(TRAINING, inner_optimizer=name, inner_steps=8, schedule=COSINE, schedule_rounds=6)
    ends = []
    for restarts in (False, True):
        start = replace(make_start(make_work(training)), checkpoints=str(tmp_path / str(restarts)))
        memory = make_memory()
        loop = InnerLoop(start, memory)
        list(loop.handle(Begin(round=3, adopt=True), 0.0))
        for _ in range(5):
            assert not list(loop.step(0.0))
        if restarts:
            loop.leave(0.0)
            loop = InnerLoop(start, memory)
            assert loop.started().resumed.extent == EVERYTHING
            list(loop.handle(Begin(round=3, adopt=False), 0.0))
        assert find_ready(loop).batches_done == 8
        ends.append(memory[1].copy())
    assert np.array_equal(ends[0], ends[1])


@pytest.mark.parametrize("name", INNER_OPTIMIZERS)
def test_the_loss_falls_with_every_optimizer_at_the_same_learning_rate(name: str) -> None:
    memory = make_memory()
    training = replace(TRAINING, inner_optimizer=name, inner_steps=30)
    loop = InnerLoop(make_start(make_work(training)), memory)
    losses = []
    for round in (1, 2):
        list(loop.handle(Begin(round=round, adopt=False), 0.0))
        losses.append(find_ready(loop).loss_mean)
    assert losses[1] < 3.6 < losses[0]


def test_another_optimizer_does_not_go_on_from_a_checkpoint(tmp_path: Path) -> None:
    start = replace(make_start(), checkpoints=str(tmp_path))
    loop = InnerLoop(start, make_memory())
    list(loop.handle(Begin(round=1, adopt=True), 0.0))
    find_ready(loop)
    other = replace(start, work=make_work(replace(TRAINING, inner_optimizer=MUON)))
    assert InnerLoop(other, make_memory()).started().resumed.extent != EVERYTHING
