"""The packet model of the simulator: delays, loss, duplication, partitions, one-way loss, connection resets.

The fault vocabulary follows TigerBeetle's packet simulator: rates are drawn per seed, and every decision comes from one
random generator, so the same seed gives the same schedule.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

Deliver = Callable[[], None]
Schedule = Callable[[float, Deliver], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """One seed's faults. Probabilities per message or per second; delays in seconds; bandwidth in bytes/s."""

    loss: float = 0.0
    duplicate: float = 0.0
    delay_mean_s: float = 0.02
    bandwidth: float = 50e6
    partition_per_s: float = 0.0
    heal_per_s: float = 0.2
    one_way_per_s: float = 0.0
    crash_per_s: float = 0.0
    restart_s: float = 5.0
    pause_per_s: float = 0.0
    join_per_s: float = 0.0
    leave_per_s: float = 0.0


CALM = Rates()


def draw_rates(rng: random.Random) -> Rates:
    """A swarm-style draw: every seed turns some faults off and some up."""

    def maybe(low: float, high: float, chance: float = 0.6) -> float:
        return rng.uniform(low, high) if rng.random() < chance else 0.0

    return Rates(
        loss=maybe(0.001, 0.08),
        duplicate=maybe(0.001, 0.05),
        delay_mean_s=rng.choice((0.005, 0.02, 0.1, 0.4)),
        bandwidth=rng.choice((1e5, 1e6, 50e6)),
        partition_per_s=maybe(0.002, 0.02),
        heal_per_s=rng.uniform(0.03, 0.3),
        one_way_per_s=maybe(0.001, 0.01, 0.3),
        crash_per_s=maybe(0.002, 0.02),
        restart_s=rng.uniform(1.0, 30.0),
        pause_per_s=maybe(0.001, 0.01, 0.4),
        join_per_s=maybe(0.001, 0.01, 0.3),
        leave_per_s=maybe(0.0005, 0.005, 0.3),
    )


class Network:
    """Delivers by calling back through the world's schedule, or does not."""

    def __init__(self, rng: random.Random, schedule: Schedule) -> None:
        self.rates = CALM
        self._rng = rng
        self._schedule = schedule
        self._group: dict[int, int] = {}  # peer number -> side of the partition
        self._cut: set[tuple[int, int]] = set()  # one-way losses
        self._line_free_s: dict[tuple[int, int], float] = {}

    def connected(self, source: int, target: int) -> bool:
        same = self._group.get(source, 0) == self._group.get(target, 0)
        return same and (source, target) not in self._cut

    def send(self, source: int, target: int, size: int, now: float, deliver: Deliver) -> None:
        """One control message: may be lost, doubled, delayed and so reordered."""
        copies = 1 + (self._rng.random() < self.rates.duplicate)
        for _ in range(copies):
            if not self.connected(source, target) or self._rng.random() < self.rates.loss:
                continue
            self._schedule(self._delay_s() + size / self.rates.bandwidth, deliver)

    def stream(self, source: int, target: int, size: int, now: float, deliver: Deliver) -> None:
        """Bulk bytes over a link of their own: they queue behind each other, and a lost link loses them."""
        start = max(now, self._line_free_s.get((source, target), 0.0))
        end = start + size / self.rates.bandwidth
        self._line_free_s[source, target] = end
        if self.connected(source, target) and self._rng.random() >= self.rates.loss:
            self._schedule(end - now + self._delay_s(), deliver)

    def step(self, peers: list[int], seconds: float) -> list[str]:
        """Let partitions and one-way losses come and go; what happened, in words."""
        happened = []
        if self._rng.random() < self.rates.partition_per_s * seconds and len(peers) > 1:
            sides = self._rng.choice((2, 2, 2, 3))
            self._group = {peer: self._rng.randrange(sides) for peer in peers}
            happened.append(f"partition {sorted(self._group.items())}")
        elif self._group and self._rng.random() < self.rates.heal_per_s * seconds:
            self._group = {}
            happened.append("heal")
        if self._rng.random() < self.rates.one_way_per_s * seconds and len(peers) > 1:
            source, target = self._rng.sample(peers, 2)
            self._cut.add((source, target))
            happened.append(f"one-way loss {source}->{target}")
        elif self._cut and self._rng.random() < self.rates.heal_per_s * seconds:
            self._cut.clear()
            happened.append("one-way losses heal")
        return happened

    def calm(self) -> None:
        """All faults end."""
        self.rates = CALM
        self._group = {}
        self._cut.clear()

    def _delay_s(self) -> float:
        return self._rng.expovariate(1.0 / self.rates.delay_mean_s)
