"""The learning rate of a step, by the numbers of the step and of the round."""

import math
from dataclasses import replace

import pytest

from shoal.node.training.schedules import DECAYS, learning_rate
from shoal.protocol.manifest import CONSTANT, COSINE, LINEAR, SCHEDULES, Training

TRAINING = Training(learning_rate=0.5, warmup_steps=4, schedule_rounds=8, learning_rate_end=0.25)
WARM = 1000


def test_every_schedule_of_the_manifest_is_in_the_table() -> None:
    assert set(DECAYS) == set(SCHEDULES)


@pytest.mark.parametrize(
    ("schedule", "round", "share"),
    [
        (CONSTANT, 1, 1.0),
        (CONSTANT, 10**6, 1.0),
        (LINEAR, 1, 1.0),
        (LINEAR, 3, 0.25 + 0.75 * 6 / 8),
        (LINEAR, 5, 0.625),
        (LINEAR, 9, 0.25),
        (LINEAR, 10**6, 0.25),
        (COSINE, 1, 1.0),
        (COSINE, 3, 0.25 + 0.75 * (1.0 + math.sqrt(0.5)) / 2.0),
        (COSINE, 5, 0.625),
        (COSINE, 9, 0.25),
        (COSINE, 10**6, 0.25),
    ],
)
def test_the_rate_falls_to_its_end_and_stays_there(schedule: str, round: int, share: float) -> None:
    assert learning_rate(replace(TRAINING, schedule=schedule), WARM, round) == pytest.approx(0.5 * share, rel=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_rate_never_rises_from_round_to_round(schedule: str) -> None:
    rates = [learning_rate(replace(TRAINING, schedule=schedule), WARM, round) for round in range(20)]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == rates[1] == 0.5, "to the bit"


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warm_up_is_a_share_of_what_the_round_allows(schedule: str) -> None:
    training = replace(TRAINING, schedule=schedule)
    whole = learning_rate(training, WARM, 4)
    rates = [learning_rate(training, step, 4) for step in (1, 2, 4, 5)]
    assert rates == pytest.approx([whole / 4, whole / 2, whole, whole], rel=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_without_lengths_there_is_neither_warm_up_nor_a_division_by_zero(schedule: str) -> None:
    training = replace(TRAINING, schedule=schedule, warmup_steps=0, schedule_rounds=0)
    assert learning_rate(training, 1, 1) == 0.5
