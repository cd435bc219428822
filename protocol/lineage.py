"""Two logs of one swarm: where they part, whether that is lawful, and which one stays.

A log can part in one way only: a re-root (by the owner, or declared when the manifest's timer has run out) names new
voters although the old ones may still be somewhere. When the two sides meet, the log with more certified tokens since
they parted stays; peers of the other one go back to where they parted, keep their local parameters, and contribute
again, anchored at the base that stayed.

Invariants: the choice is the same at every peer that compares the same two logs; two certified results of one round
without a re-root are never taken for a choice: then a quorum has lied.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from shoal.protocol.errors import ProtocolError, Refusal
from shoal.protocol.identity import PeerId
from shoal.protocol.messages import Certificate, digest_record
from shoal.protocol.quorum import Authority, check_votes, is_reroot, list_members


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Weight:
    """How much a stretch of a log weighs; the first difference decides."""

    tokens: int
    rounds: int
    last_digest: bytes


def weigh(certificates: Sequence[Certificate]) -> Weight:
    """The weight of consecutive rounds: the tokens of everybody whose work is in them, then how many rounds."""
    tokens = 0
    for certificate in certificates:
        result = certificate.result
        included = {index for part in result.parts for index in list_members(part.contributors, len(result.members))}
        tokens += sum(result.members[index].tokens for index in included)
    last = digest_record(certificates[-1].result) if certificates else b""
    return Weight(tokens=tokens, rounds=len(certificates), last_digest=last)


def find_parting(mine: Sequence[Certificate], theirs: Sequence[Certificate]) -> int | None:
    """The first round of which both hold another result; None when there is none. Both begin with the same round."""
    for own, other in zip(mine, theirs, strict=False):
        assert own.result.round == other.result.round, "consecutive from the same round on"
        if own.result != other.result:
            return own.result.round
    return None


def is_lawful(own: Certificate, other: Certificate) -> bool:
    """Whether logs may part at these two certificates of one round."""
    return is_reroot(own) or is_reroot(other)


def check_stretch(
    previous: bytes, voters: tuple[PeerId, ...], certificates: Sequence[Certificate], authority: Authority
) -> None:
    """Raise ProtocolError unless each certificate follows the one before it and is signed by the voters named there."""
    for certificate in certificates:
        result = certificate.result
        if result.previous != previous:
            raise ProtocolError(Refusal.OTHER_LOG, f"the certificate of round {result.round} does not follow")
        check_votes(certificate, voters, authority)
        previous, voters = digest_record(result), result.voters
