"""The trainer at the daemon's side: its work is frozen, merged and anchored anew, and it is restarted when it dies."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from shoal.node import compute
from shoal.node.compute import RESTARTS_MAX
from shoal.node.status import TrainerState, judge_health
from shoal.node.terminal import describe_status
from shoal.node.trainer import TrainerError
from shoal.node.training.messages import (
    BASE_TORN,
    NOT_FINITE,
    OUT_OF_MEMORY,
    Evaluated,
    Failed,
    Merge,
    Ready,
    Started,
    Work,
)
from shoal.protocol import quorum
from shoal.protocol.attendance import FRESHNESS, NO_ATTENDANCE, PARTICIPATION, WORK, Attendance
from shoal.protocol.errors import Failure
from shoal.protocol.identity import PeerId
from shoal.protocol.messages import Result, digest_record
from shoal.protocol.quorum import list_contributors
from shoal.protocol.replica import find_gain
from tests.unit.node.exposition import read
from tests.unit.node.fake_trainer import TOKENS_PER_STEP, FakeTrainer
from tests.unit.node.node_samples import Peer, fill_folder, make_chain, make_samples, open_peer, wait_until


class Trainer(FakeTrainer):
    """Shares the base and its own parameters with the daemon, and remembers what it was told."""

    def __init__(self, peer: Peer, *, round_s: float = 0.0) -> None:
        super().__init__(np.full(peer.params.size, 0.1, np.float32), peer.compute.take, round_s=round_s)
        self._base = peer.params
        self.begun: list[tuple[int, bool]] = []
        self.merges: list[Merge] = []
        self.stops = 0
        self.refusals: list[TrainerError] = []
        self.told = Started(device="", elements=1, train_bytes=1, held_out_bytes=1, loss_unit="nats a token")

    async def start(self, work: Work) -> Started:
        if self.refusals:
            raise self.refusals.pop(0)
        told = self.told
        started = await super().start(work)
        return replace(started, notice=told.notice, unused=told.unused, loss_unit=told.loss_unit)

    async def begin(self, round: int, *, adopt: bool, shift: bool = False) -> None:
        self.begun.append((round, adopt))
        await super().begin(round, adopt=adopt, shift=shift)

    async def merge(self, merge: Merge) -> None:
        self.merges.append(merge)
        await super().merge(merge)

    async def stop(self) -> None:
        self.stops += 1
        await super().stop()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute, "RESTART_DELAY_S", 0.0)


@asynccontextmanager
async def open_trainer(folder: Path, *, round_s: float = 0.0, **rules: object) -> AsyncIterator[tuple[Peer, Trainer]]:
    """A peer whose trainer is not started yet. Nobody else is there, so its rounds stay open."""
    async with open_peer(make_samples(**rules), 0, folder, trains=True) as peer:
        peer.compute.trainer = trainer = Trainer(peer, round_s=round_s)
        yield peer, trainer


def make_result(peer: Peer, number: int) -> Result:
    """The result of a round in which this peer took part or not: that is told apart from it."""
    return make_chain(peer.swarm, number).certificates[-1].result


# -- the held-out loss -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [3, 4, 5, 8])
@pytest.mark.parametrize("is_chosen", [True, False])
@pytest.mark.parametrize("included", [(0, 1, 2), ()])
async def test_one_contributor_measures_the_base_every_few_rounds(
    tmp_path: Path,
    number: int,
    is_chosen: bool,
    included: tuple[int, ...],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level("INFO")
    async with open_trainer(tmp_path, round_s=3600.0) as (peer, _):
        assert peer.swarm.manifest.training.evaluate_every == 4
        asked: list[bytes] = []

        def choose(head_digest: bytes, contributors: tuple[PeerId, ...]) -> PeerId:
            asked.append(head_digest)
            return peer.me if is_chosen else next(one for one in contributors if one != peer.me)

        monkeypatch.setattr(quorum, "choose_evaluator", choose)
        told: list[Evaluated] = []
        peer.compute._ports = replace(peer.compute._ports, measured=told.append)
        await peer.compute.start()
        result = make_result(peer, number)
        await peer.compute.committed(result, included)
        is_due = number % 4 == 0 and bool(included)
        assert asked == [digest_record(result)] * is_due, "by the round itself, wherever the head is meanwhile"
        if is_due and is_chosen:
            await wait_until(lambda: peer.compute.held_out is not None)
            assert f"held-out loss of round {number}: " in caplog.text and "perplexity" in caplog.text
            assert told == [peer.compute.held_out]
        else:
            for _ in range(3):
                await asyncio.sleep(0)
            assert peer.compute.held_out is None


# -- a round ---------------------------------------------------------------------------------------------------------


async def test_what_the_trainer_hands_over_is_offered_once(tmp_path: Path) -> None:
    async with open_trainer(tmp_path) as (peer, trainer):
        await peer.compute.start()
        await wait_until(lambda: peer.offers)
        assert trainer.begun == [(1, True)]
        assert peer.compute.phase is TrainerState.PAUSED
        peer.compute.round_begun()
        peer.compute.round_begun()
        for _ in range(20):
            await asyncio.sleep(0)
        roots = {one.root for one in peer.offers}
        assert len(roots) == 1 and peer.offers[0].round == 1
        assert peer.compute.tokens == peer.swarm.manifest.training.inner_steps * TOKENS_PER_STEP


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        (WORK, NO_ATTENDANCE),
        (PARTICIPATION, Attendance(intervals=1, interval_rounds=1)),  # it was in round 3
        (FRESHNESS, NO_ATTENDANCE),
    ],
)
async def test_what_is_declared_besides_the_work_is_what_the_manifest_weighs_by(
    tmp_path: Path, weights: str, expected: Attendance
) -> None:
    fill_folder(make_samples(weights=weights), tmp_path / "0", make_chain(make_samples(weights=weights), 3))
    async with open_trainer(tmp_path, weights=weights) as (peer, _):
        assert peer.state.head.round == 3
        await peer.compute.start()
        await wait_until(lambda: peer.offers)
        assert peer.presence.ready is not None and peer.presence.ready.ready.attendance == expected


async def test_rounds_without_its_work_make_its_base_older_and_one_with_it_makes_it_new(tmp_path: Path) -> None:
    fill_folder(make_samples(weights=FRESHNESS), tmp_path / "0", make_chain(make_samples(weights=FRESHNESS), 3))
    async with open_trainer(tmp_path, weights=FRESHNESS) as (peer, _):
        told: list[int] = []
        ports = replace(peer.compute._ports, frozen=lambda frozen, ready, attendance: told.append(attendance.base_age))
        peer.compute._ports = ports
        await peer.compute.start()
        for number, included in enumerate([(), (), (0,), (0, 1, 2), ()], start=4):
            await wait_until(lambda seen=number - 3: len(told) == seen)
            await peer.compute.committed(make_result(peer, number), included)
        await wait_until(lambda: len(told) == 6)
        assert told == [0, 1, 2, 0, 0, 1]


async def test_a_round_with_its_work_is_merged_and_the_next_one_begins(tmp_path: Path) -> None:
    async with open_trainer(tmp_path) as (peer, trainer):
        await peer.compute.start()
        await wait_until(lambda: peer.offers)
        result = make_result(peer, 1)
        await peer.compute.committed(result, (0, 2))
        (merge,) = trainer.merges
        assert 0 < merge.gain == find_gain(peer.swarm.manifest, result, peer.me)
        assert (merge.round, merge.adopt_all, merge.begin) == (2, False, True)
        assert merge.included == bytes([0b101])
        assert peer.compute.phase in (TrainerState.RUNNING, TrainerState.PAUSED)


@pytest.mark.parametrize("divided", [True, False])
async def test_where_data_are_divided_its_place_among_the_contributors_is_its_share(
    tmp_path: Path, divided: bool
) -> None:
    async with open_trainer(tmp_path) as (peer, trainer):
        manifest = peer.swarm.manifest
        peer.compute._manifest = replace(manifest, training=replace(manifest.training, divide_data=divided))
        await peer.compute.start()
        await wait_until(lambda: peer.offers)
        result = make_result(peer, 1)
        contributors = list_contributors(result)
        await peer.compute.committed(result, (0, 2))
        (merge,) = trainer.merges
        wanted = contributors.index(peer.me), len(contributors)
        assert (merge.place, merge.places) == (wanted if divided else (0, 1)) and wanted[1] > 1
        others = replace(result, members=tuple(one for one in result.members if one.peer != peer.me))
        assert peer.compute._find_place(others) == (0, 1)


async def test_of_a_fragment_those_parts_are_merged_that_its_round_exchanged(tmp_path: Path) -> None:
    async with open_trainer(tmp_path, fragments=2) as (peer, trainer):
        await peer.compute.start()
        await wait_until(lambda: peer.offers)
        await peer.compute.committed(make_result(peer, 1), (0, 1))
        await peer.compute.committed(make_result(peer, 2), (0,))
        assert [merge.included for merge in trainer.merges] == [bytes([0b101]), bytes([0b010])]


async def test_a_round_without_it_changes_nothing_while_it_trains_on(tmp_path: Path) -> None:
    async with open_trainer(tmp_path, round_s=3600.0) as (peer, trainer):
        await peer.compute.start()
        await peer.compute.committed(make_result(peer, 1), ())
        assert trainer.merges == [] and trainer.begun == [(1, True)]
        await trainer.freeze()
        await wait_until(lambda: peer.offers)
        assert peer.offers[0].round == 1, "anchored at the base that is there"


async def test_what_missed_a_round_is_trained_on_and_offered_with_more_in_the_next_one(tmp_path: Path) -> None:
    async with open_trainer(tmp_path) as (peer, trainer):
        await peer.compute.start()
        await wait_until(lambda: peer.offers)
        local = trainer.local.copy()
        trainer._round_s = 3600.0
        await peer.compute.committed(make_result(peer, 1), ())
        assert trainer.merges == [] and np.array_equal(trainer._parameters, local), "no work is lost"
        assert trainer.begun == [(1, True), (1, False)]
        peer.compute.round_begun()
        await wait_until(lambda: peer.compute.phase is TrainerState.RUNNING)
        assert len(peer.offers) == 1


async def test_what_is_ready_is_offered_again_after_a_round_without_parts(tmp_path: Path) -> None:
    async with open_trainer(tmp_path) as (peer, _):
        await peer.compute.start()
        await wait_until(lambda: peer.offers)
        await peer.compute.committed(replace(make_result(peer, 1), parts=(), members=()), ())
        peer.compute.round_begun()
        await wait_until(lambda: len(peer.offers) == 2)


# -- in step with the others -------------------------------------------------------------------------------------------


async def test_who_began_to_train_in_mid_round_ends_with_the_others(tmp_path: Path) -> None:
    async with open_trainer(tmp_path, round_s=3600.0) as (peer, _):
        await peer.compute.start()
        peer.compute.end_training(1)
        await wait_until(lambda: peer.offers)


async def test_who_is_still_starting_when_the_others_end_is_ready_after_its_first_step(tmp_path: Path) -> None:
    async with open_trainer(tmp_path, round_s=3600.0) as (peer, _):
        peer.compute.end_training(1)
        await peer.compute.start()
        await wait_until(lambda: peer.offers)


async def test_who_began_with_the_round_trains_to_its_end(tmp_path: Path) -> None:
    async with open_trainer(tmp_path) as (peer, trainer):
        await peer.compute.start()
        await wait_until(lambda: peer.offers)
        trainer._round_s = 3600.0
        await peer.compute.committed(make_result(peer, 1), (0,))
        peer.compute.end_training(peer.state.head.round + 1)
        for _ in range(20):
            await asyncio.sleep(0)
        assert peer.compute.phase is TrainerState.RUNNING
        await peer.compute.committed(make_result(peer, 1), ())
        peer.compute.end_training(peer.state.head.round + 1)
        await wait_until(lambda: peer.compute.phase is TrainerState.PAUSED)


async def test_an_end_of_training_that_comes_too_late_ends_no_later_one(tmp_path: Path) -> None:
    async with open_trainer(tmp_path, round_s=3600.0) as (peer, _):
        await peer.compute.start()
        peer.compute.end_training(0)
        for _ in range(20):
            await asyncio.sleep(0)
        assert peer.compute.phase is TrainerState.RUNNING and peer.offers == []


async def test_on_another_log_the_work_stays_and_is_anchored_there(tmp_path: Path) -> None:
    async with open_trainer(tmp_path) as (peer, trainer):
        await peer.compute.start()
        await wait_until(lambda: peer.offers)
        local = trainer.local.copy()
        trainer._round_s = 3600.0
        await peer.compute.rebase()
        assert trainer.begun[-1] == (1, False)
        assert np.array_equal(trainer._parameters, local)
        peer.compute.round_begun()
        assert len(peer.offers) == 1, "what was ready was for the other log"


async def test_a_round_without_parts_moves_nothing(tmp_path: Path) -> None:
    async with open_trainer(tmp_path) as (peer, trainer):
        await peer.compute.start()
        await wait_until(lambda: peer.offers)
        await peer.compute.committed(replace(make_result(peer, 1), parts=(), members=()), ())
        assert trainer.merges == []
        assert peer.compute._missed == 0


async def test_past_the_declared_number_of_missed_rounds_it_starts_again_from_the_base(tmp_path: Path) -> None:
    async with open_trainer(tmp_path) as (peer, trainer):
        await peer.compute.start()
        await wait_until(lambda: peer.offers)
        missed_max = peer.swarm.manifest.training.missed_rounds_max
        for _ in range(missed_max + 1):
            await peer.compute.committed(make_result(peer, 1), ())
        assert [one.adopt_all for one in trainer.merges if one.adopt_all] == [True]
        assert trainer.merges[-1].adopt_all
        assert peer.compute._missed == 0


async def test_a_snapshot_that_was_taken_over_drops_the_local_work(tmp_path: Path) -> None:
    async with open_trainer(tmp_path, round_s=3600.0) as (peer, trainer):
        await peer.compute.start()
        await trainer.freeze()
        await wait_until(lambda: peer.offers)
        await peer.compute.adopt_base()
        assert trainer.begun[-1] == (1, True)
        assert np.array_equal(trainer._parameters, peer.params)
        peer.compute.round_begun()
        assert len(peer.offers) == 1


async def test_work_that_is_not_finite_is_thrown_away_and_the_trainer_goes_back_to_the_base(tmp_path: Path) -> None:
    async with open_trainer(tmp_path, round_s=3600.0) as (peer, trainer):
        await peer.compute.start()
        trainer._parameters[0] = np.nan
        trainer._target = trainer._target.copy()
        trainer._target[0] = np.nan
        await trainer.freeze()
        await wait_until(lambda: len(trainer.begun) == 2)
        assert trainer.begun[-1] == (1, True)
        assert peer.offers == [] and np.isfinite(peer.params).all()


# -- a trainer that dies ---------------------------------------------------------------------------------------------


async def die_and_come_back(trainer: Trainer) -> None:
    starts = trainer.starts
    trainer.crash()
    await wait_until(lambda: trainer.starts == starts + 1 and trainer.running)


async def test_a_trainer_that_dies_is_started_again_from_the_certified_state(tmp_path: Path) -> None:
    async with open_trainer(tmp_path, round_s=3600.0) as (peer, trainer):
        await peer.compute.start()
        trainer.crash()
        await wait_until(lambda: trainer.starts == 2 and trainer.running)
        assert peer.restarts == [Failure.TRAINER_CRASHED]
        assert trainer.begun == [(1, True), (1, True)]
        assert (peer.compute.restarts, peer.compute.error) == (1, "killed by the test")
        assert peer.compute.phase is TrainerState.RUNNING


async def test_a_trainer_that_dies_twice_at_once_is_started_once(tmp_path: Path) -> None:
    async with open_trainer(tmp_path, round_s=3600.0) as (peer, trainer):
        await peer.compute.start()
        trainer.stall()
        trainer.crash()
        await wait_until(lambda: trainer.starts == 2 and trainer.running)
        for _ in range(20):
            await asyncio.sleep(0)
        assert peer.restarts == [Failure.TRAINER_STALLED], "the second death is of one that is given up already"
        assert trainer.starts == 2


async def test_a_trainer_that_dies_and_dies_is_given_up_and_the_daemon_goes_on(tmp_path: Path) -> None:
    async with open_trainer(tmp_path, round_s=3600.0) as (peer, trainer):
        await peer.compute.start()
        for _ in range(RESTARTS_MAX):
            await die_and_come_back(trainer)
        trainer.crash()
        await wait_until(lambda: peer.given_up)
        assert peer.given_up == ["killed by the test"]
        (certificate,) = make_chain(peer.swarm, 1).certificates
        await peer.compute.committed(certificate.result, (0,))
        assert peer.compute.phase is TrainerState.STOPPED, "what it had offered may still be counted"
        assert not peer.presence.describe().trains
        assert not judge_health(peer.reporter.build_status()).ok
        assert (trainer.starts, len(peer.restarts)) == (RESTARTS_MAX + 1, RESTARTS_MAX)


async def test_deaths_that_are_far_apart_do_not_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute, "RESTART_WINDOW_S", 0.0)
    async with open_trainer(tmp_path, round_s=3600.0) as (peer, trainer):
        await peer.compute.start()
        for _ in range(RESTARTS_MAX + 3):
            await die_and_come_back(trainer)
        assert peer.given_up == []


async def test_a_trainer_that_cannot_even_start_is_tried_again_unless_that_is_final(tmp_path: Path) -> None:
    async with open_trainer(tmp_path, round_s=3600.0) as (peer, trainer):
        trainer.refusals = [TrainerError(Failure.TRAINER_CRASHED, "no memory for now")]
        await peer.compute.start()
        await wait_until(lambda: trainer.starts == 1 and trainer.running)
        assert peer.restarts == [Failure.TRAINER_CRASHED]
        trainer.refusals = [TrainerError(Failure.TRAINER_CRASHED, "no torch", is_final=True)]
        trainer.crash()
        await wait_until(lambda: peer.given_up)
        assert peer.given_up == ["no torch"]


async def test_a_trainer_that_says_why_it_ends_is_quoted(tmp_path: Path) -> None:
    async with open_trainer(tmp_path, round_s=3600.0) as (peer, trainer):
        await peer.compute.start()
        detail = "not even one example fits into memory"
        peer.compute.take(Failed(reason=OUT_OF_MEMORY, detail=detail, fatal=True))
        await die_and_come_back(trainer)
        assert (peer.restarts, peer.compute.error) == ([Failure.TRAINER_CRASHED], detail)
        peer.compute.take(Failed(reason=OUT_OF_MEMORY, detail="fewer at a time", fatal=False))
        await die_and_come_back(trainer)
        assert peer.compute.error == "killed by the test", "the next death has a reason of its own"


async def test_what_the_trainer_says_of_its_data_is_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_trainer(tmp_path, round_s=3600.0) as (peer, trainer):
        trainer.told = replace(trainer.told, notice="1 of 2 lines")
        await peer.compute.start()
        assert "trainer: 1 of 2 lines" in caplog.messages


async def test_settings_that_the_task_ignores_are_told_once_and_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = "trainer.tokenizer and trainer.weights are set, and the task of this swarm does not use them"
    async with open_trainer(tmp_path, round_s=3600.0) as (peer, trainer):
        assert text not in peer.reporter.build_status().warnings
        trainer.told = replace(trainer.told, unused=("trainer.tokenizer", "trainer.weights"))
        await peer.compute.start()
        await die_and_come_back(trainer)
        assert caplog.messages.count(text) == 1
        status = peer.reporter.build_status()
        assert text in status.warnings and status.training.unused == ("trainer.tokenizer", "trainer.weights")
        trainer.told = replace(trainer.told, unused=())
        await die_and_come_back(trainer)
        assert text not in peer.reporter.build_status().warnings


@pytest.mark.parametrize(("unit", "told"), [("nats a token", ", perplexity "), ("squares", ""), ("", "")])
async def test_a_loss_is_shown_with_what_it_is_in(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, unit: str, told: str
) -> None:
    async with open_trainer(tmp_path, round_s=3600.0) as (peer, trainer):
        peer.compute.loss_unit = "that of before"
        trainer.told = replace(trainer.told, loss_unit=unit)
        await peer.compute.start()
        with caplog.at_level(logging.INFO):
            peer.compute.take(Evaluated(round=3, loss_nats=1.5, tokens=8))
        words = f"1.5000 {unit}{told}" if unit else "1.5000"
        assert any(line.startswith(f"held-out loss of round 3: {words}") for line in caplog.messages)
        assert ("perplexity" in caplog.text) == bool(told)
        status = peer.reporter.build_status()
        assert status.training.held_out is not None
        assert (status.training.held_out.perplexity is not None) == bool(told)
        shown = [line for line in describe_status(status) if "held-out loss of round 3 1.500" in line]
        assert len(shown) == 1 and f"1.500{' ' if unit else ''}{unit}{told or ','}" in shown[0]


async def test_a_trainer_that_hangs_is_told_by_the_limit_that_it_exceeds(tmp_path: Path) -> None:
    async with open_trainer(tmp_path, round_s=3600.0) as (peer, trainer):
        await peer.compute.start()
        trainer.stall()
        await wait_until(lambda: peer.restarts == [Failure.TRAINER_STALLED])
        assert "no report for 1 s" in peer.compute.error
        assert "trainer.stall_timeout_s" in peer.compute.error


async def test_the_residual_survives_the_process(tmp_path: Path) -> None:
    async with open_trainer(tmp_path, round_s=3600.0) as (peer, trainer):
        await peer.compute.start()
        residual = np.full(peer.params.size, 0.25, np.float32)
        peer.state.contributor.residual[:] = residual
        trainer.crash()
        await wait_until(lambda: trainer.starts == 2 and trainer.running)
        assert np.array_equal(peer.state.contributor.residual, residual)


async def test_a_trainer_that_dies_while_the_peer_stops_stays_dead(tmp_path: Path) -> None:
    async with open_trainer(tmp_path, round_s=3600.0) as (peer, trainer):
        await peer.compute.start()
        await peer.compute.stop()
        trainer.crash()
        for _ in range(20):
            await asyncio.sleep(0)
        assert trainer.starts == 1 and peer.restarts == []
        assert peer.compute.phase is TrainerState.STOPPED


async def test_steps_that_were_thrown_away_are_counted_by_their_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_trainer(tmp_path) as (peer, _):
        await peer.compute.start()
        for reason, steps in ((BASE_TORN, 3), (NOT_FINITE, 2), (BASE_TORN, 4), (OUT_OF_MEMORY, 0)):
            peer.compute.take(Failed(reason=reason, detail="by the test", fatal=False, steps_dropped=steps))
        assert peer.reporter.build_status().training.steps_dropped == 9
        assert read(peer, "inner_steps_dropped_total", reason="base_torn") == 7
        assert read(peer, "inner_steps_dropped_total", reason="not_finite") == 2
        assert "trainer: base_torn: by the test" in caplog.text


async def test_a_loss_that_is_not_finite_is_the_trainers_own_business(tmp_path: Path) -> None:
    async with open_trainer(tmp_path, round_s=3600.0) as (peer, trainer):
        await peer.compute.start()
        trainer.diverge()
        await wait_until(lambda: peer.compute.error)
        assert peer.restarts == [] and trainer.running


# -- counting --------------------------------------------------------------------------------------------------------


async def test_tokens_are_counted_once_through_merges_and_restarts(tmp_path: Path) -> None:
    async with open_trainer(tmp_path) as (peer, trainer):
        await peer.compute.start()
        await wait_until(lambda: len(peer.offers) == 1)
        once = peer.compute.tokens
        await peer.compute.committed(make_result(peer, 1), (0, 1, 2))
        await wait_until(lambda: peer.compute.tokens == 2 * once)
        trainer.crash()
        await wait_until(lambda: trainer.starts == 2)
        await wait_until(lambda: peer.compute.tokens == 3 * once)
        assert peer.compute.steps == 3 * peer.swarm.manifest.training.inner_steps
        ready = Ready(round=1, steps=5, tokens=500, loss_mean=1.0, batches_done=1)
        peer.compute.take(ready)
        assert peer.compute.tokens == 3 * once + 500, "it counts from zero when it has adopted the base"
