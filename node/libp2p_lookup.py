"""Questions to DHT nodes, and look-ups made of them. Runs in trio.

The DHT's messages are py-libp2p's; its look-ups are not used: they follow one path, heed whatever is named by anybody,
keep it as a known address and in the routing table, and dial without a limit of their own.

Invariants: an answer is read up to MESSAGE_BYTES_MAX, and of it so many nodes and addresses as a look-up takes; a node
is asked for QUERY_TIMEOUT_S at most, dialling included; who does not answer leaves the routing table, and nobody enters
it because others have named it.
"""

from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import trio
from google.protobuf.message import DecodeError
from libp2p.abc import INetStream
from libp2p.custom_types import TProtocol
from libp2p.kad_dht.common import PROTOCOL_ID as KAD_PROTOCOL
from libp2p.kad_dht.pb.kademlia_pb2 import Message
from multiaddr import Multiaddr

from shoal.dht.addresses import Address, keep_dialable, parse_address
from shoal.dht.lookup import CLOSER_MAX, Contact, Lookup, Query
from shoal.node.libp2p_connections import format_multiaddr_untrusted, undisturbed
from shoal.node.libp2p_streams import STREAM_ERRORS, FrameReader, encode_frame
from shoal.protocol.errors import ProtocolError, Refusal, ShoalError
from shoal.protocol.identity import PeerId, decode_libp2p_peer_id, encode_libp2p_peer_id

QUERY_TIMEOUT_S = 5.0
MESSAGE_BYTES_MAX = 128 * 1024
# Of one node, before those are dropped that cannot be dialled.
ADDRESSES_READ_MAX = 16
END_TIMEOUT_S = 2.0

FIND_NODE, GET_PROVIDERS, ADD_PROVIDER = Message.FIND_NODE, Message.GET_PROVIDERS, Message.ADD_PROVIDER

OpenStream = Callable[[PeerId, TProtocol], Awaitable[INetStream]]
T = TypeVar("T")

_QUERY_ERRORS = (*STREAM_ERRORS, ShoalError, trio.TooSlowError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a node said: nodes closer to the key, and providers of it."""

    closer: tuple[Contact, ...]
    providers: tuple[Contact, ...]


class DhtClient:
    """Asks DHT nodes. `connect` and `open_stream` are those of the host, `forget` is told who did not answer."""

    def __init__(
        self,
        connect: Callable[[PeerId, Sequence[Address]], Awaitable[None]],
        open_stream: OpenStream,
        forget: Callable[[PeerId], None],
    ) -> None:
        self._connect = connect
        self._open_stream = open_stream
        self._forget = forget

    async def walk(
        self,
        lookup: Lookup,
        kind: Message.MessageType,
        key: bytes,
        heed: Callable[[Query, Answer], bool],
    ) -> None:
        """Ask until the look-up is over, or `heed` has heard enough and returns True."""
        async with trio.open_nursery() as asking:
            for query in lookup.poll():
                asking.start_soon(self._run, asking, lookup, query, kind, key, heed)

    async def _run(
        self,
        asking: trio.Nursery,
        lookup: Lookup,
        query: Query,
        kind: Message.MessageType,
        key: bytes,
        heed: Callable[[Query, Answer], bool],
    ) -> None:
        try:
            with trio.fail_after(QUERY_TIMEOUT_S):
                answer = await self._ask(query.contact, kind, key)
        except _QUERY_ERRORS:
            self._forget(query.contact.peer)
            lookup.note_failure(query)
        else:
            lookup.note_answer(query, answer.closer)
            if heed(query, answer):
                asking.cancel_scope.cancel()
                return
        for following in lookup.poll():
            asking.start_soon(self._run, asking, lookup, following, kind, key, heed)

    async def tell(self, contact: Contact, key: bytes, me: PeerId, addresses: Iterable[Multiaddr]) -> bool:
        """Announce this peer as a provider to one node; whether it could be told. (Not every node answers.)"""
        message = Message(type=ADD_PROVIDER, key=key)
        own = message.providerPeers.add()
        own.id = encode_libp2p_peer_id(me)
        own.addrs.extend(address.to_bytes() for address in addresses)
        try:
            with trio.fail_after(QUERY_TIMEOUT_S):
                stream = await self._open(contact)
                await self._end(stream, stream.write(encode_frame(message.SerializeToString())))
        except _QUERY_ERRORS:
            self._forget(contact.peer)
            return False
        return True

    async def _ask(self, contact: Contact, kind: Message.MessageType, key: bytes) -> Answer:
        stream = await self._open(contact)

        async def exchange() -> bytes:
            question = Message(key=key)
            question.type = kind
            await stream.write(encode_frame(question.SerializeToString()))
            return await FrameReader(stream, MESSAGE_BYTES_MAX).read() or b""

        return decode_answer_untrusted(await self._end(stream, exchange()), kind)

    async def _open(self, contact: Contact) -> INetStream:
        await self._connect(contact.peer, [parse_address(text) for text in contact.addresses])
        return await self._open_stream(contact.peer, KAD_PROTOCOL)

    async def _end(self, stream: INetStream, using: Awaitable[T]) -> T:
        is_done = False
        try:
            result = await using
            is_done = True
        finally:
            with undisturbed(END_TIMEOUT_S):
                await (stream.close() if is_done else stream.reset())
        return result


def decode_answer_untrusted(raw: bytes, kind: Message.MessageType) -> Answer:
    """The answer in these bytes; raises ProtocolError. Of the nodes in it those stay that this project can dial."""
    try:
        message = Message.FromString(raw)
    except DecodeError as error:
        raise ProtocolError(Refusal.MALFORMED, "no message of the DHT") from error
    if message.type != kind:
        raise ProtocolError(Refusal.UNKNOWN_TYPE, f"a DHT message of type {message.type}, not {kind}")
    return Answer(closer=_contacts(message.closerPeers), providers=_contacts(message.providerPeers))


def _contacts(peers: Iterable[Message.Peer]) -> tuple[Contact, ...]:
    contacts: list[Contact] = []
    for one in islice(peers, CLOSER_MAX):
        try:
            peer = decode_libp2p_peer_id(one.id)
        except ProtocolError:
            continue
        texts = (text for raw in islice(one.addrs, ADDRESSES_READ_MAX) if (text := format_multiaddr_untrusted(raw)))
        contacts.append(Contact(peer=peer, addresses=keep_dialable(texts, peer)))
    return tuple(contacts)
