"""Training on beside an exchange: what is counted, what is mixed, and what a restart hands over again."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from shoal.node.training.loop import InnerLoop
from shoal.node.training.messages import (
    EVERYTHING,
    Begin,
    Failed,
    Freeze,
    Merge,
    Paused,
    Ready,
    Report,
    Start,
)
from shoal.node.training.strategy import DiLoCo
from shoal.node.training.tasks import make_task
from shoal.protocol.manifest import DELAYED, OVERLAPPED, Training
from tests.unit.training.tiny import TASK, TEXT, TRAINING, layout, make_memory, make_start, make_work

OVERLAP, MIXING = 2, 0.25
TRAINED = replace(TRAINING, strategy=OVERLAPPED, overlap_steps=OVERLAP, mixing=MIXING)
WAITING = replace(TRAINED, strategy=DELAYED)
MERGE = Merge(round=2, included=b"\x01", part_elements=layout().elements, adopt_all=False, begin=True)
TOKENS = 8 * 32  # of a batch
Vector = np.ndarray[tuple[int, ...], np.dtype[np.float32]]


def begin(
    start: Start | None = None, training: Training = TRAINED
) -> tuple[InnerLoop, np.ndarray[tuple[int, int], np.dtype[np.float32]]]:
    memory = make_memory()
    loop = InnerLoop(start or make_start(make_work(training)), memory)
    assert not list(loop.handle(Begin(round=1, adopt=True), 0.0))
    return loop, memory


def run(loop: InnerLoop, steps: int) -> list[Report]:
    return [report for _ in range(steps) for report in loop.step(0.0)]


def one_ready(reports: list[Report]) -> Ready:
    (ready,) = (report for report in reports if isinstance(report, Ready))
    return ready


def flatten(loop: InnerLoop) -> Vector:
    """The local parameters as they are now."""
    return torch.cat([one.detach().view(-1) for one in loop._model.parameters()]).numpy()


def train_plainly(base_2: Vector, training: Training) -> list[Vector]:
    """Both contributions of a peer, by a loop that knows nothing of rounds."""
    task, work = make_task(TASK), make_work(training)
    model, batches = task.build_model(), task.open_data(Path(TEXT), work)
    plain = DiLoCo(model, layout(), work.training)
    plain.adopt(make_memory()[0])
    made = []
    for step in range(8):
        if step == TRAINED.inner_steps + OVERLAP:
            first = 0
            for parameter in model.parameters():
                came = torch.from_numpy(base_2[first : first + parameter.numel()]).view_as(parameter)
                gone = torch.from_numpy(made[0][first : first + parameter.numel()]).view_as(parameter)
                with torch.no_grad():
                    if training.strategy == OVERLAPPED:
                        parameter.copy_(torch.lerp(came, parameter, MIXING))
                    else:
                        parameter.copy_(came + (parameter - gone))
                first += parameter.numel()
        loss = task.loss(model, torch.from_numpy(batches.batch(step)))
        plain.gather(loss)
        assert plain.step(loss.detach(), 1)
        if step % 4 == 3:
            made.append(np.empty(layout().elements, np.float32))
            assert plain.export(made[-1])
    return made


@pytest.mark.parametrize("training", [TRAINED, WAITING], ids=[OVERLAPPED, DELAYED])
def test_two_rounds_are_what_a_plain_loop_computes(training: Training) -> None:
    loop, memory = begin(training=training)
    base_2 = memory[0] + np.float32(0.125)
    first, second = train_plainly(base_2, training)
    ready = one_ready(run(loop, 4))
    assert (ready.trains_on, ready.steps, ready.batches_done) == (True, 4, 4)
    handed_over = memory[1].copy()
    assert np.array_equal(handed_over, first)
    assert run(loop, 1) == [] and run(loop, 1) == [Paused(round=1)] and not loop.training
    assert np.array_equal(memory[1], handed_over), "what was handed over stands still"
    memory[0] = base_2
    list(loop.handle(MERGE, 0.0))
    ready = one_ready(run(loop, 2))
    assert (ready.round, ready.steps, ready.tokens, ready.batches_done) == (2, 4, 4 * TOKENS, 8)
    assert np.array_equal(memory[1], second)


def test_a_base_that_comes_early_leaves_the_rest_of_the_steps_for_after_it() -> None:
    loop, memory = begin()
    run(loop, 5)
    memory[0] += 0.125
    list(loop.handle(MERGE, 0.0))
    assert loop.training
    assert run(loop, 2) == []
    assert one_ready(run(loop, 1)).steps == 4


def test_who_was_left_out_goes_on_with_everything_that_it_has() -> None:
    loop, memory = begin()
    run(loop, 6)
    assert not loop.training
    memory[0] += 0.125
    list(loop.handle(Begin(round=2, adopt=False), 0.0))
    ready = one_ready(run(loop, 2))
    assert (ready.round, ready.steps, ready.tokens) == (2, 8, 8 * TOKENS)


def test_starting_again_from_the_base_drops_what_was_trained_beside_the_exchange() -> None:
    loop, memory = begin()
    run(loop, 6)
    memory[0] += 0.125
    list(loop.handle(replace(MERGE, adopt_all=True), 0.0))
    assert one_ready(run(loop, 4)).steps == 4
    assert np.abs(memory[1] - memory[0]).max() < 0.05


def test_freeze_asks_for_nothing_while_a_contribution_is_out() -> None:
    loop, _ = begin()
    run(loop, 4)
    list(loop.handle(Freeze(), 0.0))
    assert run(loop, 2) == [Paused(round=1)]
    list(loop.handle(MERGE, 0.0))
    assert one_ready(run(loop, 2)).round == 2


def test_a_loss_that_is_not_finite_beside_an_exchange_makes_no_second_contribution(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loop, memory = begin()
    run(loop, 4)
    handed_over = memory[1].copy()
    with monkeypatch.context() as context:
        context.setattr(loop._task, "loss", lambda model, batch: model(batch[:, :-1]).sum() * float("nan"))
        (failed,) = run(loop, 1)
    assert isinstance(failed, Failed) and not failed.fatal
    assert run(loop, 2) == [Paused(round=1)]
    assert np.array_equal(memory[1], handed_over)
    list(loop.handle(MERGE, 0.0))
    assert one_ready(run(loop, 2)).steps == 4


def test_a_way_back_to_the_base_beside_an_exchange_loses_nothing_made_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    loop, memory = begin(training=WAITING)
    run(loop, 4)
    with monkeypatch.context() as context:
        context.setattr(loop._task, "loss", lambda model, batch: model(batch[:, :-1]).sum() * float("nan"))
        run(loop, 1)
    run(loop, 1)
    before, base = flatten(loop), memory[0].copy()
    assert not np.array_equal(before, base)
    memory[0] += 0.125
    list(loop.handle(MERGE, 0.0))
    assert np.array_equal(flatten(loop), (before - base) + memory[0])


def test_where_nothing_was_done_since_the_base_takes_the_place_to_the_bit() -> None:
    loop, memory = begin(training=WAITING)
    run(loop, 4)
    memory[0] += 0.125
    list(loop.handle(MERGE, 0.0))
    assert loop._strategy.export(memory[1])
    assert np.array_equal(memory[1], memory[0])


def test_what_was_counted_while_a_delayed_trainer_was_away_becomes_the_base(tmp_path: Path) -> None:
    start = replace(make_start(make_work(WAITING)), checkpoints=str(tmp_path))
    loop, memory = begin(start)
    run(loop, 5)
    loop.leave(0.0)
    memory = make_memory()  # nobody has written what was handed over into it
    memory[0] += 0.125
    loop = InnerLoop(start, memory)
    assert loop.started().resumed.waits
    list(loop.handle(MERGE, 0.0))
    assert loop._strategy.export(memory[1])
    assert np.array_equal(memory[1], memory[0])


def test_a_restart_hands_over_what_was_handed_over_and_not_what_came_after(tmp_path: Path) -> None:
    start = replace(make_start(make_work(TRAINED)), checkpoints=str(tmp_path))
    loop, memory = begin(start)
    run(loop, 5)
    handed_over = memory[1].copy()
    loop.leave(0.0)
    memory = make_memory()
    loop = InnerLoop(start, memory)
    resumed = loop.started().resumed
    assert (resumed.extent, resumed.waits, resumed.batches_done, resumed.steps_lost) == (EVERYTHING, True, 4, 1)
    ready = one_ready(list(loop.handle(Begin(round=1, adopt=False), 0.0)))
    assert (ready.round, ready.steps, ready.batches_done) == (1, 4, 4)
    assert np.array_equal(memory[1], handed_over)
    assert run(loop, 2) == [Paused(round=1)]
