"""What a command in a pipe says while it works: nothing where it is quick, few lines where it is not."""

import io
import sys
import threading

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


class Flushed(io.StringIO):
    """Tells when a line is whole. Reading a captured stream again and again can lose what is written meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.flushed = threading.Event()

    def flush(self) -> None:
        self.flushed.set()


def test_what_takes_its_time_says_what_it_is_at(monkeypatch: pytest.MonkeyPatch) -> None:
    out = Flushed()
    monkeypatch.setattr(progress, "LINE_AFTER_S", 0.001)
    monkeypatch.setattr(sys, "stderr", out)
    with show_progress("looking at", in_pipe=True) as tell:
        tell("torch")
        assert out.flushed.wait(60)
    assert out.getvalue() == "looking at: torch\n"
