"""Low-rank adapters (LoRA; Hu et al., arXiv 2106.09685, section 4.1) on the linear layers of a model that stands still.

A layer computes W x + alpha / r * B (A x), with A of shape (r, inputs) and B of (outputs, r). A starts uniform with the
bound 1 / sqrt(inputs), as PEFT has it, B as zeros, so that the model starts as it was trained. Names are PEFT's.

Invariant: the parameters of an adapted model are its adapters and nothing else, in the order of its layers.
"""

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from shoal.node.training.causal_lm_config import Lora
from shoal.node.training.model import Linear
from shoal.node.training.parameters import Shape
from shoal.protocol.errors import ManifestError
from shoal.protocol.layout import UNIFORM, ZEROS, TensorSpec

DOWN, UP = "lora_A", "lora_B"
_NAMES_TOLD = 12


def adapt(model: nn.Module, lora: Lora, layers: Mapping[str, nn.Module], *, transposed: bool) -> None:
    """Add the adapters. Their values hold nothing until loaded; `start_adapter` says how they start."""
    for layer in layers.values():
        assert isinstance(layer.weight, Tensor), "it is linear"
        inputs, outputs = layer.weight.shape if transposed else layer.weight.shape[::-1]
        layer.add_module(DOWN, Linear(inputs, lora.rank))
        layer.add_module(UP, Linear(lora.rank, outputs))
        layer.register_forward_hook(_Addition(lora.scale))


class _Addition:
    """What a layer's adapter adds to its output."""

    def __init__(self, scale: float) -> None:
        self._scale = scale

    def __call__(self, layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        added: Tensor = layer.lora_B(layer.lora_A(inputs[0]))
        return output + self._scale * added


def find_layers(model: nn.Module, kind: type[nn.Module], targets: tuple[str, ...]) -> dict[str, nn.Module]:
    """The linear layers to adapt, by name, in their order: those of the numbered blocks, or those that `targets` name.
    Raises ManifestError for a target that is no such layer, or whose matrix other modules have, too."""
    linear = {name: module for name, module in model.named_modules() if isinstance(module, kind)}
    if not targets:
        found = {name: layer for name, layer in linear.items() if any(one.isdecimal() for one in name.split("."))}
    else:
        found = {name: layer for name, layer in linear.items() if any(is_named(name, one) for one in targets)}
        for target in targets:
            if not any(is_named(name, target) for name in found):
                known = sorted({name.rpartition(".")[2] for name in linear})[:_NAMES_TOLD]
                fix = f"use names or the last parts of names of linear layers, such as: {', '.join(known)}"
                raise ManifestError("task.lora_targets", f"{target[:64]!r} is no linear layer of the model", fix)
    if not found:
        fix = "choose another architecture, or start from the weights without lora_rank"
        raise ManifestError("task.lora_rank", "is there, and the model's blocks have no linear layers", fix)
    uses = Counter(id(one) for module in model.modules() for one in module._parameters.values() if one is not None)
    for name, layer in found.items():
        if uses[id(layer.weight)] > 1:
            problem = f"{name} shares its matrix with another part of the model"
            raise ManifestError("task.lora_targets", problem, "leave it out")
    return found


def is_named(layer: str, target: str) -> bool:
    return layer == target or layer.endswith(f".{target}")


def start_adapter(name: str, shape: Shape) -> TensorSpec:
    """How a tensor of an adapter starts."""
    if f".{UP}." in f".{name}":
        return TensorSpec(name=name, shape=shape, init=ZEROS)
    return TensorSpec(name=name, shape=shape, init=UNIFORM, std=1.0 / math.sqrt(3.0 * shape[1]))
