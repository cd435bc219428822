"""The daemon's side of a trainer that comes back: what its checkpoint is good for, what is said to be lost."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from shoal.node import compute
from shoal.node.feedback import FeedbackFull, FeedbackStore, Settled
from shoal.node.status import TrainerState
from shoal.node.training.messages import EVERYTHING, NOTHING, OPTIMIZER, Progress, Ready, Resumed, Started, Work
from shoal.protocol.attendance import FRESHNESS, Attendance
from shoal.protocol.quorum import make_bitmap
from tests.unit.node.node_samples import Peer, make_chain, make_samples, open_peer, wait_until
from tests.unit.node.test_compute import Trainer

BATCHES = 40


class ReturningTrainer(Trainer):
    """Says at its start what a checkpoint gave it."""

    def __init__(self, peer: Peer) -> None:
        super().__init__(peer, round_s=3600.0)
        self.resumed = Resumed()
        self.works: list[Work] = []

    async def start(self, work: Work) -> Started:
        self.works.append(work)
        return replace(await super().start(work), resumed=self.resumed)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute, "RESTART_DELAY_S", 0.0)


@asynccontextmanager
async def returning(
    folder: Path, resumed: Resumed, **rules: object
) -> AsyncIterator[tuple[Peer, ReturningTrainer, list[str]]]:
    """A peer with error feedback on its disk, at the start of a trainer that has taken this from its checkpoint."""
    async with open_peer(make_samples(**rules), 0, folder, trains=True) as peer:
        state = peer.state
        state.stores = replace(state.stores, feedback=FeedbackStore(folder / "feedback", state.stores.ledger))
        state._restore_feedback()
        said: list[str] = []
        peer.compute._ports = replace(peer.compute._ports, resumed=said.append)
        peer.compute.trainer = trainer = ReturningTrainer(peer)
        trainer.resumed = resumed
        yield peer, trainer, said


def settle(peer: Peer, settled: Settled) -> None:
    store = peer.state.stores.feedback
    assert store is not None
    store.record = replace(store.record, settled=settled)


def settled_in(parts: tuple[int, ...], peer: Peer, batches_done: int = BATCHES) -> Settled:
    bitmap = make_bitmap(frozenset(parts), peer.swarm.manifest.parts)
    return Settled(round=0, batches_done=batches_done, parts=bitmap)


WAITING = Resumed(extent=EVERYTHING, round=1, batches_done=BATCHES, steps=8, tokens=800, waits=True, since_round=1)


async def test_without_a_checkpoint_it_begins_with_the_base(tmp_path: Path) -> None:
    async with returning(tmp_path, Resumed(extent=NOTHING)) as (peer, trainer, said):
        await peer.compute.start()
        assert (trainer.begun, trainer.merges, said) == ([(1, True)], [], [])
        assert trainer.works[0].batches_done == 0
        assert trainer.works[0].generation == peer.state.generation != bytes(32)


async def test_what_was_not_counted_stays_and_is_handed_over_again(tmp_path: Path) -> None:
    async with returning(tmp_path, WAITING) as (peer, trainer, said):
        await peer.compute.start()
        assert (trainer.begun, trainer.merges, said) == ([(1, False)], [], [])
        assert peer.compute.phase is TrainerState.RUNNING
        assert peer.compute.steps == 0, "steps of an earlier life are not counted again"
        peer.compute.take(Ready(round=1, steps=8, tokens=800, loss_mean=1.0, batches_done=BATCHES))
        await wait_until(lambda: peer.offers)
        assert peer.compute.steps == 0
        assert peer.state.batches_done == BATCHES, "durable before it is offered"


async def test_what_was_counted_while_it_was_away_is_merged(tmp_path: Path) -> None:
    async with returning(tmp_path, WAITING) as (peer, trainer, said):
        settle(peer, settled_in((0, 2), peer))
        await peer.compute.start()
        (merge,) = trainer.merges
        assert (merge.round, merge.included, merge.adopt_all, merge.begin) == (1, b"\x05", False, True)
        assert trainer.begun == [] and said == []


async def test_a_base_that_came_before_the_trainer_was_there_is_adopted_once(tmp_path: Path) -> None:
    async with returning(tmp_path, WAITING) as (peer, trainer, _):
        settle(peer, settled_in((0, 2), peer))
        await peer.compute.adopt_base()
        await peer.compute.start()
        assert (trainer.begun, trainer.merges) == ([(1, True)], [])
        assert (peer.compute.steps, peer.compute._counted_steps) == (0, 0)
        await peer.compute._begin_anew()
        assert len(trainer.merges) == 1


async def test_what_was_counted_of_a_fragment_is_merged_where_it_stands(tmp_path: Path) -> None:
    async with returning(tmp_path, WAITING, fragments=2) as (peer, trainer, _):
        settle(peer, replace(settled_in((0,), peer), round=2))  # the one part of round 2 is the second of three
        await peer.compute.start()
        (merge,) = trainer.merges
        assert merge.included == bytes([0b010])


async def test_what_was_counted_before_its_last_steps_changes_nothing(tmp_path: Path) -> None:
    async with returning(tmp_path, replace(WAITING, waits=False)) as (peer, trainer, _):
        settle(peer, settled_in((0,), peer, BATCHES - 8))
        await peer.compute.start()
        assert (trainer.begun, trainer.merges) == ([(1, False)], [])
        assert trainer.works[0].batches_done == BATCHES - 8


async def test_lost_steps_are_told_in_plain_words(tmp_path: Path) -> None:
    async with returning(tmp_path, replace(WAITING, steps_lost=12)) as (peer, _, said):
        await peer.compute.start()
    text = "12 steps since the last checkpoint were lost; their batches are trained on again, from batch 40"
    assert said == [text]


async def test_an_old_checkpoint_is_told_and_training_begins_with_the_base(tmp_path: Path) -> None:
    old = Resumed(extent=OPTIMIZER, batches_done=BATCHES)
    async with returning(tmp_path, old) as (peer, trainer, said):
        settle(peer, settled_in((0,), peer))
        await peer.compute.start()
        assert trainer.begun == [(1, True)]
        assert said == [
            "the checkpoint is older than the last contribution: training goes on from the certified base, at batch 40"
        ]


async def test_a_lost_memory_of_contributions_is_told(tmp_path: Path) -> None:
    async with returning(tmp_path, Resumed(extent=NOTHING, batches_done=BATCHES)) as (peer, trainer, said):
        await peer.compute.start()
        assert trainer.begun == [(1, True)]
        assert said == [
            "what was contributed is not known any more: training goes on from the certified base, at batch 40"
        ]


async def test_away_for_too_many_rounds_it_begins_with_the_base(tmp_path: Path) -> None:
    async with returning(tmp_path, WAITING) as (peer, trainer, _):
        missed_max = peer.swarm.manifest.training.missed_rounds_max
        peer.state.head = replace(peer.state.head, round=missed_max + 1)
        peer.state.contributor.residual[:] = 0.5
        await peer.compute.start()
        assert trainer.begun == [(missed_max + 2, True)]
        assert not peer.state.contributor.residual.any(), "it belonged to parameters that are gone"


async def test_rounds_that_were_missed_before_the_restart_count(tmp_path: Path) -> None:
    async with returning(tmp_path, WAITING) as (peer, trainer, _):
        missed_max = peer.swarm.manifest.training.missed_rounds_max
        peer.state.head = replace(peer.state.head, round=missed_max)
        await peer.compute.start()
        assert trainer.begun == [(missed_max + 1, False)]
        await peer.compute.committed(make_chain(peer.swarm, 1).certificates[0].result, ())
        assert [one.adopt_all for one in trainer.merges] == [True]


@pytest.mark.parametrize(("since_round", "base_age"), [(4, 0), (2, 2), (1, 3)])
async def test_the_base_is_as_old_after_a_restart_as_before(tmp_path: Path, since_round: int, base_age: int) -> None:
    """The checkpoint is of the training for round 4: what was missed before it counts as well."""
    resumed = replace(WAITING, round=4, since_round=since_round)
    async with returning(tmp_path, resumed, weights=FRESHNESS) as (peer, trainer, _):
        peer.state.head = replace(peer.state.head, round=3)
        await peer.compute.start()
        assert trainer.begun == [(4, False)]
        assert await peer.compute._find_attendance() == Attendance(base_age=base_age)


async def test_what_is_handed_over_again_and_was_counted_meanwhile_is_not_offered(tmp_path: Path) -> None:
    async with returning(tmp_path, WAITING) as (peer, trainer, said):
        await peer.compute.start()
        settle(peer, settled_in((0,), peer))
        await peer.compute.committed(make_chain(peer.swarm, 1).certificates[0].result, (0,))
        assert len(trainer.merges) == 1 and said == []
        peer.compute.take(Ready(round=1, steps=8, tokens=800, loss_mean=1.0, batches_done=BATCHES))
        assert peer.compute.phase is TrainerState.RUNNING, "the Merge comes to it after that"
        assert peer.compute._ready is None


async def test_steps_beside_a_counted_contribution_are_told(tmp_path: Path) -> None:
    async with returning(tmp_path, Resumed(extent=NOTHING, batches_done=0)) as (peer, _, said):
        await peer.compute.start()
        peer.compute.take(Progress(round=1, steps=3, tokens=300, loss=1.0, tokens_per_s=1.0))
        await peer.compute.committed(make_chain(peer.swarm, 1).certificates[0].result, (0,))
        assert said == ["3 steps since a restart were lost: an older contribution was counted"]


async def test_a_contribution_that_cannot_be_kept_is_not_offered_until_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with returning(tmp_path, Resumed()) as (peer, _, _):
        await peer.compute.start()

        async def refuse(error: Exception) -> None:
            def fail(*_: object) -> None:
                raise error

            with monkeypatch.context() as context:
                context.setattr(FeedbackStore, "hold", fail)
                peer.compute.take(Ready(round=1, steps=8, tokens=800, loss_mean=1.0, batches_done=BATCHES))
                await wait_until(lambda: str(error) in caplog.text)

        for error in (OSError("No space left on device"), FeedbackFull("4 contributions are pending")):
            await refuse(error)
            assert peer.offers == []
        peer.compute.round_begun()
        await wait_until(lambda: peer.offers)


async def test_when_an_older_life_s_work_was_counted_it_begins_anew_with_the_base(tmp_path: Path) -> None:
    async with returning(tmp_path, WAITING) as (peer, trainer, said):
        await peer.compute.start()
        store = peer.state.stores.feedback
        assert store is not None
        store.renew()
        trainer.resumed = Resumed(batches_done=BATCHES)
        (certificate,) = make_chain(peer.swarm, 1).certificates
        await peer.compute.committed(certificate.result, ())
        await wait_until(lambda: len(trainer.begun) == 2)
        assert trainer.begun == [(1, False), (1, True)]
        assert [work.generation for work in trainer.works][1] == peer.state.generation
        assert any("of an older life was counted" in text for text in said)


async def test_rounds_that_come_faster_than_a_trainer_starts_begin_anew_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with returning(tmp_path, WAITING) as (peer, trainer, _):
        await peer.compute.start()
        gone = asyncio.Event()
        stop = trainer.stop

        async def stop_slowly() -> None:
            if len(trainer.works) == 1 and not gone.is_set():
                await gone.wait()
            await stop()

        monkeypatch.setattr(trainer, "stop", stop_slowly)
        store = peer.state.stores.feedback
        assert store is not None
        store.renew()
        trainer.resumed = Resumed(batches_done=BATCHES)
        (certificate,) = make_chain(peer.swarm, 1).certificates
        await peer.compute.committed(certificate.result, ())
        await peer.compute.committed(certificate.result, ())
        await wait_until(lambda: peer.compute.phase is TrainerState.STARTING)
        await peer.compute.committed(certificate.result, ())
        gone.set()
        await wait_until(lambda: len(trainer.begun) == 2)
        await peer.compute.committed(certificate.result, ())
        assert [work.generation for work in trainer.works[1:]] == [peer.state.generation]


async def test_a_start_that_was_under_way_meanwhile_begins_anew(tmp_path: Path) -> None:
    async with returning(tmp_path, WAITING) as (peer, trainer, _):
        store = peer.state.stores.feedback
        assert store is not None
        begin = trainer.start

        async def start(work: Work) -> Started:
            started = await begin(work)
            if len(trainer.works) == 1:
                store.renew()
                (certificate,) = make_chain(peer.swarm, 1).certificates
                await peer.compute.committed(certificate.result, ())
                trainer.resumed = Resumed()
            return started

        trainer.start = start  # type: ignore[method-assign]
        await peer.compute.start()
        assert (len(trainer.works), trainer.begun) == (2, [(1, True)])
