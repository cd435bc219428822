"""Batches in pieces that fit into memory: how many examples at a time, and what to do when they are too many.

The size is this machine's matter and no other peer's: the gradients of the pieces, each weighted by its share of the
batch, add up to the gradient of the batch but for the rounding.

Invariant: the size never grows, so that a trainer that has found one that fits does not run into its limit again.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

# What torch calls a lack of memory where it has no error type for it: its allocator on the CPU, and CUDA's libraries.
_MARKS = ("DefaultCPUAllocator", "_ALLOC_FAILED", "out of memory")


class MicroBatches:
    def __init__(self, wanted: int, examples: int) -> None:
        """`wanted` examples at a time, or with 0 all of them."""
        self.size = min(wanted, examples) if wanted else examples

    def halve(self) -> bool:
        """Take half as many from now on; False where there is but one left."""
        whole, self.size = self.size, (self.size + 1) // 2
        return self.size < whole


def cut(examples: Tensor, whole: int, size: int) -> Iterator[tuple[Tensor, float]]:
    """The pieces of `examples` (count, …) of `size` each, and the share that each is of a batch of `whole` examples."""
    for first in range(0, len(examples), size):
        piece = examples[first : first + size]
        yield piece, len(piece) / whole


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this error says that the device's or the machine's memory is used up, and nothing else."""
    if isinstance(error, torch.cuda.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(mark in str(error) for mark in _MARKS)


def tell_next_step(error: BaseException) -> str:
    """What a person can do where not even one example fits, in the imperative."""
    if isinstance(error, torch.cuda.OutOfMemoryError) or "CUDA" in str(error):
        return 'end what else uses this GPU, or set trainer.device = "cpu", or join a swarm with a smaller model'
    return "end what else takes this machine's memory, or join a swarm with a smaller model"
