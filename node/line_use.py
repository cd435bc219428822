"""What tensors may take of this machine's line, and what they do take: for the status and the metrics.

Owns the watch that sets the caps, and the rates of the last minute.
"""

import asyncio
import time
from collections.abc import Callable

from shoal.node.cap_watch import CapWatch
from shoal.node.config import NodeConfig
from shoal.node.link_traffic import RecentRate
from shoal.node.links import TensorLinks
from shoal.node.pacer import BYTES_PER_MBIT
from shoal.node.status import LineStatus

CHECK_PERIOD_S = 10.0


class LineUse:
    """All calls on the event loop. `tell` is told what holds whenever it changes, `reached` whether others can dial the
    tensor port."""

    def __init__(
        self,
        config: NodeConfig,
        links: TensorLinks,
        reached: Callable[[], bool],
        tell: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
        local_time: Callable[[], time.struct_time] = time.localtime,
    ) -> None:
        self._caps_end_relaying = config.tensor.relay and not config.tensor_paths.relay
        self._links = links
        self._reached = reached
        self._clock = clock
        self._watch = CapWatch(config.limits.schedule, links.set_caps, tell, local_time)
        self._sent, self._received = RecentRate(), RecentRate()

    def look(self) -> None:
        """Set the caps that hold now, and read the counters."""
        self._watch.look()
        now, totals = self._clock(), self._links.totals()
        self._sent.add(now, totals.payload_bytes_out)
        self._received.add(now, totals.payload_bytes_in)

    async def run(self) -> None:
        """For as long as the daemon does."""
        while True:
            self.look()
            await asyncio.sleep(CHECK_PERIOD_S)

    def status(self) -> LineStatus:
        """For people."""
        now, totals, caps = self._clock(), self._links.totals(), self._watch.caps
        return LineStatus(
            upload_cap_mbit=caps.upload_mbit or None,
            download_cap_mbit=caps.download_mbit or None,
            caps_until=self._watch.until or None,
            sent_mbit=_to_mbit(self._sent.bytes_per_s(now, totals.payload_bytes_out)),
            received_mbit=_to_mbit(self._received.bytes_per_s(now, totals.payload_bytes_in)),
            relay_withheld=self._caps_end_relaying and self._reached(),
        )


def _to_mbit(bytes_per_s: float | None) -> float | None:
    return None if bytes_per_s is None else bytes_per_s / BYTES_PER_MBIT
