"""What a peer may lose when it is killed: nothing that it had told anybody.

    python -m benchmarks.kills [--trials N] [--peers N] [--seed N] [--json FILE] [--keep DIR]

Real daemons with their trainers on a real disk. Every trial: SIGKILL to one of them at a random moment of its round,
then a look at a copy of its database, then a start from its folder. What must hold, over all trials:

    certified rounds lost    the newest round that the peer had shown is in its database, with the certificate that
                             everybody else has
    entries lost             of its own ledger chain at least what any other peer's database has shown of it
    equivocations            no voter with two results in one attempt, no author with two entries of one number, over
                             everything that was read from any database, and no peer that was refused for it
    restart                  from the start to voting: the daemon answers and stands in the newest open round

SIGKILL leaves what the system has been given; that a power cut leaves what was synced is the simulator's business,
whose disks forget unsynced writes.
"""

import argparse
import json
import random
import shutil
import statistics
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import chaos_checks as checks
from benchmarks.chaos_swarm import ChaosSwarm, Member, Standing
from shoal.crdt.entries import Batch
from shoal.crdt.eras import FIRST_ERA, choose_rounds_per_era, era_of_round
from shoal.node.config import MANIFEST_FILE
from shoal.node.ledger_store import LedgerStore
from shoal.node.manifest_source import read_manifest_file
from shoal.protocol.errors import Refusal
from shoal.protocol.identity import PeerId, format_peer_id
from shoal.protocol.manifest import read_manifest_untrusted
from shoal.protocol.messages import Certificate, digest_record
from shoal.protocol.wire import DELTA_BYTES_MAX, decode_record_untrusted

ROUND_TIME_S = 1.5
PAUSE_S = (0.2, 1.6)  # between two kills: as long as a round at most, so that every phase is hit
RESTART_S_MAX = 10.0
SETTLE_S = 90.0
NO_ENTRY = (-1, -1)  # before the first era and number


class Witness:
    """Everything that was read from databases of killed peers, and where two of them contradict each other."""

    def __init__(self) -> None:
        self.faults: list[str] = []
        self.rounds_lost = 0
        self.entries_lost = 0
        self.equivocations = 0
        self.certificates_read = 0
        self.entries_read = 0
        self._results: dict[int, bytes] = {}
        self._votes: dict[tuple[PeerId, int, int], bytes] = {}
        self._entries: dict[tuple[str, int, int], bytes] = {}  # by author, era and number
        self._chain_ends: dict[str, tuple[int, int]] = {}  # an author's newest era and number in anybody's database

    def read(self, member: Member, peer: str, shown: int) -> None:
        """The database of `peer`, which is down; `shown` is the newest certified round that it had shown."""
        with tempfile.TemporaryDirectory(prefix="shoal-kills-") as folder:
            for path in member.peer.folder.glob("ledger.sqlite*"):
                shutil.copy(path, folder)
            with LedgerStore.open(Path(folder) / "ledger.sqlite") as store:
                last = store.get_last_certificate()
                newest = last.round if last else 0
                stored = store.list_certificates(0, newest + 1)
                batches, base = store.load(), store.load_base()
        if newest < shown:
            self.rounds_lost += 1
            self.faults.append(f"{member.name} had shown round {shown} and holds {newest}")
        for one in stored:
            self._take_certificate(member.name, decode_record_untrusted(Certificate, one.body, DELTA_BYTES_MAX))
        signed, swarm = read_manifest_file(member.peer.folder / MANIFEST_FILE)
        manifest, _ = read_manifest_untrusted(signed, swarm)
        rounds_per_era = choose_rounds_per_era(manifest.rounds.snapshot_every)
        oldest = era_of_round(base.round + 1, rounds_per_era) if base else FIRST_ERA
        self._take_batches(member.name, peer, batches, oldest)

    def _take_certificate(self, name: str, certificate: Certificate) -> None:
        self.certificates_read += 1
        result = certificate.result
        digest = digest_record(result)
        if self._results.setdefault(result.round, digest) != digest:
            self.equivocations += 1
            self.faults.append(f"{name} holds another result of round {result.round} than a peer before it")
        for vote in certificate.votes:
            if self._votes.setdefault((vote.voter, vote.round, vote.attempt), vote.result_digest) != vote.result_digest:
                self.equivocations += 1
                self.faults.append(f"{format_peer_id(vote.voter)} has voted twice in {vote.round}/{vote.attempt}")

    def _take_batches(self, name: str, peer: str, batches: Sequence[Batch], oldest_era: int) -> None:
        own_end = NO_ENTRY
        for batch in batches:
            author = format_peer_id(batch.author)
            for entry, entry_id in zip(batch.entries, batch.ids, strict=True):
                self.entries_read += 1
                if self._entries.setdefault((author, entry.era, entry.seq), entry_id) != entry_id:
                    self.equivocations += 1
                    self.faults.append(f"{author} has signed two entries {entry.seq} of era {entry.era}")
                end = entry.era, entry.seq
                self._chain_ends[author] = max(self._chain_ends.get(author, NO_ENTRY), end)
                own_end = max(own_end, end) if author == peer else own_end
        known = self._chain_ends.get(peer, NO_ENTRY)
        # Whole eras are dropped in time, and a peer that is never long enough alive to ask the others writes nothing.
        if known > own_end and known[0] >= oldest_era:
            self.entries_lost += known[1] - own_end[1] if known[0] == own_end[0] else known[1] + 1
            self.faults.append(f"{name} holds its own entries up to {own_end} (era, number), others up to {known}")


class Trials:
    """Kills and starts, one after the other; several peers may be on their way back at once."""

    def __init__(self, swarm: ChaosSwarm, seed: int) -> None:
        self.swarm = swarm
        self.witness = Witness()
        self.phases: Counter[str] = Counter()
        self.restarts_s: list[float] = []
        self.faults: list[str] = []
        self.peers: dict[str, str] = {}  # ids by name
        self._entropy = random.Random(seed)
        self._returning: dict[str, tuple[Member, int]] = {}  # who was started, and the newest round at that time

    def run(self, count: int) -> None:
        done, reported_s = 0, time.monotonic()
        while done < count:
            self._wait(self._entropy.uniform(*PAUSE_S))
            done += self._kill_one()
            if time.monotonic() > reported_s + 30.0:
                reported_s = time.monotonic()
                print(f"{done} trials, round {self.swarm.round()}, {len(self.witness.faults)} faults", flush=True)
            if self.swarm.parted or self.swarm.stuck_s > checks.STUCK_S_MAX:
                break

    def settle(self) -> None:
        end = time.monotonic() + SETTLE_S
        while self._returning and time.monotonic() < end:
            self._wait(0.2)
        self.faults += [f"{name} did not come back to voting" for name in self._returning]

    def _kill_one(self) -> bool:
        able = [one for one in self.swarm.up() if one.name not in self._returning and one.status is not None]
        self._entropy.shuffle(able)
        victim = next((one for one in able if self.swarm.spares(one)), None)
        if victim is None or victim.status is None:
            return False
        peer, shown = victim.status.peer, victim.status.round.round - 1
        self.peers[victim.name] = peer
        self.phases[victim.status.round.phase] += 1
        self.swarm.kill(victim)
        self.witness.read(victim, peer, shown)
        self._returning[victim.name] = victim, self.swarm.round()
        self.swarm.start(victim)
        return True

    def _wait(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for name, (member, newest) in list(self._returning.items()):
                if _is_voting(member, newest):
                    self.restarts_s.append(member.status_s - member.started_s)
                    del self._returning[name]
            time.sleep(0.05)
        for member in self.swarm.members:
            process = member.peer.process
            if member.standing is Standing.UP and process is not None and process.poll() is not None:
                self.faults.append(f"{member.name} ended by itself with {process.returncode}")
                member.standing = Standing.DOWN
                self._returning.pop(member.name, None)


def _is_voting(member: Member, newest: int) -> bool:
    """It answers, and its open round is one after what was certified when it was started, or later."""
    status = member.status
    return status is not None and status.joined and status.round.round > newest and not status.disk.failing


def count_refused(swarm: ChaosSwarm) -> int:
    """How often any live daemon refused a word because its author had contradicted itself."""
    count = 0.0
    for member in swarm.up():
        address = json.loads((member.peer.folder / "running.json").read_text())["web"]
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=5.0) as answer:
            for line in answer.read().decode().splitlines():
                if not line.startswith("#") and f'"{Refusal.EQUIVOCATION}"' in line:
                    count += float(line.rpartition(" ")[2])
    return round(count)


def measure(folder: Path, trials: int, peers: int, seed: int) -> dict[str, Any]:
    """One run and its figures; `faults` is empty when everything held."""
    swarm = ChaosSwarm(folder, peers, seed=seed, round_time_s=ROUND_TIME_S)
    run = Trials(swarm, seed)
    codes: dict[str, int | None] = {}
    refused = 0
    try:
        swarm.begin()
        run.run(trials)
        run.settle()
        refused = count_refused(swarm)
        codes = swarm.leave(swarm.up())
    finally:
        swarm.end()
    witness = run.witness
    for member in swarm.members:
        witness.read(member, run.peers.get(member.name, ""), -1)
    log, compared, faults = checks.merge_logs(swarm.folders())
    faults += [*run.faults, *witness.faults, *checks.check_roots(swarm.roots, log)[1], *checks.check_logs(swarm.logs())]
    faults += checks.check_progress(swarm.stuck_s)
    faults += [f"{name} left with {code}" for name, code in codes.items() if code != 0]
    times = sorted(run.restarts_s)
    late = [one for one in times if one > RESTART_S_MAX]
    faults += [f"{len(late)} restarts took more than {RESTART_S_MAX:.0f} s"] if late else []
    faults += [f"{refused} words were refused as equivocation"] if refused else []
    return {
        "trials": sum(run.phases.values()),
        "killed_in": dict(run.phases),
        "rounds_certified": max(log, default=0),
        "certified_rounds_lost": witness.rounds_lost,
        "entries_lost": witness.entries_lost,
        "equivocations": witness.equivocations + refused,
        "certificates_read": witness.certificates_read,
        "certificates_compared": compared,
        "entries_read": witness.entries_read,
        "restart_s": {
            "count": len(times),
            "median": round(statistics.median(times), 2) if times else None,
            "p95": round(times[int(0.95 * (len(times) - 1))], 2) if times else None,
            "max": round(times[-1], 2) if times else None,
        },
        "longest_wait_s": round(swarm.stuck_s, 1),
        "exit_codes": codes,
        "faults": faults,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="kill daemons at random points of a round, and count what was lost")
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--peers", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--keep", type=Path, help="keep every peer's folder and log here")
    options = parser.parse_args(arguments)
    folder = options.keep or Path(tempfile.mkdtemp(prefix="shoal-kills-"))
    folder.mkdir(parents=True, exist_ok=True)
    report = {
        "peers": options.peers,
        "seed": options.seed,
        **measure(folder, options.trials, options.peers, options.seed),
    }
    if options.json:
        options.json.write_text(json.dumps(report, indent=2), encoding="utf-8")
    print(json.dumps({key: value for key, value in report.items() if key != "faults"}, indent=2))
    for fault in report["faults"]:
        print(f"FAILED: {fault}")
    if report["faults"]:
        print(f"logs: {folder}/*/log")
        return 1
    if options.keep is None:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
