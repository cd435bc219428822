"""Several processes behind one trainer: rank 0's side of them.

Rank 0 is the trainer that the daemon knows. It alone has the data, the strategy, the optimizer, the checkpoints and the
clock; the others (follower) give it the gradient of their examples in each batch. So a step is what it is in one
process, but for the order in which the gradients are added up.

Invariants: an exchange is entered only when each rank has said that it will, so that an error in one of them hangs
nobody; whoever dies or does not answer is named, and then all others are ended.
"""

import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from shoal.node.training.messages import COMPILE_TIMEOUT_S, OUT_OF_MEMORY, TASK_FAILED, Start, trim_detail
from shoal.node.training.rank_group import FIRST, RankGroup
from shoal.node.training.rank_line import Done, Drop, Faulted, Follow, Join, RankLine, RankMessage, Reduce
from shoal.node.training.task_faults import TaskFault
from shoal.protocol.errors import ShoalError

JOIN_TIMEOUT_S = 100.0  # less than the daemon waits for the start
EXIT_GRACE_S = 2.0


class RankLost(ShoalError):
    """A process of this trainer has died, hangs, or cannot begin; the text says which, and what happened."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Follower:
    rank: int
    process: "subprocess.Popen[bytes]"
    line: RankLine

    @property
    def name(self) -> str:
        return f"rank {self.rank} (process {self.process.pid})"

    def describe_end(self) -> str:
        try:
            code = self.process.wait(EXIT_GRACE_S)
        except subprocess.TimeoutExpired:
            return f"{self.name} has hung up"
        if code < 0:
            return f"{self.name} was killed by {signal.Signals(-code).name}"
        return f"{self.name} ended with exit status {code}"  # why is on the standard error that all share


class Ranks:
    """All but rank 0. Make it in the main thread: Linux ends the processes with the thread that they came from."""

    def __init__(self, start: Start, count: int, on_lost: Callable[[str], None]) -> None:
        """Starts the processes, which import torch while the caller does other things. `on_lost` is told, in another
        thread, of a process that has died. Raises RankLost."""
        assert count > 1, "rank 0 alone needs nobody"
        assert start.rendezvous is not None, "the trainer has a folder"
        self.count = count
        self._start = start
        self._rendezvous = Path(start.rendezvous)
        self._on_lost = on_lost
        self._lost = ""
        self._closing = False
        self._group: RankGroup | None = None
        self._sizes: set[int] = set()  # of micro-batches that a step was made with
        self._problem = ""
        self._followers: list[_Follower] = []
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        try:
            _make_private(self._rendezvous)
            for rank in range(1, count):
                self._followers.append(_spawn(rank))
            self._watcher.start()
            for follower in self._followers:
                follower.line.send(Follow(rank=follower.rank, count=count, start=start))
        except OSError as error:
            self.close()
            raise RankLost(f"{count} processes cannot be started: {error}") from error

    def join(self, model: nn.Module) -> None:
        """Wait until each rank has this model, too. Its parameters and gradients are views of longer vectors then.
        Raises RankLost, MemoryError and TaskFault."""
        deadline_s = time.monotonic() + JOIN_TIMEOUT_S
        _raise_first(self._hear(deadline_s))
        self._tell(Join(), deadline_s)
        self._group = RankGroup(model)
        with self._exchange():
            self._group.join(self._rendezvous, FIRST, self.count, self._start.rank_timeout_s)
        _raise_first(self._hear(deadline_s))

    def gather(self, batch: NDArray[Any], size: int, run: Callable[[Tensor], Tensor]) -> Tensor:
        """The loss of a batch (examples, …), a scalar, with its gradient in the model. Each rank takes its part of the
        examples, `size` at a time; `run` does for the examples of this one, and may raise. Raises RankLost, and
        MemoryError and TaskFault of any rank, with nothing gathered in the others."""
        assert self._group is not None, "joined"
        own, *shares = np.array_split(batch, self.count)
        deadline_s = self._set_deadline(size)
        with self._named() as name:
            for follower, share in zip(self._followers, shares, strict=True):
                name(follower)
                follower.line.compute(share, len(batch), size, deadline_s)
        self._hear(deadline_s)  # each has its examples, and enters the exchange
        with self._exchange():
            self._group.share_parameters()
        loss: Tensor | None = None
        faults: dict[_Follower, Faulted] = {}
        try:
            loss = run(torch.from_numpy(own))
        finally:
            faults = self._hear(deadline_s)
            self._tell(Drop() if loss is None or faults else Reduce(), deadline_s)
        _raise_first(faults)
        with self._exchange():
            total = self._group.add_up(loss)
        self._sizes.add(size)
        return total

    def take_problem(self) -> str:
        """What some rank goes on without, once."""
        problem, self._problem = self._problem, ""
        return problem

    def close(self) -> None:
        """All processes end, in bounded time."""
        self._closing = True
        for follower in self._followers:
            follower.line.hang_up()
        if self._watcher.is_alive():
            self._watcher.join()
        for follower in self._followers:
            with suppress(subprocess.TimeoutExpired):
                follower.process.wait(EXIT_GRACE_S)
            follower.process.kill()
            follower.process.wait()
            follower.line.close()
        if self._group is not None:
            self._group.leave()
        with suppress(OSError):
            self._rendezvous.unlink()

    # -- what goes wrong -----------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Until a process hangs up. It may do so while this one is deep in an exchange, and that one would hang."""
        poll = select.poll()
        by_descriptor = {follower.line.fileno(): follower for follower in self._followers}
        for descriptor in by_descriptor:
            poll.register(descriptor, 0)  # a hang-up is reported without being asked for
        gone = [by_descriptor[descriptor] for descriptor, _ in poll.poll()]
        if self._closing:
            return
        self._lost = gone[0].describe_end()
        for follower in self._followers:
            follower.process.kill()
        self._on_lost(self._lost)

    def _find_loss(self, otherwise: str) -> RankLost:
        """What an exchange or a line failed of: a process that has died, if one has."""
        self._watcher.join(2 * EXIT_GRACE_S)
        return RankLost(trim_detail(self._lost or otherwise))

    @contextmanager
    def _exchange(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise self._find_loss(f"the processes cannot exchange gradients: {error}") from error

    @contextmanager
    def _named(self) -> Iterator[Callable[[_Follower], None]]:
        """Make a RankLost of what goes wrong on the line of the follower that was named last."""
        named: list[_Follower] = []
        began_s = time.monotonic()
        try:
            yield named.append
        except TimeoutError as error:
            waited_s = time.monotonic() - began_s
            raise RankLost(f"{named[-1].name} hangs: no answer for {waited_s:.0f} s") from error
        except OSError as error:
            raise self._find_loss(f"{named[-1].name}: {error}") from error

    def _tell(self, message: RankMessage, deadline_s: float) -> None:
        with self._named() as name:
            for follower in self._followers:
                name(follower)
                follower.line.send(message, deadline_s)

    def _hear(self, deadline_s: float) -> dict[_Follower, Faulted]:
        """One answer of each rank; those that are faults."""
        faults: dict[_Follower, Faulted] = {}
        with self._named() as name:
            for follower in self._followers:
                name(follower)
                match follower.line.receive(deadline_s):
                    case Faulted() as fault:
                        faults[follower] = fault
                    case Done() as done:
                        self._problem = self._problem or (done.problem and f"rank {follower.rank} {done.problem}")
                    case other:
                        raise AssertionError(f"{type(other).__name__} is no answer")
        return faults

    def _set_deadline(self, size: int) -> float:
        compiling_s = COMPILE_TIMEOUT_S if self._start.compiled and size not in self._sizes else 0.0
        return time.monotonic() + self._start.rank_timeout_s + compiling_s


def _spawn(rank: int) -> _Follower:
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            # -P: the folder in which the daemon was started must not shadow torch or the standard library.
            [sys.executable, "-P", "-m", "shoal.node.training.follower", str(theirs.fileno())],
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
    return _Follower(rank=rank, process=process, line=RankLine(ours))


def _make_private(path: Path) -> None:
    """A new file, which is nobody else's to read: it says where the ranks listen."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))


def _raise_first(faults: dict[_Follower, Faulted]) -> None:
    for follower, fault in faults.items():
        told = f"in {follower.name}: {fault.detail}"
        if fault.reason == OUT_OF_MEMORY:
            raise MemoryError(told)
        if fault.reason == TASK_FAILED:
            raise TaskFault(trim_detail(told))
        raise RankLost(trim_detail(told))
