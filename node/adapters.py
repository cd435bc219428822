"""What a swarm learned on top of trained weights, as files: merged into these, or an adapter by itself (PEFT's layout).

Neither torch nor transformers is imported: the files are plain data. Merged tensors are float32: W + alpha / r * B A
where there are adapters, W + d where the whole model was trained. All others are those of the folder.

Invariant: nothing is merged into weights whose digest is not the manifest's.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from shoal.node.export import CertifiedModel, describe_model, split_tensors
from shoal.node.training.causal_lm_config import CAUSAL_LM, CausalLmConfig, read_causal_lm
from shoal.node.training.gpt_config import parse_options
from shoal.node.training.tokenizer import write_digest
from shoal.node.training.weights import WeightsFolder
from shoal.protocol.codecs import Float32s
from shoal.protocol.errors import ConfigError

ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG_FILE = "adapter_config.json"
_DOWN, _UP, _MATRIX = ".lora_A.weight", ".lora_B.weight", ".weight"
_PREFIX = "base_model.model."  # PEFT wraps the model twice
_TEMPORARY = ".partial"


def merge_weights(model: CertifiedModel, options: CausalLmConfig, folder: Path | None) -> dict[str, Float32s]:
    """The whole model's tensors by the names that the folder's files have; raises ConfigError."""
    assert options.weights is not None, "without weights there is nothing to merge into"
    text = write_digest(options.weights)
    fix = f"give the folder with the weights {text} that its members train with"
    if folder is None:
        instead = ", or take --format peft" if options.lora else ""
        raise ConfigError("--weights", "is missing: this swarm starts from trained weights", fix + instead)
    trained = split_tensors(model.manifest.layout, model.params)
    try:
        files = WeightsFolder(folder)
        names = files.match(_list_shapes(trained, options))
        digest, merged = files.load(frozenset(files.tensors))
    except ConfigError as error:
        raise ConfigError("--weights", error.problem, error.fix) from error
    if digest != options.weights:
        raise ConfigError("--weights", f"{folder} is {write_digest(digest)}, not {text}", fix)
    for parameter, name in names.items():
        merged[name] += _find_change(parameter, trained, options)
    return merged


def _list_shapes(trained: dict[str, Float32s], options: CausalLmConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Which parameters of the model change, and their shapes."""
    for name, tensor in trained.items():
        if options.lora is None:
            yield name, tensor.shape
        elif name.endswith(_UP):
            outputs, inputs = len(tensor), trained[name.removesuffix(_UP) + _DOWN].shape[1]
            shape = (inputs, outputs) if options.is_transposed else (outputs, inputs)
            yield name.removesuffix(_UP) + _MATRIX, shape


def _find_change(parameter: str, trained: dict[str, Float32s], options: CausalLmConfig) -> Float32s:
    if options.lora is None:
        return trained[parameter]
    layer = parameter.removesuffix(_MATRIX)
    change: Float32s = np.float32(options.lora.scale) * (trained[layer + _UP] @ trained[layer + _DOWN])
    return change.T if options.is_transposed else change


def write_peft_folder(model: CertifiedModel, out: Path) -> None:
    """Write the adapter by itself; raises ConfigError where the swarm trains none, OSError."""
    task = model.manifest.task
    options = read_causal_lm(parse_options(task.options)) if task.kind == CAUSAL_LM else None
    if options is None or options.lora is None:
        raise ConfigError("--format", "is peft, and this swarm trains no adapters", "use --format hf")
    if out.exists() and not out.is_dir():
        raise ConfigError("--out", f"{out} is a file", "give a folder")
    out.mkdir(parents=True, exist_ok=True)
    tensors = {_PREFIX + name: one for name, one in split_tensors(model.manifest.layout, model.params).items()}
    temporary = out / (ADAPTER_FILE + _TEMPORARY)
    save_file({name: np.ascontiguousarray(one) for name, one in tensors.items()}, temporary, describe_model(model))
    temporary.replace(out / ADAPTER_FILE)
    layers = [
        name.removesuffix(_UP) for name in split_tensors(model.manifest.layout, model.params) if name.endswith(_UP)
    ]
    temporary = out / (ADAPTER_CONFIG_FILE + _TEMPORARY)
    temporary.write_text(json.dumps(_describe_adapter(options, layers), indent=2) + "\n", encoding="utf-8")
    temporary.replace(out / ADAPTER_CONFIG_FILE)


def _describe_adapter(options: CausalLmConfig, layers: list[str]) -> dict[str, Any]:
    """adapter_config.json. The layers stand there by their whole names, so that nothing is matched by chance."""
    assert options.lora is not None, "there is an adapter"
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": options.lora.rank,
        "lora_alpha": options.lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": layers,
        "fan_in_fan_out": options.is_transposed,
        "bias": "none",
        "init_lora_weights": True,
        "inference_mode": True,
    }
