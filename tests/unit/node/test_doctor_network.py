"""What the doctor says of the network: the verdict, the words, and the exact next step of every finding."""

from dataclasses import replace
from pathlib import Path

import pytest

from shoal.node.config import NodeConfig, NodeTable
from shoal.node.doctor_findings import Check, Finding, ModelSeen, Unknown, Verdict
from shoal.node.doctor_network import (
    BandwidthSeen,
    DhtSeen,
    FamilySeen,
    Firewall,
    FirewallSeen,
    PeerAnswer,
    PeersSeen,
    PortSeen,
    PortState,
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
    open_command,
)
from shoal.node.status import Status
from shoal.protocol.errors import Refusal

CONFIG = NodeConfig()
MODEL = ModelSeen(name="m", parameters=1, contribution_bytes=30_000_000, exchange_timeout_s=60.0)
FREE = PortSeen(use="control", host="0.0.0.0", port=9460, state=PortState.FREE)


def expect(finding: Finding, check: Check, verdict: Verdict, text: str, step: str = "") -> None:
    assert finding.check is check
    assert finding.verdict is verdict, finding
    assert text in finding.text, finding.text
    assert step in finding.next_step, finding.next_step


# -- ports -----------------------------------------------------------------------------------------------------------


def test_free_ports_share_a_line() -> None:
    (finding,) = judge_ports([FREE, replace(FREE, use="tensor", port=0)])
    expect(finding, Check.PORTS, Verdict.OK, "control 9460 is free; tensor takes any free port")


@pytest.mark.parametrize(
    ("state", "holder", "text", "step"),
    [
        (PortState.TAKEN, "nginx (process 7)", "by nginx (process 7)", "or start shoal with --control-port 9560"),
        (PortState.TAKEN, "", "a program of another user", "sudo ss -ltnp 'sport = :9460'"),
        (PortState.DENIED, "", "may not be used by this user", "--control-port 9560"),
        (PortState.NO_ADDRESS, "", "has no such address", "--control-host 0.0.0.0"),
    ],
)  # fmt: skip
def test_each_port_that_cannot_be_had_has_a_line(state: PortState, holder: str, text: str, step: str) -> None:
    first, second = judge_ports([replace(FREE, state=state, holder=holder), replace(FREE, use="web", port=9464)])
    expect(first, Check.PORTS, Verdict.OK, "web 9464 is free")
    expect(second, Check.PORTS, Verdict.PROBLEM, text, step)


def test_the_highest_ports_are_answered_with_any_free_one() -> None:
    (finding,) = judge_ports([replace(FREE, port=65_500, state=PortState.TAKEN, holder="x")])
    assert "--control-port 0" in finding.next_step


def test_ports_of_a_running_daemon() -> None:
    expect(judge_listeners([("0.0.0.0", 9461), ("0.0.0.0", 9460)]), Check.PORTS, Verdict.OK, "listens on 9460, 9461")
    expect(judge_listeners([]), Check.PORTS, Verdict.NOT_CHECKED, "another user", "as the user of the daemon")


# -- the running daemon ----------------------------------------------------------------------------------------------


def test_daemon(status: Status) -> None:
    folder = Path("/my data")
    expect(judge_daemon(None, folder), Check.DAEMON, Verdict.OK, "none runs on /my data")
    ill = replace(status, control_up=False)
    expect(
        judge_daemon(ill, folder), Check.DAEMON, Verdict.PROBLEM, "control plane has stopped", "--data-dir '/my data'"
    )
    leaving = replace(status, leaving=True)
    expect(judge_daemon(leaving, folder), Check.DAEMON, Verdict.WARNING, "leaving the swarm", "shoal status --watch")


# -- firewall --------------------------------------------------------------------------------------------------------

UFW = FirewallSeen(kind=Firewall.UFW, drops=True, open_ports=frozenset({22}))
ONE_OPEN = replace(UFW, open_ports=frozenset({9460}))
HIDDEN = FirewallSeen(kind=Firewall.NFTABLES, drops=None)
PORTS = (9460, 9461)


@pytest.mark.parametrize(
    ("seen", "ports", "reached", "verdict", "text", "step"),
    [
        (FirewallSeen(kind=Firewall.NONE, drops=False), PORTS, None, Verdict.OK, "no ufw", ""),
        (UFW, PORTS, True, Verdict.OK, "lets others in", ""),
        (replace(UFW, drops=False), PORTS, None, Verdict.OK, "turns nothing away", ""),
        (UFW, PORTS, None, Verdict.WARNING, "turns away TCP 9460 and 9461", "9460/tcp && sudo ufw allow 9461/tcp"),
        (UFW, PORTS, False, Verdict.WARNING, "turns away", "sudo ufw allow"),
        (ONE_OPEN, PORTS, None, Verdict.WARNING, "turns away TCP 9461:", "run: sudo ufw allow 9461/tcp"),
        (replace(UFW, open_ports=frozenset(PORTS)), PORTS, None, Verdict.OK, "lets in TCP 9460 and 9461", ""),
        (replace(UFW, open_ports=None), PORTS, None, Verdict.NOT_CHECKED, "only root", "sudo ufw allow 9460/tcp"),
        (HIDDEN, PORTS, None, Verdict.NOT_CHECKED, "only root", "sudo nft insert rule"),
        (UFW, (0, 0), None, Verdict.WARNING, "change with every start", "fixed ports"),
    ],
)  # fmt: skip
def test_firewall(
    seen: FirewallSeen, ports: tuple[int, ...], reached: bool | None, verdict: Verdict, text: str, step: str
) -> None:
    expect(judge_firewall(seen, ports, reached), Check.FIREWALL, verdict, text, step)


def test_the_command_that_opens_ports() -> None:
    assert open_command(Firewall.FIREWALLD, [1, 2]) == (
        "sudo firewall-cmd --permanent --add-port=1/tcp --add-port=2/tcp && sudo firewall-cmd --reload"
    )
    assert "tcp dport '{ 1, 2 }' accept" in open_command(Firewall.NFTABLES, [1, 2])


# -- address families ------------------------------------------------------------------------------------------------

NONE = FamilySeen(source="")
WELL = FamilySeen(source="192.168.1.5", dials=2, answered=1)


def test_one_family_is_enough() -> None:
    ipv4, ipv6 = judge_families(WELL, NONE)
    expect(ipv4, Check.IPV4, Verdict.OK, "192.168.1.5, a private address; 1 of 2 dials got through")
    expect(ipv6, Check.IPV6, Verdict.OK, "no route to the world; the other family has one")


def test_without_any_route_nobody_takes_part() -> None:
    for finding in judge_families(NONE, NONE):
        expect(finding, finding.check, Verdict.PROBLEM, "no route", "ip -6 route")


def test_a_broken_family_beside_a_good_one() -> None:
    broken = FamilySeen(source="2a00:1450:4001::5", dials=2, fault="no answer within 3 s")
    ipv4, ipv6 = judge_families(WELL, broken)
    assert ipv4.verdict is Verdict.OK
    expect(
        ipv6, Check.IPV6, Verdict.WARNING, "a public address, but none of 2 answered (no answer within 3 s)", "0.25 s"
    )
    expect(
        judge_families(replace(broken, source="8.8.4.4"), NONE)[0],
        Check.IPV4,
        Verdict.WARNING,
        "none of 2",
        "bootstrap",
    )


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("100.64.3.2", "behind a provider's shared address"),
        ("127.0.0.1", "of this machine alone"),
        ("10.0.0.1", "a private address"),
        ("8.8.4.4", "a public address"),
        ("fd00::1", "a private address"),
    ],
)
def test_addresses_are_named(source: str, told: str) -> None:
    finding = judge_families(FamilySeen(source=source), NONE)[0]
    expect(finding, Check.IPV4, Verdict.OK, f"{source}, {told}")
    assert "no peer with such an address" in finding.text


# -- other peers -----------------------------------------------------------------------------------------------------

GOOD = PeerAnswer(address="/ip4/1.2.3.4/tcp/1", reached=True)
DEAD = PeerAnswer(address="/ip4/5.6.7.8/tcp/2", reached=False, fault="5.6.7.8 port 2: Connection refused")


def test_a_dead_bootstrap_peer_is_harmless_beside_a_good_one() -> None:
    good, dead = judge_bootstraps(PeersSeen(bootstraps=(GOOD, DEAD), known=()))
    expect(good, Check.BOOTSTRAP, Verdict.OK, "/ip4/1.2.3.4/tcp/1 answers")
    expect(dead, Check.BOOTSTRAP, Verdict.WARNING, "Connection refused; others answer", "start it")
    expect(
        judge_bootstraps(PeersSeen(bootstraps=(replace(GOOD, took_s=2.0),), known=()))[0],
        Check.BOOTSTRAP,
        Verdict.OK,
        "slowly (2.0 s)",
    )


def test_a_dead_bootstrap_peer_is_harmless_beside_the_peer_book_or_a_running_daemon() -> None:
    dead, book = judge_bootstraps(PeersSeen(bootstraps=(DEAD,), known=(GOOD, DEAD)))
    assert dead.verdict is Verdict.WARNING
    expect(book, Check.BOOTSTRAP, Verdict.OK, "1 of 2 peers from the peer book answered")
    (dead,) = judge_bootstraps(PeersSeen(bootstraps=(DEAD,), known=(), daemon_peers=1))
    assert dead.verdict is Verdict.WARNING
    (none,) = judge_bootstraps(PeersSeen(bootstraps=(), known=(), daemon_peers=2))
    expect(none, Check.BOOTSTRAP, Verdict.OK, "sees 2 other peers")


def test_nobody_reached_stands_in_the_way() -> None:
    dead, book = judge_bootstraps(PeersSeen(bootstraps=(DEAD,), known=(DEAD,)))
    assert dead.verdict is Verdict.PROBLEM
    expect(book, Check.BOOTSTRAP, Verdict.PROBLEM, "nobody of the swarm is found", "shoal join 'shoal://")
    (none,) = judge_bootstraps(PeersSeen(bootstraps=(), known=()))
    expect(none, Check.BOOTSTRAP, Verdict.PROBLEM, "nobody can be found", "--bootstrap /ip4/")
    (founder,) = judge_bootstraps(PeersSeen(bootstraps=(), known=(), founder=True))
    expect(founder, Check.BOOTSTRAP, Verdict.OK, "founds the swarm")


@pytest.mark.parametrize(
    ("fault", "step"),
    [
        ("port 2: Connection refused", "to open its control port"),
        ("Name or service not known", "/etc/resolv.conf"),
        ("Network is unreachable", "ip route"),
        ("remote peer id mismatch", "new address"),
        ("no answer within 5 s", "firewall here"),
    ],
)
def test_the_next_step_follows_from_why_a_dial_failed(fault: str, step: str) -> None:
    (finding,) = judge_bootstraps(PeersSeen(bootstraps=(replace(DEAD, fault=fault),), known=()))
    expect(finding, Check.BOOTSTRAP, Verdict.PROBLEM, f"was not reached: {fault}", step)


@pytest.mark.parametrize(
    ("refusal", "text", "step"),
    [
        (Refusal.WRONG_SWARM, "serves another swarm", "URI of this swarm"),
        (Refusal.WRONG_VERSION, "another protocol version", "pip install --upgrade shoal"),
        (Refusal.NOT_READY, "starting or leaving", "wait a minute"),
        (Refusal.LIMIT, "refuses this peer: limit", "docs/operations.md"),
    ],
)
def test_the_next_step_follows_from_why_a_peer_refuses(refusal: Refusal, text: str, step: str) -> None:
    (finding,) = judge_bootstraps(PeersSeen(bootstraps=(replace(GOOD, refusal=refusal),), known=()))
    expect(finding, Check.BOOTSTRAP, Verdict.PROBLEM, text, step)


def test_what_a_peer_says_reaches_the_terminal_without_escapes() -> None:
    (finding,) = judge_bootstraps(PeersSeen(bootstraps=(replace(DEAD, fault="\x1b[2Jgone"),), known=()))
    assert "\x1b" not in finding.text


# -- DHT, rates, reachability ----------------------------------------------------------------------------------------


def test_dht() -> None:
    expect(judge_dht(DhtSeen(providers=3, took_s=0.4)), Check.DHT, Verdict.OK, "took 0.4 s and names 3 peers")
    expect(judge_dht(DhtSeen(providers=0, took_s=0.4)), Check.DHT, Verdict.WARNING, "names no peer", "wait a minute")
    expect(judge_dht(Unknown(why="nobody to ask")), Check.DHT, Verdict.NOT_CHECKED, "nobody to ask", "again")


RATES = BandwidthSeen(up_bytes_per_s=1e6, down_bytes_per_s=2e6, source="measured with otter")


def test_bandwidth_is_weighed_against_what_a_round_moves() -> None:
    expect(
        judge_bandwidth(RATES, CONFIG, None),
        Check.BANDWIDTH,
        Verdict.OK,
        "up 8.0 Mbit/s, down 16.0 Mbit/s (measured with otter)",
    )
    expect(judge_bandwidth(RATES, CONFIG, MODEL), Check.BANDWIDTH, Verdict.OK, "up 8.0")
    slow = replace(RATES, up_bytes_per_s=0.99e6)
    expect(
        judge_bandwidth(slow, CONFIG, MODEL),
        Check.BANDWIDTH,
        Verdict.WARNING,
        "to send a round's 30.0 MB takes 30 s, a round gives 30 s",
        "cable",
    )
    slow = replace(RATES, down_bytes_per_s=0.5e6)
    expect(
        judge_bandwidth(slow, CONFIG, MODEL),
        Check.BANDWIDTH,
        Verdict.WARNING,
        "to fetch a round's 30.0 MB takes 60 s",
        "exchange_timeout_s",
    )
    bootstrap = NodeConfig(node=NodeTable(role="bootstrap"))
    assert judge_bandwidth(slow, bootstrap, MODEL).verdict is Verdict.OK


def test_a_rate_that_is_not_known_is_said_so() -> None:
    half = replace(RATES, up_bytes_per_s=None)
    expect(judge_bandwidth(half, CONFIG, MODEL), Check.BANDWIDTH, Verdict.OK, "up unknown, down 16.0")
    why = replace(half, up_fault="refused: limit")
    expect(judge_bandwidth(why, CONFIG, MODEL), Check.BANDWIDTH, Verdict.OK, "up unknown (refused: limit), down 16.0")
    none = replace(half, down_bytes_per_s=None)
    expect(
        judge_bandwidth(none, CONFIG, MODEL), Check.BANDWIDTH, Verdict.NOT_CHECKED, "nothing could be moved", "again"
    )
    expect(judge_bandwidth(Unknown(why="x"), CONFIG, MODEL), Check.BANDWIDTH, Verdict.NOT_CHECKED, "x", "again")


def test_reachability() -> None:
    expect(judge_reach(ReachSeen(reached=True, source="s"), PORTS), Check.REACHABILITY, Verdict.OK, "may own parts")
    expect(
        judge_reach(ReachSeen(reached=False, source="s"), PORTS),
        Check.REACHABILITY,
        Verdict.WARNING,
        "owns no parts",
        "forward TCP 9460 and 9461",
    )
    for ipv4, ipv6, step in (
        (True, True, "switch on UPnP there, or let TCP 9460 and 9461 in to this machine in the router's IPv6 firewall"),
        (False, True, "let TCP 9460 and 9461 in to this machine in the router's IPv6 firewall; see the firewall line"),
        (False, False, "see the lines on IPv4 and IPv6"),
    ):
        found = judge_reach(ReachSeen(reached=False, source="s", ipv4=ipv4, ipv6=ipv6), PORTS)
        expect(found, Check.REACHABILITY, Verdict.WARNING, "owns no parts", step)
        assert ("forward" in found.next_step) == ipv4
    expect(
        judge_reach(ReachSeen(reached=False, source="s"), (0,)),
        Check.REACHABILITY,
        Verdict.WARNING,
        "owns no parts",
        "fixed numbers",
    )
    expect(
        judge_reach(ReachSeen(reached=None, source="s"), PORTS),
        Check.REACHABILITY,
        Verdict.NOT_CHECKED,
        "nobody could be asked",
        "second peer",
    )
    expect(judge_reach(Unknown(why="x"), PORTS), Check.REACHABILITY, Verdict.NOT_CHECKED, "x", "again")
