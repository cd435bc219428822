"""A virtual disk with the guarantees of the daemon's: SQLite with FULL sync, blobs that are synced before they count.

A write that is finished survives everything but a restore from a backup. Of writes under way a crash leaves some.
"""

import random
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from shoal.protocol.effects import VoteRecord
from shoal.protocol.messages import Certificate
from tests.sim.faults import DiskFate

SNAPSHOTS_KEPT = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The whole state of a round."""

    round: int
    params: npt.NDArray[np.float32]
    momentum: npt.NDArray[np.float32]
    root: bytes


Record = VoteRecord | Certificate | Snapshot


@dataclass(slots=True)
class Disk:
    """What a crash leaves. `under_way`: blobs first, then the records that count on them."""

    vote: VoteRecord | None = None
    certificates: dict[int, Certificate] = field(default_factory=dict)
    blobs: dict[bytes, bytes] = field(default_factory=dict)
    incarnation: int = 0
    snapshots: dict[int, Snapshot] = field(default_factory=dict)
    under_way: list[tuple[bytes, bytes] | Record] = field(default_factory=list)

    def begin(self, blobs: dict[bytes, bytes], *records: Record) -> None:
        """Start writing these blobs and then the records."""
        self.under_way = [*blobs.items(), *records]

    def finish(self) -> None:
        """Everything that was begun is durable."""
        for write in self.under_way:
            self._put(write)
        self.under_way = []

    def read(self, digest: bytes) -> bytes | None:
        """A blob, unless it is absent or damaged."""
        raw = self.blobs.get(digest)
        return raw if raw is not None and blake3(raw).digest() == digest else None

    def crash(self, fate: DiskFate, rng: random.Random) -> None:
        """Decide about what was under way."""
        writes, self.under_way = self.under_way, []
        if not writes:
            return
        if fate is DiskFate.KEPT:
            for write in writes[: rng.randint(0, len(writes))]:
                self._put(write)
            return
        for write in writes:
            if not isinstance(write, tuple):
                return  # a record is one transaction: not synced, it never was
            if rng.random() < 0.5:
                self._put(write)
            elif fate is DiskFate.TORN and write[0] not in self.blobs:
                self.blobs[write[0]] = write[1][: len(write[1]) // 2]

    def copy(self) -> "Disk":
        """A backup: what is durable now."""
        return Disk(
            vote=self.vote,
            certificates=dict(self.certificates),
            blobs=dict(self.blobs),
            incarnation=self.incarnation,
            snapshots=dict(self.snapshots),
        )

    def put_aside(self, first: int) -> None:
        """The certificates from round `first` on are those of another log."""
        self.certificates = {number: one for number, one in self.certificates.items() if number < first}

    def abandon(self, first: int) -> None:
        """Another log goes on from round `first`: what was certified since is put aside, durably."""
        self.put_aside(first)
        self.snapshots = {number: one for number, one in self.snapshots.items() if number < first}

    def keep_snapshot(self, snapshot: Snapshot) -> None:
        self.snapshots[snapshot.round] = snapshot
        for number in sorted(self.snapshots)[:-SNAPSHOTS_KEPT]:
            del self.snapshots[number]

    def _put(self, write: tuple[bytes, bytes] | Record) -> None:
        if isinstance(write, VoteRecord):
            self.vote = write
        elif isinstance(write, Certificate):
            self.certificates[write.result.round] = write
        elif isinstance(write, Snapshot):
            self.keep_snapshot(write)
        else:
            self.blobs[write[0]] = write[1]
