"""`shoal doctor`: looks at everything at once, within DEADLINE_S or the time given, and says what it found.

With a running daemon on the data folder it asks that one what it knows, by its local web port, and visits the swarm
under a key made for the purpose; without one it uses the peer's own key, if there is one, so that what the swarm says
to this peer is seen.

Invariants: nothing that it looks at can fail or hold up the command: what is not seen in time is said to be not
checked; it makes no key and changes no file of the folder.
"""

import asyncio
import contextlib
import fcntl
import json
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil

from shoal.dht.addresses import with_peer
from shoal.node.config import BOOTSTRAP, MANIFEST_FILE, TRAINER, NodeConfig, load_config
from shoal.node.control import STOP_TIMEOUT_S, ControlStopped
from shoal.node.doctor_findings import (
    Check,
    ClockSeen,
    ConfigFault,
    DiskSeen,
    Finding,
    IdentitySeen,
    ModelSeen,
    TorchSeen,
    Unknown,
    can_take_part,
    judge_clock,
    judge_configuration,
    judge_disk,
    judge_identity,
    judge_memory,
    judge_torch,
    judge_versions,
    not_checked,
    order,
    to_json_tree,
)
from shoal.node.doctor_machine import (
    count_dials,
    list_listeners,
    look,
    measure_folder,
    see_disk,
    see_firewall,
    see_gateway,
    see_identity,
    see_ports,
    see_source,
    see_synchronized,
    see_torch,
    see_versions,
)
from shoal.node.doctor_nat import GatewaySeen, NatSeen, judge_gateway, judge_nat, judge_relay, see_nat
from shoal.node.doctor_network import (
    NAME_A_SWARM,
    BandwidthSeen,
    FirewallSeen,
    PeersSeen,
    PortSeen,
    ReachSeen,
    judge_bandwidth,
    judge_bootstraps,
    judge_daemon,
    judge_dht,
    judge_families,
    judge_firewall,
    judge_listeners,
    judge_ports,
    judge_reach,
)
from shoal.node.doctor_swarm import SwarmView, SwarmVisit, visitor_config, visitor_handlers
from shoal.node.endpoints import format_endpoint, is_public
from shoal.node.identity_file import IDENTITY_FILE, load_identity
from shoal.node.interfaces import read_interfaces
from shoal.node.libp2p_host import Libp2pHost
from shoal.node.machine_memory import see_memory
from shoal.node.manifest_source import read_manifest_file
from shoal.node.peer_book_file import PEER_BOOK_FILE, load_peer_book
from shoal.node.reachability import NatMapping, ReachState, judge_mapping
from shoal.node.running import RUNNING_FILE, read_running
from shoal.node.status import Status, fetch_status
from shoal.node.training.custom_task import ATTACHED
from shoal.protocol.errors import ConfigError, InputError, ShoalError
from shoal.protocol.identity import SEED_BYTES, Identity, PeerId, format_peer_id, parse_peer_id
from shoal.protocol.manifest import Manifest, parse_uri, read_manifest_untrusted

DEADLINE_S = 15.0  # from the start of the process to its last line
PRINTING_S = 2.0  # and ending: on a machine that is busy with other things that takes its time, too
DEADLINE_S_MIN = 10.0
DEADLINE_S_MAX = 600.0
STATUS_TIMEOUT_S = 2.0
KNOWN_PEERS_MAX = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Deadline:
    """When which work ends, on the monotonic clock. The visit's host takes up to STOP_TIMEOUT_S to hang up."""

    began_s: float
    within_s: float = DEADLINE_S

    @property
    def looks_end_s(self) -> float:
        return self.began_s + self.within_s - PRINTING_S

    @property
    def visit_ends_s(self) -> float:
        return self.looks_end_s - STOP_TIMEOUT_S


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What is printed."""

    findings: tuple[Finding, ...]
    peer: str
    swarm: str
    took_s: float

    @property
    def takes_part(self) -> bool:
        return can_take_part(self.findings)

    def to_json(self) -> str:
        """One JSON object."""
        about = {"peer": self.peer, "swarm": self.swarm, "can_take_part": self.takes_part, "took_s": self.took_s}
        return json.dumps(to_json_tree(self.findings, **about), ensure_ascii=False)


@dataclass(slots=True, kw_only=True)
class _Observations:
    """What was seen so far; None where it was not."""

    status: Status | None = None
    listeners: tuple[tuple[str, int], ...] = ()
    ports: tuple[PortSeen, ...] | None = None
    firewall: FirewallSeen | None = None
    disk: DiskSeen | None = None
    torch: TorchSeen | Unknown | None = None
    gateway: GatewaySeen | Unknown | None = None
    swarm: SwarmView = field(default_factory=SwarmView)
    visit_fault: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Swarm:
    """Which swarm, as far as the configuration and the folder say."""

    id: bytes
    bootstraps: tuple[str, ...]
    manifest: Manifest | None


async def examine(
    path: Path | None, overrides: Mapping[str, str], noticed: Callable[[str], None], deadline: Deadline
) -> Report:
    """Look at everything. `noticed` is told what is still looked at, for a progress line."""
    config, fault = read_config(path, overrides)
    folder = config.data_path
    seen = _Observations()
    with hold_key(folder / IDENTITY_FILE) as held:
        in_use = held is None and (folder / RUNNING_FILE).exists()
        identity_seen = see_identity(folder / IDENTITY_FILE, in_use)
        await _ask_daemon(folder, seen)
        swarm = find_swarm(config, seen.status)
        key = held or Identity(secrets.token_bytes(SEED_BYTES))
        await _look_around(config, seen, swarm, key, deadline, noticed)
    findings = _judge(config, fault, path, seen, swarm, identity_seen)
    return Report(
        findings=tuple(order(findings)),
        peer=identity_seen.peer,
        swarm=swarm.id.hex() if swarm else "",
        took_s=round(time.monotonic() - deadline.began_s, 2),
    )


def read_config(path: Path | None, overrides: Mapping[str, str]) -> tuple[NodeConfig, ConfigFault | None]:
    """The configuration; where it is refused, why, and as much of it as can be had."""
    try:
        return load_config(path, overrides), None
    except InputError as error:
        fault = ConfigFault(field=error.field, fault=error.problem, fix=error.fix)
    # A trainer that nobody has told its swarm is still a machine to look at; so is one whose file is wrong.
    folder = {name: text for name, text in overrides.items() if name == "data-dir"}
    for file, given in ((path, {**overrides, "role": "bootstrap"}), (None, {**folder, "role": "bootstrap"})):
        with contextlib.suppress(InputError):
            return with_role(load_config(file, given), overrides.get("role")), fault
    return with_role(NodeConfig(), overrides.get("role")), fault


def with_role(config: NodeConfig, role: str | None) -> NodeConfig:
    """It was read as a bootstrap peer's, which needs least, and is judged as what it is to be."""
    return replace(config, node=replace(config.node, role=BOOTSTRAP if role == BOOTSTRAP else TRAINER))


def find_swarm(config: NodeConfig, status: Status | None) -> _Swarm | None:
    """From the URI, the manifest file, the folder, or the running daemon; nothing is moved aside or mended."""
    uri = None
    with contextlib.suppress(InputError):
        uri = parse_uri(config.node.swarm or (status.uri if status else ""))
    signed: bytes | None = None
    swarm = uri.swarm if uri else None
    for path in (config.node.manifest, str(config.data_path / MANIFEST_FILE)):
        if path is not None and signed is None:
            with contextlib.suppress(ConfigError):
                found, its_swarm = read_manifest_file(Path(path))
                if swarm in (None, its_swarm):
                    signed, swarm = found, its_swarm
    if swarm is None:
        return None
    bootstraps = tuple(dict.fromkeys((*(uri.bootstraps if uri else ()), *config.control.bootstraps)))
    manifest = read_manifest_untrusted(signed, swarm)[0] if signed is not None else None
    return _Swarm(id=swarm, bootstraps=bootstraps, manifest=manifest)


@contextmanager
def hold_key(path: Path) -> Iterator[Identity | None]:
    """This peer's identity for as long as no daemon uses it; None where one does, or where there is no usable key."""
    try:
        identity = load_identity(path)
        file = path.open("rb")
    except (ConfigError, OSError):
        yield None
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield None
            return
        yield identity


# -- looking -----------------------------------------------------------------------------------------------------------


async def _ask_daemon(folder: Path, seen: _Observations) -> None:
    try:
        host, port = read_running(folder)
        seen.status = await look(lambda: fetch_status(host, port, STATUS_TIMEOUT_S), STATUS_TIMEOUT_S + 0.5)
        note = json.loads((folder / RUNNING_FILE).read_text(encoding="utf-8"))
        if seen.status is not None and isinstance(note.get("pid"), int):
            seen.listeners = list_listeners(note["pid"])
    except (ShoalError, OSError, ValueError, AttributeError):
        return  # none runs, or another version: it is looked at from outside


async def _look_around(
    config: NodeConfig,
    seen: _Observations,
    swarm: _Swarm | None,
    identity: Identity,
    deadline: Deadline,
    noticed: Callable[[str], None],
) -> None:
    """Everything at once; what is not there when its time is over stays None."""
    folder = config.data_path

    async def see_all_ports() -> None:
        seen.ports = await look(lambda: see_ports(config))

    async def see_walls() -> None:
        seen.firewall = await see_firewall()

    async def see_store() -> None:
        with contextlib.suppress(OSError):
            vector_bytes = seen.status.disk.vector_bytes if seen.status else 0  # in files without a name
            seen.disk = await look(lambda: see_disk(folder, measure_folder(folder) + vector_bytes), 6.0)

    async def see_router() -> None:
        if seen.status is None and config.nat.port_mapping:
            seen.gateway = await see_gateway()

    async def see_trainer() -> None:
        seen.torch = await see_torch()

    looks = {"ports": see_all_ports(), "firewall": see_walls(), "disk": see_store(), "torch": see_trainer()}
    looks["router"] = see_router()
    tasks = {asyncio.create_task(work): name for name, work in looks.items()}
    if swarm is not None:
        tasks[asyncio.create_task(_visit(config, seen, swarm, identity, deadline))] = "swarm"
    waiting = set(tasks)
    while waiting and (left_s := deadline.looks_end_s - time.monotonic()) > 0:
        noticed(", ".join(sorted(tasks[task] for task in waiting)))
        _, waiting = await asyncio.wait(waiting, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
    for task in waiting:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _visit(
    config: NodeConfig, seen: _Observations, swarm: _Swarm, identity: Identity, deadline: Deadline
) -> None:
    """Visit the swarm with a control host of its own, for as long as that may take."""
    host = Libp2pHost(visitor_config(identity, swarm.id), visitor_handlers())
    view = seen.swarm
    view.manifest = swarm.manifest
    own = seen.status.peer if seen.status else format_peer_id(identity.peer)
    try:
        async with asyncio.timeout(deadline.visit_ends_s - time.monotonic()):
            await host.start()
            visit = SwarmVisit(identity, swarm.id, host, view)
            bootstraps = [text for text in swarm.bootstraps if not text.endswith(f"/p2p/{own}")]
            await visit.look(bootstraps, _known_peers(config, identity.peer, own))
    except TimeoutError:
        seen.visit_fault = f"the {deadline.within_s:.0f} s of this command were over"
    except (ShoalError, OSError) as error:
        seen.visit_fault = str(error)
    finally:
        with contextlib.suppress(ControlStopped):
            await host.stop()


def _known_peers(config: NodeConfig, me: PeerId, own: str) -> list[tuple[PeerId, tuple[str, ...]]]:
    book = load_peer_book(config.data_path / PEER_BOOK_FILE, me)
    ranked = [known for known in book.ranked() if known.addresses and format_peer_id(known.peer) != own]
    return [(known.peer, with_peer(known.addresses, known.peer)) for known in ranked[:KNOWN_PEERS_MAX]]


# -- judging -----------------------------------------------------------------------------------------------------------


def _judge(
    config: NodeConfig,
    fault: ConfigFault | None,
    path: Path | None,
    seen: _Observations,
    swarm: _Swarm | None,
    identity: IdentitySeen,
) -> list[Finding]:
    view = seen.swarm
    model = describe_model(view.manifest or (swarm.manifest if swarm else None))
    agents = tuple(one.agent for one in view.presences.values())
    status = seen.status
    reached = status.reach.state is ReachState.REACHABLE if status else None
    findings = [
        judge_identity(identity),
        judge_configuration(
            str(path) if path else "defaults and options", fault, status.training.unused if status else ()
        ),
        judge_versions(see_versions(agents, tuple(view.refusing))),
        judge_torch(seen.torch or Unknown(why="importing torch took too long"), config, model),
        judge_clock(ClockSeen(synchronized=see_synchronized(), ahead_s=tuple(view.ahead_s.values()))),
        judge_daemon(status, config.data_path),
    ]
    without_gpu = isinstance(seen.torch, TorchSeen) and bool(seen.torch.version) and not seen.torch.devices
    on_cpu = config.node.role == TRAINER and (without_gpu or config.trainer.device == "cpu")
    findings.append(judge_memory(see_memory(), config, model, on_cpu=on_cpu, running=status is not None))
    if seen.disk is None:
        findings.append(not_checked(Check.DISK, Unknown(why=f"{config.data_path} did not answer within 6 s")))
    else:
        findings.append(judge_disk(seen.disk, config, model))
    findings += _judge_reachability(config, seen, reached)
    findings += _judge_swarm(config, seen, swarm, identity, model)
    return findings


def _judge_reachability(config: NodeConfig, seen: _Observations, reached: bool | None) -> list[Finding]:
    """Ports, firewall, address families, and whether anybody came in."""
    findings: list[Finding] = []
    ports = [config.control.port, config.tensor.port]
    if seen.status is not None:
        findings.append(judge_listeners(seen.listeners))
        outside = (port for host, port in seen.listeners if not host.startswith("127.") and host != "::1")
        ports = list(dict.fromkeys(outside))  # most of them for both families
    elif seen.ports is None:
        findings.append(not_checked(Check.PORTS, Unknown(why="binding them took too long")))
    else:
        findings += judge_ports(seen.ports)
    if seen.firewall is None:
        findings.append(not_checked(Check.FIREWALL, Unknown(why="its rules were not read in time")))
    else:
        findings.append(judge_firewall(seen.firewall, ports, reached))
    dials = seen.swarm.dials
    ipv4, ipv6 = see_source(4), see_source(6)
    findings += judge_families(count_dials(ipv4, 4, dials), count_dials(ipv6, 6, dials))
    findings += _judge_routers(config, seen)
    if seen.status is not None:
        source = f"the running daemon: {seen.status.reach.reason}"
        state = seen.status.reach.state
        told = None if state is ReachState.UNKNOWN else state is ReachState.REACHABLE
        is_open = bool(ipv6) and is_public(ipv6)
        findings.append(judge_reach(ReachSeen(reached=told, source=source, ipv4=bool(ipv4), ipv6=is_open), ports))
    return findings


def _judge_routers(config: NodeConfig, seen: _Observations) -> list[Finding]:
    hosts = read_interfaces().hosts()
    ipv4 = [host for host in hosts if ":" not in host]
    public = any(map(is_public, ipv4 or hosts))
    alone = NatSeen(mapping=NatMapping.NONE) if hosts and not ipv4 else None  # IPv6, of which nobody is asked
    if seen.status is not None:
        nat: NatSeen | Unknown = alone or see_nat(seen.status.reach, seen.status.router)
        return [judge_nat(nat), judge_gateway(seen.status.router, public=public), judge_relay(seen.status)]
    view = seen.swarm
    nat = alone or Unknown(why="no member was reached that could tell how it sees this machine", next_step=NAME_A_SWARM)
    if view.observed:
        observed = tuple(view.observed)
        told = tuple(format_endpoint(one) for one in observed)
        mapping = judge_mapping(hosts, observed, view.port)
        nat = NatSeen(mapping=mapping, observers=view.observers, observed=told)
    findings = [judge_nat(nat), judge_relay(None, view.relays)]
    if not config.nat.port_mapping and not public:
        off = Unknown(why="nat.port_mapping is off: no router is asked", next_step="switch it on, or forward the ports")
        return [*findings, not_checked(Check.GATEWAY, off)]
    gateway = seen.gateway or Unknown(why="no router answered in time")
    return [*findings, judge_gateway(gateway, public=public)]


def _judge_swarm(
    config: NodeConfig, seen: _Observations, swarm: _Swarm | None, identity: IdentitySeen, model: ModelSeen | None
) -> list[Finding]:
    if swarm is None:
        unknown = Unknown(why="no swarm is known", next_step=NAME_A_SWARM)
        return [not_checked(check, unknown) for check in (Check.BOOTSTRAP, Check.DHT, Check.BANDWIDTH)]
    view = seen.swarm
    late = seen.visit_fault or "it was not reached in time"
    peers = PeersSeen(
        bootstraps=tuple(view.bootstraps.values()),
        known=tuple(view.known.values()),
        founder=swarm.manifest is not None and _is_founder(swarm.manifest, identity.peer),
        daemon_peers=sum(not row.me and row.alive for row in seen.status.peers) if seen.status else 0,
    )
    if seen.visit_fault and not peers.bootstraps and not peers.known:
        # It ended before anybody was dialled, which says nothing about who is there.
        unseen = Unknown(why=f"the swarm was not visited: {seen.visit_fault}")
        return [not_checked(check, unseen) for check in (Check.BOOTSTRAP, Check.DHT, Check.BANDWIDTH)]
    nobody = not any(one.reached for one in (*peers.bootstraps, *peers.known))
    why = "no peer was reached to ask" if nobody else late
    bandwidth: BandwidthSeen | Unknown = view.bandwidth or Unknown(
        why=why if nobody or not view.rates_tried else "no member could be dialled on its tensor port"
    )
    if seen.status is not None:
        sent, received = seen.status.traffic.tensor_send_bytes_per_s, seen.status.traffic.tensor_receive_bytes_per_s
        if sent is not None or received is not None:
            bandwidth = BandwidthSeen(
                up_bytes_per_s=sent, down_bytes_per_s=received, source="as the daemon measures it"
            )
    return [
        *judge_bootstraps(peers),
        judge_dht(view.dht or Unknown(why=why)),
        judge_bandwidth(bandwidth, config, model),
    ]


def _is_founder(manifest: Manifest, peer: str) -> bool:
    return bool(peer) and parse_peer_id(peer) in manifest.founders


def describe_model(manifest: Manifest | None) -> ModelSeen | None:
    """What of a manifest decides about a machine."""
    if manifest is None:
        return None
    return ModelSeen(
        name=manifest.name,
        parameters=manifest.layout.elements,
        contribution_bytes=sum(map(manifest.contribution_bytes, manifest.list_parts(1))),
        exchange_timeout_s=manifest.rounds.exchange_timeout_s,
        attached=manifest.task.kind == ATTACHED,
    )


def run(
    path: Path | None, overrides: Mapping[str, str], noticed: Callable[[str], None], within_s: float = DEADLINE_S
) -> Report:
    """`examine` on a loop of its own; the time that this process has run for already counts. Raises ConfigError."""
    if not DEADLINE_S_MIN <= within_s <= DEADLINE_S_MAX:
        limits = f"give {DEADLINE_S_MIN:.0f} to {DEADLINE_S_MAX:.0f} seconds"
        raise ConfigError("--within", f"{within_s:g} s is no time to look around in", limits)
    began_s = time.monotonic() - (time.time() - psutil.Process().create_time())
    return asyncio.run(examine(path, overrides, noticed, Deadline(began_s=began_s, within_s=within_s)))
