"""A model that a script has divided among its ranks (FSDP2, or any DTensor), and its whole parameters where rank 0 is.

The swarm's vector is whole, so rank 0 keeps whole parameters in the memory of its host. They are gathered when they are
read and divided again when they were replaced, one parameter at a time: no device ever holds more than one of them
whole. Rank 0 alone knows when; the others do what it asks for while they wait for its word.

Invariant: what was put into the whole parameters is divided before it is gathered again, so that nothing is lost.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from shoal.node.training.attached_loop import AttachError
from shoal.node.training.base_writes import WriterGone
from shoal.node.training.local_parameters import Evaluation, LocalParameters
from shoal.node.training.messages import FloatVector
from shoal.node.training.micro_batches import is_out_of_memory
from shoal.node.training.script_ranks import FIRST, ScriptRanks, Word


class Errand(IntEnum):
    """What rank 0 asks of all ranks beside a word."""

    NONE = 0
    GATHER = 1  # the whole parameters, for rank 0
    LEND = 2  # the base to all, who keep what they had
    EVALUATE = 3  # what they have now
    RESTORE = 4  # what they have kept


class DividedRanks(ScriptRanks):
    """The ranks of a script that has divided its model among them. `whole` are the parameters of rank 0, float32 and in
    the memory of its host; the others have none."""

    def __init__(self, model: nn.Module, evaluate: Evaluation | None) -> None:
        super().__init__(model)
        self._model = model
        self._evaluate = evaluate
        self._kept: list[Tensor] = []
        shapes = [one.shape for one in self._parameters] if self.is_first else []
        self.whole = nn.ParameterList([nn.Parameter(torch.empty(shape)) for shape in shapes])
        self.whole_is_newer = False  # than what is divided among the ranks

    @property
    def model(self) -> nn.Module:
        """The script's own one."""
        return self._model

    @property
    def evaluation(self) -> Evaluation | None:
        """The script's, over the held-out data of all ranks."""
        return None if self._evaluate is None else self._evaluate_together

    def ask(self, errand: Errand) -> None:
        """Rank 0's part of what the others `do`; its own part of the work is the caller's."""
        self.say(Word(errand=errand))

    def do(self, errand: int) -> None:
        match Errand(errand):
            case Errand.GATHER:
                self.gather()
            case Errand.LEND:
                self.lend(())
            case Errand.EVALUATE:
                with torch.no_grad():
                    self._evaluate_together(self._model)
            case Errand.RESTORE:
                self.restore()
            case Errand.NONE:
                raise AssertionError("nothing to do")

    @torch.no_grad()
    def gather(self) -> None:
        """Let rank 0 have what all have."""
        for number, parameter in enumerate(self._parameters):
            full = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.detach()
            if self.is_first:
                self.whole[number].copy_(full)

    def share_parameters(self) -> None:
        self._divide(list(self.whole))
        self.whole_is_newer = False

    @torch.no_grad()
    def lend(self, values: Sequence[Tensor]) -> None:
        """Put rank 0's `values` into the model until `restore`."""
        if not self._kept:
            self._kept = [_local_part(one).clone() for one in self._parameters]
        self._divide(values)

    @torch.no_grad()
    def restore(self) -> None:
        self._forget_gathered()
        for parameter, kept in zip(self._parameters, self._kept, strict=True):
            _local_part(parameter).copy_(kept)
        self._kept = []

    @torch.no_grad()
    def _divide(self, values: Sequence[Tensor]) -> None:
        """Rank 0's values are everybody's, who have none of their own."""
        self._forget_gathered()
        for number, parameter in enumerate(self._parameters):
            local = _local_part(parameter)
            full = torch.empty(parameter.shape, dtype=local.dtype, device=local.device)
            if self.is_first:
                full.copy_(values[number])
            if isinstance(parameter, DTensor):
                divided = distribute_tensor(full, parameter.device_mesh, parameter.placements)
                local.copy_(divided.to_local())
            else:
                distributed.broadcast(full, FIRST)
                local.copy_(full)

    def _forget_gathered(self) -> None:
        """A forward pass without a backward one leaves whole parameters behind, which would pass for the new ones."""
        for module in self._model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def _evaluate_together(self, model: nn.Module) -> tuple[float, int]:
        assert self._evaluate is not None, "rank 0 has one"
        try:
            loss, tokens = self._evaluate(model)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            # The other ranks wait for this one in the middle of an exchange.
            raise AttachError(f"evaluate() had not enough memory: {error}") from error
        return self.average(float(loss), int(tokens))


class WholeParameters(LocalParameters):
    """Those of rank 0, which stand for the divided model."""

    def __init__(self, ranks: DividedRanks) -> None:
        super().__init__(ranks.whole)
        self._ranks = ranks

    def adopt(self, base: FloatVector) -> None:
        super().adopt(base)
        self._ranks.whole_is_newer = True

    def merge(self, base: FloatVector, included: bytes, part_elements: int, *, kept: float = 0.0) -> None:
        self._refresh()
        super().merge(base, included, part_elements, kept=kept)
        self._ranks.whole_is_newer = True

    def rebase(self, base: FloatVector, handed: FloatVector, included: bytes, part_elements: int) -> None:
        self._refresh()
        super().rebase(base, handed, included, part_elements)
        self._ranks.whole_is_newer = True

    def shift(self, move: FloatVector) -> bool:
        self._refresh()
        shifted = super().shift(move)
        self._ranks.whole_is_newer |= shifted
        return shifted

    def are_finite(self) -> bool:
        self._refresh()
        return super().are_finite()

    @contextmanager
    def lend(self, base: FloatVector, read: Callable[[Callable[[], None]], object]) -> Iterator[nn.Module]:
        ranks = self._ranks
        whole, offset, values = torch.from_numpy(base), 0, []
        for one in ranks.whole:
            values.append(whole[offset : offset + one.numel()].view(one.shape))
            offset += one.numel()

        def put() -> None:
            ranks.ask(Errand.LEND)
            ranks.lend(values)

        try:
            read(put)
        except WriterGone:
            self._restore()
            raise
        ranks.ask(Errand.EVALUATE)
        yield ranks.model
        self._restore()  # what `evaluate` raises ends the script: the others wait in the middle of an exchange

    def _restore(self) -> None:
        self._ranks.ask(Errand.RESTORE)
        self._ranks.restore()

    def _refresh(self) -> None:
        if not self._ranks.whole_is_newer:
            self._ranks.ask(Errand.GATHER)
            self._ranks.gather()


def _local_part(parameter: Tensor) -> Tensor:
    """What this process holds of it, in place."""
    detached = parameter.detach()
    return detached.to_local() if isinstance(detached, DTensor) else detached
