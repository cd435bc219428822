"""Two levels a block, and the largest values of a chunk: what is chosen, where it stands, what is refused."""

import struct

import numpy as np
import pytest

from shoal.protocol.codecs import CODECS, SPARSE_CHUNK_ELEMENTS, Float32s
from shoal.protocol.errors import ProtocolError, Refusal
from tests.unit.protocol.test_codecs import decode, int8_part, lattice, level_part, vector


def stat2_block(*values: float) -> Float32s:
    """Sixteen values, zeros behind those given."""
    return vector(*values, *[0.0] * (16 - len(values)))


@pytest.mark.parametrize(
    ("values", "decoded"),
    [
        # The mean is 1: from 0.75 on, and from 2.5 on, magnitudes are of the two levels.
        (stat2_block(1, -1, 1, -1, 1, -1, 1, -1, 1, 1, 6), stat2_block(1, -1, 1, -1, 1, -1, 1, -1, 1, 1, 6)),
        # The large level is negative where there is more on that side.
        (stat2_block(1, 1, 1, 1, 1, 1, 3, -3, -4), stat2_block(1, 1, 1, 1, 1, 1, 1, -3.5, -3.5)),
        # The mean is 1.5; of two levels that are equally near the larger one is taken.
        (stat2_block(*[2] * 11, 1, -1, -0.999), stat2_block(*[2] * 11, 2, -2)),
        # Nothing between: the other side's large values have the small level, no more than the large one.
        (stat2_block(8, -8), stat2_block(8, -8)),
        (stat2_block(9, 9, -16), stat2_block(9, 9, -9)),
        (stat2_block(2.0**-122, -(2.0**-130)), stat2_block()),
    ],
)
def test_stat2_takes_the_nearest_of_the_blocks_means(values: Float32s, decoded: Float32s) -> None:
    assert decode(CODECS["stat2"], CODECS["stat2"].encode(values), 16).tolist() == decoded.tolist()


def test_stat2_puts_four_values_into_a_byte() -> None:
    """Five values in two bytes: the first, third and fifth in one of them."""
    raw = CODECS["stat2"].encode(vector(1.0, -1.0, 0.0, 1.0, -1.0))
    assert bytes(raw) == level_part(0x3F80, 0, 1 + 0 * 4 + 2 * 16, 2 + 1 * 4)


@pytest.mark.parametrize("name", ["topk8", "topk2"])
def test_the_largest_of_a_chunk_are_kept_and_of_equal_ones_the_first(name: str) -> None:
    values = np.full(SPARSE_CHUNK_ELEMENTS + 130, 0.5, np.float32)
    values[1000:1050] = 1.0
    values[-1:] = -1.5
    kept = decode(CODECS[name], CODECS[name].encode(values), values.size).nonzero()[0]
    # 14 of the smaller ones beside 50, and 2 beside 1, which are one of 64 each, rounded up.
    assert kept.tolist() == [*range(14), *range(1000, 1050), 4096, 4097, 4225]


@pytest.mark.parametrize("name", ["topk8", "topk2"])
@pytest.mark.parametrize(("elements", "kept"), [(1, 1), (64, 1), (65, 2), (4095, 64), (4096, 64), (4097, 65)])
def test_one_of_sixty_four_is_kept(name: str, elements: int, kept: int) -> None:
    values = lattice(elements, elements)
    decoded = decode(CODECS[name], CODECS[name].encode(values), elements)
    assert np.count_nonzero(decoded) == kept
    for start in range(0, elements, SPARSE_CHUNK_ELEMENTS):
        sizes, is_kept = np.abs(values[start : start + 4096]), decoded[start : start + 4096] != 0
        assert is_kept.all() or sizes[~is_kept].max() <= sizes[is_kept].min()


@pytest.mark.parametrize("name", ["topk8", "topk2"])
def test_a_chunk_of_zeros_has_one_form(name: str) -> None:
    values = np.zeros(4096, np.float32)
    raw = bytes(CODECS[name].encode(values))
    values[::3] = -0.0
    assert bytes(CODECS[name].encode(values)) == raw
    assert not decode(CODECS[name], raw, 4096).any()
    assert raw[-96:] == pack_places(*range(64))
    assert not any(raw[:-96])


def test_a_sparse_part_is_values_then_places() -> None:
    values = np.zeros(4096 + 64, np.float32)
    values[[62, 4095, 4096 + 63]] = [-1.0, 127.0, 3.0]
    raw = bytes(CODECS["topk8"].encode(values))
    assert raw[:8] == struct.pack("<2f", 1.0, np.float32(3.0) / np.float32(127))
    codes, places = struct.unpack("65b", raw[8:73]), raw[73:]
    assert codes == (*[0] * 62, -1, 127, 127)
    assert places == pack_places(*range(63), 4095) + pack_places(63)


def pack_places(*places: int) -> bytes:
    """12 bits each, little-endian, filled up to a byte."""
    total = sum(place << 12 * index for index, place in enumerate(places))
    return total.to_bytes(-(-12 * len(places) // 8), "little")


def sparse_part(*places: int) -> bytes:
    """Of 130 values, three of which are chosen."""
    return int8_part(1.0, 1, 2, 3) + pack_places(*places)


@pytest.mark.parametrize(
    "raw",
    [
        sparse_part(1, 0, 2),
        sparse_part(0, 2, 2),
        sparse_part(5, 5, 9),
        sparse_part(0, 1, 130),
        sparse_part(0, 1, 4095),
        sparse_part(0, 1, 2)[:-1] + b"\x10",  # behind the last place
        int8_part(1.0, 1, -128, 3) + pack_places(0, 1, 2),
        int8_part(2.0**58, 1, 2, 3) + pack_places(0, 1, 2),
    ],
)
def test_places_that_no_encoder_writes_are_refused(raw: bytes) -> None:
    good = decode(CODECS["topk8"], sparse_part(0, 128, 129), 130)
    assert good.nonzero()[0].tolist() == [0, 128, 129] and good[[0, 128, 129]].tolist() == [1, 2, 3]
    out = np.full(130, 7.0, np.float32)
    with pytest.raises(ProtocolError) as caught:
        CODECS["topk8"].decode_untrusted(raw, 130, out)
    assert caught.value.refusal is Refusal.OUT_OF_RANGE
    assert np.all(out == 7.0)


def test_places_are_checked_in_every_chunk() -> None:
    """Also where one would do in a whole chunk, and not in the last one, which is shorter."""
    elements = 2 * SPARSE_CHUNK_ELEMENTS + 60
    raw = bytes(CODECS["topk2"].encode(lattice(5, elements)))
    last = len(raw) - 2
    for at, packed in ((last - 192, b"\xff\xff\xff"), (last - 96, b"\xff\xff\xff"), (last, pack_places(60))):
        with pytest.raises(ProtocolError, match="place"):
            CODECS["topk2"].check_untrusted(raw[:at] + packed + raw[at + len(packed) :], elements)
