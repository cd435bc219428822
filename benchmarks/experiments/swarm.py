"""A swarm without a network: workers that take turns in one process, with the production numerics between them.

Training is node/training's (tasks, strategies, batches); the pseudo-gradient, its codec and its residual are the
Contributor's, the update is the Reduction's, the base is the Replica's. What is left out is who agrees on a round and
how bytes travel: every round is certified with exactly the contributions that the caller did not lose. Rounds are made
of steps: of the manifest's, or, where somebody else kept the time (timetable.py), of as many as the caller says.

Invariants: the base changes by certified updates alone; a worker that a round leaves out keeps its parameters and its
residual, and its next contribution is anchored at the base of then; the same manifest and batches give the same bits.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from blake3 import blake3
from numpy.typing import NDArray
from torch import nn

from shoal.node.training.data import ByteWindows
from shoal.node.training.local_parameters import load_parameters
from shoal.node.training.messages import FloatVector
from shoal.node.training.strategy import STRATEGIES, Strategy
from shoal.node.training.tasks import Task, make_task
from shoal.protocol.aggregators import WeightedPart, clip_factors, planned_weights
from shoal.protocol.attendance import (
    FRESHNESS,
    NO_ATTENDANCE,
    PARTICIPATION,
    Attendance,
    Counted,
    expect_attendance,
    weight_factor,
)
from shoal.protocol.codecs import CODECS
from shoal.protocol.contribution import Contributor, Frozen
from shoal.protocol.errors import ShoalError
from shoal.protocol.identity import PeerId
from shoal.protocol.layout import initialise
from shoal.protocol.manifest import Manifest
from shoal.protocol.messages import Member, PartResult, Result
from shoal.protocol.quorum import list_counted, make_bitmap
from shoal.protocol.replica import Replica, find_gain, make_reduction

# What a round's update is divided by (CO2, arXiv 2401.16265): how far the base moved in the last round to how far in
# the one before, or 1 where that is less.
BY_RATIO, BY_GROWTH = "ratio", "growth"


class Diverged(ShoalError):
    """A loss, a gradient or the base is not finite; the text says which."""


class Worker:
    """One peer's model, inner optimizer, residual, and count of what its parameters hold beyond the base."""

    def __init__(self, manifest: Manifest, batches: ByteWindows) -> None:
        self._manifest = manifest
        self._task = make_task(manifest.task)
        self._model, self._strategy = build_trained(self._task, manifest)
        self._batches = batches
        self._batches_done = 0
        self._missed = 0
        self._joined = False
        self.counted: Counted | None = None  # the newest round that counted it
        self.contributor = Contributor(manifest)
        self.local: FloatVector = np.empty(manifest.layout.elements, np.float32)  # as it was frozen last
        self.steps = 0  # those in what is handed over next
        self._ahead = 0  # steps since the last hand-over, beside its exchange
        self._begun = 0  # of them those that count towards the next one

    @property
    def tokens(self) -> int:
        """Those of `steps`."""
        return self.steps * self._batches.tokens_per_batch

    def claim_tokens(self, stale_exponent: float) -> int:
        """The tokens by which its contribution weighs, so that its claim, their square over the steps, is less by the
        factor (1 + s)^-`stale_exponent`, s being the rounds that it has missed since it was in one."""
        factor: float = (1 + self._missed) ** (-stale_exponent / 2)
        return round(self.tokens * factor)

    def attend(self, number: int) -> Attendance:
        """What it declares in this round besides its work, by the manifest's rule (node/compute.py)."""
        rule = self._manifest.rounds.weights
        if rule == PARTICIPATION:
            return expect_attendance(self.counted, number)
        return Attendance(base_age=self._missed) if rule == FRESHNESS else NO_ATTENDANCE

    def join(self, base: FloatVector) -> None:
        """Begin at this base, unless it has begun."""
        if not self._joined:
            self._strategy.adopt(base)
            self._joined = True

    def train(self, base: FloatVector, number: int, steps: int | None = None) -> None:
        """The inner steps of this round, those of the manifest or `steps`, from `base` where it is the first one here.
        What was trained beside the last exchange counts among them. Raises Diverged."""
        self.join(base)
        wanted = self._manifest.training.inner_steps if steps is None else steps
        for _ in range(wanted - self._begun):
            self._step(number)
            self.steps += 1
        self._begun = 0
        if not self._strategy.export(self.local):
            raise Diverged("the local parameters are not finite")

    def train_on(self, base: FloatVector, number: int) -> None:
        """What the strategy trains after it has handed over, until the new base comes; raises Diverged."""
        if self._manifest.training.overlap_steps:
            self._strategy.hand_over(base, self.local)
        for _ in range(self._manifest.training.overlap_steps):
            self._step(number)
            self._ahead += 1
        self._begun = self._ahead

    def _step(self, number: int) -> None:
        batch = torch.from_numpy(self._batches.batch(self._batches_done))
        step_trained(self._task, self._model, self._strategy, batch, number)
        self._batches_done += 1

    def merge(self, base: FloatVector, included: tuple[int, ...], gain: float = 0.0) -> None:
        """A round is certified with this worker's contribution in these parts of the vector: none, where it was left
        out. `gain` is Merge's."""
        rounds = self._manifest.rounds
        self._missed = 0 if included else self._missed + 1
        if self._missed > self._manifest.training.missed_rounds_max:
            self.contributor.clear()
            self._strategy.adopt(base)
            self._missed = self.steps = self._begun = 0
        elif included:
            bitmap = make_bitmap(frozenset(included), self._manifest.parts)
            self._strategy.merge(base, bitmap, rounds.part_elements, gain)
            self.steps = self._ahead
        else:
            self._strategy.take_back()
            self.steps += self._ahead
        self._ahead = 0

    def take_share(self, place: int, places: int) -> None:
        """Of the data, until the next round."""
        self._batches.take_share(place, places)

    def parameters(self) -> FloatVector:
        """A copy of the local parameters as they are now, float32[D]."""
        flat = np.empty_like(self.local)
        self._strategy.export(flat)
        return flat


class Swarm:
    """All workers and the one base that each of them would hold."""

    def __init__(
        self, manifest: Manifest, batches: Sequence[ByteWindows], stale_exponent: float = 0.0, gap_penalty: str = ""
    ) -> None:
        """One worker for each of `batches`. A strategy that trains beside an exchange has the new base after just as
        many steps as it may train meanwhile. `stale_exponent` tries exponents that the manifest's
        `weights` do not have, `gap_penalty`, BY_RATIO or BY_GROWTH, what its outer step does not have."""
        self._manifest = manifest
        self._stale_exponent = stale_exponent
        self._gap_penalty = gap_penalty
        self._gaps = (1.0, 1.0)  # how far the base moved in the round before the last one, and in that
        self._reduction = make_reduction(manifest)
        elements = manifest.layout.elements
        self._replica = Replica(manifest, np.empty(elements, np.float32), np.empty(elements, np.float32))
        self._root = self._replica.reset()
        self.workers = [Worker(manifest, one) for one in batches]

    @property
    def base(self) -> FloatVector:
        """The certified parameters, float32[D]; they change with every round."""
        return self._replica.params

    def run_round(
        self, present: Sequence[int], lost: frozenset[int] = frozenset(), steps: Mapping[int, int] | None = None
    ) -> None:
        """Every present worker trains, as many steps as `steps` or the manifest says; the contributions of those in
        `lost` do not arrive. Where nothing arrives, no round is certified and everybody trains on. Who is away misses
        the round like one whose contribution is lost. Raises Diverged, or NonFiniteContribution."""
        number = self._replica.round + 1
        for one in present:
            self.workers[one].train(self.base, number, None if steps is None else steps[one])
        arrived = frozenset(index for index, one in enumerate(present) if one not in lost)
        if not arrived:
            return
        frozen = [self.workers[one].contributor.freeze(number, self.base, self.workers[one].local) for one in present]
        result, blobs = self._reduce(number, present, frozen, arrived)
        for one in present:
            self.workers[one].train_on(self.base, number)
        before = self.base.copy()
        self._root = self._replica.apply(result, blobs)
        if not np.isfinite(self.base).all():
            raise Diverged(f"the base of round {number} is not finite")
        gap = float(np.linalg.norm(self.base - before))
        self._gaps = self._gaps[1] if number > 1 else gap, gap
        counted = list_counted(result)
        places, parts = {one: index for index, one in enumerate(present)}, self._manifest.list_parts(number)
        for one, worker in enumerate(self.workers):
            index = places.get(one)
            included = () if index is None else worker.contributor.settle(frozen[index], result, index)
            gain = find_gain(self._manifest, result, worker_peer(one))
            worker.merge(self.base, tuple(parts[place] for place in included), gain)
            worker.counted = counted.get(worker_peer(one), worker.counted)
        if self._manifest.training.divide_data:
            for place, one in enumerate(sorted(arrived)):
                self.workers[present[one]].take_share(place, len(arrived))

    def _reduce(
        self, number: int, present: Sequence[int], frozen: Sequence[Frozen], arrived: frozenset[int]
    ) -> tuple[Result, dict[bytes, memoryview]]:
        """What a round would certify, and its parts by digest."""
        workers = [self.workers[one] for one in present]
        claimed = (one.claim_tokens(self._stale_exponent) for one in workers)
        attendances = [one.attend(number) for one in workers]
        rule = self._manifest.rounds.weights
        work = (one.steps for one in workers)
        weights = planned_weights(claimed, work, (weight_factor(one, rule) for one in attendances))
        factors = clip_factors(one.norm for one in frozen)
        updates = []
        for place, part in enumerate(self._manifest.list_parts(number)):
            first, end = self._manifest.part_range(part)
            parts = [
                WeightedPart(
                    encoded=frozen[index].encoded[place],
                    weight=float(weights[index]),
                    clip_factor=float(factors[index]),
                )
                for index in sorted(arrived)
            ]
            updates.append(self._penalise(self._reduction.reduce_part(parts, end - first), end - first))
        blobs = {blake3(update).digest(): update for update in updates}
        bitmap = make_bitmap(arrived, len(present))
        members = tuple(
            Member(
                peer=worker_peer(one),
                contribution_root=frozen[index].root,
                tokens=self.workers[one].tokens,
                steps=self.workers[one].steps,
                weight=float(weights[index]),
                attendance=attendances[index],
            )
            for index, one in enumerate(present)
        )
        result = Result(
            round=number,
            previous=bytes(32),
            base_root=self._root,
            codec=self._manifest.rounds.codec_out,
            members=members,
            parts=tuple(PartResult(digest=blake3(one).digest(), contributors=bitmap) for one in updates),
            voters=self._manifest.founders,
        )
        return result, blobs

    def _penalise(self, update: memoryview, elements: int) -> memoryview:
        """An encoded update, less by CO2's penalty of the staleness gap; without one as it is."""
        if not self._gap_penalty:
            return update
        ratio = self._gaps[1] / self._gaps[0]
        codec, values = CODECS[self._manifest.rounds.codec_out], np.empty(elements, np.float32)
        codec.decode_untrusted(update, elements, values)
        return codec.encode(values / np.float32(ratio if self._gap_penalty == BY_RATIO else max(1.0, ratio)))


class Synchronous:
    """Data-parallel training as the baseline: one model and one optimizer, whose batch at every step is the union of
    the workers' batches. These are equally large, so that its gradient is the mean of the workers' gradients."""

    def __init__(self, manifest: Manifest, batches: Sequence[ByteWindows]) -> None:
        self._task = make_task(manifest.task)
        self._model, self._strategy = build_trained(self._task, manifest)
        self._batches = batches
        self._steps = self._rounds = 0
        self._inner_steps = manifest.training.inner_steps
        self.base: FloatVector = initialise(manifest.layout, manifest.seed)
        self._strategy.adopt(self.base)

    def run_round(self) -> None:
        """As many steps as a round of the same manifest has; raises Diverged."""
        self._rounds += 1
        for _ in range(self._inner_steps):
            union = np.concatenate([one.batch(self._steps) for one in self._batches])
            step_trained(self._task, self._model, self._strategy, torch.from_numpy(union), self._rounds)
            self._steps += 1
        if not self._strategy.export(self.base):
            raise Diverged("the parameters are not finite")


class HeldOut:
    """The mean loss of given parameters on `windows`, int64 (N, context + 1) of held-out bytes."""

    _PIECE = 64

    def __init__(self, manifest: Manifest, windows: NDArray[np.int64]) -> None:
        self._task = make_task(manifest.task)
        self._model = self._task.build_model().requires_grad_(False)
        self._windows = torch.from_numpy(windows)

    @torch.no_grad()
    def loss(self, parameters: FloatVector) -> float:
        """In nats a byte; raises Diverged where it is not finite."""
        load_parameters(self._model, parameters)
        total = 0.0
        for first in range(0, len(self._windows), self._PIECE):
            piece = self._windows[first : first + self._PIECE]
            total += self._task.loss(self._model, piece).item() * len(piece)
        loss = total / len(self._windows)
        if not np.isfinite(loss):
            raise Diverged("the held-out loss is not finite")
        return loss


def worker_peer(number: int) -> PeerId:
    """The name under which worker `number` draws its batches and stands in results."""
    return PeerId(number.to_bytes(32, "big"))


def build_trained(task: Task, manifest: Manifest) -> tuple[nn.Module, Strategy]:
    """A model and the strategy that trains it."""
    model = task.build_model()
    return model, STRATEGIES[manifest.training.strategy](model, manifest.layout, manifest.training)


def step_trained(task: Task, model: nn.Module, strategy: Strategy, batch: torch.Tensor, number: int) -> None:
    """One inner step in round `number`; raises Diverged."""
    loss = task.loss(model, batch)
    strategy.gather(loss)
    if not strategy.step(loss.detach(), number):
        raise Diverged("a loss or its gradient is not finite")
