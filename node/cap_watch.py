"""Sets the caps of the tensor links as the hours of the day go by, and says so."""

import time
from collections.abc import Callable

from shoal.node.rate_caps import Caps, CapSchedule, format_minute


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
        self.caps = Caps()  # that were applied
        self.until = ""  # at what time of this machine's day others hold; "" where none ever do

    def look(self) -> None:
        """What holds now."""
        now = self._local_time()
        minute = 60 * now.tm_hour + now.tm_min
        caps, change = self._schedule.at(minute), self._schedule.change_after(minute)
        self.until = "" if change is None else format_minute(change)
        if caps == self.caps:
            return
        self.caps = caps
        self._apply(caps)
        self._tell(f"tensors: {_describe('upload', caps.upload_mbit)}, {_describe('download', caps.download_mbit)}")


def _describe(what: str, mbit: float) -> str:
    return f"{what} at most {mbit:g} Mbit/s" if mbit else f"{what} without a cap"
