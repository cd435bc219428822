"""Handwritten digits: a small classifier, and the images that scikit-learn brings (an extra; needed for the data only).

The 1,797 images of 8 x 8 pixels are in that package, so that nothing is downloaded. It shows that nothing around a
task is about text; on one CPU core it learns within seconds.

Invariants: the same images are held out on every machine, whatever their order in the library; no image that is held
out is ever trained on.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch.nn.functional as F
from blake3 import blake3
from numpy.typing import NDArray
from torch import Tensor, nn

from shoal.node.training.data import Draws
from shoal.node.training.loss_units import DIGITS
from shoal.node.training.messages import Work
from shoal.node.training.model import Linear
from shoal.node.training.parameters import Shape, list_specs, start_uniform
from shoal.protocol.errors import ManifestError
from shoal.protocol.layout import ZEROS, Layout, TensorSpec, make_layout
from shoal.protocol.tables import read_table
from shoal.protocol.wire import Bound

PIXELS = 64
SHADES_MAX = 16
CLASSES = 10
HELD_OUT_SHARE = 0.1
INSTALL_DIGITS = "install it: pip install 'shoal[digits]'"

Rows = NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True)
class DigitsConfig:
    """`layers` hidden ones of `width` each. The defaults make 8,832 parameters."""

    layers: Annotated[int, Bound(1, 16)] = 2
    width: Annotated[int, Bound(4, 4096)] = 64


class Classifier(nn.Module):
    """A perceptron without biases, so that every parameter is a matrix. They hold nothing until loaded."""

    def __init__(self, config: DigitsConfig) -> None:
        super().__init__()
        widths = [PIXELS] + [config.width] * config.layers
        self.hidden = nn.ModuleList(Linear(*pair) for pair in pairwise(widths))
        self.head = Linear(config.width, CLASSES)

    def forward(self, shades: Tensor) -> Tensor:
        """Shades of grey, 0 to SHADES_MAX, int64 (B, 64), to logits, (B, 10)."""
        x = shades.float() / (SHADES_MAX / 2) - 1.0
        for layer in self.hidden:
            x = F.relu(layer(x))
        logits: Tensor = self.head(x)
        return logits


class Images:
    """Batches of rows: 64 shades, line by line, and the digit. A token is an image."""

    def __init__(self, rows: Rows, work: Work) -> None:
        """`rows` is uint8 (images, 65)."""
        order = sorted(range(len(rows)), key=lambda index: blake3(rows[index].tobytes()).digest())
        held_out = int(len(rows) * HELD_OUT_SHARE)
        self._held_out, self._train = rows[order[:held_out]], rows[order[held_out:]]
        self._batch_size = work.training.batch_size
        self._draws = Draws(work.seed, work.peer)

    @property
    def train_bytes(self) -> int:
        return self._train.nbytes

    @property
    def held_out_bytes(self) -> int:
        return self._held_out.nbytes

    @property
    def tokens_per_batch(self) -> int:
        return self._batch_size

    @property
    def held_out_tokens(self) -> int:
        return len(self._held_out)

    @property
    def notice(self) -> str:
        return ""

    def take_share(self, place: int, places: int) -> None:
        self._draws.take_share(place, places)

    def batch(self, index: int) -> NDArray[np.int64]:
        """Batch `index` of this peer, int64 (batch_size, 65)."""
        return self._train[self._draws.draw(index, self._batch_size, len(self._train))].astype(np.int64)

    def held_out(self) -> NDArray[np.int64]:
        """All images that are held out, int64 (images, 65)."""
        return self._held_out.astype(np.int64)


class Digits:
    """Which digit an image shows. Options: the fields of DigitsConfig."""

    unused = ("text",)  # the images are those of scikit-learn

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._config = read_table(DigitsConfig, options, "task", "", ManifestError)

    def layout(self) -> Layout:
        return make_layout(list_specs(self.build_model, _start))

    def build_model(self) -> nn.Module:
        return Classifier(self._config)

    def open_data(self, text: Path | None, work: Work) -> Images:
        """The images, whatever `trainer.text` says; raises ManifestError where scikit-learn is not installed."""
        return Images(read_images(), work)

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        logits = model(batch[:, :PIXELS]).float()  # (B, 10)
        return F.cross_entropy(logits, batch[:, PIXELS])


def read_images() -> Rows:
    """All images with their digits, uint8 (1797, 65); raises ManifestError where scikit-learn is not installed."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        problem = f"{DIGITS} needs scikit-learn: there is no {error.name} here"
        raise ManifestError("task.kind", problem, INSTALL_DIGITS) from error
    shades, digits = load_digits(return_X_y=True)
    return np.concatenate((shades, digits[:, None]), axis=1).astype(np.uint8)


def _start(name: str, shape: Shape) -> TensorSpec:
    # With a head of zeros the untrained model takes all digits for alike: its loss is ln 10.
    return TensorSpec(name=name, shape=shape, init=ZEROS) if name == "head.weight" else start_uniform(name, shape)
