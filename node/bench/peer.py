"""One peer of a measured all-reduce: the daemon as it is, with a stand-in where its trainer would be.

    python -m shoal.node.bench.peer     # the first line of standard input is a PeerSpec as JSON

The stand-in holds the same pseudo-gradient in every round and is ready when it is told to, so that nothing but the
exchange is measured. The swarm's outer step has learning rate and momentum factor 0: the base stays, and the momentum
is the last update, which is compared with the exact mean.

Further lines of standard input: "round" begins one, "phases" asks how long each phase has lasted, "report" for what has
come of it. Answers are lines of JSON on standard output; "up" and "idle" come unasked.

Invariant: the process ends with its standard input, and with its daemon.
"""

import asyncio
import dataclasses
import json
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shoal.node.config import TrainerTable, load_config
from shoal.node.daemon import Daemon
from shoal.node.identity_file import IDENTITY_FILE, hold_identity
from shoal.node.process import loop_factory, set_up_log
from shoal.node.trainer import SharedParameters, Trainer, TrainerEvent
from shoal.node.training.messages import FloatVector, Merge, Ready, Started, Work
from shoal.protocol.codecs import Float32s
from shoal.protocol.effects import Phase
from shoal.protocol.identity import format_peer_id

LAG_PERIOD_S = 0.01
MEMORY_PERIOD_S = 0.1
# As /proc/PID/status names it: of the process's own, shared with its trainer, and mapped files.
MEMORY_KINDS = {"RssAnon": "anonymous_mib", "RssShmem": "shared_mib", "RssFile": "file_mib"}
STATUS = Path("/proc/self/status")
PIECE_ELEMENTS = 1 << 22  # a stand-in for a trainer is to take no memory beside its vectors
TOKENS = 1024  # of every peer alike, so that all weigh the same


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerSpec:
    """What the measuring process says to a peer: flags as for `shoal up`, and the seeds of everybody's values."""

    flags: dict[str, str]
    seed: int
    seeds: tuple[int, ...]


def draw_values(seed: int, elements: int) -> Iterator[Float32s]:
    """The pseudo-gradient of one peer, normal values, piece by piece."""
    generator = np.random.default_rng(seed)
    for first in range(0, elements, PIECE_ELEMENTS):
        yield generator.standard_normal(min(PIECE_ELEMENTS, elements - first), np.float32)


class StandIn:
    """A trainer that has done its work already. It says when a round is applied."""

    def __init__(
        self,
        memory: SharedParameters,
        on_event: Callable[[TrainerEvent], None],
        seed: int,
        tell_idle: Callable[[], None],
    ) -> None:
        self._memory = memory
        self._on_event = on_event
        self._seed = seed
        self._tell_idle = tell_idle
        self._round = 0
        self.running = False

    @property
    def base(self) -> FloatVector:
        return self._memory.base

    @property
    def local(self) -> FloatVector:
        return self._memory.local

    def be_ready(self) -> None:
        """The round's training is over."""
        steps = self._round
        self._on_event(
            Ready(round=self._round, steps=steps, tokens=TOKENS * steps, loss_mean=0.0, batches_done=self._round)
        )

    async def wait(self, tell: Callable[[str], None]) -> None:
        """Always there."""

    async def start(self, work: Work) -> Started:
        await asyncio.to_thread(self._fill)
        self.running = True
        return Started(device="none", elements=self.base.size, train_bytes=0, held_out_bytes=0)

    def _fill(self) -> None:
        first = 0
        for values in draw_values(self._seed, self.base.size):
            piece = slice(first, first + values.size)
            np.subtract(self.base[piece], values, out=self.local[piece])
            first += values.size

    async def begin(self, round: int, *, adopt: bool, shift: bool = False) -> None:
        self._begin(round)

    async def merge(self, merge: Merge) -> None:
        self._begin(merge.round)

    def _begin(self, number: int) -> None:
        self._round = number
        self._tell_idle()

    async def freeze(self) -> None:
        """It is ready when it is told to."""

    async def evaluate(self) -> None:
        """There is nothing to evaluate."""

    async def sample(self, prompt: bytes, size_bytes: int) -> None:
        """There is nothing to sample from."""

    async def stop(self) -> None:
        self.running = False


def say(**answer: object) -> None:
    """One line for the measuring process. The clock is one for all processes of the machine."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    line = {"at_s": time.monotonic(), "cpu_s": used.ru_utime + used.ru_stime, "peak_rss_kib": used.ru_maxrss, **answer}
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


async def watch_lag(lags_s: list[float]) -> None:
    """How late the loop runs its timers, into `lags_s`."""
    loop = asyncio.get_running_loop()
    while True:
        due_s = loop.time() + LAG_PERIOD_S
        await asyncio.sleep(LAG_PERIOD_S)
        lags_s.append(max(0.0, loop.time() - due_s))


async def watch_memory(peaks_mib: dict[str, float]) -> None:
    """The most of each kind that the process has had, into `peaks_mib`; nothing where the system does not tell."""
    while STATUS.exists():
        for line in STATUS.read_text(encoding="ascii", errors="replace").splitlines():
            name, _, rest = line.partition(":")
            if name in MEMORY_KINDS:
                kind = MEMORY_KINDS[name]
                peaks_mib[kind] = max(peaks_mib.get(kind, 0.0), int(rest.split()[0]) / 1024)
        await asyncio.sleep(MEMORY_PERIOD_S)


async def run_peer(spec: PeerSpec, daemon: Daemon, stand_in: Callable[[], StandIn]) -> None:
    """Serve until standard input ends."""
    lags_s: list[float] = []
    peaks_mib: dict[str, float] = {}

    def tell(ready: Daemon) -> None:
        say(event="up", addresses=ready.control.addresses(), peer=format_peer_id(ready.me))

    running = asyncio.ensure_future(daemon.run(tell))
    watches = [asyncio.ensure_future(one) for one in (watch_lag(lags_s), watch_memory(peaks_mib))]
    reader = asyncio.StreamReader()
    running.add_done_callback(lambda _: reader.feed_eof())
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := (await reader.readline()).strip():
        if line == b"round":
            lags_s.clear()
            peaks_mib.clear()
            stand_in().be_ready()
        elif line == b"phases":
            say(event="phases", **read_phases(daemon), peaks_mib=peaks_mib)
        elif line == b"report":
            say(event="report", **await asyncio.to_thread(make_report, spec, daemon, lags_s))
    daemon.stop()
    await running
    for watch in watches:
        watch.cancel()


def read_phases(daemon: Daemon) -> dict[str, float]:
    """For how long this peer has been in each phase so far, all rounds together."""
    return {phase.value: daemon.reporter.metrics.phase_s[phase].sum for phase in Phase}


def make_report(spec: PeerSpec, daemon: Daemon, lags_s: list[float]) -> dict[str, object]:
    """What the last round has led to, and how late the loop was in it."""
    rms_error, worst_error = compare(daemon.state.replica.momentum, spec.seeds)
    return {
        "round": daemon.core.head.round,
        "state_root": daemon.core.head.state_root.hex(),
        "rms_error": rms_error,
        "worst_error": worst_error,
        "lag_p99_ms": 1e3 * float(np.quantile(lags_s, 0.99)) if lags_s else 0.0,
        "lag_max_ms": 1e3 * max(lags_s, default=0.0),
        "paths": sorted({str(one.path) for one in daemon.links.statistics().peers if one.path}),
    }


def compare(update: Float32s, seeds: tuple[int, ...]) -> tuple[float, float]:
    """Root mean square and largest magnitude of what the update differs by from the exact mean."""
    first, squares, worst = 0, 0.0, 0.0
    for drawn in zip(*(draw_values(seed, update.size) for seed in seeds), strict=True):
        exact = np.mean(np.stack(drawn), axis=0, dtype=np.float64)
        error = update[first : first + exact.size] - exact
        squares += float(np.dot(error, error))
        worst = max(worst, float(np.abs(error).max()))
        first += exact.size
    return math.sqrt(squares / update.size), worst


def main() -> None:
    told = json.loads(sys.stdin.readline())
    spec = PeerSpec(flags=told["flags"], seed=told["seed"], seeds=tuple(told["seeds"]))
    config = load_config(None, spec.flags)
    config = dataclasses.replace(config, lan=dataclasses.replace(config.lan, mdns=False))
    set_up_log(config.log.level, config.log.format)
    made: list[StandIn] = []

    def make_trainer(
        memory: SharedParameters, settings: TrainerTable, on_event: Callable[[TrainerEvent], None], checkpoints: Path
    ) -> Trainer:
        made.append(StandIn(memory, on_event, spec.seed, lambda: say(event="idle")))
        return made[-1]

    held, runner = hold_identity(config.data_path / IDENTITY_FILE), asyncio.Runner(loop_factory=loop_factory())
    with held as identity, runner:
        runner.run(run_peer(spec, Daemon(config, identity, 1, make_trainer), lambda: made[-1]))


if __name__ == "__main__":
    main()
