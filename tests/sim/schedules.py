"""Random schedules of round cores: any message may come next, twice or never; anybody may be late, wrong or restarted.

The world simulator draws faults as they happen to machines. This one draws the order of events itself, so that a few
hundred steps reach interleavings that machines reach in years. It stands on the table of the unit tests, where a round
costs milliseconds.
"""

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from blake3 import blake3

from shoal.protocol.effects import Effect, Persist, Phase, Reduce, Send
from shoal.protocol.identity import PeerId
from shoal.protocol.manifest import Rounds
from shoal.protocol.messages import Certificate, Proposal, Result, digest_record
from shoal.protocol.quorum import QuorumRule
from shoal.protocol.rounds import RoundCore
from tests.sim import signatures
from tests.sim.ballots import Ballots
from tests.sim.checkers import broken
from tests.sim.oracle import list_indices
from tests.unit.protocol.round_table import Seat, Table
from tests.unit.protocol.samples import RULES, make_digests

STEPS = 600
CALM_S = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Disorder:
    """One seed's chances, per step. `mute` is a proposer's chance to fall silent just as it proposes."""

    lose: float
    find: float
    deadline: float
    ready: float
    restart: float
    tell: float
    reduce: float
    reorder: float
    drop: float
    double: float
    mute: float


CALM = Disorder(
    lose=0.0,
    find=0.0,
    deadline=0.0,
    ready=0.0,
    restart=0.0,
    tell=0.0,
    reduce=0.0,
    reorder=0.0,
    drop=0.0,
    double=0.0,
    mute=0.0,
)


def draw_disorder(rng: random.Random) -> Disorder:
    """Every seed is wild in other ways."""
    return Disorder(
        lose=rng.choice((0.0, 0.01, 0.03)),
        find=rng.choice((0.01, 0.03)),
        deadline=rng.choice((0.003, 0.01, 0.03)),
        ready=rng.choice((0.02, 0.08)),
        restart=rng.choice((0.0, 0.005, 0.015)),
        tell=rng.choice((0.0, 0.003, 0.01)),
        reduce=rng.choice((0.05, 0.2)),
        reorder=rng.choice((0.01, 0.03, 0.1)),
        drop=rng.choice((0.0, 0.02)),
        double=rng.choice((0.0, 0.02)),
        mute=rng.choice((0.0, 0.3, 0.8)),
    )


class Watched(Table):
    """A table at which every word is judged as it is said."""

    def __init__(self, schedule: "Schedule", count: int, rules: Rounds) -> None:
        self._schedule = schedule
        super().__init__(count, rules=rules)

    def _execute(self, seat: Seat, effect: Effect) -> None:
        self._schedule.watch(seat, effect)
        if isinstance(effect, Reduce):
            self._schedule.reductions.append((seat, seat.core, effect))
        else:
            super()._execute(seat, effect)

    def finish(self, seat: Seat, core: RoundCore, effect: Reduce) -> None:
        """A reduction is done, unless its peer has been restarted since."""
        if seat.up and seat.core is core:
            self._reduce(seat, effect)

    def commit(self, seat: Seat, certificate: Certificate) -> None:
        self._schedule.committed(certificate)
        super().commit(seat, certificate)

    def make_ready(self, *seats: Seat, label: str = "", owns: bool = True) -> None:
        for seat in seats:
            self._schedule.contributed(seat.peer, seat.core.head.round + 1, make_digests(f"{seat.number}{label}"))
        super().make_ready(*seats, label=label, owns=owns)


class Schedule:
    """One table and one random order of everything that may happen at it.

    Every pair of peers has a priority, and what travels between the pair with the highest comes next; now and then
    priorities are drawn anew (Burckhardt et al., "A Randomized Scheduler with Probabilistic Guarantees of Finding
    Bugs", 2010). So some peers are far ahead of others, and old words arrive late, in order.
    """

    def __init__(self, seed: int, rule: QuorumRule = QuorumRule.MAJORITY) -> None:
        signatures.install()
        self.rng = random.Random(seed)
        self.disorder = draw_disorder(self.rng)
        # Where a re-root may be declared, a round may have two results: there, nothing is to be shown here.
        rules = replace(RULES, reroot_after_s=0.0, quorum=rule.value)
        self.ballots = Ballots(rule)
        self.results: dict[int, bytes] = {}
        self._priorities: dict[tuple[int, int], float] = {}
        self.reductions: list[tuple[Seat, RoundCore, Reduce]] = []
        self._muted: set[int] = set()
        self._contributions: dict[tuple[PeerId, int], list[tuple[bytes, ...]]] = {}
        self.table = Watched(self, self.rng.choice((2, 3, 3, 3, 4, 5)), rules)
        self._voters = {1: self.table.head.voters}

    def run(self) -> int:
        """The disorder, then calm, in which a round must be certified; how many rounds were. Raises InvariantBroken."""
        table = self.table
        self._get_ready()
        for _ in range(STEPS):
            self._step()
            self._check_refusals()
        goal = max(len(seat.committed) for seat in table.seats) + 1
        self.disorder = CALM
        table.unheard.clear()
        end = table.now + CALM_S
        while any(len(seat.committed) < goal for seat in table.seats):
            if table.now > end:
                raise broken("rounds commit after faults stop", f"{[seat.core.view() for seat in table.seats]}")
            self._tell_the_log()
            self._get_ready()
            table.meet()
            table.advance(1.0)
            while self.reductions:
                self._finish_a_reduction()
                table.settle()
            self._check_refusals()
        return goal

    # -- invariants -------------------------------------------------------------------------------------------------

    def watch(self, seat: Seat, effect: Effect) -> None:
        """What a peer does, in the moment in which it does it."""
        if isinstance(effect, Persist):
            self.ballots.persisted(seat.peer, effect.vote)
        if isinstance(effect, Send):
            self.ballots.said(seat.peer, effect.message, self._voters)
            if isinstance(effect.message, Proposal) and seat.number not in self._muted:
                self._muted.add(seat.number)
                if self.rng.random() < self.disorder.mute:
                    self._lose(seat)
        if isinstance(effect, Send) and not isinstance(effect.message, Proposal):
            self._muted.discard(seat.number)

    def committed(self, certificate: Certificate) -> None:
        """One result per round."""
        result = certificate.result
        digest = digest_record(result)
        if self.results.setdefault(result.round, digest) != digest:
            raise broken("one result per round", f"round {result.round}")
        self._voters[result.round + 1] = result.voters
        for part in range(len(result.parts)):
            self._check_part(result, part)

    def contributed(self, peer: PeerId, round_number: int, digests: tuple[bytes, ...]) -> None:
        """What a peer has offered; after a restart it offers something else."""
        self._contributions.setdefault((peer, round_number), []).append(digests)

    def _check_part(self, result: Result, part: int) -> None:
        """At this table a reduced part is the hash of what went in, in roster order."""
        peers = [
            result.members[index].peer for index in list_indices(result.parts[part].contributors, len(result.members))
        ]
        offered = [[digests[part] for digests in self._contributions[peer, result.round]] for peer in peers]
        if all(
            blake3(b"".join(choice)).digest() != result.parts[part].digest for choice in itertools.product(*offered)
        ):
            raise broken("result = aggregate of the bitmap's members", f"round {result.round}, part {part}")

    def _check_refusals(self) -> None:
        if self.table.refusals:
            raise broken("no honest peer is accused", f"{self.table.refusals[0][2]}")

    # -- what may happen --------------------------------------------------------------------------------------------

    def _step(self) -> None:
        table, rng, chances = self.table, self.rng, self.disorder
        for seat in table.up():
            table.carry_out(seat)
        events: list[tuple[float, Callable[[], None]]] = [
            (chances.lose, lambda: self._lose(rng.choice(table.seats))),
            (chances.find, lambda: self._find(rng.choice(table.seats))),
            (chances.deadline, self._let_a_deadline_pass),
            (chances.ready, self._get_ready),
            (chances.restart, lambda: self._restart(rng.choice(table.seats))),
            (chances.tell, self._tell_the_log),
            (chances.reduce, self._finish_a_reduction),
            (1.0, self._move_on),
        ]
        kind = rng.random()
        for chance, event in events:
            if kind < chance:
                event()
                return
            kind -= chance

    def _move_on(self) -> None:
        if self.table.travelling:
            self._deliver_next()
        elif self.reductions:
            self._finish_a_reduction()
        else:
            self._let_a_deadline_pass()

    def _finish_a_reduction(self) -> None:
        if self.reductions:
            self.table.finish(*self.reductions.pop(self.rng.randrange(len(self.reductions))))

    def _open_pairs(self) -> list[tuple[int, int]]:
        seat = self.table.seat
        pairs = ((source.number, seat(effect.peer).number) for source, effect in self.table.travelling)
        return list(dict.fromkeys(pairs))

    def _deliver_next(self) -> None:
        """The oldest message of the most urgent pair: usually delivered, sometimes lost or delivered twice."""
        table, rng = self.table, self.rng
        if rng.random() < self.disorder.reorder:
            self._priorities[rng.choice(self._open_pairs())] = rng.random()
        pair = max(self._open_pairs(), key=lambda pair: self._priorities.setdefault(pair, rng.random()))
        queue = table.travelling
        numbers = ((source.number, table.seat(effect.peer).number) for source, effect in queue)
        at = next(at for at, one in enumerate(numbers) if one == pair)
        source, effect = queue[at]
        fate = rng.random()
        if fate >= self.disorder.double:
            del queue[at]
        if fate < 1.0 - self.disorder.drop and table.seat(effect.peer).up:
            table.deliver(source, effect, table.seat(effect.peer))

    def _lose(self, seat: Seat) -> None:
        """The others take this peer for lost, and its words come late. It is alive and hears them."""
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
