"""The user's own task in the trainer's process: allowed, it trains; else nothing of it runs. Its faults are told."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from shoal.node.config import TrainerTable
from shoal.node.trainer import (
    TrainerError,
    TrainerExited,
    TrainerStalled,
    describe_task,
)
from shoal.node.training.loop import FAULTS_IN_A_ROW_MAX
from shoal.node.training.messages import NO_TEXT, TASK_FAILED, Evaluated, Failed, Ready, Work
from shoal.protocol.errors import ManifestError
from shoal.protocol.layout import Layout
from tests.unit.node.test_trainer import is_gone, make_trainer, run
from tests.unit.training.tiny import TEXT, TRAINING, layout, make_work
from tests.unit.training.user_tasks import (
    EXAMPLE,
    FRAGILE,
    PLACE,
    SINE,
    SINE_TASK,
    SOURCE,
    fragile,
    importable,
    write_module,
)

SETTINGS = TrainerTable(device="cpu", threads=1, text=TEXT, stall_timeout_s=60.0)


def sine_work(made: Layout) -> Work:
    training = replace(TRAINING, inner_steps=50, learning_rate=2e-2)
    return replace(make_work(training), task=SINE_TASK, layout_digest=made.digest)


def test_the_example_of_the_docs_trains_where_it_is_allowed(tmp_path: Path) -> None:
    write_module(tmp_path, "sine_task", EXAMPLE)

    async def test() -> None:
        made = await describe_task(SINE_TASK, [SINE])
        assert made.elements == 3 * 16 + 1
        async with make_trainer(replace(SETTINGS, allow_tasks=("other:Task", SINE)), made) as (trainer, events):
            started = await trainer.start(sine_work(made))
            assert (started.train_bytes, started.held_out_bytes) == (8000, 1600)
            await trainer.evaluate()
            before = await events.next(Evaluated)
            await trainer.begin(1, adopt=True)
            assert (await events.next(Ready)).tokens == 50 * TRAINING.batch_size
            trainer.base[:] = trainer.local
            await trainer.evaluate()
            assert (await events.next(Evaluated)).loss_nats < 0.5 * before.loss_nats
            await trainer.sample(b"x", 4)
            assert (await events.next(Failed)).reason == NO_TEXT

    with importable(tmp_path):
        run(test())


def test_nothing_of_it_runs_where_it_is_not_allowed(tmp_path: Path) -> None:
    trace = tmp_path / "imported"
    write_module(tmp_path, "sine_task", f"from pathlib import Path\nPath({str(trace)!r}).touch()\n{EXAMPLE}")

    async def test() -> None:
        async with make_trainer(replace(SETTINGS, allow_tasks=("other:Task",))) as (trainer, _):
            with pytest.raises(TrainerError) as caught:
                await trainer.start(sine_work(layout()))
            assert caught.value.is_final, "only a person can allow it"
            assert caught.value.detail.startswith("trainer.allow_tasks: does not allow sine_task:Sine")
            assert 'allow_tasks = ["other:Task", "sine_task:Sine"] under [trainer]' in caught.value.detail
            assert not trainer.running
        with pytest.raises(ManifestError) as refused:
            await describe_task(SINE_TASK)
        assert refused.value.field == "trainer.allow_tasks"
        assert "--allow-task sine_task:Sine" in refused.value.fix
        assert not trace.exists()
        await describe_task(SINE_TASK, [SINE])
        assert trace.exists(), "the trace tells of an import"

    with importable(tmp_path):
        run(test())


def test_code_that_raises_at_every_batch_ends_the_child_and_is_told_with_its_line(tmp_path: Path) -> None:
    write_module(tmp_path, FRAGILE.partition(":")[0], SOURCE)

    async def test() -> None:
        async with make_trainer(replace(SETTINGS, allow_tasks=(FRAGILE,))) as (trainer, events):
            await trainer.start(replace(make_work(), task=fragile("loss", list(range(100)))))
            await trainer.begin(1, adopt=True)
            failed = await events.next(Failed)
            assert (failed.reason, failed.fatal) == (TASK_FAILED, False)
            while not failed.fatal:
                failed = await events.next(Failed)
            assert f"{FAULTS_IN_A_ROW_MAX + 1} in a row" in failed.detail
            assert failed.detail.endswith(f"{PLACE}: an odd example")
            assert (await events.next(TrainerExited)).returncode == 1

    with importable(tmp_path):
        run(test())


def test_code_that_hangs_is_told_as_a_stall_and_can_be_ended(tmp_path: Path) -> None:
    write_module(tmp_path, FRAGILE.partition(":")[0], SOURCE)

    async def test() -> None:
        settings = replace(SETTINGS, allow_tasks=(FRAGILE,), stall_timeout_s=1.0)
        async with make_trainer(settings) as (trainer, events):
            await trainer.start(replace(make_work(), task=fragile("hang", [1])))
            pid = trainer.pid
            assert pid is not None
            await trainer.begin(1, adopt=True)
            assert (await events.next(TrainerStalled)).silent_s == 1.0
            await trainer.stop()
            assert is_gone(pid, 0.0)
            assert np.isfinite(trainer.base).all()

    with importable(tmp_path):
        run(test())


def test_code_that_raises_as_it_describes_its_model_makes_no_manifest(tmp_path: Path) -> None:
    write_module(tmp_path, "sine_task", EXAMPLE.replace("return make_layout", "raise OSError('no line'); make_layout"))

    async def test() -> None:
        with pytest.raises(ManifestError, match=r"raised OSError at .*sine_task\.py:\d+: no line") as caught:
            await describe_task(SINE_TASK, [SINE])
        assert caught.value.field == "task"

    with importable(tmp_path):
        run(test())


def test_code_that_raises_as_it_opens_its_data_is_told_and_tried_again(tmp_path: Path) -> None:
    write_module(tmp_path, "sine_task", EXAMPLE.replace("x = np.random", "raise OSError('no line'); x = np.random"))

    async def test() -> None:
        made = await describe_task(SINE_TASK, [SINE])
        async with make_trainer(replace(SETTINGS, allow_tasks=(SINE,)), made) as (trainer, _):
            with pytest.raises(TrainerError, match=r"raised OSError at .*sine_task\.py:\d+: no line$") as caught:
                await trainer.start(sine_work(made))
            assert not caught.value.is_final, "data may come back"

    with importable(tmp_path):
        run(test())
