"""The rules of single-decree consensus, checked against everything that was said: an oracle that sees all voters.

Lamport, "Paxos Made Simple" (2001), P1a and P2c. Agreement breaks only when many things go wrong together; these rules
break as soon as one voter or proposer errs, so that far fewer schedules find the error.
"""

from collections.abc import Mapping, Sequence

from shoal.protocol.effects import VoteRecord
from shoal.protocol.identity import PeerId
from shoal.protocol.messages import ROUND_MESSAGES, Lock, Promise, Proposal, Result, Vote, digest_record
from shoal.protocol.quorum import QuorumRule
from tests.sim.checkers import broken


class Ballots:
    """What every voter of every round has promised and voted for, as it said so."""

    def __init__(self, rule: QuorumRule) -> None:
        self._rule = rule
        self._promised: dict[tuple[int, PeerId], int] = {}
        self._voted: dict[tuple[int, PeerId], dict[int, bytes]] = {}
        self._locked: dict[tuple[int, int, PeerId], bytes] = {}
        self._proposed: dict[tuple[int, int], bytes] = {}

    def persisted(self, voter: PeerId, record: VoteRecord) -> None:
        """A promise binds from when it is durable on, whether or not anybody heard it."""
        key = record.round, voter
        if record.promised < self._promised.get(key, 0):
            raise broken("a promise is never taken back", f"round {record.round}: {record.promised}")
        self._promised[key] = record.promised

    def said(self, speaker: PeerId, message: ROUND_MESSAGES, voters: Mapping[int, Sequence[PeerId]]) -> None:
        """A peer sends this; `voters` are those of each round."""
        match message:
            case Promise():
                self._check_promise(speaker, message)
            case Lock():
                self._check_lock(speaker, message)
            case Vote():
                self._check_vote(speaker, message)
            case Proposal():
                self._check_proposal(message.attempt, message.result, voters[message.result.round])

    def _check_promise(self, voter: PeerId, message: Promise) -> None:
        key = message.round, voter
        self._promised[key] = max(message.attempt, self._promised.get(key, 0))
        voted = self._voted.get(key, {})
        newest = max((attempt for attempt in voted if attempt < message.attempt), default=None)
        told = None if message.accepted is None else digest_record(message.accepted)
        if newest is not None and (told is None or message.accepted_attempt < newest):
            raise broken("a promise tells the last vote", f"round {message.round}, attempt {newest}")

    def _check_lock(self, voter: PeerId, lock: Lock) -> None:
        before = self._locked.setdefault((lock.round, lock.attempt, voter), lock.result_digest)
        if before != lock.result_digest:
            raise broken("one lock per attempt", f"round {lock.round}, attempt {lock.attempt}")
        if lock.attempt < self._promised.get((lock.round, voter), 0):
            raise broken("no lock below a promise", f"round {lock.round}, attempt {lock.attempt}")

    def _check_vote(self, voter: PeerId, vote: Vote) -> None:
        key = vote.round, voter
        if vote.attempt < self._promised.get(key, 0):
            raise broken("no vote below a promise", f"round {vote.round}: {vote.attempt} < {self._promised[key]}")
        before = self._voted.setdefault(key, {}).setdefault(vote.attempt, vote.result_digest)
        if before != vote.result_digest:
            raise broken("one vote per attempt", f"round {vote.round}, attempt {vote.attempt}")

    def _check_proposal(self, attempt: int, result: Result, voters: Sequence[PeerId]) -> None:
        number, digest = result.round, digest_record(result)
        if self._proposed.setdefault((number, attempt), digest) != digest:
            raise broken("one proposal per attempt", f"round {number}, attempt {attempt}")
        for lower in range(attempt):
            self._check_nothing_else_chosen(number, lower, digest, voters)

    def _check_nothing_else_chosen(self, number: int, attempt: int, digest: bytes, voters: Sequence[PeerId]) -> None:
        """No other result can be certified in a lower attempt, now or later: too few voted for it or still may."""
        votes = {voter: self._voted.get((number, voter), {}).get(attempt) for voter in voters}
        free = [one for one, vote in votes.items() if vote is None and self._promised.get((number, one), 0) <= attempt]
        for other in {vote for vote in votes.values() if vote not in (None, digest)}:
            count = len([vote for vote in votes.values() if vote == other]) + len(free)
            if self._certifies(count, len(voters)):
                raise broken("what may be certified is proposed again", f"round {number}, attempt {attempt}")

    def _certifies(self, votes: int, voters: int) -> bool:
        """Counted here once more: the rule in the production code may be what is wrong."""
        return votes * 2 > voters if self._rule is QuorumRule.MAJORITY else votes * 3 > voters * 2
