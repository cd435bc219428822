"""The data plane of a round: what may arrive, what is kept of it, what liars cost, and how the core's effects end."""

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3

from shoal.node import exchange as module
from shoal.node.exchange import RESULTS_PER_PART_MAX
from shoal.node.metrics import Plane
from shoal.protocol.codecs import CODECS
from shoal.protocol.effects import FetchBlob, Phase, Reduce
from shoal.protocol.errors import Refusal
from shoal.protocol.frames import FrameHeader, FrameKind
from shoal.protocol.messages import (
    Contribution,
    PartDone,
    PartResult,
    Plan,
    Proposal,
    Ready,
    Result,
    SignedReady,
    Vote,
    contribution_root,
    sign_message,
    sign_ready,
)
from shoal.protocol.proposer import make_plan
from shoal.protocol.quorum import make_bitmap, proposer_order
from shoal.protocol.round_state import RESENDS_MAX
from tests.unit.node.node_samples import TINY_ELEMENTS, Peer, Swarm, make_samples, open_peer, wait_until
from tests.unit.node.puppet import Puppet, open_puppet
from tests.unit.protocol.samples import PEERS, make_sample_result

PARTS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """One peer and a puppet; they are the only voters, and the puppet leads attempt 0 of round 1."""

    peer: Peer
    puppet: Puppet
    swarm: Swarm


@asynccontextmanager
async def set_table(folder: Path) -> AsyncIterator[Table]:
    swarm = make_samples()
    leader, follower = (PEERS.index(peer) for peer in proposer_order(swarm.id, swarm.manifest.founders))
    async with open_peer(swarm, follower, folder, trains=True) as peer, open_puppet(swarm, leader, peer) as puppet:
        yield Table(peer=peer, puppet=puppet, swarm=swarm)


def encode_parts(swarm: Swarm, seed: int) -> tuple[bytes, ...]:
    """The parts of a made-up contribution."""
    values = np.random.default_rng(seed).standard_normal(swarm.manifest.layout.elements, dtype=np.float32)
    codec = CODECS[swarm.manifest.rounds.codec]
    ranges = [swarm.manifest.part_range(part) for part in range(swarm.manifest.parts)]
    return tuple(bytes(codec.encode(values[first:end])) for first, end in ranges)


def spoil(part: bytes) -> bytes:
    """The part with a scale that is no number: its length and digest are as good as any."""
    return np.float32(np.nan).tobytes() + part[4:]


def digests_of(parts: tuple[bytes, ...]) -> tuple[bytes, ...]:
    return tuple(blake3(part).digest() for part in parts)


def describe(part: int, payload: bytes, kind: FrameKind = FrameKind.CONTRIBUTION, number: int = 1) -> FrameHeader:
    return FrameHeader(kind=kind, round=number, part=part, nbytes=len(payload), digest=blake3(payload).digest())


def make_ready(table: Table, parts: tuple[bytes, ...]) -> SignedReady:
    ready = Ready(
        round=table.peer.core.round,
        base_root=table.peer.core.head.state_root,
        contribution_root=contribution_root(digests_of(parts)),
        tokens=1000,
        steps=10,
        norm=1.0,
        owns=True,
    )
    return sign_ready(table.puppet.identity, table.swarm.id, ready)


async def begin_exchange(table: Table, parts: tuple[bytes, ...]) -> Plan:
    """Both are ready, and the puppet has planned."""
    await table.peer.contribute(1)
    ready = make_ready(table, parts)
    table.puppet.show(table.peer, ready)
    assert table.peer.signed_ready is not None
    both = {table.puppet.me: ready, table.peer.me: table.peer.signed_ready}
    plan = make_plan(table.peer.core.head, 0, table.swarm.manifest.rounds.codec, both, PARTS)
    assert plan is not None
    plan = sign_message(table.puppet.identity, table.swarm.id, plan)
    await table.puppet.tell(table.peer, plan)
    await wait_until(lambda: table.peer.core.phase is Phase.EXCHANGE)
    return plan


def owned_by(plan: Plan, peer: bytes) -> list[int]:
    return [part for part, owner in enumerate(plan.owners) if plan.roster[owner].signed.peer == peer]


def propose(table: Table, parts: tuple[bytes, ...]) -> Proposal:
    """That these are the result."""
    plain = make_sample_result(table.peer.core.head, members=2, parts=PARTS)
    results = tuple(
        PartResult(digest=digest, contributors=make_bitmap(frozenset({0}), 2)) for digest in digests_of(parts)
    )
    result = Result(
        round=plain.round,
        previous=plain.previous,
        base_root=plain.base_root,
        codec=plain.codec,
        members=plain.members,
        parts=results,
        voters=plain.voters,
    )
    return Proposal(attempt=0, result=result)


def refusals(peer: Peer, refusal: Refusal) -> float:
    counter = peer.reporter.metrics.refusals[refusal, Plane.TENSOR]
    return next(
        sample.value
        for family in peer.reporter.metrics._table.registry.collect()
        for sample in family.samples
        if sample.name == "shoal_refusals_total"
        and sample.labels == {"reason": refusal.value, "plane": Plane.TENSOR.value}
        and counter is not None
    )


# -- what may arrive -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "extra", "refusal"),
    [(PARTS, 0, Refusal.OUT_OF_RANGE), (0, 1, Refusal.WRONG_LENGTH), (0, -1, Refusal.WRONG_LENGTH)],
)
@pytest.mark.parametrize("kind", [FrameKind.CONTRIBUTION, FrameKind.RESULT])
async def test_a_header_that_no_honest_peer_sends_ends_the_link_and_is_counted(
    tmp_path: Path, part: int, extra: int, refusal: Refusal, kind: FrameKind
) -> None:
    async with set_table(tmp_path) as table:
        table.puppet.show(table.peer)
        payload = bytes(table.peer.exchange.part_bytes(0) + extra)
        await table.puppet.push(table.peer, describe(part, payload, kind), payload)
        await wait_until(lambda: table.peer.tensor_refusals)
        assert table.peer.tensor_refusals == [(table.puppet.me, refusal)]
        assert refusals(table.peer, refusal) == 1
        await wait_until(lambda: not table.peer.links.is_linked(table.puppet.me))


async def test_parts_of_strangers_and_of_other_rounds_are_refused_and_the_link_goes_on(tmp_path: Path) -> None:
    async with set_table(tmp_path) as table:
        peer, puppet = table.peer, table.puppet
        parts = encode_parts(table.swarm, 5)
        await puppet.push(peer, describe(0, parts[0]), parts[0])
        await puppet.push(peer, describe(0, parts[0], number=2), parts[0])
        await puppet.push(peer, describe(0, parts[0], FrameKind.RESULT), parts[0])
        await puppet.sink.until(lambda: len(puppet.sink.refusals_heard) == 3)
        heard = [header.refusal for header in puppet.sink.refusals_heard]
        assert heard == [Refusal.NOT_A_MEMBER, Refusal.WRONG_ROUND, Refusal.NOT_PLANNED]
        puppet.show(peer)
        await puppet.push(peer, describe(0, parts[0]), parts[0])
        await puppet.push(peer, describe(0, parts[0]), parts[0])
        await puppet.sink.until(lambda: len(puppet.sink.refusals_heard) == 4)
        assert puppet.sink.refusals_heard[-1].refusal is Refusal.DUPLICATE
        assert puppet.links.is_linked(peer.me)


async def test_a_part_with_a_scale_that_is_no_number_counts_as_not_delivered(tmp_path: Path) -> None:
    async with set_table(tmp_path) as table:
        peer, puppet = table.peer, table.puppet
        parts = encode_parts(table.swarm, 5)
        plan = await begin_exchange(table, parts)
        mine = owned_by(plan, peer.me)
        await puppet.tell(peer, Contribution(round=1, digests=digests_of(parts)))
        bad = spoil(parts[mine[0]])
        peer.exchange.core = peer.core
        await puppet.tell(peer, Contribution(round=1, digests=digests_of((bad,) * PARTS)))
        await puppet.push(peer, describe(mine[0], bad), bad)
        await wait_until(lambda: peer.tensor_refusals)
        assert peer.tensor_refusals == [(puppet.me, Refusal.NOT_FINITE)]
        assert peer.core.check_part(puppet.me, 1, mine[0], blake3(bad).digest()) is None, "it is not held"
        assert puppet.heard(PartDone) == []


async def test_a_sender_that_changes_its_mind_is_held_to_one_part_of_memory(tmp_path: Path) -> None:
    async with set_table(tmp_path) as table:
        peer, puppet = table.peer, table.puppet
        puppet.show(peer)
        buffers = []
        for seed in range(12):
            payload = encode_parts(table.swarm, seed)[0]
            buffers.append(await deliver(peer, puppet, describe(0, payload), payload))
        gc.collect()
        assert [buffer() is not None for buffer in buffers] == [False] * 11 + [True]


async def test_results_that_a_member_pushes_are_bounded(tmp_path: Path) -> None:
    async with set_table(tmp_path) as table:
        peer, puppet = table.peer, table.puppet
        await begin_exchange(table, encode_parts(table.swarm, 5))
        for seed in range(RESULTS_PER_PART_MAX):
            payload = encode_parts(table.swarm, seed)[0]
            await deliver(peer, puppet, describe(0, payload, FrameKind.RESULT), payload)
        payload = encode_parts(table.swarm, 99)[0]
        assert peer.exchange.reserve(puppet.me, describe(0, payload, FrameKind.RESULT)) is Refusal.LIMIT
        other = encode_parts(table.swarm, 99)[1]
        assert isinstance(peer.exchange.reserve(puppet.me, describe(1, other, FrameKind.RESULT)), memoryview)


async def deliver(peer: Peer, puppet: Puppet, header: FrameHeader, payload: bytes) -> "weakref.ref[memoryview]":
    """A payload as the links hand it over; a weak reference to the buffer that it came in."""
    buffer = peer.exchange.reserve(puppet.me, header)
    assert isinstance(buffer, memoryview)
    buffer[:] = payload
    await peer.exchange.complete(puppet.me, header, buffer)
    return weakref.ref(buffer)


async def test_what_arrives_when_its_round_has_ended_is_dropped(tmp_path: Path) -> None:
    async with set_table(tmp_path) as table:
        peer, puppet = table.peer, table.puppet
        puppet.show(peer)
        payload = encode_parts(table.swarm, 5)[0]
        header = describe(0, payload)
        buffer = peer.exchange.reserve(puppet.me, header)
        assert isinstance(buffer, memoryview)
        buffer[:] = payload
        held = weakref.ref(buffer)
        head = peer.core.head
        peer.driver.jump(type(head)(round=1, digest=b"d" * 32, state_root=head.state_root, voters=head.voters))
        await peer.exchange.complete(puppet.me, header, buffer)
        del buffer
        gc.collect()
        assert held() is None


# -- refusals, resends -----------------------------------------------------------------------------------------------


async def test_a_refused_part_is_sent_again_and_not_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SEND_RETRY_S", 0.0)
    async with set_table(tmp_path) as table:
        peer, puppet = table.peer, table.puppet
        asked = []
        puppet.sink.answer = Refusal.NOT_A_MEMBER
        reserve = puppet.sink.reserve
        puppet.sink.reserve = lambda who, header: (asked.append(header.part), reserve(who, header))[1]  # type: ignore[method-assign]
        plan = await begin_exchange(table, encode_parts(table.swarm, 5))
        theirs = owned_by(plan, puppet.me)
        await wait_until(lambda: len(asked) == len(theirs) * (RESENDS_MAX + 1))
        # Another refusal follows each of the last ones; were there one more resend, it would be counted below.
        puppet.sink.answer = None
        await puppet.tell(peer, plan)
        assert sorted(asked) == sorted(theirs * (RESENDS_MAX + 1))
        assert puppet.sink.payloads == []


async def test_a_part_that_came_too_early_arrives_with_the_next_try(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SEND_RETRY_S", 0.0)
    async with set_table(tmp_path) as table:
        peer, puppet = table.peer, table.puppet
        puppet.sink.answer = Refusal.NOT_A_MEMBER
        plan = await begin_exchange(table, encode_parts(table.swarm, 5))
        theirs = owned_by(plan, puppet.me)
        await puppet.sink.until(lambda: peer.exchange.encoded_bytes)
        puppet.sink.answer = None
        await puppet.sink.until(lambda: len(puppet.sink.payloads) == len(theirs))
        frozen = peer.exchange.frozen
        assert frozen is not None
        assert {header.part: raw for _, header, raw in puppet.sink.payloads} == {
            part: frozen.encoded[part] for part in theirs
        }


@pytest.mark.parametrize("part", [PARTS, 65_535])
async def test_a_made_up_refusal_sends_nothing_and_breaks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: int
) -> None:
    monkeypatch.setattr(module, "SEND_RETRY_S", 0.0)
    async with set_table(tmp_path) as table:
        peer, puppet = table.peer, table.puppet
        await peer.contribute(1)
        assert peer.exchange.frozen is not None
        for digest in (peer.exchange.frozen.digests[0], bytes(32)):
            header = FrameHeader(
                kind=FrameKind.REFUSED, round=1, part=part, digest=digest, refusal=Refusal.NOT_A_MEMBER
            )
            peer.exchange.refused(puppet.me, header)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert peer.exchange.encoded_bytes == 0
        assert peer.defects == []


async def test_a_link_that_is_not_there_yet_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SEND_RETRY_S", 0.01)
    async with set_table(tmp_path) as table:
        peer, puppet = table.peer, table.puppet
        tries = []

        def address_of(who: bytes) -> tuple[str, int] | None:
            tries.append(who)
            return None if len(tries) < 4 else table.swarm.addresses[puppet.me]

        object.__setattr__(peer.exchange.ports, "address_of", address_of)
        plan = await begin_exchange(table, encode_parts(table.swarm, 5))
        theirs = owned_by(plan, puppet.me)
        await puppet.sink.until(lambda: len(puppet.sink.payloads) == len(theirs))


# -- reducing, fetching, serving -------------------------------------------------------------------------------------


async def test_an_owner_reduces_what_came_and_sends_the_result(tmp_path: Path) -> None:
    async with set_table(tmp_path) as table:
        peer, puppet = table.peer, table.puppet
        parts = encode_parts(table.swarm, 5)
        plan = await begin_exchange(table, parts)
        mine = owned_by(plan, peer.me)
        await puppet.tell(peer, Contribution(round=1, digests=digests_of(parts)))
        for part in mine:
            await puppet.push(peer, describe(part, parts[part]), parts[part])
        results = lambda: [one for one in puppet.sink.payloads if one[1].kind is FrameKind.RESULT]  # noqa: E731
        await puppet.sink.until(lambda: len(results()) == len(mine))
        await wait_until(lambda: len(puppet.heard(PartDone)) == len(mine))
        codec = CODECS[table.swarm.manifest.rounds.codec]
        frozen = peer.exchange.frozen
        assert frozen is not None
        for _, header, raw in results():
            first, end = table.swarm.manifest.part_range(header.part)
            decoded = np.empty((3, end - first), np.float32)
            for row, encoded in zip(decoded, (raw, parts[header.part], frozen.encoded[header.part]), strict=True):
                codec.decode_untrusted(encoded, end - first, row)
            # Equal tokens and steps, so equal weights; the result is rounded once more by the codec.
            step = np.abs(decoded[0]).max() / 100
            assert np.allclose(decoded[0], (decoded[1] + decoded[2]) / 2, atol=float(step))
        assert {done.part: done.digest for done in puppet.heard(PartDone)} == {
            header.part: header.digest for _, header, _ in results()
        }
        assert peer.exchange.fp32_bytes == TINY_ELEMENTS * 4


async def test_what_was_to_be_done_in_a_round_that_is_over_is_dropped(tmp_path: Path) -> None:
    async with set_table(tmp_path) as table:
        peer = table.peer
        plan = await begin_exchange(table, encode_parts(table.swarm, 5))
        frozen = peer.exchange.frozen
        assert frozen is not None
        head = peer.core.head
        peer.driver.jump(type(head)(round=5, digest=b"d" * 32, state_root=head.state_root, voters=head.voters))
        stale = Reduce(
            round=1,
            attempt=0,
            part=0,
            indices=(0, 1),
            members=plan.roster,
            digests=(frozen.digests[0],) * 2,
            norms=(1.0, 1.0),
        )
        peer.exchange.reduce(stale)
        peer.exchange.fetch(FetchBlob(round=1, part=0, digest=b"x" * 32, candidates=(table.puppet.me,)))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert peer.defects == [] and table.puppet.sink.serves == 0


async def test_nobody_votes_for_bytes_that_do_not_decode(tmp_path: Path) -> None:
    """The leader's result has the right digests; what they name would break every replica that applies it."""
    async with set_table(tmp_path) as table:
        peer, puppet = table.peer, table.puppet
        puppet.show(peer)
        parts = encode_parts(table.swarm, 5)
        bad = (spoil(parts[0]), *parts[1:])
        puppet.sink.blobs = {blake3(part).digest(): memoryview(part) for part in bad}
        await puppet.tell(peer, propose(table, bad))
        await wait_until(lambda: puppet.sink.serves == PARTS and peer.tensor_refusals)
        assert peer.tensor_refusals == [(puppet.me, Refusal.NOT_FINITE)]
        await wait_until(lambda: all(peer.exchange.result(digest) for digest in digests_of(parts[1:])))
        assert peer.exchange.result(blake3(bad[0]).digest()) is None
        assert puppet.heard(Vote) == [] and peer.state.load_vote() is None


async def test_a_vote_follows_when_all_bytes_are_fetched_and_durable(tmp_path: Path) -> None:
    async with set_table(tmp_path) as table:
        peer, puppet = table.peer, table.puppet
        puppet.show(peer)
        parts = encode_parts(table.swarm, 5)
        puppet.sink.blobs = {blake3(part).digest(): memoryview(part) for part in parts}
        await puppet.tell(peer, propose(table, parts))
        await wait_until(lambda: puppet.heard(Vote))
        saved = peer.state.load_vote()
        assert saved is not None and saved.accepted == propose(table, parts).result
        assert all(peer.state.stores.blobs.has(digest) for digest in digests_of(parts))


async def test_a_fetch_asks_one_candidate_after_the_other(tmp_path: Path) -> None:
    async with set_table(tmp_path) as table, open_puppet(table.swarm, 4) as second:
        peer, first = table.peer, table.puppet
        part = encode_parts(table.swarm, 5)[1]
        digest = blake3(part).digest()
        second.sink.blobs = {digest: memoryview(part)}
        stranger = PEERS[6]
        for candidates in [(first.me, stranger, second.me), ()]:
            peer.exchange.fetch(FetchBlob(round=1, part=1, digest=digest, candidates=candidates))
        await wait_until(lambda: peer.exchange.result(digest))
        assert bytes(peer.exchange.result(digest) or b"") == part
        assert second.sink.serves == 1


async def test_what_is_on_the_disk_is_not_fetched(tmp_path: Path) -> None:
    async with set_table(tmp_path) as table:
        part = encode_parts(table.swarm, 5)[1]
        digest = blake3(part).digest()
        table.peer.state.stores.blobs.write(digest, part)
        table.peer.exchange.fetch(FetchBlob(round=1, part=1, digest=digest, candidates=(table.puppet.me,)))
        await wait_until(lambda: table.peer.exchange.result(digest))
        assert table.puppet.sink.serves == 0


async def test_serves_results_blobs_and_chunks_and_nothing_that_is_damaged(tmp_path: Path) -> None:
    async with set_table(tmp_path) as table:
        peer = table.peer
        parts = encode_parts(table.swarm, 5)
        blobs = peer.state.stores.blobs
        digest = blake3(parts[0]).digest()
        assert await peer.exchange.serve(table.puppet.me, digest) is None
        blobs.write(digest, parts[0])
        found = await peer.exchange.serve(table.puppet.me, digest)
        assert isinstance(found, memoryview) and bytes(found) == parts[0]
        next((peer.folder / "blobs").glob(f"??/{digest.hex()}")).write_bytes(parts[1])
        assert await peer.exchange.serve(table.puppet.me, digest) is None
        index = peer.state.replica.index()
        peer.state.stores.snapshots.write(index, peer.params, peer.state.replica.momentum)
        chunk = await peer.exchange.serve(table.puppet.me, index.digest(0))
        assert isinstance(chunk, memoryview) and bytes(chunk) == peer.params.tobytes()
