from shoal.crdt.clock import HLC_ZERO, Hlc, counter_of, hlc_at, is_due, merge, tick, wall_ms_of


def test_parts_of_a_clock_value_come_back() -> None:
    hlc = hlc_at(1_700_000_000_123, 77)
    assert (wall_ms_of(hlc), counter_of(hlc)) == (1_700_000_000_123, 77)


def test_tick_follows_wall_time_when_that_is_ahead() -> None:
    assert tick(hlc_at(5), 9) == hlc_at(9)


def test_tick_counts_on_when_wall_time_stands_still_or_runs_back() -> None:
    assert tick(hlc_at(9), 9) == hlc_at(9, 1)
    assert tick(hlc_at(9, 1), 3) == hlc_at(9, 2)


def test_a_full_counter_carries_into_the_next_millisecond() -> None:
    assert tick(hlc_at(9, 2**15 - 1), 9) == hlc_at(10)


def test_merge_is_later_than_both_sides() -> None:
    assert merge(hlc_at(4), hlc_at(7, 3), 5) == hlc_at(7, 4)
    assert merge(hlc_at(8), hlc_at(7, 3), 5) == hlc_at(8, 1)
    assert merge(HLC_ZERO, HLC_ZERO, 0) == Hlc(1)


def test_a_time_is_due_once_its_millisecond_has_begun() -> None:
    assert is_due(hlc_at(9, 500), 9)
    assert not is_due(hlc_at(10), 9)
