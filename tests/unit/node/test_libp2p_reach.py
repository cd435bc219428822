"""Whether others can dial this peer: real hosts on loopback ask each other."""

from collections.abc import AsyncIterator

import pytest
import trio
from libp2p.host.autonat.pb.autonat_pb2 import Message
from multiaddr import Multiaddr

from shoal.dht.addresses import parse_address
from shoal.node import libp2p_reach
from shoal.node.libp2p_hop import read_message, write_message
from shoal.node.libp2p_reach import AUTONAT_PROTOCOL, DialBacks, Observations, ReachCheck, Verdict, choose_targets
from shoal.node.libp2p_streams import FrameReader
from shoal.node.reachability import ReachState
from shoal.protocol.identity import Identity, encode_libp2p_peer_id
from tests.unit.node.control_contract import Member
from tests.unit.node.test_libp2p_relays import Net, circuits, engine_of, until

ME, ONE, TWO, THREE = (Identity(bytes([number]) * 32).peer for number in range(1, 5))
GLOBAL, PRIVATE = parse_address("/ip4/45.0.0.1/tcp/1"), parse_address("/ip4/10.0.0.1/tcp/1")


@pytest.fixture
async def net() -> AsyncIterator[Net]:
    net = Net()
    yield net
    await net.members.stop()


def state_of(member: Member) -> ReachState:
    return member.plane.reach().state


async def stop_listening(member: Member) -> None:
    """From now on the member can dial out and nobody in."""
    engine = engine_of(member)

    async def close() -> None:
        for listener in engine._swarm.listeners.values():
            await listener.close()

    await member.plane._thread.call(close)


async def ask_back(asker: Member, server: Member, question: Message) -> Message:
    """The server's answer to any question, asked as an honest host would."""
    engine = engine_of(asker)

    async def ask() -> Message:
        stream = await engine._open_direct_stream(server.peer, AUTONAT_PROTOCOL)
        await write_message(stream, question)
        return await read_message(FrameReader(stream), Message())

    return await asker.plane._thread.call(ask)


def make_question(peer: bytes, *addresses: str) -> Message:
    question = Message(type=Message.DIAL)
    question.dial.peer.id = encode_libp2p_peer_id(peer)
    question.dial.peer.addrs.extend(Multiaddr(text).to_bytes() for text in addresses)
    return question


async def test_peers_that_can_be_dialled_know_it_and_relay(net: Net) -> None:
    one, other = await net.start(), await net.start()
    assert state_of(one) is ReachState.UNKNOWN and not one.plane.reach().serves
    await other.plane.connect(one.plane.addresses())
    for member in (one, other):
        await until(member, lambda member=member: member.plane.reach().serves, "relaying")
        reach = member.plane.reach()
        assert reach.state is ReachState.REACHABLE and reach.servers == 1 and reach.checked_s is not None
        assert [f"{text}/p2p/" in member.plane.addresses()[0] for text in reach.confirmed] == [True]
        assert reach.seen_hosts == ("127.0.0.1",)


async def test_who_cannot_be_dialled_finds_a_relay_by_itself(net: Net) -> None:
    one, other = await net.start(), await net.start()
    await other.plane.connect(one.plane.addresses())
    await until(one, lambda: one.plane.reach().serves, "relaying")
    private = await net.start()
    await stop_listening(private)
    await private.plane.connect(one.plane.addresses())
    await until(private, lambda: circuits(private, one), "a place at the relay")
    assert state_of(private) is ReachState.PRIVATE and not private.plane.reach().serves
    assert private.plane.reach().relays == (one.peer,) and one.plane.reach().served.reservations == 1
    assert await other.plane.connect(private.plane.addresses()) == private.peer
    assert await other.plane.request(private.peer, b"there?") == b"answer to there?"


async def test_who_can_be_dialled_again_gives_its_places_back(net: Net) -> None:
    relay = await net.start_relay()
    private = await net.start()
    reach = engine_of(private)._reach
    listening = list(private.plane.addresses())

    async def say(reached: bool) -> None:
        address = parse_address(listening[0]) if reached else None
        reach._verdicts[relay.peer] = Verdict(reached=address, scope=0, at_s=trio.current_time())
        await engine_of(private)._note_reach()

    await private.plane._thread.call(say, False)
    await private.plane.connect(relay.plane.addresses())
    await until(private, lambda: circuits(private), "a place")
    await private.plane._thread.call(say, True)
    await until(private, lambda: not circuits(private), "no place any more")
    assert private.plane.reach().relays == ()


async def test_only_the_asker_is_dialled_and_only_with_its_key(net: Net) -> None:
    server, asker, third = await net.start_relay(), await net.start(), await net.start()
    await asker.plane.connect(server.plane.addresses())
    own = asker.plane.addresses()[0].partition("/p2p/")[0]
    others = third.plane.addresses()[0].partition("/p2p/")[0]
    answer = await ask_back(asker, server, make_question(asker.peer, own))
    assert answer.dialResponse.status == Message.OK
    assert answer.dialResponse.addr == Multiaddr(own).to_bytes()
    for question, status in (
        (make_question(asker.peer, others), Message.E_DIAL_ERROR),
        (make_question(third.peer, others), Message.E_BAD_REQUEST),
        (make_question(asker.peer), Message.E_DIAL_REFUSED),
        (make_question(asker.peer, "/ip4/127.0.0.2/tcp/1"), Message.E_DIAL_REFUSED),
        (Message(type=Message.DIAL_RESPONSE), Message.E_BAD_REQUEST),
    ):
        assert (await ask_back(asker, server, question)).dialResponse.status == status


async def test_nobody_is_dialled_for_who_asks_through_a_relay(net: Net) -> None:
    relay = await net.start_relay()
    server = await net.start_private(relay)
    asker = await net.start(reachability=ReachState.REACHABLE)
    await asker.plane.connect(circuits(server))
    own = asker.plane.addresses()[0].partition("/p2p/")[0]

    async def ask() -> Message:
        stream = await engine_of(asker)._open_stream(server.peer, AUTONAT_PROTOCOL)
        await write_message(stream, make_question(asker.peer, own))
        return await read_message(FrameReader(stream), Message())

    answer = await asker.plane._thread.call(ask)
    assert answer.dialResponse.status == Message.E_DIAL_REFUSED


async def test_offered_addresses_are_announced_once_they_were_dialled(net: Net) -> None:
    server, asker = await net.start_relay(), await net.start()
    bound = parse_address(asker.plane.addresses()[0])
    good, bad = f"/ip4/127.0.0.1/tcp/{bound.port}", "/ip4/127.0.0.1/tcp/1"
    asker.plane.offer([bad])
    await until(asker, lambda: any("/tcp/1/" in text for text in asker.plane.addresses()), "the router's word")
    await asker.plane.connect(server.plane.addresses())
    await until(asker, lambda: state_of(asker) is ReachState.REACHABLE, "confirmation")
    assert not any("/tcp/1/" in text for text in asker.plane.addresses())
    assert asker.plane.reach().confirmed == (good,)


async def test_a_change_makes_what_was_said_void(net: Net) -> None:
    server, asker = await net.start_relay(), await net.start()
    await asker.plane.connect(server.plane.addresses())
    await until(asker, lambda: state_of(asker) is ReachState.REACHABLE, "confirmation")
    await stop_listening(asker)
    asker.plane.refresh()
    await until(asker, lambda: state_of(asker) is ReachState.PRIVATE, "the opposite")


def check() -> ReachCheck:
    async def never(*_: object) -> None:
        raise AssertionError

    return ReachCheck(ME, Observations(), never, None)


def told(reached: bool, scope: int, at_s: float = 0.0) -> Verdict:
    return Verdict(reached=GLOBAL if reached else None, scope=scope, at_s=at_s)


@pytest.mark.parametrize(
    ("verdicts", "state"),
    [
        ({}, ReachState.UNKNOWN),
        ({ONE: told(True, 2)}, ReachState.REACHABLE),
        ({ONE: told(False, 2)}, ReachState.PRIVATE),
        ({ONE: told(False, 2), TWO: told(True, 2)}, ReachState.REACHABLE),
        ({ONE: told(False, 2), TWO: told(True, 2), THREE: told(False, 2)}, ReachState.PRIVATE),
        # Neighbours reach it, the world does not.
        ({ONE: told(True, 1), TWO: told(True, 1), THREE: told(False, 2)}, ReachState.PRIVATE),
        ({ONE: told(True, 1)}, ReachState.REACHABLE),
        ({ONE: told(True, 2, at_s=-1000.0)}, ReachState.UNKNOWN),
    ],
)
def test_the_majority_of_those_who_see_the_most_public_address_counts(
    verdicts: dict[bytes, Verdict], state: ReachState
) -> None:
    async def judge() -> ReachState:
        reach = check()
        now_s = trio.current_time()
        for peer, verdict in verdicts.items():
            reach._verdicts[peer] = Verdict(reached=verdict.reached, scope=verdict.scope, at_s=now_s + verdict.at_s)
        assert bool(reach.confirmed()) == (state is ReachState.REACHABLE)
        return reach.state

    assert trio.run(judge) is state


def test_targets_are_plain_tcp_at_the_address_that_was_seen() -> None:
    tail = f"/p2p/{'12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN'}"
    texts = [
        "/ip4/45.0.0.1/tcp/9460",
        "/ip4/45.0.0.1/tcp/9460" + tail,
        "/ip4/45.0.0.2/tcp/9460",
        "/ip4/45.0.0.1/udp/9460",
        "/ip4/45.0.0.1/tcp/0",
        f"/ip4/45.0.0.1/tcp/9460{tail}/p2p-circuit",
        "/dns4/victim.example/tcp/80",
    ]
    raw = [Multiaddr(text).to_bytes() for text in texts] + [b"\xff\xff", b""]
    assert [str(one) for one in choose_targets(raw, "45.0.0.1")] == ["/ip4/45.0.0.1/tcp/9460"]
    many = [Multiaddr(f"/ip4/45.0.0.1/tcp/{port}").to_bytes() for port in range(1, 200)]
    assert len(choose_targets(many, "45.0.0.1")) == libp2p_reach.DIAL_BACK_ADDRESSES_MAX


def test_an_address_block_may_ask_so_often_and_no_more() -> None:
    askers = DialBacks(None)._askers  # type: ignore[arg-type]
    asked = [askers.take("a", 0.0) for _ in range(libp2p_reach.DIAL_BACKS_PER_BLOCK_MAX + 1)]
    assert [*asked, askers.take("b", 0.0)] == [True] * libp2p_reach.DIAL_BACKS_PER_BLOCK_MAX + [False, True]
    assert askers.take("a", libp2p_reach.DIAL_BACK_WINDOW_S)
