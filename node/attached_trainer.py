"""The trainer port of a daemon whose swarm trains with scripts of people's own: no child, but whoever attaches itself.

It listens on the Unix socket of the data folder (attach_socket). A script says what its model is, and gets Start with
the descriptor of the shared memory, or a reason why not. One script at a time; when it has gone the next one is waited
for, and its death is no failure of the daemon. The daemon imports nothing of the script.

Invariants: at most HANDSHAKES_MAX connections are not attached yet, each for HANDSHAKE_TIMEOUT_S at most; a script that
does not read costs BUFFER_BYTES_MAX of memory and is hung up on; no command waits for a script.
"""

import asyncio
import logging
import os
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path

from shoal.node.attach_socket import SOCKET_FILE, listen
from shoal.node.config import TrainerTable
from shoal.node.running import DATA_DIR
from shoal.node.silence_watch import SilenceWatch
from shoal.node.trainer import (
    MakeTrainer,
    SharedParameters,
    TrainerError,
    TrainerEvent,
    TrainerLeft,
    TrainerProcess,
    TrainerStalled,
)
from shoal.node.training.custom_task import ATTACHED
from shoal.node.training.messages import (
    Attach,
    AttachedTensor,
    Begin,
    Command,
    Evaluate,
    FloatVector,
    FrameReader,
    Freeze,
    Merge,
    Refused,
    Report,
    Sample,
    Start,
    Started,
    Stop,
    Work,
    encode_frame,
    trim_detail,
)
from shoal.protocol.errors import Failure, ProtocolError
from shoal.protocol.layout import Layout
from shoal.protocol.manifest import Manifest

HANDSHAKES_MAX = 4
HANDSHAKE_TIMEOUT_S = 10.0
ACCEPT_PAUSE_S = 1.0
BUFFER_BYTES_MAX = 1 << 20
RECEIVE_BYTES = 1 << 16
DIFFERENCES_TOLD_MAX = 3

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Candidate:
    """A script that has said who it is and fits; it waits for Start."""

    connection: socket.socket
    frames: FrameReader
    attach: Attach


class AttachedTrainer:
    """Implements `shoal.node.trainer.Trainer`."""

    def __init__(
        self,
        memory: SharedParameters,
        settings: TrainerTable,
        on_event: Callable[[TrainerEvent], None],
        folder: Path,
        *,
        layout: Layout,
    ) -> None:
        """`folder` is the trainer's own in the data folder."""
        self._memory = memory
        self._settings = settings
        self._on_event = on_event
        self._path = folder / SOCKET_FILE
        self._layout = layout
        self._listener: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._handshakes: set[asyncio.Task[None]] = set()
        self._candidate: _Candidate | None = None
        self._arrived = asyncio.Event()
        self._script: _Script | None = None

    @property
    def local(self) -> FloatVector:
        return self._memory.local

    @property
    def running(self) -> bool:
        return self._script is not None and self._script.started.done() and self._script.attached

    async def wait(self, tell: Callable[[str], None]) -> None:
        if self._listener is None:
            try:
                self._listener = listen(self._path)
            except OSError as error:
                detail = f"{self._path} cannot be listened on: {error.strerror or error}"
                raise TrainerError(Failure.TRAINER_CRASHED, detail, is_final=True) from error
            self._accepting = asyncio.create_task(self._accept(self._listener), name="scripts that attach")
        if self._candidate is None:
            tell(describe_next_step(self._path.parents[1]))
        await self._arrived.wait()

    async def start(self, work: Work) -> Started:
        assert self._script is None or not self._script.attached, "one script at a time"
        candidate, self._candidate = self._candidate, None
        self._arrived.clear()
        if candidate is None:
            raise TrainerError(Failure.TRAINER_CRASHED, "the script has gone", has_left=True)
        start = Start(work=work, device="auto", threads=0, text=None)
        script = self._script = _Script(candidate, self._settings.stall_timeout_s, self._on_event)
        try:
            async with asyncio.timeout(HANDSHAKE_TIMEOUT_S):
                await script.begin(start, self._memory.descriptor)
                return replace(await asyncio.shield(script.started), unused=self._list_unused())
        except (TimeoutError, OSError) as error:
            detail = f"the script (process {candidate.attach.process}) has gone: {str(error) or 'it does not answer'}"
            raise TrainerError(Failure.TRAINER_CRASHED, detail, has_left=True) from error
        finally:
            if not script.started.done() or script.started.exception():
                self._script = None
                await script.stop()

    async def begin(self, round: int, *, adopt: bool, shift: bool = False) -> None:
        self._send(Begin(round=round, adopt=adopt, shift=shift))

    async def merge(self, merge: Merge) -> None:
        self._send(merge)

    def _list_unused(self) -> tuple[str, ...]:
        """What is set here for data and models, which are the script's business."""
        names = ("text", "dataset", "tokenizer", "weights")
        return tuple(f"trainer.{name}" for name in names if getattr(self._settings, name) is not None)

    async def freeze(self) -> None:
        self._send(Freeze())

    async def evaluate(self) -> None:
        self._send(Evaluate())

    async def sample(self, prompt: bytes, size_bytes: int) -> None:
        self._send(Sample(prompt=prompt, size_bytes=size_bytes))

    async def stop(self) -> None:
        listener, self._listener = self._listener, None
        tasks = [*self._handshakes, *filter(None, (self._accepting,))]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if listener is not None:
            listener.close()
            with suppress(OSError):
                self._path.unlink()
        candidate, self._candidate = self._candidate, None
        self._arrived.clear()
        if candidate is not None:
            candidate.connection.close()
        script, self._script = self._script, None
        if script is not None:
            await script.stop()

    def _send(self, command: Command) -> None:
        # A command to a script that has just gone is lost; TrainerLeft is on its way.
        if self._script is not None:
            self._script.send(command)

    # -- who comes -----------------------------------------------------------------------------------------------------

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(listener)
            except OSError as error:  # no descriptor left, or a peer that was gone again
                log.warning("a script could not connect: %s", error.strerror or error)
                await asyncio.sleep(ACCEPT_PAUSE_S)
                continue
            if len(self._handshakes) >= HANDSHAKES_MAX:
                connection.close()
                continue
            task = asyncio.create_task(self._meet(connection), name="a script that attaches")
            self._handshakes.add(task)
            task.add_done_callback(self._handshakes.discard)

    async def _meet(self, connection: socket.socket) -> None:
        """Hear who it is, and keep it or say why not."""
        loop, frames = asyncio.get_running_loop(), FrameReader()
        connection.setblocking(False)
        kept = False
        try:
            async with asyncio.timeout(HANDSHAKE_TIMEOUT_S):
                messages: list[object] = []
                while not messages:
                    data = await loop.sock_recv(connection, RECEIVE_BYTES)
                    if not data:
                        return
                    messages = list(frames.feed(data))
                attach = messages[0]
                if not isinstance(attach, Attach):
                    return
                refused = self._judge(attach)
                if refused is not None:
                    log.warning("a script (process %d) is refused: %s", attach.process, refused.problem)
                    await loop.sock_sendall(connection, encode_frame(refused))
                    return
            self._candidate = _Candidate(connection=connection, frames=frames, attach=attach)
            self._arrived.set()
            kept = True
        except (OSError, ProtocolError) as error:
            log.debug("a script that was about to attach: %s", error)
        finally:
            if not kept:
                connection.close()

    def _judge(self, attach: Attach) -> Refused | None:
        differs = find_difference(self._layout, attach.tensors)
        if differs:
            fix = "build the model as the function that the manifest names does"
            return Refused(field="model", problem=trim_detail(differs), fix=fix, final=True)
        other = self._find_other()
        if other is None:
            return None
        fix = "end that one first, or run another daemon with a data folder and ports of its own"
        return Refused(field="home", problem=f"process {other} is attached to this daemon", fix=fix, final=False)

    def _find_other(self) -> int | None:
        """The process of the script that is here already."""
        if self._candidate is not None:
            return self._candidate.attach.process
        return self._script.process if self._script is not None and self._script.attached else None


def choose_trainer(manifest: Manifest) -> MakeTrainer:
    """What trains in the swarm of this manifest."""
    if manifest.task.kind == ATTACHED:
        return partial(AttachedTrainer, layout=manifest.layout)
    return TrainerProcess


class _Script:
    """One attached script, from Start to its end."""

    def __init__(self, candidate: _Candidate, stall_timeout_s: float, on_event: Callable[[TrainerEvent], None]) -> None:
        self.process = candidate.attach.process
        self.started: asyncio.Future[Started] = asyncio.get_running_loop().create_future()
        self.attached = True
        self._connection = candidate.connection
        self._writer: asyncio.StreamWriter | None = None  # until Start is sent
        self._attendance: asyncio.Task[None] | None = None
        self._frames = candidate.frames
        self._watch = SilenceWatch(stall_timeout_s, self._report_silence)
        self._stall_timeout_s = stall_timeout_s
        self._on_event = on_event
        self._stopping = False
        self._last_words = ""

    async def begin(self, start: Start, descriptor: int) -> None:
        """Send Start and the memory, and listen from then on. Raises OSError."""
        frame = encode_frame(start)
        sent = socket.send_fds(self._connection, [frame], [descriptor])
        await asyncio.get_running_loop().sock_sendall(self._connection, frame[sent:])
        reader, self._writer = await asyncio.open_unix_connection(sock=self._connection)
        self._attendance = asyncio.create_task(self._attend(reader, self._writer), name=f"script {self.process}")

    def send(self, command: Command) -> None:
        if not self.attached or self._writer is None or self._writer.is_closing():
            return
        self._watch.told(command)
        self._writer.write(encode_frame(command))
        if self._writer.transport.get_write_buffer_size() > BUFFER_BYTES_MAX:
            self._last_words = "it does not read what it is told"
            self._writer.transport.abort()

    async def stop(self) -> None:
        """Hang up. A script that lives looks for the daemon again."""
        self._stopping = True
        if self._writer is None or self._attendance is None:
            self._connection.close()
            return
        if not self._writer.is_closing():
            self._writer.write(encode_frame(Stop()))
            self._writer.close()
        self._attendance.cancel()
        await asyncio.gather(self._attendance, return_exceptions=True)
        self._end(self._writer)

    async def _attend(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Read until the script closes its end, and say so."""
        with suppress(OSError):
            while data := await reader.read(RECEIVE_BYTES):
                try:
                    for report in self._frames.feed(data):
                        self._receive(report)
                except ProtocolError as error:
                    self._last_words = f"it broke its protocol: {error}"
                    break
        self._end(writer)

    def _end(self, writer: asyncio.StreamWriter) -> None:
        if not self.attached:
            return
        self.attached = False
        self._watch.cancel()
        writer.close()
        detail = f"the script (process {self.process}) has gone"
        detail += f": {self._last_words}" if self._last_words else ""
        if not self.started.done():
            self.started.set_exception(ConnectionError(detail))
            self.started.exception()  # retrieved here, for the case that nobody waits any more
        elif not self._stopping:
            self._on_event(TrainerLeft(detail=detail))

    def _receive(self, report: Report) -> None:
        if isinstance(report, Started):
            if not self.started.done():
                self.started.set_result(report)
            return
        self._watch.heard(report)
        if not self._stopping:
            self._on_event(report)

    def _report_silence(self) -> None:
        if not self._stopping:
            self._on_event(TrainerStalled(silent_s=self._stall_timeout_s, may_recover=True))


def describe_next_step(data_dir: Path) -> str:
    """What a person does so that a script attaches itself to the daemon of this folder."""
    home = "" if data_dir == Path(DATA_DIR).expanduser() else f", home={os.fspath(data_dir)!r}"
    lines = f"`with shoal.attach(model, optimizer{home}) as swarm:` and in its loop `swarm.step(loss, tokens)`"
    return f"waiting for a training script: run one that has {lines} (docs/tasks.md)"


def find_difference(layout: Layout, tensors: Sequence[AttachedTensor]) -> str:
    """How a script's model differs from the swarm's, its names aside; empty where it does not."""
    pairs = list(zip_longest(layout.tensors, tensors))
    differing = [
        f"parameter {index} is {_describe(own)} here and {_describe(named)} in the manifest"
        for index, (named, own) in enumerate(pairs)
        if named is None or own is None or named.shape != own.shape
    ]
    if not differing:
        return ""
    told = "; ".join(differing[:DIFFERENCES_TOLD_MAX])
    counts = f"{len(tensors)} parameters, the manifest's {len(layout.tensors)}"
    return f"is not that of the swarm: it has {counts}, and {len(differing)} differ: {told}"


def _describe(tensor: object) -> str:
    if tensor is None:
        return "missing"
    return f"{getattr(tensor, 'name', '')} {getattr(tensor, 'shape', ())}"
