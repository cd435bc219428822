"""A whole swarm of real processes: train, kill, restart, join, leave; one state root a round throughout."""

import json
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal.node.export import read_certified_model
from tests.e2e.swarm import Peer, Swarm, leave_together, run


@pytest.fixture
def swarm(tmp_path: Path) -> Iterator[Swarm]:
    made = Swarm(tmp_path, founders=3)
    yield made
    made.end()


def test_swarm_survives_kill_restart_join_and_leave(swarm: Swarm) -> None:
    bootstrap = swarm.add("bootstrap").start("up", "--role", "bootstrap", "--manifest", str(swarm.manifest))
    uri = bootstrap.ask().uri
    first, second, third = (swarm.add(f"peer{number}").start("join", uri) for number in (1, 2, 3))
    swarm.wait("three rounds", lambda: min(first.round, second.round, third.round) >= 3)

    third.kill()
    at = first.head
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
    at = first.head
    swarm.wait("the others go on undisturbed", lambda: min(peer.round for peer in trainers[:3]) >= at + 2)
    swarm.wait("they have learned this text", lambda: all(has_learned(peer) for peer in trainers[:3]))
    codes = leave_together(first, second, third)
    assert codes == [0, 0, 0], "\n".join(peer.log()[-2000:] for peer in trainers[:3])
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
    second = swarm.add("peer2").start("join", first.ask().uri)
    swarm.wait("two rounds", lambda: min(first.round, second.round) >= 2)
    killed = _kill_trainer_of(second.process)
    assert killed
    swarm.wait("the crash is noticed", lambda: _restarts(second) == 1)
    at = first.head
    swarm.wait("rounds go on, with both", lambda: second.contributes_after(at + 1) and first.contributes_after(at + 1))
    assert _restarts(second) == 1
    swarm.check_roots()


def has_learned(peer: Peer) -> bool:
    """How many rounds that takes is the machine's affair: rounds go by time, and a busy one makes few steps in each."""
    loss = peer.ask().training.loss_last
    return loss is not None and loss < 1.0


def _restarts(peer: Peer) -> int:
    return peer.ask().training.restarts


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
