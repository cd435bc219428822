"""Snapshots: the whole state at one round as a safetensors file, served chunk by chunk to peers that join.

The file holds two flat float32 tensors, `params` and `momentum`, and in its metadata the round. Its index (chunk
digests) lies beside it. Blocking calls: the daemon runs them in threads.

A snapshot that somebody fetches is lent: it stays until LEASE_S after the last chunk was asked for, however many newer
ones are written meanwhile, so that a joiner does not lose the race against a fast swarm. The updates after it stay
with it.

Invariants: a snapshot is used only when its index hashes to the state root that a certificate vouches for, and every
chunk that is read for use matches the index; at most LEASES_MAX lent snapshots stay on the disk besides the newest,
and none for longer than LEASE_S_MAX.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from shoal.node.durability import sync_path
from shoal.protocol.codecs import Float32s
from shoal.protocol.errors import ProtocolError
from shoal.protocol.state import SnapshotIndex, StateVector, chunk_digests, decode_index_untrusted
from shoal.protocol.wire import encode_record

_STATE_SUFFIX = ".safetensors"
_INDEX_SUFFIX = ".index"
_TEMPORARY = ".partial"
LEASE_S = 60.0
LEASE_S_MAX = 4 * 3600.0
LEASES_MAX = 2

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    path: Path
    index: SnapshotIndex
    data_start: int  # where the tensor bytes begin in the file


class SnapshotStore:
    """The folder of snapshots, newest last."""

    def __init__(self, folder: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder = folder
        self._clock = clock
        self._leases: dict[int, tuple[float, float]] = {}  # by round: when it was first lent, and until when
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
            if path.suffix != _TEMPORARY and path.stem not in whole:
                log.warning("%s has no counterpart, or one of the two is damaged: it was removed", path)
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
            self.adopt(index, temporary)
        except SafetensorError as error:  # what this library makes of every failed write
            raise OSError(f"{temporary} cannot be written: {error}") from error
        finally:
            temporary.unlink(missing_ok=True)  # on a full disk, space is what everything else needs

    def adopt(self, index: SnapshotIndex, file: Path) -> None:
        """Make a file that holds all of this snapshot a part of the store. Raises OSError."""
        path = self._path(index.round)
        sync_path(file)
        file.replace(path)
        try:
            path.with_suffix(_INDEX_SUFFIX).write_bytes(encode_record(index))
            sync_path(path.with_suffix(_INDEX_SUFFIX))
            sync_path(self._folder)
        except OSError:
            self.remove(index.round)
            raise
        snapshot = _open_snapshot(path)
        assert snapshot is not None, "a snapshot that was just written can be read"
        self._snapshots[index.round] = snapshot

    def read(self, number: int, params: Float32s, momentum: Float32s) -> bool:
        """Fill the vectors from a snapshot; False when the file is damaged: it is then removed."""
        whole = load_snapshot(self._snapshots[number], params, momentum)
        if not whole:
            self.remove(number)
        return whole

    def find_chunk(self, digest: bytes) -> tuple[Snapshot, int] | None:
        """The newest snapshot that has a chunk with this digest, and the chunk's number. It is lent from now on."""
        for number in reversed(self.rounds()):
            snapshot = self._snapshots.get(number)
            if snapshot is None:
                continue  # another thread has just removed it
            digests = snapshot.index.digests
            at = digests.find(digest)
            while at >= 0 and at % 32:
                at = digests.find(digest, at + 1)
            if at >= 0:
                self.lend(number)
                return snapshot, at // 32
        return None

    def lend(self, number: int) -> None:
        """Somebody is fetching this snapshot: keep it for a while."""
        if number in self._snapshots:
            now = self._clock()
            began_s = self._leases.get(number, (now, now))[0]
            self._leases[number] = began_s, min(now + LEASE_S, began_s + LEASE_S_MAX)

    def lent(self) -> list[int]:
        """The snapshots that stay because they are being fetched: those that have been for longest, LEASES_MAX of
        them. The newest one stays anyway."""
        now, newest = self._clock(), max(self._snapshots, default=0)
        leases = sorted((began_s, number) for number, (began_s, until_s) in list(self._leases.items()) if now < until_s)
        return [number for _, number in leases if number != newest][:LEASES_MAX]

    def remove(self, number: int) -> None:
        self._snapshots.pop(number, None)
        self._leases.pop(number, None)
        self._path(number).with_suffix(_INDEX_SUFFIX).unlink(missing_ok=True)
        self._path(number).unlink(missing_ok=True)

    def _path(self, number: int) -> Path:
        return self._folder / (_stem(number) + _STATE_SUFFIX)


def _stem(number: int) -> str:
    return f"{number:08d}"


def load_snapshot(snapshot: Snapshot, params: Float32s, momentum: Float32s) -> bool:
    """Fill the vectors; False when the file is not what its index says."""
    try:
        with safe_open(snapshot.path, framework="numpy"):
            pass  # the header can be read by others, too
        # Straight to where they belong, and not through another copy in memory; read and not mapped, so that what a
        # bad disk cannot give is an error and not a signal.
        with snapshot.path.open("rb", buffering=0) as file:
            file.seek(snapshot.data_start)
            _read_vector(file, momentum)
            _read_vector(file, params)
        return chunk_digests(params) + chunk_digests(momentum) == snapshot.index.digests
    except (OSError, SafetensorError, ValueError):
        return False


def _read_vector(file: FileIO, vector: Float32s) -> None:
    """Raises OSError, and ValueError where the file ends before."""
    rest = vector.view(np.uint8).data
    while rest:
        taken = file.readinto(rest)
        if not taken:
            raise ValueError("the file is shorter than its header says")
        rest = rest[taken:]


def chunk_offset(index: SnapshotIndex, number: int) -> int:
    """Where a chunk stands among the tensor bytes of a snapshot file."""
    span = index.span(number)
    # safetensors lays tensors out by alignment, then by name: momentum stands before params.
    return (4 * index.elements if span.vector is StateVector.PARAMS else 0) + span.start


def read_chunk(snapshot: Snapshot, number: int) -> bytes | None:
    """A chunk's bytes, or None when the file no longer holds what the index says."""
    span = snapshot.index.span(number)
    start = snapshot.data_start + chunk_offset(snapshot.index, number)
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
