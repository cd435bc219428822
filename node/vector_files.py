"""Memory for large vectors that another process may map by its descriptor: anonymous, or a file that has no name.

A file's pages are the kernel's to write and drop, so that what is mapped needs no memory of its own. Having no name it
is gone with the last process that has it open or mapped, however that one ends, and nobody else can open it. Where the
file system knows no such files it has a name for a moment; what a crash in that moment leaves, in a folder of its own,
the next start removes.

Invariant: all of it is reserved before it is mapped. A write into a mapping for which the disk, or the memory, has no
place is no error but a SIGBUS, which ends the process.
"""

import mmap
import os
import tempfile
from pathlib import Path

import numpy as np

from shoal.protocol.codecs import Float32s

_ELEMENT_BYTES = 4


def open_reserved(size_bytes: int, folder: Path | None = None) -> int:
    """The descriptor of so many zeros, in memory or in a file of `folder`, which is made. Raises OSError, and then
    nothing stays reserved."""
    descriptor = _open_anonymous() if folder is None else _open_nameless(folder)
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, size_bytes)
        os.ftruncate(descriptor, size_bytes)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def map_vector(elements: int, folder: Path) -> Float32s:
    """float32[elements], zeros, in a file of `folder`. The file goes when the last view does. Raises OSError."""
    descriptor = open_reserved(elements * _ELEMENT_BYTES, folder)
    try:
        mapped = mmap.mmap(descriptor, 0)
    finally:
        os.close(descriptor)
    values: Float32s = np.frombuffer(mapped, np.float32)
    return values


def remove_leftovers(folder: Path) -> None:
    """What was left where a crash came before the name was removed. Only for the process that writes here."""
    if folder.is_dir():
        for path in folder.iterdir():
            path.unlink(missing_ok=True)


def _open_nameless(folder: Path) -> int:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:  # mode 0600
        return os.dup(file.fileno())


def _open_anonymous() -> int:
    """The descriptor of a new file that has no name and lives in memory where the system offers that."""
    if hasattr(os, "memfd_create"):
        # Unlike a file in /dev/shm it does not count against that mount's size, 64 MB in a plain container.
        return os.memfd_create("shoal-parameters")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
