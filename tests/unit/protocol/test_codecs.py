"""The codecs: golden bytes, edges, refusals, bounded memory."""

import struct
import tracemalloc

import numpy as np
import pytest
from blake3 import blake3
from numpy.typing import NDArray

from shoal.protocol.codecs import (
    BLOCK_ELEMENTS,
    CHUNK_ELEMENTS,
    CODECS,
    FLOAT16_MAX,
    HEAD_BYTES,
    INT8_SCALE_MAX,
    MAGNITUDE_MAX,
    SCALE_MIN,
    UPDATE_CODECS,
    Codec,
    Float32s,
    encode_with_feedback,
    is_encodable,
    is_finite,
)
from shoal.protocol.errors import ProtocolError, Refusal

FLOAT32_MAX = float(np.finfo(np.float32).max)
SMALLEST = 2.0**-149

GOLDEN_INPUT = "2e3cb7b0345cbd1df67edb58d2aa37d24b5e931a29b18dde3e888d4507a8e9b8"
# Codec: BLAKE3 of the encoded bytes, of the decoded values.
GOLDEN = {
    "fp32": (
        "2e3cb7b0345cbd1df67edb58d2aa37d24b5e931a29b18dde3e888d4507a8e9b8",
        "2e3cb7b0345cbd1df67edb58d2aa37d24b5e931a29b18dde3e888d4507a8e9b8",
    ),
    "fp16": (
        "19339deec62b03f6ef185817469031ef8e63101f25017f067bb5e6886a1a78ea",
        "bde9089fe6304165c293dab8f325a6270de009f09908b3076b4187f9ba554265",
    ),
    "bf16": (
        "e081bb2663e195b6b57549ca0f5517db66f7884a583603a262d7790af09e2a77",
        "e31cc57203dd04abe01ccb87e2b00946f9990139d0eeda461202f6c35dc69752",
    ),
    "int8": (
        "323c685ab051a407de3b115093b73b4f6cc59785cdff7e66634ea52758ffb53e",
        "39f5e60bb75365a5924164a659582f29db5621036ec0070af1918b45b3cc1a91",
    ),
    "int4": (
        "f6f745d09daa4478f052d88f943f312e1bb371fc4fc66ebd06c3d169e484c4d3",
        "5f09856e45824e844a02ee450f5f27734fb30be30e98a9a2912f076d132f7bd9",
    ),
    "e3m0": (
        "48d3c9c5c4c6b228a9172fd803a17feaed1f1920e2c41c80348a5112735645b9",
        "09018208c693d3b9abc3afa0c56d29cb82d972cedd6547845601336be250e31e",
    ),
    "ternary": (
        "2d39862a1fbab9ab7809ad3822b437a5ae2204b18674ae0d03e43afd2e65b404",
        "d50c556e63e31f85091ae4f8e56ab46e8c32f3d3a3e224f80231150608d0da04",
    ),
    "stat2": (
        "4e82a718d0a1cb0b546ba29b431bd56ab1401e7f869e056e73655963f9c51550",
        "7cd6d0d4dcef9023840db5212c96a8b3f4b59088d2c00fbcf2166490659199a2",
    ),
    "topk8": (
        "0c212aaa3f136406e990d5da52ba9ee84802e79e04b3e2a82d4f2dc4341a3d67",
        "17e357c07e5fbf3cf701ed4ed3dd973190cadcbc0f3e6750581bc244f7c7570f",
    ),
    "topk2": (
        "70a5b9101beb4f0d7f9ec370ec2acab19605d5673798060b0212b29b39a78d69",
        "43aca3234f37063a4d282b0e83306fd8e01071c96efca0ed295846f6c3350445",
    ),
}
GOLDEN_SHORT = {
    "fp32": "0000803f9a9999be000000006f12833a8104353f",
    "fp16": "003ccdb400001914a839",
    "bf16": "803f9abe0000833a353f",
    "int8": "0402013c7fda00005a",
    "int4": "2549123e075e00",
    "e3m0": "0000803f076d00",
    "ternary": "0000803f52",
    "stat2": "5b3f00001100",
    "topk8": "0402013c7f0000",
    "topk2": "803f0000010000",
}

every_codec = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
every_dense_codec = pytest.mark.parametrize("codec", [CODECS[name] for name in UPDATE_CODECS], ids=UPDATE_CODECS)


def vector(*values: float) -> Float32s:
    return np.array(values, np.float32)


def golden_input() -> Float32s:
    """600 values by exact arithmetic: an ordinary block, a block of zeros, and 88 values of many magnitudes."""
    mixed = (np.arange(600, dtype=np.int64) * 2_654_435_761 + 12_345) % 2**32 - 2**31
    values = (mixed >> 8).astype(np.float32) * np.float32(2.0**-30)
    values[BLOCK_ELEMENTS : 2 * BLOCK_ELEMENTS] = 0
    values[2 * BLOCK_ELEMENTS :] = np.ldexp(values[2 * BLOCK_ELEMENTS :], -2 * (np.arange(88) % 44))
    return values


def decode(codec: Codec, raw: bytes | memoryview, elements: int) -> Float32s:
    out = np.empty(elements, np.float32)
    codec.decode_untrusted(raw, elements, out)
    return out


def int8_part(scale: float | bytes, *codes: int) -> bytes:
    head = scale if isinstance(scale, bytes) else struct.pack("<f", scale)
    return head + struct.pack(f"{len(codes)}b", *codes)


def packed_part(scale: float, *packed: int) -> bytes:
    return struct.pack("<f", scale) + bytes(packed)


def level_part(small: int, large: int, *packed: int) -> bytes:
    return struct.pack("<2H", small, large) + bytes(packed)


def lattice(seed: int, elements: int) -> Float32s:
    return np.random.default_rng(seed).standard_normal(elements).astype(np.float32)


def test_table_names_each_codec_once() -> None:
    assert {name: codec.name for name, codec in CODECS.items()} == {name: name for name in GOLDEN}


def test_input_of_golden_bytes_is_what_it_was() -> None:
    assert blake3(golden_input().astype("<f4").tobytes()).hexdigest() == GOLDEN_INPUT


@pytest.mark.parametrize("name", CODECS)
def test_bytes_are_golden(name: str) -> None:
    values = golden_input()
    encoded = CODECS[name].encode(values)
    decoded = decode(CODECS[name], encoded, values.size)

    assert (blake3(encoded).hexdigest(), blake3(decoded.astype("<f4").tobytes()).hexdigest()) == GOLDEN[name]


@pytest.mark.parametrize("name", CODECS)
def test_short_vector_is_golden_in_full(name: str) -> None:
    assert bytes(CODECS[name].encode(vector(1.0, -0.3, 0.0, 1e-3, 0.7071))).hex() == GOLDEN_SHORT[name]


@pytest.mark.parametrize(
    ("name", "elements", "size"),
    [
        *(("fp32", 1, 4), ("fp32", 600, 2400), ("fp16", 3, 6), ("bf16", 3, 6)),
        *(("int8", 1, 5), ("int8", 256, 260), ("int8", 257, 265)),
        *(("int4", 1, 5), ("int4", 255, 132), ("int4", 256, 132), ("int4", 257, 137), ("e3m0", 515, 12 + 258)),
        *(("topk8", 1, 5 + 2), ("topk8", 4096, 68 + 96), ("topk8", 4096 + 65, 68 + 6 + 96 + 3)),
        *(("topk2", 1, 5 + 2), ("topk2", 4096, 20 + 96), ("topk2", 8192 + 4095, 60 + 288)),
        *(("stat2", 1, 5), ("stat2", 4, 5), ("stat2", 5, 6), ("stat2", 256, 68), ("stat2", 517, 12 + 130)),
        *(("ternary", 1, 5), ("ternary", 5, 5), ("ternary", 6, 6), ("ternary", 256, 56), ("ternary", 517, 12 + 105)),
    ],
)
def test_size_depends_on_elements_alone(name: str, elements: int, size: int) -> None:
    codec = CODECS[name]
    assert codec.encoded_bytes(elements) == size
    assert len(codec.encode(np.zeros(elements, np.float32))) == size
    assert len(codec.encode(lattice(1, elements))) == size


def test_int8_scales_stand_before_codes() -> None:
    values = np.zeros(258, np.float32)
    values[[0, 1, 256, 257]] = [127.0, -63.5, 254.0, 3.0]

    encoded = bytes(CODECS["int8"].encode(values))

    assert encoded[:8] == struct.pack("<2f", 1.0, 2.0)
    assert struct.unpack("258b", encoded[8:]) == (127, -64, *([0] * 254), 127, 2)


def test_int8_rounds_half_to_even() -> None:
    values = vector(127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5)
    assert decode(CODECS["int8"], CODECS["int8"].encode(values), 8).tolist() == [127, 0, 2, 2, 0, -2, -2, 126]


def test_fp16_rounds_half_to_even() -> None:
    values = vector(1 + 2.0**-11, 1 + 3 * 2.0**-11, 2.0**-25, 3 * 2.0**-25)
    decoded = decode(CODECS["fp16"], CODECS["fp16"].encode(values), 4)
    assert decoded.tolist() == [1.0, 1 + 2.0**-9, 0.0, 2.0**-23]


@pytest.mark.parametrize("peak", [SMALLEST, 2.0**-140, 2.0**-127, 100 * SMALLEST, SCALE_MIN, 126 * SCALE_MIN])
def test_int8_scale_is_never_subnormal(peak: float) -> None:
    values = vector(peak, -peak / 2, 0.0)
    encoded = CODECS["int8"].encode(values)

    assert struct.unpack("<f", encoded[:4]) == (SCALE_MIN,)
    assert np.abs(decode(CODECS["int8"], encoded, 3) - values).max() <= SCALE_MIN / 2


def test_int8_block_of_zeros_has_no_scale() -> None:
    assert bytes(CODECS["int8"].encode(vector(0.0, -0.0))) == bytes(6)


@pytest.mark.parametrize("peak", [127 * INT8_SCALE_MAX, np.nextafter(np.float32(127 * INT8_SCALE_MAX), np.float32(0))])
def test_int8_holds_its_bound_up_to_its_largest_magnitude(peak: float) -> None:
    values = (np.linspace(-1, 1, 256) * peak).astype(np.float32)
    decoded = decode(CODECS["int8"], CODECS["int8"].encode(values), 256)
    assert np.abs(decoded.astype(np.float64) - values).max() <= INT8_SCALE_MAX * (0.5 + 2.0**-16)


def test_int4_and_e3m0_put_the_second_half_of_a_block_above_the_first() -> None:
    """Three values in two bytes: the third is above the first, and nothing above the second."""
    assert bytes(CODECS["int4"].encode(vector(7.0, -2.0, 3.0))) == packed_part(1.0, 0x37, 0x0E)
    assert bytes(CODECS["e3m0"].encode(vector(4.0, -2.0, 0.0625))) == packed_part(4.0, 0x17, 0x0E)
    assert bytes(CODECS["e3m0"].encode(vector(1.0, -1.0, 0.5, 0.0))) == packed_part(1.0, 0x67, 0x0F)


def test_ternary_puts_five_values_into_a_byte() -> None:
    """Six values in two bytes: the first, third and fifth in one of them, the others in the other one."""
    values = vector(2.0, -2.0, -1.0, 0.0, 0.5, 1.5)
    assert bytes(CODECS["ternary"].encode(values)) == packed_part(2.0, 1 + 2 * 3 + 0 * 9, 2 + 0 * 3 + 1 * 9)


@pytest.mark.parametrize(
    ("share", "level"),
    [
        *((1.0, 7), (0.75, 7), (0.7499999, 6), (0.5, 6), (0.375, 6), (0.3749999, 5), (2.0**-6, 1), (1.5 * 2.0**-6, 2)),
        *((2.0**-7, 1), (float(np.nextafter(np.float32(2.0**-7), np.float32(0))), 0), (0.0, 0)),
    ],
)
def test_e3m0_takes_the_nearest_power_of_two_and_the_larger_of_two(share: float, level: int) -> None:
    raw = bytes(CODECS["e3m0"].encode(vector(3.0, -3.0 * share)))
    assert raw[4] >> 4 == (level | 8 if level else 0)
    assert decode(CODECS["e3m0"], raw, 2).tolist() == [3.0, -3.0 * 2.0 ** (level - 7) if level else 0.0]


def test_ternary_takes_what_is_half_of_the_largest_and_more() -> None:
    values = vector(-3.0, 1.5, float(np.nextafter(np.float32(1.5), np.float32(0))), -1.5)
    assert decode(CODECS["ternary"], CODECS["ternary"].encode(values), 4).tolist() == [-3.0, 3.0, 0.0, -3.0]


def test_bf16_rounds_half_to_even() -> None:
    values = vector(1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-8 + 2.0**-20, -SMALLEST)
    assert decode(CODECS["bf16"], CODECS["bf16"].encode(values), 4).tolist() == [1.0, 1 + 2.0**-6, 1 + 2.0**-7, -0.0]


@every_dense_codec
@pytest.mark.parametrize("peak", [FLOAT32_MAX, FLOAT32_MAX / 2, 2.0**65, 2.0**100])
def test_what_is_too_large_saturates(codec: Codec, peak: float) -> None:
    decoded = decode(codec, codec.encode(vector(peak, -peak, 0.0)), 3)
    assert decoded.tolist() == [codec.magnitude_max, -codec.magnitude_max, 0.0]


@every_dense_codec
def test_largest_magnitude_survives(codec: Codec) -> None:
    values = vector(codec.magnitude_max, -codec.magnitude_max)
    assert decode(codec, codec.encode(values), 2).tolist() == values.tolist()


@every_codec
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("place", [0, 300])
def test_encoding_what_is_not_finite_is_a_bug(codec: Codec, value: float, place: int) -> None:
    values = np.zeros(301, np.float32)
    values[place] = value
    with pytest.raises(AssertionError, match="finite"):
        codec.encode(values)


@every_codec
@pytest.mark.parametrize("change", [-1, 1, 4])
def test_wrong_length_is_refused(codec: Codec, change: int) -> None:
    raw = bytes(codec.encoded_bytes(300) + change)
    with pytest.raises(ProtocolError) as caught:
        codec.decode_untrusted(raw, 300, np.empty(300, np.float32))
    assert caught.value.refusal is Refusal.WRONG_LENGTH


@pytest.mark.parametrize(
    ("name", "raw", "refusal"),
    [
        ("fp32", struct.pack("<2f", 0.0, np.nan), Refusal.NOT_FINITE),
        ("fp32", struct.pack("<2f", -np.inf, 0.0), Refusal.NOT_FINITE),
        (
            "fp32",
            struct.pack("<2f", 0.0, np.nextafter(np.float32(MAGNITUDE_MAX), np.float32(np.inf))),
            Refusal.OUT_OF_RANGE,
        ),
        ("fp32", struct.pack("<2f", -FLOAT32_MAX, 0.0), Refusal.OUT_OF_RANGE),
        ("fp16", struct.pack("<2H", 0, 0x7C00), Refusal.NOT_FINITE),
        ("fp16", struct.pack("<2H", 0xFC00, 0), Refusal.NOT_FINITE),
        ("fp16", struct.pack("<2H", 0, 0xFE01), Refusal.NOT_FINITE),
        ("int8", int8_part(np.nan, 1, 1), Refusal.NOT_FINITE),
        ("int8", int8_part(np.inf, 0, 0), Refusal.NOT_FINITE),
        ("int8", int8_part(-np.inf, 0, 0), Refusal.NOT_FINITE),
        ("int8", int8_part(-1.0, 1, 1), Refusal.OUT_OF_RANGE),
        ("int8", int8_part(-0.0, 0, 0), Refusal.OUT_OF_RANGE),
        ("int8", int8_part(SMALLEST, 1, 1), Refusal.OUT_OF_RANGE),
        ("int8", int8_part(2.0**-127, 1, 1), Refusal.OUT_OF_RANGE),
        ("int8", int8_part(2.0**58, 1, 1), Refusal.OUT_OF_RANGE),
        ("int8", int8_part(FLOAT32_MAX, 1, 1), Refusal.OUT_OF_RANGE),
        ("int8", int8_part(1.0, 127, -128), Refusal.OUT_OF_RANGE),
        ("bf16", struct.pack("<2H", 0, 0x7F80), Refusal.NOT_FINITE),
        ("bf16", struct.pack("<2H", 0xFFC1, 0), Refusal.NOT_FINITE),
        ("bf16", struct.pack("<2H", 0, 0x5F81), Refusal.OUT_OF_RANGE),
        ("int4", packed_part(np.nan, 0x11), Refusal.NOT_FINITE),
        ("int4", packed_part(2.0**62, 0x11), Refusal.OUT_OF_RANGE),
        ("int4", packed_part(2.0**-127, 0x11), Refusal.OUT_OF_RANGE),
        ("int4", packed_part(1.0, 0x18), Refusal.OUT_OF_RANGE),
        ("int4", packed_part(1.0, 0x81), Refusal.OUT_OF_RANGE),
        ("e3m0", packed_part(-1.0, 0x11), Refusal.OUT_OF_RANGE),
        ("e3m0", packed_part(2.0**65, 0x11), Refusal.OUT_OF_RANGE),
        ("e3m0", packed_part(2.0**-121, 0x11), Refusal.OUT_OF_RANGE),
        ("e3m0", packed_part(1.0, 0x18), Refusal.OUT_OF_RANGE),
        ("e3m0", packed_part(1.0, 0x81), Refusal.OUT_OF_RANGE),
        ("stat2", level_part(0x7F80, 0, 1), Refusal.NOT_FINITE),
        ("stat2", level_part(0, 0xFFC0, 1), Refusal.NOT_FINITE),
        ("stat2", level_part(0x5F81, 0, 1), Refusal.OUT_OF_RANGE),
        ("stat2", level_part(0, 0xDF81, 1), Refusal.OUT_OF_RANGE),
        ("stat2", level_part(0xBF80, 0, 1), Refusal.OUT_OF_RANGE),  # a small level is not negative
        ("stat2", level_part(0x02FF, 0, 1), Refusal.OUT_OF_RANGE),
        ("stat2", level_part(0x3F80, 0x82FF, 1), Refusal.OUT_OF_RANGE),
        ("stat2", level_part(0x3F80, 0x8000, 1), Refusal.OUT_OF_RANGE),
        ("stat2", level_part(0x3F80, 0, 0x10), Refusal.OUT_OF_RANGE),  # a code behind the second value
        ("ternary", packed_part(2.0**65, 1), Refusal.OUT_OF_RANGE),
        ("ternary", packed_part(1.0, 243), Refusal.OUT_OF_RANGE),
        ("ternary", packed_part(1.0, 9), Refusal.OUT_OF_RANGE),  # a digit behind the second value
    ],
)
def test_what_no_encoder_writes_is_refused_before_anything_is_written(name: str, raw: bytes, refusal: Refusal) -> None:
    out = vector(5.0, 6.0)
    with pytest.raises(ProtocolError) as caught:
        CODECS[name].decode_untrusted(raw, 2, out)
    assert caught.value.refusal is refusal
    assert out.tolist() == [5.0, 6.0]


@pytest.mark.parametrize("scale", [SCALE_MIN, INT8_SCALE_MAX, 0.0])
def test_int8_limits_are_inclusive(scale: float) -> None:
    assert decode(CODECS["int8"], int8_part(scale, 127, -127), 2).tolist() == [127 * scale, -127 * scale]


def test_stat2_limits_are_inclusive() -> None:
    raw = level_part(0x0300, 0xDF80, 0b1110_0100)
    assert raw[4] == 0 + 1 * 4 + 2 * 16 + 3 * 64
    assert decode(CODECS["stat2"], level_part(0x0300, 0xDF80, 1), 1).tolist() == [2.0**-121]
    assert decode(CODECS["stat2"], level_part(0x0300, 0xDF80, 3), 1).tolist() == [-(2.0**64)]


@every_codec
def test_fault_in_the_last_chunk_is_found(codec: Codec) -> None:
    elements = 2 * CHUNK_ELEMENTS + 3
    raw = bytearray(codec.encode(lattice(2, elements)))
    raw[-2:] = {"int8": b"\0\x80", "int4": b"\0\x08", "e3m0": b"\0\x08", "ternary": b"\0\xf3"}.get(
        codec.name, b"\xff\x7f"
    )
    with pytest.raises(ProtocolError):
        codec.check_untrusted(raw, elements)


@pytest.mark.parametrize(
    ("name", "codes"), [("int8", [0x80]), ("int4", [0x08, 0x80, 0x8F, 0xF8]), ("e3m0", [0x08, 0x80, 0x8F, 0xF8])]
)
def test_one_wrong_code_is_found_wherever_it_is(name: str, codes: list[int]) -> None:
    elements = 1001 if name == "int8" else 2001
    raw = bytearray(CODECS[name].encode(lattice(3, elements)))
    for place in range(HEAD_BYTES * -(-elements // BLOCK_ELEMENTS), len(raw)):
        for code in codes:
            wrong = raw.copy()
            wrong[place] = code
            with pytest.raises(ProtocolError):
                CODECS[name].check_untrusted(wrong, elements)
    every = bytes(code for code in range(256) if not {code & 15, code >> 4} & {8})
    good = every * 20 if name != "int8" else bytes(code for code in range(256) if code != 0x80) * 20
    values = len(good) * (1 if name == "int8" else 2)
    CODECS[name].check_untrusted(struct.pack("<f", 1.0) * -(-values // BLOCK_ELEMENTS) + good, values)


@every_codec
@pytest.mark.parametrize(("start", "count"), [(0, CHUNK_ELEMENTS), (CHUNK_ELEMENTS, 777)])
def test_what_saves_passes_has_the_bits_of_the_passes(codec: Codec, start: int, count: int) -> None:
    elements = CHUNK_ELEMENTS + 777
    values = lattice(7, elements)[start : start + count]
    values[::5] = -0.0
    values[3:400] = 0.0
    encoded, split = (memoryview(bytearray(codec.encoded_bytes(elements))) for _ in range(2))
    codec.encode_range(values, elements, start, encoded)
    decoded, scratch, lost = np.empty(count, np.float32), np.empty(count, np.float32), values.copy()
    codec.decode_range(encoded, elements, start, decoded)
    codec.split_range(lost, elements, start, split, scratch)
    assert split == encoded
    assert lost.tobytes() == np.subtract(values, decoded).tobytes()
    total = lattice(8, count)
    expected = total + decoded * np.float32(0.3)
    codec.add_range(encoded, elements, start, np.float32(0.3), total, scratch)
    assert total.tobytes() == expected.tobytes()


@every_codec
@pytest.mark.parametrize(
    "elements", [1, 255, 256, 257, CHUNK_ELEMENTS - 1, CHUNK_ELEMENTS + 1, 2 * CHUNK_ELEMENTS + 777]
)
def test_chunks_leave_no_trace(codec: Codec, elements: int) -> None:
    values, size = lattice(elements, elements), max(codec.block_elements, BLOCK_ELEMENTS)
    whole = decode(codec, codec.encode(values), elements)
    blocks = [values[start : start + size] for start in range(0, elements, size)]
    piecewise = np.concatenate([decode(codec, codec.encode(block), block.size) for block in blocks])
    assert whole.tobytes() == piecewise.tobytes()


@every_codec
@pytest.mark.parametrize(("first", "end"), [(0, 1), (1, 4), (2, 3), (3, 4), (1, 40)])
def test_range_is_a_slice_of_the_whole(codec: Codec, first: int, end: int) -> None:
    block = max(codec.block_elements, BLOCK_ELEMENTS)
    elements = (4 if end < 40 else 40) * block - 24
    start, stop = first * block, min(end * block, elements)
    encoded = codec.encode(lattice(3, elements))
    out = np.empty(stop - start, np.float32)
    codec.decode_range(encoded, elements, start, out)
    assert out.tobytes() == decode(codec, encoded, elements)[start:stop].tobytes()


@every_codec
def test_ranges_make_up_the_whole(codec: Codec) -> None:
    block = max(codec.block_elements, BLOCK_ELEMENTS)
    elements = 4 * block - 24
    values = lattice(8, elements)
    raw = memoryview(bytearray(codec.encoded_bytes(elements)))
    for start, stop in [(3 * block, elements), (block, 3 * block), (0, block)]:
        codec.encode_range(values[start:stop], elements, start, raw)
    assert bytes(raw) == bytes(codec.encode(values))


@pytest.mark.parametrize("name", [name for name, codec in CODECS.items() if codec.block_elements > 1])
@pytest.mark.parametrize(("start", "stop"), [(1, 257), (0, 255), (256, 900)])
def test_a_range_within_a_block_is_a_bug(name: str, start: int, stop: int) -> None:
    codec = CODECS[name]
    scale = codec.block_elements // BLOCK_ELEMENTS
    elements, start, stop = 1000 * scale, (start if start % 256 else start * scale), stop * scale
    raw = memoryview(bytearray(codec.encoded_bytes(elements)))
    with pytest.raises(AssertionError, match="block"):
        codec.encode_range(lattice(8, stop - start), elements, start, raw)
    with pytest.raises(AssertionError, match="block"):
        codec.decode_range(raw, elements, start, np.empty(stop - start, np.float32))


def test_updates_have_codecs_that_leave_nothing_out() -> None:
    assert set(CODECS) - set(UPDATE_CODECS) == {"topk8", "topk2"}


@every_codec
@pytest.mark.parametrize("kept", [0.0, 0.95, 1.0])
def test_feedback_in_chunks_is_feedback_over_the_whole(codec: Codec, kept: float) -> None:
    elements = 2 * CHUNK_ELEMENTS + 777
    delta, residual, residual_next = lattice(9, elements), lattice(10, elements), np.empty(elements, np.float32)
    encoded = encode_with_feedback(codec, delta, residual, residual_next, kept=kept)
    produced = delta + np.float32(kept) * residual
    assert bytes(encoded) == bytes(codec.encode(produced))
    assert residual_next.tobytes() == (produced - decode(codec, encoded, elements)).tobytes()


@every_codec
def test_memory_of_the_caller_is_used(codec: Codec) -> None:
    values = lattice(4, 700)
    frame = memoryview(bytearray(codec.encoded_bytes(700) + 3))
    payload = frame[3:]  # at an odd address, as behind a frame's header

    assert codec.encode(values, payload) is payload
    assert bytes(payload) == bytes(codec.encode(values))
    assert decode(codec, payload.toreadonly(), 700).tobytes() == decode(codec, bytes(payload), 700).tobytes()


@every_codec
def test_memory_of_another_size_is_a_bug(codec: Codec) -> None:
    with pytest.raises(AssertionError, match="bytes"):
        codec.encode(vector(1.0, 2.0), memoryview(bytearray(codec.encoded_bytes(2) + 1)))


@pytest.mark.parametrize("values", [np.zeros(4), np.zeros((2, 2), np.float32), np.zeros(4, np.float32)[::2], vector()])
@every_codec
def test_other_arrays_are_a_bug(codec: Codec, values: NDArray[np.float32]) -> None:
    with pytest.raises(AssertionError):
        codec.encode(values)


@every_codec
def test_temporary_memory_is_bounded(codec: Codec) -> None:
    elements = 16 * CHUNK_ELEMENTS
    values, out, residual = lattice(5, elements), np.empty(elements, np.float32), np.zeros(elements, np.float32)
    payload = memoryview(bytearray(codec.encoded_bytes(elements)))
    tracemalloc.start()
    try:
        encode_with_feedback(codec, values, residual, values, payload)
        codec.decode_untrusted(payload, elements, out)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 3 * 4 * CHUNK_ELEMENTS


@pytest.mark.parametrize(
    ("value", "encodable", "finite"),
    [
        (0.0, True, True),
        (-MAGNITUDE_MAX, True, True),
        (float(np.nextafter(np.float32(MAGNITUDE_MAX), np.float32(np.inf))), False, True),
        (-FLOAT32_MAX, False, True),
        (np.inf, False, False),
        (-np.nan, False, False),
    ],
)
def test_values_are_judged_before_they_are_encoded(value: float, encodable: bool, finite: bool) -> None:
    values = np.zeros(CHUNK_ELEMENTS + 1, np.float32)
    values[-1] = value
    assert (is_encodable(values), is_finite(values)) == (encodable, finite)


def test_feedback_returns_what_rounds_left_out() -> None:
    """A value too small for its block's scale is sent once enough of it has gathered."""
    codec, residual = CODECS["int8"], np.zeros(2, np.float32)
    sent = np.zeros(2, np.float64)
    for _ in range(100):
        residual_next = np.empty_like(residual)
        encoded = encode_with_feedback(codec, vector(127.0, 0.125), residual, residual_next)
        sent += decode(codec, encoded, 2)
        residual = residual_next
    assert sent[1] + residual[1] == 12.5
    assert sent[1] == 12.0


@every_codec
def test_feedback_may_overwrite_the_delta_but_not_the_residual(codec: Codec) -> None:
    delta, residual = lattice(6, 500), lattice(7, 500) * np.float32(0.01)
    apart, together = np.empty_like(delta), delta.copy()
    kept = residual.copy()

    encoded = encode_with_feedback(codec, delta, residual, apart)

    assert bytes(encode_with_feedback(codec, together, residual, together)) == bytes(encoded)
    assert together.tobytes() == apart.tobytes()
    assert residual.tobytes() == kept.tobytes()
    with pytest.raises(AssertionError, match="residual"):
        encode_with_feedback(codec, delta, residual, residual)


@pytest.mark.parametrize(
    ("name", "produced"),
    [
        *(
            ("int8", 2.0**80),
            ("int8", FLOAT32_MAX / 2**48),
            ("fp16", 2.0**28 + 48),
            ("fp16", 65_520.0),
            ("fp32", 2.0**65),
        ),
        *(("bf16", 2.0**65), ("int4", 2.0**84), ("e3m0", 2.0**87), ("ternary", 2.0**87), ("stat2", 2.0**71)),
        *(("topk8", 2.0**80), ("topk2", 2.0**71)),
    ],
)
def test_feedback_keeps_what_saturates(name: str, produced: float) -> None:
    codec, residual_next = CODECS[name], np.empty(1, np.float32)
    encoded = encode_with_feedback(codec, vector(produced), vector(0.0), residual_next)
    assert decode(codec, encoded, 1)[0] + residual_next[0] == np.float32(produced)
    assert residual_next[0] > 0


def test_fp16_limit_is_binary16s() -> None:
    assert float(np.finfo(np.float16).max) == FLOAT16_MAX
