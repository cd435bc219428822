"""A loss that torch.compile works on: the first step is no hang, and without a compiler the training goes on."""

import asyncio
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from shoal.node.config import TrainerTable
from shoal.node.silence_watch import SilenceWatch
from shoal.node.trainer import TrainerStalled, describe_task
from shoal.node.training import compiled
from shoal.node.training.compiled import open_compiled
from shoal.node.training.messages import (
    COMPILE_FAILED,
    COMPILE_TIMEOUT_S,
    Begin,
    Compiling,
    Failed,
    Paused,
    Progress,
    Ready,
)
from shoal.protocol.errors import ConfigError
from shoal.protocol.layout import Layout
from tests.unit.node import test_trainer
from tests.unit.node.test_trainer import Events, make_trainer, run
from tests.unit.node.test_user_task import sine_work
from tests.unit.training.user_tasks import EXAMPLE, SINE, SINE_TASK, importable, write_module

SETTINGS = TrainerTable(device="cpu", threads=1, allow_tasks=(SINE,), stall_timeout_s=5.0)
COMPILED = replace(SETTINGS, compile=True)


async def train(settings: TrainerTable, made: Layout, folder: Path) -> tuple[list[object], np.ndarray]:
    """What is said up to Ready, and the local parameters."""
    async with make_trainer(settings, made, folder) as (trainer, events):
        work = sine_work(made)
        # Ready by steps alone: a machine that compiles for longer than the round would hand over fewer.
        await trainer.start(replace(work, training=replace(work.training, round_time_s=86_400.0)))
        await trainer.begin(1, adopt=True)
        said = await collect(events)
        return said, trainer.local.copy()


async def collect(events: Events) -> list[object]:
    said: list[object] = []
    while not said or not isinstance(said[-1], Ready):
        said.append(await events.next(object))
    return said


def without(kinds: tuple[type, ...], said: list[object]) -> list[object]:
    return [one for one in said if not isinstance(one, kinds)]


@pytest.fixture(autouse=True)
def sine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.setattr(test_trainer, "PATIENCE_S", 300.0)  # a compiler takes its time
    write_module(tmp_path / "code", "sine_task", EXAMPLE)
    with importable(tmp_path / "code") as folder:
        yield folder


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.long
def test_a_compiled_loss_takes_the_same_steps_and_its_first_step_is_no_hang(tmp_path: Path) -> None:
    """It compiles for longer than `stall_timeout_s`, on any machine that is not very fast. Of a step that compiles
    nothing a slow machine may well tell a stall."""

    async def test() -> None:
        made = await describe_task(SINE_TASK, [SINE])
        said, local = await train(COMPILED, made, tmp_path / "trainer")
        assert [type(one) for one in without((Progress, TrainerStalled), said)] == [Compiling, Ready]
        begun = next(at for at, one in enumerate(said) if isinstance(one, Compiling))
        assert not isinstance(said[begun + 1], TrainerStalled), "the step that compiles has its own time-out"
        assert any((tmp_path / "trainer" / "compiled").rglob("*.so"))
        _, eager = await train(SETTINGS, made, tmp_path / "other")
        assert np.allclose(local, eager, atol=1e-4) and np.abs(eager).max() > 0.1

    run(test())


def test_without_a_compiler_it_trains_on_and_says_so_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "nothing"))

    async def test() -> None:
        made = await describe_task(SINE_TASK, [SINE])
        said, local = await train(replace(COMPILED, processes=2), made, tmp_path / "trainer")
        told = without((Progress, TrainerStalled), said)
        assert [type(one) for one in told] == [Compiling, Failed, Ready]
        failed = told[1]
        assert isinstance(failed, Failed) and (failed.reason, failed.fatal) == (COMPILE_FAILED, False)
        assert failed.detail.startswith("trains on without torch.compile, which failed: InvalidCxxCompiler: ")
        _, eager = await train(SETTINGS, made, tmp_path / "other")
        assert np.allclose(local, eager, atol=1e-4) and np.abs(eager).max() > 0.1

    run(test())


def test_a_trainer_that_compiles_is_waited_for_as_long_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    class Loop:
        """Of a loop's timers, how far off they are."""

        def __init__(self) -> None:
            self.delays_s: list[float] = []

        def call_later(self, delay_s: float, *_: object) -> "Loop":
            self.delays_s.append(delay_s)
            return self

        def cancel(self) -> None:
            pass

    loop = Loop()
    monkeypatch.setattr(asyncio, "get_running_loop", lambda: loop)
    watch = SilenceWatch(7.0, lambda: None)
    watch.told(Begin(round=1, adopt=True))
    watch.heard(Compiling())
    watch.heard(Progress(round=1, steps=1, tokens=1, loss=1.0, tokens_per_s=1.0))
    assert loop.delays_s == [7.0, 7.0 + COMPILE_TIMEOUT_S, 7.0]
    watch.heard(Paused(round=2))
    assert len(loop.delays_s) == 4


def test_the_folder_is_private_and_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "elsewhere")
    folder = tmp_path / "trainer" / "compiled"
    open_compiled(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    (folder / "code").write_bytes(bytes(1000))
    monkeypatch.setattr(compiled, "COMPILED_BYTES_MAX", 999)
    open_compiled(folder)
    assert not list(folder.iterdir()) and folder.stat().st_mode & 0o777 == 0o700
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"trainer\.compile.*file"):
        open_compiled(tmp_path / "file" / "compiled")
