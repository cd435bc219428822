"""The files that make a peer itself: its Ed25519 seed, a swarm owner's seed, and the count of its starts.

Invariants: a seed file is never readable by others, never overwritten and never half written; an identity is held by
one process at a time, because two that sign with one key would equivocate; incarnations only grow, and one is durable
before it is used.
"""

import fcntl
import os
import secrets
import shlex
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from shoal.node.durability import sync_path
from shoal.protocol.errors import ConfigError
from shoal.protocol.identity import SEED_BYTES, Identity, format_peer_id

IDENTITY_FILE = "identity.key"
OWNER_FILE = "owner.key"
INCARNATION_FILE = "incarnation"

_HEADER = "# shoal Ed25519 seed. Keep it secret and keep a copy: whoever holds it is this peer or this swarm's owner."
_PEER_NOTE = "# Its peer id: "
_FILE_BYTES_MAX = 4096
_INCARNATION_MAX = 2**63 - 1


def create_identity(path: Path) -> Identity:
    """A new identity, durably in a new file of mode 0600; raises ConfigError where a file is there already."""
    seed = secrets.token_bytes(SEED_BYTES)
    _make_folder(path)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        identity = Identity(seed)
        _write_durably(draft, f"{_HEADER}\n{seed.hex()}\n{_PEER_NOTE}{format_peer_id(identity.peer)}\n")
        # A link, unlike a rename, never replaces what is there.
        os.link(draft, path)
        sync_path(path.parent)
    except FileExistsError as error:
        raise ConfigError(str(path), "is there already", "use it, or move it away first") from error
    except OSError as error:
        raise _unusable(path, "written", error) from error
    finally:
        with suppress(OSError):
            draft.unlink()
    return identity


def load_identity(path: Path) -> Identity:
    """The identity in the file; raises ConfigError where it is absent, damaged or readable by others."""
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            raw = file.read(_FILE_BYTES_MAX)
    except FileNotFoundError as error:
        raise ConfigError(str(path), "does not exist", "restore it from a copy, or make a new one") from error
    except OSError as error:
        raise _unusable(path, "read", error) from error
    if mode & 0o077:
        fix = f"run: chmod 600 {shlex.quote(str(path))}"
        raise ConfigError(str(path), f"can be read or changed by others (mode {mode:04o})", fix)
    header, _, rest = raw.partition(b"\n")
    digits, _, note = rest.strip().partition(b"\n")
    if header.decode(errors="replace") != _HEADER or len(digits) != 2 * SEED_BYTES:
        raise _damaged(path)
    try:
        identity = Identity(bytes.fromhex(digits.decode("ascii")))
    except ValueError as error:
        raise _damaged(path) from error
    # A seed with one wrong digit is a seed, too. Files of earlier releases have no note.
    if note and note != f"{_PEER_NOTE}{format_peer_id(identity.peer)}".encode():
        raise _damaged(path)
    return identity


def load_or_create_identity(path: Path) -> Identity:
    """The identity in the file, which is made where it is absent; raises ConfigError."""
    if path.exists():
        return load_identity(path)
    try:
        return create_identity(path)
    except ConfigError:
        # Another process may have been faster: then its identity is the one.
        if not path.exists():
            raise
        return load_identity(path)


@contextmanager
def hold_identity(path: Path) -> Iterator[Identity]:
    """`load_or_create_identity`, for this process alone until the context ends, however the process ends.

    Raises ConfigError while another process holds it.
    """
    identity = load_or_create_identity(path)
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            fix = "stop the other one, or give this one a folder of its own (--data-dir)"
            raise ConfigError(str(path), "is in use by another running shoal", fix) from error
        yield identity


def next_incarnation(path: Path, now_s: float) -> int:
    """The number of this start: greater than every earlier one, and durable when this returns.

    It is at least the wall clock's seconds `now_s`, so that a peer restored from an old copy is still taken for newer
    than what the swarm remembers of it. Raises ConfigError.
    """
    try:
        last = int(path.read_bytes()[:_FILE_BYTES_MAX].decode("ascii"))
    except FileNotFoundError:
        last = 0
    except OSError as error:
        raise _unusable(path, "read", error) from error
    except ValueError:
        last = -1
    if not 0 <= last < _INCARNATION_MAX:
        raise ConfigError(str(path), "holds no count of starts", "delete it: the clock takes its place")
    incarnation = max(last + 1, int(now_s))
    _make_folder(path)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        _write_durably(draft, f"{incarnation}\n")
        draft.replace(path)
        sync_path(path.parent)
    except OSError as error:
        with suppress(OSError):
            draft.unlink()
        raise _unusable(path, "written", error) from error
    return incarnation


def _write_durably(path: Path, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _make_folder(path: Path) -> None:
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise _unusable(path.parent, "made", error) from error


def _unusable(path: Path, verb: str, error: OSError) -> ConfigError:
    return ConfigError(
        str(path), f"cannot be {verb}: {error.strerror}", "mend that, or use another folder (--data-dir)"
    )


def _damaged(path: Path) -> ConfigError:
    fix = "restore it from a copy; with a new one nobody will know this peer again"
    return ConfigError(str(path), "is no seed file, or damaged", fix)
