"""`shoal ledger show|verify|export`: the ledger of a peer's data folder, for people. The peer may run."""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from shoal.protocol.errors import ConfigError, Failure, ProtocolError

if TYPE_CHECKING:
    from shoal.node.ledger_view import LedgerView

PROGRESS_AFTER_S = 2.0
PROGRESS_PERIOD_S = 0.5
WAITING_LINE_PERIOD_S = 10.0

Say = Callable[[str], None]


class Progress:
    """Tells on standard error how far something is that takes more than two seconds: in one line on a terminal, in a
    line now and then elsewhere."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._is_terminal = stream.isatty()
        self._due_s = clock() + PROGRESS_AFTER_S
        self._shown = 0

    def __call__(self, text: str) -> None:
        now = self._clock()
        if now < self._due_s:
            return
        self._due_s = now + (PROGRESS_PERIOD_S if self._is_terminal else WAITING_LINE_PERIOD_S)
        self._stream.write(f"\r{text:<{self._shown}}" if self._is_terminal else f"{text}\n")
        self._stream.flush()
        self._shown = len(text)

    def end(self) -> None:
        """Clear the line."""
        if self._is_terminal and self._shown:
            self._stream.write(f"\r{'':<{self._shown}}\r")
            self._stream.flush()
        self._shown = 0


def add_ledger_parsers(ledger: argparse.ArgumentParser) -> None:
    """The sub-commands of `shoal ledger`."""
    commands = ledger.add_subparsers(dest="ledger_command", required=True, metavar="COMMAND")
    show = commands.add_parser("show", help="authors, entries, certified rounds, credit, tags, bans, equivocation")
    verify = commands.add_parser("verify", help="check every signature, ancestor and certificate, and say what holds")
    export = commands.add_parser("export", help="every entry as a line of JSON, in an order that is always the same")
    export.add_argument("--out", type=Path, help="a file; default: standard output")
    for command in (show, verify, export):
        command.add_argument("--data-dir", type=Path, help="of a peer that runs or not")


def run_ledger(options: argparse.Namespace, data_dir: Path, say: Say) -> int:
    """Run one of them; returns the exit code."""
    from shoal.node.audit import EXIT_CODES, Finding
    from shoal.node.ledger_store import StoreError
    from shoal.node.ledger_view import open_source, read_view

    progress = Progress(sys.stderr)
    try:
        with open_source(data_dir) as source:
            view = read_view(source, progress)
            progress.end()
            if options.ledger_command == "show":
                return _show(view, say)
            if options.ledger_command == "verify":
                return _verify(view, progress, say)
            return _export(view, options.out, say)
    except StoreError as error:
        if options.ledger_command != "verify" or error.failure is not Failure.STORE_DAMAGED:
            raise
        say(f"ledger {Finding.FAILS}")
        say(f"  {'file':<13} {Finding.FAILS}: {error}")
        return EXIT_CODES[Finding.FAILS]
    except ProtocolError as error:
        fix = "start the peer: it puts the file aside, keeps what is whole, and fetches the rest from other peers"
        raise ConfigError("--data-dir", f"{data_dir} holds entries that are damaged ({error})", fix) from error
    finally:
        progress.end()


def _show(view: "LedgerView", say: Say) -> int:
    from shoal.node.ledger_view import tell_ledger

    for line in tell_ledger(view):
        say(line)
    return 0


def _verify(view: "LedgerView", progress: Progress, say: Say) -> int:
    from shoal.node.audit import EXIT_CODES, Finding, conclude
    from shoal.node.ledger_audit import audit_ledger

    findings: set[Finding] = set()
    for check in audit_ledger(view, progress):
        progress.end()
        findings.add(check.finding)
        say(f"  {check.name:<13} {check.finding}: {check.detail}")
    verdict = conclude(findings)
    say(f"ledger {verdict}")
    return EXIT_CODES[verdict]


def _export(view: "LedgerView", out: Path | None, say: Say) -> int:
    from shoal.node.ledger_view import export_lines

    if out is None:
        for line in export_lines(view):
            say(line)
        return 0
    temporary = out.with_name(out.name + ".partial")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            count = sum(bool(file.write(f"{line}\n")) for line in export_lines(view))
        temporary.replace(out)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        fix = "give a path that can be written, or leave --out away for standard output"
        raise ConfigError("--out", f"{out} cannot be written: {error.strerror}", fix) from error
    say(f"{out}: {count:,} entries")
    return 0
