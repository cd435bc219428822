"""The state root and the snapshot index."""

import numpy as np
import pytest
from blake3 import blake3

from shoal.protocol.codecs import Float32s
from shoal.protocol.errors import ProtocolError, Refusal
from shoal.protocol.messages import SnapshotAnswer, decode_message_untrusted, encode_message
from shoal.protocol.state import (
    CHUNK_BYTES,
    CHUNKS_MAX,
    DIGEST_BYTES,
    STATE_ELEMENTS_MAX,
    ChunkSpan,
    SnapshotIndex,
    StateVector,
    chunk_digests,
    count_chunks,
    decode_index_untrusted,
    state_root,
)
from shoal.protocol.wire import encode_record

CHUNK_ELEMENTS = CHUNK_BYTES // 4
ELEMENTS = 2 * CHUNK_ELEMENTS + 5
GOLDEN_ROOT = "bcc5668d09b6a75d07dce99ec7b557854ad5150f4f237a7c9dff1f1a8b2ec59c"


def golden_vector(seed: int, elements: int = ELEMENTS) -> Float32s:
    mixed = (np.arange(elements, dtype=np.int64) * 2_654_435_761 + seed * 40_503) % 2**32 - 2**31
    return (mixed >> 8).astype(np.float32) * np.float32(2.0**-25)


def make_index() -> SnapshotIndex:
    digests = chunk_digests(golden_vector(1)) + chunk_digests(golden_vector(2))
    return SnapshotIndex(round=7, elements=ELEMENTS, digests=digests)


def chunk_bytes(number: int) -> bytes:
    raw = golden_vector(1 + number // 3).astype("<f4").tobytes()
    return raw[number % 3 * CHUNK_BYTES : (number % 3 + 1) * CHUNK_BYTES]


def test_root_is_golden() -> None:
    assert make_index().root.hex() == GOLDEN_ROOT


def test_root_is_what_the_specification_says() -> None:
    preimage = b"shoal state root 1" + (7).to_bytes(8, "big") + ELEMENTS.to_bytes(8, "big")
    preimage += b"".join(blake3(chunk_bytes(number)).digest() for number in range(6))
    assert make_index().root == blake3(preimage).digest()


@pytest.mark.parametrize(
    ("elements", "chunks"),
    [(1, 1), (CHUNK_ELEMENTS, 1), (CHUNK_ELEMENTS + 1, 2), (STATE_ELEMENTS_MAX, CHUNKS_MAX // 2)],
)
def test_chunks_cover_the_vector(elements: int, chunks: int) -> None:
    assert count_chunks(elements) == chunks


def test_root_tells_states_apart() -> None:
    params, momentum = golden_vector(1), golden_vector(2)
    roots = {make_index().root}
    for vector, place in ((params, 0), (params, ELEMENTS - 1), (momentum, CHUNK_ELEMENTS), (momentum, ELEMENTS - 1)):
        vector.view(np.uint32)[place] ^= 1
        roots.add(state_root(7, ELEMENTS, chunk_digests(params), chunk_digests(momentum)))
    roots.add(state_root(8, ELEMENTS, chunk_digests(params), chunk_digests(momentum)))
    roots.add(state_root(7, ELEMENTS - 1, chunk_digests(params), chunk_digests(momentum)))
    roots.add(state_root(7, ELEMENTS, chunk_digests(momentum), chunk_digests(params)))
    assert len(roots) == 8


def test_zeros_of_both_signs_are_two_states() -> None:
    """The root is over bits: equal values with other bits are a divergence that a later division would show."""
    assert chunk_digests(np.array([0.0], np.float32)) != chunk_digests(np.array([-0.0], np.float32))


def test_slices_at_chunks_give_the_digests_of_the_whole() -> None:
    vector = golden_vector(3)
    parts = [chunk_digests(vector[start : start + CHUNK_ELEMENTS]) for start in range(0, ELEMENTS, CHUNK_ELEMENTS)]
    assert b"".join(parts) == chunk_digests(vector)


@pytest.mark.parametrize("vector", [np.zeros(4), np.zeros((2, 2), np.float32), np.zeros(8, np.float32)[::2]])
def test_other_arrays_are_a_bug(vector: Float32s) -> None:
    with pytest.raises(AssertionError, match="float32"):
        chunk_digests(vector)


def test_digests_of_another_length_are_a_bug() -> None:
    with pytest.raises(AssertionError, match="digests"):
        state_root(1, CHUNK_ELEMENTS + 1, bytes(32), bytes(32))


def test_chunks_are_numbered_params_first() -> None:
    index = make_index()
    assert index.chunks == 6
    assert index.span(0) == ChunkSpan(vector=StateVector.PARAMS, start=0, stop=CHUNK_BYTES)
    assert index.span(2) == ChunkSpan(vector=StateVector.PARAMS, start=2 * CHUNK_BYTES, stop=2 * CHUNK_BYTES + 20)
    assert index.span(3) == ChunkSpan(vector=StateVector.MOMENTUM, start=0, stop=CHUNK_BYTES)
    assert index.span(5).stop == 4 * ELEMENTS


@pytest.mark.parametrize("number", [-1, 6])
def test_chunk_that_is_not_there_is_a_bug(number: int) -> None:
    with pytest.raises(AssertionError, match="chunk"):
        make_index().span(number)
    with pytest.raises(AssertionError, match="chunk"):
        make_index().digest(number)


@pytest.mark.parametrize("number", range(6))
def test_true_chunk_passes(number: int) -> None:
    index = make_index()
    index.check_chunk_untrusted(number, memoryview(chunk_bytes(number)))
    assert index.digest(number) == blake3(chunk_bytes(number)).digest()


@pytest.mark.parametrize(
    ("number", "raw", "refusal"),
    [
        (0, chunk_bytes(1), Refusal.WRONG_DIGEST),
        (3, chunk_bytes(0), Refusal.WRONG_DIGEST),
        (1, chunk_bytes(1)[:-1], Refusal.WRONG_LENGTH),
        (2, chunk_bytes(2) + b"\0", Refusal.WRONG_LENGTH),
        (2, b"", Refusal.WRONG_LENGTH),
    ],
)
def test_false_chunk_is_refused(number: int, raw: bytes, refusal: Refusal) -> None:
    with pytest.raises(ProtocolError) as caught:
        make_index().check_chunk_untrusted(number, raw)
    assert caught.value.refusal is refusal


def test_index_of_another_state_is_refused() -> None:
    index = make_index()
    index.verify(index.root)
    for other in (
        SnapshotIndex(round=8, elements=ELEMENTS, digests=index.digests),
        SnapshotIndex(round=7, elements=ELEMENTS - 1, digests=index.digests),
        SnapshotIndex(round=7, elements=ELEMENTS, digests=bytes(DIGEST_BYTES) + index.digests[DIGEST_BYTES:]),
    ):
        with pytest.raises(ProtocolError) as caught:
            other.verify(index.root)
        assert caught.value.refusal is Refusal.WRONG_DIGEST


def test_index_survives_the_wire() -> None:
    index = make_index()
    assert decode_index_untrusted(encode_record(index)) == index


def test_largest_index_fits_a_snapshot_answer() -> None:
    digests = bytes(range(256)) * (CHUNKS_MAX * DIGEST_BYTES // 256)
    index = SnapshotIndex(round=2**62, elements=STATE_ELEMENTS_MAX, digests=digests)
    frame = encode_message(bytes(32), SnapshotAnswer(index=encode_record(index)))
    answer = decode_message_untrusted(bytes(32), frame)
    assert isinstance(answer, SnapshotAnswer)
    assert decode_index_untrusted(answer.index) == index


@pytest.mark.parametrize("elements", [3 * CHUNK_ELEMENTS + 1, 1, 0, STATE_ELEMENTS_MAX + 1])
def test_index_with_other_digests_than_its_elements_need_is_refused(elements: int) -> None:
    raw = encode_record(make_index()).replace(encode_record_of(ELEMENTS), encode_record_of(elements))
    with pytest.raises(ProtocolError) as caught:
        decode_index_untrusted(raw)
    assert caught.value.refusal is Refusal.OUT_OF_RANGE


def encode_record_of(number: int) -> bytes:
    """msgpack's shortest form of an unsigned number, as it stands in a record."""
    if number < 128:
        return bytes([number])
    return b"\xce" + number.to_bytes(4, "big")
