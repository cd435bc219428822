"""Whether this peer can be dialled: members are asked, links that come in prove it, and what was found can change."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from shoal.node import dial_back
from shoal.node import reach as reach_module
from shoal.node.config import TensorTable
from shoal.node.link_port import Address, LinkEnd, LinkLost
from shoal.node.reach import Reach, ReachPorts
from shoal.node.reachability import NatMapping, Reachability, ReachReason, ReachState
from shoal.protocol.errors import ProtocolError, Refusal
from shoal.protocol.identity import PeerId
from shoal.protocol.messages import (
    GetObserved,
    GetPeers,
    ObservedAnswer,
    ProbeAddresses,
    ProbeAnswer,
    decode_message_untrusted,
    encode_message,
)
from tests.unit.node.node_samples import Peer, make_samples, open_peer, open_peers, wait_until
from tests.unit.node.puppet import Puppet, open_puppet

REACHED = ProbeAnswer(reached=(True,))
CLOSED = ProbeAnswer(reached=(False,))


@asynccontextmanager
async def open_asker(folder: Path) -> AsyncIterator[tuple[Peer, Puppet]]:
    """A peer that knows one other one, who answers as the test says."""
    swarm = make_samples()
    async with open_peer(swarm, 0, folder) as peer, open_puppet(swarm, 1, peer) as puppet:
        puppet.show(peer)
        # Of what it announces nothing can be dialled from the tensor port: that is what other tests are about.
        del swarm.addresses[puppet.me]
        yield peer, puppet


def reply(peer: Peer, puppet: Puppet, *answers: object) -> list[object]:
    """Let the puppet give these answers in turn, the last one for ever; the questions that it gets."""
    questions: list[object] = []
    left = list(answers)

    async def answer(asker: PeerId, raw: bytes) -> bytes:
        question = decode_message_untrusted(peer.swarm.id, raw)
        if not isinstance(question, ProbeAddresses):
            raise ProtocolError(Refusal.NOT_READY, "the test is about dial-backs")
        questions.append(question)
        given = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(given, Refusal):
            raise ProtocolError(given, "by the test")
        return given if isinstance(given, bytes) else encode_message(peer.swarm.id, given)

    puppet.answer = answer
    return questions


async def test_a_member_that_came_through_makes_the_peer_reachable(tmp_path: Path) -> None:
    async with open_asker(tmp_path) as (peer, puppet):
        reach = peer.paths.reach
        questions = reply(peer, puppet, REACHED)
        assert (reach.state, reach.reason) == (ReachState.UNKNOWN, ReachReason.NOT_ASKED)
        await reach.check()
        host, port = peer.swarm.addresses[peer.me]
        assert questions == [ProbeAddresses(addresses=(f"{host}:{port}",))]
        assert reach.reached and reach.reason is ReachReason.DIALLED_BACK
        assert peer.reach_changes == [f"tensor port: reachable (dialled_back) at {host}:{port}"]
        status = reach.status()
        assert [(one.address, one.state) for one in status.addresses] == [(f"{host}:{port}", ReachState.REACHABLE)]


async def test_what_was_reachable_can_become_private_and_reachable_again(tmp_path: Path) -> None:
    async with open_asker(tmp_path) as (peer, puppet):
        reach = peer.paths.reach
        reply(peer, puppet, REACHED, CLOSED, CLOSED, REACHED)
        await reach.check()
        await reach.check()
        assert (reach.state, reach.reason) == (ReachState.PRIVATE, ReachReason.DIAL_BACK_FAILED)
        assert peer.presence.describe().tensor_addresses == (), "what was found closed is not announced"
        await reach.check()
        await reach.check()
        assert reach.reached
        assert [text.split()[2] for text in peer.reach_changes] == ["reachable", "private", "reachable"]


@pytest.mark.parametrize(
    "answer",
    [
        ProbeAnswer(reached=(None,)),
        ProbeAnswer(reached=()),
        ProbeAnswer(reached=(True, True)),
        GetPeers(),
        b"no message",
        Refusal.NOT_READY,
    ],
    ids=["not tried", "too few", "too many", "another message", "no message", "refused"],
)
async def test_only_a_word_about_this_very_address_counts(tmp_path: Path, answer: object) -> None:
    async with open_asker(tmp_path) as (peer, puppet):
        questions = reply(peer, puppet, answer)
        await peer.paths.reach.check()
        assert questions and peer.paths.reach.state is ReachState.UNKNOWN


async def test_without_anybody_to_ask_nothing_is_known_until_a_link_comes(tmp_path: Path) -> None:
    swarm = make_samples()
    async with open_peer(swarm, 0, tmp_path) as peer, open_puppet(swarm, 1) as puppet:
        reach = peer.paths.reach
        await reach.check()
        assert reach.state is ReachState.UNKNOWN
        assert await puppet.links.probe(peer.me, swarm.addresses[peer.me])
        await wait_until(lambda: reach.reached)
        assert reach.reason is ReachReason.LINK_CAME_IN


async def test_a_link_of_somebody_for_whom_the_router_was_opened_proves_nothing(tmp_path: Path) -> None:
    swarm = make_samples()
    async with open_peer(swarm, 0, tmp_path) as peer, open_puppet(swarm, 1) as puppet:
        await peer.links.dial_from_port(puppet.me, swarm.addresses[puppet.me])
        assert await puppet.links.probe(peer.me, swarm.addresses[peer.me])
        await wait_until(lambda: peer.links.accepted)
        assert peer.paths.reach.state is ReachState.UNKNOWN


async def test_members_dial_back_for_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dial_back, "PERIOD_S", 1e-6)
    async with open_peers(tmp_path, 2) as (ann, bob):
        await ann.paths.reach.check()
        assert ann.paths.reach.reached
        for server in ann.links._servers:
            server.close()
        await ann.paths.reach.check()
        assert ann.paths.reach.state is ReachState.PRIVATE
        assert bob.misbehaviours == []


async def test_a_change_of_the_machine_is_checked_at_once_and_outdates_what_was_known(tmp_path: Path) -> None:
    async with open_asker(tmp_path) as (peer, puppet):
        reach = peer.paths.reach
        questions = reply(peer, puppet, REACHED, ProbeAnswer(reached=(None,)))
        watching = asyncio.create_task(reach.watch())
        try:
            await wait_until(lambda: reach.reached)
            reach.addresses_changed()
            await wait_until(lambda: reach.state is ReachState.UNKNOWN)
            assert len(questions) >= 2
        finally:
            watching.cancel()


# -- addresses -------------------------------------------------------------------------------------------------------


def make_reach(peer: Peer, bound: Address, hosts: tuple[str, ...] = (), **config: object) -> Reach:
    ports = ReachPorts(
        live=peer.membership.table.live,
        addresses_of=peer.swarm.addresses_of,
        hosts=lambda: hosts,
        seen_hosts=lambda: ("45.0.0.7", "127.0.0.1"),
        changed=lambda: None,
    )
    table = replace(TensorTable(), **config)  # type: ignore[arg-type]
    return Reach(peer.swarm.id, table, bound, peer.control, peer.links, ports)


@pytest.mark.parametrize(
    ("bound", "hosts", "config", "announced"),
    [
        (("127.0.0.1", 9), (), {}, (("127.0.0.1", 9),)),
        (("0.0.0.0", 9), (), {}, (("45.0.0.7", 9), ("127.0.0.1", 9))),
        (("0.0.0.0", 9), ("10.0.0.1", "45.0.0.7"), {}, (("45.0.0.7", 9), ("10.0.0.1", 9))),
        (("::", 9), ("2a00::1",), {"announce_port": 7}, (("2a00::1", 7), ("45.0.0.7", 7))),
        (("0.0.0.0", 9), ("10.0.0.1",), {"announce_host": "example.org"}, (("example.org", 9),)),
        (("0.0.0.0", 9), (), {"announce_host": "example.org", "announce_port": 7}, (("example.org", 7),)),
        (("10.0.0.1", 9), ("10.0.0.1", "10.0.0.2"), {"announce_port": 7}, (("10.0.0.1", 7),)),
    ],
)
async def test_the_tensor_port_is_announced_where_others_may_dial_it(
    tmp_path: Path,
    bound: Address,
    hosts: tuple[str, ...],
    config: dict[str, object],
    announced: tuple[Address, ...],
) -> None:
    async with open_peer(make_samples(), 0, tmp_path) as peer:
        assert make_reach(peer, bound, hosts, **config).announced() == announced


async def test_what_a_router_forwards_comes_first_and_goes_with_the_mapping(tmp_path: Path) -> None:
    async with open_peer(make_samples(), 0, tmp_path) as peer:
        reach = make_reach(peer, ("0.0.0.0", 9), ("10.0.0.1",))
        reach.set_mapped("upnp", ("45.0.0.9", 77))
        await reach.check()
        assert reach.announced()[0] == ("45.0.0.9", 77)
        reach.set_mapped("upnp", None)
        await reach.check()
        assert ("45.0.0.9", 77) not in reach.announced()


async def test_a_link_from_elsewhere_to_a_private_address_came_through_the_router(tmp_path: Path) -> None:
    async with open_peer(make_samples(), 0, tmp_path) as peer:
        reach = make_reach(peer, ("0.0.0.0", 9), ("10.0.0.1",))
        stranger, next_door = PeerId(b"s" * 32), PeerId(b"n" * 32)
        reach.link_came_in(next_door, ("10.0.0.1", 9), ("10.0.0.2", 5000))
        assert [(one.address, one.state) for one in reach.status().addresses] == [
            ("45.0.0.7:9", ReachState.UNKNOWN),
            ("10.0.0.1:9", ReachState.REACHABLE),
        ]
        reach.link_came_in(stranger, ("10.0.0.1", 9), ("8.8.8.8", 5000))
        assert {one.state for one in reach.status().addresses} == {ReachState.REACHABLE}


async def test_members_say_how_they_see_the_tensor_port(tmp_path: Path) -> None:
    swarm = make_samples()
    async with open_peer(swarm, 0, tmp_path) as peer, open_puppet(swarm, 1, peer) as puppet:
        puppet.show(peer)
        seen: list[Address | None] = []

        async def answer(asker: PeerId, raw: bytes) -> bytes:
            question = decode_message_untrusted(swarm.id, raw)
            if isinstance(question, GetPeers):
                raise ProtocolError(Refusal.NOT_READY, "the test is about addresses")
            if isinstance(question, GetObserved):
                seen.append(puppet.links.find_remote(asker, question.binding))
                return encode_message(swarm.id, ObservedAnswer(address="45.0.0.8:1024"))
            assert isinstance(question, ProbeAddresses)
            return encode_message(swarm.id, ProbeAnswer(reached=(False,) * len(question.addresses)))

        puppet.answer = answer
        reach = make_reach(peer, ("0.0.0.0", swarm.addresses[peer.me][1]), ("10.0.0.1",))
        # The puppet stands for a member elsewhere; loopback is no way to see a router from.
        reach._choose_address = swarm.addresses.get  # type: ignore[method-assign, assignment]
        await reach.check()
        assert seen == [swarm.addresses[peer.me]], "the link was dialled from the tensor port"
        assert reach.observed() == (("45.0.0.8", 1024),)
        assert reach.mapping is NatMapping.UNKNOWN, "one member alone cannot tell"
        assert "45.0.0.8:1024" in [one.address for one in reach.status().addresses]
        links = peer.links.statistics().links
        await reach.check()
        assert len(seen) == 2 and peer.links.statistics().links == links, "the link stays, and with it the mapping"
        reach.addresses_changed()
        assert reach.observed() == ()


async def test_a_hole_is_not_kept_from_by_a_dial_of_the_same_peer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel has one connection between two ports."""
    async with open_peers(tmp_path, 2) as (ann, bob):
        reach, dialled, ended = ann.paths.reach, asyncio.Event(), asyncio.Event()

        async def dial(peer: PeerId, address: Address) -> bytes:
            dialled.set()
            try:
                await asyncio.Event().wait()  # its router lets nobody in
                raise AssertionError
            finally:
                ended.set()

        async def probe(peer: PeerId, address: Address) -> bool:
            return True

        await wait_until(lambda: len(ann.membership.table.live()) == 1)
        monkeypatch.setattr(reach, "_choose_address", lambda peer: ("192.0.2.1", 1))
        monkeypatch.setattr(ann.links, "probe", probe)
        monkeypatch.setattr(ann.links, "dial_from_port", dial)
        observing = asyncio.create_task(reach._observe())
        await dialled.wait()
        await reach.find_outer(bob.me)
        await observing
        assert ended.is_set()
        dialled.clear()
        await reach._observe()
        assert not dialled.is_set(), "nor is another one begun"
        ann.now_s = lambda: 2 * reach_module.PUNCH_S + reach._punched[bob.me]
        again = asyncio.create_task(reach._observe())
        await dialled.wait()
        again.cancel()


async def test_what_a_machine_has_itself_is_no_hole_however_members_see_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, forwarded, hole = ("45.0.0.9", 4001), ("45.0.0.8", 4001), ("45.0.0.1", 1024)
    async with open_peers(tmp_path, 2) as (ann, bob):
        reach = ann.paths.reach
        await wait_until(lambda: len(ann.membership.table.live()) == 1)
        monkeypatch.setattr(reach, "_list_own", lambda: (own,))
        reach.set_mapped("upnp", forwarded)

        def open_only(address: Address) -> None:
            reach._known = Reachability()
            reach._known.set_candidates((address,))
            reach._known.note(address, bob.me, reached=True, reason=ReachReason.LINK_CAME_IN, now=reach._ports.now())
            reach._observed[bob.me] = address
            assert reach.reached

        for address in (own, forwarded):
            open_only(address)
            assert not reach._relies_on_holes()
            assert reach._pause_s() == reach_module.REACHABLE_PERIOD_S
        open_only(hole)
        assert reach._relies_on_holes()
        assert reach._pause_s() == reach_module.PRIVATE_PERIOD_S
        monkeypatch.setattr(reach, "_config", TensorTable(announce_host=hole[0]))
        assert not reach._relies_on_holes(), "the person says where it can be dialled"


async def test_one_member_that_tells_is_enough_for_a_hole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_peers(tmp_path, 3) as (ann, bob, cat):
        reach, asked = ann.paths.reach, []

        async def observe(peer: PeerId) -> bool:
            asked.append(peer)
            if peer == cat.me:
                await asyncio.Event().wait()  # it is behind a router itself
            reach._observed[peer] = ("45.0.0.1", 1)
            return True

        await wait_until(lambda: len(ann.membership.table.live()) == 2)
        monkeypatch.setattr(reach, "_choose_address", lambda peer: ("192.0.2.1", 1))
        monkeypatch.setattr(reach, "_observe_by", observe)
        monkeypatch.setattr(reach_module, "OBSERVE_TIMEOUT_S", 3600.0)
        assert ("45.0.0.1", 1) in await reach.find_outer(PeerId(b"p" * 32))
        assert set(asked) == {bob.me, cat.me}


async def test_two_who_want_the_outer_address_at_once_ask_each_member_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second dial from the port would fail at once, and a hole would be offered without the address."""
    async with open_peers(tmp_path, 2) as (ann, bob):
        reach, dials, go = ann.paths.reach, [], asyncio.Event()

        async def dial(peer: PeerId, address: Address) -> bytes:
            dials.append(peer)
            if len(dials) > 1:
                raise LinkLost(peer, LinkEnd.UNREACHABLE)
            await go.wait()
            return b"binding"

        async def request(peer: PeerId, question: object) -> ObservedAnswer:
            return ObservedAnswer(address="45.0.0.1:1")

        await wait_until(lambda: len(ann.membership.table.live()) == 1)
        monkeypatch.setattr(reach, "_choose_address", bob.swarm.addresses.get)
        monkeypatch.setattr(reach, "_request", request)
        monkeypatch.setattr(ann.links, "dial_from_port", dial)
        checking = asyncio.create_task(reach._observe())
        await wait_until(lambda: dials != [])
        offering = asyncio.create_task(reach.find_outer(PeerId(b"p" * 32)))
        await wait_until(lambda: len(reach._punched) == 1)
        go.set()
        await checking
        assert ("45.0.0.1", 1) in await offering
        assert dials == [bob.me]


async def test_where_nobody_answers_nothing_is_dialled_from_the_port(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A router remembers that dial for minutes. The other side's knock would then come in to the listener, whose answer
    has other numbers than the router knows: it is dropped, and its place is taken when this side knocks."""
    async with open_peers(tmp_path, 2) as (ann, bob):
        reach, dials = ann.paths.reach, []

        async def probe(peer: PeerId, address: Address) -> bool:
            return False

        async def dial(peer: PeerId, address: Address) -> bytes:
            dials.append(peer)
            return b"binding"

        await wait_until(lambda: len(ann.membership.table.live()) == 1)
        monkeypatch.setattr(reach, "_choose_address", bob.swarm.addresses.get)
        monkeypatch.setattr(ann.links, "probe", probe)
        monkeypatch.setattr(ann.links, "dial_from_port", dial)
        await reach._observe()
        assert dials == [] and reach.observed() == ()
