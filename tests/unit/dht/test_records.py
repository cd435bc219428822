"""Signed address records."""

from dataclasses import replace

import pytest

from shoal.dht.records import (
    CLOCK_SKEW_S,
    LIFETIME_S_MAX,
    RECORD_BYTES_MAX,
    AddressRecord,
    decode_address_record_untrusted,
    encode_signed_record,
)
from shoal.protocol.errors import ProtocolError, Refusal
from shoal.protocol.identity import Identity, format_peer_id

SWARM = bytes(range(32))
IDENTITY = Identity(b"i" * 32)
OTHER = Identity(b"o" * 32)
NOW_S = 1_750_000_000
RECORD = AddressRecord(
    peer=IDENTITY.peer,
    control=("/ip4/203.0.113.5/tcp/4001",),
    tensor=("/ip4/203.0.113.5/tcp/4002", "/ip6/2001:db8::1/tcp/4002"),
    issued_s=NOW_S,
    expires_s=NOW_S + 3600,
)


def refusal_of(raw: bytes, swarm: bytes = SWARM, now_s: float = NOW_S) -> Refusal:
    with pytest.raises(ProtocolError) as caught:
        decode_address_record_untrusted(raw, swarm, now_s)
    return caught.value.refusal


def test_a_signed_record_comes_back() -> None:
    raw = encode_signed_record(IDENTITY, SWARM, RECORD)
    assert len(raw) <= RECORD_BYTES_MAX
    assert decode_address_record_untrusted(raw, SWARM, NOW_S) == RECORD


def test_a_record_with_the_most_and_longest_addresses_fits() -> None:
    longest = tuple(f"/dns4/{'a' * 60}.{number}{'b' * 59}.example/tcp/65535" for number in range(8))
    full = replace(RECORD, control=longest, tensor=longest)
    raw = encode_signed_record(IDENTITY, SWARM, full)
    assert decode_address_record_untrusted(raw, SWARM, NOW_S) == full


def test_it_counts_until_it_expires() -> None:
    raw = encode_signed_record(IDENTITY, SWARM, RECORD)
    assert decode_address_record_untrusted(raw, SWARM, RECORD.expires_s - 0.5) == RECORD
    assert refusal_of(raw, now_s=RECORD.expires_s) is Refusal.EXPIRED


def test_it_may_come_from_a_clock_that_is_a_little_ahead() -> None:
    raw = encode_signed_record(IDENTITY, SWARM, RECORD)
    assert decode_address_record_untrusted(raw, SWARM, NOW_S - CLOCK_SKEW_S) == RECORD
    assert refusal_of(raw, now_s=NOW_S - CLOCK_SKEW_S - 1) is Refusal.OUT_OF_RANGE


def test_it_counts_in_its_swarm_only() -> None:
    assert refusal_of(encode_signed_record(IDENTITY, SWARM, RECORD), swarm=bytes(32)) is Refusal.WRONG_SWARM


def test_no_byte_of_it_can_be_changed() -> None:
    raw = bytearray(encode_signed_record(IDENTITY, SWARM, RECORD))
    for index in range(0, len(raw), 7):
        forged = bytes(raw[:index]) + bytes([raw[index] ^ 1]) + bytes(raw[index + 1 :])
        with pytest.raises(ProtocolError):
            decode_address_record_untrusted(forged, SWARM, NOW_S)


@pytest.mark.parametrize(
    ("changed", "refusal"),
    [
        ({"expires_s": NOW_S + LIFETIME_S_MAX + 1}, Refusal.OUT_OF_RANGE),
        ({"expires_s": NOW_S}, Refusal.OUT_OF_RANGE),
        ({"control": ("nonsense",)}, Refusal.MALFORMED),
        ({"tensor": ("/ip4/0.0.0.0/tcp/1",)}, Refusal.OUT_OF_RANGE),
        ({"control": (f"/ip4/1.2.3.4/tcp/1/p2p/{format_peer_id(OTHER.peer)}",)}, Refusal.WRONG_PEER),
    ],
)
def test_a_peer_cannot_sign_what_no_peer_may_say(
    monkeypatch: pytest.MonkeyPatch, changed: dict[str, object], refusal: Refusal
) -> None:
    # What an honest build asserts, another build may not.
    monkeypatch.setattr("shoal.dht.records.LIFETIME_S_MAX", 10**9)
    record = replace(RECORD, **changed)  # type: ignore[arg-type]
    if record.expires_s > record.issued_s:
        raw = encode_signed_record(IDENTITY, SWARM, record)
        monkeypatch.undo()
        assert refusal_of(raw) is refusal
    else:
        with pytest.raises(AssertionError):
            encode_signed_record(IDENTITY, SWARM, record)


def test_nobody_signs_for_another_peer() -> None:
    with pytest.raises(AssertionError):
        encode_signed_record(OTHER, SWARM, RECORD)


def test_oversized_bytes_are_refused_unread() -> None:
    assert refusal_of(bytes(RECORD_BYTES_MAX + 1)) is Refusal.OVERSIZED
