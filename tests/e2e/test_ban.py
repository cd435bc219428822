"""The owner bans a peer of a running swarm: everybody hangs up on it, the others go on, and it is let back in."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.swarm import Peer, Swarm, run


@pytest.fixture
def swarm(tmp_path: Path) -> Iterator[Swarm]:
    made = Swarm(tmp_path, founders=4)
    yield made
    made.end()


def decree(folder: Path, *words: str) -> None:
    """The owner's word, in the folder of a stopped peer."""
    done = run("swarm", *words, "--data-dir", str(folder))
    assert done.returncode == 0, done.stderr


def others_of(peer: Peer) -> set[str]:
    return {row.name for row in peer.ask().peers if row.alive and not row.me}


def test_a_banned_peer_is_hung_up_on_by_everybody_and_comes_back_when_it_is_unbanned(swarm: Swarm) -> None:
    first = swarm.add("peer1").start("up", "--manifest", str(swarm.manifest))
    uri = first.ask().uri
    second, third, fourth = (swarm.add(f"peer{number}").start("join", uri) for number in (2, 3, 4))
    swarm.wait("two rounds", lambda: min(peer.round for peer in (first, second, third, fourth)) >= 2)
    banned = third.ask().peer

    # The owner's key lies in the folder of the first peer. Without it and the banned one two of three voters go on.
    assert first.leave() == 0, first.log()[-2000:]
    decree(first.folder, "ban", banned, "--reason", "it lies")
    again = run("swarm", "ban", banned, "--reason", "again", "--data-dir", str(first.folder))
    assert again.returncode == 0 and "is banned already (it lies): decree 0 of the owner" in again.stdout
    first.start("up")
    swarm.wait("everybody has hung up on it", lambda: all("banned" in peer.log() for peer in (first, second, fourth)))
    swarm.wait("it is told", lambda: "has banned this peer by decree" in third.log())
    at = max(first.head, second.head)
    swarm.wait("the others go on without it", lambda: min(first.round, second.round, fourth.round) >= at + 2)
    assert third.log().count("has banned this peer by decree") == 1, "once"
    assert third.log().count("catching up") <= 1, "and it does not try again at once"
    assert "peer3" not in others_of(first) | others_of(second) | others_of(fourth)

    assert first.leave() == 0
    decree(first.folder, "unban", banned)
    first.start("up")
    at = second.head
    swarm.wait("it is let in again and contributes", lambda: third.contributes_after(at + 1))
    swarm.check_roots()
