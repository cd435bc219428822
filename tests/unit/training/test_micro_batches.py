"""Batches that do not fit into memory: cut, tried again, and told; what a step computes stays what it was."""

import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from shoal.node.training.loop import InnerLoop
from shoal.node.training.messages import (
    OUT_OF_MEMORY,
    TASK_FAILED,
    Begin,
    Evaluate,
    Evaluated,
    Failed,
    Ready,
    Report,
)
from shoal.node.training.micro_batches import MicroBatches, cut, is_out_of_memory, tell_next_step
from tests.unit.training.tiny import TRAINING, make_memory, make_start

BATCH = TRAINING.batch_size  # 8
GPU_ERROR = "CUDA out of memory. Tried to allocate 2.00 GiB."


def open_loop(micro_batch: int = 0) -> tuple[InnerLoop, np.ndarray[tuple[int, int], np.dtype[np.float32]]]:
    memory = make_memory()
    loop = InnerLoop(replace(make_start(), micro_batch=micro_batch), memory)
    list(loop.handle(Begin(round=1, adopt=True), 0.0))
    return loop, memory


def run_to_the_end(loop: InnerLoop) -> list[Report]:
    reports: list[Report] = []
    while loop.training:
        reports += loop.step(0.0)
    return reports


def failures(reports: list[Report]) -> list[Failed]:
    return [report for report in reports if isinstance(report, Failed)]


# -- cutting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("wanted", "sizes"), [(0, [5]), (5, [5]), (9, [5]), (2, [2, 2, 1]), (1, [1] * 5)])
def test_the_pieces_are_the_batch_and_their_shares_are_whole(wanted: int, sizes: list[int]) -> None:
    batch = torch.arange(10).view(5, 2)
    pieces = list(cut(batch, 5, MicroBatches(wanted, 5).size))
    assert [len(piece) for piece, _ in pieces] == sizes
    assert torch.equal(torch.cat([piece for piece, _ in pieces]), batch)
    assert [share for _, share in pieces] == [size / 5 for size in sizes]


def test_halving_ends_at_one_example() -> None:
    micro_batches = MicroBatches(0, 9)
    sizes = [9]
    while micro_batches.halve():
        sizes.append(micro_batches.size)
    assert sizes == [9, 5, 3, 2, 1]
    assert micro_batches.size == 1


@pytest.mark.parametrize("micro_batch", [1, 3, 7])
def test_the_gradients_of_the_pieces_add_up_to_that_of_the_batch(micro_batch: int) -> None:
    found = []
    for size in (0, micro_batch):
        loop, _ = open_loop(size)
        with torch.no_grad():  # the head starts at zero, and lets no gradient through
            loop._model.head.weight.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
        loss = loop._gather(0)
        gradients = [parameter.grad.clone() for parameter in loop._model.parameters() if parameter.grad is not None]
        found.append((loss, torch.cat([one.flatten() for one in gradients])))
    (whole_loss, whole), (loss, summed) = found
    assert float(loss) == pytest.approx(float(whole_loss), rel=1e-6)
    assert float((summed - whole).norm()) < 1e-5 * float(whole.norm())


def test_the_size_changes_nothing_but_the_rounding() -> None:
    ends = []
    for micro_batch in (0, 3):
        loop, memory = open_loop(micro_batch)
        (ready,) = run_to_the_end(loop)
        assert isinstance(ready, Ready) and (ready.steps, ready.tokens) == (4, 4 * BATCH * 32)
        ends.append((memory[1].copy(), ready.loss_mean))
    assert ends[1][1] == pytest.approx(ends[0][1], rel=1e-4)
    moved = float(np.linalg.norm(ends[0][0] - make_memory()[0]))
    assert float(np.linalg.norm(ends[1][0] - ends[0][0])) < 0.01 * moved


# -- what does not fit -----------------------------------------------------------------------------------------------


def limit_forward(loop: InnerLoop, fits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which so many examples at a time can be computed, and not one more."""
    honest: Callable[[nn.Module, Tensor], Tensor] = loop._task.loss

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        if len(batch) > fits:
            raise torch.cuda.OutOfMemoryError(GPU_ERROR)
        return honest(model, batch)

    monkeypatch.setattr(loop._task, "loss", loss)


def limit_backward(loop: InnerLoop, fits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `limit_forward`, but it is noticed when most gradients are there already, and only at the batch's second piece
    where there is one."""
    honest: Callable[[nn.Module, Tensor], Tensor] = loop._task.loss
    seen: list[int] = []

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        seen.append(len(batch))
        return honest(model, batch)

    def refuse(gradient: Tensor) -> None:
        if seen[-1] > fits and (seen[-1] == BATCH or seen[-2] == seen[-1]):
            raise torch.cuda.OutOfMemoryError(GPU_ERROR)

    monkeypatch.setattr(loop._task, "loss", loss)
    next(loop._model.parameters()).register_hook(refuse)


@pytest.mark.parametrize("limit", [limit_forward, limit_backward])
@pytest.mark.parametrize(("fits", "tries"), [(1, [4, 2, 1]), (2, [4, 2]), (5, [4])])
def test_a_batch_that_does_not_fit_is_cut_until_it_does_and_leaves_nothing_of_the_tries(
    limit: Callable[[InnerLoop, int, pytest.MonkeyPatch], None],
    fits: int,
    tries: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loop, memory = open_loop()
    limit(loop, fits, monkeypatch)
    reports = run_to_the_end(loop)
    told = failures(reports)
    assert isinstance(reports[-1], Ready) and reports[-1].batches_done == 4, "no batch is left out"
    assert [(one.reason, one.fatal) for one in told] == [(OUT_OF_MEMORY, False)] * len(tries)
    assert all(f"goes on with {size};" in one.detail for one, size in zip(told, tries, strict=True))
    assert all(one.detail.startswith("batch 0:") for one in told), "what was found stays"
    plain, expected = open_loop(tries[-1])
    run_to_the_end(plain)
    assert np.array_equal(memory[1], expected[1]), "as if it had begun with what fits"


def test_nothing_of_a_failed_try_is_held_while_the_next_one_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    loop, _ = open_loop()
    honest: Callable[[nn.Module, Tensor], Tensor] = loop._task.loss
    failed: list[weakref.ref[Tensor]] = []
    held: list[bool] = []

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        held.append(any(one() is not None for one in failed))
        made = honest(model, batch)
        if len(batch) > 2:
            failed.append(weakref.ref(made))
            raise torch.cuda.OutOfMemoryError(GPU_ERROR)
        return made

    monkeypatch.setattr(loop._task, "loss", loss)
    run_to_the_end(loop)
    assert len(failed) == 2 and held == [False] * (2 + 4 * BATCH // 2)


def test_memory_that_ends_in_the_optimizers_step_is_no_reason_to_take_it_again(monkeypatch: pytest.MonkeyPatch) -> None:
    loop, _ = open_loop()

    def step(loss: Tensor, round: int) -> bool:
        raise torch.cuda.OutOfMemoryError(GPU_ERROR)

    monkeypatch.setattr(loop._strategy, "step", step)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        list(loop.step(0.0))


def test_a_single_example_that_does_not_fit_ends_the_trainer_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    loop, memory = open_loop()
    limit_forward(loop, 0, monkeypatch)
    reports = run_to_the_end(loop)
    assert [report.fatal for report in failures(reports)] == [False, False, False, True]
    assert len(reports) == 4
    last = reports[-1]
    assert isinstance(last, Failed) and last.reason == OUT_OF_MEMORY
    assert 'set trainer.device = "cpu"' in last.detail and GPU_ERROR in last.detail
    assert np.isnan(memory[1]).all(), "nothing was handed over"


def test_the_persons_own_size_is_where_it_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    loop, _ = open_loop(2)
    limit_forward(loop, 2, monkeypatch)
    assert not failures(run_to_the_end(loop))
    loop, _ = open_loop(2)
    limit_forward(loop, 1, monkeypatch)
    (told,) = failures(run_to_the_end(loop))
    assert "2 examples at a time do not fit" in told.detail


def test_an_evaluation_is_cut_as_well_and_gives_the_same() -> None:
    losses = []
    for size in (BATCH, 3):
        loop, _ = open_loop(size)
        (report,) = loop.handle(Evaluate(), 0.0)
        assert isinstance(report, Evaluated)
        losses.append(report.loss_nats)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_an_evaluation_for_which_there_is_no_memory_costs_the_training_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    loop, _ = open_loop()
    with monkeypatch.context() as context:
        limit_forward(loop, 0, context)
        (report,) = loop.handle(Evaluate(), 0.0)
    assert isinstance(report, Failed) and (report.reason, report.fatal) == (OUT_OF_MEMORY, False)
    assert loop._evaluated is None, "its copy of the model is let go"
    assert not failures(run_to_the_end(loop)), "and no batch is cut for it"
    (report,) = loop.handle(Evaluate(), 0.0)
    assert isinstance(report, Evaluated)


def test_other_errors_are_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    loop, _ = open_loop()

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(loop._task, "loss", loss)
    (report,) = loop.step(0.0)
    assert isinstance(report, Failed) and (report.reason, report.fatal) == (TASK_FAILED, False)
    assert "shapes do not match" in report.detail


# -- whose error it is -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.cuda.OutOfMemoryError(GPU_ERROR), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_a_lack_of_memory_is_told_from_other_errors(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_the_allocator_of_the_cpu_is_understood() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert "this machine's memory" in tell_next_step(caught.value)


LIMITED = """
import resource, sys
from dataclasses import replace
from shoal.node.training.loop import InnerLoop
from shoal.node.training.messages import Begin, Failed, Ready
from tests.unit.training.tiny import TRAINING, make_memory, make_start, make_work

training = replace(TRAINING, batch_size=1024, inner_steps=1, steps_min=1)
loop = InnerLoop(make_start(make_work(training)), make_memory())
list(loop.handle(Begin(round=1, adopt=True), 0.0))
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (150 << 20), resource.RLIM_INFINITY))
reports = list(loop.step(0.0))
assert isinstance(reports[-1], Ready), reports
print(sum(isinstance(report, Failed) for report in reports), loop._micro_batches.size)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit of the address space")
def test_a_process_with_little_memory_trains_on_a_batch_that_is_larger() -> None:
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True, check=False, cwd=root)
    assert done.returncode == 0, done.stderr
    tries, size = map(int, done.stdout.split())
    assert tries >= 1 and size == 1024 >> tries
