"""Memory for payloads, in large pieces that are used again: fresh memory costs a fault for every page, which is more
than what is then done with it.

Invariants: a piece is used again only when nobody views any of it, so that what a slow reader still sends, or a thread
still reads, stays as it is; what is kept for later is at most `kept_bytes_max`; what a taken place holds is arbitrary.
"""

import mmap
import threading
import weakref
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

# From 4 MiB on, systems that have large pages give them. What is left of a piece behind its last place is not used.
PIECE_BYTES = 16 << 20
KEPT_BYTES_MAX = 512 << 20


class PayloadMemory:
    """Places for payloads; for any thread."""

    def __init__(self, kept_bytes_max: int = KEPT_BYTES_MAX) -> None:
        self.kept_bytes = 0
        self._kept_bytes_max = kept_bytes_max
        self._free: dict[int, list[NDArray[np.uint8]]] = {}  # by their size
        self._open: memoryview | None = None  # the rest of the piece that places are cut from
        # Reentrant: where memory is short of objects, the collector may drop a view in the middle of `take`.
        self._lock = threading.RLock()

    def take(self, nbytes: int) -> memoryview:
        """A writable place of so many bytes, kept from others for as long as there is a view of it."""
        assert nbytes > 0, "a payload has bytes"
        with self._lock:
            if nbytes > PIECE_BYTES // 4:
                return self._take_piece(nbytes)
            if self._open is None or self._open.nbytes < nbytes:
                self._open = self._take_piece(PIECE_BYTES)
            place, self._open = self._open[:nbytes], self._open[nbytes:]
            return place

    def _take_piece(self, nbytes: int) -> memoryview:
        pieces = self._free.get(nbytes)
        if pieces:
            piece = pieces.pop()
            self.kept_bytes -= nbytes
            if not pieces:
                del self._free[nbytes]
        else:
            piece = _map_piece(nbytes)
        # Every view of this memory keeps this object alive, and nothing else does.
        watched: Any = piece.view()
        weakref.finalize(watched, self._keep, piece).atexit = False
        return memoryview(watched)

    def _keep(self, piece: NDArray[np.uint8]) -> None:
        with self._lock:
            if self.kept_bytes + piece.nbytes <= self._kept_bytes_max:
                self.kept_bytes += piece.nbytes
                self._free.setdefault(piece.nbytes, []).append(piece)


def _map_piece(nbytes: int) -> NDArray[np.uint8]:
    """Memory that goes back to the system at once when it is dropped. That of an allocator need not: glibc's keeps
    pieces of this size in its heap, once it has seen some of them come and go."""
    if not hasattr(mmap, "MAP_PRIVATE"):
        return np.empty(nbytes, np.uint8)
    mapped = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without large pages
            mapped.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(mapped, np.uint8)
