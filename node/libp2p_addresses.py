"""Where this node listens, and which addresses it announces for that.

Announced are, in this order: what the configuration says; what others have dialled; the machine's own addresses that
everybody may dial; circuits through relays; the machine's other addresses. What others merely saw is not: it is a
candidate, to be dialled first.

Invariants: no wildcard, loopback only for want of anything else, one port for both families where there is one; at most
ADDRESSES_PER_PEER_MAX addresses, and no kind crowds out the kinds after it entirely.
"""

import errno
import socket
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import trio
from multiaddr import Multiaddr

from shoal.dht.addresses import ADDRESSES_PER_PEER_MAX, Address, parse_address
from shoal.node.control import ControlConfig
from shoal.node.interfaces import read_interfaces
from shoal.node.libp2p_stack import LISTEN_BACKLOG
from shoal.node.link_listen import open_exclusive
from shoal.protocol.errors import ConfigError

CONFIRMED_MAX = 2
INTERFACES_MAX = 4
CIRCUITS_MAX = 4

_NO_IPV6 = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)


class OwnAddresses:
    """What one node announces and what it would like to know of."""

    def __init__(self, config: ControlConfig, hosts: Callable[[], Sequence[str]] | None = None) -> None:
        self._given = tuple(replace(parse_address(text), peer=None) for text in config.announce)
        self._hosts = hosts or (lambda: read_interfaces().hosts())
        self._own: tuple[Address, ...] = ()
        self.bound: tuple[Address, ...] = ()
        self.offered: tuple[Address, ...] = ()

    def read(self, bound: Iterable[Multiaddr]) -> bool:
        """Take stock of what the sockets are bound to and which addresses the machine has; whether they changed."""
        before = self._own
        listening = tuple(parse_address(str(address)) for address in bound)
        hosts = self._hosts()
        self.bound = listening
        self._own = tuple(dict.fromkeys(form for address in listening for form in _dialable_forms(address, hosts)))
        return self._own != before

    @property
    def lacks(self) -> str | None:
        """The family that this machine has no address of, where it has one of the other: who has that family alone can
        neither dial it nor be dialled by it. A private IPv4 address leads to others outside, a private IPv6 one not."""
        families = {address.net for address in self._own if address.net == "ip4" or address.is_global}
        if len(families) != 1:
            return None
        return "ip4" if "ip6" in families else "ip6"

    def is_bridge(self, relay: Iterable[str]) -> bool:
        """Whether a relay with these addresses leads here from the family that this machine lacks."""
        return any(one.net == self.lacks and one.is_global and not one.is_relayed for one in map(parse_address, relay))

    def announced(self, confirmed: Sequence[Address], circuits: Sequence[Address]) -> list[Address]:
        """What to tell others."""
        circuits = [replace(address, peer=None) for address in circuits][:CIRCUITS_MAX]
        if self._given:
            return list(dict.fromkeys([*self._given, *circuits]))[:ADDRESSES_PER_PEER_MAX]
        everybody = [address for address in self._own if address.is_global][:INTERFACES_MAX]
        others = [address for address in self._own if not address.is_global][:INTERFACES_MAX]
        dialled = [replace(address, peer=None) for address in confirmed[:CONFIRMED_MAX]]
        ordered = dict.fromkeys([*dialled, *everybody, *circuits, *others])
        return list(ordered)[:ADDRESSES_PER_PEER_MAX]

    def candidates(self, seen_hosts: Sequence[str]) -> list[Address]:
        """What others should try to dial: all of that without relays, and this node's ports where others see it."""
        seen: list[Address] = []
        for host in seen_hosts:
            net = "ip6" if ":" in host else "ip4"
            ports = [address.port for address in (*self._given, *self.bound) if _family(address) in (net, "dns")]
            seen.extend(Address(net=net, host=host, port=port) for port in ports)
        return list(dict.fromkeys([*self._given, *self.offered, *seen, *self._own]))


def _family(address: Address) -> str:
    return {"dns4": "ip4", "dns6": "ip6"}.get(address.net, address.net)


def _dialable_forms(bound: Address, hosts: Sequence[str]) -> list[Address]:
    """The address itself, or what a wildcard stands for."""
    if not bound.is_wildcard:
        return [bound]
    same = [host for host in hosts if (":" in host) == (bound.net == "ip6")]
    loopback = "::1" if bound.net == "ip6" else "127.0.0.1"
    return [replace(bound, host=host) for host in same or ([] if hosts else [loopback])]


async def open_listeners(config: ControlConfig) -> list[Sequence[trio.SocketListener]]:
    """The sockets of `config.listen`, bound and listening; raises ConfigError naming the address that is taken.

    Any free port is the same one for every address. A machine without IPv6 does without.
    """
    opened: list[Sequence[trio.SocketListener]] = []
    chosen = 0
    for text in config.listen:
        address = parse_address(text)
        port = address.port or chosen
        try:
            opened.append([_listen(address.host, port)])
            chosen = opened[0][0].socket.getsockname()[1]
        except OSError as error:
            if address.host == "::" and (error.errno in _NO_IPV6 or not address.port):
                continue
            for sockets in opened:
                for listener in sockets:
                    await listener.aclose()
            raise _listen_error(config.listen_field, address, error) from error
    if not opened:
        raise ConfigError(config.listen_field, "no address to listen on", "give one, such as /ip4/0.0.0.0/tcp/4001")
    return opened


def _listen(host: str, port: int) -> trio.SocketListener:
    opened = open_exclusive(socket.AF_INET6 if ":" in host else socket.AF_INET, host, port)
    opened.listen(LISTEN_BACKLOG)
    return trio.SocketListener(trio.socket.from_stdlib_socket(opened))


def _listen_error(config_field: str, address: Address, error: OSError) -> ConfigError:
    if error.errno == errno.EADDRINUSE:
        problem = f"port {address.port} of {address.host} is in use by another program"
        return ConfigError(config_field, problem, "choose another port, or 0 for any that is free")
    problem = f"cannot listen on port {address.port} of {address.host}: {error.strerror or error}"
    return ConfigError(config_field, problem, "choose an address of this machine and a port above 1023")
