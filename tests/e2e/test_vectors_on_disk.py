"""A peer whose vectors lie on the disk: rounds as everybody else, over kill -9, and refused where the disk is short."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.e2e.swarm import COMMAND_S, SHOAL, Peer, Swarm, leave_together
from tests.e2e.test_full_disk import LAUNCH, SIZE_MIB, find_launcher


@pytest.fixture
def swarm(tmp_path: Path) -> Iterator[Swarm]:
    made = Swarm(tmp_path, founders=2)
    yield made
    made.end()


def count_mapped(pid: int, folder: Path) -> int:
    """A process's mappings of files without a name that were made there."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return sum(str(folder) in line and line.endswith("(deleted)") for line in lines)


def find_trainer(peer: Peer) -> psutil.Process:
    (found,) = [
        child
        for child in psutil.Process(peer.pid).children()
        if any("training.worker" in word for word in child.cmdline())
    ]
    return found


def test_rounds_with_vectors_on_the_disk_over_kill_9(swarm: Swarm) -> None:
    disk = swarm.add("peer1")
    disk.options += ["--vectors", "disk"]
    disk.start("up", "--manifest", str(swarm.manifest))
    memory = swarm.add("peer2").start("join", disk.ask().uri)
    swarm.wait("two rounds", lambda: min(disk.round, memory.round) >= 2)

    vectors = disk.folder / "vectors"
    trainer = find_trainer(disk)
    assert disk.pid is not None and memory.pid is not None
    assert count_mapped(disk.pid, vectors) == 2, "base with local parameters, and momentum"
    assert count_mapped(trainer.pid, vectors) == 1
    assert count_mapped(memory.pid, memory.folder / "vectors") == 0
    assert disk.ask().disk.vector_bytes > 0 == memory.ask().disk.vector_bytes

    disk.kill()
    psutil.wait_procs([trainer], timeout=60)
    assert list(vectors.iterdir()) == [], "what was mapped went with the processes"
    (vectors / "tmp1234").write_bytes(b"left by a file system that knows no files without a name")
    at = memory.round
    disk.start("up")
    swarm.wait("its work is in a round again", lambda: disk.contributes_after(at))
    assert list(vectors.iterdir()) == []
    swarm.wait("another round", lambda: min(disk.round, memory.round) >= at + 2)
    swarm.check_roots()
    assert leave_together(disk, memory) == [0, 0], disk.log()[-2000:]
    for peer in (disk, memory):
        assert "Traceback" not in peer.log(), peer.log()


def test_a_disk_without_room_is_refused_before_anything_starts(swarm: Swarm) -> None:
    peer, config = swarm.folder / "peer1", swarm.folder / "config.toml"
    (swarm.folder / "disk").mkdir()
    config.write_text('[store]\nvectors = "disk"\nfree_gib_min = 0.05\n')  # 51 MiB, of a disk of SIZE_MIB
    launcher = [*find_launcher(), "sh", "-c", LAUNCH.format(size=SIZE_MIB), str(peer), str(swarm.folder / "disk")]
    words = ["up", "--manifest", str(swarm.manifest), "--config", str(config), "--data-dir", str(peer)]
    ports = ["--web-port", "0", "--control-port", "0", "--tensor-port", "0"]
    ended = subprocess.run(
        [*launcher, *SHOAL, *words, *ports], capture_output=True, text=True, timeout=COMMAND_S, check=False
    )
    assert ended.returncode == 1, ended.stderr
    assert "store.vectors" in ended.stderr and "store.free_gib_min = 0.05 GiB stay free" in ended.stderr, ended.stderr
    assert "Traceback" not in ended.stderr
