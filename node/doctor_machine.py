"""What `shoal doctor` sees of this machine: files, ports, firewall, routes, clock, disk, GPU and torch, versions.

Invariants: nothing is changed but one small file that is written and removed again; every look ends within its limit,
and one that hangs (a dead network share, a driver) is left behind in a thread that does not keep the process alive.
"""

import asyncio
import ctypes
import errno
import ipaddress
import json
import os
import re
import shutil
import socket
import stat
import sys
import threading
import time
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import Callable, Iterable
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import psutil

from shoal.node.config import NodeConfig
from shoal.node.doctor_findings import DeviceSeen, DiskSeen, IdentitySeen, TorchSeen, Unknown, VersionsSeen
from shoal.node.doctor_nat import GatewaySeen
from shoal.node.doctor_network import FamilySeen, Firewall, FirewallSeen, PortSeen, PortState
from shoal.node.identity_file import load_identity
from shoal.node.interfaces import read_interfaces
from shoal.node.port_mapping import Gateway, GatewayFailed, Way, check_external
from shoal.node.portmap import WAYS
from shoal.protocol.errors import ConfigError, ShoalError
from shoal.protocol.identity import PROTOCOL_VERSION, format_peer_id

LOOK_TIMEOUT_S = 3.0
TORCH_TIMEOUT_S = 11.0
COMMAND_TIMEOUT_S = 2.0
GATEWAY_TIMEOUT_S = 3.0  # for each way
DISK_PROBE_BYTES = 4 << 20
COMMAND_BYTES_MAX = 1 << 20
_TIME_ERROR = 5  # adjtimex(2): the clock is not synchronized
_TIMEX_BYTES = 512  # struct timex has 208 on 64-bit Linux

T = TypeVar("T")


async def look(look_at: Callable[[], T], timeout_s: float = LOOK_TIMEOUT_S) -> T | None:
    """The answer of a blocking call from a thread of its own; None when it takes longer. What it raises is raised."""
    loop = asyncio.get_running_loop()
    answered: asyncio.Future[T] = loop.create_future()

    def settle(value: T | None, error: OSError | ShoalError | None) -> None:
        if answered.done():
            return
        if error is None:
            answered.set_result(value)  # type: ignore[arg-type]
        else:
            answered.set_exception(error)

    def work() -> None:
        value: T | None = None
        raised: OSError | ShoalError | None = None
        try:
            value = look_at()
        except (OSError, ShoalError) as error:
            raised = error
        try:
            loop.call_soon_threadsafe(settle, value, raised)
        except RuntimeError:
            return  # the loop is closed: the answer came too late

    threading.Thread(target=work, name="doctor", daemon=True).start()
    try:
        async with asyncio.timeout(timeout_s):
            return await answered
    except TimeoutError:
        return None


# -- identity ----------------------------------------------------------------------------------------------------------


def see_identity(path: Path, in_use: bool) -> IdentitySeen:
    """The key file, which is not made where there is none."""
    if not path.exists():
        return IdentitySeen(path=str(path), peer="")
    try:
        identity = load_identity(path)
    except ConfigError as error:
        return IdentitySeen(path=str(path), peer="", fault=error.problem, fix=error.fix)
    return IdentitySeen(path=str(path), peer=format_peer_id(identity.peer), in_use=in_use)


# -- ports -------------------------------------------------------------------------------------------------------------


def see_ports(config: NodeConfig) -> tuple[PortSeen, ...]:
    """Whether a daemon could listen."""
    tables = (("control", config.control), ("tensor", config.tensor), ("web", config.web))
    return tuple(see_port(use, table.host, table.port) for use, table in tables)


def see_port(use: str, host: str, port: int) -> PortSeen:
    """Bind it and let it go."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    holder, state = "", PortState.FREE
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            # As asyncio does: connections of an earlier daemon that linger are no obstacle.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            probe.listen(1)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            state, holder = PortState.TAKEN, find_holder(port)
        elif error.errno in (errno.EACCES, errno.EPERM):
            state = PortState.DENIED
        else:
            state = PortState.NO_ADDRESS
    return PortSeen(use=use, host=host, port=port, state=state, holder=holder)


def find_holder(port: int) -> str:
    """The program that listens on a TCP port, where this user may see it."""
    with suppress(psutil.Error, OSError):
        for one in psutil.net_connections("tcp"):
            if one.status == psutil.CONN_LISTEN and one.laddr and one.laddr.port == port and one.pid is not None:
                return f"{psutil.Process(one.pid).name()} (process {one.pid})"
    return ""


def list_listeners(pid: int) -> tuple[tuple[str, int], ...]:
    """The addresses and ports that a process listens on over TCP, where this user may see it."""
    with suppress(psutil.Error, OSError):
        found = psutil.Process(pid).net_connections("tcp")
        listening = [one.laddr for one in found if one.status == psutil.CONN_LISTEN and one.laddr]
        return tuple(sorted({(address.ip, address.port) for address in listening}))
    return ()


# -- firewall ----------------------------------------------------------------------------------------------------------


async def see_firewall() -> FirewallSeen:
    """Which one is there and what it lets in, as far as this user may see."""
    if re.search(r"^ENABLED=yes", _read_text(Path("/etc/ufw/ufw.conf")), re.MULTILINE):
        told = await run_command("ufw", "status")
        ports = None if told is None else parse_ufw(told)
        return FirewallSeen(kind=Firewall.UFW, drops=True, open_ports=ports)
    if Path("/run/firewalld").exists() and shutil.which("firewall-cmd"):
        told = await run_command("firewall-cmd", "--list-ports")
        ports = None if told is None else parse_port_list(told)
        return FirewallSeen(kind=Firewall.FIREWALLD, drops=True, open_ports=ports)
    told = await run_command("nft", "--json", "list", "ruleset")
    if told is not None:
        return parse_nft(told)
    # Without root the rules are hidden; the kernel still says whether the module is loaded.
    if "nf_tables" in _read_text(Path("/proc/modules")) and os.geteuid() != 0:
        return FirewallSeen(kind=Firewall.NFTABLES, drops=None)
    return FirewallSeen(kind=Firewall.NONE, drops=False)


def parse_ufw(told: str) -> frozenset[int] | None:
    """The ports that `ufw status` lists as allowed; None where it says nothing of the kind."""
    if "Status: active" not in told:
        return None
    allowed = re.findall(r"^(\d+(?::\d+)?(?:,\d+)*)(?:/tcp)?\s+ALLOW", told, re.MULTILINE)
    return frozenset(port for text in allowed for port in _expand_ports(text.replace(":", "-").split(",")))


def parse_port_list(told: str) -> frozenset[int]:
    """The TCP ports of `firewall-cmd --list-ports`."""
    words = [word.removesuffix("/tcp") for word in told.split() if word.endswith("/tcp")]
    return frozenset(_expand_ports(words))


def _expand_ports(words: Iterable[str]) -> set[int]:
    ports: set[int] = set()
    for word in words:
        first, _, last = word.partition("-")
        if first.isdigit() and (last or first).isdigit():
            ports.update(range(int(first), min(int(last or first), 65_535) + 1))
    return ports


def parse_nft(told: str) -> FirewallSeen:
    """What `nft --json list ruleset` says of packets that come in for this machine."""
    try:
        entries = json.loads(told)["nftables"]
        hooked = [one["chain"] for one in entries if "chain" in one and one["chain"].get("hook") == "input"]
        rules = [one["rule"] for one in entries if "rule" in one]
        chains = {(chain["family"], chain["table"], chain["name"]) for chain in hooked}
        mine = [rule for rule in rules if (rule["family"], rule["table"], rule["chain"]) in chains]
        drops = any(chain.get("policy") == "drop" for chain in hooked) or any(_turns_away(rule) for rule in mine)
        ports = {port for rule in rules if _verdict(rule) == "accept" for port in _matched_ports(rule)}
    except (ValueError, KeyError, TypeError, AttributeError):
        return FirewallSeen(kind=Firewall.NFTABLES, drops=None)
    if not hooked:
        return FirewallSeen(kind=Firewall.NONE, drops=False)
    return FirewallSeen(kind=Firewall.NFTABLES, drops=drops, open_ports=frozenset(ports))


def _verdict(rule: dict[str, Any]) -> str:
    for part in rule.get("expr", ()):
        for verdict in ("accept", "drop", "reject"):
            if verdict in part:
                return verdict
    return ""


def _turns_away(rule: dict[str, Any]) -> bool:
    # Only a rule for everything: one for some addresses is somebody's ban list.
    return _verdict(rule) in ("drop", "reject") and not any("match" in part for part in rule.get("expr", ()))


def _matched_ports(rule: dict[str, Any]) -> set[int]:
    ports: set[int] = set()
    for part in rule.get("expr", ()):
        match = part.get("match", {})
        if match.get("left") != {"payload": {"protocol": "tcp", "field": "dport"}}:
            continue
        right = match.get("right")
        for one in right["set"] if isinstance(right, dict) and "set" in right else [right]:
            if isinstance(one, int):
                ports.add(one)
            elif isinstance(one, dict) and "range" in one:
                first, last = one["range"]
                ports.update(range(first, min(last, 65_535) + 1))
    return ports


async def run_command(*command: str) -> str | None:
    """What it prints; None where it is not there, fails or takes longer than COMMAND_TIMEOUT_S."""
    path = shutil.which(command[0], path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if path is None:
        return None
    try:
        process = await asyncio.create_subprocess_exec(path, *command[1:], stdin=DEVNULL, stdout=PIPE, stderr=DEVNULL)
    except OSError:
        return None
    told = await read_process(process, COMMAND_TIMEOUT_S)
    return told if process.returncode == 0 else None


async def read_process(process: asyncio.subprocess.Process, timeout_s: float) -> str | None:
    """What a child prints, at most COMMAND_BYTES_MAX; killed and None after `timeout_s`."""
    assert process.stdout is not None
    told = bytearray()
    try:
        async with asyncio.timeout(timeout_s):
            while len(told) <= COMMAND_BYTES_MAX and (chunk := await process.stdout.read(1 << 16)):
                told += chunk
            await process.wait()
    except TimeoutError:
        return None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return told.decode(errors="replace")


# -- routes ------------------------------------------------------------------------------------------------------------


def see_source(version: int) -> str:
    """The address that packets to the world leave from; empty without a route. Nothing is sent."""
    family, target = (socket.AF_INET6, "2001:4860:4860::8888") if version == 6 else (socket.AF_INET, "8.8.8.8")
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((target, 9))
            return str(probe.getsockname()[0])
    except OSError:
        return ""


def count_dials(source: str, version: int, dials: Iterable[tuple[str, str]]) -> FamilySeen:
    """`dials` are the IP addresses that were dialled and why that failed, empty where it worked."""
    mine = [(host, fault) for host, fault in dials if ipaddress.ip_address(host).version == version]
    faults = [fault for _, fault in mine if fault]
    return FamilySeen(
        source=source, dials=len(mine), answered=len(mine) - len(faults), fault=faults[0] if faults else ""
    )


async def see_gateway() -> GatewaySeen | Unknown:
    """Whether a router answers to be asked for mapped ports. Nothing is mapped."""
    interfaces = read_interfaces()
    faults = []
    for way, open_gateway in WAYS.items():
        try:
            async with asyncio.timeout(GATEWAY_TIMEOUT_S):
                gateway = await open_gateway(interfaces)
                try:
                    return await _see_outside(gateway, way)
                finally:
                    await gateway.close()
        except TimeoutError:
            faults.append(f"{way}: no answer within {GATEWAY_TIMEOUT_S:.0f} s")
        except (GatewayFailed, OSError) as error:
            faults.append(f"{way}: {error}")
    return Unknown(why="; ".join(faults))


async def _see_outside(gateway: Gateway, way: Way) -> GatewaySeen:
    told = await gateway.external_ip()  # who does not answer this is no such router
    try:
        outside = check_external(told)
    except GatewayFailed as error:
        return GatewaySeen(host=gateway.host, way=way, fault=str(error))
    return GatewaySeen(host=gateway.host, way=way, external_ip=outside)


# -- clock -------------------------------------------------------------------------------------------------------------


def see_synchronized() -> bool | None:
    """What the kernel says of its own clock; None where it cannot be asked."""
    if not sys.platform.startswith("linux"):
        return None
    timex = ctypes.create_string_buffer(_TIMEX_BYTES)  # modes = 0: only reads
    try:
        state = ctypes.CDLL(None).adjtimex(timex)
    except (OSError, AttributeError):
        return None
    return None if state < 0 else state != _TIME_ERROR


# -- disk --------------------------------------------------------------------------------------------------------------


def see_disk(folder: Path, used_bytes: int) -> DiskSeen:
    """Free space, and how fast a small file is forced to the disk. Blocking."""
    there = folder
    while not there.exists() and there.parent != there:
        there = there.parent
    free_bytes = shutil.disk_usage(there).free
    probe = there / f".shoal-doctor-{os.getpid()}"
    rate, fault = None, ""
    try:
        descriptor = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            noise = os.urandom(DISK_PROBE_BYTES)  # some disks pack zeros away
            began_s = time.monotonic()
            file.write(noise)
            file.flush()
            os.fsync(file.fileno())
            rate = DISK_PROBE_BYTES / max(time.monotonic() - began_s, 1e-6)
    except OSError as error:
        fault = error.strerror or str(error)
    finally:
        probe.unlink(missing_ok=True)
    return DiskSeen(
        folder=str(there), free_bytes=free_bytes, write_bytes_per_s=rate, fault=fault, used_bytes=used_bytes
    )


def measure_folder(folder: Path) -> int:
    """The bytes of the model that lie in it already."""
    total = 0
    for name in ("snapshots", "trainer", "feedback"):
        for path in (folder / name).glob("*"):
            try:
                status = path.stat()
            except OSError:
                continue  # gone meanwhile
            if stat.S_ISREG(status.st_mode):
                total += status.st_size
    return total


# -- torch -------------------------------------------------------------------------------------------------------------


async def see_torch() -> TorchSeen | Unknown:
    """Asked of a child process: importing torch takes seconds, and a broken driver may hang it."""
    command = (sys.executable, "-P", "-m", "shoal.node.training.torch_check")
    try:
        process = await asyncio.create_subprocess_exec(*command, stdin=DEVNULL, stdout=PIPE, stderr=DEVNULL)
    except OSError as error:
        return Unknown(why=f"no child process could be started: {error.strerror}")
    told = await read_process(process, TORCH_TIMEOUT_S)
    if told is None:
        return Unknown(
            why=f"importing torch took more than {TORCH_TIMEOUT_S:.0f} s",
            next_step="run: time python -c 'import torch; torch.cuda.init()'   and mend what it says",
        )
    driver = _read_text(Path("/proc/driver/nvidia/version")).splitlines()
    return parse_torch(told, driver[0].strip() if driver else "")


def parse_torch(told: str, driver: str) -> TorchSeen | Unknown:
    """What the child has said."""
    try:
        found = json.loads(told)
        devices = tuple(
            DeviceSeen(name=str(one["name"]), total_bytes=int(one["total"]), free_bytes=int(one["free"]))
            for one in found["devices"]
        )
        version = re.search(r"\d+(?:\.\d+)+", driver)
        return TorchSeen(
            version=str(found["version"]),
            cuda_built=bool(found["cuda_built"]),
            devices=devices,
            cuda_fault=str(found["cuda_fault"]),
            fault=str(found["fault"]),
            driver=version.group() if version else driver,
        )
    except (ValueError, KeyError, TypeError):
        return Unknown(why="the child process that imports torch ended without an answer")


# -- versions ----------------------------------------------------------------------------------------------------------


def see_versions(agents: tuple[str, ...], refusing: tuple[str, ...]) -> VersionsSeen:
    """Of what is installed here; the rest is what peers have said."""
    wanted = [text for text in metadata.requires("shoal") or () if text.startswith("libp2p==")]
    return VersionsSeen(
        python=".".join(map(str, sys.version_info[:3])),
        shoal=metadata.version("shoal"),
        libp2p=metadata.version("libp2p"),
        libp2p_wanted=wanted[0].removeprefix("libp2p==").partition(";")[0].strip() if wanted else "",
        protocol=PROTOCOL_VERSION,
        agents=agents,
        refusing=refusing,
    )


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(COMMAND_BYTES_MAX).decode(errors="replace")
    except OSError:
        return ""
