"""The inner loops of the codecs and the aggregators, compiled by numba for the machine that runs them.

Invariants: every kernel does the float32 operations that protocol/README.md names, in that order, one rounding each:
nothing is fused, reassociated or approximated, so that all machines compute the same bits; a kernel reads and writes
within the arrays that it is given, whatever is in them; it needs no memory of its own and holds no lock.

Lengths are the caller's to check. Imported by its first use, not with the codecs: numba takes a good 100 MiB and, where
nothing is cached yet, seconds.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import numba
import numpy as np
from numba.core import types
from numba.extending import intrinsic
from numpy.typing import NDArray

Float32s = NDArray[np.float32]
Float64s = NDArray[np.float64]
Uint32s = NDArray[np.uint32]
Uint16s = NDArray[np.uint16]
Uint8s = NDArray[np.uint8]
# What a compiled function makes of a number differs from what Python does; both are written here.
Scalar = Any

F = TypeVar("F", bound=Callable[..., object])

_MAGNITUDE = np.uint32(0x7FFFFFFF)
_SIGN = np.uint32(0x80000000)
_ZERO = np.float32(0)
_INFINITY = np.float32(np.inf)
# Of 2^64, as a float32.
_MAGNITUDE_MAX_BITS = np.uint32(0x5F800000)


def compiled(function: F) -> F:
    """The function as machine code, made at its first call and kept on disk where there is a place for it."""
    try:
        return cast(F, numba.njit(nogil=True, error_model="numpy", cache=True)(function))
    except RuntimeError:  # neither the package's folder nor the user's cache can be written
        return cast(F, numba.njit(nogil=True, error_model="numpy")(function))


def _reinterpret(source: Any, target: Any) -> Any:
    """A compiled function that takes the bits of one type for those of another."""

    def bitcast(typing: object, value: object) -> Any:
        def generate(context: Any, builder: Any, signature: object, arguments: Any) -> Any:
            return builder.bitcast(arguments[0], context.get_value_type(target))

        return target(source), generate

    return intrinsic(bitcast)


bits_of: Any = _reinterpret(types.float32, types.uint32)
float_of: Any = _reinterpret(types.uint32, types.float32)


# -- all values ------------------------------------------------------------------------------------------------------


@compiled
def peak_bits(bits: Uint32s) -> int:
    """The largest magnitude among float32 values, as its bits: they are ordered as the magnitudes are, NaN last."""
    peak = np.uint32(0)
    for index in range(bits.size):
        peak = max(peak, bits[index] & _MAGNITUDE)
    return int(peak)


@compiled
def peak_bits_16(bits: Uint16s) -> int:
    """The same of float16 or bfloat16."""
    peak = np.uint16(0)
    for index in range(bits.size):
        peak = max(peak, np.uint16(bits[index] & np.uint16(0x7FFF)))
    return int(peak)


@compiled
def clip(values: Float32s, limit: np.float32, out: Float32s) -> None:
    """The values, none of them larger in magnitude than the limit."""
    for index in range(values.size):
        out[index] = min(max(values[index], -limit), limit)


@compiled
def add_scaled(term: Float32s, factor: np.float32, total: Float32s) -> None:
    """total = total + term * factor, two roundings."""
    for index in range(total.size):
        total[index] = total[index] + term[index] * factor


# -- float16 and bfloat16 --------------------------------------------------------------------------------------------


@compiled
def encode_fp16(values: Float32s, limit: np.float32, codes: Uint16s) -> None:
    """Half to even. A subnormal result is rounded by the addition of a float whose last place is its own."""
    for index in range(values.size):
        bits = bits_of(min(max(values[index], -limit), limit))
        magnitude = bits & _MAGNITUDE
        normal = (magnitude + np.uint32(0xC8000FFF) + ((magnitude >> np.uint32(13)) & np.uint32(1))) >> np.uint32(13)
        subnormal = bits_of(float_of(magnitude) + np.float32(0.5)) - np.uint32(0x3F000000)
        code = normal if magnitude >= np.uint32(0x38800000) else subnormal
        codes[index] = np.uint16(code | ((bits & _SIGN) >> np.uint32(16)))


@compiled
def decode_fp16(codes: Uint16s, out: Float32s) -> None:
    """Exact: the exponent's bias is made good by a power of two."""
    for index in range(out.size):
        code = np.uint32(codes[index])
        value = float_of((code & np.uint32(0x7FFF)) << np.uint32(13)) * np.float32(2.0**112)
        out[index] = float_of(bits_of(value) | ((code & np.uint32(0x8000)) << np.uint32(16)))


@compiled
def encode_bf16(values: Float32s, limit: np.float32, codes: Uint16s) -> None:
    """The upper half of the float32, rounded half to even."""
    for index in range(values.size):
        bits = bits_of(min(max(values[index], -limit), limit))
        codes[index] = np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@compiled
def decode_bf16(codes: Uint16s, out: Float32s) -> None:
    """Exact."""
    for index in range(out.size):
        out[index] = float_of(np.uint32(codes[index]) << np.uint32(16))


class HalfKernels(NamedTuple):
    """encode(values, limit, codes) and decode(codes, out)."""

    encode: Callable[[Float32s, np.float32, Uint16s], None]
    decode: Callable[[Uint16s, Float32s], None]


HALF_KERNELS: dict[str, HalfKernels] = {
    "fp16": HalfKernels(encode_fp16, decode_fp16),
    "bf16": HalfKernels(encode_bf16, decode_bf16),
}


# -- blocks with a scale each ----------------------------------------------------------------------------------------


@compiled
def _take_scale(row: Float32s, steps: Scalar, scale_min: Scalar, scale_max: Scalar, place: Float32s) -> Scalar:
    """The scale to divide by, absmax / steps within its limits; in its place it is 0 for a block of zeros."""
    bits = np.uint32(0)
    for index in range(row.size):
        bits = max(bits, bits_of(row[index]) & _MAGNITUDE)
    peak = float_of(bits)
    scale = min(max(peak / steps, scale_min), scale_max)
    place[0] = scale if peak > _ZERO else _ZERO
    return scale


@compiled
def _int8(value: Scalar, scale: Scalar) -> Scalar:
    return np.int32(min(max(np.rint(value / scale), np.float32(-127)), np.float32(127)))


@compiled
def encode_int8(
    values: Float32s, block: int, scale_min: np.float32, scale_max: np.float32, scales: Float32s, codes: Uint8s
) -> None:
    """code = rint(x / scale), scale = absmax / 127 within its limits."""
    for number in range(scales.size):
        row, out = values[number * block : number * block + block], codes[number * block : number * block + block]
        scale = _take_scale(row, np.float32(127), scale_min, scale_max, scales[number : number + 1])
        for index in range(row.size):
            out[index] = np.uint8(_int8(row[index], scale))


@compiled
def split_int8(
    values: Float32s, block: int, scale_min: np.float32, scale_max: np.float32, scales: Float32s, codes: Uint8s
) -> None:
    """As `encode_int8`, and value = value - code * scale, two roundings."""
    for number in range(scales.size):
        row, out = values[number * block : number * block + block], codes[number * block : number * block + block]
        scale = _take_scale(row, np.float32(127), scale_min, scale_max, scales[number : number + 1])
        for index in range(row.size):
            code = _int8(row[index], scale)
            out[index] = np.uint8(code)
            row[index] = row[index] - np.float32(code) * scale


@compiled
def decode_int8(scales: Float32s, codes: Uint8s, block: int, out: Float32s) -> None:
    """code * scale."""
    for number in range(scales.size):
        scale = scales[number]
        row, target = codes[number * block : number * block + block], out[number * block : number * block + block]
        for index in range(target.size):
            target[index] = np.float32(np.int8(row[index])) * scale


@compiled
def add_int8(scales: Float32s, codes: Uint8s, block: int, factor: np.float32, total: Float32s) -> None:
    """total = total + code * scale * factor, three roundings: as `decode_int8` and `add_scaled`, in one pass."""
    for number in range(scales.size):
        scale = scales[number]
        row, target = codes[number * block : number * block + block], total[number * block : number * block + block]
        for index in range(target.size):
            target[index] = target[index] + np.float32(np.int8(row[index])) * scale * factor


@compiled
def _int4(value: Scalar, scale: Scalar) -> Scalar:
    code = np.int32(min(max(np.rint(value / scale), np.float32(-7)), np.float32(7)))
    return np.uint8(code & np.int32(15))


@compiled
def encode_int4(
    values: Float32s, block: int, scale_min: np.float32, scale_max: np.float32, scales: Float32s, packed: Uint8s
) -> None:
    """As int8, with 7 for 127. Byte i of a block has value i below and value half + i above."""
    stride = (block + 1) // 2
    for number in range(scales.size):
        row, out = values[number * block : number * block + block], packed[number * stride : number * stride + stride]
        scale = _take_scale(row, np.float32(7), scale_min, scale_max, scales[number : number + 1])
        low, high = row[: out.size], row[out.size :]
        for index in range(high.size):
            out[index] = _int4(low[index], scale) | np.uint8(_int4(high[index], scale) << np.uint8(4))
        for index in range(high.size, low.size):
            out[index] = _int4(low[index], scale)


@compiled
def decode_int4(scales: Float32s, packed: Uint8s, block: int, out: Float32s) -> None:
    """code * scale."""
    stride = (block + 1) // 2
    for number in range(scales.size):
        scale = scales[number]
        row, target = packed[number * stride : number * stride + stride], out[number * block : number * block + block]
        low, high = target[: row.size], target[row.size :]
        for index in range(low.size):
            low[index] = np.float32(np.int32((row[index] & np.uint8(15)) ^ np.uint8(8)) - np.int32(8)) * scale
        for index in range(high.size):
            high[index] = np.float32(np.int32((row[index] >> np.uint8(4)) ^ np.uint8(8)) - np.int32(8)) * scale


@compiled
def has_other_bytes(codes: Uint8s, block: int, elements: int) -> bool:
    """Whether -128 is among signed bytes."""
    lowest = np.int8(0)
    for index in range(codes.size):
        lowest = min(lowest, np.int8(codes[index]))
    return bool(lowest == np.int8(-128))


@compiled
def has_other_nibbles(packed: Uint8s, block: int, elements: int) -> bool:
    """Whether 8, which is -8 or a negative 0, is among half bytes, or the half behind the last value is not 0."""
    lowest = np.int8(0)  # of either half as the upper one of a byte: 8 is -128 there
    for index in range(packed.size):
        lowest = min(lowest, np.int8(packed[index] << np.uint8(4)))
        lowest = min(lowest, np.int8(packed[index] & np.uint8(240)))
    return bool(lowest == np.int8(-128)) or (elements % 2 == 1 and packed[-1] > np.uint8(15))


@compiled
def _e3m0(value: Scalar, scale: Scalar) -> Scalar:
    bits = bits_of(value)
    share = min(float_of(bits & _MAGNITUDE) / scale, np.float32(1))
    # Half a mantissa more, and the exponent is that of the nearest power of two.
    level = np.int32((bits_of(share) + np.uint32(0x400000)) >> np.uint32(23)) - np.int32(120)
    level = max(level, np.int32(share >= np.float32(2.0**-7)))
    sign = np.int32(bits >> np.uint32(31)) << np.int32(3)
    return np.uint8(level | sign if level > np.int32(0) else np.int32(0))


@compiled
def encode_e3m0(
    values: Float32s, block: int, scale_min: np.float32, scale_max: np.float32, scales: Float32s, packed: Uint8s
) -> None:
    """A sign and a power of two, 2^-6 to 1 of the scale, or 0. Packed as int4."""
    stride = (block + 1) // 2
    for number in range(scales.size):
        row, out = values[number * block : number * block + block], packed[number * stride : number * stride + stride]
        scale = _take_scale(row, np.float32(1), scale_min, scale_max, scales[number : number + 1])
        low, high = row[: out.size], row[out.size :]
        for index in range(high.size):
            out[index] = _e3m0(low[index], scale) | np.uint8(_e3m0(high[index], scale) << np.uint8(4))
        for index in range(high.size, low.size):
            out[index] = _e3m0(low[index], scale)


@compiled
def _from_e3m0(code: Scalar, scale: Scalar) -> Scalar:
    level, sign = np.uint32(code & np.uint8(7)), np.uint32(code & np.uint8(8)) << np.uint32(28)
    power = (level + np.uint32(120)) << np.uint32(23) if level > np.uint32(0) else np.uint32(0)
    return float_of(power | sign) * scale


@compiled
def decode_e3m0(scales: Float32s, packed: Uint8s, block: int, out: Float32s) -> None:
    """Exact: a power of two times the scale."""
    stride = (block + 1) // 2
    for number in range(scales.size):
        scale = scales[number]
        row, target = packed[number * stride : number * stride + stride], out[number * block : number * block + block]
        low, high = target[: row.size], target[row.size :]
        for index in range(low.size):
            low[index] = _from_e3m0(row[index], scale)
        for index in range(high.size):
            high[index] = _from_e3m0(row[index] >> np.uint8(4), scale)


@compiled
def encode_ternary(
    values: Float32s, block: int, scale_min: np.float32, scale_max: np.float32, scales: Float32s, packed: Uint8s
) -> None:
    """0 below half of the largest magnitude, else that magnitude. Byte i of a block of s bytes has the values i, s + i,
    2s + i, 3s + i and 4s + i as digits to base 3, the first one lowest: 1 is positive, 2 negative."""
    stride = (block + 4) // 5
    for number in range(scales.size):
        row, out = values[number * block : number * block + block], packed[number * stride : number * stride + stride]
        scale = _take_scale(row, np.float32(1), scale_min, scale_max, scales[number : number + 1])
        half = scale * np.float32(0.5)
        out[:] = 0
        power = np.uint8(1)
        for plane in range(5):
            digits = row[plane * out.size : plane * out.size + out.size]
            for index in range(digits.size):
                positive, negative = np.uint8(digits[index] >= half), np.uint8(digits[index] <= -half)
                out[index] += np.uint8(power * (positive + negative + negative))
            power = np.uint8(power * np.uint8(3))


@compiled
def _decode_digit(packed: Uint8s, power: Scalar, scale: Scalar, out: Float32s) -> None:
    for index in range(out.size):
        digit = np.uint8(np.uint8(packed[index] // power) % np.uint8(3))
        out[index] = scale if digit == np.uint8(1) else (-scale if digit == np.uint8(2) else _ZERO)


@compiled
def decode_ternary(scales: Float32s, packed: Uint8s, block: int, out: Float32s) -> None:
    """The scale, its negative, or 0."""
    stride = (block + 4) // 5
    for number in range(scales.size):
        scale, target = scales[number], out[number * block : number * block + block]
        row = packed[number * stride : number * stride + stride]
        size = row.size
        # One line for each digit: a division by a constant is a multiplication.
        _decode_digit(row, np.uint8(1), scale, target[:size])
        _decode_digit(row, np.uint8(3), scale, target[size : 2 * size])
        _decode_digit(row, np.uint8(9), scale, target[2 * size : 3 * size])
        _decode_digit(row, np.uint8(27), scale, target[3 * size : 4 * size])
        _decode_digit(row, np.uint8(81), scale, target[4 * size : 5 * size])


@compiled
def has_other_trits(packed: Uint8s, block: int, elements: int) -> bool:
    """Whether a byte is no number of five digits, or has a digit behind its block's last value that is not 0."""
    found = np.uint8(0)
    stride = (block + 4) // 5
    for number in range((elements + block - 1) // block):
        row = packed[number * stride : number * stride + stride]
        width = min(block, elements - number * block)
        limit, power = np.uint8(242), np.int64(81)
        for index in range(row.size):
            found |= np.uint8(row[index] > limit)
        for plane in range(4, 0, -1):
            for index in range(max(width - plane * row.size, 0), row.size):
                found |= np.uint8(row[index] >= power)
            power //= 3
    return bool(found)


# -- blocks with two levels each -------------------------------------------------------------------------------------


@compiled
def _round_mean(total: Scalar, count: Scalar, unit: Scalar) -> Scalar:
    """The mean of whole numbers of units, rounded half up to a whole number and then to bfloat16, as its bits."""
    if count == 0:
        return np.int64(0)
    bits = bits_of(np.float32((2 * total + count) // (2 * count)) * unit)
    return np.int64((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@compiled
def _take_levels(row: Float32s, small: int, large: int, levels: Uint16s) -> None:
    """Write the small level, and the large one with its sign. Sums are of whole numbers: no order matters."""
    peak = np.uint32(0)
    for index in range(row.size):
        peak = max(peak, bits_of(row[index]) & _MAGNITUDE)
    # The peak is below 2^22 units. A unit is a normal number however small the peak is.
    exponent = max(min(peak, _MAGNITUDE_MAX_BITS) >> np.uint32(23), np.uint32(27))
    units = float_of((np.uint32(275) - exponent) << np.uint32(23))
    total = np.int32(0)
    for index in range(row.size):
        size = float_of(min(bits_of(row[index]) & _MAGNITUDE, _MAGNITUDE_MAX_BITS)) * units
        total = np.int32(total + np.int32(size))
    quarters = np.int64(4 * row.size)
    low = np.int32((small * np.int64(total) + quarters - 1) // quarters)
    high = np.int32((large * np.int64(total) + quarters - 1) // quarters)
    middle, middles = np.int32(0), np.int32(0)
    above, aboves, below, belows = np.int32(0), np.int32(0), np.int32(0), np.int32(0)
    for index in range(row.size):
        bits = bits_of(row[index])
        size = np.int32(float_of(min(bits & _MAGNITUDE, _MAGNITUDE_MAX_BITS)) * units)
        is_large = np.int32(size >= high)
        is_middle = np.int32(size >= low) & (np.int32(1) - is_large)
        is_below = is_large & np.int32(bits >> np.uint32(31))
        is_above = is_large - is_below
        middle, middles = np.int32(middle + is_middle * size), np.int32(middles + is_middle)
        above, aboves = np.int32(above + is_above * size), np.int32(aboves + is_above)
        below, belows = np.int32(below + is_below * size), np.int32(belows + is_below)
    levels[0] = levels[1] = 0
    if total > 0:
        unit = float_of((exponent - np.uint32(21)) << np.uint32(23))
        is_negative = below > above
        far, fars = (below, belows) if is_negative else (above, aboves)
        near, nears = (above, aboves) if is_negative else (below, belows)
        largest = _round_mean(far, fars, unit)
        smaller = _round_mean(middle, middles, unit) if middles > 0 else min(_round_mean(near, nears, unit), largest)
        levels[0] = smaller
        levels[1] = largest | (np.int64(0x8000) if is_negative else np.int64(0))


@compiled
def _take_nearest(row: Float32s, levels: Uint16s, packed: Uint8s) -> None:
    """The codes of the nearest levels, the larger one of two: 0, 1 for the small level, 2 for its negative, 3 for the
    large one."""
    small = float_of(np.uint32(levels[0]) << np.uint32(16))
    large = float_of(np.uint32(levels[1] & np.uint16(0x7FFF)) << np.uint32(16))
    side = np.float32(-1) if levels[1] > np.uint16(0x7FFF) else np.float32(1)
    from_small = small * np.float32(0.5) if small > _ZERO else _INFINITY
    from_large = (small + large) * np.float32(0.5) if large > _ZERO else _INFINITY
    packed[:] = 0
    power = np.uint8(1)
    for plane in range(4):
        values = row[plane * packed.size : plane * packed.size + packed.size]
        for index in range(values.size):
            value = values[index]
            sign = np.uint8(value >= from_small) + np.uint8(2) * np.uint8(value <= -from_small)
            code = np.uint8(3) if value * side >= from_large else np.uint8(sign)
            packed[index] |= np.uint8(power * code)
        power = np.uint8(power * np.uint8(4))


@compiled
def encode_stat2(values: Float32s, block: int, small: int, large: int, levels: Uint16s, packed: Uint8s) -> None:
    """Two levels and the codes of every block. Byte i of a block of s bytes has the values i, s + i, 2s + i and 3s + i,
    the first one lowest."""
    stride = (block + 3) // 4
    for number in range(levels.size // 2):
        row, own = values[number * block : number * block + block], levels[2 * number : 2 * number + 2]
        _take_levels(row, small, large, own)
        _take_nearest(row, own, packed[number * stride : number * stride + stride])


@compiled
def _decode_quarter(packed: Uint8s, shift: Scalar, small: Scalar, large: Scalar, out: Float32s) -> None:
    for index in range(out.size):
        code = (np.uint32(packed[index]) >> np.uint32(shift)) & np.uint32(3)
        level = small if code & np.uint32(1) else np.uint32(0)
        level = small | _SIGN if code == np.uint32(2) else level
        out[index] = float_of(np.uint32(large if code == np.uint32(3) else level))


@compiled
def _decode_levels(levels: Uint16s, packed: Uint8s, out: Float32s) -> None:
    small, large = np.uint32(levels[0]) << np.uint32(16), np.uint32(levels[1]) << np.uint32(16)
    size = packed.size
    # One line for each code of a byte: the compiler makes more of a shift by a constant.
    _decode_quarter(packed, 0, small, large, out[:size])
    _decode_quarter(packed, 2, small, large, out[size : 2 * size])
    _decode_quarter(packed, 4, small, large, out[2 * size : 3 * size])
    _decode_quarter(packed, 6, small, large, out[3 * size : 4 * size])


@compiled
def decode_stat2(levels: Uint16s, packed: Uint8s, block: int, out: Float32s) -> None:
    """The small level, its negative, the large level, or 0."""
    stride = (block + 3) // 4
    for number in range(levels.size // 2):
        row = packed[number * stride : number * stride + stride]
        _decode_levels(levels[2 * number : 2 * number + 2], row, out[number * block : number * block + block])


@compiled
def has_other_pairs(packed: Uint8s, block: int, elements: int) -> bool:
    """Whether there is a code behind the last value that is not 0. All four codes mean something."""
    width, stride = elements % block, (elements % block + 3) // 4
    found = np.uint8(0)
    for place in range(width, 4 * stride):
        found |= np.uint8(
            (packed[packed.size - stride + place % stride] >> np.uint8(place // stride * 2)) & np.uint8(3)
        )
    return bool(found)


class BlockKernels(NamedTuple):
    """encode(values, block, low, high, heads, codes), decode(heads, codes, block, out), and has_other_codes(codes,
    block, elements): whether there is a code, or something behind the last one, that no encoder writes. A block of so
    many values has a head: a scale between the limits low and high, or two levels that these two decide about.
    Two that save passes, None where a codec has none: split, as `encode`, leaves in `values` what the code loses;
    add(heads, codes, block, factor, total) is `decode` and then `add_scaled`."""

    encode: Callable[[Float32s, int, Any, Any, Any, Uint8s], None]
    decode: Callable[[Any, Uint8s, int, Float32s], None]
    has_other_codes: Callable[[Uint8s, int, int], bool]
    split: Callable[[Float32s, int, Any, Any, Any, Uint8s], None] | None = None
    add: Callable[[Any, Uint8s, int, np.float32, Float32s], None] | None = None


BLOCK_KERNELS: dict[str, BlockKernels] = {
    "int8": BlockKernels(encode_int8, decode_int8, has_other_bytes, split_int8, add_int8),
    "int4": BlockKernels(encode_int4, decode_int4, has_other_nibbles),
    "e3m0": BlockKernels(encode_e3m0, decode_e3m0, has_other_nibbles),
    "ternary": BlockKernels(encode_ternary, decode_ternary, has_other_trits),
    "stat2": BlockKernels(encode_stat2, decode_stat2, has_other_pairs),
}


# -- aggregation -----------------------------------------------------------------------------------------------------


@compiled
def fold_squares(values: Float32s, scratch: Float64s) -> float:
    """The sum of the squares in float64: zeros behind them up to a power of two, the upper half added to the lower one
    until one value is left. `scratch` holds half of that power, one at least."""
    width = 1
    while 2 * width < values.size:
        width *= 2
    upper = max(values.size - width, 0)
    for index in range(upper):
        low, high = np.float64(values[index]), np.float64(values[width + index])
        scratch[index] = low * low + high * high
    for index in range(upper, min(width, values.size)):
        only = np.float64(values[index])
        scratch[index] = only * only
    scratch[min(width, values.size) : width] = 0.0
    while width > 1:
        width //= 2
        for index in range(width):
            scratch[index] = scratch[index] + scratch[width + index]
    return float(scratch[0])


@compiled
def _order(low: Float32s, high: Float32s) -> None:
    for index in range(low.size):
        one, other = low[index], high[index]
        low[index], high[index] = (one, other) if one < other else (other, one)


@compiled
def sort_rows(rows: Float32s) -> None:
    """Sort float32[rows, n] in place so that every column ascends, -0 as +0: Batcher's merge exchange (Knuth, The Art
    of Computer Programming, 5.2.2, algorithm M)."""
    count = rows.shape[0]
    for number in range(count):
        row = rows[number]
        for index in range(row.size):
            row[index] = row[index] + _ZERO
    highest = 1
    while 2 * highest < count:
        highest *= 2
    step = highest
    while step > 0 and count > 1:
        reach, rest, distance = highest, 0, step
        while True:
            for number in range(count - distance):
                if number & step == rest:
                    _order(rows[number], rows[number + distance])
            if reach == step:
                break
            distance, rest = reach - step, step
            reach //= 2
        step //= 2
