"""The aggregators: golden bytes, roster order, weights and their caps, norms."""

import math
import tracemalloc

import numpy as np
import pytest
from blake3 import blake3

from shoal.protocol.aggregators import (
    AGGREGATORS,
    WEIGHT_RATIO_MIN,
    Aggregator,
    Reduction,
    WeightedPart,
    clip_factors,
    planned_weights,
    squared_norm,
)
from shoal.protocol.codecs import CHUNK_ELEMENTS, CODECS, UPDATE_CODECS, Codec, Float32s, load_kernels
from shoal.protocol.errors import ProtocolError, Refusal

MEAN = AGGREGATORS["mean"]
CLIPPED = AGGREGATORS["norm_clipped_mean"]

GOLDEN_UPDATES = {
    ("mean", "fp32"): "c0dd9489a56de7991805cfc3536c20eb069be9f059eef34c4c82d165ba8dddcf",
    ("mean", "fp16"): "8da806e4f1e1ffe2d9ae00e9d9284a0cfec8f3fe1886d4ae780ed35d5f1d904f",
    ("mean", "bf16"): "3729402e032d68314750c245a9c4de3ccc284a33f9633070b783ca42e94ac679",
    ("mean", "int8"): "1ce9f6cbc961da417499a51e1e42ec25b57cfcbc47bb0309fe23281c5deda289",
    ("mean", "int4"): "da6bcd878345cd27052509d3169b56ae360980a722196fa52a730f5309920565",
    ("mean", "e3m0"): "d8e6c08f15cd6f21a94fdd12106cdd5409a838e2fc99ea49b8f2a80481a071e8",
    ("mean", "ternary"): "14be9e4c4a93fe5293586d4c8208aa352ac653097ccfc910b8946a6432006a3f",
    ("mean", "stat2"): "b892f2734ec542b8096ec81e5a993a6a98e159a760331985a979851f173ae4a7",
    ("mean", "topk8"): "e91d835bd793e84f80d2f0ac91f7f275e2d7548909b0c5d1c84e8053f09d36d6",
    ("mean", "topk2"): "22bd99f551c6bdd26af3ec812e0d8b83336b7b137af546d5c843de190bc1431c",
    ("norm_clipped_mean", "fp32"): "2ac61ebd90c2abb4ebb90bca8feaa8b14ef82f6eb457505c971aab41e859bee0",
    ("norm_clipped_mean", "fp16"): "331323057d86de4fdb5082bb111df60e5934999d010e5951d2351d272ac8f609",
    ("norm_clipped_mean", "bf16"): "95f8fa1308dc3357df36c8abadd18c9b1a83d0b1b695148105c198ef76ac01fd",
    ("norm_clipped_mean", "int8"): "c31646ea7ca638e4e9abb356650ccbd06b31dfccface6c679ba9806990b83278",
    ("norm_clipped_mean", "int4"): "8ce617aed4cb30e494683b00a07c82756e03ac96f7427ebbdb11d565dce7a44a",
    ("norm_clipped_mean", "e3m0"): "b90b70caf97e6e119fbfdb03cd1995a8b07eca5747d6a689c2cd0254e0c9341f",
    ("norm_clipped_mean", "ternary"): "898bb24f334f7143e85dc7bfa1d4572ac7048a706b30b0119982853a27ac41ba",
    ("norm_clipped_mean", "stat2"): "9ddad0b7ea1ebbca60520561f81425368018aa8ccd5dfafe7e324c7c603a8759",
    ("norm_clipped_mean", "topk8"): "ce0d1fe352f23ed5f3aadbe46c1574ac12a1318054b794d3ecba1ab2ac7db8bd",
    ("norm_clipped_mean", "topk2"): "0021b9233583cbc8ee2aa63fb97b64c03942eafc67f8527bff78b99b67bc63a3",
    ("median", "fp32"): "5fd2f3e568c3db44e6dc6581e192fd095276682689ebda0c2ba68848aa789f19",
    ("median", "fp16"): "61223fd0b1abd1bda8753b214cc43fe82ebd25febf4bffa4db9b7ca19dd9215a",
    ("median", "bf16"): "79e270b8d906e62c7f85b9d5cdc2d09113325cb165329bf32303e5a91e3334d4",
    ("median", "int8"): "ecf90e9f3b99de9790325deaabd578085f341b52eed570bc72b8d4c26de5c015",
    ("median", "int4"): "00d11664e721c1b519f0eb84525b658392edc4f2fae482351f79446e17796bdf",
    ("median", "e3m0"): "a485fce712274172efb4a8b67930c30293235566928f91df22c220c751bc1481",
    ("median", "ternary"): "32496a678afe423a07011c544a838fcb6c7096c544993368586e89f2a1832d94",
    ("median", "stat2"): "336976b48f4bc42168d579055b160b6d55eebc235592540fa20458d26c7b4ca7",
    ("median", "topk8"): "30c5cafef44df1b1147375f8fbfd609e4df011924dda1afaa181f18017723dcf",
    ("median", "topk2"): "30c5cafef44df1b1147375f8fbfd609e4df011924dda1afaa181f18017723dcf",
    ("trimmed_mean", "fp32"): "5fd2f3e568c3db44e6dc6581e192fd095276682689ebda0c2ba68848aa789f19",
    ("trimmed_mean", "fp16"): "61223fd0b1abd1bda8753b214cc43fe82ebd25febf4bffa4db9b7ca19dd9215a",
    ("trimmed_mean", "bf16"): "79e270b8d906e62c7f85b9d5cdc2d09113325cb165329bf32303e5a91e3334d4",
    ("trimmed_mean", "int8"): "ecf90e9f3b99de9790325deaabd578085f341b52eed570bc72b8d4c26de5c015",
    ("trimmed_mean", "int4"): "00d11664e721c1b519f0eb84525b658392edc4f2fae482351f79446e17796bdf",
    ("trimmed_mean", "e3m0"): "a485fce712274172efb4a8b67930c30293235566928f91df22c220c751bc1481",
    ("trimmed_mean", "ternary"): "32496a678afe423a07011c544a838fcb6c7096c544993368586e89f2a1832d94",
    ("trimmed_mean", "stat2"): "336976b48f4bc42168d579055b160b6d55eebc235592540fa20458d26c7b4ca7",
    ("trimmed_mean", "topk8"): "30c5cafef44df1b1147375f8fbfd609e4df011924dda1afaa181f18017723dcf",
    ("trimmed_mean", "topk2"): "30c5cafef44df1b1147375f8fbfd609e4df011924dda1afaa181f18017723dcf",
    ("centered_clip", "fp32"): "a601f7cece85779d0dde6c8df5284d6527a3ee7733f90eedc040cfe7a4621464",
    ("centered_clip", "fp16"): "07932da3947057c329c19a52e04f3f60fe4dd5fa4df7fdf523692354d27245bc",
    ("centered_clip", "bf16"): "04d93408b6b842d36fb0a274fa6f4e2fb500674d1505b684deba1aa0a370ed62",
    ("centered_clip", "int8"): "308f94f68939dae5a547e18e3427b79bd0fb1c4dc53a1a8908af32ea4b9165f8",
    ("centered_clip", "int4"): "f44cedcc95dfbd10f23b0204b6e290ea33b036a2782f3e26e2d98094699f6198",
    ("centered_clip", "e3m0"): "8bd1058d113f83d66458b0210635918076729ac3c5881a18493e55795861dc1f",
    ("centered_clip", "ternary"): "c2d0083345a1eb82315964e92d90a0acf6c12c93056f7a527655229e519e32ba",
    ("centered_clip", "stat2"): "4a7c953f5b69a04000ea65223c7404efe3bb1cede4fbe83e57736d905fae337f",
    ("centered_clip", "topk8"): "897b662209cdb62058cdf85fbede0aa67d8bdf9574a46c8ba45bf2e58f7679de",
    ("centered_clip", "topk2"): "ed85c354aa0cb37ed536178c5d20f81c281b6be69cecde2e2c11d904499f7ea7",
}
GOLDEN_WEIGHTS = "8aae6a3e0000803ec98aaa3c0000803ef8fce5340000803e"
GOLDEN_SQUARED_NORM = "0x1.6bf1925197909p+22"


def golden_contributions() -> list[Float32s]:
    """Three vectors of 300 values by whole-number arithmetic."""
    mixed = (np.arange(900, dtype=np.int64) * 2_246_822_519 + 374_761_393) % 2**32 - 2**31
    return list(((mixed >> 8).astype(np.float32) * np.float32(2.0**-26)).reshape(3, 300))


def part(values: Float32s | list[float], weight: float, clip_factor: float = 1.0) -> WeightedPart:
    encoded = CODECS["fp32"].encode(np.array(values, np.float32))
    return WeightedPart(encoded=encoded, weight=weight, clip_factor=clip_factor)


def aggregate(name: str, parts: list[WeightedPart], elements: int) -> list[float]:
    out = np.empty(elements, np.float32)
    AGGREGATORS[name].aggregate(CODECS["fp32"], parts, out)
    values: list[float] = out.tolist()
    return values


def test_table_names_each_aggregator_once() -> None:
    assert {name: aggregator.name for name, aggregator in AGGREGATORS.items()} == {
        name: name for name, _ in GOLDEN_UPDATES
    }


@pytest.mark.parametrize("name", AGGREGATORS)
@pytest.mark.parametrize("codec_name", CODECS)
def test_updates_are_golden(name: str, codec_name: str) -> None:
    codec = CODECS[codec_name]
    vectors = golden_contributions()
    weights = planned_weights([4000, 3000, 1000], [10, 10, 7])
    factors = clip_factors(math.sqrt(squared_norm(vector)) * (index + 1) for index, vector in enumerate(vectors))
    parts = [
        WeightedPart(encoded=codec.encode(vector), weight=float(weight), clip_factor=float(factor))
        for vector, weight, factor in zip(vectors, weights, factors, strict=True)
    ]
    codec_out = codec if codec_name in UPDATE_CODECS else CODECS["int8"]
    reduction = Reduction(codec_in=codec, aggregator=AGGREGATORS[name], codec_out=codec_out)

    assert blake3(reduction.reduce_part(parts, 300)).hexdigest() == GOLDEN_UPDATES[name, codec_name]


def test_mean_is_weighted() -> None:
    assert aggregate("mean", [part([1.0, -8.0], 0.75), part([5.0, 8.0], 0.25)], 2) == [2.0, -4.0]


def test_absent_members_leave_the_denominator() -> None:
    assert aggregate("mean", [part([6.0], 0.25), part([2.0], 0.25)], 1) == [4.0]


def test_mean_ignores_clip_factors() -> None:
    assert aggregate("mean", [part([4.0], 0.5, 0.5), part([4.0], 0.5)], 1) == [4.0]


def test_clipped_members_keep_their_weight_in_the_denominator() -> None:
    assert aggregate("norm_clipped_mean", [part([4.0], 0.5, 0.5), part([4.0], 0.5)], 1) == [3.0]


def test_sum_is_in_roster_order() -> None:
    """float32 addition is not associative: 2**24 + 1 + 1 depends on who comes first."""
    large, one = part([2.0**24], 1.0), part([1.0], 1.0)
    third = np.float32(3)
    assert aggregate("mean", [large, one, one], 1) == [float(np.float32(2.0**24) / third)]
    assert aggregate("mean", [one, one, large], 1) == [float(np.float32(2.0**24 + 2) / third)]


@pytest.mark.parametrize("aggregator", AGGREGATORS.values(), ids=AGGREGATORS)
@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
def test_largest_values_stay_finite(codec: Codec, aggregator: Aggregator) -> None:
    extreme = codec.encode(np.full(300, np.finfo(np.float32).max, np.float32))
    parts = [WeightedPart(encoded=extreme, weight=1.0)] * 64
    update = Reduction(codec_in=codec, aggregator=aggregator, codec_out=codec).reduce_part(parts, 300)
    out = np.empty(300, np.float32)
    codec.decode_untrusted(update, 300, out)
    kept = 5 if codec.is_sparse else 300
    assert out.tolist() == [codec.magnitude_max] * kept + [0.0] * (300 - kept)


@pytest.mark.parametrize("name", ["mean", "norm_clipped_mean", "median", "trimmed_mean"])
def test_chunks_leave_no_trace(name: str) -> None:
    random = np.random.default_rng(8)
    elements = 2 * CHUNK_ELEMENTS + 513
    vectors = [random.standard_normal(elements).astype(np.float32) for _ in range(3)]
    whole, piece = np.empty(elements, np.float32), np.empty(1000, np.float32)
    codec = CODECS["int8"]
    weights, factors = (0.5, 0.3, 0.2), (1.0, 0.25, 0.75)

    def parts(start: int, stop: int) -> list[WeightedPart]:
        return [
            WeightedPart(encoded=codec.encode(vector[start:stop]), weight=weight, clip_factor=factor)
            for vector, weight, factor in zip(vectors, weights, factors, strict=True)
        ]

    AGGREGATORS[name].aggregate(codec, parts(0, elements), whole)
    for first in (0, CHUNK_ELEMENTS - 512, CHUNK_ELEMENTS, 2 * CHUNK_ELEMENTS - 512):
        AGGREGATORS[name].aggregate(codec, parts(first, first + 1000), piece)
        # A piece that starts with a block has the same blocks, the last one of this piece excepted.
        assert piece[:768].tobytes() == whole[first : first + 768].tobytes()


@pytest.mark.parametrize("codec_out", ["int8", "fp32", "int4"])
@pytest.mark.parametrize("codec_in", ["int8", "e3m0", "topk8"])
@pytest.mark.parametrize("name", AGGREGATORS)
def test_a_part_is_reduced_in_pieces_as_it_would_be_whole(name: str, codec_in: str, codec_out: str) -> None:
    random = np.random.default_rng(9)
    elements = 2 * CHUNK_ELEMENTS + 513
    parts = [
        WeightedPart(
            encoded=CODECS[codec_in].encode(random.standard_normal(elements).astype(np.float32)),
            weight=weight,
            clip_factor=factor,
        )
        for weight, factor in ((0.5, 1.0), (0.25, 0.75), (0.125, 0.5))
    ]
    whole = np.empty(elements, np.float32)
    AGGREGATORS[name].aggregate(CODECS[codec_in], parts, whole)
    reduction = Reduction(codec_in=CODECS[codec_in], aggregator=AGGREGATORS[name], codec_out=CODECS[codec_out])
    assert reduction.reduce_part(parts, elements).tobytes() == CODECS[codec_out].encode(whole).tobytes()


def test_what_is_made_of_whole_vectors_is_not_made_in_pieces() -> None:
    assert [name for name, one in AGGREGATORS.items() if not one.is_by_value] == ["centered_clip"]
    with pytest.raises(AssertionError, match="whole vectors"):
        AGGREGATORS["centered_clip"].aggregate(CODECS["fp32"], [part([1.0], 1.0)], np.empty(1, np.float32), 0, 2)


@pytest.mark.parametrize(
    ("values", "median", "trimmed"),
    [
        ([3.0], 3.0, 3.0),
        ([1.0, 4.0], 2.5, 2.5),
        ([9.0, 1.0, 2.0], 2.0, 2.0),
        ([9.0, 1.0, 2.0, 4.0], 3.0, 3.0),
        ([9.0, 1.0, 2.0, 4.0, -70.0], 2.0, 2.0),
        ([5.0, 4.0, 1.0, 3.0, 2.0, 90.0, -90.0, 6.0], 3.5, 3.5),
        ([0.0, 1.0, 2.0, 6.0, 6.0, 6.0, 6.0, 6.0, 9.0], 6.0, 6.0),
    ],
)
def test_median_and_trimmed_mean(values: list[float], median: float, trimmed: float) -> None:
    parts = [part([value], 1 / len(values)) for value in values]
    assert (aggregate("median", parts, 1), aggregate("trimmed_mean", parts, 1)) == ([median], [trimmed])


@pytest.mark.parametrize("name", ["median", "trimmed_mean"])
def test_robust_rules_know_neither_weights_nor_order_nor_signs_of_zero(name: str) -> None:
    values = [-0.0, 0.0, 2.0, -0.0, 1e-40, 1e30]
    forward = [part([value, 1.0], 0.9) for value in values]
    backward = [part([value, 1.0], 0.01, 0.5) for value in reversed(values)]
    assert np.float32(aggregate(name, forward, 2)).tobytes() == np.float32(aggregate(name, backward, 2)).tobytes()


@pytest.mark.parametrize("members", range(1, 34))
def test_rows_are_sorted_whatever_their_number(members: int) -> None:
    """All of 0 and 1 where there are few rows: a network that sorts those sorts everything (Knuth's 0-1 principle)."""
    columns = 2**members if members <= 12 else 4096
    bits = (np.arange(columns, dtype=np.int64)[np.newaxis, :] >> np.arange(members)[:, np.newaxis]) & 1
    mixed = np.random.default_rng(members).permuted(bits, axis=0) if members > 12 else bits
    rows = mixed.astype(np.float32)
    load_kernels().sort_rows(rows)
    assert rows.tobytes() == np.sort(mixed, axis=0).astype(np.float32).tobytes()


def test_centered_clip_is_the_mean_where_nobody_is_far() -> None:
    parts = [part([1.0, 5.0], 0.5), part([3.0, 1.0], 0.5)]
    assert aggregate("centered_clip", parts, 2) == [2.0, 3.0]


@pytest.mark.parametrize("name", ["median", "trimmed_mean", "centered_clip"])
@pytest.mark.parametrize("lie", [-10.0, 1e6, -1e18])
def test_a_quarter_of_liars_moves_a_robust_rule_little(name: str, lie: float) -> None:
    random = np.random.default_rng(11)
    truth = random.standard_normal(1000).astype(np.float32)
    honest = [truth + np.float32(0.3) * random.standard_normal(1000).astype(np.float32) for _ in range(6)]
    parts = [part(values.tolist(), 1 / 8) for values in [*honest, truth * np.float32(lie), truth * np.float32(lie)]]
    off = np.array(aggregate(name, parts, 1000)) - truth
    assert np.sqrt(np.mean(off**2)) < 0.35, "no further off than one honest member"


def test_reduction_changes_codecs() -> None:
    reduction = Reduction(codec_in=CODECS["fp32"], aggregator=MEAN, codec_out=CODECS["int8"])
    update = reduction.reduce_part([part([254.0, 3.1], 1.0)], 2)
    assert bytes(update) == bytes(CODECS["int8"].encode(np.array([254.0, 3.1], np.float32)))


def test_part_that_does_not_decode_is_refused() -> None:
    reduction = Reduction(codec_in=CODECS["fp32"], aggregator=MEAN, codec_out=CODECS["fp32"])
    broken = WeightedPart(encoded=b"\0\0\x80\x7f", weight=0.5)
    with pytest.raises(ProtocolError) as caught:
        reduction.reduce_part([part([1.0], 0.5), broken], 1)
    assert caught.value.refusal is Refusal.NOT_FINITE


@pytest.mark.parametrize("weight", [0.0, -0.5, 1.5, math.nan])
def test_weight_that_no_plan_has_is_a_bug(weight: float) -> None:
    with pytest.raises(AssertionError, match="plan"):
        aggregate("mean", [part([1.0], weight)], 1)


def test_aggregate_of_nobody_is_a_bug() -> None:
    with pytest.raises(AssertionError, match="plan"):
        aggregate("mean", [], 1)


def test_memory_is_one_part_whoever_takes_part() -> None:
    elements = 4 * CHUNK_ELEMENTS
    encoded = CODECS["int8"].encode(np.ones(elements, np.float32))
    parts = [WeightedPart(encoded=encoded, weight=1 / 32)] * 32
    reduction = Reduction(codec_in=CODECS["int8"], aggregator=CLIPPED, codec_out=CODECS["int8"])
    tracemalloc.start()
    try:
        reduction.reduce_part(parts, elements)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 5 * elements + 3 * 4 * CHUNK_ELEMENTS


@pytest.mark.parametrize(
    ("tokens", "steps", "shares"),
    [
        ([500], [5], [1.0]),
        ([100, 100], [10, 10], [0.5, 0.5]),
        ([200, 100], [20, 10], [2 / 3, 1 / 3]),  # twice the work in twice the steps
        ([200, 100], [10, 10], [0.8, 0.2]),  # twice the batch
        ([100, 100, 1000], [10, 10, 10], [0.25, 0.25, 0.5]),  # the third counts for two medians
        ([100, 100, 100, 1000], [10] * 4, [0.25] * 4),
        ([1, 1, 1, 1000], [1] * 4, [0.25] * 4),
        ([100, 100, 100, 100, 1000], [10] * 5, [3 / 16, 3 / 16, 3 / 16, 3 / 16, 1 / 4]),
        ([0, 0, 0], [1, 1, 1], [1 / 3, 1 / 3, 1 / 3]),
        ([2**63 - 1] * 16, [1] * 16, [1 / 16] * 16),
    ],
)
def test_weights_follow_work_under_a_cap(tokens: list[int], steps: list[int], shares: list[float]) -> None:
    weights = planned_weights(tokens, steps)
    assert weights.dtype == np.float32
    assert weights.tolist() == np.array(shares, np.float32).tolist()


def test_weights_are_golden() -> None:
    weights = planned_weights([51_200, 204_800, 12_345, 999_999, 7, 80_000], [100, 130, 64, 300, 1, 90])
    assert weights.astype("<f4").tobytes().hex() == GOLDEN_WEIGHTS


def test_one_who_did_nothing_weighs_next_to_nothing() -> None:
    weights = planned_weights([1, 10**9, 10**9, 10**9, 10**9], [10**6, 10, 10, 10, 10])
    assert 0 < weights[0] < weights[1] * WEIGHT_RATIO_MIN * 1.001


def test_weights_of_unequal_lists_are_a_bug() -> None:
    with pytest.raises(ValueError, match="zip"):
        planned_weights([1, 2], [1])


@pytest.mark.parametrize(
    ("norms", "factors"),
    [
        ([3.0], [1.0]),
        ([1.0, 2.0, 8.0], [1.0, 1.0, 0.25]),
        ([1.0, 3.0], [1.0, 2 / 3]),
        ([0.0, 0.0, 5.0], [1.0, 1.0, 0.0]),
        ([0.0, 0.0], [1.0, 1.0]),
        ([1.0, 1.0, 1e300], [1.0, 1.0, 0.0]),
    ],
)
def test_clip_factors_bring_norms_to_the_median(norms: list[float], factors: list[float]) -> None:
    assert clip_factors(norms).tolist() == np.array(factors, np.float32).tolist()


@pytest.mark.parametrize("norms", [[], [-1.0], [math.nan], [1.0, math.inf]])
def test_norm_that_no_plan_has_is_a_bug(norms: list[float]) -> None:
    with pytest.raises(AssertionError, match="norm"):
        clip_factors(norms)


def test_squared_norm_is_golden() -> None:
    random_bits = np.random.Philox(key=1).random_raw(CHUNK_ELEMENTS).astype("<u8").view("<u4")
    values = ((random_bits >> 8).astype(np.float32) * np.float32(2.0**-20))[: CHUNK_ELEMENTS + 4321]
    assert squared_norm(values).hex() == GOLDEN_SQUARED_NORM
    assert squared_norm(values) == pytest.approx(math.fsum(float(value) ** 2 for value in values), rel=1e-14)


def test_squared_norm_of_the_largest_values_is_finite() -> None:
    assert squared_norm(np.full(CHUNK_ELEMENTS, 2.0**64, np.float32)) == 2.0**144
