"""The outer step: how a certified update changes the global state (DiLoCo, arXiv 2311.08105, outer optimizers).

Invariants: every operation is an elementwise float32 operation with one rounding, in the order that protocol/README.md,
"Outer step", gives, so that every machine gets the same state; elements do not mix, so that applying slice by slice is
applying the whole.
"""

import math
from dataclasses import dataclass
from types import ModuleType
from typing import Protocol

import numpy as np

from shoal.protocol.codecs import Float32s


@dataclass(frozen=True, slots=True, kw_only=True)
class OuterRates:
    """The numbers of one round's outer step; each is rounded to float32 once.

    No element of the momentum gets beyond `momentum_clip` (CO2, arXiv 2401.16265); 0: it has no limit. With
    `momentum_every` N a step is 1/N as long, and the momentum takes part in every Nth of them (delayed Nesterov, arXiv
    2401.09135, with c = 0); `turn` says which of the N this is, from 0.

    `second_moment` and `epsilon` are for Adam, whose first factor is `momentum`."""

    learning_rate: float
    momentum: float
    momentum_clip: float = 0.0
    momentum_every: int = 1
    turn: int = 0
    second_moment: float = 0.99
    epsilon: float = 1e-3

    def __post_init__(self) -> None:
        assert 0 <= self.learning_rate < math.inf and 0 <= self.momentum <= 1, "rates of a manifest"
        assert 0 <= self.second_moment <= 1 and 0 < self.epsilon < math.inf, "rates of a manifest"
        assert 0 <= self.momentum_clip < math.inf and 0 <= self.turn < self.momentum_every, "rates of a manifest"


class OuterOptimizer(Protocol):
    """The rule of an outer step. Instances hold no state: what it remembers is `momentum`, part of the global state."""

    @property
    def name(self) -> str: ...

    def apply(self, params: Float32s, momentum: Float32s, update: Float32s, rates: OuterRates) -> None:
        """Change `params` and `momentum`, float32[n] each, in place by the decoded `update`, float32[n], which stays as
        it is."""

    def gain(self, rates: OuterRates) -> float:
        """How far the same step moves `params` for each unit of `update`. For estimates: it need not be exact; 0 where
        elements differ in that."""
        ...


class Nesterov:
    """m = mu * m + d; p = p - eta * (d + mu * m), as torch.optim.SGD(nesterov=True) has it. Of N turns the first one
    has the mu before m, and the last one that after d; each has d / N in the place of d."""

    __slots__ = ()
    name = "nesterov"

    def apply(self, params: Float32s, momentum: Float32s, update: Float32s, rates: OuterRates) -> None:
        assert params.size == momentum.size == update.size, "slices of one length"
        share = np.float32(1 / rates.momentum_every)
        kept = np.float32(1 if rates.turn else rates.momentum)
        limit = np.float32(rates.momentum_clip or math.inf)  # what is no float32 but 0 is a limit of 0
        eta, reach = np.float32(rates.learning_rate), np.float32(self._reach(rates))
        _load_kernels().nesterov(params, momentum, update, eta, share, kept, limit, reach)

    def gain(self, rates: OuterRates) -> float:
        return rates.learning_rate / rates.momentum_every * (1 + self._reach(rates))

    def _reach(self, rates: OuterRates) -> float:
        return rates.momentum if rates.turn == rates.momentum_every - 1 else 0.0


class Sgd:
    """p = p - eta * d. The momentum stays as it is."""

    __slots__ = ()
    name = "sgd"

    def apply(self, params: Float32s, momentum: Float32s, update: Float32s, rates: OuterRates) -> None:
        assert params.size == momentum.size == update.size, "slices of one length"
        _load_kernels().sgd(params, update, np.float32(rates.learning_rate))

    def gain(self, rates: OuterRates) -> float:
        return rates.learning_rate


class Adam:
    """FedAdam (Reddi et al., arXiv 2003.00295): m = b1 * m + (1 - b1) * d; v = b2 * v + (1 - b2) * d^2;
    p = p - eta * m / (sqrt(v) + epsilon), without a correction of the first rounds. `momentum` holds both moments,
    as two bfloat16 an element."""

    __slots__ = ()
    name = "adam"

    def apply(self, params: Float32s, momentum: Float32s, update: Float32s, rates: OuterRates) -> None:
        assert params.size == momentum.size == update.size, "slices of one length"
        betas = np.float32(rates.momentum), np.float32(rates.second_moment)
        shares = np.float32(1 - rates.momentum), np.float32(1 - rates.second_moment)
        eta, epsilon = np.float32(rates.learning_rate), np.float32(rates.epsilon)
        _load_kernels().adam(params, momentum, update, eta, betas, shares, epsilon)

    def gain(self, rates: OuterRates) -> float:
        return 0.0


OUTER_OPTIMIZERS: dict[str, OuterOptimizer] = {"nesterov": Nesterov(), "sgd": Sgd(), "adam": Adam()}


def _load_kernels() -> ModuleType:
    """Imported by whoever computes, and not by a relay or a command."""
    from shoal.protocol import outer_kernels

    return outer_kernels


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
