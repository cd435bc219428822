"""How fast tensor bytes may leave this machine and come to it: what the person there allows, by the time of day.

Invariant: a schedule that exists is one that links can live with: each cap is 0, which is none, or MBIT_MIN and more.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

# Below this a payload could not go on as often as its receiver wants (node/pacer.py).
MBIT_MIN = 1.0
DAY_MINUTES = 24 * 60

_HOURS = re.compile(r"(\d\d):(\d\d)-(\d\d):(\d\d) upload (\d{1,6}(?:\.\d{1,6})?) download (\d{1,6}(?:\.\d{1,6})?)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Caps:
    """Mbit/s on the line, 0 where there is no cap."""

    upload_mbit: float = 0.0
    download_mbit: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class CapHours:
    """From one minute of the day up to another one, over midnight where that is the smaller one."""

    first: int
    end: int
    caps: Caps

    def has(self, minute: int) -> bool:
        """Whether this minute of the day is in them."""
        if self.first <= self.end:
            return self.first <= minute < self.end
        return minute >= self.first or minute < self.end


@dataclass(frozen=True, slots=True, kw_only=True)
class CapSchedule:
    """The caps of certain hours, the first that hold, and those of all others."""

    otherwise: Caps
    hours: tuple[CapHours, ...] = ()

    @property
    def is_empty(self) -> bool:
        """Whether nothing is ever capped."""
        return all(caps == Caps() for caps in (self.otherwise, *(one.caps for one in self.hours)))

    def at(self, minute: int) -> Caps:
        """What holds in this minute of the day."""
        return next((one.caps for one in self.hours if one.has(minute)), self.otherwise)

    def change_after(self, minute: int) -> int | None:
        """The minute of the day, this one or the next, at which others hold; None where none ever do."""
        edges = {edge % DAY_MINUTES for one in self.hours for edge in (one.first, one.end)}
        coming = sorted(edges, key=lambda edge: (edge - minute - 1) % DAY_MINUTES)
        return next((edge for edge in coming if self.at(edge) != self.at(minute)), None)


def format_minute(minute: int) -> str:
    """A minute of the day, as `hours` are written."""
    return f"{minute // 60:02}:{minute % 60:02}"


def parse_hours(text: str) -> CapHours:
    """Read "08:00-18:00 upload 5 download 20", in Mbit/s; raises ValueError with what is wrong."""
    found = _HOURS.fullmatch(" ".join(text.split()))
    if found is None:
        raise ValueError(f"{text!r} is not in the form of an example: 08:00-18:00 upload 5 download 20")
    first_hour, first_minute, end_hour, end_minute = (int(part) for part in found.groups()[:4])
    if max(first_hour, end_hour) > 24 or max(first_minute, end_minute) > 59:
        raise ValueError(f"{text!r} has a time that no day has")
    first, end = 60 * first_hour + first_minute, 60 * end_hour + end_minute
    if first > DAY_MINUTES or end > DAY_MINUTES or first == end:
        raise ValueError(f"{text!r} begins and ends at the same time, or after 24:00")
    upload_mbit, download_mbit = (float(part) for part in found.groups()[4:])
    for mbit in (upload_mbit, download_mbit):
        check_mbit(mbit)
    return CapHours(first=first, end=end, caps=Caps(upload_mbit=upload_mbit, download_mbit=download_mbit))


def check_mbit(mbit: float) -> None:
    """Raise ValueError where links could not live with such a cap."""
    if 0 < mbit < MBIT_MIN:
        raise ValueError(f"{mbit:g} Mbit/s is less than links can live with: 0 for no cap, or {MBIT_MIN:g} and more")


def make_schedule(upload_mbit: float, download_mbit: float, hours: Iterable[str]) -> CapSchedule:
    """The schedule that a configuration describes; raises ValueError."""
    for mbit in (upload_mbit, download_mbit):
        check_mbit(mbit)
    otherwise = Caps(upload_mbit=upload_mbit, download_mbit=download_mbit)
    return CapSchedule(otherwise=otherwise, hours=tuple(map(parse_hours, hours)))
