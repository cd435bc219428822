"""The trainer at the daemon's side of a round: start it, freeze what it made, hand it the new base, restart it.

The pseudo-gradient is anchored at the current certified base; a round that was certified without this peer changes the
base and nothing else here: it trains on, and the next contribution carries the work. Past `missed_rounds_max` such
rounds the peer starts again from the base.

A trainer is in step when it began the open round's training as the round began. One that is not, because it was away
or has missed a round, ends its training when the others have ended theirs, and so is in step from the next round on.

Invariants: a contribution is offered at most once a round, and only while it is what the trainer last handed over; a
trainer that keeps failing is given up after RESTARTS_MAX within RESTART_WINDOW_S, and the daemon goes on without one.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace

from shoal.node.feedback import FeedbackFull
from shoal.node.ledger_store import StoreError
from shoal.node.local_state import LocalState
from shoal.node.own_rounds import OwnRounds
from shoal.node.status import TrainerState, describe_unused
from shoal.node.trainer import Trainer, TrainerError, TrainerEvent, TrainerExited, TrainerLeft, TrainerStalled
from shoal.node.training.loss_units import find_loss_unit, has_perplexity, write_loss
from shoal.node.training.messages import (
    EVERYTHING,
    NO_EVALUATION,
    OPTIMIZER,
    Compiling,
    Evaluated,
    Failed,
    Merge,
    Paused,
    Progress,
    Ready,
    Resumed,
    Sampled,
    Started,
    Work,
)
from shoal.protocol.attendance import FRESHNESS, NO_ATTENDANCE, PARTICIPATION, Attendance, expect_attendance
from shoal.protocol.codecs import Float32s
from shoal.protocol.contribution import Frozen, NonFiniteContribution
from shoal.protocol.errors import Failure
from shoal.protocol.identity import PeerId
from shoal.protocol.manifest import Manifest
from shoal.protocol.messages import Result
from shoal.protocol.quorum import find_evaluator, list_contributors, list_members, make_bitmap
from shoal.protocol.replica import find_gain, rehearse

RESTARTS_MAX = 5
RESTART_WINDOW_S = 600.0
RESTART_DELAY_S = 1.0

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputePorts:
    """What the compute side tells the daemon."""

    frozen: Callable[[Frozen, Ready, Attendance], None]  # a contribution to the open round is ready to be offered
    restarted: Callable[[Failure, str], None]
    gave_up: Callable[[str], None]
    spawn: Callable[[Coroutine[object, object, object]], None]
    resumed: Callable[[str], None] = log.warning  # what a restart has lost, in plain words
    waits: Callable[[str], None] = log.warning  # what a person must do so that there is a trainer
    left: Callable[[str], None] = log.warning  # an attached script has gone
    measured: Callable[[Evaluated], None] = lambda event: None  # the held-out loss of a certified base


class Compute:
    """All calls on the event loop. The trainer's events come in by `take`."""

    def __init__(self, *, me: PeerId, manifest: Manifest, state: LocalState, ports: ComputePorts) -> None:
        self.trainer: Trainer
        self.phase = TrainerState.NONE
        self.device = ""
        self.error = ""
        self.next_step = ""  # what a person must do so that there is a trainer
        self.unused: tuple[str, ...] = ()  # settings of this machine that the task ignores
        self.loss_unit = find_loss_unit(manifest.task.kind)
        self.restarts = 0
        self.progress: Progress | None = None
        self.loss: float | None = None
        self.tokens = 0  # since the daemon's start
        self.steps = 0
        self.steps_dropped: Counter[str] = Counter()  # by reason, since the daemon's start
        self.pairs_mixed = 0  # without a quorum, since the daemon's start
        self.pair_failures: Counter[Failure] = Counter()  # why it trained on alone, likewise
        self.pair_failure: Failure | None = None  # of the last turn
        self.held_out: Evaluated | None = None  # the last look at a base
        self._me = me
        self._manifest = manifest
        self._state = state
        self._own_rounds = OwnRounds(state.stores.ledger, me)
        self._ports = ports
        self._ready: Ready | None = None  # what the trainer last handed over, until it is told to go on
        self._missed = 0
        self._in_step = False
        self._jumped = False  # the state, while no trainer was there that could be told
        self._ended_round = 0  # for the others, training for this round is over
        self._counted_tokens = 0
        self._counted_steps = 0
        self._steps_resumed = 0
        self._last_words = ""  # of a trainer that has said why it ends
        self._failures_s: list[float] = []
        self._frozen_root: bytes | None = None  # of the contribution that was made of what the trainer handed over last
        self._was_alone = False  # it has trained on in the open round, upon what was offered to that
        self._freezing = asyncio.Lock()
        self._shifting = asyncio.Lock()  # held while the daemon writes what the trainer shares with it
        self._stopping = False
        self._restarting = False
        self._generation = b""  # of the memory of contributions that the trainer was started with

    # -- life of the trainer -----------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start the trainer and let it train for the round after the head."""
        self.phase = TrainerState.STARTING
        self._last_words = ""
        self._ports.spawn(asyncio.to_thread(rehearse, self._manifest))
        try:
            await self.trainer.wait(self._await_person)
        except TrainerError as error:
            await self._failed(error.failure, error.detail, is_final=error.is_final)
            return
        if self._stopping:
            return
        self.next_step = ""
        self.phase = TrainerState.STARTING
        self._generation = self._state.generation
        work = Work(
            task=self._manifest.task,
            training=self._manifest.training,
            layout_digest=self._manifest.layout.digest,
            seed=self._manifest.seed,
            peer=self._me,
            generation=self._generation,
            batches_done=self._state.batches_done,
        )
        try:
            started = await self.trainer.start(work)
        except TrainerError as error:
            if error.has_left:
                self._left(error.detail)
            else:
                await self._failed(error.failure, error.detail, is_final=error.is_final)
            return
        self.device = started.device
        self._hear(started)
        if self._generation == self._state.generation:
            async with self._shifting:
                await self._resume(started.resumed)
        elif not self._stopping:
            await self._begin_anew()  # it was renewed meanwhile

    def _hear(self, started: Started) -> None:
        """What it says of its data, its settings and its losses."""
        if started.notice:
            log.warning("trainer: %s", started.notice)
        if started.unused and started.unused != self.unused:
            log.warning("%s", describe_unused(started.unused))
        self.unused = started.unused
        self.loss_unit = started.loss_unit or find_loss_unit(self._manifest.task.kind)

    def _await_person(self, next_step: str) -> None:
        self.phase = TrainerState.WAITING
        self.next_step = next_step
        self._ports.waits(next_step)

    def _left(self, detail: str) -> None:
        """The script has gone: wait for the next one. What it had handed over may still be counted."""
        if self._stopping or self._restarting:
            return
        self._ready = None
        self.phase = TrainerState.STARTING
        self._ports.left(detail)
        self._ports.spawn(self.start())

    async def _renew(self) -> None:
        """Begin anew, unless that has begun: rounds that are caught up with come faster than a trainer starts."""
        if not self._restarting and self.phase in (TrainerState.RUNNING, TrainerState.PAUSED):
            await self._begin_anew()

    async def _begin_anew(self) -> None:
        """Start the trainer without what its checkpoint holds."""
        self._ready = None
        self.phase = TrainerState.STARTING
        self._restarting = True
        await self.trainer.stop()
        self._restarting = False
        if not self._stopping:
            await self.start()

    async def _resume(self, resumed: Resumed) -> None:
        """Let it train for the round after the head, from where its checkpoint stood, if it has one of use."""
        jumped, self._jumped = self._jumped, False
        if jumped:
            log.info("another base came while no trainer was there: training goes on from it")
        else:
            self._tell(resumed)
        self.phase = TrainerState.RUNNING
        self._ready = None
        self._missed = 0
        self._in_step = False
        self._counted_tokens, self._counted_steps = resumed.tokens, resumed.steps
        self._steps_resumed = resumed.steps
        number, settled = self._state.head.round + 1, self._state.settled
        if resumed.extent != EVERYTHING or jumped:
            self._counted_tokens = self._counted_steps = 0
            await self.trainer.begin(number, adopt=True)
        elif resumed.waits and settled is not None and settled.batches_done == resumed.batches_done:
            # What it had handed over was counted while it was away.
            self._missed = number - 1 - settled.round
            self._counted_tokens = self._counted_steps = 0
            counted = list_members(settled.parts, 8 * len(settled.parts))
            await self.trainer.merge(self._make_merge(number, settled.round, counted, adopt_all=False))
        else:
            self._missed = max(0, number - resumed.since_round)
            stale = self._missed > self._manifest.training.missed_rounds_max
            if stale:
                log.warning("away for %d rounds: training goes on from the certified base", self._missed)
                await self._state.forget_residual()
                self._missed = self._counted_tokens = self._counted_steps = 0
            await self.trainer.begin(number, adopt=stale)
        await self._end_training()

    def _tell(self, resumed: Resumed) -> None:
        if resumed.extent == OPTIMIZER:
            text = "the checkpoint is older than the last contribution: training goes on from the certified base"
            self._ports.resumed(f"{text}, at batch {resumed.batches_done}")
        elif resumed.extent == EVERYTHING:
            log.info("training goes on where it stood, at batch %d", resumed.batches_done)
        elif resumed.batches_done > self._state.batches_done:
            text = "what was contributed is not known any more: training goes on from the certified base"
            self._ports.resumed(f"{text}, at batch {resumed.batches_done}")
        if resumed.steps_lost:
            text = f"{resumed.steps_lost} steps since the last checkpoint were lost"
            self._ports.resumed(f"{text}; their batches are trained on again, from batch {resumed.batches_done}")

    async def stop(self) -> None:
        """End the trainer in bounded time."""
        self._stopping = True
        self.phase = TrainerState.STOPPED
        await self.trainer.stop()

    async def _failed(self, reason: Failure, detail: str, *, is_final: bool = False) -> None:
        """Restart it from the last certified state, unless it fails again and again, or would."""
        if self._stopping or self._restarting:
            return  # a trainer that is given up anyway may die before it is ended
        now = asyncio.get_running_loop().time()
        self._failures_s = [at for at in self._failures_s if now - at < RESTART_WINDOW_S] + [now]
        self.error = detail
        self._ready = None
        if is_final or len(self._failures_s) > RESTARTS_MAX:
            self.phase = TrainerState.STOPPED
            self._ports.gave_up(detail)
            return
        self.restarts += 1
        self._ports.restarted(reason, detail)
        self.phase = TrainerState.STARTING
        self._restarting = True
        await asyncio.sleep(RESTART_DELAY_S * len(self._failures_s))
        await self.trainer.stop()
        self._restarting = False
        # What is not in the trainer's last checkpoint is gone with the process. The residual is not: it is kept here.
        if not self._stopping:
            await self.start()

    # -- its events --------------------------------------------------------------------------------------------------

    def take(self, event: TrainerEvent) -> None:
        """Called by the trainer port, in the order in which things happened."""
        match event:
            case Progress():
                self._recover()
                self._count(event.tokens, event.steps)
                self.progress = event
                self.loss = event.loss
            case Ready():
                settled = self._state.settled
                if settled is not None and event.batches_done <= settled.batches_done:
                    return  # handed over again after a restart, and counted meanwhile: a Merge is on its way
                self._count(event.tokens, event.steps)
                if event.problem:
                    log.warning("%s", event.problem)
                self.loss = event.loss_mean
                self._ready = event
                self.phase = TrainerState.RUNNING if event.trains_on else TrainerState.PAUSED
                self._ports.spawn(self._freeze())
            case Paused():
                if self._ready is not None:
                    self.phase = TrainerState.PAUSED
            case Compiling():
                log.info("trainer: torch.compile works on the task's loss: the first step takes minutes")
            case Evaluated():
                self.held_out = event
                perplexity = f", perplexity {event.perplexity:.2f}" if has_perplexity(self.loss_unit) else ""
                found = write_loss(f"{event.loss_nats:.4f}", self.loss_unit) + perplexity
                log.info("held-out loss of round %d: %s", event.round, found)
                self._ports.measured(event)
            case Failed() if event.reason == NO_EVALUATION:
                log.info("%s", event.detail)
            case Failed():
                self.steps_dropped[event.reason] += event.steps_dropped
                self.error = event.detail
                self._last_words = event.detail if event.fatal else ""
                log.warning("trainer: %s: %s", event.reason, event.detail)
            case TrainerExited():
                last = event.stderr_lines[-1] if event.stderr_lines else f"exit status {event.returncode}"
                if self._last_words and event.stderr_lines:
                    log.warning("trainer: the last line on its standard error is: %s", last)
                last = self._last_words or last
                self._ports.spawn(self._failed(Failure.TRAINER_CRASHED, last))
            case TrainerLeft():
                self._left(self._last_words or event.detail)
            case TrainerStalled() if event.may_recover:
                if self.phase is TrainerState.RUNNING:
                    self.phase = TrainerState.STALLED
                    log.warning("the attached script has made no step for %.0f s", event.silent_s)
            case TrainerStalled():
                self.phase = TrainerState.STALLED
                hangs = "a step or the data of the task hang, or take longer than trainer.stall_timeout_s"
                detail = f"no report for {event.silent_s:.0f} s: {hangs}"
                self._ports.spawn(self._failed(Failure.TRAINER_STALLED, detail))
            case Sampled():
                pass  # nobody asks a running trainer for text

    def _recover(self) -> None:
        if self.phase is TrainerState.STALLED:
            self.phase = TrainerState.RUNNING

    def _count(self, tokens: int, steps: int) -> None:
        """The trainer counts since it last adopted the base; the daemon counts since its own start."""
        if tokens < self._counted_tokens:
            self._counted_tokens = self._counted_steps = 0
        self.tokens += tokens - self._counted_tokens
        self.steps += steps - self._counted_steps
        self._counted_tokens, self._counted_steps = tokens, steps

    # -- rounds ------------------------------------------------------------------------------------------------------

    async def _freeze(self) -> None:
        async with self._freezing:
            ready = self._ready
            if ready is None:
                return
            try:
                frozen = await self._state.freeze(self.trainer.local, ready.batches_done)
                attendance = await self._find_attendance()
            except NonFiniteContribution as error:
                log.warning("%s; the trainer starts again from the base", error)
                await self._state.forget_residual()
                await self.adopt_base()
                return
            except (OSError, StoreError, FeedbackFull) as error:
                # It stays ready, and is offered to the next round.
                log.error("the contribution to round %d is not offered: %s", self._state.head.round + 1, error)
                return
            if self._ready is ready and frozen.round == self._state.head.round + 1:
                self._frozen_root = frozen.root
                self._ports.frozen(frozen, ready, attendance)

    async def _find_attendance(self) -> Attendance:
        """What the open round's READY declares, where the manifest's weights ask for it. Raises StoreError."""
        head, rule = self._state.head, self._manifest.rounds.weights
        if rule == PARTICIPATION:
            return expect_attendance(await asyncio.to_thread(self._own_rounds.find, head), head.round + 1)
        return Attendance(base_age=min(self._missed, head.round)) if rule == FRESHNESS else NO_ATTENDANCE

    async def committed(self, result: Result, included: tuple[int, ...]) -> None:
        """A round is applied; `included` are the parts that were certified with this peer in them."""
        async with self._shifting:
            await self._go_on(result, included)

    async def _go_on(self, result: Result, included: tuple[int, ...]) -> None:
        if self._generation not in (b"", self._state.generation):
            self._ports.resumed("a contribution of an older life was counted: training goes on from the certified base")
            self._ports.spawn(self._renew())
            return  # a start that is under way sees it
        if not result.parts:
            return  # nothing moved; what is ready is offered to the next round
        self._missed = 0 if included else self._missed + 1
        was_alone, self._was_alone = self._was_alone, False
        restart = self._missed > self._manifest.training.missed_rounds_max
        if restart:
            log.warning("missed %d rounds in a row: training goes on from the certified base", self._missed)
            await self._state.forget_residual()
            self._missed = 0
        if self.phase in (TrainerState.WAITING, TrainerState.STARTING, TrainerState.STOPPED):
            return
        self._in_step = bool(included) or restart
        if was_alone and included and self._frozen_root not in [one.contribution_root for one in result.members]:
            # It was planned before the quorum was lost. The parameters have gone on, and stand where they stand.
            self._in_step = False
        if not self._in_step:
            await self._train_on()  # what it will have is anchored at the new base
            return
        if self._ready is None and included and self._counted_steps > self._steps_resumed:
            # Only after a restart that lost its checkpoint: what was counted is not what the trainer stands on.
            steps = self._counted_steps - self._steps_resumed
            self._ports.resumed(f"{steps} steps since a restart were lost: an older contribution was counted")
        ready, self._ready = self._ready, None
        self.phase = TrainerState.RUNNING
        gain = find_gain(self._manifest, result, self._me)
        place, places = self._find_place(result)
        merge = self._make_merge(result.round + 1, result.round, included, adopt_all=restart)
        merge = replace(merge, gain=gain, place=place, places=places)
        if ready is None or restart:
            self._counted_tokens = self._counted_steps = 0
        else:  # the trainer counts on from what it has handed over
            self._counted_tokens = max(0, self._counted_tokens - ready.tokens)
            self._counted_steps = max(0, self._counted_steps - ready.steps)
        await self.trainer.merge(merge)
        if included and find_evaluator(result, self._manifest.training.evaluate_every) == self._me:
            await self.trainer.evaluate()

    def _find_place(self, result: Result) -> tuple[int, int]:
        """Which share of the data is this peer's until the next round that it is in: its place among those who were in
        this one. Everything, where data are not divided or it was left out."""
        contributors = list_contributors(result)
        if not self._manifest.training.divide_data or self._me not in contributors:
            return 0, 1
        return contributors.index(self._me), len(contributors)

    def _make_merge(self, number: int, certified: int, included: tuple[int, ...], *, adopt_all: bool) -> Merge:
        """Train for round `number`, with these of the parts that round `certified` has exchanged."""
        parts = self._manifest.list_parts(certified)
        return Merge(
            round=number,
            included=make_bitmap(frozenset(parts[place] for place in included), self._manifest.parts),
            part_elements=self._manifest.rounds.part_elements,
            adopt_all=adopt_all,
            begin=True,
        )

    def end_training(self, number: int) -> None:
        """The others have ended their training for this round."""
        self._ended_round = number
        self._ports.spawn(self._end_training())

    async def _end_training(self) -> None:
        is_open = self._ended_round == self._state.head.round + 1
        if is_open and not self._in_step and self.phase is TrainerState.RUNNING:
            await self.trainer.freeze()

    async def rebase(self) -> None:
        """The base is that of another log now. The local work stays, and the next pseudo-gradient is anchored there."""
        self._in_step = False
        async with self._shifting:
            await self._train_on()

    @property
    def waits(self) -> bool:
        """Whether the trainer has handed over what it has and stands still until there is a round with it."""
        return self._ready is not None and self.phase is TrainerState.PAUSED

    async def train_alone(self, find_move: Callable[[Float32s], None] | None) -> bool:
        """No round is to be had and the READY is taken back: train on from the local parameters, and first move them by
        what this writes, float32[D]; whether they were moved. Raises what `find_move` raises, after which the trainer
        is training, too."""
        async with self._shifting:
            if not self.waits:
                return False
            self._ready = self._frozen_root = None
            self._in_step, self._was_alone = False, True
            self.phase = TrainerState.RUNNING
            is_shifted = False
            try:
                if find_move is not None:
                    await asyncio.to_thread(find_move, self.trainer.local)
                    is_shifted = True
            finally:
                await self.trainer.begin(self._state.head.round + 1, adopt=False, shift=is_shifted)
            return is_shifted

    def note_pair(self, failure: Failure | None) -> None:
        """A turn without a quorum is over: mixed with another peer, or not."""
        self.pair_failure = failure
        if failure is None:
            self.pairs_mixed += 1
        else:
            self.pair_failures[failure] += 1

    async def _train_on(self) -> None:
        """From the local parameters, until the others are ready again: nobody gains by a trainer that waits."""
        waiting = self._ready is not None
        self._ready = None
        if waiting and self.trainer.running:
            self.phase = TrainerState.RUNNING
            await self.trainer.begin(self._state.head.round + 1, adopt=False)

    def round_begun(self) -> None:
        """The next round is open. What the trainer handed over before may still wait for one."""
        if self._ready is not None:
            self._ports.spawn(self._freeze())

    async def adopt_base(self) -> None:
        """Drop the local work: the state has jumped and its base is gone, or it cannot be used."""
        async with self._shifting:
            self._ready = None
            self._missed = 0
            self._in_step = False
            self._counted_tokens = self._counted_steps = 0
            if self.trainer.running:
                self.phase = TrainerState.RUNNING
                await self.trainer.begin(self._state.head.round + 1, adopt=True)
            else:
                self._jumped = True
