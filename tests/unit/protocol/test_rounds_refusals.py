"""The round core, driven by hand: messages that are foreign, forged, late, early or useless, and what it shows."""

from dataclasses import replace

import pytest

from shoal.protocol.effects import AttemptFailed, Behind, Commit, Forked, Persist, Phase, Send
from shoal.protocol.errors import Failure, Refusal
from shoal.protocol.identity import Identity, PeerId
from shoal.protocol.messages import (
    Certified,
    Contribution,
    Nack,
    PartDone,
    Plan,
    Prepare,
    Promise,
    Proposal,
    Vote,
    digest_record,
    digest_roster,
    sign_message,
)
from shoal.protocol.proposer import revise_plan
from shoal.protocol.quorum import make_bitmap, proposer_order
from shoal.protocol.round_state import BEHIND_RETRY_S, EARLY_MESSAGES_MAX, EARLY_PER_SENDER_MAX
from tests.unit.protocol.round_table import Table, drop_of, effects_of, look, refusal_of, turned_down, withhold
from tests.unit.protocol.samples import (
    IDENTITIES,
    OTHER_SWARM,
    PARTS,
    PEERS,
    RULES,
    SWARM,
    certify,
    make_digests,
    make_head,
    make_presence,
    make_sample_result,
    make_vote,
)

STRANGER = 5  # a peer that is at no table of four or five
RESULT = make_sample_result(make_head(), members=4)


def make_part_done(
    part: int, signer: Identity, plan: Plan | None = None, members: int = 4, attempt: int = 0
) -> PartDone:
    bitmap = make_bitmap(frozenset({members - 1}), members)
    roster = digest_roster(plan.roster) if plan else bytes(32)
    done = PartDone(round=1, attempt=attempt, roster_digest=roster, part=part, digest=b"d" * 32, contributors=bitmap)
    return sign_message(signer, SWARM, done)


def result_for(table: Table) -> Proposal:
    """What the first proposer could propose."""
    result = replace(RESULT, previous=table.head.digest, base_root=table.head.state_root)
    return Proposal(attempt=0, result=result)


# -- a follower -----------------------------------------------------------------------------------------------------


def test_only_the_proposer_of_an_attempt_leads_it() -> None:
    table = Table()
    lead, second, follower, _ = table.order()
    plan = table.begin_exchange()
    own = sign_message(second.identity, SWARM, replace(plan, revision=1))
    for message in (Prepare(round=1, attempt=4), own, result_for(table)):
        assert turned_down(follower, message, second.peer) is Refusal.WRONG_PROPOSER
        assert turned_down(follower, message, PEERS[STRANGER]) is Refusal.WRONG_PROPOSER
    assert drop_of(follower, Prepare(round=1, attempt=5), lead.peer) is Refusal.WRONG_PROPOSER


def test_a_plan_that_its_proposer_did_not_sign_is_refused() -> None:
    table = Table()
    lead, second, follower, _ = table.order()
    plan = table.begin_exchange()
    for forged in (
        replace(plan, revision=1),
        sign_message(second.identity, SWARM, replace(plan, revision=1)),
        sign_message(lead.identity, OTHER_SWARM, replace(plan, revision=1)),
    ):
        assert refusal_of(follower, forged, lead.peer) is Refusal.BAD_SIGNATURE


def test_a_plan_that_does_not_follow_from_its_readies_is_refused() -> None:
    table = Table()
    lead, _, follower, _ = table.order()
    plan = table.begin_exchange()
    for spoilt, refusal in (
        (replace(plan, codec="fp32"), Refusal.NOT_PLANNED),
        (replace(plan, roster=plan.roster[::-1]), Refusal.NON_CANONICAL),
        (replace(plan, owners=(9,) * PARTS), Refusal.OUT_OF_RANGE),
    ):
        signed = sign_message(lead.identity, SWARM, replace(spoilt, revision=1))
        assert refusal_of(follower, signed, lead.peer) is refusal


def test_the_codecs_of_contributions_and_of_updates_do_not_stand_for_each_other() -> None:
    table = Table(rules=replace(RULES, codec="ternary", update_codec="int8"))
    lead, _, follower, _ = table.order()
    plan = table.begin_exchange()
    signed = sign_message(lead.identity, SWARM, replace(plan, codec="int8", revision=1))
    assert refusal_of(follower, signed, lead.peer) is Refusal.NOT_PLANNED
    good = result_for(table)
    spoilt = replace(good, result=replace(good.result, codec="ternary"))
    assert refusal_of(follower, spoilt, lead.peer) is Refusal.NOT_PLANNED
    follower.core.receive(good, lead.peer, 0.0)
    assert follower.core.phase is Phase.COMMIT


@pytest.mark.parametrize("field", ["previous", "base_root"])
def test_what_builds_on_another_log_is_dropped_without_blame_and_compared(field: str) -> None:
    # After a re-root there may be two logs; an honest peer of the other one must not be taken for a liar.
    table = Table()
    lead, _, follower, _ = table.order()
    plan = table.begin_exchange()
    elsewhere = {field: b"x" * 32}
    other_plan = sign_message(lead.identity, SWARM, replace(plan, revision=1, **elsewhere))  # type: ignore[arg-type]
    result = replace(result_for(table).result, **elsewhere)  # type: ignore[arg-type]
    for message in (other_plan, Proposal(attempt=0, result=result), Certified(certificate=certify(result))):
        assert drop_of(follower, message, lead.peer) is Refusal.OTHER_LOG
    follower.core.receive(other_plan, lead.peer, BEHIND_RETRY_S)
    assert follower.core.take_effects() == [Forked(peer=lead.peer)]
    follower.core.receive(other_plan, lead.peer, 2 * BEHIND_RETRY_S - 0.01)
    assert follower.core.take_effects() == [], "but not all the time"


@pytest.mark.parametrize(("known_round", "forked"), [(0, True), (1, False)])
def test_a_presence_that_shows_another_log_is_compared(known_round: int, forked: bool) -> None:
    table = Table()
    core = table.seats[0].core
    core.take_effects()
    core.observe(make_presence(1, 2, head_round=known_round, head_digest=b"x" * 32), 0.0)
    effects = core.take_effects()
    assert (effects == [Forked(peer=PEERS[1])]) is forked
    assert (effects == [Behind(peer=PEERS[1], round=1)]) is not forked


def test_a_revision_may_change_owners_only() -> None:
    # Reductions are under way, and their bitmaps count in the roster that they began with.
    table = Table()
    lead, _, follower, _ = table.order()
    plan = table.begin_exchange()
    fewer = replace(plan, revision=1, roster=(replace(plan.roster[0], weight=1.0),), owners=(0,) * PARTS)
    signed = sign_message(lead.identity, SWARM, fewer)
    assert refusal_of(follower, signed, lead.peer) is Refusal.EQUIVOCATION
    moved = sign_message(lead.identity, SWARM, revise_plan(plan, {0: follower.number}))
    follower.core.receive(moved, lead.peer, 0.0)
    assert follower.core.view().roster == PEERS[:4]


@pytest.mark.parametrize("revision", [0, 1])
def test_an_old_or_known_revision_does_nothing(revision: int) -> None:
    table = Table()
    lead, _, follower, _ = table.order()
    plan = table.begin_exchange()
    newest = sign_message(lead.identity, SWARM, replace(plan, revision=1))
    follower.core.receive(newest, lead.peer, 0.0)
    assert drop_of(follower, plan if revision == 0 else newest, lead.peer) is Refusal.DUPLICATE


def test_a_result_that_cannot_follow_is_not_voted_for() -> None:
    table = Table()
    lead, _, follower, _ = table.order()
    good = result_for(table)
    for digest in {part.digest for part in RESULT.parts}:
        table.hold(follower, digest)
    for spoilt, refusal in (
        (replace(good.result, parts=good.result.parts[:1]), Refusal.WRONG_LENGTH),
        (replace(good.result, codec="zip"), Refusal.NOT_PLANNED),
        (replace(good.result, voters=(PEERS[STRANGER],)), Refusal.NOT_A_MEMBER),
    ):
        assert refusal_of(follower, Proposal(attempt=0, result=spoilt), lead.peer) is refusal
    follower.core.receive(good, lead.peer, 0.0)
    table.settle()
    assert len(follower.said(Vote)) == 1


def test_a_second_proposal_in_the_same_attempt_is_an_equivocation() -> None:
    table = Table()
    lead, _, follower, _ = table.order()
    good = result_for(table)
    for digest in {part.digest for part in RESULT.parts}:
        table.hold(follower, digest)
    follower.core.receive(good, lead.peer, 0.0)
    table.settle()
    other = Proposal(attempt=0, result=replace(good.result, voters=PEERS[:2]))
    assert refusal_of(follower, other, lead.peer) is Refusal.EQUIVOCATION
    assert drop_of(follower, good, lead.peer) is Refusal.DUPLICATE
    assert follower.vote is not None and follower.vote.accepted == good.result


def test_a_certificate_without_a_quorum_is_refused() -> None:
    table = Table()
    result = result_for(table).result
    good = certify(result)
    foreign = make_vote(IDENTITIES[STRANGER], result)
    for certificate, expected in (
        (certify(result, voters=2), Refusal.NO_QUORUM),
        (replace(good, votes=good.votes[:2] * 2), Refusal.DUPLICATE),
        (replace(good, votes=(*good.votes[:2], foreign)), Refusal.NOT_A_MEMBER),
        (certify(result, swarm=OTHER_SWARM), Refusal.BAD_SIGNATURE),
    ):
        assert refusal_of(table.seats[0], Certified(certificate=certificate), PEERS[STRANGER]) is expected


def test_a_contribution_of_another_length_is_refused() -> None:
    table = Table()
    short = Contribution(round=1, digests=make_digests("x", PARTS - 1))
    assert refusal_of(table.seats[0], short, PEERS[1]) is Refusal.WRONG_LENGTH


def test_a_follower_ignores_what_is_meant_for_the_proposer() -> None:
    table = Table()
    follower, other = table.order()[2:]
    result = result_for(table).result
    for message in (
        Promise(round=1, attempt=0, accepted_attempt=0, accepted=None),
        Nack(round=1, attempt=0, promised=9),
        make_part_done(0, other.identity),
        make_vote(other.identity, result),
    ):
        assert drop_of(follower, message, other.peer) is Refusal.WRONG_ATTEMPT


def test_a_newcomer_is_not_asked_for_promises() -> None:
    table = Table(5, voters=4)
    table.kill(table.order()[0])
    second = table.order()[1]
    assert effects_of(table.seats[4], Prepare(round=1, attempt=5), second.peer) == []


# -- the proposer ---------------------------------------------------------------------------------------------------


def test_strangers_have_no_say_in_a_prepare_phase() -> None:
    table = Table(5, voters=4)
    table.blocked = withhold(Prepare)
    table.kill(table.order()[0])
    table.settle()
    second = table.order()[1]
    assert second.core.phase is Phase.PREPARE
    promise = Promise(round=1, attempt=1, accepted_attempt=0, accepted=None)
    assert drop_of(second, promise, PEERS[4]) is Refusal.NOT_A_MEMBER
    # One that could end any attempt, and run the attempt numbers out.
    nack = Nack(round=1, attempt=1, promised=2**32 - 1)
    assert drop_of(second, nack, PEERS[4]) is Refusal.NOT_A_MEMBER
    bad = replace(promise, accepted=replace(result_for(table).result, codec="fp32"))
    assert refusal_of(second, bad, table.order()[2].peer) is Refusal.NOT_PLANNED


@pytest.mark.parametrize("begun", [False, True])
def test_an_attempt_is_given_up_when_no_quorum_is_left_for_it(begun: bool) -> None:
    table = Table()
    lead, second, third, _ = table.order()
    if begun:
        table.begin_exchange()
    for promised in (0, 9):
        nack = Nack(round=1, attempt=0, promised=promised)
        assert effects_of(lead, nack, second.peer) == [], "three of four may still vote"
    lead.core.receive(Nack(round=1, attempt=0, promised=3), third.peer, 0.0)
    table.settle()
    assert lead.core.attempt == 9, "where both can be met"
    (failed,) = lead.did(AttemptFailed)
    assert (failed.reason, failed.peer) == (Failure.SUPERSEDED, third.peer)


def test_an_owner_answers_for_its_own_parts_only() -> None:
    table = Table()
    lead, owner, other, _ = table.order()
    plan = table.begin_exchange()
    part = plan.owners.index(owner.number)
    forged = make_part_done(part, other.identity, plan)
    assert refusal_of(lead, forged, owner.peer) is Refusal.BAD_SIGNATURE
    for members in (5, 9):
        misfit = make_part_done(part, owner.identity, plan, members)
        assert refusal_of(lead, misfit, owner.peer) is Refusal.OUT_OF_RANGE
    assert drop_of(lead, make_part_done(part, other.identity, plan), other.peer) is Refusal.NOT_PLANNED
    assert drop_of(lead, make_part_done(PARTS, owner.identity, plan), owner.peer) is Refusal.NOT_PLANNED
    assert drop_of(lead, make_part_done(part, owner.identity, plan, attempt=4), owner.peer) is Refusal.WRONG_ATTEMPT
    of_another_roster = make_part_done(part, owner.identity)
    assert drop_of(lead, of_another_roster, owner.peer) is Refusal.NOT_PLANNED, "its bitmap means others"
    assert owner.peer in lead.core.view().waiting_for
    lead.core.receive(make_part_done(part, owner.identity, plan), owner.peer, 0.0)
    assert owner.peer in lead.core.view().waiting_for, "its word alone is not the bytes"
    table.hold(lead, b"d" * 32)
    assert owner.peer not in lead.core.view().waiting_for


def test_a_vote_counts_for_its_voter_and_what_was_proposed() -> None:
    table = Table(5, voters=4)
    lead, voter, other, _ = table.order()
    table.blocked = withhold(Vote)
    table.make_ready()
    table.settle()
    assert lead.core.phase is Phase.COMMIT
    result = lead.said(Proposal)[0].result
    vote = make_vote(voter.identity, result)
    assert refusal_of(lead, vote, other.peer) is Refusal.WRONG_PEER
    assert drop_of(lead, make_vote(IDENTITIES[4], result), PEERS[4]) is Refusal.NOT_A_MEMBER
    assert drop_of(lead, make_vote(voter.identity, RESULT), voter.peer) is Refusal.WRONG_DIGEST
    assert refusal_of(lead, replace(vote, signature=bytes(64)), voter.peer) is Refusal.BAD_SIGNATURE
    assert effects_of(lead, make_vote(voter.identity, result, attempt=4), voter.peer) == []
    lead.core.receive(vote, voter.peer, 0.0)
    lead.core.receive(vote, voter.peer, 0.0)
    assert voter.peer not in lead.core.view().waiting_for
    assert lead.core.phase is Phase.COMMIT, "one voter has one vote"


# -- other rounds ---------------------------------------------------------------------------------------------------


def test_who_is_late_is_told_the_certificate() -> None:
    table = Table()
    lead, second, follower, late = table.order()
    table.make_ready()
    table.settle()
    plan = table.plan()
    proposal = lead.said(Proposal)[0]
    for question in (Prepare(round=1, attempt=1), plan, proposal):
        (answer,) = effects_of(follower, question, late.peer)
        assert isinstance(answer, Send) and isinstance(answer.message, Certified)
        assert (answer.peer, answer.message.certificate.result) == (late.peer, table.result())
    for message in (
        make_vote(second.identity, RESULT),
        Promise(round=1, attempt=0, accepted_attempt=0, accepted=None),
        Nack(round=1, attempt=0, promised=1),
        Contribution(round=1, digests=make_digests("x")),
        make_part_done(0, second.identity),
        Certified(certificate=follower.committed[0]),
    ):
        assert drop_of(follower, message, second.peer) is Refusal.WRONG_ROUND


def test_a_round_long_past_is_nobodys_business() -> None:
    table = Table()
    for number in (1, 2):
        table.make_ready()
        table.run(number)
    assert effects_of(table.seats[0], Prepare(round=1, attempt=1), PEERS[1]) == []


def test_messages_of_the_next_round_wait_until_this_one_is_applied() -> None:
    rehearsal = Table()
    rehearsal.make_ready()
    rehearsal.settle()
    next_lead = proposer_order(rehearsal.seats[0].core.head.digest, PEERS[:4])[0]
    table = Table()
    slow = next(seat for seat in table.order()[1:] if seat.peer != next_lead)
    table.applies_slowly = {slow.number}
    table.make_ready()
    table.settle()
    assert slow.core.phase is Phase.APPLY
    for seat in table.seats:
        if seat is not slow:
            table.make_ready(seat)
    table.settle()
    assert [seat.core.head.round for seat in table.seats if seat is not slow] == [1] * 3
    table.advance(RULES.grace_s)
    assert [seat.core.head.round for seat in table.seats if seat is not slow] == [2] * 3
    assert slow.core.head.round == 0
    table.applies_slowly = set()
    (commit,) = slow.did(Commit)
    table.commit(slow, commit.certificate)
    table.run(2)
    assert table.result(2).round == 2
    assert slow.did(Behind) == [], "it has heard all of it"


def test_what_is_kept_for_the_next_round_is_bounded() -> None:
    table = Table()
    seat = table.seats[0]
    for attempt in range(EARLY_PER_SENDER_MAX + 50):
        dropped = seat.core.receive(Prepare(round=2, attempt=attempt), PEERS[1], 0.0)
        assert dropped is (None if attempt < EARLY_PER_SENDER_MAX else Refusal.WRONG_ROUND)
    assert len(seat.core._early) == EARLY_PER_SENDER_MAX, "one sender does not use up what others need"
    for number in range(2 * EARLY_MESSAGES_MAX):
        seat.core.receive(Prepare(round=2, attempt=0), PeerId(number.to_bytes(32, "big")), 0.0)
    assert len(seat.core._early) == EARLY_MESSAGES_MAX
    assert seat.core.receive(Prepare(round=3, attempt=0), PEERS[2], 0.0) is Refusal.WRONG_ROUND
    assert len(seat.core._early) == EARLY_MESSAGES_MAX


def test_what_was_early_and_wrong_is_dropped_without_blame() -> None:
    table = Table()
    seat = table.seats[0]
    for sender in (PEERS[1], PEERS[STRANGER]):
        seat.core.receive(Prepare(round=2, attempt=0), sender, 0.0)
        seat.core.receive(make_vote(IDENTITIES[STRANGER], replace(RESULT, round=2)), sender, 0.0)
    table.make_ready()
    table.settle()
    assert table.result().round == 1 and seat.core.round == 2


def test_who_hears_of_a_later_round_asks_for_it_but_not_all_the_time() -> None:
    table = Table()
    core = table.seats[0].core
    core.take_effects()
    core.observe(make_presence(1, 2, head_round=0), 0.0)
    assert core.take_effects() == []
    core.observe(make_presence(1, 3, head_round=4), 0.0)
    assert core.take_effects() == [Behind(peer=PEERS[1], round=4)]
    core.receive(Prepare(round=9, attempt=0), PEERS[2], BEHIND_RETRY_S - 0.01)
    assert core.take_effects() == []
    core.receive(Prepare(round=9, attempt=0), PEERS[2], BEHIND_RETRY_S)
    assert core.take_effects() == [Behind(peer=PEERS[2], round=8)]


def test_a_snapshot_leads_past_open_rounds() -> None:
    table = Table()
    table.begin_exchange()
    core = table.seats[0].core
    core.applied(make_head(round_number=7), 0.0)
    assert (core.round, core.attempt, core.phase) == (8, 0, Phase.GATHER)
    assert core.view().roster == ()
    with pytest.raises(AssertionError, match="only go forward"):
        core.applied(make_head(round_number=6), 0.0)


# -- parts ----------------------------------------------------------------------------------------------------------


def test_a_contribution_part_is_judged_before_it_is_read() -> None:
    table = Table(5, voters=4)
    core = table.seats[0].core
    digests = make_digests("1/0")
    assert core.check_part(PEERS[1], 1, 0, digests[0]) is None, "a live trainer's part may overtake the plan"
    assert core.check_part(PEERS[1], 2, 0, digests[0]) is Refusal.WRONG_ROUND
    assert core.check_part(PEERS[1], 0, 0, digests[0]) is Refusal.WRONG_ROUND
    assert core.check_part(PEERS[1], 1, PARTS, digests[0]) is Refusal.OUT_OF_RANGE
    assert core.check_part(PEERS[STRANGER], 1, 0, digests[0]) is Refusal.NOT_A_MEMBER
    core.observe(make_presence(4, 9, trains=False), 0.0)
    assert core.check_part(PEERS[4], 1, 0, digests[0]) is Refusal.NOT_A_MEMBER, "a bootstrap peer contributes nothing"
    core.receive(Contribution(round=1, digests=digests), PEERS[1], 0.0)
    assert core.check_part(PEERS[1], 1, 0, digests[1]) is Refusal.WRONG_DIGEST
    core.part_received(PEERS[1], 1, 0, digests[0], 0.0)
    assert core.check_part(PEERS[1], 1, 0, digests[0]) is Refusal.DUPLICATE


def test_a_planned_member_may_send_although_it_seems_dead() -> None:
    table = Table()
    table.blocked = withhold(PartDone)
    table.begin_exchange()
    core = table.seats[0].core
    core.lose(PEERS[1], 0.0)
    assert core.check_part(PEERS[1], 1, 0, make_digests("other")[0]) is Refusal.WRONG_DIGEST
    core.lose(PEERS[STRANGER], 0.0)
    assert core.check_part(PEERS[STRANGER], 1, 0, b"d" * 32) is Refusal.NOT_A_MEMBER


def test_a_part_of_a_round_that_ended_is_forgotten() -> None:
    table = Table()
    seat = table.seats[0]
    before = look(seat)
    seat.core.part_received(PEERS[1], 0, 0, b"d" * 32, 0.0)
    seat.core.part_received(PEERS[1], 2, 0, b"d" * 32, 0.0)
    seat.core.part_reduced(2, 0, 0, b"d" * 32, frozenset({0}), 0.0)
    assert look(seat) == before
    assert all(not isinstance(effect, Send) for effect in seat.core.take_effects())


def test_a_result_part_is_read_from_members_of_the_open_round() -> None:
    table = Table()
    core = table.seats[0].core
    assert core.check_result_part(PEERS[1], 1, 0) is Refusal.NOT_PLANNED
    table.begin_exchange()
    assert core.check_result_part(PEERS[1], 1, 0) is None
    assert core.check_result_part(PEERS[1], 1, PARTS) is Refusal.NOT_PLANNED
    assert core.check_result_part(PEERS[STRANGER], 1, 0) is Refusal.NOT_PLANNED
    assert core.check_result_part(PEERS[1], 2, 0) is Refusal.WRONG_ROUND


def test_strangers_cannot_keep_members_out() -> None:
    table = Table()
    seat = table.seats[0]
    for number in range(300):
        stranger = PeerId(number.to_bytes(32, "big"))
        seat.core.receive(Contribution(round=1, digests=make_digests("x")), stranger, 0.0)
    table.make_ready()
    table.settle()
    assert all(len(part.contributors) == 1 and part.contributors == b"\x0f" for part in table.result().parts)


# -- what it shows --------------------------------------------------------------------------------------------------


def test_the_view_says_who_is_waited_for() -> None:
    table = Table()
    lead, second, *_ = table.order()
    table.make_ready(second)
    view = second.core.view()
    assert (view.round, view.attempt, view.phase, view.proposer) == (1, 0, Phase.GATHER, lead.peer)
    assert view.ready == (second.peer,)
    assert set(view.waiting_for) == set(PEERS[:4]) - {second.peer}
    assert (view.roster, view.last_failure) == ((), None)

    plan = table.begin_exchange()
    view = lead.core.view()
    assert view.phase is Phase.EXCHANGE and view.roster == PEERS[:4]
    assert set(view.waiting_for) == {PEERS[owner] for owner in plan.owners}
    assert view.deadline_s == RULES.exchange_timeout_s

    table.blocked = withhold(Vote)
    table.finish_reductions()
    assert lead.core.view().phase is Phase.COMMIT
    assert set(lead.core.view().waiting_for) == set(PEERS[:4])
    assert second.core.view().waiting_for == (lead.peer,)


def test_effects_are_handed_out_once_and_in_order() -> None:
    table = Table(1, rules=replace(RULES, peers_min=1))
    seat = table.seats[0]
    seat.core.take_effects()
    table.make_ready()
    effects = seat.core.take_effects()
    assert isinstance(effects[0], Persist), "nothing of a lead is said before it is durable"
    assert seat.core.take_effects() == []


def test_a_deadline_that_has_passed_is_not_due_again() -> None:
    table = Table()
    table.blocked = withhold(Plan)
    table.make_ready()
    table.settle()
    for _ in range(50):
        for seat in table.seats:
            deadline = seat.core.next_deadline()
            if deadline is not None:
                seat.core.handle_deadline(deadline)
                following = seat.core.next_deadline()
                assert following is None or following > deadline


def test_the_digest_in_a_vote_is_that_of_the_result() -> None:
    table = Table()
    table.make_ready()
    table.settle()
    votes = table.seats[0].committed[0].votes
    assert {vote.result_digest for vote in votes} == {digest_record(table.result())}
