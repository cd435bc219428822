"""The codecs against a slow reference, over all magnitudes: bytes, error bounds, exact feedback, hostile bytes.

The reference computes with Python's floats and rounds to float32 after every operation, which for one product,
quotient, sum or difference of two float32 gives the correctly rounded result (53 bits are more than 2 * 24 + 2).
"""

import math
import struct
from fractions import Fraction

import numpy as np
from hypothesis import assume, given
from hypothesis import strategies as st

from shoal.protocol.codecs import (
    BLOCK_ELEMENTS,
    CODECS,
    SCALE_MIN,
    Codec,
    Float32s,
    encode_with_feedback,
    is_encodable,
)
from shoal.protocol.errors import ProtocolError

FLOAT32_EXACT_MAX = {
    "fp32": 2.0**64,
    "fp16": 2.0**29,
    "bf16": 2.0**64,
    "int8": 2.0**81,
    "int4": 2.0**85,
    "e3m0": 2.0**88,
    "ternary": 2.0**88,
    "stat2": 2.0**71,
    "topk8": 2.0**81,
    "topk2": 2.0**71,
}
# Of codes in blocks: the largest code, of what the scale is the largest magnitude's share; the scale's limits; codes in
# a byte.
CODE_MAX = {"int8": 127, "int4": 7, "e3m0": 1, "ternary": 1}
SCALES = {
    "int8": (SCALE_MIN, 2.0**57),
    "int4": (SCALE_MIN, 2.0**61),
    "e3m0": (2.0**-120, 2.0**64),
    "ternary": (SCALE_MIN, 2.0**64),
}
# Codes in a byte, and the base of the digits that they are.
PACKING = {
    "int8": (1, 256),
    "int4": (2, 16),
    "e3m0": (2, 16),
    "ternary": (5, 3),
    "stat2": (4, 4),
    "stat2 of the largest": (4, 4),
}
# From how many quarters of the mean on a magnitude is not small, and is large.
QUARTERS = {"stat2": (3, 10), "stat2 of the largest": (2, 5)}
# Of sparse codecs: the code of what is chosen.
CHOSEN = {"topk8": "int8", "topk2": "stat2 of the largest"}
STEEP = [0.0, -0.0, 2.0**-149, 2.0**-126, 2.0**-121, 2.0**-100, 1.0, 2.0**8, 2.0**17, 2.0**40, 2.0**64, -(2.0**64)]
codecs = st.sampled_from(sorted(CODECS)).map(CODECS.__getitem__)


def to_float32(value: float) -> float:
    (rounded,) = struct.unpack("<f", struct.pack("<f", value))
    assert isinstance(rounded, float)
    return rounded


@st.composite
def vectors(draw: st.DrawFn, elements: int | None = None) -> Float32s:
    """Float32 of all magnitudes: any bits, any values that hypothesis likes, or normal values around one magnitude."""
    drawn = draw(st.integers(1, 640))
    size = elements or (drawn if drawn <= 600 else (4095, 4096, 4097, 8200)[drawn % 4])
    kind = draw(st.sampled_from(["bits", "chosen", "normal", "steep"]))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    if kind == "bits":
        values = random.integers(0, 2**32, size, np.uint32).view(np.float32)
        return np.where(np.isfinite(values), values, np.float32(0))
    if kind == "normal":
        values = random.standard_normal(size).astype(np.float32)
        return np.ldexp(values, draw(st.integers(-150, 120)))
    if kind == "steep":
        # A few magnitudes, far apart, and many zeros and subnormals around them.
        few = np.array(draw(st.lists(st.sampled_from(STEEP), min_size=1, max_size=6)), np.float32)
        near = random.choice(few, size) * random.choice(
            np.array([1, 1 + 2.0**-23, 1 - 2.0**-24, 0.5, -1], np.float32), size
        )
        return np.where(random.random(size) < draw(st.sampled_from([0.0, 0.5, 0.95])), np.float32(0), near)
    chosen = draw(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=24))
    return np.array(random.choice(np.array(chosen, np.float32), size), np.float32)


def decode(codec: Codec, raw: bytes | memoryview, elements: int) -> Float32s:
    out = np.empty(elements, np.float32)
    codec.decode_untrusted(raw, elements, out)
    return out


def round_to_bfloat16(value: float) -> float:
    (bits,) = struct.unpack("<I", struct.pack("<f", min(max(value, -(2.0**64)), 2.0**64)))
    below, rest = divmod(bits, 2**16)
    up = rest > 2**15 or (rest == 2**15 and below % 2 == 1)
    (rounded,) = struct.unpack("<f", struct.pack("<I", (below + up) << 16))
    assert isinstance(rounded, float)
    return rounded


def code_of(name: str, value: float, scale: float) -> int:
    """The code of one value of a block, as the digit that is packed."""
    size = abs(value)
    if name == "ternary":
        return 0 if size < scale / 2 or not scale else 1 if value > 0 else 2
    if name == "e3m0":
        if not scale:
            return 0
        share = min(to_float32(size / scale) if size <= scale else 1.0, 1.0)
        levels = [0.0, *(2.0 ** (level - 7) for level in range(1, 8))]
        # The nearest, and of two that are equally near the larger one.
        level = min(range(8), key=lambda one: (abs(Fraction(levels[one]) - Fraction(share)), -one))
        return level + (8 if value < 0 and level else 0)
    limit = CODE_MAX[name]
    quotient = size / scale if scale else 0.0
    code = min(limit if quotient > limit + 1 else round(to_float32(quotient)), limit)
    return (code if value > 0 else -code) % PACKING[name][1]


def from_bfloat16(raw: bytes) -> float:
    (value,) = struct.unpack("<f", b"\0\0" + raw)
    assert isinstance(value, float)
    return value


def meaning_of(name: str, code: int, head: bytes) -> float:
    if name in QUARTERS:
        small, large = from_bfloat16(head[:2]), from_bfloat16(head[2:])
        return (0.0, small, -small, large)[code]
    (scale,) = struct.unpack("<f", head)
    assert isinstance(scale, float)
    if name == "ternary":
        return (0.0, scale, -scale)[code]
    if name == "e3m0":
        magnitude = scale * 2.0 ** (code % 8 - 7) if code % 8 else 0.0
        return -magnitude if code >= 8 else magnitude
    base = PACKING[name][1]
    return to_float32((code - base if code >= base // 2 else code) * scale)


def find_levels(block: list[float], quarters: tuple[int, int]) -> tuple[float, float]:
    """The small level, and the large one with its sign, of a block: sums of whole numbers of units."""
    sizes = [min(abs(value), 2.0**64) for value in block]
    unit = 2.0 ** (max(math.frexp(max(sizes))[1] - 1, -100) - 21) if any(sizes) else 1.0
    units = [int(size / unit) for size in sizes]
    total = sum(units)
    if not total:
        return 0.0, 0.0
    low, high = (Fraction(one * total, 4 * len(block)) for one in quarters)
    above = [size for size, value in zip(units, block, strict=True) if size >= high and value > 0]
    below = [size for size, value in zip(units, block, strict=True) if size >= high and value < 0]
    side, far, near = (1.0, above, below) if sum(above) >= sum(below) else (-1.0, below, above)
    large = mean_level(far, unit)
    middle = [size for size in units if low <= size < high]
    return mean_level(middle, unit) if middle else min(mean_level(near, unit), large), side * large


def mean_level(units: list[int], unit: float) -> float:
    return round_to_bfloat16((2 * sum(units) + len(units)) // (2 * len(units)) * unit) if units else 0.0


def level_code(value: float, small: float, large: float) -> int:
    """That of the nearest level, of two that are equally near the larger one."""
    if large and value * large > 0 and abs(value) >= to_float32(small + abs(large)) / 2:
        return 3
    return 0 if not small or abs(value) < small / 2 else 1 if value > 0 else 2


def encode_block(name: str, block: list[float]) -> tuple[bytes, list[int]]:
    """A block's head, and its codes."""
    if name in QUARTERS:
        small, large = find_levels(block, QUARTERS[name])
        head = struct.pack("<f", small)[2:] + struct.pack("<f", large if large else 0.0)[2:]
        return head, [level_code(value, small, large) for value in block]
    low, high = SCALES[name]
    peak = max(abs(value) for value in block)
    scale = min(max(to_float32(peak / CODE_MAX[name]), low), high) if peak else 0.0
    return struct.pack("<f", scale), [code_of(name, value, scale) for value in block]


def encode_blocks(name: str, values: list[float], size: int = BLOCK_ELEMENTS) -> bytes:
    heads, packed = b"", b""
    per_byte, base = PACKING[name]
    for start in range(0, len(values), size):
        head, codes = encode_block(name, values[start : start + size])
        heads += head
        width = -(-len(codes) // per_byte)
        packed += bytes(
            sum(code * base**place for place, code in enumerate(codes[byte::width])) for byte in range(width)
        )
    return heads + packed


def decode_blocks(name: str, raw: bytes, elements: int, size: int = BLOCK_ELEMENTS) -> list[float]:
    per_byte, base = PACKING[name]
    heads = -(-elements // size)
    packed = raw[4 * heads :]
    values: list[float] = []
    for head in struct.iter_unpack("<4s", raw[: 4 * heads]):
        count = min(size, elements - len(values))
        width = -(-count // per_byte)
        row, packed = packed[:width], packed[width:]
        codes = [row[index % width] // base ** (index // width) % base for index in range(count)]
        values += [meaning_of(name, code, head[0]) for code in codes]
    return values


def choose_places(values: list[float]) -> list[list[int]]:
    """In every chunk of 4,096, where its largest magnitudes stand, one of 64."""
    chunks = [values[start : start + 4096] for start in range(0, len(values), 4096)]
    return [
        sorted(sorted(range(len(chunk)), key=lambda place: (-abs(chunk[place]), place))[: -(-len(chunk) // 64)])
        for chunk in chunks
    ]


def encode_sparse(name: str, values: list[float]) -> bytes:
    packed, chosen = b"", []
    for number, places in enumerate(choose_places(values)):
        chosen += [values[4096 * number + place] for place in places]
        total = sum(place << 12 * index for index, place in enumerate(places))
        packed += total.to_bytes(-(-12 * len(places) // 8), "little")
    return encode_blocks(CHOSEN[name], chosen, 64) + packed


def decode_sparse(name: str, raw: bytes, elements: int) -> list[float]:
    count = -(-elements // 64)
    packed = len(raw) - sum(-(-12 * -(-min(4096, elements - start) // 64) // 8) for start in range(0, elements, 4096))
    chosen, values = decode_blocks(CHOSEN[name], raw[:packed], count, 64), [0.0] * elements
    for start in range(0, elements, 4096):
        here = -(-min(4096, elements - start) // 64)
        width = -(-12 * here // 8)
        total, packed = int.from_bytes(raw[packed : packed + width], "little"), packed + width
        for index in range(here):
            values[start + (total >> 12 * index) % 4096] = chosen[start // 64 + index]
    return values


def encode_slowly(name: str, values: list[float]) -> bytes:
    if name == "fp32":
        return b"".join(struct.pack("<f", min(max(value, -(2.0**64)), 2.0**64)) for value in values)
    if name == "fp16":
        return b"".join(struct.pack("<e", min(max(value, -65504.0), 65504.0)) for value in values)
    if name == "bf16":
        return b"".join(struct.pack("<f", round_to_bfloat16(value))[2:] for value in values)
    return encode_sparse(name, values) if name in CHOSEN else encode_blocks(name, values)


def decode_slowly(name: str, raw: bytes, elements: int) -> list[float]:
    if name == "fp32":
        return list(struct.unpack(f"<{elements}f", raw))
    if name == "fp16":
        return list(struct.unpack(f"<{elements}e", raw))
    if name == "bf16":
        return [from_bfloat16(raw[2 * index : 2 * index + 2]) for index in range(elements)]
    return decode_sparse(name, raw, elements) if name in CHOSEN else decode_blocks(name, raw, elements)


@given(codecs, vectors())
def test_bytes_are_the_references(codec: Codec, values: Float32s) -> None:
    encoded = bytes(codec.encode(values))
    assert encoded == encode_slowly(codec.name, values.tolist())
    assert decode(codec, encoded, values.size).tolist() == decode_slowly(codec.name, encoded, values.size)


@given(codecs, vectors())
def test_what_is_encoded_decodes_and_encodes_to_itself(codec: Codec, values: Float32s) -> None:
    decoded = decode(codec, codec.encode(values), values.size)
    assert np.abs(decoded).max() <= codec.magnitude_max
    # Of what is decoded a block's maximum, rounded, may have another scale by a last bit, and its means are others.
    if codec.name not in ("int8", "int4", "stat2", *CHOSEN):
        assert decode(codec, codec.encode(decoded), values.size).tobytes() == decoded.tobytes()


@given(st.sampled_from(sorted(SCALES)), vectors())
def test_error_in_a_block_is_bounded_by_its_scale(name: str, values: Float32s) -> None:
    codec = CODECS[name]
    assume(np.abs(values).max() <= codec.magnitude_max)
    encoded = codec.encode(values)
    scales = np.frombuffer(encoded, "<f4", -(-values.size // BLOCK_ELEMENTS)).tolist()
    for index, (value, decoded) in enumerate(
        zip(values.tolist(), decode(codec, encoded, values.size).tolist(), strict=True)
    ):
        scale = Fraction(scales[index // BLOCK_ELEMENTS])
        bound = {
            "int8": scale * (Fraction(1, 2) + Fraction(1, 2**16)),
            "int4": scale * (Fraction(1, 2) + Fraction(1, 2**16)),
            "e3m0": max(abs(Fraction(value)) / 3 * (1 + Fraction(1, 2**22)), scale / 128),
            "ternary": scale / 2 + Fraction(1, 2**150),
        }[name]
        assert abs(Fraction(value) - Fraction(decoded)) <= bound


@given(vectors())
def test_a_statistical_code_is_that_of_the_nearest_level(values: Float32s) -> None:
    """And so the error is never above the value."""
    codec = CODECS["stat2"]
    encoded = bytes(codec.encode(values))
    for index, (value, decoded) in enumerate(
        zip(values.tolist(), decode(codec, encoded, values.size).tolist(), strict=True)
    ):
        head = encoded[4 * (index // BLOCK_ELEMENTS) :][:4]
        levels = [meaning_of("stat2", code, head) for code in range(4)]
        assert decoded in levels
        error = abs(Fraction(value) - Fraction(decoded))
        nearest = min(abs(Fraction(value) - Fraction(level)) for level in levels)
        # What lies half-way between two levels, which are no float32's sum, may go to either.
        assert error <= nearest * (1 + Fraction(1, 2**20))
        assert error <= abs(Fraction(value))


@given(st.sampled_from(sorted(CHOSEN)), vectors())
def test_a_sparse_code_leaves_out_nothing_larger_than_what_it_keeps(name: str, values: Float32s) -> None:
    codec = CODECS[name]
    assume(np.abs(values).max() <= codec.magnitude_max)
    decoded = decode(codec, codec.encode(values), values.size)
    for number, places in enumerate(choose_places(values.tolist())):
        row, got = values[4096 * number :][:4096], decoded[4096 * number :][:4096]
        left = np.setdiff1d(np.arange(row.size), places)
        assert not got[left].any()
        kept = row[places].astype(np.float64)
        assert left.size == 0 or np.abs(row[left]).max() <= np.abs(kept).min()
        scale = max(float(np.abs(kept).max()) / 127, SCALE_MIN)
        bound = scale * (0.5 + 2.0**-16) if name == "topk8" else np.abs(kept)
        assert np.all(np.abs(got[places] - kept) <= bound)


@given(vectors())
def test_fp16_error_is_half_a_unit_in_the_last_place(values: Float32s) -> None:
    values = np.clip(values, np.float32(-65504), np.float32(65504))
    decoded = decode(CODECS["fp16"], CODECS["fp16"].encode(values), values.size)
    error = np.abs(values.astype(np.float64) - decoded)
    assert np.all(error <= np.maximum(np.abs(values.astype(np.float64)) * 2.0**-11, 2.0**-25))


@given(vectors())
def test_bf16_error_is_half_a_unit_in_the_last_place(values: Float32s) -> None:
    values = np.clip(values, -(2.0**64), 2.0**64).astype(np.float32)
    decoded = decode(CODECS["bf16"], CODECS["bf16"].encode(values), values.size)
    error = np.abs(values.astype(np.float64) - decoded)
    assert np.all(error <= np.maximum(np.abs(values.astype(np.float64)) * 2.0**-8, 2.0**-134))


@given(codecs, st.data())
def test_feedback_is_exact(codec: Codec, data: st.DataObject) -> None:
    """decoded + residual == produced as real numbers, and so in float32, too."""
    delta = data.draw(vectors())
    residual = data.draw(vectors(delta.size))
    limit = np.float32(FLOAT32_EXACT_MAX[codec.name] / 2)
    delta, residual = np.clip(delta, -limit, limit), np.clip(residual, -limit, limit)
    produced, residual_next = delta + residual, np.empty_like(delta)

    encoded = encode_with_feedback(codec, delta, residual, residual_next)

    decoded = decode(codec, encoded, delta.size)
    assert np.all(decoded + residual_next == produced)
    for one, two, three in zip(decoded.tolist(), residual_next.tolist(), produced.tolist(), strict=True):
        assert Fraction(one) + Fraction(two) == Fraction(three)


@given(codecs, vectors())
def test_feedback_never_leaves_the_finite(codec: Codec, values: Float32s) -> None:
    delta = np.clip(values, -(2.0**64), 2.0**64).astype(np.float32)
    residual = np.zeros_like(delta)
    for _ in range(4):
        residual_next = np.empty_like(delta)
        decode(codec, encode_with_feedback(codec, delta, residual, residual_next), delta.size)
        residual = residual_next
    assert np.isfinite(residual).all()


@given(codecs, st.integers(1, 300), st.data())
def test_hostile_bytes_are_refused_or_harmless(codec: Codec, elements: int, data: st.DataObject) -> None:
    size = data.draw(st.sampled_from([codec.encoded_bytes(elements)] * 4 + [0, 1, 4 * elements + 1]))
    seed = data.draw(st.integers(0, 2**32 - 1))
    raw = bytearray(np.random.default_rng(seed).bytes(size))
    if data.draw(st.booleans()):
        # Half of all random bytes set an exponent's high bits; without them most parts pass.
        raw = bytearray(byte & 0x3F for byte in raw)
    out = np.full(elements, 7.0, np.float32)
    try:
        codec.decode_untrusted(raw, elements, out)
    except ProtocolError:
        assert np.all(out == 7.0)
    else:
        assert is_encodable(out)
        assert np.abs(out).max() <= codec.magnitude_max


@given(codecs, vectors(), st.integers(0, 2**31))
def test_one_flipped_bit_never_escapes_the_bounds(codec: Codec, values: Float32s, position: int) -> None:
    raw = bytearray(codec.encode(values))
    raw[position // 8 % len(raw)] ^= 1 << position % 8
    out = np.zeros(values.size, np.float32)
    try:
        codec.decode_untrusted(raw, values.size, out)
    except ProtocolError:
        assert not out.any()
    else:
        assert np.abs(out).max() <= codec.magnitude_max
