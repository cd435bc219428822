"""The blob store: encoded update parts on disk, named by their BLAKE3 digest.

A blob is written to a temporary name and renamed, so a file that has a digest for a name is whole or was torn by a
power cut; either way it is checked before it is used. Blocking calls: the daemon runs them in threads.

Invariant: `read` returns bytes with the asked digest, or None; `sync` returns only when its blobs survive a power cut.
"""

import logging
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

from blake3 import blake3

from shoal.node.durability import sync_path

SYNC_TRIES = 4
SYNCS_AT_ONCE = 8

_TEMPORARY = ".partial"

log = logging.getLogger(__name__)


class BlobStore:
    """A folder of blobs, one level of two hex digits deep. Retention is the caller's: it knows the rounds."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._folder.mkdir(parents=True, exist_ok=True)
        self._folders: set[Path] = set()  # those that are there
        self.stored_bytes = 0
        self._whole: set[bytes] = set()  # what this process wrote or read; any other file may be torn
        self._fetched: set[bytes] = set()  # what was written as a copy of what others hold, and is not durable yet
        self._unsynced: set[bytes] = set()  # what the disk refused to make durable, though it reads well from memory
        # Of every blob the number of its last write in this process, and that which a sync made durable: a blob that
        # is removed and written again while a thread makes it durable gets another number.
        self._writes = count(1)
        self._written: dict[bytes, int] = {}
        self._durable: dict[bytes, int] = {}
        for path in self._folder.glob("??/*"):
            if path.suffix == _TEMPORARY:
                path.unlink()  # a write that a crash cut short
            else:
                self.stored_bytes += path.stat().st_size

    def write(self, digest: bytes, raw: bytes | memoryview, *, fetched: bool = False) -> None:
        """Store a blob whose digest the caller has checked. Durable only after `sync`, or, where it is a copy that was
        `fetched`, after `sync_fetched`. Raises OSError (disk full)."""
        is_there = self.has(digest) and (digest in self._whole or self.read(digest) is not None)
        if is_there and digest not in self._unsynced:
            return
        path = self._path(digest)
        if path.parent not in self._folders:
            path.parent.mkdir(exist_ok=True)
            self._folders.add(path.parent)
        # Two threads may write the same blob at once; each has its own temporary file and either rename is right.
        temporary = path.with_name(f"{path.name}.{os.urandom(4).hex()}{_TEMPORARY}")
        try:
            temporary.write_bytes(raw)
            temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)  # on a full disk, space is what the next try needs
            raise
        self._whole.add(digest)
        self._written[digest] = next(self._writes)
        if fetched:
            self._fetched.add(digest)
        self.stored_bytes += 0 if is_there else len(raw)

    def sync(self, digests: Iterable[bytes]) -> None:
        """Force these blobs, and their names, to the disk. Raises OSError; they must be written again then, because a
        system reports a write that it lost once and calls the next sync a success. What was made durable before, for a
        vote, is not asked of the disk again."""
        writes = {digest: self._written.get(digest, 0) for digest in digests if digest not in self._fetched}
        wanted = [digest for digest, write in writes.items() if self._durable.get(digest) != write]
        if not wanted:
            return
        self._unsynced.update(wanted)
        paths = [self._path(digest) for digest in wanted]
        # At once: a file system makes many files durable in hardly more time than one.
        with ThreadPoolExecutor(SYNCS_AT_ONCE) as threads:
            list(threads.map(sync_path, paths))
            list(threads.map(sync_path, sorted({path.parent for path in paths})))
        sync_path(self._folder)
        self._unsynced.difference_update(wanted)
        self._durable.update((digest, writes[digest]) for digest in wanted)

    def sync_fetched(self) -> None:
        """Force what was fetched to the disk, all at once. A power cut before that costs fetching it again."""
        fetched, self._fetched = self._fetched, set()
        for tries_left in reversed(range(SYNC_TRIES)):
            try:
                self.sync([digest for digest in fetched if self.has(digest)])
                return
            except FileNotFoundError:  # retention has removed one of them meanwhile
                if not tries_left:
                    raise

    def has(self, digest: bytes) -> bool:
        return self._path(digest).exists()

    def read(self, digest: bytes) -> bytes | None:
        """The blob, or None when it is not here or not what its name says; a damaged file is removed."""
        try:
            raw = self._path(digest).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            log.warning("%s cannot be read: %s", self._path(digest), error)
            return None
        if blake3(raw).digest() != digest:
            log.warning("%s is damaged and was removed; it is fetched from other peers when needed", self._path(digest))
            self.remove(digest)
            return None
        self._whole.add(digest)
        return raw

    def remove(self, digest: bytes) -> None:
        path = self._path(digest)
        self._whole.discard(digest)
        self._unsynced.discard(digest)
        self._fetched.discard(digest)
        self._written.pop(digest, None)
        self._durable.pop(digest, None)
        try:
            size = path.stat().st_size
            path.unlink()
        except FileNotFoundError:
            return
        self.stored_bytes -= size

    def _path(self, digest: bytes) -> Path:
        return blob_path(self._folder, digest)


def blob_path(folder: Path, digest: bytes) -> Path:
    """Where a blob lies in a store's folder."""
    name = digest.hex()
    return folder / name[:2] / name
