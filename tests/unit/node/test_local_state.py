"""The state on a real disk: whatever is killed when, a restart stands where the certified log says."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from shoal.node.blobs import BlobStore
from shoal.node.ledger_store import LedgerStore
from shoal.node.local_state import LocalState, Stores
from shoal.node.snapshots import SnapshotStore
from shoal.protocol.effects import VoteRecord
from shoal.protocol.manifest import genesis_head
from shoal.protocol.messages import PARTS_MAX, Certificate, digest_record
from shoal.protocol.quorum import Head
from shoal.protocol.replica import Replica
from tests.unit.protocol.samples import (
    ELEMENTS,
    PARTS,
    RULES,
    certify,
    make_sample_manifest,
    make_sample_result,
    make_update,
)

MANIFEST = make_sample_manifest()  # a snapshot every 4 rounds, updates of 8 rounds are kept
SWARM = digest_record(MANIFEST)
ROUNDS = 17
EMPTY_ROUND = 6


class Log:
    """A swarm's history, computed once: certificates, bytes, and what the state is after each round."""

    def __init__(self) -> None:
        self.blobs: dict[bytes, bytes] = {}
        self.certificates: dict[int, Certificate] = {}
        replica = Replica(MANIFEST, np.zeros(ELEMENTS, np.float32), np.zeros(ELEMENTS, np.float32))
        self.heads = [genesis_head(MANIFEST, SWARM, replica.reset())]
        self.states = [replica.params.tobytes() + replica.momentum.tobytes()]
        for number in range(1, ROUNDS + 1):
            certificate, encoded = make_update(MANIFEST, self.heads[-1], number, SWARM)
            if number == EMPTY_ROUND:
                certificate, encoded = certify(replace(certificate.result, members=(), parts=()), 4, swarm=SWARM), {}
            root = replica.apply(certificate.result, encoded)
            self.blobs |= encoded
            self.certificates[number] = certificate
            digest = digest_record(certificate.result)
            self.heads.append(Head(round=number, digest=digest, state_root=root, voters=certificate.result.voters))
            self.states.append(replica.params.tobytes() + replica.momentum.tobytes())

    def held(self, digest: bytes) -> memoryview | None:
        """All bytes are in memory."""
        return memoryview(self.blobs[digest])

    def parts(self, number: int) -> list[bytes]:
        return [part.digest for part in self.certificates[number].result.parts]


LOG = Log()
NAMED: list[int] = []  # the rounds of which the parameters were said to be


@contextmanager
def opened(folder: Path, snapshots_kept: int = 2) -> Iterator[LocalState]:
    """A state that is not restored yet; closing it is what a kill does, for nothing is flushed."""
    with LedgerStore.open(folder / "ledger.sqlite") as ledger:
        stores = Stores(
            ledger=ledger,
            blobs=BlobStore(folder / "blobs"),
            snapshots=SnapshotStore(folder / "snapshots"),
            snapshots_kept=snapshots_kept,
        )
        params, momentum = (np.ones(ELEMENTS, np.float32) for _ in range(2))
        params.flags.writeable = False
        yield LocalState(MANIFEST, SWARM, stores, params, momentum, partial(writing, params))


@contextmanager
def writing(params: NDArray[np.float32]) -> Iterator[Callable[[int], None]]:
    """What a trainer maps may be changed inside of this alone."""
    params.flags.writeable = True
    try:
        yield NAMED.append
    finally:
        params.flags.writeable = False


async def commit(state: LocalState, first: int, last: int) -> None:
    for number in range(first, last + 1):
        assert await state.commit(LOG.certificates[number], LOG.held) == LOG.heads[number]
        await state.finish()


async def fill(folder: Path, rounds: int, snapshots_kept: int = 2) -> None:
    """The folder of a peer that has taken part in `rounds` rounds."""
    with opened(folder, snapshots_kept) as state:
        await state.restore()
        await commit(state, 1, rounds)


def stands_at(state: LocalState, number: int) -> bool:
    vectors = state.replica.params.tobytes() + state.replica.momentum.tobytes()
    return (state.head, state.replica.round, vectors) == (LOG.heads[number], number, LOG.states[number])


async def restarted_at(folder: Path, number: int) -> bool:
    with opened(folder) as state:
        await state.restore()
        return stands_at(state, number)


async def test_the_parameters_are_named_by_their_round(tmp_path: Path) -> None:
    NAMED.clear()
    await fill(tmp_path, 2)
    assert NAMED == [0, 1, 2]
    with opened(tmp_path) as state:
        await state.restore()
    assert NAMED[3:] == [2], "at the start, too"
    (tmp_path / "newcomer").mkdir()
    with opened(tmp_path / "newcomer") as state:
        await state.restore()
        params, momentum = (np.zeros(ELEMENTS, np.float32) for _ in range(2))
        await state.install(LOG.heads[5], params, momentum)
    assert NAMED[4:] == [0, 5]


async def test_an_empty_folder_is_round_0(tmp_path: Path) -> None:
    with opened(tmp_path) as state:
        assert await state.restore() == LOG.heads[0]
        assert stands_at(state, 0)
        assert state.load_vote() is None
        assert state.load_certificates(1, 16) == ()


async def test_the_first_outer_step_of_a_process_is_not_what_one_takes(tmp_path: Path) -> None:
    with opened(tmp_path) as state:
        await state.restore()
        await commit(state, 1, 1)
        assert state.apply_s is None, "it loaded the compiled loops"
        await commit(state, 2, 2)
        assert state.apply_s is not None and state.apply_s > 0


@pytest.mark.parametrize("rounds", [1, 4, 5, 7, 9, 13])
async def test_a_restart_gives_the_state_before(tmp_path: Path, rounds: int) -> None:
    await fill(tmp_path, rounds)
    assert await restarted_at(tmp_path, rounds)
    with opened(tmp_path) as state:
        await state.restore()
        await commit(state, rounds + 1, min(rounds + 1, ROUNDS))
        assert stands_at(state, min(rounds + 1, ROUNDS))


async def test_a_snapshot_and_the_updates_after_it_are_the_replayed_log(tmp_path: Path) -> None:
    await fill(tmp_path, 7)
    with opened(tmp_path) as state:
        assert state.stores.snapshots.rounds() == [4]
        state.stores.snapshots.remove(4)
    assert await restarted_at(tmp_path, 7), "from round 0"


# -- killed in the middle of a commit -------------------------------------------------------------------------------


def write_parts(state: LocalState, number: int) -> None:
    for digest in LOG.parts(number):
        state.stores.blobs.write(digest, LOG.blobs[digest])
    state.stores.blobs.sync(LOG.parts(number))


def write_some_parts(state: LocalState, number: int) -> None:
    for digest in LOG.parts(number)[:2]:
        state.stores.blobs.write(digest, LOG.blobs[digest])


def write_all(state: LocalState, number: int) -> None:
    write_parts(state, number)
    state.save_certificate(LOG.certificates[number])


@pytest.mark.parametrize(("until_killed", "rounds"), [(write_some_parts, 4), (write_parts, 4), (write_all, 5)])
async def test_a_kill_between_the_steps_of_a_commit_loses_nothing(
    tmp_path: Path, until_killed: Callable[[LocalState, int], None], rounds: int
) -> None:
    await fill(tmp_path, 4)
    with opened(tmp_path) as state:
        await state.restore()
        until_killed(state, 5)
    assert await restarted_at(tmp_path, rounds), "a certificate on the disk is a round that counts"
    with opened(tmp_path) as state:
        await state.restore()
        await commit(state, rounds + 1, 7)
        assert stands_at(state, 7)


async def test_the_certificate_is_durable_before_the_state_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    with opened(tmp_path) as state:
        await state.restore()
        blobs, save, apply = state.stores.blobs, state.save_certificate, state.replica.apply
        sync = blobs.sync
        monkeypatch.setattr(blobs, "sync", lambda digests: (steps.append("sync"), sync(digests)))
        monkeypatch.setattr(state, "save_certificate", lambda one: (steps.append("certificate"), save(one)))
        monkeypatch.setattr(state.replica, "apply", lambda *args: (steps.append("apply"), apply(*args))[1])
        await commit(state, 1, 1)
    assert steps == ["sync", "certificate", "apply"]


async def test_a_certificate_without_its_bytes_waits_for_peers(tmp_path: Path) -> None:
    await fill(tmp_path, 3)
    with opened(tmp_path) as state:
        await state.restore()
        state.save_certificate(LOG.certificates[4])
    assert await restarted_at(tmp_path, 3)
    with opened(tmp_path) as state:
        await state.restore()
        await commit(state, 4, 5)
        assert stands_at(state, 5)


async def test_parts_that_left_the_memory_are_read_from_the_disk(tmp_path: Path) -> None:
    with opened(tmp_path) as state:
        await state.restore()
        write_parts(state, 1)
        await state.commit(LOG.certificates[1], lambda digest: None)
        assert stands_at(state, 1)


# -- damage ---------------------------------------------------------------------------------------------------------


def damage(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


def blob_path(folder: Path, digest: bytes) -> Path:
    return folder / "blobs" / digest.hex()[:2] / digest.hex()


async def test_a_damaged_snapshot_gives_way_to_the_one_before(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    await fill(tmp_path, 10)
    damage(tmp_path / "snapshots" / "00000008.safetensors")
    with caplog.at_level(logging.WARNING):
        assert await restarted_at(tmp_path, 10)
    assert "snapshot of round 8 is damaged" in caplog.text
    with opened(tmp_path) as state:
        assert state.stores.snapshots.rounds() == [4]


async def test_a_snapshot_that_was_not_certified_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    await fill(tmp_path, 10)
    with opened(tmp_path) as state:
        other = Replica(MANIFEST, *(np.full(ELEMENTS, 7, np.float32) for _ in range(2)), round_number=8)
        state.stores.snapshots.write(other.index(), other.params, other.momentum)
    with caplog.at_level(logging.WARNING):
        assert await restarted_at(tmp_path, 10)
    assert "snapshot of round 8 is not what was certified" in caplog.text


async def test_a_snapshot_of_a_round_without_a_certificate_is_not_used(tmp_path: Path) -> None:
    await fill(tmp_path, 3)
    with opened(tmp_path) as state:
        other = Replica(MANIFEST, *(np.full(ELEMENTS, 7, np.float32) for _ in range(2)), round_number=9)
        state.stores.snapshots.write(other.index(), other.params, other.momentum)
    assert await restarted_at(tmp_path, 3)


@pytest.mark.parametrize("spoil", [damage, Path.unlink, lambda path: path.write_bytes(b"")])
async def test_the_log_ends_before_a_part_that_is_damaged_or_gone(
    tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    await fill(tmp_path, 8)
    for name in ("00000004", "00000008"):
        damage(tmp_path / "snapshots" / f"{name}.safetensors")
    spoil(blob_path(tmp_path, LOG.parts(5)[2]))
    assert await restarted_at(tmp_path, 4)
    with opened(tmp_path) as state:
        await state.restore()
        await commit(state, 5, 6)
        assert stands_at(state, 6), "and goes on when a peer has sent it"


async def test_half_a_snapshot_is_swept_away(tmp_path: Path) -> None:
    await fill(tmp_path, 4)
    half = tmp_path / "snapshots" / "00000008.partial"
    half.write_bytes(b"half")
    assert await restarted_at(tmp_path, 4)
    assert not half.exists()


# -- retention ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounds", [7, 8, 16, ROUNDS])
async def test_only_updates_that_nobody_may_need_are_removed(tmp_path: Path, rounds: int) -> None:
    await fill(tmp_path, rounds)
    with opened(tmp_path) as state:
        newest = rounds - rounds % 4  # when snapshots were last written and updates last removed
        # The two newest, and the anchor from which the oldest retained round is rebuilt.
        assert state.stores.snapshots.rounds() == [number for number in (newest - 8, newest - 4, newest) if number > 0]
        oldest_kept = max(1, newest - RULES.rounds_kept + 1)
        for number in range(1, rounds + 1):
            for digest in LOG.parts(number):
                assert state.stores.blobs.has(digest) == (number >= oldest_kept), number
        assert len(state.stores.ledger.list_certificates(1, rounds + 1)) == rounds, "certificates are the log's index"
        kept = [LOG.blobs[digest] for number in range(oldest_kept, rounds + 1) for digest in LOG.parts(number)]
        assert state.stores.blobs.stored_bytes == sum(map(len, kept))


async def test_what_is_kept_is_known_after_a_restart_and_shows_in_what_can_be_rebuilt(tmp_path: Path) -> None:
    await fill(tmp_path, ROUNDS)
    with opened(tmp_path) as state:
        await state.restore()
        held = state.holdings
        assert sorted(held.updates) == list(range(9, ROUNDS + 1))
        assert state.oldest_round == 8
        sizes = {digest: size for sizes in held.updates.values() for digest, size in sizes.items()}
        assert sizes == {digest: len(LOG.blobs[digest]) for digest in sizes}, "as the codec fixes them"
        assert sum(sizes.values()) == state.stores.blobs.stored_bytes


async def test_under_a_limit_of_bytes_only_what_the_swarm_needs_stays(tmp_path: Path) -> None:
    await fill(tmp_path, 15)
    with opened(tmp_path) as state:
        state.stores = replace(state.stores, bytes_max=1)
        await state.restore()
        await commit(state, 16, 16)
        await state.finish()
        assert state.stores.snapshots.rounds() == [16]
        assert sorted(state.holdings.updates) == list(range(16 - RULES.rounds_kept + 1, 17)), "the manifest's floor"
        assert state.oldest_round == 16
    assert await restarted_at(tmp_path, 16)


async def test_blobs_of_a_log_that_was_left_go_with_the_next_sweep(tmp_path: Path) -> None:
    await fill(tmp_path, 6)
    with opened(tmp_path) as state:
        await state.restore()
        await state.rewind(5)
        left = [digest for number in (5, 6) for digest in LOG.parts(number)]
        assert all(state.stores.blobs.has(digest) for digest in left)
        await state.write_snapshot()
        state._sweep()
        assert not any(state.stores.blobs.has(digest) for digest in left)
        assert all(state.stores.blobs.has(digest) for number in range(1, 5) for digest in LOG.parts(number))


async def test_a_snapshot_that_cannot_be_written_stops_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with opened(tmp_path) as state:
        await state.restore()
        monkeypatch.setattr(state.stores.snapshots, "write", fail)
        await commit(state, 1, 5)
        assert stands_at(state, 5)
    assert "no snapshot of round 4" in caplog.text
    assert await restarted_at(tmp_path, 5)


async def test_a_snapshot_is_written_on_request_and_once(tmp_path: Path) -> None:
    with opened(tmp_path) as state:
        await state.restore()
        await state.write_snapshot()
        assert state.stores.snapshots.rounds() == [], "round 0 is the manifest's seed"
        await commit(state, 1, 2)
        await state.write_snapshot()
        before = (tmp_path / "snapshots" / "00000002.safetensors").stat()
        await state.write_snapshot()
        assert (tmp_path / "snapshots" / "00000002.safetensors").stat() == before
    assert await restarted_at(tmp_path, 2)


async def test_remembered_roots_are_bounded(tmp_path: Path) -> None:
    with opened(tmp_path) as state:
        await state.restore()
        await commit(state, 1, ROUNDS)
        expected = range(ROUNDS - RULES.rounds_kept + 1, ROUNDS + 1)
        assert state.roots == {number: LOG.heads[number].state_root for number in expected}


# -- the vote record ------------------------------------------------------------------------------------------------


async def test_the_vote_record_survives(tmp_path: Path) -> None:
    first = VoteRecord(round=5, promised=2, led=1, accepted_attempt=2, accepted=LOG.certificates[5].result)
    with opened(tmp_path) as state:
        state.save_vote(VoteRecord(round=4))
        state.save_vote(first)
    with opened(tmp_path) as state:
        assert state.load_vote() == first
        await state.restore()
        await commit(state, 1, 4)
        assert state.load_vote() == first, "it is nobody's but the round core's"


async def test_the_largest_vote_record_fits(tmp_path: Path) -> None:
    plain = make_sample_result(LOG.heads[0], members=8, parts=PARTS)
    result = replace(plain, parts=plain.parts * (PARTS_MAX // PARTS))
    record = VoteRecord(round=1, accepted=result)
    with opened(tmp_path) as state:
        state.save_vote(record)
        assert state.load_vote() == record


# -- the log for others, contributions, snapshots from others --------------------------------------------------------


async def test_certificates_are_given_in_a_row(tmp_path: Path) -> None:
    with opened(tmp_path) as state:
        await state.restore()
        await commit(state, 1, 4)
        state.save_certificate(LOG.certificates[6])
        wanted = tuple(LOG.certificates[number] for number in (2, 3, 4))
        assert state.load_certificates(2, 16) == wanted, "up to the gap"
        assert state.load_certificates(2, 2) == wanted[:2]
        assert state.load_certificates(5, 16) == ()
        assert state.load_certificates(6, 16) == (LOG.certificates[6],)


async def test_a_contribution_is_frozen_for_the_next_round(tmp_path: Path) -> None:
    with opened(tmp_path) as state:
        await state.restore()
        await commit(state, 1, 2)
        frozen = await state.freeze(state.replica.params * np.float32(0.5))
        assert (frozen.round, len(frozen.encoded)) == (3, PARTS)


async def test_an_installed_snapshot_leads_past_the_rounds_between(tmp_path: Path) -> None:
    both = np.frombuffer(LOG.states[12], np.float32)
    with opened(tmp_path) as state:
        await state.restore()
        await commit(state, 1, 2)
        state.contributor.residual.fill(1.0)
        state.save_certificate(LOG.certificates[12])
        await state.install(LOG.heads[12], both[:ELEMENTS], both[ELEMENTS:])
        assert stands_at(state, 12)
        assert not state.contributor.residual.any(), "it belonged to parameters that are gone"
        with pytest.raises(AssertionError, match="only leads forward"):
            await state.install(LOG.heads[11], both[:ELEMENTS], both[ELEMENTS:])
    assert await restarted_at(tmp_path, 12)
    with opened(tmp_path) as state:
        await state.restore()
        await commit(state, 13, 14)
        assert stands_at(state, 14)
