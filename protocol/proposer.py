"""What the proposer of one attempt keeps, and the pure steps that it takes.

Invariants: a proposer that took over proposes again whatever a quorum's promises say may already be certified, and
plans anew only when they say that nothing can be (single-decree Paxos, phase 2a); weights are a pure function of the
members' signed READYs, so that every member can check the plan.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from shoal.protocol.aggregators import planned_weights
from shoal.protocol.errors import ProtocolError, Refusal
from shoal.protocol.identity import PeerId, short_peer_id
from shoal.protocol.messages import (
    ROSTER_MAX,
    Member,
    PartDone,
    PartResult,
    Plan,
    Promise,
    Result,
    RosterEntry,
    SignedReady,
    Vote,
    verify_ready,
)
from shoal.protocol.quorum import Head, choose_voters, list_members, owner_order


@dataclass(slots=True)
class Lead:
    """The proposer's bookkeeping of one attempt; gone when the attempt ends."""

    attempt: int
    promises: dict[PeerId, Promise] = field(default_factory=dict)
    grace_ends_s: float | None = None
    done: dict[int, PartDone] = field(default_factory=dict)
    tried: dict[int, list[PeerId]] = field(default_factory=dict)
    heard_s: dict[PeerId, float] = field(default_factory=dict)
    votes: dict[PeerId, Vote] = field(default_factory=dict)


def choose_accepted(promises: Mapping[PeerId, Promise]) -> Result | None:
    """What may already be certified: the result that was voted for in the highest attempt, if any was."""
    accepted = [promise for promise in promises.values() if promise.accepted is not None]
    return max(accepted, key=lambda promise: promise.accepted_attempt).accepted if accepted else None


def list_weights(roster: tuple[SignedReady, ...]) -> tuple[float, ...]:
    """Every member's weight in the aggregate, from tokens and steps (float32 values)."""
    tokens = np.array([signed.ready.tokens for signed in roster], dtype=np.int64)
    steps = np.array([signed.ready.steps for signed in roster], dtype=np.int64)
    return tuple(float(weight) for weight in planned_weights(tokens, steps))


def make_plan(head: Head, attempt: int, codec: str, ready: Mapping[PeerId, SignedReady], parts: int) -> Plan | None:
    """The first plan of an attempt, unsigned; None while nobody ready can own a part."""
    chosen = sorted(ready)[:ROSTER_MAX]
    roster = tuple(ready[peer] for peer in chosen)
    owners = tuple(peer for peer in chosen if ready[peer].ready.owns)
    if not owners:
        return None
    order = owner_order(head.digest, 0, owners)
    entries = tuple(
        RosterEntry(signed=signed, weight=weight) for signed, weight in zip(roster, list_weights(roster), strict=True)
    )
    return Plan(
        round=head.round + 1,
        attempt=attempt,
        revision=0,
        previous=head.digest,
        base_root=head.state_root,
        codec=codec,
        roster=entries,
        owners=tuple(chosen.index(order[part % len(order)]) for part in range(parts)),
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


def check_plan(plan: Plan, head: Head, codec: str, parts: int, swarm: bytes) -> None:
    """Raise ProtocolError unless a member can follow this plan."""
    if plan.previous != head.digest or plan.base_root != head.state_root:
        raise ProtocolError(Refusal.WRONG_BASE, f"plan of round {plan.round} builds on another state than ours")
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
        verify_ready(swarm, entry.signed)
    for owner in plan.owners:
        if owner >= len(peers) or not plan.roster[owner].signed.ready.owns:
            raise ProtocolError(Refusal.OUT_OF_RANGE, f"plan gives a part to roster index {owner}, which owns nothing")
    if tuple(entry.weight for entry in plan.roster) != list_weights(tuple(entry.signed for entry in plan.roster)):
        raise ProtocolError(Refusal.OUT_OF_RANGE, "the plan's weights do not follow from its READYs")


def make_result(plan: Plan, done: Mapping[int, PartDone], head: Head, absent: frozenset[PeerId]) -> Result:
    """The value that the attempt proposes, once every part is done."""
    members = tuple(
        Member(
            peer=entry.signed.peer,
            tokens=entry.signed.ready.tokens,
            steps=entry.signed.ready.steps,
            weight=entry.weight,
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
        codec=plan.codec,
        members=members,
        parts=parts,
        voters=choose_voters(head.voters, contributors, absent),
    )


def make_empty_result(head: Head, codec: str, absent: frozenset[PeerId]) -> Result | None:
    """A round that changes nothing but the voters, so that who leaves is not missed; None if nobody would remain."""
    voters = tuple(peer for peer in head.voters if peer not in absent)
    if not voters or voters == head.voters:
        return None
    return Result(
        round=head.round + 1,
        previous=head.digest,
        base_root=head.state_root,
        codec=codec,
        members=(),
        parts=(),
        voters=voters,
    )
