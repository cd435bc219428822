"""A trainer of several processes: they live and end as one, whichever of them or of their daemons is killed."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from shoal.node.trainer import TrainerError, TrainerExited, TrainerProcess
from shoal.node.training.messages import RANK_LOST, Evaluated, Failed, Progress, Ready
from tests.unit.node.test_trainer import ENDLESS, MERGE, PATIENCE_S, SETTINGS, is_gone, make_trainer, run
from tests.unit.training.tiny import TRAINING, make_work

RANKED = replace(SETTINGS, processes=2, stall_timeout_s=60.0)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc")


def list_followers(trainer: TrainerProcess) -> list[int]:
    """The processes that the trainer's first one has started."""
    assert trainer.pid is not None
    return children_of(trainer.pid)


def children_of(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.long
def test_they_train_evaluate_merge_and_stop_as_one(tmp_path: Path) -> None:
    async def test() -> None:
        async with make_trainer(replace(RANKED, threads=4), folder=tmp_path / "trainer") as (trainer, events):
            assert (await trainer.start(make_work())).device == "cpu (2 processes)"
            (follower,) = list_followers(trainer)
            assert trainer.pid is not None
            assert [os.getpriority(os.PRIO_PROCESS, one) for one in (trainer.pid, follower)] == [5, 5]
            await trainer.evaluate()
            before = await events.next(Evaluated)
            await trainer.begin(1, adopt=True)
            ready = await events.next(Ready)
            assert (ready.steps, ready.tokens, ready.problem) == (TRAINING.inner_steps, 4 * 8 * 32, "")
            trainer.base[:] = trainer.local
            await trainer.merge(replace(MERGE, begin=True))
            await trainer.evaluate()
            assert (await events.next(Evaluated)).loss_nats < before.loss_nats
            assert (await events.next(Ready)).batches_done == 8
            pids = [trainer.pid, follower]
            await trainer.stop()
            assert all(is_gone(pid, 0.0) for pid in pids)

    run(test())


def test_a_follower_that_is_killed_ends_the_trainer_which_can_be_started_again(tmp_path: Path) -> None:
    async def test() -> None:
        async with make_trainer(replace(RANKED, processes=3), folder=tmp_path / "trainer") as (trainer, events):
            await trainer.start(ENDLESS)
            first, second = list_followers(trainer)
            await trainer.begin(1, adopt=True)
            await events.next(Progress)
            os.kill(first, signal.SIGKILL)
            failed = await events.next(Failed)
            assert (failed.reason, failed.fatal) == (RANK_LOST, True)
            assert failed.detail == f"rank 1 (process {first}) was killed by SIGKILL"
            assert (await events.next(TrainerExited)).returncode == 1
            assert is_gone(second, PATIENCE_S)

            await trainer.start(ENDLESS)
            await trainer.begin(1, adopt=True)
            await trainer.freeze()
            await events.next(Ready)
            assert np.isfinite(trainer.local).all()

    run(test())


@pytest.mark.long
def test_a_first_process_that_is_killed_leaves_none_behind(tmp_path: Path) -> None:
    async def test() -> None:
        async with make_trainer(RANKED, folder=tmp_path / "trainer") as (trainer, events):
            await trainer.start(ENDLESS)
            (follower,) = list_followers(trainer)
            await trainer.begin(1, adopt=True)
            await events.next(Progress)
            os.kill(follower, signal.SIGSTOP)  # it cannot end by itself
            assert trainer.pid is not None
            os.kill(trainer.pid, signal.SIGKILL)
            assert (await events.next(TrainerExited)).returncode == -signal.SIGKILL
            assert is_gone(follower, PATIENCE_S)

    run(test())


PARENT = """
import asyncio, pathlib, sys
from tests.unit.node.test_trainer_ranks import ENDLESS, RANKED, Progress, list_followers, make_trainer

async def main():
    async with make_trainer(RANKED, folder=pathlib.Path(sys.argv[1])) as (trainer, events):
        await trainer.start(ENDLESS)
        await trainer.begin(1, adopt=True)
        await events.next(Progress)
        print(trainer.pid, *list_followers(trainer), flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.mark.long
def test_none_outlives_the_daemon(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PARENT, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[3]) as parent:
        assert parent.stdout is not None
        pids = [int(word) for word in parent.stdout.readline().split()]
        assert len(pids) == 2 and not any(is_gone(pid, 0.0) for pid in pids)
        os.kill(pids[1], signal.SIGSTOP)  # it cannot end by itself
        parent.kill()
        assert all(is_gone(pid, PATIENCE_S) for pid in pids)


def test_more_processes_than_examples_are_refused_by_name(tmp_path: Path) -> None:
    async def test() -> None:
        async with make_trainer(replace(RANKED, processes=9), folder=tmp_path / "trainer") as (trainer, _):
            with pytest.raises(TrainerError, match=r"trainer\.processes: is 9, and the swarm's batch has 8") as caught:
                await trainer.start(make_work())
            assert caught.value.is_final

    run(test())
