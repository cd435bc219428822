"""Messages with many signatures are checked in a thread; each peer's messages stay in their order."""

import asyncio
import threading
from collections.abc import Coroutine

import pytest

from shoal.node import verification
from shoal.node.verification import HEAVY_MAX, WAITING_MAX, Verification
from shoal.protocol.errors import Refusal
from shoal.protocol.identity import PeerId
from shoal.protocol.messages import ROUND_MESSAGES, Nack, Plan, RosterEntry
from tests.unit.protocol.samples import CROWD_PEERS, SWARM, make_head, make_ready

ANN, BOB, *_ = CROWD_PEERS
VOTERS = (ANN, BOB)


def heavy(number: int) -> Plan:
    """A plan with more members than are checked at once."""
    signed = make_ready(0, make_head())
    return Plan(
        round=1,
        attempt=number,
        revision=0,
        previous=bytes(32),
        base_root=bytes(32),
        codec="int8",
        roster=(RosterEntry(signed=signed, weight=1.0),) * 64,
        owners=(0,),
    )


def light(number: int) -> Nack:
    return Nack(round=1, attempt=number, promised=number)


class Desk:
    """A `Verification` whose thread waits until the test lets it go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.delivered: list[tuple[PeerId, int]] = []
        self.dropped: list[tuple[PeerId, Refusal]] = []
        self.checked: list[int] = []
        self.go_on = threading.Semaphore(0)
        self.tasks: list[asyncio.Task[object]] = []
        monkeypatch.setattr(verification, "verify_ahead", self._check)
        self.verification = Verification(
            SWARM, deliver=self._deliver, drop=lambda *dropped: self.dropped.append(dropped), spawn=self._spawn
        )

    def _check(self, message: Plan, sender: PeerId, swarm: bytes) -> None:
        assert swarm == SWARM and sender in VOTERS
        assert self.go_on.acquire(timeout=60)
        self.checked.append(message.attempt)

    def _deliver(self, message: ROUND_MESSAGES, sender: PeerId) -> None:
        assert isinstance(message, Plan | Nack)
        self.delivered.append((sender, message.attempt))

    def _spawn(self, work: Coroutine[object, object, object]) -> None:
        self.tasks.append(asyncio.get_running_loop().create_task(work))

    def take(self, message: ROUND_MESSAGES, sender: PeerId = ANN) -> None:
        self.verification.take(message, sender, VOTERS)

    async def finish(self, heavy_messages: int) -> None:
        self.go_on.release(heavy_messages)
        await asyncio.gather(*self.tasks)


async def test_one_peers_messages_keep_their_order_and_others_do_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(monkeypatch)
    for message in (light(1), heavy(2), light(3), heavy(4), light(5)):
        desk.take(message)
    desk.take(light(6), BOB)
    await asyncio.sleep(0)
    assert desk.delivered == [(ANN, 1), (BOB, 6)]
    await desk.finish(2)
    assert desk.delivered[2:] == [(ANN, number) for number in (2, 3, 4, 5)]
    assert desk.checked == [2, 4]
    desk.take(light(7))
    assert desk.delivered[-1] == (ANN, 7), "nothing waits any more"


async def test_of_strangers_nothing_is_checked_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(monkeypatch)
    stranger = CROWD_PEERS[2]
    desk.take(heavy(1), stranger)
    assert desk.delivered == [(stranger, 1)] and not desk.tasks


async def test_what_waits_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(monkeypatch)
    for number in range(HEAVY_MAX + 1):
        desk.take(heavy(number))
    assert desk.dropped == [(ANN, Refusal.LIMIT)]
    for number in range(WAITING_MAX):
        desk.take(light(number))
    assert len(desk.dropped) == 1 + HEAVY_MAX
    await desk.finish(HEAVY_MAX)
    assert len(desk.delivered) == WAITING_MAX
