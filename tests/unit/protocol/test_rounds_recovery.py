"""The round core, driven by hand: proposers that fail, peers that restart with their vote record, peers that leave."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from shoal.protocol.effects import AttemptFailed, Persist, Phase, Planned, Reduce, Send, SendPart, VoteRecord
from shoal.protocol.errors import Failure
from shoal.protocol.messages import Nack, Plan, Prepare, Promise, Proposal, Vote
from tests.unit.protocol.round_table import Seat, Table, cut_off, members_of, nothing, withhold
from tests.unit.protocol.samples import PEERS, RULES, make_sample_result

# -- proposers that fail --------------------------------------------------------------------------------------------


def test_a_proposer_that_dies_before_it_plans_is_replaced() -> None:
    table = Table()
    lead, second, *_ = table.order()
    table.kill(lead)
    table.make_ready()
    table.settle()
    result = table.result()
    assert table.attempts() == {1}
    assert members_of(result, 0) == tuple(seat.number for seat in table.up())
    (failed,) = second.did(AttemptFailed)
    assert (failed.attempt, failed.reason, failed.peer) == (0, Failure.PROPOSER_LOST, lead.peer)


def test_a_silent_proposer_is_replaced_after_its_time() -> None:
    table = Table()
    lead, *others = table.order()
    table.blocked = cut_off(lead)
    table.make_ready()
    table.advance(RULES.grace_s + RULES.plan_timeout_s - 0.01)
    assert all(seat.core.attempt == 0 for seat in others)
    table.advance(0.02)
    assert all(seat.core.attempt >= 1 for seat in others)
    reasons = {effect.reason for seat in others for effect in seat.did(AttemptFailed)}
    assert reasons == {Failure.PROPOSER_SILENT}
    table.blocked = nothing
    table.run(1)
    table.result()


@pytest.mark.parametrize("voters_that_saw_it", [1, 2, 3])
def test_what_may_have_been_certified_is_proposed_again(voters_that_saw_it: int) -> None:
    table = Table()
    lead, *others = table.order()
    saw = others[:voters_that_saw_it]
    table.blocked = lambda effect, source, target: (
        isinstance(effect, Send)
        and (isinstance(effect.message, Vote) or (isinstance(effect.message, Proposal) and target not in saw))
    )
    table.make_ready()
    table.settle()
    proposal = lead.said(Proposal)[0]
    assert sum(len(seat.said(Vote)) for seat in others) == voters_that_saw_it
    table.blocked = nothing
    table.kill(lead)
    table.run(1)
    assert table.result() == proposal.result, "the dead proposer is a member of it"
    assert table.attempts() == {1}


def test_nothing_is_proposed_again_when_nobody_has_voted() -> None:
    table = Table()
    lead, *others = table.order()
    table.blocked = withhold(Proposal)
    table.make_ready()
    table.settle()
    assert lead.said(Proposal)
    table.blocked = nothing
    table.kill(lead)
    table.run(1)
    assert lead.peer not in {member.peer for member in table.result().members}
    assert table.attempts() == {1}
    assert len(others[0].said(Promise)) <= 1


def test_two_proposers_in_a_row_may_die() -> None:
    table = Table(7)
    first, second, *_ = table.order()
    table.make_ready()
    table.kill(first)
    table.kill(second)
    table.run(1)
    assert table.attempts() == {2}
    assert len(table.result().members) == 5


def test_a_minority_never_certifies_and_gives_up_no_attempt_while_it_is_one() -> None:
    table = Table()
    first, second, third, _ = table.order()
    table.kill(second)
    table.kill(third)
    table.make_ready()
    table.advance(600.0)
    assert all(seat.committed == [] for seat in table.seats)
    assert all(seat.did(AttemptFailed) == [] for seat in table.up())
    view = first.core.view()
    assert view.last_failure is Failure.NO_QUORUM
    assert set(view.waiting_for) == {second.peer, third.peer}
    assert table.refusals == []
    table.restart(second)
    table.make_ready(second)
    table.run(1)
    table.result()


@pytest.mark.parametrize(("dead", "certifies"), [(1, True), (2, False)])
def test_two_thirds_is_more_than_a_majority(dead: int, certifies: bool) -> None:
    table = Table(6, rules=replace(RULES, quorum="two_thirds"))
    for seat in table.order()[-dead:]:
        table.kill(seat)
    table.make_ready()
    table.advance(60.0)
    assert all((len(seat.committed) == 1) is certifies for seat in table.up())


# -- restarts -------------------------------------------------------------------------------------------------------


def resume(table: Table, seat: Seat) -> None:
    """The peer's disk was full: it goes on from what is durable, and nothing of what it wanted since was done."""
    seat.effects = []
    seat.core.take_effects()
    seat.core.resume(seat.vote or VoteRecord(round=0), table.now)


ComeBack = Callable[[Table, Seat], None]
come_backs = pytest.mark.parametrize("come_back", [Table.restart, resume], ids=["restart", "resume"])


@come_backs
def test_a_restarted_voter_never_votes_for_something_else_in_the_same_attempt(come_back: ComeBack) -> None:
    table = Table()
    lead, voter, *_ = table.order()
    table.blocked = withhold(Vote)
    table.make_ready()
    table.settle()
    (vote,) = voter.said(Vote)
    proposal = lead.said(Proposal)[0]
    come_back(table, voter)
    other = replace(proposal.result, voters=proposal.result.voters[:3])
    for digest in {part.digest for part in other.parts}:
        table.hold(voter, digest)
    voter.core.receive(Proposal(attempt=0, result=other), lead.peer, 0.0)
    table.settle()
    assert voter.said(Vote) == []
    come_back(table, voter)
    for digest in {part.digest for part in other.parts}:
        table.hold(voter, digest)
    voter.core.receive(proposal, lead.peer, 0.0)
    table.settle()
    assert voter.said(Vote) == [vote], "the same vote may be said again"


@come_backs
def test_a_restarted_voter_tells_the_next_proposer_what_it_voted_for(come_back: ComeBack) -> None:
    table = Table()
    lead, second, voter, _ = table.order()
    table.blocked = withhold(Vote)
    table.make_ready()
    table.settle()
    proposal = lead.said(Proposal)[0]
    come_back(table, voter)
    voter.core.receive(Prepare(round=1, attempt=1), second.peer, 0.0)
    table.settle()
    assert voter.said(Promise) == [Promise(round=1, attempt=1, accepted_attempt=0, accepted=proposal.result)]


@come_backs
def test_a_restarted_voter_keeps_its_promise(come_back: ComeBack) -> None:
    table = Table()
    lead, second, voter, _ = table.order()
    voter.core.receive(Prepare(round=1, attempt=1), second.peer, 0.0)
    table.settle()
    assert voter.vote == VoteRecord(round=1, base=table.head.digest, promised=1)
    come_back(table, voter)
    assert voter.core.attempt == 1
    voter.core.receive(Proposal(attempt=0, result=make_sample_result(table.head, members=4)), lead.peer, 0.0)
    table.settle()
    assert voter.said(Vote) == []
    assert voter.said(Nack) == [Nack(round=1, attempt=0, promised=1)]


def test_what_a_full_disk_did_not_take_was_never_promised() -> None:
    table = Table()
    _, second, voter, _ = table.order()
    voter.core.receive(Prepare(round=1, attempt=1), second.peer, table.now)
    lost = voter.core.take_effects()
    assert any(isinstance(effect, Persist) for effect in lost) and voter.core.attempt == 1
    resume(table, voter)
    assert voter.core.attempt == 0
    voter.core.receive(Prepare(round=1, attempt=1), second.peer, table.now)
    table.carry_out(voter)
    assert [effect.vote.promised for effect in voter.did(Persist)] == [1], "it is durable before it is said again"
    assert len(voter.said(Promise)) == 1


def test_a_peer_whose_disk_was_full_takes_part_again() -> None:
    table = Table()
    ill = table.order()[2]
    table.applies_slowly.add(ill.number)
    table.make_ready()
    table.settle()
    assert ill.core.phase is Phase.APPLY and ill.committed == []
    resume(table, ill)
    table.applies_slowly.clear()
    table.advance(RULES.presence_timeout_s)
    table.run(1)
    table.make_ready()
    table.run(2)
    assert ill.number in members_of(table.result(2), 0)


def test_an_owner_whose_disk_was_full_need_not_be_sent_anything_again() -> None:
    table = Table()
    plan = table.begin_exchange()
    ill = table.order()[1]
    owned = [part for part, index in enumerate(plan.owners) if plan.roster[index].signed.peer == ill.peer]
    assert owned
    resume(table, ill)
    table.blocked = withhold(SendPart)
    ill.core.receive(plan, table.order()[0].peer, table.now)
    table.carry_out(ill)
    assert sorted(effect.part for effect in ill.did(Reduce)) == owned
    assert {len(effect.indices) for effect in ill.did(Reduce)} == {4}
    table.finish_reductions()
    assert members_of(table.result(), owned[0]) == (0, 1, 2, 3)


def test_a_promise_is_durable_before_it_is_given() -> None:
    table = Table()
    _, second, voter, _ = table.order()
    voter.core.receive(Prepare(round=1, attempt=1), second.peer, 0.0)
    effects = [effect for effect in voter.core.take_effects() if isinstance(effect, Persist | Send)]
    assert [type(getattr(effect, "message", effect)) for effect in effects] == [Persist, Promise]


@pytest.mark.parametrize("kind", [Plan, Proposal, Vote])
def test_a_restarted_proposer_never_leads_the_same_attempt_again(kind: type) -> None:
    table = Table()
    lead, *others = table.order()
    table.blocked = withhold(kind)
    table.make_ready()
    table.settle()
    assert lead.vote is not None and lead.vote.led == 1
    table.blocked = nothing
    table.restart(lead)
    table.make_ready(lead, label="/after the restart")
    table.settle()
    assert (lead.said(Plan), lead.said(Proposal)) == ([], [])
    table.run(1)
    table.result()
    assert min(table.attempts()) >= 1
    assert others[0].core.head == lead.core.head


def test_a_record_of_a_round_ahead_binds_when_that_round_comes() -> None:
    # The disk lost the end of the log but not what was signed.
    table = Table(4)
    head = replace(table.head, round=1, digest=b"1" * 32)
    ahead = VoteRecord(round=2, base=head.digest, promised=3, led=3)
    core = table.make_core(0, table.head, ahead)
    assert (core.round, core.attempt) == (1, 0)
    core.applied(head, 0.0)
    assert (core.round, core.attempt) == (2, 3)
    # What was signed after another result of that round says nothing here.
    core = table.make_core(0, table.head, ahead)
    core.applied(replace(head, digest=b"2" * 32), 0.0)
    assert (core.round, core.attempt) == (2, 0)


# -- leaving --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [0, 1])
def test_a_leaving_voter_is_dropped_by_an_empty_round(place: int) -> None:
    table = Table()
    leaver = table.order()[place]
    leaver.core.leave(0.0)
    table.announce(leaver, leaving=True)
    table.settle()
    result = table.result()
    assert (result.members, result.parts) == ((), ())
    assert result.voters == tuple(peer for peer in PEERS[:4] if peer != leaver.peer)
    table.kill(leaver)
    table.make_ready()
    table.settle()
    assert len(table.result(2).members) == 3


def test_the_last_voter_cannot_be_dropped() -> None:
    table = Table(2, voters=1)
    table.seats[0].core.leave(0.0)
    table.announce(table.seats[0], leaving=True)
    table.advance(60.0)
    assert all(seat.committed == [] for seat in table.seats)
    assert all(seat.did(Planned) == [] for seat in table.seats)


def test_who_leaves_is_ready_for_nothing_more() -> None:
    table = Table(3, voters=2)
    table.make_ready(table.seats[2])
    table.seats[2].core.leave(0.0)
    table.announce(table.seats[2], leaving=True)
    table.make_ready(*table.seats[:2])
    table.run(1)
    assert {member.peer for member in table.result().members} == set(PEERS[:2])
