"""How a peer trains between two rounds, and what it does with a new base: the interface and the table of strategies.

"diloco" (Douillard et al., arXiv 2311.08105, algorithm 1): an inner optimizer whose state is kept across rounds; when a
base comes, the parts that include this peer's contribution adopt it, and the parts that left this peer out keep their
local parameters, so that their work goes into the next pseudo-gradient, anchored at the new base.

"overlapped" (Douillard et al., arXiv 2501.18512, section 2.3, with the whole model as its one fragment): as "diloco",
but it trains on while its contribution is exchanged, and what it has by then is mixed with the base that comes.

"delayed" (the one-step delay of DiLoCoX, arXiv 2506.21263, and of CO2, ICLR 2024): as "overlapped", but the base that
comes takes the place of what was handed over, and the steps made since stay upon it.

"eager" (Kale et al., arXiv 2502.12996): as "delayed", but beside the exchange it trains on from its own estimate of the
base that will come.

Invariants: a pseudo-gradient is made of steps and of nothing else, its own and, after a shift, another peer's: what a
peer trains on may be an estimate, what it hands over stands upon the base; a step whose loss or gradient is not finite
changes no parameter and no optimizer state; no step, taken or refused, leaves anything of its gradient for the next
one.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from shoal.node.training.local_parameters import LocalParameters
from shoal.node.training.messages import FloatVector
from shoal.node.training.optimizers import INNER_OPTIMIZERS
from shoal.node.training.schedules import learning_rate
from shoal.protocol.layout import Layout
from shoal.protocol.manifest import DELAYED, DILOCO, EAGER, OVERLAPPED, Training
from shoal.protocol.quorum import has_member, make_bitmap


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

    def hand_over(self, base: FloatVector, local: FloatVector) -> None:
        """Training goes on beside the exchange of `local`, which was exported just now and holds still until the next
        `merge` or `adopt`. Before a `take_back` it may have been written over, where `training.gossip_after_s` is not
        0. `base` is the newest there is, and may be changing."""
        ...

    def take_back(self) -> None:
        """No round has counted what was handed over last: all work is in the local parameters again."""
        ...

    def shift(self, move: FloatVector) -> bool:
        """After a `take_back`: add this move, float32[D], to the local parameters; the inner optimizer keeps its state.
        False, and nothing changed, where one of them would not be finite."""
        ...

    def merge(self, base: FloatVector, included: bytes, part_elements: int, gain: float) -> None:
        """A round was certified: take the included parts of the new base as this strategy does. `gain` is Merge's."""
        ...

    def take_parts(self, base: FloatVector, included: bytes, part_elements: int) -> None:
        """After a `merge` of a base that was written meanwhile: the included parts are those of this one alone, and
        what was made beside the exchange is dropped there."""
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

    def hand_over(self, base: FloatVector, local: FloatVector) -> None:
        pass

    def take_back(self) -> None:
        pass

    def shift(self, move: FloatVector) -> bool:
        return self._local.shift(move)

    def merge(self, base: FloatVector, included: bytes, part_elements: int, gain: float) -> None:
        self.take_parts(base, included, part_elements)

    def take_parts(self, base: FloatVector, included: bytes, part_elements: int) -> None:
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

    def merge(self, base: FloatVector, included: bytes, part_elements: int, gain: float) -> None:
        self._local.merge(base, included, part_elements, kept=self._training.mixing)


class Delayed(DiLoCo):
    """theta = base + (theta - what was handed over) for the parts that include this peer."""

    def __init__(self, model: nn.Module, layout: Layout, training: Training) -> None:
        super().__init__(model, layout, training)
        self._since: FloatVector | None = None  # what the steps since stand upon; None: there are none

    def adopt(self, base: FloatVector) -> None:
        super().adopt(base)
        self._since = None

    def hand_over(self, base: FloatVector, local: FloatVector) -> None:
        self._since = local

    def take_back(self) -> None:
        # Not only because there is nothing to stand upon: from here on others write to that memory.
        self._since = None

    def merge(self, base: FloatVector, included: bytes, part_elements: int, gain: float) -> None:
        if self._since is None:
            self._local.merge(base, included, part_elements)
        else:
            self._local.rebase(base, self._since, included, part_elements)

    def restart(self, base: FloatVector) -> None:
        handed = self._since is not None
        super().restart(base)
        # What was handed over is in the parameters no more, but may come with the next base: from here on what counts
        # is made upon this one, whose memory the daemon will write the next one to.
        self._since = base.copy() if handed else None


class Eager(Delayed):
    """theta = estimate when it hands over, and base + (theta - estimate) for the parts that include this peer.

    In the paper each peer keeps outer parameters of its own, and steps them down mean_last + (own - own_last) / n: the
    mean of the last round, which has come meanwhile, with its own fresh pseudo-gradient in the place of its last one.
    The next such step takes (own - own_last) / n back, so that what is ever ahead of the certified base is the own
    part of the step that it will make next, and nothing of the others':

        estimate = base - gain * own

    with `gain` as Merge has it, how far the base moves for a unit of this peer's pseudo-gradient, and own = base - what
    was handed over. With sgd that is the paper's. With nesterov the paper's is ahead by the own part of the outer
    momentum, too: eta * mu^2 times this peer's share of it, for which a peer would have to keep that share.

    The gain is that of the last round that included this peer; until there is one it is as "delayed". Takes one vector
    of float32[D] more, on the CPU; with `training.gossip_after_s` two, because what was handed over is to be stood upon
    again when the daemon has written a move over it."""

    def __init__(self, model: nn.Module, layout: Layout, training: Training) -> None:
        super().__init__(model, layout, training)
        self._handed: FloatVector | None = None  # None: no estimate is in the parameters
        self._gain = 0.0

    def adopt(self, base: FloatVector) -> None:
        super().adopt(base)
        self._handed = None

    def hand_over(self, base: FloatVector, local: FloatVector) -> None:
        super().hand_over(base, local)
        if self._gain:
            self._handed = local.copy() if self._training.gossip_after_s else local
            self._since = base + np.float32(self._gain) * (local - base)
            self._local.adopt(self._since)

    def take_back(self) -> None:
        if self._handed is not None:
            self._stand_on(self._handed, b"\x01", self._handed.size)
        self._handed = None
        super().take_back()

    def merge(self, base: FloatVector, included: bytes, part_elements: int, gain: float) -> None:
        if self._handed is not None:
            parts = -(-base.size // part_elements)
            left_out = frozenset(part for part in range(parts) if not has_member(included, part))
            self._stand_on(self._handed, make_bitmap(left_out, parts), part_elements)
        super().merge(base, included, part_elements, gain)
        self._handed, self._gain = None, gain or self._gain

    def _stand_on(self, vector: FloatVector, included: bytes, part_elements: int) -> None:
        """In these parts, this and what was done since, in the place of the estimate."""
        assert self._since is not None, "there is an estimate"
        self._local.rebase(vector, self._since, included, part_elements)


STRATEGIES: Mapping[str, Callable[[nn.Module, Layout, Training], Strategy]] = MappingProxyType(
    {DILOCO: DiLoCo, OVERLAPPED: Overlapped, DELAYED: Delayed, EAGER: Eager}
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
