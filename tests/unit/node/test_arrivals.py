"""Who may come in, by where it comes from: few half-open connections, of which the oldest goes, and no floods."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.node import arrivals
from shoal.node.arrivals import ArrivalLimits, Arrivals, group_of

LIMITS = ArrivalLimits(half_open_max=4, half_open_per_group_max=2, proven_per_group_max=3, burst=100, per_s=1.0)
HOME, WORK, CAFE = "203.0.113.1", "203.0.113.2", "198.51.100.3"


def test_whoever_proves_itself_makes_room() -> None:
    door: Arrivals[int] = Arrivals(LIMITS)
    for number in range(3):
        assert door.arrive(number, HOME, 0.0) is None
        door.prove(number)
    assert door.half_open == 0


def test_the_oldest_half_open_connection_of_an_address_goes_for_its_newest() -> None:
    door: Arrivals[int] = Arrivals(LIMITS)
    assert [door.arrive(number, HOME, 0.0) for number in range(4)] == [None, None, 0, 1]
    assert (door.half_open, door.turned_away) == (2, 2)
    assert door.arrive(9, WORK, 0.0) is None


def test_where_all_places_are_taken_the_most_crowded_address_gives_one() -> None:
    door: Arrivals[int] = Arrivals(LIMITS)
    for number, host in enumerate((CAFE, HOME, HOME, WORK)):
        assert door.arrive(number, host, 0.0) is None
    assert door.arrive(9, "192.0.2.9", 0.0) == 1
    assert door.half_open == LIMITS.half_open_max


def test_a_proven_connection_never_goes_for_another() -> None:
    door: Arrivals[int] = Arrivals(LIMITS)
    door.arrive(0, HOME, 0.0)
    door.prove(0)
    assert [door.arrive(number, HOME, 0.0) for number in range(1, 5)] == [None, None, 1, 2]


def test_one_address_has_only_so_many_proven_connections_but_for_this_machine() -> None:
    door: Arrivals[int] = Arrivals(LIMITS)
    for number in range(3):
        door.arrive(number, HOME, 0.0)
        door.prove(number)
    assert door.arrive(3, HOME, 0.0) == 3
    door.leave(0)
    assert door.arrive(4, HOME, 0.0) is None
    for number in range(10, 20):
        assert door.arrive(number, "127.0.0.1", 0.0) is None
        door.prove(number)


def test_a_flood_of_one_address_is_turned_away_at_the_door() -> None:
    limits = ArrivalLimits(burst=3, per_s=2.0)
    door: Arrivals[int] = Arrivals(limits)
    assert [door.arrive(number, HOME, 0.0) for number in range(5)] == [None, None, None, 3, 4]
    assert door.arrive(5, WORK, 0.0) is None
    assert [door.arrive(number, HOME, 1.0) for number in range(6, 9)] == [None, None, 8]


def test_a_flood_of_many_addresses_is_turned_away_at_the_door() -> None:
    door: Arrivals[int] = Arrivals(ArrivalLimits(total_burst=3, total_per_s=2.0))
    assert [door.arrive(number, f"192.0.2.{number}", 0.0) for number in range(5)] == [None, None, None, 3, 4]
    assert [door.arrive(number, f"192.0.2.{number}", 1.0) for number in range(6, 9)] == [None, None, 8]


def test_what_leaves_twice_or_was_never_here_changes_nothing() -> None:
    door: Arrivals[int] = Arrivals(LIMITS)
    door.arrive(0, HOME, 0.0)
    door.prove(7)
    door.leave(7)
    door.prove(0)
    door.prove(0)
    door.leave(0)
    door.leave(0)
    assert door.half_open == 0
    assert door.arrive(1, HOME, 0.0) is None


def test_addresses_remembered_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrivals, "GROUPS_MAX", 3)
    door: Arrivals[int] = Arrivals(ArrivalLimits(burst=1, per_s=0.001))
    for number in range(10):
        assert door.arrive(number, f"192.0.2.{number}", 0.0) is None
    assert door.arrive(99, "192.0.2.9", 0.0) == 99
    assert door.arrive(100, "192.0.2.0", 0.0) is None


@pytest.mark.parametrize(
    ("host", "group"),
    [
        ("203.0.113.1", "203.0.113.1"),
        ("::ffff:203.0.113.1", "203.0.113.1"),
        ("2001:db8:1:22ff::7", "2001:db8:1:2200::/56"),
        ("fe80::1%eth0", "fe80::/56"),
        ("::1", "::1"),
        ("", ""),
        ("relay", ""),
    ],
)
def test_what_counts_as_one_address(host: str, group: str) -> None:
    assert group_of(host) == group


Step = tuple[str, int]
steps = st.lists(st.tuples(st.sampled_from(["arrive", "prove", "leave"]), st.integers(0, 30)), max_size=200)


@given(steps)
def test_whatever_happens_the_bounds_hold(done: list[Step]) -> None:
    door: Arrivals[int] = Arrivals(LIMITS)
    here: dict[int, bool] = {}
    for now, (what, number) in enumerate(done):
        if what == "arrive" and number not in here:
            gone = door.arrive(number, (HOME, WORK, CAFE, "192.0.2.1", "")[number % 5], float(now))
            if gone != number:
                here[number] = False
                if gone is not None:
                    assert here.pop(gone) is False
        elif what == "prove":
            door.prove(number)
            if number in here:
                here[number] = True
        elif what == "leave":
            door.leave(number)
            here.pop(number, None)
        assert door.half_open == sum(not proven for proven in here.values()) <= LIMITS.half_open_max
