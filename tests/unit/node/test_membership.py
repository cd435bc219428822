"""Who is in the swarm: presences taken and refused, connections kept and given up, peers found."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from shoal.dht.keys import epoch_at, provider_key
from shoal.node import membership
from shoal.protocol.errors import Failure, ProtocolError, Refusal
from shoal.protocol.identity import PeerId
from shoal.protocol.messages import GetPeers, PeersAnswer, Prepare, encode_message, sign_message
from tests.unit.node.exposition import count_refused
from tests.unit.node.node_samples import TINY_ELEMENTS, Peer, make_samples, open_peer, wait_until
from tests.unit.node.puppet import Puppet, open_puppet
from tests.unit.protocol.samples import IDENTITIES, PEERS

STRANGER = 6


@asynccontextmanager
async def open_host(folder: Path, **rules: float) -> AsyncIterator[tuple[Peer, Puppet]]:
    swarm = make_samples(TINY_ELEMENTS, 3, **rules)
    async with open_peer(swarm, 0, folder) as peer, open_puppet(swarm, 1, peer) as puppet:
        yield peer, puppet


def connected(peer: Peer) -> set[PeerId]:
    return {one.peer for one in peer.control.peers()}


# -- presences -------------------------------------------------------------------------------------------------------


async def test_the_newest_presence_counts_and_an_older_one_is_a_replay(tmp_path: Path) -> None:
    async with open_host(tmp_path) as (peer, puppet):
        first = puppet.make_presence(peer)
        second = puppet.make_presence(peer, tokens_per_s=9.0)
        for presence in (second, first, second):
            peer.membership.take_presence(puppet.encode(presence), puppet.me)
        assert peer.membership.table.newest(puppet.me) == second
        assert [known for known, first in peer.seen if first] == [puppet.me]
        assert count_refused(peer, "replayed", "control") == 1
        # A restarted peer counts from one again, in a higher incarnation.
        third = puppet.make_presence(peer, incarnation=2, sequence=1)
        peer.membership.take_presence(puppet.encode(third), puppet.me)
        assert peer.membership.table.newest(puppet.me) == third


@pytest.mark.parametrize("forge", ["signature", "author", "message", "swarm", "bytes"])
async def test_a_forged_presence_costs_whoever_brought_it(tmp_path: Path, forge: str) -> None:
    async with open_host(tmp_path) as (peer, puppet):
        honest = puppet.make_presence(peer)
        raw, refusal = {
            "signature": (puppet.encode(replace(honest, tokens_per_s=9e9)), Refusal.BAD_SIGNATURE),
            "author": (puppet.encode(replace(honest, peer=PEERS[STRANGER])), Refusal.BAD_SIGNATURE),
            "message": (puppet.encode(Prepare(round=1, attempt=0)), Refusal.UNKNOWN_TYPE),
            "swarm": (encode_message(b"o" * 32, honest), Refusal.WRONG_SWARM),
            "bytes": (puppet.encode(honest)[:-1], Refusal.MALFORMED),
        }[forge]
        peer.membership.take_presence(raw, puppet.me)
        assert peer.misbehaviours == [(puppet.me, refusal)]
        assert peer.membership.table.live() == {} and peer.seen == []


async def test_somebody_elses_presence_may_be_passed_on(tmp_path: Path) -> None:
    async with open_host(tmp_path) as (peer, puppet):
        theirs = replace(puppet.make_presence(peer), peer=PEERS[STRANGER], control_addresses=())
        signed = sign_message(IDENTITIES[STRANGER], peer.swarm.id, theirs)
        peer.membership.take_presence(puppet.encode(signed), puppet.me)
        assert set(peer.membership.table.live()) == {PEERS[STRANGER]}
        assert peer.misbehaviours == []


async def test_clocks_that_differ_are_measured(tmp_path: Path) -> None:
    async with open_host(tmp_path) as (peer, puppet):
        puppet.show(peer, sent_at_s=time.time() - 120.0)
        assert -125.0 < peer.membership.clock_skew_s[puppet.me] < -115.0
        assert puppet.me in peer.membership.table.live(), "a wrong clock keeps nobody out"
        await puppet.control.stop()
        await wait_until(lambda: peer.lost)
        assert peer.membership.clock_skew_s == {}, "who is gone is not counted"


async def test_a_peer_that_is_not_heard_any_more_is_lost(tmp_path: Path) -> None:
    async with open_host(tmp_path, presence_period_s=0.05, presence_timeout_s=0.2) as (peer, puppet):
        puppet.show(peer)
        peer.spawn(peer.membership.beat())
        await wait_until(lambda: peer.lost)
        assert [(one.peer, one.reason) for one in peer.lost] == [(puppet.me, Failure.PEER_LOST)]
        assert puppet.me in connected(peer), "nothing in the transport told it"
        puppet.show(peer)
        assert puppet.me in peer.membership.table.live(), "and it is back with its next presence"
        assert [first for _, first in peer.seen] == [True, True]


async def test_what_changed_is_published_before_the_next_beat(tmp_path: Path) -> None:
    async with open_host(tmp_path, presence_period_s=1800.0, presence_timeout_s=3600.0) as (peer, puppet):
        heard = []
        publish = peer.control.publish

        async def watch(payload: bytes) -> None:
            heard.append(payload)
            await publish(payload)

        peer.control.publish = watch  # type: ignore[method-assign]
        peer.spawn(peer.membership.beat())
        await wait_until(lambda: len(heard) == 1)
        peer.membership.announce()
        await wait_until(lambda: len(heard) == 2)
        assert puppet.me in connected(peer)


# -- connections -----------------------------------------------------------------------------------------------------


async def test_a_peer_that_is_new_is_dialled(tmp_path: Path) -> None:
    swarm = make_samples(founders=3)
    async with open_peer(swarm, 0, tmp_path) as peer, open_puppet(swarm, 1) as puppet:
        puppet.show(peer)
        await wait_until(lambda: puppet.me in connected(peer))


async def test_a_connection_that_breaks_is_made_anew_and_nobody_is_lost(tmp_path: Path) -> None:
    async with open_host(tmp_path) as (peer, puppet):
        puppet.show(peer)
        for _ in range(3):
            await peer.control.disconnect(puppet.me)
            await wait_until(lambda: puppet.me in connected(peer))
        assert peer.lost == [] and puppet.me in peer.membership.table.live()


async def test_a_peer_that_cannot_be_dialled_any_more_is_lost_at_once(tmp_path: Path) -> None:
    async with open_host(tmp_path) as (peer, puppet):
        puppet.show(peer)
        await puppet.control.stop()
        await wait_until(lambda: peer.lost)
        assert [(one.peer, one.reason) for one in peer.lost] == [(puppet.me, Failure.PEER_LOST)]
        known = peer.membership.book.get(puppet.me)
        assert known is not None, "its addresses stay in the book"


async def test_a_peer_that_leaves_is_not_dialled_again(tmp_path: Path) -> None:
    async with open_host(tmp_path) as (peer, puppet):
        puppet.show(peer)
        assert await peer.membership.connect(puppet.me)
        await asyncio.sleep(0)  # the dial of a peer that is new has found the connection
        puppet.show(peer, leaving=True)
        await puppet.control.disconnect(peer.me)
        await wait_until(lambda: peer.lost)
        assert puppet.me not in connected(peer)
        puppet.show(peer, leaving=True)
        assert puppet.me not in peer.membership.table.live(), "a farewell brings nobody back"


async def test_a_stranger_that_hangs_up_is_nobodys_loss(tmp_path: Path) -> None:
    async with open_host(tmp_path) as (peer, puppet):
        await puppet.control.disconnect(peer.me)
        await wait_until(lambda: puppet.me not in connected(peer))
        assert peer.lost == []


async def test_one_peer_is_dialled_once_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    swarm = make_samples(founders=3)
    async with open_peer(swarm, 0, tmp_path) as peer, open_puppet(swarm, 1) as puppet:
        release, dials = asyncio.Event(), []
        connect = peer.control.connect

        async def slowly(addresses: tuple[str, ...]) -> PeerId:
            dials.append(addresses)
            await release.wait()
            return await connect(addresses)

        monkeypatch.setattr(peer.control, "connect", slowly)
        puppet.show(peer)
        await wait_until(lambda: dials)
        assert not await peer.membership.connect(puppet.me), "it is being dialled"
        release.set()
        await wait_until(lambda: puppet.me in connected(peer))
        assert await peer.membership.connect(puppet.me) and len(dials) == 1


async def test_addresses_that_are_told_while_a_dial_hangs_are_dialled_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A peer that has just started tells the way through its relay only when it has one."""
    swarm = make_samples(founders=3)
    async with open_peer(swarm, 0, tmp_path) as peer, open_puppet(swarm, 1) as puppet:
        dials: list[tuple[str, ...]] = []
        connect, nowhere = peer.control.connect, "/ip4/192.0.2.1/tcp/1"

        async def dial(addresses: tuple[str, ...]) -> PeerId:
            dials.append(addresses)
            if len(dials) == 1:
                await asyncio.Event().wait()
            return await connect(addresses)

        monkeypatch.setattr(peer.control, "connect", dial)
        known = puppet.make_presence(peer).control_addresses
        puppet.show(peer, control_addresses=(nowhere,))
        await wait_until(lambda: dials)
        puppet.show(peer, control_addresses=(nowhere,))
        puppet.show(peer, control_addresses=(*known, nowhere))
        await wait_until(lambda: puppet.me in connected(peer))
        assert len(dials) == 2 and {one.partition("/p2p/")[0] for one in dials[0]} == {nowhere}
        puppet.show(peer, control_addresses=(*known, nowhere, "/ip4/192.0.2.2/tcp/1"))
        await asyncio.sleep(0)
        assert len(dials) == 2, "there is a connection"


# -- finding peers ---------------------------------------------------------------------------------------------------


async def test_a_new_neighbour_is_asked_whom_it_knows(tmp_path: Path) -> None:
    swarm = make_samples(founders=3)
    async with open_peer(swarm, 0, tmp_path) as peer, open_puppet(swarm, 1) as friend, open_puppet(swarm, 2) as other:
        theirs = other.make_presence(peer)

        async def answer(asker: PeerId, raw: bytes) -> bytes:
            return friend.encode(PeersAnswer(presences=(friend.make_presence(peer), theirs)))

        friend.answer = answer
        await friend.control.connect(peer.control.addresses())
        await wait_until(lambda: set(peer.membership.table.live()) == {friend.me, other.me})
        await wait_until(lambda: other.me in connected(peer))


@pytest.mark.parametrize(
    ("lie", "refusal"),
    [("forged", Refusal.BAD_SIGNATURE), ("bytes", Refusal.MALFORMED), ("refuses", None), ("other", None)],
)
async def test_a_neighbour_that_answers_nonsense_costs_nothing_but_its_own_account(
    tmp_path: Path, lie: str, refusal: Refusal | None
) -> None:
    swarm = make_samples(founders=3)
    async with open_peer(swarm, 0, tmp_path) as peer, open_puppet(swarm, 1) as puppet:
        asked = asyncio.Event()

        async def answer(asker: PeerId, raw: bytes) -> bytes:
            asked.set()
            if lie == "refuses":
                raise ProtocolError(Refusal.NOT_READY, "by the test")
            forged = replace(puppet.make_presence(peer), tokens_per_s=9e9)
            return {
                "forged": puppet.encode(PeersAnswer(presences=(forged,))),
                "bytes": b"no message",
                "other": puppet.encode(GetPeers()),
            }[lie]

        puppet.answer = answer
        await puppet.control.connect(peer.control.addresses())
        await asked.wait()
        await wait_until(lambda: refusal is None or peer.misbehaviours)
        assert peer.misbehaviours == ([] if refusal is None else [(puppet.me, refusal)])
        assert peer.membership.table.live() == {}


async def test_peers_are_found_in_the_dht_and_dialled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(membership, "DISCOVERY_PERIOD_S", 0.0)
    swarm = make_samples(founders=3)
    async with (
        open_peer(swarm, 0, tmp_path) as peer,
        open_puppet(swarm, 1, peer) as bridge,
        open_puppet(swarm, 2) as hidden,
    ):
        await hidden.control.connect(bridge.control.addresses())
        await hidden.control.provide(provider_key(swarm.id, epoch_at(time.time())))
        assert hidden.me not in connected(peer)
        peer.spawn(peer.membership.discover())
        await wait_until(lambda: hidden.me in connected(peer))
        own = provider_key(swarm.id, epoch_at(time.time()))
        assert peer.me in {one.peer for one in await bridge.control.find_providers(own)}
