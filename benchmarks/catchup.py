"""How long a peer takes to catch up, how many bytes come, and what share of the line is used.

    python -m benchmarks.catchup --elements 30000000 --missed 1,10,100 --donors 1,3,6 --json FILE
    python -m benchmarks.catchup --flips 10000

Real daemons over real tensor links on loopback, each in a process of its own, over a made-up log (production code makes
and certifies it, nobody trains). The joiner's line is shaped to `--line` bytes a second: each donor's uplink is a token
bucket in its process with an equal share of it. The time is that of the joiner's catch-up, from the first question to
the applied head; the line's share is the fetched bytes over that time. `--flips` asks for pieces of every kind with one
byte flipped and counts the refusals.
"""

import argparse
import json
import logging
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.flipped_bytes import count_refusals
from tests.e2e.certified_log import Log, fill_folder, make_log
from tests.e2e.log_peer import LogPeer
from tests.e2e.shaping_proxy import choose_port

GIGABIT = 125e6
UPDATES_KEPT = 14
SNAPSHOT_BACK = 2  # the donors' snapshot is this many rounds behind the head
WAIT_S = 280.0
POLL_S = 0.05
LEAN_FROM = 100_000_000  # elements from which on the donors' states lie in files: their memory is not what is measured


def make(folder: Path, elements: int, missed: list[int]) -> Log:
    """A log long enough for the farthest joiner, with the snapshots that joiners and donors stand on."""
    rounds = max(missed) + 4
    heads = {rounds - one for one in missed}
    return make_log(
        folder,
        elements,
        rounds,
        updates_from=max(1, rounds - UPDATES_KEPT),
        snapshots={rounds - SNAPSHOT_BACK, *(head for head in heads if head >= rounds - UPDATES_KEPT)},
    )


def measure(log: Log, folder: Path, missed: int, donors: int, line: float) -> dict[str, Any]:
    """One joiner, `missed` rounds behind; one that has missed more than there are updates begins at round 0."""
    ports: set[int] = set()
    head = log.head - missed
    if head not in log.snapshots:
        head = 0
    lean = log.manifest.layout.elements >= LEAN_FROM
    peers: list[LogPeer] = []
    processes = []
    try:
        for number in range(donors):
            place = folder / f"donor{number}"
            fill_folder(log, place, log.head, snapshots=[log.head - SNAPSHOT_BACK])
            donor = LogPeer(
                data_dir=str(place),
                control_port=choose_port(ports),
                tensor_port=choose_port(ports),
                bootstraps=tuple(one.address for one in peers[:1]),
                rate=line / donors,
                lean=lean,
            )
            peers.append(donor)
            processes.append(donor.start())
            wait(f"donor {number} is ready", donor)
        place = folder / "joiner"
        fill_folder(log, place, head, updates_after=head, snapshots=[head] if head else [])
        joiner = LogPeer(
            data_dir=str(place),
            control_port=choose_port(ports),
            tensor_port=choose_port(ports),
            bootstraps=tuple(one.address for one in peers),
            donors=donors,
        )
        processes.append(joiner.start())
        ended = wait("the joiner has caught up", joiner, head=log.head)
        assert ended["root"] == log.roots[-1].hex(), "the certified state"
    finally:
        for process in processes:
            process.kill()
            process.wait()
        shutil.rmtree(folder, ignore_errors=True)
    state_bytes = 8 * log.manifest.layout.elements
    return {
        "missed": missed,
        "donors": donors,
        "by_snapshot": ended["snapshots"] > 0,
        "megabytes": round(ended["nbytes"] / 1e6, 1),
        "seconds": round(ended["seconds"], 2),
        "line_share": round(ended["nbytes"] / ended["seconds"] / line, 3),
        "fetch_seconds": round(ended["fetch_s"], 2),
        "fetch_line_share": round(ended["nbytes"] / max(ended["fetch_s"], 1e-9) / line, 3),
        "joiner_cpu_seconds": round(ended["cpu_s"], 2),
        "of_full_state_bytes": round(ended["nbytes"] / state_bytes, 3),
        "full_state_at_line_rate_s": round(state_bytes / line, 2),
    }


def wait(what: str, peer: LogPeer, head: int | None = None) -> dict[str, Any]:
    """Until the peer tells that it is ready, or has caught up to `head`."""
    end = time.monotonic() + WAIT_S
    while time.monotonic() < end:
        told = peer.events("ready" if head is None else "ended")
        found = [one for one in told if head is None or one["head"] == head]
        if found:
            return found[-1]
        time.sleep(POLL_S)
    raise SystemExit(f"not within {WAIT_S:.0f} s: {what}\n{peer.log()[-3000:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description="catch-up between real processes")
    parser.add_argument("--elements", type=int, default=30_000_000, help="parameters of the model (default 30 M)")
    parser.add_argument("--missed", default="1,10,100", help="missed rounds (default 1,10,100)")
    parser.add_argument("--donors", default="1,3,6", help="numbers of donors (default 1,3,6)")
    parser.add_argument("--line", type=float, default=GIGABIT, help="bytes per second (default 1 Gbit/s)")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--flips", type=int, default=0, help="only this: so many pieces with a flipped byte")
    parser.add_argument("--folder", type=Path, help="where the folders are made (default: the system's)")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    options = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as made:
        base = Path(made)
        if options.flips:
            logging.disable(logging.WARNING)  # every refusal is told there, too
            results["flips"] = count_refusals(base, options.flips)
            print(json.dumps(results["flips"]))
        else:
            missed = [int(one) for one in options.missed.split(",")]
            log = make(base / "log", options.elements, missed)
            results |= {"elements": options.elements, "line_bytes_per_s": options.line, "runs": []}
            for number in (int(one) for one in options.donors.split(",")):
                for one in missed:
                    for _ in range(options.repeats):
                        run = measure(log, base / "run", one, number, options.line)
                        results["runs"].append(run)
                        print(json.dumps(run), flush=True)
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
