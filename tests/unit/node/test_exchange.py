"""The data plane of a round: what may arrive, what becomes of it, and where missing bytes come from."""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3

from shoal.node import exchange
from shoal.node.exchange import RESULTS_PER_PART_MAX
from shoal.node.link_port import LinkEnd, LinkLost
from shoal.protocol.codecs import CODECS
from shoal.protocol.effects import FetchBlob, SendPart
from shoal.protocol.errors import ProtocolError, Refusal
from shoal.protocol.frames import FrameHeader, FrameKind
from shoal.protocol.identity import PeerId, short_peer_id
from shoal.protocol.messages import Certified, Proposal
from shoal.protocol.round_state import RESENDS_MAX
from tests.unit.node.exposition import count_refused
from tests.unit.node.node_samples import Chain, Peer, Swarm, make_chain, make_samples, open_peer, open_peers, wait_until
from tests.unit.node.puppet import Puppet, open_puppet


@asynccontextmanager
async def open_target(folder: Path, swarm: Swarm | None = None) -> AsyncIterator[tuple[Peer, Puppet]]:
    swarm = make_samples() if swarm is None else swarm
    async with open_peer(swarm, 0, folder, trains=True) as peer, open_puppet(swarm, 1, peer) as puppet:
        puppet.show(peer)
        yield peer, puppet


def make_frame(peer: Peer, kind: FrameKind = FrameKind.CONTRIBUTION, **changes: object) -> tuple[FrameHeader, bytes]:
    """A frame whose bytes decode, unless `payload` says otherwise."""
    part, parts = changes.get("part", 0), len(peer.swarm.manifest.list_parts(1))
    nbytes = peer.exchange.part_bytes(kind, 1, part if isinstance(part, int) and part < parts else 0)
    payload = changes.pop("payload", bytes(nbytes))
    assert isinstance(payload, bytes)
    header = FrameHeader(kind=kind, round=1, part=0, nbytes=len(payload), digest=blake3(payload).digest())
    return replace(header, **changes), payload  # type: ignore[arg-type]


# -- what may arrive -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "refusal"),
    [
        ({"part": 3}, Refusal.OUT_OF_RANGE),
        ({"payload": b"short"}, Refusal.WRONG_LENGTH),
        ({"part": 2}, Refusal.WRONG_LENGTH),  # the last part is a shorter one
    ],
    ids=["part", "length", "length of another part"],
)
async def test_a_frame_that_the_manifest_does_not_know_ends_the_link(
    tmp_path: Path, changes: dict[str, object], refusal: Refusal
) -> None:
    async with open_target(tmp_path) as (peer, puppet):
        header, payload = make_frame(peer, FrameKind.CONTRIBUTION, **changes)
        if changes == {"part": 2}:
            payload = bytes(peer.exchange.part_bytes(FrameKind.CONTRIBUTION, 1, 0))
            header = replace(header, nbytes=len(payload), digest=blake3(payload).digest())
        await puppet.push(peer, header, payload)
        await wait_until(lambda: peer.tensor_refusals)
        assert peer.tensor_refusals == [(puppet.me, refusal)]
        assert not peer.links.is_linked(puppet.me)


async def test_a_round_of_a_fragment_has_its_own_parts_and_lengths(tmp_path: Path) -> None:
    swarm = make_samples(fragments=2)  # of three parts: round 1 exchanges the first and the short last one
    async with open_target(tmp_path, swarm) as (peer, puppet):
        sizes = [peer.exchange.part_bytes(FrameKind.CONTRIBUTION, 1, place) for place in (0, 1)]
        assert sizes[1] < sizes[0] == peer.exchange.part_bytes(FrameKind.CONTRIBUTION, 2, 0)
        for part, nbytes in enumerate(sizes):
            header, payload = make_frame(peer, part=part, payload=bytes(nbytes))
            await puppet.push(peer, header, payload)
            await wait_until(
                lambda part=part, digest=header.digest: (
                    peer.core.check_part(puppet.me, 1, part, digest) is Refusal.DUPLICATE
                )
            )
        header, payload = make_frame(peer, part=2, payload=bytes(sizes[1]))
        await puppet.push(peer, header, payload)
        await wait_until(lambda: peer.tensor_refusals)
        assert peer.tensor_refusals == [(puppet.me, Refusal.OUT_OF_RANGE)]


async def test_contributions_and_results_have_the_lengths_and_limits_of_their_own_codecs(tmp_path: Path) -> None:
    swarm = make_samples(codec="fp16", update_codec="fp32")
    async with open_target(tmp_path, swarm) as (peer, puppet):
        _, end = swarm.manifest.part_range(0)
        for kind, other, nbytes in (
            (FrameKind.CONTRIBUTION, FrameKind.RESULT, 2 * end),
            (FrameKind.RESULT, FrameKind.CONTRIBUTION, 4 * end),
        ):
            header, _ = make_frame(peer, kind)
            assert header.nbytes == nbytes
            with pytest.raises(ProtocolError) as caught:
                peer.exchange.reserve(puppet.me, replace(header, kind=other))
            assert caught.value.refusal is Refusal.WRONG_LENGTH
        # Too large for an fp32; two fp16 of the same bits are -13,904 and 10,824.
        large = np.full(end, 1e30, np.float32).view(np.uint8)
        contribution, result = (make_frame(peer, kind)[0] for kind in (FrameKind.CONTRIBUTION, FrameKind.RESULT))
        with pytest.raises(ProtocolError) as caught:
            await peer.exchange.complete(puppet.me, result, memoryview(large))
        assert caught.value.refusal is Refusal.OUT_OF_RANGE
        await peer.exchange.complete(puppet.me, contribution, memoryview(large[: contribution.nbytes]))


@pytest.mark.parametrize(("codec", "update_codec"), [("fp16", "fp32"), ("stat2", "bf16"), ("topk2", "int8")])
async def test_a_round_is_contributed_in_one_codec_and_certified_in_another(
    tmp_path: Path, codec: str, update_codec: str
) -> None:
    swarm = make_samples(9000, codec=codec, update_codec=update_codec, part_elements=4096)
    manifest = swarm.manifest
    async with open_peers(tmp_path, 2, swarm) as (ann, bob):
        frozen = await ann.contribute(1)
        await bob.contribute(2)
        await wait_until(lambda: ann.commits and bob.commits)
        assert ann.state.head == bob.state.head
        (certificate,) = ann.state.load_certificates(1, 1)
        assert certificate.result.codec == update_codec
        for part, one in enumerate(certificate.result.parts):
            first, end = manifest.part_range(part)
            raw = ann.state.stores.blobs.read(one.digest)
            assert raw is not None
            CODECS[update_codec].check_untrusted(raw, end - first)
            CODECS[codec].check_untrusted(frozen.encoded[part], end - first)


async def test_bytes_that_do_not_decode_are_not_received(tmp_path: Path) -> None:
    async with open_target(tmp_path) as (peer, puppet):
        payload = np.full(peer.exchange.part_bytes(FrameKind.CONTRIBUTION, 1, 0) // 4, np.nan, np.float32).tobytes()
        payload += bytes(peer.exchange.part_bytes(FrameKind.CONTRIBUTION, 1, 0) - len(payload))
        header, payload = make_frame(peer, payload=payload)
        await puppet.push(peer, header, payload)
        await wait_until(lambda: peer.tensor_refusals)
        assert peer.tensor_refusals == [(puppet.me, Refusal.NOT_FINITE)]
        assert peer.core.check_part(puppet.me, 1, 0, header.digest) is None, "it may be sent again, as it should be"


async def test_a_part_that_arrives_for_a_round_that_has_ended_is_dropped_and_counted(tmp_path: Path) -> None:
    swarm = make_samples()
    chain = make_chain(swarm, 1)
    async with open_peer(swarm, 0, tmp_path, trains=True) as peer, open_puppet(swarm, 1, peer) as puppet:
        puppet.show(peer)
        header, payload = make_frame(peer)
        place = peer.exchange.reserve(puppet.me, header)
        assert isinstance(place, memoryview)
        # The round ends while the bytes are on their way.
        for digest, raw in chain.blobs.items():
            peer.state.stores.blobs.write(digest, raw)
        await puppet.tell(peer, Certified(certificate=chain.certificates[0]))
        await wait_until(lambda: peer.core.round == 2)
        place[:] = payload
        await peer.exchange.complete(puppet.me, header, place)
        assert peer.dropped == [(puppet.me, Refusal.WRONG_ROUND)]
        assert count_refused(peer, "wrong_round", "tensor") == 1
        assert peer.exchange._parts == {}, "nothing of a finished round stays"
        # And what comes now is refused before a byte of it is read.
        assert peer.exchange.reserve(puppet.me, header) is Refusal.WRONG_ROUND


async def test_results_that_a_member_may_push_are_bounded(tmp_path: Path) -> None:
    async with open_peers(tmp_path, 2) as (ann, bob):
        await ann.contribute(1)
        await bob.contribute(2)
        await wait_until(lambda: ann.commits and bob.commits)
        await ann.contribute(3)
        owner = bob.me
        ann.core.check_result_part = lambda *_: None  # type: ignore[method-assign]
        for number in range(RESULTS_PER_PART_MAX):
            header, payload = make_frame(ann, FrameKind.RESULT, round=2, payload=scaled(ann, number))
            place = ann.exchange.reserve(owner, header)
            assert isinstance(place, memoryview)
            place[:] = payload
            await ann.exchange.complete(owner, header, place)
        header, _ = make_frame(ann, FrameKind.RESULT, round=2, payload=scaled(ann, RESULTS_PER_PART_MAX))
        assert ann.exchange.reserve(owner, header) is Refusal.LIMIT
        assert ann.exchange.reserve(owner, make_frame(ann, FrameKind.RESULT, round=2, payload=scaled(ann, 0))[0]) is (
            Refusal.DUPLICATE
        )


def scaled(peer: Peer, number: int) -> bytes:
    """A result of part 0 that differs from others and decodes."""
    raw = bytearray(peer.exchange.part_bytes(FrameKind.RESULT, 1, 0))
    raw[-1] = number
    return bytes(raw)


async def test_a_stranger_pushes_no_results(tmp_path: Path) -> None:
    async with open_target(tmp_path) as (peer, puppet):
        header, payload = make_frame(peer, FrameKind.RESULT)
        await puppet.push(peer, header, payload)
        await wait_until(lambda: peer.dropped)
        assert peer.dropped == [(puppet.me, Refusal.NOT_PLANNED)]
        assert peer.exchange.result(header.digest) is None


# -- what is sent ----------------------------------------------------------------------------------------------------


async def test_a_part_that_was_refused_because_it_came_too_early_is_sent_again_so_often(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange, "SEND_RETRY_S", 0.0)
    async with open_target(tmp_path) as (peer, puppet):
        frozen = await peer.contribute(1)
        puppet.sink.answer = Refusal.NOT_A_MEMBER
        effect = SendPart(peer=puppet.me, round=1, part=0, digest=frozen.digests[0])
        refused = 0
        told = peer.exchange.refused

        def count(sender: PeerId, header: FrameHeader) -> None:
            nonlocal refused
            refused += 1
            told(sender, header)

        monkeypatch.setattr(peer.exchange, "refused", count)
        peer.exchange.send_part(effect)
        await wait_until(lambda: refused == 1 + RESENDS_MAX)
        await asyncio.sleep(0)
        assert peer.exchange._resends[puppet.me, 0] == RESENDS_MAX
        puppet.sink.answer = None
        peer.exchange.send_part(effect)
        await puppet.sink.until(lambda: puppet.sink.payloads)
        assert puppet.sink.payloads[0][2] == bytes(frozen.encoded[0])


@pytest.mark.parametrize(
    "change",
    [
        lambda header: replace(header, digest=b"x" * 32),
        lambda header: replace(header, round=2),
        lambda header: replace(header, part=2),
        lambda header: replace(header, refusal=Refusal.DUPLICATE),
    ],
    ids=["digest", "round", "part", "final"],
)
async def test_a_refusal_of_what_was_not_sent_sends_nothing(
    tmp_path: Path, change: Callable[[FrameHeader], FrameHeader], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange, "SEND_RETRY_S", 0.0)
    async with open_target(tmp_path) as (peer, puppet):
        frozen = await peer.contribute(1)
        header = FrameHeader(
            kind=FrameKind.REFUSED, round=1, part=0, digest=frozen.digests[0], refusal=Refusal.WRONG_ROUND
        )
        peer.exchange.refused(puppet.me, change(header))
        assert not peer.exchange._resends
        assert peer.exchange.encoded_bytes == 0


async def test_pushing_ends_with_the_round_and_with_too_many_failures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange, "SEND_RETRY_S", 0.0)
    async with open_target(tmp_path) as (peer, puppet):
        frozen = await peer.contribute(1)
        tries: list[FrameHeader] = []

        async def fail(to: PeerId, address: object, header: FrameHeader, payload: memoryview) -> None:
            tries.append(header)
            raise LinkLost(to, LinkEnd.UNREACHABLE)

        monkeypatch.setattr(peer.links, "send", fail)
        peer.exchange.send_part(SendPart(peer=puppet.me, round=1, part=0, digest=frozen.digests[0]))
        await wait_until(lambda: len(tries) == exchange.SEND_TRIES)
        header = replace(tries[0], round=9)
        await peer.exchange._push(puppet.me, header, memoryview(frozen.encoded[0]))
        assert len(tries) == exchange.SEND_TRIES, "round 9 is not the open one"


async def test_a_contribution_that_was_replaced_is_not_sent(tmp_path: Path) -> None:
    async with open_target(tmp_path) as (peer, puppet):
        await peer.contribute(1)
        peer.exchange.send_part(SendPart(peer=puppet.me, round=1, part=0, digest=b"old" + bytes(29)))
        peer.exchange.send_part(SendPart(peer=puppet.me, round=2, part=0, digest=b"new" + bytes(29)))
        assert peer.exchange.encoded_bytes == 0


# -- what is fetched -------------------------------------------------------------------------------------------------


@asynccontextmanager
async def open_fetcher(folder: Path) -> AsyncIterator[tuple[Peer, Puppet, Puppet, Chain]]:
    """A peer without the bytes of round 1, and two candidates that may have them."""
    swarm = make_samples(founders=3)
    chain = make_chain(swarm, 1)
    async with (
        open_peer(swarm, 0, folder) as peer,
        open_puppet(swarm, 1, peer) as one,
        open_puppet(swarm, 2, peer) as other,
    ):
        for puppet in (one, other):
            puppet.sink.blobs |= {digest: memoryview(raw) for digest, raw in chain.blobs.items()}
        yield peer, one, other, chain


def make_fetch(chain: Chain, part: int, *candidates: Puppet) -> FetchBlob:
    digest = chain.certificates[0].result.parts[part].digest
    return FetchBlob(round=1, part=part, digest=digest, candidates=tuple(one.me for one in candidates))


async def test_bytes_that_are_on_the_disk_are_fetched_from_nobody(tmp_path: Path) -> None:
    async with open_fetcher(tmp_path) as (peer, one, other, chain):
        fetch = make_fetch(chain, 0, one, other)
        peer.state.stores.blobs.write(fetch.digest, chain.blobs[fetch.digest])
        peer.exchange.fetch(fetch)
        await wait_until(lambda: peer.exchange.result(fetch.digest) is not None)
        assert one.sink.serves == other.sink.serves == 0


async def test_from_a_dying_donor_one_turns_to_the_next(tmp_path: Path) -> None:
    async with open_fetcher(tmp_path) as (peer, one, other, chain):
        fetch = make_fetch(chain, 0, one, other)
        one.sink.serving = asyncio.Event()  # it never answers
        peer.exchange.fetch(fetch)
        await one.sink.until(lambda: one.sink.serves)
        await one.links.stop()
        await wait_until(lambda: peer.exchange.result(fetch.digest) is not None)
        assert other.sink.serves == 1
        assert bytes(peer.exchange.result(fetch.digest) or b"") == chain.blobs[fetch.digest]


async def test_a_donor_that_is_silent_costs_one_time_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "FETCH_TIMEOUT_S", 0.1)
    async with open_fetcher(tmp_path) as (peer, one, other, chain):
        fetch = make_fetch(chain, 0, one, other)
        one.sink.serving = asyncio.Event()
        peer.exchange.fetch(fetch)
        await wait_until(lambda: peer.exchange.result(fetch.digest) is not None)
        assert (one.sink.serves, other.sink.serves) == (1, 1)


@pytest.mark.parametrize("lie", ["missing", "refused", "other bytes"])
async def test_a_donor_that_does_not_give_is_passed_over(tmp_path: Path, lie: str) -> None:
    async with open_fetcher(tmp_path) as (peer, one, other, chain):
        fetch = make_fetch(chain, 0, one, other)
        raw = chain.blobs[fetch.digest]
        if lie == "missing":
            one.sink.blobs.clear()
        else:
            one.sink.blobs[fetch.digest] = Refusal.LIMIT if lie == "refused" else memoryview(bytes(len(raw)))
        peer.exchange.fetch(fetch)
        await wait_until(lambda: peer.exchange.result(fetch.digest) is not None)
        assert other.sink.serves == 1
        accused = [(one.me, Refusal.WRONG_DIGEST)] if lie == "other bytes" else []
        assert peer.tensor_refusals == accused


async def test_candidates_are_asked_in_turns_so_that_all_of_them_give(tmp_path: Path) -> None:
    async with open_fetcher(tmp_path) as (peer, one, other, chain):
        for part in range(2):
            peer.exchange.fetch(make_fetch(chain, part, one, other))
        await wait_until(lambda: len(peer.exchange._results) == 2)
        assert one.sink.serves == other.sink.serves == 1


async def test_what_nobody_has_is_asked_for_again_when_the_core_says_so(tmp_path: Path) -> None:
    async with open_fetcher(tmp_path) as (peer, one, other, chain):
        for puppet in (one, other):
            puppet.sink.blobs.clear()
        fetch = make_fetch(chain, 0, one, other)
        peer.exchange.fetch(fetch)
        await wait_until(lambda: one.sink.serves == other.sink.serves == 1)
        one.sink.blobs[fetch.digest] = memoryview(chain.blobs[fetch.digest])
        peer.exchange.fetch(fetch)
        await wait_until(lambda: peer.exchange.result(fetch.digest) is not None)


async def test_a_donor_that_gives_nothing_is_told_once_a_round(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def told(level: int) -> list[PeerId]:
        """Which donors were named at this level, message by message."""
        texts = [one.getMessage() for one in caplog.records if one.levelno == level]
        return [one.me for text in texts for one in (first, second) if f"donor_failed: {short_peer_id(one.me)}" in text]

    async with open_fetcher(tmp_path) as (peer, first, second, chain):
        both = [first.me, second.me]
        for puppet in (first, second):
            puppet.sink.blobs.clear()
        with caplog.at_level(logging.DEBUG, logger="shoal.node.exchange"):
            for part in range(3):
                peer.exchange.fetch(make_fetch(chain, part, first, second))
            await wait_until(lambda: len(told(logging.INFO) + told(logging.DEBUG)) == 6)
            assert Counter(told(logging.INFO)) == dict.fromkeys(both, 1)
            assert Counter(told(logging.DEBUG)) == dict.fromkeys(both, 2)
            peer.exchange.finish_round()
            peer.exchange.fetch(make_fetch(chain, 0, first, second))
            await wait_until(lambda: Counter(told(logging.INFO)) == dict.fromkeys(both, 2))


async def test_bytes_that_were_certified_and_do_not_decode_are_not_held(tmp_path: Path) -> None:
    async with open_fetcher(tmp_path) as (peer, one, other, _):
        raw = b"\xff" * peer.exchange.part_bytes(FrameKind.RESULT, 1, 0)
        digest = blake3(raw).digest()
        for puppet in (one, other):
            puppet.sink.blobs[digest] = memoryview(raw)
        peer.exchange.fetch(FetchBlob(round=1, part=0, digest=digest, candidates=(one.me, other.me)))
        await wait_until(lambda: peer.tensor_refusals)
        assert peer.exchange.result(digest) is None, "nobody votes for what a replica cannot apply"


# -- what is served and stored ---------------------------------------------------------------------------------------


async def test_served_are_results_blobs_and_chunks_and_nothing_else(tmp_path: Path) -> None:
    swarm = make_samples()
    chain = make_chain(swarm, 2, (2,))
    async with open_peer(swarm, 0, tmp_path) as peer:
        params, momentum = chain.states[2]
        index = chain.index(2)
        peer.state.stores.snapshots.write(index, params, momentum)
        digest, raw = next(iter(chain.blobs.items()))
        peer.state.stores.blobs.write(digest, raw)
        served = await peer.exchange.serve(peer.me, digest)
        assert isinstance(served, memoryview) and bytes(served) == raw
        chunk = await peer.exchange.serve(peer.me, index.digests[:32])
        assert isinstance(chunk, memoryview) and blake3(chunk).digest() == index.digests[:32]
        assert await peer.exchange.serve(peer.me, b"x" * 32) is None


async def test_results_are_durable_when_storing_them_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    swarm = make_samples()
    chain = make_chain(swarm, 1)
    async with open_peer(swarm, 0, tmp_path) as peer:
        digests = tuple(chain.blobs)
        for digest, raw in chain.blobs.items():
            peer.exchange._results[digest] = memoryview(raw)
        synced: list[tuple[bytes, ...]] = []
        sync = peer.state.stores.blobs.sync

        def watch(wanted: tuple[bytes, ...]) -> None:
            assert all(peer.state.stores.blobs.read(one) == chain.blobs[one] for one in wanted)
            synced.append(wanted)
            sync(wanted)

        monkeypatch.setattr(peer.state.stores.blobs, "sync", watch)
        peer.exchange.store_results(digests)
        assert synced == [digests]

        def fail(digest: bytes, raw: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(peer.state.stores.blobs, "write", fail)
        with pytest.raises(OSError, match="No space"):
            peer.exchange.store_results(digests)


async def test_nothing_of_a_finished_round_is_kept_in_memory(tmp_path: Path) -> None:
    async with open_peers(tmp_path, 2) as (ann, bob):
        await ann.contribute(1)
        await bob.contribute(2)
        await wait_until(lambda: ann.commits and bob.commits)
        for peer in (ann, bob):
            left = (peer.exchange._parts, peer.exchange._results, peer.exchange._pushed, peer.exchange._resends)
            assert not any(left) and peer.exchange.frozen is None
            assert peer.exchange.encoded_bytes > 0


async def test_a_proposal_without_its_bytes_is_fetched_before_it_is_voted_for(tmp_path: Path) -> None:
    swarm = make_samples(founders=2)
    chain = make_chain(swarm, 1)
    async with open_peer(swarm, 0, tmp_path) as peer, open_puppet(swarm, 1, peer) as puppet:
        puppet.show(peer)
        await puppet.tell(peer, Proposal(attempt=0, result=chain.certificates[0].result))
        await puppet.tell(peer, Certified(certificate=chain.certificates[0]))
        puppet.sink.blobs |= {digest: memoryview(raw) for digest, raw in chain.blobs.items()}
        await wait_until(lambda: peer.commits)
        assert puppet.sink.serves == len(chain.blobs)
        assert peer.commits[0] == chain.heads[1]


async def test_reserving_for_a_peer_that_broke_the_rules_is_refused_by_raising(tmp_path: Path) -> None:
    async with open_target(tmp_path) as (peer, puppet):
        with pytest.raises(ProtocolError) as caught:
            peer.exchange.reserve(puppet.me, make_frame(peer, part=99)[0])
        assert caught.value.refusal is Refusal.OUT_OF_RANGE
        assert peer.dropped == [], "that is no lateness"
