"""An arm of an experiment as data, and how one is run: a manifest's draft, who takes part in which round, what is lost,
or how fast each worker is.

Invariant: an arm and a seed give the same losses on the same machine: parameters, batches and losses are drawn from the
seed alone.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from benchmarks.experiments.islands import MIXES, Islands, Models
from benchmarks.experiments.swarm import Diverged, HeldOut, Swarm, Synchronous, worker_peer
from benchmarks.experiments.texts import LIBRARY, TEXTS
from benchmarks.experiments.timetable import keep_time
from shoal.node.training.data import ByteWindows, Corpus
from shoal.node.training.gpt_config import parse_options, read_gpt_config
from shoal.node.training.messages import FloatVector
from shoal.node.training.tasks import describe
from shoal.protocol.contribution import NonFiniteContribution
from shoal.protocol.manifest import Draft, Manifest, make_manifest

HELD_OUT_WINDOWS = 512
POINTS = 8  # of each run's curve, beside its beginning


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """`workers` says how many take part in each round: the first so many. Of their contributions the share
    `lost_share` gets lost, drawn anew in every round. A `synchronous` arm is one model on the union of the workers'
    batches, and its rounds are only where it may be looked at. `texts` is a key of TEXTS.

    With `presence`, the share of the rounds in which each worker is there, drawn anew in every round, `workers` says
    only how many rounds there are. Who is away does not train.

    With `speeds`, in steps per simulated second, there are so many workers, and who is in which round with how many
    steps is what the round protocol makes of them in `until_s` seconds; `workers` says then only how many there are.

    With `mix`, a key of MIXES, nobody shares a base, and the loss is what `measure`, of MEASURES, makes of all
    models."""

    name: str
    draft: Draft
    workers: tuple[int, ...]
    synchronous: bool = False
    lost_share: float = 0.0
    texts: str = LIBRARY
    speeds: tuple[float, ...] = ()
    until_s: float = 0.0
    mix: str = ""
    measure: str = ""
    stale_exponent: float = 0.0  # Swarm's
    gap_penalty: str = ""  # Swarm's
    presence: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """The held-out loss of the base after so many tokens of all workers together, and so many steps of each (with
    speeds: of the fastest). `time_s` is simulated, and 0 where nobody keeps time."""

    steps: int
    tokens: int
    loss: float
    time_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One arm with one seed. Where it diverged, `points` ends before that, and `problem` says why."""

    arm: str
    seed: int
    contribution_bytes: int  # of one worker and round, the largest there is; 0 where none is exchanged
    points: tuple[Point, ...]
    problem: str
    wall_s: float
    rounds: int = 0  # certified ones; of a synchronous arm those after which it was looked at

    @property
    def told(self) -> str:
        """What came of it, in a few words."""
        return self.problem or f"{self.points[-1].loss:.4f} nats a byte"


def run_arm(arm: Arm, seed: int) -> Run:
    """Train it to its end or until it diverges; raises ManifestError or ConfigError where it cannot begin."""
    began_s = time.monotonic()
    manifest = make_arm_manifest(arm, seed)
    corpora = TEXTS[arm.texts](max(arm.workers))
    batches = open_batches(manifest, corpora)
    context = batches[0].held_out().shape[1] - 1
    windows = held_out_windows(corpora[0], context)
    points: list[Point] = []
    problem = ""
    rounds = 0
    if arm.mix:
        trained = _train_apart(arm, manifest, batches, Models(manifest, windows))
    else:
        train = _train_in_time if arm.speeds else _train
        trained = train(arm, manifest, batches, HeldOut(manifest, windows).loss)
    try:
        for rounds, point in trained:  # noqa: B007
            points.append(point)
    except (Diverged, NonFiniteContribution) as error:
        problem = str(error)
    if arm.mix:
        contributed = MIXES[arm.mix].count_bytes(manifest)
    else:
        contributed = 0 if arm.synchronous else sum(map(manifest.contribution_bytes, manifest.list_parts(1)))
    return Run(
        arm=arm.name,
        seed=seed,
        contribution_bytes=contributed,
        points=tuple(points),
        problem=problem,
        wall_s=round(time.monotonic() - began_s, 1),
        rounds=rounds,
    )


def make_arm_manifest(arm: Arm, seed: int) -> Manifest:
    """The manifest of a swarm that trains so; raises ManifestError where the draft does not fit."""
    founders = tuple(worker_peer(number) for number in range(max(arm.workers)))
    return make_manifest(replace(arm.draft, seed=seed), describe(arm.draft.task), founders[0], founders)


def open_batches(manifest: Manifest, corpora: Sequence[Corpus]) -> list[ByteWindows]:
    """The data of each worker."""
    config = read_gpt_config(parse_options(manifest.task.options))
    return [
        ByteWindows(
            corpus,
            context=config.context,
            batch_size=manifest.training.batch_size,
            seed=manifest.seed,
            peer=worker_peer(number),
        )
        for number, corpus in enumerate(corpora)
    ]


def held_out_windows(corpus: Corpus, context: int) -> NDArray[np.int64]:
    """HELD_OUT_WINDOWS windows spread evenly over the held-out text: more than a daemon looks at, since arms differ by
    less than 64 windows tell apart. int64 (HELD_OUT_WINDOWS, context + 1)."""
    starts = np.linspace(0, corpus.held_out.size - context - 1, HELD_OUT_WINDOWS).astype(np.int64)
    windows: NDArray[np.int64] = corpus.held_out[starts[:, None] + np.arange(context + 1)].astype(np.int64)
    return windows


def _train(
    arm: Arm, manifest: Manifest, batches: Sequence[ByteWindows], evaluate: Callable[[FloatVector], float]
) -> Iterator[tuple[int, Point]]:
    """POINTS points of the curve beside its beginning, each with the number of the round."""
    trained = (
        Synchronous(manifest, batches) if arm.synchronous else Swarm(manifest, batches, gap_penalty=arm.gap_penalty)
    )
    entropy = np.random.default_rng(manifest.seed)
    inner_steps, rounds = manifest.training.inner_steps, len(arm.workers)
    yield 0, Point(steps=0, tokens=0, loss=evaluate(trained.base))
    tokens = 0
    for number, count in enumerate(arm.workers, start=1):
        if isinstance(trained, Swarm):
            draws = entropy.random(count)
            if arm.presence:
                present = np.flatnonzero(draws < arm.presence).tolist()
                trained.run_round(present)
                count = len(present)
            else:
                trained.run_round(range(count), frozenset(np.flatnonzero(draws < arm.lost_share).tolist()))
        else:
            trained.run_round()
        tokens += count * inner_steps * batches[0].tokens_per_batch
        if number * POINTS // rounds > (number - 1) * POINTS // rounds:
            yield number, Point(steps=number * inner_steps, tokens=tokens, loss=evaluate(trained.base))


def _train_apart(
    arm: Arm, manifest: Manifest, batches: Sequence[ByteWindows], models: Models
) -> Iterator[tuple[int, Point]]:
    """As `_train`, of workers that share no base; all of them are in every round."""
    islands, rounds, tokens = Islands(manifest, batches, arm.mix), len(arm.workers), 0
    inner_steps = manifest.training.inner_steps
    yield 0, Point(steps=0, tokens=0, loss=models.loss(islands.bases, arm.measure))
    for number in range(1, rounds + 1):
        islands.run_round()
        tokens += len(batches) * inner_steps * batches[0].tokens_per_batch
        if number * POINTS // rounds > (number - 1) * POINTS // rounds:
            yield number, Point(steps=number * inner_steps, tokens=tokens, loss=models.loss(islands.bases, arm.measure))


def _train_in_time(
    arm: Arm, manifest: Manifest, batches: Sequence[ByteWindows], evaluate: Callable[[FloatVector], float]
) -> Iterator[tuple[int, Point]]:
    """A point after every round, so that it can be told when a loss was reached. What a worker trains while rounds go
    by without it is trained here when it is in one: its parameters do not change in between."""
    swarm = Swarm(manifest, batches, arm.stale_exponent)
    for worker in swarm.workers:
        worker.join(swarm.base)  # all of them are there from the beginning, even if not in the first round
    yield 0, Point(steps=0, tokens=0, loss=evaluate(swarm.base))
    tokens, steps = 0, [0] * len(arm.speeds)
    for number, timed in enumerate(keep_time(arm.draft, arm.speeds, arm.until_s), start=1):
        swarm.run_round(sorted(timed.steps), steps=timed.steps)
        for one, count in timed.steps.items():
            steps[one] += count
            tokens += count * batches[0].tokens_per_batch
        yield number, Point(steps=max(steps), tokens=tokens, loss=evaluate(swarm.base), time_s=timed.at_s)
