"""The own chain: where it goes on, and whether this peer may sign its next entry.

It may do so only once it knows where the chain ends, and the disk does not know that. It may have been put back from
a backup, or be the copy of another disk whose peer runs as well; whoever then goes on from what it finds signs a slot
for the second time, and to others that is equivocation. So after each start nothing is written until other peers have
been asked what they hold:

- CONFIRMATIONS_WANTED peers, or fewer when PATIENCE_S have passed since the first answer, have nothing of this peer's
  chain that it lacks;
- after that, by a delay of up to SPREAD_S that is drawn anew at each start, one more has been asked: of two clones that
  are started together the first one writes before the other one looks for the last time.

A peer that sees nobody writes nothing. There is nobody to ask, and nobody to write for: what it has to say is said when
somebody comes. So a fresh swarm begins to write when two of its peers have met, however they are started.

An own entry, or presence, that comes from elsewhere and is younger than this process was signed by somebody else with
the same key: a clone is running. From then on this process writes nothing more than one mark, by which the other one
learns of it, too. What no reachable peer holds cannot be fetched; such an entry, when it comes to light, still excludes
its author, and the owner of the swarm can re-admit it.

Time is an argument: seconds of any clock that does not jump.
"""

from shoal.crdt.clock import HLC_ZERO, Hlc, wall_ms_of
from shoal.crdt.entries import NO_ENTRY, Batch, ChainPosition
from shoal.crdt.eras import PERMANENT_ERA
from shoal.protocol.errors import Failure
from shoal.protocol.identity import PeerId

CONFIRMATIONS_WANTED = 3
PATIENCE_S = 5.0
SPREAD_S = 8.0
# Of a clone's clock against this one.
SKEW_MS = 2_000
# What stands in front of a lease by which a peer that has met its clone says so.
CLONE_MARK = b"clone:"


class OwnPositions:
    """Where the own chain of each era goes on, as far as this peer knows."""

    def __init__(self) -> None:
        self._positions: dict[int, ChainPosition] = {}

    @property
    def newest_era(self) -> int:
        """The last era in which this peer has written; the permanent one where it has written in none."""
        return max(self._positions, default=PERMANENT_ERA)

    @property
    def newest_time(self) -> Hlc:
        """The time of the last own entry."""
        return max((position.hlc for position in self._positions.values()), default=HLC_ZERO)

    def position(self, era: int) -> ChainPosition:
        """Where the chain of this era goes on."""
        return self._positions.get(era, ChainPosition(era=era, seq=0, prev=NO_ENTRY, hlc=HLC_ZERO))

    def advance(self, batch: Batch) -> None:
        """The chain has these entries; those that it has already change nothing."""
        last = batch.entries[-1]
        if last.seq >= self.position(batch.era).seq:
            self._positions[batch.era] = ChainPosition(era=batch.era, seq=last.seq + 1, prev=batch.tip, hlc=last.hlc)

    def forget_before(self, oldest_era: int) -> None:
        """Nothing is written in the eras before this one any more, other than in the permanent one."""
        self._positions = {
            era: one for era, one in self._positions.items() if era == PERMANENT_ERA or era >= oldest_era
        }


class OwnChain:
    """What is known of the own chain's end. `started_ms` is the wall clock's time of this start, `spread_s` the delay
    that was drawn for it."""

    def __init__(self, *, started_ms: int, spread_s: float) -> None:
        assert 0 <= spread_s <= SPREAD_S, "the delay is drawn from 0 to SPREAD_S"
        self._started_ms = started_ms
        self._spread_s = spread_s
        self._answered: set[PeerId] = set()
        self._first_answer_s = 0.0
        self._opens_at_s: float | None = None
        self._is_open = False
        self._is_cloned = False

    @property
    def held(self) -> Failure | None:
        """Why nothing may be written now; None where nothing stands against it."""
        if self._is_cloned:
            return Failure.CHAIN_CLONED
        return None if self._is_open else Failure.CHAIN_UNCONFIRMED

    def confirm(self, peer: PeerId, now_s: float) -> None:
        """A comparison has just shown that `peer` holds no own entry which this one lacks."""
        if self._opens_at_s is not None and now_s >= self._opens_at_s:
            self._is_open = True
            return
        if not self._answered:
            self._first_answer_s = now_s
        self._answered.add(peer)
        is_enough = len(self._answered) >= CONFIRMATIONS_WANTED or now_s >= self._first_answer_s + PATIENCE_S
        if self._opens_at_s is None and is_enough:
            self._opens_at_s = now_s + self._spread_s

    def meet(self, hlc: Hlc) -> bool:
        """An own entry of this time came from elsewhere; whether that shows that a clone is running."""
        if wall_ms_of(hlc) > self._started_ms + SKEW_MS:
            self._is_cloned = True
        return self._is_cloned

    def meet_presence(self, incarnation: int, sent_at_s: float, own_incarnation: int) -> bool:
        """A presence with this peer's key has come; whether it shows that a clone is running. The count of starts is
        no less than the clock's seconds then, so what was sent later under another one is of no earlier process."""
        if incarnation != own_incarnation and sent_at_s > own_incarnation + 1:
            self._is_cloned = True
        return self._is_cloned
