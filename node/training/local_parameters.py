"""A model's parameters as the flat vector of the swarm: loaded from the base, merged with it, handed over.

Everything is in place: the tensors that an optimizer knows stay the same ones.

Invariant: only finite parameters are ever handed over.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import groupby

import torch
from torch import Tensor, nn

from shoal.node.training.messages import FloatVector
from shoal.protocol.quorum import has_member

# Of a model: the mean loss over held-out tokens (or examples), and how many these are.
Evaluation = Callable[[nn.Module], tuple[float, int]]


class LocalParameters:
    """Those of one model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._parameters = list(model.parameters())

    def adopt(self, base: FloatVector) -> None:
        """Become the base."""
        load_parameters(self.model, base)

    def merge(self, base: FloatVector, included: bytes, part_elements: int, *, kept: float = 0.0) -> None:
        """Become the base in the included parts, but for the share `kept`."""
        for first, last in included_ranges(included, part_elements, base.size):
            load_parameters(self.model, base, first, last, kept=kept)

    @torch.no_grad()
    def rebase(self, base: FloatVector, handed: FloatVector, included: bytes, part_elements: int) -> None:
        """In the included parts become the base, and on top of it what was trained since `handed` was handed over."""
        for first, last in included_ranges(included, part_elements, base.size):
            for target, low, high in slice_parameters(self.model, first, last):
                # The difference first: where nothing was trained since, the base comes out to the bit.
                target.sub_(torch.from_numpy(handed[low:high]).to(target.device))
                target.add_(torch.from_numpy(base[low:high]).to(target.device))

    @torch.no_grad()
    def shift(self, move: FloatVector) -> bool:
        """Add the move, float32[D]; False, and nothing changed, where that would make one of them not finite. Takes
        the memory of the largest tensor twice for a moment."""
        for target, low, high in slice_parameters(self.model, 0, move.size):
            if not bool(torch.isfinite(target + torch.from_numpy(move[low:high]).to(target.device)).all()):
                return False
        for target, low, high in slice_parameters(self.model, 0, move.size):
            target.add_(torch.from_numpy(move[low:high]).to(target.device))
        return True

    def are_finite(self) -> bool:
        return all(bool(torch.isfinite(parameter).all()) for parameter in self._parameters)

    @contextmanager
    def lend(self, base: FloatVector, read: Callable[[Callable[[], None]], object]) -> Iterator[nn.Module]:
        """The script's model with the base in it; it gets its own parameters back. `read` is BaseWrites.read."""
        own: list[Tensor] = []
        try:
            own = [one.detach().clone() for one in self._parameters]
            read(lambda: self.adopt(base))
            yield self.model
        finally:
            for parameter, value in zip(self._parameters, own, strict=False):  # none, where there was no memory
                parameter.detach().copy_(value)

    @torch.no_grad()
    def export(self, local: FloatVector) -> bool:
        """Write the parameters; False, and nothing written, where one of them is not finite."""
        if not self.are_finite():
            return False
        first = 0
        target = torch.from_numpy(local)
        for parameter in self._parameters:
            target[first : first + parameter.numel()].copy_(parameter.view(-1))
            first += parameter.numel()
        return True


@torch.no_grad()
def load_parameters(
    model: nn.Module, base: FloatVector, first: int = 0, last: int | None = None, kept: float = 0.0
) -> None:
    """Copy base[first:last] to where these elements stand in the model, or mix it with what stands there, of which the
    share `kept` stays."""
    source = torch.from_numpy(base)
    for target, low, high in slice_parameters(model, first, base.size if last is None else last):
        # lerp(a, b, 1) is not b to the bit.
        mixed = torch.lerp(source[low:high].to(target.device), target, kept) if kept else source[low:high]
        target.copy_(mixed)


def slice_parameters(model: nn.Module, first: int, last: int) -> Iterator[tuple[Tensor, int, int]]:
    """Where the elements from `first` to before `last` of the flat vector stand: (view, first, one past the last)."""
    offset = 0
    for parameter in model.parameters():
        low, high = max(first, offset), min(last, offset + parameter.numel())
        if low < high:
            yield parameter.detach().view(-1)[low - offset : high - offset], low, high
        offset += parameter.numel()


def included_ranges(included: bytes, part_elements: int, elements: int) -> Iterator[tuple[int, int]]:
    """The longest runs (first element, one past the last) of the included parts of a vector."""
    parts = range(-(-elements // part_elements))
    for present, run in groupby(parts, key=lambda part: has_member(included, part)):
        if present:
            numbers = list(run)
            yield numbers[0] * part_elements, min((numbers[-1] + 1) * part_elements, elements)
