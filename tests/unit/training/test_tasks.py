"""Tasks: options, layouts, and that the built-in model learns."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from shoal.node.training.gpt_config import VOCABULARY, GptConfig
from shoal.node.training.local_parameters import load_parameters
from shoal.node.training.model import Gpt
from shoal.node.training.strategy import DiLoCo
from shoal.node.training.tasks import describe, make_task
from shoal.protocol.errors import ManifestError
from shoal.protocol.layout import initialise
from shoal.protocol.manifest import Task
from tests.unit.training.tiny import OPTIONS, SEED, TASK, TEXT, TRAINING, layout, make_work


def build() -> tuple[Gpt, torch.Tensor]:
    """A model at its start, and a batch of (4, 33) bytes."""
    model = make_task(TASK).build_model()
    assert isinstance(model, Gpt)
    load_parameters(model, initialise(layout(), SEED))
    return model, torch.from_numpy(make_task(TASK).open_data(Path(TEXT), make_work()).batch(0))[:4]


def test_the_layout_names_every_parameter_in_order() -> None:
    model = make_task(TASK).build_model()
    named = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
    assert named == [(spec.name, spec.shape) for spec in layout().tensors]
    assert layout().elements == sum(parameter.numel() for parameter in model.parameters())


def test_the_default_model_has_about_a_million_parameters() -> None:
    assert 0.9e6 < describe(Task(kind="byte_gpt")).elements < 1.1e6


@pytest.mark.parametrize(
    ("kind", "options", "field"),
    [
        ("bit_gpt", "{}", "task.kind"),
        ("byte_gpt", "{", "task.options"),
        ("byte_gpt", "[]", "task.options"),
        ("byte_gpt", '{"depth": 2}', "task.depth"),
        ("byte_gpt", '{"layers": 0}', "task.layers"),
        ("byte_gpt", '{"layers": "two"}', "task.layers"),
        ("byte_gpt", '{"context": 4096}', "task.context"),
        ("byte_gpt", '{"width": 36, "heads": 4}', "task.width"),
    ],
)
def test_options_are_refused_by_name(kind: str, options: str, field: str) -> None:
    with pytest.raises(ManifestError) as caught:
        make_task(Task(kind=kind, options=options))
    assert caught.value.field == field


def test_an_untrained_model_predicts_all_bytes_alike() -> None:
    model, batch = build()
    loss = make_task(TASK).loss(model, batch)
    assert loss.item() == pytest.approx(np.log(VOCABULARY), abs=1e-5)


def test_a_prediction_depends_on_the_past_and_not_on_the_future() -> None:
    model, batch = build()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        inputs = batch[:, :-1]
        changed = inputs.clone()
        changed[:, 20] = (changed[:, 20] + 1) % VOCABULARY
        before, after = model(inputs), model(changed)
    assert torch.equal(before[:, :20], after[:, :20])
    assert not torch.allclose(before[:, 20], after[:, 20])
    assert not torch.allclose(before[:, 25], after[:, 25])


def test_the_loss_falls_in_a_few_steps() -> None:
    model, batch = build()
    task = make_task(TASK)
    strategy = DiLoCo(model, layout(), replace(TRAINING, learning_rate=1e-2))
    losses = []
    for _ in range(20):
        loss = task.loss(model, batch)
        losses.append(loss.item())
        strategy.gather(loss)
        assert strategy.step(loss.detach(), 1)
    assert losses[-1] < 3.5 < losses[0]


def test_a_sample_has_its_length_and_repeats() -> None:
    model, _ = build()
    task = make_task(TASK)
    text = task.sample(model, b"import ", 50)
    assert len(text) == 50
    assert text == task.sample(model, b"import ", 50)
    assert len(task.sample(model, b"", 3)) == 3


def test_the_defaults_are_what_an_empty_table_means() -> None:
    defaults = {name: getattr(GptConfig(), name) for name in OPTIONS}
    assert describe(Task(kind="byte_gpt")) == describe(Task(kind="byte_gpt", options=json.dumps(defaults)))
