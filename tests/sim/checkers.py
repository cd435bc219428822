"""The invariants of a round, checked after every event that can break one.

Sees everything and trusts nothing that the cores computed: votes are counted anew, residuals are kept in a second set
of books, and every certified part is aggregated again (tests.sim.oracle).
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from shoal.protocol.abstention import ABSTAINING
from shoal.protocol.attendance import FRESHNESS, PARTICIPATION, WORK
from shoal.protocol.contribution import Frozen
from shoal.protocol.effects import Phase, Reduce
from shoal.protocol.errors import ProtocolError
from shoal.protocol.exchange import CONTRIBUTIONS_MAX
from shoal.protocol.identity import PeerId
from shoal.protocol.manifest import Manifest
from shoal.protocol.messages import (
    ROUND_MESSAGES,
    Certificate,
    Certified,
    Proposal,
    Ready,
    Result,
    Vote,
    digest_record,
    verify_message,
)
from shoal.protocol.quorum import REROOT_ATTEMPT, Head, list_contributors
from shoal.protocol.round_state import BACKOFF_MAX, EARLY_MESSAGES_MAX
from tests.sim import oracle
from tests.sim.faults import DRIFT_MAX
from tests.sim.logs import InvariantBroken as InvariantBroken
from tests.sim.logs import Logs
from tests.sim.logs import broken as broken
from tests.sim.oracle import Vector

if TYPE_CHECKING:
    from tests.sim.peer import SimPeer
    from tests.sim.world import World

# What a paused or busy peer may be late by in ending a phase, in its own seconds.
PHASE_SLACK_S = 5.0
RESULTS_PER_PART_MAX = 8  # as the daemon's: results of one part that a member may push in a round


@dataclass(slots=True)
class Books:
    """The second set of books on one life of one peer: what error feedback must leave behind."""

    residual: Vector
    frozen: Frozen | None = None  # the newest
    left: dict[bytes, tuple[Frozen, Vector]] = field(default_factory=dict)  # by root: what each offered one would leave


@dataclass(frozen=True, slots=True)
class Reduction:
    """What an honest owner says went into one reduced part."""

    indices: tuple[int, ...]
    digests: tuple[bytes, ...]


class Checker:
    """Sees everything; independent of the cores' own bookkeeping."""

    def __init__(self, manifest: Manifest, swarm: bytes, genesis: Head, *, may_part: bool = False) -> None:
        self.manifest = manifest
        self.swarm = swarm
        self.logs = Logs(genesis, may_part=may_part)
        self.results: dict[bytes, int] = {}  # the attempt of each certified result, by its digest
        self.participants: dict[bytes, int] = {}
        self.shares: list[float] = []  # by round: of the peers that were there all through it, how many are in it
        self.votes: dict[tuple[PeerId, bytes, int, int], bytes] = {}
        self.committed_head: dict[PeerId, Head] = {}
        self.reroots: Counter[str] = Counter()
        self.suspects: set[PeerId] = set()  # who lies, or was restored from a backup: no word of theirs is binding
        self.lies: set[bytes] = set()  # digests of results that an owner made up
        self.refusals: Counter[str] = Counter()  # of liars' messages, by reason
        # By peer, round, part and digest: two peers may have made the same bytes.
        self._contributed: dict[tuple[PeerId, int, int, bytes], Vector] = {}
        self._readies: dict[tuple[PeerId, int], set[oracle.Claim]] = {}
        self._reductions: dict[tuple[int, int, bytes], list[Reduction]] = {}
        self._books: dict[PeerId, Books] = {}
        self._released: set[bytes] = (
            set()
        )  # roots of contributions that were taken back before anybody planned with them
        self._phases: dict[PeerId, tuple[Phase, float, float]] = {}
        self._quorum_seen_s: dict[PeerId, float] = {}
        self._begun: set[PeerId] = set()  # those that have seen a quorum since their start
        self._certified_first = False  # somebody has told of round 1
        self._certified_s: dict[bytes, float] = {}
        self._counted: dict[bytes, frozenset[PeerId]] = {}  # by certified round: of whom any part is in it

    def newest_head(self) -> Head:
        """The head that the certificates lead to, whoever holds them."""
        return self.logs.newest()

    # -- a peer's own work ---------------------------------------------------------------------------------------

    def booted(self, peer: "SimPeer", found: list[Head]) -> None:
        """What was committed is still there, whatever a crash did, and nothing else; the residual begins empty. `found`
        are the heads that the peer's disk leads to, one after the other."""
        me, head = peer.identity.peer, found[-1]
        self._restored(peer, found)
        before = self.committed_head.get(me)
        if before is not None and me not in self.suspects and not self.logs.leads_to(before, head):
            raise broken("rounds are never undone", f"peer {peer.number} woke up at {head.round}")
        self.committed_head[me] = head
        self._quorum_seen_s[me] = peer.clock()
        self._begun.discard(me)
        self._books[me] = Books(residual=np.zeros(self.manifest.layout.elements, np.float32))
        self._phases.pop(me, None)

    def _restored(self, peer: "SimPeer", found: list[Head]) -> None:
        for one in found:
            if one.digest not in self.logs.heads:  # it died while it committed what nobody else has yet
                self._certified(peer, peer.disk.certificates[one.round], one)
            if self.logs.heads[one.digest] != one:
                raise broken("bit parity", f"peer {peer.number} restored another state of round {one.round}")

    def froze(self, peer: "SimPeer", frozen: Frozen) -> None:
        """Error feedback is exact: encoded + residual = produced, to the bit."""
        books = self._books[peer.identity.peer]
        if peer.identity.peer in self.suspects:
            self.contributed(peer.identity.peer, frozen)
            return
        if not np.array_equal(peer.contributor.residual, books.residual):
            raise broken("error feedback is exact", f"peer {peer.number} lost or invented a residual")
        produced, expected = (peer.replica.params - peer.local) + books.residual, books.residual.copy()
        for (first, end), decoded in self.contributed(peer.identity.peer, frozen).items():
            left = frozen.residual_next[first:end]
            if not np.array_equal(decoded.astype(np.float64) + left, produced[first:end].astype(np.float64)):
                raise broken("error feedback is exact", f"peer {peer.number}, round {frozen.round}")
            expected[first:end] = produced[first:end] - decoded
        if not np.array_equal(frozen.residual_next, expected):
            raise broken("error feedback is exact", f"peer {peer.number} changed what round {frozen.round} left alone")
        books.frozen = frozen
        # Later ones are of a log that was left.
        books.left = {root: made for root, made in books.left.items() if made[0].round >= frozen.round}
        books.left[frozen.root] = frozen, expected

    def released(self, peer: "SimPeer", frozen: Frozen) -> None:
        """The peer has taken this one back, and its core has told it that nobody planned with it."""
        if peer.identity.peer not in self.suspects:
            del self._books[peer.identity.peer].left[frozen.root]
            self._released.add(frozen.root)

    def contributed(self, peer: PeerId, frozen: Frozen) -> dict[tuple[int, int], Vector]:
        """These parts are this peer's word in this round; what they decode to, by their first and last element."""
        codec = self.manifest.rounds.codec
        vectors = {}
        for part, raw in enumerate(frozen.encoded):
            first, end = oracle.find_span(self.manifest, frozen.round, part)
            vectors[first, end] = oracle.decode(codec, raw, end - first)
            self._contributed[peer, frozen.round, part, frozen.digests[part]] = vectors[first, end]
        return vectors

    def announced(self, peer: PeerId, ready: Ready) -> None:
        self._readies.setdefault((peer, ready.round), set()).add(oracle.read_claim(ready))

    def settled(self, peer: "SimPeer", result: Result, index: int, included: tuple[int, ...]) -> None:
        """Sum of what was produced = sum of what was applied + residual: a residual is taken over for exactly the parts
        that were certified with this very contribution."""
        if peer.identity.peer in self.suspects:
            return
        books, number = self._books[peer.identity.peer], result.round
        root = result.members[index].contribution_root
        frozen, residual_next = books.left.get(root, (books.frozen, books.residual))
        is_known = root in books.left and frozen is not None and frozen.round == number
        if not is_known:
            frozen, residual_next = books.frozen, books.residual
        expected = oracle.list_parts_with(result, index) if is_known else ()
        if included != expected or frozen is None or frozen.round != number:
            raise broken("error feedback is exact", f"peer {peer.number} settled {included}, not {expected}")
        for part in included:
            known = self._reductions.get((number, part, result.parts[part].digest), [])
            ours = any(frozen.digests[part] in one.digests for one in known)
            if known and not ours:
                raise broken(
                    "error feedback is exact",
                    f"peer {peer.number} settled a contribution that is not the certified one, {number}/{part}",
                )
            first, end = oracle.find_span(self.manifest, number, part)
            books.residual[first:end] = residual_next[first:end]
        if not np.array_equal(peer.contributor.residual, books.residual):
            raise broken("error feedback is exact", f"peer {peer.number} kept a wrong residual in round {number}")

    def restarted_from_base(self, peer: "SimPeer") -> None:
        """The peer gave up its local work, and the residual with it."""
        self._books[peer.identity.peer].residual.fill(0.0)

    def reduced(self, effect: Reduce, digest: bytes) -> None:
        known = self._reductions.setdefault((effect.round, effect.part, digest), [])
        known.append(Reduction(indices=effect.indices, digests=effect.digests))

    # -- votes and certificates ----------------------------------------------------------------------------------

    def voted(self, peer: "SimPeer", vote: Vote) -> None:
        """An honest peer never signs two votes for one (round, attempt), and votes only for what its disk holds."""
        if vote.voter in self.suspects or vote.attempt == REROOT_ATTEMPT:
            return
        key = (vote.voter, peer.core.head.digest, vote.round, vote.attempt)
        if self.votes.setdefault(key, vote.result_digest) != vote.result_digest:
            raise broken("one vote per attempt", f"peer {peer.number} voted twice in {vote.round}/{vote.attempt}")
        record = peer.disk.vote
        if record is None or record.round != vote.round or record.promised < vote.attempt or record.accepted is None:
            raise broken("persist before send", f"peer {peer.number} voted in {vote.round}/{vote.attempt}")
        missing = [part for part in record.accepted.parts if part.digest not in peer.disk.blobs]
        if missing:
            raise broken("voters hold the bytes", f"peer {peer.number} misses {len(missing)} parts")

    def committed(self, peer: "SimPeer", certificate: Certificate, head: Head) -> None:
        """One result per round, the same bytes and the same state everywhere, in order, and never undone."""
        me, number, result = peer.identity.peer, head.round, certificate.result
        before = self.committed_head[me]
        if number != before.round + 1 or number != result.round or result.previous != before.digest:
            raise broken("rounds are never undone", f"peer {peer.number} went from {before.round} to {number}")
        self.committed_head[me] = head
        self._certified(peer, certificate, head)

    def installed(self, peer: "SimPeer", head: Head) -> None:
        """A snapshot leads forward, to a state that was certified."""
        before = self.committed_head[peer.identity.peer]
        if head.round <= before.round:
            raise broken("rounds are never undone", f"peer {peer.number} went from {before.round} to {head.round}")
        if self.logs.heads.get(head.digest) != head:
            raise broken("bit parity", f"peer {peer.number} installed another state of round {head.round}")
        if not self.logs.leads_to(before, head):
            raise broken("rounds are never undone", f"peer {peer.number} installed another log")
        self._books[peer.identity.peer].left.clear()
        self.committed_head[peer.identity.peer] = head

    def rewound(self, peer: "SimPeer", first: int, theirs: bytes, found: list[Head]) -> None:
        """What was certified is undone only for a heavier log, `theirs`, which parts from the own one lawfully."""
        me, head = peer.identity.peer, found[-1]
        self._restored(peer, found)
        before = self.committed_head[me]
        self.logs.check_switch(peer.number, before, theirs, first)
        if head.round >= first or not self.logs.leads_to(head, before):
            raise broken("rounds are never undone", f"peer {peer.number} went back to {head.round}, not before {first}")
        self.committed_head[me] = head
        self.reroots["went over"] += 1

    def _certified(self, peer: "SimPeer", certificate: Certificate, head: Head) -> None:
        result, digest = certificate.result, head.digest
        if digest != digest_record(result):
            raise broken("bit parity", f"peer {peer.number} calls round {result.round} by another name")
        if not self.logs.add(certificate, head):
            raise broken("bit parity", f"round {result.round}: peer {peer.number} has another state root")
        self._check_votes(certificate)
        if digest in self.results:
            self.results[digest] = min(self.results[digest], certificate.attempt)
            return
        self.results[digest] = certificate.attempt
        self.participants[digest] = len(result.members)
        self._certified_s[digest] = peer.world.now
        if result.parts:
            self._note_share(peer.world, result)
        if certificate.attempt == REROOT_ATTEMPT:
            by_owner = certificate.votes[0].voter == self.manifest.owner
            self.reroots["signed by the owner" if by_owner else "declared"] += 1
        self._check_members(result)
        self._check_released(result)
        self._check_attendance(result)
        self._counted[digest] = frozenset(list_contributors(result))
        for part in range(len(result.parts)):
            self._check_part(result, part, peer)

    def _check_released(self, result: Result) -> None:
        """Of what was taken back and never planned no part is in the result: its residual is gone."""
        for index, member in enumerate(result.members):
            if member.contribution_root in self._released and oracle.list_parts_with(result, index):
                raise broken("what was taken back is not counted", f"round {result.round}, member {index}")

    def _note_share(self, world: "World", result: Result) -> None:
        began_s = self._certified_s.get(result.previous, 0.0)
        members = {member.peer for member in result.members}
        there = {one.identity.peer for one in world.everybody if one.up and one.there_since_s <= began_s}
        if there:
            self.shares.append(len(there & members) / len(there))

    def _check_votes(self, certificate: Certificate) -> None:
        """A quorum of distinct voters of the round before signed this result in one attempt; or it is a re-root."""
        result = certificate.result
        voters = self.logs.heads[result.previous].voters
        digest = digest_record(result)
        seen = set()
        for vote in certificate.votes:
            verify_message(vote.voter, self.swarm, vote)
            if (vote.round, vote.attempt, vote.result_digest) == (result.round, certificate.attempt, digest):
                seen.add(vote.voter)
        if certificate.attempt == REROOT_ATTEMPT:
            self._check_reroot(result, seen, voters)
            return
        count = len(seen & set(voters))
        if not oracle.is_quorum(count, len(voters), self.manifest.rounds.quorum):
            raise broken("a quorum certifies", f"round {result.round}: {count} votes of {len(voters)}")

    def _check_reroot(self, result: Result, signers: set[PeerId], voters: tuple[PeerId, ...]) -> None:
        """The owner signed it; or everybody whom it names, one of the old voters among them. Nothing was trained."""
        by_owner = signers == {self.manifest.owner}
        named = (
            signers == set(result.voters) and bool(signers & set(voters)) and self.manifest.rounds.reroot_after_s > 0
        )
        if result.parts or result.members or not (by_owner or named):
            raise broken("a quorum certifies", f"round {result.round} is a re-root that nobody may sign")

    def sees(self, peer: "SimPeer") -> None:
        """Remember when the peer last had a quorum of its voters in sight. Who has forgotten its votes, and says so, is
        there for nothing that takes a quorum."""
        voters = peer.core.head.voters
        signing = {one for one, known in peer.table.live().items() if known.phase != ABSTAINING}
        in_sight = len({peer.identity.peer, *signing}.intersection(voters))
        if oracle.is_quorum(in_sight, len(voters), self.manifest.rounds.quorum):
            self._quorum_seen_s[peer.identity.peer] = peer.clock()
            self._begun.add(peer.identity.peer)

    def declared_alone(self, peer: "SimPeer", certificate: Certificate) -> None:
        """Where nobody else has signed a re-root, it is this peer's, or was, when it declared in an earlier life."""
        is_own = [vote.voter for vote in certificate.votes] == [peer.identity.peer]
        if certificate.attempt == REROOT_ATTEMPT and is_own and digest_record(certificate.result) not in self.results:
            self._check_timer(peer, self.manifest.rounds.reroot_after_s)
            self._check_begun(peer, certificate.result)

    def declared(self, peer: "SimPeer", message: ROUND_MESSAGES) -> None:
        """With these messages a peer has a part in a declared re-root: who signs must have missed the quorum, too."""
        if isinstance(message, Certified) and message.certificate.result.round == 1:
            self._certified_first = True
        elif isinstance(message, Vote) and message.attempt == REROOT_ATTEMPT:
            self._check_timer(peer, self.manifest.rounds.presence_timeout_s)
        elif isinstance(message, Proposal) and message.attempt == REROOT_ATTEMPT:
            self._check_timer(peer, self.manifest.rounds.reroot_after_s)
            self._check_begun(peer, message.result)

    def _check_begun(self, peer: "SimPeer", result: Result) -> None:
        """Before the first round a swarm that is only late looks like one that is gone."""
        has_begun = result.round > 1 or peer.identity.peer in self._begun or self._certified_first
        if not has_begun:
            raise broken("nobody declares before a quorum was there", f"peer {peer.number}")

    def _check_timer(self, peer: "SimPeer", wait_s: float) -> None:
        missed_s = peer.clock() - self._quorum_seen_s[peer.identity.peer]
        if missed_s < wait_s - 1e-6:
            raise broken("a declaration comes after its timer", f"peer {peer.number} missed a quorum for {missed_s} s")

    def _check_members(self, result: Result) -> None:
        """Each contributor counts once, with the weight that follows from what it announced, and no more."""
        peers = [member.peer for member in result.members]
        if len(set(peers)) != len(peers):
            raise broken("each contribution at most once", f"round {result.round}")
        claims = [oracle.read_claim(member) for member in result.members]
        for member, claim in zip(result.members, claims, strict=True):
            if claim not in self._readies.get((member.peer, result.round), ()):
                raise broken("weights as planned", f"round {result.round}: a claim that nobody made")
        weights = [member.weight for member in result.members]
        problem = oracle.find_wrong_weight(claims, weights, self.manifest.rounds.weights)
        if problem:
            raise broken("weights as planned", f"round {result.round}: {problem}")

    def _check_attendance(self, result: Result) -> None:
        """What honest members declare of the rounds before follows from the log that they are on."""
        rule, before = self.manifest.rounds.weights, list(self.logs.back_from(self.logs.heads[result.previous]))
        for member in result.members if rule != WORK else ():
            counted = [head.round for head in before if member.peer in self._counted.get(head.digest, ())]
            said = member.attendance
            expected = oracle.count_intervals(counted, result.round) if rule == PARTICIPATION else (0, 0)
            is_right = (said.intervals, said.interval_rounds) == expected
            # A contribution of an earlier life may be counted while the work of this one gets older.
            is_possible = 0 <= said.base_age <= (result.round - 1 if rule == FRESHNESS else 0)
            if member.peer not in self.suspects and not (is_right and is_possible):
                raise broken("attendance as the log says", f"round {result.round}: {said}, counted in {counted}")

    def _check_part(self, result: Result, part: int, peer: "SimPeer") -> None:
        """Plain float32 arithmetic over exactly the bitmap's members, in roster order."""
        one, number = result.parts[part], result.round
        if one.digest in self.lies:
            return  # its owner lied, and nobody recomputes parts yet
        indices = oracle.list_indices(one.contributors, len(result.members))
        first, end = oracle.find_span(self.manifest, number, part)
        for reduction in self._reductions.get((number, part, one.digest), []):
            if reduction.indices != indices:
                continue
            vectors = []
            for index, digest in zip(indices, reduction.digests, strict=True):
                vector = self._contributed.get((result.members[index].peer, number, part, digest))
                if vector is not None:
                    vectors.append(vector)
            weights = [result.members[index].weight for index in indices]
            if len(vectors) == len(indices):
                expected = oracle.aggregate(self.manifest.rounds.codec_out, vectors, weights, end - first)
                if peer.disk.blobs[one.digest] == expected:
                    return
        raise broken("result = aggregate of the bitmap's members", f"round {number}, part {part}")

    # -- bounds --------------------------------------------------------------------------------------------------

    def entered(self, peer: "SimPeer", phase: Phase) -> None:
        """A phase begins; its time starts."""
        self._phases[peer.identity.peer] = (phase, peer.clock(), peer.paused_s)

    def _is_ahead(self, peer: "SimPeer") -> bool:
        """Whether too few of the voters in sight have come to this peer's attempt: it waits for them."""
        core, others = peer.core, peer.world.by_id
        in_sight = (others[one] for one in peer.table.live() if one in core.head.voters and one in others)
        up = (one.core for one in in_sight if one.up and one is not peer)
        here = sum(one.round > core.round or (one.round, one.attempt) >= (core.round, core.attempt) for one in up)
        own = peer.identity.peer in core.head.voters
        return not oracle.is_quorum(here + own, len(core.head.voters), self.manifest.rounds.quorum)

    def check_bounds(self, peer: "SimPeer") -> None:
        """Every attempt ends in bounded time, and memory is bounded; looked at with every heartbeat."""
        core, me = peer.core, peer.identity.peer
        phase, since_s, paused_s = self._phases.get(me, (Phase.GATHER, 0.0, 0.0))
        awake_s = peer.clock() - since_s - (peer.paused_s - paused_s) * (1 + DRIFT_MAX)
        # Without a quorum in sight nobody can end an attempt, and none is given up.
        voters = core.head.voters
        in_sight = len({me, *peer.table.live()} & set(voters))
        is_alone = not oracle.is_quorum(in_sight, len(voters), self.manifest.rounds.quorum)
        may_lie = self.manifest.rounds.quorum == "two_thirds"
        if (phase is Phase.PREPARE and is_alone) or (may_lie and self._is_ahead(peer)):
            self.entered(peer, phase)
        elif phase is core.phase and awake_s > self._phase_bound_s(phase):
            at = f"{phase.value} of {core.round}/{core.attempt}"
            raise broken("every attempt ends in bounded time", f"peer {peer.number}: {awake_s:.1f} s in {at}")
        inbox, parts = core._inbox, self.manifest.parts
        members = len(peer.world.by_id)
        counts = {
            "early messages": (len(core._early), EARLY_MESSAGES_MAX),
            "contributions": (len(inbox.digests), members),
            "parts of a sender": (max(map(len, inbox.received.values()), default=0), parts),
            "part bytes": (len(peer.inbox), members * parts * CONTRIBUTIONS_MAX),
            "result bytes": (len(peer.blobs), members * parts * RESULTS_PER_PART_MAX),
        }
        for name, (count, limit) in counts.items():
            if count > limit:
                raise broken("memory is bounded", f"peer {peer.number} holds {count} {name}, at most {limit}")

    def _phase_bound_s(self, phase: Phase) -> float:
        rules = self.manifest.rounds
        timeouts = {
            Phase.PREPARE: rules.plan_timeout_s,
            Phase.EXCHANGE: rules.exchange_timeout_s,
            Phase.COMMIT: rules.commit_timeout_s,
        }
        # In the other phases a peer waits for contributions, or for bytes that are certified.
        return timeouts[phase] * BACKOFF_MAX + PHASE_SLACK_S if phase in timeouts else float("inf")

    # -- accusations ---------------------------------------------------------------------------------------------

    def accused(self, peer: "SimPeer", sender: PeerId, message: object, error: ProtocolError) -> None:
        """No honest peer is ever refused."""
        if sender not in self.suspects:
            raise broken("no honest peer is accused", f"peer {peer.number}: {type(message).__name__}: {error}")
        self.refusals[error.refusal.value] += 1

    def undecodable(self, peer: "SimPeer", sender: PeerId, digest: bytes, error: ProtocolError) -> None:
        """What an owner made up may be asked for and found useless; the one who served it is no liar for that."""
        if digest not in self.lies:
            self.accused(peer, sender, digest, error)
