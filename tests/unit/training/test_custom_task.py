"""The user's own task: which code is run and which never, what its class must have, and the docs' example."""

import json
import re
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from shoal.node.training.custom_task import NEEDED, is_task_path, load_class, take_path
from shoal.node.training.loop import InnerLoop
from shoal.node.training.messages import NO_TEXT, Begin, Evaluate, Evaluated, Failed, Freeze, Ready, Sample
from shoal.node.training.task_faults import TaskFault
from shoal.node.training.tasks import describe
from shoal.protocol.errors import ConfigError, ManifestError
from shoal.protocol.layout import initialise
from shoal.protocol.manifest import Task
from tests.unit.training.tiny import SEED, TRAINING, make_start, make_work
from tests.unit.training.user_tasks import EXAMPLE, LOOP_EXAMPLE, SINE, SINE_LOOP, SINE_TASK, importable, write_module


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    with importable(tmp_path):
        write_module(tmp_path, "sine_task", EXAMPLE)
        yield tmp_path


def open_sine(**settings: str) -> tuple[InnerLoop, np.ndarray]:
    layout = describe(SINE_TASK, [SINE])
    memory = np.full((2, layout.elements), np.nan, dtype=np.float32)
    memory[0] = initialise(layout, SEED)
    training = replace(TRAINING, inner_steps=50, learning_rate=2e-2)
    work = replace(make_work(training), task=SINE_TASK, layout_digest=layout.digest)
    return InnerLoop(replace(make_start(work), allow_tasks=(SINE,), **settings), memory), memory


def measure_plainly(flat: np.ndarray) -> float:
    """The mean squared error of the example's network on its held-out points, from the flat vector alone."""
    x = np.random.default_rng(0).uniform(-3.0, 3.0, 1200).astype(np.float32)[1000:]
    inwards, bias, outwards, last = np.split(flat.astype(np.float64), [16, 32, 48])
    made = np.tanh(x[:, None] * inwards + bias) @ outwards + last
    return float(np.mean((made - np.sin(x)) ** 2))


def evaluate(loop: InnerLoop) -> Evaluated:
    (report,) = loop.handle(Evaluate(), 0.0)
    assert isinstance(report, Evaluated)
    return report


def test_the_example_of_the_docs_is_short_and_learns_a_sine(folder: Path) -> None:
    assert len(EXAMPLE.splitlines()) < 40
    loop, memory = open_sine()
    before = evaluate(loop)
    assert before.loss_nats == pytest.approx(measure_plainly(memory[0]), rel=1e-4)
    assert before.tokens == 200
    assert (loop.started().loss_unit, loop.started().unused) == ("", ()), "nobody has said"
    list(loop.handle(Begin(round=1, adopt=True), 0.0))
    reports = [report for _ in range(50) for report in loop.step(0.0)]
    assert isinstance(reports[-1], Ready)
    assert reports[-1].tokens == 50 * TRAINING.batch_size
    memory[0] = memory[1]
    assert evaluate(loop).loss_nats == pytest.approx(measure_plainly(memory[1]), rel=1e-4)
    assert measure_plainly(memory[1]) < 0.5 * before.loss_nats


def test_a_model_that_writes_no_text_says_so_and_trains_on(folder: Path) -> None:
    loop, _ = open_sine()
    list(loop.handle(Begin(round=1, adopt=True), 0.0))
    (refused,) = loop.handle(Sample(prompt=b"x", size_bytes=4), 0.0)
    assert isinstance(refused, Failed)
    assert (refused.reason, refused.fatal) == (NO_TEXT, False)
    assert "the task custom writes no text" in refused.detail
    list(loop.handle(Freeze(), 0.0))
    assert isinstance(list(loop.step(0.0))[-1], Ready)


def test_it_says_what_its_loss_is_in_and_what_it_ignores(folder: Path) -> None:
    own = '    loss_unit = "squares\\na point"\n    unused = ("text", "tokenizer")\n'
    write_module(folder, "sine_task", EXAMPLE.replace("class Sine:\n", f"class Sine:\n{own}"))
    loop, _ = open_sine(weights=str(folder), tokenizer="tokenizer.json")
    assert loop.started().loss_unit == "squares a point"
    assert loop.started().unused == ("trainer.text", "trainer.tokenizer", "trainer.weights")


def test_a_layout_that_is_not_the_models_is_refused(folder: Path) -> None:
    write_module(
        folder, "sine_task", EXAMPLE.replace("list_specs(self.build_model", "list_specs(lambda: nn.Linear(7, 7)")
    )
    with pytest.raises(ManifestError, match="not that of the model") as caught:
        open_sine()
    assert caught.value.field == "layout"


@pytest.mark.parametrize("allowed", [(), ("other:Sine",), ("sine_task:Sin",), ("sine_task:Points",), ("sine_task",)])
def test_what_is_not_allowed_is_not_imported(folder: Path, allowed: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_class(SINE, allowed)
    assert caught.value.field == "trainer.allow_tasks"
    assert "sine_task" not in sys.modules


@pytest.mark.parametrize("allowed", [(), ("other:Task",)])
def test_the_line_that_the_error_names_is_the_one_that_helps(folder: Path, allowed: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_class(SINE, allowed)
    (line,) = re.findall(r"allow_tasks = \[.*?\]", caught.value.fix)
    added = tomllib.loads(line)["allow_tasks"]
    assert set(added) == {*allowed, SINE}
    assert load_class(SINE, added).__name__ == "Sine"


@pytest.mark.parametrize(
    "path",
    ["", "os", "a:b:c", "a b:C", "a/b:C", ".a:B", "a.:B", "a:B.c", "a:B\n", "p\u0430ckage:Task", "a:" + "b" * 300],
)
def test_a_path_that_names_no_class_is_none(path: str) -> None:
    assert not is_task_path(path)
    with pytest.raises(ManifestError) as caught:
        take_path({"path": path})
    assert caught.value.field == "task.path"


@pytest.mark.parametrize("options", [{}, {"path": 3}, {"path": ["a:B"]}])
def test_a_custom_task_has_a_path(options: dict[str, object]) -> None:
    with pytest.raises(ManifestError, match=r"task\.path"):
        take_path(options)


def test_the_class_gets_the_options_without_the_path() -> None:
    assert take_path({"path": "a.b:C", "width": 3}) == ("a.b:C", {"width": 3})


@pytest.mark.parametrize(
    ("path", "source", "problem"),
    [
        ("gone_task:Task", "", "No module named 'gone_task'"),
        ("poor_task:Task", "import gone_library", "No module named 'gone_library'"),
        ("poor_task:Task", "Task = 3", "no class Task"),
        ("poor_task:Task", "class Task:\n    def loss(self): ...", "has no layout, build_model, open_data"),
    ],
)
def test_a_class_that_cannot_be_used_is_refused(folder: Path, path: str, source: str, problem: str) -> None:
    write_module(folder, "poor_task", source)
    with pytest.raises(ManifestError, match=problem) as caught:
        load_class(path, [path])
    assert caught.value.field == "task.path"


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("x = 1\nraise OSError('no data')", r"OSError at .*poor_task\.py:2: no data$"),
        ("class Task(:", r"SyntaxError: .*poor_task\.py, line 1"),
    ],
)
def test_code_that_fails_as_it_is_imported_is_told_with_its_line(folder: Path, source: str, told: str) -> None:
    write_module(folder, "poor_task", source)
    with pytest.raises(TaskFault, match=told):
        load_class("poor_task:Task", ["poor_task:Task"])


def test_the_docs_name_each_method_that_is_needed() -> None:
    text = (Path(__file__).parents[3] / "docs/tasks.md").read_text()
    assert all(f"`{name}(" in text for name in NEEDED)


# -- the model of an attached script -----------------------------------------------------------------------------------


def attached(path: str, **options: object) -> Task:
    return Task(kind="attached", options=json.dumps({"path": path, **options}))


def test_the_function_that_an_attached_task_names_makes_the_layout(tmp_path: Path) -> None:
    with importable(tmp_path):
        write_module(tmp_path, "sine_loop", LOOP_EXAMPLE)
        layout = describe(attached(SINE_LOOP, width=16), [SINE_LOOP])
        assert [spec.shape for spec in layout.tensors] == [(16, 1), (16,), (1, 16), (1,)]
        with pytest.raises(ConfigError, match=f"does not allow {SINE_LOOP}"):
            describe(attached(SINE_LOOP, width=16))
        with pytest.raises(TaskFault, match="unexpected keyword argument 'depth'"):
            describe(attached(SINE_LOOP, depth=1), [SINE_LOOP])
        with pytest.raises(ManifestError, match="sine_loop has no function bild"):
            describe(attached("sine_loop:bild"), ["sine_loop:bild"])
