"""Error feedback over kill -9: what was produced is what was applied plus the residual, to the bit."""

import asyncio
import errno
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from shoal.node.blobs import BlobStore
from shoal.node.feedback import PENDING_MAX, FeedbackFull, FeedbackStore
from shoal.node.ledger_store import LedgerStore
from shoal.node.local_state import LocalState, Stores
from shoal.node.repair import open_ledger
from shoal.node.residual_file import ResidualFile, map_residual
from shoal.node.snapshots import SnapshotStore
from shoal.protocol.codecs import CODECS, Float32s
from shoal.protocol.contribution import Contributor, Frozen
from shoal.protocol.errors import Failure
from shoal.protocol.messages import Certificate
from shoal.protocol.quorum import make_bitmap
from tests.unit.node.node_samples import LEDGER, Swarm, make_samples
from tests.unit.protocol.samples import PEERS, certify, make_update

ME = PEERS[0]
SWARM: Swarm = make_samples(founders=3, snapshot_every=3)
PARTS = SWARM.manifest.parts
ELEMENTS = SWARM.manifest.layout.elements


@contextmanager
def alive(folder: Path) -> Iterator[LocalState]:
    """A peer's state; leaving is kill -9: nothing is written any more."""
    folder.mkdir(exist_ok=True)
    with LedgerStore.open(folder / LEDGER) as ledger:
        stores = Stores(
            ledger=ledger,
            blobs=BlobStore(folder / "blobs"),
            snapshots=SnapshotStore(folder / "snapshots"),
            snapshots_kept=2,
            feedback=FeedbackStore(folder / "feedback", ledger),
        )
        params, momentum = (np.zeros(ELEMENTS, np.float32) for _ in range(2))
        state = LocalState(SWARM.manifest, SWARM.id, stores, params, momentum)
        asyncio.run(state.restore())
        yield state


def work_on(base: Float32s, seed: int) -> Float32s:
    """Local parameters after some training."""
    local: Float32s = base + np.random.Generator(np.random.Philox(seed)).standard_normal(ELEMENTS).astype(np.float32)
    return local


def count(
    state: LocalState, frozen: Frozen | None, parts: frozenset[int], seed: int
) -> tuple[Certificate, dict[bytes, bytes]]:
    """A certified update after the head that counts these parts of a contribution."""
    certificate, encoded = make_update(SWARM.manifest, state.head, seed, SWARM.id)
    result = certificate.result
    members = result.members
    if frozen is not None:
        members = (replace(members[0], contribution_root=frozen.root), *members[1:])
    bitmaps = [make_bitmap(frozenset({0, 1, 2} if part in parts else {1, 2}), 3) for part in range(PARTS)]
    new = tuple(replace(one, contributors=bitmap) for one, bitmap in zip(result.parts, bitmaps, strict=True))
    return certify(replace(result, members=members, parts=new), swarm=SWARM.id), encoded


async def commit(state: LocalState, certificate: Certificate, encoded: dict[bytes, bytes]) -> None:
    await state.commit(certificate, lambda digest: memoryview(encoded[digest]))
    await state.finish()


@dataclass(frozen=True, slots=True)
class Step:
    """One round: which parts count it, and where the peer dies in it."""

    parts: frozenset[int]
    dies_after_freeze: bool
    dies_after_commit: bool
    misses: bool  # the round is certified without this peer's work


STEPS = st.builds(
    Step,
    st.frozensets(st.integers(0, PARTS - 1)) | st.just(frozenset(range(PARTS))),
    st.booleans(),
    st.booleans(),
    st.integers(0, 4).map(lambda one: one == 0),
)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(STEPS, min_size=1, max_size=6))
def test_nothing_is_lost_or_counted_twice_wherever_it_dies(
    tmp_path_factory: pytest.TempPathFactory, steps: list[Step]
) -> None:
    folder = tmp_path_factory.mktemp("peer")
    reference = Contributor(SWARM.manifest)
    codec = CODECS[SWARM.manifest.rounds.codec]
    for number, step in enumerate(steps, 1):
        with alive(folder) as state:
            assert np.array_equal(state.contributor.residual, reference.residual)
            base = state.replica.params.copy()
            local = work_on(base, number)
            expected = reference.freeze(number, base, local)
            produced = (base - local) + reference.residual
            frozen = asyncio.run(state.freeze(local, 10 * number))
            assert (frozen.root, frozen.encoded) == (expected.root, expected.encoded)
            if not step.dies_after_freeze:
                asyncio.run(advance(state, frozen, step, number))
        if step.dies_after_freeze:
            with alive(folder) as state:
                assert state.batches_done == 10 * number, "it may be counted"
                asyncio.run(advance(state, frozen, step, number))
        with alive(folder) as state:
            included = () if step.misses else tuple(sorted(step.parts))
            settle_reference(reference, expected, included)
            residual = state.contributor.residual
            assert np.array_equal(residual, reference.residual)
            for part in included:
                first, end = SWARM.manifest.part_range(part)
                applied = np.empty(end - first, np.float32)
                codec.decode_untrusted(frozen.encoded[part], end - first, applied)
                assert np.array_equal(applied + residual[first:end], produced[first:end])
            if included:
                assert state.settled is not None
                assert (state.settled.round, state.settled.batches_done) == (number, 10 * number)
                assert state.settled.parts == make_bitmap(frozenset(included), PARTS)


async def advance(state: LocalState, frozen: Frozen, step: Step, number: int) -> None:
    counted = (None, frozenset[int]()) if step.misses else (frozen, step.parts)
    certificate, encoded = count(state, *counted, 100 + number)
    await commit(state, certificate, encoded)
    if step.dies_after_commit:
        return
    included = await state.settle(certificate.result, ME)
    assert included == (() if step.misses else tuple(sorted(step.parts)))


def settle_reference(reference: Contributor, expected: Frozen, included: tuple[int, ...]) -> None:
    for part in included:
        first, end = SWARM.manifest.part_range(part)
        reference.residual[first:end] = expected.residual_next[first:end]


def test_the_same_work_makes_the_same_contribution_after_a_restart(tmp_path: Path) -> None:
    with alive(tmp_path) as state:
        base = state.replica.params.copy()
        first = asyncio.run(state.freeze(work_on(base, 1), 5))
    with alive(tmp_path) as state:
        again = asyncio.run(state.freeze(work_on(base, 1), 5))
        assert again.root == first.root
        assert state.stores.feedback is not None and len(state.stores.feedback.record.pending) == 1


def test_either_of_two_contributions_to_a_round_may_be_counted(tmp_path: Path) -> None:
    for chosen in (0, 1):
        folder = tmp_path / str(chosen)
        made = []
        for seed in (1, 2):
            with alive(folder) as state:
                made.append(asyncio.run(state.freeze(work_on(state.replica.params, seed), seed)))
        with alive(folder) as state:
            certificate, encoded = count(state, made[chosen], frozenset(range(PARTS)), 7)
            asyncio.run(commit(state, certificate, encoded))
            assert asyncio.run(state.settle(certificate.result, ME)) == tuple(range(PARTS))
            assert np.array_equal(state.contributor.residual, made[chosen].residual_next)
            assert state.settled is not None and state.settled.batches_done == chosen + 1


def test_contributions_to_one_round_are_bounded(tmp_path: Path) -> None:
    with alive(tmp_path) as state:
        for seed in range(PENDING_MAX):
            asyncio.run(state.freeze(work_on(state.replica.params, seed), seed))
        with pytest.raises(FeedbackFull):
            asyncio.run(state.freeze(work_on(state.replica.params, 99), 99))
        assert len(list((tmp_path / "feedback").iterdir())) == PENDING_MAX
        certificate, encoded = count(state, None, frozenset(), 7)
        asyncio.run(commit(state, certificate, encoded))
        assert asyncio.run(state.settle(certificate.result, ME)) == ()
        assert state.batches_done == 0, "none of them was counted"
        asyncio.run(state.freeze(work_on(state.replica.params, 99), 99))
        assert len(list((tmp_path / "feedback").iterdir())) == 1, "what nothing names is removed"


def fill_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_disk_that_fails_costs_no_feedback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with alive(tmp_path) as state:
        frozen = asyncio.run(state.freeze(work_on(state.replica.params, 1), 1))
        certificate, encoded = count(state, frozen, frozenset({0}), 7)
        asyncio.run(commit(state, certificate, encoded))
        with monkeypatch.context() as context:
            context.setattr(os, "posix_fallocate", fill_disk)
            assert asyncio.run(state.settle(certificate.result, ME)) == (0,)
            residual = state.contributor.residual.copy()
            with pytest.raises(OSError, match="No space left"):
                asyncio.run(state.freeze(work_on(state.replica.params, 2), 2))
        asyncio.run(state.freeze(work_on(state.replica.params, 2), 2))
        assert state.settled is not None and state.settled.parts == make_bitmap(frozenset({0}), PARTS)
    with alive(tmp_path) as state:
        assert np.array_equal(state.contributor.residual, residual)
        assert state.batches_done == 2


def test_killed_while_the_disk_fails_the_certificate_still_settles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with alive(tmp_path) as state:
        frozen = asyncio.run(state.freeze(work_on(state.replica.params, 1), 1))
        certificate, encoded = count(state, frozen, frozenset({1}), 7)
        asyncio.run(commit(state, certificate, encoded))
        with monkeypatch.context() as context:
            context.setattr(os, "posix_fallocate", fill_disk)
            asyncio.run(state.settle(certificate.result, ME))
        residual = state.contributor.residual.copy()
        assert residual.any()
    with alive(tmp_path) as state:
        assert np.array_equal(state.contributor.residual, residual)


def test_a_residual_that_is_settled_in_parts_leaves_the_file_of_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is mapped from a file that the disk still names while nothing can be written."""
    with alive(tmp_path) as state:
        for seed, parts in ((1, frozenset(range(PARTS))), (2, frozenset({1}))):
            frozen = asyncio.run(state.freeze(work_on(state.replica.params, seed), seed))
            certificate, encoded = count(state, frozen, parts, seed)
            asyncio.run(commit(state, certificate, encoded))
            with monkeypatch.context() as context:
                context.setattr(os, "posix_fallocate", fill_disk)
                asyncio.run(state.settle(certificate.result, ME))
        residual = state.contributor.residual.copy()
    with alive(tmp_path) as state:
        assert np.array_equal(state.contributor.residual, residual)


def test_a_residual_that_is_settled_in_parts_is_its_own_file_again(tmp_path: Path) -> None:
    with alive(tmp_path) as state:
        frozen = asyncio.run(state.freeze(work_on(state.replica.params, 1), 1))
        certificate, encoded = count(state, frozen, frozenset({1}), 1)
        asyncio.run(commit(state, certificate, encoded))
        asyncio.run(state.settle(certificate.result, ME))
        (path,) = (tmp_path / "feedback").iterdir()
        assert np.array_equal(load_file(path)["residual"], state.contributor.residual)
        mapped = Path("/proc/self/maps").read_text()
        assert str(path) in mapped, "memory of the process would be a vector more"


def test_what_a_contribution_leaves_is_in_its_file_already(tmp_path: Path) -> None:
    with alive(tmp_path) as state:
        frozen = asyncio.run(state.freeze(work_on(state.replica.params, 1), 1))
        (path,) = (tmp_path / "feedback").iterdir()
        assert np.array_equal(load_file(path)["residual"], frozen.residual_next), "anybody's safetensors reads it"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("size", [0, 7, 8, 300, 4 * ELEMENTS])
def test_a_file_that_was_cut_off_is_no_residual(tmp_path: Path, size: int) -> None:
    made = ResidualFile(tmp_path / "made", ELEMENTS)
    made.finish(tmp_path / "residual")
    assert map_residual(tmp_path / "residual", ELEMENTS) is not None
    os.truncate(tmp_path / "residual", size)
    assert map_residual(tmp_path / "residual", ELEMENTS) is None


def test_forgetting_is_durable_and_a_new_life_has_the_same_generation(tmp_path: Path) -> None:
    with alive(tmp_path) as state:
        frozen = asyncio.run(state.freeze(work_on(state.replica.params, 1), 1))
        certificate, encoded = count(state, frozen, frozenset(range(PARTS)), 7)
        asyncio.run(commit(state, certificate, encoded))
        asyncio.run(state.settle(certificate.result, ME))
        assert state.contributor.residual.any()
        asyncio.run(state.forget_residual())
        generation = state.generation
        assert generation != bytes(32)
    with alive(tmp_path) as state:
        assert not state.contributor.residual.any()
        assert state.generation == generation


def test_a_damaged_residual_is_named_and_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with alive(tmp_path) as state:
        frozen = asyncio.run(state.freeze(work_on(state.replica.params, 1), 1))
        certificate, encoded = count(state, frozen, frozenset(range(PARTS)), 7)
        asyncio.run(commit(state, certificate, encoded))
        asyncio.run(state.settle(certificate.result, ME))
    (path,) = (tmp_path / "feedback").iterdir()
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 1
    path.write_bytes(raw)
    with alive(tmp_path) as state:
        assert not state.contributor.residual.any()
    assert "the residual of the error feedback is damaged" in caplog.text


def test_work_that_was_offered_again_to_another_round_is_not_applied_twice(tmp_path: Path) -> None:
    """A log that was left had the round without it, and the same bytes were offered to the next one."""
    with alive(tmp_path) as state:
        frozen = asyncio.run(state.freeze(work_on(state.replica.params, 1), 10))
        certificate, encoded = count(state, frozen, frozenset(range(PARTS)), 7)
        state._pending[frozen.root] = replace(frozen, round=frozen.round + 1)
        generation = state.generation
        asyncio.run(commit(state, certificate, encoded))
        assert asyncio.run(state.settle(certificate.result, ME)) == ()
        assert state.generation != generation, "the local parameters, where it is in, are given up"


def offer_then_leave_log(state: LocalState) -> Frozen:
    """A contribution to round 2 of a log whose round 1 had nothing of this peer; then the log is left at its start."""
    certificate, encoded = count(state, None, frozenset(), 7)
    asyncio.run(commit(state, certificate, encoded))
    asyncio.run(state.settle(certificate.result, ME))
    frozen = asyncio.run(state.freeze(work_on(state.replica.params, 2), 20))
    asyncio.run(state.rewind(1))
    return frozen


def test_what_was_offered_on_a_log_that_was_left_is_settled_durably_when_it_is_counted(tmp_path: Path) -> None:
    with alive(tmp_path) as state:
        left = offer_then_leave_log(state)
        for seed in range(PENDING_MAX - 1):
            asyncio.run(state.freeze(work_on(state.replica.params, 30 + seed), 30 + seed))
    with alive(tmp_path) as state:
        asyncio.run(advance(state, left, Step(frozenset(), False, False, True), 8))
        certificate, encoded = count(state, left, frozenset(range(PARTS)), 9)
        asyncio.run(commit(state, certificate, encoded))
        assert asyncio.run(state.settle(certificate.result, ME)) == tuple(range(PARTS))
    with alive(tmp_path) as state:
        assert np.array_equal(state.contributor.residual, left.residual_next)
        assert state.settled is not None and state.settled.batches_done == 20


def test_of_what_was_offered_on_a_log_that_was_left_only_what_there_is_room_for_is_known(tmp_path: Path) -> None:
    with alive(tmp_path) as state:
        left = offer_then_leave_log(state)
        for seed in range(PENDING_MAX):
            asyncio.run(state.freeze(work_on(state.replica.params, 30 + seed), 30 + seed))
        assert len(list((tmp_path / "feedback").iterdir())) == PENDING_MAX
        asyncio.run(advance(state, left, Step(frozenset(), False, False, True), 8))
        certificate, encoded = count(state, left, frozenset(range(PARTS)), 9)
        generation = state.generation
        asyncio.run(commit(state, certificate, encoded))
        assert asyncio.run(state.settle(certificate.result, ME)) == ()
        assert state.generation != generation, "what the disk cannot know is not settled in memory alone"


def test_work_that_was_counted_is_not_settled_again_by_what_was_offered_on_a_log_that_was_left(tmp_path: Path) -> None:
    with alive(tmp_path) as state:
        left = offer_then_leave_log(state)
        frozen = asyncio.run(state.freeze(work_on(state.replica.params, 3), 30))
        asyncio.run(advance(state, frozen, Step(frozenset(range(PARTS)), False, False, False), 8))
        generation = state.generation
        certificate, encoded = count(state, left, frozenset(range(PARTS)), 9)
        asyncio.run(commit(state, certificate, encoded))
        assert asyncio.run(state.settle(certificate.result, ME)) == ()
        assert state.generation != generation, "the local parameters, where it is in, are given up"


def test_work_that_a_life_unknown_here_contributed_is_not_applied_twice(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    everything = frozenset(range(PARTS))
    with alive(tmp_path / "peer") as state:
        frozen = asyncio.run(state.freeze(work_on(state.replica.params, 1), 10))
        asyncio.run(advance(state, frozen, Step(everything, False, False, False), 1))
    shutil.copytree(tmp_path / "peer", tmp_path / "backup")
    with alive(tmp_path / "peer") as state:
        frozen = asyncio.run(state.freeze(work_on(state.replica.params, 2), 20))
        later = count(state, frozen, frozenset({0}), 102)
    with alive(tmp_path / "backup") as state:
        generation = state.generation
        assert state.contributor.residual.any(), "it is in the contribution that was counted"
        asyncio.run(commit(state, *later))
        assert asyncio.run(state.settle(later[0].result, ME)) == ()
        assert not state.contributor.residual.any()
        assert state.generation != generation, "the trainer's checkpoints are of no use either"
        assert (state.batches_done, state.settled) == (0, None)
        assert "does not know of" in caplog.text
        renewed = state.generation
    with alive(tmp_path / "backup") as state:
        assert state.generation == renewed and not state.contributor.residual.any()


def test_a_round_that_comes_once_more_after_two_logs_took_turns_is_no_older_life(tmp_path: Path) -> None:
    with alive(tmp_path) as state:
        frozen = asyncio.run(state.freeze(work_on(state.replica.params, 1), 10))
        certificate, encoded = count(state, frozen, frozenset(range(PARTS)), 101)
        asyncio.run(commit(state, certificate, encoded))
        asyncio.run(state.settle(certificate.result, ME))
        generation = state.generation
        asyncio.run(state.rewind(1))
        asyncio.run(commit(state, certificate, encoded))
        assert asyncio.run(state.settle(certificate.result, ME)) == ()
        assert state.generation == generation and state.contributor.residual.any()


def test_a_ledger_that_is_older_than_the_last_contribution_is_not_believed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with alive(tmp_path) as state:
        generation = state.generation
    backup = (tmp_path / LEDGER).read_bytes()
    with alive(tmp_path) as state:
        asyncio.run(state.freeze(work_on(state.replica.params, 1), 10))
    (tmp_path / LEDGER).write_bytes(backup)
    store, repair = open_ledger(tmp_path / LEDGER, ME, SWARM.id)
    store.close()
    assert repair is not None and repair.failure is Failure.STORE_BEHIND
    with alive(tmp_path) as state:
        assert state.generation != generation
        assert "is lost, and with it the residual" in caplog.text
        assert [path.name for path in (tmp_path / "feedback").iterdir()] == []
