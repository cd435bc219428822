"""The inner loops of the outer step, as protocol/README.md, "Outer step", has them.

Invariants: as in protocol/kernels.py.
"""

import numpy as np

from shoal.protocol.kernels import Float32s, Scalar, bits_of, compiled, float_of

_UPPER_HALF = np.uint32(0xFFFF0000)
_SECOND_MOMENT_MAX = np.float32(2.0**120)  # the square of an update may be more than a float32 holds


@compiled
def _round_to_upper_half(bits: Scalar) -> Scalar:
    """The bits of a finite float32, rounded half to even so that the upper 16 are a bfloat16; the others are junk."""
    return bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))


@compiled
def nesterov(
    params: Float32s,
    momentum: Float32s,
    update: Float32s,
    eta: np.float32,
    share: np.float32,
    kept: np.float32,
    limit: np.float32,
    reach: np.float32,
) -> None:
    """e = share * d; m = kept * m + e, at most limit and at least -limit; p = p - eta * (e + reach * m)."""
    for index in range(params.size):
        part = share * update[index]
        fresh = kept * momentum[index] + part
        if fresh > limit:
            fresh = limit
        elif fresh < -limit:
            fresh = -limit
        momentum[index] = fresh
        params[index] = params[index] - eta * (part + reach * fresh)


@compiled
def sgd(params: Float32s, update: Float32s, eta: np.float32) -> None:
    """p = p - eta * d."""
    for index in range(params.size):
        params[index] = params[index] - eta * update[index]


@compiled
def adam(
    params: Float32s,
    moments: Float32s,
    update: Float32s,
    eta: np.float32,
    betas: tuple[np.float32, np.float32],
    shares: tuple[np.float32, np.float32],
    epsilon: np.float32,
) -> None:
    """m = b1 * m + c1 * d; v = b2 * v + c2 * (d * d), at most 2^120; p = p - eta * (m / (sqrt(v) + epsilon)). Of an
    element of `moments` the upper 16 bits are v as bfloat16 and the lower ones m."""
    for index in range(params.size):
        kept = bits_of(moments[index])
        fresh = update[index]
        first = betas[0] * float_of(np.uint32(kept << np.uint32(16))) + shares[0] * fresh
        second = betas[1] * float_of(kept & _UPPER_HALF) + shares[1] * (fresh * fresh)
        if second > _SECOND_MOMENT_MAX:
            second = _SECOND_MOMENT_MAX
        params[index] = params[index] - eta * (first / (np.sqrt(second) + epsilon))
        upper, lower = _round_to_upper_half(bits_of(second)), _round_to_upper_half(bits_of(first))
        moments[index] = float_of((upper & _UPPER_HALF) | (lower >> np.uint32(16)))
