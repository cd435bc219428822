"""What the benchmarks of the ledger work on: a swarm of 32 peers, its rules and its certified rounds."""

import time
from collections.abc import Callable, Iterable
from typing import Any

from shoal.crdt.ledger import Ledger, LedgerRules
from shoal.protocol.identity import Identity
from shoal.protocol.messages import Certificate, Member, PartResult, Result, digest_record
from shoal.protocol.quorum import Authority, QuorumRule, make_bitmap
from tests.unit.crdt.certificates import certify

SWARM = b"s" * 32
START_MS = 1_700_000_000_000
PEERS, VOTERS, QUORUM, PARTS = 32, 31, 16, 32
ROUNDS_PER_ERA = 256
IDENTITIES = [Identity(f"peer {number}".encode().ljust(32)) for number in range(PEERS)]

Row = dict[str, Any]


def make_rules(*, with_rounds: bool) -> LedgerRules:
    """Of a swarm that trusts its members to crash only; without rounds no certificate is judged."""
    owner = IDENTITIES[0].peer
    authority = Authority(swarm=SWARM, rule=QuorumRule.MAJORITY, owner=owner, parts=PARTS, may_declare=True)
    return LedgerRules(
        swarm=SWARM,
        owner=owner,
        is_valid_snapshot=lambda *_: False,
        authority=authority if with_rounds else None,
        founders=tuple(identity.peer for identity in IDENTITIES[:VOTERS]),
        rounds_per_era=ROUNDS_PER_ERA,
    )


def make_ledger(number: int = 0, *, with_rounds: bool = True) -> Ledger:
    """The empty ledger of one of the peers."""
    return Ledger(identity=IDENTITIES[number], rules=make_rules(with_rounds=with_rounds))


def make_certificate(number: int, previous: bytes) -> Certificate:
    """A round with the votes of a quorum."""
    return certify(SWARM, make_certificate_result(number, previous), IDENTITIES[:QUORUM])


def make_certificate_result(number: int, previous: bytes) -> Result:
    """A round with 32 members, 32 parts and 31 voters."""
    everybody = make_bitmap(frozenset(range(PEERS)), PEERS)
    members = (
        Member(peer=one.peer, contribution_root=bytes(32), tokens=40_960, steps=20, weight=1.0) for one in IDENTITIES
    )
    return Result(
        round=number,
        previous=previous,
        base_root=bytes(32),
        codec="int8",
        members=tuple(members),
        parts=(PartResult(digest=number.to_bytes(32, "big"), contributors=everybody),) * PARTS,
        voters=tuple(one.peer for one in IDENTITIES[:VOTERS]),
    )


def make_log(rounds: int) -> Iterable[Certificate]:
    """Consecutive certified rounds from the first on."""
    previous = SWARM
    for number in range(1, rounds + 1):
        certificate = make_certificate(number, previous)
        previous = digest_record(certificate.result)
        yield certificate


def clock(work: Callable[[], object]) -> float:
    """The processor seconds that `work` takes."""
    begun = time.process_time()
    work()
    return time.process_time() - begun
