"""The outer step: how a certified update changes the global state (DiLoCo, arXiv 2311.08105, outer optimizers).

Invariants: every operation is an elementwise float32 operation with one rounding, in the order that protocol/README.md,
"Outer step", gives, so that every machine gets the same state; elements do not mix, so that applying slice by slice is
applying the whole.
"""

from typing import Protocol

import numpy as np

from shoal.protocol.codecs import Float32s, load_kernels


class OuterOptimizer(Protocol):
    """The rule of an outer step. Instances hold no state: what it remembers is `momentum`, part of the global state."""

    @property
    def name(self) -> str: ...

    def apply(
        self, params: Float32s, momentum: Float32s, update: Float32s, learning_rate: float, momentum_factor: float
    ) -> None:
        """Change `params` and `momentum`, float32[n] each, in place by the decoded `update`, float32[n], which stays as
        it is. The two numbers, 0 or more and the momentum factor at most 1, are rounded to float32 once."""

    def gain(self, learning_rate: float, momentum_factor: float) -> float:
        """How far the same step moves `params` for each unit of `update`. For estimates: it need not be exact."""
        ...


class Nesterov:
    """m = mu * m + d; p = p - eta * (d + mu * m), as torch.optim.SGD(nesterov=True) has it."""

    __slots__ = ()
    name = "nesterov"

    def apply(
        self, params: Float32s, momentum: Float32s, update: Float32s, learning_rate: float, momentum_factor: float
    ) -> None:
        assert params.size == momentum.size == update.size, "slices of one length"
        eta, mu = _round_rates(learning_rate, momentum_factor)
        load_kernels().nesterov(params, momentum, update, eta, mu)

    def gain(self, learning_rate: float, momentum_factor: float) -> float:
        return learning_rate * (1 + momentum_factor)


class Sgd:
    """p = p - eta * d. The momentum stays as it is."""

    __slots__ = ()
    name = "sgd"

    def apply(
        self, params: Float32s, momentum: Float32s, update: Float32s, learning_rate: float, momentum_factor: float
    ) -> None:
        assert params.size == momentum.size == update.size, "slices of one length"
        eta, _ = _round_rates(learning_rate, momentum_factor)
        load_kernels().sgd(params, update, eta)

    def gain(self, learning_rate: float, momentum_factor: float) -> float:
        return learning_rate


OUTER_OPTIMIZERS: dict[str, OuterOptimizer] = {"nesterov": Nesterov(), "sgd": Sgd()}


def rounds_as_specified() -> bool:
    """Whether the calling thread's float32 arithmetic rounds half to even and keeps subnormal numbers, as IEEE 754 has
    it by default. Libraries built with -ffast-math switch that off for the thread that loads them and for its children;
    a peer whose worker threads fail here would compute other state roots than its swarm, and must not join."""
    smallest_normal = np.full(16, 2.0**-126, np.float32)
    halves = smallest_normal * np.float32(0.5)
    ties = np.float32(1) + np.array([2.0**-24, 3 * 2.0**-24] * 8, np.float32)
    return bool(
        np.all(halves + halves == smallest_normal)
        and np.all(halves.view(np.uint32) == 1 << 22)
        and np.all(ties[::2] == 1)
        and np.all(ties[1::2] == np.float32(1 + 2.0**-22))
    )


def _round_rates(learning_rate: float, momentum_factor: float) -> tuple[np.float32, np.float32]:
    assert 0 <= learning_rate < float("inf") and 0 <= momentum_factor <= 1, "rates of a manifest"
    return np.float32(learning_rate), np.float32(momentum_factor)
