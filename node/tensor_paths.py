"""How tensor links come about: where this peer can be dialled, and what it does for others that want to know.

The one piece that the daemon wires; everything behind it has a module of its own.
"""

from shoal.dht.addresses import parse_address
from shoal.node.config import TensorTable
from shoal.node.control import ControlPlane
from shoal.node.dial_back import DialBack
from shoal.node.link_port import Address
from shoal.node.links import TensorLinks
from shoal.node.reach import Reach, ReachPorts
from shoal.protocol.errors import ProtocolError, Refusal
from shoal.protocol.identity import PeerId
from shoal.protocol.messages import GetObserved, ProbeAddresses


class TensorPaths:
    """All calls on the event loop. `bound` is what the tensor links listen on."""

    def __init__(
        self,
        swarm: bytes,
        config: TensorTable,
        bound: Address,
        control: ControlPlane,
        links: TensorLinks,
        ports: ReachPorts,
    ) -> None:
        self.reach = Reach(swarm, config, bound, control, links, ports)
        self.dial_back = DialBack(links=links, is_member=lambda peer: peer in ports.live(), now=ports.now)

    async def answer(self, peer: PeerId, question: object) -> object:
        """The answer to a member's question; raises ProtocolError."""
        match question:
            case ProbeAddresses():
                return await self.dial_back.probe(peer, question)
            case GetObserved():
                return self.dial_back.tell_observed(peer, question)
            case _:
                raise ProtocolError(Refusal.UNKNOWN_TYPE, f"{type(question).__name__} is no question")


def list_seen_hosts(control: ControlPlane) -> tuple[str, ...]:
    """By which addresses others know this machine on the control plane."""
    addresses = map(parse_address, control.addresses())
    return tuple(dict.fromkeys(one.host for one in addresses if not one.is_relayed))
