"""The inner loop: when a peer is ready, what a merge leaves, and what happens to values that are not finite."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from shoal.node.training.devices import choose_device
from shoal.node.training.loop import PROGRESS_PERIOD_S, InnerLoop
from shoal.node.training.messages import (
    NOT_FINITE,
    Begin,
    Evaluate,
    Evaluated,
    Failed,
    Freeze,
    Merge,
    Progress,
    Ready,
    Report,
    Sample,
    Sampled,
)
from shoal.node.training.round_work import RESTARTS_MAX
from shoal.node.training.tasks import DividesData, make_task
from shoal.protocol.errors import ConfigError, ManifestError
from shoal.protocol.manifest import LINEAR
from tests.unit.training.tiny import (
    OPTIONS,
    PEER,
    TASK,
    TEXT,
    TRAINING,
    layout,
    make_loop,
    make_memory,
    make_start,
    make_work,
)

SHARED = Merge(
    round=2, included=b"\x01", part_elements=layout().elements, adopt_all=False, begin=True, place=1, places=3
)
NOTHING = Merge(round=2, included=b"\x00", part_elements=layout().elements, adopt_all=False, begin=True)
EVERYTHING = replace(NOTHING, included=b"\x01")


def tell(loop: InnerLoop, *commands: Begin | Merge | Freeze | Evaluate | Sample, now_s: float = 0.0) -> list[Report]:
    return [report for command in commands for report in loop.handle(command, now_s)]


def run_to_ready(loop: InnerLoop, now_s: float = 0.0, steps_max: int = 50) -> list[Report]:
    """Steps at one moment until Ready; every report on the way, Ready last."""
    reports: list[Report] = []
    for _ in range(steps_max):
        reports += loop.step(now_s)
        if reports and isinstance(reports[-1], Ready):
            return reports
    raise AssertionError(f"not ready in {steps_max} steps")


def ready_of(loop: InnerLoop, now_s: float = 0.0) -> Ready:
    report = run_to_ready(loop, now_s)[-1]
    assert isinstance(report, Ready)
    return report


def test_a_peer_is_ready_after_its_steps_and_then_waits() -> None:
    loop, memory = make_loop()
    assert not loop.training
    tell(loop, Begin(round=1, adopt=True))
    ready = ready_of(loop)
    assert (ready.round, ready.steps, ready.tokens, ready.batches_done) == (1, 4, 4 * 8 * 32, 4)
    assert 4.0 < ready.loss_mean < 5.6
    assert not loop.training
    assert np.isfinite(memory[1]).all()
    assert (memory[1] != memory[0]).mean() > 0.5


def test_a_slow_peer_is_ready_by_time_with_the_least_steps() -> None:
    loop, _ = make_loop(replace(TRAINING, inner_steps=100, steps_min=3, round_time_s=10.0))
    tell(loop, Begin(round=1, adopt=True), now_s=5.0)
    assert not [report for report in loop.step(20.0) if isinstance(report, Ready)], "one step is too few"
    assert not [report for report in loop.step(30.0) if isinstance(report, Ready)]
    assert ready_of(loop, 40.0).steps == 3


def test_time_is_counted_from_the_beginning_of_the_round() -> None:
    loop, _ = make_loop(replace(TRAINING, inner_steps=100, steps_min=1, round_time_s=10.0))
    tell(loop, Begin(round=1, adopt=True), now_s=5.0)
    assert not list(loop.step(5.1))
    assert isinstance(list(loop.step(15.0))[-1], Ready)


def test_freeze_makes_ready_after_the_next_step_and_only_once() -> None:
    loop, _ = make_loop()
    tell(loop, Freeze())
    tell(loop, Begin(round=1, adopt=True))
    assert not list(loop.step(0.0)), "a Freeze before Begin means nothing"
    tell(loop, Freeze())
    assert ready_of(loop).steps == 2
    tell(loop, Begin(round=2, adopt=True))
    assert not list(loop.step(0.0))


def test_a_peer_that_contributed_adopts_the_base_and_starts_counting_anew() -> None:
    loop, memory = make_loop()
    tell(loop, Begin(round=1, adopt=True))
    run_to_ready(loop)
    memory[0] += 0.25
    tell(loop, replace(EVERYTHING, begin=False))
    assert not loop.training
    tell(loop, Begin(round=2, adopt=False))
    tell(loop, Freeze())
    ready = ready_of(loop)
    assert (ready.round, ready.steps, ready.batches_done) == (2, 1, 5)
    assert np.abs(memory[1] - memory[0]).max() < 0.02, "one step away from the new base"


def test_a_peer_that_was_left_out_keeps_its_parameters_and_its_work() -> None:
    loop, memory = make_loop()
    tell(loop, Begin(round=1, adopt=True))
    run_to_ready(loop)
    before = memory[1].copy()
    memory[0] += 0.25
    tell(loop, NOTHING, Freeze())
    ready = ready_of(loop)
    assert (ready.round, ready.steps, ready.tokens) == (2, 5, 5 * 8 * 32)
    assert np.abs(memory[1] - before).max() < 0.02, "one step away from its own parameters"


def test_adopt_all_leaves_nothing_of_the_peers_own() -> None:
    loop, memory = make_loop()
    tell(loop, Begin(round=1, adopt=True))
    run_to_ready(loop)
    memory[0] += 0.25
    tell(loop, replace(NOTHING, adopt_all=True), Freeze())
    assert ready_of(loop).steps == 1
    assert np.abs(memory[1] - memory[0]).max() < 0.02


def test_a_peer_slower_than_the_rounds_still_becomes_ready() -> None:
    loop, _ = make_loop()
    tell(loop, Begin(round=1, adopt=True))
    reports: list[Report] = []
    for round in range(2, 6):
        reports += loop.step(0.0)
        if not reports:
            tell(loop, replace(NOTHING, round=round))
    assert [type(report) for report in reports] == [Ready]
    assert isinstance(reports[0], Ready)
    assert (reports[0].round, reports[0].steps) == (4, 4)


def test_the_learning_rate_follows_the_round_and_not_what_this_peer_has_done() -> None:
    training = replace(TRAINING, weight_decay=0.0, warmup_steps=0, schedule=LINEAR, schedule_rounds=10)
    strides = []
    for round in (1, 6, 11):
        loop, memory = make_loop(replace(training, learning_rate_end=0.2))
        tell(loop, Begin(round=round, adopt=True), Freeze())
        ready_of(loop)
        strides.append(np.abs(memory[1] - memory[0]).max())  # AdamW's first step is as long as the rate
    assert strides == pytest.approx([3e-3, 0.6 * 3e-3, 0.2 * 3e-3], rel=1e-3)


def test_local_is_written_at_ready_and_at_no_other_time() -> None:
    loop, memory = make_loop()
    tell(loop, Begin(round=1, adopt=True))
    list(loop.step(0.0))
    assert np.isnan(memory[1]).all()
    run_to_ready(loop)
    held = memory[1].copy()
    tell(loop, Evaluate(), Sample(prompt=b"x", size_bytes=2), Begin(round=1, adopt=False))
    list(loop.step(0.0))
    assert (memory[1] == held).all()


def test_two_peers_from_one_base_take_different_ways_and_one_peer_the_same() -> None:
    ends = []
    for peer in (PEER, PEER, bytes(32)):
        memory = make_memory()
        loop = InnerLoop(make_start(make_work(changes={"peer": peer})), memory)
        tell(loop, Begin(round=1, adopt=True))
        run_to_ready(loop)
        ends.append(memory[1])
    assert (ends[0] == ends[1]).all()
    assert (ends[0] != ends[2]).mean() > 0.5


def test_a_peer_resumes_its_data_where_it_stopped() -> None:
    memory = make_memory()
    loop = InnerLoop(make_start(make_work(changes={"batches_done": 1000})), memory)
    tell(loop, Begin(round=1, adopt=True))
    assert ready_of(loop).batches_done == 1004


def test_progress_comes_at_its_pace_with_the_rate_since_the_last() -> None:
    loop, _ = make_loop(replace(TRAINING, inner_steps=1000))
    tell(loop, Begin(round=1, adopt=True), now_s=100.0)
    reports = [report for index in range(1, 13) for report in loop.step(100.0 + index * PROGRESS_PERIOD_S / 4)]
    assert [type(report) for report in reports] == [Progress] * 3
    last = reports[-1]
    assert isinstance(last, Progress)
    assert (last.round, last.steps, last.tokens) == (1, 12, 12 * 8 * 32)
    assert last.tokens_per_s == pytest.approx(4 * 8 * 32 / PROGRESS_PERIOD_S)


def test_looking_at_the_base_does_not_disturb_the_training() -> None:
    ends = []
    for looks in (True, False):
        loop, memory = make_loop()
        tell(loop, Begin(round=1, adopt=True))
        list(loop.step(0.0))
        if looks:
            reports = tell(loop, Evaluate(), Sample(prompt=b"def ", size_bytes=5))
            assert [type(report) for report in reports] == [Evaluated, Sampled]
            assert isinstance(reports[0], Evaluated)
            assert reports[0].loss_nats == pytest.approx(np.log(256), abs=1e-4), "of the base, not of local"
        run_to_ready(loop)
        ends.append(memory[1])
    assert (ends[0] == ends[1]).all()


def test_rounds_of_one_peer_bring_the_held_out_loss_down() -> None:
    loop, memory = make_loop(replace(TRAINING, inner_steps=15))
    for round in range(1, 5):
        tell(loop, Begin(round=round, adopt=True))
        run_to_ready(loop)
        memory[0] = memory[1]
    (report,) = tell(loop, Evaluate())
    assert isinstance(report, Evaluated)
    assert report.loss_nats < 3.6


@pytest.fixture
def poisoned_loop(monkeypatch: pytest.MonkeyPatch) -> tuple[InnerLoop, np.ndarray, list[int]]:
    """A loop whose loss is NaN at the steps in the list."""
    loop, memory = make_loop()
    bad_steps: list[int] = []
    count = iter(range(1000))
    honest = loop._task.loss

    def loss(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
        value = honest(model, batch)
        return value * float("nan") if model.training and next(count) in bad_steps else value

    monkeypatch.setattr(loop._task, "loss", loss)
    return loop, memory, bad_steps


def test_after_a_loss_that_is_not_finite_the_peer_starts_over_from_the_base(
    poisoned_loop: tuple[InnerLoop, np.ndarray, list[int]],
) -> None:
    loop, memory, bad_steps = poisoned_loop
    bad_steps += [2]
    tell(loop, Begin(round=1, adopt=True))
    failed, ready = run_to_ready(loop)
    assert isinstance(failed, Failed)
    assert (failed.reason, failed.fatal) == (NOT_FINITE, False)
    assert "batch 2" in failed.detail
    assert isinstance(ready, Ready)
    assert ready.steps == 4, "the two good steps before are lost"
    assert ready.batches_done == 7, "the bad batch is not met again"
    assert np.isfinite(memory[1]).all()


def test_a_peer_that_cannot_get_away_from_the_base_gives_up(
    poisoned_loop: tuple[InnerLoop, np.ndarray, list[int]],
) -> None:
    loop, memory, bad_steps = poisoned_loop
    bad_steps += range(1000)
    tell(loop, Begin(round=1, adopt=True))
    reports: list[Report] = []
    while loop.training:
        reports += loop.step(0.0)
    assert [report.fatal for report in reports if isinstance(report, Failed)] == [False] * RESTARTS_MAX + [True]
    assert len(reports) == RESTARTS_MAX + 1
    assert np.isnan(memory[1]).all(), "nothing was handed over"


@pytest.mark.parametrize("byte", [b"e", b"\xff"], ids=["in the text", "in no text"])
def test_a_base_that_is_not_finite_is_never_answered_by_ready(byte: bytes) -> None:
    loop, memory = make_loop()
    memory[0, ord(byte) * OPTIONS["width"]] = np.inf
    tell(loop, Begin(round=1, adopt=True))
    reports: list[Report] = []
    while loop.training:
        reports += loop.step(0.0)
    assert {type(report) for report in reports} == {Failed}


def test_a_base_without_a_finite_loss_is_not_evaluated() -> None:
    loop, memory = make_loop()
    memory[0, ord("e") * OPTIONS["width"]] = np.inf
    (failed,) = tell(loop, Evaluate())
    assert isinstance(failed, Failed)
    assert (failed.reason, failed.fatal) == (NOT_FINITE, False)


def test_local_parameters_that_are_not_finite_are_not_handed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    loop, memory = make_loop()
    tell(loop, Begin(round=1, adopt=True), Freeze())
    verdicts: Iterator[bool] = iter((False,))
    honest = loop._strategy.export
    monkeypatch.setattr(loop._strategy, "export", lambda local: next(verdicts, True) and honest(local))
    (failed,) = loop.step(0.0)
    assert isinstance(failed, Failed)
    assert "local parameters" in failed.detail
    assert ready_of(loop).steps == 4
    assert np.isfinite(memory[1]).all()


def test_what_of_the_text_could_not_be_used_is_told_with_the_first_report(tmp_path: Path) -> None:
    assert make_loop()[0].started().notice == ""
    text = tmp_path / "a.jsonl"
    text.write_text('{"text": "%s"}\n{}\n' % ("x" * 70_000))
    loop = InnerLoop(make_start(text=str(text)), make_memory())
    assert "1 of 2 lines" in loop.started().notice


def test_settings_that_the_task_ignores_are_told_with_the_first_report() -> None:
    start = replace(make_start(), tokenizer="tokenizer.json", weights="weights")
    assert InnerLoop(make_start(), make_memory()).started().unused == ()
    started = InnerLoop(start, make_memory()).started()
    assert (started.unused, started.loss_unit) == (("trainer.tokenizer", "trainer.weights"), "nats a token")


def test_a_task_that_makes_another_layout_is_refused() -> None:
    with pytest.raises(ManifestError, match="layout"):
        InnerLoop(make_start(make_work(changes={"layout_digest": bytes(32)})), make_memory())
    with pytest.raises(ManifestError, match="layout"):
        InnerLoop(make_start(), make_memory()[:, :-1])


def test_a_gpu_that_is_not_there_is_refused_and_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto").type == "cpu"
    assert choose_device("cpu").type == "cpu"
    with pytest.raises(ConfigError, match=r"trainer\.device"):
        choose_device("cuda")


def test_after_a_round_its_batches_come_from_its_share_of_divided_data() -> None:
    loop, _ = make_loop()
    work = make_work()
    apart = make_task(TASK).open_data(Path(TEXT), work)
    assert isinstance(apart, DividesData)
    tell(loop, Begin(round=1, adopt=True))
    before = loop._batches.batch(7)
    assert np.array_equal(before, apart.batch(7))
    tell(loop, SHARED)
    apart.take_share(1, 3)
    assert np.array_equal(loop._batches.batch(7), apart.batch(7)) and not np.array_equal(before, apart.batch(7))
