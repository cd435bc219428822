"""One peer behind a bad line among good ones: it takes part in every round, and no round waits for a time-out."""

import hashlib
import itertools
import os
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal.node.happenings import HappeningKind
from shoal.node.status import Status
from tests.e2e.shaping_proxy import HOST, Line, ShapedNetwork
from tests.e2e.swarm import Peer, Swarm

pytestmark = pytest.mark.alone

ROUNDS = 5
BYTES_PER_ROUND_MIN = 0.2e6
# 0.2 M parameters: over such a line a contribution and the results take seconds, over the others nothing.
DRAFT = """\
name = "bad-link"
seed = 4

[task]
kind = "byte_gpt"
layers = 1
heads = 4
width = 128
context = 32

[training]
inner_steps = 100000
steps_min = 1
round_time_s = 3.0
batch_size = 2
learning_rate = 1e-3
warmup_steps = 20

[rounds]
peers_min = 2
grace_s = 8.0
part_elements = 32768
plan_timeout_s = 4.0
sender_timeout_s = 6.0
owner_timeout_s = 8.0
exchange_timeout_s = 30.0
commit_timeout_s = 10.0
presence_period_s = 0.5
presence_timeout_s = 5.0
"""


@pytest.fixture
def network() -> Iterator[ShapedNetwork]:
    made = ShapedNetwork(seed=1)
    yield made
    made.close()


def make_swarm(folder: Path, network: ShapedNetwork, line: Line) -> list[Peer]:
    """Four peers, of which the last is behind the line, from the first certified rounds on."""
    config = folder / "config.toml"
    config.write_text("[trainer]\nstep_period_s = 0.1\n")
    swarm = Swarm(folder, founders=4, network=network, draft=DRAFT)
    peers = [swarm.add(f"peer{number}") for number in range(1, 5)]
    network.set_line("peer4", line, lambda: peers[3].pid)
    for peer in peers:
        peer.options += ["--config", str(config)]
    peers[0].start("up", "--manifest", str(swarm.manifest))
    uri = peers[0].ask().uri
    for peer in peers[1:]:
        peer.start("join", uri)
    swarm.wait("everybody has applied round 2", lambda: all(peer.round >= 2 for peer in peers))
    return peers


def watch(peers: list[Peer], rounds: int) -> tuple[list[Status], list[float]]:
    """Every answer of the first, and when it was first seen with each further round."""
    swarm = peers[0].swarm
    first = peers[0].head
    answers: list[Status] = []
    times: dict[int, float] = {}

    def is_over() -> bool:
        answer = peers[0].status()
        if answer is not None:
            answers.append(answer)
            times.setdefault(answer.round.round - 1, time.monotonic())
        for peer in peers[1:]:
            peer.status()  # notes its state root
        return max(times, default=0) >= first + rounds

    swarm.wait(f"{rounds} more rounds", is_over)
    return answers, [times[number] for number in sorted(times)]


# 10 Mbit/s, 100 ms there and back, 2 % loss: TCP's window, and not the line, sets the rate. And a line so narrow that
# the exchange fills it for seconds of every round, with every heartbeat behind tensors in its queue.
@pytest.mark.parametrize(
    ("line", "waits_s"), [(Line(bytes_per_s=10e6 / 8, delay_s=0.05, loss=0.02), 0.0), (Line(bytes_per_s=3e6 / 8), 0.1)]
)
def test_a_bad_line_neither_stalls_nor_excludes(
    line: Line, waits_s: float, tmp_path: Path, network: ShapedNetwork
) -> None:
    peers = make_swarm(tmp_path, network, line)
    swarm = peers[0].swarm
    try:
        before, first = network.sent_bytes("peer4"), peers[0].head
        answers, times = watch(peers, ROUNDS)
        sent = [now - then for now, then in zip(network.sent_bytes("peer4"), before, strict=True)]
        gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
        print(
            f"a round every {statistics.median(gaps):.2f} s, the longest {max(gaps):.2f} s; {sent} bytes over the line"
        )
        # Its parts and results have gone over the line, and filled it where it is narrow.
        assert min(sent) > BYTES_PER_ROUND_MIN * ROUNDS
        assert min(network.waited_s_max("peer4")) >= waits_s
        # Every round has its work. (One may be missed: a machine that is busy for a moment is no fault.)
        certified = {one.text for one in answers[-1].happenings if one.kind is HappeningKind.ROUND_CERTIFIED}
        late = [text for text in certified if int(text.split()[1]) > first]
        assert sum("certified by 4 peers" in text for text in late) >= ROUNDS - 1, late
        swarm.wait("so it says itself", lambda: peers[3].contributes_after(first + ROUNDS - 2))
        # No attempt failed, so no round waited for a time-out.
        assert answers[-1].aborted == answers[0].aborted
        # Nobody was ever taken for lost, at either end of the line, while it was full of tensors.
        for peer in peers:
            assert "peer_lost" not in peer.log().partition("round 2 certified")[2], peer.log()[-2000:]
        assert all(len(answer.peers) == 4 and all(row.alive for row in answer.peers) for answer in answers)
        swarm.check_roots()
    finally:
        swarm.end()


@pytest.mark.parametrize(
    ("line", "share_max"),
    [
        (Line(bytes_per_s=1.25e6), 1.1),
        # Loss makes TCP slow down: Mathis' formula gives 0.1 of this line to one connection.
        (Line(bytes_per_s=1.25e6, delay_s=0.05, loss=0.02), 0.3),
    ],
)
def test_the_proxy_keeps_to_the_line(network: ShapedNetwork, line: Line, share_max: float) -> None:
    """The ruler is checked, too: every byte arrives in order, and no faster than the line allows."""
    payload = os.urandom(300_000)
    received = hashlib.sha256()
    with socket.create_server((HOST, 0)) as server:
        network.set_line("bad", line, os.getpid)
        port = network.open("bad", server.getsockname()[1])

        def receive() -> None:
            accepted, _ = server.accept()
            with accepted:
                while data := accepted.recv(1 << 16):
                    received.update(data)
                accepted.sendall(b"done")

        thread = threading.Thread(target=receive)
        thread.start()
        began_s = time.monotonic()
        with socket.create_connection((HOST, port)) as sender:
            sender.sendall(payload)
            sender.shutdown(socket.SHUT_WR)
            assert sender.recv(16) == b"done"
        took_s = time.monotonic() - began_s
        thread.join()
    assert received.digest() == hashlib.sha256(payload).digest()
    assert len(payload) / took_s <= share_max * line.bytes_per_s
