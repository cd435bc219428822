"""What every ControlPlane must do, whatever carries it: run once against libp2p and once against the in-memory twin."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import pytest

from shoal.dht.addresses import Address
from shoal.node.control import (
    FRAME_BYTES_MAX,
    PRESENCE_BYTES_MAX,
    BootstrapFailed,
    ControlConfig,
    ControlHandlers,
    ControlPlane,
    ControlStopped,
    PeerAddresses,
    PeerUnreachable,
    RequestRefused,
)
from shoal.protocol.errors import ConfigError, Failure, ProtocolError, Refusal, UriError
from shoal.protocol.identity import Identity, PeerId

SWARM = bytes(range(32))
# How long a test waits for what must come; nothing waits this long when all is well.
PATIENCE_S = 60.0


@dataclass(slots=True)
class Member:
    """A plane and everything that its handlers were told, in order."""

    identity: Identity
    plane: ControlPlane = field(init=False)
    events: "asyncio.Queue[tuple[object, ...]]" = field(default_factory=asyncio.Queue)
    answer: Callable[[PeerId, bytes], bytes] = field(default=lambda peer, question: b"answer to " + question)
    release: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def peer(self) -> PeerId:
        return self.identity.peer

    async def expect(self, kind: str) -> tuple[object, ...]:
        """The next event, which must be of this kind."""
        async with asyncio.timeout(PATIENCE_S):
            event = await self.events.get()
        assert event[0] == kind, event
        return event[1:]

    async def hears(self, within_s: float = 0.1) -> bool:
        """Whether any event is there or comes within this time."""
        if self.events.empty():
            with suppress(TimeoutError):
                async with asyncio.timeout(within_s):
                    event = await self.events.get()
                self.events.put_nowait(event)
        return not self.events.empty()

    async def find(self, kind: str) -> tuple[object, ...]:
        """The next event of this kind; those before it are dropped."""
        async with asyncio.timeout(PATIENCE_S):
            while (event := await self.events.get())[0] != kind:
                pass
        return event[1:]


def _handlers(member: Member, check_presence: Callable[[PeerId, bytes], None]) -> ControlHandlers:
    def note(kind: str) -> Callable[..., None]:
        return lambda *args: member.events.put_nowait((kind, *args))

    async def answer(peer: PeerId, question: bytes) -> bytes:
        if question == b"hang":
            await member.release.wait()
        return member.answer(peer, question)

    return ControlHandlers(
        on_message=note("message"),
        on_request=answer,
        on_presence=note("presence"),
        on_peer_connected=note("connected"),
        on_peer_lost=note("lost"),
        on_misbehaviour=note("misbehaviour"),
        on_bootstrap_failed=note("bootstrap_failed"),
        on_crashed=note("crashed"),
        check_presence=check_presence,
    )


def _refuse_bad(source: PeerId, payload: bytes) -> None:
    if payload == b"bad":
        raise ProtocolError(Refusal.MALFORMED, "a bad presence")


def _accept(source: PeerId, payload: bytes) -> None:
    return


@dataclass(slots=True)
class Members:
    """Makes members of one swarm and stops them all."""

    make_plane: Callable[[ControlConfig, ControlHandlers], ControlPlane]
    _made: list[Member] = field(default_factory=list)

    def make(
        self,
        *,
        bootstrap: Sequence[str] = (),
        checks: bool = True,
        listen: str = "/ip4/127.0.0.1/tcp/0",
        seed: int = 0,
        serves_dht: bool = True,
    ) -> Member:
        identity = Identity(bytes([seed or 100 + len(self._made)]) * 32)
        config = ControlConfig(
            identity=identity, swarm=SWARM, listen=(listen,), bootstrap=tuple(bootstrap), serves_dht=serves_dht
        )
        member = Member(identity)
        member.plane = self.make_plane(config, _handlers(member, _refuse_bad if checks else _accept))
        self._made.append(member)
        return member

    async def start(self, count: int) -> list[Member]:
        """Started members, each connected to the one before it, their connection events taken."""
        members = [self.make() for _ in range(count)]
        await asyncio.gather(*(member.plane.start() for member in members))
        for one, other in itertools.pairwise(members):
            await other.plane.connect(one.plane.addresses())
            await one.expect("connected")
            await other.expect("connected")
        return members

    async def stop(self) -> None:
        await asyncio.gather(*(member.plane.stop() for member in self._made))


async def gossip_until_heard(speaker: Member, hearer: Member, payload: bytes) -> None:
    """Gossip links form a moment after connections, so presence is repeated, here as in life."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            await speaker.plane.publish(payload)
            if await hearer.hears():
                return


class ControlContract:
    """The tests. A subclass gives the `make_plane` fixture."""

    @pytest.fixture
    async def members(
        self, make_plane: Callable[[ControlConfig, ControlHandlers], ControlPlane]
    ) -> AsyncIterator[Members]:
        members = Members(make_plane)
        yield members
        await members.stop()
        for member in members._made:
            while not member.events.empty():
                assert member.events.get_nowait()[0] != "crashed"

    async def test_connected_peers_know_each_other(self, members: Members) -> None:
        one, other = members.make(), members.make()
        await one.plane.start()
        await other.plane.start()
        assert await other.plane.connect(one.plane.addresses()) == one.peer
        assert await one.expect("connected") == (other.peer,)
        assert await other.expect("connected") == (one.peer,)
        assert [known.peer for known in one.plane.peers()] == [other.peer]
        assert [known.dialled for known in one.plane.peers()] == [False]
        assert other.plane.peers() == (PeerAddresses(peer=one.peer, addresses=one.plane.addresses(), dialled=True),)

    async def test_connecting_again_is_no_event(self, members: Members) -> None:
        one, other = await members.start(2)
        assert await other.plane.connect(one.plane.addresses()) == one.peer
        await other.plane.send(one.peer, b"next")
        assert await one.expect("message") == (other.peer, b"next")

    async def test_messages_arrive_in_order_from_whom_they_are(self, members: Members) -> None:
        one, other = await members.start(2)
        texts = [b"%d" % number for number in range(200)]
        await asyncio.gather(*(other.plane.send(one.peer, text) for text in texts))
        assert [await one.expect("message") for _ in texts] == [(other.peer, text) for text in texts]
        await one.plane.send(other.peer, b"back")
        assert await other.expect("message") == (one.peer, b"back")

    async def test_the_largest_and_the_smallest_message_pass(self, members: Members) -> None:
        one, other = await members.start(2)
        for payload in (bytes(FRAME_BYTES_MAX), b""):
            await other.plane.send(one.peer, payload)
            assert await one.expect("message") == (other.peer, payload)

    async def test_oversized_payloads_are_the_callers_mistake(self, members: Members) -> None:
        one, other = await members.start(2)
        with pytest.raises(AssertionError):
            await other.plane.send(one.peer, bytes(FRAME_BYTES_MAX + 1))
        with pytest.raises(AssertionError):
            await other.plane.request(one.peer, bytes(FRAME_BYTES_MAX + 1))
        with pytest.raises(AssertionError):
            await other.plane.publish(bytes(PRESENCE_BYTES_MAX + 1))

    async def test_strangers_are_unreachable(self, members: Members) -> None:
        (one,) = await members.start(1)
        stranger = Identity(b"?" * 32).peer
        for call in (one.plane.send(stranger, b"hello"), one.plane.request(stranger, b"hello")):
            with pytest.raises(PeerUnreachable) as caught:
                await call
            assert (caught.value.peer, caught.value.failure) == (stranger, Failure.PEER_UNREACHABLE)

    async def test_addresses_where_nobody_listens_are_unreachable(self, members: Members) -> None:
        (one,) = await members.start(1)
        nowhere = Address(net="ip4", host="127.0.0.1", port=1, peer=Identity(b"?" * 32).peer)
        with pytest.raises(PeerUnreachable) as caught:
            await one.plane.connect([str(nowhere)])
        assert caught.value.failure is Failure.PEER_UNREACHABLE

    async def test_the_peer_that_answers_must_be_the_one_that_was_called(self, members: Members) -> None:
        one, other = members.make(), members.make()
        await one.plane.start()
        await other.plane.start()
        stranger = Identity(b"?" * 32).peer
        port = int(one.plane.addresses()[0].split("/")[4])
        with pytest.raises(PeerUnreachable):
            await other.plane.connect([str(Address(net="ip4", host="127.0.0.1", port=port, peer=stranger))])

    @pytest.mark.parametrize("addresses", [["nonsense"], ["/ip4/127.0.0.1/tcp/1"], []])
    async def test_malformed_addresses_are_input_errors(self, members: Members, addresses: list[str]) -> None:
        (one,) = await members.start(1)
        with pytest.raises(UriError):
            await one.plane.connect(addresses)

    async def test_requests_are_answered(self, members: Members) -> None:
        one, other = await members.start(2)
        one.answer = lambda peer, question: peer + question
        questions = [b"%d" % number for number in range(40)]
        answers = await asyncio.gather(*(other.plane.request(one.peer, question) for question in questions))
        assert answers == [other.peer + question for question in questions]
        one.answer = lambda peer, question: bytes(FRAME_BYTES_MAX)
        assert await other.plane.request(one.peer, bytes(FRAME_BYTES_MAX)) == bytes(FRAME_BYTES_MAX)

    async def test_a_refused_request_says_why(self, members: Members) -> None:
        one, other = await members.start(2)

        def refuse(peer: PeerId, question: bytes) -> bytes:
            raise ProtocolError(Refusal.WRONG_SWARM, "not here")

        one.answer = refuse
        with pytest.raises(RequestRefused) as caught:
            await other.plane.request(one.peer, b"may I?")
        assert (caught.value.peer, caught.value.refusal) == (one.peer, Refusal.WRONG_SWARM)
        one.answer = lambda peer, question: b"yes"
        assert await other.plane.request(one.peer, b"and now?") == b"yes"

    async def test_a_request_does_not_wait_for_ever(self, members: Members) -> None:
        one, other = await members.start(2)
        with pytest.raises(PeerUnreachable) as caught:
            await other.plane.request(one.peer, b"hang", timeout_s=0.05)
        assert caught.value.failure is Failure.PEER_SLOW
        assert await other.plane.request(one.peer, b"still there?") == b"answer to still there?"

    async def test_presence_reaches_a_third_peer(self, members: Members) -> None:
        one, middle, other = await members.start(3)
        await gossip_until_heard(one, other, b"here")
        assert await other.expect("presence") == (one.peer, b"here")
        assert await middle.find("presence") == (one.peer, b"here")
        assert one.events.empty()

    async def test_a_refused_presence_goes_no_further(self, members: Members) -> None:
        one, middle, other = await members.start(3)
        await gossip_until_heard(one, other, b"good")
        await one.plane.publish(b"bad")
        peer, error = await middle.find("misbehaviour")
        assert peer == one.peer
        assert isinstance(error, ProtocolError) and error.refusal is Refusal.MALFORMED
        await one.plane.publish(b"last")
        seen = []
        while b"last" not in seen:
            _, payload = await other.find("presence")
            seen.append(payload)
        assert b"bad" not in seen

    async def test_providers_are_found_through_a_third_peer(self, members: Members) -> None:
        one, _, other = await members.start(3)
        key = b"\x12\x20" + bytes(32)
        async with asyncio.timeout(PATIENCE_S):
            while not await one.plane.provide(key):
                pass
            while not (found := await other.plane.find_providers(key)):
                pass
        assert found == (PeerAddresses(peer=one.peer, addresses=one.plane.addresses()),)
        assert await one.plane.find_providers(key) == ()
        assert await other.plane.find_providers(b"\x12\x20" + bytes([1]) * 32) == ()

    async def test_a_peer_is_found_through_a_third_peer(self, members: Members) -> None:
        one, _, other = await members.start(3)
        async with asyncio.timeout(PATIENCE_S):
            while (found := await other.plane.find_peer(one.peer)) is None:
                pass
        assert found == PeerAddresses(peer=one.peer, addresses=one.plane.addresses())
        assert await other.plane.find_peer(Identity(b"?" * 32).peer) is None

    async def test_disconnecting_is_seen_on_both_sides_after_the_last_message(self, members: Members) -> None:
        one, other = await members.start(2)
        await other.plane.send(one.peer, b"bye")
        assert await one.expect("message") == (other.peer, b"bye")
        await one.plane.disconnect(other.peer)
        assert await one.expect("lost") == (other.peer,)
        assert await other.expect("lost") == (one.peer,)
        assert one.plane.peers() == other.plane.peers() == ()

    async def test_a_peer_that_stops_is_lost(self, members: Members) -> None:
        one, other = await members.start(2)
        await other.plane.stop()
        assert await one.expect("lost") == (other.peer,)

    async def test_nothing_works_before_start_and_after_stop(self, members: Members) -> None:
        member = members.make()
        stranger = Identity(b"?" * 32).peer
        for started in (False, True):
            if started:
                await member.plane.start()
                await member.plane.stop()
                await member.plane.stop()
            with pytest.raises(ControlStopped):
                member.plane.peers()
            with pytest.raises(ControlStopped):
                member.plane.addresses()
            for call in (
                member.plane.send(stranger, b""),
                member.plane.request(stranger, b""),
                member.plane.publish(b""),
                member.plane.provide(b"\x12\x20" + bytes(32)),
            ):
                with pytest.raises(ControlStopped):
                    await call

    async def test_stopping_ends_calls_that_are_under_way(self, members: Members) -> None:
        one, other = await members.start(2)
        pending = asyncio.create_task(other.plane.request(one.peer, b"hang"))
        while not (await other.plane.request(one.peer, b"warm")):
            pass
        await other.plane.stop()
        with pytest.raises((ControlStopped, PeerUnreachable)):
            await pending

    async def test_a_taken_port_is_named(self, members: Members) -> None:
        (one,) = await members.start(1)
        taken = one.plane.addresses()[0].rsplit("/p2p/", 1)[0]
        second = members.make(listen=taken)
        with pytest.raises(ConfigError) as caught:
            await second.plane.start()
        assert caught.value.field == "control.port"
        assert taken.rsplit("/", 1)[1] in caught.value.problem and "in use" in caught.value.problem

    async def test_dead_bootstrap_peers_are_harmless(self, members: Members) -> None:
        (alive,) = await members.start(1)
        dead = str(Address(net="ip4", host="127.0.0.1", port=1, peer=Identity(b"?" * 32).peer))
        member = members.make(bootstrap=(dead, *alive.plane.addresses()))
        await member.plane.start()
        events = [(await member.events.get()) for _ in range(2)]
        (failed,) = (event[1] for event in events if event[0] == "bootstrap_failed")
        assert isinstance(failed, BootstrapFailed)
        assert (failed.address, failed.failure, failed.attempts) == (dead, Failure.BOOTSTRAP_UNREACHABLE, 1)
        assert ("connected", alive.peer) in events

    async def test_a_lost_bootstrap_peer_is_dialled_again(self, members: Members) -> None:
        (bootstrap,) = await members.start(1)
        member = members.make(bootstrap=bootstrap.plane.addresses())
        await member.plane.start()
        await member.expect("connected")
        await bootstrap.expect("connected")
        await bootstrap.plane.disconnect(member.peer)
        await member.expect("lost")
        assert await member.find("connected") == (bootstrap.peer,)

    async def test_a_node_may_be_its_own_bootstrap_peer(self, members: Members) -> None:
        member = members.make()
        own = str(Address(net="ip4", host="127.0.0.1", port=1, peer=member.peer))
        same = members.make(bootstrap=(own,), seed=member.identity.seed[0])
        await same.plane.start()
        await same.plane.publish(b"alone")
        assert same.events.empty()
