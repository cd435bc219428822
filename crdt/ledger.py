"""The ledger of one replica: which entries it holds, what it may write next, what state they fold to.

Acceptance of an entry depends on the entry, its ancestors and the swarm's constants, never on local time, order of
arrival or load, so that replicas which hear of the same entries come to hold the same set (Kleppmann, PaPoC 2022):

- an entry whose ancestors are missing waits (`pending.py`);
- an entry from the future is held and counts in the fold once its time has come; as times increase along the DAG,
  what is due at any time is closed under ancestors;
- an author that signed two different entries with one sequence number has equivocated. All of its entries are kept, for
  they prove it and honest entries may depend on them, but from that number on none counts, at any replica.

Invariants: the set of entries is closed under `prev` and `deps`; the fold is a function of that set and of `wall_ms`;
`write` never signs two entries with one sequence number as long as its caller persists as told.
"""

import heapq
from collections import deque
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass

from shoal.crdt.clock import HLC_ZERO, Hlc, is_due, merge
from shoal.crdt.entries import (
    DEPS_MAX,
    NO_ENTRY,
    Batch,
    ChainPosition,
    Entry,
    EntryContent,
    measure_batch_bytes,
    sign_batch,
    verify_batch,
)
from shoal.crdt.fold import Fold, LedgerState
from shoal.crdt.key_set import KeySet, make_key
from shoal.crdt.kinds import KIND_RULES, Body, EntryId, Kind, encode_body
from shoal.crdt.merge import RememberedPredicate, RoundPredicate
from shoal.crdt.pending import PendingBatches
from shoal.protocol.errors import ProtocolError, Refusal, ShoalError
from shoal.protocol.identity import Identity, PeerId, short_peer_id

LEDGER_BYTES_MAX = 256 * 1024 * 1024


class ChainForkedError(ShoalError):
    """This peer's own chain has two branches: its key is in use elsewhere, or an old backup was restored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerRules:
    """What every replica of a swarm must agree on.

    The predicates get a round and the value written for it, must return a bool whatever the bytes are, and must be
    pure: one that looks at local state or time makes replicas diverge. They are asked once for each distinct value.
    """

    swarm: bytes
    owner: PeerId | None
    is_valid_certificate: RoundPredicate
    is_valid_snapshot: RoundPredicate


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """An entry to be written: its kind and what it says."""

    kind: Kind
    body: Body


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of one batch.

    `accepted`: what is new in the ledger, this batch and those that had waited for it, in an order in which each
    follows its ancestors; the caller persists them in that order and may pass them on. `wanted`: ids that this batch
    waits for, to be asked of the sender. `is_known`: the ledger had all of it. `is_full`: it was left out because the
    ledger has reached its size limit, which is no fault of the sender.
    """

    accepted: tuple[Batch, ...] = ()
    wanted: tuple[EntryId, ...] = ()
    is_known: bool = False
    is_full: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """Proof that an author equivocated: two batches whose first entries differ but have one sequence number."""

    first: Batch
    second: Batch

    @property
    def author(self) -> PeerId:
        return self.first.author

    @property
    def seq(self) -> int:
        return self.first.entries[0].seq


def check_evidence(evidence: Evidence) -> None:
    """Raise ProtocolError unless the two batches prove equivocation to anybody who knows neither side."""
    slots = [(batch.swarm, batch.author, batch.entries[0].seq) for batch in (evidence.first, evidence.second)]
    if slots[0] != slots[1] or evidence.first.ids[0] == evidence.second.ids[0]:
        raise ProtocolError(Refusal.MALFORMED, "the two batches do not contradict each other")
    verify_batch(evidence.first)
    verify_batch(evidence.second)


class Ledger:
    """One replica. Feed it with `restore` once, then with `accept`; read it with `fold`."""

    def __init__(
        self,
        *,
        identity: Identity,
        rules: LedgerRules,
        pending: PendingBatches | None = None,
        bytes_max: int = LEDGER_BYTES_MAX,
    ) -> None:
        self._identity = identity
        self._rules = rules
        self._pending = PendingBatches() if pending is None else pending
        self._bytes_max = bytes_max
        self._bytes = 0
        self._entries: dict[EntryId, Entry] = {}
        self._keys = KeySet()
        self._heads: set[EntryId] = set()
        # The last entry of the batch with which an entry came, and its signature: the proof to pass on.
        self._tips: dict[EntryId, EntryId] = {}
        self._signatures: dict[EntryId, bytes] = {}
        self._slots: dict[tuple[PeerId, int], list[EntryId]] = {}
        self._forks: dict[PeerId, int] = {}
        self._own = ChainPosition(seq=0, prev=NO_ENTRY, hlc=HLC_ZERO)
        self._is_valid_certificate = RememberedPredicate(rules.is_valid_certificate)
        self._is_valid_snapshot = RememberedPredicate(rules.is_valid_snapshot)
        self._fold = self._make_fold()
        self._unfolded: list[tuple[Hlc, EntryId]] = []
        self._folded_until = HLC_ZERO
        self._is_fold_stale = False
        self._state: LedgerState | None = None

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, entry_id: EntryId) -> bool:
        return entry_id in self._entries

    @property
    def keys(self) -> KeySet:
        """The keys of all entries, for reconciliation; only the ledger adds to it."""
        return self._keys

    @property
    def heads(self) -> Set[EntryId]:
        """The entries that no other entry names."""
        return self._heads

    @property
    def own_seq(self) -> int:
        """The sequence number that the next entry of this peer will have."""
        return self._own.seq

    @property
    def forks(self) -> Mapping[PeerId, int]:
        """The authors that equivocated, and the sequence number from which on each does not count."""
        return self._forks

    def get(self, entry_id: EntryId) -> Entry | None:
        """The entry with this id, if the ledger holds it."""
        return self._entries.get(entry_id)

    def list_wanted(self) -> tuple[EntryId, ...]:
        """All ids that waiting batches need and that have not arrived, in ascending order."""
        return self._pending.list_wanted()

    def restore(self, batches: Iterable[Batch]) -> None:
        """Take in what this replica stored earlier, without checking signatures again.

        Of its own entries it remembers the last even where an ancestor was lost, so that it does not sign that sequence
        number again. Raises ProtocolError for a batch that could never have been accepted: the store is damaged.
        """
        for batch in batches:
            self._check_constants(batch)
            if batch.author == self._identity.peer:
                self._advance_own_chain(batch)
            fresh = self._drop_known(batch)
            if fresh is not None:
                self._admit(fresh)

    def write(self, drafts: Sequence[Draft], wall_ms: int) -> Batch:
        """Sign the next entries of the own chain, at most ENTRIES_PER_BATCH_MAX and BATCH_BYTES_MAX of them.

        The batch is not in the ledger yet. The caller persists it durably, then hands it to `accept`, and only then
        sends it: what has left this peer must never be signed anew after a crash. Before the first write with a store
        that was empty, the caller fetches this peer's own chain from others for the same reason.

        Raises ChainForkedError if this peer has equivocated, and ProtocolError, without using up sequence numbers, if
        others would refuse the entries.
        """
        if self._identity.peer in self._forks:
            raise ChainForkedError(
                f"two different histories are signed by {short_peer_id(self._identity.peer)}; "
                "its entries no longer count. Fix: start this peer with a new identity"
            )
        deps = self._choose_deps(wall_ms)
        hlc = merge(self._own.hlc, max((self._entries[dep].hlc for dep in deps), default=HLC_ZERO), wall_ms)
        contents = [
            EntryContent(
                deps=deps if index == 0 else (),
                hlc=Hlc(hlc + index),
                kind=draft.kind.value,
                body=encode_body(draft.body),
            )
            for index, draft in enumerate(drafts)
        ]
        batch = sign_batch(self._identity, self._rules.swarm, self._own, contents)
        self._check_constants(batch)
        self._advance_own_chain(batch)
        return batch

    def accept(self, batch: Batch) -> Outcome:
        """Take in a batch; raises ProtocolError if no replica may ever accept it."""
        self._check_constants(batch)
        fresh = self._drop_known(batch)
        if fresh is None:
            return Outcome(is_known=True)
        verify_batch(fresh)
        is_own = batch.author == self._identity.peer
        if not is_own and self._bytes + measure_batch_bytes(fresh) > self._bytes_max:
            return Outcome(is_full=True)
        return self._admit(fresh)

    def prove(self, entry_id: EntryId) -> Batch:
        """The entry and those after it that its signature needs: a batch that any peer can check."""
        ids = [self._tips[entry_id]]
        while ids[-1] != entry_id:
            ids.append(self._entries[ids[-1]].prev)
        ids.reverse()
        return Batch(
            entries=tuple(self._entries[name] for name in ids), ids=tuple(ids), signature=self._signatures[ids[-1]]
        )

    def list_evidence(self) -> tuple[Evidence, ...]:
        """One proof for each author that equivocated, the same at every replica up to the signatures, by author."""
        return tuple(
            Evidence(first=self.prove(first), second=self.prove(second))
            for first, second, *_ in (sorted(self._slots[slot]) for slot in sorted(self._forks.items()))
        )

    def fold(self, wall_ms: int) -> LedgerState:
        """The state at this time: of all entries that are due and count. Equal sets of entries give equal states."""
        if self._is_fold_stale or not is_due(self._folded_until, wall_ms):
            self._forget_fold()
        while self._unfolded and is_due(self._unfolded[0][0], wall_ms):
            hlc, entry_id = heapq.heappop(self._unfolded)
            self._folded_until = max(self._folded_until, hlc)
            entry = self._entries[entry_id]
            if not self._is_excluded(entry):
                self._fold.apply(entry_id, entry)
                self._state = None
        if self._state is None:
            self._state = self._fold.read(self._forks)
        return self._state

    def _make_fold(self) -> Fold:
        return Fold(
            owner=self._rules.owner,
            is_valid_certificate=self._is_valid_certificate,
            is_valid_snapshot=self._is_valid_snapshot,
        )

    def _forget_fold(self) -> None:
        self._fold = self._make_fold()
        self._folded_until = HLC_ZERO
        self._is_fold_stale = False
        self._state = None
        self._unfolded = [(entry.hlc, entry_id) for entry_id, entry in self._entries.items()]
        heapq.heapify(self._unfolded)

    def _is_excluded(self, entry: Entry) -> bool:
        fork = self._forks.get(entry.author)
        return fork is not None and entry.seq >= fork

    def _check_constants(self, batch: Batch) -> None:
        if batch.swarm != self._rules.swarm:
            raise ProtocolError(Refusal.WRONG_SWARM, "entries of another swarm")
        if batch.author != self._rules.owner and any(KIND_RULES[entry.kind].is_owners for entry in batch.entries):
            raise ProtocolError(Refusal.NOT_A_MEMBER, "only the owner key writes a manifest or a re-root")

    def _drop_known(self, batch: Batch) -> Batch | None:
        # The known entries come first, because the ledger holds the ancestors of each entry that it holds.
        known = sum(entry_id in self._entries for entry_id in batch.ids)
        return batch.suffix(known) if known < len(batch.ids) else None

    def _find_missing(self, batch: Batch) -> frozenset[EntryId]:
        named = {batch.entries[0].prev}.union(*(entry.deps for entry in batch.entries))
        return frozenset(name for name in named.difference(batch.ids, (NO_ENTRY,)) if name not in self)

    def _admit(self, batch: Batch) -> Outcome:
        missing = self._find_missing(batch)
        if missing:
            self._pending.add(batch, missing)
            return Outcome(wanted=self._pending.select_absent(missing))
        self._check_ancestors(batch)
        self._insert(batch)
        accepted = [batch]
        arrived = deque(batch.ids)
        while arrived:
            for waiting in self._pending.take(arrived.popleft()):
                fresh = self._admit_waiting(waiting)
                if fresh is not None:
                    accepted.append(fresh)
                    arrived.extend(fresh.ids)
        return Outcome(accepted=tuple(accepted))

    def _admit_waiting(self, batch: Batch) -> Batch | None:
        fresh = self._drop_known(batch)
        if fresh is None:
            return None
        missing = self._find_missing(fresh)
        if missing:
            self._pending.add(fresh, missing)
            return None
        try:
            self._check_ancestors(fresh)
        except ProtocolError:
            # Whoever sent it could not know either; nothing that depends on it will ever be accepted.
            return None
        self._insert(fresh)
        return fresh

    def _check_ancestors(self, batch: Batch) -> None:
        first = batch.entries[0]
        earlier = dict(zip(batch.ids, batch.entries, strict=True))
        if first.prev != NO_ENTRY:
            previous = self._entries[first.prev]
            if (previous.author, previous.seq + 1) != (first.author, first.seq):
                raise ProtocolError(Refusal.MALFORMED, "the previous entry is not this author's one before")
            if previous.hlc >= first.hlc:
                raise ProtocolError(Refusal.MALFORMED, "entry times do not increase along the chain")
        for entry in batch.entries:
            for dep in entry.deps:
                ancestor = self._entries.get(dep) or earlier[dep]
                if ancestor.hlc >= entry.hlc:
                    raise ProtocolError(Refusal.MALFORMED, "an entry is not later than what it depends on")

    def _insert(self, batch: Batch) -> None:
        self._signatures[batch.tip] = batch.signature
        self._bytes += measure_batch_bytes(batch)
        for entry_id, entry in zip(batch.ids, batch.entries, strict=True):
            self._entries[entry_id] = entry
            self._tips[entry_id] = batch.tip
            self._keys.add(make_key(entry.hlc, entry_id))
            self._heads.difference_update((entry.prev, *entry.deps))
            self._heads.add(entry_id)
            heapq.heappush(self._unfolded, (entry.hlc, entry_id))
            slot = entry.author, entry.seq
            siblings = self._slots.setdefault(slot, [])
            siblings.append(entry_id)
            if len(siblings) > 1 and entry.seq < self._forks.get(entry.author, entry.seq + 1):
                self._forks[entry.author] = entry.seq
                self._is_fold_stale = True
        if batch.author == self._identity.peer:
            self._advance_own_chain(batch)

    def _advance_own_chain(self, batch: Batch) -> None:
        last = batch.entries[-1]
        if last.seq >= self._own.seq:
            self._own = ChainPosition(seq=last.seq + 1, prev=batch.tip, hlc=last.hlc)

    def _choose_deps(self, wall_ms: int) -> tuple[EntryId, ...]:
        # An entry from the future would drag this peer's clock along; one of an excluded author would spread its forks.
        seen = (
            (entry.hlc, entry_id)
            for entry_id, entry in ((head, self._entries[head]) for head in self._heads)
            if entry.author != self._identity.peer and is_due(entry.hlc, wall_ms) and not self._is_excluded(entry)
        )
        return tuple(sorted(entry_id for _, entry_id in heapq.nlargest(DEPS_MAX, seen)))
