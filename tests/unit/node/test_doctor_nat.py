"""What the doctor says of routers: mapping and filtering in the terms of RFC 5780, mapped ports, relays."""

from dataclasses import replace

import pytest

from shoal.node.doctor_findings import Check, Finding, Unknown, Verdict
from shoal.node.doctor_nat import (
    GatewaySeen,
    NatFiltering,
    NatSeen,
    judge_gateway,
    judge_nat,
    judge_relay,
    see_nat,
)
from shoal.node.port_mapping import MappingState
from shoal.node.reachability import NatMapping, ReachReason, ReachState
from shoal.node.status import AddressStatus, ControlStatus, ReachStatus, RouterStatus, Status

OPEN = AddressStatus(address="8.8.4.4:9461", state=ReachState.REACHABLE, reason=ReachReason.DIALLED_BACK)
SHUT = replace(OPEN, state=ReachState.PRIVATE, reason=ReachReason.DIAL_BACK_FAILED)
REACH = ReachStatus(
    state=ReachState.PRIVATE,
    reason=ReachReason.DIAL_BACK_FAILED,
    mapping=NatMapping.ENDPOINT_INDEPENDENT,
    addresses=(SHUT,),
)
ROUTER = RouterStatus(state=MappingState.FAILED, reason="no_gateway", detail="none answers", addresses=())
SEEN = NatSeen(mapping=NatMapping.ENDPOINT_INDEPENDENT, observed=("8.8.4.4:9461",))


def expect(finding: Finding, check: Check, verdict: Verdict, text: str, step: str = "") -> None:
    assert finding.check is check
    assert finding.verdict is verdict, finding
    assert text in finding.text, finding.text
    assert step in finding.next_step, finding.next_step


@pytest.mark.parametrize(
    ("addresses", "mapped", "filtering"),
    [
        ((SHUT,), (), NatFiltering.ENDPOINT_DEPENDENT),
        ((OPEN,), (), NatFiltering.ENDPOINT_INDEPENDENT),
        # Somebody comes in there because the router was asked to let everybody in.
        ((OPEN,), ("8.8.4.4:9461",), NatFiltering.UNKNOWN),
        ((replace(OPEN, address="192.168.1.5:9461"),), (), NatFiltering.UNKNOWN),
        ((replace(SHUT, address="[2a00::5]:9461"),), (), NatFiltering.UNKNOWN),
        ((replace(SHUT, state=ReachState.UNKNOWN, reason=ReachReason.NOT_ASKED),), (), NatFiltering.UNKNOWN),
        ((), (), NatFiltering.UNKNOWN),
    ],
)
def test_filtering_follows_from_who_came_in(
    addresses: tuple[AddressStatus, ...], mapped: tuple[str, ...], filtering: NatFiltering
) -> None:
    seen = see_nat(replace(REACH, addresses=addresses), replace(ROUTER, addresses=mapped))
    assert (seen.mapping, seen.filtering) == (NatMapping.ENDPOINT_INDEPENDENT, filtering)
    assert seen.ipv6 == any(one.address.startswith("[2a00") for one in addresses)


@pytest.mark.parametrize(
    ("seen", "verdict", "text", "step"),
    [
        (Unknown(why="nobody", next_step="go"), Verdict.NOT_CHECKED, "nobody", "go"),
        (NatSeen(mapping=NatMapping.UNKNOWN), Verdict.NOT_CHECKED, "no member has told", "shoal up"),
        (NatSeen(mapping=NatMapping.NONE, observers=1), Verdict.OK, "this machine's own address", ""),
        (SEEN, Verdict.OK, "endpoint-independent mapping (seen as 8.8.4.4:9461): holes can be punched", ""),
        (replace(SEEN, observers=1), Verdict.NOT_CHECKED, "one member alone", "a second member"),
        (
            replace(SEEN, mapping=NatMapping.ENDPOINT_DEPENDENT),
            Verdict.WARNING,
            "address-dependent or address-and-port-dependent mapping",
            "forward the two ports",
        ),
        (
            replace(SEEN, mapping=NatMapping.ENDPOINT_DEPENDENT, ipv6=True),
            Verdict.WARNING,
            "no hole can be punched through it; to peers with IPv6 there can by that",
            "forward the two ports",
        ),
        (
            replace(SEEN, filtering=NatFiltering.ENDPOINT_DEPENDENT),
            Verdict.OK,
            "mapping, address-dependent or address-and-port-dependent filtering",
            "",
        ),
    ],
)
def test_nat(seen: NatSeen | Unknown, verdict: Verdict, text: str, step: str) -> None:
    expect(judge_nat(seen), Check.NAT, verdict, text, step)


@pytest.mark.parametrize(
    ("seen", "verdict", "text", "step"),
    [
        (Unknown(why="upnp: no answer"), Verdict.WARNING, "no router maps ports: upnp: no answer", "switch on UPnP"),
        (GatewaySeen(host="10.0.0.1", way="upnp", external_ip="8.8.4.4"), Verdict.OK, "by upnp, its address", ""),
        (GatewaySeen(host="10.0.0.1", way="upnp", fault="double_nat"), Verdict.WARNING, "double_nat", "outer router"),
        (replace(ROUTER, state=MappingState.MAPPED, detail="it maps"), Verdict.OK, "it maps", ""),
        (replace(ROUTER, state=MappingState.NOT_NEEDED), Verdict.OK, "not needed", ""),
        (ROUTER, Verdict.WARNING, "no_gateway (none answers)", "switch on UPnP"),
        (replace(ROUTER, state=MappingState.OFF), Verdict.NOT_CHECKED, "asks no router", "configuration"),
        (replace(ROUTER, state=MappingState.TRYING), Verdict.NOT_CHECKED, "being asked", "in a minute"),
    ],
)
def test_gateway(seen: GatewaySeen | RouterStatus | Unknown, verdict: Verdict, text: str, step: str) -> None:
    expect(judge_gateway(seen, public=False), Check.GATEWAY, verdict, text, step)
    expect(judge_gateway(seen, public=True), Check.GATEWAY, Verdict.OK, "not needed")


@pytest.mark.parametrize(
    ("control", "verdict", "text", "step"),
    [
        (ControlStatus(relays=("a", "b")), Verdict.OK, "through 2 relays", ""),
        (ControlStatus(state=ReachState.REACHABLE), Verdict.OK, "others dial the control port", ""),
        (
            ControlStatus(state=ReachState.REACHABLE, relaying=True, reservations=3),
            Verdict.OK,
            "it relays for 3 others",
            "",
        ),
        (ControlStatus(), Verdict.NOT_CHECKED, "nobody has said", "in a minute"),
        (ControlStatus(state=ReachState.PRIVATE), Verdict.WARNING, "no peer gives a place", "shoal relay"),
    ],
)
def test_relay(status: Status, control: ControlStatus, verdict: Verdict, text: str, step: str) -> None:
    expect(judge_relay(replace(status, control=control)), Check.RELAY, verdict, text, step)


def test_without_a_daemon_no_relay_gives_a_place() -> None:
    expect(judge_relay(None), Check.RELAY, Verdict.NOT_CHECKED, "no peer was reached that gives", "shoal up")
    expect(judge_relay(None, 1), Check.RELAY, Verdict.OK, "a peer that was reached gives places")
    expect(judge_relay(None, 2), Check.RELAY, Verdict.OK, "2 peers that were reached give places")
