"""Workers without a common base: how pairs mix, against the published rule, and what the loss of many models is."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from benchmarks.experiments.arms import held_out_windows, run_arm
from benchmarks.experiments.islands import (
    APART,
    AVERAGED,
    CONTRIBUTED,
    EACH,
    ENSEMBLE,
    MEAN,
    MEASURES,
    MIXES,
    NOLOCO,
    POSTERIOR,
    Islands,
    Models,
    weigh_by_what_came,
)
from benchmarks.experiments.swarm import Diverged, HeldOut
from shoal.node.training.local_parameters import load_parameters
from shoal.node.training.tasks import make_task
from shoal.protocol.layout import initialise
from tests.unit.benchmarks.test_experiments import (
    ARM,
    EXPLODING,
    OPTIONS,
    STEPS,
    corpus,
    make_batches,
    make_manifest,
    train_plainly,
)

WINDOWS = held_out_windows(corpus(), OPTIONS["context"])[:70]  # a whole piece and some


def open_islands(workers: int, mix: str) -> Islands:
    manifest = make_manifest(workers)
    return Islands(manifest, make_batches(manifest, workers), mix)


def test_apart_each_trains_as_if_it_were_alone() -> None:
    islands = open_islands(2, APART)
    islands.run_round()
    islands.run_round()
    batches = make_batches(make_manifest(2), 2)
    for one, base in zip(batches, islands.bases, strict=True):
        expected = train_plainly(make_manifest(2), [one], 2 * STEPS)
        np.testing.assert_allclose(base, expected, atol=2e-6)


def test_averaged_a_pair_has_the_mean_and_goes_on_from_it() -> None:
    islands = open_islands(2, AVERAGED)
    islands.run_round()
    batches = make_batches(make_manifest(2), 2)
    middle = np.mean([train_plainly(make_manifest(2), [one], STEPS) for one in batches], axis=0)
    for one in islands.workers:
        np.testing.assert_allclose(one.base, middle, atol=2e-6)
        again = np.empty_like(one.base)
        assert one.strategy.export(again) and np.array_equal(again, one.base)


def test_contributed_a_pair_comes_as_near_to_its_mean_as_the_codec_lets_it_and_keeps_it() -> None:
    plain = make_manifest(2)
    manifest = replace(plain, rounds=replace(plain.rounds, codec="int8"))
    islands = Islands(manifest, make_batches(manifest, 2), CONTRIBUTED)
    islands.run_round()
    middle = np.mean([one.local for one in islands.workers], axis=0)
    apart = np.abs(islands.workers[0].local - middle).max()
    for one in islands.workers:
        assert np.abs(one.base - middle).max() < apart / 20
        again = np.empty_like(one.base)
        assert one.strategy.export(again) and np.array_equal(again, one.base)
    np.testing.assert_allclose(np.mean(islands.bases, axis=0), middle, atol=1e-7)
    assert MIXES[AVERAGED].count_bytes(plain) == MIXES[CONTRIBUTED].count_bytes(plain), "fp32 is fp32"
    assert MIXES[CONTRIBUTED].count_bytes(manifest) < MIXES[AVERAGED].count_bytes(manifest) / 3


def test_noloco_is_the_published_rule() -> None:
    islands = open_islands(2, NOLOCO)
    start = initialise(make_manifest(2).layout, 7)
    bases, momenta = [start.copy(), start.copy()], [np.zeros_like(start), np.zeros_like(start)]
    for _ in range(3):
        islands.run_round()
        moved = np.mean([one.local - base for one, base in zip(islands.workers, bases, strict=True)], axis=0)
        middle = np.mean(bases, axis=0)
        momenta = [0.5 * m + 0.7 * moved + 0.7 * (middle - base) for m, base in zip(momenta, bases, strict=True)]
        bases = [base + m for base, m in zip(bases, momenta, strict=True)]
        for one, base in zip(islands.workers, bases, strict=True):
            np.testing.assert_allclose(one.base, base, atol=1e-6)


def test_noloco_pulls_bases_that_differ_together() -> None:
    islands = open_islands(2, NOLOCO)
    first, second = islands.workers
    second.base += 1.0
    for one in islands.workers:
        one.local[:] = one.base  # nothing was trained
    MIXES[NOLOCO].mix([first, second])
    assert np.allclose(second.base - first.base, 0.3) and np.allclose(first.momentum, 0.35)


def test_all_are_paired_anew_in_each_round_and_one_of_an_odd_number_has_no_partner() -> None:
    islands = open_islands(3, AVERAGED)
    partners = set()
    for _ in range(6):
        islands.run_round()
        same = [
            (low, high)
            for low in range(3)
            for high in range(low + 1, 3)
            if np.array_equal(islands.bases[low], islands.bases[high])
        ]
        assert len(same) == 1
        partners |= set(same)
    assert len(partners) > 1


def test_what_many_models_are_worth() -> None:
    manifest = make_manifest(3)
    islands, models = open_islands(3, APART), Models(manifest, WINDOWS)
    islands.run_round()
    task, losses, probabilities = make_task(manifest.task), [], []
    model = task.build_model()
    windows = torch.from_numpy(WINDOWS)
    for base in islands.bases:
        load_parameters(model, base)
        losses.append(task.loss(model, windows).item())
        with torch.no_grad():
            odds = F.softmax(model(windows[:, :-1]), dim=-1)
        probabilities.append(odds.gather(2, windows[:, 1:, None])[..., 0])
    assert models.loss(islands.bases, EACH) == pytest.approx(np.mean(losses), rel=1e-5)
    together = -torch.stack(probabilities).mean(0).log().mean().item()
    assert models.loss(islands.bases, ENSEMBLE) == pytest.approx(together, rel=1e-5)
    middle = np.mean(islands.bases, axis=0)
    assert models.loss(islands.bases, MEAN) == pytest.approx(HeldOut(manifest, WINDOWS).loss(middle), rel=1e-5)


@pytest.mark.parametrize("measure", MEASURES)
def test_copies_of_one_model_are_worth_what_it_is(measure: str) -> None:
    manifest = make_manifest(1)
    base = initialise(manifest.layout, 3)
    alone = HeldOut(manifest, WINDOWS).loss(base)
    assert Models(manifest, WINDOWS).loss([base] * 3, measure) == pytest.approx(alone, rel=1e-5)


def test_who_was_right_before_weighs_more_and_nobody_knows_the_first_place() -> None:
    likely = torch.tensor([[[0.9, 0.9, 0.9]], [[0.1, 0.1, 0.1]]]).log()  # two models, one window
    (odds,) = weigh_by_what_came(likely).exp().tolist()
    second = (0.9 * 0.9 + 0.1 * 0.1) / (0.9 + 0.1)
    third = (0.9**2 * 0.9 + 0.1**2 * 0.1) / (0.9**2 + 0.1**2)
    assert odds == pytest.approx([0.5, second, third])


@pytest.mark.parametrize(("mix", "vectors"), [(NOLOCO, 2), (AVERAGED, 1), (APART, 0)])
def test_an_arm_of_islands_is_run_and_says_what_it_sends(mix: str, vectors: int) -> None:
    arm = replace(ARM, mix=mix, measure=POSTERIOR)
    run = run_arm(arm, 3)
    assert run.problem == "" and run.contribution_bytes == vectors * 4 * make_manifest(2).layout.elements
    assert [point.steps for point in run.points] == [0, STEPS, 2 * STEPS]
    assert run.points[-1].loss < run.points[0].loss and run_arm(arm, 3).points == run.points


def test_islands_that_explode_say_so() -> None:
    run = run_arm(replace(ARM, draft=EXPLODING, workers=(2,) * 40, mix=APART, measure=EACH), 3)
    assert "not finite" in run.problem
    with pytest.raises(Diverged, match="held-out loss"):
        base = np.full(make_manifest(1).layout.elements, np.nan, np.float32)
        Models(make_manifest(1), WINDOWS).loss([base], EACH)
