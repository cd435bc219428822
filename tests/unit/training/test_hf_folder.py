"""The exported folder computes what the trained model computes: by numpy from the files alone, and by transformers."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file

from shoal.node.export import CertifiedModel
from shoal.node.hf_folder import write_hf_folder
from shoal.node.training.local_parameters import load_parameters
from shoal.node.training.tasks import describe, make_task
from shoal.protocol.errors import ConfigError
from shoal.protocol.manifest import Manifest, Task, make_manifest
from tests.unit.protocol.samples import DRAFT, PEERS

OPTIONS = {"layers": 2, "heads": 4, "width": 64, "context": 48}
TASK = Task(kind="byte_gpt", options=json.dumps(OPTIONS))
TOLERANCE = 2e-5  # of logits up to about 10; float32 sums in another order differ by less
TEXT = 'def f(x):\n\treturn "größer ≥ 日本"  # \x00\x7f\r\n'
Values = NDArray[np.float64]


@pytest.fixture
def model() -> CertifiedModel:
    """No tensor is zero, so that each has its say."""
    manifest: Manifest = make_manifest(replace(DRAFT, task=TASK), describe(TASK), PEERS[0], PEERS[:1])
    generator = np.random.Generator(np.random.Philox(5))
    params = (generator.standard_normal(manifest.layout.elements) * 0.2).astype(np.float32)
    return CertifiedModel(manifest=manifest, round=9, state_root=b"r" * 32, params=params)


@pytest.fixture
def folder(model: CertifiedModel, tmp_path: Path) -> Path:
    write_hf_folder(model, tmp_path / "out")
    return tmp_path / "out"


def make_batch() -> NDArray[np.int64]:
    return np.random.Generator(np.random.Philox(6)).integers(0, 256, (3, OPTIONS["context"]))


def own_logits(model: CertifiedModel, batch: NDArray[np.int64]) -> NDArray[np.float32]:
    own = make_task(TASK).build_model()
    load_parameters(own, model.params)
    with torch.no_grad():
        logits: NDArray[np.float32] = own(torch.from_numpy(batch)).numpy()
    return logits


def norm(x: Values, epsilon: float) -> Values:
    out: Values = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + epsilon)
    return out


def rotate(x: Values, period: float) -> Values:
    """Every pair (x[i], x[i + D/2]) turned clockwise by position * period^(-2i/D)."""
    positions, width = x.shape[-2:]
    angles = np.arange(positions)[:, None] * period ** (-np.arange(0, width, 2) / width)
    turned = (x[..., : width // 2] + 1j * x[..., width // 2 :]) * np.exp(-1j * angles)
    return np.concatenate((turned.real, turned.imag), axis=-1)


def compute_logits(config: Mapping[str, Any], weights: Mapping[str, Values], batch: NDArray[np.int64]) -> Values:
    """NanoChat as transformers documents it, in float64, from the folder's files and nothing else."""
    heads, epsilon = config["num_attention_heads"], config["rms_norm_eps"]
    width = config["hidden_size"] // heads
    x = norm(weights["model.embed_tokens.weight"][batch], epsilon)
    count, positions, _ = x.shape
    future = np.triu(np.full((positions, positions), -np.inf), 1)
    for number in range(config["num_hidden_layers"]):
        layer = f"model.layers.{number}."
        normed = norm(x, epsilon)
        q, k, v = (
            (normed @ weights[f"{layer}self_attn.{one}_proj.weight"].T)
            .reshape(count, positions, heads, width)
            .transpose(0, 2, 1, 3)
            for one in "qkv"
        )
        period = config["rope_parameters"]["rope_theta"]
        q, k = norm(rotate(q, period), epsilon), norm(rotate(k, period), epsilon)
        scores = q @ k.transpose(0, 1, 3, 2) / np.sqrt(width) + future
        chances = np.exp(scores - scores.max(axis=-1, keepdims=True))
        chances /= chances.sum(axis=-1, keepdims=True)
        mixed = (chances @ v).transpose(0, 2, 1, 3).reshape(count, positions, heads * width)
        x = x + mixed @ weights[layer + "self_attn.o_proj.weight"].T
        hidden = np.maximum(norm(x, epsilon) @ weights[layer + "mlp.fc1.weight"].T, 0) ** 2
        x = x + hidden @ weights[layer + "mlp.fc2.weight"].T
    logits: Values = norm(x, epsilon) @ weights["lm_head.weight"].T
    return logits


def test_the_files_alone_compute_what_the_model_computes(model: CertifiedModel, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    weights = {name: one.astype(np.float64) for name, one in load_file(folder / "model.safetensors").items()}
    batch = make_batch()
    expected = own_logits(model, batch)
    assert np.abs(expected).max() > 1, "there is something to compare"
    assert np.abs(compute_logits(config, weights, batch) - expected).max() < TOLERANCE
    assert (config["hidden_act"], config["final_logit_softcapping"], config["tie_word_embeddings"]) == (
        "relu2",
        None,
        False,
    )


def test_each_tensor_matters_and_each_parameter_goes_along(model: CertifiedModel, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    weights = {name: one.astype(np.float64) for name, one in load_file(folder / "model.safetensors").items()}
    assert sum(one.size for one in weights.values()) == model.params.size
    batch = make_batch()
    expected = own_logits(model, batch)
    for name in weights:
        changed = weights | {name: weights[name] * 1.5 + 0.01}
        assert np.abs(compute_logits(config, changed, batch) - expected).max() > 100 * TOLERANCE, name


def test_a_token_is_a_byte(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    assert sorted(vocabulary.values()) == list(range(256)) and tokenizer["model"]["merges"] == []
    assert (vocabulary["a"], vocabulary["~"], vocabulary["Ġ"], vocabulary["Ċ"]) == (97, 126, 32, 10), "GPT-2's letters"
    assert (vocabulary["Ā"], vocabulary["ÿ"]) == (0, 255)


def test_the_weights_say_whose_they_are_and_nothing_half_written_stays(model: CertifiedModel, folder: Path) -> None:
    with safe_open(folder / "model.safetensors", framework="numpy") as file:
        assert file.metadata() == {
            "format": "pt",
            "task": "byte_gpt",
            "task_options": TASK.options,
            "round": "9",
            "state_root": model.state_root.hex(),
        }
    write_hf_folder(model, folder)
    assert {one.name for one in folder.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_a_task_without_an_architecture_is_refused(model: CertifiedModel, tmp_path: Path) -> None:
    other = replace(model, manifest=replace(model.manifest, task=Task(kind="none")))
    with pytest.raises(ConfigError) as caught:
        write_hf_folder(other, tmp_path / "out")
    assert caught.value.field == "--format" and not (tmp_path / "out").exists()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError) as caught:
        write_hf_folder(model, tmp_path / "file")
    assert caught.value.field == "--out"


# In a process of its own: importing transformers takes seconds and warns.
SCRIPT = """
import sys, numpy, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, batch, out, text = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder).eval()
assert type(model).__name__ == "NanoChatForCausalLM", type(model)
tokenizer = AutoTokenizer.from_pretrained(folder)
ids = tokenizer(text)["input_ids"]
assert ids == list(text.encode()), ids
assert tokenizer.decode(ids) == text
with torch.no_grad():
    numpy.save(out, model(torch.from_numpy(numpy.load(batch))).logits.numpy())
    made = model.generate(torch.tensor([ids[:4]]), max_new_tokens=8, do_sample=False)
assert made.shape == (1, 12)
"""


@pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None,
    reason="transformers is not installed (pip install 'shoal[hf]'); the numpy check above needs none",
)
def test_transformers_loads_the_folder_and_gives_the_same_logits(
    model: CertifiedModel, folder: Path, tmp_path: Path
) -> None:
    batch = make_batch()
    np.save(tmp_path / "batch.npy", batch)
    words = [sys.executable, "-c", SCRIPT, str(folder), str(tmp_path / "batch.npy"), str(tmp_path / "logits.npy")]
    done = subprocess.run([*words, TEXT.replace("\0", "")], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert np.abs(np.load(tmp_path / "logits.npy") - own_logits(model, batch)).max() < TOLERANCE
