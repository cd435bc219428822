"""The ballots of a round: attempts, promises, proposals, locks, votes and the certificate.

Attempts are the ballots of single-decree Paxos over the voters of the round (Lamport, "Paxos Made Simple", 2001).
Attempt 0 needs no prepare phase. Where members may lie (quorum = two_thirds), a vote takes two phases, as in PBFT and
Tendermint (Castro and Liskov, 1999; Buchman, Kwon and Milosevic, arXiv 1807.04938): a quorum first locks the
proposal, then votes for it. Who is locked agrees to another result only when it is shown a later lock of a quorum, so
fewer than a third of liars can neither certify two results nor invent one that nobody planned.

Invariants: at most one vote, and one lock, is signed per (round, attempt), and it is persisted, with the update's
bytes, before it is sent; no attempt lower than a promise is voted in; nothing is committed without a certificate.
"""

import math
from dataclasses import replace

from shoal.protocol.effects import AttemptFailed, Behind, Commit, FetchBlob, Forked, Persist, Phase
from shoal.protocol.errors import Failure, ProtocolError, Refusal
from shoal.protocol.identity import PeerId, short_peer_id
from shoal.protocol.messages import (
    Certificate,
    Certified,
    Evidence,
    Lock,
    LockCertificate,
    Locked,
    Nack,
    Plan,
    Prepare,
    Presence,
    Promise,
    Proposal,
    Result,
    Vote,
    digest_record,
    sign_message,
    verify_message,
)
from shoal.protocol.proposer import (
    Lead,
    check_evidence,
    choose_accepted,
    follows_voters,
    make_voters_result,
)
from shoal.protocol.quorum import (
    REROOT_ATTEMPT,
    check_certificate,
    check_lock,
    check_result,
    is_reroot,
)
from shoal.protocol.round_state import (
    ATTEMPTS_AHEAD_MAX,
    BEHIND_RETRY_S,
    FETCH_DELAY_S,
    FETCH_RETRY_S,
    RoundState,
)


class RoundBallot(RoundState):
    """How one attempt after the other comes to one certified result."""

    # -- attempts ------------------------------------------------------------------------------------------------

    def _enter_attempt(self, attempt: int, now: float) -> None:
        self._clear_attempt(attempt)
        self._begin_attempt(now)

    def _begin_attempt(self, now: float) -> None:
        # Attempt 0 is the lowest: nothing can have been voted for before it, so it needs no promises.
        if self._lead and self.attempt > 0:
            self._prepare(now)

    def _fail_attempt(self, reason: Failure, peer: PeerId | None, now: float, superseded_by: int = 0) -> None:
        self._effects.append(AttemptFailed(round=self.round, attempt=self.attempt, reason=reason, peer=peer))
        self._failures += 1
        self._last_failure, self._last_failure_peer = reason, peer
        following = max(self.attempt + 1, superseded_by, self._nacked(), self._refused_attempt)
        for _ in self._order:
            if not self._leads_nothing(self._proposer(following)):
                break
            following += 1
        self._enter_attempt(following, now)

    def _give_up_attempt(self, reason: Failure, now: float) -> None:
        """It leads nowhere. Whoever is ahead of the others waits for them all the same: they come by their own
        deadlines, and if everybody went on, the distance would stay for good (Castro and Liskov, OSDI 1999, section
        4.5.2)."""
        if self._stragglers():
            self._deadline_s = now + self._rules.plan_timeout_s * self._backoff()
        else:
            self._fail_attempt(reason, self._proposer(), now)

    def _check_proposer(self, attempt: int, sender: PeerId) -> None:
        if sender != self._proposer(attempt):
            problem = f"attempt {attempt} of round {self.round} belongs to {short_peer_id(self._proposer(attempt))}"
            raise ProtocolError(Refusal.WRONG_PROPOSER, problem)

    def _check_voter(self, sender: PeerId) -> None:
        if sender not in self.head.voters:
            raise ProtocolError(Refusal.NOT_A_MEMBER, f"{short_peer_id(sender)} is no voter of round {self.round}")

    def _check_jump(self, attempt: int) -> None:
        # Attempts count time-outs; a number out of all proportion would only use up the field.
        if attempt > min(self.attempt + ATTEMPTS_AHEAD_MAX, REROOT_ATTEMPT - 1):
            raise ProtocolError(
                Refusal.OUT_OF_RANGE, f"attempt {attempt} of round {self.round}, we are at {self.attempt}"
            )

    def _may_follow(self, attempt: int) -> bool:
        """Where members may lie, a proposer's word leads to the next attempt and no further; beyond that, to where so
        many voters are heard that one of them is honest. Otherwise one liar could send an honest voter, without whom
        there is no quorum, to an attempt that the others reach in hours."""
        if attempt <= self.attempt + 1 or not self._needs_locks():
            return True
        return attempt <= self._attempt_of_others()

    def _attempt_of_others(self) -> int:
        """The highest attempt that so many other voters have reached that no quorum is left below; -1 without."""
        ahead = sorted(self._attempts_heard.values(), reverse=True)
        needed = self._blocking_size()
        return ahead[needed - 1] if len(ahead) >= needed else -1

    def _check_result(self, result: Result) -> None:
        check_result(result, self.head, self._parts)
        if result.codec != self._rules.codec_out:
            raise ProtocolError(Refusal.NOT_PLANNED, f"result in codec {result.codec}, not {self._rules.codec_out}")
        if len(result.voters) > max(self._rules.voters_max, len(self.head.voters)):
            raise ProtocolError(Refusal.LIMIT, f"{len(result.voters)} voters, at most {self._rules.voters_max}")

    def _sync_attempt(self, presence: Presence, now: float) -> None:
        """Where members may lie, nobody follows one voter's word to a later attempt. But when so many are ahead that no
        quorum is left here, one of them is honest, and this attempt is over (as in PBFT's view change)."""
        if not self._needs_locks() or presence.peer not in self.head.voters or self._decided:
            return
        if presence.head_round != self.head.round or presence.head_digest != self.head.digest:
            return
        self._attempts_heard[presence.peer] = presence.attempt
        ahead = self._attempt_of_others()
        if self.attempt < ahead < REROOT_ATTEMPT:
            self._fail_attempt(Failure.SUPERSEDED, presence.peer, now, ahead)

    def _check_roster_size(self, plan: Plan) -> None:
        if len(plan.roster) < self._rules.peers_min:
            problem = f"a roster of {len(plan.roster)}, rounds.peers_min is {self._rules.peers_min}"
            raise ProtocolError(Refusal.NOT_PLANNED, problem)

    # -- phase 1: promises -----------------------------------------------------------------------------------------

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

    def _prepare_again(self, presence: Presence) -> None:
        """A voter that was lost or in an earlier round when the prepare went out did not get it."""
        lead, peer = self._lead, presence.peer
        if lead is None or self.phase is not Phase.PREPARE or peer not in self.head.voters:
            return
        if presence.head_round == self.head.round and peer not in lead.promises and peer not in lead.nacks:
            self._send(peer, Prepare(round=self.round, attempt=lead.attempt))

    def _promise(self, attempt: int) -> Promise:
        return Promise(
            round=self.round,
            attempt=attempt,
            accepted_attempt=self._vote.accepted_attempt,
            accepted=self._vote.accepted,
            lock=self._vote.lock,
        )

    def _take_prepare(self, message: Prepare, sender: PeerId, now: float) -> None:
        self._check_proposer(message.attempt, sender)
        self._check_jump(message.attempt)
        if not self._votes():
            return
        # A voter whose attempt makes progress does not help another to end it; every phase has its deadline. Where
        # members may lie, every proposer has its time.
        makes_progress = self.phase in (Phase.EXCHANGE, Phase.COMMIT)
        has_time = self._needs_locks() and self._deadline_s is not None
        busy = (makes_progress or has_time) and self.attempt < message.attempt
        is_refused = message.attempt < self._vote.promised or not self._may_follow(message.attempt)
        if is_refused or (busy and self._why_led_by_nobody() is None):
            if busy and not self._needs_locks():
                self._refused_attempt = max(self._refused_attempt, message.attempt)  # where this voter goes next
            self._send(sender, Nack(round=self.round, attempt=message.attempt, promised=self._vote.promised))
            return
        if message.attempt > self._vote.promised:
            self._vote = replace(self._vote, promised=message.attempt)
            self._effects.append(Persist(vote=self._vote))
        if message.attempt > self.attempt:
            self._enter_attempt(message.attempt, now)
        self._send(sender, self._promise(message.attempt))

    def _take_nack(self, message: Nack, sender: PeerId, now: float) -> None:
        if not self._leads(message.attempt):
            self._dropped = Refusal.WRONG_ATTEMPT
            return
        if message.promised <= message.attempt:
            return  # it is busy; the prepare's deadline says when to go on
        assert self._lead is not None
        self._check_voter(sender)
        self._check_jump(message.promised)
        self._lead.nacks[sender] = message.promised
        # So many that no quorum is left without them: whoever has promised more may stay out.
        if len(self._lead.nacks) >= self._blocking_size():
            self._fail_attempt(Failure.SUPERSEDED, sender, now, self._nacked())

    def _nacked(self) -> int:
        """Where those who refused this attempt can be met; one voter's word is not enough where it may lie."""
        if self._lead is None or not self._lead.nacks:
            return 0
        promised = sorted(self._lead.nacks.values(), reverse=True)
        if not self._needs_locks():
            return promised[0]
        return promised[self._blocking_size() - 1] if len(promised) >= self._blocking_size() else 0

    def _take_promise(self, message: Promise, sender: PeerId, now: float) -> None:
        self._check_voter(sender)
        if not self._leads(message.attempt) or self.phase is not Phase.PREPARE:
            self._dropped = Refusal.WRONG_ATTEMPT
            return
        assert self._lead is not None
        if message.accepted is not None:
            self._check_result(message.accepted)
            self._check_claim(message, sender)
        self._lead.promises[sender] = message
        if len(self._lead.promises) >= self._quorum_size():
            chosen = choose_accepted(self._lead.promises)
            self._set_phase(Phase.GATHER, None)
            if chosen is not None:
                assert chosen.accepted is not None
                evidence = Evidence(plan=None, done=(), lock=chosen.lock) if self._needs_locks() else None
                self._propose(chosen.accepted, evidence, now)

    def _check_claim(self, message: Promise, sender: PeerId) -> None:
        assert message.accepted is not None
        if not self._needs_locks():
            return
        if message.lock is None or message.lock.attempt != message.accepted_attempt:
            raise ProtocolError(Refusal.NO_QUORUM, f"{short_peer_id(sender)} is locked without a quorum's locks")
        assert self._lead is not None
        judged = self._lead.promises.values()  # voters that tell of one vote show the same locks
        if any(one.lock == message.lock and one.accepted == message.accepted for one in judged):
            return
        check_lock(message.lock, message.accepted, self.head.voters, self._authority)

    # -- phase 2: proposals, locks and votes ------------------------------------------------------------------------

    def _mark_led(self) -> None:
        # Durable before a plan or a proposal leaves: after a restart there must be no second one in this attempt.
        if self._vote.led <= self.attempt:
            self._vote = replace(self._vote, promised=self.attempt, led=self.attempt + 1)
            self._effects.append(Persist(vote=self._vote))

    def _propose(self, result: Result, evidence: Evidence | None, now: float) -> None:
        assert self._lead is not None
        self._mark_led()
        proposal = Proposal(attempt=self.attempt, result=result, evidence=evidence)
        self._follow_proposal(proposal, now)
        for peer in sorted({*self._audience(), *(member.peer for member in result.members)} - {self._me}):
            if peer not in self._lost:
                self._send(peer, proposal)
        self._vote_if_held()

    def _take_proposal(self, message: Proposal, sender: PeerId, now: float) -> None:
        if message.attempt == REROOT_ATTEMPT:
            self._take_declaration(message, sender, now)
            return
        self._check_result(message.result)
        self._check_proposer(message.attempt, sender)
        self._check_jump(message.attempt)
        if message.attempt < self._vote.promised or not self._may_follow(message.attempt):
            self._send(sender, Nack(round=self.round, attempt=message.attempt, promised=self._vote.promised))
        elif not self._decided:
            known = self._proposal
            if known and known.attempt == message.attempt and known.result != message.result:
                problem = f"two results in attempt {message.attempt} of round {self.round}"
                raise ProtocolError(Refusal.EQUIVOCATION, problem)
            if known == message:
                self._dropped = Refusal.DUPLICATE  # before its evidence, a signature for each part, is judged again
                return
            if self._needs_locks():
                if message.evidence is not None and message.evidence.plan is not None:
                    self._check_roster_size(message.evidence.plan)
                check_evidence(message, sender, self.head, self._rules.codec, self._authority, self._rules.weights)
            self._follow_proposal(message, now)

    def _follow_proposal(self, proposal: Proposal, now: float) -> None:
        if self._proposal and self._proposal.attempt >= proposal.attempt:
            self._dropped = Refusal.DUPLICATE
            return
        if proposal.attempt > self.attempt:
            self._enter_attempt(proposal.attempt, now)
        self._proposal = proposal
        self._voted = self._locks_sent = False
        self._locked = None  # of an earlier attempt's proposal
        self._fetch_s = now + FETCH_DELAY_S
        self._set_phase(Phase.COMMIT, now + self._rules.commit_timeout_s * self._backoff())

    def _vote_if_held(self) -> None:
        proposal = self._proposal
        if not proposal or self._voted or not self._votes() or self._missing(proposal.result):
            return
        if proposal.attempt < self._vote.promised:
            return
        if self._needs_locks():
            if self._locked is None:
                self._lock_on(proposal)
            else:
                self._vote_as_locked(proposal, self._locked.certificate)
            return
        accepted = self._vote.accepted
        again = accepted is not None and self._vote.accepted_attempt == proposal.attempt
        if again and accepted != proposal.result:
            return
        self._voted = True
        self._vote = replace(
            self._vote, promised=proposal.attempt, accepted_attempt=proposal.attempt, accepted=proposal.result
        )
        self._persist_and_vote(proposal)

    def _persist_vote(self, result: Result) -> None:
        """The record, after the bytes that it speaks for."""
        digests = tuple(dict.fromkeys(part.digest for part in result.parts))
        self._effects.append(Persist(vote=self._vote, digests=digests))

    def _persist_and_vote(self, proposal: Proposal) -> None:
        self._persist_vote(proposal.result)
        self._send(self._proposer(proposal.attempt), self._sign_vote(proposal.attempt, proposal.result))

    def _sign_vote(self, attempt: int, result: Result) -> Vote:
        vote = Vote(voter=self._me, round=self.round, attempt=attempt, result_digest=digest_record(result))
        return sign_message(self._identity, self._swarm, vote)

    def _lock_on(self, proposal: Proposal) -> None:
        digest = digest_record(proposal.result)
        vote, evidence = self._vote, proposal.evidence
        if vote.locked_digest != bytes(32) and vote.locked_attempt == proposal.attempt and vote.locked_digest != digest:
            return  # one lock an attempt
        shown = evidence.lock if evidence else None
        if vote.accepted not in (None, proposal.result) and (shown is None or shown.attempt < vote.accepted_attempt):
            return  # a quorum may have voted for what this peer is locked on
        if shown is None and not follows_voters(proposal.result, self.head, self._absent(), self._rules.voters_max):
            return
        self._voted = True
        self._vote = replace(vote, promised=proposal.attempt, locked_attempt=proposal.attempt, locked_digest=digest)
        self._persist_vote(proposal.result)
        lock = Lock(voter=self._me, round=self.round, attempt=proposal.attempt, result_digest=digest)
        self._send(self._proposer(proposal.attempt), sign_message(self._identity, self._swarm, lock))

    def _take_lock(self, lock: Lock, sender: PeerId, now: float) -> None:
        if lock.voter != sender:
            raise ProtocolError(Refusal.WRONG_PEER, "a lock was sent by somebody else")
        self._check_voter(sender)
        if not self._leads(lock.attempt) or self._proposal is None or self._decided or self._locks_sent:
            self._dropped = Refusal.WRONG_ATTEMPT
            return
        assert self._lead is not None
        if lock.result_digest != digest_record(self._proposal.result):
            raise ProtocolError(Refusal.WRONG_DIGEST, "a lock is on another result than was proposed")
        verify_message(sender, self._swarm, lock)
        self._lead.locks[sender] = lock
        if len(self._lead.locks) >= self._quorum_size():
            self._locks_sent = True
            locks = tuple(self._lead.locks[peer] for peer in sorted(self._lead.locks))
            locked = Locked(round=self.round, certificate=LockCertificate(attempt=lock.attempt, locks=locks))
            for peer in self.head.voters:
                if peer != self._me and peer not in self._lost:
                    self._send(peer, locked)
            self._follow_locked(locked)
            self._vote_if_held()

    def _take_locked(self, message: Locked, sender: PeerId) -> None:
        attempt = message.certificate.attempt
        self._check_proposer(attempt, sender)
        if attempt < self._vote.promised:
            self._send(sender, Nack(round=self.round, attempt=attempt, promised=self._vote.promised))
        elif self._proposal is not None and self._proposal.attempt == attempt and not self._decided:
            check_lock(message.certificate, self._proposal.result, self.head.voters, self._authority)
            self._follow_locked(message)
        else:
            self._dropped = Refusal.WRONG_ATTEMPT

    def _follow_locked(self, message: Locked) -> None:
        if self._locked is None:
            self._locked = message
            self._voted = False

    def _vote_as_locked(self, proposal: Proposal, lock: LockCertificate) -> None:
        self._voted = True
        self._vote = replace(
            self._vote,
            promised=proposal.attempt,
            accepted_attempt=proposal.attempt,
            accepted=proposal.result,
            lock=lock,
        )
        self._persist_and_vote(proposal)

    def _take_vote(self, vote: Vote, sender: PeerId, now: float) -> None:
        if vote.voter != sender:
            raise ProtocolError(Refusal.WRONG_PEER, "a vote was sent by somebody else")
        if vote.attempt == REROOT_ATTEMPT:
            self._take_declared_vote(vote, sender, now)
            return
        self._check_voter(sender)
        if not self._leads(vote.attempt) or self._proposal is None or self._decided:
            self._dropped = Refusal.WRONG_ATTEMPT
            return
        assert self._lead is not None
        if vote.result_digest != digest_record(self._proposal.result):
            raise ProtocolError(Refusal.WRONG_DIGEST, "a vote is for another result than was proposed")
        verify_message(sender, self._swarm, vote)
        self._lead.votes[sender] = vote
        if len(self._lead.votes) >= self._quorum_size():
            self._certify(self._proposal.result, vote.attempt, self._lead, now)

    def _certify(self, result: Result, attempt: int, lead: Lead, now: float) -> None:
        votes = tuple(lead.votes[peer] for peer in sorted(lead.votes))
        certificate = Certificate(result=result, attempt=attempt, votes=votes)
        self._decide(certificate, now)
        for peer in sorted({*self._members, *self._audience()} - self._lost - {self._me}):
            self._send(peer, Certified(certificate=certificate))

    # -- the certificate and its bytes ------------------------------------------------------------------------------

    def _decide(self, certificate: Certificate, now: float) -> None:
        check_certificate(certificate, self.head, self._authority)
        if self._decided and not (self.phase is Phase.FETCH and self._is_by_owner(certificate)):
            return
        if not self._follows_reroot(certificate, now) or self._is_update_lost(certificate.result, now):
            return
        self._decided = certificate
        self._saw_quorum = True
        if self._missing(certificate.result):
            # To whoever takes part the bytes are on their way; everyone else has to ask for them.
            self._fetch_s = now + FETCH_DELAY_S if self._plan else now
            self._set_phase(Phase.FETCH, None)

    def _follows_reroot(self, certificate: Certificate, now: float) -> bool:
        """While a quorum stands in this round and gets on, nobody leaves it, unless the owner has spoken. A quorum that
        has certified nothing in the declared time lacks something else, such as peers that have followed the others."""
        if not is_reroot(certificate) or self._is_by_owner(certificate):
            return True
        pledge = self._vote.pledge
        if pledge is not None and (pledge.first, pledge.digest) == (self.round, digest_record(certificate.result)):
            return True
        if now >= self._began_s + self._rules.reroot_after_s:
            return True
        here = [peer for peer, known in self._members.items() if known.head_round <= self.head.round]
        return sum(peer == self._me or peer in here for peer in self.head.voters) < self._quorum_size()

    def _is_by_owner(self, certificate: Certificate) -> bool:
        return is_reroot(certificate) and {vote.voter for vote in certificate.votes} == {self._authority.owner}

    def _apply_if_held(self, now: float) -> None:
        assert self._decided is not None
        self._fetch_missing(self._decided.result, now)
        if not self._missing(self._decided.result):
            self._last_certificate = self._decided
            self._set_phase(Phase.APPLY, None)
            self._effects.append(Commit(certificate=self._decided))

    def _missing(self, result: Result) -> set[bytes]:
        """The digests of the result's parts whose bytes are not here."""
        if self._wanted is not result:
            self._wanted = result
            self._unheld = {part.digest for part in result.parts} - self._held
        return self._unheld

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
        for number, part in enumerate(result.parts):
            if part.digest in missing:
                owner = (self._owner(number),) if self._plan else ()
                candidates = tuple(dict.fromkeys(peer for peer in (*owner, *live) if peer in live))
                effect = FetchBlob(round=self.round, part=number, digest=part.digest, candidates=candidates)
                self._effects.append(effect)

    # -- other logs ---------------------------------------------------------------------------------------------------

    def _note_behind(self, peer: PeerId, head_round: int, now: float) -> None:
        # While this round is being fetched or applied, a peer one round ahead is no news.
        slack = 1 if self.phase in (Phase.APPLY, Phase.FETCH) else 0
        if head_round >= self.round + slack and now >= self._behind_after_s:
            self._behind_after_s = now + BEHIND_RETRY_S
            self._effects.append(Behind(peer=peer, round=head_round))

    def _note_fork(self, peer: PeerId, now: float) -> None:
        """After a re-root there may be two logs, so a stranger's word on another base is no lie: it is compared."""
        if now >= self._forked_after_s:
            self._forked_after_s = now + BEHIND_RETRY_S
            self._effects.append(Forked(peer=peer))

    # -- a quorum that is gone for good -----------------------------------------------------------------------------

    def _watch_quorum(self, now: float) -> None:
        """After the declared timer the peers that are left name new voters among themselves. Who abstains is there and
        is not left: it signs nothing before a certificate that the others cannot make. A quorum that comes into sight
        stops the timer in every phase."""
        if self._can_certify():
            self._saw_quorum = True
            self._alone_since_s = None
            return
        if self._alone_since_s is None:
            self._alone_since_s = now
        if self._decided and self.phase is Phase.FETCH and self._is_update_lost(self._decided.result, now):
            self._decided = None
            self._fail_attempt(Failure.UPDATE_LOST, None, now)
        if not self._may_declare(now) or now < self._declare_after_s or self._leaving or self._signs_nothing():
            return
        self._declare_after_s = now + self._rules.commit_timeout_s
        remaining = self._remaining()
        if self._me not in remaining or now < self._find_turn_s(remaining):
            return
        result = make_voters_result(self.head, self._rules.codec_out, remaining)
        self._declaration = result
        self._declared = Lead(attempt=REROOT_ATTEMPT)
        for peer in remaining:
            if peer != self._me:
                self._send(peer, Proposal(attempt=REROOT_ATTEMPT, result=result))
        self._take_declared_vote(self._sign_vote(REROOT_ATTEMPT, result), self._me, now)

    @property
    def has_seen_quorum(self) -> bool:
        """Whether this peer knows that there was a quorum once: it had one in sight since its start, or was told of a
        certified round. Before, the swarm has not begun: nothing is lost by waiting for those who are only late, and
        who declared would begin a log without them."""
        return self._saw_quorum or self.head.round > 0

    def _may_declare(self, now: float) -> bool:
        is_open = not self._decided and self.phase is not Phase.APPLY
        return self._is_timer_over(now) and is_open and self.has_seen_quorum

    def _is_timer_over(self, now: float) -> bool:
        since_s = self._alone_since_s
        is_due = since_s is not None and now >= since_s + self._rules.reroot_after_s
        return self._authority.may_declare and is_due

    def _is_update_lost(self, result: Result, now: float) -> bool:
        """Whether those who held a certified update are gone for good with it: its bytes are missing, the declared
        timer has run out, and nobody in sight stands in that log. Then a declaration goes on from the round before."""
        if not self._is_timer_over(now) or not self._missing(result):
            return False
        is_same = (result.round, digest_record(result))
        heads = [(known.head_round, known.head_digest) for known in self._members.values()]
        return not any(head == is_same or head[0] > result.round for head in heads)

    def _remaining(self) -> tuple[PeerId, ...]:
        """The voters that are left; everybody else comes in by contributing."""
        live = {self._me, *(peer for peer, known in self._members.items() if not known.leaving)} - self._abstaining()
        return tuple(peer for peer in self._order if peer in live)

    def _find_turn_s(self, remaining: tuple[PeerId, ...]) -> float:
        """From when on this one of those that are left may declare: the first one, and nobody else. Before the first
        round that one may know of no quorum and wait, so the others have their turns after it."""
        place = remaining.index(self._me)
        if self.head.round > 0:
            return 0.0 if place == 0 else math.inf
        assert self._alone_since_s is not None
        return self._alone_since_s + self._rules.reroot_after_s + place * self._rules.commit_timeout_s

    def _take_declaration(self, message: Proposal, sender: PeerId, now: float) -> None:
        result = message.result
        check_result(result, self.head, self._parts, is_reroot=True)
        if result.parts or sender not in result.voters:
            raise ProtocolError(Refusal.NOT_PLANNED, "a declared re-root names its sender and changes nothing else")
        # Whoever declares has waited for the whole time; who signs must have missed the quorum for long enough, too.
        since_s = self._alone_since_s
        is_alone = since_s is not None and now >= since_s + self._rules.presence_timeout_s
        may_sign = self._authority.may_declare and not self._decided and not self._signs_nothing()
        if self._me in result.voters and is_alone and may_sign:
            self._send(sender, self._sign_vote(REROOT_ATTEMPT, result))

    def _take_declared_vote(self, vote: Vote, sender: PeerId, now: float) -> None:
        result, lead = self._declaration, self._declared
        if result is None or lead is None or self._decided or vote.round != self.round:
            return
        if sender not in result.voters or vote.result_digest != digest_record(result):
            return  # an answer to an earlier declaration of ours
        verify_message(sender, self._swarm, vote)
        lead.votes[sender] = vote
        if set(lead.votes) == set(result.voters):
            self._certify(result, REROOT_ATTEMPT, lead, now)
