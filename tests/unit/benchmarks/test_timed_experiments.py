"""Experiments in simulated time, and training beside an exchange: each against the trainer's own loop, or by hand."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.experiments.arms import Arm, Point, Run, run_arm
from benchmarks.experiments.catalogue import DRAFT, PATIENT_S, SPEEDS, make_arms
from benchmarks.experiments.churn import (
    DOWN_S,
    ROUND_S,
    STEPS_PER_S,
    WORKERS,
    ChurnArm,
    ChurnPoint,
    ChurnRun,
    draw_deaths,
    run_churn,
    train_synchronously,
)
from benchmarks.experiments.report import draw_churn, draw_plot, format_churn, format_times
from benchmarks.experiments.swarm import Swarm, worker_peer
from benchmarks.experiments.texts import PACKAGE
from benchmarks.experiments.timetable import count_steps, keep_time, open_stage, run_to_certificate
from shoal.node.training.loop import InnerLoop
from shoal.node.training.messages import Begin, Merge, Ready
from shoal.protocol.aggregators import planned_weights
from shoal.protocol.manifest import OVERLAPPED, Draft, Outer, Rounds, Training, make_manifest
from tests.unit.training.tiny import SEED, TASK, TRAINING, layout, make_memory, make_start, make_work

ELEMENTS = layout().elements
OVERLAP = 3
TRAINED = replace(TRAINING, strategy=OVERLAPPED, overlap_steps=OVERLAP, mixing=0.25)
ROUNDS = Rounds(codec="fp32", part_elements=1 << 14)
# One worker whose work the base takes over whole.
LONELY = Draft(
    name="tiny", task=TASK, seed=SEED, training=TRAINED, outer=Outer(optimizer="sgd", learning_rate=1.0), rounds=ROUNDS
)
HOUR_S = 3600.0


def make_swarm(draft: Draft = LONELY) -> Swarm:
    manifest = make_manifest(draft, layout(), worker_peer(0), (worker_peer(0),))
    start = make_start(make_work(draft.training, {"peer": worker_peer(0)}))
    loop = InnerLoop(start, make_memory())
    return Swarm(manifest, [loop._batches])  # type: ignore[list-item]  # the windows of a ByteGpt task


def by_time(round_time_s: float, **training: int) -> Draft:
    changed = replace(DRAFT.training, inner_steps=1000, round_time_s=round_time_s, **training)
    return replace(DRAFT, training=changed, rounds=replace(DRAFT.rounds, grace_s=2.0))


def by_steps(inner_steps: int, grace_s: float) -> Draft:
    training = replace(DRAFT.training, inner_steps=inner_steps)
    return replace(DRAFT, training=training, rounds=replace(DRAFT.rounds, grace_s=grace_s))


# -- beside the exchange -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", [(), (1,), (2,)], ids=["none lost", "first lost", "second lost"])
def test_training_beside_an_exchange_is_what_the_trainers_loop_makes_of_it(lost: Sequence[int]) -> None:
    swarm = make_swarm()
    memory = make_memory()
    loop = InnerLoop(make_start(make_work(TRAINED, {"peer": worker_peer(0)})), memory)
    assert not list(loop.handle(Begin(round=1, adopt=True), 0.0))
    for number in range(1, 4):
        (ready,) = (one for _ in range(50) if loop.training for one in loop.step(0.0) if isinstance(one, Ready))
        assert not loop.training, "it waits for the base after its steps beside the exchange"
        # Where it is lost another peer's contribution, of nothing, is certified: the base stays as it is.
        _run_round(swarm, is_lost=number in lost)
        np.testing.assert_array_equal(swarm.workers[0].local, memory[1])
        included = b"\x00" if number in lost else b"\xff"
        if number not in lost:
            np.testing.assert_allclose(swarm.base, memory[1], atol=1e-7)
        memory[0] = swarm.base
        merge = Merge(round=number + 1, included=included, part_elements=1 << 14, adopt_all=False, begin=True)
        list(loop.handle(merge, 0.0))
        np.testing.assert_array_equal(swarm.workers[0].parameters(), _local(loop))
        assert swarm.workers[0].steps == loop._rounds.local.steps
        assert ready.steps == (8 if number - 1 in lost else 4)


def _run_round(swarm: Swarm, *, is_lost: bool) -> None:
    """What run_round does, but for a loss: with nobody else the round would not be certified at all."""
    if not is_lost:
        swarm.run_round([0])
        return
    worker, number = swarm.workers[0], 1
    worker.train(swarm.base, number)
    worker.train_on(swarm.base, number)
    worker.merge(swarm.base, ())


def _local(loop: InnerLoop) -> np.ndarray:
    found = np.empty(ELEMENTS, np.float32)
    assert loop._strategy.export(found)
    return found


def test_who_is_away_counts_what_it_trained_beside_an_exchange_once() -> None:
    worker = make_swarm().workers[0]
    base = make_memory()[0]
    worker.train(base, 1)
    worker.train_on(base, 1)
    for _ in range(3):
        worker.merge(base, ())
    assert worker.steps == TRAINED.inner_steps + OVERLAP
    worker.train(base, 1)
    assert worker.steps == 2 * TRAINED.inner_steps


def test_stale_work_weighs_less_where_an_experiment_says_so() -> None:
    worker = make_swarm().workers[0]
    base = make_memory()[0]
    worker.train(base, 1)
    tokens = worker.tokens
    assert [worker.claim_tokens(exponent) for exponent in (0.0, 1.0)] == [tokens, tokens]
    for _ in range(3):
        worker.merge(base, ())
    assert [worker.claim_tokens(exponent) for exponent in (0.0, 1.0, 2.0)] == [tokens, tokens // 2, tokens // 4]


# -- who is ready when -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "training",
    [
        {"inner_steps": 16},
        {"inner_steps": 100, "round_time_s": 8.0, "steps_min": 1},
        {"inner_steps": 100, "round_time_s": 7.9, "steps_min": 1},
        {"inner_steps": 100, "round_time_s": 1.0, "steps_min": 6},
        {"inner_steps": 3, "round_time_s": 8.0, "steps_min": 1},
    ],
    ids=["steps", "time", "time between steps", "least steps", "steps before time"],
)
@pytest.mark.parametrize("speed", [0.5, 1.0, 4.0])
def test_a_worker_is_ready_when_the_trainer_is(training: dict[str, float], speed: float) -> None:
    """The trainer's loop, at whose clock a step takes 1 / speed seconds."""
    wanted = replace(TRAINING, **training)
    loop = InnerLoop(make_start(make_work(wanted)), make_memory())
    assert not list(loop.handle(Begin(round=1, adopt=True), 0.0))
    steps = 0
    while loop.training:
        steps += 1
        list(loop.step(steps / speed))
    assert count_steps(wanted, speed) == steps


def test_with_patience_all_are_in_every_round_with_equal_steps() -> None:
    rounds = list(keep_time(by_steps(16, PATIENT_S), SPEEDS, 80.0))
    # Who is at it when half of the others are ready for the very first round ends with them.
    assert [set(one.steps.values()) for one in rounds[1:]] == [{16}] * (len(rounds) - 1)
    assert [len(one.steps) for one in rounds] == [6] * len(rounds)
    assert all(16.0 < after.at_s - before.at_s < 17.0 for before, after in itertools.pairwise(rounds))
    assert rounds[-1].at_s <= 80.0 < rounds[-1].at_s + 17.0


def test_with_little_patience_the_fast_wait_for_the_middle_and_not_for_the_slow() -> None:
    rounds = list(keep_time(by_steps(16, 2.0), SPEEDS, 200.0))[-6:]
    assert [len(one.steps) for one in rounds] in ([4, 6] * 3, [6, 4] * 3)
    assert all({2, 3, 4, 5} <= one.steps.keys() for one in rounds)
    assert all(8.0 < after.at_s - before.at_s < 9.0 for before, after in itertools.pairwise(rounds))


def test_by_time_everybody_is_in_every_round_with_what_it_has_time_for() -> None:
    rounds = list(keep_time(by_time(8.0), SPEEDS, 60.0))
    assert [one.steps for one in rounds] == [{0: 8, 1: 8, 2: 16, 3: 16, 4: 32, 5: 32}] * len(rounds)
    assert len(rounds) == 7


def test_weights_are_those_that_the_swarm_gives_for_these_steps() -> None:
    stage = open_stage(by_time(8.0), SPEEDS)
    run_to_certificate(stage, 1)
    members = stage.certificate(1).result.members
    steps = [member.steps for member in members]
    # A batch is as large for all, and then only the steps count.
    np.testing.assert_array_equal([one.weight for one in members], planned_weights([4 * 64 * s for s in steps], steps))
    assert len(set(steps)) == 3


def test_an_arm_with_speeds_trains_by_its_timetable() -> None:
    draft = replace(LONELY, training=replace(TRAINING, inner_steps=100, steps_min=1, round_time_s=8.0))
    arm = Arm(name="timed", draft=draft, workers=(2,), speeds=(0.5, 1.0), until_s=30.0, texts=PACKAGE)
    run, again = (run_arm(arm, 1) for _ in range(2))
    timetable = list(keep_time(draft, arm.speeds, 30.0))
    assert run.rounds == len(timetable) == 3
    assert [point.time_s for point in run.points[1:]] == [one.at_s for one in timetable]
    assert [point.tokens for point in run.points] == [12 * 8 * 32 * number for number in range(4)]
    assert [point.steps for point in run.points] == [0, 8, 16, 24]
    assert run.points == again.points and run.points[-1].loss < run.points[0].loss


# -- churn -------------------------------------------------------------------------------------------------------------


def test_deaths_come_as_often_as_said_and_nobody_dies_while_it_is_down() -> None:
    until_s = 4000 * ROUND_S
    deaths = draw_deaths(8, until_s, seed=1)
    assert deaths == draw_deaths(8, until_s, seed=1) != draw_deaths(8, until_s, seed=2)
    assert len(deaths) == pytest.approx(WORKERS * until_s / (8 * ROUND_S + DOWN_S), rel=0.05)
    for worker in range(WORKERS):
        own = [at_s for at_s, who in deaths if who == worker]
        assert min(np.diff(own)) > DOWN_S
    assert draw_deaths(None, until_s, seed=1) == ()


@pytest.mark.parametrize(
    ("deaths", "checkpoint_s", "trained_s"),
    [
        ((), 600.0, HOUR_S),
        (((1000.0, 0),), 0.0, HOUR_S - DOWN_S),
        (((1000.0, 0),), 600.0, HOUR_S - DOWN_S - 400.0),
        (((1000.0, 0), (1100.0, 1)), 0.0, HOUR_S - DOWN_S - 100.0),
        (((1000.0, 0), (1100.0, 1)), 600.0, HOUR_S - DOWN_S - 100.0 - 400.0),
        (((1000.0, 0), (1000.0 + DOWN_S + 500.0, 1)), 600.0, HOUR_S - 2 * DOWN_S - 400.0 - 500.0),
        (((HOUR_S - 100.0, 0),), 600.0, HOUR_S - 600.0),
        (((HOUR_S + 100.0, 0),), 600.0, HOUR_S),
    ],
    ids=[
        "none",
        "standstill",
        "back to a checkpoint",
        "two at once",
        "two at once, checkpoint",
        "twice to the same checkpoint",
        "at the end",
        "later",
    ],
)
def test_synchronous_training_by_hand(
    deaths: tuple[tuple[float, int], ...], checkpoint_s: float, trained_s: float
) -> None:
    assert train_synchronously(deaths, checkpoint_s, HOUR_S) == pytest.approx(trained_s * WORKERS * STEPS_PER_S)


def test_a_swarm_counts_what_is_certified() -> None:
    calm = make_arms("churn", 8)[0]
    run = run_churn(calm, 0)
    assert (run.deaths, run.alive, run.rounds) == (0, 1.0, 7), "the eighth is certified just after the end"
    assert run.goodput == pytest.approx(7 / 8)
    deadly = replace(calm, name="x", mtbf_rounds=4)
    runs = [run_churn(deadly, seed) for seed in (0, 0, 1)]
    assert replace(runs[0], wall_s=0.0) == replace(runs[1], wall_s=0.0) != replace(runs[2], wall_s=0.0)
    assert runs[0].deaths > 4 and 0.4 < runs[0].goodput < runs[0].alive < 1.0
    synchronous = run_churn(replace(deadly, checkpoint_s=ROUND_S), 0)
    assert (synchronous.deaths, synchronous.alive) == (runs[0].deaths, runs[0].alive), "both sides see the same deaths"


# -- what is shown -----------------------------------------------------------------------------------------------------


def make_run(arm: str, losses: Sequence[float], problem: str = "") -> Run:
    points = [Point(steps=4 * at, tokens=10_000 * at, loss=loss, time_s=8.0 * at) for at, loss in enumerate(losses)]
    return Run(arm=arm, seed=0, contribution_bytes=4, points=tuple(points), problem=problem, wall_s=1.0, rounds=3)


def test_the_table_of_speeds_says_when_the_first_arms_loss_was_reached(tmp_path: Path) -> None:
    arm = Arm(name="first", draft=DRAFT, workers=(6,), speeds=SPEEDS, until_s=30.0)
    arms = [replace(arm, name=name) for name in ("first", "sooner", "never", "diverged", "not run")]
    runs = [
        make_run("first", [5.0, 4.0, 3.0]),
        make_run("sooner", [5.0, 3.0, 2.0]),
        make_run("never", [5.0, 4.5, 4.0]),
        make_run("diverged", [5.0, 2.0], "not finite"),
    ]
    assert format_times(arms, runs).splitlines()[2:] == [
        "| first | 0.02 | 3 | 3.0000 | 3.0000 | +0.00 % | 16 |",
        "| sooner | 0.02 | 3 | 2.0000 | 2.0000 | -33.33 % | 8 |",
        "| never | 0.02 | 3 | 4.0000 | 4.0000 | +33.33 % | not reached |",
        "| diverged | 0.01 | 3 | diverged | diverged after 4 steps | – | 8 |",
    ]
    pytest.importorskip("matplotlib")
    assert draw_plot(tmp_path / "plot.svg", "speeds", arms, runs)
    assert "simulated seconds" in (tmp_path / "plot.svg").read_text()


def test_the_table_of_churn_has_both_sides(tmp_path: Path) -> None:
    whole = WORKERS * STEPS_PER_S * 100.0
    arm = ChurnArm(name="swarm, 8 rounds", draft=DRAFT, rounds=8, mtbf_rounds=8)
    arms = [arm, replace(arm, name="synchronous, 8 rounds", checkpoint_s=0.0), replace(arm, name="not run")]

    def made(name: str, seed: int, share: float) -> ChurnRun:
        points = (ChurnPoint(time_s=100.0, steps=share * whole),)
        return ChurnRun(arm=name, seed=seed, deaths=3 + seed, alive=0.8, rounds=7, points=points, wall_s=1.0)

    runs = [made(arm.name, 0, 0.5), made(arm.name, 1, 0.7), made(arms[1].name, 0, 0.4), made(arms[1].name, 1, 0.4)]
    assert format_churn(arms, runs).splitlines()[2:] == [
        "| swarm, 8 rounds | 3, 4 | 0.800 | 7, 7 | 0.600 | 0.500, 0.700 | 0.750 |",
        "| synchronous, 8 rounds | 3, 4 | 0.800 | – | 0.400 | 0.400, 0.400 | 0.500 |",
    ]
    pytest.importorskip("matplotlib")
    assert draw_churn(tmp_path / "plot.png", "churn", arms, runs)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_sides_of_churn_share_their_lives_and_the_calm_one_has_none() -> None:
    arms = make_arms("churn", 8)
    assert [arm.mtbf_rounds for arm in arms] == [None] + [mtbf for mtbf in (32, 16, 8, 4, 2) for _ in range(4)]
    assert [arm.checkpoint_s for arm in arms[1:5]] == [None, 0.0, ROUND_S, 4 * ROUND_S]


def test_rounds_by_time_are_never_ended_by_steps() -> None:
    arms = [arm for arm in make_arms("speeds", 8) if arm.draft.training.round_time_s < HOUR_S / 60]
    assert len(arms) == 2
    for arm in arms:
        assert max(arm.speeds) * arm.draft.training.round_time_s < arm.draft.training.inner_steps
    assert isinstance(arms[0].draft.training, Training)
