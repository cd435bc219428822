"""`shoal bench allreduce`: whole rounds between local peers, one process each, as a swarm would run them.

From when every peer's values are ready to when the last one has the certified average applied: encoding with error
feedback, the hash of every part, readiness by gossip, the plan, sealed links, reduction, durable votes, the certificate
and the outer step. Only training is left out.

Invariant: every process that was started has ended when `run_allreduce` returns, and its folder is gone.
"""

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import psutil

from shoal.node.bench.peer import PeerSpec
from shoal.node.bench.processes import BenchFailed, BenchProcess, Place, measured
from shoal.node.config import IN_MEMORY, ON_DISK
from shoal.node.identity_file import IDENTITY_FILE, create_identity
from shoal.protocol.aggregators import AGGREGATORS
from shoal.protocol.codecs import CODECS, UPDATE_CODECS
from shoal.protocol.effects import Phase
from shoal.protocol.errors import ConfigError
from shoal.protocol.identity import PeerId
from shoal.protocol.layout import Layout, TensorSpec
from shoal.protocol.manifest import (
    PART_ELEMENTS_MAX,
    Draft,
    Manifest,
    Outer,
    Rounds,
    Task,
    choose_part_elements,
    make_manifest,
    sign_manifest,
)

MIB = 1 << 20
PEERS_MAX = 32
PEER_ARGUMENTS = ("-P", "-m", "shoal.node.bench.peer")
START_TIMEOUT_S = 120.0
START_BYTES_PER_S = 20e6  # on top: the first state and the stand-in's values, written to a slow disk
ROUND_TIMEOUT_S = 600.0
SETTLE_S = 0.2  # between two rounds, so that none begins in the tail of the last
WARMUP_ROUNDS = 2
TENSORS = 148  # those of GPT-2's smallest: what a peer does for each of them again and again would show
# What a peer holds: base, local, momentum, two residuals, and what is encoded of it; and what any daemon takes.
VECTORS_HELD = 6
PROCESS_MIB = 300
# With its vectors on the disk: of what is encoded its own contribution, what came of others', and the update. Files are
# base, local, momentum and two residuals, and the update of every round.
ENCODED_HELD = 3
VECTOR_FILES = 5

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class AllreduceOptions:
    """`folder` is where the peers' files lie for so long; None is the system's place for such. `part_elements` None is
    what a swarm with a model of this size would have."""

    peers: int = 4
    mib: float = 64.0
    codec: str = "int8"
    update_codec: str | None = None
    aggregator: str = "mean"
    rounds: int = 5
    part_elements: int | None = None
    folder: Path | None = None
    vectors: str = IN_MEMORY

    def __post_init__(self) -> None:
        if not 2 <= self.peers <= PEERS_MAX:
            raise ConfigError("--peers", f"is {self.peers}", f"use 2 to {PEERS_MAX}")
        if not 1 / 16 <= self.mib <= 8192:
            raise ConfigError("--mib", f"is {self.mib:g}", "use 0.0625 to 8192, of float32 values a peer")
        if self.aggregator not in AGGREGATORS:
            raise ConfigError("--aggregator", f"is {self.aggregator!r}", f"use one of: {', '.join(AGGREGATORS)}")
        if self.codec not in CODECS:
            raise ConfigError("--codec", f"is {self.codec!r}", f"use one of: {', '.join(CODECS)}")
        if self.codec_out not in UPDATE_CODECS:
            problem = f"is missing, and {self.codec} is not for updates" if self.update_codec is None else "is unknown"
            raise ConfigError("--update-codec", problem, f"use one of: {', '.join(UPDATE_CODECS)}")
        if not 1 <= self.rounds <= 1000:
            raise ConfigError("--rounds", f"is {self.rounds}", "use 1 to 1000")
        size = self.part_elements
        if size is not None and (not 256 <= size <= PART_ELEMENTS_MAX or size % 256):
            fix = f"use a multiple of 256, {PART_ELEMENTS_MAX} at most"
            raise ConfigError("--part-elements", f"is {size}", fix)
        if self.vectors not in (IN_MEMORY, ON_DISK):
            raise ConfigError("--vectors", f"is {self.vectors!r}", f"use {IN_MEMORY} or {ON_DISK}")
        if self.folder is not None and not self.folder.is_dir():
            raise ConfigError("--folder", f"{self.folder} is no folder", "make it, or give another")

    @property
    def elements(self) -> int:
        return int(self.mib * MIB / 4)

    @property
    def start_timeout_s(self) -> float:
        """Until a peer is up, and then until it has its values."""
        return START_TIMEOUT_S + 4 * self.elements * self.peers / START_BYTES_PER_S

    @property
    def encoded_mib(self) -> float:
        """A whole contribution's."""
        return CODECS[self.codec].encoded_bytes(self.elements) / MIB

    @property
    def codec_out(self) -> str:
        """That of updates."""
        return self.make_rounds().codec_out

    def make_rounds(self) -> Rounds:
        """Rounds that wait for all of these peers and for nobody else, and for as long as it takes."""
        return Rounds(
            peers_min=self.peers,
            grace_s=0.0,
            codec=self.codec,
            update_codec=self.update_codec,
            aggregator=self.aggregator,
            sender_timeout_s=ROUND_TIMEOUT_S,
            owner_timeout_s=ROUND_TIMEOUT_S,
            exchange_timeout_s=ROUND_TIMEOUT_S,
            commit_timeout_s=ROUND_TIMEOUT_S,
            snapshot_every=10_000,
            part_elements=self.part_elements or choose_part_elements(self.elements),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredRound:
    """`step_s` is wall time from the beginning to the last peer's end. The phases are those of the peers' mean: until
    the plan (encoding, the durable residual, readiness), parts, votes, the durable update and the outer step. `cpu_s`
    is that of all processes together."""

    step_s: float
    prepare_s: float
    exchange_s: float
    commit_s: float
    apply_s: float
    cpu_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AllreduceResult:
    """Errors are those of the last update against the exact mean, in units of the values' standard deviation;
    `lag_p99_ms` is that of the peer whose loop was latest in the last round. `peaks_mib` has the most of each kind of
    memory that a peer had in the last round (bench.peer.MEMORY_KINDS), empty where the system does not tell."""

    options: AllreduceOptions
    rounds: tuple[MeasuredRound, ...]
    peak_rss_mib: float
    peaks_mib: dict[str, float]
    lag_p99_ms: float
    rms_error: float
    worst_error: float
    state_root: str

    @property
    def median(self) -> MeasuredRound:
        """Every figure's own median."""
        names = [field.name for field in fields(MeasuredRound)]
        return MeasuredRound(**{name: statistics.median(getattr(one, name) for one in self.rounds) for name in names})

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "median": asdict(self.median)}


def run_allreduce(options: AllreduceOptions, say: Say, places: Sequence[Place] = ()) -> AllreduceResult:
    """Start the peers, all on loopback without `places`, run rounds, stop them. Raises BenchFailed, and ConfigError
    where the machine has not room enough."""
    _check_room(options)
    places = places or (Place(),) * options.peers
    with tempfile.TemporaryDirectory(prefix="shoal-bench-", dir=options.folder) as name, ExitStack() as stack:
        folder = Path(name)
        manifest = _make_manifest(folder, options)
        peers: list[BenchProcess] = []
        addresses: tuple[str, ...] = ()
        seeds = tuple(range(1, options.peers + 1))
        for number, place in enumerate(places):
            flags = _make_flags(folder / f"peer{number}", manifest, place.host, addresses)
            flags["vectors"] = options.vectors
            spec = PeerSpec(flags=flags, seed=seeds[number], seeds=seeds)
            say(f"starting peer {number + 1} of {options.peers}")
            peers.append(stack.enter_context(measured(place, PEER_ARGUMENTS, asdict(spec))))
            if number == 0:
                addresses = tuple(peers[0].wait("up", options.start_timeout_s)["addresses"])
        for peer in peers[1:]:
            peer.wait("up", options.start_timeout_s)
        for peer in peers:
            peer.wait("idle", options.start_timeout_s)
        return _measure(options, peers, say)


def _check_room(options: AllreduceOptions) -> None:
    on_disk = options.vectors == ON_DISK
    held_mib = ENCODED_HELD * options.encoded_mib if on_disk else VECTORS_HELD * options.mib
    needed_mib = options.peers * (held_mib + PROCESS_MIB)
    free_mib = psutil.virtual_memory().available / MIB
    what = f"{options.peers} peers of {options.mib:g} MiB take"
    if needed_mib > free_mib:
        problem = f"{what} {needed_mib:.0f} MiB of memory, {free_mib:.0f} are free"
        fix = "use less of one or the other" + ("" if on_disk else f", or --vectors {ON_DISK}")
        raise ConfigError("--mib", problem, fix)
    update_mib = CODECS[options.codec_out].encoded_bytes(options.elements) / MIB
    files_mib = VECTOR_FILES * options.mib + (WARMUP_ROUNDS + options.rounds) * update_mib
    free_mib = shutil.disk_usage(options.folder or tempfile.gettempdir()).free / MIB
    if options.peers * files_mib > free_mib:
        problem = f"{what} {options.peers * files_mib:.0f} MiB of disk, {free_mib:.0f} are free"
        raise ConfigError("--mib", problem, "use less of one or the other, fewer --rounds, or another --folder")


def _measure(options: AllreduceOptions, peers: Sequence[BenchProcess], say: Say) -> AllreduceResult:
    rounds: list[MeasuredRound] = []
    for number in range(WARMUP_ROUNDS + options.rounds):
        say(f"round {number + 1} of {WARMUP_ROUNDS + options.rounds}")
        before = _look(peers)
        began_s = time.monotonic()
        for peer in peers:
            peer.tell("round")
        done = [peer.wait("idle", ROUND_TIMEOUT_S) for peer in peers]
        after = _look(peers)
        if number >= WARMUP_ROUNDS:
            rounds.append(_compare(before, after, max(one["at_s"] for one in done) - began_s))
    peaks = _look(peers)  # before the peers make the exact mean
    reports = [peer.ask("report", "report", ROUND_TIMEOUT_S) for peer in peers]
    roots = {one["state_root"] for one in reports}
    if len(roots) != 1:
        raise BenchFailed(f"the peers' states differ: {', '.join(sorted(root[:16] for root in roots))}")
    if reports[0]["round"] != WARMUP_ROUNDS + options.rounds:
        raise BenchFailed(f"{reports[0]['round']} rounds were certified where one was begun {number + 1} times")
    return AllreduceResult(
        options=options,
        rounds=tuple(rounds),
        lag_p99_ms=max(one["lag_p99_ms"] for one in reports),
        peak_rss_mib=max(one["peak_rss_kib"] for one in peaks) / 1024,
        peaks_mib={kind: max(one["peaks_mib"][kind] for one in peaks) for kind in peaks[0]["peaks_mib"]},
        rms_error=max(one["rms_error"] for one in reports),
        worst_error=max(one["worst_error"] for one in reports),
        state_root=roots.pop(),
    )


def _look(peers: Sequence[BenchProcess]) -> list[dict[str, Any]]:
    """The peers' counters, when the last round has come to rest."""
    time.sleep(SETTLE_S)
    return [peer.ask("phases", "phases", ROUND_TIMEOUT_S) for peer in peers]


def _compare(before: list[dict[str, Any]], after: list[dict[str, Any]], step_s: float) -> MeasuredRound:
    def mean(*names: str) -> float:
        pairs = zip(before, after, strict=True)
        return statistics.mean(sum(float(new[name] - old[name]) for name in names) for old, new in pairs)

    exchange_s, commit_s, apply_s = mean(Phase.EXCHANGE), mean(Phase.COMMIT, Phase.FETCH), mean(Phase.APPLY)
    return MeasuredRound(
        step_s=step_s,
        prepare_s=max(0.0, step_s - exchange_s - commit_s - apply_s),
        exchange_s=exchange_s,
        commit_s=commit_s,
        apply_s=apply_s,
        cpu_s=len(before) * mean("cpu_s"),
    )


def _make_manifest(folder: Path, options: AllreduceOptions) -> Path:
    """A swarm of these peers alone, whose rounds wait for all of them and for nobody else."""
    founders = []
    for number in range(options.peers):
        (folder / f"peer{number}").mkdir()
        founders.append(create_identity(folder / f"peer{number}" / IDENTITY_FILE))
    made = make_bench_manifest(options, tuple(one.peer for one in founders))
    path = folder / "bench.shoal"
    path.write_bytes(sign_manifest(made, founders[0]))
    return path


def make_bench_manifest(options: AllreduceOptions, founders: tuple[PeerId, ...]) -> Manifest:
    """As many tensors as a model has, of the wanted size together. The outer step leaves the base as it is."""
    sizes = [options.elements // TENSORS] * (TENSORS - 1)
    sizes.append(options.elements - sum(sizes))
    tensors = tuple(TensorSpec(name=f"values.{number}", shape=(size,)) for number, size in enumerate(sizes))
    outer = Outer(learning_rate=0.0, momentum=0.0)
    draft = Draft(name="bench", task=Task(kind="bench"), outer=outer, rounds=options.make_rounds())
    return make_manifest(draft, Layout(tensors=tensors), founders[0], founders)


def _make_flags(folder: Path, manifest: Path, host: str, bootstraps: Sequence[str]) -> dict[str, str]:
    flags = {
        "data-dir": str(folder),
        "manifest": str(manifest),
        "control-host": host,
        "control-port": "0",
        "tensor-host": host,
        "tensor-port": "0",
        "web-port": "0",
        "log-level": "warning",
    }
    return flags | ({"bootstrap": ",".join(bootstraps)} if bootstraps else {})
