"""The processes of one training script, as torchrun starts them: what they say to each other about the swarm.

Rank 0 alone is attached to the daemon. The others call the same methods at the same places, learn what rank 0 has
learnt, and take its parameters where it has new ones. It is the script's own process group that carries all this.

Invariant: while rank 0 waits for its daemon it says so now and then, so that no exchange waits longer than
HEARTBEAT_S beyond a step, whatever the group's time-out.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn

HEARTBEAT_S = 20.0
FIRST = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Word:
    """What rank 0 says after each step, and while it waits. With `ended` it takes no part any more; an `errand` is
    asked for in between."""

    waits: bool = False
    ended: bool = False
    replaced: bool = False
    cleared: bool = False
    attached: bool = False
    round: int = 0
    place: int = 0
    places: int = 1
    errand: int = 0


def are_joined() -> bool:
    """Whether the script is one of several processes of a process group."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


class ScriptRanks:
    """The ranks of this script. Every method is to be called by all of them."""

    def __init__(self, model: nn.Module) -> None:
        self._parameters = list(model.parameters())
        self.is_first = distributed.get_rank() == FIRST

    def average(self, loss: float, tokens: int) -> tuple[float, int]:
        """The mean loss over the tokens of all ranks, and how many these are."""
        sums = self._make_tensor([loss * tokens, float(tokens)], torch.float64)
        distributed.all_reduce(sums)
        total, count = sums.tolist()
        return total / max(1.0, count), int(count)

    def say(self, word: Word) -> None:
        """Rank 0's part of `hear`."""
        self._broadcast(word)

    def hear(self) -> Word:
        """The next word of rank 0."""
        waits, ended, replaced, cleared, attached, number, place, places, errand = self._broadcast(Word()).tolist()
        return Word(
            waits=bool(waits),
            ended=bool(ended),
            replaced=bool(replaced),
            cleared=bool(cleared),
            attached=bool(attached),
            round=number,
            place=place,
            places=places,
            errand=errand,
        )

    def do(self, errand: int) -> None:
        """What rank 0 has asked for in between."""
        raise AssertionError(f"errand {errand}, of ranks with whole parameters")

    @torch.no_grad()
    def share_parameters(self) -> None:
        """Those of rank 0 are everybody's."""
        for parameter in self._parameters:
            distributed.broadcast(parameter.detach(), FIRST)

    def _broadcast(self, word: Word) -> Tensor:
        flags = [word.waits, word.ended, word.replaced, word.cleared, word.attached]
        values = [*flags, word.round, word.place, word.places, word.errand]
        told = self._make_tensor([int(value) for value in values], torch.int64)
        distributed.broadcast(told, FIRST)
        return told

    def _make_tensor(self, values: list[float] | list[int], dtype: torch.dtype) -> Tensor:
        # Where the parameters are: NCCL knows no other place.
        return torch.tensor(values, dtype=dtype, device=self._parameters[0].device)
