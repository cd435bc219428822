"""The way from the manifest to the present over a few certified rounds, for whoever was not there.

Certificates of old rounds are not kept for ever. What is kept of them is the *trail*: checkpoints, each of which can be
checked by who knows nothing but the checkpoint before it. A checkpoint is a certificate and the result of the round
before, which its digest names and which names its voters. It is believed

- as the round that follows the one before it, by the rule of every round (protocol.quorum); or
- as a later round, when it is signed by a quorum of the voters that the result before it names, and among them are so
  many voters of the checkpoint before that at least one of them does not lie: more than can be missing from a quorum.

Why a skip is sound: an honest voter votes only for what follows its own head, and its head is certified, by the chain
or, by induction, by a trail. So one honest vote says that the result before is certified; that names the voters, and a
quorum of those has signed. This asks the same of the voters as the chain does: of no voter set so many lie that all of
those that a quorum cannot do without could be liars (docs/design.md has the proof).

A re-root is believed only as the round that follows, because it needs no voter of the round before it. So a trail goes
through every re-root and the round before it.

Invariant: everything here is a pure function of certified values.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from shoal.protocol.errors import ProtocolError, Refusal
from shoal.protocol.identity import PeerId
from shoal.protocol.messages import Certificate, Checkpoint, digest_record
from shoal.protocol.quorum import Authority, QuorumRule, check_votes, is_reroot, quorum_size


@dataclass(frozen=True, slots=True, kw_only=True)
class Anchor:
    """A certified round that is believed, and who votes in the next one. Round 0 is the manifest."""

    round: int
    digest: bytes
    voters: tuple[PeerId, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """What decides whether a certified round is kept as a checkpoint."""

    round: int
    voters: tuple[PeerId, ...]  # of the next round
    signers: frozenset[PeerId]
    is_reroot: bool


def blocking_size(voters: int, rule: QuorumRule) -> int:
    """Of so many voters at least one is in every quorum, and at least one does not lie."""
    return voters - quorum_size(voters, rule) + 1


def anchor_of(certificate: Certificate) -> Anchor:
    """What a believed certificate leads to."""
    result = certificate.result
    return Anchor(round=result.round, digest=digest_record(result), voters=result.voters)


def make_candidate(certificate: Certificate) -> Candidate:
    return Candidate(
        round=certificate.result.round,
        voters=certificate.result.voters,
        signers=frozenset(vote.voter for vote in certificate.votes),
        is_reroot=is_reroot(certificate),
    )


def check_trail(anchor: Anchor, checkpoints: Sequence[Checkpoint], authority: Authority) -> Anchor:
    """Where the checkpoints lead from `anchor`; raises ProtocolError unless each follows from the one before it."""
    for checkpoint in checkpoints:
        anchor = _check_step(anchor, checkpoint, authority)
    return anchor


def _check_step(anchor: Anchor, checkpoint: Checkpoint, authority: Authority) -> Anchor:
    certificate, before = checkpoint.certificate, checkpoint.before
    result = certificate.result
    if result.round == anchor.round + 1:
        if result.previous != anchor.digest:
            raise ProtocolError(Refusal.OTHER_LOG, f"the checkpoint of round {result.round} does not follow")
        check_votes(certificate, anchor.voters, authority)
        return anchor_of(certificate)
    if before is None or result.round <= anchor.round or before.round != result.round - 1:
        raise ProtocolError(Refusal.WRONG_ROUND, f"a checkpoint of round {result.round} after round {anchor.round}")
    if digest_record(before) != result.previous:
        raise ProtocolError(Refusal.WRONG_DIGEST, f"the checkpoint of round {result.round} has another one before it")
    if is_reroot(certificate):
        raise ProtocolError(Refusal.NOT_A_MEMBER, f"nothing leads to the re-root of round {result.round}")
    known = sum(vote.voter in anchor.voters for vote in certificate.votes)
    if known < blocking_size(len(anchor.voters), authority.rule):
        raise ProtocolError(Refusal.NO_QUORUM, f"{known} of {len(anchor.voters)} known voters, in {result.round}")
    check_votes(certificate, before.voters, authority)
    return anchor_of(certificate)


def is_connected(founders: tuple[PeerId, ...], candidates: Sequence[Candidate], rule: QuorumRule) -> bool:
    """Whether each of these certified rounds is led to by the one before it, and the first one by the manifest."""
    anchor = Candidate(round=0, voters=founders, signers=frozenset(), is_reroot=False)
    for candidate in candidates:
        if candidate.round <= anchor.round or not _leads(anchor, candidate, rule):
            return False
        anchor = candidate
    return True


def choose_trail(founders: tuple[PeerId, ...], candidates: Sequence[Candidate], rule: QuorumRule) -> list[int] | None:
    """Indices of the candidates that lead from the manifest to the last one of them, which is among them; None where
    none lead there. Each candidate follows the one before it, either as the next round or by a skip.

    Every step is as long as it can be."""
    anchor, chosen, at = Candidate(round=0, voters=founders, signers=frozenset(), is_reroot=False), list[int](), 0
    while at < len(candidates):
        reachable = range(_find_stop(candidates, at), at - 1, -1)
        found = next((index for index in reachable if _leads(anchor, candidates[index], rule)), None)
        if found is None:
            return None
        chosen.append(found)
        anchor, at = candidates[found], found + 1
    return chosen


def _find_stop(candidates: Sequence[Candidate], first: int) -> int:
    """Up to where a step may lead: a re-root and the round before it are not to be skipped."""
    for index in range(first, len(candidates) - 1):
        if candidates[index].is_reroot or candidates[index + 1].is_reroot:
            return index
    return len(candidates) - 1


def _leads(anchor: Candidate, candidate: Candidate, rule: QuorumRule) -> bool:
    if candidate.round == anchor.round + 1:
        return True  # each follows the round before it
    known = len(candidate.signers.intersection(anchor.voters))
    return not candidate.is_reroot and known >= blocking_size(len(anchor.voters), rule)
