"""The aggregators against a slow reference; convexity; caps that no claim gets around."""

import math
import struct

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from shoal.protocol.aggregators import (
    AGGREGATORS,
    CLIP_STEPS,
    SHARES_MIN,
    WEIGHT_MEDIANS_MAX,
    Aggregator,
    Reduction,
    WeightedPart,
    clip_factors,
    planned_weights,
)
from shoal.protocol.codecs import CODECS, Codec, Encoded, Float32s

MEMBERS_MAX = 64
claims = st.lists(
    st.tuples(st.integers(0, 2**63 - 1) | st.integers(0, 10**6), st.integers(1, 2**40) | st.integers(1, 500)),
    min_size=1,
    max_size=MEMBERS_MAX,
)
aggregators = st.sampled_from(sorted(AGGREGATORS)).map(AGGREGATORS.__getitem__)
codecs = st.sampled_from(sorted(CODECS)).map(CODECS.__getitem__)


def to_float32(value: float) -> float:
    (rounded,) = struct.unpack("<f", struct.pack("<f", value))
    assert isinstance(rounded, float)
    return rounded


def decode(codec: Codec, raw: Encoded, elements: int) -> Float32s:
    out = np.empty(elements, np.float32)
    codec.decode_untrusted(raw, elements, out)
    return out


@st.composite
def rounds(draw: st.DrawFn) -> tuple[Codec, list[WeightedPart], int]:
    """What one owner holds for one part: any magnitudes, planned weights, some members missing."""
    codec = draw(codecs)
    plan = draw(claims)
    weights = planned_weights([tokens for tokens, _ in plan], [steps for _, steps in plan])
    factors = clip_factors(draw(st.lists(st.floats(0, 2**80), min_size=len(plan), max_size=len(plan))))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    elements = draw(st.integers(1, 40) | st.sampled_from([256, 300]))
    magnitude = draw(st.integers(-140, 63))
    parts = []
    for weight, factor in zip(weights.tolist(), factors.tolist(), strict=True):
        values = np.ldexp(random.standard_normal(elements), magnitude + random.integers(-8, 8)).astype(np.float32)
        parts.append(WeightedPart(encoded=codec.encode(values), weight=weight, clip_factor=factor))
    present = [part for part in parts if random.random() < 0.8]
    return codec, present or parts[:1], elements


def sum_slowly(terms: list[float]) -> float:
    total = 0.0
    for term in terms:
        total = to_float32(total + term)
    return total


def distance_slowly(values: list[float], center: list[float]) -> float:
    """The root of the sum of squares: zeros behind them up to a power of two, the upper half added to the lower one."""
    squares = [to_float32(value - middle) ** 2 for value, middle in zip(values, center, strict=True)]
    squares += [0.0] * ((1 << (len(squares) - 1).bit_length()) - len(squares))
    while (half := len(squares) // 2) > 0:
        squares = [squares[index] + squares[half + index] for index in range(half)]
    return math.sqrt(squares[0])


def aggregate_slowly(name: str, decoded: list[list[float]], parts: list[WeightedPart]) -> list[float]:
    columns = [list(column) for column in zip(*decoded, strict=True)]
    weights = sum_slowly([part.weight for part in parts])
    if name in ("mean", "norm_clipped_mean"):
        factors = [to_float32(part.weight * (part.clip_factor if name != "mean" else 1.0)) for part in parts]
        sums = [
            sum_slowly([to_float32(factor * value) for factor, value in zip(factors, column, strict=True)])
            for column in columns
        ]
        return [to_float32(total / weights) for total in sums]
    ordered = [sorted(value + 0.0 for value in column) for column in columns]
    members = len(parts)
    if name == "trimmed_mean":
        trimmed = min(math.ceil(members / 4), (members - 1) // 2)
        kept = [column[trimmed : members - trimmed] for column in ordered]
        return [to_float32(sum_slowly(column) / len(column)) for column in kept]
    center = [to_float32(to_float32(one[(members - 1) // 2] + one[members // 2]) * 0.5) for one in ordered]
    if name == "median":
        return center
    assert name == "centered_clip"
    for _ in range(CLIP_STEPS):
        pulls = clip_factors([distance_slowly(values, center) for values in decoded]).tolist()
        factors = [to_float32(part.weight * pull) for part, pull in zip(parts, pulls, strict=True)]
        for index, column in enumerate(columns):
            away = [to_float32(value - center[index]) for value in column]
            shift = sum_slowly([to_float32(factor * one) for factor, one in zip(factors, away, strict=True)])
            center[index] = to_float32(center[index] + to_float32(shift / weights))
    return center


@given(aggregators, rounds())
def test_bits_are_the_references(aggregator: Aggregator, held: tuple[Codec, list[WeightedPart], int]) -> None:
    codec, parts, elements = held
    out = np.empty(elements, np.float32)
    aggregator.aggregate(codec, parts, out)
    decoded = [decode(codec, part.encoded, elements).tolist() for part in parts]
    assert out.tolist() == aggregate_slowly(aggregator.name, decoded, parts)


@given(rounds())
def test_mean_is_in_the_convex_hull(held: tuple[Codec, list[WeightedPart], int]) -> None:
    codec, parts, elements = held
    out = np.empty(elements, np.float32)
    AGGREGATORS["mean"].aggregate(codec, parts, out)
    decoded = np.array([decode(codec, part.encoded, elements) for part in parts], np.float64)
    # Every member's term is rounded twice, the sums and the quotient once more; below 2**-126 rounding is absolute.
    slack = np.abs(decoded).max(axis=0) * (3 * len(parts) + 4) * 2.0**-24 + len(parts) * 2.0**-125
    assert np.all(out <= decoded.max(axis=0) + slack)
    assert np.all(out >= decoded.min(axis=0) - slack)


@given(rounds())
def test_clipping_only_shrinks(held: tuple[Codec, list[WeightedPart], int]) -> None:
    codec, parts, elements = held
    out = np.empty(elements, np.float32)
    AGGREGATORS["norm_clipped_mean"].aggregate(codec, parts, out)
    decoded = np.array([decode(codec, part.encoded, elements) * part.clip_factor for part in parts], np.float64)
    slack = np.abs(decoded).max(axis=0) * (4 * len(parts) + 4) * 2.0**-24 + len(parts) * 2.0**-125
    assert np.all(out <= np.maximum(decoded.max(axis=0), 0) + slack)
    assert np.all(out >= np.minimum(decoded.min(axis=0), 0) - slack)


@given(st.sampled_from(["median", "trimmed_mean"]), rounds())
def test_robust_rules_stay_among_the_members(name: str, held: tuple[Codec, list[WeightedPart], int]) -> None:
    codec, parts, elements = held
    out = np.empty(elements, np.float32)
    AGGREGATORS[name].aggregate(codec, parts, out)
    decoded = np.array([decode(codec, part.encoded, elements) for part in parts], np.float64)
    slack = np.abs(decoded).max(axis=0) * (len(parts) + 1) * 2.0**-24 + 2.0**-148
    assert np.all(out <= decoded.max(axis=0) + slack)
    assert np.all(out >= decoded.min(axis=0) - slack)


@given(rounds(), st.data())
def test_a_minority_moves_the_median_no_further_than_honest_members_are(
    held: tuple[Codec, list[WeightedPart], int], data: st.DataObject
) -> None:
    codec, parts, elements = held
    liars = data.draw(st.integers(0, (len(parts) - 1) // 2))
    far = np.full(elements, data.draw(st.sampled_from([-1, 1])) * 2.0**60, np.float32)
    lies = [WeightedPart(encoded=codec.encode(far), weight=1.0) for _ in range(liars)]
    out = np.empty(elements, np.float32)
    AGGREGATORS["median"].aggregate(codec, [*lies, *parts[liars:]], out)
    honest = np.array([decode(codec, part.encoded, elements) for part in parts[liars:]], np.float64)
    slack = np.abs(honest).max(axis=0) * 2.0**-23 + 2.0**-148
    assert np.all(out <= honest.max(axis=0) + slack)
    assert np.all(out >= honest.min(axis=0) - slack)


@given(aggregators, codecs, rounds())
def test_update_decodes_everywhere(
    aggregator: Aggregator, codec_out: Codec, held: tuple[Codec, list[WeightedPart], int]
) -> None:
    codec, parts, elements = held
    update = Reduction(codec_in=codec, aggregator=aggregator, codec_out=codec_out).reduce_part(parts, elements)
    assert np.abs(decode(codec_out, update, elements)).max() <= codec_out.magnitude_max


@given(claims)
def test_no_share_exceeds_its_cap(plan: list[tuple[int, int]]) -> None:
    weights = planned_weights([tokens for tokens, _ in plan], [steps for _, steps in plan])
    shares = weights.astype(np.float64)
    assert np.all(shares > 0)
    assert abs(shares.sum() - 1) < len(plan) * 2.0**-24
    if len(plan) >= SHARES_MIN:
        assert weights.max() <= np.float32(1 / SHARES_MIN)
    # The second cap only lowers the largest, so that the first one still holds after it.
    assert shares.max() <= WEIGHT_MEDIANS_MAX * np.median(shares) * (1 + 2.0**-20)


@given(claims, st.data())
def test_weights_go_with_their_members(plan: list[tuple[int, int]], data: st.DataObject) -> None:
    shuffled = data.draw(st.permutations(range(len(plan))))
    tokens, steps = [claim[0] for claim in plan], [claim[1] for claim in plan]
    weights = planned_weights(tokens, steps)
    moved = planned_weights([tokens[place] for place in shuffled], [steps[place] for place in shuffled])
    assert moved.tolist() == [weights[place] for place in shuffled]


@given(claims)
def test_more_work_never_weighs_less(plan: list[tuple[int, int]]) -> None:
    order = np.argsort([max(tokens, 1) ** 2 / steps for tokens, steps in plan])
    weights = planned_weights([tokens for tokens, _ in plan], [steps for _, steps in plan])[order]
    assert np.all(np.diff(weights) >= 0)


@given(st.lists(st.floats(0, 2.0**80), min_size=1, max_size=MEMBERS_MAX))
def test_clipped_norms_do_not_exceed_the_median(norms: list[float]) -> None:
    factors = clip_factors(norms).astype(np.float64)
    assert np.all((factors >= 0) & (factors <= 1))
    median = float(np.median(norms))
    for norm, factor in zip(norms, factors, strict=True):
        assert factor == 1 if norm <= median else norm * factor <= median * (1 + 2.0**-23) + norm * 2.0**-149
