"""Some round cores around one table: what one says, the others hear at once, unless a test holds it back.

The shell is as small as the contract of protocol.effects allows: no numbers are computed, a reduced part is the hash of
what went in, and a state root the hash of the state before and the result. Time stands still until `advance`.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from blake3 import blake3

from shoal.protocol.effects import (
    Commit,
    Effect,
    FetchBlob,
    Persist,
    Reduce,
    Send,
    SendPart,
    SendResult,
    VoteRecord,
)
from shoal.protocol.errors import ProtocolError
from shoal.protocol.identity import Identity, PeerId
from shoal.protocol.manifest import Rounds
from shoal.protocol.messages import Certificate, Certified, Plan, Result, SignedReady, digest_record
from shoal.protocol.quorum import Head, list_members, proposer_order
from shoal.protocol.round_state import RESEND_AFTER, Offer, Setting
from shoal.protocol.rounds import RoundCore
from tests.unit.protocol.samples import (
    IDENTITIES,
    PEERS,
    RULES,
    SWARM,
    make_authority,
    make_digests,
    make_presence,
    make_ready,
)

STEPS_MAX = 10_000
Travelling = Send | SendPart | SendResult
T = TypeVar("T")


def members_of(result: Result, part: int) -> tuple[int, ...]:
    """The numbers of the peers in a part's bitmap."""
    indices = list_members(result.parts[part].contributors, len(result.members))
    return tuple(PEERS.index(result.members[index].peer) for index in indices)


@dataclass(slots=True)
class Seat:
    """One peer: its core, its disk (`vote`, `committed`), and the bytes that it holds."""

    number: int
    core: RoundCore
    vote: VoteRecord | None = None
    committed: list[Certificate] = field(default_factory=list)
    blobs: set[bytes] = field(default_factory=set)
    effects: list[Effect] = field(default_factory=list)
    ready: SignedReady | None = None
    sequence: int = 0
    up: bool = True

    @property
    def identity(self) -> Identity:
        return IDENTITIES[self.number]

    @property
    def peer(self) -> PeerId:
        return PEERS[self.number]

    def said(self, kind: type[T]) -> list[T]:
        """The messages of this kind that it sent, in order; what goes to several peers counts several times."""
        sent = [effect.message for effect in self.effects if isinstance(effect, Send)]
        return [message for message in sent if isinstance(message, kind)]

    def did(self, kind: type[T]) -> list[T]:
        """The effects of this kind, in order."""
        return [effect for effect in self.effects if isinstance(effect, kind)]


Filter = Callable[[Travelling, Seat, Seat], bool]


def nothing(effect: Travelling, source: Seat, target: Seat) -> bool:
    """Hold back nothing."""
    return False


def withhold(kind: type) -> Filter:
    """Hold back messages of this kind."""
    return lambda effect, source, target: isinstance(getattr(effect, "message", effect), kind)


def cut_off(victim: Seat) -> Filter:
    """Nothing reaches this peer, and nothing comes from it."""
    return lambda effect, source, target: victim in (source, target)


class Table:
    """Everybody knows of everybody. `blocked` decides what does not arrive, `newest_first` in what order the rest does;
    who is `unheard` announces in vain; who `applies_slowly` waits for `commit`, and reductions wait for
    `finish_reductions` unless the table `reduces`; `refusals` is what anybody refused of anybody."""

    def __init__(self, count: int = 4, voters: int | None = None, rules: Rounds = RULES) -> None:
        self.rules = rules
        self.now = 0.0
        self.head = Head(round=0, digest=SWARM, state_root=b"r" * 32, voters=PEERS[: voters or count])
        self.blocked: Filter = nothing
        self.newest_first = False
        self.applies_slowly: set[int] = set()
        self.unheard: set[int] = set()
        self.reduces = True
        self.blobs_are_found = True
        self.refusals: list[tuple[PeerId, PeerId, ProtocolError]] = []
        self.travelling: deque[tuple[Seat, Travelling]] = deque()
        self._too_early: list[tuple[Seat, Travelling]] = []
        self.seats = [Seat(number=number, core=self.make_core(number, self.head, None)) for number in range(count)]
        self.meet()

    def make_core(self, number: int, head: Head, vote: VoteRecord | None) -> RoundCore:
        authority = make_authority(self.rules)
        setting = Setting(identity=IDENTITIES[number], rules=self.rules, authority=authority)
        return RoundCore(setting, head, vote, self.now)

    def seat(self, peer: PeerId) -> Seat:
        return self.seats[PEERS.index(peer)]

    def order(self) -> list[Seat]:
        """The seats of the proposers of round 1: the first leads attempt 0."""
        return [self.seat(peer) for peer in proposer_order(self.head.digest, self.head.voters)]

    def up(self) -> list[Seat]:
        return [seat for seat in self.seats if seat.up]

    # -- what peers do ----------------------------------------------------------------------------------------------

    def announce(self, seat: Seat, **changes: object) -> None:
        """Everybody who is up hears the seat's newest presence."""
        seat.sequence += 1
        head = seat.core.head
        shown = {"ready": seat.ready, "head_round": head.round, "head_digest": head.digest, **changes}
        presence = make_presence(seat.number, seat.sequence, **shown)
        for other in self.up():
            if other is not seat and seat.number not in self.unheard:
                other.core.observe(presence, self.now)

    def meet(self) -> None:
        """Everybody hears of everybody, as one does on joining."""
        for seat in self.up():
            self.announce(seat)

    def make_ready(self, *seats: Seat, label: str = "", owns: bool = True) -> None:
        """These peers freeze their contributions and say so."""
        for seat in seats or tuple(self.up()):
            head = seat.core.head
            label = label or f"/{head.round}"
            seat.ready = make_ready(seat.number, head, label=label, owns=owns)
            digests = make_digests(f"{seat.number}{label}")
            assert seat.core.offer(Offer(signed=seat.ready, digests=digests), self.now)
        for seat in seats or tuple(self.up()):
            self.announce(seat)

    def kill(self, seat: Seat) -> None:
        """The peer ends without a word, and everybody finds out."""
        seat.up = False
        for other in self.up():
            other.core.lose(seat.peer, self.now)

    def restart(self, seat: Seat) -> None:
        """The peer comes back with what is on its disk: the log, the vote record, the bytes behind its vote."""
        seat.up, seat.ready, seat.effects = True, None, []
        seat.core = self.make_core(seat.number, seat.core.head, seat.vote)
        for other in self.up():
            if other is not seat:
                self.announce(other)
        self.announce(seat, incarnation=seat.sequence)

    def begin_exchange(self) -> Plan:
        """Everybody is ready and has the plan; nobody finishes a reduction yet."""
        self.reduces = False
        self.make_ready()
        self.settle()
        self.reduces = True
        return self.plan()

    def finish_reductions(self, *seats: Seat) -> None:
        """These seats finish every reduction that they began."""
        for seat in seats or tuple(self.up()):
            for effect in seat.did(Reduce):
                self._reduce(seat, effect)
        self.settle()

    # -- what a test looks at ---------------------------------------------------------------------------------------

    def plan(self) -> Plan:
        """The first plan of the first proposer of round 1."""
        return self.order()[0].said(Plan)[0]

    def result(self, number: int = 1) -> Result:
        """The one result that everybody who is up has certified in this round; nobody was refused anything."""
        results = {seat.committed[number - 1].result for seat in self.up()}
        assert len(results) == 1
        assert self.refusals == []
        return results.pop()

    def attempts(self, number: int = 1) -> set[int]:
        """The attempts in which they saw it certified."""
        return {seat.committed[number - 1].attempt for seat in self.up()}

    # -- the loop ---------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Carry out effects and deliver messages until nothing moves at this moment."""
        for _ in range(STEPS_MAX):
            for seat in self.up():
                self.carry_out(seat)
            if not self.travelling:
                return
            source, effect = self.travelling.pop() if self.newest_first else self.travelling.popleft()
            target = self.seat(effect.peer)
            if target.up and not self.blocked(effect, source, target):
                self.deliver(source, effect, target)
        raise AssertionError("the table never comes to rest")

    def advance(self, seconds: float) -> None:
        """Let time pass, deadline by deadline."""
        end = self.now + seconds
        for _ in range(STEPS_MAX):
            self.settle()
            due = [time for seat in self.up() if (time := seat.core.next_deadline()) is not None]
            if self._too_early:
                due.append(self.now + 0.5)
            if not due or min(due) > end:
                self.now = end
                return
            self.now = max(self.now, min(due))
            self.travelling.extend(self._too_early)
            self._too_early.clear()
            for seat in self.up():
                deadline = seat.core.next_deadline()
                if deadline is not None and deadline <= self.now:
                    seat.core.handle_deadline(self.now)
        raise AssertionError("deadlines come without end")

    def run(self, round_number: int, seconds: float = 120.0) -> None:
        """Let time pass until everybody who is up has certified this round; fails after `seconds`."""
        end = self.now + seconds
        self.settle()
        while any(seat.core.head.round < round_number for seat in self.up()):
            assert self.now < end, [seat.core.view() for seat in self.up()]
            self.advance(0.5)

    def carry_out(self, seat: Seat) -> None:
        effects = seat.core.take_effects()
        while effects:
            for effect in effects:
                seat.effects.append(effect)
                self._execute(seat, effect)
            effects = seat.core.take_effects()

    def _execute(self, seat: Seat, effect: Effect) -> None:
        match effect:
            case Send() | SendPart() | SendResult():
                self.travelling.append((seat, effect))
            case Persist():
                assert seat.blobs.issuperset(effect.digests), "a vote is for bytes that are held"
                seat.vote = effect.vote
            case Reduce():
                if self.reduces:
                    self._reduce(seat, effect)
            case FetchBlob():
                if self.blobs_are_found and any(
                    self.seat(peer).up and effect.digest in self.seat(peer).blobs for peer in effect.candidates
                ):
                    self.hold(seat, effect.digest)
            case Commit():
                if seat.number not in self.applies_slowly:
                    self.commit(seat, effect.certificate)

    def _reduce(self, seat: Seat, effect: Reduce) -> None:
        # The same inputs give the same bytes, whoever reduces them.
        digest = blake3(b"".join(effect.digests)).digest()
        seat.blobs.add(digest)
        seat.core.part_reduced(effect.round, effect.attempt, effect.part, digest, frozenset(effect.indices))

    def commit(self, seat: Seat, certificate: Certificate) -> None:
        """Apply a certified round."""
        result = certificate.result
        assert all(part.digest in seat.blobs for part in result.parts), "a round is applied when its bytes are held"
        seat.committed.append(certificate)
        seat.ready = None
        digest = digest_record(result)
        root = blake3(seat.core.head.state_root + digest).digest()
        seat.core.applied(Head(round=result.round, digest=digest, state_root=root, voters=result.voters), self.now)

    def hold(self, seat: Seat, digest: bytes) -> None:
        """These bytes have come."""
        seat.blobs.add(digest)
        seat.core.blob_held(digest, self.now)

    def hear(self, seat: Seat, certificate: Certificate) -> None:
        """A peer tells this seat of a certified round."""
        seat.core.receive(Certified(certificate=certificate), seat.peer, self.now)
        self.carry_out(seat)

    def deliver(self, source: Seat, effect: Travelling, target: Seat) -> None:
        match effect:
            case Send():
                try:
                    target.core.receive(effect.message, source.peer, self.now)
                except ProtocolError as error:
                    self.refusals.append((target.peer, source.peer, error))
            case SendPart():
                refusal = target.core.check_part(source.peer, effect.round, effect.part, effect.digest)
                if refusal is None:
                    target.core.part_received(source.peer, effect.round, effect.part, effect.digest, self.now)
                elif refusal in RESEND_AFTER:
                    self._too_early.append((source, effect))
            case SendResult():
                if target.core.check_result_part(source.peer, effect.round, effect.part) is None:
                    self.hold(target, effect.digest)
