"""Mapped ports as values: which router maps which port, why not, and when to ask again.

Owns the vocabulary and the rules of port mapping; no sockets, no time of its own. Invariant: an address that stands in
`PortMappings.mapped` is one that the internet routes; whether it is reached from there, others must confirm.
"""

import ipaddress
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from shoal.dht.addresses import Address
from shoal.protocol.errors import Failure, ShoalError

LEASE_S = 3600  # a mapping of a peer that was killed stays for so long
LEASE_S_MIN = 60
RENEW_AT = 0.5  # of the lease: the RFC's share, so that one lost hour of the router's does not matter
CHECK_PERIOD_S = 60.0  # a router that was started anew is noticed after so long
RETRY_S_MIN = 60.0
RETRY_S_MAX = 1800.0
# Many routers hide a private address of theirs, so two NATs in a row look like no connection.
NO_ADDRESS = "it has no public address now: no connection, or another NAT behind it"
OTHER_PORTS_TRIED_MAX = 4
OTHER_PORTS = range(20_000, 60_000)


class Listener(StrEnum):
    """What listens at a port."""

    CONTROL = "control"
    TENSOR = "tensor"


class Way(StrEnum):
    """How a router is asked."""

    NAT_PMP = "nat_pmp"
    UPNP = "upnp"


class MappingFailure(StrEnum):
    """Those failures for which a router maps nothing."""

    NO_GATEWAY = Failure.NO_GATEWAY.value
    GATEWAY_SILENT = Failure.GATEWAY_SILENT.value
    GATEWAY_REFUSED = Failure.GATEWAY_REFUSED.value
    GATEWAY_MALFORMED = Failure.GATEWAY_MALFORMED.value
    PORT_TAKEN = Failure.PORT_TAKEN.value
    DOUBLE_NAT = Failure.DOUBLE_NAT.value


class MappingState(StrEnum):
    OFF = "off"  # switched off, or no listener that others could reach by it
    TRYING = "trying"
    NOT_NEEDED = "not_needed"  # this machine's own address is a public one
    MAPPED = "mapped"
    FAILED = "failed"


class GatewayFailed(ShoalError):
    """A router was asked and does not do it; an expected event."""

    def __init__(self, failure: Failure, detail: str) -> None:
        super().__init__(f"{failure}: {detail}")
        self.failure = failure
        self.detail = detail


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """What the router granted; 0 s: until it is removed."""

    external_port: int
    lease_s: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MappedPort:
    """The router's `external_ip` and `external_port` lead to `internal_port` of this machine."""

    listener: Listener
    internal_port: int
    external_ip: str
    external_port: int
    lease_s: int

    @property
    def address(self) -> Address:
        """Where others may dial, as a multiaddr."""
        return Address(net="ip4", host=self.external_ip, port=self.external_port)


@dataclass(frozen=True, slots=True, kw_only=True)
class WayTried:
    """How one way went, the last time; `failure` is None where it served."""

    way: Way
    failure: Failure | None
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PortMappings:
    """Everything as of one moment. `gateway` is the address of the router that maps, or was asked last."""

    state: MappingState
    gateway: str = ""
    way: Way | None = None
    mapped: tuple[MappedPort, ...] = ()
    tried: tuple[WayTried, ...] = ()

    def addresses(self, listener: Listener) -> tuple[Address, ...]:
        """Candidates: where others may reach this listener, once somebody has confirmed it."""
        return tuple(one.address for one in self.mapped if one.listener is listener)

    @property
    def failure(self) -> Failure | None:
        """The reason that tells most, where no way served."""
        if self.state is not MappingState.FAILED:
            return None
        failures = [one.failure for one in self.tried if one.failure is not None]
        return min(failures, key=_TELLING.index) if failures else None

    def describe(self) -> str:
        """One sentence without its full stop, for people."""
        if self.state is MappingState.MAPPED:
            ports = ", ".join(
                f"{one.external_ip}:{one.external_port} leads to the {one.listener} port {one.internal_port}"
                for one in self.mapped
            )
            return f"the router {self.gateway} maps by {self.way}: {ports}"
        if self.state is MappingState.FAILED:
            return "; ".join(f"{one.way}: {one.failure}: {one.detail}" for one in self.tried if one.failure)
        return _STATES[self.state]


_STATES = {
    MappingState.OFF: "ports are not mapped",
    MappingState.TRYING: "the router is asked to map ports",
    MappingState.NOT_NEEDED: "the own address is a public one, so no port needs to be mapped",
}
# What one way finds out may be more than what another does: who hears that there are two routers needs no more.
_TELLING = (
    Failure.DOUBLE_NAT,
    Failure.PORT_TAKEN,
    Failure.GATEWAY_REFUSED,
    Failure.GATEWAY_MALFORMED,
    Failure.GATEWAY_SILENT,
    Failure.NO_GATEWAY,
)


class Gateway(Protocol):
    """A router that can be asked. Every call raises GatewayFailed, within the limit of its way."""

    way: Way
    host: str

    async def external_ip(self) -> str:
        """The router's address on the other side, as text that may be anything."""

    async def add(self, internal_port: int, external_port: int) -> Lease:
        """Map a TCP port for LEASE_S, to `external_port` or another; a mapping that stands is renewed."""

    async def holds(self, internal_port: int, external_port: int) -> bool:
        """Whether it still knows of this mapping, as far as it tells."""

    async def remove(self, internal_port: int, external_port: int) -> None:
        """Forget the mapping."""

    async def close(self) -> None:
        """Nothing is asked any more."""


def check_external(text: str) -> str:
    """The router's external address, where others can reach that; raises GatewayFailed."""
    try:
        ip = ipaddress.IPv4Address(text)
    except ValueError as error:
        raise GatewayFailed(Failure.GATEWAY_MALFORMED, f"its address is said to be {text[:64]!r}") from error
    if ip.is_unspecified:
        raise GatewayFailed(Failure.GATEWAY_REFUSED, NO_ADDRESS)
    if not ip.is_global:
        # RFC 1918, or 100.64.0.0/10 of a provider that shares one address among its customers.
        raise GatewayFailed(Failure.DOUBLE_NAT, f"its own address {ip} is private: there is a NAT behind it")
    return str(ip)


def list_ports(wanted: int, choose: Callable[[range], int]) -> tuple[int, ...]:
    """The external ports to try, one after the other: the wanted one, then any."""
    return (wanted, *(choose(OTHER_PORTS) for _ in range(OTHER_PORTS_TRIED_MAX)))


def renew_after_s(lease_s: int) -> float:
    """How long after it was granted a lease is renewed."""
    return RENEW_AT * max(LEASE_S_MIN, lease_s or LEASE_S)


def retry_after_s(failures: int) -> float:
    """How long after the so-manieth failure in a row all ways are tried again."""
    return min(RETRY_S_MAX, RETRY_S_MIN * 2.0 ** min(max(0, failures - 1), 16))
