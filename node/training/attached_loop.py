"""The inner loop of a script of one's own: what its steps and the daemon's commands change. No socket, no clock.

The script computes the steps; `step` is told of each, `handle` obeys the daemon, and both return the reports to send.
The daemon may go and come back: `lose` says that it is gone, `start` that one is there; in between the script trains.

What a reconnection may count follows from two numbers: the batches done here, and those that the daemon's disk knows to
be in contributions. What was handed over and is known there is handed over again to the bit, or was counted and is
merged now; what was handed over and is not known was never offered, and counts as not handed over. Where the disk
knows of more than was made here another script has contributed meanwhile, and the base is adopted.

Invariants: no step is in two contributions that can both be counted; Ready is reported once a round and only with
finite parameters in `local`; the script's optimizer loses its state with values that are not finite, and never
otherwise.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from shoal.node.training.base_writes import BaseWrites, WriterGone
from shoal.node.training.checkpoint import Tally, identify_work
from shoal.node.training.local_parameters import Evaluation, LocalParameters
from shoal.node.training.messages import (
    EVERYTHING,
    NO_EVALUATION,
    NO_TEXT,
    NOT_FINITE,
    OPTIMIZER,
    OUT_OF_MEMORY,
    Begin,
    Command,
    Evaluate,
    Evaluated,
    Failed,
    FloatVector,
    Freeze,
    Merge,
    Paused,
    Ready,
    Report,
    Resumed,
    Sample,
    Started,
    Work,
    trim_detail,
    trim_unit,
)
from shoal.node.training.micro_batches import is_out_of_memory
from shoal.node.training.round_work import RoundWork, tell_torn, tell_unshifted
from shoal.protocol.errors import ConfigError, ShoalError
from shoal.protocol.manifest import DELAYED, EAGER, OVERLAPPED, Training

TOKENS_MAX = 2**40  # of one step


class AttachError(ShoalError):
    """The training cannot go on in the swarm, or no daemon has answered in time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HandedOver:
    """What the last Ready was about. `local` is the memory that it was written to, which nobody changes until the next;
    or a copy of it, where the daemon may write a move there, and die before it has said so. `since` is what the steps
    made after it stand upon: the same, or the base that the parameters went back to."""

    local: FloatVector
    since: FloatVector
    batches_done: int
    tally: Tally
    loss_mean: float


class AttachedLoop:
    """One script's. `optimizer` is the one that trains the parameters."""

    def __init__(
        self,
        parameters: LocalParameters,
        optimizer: torch.optim.Optimizer,
        evaluate: Evaluation | None = None,
        loss_unit: str = "",
    ) -> None:
        self._parameters = parameters
        self._optimizer = optimizer
        self._evaluation = evaluate
        self._loss_unit = trim_unit(loss_unit)
        self._identity = b""  # of the work; another one is another swarm, or another life of this one
        self._base: FloatVector = np.zeros(0, np.float32)
        self._local: FloatVector = self._base
        self._writes = BaseWrites()
        self._rounds: RoundWork | None = None
        self._handed: HandedOver | None = None
        self._hands_again = False
        self._torn: Failed | None = None  # to be told at the first Begin
        self._stands_on_half = False  # of a base, which its daemon never finished
        self._anchored = False  # the parameters are a base and the work made since
        self._batches_done = 0
        self.share = (0, 1)  # of the data, by the last Merge: a place among so many
        self._replaced = False
        self._cleared = False
        self._attached = False

    @property
    def waits(self) -> bool:
        """Whether there is nothing to do but wait for a command."""
        return self._attached and not self._work.training

    @property
    def round(self) -> int:
        """That it trains for; 0 before the first Begin."""
        return 0 if self._rounds is None else self._rounds.round

    @property
    def _work(self) -> RoundWork:
        assert self._rounds is not None, "started"
        return self._rounds

    def take_replaced(self) -> bool:
        """Whether the parameters were replaced, or shifted, since this was asked last."""
        replaced, self._replaced = self._replaced, False
        return replaced

    def take_cleared(self) -> bool:
        """Whether the optimizer has lost its state since this was asked last."""
        cleared, self._cleared = self._cleared, False
        return cleared

    # -- the daemon comes and goes -------------------------------------------------------------------------------------

    def start(self, work: Work, memory: NDArray[np.float32], device: str, writes: BaseWrites | None = None) -> Started:
        """A daemon is there. `memory` is float32[2, D]: base and local; `writes` counts the base's."""
        before, self._identity = self._identity, identify_work(work)
        self._base, self._local = memory[0], memory[1]
        self._writes = BaseWrites() if writes is None else writes
        self._attached = True
        known = self._rounds is not None and before == self._identity
        if known and self._stands_on_half:
            self._torn = tell_torn(self._count_loose(), self.round)
        same = known and self._anchored
        resumed = self._resume(work.batches_done) if same else Resumed(batches_done=work.batches_done)
        if resumed.extent != EVERYTHING:
            self._forget(work.training, work.batches_done)
        return Started(
            device=device,
            elements=self._base.size,
            train_bytes=0,
            held_out_bytes=0,
            resumed=resumed,
            loss_unit=self._loss_unit,
        )

    def _resume(self, contributed: int) -> Resumed:
        """Of the batches done here the daemon's disk knows `contributed` to be in contributions."""
        rounds, handed = self._work, self._handed
        if contributed > (self._batches_done if handed is None else handed.batches_done):
            return Resumed(extent=OPTIMIZER, batches_done=contributed)  # another script was here
        if handed is not None and contributed < handed.batches_done:
            self._handed = handed = None  # it was never offered
            rounds.handed_over, rounds.ahead = False, None
        self._hands_again = handed is not None
        tally = rounds.local if handed is None else handed.tally
        return Resumed(
            extent=EVERYTHING,
            round=rounds.round,
            batches_done=self._batches_done if handed is None else handed.batches_done,
            steps=tally.steps,
            tokens=tally.tokens,
            waits=handed is not None,
            since_round=rounds.since_round,
        )

    def _forget(self, training: Training, batches_done: int) -> None:
        self._rounds = RoundWork(training)
        self._stands_on_half = False
        self._handed, self._hands_again, self._anchored = None, False, False
        self._batches_done = batches_done

    def lose(self, now_s: float) -> None:
        """The daemon is gone."""
        self._attached = False
        rounds, handed = self._work, self._handed
        if handed is not None and handed.local is self._local:  # which the daemon may give to another script
            local = handed.local.copy()
            self._handed = replace(handed, local=local, since=local if handed.since is handed.local else handed.since)
        if rounds.handed_over and rounds.ahead is None:
            rounds.train_ahead(now_s)
        rounds.training = True

    # -- commands ------------------------------------------------------------------------------------------------------

    def handle(self, command: Command, now_s: float) -> Iterator[Report]:
        """Obey; Start and Stop are the caller's. Raises WriterGone, as `step` does, before anything but the parameters
        has changed."""
        match command:
            case Begin():
                yield from self._begin(command, now_s)
            case Merge():
                yield from self._merge(command, now_s)
            case Freeze():
                self._work.freeze()
            case Evaluate():
                yield self._evaluate()
            case Sample():
                yield Failed(reason=NO_TEXT, detail="an attached script writes no text", fatal=False)
            case _:
                raise AssertionError(f"{type(command).__name__} is the caller's")

    def _count_loose(self) -> int:
        """Steps that are in nothing that was handed over."""
        return self._work.local.steps - (0 if self._handed is None else self._handed.tally.steps)

    def _begin(self, command: Begin, now_s: float) -> Iterator[Report]:
        torn, self._torn = self._torn, None
        if torn is not None:
            yield torn
        rounds, handed = self._work, self._handed
        if command.adopt:
            self._adopt()
        again, self._hands_again = self._hands_again, False
        if again and handed is not None and not command.adopt:
            rounds.round = command.round
            rounds.training = rounds.overlap_steps > 0 and not rounds.is_far_ahead()
            self._local[:] = handed.local
            if not rounds.rules.gossip_after_s:
                since = self._local if handed.since is handed.local else handed.since
                self._handed = replace(handed, local=self._local, since=since)
            yield self._tell_ready()
            return
        self._handed = None
        shifts = command.shift and rounds.has_handed_work
        shifted = shifts and self._parameters.shift(self._local)
        self._replaced |= shifted
        rounds.begin(command.round, now_s, adopted=command.adopt)
        if shifts and not shifted:
            yield tell_unshifted(command.round)

    def _merge(self, merge: Merge, now_s: float) -> Iterator[Report]:
        torn = None
        rounds, handed, ahead = self._work, self._handed, self._work.ahead
        rules = rounds.rules
        # No swarm is made for "eager" scripts; one that comes to one loses no step.
        stays = rules.strategy in (DELAYED, EAGER)
        keeps_all = ahead is not None and (stays or ahead.steps > rounds.overlap_steps)
        if merge.adopt_all:
            self._adopt()
        elif handed is not None and keeps_all:
            # Or the daemon was away: the steps made meanwhile may be many, and go on top of the base with the others.
            torn = self._merge_parts(merge, partial(self._parameters.rebase, self._base, handed.since))
        else:
            kept = rules.mixing if rules.strategy == OVERLAPPED else 0.0
            torn = self._merge_parts(merge, partial(self._parameters.merge, self._base, kept=kept))
        adopted = merge.adopt_all or any(merge.included)
        self._replaced |= adopted
        self._handed, self._hands_again = None, False
        self.share = merge.place, merge.places
        rounds.begin(merge.round, now_s, adopted=adopted)
        rounds.training = merge.begin
        if torn is not None:
            yield torn

    def _merge_parts(self, merge: Merge, take: Callable[[bytes, int], None]) -> Failed | None:
        included, size = merge.included, merge.part_elements
        is_whole = self._read_base(
            lambda: take(included, size), lambda: self._parameters.merge(self._base, included, size)
        )
        return None if is_whole else self._work.drop_ahead()

    def _adopt(self) -> None:
        self._read_base(lambda: self._parameters.adopt(self._base))
        self._work.ahead = None
        self._anchored = self._replaced = True

    def _read_base(self, take: Callable[[], None], again: Callable[[], None] | None = None) -> bool:
        """BaseWrites.read, of what changes the parameters."""
        try:
            return self._writes.read(take, again)
        except WriterGone as gone:
            if gone.is_torn:
                self._anchored, self._replaced, self._stands_on_half = (
                    False,
                    True,
                    True,
                )  # nothing that is made on it counts
            raise

    # -- steps ---------------------------------------------------------------------------------------------------------

    def step(self, loss: float, tokens: int, now_s: float) -> Iterator[Report]:
        """The script has made an inner step, of this loss and over so many tokens."""
        if isinstance(tokens, bool) or not isinstance(tokens, int) or not 1 <= tokens <= TOKENS_MAX:
            fix = f"give step() the number of tokens or examples of the batch, 1 to {TOKENS_MAX}"
            raise ConfigError("tokens", f"is {tokens!r}", fix)
        rounds = self._work
        self._batches_done += 1
        if not math.isfinite(loss):
            yield self._go_back(f"the loss at batch {self._batches_done - 1}", now_s)
            return
        rounds.count(tokens, loss)
        if not self._attached:
            return
        if (progress := rounds.tell_progress(loss, now_s)) is not None:
            yield progress
        if rounds.is_far_ahead():
            rounds.training = False
            yield Paused(round=rounds.round)
        elif rounds.is_due(now_s):
            yield self._hand_over(now_s)

    def _hand_over(self, now_s: float) -> Report:
        rounds = self._work
        if not self._parameters.export(self._local):
            return self._go_back("the local parameters", now_s)
        kept = self._local.copy() if rounds.rules.gossip_after_s else self._local
        self._handed = HandedOver(
            local=kept,
            since=kept,
            batches_done=self._batches_done,
            tally=rounds.local.read(now_s),
            loss_mean=rounds.loss_mean,
        )
        rounds.hand_over()
        if rounds.training:
            rounds.train_ahead(now_s)
        return self._tell_ready()

    def _tell_ready(self) -> Report:
        rounds, handed = self._work, self._handed
        assert handed is not None, "just set"
        return Ready(
            round=rounds.round,
            steps=handed.tally.steps,
            tokens=handed.tally.tokens,
            loss_mean=handed.loss_mean,
            batches_done=handed.batches_done,
            trains_on=rounds.training,
        )

    def _go_back(self, what: str, now_s: float) -> Report:
        rounds = self._work
        if self._attached:
            self._read_base(self._restart)
        else:
            self._restart()
        self._replaced = True
        # A daemon that was killed may have left half of a new base: nothing that is made on it counts.
        self._anchored = self._attached
        self._cleared = True
        self._optimizer.state.clear()  # moments that are not finite would spoil every further step
        return rounds.start_over(what, now_s)

    def _restart(self) -> None:
        self._parameters.adopt(self._base)
        if self._handed is not None:
            self._handed = replace(self._handed, since=self._base.copy())

    # -- the base ------------------------------------------------------------------------------------------------------

    def _evaluate(self) -> Report:
        """With the base in the script's model, which gets its own parameters back. What the script's function raises is
        the script's to see."""
        if self._evaluation is None:
            detail = "the script gave attach() no `evaluate`, so this peer does not measure the base"
            return Failed(reason=NO_EVALUATION, detail=detail, fatal=False)
        try:
            with self._parameters.lend(self._base, self._writes.read) as model, torch.no_grad():
                loss, tokens = self._evaluation(model)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            detail = trim_detail(f"the base does not fit beside the training and is not evaluated: {error}")
            return Failed(reason=OUT_OF_MEMORY, detail=detail, fatal=False)
        if not math.isfinite(loss):
            return Failed(reason=NOT_FINITE, detail=f"not finite: the base of round {self._writes.round}", fatal=False)
        return Evaluated(round=self._writes.round, loss_nats=float(loss), tokens=int(tokens))
