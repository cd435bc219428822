"""Real libp2p hosts on loopback: the contract, and what only a network can do to a node."""

import asyncio
import os
import signal
import socket
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import suppress

import pytest
from libp2p.network.exceptions import SwarmException
from libp2p.peer.id import ID
from multiaddr import Multiaddr

from shoal.dht.addresses import parse_peer_address
from shoal.node import libp2p_connections, libp2p_stack
from shoal.node.control import (
    ControlConfig,
    ControlHandlers,
    ControlPlane,
    PeerUnreachable,
)
from shoal.node.libp2p_connections import UNREAD_BYTES_PER_CONNECTION_MAX
from shoal.node.libp2p_dialer import Dialer
from shoal.node.libp2p_discovery import libp2p_id
from shoal.node.libp2p_host import Libp2pHost
from shoal.node.libp2p_stack import STREAMS_PER_PEER_MAX
from shoal.node.libp2p_streams import CONTROL_PROTOCOL
from shoal.protocol.errors import Failure, ProtocolError, Refusal
from shoal.protocol.identity import Identity, PeerId, format_peer_id
from tests.e2e.shaping_proxy import ShapedNetwork
from tests.unit.node.control_contract import PATIENCE_S, SWARM, ControlContract, Member, Members, gossip_until_heard

# A node of its own process, to be killed: prints its address and then does nothing.
NODE_PROGRAM = """
import asyncio
from shoal.node.control import ControlConfig, ControlHandlers
from shoal.node.libp2p_host import Libp2pHost
from shoal.protocol.identity import Identity

async def answer(peer, question):
    return question

async def main():
    config = ControlConfig(identity=Identity(b"k" * 32), swarm=bytes(range(32)), listen=("/ip4/127.0.0.1/tcp/0",))
    nothing = lambda *_: None
    host = Libp2pHost(config, ControlHandlers(on_message=nothing, on_request=answer, on_presence=nothing,
                                              on_peer_connected=nothing, on_peer_lost=nothing))
    await host.start()
    print(host.addresses()[0], flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


class TestLibp2pHost(ControlContract):
    @pytest.fixture
    def make_plane(self) -> Callable[[ControlConfig, ControlHandlers], ControlPlane]:
        return Libp2pHost


@pytest.fixture
async def members() -> AsyncIterator[Members]:
    members = Members(Libp2pHost)
    yield members
    await members.stop()


def dial_raw(member: Member) -> socket.socket:
    """A plain TCP connection to the member's libp2p port."""
    _, address = parse_peer_address(member.plane.addresses()[0])
    return socket.create_connection((address.host, address.port), timeout=PATIENCE_S)


async def send_raw(attacker: Member, target: Member, protocol: str, raw: bytes, *, ignore_window: bool = False) -> None:
    """Open a stream of this protocol as an honest host would, and write anything to it."""
    assert isinstance(attacker.plane, Libp2pHost)
    engine = attacker.plane._running()

    async def write() -> None:
        from libp2p.custom_types import TProtocol
        from libp2p.exceptions import BaseLibp2pError
        from libp2p.network.stream.net_stream import NetStream
        from libp2p.stream_muxer.yamux.yamux import YamuxStream

        with suppress(BaseLibp2pError):
            stream = await engine._open_stream(target.peer, TProtocol(protocol))
            assert isinstance(stream, NetStream) and isinstance(stream.muxed_stream, YamuxStream)
            if ignore_window:
                stream.muxed_stream.send_window = 2**30
            await stream.write(raw)

    await attacker.plane._thread.call(write)


async def test_the_identity_is_that_of_the_seed(members: Members) -> None:
    (one,) = await members.start(1)
    assert one.plane.addresses()[0].endswith(f"/p2p/{format_peer_id(one.peer)}")
    await one.plane.stop()
    again = members.make(seed=one.identity.seed[0])
    await again.plane.start()
    assert again.plane.addresses()[0].rsplit("/", 1)[1] == format_peer_id(one.peer)


async def test_a_wildcard_is_announced_as_the_addresses_behind_it(members: Members) -> None:
    member = members.make(listen="/ip4/0.0.0.0/tcp/0")
    await member.plane.start()
    assert member.plane.addresses()
    for text in member.plane.addresses():
        peer, _ = parse_peer_address(text)
        assert peer == member.peer
    other = members.make()
    await other.plane.start()
    assert await other.plane.connect(member.plane.addresses()) == member.peer


async def test_configured_addresses_are_announced_instead() -> None:
    identity = Identity(b"a" * 32)
    announce = "/dns4/shoal.example/tcp/4001"
    listen = ("/ip4/127.0.0.1/tcp/0",)
    config = ControlConfig(identity=identity, swarm=SWARM, listen=listen, announce=(announce,))
    member = Member(identity)
    host = Libp2pHost(config, ignoring_handlers(member))
    await host.start()
    assert host.addresses() == (f"{announce}/p2p/{format_peer_id(identity.peer)}",)
    await host.stop()


async def test_names_are_resolved_by_the_system(members: Members) -> None:
    one, other = members.make(), members.make()
    await one.plane.start()
    await other.plane.start()
    by_name = one.plane.addresses()[0].replace("/ip4/127.0.0.1/", "/dns4/localhost/")
    assert await other.plane.connect([by_name]) == one.peer


async def test_one_good_address_among_dead_ones_is_enough(members: Members) -> None:
    one, other = members.make(), members.make()
    await one.plane.start()
    await other.plane.start()
    dead = f"/ip4/127.0.0.1/tcp/1/p2p/{format_peer_id(one.peer)}"
    assert await other.plane.connect([dead, *one.plane.addresses()]) == one.peer


async def test_a_killed_peer_is_lost(members: Members) -> None:
    (one,) = await members.start(1)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", NODE_PROGRAM, stdout=asyncio.subprocess.PIPE, env=dict(os.environ)
    )
    assert process.stdout is not None
    address = (await process.stdout.readline()).decode().strip()
    killed = await one.plane.connect([address])
    assert await one.expect("connected") == (killed,)
    assert await one.plane.request(killed, b"there?") == b"there?"
    process.send_signal(signal.SIGKILL)
    await process.wait()
    assert await one.expect("lost") == (killed,)
    with pytest.raises(PeerUnreachable) as caught:
        await one.plane.send(killed, b"still there?")
    assert caught.value.failure is Failure.PEER_UNREACHABLE


async def test_a_peer_that_something_else_answers_for_is_lost(
    members: Members, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(libp2p_connections, "PING_PERIOD_S", 0.1)
    monkeypatch.setattr(libp2p_connections, "SILENCE_TIMEOUT_S", 0.3)
    monkeypatch.setattr(libp2p_connections, "SECOND_LOOK_S", 0.1)
    one, other, third = await members.start(3)
    network = ShapedNetwork()
    _, address = parse_peer_address(one.plane.addresses()[0])
    port = network.open("one", address.port)
    try:
        proxied = f"/ip4/127.0.0.1/tcp/{port}/p2p/{format_peer_id(one.peer)}"
        assert await third.plane.connect([proxied]) == one.peer
        await third.find("connected")
        assert await third.plane.request(one.peer, b"there?") == b"answer to there?"
        # The proxy takes every byte and passes none on.
        assert await asyncio.to_thread(network.freeze, "one") == 1
        assert await third.find("lost") == (one.peer,)
        assert await one.find("lost") == (third.peer,)
        assert await third.plane.connect([proxied]) == one.peer
        assert await third.plane.request(one.peer, b"there?") == b"answer to there?"
        assert await other.plane.request(one.peer, b"quiet?") == b"answer to quiet?"
        assert not await other.hears()
    finally:
        network.close()


async def refuse_to_dial(dialer: Dialer, peer: PeerId, *_: object, **__: object) -> None:
    raise PeerUnreachable(peer, Failure.PEER_UNREACHABLE, "nobody is dialled here")


async def test_connections_of_an_address_that_is_gone_end_at_once(
    members: Members, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = await members.start(2)
    other.plane.refresh()
    assert await other.plane.request(one.peer, b"there?") == b"answer to there?", "the address is still there"
    assert not await other.hears()
    with monkeypatch.context() as patch:
        patch.setattr(libp2p_connections, "has_address", lambda host: host != "127.0.0.1")
        patch.setattr(Dialer, "connect", refuse_to_dial)  # whoever is dialled at once is not lost
        other.plane.refresh()
        assert await other.find("lost") == (one.peer,)
        assert await one.find("lost") == (other.peer,)
    await other.plane.connect(one.plane.addresses())
    assert await other.plane.request(one.peer, b"there?") == b"answer to there?"


@pytest.mark.parametrize(
    ("ping_s", "silence_s", "doubt_s"), [(0.2, 0.5, 600.0), (600.0, 600.0, 0.5)], ids=["silence", "doubt"]
)
async def test_a_peer_that_is_back_before_its_loss_was_noticed_hears_presences(
    members: Members, monkeypatch: pytest.MonkeyPatch, ping_s: float, silence_s: float, doubt_s: float
) -> None:
    """As behind a router that got another address: this side still waits on the old connection."""
    monkeypatch.setattr(libp2p_connections, "PING_PERIOD_S", ping_s)
    monkeypatch.setattr(libp2p_connections, "SILENCE_TIMEOUT_S", silence_s)
    monkeypatch.setattr(libp2p_stack, "DOUBT_TIMEOUT_S", doubt_s)
    (one,), other = await members.start(1), members.make()
    await other.plane.start()
    network = ShapedNetwork()
    _, address = parse_peer_address(one.plane.addresses()[0])
    port = network.open("one", address.port)
    try:
        await other.plane.connect([f"/ip4/127.0.0.1/tcp/{port}/p2p/{format_peer_id(one.peer)}"])
        assert await other.find("connected") == (one.peer,)
        await gossip_until_heard(one, other, b"before")
        assert await asyncio.to_thread(network.freeze, "one") == 1
        await other.plane.disconnect(one.peer)
        assert await other.find("lost") == (one.peer,)
        await other.plane.connect(one.plane.addresses())
        assert await other.find("connected") == (one.peer,)
        await gossip_until_heard(one, other, b"after")
    finally:
        network.close()


async def test_a_peer_that_starts_again_is_heard_at_once(members: Members) -> None:
    (hearer,) = await members.start(1)
    for life in (b"first", b"second"):
        speaker = members.make(seed=7)
        await speaker.plane.start()
        await speaker.plane.connect(hearer.plane.addresses())
        await hearer.find("connected")
        await gossip_until_heard(speaker, hearer, life)
        for number in range(200):  # more than seconds pass, and than are tried in PATIENCE_S
            await speaker.plane.publish(b"%d" % number)
            await hearer.find("presence")
        await speaker.plane.stop()
        await hearer.find("lost")


async def test_a_connection_that_comes_about_while_its_peer_is_hung_up_on_ends_too(
    members: Members, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = await members.start(2)
    assert isinstance(one.plane, Libp2pHost)
    engine = one.plane._running()
    abort = libp2p_connections.BufferedTcpStream.abort
    dials = [Multiaddr(other.plane.addresses()[0])]

    async def dial_first(stream: libp2p_connections.BufferedTcpStream) -> None:
        if dials:
            await engine._swarm.dial_addr(dials.pop(), libp2p_id(other.peer))
        await abort(stream)

    monkeypatch.setattr(libp2p_connections.BufferedTcpStream, "abort", dial_first)
    await one.plane.disconnect(other.peer)
    assert await one.find("lost") == (other.peer,)
    assert await other.find("lost") == (one.peer,)
    assert not dials and one.plane.peers() == ()
    await one.plane.connect(other.plane.addresses())
    assert await one.plane.request(other.peer, b"there?") == b"answer to there?"


async def test_a_stream_for_a_connected_peer_calls_nobody_back_who_has_gone(members: Members) -> None:
    one, other = await members.start(2)
    assert isinstance(one.plane, Libp2pHost)
    host, thread = one.plane._running()._host, one.plane._thread

    async def open_stream() -> bool:
        try:
            await host.open_connected_stream(libp2p_id(other.peer), CONTROL_PROTOCOL)
        except SwarmException:
            return False
        return True

    assert await thread.call(open_stream)
    await one.plane.disconnect(other.peer)
    assert await one.find("lost") == (other.peer,)
    assert not await thread.call(open_stream)
    assert one.plane.peers() == ()
    await thread.call(one.plane._running()._open_stream, other.peer, CONTROL_PROTOCOL)
    assert [peer.peer for peer in one.plane.peers()] == [other.peer], "it could be dialled all the time"


async def part(members: Members) -> tuple[Libp2pHost, ID]:
    """One of two members, and the other one, from which it has parted."""
    one, other = await members.start(2)
    assert isinstance(one.plane, Libp2pHost)
    await one.plane.disconnect(other.peer)
    assert await one.find("lost") == (other.peer,)
    return one.plane, libp2p_id(other.peer)


def note_dials(plane: Libp2pHost, monkeypatch: pytest.MonkeyPatch) -> list[ID]:
    """Whom it dials from now on, in place of the dialling."""
    dialled: list[ID] = []

    async def note_dial(peer_id: ID) -> None:
        dialled.append(peer_id)

    monkeypatch.setattr(plane._running()._swarm, "dial_known", note_dial)
    return dialled


async def test_nobody_is_called_back_to_be_told_of_addresses(members: Members, monkeypatch: pytest.MonkeyPatch) -> None:
    plane, gone = await part(members)
    dialled = note_dials(plane, monkeypatch)
    told: list[ID] = []

    def connected_before() -> list[ID]:
        told.append(gone)
        return told

    host = plane._running()._host
    monkeypatch.setattr(host, "get_connected_peers", connected_before)  # what was true a moment before
    await plane._thread.call(host.push_identify)
    assert told and not dialled


async def test_nobody_is_called_back_to_be_told_of_presences(members: Members, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library opens its stream for these as soon as it hears of a connection, and again where that fails."""
    plane, gone = await part(members)
    dialled = note_dials(plane, monkeypatch)
    pubsub = plane._running()._pubsub
    pubsub.peers.pop(gone, None)
    await plane._thread.call(pubsub._handle_new_peer_with_retry, gone)
    assert not dialled


async def test_stopping_leaves_no_thread(members: Members) -> None:
    before = set(threading.enumerate())
    one, other = await members.start(2)
    assert len(set(threading.enumerate()) - before) == 2
    await asyncio.gather(one.plane.stop(), other.plane.stop())
    assert set(threading.enumerate()) - before == set()


@pytest.mark.parametrize("raw", [b"\xff\xff\xff\x7f", b"\x81\x82\x10"], ids=["no length", "one byte too many"])
async def test_an_oversized_frame_is_refused_and_reported(members: Members, raw: bytes) -> None:
    one, attacker = await members.start(2)
    await send_raw(attacker, one, "/shoal/control/1", raw)
    peer, error = await one.expect("misbehaviour")
    assert peer == attacker.peer
    assert isinstance(error, ProtocolError) and error.refusal is Refusal.OVERSIZED
    await attacker.plane.send(one.peer, b"sorry")
    assert await one.expect("message") == (attacker.peer, b"sorry")


@pytest.mark.parametrize(
    "protocol",
    [
        "/meshsub/1.2.0",
        "/ipfs/kad/1.0.0",
        "/ipfs/id/push/1.0.0",
        "/ipfs/ping/1.0.0",
        "/shoal/request/1",
        "/libp2p/circuit/relay/0.2.0/stop",
        "/libp2p/circuit/relay/0.2.0/hop",
        "/libp2p/autonat/1.0.0",
    ],
)
async def test_rubbish_on_a_stream_costs_nobody_else(members: Members, protocol: str) -> None:
    one, attacker, honest = await members.start(1) + [members.make(), members.make()]
    for member in (attacker, honest):
        await member.plane.start()
        await member.plane.connect(one.plane.addresses())
    for raw in (b"\x05\xff\xff\xff\xff\xff", b"\x00" * 64, b"\x03abc" * 10):
        await send_raw(attacker, one, protocol, raw)
    assert await honest.plane.request(one.peer, b"alive?") == b"answer to alive?"
    await honest.plane.publish(b"here")


async def test_streams_of_one_peer_are_bounded(members: Members) -> None:
    one, attacker = await members.start(2)
    for _ in range(STREAMS_PER_PEER_MAX):
        await send_raw(attacker, one, "/shoal/request/1", b"")
    with pytest.raises(PeerUnreachable):
        await attacker.plane.request(one.peer, b"one more")
    honest = members.make()
    await honest.plane.start()
    await honest.plane.connect(one.plane.addresses())
    assert await honest.plane.request(one.peer, b"alive?") == b"answer to alive?"


async def test_a_peer_that_sends_past_its_windows_is_hung_up_on(members: Members) -> None:
    one, attacker = await members.start(2)
    unread = b"\x04hang" + bytes(2 * UNREAD_BYTES_PER_CONNECTION_MAX)
    await send_raw(attacker, one, "/shoal/request/1", unread, ignore_window=True)
    assert await one.expect("lost") == (attacker.peer,)


async def test_places_of_closed_connections_are_free_again() -> None:
    gathered = Members(lambda config, handlers: Libp2pHost(config, handlers))
    identity = Identity(b"h" * 32)
    config = ControlConfig(identity=identity, swarm=SWARM, listen=("/ip4/127.0.0.1/tcp/0",), connections_max=4)
    hub = Libp2pHost(config, ignoring_handlers(Member(identity)))
    await hub.start()
    (visitor,) = await gathered.start(1)
    for _ in range(6):
        await visitor.plane.connect(hub.addresses())
        assert await visitor.expect("connected") == (identity.peer,)
        await visitor.plane.disconnect(identity.peer)
        assert await visitor.expect("lost") == (identity.peer,)
    await asyncio.gather(hub.stop(), gathered.stop())


async def test_plaintext_is_not_spoken(members: Members) -> None:
    (one,) = await members.start(1)

    def negotiate() -> bytes:
        with dial_raw(one) as raw:
            for line in (b"/multistream/1.0.0\n", b"/plaintext/2.0.0\n"):
                raw.sendall(bytes([len(line)]) + line)
            heard = b""
            while not heard.endswith(b"na\n"):
                heard += raw.recv(64) or b"na\n"
            return heard

    assert await asyncio.to_thread(negotiate) == b"\x13/multistream/1.0.0\n\x03na\n"


async def test_a_handlers_own_mistake_is_reported_and_costs_one_request(members: Members) -> None:
    one, other = await members.start(2)
    reported: list[BaseException] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context["exception"]))
    one.answer = lambda peer, question: bytes(1 // len(question))
    with pytest.raises(PeerUnreachable):
        await other.plane.request(one.peer, b"")
    assert [type(error) for error in reported] == [ZeroDivisionError]
    assert await other.plane.request(one.peer, b"1") == bytes(1)


def ignoring_handlers(member: Member) -> ControlHandlers:
    """Handlers that answer with the question and drop everything else."""

    async def answer(peer: object, question: bytes) -> bytes:
        return question

    def ignore(*_: object) -> None:
        return

    return ControlHandlers(
        on_message=ignore, on_request=answer, on_presence=ignore, on_peer_connected=ignore, on_peer_lost=ignore
    )
