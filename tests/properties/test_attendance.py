"""Attendance: no honest peer declares more than anybody expects of it, and weights keep their bounds."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from shoal.protocol.aggregators import SHARES_MIN, WEIGHT_MEDIANS_MAX, planned_weights
from shoal.protocol.attendance import (
    FRESHNESS,
    INTERVAL_ROUNDS_MAX,
    PARTICIPATION,
    Attendance,
    Counted,
    check_attendance,
    exceeds,
    expect_attendance,
    weight_factor,
)

gaps = st.lists(st.one_of(st.integers(1, 4), st.integers(1, 180)), min_size=2, max_size=20)
works = st.lists(st.tuples(st.integers(0, 2**63 - 1), st.integers(1, 2**40)), min_size=1, max_size=64)


def walk(lengths: list[int]) -> list[Counted]:
    """The rounds that counted a peer, so far apart, with what it declared in each."""
    counted: list[Counted] = []
    number = 0
    for length in lengths:
        number += length
        said = expect_attendance(counted[-1] if counted else None, number)
        counted.append(Counted(round=number, attendance=said))
    return counted


@given(gaps, st.data())
def test_who_has_seen_fewer_rounds_expects_no_shorter_intervals(lengths: list[int], data: st.DataObject) -> None:
    counted = walk(lengths)
    seen = counted[data.draw(st.integers(0, len(counted) - 2))]
    assert not exceeds(counted[-1].attendance, expect_attendance(seen, counted[-1].round))


@given(gaps)
def test_what_is_declared_is_lawful_and_its_factor_bounded(lengths: list[int]) -> None:
    for one in walk(lengths):
        check_attendance(one.attendance, PARTICIPATION, one.round)
        assert 1 <= weight_factor(one.attendance, PARTICIPATION) <= INTERVAL_ROUNDS_MAX


@given(works, st.data())
def test_weights_with_factors_keep_their_sum_and_their_caps(plan: list[tuple[int, int]], data: st.DataObject) -> None:
    count = len(plan)
    factors = data.draw(st.lists(st.floats(2.0**-20, INTERVAL_ROUNDS_MAX), min_size=count, max_size=count))
    weights = planned_weights([tokens for tokens, _ in plan], [steps for _, steps in plan], factors)
    shares = weights.astype(np.float64)
    assert np.all(shares > 0)
    assert abs(shares.sum() - 1) < count * 2.0**-24
    if count >= SHARES_MIN:
        assert weights.max() <= np.float32(1 / SHARES_MIN)
    assert shares.max() <= WEIGHT_MEDIANS_MAX * np.median(shares) * (1 + 2.0**-20)


@given(st.lists(st.integers(0, 2**40), min_size=2, max_size=64))
def test_of_equal_work_the_older_never_weighs_more(ages: list[int]) -> None:
    factors = [weight_factor(Attendance(base_age=age), FRESHNESS) for age in sorted(ages)]
    weights = planned_weights([100] * len(ages), [10] * len(ages), factors)
    assert np.all(np.diff(weights) <= 0)


@given(st.lists(gaps, min_size=2, max_size=16))
def test_of_equal_work_the_more_seldom_never_weighs_less(peers: list[list[int]]) -> None:
    factors = sorted(weight_factor(walk(lengths)[-1].attendance, PARTICIPATION) for lengths in peers)
    weights = planned_weights([100] * len(peers), [10] * len(peers), factors)
    assert np.all(np.diff(weights) >= 0)
