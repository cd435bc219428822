"""Watches the disk: a peer stops voting while there still is space to go on serving, and votes again once there is.

Voting stops when the free space is below `store.free_gib_min`, or when a write fails (the driver halts by itself). What
could not be made durable was never said, so the peer goes on as after a restart (RoundDriver.resume). That is tried for
want of space alone: a disk that fails in another way is a person's to judge, and then the peer is started again.

Invariants: the peer goes on only with FREE_MARGIN times the least space free, and after its vote record could be
written; who stops again soon waits twice as long each time, up to WAIT_S_MAX.
"""

import asyncio
import logging
import shutil
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from shoal.node.ledger_store import StoreError, classify_failure
from shoal.protocol.errors import Failure

DISK_PERIOD_S = 10.0
FREE_MARGIN = 1.25  # so that a peer does not stop and go on with every round that it stores
FREE_MIB_MIN = 4.0  # to go on with, where no space is to be kept free
RELAPSE_S = 60.0
WAIT_S_MAX = 60.0

log = logging.getLogger("shoal")


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskPorts:
    """`halt` and `resume` are the round driver's; `stopped` and `resumed` tell people."""

    halt: Callable[[], None]
    resume: Callable[[], Awaitable[None]]
    stopped: Callable[[Failure, str], None]
    resumed: Callable[[str], None]


class DiskWatch:
    """All calls on the event loop."""

    def __init__(
        self, folder: Path, free_gib_min: float, ports: DiskPorts, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._folder = folder
        self._free_gib_min = free_gib_min
        self._ports = ports
        self._now = now
        self._failure: Failure | None = None  # what keeps this peer from voting
        self._resumed_s: float | None = None
        self._wait_s = DISK_PERIOD_S
        self._due_s = 0.0

    def failed(self, reason: Failure, detail: str) -> None:
        """A write has failed, and the driver has halted."""
        if self._failure not in (None, Failure.DISK_FULL):
            return  # a person is needed already
        now = self._now()
        is_relapse = self._resumed_s is not None and now - self._resumed_s < RELAPSE_S
        self._wait_s = min(2 * self._wait_s, WAIT_S_MAX) if is_relapse else DISK_PERIOD_S
        self._due_s = now + self._wait_s
        self._failure = reason
        self._ports.stopped(reason, detail)

    async def watch(self) -> None:
        """Look at it period after period."""
        while True:
            await self.look()
            await asyncio.sleep(DISK_PERIOD_S)

    async def look(self) -> None:
        """Stop or go on, as the free space says."""
        free_gib = shutil.disk_usage(self._folder).free / 2**30
        if self._failure is None:
            if free_gib < self._free_gib_min:
                self._ports.halt()
                detail = f"{free_gib:.2f} GiB are free, store.free_gib_min is {self._free_gib_min:g}"
                self.failed(Failure.DISK_FULL, detail)
            return
        has_space = free_gib >= max(self._free_gib_min * FREE_MARGIN, FREE_MIB_MIN / 1024)
        if has_space and self._failure is Failure.DISK_FULL and self._now() >= self._due_s:
            await self._go_on(free_gib)

    async def _go_on(self, free_gib: float) -> None:
        try:
            await self._ports.resume()
        except (OSError, StoreError) as error:
            reason = classify_failure(error)
            if reason is not self._failure:
                self.failed(reason, str(error))
            log.debug("the disk takes no writes yet: %s", error)
            return
        self._failure = None
        self._resumed_s = self._now()
        self._ports.resumed(f"{free_gib:.2f} GiB are free")
