"""Certified rounds for tests of the ledger: real signatures, no model behind them."""

from collections.abc import Mapping, Sequence

from shoal.protocol.identity import Identity, PeerId
from shoal.protocol.messages import Certificate, Member, PartResult, Result, Vote, digest_record, sign_message
from shoal.protocol.quorum import REROOT_ATTEMPT, Authority, QuorumRule, make_bitmap


def make_authority(swarm: bytes, owner: PeerId, rule: QuorumRule = QuorumRule.MAJORITY, parts: int = 1) -> Authority:
    """Who decides in a swarm of this owner."""
    return Authority(swarm=swarm, rule=rule, owner=owner, parts=parts, may_declare=True)


def make_result(
    number: int,
    previous: bytes,
    voters: Sequence[PeerId],
    tokens: Mapping[PeerId, int],
    *,
    included: frozenset[int] | None = None,
    nonce: int = 0,
    parts: int = 1,
) -> Result:
    """Parts that hold the work of the members `included`, by default of all. Without tokens: no part."""
    members = tuple(
        Member(peer=peer, contribution_root=bytes(32), tokens=count, steps=1, weight=1.0)
        for peer, count in tokens.items()
    )
    everybody = frozenset(range(len(members)))
    bitmap = make_bitmap(everybody if included is None else included, len(members)) if members else b""
    part = PartResult(digest=nonce.to_bytes(32, "big"), contributors=bitmap)
    return Result(
        round=number,
        previous=previous,
        base_root=bytes(32),
        codec="int8",
        members=members,
        parts=(part,) * parts if members else (),
        voters=tuple(voters),
    )


def certify(swarm: bytes, result: Result, signers: Sequence[Identity], attempt: int = 0) -> Certificate:
    """The certificate with the votes of these."""
    digest = digest_record(result)
    votes = (Vote(voter=one.peer, round=result.round, attempt=attempt, result_digest=digest) for one in signers)
    signed = tuple(sign_message(one, swarm, vote) for one, vote in zip(signers, votes, strict=True))
    return Certificate(result=result, attempt=attempt, votes=signed)


def make_log(
    swarm: bytes,
    voters: Sequence[Identity],
    rounds: int,
    *,
    previous: bytes | None = None,
    first: int = 1,
    tokens: int = 10,
    parts: int = 1,
) -> list[Certificate]:
    """Consecutive rounds in which everybody votes and contributes."""
    log: list[Certificate] = []
    previous = swarm if previous is None else previous
    peers = [one.peer for one in voters]
    for number in range(first, first + rounds):
        result = make_result(number, previous, peers, dict.fromkeys(peers, tokens), parts=parts)
        log.append(certify(swarm, result, voters))
        previous = digest_record(result)
    return log


def reroot(swarm: bytes, number: int, previous: bytes, voters: Sequence[Identity], signer: Identity) -> Certificate:
    """The owner names new voters."""
    result = make_result(number, previous, [one.peer for one in voters], {})
    return certify(swarm, result, [signer], REROOT_ATTEMPT)
