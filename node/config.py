"""What the person at this machine decides: the node's configuration, read once from TOML and from the command line.

The field annotations are the schema, the field defaults are those of one volunteer machine. What a whole swarm must
agree on stands in its manifest instead.

Invariant: a NodeConfig that exists is usable: every field is within its bounds, every path is absolute, every address
parses, and the fields fit each other. Everything else is a ConfigError with the field, the line and the fix.
"""

import dataclasses
import ipaddress
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from shoal.dht.addresses import parse_address, parse_peer_address
from shoal.node.link_pacing import find_congestion_fault
from shoal.node.rate_caps import CapSchedule, check_mbit, make_schedule, parse_hours
from shoal.node.running import DATA_DIR
from shoal.node.training.custom_task import PATH_FORM, is_task_path
from shoal.node.training.datasets_library import HUB, is_on_hub
from shoal.node.training.messages import PROCESSES_MAX, TASKS_ALLOWED_MAX
from shoal.protocol.errors import ConfigError, InputError, UriError
from shoal.protocol.manifest import BATCH_SIZE_MAX, BOOTSTRAPS_MAX, parse_uri
from shoal.protocol.messages import ADDRESSES_MAX
from shoal.protocol.tables import locate, parse_toml, read_table
from shoal.protocol.wire import Bound, Choice

CONTROL_PORT = 9460
TENSOR_PORT = 9461
WEB_PORT = 9464
CONFIG_BYTES_MAX = 1 << 20
CONGESTION_CHARACTERS_MAX = 15  # of a name, in Linux
MANIFEST_FILE = "manifest.shoal"  # in the data folder, from an earlier start

TRAINER = "trainer"
BOOTSTRAP = "bootstrap"
IN_MEMORY = "memory"
ON_DISK = "disk"

Port = Annotated[int, Bound(0, 65_535)]
Host = Annotated[str, Bound(1, 253)]
PathText = Annotated[str, Bound(1, 4096)]
OptionalPath = Annotated[str | None, Bound(1, 4096)]


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeTable:
    """[node]: who this peer is and which swarm it serves."""

    data_dir: PathText = DATA_DIR
    """Keys, ledger, updates and snapshots. One running daemon a folder."""
    name: Annotated[str, Bound(0, 32)] = ""
    """Shown to other people beside the peer id; nothing depends on it."""
    role: Annotated[str, Choice((TRAINER, BOOTSTRAP))] = TRAINER
    """A bootstrap peer introduces, relays and keeps the log, and trains nothing."""
    manifest: OptionalPath = None
    """A signed manifest, from `shoal swarm create`."""
    swarm: Annotated[str | None, Bound(1, 8192)] = None
    """A shoal:// URI; the manifest is then fetched from the swarm, unless the file is given, too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlTable:
    """[control]: the libp2p host."""

    host: Host = "0.0.0.0"
    port: Port = CONTROL_PORT
    announce: Annotated[tuple[str, ...], Bound(0, ADDRESSES_MAX)] = ()
    """Multiaddrs that others should dial, where the observed ones are wrong (a forwarded port, a DNS name)."""
    bootstraps: Annotated[tuple[str, ...], Bound(0, BOOTSTRAPS_MAX)] = ()
    """Multiaddrs with peer ids, besides those of the swarm's URI."""
    connections_max: Annotated[int, Bound(8, 10_000)] = 200
    """Connections of all peers together; a quarter of them is kept for those that this peer makes."""
    relay: bool = True
    """Carry control connections between peers that nobody can dial, while this one can be dialled. It reads none."""
    relay_reservations_max: Annotated[int, Bound(1, 5_000)] = 64
    """Peers that may be reached through this one at a time, and at most half of the connections."""
    relay_circuit_mib_max: Annotated[int, Bound(1, 1 << 20)] = 64
    """Bytes of one relayed connection, both ways together; its peers then make another."""
    relays_wanted: Annotated[int, Bound(0, 3)] = 2
    """At how many other peers this one asks to be relayed to, while nobody can dial it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorTable:
    """[tensor]: the port that tensor links come in on."""

    host: Host = "0.0.0.0"
    """0.0.0.0 and :: both mean every address of this machine, IPv4 and IPv6."""
    port: Port = TENSOR_PORT
    announce_host: Annotated[str | None, Bound(1, 253)] = None
    """The IP address or DNS name under which others reach this port, where the observed one is wrong."""
    announce_port: Port = 0
    """The port that others dial, where a router forwards another one to `port`; 0 means `port` itself."""
    congestion_control: Annotated[str | None, Bound(1, CONGESTION_CHARACTERS_MAX)] = None
    """That of TCP on tensor links, such as "bbr"; None is the system's own."""
    relay: bool = True
    """Pass on the sealed bytes of links between members that cannot reach each other, where this one can be dialled."""
    relay_links_max: Annotated[int, Bound(1, 1024)] = 16
    """Such links at a time, each with two connections and 256 KiB of memory."""
    relay_links_per_peer_max: Annotated[int, Bound(1, 1024)] = 4
    """Those of one member."""
    relay_mib_per_hour: Annotated[int, Bound(1, 1 << 24)] = 4096
    """Bytes of all such links within an hour, both ways together: each comes in here and goes out again."""
    relay_peer_mib_per_hour: Annotated[int, Bound(1, 1 << 24)] = 2048
    """Those of one member's links."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitsTable:
    """[limits]: how much of this machine's line the tensors of rounds, and of peers that catch up, may take."""

    upload_mbit: Annotated[float, Bound(0, 1_000_000)] = 0.0
    """Mbit/s that leave at most, 1 and more; 0 is no cap. A capped peer passes on no tensors for others."""
    download_mbit: Annotated[float, Bound(0, 1_000_000)] = 0.0
    """Mbit/s that come at most; 0 is no cap."""
    hours: Annotated[tuple[str, ...], Bound(0, 24)] = ()
    """Other caps at certain hours of this machine's day: "08:00-18:00 upload 5 download 20". The first that holds."""

    @property
    def schedule(self) -> CapSchedule:
        """What the three fields say together; raises ValueError."""
        return make_schedule(self.upload_mbit, self.download_mbit, self.hours)


@dataclass(frozen=True, slots=True, kw_only=True)
class NatTable:
    """[nat]: the router between this machine and the internet."""

    port_mapping: bool = True
    """Ask it by NAT-PMP and UPnP to lead the two ports to this machine, where they listen on more than loopback."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LanTable:
    """[lan]: the network that this machine is in."""

    mdns: bool = True
    """Find peers of the swarm there, and be found. Everybody there learns this peer's id and addresses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WebTable:
    """[web]: metrics, health and the live page. Whoever reaches this port reads all of it."""

    host: Host = "127.0.0.1"
    port: Port = WEB_PORT


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerTable:
    """[trainer]: the child process with torch."""

    device: Annotated[str, Choice(("auto", "cpu", "cuda"))] = "auto"
    threads: Annotated[int, Bound(0, 1024)] = 0
    """CPU threads of the inner steps, of all processes together; 0 leaves the choice to torch."""
    processes: Annotated[int, Bound(0, PROCESSES_MAX)] = 1
    """Processes that share each batch, one a GPU, or several on a CPU; 0 is one for each GPU that torch finds."""
    nice: Annotated[int, Bound(0, 19)] = 10
    """How far the trainer stands back: at 0 it competes with the daemon and with the person at this machine."""
    text: OptionalPath = None
    """A file or folder to train on; without it, the source of the running Python."""
    dataset: OptionalPath = None
    """In the place of `text`: a data set that is streamed, a file or folder, or "hf://datasets/NAME" of the hub."""
    dataset_config: Annotated[str | None, Bound(1, 256)] = None
    """Its configuration, where it has several."""
    dataset_split: Annotated[str, Bound(1, 256)] = "train"
    dataset_column: Annotated[str, Bound(1, 256)] = "text"
    """The column that holds the texts."""
    tokenizer: OptionalPath = None
    """The tokenizer.json of the swarm, where it trains on tokens: the manifest has the digest, not the file."""
    weights: OptionalPath = None
    """The folder with the weights that the swarm starts from, where it does: the manifest has the digest."""
    micro_batch: Annotated[int, Bound(0, BATCH_SIZE_MAX)] = 0
    """Examples of a batch that are computed at a time; 0 is all of them. What does not fit into memory is halved."""
    checkpoint_activations: bool = False
    """Of byte_gpt: compute each block again in the backward pass instead of keeping what is in it. Less memory, more
    time, the same steps."""
    allow_tasks: Annotated[tuple[str, ...], Bound(0, TASKS_ALLOWED_MAX)] = ()
    """Import paths of tasks that may run here ("package.module:Class"), beside those built in. Each is somebody's code,
    with the rights of this process: look at it first."""
    compile: bool = False
    """Compute the loss as torch.compile makes it. The first step then takes minutes, and a CPU needs a C++ compiler."""
    step_period_s: Annotated[float, Bound(0, 3600)] = 0.0
    """At least so long from one inner step to the next, for a machine that is to stay cool or quiet; 0 never rests."""
    checkpoint_every: Annotated[int, Bound(0, 1000)] = 1
    """Rounds from one checkpoint of the trainer to the next: 12 bytes a parameter each time. 0 writes none."""
    stall_timeout_s: Annotated[float, Bound(1, 86_400)] = 300.0
    """A trainer that reports no inner step for so long is restarted. Less than one step's time restarts it forever."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreTable:
    """[store]: the disk. The manifest's `rounds_kept` is the least that every peer keeps of the log."""

    snapshots_kept: Annotated[int, Bound(1, 64)] = 2
    """The newest ones. A few older ones stay beside them, so that every retained round can be rebuilt."""
    rounds_kept: Annotated[int, Bound(0, 10_000)] = 0
    """Certified updates that stay, where that is more than the manifest's number."""
    gib_max: Annotated[float, Bound(0, 1 << 20)] = 0.0
    """Of updates and snapshots together; older ones go first, but nothing that the swarm relies on. 0 is no limit."""
    free_gib_min: Annotated[float, Bound(0, 1024)] = 1.0
    """With less free space than this a peer stops voting and says so, before the disk is full."""
    vectors: Annotated[str, Choice((IN_MEMORY, ON_DISK))] = IN_MEMORY
    """Where the model's vectors lie, which daemon and trainer share. On the disk they are mapped files, and the system
    keeps of them in memory what fits: for a model that is too large for this machine's memory. Rounds take longer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogTable:
    """[log]: what goes to the standard error stream."""

    level: Annotated[str, Choice(("debug", "info", "warning", "error"))] = "info"
    format: Annotated[str, Choice(("text", "json"))] = "text"


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeConfig:
    node: NodeTable = field(default_factory=NodeTable)
    control: ControlTable = field(default_factory=ControlTable)
    tensor: TensorTable = field(default_factory=TensorTable)
    limits: LimitsTable = field(default_factory=LimitsTable)
    nat: NatTable = field(default_factory=NatTable)
    lan: LanTable = field(default_factory=LanTable)
    web: WebTable = field(default_factory=WebTable)
    trainer: TrainerTable = field(default_factory=TrainerTable)
    store: StoreTable = field(default_factory=StoreTable)
    log: LogTable = field(default_factory=LogTable)

    @property
    def data_path(self) -> Path:
        """`node.data_dir`, absolute."""
        return Path(self.node.data_dir)

    @property
    def tensor_paths(self) -> TensorTable:
        """[tensor], where a capped peer relays nothing: what passes through it is not paced."""
        relays = self.tensor.relay and self.limits.schedule.is_empty
        return dataclasses.replace(self.tensor, relay=relays)


# The command line's flags and the fields that they override. The list is short on purpose: the rest is the file's.
FLAGS: Mapping[str, str] = {
    "data-dir": "node.data_dir",
    "name": "node.name",
    "role": "node.role",
    "manifest": "node.manifest",
    "swarm": "node.swarm",
    "bootstrap": "control.bootstraps",
    "control-host": "control.host",
    "control-port": "control.port",
    "announce": "control.announce",
    "tensor-host": "tensor.host",
    "tensor-port": "tensor.port",
    "announce-host": "tensor.announce_host",
    "announce-port": "tensor.announce_port",
    "upload-mbit": "limits.upload_mbit",
    "download-mbit": "limits.download_mbit",
    "web-host": "web.host",
    "web-port": "web.port",
    "device": "trainer.device",
    "threads": "trainer.threads",
    "text": "trainer.text",
    "dataset": "trainer.dataset",
    "tokenizer": "trainer.tokenizer",
    "weights": "trainer.weights",
    "allow-task": "trainer.allow_tasks",
    "vectors": "store.vectors",
    "log-level": "log.level",
    "log-format": "log.format",
}
_PATHS = (
    ("node", "data_dir"),
    ("node", "manifest"),
    ("trainer", "text"),
    ("trainer", "dataset"),
    ("trainer", "tokenizer"),
    ("trainer", "weights"),
)


def load_config(path: Path | None, overrides: Mapping[str, str]) -> NodeConfig:
    """The configuration in the file at `path`, or the defaults without one, under the overrides.

    `overrides` maps names of FLAGS to texts; lists are separated by commas. Relative paths are relative to the file
    that they stand in, those of overrides to the working directory. Raises ConfigError.
    """
    text = "" if path is None else _read_file(path)
    config = read_table(NodeConfig, parse_toml(text, ConfigError), "", text, ConfigError)
    config = _with_paths(config, Path.cwd() if path is None else path.resolve().parent)
    for flag, value in overrides.items():
        config = _override(config, flag, value)
    config = _with_paths(config, Path.cwd())
    for section, name, problem, fix in _find_faults(config):
        given = next((flag for flag in overrides if FLAGS[flag] == f"{section}.{name}"), None)
        raise ConfigError(f"--{given}" if given else locate(text, section, name), problem, fix)
    return config


def _read_file(path: Path) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(CONFIG_BYTES_MAX + 1)
    except OSError as error:
        problem = f"cannot be read: {error.strerror}"
        raise ConfigError(str(path), problem, "give the path of a TOML file that you may read") from error
    if len(raw) > CONFIG_BYTES_MAX:
        raise ConfigError(str(path), f"is larger than {CONFIG_BYTES_MAX} bytes", "give the path of a configuration")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(str(path), "is not UTF-8 text", "save it as UTF-8") from error


def _override(config: NodeConfig, flag: str, text: str) -> NodeConfig:
    if flag not in FLAGS:
        raise ConfigError(f"--{flag}", "is no known flag", f"use one of: {', '.join(f'--{known}' for known in FLAGS)}")
    section, _, name = FLAGS[flag].partition(".")
    table = getattr(config, section)
    try:
        value = _parse_flag(table, name, text)
        read = read_table(type(table), {name: value}, section, "", ConfigError)
    except ConfigError as error:
        raise ConfigError(f"--{flag}", error.problem, error.fix) from error
    return dataclasses.replace(config, **{section: dataclasses.replace(table, **{name: getattr(read, name)})})


def _parse_flag(table: Any, name: str, text: str) -> Any:
    """The value in the text of a flag. The type is that of the field's default; None stands for an optional text."""
    default = {one.name: one.default for one in dataclasses.fields(table)}[name]
    if isinstance(default, tuple):
        return [item.strip() for item in text.split(",") if item.strip()]
    if isinstance(default, int):
        try:
            return int(text)
        except ValueError as error:
            raise ConfigError(name, f"{text!r} is no whole number", "give digits") from error
    if isinstance(default, float):
        try:
            return float(text)
        except ValueError as error:
            raise ConfigError(
                name, f"{text!r} is no number", "give digits, with a point before the fraction"
            ) from error
    return text


def _with_paths(config: NodeConfig, folder: Path) -> NodeConfig:
    for section, name in _PATHS:
        table = getattr(config, section)
        written = getattr(table, name)
        if written is not None and not is_on_hub(written):
            # normpath and not resolve: a link stays the name that the person gave.
            absolute = os.path.normpath(folder / Path(written).expanduser())
            config = dataclasses.replace(config, **{section: dataclasses.replace(table, **{name: absolute})})
    return config


Fault = tuple[str, str, str, str]


def _find_faults(config: NodeConfig) -> Iterator[Fault]:
    """What read_table cannot see, as (section, field, problem, fix)."""
    yield from _find_node_faults(config)
    yield from _find_address_faults(config)
    yield from _find_limit_faults(config.limits)
    ports = (("control", config.control.port), ("tensor", config.tensor.port), ("web", config.web.port))
    for index, (section, port) in enumerate(ports):
        for other, taken in ports[:index]:
            if port == taken != 0:
                yield section, "port", f"{port} is {other}.port, too", "give each a port of its own, or 0 for any free"


def _find_node_faults(config: NodeConfig) -> Iterator[Fault]:
    node = config.node
    if not node.name.isprintable():
        yield "node", "name", "holds characters that cannot be shown", "use letters, digits and punctuation"
    if node.swarm is not None:
        try:
            parse_uri(node.swarm)
        except UriError as error:
            yield "node", "swarm", f"{error.field}: {error.problem}", error.fix
    is_known = (config.data_path / MANIFEST_FILE).is_file()
    if node.role == TRAINER and node.swarm is None and node.manifest is None and not is_known:
        fix = "give the shoal:// URI of a swarm (node.swarm), or make a manifest with `shoal swarm create`"
        yield "node", "role", "is trainer, but neither node.swarm nor node.manifest says of what", fix
    if node.manifest is not None and not Path(node.manifest).is_file():
        yield "node", "manifest", f"{node.manifest} is no file", "make one with `shoal swarm create`, or mend the path"
    if config.trainer.text is not None and not Path(config.trainer.text).exists():
        yield "trainer", "text", f"{config.trainer.text} does not exist", "give a text file, or a folder of them"
    yield from _find_dataset_faults(config.trainer)
    if config.trainer.tokenizer is not None and not Path(config.trainer.tokenizer).is_file():
        yield "trainer", "tokenizer", f"{config.trainer.tokenizer} is no file", "give the swarm's tokenizer.json"
    if config.trainer.weights is not None and not Path(config.trainer.weights).is_dir():
        yield "trainer", "weights", f"{config.trainer.weights} is no folder", "give that of the swarm's trained weights"
    for path in config.trainer.allow_tasks:
        if not is_task_path(path):
            yield "trainer", "allow_tasks", f"{path!r} names no class", f'write it as "{PATH_FORM}", in ASCII'


def _find_dataset_faults(trainer: TrainerTable) -> Iterator[Fault]:
    if trainer.dataset is None:
        if trainer.dataset_config is not None:
            yield "trainer", "dataset_config", "is given, and trainer.dataset is not", "name the data set, too"
    elif trainer.text is not None:
        yield "trainer", "dataset", "is given, and so is trainer.text", "give one of the two"
    elif not is_on_hub(trainer.dataset) and not Path(trainer.dataset).exists():
        fix = f'give a file or a folder, or write a data set of the hub as "{HUB}NAME"'
        yield "trainer", "dataset", f"{trainer.dataset} does not exist", fix


def _find_address_faults(config: NodeConfig) -> Iterator[Fault]:
    for section, host in (("control", config.control.host), ("tensor", config.tensor.host), ("web", config.web.host)):
        if not _is_ip(host):
            fix = "use 127.0.0.1 for this machine alone, 0.0.0.0 for all of its IPv4 addresses, :: for all"
            yield section, "host", f"{host!r} is no IP address to listen on", fix
    for text in config.control.announce:
        try:
            wildcard = parse_address(text).is_wildcard
        except InputError as error:
            yield "control", "announce", error.problem, error.fix
        else:
            if wildcard:
                yield "control", "announce", f"{text} cannot be dialled", "write the address that others see"
    for text in config.control.bootstraps:
        try:
            parse_peer_address(text)
        except InputError as error:
            yield "control", "bootstraps", error.problem, error.fix
    announced = config.tensor.announce_host
    if announced is not None and not _is_dialable(announced):
        fix = "write an IP address or a DNS name, without a port"
        yield "tensor", "announce_host", f"{announced!r} cannot be dialled", fix
    chosen = config.tensor.congestion_control
    if chosen is not None and (problem := find_congestion_fault(chosen)) is not None:
        fix = "leave it out, or see what net.ipv4.tcp_allowed_congestion_control has; root may load and allow it"
        yield "tensor", "congestion_control", f"{chosen!r} {problem}", fix


def _find_limit_faults(limits: LimitsTable) -> Iterator[Fault]:
    for name in ("upload_mbit", "download_mbit"):
        try:
            check_mbit(getattr(limits, name))
        except ValueError as error:
            yield "limits", name, str(error), "write 0, or 1 and more"
    for text in limits.hours:
        try:
            parse_hours(text)
        except ValueError as error:
            yield "limits", "hours", str(error), 'write it as "08:00-18:00 upload 5 download 20", in Mbit/s'


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _is_dialable(host: str) -> bool:
    if _is_ip(host):
        return not ipaddress.ip_address(host).is_unspecified
    try:
        parse_address(f"/dns/{host}/tcp/1")
    except UriError:
        return False
    # Four numbers with dots, or digits alone, are a mistyped address and not a name.
    return not host.replace(".", "").isdigit()
