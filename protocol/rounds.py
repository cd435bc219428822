"""The round core: one peer's state machine of a training round, from READY to certificate.

Attempts are the ballots of single-decree Paxos over the voters of the round (Lamport, "Paxos Made Simple", 2001).
Attempt 0 needs no prepare phase; its proposer plans as soon as enough members are ready. Whoever finds the proposer
lost or silent moves to the next attempt, whose proposer first collects promises and must propose again what may be
certified.

    GATHER -> EXCHANGE -> COMMIT -> (FETCH) -> APPLY -> GATHER of the next round
    a failed attempt: any of the first three -> PREPARE (its next proposer) or GATHER (everyone else)

Sans-IO: time comes in as `now` (seconds, monotonic), messages and facts come in as calls, and `take_effects` hands out
what the shell must do. After every call the shell takes the effects and re-arms `next_deadline`.

Invariants: at most one vote is signed per (round, attempt), and it is persisted, with the update's bytes, before it is
sent; no attempt lower than a promise is voted in; nothing is committed without a certificate.
"""

from collections.abc import Mapping
from dataclasses import replace

from shoal.protocol.effects import (
    AttemptFailed,
    Behind,
    Commit,
    Effect,
    FetchBlob,
    PartReassigned,
    Persist,
    Phase,
    Planned,
    Reduce,
    SenderMissing,
    SendPart,
    SendResult,
    VoteRecord,
)
from shoal.protocol.errors import Failure, ProtocolError, Refusal
from shoal.protocol.exchange import Collection, list_delivered, list_missing
from shoal.protocol.identity import PeerId, short_peer_id
from shoal.protocol.messages import (
    ROUND_MESSAGES,
    Certificate,
    Certified,
    Contribution,
    Nack,
    PartDone,
    Plan,
    Prepare,
    Presence,
    Promise,
    Proposal,
    Result,
    SignedReady,
    Vote,
    digest_record,
    sign_message,
    verify_message,
)
from shoal.protocol.proposer import (
    check_plan,
    choose_accepted,
    choose_owner,
    make_empty_result,
    make_plan,
    make_result,
    revise_plan,
)
from shoal.protocol.quorum import (
    Head,
    check_bitmap,
    check_certificate,
    check_result,
    make_bitmap,
    quorum_size,
)
from shoal.protocol.round_state import (
    ATTEMPTS_AHEAD_MAX,
    BEHIND_RETRY_S,
    EARLY_MESSAGES_MAX,
    FETCH_DELAY_S,
    FETCH_RETRY_S,
    PHASE_TIMEOUTS,
    Offer,
    RoundState,
    Setting,
    round_of,
)


class RoundCore(RoundState):
    """See the module's docstring. One instance lives as long as the daemon and walks from round to round."""

    def __init__(self, setting: Setting, head: Head, vote: VoteRecord | None, now: float) -> None:
        super().__init__(setting, head, vote, now)
        self._begin_attempt(now)
        self._evaluate(now)

    # -- what the shell calls ------------------------------------------------------------------------------------

    def take_effects(self) -> list[Effect]:
        """What to do now, in this order."""
        effects, self._effects = self._effects, []
        return effects

    def observe(self, presence: Presence, now: float) -> None:
        """A verified presence that is newer than what was known: this peer is alive."""
        self._members[presence.peer] = presence
        self._lost.discard(presence.peer)
        self._note_behind(presence.peer, presence.head_round, now)
        self._evaluate(now)

    def lose(self, peer: PeerId, now: float) -> None:
        """The peer is no longer counted as alive."""
        self._lost.add(peer)
        self._members.pop(peer, None)
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

    def leave(self, now: float) -> None:
        """This peer is about to stop: it becomes ready for nothing more and asks not to be counted as a voter."""
        self._leaving = True
        self._evaluate(now)

    def receive(self, message: ROUND_MESSAGES, sender: PeerId, now: float) -> None:
        """Take a message from an authenticated peer; raises ProtocolError for one that it must not send."""
        number = round_of(message)
        if number < self.round or (self._decided and number == self.round):
            self._answer_late(message, number, sender)
        elif number > self.round:
            self._note_behind(sender, number - 1, now)
            if number == self.round + 1 and len(self._early) < EARLY_MESSAGES_MAX:
                self._early.append((sender, message))
        else:
            self._dispatch(message, sender, now)
            self._evaluate(now)

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
            self._inbox.take_part(sender, part, digest, now)
            self._evaluate(now)

    def part_reduced(self, round_number: int, attempt: int, part: int, digest: bytes, members: frozenset[int]) -> None:
        """A `Reduce` is done; `members` are the roster indices that went in. The result's bytes are held."""
        if round_number != self.round or self._plan is None or self.attempt != attempt:
            return
        self._held.add(digest)
        done = PartDone(
            round=self.round,
            attempt=attempt,
            part=part,
            digest=digest,
            contributors=make_bitmap(members, len(self._plan.roster)),
        )
        self._send(self._proposer(), sign_message(self._identity, self._swarm, done))
        for peer in self._audience():
            if peer != self._me:
                self._effects.append(SendResult(peer=peer, round=self.round, part=part, digest=digest))

    def blob_held(self, digest: bytes, now: float) -> None:
        """The bytes of a result part are here, checked against their digest."""
        self._held.add(digest)
        self._evaluate(now)

    def applied(self, head: Head, now: float) -> None:
        """The committed round is applied, or the state was fetched at a later round: `head` is the new base."""
        assert head.round >= self.round, "rounds only go forward"
        self._clear_round(head)
        self._begin_attempt(now)
        early, self._early = self._early, []
        for sender, message in early:
            try:
                self.receive(message, sender, now)
            except ProtocolError:
                continue  # it could not be judged when it came; dropping it costs the sender nothing
        self._evaluate(now)

    def handle_deadline(self, now: float) -> None:
        """`next_deadline` has passed."""
        self._evaluate(now)

    # -- messages ------------------------------------------------------------------------------------------------

    def _dispatch(self, message: ROUND_MESSAGES, sender: PeerId, now: float) -> None:
        match message:
            case Prepare():
                self._take_prepare(message, sender, now)
            case Promise():
                self._take_promise(message, sender, now)
            case Nack():
                if self._leads(message.attempt) and message.promised > message.attempt:
                    self._check_voter(sender)
                    self._check_jump(message.promised)
                    self._fail_attempt(Failure.SUPERSEDED, sender, now, message.promised)
            case Plan():
                self._take_plan(message, sender, now)
            case Contribution():
                self._inbox.take_digests(sender, message.digests, now, self._expected())
            case PartDone():
                self._take_part_done(message, sender, now)
            case Proposal():
                self._take_proposal(message, sender, now)
            case Vote():
                self._take_vote(message, sender, now)
            case Certified():
                self._decide(message.certificate, now)

    def _check_proposer(self, attempt: int, sender: PeerId) -> None:
        if sender != self._proposer(attempt):
            problem = f"attempt {attempt} of round {self.round} belongs to {short_peer_id(self._proposer(attempt))}"
            raise ProtocolError(Refusal.WRONG_PROPOSER, problem)

    def _check_voter(self, sender: PeerId) -> None:
        if sender not in self.head.voters:
            raise ProtocolError(Refusal.NOT_A_MEMBER, f"{short_peer_id(sender)} is no voter of round {self.round}")

    def _check_jump(self, attempt: int) -> None:
        # Attempts count time-outs; a number out of all proportion would only use up the field.
        if attempt > self.attempt + ATTEMPTS_AHEAD_MAX:
            raise ProtocolError(
                Refusal.OUT_OF_RANGE, f"attempt {attempt} of round {self.round}, we are at {self.attempt}"
            )

    def _check_result(self, result: Result) -> None:
        check_result(result, self.head, self._parts)
        if result.codec != self._rules.codec:
            raise ProtocolError(Refusal.NOT_PLANNED, f"result in codec {result.codec}, not {self._rules.codec}")

    def _take_prepare(self, message: Prepare, sender: PeerId, now: float) -> None:
        self._check_proposer(message.attempt, sender)
        self._check_jump(message.attempt)
        if not self._votes():
            return
        # A voter whose attempt makes progress does not help another to end it; every phase has its deadline.
        busy = self.phase in (Phase.EXCHANGE, Phase.COMMIT) and self.attempt < message.attempt
        if message.attempt < self._vote.promised or (busy and self._proposer() not in self._lost):
            self._send(sender, Nack(round=self.round, attempt=message.attempt, promised=self._vote.promised))
            return
        if message.attempt > self._vote.promised:
            self._vote = replace(self._vote, promised=message.attempt)
            self._effects.append(Persist(vote=self._vote))
        if message.attempt > self.attempt:
            self._enter_attempt(message.attempt, now)
        self._send(sender, self._promise(message.attempt))

    def _promise(self, attempt: int) -> Promise:
        return Promise(
            round=self.round,
            attempt=attempt,
            accepted_attempt=self._vote.accepted_attempt,
            accepted=self._vote.accepted,
        )

    def _take_promise(self, message: Promise, sender: PeerId, now: float) -> None:
        self._check_voter(sender)
        if not self._leads(message.attempt) or self.phase is not Phase.PREPARE:
            return
        assert self._lead is not None
        if message.accepted is not None:
            self._check_result(message.accepted)
        self._lead.promises[sender] = message
        if len(self._lead.promises) >= quorum_size(len(self.head.voters), self._quorum):
            accepted = choose_accepted(self._lead.promises)
            self._set_phase(Phase.GATHER, None)
            if accepted is not None:
                self._propose(accepted, now)

    def _take_plan(self, plan: Plan, sender: PeerId, now: float) -> None:
        self._check_proposer(plan.attempt, sender)
        verify_message(sender, self._swarm, plan)
        # Only a promise binds. A peer that gave up on this attempt too early, and waits, comes back to it.
        if plan.attempt < self._vote.promised or (plan.attempt < self.attempt and self.phase is not Phase.GATHER):
            self._send(sender, Nack(round=self.round, attempt=plan.attempt, promised=self._vote.promised))
            return
        check_plan(plan, self.head, self._rules.codec, self._parts, self._swarm)
        if self._decided or (plan.attempt == self.attempt and self.phase is Phase.COMMIT):
            return
        if plan.attempt == self.attempt and self._plan:
            # Reductions of this attempt are under way; their bitmaps mean this roster.
            if plan.roster != self._plan.roster:
                raise ProtocolError(
                    Refusal.EQUIVOCATION, f"two rosters in attempt {plan.attempt} of round {plan.round}"
                )
            if plan.revision <= self._plan.revision:
                return
        if plan.attempt != self.attempt:
            self._enter_attempt(plan.attempt, now)
        self._follow_plan(plan, now)

    def _take_part_done(self, message: PartDone, sender: PeerId, now: float) -> None:
        if not self._leads(message.attempt) or self._plan is None or self.phase is not Phase.EXCHANGE:
            return
        assert self._lead is not None
        verify_message(sender, self._swarm, message)
        if message.part >= self._parts or sender != self._owner(message.part):
            return  # the part has been given to another owner since
        check_bitmap(message.contributors, len(self._plan.roster))
        self._lead.done.setdefault(message.part, message)
        self._lead.heard_s[sender] = now

    def _take_proposal(self, message: Proposal, sender: PeerId, now: float) -> None:
        self._check_proposer(message.attempt, sender)
        self._check_result(message.result)
        if message.attempt < self._vote.promised:
            self._send(sender, Nack(round=self.round, attempt=message.attempt, promised=self._vote.promised))
        elif not self._decided:
            self._follow_proposal(message, now)

    def _take_vote(self, vote: Vote, sender: PeerId, now: float) -> None:
        if vote.voter != sender:
            raise ProtocolError(Refusal.WRONG_PEER, "a vote was sent by somebody else")
        self._check_voter(sender)
        if not self._leads(vote.attempt) or self._proposal is None or self._decided:
            return
        assert self._lead is not None
        if vote.result_digest != digest_record(self._proposal.result):
            raise ProtocolError(Refusal.WRONG_DIGEST, "a vote is for another result than was proposed")
        verify_message(sender, self._swarm, vote)
        self._lead.votes[sender] = vote
        if len(self._lead.votes) >= quorum_size(len(self.head.voters), self._quorum):
            votes = tuple(self._lead.votes[peer] for peer in sorted(self._lead.votes))
            certificate = Certificate(result=self._proposal.result, attempt=vote.attempt, votes=votes)
            self._decide(certificate, now)
            for peer in sorted({*self._members, *self._audience()} - self._lost - {self._me}):
                self._send(peer, Certified(certificate=certificate))

    def _answer_late(self, message: ROUND_MESSAGES, number: int, sender: PeerId) -> None:
        certificate = self._decided or self._last_certificate
        asks = isinstance(message, Prepare | Plan | Proposal)
        if asks and certificate and certificate.result.round == number:
            self._send(sender, Certified(certificate=certificate))

    def _note_behind(self, peer: PeerId, head_round: int, now: float) -> None:
        # While this round is being fetched or applied, a peer one round ahead is no news.
        slack = 1 if self.phase in (Phase.APPLY, Phase.FETCH) else 0
        if head_round >= self.round + slack and now >= self._behind_after_s:
            self._behind_after_s = now + BEHIND_RETRY_S
            self._effects.append(Behind(peer=peer, round=head_round))

    # -- following -----------------------------------------------------------------------------------------------

    def _enter_attempt(self, attempt: int, now: float) -> None:
        self._clear_attempt(attempt)
        self._begin_attempt(now)

    def _begin_attempt(self, now: float) -> None:
        # Attempt 0 is the lowest: nothing can have been voted for before it, so it needs no promises.
        if self._lead and self.attempt > 0:
            self._prepare(now)

    def _prepare(self, now: float) -> None:
        assert self._lead is not None
        attempt = self._lead.attempt
        self._vote = replace(self._vote, promised=attempt)
        self._effects.append(Persist(vote=self._vote))
        self._set_phase(Phase.PREPARE, now + self._rules.plan_timeout_s * self._backoff())
        for peer in self.head.voters:
            if peer != self._me and peer not in self._lost:
                self._send(peer, Prepare(round=self.round, attempt=attempt))
        self._take_promise(self._promise(attempt), self._me, now)

    def _follow_plan(self, plan: Plan, now: float) -> None:
        first = self._plan is None
        self._plan = plan
        if first:
            self._set_phase(Phase.EXCHANGE, now + self._rules.exchange_timeout_s * self._backoff())
        mine = self._index(self._me)
        for part, owner in enumerate(plan.owners):
            if owner == mine:
                self._collections.setdefault(part, Collection(part=part, started_s=now))
            else:
                self._collections.pop(part, None)
        entry = plan.roster[mine] if mine is not None else None
        root = entry.signed.ready.contribution_root if entry else None
        if self._offer and self._offer.signed.ready.contribution_root == root:
            self._send_parts(self._offer)

    def _send_parts(self, offer: Offer) -> None:
        assert self._plan is not None
        informed = {owner for owner, _ in self._sent}
        for part, digest in enumerate(offer.digests):
            owner = self._owner(part)
            if owner == self._me or (owner, part) in self._sent:
                continue
            if owner not in informed:
                informed.add(owner)
                self._send(owner, Contribution(round=self.round, digests=offer.digests))
            self._sent.add((owner, part))
            self._effects.append(SendPart(peer=owner, round=self.round, part=part, digest=digest))

    def _follow_proposal(self, proposal: Proposal, now: float) -> None:
        if self._proposal and self._proposal.attempt >= proposal.attempt:
            return
        if proposal.attempt > self.attempt:
            self._enter_attempt(proposal.attempt, now)
        self._proposal = proposal
        self._voted = False
        self._fetch_s = now + FETCH_DELAY_S
        self._set_phase(Phase.COMMIT, now + self._rules.commit_timeout_s * self._backoff())

    def _vote_if_held(self) -> None:
        proposal = self._proposal
        if not proposal or self._voted or not self._votes() or self._missing(proposal.result):
            return
        accepted = self._vote.accepted
        again = accepted is not None and self._vote.accepted_attempt == proposal.attempt
        if proposal.attempt < self._vote.promised or (again and accepted != proposal.result):
            return
        self._voted = True
        self._vote = replace(
            self._vote, promised=proposal.attempt, accepted_attempt=proposal.attempt, accepted=proposal.result
        )
        digests = tuple(dict.fromkeys(part.digest for part in proposal.result.parts))
        self._effects.append(Persist(vote=self._vote, digests=digests))
        vote = Vote(
            voter=self._me,
            round=self.round,
            attempt=proposal.attempt,
            result_digest=digest_record(proposal.result),
        )
        self._send(self._proposer(proposal.attempt), sign_message(self._identity, self._swarm, vote))

    def _decide(self, certificate: Certificate, now: float) -> None:
        check_certificate(certificate, self.head, self._quorum, self._parts, self._swarm)
        if self._decided:
            return
        self._decided = certificate
        if self._missing(certificate.result):
            # To whoever takes part the bytes are on their way; everyone else has to ask for them.
            self._fetch_s = now + FETCH_DELAY_S if self._plan else now
            self._set_phase(Phase.FETCH, None)

    def _missing(self, result: Result) -> list[int]:
        return [number for number, part in enumerate(result.parts) if part.digest not in self._held]

    def _fetch_missing(self, result: Result, now: float) -> None:
        missing = self._missing(result)
        if not missing:
            self._fetch_s = None
            return
        if self._fetch_s is None or now < self._fetch_s:
            return
        self._fetch_s = now + FETCH_RETRY_S
        known = [self._proposer(), *self._roster_peers(), *self._members]
        live = tuple(dict.fromkeys(peer for peer in known if peer != self._me and peer not in self._lost))
        for part in missing:
            owner = (self._owner(part),) if self._plan else ()
            candidates = tuple(dict.fromkeys(peer for peer in (*owner, *live) if peer in live))
            digest = result.parts[part].digest
            self._effects.append(FetchBlob(round=self.round, part=part, digest=digest, candidates=candidates))

    # -- deciding what to do -------------------------------------------------------------------------------------

    def _evaluate(self, now: float) -> None:
        """The one place that acts on time and on who is there. Idempotent: called after every input."""
        self._now_s = now
        if self.phase is Phase.APPLY:
            return
        if self._decided:
            self._fetch_missing(self._decided.result, now)
            if not self._missing(self._decided.result):
                self._last_certificate = self._decided
                self._set_phase(Phase.APPLY, None)
                self._effects.append(Commit(certificate=self._decided))
            return
        if self._proposer() in self._lost and not self._lost.issuperset(self._order):
            self._fail_attempt(Failure.PROPOSER_LOST, self._proposer(), now)
        elif self._deadline_s is not None and now >= self._deadline_s:
            self._fail_attempt(PHASE_TIMEOUTS[self.phase], self._proposer(), now)
        if self.phase is Phase.GATHER:
            self._gather(now)
        if self.phase is Phase.EXCHANGE:
            self._collect(now)
            if self._lead:
                self._watch_owners(now)
        if self.phase is Phase.COMMIT and self._proposal:
            self._fetch_missing(self._proposal.result, now)
            self._vote_if_held()

    def _fail_attempt(self, reason: Failure, peer: PeerId | None, now: float, superseded_by: int = 0) -> None:
        self._effects.append(AttemptFailed(round=self.round, attempt=self.attempt, reason=reason, peer=peer))
        self._failures += 1
        self._last_failure = reason
        following = max(self.attempt + 1, superseded_by)
        for _ in self._order:
            if self._proposer(following) not in self._lost:
                break
            following += 1
        self._enter_attempt(following, now)

    def _gather(self, now: float) -> None:
        ready = self._ready_members()
        if self._lead:
            absent = self._absent()
            empty = make_empty_result(self.head, self._rules.codec, self._leavers())
            if empty is not None:
                self._propose(empty, now)
                return
            if len(ready) < self._rules.peers_min:
                self._lead.grace_ends_s = None
                return
            if self._lead.grace_ends_s is None:
                self._lead.grace_ends_s = now + self._rules.grace_s
            waited = {peer for peer, known in self._members.items() if known.trains} - set(ready) - absent
            if not waited or now >= self._lead.grace_ends_s:
                self._plan_attempt(ready, now)
            return
        # A follower gives the proposer the grace window and one time-out from when it sees enough ready members.
        if len(ready) < self._rules.peers_min and not (self._leaving and self._votes()):
            self._deadline_s = None
        elif self._deadline_s is None:
            patience_s = self._rules.grace_s + self._rules.plan_timeout_s
            self._deadline_s = now + patience_s * self._backoff()

    def _plan_attempt(self, ready: Mapping[PeerId, SignedReady], now: float) -> None:
        assert self._lead is not None
        plan = make_plan(self.head, self.attempt, self._rules.codec, ready, self._parts)
        if plan is None:
            return
        self._mark_led()
        self._effects.append(
            Planned(
                round=self.round,
                attempt=self.attempt,
                roster=tuple(entry.signed.peer for entry in plan.roster),
            )
        )
        for part in range(self._parts):
            self._lead.tried[part] = [plan.roster[plan.owners[part]].signed.peer]
        self._announce_plan(plan, now)

    def _announce_plan(self, plan: Plan, now: float) -> None:
        assert self._lead is not None
        signed = sign_message(self._identity, self._swarm, plan)
        self._follow_plan(signed, now)
        for owner in {self._owner(part) for part in range(self._parts)}:
            self._lead.heard_s[owner] = now
        for peer in self._audience():
            self._send(peer, signed)

    def _collect(self, now: float) -> None:
        plan = self._plan
        assert plan is not None
        for collection in self._collections.values():
            if collection.reduced:
                continue
            lost = frozenset(self._lost)
            missing, pending = list_missing(plan, collection, self._inbox, lost, self._rules.sender_timeout_s, now)
            indices = list_delivered(plan, collection.part, self._inbox)
            if pending or not indices:
                continue
            collection.reduced = True
            for one in missing:
                peer = plan.roster[one.index].signed.peer
                self._effects.append(
                    SenderMissing(round=self.round, part=collection.part, peer=peer, reason=one.reason)
                )
            members = tuple(plan.roster[index] for index in indices)
            self._effects.append(
                Reduce(
                    round=self.round,
                    attempt=self.attempt,
                    part=collection.part,
                    indices=indices,
                    members=members,
                    digests=tuple(self._inbox.digests[entry.signed.peer][collection.part] for entry in members),
                    norms=tuple(entry.signed.ready.norm for entry in plan.roster),
                )
            )

    def _watch_owners(self, now: float) -> None:
        assert self._lead is not None and self._plan is not None
        moves: dict[int, int] = {}
        for part in range(self._parts):
            owner = self._owner(part)
            late = now >= self._owner_deadline(owner)
            if part in self._lead.done or not (owner in self._lost or late):
                continue
            index = choose_owner(self._plan, part, self._lead.tried[part], frozenset(self._lost))
            if index is None:
                self._fail_attempt(Failure.EXCHANGE_TIMEOUT, owner, now)
                return
            moves[part] = index
            new_owner = self._plan.roster[index].signed.peer
            self._lead.tried[part].append(new_owner)
            reason = Failure.OWNER_LOST if owner in self._lost else Failure.OWNER_SLOW
            self._last_failure = reason
            self._effects.append(
                PartReassigned(round=self.round, part=part, old_owner=owner, new_owner=new_owner, reason=reason)
            )
        if moves:
            self._announce_plan(revise_plan(self._plan, moves), now)
            self._collect(now)
        if len(self._lead.done) == self._parts:
            self._propose(make_result(self._plan, self._lead.done, self.head, self._absent()), now)

    def _mark_led(self) -> None:
        # Durable before a plan or a proposal leaves: after a restart there must be no second one in this attempt.
        if self._vote.led <= self.attempt:
            self._vote = replace(self._vote, promised=self.attempt, led=self.attempt + 1)
            self._effects.append(Persist(vote=self._vote))

    def _propose(self, result: Result, now: float) -> None:
        assert self._lead is not None
        self._mark_led()
        proposal = Proposal(attempt=self.attempt, result=result)
        self._follow_proposal(proposal, now)
        for peer in sorted({*self._audience(), *(member.peer for member in result.members)} - {self._me}):
            if peer not in self._lost:
                self._send(peer, proposal)
        self._vote_if_held()
