"""The round core: one peer's state machine of a training round, from READY to certificate.

    GATHER -> EXCHANGE -> COMMIT -> (FETCH) -> APPLY -> GATHER of the next round
    a failed attempt: any of the first three -> PREPARE (its next proposer) or GATHER (everyone else)

In three layers: `round_ballot` brings attempts to one certified result, `round_exchange` makes the result that an
attempt proposes, and this module is what the shell calls, who is waited for, and the one place that acts on time.

Sans-IO: time comes in as `now` (seconds, monotonic), messages and facts come in as calls, and `take_effects` hands out
what the shell must do. After every call the shell takes the effects and re-arms `next_deadline`.

Invariants: a round waits for nobody who is not expected within the grace window; newcomers come in between rounds, so
many a round; every list of messages that is kept has a bound.
"""

from collections import Counter
from collections.abc import Mapping

from shoal.protocol.abstention import Abstention
from shoal.protocol.effects import (
    LEFT_RECORDS_MAX,
    Effect,
    EndTraining,
    LeftRecord,
    Phase,
    Pledge,
    QuorumSeen,
    VoteRecord,
)
from shoal.protocol.errors import ProtocolError, Refusal
from shoal.protocol.identity import PeerId
from shoal.protocol.messages import (
    ROUND_MESSAGES,
    Certificate,
    Certified,
    Contribution,
    Lock,
    Locked,
    Nack,
    PartDone,
    Plan,
    Prepare,
    Presence,
    Promise,
    Proposal,
    SignedReady,
    Vote,
)
from shoal.protocol.pace import MARGIN_S, find_worthy_end_s
from shoal.protocol.proposer import make_empty_result
from shoal.protocol.quorum import Head, is_reroot, list_counted
from shoal.protocol.round_exchange import RoundExchange
from shoal.protocol.round_state import (
    CONTRIBUTED_MAX,
    EARLY_MESSAGES_MAX,
    EARLY_PER_SENDER_MAX,
    HELP_DELAY_S,
    HELPERS,
    PHASE_TIMEOUTS,
    Offer,
    Setting,
    round_of,
)

# Ballots name no base, and after a re-root there may be another log in which they are right: they prove nothing.
BASELESS = (Refusal.WRONG_PROPOSER, Refusal.NOT_A_MEMBER, Refusal.WRONG_DIGEST)


class RoundCore(RoundExchange):
    """See the module's docstring. One instance lives as long as the daemon and walks from round to round."""

    def __init__(
        self, setting: Setting, head: Head, vote: VoteRecord | None, now: float, *, abstains: bool = False
    ) -> None:
        super().__init__(setting, head, vote, now, abstains=abstains)
        self._begin_attempt(now)
        self._evaluate(now)

    # -- what the shell calls ------------------------------------------------------------------------------------

    def take_effects(self) -> list[Effect]:
        """What to do now, in this order."""
        effects, self._effects = self._effects, []
        return effects

    def observe(self, presence: Presence, now: float) -> None:
        """A verified presence that is newer than what was known: this peer is alive."""
        peer = presence.peer
        if peer in self._lost and peer in self.head.voters:
            self._failures = 0  # what made attempts fail may be over
        self._members[peer] = presence
        self._lost.discard(peer)
        self._observe_forgetful(presence, now)
        self._note_ready(self._ready_members(), now)
        self._prepare_again(presence)
        self._sync_attempt(presence, now)
        if self._is_elsewhere(peer):
            self._note_fork(peer, now)
        else:
            self._note_behind(peer, presence.head_round, now)
            self._help_behind(presence, now)
        self._evaluate(now)

    def lose(self, peer: PeerId, now: float) -> None:
        """The peer is no longer counted as alive."""
        self._lost.add(peer)
        self._members.pop(peer, None)
        self._ready_pace.forget(peer)
        # A peer that comes back may have restarted and forgotten what was sent to it.
        self._sent = {(owner, part) for owner, part in self._sent if owner != peer}
        self._evaluate(now)

    def offer(self, offer: Offer, now: float) -> bool:
        """The own contribution to this round is frozen; its READY is on its way in the presence. False, and nothing is
        changed, when another one was offered in this round: a plan may count on that."""
        assert offer.signed.ready.round == self.round, "a contribution belongs to the open round"
        if self._offer is not None and self._offer.digests != offer.digests:
            return False
        self._offer = offer
        self._inbox.take_digests(self._me, offer.digests, now, self._expected())
        for part, digest in enumerate(offer.digests):
            self._inbox.take_part(self._me, part, digest, now)
        self._evaluate(now)
        return True

    def withdraw(self, now: float) -> bool | None:
        """Take the offer back, so that another one can be made in this round: nobody can plan with it while no quorum
        is in sight. Whether somebody has planned with it before, so that it may be counted all the same. None, and
        nothing is changed, where a quorum is in sight, a plan stands, or there is no offer."""
        if not self.may_withdraw:
            return None
        was_planned, self._is_planned = self._is_planned, False
        self._offer = None
        self._inbox.forget(self._me)  # a plan that was made before may still come, and may not count it here
        self._sent.clear()  # of another contribution everything is to be sent
        self._evaluate(now)
        return was_planned

    def leave(self, now: float) -> None:
        """This peer is about to stop: it becomes ready for nothing more and asks not to be counted as a voter."""
        self._leaving = True
        self._evaluate(now)

    def receive(self, message: ROUND_MESSAGES, sender: PeerId, now: float) -> Refusal | None:
        """Take a message from an authenticated peer. Returns why it was dropped, where an honest peer may be the cause:
        it was late, early or said twice. Raises ProtocolError for one that the peer must not send."""
        number = round_of(message)
        is_fetching = self.phase is Phase.FETCH and isinstance(message, Certified)  # the owner may end that
        if number < self.round or (self._decided and number == self.round and not is_fetching):
            self._answer_late(message, number, sender)
            return Refusal.WRONG_ROUND
        if number > self.round:
            self._note_behind(sender, number - 1, now)
            return None if self._keep_early(message, number, sender) else Refusal.WRONG_ROUND
        self._dropped = None
        try:
            self._dispatch(message, sender, now)
        except ProtocolError as error:
            is_elsewhere = error.refusal is Refusal.OTHER_LOG or self._is_elsewhere(sender)
            is_ballot = error.refusal in BASELESS and not isinstance(message, Plan | Proposal | Certified)
            if not is_elsewhere and not is_ballot:
                raise
            self._dropped = Refusal.OTHER_LOG if is_elsewhere else error.refusal
            if is_elsewhere or not self._shares_head(sender):
                self._note_fork(sender, now)
        dropped = self._dropped
        self._evaluate(now)
        return dropped

    def check_part(self, sender: PeerId, round_number: int, part: int, digest: bytes) -> Refusal | None:
        """Whether a contribution part that is about to arrive over a tensor link is to be read."""
        if round_number != self.round or self.phase is Phase.APPLY:
            return Refusal.WRONG_ROUND
        known = self._members.get(sender)
        planned = self._plan is not None and self._index(sender) is not None
        # Parts may overtake the plan and even the READY behind them: a live trainer's are taken, one contribution each.
        if not planned and (known is None or not known.trains):
            return Refusal.NOT_A_MEMBER
        return self._inbox.check_part(sender, part, digest)

    def check_result_part(self, sender: PeerId, round_number: int, part: int) -> Refusal | None:
        """Whether an owner's reduced part that is about to arrive is to be read; it can be fetched by digest later."""
        if round_number != self.round or self.phase is Phase.APPLY:
            return Refusal.WRONG_ROUND
        if self._index(sender) is None or part >= self._parts:
            return Refusal.NOT_PLANNED
        return None

    def part_received(self, sender: PeerId, round_number: int, part: int, digest: bytes, now: float) -> None:
        """A contribution part is held and its bytes match `digest`."""
        if round_number == self.round:
            self._note_part(sender, part, digest, now)
            self._evaluate(now)

    def part_reduced(
        self, round_number: int, attempt: int, part: int, digest: bytes, members: frozenset[int], now: float
    ) -> None:
        """A `Reduce` is done; `members` are the roster indices that went in. The result's bytes are held."""
        if round_number != self.round:
            return
        if attempt == self.attempt and self._plan is not None:
            self._finish_part(part, digest, members)
        else:
            # Its attempt is over, but a later one may come to the same bytes, and nobody sends them a second time.
            self.blob_held(digest, now)

    def blob_held(self, digest: bytes, now: float) -> None:
        """The bytes of a result part are here, checked against their digest."""
        for part in self._hold(digest):
            assert self._lead is not None
            self._lead.heard_s[self._owner(part)] = now
            self._note_finished(self._owner(part), now)
        self._evaluate(now)

    def applied(self, head: Head, now: float) -> None:
        """The committed round is applied, or the state was fetched at a later round: `head` is the new base."""
        assert head.round >= self.round, "rounds only go forward"
        self._note_round(now)
        if self._decided is not None:
            self._note_certificate(self._decided, now)
        self._begin_round(head, now)

    def abstain(self, now: float, *, for_good: bool = False) -> None:
        """The disk has forgotten what was signed: sign nothing until that can do no harm (protocol.abstention)."""
        self._abstention = Abstention(self._me, now, self._rules.presence_timeout_s, lasts=for_good)
        for presence in self._members.values():
            self._abstention.observe(presence, now)
        if self._decided is None:
            self._enter_attempt(self.attempt, now)

    @property
    def abstention(self) -> Abstention | None:
        """While this peer abstains."""
        return self._abstention

    def has_forgotten(self, certificate: Certificate) -> bool:
        """Whether this peer's vote is in a certificate and its record does not know of it: the disk is older than what
        was signed. A record of a later round, or of another log, says nothing about this one."""
        result, vote, saved = certificate.result, self._vote, self._saved_vote
        if is_reroot(certificate) or all(one.voter != self._me for one in certificate.votes):
            return False
        if self._abstention is not None or vote.left or vote.pledge is not None:
            return False
        if (vote.round, vote.base) == (result.round, result.previous) and vote.accepted is not None:
            return vote.accepted != result
        return saved is None or saved.round < result.round or (saved.round, saved.base) == (vote.round, vote.base)

    def leave_log(self, pledge: Pledge) -> VoteRecord:
        """Begin to go over to another log: lawful after a re-root only; the shell has compared the two. The record must
        be durable before anything of the own log is given up; then comes `switch`, and no other call before it."""
        vote = self._vote
        fields = {name: getattr(vote, name) for name in LeftRecord.__slots__}
        left = vote.left
        if vote.promised or vote.led or vote.accepted is not None or vote.locked_digest != bytes(32):
            kept = (one for one in left if (one.round, one.base) != (vote.round, vote.base))
            left = (*kept, LeftRecord(**fields))[-LEFT_RECORDS_MAX:]
        self._vote = self._saved_vote = VoteRecord(round=pledge.first, pledge=pledge, left=left)
        return self._vote

    def switch(self, head: Head, now: float) -> None:
        """Go on from `head`, the newest common round whose state is here."""
        self._log = {number: digest for number, digest in self._log.items() if number < head.round}
        self._last_certificate = None
        self._contributed = dict.fromkeys(self._contributed)  # what they declared there they need not answer for here
        self._begin_round(head, now)

    def resume(self, vote: VoteRecord, now: float) -> None:
        """Go on as after a restart, because the shell could not make durable what it was asked to: `vote` is what is.
        What was wanted after that was never done, so nobody has heard of it. What others have sent stays: they would
        not send it again."""
        inbox, held, offer, is_planned = self._inbox, self._held, self._offer, self._is_planned
        self._saved_vote = self._vote = vote
        self._began_s = now
        self._clear_round(self.head)
        self._inbox, self._held, self._offer, self._is_planned = inbox, held, offer, is_planned
        self._begin_attempt(now)
        self._evaluate(now)

    def pledge(self) -> Pledge | None:
        """The log that this peer goes over to, until it has applied as much of it as it had compared."""
        return self._vote.pledge

    def handle_deadline(self, now: float) -> None:
        """`next_deadline` has passed."""
        self._evaluate(now)

    def _observe_forgetful(self, presence: Presence, now: float) -> None:
        if self._abstention is None:
            return
        self._abstention.observe(presence, now)
        is_open = self._decided is None and not self._abstention.goes_on
        if is_open and self._abstention.may_go_on(self.head.voters, self._authority.rule, now):
            self._abstain_in_round(self._abstention, now)
            self._enter_attempt(self._vote.promised, now)

    def _note_certificate(self, certificate: Certificate, now: float) -> None:
        if self.has_forgotten(certificate):
            self.abstain(now)
        elif self._abstention and self._abstention.is_over(certificate, self.head.voters, self._authority.rule):
            self._abstention = None

    # -- messages ------------------------------------------------------------------------------------------------

    def _dispatch(self, message: ROUND_MESSAGES, sender: PeerId, now: float) -> None:
        match message:
            case Prepare():
                self._take_prepare(message, sender, now)
            case Promise():
                self._take_promise(message, sender, now)
            case Nack():
                self._take_nack(message, sender, now)
            case Plan():
                self._take_plan(message, sender, now)
            case Contribution():
                self._inbox.take_digests(sender, message.digests, now, self._expected())
            case PartDone():
                self._take_part_done(message, sender, now)
            case Proposal():
                self._take_proposal(message, sender, now)
            case Lock():
                self._take_lock(message, sender, now)
            case Locked():
                self._take_locked(message, sender)
            case Vote():
                self._take_vote(message, sender, now)
            case Certified():
                self._decide(message.certificate, now)

    def _answer_late(self, message: ROUND_MESSAGES, number: int, sender: PeerId) -> None:
        certificate = self._decided or self._last_certificate
        asks = isinstance(message, Prepare | Plan | Proposal)
        if asks and certificate and certificate.result.round == number:
            self._send(sender, Certified(certificate=certificate))

    def _help_behind(self, presence: Presence, now: float) -> None:
        if now < self._began_s + HELP_DELAY_S or not (self._leaving or self._me in self._order[:HELPERS]):
            return
        # The one certificate that a lost message may have cost it; whoever is further behind asks for more.
        last = self._last_certificate
        if last and presence.head_round == self.head.round - 1 and last.result.round == self.head.round:
            self._send(presence.peer, Certified(certificate=last))

    def _is_elsewhere(self, peer: PeerId) -> bool:
        """Whether the peer's newest presence shows another log: its ballots may name other voters and proposers."""
        known = self._members.get(peer)
        digest = self._log.get(known.head_round) if known else None
        return known is not None and digest is not None and digest != known.head_digest

    def _shares_head(self, peer: PeerId) -> bool:
        known = self._members.get(peer)
        return known is not None and (known.head_round, known.head_digest) == (self.head.round, self.head.digest)

    def _keep_early(self, message: ROUND_MESSAGES, number: int, sender: PeerId) -> bool:
        if number != self.round + 1 or len(self._early) >= EARLY_MESSAGES_MAX:
            return False
        if Counter(peer for peer, _ in self._early)[sender] >= EARLY_PER_SENDER_MAX:
            return False
        self._early.append((sender, message))
        return True

    # -- from round to round -------------------------------------------------------------------------------------

    def _note_round(self, now: float) -> None:
        """What this round told about its members' pace."""
        self._note_commit(now)
        if self._plan:
            owners = frozenset(self._owner(part) for part in range(self._parts))
            for peer in self._roster_peers():
                if peer not in owners:
                    self._owner_pace.relax(peer)
            self._shares.note_round(self.round, owners | self._slow_owners, frozenset(self._slow_owners))
        if self._decided:
            counted = list_counted(self._decided.result)
            peers = tuple(counted)
            self._ready_pace.include(peers, now)
            for peer in peers:
                self._contributed.pop(peer, None)
                self._contributed[peer] = counted[peer]
            while len(self._contributed) > CONTRIBUTED_MAX:
                del self._contributed[next(iter(self._contributed))]

    def _begin_round(self, head: Head, now: float) -> None:
        self._began_s = now
        self._clear_round(head)
        self._begin_attempt(now)
        early, self._early = self._early, []
        for sender, message in early:
            try:
                self.receive(message, sender, now)
            except ProtocolError:
                continue  # it could not be judged when it came; dropping it costs the sender nothing
        self._evaluate(now)

    # -- deciding what to do -------------------------------------------------------------------------------------

    def _evaluate(self, now: float) -> None:
        """The one place that acts on time and on who is there. Idempotent: called after every input."""
        self._now_s = now
        self._note_quorum()
        self._watch_quorum(now)
        if self.phase is Phase.APPLY:
            return
        if self._decided:
            self._apply_if_held(now)
            return
        if self._waits_for_quorum():
            self._wait_for_quorum()
            return
        why = self._why_led_by_nobody()
        if why is not None and not all(map(self._leads_nothing, self._order)):
            self._give_up_attempt(why, now)
        elif self.phase is Phase.PREPARE and self._deadline_s is None:
            self._deadline_s = now + self._rules.plan_timeout_s * self._backoff()  # a quorum has come into sight
        elif self._deadline_s is not None and now >= self._deadline_s:
            self._note_commit(now)
            self._give_up_attempt(PHASE_TIMEOUTS[self.phase], now)
        if self.phase is Phase.GATHER:
            self._gather(now)
        if self.phase is Phase.EXCHANGE:
            self._collect(now)
            if self._lead:
                self._watch_owners(now)
        if self.phase is Phase.COMMIT and self._proposal:
            self._fetch_missing(self._proposal.result, now)
            self._vote_if_held()

    def _note_quorum(self) -> None:
        live, needed = self._live_voters(), self._quorum_size()
        if (live >= needed) is not self._had_quorum:
            self._had_quorum = live >= needed
            self._effects.append(QuorumSeen(round=self.round, in_sight=self._had_quorum, live=live, needed=needed))

    def _wait_for_quorum(self) -> None:
        """Without a quorum in sight nothing can be certified in any attempt: no clock runs, and none is given up."""
        self._deadline_s = None
        if self._lead:
            self._lead.grace_ends_s = self._lead.awaited_until_s = None

    def _gather(self, now: float) -> None:
        ready = self._ready_members()
        self._note_ready(ready, now)
        self._end_training(ready)
        if self._lead:
            self._gather_as_proposer(ready, now)
            return
        # A follower gives the proposer the grace window and one time-out from when it sees enough ready members, and
        # more while it would itself wait.
        timeout_s = self._rules.plan_timeout_s * self._backoff()
        if len(ready) < self._rules.peers_min and not (self._leaving and self._votes()):
            self._deadline_s = None
            return
        if self._deadline_s is None:
            self._deadline_s = now + self._rules.grace_s * self._backoff() + timeout_s
        worthy_end_s = self._find_worthy_end_s(ready, self._unready(ready), now)
        if worthy_end_s > now:
            self._deadline_s = max(self._deadline_s, worthy_end_s + timeout_s)

    def _note_ready(self, ready: Mapping[PeerId, SignedReady], now: float) -> None:
        """In every phase: who comes too late for a round has not taken until the next one."""
        for peer in sorted(set(ready) - self._had_ready):
            self._had_ready.add(peer)
            self._ready_pace.note_ready(peer, now)

    def _end_training(self, ready: Mapping[PeerId, SignedReady]) -> None:
        """The round is over for half of the other voters: who began to train later ends together with them."""
        if self._training_ended or self._offer is not None or not self._trains:
            return
        known = self._members
        others = [peer for peer in self.head.voters if peer != self._me and peer not in self._lost]
        others = [peer for peer in others if peer not in known or (known[peer].trains and not known[peer].leaving)]
        is_over = others and 2 * len(ready.keys() & others) >= len(others)
        if is_over and len({*ready, self._me}) >= self._rules.peers_min:
            self._training_ended = True
            self._effects.append(EndTraining(round=self.round))

    def _unready(self, ready: Mapping[PeerId, SignedReady]) -> list[PeerId]:
        """Who trains and is not ready."""
        trainers = {peer for peer, known in self._members.items() if known.trains}
        if self._trains and not self._leaving:
            trainers.add(self._me)
        return sorted(trainers - set(ready) - self._absent())

    def _gather_as_proposer(self, ready: Mapping[PeerId, SignedReady], now: float) -> None:
        assert self._lead is not None
        empty = make_empty_result(self.head, self._rules.codec_out, self._leavers())
        if empty is not None:
            self._propose(empty, None, now)
            return
        if len(ready) < self._rules.peers_min:
            self._lead.grace_ends_s = self._lead.awaited_until_s = None
            return
        if self._lead.grace_ends_s is None:
            self._lead.grace_ends_s = now + self._rules.grace_s
        unready = self._unready(ready)
        times = [self._worth_until_s(peer, self._lead.grace_ends_s) for peer in unready]
        times.append(self._find_worthy_end_s(ready, unready, now))
        waits = [until_s for until_s in times if until_s > now]
        self._lead.awaited_until_s = max(waits, default=None)
        if not waits:
            for peer in unready:
                if self._is_known(peer):
                    self._ready_pace.note_missing(peer, self._began_s, now)
            self._plan_attempt(ready, now)

    def _is_known(self, peer: PeerId) -> bool:
        return peer in self.head.voters or peer in self._contributed

    def _worth_until_s(self, peer: PeerId, grace_ends_s: float) -> float:
        """Until when the round waits for a peer that is not ready, whatever that costs: no longer than it ever takes,
        nor past the grace window, and not at all when it is not to be expected in there. Who has contributed before and
        is not measured, as after a restart, has the whole window; a newcomer has none of it (adaptive grace: Decoupled
        DiLoCo, arXiv 2604.21428)."""
        expected = self._ready_pace.expected_s(peer)
        if expected is None:
            return grace_ends_s if self._is_known(peer) else 0.0
        usual_s, latest_s = expected
        return min(latest_s, grace_ends_s) if usual_s + MARGIN_S <= grace_ends_s else 0.0

    def _find_worthy_end_s(self, ready: Mapping[PeerId, SignedReady], unready: list[PeerId], now: float) -> float:
        """Until when waiting pays, past the grace window, too: of peers that are out of step some wait for the others.
        Who does not come when it is expected has the grace window once more, and then counts no more in this round."""
        round_s = self._ready_pace.usual_s((*ready, *unready))
        if round_s is None or round_s <= 0.0:
            return now
        times = []
        for expected in map(self._ready_pace.expected_s, unready):
            if expected is not None:
                usual_s, latest_s = expected
                times.append(usual_s if usual_s > now else min(latest_s, usual_s + self._rules.grace_s))
        return find_worthy_end_s(now, len(ready), round_s, (at for at in times if at > now))
