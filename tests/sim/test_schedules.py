"""Random orders of events: no schedule breaks an invariant, and the planted ballot bugs are found."""

import functools
from collections.abc import Mapping
from dataclasses import replace

import pytest

from shoal.protocol import messages, rounds
from shoal.protocol.identity import PeerId, verify_signature
from shoal.protocol.messages import Promise, Proposal
from shoal.protocol.rounds import RoundCore
from tests.sim.checkers import InvariantBroken
from tests.sim.schedules import Schedule

SEEDS = 120


@pytest.fixture(autouse=True)
def verify_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pure function that every peer would call for the same message."""
    monkeypatch.setattr(messages, "verify_signature", functools.lru_cache(maxsize=1 << 14)(verify_signature))


def find(seeds: int) -> str:
    """What the checks say of the first schedule that breaks; fails when none does."""
    for seed in range(seeds):
        try:
            Schedule(seed).run()
        except InvariantBroken as error:
            return str(error)
    raise AssertionError(f"no check saw it in {seeds} schedules")


@pytest.mark.parametrize("tens", range(SEEDS // 10))
def test_no_order_of_events_breaks_an_invariant(tens: int) -> None:
    certified = [Schedule(seed).run() for seed in range(10 * tens, 10 * tens + 10)]
    assert min(certified) >= 1
    assert max(certified) >= 3, "the disorder does not stop everything"


def test_a_schedule_is_one_schedule() -> None:
    words = []
    for _ in range(2):
        schedule = Schedule(5)
        schedule.run()
        words.append([seat.effects for seat in schedule.table.seats])
    assert words[0] == words[1]


def test_a_vote_below_a_promise_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    vote = RoundCore._vote_if_held

    def vote_anyway(self: RoundCore) -> None:
        promised = self._vote.promised
        self._vote = replace(self._vote, promised=0)
        vote(self)
        self._vote = replace(self._vote, promised=max(promised, self._vote.promised))

    def take_anyway(self: RoundCore, message: Proposal, sender: PeerId, now: float) -> None:
        self._check_proposer(message.attempt, sender)
        self._follow_proposal(message, now)

    monkeypatch.setattr(RoundCore, "_vote_if_held", vote_anyway)
    monkeypatch.setattr(RoundCore, "_take_proposal", take_anyway)
    assert find(150).startswith("one result per round")


def test_a_proposal_that_ignores_the_promises_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def choose_nothing(promises: Mapping[PeerId, Promise]) -> None:
        return None

    monkeypatch.setattr(rounds, "choose_accepted", choose_nothing)
    assert find(250).startswith("one result per round")


def test_an_attempt_that_is_led_twice_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RoundCore, "_mark_led", lambda self: None)
    assert find(60)


def test_a_smaller_quorum_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "quorum_size", lambda voters, rule: max(1, voters // 2))
    assert find(20)
