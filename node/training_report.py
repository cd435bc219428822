"""What the trainer does, and what members have measured of the base: the status and the metrics of it."""

import math
from collections.abc import Callable, Iterable

from shoal.crdt.measurements import Measurement
from shoal.node.compute import Compute
from shoal.node.metrics import Metrics
from shoal.node.status import HeldOut, LossHistory, Measured, TrainerState, TrainingStatus, clean_text
from shoal.node.training.loss_units import has_perplexity
from shoal.node.training.messages import DETAIL_BYTES_MAX, find_perplexity
from shoal.protocol.errors import Failure
from shoal.protocol.identity import PeerId, format_peer_id


def describe_training(compute: Compute, losses: LossHistory, steps_planned: int) -> TrainingStatus:
    """This peer's trainer as of now; `losses` are its last ones of the rounds since the daemon's start."""
    points, held_out = losses.points, compute.held_out
    return TrainingStatus(
        state=compute.phase,
        device=compute.device,
        restarts=compute.restarts,
        steps_dropped=sum(compute.steps_dropped.values()),
        error=clean_text(compute.error, DETAIL_BYTES_MAX),
        steps=0 if compute.progress is None else compute.progress.steps,
        steps_planned=steps_planned,
        tokens=compute.tokens,
        tokens_per_s=measure_tokens_per_s(compute),
        loss_first=points[0].loss if points else compute.loss,
        loss_last=compute.loss,
        loss_history=points,
        held_out=None
        if held_out is None
        else HeldOut(
            round=held_out.round,
            loss=held_out.loss_nats,
            perplexity=held_out.perplexity if has_perplexity(compute.loss_unit) else None,
        ),
        loss_unit=clean_text(compute.loss_unit),
        unused=compute.unused,
        pairs_mixed=compute.pairs_mixed,
        pair_failure=compute.pair_failure or "",
    )


def measure_tokens_per_s(compute: Compute) -> float:
    """How fast it trains; 0 while it does not."""
    running = compute.phase in (TrainerState.RUNNING, TrainerState.PAUSED)
    return compute.progress.tokens_per_s if compute.progress and running else 0.0


def describe_measurements(
    measurements: Iterable[Measurement], loss_unit: str, name_of: Callable[[PeerId], str]
) -> tuple[Measured, ...]:
    """What the ledger has, with whom it is from; the losses are in `loss_unit`."""
    return tuple(
        Measured(
            round=one.held_out.round,
            loss=one.held_out.loss_nats,
            perplexity=find_perplexity(one.held_out.loss_nats) if has_perplexity(loss_unit) else None,
            tokens=one.held_out.tokens,
            peer=format_peer_id(one.author),
            name=name_of(one.author),
        )
        for one in measurements
    )


def show_training(metrics: Metrics, compute: Compute, measurements: tuple[Measurement, ...]) -> None:
    """Set everything that is not counted where it happens."""
    if compute.loss is not None:
        metrics.loss.set(compute.loss)
    if compute.held_out is not None:
        metrics.held_out_loss.set(compute.held_out.loss_nats)
    newest = measurements[0].held_out if measurements else None
    metrics.swarm_held_out_loss.set(math.nan if newest is None else newest.loss_nats)
    metrics.swarm_held_out_round.set(0 if newest is None else newest.round)
    metrics.tokens.count_to(compute.tokens)
    metrics.inner_steps.count_to(compute.steps)
    for reason, counter in metrics.steps_dropped.items():
        counter.count_to(compute.steps_dropped[reason])
    metrics.pairs_mixed.count_to(compute.pairs_mixed)
    for failure, counter in metrics.pair_failures.items():
        counter.count_to(compute.pair_failures[Failure(failure)])
    metrics.tokens_per_s.set(measure_tokens_per_s(compute))
    metrics.trainer_running.set(compute.phase is TrainerState.RUNNING)
