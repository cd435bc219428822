"""The ranks of one trainer as torch.distributed sees them, and what they exchange: parameters down, gradients up.

NCCL joins ranks that have a GPU each, gloo those on a CPU. They meet by a file in the trainer's own folder, and all
sockets are on the loopback interface.

Invariant: no port of this group can be reached from another machine, whatever the environment says.
"""

import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor, distributed, nn

LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
ALIGNED_ELEMENTS = 64  # 256 bytes, what torch's own allocator gives a tensor of its own
FIRST = 0


class RankGroup:
    """One process's place in it. The parameters and gradients of `model` become views of two vectors."""

    def __init__(self, model: nn.Module) -> None:
        parameters = list(model.parameters())
        ends = [0]
        for parameter in parameters:
            ends.append(ends[-1] + -(-parameter.numel() // ALIGNED_ELEMENTS) * ALIGNED_ELEMENTS)
        device = parameters[0].device
        self._values = torch.zeros(ends[-1], dtype=torch.float32, device=device)
        # One more, for the loss: it is added up as the gradients are, and may be no number, as they may.
        self._gradients = torch.zeros(ends[-1] + 1, dtype=torch.float32, device=device)
        for first, parameter in zip(ends, parameters, strict=False):
            last = first + parameter.numel()
            view = self._values[first:last].view(parameter.shape)
            parameter.data = view.copy_(parameter.data)
            parameter.grad = self._gradients[first:last].view(parameter.shape)

    def join(self, rendezvous: Path, rank: int, count: int, timeout_s: float) -> None:
        """Wait for all others. Raises RuntimeError, as every exchange does, where that takes longer than the
        time-out."""
        on_gpu = self._values.is_cuda
        os.environ["GLOO_SOCKET_IFNAME"] = LOOPBACK
        os.environ["NCCL_SOCKET_IFNAME"] = f"={LOOPBACK}"  # this one only, and not all whose names begin so
        distributed.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=distributed.FileStore(str(rendezvous), count),  # type: ignore[attr-defined]  # torch leaves it so
            rank=rank,
            world_size=count,
            timeout=timedelta(seconds=timeout_s),
            device_id=self._values.device if on_gpu else None,
        )

    def leave(self) -> None:
        """Only for a process that goes on without the others."""
        if distributed.is_initialized():
            distributed.destroy_process_group()

    def share_parameters(self) -> None:
        """Those of rank 0 are everybody's."""
        distributed.broadcast(self._values, FIRST)

    def add_up(self, loss: Tensor) -> Tensor:
        """The sum of all ranks' losses, a scalar; the gradients of the model are the sums of all gradients. Both are
        so in rank 0 alone: in the others they are to be dropped."""
        self._gradients[-1] = loss
        distributed.reduce(self._gradients, FIRST)
        return self._gradients[-1].clone()

    def gather(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it so

    def drop(self) -> None:
        self._gradients.zero_()
