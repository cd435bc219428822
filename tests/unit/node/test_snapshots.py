"""Snapshots on a real disk: whole or refused, chunk by chunk, and nothing left behind by a crash."""

import errno
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import load_file

from shoal.node import snapshots
from shoal.node.snapshots import LEASE_S, LEASE_S_MAX, LEASES_MAX, SnapshotStore, read_chunk
from shoal.protocol.codecs import Float32s
from shoal.protocol.state import CHUNK_BYTES, SnapshotIndex, StateVector, chunk_digests

SMALL = 300
LARGE = CHUNK_BYTES // 4 + 70  # two chunks a vector


def make_state(elements: int, seed: int = 1) -> tuple[Float32s, Float32s]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal(elements, dtype=np.float32), rng.standard_normal(elements, dtype=np.float32)


def make_index(number: int, params: Float32s, momentum: Float32s) -> SnapshotIndex:
    return SnapshotIndex(round=number, elements=params.size, digests=chunk_digests(params) + chunk_digests(momentum))


def write(store: SnapshotStore, number: int, elements: int = SMALL) -> SnapshotIndex:
    params, momentum = make_state(elements, number)
    index = make_index(number, params, momentum)
    store.write(index, params, momentum)
    return index


def read(store: SnapshotStore, number: int, elements: int = SMALL) -> bool:
    params, momentum = np.zeros(elements, np.float32), np.zeros(elements, np.float32)
    whole = store.read(number, params, momentum)
    if whole:
        expected = make_state(elements, number)
        assert params.tobytes() == expected[0].tobytes() and momentum.tobytes() == expected[1].tobytes()
    return whole


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_snapshot_comes_back_also_after_a_restart(tmp_path: Path) -> None:
    store = SnapshotStore(tmp_path / "snapshots")
    index = write(store, 8)
    for one in (store, SnapshotStore(tmp_path / "snapshots")):
        assert one.rounds() == [8]
        snapshot = one.get(8)
        assert snapshot is not None and snapshot.index == index
        assert read(one, 8)
    assert names(tmp_path / "snapshots") == {"00000008.safetensors", "00000008.index"}


def test_a_snapshot_is_a_safetensors_file_that_others_can_read(tmp_path: Path) -> None:
    write(SnapshotStore(tmp_path), 8)
    tensors = load_file(tmp_path / "00000008.safetensors")
    params, momentum = make_state(SMALL, 8)
    assert set(tensors) == {"params", "momentum"}
    assert np.array_equal(tensors["params"], params) and np.array_equal(tensors["momentum"], momentum)


def test_there_is_no_snapshot_of_another_round(tmp_path: Path) -> None:
    store = SnapshotStore(tmp_path)
    assert store.rounds() == [] and store.get(8) is None
    store.remove(8)
    with pytest.raises(KeyError):
        read(store, 8)


def test_every_flipped_byte_of_the_state_is_found(tmp_path: Path) -> None:
    write(SnapshotStore(tmp_path), 8)
    path, index_path = tmp_path / "00000008.safetensors", tmp_path / "00000008.index"
    whole, index = path.read_bytes(), index_path.read_bytes()
    header_bytes = 8 + int.from_bytes(whole[:8], "little")
    places = [*range(header_bytes), *range(header_bytes, len(whole), 97), len(whole) - 1]
    harmless = 0
    for place in places:
        for flip in (0x01, 0x80):
            spoilt = bytearray(whole)
            spoilt[place] ^= flip
            path.write_bytes(spoilt)
            index_path.write_bytes(index)
            store = SnapshotStore(tmp_path)
            if store.rounds() and read(store, 8):
                # In the header, where the state is not: `read` has compared the vectors.
                assert place < header_bytes
                harmless += 1
            else:
                assert store.rounds() == []
    assert harmless < header_bytes, "not all of the header is without meaning"


def test_every_flipped_byte_of_the_index_is_found(tmp_path: Path) -> None:
    write(SnapshotStore(tmp_path), 8)
    path, index_path = tmp_path / "00000008.safetensors", tmp_path / "00000008.index"
    whole, index = path.read_bytes(), index_path.read_bytes()
    for place in range(len(index)):
        for flip in (0x01, 0x80):
            spoilt = bytearray(index)
            spoilt[place] ^= flip
            path.write_bytes(whole)
            index_path.write_bytes(spoilt)
            store = SnapshotStore(tmp_path)
            for number in store.rounds():
                assert number == 8, "a file's name and its index agree"
                assert not read(store, number)


@pytest.mark.parametrize("keep", [0, 7, 8, 200, -1])
def test_a_torn_state_file_is_no_snapshot(tmp_path: Path, keep: int) -> None:
    write(SnapshotStore(tmp_path), 8)
    path = tmp_path / "00000008.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    store = SnapshotStore(tmp_path)
    assert store.rounds() == []


def test_a_damaged_snapshot_is_removed_and_an_older_one_remains(tmp_path: Path) -> None:
    store = SnapshotStore(tmp_path)
    write(store, 4)
    write(store, 8)
    path = tmp_path / "00000008.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    assert not read(store, 8)
    assert store.rounds() == [4]
    assert names(tmp_path) == {"00000004.safetensors", "00000004.index"}
    assert read(store, 4)


def test_a_snapshot_of_another_model_is_refused(tmp_path: Path) -> None:
    store = SnapshotStore(tmp_path)
    write(store, 8, SMALL + 1)
    assert not read(store, 8, SMALL)


def test_a_crash_between_state_and_index_leaves_no_snapshot(tmp_path: Path) -> None:
    write(SnapshotStore(tmp_path), 8)
    write(SnapshotStore(tmp_path), 4)
    (tmp_path / "00000008.index").unlink()
    (tmp_path / "00000012.partial").write_bytes(b"half")
    (tmp_path / "00000016.index").write_bytes(b"")
    store = SnapshotStore(tmp_path)
    assert store.rounds() == [4]
    assert len(names(tmp_path)) == 5, "a reader beside a running daemon deletes nothing"
    store.remove_leftovers()
    assert names(tmp_path) == {"00000004.safetensors", "00000004.index"}
    assert read(store, 4)


@pytest.mark.parametrize("place", ["save_file", "sync_path", "encode_record"])
def test_a_full_disk_is_left_nothing_to_carry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    def fail(*arguments: object, **_: object) -> None:
        if place == "save_file":
            Path(str(arguments[1])).write_bytes(b"half")
            raise SafetensorError("No space left on device")
        raise OSError(errno.ENOSPC, "No space left on device")

    store = SnapshotStore(tmp_path)
    write(store, 4)
    before = names(tmp_path)
    with monkeypatch.context() as patches:
        patches.setattr(snapshots, place, fail)
        with pytest.raises(OSError, match="No space left"):
            write(store, 8)
    assert names(tmp_path) == before and store.rounds() == [4]
    write(store, 8)
    assert read(store, 4) and read(store, 8)


def test_writing_a_round_again_replaces_it(tmp_path: Path) -> None:
    store = SnapshotStore(tmp_path)
    write(store, 8)
    (tmp_path / "00000008.safetensors").write_bytes(b"")
    write(store, 8)
    assert read(store, 8)


def test_chunks_are_served_from_the_file(tmp_path: Path) -> None:
    store = SnapshotStore(tmp_path)
    index = write(store, 8, LARGE)
    params, momentum = make_state(LARGE, 8)
    snapshot = store.get(8)
    assert snapshot is not None and index.chunks == 4
    for number in range(index.chunks):
        span = index.span(number)
        vector = params if span.vector is StateVector.PARAMS else momentum
        assert read_chunk(snapshot, number) == vector.tobytes()[span.start : span.stop]


def test_a_chunk_that_the_file_no_longer_holds_is_not_served(tmp_path: Path) -> None:
    store = SnapshotStore(tmp_path)
    write(store, 8, LARGE)
    snapshot = store.get(8)
    assert snapshot is not None
    raw = bytearray(snapshot.path.read_bytes())
    raw[-1] ^= 1  # in the last chunk of params, which stand last in the file
    snapshot.path.write_bytes(raw)
    assert [read_chunk(snapshot, number) is None for number in range(4)] == [False, True, False, False]
    snapshot.path.write_bytes(raw[: len(raw) // 2])
    assert read_chunk(snapshot, 0) is None
    snapshot.path.unlink()
    assert read_chunk(snapshot, 2) is None


def test_a_chunk_is_found_by_its_digest_in_the_newest_snapshot(tmp_path: Path) -> None:
    store = SnapshotStore(tmp_path)
    params, momentum = make_state(LARGE)
    for number in (4, 8):
        store.write(make_index(number, params, momentum), params, momentum)
    other = write(store, 12, LARGE)
    index = make_index(8, params, momentum)
    for number in range(index.chunks):
        found = store.find_chunk(index.digest(number))
        assert found is not None and (found[0].index.round, found[1]) == (8, number)
    assert store.find_chunk(other.digest(3)) is not None
    assert store.find_chunk(b"d" * 32) is None
    straddling = index.digests[16:48]
    assert store.find_chunk(straddling) is None, "half of two digests is none"


def test_a_snapshot_that_another_thread_removes_meanwhile_is_not_looked_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = SnapshotStore(tmp_path)
    index = write(store, 4)
    monkeypatch.setattr(store, "rounds", lambda: [4, 8])  # as it was listed before
    found = store.find_chunk(index.digest(1))
    assert found is not None and found[0].index.round == 4
    store.remove(4)
    assert store.find_chunk(index.digest(1)) is None


# -- lent snapshots --------------------------------------------------------------------------------------------------


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_snapshot_is_lent_until_some_time_after_its_last_chunk(tmp_path: Path) -> None:
    clock = Clock()
    store = SnapshotStore(tmp_path, clock)
    index = write(store, 4)
    for number in (8, 12, 16):
        assert store.find_chunk(index.digest(1)) is not None
        write(store, number)
        assert store.lent() == [4]
        clock.now += LEASE_S - 1
        assert store.lent() == [4]
    clock.now += 1
    assert store.lent() == []


def test_nobody_is_lent_a_snapshot_for_ever(tmp_path: Path) -> None:
    clock = Clock()
    store = SnapshotStore(tmp_path, clock)
    write(store, 4)
    write(store, 8)
    ends_s = clock.now + LEASE_S_MAX
    while clock.now < ends_s:
        store.lend(4)
        assert store.lent() == [4]
        clock.now += LEASE_S / 2
    store.lend(4)
    assert store.lent() == []


def test_so_many_are_lent_and_who_came_first_keeps_them(tmp_path: Path) -> None:
    clock = Clock()
    store = SnapshotStore(tmp_path, clock)
    numbers = [4 * one for one in range(1, LEASES_MAX + 4)]
    for number in numbers:
        write(store, number)
        store.lend(number)
        clock.now += 1
    assert store.lent() == numbers[:LEASES_MAX]
    store.remove(numbers[0])
    assert store.lent() == numbers[1 : LEASES_MAX + 1]
    store.lend(999)
    assert 999 not in store.lent()


def test_the_newest_snapshot_takes_no_place_among_the_lent(tmp_path: Path) -> None:
    store = SnapshotStore(tmp_path, Clock())
    write(store, 4)
    store.lend(4)
    assert store.lent() == []
    write(store, 8)
    assert store.lent() == [4]
