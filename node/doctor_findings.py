"""What `shoal doctor` says about this machine: findings from observations, in plain words, each with its next step.

Pure functions: what was seen comes in as values, `node/doctor_machine.py` and `node/doctor_swarm.py` see it. What is
said of the network stands in `node/doctor_network.py`.

Invariant: a finding that is not ok has an exact next step, and one that is ok has none; what was not seen is said to be
not checked, with the reason, and never guessed.
"""

import math
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import median
from typing import Any

from shoal.node.config import ON_DISK, TRAINER, NodeConfig
from shoal.node.machine_memory import MachineMemory
from shoal.node.state_vectors import measure_vectors
from shoal.node.status import clean_text, describe_unused
from shoal.node.terminal import format_bytes

CLOCK_SKEW_WARN_S = 30.0
# Records in the DHT are found in their epoch and the ones beside it: with more than this the peer looks elsewhere.
CLOCK_SKEW_MAX_S = 3600.0
FSYNC_BYTES_PER_S_MIN = 5e6
# Parameters, gradient and AdamW's two moments in float32.
TRAINER_BYTES_PER_PARAMETER = 16
SNAPSHOT_BYTES_PER_PARAMETER = 8
# Trainer's checkpoints (two of 12) and the residual (8), beside the snapshots.
PRIVATE_BYTES_PER_PARAMETER = 32
# Of what is encoded, a round's own contribution, those that others sent, and the update; beside that, a daemon at rest.
ENCODED_HELD = 3
DAEMON_BYTES = 250_000_000
AGAIN = "run `shoal doctor` again when the machine is less busy, or with more time: --within 60"


class Verdict(StrEnum):
    OK = "ok"
    WARNING = "warning"  # something works less well than it could
    PROBLEM = "problem"  # it stands in the way of taking part
    NOT_CHECKED = "not checked"


class Check(StrEnum):
    """What is looked at, in the order of the table."""

    IDENTITY = "identity"
    CONFIGURATION = "configuration"
    DAEMON = "daemon"
    VERSIONS = "versions"
    TRAINER = "GPU and torch"
    MEMORY = "memory"
    DISK = "disk"
    CLOCK = "clock"
    PORTS = "ports"
    FIREWALL = "firewall"
    IPV4 = "IPv4"
    IPV6 = "IPv6"
    BOOTSTRAP = "bootstrap"
    DHT = "DHT"
    NAT = "NAT"
    GATEWAY = "gateway"
    RELAY = "relay"
    REACHABILITY = "reachability"
    BANDWIDTH = "bandwidth"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the table."""

    check: Check
    verdict: Verdict
    text: str
    next_step: str = ""

    def __post_init__(self) -> None:
        assert bool(self.next_step) == (self.verdict is not Verdict.OK), "a next step, and only where one is needed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Unknown:
    """It could not be seen: why, and what makes it visible."""

    why: str
    next_step: str = AGAIN


def ok(check: Check, text: str) -> Finding:
    """A finding that asks for nothing."""
    return Finding(check=check, verdict=Verdict.OK, text=text)


def warning(check: Check, text: str, next_step: str) -> Finding:
    """A finding that costs something."""
    return Finding(check=check, verdict=Verdict.WARNING, text=text, next_step=next_step)


def problem(check: Check, text: str, next_step: str) -> Finding:
    """A finding that stands in the way of taking part."""
    return Finding(check=check, verdict=Verdict.PROBLEM, text=text, next_step=next_step)


def not_checked(check: Check, unknown: Unknown) -> Finding:
    """A finding that is none, and why."""
    return Finding(check=check, verdict=Verdict.NOT_CHECKED, text=unknown.why, next_step=unknown.next_step)


def can_take_part(findings: Iterable[Finding]) -> bool:
    """Whether nothing stands in the way: what decides about the exit code."""
    return all(finding.verdict is not Verdict.PROBLEM for finding in findings)


def order(findings: Iterable[Finding]) -> list[Finding]:
    """As the table shows them; findings of one check keep their order."""
    places = {check: place for place, check in enumerate(Check)}
    return sorted(findings, key=lambda finding: places[finding.check])


# -- identity and configuration ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class IdentitySeen:
    """`peer` is empty where there is no key yet; `fault` and `fix` are the loader's, where it refuses the file."""

    path: str
    peer: str
    fault: str = ""
    fix: str = ""
    in_use: bool = False  # a running daemon holds it


def judge_identity(seen: IdentitySeen) -> Finding:
    if seen.fault:
        return problem(Check.IDENTITY, f"{seen.path} {seen.fault}", seen.fix)
    if not seen.peer:
        return ok(Check.IDENTITY, f"no key at {seen.path} yet; the first start makes it")
    held = ", in use by the running daemon" if seen.in_use else ""
    return ok(Check.IDENTITY, f"{seen.peer}, readable by this user alone (mode 0600){held}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigFault:
    """What the reader of the configuration refuses."""

    field: str
    fault: str
    fix: str


def judge_configuration(source: str, fault: ConfigFault | None, unused: tuple[str, ...] = ()) -> Finding:
    """`unused` are settings that the running daemon's task ignores."""
    if fault is None and unused:
        fix = f"take {'it' if len(unused) == 1 else 'them'} out, unless the file serves other swarms, too"
        return warning(Check.CONFIGURATION, f"{source}: {describe_unused(unused)}", fix)
    if fault is None:
        return ok(Check.CONFIGURATION, f"{source}: every value is usable")
    return problem(Check.CONFIGURATION, f"{fault.field}: {fault.fault}", fault.fix)


# -- the clock ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ClockSeen:
    """`synchronized` is the kernel's word, None where it gives none; `ahead_s` how far each peer's clock is ahead of
    this one."""

    synchronized: bool | None
    ahead_s: tuple[float, ...]


def judge_clock(seen: ClockSeen) -> Finding:
    step = "run: sudo timedatectl set-ntp true   (without systemd: install and start chrony)"
    if not seen.ahead_s:
        if seen.synchronized:
            return ok(Check.CLOCK, "the system keeps it synchronized; no peer to compare it with")
        if seen.synchronized is None:
            why = "no peer answered, and this system does not say whether its clock is synchronized"
            return not_checked(Check.CLOCK, Unknown(why=why, next_step="compare `date -u` with a phone's clock"))
        return warning(Check.CLOCK, "the system does not keep it synchronized, and no peer to compare it with", step)
    ahead_s = median(seen.ahead_s)
    peers = count(len(seen.ahead_s), "peer")
    if abs(ahead_s) <= CLOCK_SKEW_WARN_S:
        return ok(Check.CLOCK, f"within {max(abs(ahead_s), 0.1):.1f} s of {peers}")
    text = f"{abs(ahead_s):.0f} s {'behind' if ahead_s > 0 else 'ahead of'} {peers}"
    if abs(ahead_s) > CLOCK_SKEW_MAX_S:
        return problem(Check.CLOCK, f"{text}: others do not find this peer in the DHT, its entries wait", step)
    return warning(Check.CLOCK, f"{text}; rounds do not mind, leases and records do", step)


# -- the disk ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskSeen:
    """`write_bytes_per_s` is that of a file that was written and forced to the disk."""

    folder: str
    free_bytes: int
    write_bytes_per_s: float | None
    fault: str = ""  # why nothing could be written
    used_bytes: int = 0  # of this folder already, by what the peer will keep


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSeen:
    """What of the manifest decides about the resources of a machine."""

    name: str
    parameters: int
    contribution_bytes: int
    exchange_timeout_s: float
    attached: bool = False  # trained by a script of one's own


def judge_disk(seen: DiskSeen, config: NodeConfig, model: ModelSeen | None) -> Finding:
    least = int(config.store.free_gib_min * 2**30)
    room = f"{format_bytes(seen.free_bytes)} free in {seen.folder}"
    other = "make space there, or give --data-dir on a larger disk"
    if seen.fault:
        fix = f"mend that, for instance: sudo chown -R $USER {shlex.quote(seen.folder)}; or give another --data-dir"
        return problem(Check.DISK, f"{seen.folder} cannot be written: {seen.fault}", fix)
    if seen.free_bytes < least:
        text = f"{room}, less than store.free_gib_min = {config.store.free_gib_min:g} GiB: the peer would not vote"
        return problem(Check.DISK, text, f"{other}, or lower store.free_gib_min")
    if model is not None:
        needed = max(0, _disk_bytes(config, model) - seen.used_bytes)
        if seen.free_bytes - least < needed:
            text = f"{room}; the swarm's model will take about {format_bytes(needed)} more"
            return warning(Check.DISK, text, f"{other}, or lower store.snapshots_kept")
    if seen.write_bytes_per_s is None:
        return not_checked(Check.DISK, Unknown(why=f"{room}; a small write did not reach the disk in time"))
    rate = f"{format_bytes(seen.write_bytes_per_s)}/s written and forced to the disk"
    if seen.write_bytes_per_s < FSYNC_BYTES_PER_S_MIN:
        step = "give --data-dir on a faster disk (no network share, no memory card)"
        return warning(Check.DISK, f"{room}, but only {rate}: every vote waits for that", step)
    return ok(Check.DISK, f"{room}, {rate}")


def _disk_bytes(config: NodeConfig, model: ModelSeen) -> int:
    # Beside the newest snapshots up to three older ones stay, so that every retained round can be rebuilt.
    snapshots = (config.store.snapshots_kept + 3) * SNAPSHOT_BYTES_PER_PARAMETER * model.parameters
    private = PRIVATE_BYTES_PER_PARAMETER * model.parameters if config.node.role == TRAINER else 0
    vectors = measure_vectors(config, model.parameters) if config.store.vectors == ON_DISK else 0
    return snapshots + private + vectors


# -- memory ------------------------------------------------------------------------------------------------------------


def judge_memory(
    seen: MachineMemory, config: NodeConfig, model: ModelSeen | None, *, on_cpu: bool, running: bool
) -> Finding:
    """With `on_cpu` the trainer's own vectors are in this memory, too; beside a `running` daemon what it has already
    taken is not to be had."""
    room = f"{format_bytes(seen.total_bytes)} in all, {format_bytes(seen.available_bytes)} to be had"
    if model is None:
        return ok(Check.MEMORY, room)
    vectors = measure_vectors(config, model.parameters)
    needed = DAEMON_BYTES + (ENCODED_HELD * model.contribution_bytes if config.node.role == TRAINER else 0)
    needed += TRAINER_BYTES_PER_PARAMETER * model.parameters if on_cpu and not model.attached else 0
    on_disk = config.store.vectors == ON_DISK
    held = needed + (0 if on_disk else vectors)
    text = f"{room}; the swarm's model takes about {format_bytes(held)} of it"
    text += f", and {format_bytes(vectors)} of the disk" if on_disk else ""
    if held > seen.total_bytes and (on_disk or needed > seen.total_bytes):
        return problem(Check.MEMORY, text, "use a machine with more memory, or join a swarm with a smaller model")
    if held > seen.total_bytes:
        fix = f'write vectors = "{ON_DISK}" under [store], or give --vectors {ON_DISK}: rounds take longer'
        return problem(Check.MEMORY, text, fix)
    if held > seen.available_bytes and not running:
        other = "" if on_disk else f", or give --vectors {ON_DISK}"
        return warning(Check.MEMORY, text, f"end what else takes the memory{other}")
    return ok(Check.MEMORY, text)


# -- GPU and torch -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSeen:
    name: str
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchSeen:
    """`version` is empty where torch is not installed; `cuda_fault` says why CUDA cannot be used although torch has it.
    `driver` is the NVIDIA driver that the system has, empty without one."""

    version: str
    cuda_built: bool = False
    devices: tuple[DeviceSeen, ...] = ()
    cuda_fault: str = ""
    fault: str = ""  # why torch cannot be imported
    driver: str = ""


def judge_torch(seen: TorchSeen | Unknown, config: NodeConfig, model: ModelSeen | None) -> Finding:
    if config.node.role != TRAINER:
        return ok(Check.TRAINER, f"not needed: node.role is {config.node.role}")
    if model is not None and model.attached:
        return ok(Check.TRAINER, f"not needed: {model.name} is trained by scripts, which bring their own")
    if isinstance(seen, Unknown):
        return not_checked(Check.TRAINER, seen)
    if seen.fault:
        fix = "run: pip install --force-reinstall 'torch>=2.4'"
        return problem(Check.TRAINER, f"torch {seen.version} cannot be imported: {seen.fault}".replace("  ", " "), fix)
    if not seen.version:
        fix = "run: pip install 'shoal[train]'   (or start it with --role bootstrap)"
        return problem(Check.TRAINER, "torch is not installed, and training needs it", fix)
    if not seen.devices:
        return _judge_without_gpu(seen, config)
    device = max(seen.devices, key=lambda one: one.free_bytes)
    memory = f"{format_bytes(device.free_bytes)} of {format_bytes(device.total_bytes)} free"
    text = f"torch {seen.version} uses {device.name}, {memory}"
    if config.trainer.device == "cpu":
        return ok(Check.TRAINER, f"torch {seen.version}; trainer.device is cpu, {device.name} stays idle")
    needed = TRAINER_BYTES_PER_PARAMETER * model.parameters if model is not None else 0
    if device.free_bytes < needed:
        fix = "end what else uses the GPU (see `nvidia-smi`), or give --device cpu"
        return problem(Check.TRAINER, f"{text}; the model alone takes {format_bytes(needed)}", fix)
    return ok(Check.TRAINER, text)


def _judge_without_gpu(seen: TorchSeen, config: NodeConfig) -> Finding:
    reinstall = "run: pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu126"
    text = f"torch {seen.version} has no GPU to use"
    if seen.cuda_fault:
        text = f"torch {seen.version} cannot use the GPU: {seen.cuda_fault}"
    elif seen.driver and not seen.cuda_built:
        text = f"torch {seen.version} is built without CUDA, and there is an NVIDIA driver ({seen.driver})"
    if config.trainer.device == "cuda":
        mended = reinstall if seen.driver else "install the NVIDIA driver, or give --device cpu"
        return problem(Check.TRAINER, f"{text}, and trainer.device is cuda", mended)
    if config.trainer.device == "auto" and seen.driver:
        mended = reinstall if not seen.cuda_built else "run `nvidia-smi` and mend what it says, or reboot"
        return warning(Check.TRAINER, f"{text}; it would train on the CPU", mended)
    return ok(Check.TRAINER, f"torch {seen.version}, trains on the CPU")


# -- versions ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionsSeen:
    """Of this peer, and what the peers that answered say of themselves; `refusing` are those that speak another
    protocol version."""

    python: str
    shoal: str
    libp2p: str
    libp2p_wanted: str
    protocol: int
    agents: tuple[str, ...] = ()
    refusing: tuple[str, ...] = ()


def judge_versions(seen: VersionsSeen) -> Finding:
    update = "run: pip install --upgrade shoal"
    text = f"python {seen.python}, shoal {seen.shoal}, libp2p {seen.libp2p}, protocol {seen.protocol}"
    if seen.libp2p_wanted and seen.libp2p != seen.libp2p_wanted:
        fix = f"run: pip install 'libp2p=={seen.libp2p_wanted}'"
        return problem(Check.VERSIONS, f"{text}; shoal is made for libp2p {seen.libp2p_wanted}", fix)
    if seen.refusing and len(seen.refusing) >= len(seen.agents):
        who = ", ".join(seen.refusing[:3])
        return problem(Check.VERSIONS, f"{text}; {who} speak another version of the protocol", update)
    others = [parsed for agent in seen.agents if (parsed := parse_agent(agent)) is not None]
    mine = parse_version(seen.shoal)
    newer = sum(other > mine for other in others) if mine is not None else 0
    if newer > len(others) / 2:
        newest = ".".join(map(str, max(others)))
        return warning(Check.VERSIONS, f"{text}; {count(newer, 'peer')} of {len(others)} run up to {newest}", update)
    if seen.refusing:
        told = f"tell who runs {', '.join(seen.refusing[:3])} to update shoal"
        return warning(Check.VERSIONS, f"{text}; {count(len(seen.refusing), 'peer')} speak another protocol", told)
    shared = f"; {count(len(seen.agents), 'peer')} speak the same protocol" if seen.agents else ""
    return ok(Check.VERSIONS, text + shared)


def parse_version(text: str) -> tuple[int, ...] | None:
    """The leading numbers of a version."""
    numbers: list[int] = []
    for word in text.split("."):
        digits = word[: len(word) - len(word.lstrip("0123456789"))]
        if not digits or len(digits) > 9:
            break
        numbers.append(int(digits))
        if digits != word:
            break
    return tuple(numbers) or None


def parse_agent(agent: str) -> tuple[int, ...] | None:
    """The version in what a peer calls itself: `shoal/0.1.0 name`."""
    program, _, rest = clean_text(agent).partition("/")
    return parse_version(rest.partition(" ")[0]) if program == "shoal" else None


# -- words -------------------------------------------------------------------------------------------------------------


def count(number: int, word: str) -> str:
    """1 peer, 2 peers."""
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def list_words(words: Sequence[str], shown_max: int = 4) -> str:
    """A few of them, and how many more."""
    shown = ", ".join(words[:shown_max])
    return shown if len(words) <= shown_max else f"{shown} and {len(words) - shown_max} more"


def to_json_tree(findings: Iterable[Finding], **about: Any) -> dict[str, Any]:
    """What `--json` prints. Any is the border to the json module."""
    rows = [
        {"check": one.check.value, "verdict": one.verdict.value, "text": one.text, "next_step": one.next_step}
        for one in findings
    ]
    about = {key: None if isinstance(one, float) and not math.isfinite(one) else one for key, one in about.items()}
    return {**about, "findings": rows}
