"""The Unix socket in a peer's data folder at which a script attaches itself to the daemon.

Invariants: nobody but the daemon's user (and root) can connect: the mode of the socket's folder is 0700, that of the
socket 0600; a socket that a killed daemon left behind does not keep the next one from listening.
"""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SOCKET_FILE = "attach.socket"
TRAINER_FOLDER = "trainer"  # in the data folder
ADDRESS_BYTES_MAX = 100  # sun_path has 108 bytes on Linux, 104 elsewhere
BACKLOG = 4


def find_socket(data_dir: Path) -> Path:
    """Where the daemon of this data folder listens."""
    return data_dir / TRAINER_FOLDER / SOCKET_FILE


def listen(path: Path) -> socket.socket:
    """A socket that listens there and does not block. Raises OSError."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.parent.chmod(0o700)
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _addressed(path) as address:
            listener.bind(address)
        path.chmod(0o600)
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener


def connect(path: Path, timeout_s: float) -> socket.socket:
    """A connection to the daemon that listens there; raises OSError."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(timeout_s)
        with _addressed(path) as address:
            connection.connect(address)
    except OSError:
        connection.close()
        raise
    return connection


@contextmanager
def _addressed(path: Path) -> Iterator[str]:
    """The path as a socket's address; one that is too long goes through an open descriptor of its folder."""
    if len(os.fsencode(path)) <= ADDRESS_BYTES_MAX:
        yield str(path)
        return
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)
