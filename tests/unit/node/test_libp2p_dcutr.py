"""Real hosts on loopback that have met through a relay, and what is said so that they do without it."""

from collections.abc import AsyncIterator
from unittest.mock import Mock

import pytest
from libp2p.abc import INetStream
from libp2p.relay.circuit_v2.pb.dcutr_pb2 import HolePunch
from multiaddr import Multiaddr

from shoal.dht.addresses import Address, parse_address
from shoal.node import libp2p_dcutr, libp2p_engine
from shoal.node.libp2p_dcutr import DCUTR_PROTOCOL, DirectUpgrades
from shoal.node.libp2p_hop import read_message, write_message
from shoal.node.libp2p_streams import STREAM_ERRORS, FrameReader
from shoal.protocol.errors import ProtocolError
from shoal.protocol.identity import Identity, PeerId
from tests.unit.node.control_contract import Member
from tests.unit.node.test_libp2p_relays import Net, circuits, engine_of, path, until

PEER = Identity(bytes([1]) * 32).peer


@pytest.fixture
async def net() -> AsyncIterator[Net]:
    net = Net()
    yield net
    await net.members.stop()


async def start_pair(net: Net, *, upgrades: bool = True) -> tuple[Member, Member]:
    """Two peers, of which the first has dialled the second through a relay."""
    relay = await net.start_relay()
    dialled = await net.start_private(relay, upgrades_circuits=upgrades)
    dialler = await net.start_private(relay, upgrades_circuits=True)
    (address,) = circuits(dialled)
    await dialler.plane.connect([address])
    # Whoever was dialled may be a moment later in knowing it.
    await until(dialled, lambda: path(dialled, dialler.peer) != "none", "both know the connection")
    return dialler, dialled


async def test_who_met_through_a_relay_does_without_it_soon(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libp2p_engine, "RETIRE_S", 0.1)
    dialler, dialled = await start_pair(net)
    for one, other in ((dialler, dialled), (dialled, dialler)):
        await until(one, lambda one=one, other=other: path(one, other.peer) == "direct", "a direct connection")
        assert await one.plane.request(other.peer, b"there?") == b"answer to there?"
    for one, other in ((dialler, dialled), (dialled, dialler)):
        await until(one, lambda one=one, other=other: count_circuits(one, other.peer) == 0, "no circuit any more")
        assert not [event for event in list(one.events._queue) if event[0] == "lost"]  # type: ignore[attr-defined]


def count_circuits(member: Member, peer: PeerId) -> int:
    engine = engine_of(member)
    connections = engine._swarm.get_connections(libp2p_engine.libp2p_id(peer))
    return sum(libp2p_engine.is_relayed(one.muxed_conn) for one in connections)


async def test_where_nothing_gets_through_the_circuit_stays_and_there_is_a_pause(
    net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(libp2p_dcutr, "WINDOW_S", 0.1)
    monkeypatch.setattr(DirectUpgrades, "_find_source", lambda *_: None)
    dialler, dialled = await start_pair(net)
    upgrades = engine_of(dialled)._upgrades
    await until(dialled, lambda: dialler.peer in upgrades._pauses._known, "given up")
    assert upgrades._pauses._known[dialler.peer].next_s == 2 * libp2p_dcutr.PAUSE_S
    assert path(dialler, dialled.peer) == path(dialled, dialler.peer) == "relayed"
    assert await dialled.plane.request(dialler.peer, b"there?") == b"answer to there?"

    async def refresh() -> int:
        engine_of(dialled).refresh()
        return len(upgrades._pauses._known)  # without a rest in between: it is tried again at once, and fails again

    assert await dialled.plane._thread.call(refresh) == 0, "the addresses are others now"  # type: ignore[attr-defined]


async def say(member: Member, peer: PeerId, *messages: HolePunch) -> HolePunch | None:
    """What the peer answers to the first of these messages; None where it hangs up. Nothing more is said after that."""

    async def talk() -> HolePunch | None:
        try:
            stream: INetStream = await engine_of(member)._open_stream(peer, DCUTR_PROTOCOL)
            for message in messages:
                await write_message(stream, message)
            answer: HolePunch = await read_message(FrameReader(stream, libp2p_dcutr.MESSAGE_BYTES_MAX), HolePunch())
            await stream.reset()  # or the peer waits for the rest until its time is over
            return answer
        except STREAM_ERRORS:
            return None

    result: HolePunch | None = await member.plane._thread.call(talk)  # type: ignore[attr-defined]
    return result


def offer(*texts: str) -> HolePunch:
    return HolePunch(type=HolePunch.CONNECT, ObsAddrs=[Multiaddr(text).to_bytes() for text in texts])


async def test_only_offers_by_a_relay_are_answered_and_only_so_many(net: Net) -> None:
    dialler, dialled = await start_pair(net, upgrades=False)
    for _ in range(libp2p_dcutr.ATTEMPTS_MAX):
        answer = await say(dialled, dialler.peer, offer("/ip4/127.0.0.1/tcp/9"))
        assert answer is not None and answer.type == HolePunch.CONNECT
        own = [parse_address(str(Multiaddr(raw))) for raw in answer.ObsAddrs]
        assert [(one.host, one.peer) for one in own] == [("127.0.0.1", None)]
        await until(dialler, lambda: not engine_of(dialler)._upgrades._answering, "it is over")
    assert await say(dialled, dialler.peer, offer("/ip4/127.0.0.1/tcp/9")) is None, "the allowance is used up"
    other = await net.start(upgrades_circuits=True)
    await other.plane.connect(dialler.plane.addresses()[-1:])
    assert path(other, dialler.peer) == "direct"
    assert await say(other, dialler.peer, offer("/ip4/127.0.0.1/tcp/9")) is None
    assert await other.plane.request(dialler.peer, b"there?") == b"answer to there?"


@pytest.mark.parametrize(
    "message", [HolePunch(type=HolePunch.SYNC), offer(*["/ip4/127.0.0.1/tcp/9"] * 1000)], ids=["order", "oversized"]
)
async def test_what_is_no_offer_ends_the_session_alone(net: Net, message: HolePunch) -> None:
    dialler, dialled = await start_pair(net, upgrades=False)
    assert await say(dialled, dialler.peer, message) is None
    await until(dialler, lambda: not engine_of(dialler)._upgrades._answering, "it is over")
    assert await dialled.plane.request(dialler.peer, b"there?") == b"answer to there?"


def test_an_offer_leads_to_few_dials_of_ip_addresses() -> None:
    tail = "/p2p/12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN"
    texts = ["/dns4/victim.example/tcp/80", f"/ip4/45.0.0.1/tcp/1{tail}/p2p-circuit", "/ip4/45.0.0.1/udp/1"]
    upgrades = upgrades_of("/ip4/45.0.0.9/tcp/1")
    assert upgrades._read_offer(offer(*texts, "/ip4/45.0.0.1/tcp/1"), PEER) == [
        Address(net="ip4", host="45.0.0.1", port=1, peer=PEER)
    ]
    many = [f"/ip4/45.0.0.{number}/tcp/1" for number in range(1, 100)]
    assert len(upgrades._read_offer(offer(*many), PEER)) == libp2p_dcutr.ADDRESSES_MAX
    with pytest.raises(ProtocolError):
        upgrades._read_offer(HolePunch(type=HolePunch.SYNC), PEER)


@pytest.mark.parametrize(
    ("own", "knocked_at"),
    [
        (["/ip4/127.0.0.1/tcp/1", "/ip4/192.168.1.2/tcp/1", "/ip4/45.0.0.9/tcp/1"], ["45.0.0.1", "2001:4860::1"]),
        (["/ip4/127.0.0.1/tcp/1", "/ip4/192.168.1.2/tcp/1"], ["192.168.1.1", "fd00::1", "45.0.0.1", "2001:4860::1"]),
        (
            ["/ip4/127.0.0.1/tcp/1"],
            ["127.0.0.1", "::1", "192.168.1.1", "fd00::1", "45.0.0.1", "2001:4860::1"],
        ),
        ([], ["45.0.0.1", "2001:4860::1"]),
    ],
    ids=["public", "private", "loopback", "none"],
)
def test_strangers_make_nobody_dial_nearer_than_where_it_can_be_dialled_itself(
    own: list[str], knocked_at: list[str]
) -> None:
    offered = [f"/ip4/{host}/tcp/22" for host in ("127.0.0.1", "192.168.1.1", "45.0.0.1")]
    offered += [f"/ip6/{host}/tcp/22" for host in ("::1", "fd00::1", "2001:4860::1")]
    found = {one.host for one in upgrades_of(*own)._read_offer(offer(*offered), PEER)}
    assert found == set(knocked_at)


def upgrades_of(*own: str) -> DirectUpgrades:
    return DirectUpgrades(Mock(), Mock(), Mock(), lambda: [parse_address(text) for text in own], tuple)


def test_each_family_is_dialled_from_its_own_listener() -> None:
    bound = [parse_address("/ip4/0.0.0.0/tcp/9460"), parse_address("/ip6/::/tcp/9461")]
    upgrades = DirectUpgrades(Mock(), Mock(), Mock(), tuple, lambda: bound)
    assert upgrades._find_source(parse_address("/ip6/2001:db8::1/tcp/1")) == ("::", 9461)
    assert upgrades._find_source(parse_address("/ip4/45.0.0.1/tcp/1")) == ("0.0.0.0", 9460)
    del bound[1]
    assert upgrades._find_source(parse_address("/ip6/2001:db8::1/tcp/1")) is None
