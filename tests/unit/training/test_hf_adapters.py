"""What is exported of a swarm that started from trained weights: merged into them, and as an adapter by itself."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from shoal.node.adapters import write_peft_folder
from shoal.node.export import CertifiedModel
from shoal.node.hf_folder import write_hf_folder
from shoal.node.training.causal_lm_config import fill_in
from shoal.node.training.local_parameters import load_parameters
from shoal.node.training.tasks import describe, make_task
from shoal.protocol.errors import ConfigError
from shoal.protocol.manifest import make_manifest
from tests.unit.protocol.samples import DRAFT, PEERS
from tests.unit.training.lm_samples import GPT2, LLAMA, make_lm_task, write_weights

transformers = pytest.importorskip("transformers", reason="an extra")
TIED = {**LLAMA, "tie_word_embeddings": True}
LORA = {"lora_rank": 3, "lora_alpha": 7.5}
CONFIGS = pytest.mark.parametrize("config", [GPT2, LLAMA, TIED], ids=["gpt2", "llama", "tied"])
TOLERANCE = 1e-4  # of logits up to about 10
DOCS = (Path(__file__).parents[3] / "docs/tasks.md").read_text(encoding="utf-8")


def make_model(config: dict[str, Any], weights: str, scale: float = 0.2, **options: Any) -> CertifiedModel:
    """No tensor is zero, so that each has its say."""
    task = make_lm_task(config, weights=weights, **options)
    manifest = make_manifest(replace(DRAFT, task=task), describe(task), PEERS[0], PEERS[:1])
    generator = np.random.Generator(np.random.Philox(5))
    params = (generator.standard_normal(manifest.layout.elements) * scale).astype(np.float32)
    return CertifiedModel(manifest=manifest, round=9, state_root=b"r" * 32, params=params)


def own_logits(model: CertifiedModel, folder: Path, batch: torch.Tensor) -> torch.Tensor:
    task: Any = make_task(model.manifest.task)
    task.take_weights(folder, torch.device("cpu"))
    own = task.build_model().eval()
    load_parameters(own, model.params)
    with torch.no_grad():
        logits: torch.Tensor = own(input_ids=batch, use_cache=False).logits
    return logits


def check_folder(model: CertifiedModel, weights: Path, out: Path) -> None:
    """transformers computes with the exported folder what the trainer computes."""
    write_hf_folder(model, out, None, weights)
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    assert loaded.dtype == torch.float32
    batch = torch.from_numpy(np.random.Generator(np.random.Philox(6)).integers(0, 256, (3, 32)))
    plain = transformers.AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float32)
    with torch.no_grad():
        logits, before = loaded.eval()(batch).logits, plain.eval()(batch).logits
    expected = own_logits(model, weights, batch)
    assert (expected - before).abs().max() > 0.01, "something was learned"
    assert (logits - expected).abs().max() < TOLERANCE * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("how", ["all layers", "square ones", "whole"])
@CONFIGS
def test_the_merged_folder_gives_the_same_logits(config: dict[str, Any], how: str, tmp_path: Path) -> None:
    square = "attn.c_proj" if config is GPT2 else "o_proj"  # whose shape does not tell how the matrix lies
    options = {"all layers": LORA, "square ones": {**LORA, "lora_targets": [square]}, "whole": {}}[how]
    weights = tmp_path / "weights"
    check_folder(make_model(config, write_weights(weights, config), **options), weights, tmp_path / "out")


def test_weights_of_half_precision_are_merged_in_whole(tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    digest = write_weights(weights, LLAMA, "bfloat16", max_shard_size="20KB")
    check_folder(make_model(LLAMA, digest, **LORA), weights, tmp_path / "out")
    assert {one.dtype for one in load_file(tmp_path / "out" / "model.safetensors").values()} == {np.dtype(np.float32)}


def test_files_of_a_model_without_its_head_are_merged_under_their_own_names(tmp_path: Path) -> None:
    """As hubs have GPT-2, with the causal mask of each layer beside the weights."""
    weights = tmp_path / "weights"
    rest = {name: value for name, value in GPT2.items() if name != "model_type"}
    transformers.GPT2Model(transformers.GPT2Config(**rest)).save_pretrained(weights)
    stored = load_file(weights / "model.safetensors")
    save_file({**stored, "h.0.attn.bias": np.ones((1, 1, 64, 64), np.uint8)}, weights / "model.safetensors")
    options = fill_in("causal_lm", {"weights": "weights"}, tmp_path)
    model = make_model(options["config"], options["weights"], **LORA)
    check_folder(model, weights, tmp_path / "out")
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == set(stored)


def read_names(before: str) -> list[str]:
    return re.findall(r"[a-z0-9_]+", DOCS.partition(before)[2].partition(".")[0])


ADAPTED = read_names("the same logits merged as in training: ")
REFUSED = read_names("name tensors otherwise than the model: ")
# What these types call their sizes, where it is not what others do.
SIZES = {
    "codegen": {"num_attention_heads": 4, "rotary_dim": 4},
    "gptj": {"rotary_dim": 8},
    "helium": {"head_dim": 16},
    "deepseek_v3": {"num_key_value_heads": 2, "head_dim": 64},
}


@pytest.mark.parametrize("name", ADAPTED)
def test_adapters_of_the_types_that_the_docs_name_are_merged(name: str, tmp_path: Path) -> None:
    weights, config = tmp_path / "weights", {**LLAMA, "model_type": name, "pad_token_id": 0, **SIZES.get(name, {})}
    check_folder(make_model(config, write_weights(weights, config), **LORA), weights, tmp_path / "out")


@pytest.mark.parametrize("name", REFUSED)
def test_files_that_name_tensors_otherwise_are_refused(name: str, tmp_path: Path) -> None:
    config = {**LLAMA, "model_type": name, "pad_token_id": 0}
    model = make_model(config, write_weights(tmp_path, config), **LORA)
    with pytest.raises(ConfigError) as caught:
        own_logits(model, tmp_path, torch.zeros(1, 4, dtype=torch.int64))
    assert caught.value.field == "trainer.weights" and "no tensor" in caught.value.problem


def test_other_weights_are_not_merged_into(tmp_path: Path) -> None:
    digest, other = write_weights(tmp_path / "own", LLAMA), write_weights(tmp_path / "other", LLAMA, "bfloat16")
    model = make_model(LLAMA, digest, **LORA)
    write_weights(tmp_path / "narrow", {**LLAMA, "intermediate_size": 48})
    for folder, word in (
        (None, "is missing"),
        (tmp_path / "other", other),
        (tmp_path / "narrow", "[48, 32]"),
        (tmp_path / "absent", "is no folder"),
    ):
        with pytest.raises(ConfigError) as caught:
            write_hf_folder(model, tmp_path / "out", None, folder)
        assert caught.value.field == "--weights" and word in caught.value.problem
        assert not (tmp_path / "out").exists()
    task = make_lm_task(LLAMA)
    manifest = make_manifest(replace(DRAFT, task=task), describe(task), PEERS[0], PEERS[:1])
    plain = replace(model, manifest=manifest, params=np.zeros(manifest.layout.elements, np.float32))
    with pytest.raises(ConfigError, match="starts from none"):
        write_hf_folder(plain, tmp_path / "out", None, tmp_path / "own")


@CONFIGS
def test_the_adapter_by_itself_is_as_peft_writes_it(config: dict[str, Any], tmp_path: Path) -> None:
    """Read as PEFT documents its files: names behind base_model.model., W + alpha / r * B A."""
    weights, out = tmp_path / "weights", tmp_path / "out"
    model = make_model(config, write_weights(weights, config), **LORA)
    write_peft_folder(model, out)
    described = json.loads((out / "adapter_config.json").read_text())
    stored = load_file(out / "adapter_model.safetensors")
    assert (described["peft_type"], described["r"], described["lora_alpha"]) == ("LORA", 3, 7.5)
    assert described["fan_in_fan_out"] == (config is GPT2)
    layers = described["target_modules"]
    assert set(stored) == {f"base_model.model.{layer}.lora_{one}.weight" for layer in layers for one in "AB"}
    plain: Any = transformers.AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float32).eval()
    for layer in layers:
        down, up = (stored[f"base_model.model.{layer}.lora_{one}.weight"] for one in "AB")
        change = torch.from_numpy(7.5 / 3 * up @ down)
        with torch.no_grad():
            plain.get_parameter(f"{layer}.weight").add_(change.T if described["fan_in_fan_out"] else change)
    batch = torch.arange(60).view(2, 30)
    with torch.no_grad():
        logits = plain(batch).logits
    assert (logits - own_logits(model, weights, batch)).abs().max() < TOLERANCE * 10


def test_without_adapters_there_is_none_to_write(tmp_path: Path) -> None:
    model = make_model(LLAMA, write_weights(tmp_path / "weights", LLAMA))
    with pytest.raises(ConfigError) as caught:
        write_peft_folder(model, tmp_path / "out")
    assert caught.value.field == "--format" and not (tmp_path / "out").exists()
