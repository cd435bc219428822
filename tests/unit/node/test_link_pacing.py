"""Turns and held readers, and links under a pacer that counts."""

import asyncio
import os
from typing import Any

import pytest

from shoal.node.link_pacing import Reading, StreamTurns
from shoal.node.pacer import Pacer
from shoal.node.rate_caps import Caps
from shoal.protocol.secure_channel import RECORD_BYTES_MAX, RECORD_OVERHEAD_BYTES
from tests.unit.node.link_harness import describe, on_both_loops, pair

PAYLOAD_BYTES = 3 * RECORD_BYTES_MAX + 1000


class CountingPacer(Pacer):
    """Lets everything pass after `delay_s`, and remembers what it was asked."""

    delay_s = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[int] = []

    def reserve(self, nbytes: int, now: float) -> float:
        self.asked.append(nbytes)
        return self.delay_s


class FakeTransport:
    """Knows whether it reads; asyncio's own complain of nothing."""

    def __init__(self) -> None:
        self.reads = True
        self.calls = 0

    def pause_reading(self) -> None:
        assert self.reads, "it is paused once"
        self.reads = False
        self.calls += 1

    def resume_reading(self) -> None:
        assert not self.reads, "it is resumed once"
        self.reads = True


@on_both_loops
async def test_every_byte_of_a_payload_is_asked_for_at_both_ends() -> None:
    async with pair() as (alice, bob):
        alice.links.upload, bob.links.download = CountingPacer(), CountingPacer()
        payload = os.urandom(PAYLOAD_BYTES)
        await alice.push(bob, payload)
        await bob.sink.until(lambda: bob.sink.payloads)
        assert bob.sink.payloads == [(alice.peer, describe(payload), payload)]
        records = [RECORD_BYTES_MAX] * 3 + [1000]
        assert alice.links.upload.asked == records
        assert bob.links.download.asked == [nbytes + RECORD_OVERHEAD_BYTES for nbytes in records]


@on_both_loops
async def test_what_is_held_up_arrives_all_the_same() -> None:
    async with pair() as (alice, bob):
        for pacer in (alice.links.upload, bob.links.download):
            pacer.set_mbit(400.0)
        payloads = [os.urandom(PAYLOAD_BYTES) for _ in range(4)]
        await asyncio.gather(*(alice.push(bob, payload, part) for part, payload in enumerate(payloads)))
        await bob.sink.until(lambda: len(bob.sink.payloads) == 4)
        assert sorted(payload for _, _, payload in bob.sink.payloads) == sorted(payloads)


@on_both_loops
async def test_links_end_while_they_are_held_up() -> None:
    async with pair(goodbye_timeout_s=0.2) as (alice, bob):
        slow = CountingPacer()
        slow.delay_s = 3600.0
        bob.links.download = slow
        alice.links.upload.set_mbit(1.0)
        push = asyncio.create_task(alice.push(bob, os.urandom(PAYLOAD_BYTES)))
        await bob.sink.until(lambda: bob.sink.reserved)
        push.cancel()
        with pytest.raises(asyncio.CancelledError):
            await push


async def test_turns_are_given_in_order_and_no_more_than_the_cap_allows() -> None:
    pacer = Pacer()
    pacer.set_mbit(1.0)
    assert pacer.streams_max == 2
    turns, inside, began = StreamTurns(pacer), 0, []
    most, leave = 0, [asyncio.Event() for _ in range(6)]

    async def stream(number: int) -> None:
        nonlocal inside, most
        async with turns:
            began.append(number)
            inside += 1
            most = max(most, inside)
            await leave[number].wait()
            inside -= 1

    tasks = [asyncio.create_task(stream(number)) for number in range(6)]

    async def settle() -> None:
        for _ in range(5):
            await asyncio.sleep(0)

    await settle()
    assert began == [0, 1]
    tasks[2].cancel()
    leave[1].set()
    await settle()
    assert began == [0, 1, 3]
    leave[0].set()
    tasks[4].cancel()  # in the same step in which it may be given a turn
    await settle()
    assert began == [0, 1, 3, 5]
    pacer.set_mbit(0.0)
    turns.wake()
    for event in leave:
        event.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [isinstance(one, asyncio.CancelledError) for one in results] == [False, False, True, False, True, False]
    assert most == 2
    async with turns:
        assert inside == 0


async def test_a_lifted_cap_lets_everybody_go() -> None:
    pacer = Pacer()
    pacer.set_mbit(1.0)
    turns, began = StreamTurns(pacer), 0
    done = asyncio.Event()

    async def stream() -> None:
        nonlocal began
        async with turns:
            began += 1
            await done.wait()

    tasks = [asyncio.create_task(stream()) for _ in range(5)]
    for _ in range(3):
        await asyncio.sleep(0)
    assert began == 2
    pacer.set_mbit(0.0)
    turns.wake()
    for _ in range(3):
        await asyncio.sleep(0)
    assert began == 5
    done.set()
    await asyncio.gather(*tasks)


async def test_a_reader_goes_on_when_neither_the_sink_nor_the_cap_holds_it() -> None:
    transport: Any = FakeTransport()
    pacer, read = CountingPacer(), []
    reading = Reading(transport, pacer, lambda: read.append(1))
    reading.took(1)
    assert not reading.is_held
    pacer.delay_s = 3600.0
    reading.took(1)
    reading.hold()
    reading.took(1)
    assert (reading.is_held, transport.reads, transport.calls) == (True, False, 1)
    reading.release()
    assert (reading.is_held, read) == (True, [])
    reading._come_due()
    assert (reading.is_held, transport.reads, read) == (False, True, [1])
    reading.release()
    assert read == [1], "nothing held it"


async def test_a_reader_that_is_held_again_while_it_goes_on_stays_held() -> None:
    transport: Any = FakeTransport()
    reading = Reading(transport, CountingPacer(), lambda: reading.hold())
    reading.hold()
    transport.reads = False
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transport, "pause_reading", lambda: None)
        reading.release()
    assert reading.is_held and not transport.reads
    reading.stop()
    assert not reading.is_held


async def test_caps_reach_both_directions() -> None:
    async with pair() as (alice, _):
        alice.links.set_caps(Caps(upload_mbit=1.0, download_mbit=2.0))
        assert (alice.links.upload.streams_max, alice.links.download.streams_max) == (2, 4)
        alice.links.set_caps(Caps())
        assert (alice.links.upload.streams_max, alice.links.download.streams_max) == (None, None)
