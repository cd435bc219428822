"""A model that starts from trained weights and is trained whole: its parameters are what it has moved away from them.

The weights W are frozen; the swarm's vector is d, which starts as zeros, and the model computes with W + d. So the
daemon needs no weights to know the state of any round, and a pseudo-gradient is the same as that of W + d. What differs
is weight decay, which draws towards the trained weights and not towards zero (L2-SP; Li et al., arXiv 1802.01483).

Invariant: W never changes; it is one copy however many models stand on it.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from shoal.node.training.parameters import Shape
from shoal.protocol.layout import ZEROS, TensorSpec


class Displaced(nn.Module):
    """Calls `inner` with the sum of its own parameters and `start`, both by name and on one device."""

    def __init__(self, inner: nn.Module, start: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.inner = inner
        self._start = dict(start)

    def forward(self, **inputs: Any) -> Any:
        moved = {name: self._start[name] + parameter for name, parameter in self.inner.named_parameters()}
        return functional_call(self.inner, moved, kwargs=inputs)


def start_displacement(name: str, shape: Shape) -> TensorSpec:
    return TensorSpec(name=name, shape=shape, init=ZEROS)
