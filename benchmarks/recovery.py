"""How long a death costs: an owner's in the exchange, and a peer's own way back.

    python -m benchmarks.recovery [--repeats N] [--only NAME …] [--json FILE]

Real daemons on loopback, every one behind a line of 16 Mbit/s each way (a user-space proxy), so that an exchange takes
seconds and can be hit in its middle.

    owner_killed   SIGKILL to an owner in the exchange, until the others have applied the round. Target: under two
                   time-outs (rounds.owner_timeout_s) and 1/n of the transfer
    owner_stopped  the same with SIGSTOP: its sockets stay open, and only its silence tells
    rejoin         SIGKILL to a peer that is started again at once, until a round is certified with its work. Target:
                   under 10 s and the transfer. Beside it `answers_s`, until its daemon answers, and `ready_s`, until
                   another peer has its next READY: what is left is the others' round, which it waits for

`transfer_s` is the median length of an undisturbed exchange in the same run. An owner's death counts only where the
round that it was killed in was certified by an exchange that was under way; the others are done again.
"""

import argparse
import json
import math
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from shoal.protocol.effects import Phase
from tests.e2e import swarm as harness
from tests.e2e.shaping_proxy import Line, ShapedNetwork

PEERS = 4
LINE = Line(bytes_per_s=16e6 / 8)
OWNER_TIMEOUT_S = 3.0
TRIES_PER_REPEAT = 4
SETTLE_ROUNDS = 1
# 1.0 M parameters: a peer sends and receives about 1.5 MB a round, 0.8 s of its line.
DRAFT = f"""\
name = "recovery"
seed = 6

[task]
kind = "byte_gpt"
layers = 2
heads = 4
width = 192
context = 32

[training]
inner_steps = 100000
steps_min = 1
round_time_s = 2.0
batch_size = 1

[rounds]
peers_min = 3
grace_s = 3.0
part_elements = 65536
plan_timeout_s = 3.0
sender_timeout_s = 2.0
owner_timeout_s = {OWNER_TIMEOUT_S}
exchange_timeout_s = 30.0
commit_timeout_s = 6.0
presence_period_s = 0.5
presence_timeout_s = 4.0
"""


class Recovery:
    """One swarm; the folder and the processes go with it."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="shoal-recovery-")
        folder = Path(self._folder.name)
        self.network = ShapedNetwork()
        self.swarm = harness.Swarm(folder, PEERS, self.network, DRAFT)
        config = folder / "config.toml"
        config.write_text("[trainer]\nstep_period_s = 0.2\n")
        self.peers = [self._add_peer(f"peer{number}", config) for number in range(1, PEERS + 1)]

    def _add_peer(self, name: str, config: Path) -> harness.Peer:
        peer = self.swarm.add(name)
        self.network.set_line(name, LINE, lambda: peer.pid)
        peer.options += ["--config", str(config)]
        return peer

    def __enter__(self) -> "Recovery":
        self.peers[0].start("up", "--manifest", str(self.swarm.manifest))
        self.swarm.wait("the first peer answers", lambda: self.peers[0].status() is not None)
        status = self.peers[0].status()
        assert status is not None
        for peer in self.peers[1:]:
            peer.start("join", status.uri)
        self.swarm.wait("two rounds", lambda: all(peer.round >= 2 for peer in self.peers))
        return self

    def __exit__(self, *_: object) -> None:
        for peer in self.peers:
            if peer.process is not None and peer.process.poll() is None:
                peer.process.send_signal(signal.SIGCONT)
        self.swarm.end()
        self.network.close()
        self._folder.cleanup()

    def everybody_contributes(self) -> None:
        """Wait until a new round has the work of all."""
        at = max(peer.round for peer in self.peers)
        self.swarm.wait("everybody takes part", lambda: all(peer.contributes_after(at) for peer in self.peers))

    def phase_of(self, peer: harness.Peer) -> tuple[int, str]:
        status = peer.status()
        return (0, "") if status is None else (status.round.round, status.round.phase)

    def await_exchange(self) -> int:
        """The number of a round whose exchange has just begun at the first peer."""
        self.swarm.wait("an exchange ends", lambda: self.phase_of(self.peers[0])[1] != Phase.EXCHANGE)
        while True:
            number, phase = self.phase_of(self.peers[0])
            if phase == Phase.EXCHANGE:
                return number
            time.sleep(0.02)

    def _await_round(self, number: int) -> None:
        self.swarm.wait("the round", lambda: self.peers[0].round >= number)

    def transfer_s(self) -> float:
        """How long an undisturbed exchange and its commit take."""
        times = []
        for _ in range(3):
            number = self.await_exchange()
            began_s = time.monotonic()
            self._await_round(number)
            times.append(time.monotonic() - began_s)
        return statistics.median(times)

    def lose_owner(self, number: int) -> float | None:
        """Seconds from the death of an owner in this exchange to the certified round at all others; None if the
        exchange was over before."""
        victim = self.peers[-1]
        others = self.peers[:-1]
        assert victim.process is not None
        victim.process.send_signal(self.blow)
        died_s = time.monotonic()
        self.swarm.wait("the others go on", lambda: all(peer.round >= number for peer in others))
        took_s = time.monotonic() - died_s
        texts = {one.text for peer in others if (status := peer.status()) for one in status.happenings}
        hit = any(f"of round {number} " in text and "went from peer4" in text for text in texts)
        return took_s if hit else None

    blow: signal.Signals = signal.SIGKILL  # what the victim gets

    def bring_back(self) -> None:
        victim = self.peers[-1]
        assert victim.process is not None
        if self.blow is signal.SIGSTOP:
            victim.process.send_signal(signal.SIGCONT)
        else:
            victim.process.wait(10)
            victim.start("up")
        self.everybody_contributes()


def measure_owner(blow: signal.Signals, repeats: int) -> dict[str, Any]:
    """Deaths of an owner in the exchange."""
    times: list[float] = []
    with Recovery() as run:
        run.blow = blow
        run.everybody_contributes()
        transfer_s = run.transfer_s()
        for _ in range(repeats * TRIES_PER_REPEAT):
            if len(times) == repeats:
                break
            number = run.await_exchange()
            if run.phase_of(run.peers[-1]) != (number, Phase.EXCHANGE):
                continue
            took_s = run.lose_owner(number)
            if took_s is not None:
                times.append(took_s)
            run.bring_back()
        run.swarm.check_roots()
    target_s = 2 * OWNER_TIMEOUT_S + transfer_s / PEERS
    return {**summarise(times), "transfer_s": round(transfer_s, 2), "target_s": round(target_s, 2)}


def measure_rejoin(repeats: int) -> dict[str, Any]:
    """From SIGKILL, with a start at once, to the next certified contribution."""
    steps: dict[str, list[float]] = {"answers_s": [], "ready_s": [], "certified_s": []}
    with Recovery() as run:
        victim, other = run.peers[-1], run.peers[0]
        run.everybody_contributes()
        transfer_s = run.transfer_s()
        for repeat in range(repeats):
            run.everybody_contributes()
            time.sleep(0.7 * repeat % 2.0)  # at different moments of the round
            at = other.round
            victim.kill()
            killed_s = time.monotonic()
            victim.start("up")
            marks: dict[str, Callable[[], bool]] = {
                "answers_s": lambda: victim.status() is not None,
                "ready_s": lambda: _shows_ready(other, victim),
                "certified_s": partial(victim.contributes_after, at),
            }
            for name, condition in marks.items():
                run.swarm.wait(name, condition)
                steps[name].append(time.monotonic() - killed_s)
        run.swarm.check_roots()
    figures = {name: summarise(times)["median_s"] for name, times in steps.items()}
    times = steps["certified_s"]
    target_s = round(10.0 + transfer_s, 2)
    return {**summarise(times), **figures, "transfer_s": round(transfer_s, 2), "target_s": target_s}


def _shows_ready(other: harness.Peer, victim: harness.Peer) -> bool:
    """Whether the other peer knows the victim as ready, or as one that a plan has taken up."""
    status = other.status()
    rows = [] if status is None else [row for row in status.peers if row.name == victim.name]
    return any(row.alive and (row.ready or row.participating) for row in rows)


def summarise(times: Sequence[float]) -> dict[str, Any]:
    if not times:
        return {"count": 0, "median_s": math.nan, "p95_s": math.nan, "times_s": []}
    ordered = sorted(times)
    p95 = ordered[min(len(ordered) - 1, math.ceil(0.95 * len(ordered)) - 1)]
    return {
        "count": len(times),
        "median_s": round(statistics.median(times), 2),
        "p95_s": round(p95, 2),
        "times_s": [round(one, 2) for one in times],
    }


BENCHES: dict[str, Callable[[int], dict[str, Any]]] = {
    "owner_killed": lambda repeats: measure_owner(signal.SIGKILL, repeats),
    "owner_stopped": lambda repeats: measure_owner(signal.SIGSTOP, repeats),
    "rejoin": measure_rejoin,
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="measure how long a death costs")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", nargs="*", choices=tuple(BENCHES), default=list(BENCHES))
    parser.add_argument("--repeats", type=int, default=10)
    options = parser.parse_args(arguments)
    results: dict[str, Any] = {"peers": PEERS, "owner_timeout_s": OWNER_TIMEOUT_S, "repeats": options.repeats}
    missed = []
    for name in options.only:
        results[name] = figures = BENCHES[name](options.repeats)
        print(f"{name}: {json.dumps(figures)}", flush=True)
        if figures["count"] < options.repeats or figures["p95_s"] > figures["target_s"]:
            missed.append(name)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2), encoding="utf-8")
    for name in missed:
        print(f"target missed: {name}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
