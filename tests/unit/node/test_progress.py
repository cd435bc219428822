"""What a command in a pipe says while it works: nothing where it is quick, few lines where it is not."""

import io
import time

import pytest

from shoal.node import progress
from shoal.node.progress import ProgressLines, show_progress


def test_the_newest_text_is_a_line_and_is_said_once() -> None:
    out = io.StringIO()
    lines = ProgressLines("looking at", out)
    lines.print()
    assert out.getvalue() == "", "nothing is known yet"
    lines.tell("disk, torch")
    lines.tell("torch")
    lines.print()
    lines.print()
    assert out.getvalue() == "looking at: torch\n"
    lines.tell("swarm")
    lines.print()
    assert out.getvalue() == "looking at: torch\nlooking at: swarm\n"


@pytest.mark.parametrize("in_pipe", [False, True])
def test_what_is_quick_says_nothing_and_so_does_who_was_not_asked_to(
    in_pipe: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    with show_progress("looking at", in_pipe=in_pipe) as tell:
        tell("disk")
    assert capsys.readouterr() == ("", "")


def test_what_takes_its_time_says_what_it_is_at(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LINE_AFTER_S", 0.001)
    seen, end_s = "", time.monotonic() + 60
    with show_progress("looking at", in_pipe=True) as tell:
        tell("torch")
        while not seen and time.monotonic() < end_s:
            seen = capsys.readouterr().err
    assert seen == "looking at: torch\n"
