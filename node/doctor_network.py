"""What `shoal doctor` says about the network: ports, firewall, address families, other peers, the DHT, the rates.

Pure functions like those of `node/doctor_findings.py`, under the same invariant.
"""

import ipaddress
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from shoal.node.config import TRAINER, NodeConfig
from shoal.node.doctor_findings import (
    AGAIN,
    Check,
    Finding,
    ModelSeen,
    Unknown,
    count,
    list_words,
    not_checked,
    ok,
    problem,
    warning,
)
from shoal.node.status import Status, clean_text, judge_health, judge_readiness
from shoal.node.terminal import format_bytes, format_span
from shoal.protocol.errors import Refusal

NAME_A_SWARM = "name the swarm: shoal doctor 'shoal://…' (the URI that its members print)"
CONNECT_SLOW_S = 0.3
_SHARED_BY_PROVIDER = ipaddress.ip_network("100.64.0.0/10")  # RFC 6598


class PortState(StrEnum):
    FREE = "free"
    TAKEN = "taken"
    DENIED = "denied"
    NO_ADDRESS = "no_address"  # this machine has no such address


@dataclass(frozen=True, slots=True, kw_only=True)
class PortSeen:
    """`use` is the section of the configuration; `holder` is who has the port, where that can be seen."""

    use: str
    host: str
    port: int
    state: PortState
    holder: str = ""


def judge_ports(seen: Sequence[PortSeen]) -> list[Finding]:
    """One finding for all that are free, one for each that is not."""
    free = [one for one in seen if one.state is PortState.FREE]
    findings = [_judge_port(one) for one in seen if one.state is not PortState.FREE]
    if free:
        named = (f"{one.use} {one.port} is free" if one.port else f"{one.use} takes any free port" for one in free)
        findings.insert(0, ok(Check.PORTS, "; ".join(named)))
    return findings


def judge_listeners(listeners: Sequence[tuple[str, int]]) -> Finding:
    """Of a running daemon, which has its ports already."""
    if not listeners:
        why = "the daemon runs as another user, so its ports are not seen from here"
        return not_checked(Check.PORTS, Unknown(why=why, next_step="run `shoal doctor` as the user of the daemon"))
    ports = sorted({port for _, port in listeners})
    return ok(Check.PORTS, f"the running daemon listens on {list_words([str(port) for port in ports])}")


def _judge_port(seen: PortSeen) -> Finding:
    flag = f"--{seen.use}-port {seen.port + 100 if seen.port < 65_000 else 0}"
    text = f"{seen.use}: port {seen.port} of {seen.host}"
    if seen.state is PortState.TAKEN:
        who = f"is used by {seen.holder}" if seen.holder else "is used by a program of another user"
        look = "" if seen.holder else f"see who has it: sudo ss -ltnp 'sport = :{seen.port}'; "
        return problem(Check.PORTS, f"{text} {who}", f"{look}stop that program, or start shoal with {flag}")
    if seen.state is PortState.DENIED:
        return problem(Check.PORTS, f"{text} may not be used by this user", f"start shoal with {flag}")
    fix = f"start shoal with --{seen.use}-host 0.0.0.0, or an address of this machine (see `ip address`)"
    return problem(Check.PORTS, f"{text} cannot be listened on: this machine has no such address", fix)


# -- the running daemon ------------------------------------------------------------------------------------------------


def judge_daemon(status: Status | None, folder: Path) -> Finding:
    """`status` is what the daemon of this data folder says of itself, None where none runs."""
    if status is None:
        return ok(Check.DAEMON, f"none runs on {folder}")
    health, readiness = judge_health(status), judge_readiness(status)
    if not health.ok:
        text = "; ".join(clean_text(reason) for reason in health.reasons)
        fix = "read its log and stop it (Ctrl-C), mend what it names, start it again: shoal up"
        return problem(Check.DAEMON, text, f"{fix} --data-dir {shlex.quote(str(folder))}")
    text = f"runs for {format_span(status.uptime_s)}, round {status.round.round}"
    if not readiness.ok:
        text += ", cannot take part now: " + "; ".join(clean_text(reason) for reason in readiness.reasons)
        return warning(Check.DAEMON, text, f"watch it: shoal status --watch --data-dir {shlex.quote(str(folder))}")
    return ok(Check.DAEMON, f"{text}, healthy and ready")


# -- the firewall ------------------------------------------------------------------------------------------------------


class Firewall(StrEnum):
    UFW = "ufw"
    FIREWALLD = "firewalld"
    NFTABLES = "nftables"
    NONE = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class FirewallSeen:
    """`open_ports` are those that its rules let in, None where this user may not read them; `drops` whether it turns
    away what no rule lets in."""

    kind: Firewall
    drops: bool | None
    open_ports: frozenset[int] | None = None


def judge_firewall(seen: FirewallSeen, ports: Sequence[int], reached: bool | None) -> Finding:
    """`ports` are those that others dial; `reached` says that somebody has come in, which settles it."""
    if seen.kind is Firewall.NONE:
        return ok(Check.FIREWALL, "no ufw, firewalld or nftables rules on this machine")
    if reached:
        return ok(Check.FIREWALL, f"{seen.kind} is there and lets others in")
    if seen.drops is False:
        return ok(Check.FIREWALL, f"{seen.kind} is there and turns nothing away")
    wanted = [port for port in ports if port]
    if not wanted:
        fix = "give fixed ports (control.port, tensor.port) and open those"
        return warning(Check.FIREWALL, f"{seen.kind} is on, and the ports change with every start", fix)
    names = " and ".join(map(str, wanted))
    if seen.open_ports is None:
        step = f"if others cannot dial this peer, run: {open_command(seen.kind, wanted)}"
        why = f"{seen.kind} is there, and only root may see whether it lets in TCP {names}"
        return not_checked(Check.FIREWALL, Unknown(why=why, next_step=step))
    shut = [port for port in wanted if port not in seen.open_ports]
    if not shut:
        return ok(Check.FIREWALL, f"{seen.kind} lets in TCP {names}")
    text = f"{seen.kind} turns away TCP {' and '.join(map(str, shut))}: others cannot dial this peer"
    return warning(Check.FIREWALL, text, f"run: {open_command(seen.kind, shut)}")


def open_command(kind: Firewall, ports: Sequence[int]) -> str:
    """What opens these TCP ports."""
    if kind is Firewall.UFW:
        return " && ".join(f"sudo ufw allow {port}/tcp" for port in ports)
    if kind is Firewall.FIREWALLD:
        added = " ".join(f"--add-port={port}/tcp" for port in ports)
        return f"sudo firewall-cmd --permanent {added} && sudo firewall-cmd --reload"
    listed = ", ".join(map(str, ports))
    # The names of table and chain are those of Debian's /etc/nftables.conf.
    return f"sudo nft insert rule inet filter input tcp dport '{{ {listed} }}' accept"


# -- address families --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilySeen:
    """IPv4 or IPv6. `source` is the address that packets to the world leave from, empty where there is no route;
    `dials` counts addresses of this family that were dialled, `answered` those that took the connection."""

    source: str
    dials: int = 0
    answered: int = 0
    fault: str = ""


def judge_families(ipv4: FamilySeen, ipv6: FamilySeen) -> list[Finding]:
    """No single family is needed, one of the two is."""
    return [_judge_family(Check.IPV4, ipv4, ipv6), _judge_family(Check.IPV6, ipv6, ipv4)]


def _judge_family(check: Check, seen: FamilySeen, other: FamilySeen) -> Finding:
    if not seen.source:
        if other.source:
            return ok(check, "no route to the world; the other family has one")
        fix = "connect this machine to a network, and see `ip route` and `ip -6 route`"
        return problem(check, "no route to the world, and none of the other family", fix)
    text = f"{seen.source}, {_describe_reach(seen.source)}"
    if seen.answered:
        return ok(check, f"{text}; {seen.answered} of {seen.dials} dials got through")
    if not seen.dials:
        return ok(check, f"{text}; no peer with such an address to dial")
    text = f"{text}, but none of {seen.dials} answered ({seen.fault})"
    if other.answered:
        fix = "mend the router's or provider's part of it, or leave it: the other family is used 0.25 s later"
        return warning(check, text, fix)
    return warning(check, text, "see the bootstrap lines: the peers may be down, or a firewall lets nothing out")


def _describe_reach(source: str) -> str:
    address = ipaddress.ip_address(source)
    if address.is_loopback:
        return "of this machine alone"
    if address.version == 4 and address in _SHARED_BY_PROVIDER:
        return "behind a provider's shared address (CGNAT)"
    return "a public address" if address.is_global else "a private address"


# -- other peers -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerAnswer:
    """One peer that was dialled: a bootstrap peer, or one from the peer book. `refusal` is why it answers no question
    of this swarm; `fault` why it was not reached."""

    address: str
    reached: bool
    took_s: float = 0.0
    refusal: Refusal | None = None
    fault: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PeersSeen:
    """`bootstraps` are those that the URI and the configuration name, `known` come from the peer book. `founder` says
    that the manifest names this peer as one of the first voters: it may well be the first one to start."""

    bootstraps: tuple[PeerAnswer, ...]
    known: tuple[PeerAnswer, ...]
    founder: bool = False
    daemon_peers: int = 0  # live ones that the running daemon sees


def judge_bootstraps(seen: PeersSeen) -> list[Finding]:
    """One finding for each bootstrap peer, one for the peer book, and one where nobody is left."""
    welcome = seen.daemon_peers + sum(one.reached and one.refusal is None for one in (*seen.bootstraps, *seen.known))
    findings = [_judge_bootstrap(one, others=bool(welcome)) for one in seen.bootstraps]
    if seen.known:
        reached = sum(one.reached for one in seen.known)
        text = f"{reached} of {count(len(seen.known), 'peer')} from the peer book answered"
        if reached or welcome:
            findings.append(ok(Check.BOOTSTRAP, text))
        else:
            fix = "ask a member for the swarm's newest URI and start with: shoal join 'shoal://…'"
            findings.append(problem(Check.BOOTSTRAP, f"{text}: nobody of the swarm is found", fix))
    if not findings:
        if seen.daemon_peers:
            text = f"none is named; the running daemon sees {count(seen.daemon_peers, 'other peer')}"
            return [ok(Check.BOOTSTRAP, text)]
        if seen.founder:
            return [ok(Check.BOOTSTRAP, "no other peer is known; this peer founds the swarm and may be the first")]
        fix = "give one: --bootstrap /ip4/…/tcp/9460/p2p/…, or the URI that a member prints"
        findings.append(problem(Check.BOOTSTRAP, "no bootstrap peer and no peer book: nobody can be found", fix))
    return findings


def _judge_bootstrap(seen: PeerAnswer, *, others: bool) -> Finding:
    if seen.reached and seen.refusal is None:
        slow = f", slowly ({seen.took_s:.1f} s)" if seen.took_s > CONNECT_SLOW_S else ""
        return ok(Check.BOOTSTRAP, f"{seen.address} answers{slow}")
    if seen.reached:
        text, fix = _explain_refusal(seen)
    else:
        text = f"{seen.address} was not reached: {clean_text(seen.fault)}"
        fix = _dial_fix(seen)
    if others:
        return warning(Check.BOOTSTRAP, f"{text}; others answer", fix)
    return problem(Check.BOOTSTRAP, text, fix)


def _explain_refusal(seen: PeerAnswer) -> tuple[str, str]:
    assert seen.refusal is not None
    match seen.refusal:
        case Refusal.WRONG_SWARM:
            return f"{seen.address} serves another swarm", "ask its owner for the URI of this swarm, and use that"
        case Refusal.WRONG_VERSION:
            return f"{seen.address} speaks another protocol version", "run: pip install --upgrade shoal"
        case Refusal.NOT_READY:
            return f"{seen.address} is starting or leaving", "wait a minute and run `shoal doctor` again"
        case _:
            fix = f"look up {seen.refusal} in docs/operations.md, and ask whoever runs that peer"
            return f"{seen.address} refuses this peer: {seen.refusal}", fix


def _dial_fix(seen: PeerAnswer) -> str:
    fault = seen.fault.lower()
    if "refused" in fault:
        return "ask whoever runs that peer to start it, or to open its control port"
    if "name" in fault and ("resol" in fault or "known" in fault):
        return "mend the name, or this machine's DNS (see /etc/resolv.conf)"
    if "unreachable" in fault and "network" in fault:
        return "mend this machine's route to that network (see `ip route`)"
    if "peer id" in fault or "mismatch" in fault:
        return "ask for that peer's new address: another peer answers there now"
    return "ask whoever runs that peer; check that a firewall here lets TCP out to that port"


# -- DHT ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class DhtSeen:
    """A look-up of the swarm's keys."""

    providers: int
    took_s: float


def judge_dht(seen: DhtSeen | Unknown) -> Finding:
    if isinstance(seen, Unknown):
        return not_checked(Check.DHT, seen)
    if not seen.providers:
        fix = (
            "wait a minute and try again: peers announce themselves after their start; bootstrap peers serve till then"
        )
        return warning(Check.DHT, f"the look-up took {seen.took_s:.1f} s and names no peer of this swarm", fix)
    return ok(Check.DHT, f"the look-up took {seen.took_s:.1f} s and names {count(seen.providers, 'peer')} of the swarm")


# -- rates -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class BandwidthSeen:
    """Bytes a second over a tensor link, None in a direction that could not be measured, and then why in its fault;
    `source` says how they were measured."""

    up_bytes_per_s: float | None
    down_bytes_per_s: float | None
    source: str
    up_fault: str = ""
    down_fault: str = ""


def judge_bandwidth(seen: BandwidthSeen | Unknown, config: NodeConfig, model: ModelSeen | None) -> Finding:
    if isinstance(seen, Unknown):
        return not_checked(Check.BANDWIDTH, seen)
    up, down = _rate(seen.up_bytes_per_s, seen.up_fault), _rate(seen.down_bytes_per_s, seen.down_fault)
    rates = f"up {up}, down {down} ({seen.source})"
    if seen.up_bytes_per_s is None and seen.down_bytes_per_s is None:
        return not_checked(Check.BANDWIDTH, Unknown(why=f"nothing could be moved: {rates}"))
    if model is None or config.node.role != TRAINER:
        return ok(Check.BANDWIDTH, rates)
    slow = []
    # The senders of a round have half of the exchange's time.
    for way, rate in (("send", seen.up_bytes_per_s), ("fetch", seen.down_bytes_per_s)):
        if rate is not None and model.contribution_bytes / rate > model.exchange_timeout_s / 2:
            took_s = model.contribution_bytes / rate
            slow.append(f"to {way} a round's {format_bytes(model.contribution_bytes)} takes {took_s:.0f} s")
    if slow:
        text = f"{rates}: {' and '.join(slow)}, a round gives {model.exchange_timeout_s / 2:.0f} s"
        fix = "use a cable, not Wi-Fi, and end other transfers; or ask the owner for a longer exchange_timeout_s"
        return warning(Check.BANDWIDTH, text, fix)
    return ok(Check.BANDWIDTH, rates)


def _rate(bytes_per_s: float | None, fault: str) -> str:
    if bytes_per_s is None:
        return f"unknown ({fault})" if fault else "unknown"
    return f"{bytes_per_s * 8 / 1e6:.1f} Mbit/s"


# -- reachability ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ReachSeen:
    """`reached` says whether another peer has dialled this one's tensor port; None where nobody could be asked.
    `ipv4` and `ipv6`: this machine has an address of the first, and a public one of the second."""

    reached: bool | None
    source: str
    ipv4: bool = True
    ipv6: bool = False


def judge_reach(seen: ReachSeen | Unknown, ports: Sequence[int]) -> Finding:
    if isinstance(seen, Unknown):
        return not_checked(Check.REACHABILITY, seen)
    if seen.reached:
        return ok(Check.REACHABILITY, f"others dial this peer's tensor port ({seen.source}): it may own parts")
    if seen.reached is None:
        why = f"nobody could be asked to dial back ({seen.source})"
        return not_checked(Check.REACHABILITY, Unknown(why=why, next_step=f"bring a second peer up, then {AGAIN}"))
    text = f"nobody has dialled this peer's tensor port ({seen.source}): it contributes and owns no parts"
    names = " and ".join(str(port) for port in ports if port) or "the two ports (give them fixed numbers first)"
    fixes = [f"forward TCP {names} of the router to this machine, or switch on UPnP there"] if seen.ipv4 else []
    if seen.ipv6:
        fixes.append(f"let TCP {names} in to this machine in the router's IPv6 firewall")
    fix = f"{', or '.join(fixes)}; see the firewall line, too" if fixes else "see the lines on IPv4 and IPv6"
    return warning(Check.REACHABILITY, text, fix)
