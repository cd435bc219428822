"""The round core where members may lie (quorum = two_thirds), with honest members: locks, then votes."""

from dataclasses import replace

import pytest

from shoal.protocol.effects import AttemptFailed, Persist, Send
from shoal.protocol.errors import Failure, Refusal
from shoal.protocol.messages import (
    Certified,
    Lock,
    LockCertificate,
    Locked,
    Nack,
    Plan,
    Promise,
    Proposal,
    Vote,
    digest_record,
    sign_message,
)
from shoal.protocol.quorum import QuorumRule, quorum_size
from tests.unit.protocol.liars import OTHER, sign_lock, sit_down, speak_otherwise
from tests.unit.protocol.round_table import (
    Seat,
    drop_of,
    effects_of,
    everything,
    nothing,
    only_to,
    refusal_of,
    turned_down,
    withhold,
)
from tests.unit.protocol.samples import IDENTITIES, OTHER_SWARM, PEERS, SWARM, make_presence


def kinds_of(seat: Seat) -> list[type]:
    return [type(getattr(effect, "message", effect)) for effect in seat.effects]


def before(seat: Seat, kind: type) -> Persist:
    """The record that was made durable just before the seat said its first message of this kind."""
    place = kinds_of(seat).index(kind)
    effect = seat.effects[place - 1]
    assert isinstance(effect, Persist)
    return effect


# -- plain rounds ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [4, 5, 7])
def test_a_plain_round_is_locked_and_then_voted_for(count: int) -> None:
    table = sit_down(count)
    for number in (1, 2):
        table.make_ready()
        table.settle()
        assert table.result(number).round == number
        assert table.attempts(number) == {0}
    quorum = quorum_size(count, QuorumRule.TWO_THIRDS)
    assert {len(seat.committed[0].votes) for seat in table.seats} == {quorum}
    for seat in table.seats:
        said = [kind for kind in kinds_of(seat) if kind in (Lock, Vote)]
        assert said == [Lock, Vote, Lock, Vote]
    lead = table.order()[0]
    assert {len(one.certificate.locks) for one in lead.said(Locked)} == {quorum}


def test_locks_and_votes_follow_their_record_and_the_bytes_they_stand_for() -> None:
    table = sit_down()
    table.make_ready()
    table.settle()
    result = table.result()
    digests = {part.digest for part in result.parts}
    for seat in table.seats:
        locked, voted = before(seat, Lock), before(seat, Vote)
        assert set(locked.digests) == set(voted.digests) == digests
        assert (locked.vote.locked_attempt, locked.vote.locked_digest) == (0, digest_record(result))
        assert locked.vote.accepted is None, "a lock alone binds to nothing in later attempts"
        assert voted.vote.accepted == result
        assert voted.vote.lock is not None and voted.vote.lock.attempt == voted.vote.accepted_attempt == 0


def test_messages_may_overtake_each_other() -> None:
    table = sit_down()
    table.newest_first = True
    table.make_ready()
    table.run(1)
    table.result()


def test_one_lock_an_attempt_even_after_a_restart() -> None:
    table = sit_down()
    lead, voter, *_ = table.order()
    table.blocked = withhold(Lock)
    table.make_ready()
    table.settle()
    (lock,) = voter.said(Lock)
    proposal = lead.said(Proposal)[0]
    other = speak_otherwise(lead, proposal)
    assert refusal_of(voter, other, lead.peer) is Refusal.EQUIVOCATION
    for again in (other, proposal):
        table.restart(voter)
        for part in again.result.parts:
            table.hold(voter, part.digest)
        voter.core.receive(again, lead.peer, 0.0)
        table.settle()
        assert voter.said(Lock) == ([] if again is other else [lock]), "the same lock may be said again"


# -- proposers that die ---------------------------------------------------------------------------------------------


def test_locks_without_a_quorums_certificate_bind_nobody() -> None:
    table = sit_down()
    lead, *others = table.order()
    table.blocked = withhold(Locked)
    table.make_ready()
    table.settle()
    assert all(len(seat.said(Lock)) == 1 and seat.said(Vote) == [] for seat in others)
    table.blocked = nothing
    table.kill(lead)
    table.run(1)
    assert table.attempts() == {1}
    assert lead.peer not in {member.peer for member in table.result().members}, "it was planned anew"


@pytest.mark.parametrize("count", [1, 2, 3])
def test_what_a_quorum_has_locked_is_proposed_again(count: int) -> None:
    table = sit_down()
    lead, *others = table.order()
    saw = others[:count]
    table.blocked = lambda effect, source, target: (
        only_to(Locked, *saw)(effect, source, target) or withhold(Vote)(effect, source, target)
    )
    table.make_ready()
    table.settle()
    proposal = lead.said(Proposal)[0]
    assert [len(seat.said(Vote)) for seat in others] == [1] * count + [0] * (3 - count)
    table.blocked = nothing
    table.kill(lead)
    table.run(1)
    assert table.result() == proposal.result, "its dead proposer is a member of it"
    assert min(table.attempts()) >= 1
    again = [one for seat in others for one in seat.said(Proposal)]
    assert again and all(one.evidence is not None and one.evidence.lock is not None for one in again)


@pytest.mark.parametrize("others_vote", [True, False])
def test_a_locked_voter_that_was_not_asked_gives_way_to_a_later_quorum_only(others_vote: bool) -> None:
    # Of seven, one saw the first lock certificate; five others are a quorum without it.
    table = sit_down(7)
    lead, *others = table.order()
    locked = others[-1]
    table.blocked = lambda effect, source, target: (
        only_to(Locked, locked)(effect, source, target) or withhold(Vote)(effect, source, target)
    )
    table.make_ready()
    table.settle()
    first = lead.said(Proposal)[0].result
    assert len(locked.said(Vote)) == 1
    table.blocked = lambda effect, source, target: (
        isinstance(effect, Send)
        and (
            (isinstance(effect.message, Promise) and source is locked)
            or (isinstance(effect.message, Locked) and not others_vote)
        )
    )
    table.kill(lead)
    if others_vote:
        table.run(1)
        assert table.result() != first and lead.peer not in table.result().voters
        assert all(seat.committed[0].result == table.result() for seat in table.up()), "the locked one, too"
        return
    table.advance(0.5)
    assert [len(seat.said(Lock)) for seat in others] == [2] * 5 + [1], "it does not lock what it was shown no lock for"


def test_a_certificate_that_reached_one_peer_reaches_everybody() -> None:
    table = sit_down()
    lead, *others = table.order()
    table.blocked = only_to(Certified, others[2])
    table.make_ready()
    table.settle()
    assert [len(seat.committed) for seat in others] == [0, 0, 1]
    certified = others[2].committed[0].result
    table.blocked = nothing
    table.kill(lead)
    table.run(1)
    assert table.result() == certified


@pytest.mark.parametrize("kind", [Plan, Proposal, Lock, Locked, Vote])
def test_a_restarted_proposer_never_leads_the_same_attempt_again(kind: type) -> None:
    table = sit_down()
    lead, *_ = table.order()
    table.blocked = withhold(kind)
    table.make_ready()
    table.settle()
    table.blocked = nothing
    table.restart(lead)
    table.make_ready(lead, label="/after the restart")
    table.settle()
    assert (lead.said(Plan), lead.said(Proposal), lead.said(Locked)) == ([], [], [])
    table.run(1)
    table.result()
    assert min(table.attempts()) >= 1


# -- a proposer's numbers -------------------------------------------------------------------------------------------


def test_one_voter_cannot_end_an_attempt() -> None:
    table = sit_down()
    lead, second, third, _ = table.order()
    assert effects_of(lead, Nack(round=1, attempt=0, promised=9), second.peer) == []
    assert effects_of(lead, Nack(round=1, attempt=0, promised=9), second.peer) == [], "nor by saying it twice"
    lead.core.receive(Nack(round=1, attempt=0, promised=3), third.peer, 0.0)
    assert lead.core.attempt == 3, "as far as an honest one may have got"
    table.settle()
    assert [failed.reason for failed in lead.did(AttemptFailed)] == [Failure.SUPERSEDED]


def test_one_presence_that_claims_a_late_attempt_moves_nobody() -> None:
    table = sit_down()
    lead, second, third, fourth = table.order()
    table.announce(second, attempt=1000)
    assert [seat.core.attempt for seat in (lead, third, fourth)] == [0, 0, 0]
    table.announce(third, attempt=5)
    assert [seat.core.attempt for seat in (lead, fourth)] == [5, 5], "one of the two is honest"


def test_who_is_ahead_of_a_quorum_waits_until_it_has_come() -> None:
    """A number that nobody follows: with everybody's clock running, the distance would stay as it is."""
    table = sit_down()
    *others, fourth = table.order()
    one, second, third = others
    table.blocked = everything
    table.kill(fourth)
    for seat in (second, third):
        head = one.core.head
        claim = {"head_round": head.round, "head_digest": head.digest, "attempt": 5}
        one.core.observe(make_presence(seat.number, 1000, **claim), table.now)
    assert one.core.attempt == 5
    table.make_ready(*others)
    table.advance(0.5)
    waits: list[int] = []
    while second.core.attempt < 5 or third.core.attempt < 5:
        assert one.core.attempt == 5
        waits.append(min(second.core.attempt, third.core.attempt))
        table.advance(1.0)
    assert waits[0] == 0, "they come by their own deadlines"
    table.blocked = nothing
    table.run(1)
    table.result()


def test_a_lock_counts_for_its_voter_and_what_was_proposed() -> None:
    table = sit_down()
    lead, voter, other, _ = table.order()
    table.blocked = withhold(Lock)
    table.make_ready()
    table.settle()
    (lock,) = voter.said(Lock)
    foreign = sign_message(IDENTITIES[5], SWARM, replace(lock, voter=PEERS[5]))
    assert refusal_of(lead, lock, other.peer) is Refusal.WRONG_PEER
    assert drop_of(lead, foreign, PEERS[5]) is Refusal.NOT_A_MEMBER
    assert turned_down(lead, replace(lock, result_digest=OTHER), voter.peer) is Refusal.WRONG_DIGEST
    assert refusal_of(lead, replace(lock, signature=bytes(64)), voter.peer) is Refusal.BAD_SIGNATURE
    assert refusal_of(lead, sign_message(voter.identity, OTHER_SWARM, lock), voter.peer) is Refusal.BAD_SIGNATURE
    assert drop_of(lead, replace(lock, attempt=4), voter.peer) is Refusal.WRONG_ATTEMPT
    assert drop_of(other, lock, voter.peer) is Refusal.WRONG_ATTEMPT
    for _ in range(3):
        lead.core.receive(lock, voter.peer, 0.0)
    table.settle()
    assert lead.said(Locked) == [], "one voter has one lock"


def test_only_a_quorums_locks_on_what_was_proposed_are_voted_for() -> None:
    table = sit_down()
    lead, voter, other, _ = table.order()
    table.blocked = withhold(Locked)
    table.make_ready()
    table.settle()
    locked = lead.said(Locked)[0]
    locks = locked.certificate.locks
    elsewhere = tuple(sign_lock(lock, result_digest=OTHER) for lock in locks)
    unsigned = replace(locks[2], signature=bytes(64))
    stranger = sign_message(IDENTITIES[5], SWARM, replace(locks[0], voter=PEERS[5]))
    for certificate, expected in (
        (replace(locked.certificate, locks=locks[:2]), Refusal.NO_QUORUM),
        (replace(locked.certificate, locks=(*locks[:2], locks[0])), Refusal.DUPLICATE),
        (replace(locked.certificate, locks=(*locks[:2], stranger)), Refusal.NOT_A_MEMBER),
        (replace(locked.certificate, locks=elsewhere), Refusal.WRONG_ATTEMPT),
        (replace(locked.certificate, locks=(*locks[:2], unsigned)), Refusal.BAD_SIGNATURE),
    ):
        assert turned_down(voter, replace(locked, certificate=certificate), lead.peer) is expected
    assert drop_of(voter, locked, other.peer) is Refusal.WRONG_PROPOSER
    later = LockCertificate(attempt=4, locks=tuple(sign_lock(lock, attempt=4) for lock in locks))
    assert drop_of(voter, Locked(round=1, certificate=later), lead.peer) is Refusal.WRONG_ATTEMPT
    assert voter.said(Vote) == []
    voter.core.receive(locked, lead.peer, 0.0)
    table.settle()
    assert len(voter.said(Vote)) == 1
