"""What each kind of router does with addresses and ports, as rules for nftables (RFC 4787 and 5382 have the terms).

| kind | mapping | filtering | as in |
|---|---|---|---|
| `NONE` | none: the host has a public address | none | a server |
| `FULL_CONE` | endpoint-independent | endpoint-independent | a good home router |
| `PORT_RESTRICTED` | endpoint-independent | address- and port-dependent | most home routers |
| `SYMMETRIC` | address- and port-dependent | address- and port-dependent | carriers, companies |

The mapping of the two cones keeps the port (Linux' masquerade does, as long as no two hosts use the same one towards
the same destination). The full cone remembers for each outside port who uses it, from the outgoing packets, and lets
everybody in there; a port that nobody inside has used is closed, as with the others.

IPv6 has no NAT. A home router's firewall lets in what answers to packets from inside (RFC 6092), which is address- and
port-dependent filtering of addresses that everybody sees as they are.
"""

from dataclasses import dataclass
from enum import Enum

TABLE = "natlab"
TABLE6 = "natlab6"
MAPPING_S = 300
PORTS_MAX = 65535


class Nat(Enum):
    """The kinds of iroh's test matrix."""

    NONE = "none"
    FULL_CONE = "full_cone"
    PORT_RESTRICTED = "port_restricted"
    SYMMETRIC = "symmetric"


class Firewall(Enum):
    """What a router does with IPv6."""

    OPEN = "open"
    STATEFUL = "stateful"
    BLACK_HOLE = "black_hole"  # nothing passes and nobody says so, though there are addresses and routes


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """How a router treats what passes. `rejects`: unasked packets are answered (RST, ICMP) instead of dropped."""

    nat: Nat
    firewall: Firewall = Firewall.STATEFUL
    rejects: bool = False
    blocks_udp: bool = False


def write_rules(policy: Policy, outside: str) -> str:
    """The whole table, which takes the place of the one before; connections that are tracked stay so."""
    masquerade = "masquerade fully-random" if policy.nat is Nat.SYMMETRIC else "masquerade"
    refusal = "reject with icmp port-unreachable" if policy.rejects else "drop"
    refusals = [f'meta l4proto tcp iifname "{outside}" reject with tcp reset'] if policy.rejects else []
    refusals.append(f'iifname "{outside}" {refusal}')
    lines = [f"table ip {TABLE}", f"delete table ip {TABLE}", f"table ip {TABLE} {{"]
    if policy.nat is Nat.FULL_CONE:
        lines += [line for kind in ("tcp", "udp") for line in _write_map(kind)]
        lines += _write_chain("incoming", "nat hook prerouting priority dstnat", _let_in(outside))
        lines += _write_chain("remember", "filter hook postrouting priority 300", _remember(outside))
    lines += _write_chain("outgoing", "nat hook postrouting priority srcnat", [f'oifname "{outside}" {masquerade}'])
    known = "ct state established,related accept"
    # What belongs to no connection that it knows would leave with an address of the inside.
    blocked = ["ct state invalid drop", *(["meta l4proto udp drop"] if policy.blocks_udp else [])]
    lines += _write_chain(
        "forward", "filter hook forward priority filter", [*blocked, known, "ct status dnat accept", *refusals]
    )
    lines += _write_chain(
        "own", "filter hook input priority filter", [known, "icmp type echo-request accept", *refusals]
    )
    return "\n".join([*lines, "}", *_write_rules6(policy, outside)]) + "\n"


def _write_rules6(policy: Policy, outside: str) -> list[str]:
    refusal = "reject with icmpv6 admin-prohibited" if policy.rejects else "drop"
    unasked = [f'meta l4proto tcp iifname "{outside}" reject with tcp reset'] if policy.rejects else []
    unasked.append(f'iifname "{outside}" {refusal}')
    rules = {
        Firewall.OPEN: [],
        Firewall.STATEFUL: ["ct state invalid drop", "ct state established,related accept", *unasked],
        Firewall.BLACK_HOLE: ["drop"],
    }[policy.firewall]
    blocked = ["meta l4proto udp drop"] if policy.blocks_udp else []
    chain = _write_chain("forward", "filter hook forward priority filter", [*blocked, *rules])
    return [f"table ip6 {TABLE6}", f"delete table ip6 {TABLE6}", f"table ip6 {TABLE6} {{", *chain, "}"]


def _write_chain(name: str, hook: str, rules: list[str]) -> list[str]:
    return [f"chain {name} {{", f"type {hook}; policy accept;", *rules, "}"]


def _write_map(kind: str) -> list[str]:
    flags = f"flags dynamic,timeout; timeout {MAPPING_S}s; size {PORTS_MAX};"
    return [f"map {kind}_users {{ type inet_service : ipv4_addr . inet_service; {flags} }}"]


def _let_in(outside: str) -> list[str]:
    return [
        f'iifname "{outside}" fib daddr type local dnat ip to {kind} dport map @{kind}_users' for kind in ("tcp", "udp")
    ]


def _remember(outside: str) -> list[str]:
    """After the masquerade: the packet has its outside port, the tracked connection still knows the inside one."""
    inside = "ct original ip saddr . ct original proto-src"
    return [
        f'oifname "{outside}" ct direction original meta l4proto {kind} '
        f"update @{kind}_users {{ {kind} sport timeout {MAPPING_S}s : {inside} }}"
        for kind in ("tcp", "udp")
    ]
