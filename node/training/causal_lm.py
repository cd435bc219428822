"""Causal language models of Hugging Face transformers, built from the config in the manifest (an extra: `hf`).

No weights and no code are loaded from anywhere: the class is one of the library's own, and its parameters are the
swarm's. transformers takes seconds to import, so that it is, here alone, and only when a model is built.

Invariant: a config from a manifest starts no download and runs no code but that of the installed library.
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

from shoal.node.training.causal_lm_config import CAUSAL_LM, check_context, check_vocabulary, read_causal_lm
from shoal.node.training.gpt_config import SAMPLE_TEMPERATURE
from shoal.node.training.initial_values import list_starts
from shoal.node.training.messages import DatasetChoice, Work
from shoal.node.training.streamed import StreamWindows, open_stream
from shoal.node.training.task_faults import TaskFault, blame
from shoal.node.training.tokenizer import INSTALL_HF, ByteTokenizer, Tokenizer, open_tokenizer
from shoal.node.training.tokens import TokenWindows, check_size, open_tokens
from shoal.protocol.errors import ManifestError
from shoal.protocol.layout import Layout, make_layout

# Read by the libraries when they are imported. A trainer has decided before (datasets_library.choose_hub_access), and
# nothing here is ever asked of the hub either way.
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


class CausalLm:
    """Next-token prediction. Options: `config`, `context` and `tokenizer` (causal_lm_config.py)."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = read_causal_lm(options)
        self._library = _import_transformers()
        self._config = self._read_config()
        self._tokenizer_path: Path | None = None
        self._cache: Path | None = None
        self._tokenizer: Tokenizer = ByteTokenizer()

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
            return make_layout(list_starts(self.build_model, lambda model: model.initialize_weights()))

    def build_model(self) -> nn.Module:
        with _tell_config():
            # Without a dtype it would be that of the config, and without this word remote code could be asked for.
            model: nn.Module = self._library.AutoModelForCausalLM.from_config(
                self._config, dtype=torch.float32, trust_remote_code=False
            )
        return model

    def take_files(self, tokenizer: Path | None, cache: Path | None) -> None:
        self._tokenizer_path, self._cache = tokenizer, cache

    def open_dataset(self, choice: DatasetChoice, work: Work, folder: Path | None) -> StreamWindows:
        self._tokenizer = open_tokenizer(self._options.tokenizer, self._tokenizer_path)
        check_size(self._tokenizer, self._config.vocab_size)
        return open_stream(choice, self._tokenizer, context=self._options.context, work=work, folder=folder)

    def open_data(self, text: Path | None, work: Work) -> TokenWindows:
        self._tokenizer = open_tokenizer(self._options.tokenizer, self._tokenizer_path)
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
        logits = _compute_logits(model, inputs).float()  # (B, T, V)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def sample(self, model: nn.Module, prompt: bytes, size_bytes: int) -> bytes:
        device = next(model.parameters()).device
        generator = torch.Generator().manual_seed(0)
        (ids,) = self._tokenizer.encode([prompt.decode(errors="replace") or "\n"])
        first = len(ids)
        for _ in range(size_bytes):  # most tokens are a byte or more
            window = torch.tensor([ids[-self._options.context :]], device=device)  # (1, T)
            logits = _compute_logits(model, window)[0, -1, : self._tokenizer.size].float().cpu()
            chances = torch.softmax(logits / SAMPLE_TEMPERATURE, dim=-1)
            ids.append(int(torch.multinomial(chances, 1, generator=generator)))
            if len(ids) - first >= size_bytes // 16 and len(self._tokenizer.decode(ids[first:])) >= size_bytes:
                break
        return self._tokenizer.decode(ids[first:])[:size_bytes]


def _compute_logits(model: nn.Module, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids, use_cache=False, return_dict=True).logits
    return logits


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
