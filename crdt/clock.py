"""Hybrid logical clock: one integer that follows wall time and never runs against causality.

The upper 48 bits are wall time in milliseconds since the Unix epoch, the lower 15 bits count events within one
millisecond, so that the value fits 63 bits and integers order as (wall time, counter) do (Kulkarni et al., "Logical
Physical Clocks", 2014). Wall time is an argument; nothing here reads a clock.

Invariant: `tick` and `merge` return a value greater than everything that was passed in as already seen.
"""

from typing import NewType

Hlc = NewType("Hlc", int)

COUNTER_BITS = 15
WALL_MS_MAX = 2**48 - 1
HLC_MAX = Hlc(2**63 - 1)
HLC_ZERO = Hlc(0)
_EVENTS_PER_MS: int = 2**COUNTER_BITS


def hlc_at(wall_ms: int, counter: int = 0) -> Hlc:
    """The clock value of this millisecond and counter."""
    assert 0 <= wall_ms <= WALL_MS_MAX, "wall time is milliseconds since 1970"
    assert 0 <= counter < _EVENTS_PER_MS, "the counter has 15 bits"
    return Hlc(wall_ms * _EVENTS_PER_MS + counter)


def wall_ms_of(hlc: Hlc) -> int:
    """The millisecond that `hlc` claims."""
    return hlc // _EVENTS_PER_MS


def counter_of(hlc: Hlc) -> int:
    """Which event of its millisecond `hlc` is."""
    return hlc % _EVENTS_PER_MS


def tick(last: Hlc, wall_ms: int) -> Hlc:
    """The time of a local event after `last`; a full counter carries into the next millisecond."""
    return merge(last, HLC_ZERO, wall_ms)


def merge(last: Hlc, seen: Hlc, wall_ms: int) -> Hlc:
    """The time of a local event after `last` that has also seen `seen`.

    The caller merges only what `is_due`: one entry from the far future would otherwise drag every clock along.
    """
    now = max(last + 1, seen + 1, hlc_at(wall_ms))
    assert now <= HLC_MAX, "the clock has run out"
    return Hlc(now)


def is_due(hlc: Hlc, wall_ms: int) -> bool:
    """Whether the millisecond that `hlc` claims has begun at `wall_ms`."""
    return wall_ms_of(hlc) <= wall_ms
