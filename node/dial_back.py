"""What this peer tells a member about that member's tensor port: whether its addresses can be dialled from here, and by
which address this peer sees one of its links.

Invariants: only members are served; one dial-back of a peer at a time, and none sooner than PERIOD_S after the last;
at most AT_ONCE_MAX at all, each of them within TIMEOUT_S; what is dialled never carries more than a handshake.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from shoal.node.allowances import Allowances
from shoal.node.endpoints import format_endpoint, parse_endpoint_untrusted
from shoal.node.link_port import LinkLost
from shoal.node.links import TensorLinks
from shoal.protocol.errors import ProtocolError, Refusal
from shoal.protocol.identity import PeerId
from shoal.protocol.messages import GetObserved, ObservedAnswer, ProbeAddresses, ProbeAnswer

PERIOD_S = 1.0
AT_ONCE_MAX = 8
TIMEOUT_S = 6.0  # of one address; less than a request may take
PEERS_MAX = 1024


@dataclass(slots=True, kw_only=True)
class DialBack:
    """All calls on the event loop. `is_member` says whether a peer of the swarm is in sight."""

    links: TensorLinks
    is_member: Callable[[PeerId], bool]
    now: Callable[[], float]
    _begun: Allowances[PeerId] = field(
        default_factory=lambda: Allowances(burst=1, per_s=1 / PERIOD_S, keys_max=PEERS_MAX)
    )
    _running: set[PeerId] = field(default_factory=set)

    async def probe(self, peer: PeerId, question: ProbeAddresses) -> ProbeAnswer:
        """Dial every address anew; an open link would say nothing about that. Raises ProtocolError."""
        self._admit(peer)
        self._running.add(peer)
        try:
            dials = (self._probe(peer, text) for text in question.addresses)
            return ProbeAnswer(reached=tuple(await asyncio.gather(*dials)))
        finally:
            self._running.discard(peer)

    def tell_observed(self, peer: PeerId, question: GetObserved) -> ObservedAnswer:
        """By which address this peer sees that link of theirs; empty when there is no such link."""
        remote = self.links.find_remote(peer, question.binding)
        return ObservedAnswer(address="" if remote is None else format_endpoint(remote))

    def _admit(self, peer: PeerId) -> None:
        if not self.is_member(peer):
            raise ProtocolError(Refusal.NOT_A_MEMBER, "only members are dialled back")
        if peer in self._running or len(self._running) >= AT_ONCE_MAX:
            raise ProtocolError(Refusal.LIMIT, f"{len(self._running)} dial-backs are running")
        if not self._begun.take(peer, self.now()):
            raise ProtocolError(Refusal.LIMIT, f"one dial-back in {PERIOD_S:g} s")

    async def _probe(self, peer: PeerId, text: str) -> bool | None:
        address = parse_endpoint_untrusted(text)
        if address is None:
            return None
        try:
            async with asyncio.timeout(TIMEOUT_S):
                return await self.links.probe(peer, address)
        except TimeoutError:
            return False
        except LinkLost:
            return None  # a limit of this peer says nothing about the other one
