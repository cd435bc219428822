"""How long an inner step is: the warm-up that is a peer's own, times the decay that all peers of a swarm share.

A peer warms up by the steps of its own optimizer, which has to learn its moments wherever the swarm stands. The decay
follows the number of the round, so that a peer that joins late, was away or is slow takes steps as long as the others.

Invariant: the rate is a function of its arguments alone, and never above `training.learning_rate`.
"""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

from shoal.protocol.manifest import CONSTANT, COSINE, LINEAR, Training

# The share of the way from the first rate down to the last one that is left, by the share of the rounds that is over.
DECAYS: Mapping[str, Callable[[float], float]] = MappingProxyType(
    {
        CONSTANT: lambda over: 1.0,
        COSINE: lambda over: (1.0 + math.cos(math.pi * over)) / 2.0,
        LINEAR: lambda over: 1.0 - over,
    }
)


def learning_rate(training: Training, steps: int, round: int) -> float:
    """The rate of an optimizer's step number `steps`, in the training for `round`; both count from 1.

    Round 1 has the whole rate, round `schedule_rounds` + 1 and all after it the share `learning_rate_end` of it."""
    warmup = min(1.0, steps / max(1, training.warmup_steps))
    over = min(1.0, max(0, round - 1) / max(1, training.schedule_rounds))
    left = DECAYS[training.schedule](over)
    # From 1 downwards, so that what has not decayed is the rate of the manifest to the bit.
    return training.learning_rate * warmup * (1.0 - (1.0 - left) * (1.0 - training.learning_rate_end))
