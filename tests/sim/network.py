"""The packet model: delays, loss, duplication, partitions, one-way loss, and an uplink that bulk and control share.

What happens to a message is drawn from a generator of its link, so that a fault that is taken out of a run changes no
more than it must. Control travels on connections of its own: it never queues behind bulk for longer than one record.
"""

import math
import random
from collections.abc import Callable, Sequence

from tests.sim.faults import BRIDGE, DelayShape

UPLINK = 50e6  # bytes/s
DELAY_MEAN_S = 0.02
DELAY_MIN_S = 0.0005
# A part has a few hundred bytes here and up to a megabyte in life; on the wire one byte of it counts as so many.
BULK_SCALE = 1000
RECORD_BYTES = 256 * 1024  # what control waits for at most when its uplink is busy with bulk
BURST_PERIOD_S, BURST_S, BURST_FACTOR = 7.0, 1.5, 8.0

Arrive = Callable[..., None]
Schedule = Callable[..., None]


class Network:
    """Delivers by calling back through the world's schedule, or does not."""

    def __init__(self, seed: int, schedule: Schedule) -> None:
        self.loss = 0.0
        self.duplicate = 0.0
        self.delay_mean_s = DELAY_MEAN_S
        self.delay_shape = DelayShape.EXPONENTIAL
        self.uplinks: dict[int, float] = {}
        self.sides: tuple[int, ...] = ()
        self.cut: set[tuple[int, int]] = set()
        self._seed = seed
        self._schedule = schedule
        self._links: dict[tuple[int, int], random.Random] = {}
        self._control_free_s: dict[int, float] = {}
        self._bulk_free_s: dict[int, float] = {}

    def empty_queues(self) -> None:
        """What waits at slow uplinks leaves at once: they are fast again."""
        self._control_free_s.clear()
        self._bulk_free_s.clear()

    def connected(self, source: int, target: int) -> bool:
        if (source, target) in self.cut:
            return False
        if not self.sides:
            return True
        one, other = self.sides[source], self.sides[target]
        return one == other or BRIDGE in (one, other)

    def link(self, source: int, target: int) -> random.Random:
        """The generator of everything that happens by chance on this link."""
        rng = self._links.get((source, target))
        if rng is None:
            rng = self._links[source, target] = random.Random(f"{self._seed}/{source}>{target}")
        return rng

    def send(self, source: int, target: int, size: int, now: float, arrive: Arrive, *args: object) -> None:
        """One control message: may be lost, doubled, delayed and so reordered."""
        rng = self.link(source, target)
        uplink = self.uplinks.get(source, UPLINK)
        start = max(now, self._control_free_s.get(source, 0.0))
        bulk_free = self._bulk_free_s.get(source, 0.0)
        if bulk_free > now:
            if start == now:  # the record under way ends first; what follows at once waits for no other one
                start += min(RECORD_BYTES / uplink, bulk_free - now)
            self._bulk_free_s[source] = bulk_free + size / uplink
        self._control_free_s[source] = end = start + size / uplink
        copies = 2 if self.duplicate and rng.random() < self.duplicate else 1
        for _ in range(copies):
            if self.connected(source, target) and not (self.loss and rng.random() < self.loss):
                self._schedule(end - now + self._delay_s(rng, now), arrive, *args)

    def gossip(
        self, source: int, targets: Sequence[int], size: int, now: float, arrive: Arrive, message: object
    ) -> None:
        """To everybody to whom a chain of connections leads; `arrive` gets the target's number and the message."""
        wait_s = size / self.uplinks.get(source, UPLINK)
        # Two ways lead to nearly everybody, so that a message is lost only when it is lost on both.
        loss = self.loss * self.loss
        everywhere = not self.cut and not self.sides
        hops = {} if everywhere else self._spread(source, set(targets))
        for target in targets:
            count = 1 if everywhere else hops.get(target, 0)
            rng = self.link(source, target)
            if not count or (loss and rng.random() < loss):
                continue
            delay_s = wait_s
            for _ in range(count):
                delay_s += self._delay_s(rng, now)
            self._schedule(delay_s, arrive, target, message)

    def _spread(self, source: int, targets: set[int]) -> dict[int, int]:
        hops, frontier, distance = {source: 0}, [source], 0
        while frontier:
            distance += 1
            reached = [target for target in targets if any(self.connected(one, target) for one in frontier)]
            frontier = [target for target in reached if target not in hops]
            hops.update(dict.fromkeys(frontier, distance))
        del hops[source]
        return hops

    def stream(self, source: int, target: int, size: int, now: float, arrive: Arrive, *args: object) -> bool:
        """Bulk bytes queue behind each other on the sender's uplink. False when the link is lost on the way."""
        rng = self.link(source, target)
        start = max(now, self._bulk_free_s.get(source, 0.0))
        end = start + size * BULK_SCALE / self.uplinks.get(source, UPLINK)
        self._bulk_free_s[source] = end
        if not self.connected(source, target) or (self.loss and rng.random() < self.loss):
            return False
        self._schedule(end - now + self._delay_s(rng, now), arrive, *args)
        return True

    def calm(self) -> None:
        """All faults end."""
        self.loss = self.duplicate = 0.0
        self.delay_mean_s, self.delay_shape = DELAY_MEAN_S, DelayShape.EXPONENTIAL
        self.uplinks.clear()
        self.sides = ()
        self.cut.clear()

    def _delay_s(self, rng: random.Random, now: float) -> float:
        mean = self.delay_mean_s
        if self.delay_shape is DelayShape.LOGNORMAL:
            return DELAY_MIN_S + mean * rng.lognormvariate(-0.5, 1.0)
        if self.delay_shape is DelayShape.BURSTS and now % BURST_PERIOD_S < BURST_S:
            mean *= BURST_FACTOR
        return DELAY_MIN_S - math.log(1.0 - rng.random()) * mean
