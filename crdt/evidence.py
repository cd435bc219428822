"""Proof that an author equivocated, and the shelf on which it outlives the era that it is from.

While an era is held, the contradiction is in the ledger. When the era is dropped, the two entries stay, each with the
rest of its batch that makes its signature checkable, and without its ancestors: they prove themselves. Of an author
only the earliest contradiction is kept, and of more than two entries there the two with the lowest ids, so what is
kept is a function of what was ever held, wherever and whenever it was dropped.

Invariants: at most AUTHORS_MAX authors have something on the shelf, those with certified work first, then by id; at
most LONE_MAX entries of dropped eras wait for one that contradicts them.
"""

from collections import OrderedDict
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from shoal.crdt.entries import Batch, verify_batch
from shoal.crdt.kinds import EntryId
from shoal.protocol.errors import ProtocolError, Refusal
from shoal.protocol.identity import PeerId

AUTHORS_MAX = 256
LONE_MAX = 1024


class Slot(NamedTuple):
    """A place in an author's chains; slots order as an honest author fills them."""

    era: int
    seq: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """Proof that an author equivocated: two batches whose first entries differ but have one slot."""

    first: Batch
    second: Batch

    @property
    def author(self) -> PeerId:
        return self.first.author

    @property
    def slot(self) -> Slot:
        return slot_of(self.first)


def slot_of(batch: Batch) -> Slot:
    """The slot of the batch's first entry."""
    return Slot(batch.era, batch.entries[0].seq)


def check_evidence(evidence: Evidence) -> None:
    """Raise ProtocolError unless the two batches prove equivocation to anybody who knows neither side."""
    slots = [(batch.swarm, batch.author, slot_of(batch)) for batch in (evidence.first, evidence.second)]
    if slots[0] != slots[1] or evidence.first.ids[0] == evidence.second.ids[0]:
        raise ProtocolError(Refusal.MALFORMED, "the two batches do not contradict each other")
    verify_batch(evidence.first)
    verify_batch(evidence.second)


class EvidenceShelf:
    """Contradictions of dropped eras. Batches are given with correct signatures; their first entries are meant."""

    def __init__(self, *, authors_max: int = AUTHORS_MAX, lone_max: int = LONE_MAX) -> None:
        self._authors_max = authors_max
        self._lone_max = lone_max
        self._pairs: dict[PeerId, tuple[Slot, dict[EntryId, Batch]]] = {}
        self._lone: OrderedDict[tuple[PeerId, Slot], Batch] = OrderedDict()
        self._batches: dict[EntryId, Batch] = {}

    @property
    def slots(self) -> Mapping[PeerId, Slot]:
        """The authors that have something on the shelf, and where they contradict themselves."""
        return {author: slot for author, (slot, _) in self._pairs.items()}

    @property
    def batches(self) -> Mapping[EntryId, Batch]:
        """What is on the shelf, by the ids of the entries that contradict each other; a new mapping at every change."""
        return self._batches

    def offer(self, batch: Batch) -> bool:
        """Take in an entry of a dropped era with its proof; whether that changed the shelf. Most contradict nothing."""
        slot, author = slot_of(batch), batch.author
        held = self._pairs.get(author)
        if held is not None and held[0] < slot:
            return False
        if held is not None and held[0] == slot:
            entries = {**held[1], batch.ids[0]: batch}
        else:
            other = self._lone.pop((author, slot), batch)
            entries = {other.ids[0]: other, batch.ids[0]: batch}
            if len(entries) == 1:
                self._lone[author, slot] = batch
                if len(self._lone) > self._lone_max:
                    self._lone.popitem(last=False)
                return False
        lowest = dict(sorted(entries.items())[:2])
        if held is not None and held[0] == slot and held[1].keys() == lowest.keys():
            return False
        self._pairs[author] = slot, lowest
        self._index()
        return True

    def forgive(self, author: PeerId, era: int) -> None:
        """The owner has re-admitted the author: what it contradicted itself in up to this era is of no account."""
        if author in self._pairs and self._pairs[author][0].era <= era:
            del self._pairs[author]
            self._index()

    def trim(self, preferred: Container[PeerId]) -> None:
        """Keep within the limit: the authors in `preferred` first, then the lowest ids."""
        if len(self._pairs) > self._authors_max:
            ranked = sorted(self._pairs, key=lambda author: (author not in preferred, author))
            self._pairs = {author: self._pairs[author] for author in ranked[: self._authors_max]}
            self._index()

    def _index(self) -> None:
        self._batches = {
            entry_id: batch for author in sorted(self._pairs) for entry_id, batch in self._pairs[author][1].items()
        }
