"""Vectors in files without a name: reserved, private to their user, and gone with whoever mapped them."""

import errno
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from shoal.node.vector_files import map_vector, open_reserved, remove_leftovers

ELEMENTS = 1 << 20  # 4 MiB
SIZE_BYTES = 4 * ELEMENTS


def list_mapped(folder: Path) -> list[str]:
    """This process's mappings of files that lie in a folder, or did."""
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]


@contextmanager
def small_files(size_bytes: int) -> Iterator[None]:
    """No file of this process may be larger: what a full disk does, to this process alone."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_vector_is_zeros_in_a_reserved_file_that_nobody_else_can_open(tmp_path: Path) -> None:
    folder = tmp_path / "vectors"
    descriptor = open_reserved(SIZE_BYTES, folder)
    try:
        about = os.fstat(descriptor)
        assert about.st_size == SIZE_BYTES
        assert 512 * about.st_blocks >= SIZE_BYTES, "every block has its place on the disk"
        assert about.st_nlink == 0 and list(folder.iterdir()) == []
        assert (about.st_mode & 0o777, folder.stat().st_mode & 0o777) == (0o600, 0o700)
    finally:
        os.close(descriptor)


def test_a_vector_lives_as_long_as_a_view_of_it(tmp_path: Path) -> None:
    vector = map_vector(ELEMENTS, tmp_path)
    assert vector.dtype == np.float32 and vector.shape == (ELEMENTS,) and not vector.any()
    part = vector[-5:]
    part[:] = 3.0
    assert vector[-6:].tolist() == [0.0] + [3.0] * 5
    del vector
    assert len(list_mapped(tmp_path)) == 1 and part.tolist() == [3.0] * 5
    del part
    assert list_mapped(tmp_path) == []


def test_without_a_folder_it_is_memory() -> None:
    descriptor = open_reserved(100)
    assert "memfd" in Path(f"/proc/self/fd/{descriptor}").readlink().name
    assert os.pread(descriptor, 200, 0) == bytes(100)
    os.close(descriptor)


def test_what_the_disk_does_not_take_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    with small_files(SIZE_BYTES - 1), pytest.raises(OSError) as raised:
        map_vector(ELEMENTS, tmp_path)
    assert raised.value.errno in (errno.EFBIG, errno.ENOSPC)
    assert sorted(os.listdir("/proc/self/fd")) == before and list(tmp_path.iterdir()) == []
    with small_files(SIZE_BYTES):
        assert map_vector(ELEMENTS, tmp_path).size == ELEMENTS


def test_kill_9_leaves_no_file_behind(tmp_path: Path) -> None:
    code = (
        "import pathlib, sys; from shoal.node.vector_files import map_vector;"
        f"v = map_vector({ELEMENTS}, pathlib.Path(sys.argv[1])); v.fill(1); print('made', flush=True); input()"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdin=-1, stdout=-1, text=True) as child:
        assert child.stdout is not None and child.stdout.readline() == "made\n"
        assert str(tmp_path) in Path(f"/proc/{child.pid}/maps").read_text()
        child.send_signal(signal.SIGKILL)
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_file_systems_that_know_no_such_files_are_removed(tmp_path: Path) -> None:
    remove_leftovers(tmp_path / "vectors")
    (tmp_path / "vectors").mkdir()
    (tmp_path / "vectors" / "tmp1234").write_bytes(bytes(10))
    remove_leftovers(tmp_path / "vectors")
    assert list((tmp_path / "vectors").iterdir()) == []
