"""The trainer as a process: `python -m shoal.node.training.worker SOCKET_FD MEMORY_FD`, started by shoal.node.trainer.

It joins a socket and an inner loop: commands are read between two steps, or waited for while there is nothing to train.

Invariant: the process never outlives its daemon, not even in the middle of a step, and writes nothing but its socket,
its half of the shared memory, its standard error and its own folder of checkpoints. It asks the network for nothing but
the data set of the hub that the person at this machine has named.
"""

import ctypes
import mmap
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterable

import numpy as np
import torch

from shoal.node.training.loop import InnerLoop
from shoal.node.training.messages import (
    BAD_INPUT,
    OUT_OF_MEMORY,
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
from shoal.node.training.task_faults import TaskFault
from shoal.protocol.errors import InputError

RECEIVE_BYTES = 1 << 16
PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Channel:
    """Frames over the inherited socket. The daemon's absence, at any point, ends the process."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._reader = FrameReader()

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
                self._connection.sendall(encode_frame(report))
            except ConnectionError:
                raise SystemExit(0) from None
            if isinstance(report, Failed) and report.fatal:
                raise SystemExit(1)


def serve(channel: Channel, memory: np.ndarray[tuple[int, int], np.dtype[np.float32]]) -> None:
    """Train as told until Stop."""
    commands = channel.receive(wait=True)
    while not commands:
        commands = channel.receive(wait=True)
    start = commands.pop(0)
    assert isinstance(start, Start), "the first frame is Start"
    if start.threads:
        torch.set_num_threads(start.threads)
    try:
        loop = InnerLoop(start, memory)
    except InputError as error:
        channel.send([Failed(reason=BAD_INPUT, detail=trim_detail(str(error)), fatal=True)])
        return
    except TaskFault as fault:
        detail = trim_detail(f"the task's code raised {fault}")
        channel.send([Failed(reason=TASK_FAILED, detail=detail, fatal=True)])
        return
    channel.send([loop.started()])
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


def end_with_parent(connection: socket.socket) -> None:
    """Arrange that this process dies when the other end of the socket does.

    The kernel's parent-death signal needs no cooperation of a busy interpreter, but is Linux's alone and comes too late
    for a parent that is already gone; the watching thread covers both."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=_exit_on_hangup, args=(connection.fileno(),), daemon=True).start()


def _exit_on_hangup(descriptor: int) -> None:
    poll = select.poll()
    poll.register(descriptor, 0)  # a hang-up is reported without being asked for
    poll.poll()
    os._exit(0)


def main(arguments: list[str]) -> None:
    """Exits with 0 after Stop or when the daemon is gone, with 1 after a fatal report."""
    connection = socket.socket(fileno=int(arguments[0]))
    end_with_parent(connection)
    descriptor = int(arguments[1])
    shared = mmap.mmap(descriptor, 0)
    os.close(descriptor)
    try:
        serve(Channel(connection), np.frombuffer(shared, dtype=np.float32).reshape(2, -1))
    except (RuntimeError, MemoryError) as error:
        # Not by the size of a batch, which the loop sees to: the parameters, the optimizer's state or a sample.
        if not is_out_of_memory(error):
            raise
        detail = trim_detail(f"the model does not fit into memory: {tell_next_step(error)} ({error})")
        Channel(connection).send([Failed(reason=OUT_OF_MEMORY, detail=detail, fatal=True)])
    # Taking torch down in good order takes a second on a busy machine, and there is nothing to save.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
