"""A script's own loop: when it hands over, what a new base leaves, and what counts when a daemon went and came back."""

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from shoal.node.training.attached_loop import AttachedLoop
from shoal.node.training.local_parameters import Evaluation, LocalParameters
from shoal.node.training.messages import (
    EVERYTHING,
    NO_EVALUATION,
    NO_TEXT,
    NOT_FINITE,
    NOTHING,
    OPTIMIZER,
    Begin,
    Command,
    Evaluate,
    Evaluated,
    Failed,
    FloatVector,
    Freeze,
    Merge,
    Paused,
    Progress,
    Ready,
    Report,
    Resumed,
    Sample,
    Work,
)
from shoal.node.training.round_work import RESTARTS_MAX
from shoal.protocol.errors import ConfigError
from shoal.protocol.identity import PeerId
from shoal.protocol.manifest import DELAYED, EAGER, OVERLAPPED, Task, Training

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
ELEMENTS = 6
TRAINING = Training(inner_steps=3, steps_min=1, round_time_s=60.0)
WORK = Work(task=Task(kind="attached"), training=TRAINING, layout_digest=bytes(32), seed=1, peer=PeerId(b"p" * 32))
BOTH = Merge(round=2, included=b"\x03", part_elements=4, adopt_all=False, begin=True)


class Rig:
    """A loop, its model, and the memory of the daemon that it is attached to."""

    def __init__(self, training: Training = TRAINING, evaluate: Evaluation | None = None, device: str = "cpu") -> None:
        self.model = nn.Linear(2, 2, device=device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.loop = AttachedLoop(LocalParameters(self.model), self.optimizer, evaluate)
        self.work = replace(WORK, training=training)
        self.start(0)
        self.tell(Begin(round=1, adopt=True))

    def start(self, batches_done: int, base: float = 1.0, **changes: object) -> Resumed:
        """A daemon comes that knows so many batches to be in contributions."""
        self.memory = np.full((2, ELEMENTS), np.nan, np.float32)
        self.memory[0] = base
        work = replace(self.work, batches_done=batches_done, **changes)  # type: ignore[arg-type]
        return self.loop.start(work, self.memory, "cpu").resumed

    def tell(self, *commands: Command, now_s: float = 0.0) -> list[Report]:
        return [report for command in commands for report in self.loop.handle(command, now_s)]

    def train(self, steps: int = 1, loss: float = 0.5, now_s: float = 0.0) -> list[Report]:
        """So many steps, each of which moves every parameter by 0.25."""
        return [report for _ in range(steps) for report in self._step(loss, now_s)]

    def _step(self, loss: float, now_s: float) -> Iterator[Report]:
        with torch.no_grad():
            for one in self.model.parameters():
                one += 0.25
        yield from self.loop.step(loss, 10, now_s)

    @property
    def parameters(self) -> FloatVector:
        flat: FloatVector = torch.cat([one.detach().view(-1) for one in self.model.parameters()]).cpu().numpy()
        return flat


def ready_of(reports: list[Report]) -> Ready:
    *before, ready = reports
    assert isinstance(ready, Ready) and all(isinstance(one, Progress) for one in before)
    return ready


def test_the_base_comes_into_the_model_and_work_is_handed_over_after_the_steps() -> None:
    rig = Rig()
    assert (rig.parameters == 1.0).all() and rig.loop.take_replaced() and not rig.loop.take_replaced()
    assert rig.train(2) == [] and not rig.loop.waits
    ready = ready_of(rig.train())
    assert (ready.round, ready.steps, ready.tokens, ready.batches_done, ready.loss_mean) == (1, 3, 30, 3, 0.5)
    assert rig.loop.waits and (rig.memory[1] == 1.75).all()


def test_it_is_ready_by_time_and_when_it_is_frozen() -> None:
    rig = Rig()
    assert ready_of(rig.train(now_s=60.0)).steps == 1
    rig.tell(replace(BOTH, begin=True), Freeze(), now_s=60.0)
    assert ready_of(rig.train(now_s=60.0)).steps == 1


def test_a_base_that_includes_the_work_is_adopted_part_by_part() -> None:
    rig = Rig()
    rig.train(3)
    rig.memory[0] = 5.0
    rig.tell(replace(BOTH, included=b"\x01"))
    assert rig.parameters.tolist() == [5.0] * 4 + [1.75] * 2
    assert not rig.loop.waits and rig.loop.round == 2 and rig.loop.take_replaced()


def test_which_share_of_the_data_is_its_own_comes_with_the_base() -> None:
    rig = Rig()
    assert rig.loop.share == (0, 1)
    rig.train(3)
    rig.tell(replace(BOTH, place=2, places=5))
    assert rig.loop.share == (2, 5)


def test_a_round_without_this_peer_leaves_its_work_for_the_next_one() -> None:
    rig = Rig()
    rig.train(3)
    rig.memory[0] = 5.0
    rig.tell(Begin(round=2, adopt=False))
    assert (rig.parameters == 1.75).all()
    ready = ready_of(rig.train(3))
    assert (ready.round, ready.steps, ready.batches_done) == (2, 6, 6)


def test_overlapped_it_trains_on_beside_the_exchange_and_mixes_the_base() -> None:
    rig = Rig(replace(TRAINING, strategy=OVERLAPPED, overlap_steps=2, mixing=0.5))
    assert ready_of(rig.train(3)).trains_on and not rig.loop.waits
    assert rig.train(2) == [Paused(round=1)] and rig.loop.waits
    rig.memory[0] = 3.25
    rig.tell(BOTH)
    assert (rig.parameters == (2.25 + 3.25) / 2).all()
    assert ready_of(rig.train()).steps == 3, "the two beside the exchange count towards the next one"


@pytest.mark.parametrize("strategy", [DELAYED, EAGER])
def test_delayed_it_keeps_what_it_does_beside_the_exchange_upon_the_base(strategy: str) -> None:
    rig = Rig(replace(TRAINING, strategy=strategy, overlap_steps=2, mixing=0.5))
    rig.train(4)
    rig.memory[0] = 3.25
    rig.tell(BOTH)
    assert (rig.parameters == 3.5).all()
    assert ready_of(rig.train(2)).steps == 3


def test_delayed_a_way_back_to_the_base_beside_the_exchange_loses_nothing_made_after_it() -> None:
    rig = Rig(replace(TRAINING, strategy=DELAYED, overlap_steps=2))
    rig.train(3)
    assert [type(report) for report in rig.train(1, math.nan)] == [Failed]
    assert (rig.parameters == 1.0).all()
    rig.train()
    rig.memory[0] = 3.25
    rig.tell(BOTH)
    assert (rig.parameters == 3.5).all(), "the base and the one step made since"
    assert ready_of(rig.train(2)).steps == 3


def test_what_was_not_handed_over_goes_on_where_it_stood_when_the_daemon_is_back() -> None:
    rig = Rig()
    rig.train(2)
    rig.loop.lose(0.0)
    assert rig.train(5) == [], "nobody is there to be told"
    resumed = rig.start(0)
    assert resumed == Resumed(extent=EVERYTHING, round=1, batches_done=7, steps=7, tokens=70, since_round=1)
    rig.tell(Begin(round=3, adopt=False))
    ready = ready_of(rig.train())
    assert (ready.round, ready.steps, ready.batches_done) == (3, 8, 8)
    assert (rig.memory[1] == 3.0).all()


@pytest.mark.parametrize("device", DEVICES)
def test_what_may_still_be_counted_is_handed_over_again_to_the_bit(device: str) -> None:
    rig = Rig(device=device)
    rig.train(3)
    rig.loop.lose(0.0)
    assert not rig.loop.waits
    rig.train(4)
    resumed = rig.start(3)
    assert resumed == Resumed(extent=EVERYTHING, round=1, batches_done=3, steps=3, tokens=30, waits=True, since_round=1)
    ready = ready_of(rig.tell(Begin(round=1, adopt=False)))
    assert (ready.round, ready.steps, ready.tokens, ready.batches_done) == (1, 3, 30, 3)
    assert (rig.memory[1] == 1.75).all() and rig.loop.waits
    assert (rig.parameters == 2.75).all(), "the script's own go on from where they are"
    rig.memory[0] = 5.0
    rig.tell(BOTH)
    assert (rig.parameters == 6.0).all(), "the four steps on top of the new base, and the three not once more"
    ready = ready_of(rig.train())
    assert (ready.round, ready.steps, ready.batches_done) == (2, 5, 8)


def test_what_was_counted_meanwhile_is_merged_once() -> None:
    rig = Rig()
    rig.train(3)
    rig.loop.lose(0.0)
    assert rig.start(3, base=5.0).waits
    assert rig.tell(BOTH) == []
    assert (rig.parameters == 5.0).all() and not rig.loop.waits
    assert ready_of(rig.train(3)).steps == 3


def test_what_the_daemon_never_knew_of_was_not_handed_over() -> None:
    rig = Rig()
    rig.train(3)
    rig.loop.lose(0.0)
    rig.train(1)
    assert rig.start(0) == Resumed(extent=EVERYTHING, round=1, batches_done=4, steps=4, tokens=40, since_round=1)
    assert rig.tell(Begin(round=1, adopt=False)) == []
    assert ready_of(rig.train()).steps == 5


def test_what_another_script_has_contributed_ends_the_old_work() -> None:
    rig = Rig()
    rig.train(3)
    rig.loop.lose(0.0)
    assert rig.start(4, base=5.0) == Resumed(extent=OPTIMIZER, batches_done=4)
    rig.tell(Begin(round=3, adopt=True))
    assert (rig.parameters == 5.0).all()
    ready = ready_of(rig.train(3))
    assert (ready.steps, ready.batches_done) == (3, 7)


@pytest.mark.parametrize("changes", [{"generation": b"g" * 32}, {"seed": 2}], ids=["another life", "another swarm"])
def test_nothing_of_other_work_is_gone_on_from(changes: dict[str, object]) -> None:
    rig = Rig()
    rig.train(2)
    rig.loop.lose(0.0)
    assert rig.start(0, **changes).extent == NOTHING


# -- a shift -----------------------------------------------------------------------------------------------------------

GOSSIP = replace(TRAINING, gossip_after_s=60.0)
AHEAD = replace(GOSSIP, strategy=OVERLAPPED, overlap_steps=2)
SHIFT = Begin(round=2, adopt=False, shift=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("training", "ahead"), [(GOSSIP, 0), (AHEAD, 2)], ids=["waiting", "ahead"])
def test_a_shift_moves_the_parameters_and_the_script_hears_of_it(training: Training, ahead: int, device: str) -> None:
    rig = Rig(training, device=device)
    rig.loop.take_replaced()
    rig.train(3)
    rig.train(ahead)
    assert rig.loop.waits
    rig.memory[1] = [0.5, -0.5, 2.0, 0.0, 1.0, 0.25]  # the daemon's from Ready on
    assert rig.tell(SHIFT) == []
    assert rig.parameters.tolist() == [1.75 + 0.25 * ahead + one for one in (0.5, -0.5, 2.0, 0.0, 1.0, 0.25)]
    assert rig.loop.take_replaced() and not rig.loop.waits and rig.loop.round == 2
    ready = ready_of(rig.train(3 - ahead))
    assert (ready.round, ready.steps, ready.batches_done) == (2, 6, 6)
    assert (rig.memory[1] == rig.parameters).all()


def test_what_was_shifted_is_plain_work_when_the_daemon_goes_after_it() -> None:
    rig = Rig(GOSSIP)
    rig.train(3)
    rig.memory[1] = 0.5
    rig.tell(SHIFT)
    rig.loop.lose(0.0)
    rig.train()
    resumed = rig.start(3)
    assert resumed == Resumed(extent=EVERYTHING, round=2, batches_done=4, steps=4, tokens=40, since_round=1)
    assert rig.tell(Begin(round=2, adopt=False)) == []
    assert (rig.parameters == 2.5).all()


def test_a_daemon_that_dies_before_it_has_said_shift_gets_the_same_once_more() -> None:
    rig = Rig(GOSSIP)
    rig.train(3)
    for _ in range(2):
        rig.memory[1] = np.nan  # half of a move
        rig.loop.lose(0.0)
        assert rig.start(3).waits
        ready = ready_of(rig.tell(SHIFT))
        assert (ready.round, ready.steps, ready.batches_done) == (2, 3, 3)
        assert (rig.memory[1] == 1.75).all() and (rig.parameters == 1.75).all(), "and nothing is shifted"
    rig.memory[1] = np.nan
    rig.loop.lose(0.0)
    rig.train(2)
    rig.start(3)
    rig.tell(SHIFT)
    rig.memory[1] = 0.5
    assert rig.tell(replace(SHIFT, round=3)) == []
    assert (rig.parameters == 2.75).all(), "with the two steps made while it was away"


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_move_that_is_not_finite_changes_nothing_and_is_told(poison: float) -> None:
    rig = Rig(GOSSIP)
    rig.loop.take_replaced()
    rig.train(3)
    rig.memory[1] = 0.5
    rig.memory[1, -1] = poison
    (failed,) = rig.tell(SHIFT)
    assert isinstance(failed, Failed) and (failed.reason, failed.fatal) == (NOT_FINITE, False)
    assert (rig.parameters == 1.75).all() and not rig.loop.take_replaced()
    assert ready_of(rig.train(3)).steps == 6


def test_who_went_back_to_the_base_since_is_not_shifted() -> None:
    rig = Rig(AHEAD)
    rig.train(3)
    rig.train(1, math.nan)
    rig.train(2)
    rig.loop.take_replaced()
    rig.memory[1] = 0.5
    assert rig.tell(SHIFT) == []
    assert (rig.parameters == 1.5).all() and not rig.loop.take_replaced()
    assert ready_of(rig.train()).steps == 3


# -- what is not finite, and what cannot be done -----------------------------------------------------------------------


def test_a_daemon_that_dies_before_it_says_where_to_begin_leaves_nothing_to_resume() -> None:
    model = nn.Linear(2, 2)
    loop = AttachedLoop(LocalParameters(model), torch.optim.SGD(model.parameters()))
    memory = np.zeros((2, ELEMENTS), np.float32)
    loop.start(WORK, memory, "cpu")
    loop.lose(0.0)
    list(loop.step(1.0, 1, 0.0))
    assert loop.start(WORK, memory, "cpu").resumed.extent == NOTHING, "the script's own start is no base"


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_takes_the_model_back_and_the_optimizer_anew(loss: float) -> None:
    rig = Rig()
    rig.optimizer.zero_grad()
    rig.model(torch.ones(1, 2)).sum().backward()
    rig.optimizer.step()
    assert rig.optimizer.state
    (failed,) = rig.train(loss=loss)
    assert isinstance(failed, Failed) and failed.reason == NOT_FINITE and not failed.fatal
    assert (rig.parameters == 1.0).all() and not rig.optimizer.state and rig.loop.take_replaced()
    assert ready_of(rig.train(3)).steps == 3


def test_parameters_that_are_not_finite_are_never_handed_over_and_end_it_at_last() -> None:
    rig = Rig()
    fatal = []
    for _ in range(RESTARTS_MAX + 1):
        rig.train(2)
        with torch.no_grad():
            rig.model.weight[0, 0] = torch.nan
        (failed,) = rig.train()
        assert isinstance(failed, Failed) and np.isnan(rig.memory[1]).all()
        fatal.append(failed.fatal)
    assert fatal == [False] * RESTARTS_MAX + [True]


def test_what_is_made_on_the_base_of_a_daemon_that_is_gone_is_not_counted() -> None:
    rig = Rig()
    rig.train(2)
    rig.loop.lose(0.0)
    rig.train(loss=float("nan"))
    assert rig.start(0).extent == NOTHING


@pytest.mark.parametrize("tokens", [0, -1, True, 2**41, 1.5])
def test_tokens_are_a_positive_whole_number(tokens: int) -> None:
    rig = Rig()
    with pytest.raises(ConfigError, match=r"tokens: is .*Fix: give step\(\) the number"):
        list(rig.loop.step(0.5, tokens, 0.0))


@pytest.mark.parametrize("device", DEVICES)
def test_the_base_is_measured_in_the_scripts_model_which_gets_its_own_back(device: str) -> None:
    seen: list[float] = []

    def measure(model: nn.Module) -> tuple[float, int]:
        seen.extend(model.weight.flatten().tolist())
        return 0.75, 12

    rig = Rig(evaluate=measure, device=device)
    rig.train(2)
    assert rig.tell(Evaluate()) == [Evaluated(round=0, loss_nats=0.75, tokens=12)]
    assert seen == [1.0] * 4 and (rig.parameters == 1.5).all() and rig.parameters.size == ELEMENTS


def test_what_the_evaluation_raises_is_the_scripts_and_the_model_is_whole_again() -> None:
    def fail(model: nn.Module) -> tuple[float, int]:
        raise ValueError("no such file")

    rig = Rig(evaluate=fail)
    rig.train(1)
    with pytest.raises(ValueError, match="no such file"):
        rig.tell(Evaluate())
    assert (rig.parameters == 1.25).all()


def test_what_a_script_cannot_do_is_told() -> None:
    rig = Rig(evaluate=None)
    told = rig.tell(Evaluate(), Sample(prompt=b"", size_bytes=1))
    assert [one.reason for one in told if isinstance(one, Failed) and not one.fatal] == [NO_EVALUATION, NO_TEXT]
    rig = Rig(evaluate=lambda model: (float("nan"), 1))
    (failed,) = rig.tell(Evaluate())
    assert isinstance(failed, Failed) and failed.reason == NOT_FINITE and not failed.fatal
