"""What a member that lies can say: all of it well-formed and signed by whoever would have to sign it."""

from collections.abc import Iterable
from dataclasses import replace

from shoal.protocol.messages import (
    Certificate,
    Evidence,
    Lock,
    LockCertificate,
    PartDone,
    Plan,
    Proposal,
    Result,
    Vote,
    digest_record,
    digest_roster,
    sign_message,
)
from shoal.protocol.proposer import make_evidence, make_result
from shoal.protocol.quorum import make_bitmap
from tests.unit.protocol.round_table import Seat, Table
from tests.unit.protocol.samples import CROWD, CROWD_PEERS, PARTS, RULES, SWARM

LYING = replace(RULES, quorum="two_thirds")
OTHER = b"o" * 32


def sit_down(count: int = 4) -> Table:
    """A table whose members may lie, and where presences are heard again and again."""
    table = Table(count, rules=LYING)
    table.beats = True
    return table


def speak_otherwise(lead: Seat, proposal: Proposal, digest: bytes = OTHER) -> Proposal:
    """What a lying proposer could propose, too: another update of the part that it reduced itself."""
    evidence, result = proposal.evidence, proposal.result
    assert evidence is not None and evidence.plan is not None
    roster = evidence.plan.roster
    part = next(part for part, owner in enumerate(evidence.plan.owners) if roster[owner].signed.peer == lead.peer)
    done, parts = list(evidence.done), list(result.parts)
    done[part] = sign_message(lead.identity, SWARM, replace(done[part], digest=digest))
    parts[part] = replace(parts[part], digest=digest)
    return replace(proposal, result=replace(result, parts=tuple(parts)), evidence=replace(evidence, done=tuple(done)))


def plan_anew(table: Table, liar: Seat, plan: Plan, attempt: int) -> Proposal:
    """A result of a later attempt with all that belongs to it, but without a word of what was locked before."""
    own = sign_message(liar.identity, SWARM, replace(plan, attempt=attempt, revision=0))
    everybody = make_bitmap(frozenset(range(len(plan.roster))), len(plan.roster))
    done = {}
    for part, owner in enumerate(plan.owners):
        word = PartDone(
            round=plan.round,
            attempt=attempt,
            roster_digest=digest_roster(plan.roster),
            part=part,
            digest=OTHER,
            contributors=everybody,
        )
        done[part] = sign_message(CROWD[CROWD_PEERS.index(plan.roster[owner].signed.peer)], SWARM, word)
    assert len(done) == PARTS
    result = make_result(own, done, table.head, table.rules.codec_out, frozenset(), table.rules.voters_max)
    return Proposal(attempt=attempt, result=result, evidence=make_evidence(own, done))


def sign_lock(lock: Lock, **changes: object) -> Lock:
    """The same voter's lock on something else."""
    changed = replace(lock, **changes)  # type: ignore[arg-type]
    return sign_message(CROWD[CROWD_PEERS.index(lock.voter)], SWARM, changed)


def lock_for(seat: Seat, result: Result, attempt: int = 0) -> Lock:
    """This seat's lock, whatever its core thinks of it."""
    lock = Lock(voter=seat.peer, round=result.round, attempt=attempt, result_digest=digest_record(result))
    return sign_message(seat.identity, SWARM, lock)


def gather_locks(result: Result, locks: Iterable[Lock]) -> LockCertificate:
    """The locks on this result, one a voter."""
    fitting = {lock.voter: lock for lock in locks if lock.result_digest == digest_record(result)}
    return LockCertificate(attempt=0, locks=tuple(fitting[voter] for voter in sorted(fitting)))


def gather_votes(result: Result, votes: Iterable[Vote]) -> Certificate:
    """The votes for this result, one a voter: a certificate, if they are enough."""
    fitting = {vote.voter: vote for vote in votes if vote.result_digest == digest_record(result)}
    return Certificate(result=result, attempt=0, votes=tuple(fitting[voter] for voter in sorted(fitting)))


def swap_evidence(proposal: Proposal, **changes: object) -> Proposal:
    """The proposal with other evidence."""
    assert proposal.evidence is not None
    evidence: Evidence = replace(proposal.evidence, **changes)  # type: ignore[arg-type]
    return replace(proposal, evidence=evidence)
