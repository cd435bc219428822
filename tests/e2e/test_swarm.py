"""A whole swarm of real processes: train, kill, restart, join, leave; one state root a round throughout."""

import json
import signal
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal.node.export import read_certified_model
from tests.e2e.swarm import Peer, Swarm, run


@pytest.fixture
def swarm(tmp_path: Path) -> Iterator[Swarm]:
    made = Swarm(tmp_path, founders=3)
    yield made
    made.end()


def test_swarm_survives_kill_restart_join_and_leave(swarm: Swarm) -> None:
    bootstrap = swarm.add("bootstrap").start("up", "--role", "bootstrap", "--manifest", str(swarm.manifest))
    swarm.wait("the bootstrap peer answers", lambda: bootstrap.status() is not None)
    status = bootstrap.status()
    assert status is not None
    uri = status.uri
    first, second, third = (swarm.add(f"peer{number}").start("join", uri) for number in (1, 2, 3))
    swarm.wait("three rounds", lambda: min(first.round, second.round, third.round) >= 3)

    third.kill()
    at = first.round
    swarm.wait("two go on without the third", lambda: min(first.round, second.round) >= at + 3)

    # Without any bootstrap peer: the manifest and the peer book are on its disk.
    third.start("up")
    swarm.wait("the killed one is back and contributes", lambda: third.contributes_after(at + 2))
    assert "equivocation" not in third.log() and "one_vote" not in third.log()

    fresh = swarm.add("peer4").start("join", uri)
    swarm.wait("a fresh one catches up and contributes", lambda: fresh.contributes_after(at + 2))

    trainers = [first, second, third, fresh]
    metrics = _get(first.folder, "/metrics")
    assert "shoal_rounds_certified_total" in metrics and "shoal_peers" in metrics
    assert json.loads(_get(first.folder, "/healthz"))

    assert fresh.leave() == 0, fresh.log()[-2000:]
    at = first.round
    swarm.wait("the others go on undisturbed", lambda: min(peer.round for peer in trainers[:3]) >= at + 2)
    for peer in (first, second, third):
        assert peer.process is not None
        peer.process.send_signal(signal.SIGINT)
    for peer in (first, second, third):
        assert peer.process is not None and peer.process.wait(40) == 0, peer.log()[-2000:]
    assert bootstrap.leave() == 0
    swarm.check_roots()
    assert _children_of(swarm) == []

    models = [read_certified_model(peer.folder) for peer in (first, second)]
    out = swarm.folder / "model.safetensors"
    done = run("export", "--out", str(out), "--data-dir", str(first.folder))
    assert done.returncode == 0 and out.stat().st_size > 4 * models[0].params.size
    done = run("evaluate", str(out), "--text", str(swarm.folder / "text.py"), "--windows", "8", "--json")
    (measured,) = json.loads(done.stdout)["models"]
    assert measured["loss_nats"] < 2.0, "it has learned this text"
    for peer in swarm.peers:
        assert "Traceback" not in peer.log(), peer.log()


def test_trainer_crash_costs_no_round(swarm: Swarm) -> None:
    first = swarm.add("peer1").start("up", "--manifest", str(swarm.manifest))
    swarm.wait("the first peer answers", lambda: first.status() is not None)
    status = first.status()
    assert status is not None
    second = swarm.add("peer2").start("join", status.uri)
    swarm.wait("two rounds", lambda: min(first.round, second.round) >= 2)
    killed = _kill_trainer_of(second.process)
    assert killed
    swarm.wait("the crash is noticed", lambda: _restarts(second) == 1)
    at = first.round
    swarm.wait("rounds go on, with both", lambda: second.contributes_after(at + 1) and first.contributes_after(at + 1))
    assert _restarts(second) == 1
    swarm.check_roots()


def _restarts(peer: Peer) -> int:
    status = peer.status()
    return -1 if status is None else status.training.restarts


def _get(folder: Path, path: str) -> str:
    web = json.loads((folder / "running.json").read_text())["web"]
    with urllib.request.urlopen(f"http://{web}{path}", timeout=5) as answer:
        text: str = answer.read().decode()
    return text


def _kill_trainer_of(process: "subprocess.Popen[bytes] | None") -> bool:
    assert process is not None
    found = subprocess.run(["pkill", "-9", "-P", str(process.pid), "-f", "training.worker"], check=False)
    return found.returncode == 0


def _children_of(swarm: Swarm) -> list[str]:
    """Processes that name the test's folder in their command line, or whose parent was one of its daemons."""
    listed = subprocess.run(["ps", "-eo", "ppid=,args="], capture_output=True, text=True, check=True).stdout
    pids = {str(peer.process.pid) for peer in swarm.peers if peer.process is not None}
    return [line for line in listed.splitlines() if line.split()[0] in pids]
