"""The kinds of ledger entry: what a body of each looks like, how long it may be, who may write it.

Whether a body is well formed depends on the bytes and on the swarm's constants alone, never on local state or time, so
that every replica refuses the same entries (Kleppmann, "Making CRDTs Byzantine fault tolerant", PaPoC 2022).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, NewType

from shoal.crdt.eras import ERA_MAX, FIRST_ERA
from shoal.protocol.errors import ProtocolError, Refusal
from shoal.protocol.identity import PEER_ID_BYTES, PeerId
from shoal.protocol.wire import U63, Bound, decode_record_untrusted, encode_record

EntryId = NewType("EntryId", bytes)

ENTRY_ID_BYTES = 32
BODY_BYTES_MAX = 48 * 1024
# The largest certificate that the protocol knows, 64 members, 1024 parts and 31 votes, takes some 59 KiB.
CERTIFICATE_BYTES_MAX = 64 * 1024
BAN_REASON_BYTES_MAX = 256
TAG_NAME_BYTES_MAX = 64
TAG_VALUE_BYTES_MAX = 512
TAG_REMOVALS_MAX = 24
ADMISSIONS_MAX = 24  # peers of one decree


class Kind(StrEnum):
    """What an entry says; the value is its wire form."""

    LEASE = "lease"
    ADDRESSES = "addresses"
    CERTIFICATE = "certificate"
    SNAPSHOT = "snapshot"
    TAG = "tag"
    MANIFEST = "manifest"
    REROOT = "reroot"
    BAN = "ban"
    READMISSION = "readmission"
    ADMISSION = "admission"


@dataclass(frozen=True, slots=True, kw_only=True)
class RegisterBody:
    """Of a lease or addresses: replaces what the same author wrote before under this kind. Opaque to the ledger."""

    value: Annotated[bytes, Bound(0, BODY_BYTES_MAX)]


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundBody:
    """Of a certificate or snapshot: something about one round. Opaque to the ledger but for the round."""

    round: U63
    value: Annotated[bytes, Bound(0, CERTIFICATE_BYTES_MAX)]


@dataclass(frozen=True, slots=True, kw_only=True)
class TagBody:
    """Of a tag: adds `name` with `value`, or, where `removes` is not empty, removes those adds by their entry ids."""

    name: Annotated[str, Bound(0, TAG_NAME_BYTES_MAX)]
    value: Annotated[bytes, Bound(0, TAG_VALUE_BYTES_MAX)]
    removes: Annotated[
        tuple[Annotated[EntryId, Bound(ENTRY_ID_BYTES, ENTRY_ID_BYTES)], ...], Bound(0, TAG_REMOVALS_MAX)
    ]

    def __post_init__(self) -> None:
        if bool(self.removes) == bool(self.name) or (self.removes and self.value):
            raise ValueError("a tag body has either a name or removals")


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionedBody:
    """Of a manifest or re-root: replaces every lower version. Opaque to the ledger but for the version."""

    version: U63
    value: Annotated[bytes, Bound(0, BODY_BYTES_MAX)]


@dataclass(frozen=True, slots=True, kw_only=True)
class BanBody:
    """Of a ban: from now on nothing counts of what `peer` writes, or, where `removes` is not empty, the bans with these
    entry ids are lifted; one that was signed meanwhile stands."""

    peer: Annotated[bytes, Bound(0, PEER_ID_BYTES)]
    reason: Annotated[str, Bound(0, BAN_REASON_BYTES_MAX)]
    removes: Annotated[
        tuple[Annotated[EntryId, Bound(ENTRY_ID_BYTES, ENTRY_ID_BYTES)], ...], Bound(0, TAG_REMOVALS_MAX)
    ]

    def __post_init__(self) -> None:
        if len(self.peer) != (0 if self.removes else PEER_ID_BYTES) or (self.removes and self.reason):
            raise ValueError("a ban body has either a peer or removals")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadmissionBody:
    """Of a readmission: of what `author`, who equivocated, has signed in `era`, the chain that ends in `stands`
    counts; what it has contradicted itself in up to that era is forgiven; it goes on in the era after it."""

    author: Annotated[PeerId, Bound(PEER_ID_BYTES, PEER_ID_BYTES)]
    era: Annotated[int, Bound(FIRST_ERA, ERA_MAX - 1)]
    stands: Annotated[EntryId, Bound(ENTRY_ID_BYTES, ENTRY_ID_BYTES)]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionBody:
    """Of an admission: these peers may take part in a swarm that is not open, in ascending order. Only a ban takes it
    back."""

    peers: Annotated[tuple[Annotated[PeerId, Bound(PEER_ID_BYTES, PEER_ID_BYTES)], ...], Bound(1, ADMISSIONS_MAX)]

    def __post_init__(self) -> None:
        if list(self.peers) != sorted(set(self.peers)):
            raise ValueError("the peers of an admission are in ascending order")


# What stands in the owner's chain about peers.
Decree = BanBody | ReadmissionBody | AdmissionBody
Body = RegisterBody | RoundBody | TagBody | VersionedBody | Decree


@dataclass(frozen=True, slots=True, kw_only=True)
class KindRule:
    """What one kind allows. `is_owners`: only the swarm's owner key may write it, in the permanent era."""

    body_bytes_max: int
    decode: Callable[[bytes], Body]
    is_owners: bool = False


def _decode_register(body: bytes) -> RegisterBody:
    return RegisterBody(value=body)


def _decode_round(body: bytes) -> RoundBody:
    return decode_record_untrusted(RoundBody, body)


def _decode_tag(body: bytes) -> TagBody:
    return decode_record_untrusted(TagBody, body)


def _decode_versioned(body: bytes) -> VersionedBody:
    return decode_record_untrusted(VersionedBody, body)


def _decode_ban(body: bytes) -> BanBody:
    return decode_record_untrusted(BanBody, body)


def _decode_readmission(body: bytes) -> ReadmissionBody:
    return decode_record_untrusted(ReadmissionBody, body)


def _decode_admission(body: bytes) -> AdmissionBody:
    return decode_record_untrusted(AdmissionBody, body)


KIND_RULES: Mapping[str, KindRule] = {
    Kind.LEASE: KindRule(body_bytes_max=1024, decode=_decode_register),
    Kind.ADDRESSES: KindRule(body_bytes_max=1024, decode=_decode_register),
    Kind.CERTIFICATE: KindRule(body_bytes_max=CERTIFICATE_BYTES_MAX, decode=_decode_round),
    Kind.SNAPSHOT: KindRule(body_bytes_max=16 * 1024, decode=_decode_round),
    Kind.TAG: KindRule(body_bytes_max=1024, decode=_decode_tag),
    Kind.MANIFEST: KindRule(body_bytes_max=BODY_BYTES_MAX, decode=_decode_versioned, is_owners=True),
    Kind.REROOT: KindRule(body_bytes_max=BODY_BYTES_MAX, decode=_decode_versioned, is_owners=True),
    Kind.BAN: KindRule(body_bytes_max=1024, decode=_decode_ban, is_owners=True),
    Kind.READMISSION: KindRule(body_bytes_max=128, decode=_decode_readmission, is_owners=True),
    Kind.ADMISSION: KindRule(body_bytes_max=1024, decode=_decode_admission, is_owners=True),
}


def decode_body_untrusted(kind: str, body: bytes) -> Body:
    """What an entry of this kind says; raises ProtocolError and nothing else."""
    rule = KIND_RULES.get(kind)
    if rule is None:
        raise ProtocolError(Refusal.UNKNOWN_TYPE, f"entry kind {kind!r}")
    if len(body) > rule.body_bytes_max:
        raise ProtocolError(Refusal.OVERSIZED, f"{kind} of {len(body)} bytes, at most {rule.body_bytes_max}")
    return rule.decode(body)


def encode_body(body: Body) -> bytes:
    """Inverse of `decode_body_untrusted`."""
    return body.value if isinstance(body, RegisterBody) else encode_record(body)
