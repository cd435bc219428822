"""Rounds of a model that memory does not hold: `shoal bench allreduce`, with a limit of the kernel's on the first peer.

    sudo python -m benchmarks.large_model --mib 3815 --limit-gib 16 --folder /data [--json FILE]

The limit is that of a control group (version 1 or 2, whichever has the memory controller), which counts all that the
first peer has in memory: its own, and what the system keeps of its mapped files. With less than it needs it would be
killed. `--limit-gib 0` sets none and needs no root.
"""

import argparse
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shoal.node.bench.allreduce import AllreduceOptions, run_allreduce
from shoal.node.bench.commands import describe_machine
from shoal.node.bench.processes import Place
from shoal.node.config import ON_DISK

GROUPS = Path("/sys/fs/cgroup")
# By version: where groups are made, and the files with the limit, the most ever used, and what is counted.
VERSIONS = (
    (GROUPS, "memory.max", "memory.peak", "memory.stat"),
    (GROUPS / "memory", "memory.limit_in_bytes", "memory.max_usage_in_bytes", "memory.stat"),
)
COUNTED = ("pgmajfault", "total_pgmajfault")  # pages that were read again from the disk


@contextmanager
def limited_group(limit_gib: float) -> Iterator[tuple[Place, dict[str, int]]]:
    """A place whose process has so much memory at most, and what it has used, known at the end."""
    used: dict[str, int] = {}
    if not limit_gib:
        yield Place(), used
        return
    name = f"shoal-bench-{os.getpid()}"
    for top, limit, peak, counts in VERSIONS:
        group = top / name
        if not (top / "cgroup.procs").exists():
            continue
        group.mkdir()
        if not (group / limit).exists():  # this version has not the controller
            group.rmdir()
            continue
        (group / limit).write_text(str(int(limit_gib * 2**30)))
        try:
            yield Place(prefix=("sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh")), used
            used["peak_bytes"] = int((group / peak).read_text())
            lines = (line.split() for line in (group / counts).read_text().splitlines())
            used.update({words[0]: int(words[1]) for words in lines if words[0] in COUNTED})
        finally:
            while (group / "cgroup.procs").read_text().strip():
                time.sleep(0.1)
            group.rmdir()
        return
    raise SystemExit("no control group can limit memory here; give --limit-gib 0")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=float, default=3815.0)
    parser.add_argument("--peers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--limit-gib", type=float, default=16.0)
    parser.add_argument("--vectors", default=ON_DISK)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    options = AllreduceOptions(
        peers=given.peers, mib=given.mib, rounds=given.rounds, folder=given.folder, vectors=given.vectors
    )
    began_s = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - began_s:7.0f} s  {text}", flush=True)

    with limited_group(given.limit_gib) as (place, used):
        result = run_allreduce(options, say, (place, *[Place()] * (given.peers - 1)))
    figures = {**describe_machine(), "allreduce": result.to_json(), "limited": used}
    text = json.dumps(figures, indent=2, default=str)
    print(text)
    if given.json:
        given.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
