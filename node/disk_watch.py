"""Watches the free space of the data folder: a peer stops voting while there still is space to go on serving."""

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path

DISK_PERIOD_S = 10.0


async def watch_disk(folder: Path, free_gib_min: float, failed: Callable[[str], None]) -> None:
    """Look at it period after period; call `failed` once, with what is wrong, and end."""
    while True:
        free_gib = shutil.disk_usage(folder).free / 2**30
        if free_gib < free_gib_min:
            failed(f"{free_gib:.2f} GiB are free, store.free_gib_min is {free_gib_min:g}")
            return
        await asyncio.sleep(DISK_PERIOD_S)
