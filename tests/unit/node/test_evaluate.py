"""What `shoal evaluate` refuses at once: torch, which takes seconds, is not waited for."""

import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path

import pytest

from shoal.node.evaluate import add_evaluate_arguments, check_evaluate_arguments
from shoal.protocol.errors import ConfigError


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--text", __file__, "--windows", "0"), "--windows: is 0"),
        ((), "--text: is missing"),
        (("--text", "/nonexistent"), "--text: /nonexistent does not exist"),
        (("--text", __file__, "--tokenizer", "/nonexistent"), "--tokenizer: /nonexistent is no file"),
        (("--text", __file__, "--weights", __file__), "--weights: .* is no folder"),
    ],
)
def test_what_cannot_be_used_is_named(arguments: tuple[str, ...], named: str) -> None:
    parser = ArgumentParser()
    add_evaluate_arguments(parser)
    with pytest.raises(ConfigError, match=named):
        check_evaluate_arguments(parser.parse_args([__file__, *arguments]))


def test_a_missing_model_is_named_without_torch(tmp_path: Path) -> None:
    script = (
        "import sys; from shoal.node.cli import main;"
        f" code = main(['evaluate', {str(tmp_path / 'none')!r}, '--sample', 'x']); print(code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "False"] and "MODEL: " in done.stderr
