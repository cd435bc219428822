"""Random schedules of round cores: any message may come next, twice or never; anybody may be late, wrong or restarted.

The world simulator draws faults as they happen to machines. This one draws the order of events itself, so that a few
hundred steps reach interleavings that machines reach in years. It stands on the table of the unit tests, where a round
costs milliseconds.
"""

import random

from shoal.protocol.effects import Phase, Send
from shoal.protocol.messages import Proposal, Vote, digest_record
from tests.sim.checkers import broken
from tests.unit.protocol.round_table import Seat, Table

STEPS = 600
CALM_S = 300.0


class Schedule:
    """One table and one random order of everything that may happen at it.

    Every pair of peers has a priority, and what travels between the pair with the highest comes next; now and then
    priorities are drawn anew (Burckhardt et al., "A Randomized Scheduler with Probabilistic Guarantees of Finding
    Bugs", 2010). So some peers are far ahead of others, and old words arrive late, in order.
    """

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.table = Table(self.rng.choice((2, 3, 3, 3, 4, 5)))
        self._priorities: dict[tuple[int, int], float] = {}
        self._votes: dict[tuple[int, int, int], bytes] = {}
        self._led: dict[tuple[int, int], bytes] = {}
        self._seen: dict[int, int] = {}

    def run(self) -> int:
        """The disorder, then calm, in which a round must be certified; how many rounds were. Raises InvariantBroken."""
        table = self.table
        self._get_ready()
        for _ in range(STEPS):
            self._step()
            self.check()
        goal = max(len(seat.committed) for seat in table.seats) + 1
        table.unheard.clear()
        end = table.now + CALM_S
        while any(len(seat.committed) < goal for seat in table.seats):
            if table.now > end:
                raise broken("rounds commit after faults stop", f"{[seat.core.view() for seat in table.seats]}")
            self._tell_the_log()
            self._get_ready()
            table.meet()
            table.advance(1.0)
            self.check()
        return goal

    def _step(self) -> None:
        table, rng = self.table, self.rng
        for seat in table.up():
            table.carry_out(seat)
        kind = rng.random()
        if kind < 0.03:
            self._lose(rng.choice(table.seats))
        elif kind < 0.05:
            self._find(rng.choice(table.seats))
        elif kind < 0.06:
            self._let_a_deadline_pass()
        elif kind < 0.10:
            self._get_ready()
        elif kind < 0.11:
            self._restart(rng.choice(table.seats))
        elif kind < 0.113:
            self._tell_the_log()
        elif table.travelling:
            if kind < 0.20:
                self._priorities[rng.choice(self._open_pairs())] = rng.random()
            self._deliver_next()
        else:
            self._let_a_deadline_pass()

    def _open_pairs(self) -> list[tuple[int, int]]:
        seat = self.table.seat
        pairs = ((source.number, seat(effect.peer).number) for source, effect in self.table.travelling)
        return list(dict.fromkeys(pairs))

    def _deliver_next(self) -> None:
        """The oldest message of the most urgent pair: usually delivered, sometimes lost or delivered twice."""
        table, rng = self.table, self.rng
        pair = max(self._open_pairs(), key=lambda pair: self._priorities.setdefault(pair, rng.random()))
        queue = table.travelling
        numbers = ((source.number, table.seat(effect.peer).number) for source, effect in queue)
        at = next(at for at, one in enumerate(numbers) if one == pair)
        source, effect = queue[at]
        fate = rng.random()
        if fate > 0.02:
            del queue[at]
        if fate < 0.98 and table.seat(effect.peer).up:
            table.deliver(source, effect, table.seat(effect.peer))

    def _lose(self, seat: Seat) -> None:
        """Everybody takes this peer for lost, and its words come late. It is alive and hears the others."""
        self.table.unheard.add(seat.number)
        for other in self.table.seats:
            self._priorities[seat.number, other.number] = -self.rng.random()
            if other is not seat and other.up:
                other.core.lose(seat.peer, self.table.now)

    def _find(self, seat: Seat) -> None:
        """The peer is heard again; what it said before may still be under way."""
        self.table.unheard.discard(seat.number)
        if seat.up:
            self.table.announce(seat)

    def _restart(self, seat: Seat) -> None:
        if seat.up:
            self.table.kill(seat)
        self.table.restart(seat)

    def _let_a_deadline_pass(self) -> None:
        due = [(time, seat) for seat in self.table.up() if (time := seat.core.next_deadline()) is not None]
        if due:
            time, seat = self.rng.choice(due)
            self.table.now = max(self.table.now, time)
            seat.core.handle_deadline(self.table.now)

    def _get_ready(self) -> None:
        for seat in self.table.up():
            if seat.ready is None and seat.core.phase is not Phase.APPLY:
                self.table.make_ready(seat, label=f"/{len(seat.committed)}/{seat.sequence}")

    def _tell_the_log(self) -> None:
        """Who is behind catches up with a peer that is ahead."""
        table = self.table
        newest = max(table.seats, key=lambda seat: len(seat.committed))
        for seat in table.up():
            for certificate in newest.committed[len(seat.committed) :]:
                for part in certificate.result.parts:
                    table.hold(seat, part.digest)
                table.hear(seat, certificate)

    # -- invariants -------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """What must hold after every step."""
        if self.table.refusals:
            raise broken("no honest peer is accused", f"{self.table.refusals[0][2]}")
        results: dict[int, bytes] = {}
        for seat in self.table.seats:
            for certificate in seat.committed:
                result = certificate.result
                if results.setdefault(result.round, digest_record(result)) != digest_record(result):
                    raise broken("one result per round", f"round {result.round}")
            self._check_words(seat)

    def _check_words(self, seat: Seat) -> None:
        first = self._seen.get(seat.number, 0)
        if first > len(seat.effects):
            first = 0  # it was restarted since
        self._seen[seat.number] = len(seat.effects)
        for effect in seat.effects[first:]:
            message = effect.message if isinstance(effect, Send) else None
            if isinstance(message, Vote):
                key = seat.number, message.round, message.attempt
                if self._votes.setdefault(key, message.result_digest) != message.result_digest:
                    raise broken("one vote per attempt", f"peer {seat.number} in {message.round}/{message.attempt}")
            if isinstance(message, Proposal):
                digest = digest_record(message.result)
                where = message.result.round, message.attempt
                if self._led.setdefault(where, digest) != digest:
                    raise broken("one proposal per attempt", f"round {where[0]}, attempt {where[1]}")
