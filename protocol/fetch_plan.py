"""Which donor is asked for which piece next: content-addressed pieces from several donors at once.

A core without a clock and without sockets: the shell calls `take_asks`, carries each one out and reports how it ended.
The donor with a free place that would have the next piece here soonest takes it, so that every donor is as busy as it
is fast, to the end (list scheduling: Graham, "Bounds on multiprocessing timing anomalies", 1969; work stealing as in
block-based download: Cohen, "Incentives build robustness in BitTorrent", 2003, with its end game). A piece that is late
at its donor is asked of a second one, and so are the last pieces of all, where somebody else is sooner.

Invariants: at most ASKS_PER_PIECE_MAX asks of a piece are open at once, at most WINDOW_MAX at a donor, never two of one
piece at one donor; a donor that gave wrong bytes is asked nothing more; a donor that keeps failing is asked less and
less often and in the end no more; what is delivered is never asked for again.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum, auto

from shoal.protocol.identity import PeerId

WINDOW_MIN = 2  # asks open at one donor: one that is served, one that waits, so that no round trip is lost
WINDOW_MAX = 12
WINDOW_S = 0.5  # so much work is kept open at a donor, at its measured rate
ASKS_PER_PIECE_MAX = 2
RATE_ASSUMED_BYTES_PER_S = 4e6  # of a donor that nothing is known of
LATE_FACTOR = 4.0  # a piece is late when it takes so many times longer than the donor's rate says, and LATE_MIN_S
LATE_MIN_S = 1.0
ASK_TIMEOUT_MIN_S = 10.0  # an ask is given up after this, and LATE_FACTOR times what it should take
ASK_TIMEOUT_MAX_S = 60.0
GAIN_MIN_S = 0.1  # at the end a piece is asked of a second donor where that brings it sooner by so much
BENCH_S = 1.0  # a donor that failed is left alone so long, twice as long after each further failure in a row
FAILURES_MAX = 5  # in a row; then the donor is given up
MISSES_MAX = 16  # pieces in a row that a donor did not have; then the donor is given up
_MEMORY = 0.75  # what one more delivery leaves of the weight of those before it


class AskFailure(Enum):
    """What became of an ask that brought nothing."""

    MISSING = auto()  # the donor does not have it
    WRONG = auto()  # the donor sent something else: it lies, or its disk does
    LOST = auto()  # no link, a time-out, a refusal


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """What is fetched: `nbytes` bytes with this digest, of a round's update or of a snapshot of that round."""

    digest: bytes
    nbytes: int
    round: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """Ask `donor` for `piece`, and give up after `timeout_s`."""

    donor: PeerId
    piece: Piece
    timeout_s: float


@dataclass(slots=True, kw_only=True)
class _Donor:
    rate: float | None
    first_round: int  # it has pieces of this round and of later ones
    delivered: float = 0.0  # bytes of recent deliveries, weighted, and the time that they took
    seconds: float = 0.0
    open: dict[bytes, float] = field(default_factory=dict)  # asks by digest, and when each one was made
    served_s: float = 0.0  # the last delivery
    missing: set[bytes] = field(default_factory=set)
    misses: int = 0
    failures: int = 0
    benched_until_s: float = 0.0
    is_out: bool = False
    has_lied: bool = False

    @property
    def bytes_per_s(self) -> float:
        if self.seconds > 0:
            return max(self.delivered / self.seconds, 1.0)
        return self.rate or RATE_ASSUMED_BYTES_PER_S


@dataclass(frozen=True, slots=True, kw_only=True)
class DonorFigures:
    """What a donor has given so far."""

    delivered_bytes: int
    bytes_per_s: float
    is_out: bool


class FetchPlan:
    """One transfer. Pieces may be added while it runs; each digest is fetched once. Times are monotonic seconds."""

    def __init__(self) -> None:
        self._donors: dict[PeerId, _Donor] = {}
        self._delivered_bytes: dict[PeerId, int] = {}
        self._waiting: dict[bytes, Piece] = {}  # not asked of anybody now, in order
        self._asked: dict[bytes, tuple[Piece, list[PeerId]]] = {}
        self._done: set[bytes] = set()

    # -- what there is -----------------------------------------------------------------------------------------------

    def add(self, pieces: Iterable[Piece]) -> None:
        """Fetch these, too, after those that were added before."""
        for piece in pieces:
            if piece.digest not in self._done and piece.digest not in self._asked:
                self._waiting.setdefault(piece.digest, piece)

    def note_held(self, digest: bytes) -> None:
        """It is here already, from elsewhere; what is under way is reported when it comes."""
        if digest in self._asked:
            return
        self._waiting.pop(digest, None)
        self._done.add(digest)

    def add_donor(self, donor: PeerId, bytes_per_s: float | None, first_round: int = 0) -> None:
        """Ask this peer, too. `bytes_per_s` is what was measured before, if anything."""
        known = self._donors.get(donor)
        if known is None:
            self._donors[donor] = _Donor(rate=bytes_per_s, first_round=first_round)
        else:
            known.first_round = first_round

    def drop_donor(self, donor: PeerId) -> None:
        """It has gone: ask it nothing more. Its open asks are still reported by the shell."""
        if donor in self._donors:
            self._donors[donor].is_out = True

    def readmit(self, donor: PeerId) -> None:
        """A peer that was given up for anything but wrong bytes is here again."""
        known = self._donors.get(donor)
        if known is not None and not known.has_lied:
            known.is_out, known.failures, known.misses, known.benched_until_s = False, 0, 0, 0.0

    @property
    def is_done(self) -> bool:
        """Whether every piece that was added is here."""
        return not self._waiting and self._done.issuperset(self._asked)

    def is_here(self, digest: bytes) -> bool:
        """Whether this piece was delivered, or was here before."""
        return digest in self._done

    @property
    def open_asks(self) -> int:
        return sum(len(donors) for _, donors in self._asked.values())

    @property
    def open_bytes(self) -> int:
        """Of all open asks: what their buffers take."""
        return sum(piece.nbytes * len(donors) for piece, donors in self._asked.values())

    def find_unobtainable(self) -> Piece | None:
        """A piece that no donor has who is still asked; None where there is hope for all."""
        asked = {donor for donor, one in self._donors.items() if not one.is_out}
        for piece in self._waiting.values():
            if not any(self._may_have(self._donors[donor], piece) for donor in asked):
                return piece
        return None

    def figures(self) -> dict[PeerId, DonorFigures]:
        """By donor, for people and for the next transfer."""
        return {
            donor: DonorFigures(
                delivered_bytes=self._delivered_bytes.get(donor, 0), bytes_per_s=one.bytes_per_s, is_out=one.is_out
            )
            for donor, one in self._donors.items()
        }

    # -- what to do --------------------------------------------------------------------------------------------------

    def take_asks(self, now: float, bytes_max: int) -> list[Ask]:
        """What to ask now, so that at most `bytes_max` bytes are open, or one piece. Each must be reported back."""
        asks: list[Ask] = []
        room = bytes_max - self.open_bytes
        free = self._by_rate(now)
        while free:
            nbytes = next((piece.nbytes for piece in self._waiting.values()), 0)
            donor, one = min(free, key=lambda item: self._cost_s(item[1], nbytes))
            piece = self._next_waiting(one) or self._next_late(donor, one, now)
            is_full = len(one.open) >= self._window(one)
            if is_full or piece is None or room <= 0 or (piece.nbytes > room and self._asked):
                free.remove((donor, one))
                continue
            room -= piece.nbytes
            asks.append(self._ask(donor, one, piece, now))
        return asks

    def next_deadline(self, now: float) -> float | None:
        """When `take_asks` may have something to say although nothing was reported; None while nothing is open."""
        times = [one.benched_until_s for one in self._donors.values() if not one.is_out and one.benched_until_s > now]
        for digest, (piece, donors) in self._asked.items():
            if len(donors) < ASKS_PER_PIECE_MAX and digest not in self._done:
                times += [self._late_at_s(self._donors[donor], piece, digest) for donor in donors]
                if not self._waiting:
                    times.append(self._overdue_at_s(piece, donors))
        return min((at for at in times if at > now), default=None)

    def delivered(self, ask: Ask, now: float) -> bool:
        """The piece is here, checked. False when another donor was sooner."""
        one = self._donors[ask.donor]
        seconds = _time_of(one, self._close(ask), now)
        one.failures = one.misses = 0
        one.served_s = now
        _measure(one, ask.piece, seconds)
        if ask.piece.digest in self._done:
            return False
        self._delivered_bytes[ask.donor] = self._delivered_bytes.get(ask.donor, 0) + ask.piece.nbytes
        self._done.add(ask.piece.digest)
        self._waiting.pop(ask.piece.digest, None)
        return True

    def failed(self, ask: Ask, failure: AskFailure, now: float) -> None:
        """The donor did not give the piece: somebody else is asked, unless it is here already."""
        one = self._donors[ask.donor]
        seconds = _time_of(one, self._close(ask), now)
        match failure:
            case AskFailure.WRONG:
                one.is_out = one.has_lied = True
            case AskFailure.MISSING:
                one.missing.add(ask.piece.digest)
                one.misses += 1
                one.is_out = one.is_out or one.misses >= MISSES_MAX
            case AskFailure.LOST:
                # It would have come now at best, so the donor is no faster than that: who was never measured, or has
                # become slow, is not taken for fast again and again.
                if ask.piece.nbytes < one.bytes_per_s * seconds:
                    _measure(one, ask.piece, seconds)
                if now >= one.benched_until_s:  # the asks that one lost link has ended are one failure
                    one.failures += 1
                    one.benched_until_s = now + BENCH_S * 2 ** (one.failures - 1)
                    one.is_out = one.is_out or one.failures >= FAILURES_MAX

    def withdrawn(self, ask: Ask) -> None:
        """The shell has ended this ask because the piece came from elsewhere; nobody is to blame."""
        self._close(ask)

    def is_wanted(self, ask: Ask) -> bool:
        """Whether the piece of an open ask is still missing."""
        return ask.piece.digest not in self._done

    # -- inside ------------------------------------------------------------------------------------------------------

    def _by_rate(self, now: float) -> list[tuple[PeerId, _Donor]]:
        idle = [(peer, one) for peer, one in self._donors.items() if not one.is_out and now >= one.benched_until_s]
        return sorted(idle, key=lambda item: (-item[1].bytes_per_s, item[0]))

    def _window(self, one: _Donor) -> int:
        sizes = [self._piece(digest).nbytes for digest in one.open]
        usual = max(sizes, default=0) or next((piece.nbytes for piece in self._waiting.values()), 1)
        return min(max(int(one.bytes_per_s * WINDOW_S / usual), WINDOW_MIN), WINDOW_MAX)

    def _next_waiting(self, one: _Donor) -> Piece | None:
        return next((piece for piece in self._waiting.values() if self._may_have(one, piece)), None)

    def _next_late(self, donor: PeerId, one: _Donor, now: float) -> Piece | None:
        """A piece that is late elsewhere, or, when nothing else is left to do, one that this donor would bring sooner:
        the one that would take longest otherwise."""
        best: tuple[float, Piece] | None = None
        for digest, (piece, donors) in self._asked.items():
            is_settled = digest in self._done or donor in donors or len(donors) >= ASKS_PER_PIECE_MAX
            if is_settled or not self._may_have(one, piece):
                continue
            other = self._donors[donors[0]]
            ends_s = self._ends_s(other, digest)
            ends_s = max(ends_s, 2 * now - ends_s)  # what is overdue will take as long again
            is_late = now >= self._late_at_s(other, piece, digest)
            gain_s = ends_s - (now + self._cost_s(one, piece.nbytes))
            if is_late or (not self._waiting and gain_s > GAIN_MIN_S):
                worth = ends_s + (ASK_TIMEOUT_MAX_S if is_late else 0.0)
                best = max(best or (worth, piece), (worth, piece), key=lambda item: item[0])
        return None if best is None else best[1]

    def _overdue_at_s(self, piece: Piece, donors: list[PeerId]) -> float:
        """When it is overdue by so much that another donor would certainly be sooner, as `_next_late` reckons."""
        others = [
            one
            for peer, one in self._donors.items()
            if not one.is_out and peer not in donors and self._may_have(one, piece)
        ]
        cost_s = min((self._cost_s(one, piece.nbytes) for one in others), default=math.inf)
        return self._ends_s(self._donors[donors[0]], piece.digest) + cost_s + LATE_MIN_S

    def _ask(self, donor: PeerId, one: _Donor, piece: Piece, now: float) -> Ask:
        self._waiting.pop(piece.digest, None)
        _, donors = self._asked.setdefault(piece.digest, (piece, []))
        donors.append(donor)
        one.open[piece.digest] = now
        should_s = self._cost_s(one)
        timeout_s = min(ASK_TIMEOUT_MIN_S + LATE_FACTOR * should_s, ASK_TIMEOUT_MAX_S)
        return Ask(donor=donor, piece=piece, timeout_s=timeout_s)

    def _close(self, ask: Ask) -> float:
        """The ask has ended; when it was made."""
        digest = ask.piece.digest
        piece, donors = self._asked[digest]
        donors.remove(ask.donor)
        if not donors:
            del self._asked[digest]
            if digest not in self._done:
                self._waiting = {digest: piece, **self._waiting}  # it is the oldest
        return self._donors[ask.donor].open.pop(digest)

    def _may_have(self, one: _Donor, piece: Piece) -> bool:
        return piece.digest not in one.missing and piece.round >= one.first_round

    def _piece(self, digest: bytes) -> Piece:
        return self._asked[digest][0]

    def _open_bytes(self, one: _Donor) -> int:
        return sum(self._piece(digest).nbytes for digest in one.open)

    def _cost_s(self, one: _Donor, nbytes: int = 0) -> float:
        """What so many bytes more would take there, behind all that is open."""
        return (self._open_bytes(one) + nbytes) / one.bytes_per_s

    def _ends_s(self, one: _Donor, digest: bytes) -> float:
        """When a piece should be here, after those that were asked of the same donor before it."""
        before = 0
        for other, _ in one.open.items():
            before += self._piece(other).nbytes
            if other == digest:
                break
        return max(one.open[digest], one.served_s) + before / one.bytes_per_s

    def _late_at_s(self, one: _Donor, piece: Piece, digest: bytes) -> float:
        asked_s = one.open[digest]
        should_s = max(self._ends_s(one, digest) - asked_s, piece.nbytes / one.bytes_per_s)
        return asked_s + LATE_MIN_S + LATE_FACTOR * should_s


def _time_of(one: _Donor, asked_s: float, now: float) -> float:
    """What an ask that ends now has taken: what came before it on the same link is not its own time."""
    return max(now - max(asked_s, one.served_s), 1e-6)


def _measure(one: _Donor, piece: Piece, seconds: float) -> None:
    one.delivered = one.delivered * _MEMORY + piece.nbytes
    one.seconds = one.seconds * _MEMORY + seconds
