"""Seed files and incarnations on a real disk, with a real second process."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from shoal.node.identity_file import (
    create_identity,
    hold_identity,
    load_identity,
    load_or_create_identity,
    next_incarnation,
)
from shoal.protocol.errors import ConfigError

HOLDER = """
import sys
from pathlib import Path
from shoal.node.identity_file import hold_identity
with hold_identity(Path(sys.argv[1])) as identity:
    print(identity.peer.hex(), flush=True)
    sys.stdin.read()
"""


def test_a_created_identity_loads_again(tmp_path: Path) -> None:
    path = tmp_path / "new" / "identity.key"
    made = create_identity(path)
    assert load_identity(path).seed == load_or_create_identity(path).seed == made.seed
    assert create_identity(tmp_path / "other.key").seed != made.seed


def test_a_seed_file_is_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "identity.key"
    old = os.umask(0)
    try:
        create_identity(path)
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert sorted(path.parent.iterdir()) == [path], "no draft is left behind"


def test_an_identity_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "identity.key"
    first = create_identity(path)
    with pytest.raises(ConfigError, match="is there already"):
        create_identity(path)
    assert load_identity(path).seed == first.seed
    assert sorted(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o622])
def test_a_wider_mode_is_refused_with_the_command(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "my keys" / "identity.key"
    create_identity(path)
    path.chmod(mode)
    with pytest.raises(ConfigError) as caught:
        load_identity(path)
    assert caught.value.fix == f"run: chmod 600 '{path}'"
    assert f"{mode:04o}" in caught.value.problem


@pytest.mark.parametrize(
    "damage", ["", "\n", "00" * 32, "# another header\n" + "00" * 32, "{header}\nzz", "{header}\n"]
)
def test_a_damaged_file_is_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "identity.key"
    create_identity(path)
    header = path.read_text().splitlines()[0]
    path.write_text(damage.replace("{header}", header))
    with pytest.raises(ConfigError, match="damaged"):
        load_identity(path)


def test_64_characters_that_are_no_hex_digits_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "identity.key"
    create_identity(path)
    header = path.read_text().splitlines()[0]
    for digits in (b"zz" * 32, b"\xff" * 64):
        path.write_bytes(header.encode() + b"\n" + digits)
        with pytest.raises(ConfigError, match="damaged"):
            load_identity(path)


def test_a_missing_file_is_an_error_only_when_it_must_be_there(tmp_path: Path) -> None:
    path = tmp_path / "identity.key"
    with pytest.raises(ConfigError, match="does not exist"):
        load_identity(path)
    made = load_or_create_identity(path)
    assert load_or_create_identity(path).seed == made.seed


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match="cannot be made") as caught:
        load_or_create_identity(tmp_path / "file" / "identity.key")
    assert caught.value.field == str(tmp_path / "file")


def test_one_process_at_a_time_holds_an_identity(tmp_path: Path) -> None:
    path = tmp_path / "identity.key"
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout
        peer = bytes.fromhex(holder.stdout.readline().decode())
        with pytest.raises(ConfigError, match="another running shoal"), hold_identity(path):
            pass
        holder.kill()
        holder.wait()
        with hold_identity(path) as identity:
            assert identity.peer == peer, "a killed holder lets go"
    with hold_identity(path) as identity:
        assert identity.peer == peer, "and so does a context that ended"


def test_incarnations_grow_from_start_to_start(tmp_path: Path) -> None:
    path = tmp_path / "data" / "incarnation"
    assert [next_incarnation(path, now_s) for now_s in (100.9, 100.9, 50.0, 1000.0)] == [100, 101, 102, 1000]
    assert sorted(path.parent.iterdir()) == [path]


def test_a_lost_count_starts_from_the_clock(tmp_path: Path) -> None:
    path = tmp_path / "incarnation"
    first = next_incarnation(path, 1_700_000_000.0)
    path.unlink()
    assert next_incarnation(path, 1_700_000_100.0) > first


@pytest.mark.parametrize("text", ["", "many", "-1", str(2**63 - 1), "9" * 5000])
def test_a_count_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "incarnation"
    path.write_text(text)
    with pytest.raises(ConfigError, match="holds no count"):
        next_incarnation(path, 0.0)
