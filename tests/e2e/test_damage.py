"""A disk that has gone bad: real daemons on folders in which a byte is flipped in each kind of file, or one is gone."""

import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal.node.certificate_source import AskedCertificates
from shoal.node.identity_file import load_identity
from shoal.node.running import read_running
from tests.e2e.swarm import Peer, Swarm, leave_together, run

ROUNDS = 6  # a snapshot is written every four


@pytest.fixture
def swarm(tmp_path: Path) -> Iterator[Swarm]:
    made = Swarm(tmp_path, founders=3)
    yield made
    made.end()


def start_three(swarm: Swarm) -> tuple[str, Peer, Peer, Peer]:
    """Three voters after some rounds; the last one is killed."""
    first = swarm.add("peer1").start("up", "--manifest", str(swarm.manifest))
    uri = first.ask().uri
    second, third = (swarm.add(f"peer{number}").start("join", uri) for number in (2, 3))
    swarm.wait("some rounds", lambda: min(peer.round for peer in (first, second, third)) >= ROUNDS)
    swarm.wait("a snapshot", lambda: any((third.folder / "snapshots").glob("*.index")))
    third.kill()
    return uri, first, second, third


def flip(path: Path, source: random.Random) -> None:
    raw = bytearray(path.read_bytes())
    raw[source.randrange(len(raw))] ^= 0x10
    path.write_bytes(raw)


def abstains(peer: Peer) -> bool:
    return any("votes_forgotten: abstaining" in text for text in peer.ask().warnings)


def counts_vote_of(asked: Peer, voter: Peer, after: int) -> bool:
    """Whether a certificate of a later round than this has the peer's vote in it."""
    certificates = AskedCertificates(*read_running(asked.folder))
    me = load_identity(voter.folder / "identity.key").peer
    found = [certificates.get(number) for number in range(after + 1, certificates.newest + 1)]
    return any(vote.voter == me for one in found if one is not None for vote in one.votes)


def test_a_peer_mends_every_file_that_can_be_mended_and_votes_again(swarm: Swarm) -> None:
    uri, first, second, third = start_three(swarm)
    source, folder = random.Random(1), third.folder
    for path in (folder / "blobs").glob("??/*"):
        flip(path, source)
    (folder / "peers.book").write_bytes(b"no book")
    for pattern in ("snapshots/*", "manifest.shoal", "feedback/*", "trainer/*", "catchup/*"):
        for path in folder.glob(pattern):
            if path.is_file() and path.stat().st_size:
                flip(path, source)
    # Not one byte, so that it is damaged wherever the rows happen to lie: after a kill they are still in the log.
    for name in ("ledger.sqlite", "ledger.sqlite-wal"):
        raw = bytearray((folder / name).read_bytes())
        for at in range(0, len(raw), 512):
            raw[at] ^= 0x10
        (folder / name).write_bytes(raw)
    (folder / "running.json").write_text("{")
    third.log_file.write_text("")
    at = first.head

    # Its vote is needed while the second one stands still, so that it abstains for as long as this looks.
    assert second.process is not None
    second.process.send_signal(signal.SIGSTOP)
    third.start("join", uri)
    swarm.wait("it says that it abstains", lambda: abstains(third))
    second.process.send_signal(signal.SIGCONT)
    assert (folder / "ledger.damaged-1.sqlite").exists()
    assert (folder / "manifest.damaged").exists()
    swarm.wait("the others certify without it, and it follows", lambda: third.round >= at + 3)
    swarm.wait("it votes again", lambda: not abstains(third))
    swarm.wait("it contributes", lambda: third.contributes_after(at + 3))
    log = third.log()
    for named in ("store_damaged: ", "peers.book", "manifest.shoal: ", "it votes from round"):
        assert named in log, log
    assert "Traceback" not in log, log
    held = run("ledger", "verify", "--data-dir", str(folder))
    assert held.returncode in (0, 4), held.stdout + held.stderr
    assert leave_together(first, second, third) == [0, 0, 0], "\n".join(peer.log()[-2000:] for peer in swarm.peers)
    for peer in (first, second, third):
        assert "equivocation" not in peer.log() and "hung up on" not in peer.log()
    swarm.check_roots()


@pytest.mark.long
def test_a_backup_that_is_put_back_is_noticed(swarm: Swarm, tmp_path: Path) -> None:
    uri, first, _, third = start_three(swarm)
    backup = tmp_path / "backup"
    shutil.copytree(third.folder, backup)
    third.start("join", uri)
    at = first.head
    swarm.wait("a certificate carries its vote", lambda: counts_vote_of(first, third, at))
    third.kill()
    shutil.rmtree(third.folder)
    shutil.copytree(backup, third.folder)
    at = first.head
    third.start("join", uri)
    swarm.wait("it notices", lambda: "votes_forgotten" in third.log())
    swarm.wait("it is back", lambda: third.round >= at + 3 and not abstains(third))
    assert "Traceback" not in third.log(), third.log()


def test_what_a_person_must_mend_is_told_with_the_fix_and_nothing_is_touched(swarm: Swarm) -> None:
    _, _, _, third = start_three(swarm)
    for name, told, fix in (
        ("identity.key", "is no seed file, or damaged", "restore it from a copy"),
        ("manifest.shoal", "is no signed manifest", "start it once with --swarm URI or --manifest FILE"),
        ("incarnation", "holds no count of starts", "delete it"),
    ):
        path = third.folder / name
        whole = path.read_bytes()
        path.write_bytes(whole[:70] + b"\xff" + whole[71:] if len(whole) > 71 else b"\xff")
        damaged = path.read_bytes()
        for _ in range(2):
            ended = run("up", "--data-dir", str(third.folder), "--web-port", "0")
            assert ended.returncode == 1
            assert told in ended.stderr and f"Fix: {fix}" in ended.stderr and "Traceback" not in ended.stderr
            assert path.read_bytes() == damaged
        path.write_bytes(whole)
