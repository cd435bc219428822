"""A base that is read while the daemon writes the next one: what a trainer takes of it is one whole base or nothing."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from shoal.node.trainer import SharedParameters
from shoal.node.training.attached_loop import AttachedLoop
from shoal.node.training.base_writes import BaseWrites, WriterGone, map_memory
from shoal.node.training.local_parameters import LocalParameters
from shoal.node.training.loop import InnerLoop
from shoal.node.training.messages import (
    BASE_TORN,
    EVERYTHING,
    NOTHING,
    Begin,
    Command,
    Evaluate,
    Evaluated,
    Failed,
    Merge,
    Progress,
    Ready,
    Report,
    Work,
)
from shoal.protocol.identity import PeerId
from shoal.protocol.manifest import DELAYED, DILOCO, EAGER, OVERLAPPED, STRATEGIES, Task, Training
from tests.unit.training.tiny import TRAINING, layout, make_memory, make_start, make_work

HALF = layout().elements // 2
FIRST_HALF = Merge(round=2, included=b"\x01", part_elements=HALF, adopt_all=False, begin=True, gain=0.5)
# The bases of round 1 and of round 2.
LATER = np.random.default_rng(0).normal(0.0, 0.05, (2, layout().elements)).astype(np.float32)


class Daemon:
    """Its half of the memory, and when it writes: between the first and the second parameter that is read next."""

    def __init__(self, memory: NDArray[np.float32]) -> None:
        self.memory = memory
        self.count = np.zeros(2, np.uint64)
        self._writes = BaseWrites(self.count)

    def write(self, base: NDArray[np.float32], round: int = 0) -> None:
        with self._writes.writing() as name_round:
            self.memory[0] = base
            name_round(round)

    def write_within(self, model: nn.Module, base: NDArray[np.float32], passes: int = 0, round: int = 0) -> None:
        """After so many passes over the parameters that read no base."""
        read, left = model.parameters, [None] * passes

        def parameters() -> Iterator[nn.Parameter]:
            if left:
                left.pop()
                yield from read()
                return
            del model.parameters
            for place, one in enumerate(read()):
                if place == 1:
                    self.write(base, round)
                yield one

        model.parameters = parameters  # type: ignore[method-assign, assignment]


class Rig(Daemon):
    """The built-in loop, which has begun round 1."""

    def __init__(self, strategy: str) -> None:
        super().__init__(make_memory())
        overlap_steps = 0 if strategy == DILOCO else 2
        training = replace(TRAINING, strategy=strategy, overlap_steps=overlap_steps)
        self.loop = InnerLoop(make_start(make_work(training)), self.memory, writes=BaseWrites(self.count))
        self.model = self.loop._model
        self.tell(Begin(round=1, adopt=True))

    def tell(self, command: Command) -> list[Report]:
        return list(self.loop.handle(command, 0.0))

    def train(self, steps: int) -> list[Report]:
        made = [report for _ in range(steps) for report in self.loop.step(0.0)]
        return [report for report in made if not isinstance(report, Progress)]

    @property
    def parameters(self) -> NDArray[np.float32]:
        return flatten(self.model)


def flatten(model: nn.Module) -> NDArray[np.float32]:
    flat: NDArray[np.float32] = torch.cat([one.detach().view(-1) for one in model.parameters()]).numpy()
    return flat


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_parts_that_are_merged_are_those_of_one_base(strategy: str) -> None:
    rig = Rig(strategy)
    (ready,) = rig.train(TRAINING.inner_steps)
    assert isinstance(ready, Ready)
    if ready.trains_on:
        rig.train(1)
    before = rig.parameters
    rig.write(LATER[0])
    rig.write_within(rig.model, LATER[1])
    told = rig.tell(FIRST_HALF)
    assert [(one.reason, one.steps_dropped, one.fatal) for one in told if isinstance(one, Failed)] == (
        [(BASE_TORN, 1, False)] if ready.trains_on else []
    )
    np.testing.assert_array_equal(rig.parameters[:HALF], LATER[1][:HALF])
    if strategy != EAGER:  # there what was left out is what was handed over, and what was done since
        np.testing.assert_array_equal(rig.parameters[HALF:], before[HALF:])
    *_, again = rig.train(TRAINING.inner_steps)
    assert isinstance(again, Ready) and again.steps == TRAINING.inner_steps, "what was dropped is not counted"


@pytest.mark.parametrize("strategy", [OVERLAPPED, DELAYED, EAGER])
def test_what_is_made_beside_an_exchange_stays_where_nobody_writes(strategy: str) -> None:
    rig = Rig(strategy)
    rig.train(TRAINING.inner_steps + 1)
    rig.write(LATER[0])
    rig.tell(FIRST_HALF)
    assert (rig.parameters[:HALF] != LATER[0][:HALF]).any()
    *_, again = rig.train(TRAINING.inner_steps - 1)
    assert isinstance(again, Ready) and again.steps == TRAINING.inner_steps


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("command", [Begin(round=3, adopt=True), replace(FIRST_HALF, adopt_all=True)])
def test_a_base_that_is_adopted_is_whole(strategy: str, command: Begin | Merge) -> None:
    rig = Rig(strategy)
    rig.train(1)
    rig.write(LATER[0])
    rig.write_within(rig.model, LATER[1])
    rig.tell(command)
    np.testing.assert_array_equal(rig.parameters, LATER[1])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_trainer_that_starts_again_does_so_from_a_whole_base(strategy: str) -> None:
    rig = Rig(strategy)
    rig.train(1)
    with torch.no_grad():
        next(rig.model.parameters()).fill_(float("nan"))
    rig.write_within(rig.model, LATER[1], passes=1)  # which drops the gradient
    (failed,) = rig.train(1)
    assert isinstance(failed, Failed)
    np.testing.assert_array_equal(rig.parameters, LATER[1])


def test_a_base_that_is_measured_is_whole() -> None:
    rig = Rig(DILOCO)
    rig.tell(Evaluate())
    assert rig.loop._evaluated is not None
    rig.write(LATER[0], 1)
    rig.write_within(rig.loop._evaluated, LATER[1], round=2)
    (torn,) = rig.tell(Evaluate())
    assert rig.tell(Evaluate()) == [torn]
    assert isinstance(torn, Evaluated) and torn.round == 2, "not the one that it was last told of"


# -- a script of one's own ------------------------------------------------------------------------------------------

ELEMENTS = 6
WORK = Work(
    task=Task(kind="attached"),
    training=Training(inner_steps=3, steps_min=1, round_time_s=60.0),
    layout_digest=bytes(32),
    seed=1,
    peer=PeerId(b"p" * 32),
)
FIRST_PART = Merge(round=2, included=b"\x01", part_elements=5, adopt_all=False, begin=True)


class ScriptRig(Daemon):
    """A script's loop, which has begun round 1."""

    def __init__(self, strategy: str = DILOCO, rest: Callable[[], bool] = lambda: False) -> None:
        super().__init__(np.ones((2, ELEMENTS), np.float32))
        self.model = nn.Linear(2, 2)
        self.loop = AttachedLoop(LocalParameters(self.model), torch.optim.SGD(self.model.parameters()), self.evaluate)
        overlap_steps = 0 if strategy == DILOCO else 2
        self.work = replace(WORK, training=replace(WORK.training, strategy=strategy, overlap_steps=overlap_steps))
        self.loop.start(self.work, self.memory, "cpu", BaseWrites(self.count, rest))
        self.tell(Begin(round=1, adopt=True))

    def tell(self, command: Command) -> list[Report]:
        return list(self.loop.handle(command, 0.0))

    def train(self, steps: int, loss: float = 0.5) -> list[Report]:
        made: list[Report] = []
        for _ in range(steps):
            with torch.no_grad():
                for one in self.model.parameters():
                    one += 0.25
            made += self.loop.step(loss, 10, 0.0)
        return made

    def base(self, value: float) -> NDArray[np.float32]:
        return np.full(ELEMENTS, value, np.float32)

    @staticmethod
    def evaluate(model: nn.Module) -> tuple[float, int]:
        return float(sum(one.sum() for one in model.parameters())), 1


@pytest.mark.parametrize("strategy", [DILOCO, OVERLAPPED, DELAYED])
def test_parts_that_a_script_merges_are_those_of_one_base(strategy: str) -> None:
    rig = ScriptRig(strategy)
    rig.train(3 if strategy == DILOCO else 4)
    held = float(flatten(rig.model)[-1])
    rig.write(rig.base(2.0))
    rig.write_within(rig.model, rig.base(3.0))
    told = rig.tell(FIRST_PART)
    assert [(one.reason, one.steps_dropped) for one in told if isinstance(one, Failed)] == (
        [] if strategy == DILOCO else [(BASE_TORN, 1)]
    )
    assert flatten(rig.model).tolist() == [3.0] * 5 + [held]
    *_, again = rig.train(3)
    assert isinstance(again, Ready) and again.steps == 3, "what was dropped is not counted"


@pytest.mark.parametrize("command", [Begin(round=3, adopt=True), replace(FIRST_PART, adopt_all=True)])
def test_a_base_that_a_script_adopts_is_whole(command: Begin | Merge) -> None:
    rig = ScriptRig()
    rig.train(1)
    rig.write_within(rig.model, rig.base(3.0))
    rig.tell(command)
    assert flatten(rig.model).tolist() == [3.0] * ELEMENTS


def test_a_script_starts_again_from_a_whole_base_and_measures_one() -> None:
    rig = ScriptRig()
    rig.write_within(rig.model, rig.base(3.0))
    (failed,) = rig.train(1, loss=float("nan"))
    assert isinstance(failed, Failed)
    assert flatten(rig.model).tolist() == [3.0] * ELEMENTS
    rig.train(1)
    rig.write_within(rig.model, rig.base(5.0), round=7)
    (measured,) = rig.tell(Evaluate())
    assert isinstance(measured, Evaluated) and measured.loss_nats == 5.0 * ELEMENTS
    assert (measured.round, rig.loop.round) == (7, 1), "that of the base, whatever the script was told of"
    assert flatten(rig.model).tolist() == [3.25] * ELEMENTS


def test_of_a_base_that_a_daemon_never_finished_a_script_takes_nothing() -> None:
    rig = ScriptRig()
    rig.train(1)
    rig.count[0] += np.uint64(1)  # it begins to write
    with pytest.raises(WriterGone):
        rig.tell(Begin(round=2, adopt=True))
    assert flatten(rig.model).tolist() == [1.25] * ELEMENTS
    rig.loop.lose(0.0)
    resumed = rig.loop.start(rig.work, rig.memory, "cpu").resumed
    assert (resumed.extent, resumed.steps) == (EVERYTHING, 1)


def test_of_half_a_base_that_a_script_took_nothing_counts() -> None:
    rig = ScriptRig()
    rig.train(1)

    def die() -> None:
        rig.memory[0] = 3.0
        rig.count[0] += np.uint64(1)

    rig.write = lambda base, round: die()  # type: ignore[method-assign]
    rig.write_within(rig.model, rig.base(3.0))
    with pytest.raises(WriterGone):
        rig.tell(FIRST_PART)
    assert rig.loop.take_replaced()
    rig.loop.lose(0.0)
    rig.train(2)
    assert rig.loop.start(rig.work, rig.memory, "cpu").resumed.extent == NOTHING
    (torn,) = rig.tell(Begin(round=2, adopt=True))
    assert isinstance(torn, Failed) and (torn.reason, torn.steps_dropped) == (BASE_TORN, 3)
    assert rig.tell(Begin(round=2, adopt=True)) == [], "it is told once"


# -- the count ------------------------------------------------------------------------------------------------------


def test_a_trainer_waits_for_a_writer_and_reads_once() -> None:
    count, taken = np.ones(2, np.uint64), []

    def rest() -> bool:
        count[0] = 2
        return True

    assert BaseWrites(count, rest).read(lambda: taken.append(int(count[0])))
    assert taken == [2]


def test_a_write_that_fails_ends_all_the_same() -> None:
    count = np.zeros(2, np.uint64)
    with suppress(OSError), BaseWrites(count).writing():
        raise OSError
    assert BaseWrites(count).read(lambda: None)
    assert int(count[0]) == 2


def test_daemon_and_trainer_see_one_memory() -> None:
    memory = SharedParameters(5)
    rows, writes = map_memory(memory.descriptor, lambda: False)
    memory.base[:], memory.local[:] = 1.0, 2.0
    assert rows.tolist() == [[1.0] * 5, [2.0] * 5]
    with memory.writing(), pytest.raises(WriterGone):
        writes.read(lambda: None)
    assert writes.read(lambda: None)
    assert rows.tolist() == [[1.0] * 5, [2.0] * 5], "the count stands behind them"
    memory.close()
