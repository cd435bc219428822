"""Signatures that were checked ahead cost the one who judges nothing, and are worth nothing where they do not hold."""

from dataclasses import replace

import pytest

from shoal.protocol import identity
from shoal.protocol.errors import ProtocolError, Refusal
from shoal.protocol.identity import PeerId, forget_signatures
from shoal.protocol.messages import ROUND_MESSAGES, Certified, Evidence, Locked, PartDone, Plan, Promise, Proposal
from shoal.protocol.proposer import check_evidence, check_plan
from shoal.protocol.quorum import Authority, check_certificate, check_lock
from shoal.protocol.signatures import count_signatures, verify_ahead
from tests.unit.protocol.liars import sit_down
from tests.unit.protocol.round_table import Table
from tests.unit.protocol.samples import PARTS, SWARM, make_authority


@pytest.fixture(autouse=True)
def nothing_is_known() -> None:
    forget_signatures()


def count_checked() -> int:
    return identity._verify_once.cache_info().misses


def hold_round() -> tuple[Table, PeerId, list[ROUND_MESSAGES]]:
    """A round of four members of whom some may lie, its proposer and what that one said."""
    table = sit_down()
    head = table.head
    lead = table.order()[0]
    table.make_ready()
    table.run(1)
    table.head = head
    return table, lead.peer, [lead.said(kind)[0] for kind in (Plan, Proposal, Locked, Certified)]


def judge(table: Table, message: ROUND_MESSAGES, sender: PeerId, authority: Authority, result: object) -> None:
    match message:
        case Plan():
            check_plan(message, table.head, table.rules.codec, PARTS, SWARM)
        case Proposal():
            check_evidence(message, sender, table.head, table.rules.codec, authority)
        case Locked():
            check_lock(message.certificate, result, table.head.voters, authority)  # type: ignore[arg-type]
        case Certified():
            check_certificate(message.certificate, table.head, authority)
        case _:
            raise AssertionError("another message")


@pytest.mark.parametrize("number", range(4))
def test_what_was_checked_ahead_is_not_checked_again(number: int) -> None:
    table, lead, said = hold_round()
    proposal, message = said[1], said[number]
    assert isinstance(proposal, Proposal)
    forget_signatures()
    verify_ahead(message, lead, SWARM)
    ahead = count_checked()
    # The plan itself may be too long to be remembered.
    assert count_signatures(message) - 1 <= ahead <= count_signatures(message) and ahead >= 3
    judge(table, message, lead, make_authority(table.rules), proposal.result)
    assert count_checked() == ahead


def test_promises_show_the_locks_behind_them() -> None:
    _, lead, said = hold_round()
    proposal, locked = said[1], said[2]
    assert isinstance(proposal, Proposal) and isinstance(locked, Locked)
    lock = locked.certificate
    promise = Promise(round=1, attempt=1, accepted_attempt=0, accepted=proposal.result, lock=lock)
    again = replace(proposal, attempt=1, evidence=Evidence(plan=None, done=(), lock=lock))
    for message in (promise, again):
        forget_signatures()
        verify_ahead(message, lead, SWARM)
        assert count_checked() == count_signatures(message) == len(lock.locks)


def test_a_bad_signature_ends_the_checks_and_is_found_again() -> None:
    table, lead, said = hold_round()
    proposal = said[1]
    assert isinstance(proposal, Proposal) and proposal.evidence is not None
    done = list(proposal.evidence.done)
    done[0] = replace(done[0], signature=bytes(64))
    forged = replace(proposal, evidence=replace(proposal.evidence, done=tuple(done)))
    forget_signatures()
    verify_ahead(forged, lead, SWARM)
    assert count_checked() <= count_signatures(forged) - len(done) + 1, "none behind the bad one"
    with pytest.raises(ProtocolError) as caught:
        judge(table, forged, lead, make_authority(table.rules), None)
    assert caught.value.refusal is Refusal.BAD_SIGNATURE


def test_evidence_that_fits_nothing_is_no_error_here() -> None:
    _, lead, said = hold_round()
    plan, proposal = said[0], said[1]
    assert isinstance(plan, Plan) and isinstance(proposal, Proposal) and proposal.evidence is not None
    for evidence in (
        Evidence(plan=None, done=proposal.evidence.done, lock=None),
        replace(proposal.evidence, done=()),
        replace(proposal.evidence, plan=replace(plan, owners=(65535,) * len(plan.owners))),
    ):
        verify_ahead(replace(proposal, evidence=evidence), lead, SWARM)
    for light in (replace(proposal, evidence=None), proposal.evidence.done[0]):
        assert count_signatures(light) == int(isinstance(light, PartDone))
        before = count_checked()
        verify_ahead(light, lead, SWARM)
        assert count_checked() == before
