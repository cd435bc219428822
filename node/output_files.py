"""What a command writes where a person has said: a file or a folder that cannot be written is that person's to mend.

Invariant: what the system refuses there ends as a ConfigError with the option, the path and the system's word; of a
file that was not finished nothing stays.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from shoal.protocol.errors import ConfigError

FIX = "give a path that can be written, on a disk with room for it"


@contextmanager
def writing(option: str, out: Path) -> Iterator[None]:
    """Around the writing of `out`, file or folder, as `option` names it. Raises ConfigError in the place of OSError."""
    try:
        yield
    except OSError as error:
        raise ConfigError(option, f"{out} cannot be written: {error.strerror or error}", FIX) from error
    except SafetensorError as error:
        raise ConfigError(option, f"{out} cannot be written: {error}", FIX) from error


@contextmanager
def replacing(option: str, out: Path) -> Iterator[Path]:
    """The path of a file to write beside `out`, which takes its place at the end and is removed where that fails. Makes
    the folder. Raises ConfigError in the place of OSError."""
    temporary = out.with_name(out.name + ".partial")
    with writing(option, out):
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            temporary.replace(out)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)  # it is there still where something has failed
