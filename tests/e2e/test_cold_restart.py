"""A whole swarm from one surviving disk: everybody is killed, two folders are gone, the third one is enough."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal.node.archive import open_archive
from shoal.protocol.messages import digest_record
from tests.e2e.swarm import DRAFT, Peer, Swarm, leave_together, run


@pytest.fixture(params=["owner", "timer"])
def way(request: pytest.FixtureRequest) -> str:
    """How the swarm gets new voters where two of three are gone for good."""
    chosen: str = request.param
    return chosen


@pytest.fixture
def swarm(way: str, tmp_path: Path) -> Iterator[Swarm]:
    # The first peer is alone until the second is up: that must not take it for what is left of a swarm.
    timer = "reroot_after_s = 15.0\n" if way == "timer" else ""
    made = Swarm(tmp_path, founders=3, draft=DRAFT + timer)
    yield made
    made.end()


def digests_of(peer: Peer, last: int) -> list[str]:
    """The certified results of the rounds up to `last`, of a peer that runs or not."""
    with open_archive(peer.folder) as archive:
        return [digest_record(archive.certificate(number).result).hex() for number in range(1, last + 1)]


def test_a_swarm_comes_back_from_one_disk(swarm: Swarm, way: str) -> None:
    first = swarm.add("peer1").start("up", "--manifest", str(swarm.manifest))
    uri = first.ask().uri
    second, third = (swarm.add(f"peer{number}").start("join", uri) for number in (2, 3))
    swarm.wait("some rounds", lambda: min(peer.round for peer in (first, second, third)) >= 5)
    for peer in (first, second, third):
        peer.kill()
    for peer in (second, third):
        swarm.peers.remove(peer)
        shutil.rmtree(peer.folder)

    checked = run("verify", "--all", "--data-dir", str(first.folder))
    assert checked.returncode == 0, checked.stdout + checked.stderr
    with open_archive(first.folder) as archive:
        stood_at = archive.certificates.newest
        before = archive.rebuild(stood_at).head
    certified = digests_of(first, stood_at)
    assert stood_at >= 5

    if way == "owner":
        voter = run("id", "--data-dir", str(first.folder)).stdout.strip()
        done = run("swarm", "reroot", "--data-dir", str(first.folder), "--voter", voter)
        assert done.returncode == 0 and f"round      {stood_at + 1} " in done.stdout, done.stderr
    first.start("up")
    uri = first.ask().uri
    fourth = swarm.add("peer4").start("up", "--manifest", str(swarm.manifest), "--bootstrap", bootstrap_of(uri))
    fifth = swarm.add("peer5").start("join", uri)
    everybody = (first, fourth, fifth)
    swarm.wait("rounds go on", lambda: min(peer.round for peer in everybody) >= stood_at + 4)
    swarm.wait("with everybody", lambda: all(peer.contributes_after(stood_at) for peer in everybody))

    # Beside the running daemon: nothing that was certified is lost, and what is new follows from it.
    assert digests_of(first, stood_at) == certified
    checked = run("verify", "--data-dir", str(first.folder), "--round", str(stood_at), "--round", str(stood_at + 2))
    assert checked.returncode == 0, checked.stdout + checked.stderr
    with open_archive(first.folder) as archive:
        assert archive.rebuild(stood_at).head == before
        named = archive.certificate(stood_at + 1).result
        assert (named.previous, named.base_root, named.parts) == (before.digest, before.state_root, ())
    assert leave_together(*everybody) == [0, 0, 0], "\n".join(peer.log()[-2000:] for peer in everybody)
    swarm.check_roots()
    assert digests_of(fourth, stood_at) == certified, "a newcomer has the whole log"
    assert "Traceback" not in "".join(peer.log() for peer in everybody)


def bootstrap_of(uri: str) -> str:
    return uri.partition("?bootstrap=")[2].partition("&")[0]
