"""What one member has measured of the base every member shows, with who it was."""

import json
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal.node.status import Measured
from tests.e2e.swarm import DRAFT, Peer, Swarm, run

EVERY = 2


@pytest.fixture
def swarm(tmp_path: Path) -> Iterator[Swarm]:
    made = Swarm(tmp_path, founders=3, draft=DRAFT.replace("[training]\n", f"[training]\nevaluate_every = {EVERY}\n"))
    yield made
    made.end()


def measured_of(peer: Peer) -> dict[int, Measured]:
    """By round, without the name: each peer calls itself otherwise."""
    return {one.round: one for one in peer.ask().measured}


def fetch(peer: Peer, path: str) -> str:
    web = json.loads((peer.folder / "running.json").read_text())["web"]
    with urllib.request.urlopen(f"http://{web}{path}", timeout=10) as answer:
        text: str = answer.read().decode()
        return text


def read_metric(peer: Peer, name: str) -> float:
    found = re.search(rf"(?m)^{name} (\S+)$", fetch(peer, "/metrics"))
    assert found is not None, name
    return float(found[1])


@pytest.mark.long
def test_all_show_the_same_newest_measurement_and_its_author(swarm: Swarm) -> None:
    first = swarm.add("peer1").start("up", "--manifest", str(swarm.manifest))
    uri = first.ask().uri
    peers = [first, *(swarm.add(f"peer{number}").start("join", uri) for number in (2, 3))]

    def shared() -> list[int]:
        """Rounds that all of them show, the newest first."""
        shown = [measured_of(peer) for peer in peers]
        return sorted(set.intersection(*(set(one) for one in shown)), reverse=True)

    swarm.wait("two measurements are shown by all", lambda: len(shared()) >= 2)
    newest = shared()[0]
    rows = [measured_of(peer)[newest] for peer in peers]
    assert newest % EVERY == 0
    assert len({(one.peer, one.loss, one.tokens) for one in rows}) == 1
    ids = {run("id", "--data-dir", str(peer.folder)).stdout.strip(): peer for peer in peers}
    author = ids[rows[0].peer]
    for peer, row in zip(peers, rows, strict=True):
        assert row.name == "this peer" if peer is author else row.name.startswith(author.name)
    said = re.search(rf"held-out loss of round {newest}: (\S+) nats a token", author.log())
    assert said is not None and rows[0].loss is not None
    assert f"{rows[0].loss:.4f}" == said[1], "what it says is what it has measured"
    assert all(f"held-out loss of round {newest}:" not in peer.log() for peer in peers if peer is not author)

    for peer in peers:
        assert read_metric(peer, "shoal_swarm_held_out_round") >= newest
        assert 0.0 < read_metric(peer, "shoal_swarm_held_out_loss") < 6.0
        assert re.search(r"swarm's held-out loss of round \d+ ", run("status", "--data-dir", str(peer.folder)).stdout)
        ledger = run("ledger", "show", "--data-dir", str(peer.folder)).stdout
        # The rounds go on meanwhile: whichever is the newest there, its author has said the same.
        shown = re.search(r"held out +round ([\d,]+): (\S+) nats a token.*\(measured by (\w+)\)", ledger)
        assert shown is not None, ledger
        number = int(shown[1].replace(",", ""))
        assert number >= newest and number % EVERY == 0
        assert f"held-out loss of round {number}: {shown[2]} nats a token" in ids[shown[3]].log()
        assert "Traceback" not in peer.log()
    swarm.check_roots()
