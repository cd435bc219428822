"""Where a peer's vectors lie, and what is refused before anything is allocated."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from shoal.node import state_vectors
from shoal.node.config import NodeConfig, NodeTable, StoreTable
from shoal.node.machine_memory import MachineMemory, find_limits, see_memory
from shoal.node.state_vectors import allocate_vectors, check_disk, check_memory, measure_vectors
from shoal.node.status import Status
from shoal.node.terminal import render_status
from shoal.node.training.base_writes import map_memory
from shoal.protocol.errors import ConfigError
from tests.unit.node.test_vector_files import list_mapped, small_files

ELEMENTS = 5000
GIB = 1 << 30


def make_config(folder: Path, *, vectors: str, role: str = "trainer", free_gib_min: float = 0.0) -> NodeConfig:
    store = StoreTable(vectors=vectors, free_gib_min=free_gib_min)
    return NodeConfig(node=NodeTable(data_dir=str(folder), role=role), store=store)


@pytest.mark.parametrize(("role", "count"), [("trainer", 3), ("bootstrap", 2)])
@pytest.mark.parametrize("vectors", ["memory", "disk"])
def test_vectors_lie_where_the_configuration_says(tmp_path: Path, vectors: str, role: str, count: int) -> None:
    config = make_config(tmp_path, vectors=vectors, role=role)
    made = allocate_vectors(config, ELEMENTS)
    assert measure_vectors(config, ELEMENTS) == count * 4 * ELEMENTS
    # Base and local parameters are one mapping.
    assert len(list_mapped(tmp_path)) == (2 if vectors == "disk" else 0)
    for vector in (made.params, made.momentum):
        assert vector.shape == (ELEMENTS,) and not vector.any()
        with made.writing():
            vector[:] = 1.0
    assert (made.shared is not None) == (role == "trainer")
    if made.shared is not None:
        rows = map_memory(made.shared.descriptor)[0]
        assert np.array_equal(rows, [made.params, made.shared.local]) and made.shared.local[0] == 0.0
        del rows
    made.close()
    del made, vector
    assert list_mapped(tmp_path) == []
    assert [path.name for path in tmp_path.iterdir()] == (["vectors"] if vectors == "disk" else [])
    assert list(tmp_path.glob("*/*")) == []


def test_what_a_crash_left_is_removed_also_by_a_peer_that_has_gone_back_to_memory(tmp_path: Path) -> None:
    (tmp_path / "vectors").mkdir()
    (tmp_path / "vectors" / "tmp1234").write_bytes(bytes(10))
    allocate_vectors(make_config(tmp_path, vectors="memory"), ELEMENTS).close()
    assert list((tmp_path / "vectors").iterdir()) == []


def test_vectors_that_memory_does_not_hold_are_refused_with_the_way_out() -> None:
    check_memory(12 * GIB, 12 * GIB)
    with pytest.raises(ConfigError) as raised:
        check_memory(12 * GIB, 12 * GIB - 1)
    assert raised.value.field == "store.vectors"
    assert raised.value.problem == "the model's vectors take 12.9 GB, and 12.9 GB of memory are to be had"
    assert 'vectors = "disk"' in raised.value.fix


def test_the_memory_that_is_to_be_had_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    little = MachineMemory(total_bytes=GIB, available_bytes=12 * ELEMENTS - 1)
    monkeypatch.setattr(state_vectors, "see_memory", lambda: little)
    with pytest.raises(ConfigError, match="of memory are to be had"):
        allocate_vectors(make_config(tmp_path, vectors="memory"), ELEMENTS)
    allocate_vectors(make_config(tmp_path, vectors="memory", role="bootstrap"), ELEMENTS).close()
    allocate_vectors(make_config(tmp_path, vectors="disk"), ELEMENTS).close()


def test_vectors_leave_the_least_free_space(tmp_path: Path) -> None:
    config = make_config(tmp_path, vectors="disk", free_gib_min=2.0)
    check_disk(config, GIB, 3 * GIB)
    with pytest.raises(ConfigError) as raised:
        check_disk(config, GIB, 3 * GIB - 1)
    assert raised.value.field == "store.vectors"
    assert "take 1.1 GB" in raised.value.problem and "store.free_gib_min = 2 GiB stay free" in raised.value.problem
    assert "--data-dir" in raised.value.fix
    with pytest.raises(ConfigError, match="stay free"):
        allocate_vectors(make_config(tmp_path, vectors="disk", free_gib_min=1 << 20), ELEMENTS)
    assert list_mapped(tmp_path) == []


def test_a_disk_that_is_full_all_the_same_is_a_clear_error(tmp_path: Path) -> None:
    # The momentum would fit, base and local parameters do not.
    with small_files(4 * ELEMENTS), pytest.raises(ConfigError, match="cannot be allocated") as raised:
        allocate_vectors(make_config(tmp_path, vectors="disk"), ELEMENTS)
    assert raised.value.field == "store.vectors" and "make space" in raised.value.fix
    assert list((tmp_path / "vectors").iterdir()) == []


def test_a_containers_limit_counts_as_its_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.node.machine_memory._LIMITS", {"": (tmp_path, "max"), "memory": (tmp_path, "limit")})
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert find_limits("0::/a/b\n") == [], "no limit is set"
    (tmp_path / "a" / "b" / "max").write_text("max\n")
    (tmp_path / "a" / "max").write_text("5000\n")
    (tmp_path / "limit").write_text("7000\n")
    assert find_limits("0::/a/b\n") == [5000], "of the group that it is in"
    assert find_limits("4:memory:/not/here\n3:cpu,cpuacct:/\n") == [7000], "a container's own group stands at the top"
    monkeypatch.setattr("shoal.node.machine_memory._TABLE", tmp_path / "table")
    (tmp_path / "table").write_text("0::/a\n")
    assert see_memory() == MachineMemory(total_bytes=5000, available_bytes=5000)
    (tmp_path / "table").unlink()
    assert see_memory().total_bytes > 2**20


def test_vectors_on_the_disk_are_told(status: Status) -> None:
    def show(vector_bytes: int) -> str:
        console = Console(file=io.StringIO(), width=160, record=True)
        console.print(render_status(replace(status, disk=replace(status.disk, vector_bytes=vector_bytes))))
        return " ".join(console.export_text().split())

    assert "vectors" not in show(0)
    assert "rounds from 60 on; the model's vectors lie there, too: 12.0 GB" in show(12_000_000_000)
