"""Looking up and announcing in the DHT. Runs in trio.

Invariants: every look-up ends within LOOKUP_TIMEOUT_S with what it has found until then, over disjoint paths each of
which has an equal part in what is kept; one path begins with peers that this one chose to connect to, so that a routing
table that was filled with liars is got around, and who does not answer leaves the table; what is found of a peer is
bounded and of the form that this project dials; only peers that serve the DHT are asked.
"""

from collections.abc import Iterable, Sequence

import trio
from libp2p.kad_dht.common import PROTOCOL_ID as KAD_PROTOCOL
from libp2p.kad_dht.kad_dht import KadDHT
from libp2p.network.connection.swarm_connection import SwarmConn
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import PeerInfo
from libp2p.peer.peerstore import PeerStoreError
from libp2p.rcmgr import Direction

from shoal.dht.addresses import ADDRESSES_PER_PEER_MAX, Address, keep_dialable, with_peer
from shoal.dht.lookup import PATH_WIDTH, PATHS, Contact, Lookup, Query, deal_seeds, share_out
from shoal.node.control import LOOKUP_TIMEOUT_S, PROVIDERS_MAX, PeerAddresses
from shoal.node.libp2p_dialer import Dialer
from shoal.node.libp2p_lookup import FIND_NODE, GET_PROVIDERS, Answer, DhtClient, OpenStream
from shoal.node.libp2p_stack import BoundedSwarm
from shoal.protocol.errors import ProtocolError
from shoal.protocol.identity import PeerId, decode_libp2p_peer_id, encode_libp2p_peer_id

TELLS_AT_ONCE_MAX = 10
# A peer is found when so many paths agree that it is somewhere.
PATHS_AGREEING = 2


class Discovery:
    """One peer's part in the DHT."""

    def __init__(self, dht: KadDHT, me: PeerId, swarm: BoundedSwarm, dialer: Dialer, open_stream: OpenStream) -> None:
        self._dht = dht
        self._me = me
        self._swarm = swarm
        self._dialer = dialer
        self._met_on_the_way: set[PeerId] = set()  # dialled because others had named them
        self._client = DhtClient(self._connect, open_stream, self._forget)

    async def meet(self, peer_id: ID, protocols: Sequence[str]) -> None:
        """A connected peer has said what it speaks."""
        if KAD_PROTOCOL in protocols:
            await self._dht.add_peer(peer_id)
        else:
            self._dht.routing_table.remove_peer(peer_id)

    async def provide(self, key: bytes) -> bool:
        """Store this peer as a provider of `key` at the nodes closest to it; whether one took it."""
        addresses = self._dht.host.get_addrs()
        self._dht.provider_store.add_provider(key, PeerInfo(libp2p_id(self._me), addresses))
        lookup, told = self._look_up(key), 0
        places = trio.CapacityLimiter(TELLS_AT_ONCE_MAX)

        async def tell(node: Contact) -> None:
            nonlocal told
            async with places:
                told += await self._client.tell(node, key, self._me, addresses)

        with trio.move_on_after(LOOKUP_TIMEOUT_S):
            await self._client.walk(lookup, FIND_NODE, key, lambda query, answer: False)
            async with trio.open_nursery() as telling:
                for node in lookup.closest():
                    telling.start_soon(tell, node)
        return told > 0

    async def find_providers(self, key: bytes) -> tuple[PeerAddresses, ...]:
        """Ask the nodes closest to `key`, and what this one has stored."""
        stored = [_contact(info) for info in self._dht.provider_store.get_providers(key)]
        lookup = self._look_up(key)
        found: list[list[Contact]] = [[one for one in stored if one is not None], *([] for _ in range(lookup.paths))]

        def heed(query: Query, answer: Answer) -> bool:
            found[1 + query.path].extend(answer.providers)
            return False

        with trio.move_on_after(LOOKUP_TIMEOUT_S):
            await self._client.walk(lookup, GET_PROVIDERS, key, heed)
        peers = share_out([[one.peer for one in each if one.peer != self._me] for each in found], PROVIDERS_MAX)
        return tuple(_join(peer, found) for peer in peers)

    async def find_peer(self, peer: PeerId) -> PeerAddresses | None:
        """Where the peer is, if it is connected; or else what the nodes closest to it say."""
        known = Contact(peer=peer, addresses=self._dialer.known_addresses(peer))
        if known.addresses and self._dialer.is_connected(peer):
            return _join(peer, [[known]])
        key = encode_libp2p_peer_id(peer)
        lookup = self._look_up(key)
        found: list[list[Contact]] = [[] for _ in range(lookup.paths)]

        def heed(query: Query, answer: Answer) -> bool:
            found[query.path].extend(one for one in answer.closer if one.peer == peer and one.addresses)
            return sum(map(bool, found)) >= min(PATHS_AGREEING, lookup.paths)

        with trio.move_on_after(LOOKUP_TIMEOUT_S):
            await self._client.walk(lookup, FIND_NODE, key, heed)
        joined = _join(peer, [*found, [known]])
        return joined if joined.addresses else None

    async def _connect(self, peer: PeerId, addresses: Sequence[Address]) -> None:
        if not self._dialer.is_connected(peer):
            self._met_on_the_way = {one for one in self._met_on_the_way if self._dialer.is_connected(one)} | {peer}
        await self._dialer.connect(peer, addresses)

    def _look_up(self, key: bytes) -> Lookup:
        closest = self._dht.routing_table.find_local_closest_peers(key, PATHS * PATH_WIDTH)
        table = [self._contact_of(peer) for peer_id in closest if (peer := ed25519_peer(peer_id)) is not None]
        return Lookup(key, self._me, deal_seeds(key, self._chosen(), table))

    def _chosen(self) -> Iterable[Contact]:
        """Peers that serve the DHT and that this one has dialled: its bootstrap peers and those of its book."""
        for connection in self._swarm.get_connections():
            if not isinstance(connection, SwarmConn) or connection.direction is not Direction.OUTBOUND:
                continue
            peer = ed25519_peer(connection.muxed_conn.peer_id)
            if peer is not None and peer not in self._met_on_the_way and self._serves(connection.muxed_conn.peer_id):
                yield self._contact_of(peer)

    def _serves(self, peer_id: ID) -> bool:
        try:
            return KAD_PROTOCOL in self._swarm.peerstore.get_protocols(peer_id)
        except PeerStoreError:
            return False

    def _contact_of(self, peer: PeerId) -> Contact:
        return Contact(peer=peer, addresses=self._dialer.known_addresses(peer))

    def _forget(self, peer: PeerId) -> None:
        self._dht.routing_table.remove_peer(libp2p_id(peer))


def _contact(info: PeerInfo) -> Contact | None:
    peer = ed25519_peer(info.peer_id)
    return None if peer is None else Contact(peer=peer, addresses=keep_dialable(map(str, info.addrs), peer))


def _join(peer: PeerId, found: Sequence[Sequence[Contact]]) -> PeerAddresses:
    """What the paths say of one peer's addresses, each with an equal part."""
    said = [[text for one in each if one.peer == peer for text in one.addresses] for each in found]
    return PeerAddresses(peer=peer, addresses=with_peer(share_out(said, ADDRESSES_PER_PEER_MAX), peer))


def libp2p_id(peer: PeerId) -> ID:
    """The library's form of a peer id."""
    return ID(encode_libp2p_peer_id(peer))


def ed25519_peer(peer_id: ID) -> PeerId | None:
    """The peer, where it is one of ours: others may use the DHT and are otherwise not there."""
    try:
        return decode_libp2p_peer_id(peer_id.to_bytes())
    except ProtocolError:
        return None
