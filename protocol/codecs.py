"""Codecs: how float32 values travel, at a fixed rate, and what comes back at every peer to the bit.

Every value that a codec yields is finite and at most its `magnitude_max`; larger input saturates, and error feedback
(Seide et al., "1-Bit Stochastic Gradient Descent", 2014; Karimireddy et al., arXiv 1901.09847) carries the rest over.
protocol/README.md, "Codecs", specifies the bytes; the loops are in protocol/kernels.py.

Invariants: encoding and decoding are elementwise IEEE 754 operations in a fixed order, one rounding each, nothing fused
and nothing summed, so that every machine gets the same bytes; whatever `encode` yields, `decode_untrusted` accepts;
no temporary memory grows with the vector.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from shoal.protocol.errors import ProtocolError, Refusal

Float32s = NDArray[np.float32]
Encoded = bytes | bytearray | memoryview

BLOCK_ELEMENTS = 256
HEAD_BYTES = 4
# Of a chunk of so many values one of each share is kept.
SPARSE_CHUNK_ELEMENTS, SPARSE_SHARE = 4096, 64
SPARSE_CHOSEN = SPARSE_CHUNK_ELEMENTS // SPARSE_SHARE
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
# The smallest level: a mean counts in units of at least this.
LEVEL_MIN = 2.0**-121

# Without the sign, floats are ordered like the unsigned integers of the same bits, with infinity and NaN last.
_FLOAT32_INFINITY_BITS = 0x7F800000
_MAGNITUDE_MAX_BITS = int(np.float32(MAGNITUDE_MAX).view(np.uint32))


def load_kernels() -> ModuleType:
    """Imported by whoever computes, and not by a relay or a command."""
    from shoal.protocol import kernels

    return kernels


def load_sparse_kernels() -> ModuleType:
    """As `load_kernels`, of the sparse codecs."""
    from shoal.protocol import sparse_kernels

    return sparse_kernels


class Codec(Protocol):
    """A fixed-rate code for float32 vectors. Instances hold no state: one serves all threads."""

    @property
    def name(self) -> str: ...

    @property
    def magnitude_max(self) -> float:
        """The largest magnitude that a decoded value can have."""

    @property
    def is_sparse(self) -> bool:
        """Whether most values decode to 0."""

    @property
    def block_elements(self) -> int:
        """Ranges of a vector begin and end at multiples of this, or with the vector."""

    def encoded_bytes(self, elements: int) -> int:
        """How many bytes `elements` values take, whatever they are."""

    def encode(self, values: Float32s, out: memoryview | None = None) -> memoryview:
        """Write finite, contiguous float32[n] into `out`, `encoded_bytes(n)` writable bytes, or into new memory."""

    def encode_range(self, values: Float32s, elements: int, start: int, out: memoryview) -> None:
        """Write values start .. start + len(values) of `elements` to their places in `out`: blocks of `block_elements`,
        whole but for the last one of all."""

    def split_range(self, values: Float32s, elements: int, start: int, out: memoryview, scratch: Float32s) -> None:
        """As `encode_range`, and `values` is then what the code loses: value - decoded, each rounded. `scratch` is as
        long; what it holds afterwards is arbitrary."""

    def check_untrusted(self, raw: Encoded, elements: int) -> None:
        """Raise ProtocolError unless `raw` decodes to `elements` values within `magnitude_max`."""

    def decode_range(self, raw: Encoded, elements: int, start: int, out: Float32s) -> None:
        """Decode the values start .. start + len(out) of `elements`: blocks of `block_elements`, whole but for the last
        one of all. `raw` has passed `check_untrusted`."""

    def add_range(
        self, raw: Encoded, elements: int, start: int, factor: np.float32, total: Float32s, scratch: Float32s
    ) -> None:
        """total = total + decoded * factor, rounded after each operation, for the values that `decode_range` would
        write. `scratch` is as long as `total`; what it holds afterwards is arbitrary."""

    def decode_untrusted(self, raw: Encoded, elements: int, out: Float32s) -> None:
        """Check `raw` and decode all of it into contiguous float32[elements]; raises ProtocolError, and then leaves
        `out` as it was."""


class _WholeVectors:
    """What all codecs have, in terms of the methods that differ between them."""

    __slots__ = ()
    is_sparse: ClassVar[bool] = False

    def encode(self: Codec, values: Float32s, out: memoryview | None = None) -> memoryview:
        target = _target(self, values, out)
        self.encode_range(values, values.size, 0, target)
        return target

    def split_range(
        self: Codec, values: Float32s, elements: int, start: int, out: memoryview, scratch: Float32s
    ) -> None:
        self.encode_range(values, elements, start, out)
        self.decode_range(out, elements, start, scratch)
        np.subtract(values, scratch, out=values)

    def add_range(
        self: Codec, raw: Encoded, elements: int, start: int, factor: np.float32, total: Float32s, scratch: Float32s
    ) -> None:
        self.decode_range(raw, elements, start, scratch)
        load_kernels().add_scaled(scratch, factor, total)

    def decode_untrusted(self: Codec, raw: Encoded, elements: int, out: Float32s) -> None:
        assert out.size == elements, "one place for every value"
        self.check_untrusted(raw, elements)
        self.decode_range(raw, elements, 0, out)


class Float32Codec(_WholeVectors):
    """The values themselves, little-endian: nothing is lost."""

    __slots__ = ()
    name = "fp32"
    magnitude_max = MAGNITUDE_MAX
    block_elements = 1

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
    block_elements: int = 1

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
class _BlockCodec(_WholeVectors, ABC):
    """Blocks of values: first a head of 4 bytes for every block, little-endian, then the codes of every block,
    `codes_per_byte` in a byte. What a code means is in `kernels.BLOCK_KERNELS`."""

    name: str
    magnitude_max: float
    codes_per_byte: int
    block_elements: int = BLOCK_ELEMENTS
    _head: ClassVar[str]  # the type of the numbers that a head consists of

    def encoded_bytes(self, elements: int) -> int:
        return HEAD_BYTES * self._count_blocks(elements) + self._codes_bytes(elements)

    def encode_range(self, values: Float32s, elements: int, start: int, out: memoryview) -> None:
        self._encode(load_kernels().BLOCK_KERNELS[self.name].encode, values, elements, start, out)

    def split_range(self, values: Float32s, elements: int, start: int, out: memoryview, scratch: Float32s) -> None:
        split = load_kernels().BLOCK_KERNELS[self.name].split
        if split is None:
            _WholeVectors.split_range(self, values, elements, start, out, scratch)
        else:
            self._encode(split, values, elements, start, out)

    def _encode(
        self, kernel: Callable[..., None], values: Float32s, elements: int, start: int, out: memoryview
    ) -> None:
        assert is_finite(values), "only finite values have a code"
        heads_place, codes_place = self._places(elements, start, values.size)
        heads, codes = np.frombuffer(out, self._head, *heads_place), np.frombuffer(out, np.uint8, *codes_place)
        kernel(values, self.block_elements, *self._limits, heads, codes)

    def check_untrusted(self, raw: Encoded, elements: int) -> None:
        _check_length(self, raw, elements)
        (count, _), codes_place = self._places(elements, 0, elements)
        self._check_heads(np.frombuffer(raw, self._head, count))
        codes = _read(raw, np.uint8, *codes_place)
        if load_kernels().BLOCK_KERNELS[self.name].has_other_codes(codes, self.block_elements, elements):
            raise _refuse(False, "a code")

    def decode_range(self, raw: Encoded, elements: int, start: int, out: Float32s) -> None:
        heads, codes = self._read_blocks(raw, elements, start, out.size)
        load_kernels().BLOCK_KERNELS[self.name].decode(heads, codes, self.block_elements, out)

    def add_range(
        self, raw: Encoded, elements: int, start: int, factor: np.float32, total: Float32s, scratch: Float32s
    ) -> None:
        add = load_kernels().BLOCK_KERNELS[self.name].add
        if add is None:
            _WholeVectors.add_range(self, raw, elements, start, factor, total, scratch)
            return
        heads, codes = self._read_blocks(raw, elements, start, total.size)
        add(heads, codes, self.block_elements, factor, total)

    def _read_blocks(self, raw: Encoded, elements: int, start: int, count: int) -> tuple[NDArray[Any], NDArray[Any]]:
        heads_place, codes_place = self._places(elements, start, count)
        return _read(raw, self._head, *heads_place), _read(raw, np.uint8, *codes_place)

    @property
    @abstractmethod
    def _limits(self) -> tuple[Any, Any]:
        """What a kernel needs to make a head."""

    @abstractmethod
    def _check_heads(self, heads: NDArray[Any]) -> None:
        """Raise ProtocolError unless an encoder may write all of them."""

    def _places(self, elements: int, start: int, count: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """How many numbers of heads and bytes of codes a range has, and at which byte each begin."""
        is_whole = count % self.block_elements == 0 or start + count == elements
        assert start % self.block_elements == 0 and is_whole, "a range starts and ends with a block"
        heads = self._count_blocks(count) * HEAD_BYTES // np.dtype(self._head).itemsize
        codes_start = HEAD_BYTES * self._count_blocks(elements) + self._codes_bytes(start)
        return (heads, HEAD_BYTES * self._count_blocks(start)), (self._codes_bytes(count), codes_start)

    def _count_blocks(self, elements: int) -> int:
        return -(-elements // self.block_elements)

    def _codes_bytes(self, elements: int) -> int:
        blocks, rest = divmod(elements, self.block_elements)
        return blocks * -(-self.block_elements // self.codes_per_byte) - (-rest // self.codes_per_byte)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleCodec(_BlockCodec):
    """A block's head is its scale, a float32: 0 for a block of zeros, else between `scale_min` and `scale_max`."""

    scale_min: float
    scale_max: float
    _head: ClassVar[str] = "<f4"

    @property
    def _limits(self) -> tuple[Any, Any]:
        return np.float32(self.scale_min), np.float32(self.scale_max)

    def _check_heads(self, heads: NDArray[Any]) -> None:
        # Seen as unsigned integers, negative numbers are above all positive ones: one comparison finds both kinds.
        bits, lowest, highest = heads.view("<u4"), _bits_of(self.scale_min), _bits_of(self.scale_max)
        if np.any((bits != 0) & (bits < lowest)) or bits.max() > highest:
            raise _refuse(not np.isfinite(heads).all(), "a scale")


@dataclass(frozen=True, slots=True, kw_only=True)
class LevelCodec(_BlockCodec):
    """A block's head is two levels, bfloat16: a small one, which codes have with either sign, and a large one, which
    has a sign of its own. Either is 0, or its magnitude is between LEVEL_MIN and MAGNITUDE_MAX.

    They are the means of what lies between `small_quarters` and `large_quarters` quarters of the mean magnitude, and of
    what lies beyond on the side that has more of it.
    """

    small_quarters: int
    large_quarters: int
    _head: ClassVar[str] = "<u2"

    @property
    def _limits(self) -> tuple[Any, Any]:
        return self.small_quarters, self.large_quarters

    def _check_heads(self, heads: NDArray[Any]) -> None:
        magnitudes = heads & np.uint16(0x7FFF)
        lowest, highest = _bits_of(LEVEL_MIN) >> 16, _bits_of(MAGNITUDE_MAX) >> 16
        is_other = ((magnitudes < lowest) & (heads != 0)) | (magnitudes > highest)
        if is_other.any() or np.any(heads[::2] > 0x7FFF):
            raise _refuse(bool(np.any(magnitudes >= BF16.infinity_bits)), "a level")


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseCodec(_WholeVectors):
    """Of every chunk of 4,096 values the 64 largest magnitudes, one of 64 in a shorter one (SparseLoCo, arXiv
    2508.15706): first these, in the order in which they stand, in `chosen`'s code, whose blocks are the chunks; then
    their places, 12 bits each. All others decode to 0."""

    name: str
    chosen: Codec
    is_sparse: ClassVar[bool] = True
    block_elements: ClassVar[int] = SPARSE_CHUNK_ELEMENTS

    @property
    def magnitude_max(self) -> float:
        return self.chosen.magnitude_max

    def encoded_bytes(self, elements: int) -> int:
        return self.chosen.encoded_bytes(_count_chosen(elements)) + _places_bytes(elements)

    def encode_range(self, values: Float32s, elements: int, start: int, out: memoryview) -> None:
        assert is_finite(values), "only finite values have a code"
        head, tail = self._split(out, elements)
        sizes, places = np.empty(SPARSE_CHUNK_ELEMENTS, np.uint32), np.empty(SPARSE_CHUNK_ELEMENTS, np.uint16)
        for first, span, packed_place in _list_spans(values.size, elements, start):
            own = values[first : first + span]
            chosen, packed = np.empty(_count_chosen(span), np.float32), np.frombuffer(tail, np.uint8, *packed_place)
            choose = load_sparse_kernels().choose
            choose(own, SPARSE_CHUNK_ELEMENTS, SPARSE_SHARE, sizes, places, chosen, packed)
            self.chosen.encode_range(chosen, _count_chosen(elements), _count_chosen(start + first), head)

    def check_untrusted(self, raw: Encoded, elements: int) -> None:
        _check_length(self, raw, elements)
        head, tail = self._split(memoryview(raw), elements)
        self.chosen.check_untrusted(head, _count_chosen(elements))
        has_other_places = load_sparse_kernels().has_other_places
        if has_other_places(_read(tail, np.uint8), SPARSE_CHUNK_ELEMENTS, SPARSE_SHARE, elements):
            raise _refuse(False, "a place")

    def decode_range(self, raw: Encoded, elements: int, start: int, out: Float32s) -> None:
        head, tail = self._split(memoryview(raw), elements)
        for first, span, packed_place in _list_spans(out.size, elements, start):
            chosen = np.empty(_count_chosen(span), np.float32)
            self.chosen.decode_range(head, _count_chosen(elements), _count_chosen(start + first), chosen)
            packed, own = _read(tail, np.uint8, *packed_place), out[first : first + span]
            load_sparse_kernels().scatter(chosen, packed, SPARSE_CHUNK_ELEMENTS, SPARSE_SHARE, own)

    def _split(self, raw: memoryview, elements: int) -> tuple[memoryview, memoryview]:
        """The chosen values' code, and their places."""
        nbytes = self.chosen.encoded_bytes(_count_chosen(elements))
        return raw[:nbytes], raw[nbytes:]


# IEEE 754 binary16.
FP16 = HalfCodec(name="fp16", magnitude_max=FLOAT16_MAX, peak_bits_max=0x7BFF, infinity_bits=0x7C00)
# The upper half of a float32: 8 bits of precision, and float32's range.
BF16 = HalfCodec(
    name="bf16", magnitude_max=MAGNITUDE_MAX, peak_bits_max=_MAGNITUDE_MAX_BITS >> 16, infinity_bits=0x7F80
)
# scale = absmax / 127, code = x / scale rounded half to even: abs(x - decoded) <= scale * (1/2 + 2**-16).
INT8 = ScaleCodec(
    name="int8",
    magnitude_max=INT8_CODE_MAX * INT8_SCALE_MAX,
    scale_min=SCALE_MIN,
    scale_max=INT8_SCALE_MAX,
    codes_per_byte=1,
)
# The same with 7 for 127.
INT4 = ScaleCodec(
    name="int4",
    magnitude_max=INT4_CODE_MAX * INT4_SCALE_MAX,
    scale_min=SCALE_MIN,
    scale_max=INT4_SCALE_MAX,
    codes_per_byte=2,
)
# A sign and one of seven powers of two, or 0 (Streaming DiLoCo, arXiv 2501.18512): scale = absmax, and abs(x - decoded)
# <= max(abs(x) / 3, scale / 128).
E3M0 = ScaleCodec(
    name="e3m0", magnitude_max=MAGNITUDE_MAX, scale_min=E3M0_SCALE_MIN, scale_max=MAGNITUDE_MAX, codes_per_byte=2
)
# 0, or the block's largest magnitude with a sign, whichever is nearer (TernGrad, arXiv 1705.07878, with error feedback
# where it has random rounding): abs(x - decoded) <= scale / 2 + 2**-150.
TERNARY = ScaleCodec(
    name="ternary", magnitude_max=MAGNITUDE_MAX, scale_min=SCALE_MIN, scale_max=MAGNITUDE_MAX, codes_per_byte=5
)
# 0, or one of three levels that follow from the block's means, whichever is nearest: abs(x - decoded) <= abs(x),
# whatever else is in the block. docs/design.md, "Numbers", has the errors of other such codes.
STAT2 = LevelCodec(name="stat2", magnitude_max=MAGNITUDE_MAX, codes_per_byte=4, small_quarters=3, large_quarters=10)
# Whatever is left out is at most as large as the smallest that is chosen.
TOPK8 = SparseCodec(name="topk8", chosen=replace(INT8, block_elements=SPARSE_CHOSEN))
# The magnitudes of what is chosen lie closer to their mean than those of a whole block.
TOPK2 = SparseCodec(
    name="topk2", chosen=replace(STAT2, block_elements=SPARSE_CHOSEN, small_quarters=2, large_quarters=5)
)

CODECS: dict[str, Codec] = {
    one.name: one for one in (Float32Codec(), FP16, BF16, INT8, INT4, E3M0, TERNARY, STAT2, TOPK8, TOPK2)
}
# What a sparse code leaves out is made good by error feedback, which updates have not.
UPDATE_CODECS = tuple(name for name, codec in CODECS.items() if not codec.is_sparse)


def take_fresh(nbytes: int) -> memoryview:
    """New memory of so many bytes, writable; what it holds is arbitrary."""
    return np.empty(nbytes, np.uint8).data


def is_encodable(values: Float32s) -> bool:
    """Whether every value is finite and at most MAGNITUDE_MAX: what a trainer's pseudo-gradient must be before it is
    encoded. Anything larger comes from a run that has diverged."""
    return bool(load_kernels().peak_bits(values.view(np.uint32)) <= _MAGNITUDE_MAX_BITS)


def is_finite(values: Float32s) -> bool:
    """Whether there is neither an infinity nor a NaN."""
    return bool(load_kernels().peak_bits(values.view(np.uint32)) < _FLOAT32_INFINITY_BITS)


def encode_with_feedback(
    codec: Codec,
    delta: Float32s,
    residual: Float32s,
    residual_next: Float32s,
    out: memoryview | None = None,
    *,
    kept: float = 1.0,
) -> memoryview:
    """Encode produced = delta + kept * residual, and write what the code loses into `residual_next`. `kept` is rounded
    to float32; 1 is error feedback as it is proved, less is the decay of SparseLoCo (arXiv 2508.15706, beta).

    `delta` is encodable (`is_encodable`); `residual_next` may be `delta`'s memory, never `residual`'s: the caller keeps
    both until the round is certified with this peer in it, and only then commits the new one.

    decoded + residual_next == produced, exactly: where a code is not 0, half of it <= produced <= twice it, and such a
    difference is a float32 (Sterbenz's lemma), or the difference is no larger than `produced` and has no finer last
    place; where it is 0, the residual is `produced`. Past `magnitude_max` this
    holds up to 2**81 (int8), 2**85 (int4), 2**29 (fp16), 2**71 (stat2) and 2**88 (the
    others), and to a rounding beyond. -0 comes back
    as +0.
    """
    assert delta.size == residual.size == residual_next.size, "one residual for every value"
    assert not np.may_share_memory(residual, residual_next), "the residual outlives an attempt that fails"
    target = _target(codec, delta, out)
    scratch = np.empty(min(delta.size, CHUNK_ELEMENTS), np.float32)
    # One chunk after the other, so that all passes but the first find it in the cache.
    for start in range(0, delta.size, CHUNK_ELEMENTS):
        stop = start + CHUNK_ELEMENTS
        chunk = residual_next[start:stop]
        add_residual(delta[start:stop], residual[start:stop], kept, chunk, scratch[: chunk.size])
        codec.split_range(chunk, delta.size, start, target, scratch[: chunk.size])
    return target


def add_residual(delta: Float32s, residual: Float32s, kept: float, out: Float32s, scratch: Float32s) -> None:
    """out = delta + kept * residual, rounded after each operation; `kept` 1 is none. All are of one length, `out` may
    be `delta`, and what `scratch` holds afterwards is arbitrary."""
    carried = residual if kept == 1.0 else np.multiply(residual, np.float32(kept), out=scratch)
    np.add(delta, carried, out=out)


def _read(raw: Encoded, dtype: Any, count: int = -1, offset: int = 0) -> NDArray[Any]:
    """A view that cannot be written: the kernels are compiled for one kind of it."""
    return np.frombuffer(memoryview(raw).toreadonly(), dtype, count, offset)


def _bits_of(value: float) -> int:
    return int(np.float32(value).view(np.uint32))


def _target(codec: Codec, values: Float32s, out: memoryview | None) -> memoryview:
    assert values.dtype == np.float32 and values.ndim == 1 and values.flags.c_contiguous, "contiguous float32[n]"
    assert values.size > 0, "a part has elements"
    size = codec.encoded_bytes(values.size)
    target = take_fresh(size) if out is None else out
    assert target.nbytes == size, f"{codec.name} writes {size} bytes"
    return target


def _count_chosen(elements: int) -> int:
    return -(-elements // SPARSE_SHARE)


def _places_bytes(elements: int) -> int:
    """Of 12 bits for each chosen value; a chunk's begin with a byte."""
    chunks, rest = divmod(elements, SPARSE_CHUNK_ELEMENTS)
    return chunks * ((3 * SPARSE_CHOSEN + 1) // 2) + (3 * _count_chosen(rest) + 1) // 2


def _list_spans(count: int, elements: int, start: int) -> Iterator[tuple[int, int, tuple[int, int]]]:
    """What of a range is worked on at a time: its first value in the range, how many there are, and how many bytes of
    places it has from which one on."""
    is_whole = count % SPARSE_CHUNK_ELEMENTS == 0 or start + count == elements
    assert start % SPARSE_CHUNK_ELEMENTS == 0 and is_whole, "a range starts and ends with a block"
    for first in range(0, count, CHUNK_ELEMENTS):
        span = min(CHUNK_ELEMENTS, count - first)
        yield first, span, (_places_bytes(span), _places_bytes(start + first))


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
