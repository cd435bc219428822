"""Which device a process of the trainer computes on, and how many processes there are.

Invariant: two processes never share a CUDA device.
"""

import torch
from torch import distributed

from shoal.protocol.errors import ConfigError


def choose_device(wanted: str) -> torch.device:
    """The device of "auto", "cpu" or "cuda"; raises ConfigError where there is no such one."""
    if wanted == "cuda" and not torch.cuda.is_available():
        fix = 'install a torch that finds the GPU, or set device = "auto"'
        raise ConfigError("trainer.device", "is cuda, but torch finds no GPU", fix)
    return torch.device("cpu" if wanted == "cpu" or not torch.cuda.is_available() else "cuda")


def count_ranks(wanted: int, device: torch.device, batch_size: int) -> int:
    """How many processes compute a batch of so many examples. 0 `wanted` is one for each GPU, and no more than there
    are examples. Raises ConfigError where there cannot be as many as were asked for."""
    on_gpu = device.type == "cuda"
    count = wanted or (min(torch.cuda.device_count(), batch_size) if on_gpu else 1)
    if on_gpu and count > torch.cuda.device_count():
        found = torch.cuda.device_count()
        fix = "give each process a GPU of its own: 0 is one for each that there is"
        raise ConfigError("trainer.processes", f"is {count}, and torch finds {found} CUDA device(s)", fix)
    if count > batch_size:
        fix = f"set it to {batch_size} or less: a process without an example has nothing to do"
        raise ConfigError("trainer.processes", f"is {count}, and the swarm's batch has {batch_size} example(s)", fix)
    if count > 1 and not _can_join(on_gpu):
        joins = "NCCL" if on_gpu else "gloo"
        fix = f"install a torch with {joins}, or set it to 1"
        raise ConfigError("trainer.processes", f"is {count}, and this torch has no {joins} to join them", fix)
    return count


def _can_join(on_gpu: bool) -> bool:
    if not distributed.is_available():
        return False
    return distributed.is_nccl_available() if on_gpu else distributed.is_gloo_available()


def name_device(device: torch.device, count: int) -> str:
    """For people: what this peer trains on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return name if count == 1 else f"{name} ({count} processes)"
