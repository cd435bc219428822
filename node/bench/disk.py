"""`shoal bench disk`: what a round asks of the disk that a data folder is on."""

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from shoal.node.bench.rates import measure_latency, measure_rate
from shoal.node.blobs import BlobStore
from shoal.node.ledger_store import LedgerStore

FILE_BYTES = 128 << 20
PARTS = 64
PART_BYTES = 266_240  # 2^18 values as int8
COMMITS = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskRates:
    """Rates in GB (10^9 bytes) a second of wall time, everything durable; spans in milliseconds."""

    write: float
    read: float
    blobs: float
    commit_ms: float
    commit_p99_ms: float


def measure_disk(folder: Path, repeats: int, say: Callable[[str], None]) -> DiskRates:
    """Writes some hundred MB into a folder of its own in `folder`, and removes it. Raises OSError and StoreError."""
    with tempfile.TemporaryDirectory(prefix="shoal-bench-", dir=folder) as name:
        own = Path(name)
        chunk = os.urandom(1 << 20)
        say("one large file, as a residual or a snapshot is written")
        path = own / "large"
        write = measure_rate(lambda: _write(path, chunk), FILE_BYTES, repeats, time.perf_counter)
        read = measure_rate(lambda: _read(path), FILE_BYTES, repeats, time.perf_counter)
        path.unlink()
        say("the parts of an update")
        store = BlobStore(own / "blobs")
        blobs = measure_rate(lambda: _store_parts(store), PARTS * PART_BYTES, repeats, time.perf_counter)
        say("votes")
        with LedgerStore.open(own / "ledger.sqlite") as ledger:
            commit_ms, commit_p99_ms = measure_latency(
                lambda: ledger.put_record("bench", b"vote", chunk[:512]), COMMITS
            )
    return DiskRates(write=write, read=read, blobs=blobs, commit_ms=commit_ms, commit_p99_ms=commit_p99_ms)


def _write(path: Path, chunk: bytes) -> None:
    with path.open("wb") as file:
        for _ in range(FILE_BYTES // len(chunk)):
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())


def _read(path: Path) -> None:
    """From the disk, where the system can be told to forget what it keeps of the file."""
    with path.open("rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        buffer = bytearray(1 << 20)
        while file.readinto(buffer):
            pass


def _store_parts(store: BlobStore) -> None:
    parts = [os.urandom(32) * (PART_BYTES // 32) for _ in range(PARTS)]
    digests = [blake3(part).digest() for part in parts]
    for digest, part in zip(digests, parts, strict=True):
        store.write(digest, part)
    store.sync(digests)
    for digest in digests:
        store.remove(digest)
