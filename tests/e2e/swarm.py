"""Real daemon processes on loopback, for the end-to-end tests: start, ask, wait for a condition, kill, leave."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from shoal.node.identity_file import load_or_create_identity
from shoal.node.status import Status, StatusError, fetch_status
from shoal.node.training.gpt_config import KIND
from shoal.protocol.errors import InputError
from shoal.protocol.identity import PeerId, format_peer_id
from shoal.protocol.layout import Layout
from shoal.protocol.manifest import (
    Draft,
    Task,
    make_manifest,
    parse_draft,
    read_manifest_untrusted,
    sign_manifest,
    size_parts,
    task_kind,
    task_options,
)
from tests.e2e.shaping_proxy import HOST, ShapedNetwork, choose_port

# Generous: on a busy machine a process may stand still for seconds, and what is waited for comes in the end or never.
WAIT_S = 180.0
EXIT_S = 120.0
COMMAND_S = 180.0
POLL_S = 0.1
MARK = "SHOAL_TEST_SWARM"  # in the environment of every process that a swarm starts, and of their children
# As small as a GPT gets: what is tested is the swarm around it.
DRAFT = """\
name = "e2e"
seed = 3

[task]
kind = "byte_gpt"
layers = 1
heads = 2
width = 32
context = 32

[training]
inner_steps = 100
steps_min = 1
round_time_s = 2.0
batch_size = 2
learning_rate = 1e-3
warmup_steps = 20

[rounds]
peers_min = 2
grace_s = 1.5
part_elements = 4096
plan_timeout_s = 4.0
sender_timeout_s = 4.0
owner_timeout_s = 5.0
exchange_timeout_s = 20.0
commit_timeout_s = 8.0
presence_period_s = 0.5
presence_timeout_s = 6.0
snapshot_every = 4
"""


_LAYOUTS: dict[Task, Layout] = {}  # of the tasks of swarms that were made before


def read_task(draft: str) -> Task:
    """The task table of a draft."""
    return Task(kind=task_kind(draft), options=json.dumps(task_options(draft), sort_keys=True, separators=(",", ":")))


def replace_task(text: str) -> str:
    """DRAFT with this text as its task table."""
    head, _, rest = DRAFT.partition("[task]\n")
    return f"{head}[task]\n{text}\n\n[training]\n{rest.partition('[training]' + chr(10))[2]}"


def vary_draft(**values: float) -> str:
    """DRAFT with these values; each key must stand in it."""
    text = DRAFT
    for key, value in values.items():
        text, found = re.subn(rf"(?m)^{key} = .*$", f"{key} = {value}", text)
        assert found == 1, key
    return text


class Peer:
    """One daemon process and its folder."""

    def __init__(self, swarm: "Swarm", name: str) -> None:
        self.swarm = swarm
        self.name = name
        self.folder = swarm.folder / name
        self.folder.mkdir(exist_ok=True)
        self.log_file = self.folder / "log"
        self.roots: dict[int, str] = {}
        self.process: subprocess.Popen[bytes] | None = None
        self.options: list[str] = []  # of every start
        self.launcher: list[str] = []  # the command that starts it, if not the shell of the test
        if swarm.network is not None:
            self.options = self._go_through(swarm.network)

    def _go_through(self, network: ShapedNetwork) -> list[str]:
        """Ports that stay the same over restarts, behind proxies whose addresses the others are told."""
        control, tensor = choose_port(self.swarm.ports), choose_port(self.swarm.ports)
        announced = network.open(self.name, control), network.open(self.name, tensor)
        options = ["--control-port", str(control), "--tensor-port", str(tensor)]
        options += ["--announce", f"/ip4/{HOST}/tcp/{announced[0]}"]
        return [*options, "--announce-host", HOST, "--announce-port", str(announced[1])]

    @property
    def pid(self) -> int | None:
        return None if self.process is None else self.process.pid

    def start(self, *arguments: str) -> "Peer":
        (self.folder / "running.json").unlink(missing_ok=True)
        local = [
            "--control-host",
            "127.0.0.1",
            "--control-port",
            "0",
            "--tensor-host",
            "127.0.0.1",
            "--tensor-port",
            "0",
        ]
        local += ["--web-port", "0", "--threads", "1", "--name", self.name, "--data-dir", str(self.folder)]
        local += ["--text", str(self.swarm.text)] if self.swarm.text else []
        local += self.options
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(
                [*self.launcher, *SHOAL, *arguments, *local],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=os.environ | {MARK: str(self.swarm.folder)},
            )
        return self

    def status(self) -> Status | None:
        """What it says now; None while it does not answer."""
        try:
            host, _, port = json.loads((self.folder / "running.json").read_text())["web"].rpartition(":")
            status = fetch_status(host, int(port), timeout_s=5.0)
        except (OSError, ValueError, InputError, StatusError):
            return None
        self.roots[status.round.round - 1] = status.round.state_root
        return status

    def ask(self) -> Status:
        """What it says now, as soon as it answers: for who needs the answer, and not only a condition to hold."""
        answers: list[Status] = []

        def has_answered() -> bool:
            status = self.status()
            answers.extend([] if status is None else [status])
            return bool(answers)

        self.swarm.wait(f"{self.name} answers", has_answered)
        return answers[0]

    @property
    def head(self) -> int:
        """The newest round that it has applied, as soon as it answers."""
        return self.ask().round.round - 1

    @property
    def round(self) -> int:
        """The newest round that it has applied, -1 while it does not answer: for conditions that are waited for."""
        status = self.status()
        return -1 if status is None else status.round.round - 1

    def contributes_after(self, number: int) -> bool:
        """Whether it was part of a certified round later than this one."""
        status = self.status()
        return status is not None and any(
            one.kind == "round_certified" and "without this peer" not in one.text and _round_in(one.text) > number
            for one in status.happenings
        )

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait(EXIT_S)

    def leave(self) -> int:
        """Ctrl-C, and the exit code."""
        return leave_together(self)[0]

    def log(self) -> str:
        return self.log_file.read_text(errors="replace") if self.log_file.exists() else ""


class Swarm:
    """Everything that one test started; `end` leaves no process behind."""

    def __init__(
        self,
        folder: Path,
        founders: int,
        network: ShapedNetwork | None = None,
        draft: str = DRAFT,
        create_options: tuple[str, ...] = (),
    ) -> None:
        self.folder = folder
        self.network = network
        self.ports: set[int] = set()
        self.text: Path | None = folder / "text.py"
        self.text.write_text("def add(first, second):\n    return first + second\n" * 6000)
        self.peers: list[Peer] = []
        self.manifest = folder / "swarm.shoal"
        (folder / "draft.toml").write_text(draft)
        names = [f"peer{number}" for number in range(1, founders + 1)]
        keys = [load_or_create_identity(folder / name / "identity.key") for name in names]
        task = read_task(draft)
        if task in _LAYOUTS and not create_options:
            sized = size_parts(parse_draft(draft, task.options), draft, _LAYOUTS[task].elements)
            self._sign(sized, tuple(key.peer for key in keys))
            return
        self._create([format_peer_id(key.peer) for key in keys], create_options)
        if task.kind == KIND:  # other tasks' layouts have to do with files, or with what is allowed
            _LAYOUTS[task] = read_manifest_untrusted(self.manifest.read_bytes())[0].layout

    def _create(self, founders: Sequence[str], options: Sequence[str]) -> None:
        """As a person does it."""
        words = [str(self.folder / "draft.toml"), "--out", str(self.manifest), "--data-dir", str(self.folder / "peer1")]
        made = run("swarm", "create", *words, *(word for one in founders for word in ("--founder", one)), *options)
        assert made.returncode == 0, made.stderr

    def _sign(self, draft: Draft, founders: tuple[PeerId, ...]) -> None:
        """The same of a task whose layout is known: no process has to load torch for it."""
        owner = load_or_create_identity(self.folder / "peer1" / "owner.key")
        manifest = make_manifest(draft, _LAYOUTS[draft.task], owner.peer, founders)
        self.manifest.write_bytes(sign_manifest(manifest, owner))

    def add(self, name: str) -> Peer:
        peer = Peer(self, name)
        self.peers.append(peer)
        return peer

    def wait(self, what: str, condition: Callable[[], bool]) -> None:
        """Until the condition holds; what it was and every log's end otherwise."""
        end = time.monotonic() + WAIT_S
        while not condition():
            if time.monotonic() > end:
                logs = "\n".join(f"--- {peer.name}\n{peer.log()[-2500:]}" for peer in self.peers)
                raise AssertionError(f"not within {WAIT_S:.0f} s: {what}\n{logs}")
            time.sleep(POLL_S)

    def check_roots(self) -> None:
        """Whatever round two peers showed, they showed it with the same state root."""
        seen: dict[int, str] = {}
        compared = 0
        for peer in self.peers:
            for number, root in peer.roots.items():
                compared += number in seen
                assert seen.setdefault(number, root) == root, f"{peer.name} differs in round {number}"
        assert compared, "at least two peers were seen in one round"

    def end(self) -> None:
        for peer in self.peers:
            if peer.process is not None and peer.process.poll() is None:
                peer.kill()


def leave_together(*peers: Peer) -> list[int]:
    """Ctrl-C for all of them at once, and their exit codes."""
    processes = [peer.process for peer in peers if peer.process is not None]
    assert len(processes) == len(peers), "all of them were started"
    for process in processes:
        process.send_signal(signal.SIGINT)
    return [process.wait(EXIT_S) for process in processes]


SHOAL = (sys.executable, "-P", "-m", "shoal.node")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """One command to its end."""
    return subprocess.run([*SHOAL, *arguments], capture_output=True, text=True, timeout=COMMAND_S, check=False)


def _round_in(text: str) -> int:
    words = text.split()
    return int(words[1]) if len(words) > 1 and words[1].isdigit() else -1
