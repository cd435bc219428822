"""kill -9 of the trainer and of the daemon: every batch counts once in the log, and what was lost is said."""

import itertools
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal.node.feedback import FEEDBACK_KEY, FEEDBACK_NAMESPACE, FeedbackRecord
from shoal.node.ledger_store import LedgerStore
from shoal.protocol.identity import parse_peer_id
from shoal.protocol.messages import Certificate
from shoal.protocol.wire import DELTA_BYTES_MAX, decode_record_untrusted
from tests.e2e.swarm import DRAFT, Peer, Swarm, leave_together, run

TOKENS_PER_BATCH = 2 * 32  # of the draft
LOST = re.compile(
    r"(\d+) steps since the last checkpoint were lost; their batches are trained on again, from batch (\d+)"
)


OVERLAPPED = '[training]\nstrategy = "overlapped"\noverlap_steps = 50\n'


@pytest.fixture
def swarm(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Swarm]:
    made = Swarm(tmp_path, founders=2, draft=getattr(request, "param", DRAFT))
    yield made
    made.end()


def kill_trainer(peer: Peer) -> None:
    found = subprocess.run(["pkill", "-9", "-P", str(peer.pid), "-f", "training.worker"], check=False)
    assert found.returncode == 0


def lives_of(peer: Peer) -> list[tuple[int, int]]:
    words = [int(word) for word in (peer.folder / "trainer" / "batches").read_text().split()]
    return list(zip(words[::2], words[1::2], strict=True))


def is_training(peer: Peer, lives: int) -> bool:
    """Whether this life of its trainer has made some steps."""
    path = peer.folder / "trainer" / "batches"
    if not path.exists():
        return False
    known = lives_of(peer)
    return len(known) == lives and known[-1][1] > known[-1][0] + 5


def lost_of(peer: Peer) -> list[tuple[int, int]]:
    """Steps that each life of its trainer made in vain, if any, and the batch from which they were made again."""
    lost = [(end - first, first) for (_, end), (first, _) in itertools.pairwise(lives_of(peer))]
    assert all(steps >= 0 for steps, _ in lost), "no batch was skipped"
    return [one for one in lost if one[0]]


def said_of(peer: Peer) -> list[tuple[int, int]]:
    """What its log says of that."""
    return [(int(steps), int(at)) for steps, at in LOST.findall(peer.log())]


def certified_batches(peer: Peer) -> tuple[int, int]:
    """Of a stopped peer: batches behind its tokens in all certificates, and those that its own record says."""
    me = parse_peer_id(run("id", "--data-dir", str(peer.folder)).stdout.strip())
    tokens = 0
    with LedgerStore.open(peer.folder / "ledger.sqlite") as store:
        last = store.get_last_certificate()
        assert last is not None
        for one in store.list_certificates(1, last.round + 1):
            result = decode_record_untrusted(Certificate, one.body, DELTA_BYTES_MAX).result
            for index, member in enumerate(result.members):
                counted = any(part.contributors[index // 8] >> (index % 8) & 1 for part in result.parts)
                tokens += member.tokens if member.peer == me and counted else 0
        raw = store.get_record(FEEDBACK_NAMESPACE, FEEDBACK_KEY)
    assert raw is not None and tokens % TOKENS_PER_BATCH == 0
    record = decode_record_untrusted(FeedbackRecord, raw, DELTA_BYTES_MAX)
    assert record.settled is not None
    return tokens // TOKENS_PER_BATCH, record.settled.batches_done


@pytest.mark.parametrize(
    "swarm", [DRAFT, DRAFT.replace("[training]\n", OVERLAPPED)], ids=["diloco", "overlapped"], indirect=True
)
def test_no_batch_is_trained_twice_or_skipped_silently(swarm: Swarm) -> None:
    first = swarm.add("peer1").start("up", "--manifest", str(swarm.manifest))
    uri = first.ask().uri
    second = swarm.add("peer2").start("join", uri)
    swarm.wait("two rounds", lambda: min(first.round, second.round) >= 2)
    lives = 1
    for deed in ("trainer", "daemon", "daemon", "trainer"):
        swarm.wait(f"life {lives} trains", lambda: is_training(second, lives))  # noqa: B023
        swarm.wait("what the last one lost is said", lambda: said_of(second) == lost_of(second))
        at = first.head
        if deed == "trainer":
            kill_trainer(second)
        else:
            second.kill()
            second.start("join", uri)
        lives += 1
        swarm.wait(f"its {deed} was killed, it contributes", lambda: second.contributes_after(at + 1))  # noqa: B023
    assert leave_together(first, second) == [0, 0], first.log()[-2000:] + second.log()[-2000:]
    swarm.check_roots()

    known = lives_of(second)
    assert len(known) == lives
    assert known[0][0] == 0
    assert said_of(second) == lost_of(second), "each step that was lost is said, and no other"
    assert lost_of(second), "something was lost, or the kills came at no time of interest"

    for peer in (first, second):
        batches, own = certified_batches(peer)
        assert batches == own, "what the certificates count is every batch up to there, once"
        assert 0 < own <= lives_of(peer)[-1][1]
    assert "Traceback" not in first.log() + second.log()
