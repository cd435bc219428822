"""The swarm of the experiments against plain training, and what the experiments' arms are made of."""

import argparse
import itertools
import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.experiments.__main__ import main
from benchmarks.experiments.arms import Arm, Point, Run, make_arm_manifest, open_batches, run_arm
from benchmarks.experiments.catalogue import EXPERIMENTS, ROUNDS_UNIT, WORKERS_INNER, make_arms
from benchmarks.experiments.report import draw_plot, format_table
from benchmarks.experiments.swarm import BY_GROWTH, BY_RATIO, Diverged, HeldOut, Swarm, Synchronous
from benchmarks.experiments.texts import PACKAGE, PACKAGES, TEXTS
from shoal.node.training.data import ByteWindows, Corpus, read_corpus
from shoal.node.training.local_parameters import load_parameters
from shoal.node.training.optimizers import ADAM_BETAS
from shoal.node.training.tasks import make_task
from shoal.protocol.attendance import FRESHNESS, NO_ATTENDANCE, PARTICIPATION, WORK, Attendance
from shoal.protocol.contribution import NonFiniteContribution
from shoal.protocol.errors import ConfigError
from shoal.protocol.layout import initialise
from shoal.protocol.manifest import Draft, Manifest, Outer, Rounds, Task, Training

torch.set_num_threads(1)

STEPS = 3
OPTIONS = {"layers": 1, "heads": 2, "width": 32, "context": 16}
DRAFT = Draft(
    name="tiny",
    task=Task(kind="byte_gpt", options=json.dumps(OPTIONS)),
    training=Training(inner_steps=STEPS, steps_min=1, batch_size=4, learning_rate=3e-3, warmup_steps=2),
    outer=Outer(optimizer="sgd", learning_rate=1.0),
    rounds=Rounds(codec="fp32", part_elements=1 << 14),
)
# Each step multiplies every parameter by -99.
EXPLODING = replace(DRAFT, training=replace(DRAFT.training, learning_rate=10.0, weight_decay=10.0))
ARM = Arm(name="tiny", draft=DRAFT, workers=(2, 2), texts=PACKAGE)


@cache
def corpus() -> Corpus:
    return read_corpus(Path(argparse.__file__))


def make_manifest(workers: int, draft: Draft = DRAFT) -> Manifest:
    return make_arm_manifest(replace(ARM, draft=draft, workers=(workers,)), seed=7)


def make_batches(manifest: Manifest, workers: int) -> list[ByteWindows]:
    return open_batches(manifest, [corpus()] * workers)


def make_swarm(workers: int, draft: Draft = DRAFT) -> Swarm:
    manifest = make_manifest(workers, draft)
    return Swarm(manifest, make_batches(manifest, workers))


def with_codec(codec: str) -> Draft:
    return replace(DRAFT, rounds=replace(DRAFT.rounds, codec=codec, update_codec="int8"))


def train_plainly(
    manifest: Manifest, batches: list[ByteWindows], steps: int, start: np.ndarray | None = None
) -> np.ndarray:
    """torch's own AdamW on one model, with the batches of all workers in one: the reference."""
    task = make_task(manifest.task)
    model = task.build_model()
    load_parameters(model, initialise(manifest.layout, manifest.seed) if start is None else start)
    training = manifest.training
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=training.learning_rate, betas=ADAM_BETAS, weight_decay=training.weight_decay
    )
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = training.learning_rate * min(1.0, (step + 1) / training.warmup_steps)
        optimizer.zero_grad()
        task.loss(model, torch.from_numpy(np.concatenate([one.batch(step) for one in batches]))).backward()
        nn.utils.clip_grad_norm_(model.parameters(), training.gradient_clip)
        optimizer.step()
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()]).numpy()


# -- the swarm ---------------------------------------------------------------------------------------------------------


def test_one_worker_whose_updates_are_taken_whole_is_plain_training() -> None:
    swarm = make_swarm(1)
    for _ in range(3):
        swarm.run_round([0])
    expected = train_plainly(make_manifest(1), make_batches(make_manifest(1), 1), 3 * STEPS)
    np.testing.assert_allclose(swarm.base, expected, atol=2e-6)


def test_fragments_of_one_workers_updates_are_plain_training_as_of_their_last_turn() -> None:
    swarm = make_swarm(1, replace(DRAFT, rounds=replace(DRAFT.rounds, part_elements=1 << 12, fragments=3)))
    manifest, batches = make_manifest(1), make_batches(make_manifest(1), 1)
    for _ in range(4):
        swarm.run_round([0])
    np.testing.assert_allclose(swarm.workers[0].parameters(), train_plainly(manifest, batches, 4 * STEPS), atol=2e-6)
    turns = (np.arange(swarm.base.size) // (1 << 12)) % 3
    for turn, rounds in ((0, 4), (1, 2), (2, 3)):
        expected = train_plainly(manifest, batches, rounds * STEPS)
        np.testing.assert_allclose(swarm.base[turns == turn], expected[turns == turn], atol=2e-6)


def test_the_synchronous_baseline_is_plain_training_on_the_union_of_the_batches() -> None:
    manifest = make_manifest(3)
    baseline = Synchronous(manifest, make_batches(manifest, 3))
    for _ in range(2):
        baseline.run_round()
    np.testing.assert_allclose(baseline.base, train_plainly(manifest, make_batches(manifest, 3), 2 * STEPS), atol=2e-6)


@pytest.mark.parametrize("codec", ["fp32", "int8", "topk2"])
def test_two_workers_with_equal_data_are_one(codec: str) -> None:
    draft = replace(with_codec(codec), outer=Outer())
    alone, manifest = make_swarm(1, draft), make_manifest(2, draft)
    twins = Swarm(manifest, make_batches(manifest, 1) * 2)
    for _ in range(2):
        alone.run_round([0])
        twins.run_round([0, 1])
    np.testing.assert_array_equal(twins.base, alone.base)
    assert not np.array_equal(alone.base, initialise(manifest.layout, manifest.seed))


def test_workers_average_what_they_have_trained() -> None:
    swarm = make_swarm(2)
    swarm.run_round([0, 1])
    trained = [worker.local.astype(np.float64) for worker in swarm.workers]
    np.testing.assert_allclose(swarm.base, np.mean(trained, axis=0), atol=1e-7)
    assert not np.allclose(trained[0], trained[1], atol=1e-4), "each has data of its own"


def test_a_worker_whose_contribution_is_lost_keeps_its_parameters_and_its_residual() -> None:
    swarm = make_swarm(2, with_codec("int8"))
    swarm.run_round([0, 1])
    counted, lost = swarm.workers
    residual = lost.contributor.residual.copy()
    swarm.run_round([0, 1], lost=frozenset({1}))
    np.testing.assert_array_equal(lost.parameters(), lost.local)
    np.testing.assert_array_equal(lost.contributor.residual, residual)
    np.testing.assert_array_equal(counted.parameters(), swarm.base)
    assert residual.any() and not np.array_equal(lost.local, swarm.base)


@pytest.mark.parametrize("lost", [[True, False], [False, True, False]], ids=["first", "second"])
def test_lost_work_is_in_the_next_contribution(lost: list[bool]) -> None:
    swarm = make_swarm(1)
    for one in lost:
        before = swarm.base.copy()
        swarm.run_round([0], lost=frozenset({0} if one else ()))
        assert np.array_equal(swarm.base, before) == one
    expected = train_plainly(make_manifest(1), make_batches(make_manifest(1), 1), len(lost) * STEPS)
    np.testing.assert_allclose(swarm.base, expected, atol=2e-6)


def test_the_contribution_after_a_loss_is_anchored_at_the_base_of_then_and_weighs_more() -> None:
    swarm = make_swarm(2)
    swarm.run_round([0, 1], lost=frozenset({1}))
    base = swarm.base.copy()
    swarm.run_round([0, 1])
    # Twice the tokens in twice the steps: two thirds of the round.
    deltas = [base - worker.local for worker in swarm.workers]
    np.testing.assert_allclose(swarm.base, base - (deltas[0] + 2 * deltas[1]) / 3, atol=1e-7)


@pytest.mark.parametrize("present", [[0, 1], [0]], ids=["contributions lost", "away"])
def test_who_missed_too_many_rounds_starts_from_the_base(present: list[int]) -> None:
    draft = replace(with_codec("int8"), training=replace(DRAFT.training, missed_rounds_max=1))
    swarm = make_swarm(2, draft)
    swarm.run_round([0, 1])
    for number in range(2):
        swarm.run_round(present, lost=frozenset({1}))
        assert np.array_equal(swarm.workers[1].parameters(), swarm.base) == (number == 1)
    assert not swarm.workers[1].contributor.residual.any()


def test_who_joins_later_begins_at_the_base_of_then() -> None:
    swarm, alone = make_swarm(2), make_swarm(1)
    for _ in range(2):
        swarm.run_round([0])
        alone.run_round([0])
    np.testing.assert_array_equal(swarm.base, alone.base)
    start = swarm.base.copy()
    swarm.run_round([0, 1])
    manifest = make_manifest(2)
    expected = train_plainly(manifest, make_batches(manifest, 2)[1:], STEPS, start)
    np.testing.assert_allclose(swarm.workers[1].local, expected, atol=2e-6)


def test_without_feedback_is_as_if_every_residual_were_forgotten() -> None:
    draft = with_codec("int4")
    forgetful = make_swarm(2, replace(draft, rounds=replace(draft.rounds, residual_kept=0.0)))
    cleared, carrying = make_swarm(2, draft), make_swarm(2, draft)
    for _ in range(2):
        for swarm in (forgetful, cleared, carrying):
            swarm.run_round([0, 1])
        for worker in cleared.workers:
            assert worker.contributor.residual.any()
            worker.contributor.clear()
    np.testing.assert_array_equal(forgetful.base, cleared.base)
    assert not np.array_equal(forgetful.base, carrying.base)


@pytest.mark.parametrize("penalty", [BY_RATIO, BY_GROWTH])
def test_an_update_is_divided_by_how_much_farther_the_base_moved(penalty: str) -> None:
    """The updates of these drafts are taken whole, so that a base and a worker's parameters say what each was."""
    manifest = make_manifest(1)
    swarm = Swarm(manifest, make_batches(manifest, 1), gap_penalty=penalty)
    bases, ratios = [swarm.base.copy()], []
    for number in range(6):
        swarm.run_round([0])
        gaps = [float(np.linalg.norm(one - other)) for one, other in itertools.pairwise(bases)]
        ratios.append(gaps[-1] / gaps[-2] if number > 1 else 1.0)
        divisor = ratios[-1] if penalty == BY_RATIO else max(1.0, ratios[-1])
        moved = swarm.workers[0].local - bases[-1]
        np.testing.assert_allclose(swarm.base, bases[-1] + moved / divisor, atol=1e-6)
        bases.append(swarm.base.copy())
    assert min(ratios) < 0.95 and max(ratios) > 1.05, "in both directions"


@pytest.mark.parametrize("inner_steps", [STEPS, 40], ids=["between rounds", "within a round"])
def test_values_that_are_not_finite_end_the_run(inner_steps: int) -> None:
    swarm = make_swarm(1, replace(EXPLODING, training=replace(EXPLODING.training, inner_steps=inner_steps)))
    with pytest.raises((Diverged, NonFiniteContribution), match="not finite"):
        for _ in range(100):
            swarm.run_round([0])


def test_the_held_out_loss_is_the_mean_over_all_windows() -> None:
    manifest = make_manifest(1)
    windows = make_batches(manifest, 1)[0].held_out()
    windows = np.concatenate([windows, windows[:5]])  # no multiple of what is looked at in one go
    task = make_task(manifest.task)
    model, swarm = task.build_model(), make_swarm(1)
    swarm.run_round([0])
    load_parameters(model, swarm.base)
    assert HeldOut(manifest, windows).loss(swarm.base) == pytest.approx(
        task.loss(model, torch.from_numpy(windows)).item()
    )


# -- arms --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("synchronous", [False, True])
def test_the_same_seed_gives_the_same_losses_and_another_one_others(synchronous: bool) -> None:
    arm = replace(ARM, synchronous=synchronous, lost_share=0.0 if synchronous else 0.3)
    first, again, other = (run_arm(arm, seed).points for seed in (1, 1, 2))
    assert first == again
    assert all(one.loss != two.loss for one, two in zip(first[1:], other[1:], strict=True))
    assert [(point.steps, point.tokens) for point in first] == [(0, 0), (3, 384), (6, 768)]
    assert first[-1].loss < first[0].loss == pytest.approx(np.log(256), abs=1e-4)


def test_a_run_that_diverges_says_so_and_keeps_what_it_had() -> None:
    run = run_arm(replace(ARM, draft=EXPLODING, workers=(2,) * 60), 0)
    assert "not finite" in run.problem
    assert 1 <= len(run.points) < 9


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_arms_have_names_of_their_own_and_manifests_that_fit(name: str) -> None:
    arms = make_arms(name, ROUNDS_UNIT)
    assert len({arm.name for arm in arms}) == len(arms) > 1
    for arm in arms:
        if isinstance(arm, Arm):
            assert make_arm_manifest(arm, 0).seed == 0
            assert len(TEXTS) == 3 and arm.texts in TEXTS


@pytest.mark.parametrize(
    "name",
    [
        "diloco",
        "codecs",
        "dropped",
        "shards",
        "outer",
        "overlapped",
        "streaming",
        "delayed",
        "inner",
        "gossip",
        "experts",
    ],
)
def test_arms_see_equal_tokens_but_for_the_one_of_equal_steps(name: str) -> None:
    steps = {arm.name: sum(arm.workers) * arm.draft.training.inner_steps for arm in make_arms(name, 16)}
    fewer = steps.pop("one worker, equal steps", None)
    assert set(steps.values()) == {16 * 16 * (WORKERS_INNER if name == "inner" else 8)}
    assert fewer in (None, 16 * 16)


def test_who_is_seldom_there_is_so_in_the_same_rounds_whatever_weights_go_by() -> None:
    everybody, *half, alone, by_work, by_participation = arms = make_arms("seldom", 16)
    for always, (one, other) in ((4, half), (2, (by_work, by_participation))):
        assert other.draft.rounds == replace(one.draft.rounds, weights=PARTICIPATION)
        assert one.presence == other.presence == (1.0,) * always + (0.25,) * (8 - always)
    assert everybody.presence == (1.0,) * 8 and alone.presence == (1.0,) * 4 + (0.0,) * 4
    assert len({(arm.workers, arm.texts) for arm in arms}) == 1


@pytest.mark.parametrize("rule", [WORK, PARTICIPATION, FRESHNESS])
def test_workers_declare_what_the_manifest_weighs_by(rule: str) -> None:
    swarm = make_swarm(3, replace(DRAFT, rounds=replace(DRAFT.rounds, weights=rule)))
    for present in ([0, 1, 2], [0, 1], [0, 1], [0, 1]):
        swarm.run_round(present)
    always, seldom = (swarm.workers[one].attend(5) for one in (0, 2))
    if rule == PARTICIPATION:
        assert seldom == Attendance(intervals=1, interval_rounds=4)
        assert always == Attendance(intervals=4, interval_rounds=4)
    else:
        assert always == NO_ATTENDANCE
        assert seldom == Attendance(base_age=3 if rule == FRESHNESS else 0)
    for worker in swarm.workers:
        worker.train(swarm.base, 5)
    frozen = [worker.contributor.freeze(5, swarm.base, worker.local) for worker in swarm.workers]
    result, _ = swarm._reduce(5, [0, 1, 2], frozen, frozenset({0, 1, 2}))
    assert [member.attendance for member in result.members] == [always, always, seldom]
    one, _, other = (member.weight for member in result.members)
    factor = {WORK: 1.0, PARTICIPATION: 2.0, FRESHNESS: 0.5}[rule]  # of 4, two medians are left
    work = [worker.tokens**2 / worker.steps for worker in swarm.workers]
    assert other == pytest.approx(one * min(factor * work[2] / work[0], 2.0), rel=1e-6)


def test_schedules_of_one_experiment_mirror_each_other() -> None:
    schedules = {arm.name: arm.workers for arm in make_arms("joining", 16)}
    assert schedules["ramp up"] == schedules["ramp down"][::-1]
    assert schedules["doubling"] == schedules["halving"][::-1] == (4,) * 8 + (8,) * 8
    assert [len(list(same)) for _, same in itertools.groupby(schedules["ramp up"])] == [2] * 8
    assert {len(workers) for workers in schedules.values()} == {16}


@pytest.mark.parametrize(
    ("rounds", "only", "field"), [(0, (), "--rounds"), (12, (), "--rounds"), (8, ("x",), "--only")]
)
def test_what_no_experiment_has_is_refused(rounds: int, only: tuple[str, ...], field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        make_arms("dropped", rounds, only)


# -- texts -------------------------------------------------------------------------------------------------------------


def test_packages_are_of_one_size_and_share_what_is_held_out() -> None:
    workers = len(PACKAGES)
    packages, mixed = (TEXTS[name](workers) for name in (PACKAGE, "mixed"))
    assert len({one.train.size for one in packages}) == 1
    assert len({one.held_out.tobytes() for one in (*packages, *mixed)}) == 1
    assert mixed[0].train.size == sum(one.train.size for one in packages)
    assert len({one.train.tobytes() for one in packages}) == workers
    assert packages[0].held_out.size == pytest.approx(mixed[0].train.size / 7, rel=0.2)


def test_more_workers_than_packages_are_refused() -> None:
    with pytest.raises(ConfigError, match="at most 8"):
        TEXTS[PACKAGE](len(PACKAGES) + 1)


# -- what is shown -----------------------------------------------------------------------------------------------------


def make_run(arm: str, seed: int, loss: float, problem: str = "") -> Run:
    points = (Point(steps=0, tokens=0, loss=5.5), Point(steps=8, tokens=2_000_000, loss=loss))
    return Run(arm=arm, seed=seed, contribution_bytes=1500, points=points, problem=problem, wall_s=1.0, rounds=2)


def test_the_table_has_the_mean_every_run_and_the_difference_to_the_first_arm() -> None:
    arms = [replace(ARM, name=name) for name in ("first", "second", "third", "not run")]
    runs = [
        make_run("first", 0, 2.0),
        make_run("first", 1, 3.0),
        make_run("second", 0, 2.0),
        make_run("second", 1, 2.5),
    ]
    runs += [make_run("third", 0, 2.0), make_run("third", 1, 2.0, "the base is not finite")]
    assert format_table(arms, runs).splitlines()[2:] == [
        "| first | 2.00 | 2 | 1.5 | 2.5000 | 2.0000, 3.0000 | +0.00 % |",
        "| second | 2.00 | 2 | 1.5 | 2.2500 | 2.0000, 2.5000 | -10.00 % |",
        "| third | 2.00 | 2 | 1.5 | diverged | 2.0000, diverged after 8 steps | – |",
    ]


@pytest.mark.parametrize(("suffix", "magic"), [("svg", b"<?xml"), ("png", b"\x89PNG")])
def test_a_plot_is_drawn_even_where_runs_diverged(tmp_path: Path, suffix: str, magic: bytes) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / f"plot.{suffix}"
    arms = [replace(ARM, name=name) for name in ("whole", "diverged", "not run")]
    assert draw_plot(path, "losses", arms, [make_run("whole", 0, 2.0), make_run("diverged", 0, 2.0, "not finite")])
    assert path.read_bytes().startswith(magic)


def test_one_command_writes_table_and_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arms = tuple(replace(ARM, name=name) for name in ("first", "second"))
    monkeypatch.setattr("benchmarks.experiments.__main__.make_arms", lambda name, rounds, only: arms)
    path = tmp_path / "log.json"
    main(["dropped", "--seeds", "3", "4", "--json", str(path)])
    log = json.loads(path.read_text())
    assert [(run["arm"], run["seed"]) for run in log["runs"]] == [
        ("first", 3), ("second", 3), ("first", 4), ("second", 4)
    ]  # fmt: skip
    assert log["arms"][0]["draft"]["outer"]["optimizer"] == "sgd"
    shown = capsys.readouterr()
    assert [line.split(" | ")[0] for line in shown.out.splitlines()[2:]] == ["| first", "| second"]
    assert shown.err.count("nats a byte") == 4


@pytest.mark.parametrize("arguments", [["--plot", "x.pdf"], ["--seeds", "-1"], ["--json", "/no/folder/x.json"]])
def test_what_would_fail_after_the_runs_is_told_before_them(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["dropped", *arguments])
    assert arguments[0] in capsys.readouterr().err
