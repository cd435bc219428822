"""The round core among liars (quorum = two_thirds, one of four lies): nothing invented is certified, nobody honest is
accused, and the honest three come to one result."""

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import pytest

from shoal.protocol import proposer, round_ballot
from shoal.protocol.effects import Send
from shoal.protocol.errors import ProtocolError, Refusal
from shoal.protocol.identity import PeerId
from shoal.protocol.messages import (
    Certified,
    Lock,
    LockCertificate,
    Locked,
    Nack,
    PartDone,
    Prepare,
    Promise,
    Proposal,
    Vote,
    digest_roster,
    sign_message,
    verify_message,
)
from shoal.protocol.proposer import make_voters_result
from shoal.protocol.quorum import check_certificate, check_lock
from tests.unit.protocol.liars import (
    OTHER,
    gather_locks,
    gather_votes,
    lock_for,
    plan_anew,
    sign_lock,
    sit_down,
    speak_otherwise,
    swap_evidence,
)
from tests.unit.protocol.round_table import Filter, Seat, Table, drop_of, nothing, only_to, refusal_of, withhold
from tests.unit.protocol.samples import IDENTITIES, OTHER_SWARM, PEERS, SWARM, make_authority, make_vote


def muzzle(liar: Seat) -> Filter:
    """The liar's own core says nothing to others and hears nothing; the test speaks in its place."""
    return lambda effect, source, target: liar in (source, target) and source is not target


def is_honest(table: Table, liar: Seat) -> bool:
    """Whether no honest peer has accused another one."""
    return all(accused == liar.peer or accuser == liar.peer for accuser, accused, _ in table.refusals)


def end_without(table: Table, liar: Seat) -> None:
    """The liar is gone; the honest ones come to an end."""
    table.blocked = nothing
    table.kill(liar)
    table.run(1)
    assert len({seat.committed[0].result for seat in table.up()}) == 1
    assert is_honest(table, liar)


def reach_proposal(table: Table) -> tuple[Seat, list[Seat], Proposal]:
    """The first proposer lies: everybody has done his part, and its honest proposal is known to the test alone."""
    liar, *others = table.order()
    table.blocked = withhold(Proposal)
    table.make_ready()
    table.settle()
    proposal = liar.said(Proposal)[0]
    table.blocked = muzzle(liar)
    for seat in others:
        for part in proposal.result.parts:
            table.hold(seat, part.digest)
        table.hold(seat, OTHER)
    return liar, others, proposal


# -- voters that lie ------------------------------------------------------------------------------------------------


def test_a_claim_to_be_locked_is_worth_nothing_without_a_quorums_locks() -> None:
    table = sit_down()
    lead, second, liar, other = table.order()
    table.blocked = withhold(Locked)
    table.make_ready()
    table.settle()
    good = lead.said(Proposal)[0]
    locks = lead.said(Locked)[0].certificate.locks
    table.blocked = withhold(Promise)
    table.kill(lead)
    table.settle()
    invented = replace(good.result, voters=PEERS[:3])
    claim = Promise(round=1, attempt=1, accepted_attempt=0, accepted=good.result)
    of_invented = tuple(sign_lock(lock, result_digest=b"x" * 32) for lock in locks)
    unsigned = (*locks[:2], replace(locks[2], signature=bytes(64)))
    for promise, refusal in (
        (claim, Refusal.NO_QUORUM),
        (replace(claim, accepted=invented), Refusal.NO_QUORUM),
        (replace(claim, lock=LockCertificate(attempt=0, locks=locks[:2])), Refusal.NO_QUORUM),
        (replace(claim, lock=LockCertificate(attempt=0, locks=locks[:1] * 3)), Refusal.DUPLICATE),
        (replace(claim, accepted_attempt=1, lock=LockCertificate(attempt=0, locks=locks)), Refusal.NO_QUORUM),
        (replace(claim, accepted=invented, lock=LockCertificate(attempt=0, locks=locks)), Refusal.WRONG_ATTEMPT),
        (replace(claim, lock=LockCertificate(attempt=0, locks=of_invented)), Refusal.WRONG_ATTEMPT),
        (replace(claim, lock=LockCertificate(attempt=0, locks=unsigned)), Refusal.BAD_SIGNATURE),
    ):
        assert refusal_of(second, promise, liar.peer) is refusal
    second.core.receive(replace(claim, lock=LockCertificate(attempt=0, locks=locks)), liar.peer, table.now)
    second.core.receive(replace(claim, accepted=None), other.peer, table.now)
    table.settle()
    assert second.said(Proposal)[0].result == good.result, "this one has the locks behind it"


def test_the_same_locks_behind_several_promises_are_judged_once(monkeypatch: pytest.MonkeyPatch) -> None:
    table = sit_down(7)
    lead, second, *others = table.order()
    table.blocked = withhold(Locked)
    table.make_ready()
    table.settle()
    good = lead.said(Proposal)[0]
    lock = lead.said(Locked)[0].certificate
    table.blocked = withhold(Promise)
    table.kill(lead)
    table.settle()
    judged: list[LockCertificate] = []

    def check(certificate: LockCertificate, *args: Any) -> None:
        judged.append(certificate)
        check_lock(certificate, *args)

    monkeypatch.setattr(round_ballot, "check_lock", check)
    claim = Promise(round=1, attempt=1, accepted_attempt=0, accepted=good.result, lock=lock)
    forged = replace(lock, locks=(*lock.locks[:-1], replace(lock.locks[-1], signature=bytes(64))))
    for seat in others[:2]:
        equal = replace(claim, lock=replace(lock))
        assert second.core.receive(equal, seat.peer, table.now) is None
    assert judged == [lock]
    assert refusal_of(second, replace(claim, lock=forged), others[2].peer) is Refusal.BAD_SIGNATURE
    invented = replace(claim, accepted=replace(good.result, voters=PEERS[:3]))
    assert refusal_of(second, invented, others[2].peer) is Refusal.WRONG_ATTEMPT, "not what these locks are on"
    assert judged == [lock, forged, lock]


def test_a_voter_that_says_nothing_or_nonsense_stops_nobody() -> None:
    table = sit_down()
    *_, liar = table.order()
    table.blocked = lambda effect, source, target: source is liar and withhold(Lock)(effect, source, target)
    table.make_ready()
    table.settle()
    assert {seat.committed[0].attempt for seat in table.up()} == {0}


# -- proposers that lie ---------------------------------------------------------------------------------------------


def shrink_voters(proposal: Proposal) -> Proposal:
    return replace(proposal, result=replace(proposal.result, voters=proposal.result.voters[:-1]))


def turn_voters(proposal: Proposal) -> Proposal:
    return replace(proposal, result=replace(proposal.result, voters=proposal.result.voters[::-1]))


def raise_weight(proposal: Proposal) -> Proposal:
    first, *rest = proposal.result.members
    return replace(proposal, result=replace(proposal.result, members=(replace(first, weight=0.9), *rest)))


def raise_tokens(proposal: Proposal) -> Proposal:
    first, *rest = proposal.result.members
    return replace(proposal, result=replace(proposal.result, members=(replace(first, tokens=10**9), *rest)))


def drop_member(proposal: Proposal) -> Proposal:
    parts = tuple(replace(part, contributors=b"\x07") for part in proposal.result.parts)
    return replace(proposal, result=replace(proposal.result, parts=parts))


def forge_word(proposal: Proposal) -> Proposal:
    """Another update of a part that another peer reduced, in that peer's name."""
    assert proposal.evidence is not None and proposal.evidence.plan is not None
    roster, owners = proposal.evidence.plan.roster, proposal.evidence.plan.owners
    done, parts = list(proposal.evidence.done), list(proposal.result.parts)
    liar = proposer_of(proposal)
    part = next(part for part, owner in enumerate(owners) if roster[owner].signed.peer != PEERS[liar])
    done[part] = sign_message(IDENTITIES[liar], SWARM, replace(done[part], digest=OTHER))
    parts[part] = replace(parts[part], digest=OTHER)
    result = replace(proposal.result, parts=tuple(parts))
    return swap_evidence(replace(proposal, result=result), done=tuple(done))


def proposer_of(proposal: Proposal) -> int:
    assert proposal.evidence is not None and proposal.evidence.plan is not None
    plan = proposal.evidence.plan
    return next(
        number for number, one in enumerate(IDENTITIES) if sign_message(one, SWARM, plan).signature == plan.signature
    )


def forge_plan_weight(proposal: Proposal) -> Proposal:
    assert proposal.evidence is not None and proposal.evidence.plan is not None
    plan, liar = proposal.evidence.plan, IDENTITIES[proposer_of(proposal)]
    first, *rest = plan.roster
    heavy = sign_message(liar, SWARM, replace(plan, roster=(replace(first, weight=0.9), *rest)))
    return swap_evidence(raise_weight(proposal), plan=heavy)


def forge_ready(proposal: Proposal) -> Proposal:
    assert proposal.evidence is not None and proposal.evidence.plan is not None
    plan, liar = proposal.evidence.plan, IDENTITIES[proposer_of(proposal)]
    first, *rest = plan.roster
    signed = replace(first.signed, ready=replace(first.signed.ready, tokens=10**9))
    return swap_evidence(
        proposal, plan=sign_message(liar, SWARM, replace(plan, roster=(replace(first, signed=signed), *rest)))
    )


def plan_of_another(proposal: Proposal) -> Proposal:
    assert proposal.evidence is not None and proposal.evidence.plan is not None
    other = next(one for one in IDENTITIES if one is not IDENTITIES[proposer_of(proposal)])
    return swap_evidence(proposal, plan=sign_message(other, SWARM, proposal.evidence.plan))


def plan_of_another_attempt(proposal: Proposal) -> Proposal:
    assert proposal.evidence is not None and proposal.evidence.plan is not None
    liar = IDENTITIES[proposer_of(proposal)]
    return swap_evidence(proposal, plan=sign_message(liar, SWARM, replace(proposal.evidence.plan, attempt=4)))


def words_of_another_attempt(proposal: Proposal) -> Proposal:
    assert proposal.evidence is not None
    return swap_evidence(proposal, done=tuple(replace(one, attempt=4) for one in proposal.evidence.done))


def words_in_another_order(proposal: Proposal) -> Proposal:
    assert proposal.evidence is not None
    done = proposal.evidence.done[::-1]
    parts = proposal.result.parts[::-1]
    return swap_evidence(replace(proposal, result=replace(proposal.result, parts=parts)), done=done)


def word_of_another_swarm(proposal: Proposal) -> Proposal:
    assert proposal.evidence is not None
    return swap_evidence(
        proposal, done=tuple(sign_message(IDENTITIES[0], OTHER_SWARM, one) for one in proposal.evidence.done)
    )


LIES: list[tuple[Callable[[Proposal], Proposal], Refusal | None]] = [
    (lambda one: replace(one, evidence=None), Refusal.NOT_PLANNED),
    (lambda one: swap_evidence(one, plan=None), Refusal.NOT_PLANNED),
    (lambda one: swap_evidence(one, done=()), Refusal.WRONG_LENGTH),
    (raise_weight, Refusal.NOT_PLANNED),
    (raise_tokens, Refusal.NOT_PLANNED),
    (drop_member, Refusal.NOT_PLANNED),
    (forge_plan_weight, Refusal.OUT_OF_RANGE),
    (forge_ready, Refusal.BAD_SIGNATURE),
    (forge_word, Refusal.BAD_SIGNATURE),
    (plan_of_another, Refusal.BAD_SIGNATURE),
    (plan_of_another_attempt, Refusal.WRONG_ATTEMPT),
    (words_of_another_attempt, Refusal.WRONG_ATTEMPT),
    (words_in_another_order, Refusal.WRONG_ATTEMPT),
    (word_of_another_swarm, Refusal.BAD_SIGNATURE),
    # What one peer finds another one may find otherwise, so this is no proof of a lie; it is not locked, though.
    (shrink_voters, None),
    (turn_voters, None),
]


@pytest.mark.parametrize(("lie", "refusal"), LIES)
def test_what_does_not_follow_from_others_words_is_never_certified(
    lie: Callable[[Proposal], Proposal], refusal: Refusal | None
) -> None:
    table = sit_down()
    liar, others, proposal = reach_proposal(table)
    forged = lie(proposal)
    for seat in others:
        if refusal is not None:
            assert refusal_of(seat, forged, liar.peer) is refusal
        else:
            assert seat.core.receive(forged, liar.peer, table.now) is None
    table.settle()
    assert all((seat.said(Lock), seat.said(Vote)) == ([], []) for seat in others)
    end_without(table, liar)
    assert table.up()[0].committed[0].result != forged.result


def test_a_lock_of_a_later_attempt_supports_nothing() -> None:
    table = sit_down()
    liar, others, proposal = reach_proposal(table)
    locks = LockCertificate(attempt=4, locks=(lock_for(liar, proposal.result, 4),))
    early = swap_evidence(proposal, plan=None, done=(), lock=locks)
    assert refusal_of(others[0], early, liar.peer) is Refusal.WRONG_ATTEMPT


@pytest.mark.parametrize("split", list(product("ab", repeat=3)), ids="".join)
@pytest.mark.parametrize("shown", range(4))
def test_of_two_results_one_at_most_is_certified_and_it_stands(split: tuple[str, ...], shown: int) -> None:
    """The liar proposes a to some and b to others, locks and votes for both, shows what locks it gets to `shown` of
    them, keeps the certificate to itself, and dies."""
    table = sit_down()
    liar, others, proposal = reach_proposal(table)
    table.settle()
    proposals = {"a": proposal, "b": speak_otherwise(liar, proposal)}
    for seat, name in zip(others, split, strict=True):
        assert seat.core.receive(proposals[name], liar.peer, table.now) is None
    table.settle()
    said = [lock for seat in others for lock in seat.said(Lock)]
    for name, one in proposals.items():
        locks = gather_locks(one.result, [*said, lock_for(liar, one.result)])
        for seat, heard in list(zip(others, split, strict=True))[:shown]:
            if heard == name and len(locks.locks) >= 3:
                assert seat.core.receive(Locked(round=1, certificate=locks), liar.peer, table.now) is None
    table.settle()
    votes = [vote for seat in others for vote in seat.said(Vote)]
    certified = []
    for one in proposals.values():
        certificate = gather_votes(one.result, [*votes, make_vote(liar.identity, one.result)])
        try:
            check_certificate(certificate, table.head, make_authority(table.rules))
        except ProtocolError as error:
            assert error.refusal is Refusal.NO_QUORUM
        else:
            certified.append(certificate)
    assert len(certified) <= 1
    end_without(table, liar)
    if certified:
        assert table.up()[0].committed[0].result == certified[0].result, "known or not, it was certified"


def test_a_proposer_that_ignores_what_is_locked_does_not_get_a_quorum() -> None:
    table = sit_down()
    lead, liar, third, fourth = table.order()
    both = (only_to(Locked, third), withhold(Vote))
    table.blocked = lambda effect, source, target: any(one(effect, source, target) for one in both)
    table.make_ready()
    table.settle()
    locked = lead.said(Proposal)[0].result
    assert [len(seat.said(Vote)) for seat in (lead, third, fourth)] == [1, 1, 0]
    table.blocked = muzzle(liar)
    anew = plan_anew(table, liar, table.plan(), 1)
    for seat in (lead, third, fourth):
        table.hold(seat, OTHER)
        assert seat.core.receive(anew, liar.peer, table.now) is None
    table.settle()
    assert [len([one for one in seat.said(Lock) if one.attempt == 1]) for seat in (lead, third, fourth)] == [0, 0, 1]
    end_without(table, liar)
    assert table.up()[0].committed[0].result == locked


def test_a_lock_counts_in_its_attempt_only() -> None:
    table = sit_down()
    liar, others, proposal = reach_proposal(table)
    others[0].core.receive(proposal, liar.peer, table.now)
    table.settle()
    other = speak_otherwise(liar, proposal)
    enough = [lock_for(seat, other.result) for seat in (liar, *others[1:])]
    swapped = Locked(round=1, certificate=gather_locks(other.result, enough))
    assert refusal_of(others[0], swapped, liar.peer) is Refusal.WRONG_ATTEMPT, "locks on what it was not shown"


def test_nobody_is_voted_out_but_who_is_found_absent() -> None:
    table = sit_down()
    liar, *others = table.order()
    table.blocked = muzzle(liar)
    expelled = others[0]
    empty = make_voters_result(table.head, table.rules.codec, tuple(p for p in PEERS[:4] if p != expelled.peer))
    for seat in others[1:]:
        assert seat.core.receive(Proposal(attempt=0, result=empty), liar.peer, table.now) is None
    table.settle()
    assert all(seat.said(Lock) == [] for seat in others)
    for seat in others[1:]:
        seat.core.lose(expelled.peer, table.now)
        seat.core.handle_deadline(table.now)
    table.settle()
    assert [len(seat.said(Lock)) for seat in others] == [0, 1, 1], "once they, too, find it gone"


def test_a_round_that_changes_nothing_is_not_locked() -> None:
    table = sit_down()
    liar, *others = table.order()
    table.blocked = muzzle(liar)
    nothing_new = make_voters_result(table.head, table.rules.codec, table.head.voters)
    for seat in others:
        try:
            seat.core.receive(Proposal(attempt=0, result=nothing_new), liar.peer, table.now)
        except ProtocolError as error:
            assert error.refusal is Refusal.NOT_PLANNED
    table.settle()
    assert all(seat.said(Lock) == [] for seat in others)


def test_a_proposal_that_comes_again_is_not_judged_again(monkeypatch: pytest.MonkeyPatch) -> None:
    table = sit_down()
    liar, others, proposal = reach_proposal(table)
    judged: list[object] = []

    def verify(peer: PeerId, swarm: bytes, message: Any) -> None:
        judged.append(message)
        verify_message(peer, swarm, message)

    monkeypatch.setattr(proposer, "verify_message", verify)
    seat = others[0]
    assert seat.core.receive(proposal, liar.peer, table.now) is None
    assert proposal.evidence is not None
    assert judged == [proposal.evidence.plan, *proposal.evidence.done]
    judged.clear()
    assert drop_of(seat, proposal, liar.peer) is Refusal.DUPLICATE
    assert judged == []
    unsigned = tuple(replace(one, signature=bytes(64)) for one in proposal.evidence.done)
    assert refusal_of(seat, swap_evidence(proposal, done=unsigned), liar.peer) is Refusal.BAD_SIGNATURE


def test_an_owner_that_says_two_things_about_its_part_gains_nothing() -> None:
    table = sit_down()
    lead, liar, *others = table.order()
    plan = table.begin_exchange()
    table.finish_reductions(lead, *others)
    part = plan.owners.index(PEERS.index(liar.peer))
    first = PartDone(
        round=1,
        attempt=0,
        roster_digest=digest_roster(plan.roster),
        part=part,
        digest=OTHER,
        contributors=b"\x0f",
    )
    second = replace(first, digest=b"p" * 32)
    table.hold(lead, OTHER)
    for one in (first, second):
        lead.core.receive(sign_message(liar.identity, SWARM, one), liar.peer, table.now)
    table.settle()
    proposals = {one.result for one in lead.said(Proposal)}
    assert [result.parts[part].digest for result in proposals] == [OTHER], "the first counts"
    assert drop_of(lead, sign_message(liar.identity, SWARM, second), liar.peer) is Refusal.WRONG_ATTEMPT


def test_a_proposer_that_plans_with_itself_alone_gets_no_locks() -> None:
    table = sit_down()
    liar, others, proposal = reach_proposal(table)
    assert proposal.evidence is not None and proposal.evidence.plan is not None
    plan = proposal.evidence.plan
    own = next(entry for entry in plan.roster if entry.signed.peer == liar.peer)
    alone = replace(plan, roster=(replace(own, weight=1.0),), owners=(0,) * len(plan.owners))
    forged = plan_anew(table, liar, sign_message(liar.identity, SWARM, alone), 0)
    for seat in others:
        assert refusal_of(seat, forged, liar.peer) in (Refusal.NOT_PLANNED, Refusal.EQUIVOCATION)
    table.settle()
    assert all(seat.said(Lock) == [] for seat in others)


def test_a_certificate_of_a_third_is_none() -> None:
    table = sit_down()
    liar, others, proposal = reach_proposal(table)
    votes = [make_vote(seat.identity, proposal.result) for seat in (liar, others[0])]
    certificate = gather_votes(proposal.result, votes)
    assert refusal_of(others[1], Certified(certificate=certificate), liar.peer) is Refusal.NO_QUORUM


def test_one_voters_word_leads_no_further_than_the_next_attempt() -> None:
    """Idle voters take a proposer's prepare: a liar could send one of them to where the others come in hours."""
    table = sit_down()
    order = table.order()
    far, near = 4 * 63 + 3, 3
    liar = order[3]
    for seat in order[:3]:
        refused = answer_of(seat, liar.peer, Prepare(round=1, attempt=far))
        assert refused == [Nack(round=1, attempt=far, promised=0)] and seat.core.attempt == 0
    first, second = order[:2]
    for seat in (second, order[2]):
        table.announce(seat, attempt=far)
    assert first.core.attempt == far, "one of the two is honest"
    assert isinstance(answer_of(first, liar.peer, Prepare(round=1, attempt=far))[0], Promise)
    assert answer_of(order[2], liar.peer, Prepare(round=1, attempt=near)) == [Nack(round=1, attempt=near, promised=0)]


def answer_of(seat: Seat, sender: PeerId, message: Prepare) -> list[object]:
    """What the seat says to this."""
    seat.core.take_effects()
    seat.core.receive(message, sender, 0.0)
    return [effect.message for effect in seat.core.take_effects() if isinstance(effect, Send)]
