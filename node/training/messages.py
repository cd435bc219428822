"""What a daemon and its trainer say to each other, over a socket; the tensors stand in memory that both map.

Frames are a big-endian u32 length and one canonical message. The memory is float32[2, D]: row 0 is `base`, the
certified parameters, which the daemon alone writes; row 1 is `local`, the trainer's, which it writes before Ready and
never between Ready and the next Begin or Merge; in that time the daemon may write a move there, for the Begin with
`shift` that follows, and then sends no Merge before it. How `base` is read while it may be written is said in
base_writes.py.

Invariant: neither side believes the other beyond this schema; a frame that breaks it ends the connection.
"""

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray

from shoal.protocol.errors import ProtocolError, Refusal
from shoal.protocol.layout import DIMENSIONS_MAX, ELEMENTS_MAX, NAME_BYTES_MAX, TENSORS_MAX, Layout
from shoal.protocol.manifest import BATCH_SIZE_MAX, Task, Training
from shoal.protocol.messages import PARTS_MAX, ROSTER_MAX, Peer
from shoal.protocol.wire import DELTA_BYTES_MAX, U63, Bound, Bytes32, Choice, Schema

FRAME_BYTES_MAX = DELTA_BYTES_MAX
PROMPT_BYTES_MAX = 1024
UNIT_BYTES_MAX = 64
UNUSED_MAX = 8
SAMPLE_BYTES_MAX = 1024
DETAIL_BYTES_MAX = 1024
TASKS_ALLOWED_MAX = 64
PROCESSES_MAX = 64
# torch.compile took 148 s for the smallest model on two cores: this is for a slow machine that has other work.
COMPILE_TIMEOUT_S = 1800.0
GAIN_MAX = 100.0  # more than a manifest's largest rate and momentum make
PERPLEXITY_LOSS_MAX = 700.0  # e to more is no float

BAD_INPUT = "bad_input"
OUT_OF_MEMORY = "out_of_memory"
NOT_FINITE = "not_finite"
TASK_FAILED = "task_failed"
NO_TEXT = "no_text"
NO_EVALUATION = "no_evaluation"
RANK_LOST = "rank_lost"
COMPILE_FAILED = "compile_failed"
BASE_TORN = "base_torn"
FAILURES = (
    BAD_INPUT,
    OUT_OF_MEMORY,
    NOT_FINITE,
    TASK_FAILED,
    NO_TEXT,
    NO_EVALUATION,
    RANK_LOST,
    COMPILE_FAILED,
    BASE_TORN,
)

NOTHING = "nothing"
OPTIMIZER = "optimizer"
EVERYTHING = "everything"

FloatVector = NDArray[np.float32]
Detail = Annotated[str, Bound(0, DETAIL_BYTES_MAX)]
Unit = Annotated[str, Bound(0, UNIT_BYTES_MAX)]
_LENGTH = struct.Struct(">I")


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What is trained, and the batches of this peer's data that are in contributions already: they are not trained on
    again. `layout_digest` is the manifest's layout's; checkpoints of another `generation` are not gone on from."""

    task: Task
    training: Training
    layout_digest: Bytes32
    seed: U63
    peer: Peer
    generation: Bytes32 = bytes(32)
    batches_done: U63 = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetChoice:
    """A Hugging Face data set on this machine or, by `hf://datasets/NAME`, on the hub: which of its configurations and
    splits, and which column holds the texts."""

    path: Annotated[str, Bound(1, 4096)]
    config_name: Annotated[str | None, Bound(1, 256)] = None
    split: Annotated[str, Bound(1, 256)] = "train"
    column: Annotated[str, Bound(1, 256)] = "text"


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """The first frame. `text` is a file or a folder, None means the source of the running Python, where there is no
    `dataset` in its place; 0 `threads` leaves their number to torch. An inner step begins `step_period_s` after the one
    before at the soonest. `checkpoints` is the folder of the trainer's own checkpoints, written at every so many
    Readys; without one it has none. A batch is computed `micro_batch` examples at a time, 0 means all of them, and
    fewer where so many do not fit into memory. Of the tasks that come by import path those in `allow_tasks` are run.
    `tokenizer` is a file, `weights` a folder with trained ones, `cache` a folder of the trainer's own for what it can
    make again. With `checkpoint_activations` the backward pass computes the model's blocks a second time instead of
    keeping what is in them. Of more than one of the `processes`, 0 for one a GPU, each computes its part of a batch;
    they meet by a file at `rendezvous`, and one that does not answer for `rank_timeout_s` ends them all. With
    `compiled`, a folder for what torch.compile makes, the loss is compiled."""

    work: Work
    device: Annotated[str, Choice(("auto", "cpu", "cuda"))]
    threads: Annotated[int, Bound(0, 1024)]
    text: Annotated[str | None, Bound(1, 4096)]
    step_period_s: Annotated[float, Bound(0, 3600)] = 0.0
    checkpoints: Annotated[str | None, Bound(1, 4096)] = None
    checkpoint_every: Annotated[int, Bound(1, 1000)] = 1
    micro_batch: Annotated[int, Bound(0, BATCH_SIZE_MAX)] = 0
    allow_tasks: Annotated[tuple[str, ...], Bound(0, TASKS_ALLOWED_MAX)] = ()
    tokenizer: Annotated[str | None, Bound(1, 4096)] = None
    cache: Annotated[str | None, Bound(1, 4096)] = None
    checkpoint_activations: bool = False
    weights: Annotated[str | None, Bound(1, 4096)] = None
    processes: Annotated[int, Bound(0, PROCESSES_MAX)] = 1
    rendezvous: Annotated[str | None, Bound(1, 4096)] = None
    rank_timeout_s: Annotated[float, Bound(0.1, 86_400)] = 240.0
    compiled: Annotated[str | None, Bound(1, 4096)] = None
    dataset: DatasetChoice | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Begin:
    """Train for `round`: from `base` with `adopt`, else on from the local parameters. With `shift` what stands in
    `local` is added to these first: a move away from what was handed over, on top of which stays what was done since.
    It means nothing to a trainer whose parameters do not hold what it handed over: one that has begun anew meanwhile,
    or gone back to the base."""

    round: U63
    adopt: bool
    shift: bool = False

    def __post_init__(self) -> None:
        if self.adopt and self.shift:
            raise ValueError("Begin has either adopt or shift")


@dataclass(frozen=True, slots=True, kw_only=True)
class Merge:
    """`base` has changed. Adopt the parts whose bit is set in `included` (bit 0 of byte 0 first), or all with
    `adopt_all`, and keep the rest; then train for `round` with `begin`, else wait. `gain` is how far `base` has moved
    for each unit of what this trainer had handed over: its share of the mean times what the outer step makes of that;
    0 where it is not known. Where data are divided, the share at `place` of `places` is this trainer's."""

    round: U63
    included: Annotated[bytes, Bound(0, PARTS_MAX // 8)]
    part_elements: Annotated[int, Bound(1, 2**40)]
    adopt_all: bool
    begin: bool
    gain: Annotated[float, Bound(0, GAIN_MAX)] = 0.0
    place: Annotated[int, Bound(0, ROSTER_MAX)] = 0
    places: Annotated[int, Bound(1, ROSTER_MAX)] = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Freeze:
    """Become ready now, or after the first step where there is none yet. Means nothing to a trainer that waits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluate:
    """Measure `base` on the held-out data, between two steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Continue `prompt` with `base` by `size_bytes` bytes, between two steps. A task that writes no text answers with
    Failed."""

    prompt: Annotated[bytes, Bound(0, PROMPT_BYTES_MAX)]
    size_bytes: Annotated[int, Bound(1, SAMPLE_BYTES_MAX)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """Write a checkpoint, where there is a folder for it, and exit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumed:
    """What a trainer took from its checkpoint. With EVERYTHING it stands where it was, in the training for `round`,
    `steps` and `tokens` beyond the base, which it last adopted as the training for `since_round` began; with `waits`
    it had handed its parameters over, and does so again at the next Begin without `adopt`. With OPTIMIZER the
    checkpoint was older than what has been contributed: of it only the optimizer's state was taken. `steps_lost` are
    steps of its last life that are in nothing; their batches from `batches_done` on are trained on again."""

    extent: Annotated[str, Choice((NOTHING, OPTIMIZER, EVERYTHING))] = NOTHING
    round: U63 = 0
    batches_done: U63 = 0
    steps: U63 = 0
    tokens: U63 = 0
    waits: bool = False
    steps_lost: U63 = 0
    since_round: U63 = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """It waits for the first Begin. `notice` is what the person at this machine should know of its data, `unused` names
    the settings of this machine that the task ignores, `loss_unit` what its losses are in, empty where nobody says."""

    device: Annotated[str, Bound(1, 128)]
    elements: U63
    train_bytes: U63
    held_out_bytes: U63
    resumed: Resumed = Resumed()
    notice: Detail = ""
    unused: Annotated[tuple[Annotated[str, Bound(1, 64)], ...], Bound(0, UNUSED_MAX)] = ()
    loss_unit: Unit = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """At most two a second. `steps` and `tokens` are the work in `local` since the base was last adopted."""

    round: U63
    steps: U63
    tokens: U63
    loss: float
    tokens_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """`local` is complete and finite, and holds still until the next Begin or Merge. `steps` and `tokens` are the work
    in it since the base was last adopted; `loss_mean` is over the steps since the last Ready.
    `batches_done` is its position in its data, `problem` why no checkpoint of it was written, where one should be. With
    `trains_on` it goes on training meanwhile, until Paused or the next Begin or Merge."""

    round: U63
    steps: U63
    tokens: U63
    loss_mean: float
    batches_done: U63
    problem: Detail = ""
    trains_on: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Paused:
    """As far ahead of what it handed over as it may be: it waits for the next Begin or Merge."""

    round: U63


def find_perplexity(loss_nats: float) -> float:
    """e to the loss; infinite where that is no float."""
    return math.exp(loss_nats) if loss_nats < PERPLEXITY_LOSS_MAX else math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiling:
    """The step that begins now compiles the task's loss: the next report may take so long."""

    timeout_s: float = COMPILE_TIMEOUT_S


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """The mean loss of `base` over the `tokens` held-out tokens, a token being a byte of byte_gpt, an image of digits;
    what it is in has Started said. `round` is the one whose state that base is, also where the trainer has not been
    told of it yet."""

    round: U63
    loss_nats: float
    tokens: U63

    @property
    def perplexity(self) -> float:
        return find_perplexity(self.loss_nats)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    text: Annotated[bytes, Bound(0, SAMPLE_BYTES_MAX)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """With `fatal` the trainer exits after this. Without, it trains on: after NOT_FINITE from `base`, or, where it is
    about a Begin's `shift`, without that, after OUT_OF_MEMORY from where it was, with fewer examples at a time or
    without having looked at the base, after TASK_FAILED with the next batch, after COMPILE_FAILED without
    torch.compile, and after NO_TEXT and NO_EVALUATION nothing has changed. RANK_LOST is always fatal. BASE_TORN tells
    that steps stood upon a base that was replaced while it was read. `steps_dropped` are steps that were thrown away
    for this, and count for nothing."""

    reason: Annotated[str, Choice(FAILURES)]
    detail: Detail
    fatal: bool
    steps_dropped: U63 = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class AttachedTensor:
    """One parameter of a script's model; the name is for people."""

    name: Annotated[str, Bound(1, NAME_BYTES_MAX)]
    shape: Annotated[tuple[Annotated[int, Bound(1, ELEMENTS_MAX)], ...], Bound(0, DIMENSIONS_MAX)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Attach:
    """The first frame of a script that attaches itself, before Start: its parameters, in their order."""

    process: U63
    device: Annotated[str, Bound(1, 128)]
    tensors: Annotated[tuple[AttachedTensor, ...], Bound(1, TENSORS_MAX)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """Answer to Attach in the place of Start: the pieces of an InputError. With `final` it would be the same again."""

    field: Detail
    problem: Detail
    fix: Detail
    final: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Described:
    """Answer of `python -m shoal.node.training.tasks`: the layout of a task."""

    layout: Layout


@dataclass(frozen=True, slots=True, kw_only=True)
class Undescribed:
    """Answer of `python -m shoal.node.training.tasks`: the pieces of a ManifestError."""

    field: Detail
    problem: Detail
    fix: Detail


Command = Start | Begin | Merge | Freeze | Evaluate | Sample | Stop
Report = Started | Progress | Ready | Paused | Compiling | Evaluated | Sampled | Failed

SCHEMA = Schema(
    {
        1: Start,
        2: Begin,
        3: Merge,
        4: Freeze,
        5: Evaluate,
        6: Sample,
        7: Stop,
        20: Started,
        21: Progress,
        22: Ready,
        23: Evaluated,
        24: Sampled,
        25: Failed,
        26: Paused,
        27: Compiling,
        30: Described,
        31: Undescribed,
        40: Attach,
        41: Refused,
    }
)


def encode_frame(message: Command | Report | Described | Undescribed | Attach | Refused) -> bytes:
    """One frame: length and message."""
    body = SCHEMA.encode(message)
    assert len(body) <= FRAME_BYTES_MAX, "every message of this schema fits a frame"
    return _LENGTH.pack(len(body)) + body


def trim_detail(text: str) -> str:
    """As much of the text as a `detail` field holds."""
    return text.encode(errors="replace")[:DETAIL_BYTES_MAX].decode(errors="ignore")


def trim_unit(text: str) -> str:
    """As much of a task's text as a `loss_unit` holds, in one line."""
    return " ".join(text.split()).encode(errors="replace")[:UNIT_BYTES_MAX].decode(errors="ignore")


class FrameReader:
    """Frames out of a byte stream. Holds at most one incomplete frame besides the bytes just fed."""

    __slots__ = ("_pending",)

    def __init__(self) -> None:
        self._pending = bytearray()

    def feed(self, data: bytes) -> Iterator[Any]:
        """The messages that `data` completes, to be consumed before the next call; raises ProtocolError."""
        self._pending += data
        while len(self._pending) >= _LENGTH.size:
            (size,) = _LENGTH.unpack_from(self._pending)
            if size > FRAME_BYTES_MAX:
                raise ProtocolError(Refusal.OVERSIZED, f"a frame of {size} bytes, at most {FRAME_BYTES_MAX}")
            end = _LENGTH.size + size
            if len(self._pending) < end:
                return
            body = bytes(self._pending[_LENGTH.size : end])
            del self._pending[:end]
            yield SCHEMA.decode_untrusted(body, FRAME_BYTES_MAX)
