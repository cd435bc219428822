"""What is forced to the disk: a file's bytes, or the names in a folder."""

import os
from pathlib import Path


def sync_path(path: Path) -> None:
    """On return the file's bytes, or the folder's names, survive a power cut. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
