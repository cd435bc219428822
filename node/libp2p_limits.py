"""What py-libp2p 0.8.1 may read and keep for others, where it has no cap of its own, or too wide a one.

| what a peer sends | the library | here |
|---|---|---|
| a line of multistream-select, before anybody is known | any length, 6 MiB in practice | MULTISTREAM_BYTES_MAX |
| identify and its push | 1 MiB; an answer past it is read to its end, however long | IDENTIFY_BYTES_MAX, and a reset |
| addresses and protocols of one peer | all that it ever named, compared one by one | ADDRESSES_MAX, PROTOCOLS_MAX |
| a message of kad-dht | 4 MiB, and a stream may stay silent for ever | DHT_MESSAGE_BYTES_MAX, DHT_SILENCE_S |
| streams of kad-dht | 12 for all peers: one can hold them all | DHT_STREAMS_MAX, DHT_STREAMS_PER_PEER_MAX |

Capped elsewhere: frames of Noise (64 KiB by their format), of Yamux (node/libp2p_connections.py), of gossip
(node/libp2p_stack.py), of relays (node/libp2p_hop.py), of this project's own protocols (node/libp2p_streams.py).

Most readers are functions that the library's modules have imported by name; `cap_readers` puts others under these
names, once for the process. Imported only in a process that starts a host: importing libp2p takes a second.
"""

import collections
from collections.abc import Sequence
from typing import Any

import libp2p.host.basic_host
import libp2p.identity.identify_push.identify_push
import libp2p.kad_dht.kad_dht
import libp2p.kad_dht.peer_routing
import libp2p.kad_dht.provider_store
import libp2p.kad_dht.value_store
import libp2p.protocol_muxer.multiselect_communicator
import trio
from libp2p.abc import INetStream
from libp2p.exceptions import ParseError
from libp2p.io.abc import Reader
from libp2p.io.exceptions import IncompleteReadError, IOException
from libp2p.kad_dht.kad_dht import KadDHT
from libp2p.peer.id import ID
from libp2p.peer.peerstore import PeerStore
from libp2p.utils.varint import read_varint_prefixed_bytes_limited
from multiaddr import Multiaddr

MULTISTREAM_BYTES_MAX = 1024
IDENTIFY_BYTES_MAX = 16 * 1024
ADDRESSES_MAX = 32
PROTOCOLS_MAX = 64
DHT_MESSAGE_BYTES_MAX = 64 * 1024
DHT_SILENCE_S = 10.0
DHT_STREAMS_MAX = 48
DHT_STREAMS_PER_PEER_MAX = 8


async def read_line(reader: Reader) -> bytes:
    """A line of multistream-select without its end; raises ParseError or IOException."""
    line = await read_varint_prefixed_bytes_limited(reader, MULTISTREAM_BYTES_MAX)
    if not line.endswith(b"\n"):
        raise ParseError("a line of multistream-select has no end")
    return line[:-1]


async def read_identify(stream: INetStream, use_varint_format: bool = True, max_length: int = 0) -> bytes:
    """The bytes of an identify message. A stream that brings no such thing is reset, for the library would read it on
    to its end as a message of an older kind."""
    try:
        return await read_varint_prefixed_bytes_limited(stream, IDENTIFY_BYTES_MAX)
    except (ParseError, IOException):
        await stream.reset()
        raise


async def read_dht_message(stream: INetStream, max_length: int) -> bytes:
    """A message of kad-dht; raises MessageTooLarge, or IncompleteReadError where none comes in time."""
    with trio.move_on_after(DHT_SILENCE_S):
        return await read_varint_prefixed_bytes_limited(stream, min(max_length, DHT_MESSAGE_BYTES_MAX))
    raise IncompleteReadError("no message came in time", expected_bytes=1, received_bytes=0)


def cap_readers() -> None:
    """Put these readers under the names by which the library calls its own. Doing it again changes nothing."""
    multiselect: Any = libp2p.protocol_muxer.multiselect_communicator
    multiselect.read_delim = read_line
    identify: tuple[Any, ...] = (libp2p.host.basic_host, libp2p.identity.identify_push.identify_push)
    for module in identify:
        module.read_length_prefixed_protobuf = read_identify
    dht: tuple[Any, ...] = (
        libp2p.kad_dht.kad_dht,
        libp2p.kad_dht.peer_routing,
        libp2p.kad_dht.provider_store,
        libp2p.kad_dht.value_store,
    )
    for module in dht:
        module.read_varint_prefixed_bytes_limited = read_dht_message


class BoundedPeerStore(PeerStore):
    """A peer store that keeps the newest ADDRESSES_MAX addresses and PROTOCOLS_MAX protocols of a peer."""

    def add_addrs(self, peer_id: ID, addrs: Sequence[Multiaddr], ttl: int = 0) -> None:
        super().add_addrs(peer_id, list(addrs)[:ADDRESSES_MAX], ttl)
        known = self.peer_data_map.get(peer_id)
        if known is not None:
            del known.addrs[: max(0, len(known.addrs) - ADDRESSES_MAX)]

    def add_protocols(self, peer_id: ID, protocols: Sequence[str]) -> None:
        known = self.peer_data_map.get(peer_id)
        room = PROTOCOLS_MAX - (len(known.get_protocols()) if known is not None else 0)
        super().add_protocols(peer_id, list(protocols)[: max(0, room)])

    def set_protocols(self, peer_id: ID, protocols: Sequence[str]) -> None:
        super().set_protocols(peer_id, list(protocols)[:PROTOCOLS_MAX])


class BoundedDht(KadDHT):
    """A DHT node of which no peer holds more than DHT_STREAMS_PER_PEER_MAX streams."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._streams_of: collections.Counter[ID] = collections.Counter()
        super().__init__(*args, **kwargs)
        self._inbound_limiter = trio.CapacityLimiter(DHT_STREAMS_MAX)

    async def handle_stream(self, stream: INetStream) -> None:
        peer_id = stream.muxed_conn.peer_id
        if self._streams_of[peer_id] >= DHT_STREAMS_PER_PEER_MAX:
            await stream.reset()
            return
        self._streams_of[peer_id] += 1
        try:
            await super().handle_stream(stream)
        finally:
            self._streams_of[peer_id] -= 1
            if not self._streams_of[peer_id]:
                del self._streams_of[peer_id]
