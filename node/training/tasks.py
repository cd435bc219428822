"""What can be trained: the interface of a task, the table of those built in, and the way to the user's own.

A task is chosen by the manifest (`kind` and `options`); it owns the model, its layout, the data and the loss, and knows
nothing of peers and rounds. `python -m shoal.node.training.tasks KIND OPTIONS WEIGHTS [PATH…]` writes the layout of a
task to standard output, for a daemon that has no torch in its process; WEIGHTS is the folder that the task is to start
from, or empty, the PATHs are those of tasks that may be run.

Invariants: options are validated once, here, with errors that name the field; a task that is not built in comes from
`load_class` alone, which asks whether it is allowed.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from shoal.node.training.causal_lm import CausalLm
from shoal.node.training.causal_lm_config import CAUSAL_LM
from shoal.node.training.custom_task import ATTACHED, CUSTOM, load_builder, load_class, take_path
from shoal.node.training.data import ByteWindows, read_corpus
from shoal.node.training.datasets_library import choose_hub_access
from shoal.node.training.digits import Digits
from shoal.node.training.gpt_config import KIND, SAMPLE_TEMPERATURE, VOCABULARY, parse_options, read_gpt_config
from shoal.node.training.loss_units import DIGITS, find_loss_unit
from shoal.node.training.messages import (
    DatasetChoice,
    Described,
    Start,
    Undescribed,
    Work,
    encode_frame,
    trim_detail,
    trim_unit,
)
from shoal.node.training.model import Gpt, tensor_specs
from shoal.node.training.parameters import list_specs, start_uniform
from shoal.node.training.streamed import open_stream
from shoal.node.training.task_faults import TaskFault, blame
from shoal.node.training.tokenizer import ByteTokenizer, Tokenizer
from shoal.protocol.errors import InputError, ManifestError
from shoal.protocol.layout import Layout, make_layout
from shoal.protocol.manifest import Task as TaskChoice


class Batches(Protocol):
    """A peer's data: batches as a function of their index alone. A token is what the loss is a mean over and what a
    peer's weight counts: a byte of text, an image. The sizes in bytes are for people to read."""

    @property
    def train_bytes(self) -> int: ...

    @property
    def held_out_bytes(self) -> int: ...

    @property
    def tokens_per_batch(self) -> int: ...

    @property
    def held_out_tokens(self) -> int:
        """How many tokens `held_out` has the loss of."""
        ...

    @property
    def notice(self) -> str:
        """What the person at this machine should know of the data; mostly nothing."""
        ...

    def batch(self, index: int) -> NDArray[Any]:
        """One array, of a dtype that torch knows; the first dimension counts examples."""
        ...

    def held_out(self) -> NDArray[Any]:
        """What to evaluate on; its first dimension may be cut into pieces of any size."""
        ...


@runtime_checkable
class DividesData(Protocol):
    """Batches that can be drawn from a part of the data."""

    def take_share(self, place: int, places: int) -> None:
        """From the next batch on draw from the share at `place`, 0 to `places` - 1, which has nothing in common with
        the shares at other places. Before, and with 1 of them, it is everything."""
        ...


class Task(Protocol):
    """A model and what it learns. The parameters of a built model hold nothing until they are loaded."""

    def layout(self) -> Layout:
        """The model's parameters, in the order of its `named_parameters`."""
        ...

    def build_model(self) -> nn.Module: ...

    def open_data(self, text: Path | None, work: Work) -> Batches:
        """`text` is `trainer.text` of this machine. Raises InputError where there are no data that can be used."""
        ...

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        """The mean loss of a batch a token, a float32 scalar."""
        ...


@runtime_checkable
class WritesText(Protocol):
    """A task whose model continues a text."""

    def sample(self, model: nn.Module, prompt: bytes, size_bytes: int) -> bytes:
        """Bytes that continue the prompt, at most `size_bytes`; the same for the same parameters on the same device."""
        ...


@runtime_checkable
class PredictsTokens(Protocol):
    """A language model: what an export of it can be asked (mixture.py)."""

    @property
    def context(self) -> int:
        """How many tokens a window predicts at most."""
        ...

    @property
    def tokens(self) -> tuple[bytes, int]:
        """What a token is: the tokenizer's digest, and how many the model knows."""
        ...

    def layout(self) -> Layout: ...

    def build_model(self) -> nn.Module: ...

    def open_tokenizer(self, path: Path | None) -> Tokenizer:
        """The swarm's, from the file that this machine has of it. Raises ConfigError."""
        ...

    def logits(self, model: nn.Module, ids: Tensor) -> Tensor:
        """Of the next token at each place: int64 (B, T) to (B, T, V)."""
        ...


@runtime_checkable
class TakesFiles(Protocol):
    """A task that needs more of this machine than its text."""

    def take_files(self, tokenizer: Path | None, cache: Path | None) -> None:
        """Comes before `open_data`: what `trainer.tokenizer` names, and a folder of the trainer's own for what can be
        made again. Neither has to exist."""
        ...


@runtime_checkable
class TakesWeights(Protocol):
    """A task whose model stands on trained weights that this machine has."""

    def take_weights(self, folder: Path | None, device: torch.device) -> None:
        """Comes after `layout` and before `build_model`: what `trainer.weights` names, and where models will be. Raises
        ConfigError where the task needs other weights."""
        ...

    def check_weights(self, folder: Path) -> None:
        """Raises ManifestError where the tensors in this folder are not those of the model."""
        ...


@runtime_checkable
class ReadsDatasets(Protocol):
    """A task that trains on a Hugging Face data set where `trainer.dataset` names one."""

    def open_dataset(self, choice: DatasetChoice, work: Work, folder: Path | None) -> Batches:
        """Comes in the place of `open_data`. `folder` is the trainer's own, for the place in the data. Raises
        InputError."""
        ...


@runtime_checkable
class LeavesUnused(Protocol):
    """A task that has no use for some of what this machine may set for it, beside what it has no method for."""

    @property
    def unused(self) -> tuple[str, ...]:
        """Names of fields of [trainer]: "text", "tokenizer", "weights"."""
        ...


@runtime_checkable
class NamesLossUnit(Protocol):
    """A task that is not built in and says what its loss is in."""

    @property
    def loss_unit(self) -> str:
        """Such as "nats a token". Where it begins with "nats" a perplexity is shown, too."""
        ...


class ByteGpt:
    """Next-byte prediction on any text. Options: the fields of GptConfig."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._config = read_gpt_config(options)

    def layout(self) -> Layout:
        return make_layout(tensor_specs(self._config))

    def build_model(self) -> nn.Module:
        return Gpt(self._config)

    @property
    def context(self) -> int:
        return self._config.context

    @property
    def tokens(self) -> tuple[bytes, int]:
        return ByteTokenizer.digest, VOCABULARY

    def open_tokenizer(self, path: Path | None) -> Tokenizer:
        return ByteTokenizer()

    def logits(self, model: nn.Module, ids: Tensor) -> Tensor:
        logits: Tensor = model(ids)
        return logits

    def open_data(self, text: Path | None, work: Work) -> Batches:
        return ByteWindows(
            read_corpus(text),
            context=self._config.context,
            batch_size=work.training.batch_size,
            seed=work.seed,
            peer=work.peer,
        )

    def open_dataset(self, choice: DatasetChoice, work: Work, folder: Path | None) -> Batches:
        return open_stream(choice, ByteTokenizer(), context=self._config.context, work=work, folder=folder)

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        inputs, targets = batch[:, :-1], batch[:, 1:]  # each (B, T)
        logits = self.logits(model, inputs).float().view(-1, VOCABULARY)  # (B * T, 256)
        return F.cross_entropy(logits, targets.reshape(-1))

    @torch.no_grad()
    def sample(self, model: nn.Module, prompt: bytes, size_bytes: int) -> bytes:
        device = next(model.parameters()).device
        generator = torch.Generator().manual_seed(0)
        # An empty prompt starts like a new line does.
        text = bytearray(prompt or b"\n")
        first = len(text)
        for _ in range(size_bytes):
            window = torch.tensor([list(text[-self._config.context :])], device=device)  # (1, T)
            logits = model(window)[0, -1].float().cpu()  # (256,)
            chances = torch.softmax(logits / SAMPLE_TEMPERATURE, dim=-1)
            text.append(int(torch.multinomial(chances, 1, generator=generator)))
        return bytes(text[first:])


TASKS: Mapping[str, Callable[[Mapping[str, Any]], Task]] = MappingProxyType(
    {KIND: ByteGpt, DIGITS: Digits, CAUSAL_LM: CausalLm}
)


def make_task(choice: TaskChoice, allowed: Sequence[str] = ()) -> Task:
    """The task that a manifest chose; one by import path must be `allowed`. Raises ManifestError or ConfigError naming
    the field, and TaskFault where the code of such a task raises."""
    options = parse_options(choice.options)
    if choice.kind == CUSTOM:
        path, options = take_path(options)
        found = load_class(path, allowed)
        with blame(found.__module__):
            task: Task = found(options)
            return task
    if choice.kind not in TASKS:
        fix = f"use one of: {', '.join((*TASKS, CUSTOM, ATTACHED))}"
        raise ManifestError("task.kind", f"{choice.kind!r} is no known task", fix)
    return TASKS[choice.kind](options)


def list_unused(task: Task, start: Start) -> tuple[str, ...]:
    """The settings of this machine that the task ignores, by their full names."""
    given = {"text": start.text, "tokenizer": start.tokenizer, "weights": start.weights}
    ignored = set(task.unused) if isinstance(task, LeavesUnused) else set()
    ignored |= {"tokenizer"} if not isinstance(task, TakesFiles) else set()
    ignored |= {"weights"} if not isinstance(task, TakesWeights) else set()
    return tuple(f"trainer.{name}" for name, value in given.items() if value is not None and name in ignored)


def name_loss_unit(task: Task, kind: str) -> str:
    """What the loss of the task is in; empty where nobody has said."""
    return trim_unit(str(task.loss_unit)) if isinstance(task, NamesLossUnit) else find_loss_unit(kind)


def describe(choice: TaskChoice, allowed: Sequence[str] = (), weights: Path | None = None) -> Layout:
    """The layout that `shoal swarm create` puts into the manifest, of a task that may start from `weights`; raises as
    `make_task` does."""
    if choice.kind == ATTACHED:
        path, options = take_path(parse_options(choice.options))
        build = load_builder(path, allowed)
        with blame(path.partition(":")[0]):
            return make_layout(list_specs(lambda: build(**options), start_uniform))
    task = make_task(choice, allowed)
    with blame(type(task).__module__):
        layout = task.layout()
        if weights is not None and isinstance(task, TakesWeights):
            task.check_weights(weights)
        return layout


def main(arguments: list[str]) -> None:
    """Write a Described or an Undescribed frame to standard output."""
    kind, options, weights, *allowed = arguments
    choose_hub_access(None)
    answer: Described | Undescribed
    try:
        choice = TaskChoice(kind=kind, options=options)
        answer = Described(layout=describe(choice, allowed, Path(weights) if weights else None))
    except InputError as error:
        field, problem, fix = (trim_detail(text) for text in (error.field, error.problem, error.fix))
        answer = Undescribed(field=field, problem=problem, fix=fix)
    except TaskFault as fault:
        answer = Undescribed(field="task", problem=trim_detail(f"its code raised {fault}"), fix="mend that code")
    sys.stdout.buffer.write(encode_frame(answer))


if __name__ == "__main__":
    main(sys.argv[1:])
