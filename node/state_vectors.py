"""The vectors that a peer holds of the model for as long as it runs, and where they lie: in memory or on the disk.

Base, outer momentum and, of a trainer, the local parameters that it hands over: float32[D] each. The residual of the
error feedback is a file anyway (node.residual_file), and what is encoded of a round comes and goes
(node.payload_memory).

Invariant: what a machine has no room for is a ConfigError before anything of the model is allocated; on the disk
`store.free_gib_min` stays free beside the vectors.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shoal.node.config import IN_MEMORY, ON_DISK, TRAINER, NodeConfig
from shoal.node.local_state import Writing, write_alone
from shoal.node.machine_memory import see_memory
from shoal.node.terminal import format_bytes
from shoal.node.trainer import SharedParameters
from shoal.node.vector_files import map_vector, remove_leftovers
from shoal.protocol.codecs import Float32s
from shoal.protocol.errors import ConfigError

VECTORS_FOLDER = "vectors"  # in the data folder
GIB = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class StateVectors:
    """`shared` is what the trainer maps, None where none trains; `params` are changed inside of `writing` alone."""

    params: Float32s
    momentum: Float32s
    writing: Writing = write_alone
    shared: SharedParameters | None = None

    def close(self) -> None:
        """No further trainer can be started."""
        if self.shared is not None:
            self.shared.close()


def measure_vectors(config: NodeConfig, elements: int) -> int:
    """The bytes of all of them."""
    return (3 if config.node.role == TRAINER else 2) * 4 * elements


def allocate_vectors(config: NodeConfig, elements: int) -> StateVectors:
    """Zeros. Blocking: on some file systems reserving writes them. Raises ConfigError."""
    folder = config.data_path / VECTORS_FOLDER if config.store.vectors == ON_DISK else None
    try:
        remove_leftovers(config.data_path / VECTORS_FOLDER)
        needed_bytes = measure_vectors(config, elements)
        if folder is None:
            check_memory(needed_bytes, see_memory().available_bytes)
        else:
            check_disk(config, needed_bytes, shutil.disk_usage(config.data_path).free)
        momentum = np.zeros(elements, np.float32) if folder is None else map_vector(elements, folder)
        if config.node.role != TRAINER:
            params = np.zeros(elements, np.float32) if folder is None else map_vector(elements, folder)
            return StateVectors(params=params, momentum=momentum)
        shared = SharedParameters(elements, folder)
    except OSError as error:
        raise _refuse(folder, f"the model's vectors cannot be allocated: {error.strerror or error}") from error
    return StateVectors(params=shared.base, momentum=momentum, writing=shared.writing, shared=shared)


def check_memory(needed_bytes: int, available_bytes: int) -> None:
    """Raises ConfigError where memory does not hold so much: the system would end this process, or another one."""
    if needed_bytes > available_bytes:
        room = f"{format_bytes(available_bytes)} of memory are to be had"
        raise _refuse(None, f"the model's vectors take {format_bytes(needed_bytes)}, and {room}")


def check_disk(config: NodeConfig, needed_bytes: int, free_bytes: int) -> None:
    """Raises ConfigError where they would leave less than `store.free_gib_min`."""
    left_gib = config.store.free_gib_min
    if free_bytes - needed_bytes < left_gib * GIB:
        room = f"{format_bytes(free_bytes)} are free in {config.data_path}"
        problem = f"the model's vectors take {format_bytes(needed_bytes)}, and {room}"
        raise _refuse(config.data_path, f"{problem}, of which store.free_gib_min = {left_gib:g} GiB stay free")


def _refuse(folder: Path | None, problem: str) -> ConfigError:
    if folder is None:
        fix = f'end other programs, or write vectors = "{ON_DISK}" under [store] (--vectors {ON_DISK})'
        return ConfigError("store.vectors", problem, fix)
    fix = f"make space there, or give --data-dir on a larger disk, or --vectors {IN_MEMORY} where memory holds them"
    return ConfigError("store.vectors", problem, fix)
