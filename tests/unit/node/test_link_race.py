"""Several addresses of one peer: the first that has proven it wins, what is broken costs one head start."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

import pytest

from shoal.node import link_listen
from shoal.node.link_listen import open_dialling, open_listeners
from shoal.node.link_port import Address, LinkEnd, LinkLost
from shoal.node.link_race import race, resolve
from shoal.protocol.identity import PeerId
from tests.unit.node.link_harness import ALICE, BOB, CAROL, describe, lost_reason, node, on_both_loops

ONE, TWO, THREE = (("192.0.2.1", 1), ("192.0.2.2", 2), ("192.0.2.3", 3))
FOR_EVER_S = 3600.0


def lost(reason: LinkEnd) -> LinkLost:
    return LinkLost(PeerId(bytes(32)), reason)


class Dials:
    """Dials that do what the test says, and a list of what became of them."""

    def __init__(self, **outcomes: object) -> None:
        self.log: list[str] = []
        self.discarded: list[str] = []
        self._outcomes = outcomes

    async def __call__(self, address: Address) -> str:
        name = f"a{address[1]}"
        self.log.append(f"{name} begun")
        outcome = self._outcomes[name]
        try:
            if outcome is None:
                await asyncio.get_running_loop().create_future()
            if isinstance(outcome, asyncio.Event):
                await outcome.wait()
            if isinstance(outcome, LinkLost):
                raise outcome
        except asyncio.CancelledError:
            self.log.append(f"{name} ended")
            raise
        return name

    async def run(self, *addresses: Address, head_start_s: float = 0.0) -> str:
        return await race(addresses, self, head_start_s, self.discarded.append)


async def test_the_first_address_that_works_is_the_only_one_tried() -> None:
    dials = Dials(a1="", a2="")
    assert await dials.run(ONE, TWO, head_start_s=FOR_EVER_S) == "a1"
    assert dials.log == ["a1 begun"]


async def test_a_failure_lets_the_next_one_begin_at_once() -> None:
    dials = Dials(a1=lost(LinkEnd.UNREACHABLE), a2="")
    assert await dials.run(ONE, TWO, head_start_s=FOR_EVER_S) == "a2"


async def test_a_final_failure_ends_the_race() -> None:
    dials = Dials(a1=lost(LinkEnd.REFUSED_BY_PEER), a2="")
    with pytest.raises(LinkLost) as caught:
        await race((ONE, TWO), dials, FOR_EVER_S, dials.discarded.append, lambda error: True)
    assert caught.value.reason is LinkEnd.REFUSED_BY_PEER
    assert dials.log == ["a1 begun"]


async def test_silence_costs_one_head_start_and_the_loser_is_ended() -> None:
    dials = Dials(a1=None, a2="")
    assert await dials.run(ONE, TWO) == "a2"
    assert dials.log == ["a1 begun", "a2 begun", "a1 ended"]


async def test_an_early_address_may_still_win() -> None:
    slow = asyncio.Event()
    dials = Dials(a1=slow, a2=None, a3=None)
    racing = asyncio.create_task(dials.run(ONE, TWO, THREE))
    while len(dials.log) < 3:
        await asyncio.sleep(0)
    slow.set()
    assert await racing == "a1"
    assert sorted(dials.log[3:]) == ["a2 ended", "a3 ended"]


async def test_two_winners_at_once_leave_one() -> None:
    both = asyncio.Event()
    dials = Dials(a1=both, a2=both)
    racing = asyncio.create_task(dials.run(ONE, TWO))
    while len(dials.log) < 2:
        await asyncio.sleep(0)
    both.set()
    won = await racing
    assert sorted([won, *dials.discarded]) == ["a1", "a2"]


async def test_of_several_failures_the_one_that_says_most_is_told() -> None:
    dials = Dials(a1=lost(LinkEnd.UNREACHABLE), a2=lost(LinkEnd.REFUSED_BY_PEER), a3=lost(LinkEnd.UNREACHABLE))
    with pytest.raises(LinkLost) as caught:
        await dials.run(ONE, TWO, THREE)
    assert caught.value.reason is LinkEnd.REFUSED_BY_PEER


async def test_who_gives_up_ends_every_attempt() -> None:
    dials = Dials(a1=None, a2=None)
    racing = asyncio.create_task(dials.run(ONE, TWO))
    while len(dials.log) < 2:
        await asyncio.sleep(0)
    racing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await racing
    assert sorted(dials.log[2:]) == ["a1 ended", "a2 ended"]


async def test_names_are_looked_up_and_numbers_are_not() -> None:
    six: Address = ("2001:db8::1", 5)
    assert await resolve((ONE, six), 8, FOR_EVER_S) == [six, ONE]
    assert await resolve((ONE, TWO, THREE), 2, FOR_EVER_S) == [ONE, TWO]
    looked_up = await resolve((("localhost", 7),), 8, FOR_EVER_S)
    assert ("127.0.0.1", 7) in looked_up and all(port == 7 for _, port in looked_up)
    assert await resolve((("no-such-host.invalid", 7),), 8, FOR_EVER_S) == []


# -- over real sockets -----------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def silent_server() -> AsyncIterator[tuple[Address, asyncio.Event]]:
    """Somebody who accepts and says nothing; the event is set when the other side has hung up."""
    left = asyncio.Event()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            await reader.read()
        left.set()
        writer.close()

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[:2], left
    finally:
        server.close()
        await server.wait_closed()


@on_both_loops
async def test_an_address_that_answers_nothing_does_not_hold_up_the_next_one() -> None:
    async with silent_server() as (silent, left), node(ALICE, head_start_s=0.0) as alice, node(BOB) as bob:
        header, payload = describe(b"x"), memoryview(b"x")
        await alice.links.send(bob.peer, (silent, bob.address), header, payload)
        await bob.sink.until(lambda: bob.sink.payloads)
        await left.wait()
        assert alice.links.statistics().links == 1
        assert alice.sink.ends == []


@on_both_loops
async def test_a_stranger_at_one_address_does_not_spoil_the_other() -> None:
    async with node(ALICE) as alice, node(BOB) as bob, node(CAROL) as carol:
        header, payload = describe(b"x"), memoryview(b"x")
        await alice.links.send(bob.peer, (carol.address, bob.address), header, payload)
        await bob.sink.until(lambda: bob.sink.payloads)
        assert carol.sink.ups == []


@on_both_loops
async def test_when_no_address_leads_to_the_peer_the_stranger_is_told() -> None:
    async with node(ALICE, head_start_s=0.0) as alice, node(CAROL) as carol:
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            addresses = (unused.getsockname(), carol.address)
            send = alice.links.send(BOB.peer, addresses, describe(b"x"), memoryview(b"x"))
            assert (await lost_reason(send))[0] is LinkEnd.MISBEHAVED


# -- the listening port ----------------------------------------------------------------------------------------------


def test_a_wildcard_is_both_families_on_one_port() -> None:
    sockets = open_listeners("0.0.0.0", 0)
    try:
        assert [one.family for one in sockets] == [socket.AF_INET, socket.AF_INET6]
        assert len({one.getsockname()[1] for one in sockets}) == 1
    finally:
        for one in sockets:
            one.close()


def test_a_machine_without_ipv6_listens_on_ipv4(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = {socket.AF_INET: socket.AF_INET, socket.AF_INET6: 12345}
    real = socket.socket
    monkeypatch.setattr(link_listen.socket, "socket", lambda family, kind: real(kinds[family], kind))
    (only,) = open_listeners("::", 0)
    assert only.family == socket.AF_INET
    only.close()


def test_one_port_has_one_listener_and_any_number_of_dials() -> None:
    (listener,) = open_listeners("127.0.0.1", 0)
    listener.listen()
    port = listener.getsockname()[1]
    with listener:
        for host in ("127.0.0.1", "0.0.0.0"):
            with pytest.raises(OSError, match="in use"):
                open_listeners(host, port)
        with open_dialling(socket.AF_INET, ("127.0.0.1", port)) as one, socket.create_server(("127.0.0.1", 0)) as far:
            assert one.getsockname() == ("127.0.0.1", port)
            one.setblocking(True)
            one.connect(far.getsockname())
            accepted, remote = far.accept()
            accepted.close()
            assert remote == ("127.0.0.1", port), "the other side sees the tensor port"


@on_both_loops
async def test_a_wildcard_listener_is_reached_by_both_families() -> None:
    async with node(BOB, host="::") as bob:
        for number, host in enumerate(("127.0.0.1", "::1"), start=1):
            async with node(ALICE) as alice:
                assert await alice.links.probe(bob.peer, (host, bob.address[1]))
                await bob.sink.until(lambda number=number: bob.links.accepted == number)
