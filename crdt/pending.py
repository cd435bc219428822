"""Batches that wait for entries that this replica does not have yet.

Invariant: at most BATCHES_MAX batches of BYTES_MAX bytes; the oldest give way. What is dropped is not lost:
reconciliation names it again, and it sends entries after their ancestors.
"""

from collections import Counter
from collections.abc import Iterable, Set

from shoal.crdt.entries import Batch, measure_batch_bytes
from shoal.crdt.eras import PERMANENT_ERA
from shoal.crdt.kinds import EntryId

BATCHES_MAX = 1024
BYTES_MAX = 8 * 1024 * 1024


class PendingBatches:
    """Batches with correct signatures, each under the ids that it waits for."""

    def __init__(self, *, batches_max: int = BATCHES_MAX, bytes_max: int = BYTES_MAX) -> None:
        self._batches_max = batches_max
        self._bytes_max = bytes_max
        # By tip, oldest first: of two batches that end in one tip, one is a suffix of the other.
        self._batches: dict[EntryId, tuple[Batch, Set[EntryId]]] = {}
        self._waiting: dict[EntryId, set[EntryId]] = {}
        self._held: Counter[EntryId] = Counter()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._batches)

    def add(self, batch: Batch, missing: Set[EntryId]) -> None:
        """Keep `batch` until one of `missing` arrives; of two batches with one tip the longer stays."""
        assert missing, "a batch that misses nothing need not wait"
        if batch.tip in self._batches and len(self._batches[batch.tip][0].ids) >= len(batch.ids):
            return
        self._remove(batch.tip)
        self._batches[batch.tip] = batch, missing
        self._bytes += measure_batch_bytes(batch)
        self._held.update(batch.ids)
        for entry_id in missing:
            self._waiting.setdefault(entry_id, set()).add(batch.tip)
        while len(self._batches) > self._batches_max or self._bytes > self._bytes_max:
            self._remove(next(iter(self._batches)))

    def take(self, arrived: EntryId) -> tuple[Batch, ...]:
        """Remove and return the batches that waited for `arrived`, by tip; they may still miss others."""
        tips = sorted(self._waiting.get(arrived, ()))
        return tuple(batch for batch in map(self._remove, tips) if batch is not None)

    def drop_older(self, oldest_era: int) -> None:
        """Forget the batches of eras before this one, other than the permanent one."""
        for tip in [tip for tip, (batch, _) in self._batches.items() if PERMANENT_ERA < batch.era < oldest_era]:
            self._remove(tip)

    def list_wanted(self) -> tuple[EntryId, ...]:
        """The ids that are waited for and are not in a waiting batch themselves, in ascending order."""
        return self.select_absent(self._waiting.keys())

    def select_absent(self, ids: Iterable[EntryId]) -> tuple[EntryId, ...]:
        """Those of `ids` that are in no waiting batch, in ascending order."""
        return tuple(sorted(entry_id for entry_id in ids if entry_id not in self._held))

    def _remove(self, tip: EntryId) -> Batch | None:
        batch, missing = self._batches.pop(tip, (None, frozenset[EntryId]()))
        if batch is None:
            return None
        self._bytes -= measure_batch_bytes(batch)
        for entry_id in batch.ids:
            self._held[entry_id] -= 1
            if not self._held[entry_id]:
                del self._held[entry_id]
        for entry_id in missing:
            tips = self._waiting[entry_id]
            tips.discard(tip)
            if not tips:
                del self._waiting[entry_id]
        return batch
