"""Transfers over made-up links: who is asked, what counts as here, what ends the transfer."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
from blake3 import blake3

from shoal.node import fetch
from shoal.node.fetch import Source, Transfer, TransferPorts
from shoal.node.link_port import Address, FetchFailed, FetchFailure, LinkEnd, LinkLost, LinkStatistics
from shoal.protocol.errors import Failure, ProtocolError, Refusal
from shoal.protocol.fetch_plan import Piece
from shoal.protocol.identity import PeerId
from tests.unit.node.node_samples import PATIENCE_S
from tests.unit.protocol.samples import PEERS

A, B, C = PEERS[:3]
BLOBS = [bytes([number]) * 5000 for number in range(20)]
PIECES = [Piece(digest=blake3(raw).digest(), nbytes=len(raw), round=number) for number, raw in enumerate(BLOBS)]
BY_DIGEST = dict(zip((piece.digest for piece in PIECES), BLOBS, strict=True))
DIGESTS = [piece.digest for piece in PIECES]

Serve = Callable[[bytes], Awaitable[bytes]]


async def give(digest: bytes) -> bytes:
    return BY_DIGEST[digest]


class Links:
    """Donors that serve as the test says."""

    def __init__(self, **donors: Serve) -> None:
        self.donors = {{"a": A, "b": B, "c": C}[name]: serve for name, serve in donors.items()}
        self.asked: Counter[tuple[PeerId, bytes]] = Counter()

    async def fetch(
        self, peer: PeerId, addresses: Sequence[Address], digest: bytes, into: memoryview, timeout_s: float
    ) -> None:
        self.asked[peer, digest] += 1
        into[:] = await self.donors[peer](digest)

    def statistics(self) -> LinkStatistics:
        return LinkStatistics(links=0, paths={}, half_open=0, dials=0, peers=())


class Sink:
    """What a transfer brings, and what it tells of donors."""

    def __init__(self, links: Links) -> None:
        self.links = links
        self.sources = [Source(peer=peer) for peer in links.donors]
        self.taken: dict[bytes, bytes] = {}
        self.failed: Counter[PeerId] = Counter()
        self.liars: set[PeerId] = set()

    async def take(self, piece: Piece, raw: memoryview) -> None:
        assert piece.digest not in self.taken, "once"
        self.taken[piece.digest] = bytes(raw)

    def note_failure(self, peer: PeerId, reason: Failure) -> None:
        assert reason is Failure.DONOR_FAILED
        self.failed[peer] += 1

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Transfer]:
        ports = TransferPorts(
            sources=lambda: self.sources,
            addresses_of=lambda peer: (("127.0.0.1", 1),),
            take=lambda piece, raw: self.take(piece, raw),
            failed=self.note_failure,
            lied=self.liars.add,
        )
        before = asyncio.all_tasks()
        async with asyncio.timeout(PATIENCE_S):
            async with Transfer(self.links, ports) as transfer:  # type: ignore[arg-type]
                yield transfer
            assert asyncio.all_tasks() == before, "nothing goes on"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "HOPE_S", 0.05)
    monkeypatch.setattr(fetch, "LOOK_S", 0.02)


def fail_with(error: Exception) -> Serve:
    async def serve(digest: bytes) -> bytes:
        raise error

    return serve


async def never(digest: bytes) -> bytes:
    await asyncio.Event().wait()
    return b""


async def test_everything_comes_once_from_whoever_has_it() -> None:
    sink = Sink(Links(a=give, b=give))
    async with sink.open() as transfer:
        transfer.add(PIECES)
        assert await transfer.wait(DIGESTS)
        assert transfer.fetched_bytes == sum(piece.nbytes for piece in PIECES)
    assert sink.taken == BY_DIGEST
    assert {peer for peer, _ in sink.links.asked} == {A, B}


async def test_what_is_held_is_not_asked_for() -> None:
    sink = Sink(Links(a=give))
    async with sink.open() as transfer:
        transfer.note_held(DIGESTS[0])
        transfer.add(PIECES)
        assert await transfer.wait(DIGESTS)
    assert sink.taken.keys() == set(DIGESTS[1:])


async def test_pieces_may_be_added_and_awaited_one_after_the_other() -> None:
    sink = Sink(Links(a=give))
    async with sink.open() as transfer:
        for piece in PIECES:
            transfer.add([piece])
            assert await transfer.wait([piece.digest])


@pytest.mark.parametrize(
    ("error", "is_lie", "is_told"),
    [
        (FetchFailed(A, FetchFailure.MISSING), False, False),
        (FetchFailed(A, FetchFailure.WRONG_DIGEST), True, True),
        (LinkLost(A, LinkEnd.MISBEHAVED, Refusal.WRONG_DIGEST), True, True),
        (LinkLost(A, LinkEnd.CLOSED_BY_PEER), False, True),
        (FetchFailed(A, FetchFailure.TIMEOUT), False, True),
        (LinkLost(A, LinkEnd.NO_ADDRESS), False, True),
    ],
    ids=lambda value: str(value),
)
async def test_a_donor_that_fails_is_replaced_by_another(error: Exception, is_lie: bool, is_told: bool) -> None:
    sink = Sink(Links(a=fail_with(error), b=give))
    async with sink.open() as transfer:
        transfer.add(PIECES)
        assert await transfer.wait(DIGESTS)
    assert sink.taken == BY_DIGEST
    assert sink.liars == ({A} if is_lie else set())
    assert bool(sink.failed[A]) is is_told and not sink.failed[B]


async def test_a_piece_that_nobody_has_is_told() -> None:
    async def lack(digest: bytes) -> bytes:
        if digest == DIGESTS[3]:
            raise FetchFailed(A, FetchFailure.MISSING)
        return BY_DIGEST[digest]

    sink = Sink(Links(a=lack, b=lack))
    async with sink.open() as transfer:
        transfer.add(PIECES)
        assert not await transfer.wait(DIGESTS)
        assert await transfer.wait([DIGESTS[4]])
    assert sink.taken.keys() == BY_DIGEST.keys() - {DIGESTS[3]}


async def test_without_donors_a_transfer_ends() -> None:
    sink = Sink(Links())
    async with sink.open() as transfer:
        transfer.add(PIECES)
        assert not await transfer.wait(DIGESTS)


async def test_a_donor_that_comes_later_is_asked() -> None:
    sink = Sink(Links(a=never, b=give))
    late = sink.sources.pop()
    async with sink.open() as transfer:
        transfer.add(PIECES)
        waiting = asyncio.create_task(transfer.wait(DIGESTS[-1:]))
        await asyncio.sleep(0)
        sink.sources.append(late)
        transfer.look_again()
        assert await waiting
    assert sink.taken[DIGESTS[-1]] == BLOBS[-1]


async def test_a_donor_that_goes_and_comes_back_is_asked_again() -> None:
    sink = Sink(Links(a=give))
    source = sink.sources.pop()
    async with sink.open() as transfer:
        transfer.add(PIECES)
        assert not await transfer.wait(DIGESTS)
        sink.sources.append(source)
        transfer.look_again()
        while not await transfer.wait(DIGESTS):
            await asyncio.sleep(0)
    assert sink.taken == BY_DIGEST


async def test_a_piece_that_cannot_be_stored_ends_the_transfer() -> None:
    sink = Sink(Links(a=give))

    async def refuse(piece: Piece, raw: memoryview) -> None:
        raise ProtocolError(Refusal.NOT_FINITE, "by the test")

    sink.take = refuse  # type: ignore[method-assign]
    async with sink.open() as transfer:
        transfer.add(PIECES)
        with pytest.raises(ProtocolError, match="by the test"):
            await transfer.wait(DIGESTS)


async def test_a_slow_disk_holds_up_the_donors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "OPEN_BYTES_MAX", 3 * PIECES[0].nbytes)
    sink, free = Sink(Links(a=give)), asyncio.Event()
    honest = sink.take

    async def take(piece: Piece, raw: memoryview) -> None:
        await free.wait()
        await honest(piece, raw)

    sink.take = take  # type: ignore[method-assign]
    async with sink.open() as transfer:
        transfer.add(PIECES)
        waiting = asyncio.create_task(transfer.wait(DIGESTS))
        while not sink.links.asked.total():
            await asyncio.sleep(0)
        for _ in range(200):
            await asyncio.sleep(0)
        assert sink.links.asked.total() <= 4 and not sink.taken
        free.set()
        assert await waiting
    assert sink.taken == BY_DIGEST


async def test_leaving_ends_what_is_under_way() -> None:
    sink = Sink(Links(a=never))
    async with sink.open() as transfer:
        transfer.add(PIECES)
        while not sink.links.asked:
            await asyncio.sleep(0)
    assert sink.taken == {}


async def test_a_transfer_whose_own_task_fails_does_not_wait_for_ever() -> None:
    sink = Sink(Links(a=give))

    def fail() -> list[Source]:
        raise LookupError("a defect")

    async with sink.open() as transfer:
        sink.sources = []
        transfer._ports = replace(transfer._ports, sources=fail)
        transfer.look_again()
        with pytest.raises(LookupError, match="a defect"):
            await transfer.wait(DIGESTS)
