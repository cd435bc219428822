"""A snapshot on its way here: a file laid out as the snapshot that it becomes, chunk by chunk, in any order.

What is in the file after a restart, or after kill -9, is found by its digests: nothing else is written down, and
nothing that is there is fetched again. Blocking calls.

Invariants: at most one such file is in the folder; only the store's `adopt` makes a snapshot of it, when every chunk is
there.
"""

import json
import os
import threading
from pathlib import Path

from shoal.node.snapshots import SnapshotStore, chunk_offset
from shoal.protocol.errors import ProtocolError
from shoal.protocol.state import SnapshotIndex

_SUFFIX = ".partial"
_ALIGNMENT = 8


class PartialSnapshot:
    """The file of one index. Raises OSError where the disk does."""

    def __init__(self, folder: Path, index: SnapshotIndex) -> None:
        self.index = index
        self.path = folder / f"{index.round:08d}.{index.root.hex()[:16]}{_SUFFIX}"
        header = make_header(index)
        self._data_start = len(header)
        size = len(header) + 8 * index.elements
        folder.mkdir(parents=True, exist_ok=True)
        for other in set(folder.glob(f"*{_SUFFIX}")) - {self.path}:
            other.unlink()  # of a snapshot that the donors have replaced since
        self._is_new = not self.path.exists() or self.path.stat().st_size != size
        if self._is_new:
            with self.path.open("wb") as file:
                file.truncate(size)
        self._lock = threading.Lock()
        self._is_closed = False
        self._descriptor = os.open(self.path, os.O_RDWR)
        os.pwrite(self._descriptor, header, 0)

    def close(self) -> None:
        """What a thread writes after this, because its task has ended, goes nowhere."""
        with self._lock:
            self._is_closed = True
            os.close(self._descriptor)

    def find_held(self) -> list[int]:
        """The chunks that are here from before. Reads all of the file, unless it has just been made."""
        if self._is_new:
            return []
        return [number for number in range(self.index.chunks) if self._holds(number)]

    def write(self, number: int, raw: memoryview) -> None:
        """Put a chunk, checked by whoever fetched it, in its place."""
        place = self._place(number)
        with self._lock:  # a descriptor that was closed may be another file's by now
            while raw and not self._is_closed:
                written = os.pwrite(self._descriptor, raw, place)
                raw, place = raw[written:], place + written

    def sync(self) -> None:
        """Force what was written to the disk."""
        with self._lock:
            if self._is_closed:
                return
            descriptor = os.dup(self._descriptor)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def finish(self, store: SnapshotStore) -> None:
        """Every chunk is here: the file becomes a snapshot of this store."""
        store.adopt(self.index, self.path)

    def _place(self, number: int) -> int:
        return self._data_start + chunk_offset(self.index, number)

    def _holds(self, number: int) -> bool:
        span = self.index.span(number)
        try:
            self.index.check_chunk_untrusted(
                number, os.pread(self._descriptor, span.stop - span.start, self._place(number))
            )
        except ProtocolError:
            return False
        return True


def make_header(index: SnapshotIndex) -> bytes:
    """The safetensors header of this snapshot (its format: 8 bytes of length, JSON, spaces up to the alignment)."""
    vector_bytes = 4 * index.elements
    places = {"momentum": 0, "params": vector_bytes}
    described: dict[str, object] = {
        name: {"dtype": "F32", "shape": [index.elements], "data_offsets": [start, start + vector_bytes]}
        for name, start in places.items()
    }
    text = json.dumps({"__metadata__": {"round": str(index.round)}, **described}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
