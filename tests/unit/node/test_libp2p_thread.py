"""The bridge between asyncio and trio."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import pytest
import trio

from shoal.node.control import ControlStopped
from shoal.node.libp2p_thread import TrioThread
from shoal.protocol.errors import ConfigError, ProtocolError, Refusal

PATIENCE_S = 60.0


@asynccontextmanager
async def plain_resource() -> AsyncIterator[str]:
    yield "resource"


class Bridge:
    """A TrioThread and what it reported."""

    def __init__(self) -> None:
        self.crashes: asyncio.Queue[BaseException] = asyncio.Queue()
        self.thread: TrioThread[str] = TrioThread("bridge under test", self.crashes.put_nowait)

    async def start(self, resource: Callable[[], AbstractAsyncContextManager[str]] = plain_resource) -> str:
        return await self.thread.start(resource)


@pytest.fixture
async def bridge() -> AsyncIterator[Bridge]:
    bridge = Bridge()
    yield bridge
    assert await bridge.thread.stop(PATIENCE_S)
    assert bridge.crashes.empty()


async def test_the_resource_lives_in_its_own_thread(bridge: Bridge) -> None:
    assert await bridge.start() == "resource"

    async def where() -> str:
        return threading.current_thread().name

    assert await bridge.thread.call(where) == "bridge under test"


async def test_what_opening_raises_is_raised_by_start(bridge: Bridge) -> None:
    def broken() -> AbstractAsyncContextManager[str]:
        raise ConfigError("port", "is taken", "take another")

    with pytest.raises(ConfigError):
        await bridge.start(broken)
    with pytest.raises(ControlStopped):
        await bridge.thread.call(trio.sleep, 0)


async def test_errors_of_the_project_come_through_a_call(bridge: Bridge) -> None:
    await bridge.start()

    async def refuse() -> None:
        raise ProtocolError(Refusal.LIMIT, "no more")

    with pytest.raises(ProtocolError):
        await bridge.thread.call(refuse)
    assert await bridge.thread.call(returning, 7) == 7


async def test_any_other_error_ends_the_run_and_is_reported_once() -> None:
    bridge = Bridge()
    await bridge.start()
    waiting = asyncio.create_task(bridge.thread.call(trio.sleep_forever))
    await bridge.thread.call(returning, 0)

    async def fail() -> None:
        raise ZeroDivisionError

    for call in (bridge.thread.call(fail), waiting):
        with pytest.raises(ControlStopped):
            await call
    async with asyncio.timeout(PATIENCE_S):
        assert isinstance(await bridge.crashes.get(), ZeroDivisionError)
    with pytest.raises(ControlStopped):
        bridge.thread.post(print)
    assert await bridge.thread.stop(PATIENCE_S)
    assert bridge.crashes.empty()


async def test_cancelling_the_caller_cancels_the_call(bridge: Bridge) -> None:
    await bridge.start()
    cancelled = asyncio.Event()

    async def wait() -> None:
        try:
            await trio.sleep_forever()
        finally:
            bridge.thread.deliver(cancelled.set)

    task = asyncio.create_task(bridge.thread.call(wait))
    await bridge.thread.call(returning, 0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    async with asyncio.timeout(PATIENCE_S):
        await cancelled.wait()


async def test_deliveries_keep_their_order_and_flush_waits_for_them(bridge: Bridge) -> None:
    await bridge.start()
    seen: list[int] = []

    async def deliver() -> list[int]:
        for number in range(1000):
            bridge.thread.deliver(seen.append, number)
        await bridge.thread.flush()
        return list(seen)

    assert await bridge.thread.call(deliver) == list(range(1000))


async def test_posts_keep_their_order(bridge: Bridge) -> None:
    await bridge.start()
    seen: list[int] = []
    for number in range(1000):
        bridge.thread.post(seen.append, number)
    await bridge.thread.call(returning, 0)
    assert seen == list(range(1000))


async def test_asking_returns_the_answer_or_the_refusal(bridge: Bridge) -> None:
    await bridge.start()

    async def answer(number: int) -> int:
        assert threading.current_thread() is threading.main_thread()
        if number < 0:
            raise ProtocolError(Refusal.OUT_OF_RANGE, "negative")
        return number + 1

    assert await bridge.thread.call(bridge.thread.ask, answer, 1) == 2
    with pytest.raises(ProtocolError):
        await bridge.thread.call(bridge.thread.ask, answer, -1)


async def test_a_handover_is_settled_by_trio(bridge: Bridge) -> None:
    await bridge.start()
    good, bad = bridge.thread.open_handover(), bridge.thread.open_handover()
    bridge.thread.post(good, None)
    bridge.thread.post(bad, ProtocolError(Refusal.LIMIT, "no"))
    await good.wait()
    with pytest.raises(ProtocolError):
        await bad.wait()
    assert good.abandoned and bad.abandoned


async def test_stopping_ends_what_is_under_way(bridge: Bridge) -> None:
    await bridge.start()
    call = asyncio.create_task(bridge.thread.call(trio.sleep_forever))
    handover = bridge.thread.open_handover()
    await bridge.thread.call(returning, 0)
    assert await bridge.thread.stop(PATIENCE_S)
    with pytest.raises(ControlStopped):
        await call
    with pytest.raises(ControlStopped):
        await handover.wait()


async def test_a_run_that_will_not_end_is_left_behind() -> None:
    bridge, release = Bridge(), threading.Event()

    @asynccontextmanager
    async def stubborn() -> AsyncIterator[str]:
        yield ""
        release.wait()

    await bridge.start(stubborn)
    assert not await bridge.thread.stop(0.01)
    release.set()
    assert await bridge.thread.stop(PATIENCE_S)


async def test_stopping_before_starting_is_nothing(bridge: Bridge) -> None:
    assert await bridge.thread.stop(0.0)


async def returning(value: int) -> int:
    """The value, from within trio."""
    return value
