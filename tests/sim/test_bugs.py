"""The simulator bites: every planted bug is caught by an invariant."""

import itertools
from collections.abc import Callable

import pytest

from tests.sim.bugs import ROUNDS_MAX, find
from tests.sim.planted import BUGS, Arena, Patches, planted

BUGS_MIN = 25
FIRST_SEED = 1  # of the search, when the stored seed has gone stale with a change of the protocol


def test_there_are_enough_bugs() -> None:
    assert len(BUGS) >= BUGS_MIN
    assert {one.arena for one in BUGS.values()} == set(Arena)


@pytest.mark.parametrize("name", sorted(BUGS))
def test_planted_bug_is_caught(name: str, record_property: Callable[[str, object], None]) -> None:
    one = BUGS[name]
    catch = find(one, itertools.chain([one.seed], itertools.count(FIRST_SEED)))
    assert catch is not None, f"{one.wrong} No invariant broke in {ROUNDS_MAX} rounds."
    record_property("invariant", catch.invariant)
    record_property("seed", catch.seed)
    record_property("rounds", catch.rounds)


def test_a_bug_is_gone_when_it_is_switched_off() -> None:
    def read() -> list[object]:
        return [getattr(owner, name) for owner, name in touched]

    touched: list[tuple[object, str]] = []
    before: list[object] = []

    class Spy(Patches):
        def set(self, owner: object, name: str, new: object) -> None:
            touched.append((owner, name))
            before.append(getattr(owner, name))
            super().set(owner, name, new)

    for one in BUGS.values():
        touched.clear()
        before.clear()
        spy = Spy()
        one.plant(spy)
        assert read() != before, f"{one.name} changes nothing"
        spy.undo()
        assert read() == before
        with planted(one):
            assert read() != before
        assert read() == before
