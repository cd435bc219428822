"""Real hosts on loopback, one of which is reached through another."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from functools import partial

import pytest
import trio
import trio.testing

from shoal.dht.addresses import parse_address
from shoal.node import libp2p_connections, libp2p_engine
from shoal.node.control import (
    FRAME_BYTES_MAX,
    ControlConfig,
    ControlHandlers,
    PeerUnreachable,
    RelayLimits,
)
from shoal.node.libp2p_discovery import libp2p_id
from shoal.node.libp2p_engine import ControlEngine
from shoal.node.libp2p_hop import HOP_PROTOCOL, _Reservation
from shoal.node.libp2p_host import Libp2pHost
from shoal.node.reachability import ReachState
from shoal.protocol.identity import PeerId, format_peer_id, short_peer_id
from tests.unit.node.control_contract import PATIENCE_S, Member, Members, gossip_until_heard


async def until(member: Member, holds: Callable[[], object], what: str) -> None:
    """Wait for what the member's other thread makes true, a moment of rest there at a time."""
    assert isinstance(member.plane, Libp2pHost)
    async with asyncio.timeout(PATIENCE_S):
        while not holds():
            await member.plane._thread.call(trio.testing.wait_all_tasks_blocked, 0.01)
    assert holds(), what


class Net:
    """Makes relays, and peers that nobody can dial."""

    def __init__(self) -> None:
        self.members = Members(Libp2pHost)

    async def start(self, **changes: object) -> Member:
        def make_plane(config: ControlConfig, handlers: ControlHandlers) -> Libp2pHost:
            return Libp2pHost(replace(config, **{"upgrades_circuits": False, **changes}), handlers)

        self.members.make_plane = make_plane
        member = self.members.make()
        await member.plane.start()
        return member

    async def start_relay(self, **changes: object) -> Member:
        """A member that knows that it can be dialled."""
        return await self.start(reachability=ReachState.REACHABLE, **changes)

    async def start_private(self, *relays: Member, **changes: object) -> Member:
        """A peer with a place at each of the relays."""
        bootstrap = tuple(relay.plane.addresses()[0] for relay in relays)
        member = await self.start(reachability=ReachState.PRIVATE, bootstrap=bootstrap, **changes)
        for relay in relays:
            await until(member, lambda relay=relay: circuits(member, relay), f"a place at {short_peer_id(relay.peer)}")
        return member


@pytest.fixture
async def net() -> AsyncIterator[Net]:
    net = Net()
    yield net
    await net.members.stop()
    for member in net.members._made:
        while not member.events.empty():
            assert member.events.get_nowait()[0] != "crashed"


def engine_of(member: Member) -> ControlEngine:
    assert isinstance(member.plane, Libp2pHost)
    return member.plane._running()


def circuits(member: Member, relay: Member | None = None) -> tuple[str, ...]:
    """The addresses that the member announces through relays, or through that one."""
    told = [(text, parse_address(text)) for text in member.plane.addresses()]
    relays = {one.relay for _, one in told if one.is_relayed} if relay is None else {relay.peer}
    return tuple(text for text, one in told if one.relay in relays)


def path(member: Member, peer: PeerId) -> str:
    """How the member reaches the peer."""
    for known in member.plane.peers():
        if known.peer == peer:
            return "relayed" if known.relayed else "direct"
    return "none"


async def test_a_private_peer_is_reached_through_its_relay(net: Net) -> None:
    relay = await net.start_relay()
    private = await net.start_private(relay)
    assert [(one.peer, one.relays) for one in private.plane.peers()] == [(relay.peer, True)]
    other = await net.start()
    (address,) = circuits(private)
    assert await other.plane.connect([address]) == private.peer
    assert path(other, private.peer) == "relayed"
    await other.plane.send(private.peer, b"hello")
    assert await private.find("message") == (other.peer, b"hello")
    assert await private.plane.request(other.peer, b"there?") == b"answer to there?"
    assert path(private, other.peer) == "relayed"
    large = bytes(FRAME_BYTES_MAX - 100)
    assert await other.plane.request(private.peer, large) == b"answer to " + large
    assert relay.plane.reach().served.circuits == 1
    assert relay.plane.reach().served.relayed_bytes > len(large)


async def test_a_peer_that_others_dial_has_a_place_where_the_other_family_leads_to(net: Net) -> None:
    """This machine's loopback stands for one that has IPv4 alone."""
    plain, bridge = await net.start_relay(), await net.start_relay(announce=("/ip6/2a00::1/tcp/9",))
    member = await net.start_private(plain, relays_wanted=2)
    await member.plane.connect([f"{engine_of(bridge)._own.bound[0]}/p2p/{format_peer_id(bridge.peer)}"])
    await until(member, lambda: circuits(member, bridge), "a place at either")
    engine_of(member)._reach._forced = ReachState.REACHABLE
    assert isinstance(member.plane, Libp2pHost)
    member.plane.refresh()
    await until(member, lambda: not circuits(member, plain), "no place that is of no use")
    assert circuits(member, bridge)


async def test_two_private_peers_reach_each_other_and_gossip(net: Net) -> None:
    relay = await net.start_relay()
    one, other = await net.start_private(relay), await net.start_private(relay)
    await other.plane.connect(circuits(one))
    await other.find("connected")
    await gossip_until_heard(other, one, b"here")
    assert path(one, other.peer) == path(other, one.peer) == "relayed"


async def test_direct_addresses_are_tried_before_circuits(net: Net) -> None:
    relay = await net.start_relay()
    private = await net.start_private(relay)
    other = await net.start()
    backwards = sorted(private.plane.addresses(), key=lambda text: not parse_address(text).is_relayed)
    assert parse_address(backwards[0]).is_relayed
    await other.plane.connect(backwards)
    assert path(other, private.peer) == "direct"


async def test_a_direct_connection_takes_over(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libp2p_engine, "RETIRE_S", 0.2)
    relay = await net.start_relay()
    private = await net.start_private(relay)
    other = await net.start()
    await other.plane.connect(circuits(private))
    numbers = [b"%d" % number for number in range(400)]

    async def send_all() -> None:
        for number in numbers:
            await other.plane.send(private.peer, number)

    sending = asyncio.create_task(send_all())
    await other.plane.request(private.peer, b"over the circuit")
    # The private peer can dial out, and does.
    target = parse_address(other.plane.addresses()[0])
    dial = partial(engine_of(private)._dialer.connect, directly=True)
    await private.plane._thread.call(dial, other.peer, [target])
    await until(other, lambda: path(other, private.peer) == "direct", "the direct path")
    await sending
    assert [await private.find("message") for _ in numbers] == [(other.peer, number) for number in numbers]
    await until(relay, lambda: not relay.plane.reach().served.circuits, "the circuit's end")
    await other.plane.send(private.peer, b"directly")
    assert await private.find("message") == (other.peer, b"directly")
    assert await other.plane.request(private.peer, b"still?") == b"answer to still?"
    await gossip_until_heard(other, private, b"and gossip")
    assert not [event for event in list(other.events._queue) if event[0] == "lost"]


async def test_a_dead_relay_is_replaced(net: Net) -> None:
    first, second, third = [await net.start_relay() for _ in range(3)]
    private = await net.start_private(first, second, relays_wanted=2)
    await private.plane.connect(third.plane.addresses())
    assert not circuits(private, third)
    await first.plane.stop()
    await until(private, lambda: circuits(private, third), "a place at the third")
    assert not circuits(private, first) and circuits(private, second)
    other = await net.start()
    await other.plane.connect(circuits(private, third))
    assert await other.plane.request(private.peer, b"there?") == b"answer to there?"


async def test_a_lost_relay_loses_the_peers_behind_it(net: Net) -> None:
    relay = await net.start_relay()
    private = await net.start_private(relay)
    other = await net.start()
    await other.plane.connect(circuits(private))
    await other.find("connected")
    await relay.plane.stop()
    lost = {(await other.find("lost"))[0], (await other.find("lost"))[0]}
    assert lost == {relay.peer, private.peer}


async def test_who_stops_is_lost_over_a_circuit(net: Net) -> None:
    relay = await net.start_relay()
    private = await net.start_private(relay)
    other = await net.start()
    await other.plane.connect(circuits(private))
    await until(private, lambda: path(private, other.peer) == "relayed", "the circuit")
    await other.plane.disconnect(private.peer)
    assert await other.find("lost") == (private.peer,)
    assert await private.find("lost") == (other.peer,)
    assert path(private, relay.peer) == "direct"
    await until(relay, lambda: not relay.plane.reach().served.circuits, "the circuit's end")
    await other.plane.connect(circuits(private))
    assert await other.plane.request(private.peer, b"again?") == b"answer to again?"


async def test_who_has_no_place_is_not_reached(net: Net) -> None:
    relay = await net.start_relay()
    public = await net.start()
    await public.plane.connect(relay.plane.addresses())
    other = await net.start()
    through = replace(parse_address(relay.plane.addresses()[0]), relay=relay.peer, peer=public.peer)
    with pytest.raises(PeerUnreachable, match="NO_RESERVATION"):
        await other.plane.connect([str(through)])
    assert relay.plane.reach().served.circuits == 0


async def test_places_and_circuits_are_bounded(net: Net) -> None:
    relay = await net.start_relay(relay=RelayLimits(reservations_max=1, circuits_per_peer_max=1))
    first = await net.start_private(relay)
    second = await net.start(reachability=ReachState.PRIVATE, bootstrap=(relay.plane.addresses()[0],))
    await until(second, lambda: engine_of(second)._relays._refused_until_s, "a refusal")
    assert not circuits(second)
    one, other = await net.start(), await net.start()
    await one.plane.connect(circuits(first))
    with pytest.raises(PeerUnreachable, match="RESOURCE_LIMIT_EXCEEDED"):
        await other.plane.connect(circuits(first))
    assert relay.plane.reach().served.reservations == 1


@pytest.mark.parametrize("limits", [RelayLimits(circuit_bytes_max=200_000), RelayLimits(circuit_s=0.5)])
async def test_a_circuit_past_its_limits_ends_and_another_may_follow(net: Net, limits: RelayLimits) -> None:
    relay = await net.start_relay(relay=limits)
    private = await net.start_private(relay)
    other = await net.start()
    await other.plane.connect(circuits(private))
    await other.find("connected")
    await other.find("connected")
    with pytest.raises(PeerUnreachable):
        for _ in range(10_000):
            await other.plane.request(private.peer, bytes(50_000))
    assert await other.find("lost") == (private.peer,)
    assert await private.find("lost") == (other.peer,)
    await other.plane.connect(circuits(private))
    assert await other.plane.request(private.peer, b"again?") == b"answer to again?"


async def test_a_silent_circuit_is_noticed(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    relay = await net.start_relay()
    private = await net.start_private(relay)
    other = await net.start()
    monkeypatch.setattr(libp2p_connections, "PING_PERIOD_S", 0.1)
    monkeypatch.setattr(libp2p_connections, "SILENCE_TIMEOUT_S", 0.3)
    monkeypatch.setattr(libp2p_connections, "SECOND_LOOK_S", 0.1)
    hop = engine_of(relay)._hop
    assert hop is not None
    passing, relay_on = trio.CancelScope(), hop._relay

    async def freeze(*ways: object) -> None:
        with passing:
            await relay_on(*ways)
        await trio.sleep_forever()

    monkeypatch.setattr(hop, "_relay", freeze)
    await other.plane.connect(circuits(private))
    await other.find("connected")
    assert await other.plane.request(private.peer, b"there?") == b"answer to there?"
    relay.plane._thread.post(passing.cancel)
    assert await other.find("lost") == (private.peer,)
    assert await private.find("lost") == (other.peer,)
    assert path(other, relay.peer) == path(private, relay.peer) == "direct"


async def test_a_place_is_renewed(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.node.libp2p_relays.RESERVATION_MIN_S", 0.5)
    relay = await net.start_relay(relay=RelayLimits(reservation_s=1.0))
    private = await net.start_private(relay)
    held = engine_of(private)._relays._held
    before = held[relay.peer].ends_at_s
    await until(private, lambda: relay.peer in held and held[relay.peer].ends_at_s > before + 1.0, "a renewal")
    assert circuits(private)


async def test_a_stranger_brings_no_connections(net: Net) -> None:
    relay, stranger = await net.start_relay(), await net.start_relay()
    private = await net.start_private(relay, relays_wanted=1)
    direct = [text for text in private.plane.addresses() if not parse_address(text).is_relayed]
    await stranger.plane.connect(direct)
    hop = engine_of(stranger)._hop
    assert hop is not None
    hop._reservations[libp2p_id(private.peer)] = _Reservation("", float("inf"))
    other = await net.start()
    through = replace(parse_address(stranger.plane.addresses()[0]), relay=stranger.peer, peer=private.peer)
    with pytest.raises(PeerUnreachable, match="CONNECTION_FAILED"):
        await other.plane.connect([str(through)])


async def test_a_relay_that_is_switched_off_relays_nothing(net: Net) -> None:
    off = await net.start_relay(relay=None)
    private = await net.start(reachability=ReachState.PRIVATE, bootstrap=(off.plane.addresses()[0],))
    await private.find("connected")
    await private.plane.request(off.peer, b"identified by then")
    assert engine_of(private)._find_serving(HOP_PROTOCOL) == []
