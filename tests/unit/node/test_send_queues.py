"""Who waits for a link goes in the order of coming."""

import asyncio
from collections import deque

import pytest

from shoal.node.send_queues import SendQueues
from tests.unit.protocol.samples import PEERS

PEER, OTHER = PEERS[:2]


class Lines:
    """Senders that take one of `room` turns each, in the order in which they get them."""

    def __init__(self, queues: SendQueues, room: int = 0) -> None:
        self.queues = queues
        self.room = room
        self.served: list[str] = []

    def begin(self, *names: str) -> deque[asyncio.Task[None]]:
        return deque(asyncio.get_running_loop().create_task(self._send(name)) for name in names)

    async def _send(self, name: str) -> None:
        if self.queues.has_waiting(PEER) or not self._take(name):
            with self.queues.line_up(PEER) as place:
                await self.queues.wait(place)
                while not self._take(name):
                    await self.queues.wait(place)

    def _take(self, name: str) -> bool:
        if not self.room:
            return False
        self.room -= 1
        self.served.append(name)
        return True


async def settle() -> None:
    for _ in range(50):
        await asyncio.sleep(0)


@pytest.mark.asyncio
async def test_one_wake_serves_as_many_as_there_is_room_for_in_their_order() -> None:
    lines = Lines(SendQueues(8))
    tasks = lines.begin("a", "b", "c", "d")
    await settle()
    lines.room = 3
    lines.queues.wake(PEER)
    await settle()
    assert lines.served == ["a", "b", "c"] and not tasks[3].done()
    lines.room = 1
    lines.queues.wake(PEER)
    await asyncio.gather(*tasks)
    assert lines.served[3:] == ["d"] and not lines.queues.has_waiting(PEER)


@pytest.mark.asyncio
async def test_the_order_stays_when_all_are_woken_in_vain() -> None:
    lines = Lines(SendQueues(8))
    tasks = lines.begin("a", "b", "c")
    await settle()
    for _ in range(3):
        lines.queues.wake_all(PEER)
        await settle()
    tasks += lines.begin("d")
    await settle()
    lines.room = 4
    lines.queues.wake(PEER)
    await asyncio.gather(*tasks)
    assert lines.served == ["a", "b", "c", "d"]


@pytest.mark.asyncio
async def test_a_turn_of_one_that_is_cancelled_goes_to_the_next() -> None:
    lines = Lines(SendQueues(8))
    tasks = lines.begin("a", "b")
    await settle()
    lines.room = 1
    lines.queues.wake(PEER)
    tasks[0].cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert lines.served == ["b"] and not lines.queues.has_waiting(PEER)


@pytest.mark.asyncio
async def test_the_bound_is_by_peer_and_counts_everybody_who_has_a_place() -> None:
    lines = Lines(SendQueues(2))
    tasks = lines.begin("a", "b")
    await settle()
    lines.queues.wake_all(PEER)
    await settle()
    assert lines.queues.is_full(PEER) and not lines.queues.is_full(OTHER) and not lines.queues.has_waiting(OTHER)
    lines.queues.wake(OTHER)
    tasks[0].cancel()
    await settle()
    assert not lines.queues.is_full(PEER)
    tasks[1].cancel()
