"""What the first process of a trainer and the others say to each other, over a socket between each two of them.

Frames are a big-endian u32 length and one canonical message; the examples of Compute follow it as they are in memory.
Gradients and parameters do not go this way (rank_group).

Invariant: nobody waits for ever for the other one where there is a deadline, and a broken line is an OSError.
"""

import socket
import struct
import time
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray

from shoal.node.training.messages import BAD_INPUT, OUT_OF_MEMORY, PROCESSES_MAX, TASK_FAILED, Detail, Start
from shoal.protocol.manifest import BATCH_SIZE_MAX
from shoal.protocol.wire import DELTA_BYTES_MAX, U63, Bound, Choice, Schema

DIMENSIONS_MAX = 16
EXAMPLES_BYTES_MAX = 1 << 40
_LENGTH = struct.Struct(">I")


@dataclass(frozen=True, slots=True, kw_only=True)
class Follow:
    """The first frame: which rank this process is, of how many, and what rank 0 was started with."""

    rank: Annotated[int, Bound(1, PROCESSES_MAX - 1)]
    count: Annotated[int, Bound(2, PROCESSES_MAX)]
    start: Start


@dataclass(frozen=True, slots=True, kw_only=True)
class Join:
    """All models are built: meet at the rendezvous."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compute:
    """Take the parameters of rank 0, then the gradient of the examples that follow this frame, `size` at a time, as
    their part in a batch of `whole`. None of them is possible."""

    dtype: Annotated[str, Bound(1, 16)]
    shape: Annotated[tuple[Annotated[int, Bound(0, 2**40)], ...], Bound(1, DIMENSIONS_MAX)]
    whole: Annotated[int, Bound(1, 2**40)]
    size: Annotated[int, Bound(1, BATCH_SIZE_MAX)]
    size_bytes: Annotated[U63, Bound(0, EXAMPLES_BYTES_MAX)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reduce:
    """Every rank has its part: add them up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drop:
    """Some rank has none: forget yours."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """Of whatever was asked last. `problem` is what a person should know all the same."""

    problem: Detail = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Faulted:
    """It could not be done; the rank waits for what comes next."""

    reason: Annotated[str, Choice((BAD_INPUT, OUT_OF_MEMORY, TASK_FAILED))]
    detail: Detail


RankMessage = Follow | Join | Compute | Reduce | Drop | Done | Faulted

SCHEMA = Schema({1: Follow, 2: Join, 3: Compute, 4: Reduce, 5: Drop, 20: Done, 21: Faulted})


class RankLine:
    """One end. Deadlines are of time.monotonic; without one it waits as long as the other end lives."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: RankMessage, deadline_s: float | None = None) -> None:
        """Raises OSError, of which TimeoutError is one."""
        body = SCHEMA.encode(message)
        assert len(body) <= DELTA_BYTES_MAX, "every message of this schema fits a frame"
        self._send(_LENGTH.pack(len(body)) + body, deadline_s)

    def compute(self, examples: NDArray[Any], whole: int, size: int, deadline_s: float) -> None:
        """Send Compute with its examples; raises OSError."""
        dense = np.ascontiguousarray(examples)
        head = Compute(dtype=dense.dtype.str, shape=examples.shape, whole=whole, size=size, size_bytes=examples.nbytes)
        self.send(head, deadline_s)
        self._send(memoryview(dense.reshape(-1).view(np.uint8).data), deadline_s)

    def receive(self, deadline_s: float | None = None) -> RankMessage:
        """The next message; raises OSError. A frame that is none raises ProtocolError: both ends are the same code."""
        (length,) = _LENGTH.unpack(self._take(_LENGTH.size, deadline_s))
        assert length <= DELTA_BYTES_MAX, "as it was sent"
        message: RankMessage = SCHEMA.decode_untrusted(bytes(self._take(length, deadline_s)), DELTA_BYTES_MAX)
        return message

    def receive_examples(self, head: Compute) -> NDArray[Any]:
        """What follows a Compute; raises OSError."""
        return np.frombuffer(self._take(head.size_bytes, None), dtype=head.dtype).reshape(head.shape)

    def hang_up(self) -> None:
        """Both ends see it at once. The descriptor stays, for who watches it, until `close`."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # it was hung up on

    def close(self) -> None:
        self._socket.close()

    def _send(self, data: bytes | memoryview, deadline_s: float | None) -> None:
        self._set_deadline(deadline_s)
        self._socket.sendall(data)

    def _take(self, size: int, deadline_s: float | None) -> bytearray:
        taken = bytearray(size)
        left = memoryview(taken)
        while left:
            self._set_deadline(deadline_s)
            received = self._socket.recv_into(left)
            if not received:
                raise ConnectionError("the other process has gone")
            left = left[received:]
        return taken

    def _set_deadline(self, deadline_s: float | None) -> None:
        # Never 0, which would mean not to wait at all.
        self._socket.settimeout(None if deadline_s is None else max(1e-3, deadline_s - time.monotonic()))
