"""Which link a payload takes, when one more is opened, and when a way round is sought."""

import asyncio
import os
import socket
from collections.abc import Coroutine
from typing import Any

import pytest
from blake3 import blake3

from shoal.node.link_port import LinkEnd, LinkLost
from shoal.node.link_protocol import Link
from shoal.node.link_width import LINKS_WANTED_MAX
from shoal.protocol.errors import Refusal
from shoal.protocol.frames import PART_BYTES_MAX, FrameHeader
from shoal.protocol.identity import PeerId
from tests.unit.node.link_harness import ALICE, BOB, Node, describe, lost_reason, node, on_both_loops, pair

LONG_S, SHORT_S = 0.1, 0.0005  # round trips; at this rate one window is too little for the first


def make_path(source: Node, target: Node, round_trip_s: float) -> None:
    """What was measured so far says that the path is fast, and so far."""
    traffic = source.links.traffic_with(target.peer)
    traffic.send_rate.add(1 << 30, 1.0)
    traffic.add_round_trip(0.0, round_trip_s)


@on_both_loops
async def test_what_waits_is_sent_in_order_by_whichever_link_is_free() -> None:
    given: list[int] = []
    send_frame = Link.send_frame

    def note(link: Link, header: FrameHeader, payload: memoryview) -> Coroutine[Any, Any, None]:
        given.append(header.part)
        return send_frame(link, header, payload)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Link, "send_frame", note)
        await _send_many()
    # When they arrive is up to the links: one that is held up is overtaken by all that the others carry.
    assert given == [0, *range(24)]


async def _send_many() -> None:
    async with node(BOB) as bob, node(ALICE) as alice:
        await alice.push(bob, b"first")
        make_path(alice, bob, LONG_S)
        payloads = [os.urandom(1_000_000) for _ in range(24)]
        await asyncio.gather(*(alice.push(bob, payload, part) for part, payload in enumerate(payloads)))
        await bob.sink.until(lambda: len(bob.sink.payloads) == 1 + len(payloads))
        assert {payload for _, _, payload in bob.sink.payloads[1:]} == set(payloads)
        assert 1 < alice.links.statistics().links <= LINKS_WANTED_MAX


@on_both_loops
async def test_a_short_path_has_one_link_however_much_waits() -> None:
    async with pair() as (alice, bob):
        await alice.push(bob, b"first")
        make_path(alice, bob, SHORT_S)
        await asyncio.gather(*(alice.push(bob, bytes(1_000_000), part) for part in range(12)))
        await bob.sink.until(lambda: len(bob.sink.payloads) == 13)
        assert alice.links.statistics().links == 1


@on_both_loops
async def test_a_further_link_that_fails_stops_nothing() -> None:
    async with node(BOB, links_per_peer_max=1) as bob, node(ALICE) as alice:
        await alice.push(bob, b"first")
        make_path(alice, bob, LONG_S)
        await asyncio.gather(*(alice.push(bob, bytes(1_000_000), part) for part in range(12)))
        await bob.sink.until(lambda: len(bob.sink.payloads) == 13)
        assert alice.links.statistics().links == 1


@on_both_loops
async def test_blobs_that_are_served_make_room_for_payloads_that_wait() -> None:
    async with pair() as (alice, bob):
        await bob.push(alice, b"x")
        blob = os.urandom(PART_BYTES_MAX)
        alice.sink.blobs[blake3(blob).digest()] = memoryview(blob)
        into = [memoryview(bytearray(PART_BYTES_MAX)) for _ in range(3)]
        fetches = [bob.links.fetch(alice.peer, (), blake3(blob).digest(), one, 30.0) for one in into]
        pushes = [alice.push(bob, bytes(100_000), part) for part in range(4)]
        await asyncio.gather(*fetches, *pushes)
        await bob.sink.until(lambda: len(bob.sink.payloads) == 4)


@on_both_loops
async def test_who_waits_for_a_link_that_is_lost_learns_of_it() -> None:
    async with node(BOB) as bob, node(ALICE) as alice:
        await alice.push(bob, b"first")
        sends = [asyncio.create_task(alice.push(bob, bytes(PART_BYTES_MAX), part)) for part in range(6)]
        await asyncio.sleep(0)
        alice.links.hang_up(bob.peer, Refusal.BANNED)
        ended = await asyncio.gather(*sends, return_exceptions=True)
        assert any(isinstance(one, LinkLost) for one in ended)


@on_both_loops
async def test_a_payload_that_is_given_up_while_it_waits_leaves_its_place() -> None:
    async with pair() as (alice, bob):
        await alice.push(bob, b"first")
        sends = [asyncio.create_task(alice.push(bob, bytes(PART_BYTES_MAX), part)) for part in range(6)]
        await asyncio.sleep(0)
        for cancelled in (sends[3], sends[4]):
            cancelled.cancel()
        await asyncio.gather(*sends, return_exceptions=True)
        await bob.sink.until(lambda: len(bob.sink.payloads) == 5)
        assert sorted(header.part for _, header, _ in bob.sink.payloads[1:]) == [0, 1, 2, 5]


@on_both_loops
async def test_a_way_round_is_sought_beside_a_dial_that_nobody_answers() -> None:
    async with node(BOB) as bob, node(ALICE, direct_head_start_s=0.0, connect_timeout_s=60.0) as alice:
        asked = []

        async def find_way(peer: PeerId) -> None:
            asked.append(peer)
            await alice.links.dial_from_port(bob.peer, bob.address)

        alice.links.detour = find_way
        with socket.create_server(("127.0.0.1", 0)) as deaf:  # takes the connection and says nothing
            await alice.links.send(bob.peer, (deaf.getsockname(),), describe(b"x"), memoryview(b"x"))
        await bob.sink.until(lambda: bob.sink.payloads)
        assert asked == [bob.peer]
        assert alice.links.statistics().links == 1


@on_both_loops
async def test_who_is_refused_seeks_no_way_round() -> None:
    async with node(BOB, links_per_peer_max=1) as bob, node(ALICE) as alice, node(ALICE) as twin:
        await alice.push(bob, b"first")

        async def find_way(peer: PeerId) -> None:
            raise AssertionError("the peer was there and said no")

        twin.links.detour = find_way
        assert await lost_reason(twin.push(bob, b"second")) == (LinkEnd.REFUSED_BY_PEER, Refusal.LIMIT)
