"""What the code of a task raises: how it is told, which batch it costs, and when it ends the trainer."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from shoal.node.training.loop import FAULTS_IN_A_ROW_MAX, PROGRESS_PERIOD_S, InnerLoop
from shoal.node.training.messages import (
    DETAIL_BYTES_MAX,
    TASK_FAILED,
    Begin,
    Evaluate,
    Failed,
    Ready,
    Report,
)
from shoal.node.training.strategy import DiLoCo
from shoal.node.training.task_faults import TaskFault, blame
from shoal.node.training.tasks import make_task
from shoal.protocol.errors import ConfigError
from tests.unit.training.tiny import TASK, TEXT, TRAINING, layout, make_memory, make_start, make_work
from tests.unit.training.user_tasks import FRAGILE, PLACE, SOURCE, fragile, importable, write_module

EVER = list(range(1000))


@pytest.fixture(autouse=True)
def fragile_module(tmp_path: Path) -> Iterator[None]:
    write_module(tmp_path, FRAGILE.partition(":")[0], SOURCE)
    with importable(tmp_path):
        yield


def begin(how: str, bad: list[int]) -> tuple[InnerLoop, np.ndarray]:
    memory = make_memory()
    work = replace(make_work(), task=fragile(how, bad))
    loop = InnerLoop(replace(make_start(work), allow_tasks=(FRAGILE,)), memory)
    assert not list(loop.handle(Begin(round=1, adopt=True), 0.0))
    return loop, memory


def run(loop: InnerLoop, steps: int, period_s: float = PROGRESS_PERIOD_S) -> list[Report]:
    """Steps while it trains; what it reports of failures and hand-overs."""
    reports: list[Report] = []
    for number in range(steps):
        if loop.training:
            reports += loop.step(number * period_s)
    return [report for report in reports if isinstance(report, Failed | Ready)]


def train_plainly(indices: list[int]) -> np.ndarray:
    """The parameters after these batches, by a loop that knows of no faults."""
    task, work = make_task(TASK), make_work()
    model, batches = task.build_model(), task.open_data(Path(TEXT), work)
    plain = DiLoCo(model, layout(), TRAINING)
    memory = make_memory()
    plain.adopt(memory[0])
    for index in indices:
        loss = task.loss(model, torch.from_numpy(batches.batch(index)))
        plain.gather(loss)
        assert plain.step(loss, 1)
    assert plain.export(memory[1])
    return memory[1]


@pytest.mark.parametrize("how", ["loss", "backward"])
def test_a_batch_at_which_the_code_raises_is_skipped_and_leaves_nothing(how: str) -> None:
    loop, memory = begin(how, [1, 2])
    first, second, ready = run(loop, 6)
    assert isinstance(first, Failed) and isinstance(second, Failed) and isinstance(ready, Ready)
    assert (first.reason, first.fatal) == (TASK_FAILED, False)
    assert first.detail.startswith("the task's code at batch 1 (1 in a row, 1 skipped since the start) raised")
    assert "at batch 2 (2 in a row, 2 skipped" in second.detail
    assert "raised ValueError at " in first.detail and first.detail.endswith(f"{PLACE}: an odd example")
    assert (ready.steps, ready.batches_done) == (4, 6)
    assert (memory[1] == train_plainly([0, 3, 4, 5])).all()


def test_a_task_that_always_raises_ends_the_trainer() -> None:
    loop, memory = begin("loss", EVER)
    reports = run(loop, 100)
    assert [report.fatal for report in reports if isinstance(report, Failed)] == [False] * FAULTS_IN_A_ROW_MAX + [True]
    assert len(reports) == FAULTS_IN_A_ROW_MAX + 1
    assert not loop.training
    assert np.isnan(memory[1]).all(), "nothing was handed over"


def test_a_fault_that_ends_the_trainer_is_told_however_soon_it_comes() -> None:
    loop, _ = begin("loss", EVER)
    first, last = run(loop, 100, period_s=0.0)
    assert isinstance(first, Failed) and isinstance(last, Failed)
    assert (first.fatal, last.fatal) == (False, True)
    assert f"{FAULTS_IN_A_ROW_MAX + 1} in a row" in last.detail


def test_a_task_that_raises_at_every_second_batch_goes_on_and_does_not_flood_the_log() -> None:
    loop, _ = begin("loss", EVER[::2])
    *failed, ready = run(loop, 8, period_s=PROGRESS_PERIOD_S / 4)
    assert len(failed) == 2, "of four, within two periods"
    assert isinstance(ready, Ready)
    assert (ready.steps, ready.batches_done) == (4, 8)
    list(loop.handle(Begin(round=2, adopt=True), 0.0))
    ready = run(loop, 8)[-1]
    assert isinstance(ready, Ready), f"{FAULTS_IN_A_ROW_MAX} are for those in a row"
    assert (ready.steps, ready.batches_done) == (4, 16)


def test_code_that_raises_at_the_held_out_data_does_not_disturb_the_training() -> None:
    loop, memory = begin("evaluation", [])
    (failed,) = loop.handle(Evaluate(), 0.0)
    assert isinstance(failed, Failed)
    assert (failed.reason, failed.fatal) == (TASK_FAILED, False)
    assert f"{PLACE}: an odd example" in failed.detail
    run(loop, 4)
    assert (memory[1] == train_plainly([0, 1, 2, 3])).all()


def fail_deeply(error: Exception) -> None:
    raise error


def test_the_place_is_the_innermost_in_the_package_and_not_in_what_it_calls() -> None:
    with pytest.raises(TaskFault) as caught, blame("tests.elsewhere"):
        np.zeros(3).reshape(2, 2)
    assert str(caught.value).startswith(f"ValueError at {__file__}:")
    assert ": cannot reshape" in str(caught.value)
    with pytest.raises(TaskFault) as caught, blame("tests.elsewhere"):
        fail_deeply(KeyError("x"))
    line = fail_deeply.__code__.co_firstlineno + 1
    assert str(caught.value) == f"KeyError at {__file__}:{line}: 'x'"


def test_what_no_frame_of_the_package_raised_is_told_without_a_place() -> None:
    with pytest.raises(TaskFault) as caught, blame("nowhere"):
        fail_deeply(ValueError())
    assert str(caught.value) == "ValueError"


@pytest.mark.parametrize("error", [ConfigError("a", "b", "c"), MemoryError(), TaskFault("as it is")])
def test_what_tells_a_person_what_to_do_passes_unchanged(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, blame("tests", lambda one: isinstance(one, MemoryError)):
        fail_deeply(error)
    assert caught.value is error


def test_a_long_message_fits_a_report() -> None:
    with pytest.raises(TaskFault) as caught, blame("tests"):
        fail_deeply(ValueError("é" * 5000))
    assert DETAIL_BYTES_MAX - 1 <= len(str(caught.value).encode()) <= DETAIL_BYTES_MAX
    assert str(caught.value).startswith(f"ValueError at {__file__}:"), "of what is cut off the place is no part"
