"""Faults as data: what goes wrong in a run, when, to whom and for how long.

A run is a function of its seed and its faults, so that a failure can be cut down to the few faults that cause it. Each
seed draws its own rates first, in the manner of swarm testing (Groce et al., "Swarm Testing", 2012): some faults are
off, some are up.
"""

import math
import random
from dataclasses import dataclass
from enum import StrEnum

FAULT_PHASE_S = 150.0
PAUSE_MAX_S = 60.0
DRIFT_MAX = 0.05
CLOCK_JUMP_MAX_S = 3600.0
CPU_SLOWER_MAX = 10.0
OWNER_ACTS_AFTER_S = 30.0
BRIDGE = -1  # the side of a peer that both sides of a partition can reach


class FaultKind(StrEnum):
    DELAY = "delay"  # of every message: `amount` is the mean in seconds, `detail` a DelayShape
    LOSS = "loss"  # of every message: `amount` is the probability
    DUPLICATE = "duplicate"
    UPLINK = "uplink"  # `amount` bytes/s of one peer
    PARTITION = "partition"  # `sides`, by peer number
    ONE_WAY = "one_way"  # nothing gets from peers[0] to peers[1]
    SLOW_CPU = "slow_cpu"  # `amount` times slower
    DRIFT = "drift"  # the monotonic clock runs at `amount` times the true rate
    CLOCK_JUMP = "clock_jump"  # the wall clock jumps by `amount` seconds
    CRASH = "crash"  # `detail` is a DiskFate, or `after` what the peer does just before; `amount`: who notices at once
    PAUSE = "pause"
    JOIN = "join"
    LEAVE = "leave"
    LIE = "lie"  # `detail` is a Lie
    QUORUM_LOST = (
        "quorum_lost"  # more than half of the voters die, in the order of `peers`; without a duration for good
    )
    REROOT = "reroot"  # the owner names those of `peers` who are there as voters


class DelayShape(StrEnum):
    EXPONENTIAL = "exponential"
    LOGNORMAL = "lognormal"  # a heavy tail
    BURSTS = "bursts"  # good, and for a while eight times worse


class DiskFate(StrEnum):
    """What a crash does to writes that were under way."""

    KEPT = "kept"  # kill -9: a prefix of them is there
    LOST = "lost"  # a power cut before the sync: any part of the unsynced ones is there
    TORN = "torn"  # as LOST, and one is cut short and fails its checksum
    BACKUP = "backup"  # the disk is replaced by a copy of `amount` seconds ago


class Moment(StrEnum):
    """What a peer does just before it crashes: time alone seldom strikes between two steps of a round."""

    PLANNED = "planned"
    PART_SENT = "part_sent"
    RESULT_SENT = "result_sent"
    REDUCING = "reducing"
    PERSISTING = "persisting"
    PROPOSED = "proposed"
    VOTED = "voted"
    CERTIFIED = "certified"  # having told one peer of the certificate
    COMMITTING = "committing"


class Lie(StrEnum):
    """What a member does that the protocol forbids."""

    WRONG_PART = "wrong_part"  # bytes that are not those of the digest
    GARBAGE_RESULT = "garbage_result"  # an owner's result that does not decode
    WRONG_RESULT = "wrong_result"  # an owner's result that is another aggregate
    TWO_PLANS = "two_plans"
    TWO_PROPOSALS = "two_proposals"
    TWO_VOTES = "two_votes"
    GREEDY_WEIGHT = "greedy_weight"  # tokens beyond belief
    PLANNED_WEIGHT = "planned_weight"  # a plan whose weights do not follow from its READYs
    NAN_SCALE = "nan_scale"
    STALE_BASE = "stale_base"
    REPLAY = "replay"
    WRONG_LENGTH = "wrong_length"
    NONSENSE = "nonsense"  # well-formed messages with random fields


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """`duration_s` is how long it lasts; for a crash, until the restart."""

    kind: FaultKind
    at_s: float
    duration_s: float = 0.0
    peers: tuple[int, ...] = ()
    sides: tuple[int, ...] = ()
    amount: float = 0.0
    detail: str = ""
    after: str = ""

    def __str__(self) -> str:
        peers = ",".join(map(str, self.peers)) or (f"sides {','.join(map(str, self.sides))}" if self.sides else "all")
        words = [
            f"{self.at_s:7.2f} s",
            self.kind.value,
            peers,
            self.detail,
            f"after {self.after}" if self.after else "",
        ]
        if self.amount:
            words.append(f"{self.amount:.4g}")
        if self.duration_s:
            words.append(f"for {self.duration_s:.2f} s")
        return " ".join(word for word in words if word)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """One seed's rates. Per second and peer where not said otherwise."""

    loss: float = 0.0  # per message
    duplicate: float = 0.0  # per message
    delay_mean_s: float = 0.02
    delay_shape: DelayShape = DelayShape.EXPONENTIAL
    uplink: float = 50e6
    slow_uplinks: float = 0.0  # share of the peers
    partition: float = 0.0  # per second
    heal_s: float = 5.0
    one_way: float = 0.0  # per second
    crash: float = 0.0
    crash_at_moment: float = 0.0  # per second
    restart_s: float = 5.0
    crash_everybody: float = 0.0  # chance in a run
    pause: float = 0.0
    join: float = 0.0  # per second
    join_storm: float = 0.0  # chance in a run
    leave: float = 0.0
    leave_storm: float = 0.0  # chance in a run
    slow_cpu: float = 0.0
    drift: float = 0.0  # share of the peers
    clock_jump: float = 0.0
    fates: tuple[DiskFate, ...] = (DiskFate.KEPT,)
    lies: tuple[Lie, ...] = ()


CALM = Rates()


def draw_rates(rng: random.Random, may_lie: bool = False) -> Rates:
    """A swarm-style draw: every seed turns some faults off and some up."""

    def maybe(low: float, high: float, chance: float = 0.5) -> float:
        return math.exp(rng.uniform(math.log(low), math.log(high))) if rng.random() < chance else 0.0

    return Rates(
        loss=maybe(0.001, 0.3),
        duplicate=maybe(0.001, 0.05),
        delay_mean_s=rng.choice((0.005, 0.02, 0.02, 0.1, 0.4, 0.8)),
        delay_shape=rng.choice(tuple(DelayShape)),
        uplink=rng.choice((50e6, 50e6, 5e6, 1.25e6)),
        slow_uplinks=maybe(0.1, 0.5, 0.3),
        partition=maybe(0.003, 0.03),
        heal_s=rng.uniform(3.0, 30.0),
        one_way=maybe(0.002, 0.02, 0.4),
        crash=maybe(0.001, 0.015),
        crash_at_moment=maybe(0.01, 0.15, 0.6),
        restart_s=rng.uniform(1.0, 30.0),
        crash_everybody=rng.choice((0.0, 0.0, 0.3)),
        pause=maybe(0.0005, 0.006, 0.4),
        join=maybe(0.003, 0.03, 0.4),
        join_storm=rng.choice((0.0, 0.0, 0.5)),
        leave=maybe(0.0005, 0.004, 0.35),
        leave_storm=rng.choice((0.0, 0.0, 0.0, 0.4)),
        slow_cpu=maybe(0.001, 0.01, 0.3),
        drift=rng.choice((0.0, 0.0, 0.5, 1.0)),
        clock_jump=maybe(0.001, 0.01, 0.3),
        fates=rng.choice(((DiskFate.KEPT,), (DiskFate.KEPT, DiskFate.LOST, DiskFate.TORN))),
        lies=tuple(lie for lie in Lie if rng.random() < 0.4) if may_lie else (),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Population:
    """Who can be struck: peers 0 .. first-1 are there from the start, the others may join; `liars` may lie, or be
    restored from a backup. `reroot_after_s`: how long a quorum must be gone, None where it always comes back."""

    first: int
    everybody: int
    liars: tuple[int, ...] = ()
    reroot_after_s: float | None = None


def draw_faults(rng: random.Random, rates: Rates, people: Population) -> tuple[Fault, ...]:
    """The faults of one run, in the order of their times."""
    faults = [
        *_draw_links(rng, rates, people),
        *_draw_crashes(rng, rates, people),
        *_draw_comings_and_goings(rng, rates, people),
        *_draw_machines(rng, rates, people),
        *_draw_lies(rng, rates, people),
        *_draw_reroots(rng, people),
    ]
    return tuple(sorted(faults, key=lambda fault: fault.at_s))


def _times(rng: random.Random, rate: float) -> list[float]:
    """Poisson arrivals in the fault phase."""
    times, now = [], 0.0
    while rate > 0 and (now := now + rng.expovariate(rate)) < FAULT_PHASE_S:
        times.append(now)
    return times


def _draw_links(rng: random.Random, rates: Rates, people: Population) -> list[Fault]:
    def always(kind: FaultKind, amount: float, detail: str = "", peers: tuple[int, ...] = ()) -> Fault:
        return Fault(kind=kind, at_s=0.0, duration_s=FAULT_PHASE_S, amount=amount, detail=detail, peers=peers)

    faults = [
        always(FaultKind.DELAY, rates.delay_mean_s, rates.delay_shape.value),
        always(FaultKind.UPLINK, rates.uplink),
    ]
    if rates.loss:
        faults.append(always(FaultKind.LOSS, rates.loss))
    if rates.duplicate:
        faults.append(always(FaultKind.DUPLICATE, rates.duplicate))
    for peer in range(people.everybody):
        if rng.random() < rates.slow_uplinks:
            faults.append(always(FaultKind.UPLINK, rng.choice((3e5, 1.25e6)), peers=(peer,)))
    for at_s in _times(rng, rates.partition):
        groups = rng.choice((2, 2, 2, 3))
        sides = [rng.randrange(groups) for _ in range(people.everybody)]
        if rng.random() < 0.2:
            sides[rng.randrange(people.first)] = BRIDGE
        heal_s = rng.expovariate(1.0 / rates.heal_s)
        faults.append(Fault(kind=FaultKind.PARTITION, at_s=at_s, duration_s=heal_s, sides=tuple(sides)))
    for at_s in _times(rng, rates.one_way):
        pair = tuple(rng.sample(range(people.everybody), 2))
        heal_s = rng.expovariate(1.0 / rates.heal_s)
        faults.append(Fault(kind=FaultKind.ONE_WAY, at_s=at_s, duration_s=heal_s, peers=pair))
    return faults


def _draw_crashes(rng: random.Random, rates: Rates, people: Population) -> list[Fault]:
    def crash(at_s: float, peers: tuple[int, ...], after: str = "") -> Fault:
        return Fault(
            kind=FaultKind.CRASH,
            at_s=at_s,
            duration_s=rng.expovariate(1.0 / rates.restart_s),
            peers=peers,
            detail=rng.choice(rates.fates).value,
            amount=rng.choice((0.0, 0.7, 1.0)),
            after=after,
        )

    faults = []
    for at_s in _times(rng, rates.crash * people.first):
        faults.append(crash(at_s, (rng.randrange(people.everybody),)))
    for at_s in _times(rng, rates.crash_at_moment):
        faults.append(crash(at_s, (), rng.choice(tuple(Moment)).value))
    if rng.random() < rates.crash_everybody:
        faults.append(crash(rng.uniform(0.0, FAULT_PHASE_S), tuple(range(people.everybody))))
    for peer in people.liars:
        if rng.random() < 0.5:
            at_s = rng.uniform(20.0, FAULT_PHASE_S)
            age_s = rng.uniform(1.0, at_s)
            faults.append(
                Fault(
                    kind=FaultKind.CRASH,
                    at_s=at_s,
                    duration_s=rng.expovariate(1.0 / rates.restart_s),
                    peers=(peer,),
                    detail=DiskFate.BACKUP.value,
                    amount=age_s,
                )
            )
    return faults


def _draw_comings_and_goings(rng: random.Random, rates: Rates, people: Population) -> list[Fault]:
    newcomers = list(range(people.first, people.everybody))
    faults = []
    storm_s = rng.uniform(0.0, FAULT_PHASE_S)
    if newcomers and rng.random() < rates.join_storm:
        faults.append(Fault(kind=FaultKind.JOIN, at_s=storm_s, peers=tuple(newcomers)))
    for at_s in _times(rng, rates.join):
        if newcomers:
            faults.append(Fault(kind=FaultKind.JOIN, at_s=at_s, peers=(newcomers.pop(0),)))
    for at_s in _times(rng, rates.leave * people.first):
        faults.append(Fault(kind=FaultKind.LEAVE, at_s=at_s, peers=(rng.randrange(people.everybody),)))
    if rng.random() < rates.leave_storm:
        leavers = rng.sample(range(people.everybody), people.everybody // 2)
        faults.append(Fault(kind=FaultKind.LEAVE, at_s=rng.uniform(0.0, FAULT_PHASE_S), peers=tuple(leavers)))
    return faults


def _draw_machines(rng: random.Random, rates: Rates, people: Population) -> list[Fault]:
    faults = []
    for at_s in _times(rng, rates.pause * people.first):
        peer = rng.randrange(people.everybody)
        faults.append(Fault(kind=FaultKind.PAUSE, at_s=at_s, duration_s=rng.uniform(1.0, PAUSE_MAX_S), peers=(peer,)))
    for at_s in _times(rng, rates.slow_cpu * people.first):
        peer, slower = rng.randrange(people.everybody), rng.uniform(2.0, CPU_SLOWER_MAX)
        lasts_s = rng.uniform(10.0, 100.0)
        faults.append(Fault(kind=FaultKind.SLOW_CPU, at_s=at_s, duration_s=lasts_s, peers=(peer,), amount=slower))
    for at_s in _times(rng, rates.clock_jump * people.first):
        jump_s = rng.uniform(-CLOCK_JUMP_MAX_S, CLOCK_JUMP_MAX_S)
        peer = rng.randrange(people.everybody)
        if peer not in people.liars:  # a backup and a clock set back leave a peer that nobody takes for new
            faults.append(Fault(kind=FaultKind.CLOCK_JUMP, at_s=at_s, peers=(peer,), amount=jump_s))
    for peer in range(people.everybody):
        if rng.random() < rates.drift:
            rate = 1.0 + rng.uniform(-DRIFT_MAX, DRIFT_MAX)
            faults.append(Fault(kind=FaultKind.DRIFT, at_s=0.0, peers=(peer,), amount=rate))
    return faults


def _draw_lies(rng: random.Random, rates: Rates, people: Population) -> list[Fault]:
    faults = []
    for peer in people.liars:
        for lie in rates.lies:
            if rng.random() < 0.8:
                at_s = rng.uniform(0.0, FAULT_PHASE_S / 2)
                lasts_s = rng.uniform(10.0, FAULT_PHASE_S)
                faults.append(Fault(kind=FaultKind.LIE, at_s=at_s, duration_s=lasts_s, peers=(peer,), detail=lie.value))
    return faults


def _draw_reroots(rng: random.Random, people: Population) -> list[Fault]:
    """What lets logs part: a quorum that is gone for longer than the timer, or for good, and the owner's word."""
    if people.reroot_after_s is None:
        return []
    wait_s = people.reroot_after_s or OWNER_ACTS_AFTER_S
    faults = []
    at_s = rng.uniform(5.0, 60.0)
    if rng.random() < 0.6:
        groups = rng.choice((2, 2, 3))
        sides = tuple(rng.randrange(groups) for _ in range(people.everybody))
        lasts_s = wait_s * rng.uniform(0.7, 2.5)
        faults.append(Fault(kind=FaultKind.PARTITION, at_s=at_s, duration_s=lasts_s, sides=sides))
    if rng.random() < 0.5:
        order = tuple(rng.sample(range(people.everybody), people.everybody))
        lasts_s = rng.choice((0.0, wait_s * rng.uniform(0.7, 2.5)))
        lost_s = rng.uniform(5.0, FAULT_PHASE_S / 2)
        faults.append(Fault(kind=FaultKind.QUORUM_LOST, at_s=lost_s, duration_s=lasts_s, peers=order))
    if rng.random() < (0.3 if people.reroot_after_s else 0.8):
        named = tuple(rng.sample(range(people.everybody), rng.randint(1, people.everybody)))
        faults.append(Fault(kind=FaultKind.REROOT, at_s=at_s + wait_s * rng.uniform(0.2, 1.5), peers=named))
    return faults
