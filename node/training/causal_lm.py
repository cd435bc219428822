"""Causal language models of Hugging Face transformers, built from the config in the manifest (an extra: `hf`).

No code is loaded from anywhere: the class is one of the library's own, and its parameters are the swarm's. Where the
manifest names trained weights, these are read from this machine's folder and stand still: the swarm's parameters are
adapters on top (lora.py), or what the whole model has moved away from them (displaced.py). transformers takes seconds
to import, so that it is, here alone, and only when a model is built.

Invariants: a config from a manifest starts no download and runs no code but that of the installed library; trained
weights are in memory once, whatever the number of models.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from shoal.node.training.causal_lm_config import CAUSAL_LM, check_context, check_vocabulary, read_causal_lm
from shoal.node.training.displaced import Displaced, start_displacement
from shoal.node.training.gpt_config import SAMPLE_TEMPERATURE
from shoal.node.training.initial_values import list_starts
from shoal.node.training.lora import adapt, find_layers, start_adapter
from shoal.node.training.messages import DatasetChoice, Work
from shoal.node.training.parameters import Shape, list_specs
from shoal.node.training.stored_matrices import freeze, list_matrices, view_stored
from shoal.node.training.streamed import StreamWindows, open_stream
from shoal.node.training.task_faults import TaskFault, blame
from shoal.node.training.tokenizer import INSTALL_HF, ByteTokenizer, Tokenizer, open_tokenizer, write_digest
from shoal.node.training.tokens import TokenWindows, check_size, open_tokens
from shoal.node.training.weights import FIELD, WeightsFolder
from shoal.protocol.errors import ConfigError, ManifestError
from shoal.protocol.layout import Layout, make_layout

# Read by the libraries when they are imported. A trainer has decided before (datasets_library.choose_hub_access), and
# nothing here is ever asked of the hub either way.
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


class CausalLm:
    """Next-token prediction. Options: `config`, `context`, `tokenizer`, `weights`, `lora_…` (causal_lm_config.py)."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = read_causal_lm(options)
        self._library = _import_transformers()
        self._config = self._read_config()
        self._tokenizer_path: Path | None = None
        self._cache: Path | None = None
        self._tokenizer: Tokenizer = ByteTokenizer()
        self._frozen: dict[str, Tensor] = {}  # the trained weights by parameter, for all models that are built

    def _read_config(self) -> Any:
        name = self._options.model_type
        known = self._library.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        if name not in known:
            fix = f"use one of its {len(known)} model types, such as gpt2, llama or qwen3"
            problem = f"transformers {self._library.__version__} has no causal language model {name[:64]!r}"
            raise ManifestError("task.config.model_type", problem, fix)
        with _tell_config():
            rest = {key: value for key, value in self._options.config.items() if key != "model_type"}
            config = self._library.AutoConfig.for_model(name, **rest)
            text = config.get_text_config()
        if text is not config:
            fix = f"use {text.model_type}, with the options that stand in its text_config"
            raise ManifestError("task.config.model_type", f"{name[:64]!r} is a model of more than text", fix)
        check_vocabulary(getattr(config, "vocab_size", None), 1)
        check_context(getattr(config, "max_position_embeddings", None), self._options.context)
        return config

    def layout(self) -> Layout:
        with _tell_config():
            if self._options.weights is None:
                return make_layout(list_starts(self._build_inner, lambda model: model.initialize_weights()))
            if self._options.lora is None:
                return make_layout(list_specs(self._build_inner, start_displacement))
            return make_layout(list_specs(self._build_adapted, start_adapter))

    def build_model(self) -> nn.Module:
        with _tell_config():
            if self._options.weights is None:
                return self._build_inner()
            if self._options.lora is None:
                return Displaced(self._build_inner(), self._frozen)
            return self._build_adapted()

    def _build_inner(self) -> nn.Module:
        # Without a dtype it would be that of the config, and without this word remote code could be asked for.
        model: nn.Module = self._library.AutoModelForCausalLM.from_config(
            self._config, dtype=torch.float32, trust_remote_code=False
        )
        return model

    def _build_adapted(self) -> nn.Module:
        """Of the frozen tensors nothing is allocated here; before `take_weights` they are shapes alone."""
        lora = self._options.lora
        assert lora is not None, "asked for where there are adapters"
        with _parameters_without_memory():
            model = self._build_inner()
        frozen = self._frozen or {name: one.detach() for name, one in model.named_parameters()}
        transposed = self._find_transposed()
        layers = find_layers(model, transposed or nn.Linear, lora.targets)
        adapt(model, lora, layers, transposed=transposed is not None)
        freeze(model, frozen, transposed)
        return model

    def _find_transposed(self) -> type[nn.Module] | None:
        """The class of the linear layers of the model's blocks, where their matrices lie the other way."""
        if not self._options.is_transposed:
            return None
        layer: type[nn.Module] = import_module("transformers.pytorch_utils").Conv1D
        return layer

    def take_weights(self, folder: Path | None, device: torch.device) -> None:
        wanted = self._options.weights
        if wanted is None:
            return
        text = write_digest(wanted)
        fix = f"get the folder with the weights {text} from whoever made the swarm and name it in trainer.weights"
        if folder is None:
            raise ConfigError(FIELD, "is missing: this swarm starts from trained weights", fix)
        files, shapes = WeightsFolder(folder), self._list_shapes()
        names = {name: found for name, _ in shapes if (found := files.find(name)) is not None}
        digest, contents = files.read(frozenset(names.values()))
        if digest != wanted:
            raise ConfigError(FIELD, f"{folder} is {write_digest(digest)}, and the swarm starts from {text}", fix)
        files.match(shapes)
        kept = self._list_kept()
        for name, found in names.items():
            tensor = view_stored(contents.pop(found), files.tensors[found])
            self._frozen[name] = (tensor if name in kept else tensor.float()).to(device)

    def _list_kept(self) -> frozenset[str]:
        """The parameters whose weights stay in the type of their files. The sum with a displacement is float32 whatever
        that is."""
        with _tell_config(), _parameters_without_memory():
            model = self._build_inner()
        if self._options.lora is None:
            return frozenset(name for name, _ in model.named_parameters())
        return list_matrices(model, self._find_transposed())

    def check_weights(self, folder: Path) -> None:
        try:
            WeightsFolder(folder).match(self._list_shapes())
        except ConfigError as error:
            raise ManifestError("task.weights", error.problem, error.fix) from error

    def _list_shapes(self) -> list[tuple[str, Shape]]:
        with _tell_config(), _parameters_without_memory():
            return [(name, tuple(one.shape)) for name, one in self._build_inner().named_parameters()]

    @property
    def context(self) -> int:
        return self._options.context

    @property
    def unused(self) -> tuple[str, ...]:
        tokenizer = ("tokenizer",) if self._options.tokenizer == ByteTokenizer.digest else ()
        return tokenizer if self._options.weights is not None else (*tokenizer, "weights")

    @property
    def tokens(self) -> tuple[bytes, int]:
        return self._options.tokenizer, self._config.vocab_size

    def open_tokenizer(self, path: Path | None) -> Tokenizer:
        return open_tokenizer(self._options.tokenizer, path)

    def logits(self, model: nn.Module, ids: Tensor) -> Tensor:
        logits: Tensor = model(input_ids=ids, use_cache=False, return_dict=True).logits
        return logits

    def take_files(self, tokenizer: Path | None, cache: Path | None) -> None:
        self._tokenizer_path, self._cache = tokenizer, cache

    def open_dataset(self, choice: DatasetChoice, work: Work, folder: Path | None) -> StreamWindows:
        self._tokenizer = self.open_tokenizer(self._tokenizer_path)
        check_size(self._tokenizer, self._config.vocab_size)
        return open_stream(choice, self._tokenizer, context=self._options.context, work=work, folder=folder)

    def open_data(self, text: Path | None, work: Work) -> TokenWindows:
        self._tokenizer = self.open_tokenizer(self._tokenizer_path)
        return open_tokens(
            text,
            self._tokenizer,
            context=self._options.context,
            vocabulary=self._config.vocab_size,
            work=work,
            cache=self._cache,
        )

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        inputs, targets = batch[:, :-1], batch[:, 1:]  # each (B, T)
        logits = self.logits(model, inputs).float()  # (B, T, V)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def sample(self, model: nn.Module, prompt: bytes, size_bytes: int) -> bytes:
        device = next(model.parameters()).device
        generator = torch.Generator().manual_seed(0)
        (ids,) = self._tokenizer.encode([prompt.decode(errors="replace") or "\n"])
        first = len(ids)
        for _ in range(size_bytes):  # most tokens are a byte or more
            window = torch.tensor([ids[-self._options.context :]], device=device)  # (1, T)
            logits = self.logits(model, window)[0, -1, : self._tokenizer.size].float().cpu()
            chances = torch.softmax(logits / SAMPLE_TEMPERATURE, dim=-1)
            ids.append(int(torch.multinomial(chances, 1, generator=generator)))
            if len(ids) - first >= size_bytes // 16 and len(self._tokenizer.decode(ids[first:])) >= size_bytes:
                break
        return self._tokenizer.decode(ids[first:])[:size_bytes]


@contextmanager
def _parameters_without_memory() -> Iterator[None]:
    """Parameters that are made inside are shapes alone (torch's meta device); buffers, which files do not have, are
    whole."""

    def take_away(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:  # tied ones come twice and stay one
            return parameter
        return nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    handle = register_module_parameter_registration_hook(take_away)  # type: ignore[arg-type]  # what it returns counts
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _tell_config() -> Iterator[None]:
    """What the library raises about a config is an error of the manifest."""
    try:
        with blame("transformers"):
            yield
    except TaskFault as fault:
        problem = f"transformers makes no model of it: {fault}"
        raise ManifestError(
            "task.config", problem[:900], "mend it, or use the version of transformers it is for"
        ) from fault


def _import_transformers() -> Any:
    for name, value in OFFLINE.items():
        os.environ.setdefault(name, value)
    try:
        transformers: Any = import_module("transformers")
        import_module("transformers.models.auto.modeling_auto")
    except ModuleNotFoundError as error:
        problem = f"{CAUSAL_LM} needs transformers: there is no {error.name} here"
        raise ManifestError("task.kind", problem, INSTALL_HF) from error
    transformers.logging.set_verbosity_error()
    return transformers
