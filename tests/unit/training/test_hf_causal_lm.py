"""`shoal export --format hf` of a causal_lm: transformers loads the folder and computes what was trained."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from blake3 import blake3
from safetensors.numpy import load_file

from shoal.node.export import CertifiedModel
from shoal.node.hf_folder import write_hf_folder
from shoal.node.training.local_parameters import load_parameters
from shoal.node.training.tasks import describe, make_task
from shoal.protocol.errors import ConfigError
from shoal.protocol.manifest import make_manifest
from tests.unit.protocol.samples import DRAFT, PEERS
from tests.unit.training.lm_samples import GPT2, LLAMA, make_lm_task, write_tokenizer

transformers = pytest.importorskip("transformers", reason="an extra")
TIED = {**LLAMA, "tie_word_embeddings": True}
TOLERANCE = 1e-4  # of logits up to about 10
TEXT = 'the inner "größer ≥ 日本"'


def make_model(config: dict[str, Any], **options: Any) -> CertifiedModel:
    """No tensor is zero, so that each has its say."""
    task = make_lm_task(config, **options)
    manifest = make_manifest(replace(DRAFT, task=task), describe(task), PEERS[0], PEERS[:1])
    generator = np.random.Generator(np.random.Philox(5))
    params = (generator.standard_normal(manifest.layout.elements) * 0.5).astype(np.float32)
    return CertifiedModel(manifest=manifest, round=9, state_root=b"r" * 32, params=params)


@pytest.mark.parametrize("config", [GPT2, LLAMA, TIED], ids=["gpt2", "llama", "tied"])
def test_transformers_loads_the_folder_and_gives_the_same_logits(config: dict[str, Any], tmp_path: Path) -> None:
    model = make_model(config)
    write_hf_folder(model, tmp_path)
    own: Any = make_task(model.manifest.task).build_model().eval()
    load_parameters(own, model.params)
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    assert loaded.dtype == torch.float32 and type(loaded) is type(own)
    batch = torch.from_numpy(np.random.Generator(np.random.Philox(6)).integers(0, 300, (3, 32)))
    with torch.no_grad():
        expected, logits = own(batch).logits, loaded.eval()(batch).logits
    assert expected.abs().max() > 1, "there is something to compare"
    assert (logits - expected).abs().max() < TOLERANCE
    stored = load_file(tmp_path / "model.safetensors")
    assert sum(one.size for one in stored.values()) == model.params.size
    assert ("lm_head.weight" in stored) == (config is LLAMA)


def test_a_model_of_bytes_brings_its_tokenizer(tmp_path: Path) -> None:
    write_hf_folder(make_model(LLAMA), tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer(TEXT)["input_ids"] == list(TEXT.encode())


def test_the_swarms_tokenizer_goes_along_where_it_is_given(tmp_path: Path) -> None:
    path = write_tokenizer(tmp_path / "tokenizer.json")
    other = write_tokenizer(tmp_path / "other.json", ["t h"])
    model = make_model(LLAMA, tokenizer=f"blake3:{blake3(path.read_bytes()).hexdigest()}")
    write_hf_folder(model, tmp_path / "without")
    assert {one.name for one in (tmp_path / "without").iterdir()} == {"config.json", "model.safetensors"}
    write_hf_folder(model, tmp_path / "with", path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "with")
    ids = tokenizer(TEXT)["input_ids"]
    assert len(ids) < len(TEXT.encode()) and tokenizer.decode(ids) == TEXT
    for wrong in (other, tmp_path / "absent"):
        with pytest.raises(ConfigError):
            write_hf_folder(model, tmp_path / "wrong", wrong)
    assert json.loads((tmp_path / "with" / "config.json").read_text()) == {**LLAMA, "dtype": "float32"}
