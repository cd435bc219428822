"""The ledger of real daemons: what a backup that is put back, and a copy that runs, do to it."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal.node.ledger_view import export_lines, open_source, read_view
from tests.e2e.swarm import Peer, Swarm, run


@pytest.fixture
def swarm(tmp_path: Path) -> Iterator[Swarm]:
    made = Swarm(tmp_path, founders=3)
    yield made
    made.end()


def show(peer: Peer) -> str:
    done = run("ledger", "show", "--data-dir", str(peer.folder))
    assert done.returncode == 0, done.stderr
    return done.stdout


def count_entries(peer: Peer) -> int:
    return peer.ask().disk.ledger_entries


def warns(peer: Peer, word: str) -> bool:
    return any(word in one for one in peer.ask().warnings)


def count_by(peer: Peer, author: str) -> int:
    """How many entries of this author the peer holds; what `shoal ledger export` shows, without a process each time."""
    with open_source(peer.folder) as source:
        entries = map(json.loads, export_lines(read_view(source, lambda _: None)))
        return sum(entry["author"] == author for entry in entries)


def test_a_backup_that_is_put_back_and_a_copy_that_runs(swarm: Swarm) -> None:
    first = swarm.add("peer1").start("up", "--manifest", str(swarm.manifest))
    uri = first.ask().uri
    others = [swarm.add(f"peer{number}").start("join", uri) for number in (2, 3)]
    peers = [first, *others]
    swarm.wait("everybody has entered its lease", lambda: all(count_entries(peer) >= 3 for peer in peers))
    swarm.wait("three rounds", lambda: min(peer.round for peer in peers) >= 3)
    swarm.wait("nobody waits for its chain", lambda: not any(warns(peer, "chain_") for peer in peers))

    # The backup of the second peer's ledger is older than what it has written.
    second = others[0]
    assert second.leave() == 0
    backup = swarm.folder / "backup"
    shutil.copytree(second.folder, backup)
    second.start("up")
    me = run("id", "--data-dir", str(second.folder)).stdout.strip()
    before = count_by(first, me)
    swarm.wait("it has written since", lambda: count_by(first, me) > before)
    second.kill()
    for path in (*second.folder.glob("ledger*"), *backup.glob("ledger*")):
        target = second.folder / path.name
        if path.parent == backup:
            shutil.copy(path, target)
        else:
            path.unlink()
    before = count_by(first, me)
    second.start("up")
    swarm.wait("it writes again behind its own newest entry", lambda: count_by(first, me) > before)
    for peer in peers:
        assert "EQUIVOCATED" not in show(peer)
        assert re.search(r"by entries +rounds to \d", show(peer)), "credit follows from the entries"
        assert not warns(peer, "chain_forked")

    # And a copy of the folder is started beside it. Others tell either of the other one, whomever they take for it.
    copy = swarm.add("copy")
    shutil.copytree(second.folder, copy.folder, dirs_exist_ok=True)
    copy.log_file.unlink()
    copy.start("up")
    swarm.wait("one of the two says so", lambda: warns(copy, "chain_cloned") or warns(second, "chain_cloned"))
    assert not warns(first, "chain_")
