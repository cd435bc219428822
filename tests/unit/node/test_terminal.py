"""What is drawn on a terminal, and what goes to a pipe."""

import io
import math
import subprocess
import sys
from dataclasses import replace

import pytest
from rich.console import Console, RenderableType

from shoal.node.happenings import HAPPENINGS_MAX, Happening, HappeningKind, Severity
from shoal.node.status import LineStatus, Status, TrainerState
from shoal.node.terminal import (
    DemoPeer,
    DemoView,
    PeerMark,
    describe_demo,
    describe_status,
    draw_curve,
    format_bytes,
    format_count,
    format_loss,
    format_span,
    open_demo_screen,
    print_status,
    render_demo,
    render_status,
    watch_status,
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Interrupted(Exception):
    """Ends a watch."""


def draw(renderable: RenderableType, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    console.print(renderable)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def make_happening(at_s: float, text: str) -> Happening:
    return Happening(at_s=at_s, severity=Severity.WARNING, kind=HappeningKind.PEER_LOST, text=text)


def make_view(round_number: int = 3, happenings: tuple[Happening, ...] = ()) -> DemoView:
    peers = tuple(
        DemoPeer(
            name=f"peer{number}",
            mark=mark,
            phase="exchange",
            round=round_number,
            loss=2.5 + number,
            tokens_per_s=4_200.0,
            state_root="1b" * 32,
        )
        for number, mark in enumerate(PeerMark)
    )
    return DemoView(
        elapsed_s=93.0,
        round=round_number,
        rounds_planned=10,
        losses=(5.5, 4.0, 3.25),
        tokens_per_s=21_000.0,
        contribution_bytes=13_000_000,
        fp32_bytes=52_000_000,
        peers=peers,
        happenings=happenings,
    )


@pytest.mark.parametrize("width", [60, 80, 160])
def test_a_status_shows_what_people_ask(status: Status, width: int) -> None:
    text = draw(render_status(status), width)
    for piece in ("tiny", "ready", "round 128", "attempt 2", "waiting for otter", "5.385", "1.932", "3.9 times less"):
        assert piece in text.replace("\n", " "), piece
    table = text.partition("─ peers ─")[2]
    for row in status.peers:
        line = next(line for line in table.splitlines() if row.peer[-8:] in line)
        assert row.name in line
        assert str(row.head_round) in line
    told = " ".join(text.split())
    assert "for 46 s, at most 13 s left (exchange_timeout_s), waiting for otter, " in told
    assert f"part moved owner_lost (gull ({status.peers[4].peer[-8:]})) in attempt 1 of round 127, 42 s ago;" in told
    assert "failed attempt proposer_silent (otter" in told
    assert "in attempt 3 of round 120, 15 min 50 s ago; the next proposer takes over" in told
    author = f"otter ({status.peers[1].peer[-8:]})"
    assert (
        f"held-out loss of round 124 1.934 nats a token, perplexity 6.917, measured by {author} over 32768 tokens"
        in told
    )
    assert max(len(line) for line in text.splitlines()) <= width


def test_the_whole_uri_is_shown_however_narrow_the_terminal(status: Status) -> None:
    text = draw(render_status(status), 60)
    assert status.uri in "".join(line.strip() for line in text.splitlines())


def test_a_status_that_is_not_well_says_why(status: Status) -> None:
    training = replace(status.training, state=TrainerState.STOPPED, error="CUDA out of memory", restarts=3)
    ill = replace(status, training=training, leaving=True)
    text = draw(render_status(ill))
    assert "unhealthy" in text
    assert "! the trainer has stopped after 3 restarts: CUDA out of memory" in text
    assert text.count("the trainer has stopped") == 1
    assert "! it is leaving the swarm" in text
    assert "unhealthy: the trainer has stopped after 3 restarts: CUDA out of memory" in describe_status(ill)


def test_a_status_before_anything_happened_can_be_drawn(status: Status) -> None:
    training = replace(status.training, loss_first=None, loss_last=None, loss_history=(), device="")
    traffic = replace(status.traffic, contribution_bytes=0, fp32_bytes=0)
    bare = replace(status, training=training, traffic=traffic, peers=(), failures=(), happenings=(), aborted=())
    bare = replace(bare, measured=())
    bare = replace(bare, round=replace(status.round, phase="prepare", progress=None, deadline_s=None, state_root=""))
    text = draw(render_status(bare))
    assert "none yet" in text
    assert "prepare" in text
    assert "what happened" not in text
    assert "state root none" in describe_status(bare)
    assert "nobody has measured yet" in text and "held-out" not in "\n".join(describe_status(bare))


def test_text_from_peers_is_neither_markup_nor_control(status: Status) -> None:
    evil = "[bold red]x\x1b[2J\x07[/]"
    row = replace(status.peers[1], name=evil, address=evil)
    hostile = replace(
        status,
        swarm_name=evil,
        uri=evil,
        warnings=(evil,),
        peers=(row,),
        measured=(replace(status.measured[0], name=evil),),
        happenings=(make_happening(1.0, evil),),
        training=replace(status.training, device=evil),
    )
    for text in (draw(render_status(hostile), 200), "\n".join(describe_status(hostile))):
        assert "[bold red]x[2J[/]" in text
        assert "\x07" not in text
        assert "\x1b" not in text


def test_a_demo_shows_every_peer_and_what_was_done_to_it() -> None:
    view = make_view(happenings=(make_happening(1.0, "peer2 was killed; the others go on"),))
    text = draw(render_demo(view))
    assert "round 3 of 10" in text
    assert "5.500 → 3.250" in text
    assert "4.0 times less than fp32" in text
    lines = {mark: next(line for line in text.splitlines() if f"peer{n}" in line) for n, mark in enumerate(PeerMark)}
    assert all(mark in line for mark, line in lines.items())
    assert "exchange" in lines[PeerMark.CATCHING_UP]
    assert "exchange" not in lines[PeerMark.KILLED]
    assert "peer2 was killed; the others go on" in text


def test_a_demo_before_its_first_round_can_be_drawn() -> None:
    view = replace(make_view(), losses=(), contribution_bytes=0, rounds_planned=0)
    assert "after the first round" in draw(render_demo(view))
    assert "round 3," in describe_demo(view)
    assert "3 of 5 peers" in describe_demo(view)


def test_without_a_terminal_a_demo_tells_each_thing_once(capsys: pytest.CaptureFixture[str]) -> None:
    killed = make_happening(1.0, "peer2 was killed")
    late = tuple(make_happening(2.0 + number, f"late {number}") for number in range(HAPPENINGS_MAX))
    with open_demo_screen() as screen:
        for happenings in ((), (killed,), (killed,), (killed, *late)[-HAPPENINGS_MAX:]):
            screen.show(make_view(3, happenings))
        screen.show(make_view(4, late))
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if "round 3, loss 3.250" in line]) == 1
    assert len([line for line in lines if "round 4, loss 3.250" in line]) == 1
    assert [line.partition("] ")[2] for line in lines if "round" not in line] == [
        "peer2 was killed",
        *(one.text for one in late),
    ]


def test_on_a_terminal_a_demo_is_drawn_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with open_demo_screen() as screen:
        screen.show(make_view(3))
        screen.show(make_view(4))
    text = terminal.getvalue()
    assert "round 3 of 10" in text
    assert "round 4 of 10" in text
    assert "\x1b[1A" in text, "the cursor goes up to draw over what was there"
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h"), "the cursor is there again at the end"


def test_a_pipe_is_told_phase_limit_waits_and_failures(status: Status) -> None:
    lines = describe_status(status)
    names = ", ".join(one.name or one.peer[-8:] for one in status.round.waiting_for)
    limit = "at most 13 s left (exchange_timeout_s)"
    assert lines[0] == f"tiny: round 128, attempt 2, exchange for 46 s, {limit}, waiting for {names}"
    assert [line.partition(":")[0] for line in lines[-2:]] == ["part moved", "failed attempt"]
    assert "proposer_silent (otter" in lines[-1] and "attempt 3 of round 120, 15 min 50 s ago" in lines[-1]
    assert f"others join with: shoal join '{status.uri}'" in lines
    idle = replace(status, round=replace(status.round, deadline_s=None, deadline=None, waiting_for=()), failures=())
    assert describe_status(idle)[0] == "tiny: round 128, attempt 2, exchange for 46 s"
    assert not any("failed attempt" in line for line in describe_status(idle))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            LineStatus(upload_cap_mbit=5.0, caps_until="18:00", sent_mbit=4.62, received_mbit=0.314),
            "upload cap 5 Mbit/s, download cap none, until 18:00;"
            " tensors 4.6 Mbit/s up and 0.3 Mbit/s down in the last minute",
        ),
        (
            LineStatus(upload_cap_mbit=1_000_000.0, download_cap_mbit=2.5, sent_mbit=99.96, received_mbit=1_204.0),
            "upload cap 1000000 Mbit/s, download cap 2.5 Mbit/s;"
            " tensors 100 Mbit/s up and 1204 Mbit/s down in the last minute",
        ),
        (
            LineStatus(caps_until="08:00"),
            "upload cap none, download cap none, until 08:00; tensors not measured yet",
        ),
    ],
)
def test_caps_and_rates_are_told(status: Status, change: LineStatus, text: str) -> None:
    changed = replace(status, line=change)
    assert text in describe_status(changed)
    assert text in " ".join(draw(render_status(changed), 160).split())


def test_a_capped_peer_that_would_relay_says_why_it_does_not(status: Status) -> None:
    sentence = "a capped peer relays no tensors for others"
    assert sentence in describe_status(status)
    assert f"passes on nothing, {sentence}" in " ".join(draw(render_status(status), 160).split())
    other = replace(status, line=replace(status.line, relay_withheld=False))
    assert sentence not in describe_status(other) and sentence not in draw(render_status(other), 160)


def test_a_pipe_gets_lines(status: Status, capsys: pytest.CaptureFixture[str]) -> None:
    print_status(status)
    assert capsys.readouterr().out.splitlines() == describe_status(status)


def test_a_terminal_gets_the_table(status: Status, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    print_status(status)
    assert "what happened" in terminal.getvalue()


@pytest.mark.parametrize("terminal", [io.StringIO(), Terminal()])
def test_a_watch_goes_on_until_there_is_no_answer(
    status: Status, terminal: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = [status, replace(status, round=replace(status.round, round=129))]
    waits: list[float] = []

    def fetch() -> Status:
        if not answers:
            raise Interrupted
        return answers.pop(0)

    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with pytest.raises(Interrupted):
        watch_status(fetch, waits.append)
    assert len(waits) == 2
    assert "round 128" in terminal.getvalue()
    assert "round 129" in terminal.getvalue()


def test_quantities_are_short_and_never_round_to_four_digits() -> None:
    assert [format_bytes(n) for n in (0, 999, 1000, 99_949, 99_950, 999_499, 999_500, 10**18)] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "99.9 kB",
        "100 kB",
        "999 kB",
        "1.0 MB",
        "1000 PB",
    ]
    assert [format_count(n) for n in (0, 7.4, 999, 18_412, 5_214_208)] == ["0", "7", "999", "18.4k", "5.2M"]
    assert [format_span(n) for n in (0, 59.9, 60, 3_725, 200_000)] == [
        "0 s",
        "59 s",
        "1 min 0 s",
        "1 h 2 min",
        "2 d 7 h",
    ]
    assert [format_loss(x) for x in (None, math.nan, 2.34567)] == ["–", "–", "2.346"]


def test_the_curve_is_as_wide_as_told_and_falls_with_the_loss() -> None:
    assert draw_curve([]) == ""
    assert draw_curve([math.nan]) == ""
    assert draw_curve([2.0]) == "▁"
    assert draw_curve([8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]) == "█▇▆▅▄▃▂▁"
    curve = draw_curve([10.0 - 0.01 * index for index in range(1000)], 40)
    assert len(curve) == 40
    assert list(curve) == sorted(curve, reverse=True)


def test_rich_is_imported_only_when_something_is_drawn() -> None:
    code = "import sys, shoal.node.terminal; sys.exit('rich' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
