"""How a model of somebody else's starts, as a layout says it: found out by watching its own initialisation.

The model is built without memory (torch's meta device), its initialisation runs, and what it does to each parameter is
noted instead of computed. A normal start becomes a uniform one with the same standard deviation, because a layout has
no other (protocol/layout.py tells why).

Invariant: a parameter of which it is not known how it starts, or whose start a layout cannot say, is refused by name.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from shoal.node.training.parameters import Shape
from shoal.protocol.errors import ManifestError
from shoal.protocol.layout import ONES, UNIFORM, ZEROS, TensorSpec

_UNKNOWN = "unknown"

Start = tuple[str, float]  # how, and with which standard deviation


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it so
    """Notes what was last done in place to each whole tensor, by the memory that it stands for."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._starts: dict[int, Start] = {}
        self._kept: list[Tensor] = []  # so that no address stands for two of them

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        done = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        if name.endswith("_") and args and isinstance(args[0], Tensor):
            self._note(args[0], name, [one for one in args[1:] if isinstance(one, int | float)])
        return done

    def _note(self, tensor: Tensor, name: str, values: list[float]) -> None:
        storage = tensor.untyped_storage()
        # A part, as the row of a padding token is: whatever it is set to, it is of no account.
        if tensor.numel() * tensor.element_size() < storage.nbytes():
            return
        self._kept.append(tensor)
        self._starts[storage._cdata] = _read_start(name, values)

    def find(self, tensor: Tensor) -> Start:
        return self._starts.get(tensor.untyped_storage()._cdata, (_UNKNOWN, 0.0))


def _read_start(name: str, values: list[float]) -> Start:
    """How a tensor stands after this was done to it."""
    match name, values:
        case "zero_", _:
            return ZEROS, 0.0
        case "fill_", [value] if value in (0.0, 1.0):
            return (ONES if value else ZEROS), 0.0
        case "normal_", []:
            return UNIFORM, 1.0
        case "normal_", [mean, std] if mean == 0.0:
            return (UNIFORM, float(std)) if std else (ZEROS, 0.0)
        case "uniform_", [low, high] if low == -high:
            return UNIFORM, float(high) / math.sqrt(3.0)
    return _UNKNOWN, 0.0


def list_starts(build: Callable[[], nn.Module], initialise: Callable[[Any], None]) -> tuple[TensorSpec, ...]:
    """One spec for each parameter of the model that `build` makes, in the order of `named_parameters`; `initialise`
    lets the model start. Allocates no parameter. Raises ManifestError."""
    with torch.device("meta"):
        model = build()
    with Watch() as watch:
        initialise(model)
    return tuple(_make_spec(name, parameter, watch.find(parameter)) for name, parameter in model.named_parameters())


def _make_spec(name: str, parameter: nn.Parameter, start: Start) -> TensorSpec:
    shape: Shape = tuple(parameter.shape)
    if not parameter.requires_grad:
        raise ManifestError("task.config", f"{name} is not to be trained", "choose another architecture")
    kind, std = start
    if kind == _UNKNOWN:
        fix = "choose another architecture: zeros, ones, and normal or uniform ones about 0 can be said"
        raise ManifestError("task.config", f"a manifest cannot say how {name} starts", fix)
    return TensorSpec(name=name, shape=shape, init=kind, std=std)
