"""Eager updates: several workers against plain arithmetic, and what is left of an estimate when a round is over."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.experiments.arms import Arm, make_arm_manifest, open_batches
from benchmarks.experiments.swarm import Swarm, Worker
from benchmarks.experiments.texts import PACKAGE
from shoal.node.training.data import read_corpus
from shoal.node.training.loop import InnerLoop
from shoal.node.training.messages import Begin, Failed, FloatVector, Merge, Paused, Ready, Report
from shoal.node.training.strategy import DiLoCo, Eager
from shoal.node.training.tasks import make_task
from shoal.protocol.layout import initialise
from shoal.protocol.manifest import EAGER, Draft, Outer, Rounds, Task, Training
from tests.unit.training.tiny import TEXT, TRAINING, layout, make_memory, make_start, make_work

STEPS, OVERLAP, WORKERS, GAIN = 4, 2, 3, 0.25
SWARM = Draft(
    name="tiny",
    task=Task(kind="byte_gpt", options=json.dumps({"layers": 1, "heads": 2, "width": 32, "context": 16})),
    training=Training(
        strategy=EAGER,
        inner_steps=STEPS,
        overlap_steps=OVERLAP,
        steps_min=1,
        batch_size=4,
        learning_rate=3e-3,
        warmup_steps=2,
    ),
    rounds=Rounds(codec="fp32", part_elements=1 << 14),
)
TRAINED = replace(TRAINING, strategy=EAGER, overlap_steps=OVERLAP)
ALL = Merge(round=2, included=b"\x01", part_elements=layout().elements, adopt_all=False, begin=True, gain=GAIN)


# -- several workers ---------------------------------------------------------------------------------------------------


class Plain:
    """One worker by arithmetic on whole float64 vectors: it knows the outer step's rule and everybody's mean."""

    def __init__(self, draft: Draft, number: int) -> None:
        manifest = make_arm_manifest(make_arm(draft), seed=7)
        self.task = make_task(manifest.task)
        self.model = self.task.build_model()
        self.inner = DiLoCo(self.model, manifest.layout, manifest.training)
        self.batches = open_batches(manifest, [read_corpus(Path(TEXT))] * WORKERS)[number]
        self.done = 0

    def train(self, start: FloatVector, steps: int) -> FloatVector:
        self.inner.adopt(start.astype(np.float32))
        for _ in range(steps):
            loss = self.task.loss(self.model, torch.from_numpy(self.batches.batch(self.done)))
            self.inner.gather(loss)
            assert self.inner.step(loss.detach(), 1)
            self.done += 1
        end = np.empty(start.size, np.float32)
        assert self.inner.export(end)
        return end.astype(np.float64)


def make_arm(draft: Draft) -> Arm:
    return Arm(name="tiny", draft=draft, workers=(WORKERS,), texts=PACKAGE)


def run_plainly(draft: Draft, rounds: int) -> tuple[FloatVector, list[FloatVector]]:
    """The base after so many rounds, and the workers' estimates in the last of them, with everybody's pseudo-gradients
    at hand."""
    eta, mu = draft.outer.learning_rate, draft.outer.momentum
    gain = eta * (1 + mu) if draft.outer.optimizer == "nesterov" else eta
    manifest = make_arm_manifest(make_arm(draft), seed=7)
    base = initialise(manifest.layout, manifest.seed).astype(np.float64)
    workers = [Plain(draft, number) for number in range(WORKERS)]
    momentum = np.zeros_like(base)
    estimates = ends = [one.train(base, STEPS) for one in workers]
    for number in range(rounds):
        deltas = [base - end for end in ends]
        # Before the first round a worker does not know how many there are.
        estimates = [base - gain * own / WORKERS for own in deltas] if number else ends
        ahead = [one.train(start, OVERLAP) - start for one, start in zip(workers, estimates, strict=True)]
        mean = np.mean(deltas, axis=0)
        if draft.outer.optimizer == "nesterov":
            momentum = mu * momentum + mean
            base = base - eta * (mean + mu * momentum)
        else:
            base = base - eta * mean
        ends = [one.train(base + more, STEPS - OVERLAP) for one, more in zip(workers, ahead, strict=True)]
    return base, estimates


OUTERS = (Outer(learning_rate=0.7, momentum=0.5), Outer(optimizer="sgd", learning_rate=0.9))


@pytest.mark.parametrize("outer", OUTERS, ids=lambda outer: outer.optimizer)
def test_several_workers_are_what_plain_arithmetic_computes(outer: Outer) -> None:
    draft = replace(SWARM, outer=outer)
    manifest = make_arm_manifest(make_arm(draft), seed=7)
    swarm = Swarm(manifest, open_batches(manifest, [read_corpus(Path(TEXT))] * WORKERS))
    for _ in range(4):
        swarm.run_round(range(WORKERS))
    expected, estimates = run_plainly(draft, 4)
    moved = np.abs(expected - initialise(manifest.layout, manifest.seed)).max()
    np.testing.assert_allclose(swarm.base, expected, atol=1e-3 * moved)
    for worker, estimate in zip(swarm.workers, estimates, strict=True):
        np.testing.assert_allclose(find_estimate(worker), estimate, atol=1e-3 * moved)


def find_estimate(worker: Worker) -> FloatVector:
    """What it trained on from when it had handed over last."""
    assert isinstance(worker._strategy, Eager) and worker._strategy._since is not None
    return worker._strategy._since


def test_with_sgd_the_estimates_are_the_papers() -> None:
    """Outer parameters of each worker's own, stepped down mean_last + (own - own_last) / n."""
    eta = 0.9
    manifest = make_arm_manifest(make_arm(replace(SWARM, outer=OUTERS[1])), seed=7)
    swarm = Swarm(manifest, open_batches(manifest, [read_corpus(Path(TEXT))] * WORKERS))
    assert OUTERS[1].learning_rate == eta
    own_params = [swarm.base.astype(np.float64)] * WORKERS
    mean_last, deltas_last = np.zeros_like(own_params[0]), [np.zeros_like(own_params[0])] * WORKERS
    for number in range(4):
        base = swarm.base.astype(np.float64)
        swarm.run_round(range(WORKERS))
        deltas = [base - one.local for one in swarm.workers]
        for index, (own, last) in enumerate(zip(deltas, deltas_last, strict=True)):
            own_params[index] = own_params[index] - eta * (mean_last + (own - last) / WORKERS)
            if number:  # before the first round it does not know how many there are
                np.testing.assert_allclose(find_estimate(swarm.workers[index]), own_params[index], atol=2e-6)
                assert np.abs(own_params[index] - swarm.workers[index].local).max() > 1e-4
        mean_last, deltas_last = np.mean(deltas, axis=0), deltas


# -- one trainer -------------------------------------------------------------------------------------------------------


def run(loop: InnerLoop, steps: int) -> list[Report]:
    return [report for _ in range(steps) for report in loop.step(0.0)]


def flatten(loop: InnerLoop) -> FloatVector:
    """The local parameters as they are now."""
    flat: FloatVector = torch.cat([one.detach().view(-1) for one in loop._model.parameters()]).numpy().copy()
    return flat


class Rig:
    """A trainer that has handed over in round 2, after one that included it; `ahead` is what it did since."""

    def __init__(self, steps: int = 1) -> None:
        self.memory = make_memory()
        self.loop = InnerLoop(make_start(make_work(TRAINED)), self.memory)
        list(self.loop.handle(Begin(round=1, adopt=True), 0.0))
        run(self.loop, STEPS)
        self.memory[0] -= 0.125
        list(self.loop.handle(ALL, 0.0))
        self.base_2 = self.memory[0].copy()
        run(self.loop, STEPS)
        self.local = self.memory[1].copy()
        self.estimate = flatten(self.loop)
        run(self.loop, steps)
        self.ahead = flatten(self.loop) - self.estimate


def test_it_trains_on_from_the_base_and_its_own_part_of_the_next_step() -> None:
    rig = Rig()
    np.testing.assert_allclose(rig.estimate, rig.base_2 - GAIN * (rig.base_2 - rig.local), atol=1e-6)
    assert np.array_equal(rig.memory[1], rig.local), "what was handed over stands still"


def test_the_next_contribution_is_what_was_trained_and_not_what_was_estimated() -> None:
    rig = Rig(OVERLAP)
    rig.memory[0] += 0.25
    list(rig.loop.handle(replace(ALL, round=3), 0.0))
    np.testing.assert_allclose(flatten(rig.loop), rig.memory[0] + rig.ahead, atol=1e-6)


@pytest.mark.parametrize("steps", [0, 1])
def test_who_was_left_out_stands_on_its_own_work_again(steps: int) -> None:
    rig = Rig(steps)
    rig.memory[0] += 0.25
    list(rig.loop.handle(Begin(round=3, adopt=False), 0.0))
    np.testing.assert_allclose(flatten(rig.loop), rig.local + rig.ahead, atol=0 if steps == 0 else 1e-6)


def test_parts_that_left_it_out_stand_on_its_own_work_again() -> None:
    rig = Rig()
    size = -(-layout().elements // 3)
    rig.memory[0] += 0.25
    list(rig.loop.handle(replace(ALL, round=3, part_elements=size, included=b"\x05"), 0.0))
    expected = rig.memory[0] + rig.ahead
    expected[size : 2 * size] = (rig.local + rig.ahead)[size : 2 * size]
    np.testing.assert_allclose(flatten(rig.loop), expected, atol=1e-6)


def test_until_a_round_has_included_it_it_trains_on_from_where_it_is() -> None:
    memory = make_memory()
    loop = InnerLoop(make_start(make_work(TRAINED)), memory)
    list(loop.handle(Begin(round=1, adopt=True), 0.0))
    run(loop, STEPS)
    assert np.array_equal(flatten(loop), memory[1])


def test_after_a_round_without_it_it_goes_on_from_the_base_of_now() -> None:
    rig = Rig()
    list(rig.loop.handle(Begin(round=3, adopt=False), 0.0))
    rig.memory[0] += 0.25
    run(rig.loop, STEPS - 1)
    np.testing.assert_allclose(flatten(rig.loop), rig.memory[0] - GAIN * (rig.memory[0] - rig.memory[1]), atol=1e-6)


def test_after_a_way_back_to_the_base_nothing_is_left_of_the_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    for command in (replace(ALL, round=3), Begin(round=3, adopt=False)):
        rig = Rig(0)
        with monkeypatch.context() as context:
            context.setattr(rig.loop._task, "loss", lambda model, batch: model(batch[:, :-1]).sum() * float("nan"))
            (failed,) = run(rig.loop, 1)
        assert isinstance(failed, Failed) and not failed.fatal
        assert run(rig.loop, OVERLAP) == [Paused(round=2)]
        ahead = flatten(rig.loop) - rig.base_2
        rig.memory[0] += 0.25
        list(rig.loop.handle(command, 0.0))
        expected = (rig.memory[0] if isinstance(command, Merge) else rig.base_2) + ahead
        np.testing.assert_allclose(flatten(rig.loop), expected, atol=1e-6)


def test_a_restart_hands_over_the_same_and_knows_no_gain(tmp_path: Path) -> None:
    start = replace(make_start(make_work(TRAINED)), checkpoints=str(tmp_path))
    memory = make_memory()
    loop = InnerLoop(start, memory)
    list(loop.handle(Begin(round=1, adopt=True), 0.0))
    run(loop, STEPS)
    memory[0] -= 0.125
    list(loop.handle(ALL, 0.0))
    run(loop, STEPS + 1)
    handed_over = memory[1].copy()
    loop.leave(0.0)
    memory[1] = np.nan
    loop = InnerLoop(start, memory)
    (ready,) = loop.handle(Begin(round=2, adopt=False), 0.0)
    assert isinstance(ready, Ready) and ready.batches_done == 2 * STEPS
    assert np.array_equal(memory[1], handed_over) and np.array_equal(flatten(loop), handed_over)
