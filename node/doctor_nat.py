"""What `shoal doctor` says of the routers on the way: mapping and filtering behaviour, port mapping, relays.

The terms are those of RFC 5780. Pure functions like those of `node/doctor_findings.py`, under the same invariant.
"""

from dataclasses import dataclass
from enum import StrEnum

from shoal.node.doctor_findings import Check, Finding, Unknown, not_checked, ok, warning
from shoal.node.endpoints import is_public, parse_endpoint_untrusted
from shoal.node.port_mapping import MappingState
from shoal.node.reachability import NatMapping, ReachReason, ReachState
from shoal.node.status import ReachStatus, RouterStatus, Status, clean_text

OBSERVERS_MIN = 2
SWITCH_ON = "switch on UPnP or NAT-PMP in the router, or forward the two ports there"
START = "start the peer (shoal up), wait a minute, and run `shoal doctor` again"


class NatFiltering(StrEnum):
    """Whose packets the router lets in to a port that it has mapped."""

    UNKNOWN = "unknown"
    ENDPOINT_INDEPENDENT = "endpoint-independent"
    ENDPOINT_DEPENDENT = "address-dependent or address-and-port-dependent"


@dataclass(frozen=True, slots=True, kw_only=True)
class NatSeen:
    """`observers` members have told by which address they see one port of this machine; `observed` are those. `ipv6`:
    it has a public IPv6 address, too, which no router rewrites."""

    mapping: NatMapping
    filtering: NatFiltering = NatFiltering.UNKNOWN
    observers: int = OBSERVERS_MIN
    observed: tuple[str, ...] = ()
    ipv6: bool = False


_MAPPINGS = {
    NatMapping.ENDPOINT_INDEPENDENT: "endpoint-independent",
    NatMapping.ENDPOINT_DEPENDENT: "address-dependent or address-and-port-dependent",
}


def see_nat(reach: ReachStatus, router: RouterStatus) -> NatSeen:
    """What the running daemon knows. Who is dialled at an observed address that no router was asked to map has a router
    that lets in anybody."""
    filtering = NatFiltering.UNKNOWN
    for row in reach.addresses:
        endpoint = parse_endpoint_untrusted(row.address)
        # IPv6 passes a firewall, and no NAT that could be told by that.
        if endpoint is None or ":" in endpoint[0] or not is_public(endpoint[0]) or row.address in router.addresses:
            continue
        if row.state is ReachState.REACHABLE:
            filtering = NatFiltering.ENDPOINT_INDEPENDENT
        elif row.reason is ReachReason.DIAL_BACK_FAILED and filtering is NatFiltering.UNKNOWN:
            filtering = NatFiltering.ENDPOINT_DEPENDENT
    endpoints = (parse_endpoint_untrusted(row.address) for row in reach.addresses)
    ipv6 = any(one is not None and ":" in one[0] and is_public(one[0]) for one in endpoints)
    return NatSeen(mapping=reach.mapping, filtering=filtering, ipv6=ipv6)


def judge_nat(seen: NatSeen | Unknown) -> Finding:
    if isinstance(seen, Unknown):
        return not_checked(Check.NAT, seen)
    if seen.mapping is NatMapping.UNKNOWN:
        why = "no member has told how it sees this machine"
        return not_checked(Check.NAT, Unknown(why=why, next_step=START))
    if seen.mapping is NatMapping.NONE:
        return ok(Check.NAT, "none: others see this machine's own address")
    as_seen = f" (seen as {', '.join(clean_text(one) for one in seen.observed[:3])})" if seen.observed else ""
    if seen.observers < OBSERVERS_MIN:
        why = f"a router is on the way{as_seen}; one member alone cannot tell what it does towards others"
        return not_checked(Check.NAT, Unknown(why=why, next_step="run it again when a second member is up"))
    filtering = f", {seen.filtering} filtering" if seen.filtering is not NatFiltering.UNKNOWN else ""
    text = f"{_MAPPINGS[seen.mapping]} mapping{filtering}{as_seen}"
    if seen.mapping is NatMapping.ENDPOINT_DEPENDENT:
        beside = "; to peers with IPv6 there can by that" if seen.ipv6 else ""
        return warning(Check.NAT, f"{text}: no hole can be punched through it{beside}", SWITCH_ON)
    return ok(Check.NAT, f"{text}: holes can be punched through it")


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewaySeen:
    """A router that answers to be asked for mapped ports: `way` is how, `external_ip` its address outside, empty where
    others cannot reach that, and `fault` why."""

    host: str
    way: str
    external_ip: str = ""
    fault: str = ""


def judge_gateway(seen: GatewaySeen | RouterStatus | Unknown, *, public: bool) -> Finding:
    """`public`: this machine's own address is one that others can dial."""
    if public:
        return ok(Check.GATEWAY, "not needed: this machine has a public address")
    if isinstance(seen, RouterStatus):
        return _judge_router(seen)
    if isinstance(seen, Unknown):
        return warning(Check.GATEWAY, f"no router maps ports: {clean_text(seen.why)}", SWITCH_ON)
    text = f"the router {seen.host} maps ports by {seen.way}"
    if not seen.external_ip:
        fix = "forward the two ports in the outer router, too, or ask the provider for a public address"
        return warning(Check.GATEWAY, f"{text}, and its own address is no public one: {clean_text(seen.fault)}", fix)
    return ok(Check.GATEWAY, f"{text}, its address is {seen.external_ip}")


def _judge_router(seen: RouterStatus) -> Finding:
    if seen.state is MappingState.MAPPED:
        return ok(Check.GATEWAY, clean_text(seen.detail) or f"maps {', '.join(seen.addresses)}")
    if seen.state is MappingState.NOT_NEEDED:
        return ok(Check.GATEWAY, "not needed: this machine has a public address")
    if seen.state is MappingState.FAILED:
        return warning(Check.GATEWAY, f"no port is mapped: {seen.reason} ({clean_text(seen.detail)})", SWITCH_ON)
    why = "the running daemon asks no router" if seen.state is MappingState.OFF else "the router is being asked"
    step = (
        "set nat.port_mapping = true in its configuration"
        if seen.state is MappingState.OFF
        else "run it again in a minute"
    )
    return not_checked(Check.GATEWAY, Unknown(why=why, next_step=step))


def judge_relay(status: Status | None, offered: int = 0) -> Finding:
    """What the running daemon holds; without one, how many of the peers that were reached give places at theirs."""
    if status is None and offered:
        peers = "a peer that was reached gives" if offered == 1 else f"{offered} peers that were reached give"
        return ok(Check.RELAY, f"{peers} places at a relay, if nobody can dial this machine")
    if status is None:
        why = "no peer was reached that gives places at a relay; a daemon that nobody can dial looks for one"
        return not_checked(Check.RELAY, Unknown(why=why, next_step=START))
    control = status.control
    if control.relays:
        return ok(Check.RELAY, f"others reach the control port through {len(control.relays)} relays as well")
    if control.state is ReachState.REACHABLE:
        relaying = f"; it relays for {control.reservations} others" if control.relaying else ""
        return ok(Check.RELAY, f"not needed: others dial the control port{relaying}")
    if control.state is ReachState.UNKNOWN:
        why = "nobody has said yet whether the control port can be dialled"
        return not_checked(Check.RELAY, Unknown(why=why, next_step="run it again in a minute"))
    fix = "ask for a reachable peer in the swarm: shoal relay on any machine with a public address"
    return warning(Check.RELAY, "nobody can dial the control port, and no peer gives a place at a relay", fix)
