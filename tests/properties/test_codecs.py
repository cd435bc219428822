"""The codecs against a slow reference, over all magnitudes: bytes, error bounds, exact feedback, hostile bytes.

The reference computes with Python's floats and rounds to float32 after every operation, which for one product,
quotient, sum or difference of two float32 gives the correctly rounded result (53 bits are more than 2 * 24 + 2).
"""

import struct
from fractions import Fraction

import numpy as np
from hypothesis import assume, given
from hypothesis import strategies as st

from shoal.protocol.codecs import (
    BLOCK_ELEMENTS,
    CODECS,
    INT8_SCALE_MAX,
    INT8_SCALE_MIN,
    Codec,
    Float32s,
    encode_with_feedback,
    is_encodable,
)
from shoal.protocol.errors import ProtocolError

FLOAT32_EXACT_MAX = {"fp32": 2.0**64, "fp16": 2.0**29, "int8": 2.0**81}
codecs = st.sampled_from(sorted(CODECS)).map(CODECS.__getitem__)


def to_float32(value: float) -> float:
    (rounded,) = struct.unpack("<f", struct.pack("<f", value))
    assert isinstance(rounded, float)
    return rounded


@st.composite
def vectors(draw: st.DrawFn, elements: int | None = None) -> Float32s:
    """Float32 of all magnitudes: any bits, any values that hypothesis likes, or normal values around one magnitude."""
    size = elements or draw(st.integers(1, 600))
    kind = draw(st.sampled_from(["bits", "chosen", "normal"]))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    if kind == "bits":
        values = random.integers(0, 2**32, size, np.uint32).view(np.float32)
        return np.where(np.isfinite(values), values, np.float32(0))
    if kind == "normal":
        values = random.standard_normal(size).astype(np.float32)
        return np.ldexp(values, draw(st.integers(-150, 120)))
    chosen = draw(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=24))
    return np.array(random.choice(np.array(chosen, np.float32), size), np.float32)


def decode(codec: Codec, raw: bytes | memoryview, elements: int) -> Float32s:
    out = np.empty(elements, np.float32)
    codec.decode_untrusted(raw, elements, out)
    return out


def encode_slowly(name: str, values: list[float]) -> bytes:
    if name == "fp32":
        return b"".join(struct.pack("<f", min(max(value, -(2.0**64)), 2.0**64)) for value in values)
    if name == "fp16":
        return b"".join(struct.pack("<e", min(max(value, -65504.0), 65504.0)) for value in values)
    scales, codes = b"", b""
    for start in range(0, len(values), BLOCK_ELEMENTS):
        block = values[start : start + BLOCK_ELEMENTS]
        peak = max(abs(value) for value in block)
        scale = min(max(to_float32(peak / 127), INT8_SCALE_MIN), INT8_SCALE_MAX) if peak else 0.0
        scales += struct.pack("<f", scale)
        for value in block:
            quotient = abs(value) / scale if scale else 0.0
            code = 127 if quotient > 128 else round(to_float32(quotient))
            codes += struct.pack("b", min(code, 127) if value > 0 else -min(code, 127))
    return scales + codes


def decode_slowly(name: str, raw: bytes, elements: int) -> list[float]:
    if name == "fp32":
        return list(struct.unpack(f"<{elements}f", raw))
    if name == "fp16":
        return list(struct.unpack(f"<{elements}e", raw))
    blocks = -(-elements // BLOCK_ELEMENTS)
    scales = struct.unpack(f"<{blocks}f", raw[: 4 * blocks])
    codes = struct.unpack(f"{elements}b", raw[4 * blocks :])
    return [to_float32(code * scales[index // BLOCK_ELEMENTS]) for index, code in enumerate(codes)]


@given(codecs, vectors())
def test_bytes_are_the_references(codec: Codec, values: Float32s) -> None:
    encoded = bytes(codec.encode(values))
    assert encoded == encode_slowly(codec.name, values.tolist())
    assert decode(codec, encoded, values.size).tolist() == decode_slowly(codec.name, encoded, values.size)


@given(codecs, vectors())
def test_what_is_encoded_decodes_and_encodes_to_itself(codec: Codec, values: Float32s) -> None:
    decoded = decode(codec, codec.encode(values), values.size)
    assert np.abs(decoded).max() <= codec.magnitude_max
    if codec.name != "int8":  # an int8 block's decoded maximum, rounded, may have another scale by a last bit
        assert decode(codec, codec.encode(decoded), values.size).tobytes() == decoded.tobytes()


@given(vectors())
def test_int8_error_is_half_a_scale(values: Float32s) -> None:
    codec = CODECS["int8"]
    assume(np.abs(values).max() <= codec.magnitude_max)
    encoded = codec.encode(values)
    scales = np.frombuffer(encoded, "<f4", -(-values.size // BLOCK_ELEMENTS)).tolist()
    for index, (value, decoded) in enumerate(
        zip(values.tolist(), decode(codec, encoded, values.size).tolist(), strict=True)
    ):
        bound = Fraction(scales[index // BLOCK_ELEMENTS]) * (Fraction(1, 2) + Fraction(1, 2**16))
        assert abs(Fraction(value) - Fraction(decoded)) <= bound


@given(vectors())
def test_fp16_error_is_half_a_unit_in_the_last_place(values: Float32s) -> None:
    values = np.clip(values, np.float32(-65504), np.float32(65504))
    decoded = decode(CODECS["fp16"], CODECS["fp16"].encode(values), values.size)
    error = np.abs(values.astype(np.float64) - decoded)
    assert np.all(error <= np.maximum(np.abs(values.astype(np.float64)) * 2.0**-11, 2.0**-25))


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
