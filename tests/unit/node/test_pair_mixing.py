"""Peers whose swarm has no quorum: they mix in pairs over real tensor links, train on, and make rounds again later."""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3

from shoal.node import pair_mixing
from shoal.node.training.messages import FloatVector
from shoal.protocol.errors import Failure, Refusal
from shoal.protocol.identity import PeerId
from shoal.protocol.manifest import Training
from shoal.protocol.messages import decode_message_untrusted, encode_message
from shoal.protocol.pairing import AskPair, PairAnswer, PairOffer
from tests.unit.node.exposition import read
from tests.unit.node.fake_trainer import FakeTrainer
from tests.unit.node.node_samples import Peer, Swarm, make_chain, make_samples, open_peer, wait_until

FOUNDERS = 4  # three of them are a quorum
ALONE = Training(gossip_after_s=0.05, inner_steps=10)


class Trainer(FakeTrainer):
    """Remembers what it handed over and what it went on from; it is ready when the test says so."""

    def __init__(self, peer: Peer, target: float) -> None:
        super().__init__(np.full(peer.params.size, target, np.float32), peer.compute.take, round_s=3600.0)
        self._base = peer.params
        self.shifts: list[bool] = []
        self.handed: list[FloatVector] = []
        self.gone_on_from: list[FloatVector] = []

    async def begin(self, round: int, *, adopt: bool, shift: bool = False) -> None:
        await super().begin(round, adopt=adopt, shift=shift)
        self.shifts.append(shift)
        self.gone_on_from.append(self._parameters.copy())

    async def become_ready(self) -> None:
        await self.freeze()
        self.handed.append(self._parameters.copy())


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair_mixing, "LOOK_S", 0.01)


@asynccontextmanager
async def open_mixing(
    folder: Path, targets: dict[int, float], swarm: Swarm | None = None
) -> AsyncIterator[tuple[list[Peer], list[Trainer]]]:
    """Connected founders by their numbers, each of which trains towards its own target."""
    swarm = make_samples(founders=FOUNDERS, training=ALONE, codec="fp32", grace_s=0.3) if swarm is None else swarm
    async with AsyncExitStack() as stack:
        peers, trainers = list[Peer](), list[Trainer]()
        for number, target in targets.items():
            peer = await stack.enter_async_context(open_peer(swarm, number, folder, trains=True))
            for other in peers:
                await peer.connect(other)
            peer.compute.trainer = trainer = Trainer(peer, target)
            peers.append(peer)
            trainers.append(trainer)
            peer.spawn(peer.membership.beat())
            await peer.compute.start()
        await wait_until(lambda: all(len(one.membership.table.live()) == len(peers) - 1 for one in peers))
        for peer in peers:
            peer.spawn(peer.mixing.run())
        yield peers, trainers


async def test_two_without_a_quorum_go_on_from_their_mean(tmp_path: Path) -> None:
    async with open_mixing(tmp_path, {0: 0.1, 1: 0.3}) as (peers, trainers):
        for trainer in trainers:
            await trainer.become_ready()
        await wait_until(lambda: all(peer.turns for peer in peers))
        assert [peer.turns for peer in peers] == [[(peers[1].me, None)], [(peers[0].me, None)]]
        mean = (trainers[0].handed[0] + trainers[1].handed[0]) / 2  # of as many tokens
        for peer, trainer in zip(peers, trainers, strict=True):
            assert trainer.shifts == [False, True]
            np.testing.assert_allclose(trainer.gone_on_from[-1], mean, atol=1e-6)
            assert peer.presence.ready is None and not peer.core.may_withdraw, "what was offered is taken back"
            assert peer.reporter.build_status().training.pairs_mixed == 1
            assert read(peer, "pairs_mixed_total") == 1
        assert not np.allclose(trainers[0].handed[0], trainers[1].handed[0], atol=1e-2), "they stood apart before"


async def test_a_pair_is_weighed_by_its_work(tmp_path: Path) -> None:
    async with open_mixing(tmp_path, {0: 0.1, 1: 0.3}) as (peers, trainers):
        trainers[1]._steps = 1  # of two steps that it hands over it has the tokens of two
        for trainer in trainers:
            await trainer.become_ready()
        await wait_until(lambda: all(peer.turns for peer in peers))
        mean = (trainers[0].handed[0] + 2 * trainers[1].handed[0]) / 3
        for trainer in trainers:
            np.testing.assert_allclose(trainer.gone_on_from[-1], mean, atol=1e-6)


async def test_rounds_go_on_with_all_of_the_work_when_a_quorum_is_back(tmp_path: Path) -> None:
    async with open_mixing(tmp_path, {0: 0.1, 1: 0.3}) as (peers, trainers):
        for turn in (1, 2, 3):
            for trainer in trainers:
                await trainer.become_ready()
            await wait_until(lambda turn=turn: all(len(peer.turns) == turn for peer in peers))
        assert all(peer.core.head.round == 0 for peer in peers)
        async with open_peer(peers[0].swarm, 2, tmp_path, trains=True) as third:
            for peer in peers:
                await third.connect(peer)
            third.compute.trainer = late = Trainer(third, 0.2)
            third.spawn(third.membership.beat())
            await third.compute.start()
            await wait_until(lambda: all(peer.core.sees_quorum for peer in (*peers, third)))
            for trainer in (*trainers, late):
                await trainer.become_ready()
            await wait_until(lambda: all(peer.commits for peer in (*peers, third)))
            assert len({peer.commits[0].state_root for peer in (*peers, third)}) == 1
            assert [len(peer.turns) for peer in peers] == [3, 3]
            # When it is lost again nobody waits for as long as rounds were made meanwhile.
            await wait_until(lambda: all(peer.mixing._began_s is None for peer in peers))
            # The pseudo-gradient is of everything since the base: of four stretches, not of the last one.
            (certificate,) = third.state.load_certificates(1, 1)
            tokens = {one.peer: one.tokens for one in certificate.result.members}
            assert tokens[peers[0].me] == 4 * tokens[third.me]


async def test_who_finds_nobody_trains_on_and_offers_more_each_time(tmp_path: Path) -> None:
    async with open_mixing(tmp_path, {0: 0.1}) as (peers, trainers):
        (peer,), (trainer,) = peers, trainers
        for turn in range(1, 8):
            await trainer.become_ready()
            await wait_until(lambda turn=turn: len(peer.turns) == turn)
        assert peer.turns == [(None, Failure.NO_PARTNER)] * 7
        assert trainer.shifts == [False] * 8
        assert len({frozen.root for frozen in peer.offers}) == 7
        assert len(peer.state._pending) == 0, "nothing is kept of what nobody can have planned with"
        assert peer.reporter.build_status().training.pair_failure == "no_partner"
        assert read(peer, "pair_failures_total", reason="no_partner") == 7


async def test_a_peer_that_waits_for_a_partner_is_still_there_for_a_round(tmp_path: Path) -> None:
    swarm = make_samples(founders=FOUNDERS, training=ALONE, codec="fp32", grace_s=3600.0)
    async with open_mixing(tmp_path, {0: 0.1}, swarm) as (peers, trainers):
        (peer,), (trainer,) = peers, trainers
        await trainer.become_ready()
        await wait_until(lambda: peer.mixing._pairing._offer is not None)
        async with AsyncExitStack() as stack:
            for number in (1, 2):
                other = await stack.enter_async_context(open_peer(swarm, number, tmp_path, trains=True))
                await other.connect(peer)
                other.compute.trainer = late = Trainer(other, 0.2)
                other.spawn(other.membership.beat())
                await other.compute.start()
                trainers.append(late)
                peers.append(other)
            await peers[2].connect(peers[1])
            for trainer in trainers[1:]:
                await trainer.become_ready()
            await wait_until(lambda: all(one.commits for one in peers))
            assert peer.turns == [] and trainers[0].shifts == [False], "it did not move"


async def test_whose_partner_is_gone_trains_on_alone(tmp_path: Path) -> None:
    async with open_mixing(tmp_path, {0: 0.1, 1: 0.3}) as (peers, trainers):
        await peers[1].links.stop()
        for trainer in trainers:
            await trainer.become_ready()
        await wait_until(lambda: peers[0].turns)
        assert peers[0].turns == [(peers[1].me, Failure.PARTNER_LOST)]
        np.testing.assert_array_equal(trainers[0].gone_on_from[-1], trainers[0].handed[0])


async def test_a_partner_that_sends_what_does_not_decode_pays_for_it_and_moves_nobody(tmp_path: Path) -> None:
    async with open_mixing(tmp_path, {0: 0.1, 1: 0.3}) as (peers, trainers):
        honest, liar = peers
        parts = honest.swarm.manifest.list_parts(1)
        poison = [
            memoryview(np.full(honest.swarm.manifest.contribution_bytes(part) // 4, np.nan, np.float32)).cast("B")
            for part in parts
        ]
        digests = tuple(blake3(one).digest() for one in poison)
        liar.exchange._lent = dict(zip(digests, poison, strict=True))

        async def answer(peer: PeerId, raw: bytes) -> bytes:
            ask = decode_message_untrusted(honest.swarm.id, raw)
            assert isinstance(ask, AskPair)
            return encode_message(honest.swarm.id, PairAnswer(offer=replace(ask.offer, digests=digests)))

        liar.answer = answer
        liar.mixing._is_alone = lambda: False  # type: ignore[method-assign]
        for trainer in trainers:
            await trainer.become_ready()
        await wait_until(lambda: honest.turns)
        assert honest.turns == [(liar.me, Failure.PARTNER_LOST)]
        assert (liar.me, Refusal.NOT_FINITE) in honest.misbehaviours
        np.testing.assert_array_equal(trainers[0].gone_on_from[-1], trainers[0].handed[0])


async def test_a_swarm_that_does_not_ask_for_it_waits(tmp_path: Path) -> None:
    swarm = make_samples(founders=FOUNDERS, training=replace(ALONE, gossip_after_s=0.0))
    async with open_mixing(tmp_path, {0: 0.1, 1: 0.3}, swarm) as (peers, trainers):
        for trainer in trainers:
            await trainer.become_ready()
        await wait_until(lambda: all(peer.compute.waits for peer in peers))
        offer = PairOffer(round=1, base_root=bytes(32), tokens=1, steps=1, digests=(bytes(32),))
        answer = peers[1].mixing.answer(peers[0].me, AskPair(offer=offer))
        assert answer == PairAnswer(offer=None)
        await asyncio.wait_for(peers[0].mixing.run(), 1)
        assert all(peer.compute.waits and peer.turns == [] for peer in peers)


async def test_what_was_planned_before_the_quorum_was_lost_may_be_counted_and_the_parameters_stay(
    tmp_path: Path,
) -> None:
    async with open_mixing(tmp_path, {0: 0.1}) as (peers, trainers):
        (peer,), (trainer,) = peers, trainers
        await trainer.become_ready()
        await wait_until(lambda: peer.turns)
        merges = list[object]()
        trainer.merge = merges.append  # type: ignore[method-assign,assignment]
        await peer.compute.committed(make_chain(peer.swarm, 1).certificates[0].result, (0, 1, 2))
        assert merges == [], "no part of the new base takes the place of what was trained since"
        await trainer.become_ready()
        await wait_until(lambda: len(peer.offers) == 2)


async def test_a_base_that_comes_while_the_move_is_found_is_not_mixed_up_with_it(tmp_path: Path) -> None:
    async with open_mixing(tmp_path, {0: 0.1}) as (peers, trainers):
        (peer,), (trainer,) = peers, trainers
        peer.mixing._is_alone = lambda: False  # type: ignore[method-assign]
        await trainer.become_ready()
        await wait_until(lambda: peer.compute.waits and peer.offers)
        loop, begun, may_end = asyncio.get_running_loop(), asyncio.Event(), threading.Event()

        def find_move(move: FloatVector) -> None:
            loop.call_soon_threadsafe(begun.set)
            assert may_end.wait(60)
            move[:] = 0.5

        shifting = loop.create_task(peer.compute.train_alone(find_move))
        await begun.wait()
        adopting = loop.create_task(peer.compute.adopt_base())
        await asyncio.sleep(0)
        assert trainer.shifts == [False], "the base waits"
        may_end.set()
        assert await shifting
        await adopting
        assert trainer.shifts == [False, True, False]
        np.testing.assert_array_equal(trainer._parameters, peer.params)
        assert not await peer.compute.train_alone(find_move), "who trains does not wait to be moved"
