"""Who is in which round, with how many steps and when: what the round protocol makes of workers of different speeds.

The protocol is the daemon's (protocol/rounds.py and protocol/pace.py, in the simulator of tests/sim): the proposer, its
grace window, and for whom it pays to wait. Time is virtual, messages take 20 ms, and an exchange next to nothing. When
a trainer is ready is the trainer's own rule (node/training/loop.py): by steps, or by time with the least number of
steps.

Invariant: the same draft and speeds give the same timetable.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from shoal.protocol.manifest import Draft, Training
from tests.sim.stage import Stage

STAGE_FACTOR = 1.1  # a stage takes the middle of 0.8 to 1.4 of a peer's `training_s`
PATIENCE = 10.0  # times the longest training: so long a round may take


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedRound:
    """Certified at `at_s` simulated seconds, with the steps of each worker that is in it since it was in one last."""

    at_s: float
    steps: Mapping[int, int]


def keep_time(draft: Draft, speeds: Sequence[float], until_s: float) -> Iterator[TimedRound]:
    """The rounds that are certified by `until_s`. `speeds`: steps a second of each worker, at most twelve."""
    stage = open_stage(draft, speeds)
    number = 0
    while True:
        number += 1
        run_to_certificate(stage, number)
        if stage.now > until_s:
            return
        result = stage.certificate(number).result
        assert all(part.contributors == result.parts[0].contributors for part in result.parts), "nobody was lost"
        yield TimedRound(
            at_s=stage.now, steps={stage.by_id[member.peer].number: member.steps for member in result.members}
        )


def open_stage(draft: Draft, speeds: Sequence[float]) -> Stage:
    """Simulated peers of these speeds, who begin to train at once."""
    stage = Stage(peers=len(speeds), grace_s=draft.rounds.grace_s)
    for peer, speed in zip(stage.everybody, speeds, strict=True):
        steps = count_steps(draft.training, speed)
        peer.training_s, peer.training_steps = steps / speed / STAGE_FACTOR, steps
    return stage


def run_to_certificate(stage: Stage, number: int) -> None:
    """Until somebody has applied this round."""
    limit_s = PATIENCE * STAGE_FACTOR * max(peer.training_s for peer in stage.everybody)
    stage.run_until(lambda: any(peer.core.head.round >= number for peer in stage.up()), max(limit_s, 120.0))


def count_steps(training: Training, speed: float) -> int:
    """How many steps a worker of this speed has made when it is ready: the first number at which either rule holds."""
    steps = 1
    while steps < training.inner_steps and (steps < training.steps_min or steps / speed < training.round_time_s):
        steps += 1
    return steps
