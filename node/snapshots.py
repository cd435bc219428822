"""Snapshots: the whole state at one round as a safetensors file, served chunk by chunk to peers that join.

The file holds two flat float32 tensors, `params` and `momentum`, and in its metadata the round. Its index (chunk
digests) lies beside it. Blocking calls: the daemon runs them in threads.

Invariant: a snapshot is used only when its index hashes to the state root that a certificate vouches for, and every
chunk that is read for use matches the index.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from shoal.protocol.codecs import Float32s
from shoal.protocol.errors import ProtocolError
from shoal.protocol.state import SnapshotIndex, StateVector, chunk_digests, decode_index_untrusted
from shoal.protocol.wire import encode_record

_STATE_SUFFIX = ".safetensors"
_INDEX_SUFFIX = ".index"
_TEMPORARY = ".partial"


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    path: Path
    index: SnapshotIndex
    data_start: int  # where the tensor bytes begin in the file


class SnapshotStore:
    """The folder of snapshots, newest last."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._folder.mkdir(parents=True, exist_ok=True)
        self._snapshots: dict[int, Snapshot] = {}
        for path in sorted(self._folder.glob(f"*{_INDEX_SUFFIX}")):
            snapshot = _open_snapshot(path.with_suffix(_STATE_SUFFIX))
            if snapshot is not None:
                self._snapshots[snapshot.index.round] = snapshot

    def remove_leftovers(self) -> None:
        """Delete what a crash left: half-written and damaged snapshots. Only for the process that writes here."""
        whole = {snapshot.path.stem for snapshot in self._snapshots.values()}
        for path in self._folder.iterdir():
            if path.suffix == _TEMPORARY or path.stem not in whole:
                path.unlink()

    def rounds(self) -> list[int]:
        """The rounds of which there is a snapshot, ascending."""
        return sorted(self._snapshots)

    def get(self, number: int) -> Snapshot | None:
        return self._snapshots.get(number)

    def write(self, index: SnapshotIndex, params: Float32s, momentum: Float32s) -> None:
        """Write the state of `index.round`. The vectors must not change meanwhile. Raises OSError (disk full)."""
        path = self._path(index.round)
        temporary = path.with_suffix(_TEMPORARY)
        try:
            save_file({"params": params, "momentum": momentum}, temporary, metadata={"round": str(index.round)})
        except SafetensorError as error:  # what this library makes of every failed write
            raise OSError(f"{temporary} cannot be written: {error}") from error
        _sync_file(temporary)
        temporary.replace(path)
        path.with_suffix(_INDEX_SUFFIX).write_bytes(encode_record(index))
        _sync_file(path.with_suffix(_INDEX_SUFFIX))
        _sync_file(self._folder)
        snapshot = _open_snapshot(path)
        assert snapshot is not None, "a snapshot that was just written can be read"
        self._snapshots[index.round] = snapshot

    def read(self, number: int, params: Float32s, momentum: Float32s) -> bool:
        """Fill the vectors from a snapshot; False when the file is damaged: it is then removed."""
        snapshot = self._snapshots[number]
        try:
            with safe_open(snapshot.path, framework="numpy") as file:
                np.copyto(params, file.get_tensor("params"))
                np.copyto(momentum, file.get_tensor("momentum"))
            whole = chunk_digests(params) + chunk_digests(momentum) == snapshot.index.digests
        except (OSError, SafetensorError, ValueError):
            whole = False
        if not whole:
            self.remove(number)
        return whole

    def find_chunk(self, digest: bytes) -> tuple[Snapshot, int] | None:
        """The newest snapshot that has a chunk with this digest, and the chunk's number."""
        for number in reversed(self.rounds()):
            digests = self._snapshots[number].index.digests
            at = digests.find(digest)
            while at >= 0 and at % 32:
                at = digests.find(digest, at + 1)
            if at >= 0:
                return self._snapshots[number], at // 32
        return None

    def remove(self, number: int) -> None:
        self._snapshots.pop(number, None)
        self._path(number).with_suffix(_INDEX_SUFFIX).unlink(missing_ok=True)
        self._path(number).unlink(missing_ok=True)

    def keep_newest(self, count: int) -> None:
        for number in self.rounds()[:-count]:
            self.remove(number)

    def _path(self, number: int) -> Path:
        return self._folder / (_stem(number) + _STATE_SUFFIX)


def _stem(number: int) -> str:
    return f"{number:08d}"


def read_chunk(snapshot: Snapshot, number: int) -> bytes | None:
    """A chunk's bytes, or None when the file no longer holds what the index says."""
    span = snapshot.index.span(number)
    # safetensors lays tensors out by alignment, then by name: momentum stands before params.
    vector_bytes = snapshot.index.elements * 4
    start = snapshot.data_start + (vector_bytes if span.vector is StateVector.PARAMS else 0) + span.start
    try:
        with snapshot.path.open("rb") as file:
            file.seek(start)
            raw = file.read(span.stop - span.start)
        snapshot.index.check_chunk_untrusted(number, raw)
    except (OSError, ProtocolError):
        return None
    return raw


def _open_snapshot(path: Path) -> Snapshot | None:
    try:
        index = decode_index_untrusted(path.with_suffix(_INDEX_SUFFIX).read_bytes())
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
        if path.stat().st_size != 8 + header_bytes + 8 * index.elements or path.stem != _stem(index.round):
            return None
    except (OSError, ProtocolError):
        return None
    return Snapshot(path=path, index=index, data_start=8 + header_bytes)


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
