"""Whose entries count: equivocation, readmission and bans; and whom the owner has admitted to the swarm.

An author that signed two entries for one slot has equivocated: from the first such slot on nothing of it counts, in no
era, until the owner re-admits it. A readmission names an era and an entry: of that era the chain that ends in the entry
counts and nothing else, of earlier ones what lies before the first contradiction, and from the next era on the author
is judged anew. The readmission of the latest era stands, of one era the last. A ban holds until the owner lifts it. An
admission holds for ever and says nothing about entries; a ban beats it.

Certificates are not subject to any of this, because they prove themselves (certified.py).

Invariant: all of this is a function of the set of entries, whatever their order, and no clock plays a part.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from shoal.crdt.entries import DECREES_MAX, Entry
from shoal.crdt.eras import PERMANENT_ERA
from shoal.crdt.evidence import Slot
from shoal.crdt.kinds import AdmissionBody, BanBody, Decree, EntryId, ReadmissionBody
from shoal.protocol.identity import PeerId


@dataclass(frozen=True, slots=True, kw_only=True)
class Ban:
    """A ban that holds; `entry` is the id by which it can be lifted."""

    peer: bytes
    reason: str
    entry: EntryId


class Standing:
    """`list_branch` gives an entry and those before it in its author's chain of the era; nothing for an unknown id."""

    def __init__(self, owner: PeerId | None, list_branch: Callable[[EntryId], Iterable[tuple[EntryId, Entry]]]) -> None:
        self._owner = owner
        self._list_branch = list_branch
        self._slots: dict[PeerId, set[Slot]] = {}
        self._decrees: dict[int, tuple[EntryId, Decree]] = {}
        self._bans: tuple[Ban, ...] = ()
        self._banned: frozenset[bytes] = frozenset()
        self._admitted: frozenset[PeerId] = frozenset()
        self._readmissions: dict[PeerId, ReadmissionBody] = {}
        self._branches: dict[PeerId, frozenset[EntryId]] = {}
        self._forks: dict[PeerId, Slot] = {}
        # Grows whenever other entries may count than before.
        self.revision = 0

    @property
    def forks(self) -> Mapping[PeerId, Slot]:
        """The authors that equivocated and were not re-admitted, and the slot from which on each does not count."""
        return self._forks

    @property
    def bans(self) -> tuple[Ban, ...]:
        """The bans that hold, by peer and entry."""
        return self._bans

    @property
    def banned(self) -> frozenset[bytes]:
        """The peers of those bans."""
        return self._banned

    @property
    def admitted(self) -> frozenset[PeerId]:
        """The peers that the owner has admitted, banned ones among them."""
        return self._admitted

    @property
    def last_decree(self) -> EntryId | None:
        """The end of the owner's chain, as far as it is known."""
        return self._decrees[max(self._decrees)][0] if self._decrees else None

    @property
    def readmissions(self) -> Mapping[PeerId, ReadmissionBody]:
        """The one that stands of each author that was re-admitted."""
        return self._readmissions

    def contradict(self, author: PeerId, slot: Slot) -> None:
        """The author has signed two entries for this slot."""
        if slot not in self._slots.setdefault(author, set()):
            self._slots[author].add(slot)
            if author == self._owner and slot.era == PERMANENT_ERA:
                self._read_decrees()
            self._find_fork(author)

    def decree(self, entry_id: EntryId, seq: int, body: Decree) -> None:
        """An entry of the owner's permanent chain."""
        self._decrees[seq] = entry_id, body
        self._read_decrees()

    def note_entry(self, entry: Entry) -> None:
        """A new entry: it may belong to the branch that a readmission has named."""
        readmission = self._readmissions.get(entry.author)
        if readmission is not None and readmission.era == entry.era:
            self._branches.pop(entry.author, None)
            self.revision += 1

    def forget_slots(self, oldest_era: int, kept: Mapping[PeerId, Slot]) -> None:
        """Contradictions of eras before this one are forgotten but for those in `kept`, one an author."""
        for author in sorted({*self._slots, *kept}):
            held = self._slots.pop(author, set())
            slots = {slot for slot in held if slot.era == PERMANENT_ERA or slot.era >= oldest_era}
            if author in kept:
                slots.add(kept[author])
            if slots:
                self._slots[author] = slots
            self._find_fork(author)

    def readmitted_until(self, author: PeerId) -> int:
        """The era up to which the author's contradictions are forgiven; the permanent one, that is none, without."""
        readmission = self._readmissions.get(author)
        return PERMANENT_ERA if readmission is None else readmission.era

    def is_counting(self, entry_id: EntryId, entry: Entry) -> bool:
        """Whether what this entry says counts."""
        author, slot = entry.author, Slot(entry.era, entry.seq)
        fork = self._forks.get(author)
        if fork is not None and fork <= slot:
            return False
        if slot.era == PERMANENT_ERA:
            return True
        if author in self._banned:
            return False
        until = self.readmitted_until(author)
        if slot.era < until:
            return not any(one.era == slot.era and one.seq <= slot.seq for one in self._slots.get(author, ()))
        return slot.era > until or entry_id in self._list_standing(author)

    def _list_standing(self, author: PeerId) -> frozenset[EntryId]:
        if author not in self._branches:
            readmission = self._readmissions[author]
            branch = self._list_branch(readmission.stands)
            self._branches[author] = frozenset(
                entry_id
                for entry_id, entry in branch
                if (entry.author, entry.era) == (readmission.author, readmission.era)
            )
        return self._branches[author]

    def _find_fork(self, author: PeerId) -> None:
        until = self.readmitted_until(author)
        slots = self._slots.get(author, ())
        fork = min((slot for slot in slots if slot.era == PERMANENT_ERA or slot.era > until), default=None)
        if fork == self._forks.get(author):
            return
        self.revision += 1
        if fork is None:
            del self._forks[author]
        else:
            self._forks[author] = fork

    def _read_decrees(self) -> None:
        """What the owner has decreed, up to where its own chain has two branches."""
        slots = self._slots.get(self._owner, ()) if self._owner is not None else ()
        end = min((slot.seq for slot in slots if slot.era == PERMANENT_ERA), default=DECREES_MAX)
        chain = [decree for seq, decree in sorted(self._decrees.items()) if seq < end]
        bans = {entry_id: body for entry_id, body in chain if isinstance(body, BanBody) and not body.removes}
        for _, body in chain:
            for lifted in body.removes if isinstance(body, BanBody) else ():
                bans.pop(lifted, None)
        self._bans = tuple(
            sorted(
                (Ban(peer=body.peer, reason=body.reason, entry=entry_id) for entry_id, body in bans.items()),
                key=lambda ban: (ban.peer, ban.entry),
            )
        )
        self._banned = frozenset(ban.peer for ban in self._bans)
        self._admitted = frozenset(peer for _, body in chain if isinstance(body, AdmissionBody) for peer in body.peers)
        readmissions = [body for _, body in chain if isinstance(body, ReadmissionBody)]
        self._readmissions = {body.author: body for body in sorted(readmissions, key=lambda body: body.era)}
        self._branches = {}
        self.revision += 1
        for author in list(self._slots):
            self._find_fork(author)
