"""The simulator itself: seeds run clean and twice alike, and it finds the bugs that are planted here."""

import functools
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from shoal.protocol import aggregators, messages, rounds
from shoal.protocol.codecs import Codec, Float32s
from shoal.protocol.contribution import Contributor, Frozen
from shoal.protocol.effects import Note, Persist, Phase, PhaseEntered
from shoal.protocol.identity import verify_signature
from shoal.protocol.messages import Result
from shoal.protocol.rounds import RoundCore
from tests.sim.checkers import InvariantBroken
from tests.sim.network import Rates
from tests.sim.peer import SimPeer
from tests.sim.world import FAULT_PHASE_S, World

SEEDS = range(20)
MUTED_SEEDS = range(100, 106)
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def verify_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pure function that every peer would call for the same message."""
    monkeypatch.setattr(messages, "verify_signature", functools.lru_cache(maxsize=1 << 14)(verify_signature))


class MutedWorld(World):
    """A world in which a proposer often falls silent just when it proposes: the others do not know what it decided."""

    def __init__(self, seed: int, rates: Rates | None = None) -> None:
        super().__init__(seed, rates)
        self.mutes = random.Random(f"{seed}/mutes")

    def note(self, peer: SimPeer, effect: Note) -> None:
        super().note(peer, effect)
        proposes = isinstance(effect, PhaseEntered) and effect.phase is Phase.COMMIT
        if proposes and effect.proposer == peer.identity.peer and self.mutes.random() < 0.5:
            self.schedule(self.mutes.uniform(0.0, 0.3), lambda: self._mute(peer))

    def _mute(self, peer: SimPeer) -> None:
        if self.now < FAULT_PHASE_S:
            self.happen(f"mute {peer.number}")
            losses = {(peer.number, other.number) for other in self.peers if other is not peer}
            self.network._cut |= losses
            self.schedule(self.mutes.uniform(5.0, 25.0), lambda: self.network._cut.difference_update(losses))


# -- clean runs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_no_invariant_breaks_under_drawn_faults(seed: int) -> None:
    outcome = World(seed).run()
    assert outcome.rounds >= 3 and outcome.participants >= 1.0


@pytest.mark.parametrize("seed", MUTED_SEEDS)
def test_no_invariant_breaks_when_proposers_fall_silent(seed: int) -> None:
    world = MutedWorld(seed)
    assert world.run().rounds >= 3
    assert any("mute" in text for text in world.happenings)


def test_the_faults_reach_every_way_in_which_an_attempt_fails() -> None:
    failures: Counter[str] = Counter()
    for seed in SEEDS[:10]:
        failures += World(seed).run().attempts_failed
    expected = {"proposer_lost", "proposer_silent", "exchange_timeout", "commit_timeout", "no_quorum", "superseded"}
    assert set(failures) == expected


def test_calm_rounds_have_everybody_in_them() -> None:
    outcome = World(3, Rates()).run()
    assert not outcome.attempts_failed
    assert outcome.rounds > 20


# -- the same seed, the same trace ----------------------------------------------------------------------------------


def test_a_seed_gives_one_trace() -> None:
    assert World(4).run() == World(4).run()
    assert World(4).run().trace != World(5).run().trace


def test_a_trace_does_not_depend_on_the_order_of_hashes() -> None:
    outputs = set()
    for hash_seed in ("0", "1"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        command = [sys.executable, "-m", "tests.sim.world", "--seed", "2"]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        assert "trace=" in done.stdout
        outputs.add(done.stdout)
    assert len(outputs) == 1


# -- planted bugs ---------------------------------------------------------------------------------------------------


def find(seeds: range, make_world: Callable[[int], World]) -> str:
    """What the checkers say of the first seed that breaks; fails when none does."""
    for seed in seeds:
        try:
            make_world(seed).run()
        except InvariantBroken as error:
            return str(error)
    raise AssertionError(f"no checker saw it in {len(seeds)} seeds")


def test_a_vote_before_its_record_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    vote = RoundCore._vote_if_held

    def vote_first(self: RoundCore) -> None:
        first = len(self._effects)
        vote(self)
        self._effects[first:] = sorted(self._effects[first:], key=lambda effect: isinstance(effect, Persist))

    monkeypatch.setattr(RoundCore, "_vote_if_held", vote_first)
    assert find(range(2), World).startswith("persist before send")


@pytest.mark.parametrize("bug", ["in the order of arrival", "with equal weights"])
def test_a_part_that_is_aggregated_otherwise_is_seen(monkeypatch: pytest.MonkeyPatch, bug: str) -> None:
    average = aggregators._average

    def average_otherwise(
        codec: Codec, parts: list[aggregators.WeightedPart], weights: list[object], out: Float32s
    ) -> None:
        if bug == "with equal weights":
            weights = [weights[0]] * len(weights)
        else:
            parts, weights = parts[::-1], weights[::-1]
        average(codec, parts, weights, out)  # type: ignore[arg-type]  # as production passes them

    monkeypatch.setattr(aggregators, "_average", average_otherwise)
    assert find(range(2), World).startswith("result = aggregate of the bitmap's members")


def test_a_residual_of_parts_that_were_not_certified_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    settle = Contributor.settle

    def settle_all(self: Contributor, frozen: Frozen, result: Result, index: int) -> tuple[int, ...]:
        self.residual[:] = frozen.residual_next
        return settle(self, frozen, result, index)

    monkeypatch.setattr(Contributor, "settle", settle_all)
    with pytest.raises(AssertionError) as caught:
        for seed in range(5):
            World(seed).run()
    assert "_merge" in {entry.name for entry in caught.traceback}


def test_a_proposer_that_forgets_in_a_restart_that_it_led_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RoundCore, "_mark_led", lambda self: None)
    assert "Plan: equivocation" in find(range(12), World)


def test_a_proposer_that_ignores_what_may_be_certified_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "choose_accepted", lambda promises: None)
    assert find(range(20), MutedWorld).startswith("one result per round")


def test_a_certificate_without_a_quorum_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "quorum_size", lambda voters, rule: max(1, voters // 2))
    assert "no_quorum" in find(range(3), World)
