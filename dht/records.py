"""A peer's signed addresses: who vouches for them, until when.

Invariants: no record is used past its expiry or for longer than a day; of two records of one peer the one issued later
wins; an address in a record can be dialled and belongs to the peer that signed; decoding raises only ProtocolError.
"""

from dataclasses import dataclass
from typing import Annotated

from shoal.dht.addresses import Addresses, parse_address_untrusted
from shoal.protocol.errors import ProtocolError, Refusal
from shoal.protocol.identity import Identity, PeerId, verify_signature
from shoal.protocol.wire import U63, Bound, Bytes32, Bytes64, decode_record_untrusted, encode_record

RECORD_BYTES_MAX = 8 * 1024
LIFETIME_S_MAX = 24 * 3600
CLOCK_SKEW_S = 300

_DOMAIN = "address-record"


@dataclass(frozen=True, slots=True, kw_only=True)
class AddressRecord:
    """Where `peer` can be dialled. `control` and `tensor` are multiaddrs of the two planes; times are Unix seconds."""

    peer: Annotated[PeerId, Bound(32, 32)]
    control: Addresses
    tensor: Addresses
    issued_s: U63
    expires_s: U63


@dataclass(frozen=True, slots=True, kw_only=True)
class _SignedRecord:
    record: AddressRecord
    signature: Bytes64
    swarm: Bytes32


def encode_signed_record(identity: Identity, swarm: bytes, record: AddressRecord) -> bytes:
    """The record as it travels: at most RECORD_BYTES_MAX bytes."""
    assert record.peer == identity.peer, "a peer vouches for its own addresses only"
    assert record.issued_s < record.expires_s <= record.issued_s + LIFETIME_S_MAX, "a record lives for a day at most"
    signature = identity.sign(_DOMAIN, swarm, encode_record(record))
    return encode_record(_SignedRecord(record=record, signature=signature, swarm=swarm))


def decode_address_record_untrusted(raw: bytes | memoryview, swarm: bytes, now_s: float) -> AddressRecord:
    """The valid record in `raw`; raises ProtocolError for a forged, expired, postdated or malformed one."""
    signed = decode_record_untrusted(_SignedRecord, raw, RECORD_BYTES_MAX)
    if signed.swarm != swarm:
        raise ProtocolError(Refusal.WRONG_SWARM, f"addresses for swarm {signed.swarm.hex()[:16]}")
    record = signed.record
    if not record.issued_s < record.expires_s <= record.issued_s + LIFETIME_S_MAX:
        raise ProtocolError(Refusal.OUT_OF_RANGE, "an address record lives for a day at most")
    if record.issued_s > now_s + CLOCK_SKEW_S:
        raise ProtocolError(Refusal.OUT_OF_RANGE, "an address record from the future")
    if record.expires_s <= now_s:
        raise ProtocolError(Refusal.EXPIRED, f"addresses expired {now_s - record.expires_s:.0f} s ago")
    for text in (*record.control, *record.tensor):
        parse_address_untrusted(text, record.peer)
    verify_signature(record.peer, _DOMAIN, swarm, encode_record(record), signed.signature)
    return record
