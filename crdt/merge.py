"""The merge rules: small lattices, each with one operation that may come in any order and any number of times.

Invariant of every class here: its value is a function of the *set* of operations put into it (commutative, associative,
idempotent), and no author's operation changes what another author owns. See Shapiro et al., "A comprehensive study of
convergent and commutative replicated data types" (2011), and for observed removal without tombstones of names, section
3.3.5 there.
"""

from collections.abc import Callable
from dataclasses import dataclass

from blake3 import blake3

from shoal.crdt.clock import Hlc
from shoal.crdt.kinds import EntryId
from shoal.protocol.identity import PeerId

RoundPredicate = Callable[[int, bytes], bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class RegisterValue:
    """What one author last said, with the era, sequence number and time of that entry."""

    era: int
    seq: int
    hlc: Hlc
    value: bytes


class AuthorRegister:
    """One value an author; only the author writes it and the author's later entry wins."""

    def __init__(self) -> None:
        self.values: dict[PeerId, RegisterValue] = {}

    def put(self, author: PeerId, value: RegisterValue) -> None:
        current = self.values.get(author)
        if current is None or (current.era, current.seq) < (value.era, value.seq):
            self.values[author] = value


class GrowOnlySet:
    """Every valid value of a round; never withdrawn."""

    def __init__(self, is_valid: RoundPredicate) -> None:
        self._is_valid = is_valid
        self._values: dict[int, set[bytes]] = {}

    def put(self, round_number: int, value: bytes) -> None:
        if self._is_valid(round_number, value):
            self._values.setdefault(round_number, set()).add(value)

    def list_values(self) -> dict[int, tuple[bytes, ...]]:
        """The values of each round in ascending order of their bytes."""
        return {round_number: tuple(sorted(values)) for round_number, values in self._values.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Tag:
    """A named note of one author; `entry` is the id by which it can be removed."""

    name: str
    value: bytes
    author: PeerId
    entry: EntryId


class ObservedRemoveSet:
    """Tags by the entries that added them; a removal names the adds it has seen, so a concurrent add survives it.

    A removal counts where its author is the tag's author or the swarm's owner.
    """

    def __init__(self, owner: PeerId | None) -> None:
        self._owner = owner
        self._adds: dict[EntryId, Tag] = {}
        self._removers: dict[EntryId, set[PeerId]] = {}

    def add(self, tag: Tag) -> None:
        self._adds[tag.entry] = tag

    def remove(self, entry: EntryId, remover: PeerId) -> None:
        self._removers.setdefault(entry, set()).add(remover)

    def list_present(self) -> tuple[Tag, ...]:
        """The tags that stand, by name and then by entry id."""
        standing = (tag for tag in self._adds.values() if not self._is_removed(tag))
        return tuple(sorted(standing, key=lambda tag: (tag.name, tag.entry)))

    def _is_removed(self, tag: Tag) -> bool:
        removers = self._removers.get(tag.entry, ())
        return tag.author in removers or (self._owner is not None and self._owner in removers)


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnerValue:
    """What the owner key decreed, and under which version."""

    version: int
    value: bytes


class OwnerRegister:
    """One value for the swarm; the highest version wins, and of one version the entry that was first in the chain.

    The caller puts entries of the owner's own chain only, none twice under one sequence number.
    """

    def __init__(self) -> None:
        self._seq = -1
        self.value: OwnerValue | None = None

    def put(self, seq: int, value: OwnerValue) -> None:
        current = self.value
        if current is None or (value.version, -seq) > (current.version, -self._seq):
            self._seq = seq
            self.value = value


class RememberedPredicate:
    """A pure predicate that is asked once for each (round, value): to verify a quorum of signatures is not cheap.

    Bounded by the entries of the ledger that asks.
    """

    def __init__(self, ask: RoundPredicate) -> None:
        self._ask = ask
        self._answers: dict[tuple[int, bytes], bool] = {}

    def __call__(self, round_number: int, value: bytes) -> bool:
        key = round_number, blake3(value).digest()
        if key not in self._answers:
            self._answers[key] = self._ask(round_number, value)
        return self._answers[key]
