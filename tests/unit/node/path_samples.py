"""A test's peer: its tensor paths, line, gate and surroundings, wired as in the daemon on a made-up machine."""

from functools import partial
from typing import TYPE_CHECKING

from shoal.node.gate import Gate
from shoal.node.happenings import HappeningKind
from shoal.node.line_use import LineUse
from shoal.node.link_port import Address
from shoal.node.reach import ReachPorts
from shoal.node.surroundings import Surroundings
from shoal.node.tensor_paths import TensorPaths

if TYPE_CHECKING:
    from tests.unit.node.node_samples import Peer


def make_paths(peer: "Peer", bound: Address) -> TensorPaths:
    """`peer.hosts` are the machine's addresses."""
    ports = ReachPorts(
        live=lambda: peer.membership.table.live(),
        addresses_of=lambda other: () if peer.intake.refuses(other) else peer.swarm.addresses_of(other),
        hosts=lambda: peer.hosts,
        seen_hosts=lambda: (),
        changed=lambda: peer.reach_changes.append(peer.paths.reach.describe()),
        now=lambda: peer.now_s(),
    )
    return TensorPaths(peer.me, peer.swarm.id, peer.config.tensor, bound, peer.control, peer.links, ports)


def make_gate(peer: "Peer") -> Gate:
    """By the test's clocks."""
    return Gate(
        me=peer.me,
        manifest=peer.swarm.manifest,
        swarm=peer.swarm.id,
        standing=peer.ledger.ledger.standing,
        voters=lambda: peer.core.head.voters,
        proof=peer.swarm.proofs.get(peer.me),
        clock=lambda: peer.now_s(),
        wall=lambda: peer.wall_s(),
    )


def make_surroundings(peer: "Peer") -> Surroundings:
    """Nothing of it runs."""
    return Surroundings(peer.config, peer.me, peer.swarm.id, peer.control, peer.reporter.happen, peer.spawn)


def make_line(peer: "Peer") -> LineUse:
    """Its caps are set when the test looks."""
    tell = partial(peer.reporter.happen, HappeningKind.NETWORK)
    return LineUse(peer.config, peer.links, lambda: peer.paths.reach.reached, tell, lambda: peer.now_s())
