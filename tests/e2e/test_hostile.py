"""A swarm of real processes among clients that mean ill: rounds go on, and whoever means well still comes in."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal.node.doctor_machine import list_listeners
from tests.e2e.hostile_clients import KINDS, open_flood
from tests.e2e.swarm import Peer, Swarm

pytestmark = pytest.mark.alone

CLIENTS = 120
NAMES = {"peer1", "peer2", "peer3"}


@pytest.fixture
def swarm(tmp_path: Path) -> Iterator[Swarm]:
    made = Swarm(tmp_path, founders=2)
    yield made
    made.end()


def find_ports(peer: Peer) -> list[tuple[str, int]]:
    """The control and the tensor port of a daemon."""
    assert peer.pid is not None
    web = int((peer.folder / "running.json").read_text().rpartition(":")[2].strip('"}'))
    return [(host, port) for host, port in list_listeners(peer.pid) if port != web]


def names_seen(peer: Peer) -> set[str]:
    return {row.name for row in peer.ask().peers if row.alive}


def test_rounds_go_on_and_a_newcomer_comes_in_among_hostile_clients(swarm: Swarm) -> None:
    first = swarm.add("peer1").start("up", "--manifest", str(swarm.manifest))
    uri = first.ask().uri
    second = swarm.add("peer2").start("join", uri)
    swarm.wait("two rounds", lambda: min(first.round, second.round) >= 2)
    targets = [*find_ports(first), *find_ports(second)]
    assert len(targets) == 4
    with open_flood(CLIENTS, targets) as flood:
        at = first.head
        swarm.wait("three rounds with both", lambda: second.contributes_after(at + 2) and first.round > at + 2)
        fresh = swarm.add("peer3").start("join", uri)
        swarm.wait("a newcomer catches up and contributes", lambda: fresh.contributes_after(at + 3))
        swarm.wait("each sees the others", lambda: all(names_seen(peer) == NAMES for peer in swarm.peers))
    # Every kind came, and none was let stay.
    assert all(flood.counts[kind] > 0 and flood.counts[f"{kind} hung up on"] > 0 for kind in KINDS), flood.counts
    for peer in swarm.peers:
        assert "Traceback" not in peer.log(), peer.log()
    swarm.check_roots()
