"""Planted bugs: ballots, votes and certificates."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from shoal.protocol import proposer, quorum
from shoal.protocol.effects import Effect, Persist, Phase, VoteRecord
from shoal.protocol.errors import ProtocolError, Refusal
from shoal.protocol.identity import PeerId
from shoal.protocol.messages import VOTERS_MAX, Certificate, Nack, Plan, Prepare, Promise, Proposal, Result, Vote
from shoal.protocol.quorum import Authority
from shoal.protocol.round_state import RoundState
from shoal.protocol.rounds import RoundCore
from tests.sim.peer import SimPeer
from tests.sim.planted import Arena, Patches, bug


@bug(seed=1, by="persist before send")
def vote_before_persist(patches: Patches) -> None:
    """A vote leaves before its record is on the disk."""

    def vote_first(old: Any, self: RoundCore, *args: Any) -> None:
        first = len(self._effects)
        old(self, *args)
        self._effects[first:] = sorted(self._effects[first:], key=lambda effect: isinstance(effect, Persist))

    patches.wrap(RoundCore, "_vote_if_held", vote_first)


@bug(seed=1, by="persist before send")
def persist_does_nothing(patches: Patches) -> None:
    """The disk says that the vote record is written, and nothing is."""
    patches.wrap(SimPeer, "_persist", lambda old, self, effect: self._resume())


@bug(seed=2, by="voters hold the bytes")
def vote_without_bytes(patches: Patches) -> None:
    """A voter votes for parts that it does not hold."""

    def vote_anyway(old: Any, self: RoundCore, *args: Any) -> None:
        first = len(self._effects)
        missing = self._missing
        self._missing = lambda result: set()  # type: ignore[method-assign]
        try:
            old(self, *args)
        finally:
            self._missing = missing  # type: ignore[method-assign]
        for at, effect in enumerate(self._effects[first:], first):
            if isinstance(effect, Persist):
                held = tuple(digest for digest in effect.digests if digest in self._held)
                self._effects[at] = replace(effect, digests=held)

    patches.wrap(RoundCore, "_vote_if_held", vote_anyway)


@bug(seed=1, by="voters hold the bytes")
def vote_persisted_without_bytes(patches: Patches) -> None:
    """The vote record is made durable, the bytes that it stands for are not."""

    def execute(old: Any, self: SimPeer, effect: Effect) -> None:
        old(self, replace(effect, digests=()) if isinstance(effect, Persist) else effect)

    patches.wrap(SimPeer, "_execute", execute)


@bug(arena=Arena.SCHEDULE, seed=2, by="a promise is never taken back")
def vote_below_promise(patches: Patches) -> None:
    """A voter follows and votes for a proposal below its promise."""

    def vote_anyway(old: Any, self: RoundCore, *args: Any) -> None:
        promised = self._vote.promised
        self._vote = replace(self._vote, promised=0)
        old(self, *args)
        self._vote = replace(self._vote, promised=max(promised, self._vote.promised))

    def take_anyway(old: Any, self: RoundCore, message: Proposal, sender: PeerId, now: float) -> None:
        self._check_proposer(message.attempt, sender)
        if not self._decided:
            self._follow_proposal(message, now)

    patches.wrap(RoundCore, "_vote_if_held", vote_anyway)
    patches.wrap(RoundCore, "_take_proposal", take_anyway)


@bug(arena=Arena.SCHEDULE, seed=3, by="a promise is never taken back")
def promise_forgotten_for_plan(patches: Patches) -> None:
    """A plan of a lower attempt makes a voter forget its promise."""

    def take_plan(old: Any, self: RoundCore, plan: Plan, *args: Any) -> None:
        self._vote = replace(self._vote, promised=min(self._vote.promised, plan.attempt))
        old(self, plan, *args)

    patches.wrap(RoundCore, "_take_plan", take_plan)


@bug(arena=Arena.SCHEDULE, seed=4, by="a promise is never taken back")
def promise_not_persisted(patches: Patches) -> None:
    """A promise is sent and not written, so that a restart forgets it."""

    def take_prepare(old: Any, self: RoundCore, *args: Any) -> None:
        first = len(self._effects)
        old(self, *args)
        self._effects[first:] = [effect for effect in self._effects[first:] if not isinstance(effect, Persist)]

    patches.wrap(RoundCore, "_take_prepare", take_prepare)


@bug(arena=Arena.SCHEDULE, seed=2, by="a promise is never taken back")
def promise_to_anybody(patches: Patches) -> None:
    """A voter promises a lower attempt after a higher one."""

    def take_prepare(old: Any, self: RoundCore, message: Prepare, *args: Any) -> None:
        self._vote = replace(self._vote, promised=min(self._vote.promised, message.attempt))
        old(self, message, *args)

    patches.wrap(RoundCore, "_take_prepare", take_prepare)


@bug(arena=Arena.SCHEDULE, seed=2, by="a promise tells the last vote")
def promise_hides_vote(patches: Patches) -> None:
    """A promise does not tell what its voter has voted for."""

    def promise(old: Any, self: RoundCore, *args: Any) -> Promise:
        honest: Promise = old(self, *args)
        return replace(honest, accepted_attempt=0, accepted=None)

    patches.wrap(RoundCore, "_promise", promise)


@bug(arena=Arena.SCHEDULE, seed=2, by="a promise tells the last vote")
def lock_dropped_at_attempt_change(patches: Patches) -> None:
    """Entering an attempt, a voter forgets what it has voted for in the one before."""

    def enter(old: Any, self: RoundCore, *args: Any) -> None:
        self._vote = replace(self._vote, accepted_attempt=0, accepted=None)
        old(self, *args)

    patches.wrap(RoundCore, "_enter_attempt", enter)


@bug(arena=Arena.SCHEDULE, seed=3, by="what may be certified is proposed again")
def accepted_ignored(patches: Patches) -> None:
    """A new proposer plans anew although the promises name a result that may be certified."""
    patches.everywhere(proposer.choose_accepted, lambda promises: None)


@bug(arena=Arena.SCHEDULE, seed=30, by="what may be certified is proposed again")
def accepted_of_lowest_attempt(patches: Patches) -> None:
    """Of several accepted results a new proposer takes the oldest."""

    def choose(promises: Mapping[PeerId, Promise]) -> Promise | None:
        accepted = [promise for promise in promises.values() if promise.accepted is not None]
        return min(accepted, key=lambda promise: promise.accepted_attempt, default=None)

    patches.everywhere(proposer.choose_accepted, choose)


@bug(arena=Arena.SCHEDULE, seed=3, by="what may be certified is proposed again")
def accepted_brought_up_to_date(patches: Patches) -> None:
    """A new proposer drops lost voters from the result that it has to propose again."""

    def propose(old: Any, self: RoundCore, result: Result, *args: Any) -> None:
        voters = tuple(peer for peer in result.voters if peer not in self._lost)
        old(self, replace(result, voters=voters or result.voters), *args)

    patches.wrap(RoundCore, "_propose", propose)


@bug(arena=Arena.SCHEDULE, seed=2, by="what may be certified is proposed again")
def promises_not_waited_for(patches: Patches) -> None:
    """A new proposer plans without a quorum of promises."""

    def prepare(old: Any, self: RoundCore, *args: Any) -> None:
        old(self, *args)
        self._set_phase(Phase.GATHER, None)

    patches.wrap(RoundCore, "_prepare", prepare)


@bug(arena=Arena.SCHEDULE, seed=48, by="no honest peer is accused")
def attempt_led_twice(patches: Patches) -> None:
    """A proposer that restarts leads the same attempt a second time."""
    patches.set(RoundCore, "_mark_led", lambda self: None)


@bug(arena=Arena.SCHEDULE, seed=3, by="a promise tells the last vote")
def vote_record_forgotten(patches: Patches) -> None:
    """A restart does not read the vote record."""

    def start(
        old: Any, self: RoundState, setting: Any, head: Any, vote: VoteRecord | None, *args: Any, **options: Any
    ) -> None:
        old(self, setting, head, None, *args, **options)

    patches.wrap(RoundState, "__init__", start)


@bug(arena=Arena.SCHEDULE, seed=4, by="what may be certified is proposed again")
def smaller_quorum(patches: Patches) -> None:
    """Half of the voters certify."""
    patches.everywhere(quorum.quorum_size, lambda voters, rule: max(1, voters // 2))


@bug(seed=1, by="a quorum certifies")
def one_vote_counted_often(patches: Patches) -> None:
    """Votes are counted as they come, whoever sent them, and nobody checks that a certificate's voters are distinct."""

    def check(certificate: Certificate, voters: Sequence[PeerId], authority: Authority, *args: Any) -> None:
        if len(certificate.votes) < quorum.quorum_size(len(voters), authority.rule):
            raise ProtocolError(Refusal.NO_QUORUM, f"{len(certificate.votes)} votes of {len(voters)}")

    def take(old: Any, self: RoundCore, vote: Vote, sender: PeerId, now: float) -> None:
        old(self, vote, sender, now)
        if self._leads(vote.attempt) and self._proposal and not self._decided:
            votes = (vote,) * self._quorum_size()
            self._decide(Certificate(result=self._proposal.result, attempt=vote.attempt, votes=votes), now)

    patches.everywhere(quorum.check_votes, check)
    patches.wrap(RoundCore, "_take_vote", take)


@bug(seed=1, by="no honest peer is accused")
def anybody_votes(patches: Patches) -> None:
    """Members that are no voters vote, too, and count."""

    def check(certificate: Certificate, voters: Sequence[PeerId], authority: Authority, *args: Any) -> None:
        if len(certificate.votes) < quorum.quorum_size(len(voters), authority.rule):
            raise ProtocolError(Refusal.NO_QUORUM, f"{len(certificate.votes)} votes of {len(voters)}")

    patches.everywhere(quorum.check_votes, check)
    patches.set(RoundState, "_votes", lambda self: True)
    patches.set(RoundCore, "_check_voter", lambda self, sender: None)


@bug(arena=Arena.SCHEDULE, seed=1821, by="no honest peer is accused")
def wrong_attempt_accepted(patches: Patches) -> None:
    """A proposer takes answers to its other attempts for answers to this one."""
    patches.set(RoundState, "_leads", lambda self, attempt: self._lead is not None)


@bug(seed=1, by="no honest peer is accused")
def proposers_from_own_view(patches: Patches) -> None:
    """Who leads is computed over the voters that this peer takes for alive."""

    def choose(old: Any, self: RoundState, attempt: int | None = None) -> PeerId:
        live = [peer for peer in self._order if peer not in self._lost] or list(self._order)
        return live[(self.attempt if attempt is None else attempt) % len(live)]

    patches.wrap(RoundState, "_proposer", choose)


@bug(arena=Arena.HASH_SEEDS, seed=1, by="same seed, same trace")
def voters_from_a_set(patches: Patches) -> None:
    """The order of the next voters comes from a set."""

    def choose(
        current: tuple[PeerId, ...],
        contributors: tuple[PeerId, ...],
        absent: Iterable[PeerId],
        voters_max: int = VOTERS_MAX,
    ) -> Any:
        return tuple({*current, *contributors} - {*absent})[:voters_max] or current

    patches.everywhere(quorum.choose_voters, choose)


@bug(arena=Arena.STORM, seed=1, by="no honest peer is accused")
def duplicate_refused(patches: Patches) -> None:
    """A message that comes twice is taken for an attack."""

    def dispatch(old: Any, self: RoundCore, message: Any, sender: PeerId, now: float) -> None:
        if isinstance(message, Proposal) and self._proposal == message:
            raise ProtocolError(Refusal.REPLAYED, "the same proposal again")
        old(self, message, sender, now)

    patches.wrap(RoundCore, "_dispatch", dispatch)


@bug(arena=Arena.STORM, seed=3, by="no honest peer is accused")
def late_promise_refused(patches: Patches) -> None:
    """A proposer accuses the voter whose refusal comes after it has moved on."""

    def dispatch(old: Any, self: RoundCore, message: Any, sender: PeerId, now: float) -> None:
        if isinstance(message, Nack) and not self._leads(message.attempt):
            raise ProtocolError(Refusal.WRONG_ATTEMPT, "an answer to nothing that was asked")
        old(self, message, sender, now)

    patches.wrap(RoundCore, "_dispatch", dispatch)


@bug(seed=3611528403, by="all peers come to one log")
def lost_update_waited_for(patches: Patches) -> None:
    """Who knows that a round is certified looks for its bytes for ever, though all who held them died for good."""
    patches.wrap(RoundCore, "_is_update_lost", lambda old, self, *args: False)
