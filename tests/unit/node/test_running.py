"""Where a running daemon's web port is noted."""

from pathlib import Path

import pytest

from shoal.node.running import forget_running, note_running, read_running
from shoal.protocol.errors import ConfigError


def test_the_note_is_read_back_and_forgotten(tmp_path: Path) -> None:
    note_running(tmp_path, "127.0.0.1", 9464)
    assert read_running(tmp_path) == ("127.0.0.1", 9464)
    assert [path.name for path in tmp_path.iterdir()] == ["running.json"]
    forget_running(tmp_path)
    forget_running(tmp_path)
    with pytest.raises(ConfigError, match="no daemon runs"):
        read_running(tmp_path)


def test_a_folder_that_takes_no_file_is_named(tmp_path: Path) -> None:
    # /dev/full answers every write as a full disk does.
    (tmp_path / "running.json.partial").symlink_to("/dev/full")
    with pytest.raises(ConfigError, match=r"running\.json\.partial cannot be written: No space left") as caught:
        note_running(tmp_path, "127.0.0.1", 9464)
    assert caught.value.fix
