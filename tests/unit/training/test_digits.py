"""The task of images: its split, its batches, and that a peer learns from them what plain numpy then sees."""

import json
import math
import sys
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from shoal.node.training.digits import Images, read_images
from shoal.node.training.local_parameters import load_parameters
from shoal.node.training.loop import InnerLoop
from shoal.node.training.messages import NO_TEXT, Begin, Evaluate, Evaluated, Failed, Ready, Sample
from shoal.node.training.tasks import describe, make_task
from shoal.protocol.errors import ManifestError
from shoal.protocol.layout import initialise
from shoal.protocol.manifest import Task
from tests.unit.training.tiny import SEED, TRAINING, make_start, make_work

WIDTH = 32
DIGITS = Task(kind="digits", options=json.dumps({"width": WIDTH}))


@cache
def images() -> np.ndarray:
    """All rows, uint8 (1797, 65)."""
    pytest.importorskip("sklearn", reason="the images are part of scikit-learn")
    return read_images()


def split(rows: np.ndarray) -> tuple[set[bytes], set[bytes]]:
    """What is held out, and what may be trained on."""
    opened = Images(rows, make_work(replace(TRAINING, batch_size=1 << 15)))
    return ({row.tobytes() for row in opened.held_out()}, {row.tobytes() for row in opened.batch(0)})


def classify(flat: np.ndarray, rows: np.ndarray) -> tuple[float, float]:
    """The mean loss in nats an image, and the share of images that are told rightly, from the flat vector alone."""
    first, second, head = (
        piece.reshape(-1, width).astype(np.float64).T
        for piece, width in zip(np.split(flat, np.cumsum([64 * WIDTH, WIDTH * WIDTH])), (64, WIDTH, WIDTH), strict=True)
    )
    x = rows[:, :64] / 8.0 - 1.0
    logits = np.maximum(np.maximum(x @ first, 0.0) @ second, 0.0) @ head
    logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
    digits = rows[:, 64]
    return -float(logits[np.arange(len(rows)), digits].mean()), float((logits.argmax(axis=1) == digits).mean())


def test_the_layout_is_that_of_the_model() -> None:
    layout, model = describe(DIGITS), make_task(DIGITS).build_model()
    assert [(spec.name, spec.shape) for spec in layout.tensors] == [
        (name, tuple(parameter.shape)) for name, parameter in model.named_parameters()
    ]
    assert layout.elements == 64 * WIDTH + WIDTH * WIDTH + 10 * WIDTH
    assert describe(Task(kind="digits")).elements == 8832


@pytest.mark.parametrize(
    ("options", "field"),
    [('{"depth": 2}', "task.depth"), ('{"layers": 0}', "task.layers"), ('{"width": "wide"}', "task.width")],
)
def test_options_are_refused_by_name(options: str, field: str) -> None:
    with pytest.raises(ManifestError) as caught:
        make_task(Task(kind="digits", options=options))
    assert caught.value.field == field


def test_nothing_is_held_out_and_trained_on_and_nothing_is_lost() -> None:
    held_out, train = split(images())
    assert held_out.isdisjoint(train)
    assert len(held_out) == 179
    assert {row.astype(np.int64).tobytes() for row in images()} == held_out | train, "15 draws an image find all"


def test_the_split_does_not_depend_on_the_order_of_the_library() -> None:
    assert split(images()) == split(images()[::-1])


def test_a_batch_is_a_function_of_seed_peer_and_index() -> None:
    opened = Images(images(), make_work())
    forward = [opened.batch(index) for index in range(5)]
    assert forward[0].shape == (TRAINING.batch_size, 65)
    assert forward[0].dtype == np.int64
    again = Images(images(), make_work())
    assert all((again.batch(index) == forward[index]).all() for index in reversed(range(5)))
    for changes in ({"seed": SEED + 1}, {"peer": bytes(32)}):
        other = Images(images(), make_work(changes=changes))
        assert all((other.batch(index) != forward[index]).any() for index in range(5))


def test_the_loss_is_what_numpy_computes_from_the_flat_vector() -> None:
    flat = initialise(describe(DIGITS), SEED)
    batch = Images(images(), make_work()).held_out()
    task = make_task(DIGITS)
    model = task.build_model()
    for changed in (flat, flat + np.random.default_rng(1).normal(0.0, 0.1, flat.size).astype(np.float32)):
        load_parameters(model, changed)
        assert task.loss(model, torch.from_numpy(batch)).item() == pytest.approx(classify(changed, batch)[0], rel=1e-5)
    assert classify(flat, batch)[0] == pytest.approx(math.log(10)), "all digits alike"


def test_rounds_of_one_peer_tell_digits_apart() -> None:
    images()
    layout = describe(DIGITS)
    memory = np.full((2, layout.elements), np.nan, dtype=np.float32)
    memory[0] = initialise(layout, SEED)
    training = replace(TRAINING, inner_steps=100, batch_size=32, learning_rate=1e-2)
    loop = InnerLoop(make_start(replace(make_work(training), task=DIGITS, layout_digest=layout.digest)), memory)
    assert loop.started().train_bytes == (1797 - 179) * 65
    assert (loop.started().loss_unit, loop.started().unused) == ("nats an image", ("trainer.text",))
    for round in (1, 2, 3):
        list(loop.handle(Begin(round=round, adopt=True), 0.0))
        reports = [report for _ in range(100) for report in loop.step(0.0)]
        assert isinstance(reports[-1], Ready)
        memory[0] = memory[1]
    assert reports[-1].tokens == 100 * 32, "a token is an image"
    (evaluated,) = loop.handle(Evaluate(), 0.0)
    assert isinstance(evaluated, Evaluated)
    loss, share = classify(memory[0], Images(images(), make_work()).held_out())
    assert (evaluated.loss_nats, evaluated.tokens) == (pytest.approx(loss, rel=1e-4), 179)
    assert share > 0.9
    (refused,) = loop.handle(Sample(prompt=b"3", size_bytes=1), 0.0)
    assert isinstance(refused, Failed)
    assert refused.reason == NO_TEXT


def test_without_the_library_the_error_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ManifestError) as caught:
        make_task(DIGITS).open_data(None, make_work())
    assert caught.value.field == "task.kind"
    assert "pip install 'shoal[digits]'" in caught.value.fix
