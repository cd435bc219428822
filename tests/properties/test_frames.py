"""Frame headers: one value, one encoding; nothing but ProtocolError."""

import contextlib

from hypothesis import given
from hypothesis import strategies as st

from shoal.protocol.errors import ProtocolError, Refusal
from shoal.protocol.frames import (
    BLOB_BYTES_MAX,
    HEADER_BYTES,
    PAYLOAD_BYTES_MAX,
    ROUND_MAX,
    FrameHeader,
    FrameKind,
    decode_header_untrusted,
    encode_header,
)

PUSHED = (FrameKind.CONTRIBUTION, FrameKind.RESULT)
U32 = st.integers(0, 2**32 - 1)


@st.composite
def headers(draw: st.DrawFn) -> FrameHeader:
    kind = draw(st.sampled_from(FrameKind))
    announces = BLOB_BYTES_MAX if kind is FrameKind.FETCH else PAYLOAD_BYTES_MAX[kind]
    requests = U32 if kind is FrameKind.REFUSED else st.integers(1, 2**32 - 1)
    unasked = (*PUSHED, FrameKind.ABANDON, FrameKind.GOODBYE)
    refusals = {FrameKind.REFUSED: st.sampled_from(Refusal), FrameKind.GOODBYE: st.none() | st.sampled_from(Refusal)}
    return FrameHeader(
        kind=kind,
        round=draw(st.integers(0, ROUND_MAX)),
        attempt=draw(U32),
        part=draw(U32),
        nbytes=draw(st.integers(1, announces)) if announces else 0,
        digest=draw(st.binary(min_size=32, max_size=32)),
        request=0 if kind in unasked else draw(requests),
        refusal=draw(refusals.get(kind, st.none())),
    )


@given(headers())
def test_round_trip(header: FrameHeader) -> None:
    raw = encode_header(header)
    assert len(raw) == HEADER_BYTES
    assert decode_header_untrusted(raw) == header
    assert decode_header_untrusted(memoryview(raw)) == header


@given(st.binary(max_size=80) | st.binary(min_size=HEADER_BYTES, max_size=HEADER_BYTES))
def test_random_bytes_raise_only_protocol_error(raw: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        assert encode_header(decode_header_untrusted(raw)) == raw


@given(headers(), st.integers(0, HEADER_BYTES - 1), st.integers(1, 255))
def test_altered_header_is_refused_or_means_something_else(header: FrameHeader, at: int, change: int) -> None:
    raw = bytearray(encode_header(header))
    raw[at] ^= change
    try:
        altered = decode_header_untrusted(bytes(raw))
    except ProtocolError:
        return
    assert altered != header
    assert encode_header(altered) == raw
    assert altered.payload_bytes <= PAYLOAD_BYTES_MAX[altered.kind]
