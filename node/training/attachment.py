"""`shoal.attach`: a training script of one's own takes part in the swarm of the daemon that runs on its machine.

It joins a socket and an AttachedLoop. Everything happens within `step`, which the script calls after each step of its
optimizer: no thread, no signal. Where what was handed over waits for its round `step` waits, too; without a daemon it
returns at once, and tries to reconnect now and then.

Invariants: at most one try to connect each RECONNECT_FIRST_S, and fewer the longer it fails; no wait within a try takes
longer than HANDSHAKE_TIMEOUT_S; a command that a daemon sent before it died is not obeyed, because its base may be half
written, and a base that a living daemon writes is waited for.
"""

import logging
import os
import select
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from shoal.node.attach_socket import connect, find_socket
from shoal.node.running import DATA_DIR, read_running
from shoal.node.training.attached_loop import AttachedLoop, AttachError
from shoal.node.training.base_writes import POLL_S, BaseWrites, FloatRows, WriterGone, map_memory
from shoal.node.training.local_parameters import Evaluation, LocalParameters
from shoal.node.training.messages import (
    Attach,
    AttachedTensor,
    Command,
    Failed,
    FrameReader,
    Refused,
    Report,
    Start,
    Stop,
    encode_frame,
)
from shoal.node.training.script_ranks import HEARTBEAT_S, ScriptRanks, Word, are_joined
from shoal.protocol.errors import ConfigError, InputError, ProtocolError
from shoal.protocol.layout import DIMENSIONS_MAX, NAME_BYTES_MAX, TENSORS_MAX

HANDSHAKE_TIMEOUT_S = 10.0
FIRST_BASE_TIMEOUT_S = 120.0
RECONNECT_FIRST_S = 1.0
RECONNECT_MAX_S = 30.0
WAIT_POLL_S = 0.2
RECEIVE_BYTES = 1 << 16

log = logging.getLogger(__name__)


class Reconnection:
    """When to look for the daemon again. The first try is due RECONNECT_FIRST_S after it was lost. One that is lost
    again before it has said where to begin was not found: that try has failed."""

    def __init__(self) -> None:
        self._pause_s = RECONNECT_FIRST_S
        self._due_s = 0.0

    def found(self) -> None:
        self._pause_s = RECONNECT_FIRST_S

    def lost(self, now_s: float) -> None:
        self._due_s = now_s + self._pause_s

    def failed(self, now_s: float) -> None:
        """A try has failed; the next one waits twice as long, up to RECONNECT_MAX_S."""
        self._pause_s = min(2 * self._pause_s, RECONNECT_MAX_S)
        self._due_s = now_s + self._pause_s

    def is_due(self, now_s: float) -> bool:
        return now_s >= self._due_s


class RefusedError(Exception):
    """The daemon does not take this script."""

    def __init__(self, refused: Refused) -> None:
        super().__init__(refused.problem)
        self.error = ConfigError(refused.field, refused.problem, refused.fix)
        self.final = refused.final


class Line:
    """A connection to the daemon, from Attach on. Whatever ends it is an OSError."""

    def __init__(self, path: Path) -> None:
        self._socket = connect(path, HANDSHAKE_TIMEOUT_S)
        self._frames = FrameReader()

    def shake_hands(self, attach: Attach) -> tuple[Start, FloatRows, BaseWrites]:
        """Start, and the memory that came with it. Raises RefusedError."""
        descriptors: list[int] = []
        try:
            self._socket.sendall(encode_frame(attach))
            messages: list[Any] = []
            while not messages:
                data, got, _, _ = socket.recv_fds(self._socket, RECEIVE_BYTES, 1)
                descriptors += got
                messages = self._read(data)
            start = messages[0]
            if isinstance(start, Refused):
                raise RefusedError(start)
            if not isinstance(start, Start) or len(messages) > 1 or len(descriptors) != 1:
                raise ConnectionError("the daemon broke its protocol")
            rows, writes = map_memory(descriptors[0], self._rest)
        finally:
            for one in descriptors:
                os.close(one)
        return start, rows, writes

    def send(self, reports: Iterable[Report]) -> None:
        self._socket.settimeout(HANDSHAKE_TIMEOUT_S)
        for report in reports:
            self._socket.sendall(encode_frame(report))

    def receive(self, timeout_s: float | None) -> list[Command]:
        """The commands that are here. With a timeout of 0 they are not waited for, with None for ever."""
        self._socket.settimeout(timeout_s)
        try:
            data = self._socket.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return []
        commands = self._read(data)
        if commands and self._has_ended():
            raise ConnectionError("the daemon is gone")
        return commands

    def comes_within(self, timeout_s: float) -> bool:
        """Whether there is something to receive, be it the end, within so long."""
        return bool(select.select([self._socket], [], [], timeout_s)[0])

    def close(self) -> None:
        with suppress(OSError):  # for the copies that forked workers of a data loader hold
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _rest(self) -> bool:
        """Wait a moment; False where the daemon is gone, whatever it has said before."""
        time.sleep(POLL_S)
        poll = select.poll()
        poll.register(self._socket, 0)  # a hang-up is reported without being asked for
        return not poll.poll(0)

    def _read(self, data: bytes) -> list[Any]:
        if not data:
            raise ConnectionError("the daemon is gone")
        try:
            return list(self._frames.feed(data))
        except ProtocolError as error:
            raise ConnectionError(f"the daemon broke its protocol: {error}") from error

    def _has_ended(self) -> bool:
        self._socket.settimeout(0)  # Python waits for the time-out, whatever the flags say
        try:
            return not self._socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False


class Attachment:
    """A script's place in the swarm; `attach` makes one. Use it as a context, or `close` it."""

    def __init__(self, loop: AttachedLoop, path: Path, described: Attach) -> None:
        self._loop = loop
        self._path = path
        self._described = described
        self._line: Line | None = None
        self._reconnection = Reconnection()
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def attached(self) -> bool:
        """Whether the daemon is there."""
        return self._is_connected()

    def _is_connected(self) -> bool:
        return self._line is not None

    @property
    def round(self) -> int:
        """The round that is trained for."""
        return self._loop.round

    @property
    def share(self) -> tuple[int, int]:
        """Which share of the data is this peer's, where the swarm divides them: its place, and among how many."""
        return self._loop.share

    def step(self, loss: Tensor | float, tokens: int = 1) -> bool:
        """Say that the optimizer has made a step: its loss, a mean over so many tokens (or examples). True where the
        parameters of the model have been replaced by the swarm's, or moved to the mean with another peer's. Where this
        peer's work is handed over it returns when the round is certified, or when there is none and it may train on.

        Raises AttachError where the training cannot go on: too many losses in a row that are not finite, or a daemon
        that came back with another model."""
        self._count(self._read(loss), tokens)
        while self._waits:
            self._obey(None)
        return self._loop.take_replaced()

    def _read(self, loss: Tensor | float) -> float:
        if self._closed:
            raise AttachError("this script is detached: step() was called after close()")
        return float(loss.detach()) if isinstance(loss, Tensor) else float(loss)

    @property
    def _waits(self) -> bool:
        """Whether there is nothing to do before the daemon says more."""
        return self._line is not None and self._loop.waits

    def _count(self, value: float, tokens: int) -> None:
        """A step was made; what the daemon has said until now is obeyed. Raises AttachError."""
        reports = self._collect(self._loop.step(value, tokens, time.monotonic()))
        self._report(reports)
        if reports and isinstance(last := reports[-1], Failed) and last.fatal:
            self.close()
            raise AttachError(f"{last.detail}; lower the learning rate, or clip the gradient")
        if self._line is not None:
            self._obey(0.0)
        elif self._reconnection.is_due(time.monotonic()):
            self._reconnect()

    def close(self) -> None:
        """Detach: the daemon goes on without this script, and waits for the next one."""
        self._closed = True
        if self._line is not None:
            self._line.close()
        self._line = None

    # -- the daemon ----------------------------------------------------------------------------------------------------

    def begin(self, folder: Path, wait_s: float) -> None:
        """Attach to the daemon of this folder, which is waited for so long. Raises ConfigError and AttachError."""
        deadline_s = time.monotonic() + wait_s
        while True:
            try:
                self.connect(FIRST_BASE_TIMEOUT_S)
                break
            except RefusedError as refused:
                if refused.final or time.monotonic() >= deadline_s:
                    raise refused.error from None
            except OSError as error:
                if time.monotonic() >= deadline_s:
                    raise explain(folder, error) from error
            time.sleep(WAIT_POLL_S)
        if self._line is None or not self._loop.round:
            self.close()
            raise AttachError(f"the daemon of {folder} has not said where to begin; see its log")
        self._loop.take_replaced()

    def connect(self, timeout_s: float) -> None:
        """Attach to the daemon, and wait so long for its first command, which says where to begin. Raises OSError and
        RefusedError."""
        line = Line(self._path)
        with ExitStack() as undo:
            undo.callback(line.close)
            start, memory, writes = line.shake_hands(self._described)
            line.send([self._loop.start(start.work, memory, self._described.device, writes)])
            undo.pop_all()
        self._line = line
        self._obey(timeout_s)

    def _reconnect(self) -> None:
        try:
            self.connect(HANDSHAKE_TIMEOUT_S)
        except RefusedError as refused:
            if refused.final:
                self.close()
                raise AttachError(str(refused.error)) from refused
            self._reconnection.failed(time.monotonic())
            log.warning("%s", refused.error)
        except OSError as error:
            self._reconnection.failed(time.monotonic())
            log.debug("no daemon at %s: %s", self._path, error)
        else:
            if self._line is None:
                self._reconnection.failed(time.monotonic())
                return
            self._reconnection.found()
            log.warning("attached again, in round %d", self._loop.round)

    def _obey(self, timeout_s: float | None) -> None:
        """Take the commands that are here, or that come in so long."""
        assert self._line is not None
        try:
            commands = self._line.receive(timeout_s)
        except OSError as error:
            self._lose(str(error))
            return
        for command in commands:
            if isinstance(command, Stop):
                self._lose("the daemon has hung up")
                return
            self._report(self._loop.handle(command, time.monotonic()))
            if not self._is_connected():
                return

    def _report(self, reports: Iterable[Report]) -> None:
        if self._line is None:
            return
        made = self._collect(reports)  # before anything is caught: the script's own code may raise, too
        if not self._is_connected():
            return
        try:
            self._line.send(made)
        except OSError as error:
            self._lose(str(error))

    def _collect(self, reports: Iterable[Report]) -> list[Report]:
        """What the loop has made of a step or a command; none where the daemon has gone in the middle of a new base."""
        try:
            return list(reports)
        except WriterGone as gone:
            self._lose(str(gone))
            return []

    def _lose(self, why: str) -> None:
        assert self._line is not None
        self._line.close()
        self._line = None
        now_s = time.monotonic()
        self._loop.lose(now_s)
        self._reconnection.lost(now_s)
        log.warning("%s: training goes on without it, and it is looked for again", why)


class RankAttachment(Attachment):
    """That of one of several processes of a script, joined by torch.distributed. Rank 0 is attached, and the others do
    what it says; `begin` and `step` are exchanges between all of them."""

    def __init__(
        self, loop: AttachedLoop, path: Path, described: Attach, ranks: ScriptRanks, optimizer: torch.optim.Optimizer
    ) -> None:
        super().__init__(loop, path, described)
        self._ranks = ranks
        self._optimizer = optimizer
        self._word = Word()

    @property
    def attached(self) -> bool:
        return self._word.attached

    @property
    def round(self) -> int:
        return self._word.round

    @property
    def share(self) -> tuple[int, int]:
        return self._word.place, self._word.places

    def begin(self, folder: Path, wait_s: float) -> None:
        if self._ranks.is_first:
            with self._telling():
                super().begin(folder, wait_s)
        else:
            self._follow()
        self._ranks.share_parameters()

    def step(self, loss: Tensor | float, tokens: int = 1) -> bool:
        """As of one process, but `loss` and `tokens` are those of this rank's part of the batch."""
        value, counted = self._ranks.average(self._read(loss), tokens)
        if self._ranks.is_first:
            with self._telling():
                self._count(value, counted)
                while self._waits:
                    self._ranks.say(Word(waits=True))
                    self._rest(HEARTBEAT_S)
        else:
            self._follow()
        if self._word.replaced:
            self._ranks.share_parameters()
        return self._word.replaced

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """Tell the others at the end what has come of it: also of an error, because they wait for a word."""
        self._word = Word(ended=True)
        try:
            yield
            loop = self._loop
            place, places = loop.share
            self._word = Word(
                replaced=loop.take_replaced(),
                cleared=loop.take_cleared(),
                attached=self._is_connected(),
                round=loop.round,
                place=place,
                places=places,
            )
        finally:
            self._ranks.say(self._word)

    def _follow(self) -> None:
        self._word = self._ranks.hear()
        while self._word.waits or self._word.errand:
            if self._word.errand:
                self._ranks.do(self._word.errand)
            self._word = self._ranks.hear()
        if self._word.ended:
            self.close()
            raise AttachError("rank 0 of this script takes no part in the swarm any more; what it says tells why")
        if self._word.cleared:
            self._optimizer.state.clear()

    def _rest(self, timeout_s: float) -> None:
        """Obey what comes within so long."""
        assert self._line is not None, "it waits for a daemon that is there"
        if self._line.comes_within(timeout_s):
            self._obey(0.0)


def attach(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    home: str | Path | None = None,
    evaluate: Evaluation | None = None,
    loss_unit: str = "",
    wait_s: float = 0.0,
) -> Attachment:
    """Attach this script to the daemon of the data folder `home` (default: that of `shoal up`), whose swarm's task is
    "attached". The parameters of `model` become the swarm's; call `step` of what comes back after each step of
    `optimizer`.

    `evaluate(model)` returns the mean loss of the base over held-out data and how many tokens these have; without it
    this peer measures none. `loss_unit` is what losses are in, such as "nats a token"; people are shown it. A daemon
    that is still starting is waited for `wait_s` seconds. In a script of several processes (torchrun;
    DistributedDataParallel or fully_shard) all of them call it. Raises ConfigError for what a person must mend, and
    AttachError."""
    whole: nn.Module = model.module if isinstance(model, DistributedDataParallel) else model
    described = describe_model(whole, optimizer)
    folder = Path(DATA_DIR if home is None else home).expanduser().absolute()
    path = find_socket(folder)
    if any(hasattr(parameter, "device_mesh") for parameter in whole.parameters()):
        try:  # here, because few scripts divide their model, and these parts of torch take their time
            from shoal.node.training.divided_model import DividedRanks, WholeParameters
        except ImportError:
            problem = "is divided among processes, which this torch cannot undo"
            raise ConfigError("model", problem, "use torch 2.6 or newer, or DistributedDataParallel") from None
        ranks: ScriptRanks | None = (divided := DividedRanks(whole, evaluate))
        parameters = WholeParameters(divided) if divided.is_first else LocalParameters(whole)
        loop = AttachedLoop(parameters, optimizer, divided.evaluation, loss_unit)
    else:
        ranks = ScriptRanks(whole) if are_joined() else None
        loop = AttachedLoop(LocalParameters(whole), optimizer, evaluate, loss_unit)
    made = Attachment(loop, path, described)
    if ranks is not None:
        made = RankAttachment(loop, path, described, ranks, optimizer)
    made.begin(folder, wait_s)
    return made


def explain(folder: Path, error: OSError) -> InputError:
    """Why no daemon answers there, and what to do."""
    try:
        read_running(folder)
    except ConfigError:
        fix = f"start one: shoal up --data-dir {folder}; or name the data folder of another: attach(..., home=...)"
        return ConfigError("home", f"no daemon runs on {folder}", fix)
    problem = f"the daemon of {folder} takes no script ({error.strerror or error})"
    fix = 'use a swarm whose task is of the kind "attached", or wait until the daemon has its manifest (wait_s=60)'
    return ConfigError("home", problem, fix)


def describe_model(model: nn.Module, optimizer: torch.optim.Optimizer) -> Attach:
    """What the daemon is told of the model; raises ConfigError where it cannot take part."""
    named = list(model.named_parameters())
    if not 1 <= len(named) <= TENSORS_MAX:
        raise ConfigError("model", f"has {len(named)} parameters", f"use one with 1 to {TENSORS_MAX}")
    for name, one in named:
        if one.dtype != torch.float32:
            fix = "keep the parameters in float32; torch.autocast computes in a lower precision"
            raise ConfigError("model", f"{name} is {one.dtype}", fix)
        if not one.is_contiguous():
            raise ConfigError("model", f"{name} is not contiguous", "store it in the order of its dimensions")
        if one.dim() > DIMENSIONS_MAX or not one.numel():
            raise ConfigError("model", f"{name} has the shape {tuple(one.shape)}", "use one that a manifest can name")
    own = {id(one) for _, one in named}
    if not any(id(one) in own for group in optimizer.param_groups for one in group["params"]):
        raise ConfigError("optimizer", "trains none of the model's parameters", "make it from model.parameters()")
    device = named[0][1].device
    return Attach(
        process=os.getpid(),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        tensors=tuple(
            AttachedTensor(name=name.encode()[:NAME_BYTES_MAX].decode(errors="ignore"), shape=tuple(one.shape))
            for name, one in named
        ),
    )
