"""What a disk keeps for others is read after the start: damage is named and replaced, whether it is needed or not."""

from pathlib import Path

import pytest

from shoal.node.disk_check import RETRY_S, DiskCheck
from shoal.node.ledger_store import StoreError
from shoal.protocol.errors import Failure, Refusal
from tests.unit.node.catchup_samples import (
    FAR,
    SNAPSHOT,
    corrupt,
    open_swarm,
    serve_instead,
    short_hope,
)
from tests.unit.node.node_samples import WIDE_ELEMENTS, Chain, Peer

__all__ = ["short_hope"]  # a fixture
ROUNDS = 5


def blob_file(peer: Peer, digest: bytes) -> Path:
    return peer.state.stores.blobs._path(digest)


def flip(path: Path, at: int = 100) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


def spoil(peer: Peer, chain: Chain) -> list[bytes]:
    """A flipped byte in one part, and another one gone."""
    first, last = (chain.certificates[number - 1].result.parts for number in (1, ROUNDS))
    flip(blob_file(peer, first[0].digest))
    blob_file(peer, last[1].digest).unlink()
    return [first[0].digest, last[1].digest]


def checker(peer: Peer, told: list[str], pauses: list[float]) -> DiskCheck:
    async def pause(seconds: float) -> None:
        pauses.append(seconds)

    return DiskCheck(peer.state, peer.links, peer.catch_up.donors, told.append, pause)


async def test_damaged_and_missing_updates_are_named_and_fetched_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_swarm(tmp_path, ROUNDS) as (patient, donors, chain):
        await patient.catch_up.run(donors[0].me, ROUNDS)
        lost, told, pauses = spoil(patient, chain), list[str](), list[float]()
        await checker(patient, told, pauses).run()
        assert all(patient.state.stores.blobs.read(digest) == chain.blobs[digest] for digest in lost)
        assert [text.split(" ")[:2] for text in told] == [["2", "damaged"], ["2", "lost"]]
        assert f"{blob_file(patient, lost[0])} is damaged and was removed" in caplog.text
        assert len(pauses) == len(chain.blobs) and RETRY_S not in pauses, "it is read at a bounded rate"
        told.clear()
        await checker(patient, told, pauses).run()
        assert told == []


async def test_what_nobody_has_is_asked_for_again(tmp_path: Path) -> None:
    async with open_swarm(tmp_path, ROUNDS) as (patient, donors, chain):
        await patient.catch_up.run(donors[0].me, ROUNDS)
        hidden = {donor: spoil(donor, chain) for donor in donors}
        lost, told, waits = spoil(patient, chain), list[str](), 0

        async def pause(seconds: float) -> None:
            nonlocal waits
            if seconds == RETRY_S:
                waits += 1
                for digest in hidden[donors[1]]:
                    donors[1].state.stores.blobs.write(digest, chain.blobs[digest])

        await DiskCheck(patient.state, patient.links, patient.catch_up.donors, told.append, pause).run()
        assert waits == 1 and len(told) == 2
        assert all(patient.state.stores.blobs.read(digest) == chain.blobs[digest] for digest in lost)


async def test_a_donor_that_sends_other_bytes_is_not_believed(tmp_path: Path) -> None:
    async with open_swarm(tmp_path, ROUNDS) as (patient, donors, chain):
        await patient.catch_up.run(donors[0].me, ROUNDS)
        lost, told = spoil(patient, chain), list[str]()
        serve_instead(donors[0], corrupt)
        await checker(patient, told, []).run()
        assert all(patient.state.stores.blobs.read(digest) == chain.blobs[digest] for digest in lost)
        assert {refusal for _, refusal in patient.tensor_refusals} <= {Refusal.WRONG_DIGEST}


async def test_rounds_that_are_retained_no_more_are_left_alone(tmp_path: Path) -> None:
    async with open_swarm(tmp_path, ROUNDS) as (patient, donors, chain):
        await patient.catch_up.run(donors[0].me, ROUNDS)
        spoil(patient, chain)
        check = checker(patient, [], [])
        lost = await check._find_lost()
        assert {piece.round for piece in lost} == {1, ROUNDS}
        for number in (1, ROUNDS):
            del patient.state._updates[number]
        assert await check.fetch(lost) == []
        assert not any(patient.state.stores.blobs.has(piece.digest) for piece in lost)


async def test_a_snapshot_that_is_spoilt_is_named_and_removed(tmp_path: Path) -> None:
    async with open_swarm(tmp_path, FAR, donors=1, elements=WIDE_ELEMENTS) as (_, (donor,), _):
        told: list[str] = []
        await checker(donor, told, []).run()
        assert told == [] and donor.state.stores.snapshots.rounds() == [SNAPSHOT]
        snapshot = donor.state.stores.snapshots.get(SNAPSHOT)
        assert snapshot is not None
        flip(snapshot.path, snapshot.data_start + 4)
        await checker(donor, told, []).run()
        assert told == [f"the snapshot of round {SNAPSHOT} is damaged and is removed"]
        assert donor.state.stores.snapshots.rounds() == []


async def test_a_disk_that_fails_ends_the_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_swarm(tmp_path, ROUNDS) as (patient, donors, _):
        await patient.catch_up.run(donors[0].me, ROUNDS)

        def fail(digest: bytes) -> bytes:
            raise StoreError(tmp_path, Failure.STORE_UNUSABLE, "the disk fails", "mend it")

        monkeypatch.setattr(patient.state.stores.blobs, "read", fail)
        told: list[str] = []
        await checker(patient, told, []).run()
        assert told == []
