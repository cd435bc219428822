"""Frozen weights in the type of their files: the same bits as from float32, in half of the memory."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import Tensor, nn

from shoal.node.hf_folder import write_hf_folder
from shoal.node.training.local_parameters import load_parameters
from shoal.node.training.messages import Evaluate, Evaluated
from shoal.node.training.stored_matrices import freeze, list_matrices
from shoal.node.training.tasks import make_task
from shoal.node.training.tokenizer import write_digest
from shoal.node.training.weights import WeightsFolder
from shoal.protocol.layout import initialise
from tests.unit.training.lm_samples import GPT2, LLAMA, make_lm_task, write_weights
from tests.unit.training.test_hf_adapters import make_model
from tests.unit.training.test_lora import LORA, frozen_tensors, make_loop, train
from tests.unit.training.tiny import SEED

transformers = pytest.importorskip("transformers", reason="an extra")
TIED = {**LLAMA, "tie_word_embeddings": True}
# Its embeddings are of a class of its own, which multiplies what nn.Embedding returns.
GEMMA = {**TIED, "model_type": "gemma", "head_dim": 16}
IDS = torch.arange(99).view(3, 33)
CONFIGS = pytest.mark.parametrize("config", [GPT2, LLAMA, GEMMA], ids=["gpt2", "llama", "gemma"])


def write_both(tmp_path: Path, config: dict[str, Any], dtype: str = "bfloat16") -> dict[str, Path]:
    """The same values in half precision and in float32, by their digests."""
    half, whole = tmp_path / "half", tmp_path / "whole"
    digest = write_weights(half, config, dtype)
    transformers.AutoModelForCausalLM.from_pretrained(half, dtype=torch.float32).save_pretrained(whole)
    assert {one.dtype for one in load_file(whole / "model.safetensors").values()} == {np.dtype(np.float32)}
    return {digest: half, write_digest(WeightsFolder(whole).load(())[0]): whole}


def open_model(config: dict[str, Any], digest: str, folder: Path) -> tuple[Any, Any]:
    """The task and its model, with adapters as they start."""
    task: Any = make_task(make_lm_task(config, weights=digest, **LORA))
    task.take_weights(folder, torch.device("cpu"))
    model = task.build_model().eval()
    load_parameters(model, initialise(task.layout(), SEED))
    return task, model


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("options", [LORA, {}], ids=["adapters", "whole"])
@CONFIGS
def test_training_gives_the_bits_that_float32_gives(
    config: dict[str, Any], options: dict[str, Any], dtype: str, tmp_path: Path
) -> None:
    said = []
    for digest, folder in write_both(tmp_path, config, dtype).items():
        loop, memory = make_loop(make_lm_task(config, weights=digest, **options), weights=str(folder))
        torch.manual_seed(3)  # of the dropout in GPT-2's config
        ready = train(loop)
        (measured,) = loop.handle(Evaluate(), 0.0)
        assert isinstance(measured, Evaluated) and np.abs(memory[1] - memory[0]).max() > 1e-2, "it has learned"
        said.append((ready.loss_mean, measured.loss_nats, memory[1].tobytes()))
    assert said[0] == said[1]


@pytest.mark.parametrize("options", [LORA, {}], ids=["adapters", "whole"])
@CONFIGS
def test_matrices_take_half_of_the_memory(config: dict[str, Any], options: dict[str, Any], tmp_path: Path) -> None:
    ours, others = (
        frozen_tensors(make_loop(make_lm_task(config, weights=digest, **options), weights=str(folder))[0]._model)
        for digest, folder in write_both(tmp_path, config).items()
    )
    assert [one.shape for one in ours] == [one.shape for one in others] and len(ours) >= 10
    assert sum(one.nbytes for one in others) == 2 * sum(one.nbytes for one in ours)


@pytest.mark.parametrize("casts", [False, True], ids=["float32", "autocast"])
@CONFIGS
def test_gradients_are_the_same_with_and_without_autocast(config: dict[str, Any], casts: bool, tmp_path: Path) -> None:
    """A GPU computes under autocast; which of its kernels is taken is its own affair."""
    found: list[list[Tensor]] = []
    for digest, folder in write_both(tmp_path, config).items():
        task, model = open_model(config, digest, folder)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=casts):
            loss = task.loss(model, IDS)
        loss.backward()
        found.append([loss.detach(), *(one.grad for one in model.parameters())])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert any(one.abs().max() > 0 for one in found[0][1:])


def test_no_widened_copy_is_kept_for_the_backward_pass(tmp_path: Path) -> None:
    task, model = open_model(LLAMA, write_weights(tmp_path, LLAMA, "bfloat16"), tmp_path)
    shapes = {tuple(one.shape) for one in frozen_tensors(model)}
    kept: list[Tensor] = []

    def keep(one: Tensor) -> Tensor:
        kept.append(one)
        return one

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda one: one):
        task.loss(model, IDS)
    of_matrices = [one for one in kept if {tuple(one.shape), tuple(one.shape[::-1])} & shapes]
    assert {one.dtype for one in of_matrices} == {torch.bfloat16}
    assert len(of_matrices) == 2 * 7 + 1 - 3, "all but the first three, whose input has no gradient"


def test_what_is_exported_is_the_same_to_the_bit(tmp_path: Path) -> None:
    merged, folders = [], write_both(tmp_path, LLAMA)
    for digest, folder in folders.items():
        out = tmp_path / f"out-{folder.name}"
        write_hf_folder(make_model(LLAMA, digest, **LORA), out, None, folder)
        merged.append(load_file(out / "model.safetensors"))
    before = load_file(folders[digest] / "model.safetensors")
    assert merged[0].keys() == merged[1].keys() == before.keys()
    for name, one in merged[0].items():
        assert one.dtype == np.float32 and one.tobytes() == merged[1][name].tobytes()
        assert np.array_equal(one, before[name]) != name.endswith("proj.weight"), "adapters and nothing else are merged"


class Odd(nn.Linear):
    """A class of its own, which may do with its matrix what it likes."""


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Embedding(7, 4)
        self.bounded = nn.Embedding(7, 4, max_norm=1.0)
        self.plain = nn.Linear(4, 3)
        self.odd = Odd(4, 5)
        self.head = nn.Linear(4, 7)
        self.head.weight = self.rows.weight
        self.tied = nn.Linear(4, 5)
        self.tied.weight = self.odd.weight
        self.norm = nn.LayerNorm(4)


def test_what_others_may_read_stays_float32() -> None:
    assert list_matrices(Mixed(), None) == {"rows.weight", "plain.weight"}
    assert list_matrices(Mixed(), Odd) == {"rows.weight", "plain.weight", "odd.weight"}


def test_the_weight_of_a_layer_is_float32_for_whoever_asks() -> None:
    model = Mixed()
    values = {name: one.detach() for name, one in model.named_parameters()}
    stored = {**values, **{name: values[name].half() for name in ("rows.weight", "plain.weight")}}
    freeze(model, {name: one for name, one in stored.items() if name != "plain.bias"}, None)
    assert [name for name, _ in model.named_parameters()] == ["plain.bias"], "what is not named stays a parameter"
    for layer in (model.rows, model.plain, model.head):
        assert layer.weight.dtype == torch.float32 and isinstance(layer, nn.Linear | nn.Embedding)
    assert torch.equal(model.plain.weight, stored["plain.weight"].float())
    rows = model.rows(torch.tensor([0, 6, 3]))
    assert torch.equal(rows, stored["rows.weight"].float()[[0, 6, 3]])
    assert torch.equal(model.head(rows), nn.functional.linear(rows, stored["rows.weight"].float(), model.head.bias))
