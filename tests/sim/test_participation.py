"""Everybody who lives is in the round: whoever was away comes back into step, and halves do not take turns.

Trainings are long beside the grace window, and two ready peers are the minimum quorum: so two who are out of step could
go on without the others, and the others without them, for ever.
"""

import random

import pytest

from tests.sim.clusters import RULES
from tests.sim.stage import NAMES, Stage
from tests.sim.training import train

COUNT = 6
TRAINING_S = 20.0
BEFORE = 5  # rounds
ALL = " ".join(NAMES[:COUNT])


def start() -> Stage:
    """Some rounds are done, so that everybody knows how long everybody takes; all have begun to train for the next."""
    stage = Stage(peers=COUNT)
    assert stage.cluster.peers_min == 2 and 4 * RULES["grace_s"] < TRAINING_S
    for at, name in enumerate(NAMES[:COUNT]):
        stage.peer(name).training_s = TRAINING_S / 1.1 + 0.05 * at  # a stage takes the middle of 0.8 to 1.4
    stage.run_to_round(BEFORE)
    assert members(stage, BEFORE) == ALL
    return stage


def members(stage: Stage, number: int) -> str:
    certificates = next(peer.disk.certificates for peer in stage.up() if number in peer.disk.certificates)
    return stage.list_names(member.peer for member in certificates[number].result.members)


def steps(stage: Stage, number: int) -> dict[str, int]:
    return {stage.name(member.peer): member.steps for member in stage.certificate(number).result.members}


@pytest.mark.parametrize("away", ["cid", "cid dan", "ann cid dan"])
@pytest.mark.parametrize("away_s", [3.0, 8.0, 16.0])
def test_who_comes_back_in_mid_round_is_in_that_round(away: str, away_s: float) -> None:
    stage = start()
    names = away.split()
    for name in names:
        stage.kill(stage.peer(name))
    stage.run_for(away_s)
    stage.restart(*names)
    stage.run_to_round(BEFORE + 2)
    assert [members(stage, BEFORE + number) for number in (1, 2)] == [ALL, ALL]
    done = steps(stage, BEFORE + 1)
    others = [done[name] for name in NAMES[:COUNT] if name not in names]
    assert all(0 < done[name] < min(others) for name in names), "its weight says how little that is"
    assert len(set(steps(stage, BEFORE + 2).values())) == 1, "they are in step again"
    assert not stage.failures


@pytest.mark.parametrize("away", ["cid", "cid dan", "cid dan eve", "bob cid dan eve"])
@pytest.mark.parametrize("late_s", [4.0, 9.0, 15.0])
def test_groups_that_are_out_of_step_find_together_within_two_rounds(away: str, late_s: float) -> None:
    """Some are late by more than the round waits for, and after it the groups would take turns."""
    stage = start()
    stage.run_for(late_s)
    for name in away.split():
        train(stage.peer(name), in_step=True)
    stage.run_to_round(BEFORE + 5)
    together = [number for number in range(1, 6) if members(stage, BEFORE + number) == ALL]
    assert together in ([2, 3, 4, 5], [3, 4, 5]), "and they stay together"
    assert stage.checker.shares[-1] == 1.0
    assert not stage.failures


def test_a_trainer_that_hangs_is_not_waited_for_longer_than_it_ever_took() -> None:
    stage = start()
    stage.peer("cid").training += 1  # what it was at will never be handed over
    began_s = stage.now
    stage.run_to_round(BEFORE + 2)
    assert "cid" not in members(stage, BEFORE + 1) + members(stage, BEFORE + 2)
    assert stage.now - began_s < 2 * TRAINING_S + 2 * RULES["grace_s"] + 1.0


def certified_steps_per_s(rounds: int, lost: float) -> tuple[float, float]:
    """Each peer dies with this probability as a round is certified and is back after two fifths of the next one; also
    the share of the peers that lived all through a round and are in it."""
    stage, entropy = start(), random.Random(1)
    began_s, shares = stage.now, len(stage.checker.shares)
    for number in range(BEFORE + 1, BEFORE + rounds + 1):
        stage.run_until(lambda: any(peer.core.head.round >= number for peer in stage.up()))  # noqa: B023
        for name in NAMES[:COUNT]:
            if entropy.random() < lost and stage.peer(name).up and len(stage.up()) > COUNT // 2 + 1:
                stage.kill(stage.peer(name))
                stage.schedule(0.4 * TRAINING_S, stage.restart, name)
    certificates = {number: one for peer in stage.peers for number, one in peer.disk.certificates.items()}
    members = [certificates[BEFORE + number].result.members for number in range(1, rounds + 1)]
    total = sum(member.steps for round_members in members for member in round_members)
    measured = stage.checker.shares[shares:]
    return total / (stage.now - began_s), sum(measured) / len(measured)


def test_one_in_ten_dies_in_every_round_and_all_who_live_go_on() -> None:
    """What is lost is what the dead did not do. Without the rules above goodput is 0.82 here, and 3.6 of 6 peers are in
    a round; the published anchor (Decoupled DiLoCo) is 0.88."""
    calm, everybody = certified_steps_per_s(12, 0.0)
    under_faults, share = certified_steps_per_s(12, 0.1)
    assert everybody == 1.0 and share > 0.95
    assert under_faults / calm > 0.92
