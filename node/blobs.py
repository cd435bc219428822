"""The blob store: encoded update parts on disk, named by their BLAKE3 digest.

A blob is written to a temporary name and renamed, so a file that has a digest for a name is whole or was torn by a
power cut; either way it is checked before it is used. Blocking calls: the daemon runs them in threads.

Invariant: `read` returns bytes with the asked digest, or None; `sync` returns only when its blobs survive a power cut.
"""

import os
from collections.abc import Iterable
from pathlib import Path

from blake3 import blake3

_TEMPORARY = ".partial"


class BlobStore:
    """A folder of blobs, one level of two hex digits deep. Retention is the caller's: it knows the rounds."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._folder.mkdir(parents=True, exist_ok=True)
        self.stored_bytes = 0
        self._whole: set[bytes] = set()  # what this process wrote or read; any other file may be torn
        for path in self._folder.glob("??/*"):
            if path.suffix == _TEMPORARY:
                path.unlink()  # a write that a crash cut short
            else:
                self.stored_bytes += path.stat().st_size

    def write(self, digest: bytes, raw: bytes | memoryview) -> None:
        """Store a blob whose digest the caller has checked. Durable only after `sync`. Raises OSError (disk full)."""
        if self.has(digest) and (digest in self._whole or self.read(digest) is not None):
            return
        path = self._path(digest)
        path.parent.mkdir(exist_ok=True)
        # Two threads may write the same blob at once; each has its own temporary file and either rename is right.
        temporary = path.with_name(f"{path.name}.{os.urandom(4).hex()}{_TEMPORARY}")
        temporary.write_bytes(raw)
        temporary.replace(path)
        self._whole.add(digest)
        self.stored_bytes += len(raw)

    def sync(self, digests: Iterable[bytes]) -> None:
        """Force these blobs, and their names, to the disk."""
        folders = set()
        for digest in digests:
            path = self._path(digest)
            _sync_path(path)
            folders.add(path.parent)
        for folder in sorted(folders):
            _sync_path(folder)
        _sync_path(self._folder)

    def has(self, digest: bytes) -> bool:
        return self._path(digest).exists()

    def read(self, digest: bytes) -> bytes | None:
        """The blob, or None when it is not here or not what its name says; a damaged file is removed."""
        try:
            raw = self._path(digest).read_bytes()
        except FileNotFoundError:
            return None
        if blake3(raw).digest() != digest:
            self.remove(digest)
            return None
        self._whole.add(digest)
        return raw

    def remove(self, digest: bytes) -> None:
        path = self._path(digest)
        self._whole.discard(digest)
        try:
            size = path.stat().st_size
            path.unlink()
        except FileNotFoundError:
            return
        self.stored_bytes -= size

    def _path(self, digest: bytes) -> Path:
        name = digest.hex()
        return self._folder / name[:2] / name


def _sync_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
