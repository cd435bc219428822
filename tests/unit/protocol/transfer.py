"""A transfer in virtual time: a fetch plan and made-up donors, each with a line of its own."""

import heapq
from collections import Counter
from dataclasses import dataclass, field

from shoal.protocol.fetch_plan import Ask, AskFailure, FetchPlan, Piece
from shoal.protocol.identity import PeerId

BYTES_MAX = 64 * 2**20
EVENTS_MAX = 100_000


def make_pieces(count: int, nbytes: int = 1 << 20, first_round: int = 0) -> list[Piece]:
    """Pieces of distinct digests, the last one shorter."""
    sizes = [nbytes] * (count - 1) + [max(1, nbytes // 3)]
    return [
        Piece(digest=number.to_bytes(32, "big"), nbytes=size, round=first_round) for number, size in enumerate(sizes)
    ]


@dataclass(slots=True, kw_only=True)
class Donor:
    """From `dies_s` on every ask is lost at once, from `stalls_s` on nothing comes; a liar sends rubbish."""

    rate: float = 10e6
    latency_s: float = 0.02
    dies_s: float = float("inf")
    stalls_s: float = float("inf")
    lies: bool = False
    missing: frozenset[bytes] = frozenset()
    free_s: float = 0.0


@dataclass(slots=True)
class Transfer:
    """What came of it."""

    plan: FetchPlan
    donors: dict[PeerId, Donor]
    now: float = 0.0
    asked: Counter[bytes] = field(default_factory=Counter)
    first: dict[bytes, PeerId] = field(default_factory=dict)
    open_max: int = 0
    open_bytes_max: int = 0
    _events: list[tuple[float, int, Ask, AskFailure | None]] = field(default_factory=list)
    _open: dict[tuple[PeerId, bytes], Ask] = field(default_factory=dict)
    _count: int = 0

    def run(self) -> bool:
        """Whether everything came."""
        for _ in range(EVENTS_MAX):
            self._make_asks()
            if self.plan.is_done:
                return True
            if not self._events and self.plan.find_unobtainable() is not None:
                return False
            self._step()
        raise AssertionError("the transfer does not end")

    def _make_asks(self) -> None:
        for ask in self.plan.take_asks(self.now, BYTES_MAX):
            key = ask.donor, ask.piece.digest
            assert key not in self._open, "asked twice of one donor at once"
            assert ask.piece.digest not in self.first, "asked although it is here"
            self._open[key] = ask
            self.asked[ask.piece.digest] += 1
            at, failure = self._serve(ask)
            self._count += 1
            heapq.heappush(self._events, (at, self._count, ask, failure))
        open_here = Counter(donor for donor, _ in self._open)
        self.open_max = max([self.open_max, *open_here.values()])
        self.open_bytes_max = max(self.open_bytes_max, sum(ask.piece.nbytes for ask in self._open.values()))

    def _serve(self, ask: Ask) -> tuple[float, AskFailure | None]:
        donor = self.donors[ask.donor]
        ends_s = max(donor.free_s, self.now) + ask.piece.nbytes / donor.rate
        given_up_s = self.now + ask.timeout_s
        if ask.piece.digest in donor.missing:
            return self.now + donor.latency_s, AskFailure.MISSING
        if ends_s >= donor.dies_s:
            return max(self.now, donor.dies_s), AskFailure.LOST
        if ends_s >= donor.stalls_s or ends_s + donor.latency_s > given_up_s:
            return given_up_s, AskFailure.LOST
        donor.free_s = ends_s
        return ends_s + donor.latency_s, AskFailure.WRONG if donor.lies else None

    def _step(self) -> None:
        deadline = self.plan.next_deadline(self.now)
        if not self._events or (deadline is not None and deadline < self._events[0][0]):
            assert deadline is not None, "nothing is open, nothing is done, and nothing is due"
            self.now = deadline
            return
        self.now, _, ask, failure = heapq.heappop(self._events)
        del self._open[ask.donor, ask.piece.digest]
        if not self.plan.is_wanted(ask):
            self.plan.withdrawn(ask)
        elif failure is None:
            assert self.plan.delivered(ask, self.now)
            assert ask.piece.digest not in self.first
            self.first[ask.piece.digest] = ask.donor
        else:
            self.plan.failed(ask, failure, self.now)
