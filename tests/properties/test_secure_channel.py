"""The secure channel against arbitrary bytes: ProtocolError, or nothing."""

import contextlib

from hypothesis import given
from hypothesis import strategies as st

from shoal.protocol.errors import ProtocolError
from shoal.protocol.identity import Identity
from shoal.protocol.secure_channel import (
    RECORD_OVERHEAD_BYTES,
    ChannelKeys,
    Handshake,
    RecordOpener,
    RecordSealer,
    decode_prefix_untrusted,
)

SWARM = bytes(32)
ALICE, BOB = (ChannelKeys(Identity(seed * 32), seed * 32) for seed in (b"a", b"b"))


def dial() -> Handshake:
    return Handshake(ALICE, SWARM, dialer=True, expected=BOB.peer)


def accept() -> Handshake:
    return Handshake(BOB, SWARM, dialer=False)


@given(st.lists(st.binary(max_size=300), max_size=4), st.booleans(), st.booleans())
def test_garbage_raises_only_protocol_error(chunks: list[bytes], after_hello: bool, as_dialer: bool) -> None:
    side, other = (dial(), accept()) if as_dialer else (accept(), dial())
    if after_hello:
        other_hello = other.take_outgoing() if not as_dialer else b""
        with contextlib.suppress(ProtocolError):
            side.receive(other_hello[:14])
    with contextlib.suppress(ProtocolError):
        for chunk in chunks:
            assert side.receive(chunk) is None


@given(st.integers(0, 400), st.integers(1, 255), st.integers(0, 2))
def test_any_altered_byte_ends_the_handshake_without_a_channel(at: int, change: int, message: int) -> None:
    dialer, acceptor = dial(), accept()
    try:
        for number, (sender, receiver) in enumerate([(dialer, acceptor), (acceptor, dialer), (dialer, acceptor)]):
            data = bytearray(sender.take_outgoing())
            if number == message:
                data[at % len(data)] ^= change
            channel = receiver.receive(bytes(data))
        assert channel is None
    except ProtocolError:
        pass


@given(st.binary(min_size=4, max_size=4))
def test_prefix_raises_only_protocol_error(prefix: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        kind, nbytes = decode_prefix_untrusted(prefix)
        assert (kind << 24 | nbytes).to_bytes(4, "little") == prefix


@given(st.lists(st.tuples(st.integers(0, 255), st.binary(max_size=2000)), max_size=6), st.integers(1, 3))
def test_records_come_out_as_they_went_in(records: list[tuple[int, bytes]], rekey_records: int) -> None:
    sealer, opener = (
        RecordSealer(bytes(32), rekey_records=rekey_records),
        RecordOpener(bytes(32), rekey_records=rekey_records),
    )
    for kind, plain in records:
        record = bytearray(len(plain) + RECORD_OVERHEAD_BYTES)
        sealer.seal_into(kind, plain, memoryview(record))
        assert decode_prefix_untrusted(bytes(record[:4])) == (kind, len(plain))
        out = bytearray(len(plain))
        opener.open_into(memoryview(record), memoryview(out))
        assert out == plain


@given(st.binary(min_size=RECORD_OVERHEAD_BYTES, max_size=300))
def test_forged_record_is_refused(record: bytes) -> None:
    out = bytearray(len(record) - RECORD_OVERHEAD_BYTES)
    try:
        RecordOpener(bytes(32)).open_into(memoryview(record), memoryview(out))
    except ProtocolError:
        return
    raise AssertionError("a forged record was opened")
