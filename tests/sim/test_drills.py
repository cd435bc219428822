"""One death costs one time-out and no more, whoever dies and when."""

import pytest

from tests.sim.drills import Drill

SEEDS = 60


@pytest.mark.parametrize("tens", range(SEEDS // 10))
def test_a_death_costs_no_attempt_and_one_share_of_the_traffic(tens: int) -> None:
    drills = [Drill(seed) for seed in range(10 * tens, 10 * tens + 10)]
    for drill in drills:
        drill.run()
    assert any(drill.died_s is not None for drill in drills)
