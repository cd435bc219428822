"""Swarms whose peers train on beside the exchange: of one fragment in turn with outer Adam, and by estimates; kill,
catch-up, verification, export."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal.node.export import read_certified_model
from tests.e2e.swarm import DRAFT, Swarm, run

FRAGMENTS = 3
STREAMING = DRAFT.replace("[training]\n", '[training]\nstrategy = "overlapped"\noverlap_steps = 10\n').replace(
    "[rounds]\n", f"[rounds]\nfragments = {FRAGMENTS}\n"
)
STREAMING += '[outer]\noptimizer = "adam"\nlearning_rate = 0.03\nmomentum = 0.9\n'
EAGER = DRAFT.replace("[training]\n", '[training]\nstrategy = "eager"\noverlap_steps = 10\n')
EAGER += "[outer]\nmomentum_every = 2\nmomentum_clip = 0.1\n"


@pytest.fixture
def swarm(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Swarm]:
    made = Swarm(tmp_path, founders=2, draft=request.param)
    yield made
    made.end()


WAYS = [pytest.param(STREAMING, id="fragments and Adam"), pytest.param(EAGER, id="eager", marks=pytest.mark.long)]


@pytest.mark.parametrize("swarm", WAYS, indirect=True)
def test_a_swarm_that_trains_on_survives_a_kill_and_takes_a_newcomer_in(swarm: Swarm) -> None:
    first = swarm.add("peer1").start("up", "--manifest", str(swarm.manifest))
    uri = first.ask().uri
    second = swarm.add("peer2").start("join", uri)
    swarm.wait("each fragment had its turn", lambda: min(first.round, second.round) >= FRAGMENTS + 1)
    at = first.head
    second.kill()
    second.start("up")
    swarm.wait("the killed one contributes again", lambda: second.contributes_after(at))
    fresh = swarm.add("peer3").start("join", uri)
    at = first.head
    swarm.wait("a newcomer catches up and contributes", lambda: fresh.contributes_after(at))
    for peer in (fresh, second, first):
        assert peer.leave() == 0, peer.log()[-2000:]
        assert "Traceback" not in peer.log(), peer.log()
    swarm.check_roots()

    model = read_certified_model(first.folder)
    parts = -(-model.params.size // 4096)
    assert parts > FRAGMENTS
    verified = run("verify", "--all", "--data-dir", str(first.folder))
    assert verified.returncode == 0, verified.stdout + verified.stderr
    assert verified.stdout.splitlines()[-1].endswith(" rounds: holds"), "each with the parts that its round exchanged"
    out = swarm.folder / "model.safetensors"
    assert run("export", "--out", str(out), "--data-dir", str(first.folder)).returncode == 0
    assert out.stat().st_size > 4 * model.params.size
