"""A trainer that is a script of a person's own: waited for, gone without blame, and slow without being ended."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from shoal.node.compute import RESTARTS_MAX
from shoal.node.status import TrainerState
from shoal.node.trainer import TrainerError, TrainerLeft, TrainerStalled
from shoal.node.training.messages import NO_EVALUATION, Failed, Progress
from shoal.protocol.errors import Failure
from tests.unit.node.node_samples import Peer, make_samples, open_peer, wait_until
from tests.unit.node.test_compute import Trainer, make_result


class ScriptTrainer(Trainer):
    """As the port behind which scripts attach themselves: `come` is one that does."""

    def __init__(self, peer: Peer) -> None:
        super().__init__(peer, round_s=3600.0)
        self.come = asyncio.Event()

    async def wait(self, tell: Callable[[str], None]) -> None:
        if not self.come.is_set():
            tell("run a script")
        await self.come.wait()

    async def leave(self) -> None:
        """The script goes."""
        self.come.clear()
        await self.stop()
        self._on_event(TrainerLeft(detail="the script has gone"))


async def test_a_script_is_waited_for_and_the_person_is_told(tmp_path: Path) -> None:
    async with open_peer(make_samples(), 0, tmp_path, trains=True) as peer:
        peer.compute.trainer = trainer = ScriptTrainer(peer)
        starting = asyncio.create_task(peer.compute.start())
        await wait_until(lambda: peer.compute.phase is TrainerState.WAITING)
        assert peer.compute.next_step == "run a script"
        await peer.compute.committed(make_result(peer, 4), (0,))
        assert trainer.merges == [] and trainer.starts == 0
        trainer.come.set()
        await starting
        assert peer.compute.phase is TrainerState.RUNNING and peer.compute.next_step == ""
        assert trainer.begun == [(1, True)]


async def test_scripts_come_and_go_as_often_as_they_like(tmp_path: Path) -> None:
    async with open_peer(make_samples(), 0, tmp_path, trains=True) as peer:
        peer.compute.trainer = trainer = ScriptTrainer(peer)
        trainer.come.set()
        await peer.compute.start()
        for visit in range(1, RESTARTS_MAX + 3):
            await trainer.leave()
            await wait_until(lambda: peer.compute.phase is TrainerState.WAITING)
            trainer.come.set()
            await wait_until(lambda: peer.compute.phase is TrainerState.RUNNING)
            assert trainer.starts == visit + 1
        assert peer.compute.restarts == 0 and peer.given_up == []


async def test_one_that_goes_before_it_has_started_is_no_failure_either(tmp_path: Path) -> None:
    async with open_peer(make_samples(), 0, tmp_path, trains=True) as peer:
        peer.compute.trainer = trainer = ScriptTrainer(peer)
        trainer.refusals = [
            TrainerError(Failure.TRAINER_CRASHED, "gone", has_left=True) for _ in range(RESTARTS_MAX + 2)
        ]
        trainer.come.set()
        await peer.compute.start()
        await wait_until(lambda: peer.compute.phase is TrainerState.RUNNING)
        assert peer.compute.restarts == 0 and peer.given_up == []


async def test_a_daemon_that_ends_waits_no_longer(tmp_path: Path) -> None:
    async with open_peer(make_samples(), 0, tmp_path, trains=True) as peer:
        peer.compute.trainer = trainer = ScriptTrainer(peer)
        starting = asyncio.create_task(peer.compute.start())
        await wait_until(lambda: peer.compute.phase is TrainerState.WAITING)
        await peer.compute.stop()
        trainer.come.set()
        await starting
        assert trainer.starts == 0 and peer.compute.phase is TrainerState.STOPPED
        await trainer.leave()
        assert peer.compute.phase is TrainerState.STOPPED


async def test_a_silent_script_is_called_stalled_until_it_is_heard(tmp_path: Path) -> None:
    async with open_peer(make_samples(), 0, tmp_path, trains=True) as peer:
        peer.compute.trainer = trainer = ScriptTrainer(peer)
        trainer.come.set()
        await peer.compute.start()
        peer.compute.take(TrainerStalled(silent_s=1.0, may_recover=True))
        assert peer.compute.phase is TrainerState.STALLED and trainer.running
        heard = Progress(round=1, steps=1, tokens=1, loss=1.0, tokens_per_s=1.0)
        peer.compute.take(heard)
        assert peer.compute.phase is TrainerState.RUNNING
        peer.compute.phase = TrainerState.PAUSED
        peer.compute.take(TrainerStalled(silent_s=1.0, may_recover=True))
        peer.compute.take(replace(heard, steps=2))
        assert peer.compute.phase is TrainerState.PAUSED, "it waits for its round"


async def test_a_script_that_measures_nothing_has_no_fault(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with open_peer(make_samples(), 0, tmp_path, trains=True) as peer:
        peer.compute.take(Failed(reason=NO_EVALUATION, detail="no `evaluate`", fatal=False))
        assert peer.compute.error == "" and not [one for one in caplog.records if one.levelname == "WARNING"]
