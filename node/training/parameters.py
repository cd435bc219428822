"""A model's parameters as a layout names them: their order, their shapes, and how they start.

Invariant: the order is that of `named_parameters`, which is also the order in which the flat vector is loaded into a
model and read out of it.
"""

import math
from collections.abc import Callable

import torch
from torch import nn

from shoal.protocol.layout import ONES, UNIFORM, ZEROS, TensorSpec

Shape = tuple[int, ...]


def list_specs(build: Callable[[], nn.Module], start: Callable[[str, Shape], TensorSpec]) -> tuple[TensorSpec, ...]:
    """One spec for each parameter of the model that `build` makes, as `start` gives it by name and shape. Allocates no
    parameter. Buffers, such as the running means of a batch norm, are no parameters: the swarm does not share them."""
    with torch.device("meta"):
        model = build()
    return tuple(start(name, tuple(parameter.shape)) for name, parameter in model.named_parameters())


def start_uniform(name: str, shape: Shape) -> TensorSpec:
    """A start for most models. What has two dimensions and more is uniform, with the standard deviation that keeps the
    variance of its input, whose size is the product of all dimensions but the first (LeCun et al., "Efficient
    BackProp", 1998, section 4.6). Of the vectors those named `weight`, the gains of norms, are ones, others zeros."""
    if len(shape) > 1:
        return TensorSpec(name=name, shape=shape, init=UNIFORM, std=math.sqrt(1.0 / math.prod(shape[1:])))
    return TensorSpec(name=name, shape=shape, init=ONES if name.rpartition(".")[2] == "weight" else ZEROS)
