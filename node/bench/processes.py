"""Measured processes: each takes lines of text and answers each of them with a line of JSON.

Invariant: a process that `measured` has started has ended when it is left.
"""

import json
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from shoal.protocol.errors import ShoalError

LAST_LINES_MAX = 20
LAST_WORDS_S = 2.0  # until what a process that ended has said last is here


class BenchFailed(ShoalError):
    """A measured process ended or did not answer; the text says what it said last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a process runs: its IP address, and what its command has in front so that it is there."""

    host: str = "127.0.0.1"
    prefix: tuple[str, ...] = ()


class BenchProcess:
    """A Python process with these arguments, and what it has said."""

    def __init__(self, place: Place, arguments: Sequence[str]) -> None:
        pipe = subprocess.PIPE
        command = (*place.prefix, sys.executable, *arguments)
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        self._answers: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._errors: list[str] = []
        self._threads = [threading.Thread(target=read, daemon=True) for read in (self._read, self._read_errors)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """At once: nothing that it has is of use to anybody."""
        self.process.kill()
        self.process.wait()
        for thread in self._threads:
            thread.join()
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            assert stream is not None
            with suppress(BrokenPipeError):
                stream.close()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._answers.put(json.loads(line))
        self._answers.put(None)

    def _read_errors(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._errors = [*self._errors[1 - LAST_LINES_MAX :], line.rstrip()]

    def tell(self, line: str) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        except BrokenPipeError as error:
            raise self._ended() from error

    def wait(self, event: str, timeout_s: float) -> dict[str, Any]:
        """The next answer, which is of this kind."""
        try:
            answer = self._answers.get(timeout=timeout_s)
        except queue.Empty:
            raise self._failed(f"did not say {event!r} within {timeout_s:.0f} s") from None
        if answer is None:
            raise self._ended()
        assert answer["event"] == event, f"{answer['event']} where {event} was to come"
        return answer

    def ask(self, question: str, event: str, timeout_s: float) -> dict[str, Any]:
        self.tell(question)
        return self.wait(event, timeout_s)

    def _ended(self) -> BenchFailed:
        self._threads[-1].join(LAST_WORDS_S)  # which reads them
        return self._failed("ended")

    def _failed(self, what: str) -> BenchFailed:
        said = "\n    ".join(self._errors) or "nothing"
        return BenchFailed(f"a measured process {what}; its last lines:\n    {said}")


@contextmanager
def measured(place: Place, arguments: Sequence[str], spec: dict[str, Any]) -> Iterator[BenchProcess]:
    """A process for as long as this lasts. The first line that it is told is `spec`, as JSON. Raises BenchFailed."""
    process = BenchProcess(place, arguments)
    try:
        process.tell(json.dumps(spec))
        yield process
    finally:
        process.stop()
