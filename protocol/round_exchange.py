"""The exchange of a round: plans, parts on their way to owners, and owners that are replaced.

Invariants: a plan's roster never changes within an attempt, only its owners; what was sent elsewhere is not sent again;
who is slow loses the parts that it has not done and nothing else.
"""

from collections.abc import Mapping

from shoal.protocol.effects import (
    PartReassigned,
    Phase,
    Planned,
    Reduce,
    SenderMissing,
    SendPart,
    SendResult,
)
from shoal.protocol.errors import Failure, ProtocolError, Refusal
from shoal.protocol.exchange import Collection, list_missing, list_undelivered
from shoal.protocol.identity import PeerId
from shoal.protocol.messages import (
    Contribution,
    Nack,
    PartDone,
    Plan,
    SignedReady,
    digest_roster,
    sign_message,
    verify_message,
)
from shoal.protocol.pace import LINE_SAMPLES_MIN
from shoal.protocol.proposer import (
    check_plan,
    choose_owner,
    choose_roster,
    make_evidence,
    make_plan,
    make_result,
    revise_plan,
)
from shoal.protocol.quorum import check_base, check_bitmap, make_bitmap
from shoal.protocol.round_ballot import RoundBallot
from shoal.protocol.round_state import Offer
from shoal.protocol.shares import balance_uploads


class RoundExchange(RoundBallot):
    """How planned members turn their contributions into one result, part by part."""

    # -- plans -----------------------------------------------------------------------------------------------------

    def _plan_attempt(self, ready: Mapping[PeerId, SignedReady], now: float) -> None:
        assert self._lead is not None
        known = frozenset({self._me, *self.head.voters, *self._contributed})
        newcomers_max = max(self._rules.newcomers_max, self._rules.peers_min - len(known.intersection(ready)))
        chosen = choose_roster(ready, known, self.head, newcomers_max)
        taken = {peer: ready[peer] for peer in chosen}
        shares, rules = self._list_shares(taken), self._rules
        plan = make_plan(self.head, self.attempt, rules.codec, taken, self._parts, shares, rules.weights)
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
            owner = plan.roster[plan.owners[part]].signed.peer
            self._lead.tried[part] = [owner]
            self._lead.open.file(part, owner, now)
        self._announce_plan(plan, now)

    def _list_shares(self, roster: Mapping[PeerId, SignedReady]) -> dict[PeerId, float]:
        """Of the parts, by what is known of lines and owners. A peer cannot measure itself, so that its own share is
        what the others gave it last."""
        owners = [peer for peer, one in roster.items() if one.ready.owns]
        uploads = {peer: self._sender_pace.speed(peer, LINE_SAMPLES_MIN) for peer in owners}
        shares = balance_uploads(uploads, len(roster), self._update_ratio)
        for peer in shares:
            speed = self._given_share if peer == self._me else self._owner_pace.speed(peer)
            shares[peer] *= self._shares.share(peer) * speed
        return shares

    def _announce_plan(self, plan: Plan, now: float) -> None:
        assert self._lead is not None
        signed = sign_message(self._identity, self._swarm, plan)
        before = self._plan.owners if self._plan else ()
        # Before the own parts, which a slow uplink is long at.
        members = {entry.signed.peer for entry in plan.roster}
        for peer in sorted({*members, *self.head.voters} - self._lost - {self._me}):
            self._send(peer, signed)
        self._follow_plan(signed, now)
        for part in range(self._parts):
            # Whoever gets a part has its whole time for it; the clock of the others goes on.
            if not before or plan.owners[part] != before[part]:
                self._lead.heard_s[self._owner(part)] = self._lead.finished_s[self._owner(part)] = now

    def _take_plan(self, plan: Plan, sender: PeerId, now: float) -> None:
        check_base(plan, self.head)  # who leads and what is promised is another matter on another log
        self._check_proposer(plan.attempt, sender)
        self._check_jump(plan.attempt)
        verify_message(sender, self._swarm, plan)
        # Only a promise binds. A peer that gave up on this attempt too early, and waits, comes back to it.
        is_late = plan.attempt < self.attempt and self.phase is not Phase.GATHER
        if plan.attempt < self._vote.promised or is_late or not self._may_follow(plan.attempt):
            self._dropped = Refusal.WRONG_ATTEMPT
            self._send(sender, Nack(round=self.round, attempt=plan.attempt, promised=self._vote.promised))
            return
        check_plan(plan, self.head, self._rules.codec, self._parts, self._swarm, self._rules.weights)
        if self._decided or (plan.attempt == self.attempt and self.phase is Phase.COMMIT):
            return
        if plan.attempt == self.attempt and self._plan:
            # Reductions of this attempt are under way; their bitmaps mean this roster.
            if plan.roster != self._plan.roster:
                raise ProtocolError(
                    Refusal.EQUIVOCATION, f"two rosters in attempt {plan.attempt} of round {plan.round}"
                )
            if plan.revision <= self._plan.revision:
                self._dropped = Refusal.DUPLICATE
                return
        self._check_roster_size(plan)
        if plan.attempt != self.attempt:
            self._enter_attempt(plan.attempt, now)
        self._follow_plan(plan, now)

    def _follow_plan(self, plan: Plan, now: float) -> None:
        previous = self._plan
        self._plan = plan
        if previous is None:
            self._roster_digest = digest_roster(plan.roster)
            self._note_given_share(plan)
            self._exchange_began_s = now
            self._set_phase(Phase.EXCHANGE, now + self._exchange_window_s())
        else:
            self._note_slow_owners(previous, plan)
        mine = self._index(self._me)
        for part, owner in enumerate(plan.owners):
            if owner == mine:
                self._collections.setdefault(part, Collection(part=part, started_s=now))
            else:
                self._collections.pop(part, None)
                self._senders.drop(part)
        self._inbox.touched.update(self._collections)
        entry = plan.roster[mine] if mine is not None else None
        root = entry.signed.ready.contribution_root if entry else None
        if self._offer and self._offer.signed.ready.contribution_root == root:
            self._is_planned = True
            self._send_parts(self._offer)

    def _note_given_share(self, plan: Plan) -> None:
        """What the proposer thinks of this peer as an owner, beside an even share."""
        mine = self._index(self._me)
        if mine is not None and self._proposer() != self._me and plan.roster[mine].signed.ready.owns:
            even = self._parts / sum(entry.signed.ready.owns for entry in plan.roster)
            given = plan.owners.count(mine) / max(1, int(even))
            self._given_share = min(1.0, given)

    def _note_commit(self, now: float) -> None:
        """What the proposer owns may be nowhere else yet when it proposes the result. Where most voters were long at
        getting it, this peer gives itself nothing until another proposer does."""
        lead, plan = self._lead, self._plan
        if lead is None or plan is None or lead.proposed_s is None:
            return
        is_late = now >= lead.proposed_s + self._rules.commit_timeout_s / 2
        if is_late and any(self._owner(part) == self._me for part in range(self._parts)):
            self._given_share = 0.0

    def _note_slow_owners(self, previous: Plan, plan: Plan) -> None:
        """Everybody sees whose parts were given away, so that every later proposer knows it, too."""
        for old, new in zip(previous.owners, plan.owners, strict=True):
            peer = plan.roster[old].signed.peer
            if old != new and peer not in self._lost:
                self._slow_owners.add(peer)

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

    # -- owners ----------------------------------------------------------------------------------------------------

    def _note_part(self, sender: PeerId, part: int, digest: bytes, now: float) -> None:
        """A contribution part has arrived: how long did the sender take for it?"""
        plan = self._plan
        if plan and self.phase is Phase.EXCHANGE and self._index(sender) is not None:
            since_s = max(self._exchange_began_s, self._inbox.heard_s.get(sender, self._exchange_began_s))
            self._sender_pace.note_part(sender, now - since_s)
        self._inbox.take_part(sender, part, digest, now)

    def _collect(self, now: float) -> None:
        """Look at the own parts that something has come for, and at those whose sender is given up."""
        touched, self._inbox.touched = self._inbox.touched, set()
        for (peer, started_s), parts in self._senders.entries.items():
            if peer in self._lost or now >= self._sender_deadline(peer, started_s):
                touched |= parts
        for part in sorted(touched):
            collection = self._collections.get(part)
            if collection and not collection.reduced:
                self._collect_part(collection, now)

    def _collect_part(self, collection: Collection, now: float) -> None:
        plan, part = self._plan, collection.part
        assert plan is not None
        peers = self._roster_peers()
        late = list_undelivered(plan, part, self._inbox)
        deadlines = {index: self._sender_deadline(peers[index], collection.started_s) for index in late}
        missing, pending = list_missing(plan, self._lost, deadlines, now)
        indices = tuple(index for index in range(len(plan.roster)) if index not in deadlines)
        if pending:
            self._senders.file(part, peers[pending[0]], collection.started_s)
            return
        self._senders.drop(part)
        if not indices:
            return
        collection.reduced = True
        for one in missing:
            peer = peers[one.index]
            self._effects.append(SenderMissing(round=self.round, part=part, peer=peer, reason=one.reason))
        members = tuple(plan.roster[index] for index in indices)
        self._effects.append(
            Reduce(
                round=self.round,
                attempt=self.attempt,
                part=part,
                indices=indices,
                members=members,
                digests=tuple(self._inbox.digests[entry.signed.peer][part] for entry in members),
                norms=tuple(entry.signed.ready.norm for entry in plan.roster),
            )
        )

    def _finish_part(self, part: int, digest: bytes, members: frozenset[int]) -> None:
        """Tell the proposer and everybody who follows this attempt."""
        assert self._plan is not None
        self._hold(digest)
        done = PartDone(
            round=self.round,
            attempt=self.attempt,
            roster_digest=self._roster_digest,
            part=part,
            digest=digest,
            contributors=make_bitmap(members, len(self._plan.roster)),
        )
        self._send(self._proposer(), sign_message(self._identity, self._swarm, done))
        for peer in self._audience():
            if peer != self._me:
                self._effects.append(SendResult(peer=peer, round=self.round, part=part, digest=digest))

    # -- the proposer ----------------------------------------------------------------------------------------------

    def _take_part_done(self, message: PartDone, sender: PeerId, now: float) -> None:
        if not self._leads(message.attempt) or self._plan is None or self.phase is not Phase.EXCHANGE:
            self._dropped = Refusal.WRONG_ATTEMPT
            return
        assert self._lead is not None
        verify_message(sender, self._swarm, message)
        another = message.roster_digest != self._roster_digest
        if another or message.part >= self._parts or sender != self._owner(message.part):
            self._dropped = Refusal.NOT_PLANNED
            return  # the part has been given to another owner since
        check_bitmap(message.contributors, len(self._plan.roster))
        if message.part not in self._lead.done:
            self._lead.done[message.part] = message
            if message.digest in self._held:
                self._lead.open.drop(message.part)
                self._note_finished(sender, now)
            else:
                self._lead.unheld.setdefault(message.digest, set()).add(message.part)
        self._lead.heard_s[sender] = now

    def _note_finished(self, owner: PeerId, now: float) -> None:
        """A part is done and its bytes are here. Of its own parts a peer learns nothing: they are nowhere else yet."""
        assert self._lead is not None
        if owner != self._me:
            self._owner_pace.note_part(owner, now - self._lead.finished_s[owner])
        self._lead.finished_s[owner] = now

    def _hold(self, digest: bytes) -> set[int]:
        """The bytes of a result part are here. Returns the parts of the own attempt that were waiting for them."""
        self._held.add(digest)
        self._unheld.discard(digest)
        parts: set[int] = set()
        if self._lead:
            parts = self._lead.unheld.pop(digest, parts)
            for part in parts:
                self._lead.open.drop(part)
        return parts

    def _watch_owners(self, now: float) -> None:
        assert self._lead is not None and self._plan is not None
        lead = self._lead
        moves: dict[int, int] = {}
        due: list[int] = []
        for (owner, since_s), deadline_s in self._owner_deadlines(lead).items():
            if owner in self._lost or now >= deadline_s:
                due += lead.open.entries[owner, since_s]
        unfit = self._unfit({self._owner(part) for part in due}) if due else frozenset()
        for part in sorted(due):
            owner = self._owner(part)
            index = choose_owner(self._plan, part, lead.tried[part], unfit)
            if index is None:
                self._fail_attempt(Failure.EXCHANGE_TIMEOUT, owner, now)
                return
            moves[part] = index
            done = lead.done.pop(part, None)
            if done is not None:
                lead.unheld[done.digest].discard(part)
            new_owner = self._plan.roster[index].signed.peer
            lead.tried[part].append(new_owner)
            lead.open.file(part, new_owner, now)
            reason = Failure.OWNER_LOST if owner in self._lost else Failure.OWNER_SLOW
            self._last_failure, self._last_failure_peer = reason, owner
            self._effects.append(
                PartReassigned(round=self.round, part=part, old_owner=owner, new_owner=new_owner, reason=reason)
            )
        if moves:
            self._announce_plan(revise_plan(self._plan, moves), now)
            self._collect(now)
        if not lead.open.entries:
            result = make_result(
                self._plan, lead.done, self.head, self._rules.codec_out, self._absent(), self._rules.voters_max
            )
            evidence = make_evidence(self._plan, lead.done) if self._needs_locks() else None
            lead.proposed_s = now
            self._propose(result, evidence, now)

    def _unfit(self, due: set[PeerId]) -> frozenset[PeerId]:
        """Who takes over no part: the lost ones and, while there are others, those that are or were slow."""
        assert self._plan is not None
        slow = self._slow_owners | due
        slow |= {peer for peer in self._roster_peers() if self._shares.share(peer) == 0.0}
        able = {entry.signed.peer for entry in self._plan.roster if entry.signed.ready.owns}
        return frozenset(self._lost | slow) if able - self._lost - slow else frozenset(self._lost)
