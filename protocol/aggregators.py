"""Aggregators: how the contributions to one part become one update, and what each contribution weighs.

Weights follow tokens^2 / steps (Decoupled DiLoCo, arXiv 2604.21428) under a cap, because claimed tokens are in the
claimer's hands; norm clipping scales a contribution down to the median norm of its round (Covenant-72B, arXiv
2603.08163). protocol/README.md, "Aggregation", specifies every operation.

Invariants: contributions are summed in roster order, one float32 rounding per operation, so that arrival order and
machine do not matter; an aggregate lies among the contributions that it was made from, up to rounding; it is finite.
"""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from shoal.protocol.codecs import CHUNK_ELEMENTS, Codec, Encoded, Float32s, load_kernels

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

    def aggregate(self, codec: Codec, parts: Sequence[WeightedPart], out: Float32s) -> None:
        """Write the aggregate of `parts`, at least one, in roster order, into contiguous float32[elements]. The parts
        have passed `codec.check_untrusted`, so that this cannot fail half-way."""


class Mean:
    """The weighted mean. One liar moves it as far as its weight goes."""

    __slots__ = ()
    name = "mean"

    def aggregate(self, codec: Codec, parts: Sequence[WeightedPart], out: Float32s) -> None:
        _average(codec, parts, [np.float32(part.weight) for part in parts], out)


class NormClippedMean:
    """The weighted mean of contributions that are first scaled by their clip factors (`clip_factors`)."""

    __slots__ = ()
    name = "norm_clipped_mean"

    def aggregate(self, codec: Codec, parts: Sequence[WeightedPart], out: Float32s) -> None:
        _average(codec, parts, [np.float32(part.weight) * np.float32(part.clip_factor) for part in parts], out)


AGGREGATORS: dict[str, Aggregator] = {"mean": Mean(), "norm_clipped_mean": NormClippedMean()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Reduction:
    """How parts are reduced in a swarm: what comes in, how it is combined, what goes out."""

    codec_in: Codec
    aggregator: Aggregator
    codec_out: Codec

    def reduce_part(self, parts: Sequence[WeightedPart], elements: int) -> memoryview:
        """The encoded update of one part of `elements` values, from at least one member's part in roster order. Raises
        ProtocolError where a part does not decode: check each with `codec_in.check_untrusted` when it arrives, and
        leave out the member whose part fails. Everyone, the owner too, then applies what these bytes decode to."""
        for part in parts:
            self.codec_in.check_untrusted(part.encoded, elements)
        aggregate = np.empty(elements, np.float32)
        self.aggregator.aggregate(self.codec_in, parts, aggregate)
        return self.codec_out.encode(aggregate)


def planned_weights(tokens: Iterable[int], steps: Iterable[int]) -> Float32s:
    """Each member's share of the round, float32[members], summing to 1 up to rounding.

    A member's claim is tokens^2 / steps (both counted as at least 1); it is capped at WEIGHT_MEDIANS_MAX medians, then,
    among SHARES_MIN and more members, at the level where the capped members hold one SHARES_MIN-th of the whole each,
    and lifted to WEIGHT_RATIO_MIN of the largest.
    """
    # Whole numbers divide with one rounding, whatever their size.
    claims = [max(int(t), 1) ** 2 / max(int(s), 1) for t, s in zip(tokens, steps, strict=True)]
    assert claims, "a round has members"
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
    total = 0.0
    squares = np.empty(CHUNK_ELEMENTS, np.float64)
    for start in range(0, values.size, CHUNK_ELEMENTS):
        chunk = values[start : start + CHUNK_ELEMENTS]
        squares[chunk.size :] = 0
        np.copyto(squares[: chunk.size], chunk)
        np.multiply(squares, squares, out=squares)
        total += _fold(squares)
    return total


def _fold(values: NDArray[np.float64]) -> float:
    """The sum of a power of two of values, the upper half added onto the lower until one is left."""
    while (half := values.size // 2) > 0:
        np.add(values[:half], values[half:], out=values[:half])
        values = values[:half]
    return float(values[0])


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


def _average(codec: Codec, parts: Sequence[WeightedPart], factors: Sequence[np.float32], out: Float32s) -> None:
    """out = (sum of factor * decoded) / (sum of weights); a chunk stays in cache while every member is added to it."""
    assert parts and all(0 < part.weight <= 1 and 0 <= part.clip_factor <= 1 for part in parts), "shares of a plan"
    weights = np.float32(0)
    for part in parts:
        weights = weights + np.float32(part.weight)
    add_scaled = load_kernels().add_scaled
    scratch = np.empty(min(out.size, CHUNK_ELEMENTS), np.float32)
    for start in range(0, out.size, CHUNK_ELEMENTS):
        total = out[start : start + CHUNK_ELEMENTS]
        total.fill(0)
        term = scratch[: total.size]
        for part, factor in zip(parts, factors, strict=True):
            codec.decode_range(part.encoded, out.size, start, term)
            add_scaled(term, factor, total)
        np.divide(total, weights, out=total)
