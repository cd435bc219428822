"""The note in a running daemon's data folder that says where its web port is."""

import json
import os
from pathlib import Path

from shoal.protocol.errors import ConfigError

DATA_DIR = "~/.local/share/shoal"  # where `shoal up` puts everything, and others look for it
RUNNING_FILE = "running.json"


def note_running(folder: Path, host: str, port: int) -> None:
    """Written when the daemon answers. Raises ConfigError where the folder takes no file any more."""
    note = {"pid": os.getpid(), "web": f"{host}:{port}"}
    temporary = folder / f"{RUNNING_FILE}.partial"
    try:
        temporary.write_text(json.dumps(note), encoding="utf-8")
        temporary.replace(folder / RUNNING_FILE)
    except OSError as error:
        problem = f"{temporary} cannot be written: {error.strerror}"
        raise ConfigError("--data-dir", problem, "mend that, or use another folder") from error


def forget_running(folder: Path) -> None:
    """Removed when it ends. After kill -9 it stays, and nobody answers there."""
    (folder / RUNNING_FILE).unlink(missing_ok=True)


def read_running(folder: Path) -> tuple[str, int]:
    """Host and port; raises ConfigError where no daemon runs on this folder."""
    try:
        host, _, port = json.loads((folder / RUNNING_FILE).read_text(encoding="utf-8"))["web"].rpartition(":")
        return host, int(port)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        fix = f"start one: shoal up --data-dir {folder}"
        raise ConfigError("--data-dir", f"no daemon runs on {folder}", fix) from error
