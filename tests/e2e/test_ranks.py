"""A peer whose trainer is two processes, in a swarm with one whose trainer is one: nobody but itself can tell."""

import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.swarm import Peer, Swarm

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc")


@pytest.fixture
def swarm(tmp_path: Path) -> Iterator[Swarm]:
    made = Swarm(tmp_path, founders=2)
    yield made
    made.end()


def list_processes(peer: Peer, module: str) -> list[int]:
    """Those of this module that live below the peer's daemon."""
    found, parents = [], [peer.pid]
    while parents:
        parent = parents.pop()
        try:
            children = [int(word) for word in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]
            found += [pid for pid in children if module.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()]
        except (FileNotFoundError, ProcessLookupError):
            continue
        parents += children
    return found


def is_alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def device_of(peer: Peer) -> str:
    return peer.ask().training.device


def test_a_peer_of_two_processes_contributes_and_survives_the_death_of_one(swarm: Swarm) -> None:
    first = swarm.add("peer1").start("up", "--manifest", str(swarm.manifest))
    uri = first.ask().uri
    second = swarm.add("peer2")
    (second.folder / "config.toml").write_text("[trainer]\nprocesses = 2\n")
    second.start("join", uri, "--config", str(second.folder / "config.toml"))
    swarm.wait("two rounds with both", lambda: second.contributes_after(1))
    assert (device_of(first), device_of(second)) == ("cpu", "cpu (2 processes)")

    (follower,) = list_processes(second, "training.follower")
    at = first.head
    os.kill(follower, signal.SIGKILL)
    swarm.wait("its trainer is started again and contributes", lambda: second.contributes_after(at + 1))
    told = re.search(r"rank_lost: rank 1 \(process (\d+)\) was killed by SIGKILL", second.log())
    assert told is not None and int(told[1]) == follower
    swarm.check_roots()

    pids = [*list_processes(second, "training.worker"), *list_processes(second, "training.follower")]
    assert len(pids) == 2 and follower not in pids
    second.kill()
    swarm.wait("none of its processes is left", lambda: not any(map(is_alive, pids)))
    assert "Traceback" not in first.log() + second.log()
