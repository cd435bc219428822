"""What the proposer of one attempt keeps, and the pure steps that it takes.

Invariants: a proposer that took over proposes again whatever a quorum's promises say may already be certified, and
plans anew only when they say that nothing can be (single-decree Paxos, phase 2a); weights are a pure function of the
members' signed READYs, so that every member can check the plan.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from shoal.protocol.aggregators import planned_weights
from shoal.protocol.attendance import WORK, check_attendance, weight_factor
from shoal.protocol.errors import ProtocolError, Refusal
from shoal.protocol.exchange import Waits
from shoal.protocol.identity import PeerId, short_peer_id
from shoal.protocol.messages import (
    ROSTER_MAX,
    Evidence,
    Lock,
    Member,
    PartDone,
    PartResult,
    Plan,
    Promise,
    Proposal,
    Result,
    RosterEntry,
    SignedReady,
    Vote,
    digest_roster,
    verify_message,
    verify_ready,
)
from shoal.protocol.quorum import Authority, Head, check_base, check_lock, choose_voters, list_members, owner_order
from shoal.protocol.shares import assign_parts


@dataclass(slots=True)
class Lead:
    """The proposer's bookkeeping of one attempt; gone when the attempt ends."""

    attempt: int
    promises: dict[PeerId, Promise] = field(default_factory=dict)
    grace_ends_s: float | None = None
    awaited_until_s: float | None = None
    done: dict[int, PartDone] = field(default_factory=dict)
    tried: dict[int, list[PeerId]] = field(default_factory=dict)
    # Parts that cannot be proposed yet, by owner: not reduced, or reduced by an owner that may take the bytes along.
    open: Waits = field(default_factory=Waits)
    unheld: dict[bytes, set[int]] = field(default_factory=dict)  # the latter, by the digest of those bytes
    heard_s: dict[PeerId, float] = field(default_factory=dict)
    finished_s: dict[PeerId, float] = field(default_factory=dict)  # when an owner's last part was here
    proposed_s: float | None = None  # what the exchange has made
    nacks: dict[PeerId, int] = field(default_factory=dict)
    locks: dict[PeerId, Lock] = field(default_factory=dict)
    votes: dict[PeerId, Vote] = field(default_factory=dict)


def choose_accepted(promises: Mapping[PeerId, Promise]) -> Promise | None:
    """What may already be certified: the result that was voted for in the highest attempt, if any was."""
    accepted = [promise for promise in promises.values() if promise.accepted is not None]
    return max(accepted, key=lambda promise: promise.accepted_attempt) if accepted else None


def choose_roster(
    ready: Mapping[PeerId, SignedReady], known: frozenset[PeerId], head: Head, newcomers_max: int
) -> tuple[PeerId, ...]:
    """Who takes part, in the order of the roster: everybody who is known, and as many newcomers as a round takes in,
    each in its turn."""
    newcomers = owner_order(head.digest, 0, tuple(peer for peer in sorted(ready) if peer not in known))
    old = owner_order(head.digest, 0, tuple(peer for peer in sorted(ready) if peer in known))
    taken = newcomers[:newcomers_max]
    return tuple(sorted((*old[: ROSTER_MAX - len(taken)], *taken)))


def list_weights(roster: tuple[SignedReady, ...], rule: str) -> tuple[float, ...]:
    """Every member's weight in the aggregate (float32 values), from tokens and steps, and from what else the manifest's
    rule goes by."""
    tokens = np.array([signed.ready.tokens for signed in roster], dtype=np.int64)
    steps = np.array([signed.ready.steps for signed in roster], dtype=np.int64)
    factors = (weight_factor(signed.ready.attendance, rule) for signed in roster)
    return tuple(float(weight) for weight in planned_weights(tokens, steps, factors))


def make_plan(
    head: Head,
    attempt: int,
    codec: str,
    ready: Mapping[PeerId, SignedReady],
    parts: int,
    shares: Mapping[PeerId, float],
    weights: str = WORK,
) -> Plan | None:
    """The first plan of an attempt, unsigned; None while nobody ready can own a part. `ready` is the whole roster,
    `weights` the manifest's rule."""
    chosen = sorted(ready)
    assert len(chosen) <= ROSTER_MAX, "chosen by choose_roster"
    roster = tuple(ready[peer] for peer in chosen)
    owners = tuple(peer for peer in chosen if ready[peer].ready.owns)
    if not owners:
        return None
    assigned = assign_parts(owner_order(head.digest, 0, owners), shares, parts)
    entries = tuple(
        RosterEntry(signed=signed, weight=weight)
        for signed, weight in zip(roster, list_weights(roster, weights), strict=True)
    )
    return Plan(
        round=head.round + 1,
        attempt=attempt,
        revision=0,
        previous=head.digest,
        base_root=head.state_root,
        codec=codec,
        roster=entries,
        owners=tuple(chosen.index(owner) for owner in assigned),
    )


def choose_owner(plan: Plan, part: int, tried: list[PeerId], lost: frozenset[PeerId]) -> int | None:
    """The roster index of the next owner of a part, in rendezvous order; None when everybody has been tried."""
    peers = [entry.signed.peer for entry in plan.roster]
    able = tuple(entry.signed.peer for entry in plan.roster if entry.signed.ready.owns)
    for peer in owner_order(plan.previous, part, able):
        if peer not in lost and peer not in tried:
            return peers.index(peer)
    return None


def revise_plan(plan: Plan, owners: Mapping[int, int]) -> Plan:
    """The next revision, unsigned, with the owners of some parts changed."""
    changed = tuple(owners.get(part, owner) for part, owner in enumerate(plan.owners))
    return replace(plan, revision=plan.revision + 1, owners=changed, signature=bytes(64))


def check_plan(plan: Plan, head: Head, codec: str, parts: int, swarm: bytes, weights: str = WORK) -> None:
    """Raise ProtocolError unless a member can follow this plan. `codec` is that of contributions, `weights` the
    manifest's rule."""
    check_base(plan, head)
    if plan.codec != codec:
        raise ProtocolError(Refusal.NOT_PLANNED, f"plan wants codec {plan.codec}, the manifest {codec}")
    if len(plan.owners) != parts:
        raise ProtocolError(Refusal.WRONG_LENGTH, f"plan has {len(plan.owners)} owners for {parts} parts")
    peers = [entry.signed.peer for entry in plan.roster]
    if peers != sorted(set(peers)):
        raise ProtocolError(Refusal.NON_CANONICAL, "the roster is not in the order of its peer ids")
    for entry in plan.roster:
        ready = entry.signed.ready
        if ready.round != plan.round or ready.base_root != plan.base_root:
            raise ProtocolError(Refusal.WRONG_BASE, f"{short_peer_id(entry.signed.peer)} is ready for something else")
        check_attendance(ready.attendance, weights, plan.round)
        verify_ready(swarm, entry.signed)
    for owner in plan.owners:
        if owner >= len(peers) or not plan.roster[owner].signed.ready.owns:
            raise ProtocolError(Refusal.OUT_OF_RANGE, f"plan gives a part to roster index {owner}, which owns nothing")
    readies = tuple(entry.signed for entry in plan.roster)
    if tuple(entry.weight for entry in plan.roster) != list_weights(readies, weights):
        raise ProtocolError(Refusal.OUT_OF_RANGE, "the plan's weights do not follow from its READYs")


def make_result(
    plan: Plan, done: Mapping[int, PartDone], head: Head, codec: str, absent: frozenset[PeerId], voters_max: int
) -> Result:
    """The value that the attempt proposes, once every part is done. `codec` is that of updates."""
    members = tuple(
        Member(
            peer=entry.signed.peer,
            contribution_root=entry.signed.ready.contribution_root,
            tokens=entry.signed.ready.tokens,
            steps=entry.signed.ready.steps,
            weight=entry.weight,
            attendance=entry.signed.ready.attendance,
        )
        for entry in plan.roster
    )
    parts = tuple(
        PartResult(digest=done[part].digest, contributors=done[part].contributors) for part in range(len(plan.owners))
    )
    indices = sorted({index for part in parts for index in list_members(part.contributors, len(members))})
    contributors = tuple(members[index].peer for index in indices)
    return Result(
        round=plan.round,
        previous=plan.previous,
        base_root=plan.base_root,
        codec=codec,
        members=members,
        parts=parts,
        voters=choose_voters(head.voters, contributors, absent, voters_max),
    )


def make_empty_result(head: Head, codec: str, absent: frozenset[PeerId]) -> Result | None:
    """A round that changes nothing but the voters, so that who leaves is not missed; None if nobody would remain."""
    voters = tuple(peer for peer in head.voters if peer not in absent)
    if not voters or voters == head.voters:
        return None
    return make_voters_result(head, codec, voters)


def make_voters_result(head: Head, codec: str, voters: tuple[PeerId, ...]) -> Result:
    """A round without an update that names the next voters."""
    return Result(
        round=head.round + 1,
        previous=head.digest,
        base_root=head.state_root,
        codec=codec,
        members=(),
        parts=(),
        voters=voters,
    )


def make_evidence(plan: Plan, done: Mapping[int, PartDone]) -> Evidence:
    """Why the result of a finished exchange may be proposed."""
    return Evidence(plan=plan, done=tuple(done[part] for part in range(len(plan.owners))), lock=None)


def check_evidence(
    proposal: Proposal, proposer: PeerId, head: Head, codec: str, authority: Authority, weights: str = WORK
) -> None:
    """Raise ProtocolError unless the proposal follows from what others signed: an earlier lock of a quorum, or a plan
    made of READYs and the owners' words. A result without parts needs neither: each voter judges by who it knows.
    `codec` is that of contributions, `weights` the manifest's rule."""
    result, evidence = proposal.result, proposal.evidence
    if evidence is not None and evidence.lock is not None:
        if evidence.lock.attempt >= proposal.attempt:
            raise ProtocolError(Refusal.WRONG_ATTEMPT, "a proposal stands on a lock of a later attempt")
        check_lock(evidence.lock, result, head.voters, authority)
        return
    if not result.parts:
        return
    if evidence is None or evidence.plan is None:
        raise ProtocolError(Refusal.NOT_PLANNED, "a proposal comes without its plan")
    plan = evidence.plan
    if plan.round != result.round or plan.attempt != proposal.attempt:
        raise ProtocolError(Refusal.WRONG_ATTEMPT, "a proposal comes with the plan of another attempt")
    verify_message(proposer, authority.swarm, plan)
    check_plan(plan, head, codec, authority.count_parts(plan.round), authority.swarm, weights)
    if len(evidence.done) != len(plan.owners):
        raise ProtocolError(Refusal.WRONG_LENGTH, f"{len(evidence.done)} words for {len(plan.owners)} parts")
    expected = make_result(plan, dict(enumerate(evidence.done)), head, result.codec, frozenset(), len(result.voters))
    if (result.members, result.parts) != (expected.members, expected.parts):
        raise ProtocolError(Refusal.NOT_PLANNED, "the result does not follow from its plan and the owners' words")
    roster_digest = digest_roster(plan.roster)
    for part, done in enumerate(evidence.done):
        said = done.round, done.attempt, done.roster_digest, done.part
        if said != (plan.round, plan.attempt, roster_digest, part):
            raise ProtocolError(Refusal.WRONG_ATTEMPT, f"the word on part {part} is about something else")
        verify_message(plan.roster[plan.owners[part]].signed.peer, authority.swarm, done)


def follows_voters(result: Result, head: Head, absent: frozenset[PeerId], voters_max: int) -> bool:
    """Whether the next voters are those that this peer would accept: nobody is dropped whom it finds present, and only
    contributors come in."""
    indices = {index for part in result.parts for index in list_members(part.contributors, len(result.members))}
    contributors = tuple(result.members[index].peer for index in sorted(indices))
    dropped = frozenset({*head.voters, *contributors}.difference(result.voters))
    if result.voters != choose_voters(head.voters, contributors, dropped, voters_max):
        return False
    return dropped.intersection(head.voters) <= absent
