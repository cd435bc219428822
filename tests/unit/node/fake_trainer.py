"""A trainer without torch, process or clock: each peer pulls its parameters towards one target, with noise of its own.

It obeys the Trainer port to the letter (when `local` holds still, what a merge leaves, how work is counted), reports
through the loop's queue and not from inside a call, and fails when told to.
"""

import asyncio
from collections.abc import Callable

import numpy as np

from shoal.node.trainer import TrainerEvent, TrainerExited, TrainerStalled
from shoal.node.training.messages import (
    NOT_FINITE,
    Evaluated,
    Failed,
    FloatVector,
    Merge,
    Progress,
    Ready,
    Sampled,
    Started,
    Work,
)
from shoal.protocol.quorum import has_member

TOKENS_PER_STEP = 100
STEP_SHARE = 0.05


class FakeTrainer:
    """Implements `shoal.node.trainer.Trainer`. `target` is float32[D], the best parameters there are; `noise` is the
    standard deviation of this peer's way there."""

    def __init__(
        self,
        target: FloatVector,
        on_event: Callable[[TrainerEvent], None],
        *,
        round_s: float = 0.0,
        noise: float = 0.01,
    ) -> None:
        self._target = target
        self._on_event = on_event
        self._round_s = round_s
        self._noise = noise
        self._base = np.zeros_like(target)
        self._local = np.zeros_like(target)
        self._parameters = np.zeros_like(target)
        self._work: Work | None = None
        self._generator = np.random.Generator(np.random.Philox(0))
        self._steps = 0
        self._batches_done = 0
        self._round = 0
        self._ready: asyncio.TimerHandle | None = None
        self.starts = 0
        self.silent = False

    @property
    def base(self) -> FloatVector:
        return self._base

    @property
    def local(self) -> FloatVector:
        return self._local

    @property
    def running(self) -> bool:
        return self._work is not None

    async def wait(self, tell: Callable[[str], None]) -> None:
        """Always there."""

    async def start(self, work: Work) -> Started:
        assert not self.running, "one child at a time"
        self._work = work
        self._generator = np.random.Generator(np.random.Philox(int.from_bytes(work.peer[:8], "big")))
        self._batches_done = work.batches_done
        self._steps = 0
        self.starts += 1
        self.silent = False
        return Started(device="fake", elements=self._base.size, train_bytes=1, held_out_bytes=1)

    async def begin(self, round: int, *, adopt: bool, shift: bool = False) -> None:
        assert not (adopt and shift), "either of them"
        if self._work:
            if adopt:
                self._adopt(slice(None))
            if shift:
                self._parameters += self._local
            self._begin(round)

    async def merge(self, merge: Merge) -> None:
        if not self._work:
            return
        parts = -(-self._base.size // merge.part_elements)
        for part in range(parts):
            if merge.adopt_all or has_member(merge.included, part):
                self._adopt(slice(part * merge.part_elements, (part + 1) * merge.part_elements))
        if merge.begin:
            self._begin(merge.round)
        else:
            self._cancel()
            self._round = merge.round

    async def freeze(self) -> None:
        if self._ready:
            self._cancel()
            self._finish(steps=1)

    async def evaluate(self) -> None:
        self._report(Evaluated(round=self._round - 1, loss_nats=self._loss(self._base), tokens=1))

    async def sample(self, prompt: bytes, size_bytes: int) -> None:
        self._report(Sampled(text=(prompt or b"\n")[:1] * size_bytes))

    async def stop(self) -> None:
        self._cancel()
        self._work = None

    def crash(self, returncode: int = -9) -> None:
        """End as a killed child does."""
        self._cancel()
        self._work = None
        asyncio.get_running_loop().call_soon(
            self._on_event, TrainerExited(returncode=returncode, stderr_lines=("killed by the test",))
        )

    def stall(self) -> None:
        """Report nothing any more but the stall itself, until started again."""
        self._cancel()
        self.silent = True
        asyncio.get_running_loop().call_soon(self._on_event, TrainerStalled(silent_s=1.0))

    def diverge(self) -> None:
        """Meet a loss that is not finite, go back to the base and train on."""
        self._adopt(slice(None))
        self._report(Failed(reason=NOT_FINITE, detail="not finite: by the test", fatal=False))
        self._begin(self._round)

    def _adopt(self, span: slice) -> None:
        self._parameters[span] = self._base[span]
        self._steps = 0

    def _begin(self, round: int) -> None:
        assert self._work is not None
        self._cancel()
        self._round = round
        if not self.silent:
            steps = self._work.training.inner_steps
            self._ready = asyncio.get_running_loop().call_later(self._round_s, self._finish, steps)

    def _finish(self, steps: int) -> None:
        self._ready = None
        pull = 1.0 - (1.0 - STEP_SHARE) ** steps
        self._parameters += (pull * (self._target - self._parameters)).astype(np.float32)
        self._parameters += (self._noise * self._generator.standard_normal(self._base.size)).astype(np.float32)
        self._local[:] = self._parameters
        self._steps += steps
        self._batches_done += steps
        loss, tokens = self._loss(self._parameters), self._steps * TOKENS_PER_STEP
        self._report(Progress(round=self._round, steps=self._steps, tokens=tokens, loss=loss, tokens_per_s=1000.0))
        ready = Ready(
            round=self._round, steps=self._steps, tokens=tokens, loss_mean=loss, batches_done=self._batches_done
        )
        self._report(ready)

    def _report(self, event: TrainerEvent) -> None:
        if self._work and not self.silent:
            asyncio.get_running_loop().call_soon(self._on_event, event)

    def _loss(self, parameters: FloatVector) -> float:
        return float(np.mean((parameters - self._target) ** 2))

    def _cancel(self) -> None:
        if self._ready:
            self._ready.cancel()
        self._ready = None
