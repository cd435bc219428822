"""Pieces of a test's peer, wired as in the daemon on a made-up machine."""

from functools import partial
from typing import TYPE_CHECKING

from shoal.node.catchup import CatchUp, CatchUpPorts
from shoal.node.gate import Gate
from shoal.node.happenings import HappeningKind
from shoal.node.line_use import LineUse
from shoal.node.link_port import Address
from shoal.node.pair_mixing import PairMixing
from shoal.node.reach import ReachPorts
from shoal.node.reporting import Subjects
from shoal.node.surroundings import Surroundings
from shoal.node.tensor_paths import TensorPaths
from shoal.protocol.messages import Certified

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


def make_mixing(peer: "Peer") -> PairMixing:
    """Its turns are kept in a list; who does not run it declines every ask."""
    return PairMixing(
        manifest=peer.swarm.manifest,
        driver=peer.driver,
        state=peer.state,
        exchange=peer.exchange,
        membership=peer.membership,
        presence=peer.presence,
        misbehaved=peer.misbehaved,
        tell=lambda other, failure: peer.turns.append((other, failure)),
    )


def make_catch_up(peer: "Peer") -> CatchUp:
    """What it tells is kept in lists."""
    return CatchUp(
        manifest=peer.swarm.manifest,
        swarm=peer.swarm.id,
        control=peer.control,
        links=peer.links,
        state=peer.state,
        folder=peer.folder / "catchup",
        ports=CatchUpPorts(
            live=peer.membership.table.live,
            addresses_of=peer.swarm.addresses_of,
            take_certificate=lambda one, sender: peer.driver.receive(Certified(certificate=one), sender),
            wait_past=peer._wait_past,
            other_log=peer.other_logs.append,
            install=peer.driver.install,
            misbehaved=peer.misbehaved,
            donor_failed=lambda donor, reason: peer.donor_failures.update([donor]),
            find_donors=lambda first, last: peer.providers.find(first, last, peer.membership),
        ),
    )


def make_subjects(peer: "Peer") -> Subjects:
    """Everything that is reported on."""
    return Subjects(
        config=peer.config,
        me=peer.me,
        swarm=peer.swarm.id,
        manifest=peer.swarm.manifest,
        core=peer.core,
        state=peer.state,
        exchange=peer.exchange,
        control=peer.control,
        links=peer.links,
        line=make_line(peer),
        paths=peer.paths,
        surroundings=make_surroundings(peer),
        ledger=peer.ledger,
        membership=peer.membership,
        compute=peer.compute,
        catch_up=peer.catch_up,
        conduct=peer.conduct,
        gate=peer.gate,
    )
