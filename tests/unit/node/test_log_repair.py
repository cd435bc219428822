"""A database that has lost rows of the log before its head: what is missing is fetched again from others."""

import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from dataclasses import replace
from pathlib import Path

import pytest

from shoal.node.log_repair import LogRepair
from shoal.node.repair import open_ledger
from shoal.protocol.errors import Failure, Refusal
from shoal.protocol.messages import (
    CertificatesAnswer,
    CheckpointsAnswer,
    GetCheckpoints,
    decode_message_untrusted,
    digest_record,
    encode_message,
)
from tests.unit.crdt.certificates import certify
from tests.unit.node.catchup_samples import (
    FAR,
    NEWCOMER,
    assert_same_state,
    open_newcomer,
    open_swarm,
    rewrite_answers,
    short_hope,
)
from tests.unit.node.node_samples import (
    LEDGER,
    WIDE_ELEMENTS,
    Chain,
    Peer,
    fill_folder,
    open_state,
)
from tests.unit.protocol.samples import IDENTITIES

__all__ = ["short_hope"]  # a fixture
CUT = 10
PATIENT = NEWCOMER - 1


def damage(path: Path, table: str, rounds: tuple[int, ...]) -> None:
    """Flip a byte in these rows, as a disk does."""
    with closing(sqlite3.connect(path)) as connection, connection:
        for number in rounds:
            (body,) = connection.execute(f"SELECT body FROM {table} WHERE round = ?", (number,)).fetchone()
            spoilt = body[:40] + bytes([body[40] ^ 1]) + body[41:]
            connection.execute(f"UPDATE {table} SET body = ? WHERE round = ?", (spoilt, number))


@asynccontextmanager
async def open_patient(
    folder: Path,
    *,
    certificates: tuple[int, ...] = (),
    checkpoints: tuple[int, ...] = (),
    cut: int = CUT,
    sees: int = 2,
) -> AsyncIterator[tuple[Peer, list[Peer], Chain]]:
    """A peer whose file had these rows damaged and was repaired at its start, and donors whose disks are whole."""
    async with open_swarm(folder, FAR, elements=WIDE_ELEMENTS) as (newcomer, donors, chain):
        swarm, home = newcomer.swarm, folder / str(PATIENT)
        fill_folder(swarm, home, chain)
        state = open_state(swarm, home)
        for each in (state, *(donor.state for donor in donors)):
            each.trail.shorten(cut)
        state.stores.ledger.close()
        damage(home / LEDGER, "certificates", certificates)
        damage(home / LEDGER, "checkpoints", checkpoints)
        store, repair = open_ledger(home / LEDGER, IDENTITIES[PATIENT].peer, swarm.id)
        store.close()
        assert repair is not None and repair.failure is Failure.STORE_DAMAGED
        async with open_newcomer(swarm, folder, donors[:sees], PATIENT) as patient:
            yield patient, donors, chain


def mender(patient: Peer) -> tuple[LogRepair, list[str]]:
    told: list[str] = []
    return LogRepair(patient.state, patient.catch_up.donors, told.append), told


async def ask_trail(peer: Peer) -> int:
    """How many checkpoints it shows."""
    question = encode_message(peer.swarm.id, GetCheckpoints(after_round=0))
    answer = decode_message_untrusted(peer.swarm.id, await peer.answer(peer.me, question))
    assert isinstance(answer, CheckpointsAnswer)
    return len(answer.checkpoints)


async def test_a_damaged_row_of_the_trail_is_fetched_again_and_newcomers_are_led_once_more(tmp_path: Path) -> None:
    async with open_patient(tmp_path, checkpoints=(CUT,)) as (patient, donors, chain):
        assert not patient.state.trail.is_whole
        assert await ask_trail(patient) == 0, "who walked half of a trail would take its donor for a liar"
        repair, told = mender(patient)
        assert await repair.mend()
        assert [text.split(" ")[0] for text in told] == ["store_damaged:", "the"]
        assert await ask_trail(patient) == 1
        assert patient.state.trail.check().digest == chain.heads[CUT].digest
        await patient.providers.refresh()
        async with open_newcomer(patient.swarm, tmp_path, [patient], NEWCOMER - 2) as newcomer:
            await newcomer.catch_up.run(patient.me, FAR)
            assert_same_state(newcomer, donors[0])
        assert not patient.misbehaviours


async def test_damaged_certificates_are_fetched_again(tmp_path: Path) -> None:
    lost = (CUT + 1, CUT + 2, CUT + 5)
    async with open_patient(tmp_path, certificates=lost) as (patient, _, chain):
        assert patient.state.trail.is_whole
        assert patient.state.stores.ledger.list_rounds(0, FAR) == [n for n in range(CUT, FAR) if n not in lost]
        repair, told = mender(patient)
        assert await repair.mend()
        assert "3 certificates" in told[0]
        assert patient.state.load_certificates(CUT, FAR) == chain.certificates[CUT - 1 :]
        assert min(patient.state.holdings.updates) <= CUT + 1, "they count as retained again"
        assert await repair.mend() and len(told) == 2, "nothing is missing"


@pytest.mark.parametrize("lost", [(CUT,), (CUT, CUT + 1)])
async def test_a_trail_that_ends_before_what_is_left_is_followed_to_there(tmp_path: Path, lost: tuple[int]) -> None:
    async with open_patient(tmp_path, certificates=lost, checkpoints=(CUT,)) as (patient, _, chain):
        repair, _ = mender(patient)
        assert await repair.mend()
        assert patient.state.trail.check().digest == chain.heads[CUT].digest
        assert patient.state.load_certificates(CUT, FAR) == chain.certificates[CUT - 1 :]


async def test_a_trail_that_leads_further_than_the_lost_one_serves(tmp_path: Path) -> None:
    async with open_patient(tmp_path, certificates=(CUT, CUT + 1), checkpoints=(CUT,)) as (patient, donors, chain):
        for donor in donors:
            donor.state.trail.shorten(CUT + 4)
        repair, _ = mender(patient)
        assert await repair.mend()
        assert patient.state.trail.check().digest == chain.heads[CUT + 4].digest
        assert patient.state.load_certificates(CUT + 2, FAR) == chain.certificates[CUT + 1 :]
        patient.state.trail.shorten(CUT + 6)
        assert patient.state.stores.ledger.get_first_round() == CUT + 6, "old certificates are dropped again"
        assert patient.state.trail.check().round == CUT + 6


async def test_a_log_from_the_first_round_on_needs_no_trail(tmp_path: Path) -> None:
    async with open_patient(tmp_path, certificates=(1, 2, 9), cut=1) as (patient, _, chain):
        repair, told = mender(patient)
        assert await repair.mend()
        assert told and patient.state.load_certificates(1, FAR) == chain.certificates
        assert patient.state.trail.is_whole


async def test_while_nobody_is_in_sight_it_stays_as_it_is_and_is_told_once(tmp_path: Path) -> None:
    async with open_patient(tmp_path, certificates=(CUT + 3,), checkpoints=(CUT,), sees=0) as (patient, donors, _):
        told, waits = list[str](), list[float]()

        async def meet(seconds: float) -> None:
            waits.append(seconds)
            if len(waits) == 2:
                await patient.connect(donors[0])
                patient.meet(donors[0])

        await LogRepair(patient.state, patient.catch_up.donors, told.append, meet).run()
        assert len(waits) == 2 and len(told) == 2
        assert patient.state.trail.is_whole


async def test_liars_are_charged_and_others_asked(tmp_path: Path) -> None:
    async with open_patient(tmp_path, certificates=(CUT + 3,), checkpoints=(CUT,)) as (patient, donors, chain):

        def cut_votes(message: object) -> object:
            if isinstance(message, CheckpointsAnswer) and message.checkpoints:
                (one,) = message.checkpoints
                few = replace(one.certificate, votes=one.certificate.votes[:1])
                return CheckpointsAnswer(checkpoints=(replace(one, certificate=few),))
            if isinstance(message, CertificatesAnswer):
                few = tuple(replace(one, votes=one.votes[:1]) for one in message.certificates)
                return CertificatesAnswer(certificates=few)
            return message

        liar = patient.catch_up.donors.of_round(0)[0]
        rewrite_answers(next(donor for donor in donors if donor.me == liar), cut_votes)
        repair, _ = mender(patient)
        assert await repair.mend()
        assert patient.misbehaviours == [(liar, Refusal.NO_QUORUM)] * 2
        assert patient.state.load_certificates(CUT, FAR) == chain.certificates[CUT - 1 :]


async def test_a_round_that_does_not_lead_to_the_own_log_is_not_taken(tmp_path: Path) -> None:
    lost = CUT + 3
    async with open_patient(tmp_path, certificates=(lost,)) as (patient, donors, chain):
        own = chain.certificates[lost - 1].result
        other = certify(patient.swarm.id, replace(own, members=(), parts=()), IDENTITIES[: len(own.voters)])
        assert digest_record(other.result) != digest_record(own)
        for donor in donors:
            rewrite_answers(
                donor,
                lambda message: (
                    CertificatesAnswer(certificates=(other,)) if isinstance(message, CertificatesAnswer) else message
                ),
            )
        repair, _ = mender(patient)
        assert not await repair.mend()
        assert lost not in patient.state.stores.ledger.list_rounds(0, FAR)
