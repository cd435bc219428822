"""Training from trained weights: adapters on frozen ones, and the whole model by what it moves away from them."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from shoal.node.training.causal_lm_config import fill_in
from shoal.node.training.local_parameters import load_parameters
from shoal.node.training.loop import InnerLoop
from shoal.node.training.messages import Begin, Evaluate, Evaluated, Ready, Sample, Sampled, Start
from shoal.node.training.optimizers import ADAM_BETAS, ADAM_EPSILON
from shoal.node.training.tasks import describe, make_task
from shoal.protocol.errors import ConfigError, ManifestError
from shoal.protocol.layout import UNIFORM, ZEROS, initialise
from shoal.protocol.manifest import Task
from tests.unit.training.lm_samples import GPT2, LLAMA, make_lm_task, write_weights
from tests.unit.training.tiny import SEED, TEXT, TRAINING, make_work

transformers = pytest.importorskip("transformers", reason="an extra")

# Without dropout, so that a reference need not draw the same random numbers.
CALM = {**GPT2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
TIED = {**LLAMA, "tie_word_embeddings": True}
CONFIGS = pytest.mark.parametrize("config", [CALM, LLAMA, TIED], ids=["gpt2", "llama", "tied"])
RANK, ALPHA, STEPS = 4, 6.0, 12
LORA = {"lora_rank": RANK, "lora_alpha": ALPHA}
STEPPED = replace(TRAINING, inner_steps=STEPS, learning_rate=1e-2, weight_decay=0.0)


def make_loop(task: Task, **options: Any) -> tuple[InnerLoop, Any]:
    layout = describe(task)
    work = make_work(STEPPED, {"task": task, "layout_digest": layout.digest})
    memory = np.full((2, layout.elements), np.nan, dtype=np.float32)
    memory[0] = initialise(layout, SEED)
    text = str(Path(TEXT).parent / "json")
    return InnerLoop(Start(**{"work": work, "device": "cpu", "threads": 1, "text": text, **options}), memory), memory


def train(loop: InnerLoop) -> Ready:
    assert not list(loop.handle(Begin(round=1, adopt=True), 0.0))
    reports: list[Any] = []
    while loop.training:
        reports += loop.step(0.0)
    (ready,) = (report for report in reports if isinstance(report, Ready))
    return ready


def load_model(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def train_plainly(model: Any, trained: list[Tensor], weights: Callable[[], dict[str, Tensor]], batches: Any) -> float:
    """AdamW by torch.optim on the loss of the model with these weights; the mean loss."""
    optimizer = torch.optim.AdamW(trained, betas=ADAM_BETAS, eps=ADAM_EPSILON, weight_decay=0.0)
    total = 0.0
    for step in range(STEPS):
        batch = torch.from_numpy(batches.batch(step))
        logits = functional_call(model, weights(), kwargs={"input_ids": batch[:, :-1]}).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it so
        nn.utils.clip_grad_norm_(trained, STEPPED.gradient_clip)
        optimizer.param_groups[0]["lr"] = STEPPED.learning_rate * min(1.0, (step + 1) / STEPPED.warmup_steps)
        optimizer.step()
        total += loss.item()
    return total / STEPS


def split(task: Task, flat: Any) -> dict[str, Tensor]:
    layout = describe(task)
    parts = np.split(flat.copy(), layout.offsets[1:])
    return {
        spec.name: torch.from_numpy(part).view(spec.shape) for spec, part in zip(layout.tensors, parts, strict=True)
    }


@CONFIGS
def test_only_adapters_are_in_the_layout(config: dict[str, Any], tmp_path: Path) -> None:
    layout = describe(make_lm_task(config, weights=write_weights(tmp_path, config), **LORA))
    layers = [spec.name.removesuffix(".lora_A.weight") for spec in layout.tensors[::2]]
    assert [spec.name for spec in layout.tensors] == [f"{at}.lora_{one}.weight" for at in layers for one in "AB"]
    own = ("c_attn", "c_proj", "c_fc", "c_proj")
    others = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    expected = own if config is CALM else others
    assert [layer.rpartition(".")[2] for layer in layers] == [*expected, *expected]
    model = load_model(tmp_path)
    for down, up in zip(layout.tensors[::2], layout.tensors[1::2], strict=True):
        shape = model.get_parameter(down.name.replace(".lora_A", "")).shape
        outputs, inputs = shape[::-1] if config is CALM else shape
        assert (down.shape, up.shape) == ((RANK, inputs), (outputs, RANK))
        assert down.init == UNIFORM and down.std == pytest.approx(1.0 / (3 * inputs) ** 0.5) and up.init == ZEROS


@CONFIGS
def test_adapters_are_trained_as_by_a_plain_loop(config: dict[str, Any], tmp_path: Path) -> None:
    """The reference adds alpha / r * B A to the matrices of the model as transformers loads it."""
    task = make_lm_task(config, weights=write_weights(tmp_path, config), **LORA)
    loop, memory = make_loop(task, weights=str(tmp_path))
    assert loop.started().unused == ()
    ready = train(loop)
    model, adapters = load_model(tmp_path), split(task, memory[0])
    frozen = {name: one.detach().clone() for name, one in model.named_parameters()}
    for one in adapters.values():
        one.requires_grad_()

    def weights() -> dict[str, Tensor]:
        summed = dict(frozen)
        for name in list(adapters)[::2]:
            change = ALPHA / RANK * adapters[name.replace("lora_A", "lora_B")] @ adapters[name]
            summed[name.replace(".lora_A", "")] = frozen[name.replace(".lora_A", "")] + (
                change.T if config is CALM else change
            )
        return summed

    mean = train_plainly(model, list(adapters.values()), weights, loop._batches)
    assert ready.loss_mean == pytest.approx(mean, rel=1e-5)
    flat = torch.cat([one.detach().flatten() for one in adapters.values()]).numpy()
    assert np.abs(flat - memory[0]).max() > 1e-2, "it has learned"
    assert np.abs(flat - memory[1]).max() < 2e-4


@CONFIGS
def test_the_whole_model_is_trained_as_by_a_plain_loop(config: dict[str, Any], tmp_path: Path) -> None:
    task = make_lm_task(config, weights=write_weights(tmp_path, config))
    assert {spec.init for spec in describe(task).tensors} == {ZEROS}
    loop, memory = make_loop(task, weights=str(tmp_path))
    assert not memory[0].any()
    ready = train(loop)
    model = load_model(tmp_path)
    start = {name: one.detach().clone() for name, one in model.named_parameters()}
    assert [spec.name for spec in describe(task).tensors] == list(start)
    mean = train_plainly(model, list(model.parameters()), lambda: dict(model.named_parameters()), loop._batches)
    assert ready.loss_mean == pytest.approx(mean, rel=1e-5)
    flat = torch.cat([(one.detach() - start[name]).flatten() for name, one in model.named_parameters()]).numpy()
    # The gradient of a bias of the keys is nothing but rounding, which AdamW makes steps of: 1 in 500 parameters here.
    assert np.abs(flat).max() > 1e-2 and np.quantile(np.abs(flat - memory[1]), 0.99) < 1e-5


@pytest.mark.parametrize("options", [LORA, {}], ids=["adapters", "whole"])
@CONFIGS
def test_it_starts_as_it_was_trained_and_is_measured_and_writes(
    config: dict[str, Any], options: dict[str, Any], tmp_path: Path
) -> None:
    task = make_lm_task(config, weights=write_weights(tmp_path, config), **options)
    loop, _ = make_loop(task, weights=str(tmp_path))
    batch = torch.from_numpy(loop._batches.held_out())
    with torch.no_grad():
        logits = load_model(tmp_path).eval()(batch[:, :-1]).logits
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).item()
    for _ in range(2):  # before and after training: what is measured is the base
        (measured,) = loop.handle(Evaluate(), 0.0)
        assert isinstance(measured, Evaluated) and measured.loss_nats == pytest.approx(expected, rel=1e-5)
        train(loop)
    (sampled,) = loop.handle(Sample(prompt=b"def ", size_bytes=20), 0.0)
    assert isinstance(sampled, Sampled) and len(sampled.text) == 20


def frozen_tensors(model: Any) -> list[Tensor]:
    start: dict[str, Tensor] | None = getattr(model, "_start", None)
    return list(start.values()) if start else [one for one in model.buffers() if one.dim() == 2]


@pytest.mark.parametrize("options", [LORA, {}], ids=["adapters", "whole"])
def test_trained_weights_are_in_memory_once_and_stay(options: dict[str, Any], tmp_path: Path) -> None:
    task = make_lm_task(TIED, weights=write_weights(tmp_path, TIED), **options)
    loop, _ = make_loop(task, weights=str(tmp_path))
    before = [one.clone() for one in frozen_tensors(loop._model)]
    train(loop)
    ours, others = frozen_tensors(loop._model), frozen_tensors(loop._base_model())
    assert len(ours) >= 15 and all((one == old).all() for one, old in zip(ours, before, strict=True))
    assert [one.data_ptr() for one in ours] == [one.data_ptr() for one in others]
    if options:
        model: Any = loop._model
        assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr(), "tied ones are one"
        assert {name.rpartition(".lora_")[0] for name, _ in model.named_parameters()} == {
            name for name, layer in model.named_modules() if type(layer) is nn.Linear and name != "lm_head"
        }


def test_dropout_is_that_of_the_config_and_not_of_what_is_measured(tmp_path: Path) -> None:
    task = make_task(make_lm_task(GPT2, weights=write_weights(tmp_path, GPT2), **LORA))
    task.take_weights(tmp_path, torch.device("cpu"))  # type: ignore[attr-defined]
    model: Any = task.build_model()
    load_parameters(model, initialise(task.layout(), SEED))
    ids = torch.arange(32)[None]
    assert not torch.equal(model(ids).logits, model(ids).logits)
    assert torch.equal(model.eval()(ids).logits, load_model(tmp_path).eval()(ids).logits)


def test_files_of_half_precision_and_of_several_parts_are_the_same_start(tmp_path: Path) -> None:
    write_weights(tmp_path / "whole", LLAMA, "bfloat16")
    digest = write_weights(tmp_path / "parts", LLAMA, "bfloat16", max_shard_size="20KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 2
    task = make_lm_task(LLAMA, weights=digest, **LORA)
    folders = [tmp_path / "whole", tmp_path / "parts"]
    first, second = (train(make_loop(task, weights=str(folder))[0]) for folder in folders)
    assert first.loss_mean == second.loss_mean


def test_weights_without_the_head_that_the_model_ties_are_enough(tmp_path: Path) -> None:
    """Hubs have files of the inner model alone, without its name before the tensors'."""
    model = transformers.GPT2Model(transformers.GPT2Config(**{k: v for k, v in CALM.items() if k != "model_type"}))
    model.save_pretrained(tmp_path)
    options = fill_in("causal_lm", {"config": CALM, "weights": "."}, tmp_path)
    task = make_lm_task(CALM, weights=options["weights"], **LORA)
    assert train(make_loop(task, weights=str(tmp_path))[0]).tokens == STEPS * 8 * 32


def test_other_weights_than_the_swarms_are_refused_with_the_digest_that_is_wanted(tmp_path: Path) -> None:
    digest = write_weights(tmp_path / "own", LLAMA)
    other = write_weights(tmp_path / "other", TIED)
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    torch.save({}, pickled / "pytorch_model.bin")
    task = make_lm_task(LLAMA, weights=digest, **LORA)
    for folder, word in ((None, "is missing"), (tmp_path / "other", other), (pickled, "pickle"), (tmp_path, "has no")):
        with pytest.raises(ConfigError) as caught:
            make_loop(task, weights=str(folder) if folder else None)
        assert caught.value.field == "trainer.weights" and word in caught.value.problem
        assert digest in caught.value.fix or word in ("pickle", "has no")


def test_weights_of_another_shape_than_the_config_says_are_refused(tmp_path: Path) -> None:
    digest = write_weights(tmp_path, LLAMA)
    for change, word in (
        ({"intermediate_size": 80}, "[64, 32]"),
        ({"num_hidden_layers": 3}, "no tensor model.layers.2"),
        ({"vocab_size": 301}, "[300, 32]"),
    ):
        with pytest.raises(ConfigError) as caught:
            make_loop(make_lm_task({**LLAMA, **change}, weights=digest, **LORA), weights=str(tmp_path))
        assert caught.value.field == "trainer.weights" and word in caught.value.problem


def test_where_the_manifest_is_made_the_files_are_compared_with_the_model(tmp_path: Path) -> None:
    digest = write_weights(tmp_path, LLAMA)
    for options in (LORA, {}):
        assert describe(make_lm_task(LLAMA, weights=digest, **options), (), tmp_path).elements
        with pytest.raises(ManifestError) as caught:
            describe(make_lm_task({**LLAMA, "vocab_size": 301}, weights=digest, **options), (), tmp_path)
        assert caught.value.field == "task.weights" and "[300, 32]" in caught.value.problem


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["q_proj", "v_proj"], 4),
        (["0.mlp.up_proj"], 1),
        (["model.layers.1.self_attn.o_proj", "k_proj"], 3),
        (["lm_head"], 1),
    ],
)
def test_targets_are_names_or_their_last_parts(targets: list[str], expected: int) -> None:
    layout = describe(make_lm_task(LLAMA, weights=f"blake3:{'1' * 64}", lora_rank=2, lora_targets=targets))
    assert len(layout.tensors) == 2 * expected
    assert all(any(f".{target}.lora_" in f".{spec.name}" for target in targets) for spec in layout.tensors)


@pytest.mark.parametrize(
    ("config", "target", "word"),
    [
        (LLAMA, "proj", "'proj'"),
        (LLAMA, "embed_tokens", "'embed_tokens'"),
        (TIED, "lm_head", "shares its matrix"),
        (CALM, "lm_head", "'lm_head'"),
    ],
)
def test_targets_that_are_no_layers_of_their_own_are_refused(config: dict[str, Any], target: str, word: str) -> None:
    with pytest.raises(ManifestError) as caught:
        describe(make_lm_task(config, weights=f"blake3:{'1' * 64}", lora_rank=2, lora_targets=[target]))
    assert caught.value.field == "task.lora_targets" and word in caught.value.problem


def test_what_makes_more_tensors_than_a_layout_has_is_refused() -> None:
    with pytest.raises(ManifestError) as caught:
        describe(make_lm_task({**LLAMA, "num_hidden_layers": 80}, weights=f"blake3:{'1' * 64}", lora_rank=2))
    assert "1120" in caught.value.problem


def test_a_manifest_without_weights_needs_none(tmp_path: Path) -> None:
    loop, _ = make_loop(make_lm_task(TIED), weights=str(tmp_path))
    assert train(loop).steps == STEPS
    assert json.loads(make_lm_task(TIED).options) == {"config": TIED, "context": 32}
