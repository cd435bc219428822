"""How fast peers are, learnt from what they did: when they become ready, and how often a part of theirs arrives.

A deadline that fits everybody is too long for a peer that has died and too short for one that is slow. So every peer
gets its own, from a smoothed mean and deviation (Jacobson and Karels, 1988; RFC 6298), inside the limits that the
manifest declares. It is each peer's own view and nothing that peers must agree on.

Invariants: no allowance is above the manifest's limit; memory is bounded by PEERS_MAX.
"""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from shoal.protocol.identity import PeerId

PEERS_MAX = 1024
MEAN_GAIN = 1 / 8
DEVIATION_GAIN = 1 / 4
DEVIATIONS = 4.0
FIRST_DEVIATION = 1 / 8  # of the first sample
MARGIN_S = 0.25  # presences are gossiped: a READY is heard a little after it was said
PATIENCE = 4.0  # a part may take this many times the usual
SLOWER = 2.0  # times the middle one's duration: less is noise
SPEED_MIN = 0.05
LINE_SAMPLES_MIN = 8  # parts after which a sender's line is judged: the first ones may be late for many reasons
RELAXATION = 0.9  # a round
ALLOWANCE_MIN = 0.25  # of the limit; a machine that is busy for a moment is not slow


@dataclass(slots=True)
class _Duration:
    mean_s: float
    deviation_s: float
    samples: int = 1

    def add(self, sample_s: float) -> None:
        if self.samples == 0:
            self.mean_s, self.deviation_s = sample_s, sample_s * FIRST_DEVIATION
        else:
            # The first ones count more: what is known so far is little.
            gain = 1 / (self.samples + 1)
            self.deviation_s += max(DEVIATION_GAIN, gain) * (abs(sample_s - self.mean_s) - self.deviation_s)
            self.mean_s += max(MEAN_GAIN, gain) * (sample_s - self.mean_s)
        self.samples += 1

    def upper_s(self) -> float:
        return self.mean_s + DEVIATIONS * self.deviation_s


def _learn(known: dict[PeerId, _Duration], peer: PeerId, sample_s: float) -> None:
    if peer in known:
        known[peer].add(sample_s)
        return
    if len(known) >= PEERS_MAX:
        del known[next(iter(known))]
    known[peer] = _Duration(mean_s=sample_s, deviation_s=sample_s * FIRST_DEVIATION)


class ReadyPace:
    """From the end of the last round that has a peer's work in it to its next READY: how long that takes.

    It may span several rounds: a peer half as fast as the others is ready in every second one, and only there is it
    waited for."""

    def __init__(self) -> None:
        self._began_s: dict[PeerId, float] = {}
        self._durations: dict[PeerId, _Duration] = {}

    def include(self, peers: tuple[PeerId, ...], now: float) -> None:
        """A round with these members is applied: they work on the next one."""
        for peer in peers:
            self._began_s.pop(peer, None)
            if len(self._began_s) >= PEERS_MAX:
                del self._began_s[next(iter(self._began_s))]
            self._began_s[peer] = now

    def note_ready(self, peer: PeerId, now: float) -> None:
        """The peer's first READY since it was included."""
        began_s = self._began_s.pop(peer, None)
        if began_s is not None:
            _learn(self._durations, peer, now - began_s)

    def note_missing(self, peer: PeerId, began_s: float, now: float) -> None:
        """A peer that has never been measured was waited for in vain: it takes longer than this. `began_s`: since when,
        where no round has its work in it yet."""
        if peer in self._durations or len(self._durations) >= PEERS_MAX or len(self._began_s) >= PEERS_MAX:
            return
        began_s = self._began_s.setdefault(peer, began_s)
        self._durations[peer] = _Duration(mean_s=now - began_s, deviation_s=0.0, samples=0)

    def forget(self, peer: PeerId) -> None:
        """The peer is gone; when it comes back its work starts anew."""
        self._began_s.pop(peer, None)

    def expected_s(self, peer: PeerId) -> tuple[float, float] | None:
        """When the peer will be ready: as a rule, and at the latest; None for one that has not been measured."""
        began_s, known = self._began_s.get(peer), self._durations.get(peer)
        if began_s is None or known is None:
            return None
        return began_s + known.mean_s, began_s + known.upper_s() + MARGIN_S

    def usual_s(self, peers: Iterable[PeerId]) -> float | None:
        """How long the middle one of these peers takes; None where none has been measured."""
        means = [self._durations[peer].mean_s for peer in peers if peer in self._durations]
        return statistics.median(means) if means else None


def find_worthy_end_s(now: float, ready: int, round_s: float, expected: Iterable[float]) -> float:
    """Until when `ready` peers best wait for others, expected at these times; `now` where no wait pays.

    A wait costs what those idle who are ready by then, and brings the others' work into the round: `round_s` of each,
    which is what a round takes. No wait is longer than that. So of two groups that are out of step one waits for the
    other, as soon as it is ready first.
    """
    end_s, best_s = now, 0.0
    cost_s, count, before_s = 0.0, 0, now
    for at in sorted(expected):
        if at >= now + round_s:
            break
        cost_s += (ready + count) * (at - before_s)
        count, before_s = count + 1, at
        if count * round_s - cost_s > best_s:
            end_s, best_s = at, count * round_s - cost_s
    return end_s


class PartPace:
    """How long a peer takes from one part to the next."""

    def __init__(self) -> None:
        self._durations: dict[PeerId, _Duration] = {}
        self._middle_s: float | None = None  # of all means; None when it must be computed again

    def note_part(self, peer: PeerId, duration_s: float) -> None:
        """A part came `duration_s` after the one before, or after the exchange began."""
        _learn(self._durations, peer, duration_s)
        self._middle_s = None

    def allowance_s(self, peer: PeerId, limit_s: float) -> float:
        """For how long the peer may be silent: several times what it, or the middle one of all, usually takes."""
        known = self._durations.get(peer)
        if known is None:
            return limit_s
        usual_s = max(known.upper_s(), self._find_middle_s())
        return min(limit_s, max(ALLOWANCE_MIN * limit_s, PATIENCE * usual_s))

    def speed(self, peer: PeerId, samples_min: int = 1) -> float:
        """1 for a peer that keeps up with the middle one, or of which fewer parts were seen; for a much slower one the
        ratio of their rates."""
        known = self._durations.get(peer)
        if known is None or known.samples < samples_min or known.mean_s <= SLOWER * self._find_middle_s():
            return 1.0
        return max(SPEED_MIN, self._find_middle_s() / known.mean_s)

    def relax(self, peer: PeerId) -> None:
        """A slow peer was given nothing to do: what is known of it grows old, so that it is tried again."""
        if self.speed(peer) < 1.0:
            self._durations[peer].mean_s *= RELAXATION
            self._middle_s = None

    def _find_middle_s(self) -> float:
        if self._middle_s is None:
            self._middle_s = statistics.median_low(one.mean_s for one in self._durations.values())
        return self._middle_s
