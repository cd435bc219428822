"""How tensor links come about, and in which order the ways are tried:

    open link    there is one already
    direct       the addresses that the peer announces, with a head start each
    punched      both sides dial at once, where nobody can dial the peer
    relayed      both sides connect to a member that passes their bytes on, where no hole comes about

Each way is bounded in time. A hole is made when dialling has failed or has had its head start, and the first of the two
that leads to the peer is taken; a member is asked when no hole came about. This is the one piece that the daemon wires;
everything behind it has a module of its own.
"""

import logging
from collections.abc import Callable

from shoal.dht.addresses import parse_address
from shoal.node.config import TensorTable
from shoal.node.control import ControlPlane
from shoal.node.dial_back import DialBack
from shoal.node.interfaces import InterfaceWatch
from shoal.node.link_port import Address, LinkEnd, LinkLost, LinkPath
from shoal.node.links import TensorLinks
from shoal.node.membership import Membership
from shoal.node.punch import Punches, PunchFailed, PunchPorts
from shoal.node.reach import Reach, ReachPorts
from shoal.node.reachability import NatMapping
from shoal.node.relayed_links import RelayedLinks, RelayedPorts, RelayFailed
from shoal.node.tensor_relay import RelayPorts, TensorRelay
from shoal.protocol.errors import Failure, ProtocolError, Refusal
from shoal.protocol.identity import PeerId
from shoal.protocol.messages import (
    AskRelay,
    GetObserved,
    GetPunchClock,
    ProbeAddresses,
    PunchOffer,
    PunchSync,
    RelayCall,
)

log = logging.getLogger(__name__)


def _ignore(*_: object) -> None:
    """Nobody counts."""


class TensorPaths:
    """All calls on the event loop. `bound` is what the tensor links listen on."""

    def __init__(
        self,
        me: PeerId,
        swarm: bytes,
        config: TensorTable,
        bound: Address,
        control: ControlPlane,
        links: TensorLinks,
        ports: ReachPorts,
    ) -> None:
        self._live = ports.live
        self._links = links
        self.on_opened: Callable[[PeerId, LinkPath], None] = _ignore  # a way round has led to a link
        self.on_failed: Callable[[PeerId, Failure], None] = _ignore  # it has not
        self.reach = Reach(swarm, config, bound, control, links, ports)
        self.dial_back = DialBack(links=links, is_member=self._is_member, now=ports.now)
        self.punches = Punches(
            me,
            swarm,
            control,
            links,
            PunchPorts(
                is_member=self._is_member,
                own_addresses=self.reach.find_outer,
                varies=lambda: self.reach.mapping is NatMapping.ENDPOINT_DEPENDENT,
                now=ports.now,
            ),
        )
        self.relay = TensorRelay(
            me,
            swarm,
            config,
            control,
            links,
            RelayPorts(refusal=self._why_no_member, reached=lambda: self.reach.reached, now=ports.now),
        )
        self.relayed = RelayedLinks(
            me,
            swarm,
            control,
            links,
            RelayedPorts(is_member=self._is_member, live=ports.live, addresses_of=ports.addresses_of, now=ports.now),
        )
        links.relay = self.relay
        links.detour = self._find_way

    async def answer(self, peer: PeerId, question: object) -> object:
        """The answer to a member's question; raises ProtocolError."""
        match question:
            case ProbeAddresses():
                return await self.dial_back.probe(peer, question)
            case GetObserved():
                return self.dial_back.tell_observed(peer, question)
            case PunchOffer():
                return await self.punches.take_offer(peer, question)
            case GetPunchClock():
                return self.punches.tell_clock(peer, question)
            case PunchSync():
                return self.punches.take_sync(peer, question)
            case AskRelay():
                return await self.relay.take_ask(peer, question)
            case RelayCall():
                return self.relayed.take_call(peer, question)
            case _:
                raise ProtocolError(Refusal.UNKNOWN_TYPE, f"{type(question).__name__} is no question")

    def addresses_changed(self) -> None:
        """The machine's own addresses, or the network behind them, are others now."""
        if ended := self._links.end_stranded():
            log.info("%d tensor links ended: %s", ended, LinkEnd.ADDRESS_GONE)
        self.punches.forget_pauses()
        self.relayed.forget_pauses()
        self.reach.addresses_changed()

    def _is_member(self, peer: PeerId) -> bool:
        return peer in self._live() and self._links.sink.admit(peer) is None

    def _why_no_member(self, peer: PeerId) -> Refusal | None:
        """Why nothing is relayed for this peer; None for a member. What else it is refused for concerns nobody else."""
        if self._links.sink.admit(peer) is Refusal.BANNED:
            return Refusal.BANNED
        return None if self._is_member(peer) else Refusal.NOT_A_MEMBER

    async def _find_way(self, peer: PeerId) -> None:
        """Make a link to a peer that could not be dialled; raises LinkLost."""
        if not self._is_member(peer):
            raise LinkLost(peer, LinkEnd.NO_ADDRESS)
        try:
            await self.punches.punch(peer)
        except PunchFailed as failed:
            log.debug("%s", failed)
            self.on_failed(peer, failed.failure)
        else:
            self.on_opened(peer, LinkPath.PUNCHED)
            return
        try:
            await self.relayed.link(peer)
        except RelayFailed as failed:
            log.debug("%s", failed)
            self.on_failed(peer, failed.failure)
            raise LinkLost(peer, LinkEnd.UNREACHABLE) from failed
        self.on_opened(peer, LinkPath.RELAYED)


def make_ports(
    membership: Membership, control: ControlPlane, interfaces: InterfaceWatch, changed: Callable[[], None]
) -> ReachPorts:
    """What reachability asks of the daemon's pieces."""
    return ReachPorts(
        live=membership.table.live,
        addresses_of=membership.tensor_addresses_of,
        hosts=lambda: interfaces.now.hosts(),
        seen_hosts=lambda: list_seen_hosts(control),
        changed=changed,
    )


def list_seen_hosts(control: ControlPlane) -> tuple[str, ...]:
    """By which addresses others know this machine on the control plane."""
    addresses = map(parse_address, control.addresses())
    return tuple(dict.fromkeys(one.host for one in addresses if not one.is_relayed))
