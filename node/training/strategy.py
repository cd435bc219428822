"""How a peer trains between two rounds, and what it does with a new base: the interface and the table of strategies.

"diloco" (Douillard et al., arXiv 2311.08105, algorithm 1): AdamW inside, its state kept across rounds; when a base
comes, the parts that include this peer's contribution adopt it, and the parts that left this peer out keep their local
parameters, so that their work goes into the next pseudo-gradient, anchored at the new base.

Invariant: a step whose loss or gradient is not finite changes no parameter and no optimizer state.
"""

from collections.abc import Callable, Iterator, Mapping
from itertools import groupby
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from shoal.node.training.messages import FloatVector
from shoal.protocol.layout import Layout
from shoal.protocol.manifest import Training
from shoal.protocol.quorum import has_member

# Adam's moments for language models at small batches; the published DiLoCo runs use the same.
ADAM_BETAS = (0.9, 0.95)
ADAM_EPSILON = 1e-8


class Strategy(Protocol):
    """Owns the model's parameters and the inner optimizer. `base` and `local` are float32[D] in the layout's order."""

    def step(self, loss: Tensor) -> bool:
        """One inner step down the gradient of `loss`; False, and nothing changed, where either is not finite."""
        ...

    def adopt(self, base: FloatVector) -> None:
        """Local parameters become the base; the inner optimizer keeps its state."""
        ...

    def merge(self, base: FloatVector, included: bytes, part_elements: int) -> None:
        """A round was certified: take the included parts of the new base as this strategy does."""
        ...

    def restart(self, base: FloatVector) -> None:
        """As `adopt`, and the inner optimizer starts over: for when its state is not to be trusted."""
        ...

    def export(self, local: FloatVector) -> bool:
        """Write the local parameters; False, and nothing written, where one of them is not finite."""
        ...

    def parameter_tensors(self) -> dict[str, Tensor]:
        """The local parameters by name: the live tensors, for a checkpoint to read or to be copied into."""
        ...

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """The inner optimizer's state, likewise."""
        ...


class DiLoCo:
    def __init__(self, model: nn.Module, layout: Layout, training: Training) -> None:
        self._model = model
        self._training = training
        self._parameters = list(model.parameters())
        assert [tuple(parameter.shape) for parameter in self._parameters] == [spec.shape for spec in layout.tensors]
        self._optimizer = AdamW(self._parameters, training)

    def step(self, loss: Tensor) -> bool:
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it so
        norm = nn.utils.clip_grad_norm_(self._parameters, self._training.gradient_clip)
        finite = bool(torch.isfinite(loss) & torch.isfinite(norm))
        if finite:
            self._optimizer.step()
        self._model.zero_grad(set_to_none=False)
        return finite

    def adopt(self, base: FloatVector) -> None:
        load_parameters(self._model, base)

    def merge(self, base: FloatVector, included: bytes, part_elements: int) -> None:
        for first, last in included_ranges(included, part_elements, base.size):
            load_parameters(self._model, base, first, last)

    def restart(self, base: FloatVector) -> None:
        self.adopt(base)
        self._optimizer = AdamW(self._parameters, self._training)

    @torch.no_grad()
    def export(self, local: FloatVector) -> bool:
        if not all(bool(torch.isfinite(parameter).all()) for parameter in self._parameters):
            return False
        first = 0
        target = torch.from_numpy(local)
        for parameter in self._parameters:
            target[first : first + parameter.numel()].copy_(parameter.view(-1))
            first += parameter.numel()
        return True

    def parameter_tensors(self) -> dict[str, Tensor]:
        return {f"model.{name}": parameter.data for name, parameter in self._model.named_parameters()}

    def optimizer_tensors(self) -> dict[str, Tensor]:
        return self._optimizer.tensors()


class AdamW:
    """AdamW (arXiv 1711.05101) by torch's own kernel. Gains and biases, where a model has them, are not decayed.

    torch.optim.AdamW is the same arithmetic, but imports torch's compiler: over a second and 70 MB more a trainer."""

    def __init__(self, parameters: list[nn.Parameter], training: Training) -> None:
        self._training = training
        self._steps = torch.zeros((), dtype=torch.int64)
        decayed = [parameter for parameter in parameters if parameter.dim() >= 2]
        rest = [parameter for parameter in parameters if parameter.dim() < 2]
        groups = ((decayed, training.weight_decay), (rest, 0.0))
        self._groups = tuple((_Moments(members), decay) for members, decay in groups if members)

    @torch.no_grad()
    def step(self) -> None:
        """Apply the gradients that the parameters hold."""
        self._steps += 1
        warmup = min(1.0, int(self._steps) / max(1, self._training.warmup_steps))
        for moments, decay in self._groups:
            adamw(
                moments.parameters,
                moments.gradients,
                moments.first,
                moments.second,
                [],
                moments.steps,
                fused=True,
                amsgrad=False,
                maximize=False,
                beta1=ADAM_BETAS[0],
                beta2=ADAM_BETAS[1],
                lr=self._training.learning_rate * warmup,
                weight_decay=decay,
                eps=ADAM_EPSILON,
            )

    def tensors(self) -> dict[str, Tensor]:
        """The live state: whoever copies into these tensors puts the optimizer where another one was."""
        found = {"optimizer.steps": self._steps}
        for number, (moments, _) in enumerate(self._groups):
            for name, members in (("first", moments.first), ("second", moments.second), ("steps", moments.steps)):
                found |= {f"optimizer.{number}.{name}.{at}": one for at, one in enumerate(members)}
        return found


class _Moments:
    """Some parameters, their gradients and moments, and how many gradients each has seen. The gradients are allocated
    here and never replaced, so that a parameter which took no part in a batch has one, too."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters: list[Tensor] = [*parameters]
        self.gradients = [torch.zeros_like(parameter) for parameter in parameters]
        for parameter, gradient in zip(parameters, self.gradients, strict=True):
            parameter.grad = gradient
        self.first = [torch.zeros_like(parameter) for parameter in parameters]
        self.second = [torch.zeros_like(parameter) for parameter in parameters]
        self.steps = [torch.zeros((), dtype=torch.float32, device=parameter.device) for parameter in parameters]


STRATEGIES: Mapping[str, Callable[[nn.Module, Layout, Training], Strategy]] = MappingProxyType({"diloco": DiLoCo})


@torch.no_grad()
def load_parameters(model: nn.Module, base: FloatVector, first: int = 0, last: int | None = None) -> None:
    """Copy base[first:last] to where these elements stand in the model."""
    source = torch.from_numpy(base)
    end = base.size if last is None else last
    offset = 0
    for parameter in model.parameters():
        low, high = max(first, offset), min(end, offset + parameter.numel())
        if low < high:
            parameter.view(-1)[low - offset : high - offset].copy_(source[low:high])
        offset += parameter.numel()


@torch.no_grad()
def load_tensors(target: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> bool:
    """Copy by name; False, and nothing copied, where a name, a shape or a type is missing or another one."""
    for name, one in target.items():
        given = source.get(name)
        if given is None or given.shape != one.shape or given.dtype != one.dtype:
            return False
    for name, one in target.items():
        one.copy_(source[name])
    return True


def included_ranges(included: bytes, part_elements: int, elements: int) -> Iterator[tuple[int, int]]:
    """The longest runs (first element, one past the last) of the included parts of a vector."""
    parts = range(-(-elements // part_elements))
    for present, run in groupby(parts, key=lambda part: has_member(included, part)):
        if present:
            numbers = list(run)
            yield numbers[0] * part_elements, min((numbers[-1] + 1) * part_elements, elements)
