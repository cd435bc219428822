"""The bounds that py-libp2p's parts are given."""

import asyncio
from collections.abc import Iterator

import pytest
import trio
from libp2p.kad_dht.pb.kademlia_pb2 import Message
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import PeerInfo
from libp2p.records.utils import InvalidRecordType
from multiaddr import Multiaddr

from shoal.node import libp2p_stack
from shoal.node.control import ControlConfig
from shoal.node.libp2p_connections import Contained
from shoal.node.libp2p_stack import (
    ADDRESSES_PER_PROVIDER_MAX,
    PROVIDED_KEYS_MAX,
    SEEN_MESSAGES_TTL_S,
    BoundedProviders,
    SeenMessages,
    build_dht,
    build_host,
    forget_strangers,
)
from shoal.protocol.identity import Identity, encode_libp2p_peer_id

CONFIG = ControlConfig(identity=Identity(b"c" * 32), swarm=bytes(32), listen=("/ip4/127.0.0.1/tcp/0",))


class FakeClock:
    """The module's `time`, as it is told."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeClock]:
    clock = FakeClock()
    monkeypatch.setattr(libp2p_stack, "time", clock)
    yield clock


def peer_id(number: int) -> ID:
    return ID(encode_libp2p_peer_id(Identity(number.to_bytes(32, "big")).peer))


def test_a_message_is_seen_until_its_time_is_over(clock: FakeClock) -> None:
    seen = SeenMessages()
    assert seen.add(b"a") and not seen.add(b"a") and seen.has(b"a")
    clock.now_s += SEEN_MESSAGES_TTL_S + 1
    assert not seen.has(b"a") and seen.add(b"a")


def test_seen_messages_are_bounded_and_expire_without_a_sweeper(
    clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(libp2p_stack, "SEEN_MESSAGES_MAX", 3)
    seen = SeenMessages()
    for key in (b"a", b"b", b"c", b"d"):
        seen.add(key)
    assert seen.length() == 3 and not seen.has(b"a") and seen.has(b"d")
    clock.now_s += SEEN_MESSAGES_TTL_S + 1
    seen.add(b"e")
    assert seen.length() == 1


def test_provider_records_are_bounded() -> None:
    async def fill() -> BoundedProviders:
        host, _ = build_host(CONFIG, list)
        providers = build_dht(host, serves=True).provider_store
        assert isinstance(providers, BoundedProviders)
        addresses = [Multiaddr(f"/ip4/1.2.3.4/tcp/{port}") for port in range(1, 100)]
        for number in range(PROVIDED_KEYS_MAX + 10):
            providers.add_provider(number.to_bytes(4, "big"), PeerInfo(peer_id(1), addresses))
        return providers

    providers = trio.run(fill)
    assert len(providers.providers) == PROVIDED_KEYS_MAX
    assert providers.get_providers((0).to_bytes(4, "big")) == []
    (newest,) = providers.get_providers((PROVIDED_KEYS_MAX + 9).to_bytes(4, "big"))
    assert len(newest.addrs) == ADDRESSES_PER_PROVIDER_MAX


def test_known_peers_are_bounded_and_the_node_itself_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libp2p_stack, "KNOWN_PEERS_MAX", 10)

    async def fill() -> int:
        host, swarm = build_host(CONFIG, list)
        router, _ = libp2p_stack.build_gossip(host, "topic", 1.0)
        for number in range(100):
            swarm.peerstore.add_addr(peer_id(number), Multiaddr("/ip4/1.2.3.4/tcp/1"), 100)
        forget_strangers(swarm, router)
        assert host.get_private_key().to_bytes() == CONFIG.identity.seed
        return len(swarm.peerstore.peer_ids())

    assert trio.run(fill) <= 11


def test_the_dht_takes_no_values() -> None:
    async def validate() -> None:
        host, _ = build_host(CONFIG, list)
        dht = build_dht(host, serves=True)
        assert dht.validator is not None
        for key in ("/pk/x", "/ipns/x", "/shoal/x", "plain"):
            with pytest.raises(InvalidRecordType):
                dht.validator.validate(key, b"value")

    trio.run(validate)


def test_the_dht_names_itself_and_others_only_with_their_addresses() -> None:
    async def name() -> list[tuple[ID, list[Multiaddr]]]:
        host, _ = build_host(CONFIG, lambda: [Multiaddr("/ip4/192.0.2.1/tcp/4001")])
        host.refresh_addrs()
        dht = build_dht(host, serves=True)
        located, cleared, stranger, asker = (peer_id(number) for number in range(1, 5))
        for known in (located, cleared, asker):
            host.get_peerstore().add_addrs(known, [Multiaddr("/ip4/192.0.2.2/tcp/4002")], 60)
        host.get_peerstore().clear_addrs(cleared)
        answer = Message()
        dht._add_closer_peers_to_response(answer, [host.get_id(), stranger, located, cleared, asker], asker)
        return [(ID(peer.id), [Multiaddr(address) for address in peer.addrs]) for peer in answer.closerPeers]

    assert trio.run(name) == [
        (ID(encode_libp2p_peer_id(CONFIG.identity.peer)), [Multiaddr("/ip4/192.0.2.1/tcp/4001")]),
        (peer_id(1), [Multiaddr("/ip4/192.0.2.2/tcp/4002")]),
    ]


def test_the_dht_does_not_name_itself_before_it_can_be_dialled() -> None:
    async def name() -> int:
        host, _ = build_host(CONFIG, list)
        answer = Message()
        build_dht(host, serves=True)._add_closer_peers_to_response(answer, [host.get_id()])
        return len(answer.closerPeers)

    assert trio.run(name) == 0


def test_a_failure_is_contained_and_a_cancellation_is_not() -> None:
    with Contained("a part") as part:
        raise ZeroDivisionError
    assert part.failed
    with pytest.raises(asyncio.CancelledError), Contained("a part") as part:
        raise asyncio.CancelledError
    assert not part.failed
