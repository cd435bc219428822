"""The trainer's process: a real child, its commands, its death and its daemon's; and the fake that stands in for it."""

import asyncio
import contextlib
import os
import select
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
import uvloop

from shoal.node import trainer as module
from shoal.node.config import TrainerTable
from shoal.node.trainer import (
    STDERR_BYTES_MAX,
    SharedParameters,
    Trainer,
    TrainerError,
    TrainerEvent,
    TrainerExited,
    TrainerProcess,
    TrainerStalled,
    describe_task,
)
from shoal.node.training.messages import Evaluated, Failed, Merge, Progress, Ready, Sampled
from shoal.protocol.errors import Failure, ManifestError
from shoal.protocol.layout import Layout, initialise
from shoal.protocol.manifest import Task
from tests.unit.node.fake_trainer import FakeTrainer
from tests.unit.training.tiny import SEED, TASK, TEXT, TRAINING, layout, make_work

PATIENCE_S = 60.0
SETTINGS = TrainerTable(device="cpu", threads=1, nice=5, text=TEXT, stall_timeout_s=1.0)
ENDLESS = make_work(replace(TRAINING, inner_steps=100_000, round_time_s=86_400.0))
MERGE = Merge(round=2, included=b"\x01", part_elements=256, adopt_all=False, begin=False)

Loops = Callable[[], asyncio.AbstractEventLoop]
E = TypeVar("E")


class Events:
    """What a trainer reported, in order, to be waited for."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[TrainerEvent] = asyncio.Queue()

    def __call__(self, event: TrainerEvent) -> None:
        self._queue.put_nowait(event)

    async def next(self, kind: type[E]) -> E:
        """The next event of this kind. Only Progress may come before it, and a stall, which a busy machine makes."""
        while True:
            event = await self._queue.get()
            if isinstance(event, kind):
                return event
            assert isinstance(event, Progress | TrainerStalled), f"{event} instead of {kind.__name__}"


def run(test: Coroutine[None, None, None], loops: Loops = uvloop.new_event_loop) -> None:
    """Run to the end, in bounded time, leaving no task and no complaint of the loop behind."""
    problems: list[object] = []

    async def bounded() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: problems.append(context))
        async with asyncio.timeout(PATIENCE_S):
            await test
        assert asyncio.all_tasks() == {asyncio.current_task()}

    with asyncio.Runner(loop_factory=loops) as runner:
        runner.run(bounded())
    assert problems == []


@contextlib.asynccontextmanager
async def make_trainer(
    settings: TrainerTable = SETTINGS, made: Layout | None = None, folder: Path | None = None
) -> AsyncIterator[tuple[TrainerProcess, Events]]:
    """Of the tiny task's layout, where no other is given, and with no folder of its own."""
    made = made or layout()
    memory, events = SharedParameters(made.elements), Events()
    memory.base[:] = initialise(made, SEED)
    trainer = TrainerProcess(memory, settings, events, folder)
    try:
        yield trainer, events
    finally:
        await trainer.stop()
        memory.close()


def is_gone(pid: int, deadline_s: float) -> bool:
    """Whether the process ends before the deadline; a zombie has ended."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], deadline_s)[0])
    finally:
        os.close(descriptor)


async def check_one_life(trainer: TrainerProcess, events: Events) -> None:
    started = await trainer.start(make_work())
    assert started.device == "cpu"
    assert started.elements == layout().elements
    assert started.train_bytes + started.held_out_bytes == Path(TEXT).stat().st_size
    assert trainer.running
    assert trainer.pid is not None
    assert os.getpriority(os.PRIO_PROCESS, trainer.pid) == 5

    await trainer.evaluate()
    before = await events.next(Evaluated)
    assert before.loss_nats == pytest.approx(np.log(256), abs=1e-4)

    await trainer.begin(1, adopt=True)
    ready = await events.next(Ready)
    assert (ready.round, ready.steps) == (1, TRAINING.inner_steps)
    assert np.isfinite(trainer.local).all()
    contribution = trainer.base - trainer.local
    assert np.abs(contribution).max() > 0.0

    with trainer._memory.writing() as name_round:
        trainer.base[:] -= contribution
        name_round(1)
    await trainer.merge(MERGE)
    await trainer.evaluate()
    after = await events.next(Evaluated)
    assert (after.round, after.tokens) == (1, before.tokens)
    assert after.loss_nats < before.loss_nats

    await trainer.sample(b"def ", 12)
    assert len((await events.next(Sampled)).text) == 12
    await trainer.begin(2, adopt=False)
    await trainer.freeze()
    assert (await events.next(Ready)).batches_done > ready.batches_done

    moved = trainer.local + 0.25
    trainer.local[:] = 0.25
    await trainer.begin(3, adopt=False, shift=True)
    await trainer.freeze()
    await events.next(Ready)
    assert 0.0 < np.abs(trainer.local - moved).max() < 0.1, "a step from there"


@pytest.mark.parametrize("loops", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_a_child_starts_trains_merges_evaluates_samples_and_stops(loops: Loops) -> None:
    async def test() -> None:
        async with make_trainer() as (trainer, events):
            await check_one_life(trainer, events)
            pid = trainer.pid
            assert pid is not None
            await trainer.stop()
            assert is_gone(pid, 0.0)
            assert not trainer.running
            await trainer.begin(3, adopt=True)

    run(test(), loops)


def test_silence_and_death_are_told_and_the_next_child_finds_the_base() -> None:
    async def test() -> None:
        async with make_trainer() as (trainer, events):
            await trainer.start(ENDLESS)
            assert trainer.pid is not None
            await trainer.begin(1, adopt=True)
            await events.next(Progress)
            os.kill(trainer.pid, signal.SIGSTOP)
            assert (await events.next(TrainerStalled)).silent_s == SETTINGS.stall_timeout_s
            os.kill(trainer.pid, signal.SIGCONT)
            await events.next(Progress)

            os.kill(trainer.pid, signal.SIGKILL)
            exited = await events.next(TrainerExited)
            assert exited == TrainerExited(returncode=-signal.SIGKILL, stderr_lines=())
            assert not trainer.running

            trainer.base[:] += 0.125
            await trainer.start(ENDLESS)
            await trainer.begin(2, adopt=True)
            await trainer.freeze()
            await events.next(Ready)
            assert np.abs(trainer.local - trainer.base).max() < 0.1

            await trainer.begin(2, adopt=True)
            await events.next(Progress)
            assert trainer._child is not None
            trainer._child._writer.close()
            assert (await events.next(TrainerExited)).returncode == 0, "a child without a daemon ends by itself"

    run(test())


def test_a_child_that_cannot_use_its_text_says_why() -> None:
    async def test() -> None:
        async with make_trainer(replace(SETTINGS, text="/nowhere/at/all")) as (trainer, _):
            with pytest.raises(TrainerError, match=r"trainer\.text.*/nowhere/at/all") as caught:
                await trainer.start(make_work())
            assert caught.value.failure is Failure.TRAINER_CRASHED
            assert not trainer.running

    run(test())


def test_a_child_that_breaks_ends_with_its_last_words(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import sys; sys.stderr.write('x' * 100_000); sys.exit('the last words')"
    monkeypatch.setattr(module, "_python_command", lambda _: (sys.executable, "-c", code))

    async def test() -> None:
        async with make_trainer() as (trainer, _):
            with pytest.raises(TrainerError) as caught:
                await trainer.start(make_work())
            assert caught.value.detail.endswith("the last words")
            assert len(caught.value.detail) <= STDERR_BYTES_MAX

    run(test())


@pytest.mark.parametrize("error", ["MemoryError()", "RuntimeError('DefaultCPUAllocator: not enough memory')"])
def test_a_child_whose_model_does_not_fit_says_what_to_do(error: str, monkeypatch: pytest.MonkeyPatch) -> None:
    code = f"""
import sys
from shoal.node.training import worker
def fail(*_):
    raise {error}
worker.InnerLoop = fail
worker.main(sys.argv[1:])
"""
    monkeypatch.setattr(module, "_python_command", lambda _: (sys.executable, "-c", code))

    async def test() -> None:
        async with make_trainer() as (trainer, _):
            with pytest.raises(TrainerError, match=r"does not fit into memory.*a smaller model"):
                await trainer.start(make_work())

    run(test())


def test_a_child_is_told_how_to_save_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    code = """
import socket, sys
from shoal.node.training.messages import FrameReader
received = socket.socket(fileno=int(sys.argv[1])).recv(1 << 16)
(start,) = FrameReader().feed(received)
sys.exit(f"at a time: {start.micro_batch}, again: {start.checkpoint_activations}")
"""
    monkeypatch.setattr(module, "_python_command", lambda _: (sys.executable, "-c", code))

    async def test() -> None:
        async with make_trainer(replace(SETTINGS, micro_batch=3, checkpoint_activations=True)) as (trainer, _):
            with pytest.raises(TrainerError, match="at a time: 3, again: True"):
                await trainer.start(make_work())

    run(test())


def test_a_child_that_breaks_the_protocol_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import os, signal, sys; os.write(int(sys.argv[1]), b'\\xff' * 8); signal.pause()"
    monkeypatch.setattr(module, "_python_command", lambda _: (sys.executable, "-c", code))
    monkeypatch.setattr(module, "STOP_GRACE_S", 0.1)

    async def test() -> None:
        async with make_trainer() as (trainer, _):
            with pytest.raises(TrainerError, match="broke its protocol"):
                await trainer.start(make_work())

    run(test())


def test_a_child_that_says_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); signal.pause()"
    monkeypatch.setattr(module, "_python_command", lambda _: (sys.executable, "-c", code))
    for name in ("START_TIMEOUT_S", "STOP_GRACE_S", "TERMINATE_GRACE_S"):
        monkeypatch.setattr(module, name, 0.2)

    async def test() -> None:
        async with make_trainer() as (trainer, _):
            with pytest.raises(TrainerError) as caught:
                await trainer.start(make_work())
            assert caught.value.failure is Failure.TRAINER_STALLED
            assert not trainer.running

    run(test())


PARENT = """
import asyncio, sys
from tests.unit.node.test_trainer import ENDLESS, Progress, make_trainer

async def main():
    async with make_trainer() as (trainer, events):
        await trainer.start(ENDLESS)
        await trainer.begin(1, adopt=True)
        await events.next(Progress)
        print(trainer.pid, flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


def test_no_child_outlives_its_daemon() -> None:
    root = Path(__file__).parents[3]
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True, cwd=root) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert not is_gone(child, 0.0)
        parent.kill()
        assert is_gone(child, PATIENCE_S)


def test_a_task_is_described_or_refused_by_name() -> None:
    async def test() -> None:
        wrong = Task(kind="byte_gpt", options='{"layers": 1000}')
        described, refused = await asyncio.gather(describe_task(TASK), describe_task(wrong), return_exceptions=True)
        assert described == layout()
        assert isinstance(refused, ManifestError)
        assert refused.field == "task.layers"

    run(test())


def test_without_torch_the_error_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)

    async def test() -> None:
        async with make_trainer() as (trainer, _):
            with pytest.raises(TrainerError, match="pip install"):
                await trainer.start(make_work())

    run(test())


def test_shared_parameters_need_no_name_on_the_disk() -> None:
    memory = SharedParameters(1000)
    memory.base[:] = 1.0
    memory.local[:] = 2.0
    assert np.frombuffer(os.pread(memory.descriptor, 4, 0), np.float32)[0] == 1.0
    assert np.frombuffer(os.pread(memory.descriptor, 4, 4000), np.float32)[0] == 2.0
    assert os.fstat(memory.descriptor).st_nlink == 0
    memory.close()
    assert memory.local.sum() == 2000.0, "the arrays outlive the descriptor"


def test_the_fake_keeps_the_ports_word() -> None:
    async def test() -> None:
        events = Events()
        fake = FakeTrainer(np.ones(300, dtype=np.float32), events)
        trainer: Trainer = fake
        await trainer.start(make_work())
        await trainer.begin(1, adopt=True)
        ready = await events.next(Ready)
        assert (ready.round, ready.steps, ready.batches_done) == (1, 4, 4)
        held = trainer.local.copy()
        trainer.base[:] = 0.5
        await trainer.merge(replace(MERGE, begin=True))
        assert (await events.next(Ready)).steps == 4
        moved = trainer.local - held
        assert moved[:256].mean() > 0.25, "from the new base towards the target"
        assert 0.0 < moved[256:].mean() < 0.25, "from where it was towards the target"
        held = trainer.local.copy()
        trainer.local[:] = 5.0
        await trainer.begin(3, adopt=False, shift=True)
        await events.next(Ready)
        assert 4.0 < (trainer.local - held).mean() < 5.0, "as far as it was told, and then towards the target"

        fake.diverge()
        assert not (await events.next(Failed)).fatal
        await events.next(Ready)
        fake.stall()
        await events.next(TrainerStalled)
        fake.crash()
        await events.next(TrainerExited)
        assert not trainer.running
        await trainer.stop()

    run(test())
