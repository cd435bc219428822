"""What a command shows on its standard error while it works: a line that changes on a terminal, few lines elsewhere."""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

LINE_AFTER_S = 2.0  # what takes no longer needs none
LINE_PERIOD_S_MAX = 60.0  # the pause behind each line is twice as long as the one before


@contextmanager
def show_progress(title: str, *, in_pipe: bool = False) -> Iterator[Callable[[str], None]]:
    """What it yields is told what is worked on. In a pipe that is lines with `in_pipe`, else nothing."""
    if sys.stderr.isatty():
        from rich.console import Console

        with Console(stderr=True).status(title) as line:
            yield lambda text: line.update(f"{title}: {text}")
    elif in_pipe:
        with _print_lines(title, sys.stderr) as tell:
            yield tell
    else:
        yield lambda text: None


class ProgressLines:
    """The newest text as a line, unless that has been said."""

    def __init__(self, title: str, out: TextIO) -> None:
        self._title = title
        self._out = out
        self._text = ""
        self._said = ""

    def tell(self, text: str) -> None:
        self._text = text

    def print(self) -> None:
        """Called now and then, from any thread."""
        text = self._text
        if text != self._said:
            self._said = text
            print(f"{self._title}: {text}", file=self._out, flush=True)


@contextmanager
def _print_lines(title: str, out: TextIO) -> Iterator[Callable[[str], None]]:
    lines, ended = ProgressLines(title, out), threading.Event()

    def watch() -> None:
        pause_s = LINE_AFTER_S
        while not ended.wait(pause_s):
            lines.print()
            pause_s = min(2 * pause_s, LINE_PERIOD_S_MAX)

    watching = threading.Thread(target=watch, name="progress", daemon=True)
    watching.start()
    try:
        yield lines.tell
    finally:
        ended.set()
        watching.join()
