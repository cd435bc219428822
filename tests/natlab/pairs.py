"""All ordered pairs of routers, again and again: two real daemons, one behind each, and a public bootstrap peer.

    python -m tests.natlab.pairs --tries 20 --out build/pairs.jsonl     # one line a try; goes on where it stopped
    python -m tests.natlab.pairs --table build/pairs.jsonl

A try begins with empty folders but for the keys, and with routers that have forgotten everything. It is over when both
have been in a certified round, which needs a tensor link between the two or a way around it.
"""

import argparse
import itertools
import json
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.natlab.daemons import LabSwarm
from tests.natlab.lab import Host, Lab
from tests.natlab.needs import find_missing
from tests.natlab.rules import Nat

POLL_S = 0.1
UP_S = 60.0
TRY_S = 90.0  # from when both daemons are up
SHOWN_S = 5.0
NO_WAY = "none"
KINDS = tuple(Nat)


@dataclass(frozen=True, slots=True, kw_only=True)
class Try:
    """What came of one try. Times are in seconds since both daemons were up; None where it did not happen.

    `exchange_s` is when parts were first to be sent, so that a link was wanted; `linked_s` when both showed one."""

    left: str
    right: str
    number: int
    path: str
    met_s: float | None
    exchange_s: float | None
    linked_s: float | None
    round_s: float | None

    @property
    def taken_s(self) -> float | None:
        """From the wish to the link."""
        if self.linked_s is None:
            return None
        return max(0.0, self.linked_s - (self.exchange_s if self.exchange_s is not None else self.linked_s))


class Pair:
    """Two hosts, of which these are the kinds, and one that both can dial."""

    def __init__(self, swarm: LabSwarm, kinds: tuple[str, str], relay: Host, left: Host, right: Host) -> None:
        self.kinds = kinds
        self.swarm = swarm
        self.relay, self.left, self.right = (
            swarm.add_on(host, name) for host, name in ((relay, "relay"), (left, "peer1"), (right, "peer2"))
        )

    def run(self, number: int) -> Try:
        for peer in (self.relay, self.left, self.right):
            peer.begin_anew()
        uri = self.swarm.begin(self.relay, "--role", "bootstrap")
        for peer in (self.left, self.right):
            peer.start("join", uri)
        try:
            self.swarm.wait("both are up", lambda: None not in (self.left.status(), self.right.status()))
            return self._watch(number)
        finally:
            self.swarm.end()

    def _watch(self, number: int) -> Try:
        begin_s = time.monotonic()
        seen: dict[str, float] = {}
        path = NO_WAY
        now_s = 0.0
        # A first round may be over before anybody has shown the link that it went by.
        while now_s < TRY_S and now_s < seen.get("round", TRY_S) + (SHOWN_S if path == NO_WAY else 0.0):
            now_s = time.monotonic() - begin_s
            statuses = [peer.status() for peer in (self.left, self.right)]
            if None in statuses:
                break
            rows = self.left.sees(self.right), self.right.sees(self.left)
            if None not in rows:
                seen.setdefault("met", now_s)
            if any(status is not None and status.round.phase == "exchange" for status in statuses):
                seen.setdefault("exchange", now_s)
            paths = [row.path for row in rows if row is not None and row.path]
            if len(paths) == 2:
                seen.setdefault("linked", now_s)
                path = paths[0] if path == NO_WAY else path
            if all(peer.contributes_after(0) for peer in (self.left, self.right)):
                seen.setdefault("round", now_s)
            time.sleep(POLL_S)
        left, right = self.kinds
        times = {f"{name}_s": round(at, 2) for name, at in seen.items()}
        every = dict.fromkeys(("met_s", "exchange_s", "linked_s", "round_s")) | times
        return Try(left=left, right=right, number=number, path=path, **every)


def run_pair(swarm: LabSwarm, left: Nat, right: Nat, number: int = 0) -> Try:
    """One try, in a lab of its own; the swarm is only its manifest and its founders' keys."""
    swarm.peers.clear()
    with Lab() as lab:
        hosts = lab.add_host("relay"), lab.add_peer("left", left), lab.add_peer("right", right)
        return Pair(swarm, (left.value, right.value), *hosts).run(number)


def read_tries(file: Path) -> list[Try]:
    return [Try(**json.loads(line)) for line in file.read_text().splitlines()] if file.exists() else []


def write_table(tries: Sequence[Try]) -> str:
    """As Markdown, one row for each ordered pair."""
    lines = [
        "| left | right | tries | linked | how | wish to link, median / most | both up to link | round |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for left, right in itertools.product(KINDS, KINDS):
        own = [one for one in tries if (one.left, one.right) == (left.value, right.value)]
        if own:
            lines.append(write_cells(left.value, right.value, own))
    return "\n".join(lines)


def write_cells(left: str, right: str, tries: Sequence[Try]) -> str:
    """One row of the table."""
    paths = Counter(one.path for one in tries)
    how = ", ".join(f"{count} {path}" for path, count in paths.most_common())
    linked = sum(one.linked_s is not None for one in tries)
    rounds = sum(one.round_s is not None for one in tries)
    taken = _median([one.taken_s for one in tries])
    since = _median([one.linked_s for one in tries])
    return f"| {left} | {right} | {len(tries)} | {linked} | {how} | {taken} | {since} | {rounds} |"


def _median(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.median(known):.1f} / {max(known):.1f} s" if known else "–"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.natlab.pairs", description=__doc__)
    parser.add_argument("--tries", type=int, default=1, help="of each ordered pair")
    parser.add_argument("--out", type=Path, default=Path("build/pairs.jsonl"))
    parser.add_argument("--left", choices=[nat.value for nat in KINDS], action="append", help="only these")
    parser.add_argument("--right", choices=[nat.value for nat in KINDS], action="append", help="only these")
    parser.add_argument("--table", type=Path, nargs="+", help="run nothing, show these")
    arguments = parser.parse_args()
    if arguments.table:
        print(write_table([one for file in arguments.table for one in read_tries(file)]))
        return 0
    missing = find_missing()
    if missing is not None:
        print(f"skipped: {missing}", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the daemons end with this process
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    chosen = [
        (left, right)
        for left, right in itertools.product(KINDS, KINDS)
        if left.value in (arguments.left or [left.value]) and right.value in (arguments.right or [right.value])
    ]
    with tempfile.TemporaryDirectory(prefix="natlab-") as folder:
        swarm = LabSwarm(Path(folder), founders=2)
        # All pairs once, then again: what is stopped early has as many tries of each.
        for number, (left, right) in itertools.product(range(arguments.tries), chosen):
            done = {(one.left, one.right, one.number) for one in read_tries(arguments.out)}
            if (left.value, right.value, number) not in done:
                record(swarm, arguments.out, run_pair(swarm, left, right, number))
    print(write_table(read_tries(arguments.out)))
    return 0


def record(swarm: LabSwarm, out: Path, one: Try) -> None:
    """One more line, and the daemons' logs where no round came about."""
    with out.open("a") as file:
        file.write(json.dumps(asdict(one)) + "\n")
    print(one, flush=True)
    if one.round_s is None:
        name = f"{out.stem}-{one.left}-{one.right}-{one.number}".replace(" ", "-")
        for peer in swarm.peers:
            shutil.copy(peer.log_file, out.parent / f"{name}-{peer.name}.log")


if __name__ == "__main__":
    sys.exit(main())
