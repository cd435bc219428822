"""Daemons recover by themselves from what happens to their networks."""

from pathlib import Path

import pytest

from tests.natlab.daemons import LabSwarm
from tests.natlab.lab import Lab
from tests.natlab.scenarios import SCENARIOS, reboot_router

SHORT = reboot_router.__name__


@pytest.mark.parametrize(
    "name", [SHORT, *(pytest.param(name, marks=pytest.mark.long) for name in SCENARIOS if name != SHORT)]
)
def test_recovery_without_a_restart(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Lab() as lab:
        swarm = LabSwarm(tmp_path, founders=2)
        try:
            taken_s = SCENARIOS[name](lab, swarm)
        finally:
            swarm.end()
    with capsys.disabled():
        print(f"\n{name}: in a round again after {taken_s:.1f} s")
