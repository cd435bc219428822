"""The trainer as a process: `python -m shoal.node.training.worker SOCKET_FD MEMORY_FD`, started by shoal.node.trainer.

It joins a socket and an inner loop: commands are read between two steps, or waited for while there is nothing to train.

Invariant: the process never outlives its daemon, not even in the middle of a step, and writes nothing but its socket,
its half of the shared memory, its standard error and its own folder of checkpoints. It asks the network for nothing but
the data set of the hub that the person at this machine has named.
"""

import os
import select
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

import torch

from shoal.node.training.base_writes import BaseWrites, FloatRows, map_memory
from shoal.node.training.compiled import open_compiled
from shoal.node.training.devices import choose_device, count_ranks
from shoal.node.training.loop import InnerLoop
from shoal.node.training.messages import (
    BAD_INPUT,
    OUT_OF_MEMORY,
    RANK_LOST,
    TASK_FAILED,
    Command,
    Failed,
    FrameReader,
    Report,
    Start,
    Stop,
    encode_frame,
    trim_detail,
)
from shoal.node.training.micro_batches import is_out_of_memory, tell_next_step
from shoal.node.training.parent_watch import end_with_parent
from shoal.node.training.ranks import RankLost, Ranks
from shoal.node.training.task_faults import TaskFault
from shoal.protocol.errors import InputError

RECEIVE_BYTES = 1 << 16


class Channel:
    """Frames over the inherited socket. The daemon's absence, at any point, ends the process."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._reader = FrameReader()
        self._sending = threading.Lock()  # one frame at a time: a rank's death is told by another thread

    def receive(self, *, wait: bool) -> list[Command]:
        """The commands that are here; with `wait`, at least some bytes are waited for."""
        try:
            data = self._connection.recv(RECEIVE_BYTES, 0 if wait else socket.MSG_DONTWAIT)
        except BlockingIOError:
            return []
        except ConnectionError:
            data = b""
        if not data:
            raise SystemExit(0)
        return list(self._reader.feed(data))

    def rest(self, timeout_s: float) -> None:
        """Until something is there to receive, or for so long."""
        select.select([self._connection], [], [], max(0.0, timeout_s))

    def send(self, reports: Iterable[Report]) -> None:
        """Send the reports; the process ends after a fatal one."""
        for report in reports:
            try:
                with self._sending:
                    self._connection.sendall(encode_frame(report))
            except ConnectionError:
                raise SystemExit(0) from None
            if isinstance(report, Failed) and report.fatal:
                raise SystemExit(1)


def serve(channel: Channel, memory: FloatRows, writes: BaseWrites) -> None:
    """Train as told until Stop."""
    commands = channel.receive(wait=True)
    while not commands:
        commands = channel.receive(wait=True)
    start = commands.pop(0)
    assert isinstance(start, Start), "the first frame is Start"
    with open_loop(channel, start, memory, writes) as loop:
        channel.send([loop.started()])
        train(channel, start, loop, commands)


@contextmanager
def open_loop(channel: Channel, start: Start, memory: FloatRows, writes: BaseWrites) -> Iterator[InnerLoop]:
    """The loop, and the other processes of this trainer as long as it lasts. What keeps it from beginning is reported,
    and ends the process."""
    with ExitStack() as undo:
        ranks: Ranks | None = None
        try:
            if start.compiled is not None:
                open_compiled(Path(start.compiled))
            count = count_ranks(start.processes, choose_device(start.device), start.work.training.batch_size)
            if count > 1:
                # First, so that they import torch while this process opens the data.
                ranks = Ranks(start, count, partial(end_with_rank, channel))
                undo.callback(ranks.close)
            if start.threads or count > 1:
                torch.set_num_threads(max(1, (start.threads or torch.get_num_threads()) // count))
            loop = InnerLoop(start, memory, ranks, writes)
        except InputError as error:
            channel.send([Failed(reason=BAD_INPUT, detail=trim_detail(str(error)), fatal=True)])
        except TaskFault as fault:
            detail = trim_detail(f"the task's code raised {fault}")
            channel.send([Failed(reason=TASK_FAILED, detail=detail, fatal=True)])
        except RankLost as lost:
            channel.send([Failed(reason=RANK_LOST, detail=trim_detail(str(lost)), fatal=True)])
        yield loop


def train(channel: Channel, start: Start, loop: InnerLoop, commands: list[Command]) -> None:
    """Until Stop."""
    step_due_s = 0.0
    while True:
        for command in commands:
            if isinstance(command, Stop):
                loop.leave(time.monotonic())
                return
            channel.send(loop.handle(command, time.monotonic()))
        if loop.training and time.monotonic() >= step_due_s:
            step_due_s = time.monotonic() + start.step_period_s
            channel.send(loop.step(time.monotonic()))
        if loop.training and start.step_period_s:
            channel.rest(step_due_s - time.monotonic())
        commands = channel.receive(wait=not loop.training)


def end_with_rank(channel: Channel, detail: str) -> None:
    """Another process of this trainer has died. This one may hang in an exchange with it, so it says so and ends from
    outside of it."""
    with suppress(SystemExit):
        channel.send([Failed(reason=RANK_LOST, detail=trim_detail(detail), fatal=True)])
    os._exit(1)


def main(arguments: list[str]) -> None:
    """Exits with 0 after Stop or when the daemon is gone, with 1 after a fatal report."""
    connection = socket.socket(fileno=int(arguments[0]))
    end_with_parent(connection.fileno())
    descriptor = int(arguments[1])
    memory, writes = map_memory(descriptor)
    os.close(descriptor)
    channel, code = Channel(connection), 0
    try:
        serve(channel, memory, writes)
    except SystemExit as leaving:
        code = int(leaving.code or 0)
    except (RuntimeError, MemoryError) as error:
        # Not by the size of a batch, which the loop sees to: the parameters, the optimizer's state or a sample.
        if not is_out_of_memory(error):
            raise
        detail = trim_detail(f"the model does not fit into memory: {tell_next_step(error)} ({error})")
        with suppress(SystemExit):
            channel.send([Failed(reason=OUT_OF_MEMORY, detail=detail, fatal=True)])
        code = 1
    # Taking torch down in good order takes a second on a busy machine, and there is nothing to save.
    os._exit(code)


if __name__ == "__main__":
    main(sys.argv[1:])
