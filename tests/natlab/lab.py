"""The lab: a public network, routers of each kind, networks behind them, and hosts that can be moved.

    with Lab() as lab:
        relay = lab.add_host("relay")
        home = lab.add_router("home", Nat.PORT_RESTRICTED)
        peer = home.add_host("peer")
        peer.exec("ping", "-c", "1", relay.address)

The public network is 45.0.0.0/16: addresses that a program takes for public. No packet leaves the namespaces, which
have no link to the machine's own network. Networks behind routers are 192.168.N.0/24, behind a carrier's 100.64.N.0/24.

IPv6 is there for who asks for it (`families=BOTH` or `IPV6`), without NAT: 3ffe:45::/64 is the public network and
3ffe:45:0:N::/64 the one behind the Nth router, whose firewall is stateful. The prefix was the 6bone's and is nobody's
now (RFC 3701); programs know those for documentation, and take them for private.
"""

import json
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import IO, Self, TypeVar

from tests.natlab.namespace import LabError, Namespace, remove_stale
from tests.natlab.rules import Firewall, Nat, Policy, write_rules
from tests.natlab.wire import Impairment, Wire

PUBLIC = "45.0"
PUBLIC6 = "3ffe:45"
IPV4, IPV6, BOTH = frozenset({4}), frozenset({6}), frozenset({4, 6})
OUTSIDE = "wan"
INSIDE = "lan"
LINK = "eth0"
LINK_UP_S = 10.0
POLL_S = 0.02

Families = frozenset[int]
Result = TypeVar("Result")


class Network:
    """One broadcast domain: a bridge in a namespace. It gives out addresses and never gives one out twice."""

    def __init__(self, space: Namespace, bridge: str, base: str, mask: int, base6: str) -> None:
        self.space = space
        self.bridge = bridge
        self.base = base
        self.mask = mask
        self.gateway = f"{base}.0.1" if mask == 16 else f"{base}.1"
        self.base6 = base6
        self.gateway6 = f"{base6}::1"
        self._given = 1
        self._ports = 0
        # Without a querier, snooping would forget groups after some minutes, and with them mDNS.
        space.ip("link", "add", bridge, "type", "bridge", "mcast_snooping", "0", "forward_delay", "0")
        space.ip("address", "add", f"{self.gateway}/{mask}", "dev", bridge)
        space.ip("address", "add", f"{self.gateway6}/64", "dev", bridge, "nodad")
        space.ip("link", "set", bridge, "up")
        space.set(ipv4__ip_forward=1, ipv6__conf__all__forwarding=1)

    def next_address(self) -> str:
        self._given += 1
        high, low = divmod(self._given, 250)
        return f"{self.base}.{high}.{low}" if self.mask == 16 else f"{self.base}.{self._given}"

    def next_address6(self) -> str:
        self._given += 1
        return f"{self.base6}::{self._given:x}"

    def next_port(self) -> str:
        self._ports += 1
        return f"{self.bridge}{self._ports}"

    def attach(self, space: Namespace, link: str, impairment: Impairment | None = None) -> Wire | None:
        """A cable from the namespace to this network; one with an impairment runs through this program."""
        port = self.next_port()
        wire = None
        if impairment is None:
            space.ip("link", "add", link, "type", "veth", "peer", "name", port, "netns", self.space.name)
        else:
            wire = Wire(space, link, self.space, port, impairment)
        self.space.ip("link", "set", port, "master", self.bridge, "up")
        return wire

    def await_ports(self) -> None:
        """Until the bridge forwards at every port: the kernel tells it of a new link up to a second later."""
        end_s = time.monotonic() + LINK_UP_S
        while any(state != "forwarding" for state in self._list_states()):
            if time.monotonic() > end_s:
                raise LabError(f"{self.bridge} of {self.space.name} does not forward")
            time.sleep(POLL_S)

    def _list_states(self) -> list[str]:
        found = json.loads(self.space.ip("-details", "-json", "link", "show", "master", self.bridge))
        return [one["linkinfo"]["info_slave_data"]["state"] for one in found if "UP" in one["flags"]]


class Node:
    """A namespace with one link upwards: what hosts and routers have in common."""

    def __init__(
        self, name: str, network: Network, link: str, families: Families, impairment: Impairment | None
    ) -> None:
        self.name = name
        self.space = Namespace(name)
        self.network = network
        self.link = link
        self.families = families
        self.address = ""
        self.address6 = ""
        self.processes: list[subprocess.Popen[bytes]] = []
        self.wire: Wire | None = None  # of a cable with an impairment
        self.plug(network, impairment)

    def plug(
        self, network: Network, impairment: Impairment | None = None, address: str = "", address6: str = ""
    ) -> None:
        """Into this network, with new addresses of it (or these). What it was plugged into before is unplugged."""
        if self.address or self.address6:
            self.unplug()
        self.network = network
        self.wire = network.attach(self.space, self.link, impairment)
        if 4 in self.families:
            self.address = address or network.next_address()
            self.space.ip("address", "add", f"{self.address}/{network.mask}", "dev", self.link)
        if 6 in self.families:
            self.address6 = address6 or network.next_address6()
            self.space.ip("address", "add", f"{self.address6}/64", "dev", self.link)
        self.space.ip("link", "set", self.link, "up")
        if 4 in self.families:
            self.space.ip("route", "add", "default", "via", network.gateway)
        if 6 in self.families:
            self.space.ip("-6", "route", "add", "default", "via", network.gateway6)
        network.await_ports()

    def unplug(self) -> None:
        """The cable is gone, and the address with it: connections hear nothing of it."""
        if self.wire is None:
            self.space.ip("link", "delete", self.link)
        else:
            self.wire.close()
        self.wire, self.address, self.address6 = None, "", ""

    def exec(self, *command: str) -> str:
        """What a command prints that is run here."""
        return self.space.exec(*command)

    def popen(self, *command: str, stdout: int | IO[bytes] = subprocess.DEVNULL) -> subprocess.Popen[bytes]:
        """A process that runs here until the lab ends."""
        command = (*self.space.prefix, *command)
        self.processes.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stdout))
        return self.processes[-1]

    def call(self, function: Callable[[], Result]) -> Result:
        """What the function returns, called here: its sockets stay here."""
        return self.space.call(function)

    def close(self) -> None:
        if self.wire is not None:
            self.wire.close()
        self.space.remove()
        for process in self.processes:
            process.wait()


class Host(Node):
    """A computer on the public network or behind a router."""

    def move(self, network: "Network | Router", impairment: Impairment | None = None) -> None:
        """From one network to another, as a laptop does: it has another address afterwards."""
        self.plug(network.lan if isinstance(network, Router) else network, impairment)

    def begin_address6(self) -> str:
        """A new IPv6 address beside the old one, which nothing new is sent from: what a machine does every day for
        privacy (RFC 8981). The old one."""
        old, self.address6 = self.address6, self.network.next_address6()
        self.space.ip("address", "add", f"{self.address6}/64", "dev", self.link)
        self.space.ip("address", "change", f"{old}/64", "dev", self.link, "preferred_lft", "0", "valid_lft", "3600")
        return old

    def end_address6(self, address: str) -> None:
        """Its time is over."""
        self.space.ip("address", "delete", f"{address}/64", "dev", self.link)


class Router(Node):
    """A router with one network behind it. Where the kind is NONE it is not needed: put the host on the network."""

    def __init__(
        self,
        name: str,
        network: Network,
        policy: Policy,
        base: str,
        lab: "Lab",
        families: Families,
        impairment: Impairment | None,
    ) -> None:
        super().__init__(name, network, OUTSIDE, families, impairment)
        self.policy = policy
        self._lab = lab
        self.lan = Network(self.space, INSIDE, base, 24, lab.choose_base6())
        self._lead_in()
        # Linux would take up connections that it has forgotten in the middle; not all routers do.
        self.space.set(netfilter__nf_conntrack_tcp_loose=0)
        self._apply()

    def _apply(self) -> None:
        self.space.exec("nft", "-f", "-", text=write_rules(self.policy, OUTSIDE))

    def _lead_in(self) -> None:
        """What is sent to the network behind it by IPv6 comes here."""
        if 6 in self.families:
            self.network.space.ip("-6", "route", "replace", f"{self.lan.base6}::/64", "via", self.address6)

    def add_host(self, name: str, impairment: Impairment | None = None, families: Families | None = None) -> Host:
        """With all families that the router has, or these."""
        return self._lab.keep(Host(name, self.lan, LINK, families or self.families, impairment))

    def add_router(self, name: str, nat: Nat, rejects: bool = False, impairment: Impairment | None = None) -> "Router":
        """A router behind this one: double NAT. IPv4 alone."""
        policy = Policy(nat=nat, rejects=rejects)
        return self._lab.make_router(name, self.lan, policy, self._lab.choose_base(), IPV4, impairment)

    def change(
        self,
        *,
        nat: Nat | None = None,
        firewall: Firewall | None = None,
        rejects: bool | None = None,
        blocks_udp: bool | None = None,
    ) -> None:
        """Another policy from now on; connections that it knows go on, other than those that are blocked."""
        before = self.policy
        self.policy = Policy(
            nat=before.nat if nat is None else nat,
            firewall=before.firewall if firewall is None else firewall,
            rejects=before.rejects if rejects is None else rejects,
            blocks_udp=before.blocks_udp if blocks_udp is None else blocks_udp,
        )
        self._apply()

    def stop(self) -> None:
        """Its power is off: nothing passes."""
        self.space.ip("link", "set", OUTSIDE, "down")

    def start(self, new_address: bool = True) -> None:
        """It has forgotten every connection and mapping, and often gets another address from outside."""
        self.forget()
        kept = ("", "") if new_address else (self.address, self.address6)
        self.plug(self.network, address=kept[0], address6=kept[1])
        self._lead_in()

    def reboot(self, new_address: bool = True) -> None:
        self.stop()
        self.start(new_address)

    def forget(self) -> None:
        """Every mapping and connection."""
        self.space.call(_flush_tracked)
        self._apply()


class Lab:
    """Everything that was made; its end leaves no namespace and no process in one."""

    def __init__(self) -> None:
        remove_stale()
        self._nodes: list[Node] = []
        self._networks = 0
        self._networks6 = 0
        self._internet = Namespace("internet")
        self.internet = Network(self._internet, "net", PUBLIC, 16, PUBLIC6)
        # Nobody answers for what is not there: a dial to a private address elsewhere waits, as it does outside.
        self._internet.ip("route", "add", "blackhole", "default")
        self._internet.ip("-6", "route", "add", "blackhole", "default")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def choose_base(self, carrier: bool = False) -> str:
        """The first three numbers of a network that no other one has."""
        self._networks += 1
        return f"{'100.64' if carrier else '192.168'}.{self._networks}"

    def choose_base6(self) -> str:
        """The prefix of a network that no other one has."""
        self._networks6 += 1
        return f"{PUBLIC6}:0:{self._networks6:x}"

    def keep(self, node: Host) -> Host:
        self._nodes.append(node)
        return node

    def add_host(self, name: str, impairment: Impairment | None = None, families: Families = IPV4) -> Host:
        """On the public network."""
        return self.keep(Host(name, self.internet, LINK, families, impairment))

    def add_router(
        self,
        name: str,
        nat: Nat,
        *,
        rejects: bool = False,
        carrier: bool = False,
        base: str = "",
        families: Families = IPV4,
        firewall: Firewall = Firewall.STATEFUL,
        impairment: Impairment | None = None,
    ) -> Router:
        """On the public network. Many homes have the same `base`, such as 192.168.1: it may be given here. `nat` is
        for IPv4, `firewall` for IPv6."""
        base = base or self.choose_base(carrier)
        policy = Policy(nat=nat, firewall=firewall, rejects=rejects)
        return self.make_router(name, self.internet, policy, base, families, impairment)

    def add_peer(self, name: str, nat: Nat) -> Host:
        """A host behind a router of its own of this kind; on the public network if the kind is none."""
        return self.add_host(name) if nat is Nat.NONE else self.add_router(f"{name}-router", nat).add_host(name)

    def make_router(
        self,
        name: str,
        network: Network,
        policy: Policy,
        base: str,
        families: Families,
        impairment: Impairment | None,
    ) -> Router:
        router = Router(name, network, policy, base, self, families, impairment)
        self._nodes.append(router)
        return router

    @property
    def nodes(self) -> Sequence[Node]:
        return self._nodes

    def close(self) -> None:
        for node in reversed(self._nodes):
            node.close()
        self._nodes.clear()
        self._internet.remove()


# struct nfgenmsg and nlmsghdr of linux/netlink.h: "delete, of every family, without naming one" empties the table.
NETLINK_NETFILTER = 12
CONNTRACK_DELETE = (1 << 8) | 2
REQUEST_AND_ACK = 0x1 | 0x4


def _flush_tracked() -> None:
    """Forget all tracked connections of the namespace, as `conntrack -F` does (no more to install)."""
    body = struct.pack("=BBH", socket.AF_UNSPEC, 0, 0)
    request = struct.pack("=IHHII", 16 + len(body), CONNTRACK_DELETE, REQUEST_AND_ACK, 1, 0) + body
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER) as link:
        link.settimeout(5.0)
        link.send(request)
        answer = link.recv(4096)
    (code,) = struct.unpack_from("=i", answer, 16)
    if code:
        raise OSError(-code, "conntrack flush")
