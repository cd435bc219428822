"""Whether this peer can be dialled: a link that came in proves it; others are asked who could come through."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from shoal.node import reach
from shoal.node.link_port import LinkLost
from shoal.protocol.errors import ProtocolError, Refusal
from shoal.protocol.identity import PeerId
from shoal.protocol.messages import GetPeers, ReachAnswer, encode_message
from tests.unit.node.node_samples import Peer, make_samples, open_peer, wait_until
from tests.unit.node.puppet import Puppet, open_puppet


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reach, "PERIOD_S", 0.0)


@asynccontextmanager
async def open_asker(folder: Path) -> AsyncIterator[tuple[Peer, Puppet]]:
    """A peer that knows one other one, who answers as the test says."""
    swarm = make_samples()
    async with open_peer(swarm, 0, folder) as peer, open_puppet(swarm, 1, peer) as puppet:
        puppet.show(peer)
        yield peer, puppet


async def watch(peer: Peer) -> None:
    told: list[bool] = []
    async with asyncio.timeout(10):
        await peer.reach.watch(lambda: told.append(peer.reach.reached))
    assert told == [True]


async def test_a_link_that_somebody_dialled_proves_it_and_nobody_is_asked(tmp_path: Path) -> None:
    async with open_asker(tmp_path) as (peer, puppet):
        assert await puppet.links.probe(peer.me, peer.swarm.addresses[peer.me])
        await wait_until(lambda: peer.links.accepted)
        await watch(peer)


@pytest.mark.parametrize(
    "first",
    [
        ReachAnswer(known=True, reached=False),
        ReachAnswer(known=False, reached=True),
        GetPeers(),
        b"no message",
        Refusal.NOT_READY,
    ],
    ids=["not reached", "not known", "another message", "no message", "refused"],
)
async def test_only_a_peer_that_dialled_and_came_through_is_believed(tmp_path: Path, first: object) -> None:
    async with open_asker(tmp_path) as (peer, puppet):
        asked = 0

        async def answer(asker: PeerId, raw: bytes) -> bytes:
            nonlocal asked
            asked += 1
            if asked == 3:
                return encode_message(peer.swarm.id, ReachAnswer(known=True, reached=True))
            assert not peer.reach.reached
            if isinstance(first, Refusal):
                raise ProtocolError(first, "by the test")
            return first if isinstance(first, bytes) else encode_message(peer.swarm.id, first)

        puppet.answer = answer
        await watch(peer)
        assert asked == 3


async def test_without_anybody_to_ask_it_waits_until_a_link_comes(tmp_path: Path) -> None:
    swarm = make_samples()
    async with open_peer(swarm, 0, tmp_path) as peer, open_puppet(swarm, 1) as puppet:
        watching = asyncio.create_task(watch(peer))
        await asyncio.sleep(0)
        assert not watching.done()
        with suppress(LinkLost):
            await puppet.links.probe(peer.me, swarm.addresses[peer.me])
        await watching


async def test_who_has_gone_meanwhile_is_no_answer(tmp_path: Path) -> None:
    async with open_asker(tmp_path) as (peer, puppet):
        await peer.control.disconnect(puppet.me)
        watching = asyncio.create_task(watch(peer))
        await wait_until(lambda: watching.done() or puppet.me in peer.membership.table.live())
        assert not peer.reach.reached
        assert await puppet.links.probe(peer.me, peer.swarm.addresses[peer.me])
        await watching
