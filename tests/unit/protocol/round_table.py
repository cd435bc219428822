"""Some round cores around one table: what one says, the others hear at once, unless a test holds it back.

The shell is as small as the contract of protocol.effects allows: no numbers are computed, a reduced part is the hash of
what went in, and a state root the hash of the state before and the result. Time stands still until `advance`.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import pytest
from blake3 import blake3

from shoal.protocol.effects import (
    Commit,
    Effect,
    FetchBlob,
    Forked,
    Persist,
    Reduce,
    Send,
    SendPart,
    SendResult,
    VoteRecord,
)
from shoal.protocol.errors import ProtocolError, Refusal
from shoal.protocol.identity import Identity, PeerId
from shoal.protocol.manifest import Rounds
from shoal.protocol.messages import ROUND_MESSAGES, Certificate, Certified, Plan, Result, SignedReady, digest_record
from shoal.protocol.quorum import Head, list_members, proposer_order
from shoal.protocol.round_state import RESEND_AFTER, Offer, Setting
from shoal.protocol.rounds import RoundCore
from tests.unit.protocol.samples import (
    CROWD,
    CROWD_PEERS,
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
    return tuple(CROWD_PEERS.index(result.members[index].peer) for index in indices)


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
        return CROWD[self.number]

    @property
    def peer(self) -> PeerId:
        return CROWD_PEERS[self.number]

    def said(self, kind: type[T]) -> list[T]:
        """The messages of this kind that it sent, in order; what goes to several peers counts several times."""
        sent = [effect.message for effect in self.effects if isinstance(effect, Send)]
        return [message for message in sent if isinstance(message, kind)]

    def did(self, kind: type[T]) -> list[T]:
        """The effects of this kind, in order."""
        return [effect for effect in self.effects if isinstance(effect, kind)]


Filter = Callable[[Travelling, Seat, Seat], bool]


def everything(effect: Travelling, source: Seat, target: Seat) -> bool:
    """Hold back every message; presences are heard."""
    return True


def nothing(effect: Travelling, source: Seat, target: Seat) -> bool:
    """Hold back nothing."""
    return False


def withhold(kind: type) -> Filter:
    """Hold back messages of this kind."""
    return lambda effect, source, target: isinstance(getattr(effect, "message", effect), kind)


def only_to(kind: type, *allowed: Seat) -> Filter:
    """Hold back messages of this kind from everybody but these seats."""
    return lambda effect, source, target: withhold(kind)(effect, source, target) and target not in allowed


def cut_off(victim: Seat) -> Filter:
    """Nothing reaches this peer, and nothing comes from it."""
    return lambda effect, source, target: victim in (source, target)


class Table:
    """Everybody knows of everybody. `blocked` decides what does not arrive, `newest_first` in what order the rest does;
    who is `unheard` announces in vain; who is `forgetful` abstains from its start on; who `applies_slowly` waits for
    `commit`, and reductions wait for `finish_reductions` unless the table `reduces`; while it `beats`, everybody speaks
    up every two seconds; `refusals` is what anybody refused of anybody."""

    def __init__(self, count: int = 4, voters: int | None = None, rules: Rounds = RULES) -> None:
        self.rules = rules
        self.now = 0.0
        self.head = Head(round=0, digest=SWARM, state_root=b"r" * 32, voters=CROWD_PEERS[: voters or count])
        self.blocked: Filter = nothing
        self.newest_first = False
        self.applies_slowly: set[int] = set()
        self.forgetful: set[int] = set()
        self.unheard: set[int] = set()
        self.reduces = True
        self.blobs_are_found = True
        self.refusals: list[tuple[PeerId, PeerId, ProtocolError]] = []
        self.travelling: deque[tuple[Seat, Travelling]] = deque()
        self.beats = False
        self._next_beat_s = 0.0
        self._groups: list[set[int]] = []
        self._too_early: list[tuple[Seat, Travelling]] = []
        self.seats = [Seat(number=number, core=self.make_core(number, self.head, None)) for number in range(count)]
        self.meet()

    def make_core(self, number: int, head: Head, vote: VoteRecord | None) -> RoundCore:
        authority = make_authority(self.rules)
        setting = Setting(identity=CROWD[number], rules=self.rules, authority=authority)
        return RoundCore(setting, head, vote, self.now, abstains=number in self.forgetful)

    def seat(self, peer: PeerId) -> Seat:
        return self.seats[CROWD_PEERS.index(peer)]

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
        stands_at = {"head_round": head.round, "head_digest": head.digest, "attempt": seat.core.attempt}
        shown = {"ready": seat.ready, **stands_at, **changes}
        presence = make_presence(seat.number, seat.sequence, **shown)
        for other in self.up():
            if other is not seat and seat.number not in self.unheard and not self.is_apart(seat, other):
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

    def part(self, *groups: tuple[Seat, ...]) -> None:
        """Between these groups nothing gets through any more, and everybody finds out."""
        self._groups = [{seat.number for seat in group} for group in groups]
        for seat in self.up():
            for other in self.up():
                if self.is_apart(seat, other):
                    seat.core.lose(other.peer, self.now)

    def heal(self) -> None:
        """Everybody hears of everybody again."""
        self._groups = []
        self.meet()

    def is_apart(self, one: Seat, other: Seat) -> bool:
        return any((one.number in group) != (other.number in group) for group in self._groups)

    def begin_exchange(self) -> Plan:
        """Everybody is ready and has the plan; nobody finishes a reduction yet."""
        self.reduces = False
        self.make_ready()
        self.settle()
        self.reduces = True
        return self.plan()

    def finish_reductions(self, *seats: Seat, count: int = 1_000_000) -> None:
        """These seats finish the reductions that they began, or the first few of the open round."""
        for seat in seats or tuple(self.up()):
            for effect in [one for one in seat.did(Reduce) if one.round == seat.core.round][:count]:
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
            if target.up and not self.is_apart(source, target) and not self.blocked(effect, source, target):
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
            if self.beats:
                due.append(max(self._next_beat_s, self.now))
            if not due or min(due) > end:
                self.now = end
                return
            self.now = max(self.now, min(due))
            self.travelling.extend(self._too_early)
            self._too_early.clear()
            if self.beats and self.now >= self._next_beat_s:
                self._next_beat_s = self.now + self.rules.presence_period_s
                self.meet()
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
        indices = frozenset(effect.indices)
        seat.core.part_reduced(effect.round, effect.attempt, effect.part, digest, indices, self.now)

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


# -- one message at a time -----------------------------------------------------------------------------------------


def look(seat: Seat) -> tuple[object, ...]:
    """Everything about a seat that a message could change and that others could see."""
    return seat.core.view(), seat.core.head, seat.vote, seat.core.next_deadline()


def refusal_of(seat: Seat, message: ROUND_MESSAGES, sender: PeerId) -> Refusal:
    """Why the seat refuses a message that it must not change anything for."""
    seat.core.take_effects()
    before = look(seat)
    with pytest.raises(ProtocolError) as caught:
        seat.core.receive(message, sender, 0.0)
    assert look(seat) == before, "what is refused changes nothing"
    assert seat.core.take_effects() == []
    assert caught.value.detail
    return caught.value.refusal


def effects_of(seat: Seat, message: ROUND_MESSAGES, sender: PeerId) -> list[Effect]:
    """What the seat does because of a message that leaves its own state as it is."""
    seat.core.take_effects()
    before = look(seat)
    seat.core.receive(message, sender, 0.0)
    assert look(seat) == before
    return seat.core.take_effects()


def turned_down(seat: Seat, message: ROUND_MESSAGES, sender: PeerId) -> Refusal | None:
    """Why the seat takes no notice of a message, whether or not it blames the sender."""
    seat.core.take_effects()
    before = look(seat)
    try:
        refusal = seat.core.receive(message, sender, 0.0)
    except ProtocolError as error:
        refusal = error.refusal
    assert look(seat) == before
    assert all(isinstance(effect, Forked) for effect in seat.core.take_effects())
    return refusal


def drop_of(seat: Seat, message: ROUND_MESSAGES, sender: PeerId) -> Refusal | None:
    """Why the seat drops a message that changes nothing for it, and for which nobody is to blame."""
    seat.core.take_effects()
    before = look(seat)
    dropped = seat.core.receive(message, sender, 0.0)
    assert look(seat) == before
    assert all(isinstance(effect, Forked) for effect in seat.core.take_effects())
    return dropped
