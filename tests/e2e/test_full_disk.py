"""A disk that fills up: its peer stops voting, the others go on, and once there is space it votes again by itself."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.swarm import Peer, Swarm

SIZE_MIB = 48
CONFIG = "[store]\nfree_gib_min = 0.01\n"
# A small file system that nobody but this peer sees and that goes with it. What the folder held is taken along.
LAUNCH = """\
mount -t tmpfs -o size={size}m tmpfs "$1" && cp -a "$0"/. "$1"/ && mount --bind "$1" "$0" && shift && exec "$@"
"""


@pytest.fixture
def swarm(tmp_path: Path) -> Iterator[Swarm]:
    made = Swarm(tmp_path, founders=3)
    yield made
    made.end()


def find_launcher() -> list[str]:
    """The command that makes a mount namespace; the test cannot be made where there is none."""
    words = ["unshare", "--mount"] + ([] if os.geteuid() == 0 else ["--map-root-user"])
    if shutil.which("unshare") is None:
        pytest.skip("no small file system can be mounted here: there is no `unshare`")
    probe = [*words, "sh", "-c", "mount -t tmpfs -o size=1m tmpfs /mnt"]
    tried = subprocess.run(probe, capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"no small file system can be mounted here: {tried.stderr.strip()}")
    return words


def start_on_small_disk(peer: Peer, uri: str) -> None:
    """The peer's folder is a file system of SIZE_MIB from now on."""
    disk, config = peer.swarm.folder / "disk", peer.swarm.folder / "config.toml"
    disk.mkdir()
    config.write_text(CONFIG)
    peer.log_file = peer.swarm.folder / f"{peer.name}.log"
    peer.options += ["--config", str(config)]
    peer.launcher = [*find_launcher(), "sh", "-c", LAUNCH.format(size=SIZE_MIB), str(peer.folder), str(disk)]
    peer.start("join", uri)
    # Its mounts are its own; this is how others look at them.
    peer.folder = Path(f"/proc/{peer.pid}/root{peer.folder}")


def fill(ballast: Path) -> None:
    """Write until the disk takes nothing more."""
    with ballast.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12):
            try:
                while file.write(bytes(size)) == size:
                    pass
            except OSError:
                continue


def fails(peer: Peer) -> bool:
    return peer.ask().disk.failing


def test_a_peer_whose_disk_was_full_votes_again_by_itself(swarm: Swarm) -> None:
    first = swarm.add("peer1").start("up", "--manifest", str(swarm.manifest))
    uri = first.ask().uri
    second = swarm.add("peer2").start("join", uri)
    third = swarm.add("peer3")
    start_on_small_disk(third, uri)
    everybody = (first, second, third)
    swarm.wait("two rounds", lambda: min(peer.round for peer in everybody) >= 2)

    fill(third.folder / "ballast")
    swarm.wait("the peer says that its disk is full", lambda: fails(third))
    status = third.ask()
    stopped_at = status.round.round - 1
    assert [one for one in status.warnings if one.startswith("disk_full: ")], status.warnings
    swarm.wait("the others go on", lambda: min(first.round, second.round) >= stopped_at + 3)
    assert fails(third) and third.head <= stopped_at + 1, "it still answers, and takes no part"

    (third.folder / "ballast").unlink()
    swarm.wait("the peer says that it votes again", lambda: not fails(third))
    assert "disk_full is over: " in third.log()
    at = first.head
    swarm.wait("its work is in a round again", lambda: third.contributes_after(at))
    second.kill()
    at = first.head
    swarm.wait("its vote is one of the two that are needed", lambda: min(first.round, third.round) >= at + 3)
    for peer in (first, third):
        assert peer.leave() == 0, peer.log()[-2000:]
    swarm.check_roots()
    for peer in everybody:
        assert "Traceback" not in peer.log(), peer.log()
