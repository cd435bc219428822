"""How long a swarm is away that has one disk left: everybody is killed, all folders but one are removed.

    python -m benchmarks.cold_restart [--rounds N] [--json FILE]

Real daemons on loopback. Three founders train; all get SIGKILL; two folders are removed. The owner names the last peer
the only voter, it is started again, and two newcomers join.

    verify_s     `shoal verify --all` of the folder that is left
    reroot_s     `shoal swarm reroot`
    answers_s    from the start of the last peer until its web port answers
    certified_s  from there until the first round with an update is certified
    together_s   from the newcomers' start until a round has counted the work of all three
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from shoal.node.archive import open_archive
from tests.e2e import swarm as harness


def measure(rounds: int, folder: Path) -> dict[str, Any]:
    """One run."""
    swarm = harness.Swarm(folder, founders=3)
    try:
        return _measure(swarm, rounds)
    finally:
        swarm.end()


def _measure(swarm: harness.Swarm, rounds: int) -> dict[str, Any]:
    figures: dict[str, Any] = {}

    def timed(name: str, work: Callable[[], object]) -> None:
        begun_s = time.monotonic()
        work()
        figures[name] = round(time.monotonic() - begun_s, 2)

    first = swarm.add("peer1").start("up", "--manifest", str(swarm.manifest))
    swarm.wait("the first peer answers", lambda: first.status() is not None)
    uri = _uri_of(first)
    second, third = (swarm.add(f"peer{number}").start("join", uri) for number in (2, 3))
    while min(peer.round for peer in (first, second, third)) < rounds:
        at = first.round
        swarm.wait("a round", lambda: first.round > at)  # noqa: B023
    for peer in (first, second, third):
        peer.kill()
    for peer in (second, third):
        swarm.peers.remove(peer)
        shutil.rmtree(peer.folder)

    def run(*arguments: str) -> None:
        done = harness.run(*arguments, "--data-dir", str(first.folder))
        assert done.returncode == 0, done.stdout + done.stderr

    timed("verify_s", lambda: run("verify", "--all"))
    with open_archive(first.folder) as archive:
        stood_at = archive.certificates.newest
    me = harness.run("id", "--data-dir", str(first.folder)).stdout.strip()
    timed("reroot_s", lambda: run("swarm", "reroot", "--voter", me))
    first.start("up")
    timed("answers_s", lambda: swarm.wait("it answers", lambda: first.status() is not None))
    answered_s = time.monotonic()
    uri = _uri_of(first)
    newcomers = [swarm.add(f"peer{number}").start("join", uri) for number in (4, 5)]
    swarm.wait("a round with an update", lambda: first.round >= stood_at + 2)
    figures["certified_s"] = round(time.monotonic() - answered_s, 2)
    everybody = (first, *newcomers)
    swarm.wait("everybody's work", lambda: all(peer.contributes_after(stood_at) for peer in everybody))
    figures["together_s"] = round(time.monotonic() - answered_s, 2)
    return {"rounds": stood_at, **figures}


def _uri_of(peer: harness.Peer) -> str:
    status = peer.status()
    assert status is not None
    return status.uri


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="A swarm from one surviving disk.")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(options.rounds, Path(folder))
    text = json.dumps(figures, indent=2)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
