"""Where one peer stands in a round: the data of the round core, and the questions asked of it.

`RoundCore` (protocol.rounds) is the only writer. Invariant: all of one round is replaced as a whole when the next
begins, everything of one attempt when the next attempt is entered, so nothing stale is ever mixed in.
"""

from dataclasses import dataclass, replace

from shoal.protocol.abstention import ABSTAINING, FRESH_ATTEMPT, Abstention
from shoal.protocol.attendance import Counted, check_attendance, exceeds, expect_attendance
from shoal.protocol.effects import Effect, LeftRecord, Phase, PhaseEntered, Send, VoteRecord
from shoal.protocol.errors import Failure, ProtocolError, Refusal
from shoal.protocol.exchange import Collection, Inbox, Waits
from shoal.protocol.identity import Identity, PeerId
from shoal.protocol.manifest import Rounds
from shoal.protocol.messages import (
    ROUND_MESSAGES,
    Certificate,
    Certified,
    Locked,
    Plan,
    Presence,
    Proposal,
    Result,
    SignedReady,
)
from shoal.protocol.pace import PartPace, ReadyPace
from shoal.protocol.proposer import Lead
from shoal.protocol.quorum import Authority, Head, QuorumRule, proposer_order, quorum_size
from shoal.protocol.shares import Shares

BACKOFF_MAX = 4.0
BACKOFF_FACTOR = 1.5
ATTEMPTS_AHEAD_MAX = 1_000_000  # years of time-outs
EARLY_MESSAGES_MAX = 256  # messages of the next round that are kept while this one is applied
FETCH_DELAY_S = 1.0  # how long a missing result part may still be under way before it is asked for
FETCH_RETRY_S = 5.0
BEHIND_RETRY_S = 2.0
HELPERS = 3  # so many peers send it
HELP_DELAY_S = 2.0  # how long a peer may need to apply the last round before its certificate is sent to it again
EARLY_PER_SENDER_MAX = 16
LOG_DIGESTS_MAX = 64
CONTRIBUTED_MAX = 1024
# Of the exchange's time: how much of it senders, and then owners, may take up.
SENDERS_WINDOW = 0.5
OWNERS_WINDOW = 0.75
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
    deadline_name: str | None  # the field of the manifest's [rounds] that sets it
    waiting_for: tuple[PeerId, ...]
    ready: tuple[PeerId, ...]
    roster: tuple[PeerId, ...]
    last_failure: Failure | None
    last_failure_peer: PeerId | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What never changes while the daemon lives."""

    identity: Identity
    rules: Rounds
    authority: Authority
    trains: bool = True


class RoundState:
    """The state of `RoundCore`, without its moves."""

    def __init__(
        self, setting: Setting, head: Head, vote: VoteRecord | None, now: float, *, abstains: bool = False
    ) -> None:
        self._identity = setting.identity
        self._me = setting.identity.peer
        self._authority = setting.authority
        self._swarm = setting.authority.swarm
        self._rules = setting.rules
        self._trains = setting.trains
        self._ready_pace = ReadyPace()
        self._sender_pace = PartPace()
        self._owner_pace = PartPace()
        self._shares = Shares()
        self._update_ratio = self._rules.update_ratio
        self._given_share = 1.0  # of an even one, by the last proposer
        # Who is no newcomer, the latest last; and the newest round that counted it, as far as this peer has seen.
        self._contributed: dict[PeerId, Counted | None] = {}
        self._log: dict[int, bytes] = {}  # digests of the last rounds, to notice a log that parts from this one
        self._vote = vote or VoteRecord(round=head.round + 1)
        self._began_s = now
        self._alone_since_s: float | None = None
        self._declare_after_s = 0.0
        self._had_quorum = False
        self._saw_quorum = False  # since the start
        self._members: dict[PeerId, Presence] = {}
        self._lost: set[PeerId] = set()
        self._leaving = False
        self._effects: list[Effect] = []
        self._last_certificate: Certificate | None = None
        self._behind_after_s = now
        self._forked_after_s = now
        self._early: list[tuple[PeerId, ROUND_MESSAGES]] = []
        self._now_s = now
        self._dropped: Refusal | None = None
        self._saved_vote = vote
        window_s = self._rules.presence_timeout_s
        self._abstention = Abstention(self._me, now, window_s) if abstains else None
        self._clear_round(head)

    def _clear_round(self, head: Head) -> None:
        self.head = head
        self.round = head.round + 1
        self._parts = self._authority.count_parts(self.round)
        self._vote = self._take_up_vote(head)
        if self._abstention is not None:
            self._abstain_in_round(self._abstention, self._began_s)
        self._order = proposer_order(head.digest, head.voters)
        self._offer: Offer | None = None
        self._is_planned = False  # the offer was in a plan
        self._inbox = Inbox(parts=self._parts)
        self._held: set[bytes] = set()
        self._wanted: Result | None = None  # and which of its digests are not held
        self._unheld: set[bytes] = set()
        self._sent: set[tuple[PeerId, int]] = set()
        self._declaration: Result | None = None
        self._training_ended = False  # EndTraining was said
        self._declared: Lead | None = None
        self._slow_owners: set[PeerId] = set()
        self._had_ready: set[PeerId] = set()
        self._refused_attempt = 0
        self._attempts_heard: dict[PeerId, int] = {}
        self._failures = 0
        self._last_failure: Failure | None = None
        self._last_failure_peer: PeerId | None = None
        self._log[head.round] = head.digest
        if len(self._log) > LOG_DIGESTS_MAX:
            del self._log[min(self._log)]
        self._decided: Certificate | None = None
        self._clear_attempt(self._vote.promised)

    def _take_up_vote(self, head: Head) -> VoteRecord:
        """What this peer has signed in the round after `head`, on this log and on no other."""
        # The record may be of a round that is still ahead: the disk lost part of the log, but not what was signed.
        saved, pledge, left = self._saved_vote, self._vote.pledge, self._vote.left
        if pledge and head.round >= pledge.end:
            pledge = None
        if saved and (saved.round, saved.base) == (head.round + 1, head.digest):
            return replace(saved, pledge=pledge, left=left)
        fresh = VoteRecord(round=head.round + 1, base=head.digest, pledge=pledge, left=left)
        for one in left:
            if (one.round, one.base) == (fresh.round, fresh.base):
                fields = {name: getattr(one, name) for name in LeftRecord.__slots__}
                return replace(fresh, **fields)
        return fresh

    def _is_going_over(self) -> bool:
        """Whether this peer is on its way into the log that it has chosen. Those rounds are certified, and what it has
        signed in them is put away, so it signs nothing there."""
        return self._vote.pledge is not None

    def _abstain_in_round(self, abstention: Abstention, now: float) -> None:
        """Where no quorum is possible without this peer it goes on all the same, in attempts that are new to it."""
        abstention.goes_on = abstention.may_go_on(self.head.voters, self._authority.rule, now)
        if abstention.goes_on:
            vote = self._vote
            self._vote = replace(vote, promised=max(FRESH_ATTEMPT, vote.promised), led=max(FRESH_ATTEMPT, vote.led))

    def _signs_nothing(self) -> bool:
        """On the way to another log, or because the disk has forgotten what was signed."""
        return self._is_going_over() or (self._abstention is not None and not self._abstention.goes_on)

    def _clear_attempt(self, attempt: int) -> None:
        self.attempt = attempt
        self._plan: Plan | None = None
        self._roster_digest = bytes(32)  # the plan's roster is the same in all of its revisions
        self._proposal: Proposal | None = None
        self._voted = False
        self._locks_sent = False
        self._locked: Locked | None = None
        self._exchange_began_s = 0.0
        self._collections: dict[int, Collection] = {}
        self._senders = Waits()  # the collections that are not complete, each under one sender that it lacks
        self._fetch_s: float | None = None
        may_lead = self._proposer() == self._me and attempt >= self._vote.led and not self._signs_nothing()
        self._lead: Lead | None = Lead(attempt=attempt) if may_lead else None
        self._set_phase(Phase.GATHER, None)

    def next_deadline(self) -> float | None:
        """When `handle_deadline` is due."""
        times = [self._deadline_s, self._fetch_s]
        if self._alone_since_s is not None and self._authority.may_declare:
            times.append(max(self._alone_since_s + self._rules.reroot_after_s, self._declare_after_s))
        if self._lead and self.phase is Phase.GATHER:
            times.append(self._lead.awaited_until_s)
        if self._plan and self.phase is Phase.EXCHANGE:
            if self._lead:
                times += self._owner_deadlines(self._lead).values()
            times += [self._sender_deadline(peer, started_s) for peer, started_s in self._senders.entries]
        # What is past has been acted on; it is looked at again when something arrives.
        return min((time for time in times if time is not None and time > self._now_s), default=None)

    def view(self) -> RoundView:
        """A snapshot for people and metrics."""
        deadline_s, deadline_name = self._deadline()
        is_waiting = self._waits_for_quorum()
        return RoundView(
            round=self.round,
            attempt=self.attempt,
            phase=self.phase,
            proposer=self._proposer(),
            deadline_s=deadline_s,
            deadline_name=deadline_name,
            waiting_for=self._waiting_for(),
            ready=tuple(sorted(self._ready_members())),
            roster=self._roster_peers(),
            last_failure=Failure.NO_QUORUM if is_waiting else self._last_failure,
            last_failure_peer=None if is_waiting else self._last_failure_peer,
        )

    def _deadline(self) -> tuple[float | None, str | None]:
        """When the phase ends at the latest, and which of the manifest's limits says so."""
        if self._lead and self.phase is Phase.GATHER and self._lead.awaited_until_s is not None:
            return self._lead.awaited_until_s, "grace_s"
        return self._deadline_s, None if self._deadline_s is None else PHASE_LIMITS[self.phase]

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
        return self._me in self.head.voters and not self._signs_nothing()

    def _needs_locks(self) -> bool:
        """Where members may lie, a vote takes two phases."""
        return self._authority.rule is QuorumRule.TWO_THIRDS

    def _quorum_size(self) -> int:
        return quorum_size(len(self.head.voters), self._authority.rule)

    def _blocking_size(self) -> int:
        """So many voters that without them there is no quorum."""
        return len(self.head.voters) - self._quorum_size() + 1

    def _has_quorum(self) -> bool:
        """Whether enough voters are in sight to certify anything."""
        return self._live_voters() >= self._quorum_size()

    def _can_certify(self) -> bool:
        """Whether enough voters are in sight that sign."""
        signing = self._live_voters() - len(self._abstaining().intersection(self.head.voters))
        return signing >= self._quorum_size()

    def _abstaining(self) -> frozenset[PeerId]:
        """The peers in sight that have forgotten what they signed, as they say themselves; not this one."""
        return frozenset(peer for peer, known in self._members.items() if known.phase == ABSTAINING)

    def _why_led_by_nobody(self) -> Failure | None:
        """Why no proposal will come of this attempt, as far as this peer can see: its proposer is gone, or it has
        forgotten what it signed and says so. None where one may."""
        proposer = self._proposer()
        if proposer in self._lost:
            return Failure.PROPOSER_LOST
        return Failure.PROPOSER_ABSTAINS if self._leads_nothing(proposer) else None

    def _leads_nothing(self, peer: PeerId) -> bool:
        known = self._members.get(peer)
        own = peer == self._me and self._abstention is not None and not self._abstention.goes_on
        return peer in self._lost or own or (known is not None and known.phase == ABSTAINING)

    @property
    def sees_quorum(self) -> bool:
        """Whether enough voters are in sight to certify anything."""
        return self._has_quorum()

    @property
    def may_withdraw(self) -> bool:
        """Whether `withdraw` would take the offer back."""
        return self._offer is not None and self._waits_for_quorum()

    def _waits_for_quorum(self) -> bool:
        return self.phase in (Phase.GATHER, Phase.PREPARE) and not self._has_quorum()

    def _live_voters(self) -> int:
        return sum(peer == self._me or peer in self._members for peer in self.head.voters)

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

    def _owner_deadlines(self, lead: Lead) -> dict[tuple[PeerId, float], float]:
        """When the proposer takes each open part from its owner, who was silent for too long or has had it for too
        long; by the owner and the time since when it has the part."""
        # An owner cannot be done before its slowest sender has delivered or is given up.
        limit_s = self._rules.sender_timeout_s
        senders = [peer for peer in self._roster_peers() if peer != self._me]
        senders_s = max((self._sender_pace.allowance_s(peer, limit_s) for peer in senders), default=0.0)
        # Time must be left for another owner, however steadily this one goes on.
        rush_s = self._exchange_began_s + OWNERS_WINDOW * self._exchange_window_s()
        backoff, owner_limit_s = self._backoff(), self._rules.owner_timeout_s
        deadlines = {}
        for owner, since_s in lead.open.entries:
            own_s = self._owner_pace.allowance_s(owner, owner_limit_s)
            deadline_s = lead.heard_s[owner] + senders_s + own_s * backoff
            # Whoever was given it so late that its slowest sender may not be done by then is not to blame.
            has_time = since_s + senders_s < rush_s
            deadlines[owner, since_s] = min(deadline_s, rush_s) if has_time else deadline_s
        return deadlines

    def _exchange_window_s(self) -> float:
        return self._rules.exchange_timeout_s * self._backoff()

    def _sender_deadline(self, peer: PeerId, started_s: float) -> float:
        """When an owner goes on without this sender's part of a collection that began at `started_s`."""
        allowance_s = self._sender_pace.allowance_s(peer, self._rules.sender_timeout_s)
        heard_s = max(started_s, self._inbox.heard_s.get(peer, started_s))
        # A sender that goes on and on must leave time to reduce what the others have sent.
        rush_s = self._exchange_began_s + SENDERS_WINDOW * self._exchange_window_s()
        return min(heard_s + allowance_s, max(rush_s, started_s + allowance_s))

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
            if one.ready.round == self.round and one.ready.base_root == self.head.state_root and self._may_attend(one)
        }

    def _may_attend(self, signed: SignedReady) -> bool:
        """Whether what a READY declares besides its work is lawful, and no more than the rounds seen here allow. The
        plans of others are not measured by those: they may have seen fewer."""
        declared, last = signed.ready.attendance, self._contributed.get(signed.peer)
        try:
            check_attendance(declared, self._rules.weights, self.round)
        except ProtocolError:
            return False
        return last is None or not exceeds(declared, expect_attendance(last, self.round))

    def _stragglers(self) -> tuple[PeerId, ...]:
        """The voters in sight that are behind this peer, where those that are not are no quorum. Only where nobody
        follows one voter's word to a later attempt, and where a quorum is in sight."""
        if not self._needs_locks() or not self._has_quorum():
            return ()
        at = self.head.round, self.attempt
        here = {peer for peer, known in self._members.items() if (known.head_round, known.attempt) >= at}
        behind = set(self.head.voters).intersection(self._members) - here - {self._me}
        is_short = self._live_voters() - len(behind) < self._quorum_size()
        return tuple(sorted(behind)) if is_short else ()

    def _waiting_for(self) -> tuple[PeerId, ...]:
        if self.phase is Phase.EXCHANGE and self._lead:
            return tuple(sorted({owner for owner, _ in self._lead.open.entries}))
        if self.phase is Phase.EXCHANGE and self._plan:
            open_parts = [part for part, one in self._collections.items() if not one.reduced]
            held = self._inbox.received
            late = [peer for peer in self._roster_peers() if any(part not in held.get(peer, {}) for part in open_parts)]
            return tuple(late) or (self._proposer(),)
        if self.phase is Phase.COMMIT and self._lead:
            return tuple(sorted(set(self.head.voters) - set(self._lead.votes)))
        if self._waits_for_quorum():
            return tuple(sorted(peer for peer in self.head.voters if peer not in self._members and peer != self._me))
        if self.attempt > 0 and (behind := self._stragglers()):
            return behind
        if self.phase is Phase.GATHER:
            ready = self._ready_members()
            return tuple(sorted(peer for peer, known in self._members.items() if known.trains and peer not in ready))
        return (self._proposer(),)


PHASE_LIMITS: dict[Phase, str] = {
    Phase.PREPARE: "plan_timeout_s",
    Phase.GATHER: "plan_timeout_s",
    Phase.EXCHANGE: "exchange_timeout_s",
    Phase.COMMIT: "commit_timeout_s",
}
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
