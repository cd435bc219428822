"""What passed between this peer and another one: counters, and rates of recent large payloads."""

from dataclasses import dataclass, field

# Smaller payloads fit into socket buffers and would measure memory, not the path.
RATE_PAYLOAD_BYTES_MIN = 256 * 1024
# What one more large payload leaves of the weight of those before it.
_MEMORY = 0.75


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
