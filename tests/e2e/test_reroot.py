"""A quorum that is gone for good: the owner names new voters; and when the old ones are back, the heavier log stays."""

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal.node.archive import open_archive
from shoal.protocol.lineage import weigh
from shoal.protocol.quorum import is_reroot
from tests.e2e.swarm import DRAFT, Peer, Swarm, leave_together, run

REROOT_AFTER_S = 30.0


@pytest.fixture
def swarm(tmp_path: Path) -> Iterator[Swarm]:
    made = Swarm(tmp_path, founders=3)
    yield made
    made.end()


def peer_id(peer: Peer) -> str:
    return run("id", "--data-dir", str(peer.folder)).stdout.strip()


def weigh_log(peer: Peer, after: int) -> int:
    """The certified tokens of the rounds behind this one, of a peer that runs or not."""
    with open_archive(peer.folder) as archive:
        numbers = range(after + 1, archive.certificates.newest + 1)
        return weigh([archive.certificate(number) for number in numbers]).tokens


def test_the_owner_names_new_voters_and_the_heavier_log_stays(swarm: Swarm) -> None:
    first = swarm.add("peer1").start("up", "--manifest", str(swarm.manifest))
    uri = first.ask().uri
    second, third = (swarm.add(f"peer{number}").start("join", uri) for number in (2, 3))
    swarm.wait("three rounds", lambda: min(peer.round for peer in (first, second, third)) >= 3)

    second.kill()
    third.kill()
    fourth = swarm.add("peer4").start("join", uri)
    swarm.wait("the two that are left say that there is no quorum", lambda: _lacks_quorum(first))
    swarm.wait("the newcomer has caught up", lambda: fourth.head == first.head)
    stood_at = first.head

    assert first.leave() == 0, first.log()[-2000:]
    voters = [word for peer in (first, fourth) for word in ("--voter", peer_id(peer))]
    refused = run("swarm", "reroot", "--data-dir", str(fourth.folder), *voters)
    assert refused.returncode == 1 and "owner.key does not exist" in refused.stderr
    done = run("swarm", "reroot", "--data-dir", str(first.folder), *voters)
    assert done.returncode == 0 and f"round      {stood_at + 1} " in done.stdout, done.stderr
    first.start("up")
    swarm.wait("rounds go on", lambda: min(first.round, fourth.round) >= stood_at + 4)
    assert leave_together(first, fourth) == [0, 0], first.log()[-2000:] + fourth.log()[-2000:]
    lighter = max(weigh_log(peer, stood_at) for peer in (first, fourth))

    # The old voters were not gone after all: they are a quorum of the old log, and certify more than the others did.
    second.start("up")
    uri = second.ask().uri
    third.start("join", uri)
    swarm.wait("the old log goes on", lambda: min(second.round, third.round) > stood_at)
    # By a wide margin: the others go on with theirs until they have met these.
    swarm.wait("and has twice the work in it", lambda: weigh_log(second, stood_at) > 2 * lighter)
    first.start("join", uri)
    fourth.start("join", uri)
    swarm.wait("the lighter log is given up", lambda: "going over to that of" in first.log() + fourth.log())
    everybody = (first, second, third, fourth)
    at = second.head
    swarm.wait("all go on together", lambda: min(peer.round for peer in everybody) >= at + 4)
    swarm.wait("the one that went over contributes", lambda: first.contributes_after(at))
    assert "going over to that of" not in second.log() + third.log()
    for peer in everybody:
        peer.roots = {number: root for number, root in peer.roots.items() if number > at}
    swarm.wait("a round that two of them show", lambda: _common_round(everybody))
    assert leave_together(*everybody) == [0] * 4, "\n".join(peer.log()[-2000:] for peer in everybody)
    swarm.check_roots()
    for peer in everybody:
        assert "Traceback" not in peer.log(), peer.log()


@pytest.mark.long
def test_a_peer_that_was_stopped_looks_for_the_others_before_it_declares(tmp_path: Path) -> None:
    swarm = Swarm(tmp_path, founders=2, draft=f"{DRAFT}reroot_after_s = {REROOT_AFTER_S}\n")
    try:
        first = swarm.add("peer1").start("up", "--manifest", str(swarm.manifest))
        swarm.wait("the first peer answers", lambda: first.status() is not None)
        status = first.status()
        assert status is not None
        second = swarm.add("peer2").start("join", status.uri)
        swarm.wait("two rounds", lambda: min(first.round, second.round) >= 2)
        second.kill()
        swarm.wait("the one that is left says that there is no quorum", lambda: _lacks_quorum(first))
        assert first.process is not None
        first.process.send_signal(signal.SIGSTOP)
        stopped_s = time.monotonic()
        swarm.wait("the timer is nearly over", lambda: time.monotonic() > stopped_s + REROOT_AFTER_S - 10.0)
        second.start("up")
        swarm.wait("the other one is back", lambda: second.status() is not None)
        swarm.wait("the timer would be over", lambda: time.monotonic() > stopped_s + REROOT_AFTER_S)
        at = second.round
        first.process.send_signal(signal.SIGCONT)
        swarm.wait("both go on together", lambda: min(first.round, second.round) >= at + 2)
        leave_together(first, second)
        for peer in (first, second):
            with open_archive(peer.folder) as archive:
                rounds = range(1, archive.certificates.newest + 1)
                assert not any(is_reroot(archive.certificate(number)) for number in rounds)
    finally:
        swarm.end()


def _lacks_quorum(peer: Peer) -> bool:
    status = peer.status()
    return status is not None and status.round.voters_live < status.round.votes_needed


def _common_round(peers: tuple[Peer, ...]) -> bool:
    for peer in peers:
        peer.status()
    counts = [number for peer in peers for number in peer.roots]
    return len(counts) > len(set(counts))
