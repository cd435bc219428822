"""The daemon's side of the compute plane: shared parameters, the trainer port, and the child process behind it.

The daemon owns `base` and writes it; the trainer owns `local` from Begin (or Merge) to Ready, the daemon from Ready on.
What the trainer reports, its death and its silence are events; whether it is started again is the daemon's decision.

Invariant: no child outlives `stop()`, which takes bounded time, nor this process (the child watches its socket); what
the child writes to its standard error takes bounded memory.
"""

import asyncio
import importlib.util
import os
import signal
import socket
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

from shoal.node.config import TrainerTable
from shoal.node.silence_watch import SilenceWatch
from shoal.node.training.base_writes import map_memory, measure_memory
from shoal.node.training.messages import (
    BAD_INPUT,
    Begin,
    Command,
    Compiling,
    DatasetChoice,
    Described,
    Evaluate,
    Evaluated,
    Failed,
    FloatVector,
    FrameReader,
    Freeze,
    Merge,
    Paused,
    Progress,
    Ready,
    Report,
    Sample,
    Sampled,
    Start,
    Started,
    Stop,
    Undescribed,
    Work,
    encode_frame,
)
from shoal.node.vector_files import open_reserved
from shoal.protocol.errors import Failure, ManifestError, ProtocolError, ShoalError
from shoal.protocol.layout import Layout
from shoal.protocol.manifest import Task

START_TIMEOUT_S = 120.0
DESCRIBE_TIMEOUT_S = 120.0
STOP_GRACE_S = 2.0
# On top, for the last checkpoint: three float32 vectors, at the rate of a slow disk.
CHECKPOINT_BYTES_PER_S = 100e6
TERMINATE_GRACE_S = 2.0
CACHE_FOLDER = "tokens"  # in the trainer's own folder
COMPILED_FOLDER = "compiled"  # likewise
RENDEZVOUS_FILE = "rendezvous"
# Of the patience with a step: the first process is to say which other one hangs before it is itself taken for hanging.
RANK_TIMEOUT_SHARE = 0.8
RECEIVE_BYTES = 1 << 16
STDERR_BYTES_MAX = 1 << 13
STDERR_LINES_MAX = 40
# OpenMP's threads spin while they wait for each other. Measured on two busy cores: two spinning threads train at an
# eighth of one thread's rate, two that sleep at nine tenths of it.
PATIENT_THREADS = {"OMP_WAIT_POLICY": "PASSIVE"}
INSTALL_TORCH = "install it: pip install 'shoal[train]'"


class TrainerError(ShoalError):
    """The trainer could not be started; `failure` is TRAINER_CRASHED or TRAINER_STALLED. With `is_final`, it would fail
    again the same way: a person must mend what `detail` says. With `has_left` it was a script that is gone again: the
    next one may be waited for."""

    def __init__(self, failure: Failure, detail: str, *, is_final: bool = False, has_left: bool = False) -> None:
        super().__init__(f"{failure}: {detail}")
        self.failure = failure
        self.detail = detail
        self.is_final = is_final
        self.has_left = has_left


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerExited:
    """The child ended without being asked to. A negative `returncode` is the signal that killed it."""

    returncode: int
    stderr_lines: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerStalled:
    """No report for so long, while there was work. The trainer is still there: `stop()` it. What may recover is waited
    for: a script that does something else for a while."""

    silent_s: float
    may_recover: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerLeft:
    """An attached script has gone, in whatever way. That is no failure: another one may come."""

    detail: str


TrainerEvent = (
    Progress | Ready | Paused | Compiling | Evaluated | Sampled | Failed | TrainerExited | TrainerStalled | TrainerLeft
)


class SharedParameters:
    """`base` and `local`, float32[D] each, in memory, or in a file of `folder`, that a child process maps by its
    descriptor."""

    def __init__(self, elements: int, folder: Path | None = None) -> None:
        """Raises OSError where the machine has not that much of it."""
        self.descriptor = open_reserved(measure_memory(elements), folder)
        try:
            rows, self._writes = map_memory(self.descriptor)
        except OSError:
            self.close()
            raise
        self.base: FloatVector = rows[0]
        self.local: FloatVector = rows[1]

    def writing(self) -> AbstractContextManager[Callable[[int], None]]:
        """Inside, `base` is written, and said of which round it is: no trainer takes what is there."""
        return self._writes.writing()

    def close(self) -> None:
        """No further child can be started. The memory itself goes when the last array over it does."""
        os.close(self.descriptor)


class Trainer(Protocol):
    """What a daemon needs of a trainer: one at a time, started, told, stopped, and started again.

    Events arrive at the callback that the implementation was made with, on the daemon's loop, in order."""

    @property
    def local(self) -> FloatVector: ...

    @property
    def running(self) -> bool:
        """Whether commands have somebody to go to. After TrainerExited it is False."""
        ...

    async def wait(self, tell: Callable[[str], None]) -> None:
        """Returns when there is somebody to start: at once for a child process. Where a person must do something for
        that, `tell` is called with what it is. Raises TrainerError."""
        ...

    async def start(self, work: Work) -> Started:
        """Returns when the trainer waits for its first Begin; raises TrainerError, and nothing is left running."""
        ...

    async def begin(self, round: int, *, adopt: bool, shift: bool = False) -> None:
        """Train for `round`, from `base` with `adopt`, or with what stands in `local` added to the parameters that were
        handed over; answered by Progress and at last by Ready."""
        ...

    async def merge(self, merge: Merge) -> None:
        """Say that `base` has changed by a certified round."""
        ...

    async def freeze(self) -> None:
        """Ask for Ready now."""
        ...

    async def evaluate(self) -> None:
        """Answered by Evaluated."""
        ...

    async def sample(self, prompt: bytes, size_bytes: int) -> None:
        """Answered by Sampled."""
        ...

    async def stop(self) -> None:
        """End it in bounded time, without TrainerExited. Means nothing where none runs."""
        ...


MakeTrainer = Callable[[SharedParameters, TrainerTable, Callable[[TrainerEvent], None], Path], Trainer]


class TrainerProcess:
    """The trainer as a child process. Start it from the main thread: Linux ends it with the thread it came from."""

    def __init__(
        self,
        memory: SharedParameters,
        settings: TrainerTable,
        on_event: Callable[[TrainerEvent], None],
        checkpoints: Path | None = None,
    ) -> None:
        """`checkpoints` is a folder of the trainer's own; without one a restart begins with nothing."""
        self._memory = memory
        self._checkpoints = checkpoints
        self._settings = settings
        self._on_event = on_event
        self._child: _Child | None = None

    @property
    def base(self) -> FloatVector:
        return self._memory.base

    @property
    def local(self) -> FloatVector:
        return self._memory.local

    @property
    def running(self) -> bool:
        return self._child is not None and self._child.attached

    @property
    def pid(self) -> int | None:
        return self._child.process.pid if self._child else None

    async def wait(self, tell: Callable[[str], None]) -> None:
        """There is always a child to start."""

    async def start(self, work: Work) -> Started:
        assert not self.running, "one child at a time"
        await self.stop()
        _require_torch()
        child = self._child = await _Child.spawn(self._memory, self._settings, self._on_event)
        settings = self._settings
        start = Start(
            work=work,
            device=settings.device,
            threads=settings.threads,
            text=settings.text,
            step_period_s=settings.step_period_s,
            checkpoints=str(self._checkpoints) if self._checkpoints and settings.checkpoint_every else None,
            checkpoint_every=max(1, settings.checkpoint_every),
            micro_batch=settings.micro_batch,
            allow_tasks=settings.allow_tasks,
            tokenizer=settings.tokenizer,
            cache=str(self._checkpoints / CACHE_FOLDER) if self._checkpoints else None,
            checkpoint_activations=settings.checkpoint_activations,
            weights=settings.weights,
            processes=settings.processes,
            rendezvous=str(self._checkpoints / RENDEZVOUS_FILE) if self._checkpoints else None,
            rank_timeout_s=RANK_TIMEOUT_SHARE * settings.stall_timeout_s,
            compiled=str(self._checkpoints / COMPILED_FOLDER) if self._checkpoints and settings.compile else None,
            dataset=_choose_dataset(settings),
        )
        await child.send(start)
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                return await asyncio.shield(child.started)
        except TimeoutError:
            detail = f"no word within {START_TIMEOUT_S:.0f} s of its start"
            raise TrainerError(Failure.TRAINER_STALLED, detail) from None
        finally:
            if not child.started.done() or child.started.exception():
                await self.stop()

    async def begin(self, round: int, *, adopt: bool, shift: bool = False) -> None:
        await self._send(Begin(round=round, adopt=adopt, shift=shift))

    async def merge(self, merge: Merge) -> None:
        await self._send(merge)

    async def freeze(self) -> None:
        await self._send(Freeze())

    async def evaluate(self) -> None:
        await self._send(Evaluate())

    async def sample(self, prompt: bytes, size_bytes: int) -> None:
        await self._send(Sample(prompt=prompt, size_bytes=size_bytes))

    async def stop(self) -> None:
        child, self._child = self._child, None
        if child:
            await child.stop()

    async def _send(self, command: Command) -> None:
        # A command to a child that has just died is lost; TrainerExited is on its way.
        if self._child and self._child.attached:
            await self._child.send(command)


class _Child:
    """One child process from its birth to its burial."""

    _reader: asyncio.StreamReader
    _writer: asyncio.StreamWriter
    _attendance: asyncio.Task[None]

    def __init__(
        self,
        process: Process,
        stall_timeout_s: float,
        stop_grace_s: float,
        on_event: Callable[[TrainerEvent], None],
    ) -> None:
        self.process = process
        self._stop_grace_s = stop_grace_s
        self.started: asyncio.Future[Started] = asyncio.get_running_loop().create_future()
        self.attached = True
        self._watch = SilenceWatch(stall_timeout_s, self._report_silence)
        self._stall_timeout_s = stall_timeout_s
        self._on_event = on_event
        self._stopping = False
        self._failure = ""
        self._is_final = False
        self._stderr = bytearray()

    @classmethod
    async def spawn(
        cls, memory: SharedParameters, settings: TrainerTable, on_event: Callable[[TrainerEvent], None]
    ) -> Self:
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                process = await asyncio.create_subprocess_exec(
                    *_python_command("shoal.node.training.worker"),
                    str(theirs.fileno()),
                    str(memory.descriptor),
                    pass_fds=(theirs.fileno(), memory.descriptor),
                    stdin=DEVNULL,
                    stdout=DEVNULL,
                    stderr=PIPE,
                    env=PATIENT_THREADS | os.environ,
                    # Ctrl-C in the terminal is for the daemon, which ends the child in its own time.
                    start_new_session=True,
                )
            except OSError as error:
                ours.close()
                raise TrainerError(Failure.TRAINER_CRASHED, f"no process: {error.strerror}") from error
        # From outside, so that it holds before the long import of torch.
        with suppress(ProcessLookupError, PermissionError):
            os.setpriority(os.PRIO_PROCESS, process.pid, settings.nice)
        stop_grace_s = STOP_GRACE_S + 3 * memory.base.nbytes / CHECKPOINT_BYTES_PER_S
        child = cls(process, settings.stall_timeout_s, stop_grace_s, on_event)
        child._reader, child._writer = await asyncio.open_unix_connection(sock=ours)
        child._attendance = asyncio.create_task(child._attend(), name=f"trainer {process.pid}")
        return child

    async def send(self, command: Command) -> None:
        self._watch.told(command)
        self._write(command)
        with suppress(ConnectionError):
            await self._writer.drain()

    async def stop(self) -> None:
        self._stopping = True
        # Without drain: a child that does not read is ended by signals.
        self._write(Stop())
        await self._end()
        await self._attendance

    def _write(self, command: Command) -> None:
        # A closed transport is no news: the end of the child has been or will be told.
        if not self._writer.is_closing():
            self._writer.write(encode_frame(command))

    async def _attend(self) -> None:
        """Read until the child closes its ends, bury it, and say so."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._read_stderr())
            await self._read_reports()
            await self._end()
            # What it started itself ends with it, but where the kernel knows no such signal and it is stopped. It would
            # also hold the standard error open.
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.attached = False
        self._watch.cancel()
        self._writer.close()
        lines = tuple(self._stderr.decode(errors="replace").splitlines()[-STDERR_LINES_MAX:])
        if not self.started.done():
            detail = self._failure or (lines[-1] if lines else f"exit status {self.process.returncode}")
            error = TrainerError(Failure.TRAINER_CRASHED, detail, is_final=self._is_final)
            self.started.set_exception(error)
            self.started.exception()  # retrieved here, for the case that nobody waits any more
        elif not self._stopping:
            assert self.process.returncode is not None, "buried"
            self._on_event(TrainerExited(returncode=self.process.returncode, stderr_lines=lines))

    async def _read_reports(self) -> None:
        frames = FrameReader()
        with suppress(ConnectionError):
            while data := await self._reader.read(RECEIVE_BYTES):
                try:
                    for report in frames.feed(data):
                        self._receive(report)
                except ProtocolError as error:
                    self._stderr += f"the trainer broke its protocol: {error}\n".encode()
                    return

    def _receive(self, report: Report) -> None:
        if isinstance(report, Started):
            self.started.set_result(report)
            return
        self._watch.heard(report)
        if isinstance(report, Failed) and not self.started.done():
            self._failure = report.detail
            self._is_final = report.reason == BAD_INPUT
        elif not self._stopping:
            self._on_event(report)

    async def _read_stderr(self) -> None:
        assert self.process.stderr is not None, "a pipe was asked for"
        while data := await self.process.stderr.read(RECEIVE_BYTES):
            self._stderr += data
            del self._stderr[:-STDERR_BYTES_MAX]

    async def _end(self) -> None:
        """Wait for the child's exit; the longer it takes, the harder it is asked."""
        for grace_s, number in ((self._stop_grace_s, signal.SIGTERM), (TERMINATE_GRACE_S, signal.SIGKILL)):
            with suppress(TimeoutError):
                async with asyncio.timeout(grace_s):
                    await self.process.wait()
                return
            with suppress(ProcessLookupError):
                self.process.send_signal(number)
        await self.process.wait()

    def _report_silence(self) -> None:
        if not self._stopping:
            self._on_event(TrainerStalled(silent_s=self._stall_timeout_s))


async def describe_task(task: Task, allowed: Sequence[str] = (), weights: Path | None = None) -> Layout:
    """The layout of a task, for its manifest, from a child process that has torch. A task by import path is run where
    `allowed` has the path; the folder `weights`, where there is one, is compared with the model. Raises ManifestError
    where the options are wrong, and TrainerError where the child fails."""
    _require_torch()
    command = (*_python_command("shoal.node.training.tasks"), task.kind, task.options, str(weights or ""), *allowed)
    process = await asyncio.create_subprocess_exec(*command, stdin=DEVNULL, stdout=PIPE, stderr=PIPE)
    try:
        async with asyncio.timeout(DESCRIBE_TIMEOUT_S):
            answer, errors = await process.communicate()
    except TimeoutError:
        detail = f"the task was not described within {DESCRIBE_TIMEOUT_S:.0f} s"
        raise TrainerError(Failure.TRAINER_STALLED, detail) from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        lines = errors[-STDERR_BYTES_MAX:].decode(errors="replace").splitlines() or [f"status {process.returncode}"]
        raise TrainerError(Failure.TRAINER_CRASHED, lines[-1])
    (message,) = FrameReader().feed(answer)
    if isinstance(message, Undescribed):
        raise ManifestError(message.field, message.problem, message.fix)
    assert isinstance(message, Described), "one of the two answers"
    return message.layout


def _choose_dataset(settings: TrainerTable) -> DatasetChoice | None:
    if settings.dataset is None:
        return None
    return DatasetChoice(
        path=settings.dataset,
        config_name=settings.dataset_config,
        split=settings.dataset_split,
        column=settings.dataset_column,
    )


def _python_command(module: str) -> tuple[str, ...]:
    # -P: the folder in which the daemon was started must not shadow torch or the standard library.
    return (sys.executable, "-P", "-m", module)


def _require_torch() -> None:
    if importlib.util.find_spec("torch") is None:
        raise TrainerError(Failure.TRAINER_CRASHED, f"torch is not installed; {INSTALL_TORCH}", is_final=True)
