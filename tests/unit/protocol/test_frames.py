"""The frame header: what it says, and what it refuses."""

import struct

import pytest

from shoal.protocol.errors import ProtocolError, Refusal
from shoal.protocol.frames import (
    BLOB_BYTES_MAX,
    HEADER_BYTES,
    PART_BYTES_MAX,
    PAYLOAD_BYTES_MAX,
    ROUND_MAX,
    FrameHeader,
    FrameKind,
    decode_header_untrusted,
    encode_header,
)

DIGEST = bytes(range(32))
CONTRIBUTION = FrameHeader(
    kind=FrameKind.CONTRIBUTION, round=2**40 + 1, attempt=3, part=70_000, nbytes=1_000_000, digest=DIGEST
)


def refusal_of(raw: bytes) -> Refusal:
    with pytest.raises(ProtocolError) as caught:
        decode_header_untrusted(raw)
    return caught.value.refusal


def with_bytes(raw: bytes, at: int, new: bytes) -> bytes:
    return raw[:at] + new + raw[at + len(new) :]


def test_wire_form_is_fixed() -> None:
    raw = encode_header(CONTRIBUTION)
    assert len(raw) == HEADER_BYTES
    assert raw.hex() == ("534846520101000000000000030000007011010040420f000100000000010000" + DIGEST.hex())


def test_refusal_code_is_the_place_in_the_enum() -> None:
    raw = encode_header(FrameHeader(kind=FrameKind.REFUSED, refusal=Refusal.WRONG_SWARM))
    assert struct.unpack_from("<H", raw, 6)[0] == 1 + list(Refusal).index(Refusal.WRONG_SWARM)
    assert decode_header_untrusted(raw).refusal is Refusal.WRONG_SWARM


def test_only_three_kinds_carry_a_payload() -> None:
    with_payload = {kind for kind, limit in PAYLOAD_BYTES_MAX.items() if limit}
    assert with_payload == {FrameKind.CONTRIBUTION, FrameKind.RESULT, FrameKind.BLOB}
    assert set(PAYLOAD_BYTES_MAX) == set(FrameKind)


def test_fetch_announces_the_blob_and_carries_nothing() -> None:
    fetch = FrameHeader(kind=FrameKind.FETCH, nbytes=BLOB_BYTES_MAX, digest=DIGEST, request=9)
    assert decode_header_untrusted(encode_header(fetch)) == fetch
    assert fetch.payload_bytes == 0
    assert CONTRIBUTION.payload_bytes == 1_000_000


@pytest.mark.parametrize(
    ("at", "new", "refusal"),
    [
        (0, b"HTTP", Refusal.MALFORMED),
        (4, b"\x02", Refusal.WRONG_VERSION),
        (5, b"\x00", Refusal.UNKNOWN_TYPE),
        (5, b"\x63", Refusal.UNKNOWN_TYPE),
        (6, b"\xff\xff", Refusal.MALFORMED),
        (6, b"\x01\x00", Refusal.MALFORMED),
        (8, b"\x01", Refusal.MALFORMED),
        (20, struct.pack("<I", PART_BYTES_MAX + 1), Refusal.OVERSIZED),
        (20, struct.pack("<I", 0), Refusal.WRONG_LENGTH),
        (24, struct.pack("<Q", ROUND_MAX + 1), Refusal.OUT_OF_RANGE),
    ],
)
def test_broken_field_is_refused_by_name(at: int, new: bytes, refusal: Refusal) -> None:
    assert refusal_of(with_bytes(encode_header(CONTRIBUTION), at, new)) is refusal


@pytest.mark.parametrize("length", [0, HEADER_BYTES - 1, HEADER_BYTES + 1])
def test_other_length_is_refused(length: int) -> None:
    assert refusal_of(encode_header(CONTRIBUTION).ljust(length, b"\x00")[:length]) is Refusal.WRONG_LENGTH


@pytest.mark.parametrize(
    "kind", [kind for kind in FrameKind if not PAYLOAD_BYTES_MAX[kind] and kind != FrameKind.FETCH]
)
def test_kind_without_payload_may_not_announce_bytes(kind: FrameKind) -> None:
    refusal = Refusal.LIMIT if kind is FrameKind.REFUSED else None
    request = 0 if kind in (FrameKind.ABANDON, FrameKind.GOODBYE) else 2
    raw = encode_header(FrameHeader(kind=kind, refusal=refusal, request=request))
    assert refusal_of(with_bytes(raw, 20, b"\x01")) is Refusal.OVERSIZED


def test_programmer_error_is_an_assertion() -> None:
    with pytest.raises(AssertionError, match="FETCH"):
        encode_header(FrameHeader(kind=FrameKind.FETCH, nbytes=1, digest=DIGEST))
