"""Where one tensor link's bytes land before they are opened, and the deadlines by which a link is judged. No IO here.

Invariant of the inbox: a record is read whole into one place and opened straight from there; apart from the first few
KiB of a burst, no byte is moved twice. Memory grows past `SMALL_INBOX_BYTES` only for a record whose announced length
has been found to be the one that has to come.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

from shoal.node.link_port import LinkConfig, LinkEnd
from shoal.protocol.errors import ProtocolError, Refusal
from shoal.protocol.secure_channel import (
    PREFIX_BYTES,
    RECORD_BYTES_MAX,
    RECORD_OVERHEAD_BYTES,
    decode_prefix_untrusted,
)

SMALL_INBOX_BYTES = 4096
# One whole record and the prefix of the next, so that its length is known by the time that it is read.
LARGE_INBOX_BYTES = RECORD_BYTES_MAX + RECORD_OVERHEAD_BYTES + PREFIX_BYTES
# Where bytes go that nobody wants: read, and overwritten by the next. Shared by all links of the process.
SCRATCH = memoryview(bytearray(RECORD_BYTES_MAX))


class RecordKind(IntEnum):
    """What a record holds."""

    HEADER = 1
    PAYLOAD = 2


class RecordInbox:
    """One link's receive buffer. Read into `free()`, say `add(n)`, take records until None, then `compact()`."""

    __slots__ = ("_buffer", "_end", "_limit", "_start")

    def __init__(self, leftover: bytes) -> None:
        assert len(leftover) <= SMALL_INBOX_BYTES, "what follows a handshake fits into the small inbox"
        self._buffer = memoryview(bytearray(SMALL_INBOX_BYTES))
        self._buffer[: len(leftover)] = leftover
        self._start = 0
        self._end = len(leftover)
        self._limit = SMALL_INBOX_BYTES

    @property
    def has_partial(self) -> bool:
        """Whether a record has begun to arrive."""
        return self._end > self._start

    def free(self) -> memoryview:
        """Where the next bytes go; never empty after `compact`."""
        return self._buffer[self._end : self._limit]

    def add(self, nbytes: int) -> None:
        """`nbytes` bytes have been written to the front of `free()`."""
        self._end += nbytes

    def next_record(self, expect_bytes: Callable[[int], int]) -> tuple[int, memoryview] | None:
        """The next whole record and its kind; it stays valid until the next `compact`.

        `expect_bytes(kind)` names the one plain length that a record of this kind may have now. Raises
        ProtocolError as soon as a prefix announces anything else.
        """
        if self._end - self._start < PREFIX_BYTES:
            return None
        end = self._start + self._announced_bytes(expect_bytes)
        if self._end < end:
            return None
        record = self._buffer[self._start : end]
        kind = record[PREFIX_BYTES - 1]
        self._start = end
        return kind, record

    def compact(self) -> None:
        """Move what is left to the front and make room for the rest of its record."""
        left = self._end - self._start
        wanted = SMALL_INBOX_BYTES
        if left >= PREFIX_BYTES:
            nbytes = int.from_bytes(self._buffer[self._start : self._start + PREFIX_BYTES - 1], "little")
            wanted = max(wanted, min(nbytes, RECORD_BYTES_MAX) + RECORD_OVERHEAD_BYTES + PREFIX_BYTES)
        tail = self._buffer[self._start : self._end]
        if wanted > len(self._buffer):
            self._buffer = memoryview(bytearray(LARGE_INBOX_BYTES))
        self._buffer[:left] = tail
        self._start, self._end, self._limit = 0, left, max(wanted, left)

    def shrink(self) -> None:
        """Give the large buffer back; call it when the link has gone quiet."""
        if len(self._buffer) > SMALL_INBOX_BYTES and self._end == self._start:
            self._buffer = memoryview(bytearray(SMALL_INBOX_BYTES))
            self._start, self._end, self._limit = 0, 0, SMALL_INBOX_BYTES

    def _announced_bytes(self, expect_bytes: Callable[[int], int]) -> int:
        kind, nbytes = decode_prefix_untrusted(self._buffer[self._start : self._start + PREFIX_BYTES])
        expected = expect_bytes(kind)
        if nbytes != expected:
            raise ProtocolError(Refusal.WRONG_LENGTH, f"a record of {nbytes} bytes where {expected} have to come")
        return nbytes + RECORD_OVERHEAD_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkSigns:
    """What a link looks like at one tick."""

    wire_bytes_in: int
    wire_bytes_taken: int  # of ours, by the kernel
    frames: int  # in both directions, without pings
    reading_held: bool  # by ourselves
    writing_paused: bool
    unfinished: bool  # a record or a payload has begun to arrive
    busy: bool  # something is queued, awaited or being handled


class LinkDeadlines:
    """Judges one link by what changed since the last tick, so that the hot path never asks for the time.

    It keeps a clock of its own, on which a late tick counts as two: while the loop was away nobody was heard, and
    that is not the peer's silence.
    """

    __slots__ = (
        "_active_at_s",
        "_clock_s",
        "_config",
        "_doubted_at_s",
        "_heard_at_s",
        "_last",
        "_pinged_at_s",
        "_taken_at_s",
        "_ticked_at_s",
        "_window",
    )

    def __init__(self, config: LinkConfig, now_s: float) -> None:
        self._config = config
        self._last: LinkSigns | None = None
        self._ticked_at_s = self._pinged_at_s = now_s
        self._clock_s = self._heard_at_s = self._taken_at_s = self._active_at_s = 0.0
        self._doubted_at_s: float | None = None
        self._window: tuple[float, int] | None = None

    def doubt(self) -> None:
        """The peer may be gone: a ping is due, and if nothing comes within doubt_timeout_s it is taken for silent."""
        if self._doubted_at_s is None:
            self._doubted_at_s = self._clock_s
            self._pinged_at_s = -math.inf

    def judge(self, now_s: float, signs: LinkSigns) -> LinkEnd | None:
        """Why the link should end now; None if it should go on. Called at every tick."""
        last, self._last = self._last, signs
        before_s = self._clock_s
        self._clock_s += min(now_s - self._ticked_at_s, 2 * self._config.tick_s)
        self._ticked_at_s = now_s
        if last is None or signs.wire_bytes_in != last.wire_bytes_in or signs.reading_held:
            self._heard_at_s = self._clock_s
            if self._doubted_at_s is not None and before_s > self._doubted_at_s:
                self._doubted_at_s = None  # what has come since the last tick may be older than the doubt
        if last is None or signs.wire_bytes_taken != last.wire_bytes_taken or not signs.writing_paused:
            self._taken_at_s = self._clock_s
        if last is None or signs.frames != last.frames or signs.busy or signs.unfinished:
            self._active_at_s = self._clock_s
        if self._clock_s - self._heard_at_s >= self._config.silence_timeout_s:
            return LinkEnd.SILENT
        if self._doubted_at_s is not None and self._clock_s - self._doubted_at_s >= self._config.doubt_timeout_s:
            return LinkEnd.SILENT
        if self._clock_s - self._taken_at_s >= self._config.stall_timeout_s:
            return LinkEnd.STALLED
        if self._crawls(signs):
            return LinkEnd.SLOW
        if self._clock_s - self._active_at_s >= self._config.idle_timeout_s:
            return LinkEnd.IDLE
        return None

    def is_ping_due(self, now_s: float) -> bool:
        """True once per period; the caller then sends a ping."""
        if now_s - self._pinged_at_s < self._config.ping_period_s:
            return False
        self._pinged_at_s = now_s
        return True

    def _crawls(self, signs: LinkSigns) -> bool:
        if not signs.unfinished or signs.reading_held:
            self._window = None
            return False
        began_s, wire_bytes = self._window or (self._clock_s, signs.wire_bytes_in)
        elapsed_s = self._clock_s - began_s
        crawls = False
        if elapsed_s >= self._config.rate_window_s:
            crawls = signs.wire_bytes_in - wire_bytes < elapsed_s * self._config.rate_bytes_per_s_min
            began_s, wire_bytes = self._clock_s, signs.wire_bytes_in
        self._window = (began_s, wire_bytes)
        return crawls
