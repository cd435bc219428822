"""The options of causal_lm: what a draft may say, what of it stands in the manifest, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blake3 import blake3
from safetensors.numpy import save_file

from shoal.node.training.causal_lm_config import CONFIG_BYTES_MAX, Lora, clean_config, fill_in, read_causal_lm
from shoal.node.training.weights import WeightsFolder
from shoal.protocol.errors import ManifestError
from tests.unit.training.lm_samples import LLAMA, MERGES, write_tokenizer

ELSEWHERE = {
    "auto_map": {"AutoConfig": "x/y--z.Z"},
    "attn_implementation": "someone/kernel",
    "_attn_implementation": "a/b",
}
WEIGHTS = f"blake3:{'5' * 64}"


def test_nothing_is_passed_on_that_makes_transformers_look_elsewhere() -> None:
    nested = {
        **LLAMA,
        **ELSEWHERE,
        "torch_dtype": "bfloat16",
        "rope_scaling": {"type": "x", **ELSEWHERE},
        "n": [ELSEWHERE],
    }
    assert clean_config(nested) == {**LLAMA, "rope_scaling": {"type": "x"}, "n": [{}]}
    read = read_causal_lm({"config": {**LLAMA, **ELSEWHERE}, "context": 32})
    assert read.config == LLAMA and read.model_type == "llama"
    with pytest.raises(ManifestError) as caught:
        read_causal_lm({"config": {**LLAMA, "quantization_config": {}}})
    assert caught.value.field == "task.config.quantization_config"


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({}, "task.config"),
        ({"config": "config.json"}, "task.config"),
        ({"config": []}, "task.config"),
        ({"config": {}}, "task.config.model_type"),
        ({"config": {"model_type": 3}}, "task.config.model_type"),
        ({"config": {**LLAMA, "num_hidden_layers": 10_000_000}}, "task.config.num_hidden_layers"),
        ({"config": {**LLAMA, "num_hidden_layers": "2"}}, "task.config.num_hidden_layers"),
        ({"config": {**LLAMA, "vocab_size": 255}}, "task.config.vocab_size"),
        ({"config": LLAMA, "context": 65}, "task.context"),
        ({"config": LLAMA, "context": 4}, "task.context"),
        ({"config": LLAMA, "context": 32, "tokenizer": "tokenizer.json"}, "task.tokenizer"),
        ({"config": LLAMA, "context": 32, "tokenizer": 3}, "task.tokenizer"),
        ({"config": LLAMA, "context": 32, "width": 3}, "task.width"),
        ({"config": LLAMA, "weights": "folder"}, "task.weights"),
        ({"config": LLAMA, "weights": "bytes"}, "task.weights"),
        ({"config": LLAMA, "lora_rank": 4}, "task.weights"),
        ({"config": LLAMA, "weights": WEIGHTS, "lora_rank": 1025}, "task.lora_rank"),
        ({"config": LLAMA, "weights": WEIGHTS, "lora_rank": 4, "lora_alpha": 0}, "task.lora_alpha"),
        ({"config": LLAMA, "weights": WEIGHTS, "lora_rank": 4, "lora_targets": "q_proj"}, "task.lora_targets"),
        ({"config": LLAMA, "weights": WEIGHTS, "lora_alpha": 8.0}, "task.lora_alpha"),
        ({"config": LLAMA, "weights": WEIGHTS, "lora_targets": ["q_proj"]}, "task.lora_targets"),
    ],
)
def test_options_of_a_manifest_are_refused_by_name(options: dict[str, Any], field: str) -> None:
    if "config" in options and "context" not in options:
        options = {**options, "context": 32}
    with pytest.raises(ManifestError) as caught:
        read_causal_lm(options)
    assert caught.value.field == field


def test_the_window_and_the_tokenizer_have_defaults() -> None:
    read = read_causal_lm({"config": {**LLAMA, "max_position_embeddings": 512}})
    assert (read.context, read.tokenizer) == (256, bytes(32))
    assert (read.weights, read.lora) == (None, None)


def test_adapters_have_defaults() -> None:
    read = read_causal_lm({"config": LLAMA, "context": 32, "weights": WEIGHTS, "lora_rank": 4})
    assert (read.weights, read.lora) == (b"U" * 32, Lora(rank=4, alpha=16.0, targets=()))
    assert read.lora is not None and read.lora.scale == 4.0


@pytest.mark.parametrize("how", ["table", "text", "file", "folder"])
def test_a_draft_says_the_config_in_one_of_four_ways(tmp_path: Path, how: str) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({**LLAMA, **ELSEWHERE, "pad_token_id": None}))
    config: Any = {
        "table": {**LLAMA, "pad_token_id": None},
        "text": json.dumps({**LLAMA, "pad_token_id": None}),
        "file": "model/config.json",
        "folder": "model",
    }[how]
    filled = fill_in("causal_lm", {"config": config, "context": 32}, tmp_path)
    assert filled == {"config": {**LLAMA, "pad_token_id": None}, "context": 32}
    assert fill_in("causal_lm", filled, tmp_path) == filled


def test_of_a_tokenizer_the_digest_goes_into_the_manifest(tmp_path: Path) -> None:
    path = write_tokenizer(tmp_path / "tokenizer.json")
    filled = fill_in("causal_lm", {"config": LLAMA, "tokenizer": "tokenizer.json"}, tmp_path)
    assert filled["tokenizer"] == f"blake3:{blake3(path.read_bytes()).hexdigest()}"
    assert fill_in("causal_lm", {"config": LLAMA, "tokenizer": str(tmp_path)}, Path("/")) == filled
    assert fill_in("causal_lm", filled, tmp_path) == filled
    with pytest.raises(ManifestError) as caught:
        fill_in("causal_lm", {"config": {**LLAMA, "vocab_size": 257}, "tokenizer": "tokenizer.json"}, tmp_path)
    assert caught.value.field == "task.config.vocab_size" and f"use {256 + len(MERGES) + 1}" in caught.value.fix
    with pytest.raises(ManifestError) as caught:  # the library's default may be too few
        fill_in("causal_lm", {"config": {"model_type": "llama"}, "tokenizer": "tokenizer.json"}, tmp_path)
    assert caught.value.field == "task.config.vocab_size"


def test_of_weights_the_digest_goes_into_the_manifest_and_the_config_comes_along(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"x": np.arange(3, dtype=np.float32)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**LLAMA, **ELSEWHERE}))
    digest = f"blake3:{WeightsFolder(folder).load(())[0].hex()}"
    filled = fill_in("causal_lm", {"weights": "model", "lora_rank": 4}, tmp_path)
    assert filled == {"weights": digest, "lora_rank": 4, "config": LLAMA}
    assert fill_in("causal_lm", filled, Path("/")) == filled
    own = {**LLAMA, "max_position_embeddings": 32}
    assert fill_in("causal_lm", {"weights": "model", "config": own}, tmp_path)["config"] == own
    (folder / "config.json").unlink()
    with pytest.raises(ManifestError) as caught:
        fill_in("causal_lm", {"weights": "model"}, tmp_path)
    assert caught.value.field == "task.config" and str(folder / "config.json") in caught.value.problem


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"config": "absent.json"}, "task.config"),
        ({"config": "bad.json"}, "task.config"),
        ({"config": "binary.json"}, "task.config"),
        ({"config": "{"}, "task.config"),
        ({"config": "large.json"}, "task.config"),
        ({"config": LLAMA, "tokenizer": "absent.json"}, "task.tokenizer"),
        ({"config": LLAMA, "tokenizer": "bad.json"}, "task.tokenizer"),
        ({"config": LLAMA, "weights": "absent.json"}, "task.weights"),
        ({"config": LLAMA, "weights": "bad.json"}, "task.weights"),
    ],
)
def test_files_that_cannot_be_used_are_refused_by_name(tmp_path: Path, options: dict[str, Any], field: str) -> None:
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe")
    (tmp_path / "large.json").write_text(json.dumps({**LLAMA, "note": "x" * CONFIG_BYTES_MAX}))
    with pytest.raises(ManifestError) as caught:
        fill_in("causal_lm", options, tmp_path)
    assert caught.value.field == field
    named = next((value for value in options.values() if isinstance(value, str) and value.endswith(".json")), "text")
    assert named in caught.value.problem


def test_other_tasks_are_left_as_they_are(tmp_path: Path) -> None:
    assert fill_in("byte_gpt", {"config": "x", "tokenizer": "y"}, tmp_path) == {"config": "x", "tokenizer": "y"}
