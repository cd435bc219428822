"""Where one peer stands in a round: the data of the round core, and the questions asked of it.

`RoundCore` (protocol.rounds) is the only writer. Invariant: all of one round is replaced as a whole when the next
begins, everything of one attempt when the next attempt is entered, so nothing stale is ever mixed in.
"""

from dataclasses import dataclass

from shoal.protocol.effects import Effect, Phase, PhaseEntered, Send, VoteRecord
from shoal.protocol.errors import Failure, Refusal
from shoal.protocol.exchange import Collection, Inbox, sender_deadline
from shoal.protocol.identity import Identity, PeerId
from shoal.protocol.manifest import Rounds
from shoal.protocol.messages import ROUND_MESSAGES, Certificate, Certified, Plan, Presence, Proposal, SignedReady
from shoal.protocol.proposer import Lead
from shoal.protocol.quorum import Head, QuorumRule, proposer_order

BACKOFF_MAX = 4.0
BACKOFF_FACTOR = 1.5
ATTEMPTS_AHEAD_MAX = 1_000_000  # years of time-outs
EARLY_MESSAGES_MAX = 256  # messages of the next round that are kept while this one is applied
FETCH_DELAY_S = 1.0  # how long a missing result part may still be under way before it is asked for
FETCH_RETRY_S = 5.0
BEHIND_RETRY_S = 2.0
# A part may overtake the plan that makes it welcome. The sender is told and sends it again, so often.
RESEND_AFTER = (Refusal.NOT_A_MEMBER, Refusal.WRONG_ROUND)
RESENDS_MAX = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """This peer's frozen contribution and the digests of its encoded parts."""

    signed: SignedReady
    digests: tuple[bytes, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundView:
    """Where the round stands, for status, metrics and logs."""

    round: int
    attempt: int
    phase: Phase
    proposer: PeerId
    deadline_s: float | None
    waiting_for: tuple[PeerId, ...]
    ready: tuple[PeerId, ...]
    roster: tuple[PeerId, ...]
    last_failure: Failure | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What never changes while the daemon lives."""

    identity: Identity
    swarm: bytes
    rules: Rounds
    parts: int


class RoundState:
    """The state of `RoundCore`, without its moves."""

    def __init__(self, setting: Setting, head: Head, vote: VoteRecord | None, now: float) -> None:
        self._identity = setting.identity
        self._me = setting.identity.peer
        self._swarm = setting.swarm
        self._rules = setting.rules
        self._quorum = QuorumRule(setting.rules.quorum)
        self._parts = setting.parts
        self._members: dict[PeerId, Presence] = {}
        self._lost: set[PeerId] = set()
        self._leaving = False
        self._effects: list[Effect] = []
        self._last_certificate: Certificate | None = None
        self._behind_after_s = now
        self._early: list[tuple[PeerId, ROUND_MESSAGES]] = []
        self._now_s = now
        self._saved_vote = vote
        self._clear_round(head)

    def _clear_round(self, head: Head) -> None:
        self.head = head
        self.round = head.round + 1
        # The record may be of a round that is still ahead: the disk lost part of the log, but not what was signed.
        saved = self._saved_vote
        self._vote = saved if saved and saved.round == self.round else VoteRecord(round=self.round)
        self._order = proposer_order(head.digest, head.voters)
        self._offer: Offer | None = None
        self._inbox = Inbox(parts=self._parts)
        self._held: set[bytes] = set()
        self._sent: set[tuple[PeerId, int]] = set()
        self._failures = 0
        self._last_failure: Failure | None = None
        self._decided: Certificate | None = None
        self._clear_attempt(self._vote.promised)

    def _clear_attempt(self, attempt: int) -> None:
        self.attempt = attempt
        self._plan: Plan | None = None
        self._proposal: Proposal | None = None
        self._voted = False
        self._collections: dict[int, Collection] = {}
        self._fetch_s: float | None = None
        may_lead = self._proposer() == self._me and attempt >= self._vote.led
        self._lead: Lead | None = Lead(attempt=attempt) if may_lead else None
        self._set_phase(Phase.GATHER, None)

    def next_deadline(self) -> float | None:
        """When `handle_deadline` is due."""
        times = [self._deadline_s, self._fetch_s]
        if self._lead and self.phase is Phase.GATHER:
            times.append(self._lead.grace_ends_s)
        if self._plan and self.phase is Phase.EXCHANGE:
            if self._lead:
                times += [self._owner_deadline(owner) for owner in self._pending_owners()]
            for collection in self._collections.values():
                if not collection.reduced:
                    times += [self._sender_deadline(collection, index) for index in range(len(self._plan.roster))]
        # What is past has been acted on; it is looked at again when something arrives.
        return min((time for time in times if time is not None and time > self._now_s), default=None)

    def view(self) -> RoundView:
        """A snapshot for people and metrics."""
        return RoundView(
            round=self.round,
            attempt=self.attempt,
            phase=self.phase,
            proposer=self._proposer(),
            deadline_s=self._deadline_s,
            waiting_for=self._waiting_for(),
            ready=tuple(sorted(self._ready_members())),
            roster=self._roster_peers(),
            last_failure=self._last_failure,
        )

    def _send(self, peer: PeerId, message: ROUND_MESSAGES) -> None:
        self._effects.append(Send(peer=peer, message=message))

    def _set_phase(self, phase: Phase, deadline_s: float | None) -> None:
        self.phase = phase
        self._deadline_s = deadline_s
        self._effects.append(
            PhaseEntered(round=self.round, attempt=self.attempt, phase=phase, proposer=self._proposer())
        )

    def _proposer(self, attempt: int | None = None) -> PeerId:
        return self._order[(self.attempt if attempt is None else attempt) % len(self._order)]

    def _leads(self, attempt: int) -> bool:
        return self._lead is not None and self._lead.attempt == attempt

    def _votes(self) -> bool:
        return self._me in self.head.voters

    def _backoff(self) -> float:
        return float(min(BACKOFF_FACTOR**self._failures, BACKOFF_MAX))

    def _roster_peers(self) -> tuple[PeerId, ...]:
        return tuple(entry.signed.peer for entry in self._plan.roster) if self._plan else ()

    def _expected(self) -> frozenset[PeerId]:
        """Whose contributions there is always room for."""
        return frozenset({self._me, *self._roster_peers()})

    def _index(self, peer: PeerId) -> int | None:
        peers = self._roster_peers()
        return peers.index(peer) if peer in peers else None

    def _owner(self, part: int) -> PeerId:
        assert self._plan is not None
        return self._plan.roster[self._plan.owners[part]].signed.peer

    def _pending_owners(self) -> set[PeerId]:
        assert self._lead is not None
        return {self._owner(part) for part in range(self._parts) if part not in self._lead.done}

    def _owner_deadline(self, owner: PeerId) -> float:
        assert self._lead is not None
        return self._lead.heard_s[owner] + self._rules.owner_timeout_s * self._backoff()

    def _sender_deadline(self, collection: Collection, index: int) -> float | None:
        assert self._plan is not None
        entry = self._plan.roster[index].signed
        if self._inbox.has_part(entry.peer, collection.part, entry.ready.contribution_root):
            return None
        return sender_deadline(entry.peer, collection, self._inbox, self._rules.sender_timeout_s)

    def _audience(self) -> list[PeerId]:
        """Who follows this attempt: the roster and the voters, without this peer and the lost ones."""
        return sorted({*self._roster_peers(), *self.head.voters} - self._lost - {self._me})

    def _leavers(self) -> frozenset[PeerId]:
        leaving = {peer for peer, known in self._members.items() if known.leaving}
        return frozenset({*leaving, self._me} if self._leaving else leaving)

    def _absent(self) -> frozenset[PeerId]:
        return frozenset(self._lost) | self._leavers()

    def _ready_members(self) -> dict[PeerId, SignedReady]:
        signed = {peer: known.ready for peer, known in self._members.items() if known.ready and not known.leaving}
        if self._offer and not self._leaving:
            signed[self._me] = self._offer.signed
        return {
            peer: one
            for peer, one in signed.items()
            if one.ready.round == self.round and one.ready.base_root == self.head.state_root
        }

    def _waiting_for(self) -> tuple[PeerId, ...]:
        if self.phase is Phase.EXCHANGE and self._lead:
            return tuple(sorted(self._pending_owners()))
        if self.phase is Phase.EXCHANGE and self._plan:
            open_parts = [part for part, one in self._collections.items() if not one.reduced]
            held = self._inbox.received
            late = [peer for peer in self._roster_peers() if any(part not in held.get(peer, {}) for part in open_parts)]
            return tuple(late) or (self._proposer(),)
        if self.phase is Phase.COMMIT and self._lead:
            return tuple(sorted(set(self.head.voters) - set(self._lead.votes)))
        if self.phase is Phase.GATHER:
            ready = self._ready_members()
            return tuple(sorted(peer for peer, known in self._members.items() if known.trains and peer not in ready))
        return (self._proposer(),)


PHASE_TIMEOUTS: dict[Phase, Failure] = {
    Phase.PREPARE: Failure.NO_QUORUM,
    Phase.GATHER: Failure.PROPOSER_SILENT,
    Phase.EXCHANGE: Failure.EXCHANGE_TIMEOUT,
    Phase.COMMIT: Failure.COMMIT_TIMEOUT,
}


def round_of(message: ROUND_MESSAGES) -> int:
    """The round that a message is about."""
    if isinstance(message, Certified):
        return message.certificate.result.round
    return message.result.round if isinstance(message, Proposal) else message.round
