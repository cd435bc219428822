"""What the round core asks of its shell, and what it tells: values, in the order in which they must be carried out.

Contract of the shell: carry effects out in order; a `Persist` (and the durability of the blobs that it names) is
complete before any later effect of the same core starts. Everything else may run on its own.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated

from shoal.protocol.errors import Failure
from shoal.protocol.identity import PeerId
from shoal.protocol.messages import ROUND_MESSAGES, Certificate, LockCertificate, Result, RosterEntry
from shoal.protocol.wire import U32, U63, Bound, Bytes32

LEFT_RECORDS_MAX = 4  # of logs that were left; more than one is the work of somebody who re-roots again and again


class Phase(StrEnum):
    """Where a peer stands in a round; the text is what `shoal status` and the metrics show."""

    PREPARE = "prepare"  # leads a later attempt and collects promises
    GATHER = "gather"  # peers train and become ready
    EXCHANGE = "exchange"  # a plan stands, parts move
    COMMIT = "commit"  # a result is proposed, votes are collected
    FETCH = "fetch"  # the round is certified, bytes of its update are missing here
    APPLY = "apply"  # the outer step runs


@dataclass(frozen=True, slots=True, kw_only=True)
class Pledge:
    """The log that this peer goes over to: its result in round `first`, and what it weighed up to round `end`."""

    first: U63
    digest: Bytes32
    end: U63
    tokens: U63


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftRecord:
    """What a voter promised, led and voted for in the round after `base`, on a log that it has left."""

    round: U63
    base: Bytes32
    promised: U32
    led: U32
    accepted_attempt: U32
    accepted: Result | None
    lock: LockCertificate | None
    locked_attempt: U32
    locked_digest: Bytes32


@dataclass(frozen=True, slots=True, kw_only=True)
class VoteRecord:
    """A voter's durable memory of the round after `base`: Paxos acceptor state, and `led`, one past the last attempt in
    which this peer planned or proposed, so that a restart never makes it do so a second time in the same attempt."""

    round: U63
    base: Bytes32 = bytes(32)
    promised: U32 = 0
    led: U32 = 0
    accepted_attempt: U32 = 0
    accepted: Result | None = None
    # Where members may lie: accepted is what this peer is locked on; then the last attempt whose lock it signed.
    lock: LockCertificate | None = None
    locked_attempt: U32 = 0
    locked_digest: Bytes32 = bytes(32)
    # Of logs that parted: where this peer is going, and what it must not forget where it was.
    pledge: Pledge | None = None
    left: Annotated[tuple[LeftRecord, ...], Bound(0, LEFT_RECORDS_MAX)] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Send:
    peer: PeerId
    message: ROUND_MESSAGES


@dataclass(frozen=True, slots=True, kw_only=True)
class Persist:
    """Make the vote record durable, after the blobs with these digests."""

    vote: VoteRecord
    digests: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SendPart:
    """Send part `part` of the own contribution to its owner."""

    peer: PeerId
    round: int
    part: int
    digest: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Reduce:
    """Decode, aggregate and encode one part from these contributors, in this order; then call `part_reduced`."""

    round: int
    attempt: int
    part: int
    indices: tuple[int, ...]
    members: tuple[RosterEntry, ...]
    digests: tuple[bytes, ...]
    norms: tuple[float, ...]  # of the whole roster: norm clipping looks at all of them


@dataclass(frozen=True, slots=True, kw_only=True)
class SendResult:
    peer: PeerId
    round: int
    part: int
    digest: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchBlob:
    """Get these bytes from whichever candidate has them; then call `blob_held`."""

    round: int
    part: int
    digest: bytes
    candidates: tuple[PeerId, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """Make the certificate durable, run the outer step, then call `applied`. Every byte of the update is held."""

    certificate: Certificate


@dataclass(frozen=True, slots=True, kw_only=True)
class Behind:
    """`peer` knows a later round: ask it for certificates from the round after the head on."""

    peer: PeerId
    round: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Forked:
    """`peer` follows a log that parts from ours, at our head or before: compare, and go over to the heavier one."""

    peer: PeerId


@dataclass(frozen=True, slots=True, kw_only=True)
class EndTraining:
    """Half of the other voters are ready: a trainer that did not begin together with them hands over what it has."""

    round: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseEntered:
    round: int
    attempt: int
    phase: Phase
    proposer: PeerId


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """This peer, as proposer, has planned an attempt."""

    round: int
    attempt: int
    roster: tuple[PeerId, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptFailed:
    round: int
    attempt: int
    reason: Failure
    peer: PeerId | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PartReassigned:
    round: int
    part: int
    old_owner: PeerId
    new_owner: PeerId
    reason: Failure


@dataclass(frozen=True, slots=True, kw_only=True)
class SenderMissing:
    """An owner goes on without this member's part."""

    round: int
    part: int
    peer: PeerId
    reason: Failure


@dataclass(frozen=True, slots=True, kw_only=True)
class QuorumSeen:
    """Enough voters came into sight, or no longer are. Without them nothing can be certified, and no clock runs."""

    round: int
    in_sight: bool
    live: int
    needed: int


Note = PhaseEntered | Planned | AttemptFailed | PartReassigned | SenderMissing | QuorumSeen
Effect = Send | Persist | SendPart | Reduce | SendResult | FetchBlob | Commit | Behind | Forked | EndTraining | Note
