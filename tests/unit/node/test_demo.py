"""What the demo asks of its options before it begins."""

from dataclasses import replace
from pathlib import Path

import pytest

from shoal.node.demo import MARKER, DemoOptions, explain_standstill, is_due, run_demo
from shoal.node.status import Status, TrainerState
from shoal.protocol.errors import ConfigError


@pytest.fixture
def options(tmp_path: Path) -> DemoOptions:
    """Of a folder that holds an earlier demo."""
    folder = tmp_path / "demo-run"
    folder.mkdir()
    (folder / MARKER).touch()
    (folder / "model.safetensors").write_bytes(b"of the earlier one")
    return DemoOptions(text=None, rounds=None, folder=folder, report=None)


def test_wrong_options_are_refused_before_the_earlier_demo_is_removed(options: DemoOptions, tmp_path: Path) -> None:
    for wrong, named in (
        (replace(options, text=tmp_path / "nowhere"), "--text"),
        (replace(options, rounds=0), "--rounds: is 0"),
        (replace(options, report=tmp_path / "nowhere" / "report.json"), "--report"),
        (replace(options, report=tmp_path), "--report"),
    ):
        with pytest.raises(ConfigError, match=named):
            run_demo(wrong)
    assert (options.folder / "model.safetensors").read_bytes() == b"of the earlier one"


def test_a_file_is_no_folder_for_the_demo(options: DemoOptions, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match=r"--out: .*file is a file"):
        run_demo(replace(options, folder=tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "mine"


def test_a_demo_whose_trainers_were_all_given_up_says_why(status: Status) -> None:
    error = "trainer.text: empty.txt has 0 bytes of text"
    ended = replace(status, training=replace(status.training, state=TrainerState.STOPPED, error=error))
    assert explain_standstill([ended, ended]) == error
    assert explain_standstill([ended, status]) is None and explain_standstill([ended, None]) is None
    assert explain_standstill([]) is None


def test_a_slow_machine_kills_and_joins_by_the_time_that_is_left() -> None:
    assert is_due(6, 6, 0.1, 0.3) and not is_due(5, 6, 0.1, 0.3), "by the round, where rounds are quick"
    assert is_due(3, 6, 0.3, 0.3), "by the time, where they are slow"
    assert not is_due(0, 6, 0.9, 0.3), "never before anything was certified"
