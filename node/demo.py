"""The demo: a local swarm of real daemon processes that trains, loses a peer to SIGKILL in mid-round and gains one.

One bootstrap peer and four trainers start with nothing but the bootstrap's address and find each other through the DHT.
In the exchange of an early round one trainer is killed; later a fresh one joins, catches up and contributes. At the end
everybody leaves, and what the certificates on the survivors' disks say is put together.

Invariant: every figure of the report is read from the peers (status, certificates, state), none is made up here; every
process that the demo started has ended when it returns.
"""

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from shoal.node.demo_report import DemoRecord, finish_report
from shoal.node.happenings import Happening, HappeningKind, Severity
from shoal.node.output_files import writing
from shoal.node.running import read_running
from shoal.node.status import Status, StatusError, TrainerState, fetch_status
from shoal.node.terminal import DemoPeer, DemoScreen, DemoView, PeerMark, open_demo_screen
from shoal.protocol.effects import Phase
from shoal.protocol.errors import ConfigError, InputError

PEERS = 4
ROUNDS = 32
ROUNDS_MAX = 10_000
KILL_ROUND = 6  # from this round on, the victim dies in the first exchange that is caught
KILL_ROUND_MAX = 10  # and in this round at the latest, wherever it stands
JOIN_ROUND = 12
TRAIN_LIMIT_S = 195.0
# A slow machine does not come to those rounds before the limit: there it is a share of the time.
KILL_SHARE = 0.3
JOIN_SHARE = 0.5
START_LIMIT_S = 60.0
STOP_LIMIT_S = 25.0
POLL_S = 0.25
MARKER = ".shoal-demo"


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoOptions:
    text: Path | None
    rounds: int | None
    folder: Path
    report: Path | None


@dataclass(slots=True)
class Peer:
    """One daemon process."""

    name: str
    folder: Path
    process: subprocess.Popen[bytes]
    mark: PeerMark = PeerMark.ALIVE
    status: Status | None = None
    roots: dict[int, str] = field(default_factory=dict)
    web: tuple[str, int] | None = None

    def poll(self) -> None:
        """Its newest status; keeps the last one while it does not answer."""
        if self.mark in (PeerMark.KILLED, PeerMark.LEFT):
            return
        if self.web is None:
            try:
                self.web = read_running(self.folder)
            except ConfigError:
                return
        try:
            self.status = fetch_status(*self.web, timeout_s=2.0)
        except (InputError, StatusError):
            return
        self.roots[self.status.round.round - 1] = self.status.round.state_root


def run_demo(options: DemoOptions) -> int:
    """The whole demo; 0 when all survivors ended with one state and the loss fell."""
    check_demo_options(options)
    folder = _fresh_folder(options.folder)
    started = time.monotonic()
    swarm = _Swarm(
        folder=folder, text=options.text, rounds=ROUNDS if options.rounds is None else options.rounds, started=started
    )
    try:
        with open_demo_screen() as screen:
            swarm.train(screen)
        swarm.leave()
    finally:
        swarm.end()
    record = swarm.record(options.text)
    return finish_report(record, started, options.report)


def check_demo_options(options: DemoOptions) -> None:
    """Before the earlier demo is removed, and minutes before the report is written; raises ConfigError."""
    if options.text is not None and not options.text.exists():
        raise ConfigError("--text", f"{options.text} does not exist", "give a text file or a folder of them")
    if options.rounds is not None and not 1 <= options.rounds <= ROUNDS_MAX:
        raise ConfigError("--rounds", f"is {options.rounds}", f"use 1 to {ROUNDS_MAX}")
    if options.folder.exists() and not options.folder.is_dir():
        raise ConfigError("--out", f"{options.folder} is a file", "give a folder")
    if options.report is not None and (options.report.is_dir() or not options.report.absolute().parent.is_dir()):
        fix = "give a file in a folder that is there"
        raise ConfigError("--report", f"{options.report} cannot be written", fix)


def explain_standstill(trainers: Sequence[Status | None]) -> str | None:
    """The last words of a trainer, where all have been given up, so that no round can come any more."""
    states = [None if one is None else one.training.state for one in trainers]
    given_up = bool(states) and all(state is TrainerState.STOPPED for state in states)
    return next((one.training.error for one in trainers if one is not None), None) if given_up else None


def is_due(now_round: int, at_round: int, share: float, at_share: float) -> bool:
    """Whether what belongs to that round, or on a slow machine to that share of the time, is to happen now."""
    return now_round >= at_round or (now_round > 0 and share >= at_share)


def _fresh_folder(folder: Path) -> Path:
    """An empty folder; only what an earlier demo made is removed."""
    if folder.exists() and any(folder.iterdir()):
        if not (folder / MARKER).exists():
            raise ConfigError("--out", f"{folder} is not empty and not of an earlier demo", "give another folder")
        shutil.rmtree(folder)
    with writing("--out", folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MARKER).touch()
    return folder


class _Swarm:
    """The processes and what happened to them."""

    def __init__(self, *, folder: Path, text: Path | None, rounds: int, started: float) -> None:
        self.folder = folder
        self.rounds = rounds
        self.killed: list[str] = []
        self.joined: list[str] = []
        self._text = text
        self._started = started
        self._peers: list[Peer] = []
        self._happenings: list[Happening] = []
        self._seen: set[tuple[str, str]] = set()
        self._manifest = folder / "demo.shoal"
        self._bootstrap: Peer | None = None
        self._losses: dict[int, float] = {}

    # -- processes ---------------------------------------------------------------------------------------------------

    def _shoal(self, *arguments: str) -> list[str]:
        return [sys.executable, "-P", "-m", "shoal.node", *arguments]

    def _spawn(self, name: str, *arguments: str) -> Peer:
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        local = ["--control-host", "127.0.0.1", "--control-port", "0", "--tensor-host", "127.0.0.1"]
        local += ["--tensor-port", "0", "--web-port", "0", "--threads", "1", "--name", name, "--data-dir", str(folder)]
        local += ["--text", str(self._text.absolute())] if self._text else []
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                self._shoal(*arguments, *local, "--leave-with-stdin"),
                stdin=subprocess.PIPE,  # whose end is closed when this process ends, also by SIGKILL
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return Peer(name=name, folder=folder, process=process)

    def _create(self) -> None:
        """Keys for the four trainers, who are the first voters, and the signed manifest."""
        founders: list[str] = []
        for number in range(1, PEERS + 1):
            folder = self.folder / f"peer{number}"
            founders += ["--founder", self._ask("id", "--data-dir", str(folder)).strip()]
        draft = self.folder / "demo.toml"
        draft.write_text(DRAFT, encoding="utf-8")
        first = str(self.folder / "peer1")
        self._ask("swarm", "create", str(draft), "--out", str(self._manifest), "--data-dir", first, *founders)

    def _ask(self, *arguments: str) -> str:
        done = subprocess.run(self._shoal(*arguments), capture_output=True, text=True, check=False)
        if done.returncode:
            raise ConfigError("demo", done.stderr.strip().removeprefix("shoal: "), "mend that and start the demo again")
        return done.stdout

    def _start(self, screen: DemoScreen) -> None:
        self._say("making keys and a signed manifest")
        self._show(screen)
        self._create()
        self._say("starting one bootstrap peer")
        self._bootstrap = self._spawn("bootstrap", "up", "--role", "bootstrap", "--manifest", str(self._manifest))
        self._wait_for([self._bootstrap], screen)
        assert self._bootstrap.status is not None
        self._uri = self._bootstrap.status.uri
        self._say(f"starting {PEERS} trainers, who know nothing but the bootstrap peer's address")
        for number in range(1, PEERS + 1):
            self._peers.append(self._spawn(f"peer{number}", "join", self._uri))
        self._wait_for(self._peers, screen)

    def _wait_for(self, peers: Sequence[Peer], screen: DemoScreen) -> None:
        end = time.monotonic() + START_LIMIT_S
        while any(peer.status is None for peer in peers):
            for peer in peers:
                if peer.process.poll() is not None:
                    raise ConfigError(peer.name, f"ended: {_last_line(peer)}", f"see {peer.folder / 'log'}")
            if time.monotonic() > end:
                raise ConfigError("demo", f"no daemon answers within {START_LIMIT_S:.0f} s", f"see {self.folder}/*/log")
            self._poll(screen)

    # -- the run -----------------------------------------------------------------------------------------------------

    def train(self, screen: DemoScreen) -> None:
        """Start, let rounds go by, kill one, let one join, until the planned rounds or the time limit."""
        self._start(screen)
        begin = time.monotonic()
        while (share := (time.monotonic() - begin) / TRAIN_LIMIT_S) < 1 and self._round() < self.rounds:
            self._poll(screen)
            if (why := explain_standstill([peer.status for peer in self._peers])) is not None:
                raise ConfigError("demo", f"no trainer goes on: {why}", f"mend that; see {self.folder}/*/log")
            if not self.killed:
                if is_due(self._round(), min(KILL_ROUND, self.rounds // 3), share, KILL_SHARE):
                    self._kill(screen)
            elif not self.joined and is_due(self._round(), min(JOIN_ROUND, self.rounds // 2), share, JOIN_SHARE):
                self._join()
        self._await_common_round(screen)

    def _poll(self, screen: DemoScreen) -> None:
        for peer in (*self._peers, *([self._bootstrap] if self._bootstrap else [])):
            peer.poll()
            self._collect(peer)
        self._show(screen)
        time.sleep(POLL_S)

    def _collect(self, peer: Peer) -> None:
        status = peer.status
        if status is None:
            return
        for point in status.training.loss_history:
            self._losses.setdefault(point.round, point.loss)
        for happening in status.happenings:
            told = happening.kind in _TOLD or happening.severity is not Severity.INFO
            key = happening.kind.value, happening.text
            if told and key not in self._seen:
                self._seen.add(key)
                text = f"{peer.name}: {happening.text}"
                self._happenings.append(
                    Happening(at_s=happening.at_s, severity=happening.severity, kind=happening.kind, text=text)
                )
        if peer.mark is PeerMark.CATCHING_UP and status.round.round >= self._round() and self._took_part(peer):
            peer.mark = PeerMark.JOINED
            self._say(f"{peer.name} has caught up and contributes")

    def _took_part(self, peer: Peer) -> bool:
        assert peer.status is not None
        return any(
            one.kind is HappeningKind.ROUND_CERTIFIED and "without this peer" not in one.text
            for one in peer.status.happenings
        )

    def _kill(self, screen: DemoScreen) -> None:
        """SIGKILL to one trainer while its parts are under way, if such a moment is caught in time."""
        victim = self._peers[PEERS - 2]
        while True:
            self._poll(screen)
            status = victim.status
            if status is None:
                continue
            exchanging = status.round.phase in (Phase.EXCHANGE, Phase.COMMIT)
            if exchanging or self._round() >= KILL_ROUND_MAX:
                break
        victim.process.kill()
        victim.process.wait()
        victim.mark = PeerMark.KILLED
        self.killed.append(victim.name)
        self._say(
            f"{victim.name} killed with SIGKILL in round {status.round.round} ({status.round.phase})", Severity.WARNING
        )

    def _join(self) -> None:
        name = f"peer{PEERS + 1}"
        self._say(f"{name} joins with nothing but the swarm's URI")
        peer = self._spawn(name, "join", self._uri)
        peer.mark = PeerMark.CATCHING_UP
        self._peers.append(peer)
        self.joined.append(name)

    def _round(self) -> int:
        """The newest round that a live peer has applied."""
        live = [peer.status.round.round - 1 for peer in self._survivors() if peer.status]
        return max(live, default=0)

    def _survivors(self) -> list[Peer]:
        return [peer for peer in self._peers if peer.mark is not PeerMark.KILLED]

    def _await_common_round(self, screen: DemoScreen) -> None:
        """Until every survivor shows one and the same round."""
        end = time.monotonic() + 20.0
        while time.monotonic() < end:
            self._poll(screen)
            heads = {peer.status.round.round for peer in self._survivors() if peer.status}
            if len(heads) == 1:
                return

    def leave(self) -> None:
        """Everybody leaves gracefully, all at once, as by Ctrl-C."""
        self._say("everybody leaves")
        for peer in self._running():
            peer.process.send_signal(signal.SIGINT)
        end = time.monotonic() + STOP_LIMIT_S
        for peer in self._running():
            try:
                peer.process.wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                self._say(f"{peer.name} did not leave within {STOP_LIMIT_S:.0f} s", Severity.ERROR)

    def _running(self) -> list[Peer]:
        everybody = [*self._peers, *([self._bootstrap] if self._bootstrap else [])]
        return [peer for peer in everybody if peer.process.poll() is None]

    def end(self) -> None:
        """Nothing that was started is left."""
        for peer in self._running():
            peer.process.kill()
            peer.process.wait()

    # -- telling -----------------------------------------------------------------------------------------------------

    def _say(self, text: str, severity: Severity = Severity.INFO) -> None:
        self._happenings.append(Happening(at_s=time.time(), severity=severity, kind=HappeningKind.NETWORK, text=text))

    def _show(self, screen: DemoScreen) -> None:
        live = [peer for peer in self._survivors() if peer.status]
        screen.show(
            DemoView(
                elapsed_s=time.monotonic() - self._started,
                round=self._round(),
                rounds_planned=self.rounds,
                losses=tuple(self._losses[number] for number in sorted(self._losses)),
                tokens_per_s=sum(peer.status.training.tokens_per_s for peer in live if peer.status),
                contribution_bytes=sum(peer.status.traffic.contribution_bytes for peer in self._peers if peer.status),
                fp32_bytes=sum(peer.status.traffic.fp32_bytes for peer in self._peers if peer.status),
                peers=tuple(_row(peer) for peer in self._peers),
                happenings=tuple(self._happenings[-64:]),
            )
        )

    def record(self, text: Path | None) -> DemoRecord:
        """What the summary is made from."""
        everybody = [*self._peers, *([self._bootstrap] if self._bootstrap else [])]
        statuses = {peer.name: peer.status for peer in everybody if peer.status is not None}
        return DemoRecord(
            folder=self.folder,
            text=text,
            statuses=statuses,
            roots={peer.name: dict(peer.roots) for peer in self._peers},
            survivors=tuple(peer.name for peer in self._survivors()),
            exit_codes={peer.name: peer.process.returncode for peer in everybody},
            killed=tuple(self.killed),
            joined=tuple(self.joined),
            losses=dict(sorted(self._losses.items())),
        )


_TOLD = (HappeningKind.CATCH_UP, HappeningKind.PEER_LOST, HappeningKind.TRAINER)


def _row(peer: Peer) -> DemoPeer:
    status = peer.status
    starting = status is None or status.training.state is TrainerState.STARTING
    return DemoPeer(
        name=peer.name,
        mark=peer.mark,
        phase="starting" if starting or status is None else status.round.phase,
        round=0 if status is None else status.round.round - 1,
        loss=None if status is None else status.training.loss_last,
        tokens_per_s=0.0 if status is None or peer.mark is PeerMark.KILLED else status.training.tokens_per_s,
        state_root="" if status is None else status.round.state_root,
    )


def _last_line(peer: Peer) -> str:
    try:
        lines = (peer.folder / "log").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    return lines[-1] if lines else f"exit status {peer.process.returncode}"


# The size of configs/tiny.manifest.toml; the wheel has no configs.
DRAFT = """\
name = "demo"
seed = 1

[task]
kind = "byte_gpt"
layers = 2
heads = 4
width = 192
context = 128

[training]
inner_steps = 40
steps_min = 4
round_time_s = 30.0
batch_size = 4
learning_rate = 4e-3
warmup_steps = 20

[outer]
optimizer = "nesterov"
learning_rate = 0.7
momentum = 0.8

[rounds]
peers_min = 2
grace_s = 4.0
codec = "int8"
part_elements = 65536
plan_timeout_s = 4.0
sender_timeout_s = 4.0
owner_timeout_s = 5.0
exchange_timeout_s = 20.0
commit_timeout_s = 8.0
presence_period_s = 1.0
presence_timeout_s = 6.0
"""
