"""Whether others can dial this peer's tensor port: only who can be dialled may own parts of a reduction.

A link that somebody else dialled proves it; until there is one, other peers are asked to try.
"""

import asyncio
import logging
from collections.abc import Callable

from shoal.node.control import ControlPlane, PeerUnreachable, RequestRefused
from shoal.node.links import TensorLinks
from shoal.protocol.errors import ProtocolError
from shoal.protocol.identity import PeerId
from shoal.protocol.messages import CheckReach, ReachAnswer, decode_message_untrusted, encode_message

PERIOD_S = 2.0
ASKED_MAX = 3

log = logging.getLogger(__name__)


class Reach:
    """`reached` turns true once and stays so: an address that changes is a new start of the links."""

    def __init__(
        self, swarm: bytes, control: ControlPlane, links: TensorLinks, live: Callable[[], tuple[PeerId, ...]]
    ) -> None:
        self.reached = False
        self._swarm = swarm
        self._control = control
        self._links = links
        self._live = live

    async def watch(self, on_reached: Callable[[], None]) -> None:
        """Ask until the port is known to be reachable."""
        while not self._links.accepted:
            answers = [await self._ask(peer) for peer in self._live()[:ASKED_MAX]]
            if any(answers):
                break
            await asyncio.sleep(PERIOD_S)
        self.reached = True
        on_reached()

    async def _ask(self, peer: PeerId) -> bool:
        try:
            raw = await self._control.request(peer, encode_message(self._swarm, CheckReach()))
            answer = decode_message_untrusted(self._swarm, raw)
        except (PeerUnreachable, RequestRefused, ProtocolError) as error:
            log.debug("no reachability check: %s", error)
            return False
        return isinstance(answer, ReachAnswer) and answer.known and answer.reached
