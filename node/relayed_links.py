"""The ends of a relayed tensor link: two members that can neither dial nor punch each other connect to a third one,
which passes their bytes on (node/tensor_relay.py).

Whoever wants the link asks a member that announces a tensor port; that member calls the other one. Both then connect to
it, and make a link of the connection as of any other one: the handshake is from end to end, so each has proven itself
to the other and the member between them has nothing but sealed bytes. Who asked is the dialer of the handshake.

Both ends try the same members in the same order, so that two who ask at once ask the same one, and it makes one link of
it. A member that has failed, and the one whose relaying ended last, come after the others.

Invariants: at most RELAYS_TRIED_MAX members are asked, within TIMEOUT_S; after a failure the peer has a pause; nobody
makes this peer connect anywhere but to a member's announced addresses, CALLS_MAX times at once.
"""

import asyncio
import logging
import socket
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from blake3 import blake3

from shoal.node.allowances import Allowances
from shoal.node.control import ControlPlane, PeerUnreachable, RequestRefused
from shoal.node.link_port import Address, LinkEnd, LinkLost, LinkPath
from shoal.node.link_race import race, resolve
from shoal.node.links import TensorLinks
from shoal.node.pauses import Pauses
from shoal.node.splice import MAGIC
from shoal.protocol.errors import Failure, ProtocolError, Refusal, ShoalError
from shoal.protocol.identity import PeerId, short_peer_id
from shoal.protocol.messages import (
    AskRelay,
    Presence,
    RelayCall,
    RelayTicket,
    decode_message_untrusted,
    encode_message,
)

RELAYS_TRIED_MAX = 3
ASK_TIMEOUT_S = 5.0  # the member calls the other one meanwhile
JOIN_TIMEOUT_S = 5.0  # from the connection to the proven link
TIMEOUT_S = 12.0  # of all tries
PAUSE_S = 15.0  # after a failure, for the same peer
SHUN_S = 60.0  # a member that has failed comes last for so long
CALLS_MAX = 16
CALLS_BURST = 16  # of one member at once
CALLS_PER_S = 0.5  # and for long
PEERS_MAX = 1024

log = logging.getLogger(__name__)


class RelayFailed(ShoalError):
    """No relayed link to `peer`; `failure` says why. An expected event."""

    def __init__(self, peer: PeerId, failure: Failure, detail: str = "") -> None:
        super().__init__(f"no relayed link to {short_peer_id(peer)}: {failure}" + (f" ({detail})" if detail else ""))
        self.failure = failure


@dataclass(frozen=True, slots=True, kw_only=True)
class RelayedPorts:
    """What the ends need of the daemon."""

    is_member: Callable[[PeerId], bool]
    live: Callable[[], Mapping[PeerId, Presence]]
    addresses_of: Callable[[PeerId], tuple[Address, ...]]
    now: Callable[[], float]


class RelayedLinks:
    """All calls on the event loop."""

    def __init__(
        self, me: PeerId, swarm: bytes, control: ControlPlane, links: TensorLinks, ports: RelayedPorts
    ) -> None:
        self._me = me
        self._swarm = swarm
        self._control = control
        self._links = links
        self._ports = ports
        self._called: set[PeerId] = set()  # whose link is being made because a member has called
        self._calls: Allowances[PeerId] = Allowances(burst=CALLS_BURST, per_s=CALLS_PER_S)
        self._pauses: Pauses[PeerId] = Pauses(first_s=PAUSE_S, keys_max=PEERS_MAX)
        self._shunned: Pauses[PeerId] = Pauses(first_s=SHUN_S, keys_max=PEERS_MAX)  # members that have not relayed
        self._last: OrderedDict[PeerId, PeerId] = OrderedDict()  # through whom a peer was linked last

    def forget_pauses(self) -> None:
        """What failed may work now: this peer's addresses have changed."""
        self._pauses.clear()
        self._shunned.clear()

    # -- the side that wants a link ----------------------------------------------------------------------------------

    async def link(self, peer: PeerId) -> None:
        """Make a link to `peer`; raises RelayFailed."""
        if self._pauses.has(peer, self._ports.now()):
            raise RelayFailed(peer, Failure.RELAY_PAUSED)
        try:
            async with asyncio.timeout(TIMEOUT_S):
                await self._link(peer)
        except TimeoutError:
            self._pauses.begin(peer, self._ports.now())
            raise RelayFailed(peer, Failure.RELAY_TIMEOUT) from None
        except RelayFailed:
            self._pauses.begin(peer, self._ports.now())
            raise
        self._pauses.end(peer)

    async def _link(self, peer: PeerId) -> None:
        if peer in self._called and await self._wait_linked(peer):
            return
        failed = RelayFailed(peer, Failure.NO_RELAY)
        for relay in self._rank(peer)[:RELAYS_TRIED_MAX]:
            try:
                await self._link_through(relay, peer)
            except RelayFailed as error:
                failed = error
                log.info("%s has not relayed: %s", short_peer_id(relay), error)
                self._shunned.begin(relay, self._ports.now())
            else:
                return
        raise failed

    def _rank(self, peer: PeerId) -> list[PeerId]:
        """Whom to ask, the first one first: the same for both ends, as far as they know the same."""
        pair = b"".join(sorted((self._me, peer)))
        now = self._ports.now()

        def rank(relay: PeerId) -> tuple[bool, bool, bytes]:
            digest = blake3(pair + relay, derive_key_context="shoal tensor relay rank").digest()
            return self._shunned.has(relay, now), relay == self._last.get(peer), digest

        live = self._ports.live()
        able = [one for one in live if one not in (self._me, peer) and self._ports.addresses_of(one)]
        return sorted(able, key=rank)

    async def _link_through(self, relay: PeerId, peer: PeerId) -> None:
        try:
            raw = await self._control.request(relay, encode_message(self._swarm, AskRelay(peer=peer)), ASK_TIMEOUT_S)
            ticket = decode_message_untrusted(self._swarm, raw)
        except RequestRefused as error:
            # A duplicate: the other end has asked, too, and was first. The link comes from there.
            if error.refusal is Refusal.DUPLICATE and await self._wait_linked(peer):
                return
            raise RelayFailed(peer, Failure.RELAY_REFUSED, error.refusal) from error
        except PeerUnreachable as error:
            raise RelayFailed(peer, error.failure, error.detail) from error
        except ProtocolError as error:
            raise RelayFailed(peer, Failure.RELAY_REFUSED, error.refusal) from error
        if not isinstance(ticket, RelayTicket):
            raise RelayFailed(peer, Failure.RELAY_REFUSED, type(ticket).__name__)
        try:
            await self._join(relay, peer, ticket.token, dialer=True)
        except LinkLost as lost:
            raise RelayFailed(peer, Failure.RELAY_LOST, lost.reason) from lost

    async def _wait_linked(self, peer: PeerId) -> bool:
        """Whether the other end has made the link."""
        try:
            async with asyncio.timeout(JOIN_TIMEOUT_S):
                await self._links.wait_linked(peer, relayed=True)
        except TimeoutError:
            return False
        return True

    # -- the side that is called -------------------------------------------------------------------------------------

    def take_call(self, relay: PeerId, call: RelayCall) -> RelayTicket:
        """A member will pass on what the named peer sends; raises ProtocolError where this peer does not take part."""
        if not self._ports.is_member(relay) or not self._ports.is_member(call.peer):
            raise ProtocolError(Refusal.NOT_A_MEMBER, "relayed links are for members")
        if call.peer in (self._me, relay):
            raise ProtocolError(Refusal.MALFORMED, "a relayed link is to a third peer")
        if not self._ports.addresses_of(relay):
            raise ProtocolError(Refusal.NOT_READY, "no address to connect to")
        if (
            call.peer in self._called
            or len(self._called) >= CALLS_MAX
            or not self._calls.take(relay, self._ports.now())
        ):
            raise ProtocolError(Refusal.LIMIT, f"{len(self._called)} relayed links are being made")
        self._called.add(call.peer)
        self._links.spawn(self._follow(relay, call))
        return RelayTicket(token=call.token)

    async def _follow(self, relay: PeerId, call: RelayCall) -> None:
        try:
            await self._join(relay, call.peer, call.token, dialer=False)
        except LinkLost as lost:
            log.debug("called by %s: %s", short_peer_id(relay), lost)
        finally:
            self._called.discard(call.peer)

    # -- both --------------------------------------------------------------------------------------------------------

    async def _join(self, relay: PeerId, peer: PeerId, token: bytes, *, dialer: bool) -> None:
        """Connect to the relaying member, name the token, and make a link of it; raises LinkLost."""
        self._last[peer] = relay
        self._last.move_to_end(peer)
        if len(self._last) > PEERS_MAX:
            self._last.popitem(last=False)
        try:
            async with asyncio.timeout(JOIN_TIMEOUT_S):
                connection = await self._connect(relay)
                try:
                    await asyncio.get_running_loop().sock_sendall(connection, MAGIC + token)
                except (OSError, asyncio.CancelledError):
                    connection.close()
                    raise
                await self._links.adopt(connection, peer, dialer=dialer, path=LinkPath.RELAYED)
        except (OSError, TimeoutError) as error:
            raise LinkLost(peer, LinkEnd.UNREACHABLE) from error

    async def _connect(self, relay: PeerId) -> socket.socket:
        config = self._links.config
        found = await resolve(self._ports.addresses_of(relay), config.addresses_tried_max, config.connect_timeout_s)
        if not found or self._links.is_full:
            raise LinkLost(relay, LinkEnd.LIMIT if found else LinkEnd.NO_ADDRESS)
        return await race(
            found, lambda address: _dial(relay, address), config.head_start_s, discard=socket.socket.close
        )


async def _dial(relay: PeerId, address: Address) -> socket.socket:
    connection = socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET, socket.SOCK_STREAM)
    connection.setblocking(False)
    try:
        await asyncio.get_running_loop().sock_connect(connection, address)
    except OSError as error:
        connection.close()
        raise LinkLost(relay, LinkEnd.UNREACHABLE) from error
    except asyncio.CancelledError:
        connection.close()
        raise
    return connection
