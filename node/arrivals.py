"""Connections that others open, by where they come from: which may stay, and which has to go for it.

A connection is half open until its peer has proven who it is. Whoever wants to keep others out opens many and proves
nothing, so places of half-open connections are few, and the oldest goes for the newest: an honest handshake takes a
fraction of a second, and is done before it is the oldest. The places of one address (IPv4 /32, IPv6 /56) are fewer than
all; processes of this machine may have as many proven connections as they like.

No clock and no sockets in here: time is an argument, in seconds; a connection is any value that can be looked up.

Invariants: at most `half_open_max` connections are half open, `half_open_per_group_max` of one address; at most
`proven_per_group_max` proven ones of one address stay; `per_s` come from one address in a second for long,
`total_per_s` in all; what is remembered is bounded by those and GROUPS_MAX.
"""

import ipaddress
from collections import Counter, OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

from shoal.node.allowances import Allowances

GROUPS_MAX = 4096
IPV6_GROUP_BITS = 56  # what a provider gives to one home

C = TypeVar("C", bound=Hashable)


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrivalLimits:
    """`burst` connections of one address at once, `per_s` for long; of all addresses together `total_burst` and
    `total_per_s`, for a handshake costs a millisecond and more of the processor that rounds need."""

    half_open_max: int = 64
    half_open_per_group_max: int = 16
    proven_per_group_max: int = 64
    burst: int = 128
    per_s: float = 16.0
    total_burst: int = 256
    total_per_s: float = 64.0


class Arrivals(Generic[C]):
    """The connections of one listening port. `arrive`, then `prove` or not, then `leave`."""

    def __init__(self, limits: ArrivalLimits) -> None:
        self.limits = limits
        self.turned_away = 0  # newcomers and half-open ones that had to go, since the start
        self._groups: dict[C, str] = {}
        self._half_open: dict[str, OrderedDict[C, None]] = {}
        self._proven: Counter[str] = Counter()
        self._is_proven: set[C] = set()
        self._total: Allowances[None] = Allowances(burst=limits.total_burst, per_s=limits.total_per_s)
        self._allowances: Allowances[str] = Allowances(burst=limits.burst, per_s=limits.per_s, keys_max=GROUPS_MAX)

    @property
    def half_open(self) -> int:
        """How many have not proven themselves yet."""
        return len(self._groups) - len(self._is_proven)

    def arrive(self, connection: C, host: str, now: float) -> C | None:
        """A connection from `host` is accepted. What has to be closed for it, perhaps itself; None where there is room.

        What is returned has left.
        """
        group = group_of(host)
        crowded = group and not _is_own(group) and self._proven[group] >= self.limits.proven_per_group_max
        if crowded or not self._allowances.take(group, now) or not self._total.take(None, now):
            self.turned_away += 1
            return connection
        waiting = self._half_open.setdefault(group, OrderedDict())
        gone: C | None = None
        if len(waiting) >= self.limits.half_open_per_group_max:
            gone = next(iter(waiting))
        elif self.half_open >= self.limits.half_open_max:
            most = max(self._half_open.values(), key=len)
            gone = next(iter(most))
        if gone is not None:
            self.turned_away += 1
            self.leave(gone)
        # Anew, because the last one of a group takes the group along.
        self._half_open.setdefault(group, OrderedDict())[connection] = None
        self._groups[connection] = group
        return gone

    def prove(self, connection: C) -> None:
        """Its peer has proven who it is. One that is not known here is nobody's."""
        group = self._groups.get(connection)
        if group is None or connection in self._is_proven:
            return
        self._drop_half_open(connection, group)
        self._is_proven.add(connection)
        self._proven[group] += 1

    def leave(self, connection: C) -> None:
        """It is closed."""
        group = self._groups.pop(connection, None)
        if group is None:
            return
        if connection not in self._is_proven:
            self._drop_half_open(connection, group)
            return
        self._is_proven.discard(connection)
        self._proven[group] -= 1
        if not self._proven[group]:
            del self._proven[group]

    def _drop_half_open(self, connection: C, group: str) -> None:
        waiting = self._half_open[group]
        del waiting[connection]
        if not waiting:
            del self._half_open[group]


def group_of(host: str) -> str:
    """What counts as one address; empty where the host is unknown, as behind a relay."""
    try:
        ip = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return ""
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            return str(ip.ipv4_mapped)
        if not ip.is_loopback:
            return str(ipaddress.ip_network((int(ip), IPV6_GROUP_BITS), strict=False))
    return str(ip)


def _is_own(group: str) -> bool:
    return "/" not in group and ipaddress.ip_address(group).is_loopback
