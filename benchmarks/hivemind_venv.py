"""hivemind in a virtual environment of its own, with which others are measured beside us in the same run."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

PACKAGES = ("hivemind==1.1.12", "numpy==2.3.5", "torch==2.13.0", "setuptools<81")
TIMEOUT_S = 1200
HERE = Path(__file__).parent
VENV = HERE.parent / "build/bench/hivemind"


def run_in_hivemind(script: str, *arguments: object) -> Any:
    """What this script of benchmarks/ prints last, as JSON. Raises OSError and SubprocessError, also where hivemind
    cannot be installed."""
    python = VENV / "bin/python"
    if not (VENV / ".installed").exists():
        print(f"installing {PACKAGES[0]} into {VENV}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *PACKAGES], check=True, timeout=TIMEOUT_S)
        (VENV / ".installed").touch()
    command = [str(python), str(HERE / script), *map(str, arguments)]
    done = subprocess.run(command, check=True, timeout=TIMEOUT_S, stdout=subprocess.PIPE)
    return json.loads(done.stdout.splitlines()[-1])
