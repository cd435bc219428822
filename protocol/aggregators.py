"""Aggregators: how the contributions to one part become one update, and what each contribution weighs.

Weights follow tokens^2 / steps (Decoupled DiLoCo, arXiv 2604.21428) under a cap, because claimed tokens are in the
claimer's hands; norm clipping scales a contribution down to the median norm of its round (Covenant-72B, arXiv
2603.08163). protocol/README.md, "Aggregation", specifies every operation.

Invariants: contributions are summed in roster order, one float32 rounding per operation, so that arrival order and
machine do not matter; an aggregate lies among the contributions that it was made from, up to rounding; it is finite.
"""

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from shoal.protocol.codecs import CHUNK_ELEMENTS, Codec, Encoded, Float32s, load_kernels, take_fresh

# How often the center moves.
CLIP_STEPS = 3
# What is sorted at a time, over all members: 1 MiB of float32.
SORTED_ELEMENTS = 1 << 18

# No member weighs more than this many medians.
WEIGHT_MEDIANS_MAX = 2
# From so many members on, nobody holds more than one such share of the whole.
SHARES_MIN = 4
# The lightest member weighs this much of the heaviest: too little to matter, and far from where float32 underflows.
WEIGHT_RATIO_MIN = 2.0**-20


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightedPart:
    """One member's encoded part. `weight` and `clip_factor`, in 0 .. 1, are the float32 values of the plan."""

    encoded: Encoded
    weight: float
    clip_factor: float = 1.0


class Aggregator(Protocol):
    """A rule that makes one vector of several. Instances hold no state."""

    @property
    def name(self) -> str: ...

    @property
    def is_by_value(self) -> bool:
        """Whether each value of an aggregate is made of the members' values in its own place alone."""

    def aggregate(
        self, codec: Codec, parts: Sequence[WeightedPart], out: Float32s, start: int = 0, elements: int | None = None
    ) -> None:
        """Write the aggregate of `parts`, at least one, in roster order, into contiguous float32, which is all of it;
        where it is made by value, this may be values start .. start + len(out) of `elements`, `start` a multiple of
        CHUNK_ELEMENTS. The parts have passed `codec.check_untrusted`, so that this cannot fail half-way."""


class Mean:
    """The weighted mean. One liar moves it as far as its weight goes."""

    __slots__ = ()
    name = "mean"
    is_by_value = True

    def aggregate(
        self, codec: Codec, parts: Sequence[WeightedPart], out: Float32s, start: int = 0, elements: int | None = None
    ) -> None:
        factors = [np.float32(part.weight) for part in parts]
        _average(codec, parts, factors, out, start, out.size if elements is None else elements)


class NormClippedMean:
    """The weighted mean of contributions that are first scaled by their clip factors (`clip_factors`)."""

    __slots__ = ()
    name = "norm_clipped_mean"
    is_by_value = True

    def aggregate(
        self, codec: Codec, parts: Sequence[WeightedPart], out: Float32s, start: int = 0, elements: int | None = None
    ) -> None:
        factors = [np.float32(part.weight) * np.float32(part.clip_factor) for part in parts]
        _average(codec, parts, factors, out, start, out.size if elements is None else elements)


class Median:
    """The median of every coordinate, whatever the members weigh: any minority may lie, and all that it gets is a value
    between those of honest members (Yin et al., arXiv 1803.01498)."""

    __slots__ = ()
    name = "median"
    is_by_value = True

    def aggregate(
        self, codec: Codec, parts: Sequence[WeightedPart], out: Float32s, start: int = 0, elements: int | None = None
    ) -> None:
        _check_shares(parts)
        low, high = (len(parts) - 1) // 2, len(parts) // 2
        for target, rows in _sorted_spans(codec, parts, out, start, out.size if elements is None else elements):
            np.add(rows[low], rows[high], out=target)
            np.multiply(target, np.float32(0.5), out=target)


class TrimmedMean:
    """The mean of every coordinate without its smallest and its largest values, a quarter of the members each, whatever
    they weigh (Yin et al., arXiv 1803.01498)."""

    __slots__ = ()
    name = "trimmed_mean"
    is_by_value = True

    def aggregate(
        self, codec: Codec, parts: Sequence[WeightedPart], out: Float32s, start: int = 0, elements: int | None = None
    ) -> None:
        _check_shares(parts)
        trimmed = min(-(-len(parts) // 4), (len(parts) - 1) // 2)
        kept = len(parts) - 2 * trimmed
        for target, rows in _sorted_spans(codec, parts, out, start, out.size if elements is None else elements):
            target.fill(0)
            for row in rows[trimmed : trimmed + kept]:
                np.add(target, row, out=target)
            np.divide(target, np.float32(kept), out=target)


class CenteredClip:
    """From the coordinates' median on, CLIP_STEPS times: towards the weighted mean of the members, none of whom pulls
    harder than the one at the median distance (Karimireddy et al., arXiv 2012.10333; by parts as in BTARD, arXiv
    2106.11257)."""

    __slots__ = ()
    name = "centered_clip"
    is_by_value = False

    def aggregate(
        self, codec: Codec, parts: Sequence[WeightedPart], out: Float32s, start: int = 0, elements: int | None = None
    ) -> None:
        assert not start and elements in (None, out.size), "made of whole vectors"
        MEDIAN.aggregate(codec, parts, out)
        kernels, weights = load_kernels(), _sum_weights(parts)
        term, total = (np.empty(min(out.size, CHUNK_ELEMENTS), np.float32) for _ in range(2))
        for _ in range(CLIP_STEPS):
            pulls = clip_factors([math.sqrt(_squared_distance(codec, part, out, term)) for part in parts])
            for first in range(0, out.size, CHUNK_ELEMENTS):
                center = out[first : first + CHUNK_ELEMENTS]
                away, shift = term[: center.size], total[: center.size]
                shift.fill(0)
                for part, pull in zip(parts, pulls, strict=True):
                    codec.decode_range(part.encoded, out.size, first, away)
                    np.subtract(away, center, out=away)
                    kernels.add_scaled(away, np.float32(part.weight) * pull, shift)
                np.divide(shift, weights, out=shift)
                np.add(center, shift, out=center)


MEDIAN = Median()
AGGREGATORS: dict[str, Aggregator] = {
    one.name: one for one in (Mean(), NormClippedMean(), MEDIAN, TrimmedMean(), CenteredClip())
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Reduction:
    """How parts are reduced in a swarm: what comes in, how it is combined, what goes out."""

    codec_in: Codec
    aggregator: Aggregator
    codec_out: Codec

    def reduce_part(self, parts: Sequence[WeightedPart], elements: int, out: memoryview | None = None) -> memoryview:
        """The encoded update of one part of `elements` values, from at least one member's part in roster order, in
        `out`, of exactly its length, or in new memory. Raises ProtocolError where a part does not decode: check each
        with `codec_in.check_untrusted` when it arrives, and leave out the member whose part fails. Everyone, the owner
        too, then applies what these bytes decode to."""
        for part in parts:
            self.codec_in.check_untrusted(part.encoded, elements)
        size = self.codec_out.encoded_bytes(elements)
        target = take_fresh(size) if out is None else out
        assert target.nbytes == size, "exactly the update's bytes"
        # What is made by value never leaves the cache as float32.
        span = CHUNK_ELEMENTS if self.aggregator.is_by_value else elements
        scratch = np.empty(min(span, elements), np.float32)
        for start in range(0, elements, span):
            aggregate = scratch[: elements - start]
            self.aggregator.aggregate(self.codec_in, parts, aggregate, start, elements)
            self.codec_out.encode_range(aggregate, elements, start, target)
        return target


def planned_weights(tokens: Iterable[int], steps: Iterable[int], factors: Iterable[float] | None = None) -> Float32s:
    """Each member's share of the round, float32[members], summing to 1 up to rounding.

    A member's claim is tokens^2 / steps (both counted as at least 1), times its factor of `factors`, which is positive
    (protocol.attendance), where there are any; it is capped at WEIGHT_MEDIANS_MAX medians, then,
    among SHARES_MIN and more members, at the level where the capped members hold one SHARES_MIN-th of the whole each,
    and lifted to WEIGHT_RATIO_MIN of the largest.
    """
    # Whole numbers divide with one rounding, whatever their size.
    claims = [max(int(t), 1) ** 2 / max(int(s), 1) for t, s in zip(tokens, steps, strict=True)]
    assert claims, "a round has members"
    if factors is not None:
        claims = [claim * factor for claim, factor in zip(claims, factors, strict=True)]
    cap = WEIGHT_MEDIANS_MAX * statistics.median(claims)
    claims = [min(claim, cap) for claim in claims]
    cap = _level(claims)
    claims = [min(claim, cap) for claim in claims]
    floor = WEIGHT_RATIO_MIN * max(claims)
    claims = [max(claim, floor) for claim in claims]
    total = math.fsum(claims)
    return np.array([claim / total for claim in claims], np.float32)


def clip_factors(norms: Iterable[float]) -> Float32s:
    """min(1, median / norm) of every member, float32[members], from the finite, non-negative norms in the plan. Where
    most norms are 0, the others are clipped to nothing."""
    given = [float(norm) for norm in norms]
    assert given and all(0 <= norm < math.inf for norm in given), "a norm is a finite number, 0 or more"
    median = statistics.median(given)
    return np.array([median / norm if norm > median else 1.0 for norm in given], np.float32)


def squared_norm(values: Float32s) -> float:
    """The sum of squares in float64, the same on every machine. The norm of a vector in parts is the square root of the
    sum of this over the parts, in order; whoever has the same values then gets the same bits."""
    fold = load_kernels().fold_squares
    scratch = np.empty(CHUNK_ELEMENTS // 2, np.float64)
    total = 0.0
    for start in range(0, values.size, CHUNK_ELEMENTS):
        total += fold(values[start : start + CHUNK_ELEMENTS], scratch)
    return total


def _level(claims: list[float]) -> float:
    """The cap under which no claim exceeds one SHARES_MIN-th of the sum of all capped claims."""
    highest = max(claims)
    if len(claims) < SHARES_MIN or highest <= math.fsum(claims) / SHARES_MIN:
        return highest
    descending = sorted(claims, reverse=True)
    for capped in range(1, SHARES_MIN):
        # `capped` members at the level, the others below it: level = (capped * level + rest) / SHARES_MIN.
        level = math.fsum(descending[capped:]) / (SHARES_MIN - capped)
        if descending[capped] <= level:
            return level
    raise AssertionError("with all but one share capped, the level is the sum of the rest")


def _average(
    codec: Codec,
    parts: Sequence[WeightedPart],
    factors: Sequence[np.float32],
    out: Float32s,
    start: int,
    elements: int,
) -> None:
    """out = (sum of factor * decoded) / (sum of weights); a chunk stays in cache while every member is added to it."""
    _check_shares(parts)
    weights = _sum_weights(parts)
    scratch = np.empty(min(out.size, CHUNK_ELEMENTS), np.float32)
    for first in range(0, out.size, CHUNK_ELEMENTS):
        total = out[first : first + CHUNK_ELEMENTS]
        total.fill(0)
        term = scratch[: total.size]
        for part, factor in zip(parts, factors, strict=True):
            codec.add_range(part.encoded, elements, start + first, factor, total, term)
        if weights != 1:  # else every quotient is its dividend
            np.divide(total, weights, out=total)


def _check_shares(parts: Sequence[WeightedPart]) -> None:
    assert parts and all(0 < part.weight <= 1 and 0 <= part.clip_factor <= 1 for part in parts), "shares of a plan"


def _sum_weights(parts: Sequence[WeightedPart]) -> np.float32:
    weights = np.float32(0)
    for part in parts:
        weights = weights + np.float32(part.weight)
    return weights


def _sorted_spans(
    codec: Codec, parts: Sequence[WeightedPart], out: Float32s, start: int, elements: int
) -> Iterator[tuple[Float32s, Float32s]]:
    """Stretches of `out`, and float32[members, stretch]: what the members have there, every column ascending."""
    sort = load_kernels().sort_rows
    span = max(SORTED_ELEMENTS // len(parts) // codec.block_elements, 1) * codec.block_elements
    for first in range(0, out.size, span):
        target = out[first : first + span]
        rows = np.empty((len(parts), target.size), np.float32)
        for row, part in zip(rows, parts, strict=True):
            codec.decode_range(part.encoded, elements, start + first, row)
        sort(rows)
        yield target, rows


def _squared_distance(codec: Codec, part: WeightedPart, center: Float32s, scratch: Float32s) -> float:
    """As `squared_norm`, of the member's values less the center's."""
    total = 0.0
    for start in range(0, center.size, CHUNK_ELEMENTS):
        chunk = center[start : start + CHUNK_ELEMENTS]
        away = scratch[: chunk.size]
        codec.decode_range(part.encoded, center.size, start, away)
        np.subtract(away, chunk, out=away)
        total += squared_norm(away)
    return total
