"""Finding the nodes closest to a key over disjoint paths, so that no liar sees more than the path that asks it.

After S/Kademlia (Baumgart and Mies, 2007): PATHS look-ups run side by side, every node is asked by one of them at most,
and what it answers is heeded by that one alone. A core without a clock: the owner sends what `poll` returns (several at
once) and reports each outcome.

Invariants: no node is asked twice; at most PATHS * QUERIES_PER_PATH are under way and QUERIES_MAX are made in all,
whatever is answered; a path keeps at most CANDIDATES_MAX nodes and takes CLOSER_MAX of one answer; which path has what
found is known, and `share_out` gives each an equal part of what is kept.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from shoal.protocol.identity import PeerId, encode_libp2p_peer_id

PATHS = 3
QUERIES_PER_PATH = 3
# How many of the nodes closest to the key each path wants to have asked; all paths together find REPLICAS of them.
PATH_WIDTH = 8
REPLICAS = 20
QUERIES_MAX = 96
CLOSER_MAX = 20
CANDIDATES_MAX = 64

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Contact:
    """A node and where it is said to be."""

    peer: PeerId
    addresses: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """Ask this node, then call `note_answer` or `note_failure`."""

    path: int
    contact: Contact


@dataclass(slots=True)
class _Path:
    candidates: dict[PeerId, Contact] = field(default_factory=dict)
    under_way: set[PeerId] = field(default_factory=set)
    answered: set[PeerId] = field(default_factory=set)


class Lookup:
    """One look-up. Each member of `seeds` begins a path; a node in several begins the first that comes to ask it."""

    def __init__(self, key: bytes, me: PeerId, seeds: Sequence[Iterable[Contact]]) -> None:
        self._target = place_of(key)
        self._me = me
        self._asked: set[PeerId] = set()
        self._answered: dict[PeerId, Contact] = {}
        self._paths = [_Path() for _ in seeds]
        for path, contacts in zip(self._paths, seeds, strict=True):
            self._add(path, contacts)

    @property
    def paths(self) -> int:
        """How many there are."""
        return len(self._paths)

    @property
    def is_over(self) -> bool:
        """Whether nothing is under way and nothing is left to ask."""
        return not any(path.under_way or self._next_of(path) for path in self._paths)

    def poll(self) -> tuple[Query, ...]:
        """What to ask now, besides what is under way."""
        queries: list[Query] = []
        for number, path in enumerate(self._paths):
            while len(path.under_way) < QUERIES_PER_PATH and (contact := self._next_of(path)) is not None:
                self._asked.add(contact.peer)
                path.under_way.add(contact.peer)
                queries.append(Query(path=number, contact=contact))
        return tuple(queries)

    def note_answer(self, query: Query, closer: Iterable[Contact]) -> None:
        """The node has answered, and named these."""
        path = self._paths[query.path]
        path.under_way.discard(query.contact.peer)
        path.answered.add(query.contact.peer)
        self._answered[query.contact.peer] = query.contact
        self._add(path, closer)

    def note_failure(self, query: Query) -> None:
        """The node has not answered, or not properly."""
        path = self._paths[query.path]
        path.under_way.discard(query.contact.peer)
        path.candidates.pop(query.contact.peer, None)

    def closest(self) -> tuple[Contact, ...]:
        """The nodes closest to the key that have answered, of all paths, the closest first."""
        ranked = sorted(self._answered.values(), key=lambda contact: self._distance(contact.peer))
        return tuple(ranked[:REPLICAS])

    def _add(self, path: _Path, contacts: Iterable[Contact]) -> None:
        for contact, _ in zip(contacts, range(CLOSER_MAX), strict=False):
            if contact.peer != self._me and contact.peer not in path.candidates:
                path.candidates[contact.peer] = contact
        if len(path.candidates) > CANDIDATES_MAX:
            kept = sorted(path.candidates, key=self._distance)[:CANDIDATES_MAX]
            path.candidates = {peer: path.candidates[peer] for peer in kept}

    def _next_of(self, path: _Path) -> Contact | None:
        """The closest node of this path that nobody has asked, while it is among the PATH_WIDTH closest of its own."""
        if len(self._asked) >= QUERIES_MAX:
            return None
        own = (peer for peer in path.candidates if peer not in self._asked or self._is_of(path, peer))
        for peer in sorted(own, key=self._distance)[:PATH_WIDTH]:
            if peer not in self._asked:
                return path.candidates[peer]
        return None

    def _is_of(self, path: _Path, peer: PeerId) -> bool:
        return peer in path.under_way or peer in path.answered

    def _distance(self, peer: PeerId) -> int:
        return place_of(encode_libp2p_peer_id(peer)) ^ self._target


def place_of(name: bytes) -> int:
    """Where a key, or the node with that libp2p peer id, lies among all; the distance of two is their exclusive or."""
    return int.from_bytes(hashlib.sha256(name).digest(), "big")


def deal_seeds(key: bytes, own_choice: Iterable[Contact], table: Iterable[Contact]) -> tuple[tuple[Contact, ...], ...]:
    """Where each path begins. The first begins with peers that this one chose to connect to, and with them alone, for
    whoever fills the routing table has no hand in that; the others share the table's closest, turn by turn.
    """
    target = place_of(key)

    def distance(contact: Contact) -> int:
        return place_of(encode_libp2p_peer_id(contact.peer)) ^ target

    chosen = tuple(sorted(own_choice, key=distance)[:CLOSER_MAX])
    rest = sorted(table, key=distance)[: PATHS * PATH_WIDTH]
    shares = PATHS - 1 if chosen else PATHS
    dealt = tuple(tuple(rest[number::shares]) for number in range(shares))
    return (chosen, *dealt) if chosen else dealt


def share_out(found: Sequence[Sequence[T]], count: int) -> tuple[T, ...]:
    """At most `count` of what the paths have found, without repetition: from each in turn, in the order of finding."""
    kept: dict[T, None] = {}
    for turn in range(max((len(each) for each in found), default=0)):
        for each in found:
            if turn < len(each) and len(kept) < count:
                kept.setdefault(each[turn])
    return tuple(kept)
