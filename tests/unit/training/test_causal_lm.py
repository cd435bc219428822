"""Causal language models of transformers: the layout, how parameters start, tied weights, and that they learn."""

import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from blake3 import blake3
from torch import nn

from shoal.node.training.initial_values import list_starts
from shoal.node.training.local_parameters import load_parameters
from shoal.node.training.loop import InnerLoop
from shoal.node.training.messages import Begin, Evaluate, Evaluated, Ready, Sample, Sampled, Start
from shoal.node.training.tasks import describe, make_task
from shoal.protocol.errors import InputError, ManifestError
from shoal.protocol.layout import ONES, UNIFORM, ZEROS, initialise
from shoal.protocol.manifest import Task
from tests.unit.training.lm_samples import GPT2, LLAMA, make_lm_task, write_tokenizer
from tests.unit.training.tiny import SEED, TEXT, TRAINING, make_work

DOCS = (Path(__file__).parents[3] / "docs/tasks.md").read_text(encoding="utf-8")
DESCRIBED = DOCS.partition("small models of these types were described: ")[2].partition(".")[0]

pytest.importorskip("transformers", reason="an extra")
TIED = {**LLAMA, "tie_word_embeddings": True}
TEXT_FILES = str(Path(TEXT).parent / "json")


def make_loop(task: Task, **options: Any) -> tuple[InnerLoop, Any]:
    layout = describe(task)
    training = replace(TRAINING, inner_steps=40, learning_rate=1e-2)
    work = make_work(training, {"task": task, "layout_digest": layout.digest})
    memory = np.full((2, layout.elements), np.nan, dtype=np.float32)
    memory[0] = initialise(layout, SEED)
    return InnerLoop(
        Start(**{"work": work, "device": "cpu", "threads": 1, "text": TEXT_FILES, **options}), memory
    ), memory


@pytest.mark.parametrize("config", [GPT2, LLAMA, TIED], ids=["gpt2", "llama", "tied"])
def test_the_layout_is_that_of_the_model_and_starts_as_the_library_does(config: dict[str, Any]) -> None:
    task = make_task(make_lm_task(config))
    layout, model = task.layout(), task.build_model()
    assert [(spec.name, spec.shape) for spec in layout.tensors] == [
        (name, tuple(parameter.shape)) for name, parameter in model.named_parameters()
    ]
    for spec, parameter in zip(layout.tensors, model.parameters(), strict=True):
        values = parameter.detach()
        if spec.init != UNIFORM:
            assert (values == {ONES: 1.0, ZEROS: 0.0}[spec.init]).all(), spec.name
        else:
            # The mean square of n normal values scatters by sqrt(2 / n); a padding token's row may be zeros.
            assert math.isclose(values.std().item(), spec.std, rel_tol=5 / math.sqrt(spec.elements)), spec.name


def test_tied_weights_are_one_parameter_and_stay_tied() -> None:
    task = make_task(make_lm_task(TIED))
    names = [spec.name for spec in task.layout().tensors]
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names
    assert task.layout().elements == make_task(make_lm_task(LLAMA)).layout().elements - 300 * 32
    model: Any = task.build_model()
    load_parameters(model, np.arange(task.layout().elements, dtype=np.float32))
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert model.lm_head.weight[0, 1] == 1.0


@pytest.mark.parametrize("config", [GPT2, TIED], ids=["gpt2", "llama"])
def test_a_small_model_learns_is_measured_and_writes(config: dict[str, Any]) -> None:
    loop, memory = make_loop(make_lm_task(config))
    assert (loop.started().loss_unit, loop.started().unused) == ("nats a token", ())
    (measured,) = loop.handle(Evaluate(), 0.0)
    assert isinstance(measured, Evaluated) and abs(measured.loss_nats - math.log(300)) < 0.1, "it knows nothing yet"
    assert not list(loop.handle(Begin(round=1, adopt=True), 0.0))
    reports = []
    while loop.training:
        reports += loop.step(0.0)
    (ready,) = (report for report in reports if isinstance(report, Ready))
    assert ready.tokens == 40 * 8 * 32 and np.isfinite(memory[1]).all()
    memory[0] = memory[1]
    (measured,) = loop.handle(Evaluate(), 0.0)
    assert isinstance(measured, Evaluated) and measured.loss_nats < 4.0
    samples = [list(loop.handle(Sample(prompt=b"def ", size_bytes=20), 0.0)) for _ in range(2)]
    assert samples[0] == samples[1] and isinstance(samples[0][0], Sampled) and len(samples[0][0].text) == 20


def test_it_learns_the_tokens_of_a_tokenizer(tmp_path: Path) -> None:
    path = write_tokenizer(tmp_path / "tokenizer.json")
    task = make_lm_task(GPT2, tokenizer=f"blake3:{blake3(path.read_bytes()).hexdigest()}")
    with pytest.raises(InputError) as caught:
        make_loop(task)
    assert caught.value.field == "trainer.tokenizer"
    unused, _ = make_loop(make_lm_task(GPT2), tokenizer=str(path), weights=str(tmp_path))
    assert unused.started().unused == ("trainer.tokenizer", "trainer.weights"), "a token is a byte"
    loop, _ = make_loop(task, tokenizer=str(path), cache=str(tmp_path / "cache"))
    assert loop.started().unused == ()
    assert len(list((tmp_path / "cache").iterdir())) == 3
    assert not list(loop.handle(Begin(round=1, adopt=True), 0.0))
    while loop.training:
        reports = list(loop.step(0.0))
    (ready,) = (report for report in reports if isinstance(report, Ready))
    assert ready.loss_mean < math.log(300) - 0.5
    (sampled,) = loop.handle(Sample(prompt=b"the \xff", size_bytes=30), 0.0)
    assert isinstance(sampled, Sampled) and 0 < len(sampled.text) <= 30


@pytest.mark.parametrize("name", re.findall(r"[a-z0-9_]+", DESCRIBED))
def test_the_types_that_the_docs_name_are_described(name: str) -> None:
    layout = describe(make_lm_task({**LLAMA, "model_type": name, "pad_token_id": 0}))
    assert layout.elements < 20_000_000, "the sizes are those of the config, as far as the type calls them so"


@pytest.mark.parametrize(
    ("change", "field", "word"),
    [
        ({"model_type": "nope"}, "task.config.model_type", "nope"),
        ({"model_type": "clip"}, "task.config.model_type", "clip"),
        ({"hidden_size": 33}, "task.config", "hidden size"),
        ({"hidden_size": "wide"}, "task.config", "hidden_size"),
        ({"model_type": "mamba"}, "task.config", "A_log"),
        ({"model_type": "qwen3_next"}, "task.config", ""),
        ({"model_type": "rwkv"}, "task.config", ""),
        ({"model_type": "gemma3"}, "task.config.model_type", "more than text"),
    ],
)
def test_a_config_that_makes_no_model_is_refused(change: dict[str, Any], field: str, word: str) -> None:
    with pytest.raises(ManifestError) as caught:
        describe(make_lm_task({**LLAMA, **change}))
    assert caught.value.field == field and word in caught.value.problem


def test_code_from_elsewhere_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A config that names code and kernels of others makes the same model as one that does not, without a download."""
    import transformers

    asked: list[object] = []
    monkeypatch.setattr(
        transformers.AutoModelForCausalLM,
        "from_config",
        classmethod(lambda cls, config, **options: asked.append((config, options)) or nn.Linear(1, 1)),
    )
    named = {
        "auto_map": {"AutoModelForCausalLM": "x/y--z.Z"},
        "_attn_implementation": "someone/kernel",
        "dtype": "float16",
    }
    make_task(make_lm_task({**LLAMA, **named})).build_model()
    ((config, options),) = asked  # type: ignore[misc]
    assert options == {"dtype": torch.float32, "trust_remote_code": False}
    assert getattr(config, "auto_map", None) is None and config._attn_implementation_internal is None


def test_without_the_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ManifestError) as caught:
        make_task(make_lm_task(LLAMA))
    assert caught.value.field == "task.kind" and "shoal[hf]" in caught.value.fix


def test_a_manifest_that_names_files_was_not_made_by_the_command() -> None:
    with pytest.raises(ManifestError) as caught:
        make_task(Task(kind="causal_lm", options=json.dumps({"config": "config.json"})))
    assert "shoal swarm create" in caught.value.fix


# -- how a model starts ----------------------------------------------------------------------------------------------


class Starts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name in ("normal", "flat", "plain", "zero", "one", "row"):
            self.register_parameter(name, nn.Parameter(torch.empty(4, 3)))

    @torch.no_grad()
    def start(self) -> None:
        self.normal.data.normal_(mean=0.0, std=0.02)
        nn.init.uniform_(self.flat, -0.3, 0.3)
        self.plain.normal_()
        nn.init.zeros_(self.zero)
        nn.init.ones_(self.one)
        self.row.normal_(0.0, 0.5)
        self.row[0].zero_()


def test_the_start_of_each_parameter_is_seen() -> None:
    specs = {spec.name: spec for spec in list_starts(Starts, lambda model: model.start())}
    expected = {"normal": 0.02, "flat": 0.3 / math.sqrt(3), "plain": 1.0, "row": 0.5}
    assert {name: spec.std for name, spec in specs.items() if spec.init == UNIFORM} == pytest.approx(expected)
    assert (specs["zero"].init, specs["one"].init) == (ZEROS, ONES)
    assert list(specs) == [name for name, _ in Starts().named_parameters()]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda model: model.zero.fill_(0.5),
        lambda model: model.normal.normal_(1.0, 0.02),
        lambda model: model.flat.uniform_(0.0, 1.0),
        lambda model: model.one.copy_(torch.ones(4, 3, device="meta")),
        lambda model: model.normal.exp_(),
        lambda model: model.normal.requires_grad_(False),
    ],
)
def test_a_start_that_no_manifest_can_say_is_refused(spoil: Any) -> None:
    def start(model: Any) -> None:
        model.start()
        with torch.no_grad():
            spoil(model)

    with pytest.raises(ManifestError) as caught:
        list_starts(Starts, start)
    assert caught.value.problem.split()[-2] in ("zero", "normal", "flat", "one", "be")
    with pytest.raises(ManifestError):
        list_starts(Starts, lambda model: None)
