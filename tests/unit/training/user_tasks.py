"""Tasks that are not of this repository: the examples of docs/tasks.md, and one whose code fails as its options say."""

import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from shoal.protocol.manifest import Task
from tests.unit.training.tiny import OPTIONS

DOCS = Path(__file__).parents[3] / "docs/tasks.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", DOCS.read_text(), re.MULTILINE | re.DOTALL)
(EXAMPLE,) = (block for block in BLOCKS if "class Sine" in block)
(LOOP_EXAMPLE,) = (block for block in BLOCKS if "shoal.attach" in block and "distributed" not in block)
(RANKS_EXAMPLE,) = (block for block in BLOCKS if "shoal.attach" in block and "distributed" in block)
SINE = "sine_task:Sine"
SINE_LOOP = "sine_loop:build"
SINE_TASK = Task(kind="custom", options=json.dumps({"path": SINE, "width": 16}))

FRAGILE = "fragile_task.model:Fragile"
SOURCE = """
import threading

from shoal.node.training.tasks import ByteGpt


class Fragile(ByteGpt):
    def __init__(self, options):
        self.calls, self.handle = 0, None
        self.bad, self.how = options.pop("bad"), options.pop("how")
        super().__init__(options)

    def loss(self, model, batch):
        if self.handle:
            self.handle = self.handle.remove()
        if model.training:
            self.calls += 1
            if self.calls - 1 in self.bad:
                self.fail(model)
        elif self.how == "evaluation":
            fail()
        return super().loss(model, batch)

    def fail(self, model):
        if self.how == "loss":
            fail()
        if self.how == "backward":
            self.handle = next(model.parameters()).register_hook(fail)
        if self.how == "hang":
            threading.Event().wait()


def fail(*_):
    raise ValueError("an odd\\nexample")
"""
RAISES = SOURCE[: SOURCE.index("    raise ")].count("\n") + 1
PLACE = f"fragile_task/model.py:{RAISES}"  # as a report names it


def write_module(folder: Path, name: str, source: str) -> Path:
    """A module, dots in its name being folders."""
    path = folder.joinpath(*name.split(".")).with_suffix(".py")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)
    return path


def fragile(how: str, bad: list[int]) -> Task:
    """The tiny GPT whose code fails at the batches `bad`."""
    return Task(kind="custom", options=json.dumps({"path": FRAGILE, "how": how, "bad": bad, **OPTIONS}))


@contextmanager
def importable(folder: Path) -> Iterator[Path]:
    """The folder's modules are found, here and in child processes; those imported from it are forgotten at the end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH")))))
        yield folder
    own = {path.stem for path in folder.iterdir()}
    for name in [name for name in sys.modules if name.partition(".")[0] in own]:
        del sys.modules[name]
