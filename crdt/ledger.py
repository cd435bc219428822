"""The ledger of one replica: which entries it holds, what it may write next, what state they fold to.

Acceptance of an entry depends on the entry, its ancestors and the swarm's constants, never on local time, order of
arrival or load, so that replicas which hear of the same entries come to hold the same set (Kleppmann, PaPoC 2022):

- an entry whose ancestors are missing waits (`pending.py`);
- an entry from the future is held and counts in the fold once its time has come; as times increase along the DAG,
  what is due at any time is closed under ancestors;
- an author that signed two different entries for one slot has equivocated. All of its entries are kept, for they prove
  it and honest entries may depend on them, but from that slot on none counts, at any replica, until the swarm's owner
  re-admits the author (`standing.py`);
- a certificate counts by the votes in it, whoever wrote it (`certified.py`).

The ledger is cut in eras (`eras.py`), which follow from the certified rounds. What counts is what is of the current
era, the one before, the one after and the permanent one, whether or not older eras have been dropped: `truncate`
changes no fold. Of dropped eras stay the sum of their rounds (`ChainBase`) and the proofs of equivocation
(`evidence.py`). An entry of a dropped era is left out, and one from beyond the next era comes again when its time has
come; so replicas that are in one era and have heard of the same entries are equal, whenever each of them dropped what.

A joiner begins with `settle`: it hands over the sum of the rounds that its own log, checked by catch-up, has certified.

Invariants: the set of entries is closed under `prev` and `deps`; the fold is a function of that set and of `wall_ms`;
`write` never signs two entries for one slot as long as its caller persists as told.
"""

import heapq
from collections import deque
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass

from shoal.crdt.certified import CertifiedChain, ChainBase
from shoal.crdt.clock import HLC_ZERO, Hlc, is_due, merge
from shoal.crdt.entries import (
    DEPS_MAX,
    NO_ENTRY,
    Batch,
    Entry,
    EntryContent,
    measure_batch_bytes,
    measure_entry_bytes,
    sign_batch,
    verify_batch,
)
from shoal.crdt.eras import (
    ERAS_AHEAD,
    ERAS_BEHIND,
    FIRST_ERA,
    PERMANENT_ERA,
    ROUNDS_PER_ERA_MIN,
    era_of_round,
    last_settled_round,
    oldest_kept,
)
from shoal.crdt.evidence import Evidence, EvidenceShelf, Slot
from shoal.crdt.fold import Fold, LedgerState, Verdicts
from shoal.crdt.key_set import KeySet, make_key
from shoal.crdt.kinds import (
    KIND_RULES,
    Body,
    Decree,
    EntryId,
    Kind,
    RoundBody,
    decode_body_untrusted,
    encode_body,
)
from shoal.crdt.merge import RememberedPredicate, RoundPredicate
from shoal.crdt.own_chain import OwnPositions
from shoal.crdt.pending import PendingBatches
from shoal.crdt.standing import Standing
from shoal.protocol.errors import ProtocolError, Refusal, ShoalError
from shoal.protocol.identity import Identity, PeerId, short_peer_id
from shoal.protocol.quorum import Authority

LEDGER_BYTES_MAX = 256 * 1024 * 1024


class ChainForkedError(ShoalError):
    """This peer's own chain has two branches: its key is in use elsewhere, or an old backup was restored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerRules:
    """What every replica of a swarm must agree on.

    `authority`: by whose word rounds are decided; without it no certificate counts. `founders` vote in round 1.
    `is_valid_snapshot` gets a round and the value written for it, must return a bool whatever the bytes are, and must
    be pure: one that looks at local state or time makes replicas diverge. It is asked once for each distinct value.
    """

    swarm: bytes
    owner: PeerId | None
    is_valid_snapshot: RoundPredicate
    authority: Authority | None = None
    founders: tuple[PeerId, ...] = ()
    rounds_per_era: int = ROUNDS_PER_ERA_MIN

    def begin_chain(self) -> ChainBase:
        """Round 0, the manifest itself."""
        return ChainBase(round=0, digest=self.swarm, voters=self.founders)


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
    waits for, to be asked of the sender. `is_known`: the ledger had all of it. Left out, by no fault of the sender:
    `is_full`, because the ledger has reached its size limit; `is_expired`, because its era has been dropped;
    `is_early`, because its era is so far ahead that this replica must learn of newer rounds first.
    """

    accepted: tuple[Batch, ...] = ()
    wanted: tuple[EntryId, ...] = ()
    is_known: bool = False
    is_full: bool = False
    is_expired: bool = False
    is_early: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Truncation:
    """What a store has to do in one step: drop the batches of the eras below `oldest_era`, but for the permanent one,
    and keep `evidence` and `base` in their place."""

    oldest_era: int
    evidence: tuple[Batch, ...]
    base: ChainBase


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
        self._slots: dict[tuple[PeerId, Slot], list[EntryId]] = {}
        self._shelf = EvidenceShelf()
        self.standing = Standing(rules.owner, self._list_branch)
        self._chain = self._begin_chain(rules.begin_chain())
        self._era = FIRST_ERA
        self._oldest_era = FIRST_ERA
        self._own = OwnPositions()
        self._is_valid_snapshot = RememberedPredicate(rules.is_valid_snapshot)
        self._fold = self._make_fold()
        self._fold_mark: tuple[int, int] | None = None
        self._unfolded: list[tuple[Hlc, EntryId]] = []
        self._folded_until = HLC_ZERO
        self._state: LedgerState | None = None
        self._state_mark = self._chain.revision

    def __len__(self) -> int:
        return len(self._entries) + len(self._shelf.batches)

    def __contains__(self, entry_id: EntryId) -> bool:
        return entry_id in self._entries or entry_id in self._shelf.batches

    @property
    def keys(self) -> KeySet:
        """The keys of all entries, for reconciliation; only the ledger adds to it."""
        return self._keys

    @property
    def heads(self) -> Set[EntryId]:
        """The entries that no other entry names."""
        return self._heads

    @property
    def era(self) -> int:
        """The era of the newest certified round that the ledger knows; it never falls."""
        return self._era

    @property
    def base(self) -> ChainBase:
        """The rounds that are summed up, because their eras were dropped."""
        return self._chain.base

    @property
    def own_slot(self) -> Slot:
        """The slot of this peer's next lease."""
        era = self._choose_era(())
        return Slot(era, self.next_seq(era))

    def next_seq(self, era: int) -> int:
        """The sequence number that this peer's next entry in this era has, as far as it knows."""
        return self._own.position(era).seq

    @property
    def forks(self) -> Mapping[PeerId, Slot]:
        """The authors that equivocated and were not re-admitted, and the slot from which on each does not count."""
        return self.standing.forks

    def get(self, entry_id: EntryId) -> Entry | None:
        """The entry with this id, if the ledger holds it."""
        shelved = self._shelf.batches.get(entry_id)
        return self._entries.get(entry_id) or (shelved.entries[0] if shelved else None)

    def follows(self, result_digest: bytes) -> bool:
        """Whether a certificate for this result is held that follows those before it, whether it counts or not."""
        return self._chain.follows(result_digest)

    def list_wanted(self) -> tuple[EntryId, ...]:
        """All ids that waiting batches need and that have not arrived, in ascending order."""
        return self._pending.list_wanted()

    def restore(self, batches: Iterable[Batch], base: ChainBase | None = None, trusted: Container[bytes] = ()) -> None:
        """Take in what this replica stored earlier, without checking the entries' signatures again, nor the votes of
        certificates whose BLAKE3 hashes are in `trusted`.

        Of its own entries it remembers the last even where an ancestor was lost, so that it does not sign that slot
        again. Raises ProtocolError for a batch that could never have been accepted: the store is damaged.
        """
        if base is not None:
            self.settle(base)
            self._oldest_era = oldest_kept(self._era)
        self._chain.trusted = trusted
        for batch in batches:
            self._check_constants(batch)
            if batch.author == self._identity.peer:
                self._own.advance(batch)
            fresh = self._drop_known(batch)
            if fresh is not None:
                self._admit(fresh)
        self._chain.trusted = ()

    def settle(self, base: ChainBase) -> None:
        """Begin the certified chain behind these rounds, to the end of an era, which the caller has checked: when this
        peer's own log is an era ahead of the ledger, or is another log since a re-root."""
        assert base.round % self._rules.rounds_per_era == 0, "rounds are settled by eras"
        self._chain = self._begin_chain(base)
        for entry in self._entries.values():
            if entry.kind == Kind.CERTIFICATE:
                self._add_certificate(entry)
        self._note_era()
        self._fold_mark = None

    def truncate(self) -> Truncation | None:
        """Drop the eras that do not count any more; None where there are none. The caller stores what comes of it."""
        oldest_era = oldest_kept(self._era)
        if oldest_era <= self._oldest_era:
            return None
        for (_, slot), siblings in self._slots.items():
            if PERMANENT_ERA < slot.era < oldest_era and len(siblings) > 1:
                for entry_id in siblings:
                    self._shelve(self.prove(entry_id))
        self._oldest_era = oldest_era
        self._pending.drop_older(oldest_era)
        self._forget_entries()
        self._own.forget_before(oldest_era)
        settled = last_settled_round(self._era, self._rules.rounds_per_era)
        self._chain.truncate(settled, oldest_era)
        self._is_valid_snapshot = RememberedPredicate(self._rules.is_valid_snapshot)
        self._rebuild_keys()
        self._fold_mark = None
        return Truncation(oldest_era=oldest_era, evidence=tuple(self._shelf.batches.values()), base=self._chain.base)

    def write(self, drafts: Sequence[Draft], wall_ms: int) -> Batch:
        """Sign the next entries of the own chain, at most ENTRIES_PER_BATCH_MAX and BATCH_BYTES_MAX of them; decrees of
        the owner are not to be mixed with anything else.

        The batch is not in the ledger yet. The caller persists it durably, then hands it to `accept`, and only then
        sends it: what has left this peer must never be signed anew after a crash. Before the first write after each
        start the caller fetches this peer's own chain from others for the same reason.

        Raises ChainForkedError if this peer has equivocated, and ProtocolError, without using up sequence numbers, if
        others would refuse the entries.
        """
        if self._identity.peer in self.forks:
            raise ChainForkedError(
                f"two different histories are signed by {short_peer_id(self._identity.peer)}; "
                f"its entries no longer count. Fix: {self._explain_way_back()}"
            )
        era = self._choose_era(drafts)
        own = self._own.position(era)
        deps = self._choose_deps(era, wall_ms)
        hlc = merge(self._own.newest_time, max((self._entries[dep].hlc for dep in deps), default=HLC_ZERO), wall_ms)
        contents = [
            EntryContent(
                deps=deps if index == 0 else (),
                hlc=Hlc(hlc + index),
                kind=draft.kind.value,
                body=encode_body(draft.body),
            )
            for index, draft in enumerate(drafts)
        ]
        batch = sign_batch(self._identity, self._rules.swarm, own, contents)
        self._check_constants(batch)
        self._own.advance(batch)
        return batch

    def accept(self, batch: Batch) -> Outcome:
        """Take in a batch; raises ProtocolError if no replica may ever accept it."""
        self._check_constants(batch)
        fresh = self._drop_known(batch)
        if fresh is None:
            return Outcome(is_known=True)
        is_own = batch.author == self._identity.peer
        if batch.era > self._era + ERAS_AHEAD and not is_own:
            return Outcome(is_early=True)
        verify_batch(fresh)
        if not is_own and self._bytes + measure_batch_bytes(fresh) > self._bytes_max:
            return Outcome(is_full=True)
        return self._admit(fresh)

    def prove(self, entry_id: EntryId) -> Batch:
        """The entry and those after it that its signature needs: a batch that any peer can check."""
        if entry_id in self._shelf.batches:
            return self._shelf.batches[entry_id]
        ids = [self._tips[entry_id]]
        while ids[-1] != entry_id:
            ids.append(self._entries[ids[-1]].prev)
        ids.reverse()
        return Batch(
            entries=tuple(self._entries[name] for name in ids), ids=tuple(ids), signature=self._signatures[ids[-1]]
        )

    def list_evidence(self) -> tuple[Evidence, ...]:
        """One proof for each author that equivocated and was not re-admitted, the same at every replica up to the
        signatures, by author."""
        found = []
        for author, slot in sorted(self.forks.items()):
            shelved = [entry_id for entry_id, batch in self._shelf.batches.items() if batch.author == author]
            first, second, *_ = sorted(self._slots.get((author, slot), shelved))
            found.append(Evidence(first=self.prove(first), second=self.prove(second)))
        return tuple(found)

    def fold(self, wall_ms: int) -> LedgerState:
        """The state at this time: of all entries that are due and count. Equal sets of entries give equal states."""
        if self._fold_mark != self._mark_fold() or not is_due(self._folded_until, wall_ms):
            self._forget_fold()
        while self._unfolded and is_due(self._unfolded[0][0], wall_ms):
            hlc, entry_id = heapq.heappop(self._unfolded)
            self._folded_until = max(self._folded_until, hlc)
            entry = self._entries[entry_id]
            if self._is_current(entry.era) and self.standing.is_counting(entry_id, entry):
                self._fold.apply(entry_id, entry)
                self._state = None
        if self._state is None or self._state_mark != self._chain.revision:
            self._state_mark = self._chain.revision
            self._state = self._fold.read(self._judge())
        return self._state

    # -- the fold ------------------------------------------------------------------------------------------------------

    def _make_fold(self) -> Fold:
        return Fold(owner=self._rules.owner, is_valid_snapshot=self._is_valid_snapshot)

    def _mark_fold(self) -> tuple[int, int]:
        return self._era, self.standing.revision

    def _forget_fold(self) -> None:
        self._fold = self._make_fold()
        self._fold_mark = self._mark_fold()
        self._folded_until = HLC_ZERO
        self._state = None
        self._unfolded = [(entry.hlc, entry_id) for entry_id, entry in self._entries.items()]
        heapq.heapify(self._unfolded)

    def _judge(self) -> Verdicts:
        return Verdicts(
            era=self._era,
            head=self._chain.head,
            certificates=self._chain.list_certificates(last_settled_round(self._era, self._rules.rounds_per_era)),
            credit=dict(self._chain.credit),
            contradiction=self._chain.contradiction,
            excluded=dict(self.standing.forks),
            readmissions=dict(self.standing.readmissions),
            bans=self.standing.bans,
            admitted=self.standing.admitted,
        )

    def _is_current(self, era: int) -> bool:
        return era == PERMANENT_ERA or era >= oldest_kept(self._era)

    def _begin_chain(self, base: ChainBase) -> CertifiedChain:
        rules = self._rules
        return CertifiedChain(authority=rules.authority, base=base, rounds_per_era=rules.rounds_per_era)

    def _add_certificate(self, entry: Entry) -> None:
        body = decode_body_untrusted(entry.kind, entry.body)
        assert isinstance(body, RoundBody), "a certificate's body is about a round"
        self._chain.add(body.round, body.value, entry.era)
        self._note_era()

    def _note_era(self) -> None:
        rounds_per_era, settled = self._rules.rounds_per_era, self._chain.base.round
        behind_base = era_of_round(settled + 1, rounds_per_era) + ERAS_BEHIND if settled else FIRST_ERA
        self._era = max(self._era, behind_base, era_of_round(self._chain.newest_round, rounds_per_era))

    # -- admission -----------------------------------------------------------------------------------------------------

    def _check_constants(self, batch: Batch) -> None:
        if batch.swarm != self._rules.swarm:
            raise ProtocolError(Refusal.WRONG_SWARM, "entries of another swarm")
        if batch.author != self._rules.owner and any(KIND_RULES[entry.kind].is_owners for entry in batch.entries):
            raise ProtocolError(Refusal.NOT_A_MEMBER, "only the owner key writes decrees")
        for entry in batch.entries:
            if entry.kind == Kind.CERTIFICATE:
                body = decode_body_untrusted(entry.kind, entry.body)
                assert isinstance(body, RoundBody), "a certificate's body is about a round"
                # Otherwise an era could be dropped with certificates that still count.
                if era_of_round(body.round, self._rules.rounds_per_era) > entry.era:
                    raise ProtocolError(Refusal.MALFORMED, f"round {body.round} is of a later era than {entry.era}")

    def _drop_known(self, batch: Batch) -> Batch | None:
        # The known entries come first, because the ledger holds the ancestors of each entry that it holds.
        known = sum(entry_id in self for entry_id in batch.ids)
        return batch.suffix(known) if known < len(batch.ids) else None

    def _find_missing(self, batch: Batch) -> frozenset[EntryId]:
        named = {batch.entries[0].prev}.union(*(entry.deps for entry in batch.entries))
        return frozenset(name for name in named.difference(batch.ids, (NO_ENTRY,)) if name not in self._entries)

    def _is_dropped(self, era: int) -> bool:
        return PERMANENT_ERA < era < self._oldest_era

    def _admit(self, batch: Batch) -> Outcome:
        if self._is_dropped(batch.era):
            return self._admit_expired(batch)
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
            if (previous.author, previous.era, previous.seq + 1) != (first.author, first.era, first.seq):
                raise ProtocolError(Refusal.MALFORMED, "the previous entry is not this author's one before")
            if previous.hlc >= first.hlc:
                raise ProtocolError(Refusal.MALFORMED, "entry times do not increase along the chain")
        for entry in batch.entries:
            for dep in entry.deps:
                ancestor = self._entries.get(dep) or earlier[dep]
                if ancestor.era != entry.era:
                    raise ProtocolError(Refusal.MALFORMED, "an entry depends on one of another era")
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
            slot = Slot(entry.era, entry.seq)
            siblings = self._slots.setdefault((entry.author, slot), [])
            siblings.append(entry_id)
            if len(siblings) > 1:
                self.standing.contradict(entry.author, slot)
            self.standing.note_entry(entry)
            self._take_verdict(entry_id, entry)
        if batch.author == self._identity.peer:
            self._own.advance(batch)

    def _take_verdict(self, entry_id: EntryId, entry: Entry) -> None:
        if entry.kind == Kind.CERTIFICATE:
            self._add_certificate(entry)
        elif entry.kind in (Kind.BAN, Kind.READMISSION, Kind.ADMISSION):
            body = decode_body_untrusted(entry.kind, entry.body)
            assert isinstance(body, Decree), "bodies follow their kinds"
            self.standing.decree(entry_id, entry.seq, body)
            before = self._shelf.batches
            for author in self._shelf.slots:
                self._shelf.forgive(author, self.standing.readmitted_until(author))
            self._follow_shelf(before)

    # -- eras ----------------------------------------------------------------------------------------------------------

    def _admit_expired(self, batch: Batch) -> Outcome:
        """Of a dropped era only what proves equivocation is of use."""
        before = self._shelf.batches
        for index in range(len(batch.ids)):
            self._shelve(batch.suffix(index))
        if before is self._shelf.batches:
            return Outcome(is_expired=True)
        self.standing.forget_slots(self._oldest_era, self._shelf.slots)
        self._follow_shelf(before)
        fresh = (proof for entry_id, proof in self._shelf.batches.items() if entry_id not in before)
        return Outcome(accepted=tuple(fresh))

    def _shelve(self, batch: Batch) -> None:
        if batch.era > self.standing.readmitted_until(batch.author) and self._shelf.offer(batch):
            self._shelf.trim(self._chain.credit)

    def _forget_entries(self) -> None:
        kept = {entry_id: entry for entry_id, entry in self._entries.items() if not self._is_dropped(entry.era)}
        self._entries = kept
        self._bytes = sum(map(measure_entry_bytes, kept.values()))
        self._heads.intersection_update(kept)
        self._tips = {entry_id: tip for entry_id, tip in self._tips.items() if entry_id in kept}
        self._signatures = {tip: signature for tip, signature in self._signatures.items() if tip in kept}
        self._slots = {key: ids for key, ids in self._slots.items() if not self._is_dropped(key[1].era)}
        self.standing.forget_slots(self._oldest_era, self._shelf.slots)

    def _rebuild_keys(self) -> None:
        self._keys = KeySet()
        for entry_id, entry in self._entries.items():
            self._keys.add(make_key(entry.hlc, entry_id))
        self._follow_shelf({})

    def _follow_shelf(self, before: Mapping[EntryId, Batch]) -> None:
        after = self._shelf.batches
        for entry_id in before.keys() - after.keys():
            self._keys.remove(make_key(before[entry_id].entries[0].hlc, entry_id))
        for entry_id in after.keys() - before.keys():
            self._keys.add(make_key(after[entry_id].entries[0].hlc, entry_id))

    def _list_branch(self, tip: EntryId) -> Iterator[tuple[EntryId, Entry]]:
        while (entry := self._entries.get(tip)) is not None:
            yield tip, entry
            tip = entry.prev

    # -- the own chain -------------------------------------------------------------------------------------------------

    def _choose_era(self, drafts: Sequence[Draft]) -> int:
        """The current era, or a later one in which this peer has written already, or into which a round belongs."""
        if drafts and KIND_RULES[drafts[0].kind].is_owners:
            return PERMANENT_ERA
        rounds = (draft.body.round for draft in drafts if isinstance(draft.body, RoundBody))
        belong = (era_of_round(number, self._rules.rounds_per_era) for number in rounds)
        after_readmission = self.standing.readmitted_until(self._identity.peer) + 1
        return max(self._era, self._own.newest_era, *belong, after_readmission)

    def _choose_deps(self, era: int, wall_ms: int) -> tuple[EntryId, ...]:
        # An entry from the future would drag this peer's clock along; one of an excluded author would spread its forks.
        seen = (
            (entry.hlc, entry_id)
            for entry_id, entry in ((head, self._entries[head]) for head in self._heads)
            if entry.era == era
            and entry.author != self._identity.peer
            and is_due(entry.hlc, wall_ms)
            and self.standing.is_counting(entry_id, entry)
        )
        return tuple(sorted(entry_id for _, entry_id in heapq.nlargest(DEPS_MAX, seen)))

    def _explain_way_back(self) -> str:
        if self._rules.owner is None:
            return "start this peer with a new identity; this swarm has no owner who could re-admit it"
        return "ask the swarm's owner to re-admit it (`shoal swarm readmit`), or start this peer with a new identity"
