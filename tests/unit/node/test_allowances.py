"""A burst at once and a rate for long."""

from shoal.node.allowances import Allowances


def test_a_burst_and_then_the_rate() -> None:
    allowances: Allowances[str] = Allowances(burst=2, per_s=4.0)
    assert [allowances.take("a", 0.0) for _ in range(3)] == [True, True, False]
    assert allowances.take("b", 0.0)
    assert [allowances.take("a", 0.25), allowances.take("a", 0.25)] == [True, False]
    assert [allowances.take("a", 100.0) for _ in range(3)] == [True, True, False]


def test_what_is_reserved_is_waited_for_in_turn() -> None:
    allowances: Allowances[str] = Allowances(burst=1, per_s=2.0)
    assert [allowances.reserve("a", 0.0) for _ in range(3)] == [0.0, 0.5, 1.0]
    assert allowances.reserve("a", 1.0) == 0.5
    assert allowances.reserve("a", 50.0) == 0.0


def test_who_was_not_seen_for_longest_is_forgotten() -> None:
    allowances: Allowances[int] = Allowances(burst=1, per_s=0.001, keys_max=2)
    assert [allowances.take(key, 0.0) for key in (1, 2, 3)] == [True] * 3
    assert not allowances.take(3, 0.0)
    assert allowances.take(1, 0.0)
