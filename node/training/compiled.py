"""Where the compiled code of a task's loss is kept, so that a restart finds it: a folder of the trainer's own.

By itself torch.compile keeps it in a folder of /tmp whose name everybody can tell, and loads again what it finds there,
by pickle and as machine code.

Invariant: what is loaded was written by this user; the folder is emptied at a start that finds more than
COMPILED_BYTES_MAX in it.
"""

import os
import shutil
from pathlib import Path

from shoal.protocol.errors import ConfigError

COMPILED_BYTES_MAX = 1 << 30


def open_compiled(folder: Path) -> None:
    """Make it so for this process, and for those that it starts later. Raises ConfigError."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
        if sum(path.lstat().st_size for path in folder.rglob("*")) > COMPILED_BYTES_MAX:
            shutil.rmtree(folder)
            folder.mkdir(mode=0o700)
    except OSError as error:
        problem = f"is true, and {folder} cannot be written: {error.strerror or error}"
        raise ConfigError("trainer.compile", problem, "mend that, or take it out of the configuration") from error
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    os.environ["TRITON_CACHE_DIR"] = str(folder / "triton")
