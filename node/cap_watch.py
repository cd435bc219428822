"""Sets the caps of the tensor links as the hours of the day go by, and says so."""

import asyncio
import time
from collections.abc import Callable

from shoal.node.rate_caps import Caps, CapSchedule

CHECK_PERIOD_S = 10.0


class CapWatch:
    """`apply` is told the caps that hold, at first and whenever they change; `tell` what to say of it."""

    def __init__(
        self,
        schedule: CapSchedule,
        apply: Callable[[Caps], None],
        tell: Callable[[str], None],
        local_time: Callable[[], time.struct_time] = time.localtime,
    ) -> None:
        self._schedule = schedule
        self._apply = apply
        self._tell = tell
        self._local_time = local_time
        self._caps = Caps()

    def look(self) -> None:
        """What holds now."""
        now = self._local_time()
        caps = self._schedule.at(60 * now.tm_hour + now.tm_min)
        if caps == self._caps:
            return
        self._caps = caps
        self._apply(caps)
        self._tell(f"tensors: {_describe('upload', caps.upload_mbit)}, {_describe('download', caps.download_mbit)}")

    async def run(self) -> None:
        """For as long as the daemon does."""
        while True:
            self.look()
            await asyncio.sleep(CHECK_PERIOD_S)


def _describe(what: str, mbit: float) -> str:
    return f"{what} at most {mbit:g} Mbit/s" if mbit else f"{what} without a cap"
