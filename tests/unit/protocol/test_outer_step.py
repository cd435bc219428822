"""The outer step: golden state, a slow reference, slices, subnormal numbers, the thread's rounding mode."""

import ctypes
import math
import platform
import struct
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from blake3 import blake3

from shoal.protocol.codecs import CHUNK_ELEMENTS, CODECS, Float32s
from shoal.protocol.outer_step import OUTER_OPTIMIZERS, OuterOptimizer, OuterRates, rounds_as_specified

RATES = OuterRates(learning_rate=0.7, momentum=0.9)
# Optimizer: BLAKE3 of the params, of the momentum.
GOLDEN_STATES = {
    "nesterov": (
        "c9d94bccb6bea15d30385ca5ad1ffd7e063bf2b2740edb8fcc52c18be9d158d3",
        "bee849ecb3e932d3bb2f55dd59c46a25a18fb5f52d3e9d5b3ec9ce2f2cecb3c4",
    ),
    "sgd": (
        "f6da5c75997e23394e63f4595764d0aa210f1da82866615279b2cd3d2952357f",
        "b076a598eede7c291f01690cac91c37ef5349d63a431b204a93122496b2b4564",
    ),
    "adam": (
        "f01d28e5eb9e75933d380c4bfaf395dd1d601e0f8c9721f8c0473147b4f02d31",
        "2d68a4bca3e126f0c3f4194dad1285b349898340c45d3b6cfff767ceabdce530",
    ),
}
every_optimizer = pytest.mark.parametrize("optimizer", OUTER_OPTIMIZERS.values(), ids=OUTER_OPTIMIZERS)


def golden_vector(seed: int, elements: int = 600) -> Float32s:
    mixed = (np.arange(elements, dtype=np.int64) * 2_654_435_761 + seed * 40_503) % 2**32 - 2**31
    return (mixed >> 8).astype(np.float32) * np.float32(2.0**-25)


def to_float32(value: float) -> float:
    (rounded,) = struct.unpack("<f", struct.pack("<f", value))
    assert isinstance(rounded, float)
    return rounded


def step_slowly(name: str, p: float, m: float, d: float, rates: OuterRates) -> tuple[float, float]:
    eta, mu = to_float32(rates.learning_rate), to_float32(rates.momentum)
    if name == "sgd":
        return to_float32(p - to_float32(eta * d)), m
    if name == "adam":
        return step_adam(p, m, d, rates)
    limit = to_float32(rates.momentum_clip) if rates.momentum_clip else math.inf
    last = rates.turn == rates.momentum_every - 1
    e = to_float32(to_float32(1 / rates.momentum_every) * d)
    m = to_float32(to_float32((1.0 if rates.turn else mu) * m) + e)
    m = limit if m > limit else -limit if m < -limit else m
    return to_float32(p - to_float32(eta * to_float32(e + to_float32((mu if last else 0.0) * m)))), m


def step_adam(p: float, moments: float, d: float, rates: OuterRates) -> tuple[float, float]:
    """`moments` is v as a bfloat16 and m as one, one behind the other."""
    (bits,) = struct.unpack("<I", struct.pack("<f", moments))
    (v,), (m,) = (struct.unpack("<f", struct.pack("<I", half << 16)) for half in (bits >> 16, bits & 0xFFFF))
    b1, b2, eta, epsilon = map(to_float32, (rates.momentum, rates.second_moment, rates.learning_rate, rates.epsilon))
    c1, c2 = to_float32(1 - rates.momentum), to_float32(1 - rates.second_moment)
    m = to_float32(to_float32(b1 * m) + to_float32(c1 * d))
    v = min(to_float32(to_float32(b2 * v) + to_float32(c2 * to_float32(d * d))), 2.0**120)
    p = to_float32(p - to_float32(eta * to_float32(m / to_float32(to_float32(math.sqrt(v)) + epsilon))))
    upper, lower = to_bfloat16(v), to_bfloat16(m)
    (packed,) = struct.unpack("<f", struct.pack("<I", upper << 16 | lower))
    return p, packed


def to_bfloat16(value: float) -> int:
    """The nearest of both neighbours by their distance, of two the even one."""
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    low, rest = bits >> 16, bits & 0xFFFF
    return low + (rest > 0x8000 or (rest == 0x8000 and low % 2 == 1))


# None of the plain ones, and then all that there is.
RATES_OF_ALL_KINDS = (
    OuterRates(learning_rate=0.7, momentum=0.9),
    OuterRates(learning_rate=1.0, momentum=0.0),
    OuterRates(learning_rate=0.0, momentum=0.5),
    OuterRates(learning_rate=0.1, momentum=1.0),
    OuterRates(learning_rate=0.7, momentum=0.9, momentum_clip=0.1),
    OuterRates(learning_rate=0.7, momentum=0.9, momentum_clip=1e-50),
    *(OuterRates(learning_rate=0.7, momentum=0.9, momentum_every=3, turn=turn) for turn in range(3)),
    OuterRates(learning_rate=0.7, momentum=0.9, momentum_clip=0.1, momentum_every=7, turn=6),
    OuterRates(learning_rate=0.01, momentum=0.5, second_moment=0.95, epsilon=1e-9),
)
every_rates = pytest.mark.parametrize("rates", RATES_OF_ALL_KINDS, ids=range(len(RATES_OF_ALL_KINDS)))


def test_table_names_each_optimizer_once() -> None:
    assert {name: optimizer.name for name, optimizer in OUTER_OPTIMIZERS.items()} == {
        "nesterov": "nesterov",
        "sgd": "sgd",
        "adam": "adam",
    }


@pytest.mark.parametrize("name", OUTER_OPTIMIZERS)
def test_state_after_three_rounds_is_golden(name: str) -> None:
    params, momentum = golden_vector(1), np.zeros(600, np.float32)
    codec, update = CODECS["int8"], np.empty(600, np.float32)
    for round_number in range(3):
        codec.decode_untrusted(codec.encode(golden_vector(round_number + 2)), 600, update)
        OUTER_OPTIMIZERS[name].apply(params, momentum, update, RATES)

    digests = tuple(blake3(vector.astype("<f4").tobytes()).hexdigest() for vector in (params, momentum))
    assert digests == GOLDEN_STATES[name]


@every_optimizer
@pytest.mark.parametrize("scale", [1.0, 2.0**-120, 2.0**-130, 2.0**60])
@every_rates
def test_bits_are_the_references(optimizer: OuterOptimizer, scale: float, rates: OuterRates) -> None:
    params, momentum, update = (golden_vector(seed) * np.float32(scale) for seed in (5, 6, 7))
    if optimizer.name == "adam":
        halves = np.abs(momentum).view(np.uint32) >> 16, update[::-1].copy().view(np.uint32) >> 16
        momentum = (halves[0] << 16 | halves[1]).view(np.float32)
    expected = [
        step_slowly(optimizer.name, *values, rates)
        for values in zip(params.tolist(), momentum.tolist(), update.tolist(), strict=True)
    ]
    kept = update.copy()

    optimizer.apply(params, momentum, update, rates)

    assert list(zip(params.tolist(), momentum.tolist(), strict=True)) == expected
    assert update.tobytes() == kept.tobytes()


def test_one_step_by_hand() -> None:
    params, momentum, update = (np.array([value], np.float32) for value in (10.0, 4.0, 2.0))
    rates = OuterRates(learning_rate=0.25, momentum=0.5)
    OUTER_OPTIMIZERS["nesterov"].apply(params, momentum, update, rates)
    assert (momentum[0], params[0]) == (4.0, 9.0)

    OUTER_OPTIMIZERS["sgd"].apply(params, momentum, update, rates)
    assert (momentum[0], params[0]) == (4.0, 8.5)


@pytest.mark.parametrize("optimizer", [OUTER_OPTIMIZERS["nesterov"], OUTER_OPTIMIZERS["sgd"]])
@every_rates
def test_the_gain_is_how_far_a_unit_of_the_update_moves_the_params(
    optimizer: OuterOptimizer, rates: OuterRates
) -> None:
    rates = replace(rates, momentum_clip=0.0)
    params, momentum = np.zeros(2, np.float32), np.full(2, 0.5, np.float32)
    optimizer.apply(params, momentum, np.array([3.0, 4.0], np.float32), rates)
    assert params[0] - params[1] == pytest.approx(optimizer.gain(rates), abs=1e-6)


@every_optimizer
@pytest.mark.parametrize("cuts", [(1,), (256, 512), (CHUNK_ELEMENTS,), (100_000, 100_001, 150_000)])
def test_slices_make_the_whole(optimizer: OuterOptimizer, cuts: tuple[int, ...]) -> None:
    elements = 2 * CHUNK_ELEMENTS + 999
    whole = [golden_vector(seed, elements) for seed in (1, 2, 3)]
    sliced = [vector.copy() for vector in whole]

    optimizer.apply(whole[0], whole[1], whole[2], RATES)
    for start, stop in zip((0, *cuts), (*cuts, elements), strict=True):
        params, momentum, update = (vector[start:stop] for vector in sliced)
        optimizer.apply(params, momentum, update, RATES)

    assert [vector.tobytes() for vector in sliced] == [vector.tobytes() for vector in whole]


@every_optimizer
def test_largest_updates_keep_the_state_finite(optimizer: OuterOptimizer) -> None:
    params, momentum = np.zeros(8, np.float32), np.zeros(8, np.float32)
    update = np.full(8, 2.0**64, np.float32)
    for _ in range(100):
        optimizer.apply(params, momentum, update, OuterRates(learning_rate=10.0, momentum=1.0))
    assert np.isfinite(params).all()
    assert np.isfinite(momentum).all()


@every_optimizer
def test_temporary_memory_is_bounded(optimizer: OuterOptimizer) -> None:
    vectors = [golden_vector(seed, 8 * CHUNK_ELEMENTS) for seed in (1, 2, 3)]
    tracemalloc.start()
    try:
        optimizer.apply(vectors[0], vectors[1], vectors[2], RATES)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2 * 4 * CHUNK_ELEMENTS


@pytest.mark.parametrize(
    "wrong",
    [
        {"learning_rate": -0.1},
        {"momentum": -0.1},
        {"momentum": 1.1},
        {"learning_rate": float("nan")},
        {"learning_rate": float("inf")},
        {"momentum_clip": -0.1},
        {"momentum_clip": float("inf")},
        {"momentum_every": 0},
        {"second_moment": 1.1},
        {"epsilon": 0.0},
        {"momentum_every": 3, "turn": 3},
    ],
)
def test_rates_that_no_manifest_has_are_a_bug(wrong: dict[str, float]) -> None:
    with pytest.raises(AssertionError, match="rates"):
        replace(RATES, **wrong)  # type: ignore[arg-type]


# -- what the numbers mean ---------------------------------------------------------------------------------------------


def test_delayed_nesterov_is_a_plain_step_a_round_and_one_of_the_momentum_every_few() -> None:
    """As in arXiv 2401.09135: gradients are gathered in a vector of their own there."""
    every, eta, mu = 4, 0.5, 0.75
    updates = np.random.default_rng(3).standard_normal((3 * every, 600))
    params, momentum = np.zeros(600, np.float32), np.zeros(600, np.float32)
    theta, m, gathered = np.zeros(600), np.zeros(600), np.zeros(600)
    for number, update in enumerate(updates):
        rates = OuterRates(learning_rate=eta, momentum=mu, momentum_every=every, turn=number % every)
        OUTER_OPTIMIZERS["nesterov"].apply(params, momentum, update.astype(np.float32), rates)
        gathered += update
        if (number + 1) % every == 0:
            m = mu * m + gathered / every
            theta -= eta * (mu * m + update / every)
            gathered[:] = 0
        else:
            theta -= eta * update / every
        np.testing.assert_allclose(params, theta, atol=1e-5)
    np.testing.assert_allclose(momentum, m, atol=1e-5)


def test_adam_is_what_two_vectors_of_moments_compute() -> None:
    """arXiv 2003.00295, algorithm 2, with moments in float64: they are kept in half of the bits here."""
    rates = OuterRates(learning_rate=0.1, momentum=0.9, second_moment=0.99, epsilon=1e-3)
    random = np.random.default_rng(5)
    params, moments = np.zeros(600, np.float32), np.zeros(600, np.float32)
    theta, m, v = np.zeros(600), np.zeros(600), np.zeros(600)
    for _ in range(40):
        update = 0.03 * (random.standard_normal(600) + 0.5)
        OUTER_OPTIMIZERS["adam"].apply(params, moments, update.astype(np.float32), rates)
        m, v = 0.9 * m + 0.1 * update, 0.99 * v + 0.01 * update**2
        theta -= 0.1 * m / (np.sqrt(v) + 1e-3)
    moved = np.abs(theta).max()
    np.testing.assert_allclose(params, theta, atol=0.01 * moved)
    assert np.isfinite(moments).all() and moved > 1


def test_a_second_moment_that_no_float32_holds_is_cut() -> None:
    params, moments = np.zeros(1, np.float32), np.zeros(1, np.float32)
    rates = OuterRates(learning_rate=1.0, momentum=0.5, second_moment=0.5)
    OUTER_OPTIMIZERS["adam"].apply(params, moments, np.array([2.0**64], np.float32), rates)
    (bits,) = moments.view(np.uint32)
    assert (bits >> 16, bits & 0xFFFF) == ((120 + 127) << 7, (63 + 127) << 7) and params[0] == -8


def test_clipped_momentum_takes_nothing_beyond_the_limit_along() -> None:
    rates = OuterRates(learning_rate=1.0, momentum=0.5, momentum_clip=2.0)
    params, momentum = np.zeros(3, np.float32), np.zeros(3, np.float32)
    OUTER_OPTIMIZERS["nesterov"].apply(params, momentum, np.array([8.0, -8.0, 1.0], np.float32), rates)
    assert momentum.tolist() == [2.0, -2.0, 1.0] and params.tolist() == [-9.0, 9.0, -1.5]
    OUTER_OPTIMIZERS["nesterov"].apply(params, momentum, np.zeros(3, np.float32), rates)
    assert momentum.tolist() == [1.0, -1.0, 0.5]


@every_optimizer
def test_slices_of_two_lengths_are_a_bug(optimizer: OuterOptimizer) -> None:
    vector = np.ones(2, np.float32)
    with pytest.raises(AssertionError, match="length"):
        optimizer.apply(vector, vector.copy(), np.ones(3, np.float32), RATES)


# Of the processor's floating-point control register in glibc's fenv_t: its offset, the bits that make it round toward
# plus infinity, those that make it flush subnormal results and operands to zero.
_CONTROL = {"x86_64": (28, 0x4000, 0x8040), "aarch64": (0, 1 << 22, 1 << 24)}


@pytest.fixture(params=[1, 2], ids=["rounding upward", "flushing subnormals"])
def altered_arithmetic(request: pytest.FixtureRequest) -> Iterator[None]:
    """The calling thread computes as a library built for speed may have left it."""
    control = _CONTROL[platform.machine()]
    libm = ctypes.CDLL("libm.so.6")
    usual = ctypes.create_string_buffer(64)
    assert libm.fegetenv(usual) == 0
    altered = bytearray(usual.raw)
    (register,) = struct.unpack_from("<I", altered, control[0])
    struct.pack_into("<I", altered, control[0], register | control[request.param])
    assert libm.fesetenv(bytes(altered)) == 0
    yield
    assert libm.fesetenv(usual) == 0


@pytest.mark.usefixtures("altered_arithmetic")
def test_thread_that_computes_otherwise_is_found() -> None:
    assert not rounds_as_specified()


def test_thread_as_python_starts_it_computes_as_specified() -> None:
    assert rounds_as_specified()
