"""What is left of the training when workers die and come back: the round protocol against synchronous training that
goes back to its last checkpoint.

Both sides see the same deaths, drawn for each worker from an exponential distribution whose mean is so many rounds; a
worker is back `DOWN_S` after it died, and all of a start is in that. The swarm is the daemon's protocol in the
simulator of tests/sim, which checks its invariants along the way: a worker that dies loses what no round has of it yet.

The synchronous side is a model. All workers take each step together; when one dies, everybody stands still until
everybody is back, and what was done since the last checkpoint is done again. A checkpoint costs nothing, nor does the
detection of a death, nor an exchange: all in favour of that side. A checkpoint period of 0 is one at every step: what
is left is the standstill, as where replicas heal from each other.

Invariant: an arm and a seed give the same figures; nothing is trained and this machine's time has no part in them.
"""

import random
import time
from dataclasses import dataclass

import numpy as np

from benchmarks.experiments.timetable import open_stage
from shoal.protocol.manifest import Draft
from shoal.protocol.quorum import has_member
from tests.sim.stage import Stage

WORKERS = 8
STEPS_PER_S = 0.1
ROUND_S = 600.0  # the manifest's default of training.round_time_s
# FT-HSDP's stall at a failure, the better one of its two published figures.
DOWN_S = 180.0
POINTS = 8

Deaths = tuple[tuple[float, int], ...]  # (when, who), in order


@dataclass(frozen=True, slots=True, kw_only=True)
class ChurnArm:
    """`checkpoint_s`: the period of the synchronous side; None is the swarm. `mtbf_rounds`: of each worker; None:
    nobody dies."""

    name: str
    draft: Draft
    rounds: int
    mtbf_rounds: float | None
    checkpoint_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ChurnPoint:
    time_s: float
    steps: float  # that count, of all workers together


@dataclass(frozen=True, slots=True, kw_only=True)
class ChurnRun:
    """`alive`: the share of the time that workers were up. `rounds`: certified, of the swarm."""

    arm: str
    seed: int
    deaths: int
    alive: float
    rounds: int
    points: tuple[ChurnPoint, ...]
    wall_s: float
    problem: str = ""

    @property
    def goodput(self) -> float:
        """The steps that count over those of workers that never die."""
        last = self.points[-1]
        return last.steps / (WORKERS * STEPS_PER_S * last.time_s)

    @property
    def told(self) -> str:
        return f"goodput {self.goodput:.3f}, {self.deaths} deaths"


def run_churn(arm: ChurnArm, seed: int) -> ChurnRun:
    began_s = time.monotonic()
    until_s = arm.rounds * ROUND_S
    deaths = draw_deaths(arm.mtbf_rounds, until_s, seed)
    if arm.checkpoint_s is None:
        rounds, points = _run_swarm(arm.draft, deaths, until_s)
    else:
        rounds, times = 0, np.linspace(until_s / POINTS, until_s, POINTS)
        points = tuple(ChurnPoint(time_s=at, steps=train_synchronously(deaths, arm.checkpoint_s, at)) for at in times)
    down_s = sum(min(DOWN_S, until_s - at) for at, _ in deaths)
    return ChurnRun(
        arm=arm.name,
        seed=seed,
        deaths=len(deaths),
        alive=1 - down_s / (WORKERS * until_s),
        rounds=rounds,
        points=points,
        wall_s=round(time.monotonic() - began_s, 1),
    )


def draw_deaths(mtbf_rounds: float | None, until_s: float, seed: int) -> Deaths:
    """Until then; nobody dies while it is down."""
    if mtbf_rounds is None:
        return ()
    deaths = []
    for worker in range(WORKERS):
        entropy = random.Random(f"{seed}/deaths of {worker}")
        at_s = entropy.expovariate(1 / (mtbf_rounds * ROUND_S))
        while at_s < until_s:
            deaths.append((at_s, worker))
            at_s += DOWN_S + entropy.expovariate(1 / (mtbf_rounds * ROUND_S))
    return tuple(sorted(deaths))


def train_synchronously(deaths: Deaths, checkpoint_s: float, until_s: float) -> float:
    """The steps of all workers together that count then."""
    trained_s = now_s = 0.0  # what is done and not lost, in seconds of everybody's training
    for at_s, _ in deaths:
        if at_s >= until_s:
            break
        if at_s > now_s:  # else everybody stands still already
            trained_s += at_s - now_s
            if checkpoint_s:
                trained_s = trained_s // checkpoint_s * checkpoint_s
        now_s = max(now_s, at_s + DOWN_S)
    trained_s += max(0.0, until_s - now_s)
    return trained_s * WORKERS * STEPS_PER_S


def _run_swarm(draft: Draft, deaths: Deaths, until_s: float) -> tuple[int, tuple[ChurnPoint, ...]]:
    """Certified rounds, and points of the curve."""
    stage = open_stage(draft, (STEPS_PER_S,) * WORKERS)
    for at_s, worker in deaths:
        stage.schedule(at_s, _die, stage, worker)
    points = []
    for end_s in np.linspace(until_s / POINTS, until_s, POINTS):
        stage.run_for(end_s - stage.now)
        rounds, steps = count_certified(stage)
        points.append(ChurnPoint(time_s=stage.now, steps=steps))
    return rounds, tuple(points)


def count_certified(stage: Stage) -> tuple[int, float]:
    """Certified rounds and the steps in them: a contribution counts by the share of its parts that went in."""
    certificates = {number: one for peer in stage.peers for number, one in peer.disk.certificates.items()}
    steps = 0.0
    for certificate in certificates.values():
        result = certificate.result
        for index, member in enumerate(result.members):
            included = sum(has_member(part.contributors, index) for part in result.parts)
            steps += member.steps * included / max(1, len(result.parts))
    return len(certificates), steps


def _die(stage: Stage, worker: int) -> None:
    peer = stage.everybody[worker]
    stage.kill(peer)
    stage.schedule(DOWN_S, stage.restart, stage.name(peer))
