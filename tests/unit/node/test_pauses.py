"""Pauses after failures, with the time as an argument."""

from shoal.node.pauses import Pauses


def test_each_further_failure_doubles_the_pause_up_to_the_last() -> None:
    pauses: Pauses[str] = Pauses(first_s=10.0, last_s=35.0)
    assert not pauses.has("a", 0.0)
    now, lengths = 0.0, []
    for _ in range(5):
        until_s = pauses.begin("a", now)
        lengths.append(until_s - now)
        assert pauses.has("a", until_s - 0.1) and not pauses.has("a", until_s)
        now = until_s
    assert lengths == [10.0, 20.0, 35.0, 35.0, 35.0]
    assert not pauses.has("b", 0.0)


def test_a_success_ends_it_and_so_do_other_addresses() -> None:
    pauses: Pauses[str] = Pauses(first_s=10.0, last_s=40.0)
    for _ in range(2):
        pauses.begin("a", 0.0)
    pauses.end("a")
    assert not pauses.has("a", 0.0)
    assert pauses.begin("a", 0.0) == 10.0, "the first one again"
    pauses.begin("b", 0.0)
    pauses.clear()
    assert not pauses.has("a", 0.0) and not pauses.has("b", 0.0)


def test_without_a_longest_one_all_are_alike() -> None:
    pauses: Pauses[str] = Pauses(first_s=10.0)
    assert [pauses.begin("a", now) for now in (0.0, 10.0, 20.0)] == [10.0, 20.0, 30.0]


def test_only_so_many_are_remembered() -> None:
    pauses: Pauses[int] = Pauses(first_s=10.0, keys_max=3)
    for number in range(3):
        pauses.begin(number, 0.0)
    pauses.begin(0, 1.0)
    pauses.begin(3, 1.0)
    assert [pauses.has(number, 2.0) for number in range(4)] == [True, False, True, True]
