"""How a peer trains between two rounds, and what it does with a new base: the interface and the table of strategies.

"diloco" (Douillard et al., arXiv 2311.08105, algorithm 1): an inner optimizer whose state is kept across rounds; when a
base comes, the parts that include this peer's contribution adopt it, and the parts that left this peer out keep their
local parameters, so that their work goes into the next pseudo-gradient, anchored at the new base.

"overlapped" (Douillard et al., arXiv 2501.18512, section 2.3, with the whole model as its one fragment): as "diloco",
but it trains on while its contribution is exchanged, and what it has by then is mixed with the base that comes.

"delayed" (the one-step delay of DiLoCoX, arXiv 2506.21263, and of CO2, ICLR 2024): as "overlapped", but the base that
comes takes the place of what was handed over, and the steps made since stay upon it.

Invariants: a step whose loss or gradient is not finite changes no parameter and no optimizer state; no step, taken or
refused, leaves anything of its gradient for the next one.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor, nn

from shoal.node.training.local_parameters import LocalParameters
from shoal.node.training.messages import FloatVector
from shoal.node.training.optimizers import INNER_OPTIMIZERS
from shoal.node.training.schedules import learning_rate
from shoal.protocol.layout import Layout
from shoal.protocol.manifest import DELAYED, DILOCO, OVERLAPPED, Training


class Strategy(Protocol):
    """Owns the model's parameters and the inner optimizer. `base` and `local` are float32[D] in the layout's order."""

    def gather(self, loss: Tensor) -> None:
        """Add the gradient of `loss`, a scalar, to what the next step goes down. After an error some of it may be
        there, until `drop`."""
        ...

    def drop(self) -> None:
        """Forget what was gathered."""
        ...

    def step(self, loss: Tensor, round: int) -> bool:
        """One inner step in the training for `round`, down what was gathered. `loss` is the sum of what that is the
        gradient of; False, and nothing changed, where either is not finite."""
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
        self._local = LocalParameters(model)
        self._parameters = list(model.parameters())
        assert [tuple(parameter.shape) for parameter in self._parameters] == [spec.shape for spec in layout.tensors]
        self._steps = torch.zeros((), dtype=torch.int64)
        named = tuple(zip(layout.tensors, self._parameters, strict=True))
        self._optimizer = INNER_OPTIMIZERS[training.inner_optimizer](named, training)

    def gather(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it so

    def drop(self) -> None:
        self._model.zero_grad(set_to_none=False)

    def step(self, loss: Tensor, round: int) -> bool:
        norm = nn.utils.clip_grad_norm_(self._parameters, self._training.gradient_clip)
        finite = bool(torch.isfinite(loss) & torch.isfinite(norm))
        if finite:
            self._steps += 1
            self._optimizer.step(learning_rate(self._training, int(self._steps), round))
        self.drop()
        return finite

    def adopt(self, base: FloatVector) -> None:
        self._local.adopt(base)

    def merge(self, base: FloatVector, included: bytes, part_elements: int) -> None:
        self._local.merge(base, included, part_elements)

    def restart(self, base: FloatVector) -> None:
        self.adopt(base)
        for one in self.optimizer_tensors().values():
            one.zero_()

    def export(self, local: FloatVector) -> bool:
        return self._local.export(local)

    def parameter_tensors(self) -> dict[str, Tensor]:
        return {f"model.{name}": parameter.data for name, parameter in self._model.named_parameters()}

    def optimizer_tensors(self) -> dict[str, Tensor]:
        return {"optimizer.steps": self._steps} | self._optimizer.tensors()


class Overlapped(DiLoCo):
    """theta = alpha * theta + (1 - alpha) * base for the parts that include this peer; alpha: `training.mixing`."""

    def merge(self, base: FloatVector, included: bytes, part_elements: int) -> None:
        self._local.merge(base, included, part_elements, kept=self._training.mixing)


class Delayed(DiLoCo):
    """theta = base + (theta - what was handed over) for the parts that include this peer."""

    def __init__(self, model: nn.Module, layout: Layout, training: Training) -> None:
        super().__init__(model, layout, training)
        self._handed_over: FloatVector | None = None  # None: nothing was done since it was handed over

    def adopt(self, base: FloatVector) -> None:
        super().adopt(base)
        self._handed_over = None

    def merge(self, base: FloatVector, included: bytes, part_elements: int) -> None:
        if self._handed_over is None:
            self._local.merge(base, included, part_elements)
        else:
            self._local.rebase(base, self._handed_over, included, part_elements)

    def restart(self, base: FloatVector) -> None:
        handed = self._handed_over is not None
        super().restart(base)
        # What was handed over is in the parameters no more, but may come with the next base: from here on what counts
        # is made upon this one, whose memory the daemon will write the next one to.
        self._handed_over = base.copy() if handed else None

    def export(self, local: FloatVector) -> bool:
        exported = super().export(local)
        self._handed_over = local if exported else self._handed_over
        return exported


STRATEGIES: Mapping[str, Callable[[nn.Module, Layout, Training], Strategy]] = MappingProxyType(
    {DILOCO: DiLoCo, OVERLAPPED: Overlapped, DELAYED: Delayed}
)


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
