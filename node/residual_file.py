"""A residual as a file that is mapped into memory, so that the pages of a large one are the kernel's to write and drop.

The format is safetensors: one float32 tensor named "residual". Two ways to hold one: while a contribution is frozen,
shared and writable, so that what is computed is in the file already; afterwards private, so that whoever changes the
values in memory leaves the file as its digest names it.

Invariant: a file is allocated before it is mapped, so that no write into the mapping can find the disk full.
"""

import json
import mmap
import os
from pathlib import Path

import numpy as np

from shoal.node.durability import sync_path
from shoal.protocol.codecs import Float32s

_HEADER_BYTES = 256  # room for any number of elements; the tensor begins at a multiple of every vector's width
_HEADER_BYTES_MAX = 4096
_LENGTH_BYTES = 8


class ResidualFile:
    """A file that is being made. Blocking; raises OSError."""

    def __init__(self, path: Path, elements: int) -> None:
        self.path = path
        size = _HEADER_BYTES + 4 * elements
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(descriptor, 0, size)
            else:
                os.ftruncate(descriptor, size)
            self._map = mmap.mmap(descriptor, size)
        except OSError:
            path.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)
        self._map[:_HEADER_BYTES] = _make_header(elements)
        self.values: Float32s = np.frombuffer(self._map, np.float32, offset=_HEADER_BYTES)

    def finish(self, path: Path) -> None:
        """Durable under its final name on return. The values must not be written to any more."""
        self._map.flush()
        sync_path(self.path)
        self.path.replace(path)
        sync_path(path.parent)


def map_residual(path: Path, elements: int) -> Float32s | None:
    """The values of a finished file, float32[elements]: a private view, in which changes stay. None where the file is
    none of this size; what the values are is for the caller to check. Raises OSError."""
    with path.open("rb") as file:
        first = _LENGTH_BYTES + int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if first > _HEADER_BYTES_MAX or first % 4 or os.fstat(file.fileno()).st_size != first + 4 * elements:
            return None
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    values: Float32s = np.frombuffer(mapped, np.float32, offset=first)
    return values


def _make_header(elements: int) -> bytes:
    about = {"residual": {"dtype": "F32", "shape": [elements], "data_offsets": [0, 4 * elements]}}
    text = json.dumps(about, separators=(",", ":")).encode().ljust(_HEADER_BYTES - _LENGTH_BYTES)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text
