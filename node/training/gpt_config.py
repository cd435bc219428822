"""The byte-level GPT's options, and what of it is fixed: read by the trainer and by the export, which has no torch."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from shoal.protocol.errors import ManifestError
from shoal.protocol.tables import read_table
from shoal.protocol.wire import Bound

KIND = "byte_gpt"
VOCABULARY = 256
ROTARY_PERIOD = 10_000.0
MLP_RATIO = 4
SAMPLE_TEMPERATURE = 0.8


@dataclass(frozen=True, slots=True, kw_only=True)
class GptConfig:
    """The defaults make 1.0 M parameters: what one shared CPU core trains in minutes."""

    layers: Annotated[int, Bound(1, 64)] = 2
    heads: Annotated[int, Bound(1, 64)] = 4
    width: Annotated[int, Bound(8, 8192)] = 192
    context: Annotated[int, Bound(8, 2048)] = 128


def read_gpt_config(options: Mapping[str, Any]) -> GptConfig:
    """The options over the defaults; raises ManifestError naming the field."""
    config = read_table(GptConfig, options, "task", "", ManifestError)
    if config.width % (2 * config.heads):
        fix = f"use a multiple of {2 * config.heads}: every head needs an even width"
        raise ManifestError("task.width", f"{config.width} does not divide into {config.heads} heads", fix)
    return config


def parse_options(text: str) -> dict[str, Any]:
    """A manifest's task options; raises ManifestError where they are no JSON object."""
    try:
        options = json.loads(text)
    except ValueError as error:
        raise ManifestError("task.options", f"is not JSON: {error}", "write a JSON object") from error
    if not isinstance(options, dict):
        raise ManifestError("task.options", "is not a JSON object", "write {} or {…}")
    return options
