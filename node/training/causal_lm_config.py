"""The options of the task `causal_lm`: read by the trainer, by `shoal swarm create` and by the export, without torch.

In a draft `config` is a table, a JSON text or the path of a config.json, `tokenizer` the path of a tokenizer.json, and
`weights` that of a folder with trained weights. `fill_in` puts what the files say, or their digest, in their place, so
that the manifest alone determines the model for everybody.

Invariant: of a config that comes from a manifest nothing is passed on that makes transformers look for code or files
elsewhere.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from blake3 import blake3

from shoal.node.training.tokenizer import (
    BYTE_IDS,
    BYTES,
    ByteTokenizer,
    parse_digest,
    read_file,
    write_digest,
)
from shoal.node.training.weights import WeightsFolder
from shoal.protocol.errors import ConfigError, ManifestError
from shoal.protocol.tables import read_table
from shoal.protocol.wire import Bound

CAUSAL_LM = "causal_lm"
CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.json"
CONFIG_BYTES_MAX = 1 << 20
LAYERS_MAX = 1024  # more make more tensors than a layout has
RANK_MAX = 1024
TARGETS_MAX = 64
# The types whose linear layers hold the transpose of the matrix of a torch Linear (transformers' Conv1D).
TRANSPOSED_TYPES = frozenset({"gpt2", "openai-gpt"})

# What names code or files elsewhere, or what transformers writes about itself. Names that begin with "_" go, too.
_LEFT_OUT = frozenset(
    {"auto_map", "attn_implementation", "experts_implementation", "transformers_version", "dtype", "torch_dtype"}
)
_REFUSED = {"quantization_config": "quantized weights cannot be trained"}
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Options:
    context: Annotated[int, Bound(8, 65_536)] = 256
    tokenizer: Annotated[str, Bound(1, 4096)] = BYTES
    weights: Annotated[str | None, Bound(1, 4096)] = None
    lora_rank: Annotated[int, Bound(0, RANK_MAX)] = 0
    lora_alpha: Annotated[float, Bound(0.001, 65_536)] = 16.0
    lora_targets: Annotated[tuple[str, ...], Bound(0, TARGETS_MAX)] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Lora:
    """Adapters of rank r add alpha / r * B A to the layers whose names are, or end in, one of `targets`; without these
    to all linear layers of the blocks."""

    rank: int
    alpha: float
    targets: tuple[str, ...]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclass(frozen=True, slots=True, kw_only=True)
class CausalLmConfig:
    """`config` is what transformers builds the model from, `context` the tokens that a window predicts, `tokenizer` the
    digest of the tokenizer's file, `weights` that of the weights that training starts from, if any. With `lora` these
    stand still, and adapters are trained."""

    config: Mapping[str, Any]
    context: int
    tokenizer: bytes
    weights: bytes | None = None
    lora: Lora | None = None

    @property
    def model_type(self) -> str:
        name: str = self.config["model_type"]
        return name

    @property
    def is_transposed(self) -> bool:
        """Whether its linear layers hold their matrices as (inputs, outputs)."""
        return self.model_type in TRANSPOSED_TYPES


def read_causal_lm(options: Mapping[str, Any]) -> CausalLmConfig:
    """The options as a manifest has them; raises ManifestError naming the field."""
    if "config" not in options:
        fix = 'add [task.config] with model_type = "gpt2" and so on, or config = "FOLDER/config.json"'
        raise ManifestError("task.config", "is missing", fix)
    rest = {name: value for name, value in options.items() if name != "config"}
    read = read_table(_Options, rest, "task", "", ManifestError)
    digest = parse_digest(read.tokenizer)
    if digest is None:
        fix = "make the manifest with `shoal swarm create`, which writes the digest of the file"
        raise ManifestError("task.tokenizer", f"{read.tokenizer[:80]!r} is no digest", fix)
    config = clean_config(options["config"])
    _check_sizes(config, read.context, BYTE_IDS if digest == ByteTokenizer.digest else 1)
    return CausalLmConfig(
        config=config,
        context=read.context,
        tokenizer=digest,
        weights=_read_weights(read.weights),
        lora=_read_lora(read, rest),
    )


def _read_weights(text: str | None) -> bytes | None:
    digest = None if text is None or text == BYTES else parse_digest(text)
    if text is not None and digest is None:
        fix = "make the manifest with `shoal swarm create`, which writes the digest of the weights"
        raise ManifestError("task.weights", f"{text[:80]!r} is no digest", fix)
    return digest


def _read_lora(read: _Options, given: Mapping[str, Any]) -> Lora | None:
    if read.lora_rank:
        if read.weights is None:
            fix = 'name the trained weights that the adapters are for, as in weights = "FOLDER"'
            raise ManifestError("task.weights", "is missing, and task.lora_rank is there", fix)
        return Lora(rank=read.lora_rank, alpha=read.lora_alpha, targets=read.lora_targets)
    for name in ("lora_alpha", "lora_targets"):
        if name in given:
            raise ManifestError(f"task.{name}", "is there, and task.lora_rank is not", "add lora_rank = 16")
    return None


def clean_config(config: Any) -> dict[str, Any]:
    """The config without what is no description of the model; raises ManifestError."""
    if not isinstance(config, dict):
        fix = "make the manifest with `shoal swarm create`, which puts the file's content here"
        raise ManifestError("task.config", f"is {type(config).__name__}, not a table", fix)
    if not isinstance(config.get("model_type"), str):
        raise ManifestError("task.config.model_type", "is missing", 'say which, as in model_type = "llama"')
    cleaned: dict[str, Any] = _clean(config)
    return cleaned


def _clean(value: Any) -> Any:
    if isinstance(value, list):
        return [_clean(one) for one in value]
    if not isinstance(value, dict):
        return value
    if refused := next((name for name in value if name in _REFUSED), None):
        raise ManifestError(f"task.config.{refused}", f"is there, and {_REFUSED[refused]}", "remove it")
    return {name: _clean(one) for name, one in value.items() if name not in _LEFT_OUT and not name.startswith("_")}


def _check_sizes(config: Mapping[str, Any], context: int, ids: int) -> None:
    """What can be told without transformers; the trainer checks the rest."""
    for name in _LAYER_COUNTS:
        layers = config.get(name, 1)
        if type(layers) is not int or not 1 <= layers <= LAYERS_MAX:
            raise ManifestError(f"task.config.{name}", f"is {layers!r}", f"use 1 to {LAYERS_MAX}")
    check_vocabulary(config.get("vocab_size", ids), ids)
    positions = config.get("max_position_embeddings", config.get("n_positions", context))
    check_context(positions, context)


def check_vocabulary(vocabulary: Any, ids: int) -> None:
    """Raises ManifestError where the model has no place for all of so many ids."""
    if type(vocabulary) is not int or vocabulary < ids:
        problem = f"is {vocabulary!r}, and the tokenizer has {ids} ids"
        raise ManifestError("task.config.vocab_size", problem, f"use {ids} or more")


def check_context(positions: Any, context: int) -> None:
    """Raises ManifestError where a window is longer than the model has positions for."""
    if type(positions) is int and context > positions:
        problem = f"is {context}, and the model has {positions} positions"
        raise ManifestError("task.context", problem, f"use at most {positions}")


def fill_in(kind: str, options: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The options of a draft's task as they stand in the manifest. Paths are relative to the draft's `folder`. Raises
    ManifestError naming the field and the file."""
    filled = dict(options)
    if kind != CAUSAL_LM:
        return filled
    path = find_weights(kind, options, folder)
    if path is not None:
        filled.setdefault("config", str(path.absolute()))
        try:
            filled["weights"] = write_digest(WeightsFolder(path).load(())[0])
        except ConfigError as error:
            raise ManifestError("task.weights", error.problem, error.fix) from error
    if "config" in filled:
        filled["config"] = clean_config(_load_config(filled["config"], folder))
    path = find_tokenizer(options, folder)
    if path is not None:
        try:
            raw, ids = read_file(path)
        except ConfigError as error:
            raise ManifestError("task.tokenizer", error.problem, error.fix) from error
        filled["tokenizer"] = write_digest(blake3(raw).digest())
        if isinstance(filled.get("config"), dict):
            check_vocabulary(filled["config"].get("vocab_size"), ids)
    return filled


def find_weights(kind: str, options: Mapping[str, Any], folder: Path) -> Path | None:
    """The folder that a draft's task starts from, where it names one and not a digest."""
    weights = options.get("weights") if kind == CAUSAL_LM else None
    named = isinstance(weights, str) and parse_digest(weights) is None
    return folder / Path(str(weights)).expanduser() if named else None


def find_tokenizer(options: Mapping[str, Any], folder: Path) -> Path | None:
    """The file of the tokenizer that a draft's task names, where it names one and not a digest, or bytes."""
    tokenizer = options.get("tokenizer", BYTES)
    if not isinstance(tokenizer, str) or parse_digest(tokenizer) is not None:
        return None
    path = folder / Path(tokenizer).expanduser()
    return path / TOKENIZER_FILE if path.is_dir() else path


def _load_config(config: Any, folder: Path) -> Any:
    if not isinstance(config, str):
        return config
    text, what = config, "the text"
    if not config.lstrip().startswith("{"):
        path = folder / Path(config).expanduser()
        path = path / CONFIG_FILE if path.is_dir() else path
        what = str(path)
        try:
            with path.open("rb") as file:
                raw = file.read(CONFIG_BYTES_MAX + 1)
            if len(raw) > CONFIG_BYTES_MAX:
                problem = f"{path} is larger than {CONFIG_BYTES_MAX} bytes"
                raise ManifestError("task.config", problem, f"give a {CONFIG_FILE}")
            text = raw.decode()
        except OSError as error:
            fix = f"give the path of a {CONFIG_FILE}, or of the folder that has it"
            raise ManifestError("task.config", f"{path} cannot be read: {error.strerror or error}", fix) from error
        except UnicodeDecodeError as error:
            raise ManifestError("task.config", f"{path} is not UTF-8 text", f"give a {CONFIG_FILE}") from error
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ManifestError("task.config", f"{what} is not JSON: {error}", "mend it there") from error
