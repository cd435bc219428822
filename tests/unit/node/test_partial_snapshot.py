"""A snapshot that comes chunk by chunk: found again after a restart, whole when it is adopted."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from shoal.node.partial_snapshot import PartialSnapshot
from shoal.node.snapshots import SnapshotStore
from shoal.protocol.codecs import Float32s
from shoal.protocol.state import CHUNK_BYTES, SnapshotIndex, StateVector, chunk_digests

ELEMENTS = CHUNK_BYTES // 4 + 70  # two chunks a vector


def make_state(number: int) -> tuple[SnapshotIndex, Float32s, Float32s]:
    rng = np.random.default_rng(number)
    params, momentum = (rng.standard_normal(ELEMENTS, dtype=np.float32) for _ in range(2))
    digests = chunk_digests(params) + chunk_digests(momentum)
    return SnapshotIndex(round=number, elements=ELEMENTS, digests=digests), params, momentum


def chunk(number: int, index: SnapshotIndex, params: Float32s, momentum: Float32s) -> memoryview:
    span = index.span(number)
    vector = params if span.vector is StateVector.PARAMS else momentum
    return memoryview(vector.tobytes()[span.start : span.stop])


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 1, 0, 2)])
def test_chunks_in_any_order_become_a_snapshot(tmp_path: Path, order: tuple[int, ...]) -> None:
    index, params, momentum = make_state(8)
    partial = PartialSnapshot(tmp_path / "catchup", index)
    assert partial.find_held() == []
    for count, number in enumerate(order, 1):
        partial.write(number, chunk(number, index, params, momentum))
        again = PartialSnapshot(tmp_path / "catchup", index)
        assert again.find_held() == sorted(order[:count])
        again.close()
    partial.sync()
    store = SnapshotStore(tmp_path / "snapshots")
    partial.finish(store)
    partial.close()
    assert list((tmp_path / "catchup").iterdir()) == []
    for one in (store, SnapshotStore(tmp_path / "snapshots")):
        assert one.rounds() == [8]
        read = np.zeros(ELEMENTS, np.float32), np.zeros(ELEMENTS, np.float32)
        assert one.read(8, *read)
        assert np.array_equal(read[0], params) and np.array_equal(read[1], momentum)
    tensors = load_file(tmp_path / "snapshots" / "00000008.safetensors")
    assert np.array_equal(tensors["momentum"], momentum)


def test_it_is_laid_out_as_one_that_was_written_here(tmp_path: Path) -> None:
    index, params, momentum = make_state(8)
    SnapshotStore(tmp_path / "written").write(index, params, momentum)
    partial = PartialSnapshot(tmp_path, index)
    for number in range(index.chunks):
        partial.write(number, chunk(number, index, params, momentum))
    written = (tmp_path / "written" / "00000008.safetensors").read_bytes()
    assert partial.path.read_bytes()[-8 * ELEMENTS :] == written[-8 * ELEMENTS :]
    partial.close()


def test_what_is_in_the_file_is_found_after_a_restart_and_what_is_spoilt_is_not(tmp_path: Path) -> None:
    index, params, momentum = make_state(8)
    partial = PartialSnapshot(tmp_path, index)
    for number in (0, 2, 3):
        partial.write(number, chunk(number, index, params, momentum))
    partial.close()
    again = PartialSnapshot(tmp_path, index)
    assert again.find_held() == [0, 2, 3]
    again.close()
    raw = bytearray(partial.path.read_bytes())
    raw[-1] ^= 1  # in params' last chunk, that is not here
    raw[-8 * ELEMENTS] ^= 1  # in momentum's first
    partial.path.write_bytes(raw)
    spoilt = PartialSnapshot(tmp_path, index)
    assert spoilt.find_held() == [0, 3]
    spoilt.close()
    partial.path.write_bytes(raw[:100])
    torn = PartialSnapshot(tmp_path, index)
    assert torn.find_held() == []
    torn.close()


def test_one_file_is_kept(tmp_path: Path) -> None:
    first, second = make_state(8)[0], make_state(12)[0]
    PartialSnapshot(tmp_path, first).close()
    PartialSnapshot(tmp_path, second).close()
    assert [path.name[:8] for path in tmp_path.iterdir()] == ["00000012"]


def test_what_is_written_after_the_end_goes_nowhere(tmp_path: Path) -> None:
    index, params, momentum = make_state(8)
    partial = PartialSnapshot(tmp_path, index)
    partial.close()
    with (tmp_path / "another file").open("w+b") as other:  # takes the number of the closed descriptor
        partial.write(0, chunk(0, index, params, momentum))
        partial.sync()
        assert other.read() == b""
    again = PartialSnapshot(tmp_path, index)
    assert again.find_held() == []
    again.close()
