"""The loss of some examples of a batch and its gradient: what every process of a trainer computes, in the same way.

With `trainer.compile` the loss runs as torch.compile makes it. Where the compiler is missing or fails the examples are
computed again without it, and it is not asked a second time: slower, but the same step.

Invariant: what is gathered is the gradient of each example once, whatever went wrong on the way.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from shoal.node.training.messages import trim_detail
from shoal.node.training.micro_batches import cut, is_out_of_memory
from shoal.node.training.tasks import Task

Loss = Callable[[nn.Module, Tensor], Tensor]
_COMPILER_MODULES = ("torch._dynamo", "torch._inductor")


class TakesGradient(Protocol):
    """Where the gradient goes; a Strategy is one."""

    def gather(self, loss: Tensor) -> None:
        """Add the gradient of `loss`, a scalar."""
        ...

    def drop(self) -> None:
        """Forget what was gathered."""
        ...


class GradientPass:
    """Of one model on one device."""

    def __init__(self, task: Task, model: nn.Module, device: torch.device, *, compiles: bool = False) -> None:
        self._task = task
        self._model = model
        self._device = device
        self._compiled: Loss | None = torch.compile(task.loss) if compiles else None
        self._sizes: set[int] = set()  # of micro-batches that were computed with the compiled loss
        self._problem = ""

    def compiles_at(self, size: int) -> bool:
        """Whether the next pass, with so many examples at a time, has something to compile, which takes minutes."""
        return self._compiled is not None and size not in self._sizes

    def run(self, examples: Tensor, whole: int, size: int, into: TakesGradient) -> Tensor:
        """The part of `examples` (count, …) in the mean loss of a batch of `whole` ones: a scalar. They are computed
        `size` at a time. Raises what the task's code raises."""
        if self._compiled is not None:
            try:
                loss = self._sum(self._compiled, examples, whole, size, into)
            except RuntimeError as error:
                if is_out_of_memory(error) or not type(error).__module__.startswith(_COMPILER_MODULES):
                    raise
                self._give_up(error)
            else:
                self._sizes.add(size)
                return loss
            into.drop()
        return self._sum(self._task.loss, examples, whole, size, into)

    def take_problem(self) -> str:
        """Why it does not compile any more, once; empty where there is nothing new to tell."""
        problem, self._problem = self._problem, ""
        return problem

    def precision(self) -> torch.autocast:
        """bfloat16 products on a GPU, float32 on a CPU; the parameters are float32 on both."""
        return torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._device.type == "cuda")

    def _sum(self, compute: Loss, examples: Tensor, whole: int, size: int, into: TakesGradient) -> Tensor:
        total = torch.zeros((), device=self._device)
        for piece, share in cut(examples, whole, size):
            with self.precision():
                loss = compute(self._model, piece.to(self._device)) * share
            into.gather(loss)
            total += loss.detach()
        return total

    def _give_up(self, error: RuntimeError) -> None:
        self._compiled = None
        told = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        self._problem = trim_detail(f"trains on without torch.compile, which failed: {told}")
