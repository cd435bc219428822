"""The trainer's inner loop: which step comes next, when the peer is ready, what a command changes. No socket, no clock.

The caller gives commands to `handle`, and calls `step` while `training`; both return the reports to send. A round is
ready by steps, or by time once it has the least number of steps, or by Freeze.

Invariants: Ready is reported once a round and only with finite parameters in `local`; `local` is written at no other
time; going back to the base is bounded, so that a base that cannot be trained ends the trainer instead of the heat.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from shoal.node.training.checkpoint import Checkpoint, CheckpointStore, Position, Tally
from shoal.node.training.messages import (
    EVERYTHING,
    NOT_FINITE,
    OPTIMIZER,
    Begin,
    Command,
    Evaluate,
    Evaluated,
    Failed,
    FloatVector,
    Freeze,
    Merge,
    Progress,
    Ready,
    Report,
    Resumed,
    Sample,
    Sampled,
    Start,
    Started,
    trim_detail,
)
from shoal.node.training.strategy import STRATEGIES, load_parameters, load_tensors
from shoal.node.training.tasks import make_task
from shoal.protocol.errors import ConfigError, ManifestError

PROGRESS_PERIOD_S = 0.5
RESTARTS_MAX = 3


class InnerLoop:
    """One trainer. `memory` is float32[2, D]: base and local. Building it reads the text and raises InputError."""

    def __init__(self, start: Start, memory: NDArray[np.float32]) -> None:
        work = start.work
        self._task = make_task(work.task)
        layout = self._task.layout()
        if layout.digest != work.layout_digest or memory.shape[1] != layout.elements:
            fix = "run the version of shoal that made the manifest"
            raise ManifestError("layout", f"is not what {work.task.kind} makes of task.options", fix)
        self._device = choose_device(start.device)
        self._batches = self._task.open_data(Path(start.text) if start.text else None, work)
        self._model = self._task.build_model().to(self._device)
        self._strategy = STRATEGIES[work.training.strategy](self._model, layout, work.training)
        self._evaluated: nn.Module | None = None
        self._training = work.training
        self._base: FloatVector = memory[0]
        self._local: FloatVector = memory[1]
        self._batches_done = work.batches_done
        self._saved_at = -1  # batches done at the newest checkpoint
        self._save_every = start.checkpoint_every
        self._readies = 0
        self._restarts = 0
        self._round = 0
        self._frozen = False
        self._work = _Tally()  # what `local` holds beyond the base
        self._pace = _Tally()  # towards the next Ready
        self._shown = _Tally()  # since the last Progress
        self._resumes: Position | None = None  # until the first Begin or Merge
        self._handed_over = False
        self.training = False
        self._checkpoints = CheckpointStore(Path(start.checkpoints), work) if start.checkpoints else None
        self._resumed = Resumed() if self._checkpoints is None else self._resume(self._checkpoints)

    def started(self) -> Started:
        """The first report."""
        on_gpu = self._device.type == "cuda"
        return Started(
            device=torch.cuda.get_device_name(self._device) if on_gpu else "cpu",
            elements=self._base.size,
            train_bytes=self._batches.train_bytes,
            held_out_bytes=self._batches.held_out_bytes,
            resumed=self._resumed,
        )

    def handle(self, command: Command, now_s: float) -> Iterator[Report]:
        """Obey; Start and Stop are the caller's."""
        match command:
            case Begin():
                position, self._resumes = self._resumes, None
                if command.adopt:
                    self._strategy.adopt(self._base)
                self._begin(command.round, now_s, adopted=command.adopt)
                if position is not None and not command.adopt:
                    yield from self._go_on(position, now_s)
            case Merge():
                self._merge(command, now_s)
            case Freeze():
                self._frozen = self.training
            case Evaluate():
                yield self._evaluate()
            case Sample():
                with self._precision():
                    text = self._task.sample(self._base_model(), command.prompt, command.size_bytes)
                yield Sampled(text=text)
            case _:
                raise AssertionError(f"{type(command).__name__} is the worker's")

    def step(self, now_s: float) -> Iterator[Report]:
        """One inner step, at the time at which the caller found nothing else to do."""
        assert self.training, "a trainer that waits takes no step"
        batch = torch.from_numpy(self._batches.batch(self._batches_done)).to(self._device)
        self._batches_done += 1
        with self._precision():
            loss = self._task.loss(self._model, batch)
        if self._checkpoints is not None:
            self._checkpoints.journal.note(self._batches_done)
        if not self._strategy.step(loss):
            yield self._go_back(f"the loss or its gradient at batch {self._batches_done - 1}", now_s)
            return
        for tally in (self._work, self._pace, self._shown):
            tally.add(self._batches.tokens_per_batch, loss.item())
        if now_s - self._shown.since_s >= PROGRESS_PERIOD_S:
            yield self._progress(loss.item(), now_s)
        if self._is_due(now_s):
            yield self._freeze(now_s)

    def _begin(self, round: int, now_s: float, *, adopted: bool) -> None:
        if adopted:
            self._work = _Tally()
        # A peer that was not ready when its round ended trains on towards its own Ready, however slow it is.
        if adopted or not self.training:
            self._pace = _Tally(since_s=now_s)
            self._shown = _Tally(since_s=now_s)
            self._frozen = False
        self._round = round
        self._handed_over = False
        self.training = True

    def _merge(self, merge: Merge, now_s: float) -> None:
        self._resumes = None
        if merge.adopt_all:
            self._strategy.adopt(self._base)
        else:
            self._strategy.merge(self._base, merge.included, merge.part_elements)
        adopted = merge.adopt_all or any(merge.included)
        if adopted:
            self._work = _Tally()
        if merge.begin:
            self._begin(merge.round, now_s, adopted=adopted)
        else:
            self._round = merge.round
            self.training = False

    def _is_due(self, now_s: float) -> bool:
        steps, training = self._pace.steps, self._training
        in_time = now_s - self._pace.since_s >= training.round_time_s and steps >= training.steps_min
        return steps >= training.inner_steps or in_time or self._frozen

    def _freeze(self, now_s: float) -> Report:
        if not self._strategy.export(self._local):
            return self._go_back("the local parameters", now_s)
        self.training = False
        self._handed_over = True
        self._restarts = 0
        self._readies += 1
        problem = self._try_save(now_s) if self._readies % self._save_every == 0 else ""
        return Ready(
            round=self._round,
            steps=self._work.steps,
            tokens=self._work.tokens,
            loss_mean=self._pace.loss_sum / self._pace.steps,
            batches_done=self._batches_done,
            problem=problem,
        )

    def _go_back(self, what: str, now_s: float) -> Report:
        self._strategy.restart(self._base)
        self._begin(self._round, now_s, adopted=True)
        self._restarts += 1
        fatal = self._restarts > RESTARTS_MAX
        self.training = not fatal
        return Failed(reason=NOT_FINITE, detail=f"not finite: {what}, in round {self._round}", fatal=fatal)

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
        self._work = _Tally.of(position.local, now_s)
        self._pace = _Tally.of(position.pace, now_s)
        if position.waits:
            yield self._freeze(now_s)

    def _try_save(self, now_s: float) -> str:
        """Why there is no checkpoint of this moment; empty where there is one, or should be none."""
        if self._checkpoints is None or self._saved_at == self._batches_done:
            return ""
        position = Position(
            round=self._round,
            batches_done=self._batches_done,
            waits=self._handed_over,
            local=self._work.read(now_s),
            pace=self._pace.read(now_s),
        )
        try:
            self._checkpoints.save(position, self._strategy.optimizer_tensors() | self._strategy.parameter_tensors())
        except OSError as error:
            return trim_detail(f"the checkpoint at batch {self._batches_done} was not written: {error}")
        self._saved_at = self._batches_done
        return ""

    def leave(self, now_s: float) -> None:
        """The last word before the process ends: what was trained since the last Ready is kept for the next start."""
        if self.training and self._pace.steps:
            self._try_save(now_s)

    # -- what is told ----------------------------------------------------------------------------------------------

    def _progress(self, loss: float, now_s: float) -> Report:
        rate = self._shown.tokens / (now_s - self._shown.since_s)
        self._shown = _Tally(since_s=now_s)
        return Progress(
            round=self._round, steps=self._work.steps, tokens=self._work.tokens, loss=loss, tokens_per_s=rate
        )

    @torch.no_grad()
    def _evaluate(self) -> Report:
        model = self._base_model()
        total, windows, size = 0.0, torch.from_numpy(self._batches.held_out()), self._training.batch_size
        for first in range(0, len(windows), size):
            piece = windows[first : first + size].to(self._device)
            with self._precision():
                total += self._task.loss(model, piece).item() * len(piece)
        loss = total / len(windows)
        if not np.isfinite(loss):
            return Failed(reason=NOT_FINITE, detail=f"not finite: the base of round {self._round}", fatal=False)
        return Evaluated(round=self._round, loss_nats_per_byte=loss, tokens=windows.numel() - len(windows))

    def _base_model(self) -> nn.Module:
        """A second model with the base in it, so that looking at the base does not disturb the training."""
        if self._evaluated is None:
            self._evaluated = self._task.build_model().to(self._device).requires_grad_(False)
        load_parameters(self._evaluated, self._base)
        return self._evaluated

    def _precision(self) -> torch.autocast:
        """bfloat16 products on a GPU, float32 on a CPU; the parameters are float32 on both."""
        return torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._device.type == "cuda")


class _Tally:
    """Steps, tokens and losses since some moment."""

    __slots__ = ("loss_sum", "since_s", "steps", "tokens")

    def __init__(self, since_s: float = 0.0) -> None:
        self.since_s = since_s
        self.steps = 0
        self.tokens = 0
        self.loss_sum = 0.0

    def add(self, tokens: int, loss: float) -> None:
        self.steps += 1
        self.tokens += tokens
        self.loss_sum += loss

    def read(self, now_s: float) -> Tally:
        """As a value, for a checkpoint."""
        age_s = max(0.0, now_s - self.since_s)
        return Tally(steps=self.steps, tokens=self.tokens, loss_sum=self.loss_sum, age_s=age_s)

    @classmethod
    def of(cls, tally: Tally, now_s: float) -> "_Tally":
        """As it was when it was read; the time in between does not count."""
        made = cls(since_s=now_s - tally.age_s)
        made.steps, made.tokens, made.loss_sum = tally.steps, tally.tokens, tally.loss_sum
        return made


def choose_device(wanted: str) -> torch.device:
    """The device of "auto", "cpu" or "cuda"; raises ConfigError where there is no such one."""
    if wanted == "cuda" and not torch.cuda.is_available():
        fix = 'install a torch that finds the GPU, or set device = "auto"'
        raise ConfigError("trainer.device", "is cuda, but torch finds no GPU", fix)
    return torch.device("cpu" if wanted == "cpu" or not torch.cuda.is_available() else "cuda")
