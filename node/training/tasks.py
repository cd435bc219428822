"""What can be trained: the interface of a task and the table of those built in.

A task is chosen by the manifest (`kind` and `options`); it owns the model, its layout, the data and the loss, and knows
nothing of peers and rounds. `python -m shoal.node.training.tasks KIND OPTIONS` writes the layout of a task to standard
output, for a daemon that has no torch in its process.

Invariant: options are validated once, here, with errors that name the field.
"""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from shoal.node.training.data import ByteWindows, read_corpus
from shoal.node.training.gpt_config import KIND, SAMPLE_TEMPERATURE, VOCABULARY, parse_options, read_gpt_config
from shoal.node.training.messages import Described, Undescribed, Work, encode_frame, trim_detail
from shoal.node.training.model import Gpt, tensor_specs
from shoal.protocol.errors import ManifestError
from shoal.protocol.layout import Layout, make_layout
from shoal.protocol.manifest import Task as TaskChoice


class Batches(Protocol):
    """A peer's data: int64 batches as a function of their index alone."""

    @property
    def train_bytes(self) -> int: ...

    @property
    def held_out_bytes(self) -> int: ...

    @property
    def tokens_per_batch(self) -> int: ...

    def batch(self, index: int) -> NDArray[np.int64]: ...

    def held_out(self) -> NDArray[np.int64]:
        """What to evaluate on; its first dimension may be cut into pieces of any size."""
        ...


class Task(Protocol):
    """A model and what it learns. The parameters of a built model hold nothing until they are loaded."""

    def layout(self) -> Layout:
        """The model's parameters, in the order of its `named_parameters`."""
        ...

    def build_model(self) -> nn.Module: ...

    def open_data(self, text: Path | None, work: Work) -> Batches:
        """Raises ConfigError where the text cannot be used."""
        ...

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        """The mean loss of a batch in nats a token, a float32 scalar."""
        ...

    def sample(self, model: nn.Module, prompt: bytes, size_bytes: int) -> bytes:
        """`size_bytes` bytes that continue the prompt; the same bytes for the same parameters on the same device."""
        ...


class ByteGpt:
    """Next-byte prediction on any text. Options: the fields of GptConfig."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._config = read_gpt_config(options)

    def layout(self) -> Layout:
        return make_layout(tensor_specs(self._config))

    def build_model(self) -> nn.Module:
        return Gpt(self._config)

    def open_data(self, text: Path | None, work: Work) -> Batches:
        return ByteWindows(
            read_corpus(text),
            context=self._config.context,
            batch_size=work.training.batch_size,
            seed=work.seed,
            peer=work.peer,
        )

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        inputs, targets = batch[:, :-1], batch[:, 1:]  # each (B, T)
        logits = model(inputs).float().view(-1, VOCABULARY)  # (B * T, 256)
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


TASKS: Mapping[str, Callable[[Mapping[str, Any]], Task]] = MappingProxyType({KIND: ByteGpt})


def make_task(choice: TaskChoice) -> Task:
    """The task that a manifest chose; raises ManifestError naming the field."""
    if choice.kind not in TASKS:
        raise ManifestError("task.kind", f"{choice.kind!r} is no known task", f"use one of: {', '.join(TASKS)}")
    return TASKS[choice.kind](parse_options(choice.options))


def describe(choice: TaskChoice) -> Layout:
    """The layout that `shoal swarm create` puts into the manifest; raises ManifestError naming the field."""
    return make_task(choice).layout()


def main(arguments: list[str]) -> None:
    """Write a Described or an Undescribed frame to standard output."""
    kind, options = arguments
    answer: Described | Undescribed
    try:
        answer = Described(layout=describe(TaskChoice(kind=kind, options=options)))
    except ManifestError as error:
        field, problem, fix = (trim_detail(text) for text in (error.field, error.problem, error.fix))
        answer = Undescribed(field=field, problem=problem, fix=fix)
    sys.stdout.buffer.write(encode_frame(answer))


if __name__ == "__main__":
    main(sys.argv[1:])
