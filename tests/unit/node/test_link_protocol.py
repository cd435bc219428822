"""One tensor link against peers that break the rules, crawl or flood: each is dropped by name and harms nobody else."""

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable

import pytest
from blake3 import blake3

from shoal.node.link_port import LinkEnd, LinkLost
from shoal.node.link_records import RecordKind
from shoal.protocol.errors import Refusal
from shoal.protocol.frames import PART_BYTES_MAX, FrameHeader, FrameKind, encode_header
from shoal.protocol.secure_channel import HELLO_BYTES, RECORD_BYTES_MAX, ChannelKeys, Handshake
from tests.unit.node.link_harness import (
    ALICE,
    BOB,
    CAROL,
    SWARM,
    RawPeer,
    describe,
    node,
    on_both_loops,
    pair,
)

PING = FrameHeader(kind=FrameKind.PING, request=3)
NONSENSE = {Refusal.MALFORMED, Refusal.OVERSIZED, Refusal.NOT_AUTHENTIC}
BIG = bytes(2 * RECORD_BYTES_MAX)


def send_unknown_record(raw: RawPeer) -> None:
    raw.write_record(9, b"x")


def send_payload_without_header(raw: RawPeer) -> None:
    raw.write_record(RecordKind.PAYLOAD, b"x")


def send_short_header(raw: RawPeer) -> None:
    raw.write_record(RecordKind.HEADER, encode_header(PING)[:-1])


def send_empty_record(raw: RawPeer) -> None:
    raw.write_record(RecordKind.HEADER, b"")


def send_oversized_record(raw: RawPeer) -> None:
    raw.writer.write((RecordKind.HEADER << 24 | RECORD_BYTES_MAX + 1).to_bytes(4, "little"))


def send_small_payload_records(raw: RawPeer) -> None:
    raw.write_header(describe(BIG))
    raw.write_record(RecordKind.PAYLOAD, BIG[:1000])


def send_too_long_payload(raw: RawPeer) -> None:
    raw.write_header(describe(b"four"))
    raw.write_record(RecordKind.PAYLOAD, b"four!")


def send_payload_within_payload(raw: RawPeer) -> None:
    raw.write_header(describe(BIG))
    raw.write_header(describe(BIG))


def send_other_bytes(raw: RawPeer) -> None:
    raw.write_frame(describe(b"announced"), b"delivered")


def send_garbled_header(raw: RawPeer) -> None:
    raw.write_record(RecordKind.HEADER, b"?" * 64)


def send_oversized_frame(raw: RawPeer) -> None:
    header = bytearray(encode_header(describe(b"x")))
    header[20:24] = (PART_BYTES_MAX + 1).to_bytes(4, "little")
    raw.write_record(RecordKind.HEADER, bytes(header))


def send_unasked_blob(raw: RawPeer) -> None:
    raw.write_header(FrameHeader(kind=FrameKind.BLOB, nbytes=1, request=2))


def send_unasked_answer(raw: RawPeer) -> None:
    raw.write_header(FrameHeader(kind=FrameKind.MISSING, request=2))


def abandon_nothing(raw: RawPeer) -> None:
    raw.write_header(FrameHeader(kind=FrameKind.ABANDON))


def ask_twice(raw: RawPeer) -> None:
    fetch = FrameHeader(kind=FrameKind.FETCH, nbytes=1, request=3)
    raw.write_header(fetch)
    raw.write_header(fetch)


def flood(raw: RawPeer) -> None:
    for _ in range(200):
        raw.write_header(PING)


OFFENCES: list[tuple[Callable[[RawPeer], None], Refusal]] = [
    (send_unknown_record, Refusal.UNKNOWN_TYPE),
    (send_payload_without_header, Refusal.MALFORMED),
    (send_short_header, Refusal.WRONG_LENGTH),
    (send_empty_record, Refusal.WRONG_LENGTH),
    (send_oversized_record, Refusal.OVERSIZED),
    (send_small_payload_records, Refusal.WRONG_LENGTH),
    (send_too_long_payload, Refusal.WRONG_LENGTH),
    (send_payload_within_payload, Refusal.MALFORMED),
    (send_other_bytes, Refusal.WRONG_DIGEST),
    (send_garbled_header, Refusal.MALFORMED),
    (send_oversized_frame, Refusal.OVERSIZED),
    (send_unasked_blob, Refusal.NOT_PLANNED),
    (send_unasked_answer, Refusal.NOT_PLANNED),
    (abandon_nothing, Refusal.MALFORMED),
    (ask_twice, Refusal.DUPLICATE),
    (flood, Refusal.LIMIT),
]


# What a record says of itself in the clear can be altered on the way: it ends the link and accuses nobody.
UNPROVEN = {
    send_unknown_record,
    send_payload_without_header,
    send_short_header,
    send_empty_record,
    send_oversized_record,
    send_small_payload_records,
    send_too_long_payload,
}


@pytest.mark.parametrize(("offend", "refusal"), OFFENCES, ids=[offend.__name__ for offend, _ in OFFENCES])
async def test_offence_ends_the_link_and_is_named_to_the_offender(
    offend: Callable[[RawPeer], None], refusal: Refusal
) -> None:
    async with node(BOB, bare_headers_per_tick_max=100, tick_s=1.0) as bob, RawPeer.dialled(bob) as raw:
        bob.sink.serving = asyncio.Event()
        offend(raw)
        goodbye = await raw.read_header(FrameKind.GOODBYE)
        assert goodbye.refusal is refusal
        assert await raw.reader.read() == b""
        accused = None if offend in UNPROVEN else CAROL.peer
        assert bob.sink.refusals_made == [(accused, refusal)]
        assert bob.sink.ends == [(CAROL.peer, LinkEnd.MISBEHAVED)]
        assert len(bob.sink.reserved) == len(bob.sink.aborts)
        assert bob.links.statistics().links == 0


@on_both_loops
async def test_good_transfer_goes_on_among_hostile_connections() -> None:
    hello = Handshake(ChannelKeys(CAROL, b"k" * 32), SWARM, dialer=True, expected=BOB.peer).take_outgoing()
    openings = [
        b"GET / HTTP/1.1\r\n\r\n",
        os.urandom(4000),
        hello[:HELLO_BYTES] + b"\xff\xff",
        hello[:-1] + b"\x00" + os.urandom(100),
    ]
    limits = {"handshake_timeout_s": 0.3, "goodbye_timeout_s": 0.3, "half_open_max": 8}
    with contextlib.ExitStack() as hostile:
        async with node(BOB, **limits) as bob, node(ALICE) as alice:
            pushes = [asyncio.create_task(alice.push(bob, bytes(PART_BYTES_MAX), part)) for part in range(10)]
            for number in range(40):
                client = hostile.enter_context(socket.create_connection(bob.address))
                if 4 <= number < 24:
                    client.sendall(openings[number % len(openings)])
                await asyncio.sleep(0)
            await asyncio.gather(*pushes)
            await bob.sink.until(lambda: len(bob.sink.payloads) == 10 and len(bob.sink.refusals_made) == 40)
            # What says nonsense, says nothing or comes beyond the limit is dropped, and no name is blamed for it.
            assert {peer for peer, _ in bob.sink.refusals_made} == {None}
            reasons = {refusal for _, refusal in bob.sink.refusals_made}
            assert {Refusal.MALFORMED, Refusal.LIMIT, Refusal.EXPIRED} <= reasons
            assert reasons <= {*NONSENSE, Refusal.LIMIT, Refusal.EXPIRED}
            assert bob.links.statistics().half_open == 0
            assert alice.sink.ends == []


@on_both_loops
async def test_half_open_connections_of_one_host_are_limited() -> None:
    with contextlib.ExitStack() as hostile:
        async with node(BOB, half_open_per_host_max=2) as bob:
            first, *_ = [hostile.enter_context(socket.create_connection(bob.address)) for _ in range(3)]
            await bob.sink.until(lambda: bob.sink.refusals_made)
            assert bob.sink.refusals_made == [(None, Refusal.LIMIT)]
            assert bob.links.statistics().half_open == 2
            # The oldest has gone, so that whoever means well comes in although others hold places open.
            first.setblocking(False)
            assert await asyncio.get_running_loop().sock_recv(first, 1) == b""
            async with node(ALICE) as alice:
                await alice.push(bob, b"honest")


@on_both_loops
async def test_payload_that_crawls_ends_the_link() -> None:
    async with node(BOB, rate_window_s=0.1, rate_bytes_per_s_min=1000) as bob, RawPeer.dialled(bob) as raw:
        raw.write_header(describe(BIG))
        await bob.sink.until(lambda: bob.sink.ends)
        assert bob.sink.ends == [(CAROL.peer, LinkEnd.SLOW)]
        assert len(bob.sink.aborts) == 1
        assert bob.sink.refusals_made == []


@on_both_loops
async def test_record_that_crawls_ends_the_link() -> None:
    async with node(BOB, rate_window_s=0.1, rate_bytes_per_s_min=1000) as bob, RawPeer.dialled(bob) as raw:
        raw.writer.write(b"\x40\x00")
        await bob.sink.until(lambda: bob.sink.ends)
        assert bob.sink.ends == [(CAROL.peer, LinkEnd.SLOW)]


@on_both_loops
async def test_peer_that_does_not_read_its_answers_is_cut_off() -> None:
    async with node(BOB) as bob, RawPeer.dialled(bob) as raw:
        payload = bytes(PART_BYTES_MAX)
        raw.write_header(PING)
        await raw.read_header(FrameKind.PONG)

        async def push_until_stuck() -> None:
            while True:
                await bob.links.send(CAROL.peer, (), describe(payload), memoryview(payload))

        pushing = asyncio.create_task(push_until_stuck())
        sent, unchanged = 0, 0
        # The StreamReader holds up at its own limit; once the kernel's buffers are full as well, nothing moves.
        while unchanged < 1000:
            await asyncio.sleep(0)
            now_sent = bob.links.statistics().peers[0].wire_bytes_out
            sent, unchanged = now_sent, unchanged + 1 if now_sent == sent else 0
        # On a busy machine the kernel may take some more after all: answers count from when it takes nothing.
        while not bob.sink.ends:
            raw.write_header(PING)
            await asyncio.sleep(0)
        assert bob.sink.ends == [(CAROL.peer, LinkEnd.STALLED)]
        await asyncio.gather(pushing, return_exceptions=True)


@on_both_loops
async def test_headers_pass_a_payload_under_way() -> None:
    async with node(BOB) as bob, RawPeer.dialled(bob) as raw:
        payload = bytes(PART_BYTES_MAX)
        raw.write_header(
            FrameHeader(kind=FrameKind.FETCH, nbytes=PART_BYTES_MAX, digest=blake3(payload).digest(), request=3)
        )
        bob.sink.blobs[blake3(payload).digest()] = memoryview(payload)
        await bob.sink.until(lambda: bob.sink.serves)
        raw.write_header(PING)
        kinds = []
        while kinds.count(RecordKind.PAYLOAD) < PART_BYTES_MAX // RECORD_BYTES_MAX:
            kind, _ = await raw.read_record()
            kinds.append(kind)
        assert kinds.count(RecordKind.HEADER) == 2
        assert kinds[0] == RecordKind.HEADER


@on_both_loops
async def test_refused_frames_end_no_link_by_themselves() -> None:
    async with node(BOB) as bob, RawPeer.dialled(bob) as raw:
        bob.sink.answer = Refusal.DUPLICATE
        for _ in range(300):
            raw.write_frame(describe(b"again"), b"again")
            assert (await raw.read_header(FrameKind.REFUSED)).refusal is Refusal.DUPLICATE
        bob.sink.answer = None
        raw.write_frame(describe(b"new"), b"new")
        await bob.sink.until(lambda: bob.sink.payloads)
        assert bob.sink.ends == [] and bob.sink.refusals_made == []


@on_both_loops
async def test_a_peer_that_is_hung_up_on_is_told_why_on_every_link_and_may_be_kept_out() -> None:
    async with pair(idle_timeout_s=30.0) as (alice, bob):
        await alice.push(bob, b"hello")
        await bob.push(alice, b"hello")
        bob.sink.admission = Refusal.WRONG_DIGEST
        bob.links.hang_up(alice.peer, Refusal.WRONG_DIGEST)
        assert not bob.links.is_linked(alice.peer)
        await alice.sink.until(lambda: alice.sink.ends)
        assert alice.sink.ends == [(bob.peer, LinkEnd.REFUSED_BY_PEER)]
        assert bob.sink.ends == [(alice.peer, LinkEnd.MISBEHAVED)]
        assert bob.sink.refusals_made == [], "what it did is on its account already"
        with contextlib.suppress(LinkLost):  # its last byte may leave before the answer to its handshake comes
            await alice.push(bob, b"again")
        await alice.sink.until(lambda: len(alice.sink.ends) == 2)
        assert alice.sink.ends[1] == (bob.peer, LinkEnd.REFUSED_BY_PEER)
        assert len(bob.sink.payloads) <= 1
        bob.sink.admission = None
        await alice.push(bob, b"another chance")
        await bob.sink.until(lambda: any(payload == b"another chance" for _, _, payload in bob.sink.payloads))


@on_both_loops
async def test_hanging_up_on_a_peer_without_a_link_does_nothing() -> None:
    async with pair() as (alice, bob):
        bob.links.hang_up(alice.peer, Refusal.MALFORMED)
        await alice.push(bob, b"hello")
        await bob.sink.until(lambda: bob.sink.payloads)


@on_both_loops
async def test_more_fetches_than_may_be_served_are_refused() -> None:
    async with node(BOB, serves_max=2) as bob, RawPeer.dialled(bob) as raw:
        bob.sink.serving = asyncio.Event()
        for request in (3, 5, 7):
            raw.write_header(FrameHeader(kind=FrameKind.FETCH, nbytes=1, request=request))
        refused = await raw.read_header(FrameKind.REFUSED)
        assert (refused.request, refused.refusal) == (7, Refusal.LIMIT)
        bob.sink.serving.set()
        assert {(await raw.read_header(FrameKind.MISSING)).request for _ in range(2)} == {3, 5}


@on_both_loops
async def test_frame_under_way_is_finished_after_the_peers_goodbye() -> None:
    async with node(BOB) as bob, RawPeer.dialled(bob) as raw:
        payload = os.urandom(PART_BYTES_MAX)
        send = asyncio.create_task(bob.links.send(CAROL.peer, (), describe(payload), memoryview(payload)))
        await raw.read_header(FrameKind.CONTRIBUTION)
        raw.write_header(FrameHeader(kind=FrameKind.GOODBYE))
        received = b"".join([(await raw.read_record())[1] for _ in range(PART_BYTES_MAX // RECORD_BYTES_MAX)])
        await send
        assert received == payload
        assert await raw.reader.read() == b""
        await bob.sink.until(lambda: bob.sink.ends)
        assert bob.sink.ends == [(CAROL.peer, LinkEnd.PEER_SAID_GOODBYE)]


@on_both_loops
async def test_quiet_link_gives_its_large_buffers_back() -> None:
    async with pair() as (alice, bob):
        await alice.push(bob, bytes(PART_BYTES_MAX))
        await bob.sink.until(lambda: bob.sink.payloads)
        (link,) = alice.links._links[bob.peer]
        while link._record is not None:
            await asyncio.sleep(0)
        await alice.push(bob, b"and works on")
        await bob.sink.until(lambda: len(bob.sink.payloads) == 2)
