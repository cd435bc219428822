"""How fast another peer can send to this one: it offers some bytes on its tensor link, and they are fetched and timed.

Nobody can measure an upload alone: what a socket takes is not what the path carries.

Invariant: at most UPLOAD_BYTES_MAX bytes are fetched for others in PAUSE_S, one measurement at a time; a measurement
ends within TIMEOUT_S; the bytes are checked and thrown away.
"""

import time
from collections.abc import Callable

from shoal.node.link_port import FetchFailed, LinkLost
from shoal.node.links import TensorLinks
from shoal.protocol.errors import ProtocolError, Refusal
from shoal.protocol.identity import PeerId
from shoal.protocol.messages import MeasureUpload, UploadAnswer

TIMEOUT_S = 4.0
PAUSE_S = 5.0


class UploadMeter:
    """The side that fetches. One for a daemon."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._free_at_s = 0.0

    async def measure(self, links: TensorLinks, peer: PeerId, question: MeasureUpload) -> UploadAnswer:
        """Raises ProtocolError(LIMIT) while another one is under way or just over, and EXPIRED where nothing came."""
        began_s = self._clock()
        if began_s < self._free_at_s:
            raise ProtocolError(Refusal.LIMIT, "another upload is measured")
        self._free_at_s = began_s + PAUSE_S
        try:
            # Over the link that the asker has opened; there is no address to dial.
            await links.fetch(peer, (), question.digest, memoryview(bytearray(question.nbytes)), TIMEOUT_S)
        except (LinkLost, FetchFailed) as error:
            raise ProtocolError(Refusal.EXPIRED, f"the upload did not come: {error}") from error
        return UploadAnswer(seconds=self._clock() - began_s)
