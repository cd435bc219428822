"""The round core, driven by hand: the grace window follows what peers have shown, newcomers cost nothing."""

from dataclasses import dataclass, field, replace

import pytest

from shoal.protocol.effects import AttemptFailed, EndTraining, Phase
from shoal.protocol.messages import ROSTER_MAX
from tests.unit.protocol.round_table import Seat, Table
from tests.unit.protocol.samples import CROWD_PEERS, RULES

STEP_S = 0.05
ROUND_S_MAX = 30.0


@dataclass(slots=True)
class Pacing:
    """Every seat trains for as long as it always does; work that missed a round is offered in the next one."""

    table: Table
    durations: dict[int, float]
    ready_s: dict[int, float] = field(default_factory=dict)
    took_s: list[float] = field(default_factory=list)
    members: list[set[int]] = field(default_factory=list)

    def run(self, rounds: int) -> None:
        for _ in range(rounds):
            self._run_one()

    def _run_one(self) -> None:
        table = self.table
        began_s, number = table.now, table.seats[0].core.head.round + 1
        for seat, duration_s in self.durations.items():
            self.ready_s.setdefault(seat, began_s + duration_s)
        while any(seat.core.head.round < number for seat in table.up()):
            assert table.now < began_s + ROUND_S_MAX, table.seats[0].core.view()
            due = [seat for seat in table.up() if self.ready_s.get(seat.number, ROUND_S_MAX**3) <= table.now + 1e-9]
            offering = [seat for seat in due if seat.core.round == number and seat.ready is None]
            if offering:
                table.make_ready(*offering)
            table.settle()
            if any(seat.core.head.round < number for seat in table.up()):
                table.advance(STEP_S)
        self.took_s.append(table.now - began_s)
        result = table.result(number)
        self.members.append({CROWD_PEERS.index(member.peer) for member in result.members})
        for seat in self.members[-1]:
            del self.ready_s[seat]


def pace(*durations: float, grace_s: float = 2.0, voters: int | None = None) -> Pacing:
    rules = replace(RULES, grace_s=grace_s)
    table = Table(len(durations), voters=voters, rules=rules)
    return Pacing(table=table, durations=dict(enumerate(durations)))


# -- who is worth waiting for ---------------------------------------------------------------------------------------


def test_the_round_waits_for_whom_it_expects_within_the_window_and_no_longer() -> None:
    pacing = pace(1.0, 1.0, 1.0, 2.5)
    pacing.run(8)
    assert all(members == {0, 1, 2, 3} for members in pacing.members)
    assert pacing.took_s == pytest.approx([2.5] * 8, abs=2 * STEP_S), "the window is two seconds, and was not used up"


def test_the_round_stops_waiting_when_a_peer_is_later_than_it_ever_is() -> None:
    pacing = pace(1.0, 1.0, 1.0, 1.5)
    pacing.run(10)
    pacing.durations[3] = 100.0
    pacing.run(1)
    assert pacing.members[-1] == {0, 1, 2}
    assert 1.5 <= pacing.took_s[-1] < 2.5, "the window would have ended after three seconds"
    pacing.run(3)
    assert pacing.took_s[-3:] == pytest.approx([1.0] * 3, abs=2 * STEP_S), "and does not begin again"


def test_a_peer_that_takes_longer_than_the_window_is_not_waited_for() -> None:
    pacing = pace(1.0, 1.0, 1.0, 6.6)
    pacing.run(16)
    assert sum(3 in members for members in pacing.members) >= 2, "what it worked on is not lost"
    for took_s, members in list(zip(pacing.took_s, pacing.members, strict=True))[6:]:
        assert took_s < 1.0 + 2 * STEP_S or (3 in members and took_s < 3.0), "but for the round that it is due in"


def test_a_peer_half_as_fast_is_waited_for_in_every_second_round_only() -> None:
    pacing = pace(1.0, 1.0, 1.0, 2.4, grace_s=0.7)
    pacing.run(20)
    late = [3 in members for members in pacing.members[8:]]
    assert late in ([True, False] * 6, [False, True] * 6)
    for took_s, included in zip(pacing.took_s[8:], late, strict=True):
        assert took_s == pytest.approx(1.4 if included else 1.0, abs=2 * STEP_S)


def test_a_trainer_that_never_becomes_ready_does_not_hold_up_every_round() -> None:
    pacing = pace(1.0, 1.0, 1.0, 1e6)
    pacing.run(12)
    assert pacing.took_s[-4:] == pytest.approx([1.0] * 4, abs=2 * STEP_S)


def test_the_proposer_waits_for_its_own_work_as_for_anybodys() -> None:
    table = Table()
    lead = table.order()[0]
    durations = dict.fromkeys(range(4), 1.0)
    durations[lead.number] = 1.8
    pacing = Pacing(table=table, durations=durations)
    pacing.run(6)
    assert all(members == {0, 1, 2, 3} for members in pacing.members)


def test_who_leaves_is_not_waited_for() -> None:
    pacing = pace(1.0, 1.0, 1.0, 1.0)
    pacing.run(3)
    leaver = pacing.table.seats[3]
    leaver.core.leave(pacing.table.now)
    pacing.table.announce(leaver, leaving=True)
    del pacing.durations[3]
    pacing.ready_s.pop(3, None)
    pacing.run(1)
    assert pacing.members[-1] == set() and pacing.took_s[-1] < STEP_S, "the round that drops it has no parts"


def test_a_round_waits_past_the_window_for_those_who_bring_more_than_the_wait_costs() -> None:
    pacing = pace(10.0, 10.0, 10.0, 10.0, 10.0, 10.0)
    pacing.run(4)
    for seat in (0, 1):
        pacing.ready_s[seat] = pacing.table.now + 4.0
    for seat in (2, 3, 4, 5):
        pacing.ready_s[seat] = pacing.table.now + 10.0
    pacing.run(2)
    assert all(members == set(range(6)) for members in pacing.members), "two are the minimum quorum, and wait"
    assert pacing.took_s[-2] == pytest.approx(10.0, abs=2 * STEP_S)


def test_whoever_does_not_come_when_it_was_worth_waiting_for_has_the_window_once_more() -> None:
    pacing = pace(10.0, 10.0, 10.0, 10.0, 10.0, 10.0)
    pacing.run(4)
    for seat in (0, 1):
        pacing.ready_s[seat] = pacing.table.now + 4.0
    for seat in (2, 3, 4, 5):
        pacing.ready_s[seat] = pacing.table.now + 1000.0
    pacing.run(2)
    assert pacing.members[-2] == {0, 1}
    assert pacing.took_s[-2] < 10.0 + 2.0 + 4 * STEP_S
    assert pacing.took_s[-1] == pytest.approx(10.0, abs=2 * STEP_S), "and none in the next round"


def test_followers_wait_as_long_as_the_proposer_does() -> None:
    pacing = pace(20.0, 20.0, 20.0, 20.0)
    pacing.run(3)
    for seat in (0, 1):
        pacing.ready_s[seat] = pacing.table.now + 4.0
    for seat in (2, 3):
        pacing.ready_s[seat] = pacing.table.now + 20.0
    pacing.run(1)
    assert pacing.members[-1] == {0, 1, 2, 3} and pacing.took_s[-1] > 4.0 + RULES.grace_s + RULES.plan_timeout_s
    assert not any(seat.did(AttemptFailed) for seat in pacing.table.seats)


def test_who_comes_back_and_is_no_voter_any_more_has_the_window() -> None:
    pacing = pace(1.0, 1.0, 1.0, 1.0)
    pacing.run(3)
    table, back = pacing.table, pacing.table.seats[3]
    table.kill(back)
    pacing.ready_s.pop(3, None)
    del pacing.durations[3]
    pacing.run(1)
    assert back.peer not in table.seats[0].core.head.voters
    table.restart(back)
    back.core.applied(table.seats[0].core.head, table.now)
    table.announce(back)
    table.advance(1.0)
    table.make_ready(*table.seats[:3])
    table.settle()
    table.advance(1.5)
    assert table.seats[0].core.phase is Phase.GATHER
    table.make_ready(back)
    table.settle()
    assert table.seats[0].core.head.round == 5
    assert back.peer in {member.peer for member in table.seats[0].committed[-1].result.members}


# -- the end of training ----------------------------------------------------------------------------------------------


def ended(table: Table) -> set[int]:
    table.settle()
    return {seat.number for seat in table.seats if seat.did(EndTraining)}


def test_training_is_over_when_half_of_the_other_voters_are_ready() -> None:
    table = Table(6)
    table.make_ready(table.seats[0], table.seats[1])
    assert ended(table) == set()
    table.make_ready(table.seats[2])
    assert ended(table) == {3, 4, 5}
    table.make_ready(table.seats[3])
    table.settle()
    assert [len(seat.did(EndTraining)) for seat in table.seats[3:]] == [1, 1, 1], "it is said once"
    assert table.seats[4].did(EndTraining) == [EndTraining(round=1)]


def test_who_does_not_train_or_is_gone_does_not_count_as_a_voter_that_is_not_ready() -> None:
    table = Table(6)
    table.announce(table.seats[5], trains=False)
    table.announce(table.seats[4], leaving=True)
    table.kill(table.seats[3])
    table.make_ready(table.seats[0])
    assert ended(table) == {1, 2}, "one of two others; of three for the rest"


def test_training_is_not_over_while_too_few_could_be_planned() -> None:
    table = Table(4, rules=replace(RULES, peers_min=4))
    table.make_ready(*table.seats[:2])
    assert ended(table) == set()
    table.make_ready(table.seats[2])
    assert ended(table) == {3}


def test_whoever_is_ready_too_late_for_a_round_is_expected_in_the_next() -> None:
    """It was measured when it was ready, though no plan had room for it any more."""
    pacing = pace(1.0, 1.0, 1.0, 1.0)
    pacing.run(4)
    table, late = pacing.table, pacing.table.seats[3]
    table.reduces = False
    table.advance(1.0)
    table.make_ready(*table.seats[:3])
    table.advance(5.0)
    lead = table.seat(table.seats[0].core.view().proposer)
    assert lead.core.phase is not Phase.GATHER
    table.make_ready(late)
    assert late.peer not in lead.core._ready_pace._began_s


# -- newcomers ------------------------------------------------------------------------------------------------------


def test_newcomers_cost_nothing() -> None:
    alone, crowded = pace(1.0, 1.0, 1.0), pace(1.0, 1.0, 1.0, 50.0, 50.0, 50.0, voters=3)
    for pacing in (alone, crowded):
        pacing.run(6)
    assert crowded.took_s == pytest.approx(alone.took_s, abs=2 * STEP_S)


def test_a_newcomer_that_is_ready_in_time_takes_part() -> None:
    pacing = pace(1.0, 1.0, 1.0, 0.5, voters=3)
    pacing.run(3)
    assert pacing.members == [{0, 1, 2, 3}] * 3
    assert pacing.table.seats[0].core.head.voters[:4] == CROWD_PEERS[:4]


def test_a_flood_of_joiners_comes_in_bounded_and_without_delay() -> None:
    table = Table(34, voters=4)
    assert len(table.seats) <= ROSTER_MAX
    seen: set[int] = set(range(4))
    rounds = -(-30 // RULES.newcomers_max)
    for number in range(1, rounds + 1):
        joiners = [seat for seat in table.seats if seat.number not in seen]
        table.make_ready(*joiners)
        table.make_ready(*(seat for seat in table.seats if seat.number in seen))
        table.settle()
        members = {CROWD_PEERS.index(member.peer) for member in table.result(number).members}
        assert seen <= members, "no old member makes room"
        assert len(members - seen) == min(RULES.newcomers_max, 34 - len(seen))
        seen |= members
    assert seen == set(range(34)), "all are in"
    assert table.now == 0.0
    head = table.seats[0].core.head
    assert len(head.voters) == RULES.voters_max and head.voters[:4] == CROWD_PEERS[:4], "a committee, the oldest first"


def test_a_committee_votes_for_a_larger_swarm() -> None:
    rules = replace(RULES, voters_max=3)
    table = Table(6, voters=3, rules=rules)
    for number in (1, 2):
        table.make_ready(*table.seats[3:])
        table.make_ready(*table.seats[:3])
        table.run(number)
        result = table.result(number)
        assert result.voters == CROWD_PEERS[:3] and len(result.members) == 6
        assert {vote.voter for vote in table.seats[5].committed[-1].votes} <= set(CROWD_PEERS[:3])
    table.kill(table.seats[1])
    survivors: list[Seat] = table.up()
    table.make_ready(*survivors)
    table.run(3)
    assert len(table.result(3).voters) == 3 and CROWD_PEERS[1] not in table.result(3).voters, "the next one moves up"
