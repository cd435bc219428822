"""Codecs: how float32 values travel, at a fixed rate, and what comes back at every peer to the bit.

Every value that a codec yields is finite and at most its `magnitude_max`; larger input saturates, and error feedback
(Seide et al., "1-Bit Stochastic Gradient Descent", 2014; Karimireddy et al., arXiv 1901.09847) carries the rest over.
protocol/README.md, "Codecs", specifies the bytes.

Invariants: encoding and decoding are elementwise IEEE 754 operations in a fixed order, one rounding each, nothing fused
and nothing summed, so that every machine gets the same bytes; whatever `encode` yields, `decode_untrusted` accepts;
temporary memory is bounded by CHUNK_ELEMENTS.
"""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from shoal.protocol.errors import ProtocolError, Refusal

Float32s = NDArray[np.float32]
Encoded = bytes | bytearray | memoryview

BLOCK_ELEMENTS = 256
# What is worked on at a time: 256 KiB of float32, so that the passes of a kernel find their operands in the L2 cache.
CHUNK_ELEMENTS = 1 << 16

MAGNITUDE_MAX = 2.0**64
FLOAT16_MAX = 65504.0
INT8_CODE_MAX = 127
# The smallest normal float32. A smaller scale would have too few bits for the error bound to hold.
INT8_SCALE_MIN = 2.0**-126
# 127 times this is below MAGNITUDE_MAX.
INT8_SCALE_MAX = 2.0**57

# Without the sign, floats are ordered like the unsigned integers of the same bits, with infinity and NaN last.
_FLOAT32_MAGNITUDE = np.uint32(0x7FFFFFFF)
_FLOAT32_INFINITY_BITS = 0x7F800000
_FLOAT16_MAGNITUDE = np.uint16(0x7FFF)
_FLOAT16_INFINITY_BITS = 0x7C00
_MAGNITUDE_MAX_BITS = int(np.float32(MAGNITUDE_MAX).view(np.uint32))
_INT8_SCALE_MIN_BITS = int(np.float32(INT8_SCALE_MIN).view(np.uint32))
_INT8_SCALE_MAX_BITS = int(np.float32(INT8_SCALE_MAX).view(np.uint32))


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

    def check_untrusted(self, raw: Encoded, elements: int) -> None:
        """Raise ProtocolError unless `raw` decodes to `elements` values within `magnitude_max`."""

    def decode_range(self, raw: Encoded, elements: int, start: int, out: Float32s) -> None:
        """Decode the values start .. start + len(out) of `elements`; `raw` has passed `check_untrusted`, `start` is a
        multiple of BLOCK_ELEMENTS. Called with at most CHUNK_ELEMENTS at a time it needs no memory to speak of."""

    def decode_untrusted(self, raw: Encoded, elements: int, out: Float32s) -> None:
        """Check `raw` and decode all of it into contiguous float32[elements]; raises ProtocolError, and then leaves
        `out` as it was."""


class _ChunkedDecoding:
    """`decode_untrusted` in terms of the two methods that differ between codecs."""

    __slots__ = ()

    def decode_untrusted(self: Codec, raw: Encoded, elements: int, out: Float32s) -> None:
        assert out.size == elements, "one place for every value"
        self.check_untrusted(raw, elements)
        for start in range(0, elements, CHUNK_ELEMENTS):
            self.decode_range(raw, elements, start, out[start : start + CHUNK_ELEMENTS])


class Float32Codec(_ChunkedDecoding):
    """The values themselves, little-endian: nothing is lost."""

    __slots__ = ()
    name = "fp32"
    magnitude_max = MAGNITUDE_MAX

    def encoded_bytes(self, elements: int) -> int:
        return 4 * elements

    def encode(self, values: Float32s, out: memoryview | None = None) -> memoryview:
        target = _target(self, values, out)
        assert is_finite(values), "only finite values have a code"
        np.clip(values, -MAGNITUDE_MAX, MAGNITUDE_MAX, out=np.frombuffer(target, "<f4"))
        return target

    def check_untrusted(self, raw: Encoded, elements: int) -> None:
        _check_length(self, raw, elements)
        peak_bits = _peak_bits(np.frombuffer(raw, "<u4"), _FLOAT32_MAGNITUDE)
        if peak_bits > _MAGNITUDE_MAX_BITS:
            raise _refuse(peak_bits >= _FLOAT32_INFINITY_BITS, "a value")

    def decode_range(self, raw: Encoded, elements: int, start: int, out: Float32s) -> None:
        np.copyto(out, np.frombuffer(raw, "<f4", out.size, 4 * start))


class Float16Codec(_ChunkedDecoding):
    """IEEE 754 binary16, little-endian, rounded half to even."""

    __slots__ = ()
    name = "fp16"
    magnitude_max = FLOAT16_MAX

    def encoded_bytes(self, elements: int) -> int:
        return 2 * elements

    def encode(self, values: Float32s, out: memoryview | None = None) -> memoryview:
        target = _target(self, values, out)
        assert is_finite(values), "only finite values have a code"
        codes = np.frombuffer(target, "<f2")
        scratch = np.empty(min(values.size, CHUNK_ELEMENTS), np.float32)
        for start in range(0, values.size, CHUNK_ELEMENTS):
            chunk = values[start : start + CHUNK_ELEMENTS]
            clipped = np.clip(chunk, -FLOAT16_MAX, FLOAT16_MAX, out=scratch[: chunk.size])
            np.copyto(codes[start : start + CHUNK_ELEMENTS], clipped, casting="same_kind")
        return target

    def check_untrusted(self, raw: Encoded, elements: int) -> None:
        _check_length(self, raw, elements)
        if _peak_bits(np.frombuffer(raw, "<u2"), _FLOAT16_MAGNITUDE) >= _FLOAT16_INFINITY_BITS:
            raise _refuse(True, "a value")

    def decode_range(self, raw: Encoded, elements: int, start: int, out: Float32s) -> None:
        np.copyto(out, np.frombuffer(raw, "<f2", out.size, 2 * start))


class Int8Codec(_ChunkedDecoding):
    """Blocks of 256 values: first the scale of every block, float32 little-endian, then one signed byte per value.

    scale = absmax / 127, at least INT8_SCALE_MIN, at most INT8_SCALE_MAX, and 0 for a block of zeros; code = x / scale
    rounded half to even. Where nothing saturates, abs(x - decoded) <= scale * (1/2 + 2**-16).
    """

    __slots__ = ()
    name = "int8"
    magnitude_max = INT8_CODE_MAX * INT8_SCALE_MAX

    def encoded_bytes(self, elements: int) -> int:
        return 4 * _count_blocks(elements) + elements

    def encode(self, values: Float32s, out: memoryview | None = None) -> memoryview:
        target = _target(self, values, out)
        scales, codes = _split_int8(target, values.size)
        scratch = np.empty(min(values.size, CHUNK_ELEMENTS), np.float32)
        for start, stop, width in _list_spans(0, values.size):
            _encode_int8(
                values[start:stop].reshape(-1, width),
                scales[start // BLOCK_ELEMENTS : _count_blocks(stop)],
                codes[start:stop].reshape(-1, width),
                scratch[: stop - start].reshape(-1, width),
            )
        return target

    def check_untrusted(self, raw: Encoded, elements: int) -> None:
        _check_length(self, raw, elements)
        scales, codes = _split_int8(raw, elements)
        # Seen as unsigned integers, negative numbers are above all positive ones: one comparison finds both kinds.
        bits = scales.view("<u4")
        if np.any((bits != 0) & (bits < _INT8_SCALE_MIN_BITS)) or bits.max() > _INT8_SCALE_MAX_BITS:
            raise _refuse(not np.isfinite(scales).all(), "a scale")
        if codes.min() < -INT8_CODE_MAX:
            raise _refuse(False, "a code")

    def decode_range(self, raw: Encoded, elements: int, start: int, out: Float32s) -> None:
        assert start % BLOCK_ELEMENTS == 0, "a range starts with a block"
        scales, codes = _split_int8(raw, elements)
        for first, last, width in _list_spans(start, start + out.size):
            values = out[first - start : last - start].reshape(-1, width)
            np.copyto(values, codes[first:last].reshape(-1, width))
            factors = scales[first // BLOCK_ELEMENTS : _count_blocks(last)]
            np.multiply(values, factors[:, np.newaxis], out=values)


CODECS: dict[str, Codec] = {"fp32": Float32Codec(), "fp16": Float16Codec(), "int8": Int8Codec()}


def is_encodable(values: Float32s) -> bool:
    """Whether every value is finite and at most MAGNITUDE_MAX: what a trainer's pseudo-gradient must be before it is
    encoded. Anything larger comes from a run that has diverged."""
    return _peak_bits(values.view(np.uint32), _FLOAT32_MAGNITUDE) <= _MAGNITUDE_MAX_BITS


def is_finite(values: Float32s) -> bool:
    """Whether there is neither an infinity nor a NaN."""
    return _peak_bits(values.view(np.uint32), _FLOAT32_MAGNITUDE) < _FLOAT32_INFINITY_BITS


def encode_with_feedback(
    codec: Codec, delta: Float32s, residual: Float32s, residual_next: Float32s, out: memoryview | None = None
) -> memoryview:
    """Encode produced = delta + residual, and write what the code loses into `residual_next`.

    `delta` is encodable (`is_encodable`); `residual_next` may be `delta`'s memory, never `residual`'s: the caller keeps
    both until the round is certified with this peer in it, and only then commits the new one.

    decoded + residual_next == produced, exactly: where a code is not 0, half of it <= produced <= twice it, and such a
    difference is a float32 (Sterbenz's lemma); where it is 0, the residual is `produced`. Past `magnitude_max` this
    holds up to 2**81 (int8) and 2**29 (fp16), and to a rounding beyond. -0 comes back as +0.
    """
    assert delta.size == residual.size == residual_next.size, "one residual for every value"
    assert not np.may_share_memory(residual, residual_next), "the residual outlives an attempt that fails"
    np.add(delta, residual, out=residual_next)
    encoded = codec.encode(residual_next, out)
    scratch = np.empty(min(delta.size, CHUNK_ELEMENTS), np.float32)
    for start in range(0, delta.size, CHUNK_ELEMENTS):
        chunk = residual_next[start : start + CHUNK_ELEMENTS]
        decoded = scratch[: chunk.size]
        codec.decode_range(encoded, delta.size, start, decoded)
        np.subtract(chunk, decoded, out=chunk)
    return encoded


def _encode_int8(values: Float32s, scales: Float32s, codes: NDArray[np.int8], scratch: Float32s) -> None:
    """Encode the rows of `values`, one block each."""
    magnitudes = np.bitwise_and(values.view(np.uint32), _FLOAT32_MAGNITUDE, out=scratch.view(np.uint32))
    peaks = magnitudes.max(axis=1).view(np.float32)
    assert np.isfinite(peaks).all(), "only finite values have a code"
    rows = np.clip(peaks / np.float32(INT8_CODE_MAX), np.float32(INT8_SCALE_MIN), np.float32(INT8_SCALE_MAX))
    np.divide(values, rows[:, np.newaxis], out=scratch)
    np.rint(scratch, out=scratch)
    if peaks.max() > INT8_CODE_MAX * INT8_SCALE_MAX:
        np.clip(scratch, -INT8_CODE_MAX, INT8_CODE_MAX, out=scratch)
    np.copyto(codes, scratch, casting="unsafe")
    rows[peaks == 0] = 0
    np.copyto(scales, rows)


def _split_int8(raw: Encoded, elements: int) -> tuple[Float32s, NDArray[np.int8]]:
    blocks = _count_blocks(elements)
    return np.frombuffer(raw, "<f4", blocks), np.frombuffer(raw, np.int8, elements, 4 * blocks)


def _count_blocks(elements: int) -> int:
    return -(-elements // BLOCK_ELEMENTS)


def _list_spans(start: int, stop: int) -> list[tuple[int, int, int]]:
    """(first, last, width) from start to stop: chunks of whole blocks, then the last block where it is not full."""
    whole = stop - stop % BLOCK_ELEMENTS
    spans = [
        (first, min(first + CHUNK_ELEMENTS, whole), BLOCK_ELEMENTS) for first in range(start, whole, CHUNK_ELEMENTS)
    ]
    return [*spans, (whole, stop, stop - whole)] if whole < stop else spans


def _target(codec: Codec, values: Float32s, out: memoryview | None) -> memoryview:
    assert values.dtype == np.float32 and values.ndim == 1 and values.flags.c_contiguous, "contiguous float32[n]"
    assert values.size > 0, "a part has elements"
    size = codec.encoded_bytes(values.size)
    target = memoryview(bytearray(size)) if out is None else out
    assert target.nbytes == size, f"{codec.name} writes {size} bytes"
    return target


def _peak_bits(bits: NDArray[np.uint32] | NDArray[np.uint16], magnitude: np.uint32 | np.uint16) -> int:
    """The bits of the largest magnitude, 0 for an empty vector."""
    scratch = np.empty(min(bits.size, CHUNK_ELEMENTS), bits.dtype)
    peak = 0
    for start in range(0, bits.size, CHUNK_ELEMENTS):
        chunk = bits[start : start + CHUNK_ELEMENTS]
        peak = max(peak, int(np.bitwise_and(chunk, magnitude, out=scratch[: chunk.size]).max()))
    return peak


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
