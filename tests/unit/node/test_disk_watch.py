"""The watch over the disk: who stops voting, who votes again by itself, and who waits for a person."""

import errno
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from shoal.node.disk_watch import DISK_PERIOD_S, FREE_MARGIN, RELAPSE_S, WAIT_S_MAX, DiskPorts, DiskWatch
from shoal.node.ledger_store import StoreError, classify_failure
from shoal.protocol.errors import Failure

LEAST_GIB = 2.0
Usage = namedtuple("Usage", "total used free")


class Disk:
    """A disk with as much free space as the test says, and what its watch made of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, least_gib: float = LEAST_GIB) -> None:
        self.free_gib = 10.0
        self.now_s = 1000.0
        self.calls: list[str] = []
        self.told: list[tuple[Failure | None, str]] = []
        self.refuses: OSError | StoreError | None = None
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(0, 0, int(self.free_gib * 2**30)))
        ports = DiskPorts(
            halt=lambda: self.calls.append("halt"),
            resume=self._resume,
            stopped=lambda reason, detail: self.told.append((reason, detail)),
            resumed=lambda detail: self.told.append((None, detail)),
        )
        self.watch = DiskWatch(Path(), least_gib, ports, lambda: self.now_s)

    async def _resume(self) -> None:
        self.calls.append("resume")
        if self.refuses is not None:
            raise self.refuses

    async def look(self, after_s: float = DISK_PERIOD_S) -> list[str]:
        """What the watch does, so much later."""
        self.now_s += after_s
        self.calls.clear()
        await self.watch.look()
        return self.calls


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


async def test_little_space_stops_the_vote_once_and_enough_of_it_begins_it_again(disk: Disk) -> None:
    assert await disk.look() == []
    disk.free_gib = 1.99
    assert await disk.look() == ["halt"]
    assert await disk.look() == [] and await disk.look() == []
    assert disk.told == [(Failure.DISK_FULL, "1.99 GiB are free, store.free_gib_min is 2")]
    disk.free_gib = LEAST_GIB * FREE_MARGIN - 0.01
    assert await disk.look() == [], "a little more than too little is not enough"
    disk.free_gib = LEAST_GIB * FREE_MARGIN
    assert await disk.look() == ["resume"]
    assert disk.told[1:] == [(None, "2.50 GiB are free")]
    assert await disk.look() == []


async def test_a_write_that_failed_is_told_and_waits_for_a_period(disk: Disk) -> None:
    disk.watch.failed(Failure.DISK_FULL, "no space")
    assert disk.told == [(Failure.DISK_FULL, "no space")]
    assert await disk.look(DISK_PERIOD_S - 0.1) == []
    assert await disk.look(0.2) == ["resume"]


async def test_where_no_space_is_to_be_kept_some_is_needed_nevertheless(monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch, least_gib=0.0)
    disk.free_gib = 0.0
    disk.watch.failed(Failure.DISK_FULL, "no space")
    assert await disk.look() == []
    disk.free_gib = 0.01
    assert await disk.look() == ["resume"]


async def test_a_disk_that_takes_no_writes_yet_is_tried_again(disk: Disk) -> None:
    disk.watch.failed(Failure.DISK_FULL, "no space")
    disk.refuses = StoreError(Path("ledger.sqlite"), Failure.DISK_FULL, "the disk is full", "make space")
    assert await disk.look() == ["resume"] and await disk.look() == ["resume"]
    assert len(disk.told) == 1, "nothing new has happened"
    disk.refuses = None
    assert await disk.look() == ["resume"]
    assert await disk.look() == []


@pytest.mark.parametrize("reason", [Failure.STORE_UNUSABLE, Failure.STORE_DAMAGED])
async def test_another_failure_than_want_of_space_waits_for_a_person(disk: Disk, reason: Failure) -> None:
    disk.watch.failed(reason, "input/output error")
    assert await disk.look(RELAPSE_S) == []
    disk.watch.failed(Failure.DISK_FULL, "and no space")
    assert await disk.look(RELAPSE_S) == []
    assert disk.told == [(reason, "input/output error")]


async def test_a_disk_that_turns_out_to_be_broken_when_there_is_space_waits_for_a_person(disk: Disk) -> None:
    disk.watch.failed(Failure.DISK_FULL, "no space")
    disk.refuses = OSError(errno.EIO, "Input/output error")
    assert await disk.look() == ["resume"]
    assert [reason for reason, _ in disk.told] == [Failure.DISK_FULL, Failure.STORE_UNUSABLE]
    disk.refuses = None
    assert await disk.look(RELAPSE_S) == []


async def test_who_stops_again_and_again_waits_longer_and_longer(disk: Disk) -> None:
    waits = []
    for _ in range(5):
        disk.watch.failed(Failure.DISK_FULL, "no space")
        began_s = disk.now_s
        while await disk.look(1.0) == []:
            assert disk.now_s < began_s + 2 * WAIT_S_MAX
        waits.append(disk.now_s - began_s)
    assert waits == [10.0, 20.0, 40.0, 60.0, 60.0]
    disk.now_s += RELAPSE_S
    disk.watch.failed(Failure.DISK_FULL, "no space")
    assert await disk.look() == ["resume"], "that was another time"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), Failure.DISK_FULL),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), Failure.DISK_FULL),
        (OSError(errno.EIO, "Input/output error"), Failure.STORE_UNUSABLE),
        (OSError(errno.EROFS, "Read-only file system"), Failure.STORE_UNUSABLE),
        (StoreError(Path("x"), Failure.STORE_DAMAGED, "is damaged", "move it away"), Failure.STORE_DAMAGED),
    ],
)
def test_what_a_write_failed_of(error: OSError | StoreError, reason: Failure) -> None:
    assert classify_failure(error) is reason
