"""Workers without a common base: each has parameters of its own, which pairs of them mix between rounds, or nobody.

Training is node/training's, as in swarm.py. How pairs mix is an entry of MIXES, what counts as the loss of so many
models one of MEASURES. The daemon's pairs without a quorum are one of them (`mix_contributed`, by protocol.pairing);
the others are here so that swarms with rounds can be compared with them.

Invariants: the same manifest and batches give the same bits; a round changes a worker by its own batches and by what
its partner of that round has.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from benchmarks.experiments.swarm import Diverged, build_trained, step_trained
from shoal.node.training.data import ByteWindows
from shoal.node.training.local_parameters import load_parameters
from shoal.node.training.messages import FloatVector
from shoal.node.training.tasks import make_task
from shoal.protocol.codecs import CODECS
from shoal.protocol.layout import initialise
from shoal.protocol.manifest import Manifest
from shoal.protocol.pairing import find_move

NOLOCO, AVERAGED, CONTRIBUTED, APART = "noloco", "averaged", "contributed", "apart"
EACH, MEAN, ENSEMBLE, POSTERIOR = "each", "mean", "ensemble", "posterior"
# NoLoCo's published values; gamma is beta in its code.
NOLOCO_ALPHA, NOLOCO_BETA, NOLOCO_GAMMA = 0.5, 0.7, 0.7
PIECE = 64  # windows evaluated at a time


class Island:
    """One worker. `base` is what it trains from in this round and `local` what it has come to, both float32[D]."""

    def __init__(self, manifest: Manifest, batches: ByteWindows) -> None:
        self._task = make_task(manifest.task)
        self._model, self.strategy = build_trained(self._task, manifest)
        self._batches = batches
        self._batches_done = 0
        self.base: FloatVector = initialise(manifest.layout, manifest.seed)
        self.local = self.base.copy()
        self.anchor = self.base.copy()  # what contributions are made from: the base that everybody began with
        self.codec = CODECS[manifest.rounds.codec]
        self.momentum = np.zeros_like(self.base)
        self.strategy.adopt(self.base)

    def train(self, steps: int, number: int) -> None:
        """Raises Diverged."""
        for _ in range(steps):
            batch = torch.from_numpy(self._batches.batch(self._batches_done))
            step_trained(self._task, self._model, self.strategy, batch, number)
            self._batches_done += 1
        if not self.strategy.export(self.local):
            raise Diverged("the local parameters are not finite")


def mix_noloco(group: Sequence[Island]) -> None:
    """NoLoCo (arXiv 2506.10911): an outer momentum of each worker's own, on the mean of the group's updates, and a pull
    towards the mean of its bases."""
    moved = np.mean([one.local - one.base for one in group], axis=0, dtype=np.float32)
    middle = np.mean([one.base for one in group], axis=0, dtype=np.float32)
    for one in group:
        one.momentum[:] = NOLOCO_ALPHA * one.momentum + NOLOCO_BETA * moved + NOLOCO_GAMMA * (middle - one.base)
    for one in group:
        one.base += one.momentum
        one.strategy.adopt(one.base)


def mix_averaged(group: Sequence[Island]) -> None:
    """Both take the mean of their parameters."""
    middle = np.mean([one.local for one in group], axis=0, dtype=np.float32)
    for one in group:
        one.base[:] = middle
        one.strategy.adopt(one.base)


def mix_contributed(group: Sequence[Island]) -> None:
    """Both move to the mean, as far as the codec lets the contributions through."""
    if len(group) == 1:
        mix_nothing(group)
        return
    encoded = [[one.codec.encode(one.anchor - one.local)] for one in group]
    for one, own, other in zip(group, encoded, reversed(encoded), strict=True):
        find_move(one.codec, own, other, 0.5, [one.base])
        one.base += one.local
        one.strategy.adopt(one.base)


def mix_nothing(group: Sequence[Island]) -> None:
    """Each goes on from where it is."""
    for one in group:
        one.base[:] = one.local


def count_contribution_bytes(manifest: Manifest) -> int:
    """Of all parts, encoded."""
    return sum(map(manifest.contribution_bytes, range(manifest.parts)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """`count_bytes` is how many a worker sends in a round."""

    mix: Callable[[Sequence[Island]], None]
    count_bytes: Callable[[Manifest], int]


MIXES: Mapping[str, Mix] = MappingProxyType(
    {
        NOLOCO: Mix(mix=mix_noloco, count_bytes=lambda manifest: 8 * manifest.layout.elements),
        AVERAGED: Mix(mix=mix_averaged, count_bytes=lambda manifest: 4 * manifest.layout.elements),
        CONTRIBUTED: Mix(mix=mix_contributed, count_bytes=count_contribution_bytes),
        APART: Mix(mix=mix_nothing, count_bytes=lambda manifest: 0),
    }
)


class Islands:
    """All workers. In each round pairs are drawn anew; with an odd number of workers one has no partner."""

    def __init__(self, manifest: Manifest, batches: Sequence[ByteWindows], mix: str) -> None:
        self._steps = manifest.training.inner_steps
        self._mix = MIXES[mix].mix
        self._entropy = np.random.default_rng(manifest.seed)
        self._rounds = 0
        self.workers = [Island(manifest, one) for one in batches]

    def run_round(self) -> None:
        """Everybody trains, and each pair mixes. Raises Diverged."""
        self._rounds += 1
        for one in self.workers:
            one.train(self._steps, self._rounds)
        order = self._entropy.permutation(len(self.workers)).tolist()
        for first in range(0, len(order), 2):
            self._mix([self.workers[one] for one in order[first : first + 2]])

    @property
    def bases(self) -> list[FloatVector]:
        return [one.base for one in self.workers]


class Models:
    """The loss of several models on `windows`, int64 (N, context + 1), in nats a byte."""

    def __init__(self, manifest: Manifest, windows: NDArray[np.int64]) -> None:
        self._task = make_task(manifest.task)
        self._model = self._task.build_model().requires_grad_(False)
        self._windows = torch.from_numpy(windows)

    def loss(self, bases: Sequence[FloatVector], measure: str) -> float:
        """Of MEASURES; raises Diverged where it is not finite."""
        loss = MEASURES[measure](self, bases)
        if not np.isfinite(loss):
            raise Diverged("the held-out loss is not finite")
        return loss

    @torch.no_grad()
    def log_likelihoods(self, bases: Sequence[FloatVector]) -> Iterator[Tensor]:
        """Of what came, by model, window and place: float32 (models, at most PIECE, context)."""
        for piece in torch.split(self._windows, PIECE):
            found = []
            for base in bases:
                load_parameters(self._model, base)
                logits = self._model(piece[:, :-1])
                found.append(-F.cross_entropy(logits.flatten(0, 1), piece[:, 1:].flatten(), reduction="none"))
            yield torch.stack(found).view(len(bases), len(piece), -1)


def measure_each(models: Models, bases: Sequence[FloatVector]) -> float:
    """The mean of the models' losses."""
    return _mean(piece.mean(0) for piece in models.log_likelihoods(bases))


def measure_mean(models: Models, bases: Sequence[FloatVector]) -> float:
    """The loss of one model that has the mean of their parameters."""
    return measure_each(models, [np.mean(bases, axis=0, dtype=np.float32)])


def measure_ensemble(models: Models, bases: Sequence[FloatVector]) -> float:
    """The loss of the mean of their probabilities."""
    return _mean(piece.logsumexp(0) - np.log(len(bases)) for piece in models.log_likelihoods(bases))


def measure_posterior(models: Models, bases: Sequence[FloatVector]) -> float:
    """The same, but each weighs as much as what came before in the window speaks for it (a posterior with equal priors,
    as in Branch-Train-Merge, arXiv 2208.03306)."""
    return _mean(map(weigh_by_what_came, models.log_likelihoods(bases)))


def weigh_by_what_came(likelihoods: Tensor) -> Tensor:
    """The log-likelihood of the mixture at each place: (models, windows, context) to (windows, context)."""
    before = likelihoods.cumsum(-1) - likelihoods
    return (before.log_softmax(0) + likelihoods).logsumexp(0)


MEASURES: Mapping[str, Callable[[Models, Sequence[FloatVector]], float]] = MappingProxyType(
    {EACH: measure_each, MEAN: measure_mean, ENSEMBLE: measure_ensemble, POSTERIOR: measure_posterior}
)


def _mean(pieces: Iterator[Tensor]) -> float:
    found = torch.cat([piece.flatten() for piece in pieces]).double()
    return -float(found.mean())
