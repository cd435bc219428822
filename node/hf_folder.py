"""A certified model as a folder that Hugging Face transformers loads: config, weights, generation config, tokenizer.

The byte-level GPT (node/training/model.py) computes what transformers calls NanoChat, tensor for tensor: RMSNorm
without gains, also on the embedding and, after the rotation, on queries and keys; rotary positions that turn the same
way; ReLU squared; untied head; no biases. Only the joint projection of queries, keys and values is cut in three. A
token is a byte and its id is the byte's value.

A `causal_lm` is such a model already: its config and its tensors go along as they are, and the tokenizer's file where
it is given. Where the swarm started from trained weights, these and what was learned are merged (node/adapters.py).

Neither torch nor transformers is imported: the files are plain data.
"""

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from blake3 import blake3
from safetensors.numpy import save_file

from shoal.node.adapters import merge_weights
from shoal.node.export import CertifiedModel, describe_model, split_tensors
from shoal.node.training.causal_lm_config import CAUSAL_LM, CONFIG_FILE, TOKENIZER_FILE, read_causal_lm
from shoal.node.training.gpt_config import (
    KIND,
    MLP_RATIO,
    ROTARY_PERIOD,
    SAMPLE_TEMPERATURE,
    VOCABULARY,
    GptConfig,
    parse_options,
    read_gpt_config,
)
from shoal.node.training.tokenizer import ByteTokenizer, read_file, write_digest
from shoal.protocol.codecs import Float32s
from shoal.protocol.errors import ConfigError

WEIGHTS_FILE = "model.safetensors"
# NanoChat came with this release; `rms_norm_eps` is what torch's rms_norm adds for float32 where none is given.
TRANSFORMERS_MIN = "4.57"
RMS_NORM_EPS = float(np.finfo(np.float32).eps)
_TEMPORARY = ".partial"


def map_gpt_tensors(config: GptConfig, tensors: Mapping[str, Float32s]) -> dict[str, Float32s]:
    """The same values under the names and in the shapes of NanoChatForCausalLM."""
    mapped = {"model.embed_tokens.weight": tensors["embedding.weight"], "lm_head.weight": tensors["head.weight"]}
    for number in range(config.layers):
        ours, theirs = f"blocks.{number}.", f"model.layers.{number}."
        joint = tensors[ours + "attention_in.weight"].reshape(3, config.width, config.width)
        for which, matrix in zip("qkv", joint, strict=True):
            mapped[f"{theirs}self_attn.{which}_proj.weight"] = matrix
        mapped[theirs + "self_attn.o_proj.weight"] = tensors[ours + "attention_out.weight"]
        mapped[theirs + "mlp.fc1.weight"] = tensors[ours + "mlp_in.weight"]
        mapped[theirs + "mlp.fc2.weight"] = tensors[ours + "mlp_out.weight"]
    return mapped


def describe_gpt(config: GptConfig) -> dict[str, Any]:
    """config.json."""
    return {
        "architectures": ["NanoChatForCausalLM"],
        "model_type": "nanochat",
        "vocab_size": VOCABULARY,
        "hidden_size": config.width,
        "intermediate_size": MLP_RATIO * config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.heads,
        "max_position_embeddings": config.context,
        "hidden_act": "relu2",
        "rms_norm_eps": RMS_NORM_EPS,
        "rope_parameters": {"rope_type": "default", "rope_theta": ROTARY_PERIOD},
        "rope_theta": ROTARY_PERIOD,
        "final_logit_softcapping": None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "dtype": "float32",
        "torch_dtype": "float32",
        "transformers_version": TRANSFORMERS_MIN,
    }


def byte_letters() -> list[str]:
    """The letter that stands for each byte in byte-level tokenizers: itself where it can be shown, else from U+0100 on
    (Radford et al., GPT-2, 2019)."""
    shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = iter(range(0x100, 0x200))
    return [chr(byte) if byte in shown else chr(next(hidden)) for byte in range(VOCABULARY)]


def describe_tokenizer() -> dict[str, Any]:
    """tokenizer.json: byte-level BPE without a single merge."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {letter: byte for byte, letter in enumerate(byte_letters())},
            "merges": [],
        },
    }


def _write_gpt(model: CertifiedModel, out: Path, tokenizer: bytes | None, weights: Path | None) -> None:
    if tokenizer is not None:
        raise ConfigError("--tokenizer", f"is given, and a token of {KIND} is a byte", "leave it out")
    _refuse_weights(weights)
    config = read_gpt_config(parse_options(model.manifest.task.options))
    tensors = map_gpt_tensors(config, split_tensors(model.manifest.layout, model.params))
    assert sum(one.size for one in tensors.values()) == model.params.size, "every parameter goes along, once"
    _write_weights(model, tensors, out)
    _write_json(out / "config.json", describe_gpt(config))
    generation = {"do_sample": True, "temperature": SAMPLE_TEMPERATURE, "transformers_version": TRANSFORMERS_MIN}
    _write_json(out / "generation_config.json", generation)
    _write_byte_tokenizer(out, config.context)


def _write_causal_lm(model: CertifiedModel, out: Path, tokenizer: bytes | None, weights: Path | None) -> None:
    options = read_causal_lm(parse_options(model.manifest.task.options))
    if tokenizer is not None and blake3(tokenizer).digest() != options.tokenizer:
        problem = f"is another one than the swarm's, {write_digest(options.tokenizer)}"
        raise ConfigError("--tokenizer", problem, "give the file that its members train with")
    if options.weights is None:
        _refuse_weights(weights)
        # Of tensors that the model ties, the layout has the first one alone; so have files that transformers writes.
        tensors = split_tensors(model.manifest.layout, model.params)
    else:
        tensors = merge_weights(model, options, weights)
    _write_weights(model, tensors, out)
    _write_json(out / CONFIG_FILE, {**options.config, "dtype": "float32"})
    if options.tokenizer == ByteTokenizer.digest:
        _write_byte_tokenizer(out, options.context)
    elif tokenizer is not None:
        _write_bytes(out / TOKENIZER_FILE, tokenizer)
        _write_json(out / "tokenizer_config.json", _describe_tokenizer_use(options.context))


def _refuse_weights(weights: Path | None) -> None:
    if weights is not None:
        raise ConfigError("--weights", "is given, and this swarm starts from none", "leave it out")


def _write_weights(model: CertifiedModel, tensors: Mapping[str, Float32s], out: Path) -> None:
    temporary = out / (WEIGHTS_FILE + _TEMPORARY)
    save_file({name: np.ascontiguousarray(one) for name, one in tensors.items()}, temporary, describe_model(model))
    temporary.replace(out / WEIGHTS_FILE)


def _write_byte_tokenizer(out: Path, context: int) -> None:
    _write_json(out / TOKENIZER_FILE, describe_tokenizer())
    _write_json(out / "tokenizer_config.json", _describe_tokenizer_use(context))


def _describe_tokenizer_use(context: int) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    _write_bytes(path, (json.dumps(content, ensure_ascii=False, indent=2) + "\n").encode())


def _write_bytes(path: Path, content: bytes) -> None:
    temporary = path.with_name(path.name + _TEMPORARY)
    temporary.write_bytes(content)
    temporary.replace(path)


FOLDERS: Mapping[str, Callable[[CertifiedModel, Path, bytes | None, Path | None], None]] = MappingProxyType(
    {KIND: _write_gpt, CAUSAL_LM: _write_causal_lm}
)


def write_hf_folder(
    model: CertifiedModel, out: Path, tokenizer: Path | None = None, weights: Path | None = None
) -> None:
    """Write the folder, with the swarm's tokenizer where its file is given; `weights` is the folder of those that the
    swarm started from. Raises ConfigError where transformers knows no such model or a file is another one, OSError."""
    kind = model.manifest.task.kind
    if kind not in FOLDERS:
        fix = f"use --format safetensors; a folder is written for: {', '.join(FOLDERS)}"
        raise ConfigError("--format", f"transformers has no architecture for the task {kind!r}", fix)
    if out.exists() and not out.is_dir():
        raise ConfigError("--out", f"{out} is a file", "give a folder")
    raw = None if tokenizer is None else read_file(tokenizer)[0]
    is_new = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    try:
        FOLDERS[kind](model, out, raw, weights)
    except ConfigError:
        if is_new:
            with suppress(OSError):  # not empty: something was written before the fault was found
                out.rmdir()
        raise
