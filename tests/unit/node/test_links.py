"""Tensor links between well-behaved peers over real sockets: delivery, choice of link, losses, limits, the end."""

import asyncio
import contextlib
import os
import signal
import socket
import sys

import pytest
from blake3 import blake3

from shoal.node.link_port import FetchFailed, FetchFailure, LinkEnd, LinkLost, LinkPath
from shoal.node.link_records import SMALL_INBOX_BYTES
from shoal.protocol.errors import ProtocolError, Refusal
from shoal.protocol.frames import PART_BYTES_MAX, FrameKind
from shoal.protocol.identity import Identity
from shoal.protocol.secure_channel import RECORD_BYTES_MAX
from tests.unit.node.link_harness import (
    ALICE,
    BOB,
    CAROL,
    Node,
    Proxy,
    describe,
    lost_reason,
    node,
    on_both_loops,
    pair,
)

SIZES = (1, SMALL_INBOX_BYTES, RECORD_BYTES_MAX - 1, RECORD_BYTES_MAX, RECORD_BYTES_MAX + 1, PART_BYTES_MAX)


@on_both_loops
async def test_payloads_arrive_byte_for_byte_in_both_directions_over_one_link() -> None:
    async with pair() as (alice, bob):
        for part, size in enumerate(SIZES):
            there, back = os.urandom(size), os.urandom(size)
            await alice.push(bob, there, part=part)
            await bob.links.send(alice.peer, (), describe(back, FrameKind.RESULT, part), memoryview(back))
            await bob.sink.until(lambda part=part: len(bob.sink.payloads) == part + 1)
            await alice.sink.until(lambda part=part: len(alice.sink.payloads) == part + 1)
            assert bob.sink.payloads[-1] == (alice.peer, describe(there, part=part), there)
            assert alice.sink.payloads[-1] == (bob.peer, describe(back, FrameKind.RESULT, part), back)
        assert (alice.sink.ups, bob.sink.ups) == ([bob.peer], [alice.peer])
        assert alice.links.statistics().links == bob.links.statistics().links == 1
        assert alice.links.is_linked(bob.peer)


@on_both_loops
async def test_many_senders_at_once_share_a_link() -> None:
    async with pair() as (alice, bob):
        payloads = {part: os.urandom(100_000 + part) for part in range(40)}
        await asyncio.gather(*(alice.push(bob, payload, part) for part, payload in payloads.items()))
        await bob.sink.until(lambda: len(bob.sink.payloads) == 40)
        assert {header.part: payload for _, header, payload in bob.sink.payloads} == payloads
        assert bob.links.statistics().links == 1


@on_both_loops
async def test_fetch_fills_the_callers_buffer() -> None:
    async with pair() as (alice, bob):
        for size in SIZES:
            blob = os.urandom(size)
            digest = blake3(blob).digest()
            bob.sink.blobs[digest] = memoryview(blob)
            into = bytearray(size)
            await alice.links.fetch(bob.peer, bob.addresses, digest, memoryview(into), 30.0)
            assert into == blob


@on_both_loops
async def test_fetch_tells_why_it_failed() -> None:
    async with pair() as (alice, bob):
        bob.sink.blobs |= {b"r" * 32: Refusal.NOT_A_MEMBER, b"l" * 32: memoryview(bytes(9))}
        expected = {
            b"m" * 32: (FetchFailure.MISSING, None),
            b"r" * 32: (FetchFailure.REFUSED, Refusal.NOT_A_MEMBER),
            b"l" * 32: (FetchFailure.REFUSED, Refusal.WRONG_LENGTH),
        }
        for digest, outcome in expected.items():
            with pytest.raises(FetchFailed) as caught:
                await alice.links.fetch(bob.peer, bob.addresses, digest, memoryview(bytearray(10)), 30.0)
            assert (caught.value.reason, caught.value.refusal) == outcome
        assert alice.links.is_linked(bob.peer)


@on_both_loops
async def test_donor_that_sends_other_bytes_is_refused() -> None:
    async with pair() as (alice, bob):
        bob.sink.blobs[b"w" * 32] = memoryview(bytes(300_000))
        with pytest.raises(FetchFailed) as caught:
            await alice.links.fetch(bob.peer, bob.addresses, b"w" * 32, memoryview(bytearray(300_000)), 30.0)
        assert caught.value.reason is FetchFailure.WRONG_DIGEST
        assert alice.sink.refusals_made == [(bob.peer, Refusal.WRONG_DIGEST)]
        await bob.sink.until(lambda: bob.sink.ends)
        assert bob.sink.ends == [(alice.peer, LinkEnd.REFUSED_BY_PEER)]


@on_both_loops
async def test_late_answer_does_not_touch_the_buffer_and_does_no_harm() -> None:
    async with pair() as (alice, bob):
        blob = os.urandom(1_000_000)
        digest = blake3(blob).digest()
        bob.sink.blobs[digest] = memoryview(blob)
        bob.sink.serving = asyncio.Event()
        abandoned, kept = bytearray(1_000_000), bytearray(1_000_000)
        with pytest.raises(FetchFailed) as caught:
            await alice.links.fetch(bob.peer, bob.addresses, digest, memoryview(abandoned), 0.05)
        assert caught.value.reason is FetchFailure.TIMEOUT
        # A frame behind the withdrawal shows that it has arrived.
        await alice.push(bob, b"behind it")
        await bob.sink.until(lambda: bob.sink.payloads)
        bob.sink.serving.set()
        await alice.links.fetch(bob.peer, bob.addresses, digest, memoryview(kept), 30.0)
        assert kept == blob
        assert not any(abandoned)
        assert alice.sink.refusals_made == bob.sink.refusals_made == []
        # The first request was withdrawn before it was served, so the blob crossed once.
        assert alice.links.statistics().peers[0].payload_bytes_in == 1_000_000


@on_both_loops
async def test_fetch_given_up_midway_is_abandoned_by_the_donor() -> None:
    async with pair() as (alice, bob):
        blob = os.urandom(PART_BYTES_MAX)
        digest = blake3(blob).digest()
        bob.sink.blobs[digest] = memoryview(blob)
        into = bytearray(PART_BYTES_MAX)
        fetch = asyncio.create_task(alice.links.fetch(bob.peer, bob.addresses, digest, memoryview(into), 30.0))
        while not any(peer.payload_bytes_in for peer in alice.links.statistics().peers):
            await asyncio.sleep(0)
        fetch.cancel()
        await asyncio.gather(fetch, return_exceptions=True)
        before = bytes(into)
        await alice.links.fetch(bob.peer, bob.addresses, digest, memoryview(bytearray(PART_BYTES_MAX)), 30.0)
        assert into == before != blob
        assert alice.links.statistics().links == 1


@on_both_loops
async def test_refused_frame_is_told_and_the_link_goes_on() -> None:
    async with pair() as (alice, bob):
        bob.sink.answer = Refusal.WRONG_ROUND
        late = os.urandom(500_000)
        await alice.push(bob, late, part=3)
        await alice.sink.until(lambda: alice.sink.refusals_heard)
        heard = alice.sink.refusals_heard[0]
        assert (heard.round, heard.part, heard.digest) == (7, 3, blake3(late).digest())
        assert heard.refusal is Refusal.WRONG_ROUND
        bob.sink.answer = None
        await alice.push(bob, b"in time")
        await bob.sink.until(lambda: bob.sink.payloads)
        assert alice.sink.ends == bob.sink.ends == []
        assert bob.sink.aborts == []


@on_both_loops
async def test_header_that_no_honest_peer_sends_ends_the_link_on_both_sides() -> None:
    async with pair() as (alice, bob):
        bob.sink.answer = ProtocolError(Refusal.WRONG_LENGTH, "the plan says otherwise")
        payload = bytes(PART_BYTES_MAX)
        reason = await lost_reason(alice.push(bob, payload))
        assert reason == (LinkEnd.REFUSED_BY_PEER, Refusal.WRONG_LENGTH)
        assert bob.sink.refusals_made == [(alice.peer, Refusal.WRONG_LENGTH)]
        assert bob.sink.ends == [(alice.peer, LinkEnd.MISBEHAVED)]


@on_both_loops
async def test_cancelled_send_is_abandoned_and_the_link_goes_on() -> None:
    async with pair() as (alice, bob):
        await alice.push(bob, b"first")
        payload = bytes(PART_BYTES_MAX)
        send = asyncio.create_task(alice.push(bob, payload, part=1))
        while alice.links.statistics().peers[0].wire_bytes_out < RECORD_BYTES_MAX:
            await asyncio.sleep(0)
        send.cancel()
        with pytest.raises(asyncio.CancelledError):
            await send
        await bob.sink.until(lambda: bob.sink.aborts)
        assert [header.part for header in bob.sink.aborts] == [1]
        await alice.push(bob, b"last", part=2)
        await bob.sink.until(lambda: len(bob.sink.payloads) == 2)
        assert alice.sink.ends == bob.sink.ends == []


@on_both_loops
async def test_wrong_peer_at_the_address_is_refused() -> None:
    async with node(ALICE) as alice, node(BOB) as bob:
        send = alice.links.send(CAROL.peer, bob.addresses, describe(b"for carol"), memoryview(b"for carol"))
        assert await lost_reason(send) == (LinkEnd.MISBEHAVED, Refusal.WRONG_PEER)
        # The peer that was expected is not to blame for who sits at its address.
        assert alice.sink.refusals_made == [(None, Refusal.WRONG_PEER)]
        assert bob.sink.ups == bob.sink.payloads == []


@on_both_loops
async def test_other_swarm_is_refused_by_name_on_both_sides() -> None:
    async with node(ALICE) as alice, node(BOB, swarm=b"o" * 32) as bob:
        assert await lost_reason(alice.push(bob, b"x")) == (LinkEnd.MISBEHAVED, Refusal.WRONG_SWARM)
        assert alice.sink.refusals_made == bob.sink.refusals_made == [(None, Refusal.WRONG_SWARM)]


@on_both_loops
async def test_peer_that_is_not_admitted_learns_why() -> None:
    async with pair() as (alice, bob):
        bob.sink.admission = Refusal.NOT_A_MEMBER
        reason = await lost_reason(alice.push(bob, bytes(PART_BYTES_MAX)))
        assert reason == (LinkEnd.REFUSED_BY_PEER, Refusal.NOT_A_MEMBER)
        assert bob.sink.ups == bob.sink.reserved == []


@on_both_loops
async def test_no_way_to_a_peer_has_a_name() -> None:
    async with node(ALICE) as alice:
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            dead = unused.getsockname()
            for addresses, reason in (((), LinkEnd.NO_ADDRESS), ((dead,), LinkEnd.UNREACHABLE)):
                send = alice.links.send(BOB.peer, addresses, describe(b"x"), memoryview(b"x"))
                assert await lost_reason(send) == (reason, None)


@on_both_loops
async def test_handshake_that_gets_no_answer_ends() -> None:
    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            await reader.read()
        writer.close()

    server = await asyncio.start_server(say_nothing, "127.0.0.1", 0)
    async with node(ALICE, handshake_timeout_s=0.1) as alice:
        address = server.sockets[0].getsockname()
        send = alice.links.send(BOB.peer, (address,), describe(b"x"), memoryview(b"x"))
        assert await lost_reason(send) == (LinkEnd.HANDSHAKE_TIMEOUT, None)
        assert alice.links.statistics().dials == 0
    server.close()
    await server.wait_closed()


@on_both_loops
async def test_simultaneous_dials_are_harmless() -> None:
    async with pair() as (alice, bob):
        there, back = os.urandom(3_000_000), os.urandom(3_000_000)
        for part in range(3):
            await asyncio.gather(alice.push(bob, there, part), bob.push(alice, back, part))
        await alice.sink.until(lambda: len(alice.sink.payloads) == 3)
        await bob.sink.until(lambda: len(bob.sink.payloads) == 3)
        assert {payload for _, _, payload in alice.sink.payloads} == {back}
        assert {payload for _, _, payload in bob.sink.payloads} == {there}
        assert alice.sink.ups == [bob.peer]
        assert alice.sink.ends == bob.sink.ends == []


@on_both_loops
async def test_more_links_than_one_peer_may_have_are_refused() -> None:
    async with node(BOB, links_per_peer_max=1) as bob, node(ALICE) as alice, node(ALICE) as twin:
        await alice.push(bob, b"first")
        assert await lost_reason(twin.push(bob, b"second")) == (LinkEnd.REFUSED_BY_PEER, Refusal.LIMIT)
        await alice.push(bob, b"third")
        await bob.sink.until(lambda: len(bob.sink.payloads) == 2)


@on_both_loops
async def test_own_limits_are_named() -> None:
    async with node(BOB) as bob, node(CAROL) as carol, node(ALICE, links_max=1, sends_queued_max=1) as alice:
        await alice.push(bob, b"first")
        assert await lost_reason(alice.push(carol, b"x")) == (LinkEnd.LIMIT, None)
        queued = [asyncio.create_task(alice.push(bob, bytes(PART_BYTES_MAX), part)) for part in range(3)]
        await asyncio.sleep(0)
        assert await lost_reason(alice.push(bob, b"x")) == (LinkEnd.LIMIT, None)
        await asyncio.gather(*queued)


@on_both_loops
async def test_idle_link_says_goodbye_and_the_next_send_dials_again() -> None:
    async with node(BOB) as bob, node(ALICE, idle_timeout_s=0.1) as alice:
        await alice.push(bob, b"first")
        await alice.sink.until(lambda: alice.sink.ends)
        await bob.sink.until(lambda: bob.sink.ends)
        assert alice.sink.ends == [(bob.peer, LinkEnd.IDLE)]
        assert bob.sink.ends == [(alice.peer, LinkEnd.PEER_SAID_GOODBYE)]
        await alice.push(bob, b"second")
        await bob.sink.until(lambda: len(bob.sink.payloads) == 2)
        assert bob.sink.ups == [alice.peer, alice.peer]


@on_both_loops
async def test_pings_keep_a_quiet_link_and_measure_it() -> None:
    async with pair(ping_period_s=0.02, silence_timeout_s=1.0) as (alice, bob):
        await alice.push(bob, b"x")

        def measured(at: Node) -> bool:
            return at.links.statistics().peers[0].round_trip_s is not None

        while not (measured(alice) and measured(bob)):
            await asyncio.sleep(0)
        assert alice.sink.ends == bob.sink.ends == []


@on_both_loops
async def test_vanished_peer_is_noticed_by_its_silence() -> None:
    deadlines = {"ping_period_s": 0.05, "silence_timeout_s": 0.3}
    async with pair(**deadlines) as (alice, bob), Proxy.before(bob.address) as (proxy, address):
        await alice.links.send(bob.peer, (address,), describe(b"x"), memoryview(b"x"))
        proxy.flowing.clear()
        fetch = alice.links.fetch(bob.peer, (), bytes(32), memoryview(bytearray(9)), 30.0)
        assert await lost_reason(fetch) == (LinkEnd.SILENT, None)
        assert alice.sink.ends == [(bob.peer, LinkEnd.SILENT)]
        proxy.cut()


@on_both_loops
async def test_reset_connection_is_a_loss_on_both_sides() -> None:
    async with pair() as (alice, bob), Proxy.before(bob.address) as (proxy, address):
        await alice.links.send(bob.peer, (address,), describe(b"x"), memoryview(b"x"))
        await bob.sink.until(lambda: bob.sink.payloads)
        proxy.cut()
        await alice.sink.until(lambda: alice.sink.ends)
        await bob.sink.until(lambda: bob.sink.ends)
        assert alice.sink.ends == [(bob.peer, LinkEnd.CLOSED_BY_PEER)]
        assert bob.sink.ends == [(alice.peer, LinkEnd.CLOSED_BY_PEER)]


@on_both_loops
async def test_another_link_ends_those_on_which_the_peer_is_silent() -> None:
    async with pair(doubt_timeout_s=0.3) as (alice, bob), Proxy.before(bob.address) as (proxy, address):
        await alice.links.send(bob.peer, (address,), describe(b"by the cable"), memoryview(b"by the cable"))
        proxy.flowing.clear()
        await alice.links.dial_from_port(bob.peer, bob.address)
        assert count_links(alice, bob) == 2
        for one, other in ((alice, bob), (bob, alice)):
            while count_links(one, other) != 1:
                await asyncio.sleep(0)
            assert one.sink.ends == [], "there is another one"
        await bob.push(alice, b"by the radio")
        proxy.cut()


def count_links(one: Node, other: Node) -> int:
    (known,) = [peer for peer in one.links.statistics().peers if peer.peer == other.peer]
    return known.links


@on_both_loops
async def test_links_by_an_address_that_is_gone_end_and_the_next_one_is_dialled() -> None:
    async with pair() as (alice, bob):
        await alice.push(bob, b"by the cable")
        assert alice.links.end_stranded() == alice.links.end_stranded(lambda host: host == "127.0.0.1") == 0
        assert alice.links.end_stranded(lambda host: host != "127.0.0.1") == 1
        assert alice.sink.ends == [(bob.peer, LinkEnd.ADDRESS_GONE)]
        await bob.sink.until(lambda: bob.sink.ends)
        await alice.push(bob, b"by the radio")
        assert alice.links.end_stranded() == 0 and alice.links.is_linked(bob.peer)


@on_both_loops
async def test_altered_byte_kills_the_link_with_a_reason() -> None:
    async with pair() as (alice, bob), Proxy.before(bob.address) as (proxy, address):
        await alice.links.send(bob.peer, (address,), describe(b"x"), memoryview(b"x"))
        proxy.flip_at = proxy.forwarded_bytes + 1_000_000
        payload = bytes(PART_BYTES_MAX)
        with contextlib.suppress(LinkLost):  # all of it may be in the buffers of the kernel by then
            await alice.links.send(bob.peer, (), describe(payload, part=5), memoryview(payload))
        await alice.sink.until(lambda: alice.sink.ends)
        assert alice.sink.ends == [(bob.peer, LinkEnd.REFUSED_BY_PEER)]
        assert bob.sink.refusals_made == [(None, Refusal.NOT_AUTHENTIC)], "nothing proves who altered it"
        assert [header.part for header in bob.sink.aborts] == [5]
        assert bob.sink.ends == [(alice.peer, LinkEnd.MISBEHAVED)]


VICTIM = """
import asyncio, sys
from shoal.node.links import TensorLinks
from tests.unit.node.link_harness import BOB, CONFIG, SWARM, RecordingSink

async def main():
    sink = RecordingSink(completing=asyncio.Event())
    links = TensorLinks(BOB, SWARM, CONFIG, sink)
    print(*await links.start(), flush=True)
    await sink.completing.wait()

asyncio.run(main())
"""


@on_both_loops
async def test_killed_peer_is_lost_to_the_waiting_sender() -> None:
    victim = await asyncio.create_subprocess_exec(sys.executable, "-c", VICTIM, stdout=asyncio.subprocess.PIPE)
    assert victim.stdout is not None
    host, port = (await victim.stdout.readline()).split()
    payload = bytes(PART_BYTES_MAX)
    async with node(ALICE) as alice:
        send = alice.links.send(BOB.peer, [(host.decode(), int(port))], describe(payload), memoryview(payload))
        await send

        async def push_until_lost() -> None:
            while True:
                await alice.links.send(BOB.peer, (), describe(payload), memoryview(payload))

        pushing = asyncio.create_task(push_until_lost())
        while alice.links.statistics().peers[0].payload_bytes_out < 4 * PART_BYTES_MAX:
            await asyncio.sleep(0)
        victim.send_signal(signal.SIGKILL)
        assert await lost_reason(pushing) == (LinkEnd.CLOSED_BY_PEER, None)
        assert alice.sink.ends == [(BOB.peer, LinkEnd.CLOSED_BY_PEER)]
        await victim.wait()
        victim._transport.close()  # type: ignore[attr-defined]


@on_both_loops
async def test_sink_that_takes_nothing_bounds_memory_and_stalls_the_sender() -> None:
    async with node(BOB, ping_period_s=0.05) as bob, node(ALICE, stall_timeout_s=1.5) as alice:
        bob.sink.completing = asyncio.Event()
        payload = bytes(PART_BYTES_MAX)

        async def push_until_lost() -> None:
            while True:
                await alice.push(bob, payload)

        assert await lost_reason(push_until_lost()) == (LinkEnd.STALLED, None)
        # What is held up is what was reserved; everything behind it waits at the sender or in the kernel.
        assert len(bob.sink.reserved) == bob.links.config.completions_max
        bob.sink.completing.set()


@on_both_loops
async def test_sink_that_takes_its_time_loses_nothing() -> None:
    async with pair() as (alice, bob):
        bob.sink.completing = asyncio.Event()
        payload = os.urandom(300_000)
        pushes = [asyncio.create_task(alice.push(bob, payload, part)) for part in range(60)]
        await bob.sink.until(lambda: len(bob.sink.reserved) == bob.links.config.completions_max)
        bob.sink.completing.set()
        await asyncio.gather(*pushes)
        await bob.sink.until(lambda: len(bob.sink.payloads) == 60)
        assert sorted(header.part for _, header, _ in bob.sink.payloads) == list(range(60))


@on_both_loops
async def test_stop_tells_everyone_who_waits() -> None:
    async with node(BOB) as bob, node(ALICE, goodbye_timeout_s=0.2) as alice:
        bob.sink.completing, bob.sink.serving = asyncio.Event(), asyncio.Event()
        await alice.push(bob, b"x")
        into = memoryview(bytearray(5))
        waiting = [
            asyncio.create_task(alice.links.fetch(bob.peer, (), bytes(32), into, 30.0)),
            *(asyncio.create_task(alice.push(bob, bytes(PART_BYTES_MAX))) for _ in range(8)),
        ]
        await bob.sink.until(lambda: bob.sink.serves and len(bob.sink.reserved) == bob.links.config.completions_max)
        await alice.links.stop()
        outcomes = await asyncio.gather(*waiting, return_exceptions=True)
        assert isinstance(outcomes[0], LinkLost) and isinstance(outcomes[-1], LinkLost)
        assert {outcome.reason for outcome in outcomes if isinstance(outcome, LinkLost)} == {LinkEnd.STOPPED}
        assert await lost_reason(alice.push(bob, b"x")) == (LinkEnd.STOPPED, None)
        await bob.links.stop()
        assert bob.links.statistics().links == bob.links.statistics().half_open == 0


@on_both_loops
async def test_adopted_sockets_make_a_link() -> None:
    async with pair() as (alice, bob):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            left = socket.create_connection(listener.getsockname())
            right, _ = listener.accept()
        await asyncio.gather(
            alice.links.adopt(left, bob.peer, dialer=True, path=LinkPath.PUNCHED),
            bob.links.adopt(right, alice.peer, dialer=False, path=LinkPath.PUNCHED),
        )
        await bob.links.send(alice.peer, (), describe(b"punched"), memoryview(b"punched"))
        await alice.sink.until(lambda: alice.sink.payloads)
        blob = os.urandom(70_000)
        alice.sink.blobs[blake3(blob).digest()] = memoryview(blob)
        into = bytearray(70_000)
        await bob.links.fetch(alice.peer, (), blake3(blob).digest(), memoryview(into), 30.0)
        assert into == blob


@on_both_loops
async def test_probe_dials_anew_and_leaves_no_link_too_many() -> None:
    async with node(ALICE) as alice, node(BOB, links_per_peer_max=2) as bob:
        await bob.push(alice, b"x")
        assert (alice.links.accepted, bob.links.accepted) == (1, 0)
        for number in range(1, 6):
            assert await alice.links.probe(bob.peer, bob.address)
            await bob.sink.until(lambda number=number: bob.links.accepted == number)
            while alice.links.statistics().links > 1 or bob.links.statistics().links > 1:
                await asyncio.sleep(0)
        assert not await alice.links.probe(CAROL.peer, bob.address)
        assert bob.sink.refusals_made == alice.sink.ends == bob.sink.ends == []


@on_both_loops
async def test_statistics_count_both_ends_alike() -> None:
    async with pair() as (alice, bob):
        payload = bytes(2_000_000)
        await alice.push(bob, payload)
        await bob.sink.until(lambda: bob.sink.payloads)
        (at_alice,), (at_bob,) = alice.links.statistics().peers, bob.links.statistics().peers
        assert (at_alice.peer, at_bob.peer) == (bob.peer, alice.peer)
        assert at_alice.payload_bytes_out == at_bob.payload_bytes_in == 2_000_000
        assert at_alice.wire_bytes_out == at_bob.wire_bytes_in > 2_000_000
        assert (at_alice.frames_out, at_bob.frames_in) == (1, 1)
        assert at_alice.send_bytes_per_s and at_bob.receive_bytes_per_s
        totals = alice.links.totals()
        assert (totals.payload_bytes_out, totals.wire_bytes_out) == (2_000_000, at_alice.wire_bytes_out)
        assert bob.links.totals().payload_bytes_in == 2_000_000


async def test_totals_count_peers_that_are_forgotten() -> None:
    async with node(ALICE, peers_remembered_max=1) as alice:
        for number in range(3):
            traffic = alice.links.traffic_with(Identity(bytes([number + 10]) * 32).peer)
            traffic.payload_bytes_in += 10
            traffic.wire_bytes_out += 1
        assert len(alice.links.statistics().peers) == 1
        totals = alice.links.totals()
        assert (totals.payload_bytes_in, totals.wire_bytes_out) == (30, 3)
