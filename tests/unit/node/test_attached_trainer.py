"""A script that attaches itself to a daemon's trainer port: over a real socket, with the memory that both map."""

import asyncio
import os
import resource
import socket
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import shoal
from shoal.node import attached_trainer as daemon_side
from shoal.node.attach_socket import ADDRESS_BYTES_MAX, connect, find_socket
from shoal.node.attached_trainer import (
    BUFFER_BYTES_MAX,
    HANDSHAKES_MAX,
    AttachedTrainer,
    choose_trainer,
    describe_next_step,
    find_difference,
)
from shoal.node.config import NodeConfig, TrainerTable
from shoal.node.running import note_running
from shoal.node.trainer import (
    SharedParameters,
    TrainerError,
    TrainerEvent,
    TrainerLeft,
    TrainerProcess,
    TrainerStalled,
)
from shoal.node.training import attachment as script_side
from shoal.node.training.attachment import RECONNECT_FIRST_S, RECONNECT_MAX_S, AttachError, Attachment, Reconnection
from shoal.node.training.messages import AttachedTensor, Merge, Ready, Started, Work
from shoal.node.training.parameters import list_specs, start_uniform
from shoal.protocol.errors import ConfigError, Failure
from shoal.protocol.identity import PeerId
from shoal.protocol.layout import make_layout
from shoal.protocol.manifest import Task, Training, make_manifest, parse_draft
from tests.unit.node.node_samples import wait_until
from tests.unit.protocol.samples import PEERS

TRAINING = Training(inner_steps=2, steps_min=1, round_time_s=60.0)


def build(width: int = 2) -> nn.Module:
    return nn.Linear(2, width)


LAYOUT = make_layout(list_specs(build, start_uniform))
WORK = Work(task=Task(kind="attached"), training=TRAINING, layout_digest=LAYOUT.digest, seed=1, peer=PeerId(b"p" * 32))
ALL = Merge(round=2, included=b"\x01", part_elements=LAYOUT.elements, adopt_all=False, begin=True)


class Rig:
    """The daemon's side, and scripts in threads."""

    def __init__(self, home: Path, stall_timeout_s: float = 300.0) -> None:
        self.home = home
        self.events: list[TrainerEvent] = []
        self.told: list[str] = []
        self.memory = SharedParameters(LAYOUT.elements)
        self.memory.base[:] = 1.0
        settings = TrainerTable(stall_timeout_s=stall_timeout_s, weights=str(home))
        folder = find_socket(home).parent
        self.trainer = AttachedTrainer(self.memory, settings, self.events.append, folder, layout=LAYOUT)

    async def serve(self, batches_done: int = 0, round: int = 1) -> Started:
        """Wait for a script, start it, and let it begin: from the base, if it comes anew."""
        await self.trainer.wait(self.told.append)
        started = await self.trainer.start(replace(WORK, batches_done=batches_done))
        if not started.resumed.waits:
            await self.trainer.begin(round, adopt=started.resumed.extent == "nothing")
        return started

    async def attach(self, width: int = 2, **options: Any) -> tuple[Attachment, nn.Module]:
        model = build(width)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        attached = await asyncio.to_thread(shoal.attach, model, optimizer, home=self.home, **options)
        return attached, model


@asynccontextmanager
async def open_rig(home: Path, stall_timeout_s: float = 300.0) -> AsyncIterator[Rig]:
    rig = Rig(home, stall_timeout_s)
    waiting = asyncio.create_task(rig.trainer.wait(rig.told.append))
    await wait_until(lambda: bool(rig.told))
    waiting.cancel()
    try:
        yield rig
    finally:
        await rig.trainer.stop()
        rig.memory.close()


async def test_a_script_trains_for_the_daemon_in_the_memory_that_both_map(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        assert rig.told == [describe_next_step(tmp_path)] and str(tmp_path) in rig.told[0]
        served = asyncio.create_task(rig.serve())
        script, model = await rig.attach(loss_unit="squares a point")
        started = await served
        assert (started.loss_unit, started.unused) == ("squares a point", ("trainer.weights",))
        assert (started.device, started.elements) == ("cpu", LAYOUT.elements)
        assert rig.trainer.running and script.attached and script.round == 1
        assert (model.weight == 1.0).all()
        with torch.no_grad():
            model.weight += 0.5
        assert not await asyncio.to_thread(script.step, torch.tensor(0.25), 8)
        step = asyncio.create_task(asyncio.to_thread(script.step, 0.75, 8))
        await wait_until(lambda: any(isinstance(one, Ready) for one in rig.events))
        ready = next(one for one in rig.events if isinstance(one, Ready))
        assert (ready.steps, ready.tokens, ready.loss_mean, ready.batches_done) == (2, 16, 0.5, 2)
        assert rig.trainer.local.tolist() == [1.5] * 4 + [1.0] * 2
        assert not step.done(), "it waits for the round"
        rig.memory.base[:] = 3.0
        await rig.trainer.merge(ALL)
        assert await step, "the parameters were replaced"
        assert (model.weight == 3.0).all() and script.round == 2
        rig.events.clear()
        assert not await asyncio.to_thread(script.step, 0.5)
        step = asyncio.create_task(asyncio.to_thread(script.step, 0.5))
        await wait_until(lambda: any(isinstance(one, Ready) for one in rig.events))
        rig.trainer.local[:] = 0.25
        await rig.trainer.begin(3, adopt=False, shift=True)
        assert await step, "the parameters were moved"
        assert (model.weight == 3.25).all() and script.round == 3
        script.close()
        await wait_until(lambda: isinstance(rig.events[-1], TrainerLeft))
        assert not rig.trainer.running
        with pytest.raises(AttachError, match="detached"):
            script.step(0.5)


async def test_the_next_script_begins_where_the_last_one_has_left(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        for _ in range(2):
            served = asyncio.create_task(rig.serve())
            script, _ = await rig.attach()
            assert (await served).resumed.extent == "nothing"
            script.close()
            await wait_until(lambda: not rig.trainer.running)
        assert [type(one) for one in rig.events] == [TrainerLeft, TrainerLeft]


async def test_a_second_script_is_refused_and_told_who_is_there(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        served = asyncio.create_task(rig.serve())
        script, _ = await rig.attach()
        await served
        with pytest.raises(ConfigError, match=rf"home: process {os.getpid()} is attached to this daemon\. Fix: end"):
            await rig.attach()
        assert script.attached
        script.close()


async def test_a_model_of_another_shape_is_refused_and_told_what_differs(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        with pytest.raises(ConfigError, match=r"parameter 0 is weight \(3, 2\) here and weight \(2, 2\) in the manif"):
            await rig.attach(width=3, wait_s=60.0)
        assert not rig.trainer.running


def test_a_difference_names_what_is_missing_and_not_the_names() -> None:
    same = tuple(AttachedTensor(name="x", shape=one.shape) for one in LAYOUT.tensors)
    assert find_difference(LAYOUT, same) == ""
    assert "parameter 1 is missing here and bias (2,) in the manifest" in find_difference(LAYOUT, same[:1])
    more = (*same, AttachedTensor(name="y", shape=(1,)))
    assert "parameter 2 is y (1,) here and missing in the manifest" in find_difference(LAYOUT, more)


async def test_a_daemon_that_comes_back_finds_the_script_at_its_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script_side, "RECONNECT_FIRST_S", 0.0)
    async with open_rig(tmp_path) as rig:
        served = asyncio.create_task(rig.serve())
        script, model = await rig.attach()
        await served
        step = asyncio.create_task(asyncio.to_thread(lambda: [script.step(0.5), script.step(0.5)]))
        await wait_until(lambda: any(isinstance(one, Ready) for one in rig.events))
        await rig.trainer.stop()
        assert await step == [False, False] and not script.attached, "nobody is waited for"
    async with open_rig(tmp_path) as again:
        served = asyncio.create_task(again.serve(batches_done=2))
        again.memory.base[:] = 3.0
        step = asyncio.create_task(asyncio.to_thread(script.step, 0.5))
        assert (await served).resumed.waits
        await again.trainer.merge(ALL)
        assert await step and script.attached
        assert (model.weight == 3.0).all(), "no step of this test has moved a parameter"
        script.close()


async def test_nobody_but_this_user_reaches_the_socket_and_none_is_left(tmp_path: Path) -> None:
    path = find_socket(tmp_path)
    path.parent.mkdir(mode=0o755)
    path.touch()  # of a daemon that was killed
    async with open_rig(tmp_path):
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        assert stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_ISSOCK(path.stat().st_mode)
    assert not path.exists()


async def test_a_path_that_is_too_long_for_a_socket_is_one_all_the_same(tmp_path: Path) -> None:
    home = tmp_path / ("long" * 30)
    assert len(bytes(find_socket(home))) > ADDRESS_BYTES_MAX
    async with open_rig(home) as rig:
        served = asyncio.create_task(rig.serve())
        script, _ = await rig.attach()
        await served
        script.close()


async def test_connections_that_say_nothing_are_bounded(tmp_path: Path) -> None:
    async with open_rig(tmp_path):
        silent = [await asyncio.to_thread(connect, find_socket(tmp_path), 5.0) for _ in range(HANDSHAKES_MAX + 1)]
        assert await asyncio.to_thread(silent[-1].recv, 1) == b"", "hung up on at once"
        silent[0].sendall(b"\xff" * 8)
        assert await asyncio.to_thread(silent[0].recv, 1) == b"", "no frame of this protocol"
        for one in silent:
            one.close()


async def test_a_connection_that_says_nothing_is_hung_up_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daemon_side, "HANDSHAKE_TIMEOUT_S", 0.01)
    async with open_rig(tmp_path):
        silent = await asyncio.to_thread(connect, find_socket(tmp_path), 5.0)
        assert await asyncio.to_thread(silent.recv, 1) == b""
        silent.close()


async def test_scripts_are_taken_again_once_there_are_descriptors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(daemon_side, "ACCEPT_PAUSE_S", 0.01)
    async with open_rig(tmp_path) as rig:
        coming = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 8, hard))
        taken: list[int] = []
        try:
            with pytest.raises(OSError, match="Too many open files"):
                while True:
                    taken.append(os.dup(coming.fileno()))
            coming.connect(os.fspath(find_socket(tmp_path)))
            await wait_until(lambda: "a script could not connect: Too many open files" in caplog.text)
        finally:
            for one in taken:
                os.close(one)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        coming.close()
        served = asyncio.create_task(rig.serve())
        script, _ = await rig.attach()
        await served
        script.close()


async def test_a_script_that_does_not_read_is_hung_up_on_and_blocks_nobody(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        served = asyncio.create_task(rig.serve())
        script, _ = await rig.attach()
        await served
        large = replace(ALL, included=bytes(4096))
        for _ in range(2 * BUFFER_BYTES_MAX // 4096):
            await rig.trainer.merge(large)
        await wait_until(lambda: isinstance(rig.events[-1] if rig.events else None, TrainerLeft))
        assert rig.events[-1] == TrainerLeft(
            detail=f"the script (process {os.getpid()}) has gone: it does not read what it is told"
        )
        script.close()


async def test_what_a_daemon_said_before_it_died_is_not_obeyed(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        served = asyncio.create_task(rig.serve())
        script, model = await rig.attach()
        await served
        rig.memory.base[:] = 9.0
        await rig.trainer.merge(ALL)
        await rig.trainer.stop()
        assert not await asyncio.to_thread(script.step, 0.5)
        assert not script.attached and (model.weight == 1.0).all(), "the base may be half written"
        script.close()


async def test_a_base_that_a_daemon_leaves_half_written_is_not_waited_for(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        served = asyncio.create_task(rig.serve())
        script, model = await rig.attach()
        await served
        await asyncio.to_thread(script.step, 0.5)
        ready = asyncio.create_task(asyncio.to_thread(script.step, 0.5))
        await wait_until(lambda: any(isinstance(one, Ready) for one in rig.events))
        with rig.memory.writing():
            rig.memory.base[:3] = 2.0
            await rig.trainer.merge(ALL)
            assert rig.trainer._script is not None and rig.trainer._script._writer is not None
            rig.trainer._script._writer.transport.abort()  # as by kill -9, in the middle of the outer step
            assert not await ready
        assert not script.attached and (model.weight == 1.0).all()
        script.close()


async def test_a_descriptor_that_a_forked_worker_holds_keeps_no_line_open(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        served = asyncio.create_task(rig.serve())
        script, _ = await rig.attach()
        await served
        assert script._line is not None
        held = os.dup(script._line._socket.fileno())
        script.close()
        await wait_until(lambda: not rig.trainer.running)
        os.close(held)


async def test_what_is_said_while_a_script_is_started_is_not_sent_to_it(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        line = await asyncio.to_thread(script_side.Line, find_socket(tmp_path))
        described = script_side.describe_model(model := build(), torch.optim.SGD(model.parameters()))
        shaken = asyncio.create_task(asyncio.to_thread(line.shake_hands, described))
        await rig.trainer.wait(rig.told.append)
        starting = asyncio.create_task(rig.trainer.start(WORK))
        await asyncio.sleep(0)
        assert not rig.trainer.running
        await rig.trainer.begin(1, adopt=True)
        start, _, _ = await shaken
        assert start.work == WORK
        await rig.trainer.begin(2, adopt=True)
        line.close()
        with pytest.raises(TrainerError, match="has gone"):
            await starting


async def test_a_script_that_is_silent_may_recover(tmp_path: Path) -> None:
    async with open_rig(tmp_path, stall_timeout_s=0.05) as rig:
        served = asyncio.create_task(rig.serve())
        script, _ = await rig.attach()
        await served
        await wait_until(lambda: TrainerStalled(silent_s=0.05, may_recover=True) in rig.events)
        assert rig.trainer.running
        script.close()


async def test_a_script_that_goes_before_it_is_started_is_no_failure_of_the_daemon(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        line = await asyncio.to_thread(script_side.Line, find_socket(tmp_path))
        described = script_side.describe_model(model := build(), torch.optim.SGD(model.parameters()))
        line._socket.sendall(script_side.encode_frame(described))
        await rig.trainer.wait(rig.told.append)
        line.close()
        with pytest.raises(TrainerError) as raised:
            await rig.trainer.start(WORK)
        assert raised.value.has_left and raised.value.failure is Failure.TRAINER_CRASHED
        assert not rig.trainer.running


async def test_a_folder_that_takes_no_socket_is_told_once_and_for_all(tmp_path: Path) -> None:
    (tmp_path / "trainer").touch()
    rig = Rig(tmp_path)
    with pytest.raises(TrainerError, match="cannot be listened on") as raised:
        await rig.trainer.wait(rig.told.append)
    assert raised.value.is_final
    rig.memory.close()


# -- what a script is told where no daemon takes it ------------------------------------------------------------------


def test_without_a_daemon_the_error_says_how_to_start_one(tmp_path: Path) -> None:
    model = build()
    optimizer = torch.optim.SGD(model.parameters())
    with pytest.raises(ConfigError, match=rf"home: no daemon runs on {tmp_path}\. Fix: start one: shoal up --data-dir"):
        shoal.attach(model, optimizer, home=tmp_path)
    note_running(tmp_path, "127.0.0.1", 1)
    with pytest.raises(ConfigError, match=r'takes no script .*whose task is of the kind "attached"'):
        shoal.attach(model, optimizer, home=tmp_path)


def test_the_default_data_folder_is_that_of_the_command_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    model = build()
    with pytest.raises(ConfigError, match=str(Path(NodeConfig().node.data_dir).expanduser())):
        shoal.attach(model, torch.optim.SGD(model.parameters()))


@pytest.mark.parametrize(
    ("model", "trained", "told"),
    [
        (build().double(), None, "model: weight is torch.float64. Fix: keep the parameters in float32"),
        (nn.Sequential(), build(), "model: has 0 parameters. Fix: use one with 1 to 1024"),
        (build(), build(), "optimizer: trains none of the model's parameters"),
    ],
    ids=["float64", "empty", "optimizer of another model"],
)
def test_a_model_that_cannot_take_part_is_told_why(model: nn.Module, trained: nn.Module | None, told: str) -> None:
    optimizer = torch.optim.SGD((trained or model).parameters())
    with pytest.raises(ConfigError) as raised:
        shoal.attach(model, optimizer)
    assert told in str(raised.value)


def test_parameters_in_another_order_of_memory_are_told() -> None:
    model = build(width=3)
    model.weight = nn.Parameter(torch.zeros(2, 3).t())
    with pytest.raises(ConfigError, match="model: weight is not contiguous"):
        shoal.attach(model, torch.optim.SGD(model.parameters()))


def test_a_daemon_is_looked_for_less_and_less_often_and_never_given_up() -> None:
    again = Reconnection()
    now_s, pauses = 100.0, []
    again.lost(now_s)
    for _ in range(8):
        due_s = next(now_s + pause for pause in range(1, 1000) if again.is_due(now_s + pause))
        pauses.append(due_s - now_s)
        now_s = due_s
        again.failed(now_s)
    assert pauses == [1, 2, 4, 8, 16, 30, 30, 30]
    assert (pauses[0], pauses[-1]) == (RECONNECT_FIRST_S, RECONNECT_MAX_S)
    again.lost(now_s)
    assert not again.is_due(now_s + 29.0), "it was not found in between"
    again.found()
    again.lost(now_s)
    assert not again.is_due(now_s + 0.9) and again.is_due(now_s + 1.0)


def test_the_manifest_says_what_trains() -> None:
    text = 'name = "x"\nseed = 1\n[task]\nkind = "{}"'
    for kind, made in (("attached", AttachedTrainer), ("byte_gpt", TrainerProcess)):
        manifest = make_manifest(parse_draft(text.format(kind), "{}"), LAYOUT, PEERS[0], PEERS[:1])
        chosen = choose_trainer(manifest)
        assert getattr(chosen, "func", chosen) is made
