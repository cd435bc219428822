"""A shift: what each strategy makes of a move against plain arithmetic, two peers that meet, and who is not shifted."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from shoal.node.training.loop import InnerLoop
from shoal.node.training.messages import (
    NOT_FINITE,
    Begin,
    Command,
    Failed,
    FloatVector,
    Freeze,
    Merge,
    Paused,
    Progress,
    Ready,
    Report,
    Start,
)
from shoal.node.training.strategy import STRATEGIES, DiLoCo
from shoal.node.training.tasks import make_task
from shoal.protocol.identity import PeerId
from shoal.protocol.manifest import DELAYED, DILOCO, EAGER, OVERLAPPED, Training
from tests.unit.training.tiny import TASK, TEXT, TRAINING, layout, make_memory, make_start, make_work

STEPS, OVERLAP, MIXING, GAIN = 4, 2, 0.25, 0.25
ELEMENTS = layout().elements
ALL = Merge(round=2, included=b"\x01", part_elements=ELEMENTS, adopt_all=False, begin=True, gain=GAIN)
SHIFT = Begin(round=3, adopt=False, shift=True)
MOVE = np.linspace(-0.02, 0.03, ELEMENTS, dtype=np.float32)
BASE_2 = make_memory()[0] - np.float32(0.125)


def make_training(strategy: str) -> Training:
    overlap = 0 if strategy == DILOCO else OVERLAP
    return replace(TRAINING, strategy=strategy, overlap_steps=overlap, mixing=MIXING, gossip_after_s=60.0)


class Rig:
    """A trainer that has handed over in round 2, after a round that included it, and trained on for as long as it may.
    `local` is what it handed over, `parameters` what it has now."""

    def __init__(self, strategy: str, folder: Path | None = None) -> None:
        self.start = replace(make_start(make_work(make_training(strategy))), checkpoints=folder and str(folder))
        self.memory, self.loop = begin(self.start)
        self.run(STEPS)
        self.memory[0] = BASE_2
        self.tell(ALL)
        self.run(STEPS)
        self.local = self.memory[1].copy()

    def run(self, steps: int) -> list[Report]:
        made = [report for _ in range(steps) for report in self.loop.step(0.0)]
        return [report for report in made if not isinstance(report, Progress)]

    def tell(self, command: Command) -> list[Report]:
        return list(self.loop.handle(command, 0.0))

    def train_ahead(self) -> None:
        """As far as it may."""
        if self.loop.training:
            assert self.run(OVERLAP) == [Paused(round=2)]

    def shift(self, move: FloatVector = MOVE) -> list[Report]:
        """As the daemon does it."""
        self.memory[1] = move
        return self.tell(SHIFT)

    def run_to_ready(self) -> Ready:
        while True:
            for report in self.run(1):
                assert isinstance(report, Ready)
                return report

    @property
    def parameters(self) -> FloatVector:
        flat: FloatVector = torch.cat([one.detach().view(-1) for one in self.loop._model.parameters()]).numpy()
        return flat


def begin(start: Start) -> tuple[NDArray[np.float32], InnerLoop]:
    memory = make_memory()
    loop = InnerLoop(start, memory)
    assert not list(loop.handle(Begin(round=1, adopt=True), 0.0))
    return memory, loop


class Plain:
    """A model, its data and its inner optimizer, which know nothing of rounds."""

    def __init__(self) -> None:
        self.task, work = make_task(TASK), make_work()
        self.model, self.batches = self.task.build_model(), self.task.open_data(Path(TEXT), work)
        self.inner = DiLoCo(self.model, layout(), work.training)
        self.done = 0

    def train(self, start: FloatVector, steps: int) -> FloatVector:
        self.inner.adopt(start)
        for _ in range(steps):
            loss = self.task.loss(self.model, torch.from_numpy(self.batches.batch(self.done)))
            self.inner.gather(loss)
            assert self.inner.step(loss.detach(), 1)
            self.done += 1
        end = np.empty(ELEMENTS, np.float32)
        assert self.inner.export(end)
        return end


def train_plainly(strategy: str) -> tuple[FloatVector, FloatVector, FloatVector]:
    """What a peer hands over before the shift, what it has after it, and what it hands over then."""
    plain, ahead = Plain(), 0 if strategy == DILOCO else OVERLAP
    first = plain.train(make_memory()[0], STEPS)
    mixed = BASE_2 + np.float32(MIXING) * (first - BASE_2)
    handed = plain.train(mixed if strategy == OVERLAPPED else BASE_2, STEPS)
    start = BASE_2 + np.float32(GAIN) * (handed - BASE_2) if strategy == EAGER else handed
    made = plain.train(start, ahead)
    own = (made - start) + handed if strategy == EAGER else made
    return handed, own + MOVE, plain.train(own + MOVE, STEPS - ahead)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_shift_is_what_plain_arithmetic_computes(strategy: str) -> None:
    handed, shifted, after = train_plainly(strategy)
    rig = Rig(strategy)
    # torch.lerp rounds otherwise than a product and a sum.
    atol = 1e-5 if strategy == OVERLAPPED else 0.0
    np.testing.assert_allclose(rig.local, handed, rtol=0, atol=atol)
    rig.train_ahead()
    assert rig.shift() == [] and rig.loop.training
    np.testing.assert_allclose(rig.parameters, shifted, rtol=0, atol=atol)
    ready = rig.run_to_ready()
    assert (ready.round, ready.steps, ready.batches_done) == (3, 2 * STEPS, 3 * STEPS)
    np.testing.assert_allclose(rig.memory[1], after, rtol=0, atol=10 * atol)
    assert np.abs(rig.memory[1] - (rig.local + MOVE)).max() > 1e-4, "it has trained since"


@pytest.mark.parametrize("strategy", [DELAYED, EAGER])
@pytest.mark.parametrize("command", [SHIFT, replace(SHIFT, shift=False)], ids=["shift", "no shift"])
def test_a_base_that_comes_after_it_stands_upon_nothing_of_what_was_written_over(strategy: str, command: Begin) -> None:
    rig = Rig(strategy)
    rig.memory[1] = MOVE
    rig.tell(command)
    rig.run(1)
    rig.memory[1] = np.nan
    rig.memory[0] += 0.25
    rig.tell(replace(ALL, round=4))
    np.testing.assert_array_equal(rig.parameters, rig.memory[0])


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_move_that_is_not_finite_changes_nothing_and_is_told(strategy: str, poison: float) -> None:
    rig, other = Rig(strategy), Rig(strategy)
    rig.train_ahead()
    other.train_ahead()
    move = MOVE.copy()
    move[-1] = poison
    (failed,) = rig.shift(move)
    assert isinstance(failed, Failed) and (failed.reason, failed.fatal) == (NOT_FINITE, False)
    assert "round 3" in failed.detail and failed.steps_dropped == 0
    other.tell(replace(SHIFT, shift=False))
    np.testing.assert_array_equal(rig.parameters, other.parameters)
    assert rig.run_to_ready() == other.run_to_ready()
    np.testing.assert_array_equal(rig.memory[1], other.memory[1])


def test_a_sum_that_is_not_finite_changes_nothing() -> None:
    rig = Rig(DILOCO)
    most = float(np.finfo(np.float32).max)
    with torch.no_grad():
        *_, last = rig.loop._model.parameters()
        last.view(-1)[-1] = most
    before, move = rig.parameters, MOVE.copy()
    move[-1] = most
    assert [type(one) for one in rig.shift(move)] == [Failed]
    np.testing.assert_array_equal(rig.parameters, before)


# -- two peers that meet -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_peers_that_meet_stand_at_their_weighted_mean_and_train_on(strategy: str) -> None:
    work = make_work(make_training(strategy))
    pairs = [begin(make_start(replace(work, peer=PeerId(one * 32)))) for one in (b"a", b"b")]
    readies: list[Ready] = []
    for steps, (_, loop) in zip((STEPS, STEPS // 2), pairs, strict=True):
        reports = [report for _ in range(steps - 1) for report in loop.step(0.0)]
        list(loop.handle(Freeze(), 0.0))
        readies += [report for report in (*reports, *loop.step(0.0)) if isinstance(report, Ready)]
    first, second = (memory[1].copy() for memory, _ in pairs)
    tokens, tokens_other = (np.float32(one.tokens) for one in readies)
    share = tokens_other / (tokens + tokens_other)
    assert tokens == 2 * tokens_other and np.abs(first - second).max() > 1e-3
    pairs[0][0][1] = share * (second - first)
    pairs[1][0][1] = (1 - share) * (first - second)
    for _, loop in pairs:
        assert list(loop.handle(replace(SHIFT, round=2), 0.0)) == []
    ends = [torch.cat([one.detach().view(-1) for one in loop._model.parameters()]).numpy() for _, loop in pairs]
    mean = (2 * first.astype(np.float64) + second) / 3
    for end in ends:
        np.testing.assert_allclose(end, mean, rtol=0, atol=4 * np.finfo(np.float32).eps * np.abs(mean).max())
    handed = []
    for memory, loop in pairs:
        reports = [report for _ in range(STEPS) for report in loop.step(0.0)]
        (ready,) = (report for report in reports if isinstance(report, Ready))
        assert ready.round == 2 and np.isfinite(memory[1]).all()
        assert 1e-4 < np.abs(memory[1] - mean).max() < 0.05, "so many steps from there"
        handed.append(memory[1].copy())
    assert (handed[0] != handed[1]).any(), "each with its own data"


# -- who is not shifted ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_trainer_that_was_started_again_hands_over_the_same_and_is_not_shifted(strategy: str, tmp_path: Path) -> None:
    rig = Rig(strategy, tmp_path)
    rig.train_ahead()
    rig.memory[1] = MOVE
    rig.loop = InnerLoop(rig.start, rig.memory)  # what was there is killed
    (ready,) = rig.tell(SHIFT)
    assert isinstance(ready, Ready) and (ready.round, ready.batches_done) == (3, 2 * STEPS)
    np.testing.assert_array_equal(rig.memory[1], rig.local)
    np.testing.assert_array_equal(rig.parameters, rig.local)


@pytest.mark.parametrize("strategy", [OVERLAPPED, DELAYED, EAGER])
def test_who_went_back_to_the_base_since_is_not_shifted(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(strategy)
    with monkeypatch.context() as context:
        context.setattr(rig.loop._task, "loss", lambda model, batch: model(batch[:, :-1]).sum() * float("nan"))
        assert [type(one) for one in rig.run(1)] == [Failed]
    rig.train_ahead()
    before = rig.parameters
    assert rig.shift() == []
    np.testing.assert_array_equal(rig.parameters, before)
    assert rig.run_to_ready().steps == STEPS


def test_who_trains_already_is_not_shifted() -> None:
    rig = Rig(DILOCO)
    rig.tell(replace(SHIFT, shift=False))
    rig.run(1)
    before = rig.parameters
    assert rig.shift() == []
    np.testing.assert_array_equal(rig.parameters, before)


def test_a_restart_after_a_shift_goes_on_from_where_it_was_shifted_to(tmp_path: Path) -> None:
    rig = Rig(DILOCO, tmp_path)
    rig.shift()
    rig.run(1)
    before = rig.parameters
    rig.loop.leave(0.0)
    rig.loop = InnerLoop(rig.start, rig.memory)
    assert rig.tell(replace(SHIFT, shift=False)) == []
    np.testing.assert_array_equal(rig.parameters, before)
