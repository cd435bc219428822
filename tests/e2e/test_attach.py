"""Training scripts of people's own: real daemons, real scripts, and each of them killed and started again."""

import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from shoal.node.status import TrainerState
from tests.e2e.shaping_proxy import choose_port
from tests.e2e.swarm import EXIT_S, MARK, Peer, Swarm, replace_task, run
from tests.unit.training.user_tasks import LOOP_EXAMPLE, RANKS_EXAMPLE, SINE_LOOP, importable, write_module

TASK = f'kind = "attached"\npath = "{SINE_LOOP}"\nwidth = 16'


class Script:
    """One training script as a process."""

    def __init__(self, peer: Peer, module: Path, launcher: tuple[str, ...] = ()) -> None:
        self.log_file = peer.folder / "script.log"
        environment = os.environ | {MARK: str(peer.swarm.folder), "OMP_NUM_THREADS": "1"}
        with self.log_file.open("ab") as log:
            command = [sys.executable, "-P", *launcher, str(module), str(peer.folder)]
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env=environment,
                preexec_fn=heed_interrupts,
                start_new_session=True,
            )

    def kill(self) -> None:
        """With all its processes."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(EXIT_S)

    def log(self) -> str:
        return self.log_file.read_text(errors="replace")


RUN = ("-m", "torch.distributed.run")
TORCHRUN = (*RUN, "--standalone", "--nproc-per-node", "2")
# What a reader need not see: the ranks compare themselves, one of them has a bad loss, and rank 0 is impatient.
WATCHED = RANKS_EXAMPLE.replace(
    "import shoal\n",
    """import shoal
from shoal.node.training import attachment

attachment.HEARTBEAT_S = 0.01
made = 0


def compare(number):
    own = torch.cat([getattr(one, "full_tensor", one.detach)().detach().flatten() for one in model.parameters()])
    first = own.clone()
    distributed.broadcast(first, 0)
    assert torch.equal(own, first), "the ranks differ"
    if made == 50:
        assert not optimizer.state, "moments that are not finite"
    print(f"rank {distributed.get_rank()} has the base of round {number}", flush=True)
""",
).replace(
    "swarm.step(loss, tokens=32)",
    """made += 1
            bad = made == 50 and distributed.get_rank() == 1
            replaced = swarm.step(loss * float("nan") if bad else loss, tokens=32)
            if replaced or made == 1:
                compare(swarm.round)
            assert replaced or made != 50, "a loss that is not finite counts wherever it is"
            assert swarm.attached""",
)
DIVIDED = WATCHED.replace(
    "from torch.nn.parallel import DistributedDataParallel", "from torch.distributed.fsdp import fully_shard"
).replace("DistributedDataParallel(build(width=16))", "fully_shard(build(width=16))")


def heed_interrupts() -> None:
    """Tests that run in the background of a shell do not, and what they start would not, either."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture
def module(tmp_path: Path) -> Iterator[Path]:
    with importable(tmp_path / "modules"):
        yield write_module(tmp_path / "modules", "sine_loop", LOOP_EXAMPLE)


def state_of(peer: Peer) -> TrainerState | None:
    status = peer.status()
    return None if status is None else status.training.state


def loss_of(peer: Peer) -> float:
    loss = peer.ask().training.loss_last
    return math.inf if loss is None else loss


def lives(script: Script) -> bool:
    assert script.process.poll() is None, script.log()
    return True


def test_scripts_and_daemons_come_and_go(tmp_path: Path, module: Path) -> None:
    swarm = Swarm(tmp_path, founders=2, draft=replace_task(TASK), create_options=("--allow-task", SINE_LOOP))
    scripts: list[Script] = []
    try:
        first = swarm.add("peer1").start("up", "--manifest", str(swarm.manifest))
        swarm.wait("the first daemon waits for a script", lambda: state_of(first) is TrainerState.WAITING)
        second = swarm.add("peer2").start("join", first.ask().uri)
        swarm.wait("so does the second", lambda: state_of(second) is TrainerState.WAITING)
        said = f"with shoal.attach(model, optimizer, home='{first.folder}') as swarm:"
        assert said in first.log()
        assert "shoal.attach(" in run("status", "--data-dir", str(first.folder)).stdout

        scripts = [Script(first, module), Script(second, module)]
        swarm.wait("three rounds", lambda: all(map(lives, scripts)) and min(first.round, second.round) >= 3)
        swarm.wait("with the work of both", lambda: all(peer.contributes_after(0) for peer in (first, second)))

        second.kill()
        at = first.head
        second.start("up")
        swarm.wait("the script finds the daemon that came back", lambda: "attached again" in scripts[1].log())
        # The round that was open when the daemon was killed may have been certified with it.
        swarm.wait("and takes part again", lambda: second.contributes_after(at + 1))
        assert scripts[1].process.poll() is None

        scripts[0].kill()
        swarm.wait("the daemon waits for the next script", lambda: state_of(first) is TrainerState.WAITING)
        at = second.head
        scripts.append(Script(first, module))
        swarm.wait("it takes part", lambda: first.contributes_after(at))
        swarm.wait("both stand at one round", lambda: first.head == second.head)
        swarm.check_roots()
        swarm.wait("it has learned", lambda: loss_of(first) < 0.4)
        assert first.ask().training.restarts == 0, "a script that goes is no failure"

        scripts[2].process.send_signal(signal.SIGINT)
        assert scripts[2].process.wait(EXIT_S) != 0
        assert first.leave() == 0
        assert second.leave() == 0
        assert "Traceback" not in first.log() + second.log() + scripts[1].log()
    finally:
        for script in scripts:
            script.kill()
        swarm.end()


def start_ranks(peer: Peer, module: Path, hosts: int) -> list[Script]:
    """Two processes by one torchrun, or one each by those of two hosts."""
    if hosts == 1:
        return [Script(peer, module, TORCHRUN)]
    meeting = ("--master-addr", "127.0.0.1", "--master-port", str(choose_port(peer.swarm.ports)))
    sizes = ("--nnodes", "2", "--nproc-per-node", "1")
    return [Script(peer, module, (*RUN, *sizes, *meeting, "--node-rank", str(number))) for number in range(2)]


@pytest.mark.long
@pytest.mark.parametrize(("text", "hosts"), [(WATCHED, 1), (DIVIDED, 2)], ids=["ddp", "fsdp"])
def test_the_processes_of_one_script_take_part_as_one(tmp_path: Path, module: Path, text: str, hosts: int) -> None:
    ranks = write_module(module.parent, "sine_ranks", text)
    swarm = Swarm(tmp_path, founders=2, draft=replace_task(TASK), create_options=("--allow-task", SINE_LOOP))
    scripts: list[Script] = []
    try:
        first = swarm.add("peer1").start("up", "--manifest", str(swarm.manifest))
        swarm.wait("the first daemon waits for a script", lambda: state_of(first) is TrainerState.WAITING)
        second = swarm.add("peer2").start("join", first.ask().uri)
        swarm.wait("so does the second", lambda: state_of(second) is TrainerState.WAITING)
        scripts = [Script(first, module), *start_ranks(second, ranks, hosts)]
        swarm.wait("four rounds", lambda: all(map(lives, scripts)) and min(first.round, second.round) >= 4)
        swarm.wait("both ranks have the base", lambda: {"rank 0 has", "rank 1 has"} <= heads(scripts[1]))
        swarm.wait("with the other peer", lambda: second.contributes_after(2))
        swarm.check_roots()
        assert second.ask().training.error.startswith("not finite: the loss at batch")

        scripts[1].process.terminate()
        assert scripts[1].process.wait(EXIT_S) != 0
        swarm.wait("the daemon waits for the next script", lambda: state_of(second) is TrainerState.WAITING)
        assert "Traceback" not in first.log() + second.log()
    finally:
        for script in scripts:
            script.kill()
        swarm.end()


def heads(script: Script) -> set[str]:
    return {line[: len("rank 0 has")] for line in script.log().splitlines()}
