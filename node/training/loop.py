"""The trainer's inner loop: which step comes next, when the peer is ready, what a command changes. No socket, no clock.

The caller gives commands to `handle`, and calls `step` while `training`; both return the reports to send. A round is
ready by steps, or by time once it has the least number of steps, or by Freeze. Where the strategy overlaps, training
goes on after that for some steps; what is done meanwhile counts towards the next Ready.

A batch that does not fit into memory is tried again in smaller pieces (micro_batches); nothing of the failed try stays.
A task whose code raises at a batch costs that batch: it is skipped, counted and told. Where the same befalls so many
batches in a row that it is not the data, the trainer ends.

Invariants: Ready is reported once a round and only with finite parameters in `local`; `local` is written at no other
time; going back to the base and skipping batches are bounded, so that a base or a task that cannot be trained ends the
trainer instead of the heat.
"""

import math
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from shoal.node.training.activations import recompute_blocks
from shoal.node.training.base_writes import BaseWrites
from shoal.node.training.checkpoint import Checkpoint, CheckpointStore, Position
from shoal.node.training.datasets_library import choose_hub_access
from shoal.node.training.devices import choose_device, name_device
from shoal.node.training.gradient_pass import GradientPass
from shoal.node.training.local_parameters import load_parameters
from shoal.node.training.messages import (
    COMPILE_FAILED,
    EVERYTHING,
    NO_TEXT,
    NOT_FINITE,
    OPTIMIZER,
    OUT_OF_MEMORY,
    RANK_LOST,
    TASK_FAILED,
    Begin,
    Command,
    Compiling,
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
    Sampled,
    Start,
    Started,
    trim_detail,
)
from shoal.node.training.micro_batches import MicroBatches, is_out_of_memory, tell_next_step
from shoal.node.training.ranks import RankLost, Ranks
from shoal.node.training.round_work import PROGRESS_PERIOD_S, RoundWork, tell_unshifted
from shoal.node.training.strategy import STRATEGIES, load_tensors
from shoal.node.training.task_faults import TaskFault, blame
from shoal.node.training.tasks import (
    Batches,
    DividesData,
    ReadsDatasets,
    TakesFiles,
    TakesWeights,
    WritesText,
    list_unused,
    make_task,
    name_loss_unit,
)
from shoal.protocol.errors import ConfigError, ManifestError

FAULTS_IN_A_ROW_MAX = 5

T = TypeVar("T")


class InnerLoop:
    """One trainer. `memory` is float32[2, D]: base and local; `writes` counts the base's. Building it opens the data;
    raises InputError, and TaskFault where the code of the task raises. `ranks` are the other processes, which it waits
    for; then it raises what Ranks.join does, too."""

    def __init__(
        self,
        start: Start,
        memory: NDArray[np.float32],
        ranks: Ranks | None = None,
        writes: BaseWrites | None = None,
    ) -> None:
        work = start.work
        self._device = choose_device(start.device)
        choose_hub_access(start.dataset, Path(start.checkpoints) if start.checkpoints else None)
        self._task = make_task(work.task, start.allow_tasks)
        self._kind = work.task.kind
        with self._task_code():
            layout = self._task.layout()
            if layout.digest != work.layout_digest or memory.shape[1] != layout.elements:
                fix = "run the version of shoal, and of the task's code, that made the manifest"
                raise ManifestError("layout", f"is not what {self._kind} makes of task.options", fix)
            if isinstance(self._task, TakesFiles):
                cache = Path(start.cache) if start.cache else None
                self._task.take_files(Path(start.tokenizer) if start.tokenizer else None, cache)
            if isinstance(self._task, TakesWeights):
                self._task.take_weights(Path(start.weights) if start.weights else None, self._device)
            self._batches = self._open_data(start)
            self._tokens_per_batch = self._batches.tokens_per_batch
            self._train_bytes, self._held_out_bytes = self._batches.train_bytes, self._batches.held_out_bytes
            self._notice = trim_detail(self._batches.notice)
            self._unused, self._loss_unit = list_unused(self._task, start), name_loss_unit(self._task, self._kind)
            self._model = self._task.build_model().to(self._device)
            if [tuple(one.shape) for one in self._model.parameters()] != [spec.shape for spec in layout.tensors]:
                fix = "list the parameters of build_model() in their order: list_specs does"
                raise ManifestError("layout", f"is not that of the model of {self._kind}", fix)
        if start.checkpoint_activations:
            recompute_blocks(self._model, self._kind)
        self._pass = GradientPass(self._task, self._model, self._device, compiles=start.compiled is not None)
        self._ranks = ranks
        if ranks is not None:
            ranks.join(self._model)  # before an optimizer takes its gradients
        self._strategy = STRATEGIES[work.training.strategy](self._model, layout, work.training)
        self._evaluated: nn.Module | None = None
        most = -(-work.training.batch_size // (1 if ranks is None else ranks.count))  # examples of one process
        self._micro_batches = MicroBatches(start.micro_batch, most)
        self._base: FloatVector = memory[0]
        self._local: FloatVector = memory[1]
        self._writes = BaseWrites() if writes is None else writes
        self._batches_done = work.batches_done
        self._saved_at = -1  # batches done at the newest checkpoint
        self._save_every = start.checkpoint_every
        self._readies = 0
        self._skipped = 0  # batches at which the task's code raised, since the start
        self._faults_in_a_row = 0
        self._fault_told_s = -math.inf
        self._rounds = RoundWork(work.training)
        self._resumes: Position | None = None  # until the first Begin or Merge
        self._checkpoints = CheckpointStore(Path(start.checkpoints), work) if start.checkpoints else None
        self._resumed = Resumed() if self._checkpoints is None else self._resume(self._checkpoints)

    def _open_data(self, start: Start) -> Batches:
        if start.dataset is None:
            return self._task.open_data(Path(start.text) if start.text else None, start.work)
        if not isinstance(self._task, ReadsDatasets):
            fix = "take it out of the configuration"
            raise ConfigError("trainer.dataset", f"the task {self._kind} reads no data sets", fix)
        folder = Path(start.checkpoints) if start.checkpoints else None
        return self._task.open_dataset(start.dataset, start.work, folder)

    @property
    def training(self) -> bool:
        """Whether there are steps to make; without, it waits for a command."""
        return self._rounds.training

    def started(self) -> Started:
        """The first report."""
        return Started(
            device=name_device(self._device, 1 if self._ranks is None else self._ranks.count),
            elements=self._base.size,
            train_bytes=self._train_bytes,
            held_out_bytes=self._held_out_bytes,
            resumed=self._resumed,
            notice=self._notice,
            unused=self._unused,
            loss_unit=self._loss_unit,
        )

    def handle(self, command: Command, now_s: float) -> Iterator[Report]:
        """Obey; Start and Stop are the caller's."""
        match command:
            case Begin():
                yield from self._begin(command, now_s)
            case Merge():
                yield from self._merge(command, now_s)
            case Freeze():
                self._rounds.freeze()
            case Evaluate():
                yield self._evaluate()
            case Sample():
                yield self._sample(command)
            case _:
                raise AssertionError(f"{type(command).__name__} is the worker's")

    def step(self, now_s: float) -> Iterator[Report]:
        """One inner step, at the time at which the caller found nothing else to do."""
        assert self.training, "a trainer that waits takes no step"
        gathered = None
        try:
            gathered = yield from self._fit(f"batch {self._batches_done}", lambda: self._gather(self._batches_done))
        except TaskFault as fault:
            self._batches_done += 1
            yield from self._skip(fault, now_s)
        except RankLost as lost:
            self._rounds.training = False
            yield Failed(reason=RANK_LOST, detail=trim_detail(str(lost)), fatal=True)
        if gathered is None:
            return
        self._faults_in_a_row = 0
        self._batches_done += 1
        others = "" if self._ranks is None else self._ranks.take_problem()
        if problem := self._pass.take_problem() or others:  # where one compiler is missing, all are
            yield Failed(reason=COMPILE_FAILED, detail=problem, fatal=False)
        if self._checkpoints is not None:
            self._checkpoints.journal.note(self._batches_done)
        if not self._strategy.step(gathered, self._rounds.round):
            yield self._go_back(f"the loss or its gradient at batch {self._batches_done - 1}", now_s)
            return
        loss = gathered.item()
        self._rounds.count(self._tokens_per_batch, loss)
        if (progress := self._rounds.tell_progress(loss, now_s)) is not None:
            yield progress
        if self._rounds.is_far_ahead():
            self._rounds.training = False
            yield Paused(round=self._rounds.round)
        elif self._rounds.is_due(now_s):
            yield self._freeze(now_s)

    def _gather(self, index: int) -> Tensor:
        """The mean loss of a batch, a scalar; its gradient is with the strategy."""
        with self._task_code():  # the backward pass may come back to it
            batch, size = self._batches.batch(index), self._micro_batches.size

            def run(examples: Tensor) -> Tensor:
                return self._pass.run(examples, len(batch), size, self._strategy)

            return run(torch.from_numpy(batch)) if self._ranks is None else self._ranks.gather(batch, size, run)

    def _fit(self, what: str, compute: Callable[[], T]) -> Generator[Report, None, T | None]:
        """What `compute` returns once its micro-batches fit into memory; None after a fatal report."""
        while True:
            if self._pass.compiles_at(self._micro_batches.size):
                yield Compiling()
            try:
                return compute()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                problem, fix = str(error), tell_next_step(error)
            # The error is gone here, and with it its traceback, which held the tensors of the failed pass.
            self._strategy.drop()
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
            size = self._micro_batches.size
            if not self._micro_batches.halve():
                self._rounds.training = False
                detail = trim_detail(f"not even one example of {what} fits into memory: {fix} ({problem})")
                yield Failed(reason=OUT_OF_MEMORY, detail=detail, fatal=True)
                return None
            left = self._micro_batches.size
            told = f"{what}: {size} examples at a time do not fit into memory, goes on with {left}"
            detail = trim_detail(f"{told}; trainer.micro_batch = {left} begins with that ({problem})")
            yield Failed(reason=OUT_OF_MEMORY, detail=detail, fatal=False)

    def _skip(self, fault: TaskFault, now_s: float) -> Iterator[Report]:
        """Go on without the batch at which the task's code raised. Of a task that raises now and then at most two
        faults a second are told."""
        self._strategy.drop()  # a backward pass may have got half of the way
        self._skipped += 1
        self._faults_in_a_row += 1
        fatal = self._faults_in_a_row > FAULTS_IN_A_ROW_MAX
        self._rounds.training = not fatal
        if fatal or now_s - self._fault_told_s >= PROGRESS_PERIOD_S:
            self._fault_told_s = now_s
            counted = f"{self._faults_in_a_row} in a row, {self._skipped} skipped since the start"
            # The counts come first: of a long fault the end is cut off.
            detail = trim_detail(f"the task's code at batch {self._batches_done - 1} ({counted}) raised {fault}")
            yield Failed(reason=TASK_FAILED, detail=detail, fatal=fatal)

    def _begin(self, begin: Begin, now_s: float) -> Iterator[Report]:
        position, self._resumes = self._resumes, None
        unshifted = None
        if begin.adopt:
            self._adopt()
        else:
            self._strategy.take_back()
        # A trainer that was started again meanwhile has handed nothing over: it does so now, and is not shifted.
        if begin.shift and self._rounds.has_handed_work and not self._strategy.shift(self._local):
            unshifted = tell_unshifted(begin.round)
        self._rounds.begin(begin.round, now_s, adopted=begin.adopt)
        if unshifted is not None:
            yield unshifted
        if position is not None and not begin.adopt:
            yield from self._go_on(position, now_s)

    def _merge(self, merge: Merge, now_s: float) -> Iterator[Report]:
        self._resumes, torn = None, None
        if merge.adopt_all:
            self._adopt()
        else:
            torn = self._merge_parts(merge)
        if isinstance(self._batches, DividesData):
            self._batches.take_share(merge.place, merge.places)
        self._rounds.begin(merge.round, now_s, adopted=merge.adopt_all or any(merge.included))
        self._rounds.training = merge.begin
        if torn is not None:
            yield torn

    def _merge_parts(self, merge: Merge) -> Failed | None:
        included, size = merge.included, merge.part_elements
        is_whole = self._writes.read(
            lambda: self._strategy.merge(self._base, included, size, merge.gain),
            lambda: self._strategy.take_parts(self._base, included, size),
        )
        return None if is_whole else self._rounds.drop_ahead()

    def _adopt(self) -> None:
        self._writes.read(lambda: self._strategy.adopt(self._base))
        self._rounds.ahead = None

    def _freeze(self, now_s: float) -> Report:
        if not self._strategy.export(self._local):
            return self._go_back("the local parameters", now_s)
        rounds = self._rounds
        rounds.hand_over()
        self._readies += 1
        problem = self._try_save(now_s) if self._readies % self._save_every == 0 else ""
        if rounds.training:
            # After the checkpoint, which has the parameters as they were handed over.
            self._strategy.hand_over(self._base, self._local)
            rounds.train_ahead(now_s)
        return Ready(
            round=rounds.round,
            steps=rounds.local.steps,
            tokens=rounds.local.tokens,
            loss_mean=rounds.loss_mean,
            batches_done=self._batches_done,
            problem=problem,
            trains_on=rounds.training,
        )

    def _go_back(self, what: str, now_s: float) -> Report:
        self._writes.read(lambda: self._strategy.restart(self._base))
        return self._rounds.start_over(what, now_s)

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def _resume(self, checkpoints: CheckpointStore) -> Resumed:
        """Stand where the newest checkpoint stood, unless more than it holds has been contributed since."""
        ends = [end for _, end in checkpoints.journal.lives()]
        found = checkpoints.load()
        extent = Resumed().extent if found is None else self._take(found)
        position = found.position if found is not None and extent == EVERYTHING else None
        if position is not None:
            self._resumes = position
            self._batches_done = self._saved_at = position.batches_done
        elif ends and checkpoints.is_foreign:
            self._batches_done = max(self._batches_done, ends[-1])  # nobody knows what was contributed of them
        checkpoints.journal.begin(self._batches_done)
        return Resumed(
            extent=extent,
            round=position.round if position else 0,
            batches_done=self._batches_done,
            steps=position.local.steps if position else 0,
            tokens=position.local.tokens if position else 0,
            waits=position.waits if position else False,
            steps_lost=max(0, ends[-1] - self._batches_done) if ends else 0,
            since_round=(position.since_round or position.round) if position else 0,
        )

    def _take(self, found: Checkpoint) -> str:
        optimizer, parameters = self._strategy.optimizer_tensors(), self._strategy.parameter_tensors()
        if found.position.batches_done < self._batches_done:
            return OPTIMIZER if load_tensors(optimizer, found.tensors) else Resumed().extent
        if not load_tensors(optimizer | parameters, found.tensors):
            return Resumed().extent
        found.restore_random()
        return EVERYTHING

    def _go_on(self, position: Position, now_s: float) -> Iterator[Report]:
        """From where the checkpoint stood: what was handed over is handed over again."""
        self._rounds.take(position.local, position.pace, position.since_round or position.round, now_s)
        if position.waits:
            yield self._freeze(now_s)

    def _try_save(self, now_s: float) -> str:
        """Why there is no checkpoint of this moment; empty where there is one, or should be none."""
        if self._checkpoints is None or self._saved_at == self._batches_done:
            return ""
        position = Position(
            round=self._rounds.round,
            batches_done=self._batches_done,
            waits=self._rounds.handed_over,
            local=self._rounds.local.read(now_s),
            pace=self._rounds.pace.read(now_s),
            since_round=self._rounds.since_round,
        )
        try:
            self._checkpoints.save(position, self._strategy.optimizer_tensors() | self._strategy.parameter_tensors())
        except OSError as error:
            return trim_detail(f"the checkpoint at batch {self._batches_done} was not written: {error}")
        self._saved_at = self._batches_done
        return ""

    def leave(self, now_s: float) -> None:
        """The last word before the process ends: what was trained since the last Ready is kept for the next start, but
        not what was trained beside an exchange: a restart has to hand over again what was handed over."""
        if self.training and self._rounds.pace.steps and self._rounds.ahead is None:
            self._try_save(now_s)

    # -- what is told ----------------------------------------------------------------------------------------------

    def _evaluate(self) -> Report:
        """Whatever goes wrong, the training goes on."""
        try:
            with self._task_code():
                loss, tokens = self._measure(self._base_model())
        except TaskFault as fault:
            detail = trim_detail(f"the task's code at the held-out data raised {fault}")
            return Failed(reason=TASK_FAILED, detail=detail, fatal=False)
        except (RuntimeError, MemoryError) as error:
            problem = f"the base does not fit beside the training and is not evaluated: {error}"
        else:
            if not np.isfinite(loss):
                detail = f"not finite: the base of round {self._writes.round}"
                return Failed(reason=NOT_FINITE, detail=detail, fatal=False)
            return Evaluated(round=self._writes.round, loss_nats=loss, tokens=tokens)
        self._evaluated = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        return Failed(reason=OUT_OF_MEMORY, detail=trim_detail(problem), fatal=False)

    @torch.no_grad()
    def _measure(self, model: nn.Module) -> tuple[float, int]:
        """The mean loss over the held-out data, and its tokens."""
        total, examples, size = 0.0, torch.from_numpy(self._batches.held_out()), self._micro_batches.size
        for first in range(0, len(examples), size):
            piece = examples[first : first + size].to(self._device)
            with self._pass.precision():
                total += self._task.loss(model, piece).item() * len(piece)
        return total / len(examples), self._batches.held_out_tokens

    def _sample(self, command: Sample) -> Report:
        task = self._task
        if not isinstance(task, WritesText):
            detail = f"a model of the task {self._kind} writes no text, so it cannot continue one"
            return Failed(reason=NO_TEXT, detail=detail, fatal=False)
        try:
            with self._task_code(), self._pass.precision():
                text = bytes(task.sample(self._base_model(), command.prompt, command.size_bytes))
        except TaskFault as fault:
            detail = trim_detail(f"the task's code at a sample raised {fault}")
            return Failed(reason=TASK_FAILED, detail=detail, fatal=False)
        return Sampled(text=text[: command.size_bytes])

    def _base_model(self) -> nn.Module:
        """A second model with the base in it, so that looking at the base does not disturb the training."""
        if self._evaluated is None:
            self._evaluated = self._task.build_model().to(self._device).requires_grad_(False).eval()
        model = self._evaluated
        self._writes.read(lambda: load_parameters(model, self._base))
        return model

    def _task_code(self) -> AbstractContextManager[None]:
        """Inside, what is raised is the task's fault, but for memory that is full, which is the machine's, and for
        another rank."""
        return blame(type(self._task).__module__, lambda error: is_out_of_memory(error) or isinstance(error, RankLost))
