"""Configs and tokenizers as small as they get, for the tests of causal language models and of tokens."""

import json
from pathlib import Path
from typing import Any

from shoal.protocol.manifest import Task

CONTEXT = 32
GPT2 = {"model_type": "gpt2", "vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
END = "<|end|>"
# In byte-level tokenizers "Ġ" is the space.
MERGES = ["t h", "th e", "Ġ the", "i n", "e r", "Ġ a", "o n", "r e", "e n", "i s"]


def make_lm_task(config: dict[str, Any], **options: Any) -> Task:
    return Task(kind="causal_lm", options=json.dumps({"config": config, "context": CONTEXT, **options}))


def write_tokenizer(path: Path, merges: list[str] = MERGES) -> Path:
    """A byte-level BPE of 256 bytes, these merges and one special token."""
    from shoal.node.hf_folder import byte_letters, describe_tokenizer

    document = describe_tokenizer()
    letters = [*byte_letters(), *(merge.replace(" ", "") for merge in merges)]
    document["model"]["vocab"] = {letter: number for number, letter in enumerate(letters)}
    document["model"]["merges"] = merges
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    document["added_tokens"] = [{"id": len(letters), "content": END, **flags}]
    path.write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")
    return path


def write_weights(folder: Path, config: dict[str, Any], dtype: str = "float32", **saved: Any) -> str:
    """A folder as save_pretrained writes it, of a model in which no tensor is zeros or ones; returns the digest as it
    stands in a manifest."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from shoal.node.training.tokenizer import write_digest
    from shoal.node.training.weights import WeightsFolder

    rest = {key: value for key, value in config.items() if key != "model_type"}
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(11)
        library: Any = AutoModelForCausalLM  # whose functions bear no types
        model = library.from_config(AutoConfig.for_model(config["model_type"], **rest))
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.to(getattr(torch, dtype)).save_pretrained(folder, **saved)
    return write_digest(WeightsFolder(folder).load(())[0])


def write_parquet(path: Path, columns: dict[str, Any]) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path
