"""Catch-up over real tensor links: replay, snapshots from several donors, donors that lie or die, interruptions."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3

from shoal.node.catchup import CHUNKS_AT_ONCE, REPLAY_ROUNDS_MAX
from shoal.protocol.errors import ProtocolError, Refusal
from shoal.protocol.identity import PeerId
from shoal.protocol.messages import (
    CERTIFICATES_PER_ANSWER,
    Certificate,
    CertificatesAnswer,
    GetCertificates,
    GetPeers,
    GetSnapshot,
    PeersAnswer,
    SnapshotAnswer,
    decode_message_untrusted,
    digest_record,
    encode_message,
)
from shoal.protocol.wire import encode_record
from tests.unit.node.node_samples import (
    TINY_ELEMENTS,
    WIDE_ELEMENTS,
    Chain,
    Peer,
    Swarm,
    fill_folder,
    index_of,
    make_chain,
    make_samples,
    open_peer,
    wait_until,
)
from tests.unit.protocol.samples import IDENTITIES, make_sample_result, make_vote

NEWCOMER = 7  # no voter
SNAPSHOT = 25
FAR = 27  # more than REPLAY_ROUNDS_MAX behind for whoever stands at 0
CHUNKS = 6

Change = Callable[[object], object]


@asynccontextmanager
async def open_swarm(
    folder: Path, rounds: int, *, donors: int = 2, elements: int = TINY_ELEMENTS
) -> AsyncIterator[tuple[Peer, list[Peer], Chain]]:
    """A newcomer at round 0 that knows `donors` peers at the end of a chain; those at FAR have a snapshot."""
    swarm = make_samples(elements)
    chain = make_chain(swarm, rounds, (SNAPSHOT,) if rounds == FAR else ())
    async with AsyncExitStack() as stack:
        filled = []
        for number in range(donors):
            fill_folder(swarm, folder / str(number), chain)
            filled.append(await stack.enter_async_context(open_peer(swarm, number, folder)))
        newcomer = await stack.enter_async_context(open_newcomer(swarm, folder, filled))
        yield newcomer, filled, chain


@asynccontextmanager
async def open_newcomer(swarm: Swarm, folder: Path, donors: list[Peer]) -> AsyncIterator[Peer]:
    """A peer that is connected to the donors and has heard them."""
    async with open_peer(swarm, NEWCOMER, folder) as newcomer:
        for donor in donors:
            await newcomer.connect(donor)
            newcomer.meet(donor)
        yield newcomer


def rewrite_answers(donor: Peer, change: Change) -> None:
    """Let `change` replace what this donor answers."""
    honest = donor.answer

    async def answer(peer: PeerId, raw: bytes) -> bytes:
        message = decode_message_untrusted(donor.swarm.id, await honest(peer, raw))
        return encode_message(donor.swarm.id, change(message))

    donor.answer = answer


def serve_instead(donor: Peer, change: Callable[[memoryview], memoryview | None]) -> None:
    """Let `change` replace the blobs and chunks that this donor serves."""
    honest = donor.exchange.serve

    async def serve(peer: PeerId, digest: bytes) -> memoryview | Refusal | None:
        found = await honest(peer, digest)
        assert isinstance(found, memoryview)
        return change(found)

    donor.exchange.serve = serve  # type: ignore[method-assign]


def corrupt(raw: memoryview) -> memoryview:
    return memoryview(bytes([raw[0] ^ 1]) + bytes(raw[1:]))


def assert_same_state(newcomer: Peer, donor: Peer) -> None:
    """All that makes two replicas one state, and that the round core goes on from there."""
    assert newcomer.state.head == donor.state.head == newcomer.core.head
    assert newcomer.state.replica.root() == donor.state.replica.root() == donor.state.head.state_root
    assert np.array_equal(newcomer.params, donor.params)
    assert not newcomer.catch_up.active and newcomer.catch_up.detail == ""


def assert_untouched(newcomer: Peer, chain: Chain) -> None:
    """Nothing of what the donors said was believed, and the next attempt is free to begin."""
    assert newcomer.state.head == chain.heads[0] == newcomer.core.head
    assert newcomer.state.replica.root() == chain.heads[0].state_root
    assert newcomer.state.load_certificates(1, FAR) == ()
    assert not newcomer.catch_up.active


# -- replay ----------------------------------------------------------------------------------------------------------


async def test_missed_rounds_are_replayed_with_parts_from_both_donors(tmp_path: Path) -> None:
    async with open_swarm(tmp_path, 5) as (newcomer, donors, chain):
        await newcomer.catch_up.run(donors[0].me, 5)
        assert_same_state(newcomer, donors[1])
        assert newcomer.state.load_certificates(1, 9) == chain.certificates
        assert all(donor.served for donor in donors)
        served = donors[0].served + donors[1].served
        assert set(served) == set(chain.blobs) and set(served.values()) == {1}
        assert newcomer.core.round == 6


async def test_more_rounds_than_one_answer_holds_are_replayed(tmp_path: Path) -> None:
    rounds = CERTIFICATES_PER_ANSWER + 2
    async with open_swarm(tmp_path, rounds, donors=1) as (newcomer, donors, _):
        await newcomer.catch_up.run(donors[0].me, rounds)
        assert_same_state(newcomer, donors[0])


async def test_replay_goes_as_far_as_the_donor_leads(tmp_path: Path) -> None:
    async with open_swarm(tmp_path, 3, donors=1) as (newcomer, donors, _):
        await newcomer.catch_up.run(donors[0].me, REPLAY_ROUNDS_MAX)
        assert_same_state(newcomer, donors[0])


async def test_a_donor_that_dies_between_two_parts_costs_nothing(tmp_path: Path) -> None:
    async with open_swarm(tmp_path, 6) as (newcomer, donors, _):
        dying = donors[0]
        honest = dying.exchange.serve

        async def serve(peer: PeerId, digest: bytes) -> memoryview | Refusal | None:
            if newcomer.core.head.round >= 2:
                dying.spawn(dying.links.stop())
                return None
            return await honest(peer, digest)

        dying.exchange.serve = serve  # type: ignore[method-assign]
        await newcomer.catch_up.run(donors[1].me, 6)
        assert_same_state(newcomer, donors[1])


async def test_a_donor_whose_control_connection_ends_is_followed_by_another(tmp_path: Path) -> None:
    async with open_swarm(tmp_path, CERTIFICATES_PER_ANSWER + 4) as (newcomer, donors, _):
        dying = donors[0]

        def stop_after_the_first(message: object) -> object:
            dying.spawn(dying.control.stop())
            return message

        rewrite_answers(dying, stop_after_the_first)
        await newcomer.catch_up.run(dying.me, CERTIFICATES_PER_ANSWER + 4)
        assert newcomer.core.head.round == CERTIFICATES_PER_ANSWER
        assert not newcomer.catch_up.active
        await newcomer.catch_up.run(donors[1].me, CERTIFICATES_PER_ANSWER + 4)
        assert_same_state(newcomer, donors[1])


async def test_only_one_catch_up_runs_at_a_time(tmp_path: Path) -> None:
    async with open_swarm(tmp_path, 3, donors=1) as (newcomer, donors, _):
        asked = Counter[str]()
        rewrite_answers(donors[0], lambda message: (asked.update([type(message).__name__]), message)[1])
        await asyncio.gather(*(newcomer.catch_up.run(donors[0].me, 3) for _ in range(3)))
        assert asked["CertificatesAnswer"] == 1
        assert_same_state(newcomer, donors[0])


# -- by snapshot -----------------------------------------------------------------------------------------------------


async def test_far_behind_takes_a_snapshot_from_several_donors_and_replays_the_rest(tmp_path: Path) -> None:
    async with open_swarm(tmp_path, FAR, donors=3, elements=WIDE_ELEMENTS) as (
        newcomer,
        donors,
        chain,
    ):
        index = chain.index(SNAPSHOT)
        assert index.chunks == CHUNKS
        await newcomer.catch_up.run(donors[0].me, FAR)
        assert_same_state(newcomer, donors[2])
        assert newcomer.state.head == chain.heads[FAR]
        chunks = {index.digest(number) for number in range(CHUNKS)}
        served = sum((donor.served for donor in donors), Counter[bytes]())
        assert {digest: count for digest, count in served.items() if digest in chunks} == dict.fromkeys(chunks, 1)
        assert all(chunks & set(donor.served) for donor in donors)
        replayed = {part.digest for one in chain.certificates[SNAPSHOT:] for part in one.result.parts}
        assert set(served) == chunks | replayed
        assert newcomer.state.stores.snapshots.rounds() == [SNAPSHOT]
        assert [one.result.round for one in newcomer.state.load_certificates(1, 99)] == list(range(1, FAR + 1))
        assert list((newcomer.folder / "catchup").iterdir()) == []


async def test_what_a_snapshot_brought_survives_a_restart(tmp_path: Path) -> None:
    async with open_swarm(tmp_path, FAR) as (newcomer, donors, chain):
        await newcomer.catch_up.run(donors[0].me, FAR)
        swarm = newcomer.swarm
        await newcomer.stop()
        async with open_peer(swarm, NEWCOMER, tmp_path) as again:
            assert again.state.head == chain.heads[FAR]
            assert np.array_equal(again.params, donors[0].params)


async def test_without_a_snapshot_a_long_log_is_replayed(tmp_path: Path) -> None:
    async with open_swarm(tmp_path, REPLAY_ROUNDS_MAX + 2, donors=1) as (newcomer, donors, _):
        await newcomer.catch_up.run(donors[0].me, REPLAY_ROUNDS_MAX + 2)
        assert_same_state(newcomer, donors[0])
        # The own snapshots along the way are those of any other peer.
        assert newcomer.state.stores.snapshots.rounds() != []


async def test_a_donor_that_dies_in_the_middle_of_a_snapshot_costs_a_retry(tmp_path: Path) -> None:
    async with open_swarm(tmp_path, FAR, elements=WIDE_ELEMENTS) as (newcomer, donors, chain):
        dying = donors[0]
        honest = dying.exchange.serve
        count = 0

        async def serve(peer: PeerId, digest: bytes) -> memoryview | Refusal | None:
            nonlocal count
            count += 1
            if count == 2:
                dying.spawn(dying.links.stop())
            return await honest(peer, digest) if count == 1 else None

        dying.exchange.serve = serve  # type: ignore[method-assign]
        await newcomer.catch_up.run(donors[1].me, FAR)
        assert_same_state(newcomer, donors[1])
        index = chain.index(SNAPSHOT)
        assert sum(donors[1].served[index.digest(number)] for number in range(CHUNKS)) >= CHUNKS - 1


async def test_an_interrupted_snapshot_goes_on_from_the_chunks_that_are_there(tmp_path: Path) -> None:
    async with open_swarm(tmp_path, FAR, donors=1, elements=WIDE_ELEMENTS) as (
        newcomer,
        donors,
        chain,
    ):
        index = chain.index(SNAPSHOT)
        chunks = [index.digest(number) for number in range(CHUNKS)]
        held_back = set(chunks[-2:])
        honest = donors[0].exchange.serve
        asked = Counter[bytes]()

        async def serve(peer: PeerId, digest: bytes) -> memoryview | Refusal | None:
            asked[digest] += 1
            if digest in held_back:
                await asyncio.Event().wait()
            return await honest(peer, digest)

        donors[0].exchange.serve = serve  # type: ignore[method-assign]
        running = asyncio.create_task(newcomer.catch_up.run(donors[0].me, FAR))
        await wait_until(lambda: f"chunk {CHUNKS - 2} of {CHUNKS}" in newcomer.catch_up.detail)
        await wait_until(lambda: all(asked[digest] for digest in held_back))
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running
        assert_untouched(newcomer, chain)
        await newcomer.stop()

        held_back.clear()
        asked.clear()
        async with open_newcomer(donors[0].swarm, tmp_path, donors) as again:
            await again.catch_up.run(donors[0].me, FAR)
            assert_same_state(again, donors[0])
        assert {digest: asked[digest] for digest in chunks} == {digest: int(digest in chunks[-2:]) for digest in chunks}


async def test_a_chunk_that_the_disk_has_spoilt_is_fetched_again(tmp_path: Path) -> None:
    async with open_swarm(tmp_path, FAR, donors=1, elements=WIDE_ELEMENTS) as (
        newcomer,
        donors,
        chain,
    ):
        index = chain.index(SNAPSHOT)
        partial = newcomer.folder / "catchup" / f"{SNAPSHOT:08d}.{index.root.hex()[:16]}.partial"
        partial.parent.mkdir()
        whole = np.concatenate(chain.states[SNAPSHOT])
        whole[index.span(1).start // 4] += 1.0
        partial.write_bytes(whole.tobytes())
        await newcomer.catch_up.run(donors[0].me, FAR)
        assert_same_state(newcomer, donors[0])
        chunks = [index.digest(number) for number in range(CHUNKS)]
        assert [donors[0].served[digest] for digest in chunks] == [0, 1, 0, 0, 0, 0]


async def test_one_partial_file_is_kept_at_a_time(tmp_path: Path) -> None:
    async with open_swarm(tmp_path, FAR, donors=1) as (newcomer, donors, chain):
        folder = newcomer.folder / "catchup"
        folder.mkdir()
        for number in (8, 16):
            (folder / f"{number:08d}.{'0' * 16}.partial").write_bytes(b"of a snapshot that nobody has any more")
        serve_instead(donors[0], lambda raw: None)
        await newcomer.catch_up.run(donors[0].me, FAR)
        assert [path.name[:8] for path in folder.iterdir()] == [f"{SNAPSHOT:08d}"]
        assert_untouched(newcomer, chain)


async def test_a_disk_that_fails_ends_the_catch_up_and_it_may_begin_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_swarm(tmp_path, FAR, donors=1) as (newcomer, donors, chain):
        obstacle = newcomer.folder / "catchup"
        obstacle.write_bytes(b"a file where a folder should be")
        await newcomer.catch_up.run(donors[0].me, FAR)
        assert "the disk fails" in caplog.text
        assert_untouched(newcomer, chain)
        obstacle.unlink()
        await newcomer.catch_up.run(donors[0].me, FAR)
        assert_same_state(newcomer, donors[0])


# -- donors that lie -------------------------------------------------------------------------------------------------


async def test_wrong_chunk_bytes_cost_the_liar_its_link_and_nobody_else_anything(tmp_path: Path) -> None:
    async with open_swarm(tmp_path, FAR, elements=WIDE_ELEMENTS) as (newcomer, donors, chain):
        liar, honest = donors
        serve_instead(liar, corrupt)
        await newcomer.catch_up.run(liar.me, FAR)
        assert_same_state(newcomer, honest)
        assert (liar.me, Refusal.WRONG_DIGEST) in newcomer.tensor_refusals
        assert {peer for peer, _ in newcomer.tensor_refusals} == {liar.me}
        index = chain.index(SNAPSHOT)
        assert all(honest.served[index.digest(number)] == 1 for number in range(CHUNKS))


async def test_when_all_donors_lie_about_chunks_nothing_is_believed_and_an_honest_one_helps(tmp_path: Path) -> None:
    async with open_swarm(tmp_path, FAR) as (newcomer, donors, chain):
        for donor in donors:
            serve_instead(donor, corrupt)
        async with asyncio.timeout(10.0):
            await newcomer.catch_up.run(donors[0].me, FAR)
        assert_untouched(newcomer, chain)
        del donors[1].exchange.serve  # the honest method of the class shows again
        await newcomer.catch_up.run(donors[1].me, FAR)
        assert_same_state(newcomer, donors[1])


def flip_vote(certificate: Certificate) -> Certificate:
    signature = bytes([certificate.votes[0].signature[0] ^ 1]) + certificate.votes[0].signature[1:]
    return replace(certificate, votes=(replace(certificate.votes[0], signature=signature), *certificate.votes[1:]))


def drop_votes(certificate: Certificate) -> Certificate:
    return replace(certificate, votes=certificate.votes[:1])


def repeat_vote(certificate: Certificate) -> Certificate:
    return replace(certificate, votes=(certificate.votes[0],) * 2)


def change_result(certificate: Certificate) -> Certificate:
    parts = tuple(replace(part, digest=blake3(part.digest).digest()) for part in certificate.result.parts)
    return replace(certificate, result=replace(certificate.result, parts=parts))


def change_base(certificate: Certificate) -> Certificate:
    return replace(certificate, result=replace(certificate.result, base_root=bytes(32)))


FORGERIES = [flip_vote, drop_votes, repeat_vote, change_result, change_base]


@pytest.mark.parametrize("forge", FORGERIES, ids=lambda forge: forge.__name__)
@pytest.mark.parametrize("rounds", [4, FAR], ids=["replay", "snapshot"])
async def test_a_forged_certificate_is_never_believed(
    tmp_path: Path, forge: Callable[[Certificate], Certificate], rounds: int
) -> None:
    async with open_swarm(tmp_path, rounds) as (newcomer, donors, chain):

        def forge_all(message: object) -> object:
            if not isinstance(message, CertificatesAnswer):
                return message
            return replace(message, certificates=tuple(forge(one) for one in message.certificates))

        rewrite_answers(donors[0], forge_all)
        async with asyncio.timeout(10.0):
            await newcomer.catch_up.run(donors[0].me, rounds)
        assert_untouched(newcomer, chain)
        await newcomer.catch_up.run(donors[1].me, rounds)
        assert_same_state(newcomer, donors[1])


@pytest.mark.parametrize("rounds", [4, FAR], ids=["replay", "snapshot"])
async def test_a_chain_that_others_than_the_voters_signed_is_never_believed(tmp_path: Path, rounds: int) -> None:
    async with open_swarm(tmp_path, rounds) as (newcomer, donors, chain):
        liars = IDENTITIES[3:5]

        def sign_anew(message: object) -> object:
            if not isinstance(message, CertificatesAnswer):
                return message
            swarm = newcomer.swarm.id
            certificates = []
            for one in message.certificates:
                votes = tuple(make_vote(liar, one.result, swarm=swarm) for liar in liars)
                certificates.append(replace(one, votes=votes))
            return replace(message, certificates=tuple(certificates))

        rewrite_answers(donors[0], sign_anew)
        async with asyncio.timeout(10.0):
            await newcomer.catch_up.run(donors[0].me, rounds)
        assert_untouched(newcomer, chain)


@pytest.mark.parametrize("rounds", [4, FAR], ids=["replay", "snapshot"])
@pytest.mark.parametrize("skip", [1, 2])
async def test_a_chain_with_a_hole_is_not_followed(tmp_path: Path, rounds: int, skip: int) -> None:
    async with open_swarm(tmp_path, rounds) as (newcomer, donors, chain):

        def cut(message: object) -> object:
            if not isinstance(message, CertificatesAnswer):
                return message
            return replace(message, certificates=message.certificates[skip:])

        rewrite_answers(donors[0], cut)
        async with asyncio.timeout(10.0):
            await newcomer.catch_up.run(donors[0].me, rounds)
        assert_untouched(newcomer, chain)


async def test_a_voter_set_of_the_liars_own_choice_does_not_carry_a_chain(tmp_path: Path) -> None:
    """The first certificate names the liars as voters; they have signed all of it, and everything after it."""
    async with open_swarm(tmp_path, FAR) as (newcomer, donors, chain):
        liars, swarm = IDENTITIES[3:5], newcomer.swarm.id
        head, made = chain.heads[0], []
        for number in range(1, SNAPSHOT + 2):
            result = replace(make_sample_result(head, members=5), voters=tuple(one.peer for one in liars))
            votes = tuple(make_vote(liar, result, swarm=swarm) for liar in liars)
            made.append(Certificate(result=result, attempt=0, votes=votes))
            root = chain.heads[number].state_root
            head = replace(head, round=number, digest=digest_record(result), state_root=root, voters=result.voters)

        def answer(message: object) -> object:
            if isinstance(message, CertificatesAnswer) and message.certificates:
                first = message.certificates[0].result.round
                return replace(message, certificates=tuple(made[first - 1 :][: len(message.certificates)]))
            return message

        rewrite_answers(donors[0], answer)
        async with asyncio.timeout(10.0):
            await newcomer.catch_up.run(donors[0].me, FAR)
        assert_untouched(newcomer, chain)


async def test_a_snapshot_whose_index_is_not_the_certified_one_is_refused(tmp_path: Path) -> None:
    """The liars' index is whole and they serve its chunks: only the certificate after it says that it is another."""
    async with open_swarm(tmp_path, FAR) as (newcomer, donors, chain):
        params, momentum = (vector.copy() for vector in chain.states[SNAPSHOT])
        params[0] += 1.0
        index = index_of(SNAPSHOT, params, momentum)
        chunks = {index.digest(0): params, index.digest(1): momentum}
        asked = Counter[bytes]()

        async def serve(peer: PeerId, digest: bytes) -> memoryview | Refusal | None:
            asked[digest] += 1
            return memoryview(chunks[digest]) if digest in chunks else None

        for donor in donors:
            donor.exchange.serve = serve  # type: ignore[method-assign]
        raw = encode_record(index)
        rewrite_answers(donors[0], lambda one: SnapshotAnswer(index=raw) if isinstance(one, SnapshotAnswer) else one)
        async with asyncio.timeout(10.0):
            await newcomer.catch_up.run(donors[0].me, FAR)
        assert_untouched(newcomer, chain)
        assert not asked, "an index is checked before a byte of it is fetched"


@pytest.mark.parametrize("fault", ["of another size", "rubbish", "of a round that nobody certified", "no answer to it"])
async def test_a_bad_index_costs_a_retry(tmp_path: Path, fault: str) -> None:
    async with open_swarm(tmp_path, FAR) as (newcomer, donors, chain):
        index = chain.index(SNAPSHOT)
        vectors = np.zeros(TINY_ELEMENTS + 1, np.float32)
        lies: dict[str, object] = {
            "of another size": SnapshotAnswer(index=encode_record(index_of(SNAPSHOT, vectors, vectors))),
            "rubbish": SnapshotAnswer(index=b"rubbish"),
            "of a round that nobody certified": SnapshotAnswer(index=encode_record(replace(index, round=2**40))),
            "no answer to it": PeersAnswer(presences=()),
        }
        rewrite_answers(donors[0], lambda one: lies[fault] if isinstance(one, SnapshotAnswer) else one)
        async with asyncio.timeout(10.0):
            await newcomer.catch_up.run(donors[0].me, FAR)
        assert_untouched(newcomer, chain)
        await newcomer.catch_up.run(donors[1].me, FAR)
        assert_same_state(newcomer, donors[1])


async def test_a_donor_that_refuses_or_cannot_be_asked_costs_a_retry(tmp_path: Path) -> None:
    async with open_swarm(tmp_path, 3) as (newcomer, donors, chain):

        async def refuse(peer: PeerId, raw: bytes) -> bytes:
            raise ProtocolError(Refusal.NOT_READY, "by the test")

        donors[0].answer = refuse
        await newcomer.catch_up.run(donors[0].me, 3)
        assert_untouched(newcomer, chain)
        await newcomer.catch_up.run(IDENTITIES[5].peer, 3)
        assert_untouched(newcomer, chain)
        rewrite_answers(donors[1], lambda one: PeersAnswer(presences=()))
        await newcomer.catch_up.run(donors[1].me, 3)
        assert_untouched(newcomer, chain)


async def test_a_liar_that_answers_with_nothing_ends_the_catch_up(tmp_path: Path) -> None:
    async with open_swarm(tmp_path, FAR) as (newcomer, donors, chain):
        empty = {CertificatesAnswer: CertificatesAnswer(certificates=())}
        rewrite_answers(donors[0], lambda one: empty.get(type(one), one))  # type: ignore[call-overload]
        await newcomer.catch_up.run(donors[0].me, FAR)
        assert_untouched(newcomer, chain)


async def test_what_is_asked_for_is_within_the_schema(tmp_path: Path) -> None:
    async with open_swarm(tmp_path, FAR, donors=1) as (newcomer, donors, _):
        honest, questions = donors[0].answer, list[object]()

        async def answer(peer: PeerId, raw: bytes) -> bytes:
            questions.append(decode_message_untrusted(newcomer.swarm.id, raw))
            return await honest(peer, raw)

        donors[0].answer = answer
        await newcomer.catch_up.run(donors[0].me, FAR)
        assert [question for question in questions if not isinstance(question, GetPeers)] == [
            GetSnapshot(round_max=FAR - 1),
            GetCertificates(first_round=1, count=CERTIFICATES_PER_ANSWER),
            GetCertificates(first_round=17, count=SNAPSHOT + 1 - CERTIFICATES_PER_ANSWER),
            GetCertificates(first_round=SNAPSHOT + 1, count=CERTIFICATES_PER_ANSWER),
        ]
        assert CHUNKS_AT_ONCE >= 2
