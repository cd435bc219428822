"""Two of four peers are gone and no round can be had: the others train on, mix in pairs, and are in rounds later."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal.node.archive import open_archive
from shoal.protocol.identity import parse_peer_id
from tests.e2e.swarm import DRAFT, Peer, Swarm, leave_together, run

PAIRS = 3


@pytest.fixture
def swarm(tmp_path: Path) -> Iterator[Swarm]:
    made = Swarm(tmp_path, founders=4, draft=DRAFT.replace("[training]\n", "[training]\ngossip_after_s = 1.0\n"))
    yield made
    made.end()


def tokens_of(peer: Peer) -> int:
    return peer.ask().training.tokens


def has_mixed(peer: Peer, times: int) -> bool:
    status = peer.status()
    return status is not None and status.training.pairs_mixed >= times


def test_peers_without_a_quorum_mix_in_pairs_and_are_in_rounds_again(swarm: Swarm) -> None:
    first = swarm.add("peer1").start("up", "--manifest", str(swarm.manifest))
    uri = first.ask().uri
    second, third, fourth = (swarm.add(f"peer{number}").start("join", uri) for number in (2, 3, 4))
    everybody = (first, second, third, fourth)
    swarm.wait("two rounds", lambda: min(peer.round for peer in everybody) >= 2)

    third.kill()
    fourth.kill()
    swarm.wait("the two that are left have mixed", lambda: all(has_mixed(peer, PAIRS) for peer in (first, second)))
    stood_at = first.head
    assert second.head == stood_at, "no round was certified meanwhile"
    assert tokens_of(first) > 0
    for peer, other in ((first, second), (second, first)):
        assert f"no_quorum: mixed with {other.name}" in peer.log()
        assert "pairs without a quorum" in run("status", "--data-dir", str(peer.folder)).stdout

    third.start("join", uri)
    swarm.wait("rounds go on", lambda: min(peer.round for peer in (first, second, third)) >= stood_at + 3)
    swarm.wait("with both", lambda: all(peer.contributes_after(stood_at) for peer in (first, second)))
    mixed = first.ask().training.pairs_mixed
    swarm.wait("two more rounds", lambda: first.round >= stood_at + 5)
    assert first.ask().training.pairs_mixed == mixed, "with a quorum nobody mixes"
    assert leave_together(first, second, third) == [0] * 3, "\n".join(peer.log()[-2000:] for peer in everybody)
    swarm.check_roots()

    # What was trained without a quorum is in the first rounds that came after it: more steps than a round had before.
    for peer in (first, second):
        assert find_most_steps(peer, range(stood_at + 1, stood_at + 4)) > find_most_steps(peer, range(1, stood_at + 1))
    for peer in everybody:
        assert "Traceback" not in peer.log(), peer.log()


def find_most_steps(peer: Peer, rounds: range) -> int:
    """Of one of this peer's contributions to these rounds."""
    me = parse_peer_id(run("id", "--data-dir", str(peer.folder)).stdout.strip())
    with open_archive(peer.folder) as archive:
        members = [member for number in rounds for member in archive.certificate(number).result.members]
    return max(member.steps for member in members if member.peer == me)
