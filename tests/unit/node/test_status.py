"""The Status value: its JSON form, what follows from it, and how it is fetched."""

import json
import math
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from typing import Any

import pytest

from shoal.node.status import (
    LOSS_POINTS_MAX,
    PEERS_SHOWN_MAX,
    STATUS_BYTES_MAX,
    LineStatus,
    LossHistory,
    NoDaemonError,
    Status,
    StatusError,
    TrainerState,
    clean_text,
    fetch_status,
    judge_health,
    judge_readiness,
    keep_peers,
)

Change = Callable[[Any], Any]


def test_json_reads_back_to_the_same_value(status: Status) -> None:
    assert Status.from_json(status.to_json()) == status
    bare = replace(status, failures=(), peers=(), round=replace(status.round, deadline_s=None, progress=None))
    assert Status.from_json(bare.to_json().encode()) == bare


def test_numbers_that_are_none_do_not_break_the_json(status: Status) -> None:
    training = replace(status.training, loss_last=math.nan, tokens_per_s=math.inf)
    text = replace(status, training=training).to_json()
    assert "NaN" not in text and "Infinity" not in text
    read = Status.from_json(text).training
    assert read.loss_last is None
    assert math.isnan(read.tokens_per_s)


def test_no_cap_and_no_rate_are_null_in_the_json(status: Status) -> None:
    tree = json.loads(status.to_json())["line"]
    assert tree == {
        "upload_cap_mbit": 5.0,
        "download_cap_mbit": None,
        "caps_until": "18:00",
        "sent_mbit": 4.62,
        "received_mbit": 0.314,
        "relay_withheld": True,
    }
    bare = replace(status, line=LineStatus())
    assert Status.from_json(bare.to_json()) == bare
    assert set(json.loads(bare.to_json())["line"].values()) == {None, False}


def set_at(*path: str | int, value: object) -> Change:
    def change(tree: Any) -> Any:
        *parents, last = path
        inner = tree
        for key in parents:
            inner = inner[key]
        inner[last] = value
        return tree

    return change


def drop(name: str) -> Change:
    return lambda tree: {key: value for key, value in tree.items() if key != name}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (drop("round"), "status: lacks or does not know: round"),
        (set_at("extra", value=1), "status: lacks or does not know: extra"),
        (set_at("version", value=1), "status.version: is int, not str"),
        (set_at("joined", value=1), "status.joined: is int, not bool"),
        (set_at("rounds_certified", value=True), "status.rounds_certified: is bool, not int"),
        (set_at("rounds_certified", value=None), "status.rounds_certified: is NoneType, not int"),
        (set_at("uptime_s", value="1"), "status.uptime_s: is str, not float"),
        (set_at("uptime_s", value=10**400), "status.uptime_s: is int, not float"),
        (set_at("peers", value={}), "status.peers: is no list"),
        (set_at("peers", 1, value=7), "status.peers[1]: is no object"),
        (set_at("peers", 0, "alive", value="yes"), "status.peers[0].alive: is str, not bool"),
        (set_at("line", "caps_until", value=18), "status.line.caps_until: is int, not str"),
        (set_at("round", value=[]), "status.round: is no object"),
        (set_at("training", "state", value="idle"), "status.training.state: is 'idle', no TrainerState"),
        (set_at("training", "state", value=["none"]), "status.training.state: is ['none'], no TrainerState"),
        (lambda tree: [tree], "status: is no object"),
    ],
)
def test_what_is_not_exactly_a_status_is_refused(status: Status, change: Change, problem: str) -> None:
    with pytest.raises(StatusError) as caught:
        Status.from_json(json.dumps(change(json.loads(status.to_json()))))
    assert str(caught.value) == problem


@pytest.mark.parametrize("raw", ["", "{", b"\xff", "[" * 100_000, '{"at_s": NaN}'])
def test_what_is_no_json_is_refused(raw: str | bytes) -> None:
    with pytest.raises(StatusError, match="is no JSON"):
        Status.from_json(raw)


def test_a_peer_in_the_middle_of_a_run_is_healthy_and_ready(status: Status) -> None:
    assert judge_health(status).ok
    assert judge_readiness(status).ok


@pytest.mark.parametrize(
    ("change", "healthy", "reason"),
    [
        (lambda s: replace(s, control_up=False), False, "control plane has stopped"),
        (lambda s: replace(s, training=replace(s.training, state=TrainerState.STOPPED)), False, "trainer has stopped"),
        (lambda s: replace(s, disk=replace(s.disk, failing=True)), False, "disk is full or fails"),
        (lambda s: replace(s, leaving=True), True, "leaving"),
        (lambda s: replace(s, joined=False), True, "no state of the swarm yet"),
        (lambda s: replace(s, catch_up=replace(s.catch_up, active=True, rounds_behind=7)), True, "7 rounds behind"),
        (lambda s: replace(s, catch_up=replace(s.catch_up, rounds_behind=2)), True, "2 rounds behind"),
        (lambda s: replace(s, round=replace(s.round, voters_live=1)), True, "no quorum: 1 of 3 voters are live, 2 are"),
        (lambda s: replace(s, training=replace(s.training, state=TrainerState.STALLED)), True, "trainer is stalled"),
        (lambda s: replace(s, training=replace(s.training, state=TrainerState.WAITING)), True, "no training script is"),
    ],
)
def test_whoever_is_not_ready_says_why(status: Status, change: Change, healthy: bool, reason: str) -> None:
    changed = change(status)
    assert judge_health(changed).ok == healthy
    (told,) = judge_readiness(changed).reasons
    assert reason in told


def test_the_round_that_is_being_applied_makes_nobody_unready(status: Status) -> None:
    assert judge_readiness(replace(status, catch_up=replace(status.catch_up, rounds_behind=1))).ok


def test_a_bootstrap_peer_needs_no_trainer(status: Status) -> None:
    training = replace(status.training, state=TrainerState.NONE)
    assert judge_readiness(replace(status, role="bootstrap", training=training)).ok


@pytest.mark.parametrize("stride", [1, 2, 3, 64])
@pytest.mark.parametrize("rounds", [1, 2, LOSS_POINTS_MAX, LOSS_POINTS_MAX + 1, 5_000])
def test_the_loss_history_is_bounded_and_keeps_its_ends(rounds: int, stride: int) -> None:
    history = LossHistory()
    numbers = [7 + stride * index for index in range(rounds)]
    for number in numbers:
        history.add(number, float(number))
        assert len(history.points) <= LOSS_POINTS_MAX
    points = [point.round for point in history.points]
    assert points == sorted(set(points))
    assert (points[0], points[-1]) == (numbers[0], numbers[-1])
    assert len(points) >= min(rounds, LOSS_POINTS_MAX // 2 - 1)


def test_the_last_round_of_the_history_may_be_told_again() -> None:
    history = LossHistory()
    for number, loss in ((1, 3.0), (2, 2.0), (2, 1.5)):
        history.add(number, loss)
    assert [(point.round, point.loss) for point in history.points] == [(1, 3.0), (2, 1.5)]


def test_only_the_most_telling_peers_are_shown(status: Status) -> None:
    me, taking_part, *others = status.peers
    crowd = [replace(others[-1], peer=f"{number:06}") for number in range(PEERS_SHOWN_MAX + 50)]
    kept = keep_peers([*crowd, *others, taking_part, me])
    assert len(kept) == PEERS_SHOWN_MAX
    assert kept[:2] == (me, taking_part)
    assert set(others[:-1]) <= set(kept)


def test_text_from_peers_cannot_steer_a_terminal() -> None:
    assert clean_text("a\x1b[31mb\u202e\r\nc\x00") == "a[31mbc"
    assert clean_text("x" * 300) == "x" * 199 + "…"
    assert clean_text("häring 🐟") == "häring 🐟"


@contextmanager
def answering(body: bytes, code: int = 200) -> Iterator[int]:
    """An HTTP server that says the same to everybody."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(code)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Tests are silent."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.handle_request)
        thread.start()
        try:
            yield server.server_port
        finally:
            thread.join()


def test_a_status_is_fetched(status: Status, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    with answering(status.to_json().encode()) as port:
        assert fetch_status("127.0.0.1", port) == status


def test_without_a_daemon_the_error_tells_the_next_step() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(NoDaemonError, match="Connection refused") as caught:
        fetch_status("127.0.0.1", port)
    assert caught.value.field == f"http://127.0.0.1:{port}/status.json"
    assert "shoal up" in caught.value.fix


def test_another_program_on_the_port_is_told_apart() -> None:
    with answering(b"hello") as port, pytest.raises(StatusError, match="no JSON"):
        fetch_status("127.0.0.1", port)
    with answering(b"not here", 404) as port, pytest.raises(NoDaemonError, match="Not Found"):
        fetch_status("127.0.0.1", port)
    with answering(b" " * (STATUS_BYTES_MAX + 1)) as port, pytest.raises(StatusError, match="more than"):
        fetch_status("127.0.0.1", port)
