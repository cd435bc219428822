"""A model that FSDP2 divides among the processes of a script: what is handed over and taken is that of a whole one."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
TIMEOUT_S = 300.0


def test_two_ranks_with_half_of_the_model_each_do_what_one_does_with_all_of_it(tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.unit.training.divided_ranks", str(rank), str(tmp_path / "store")],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [one.communicate(timeout=TIMEOUT_S) for one in ranks]
    finally:
        for one in ranks:
            one.kill()
    assert [one.returncode for one in ranks] == [0, 0], "\n".join(stderr for _, stderr in said)
    made = "Ready Paused Evaluated Ready Failed Paused Paused Ready Evaluated"
    shifted = "Ready Paused Ready Paused Ready Failed"
    assert said[0][0] == f"rank 0: {made} {shifted}\n"
