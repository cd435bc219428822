"""Every benchmark is one command that can write its figures to a file."""

import runpy
import sys
from pathlib import Path

import pytest

import benchmarks

HERE = Path(next(iter(benchmarks.__path__)))
# Started by another benchmark, in an environment of its own or as one of its processes.
PARTS = {"allreduce_hivemind", "dht_hivemind", "plain_tcp", "pycrdt_histories"}


def find_commands() -> list[Path]:
    files = [*HERE.glob("*.py"), HERE / "experiments" / "__main__.py"]
    return sorted(one for one in files if "__name__ ==" in one.read_text() and one.stem not in PARTS)


@pytest.mark.parametrize("path", find_commands(), ids=lambda path: path.stem)
def test_a_benchmark_writes_its_figures_to_a_file(path: Path) -> None:
    assert "--json FILE" in path.read_text().split('"""')[1], "said in the module's first lines"


@pytest.mark.parametrize("path", find_commands(), ids=lambda path: path.stem)
def test_a_benchmark_starts_and_tells_its_options(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What no type tells: its imports are there, and its table of options can be made and printed."""
    monkeypatch.setattr(sys, "argv", [path.stem, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(path), run_name="__main__")
    assert not ended.value.code
    assert "\n  --json" in capsys.readouterr().out
