"""A whole daemon, alone: when what it cannot do without fails, it leaves in order, says why, and starts again."""

import asyncio
import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from shoal.node.bench.allreduce import AllreduceOptions, make_bench_manifest
from shoal.node.bench.peer import StandIn
from shoal.node.config import BOOTSTRAP, TRAINER, TrainerTable, load_config
from shoal.node.daemon import Daemon
from shoal.node.identity_file import IDENTITY_FILE, hold_identity, load_or_create_identity
from shoal.node.membership import Membership
from shoal.node.round_driver import RoundDriver
from shoal.node.task_set import DaemonFailed
from shoal.node.trainer import MakeTrainer, SharedParameters, TrainerEvent
from shoal.protocol.identity import Identity
from shoal.protocol.manifest import sign_manifest


def serve(daemon: Daemon) -> None:
    """Until it is stopped, or fails."""


async def run_alone(folder: Path, on_ready: Callable[[Daemon], None], make_trainer: MakeTrainer | None = None) -> None:
    load_or_create_identity(folder / IDENTITY_FILE)
    with hold_identity(folder / IDENTITY_FILE) as identity:
        founders = (identity.peer, Identity(bytes(range(32))).peer)
        made = make_bench_manifest(AllreduceOptions(peers=2, mib=1 / 16), founders)
        (folder / "swarm.shoal").write_bytes(sign_manifest(made, identity))
        role = TRAINER if make_trainer else BOOTSTRAP
        flags = {"data-dir": str(folder), "manifest": str(folder / "swarm.shoal"), "role": role}
        flags |= {"control-host": "127.0.0.1", "tensor-host": "127.0.0.1"}
        flags |= dict.fromkeys(("control-port", "tensor-port", "web-port"), "0")
        config = load_config(None, flags)
        config = dataclasses.replace(config, lan=dataclasses.replace(config.lan, mdns=False))
        await Daemon(config, identity, 1, make_trainer).run(on_ready)


async def test_a_daemon_whose_rounds_have_ended_by_a_defect_ends_and_starts_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(driver: RoundDriver) -> None:
        raise KeyError("planted")

    with monkeypatch.context() as patch:
        patch.setattr(RoundDriver, "_look", fail)
        with pytest.raises(DaemonFailed, match=r"a defect has ended RoundDriver\.run; .* start the peer again"):
            await run_alone(tmp_path, serve)
    (told,) = [record for record in caplog.records if record.exc_info is not None]
    assert "planted" in str(told.exc_info)
    await run_alone(tmp_path, Daemon.stop)


async def test_a_daemon_that_can_tell_nobody_that_it_lives_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(membership: Membership) -> None:
        raise KeyError("planted")

    monkeypatch.setattr(Membership, "beat", fail)
    with pytest.raises(DaemonFailed, match="a defect has ended"):
        await run_alone(tmp_path, serve)


async def test_a_daemon_without_its_control_plane_ends(tmp_path: Path) -> None:
    with pytest.raises(DaemonFailed, match=r"the control plane has stopped: KeyError: 'planted'; .* start the peer"):
        await run_alone(tmp_path, lambda daemon: daemon._control_crashed("KeyError: 'planted'"))


async def test_a_daemon_that_fails_ends_its_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[StandIn] = []
    trains = asyncio.Event()

    def make_trainer(
        memory: SharedParameters, settings: TrainerTable, on_event: Callable[[TrainerEvent], None], checkpoints: Path
    ) -> StandIn:
        made.append(StandIn(memory, on_event, 1, trains.set))
        return made[-1]

    async def fail(membership: Membership) -> None:
        await trains.wait()
        raise KeyError("planted")

    monkeypatch.setattr(Membership, "beat", fail)
    with pytest.raises(DaemonFailed, match="a defect has ended"):
        await run_alone(tmp_path, serve, make_trainer)
    assert not made[-1].running
