"""Every control message, one frozen dataclass each, with its bounds; the envelope that carries them.

Ids here are 32-byte BLAKE3 digests or Ed25519 keys. A `Result` is the value that a round decides; its digest names the
round's update everywhere (two certificates of one round may differ in their votes, never in their result).

Invariant: whatever decodes is within its bounds; what it means is checked by the core that receives it.
"""

from dataclasses import dataclass, replace
from typing import Annotated, TypeVar

from blake3 import blake3

from shoal.protocol.admission import AdmissionProof, GetDecrees
from shoal.protocol.attendance import NO_ATTENDANCE, Attendance
from shoal.protocol.errors import ProtocolError, Refusal
from shoal.protocol.identity import PROTOCOL_VERSION, Identity, PeerId, verify_signature
from shoal.protocol.pairing import AskPair, PairAnswer
from shoal.protocol.wire import (
    DELTA_BYTES_MAX,
    MESSAGE_BYTES_MAX,
    U16,
    U32,
    U63,
    Bound,
    Bytes32,
    Bytes64,
    Elided,
    Schema,
    Text,
    decode_record_untrusted,
    encode_record,
)

ROSTER_MAX = 64
VOTERS_MAX = 31
PARTS_MAX = 1024
ADDRESSES_MAX = 8
SNAPSHOTS_TOLD_MAX = 4
CERTIFICATES_PER_ANSWER = 16
PEERS_PER_ANSWER = 64
UPLOAD_BYTES_MAX = 4 << 20
CHECKPOINTS_PER_ANSWER = 16
BASE_PIECE_BYTES_MAX = 128 * 1024

Peer = Annotated[PeerId, Bound(32, 32)]
Bitmap = Annotated[bytes, Bound(1, ROSTER_MAX // 8)]
Reason = Annotated[str, Bound(1, 64)]
_NO_SIGNATURE = bytes(64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """A peer's frozen contribution to a round. `norm` is the L2 norm of the produced pseudo-gradient."""

    round: U63
    base_root: Bytes32
    contribution_root: Bytes32
    tokens: U63
    steps: Annotated[int, Bound(1, 2**40)]
    norm: Annotated[float, Bound(0, 2**80)]
    owns: bool  # whether others can dial this peer's tensor port, and so whether it may own parts
    attendance: Annotated[Attendance, Elided()] = NO_ATTENDANCE


@dataclass(frozen=True, slots=True, kw_only=True)
class SignedReady:
    peer: Peer
    ready: Ready
    signature: Bytes64


@dataclass(frozen=True, slots=True, kw_only=True)
class Presence:
    """A peer's signed soft state: the newest (incarnation, sequence) wins. It doubles as the heartbeat."""

    peer: Peer
    incarnation: U63
    sequence: U63
    sent_at_s: float  # the sender's wall clock: for the clock check only
    agent: Text
    trains: bool
    leaving: bool
    head_round: U63
    head_digest: Bytes32
    state_root: Bytes32
    attempt: U32  # of the round after the head
    phase: Reason
    tensor_addresses: Annotated[tuple[Text, ...], Bound(0, ADDRESSES_MAX)]
    control_addresses: Annotated[tuple[Text, ...], Bound(0, ADDRESSES_MAX)]
    tokens_per_s: float
    ready: SignedReady | None
    # What others can fetch here: every update from this round on to the head (0: not known yet), and these snapshots.
    updates_from: U63 = 0
    snapshots: Annotated[tuple[U63, ...], Bound(0, SNAPSHOTS_TOLD_MAX)] = ()
    admission: AdmissionProof | None = None  # where the swarm is not open: why this peer may take part
    signature: Bytes64 = _NO_SIGNATURE


@dataclass(frozen=True, slots=True, kw_only=True)
class RosterEntry:
    signed: SignedReady
    weight: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The proposer's plan of one attempt. `owners[part]` is an index into the roster. A later `revision` of the same
    attempt changes owners only."""

    round: U63
    attempt: U32
    revision: U16
    previous: Bytes32
    base_root: Bytes32
    codec: Reason
    roster: Annotated[tuple[RosterEntry, ...], Bound(1, ROSTER_MAX)]
    owners: Annotated[tuple[U16, ...], Bound(1, PARTS_MAX)]
    signature: Bytes64 = _NO_SIGNATURE


@dataclass(frozen=True, slots=True, kw_only=True)
class Contribution:
    """The part digests behind a contribution root, sent to an owner before any part."""

    round: U63
    digests: Annotated[tuple[Bytes32, ...], Bound(1, PARTS_MAX)]


@dataclass(frozen=True, slots=True, kw_only=True)
class PartDone:
    """An owner's signed word: this part was reduced from these members of this roster."""

    round: U63
    attempt: U32
    roster_digest: Bytes32  # of the roster that the bitmap means: a lying proposer may have made two plans
    part: U16
    digest: Bytes32
    contributors: Bitmap
    signature: Bytes64 = _NO_SIGNATURE


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """Who took part, and with which contribution, as the certificate tells it; credit is derived from this."""

    peer: Peer
    contribution_root: Bytes32
    tokens: U63
    steps: U63
    weight: float
    attendance: Annotated[Attendance, Elided()] = NO_ATTENDANCE


@dataclass(frozen=True, slots=True, kw_only=True)
class PartResult:
    digest: Bytes32
    contributors: Bitmap


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """The value of a round. No parts: the round changes the voters and nothing else."""

    round: U63
    previous: Bytes32
    base_root: Bytes32
    codec: Reason
    members: Annotated[tuple[Member, ...], Bound(0, ROSTER_MAX)]
    parts: Annotated[tuple[PartResult, ...], Bound(0, PARTS_MAX)]
    voters: Annotated[tuple[Peer, ...], Bound(1, VOTERS_MAX)]  # who votes in the next round


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepare:
    round: U63
    attempt: U32


@dataclass(frozen=True, slots=True, kw_only=True)
class Lock:
    """Where members may lie: a voter holds every byte of the result and agrees to vote for it if a quorum does."""

    voter: Peer
    round: U63
    attempt: U32
    result_digest: Bytes32
    signature: Bytes64 = _NO_SIGNATURE


@dataclass(frozen=True, slots=True, kw_only=True)
class LockCertificate:
    """A quorum of locks of one attempt for one result: no other result can have a quorum in that attempt."""

    attempt: U32
    locks: Annotated[tuple[Lock, ...], Bound(1, VOTERS_MAX)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Promise:
    """A voter's word to take part in no lower attempt, with what it has voted for, if anything. Where members may lie
    the claim is worth nothing without the lock certificate behind it."""

    round: U63
    attempt: U32
    accepted_attempt: U32
    accepted: Result | None
    lock: LockCertificate | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Nack:
    """A voter has promised a higher attempt."""

    round: U63
    attempt: U32
    promised: U32


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """Why a result may be proposed, where members may lie: the plan and every owner's word, or an earlier lock."""

    plan: Plan | None
    done: Annotated[tuple[PartDone, ...], Bound(0, PARTS_MAX)]
    lock: LockCertificate | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    attempt: U32
    result: Result
    evidence: Evidence | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Locked:
    """The proposer's proof that a quorum is locked on its proposal: now vote."""

    round: U63
    certificate: LockCertificate


@dataclass(frozen=True, slots=True, kw_only=True)
class Vote:
    """A voter holds every byte of the result and has persisted this vote."""

    voter: Peer
    round: U63
    attempt: U32
    result_digest: Bytes32
    signature: Bytes64 = _NO_SIGNATURE


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """A quorum of votes of one attempt for one result."""

    result: Result
    attempt: U32
    votes: Annotated[tuple[Vote, ...], Bound(1, VOTERS_MAX)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A certified round that can be checked without those before it (protocol.trail): with the result before it, which
    names its voters. Round 1 has none before it."""

    before: Result | None
    certificate: Certificate


@dataclass(frozen=True, slots=True, kw_only=True)
class Certified:
    certificate: Certificate


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """Tells a peer why it is left out."""

    refusal: Reason
    detail: Text


@dataclass(frozen=True, slots=True, kw_only=True)
class GetManifest:
    """Answered by Manifest bytes: the asker knows their hash, the swarm id."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ManifestAnswer:
    signed_manifest: Annotated[bytes, Bound(1, DELTA_BYTES_MAX)]


@dataclass(frozen=True, slots=True, kw_only=True)
class GetCertificates:
    first_round: U63
    count: Annotated[int, Bound(1, CERTIFICATES_PER_ANSWER)]


@dataclass(frozen=True, slots=True, kw_only=True)
class CertificatesAnswer:
    certificates: Annotated[tuple[Certificate, ...], Bound(0, CERTIFICATES_PER_ANSWER)]


@dataclass(frozen=True, slots=True, kw_only=True)
class GetSnapshot:
    """Asks for the index of the newest snapshot that the certificates up to `round_max` vouch for."""

    round_max: U63


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotAnswer:
    """`index` is an encoded SnapshotIndex, or empty where there is none."""

    index: Annotated[bytes, Bound(0, DELTA_BYTES_MAX)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reconcile:
    """One step of ledger anti-entropy; the bytes are the ledger's own message."""

    payload: Annotated[bytes, Bound(0, DELTA_BYTES_MAX)]


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerEntries:
    """Encoded entry batches, pushed or as the answer to a reconciliation step (then with its own next message)."""

    payload: Annotated[bytes, Bound(0, DELTA_BYTES_MAX)]
    batches: Annotated[tuple[Annotated[bytes, Bound(1, DELTA_BYTES_MAX)], ...], Bound(0, 256)]


@dataclass(frozen=True, slots=True, kw_only=True)
class GetPeers:
    """Peer exchange: asks for the newest presences that the other one knows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PeersAnswer:
    presences: Annotated[tuple[Presence, ...], Bound(0, PEERS_PER_ANSWER)]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeAddresses:
    """Asks the other one to dial each of these addresses of this peer's tensor port."""

    addresses: Annotated[tuple[Text, ...], Bound(1, ADDRESSES_MAX)]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeAnswer:
    """Whether each address led to the asker, in the order of the question; None where nothing can be said."""

    reached: Annotated[tuple[bool | None, ...], Bound(0, ADDRESSES_MAX)]


@dataclass(frozen=True, slots=True, kw_only=True)
class GetObserved:
    """Asks by which address the other one sees the tensor link with this channel binding, which this peer dialled."""

    binding: Bytes32


@dataclass(frozen=True, slots=True, kw_only=True)
class ObservedAnswer:
    """Empty when there is no such link."""

    address: Text


@dataclass(frozen=True, slots=True, kw_only=True)
class PunchOffer:
    """Asks the other one to dial this peer at the moment at which this peer dials it, so that the routers of both let
    the two through. `varies` is true where this peer's router gives it another address towards everybody."""

    token: Bytes32
    addresses: Annotated[tuple[Text, ...], Bound(1, ADDRESSES_MAX)]
    varies: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class PunchAnswer:
    """The other side's addresses, and its clock (any, as long as it runs evenly)."""

    addresses: Annotated[tuple[Text, ...], Bound(1, ADDRESSES_MAX)]
    varies: bool
    clock_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class GetPunchClock:
    """Asks for the clock once more: the shorter the way there and back, the better it is known."""

    token: Bytes32


@dataclass(frozen=True, slots=True, kw_only=True)
class PunchSync:
    """Both dial when the other one's clock shows `at_s`; the sender of the offer is the dialer of the handshake."""

    token: Bytes32
    at_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PunchClock:
    """The answer to GetPunchClock and, as an agreement, to PunchSync."""

    clock_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AskRelay:
    """Asks the other one to pass on the bytes of a tensor link between this peer and `peer`."""

    peer: Peer


@dataclass(frozen=True, slots=True, kw_only=True)
class RelayCall:
    """Asks the other one to come for a link with `peer`, which this peer will pass on."""

    peer: Peer
    token: Bytes32


@dataclass(frozen=True, slots=True, kw_only=True)
class RelayTicket:
    """What to name to the relaying peer's tensor port; as the answer to RelayCall an agreement."""

    token: Bytes32


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasureUpload:
    """Asks the other one to fetch these bytes over the asker's tensor link, and to say how long that took."""

    digest: Bytes32
    nbytes: Annotated[int, Bound(1, UPLOAD_BYTES_MAX)]


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadAnswer:
    seconds: Annotated[float, Bound(0, 3600)]


@dataclass(frozen=True, slots=True, kw_only=True)
class GetCheckpoints:
    """Asks for the trail over the rounds that are not kept any more, from behind this round on."""

    after_round: U63


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointsAnswer:
    checkpoints: Annotated[tuple[Checkpoint, ...], Bound(0, CHECKPOINTS_PER_ANSWER)]


@dataclass(frozen=True, slots=True, kw_only=True)
class GetLedgerBase:
    """Asks for the sum of the certified rounds that the other one's ledger stands on, from this byte on."""

    offset: U32


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerBaseAnswer:
    """Round 0: there is none yet. `digest` is BLAKE3 of the whole of it, of which `piece` begins at the offset."""

    round: U63
    digest: Bytes32
    nbytes: U32
    piece: Annotated[bytes, Bound(0, BASE_PIECE_BYTES_MAX)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Envelope:
    """What a control frame carries. The version and the swarm are readable before the body is."""

    version: U16
    swarm: Bytes32
    body: Annotated[bytes, Bound(1, DELTA_BYTES_MAX)]


ROUND_MESSAGES = Prepare | Promise | Nack | Plan | Contribution | PartDone | Proposal | Lock | Locked | Vote | Certified

SCHEMA = Schema(
    {
        1: Presence,
        2: Refused,
        10: Prepare,
        11: Promise,
        12: Nack,
        13: Plan,
        14: Contribution,
        15: PartDone,
        16: Proposal,
        17: Vote,
        18: Certified,
        19: Lock,
        20: Locked,
        30: GetManifest,
        31: ManifestAnswer,
        32: GetCertificates,
        33: CertificatesAnswer,
        34: GetSnapshot,
        35: SnapshotAnswer,
        36: Reconcile,
        37: LedgerEntries,
        38: GetPeers,
        39: PeersAnswer,
        42: ProbeAddresses,  # 40 and 41 asked for the reachability of one address; they are not used again
        43: ProbeAnswer,
        44: GetObserved,
        45: ObservedAnswer,
        46: PunchOffer,
        47: PunchAnswer,
        48: GetPunchClock,
        49: PunchSync,
        50: PunchClock,
        51: AskRelay,
        52: RelayCall,
        53: RelayTicket,
        54: GetCheckpoints,
        55: CheckpointsAnswer,
        56: GetLedgerBase,
        57: LedgerBaseAnswer,
        58: GetDecrees,
        60: MeasureUpload,
        61: UploadAnswer,
        62: AskPair,
        63: PairAnswer,
    }
)
# What may be larger than MESSAGE_BYTES_MAX: answers that carry state. Everything else is refused past it.
_LARGE = (
    ManifestAnswer, CertificatesAnswer, SnapshotAnswer, LedgerEntries, PeersAnswer, Certified, Promise, Proposal,
    CheckpointsAnswer, LedgerBaseAnswer,
)  # fmt: skip

S = TypeVar("S", Presence, Plan, PartDone, Lock, Vote)
_DOMAINS: dict[type, str] = {Presence: "presence", Plan: "plan", PartDone: "part-done", Lock: "lock", Vote: "vote"}


def encode_message(swarm: bytes, message: object) -> bytes:
    """The bytes of one control frame."""
    return encode_record(Envelope(version=PROTOCOL_VERSION, swarm=swarm, body=SCHEMA.encode(message)))


def decode_message_untrusted(swarm: bytes, raw: bytes | memoryview) -> object:
    """The message in a control frame of this swarm; raises ProtocolError and nothing else."""
    envelope = decode_record_untrusted(Envelope, raw, DELTA_BYTES_MAX + 256)
    if envelope.version != PROTOCOL_VERSION:
        raise ProtocolError(Refusal.WRONG_VERSION, f"it speaks version {envelope.version}, we speak {PROTOCOL_VERSION}")
    if envelope.swarm != swarm:
        raise ProtocolError(Refusal.WRONG_SWARM, f"peer is in swarm {envelope.swarm.hex()[:16]}")
    message: object = SCHEMA.decode_untrusted(envelope.body, DELTA_BYTES_MAX)
    if len(envelope.body) > MESSAGE_BYTES_MAX and not isinstance(message, _LARGE):
        raise ProtocolError(Refusal.OVERSIZED, f"{type(message).__name__} of {len(envelope.body)} bytes")
    return message


def digest_record(value: object) -> bytes:
    """BLAKE3 of the canonical bytes: how results, readies and the manifest are named."""
    return blake3(encode_record(value)).digest()


def digest_roster(roster: tuple[RosterEntry, ...]) -> bytes:
    """BLAKE3 of the roster entries: the same for every revision of a plan."""
    return blake3(b"".join(digest_record(entry) for entry in roster)).digest()


def contribution_root(digests: tuple[bytes, ...]) -> bytes:
    """The root of a contribution's part digests."""
    return blake3(b"".join(digests)).digest()


def sign_message(identity: Identity, swarm: bytes, message: S) -> S:
    """The message with the identity's signature in its `signature` field."""
    payload = encode_record(replace(message, signature=_NO_SIGNATURE))
    return replace(message, signature=identity.sign(_DOMAINS[type(message)], swarm, payload))


def verify_message(peer: PeerId, swarm: bytes, message: S) -> None:
    """Raise ProtocolError(BAD_SIGNATURE) unless `peer` signed this message."""
    payload = encode_record(replace(message, signature=_NO_SIGNATURE))
    verify_signature(peer, _DOMAINS[type(message)], swarm, payload, message.signature)


def sign_ready(identity: Identity, swarm: bytes, ready: Ready) -> SignedReady:
    """A READY that third parties can check, so that a proposer cannot invent one."""
    return SignedReady(peer=identity.peer, ready=ready, signature=identity.sign("ready", swarm, encode_record(ready)))


def verify_ready(swarm: bytes, signed: SignedReady) -> None:
    """Raise ProtocolError(BAD_SIGNATURE) unless the named peer signed this READY."""
    verify_signature(signed.peer, "ready", swarm, encode_record(signed.ready), signed.signature)
