"""Codecs: how float32 values travel, at a fixed rate, and what comes back at every peer to the bit.

Every value that a codec yields is finite and at most its `magnitude_max`; larger input saturates, and error feedback
(Seide et al., "1-Bit Stochastic Gradient Descent", 2014; Karimireddy et al., arXiv 1901.09847) carries the rest over.
protocol/README.md, "Codecs", specifies the bytes; the loops are in protocol/kernels.py.

Invariants: encoding and decoding are elementwise IEEE 754 operations in a fixed order, one rounding each, nothing fused
and nothing summed, so that every machine gets the same bytes; whatever `encode` yields, `decode_untrusted` accepts;
no temporary memory grows with the vector.
"""

from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from shoal.protocol.errors import ProtocolError, Refusal

Float32s = NDArray[np.float32]
Encoded = bytes | bytearray | memoryview

BLOCK_ELEMENTS = 256
# What is worked on at a time where one loop follows another: 256 KiB of float32, which stay in the L2 cache.
CHUNK_ELEMENTS = 1 << 16

MAGNITUDE_MAX = 2.0**64
FLOAT16_MAX = 65504.0
INT8_CODE_MAX = 127
INT4_CODE_MAX = 7
# The smallest normal float32. A smaller scale would have too few bits for the error bounds to hold.
SCALE_MIN = 2.0**-126
# 127 times this, or 7 times that, is below MAGNITUDE_MAX.
INT8_SCALE_MAX = 2.0**57
INT4_SCALE_MAX = 2.0**61
# 2^-6 of this is normal.
E3M0_SCALE_MIN = 2.0**-120

# Without the sign, floats are ordered like the unsigned integers of the same bits, with infinity and NaN last.
_FLOAT32_INFINITY_BITS = 0x7F800000
_MAGNITUDE_MAX_BITS = int(np.float32(MAGNITUDE_MAX).view(np.uint32))


def load_kernels() -> ModuleType:
    """Imported by whoever computes, and not by a relay or a command."""
    from shoal.protocol import kernels

    return kernels


class Codec(Protocol):
    """A fixed-rate code for float32 vectors. Instances hold no state: one serves all threads."""

    @property
    def name(self) -> str: ...

    @property
    def magnitude_max(self) -> float:
        """The largest magnitude that a decoded value can have."""

    def encoded_bytes(self, elements: int) -> int:
        """How many bytes `elements` values take, whatever they are."""

    def encode(self, values: Float32s, out: memoryview | None = None) -> memoryview:
        """Write finite, contiguous float32[n] into `out`, `encoded_bytes(n)` writable bytes, or into new memory."""

    def encode_range(self, values: Float32s, elements: int, start: int, out: memoryview) -> None:
        """Write values start .. start + len(values) of `elements` to their places in `out`: blocks of BLOCK_ELEMENTS,
        whole but for the last one of all."""

    def check_untrusted(self, raw: Encoded, elements: int) -> None:
        """Raise ProtocolError unless `raw` decodes to `elements` values within `magnitude_max`."""

    def decode_range(self, raw: Encoded, elements: int, start: int, out: Float32s) -> None:
        """Decode the values start .. start + len(out) of `elements`: blocks of BLOCK_ELEMENTS, whole but for the last
        one of all. `raw` has passed `check_untrusted`."""

    def decode_untrusted(self, raw: Encoded, elements: int, out: Float32s) -> None:
        """Check `raw` and decode all of it into contiguous float32[elements]; raises ProtocolError, and then leaves
        `out` as it was."""


class _WholeVectors:
    """`encode` and `decode_untrusted` in terms of the methods that differ between codecs."""

    __slots__ = ()

    def encode(self: Codec, values: Float32s, out: memoryview | None = None) -> memoryview:
        target = _target(self, values, out)
        self.encode_range(values, values.size, 0, target)
        return target

    def decode_untrusted(self: Codec, raw: Encoded, elements: int, out: Float32s) -> None:
        assert out.size == elements, "one place for every value"
        self.check_untrusted(raw, elements)
        self.decode_range(raw, elements, 0, out)


class Float32Codec(_WholeVectors):
    """The values themselves, little-endian: nothing is lost."""

    __slots__ = ()
    name = "fp32"
    magnitude_max = MAGNITUDE_MAX

    def encoded_bytes(self, elements: int) -> int:
        return 4 * elements

    def encode_range(self, values: Float32s, elements: int, start: int, out: memoryview) -> None:
        assert is_finite(values), "only finite values have a code"
        load_kernels().clip(values, np.float32(MAGNITUDE_MAX), np.frombuffer(out, "<f4", values.size, 4 * start))

    def check_untrusted(self, raw: Encoded, elements: int) -> None:
        _check_length(self, raw, elements)
        peak_bits = load_kernels().peak_bits(_read(raw, "<u4"))
        if peak_bits > _MAGNITUDE_MAX_BITS:
            raise _refuse(peak_bits >= _FLOAT32_INFINITY_BITS, "a value")

    def decode_range(self, raw: Encoded, elements: int, start: int, out: Float32s) -> None:
        np.copyto(out, np.frombuffer(raw, "<f4", out.size, 4 * start))


@dataclass(frozen=True, slots=True, kw_only=True)
class HalfCodec(_WholeVectors):
    """Floats of 16 bits, little-endian, rounded half to even; the largest magnitude has the bits `peak_bits_max`."""

    name: str
    magnitude_max: float
    peak_bits_max: int
    infinity_bits: int

    def encoded_bytes(self, elements: int) -> int:
        return 2 * elements

    def encode_range(self, values: Float32s, elements: int, start: int, out: memoryview) -> None:
        assert is_finite(values), "only finite values have a code"
        codes = np.frombuffer(out, "<u2", values.size, 2 * start)
        load_kernels().HALF_KERNELS[self.name].encode(values, np.float32(self.magnitude_max), codes)

    def check_untrusted(self, raw: Encoded, elements: int) -> None:
        _check_length(self, raw, elements)
        peak_bits = load_kernels().peak_bits_16(_read(raw, "<u2"))
        if peak_bits > self.peak_bits_max:
            raise _refuse(peak_bits >= self.infinity_bits, "a value")

    def decode_range(self, raw: Encoded, elements: int, start: int, out: Float32s) -> None:
        load_kernels().HALF_KERNELS[self.name].decode(_read(raw, "<u2", out.size, 2 * start), out)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockCodec(_WholeVectors):
    """Blocks of 256 values: first the scale of every block, float32 little-endian, then the codes of every block.

    The scale of a block of zeros is 0, every other one between `scale_min` and `scale_max`; `codes_per_byte` of a block
    are packed into a byte. What a code means is in `kernels.BLOCK_KERNELS`.
    """

    name: str
    magnitude_max: float
    scale_min: float
    scale_max: float
    codes_per_byte: int

    def encoded_bytes(self, elements: int) -> int:
        return 4 * _count_blocks(elements) + self._codes_bytes(elements)

    def encode_range(self, values: Float32s, elements: int, start: int, out: memoryview) -> None:
        assert is_finite(values), "only finite values have a code"
        scales_place, codes_place = self._places(elements, start, values.size)
        scales, codes = np.frombuffer(out, "<f4", *scales_place), np.frombuffer(out, np.uint8, *codes_place)
        kernel = load_kernels().BLOCK_KERNELS[self.name].encode
        kernel(values, np.float32(self.scale_min), np.float32(self.scale_max), scales, codes)

    def check_untrusted(self, raw: Encoded, elements: int) -> None:
        _check_length(self, raw, elements)
        scales = np.frombuffer(raw, "<f4", _count_blocks(elements))
        # Seen as unsigned integers, negative numbers are above all positive ones: one comparison finds both kinds.
        bits, lowest, highest = scales.view("<u4"), _bits_of(self.scale_min), _bits_of(self.scale_max)
        if np.any((bits != 0) & (bits < lowest)) or bits.max() > highest:
            raise _refuse(not np.isfinite(scales).all(), "a scale")
        codes = _read(raw, np.uint8, self._codes_bytes(elements), scales.nbytes)
        if load_kernels().BLOCK_KERNELS[self.name].has_other_codes(codes, elements):
            raise _refuse(False, "a code")

    def decode_range(self, raw: Encoded, elements: int, start: int, out: Float32s) -> None:
        scales_place, codes_place = self._places(elements, start, out.size)
        scales, codes = _read(raw, "<f4", *scales_place), _read(raw, np.uint8, *codes_place)
        load_kernels().BLOCK_KERNELS[self.name].decode(scales, codes, out)

    def _places(self, elements: int, start: int, count: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """How many scales and bytes of codes a range has, and at which byte each begin."""
        is_whole = count % BLOCK_ELEMENTS == 0 or start + count == elements
        assert start % BLOCK_ELEMENTS == 0 and is_whole, "a range starts and ends with a block"
        codes_start = 4 * _count_blocks(elements) + self._codes_bytes(start)
        return (_count_blocks(count), 4 * _count_blocks(start)), (self._codes_bytes(count), codes_start)

    def _codes_bytes(self, elements: int) -> int:
        blocks, rest = divmod(elements, BLOCK_ELEMENTS)
        return blocks * -(-BLOCK_ELEMENTS // self.codes_per_byte) - (-rest // self.codes_per_byte)


# IEEE 754 binary16.
FP16 = HalfCodec(name="fp16", magnitude_max=FLOAT16_MAX, peak_bits_max=0x7BFF, infinity_bits=0x7C00)
# The upper half of a float32: 8 bits of precision, and float32's range.
BF16 = HalfCodec(
    name="bf16", magnitude_max=MAGNITUDE_MAX, peak_bits_max=_MAGNITUDE_MAX_BITS >> 16, infinity_bits=0x7F80
)
# scale = absmax / 127, code = x / scale rounded half to even: abs(x - decoded) <= scale * (1/2 + 2**-16).
INT8 = BlockCodec(
    name="int8",
    magnitude_max=INT8_CODE_MAX * INT8_SCALE_MAX,
    scale_min=SCALE_MIN,
    scale_max=INT8_SCALE_MAX,
    codes_per_byte=1,
)
# The same with 7 for 127.
INT4 = BlockCodec(
    name="int4",
    magnitude_max=INT4_CODE_MAX * INT4_SCALE_MAX,
    scale_min=SCALE_MIN,
    scale_max=INT4_SCALE_MAX,
    codes_per_byte=2,
)
# A sign and one of seven powers of two, or 0 (Streaming DiLoCo, arXiv 2501.18512): scale = absmax, and abs(x - decoded)
# <= max(abs(x) / 3, scale / 128).
E3M0 = BlockCodec(
    name="e3m0", magnitude_max=MAGNITUDE_MAX, scale_min=E3M0_SCALE_MIN, scale_max=MAGNITUDE_MAX, codes_per_byte=2
)
# 0, or the block's largest magnitude with a sign, whichever is nearer (TernGrad, arXiv 1705.07878, with error feedback
# where it has random rounding): abs(x - decoded) <= scale / 2.
TERNARY = BlockCodec(
    name="ternary", magnitude_max=MAGNITUDE_MAX, scale_min=SCALE_MIN, scale_max=MAGNITUDE_MAX, codes_per_byte=5
)

CODECS: dict[str, Codec] = {one.name: one for one in (Float32Codec(), FP16, BF16, INT8, INT4, E3M0, TERNARY)}


def is_encodable(values: Float32s) -> bool:
    """Whether every value is finite and at most MAGNITUDE_MAX: what a trainer's pseudo-gradient must be before it is
    encoded. Anything larger comes from a run that has diverged."""
    return bool(load_kernels().peak_bits(values.view(np.uint32)) <= _MAGNITUDE_MAX_BITS)


def is_finite(values: Float32s) -> bool:
    """Whether there is neither an infinity nor a NaN."""
    return bool(load_kernels().peak_bits(values.view(np.uint32)) < _FLOAT32_INFINITY_BITS)


def encode_with_feedback(
    codec: Codec, delta: Float32s, residual: Float32s, residual_next: Float32s, out: memoryview | None = None
) -> memoryview:
    """Encode produced = delta + residual, and write what the code loses into `residual_next`.

    `delta` is encodable (`is_encodable`); `residual_next` may be `delta`'s memory, never `residual`'s: the caller keeps
    both until the round is certified with this peer in it, and only then commits the new one.

    decoded + residual_next == produced, exactly: where a code is not 0, half of it <= produced <= twice it, and such a
    difference is a float32 (Sterbenz's lemma); where it is 0, the residual is `produced`. Past `magnitude_max` this
    holds up to 2**81 (int8), 2**85 (int4), 2**29 (fp16) and 2**88 (the others), and to a rounding beyond. -0 comes back
    as +0.
    """
    assert delta.size == residual.size == residual_next.size, "one residual for every value"
    assert not np.may_share_memory(residual, residual_next), "the residual outlives an attempt that fails"
    target = _target(codec, delta, out)
    scratch = np.empty(min(delta.size, CHUNK_ELEMENTS), np.float32)
    # One chunk after the other, so that all passes but the first find it in the cache.
    for start in range(0, delta.size, CHUNK_ELEMENTS):
        chunk = residual_next[start : start + CHUNK_ELEMENTS]
        np.add(delta[start : start + CHUNK_ELEMENTS], residual[start : start + CHUNK_ELEMENTS], out=chunk)
        codec.encode_range(chunk, delta.size, start, target)
        decoded = scratch[: chunk.size]
        codec.decode_range(target, delta.size, start, decoded)
        np.subtract(chunk, decoded, out=chunk)
    return target


def _read(raw: Encoded, dtype: Any, count: int = -1, offset: int = 0) -> NDArray[Any]:
    """A view that cannot be written: the kernels are compiled for one kind of it."""
    return np.frombuffer(memoryview(raw).toreadonly(), dtype, count, offset)


def _bits_of(value: float) -> int:
    return int(np.float32(value).view(np.uint32))


def _count_blocks(elements: int) -> int:
    return -(-elements // BLOCK_ELEMENTS)


def _target(codec: Codec, values: Float32s, out: memoryview | None) -> memoryview:
    assert values.dtype == np.float32 and values.ndim == 1 and values.flags.c_contiguous, "contiguous float32[n]"
    assert values.size > 0, "a part has elements"
    size = codec.encoded_bytes(values.size)
    target = memoryview(bytearray(size)) if out is None else out
    assert target.nbytes == size, f"{codec.name} writes {size} bytes"
    return target


def _check_length(codec: Codec, raw: Encoded, elements: int) -> None:
    assert elements > 0, "a part has elements"
    expected = codec.encoded_bytes(elements)
    if memoryview(raw).nbytes != expected:
        detail = f"{memoryview(raw).nbytes} bytes, {codec.name} takes {expected} for {elements} elements"
        raise ProtocolError(Refusal.WRONG_LENGTH, detail)


def _refuse(is_infinite: bool, what: str) -> ProtocolError:
    if is_infinite:
        return ProtocolError(Refusal.NOT_FINITE, f"{what} is infinite or NaN")
    return ProtocolError(Refusal.OUT_OF_RANGE, f"{what} is one that no encoder writes")
