"""The tasks of a daemon: a defect in one stays its own and is seen, all of them end, and their number is bounded."""

import asyncio
import logging

import pytest

from shoal.node import task_set
from shoal.node.control import ControlStopped
from shoal.node.task_set import DaemonFailed, TaskSet
from tests.unit.node.node_samples import wait_until


async def test_a_defect_is_logged_with_its_trace_and_everything_else_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    tasks, done = TaskSet(), asyncio.Event()

    async def fail() -> None:
        raise ValueError("by the test")

    async def work() -> None:
        done.set()

    tasks.spawn(fail())
    tasks.spawn(work())
    await done.wait()
    await wait_until(lambda: caplog.records)
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert "a defect in" in record.getMessage() and "fail" in record.getMessage()
    assert record.exc_info is not None and record.exc_info[0] is ValueError
    await tasks.end()


async def test_the_daemon_gives_up_once_when_a_defect_ends_what_is_vital() -> None:
    given_up = []
    tasks = TaskSet(lambda: given_up.append(tasks.failure))

    async def fail() -> None:
        raise ValueError("by the test")

    async def end() -> None:
        return

    tasks.spawn(fail())
    tasks.spawn(end(), vital=True)
    await wait_until(lambda: len(asyncio.all_tasks()) == 1)
    tasks.check()  # neither of them is one
    assert given_up == []
    tasks.spawn(fail(), vital=True)
    await wait_until(lambda: bool(given_up))
    tasks.fail("what follows from it")
    assert len(given_up) == 1 and "a defect has ended" in given_up[0]
    with pytest.raises(DaemonFailed, match=r"fail; the log has the trace, .* start the peer again"):
        tasks.check()
    await tasks.end()


async def test_what_outlives_the_control_plane_is_no_defect(caplog: pytest.LogCaptureFixture) -> None:
    tasks, ended = TaskSet(), asyncio.Event()

    async def ask() -> None:
        try:
            raise ControlStopped("the control plane is not running")
        finally:
            ended.set()

    tasks.spawn(ask())
    await ended.wait()
    await tasks.end()
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


async def test_end_cancels_what_is_under_way_and_waits_for_it() -> None:
    tasks, began = TaskSet(), asyncio.Event()
    left: list[str] = []

    async def work() -> None:
        began.set()
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)  # cleaning up takes a turn of the loop
            left.append("cleaned up")

    tasks.spawn(work())
    await began.wait()
    await tasks.end()
    assert left == ["cleaned up"]
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_work_that_never_began_is_closed() -> None:
    tasks, began = TaskSet(), False

    async def work() -> None:
        nonlocal began
        began = True

    tasks.spawn(work())  # a coroutine that nobody awaits and nobody closes would be a warning, and so a failure
    await tasks.end()
    assert not began


async def test_past_the_bound_work_is_dropped_and_that_is_told(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task_set, "TASKS_MAX", 3)
    tasks, release, ran = TaskSet(), asyncio.Event(), []

    async def work(number: int) -> None:
        ran.append(number)
        await release.wait()

    for number in range(5):
        tasks.spawn(work(number))
    await wait_until(lambda: len(ran) == 3)
    assert [record.getMessage() for record in caplog.records] == [
        "more than 3 things are under way at once: one is dropped"
    ] * 2
    release.set()
    await wait_until(lambda: len(asyncio.all_tasks()) == 1)
    tasks.spawn(work(9))
    await wait_until(lambda: 9 in ran)  # there is room again
    await tasks.end()
    assert ran == [0, 1, 2, 9]
