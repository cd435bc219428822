"""How many links to one peer pay, and when one more is dialled. TCP keeps no more than its window under way, so that
one connection cannot fill a long and fast path; several can, and they find their speed sooner.

Invariant: one more link at a time to each peer, and after it was not to be had none for WIDEN_RETRY_S.
"""

from shoal.node.link_traffic import PeerTraffic
from shoal.node.pauses import Pauses
from shoal.protocol.identity import PeerId

# What one connection keeps under way without trouble where a system has its defaults: a share of its 4 to 6 MiB.
WINDOW_BYTES = 2 << 20
LINKS_WANTED_MAX = 8
WIDEN_RETRY_S = 60.0


def count_links_wanted(traffic: PeerTraffic, links: int) -> int:
    """From what payloads, one a link, have measured: the bandwidth-delay product over the window."""
    rate, round_trip_s = traffic.send_rate.bytes_per_s, traffic.least_round_trip.seconds
    if rate is None or round_trip_s is None:
        return 1
    return min(LINKS_WANTED_MAX, 1 + int(links * rate * round_trip_s / WINDOW_BYTES))


class LinkWidth:
    """Time is an argument, in seconds."""

    def __init__(self) -> None:
        self._dialling: set[PeerId] = set()
        self._pauses: Pauses[PeerId] = Pauses(first_s=WIDEN_RETRY_S)

    def begin(self, peer: PeerId, traffic: PeerTraffic, links: int, now: float) -> bool:
        """Whether one more link is to be dialled now; `end` has to follow."""
        pays = links < count_links_wanted(traffic, links)
        if not pays or peer in self._dialling or self._pauses.has(peer, now):
            return False
        self._dialling.add(peer)
        return True

    def end(self, peer: PeerId) -> None:
        """It is there, or is not."""
        self._dialling.discard(peer)

    def refuse(self, peer: PeerId, now: float) -> None:
        """The peer does not answer a further dial, or has links enough."""
        self._pauses.begin(peer, now)
