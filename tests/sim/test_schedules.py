"""Random orders of events break no invariant. That the planted ballot bugs do is shown in test_bugs.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.sim.schedules import Schedule

SEEDS = 120
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("tens", range(SEEDS // 10))
def test_no_order_of_events_breaks_an_invariant(tens: int) -> None:
    certified = [Schedule(seed).run() for seed in range(10 * tens, 10 * tens + 10)]
    assert min(certified) >= 1
    assert max(certified) >= 3, "the disorder does not stop everything"


def test_a_schedule_is_one_schedule_whatever_the_hash_seed() -> None:
    code = (
        "from tests.sim.schedules import Schedule; one = Schedule(5); one.run();"
        "print(repr([seat.effects for seat in one.table.seats]))"
    )
    outputs = set()
    for hash_seed in ("0", "1"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        outputs.add(done.stdout)
    assert len(outputs) == 1 and len(outputs.pop()) > 10_000
