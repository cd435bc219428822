"""What passed between this peer and others: counters, and rates of recent large payloads and of the last minute.

No clock in here: time is an argument.
"""

from collections import deque
from dataclasses import dataclass, field

from shoal.node.link_port import LinkPath, PeerLinkStatistics
from shoal.protocol.identity import PeerId

# Smaller payloads fit into socket buffers and would measure memory, not the path.
RATE_PAYLOAD_BYTES_MIN = 256 * 1024
# What one more large payload leaves of the weight of those before it.
_MEMORY = 0.75
# What "of late" means: long enough that the pause between two payloads of a round is not taken for silence.
RECENT_S = 60.0
# The least round trip is that of at most twice this: longer than a long exchange, in which every one of them waits.
LEAST_S = 300.0


@dataclass(slots=True)
class RateMeter:
    """Bytes per second over recent payloads, weighted by their size."""

    _bytes: float = 0.0
    _seconds: float = 0.0

    def add(self, nbytes: int, seconds: float) -> None:
        """One payload of `nbytes` took so long; a small one does not count."""
        if nbytes >= RATE_PAYLOAD_BYTES_MIN and seconds > 0:
            self._bytes = self._bytes * _MEMORY + nbytes
            self._seconds = self._seconds * _MEMORY + seconds

    @property
    def bytes_per_s(self) -> float | None:
        """None before the first large payload."""
        return self._bytes / self._seconds if self._seconds else None


class RecentRate:
    """Bytes per second over about the last RECENT_S, of a total that never falls.

    Invariant: the oldest reading that is kept is the newest one that is RECENT_S old, or the first of all.
    """

    def __init__(self) -> None:
        self._readings: deque[tuple[float, int]] = deque()

    def add(self, now: float, total: int) -> None:
        """What the total is now; the more often it is read, the closer is the stretch to RECENT_S."""
        self._readings.append((now, total))
        while len(self._readings) > 1 and self._readings[1][0] <= now - RECENT_S:
            self._readings.popleft()

    def bytes_per_s(self, now: float, total: int) -> float | None:
        """Up to this moment; None before any time has gone by since the first reading."""
        if not self._readings or now <= self._readings[0][0]:
            return None
        since, before = self._readings[0]
        return (total - before) / (now - since)


class LeastRoundTrip:
    """What a path takes without the queues that we fill ourselves: the least of LEAST_S to twice that."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._now_s = self._before_s = float("inf")

    def add(self, now: float, seconds: float) -> None:
        """One round trip that ended now."""
        if self._since is None or now >= self._since + LEAST_S:
            self._since, self._before_s, self._now_s = now, self._now_s, seconds
        self._now_s = min(self._now_s, seconds)

    @property
    def seconds(self) -> float | None:
        """None before the first."""
        return None if self._since is None else min(self._now_s, self._before_s)


@dataclass(slots=True)
class PeerTraffic:
    """One peer's counters over all its links, past and present."""

    frames_in: int = 0
    frames_out: int = 0
    payload_bytes_in: int = 0
    payload_bytes_out: int = 0
    wire_bytes_in: int = 0
    wire_bytes_out: int = 0
    send_rate: RateMeter = field(default_factory=RateMeter)
    receive_rate: RateMeter = field(default_factory=RateMeter)
    round_trip_s: float | None = None
    least_round_trip: LeastRoundTrip = field(default_factory=LeastRoundTrip)

    def add_round_trip(self, now: float, seconds: float) -> None:
        """A ping was answered now, after so long."""
        self.round_trip_s = seconds
        self.least_round_trip.add(now, seconds)

    def describe(self, peer: PeerId, links: int, path: LinkPath | None) -> PeerLinkStatistics:
        """As of now, of a peer with so many open links, the best of which came about in this way."""
        return PeerLinkStatistics(
            peer=peer,
            links=links,
            path=path,
            frames_in=self.frames_in,
            frames_out=self.frames_out,
            payload_bytes_in=self.payload_bytes_in,
            payload_bytes_out=self.payload_bytes_out,
            wire_bytes_in=self.wire_bytes_in,
            wire_bytes_out=self.wire_bytes_out,
            send_bytes_per_s=self.send_rate.bytes_per_s,
            receive_bytes_per_s=self.receive_rate.bytes_per_s,
            round_trip_s=self.round_trip_s,
        )

    def count_in(self, other: "PeerTraffic") -> None:
        """Add the counters of a peer that is forgotten; rates are nobody's but its own."""
        self.frames_in += other.frames_in
        self.frames_out += other.frames_out
        self.payload_bytes_in += other.payload_bytes_in
        self.payload_bytes_out += other.payload_bytes_out
        self.wire_bytes_in += other.wire_bytes_in
        self.wire_bytes_out += other.wire_bytes_out
