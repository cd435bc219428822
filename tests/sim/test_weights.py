"""Weights by more than work: the production cores, in a swarm of which some peers are seldom there."""

from dataclasses import replace

import pytest

from shoal.protocol.attendance import FRESHNESS, PARTICIPATION, WORK, Attendance
from shoal.protocol.contribution import Frozen
from shoal.protocol.messages import Member, Ready
from tests.sim.peer import SimPeer
from tests.sim.stage import NAMES, Stage

COUNT = 8  # so that two medians are less than a quarter
SELDOM = "eve"
AWAY_ROUNDS = 4


def find_members(stage: Stage, number: int) -> dict[str, Member]:
    return {stage.name(one.peer): one for one in stage.certificate(number).result.members}


def run_with_absence(weights: str) -> tuple[Stage, int]:
    """One peer misses some rounds; the first one that has it again."""
    stage = Stage(peers=COUNT, weights=weights)
    for name in NAMES[:COUNT]:
        stage.peer(name).training_s = 10.0
    stage.run_to_round(2)
    assert set(find_members(stage, 2)) == set(NAMES[:COUNT])
    stage.kill(stage.peer(SELDOM))
    stage.run_to_round(2 + AWAY_ROUNDS)
    stage.restart(SELDOM)
    number = 2 + AWAY_ROUNDS
    while SELDOM not in find_members(stage, number):
        number += 1
        assert number < 20, "it comes back"
        stage.run_to_round(number)
    # The round after it: everybody has done the same work.
    stage.run_to_round(number + 1)
    return stage, number


@pytest.mark.parametrize("weights", [WORK, PARTICIPATION])
def test_who_is_seldom_there_weighs_more_where_weights_go_by_participation(weights: str) -> None:
    stage, back = run_with_absence(weights)
    members = find_members(stage, back + 1)
    seldom = members.pop(SELDOM)
    assert len({member.steps for member in (seldom, *members.values())}) == 1, "all did the same"
    assert len({member.weight for member in members.values()}) == 1
    other = members["ann"]
    if weights == WORK:
        assert seldom == replace(other, peer=seldom.peer, contribution_root=seldom.contribution_root)
        return
    # Intervals of 1 (rounds 1 and 2), back - 2, and 1 again, against as many of 1 as there were rounds.
    assert seldom.attendance == Attendance(intervals=3, interval_rounds=back)
    assert other.attendance == Attendance(intervals=back, interval_rounds=back)
    expected = min(back / 3, 2.0)  # two medians at most
    assert seldom.weight == pytest.approx(expected * other.weight) and expected > 1.5
    assert not stage.failures


def test_a_round_that_was_missed_makes_work_weigh_less_where_weights_go_by_freshness() -> None:
    stage = Stage(peers=COUNT, weights=FRESHNESS)
    slow = stage.peer(SELDOM)
    for name in NAMES[:COUNT]:
        stage.peer(name).training_s = 10.0
    slow.training_s = 35.0  # the others do not wait for it
    for number in range(1, 15):
        stage.run_to_round(number)
    rounds = [find_members(stage, number) for number in range(1, 15)]
    ages = [members[SELDOM].attendance.base_age for members in rounds if SELDOM in members]
    assert max(ages) >= 1, "it was in some rounds and missed some"
    for members in rounds:
        assert all(one.attendance.base_age == 0 for name, one in members.items() if name != SELDOM)
        one, other = members.get(SELDOM), members["ann"]
        if one is not None:
            claims = [it.tokens**2 / it.steps for it in (one, other)]
            factor = (1 + one.attendance.base_age) ** -0.5
            assert one.weight == pytest.approx(min(factor * claims[0] / claims[1], 2.0) * other.weight, rel=1e-6)


def test_whoever_declares_more_than_the_rounds_tell_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(peers=COUNT, weights=PARTICIPATION)
    for name in NAMES[:COUNT]:
        stage.peer(name).training_s = 10.0
    liar, honest = stage.peer(SELDOM), SimPeer._word
    stage.checker.suspects.add(liar.identity.peer)

    def lie(peer: SimPeer, frozen: Frozen) -> tuple[Frozen, Ready]:
        frozen, said = honest(peer, frozen)
        if peer is liar and said.round > 4:
            said = replace(said, attendance=Attendance(intervals=1, interval_rounds=said.round - 1))
        return frozen, said

    monkeypatch.setattr(SimPeer, "_word", lie)
    stage.run_to_round(9)
    assert all(SELDOM in find_members(stage, number) for number in range(1, 5))
    assert all(SELDOM not in find_members(stage, number) for number in range(5, 10))
    assert not stage.failures, "nobody waits for it, and nobody is accused"
