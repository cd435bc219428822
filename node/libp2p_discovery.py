"""Looking up and announcing in the DHT. Runs in trio.

Invariants: every look-up ends within LOOKUP_TIMEOUT_S with what it has found until then; what is found of a peer is
bounded and of the form that this project dials; only peers that serve the DHT are asked.
"""

from collections.abc import Sequence

import trio
from libp2p.kad_dht.common import PROTOCOL_ID as KAD_PROTOCOL
from libp2p.kad_dht.kad_dht import KadDHT
from libp2p.peer.id import ID
from multiaddr import Multiaddr

from shoal.dht.addresses import keep_dialable
from shoal.node.control import LOOKUP_TIMEOUT_S, PROVIDERS_MAX, PeerAddresses
from shoal.protocol.errors import ProtocolError
from shoal.protocol.identity import PeerId, decode_libp2p_peer_id, encode_libp2p_peer_id, format_peer_id

PROVIDER_QUERIES_MAX = 10


class Discovery:
    """One peer's part in the DHT."""

    def __init__(self, dht: KadDHT, me: PeerId) -> None:
        self._dht = dht
        self._me = me

    async def meet(self, peer_id: ID, protocols: Sequence[str]) -> None:
        """A connected peer has said what it speaks."""
        if KAD_PROTOCOL in protocols:
            await self._dht.add_peer(peer_id)
        else:
            self._dht.routing_table.remove_peer(peer_id)

    async def provide(self, key: bytes) -> bool:
        """Store this peer as a provider of `key` at the nodes closest to it; whether one took it."""
        stored = False
        with trio.move_on_after(LOOKUP_TIMEOUT_S):
            stored = await self._dht.provider_store.provide(key)
        # When to announce what again is the daemon's schedule; the library would do so for ever.
        self._dht.provider_store.providing_keys.discard(key)
        return stored

    async def find_providers(self, key: bytes) -> tuple[PeerAddresses, ...]:
        """Ask the nodes closest to `key`. (The library's own look-up is content with what this node has stored.)"""
        found: dict[PeerId, tuple[str, ...]] = {}

        def add(peer_id: ID, addresses: Sequence[Multiaddr]) -> None:
            peer = ed25519_peer(peer_id)
            if peer is not None and peer != self._me and (peer in found or len(found) < PROVIDERS_MAX):
                found[peer] = keep_dialable((*found.get(peer, ()), *map(str, addresses)), peer)

        async def query(node: ID) -> None:
            async with places:
                providers, _ = await self._dht.provider_store._get_providers_from_peer_with_closers(node, key)
            for provider in providers:
                add(provider.peer_id, provider.addrs)

        for stored in self._dht.provider_store.get_providers(key):
            add(stored.peer_id, stored.addrs)
        places = trio.CapacityLimiter(PROVIDER_QUERIES_MAX)
        with trio.move_on_after(LOOKUP_TIMEOUT_S):
            closest = await self._dht.peer_routing.find_closest_peers_network(key)
            async with trio.open_nursery() as queries:
                for node in closest:
                    queries.start_soon(query, node)
        return tuple(PeerAddresses(peer=peer, addresses=with_peer(texts, peer)) for peer, texts in found.items())

    async def find_peer(self, peer: PeerId) -> PeerAddresses | None:
        """Ask the nodes closest to `peer` for its addresses."""
        texts: tuple[str, ...] = ()
        with trio.move_on_after(LOOKUP_TIMEOUT_S):
            found = await self._dht.peer_routing.find_peer(libp2p_id(peer))
            texts = keep_dialable(map(str, found.addrs), peer) if found is not None else ()
        return PeerAddresses(peer=peer, addresses=with_peer(texts, peer)) if texts else None


def libp2p_id(peer: PeerId) -> ID:
    """The library's form of a peer id."""
    return ID(encode_libp2p_peer_id(peer))


def ed25519_peer(peer_id: ID) -> PeerId | None:
    """The peer, where it is one of ours: others may use the DHT and are otherwise not there."""
    try:
        return decode_libp2p_peer_id(peer_id.to_bytes())
    except ProtocolError:
        return None


def with_peer(texts: Sequence[str], peer: PeerId) -> tuple[str, ...]:
    """The addresses, each with the peer's id."""
    tail = f"/p2p/{format_peer_id(peer)}"
    return tuple(dict.fromkeys(text if text.endswith(tail) else text + tail for text in texts))
