"""A swarm of real daemons for the fault runs: who is up, what each said last, what may be taken down.

Every daemon is watched by a thread of its own, so that one that hangs does not hide what the others say. The rules of
the protocol decide what may be killed: a round needs a quorum of the voters that the last certified result names, so a
fault is held back while it would leave fewer of them alive, and a voter that was killed comes back from its own folder.
"""

import signal
import statistics
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

import psutil

from shoal.node.status import Status
from tests.e2e import swarm as harness
from tests.e2e.shaping_proxy import ShapedNetwork

WATCH_PERIOD_S = 0.3
SAMPLE_PERIOD_S = 2.0
FRESH_S = 4.0  # how old the status of a live voter may be
ROUNDS_BEHIND_MAX = 3
LEAVE_LIMIT_S = 60.0
TRAINER_KILLS_MAX = 4  # one less than what a daemon takes before it gives its trainer up

# One layer, a step every tenth of a second: the machine has time left, so what a fault costs is not hidden by what the
# others gain from the processor time of the dead.
STEP_PERIOD_S = 0.1
DRAFT = """\
name = "chaos"
seed = 5

[task]
kind = "byte_gpt"
layers = 1
heads = 2
width = 32
context = 32

[training]
inner_steps = 100000
steps_min = 1
round_time_s = {round_time_s}
batch_size = 2
learning_rate = 1e-3
warmup_steps = 20

[rounds]
peers_min = 2
grace_s = 2.0
part_elements = 4096
plan_timeout_s = 4.0
sender_timeout_s = 4.0
owner_timeout_s = 6.0
exchange_timeout_s = 20.0
commit_timeout_s = 8.0
presence_period_s = 0.5
presence_timeout_s = 5.0
snapshot_every = 8
"""
CONFIG = """\
[store]
free_gib_min = {free_gib_min}
[trainer]
step_period_s = {step_period_s}
"""


class Standing(StrEnum):
    """What was last done to a daemon."""

    DOWN = "down"
    UP = "up"
    STOPPED = "stopped"  # by SIGSTOP
    IMPAIRED = "impaired"  # it runs, and takes part in no round: a full disk
    LEAVING = "leaving"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What a daemon held at some moment."""

    at_s: float
    descriptors: int
    rss_mib: float


@dataclass(slots=True)
class Member:
    """One peer of the run, over all of its incarnations."""

    peer: harness.Peer
    standing: Standing = Standing.DOWN
    started_s: float = 0.0
    status: Status | None = None
    status_s: float = 0.0
    answered_s: float = 0.0  # when this incarnation first answered
    trainer_kills: int = 0
    samples: list[Sample] = field(default_factory=list)
    lives: list[list[Sample]] = field(default_factory=list)
    attempts_failed: dict[str, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.peer.name


class ChaosSwarm:
    """Everything that one fault run started. `end` leaves no process, thread or proxy behind."""

    def __init__(
        self,
        folder: Path,
        count: int,
        *,
        seed: int,
        round_time_s: float,
        free_gib_min: float = 0.01,
        step_period_s: float = STEP_PERIOD_S,
        prepare: Callable[[Path], None] = lambda folder: None,
    ) -> None:
        self.began_s = time.monotonic()
        self.network = ShapedNetwork(seed)
        for number in range(1, count + 1):
            prepare(folder / f"peer{number}")
        self.swarm = harness.Swarm(folder, count, self.network, DRAFT.format(round_time_s=round_time_s))
        self.config = folder / "config.toml"
        self.config.write_text(CONFIG.format(free_gib_min=free_gib_min, step_period_s=step_period_s))
        self.members = [self._add(f"peer{number}") for number in range(1, count + 1)]
        self.uri = ""
        self.round_seen_s: dict[int, float] = {}  # when a round was first seen certified
        self.parted = False  # two peers showed different roots for one round
        self.roots: dict[int, dict[str, str]] = {}  # by round and peer
        self.stuck_s = 0.0  # the longest time without a certified round while a quorum was there
        self.without_quorum_s = 0.0
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._threads: list[threading.Thread] = []

    # -- life --------------------------------------------------------------------------------------------------------

    def _add(self, name: str) -> Member:
        member = Member(self.swarm.add(name))
        member.peer.options += ["--config", str(self.config)]
        return member

    def begin(self) -> None:
        """Start everybody, wait for the first round, and watch from there on."""
        first = self.members[0]
        self.start(first)
        self.swarm.wait("the first peer answers", lambda: first.peer.status() is not None)
        status = first.peer.status()
        assert status is not None
        self.uri = status.uri
        for member in self.members[1:]:
            self.start(member)
        for member in self.members:
            self._watch_in_background(member)
        self._run(self._watch_progress)
        self.swarm.wait("everybody is in round 2", lambda: all(one.peer.round >= 1 for one in self.members))

    def join_fresh(self) -> Member:
        """One more peer, with an empty folder."""
        member = self._add(f"peer{len(self.members) + 1}")
        self.members.append(member)
        self.start(member)
        self._watch_in_background(member)
        return member

    def start(self, member: Member) -> None:
        """From its own folder if it has been there before."""
        knows = (member.peer.folder / "manifest.shoal").exists()
        if knows:
            member.peer.start("up")
        elif self.uri:
            member.peer.start("join", self.uri)
        else:
            member.peer.start("up", "--manifest", str(self.swarm.manifest))
        member.started_s = time.monotonic()
        member.answered_s = 0.0
        member.status = None
        member.trainer_kills = 0
        member.standing = Standing.UP

    def kill(self, member: Member) -> None:
        """SIGKILL; it dies stopped, too."""
        member.standing = Standing.DOWN
        member.peer.kill()
        self._bury(member)

    def stop(self, member: Member) -> None:
        """SIGSTOP: the sockets stay open, and nobody answers."""
        member.standing = Standing.STOPPED
        assert member.peer.process is not None
        member.peer.process.send_signal(signal.SIGSTOP)

    def resume(self, member: Member) -> None:
        assert member.peer.process is not None
        member.peer.process.send_signal(signal.SIGCONT)
        member.standing = Standing.UP

    def leave(self, members: list[Member]) -> dict[str, int | None]:
        """Ctrl-C to all of them at once; exit codes, None for who did not leave in time and was killed."""
        for member in members:
            member.standing = Standing.LEAVING
            assert member.peer.process is not None
            member.peer.process.send_signal(signal.SIGINT)
        end = time.monotonic() + LEAVE_LIMIT_S
        codes: dict[str, int | None] = {}
        for member in members:
            assert member.peer.process is not None
            try:
                codes[member.name] = member.peer.process.wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                codes[member.name] = None
                member.peer.kill()
            member.standing = Standing.DOWN
            self._bury(member)
        return codes

    def kill_trainer(self, member: Member) -> bool:
        """SIGKILL to its trainer, if it has one now."""
        trainers = self._trainers_of(member)
        for trainer in trainers:
            trainer.kill()
        member.trainer_kills += bool(trainers)
        return bool(trainers)

    def _trainers_of(self, member: Member) -> list[psutil.Process]:
        try:
            children = psutil.Process(member.peer.pid).children()
            return [child for child in children if any("training.worker" in word for word in child.cmdline())]
        except psutil.Error:
            return []

    def _bury(self, member: Member) -> None:
        if member.samples:
            member.lives.append(member.samples)
            member.samples = []
        member.status = None

    def end(self) -> None:
        self._closing.set()
        for member in self.members:
            if member.standing is Standing.STOPPED:
                self.resume(member)
        self.swarm.end()
        for thread in self._threads:
            thread.join(10)
        self.network.close()

    def left_over(self) -> list[str]:
        """Processes that this swarm started, or that their daemons did, and that are still there."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(harness.MARK) == str(self.swarm.folder):
                    found.append(f"{process.pid} {' '.join(process.cmdline())}")
            except psutil.Error:
                continue
        return found

    # -- who is there ------------------------------------------------------------------------------------------------

    def up(self) -> list[Member]:
        return [one for one in self.members if one.standing is Standing.UP]

    def down(self) -> list[Member]:
        return [one for one in self.members if one.standing is Standing.DOWN]

    def newest(self) -> Status | None:
        """The status that knows the newest certified round."""
        known = [one.status for one in self.members if one.status is not None]
        return max(known, key=lambda status: status.round.round, default=None)

    def live_voters(self, without: Member | None = None) -> tuple[int, int]:
        """Voters of the open round that run and keep up, and how many votes certify it."""
        newest = self.newest()
        if newest is None:
            return 0, 1
        voters = {row.peer for row in newest.peers if row.voter}
        now = time.monotonic()
        live = 0
        for member in self.up():
            status = member.status
            keeps_up = (
                status is not None
                and now - member.status_s < FRESH_S
                and newest.round.round - status.round.round <= ROUNDS_BEHIND_MAX
                and not status.disk.failing
            )
            live += member is not without and keeps_up and status is not None and status.peer in voters
        return live, newest.round.votes_needed

    def spares(self, member: Member) -> bool:
        """Whether a quorum is left without this peer."""
        live, needed = self.live_voters(without=member)
        return live >= needed

    def voters_all_live(self) -> bool:
        """Whether the newest result names no voter that is down."""
        newest = self.newest()
        return newest is not None and newest.round.voters == sum(row.voter and row.alive for row in newest.peers)

    # -- watching ----------------------------------------------------------------------------------------------------

    def _run(self, work: Callable[[], None]) -> None:
        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        self._threads.append(thread)

    def _watch_in_background(self, member: Member) -> None:
        self._run(lambda: self._watch(member))

    def _watch(self, member: Member) -> None:
        sample_due_s = 0.0
        while not self._closing.wait(WATCH_PERIOD_S):
            if member.standing not in (Standing.UP, Standing.IMPAIRED):
                continue
            started_s = member.started_s
            status = member.peer.status()
            if status is None or started_s != member.started_s:
                continue  # it was started anew meanwhile
            self._take(member, status)
            now = time.monotonic()
            if now >= sample_due_s:
                sample_due_s = now + SAMPLE_PERIOD_S
                self._sample(member, now)

    def _take(self, member: Member, status: Status) -> None:
        now = time.monotonic()
        member.status, member.status_s = status, now
        member.answered_s = member.answered_s or now
        for one in status.aborted:
            member.attempts_failed[one.reason] = max(member.attempts_failed.get(one.reason, 0), one.count)
        number, root = status.round.round - 1, status.round.state_root
        with self._lock:
            self.round_seen_s.setdefault(number, now)
            seen = self.roots.setdefault(number, {})
            self.parted = self.parted or any(other != root for other in seen.values())
            # A peer that shows two roots for one round, one after the other, parts from itself: neither is forgotten.
            seen[member.name if seen.get(member.name, root) == root else f"{member.name} later"] = root

    def _sample(self, member: Member, now: float) -> None:
        try:
            process = psutil.Process(member.peer.pid)
            with process.oneshot():
                taken = Sample(
                    at_s=now, descriptors=process.num_fds(), rss_mib=round(process.memory_info().rss / 2**20, 1)
                )
        except psutil.Error:
            return
        member.samples.append(taken)

    def _watch_progress(self) -> None:
        """The clock of standstill: it stands while no quorum is there."""
        newest, waited_s, last_s = -1, 0.0, time.monotonic()
        while not self._closing.wait(WATCH_PERIOD_S):
            now = time.monotonic()
            step_s, last_s = now - last_s, now
            with self._lock:
                number = max(self.round_seen_s, default=-1)
            live, needed = self.live_voters()
            if number > newest:
                newest, waited_s = number, 0.0
            elif live >= needed:
                waited_s += step_s
                self.stuck_s = max(self.stuck_s, waited_s)
            else:
                self.without_quorum_s += step_s

    def lives(self) -> list[tuple[str, list[Sample]]]:
        """The samples of every daemon that was started."""
        return [(one.name, life) for one in self.members for life in (*one.lives, one.samples) if life]

    def folders(self) -> dict[str, Path]:
        return {member.name: member.peer.folder for member in self.members}

    def logs(self) -> dict[str, str]:
        return {member.name: member.peer.log() for member in self.members}

    def round(self) -> int:
        """The newest certified round that was seen."""
        with self._lock:
            return max(self.round_seen_s, default=0)

    def standstill(self) -> str:
        """What every peer said last, for the report of a run that stands still."""
        lines = []
        for member in self.members:
            status = member.status
            where = "no answer"
            if status is not None:
                waits = ", ".join(wait.name for wait in status.round.waiting_for)
                where = f"round {status.round.round} attempt {status.round.attempt} {status.round.phase}, "
                where += f"{status.round.voters_live}/{status.round.voters} voters, waits for {waits or 'nobody'}"
            lines.append(f"{member.name:8} {member.standing:9} {where}")
        return "\n".join(lines)


def median_of(samples: list[Sample], first: float, end: float) -> tuple[float, float]:
    """Medians of descriptors and memory over a span of a life, given as shares of it."""
    span = samples[int(len(samples) * first) : max(int(len(samples) * first) + 1, int(len(samples) * end))]
    return statistics.median(one.descriptors for one in span), statistics.median(one.rss_mib for one in span)
