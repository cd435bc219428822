"""Catch-up from donors that lie: nothing is believed, the liar is charged, and the next one is asked."""

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3

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
)
from shoal.protocol.wire import encode_record
from tests.unit.node.catchup_samples import (
    CHUNKS,
    FAR,
    SNAPSHOT,
    assert_same_state,
    assert_untouched,
    corrupt,
    open_swarm,
    rewrite_answers,
    serve_instead,
    short_hope,
)
from tests.unit.node.node_samples import (
    PATIENCE_S,
    TINY_ELEMENTS,
    WIDE_ELEMENTS,
    Peer,
    index_of,
    make_chain,
)
from tests.unit.protocol.samples import IDENTITIES, make_sample_result, make_vote

__all__ = ["short_hope"]  # a fixture


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
        async with asyncio.timeout(PATIENCE_S):
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


def sign_by_others(certificate: Certificate, swarm: bytes) -> Certificate:
    votes = tuple(make_vote(liar, certificate.result, swarm=swarm) for liar in IDENTITIES[3:5])
    return replace(certificate, votes=votes)


def forge_answers(donor: Peer, forge: Callable[[Certificate], Certificate]) -> None:
    def change(message: object) -> object:
        if not isinstance(message, CertificatesAnswer):
            return message
        return replace(message, certificates=tuple(forge(one) for one in message.certificates))

    rewrite_answers(donor, change)


FORGERIES = [flip_vote, drop_votes, repeat_vote, change_result, change_base]
ROUNDS = pytest.mark.parametrize("rounds", [4, FAR], ids=["replay", "snapshot"])


@pytest.mark.parametrize("forge", FORGERIES, ids=lambda forge: forge.__name__)
@ROUNDS
async def test_a_forged_certificate_is_never_believed(
    tmp_path: Path, forge: Callable[[Certificate], Certificate], rounds: int
) -> None:
    async with open_swarm(tmp_path, rounds, donors=1) as (newcomer, donors, chain):
        forge_answers(donors[0], forge)
        async with asyncio.timeout(PATIENCE_S):
            await newcomer.catch_up.run(donors[0].me, rounds)
        assert_untouched(newcomer, chain)
        assert [peer for peer, _ in newcomer.misbehaviours] or newcomer.other_logs == [donors[0].me]


@pytest.mark.parametrize("forge", [flip_vote, change_result], ids=lambda forge: forge.__name__)
@ROUNDS
async def test_whoever_forges_certificates_is_charged_and_the_next_one_is_asked(
    tmp_path: Path, forge: Callable[[Certificate], Certificate], rounds: int
) -> None:
    async with open_swarm(tmp_path, rounds) as (newcomer, donors, _):
        forge_answers(donors[0], forge)
        async with asyncio.timeout(PATIENCE_S):
            await newcomer.catch_up.run(donors[0].me, rounds)
        assert_same_state(newcomer, donors[1])
        assert {peer for peer, _ in newcomer.misbehaviours} == {donors[0].me}


@ROUNDS
async def test_a_chain_that_others_than_the_voters_signed_is_never_believed(tmp_path: Path, rounds: int) -> None:
    async with open_swarm(tmp_path, rounds, donors=1) as (newcomer, donors, chain):
        forge_answers(donors[0], lambda one: sign_by_others(one, newcomer.swarm.id))
        async with asyncio.timeout(PATIENCE_S):
            await newcomer.catch_up.run(donors[0].me, rounds)
        assert_untouched(newcomer, chain)
        assert newcomer.misbehaviours == [(donors[0].me, Refusal.NOT_A_MEMBER)]


@ROUNDS
@pytest.mark.parametrize("skip", [1, 2])
async def test_a_chain_with_a_hole_is_not_followed(tmp_path: Path, rounds: int, skip: int) -> None:
    async with open_swarm(tmp_path, rounds, donors=1) as (newcomer, donors, chain):

        def cut(message: object) -> object:
            if not isinstance(message, CertificatesAnswer):
                return message
            return replace(message, certificates=message.certificates[skip:])

        rewrite_answers(donors[0], cut)
        async with asyncio.timeout(PATIENCE_S):
            await newcomer.catch_up.run(donors[0].me, rounds)
        assert_untouched(newcomer, chain)


async def test_a_donor_on_another_log_is_told_of_and_not_accused(tmp_path: Path) -> None:
    async with open_swarm(tmp_path, 4) as (newcomer, donors, _):
        other = make_chain(newcomer.swarm, 4, seed=1).certificates
        rewrite_answers(
            donors[0],
            lambda one: move_off(replace(one, certificates=other)) if isinstance(one, CertificatesAnswer) else one,
        )
        await newcomer.catch_up.run(donors[0].me, 4)
        assert_same_state(newcomer, donors[1])
        assert newcomer.misbehaviours == [] and newcomer.other_logs == [donors[0].me]


def move_off(message: CertificatesAnswer) -> CertificatesAnswer:
    """Certificates of a log that began with another genesis."""
    first, *rest = message.certificates
    return replace(message, certificates=(replace(first, result=replace(first.result, previous=b"o" * 32)), *rest))


async def test_a_voter_set_of_the_liars_own_choice_does_not_carry_a_chain(tmp_path: Path) -> None:
    """The first certificate names the liars as voters; they have signed all of it, and everything after it."""
    async with open_swarm(tmp_path, FAR, donors=1) as (newcomer, donors, chain):
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
        async with asyncio.timeout(PATIENCE_S):
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
        lie = SnapshotAnswer(index=encode_record(index))

        async def serve(peer: PeerId, digest: bytes) -> memoryview | Refusal | None:
            asked[digest] += 1
            return chunks[digest].data if digest in chunks else None

        for donor in donors:
            donor.exchange.serve = serve  # type: ignore[method-assign]
            rewrite_answers(donor, lambda one: lie if isinstance(one, SnapshotAnswer) else one)
        async with asyncio.timeout(PATIENCE_S):
            await newcomer.catch_up.run(donors[0].me, FAR)
        assert_untouched(newcomer, chain)
        assert not chunks.keys() & asked.keys(), "an index is checked before a byte of it is fetched"
        refused = {(donor.me, Refusal.WRONG_BASE) for donor in donors}
        assert set(newcomer.misbehaviours) == refused, "it may have been on another log: no lie"


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
        async with asyncio.timeout(PATIENCE_S):
            await newcomer.catch_up.run(donors[0].me, FAR)
        assert_same_state(newcomer, donors[1])
        assert newcomer.state.stores.snapshots.rounds() == [SNAPSHOT]
        assert {peer for peer, _ in newcomer.misbehaviours} == {donors[0].me}


async def test_donors_that_refuse_or_cannot_be_asked_end_the_catch_up(tmp_path: Path) -> None:
    async with open_swarm(tmp_path, 3, donors=1) as (newcomer, donors, chain):

        async def refuse(peer: PeerId, raw: bytes) -> bytes:
            raise ProtocolError(Refusal.NOT_READY, "by the test")

        donors[0].answer = refuse
        await newcomer.catch_up.run(donors[0].me, 3)
        assert_untouched(newcomer, chain)
        await newcomer.catch_up.run(IDENTITIES[5].peer, 3)
        assert_untouched(newcomer, chain)
        donors[0].answer = donors[0].answers.answer
        rewrite_answers(donors[0], lambda one: PeersAnswer(presences=()))
        await newcomer.catch_up.run(donors[0].me, 3)
        assert_untouched(newcomer, chain)
        assert newcomer.donor_failures[IDENTITIES[5].peer] == 1


async def test_a_liar_that_answers_with_nothing_ends_the_catch_up(tmp_path: Path) -> None:
    async with open_swarm(tmp_path, FAR, donors=1) as (newcomer, donors, chain):
        empty = CertificatesAnswer(certificates=())
        rewrite_answers(donors[0], lambda one: empty if isinstance(one, CertificatesAnswer) else one)
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
            GetCertificates(first_round=1, count=CERTIFICATES_PER_ANSWER),
            GetSnapshot(round_max=FAR - 1),
            GetCertificates(first_round=17, count=SNAPSHOT + 1 - CERTIFICATES_PER_ANSWER),
            GetCertificates(first_round=SNAPSHOT + 2, count=FAR - SNAPSHOT - 1),
        ]
