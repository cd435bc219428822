"""`shoal bench` as a person runs it: real processes, real sockets, and figures that can be true."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.alone

TIMEOUT_S = 180


def run_bench(out: Path, *arguments: str) -> tuple[str, dict[str, Any]]:
    command = [sys.executable, "-P", "-m", "shoal.node", "bench", *arguments, "--json", str(out)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout, json.loads(out.read_text())


# What the codec loses of normal values: up, averaged over three peers, and once more down.
@pytest.mark.parametrize(("codec", "rms_max"), [("int8", 0.012), ("fp32", 1e-6)])
def test_rounds_between_three_peers_are_certified_and_average(tmp_path: Path, codec: str, rms_max: float) -> None:
    shown, figures = run_bench(
        tmp_path / "out", "allreduce", "--peers", "3", "--mib", "2", "--rounds", "2", "--codec", codec
    )
    found = figures["allreduce"]
    assert f"3 peers on this machine, 2 MiB of float32 each, {codec}, parts of 262,144, medians of 2 " in shown
    assert len(found["rounds"]) == 2
    assert 0 < found["rms_error"] < rms_max
    for one in found["rounds"]:
        assert 0 < one["exchange_s"] < one["step_s"]
        assert one["cpu_s"] > 0
    assert len(found["state_root"]) == 64


def test_links_and_codecs_are_measured(tmp_path: Path) -> None:
    shown, figures = run_bench(tmp_path / "links", "links", "--repeats", "1", "--megabytes", "20")
    assert "plain TCP" in shown
    assert all(one["rate"] > 0 for one in figures["links"]["rates"])
    shown, figures = run_bench(tmp_path / "codecs", "codecs", "--repeats", "1")
    assert shown.splitlines()[2].startswith("fp32")
    errors = {one["codec"]: one["error"] for one in figures["codecs"]}
    assert errors["fp32"] == 0 < errors["int8"] < errors["int4"] < errors["ternary"]
