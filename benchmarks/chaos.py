"""Real daemons under fire: kill, stop, cut, fill disks, for as long as asked, and check everything afterwards.

    python -m benchmarks.chaos [--seconds N] [--seed N] [--peers N] [--json FILE] [--keep DIR]

Every 0.5 to 2 s one action, drawn from a seed: SIGKILL and start in the proportion 40 : 60, and beside them SIGSTOP for
seconds, half-open connections (a proxy that stops forwarding and tells nobody), a full disk (a small tmpfs in a mount
namespace of this run), a killed trainer. What would end the quorum is held back. The first peer is never killed, so
that one daemon lives through it all and can be judged for leaks. Exit code 1, with the seed and the logs' place, when
anything that must hold does not.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import chaos_checks as checks
from benchmarks.chaos_swarm import TRAINER_KILLS_MAX, ChaosSwarm, Member, Standing

PAUSE_S = (0.5, 2.0)
WEIGHTS = {"kill": 30, "start": 45, "stop": 9, "cut": 6, "trainer": 6, "disk": 4}
STOP_S = (1.0, 12.0)  # shorter and longer than the presence time-out
DISK_FULL_S = (3.0, 14.0)  # the daemon looks at its disk every 10 s; a write fails at once
DISK_MIB = 48
FRESH_SHARE = 0.3  # of the starts that may give up a folder do
SETTLE_S = 120.0  # a peer whose disk was full again and again waits for a minute
ROUND_TIME_S = 1.5
NAMESPACE_MARK = "SHOAL_CHAOS_NAMESPACE"


class Chaos:
    """One run: the actions, the log of them, and what is undone later."""

    def __init__(self, swarm: ChaosSwarm, seed: int, disk_peer: Member | None, say: Callable[[str], None]) -> None:
        self.swarm = swarm
        self.log: list[tuple[float, str]] = []
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []
        self._entropy = random.Random(seed)
        self._disk_peer = disk_peer
        self._say = say
        self._due: list[tuple[float, Callable[[], None]]] = []
        self._given_up: set[str] = set()
        self._wanted = len(swarm.members)

    def note(self, kind: str, text: str) -> None:
        at_s = time.monotonic() - self.swarm.began_s
        self.log.append((round(at_s, 2), text))
        self.counts[kind] += 1
        self._say(f"{at_s:7.1f}  round {self.swarm.round():4}  {text}")

    def run(self, seconds: float) -> None:
        """Act until the time is over, then undo what is still done."""
        end = time.monotonic() + seconds
        kinds, weights = list(WEIGHTS), list(WEIGHTS.values())
        while time.monotonic() < end and not self._is_over():
            self._wait(self._entropy.uniform(*PAUSE_S))
            (kind,) = self._entropy.choices(kinds, weights)
            getattr(self, f"_{kind}")()
        for _, undo in self._due:
            undo()
        self._due.clear()

    def _is_over(self) -> bool:
        """What cannot be mended any more need not be watched further."""
        return self.swarm.parted or self.swarm.stuck_s > checks.STUCK_S_MAX

    def _wait(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (now := time.monotonic()) < end:
            for one in [one for one in self._due if one[0] <= now]:
                self._due.remove(one)
                one[1]()
            time.sleep(0.05)
        self._watch_for_deaths()

    def _watch_for_deaths(self) -> None:
        for member in self.swarm.members:
            process = member.peer.process
            if (
                member.standing in (Standing.UP, Standing.IMPAIRED)
                and process is not None
                and process.poll() is not None
            ):
                self.faults.append(f"{member.name} ended by itself with {process.returncode}")
                self.note("died", f"{member.name} ended by itself with {process.returncode}")
                member.standing = Standing.DOWN

    def _later(self, seconds: float, undo: Callable[[], None]) -> None:
        self._due.append((time.monotonic() + seconds, undo))

    # -- the actions -------------------------------------------------------------------------------------------------

    def _victim(self, *, spare: Sequence[Member] = ()) -> Member | None:
        """Somebody whose absence leaves a quorum; None, and noted, where there is nobody."""
        chosen = self._entropy.choice(self.swarm.members)
        if chosen.standing is not Standing.UP or chosen in spare:
            return None
        if not self.swarm.spares(chosen):
            self.counts["held back for the quorum"] += 1
            return None
        return chosen

    def _kill(self) -> None:
        spare = [self.swarm.members[0]]
        victim = next((one for _ in range(6) if (one := self._victim(spare=spare)) is not None), None)
        if victim is not None:
            where = victim.status.round.phase if victim.status else "starting"
            self.swarm.kill(victim)
            self.note("kill", f"SIGKILL {victim.name} ({where})")

    def _start(self) -> None:
        down = [one for one in self.swarm.down() if one.name not in self._given_up]
        if not down:
            return
        chosen = self._entropy.choice(down)
        # A folder may be given up for good only when no round needs its owner's vote.
        fresh = self._entropy.random() < FRESH_SHARE and self.swarm.voters_all_live()
        if fresh and chosen is not self._disk_peer:
            self._given_up.add(chosen.name)
            self.note(
                "join", f"{self.swarm.join_fresh().name} joins with an empty folder; {chosen.name} is gone for good"
            )
        else:
            self.swarm.start(chosen)
            self.note("restart", f"{chosen.name} starts again from its folder")

    def _stop(self) -> None:
        victim = self._victim()
        if victim is None:
            return
        seconds = self._entropy.uniform(*STOP_S)
        self.swarm.stop(victim)
        self._later(seconds, lambda: self.swarm.resume(victim))
        self.note("stop", f"SIGSTOP {victim.name} for {seconds:.1f} s")

    def _cut(self) -> None:
        victim = self._entropy.choice(self.swarm.members)
        if victim.standing is Standing.UP:
            both = self._entropy.random() < 0.5
            count = self.swarm.network.freeze(victim.name, victim.peer.pid if both else None)
            self.note("cut", f"{count} connections {'of' if both else 'to'} {victim.name} are half open")

    def _trainer(self) -> None:
        victim = self._entropy.choice(self.swarm.members)
        able = victim.standing is Standing.UP and victim.trainer_kills < TRAINER_KILLS_MAX
        if able and self.swarm.kill_trainer(victim):
            self.note("trainer", f"SIGKILL to the trainer of {victim.name}")

    def _disk(self) -> None:
        victim = self._disk_peer
        if victim is None or victim.standing is not Standing.UP or not self.swarm.spares(victim):
            return
        if victim.status is None:
            return  # it is starting, and a start on a full disk is rightly refused
        left_bytes = self._entropy.choice((0, 2 << 20))  # nothing, or less than the configured minimum
        victim.standing = Standing.IMPAIRED
        ballast = victim.peer.folder / "ballast"
        _fill(ballast, left_bytes)
        seconds = self._entropy.uniform(*DISK_FULL_S)
        self._later(seconds, lambda: self._empty(victim, ballast))
        self.note("disk", f"the disk of {victim.name} is full ({left_bytes >> 20} MiB left) for {seconds:.1f} s")

    def _empty(self, victim: Member, ballast: Path) -> None:
        """There is space again; the peer is to vote again by itself."""
        ballast.unlink()
        if victim.standing is Standing.IMPAIRED:
            victim.standing = Standing.UP
            self.note("disk freed", f"the disk of {victim.name} has space")

    # -- the end -----------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Everybody back, and two more rounds that all of them show with one root."""
        for member in self.swarm.down():
            if member.name not in self._given_up:
                self.swarm.start(member)
        at = self.swarm.round()
        end = time.monotonic() + SETTLE_S
        while time.monotonic() < end and not self._is_over():
            self._wait(0.3)
            if self._agreed(at + 2):
                self.note("settled", f"all {len(self.swarm.up())} live peers show one root after round {at + 2}")
                return
        self.faults.append(f"not all live peers reached one root within {SETTLE_S:.0f} s:\n{self.swarm.standstill()}")

    def _agreed(self, after: int) -> bool:
        names = {member.name for member in self.swarm.up()}
        return any(number > after and names <= set(roots) for number, roots in list(self.swarm.roots.items()))


def _fill(ballast: Path, left_bytes: int) -> None:
    """Write until the disk is full, then give `left_bytes` back."""
    piece = bytes(1 << 20)
    with ballast.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12):
            try:
                while file.write(piece[:size]) == size:
                    pass
            except OSError:
                continue
        if left_bytes:
            file.truncate(max(0, file.tell() - left_bytes))


def run_chaos(*, folder: Path, seconds: float, seed: int, peers: int, mounts: bool, quiet: bool) -> dict[str, Any]:
    """One run and its report; `faults` in it is empty when everything held."""

    def say(text: str) -> None:
        if not quiet:
            print(text, flush=True)

    def mount(place: Path) -> None:
        place.mkdir(parents=True, exist_ok=True)
        if mounts and place.name == "peer2":
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", str(place)], check=True)

    swarm = ChaosSwarm(folder, peers, seed=seed, round_time_s=ROUND_TIME_S, prepare=mount)
    if mounts:  # a log is no part of what a daemon must have space for
        swarm.members[1].peer.log_file = folder / "peer2.log"
    chaos = Chaos(swarm, seed, swarm.members[1] if mounts else None, say)
    codes: dict[str, int | None] = {}
    try:
        swarm.begin()
        chaos.note("begun", f"{peers} peers train")
        chaos.run(seconds)
        chaos.settle()
        final = {member.name: (member.status.round.round - 1 if member.status else -1) for member in swarm.up()}
        codes = swarm.leave(swarm.up())
        left_over = swarm.left_over()
    finally:
        swarm.end()
    return _report(chaos, codes, final, left_over)


def _report(chaos: Chaos, codes: dict[str, int | None], final: dict[str, int], left_over: list[str]) -> dict[str, Any]:
    swarm = chaos.swarm
    log, compared, log_faults = checks.merge_logs(swarm.folders())
    roots, root_faults = checks.check_roots(swarm.roots, log)
    growth, growth_faults = checks.check_growth(swarm.lives())
    faults = [*chaos.faults, *log_faults, *root_faults, *growth_faults]
    faults += [*checks.check_progress(swarm.stuck_s), *checks.check_logs(swarm.logs())]
    faults += [f"{name} left with {code}" for name, code in codes.items() if code != 0]
    faults += [f"still there: {line}" for line in left_over]
    failed: Counter[str] = Counter()
    for member in swarm.members:
        failed.update(member.attempts_failed)
    return {
        "actions": dict(chaos.counts),
        "rounds": {
            **roots,
            "certificates_compared": compared,
            "members_mean": round(sum(len(one.members) for one in log.values()) / max(1, len(log)), 2),
            "between": checks.describe_gaps(swarm.round_seen_s),
        },
        "progress": {
            "longest_wait_s": round(swarm.stuck_s, 1),
            "without_quorum_s": round(swarm.without_quorum_s, 1),
        },
        "attempts_failed": dict(failed),
        "growth": growth,
        "last_rounds": final,
        "exit_codes": codes,
        "faults": faults,
        "log": chaos.log,
    }


def enter_namespace(arguments: Sequence[str]) -> str:
    """Start anew where a small file system may be mounted and vanishes with this run. Returns why it cannot be."""
    if os.environ.get(NAMESPACE_MARK):
        return ""
    words = ["unshare", "--mount"] + ([] if os.geteuid() == 0 else ["--map-root-user"])
    if shutil.which("unshare") is None:
        return "no `unshare` on this machine"
    tried = subprocess.run(
        [*words, "sh", "-c", "mount -t tmpfs -o size=1m tmpfs /mnt"], capture_output=True, text=True, check=False
    )
    if tried.returncode:
        return (tried.stderr.strip().splitlines() or [f"exit code {tried.returncode}"])[-1]
    os.environ[NAMESPACE_MARK] = "1"
    os.execvp(words[0], [*words, sys.executable, "-m", "benchmarks.chaos", *arguments])


def main(arguments: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(description="kill, stop and cut real daemons, and check what must hold")
    parser.add_argument(
        "--seconds", type=float, default=120.0, help="how long to act; starting and leaving come on top"
    )
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--peers", type=int, default=8)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--keep", type=Path, help="keep every peer's folder and log here, whatever the outcome")
    parser.add_argument("--quiet", action="store_true", help="the report alone")
    options = parser.parse_args(given)
    seed = random.SystemRandom().randrange(2**32) if options.seed is None else options.seed
    no_disk = enter_namespace([*given, *([] if options.seed is not None else ["--seed", str(seed)])])
    if no_disk:
        print(f"skipped: a full disk, because no small file system can be mounted here: {no_disk}")
    folder = options.keep or Path(tempfile.mkdtemp(prefix="shoal-chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    print(f"seed {seed}, {options.peers} peers, {options.seconds:.0f} s", flush=True)
    report = run_chaos(
        folder=folder,
        seconds=options.seconds,
        seed=seed,
        peers=options.peers,
        mounts=not no_disk,
        quiet=options.quiet,
    )
    report = {"seed": seed, "peers": options.peers, "seconds": options.seconds, "disk_skipped": no_disk, **report}
    if options.json:
        options.json.write_text(json.dumps(report, indent=2), encoding="utf-8")
    shown = {key: value for key, value in report.items() if key not in ("log", "faults")}
    print(json.dumps(shown, indent=2))
    for fault in report["faults"]:
        print(f"FAILED: {fault}")
    if report["faults"]:
        again = f"make chaos SEED={seed} SECONDS={options.seconds:.0f} PEERS={options.peers}"
        print(f"seed {seed}; logs: {folder}/*/log, {folder}/*.log; again: {again}")
        return 1
    print(f"chaos: all held over {report['rounds']['rounds_certified']} rounds, seed {seed}")
    if options.keep is None:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
