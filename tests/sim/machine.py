"""A simulated machine: a clock that may drift, a processor that may be slow, a disk, and links to other machines.

Whatever runs on it is lost with a crash and late after a pause; its own time is its clock's.
"""

import random
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from tests.sim.disk import Disk
from tests.sim.faults import DiskFate

if TYPE_CHECKING:
    from tests.sim.world import World

SEND_TRIES = 3  # of a bulk transfer whose link is lost, as the daemon does
SEND_RETRY_S = 0.5
EPOCH_S = 1_700_000_000.0


class SimMachine:
    def __init__(self, world: "World", number: int) -> None:
        self.world = world
        self.number = number
        self.disk = Disk()
        self.backups: dict[float, Disk] = {}  # by the time at which one is put back
        self.up = False
        self.life = 0
        self.there_since_s = 0.0  # since then it is up and awake
        self.paused_until_s = 0.0
        self.paused_s = 0.0  # in all, of this life
        self.cpu = 1.0  # how many times slower than a good one
        self.wall_offset_s = 0.0
        self.rng = random.Random(f"{world.seed}/{number}")
        self._clock_rate = 1.0
        self._clock_s = self._clock_set_s = 0.0
        self._deferred: deque[tuple[Callable[..., None], tuple[object, ...]]] = deque()

    # -- time ----------------------------------------------------------------------------------------------------

    def clock(self) -> float:
        """The peer's monotonic clock."""
        return self._clock_s + (self.world.now - self._clock_set_s) * self._clock_rate

    def drift(self, rate: float) -> None:
        self._clock_s, self._clock_set_s, self._clock_rate = self.clock(), self.world.now, rate

    def later(self, delay_s: float, action: Callable[..., None], *args: object) -> None:
        """Run `action` unless this life of the peer has ended by then; a paused peer does it when it wakes."""
        self.world.schedule(delay_s / self._clock_rate, self._run, self.life, action, args)

    def _run(self, life: int, action: Callable[..., None], args: tuple[object, ...]) -> None:
        if self.up and self.life == life:
            if self.world.now < self.paused_until_s:
                self._deferred.append((action, args))
            else:
                action(*args)

    def arrive(self, source: int, what: str, action: Callable[..., None], *args: object) -> None:
        """Something came over the network."""
        if self.up:
            self.world.record(f"{source}>{self.number} {what}")
            if self.world.now < self.paused_until_s:
                self._deferred.append((action, args))
            else:
                action(*args)

    def pause(self, seconds: float) -> None:
        self.paused_until_s = self.there_since_s = max(self.paused_until_s, self.world.now + seconds)
        self.paused_s += seconds
        self.world.schedule(seconds, self.wake)

    def wake(self) -> None:
        """Everything that was due or came meanwhile happens now, in its order."""
        if self.world.now + 1e-9 < self.paused_until_s:
            return
        self.paused_until_s = 0.0
        deferred, self._deferred = self._deferred, deque()
        life = self.life
        for action, args in deferred:
            if self.up and self.life == life:
                action(*args)

    def work_s(self, low: float, high: float) -> float:
        return self.rng.uniform(low, high) * self.cpu

    def wall_s(self) -> float:
        """The wall clock, which people and programs set."""
        return EPOCH_S + self.world.now + self.wall_offset_s

    # -- life ----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """A new life begins; nothing of the last one runs any more."""
        self.up = True
        self.life += 1
        self.paused_until_s = self.paused_s = 0.0
        self.there_since_s = self.world.now
        self._deferred.clear()
        self.disk.incarnation = max(self.disk.incarnation + 1, int(self.wall_s()))

    def crash(self, fate: DiskFate = DiskFate.KEPT, at_s: float = 0.0) -> None:
        """Stop at once. `fate` decides about writes under way; a backup for `at_s` may take the disk's place."""
        self.up = False
        self.disk.crash(fate, self.rng)
        if fate is DiskFate.BACKUP and at_s in self.backups:
            self.disk = self.backups[at_s].copy()

    # -- network -------------------------------------------------------------------------------------------------

    def transmit(self, other: "SimMachine", size: int, what: str, action: Callable[..., None], *args: object) -> None:
        self.world.network.send(
            self.number, other.number, size, self.world.now, other.arrive, self.number, what, action, *args
        )

    def stream(
        self,
        other: "SimMachine",
        what: str,
        size: int,
        wanted: Callable[[], bool],
        action: Callable[..., None],
        *args: object,
    ) -> None:
        """Bulk bytes. When the link is lost they are sent again, while they are wanted."""
        self._push(other, what, size, wanted, SEND_TRIES, action, args)

    def _push(
        self,
        other: "SimMachine",
        what: str,
        size: int,
        wanted: Callable[[], bool],
        tries: int,
        action: Callable[..., None],
        args: tuple[object, ...],
    ) -> None:
        if not wanted():
            return
        network, now = self.world.network, self.world.now
        if network.stream(self.number, other.number, size, now, other.arrive, self.number, what, action, *args):
            return
        if tries > 1:
            delay_s = SEND_RETRY_S * (SEND_TRIES - tries + 1)
            self.later(delay_s, self._push, other, what, size, wanted, tries - 1, action, args)
