"""The machine's own addresses and its default gateway, and who is told when they change.

The kernel says that something changed (netlink, on Linux); what it is now is read anew. Where there is no such notice,
and against a lost one, it is read every PERIOD_S as well. A machine that slept has changed, too: its router may have
forgotten everything meanwhile.

Invariants: subscribers are told of a difference, never of the same state twice, and not before the machine was quiet
for SETTLE_S (at most SETTLE_S_MAX after the first sign); what is read from the system is bounded.
"""

import asyncio
import contextlib
import errno
import ipaddress
import logging
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

PERIOD_S = 10.0
SETTLE_S = 0.5  # an address comes with its routes, one notice each
SETTLE_S_MAX = 5.0
SLEPT_S_MIN = 5.0  # most routers forget a quiet connection no earlier
ADDRESSES_MAX = 64
GATEWAYS_MAX = 8
ROUTES_BYTES_MAX = 64 * 1024  # default routes come first in this file
NOTICE_BYTES_MAX = 64 * 1024
NOTICES_READ_MAX = 256
ROUTES_FILE = Path("/proc/net/route")
IPV6_BYTES_MAX = 64 * 1024
IPV6_FILE = Path("/proc/net/if_inet6")

# From linux/rtnetlink.h: links, and addresses and routes of both families.
_NOTICE_GROUPS = 0x1 | 0x10 | 0x40 | 0x100 | 0x400
_ROUTE_IS_UP_BY_GATEWAY = 0x1 | 0x2  # from linux/route.h
_IS_STALE = 0x08 | 0x20 | 0x40  # from linux/if_addr.h: another machine has it; deprecated; not known yet to be free

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class InterfaceAddress:
    """One address of one interface; `prefix_bits` says which other addresses are on the same link."""

    interface: str
    ip: str
    prefix_bits: int


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Gateway:
    """Where packets to everybody else go; the route with the least metric counts."""

    metric: int
    interface: str
    ip: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Interfaces:
    """Everything as of one moment, sorted. No loopback and no link-local addresses, of interfaces that are up; none
    that nothing new is sent from any more, as a machine has some of after days of changing them for privacy."""

    addresses: tuple[InterfaceAddress, ...] = ()
    gateways: tuple[Gateway, ...] = ()  # IPv4 alone, the best first; empty where the system does not tell
    sleeps: int = 0  # how often the machine has slept since the watch began

    def hosts(self) -> tuple[str, ...]:
        """The addresses as text."""
        return tuple(dict.fromkeys(one.ip for one in self.addresses))

    def beside(self, gateway: Gateway) -> str | None:
        """This machine's address on the gateway's link."""
        for one in self.addresses:
            if one.interface == gateway.interface and ":" not in one.ip:
                network = ipaddress.ip_network(f"{one.ip}/{one.prefix_bits}", strict=False)
                if ipaddress.ip_address(gateway.ip) in network:
                    return one.ip
        return None


def read_interfaces() -> Interfaces:
    """As of now; a fraction of a millisecond."""
    up = {name for name, one in psutil.net_if_stats().items() if one.isup}
    stale = _read_stale()
    found = []
    for name, addresses in psutil.net_if_addrs().items():
        for one in addresses if name in up else ():
            read = _read_address(name, one.address, one.netmask)
            if read is not None and read.ip not in stale:
                found.append(read)
    return Interfaces(addresses=tuple(sorted(found)[:ADDRESSES_MAX]), gateways=_read_gateways())


def _read_address(interface: str, text: str, mask: str | None) -> InterfaceAddress | None:
    try:
        ip = ipaddress.ip_address(text.partition("%")[0])
        bits = bin(int(ipaddress.ip_address(mask))).count("1") if mask else ip.max_prefixlen
    except ValueError:
        return None  # a hardware address
    if ip.is_loopback or ip.is_link_local or ip.is_unspecified:
        return None
    return InterfaceAddress(interface=interface, ip=str(ip), prefix_bits=bits)


def _read_stale() -> frozenset[str]:
    try:
        with IPV6_FILE.open("rb") as file:
            text = file.read(IPV6_BYTES_MAX).decode("ascii", "replace")
    except OSError:
        return frozenset()  # no Linux, or no IPv6
    return parse_stale(text)


def parse_stale(text: str) -> frozenset[str]:
    """The IPv6 addresses in the text of /proc/net/if_inet6 that are deprecated or not usable. Deprecated ones count
    where there is another one: nothing leaves from them then, so no hole leads to them."""
    stale, fresh = set(), False
    for line in text.splitlines():
        cells = line.split()
        try:
            ip, flags = ipaddress.IPv6Address(int(cells[0], 16)), int(cells[4], 16)
        except (ValueError, IndexError):
            continue
        if flags & _IS_STALE:
            stale.add(str(ip))
        elif not ip.is_loopback and not ip.is_link_local:
            fresh = True
    return frozenset(stale) if fresh else frozenset()


def _read_gateways() -> tuple[Gateway, ...]:
    try:
        with ROUTES_FILE.open("rb") as file:
            text = file.read(ROUTES_BYTES_MAX).decode("ascii", "replace")
    except OSError:
        return ()  # no Linux
    return parse_gateways(text)


def parse_gateways(text: str) -> tuple[Gateway, ...]:
    """The default gateways in the text of /proc/net/route, the best first."""
    found = []
    for line in text.splitlines()[1:]:
        cells = line.split()
        if len(cells) < 8:
            continue
        try:
            target, gateway, flags, mask = (int(cells[index], 16) for index in (1, 2, 3, 7))
            metric = int(cells[6])
        except ValueError:
            continue
        if target == mask == 0 and gateway and flags & _ROUTE_IS_UP_BY_GATEWAY == _ROUTE_IS_UP_BY_GATEWAY:
            # The kernel prints the number as this machine stores it.
            ip = str(ipaddress.IPv4Address(socket.htonl(gateway)))
            found.append(Gateway(metric=metric, interface=cells[0], ip=ip))
    return tuple(sorted(found)[:GATEWAYS_MAX])


def has_address(host: str) -> bool:
    """Whether an IP address is one of this machine's, those of loopback and of the link included."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((host.partition("%")[0], 0))
        except OSError as error:
            return error.errno != errno.EADDRNOTAVAIL
    return True


def read_slept_s() -> float:
    """How long this machine has slept since it was started; 0 where the system does not tell."""
    if not hasattr(time, "CLOCK_BOOTTIME"):
        return 0.0
    return time.clock_gettime(time.CLOCK_BOOTTIME) - time.clock_gettime(time.CLOCK_MONOTONIC)


class InterfaceWatch:
    """Knows what the interfaces are, and tells its subscribers when that changes. All calls on the event loop."""

    def __init__(
        self, read: Callable[[], Interfaces] = read_interfaces, slept_s: Callable[[], float] = read_slept_s
    ) -> None:
        self._read = read
        self._slept_s = slept_s
        self._slept_known_s = slept_s()
        self._subscribers: list[Callable[[Interfaces], None]] = []
        self._noticed = asyncio.Event()
        self.now = read()

    def subscribe(self, changed: Callable[[Interfaces], None]) -> Callable[[], None]:
        """Call `changed` with the new state at every change; it returns at once. What is returned ends that."""
        self._subscribers.append(changed)
        return lambda: self._subscribers.remove(changed)

    def check(self) -> bool:
        """Look now; whether something has changed."""
        sleeps, slept_s = self.now.sleeps, self._slept_s()
        if slept_s - self._slept_known_s >= SLEPT_S_MIN:
            sleeps += 1
        self._slept_known_s = slept_s
        found = replace(self._read(), sleeps=sleeps)
        if found == self.now:
            return False
        old, self.now = self.now, found
        log.info("%s", describe_change(old, found))
        for one in list(self._subscribers):
            one(found)
        return True

    def notice(self) -> None:
        """Something may have changed: look as soon as it is quiet."""
        self._noticed.set()

    async def run(self) -> None:
        """Watch until cancelled."""
        with contextlib.closing(_Notices(self.notice)):
            while True:
                # Not wait_for: Python 3.11's swallows a cancellation that meets the event.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(PERIOD_S):
                        await self._noticed.wait()
                if self._noticed.is_set():
                    await self._settle()
                self.check()

    async def _settle(self) -> None:
        loop = asyncio.get_running_loop()
        until_s = loop.time() + SETTLE_S_MAX
        while self._noticed.is_set() and loop.time() < until_s:
            self._noticed.clear()
            await asyncio.sleep(SETTLE_S)
        self._noticed.clear()


def describe_change(old: Interfaces, new: Interfaces) -> str:
    """One sentence without its full stop, for people."""
    parts = []
    if new.sleeps > old.sleeps:
        parts.append("the machine has slept")
    gone = [one for one in old.hosts() if one not in new.hosts()]
    come = [one for one in new.hosts() if one not in old.hosts()]
    if gone:
        parts.append(f"gone: {', '.join(gone)}")
    if come:
        parts.append(f"new: {', '.join(come)}")
    if old.gateways != new.gateways:
        ways = ", ".join(f"{one.ip} ({one.interface})" for one in new.gateways)
        parts.append(f"default gateway: {ways or 'none'}")
    return f"addresses have changed: {'; '.join(parts) or 'other interfaces or networks'}"


class _Notices:
    """The kernel's notices of changed links, addresses and routes; none where the system has no netlink."""

    def __init__(self, notice: Callable[[], None]) -> None:
        self._notice = notice
        self._socket: socket.socket | None = None
        if not hasattr(socket, "AF_NETLINK"):
            return
        try:
            self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
            self._socket.setblocking(False)
            self._socket.bind((0, _NOTICE_GROUPS))
            asyncio.get_running_loop().add_reader(self._socket, self._drain)
        except OSError as error:  # a sandbox
            log.info("no notices of changed addresses (%s): they are read every %g s", error.strerror, PERIOD_S)
            self.close()

    def _drain(self) -> None:
        """What it says does not matter: everything is read anew."""
        assert self._socket is not None
        for _ in range(NOTICES_READ_MAX):
            try:
                self._socket.recv(NOTICE_BYTES_MAX)
            except BlockingIOError:
                break
            except OSError:  # some were lost
                continue
        self._notice()

    def close(self) -> None:
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket)
            self._socket.close()
            self._socket = None
