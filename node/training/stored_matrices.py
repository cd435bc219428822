"""Frozen matrices that stay in the type of their files, bfloat16 or float16, in half of float32's memory.

What is computed is what float32 copies would give: each value of either type is a float32. A linear layer on a CPU
widens its matrix while it multiplies, once forwards and once backwards, and keeps no copy in between; where autocast
is on, as on a GPU, products are in bfloat16 anyway and take the matrix as it is. An embedding widens the rows that it
looks up. Everything else in a model, such as norms and biases, is small and stays float32.

Invariant: whoever asks such a layer for its `weight` gets float32.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shoal.node.training.weights import Bytes, StoredTensor

_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def view_stored(content: Bytes, stored: StoredTensor) -> Tensor:
    """A tensor of the type and shape that it has in its file, on the memory of `content`."""
    return torch.from_numpy(content).view(_TYPES[stored.dtype]).view(stored.shape)


def list_matrices(model: nn.Module, transposed: type[nn.Module] | None) -> frozenset[str]:
    """The names of the parameters that are matrices of linear layers and embeddings and nothing else. `transposed` is
    the class of linear layers whose matrix lies the other way, of shape (inputs, outputs)."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    places = [
        (names[id(parameter)], own == "weight" and _choose_class(module, transposed) is not None)
        for module in model.modules()
        for own, parameter in module.named_parameters(recurse=False)
    ]
    return frozenset(names.values()) - {name for name, is_matrix in places if not is_matrix}


def freeze(model: nn.Module, tensors: Mapping[str, Tensor], transposed: type[nn.Module] | None) -> None:
    """Put the tensors in the place of the parameters of these names; those that were tied share theirs. Other types
    than float32 are for what `list_matrices` names."""
    frozen = {id(parameter): tensors[name] for name, parameter in model.named_parameters() if name in tensors}
    for module in list(model.modules()):
        for own, parameter in list(module.named_parameters(recurse=False)):
            tensor = frozen.get(id(parameter))
            if tensor is None:
                continue
            delattr(module, own)
            if tensor.dtype == torch.float32:
                module.register_buffer(own, tensor, persistent=False)
            else:
                found = _choose_class(module, transposed) if own == "weight" else None
                assert found is not None, "a matrix of a linear layer or an embedding"
                module.__class__ = found
                module.register_buffer("stored", tensor, persistent=False)


class _Widened:
    """Before a class of layers: its `weight` is `stored`, widened."""

    stored: Tensor

    @property
    def weight(self) -> Tensor:
        return self.stored.float()


class _StoredLinear(_Widened):
    """Before nn.Linear: `stored` is (outputs, inputs)."""

    bias: Tensor | None

    def forward(self, inputs: Tensor) -> Tensor:
        return _multiply(inputs, self.stored, self.bias, transposed=False)


class _StoredTransposed(_Widened):
    """Before transformers' Conv1D: `stored` is (inputs, outputs)."""

    bias: Tensor

    def forward(self, inputs: Tensor) -> Tensor:
        return _multiply(inputs, self.stored, self.bias, transposed=True)


class _StoredEmbedding(_Widened, nn.Embedding):  # type: ignore[override]  # of `weight` the first one counts
    """After a class of embeddings of its own, so that this is what it asks for rows."""

    def forward(self, input: Tensor) -> Tensor:  # as nn.Embedding names it
        return F.embedding(input, self.stored, self.padding_idx).float()


def _choose_class(module: nn.Module, transposed: type[nn.Module] | None) -> type[nn.Module] | None:
    """The class of such a layer with `stored`; None for another one. A class of linear layers of its own may compute
    something else."""
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return None  # it changes the rows that are looked up
    kind: Any = type(module)
    before = {nn.Linear: _StoredLinear, nn.Embedding: _StoredEmbedding, transposed: _StoredTransposed}.get(kind)
    if before is not None:
        return _make_class((before, kind))
    return _make_class((kind, _StoredEmbedding)) if isinstance(module, nn.Embedding) else None


@cache  # one for each class of layers that a model has
def _make_class(bases: tuple[Any, ...]) -> type[nn.Module]:
    return type(f"Stored{bases[-1].__name__}", bases, {})


def _multiply(inputs: Tensor, stored: Tensor, bias: Tensor | None, *, transposed: bool) -> Tensor:
    if torch.is_autocast_enabled(inputs.device.type):
        return F.linear(inputs, stored.T if transposed else stored, bias)
    product: Tensor = _Product.apply(inputs, stored, bias, transposed)  # type: ignore[no-untyped-call]  # torch's own
    return product


class _Product(torch.autograd.Function):
    """x W^T + b for inputs x (…, n) in float32, W in half of it. The frozen have no gradient."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, stored: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
        ctx.save_for_backward(stored)
        ctx.transposed = transposed
        matrix = stored.float()
        return F.linear(inputs, matrix.T if transposed else matrix, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (stored,) = ctx.saved_tensors
        matrix = stored.float()
        return gradients[0] @ (matrix.T if ctx.transposed else matrix), None, None, None
