"""Every benchmark is one command that can write its figures to a file."""

from pathlib import Path

import pytest

import benchmarks

HERE = Path(next(iter(benchmarks.__path__)))
# Started by another benchmark, in an environment of its own or as one of its processes.
PARTS = {"allreduce_hivemind", "dht_hivemind", "pycrdt_histories"}


def find_commands() -> list[Path]:
    files = [*HERE.glob("*.py"), HERE / "experiments" / "__main__.py"]
    return sorted(one for one in files if "__name__ ==" in one.read_text() and one.stem not in PARTS)


@pytest.mark.parametrize("path", find_commands(), ids=lambda path: path.stem)
def test_a_benchmark_writes_its_figures_to_a_file(path: Path) -> None:
    text = path.read_text()
    assert '"--json"' in text
    assert "--json FILE" in text.split('"""')[1], "said in the module's first lines"
