"""Who decides a round: voters, quorum, the order of proposers, and what makes a certificate valid.

The voters of round r+1 stand in the result of round r, so every peer that holds the log agrees on them; round 1 is
voted by the manifest's founders. Within a round the attempts are the ballots of single-decree Paxos (Lamport, "Paxos
Made Simple", 2001): attempt a belongs to one proposer, any two quorums of one voter set meet, and a voter votes at most
once an attempt.

Invariant: everything here is a pure function of certified values, never of a peer's own view.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from blake3 import blake3

from shoal.protocol.attendance import Counted
from shoal.protocol.errors import ProtocolError, Refusal
from shoal.protocol.identity import PeerId, short_peer_id
from shoal.protocol.messages import (
    VOTERS_MAX,
    Certificate,
    Lock,
    LockCertificate,
    Plan,
    Result,
    Vote,
    digest_record,
    verify_message,
)

VerifyVote = Callable[[PeerId, bytes, Vote], None]

# No ballot reaches it: the attempt of a certificate by which voters that are gone for good are replaced.
REROOT_ATTEMPT = 2**32 - 1


class QuorumRule(StrEnum):
    """MAJORITY where members may only crash; TWO_THIRDS where they may lie."""

    MAJORITY = "majority"
    TWO_THIRDS = "two_thirds"


@dataclass(frozen=True, slots=True, kw_only=True)
class Authority:
    """By whose word a round of one swarm is decided. `may_declare`: after the manifest's timer the peers that are left
    may name new voters without the owner."""

    swarm: bytes
    rule: QuorumRule
    owner: PeerId
    parts: int
    may_declare: bool
    fragments: int = 1

    def count_parts(self, round_number: int) -> int:
        """How many parts the plan and the result of a round have."""
        return len(list_parts(self.parts, self.fragments, round_number))


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """The newest certified round that a peer has applied. Round 0 is the manifest itself."""

    round: int
    digest: bytes
    state_root: bytes
    voters: tuple[PeerId, ...]


def list_parts(parts: int, fragments: int, round_number: int) -> range:
    """Those of the vector's parts that a round exchanges: every so manieth one, the next round those beside them."""
    return range((round_number - 1) % fragments, parts, fragments)


def quorum_size(voters: int, rule: QuorumRule) -> int:
    """How many votes certify: more than half, or more than two thirds, of all voters, dead ones included."""
    return voters // 2 + 1 if rule is QuorumRule.MAJORITY else voters * 2 // 3 + 1


def proposer_order(head_digest: bytes, voters: tuple[PeerId, ...]) -> tuple[PeerId, ...]:
    """Rendezvous order of the proposers of the round after `head_digest`."""
    return tuple(sorted(voters, key=lambda peer: blake3(head_digest + peer).digest()))


def list_contributors(result: Result) -> tuple[PeerId, ...]:
    """The members of a result that some of its parts count, in the order of its roster."""
    return tuple(
        member.peer
        for index, member in enumerate(result.members)
        if any(has_member(part.contributors, index) for part in result.parts)
    )


def list_counted(result: Result) -> dict[PeerId, Counted]:
    """The members of a result that some of its parts count, each with what it had declared."""
    contributors, number = frozenset(list_contributors(result)), result.round
    return {
        member.peer: Counted(round=number, attendance=member.attendance)
        for member in result.members
        if member.peer in contributors
    }


def find_share(result: Result, peer: PeerId) -> float:
    """How much of a round's mean this peer's contribution is, 0 to 1; who is in some of its parts counts as in all."""
    contributors = list_contributors(result)
    weights = {member.peer: member.weight for member in result.members if member.peer in contributors}
    return weights[peer] / math.fsum(weights.values()) if weights.get(peer) else 0.0


def choose_evaluator(head_digest: bytes, contributors: tuple[PeerId, ...]) -> PeerId:
    """Who of a round's contributors measures the base that came of it: each of them knows that by itself."""
    return min(contributors, key=lambda peer: blake3(b"evaluator" + head_digest + peer).digest())


def find_evaluator(result: Result, evaluate_every: int) -> PeerId | None:
    """Who measures the base that came of this round; None where nobody does."""
    contributors = list_contributors(result)
    if not evaluate_every or result.round % evaluate_every or not contributors:
        return None
    return choose_evaluator(digest_record(result), contributors)


def owner_order(head_digest: bytes, part: int, owners: tuple[PeerId, ...]) -> tuple[PeerId, ...]:
    """Rendezvous order in which peers take over one part."""
    seed = head_digest + part.to_bytes(4, "big")
    return tuple(sorted(owners, key=lambda peer: blake3(seed + peer).digest()))


def choose_voters(
    current: tuple[PeerId, ...],
    contributors: tuple[PeerId, ...],
    absent: frozenset[PeerId],
    voters_max: int = VOTERS_MAX,
) -> tuple[PeerId, ...]:
    """The next voters: those who stay, longest-serving first, then this round's contributors. A swarm with more peers
    than `voters_max` votes through this committee."""
    kept = dict.fromkeys(peer for peer in (*current, *contributors) if peer not in absent)
    return tuple(kept)[:voters_max] or current


def has_member(bitmap: bytes, index: int) -> bool:
    """Whether roster member `index` is in a contributor bitmap (bit 0 of byte 0 first)."""
    return index // 8 < len(bitmap) and bool(bitmap[index // 8] >> (index % 8) & 1)


def make_bitmap(indices: frozenset[int], count: int) -> bytes:
    """The contributor bitmap of `count` roster members."""
    raw = bytearray((count + 7) // 8)
    for index in indices:
        raw[index // 8] |= 1 << (index % 8)
    return bytes(raw)


def list_members(bitmap: bytes, count: int) -> tuple[int, ...]:
    """The roster indices in a bitmap, ascending: the order in which a part is aggregated."""
    return tuple(index for index in range(count) if has_member(bitmap, index))


def check_bitmap(bitmap: bytes, count: int) -> None:
    """Raise ProtocolError unless the bitmap names at least one and only existing roster members."""
    if len(bitmap) != (count + 7) // 8 or not any(bitmap) or (count % 8 and bitmap[-1] >> (count % 8)):
        raise ProtocolError(Refusal.OUT_OF_RANGE, f"contributor bitmap does not fit a roster of {count}")


def check_base(value: Plan | Result, head: Head) -> None:
    """Raise ProtocolError unless the value builds on `head`, on this log and on this state."""
    if value.previous != head.digest or value.base_root != head.state_root:
        problem = f"{type(value).__name__.lower()} of round {value.round} builds on another state than ours"
        raise ProtocolError(Refusal.OTHER_LOG, problem)


def check_result(result: Result, head: Head, parts: int, *, is_reroot: bool = False) -> None:
    """Raise ProtocolError unless `result` can follow `head`. A re-root may name any voters."""
    if result.round != head.round + 1:
        raise ProtocolError(Refusal.WRONG_ROUND, f"result of round {result.round}, we are after {head.round}")
    check_base(result, head)
    if len(result.parts) not in (0, parts) or bool(result.parts) != bool(result.members):
        raise ProtocolError(Refusal.WRONG_LENGTH, f"{len(result.parts)} parts, expected {parts} or none")
    if not result.parts and not is_reroot and result.voters == head.voters:
        raise ProtocolError(Refusal.NOT_PLANNED, f"round {result.round} changes nothing")
    for part in result.parts:
        check_bitmap(part.contributors, len(result.members))
    allowed = {*head.voters, *(member.peer for member in result.members)}
    is_allowed = is_reroot or allowed.issuperset(result.voters)
    if len(set(result.voters)) != len(result.voters) or not is_allowed:
        raise ProtocolError(Refusal.NOT_A_MEMBER, "next voters are neither voters nor members of the round")


def check_certificate(
    certificate: Certificate, head: Head, authority: Authority, verify: VerifyVote | None = None
) -> bytes:
    """The digest of the certified result; raises ProtocolError unless it follows `head` and its voters decided it."""
    parts = authority.count_parts(certificate.result.round)
    check_result(certificate.result, head, parts, is_reroot=is_reroot(certificate))
    check_votes(certificate, head.voters, authority, verify)
    return digest_record(certificate.result)


def check_votes(
    certificate: Certificate, voters: tuple[PeerId, ...], authority: Authority, verify: VerifyVote | None = None
) -> None:
    """Raise ProtocolError unless distinct voters, a quorum of them, signed this result in one attempt. `verify` may
    remember signatures that it has found good."""
    signers = _list_signers(certificate.votes, certificate.result, certificate.attempt)
    if is_reroot(certificate):
        _check_reroot(certificate.result, signers, voters, authority)
    else:
        _check_quorum(signers, voters, authority.rule)
    check_signature = verify or verify_message
    for vote in certificate.votes:
        check_signature(vote.voter, authority.swarm, vote)


def is_reroot(certificate: Certificate) -> bool:
    """Whether the certificate names new voters without the word of a quorum of the old ones."""
    return certificate.attempt == REROOT_ATTEMPT


def _list_signers(signed: tuple[Vote, ...] | tuple[Lock, ...], result: Result, attempt: int) -> set[PeerId]:
    """Who signed; raises ProtocolError unless everybody did so once, and for this result in this attempt."""
    digest = digest_record(result)
    signers: set[PeerId] = set()
    for one in signed:
        if one.voter in signers:
            problem = f"two {type(one).__name__.lower()}s of {short_peer_id(one.voter)}"
            raise ProtocolError(Refusal.DUPLICATE, problem)
        if (one.round, one.attempt, one.result_digest) != (result.round, attempt, digest):
            problem = f"the {type(one).__name__.lower()} of {short_peer_id(one.voter)} is for something else"
            raise ProtocolError(Refusal.WRONG_ATTEMPT, problem)
        signers.add(one.voter)
    return signers


def _check_quorum(signers: set[PeerId], voters: tuple[PeerId, ...], rule: QuorumRule) -> None:
    for peer in sorted(signers.difference(voters)):
        raise ProtocolError(Refusal.NOT_A_MEMBER, f"{short_peer_id(peer)} is no voter of this round")
    if len(signers) < quorum_size(len(voters), rule):
        raise ProtocolError(Refusal.NO_QUORUM, f"{len(signers)} votes of {len(voters)}")


def _check_reroot(result: Result, signers: set[PeerId], voters: tuple[PeerId, ...], authority: Authority) -> None:
    if result.parts:
        raise ProtocolError(Refusal.NOT_PLANNED, "a re-root changes the voters and nothing else")
    if signers == {authority.owner}:
        return
    if not authority.may_declare:
        raise ProtocolError(Refusal.NOT_A_MEMBER, "only the owner of this swarm may sign a re-root")
    if signers != set(result.voters) or signers.isdisjoint(voters):
        raise ProtocolError(Refusal.NO_QUORUM, "a declared re-root needs all of its voters, and one of the old ones")


def check_lock(certificate: LockCertificate, result: Result, voters: tuple[PeerId, ...], authority: Authority) -> None:
    """Raise ProtocolError unless a quorum of the voters locked this result in one attempt."""
    signers = _list_signers(certificate.locks, result, certificate.attempt)
    _check_quorum(signers, voters, authority.rule)
    for lock in certificate.locks:
        verify_message(lock.voter, authority.swarm, lock)
