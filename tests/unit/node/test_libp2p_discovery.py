"""Look-ups in the DHT between real hosts: what liars, made-up nodes and a filled routing table can do to them."""

import asyncio
import hashlib
from collections.abc import AsyncIterator

import pytest
from libp2p.kad_dht.pb.kademlia_pb2 import Message
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import PeerInfo
from multiaddr import Multiaddr

from shoal.dht.keys import provider_key
from shoal.dht.lookup import CLOSER_MAX, Contact
from shoal.node.libp2p_engine import ControlEngine
from shoal.node.libp2p_host import Libp2pHost
from shoal.node.libp2p_lookup import ADDRESSES_READ_MAX, FIND_NODE, GET_PROVIDERS, decode_answer_untrusted
from shoal.protocol.errors import ProtocolError, Refusal
from shoal.protocol.identity import Identity, PeerId, encode_libp2p_peer_id, format_peer_id
from tests.unit.node.control_contract import PATIENCE_S, SWARM, Member, Members

KEY = provider_key(SWARM, 7)
CLOSED_PORT = "/ip4/127.0.0.1/tcp/1"


@pytest.fixture
async def members() -> AsyncIterator[Members]:
    members = Members(Libp2pHost)
    yield members
    await members.stop()


def engine_of(member: Member) -> ControlEngine:
    assert isinstance(member.plane, Libp2pHost)
    return member.plane._running()


def make_id(number: int) -> ID:
    return ID(encode_libp2p_peer_id(Identity(hashlib.sha256(b"%d" % number).digest()).peer))


def made_up(count: int) -> list[PeerInfo]:
    """Peers that do not exist, at an address where nobody answers."""
    return [PeerInfo(make_id(number), [Multiaddr(CLOSED_PORT)]) for number in range(count)]


async def fill_table(member: Member, infos: list[PeerInfo]) -> None:
    """Put these into the member's routing table, as if somebody had got them in there."""
    engine = engine_of(member)

    async def fill() -> None:
        for bucket in engine._dht.routing_table.buckets:
            bucket.peers.clear()
        for info in infos:
            engine._swarm.peerstore.add_addrs(info.peer_id, info.addrs, 3600)
            await engine._dht.routing_table.add_peer(info)

    assert isinstance(member.plane, Libp2pHost)
    await member.plane._thread.call(fill)


async def has_in_table(member: Member, peers: set[ID]) -> set[ID]:
    engine = engine_of(member)

    async def look() -> set[ID]:
        return set(engine._dht.routing_table.get_peer_ids()) & peers

    assert isinstance(member.plane, Libp2pHost)
    return await member.plane._thread.call(look)


def let_lie(member: Member, infos: list[PeerInfo]) -> None:
    """From now on the member says that these are providers of every key, and closest to it."""
    dht = engine_of(member)._dht
    dht.provider_store.get_providers = lambda key: infos
    dht.routing_table.find_local_closest_peers = lambda key, count=20: [info.peer_id for info in infos]
    for info in infos:
        dht.host.get_peerstore().add_addrs(info.peer_id, info.addrs, 3600)


async def know_each_other(members: list[Member]) -> None:
    """Wait until all have all others in their tables."""
    ids = {ID(encode_libp2p_peer_id(member.peer)) for member in members}
    async with asyncio.timeout(PATIENCE_S):
        for member in members:
            while len(await has_in_table(member, ids)) < len(members) - 1:
                await asyncio.sleep(0)


async def connect_all(members: Members, count: int) -> list[Member]:
    made = [members.make() for _ in range(count)]
    await asyncio.gather(*(member.plane.start() for member in made))
    for number, member in enumerate(made):
        for other in made[:number]:
            await member.plane.connect(other.plane.addresses())
    await know_each_other(made)
    return made


async def find_providers(member: Member) -> set[PeerId]:
    return {one.peer for one in await member.plane.find_providers(KEY)}


async def test_a_table_of_peers_that_do_not_exist_is_got_around_and_cleaned(members: Members) -> None:
    hub, provider, seeker = members.make(), members.make(), members.make()
    for member in (hub, provider, seeker):
        await member.plane.start()
    await provider.plane.connect(hub.plane.addresses())
    await seeker.plane.connect(hub.plane.addresses())
    await know_each_other([hub, provider])
    await know_each_other([hub, seeker])
    assert await provider.plane.provide(KEY)
    ghosts = made_up(40)
    await fill_table(seeker, ghosts)
    assert await find_providers(seeker) == {provider.peer}
    asked = {info.peer_id for info in ghosts}
    left = await has_in_table(seeker, asked)
    for _ in range(4):
        assert await find_providers(seeker) == {provider.peer}
        left = await has_in_table(seeker, asked)
    assert not left


async def test_liars_in_the_table_do_not_hide_a_provider(members: Members) -> None:
    _, provider, seeker, *liars = await connect_all(members, 6)
    assert await provider.plane.provide(KEY)
    ghosts = made_up(CLOSER_MAX)
    for liar in liars:
        let_lie(liar, ghosts)
    # The seeker dialled the hub and the provider; all that its table has are liars that dialled the seeker.
    infos = [PeerInfo(ID(encode_libp2p_peer_id(liar.peer)), [Multiaddr(liar.plane.addresses()[0])]) for liar in liars]
    await fill_table(seeker, infos)
    found = await seeker.plane.find_providers(KEY)
    assert provider.peer in {one.peer for one in found}
    # Ghosts are found, too, for nobody signs these records; they have no place in the table.
    assert not await has_in_table(seeker, {info.peer_id for info in ghosts})


async def test_a_peer_is_found_where_it_says_it_is_though_liars_say_otherwise(members: Members) -> None:
    _, target, seeker, *liars = await connect_all(members, 6)
    for liar in liars:
        let_lie(liar, [PeerInfo(ID(encode_libp2p_peer_id(target.peer)), [Multiaddr(CLOSED_PORT)])])
    await seeker.plane.disconnect(target.peer)
    await seeker.find("lost")
    engine_of(seeker)._swarm.peerstore.clear_peerdata(ID(encode_libp2p_peer_id(target.peer)))
    found = await seeker.plane.find_peer(target.peer)
    assert found is not None
    assert target.plane.addresses()[0] in found.addresses
    assert await seeker.plane.connect(found.addresses) == target.peer


async def test_who_only_asks_has_no_place_in_a_table(members: Members) -> None:
    server, asker = members.make(), members.make(serves_dht=False)
    await server.plane.start()
    await asker.plane.start()
    await asker.plane.connect(server.plane.addresses())
    await asker.expect("connected")
    async with asyncio.timeout(PATIENCE_S):
        while not await has_in_table(asker, {ID(encode_libp2p_peer_id(server.peer))}):
            await asyncio.sleep(0)
    assert await asker.plane.provide(KEY)
    assert await find_providers(asker) == set()
    async with asyncio.timeout(PATIENCE_S):
        # For a moment, until identify has told, it may be there.
        while await has_in_table(server, {ID(encode_libp2p_peer_id(asker.peer))}):
            await asyncio.sleep(0)


async def test_a_node_that_answers_too_much_is_forgotten(members: Members) -> None:
    seeker, flooder = await connect_all(members, 2)
    flooder_id = ID(encode_libp2p_peer_id(flooder.peer))

    async def flood(stream: object) -> None:
        from libp2p.network.stream.net_stream import NetStream

        assert isinstance(stream, NetStream)
        await stream.write(b"\xff\xff\x7f" + b"\0" * 1024)

    engine_of(flooder)._host.set_stream_handler("/ipfs/kad/1.0.0", flood)
    assert await find_providers(seeker) == set()
    assert not await has_in_table(seeker, {flooder_id})


def encode_answer(kind: Message.MessageType, peers: list[tuple[bytes, list[bytes]]]) -> bytes:
    message = Message(type=kind, key=KEY)
    for raw_id, addresses in peers:
        for one in (message.closerPeers.add(), message.providerPeers.add()):
            one.id = raw_id
            one.addrs.extend(addresses)
    return message.SerializeToString()


def test_of_an_answer_stays_what_can_be_dialled() -> None:
    peer = Identity(b"p" * 32).peer
    address = "/ip4/127.0.0.1/tcp/4001"
    other = f"{address}/p2p/{format_peer_id(Identity(b'o' * 32).peer)}"
    addresses = [b"", b"\xff\xff", Multiaddr(address).to_bytes(), Multiaddr("/ip4/0.0.0.0/tcp/1").to_bytes()]
    raw = encode_answer(
        GET_PROVIDERS,
        [
            (b"", []),
            (b"\x12\x20" + b"r" * 32, []),
            (encode_libp2p_peer_id(peer), [*addresses, Multiaddr(other).to_bytes()]),
        ],
    )
    answer = decode_answer_untrusted(raw, GET_PROVIDERS)
    assert answer.closer == answer.providers == (Contact(peer=peer, addresses=(address,)),)


def test_an_answer_is_bounded() -> None:
    many = [Multiaddr(f"/ip4/127.0.0.1/tcp/{port}").to_bytes() for port in range(1, 100)]
    peers = [(make_id(number).to_bytes(), many) for number in range(100)]
    answer = decode_answer_untrusted(encode_answer(FIND_NODE, peers), FIND_NODE)
    assert len(answer.closer) == len(answer.providers) == CLOSER_MAX
    assert max(len(one.addresses) for one in answer.closer) <= ADDRESSES_READ_MAX


@pytest.mark.parametrize("raw", [b"\xff", b"\x08\x05", encode_answer(FIND_NODE, [])])
def test_what_is_no_answer_is_refused(raw: bytes) -> None:
    with pytest.raises(ProtocolError) as caught:
        decode_answer_untrusted(raw, GET_PROVIDERS)
    assert caught.value.refusal in (Refusal.MALFORMED, Refusal.UNKNOWN_TYPE)
