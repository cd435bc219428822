"""Keeps one direction of all tensor links together to a cap.

No clock, socket or task in here: time is an argument.

Invariant: over any stretch of time a pacer lets no more pass than its rate allows, BURST_S of it and one record beside.
"""

from shoal.protocol.secure_channel import RECORD_BYTES_MAX

BYTES_PER_MBIT = 125_000
# What a line carries for each byte of a record: TCP and IP take 52 bytes of 1,500 for themselves.
WIRE_SHARE = 1.036
BURST_S = 0.1  # so much may go at once after a rest
# A payload that has begun goes on at least this often, or its receiver would take the link for one that crawls.
TURN_S = 5.0


class Pacer:
    """One direction of all links together."""

    __slots__ = ("_due_s", "_wire_bytes_per_s")

    def __init__(self) -> None:
        self._wire_bytes_per_s: float | None = None
        self._due_s = 0.0  # when everything that was let pass has passed, at this rate

    def set_mbit(self, mbit: float) -> None:
        """From now on; 0 lifts the cap."""
        self._wire_bytes_per_s = mbit * BYTES_PER_MBIT if mbit else None

    @property
    def streams_max(self) -> int | None:
        """So many payloads may be under way at once that each goes on every TURN_S; None without a cap."""
        rate = self._wire_bytes_per_s
        return None if rate is None else max(1, int(rate * TURN_S / RECORD_BYTES_MAX))

    def reserve(self, nbytes: int, now: float) -> float:
        """Take the next place for so many bytes; how many seconds from now they may pass."""
        rate = self._wire_bytes_per_s
        if rate is None:
            return 0.0
        begin_s = max(self._due_s, now - BURST_S)
        self._due_s = begin_s + nbytes * WIRE_SHARE / rate
        return max(0.0, begin_s - now)
