"""One peer's side of the butterfly exchange of a round: what it received, what it owes, what it owns.

A contribution stays frozen through all attempts of its round, so a part that arrived once is never asked for again;
an owner's collection of one part is complete when every planned member has delivered, is lost, or was silent too long.

Invariants: at most one digest is held for a (sender, part); what is reduced matches the sender's signed contribution
root; every part is reduced at most once an attempt.
"""

from collections import Counter
from collections.abc import Container, Mapping
from dataclasses import dataclass, field

from shoal.protocol.errors import Failure, ProtocolError, Refusal
from shoal.protocol.identity import PeerId
from shoal.protocol.messages import ROSTER_MAX, Plan, contribution_root

SENDERS_MAX = ROSTER_MAX + 1  # a whole roster and this peer, which may not be in it
CONTRIBUTIONS_MAX = 4  # of one sender in one round: every restart makes a new one, and the bytes of the old are kept


@dataclass(frozen=True, slots=True, kw_only=True)
class Missing:
    """A roster member whose part is not waited for any longer."""

    index: int
    reason: Failure


@dataclass(slots=True)
class Collection:
    """One part that this peer owns in the current attempt."""

    part: int
    started_s: float
    reduced: bool = False


@dataclass(slots=True)
class Waits:
    """Parts, each filed under one peer that it waits for and the time since when. What follows from these two is looked
    at once for all parts that are filed there, so that an event costs a look at peers and not at every part."""

    entries: dict[tuple[PeerId, float], set[int]] = field(default_factory=dict)
    _entry: dict[int, tuple[PeerId, float]] = field(default_factory=dict)

    def file(self, part: int, peer: PeerId, since_s: float) -> None:
        """The part waits for this peer, and for no other one any longer."""
        self.drop(part)
        self._entry[part] = (peer, since_s)
        self.entries.setdefault((peer, since_s), set()).add(part)

    def drop(self, part: int) -> None:
        """The part waits for nobody."""
        entry = self._entry.pop(part, None)
        if entry is not None:
            self.entries[entry].discard(part)
            if not self.entries[entry]:
                del self.entries[entry]


@dataclass(slots=True)
class Inbox:
    """Everything that members delivered in this round, by sender. Survives attempts, cleared between rounds."""

    parts: int
    digests: dict[PeerId, tuple[bytes, ...]] = field(default_factory=dict)
    roots: dict[PeerId, bytes] = field(default_factory=dict)
    received: dict[PeerId, dict[int, bytes]] = field(default_factory=dict)
    replaced: Counter[tuple[PeerId, int]] = field(default_factory=Counter)
    heard_s: dict[PeerId, float] = field(default_factory=dict)
    touched: set[int] = field(default_factory=set)  # parts that may be complete now: they are to be looked at again

    def take_digests(
        self, sender: PeerId, digests: tuple[bytes, ...], now: float, expected: frozenset[PeerId] = frozenset()
    ) -> None:
        """The part digests behind a sender's contribution root; compared with the root when a plan names it. When too
        many are open, whoever was silent for longest makes room, unless it is `expected`."""
        if len(digests) != self.parts:
            raise ProtocolError(Refusal.WRONG_LENGTH, f"contribution has {len(digests)} parts, not {self.parts}")
        if sender not in self.digests and len(self.digests) >= SENDERS_MAX:
            self._make_room(expected)
        self.digests[sender] = digests
        self.roots[sender] = contribution_root(digests)
        self.heard_s[sender] = now
        self.touched.update(self.received.get(sender, ()))

    def _make_room(self, expected: frozenset[PeerId]) -> None:
        strangers = [peer for peer in self.digests if peer not in expected]
        if not strangers:
            raise ProtocolError(Refusal.LIMIT, f"{SENDERS_MAX} contributions are open already")
        oldest = min(strangers, key=lambda peer: (self.heard_s[peer], peer))
        del self.digests[oldest], self.roots[oldest]

    def forget(self, sender: PeerId) -> None:
        """What came of this one counts for nothing any more, and may come again."""
        for table in (self.digests, self.roots, self.received):
            table.pop(sender, None)

    def check_part(self, sender: PeerId, part: int, digest: bytes) -> Refusal | None:
        """Whether a part that is about to arrive may be stored."""
        if part >= self.parts:
            return Refusal.OUT_OF_RANGE
        if sender in self.digests and self.digests[sender][part] != digest:
            return Refusal.WRONG_DIGEST
        if sender not in self.received and len(self.received) >= SENDERS_MAX:
            return Refusal.LIMIT
        held = self.received.get(sender, {}).get(part)
        if held == digest:
            return Refusal.DUPLICATE
        return Refusal.LIMIT if held and self.replaced[sender, part] + 1 >= CONTRIBUTIONS_MAX else None

    def take_part(self, sender: PeerId, part: int, digest: bytes, now: float) -> None:
        """The part's bytes are held and match `digest`."""
        held = self.received.setdefault(sender, {})
        if held.get(part, digest) != digest:
            self.replaced[sender, part] += 1
        held[part] = digest
        self.heard_s[sender] = now
        self.touched.add(part)

    def has_part(self, sender: PeerId, part: int, root: bytes) -> bool:
        """Whether the sender's part is here and belongs to the contribution with this root."""
        if self.roots.get(sender) != root:
            return False
        return self.received.get(sender, {}).get(part) == self.digests[sender][part]


def list_undelivered(plan: Plan, part: int, inbox: Inbox) -> tuple[int, ...]:
    """Roster indices whose part is not here, in roster order."""
    return tuple(
        index
        for index, entry in enumerate(plan.roster)
        if not inbox.has_part(entry.signed.peer, part, entry.signed.ready.contribution_root)
    )


def list_missing(
    plan: Plan, lost: Container[PeerId], deadlines: Mapping[int, float], now: float
) -> tuple[list[Missing], list[int]]:
    """Members whose part is given up, with the reason, and members that are still waited for. `deadlines` by roster
    index, of those that have not delivered."""
    missing, pending = [], []
    for index, deadline_s in deadlines.items():
        if plan.roster[index].signed.peer in lost:
            missing.append(Missing(index=index, reason=Failure.SENDER_LOST))
        elif now >= deadline_s:
            missing.append(Missing(index=index, reason=Failure.SENDER_SLOW))
        else:
            pending.append(index)
    return missing, pending
