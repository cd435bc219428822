"""Simulated ledger replicas: production ledgers and anti-entropy on one heap with virtual time, and links that lose.

A replica's shell does what `node/ledger_sync.py` does: it pushes what it writes to a few peers and compares, period by
period, with those that `PeerChoice` names, one after the other. Every message is lost with the same probability, each
way; a question without an answer is asked again after each of ANSWER_TIMEOUTS_S, and after the last the conversation
ends. A run is a function of its seed.

One thing is not as in life: that a batch decodes and that its signature is valid is found out once and not by every
replica, for both depend on the bytes alone. Otherwise 64 replicas would check half a million signatures in one test.
"""

import heapq
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import count

from shoal.crdt import ledger as ledger_module
from shoal.crdt.anti_entropy import ANSWER_TIMEOUTS_S, PERIOD_S, Conversation, PeerChoice
from shoal.crdt.entries import Batch, decode_batch_untrusted, encode_batch, verify_batch
from shoal.crdt.key_set import KEY_END, KEY_FIRST
from shoal.crdt.kinds import Kind, RegisterBody, TagBody
from shoal.crdt.ledger import Draft, Ledger, LedgerRules
from shoal.crdt.reconciliation import answer
from shoal.protocol.identity import Identity, PeerId
from shoal.protocol.messages import LedgerEntries, Reconcile, encode_message

START_MS = 1_700_000_000_000
RULES = LedgerRules(swarm=b"s" * 32, owner=None, is_valid_snapshot=lambda *_: True)
DELAY_MEAN_S = 0.05
ENTRIES_PER_BATCH = 16
_MEMO_MAX = 1 << 16


@contextmanager
def shared_verification() -> Iterator[None]:
    """Within it each signature is checked once, by whichever replica comes first."""
    verified: set[tuple[PeerId, bytes, bytes]] = set()

    def verify_once(batch: Batch) -> None:
        signed = batch.author, batch.tip, batch.signature
        if signed not in verified:
            verify_batch(batch)
            verified.add(signed)

    original = ledger_module.__dict__["verify_batch"]
    ledger_module.__dict__["verify_batch"] = verify_once
    try:
        yield
    finally:
        ledger_module.__dict__["verify_batch"] = original


decode_once = lru_cache(maxsize=_MEMO_MAX)(decode_batch_untrusted)


@dataclass(slots=True)
class Traffic:
    """What went over the links, lost messages included."""

    messages: int = 0
    lost: int = 0
    frame_bytes: int = 0
    comparisons: int = 0
    failed: int = 0


@dataclass(slots=True)
class Replica:
    """One peer; `partners` are those with whom it has still to compare in this period."""

    number: int
    peer: PeerId
    ledger: Ledger
    choice: PeerChoice
    partners: list[int] = field(default_factory=list)
    conversation: Conversation | None = None
    asked: int = 0

    def take(self, batches: Sequence[bytes]) -> None:
        for raw in batches:
            self.ledger.accept(decode_once(raw))


class ReplicaSwarm:
    """All replicas and the links between them."""

    def __init__(self, *, replicas: int, loss: float, seed: int) -> None:
        self.now_s = 0.0
        self.traffic = Traffic()
        self._loss = loss
        self._rng = random.Random(seed)
        self._order = count()
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        identities = [Identity(f"replica {number}".encode().ljust(32)) for number in range(replicas)]
        self._numbers = {identity.peer: number for number, identity in enumerate(identities)}
        self.replicas = [
            Replica(
                number=number,
                peer=identity.peer,
                ledger=Ledger(identity=identity, rules=RULES),
                choice=PeerChoice(random.Random(f"{seed}/{number}").randbytes),
            )
            for number, identity in enumerate(identities)
        ]

    # -- what happens --------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Every replica begins to compare at some time within the first period."""
        for replica in self.replicas:
            self._schedule(self._rng.uniform(0, PERIOD_S), partial(self._begin_period, replica))

    def run_until(self, end_s: float) -> None:
        while self._due and self._due[0][0] <= end_s:
            self.now_s, _, happen = heapq.heappop(self._due)
            happen()
        self.now_s = end_s

    def write(self, number: int, entries: int, *, is_pushed: bool) -> None:
        """A replica writes so many entries; where they are not pushed, it has nobody to tell."""
        replica = self.replicas[number]
        for first in range(0, entries, ENTRIES_PER_BATCH):
            drafts = [self._draft(replica) for _ in range(min(ENTRIES_PER_BATCH, entries - first))]
            batch = replica.ledger.write(drafts, START_MS + int(1000 * self.now_s))
            replica.ledger.accept(batch)
            if is_pushed:
                for peer in replica.choice.choose_for_push(self._others(replica)):
                    self._push(replica, self.replicas[self._numbers[peer]], (encode_batch(batch),))

    def write_at(self, at_s: float, number: int, entries: int) -> None:
        self._schedule(at_s - self.now_s, lambda: self.write(number, entries, is_pushed=True))

    # -- how far they are ----------------------------------------------------------------------------------------------

    def have_converged(self) -> bool:
        """Whether all replicas hold the same entries."""
        first = _list_keys(self.replicas[0].ledger)
        return all(_list_keys(replica.ledger) == first for replica in self.replicas[1:])

    def fold_digests(self) -> set[bytes]:
        """The digests of all folds, an hour later."""
        later_ms = START_MS + int(1000 * self.now_s) + 3_600_000
        return {replica.ledger.fold(later_ms).digest() for replica in self.replicas}

    # -- a replica's shell ---------------------------------------------------------------------------------------------

    def _begin_period(self, replica: Replica) -> None:
        self._schedule(PERIOD_S, lambda: self._begin_period(replica))
        chosen = replica.choice.choose_for_comparison(self._others(replica))
        replica.partners = [self._numbers[peer] for peer in reversed(chosen)]
        if replica.conversation is None:
            self._compare_with_next(replica)

    def _compare_with_next(self, replica: Replica) -> None:
        replica.conversation = None
        if not replica.partners:
            return
        self.traffic.comparisons += 1
        replica.conversation = Conversation(replica.ledger, replica.choice.draw_salt())
        self._ask(replica, self.replicas[replica.partners.pop()], replica.conversation)

    def _ask(self, replica: Replica, partner: Replica, conversation: Conversation, attempt: int = 0) -> None:
        question = conversation.request
        assert question is not None
        replica.asked += 1
        asked = replica.asked

        def reach_partner() -> None:
            response = answer(partner.ledger, question)
            reply = LedgerEntries(payload=response.reply or b"", batches=response.batches)
            self._send(reply, lambda: come_back(reply))

        def come_back(reply: LedgerEntries) -> None:
            if replica.asked == asked:
                replica.asked += 1
                self._go_on(replica, partner, conversation, reply)

        def give_up() -> None:
            if replica.asked != asked:
                return
            if attempt + 1 < len(ANSWER_TIMEOUTS_S):
                self._ask(replica, partner, conversation, attempt + 1)
            else:
                self.traffic.failed += 1
                self._compare_with_next(replica)

        self._send(Reconcile(payload=question), reach_partner)
        self._schedule(ANSWER_TIMEOUTS_S[attempt], give_up)

    def _go_on(self, replica: Replica, partner: Replica, conversation: Conversation, reply: LedgerEntries) -> None:
        replica.take(reply.batches)
        lacking = conversation.go_on(reply.payload, len(reply.batches))
        if lacking:
            self._push(replica, partner, lacking)
        if conversation.request is not None:
            self._ask(replica, partner, conversation)
            return
        if not conversation.found_difference:
            replica.partners.clear()
        self._compare_with_next(replica)

    def _push(self, replica: Replica, partner: Replica, batches: tuple[bytes, ...]) -> None:
        self._send(LedgerEntries(payload=b"", batches=batches), lambda: partner.take(batches))

    # -- links ---------------------------------------------------------------------------------------------------------

    def _send(self, message: Reconcile | LedgerEntries, arrive: Callable[[], None]) -> None:
        self.traffic.messages += 1
        self.traffic.frame_bytes += len(encode_message(RULES.swarm, message))
        if self._rng.random() < self._loss:
            self.traffic.lost += 1
        else:
            self._schedule(self._rng.expovariate(1 / DELAY_MEAN_S), arrive)

    def _schedule(self, delay_s: float, happen: Callable[[], None]) -> None:
        heapq.heappush(self._due, (self.now_s + delay_s, next(self._order), happen))

    def _others(self, replica: Replica) -> list[PeerId]:
        return [other.peer for other in self.replicas if other is not replica]

    def _draft(self, replica: Replica) -> Draft:
        value = self._rng.randbytes(8)
        if self._rng.random() < 0.5:
            return Draft(kind=Kind.LEASE, body=RegisterBody(value=value))
        return Draft(kind=Kind.TAG, body=TagBody(name=f"tag {replica.number}", value=value, removes=()))


def _list_keys(ledger: Ledger) -> list[bytes]:
    return list(ledger.keys.iterate(KEY_FIRST, KEY_END))


def measure_convergence(*, replicas: int, entries: int, loss: float, seed: int) -> tuple[float, ReplicaSwarm]:
    """How many periods it takes until all have what each wrote while nobody reached anybody; at most ten."""
    swarm = ReplicaSwarm(replicas=replicas, loss=loss, seed=seed)
    for number in range(replicas):
        swarm.write(number, entries // replicas + (number < entries % replicas), is_pushed=False)
    swarm.start()
    steps = 4
    for step in range(1, 10 * steps + 1):
        swarm.run_until(step * PERIOD_S / steps)
        if swarm.have_converged():
            return step / steps, swarm
    return float("inf"), swarm
