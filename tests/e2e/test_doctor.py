"""`shoal doctor` of real processes: beside a running daemon, without one, and with a bootstrap peer that is dead."""

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.swarm import Swarm, run

pytestmark = pytest.mark.alone

Rows = dict[str, list[dict[str, str]]]


@pytest.fixture
def swarm(tmp_path: Path) -> Iterator[Swarm]:
    made = Swarm(tmp_path, founders=2)
    yield made
    made.end()


def examine(*arguments: str, folder: Path) -> tuple[int, dict[str, Any], Rows]:
    """Of this folder, without a word to the router of the machine that runs the test, which may be busy."""
    config = folder / "doctor.toml"
    config.write_text("[nat]\nport_mapping = false\n")
    done = run("doctor", *arguments, "--data-dir", str(folder), "--config", str(config), "--within", "50", "--json")
    assert done.stderr == "", done.stderr
    report = json.loads(done.stdout)
    rows: Rows = {}
    for row in report["findings"]:
        rows.setdefault(row["check"], []).append(row)
        assert bool(row["next_step"]) == (row["verdict"] != "ok")
    assert done.returncode == (0 if report["can_take_part"] else 1)
    return done.returncode, report, rows


def test_doctor_of_a_swarm(swarm: Swarm) -> None:
    first = swarm.add("peer1").start("up", "--manifest", str(swarm.manifest))
    uri = first.ask().uri
    second = swarm.add("peer2").start("join", uri)
    swarm.wait("three rounds", lambda: min(first.round, second.round) >= 3)

    # Beside the running daemon.
    code, report, rows = examine(folder=second.folder)
    assert code == 0, report
    assert "in use by the running daemon" in rows["identity"][0]["text"]
    assert "round" in rows["daemon"][0]["text"]
    assert "the running daemon listens on" in rows["ports"][0]["text"]
    assert {"NAT", "gateway", "relay", "reachability"} <= rows.keys()

    # Without one: the other peer's folder is stopped, and the swarm is visited under its own key.
    assert second.leave() == 0
    dead = "/ip4/127.0.0.1/tcp/9/p2p/12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN"
    code, report, rows = examine(
        uri, "--bootstrap", dead, "--control-port", "0", "--tensor-port", "0",
        "--web-port", "0", folder=second.folder,
    )  # fmt: skip
    verdicts = {check: [row["verdict"] for row in found] for check, found in rows.items()}
    assert code == 0, report
    assert verdicts["bootstrap"].count("ok") >= 1
    assert any("was not reached" in row["text"] for row in rows["bootstrap"]), rows["bootstrap"]
    assert verdicts["DHT"] == ["ok"]
    assert verdicts["NAT"] == ["not checked"]
    assert verdicts["relay"] == ["ok"] and "gives places at a relay" in rows["relay"][0]["text"]
    assert rows["clock"][0]["text"].endswith("of 1 peer")
    assert "up " in rows["bandwidth"][0]["text"] and "unknown" not in rows["bandwidth"][0]["text"]
    first.kill()

    # Nobody is left.
    code, report, rows = examine("--web-port", "0", "--control-port", "0", folder=second.folder)
    assert code == 1, report
    assert rows["bootstrap"][0]["verdict"] == "problem"
    assert rows["DHT"][0]["verdict"] == "not checked"


def test_doctor_names_what_a_person_must_mend(tmp_path: Path) -> None:
    run("id", "--data-dir", str(tmp_path))
    (tmp_path / "identity.key").chmod(0o644)
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = str(holder.getsockname()[1])
        options = ["--tensor-host", "127.0.0.1", "--tensor-port", port, "--device", "cpu"]
        code, report, rows = examine(*options, folder=tmp_path)
    assert code == 1, report
    assert rows["identity"][0]["verdict"] == "problem" and "chmod 600" in rows["identity"][0]["next_step"]
    assert rows["configuration"][0]["verdict"] == "problem"
    taken = [row for row in rows["ports"] if row["verdict"] == "problem"]
    assert len(taken) == 1 and f"(process {os.getpid()})" in taken[0]["text"], rows["ports"]
    assert rows["bootstrap"][0]["verdict"] == "not checked"
