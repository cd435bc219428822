"""The logs that certificates lead to: one line, or a tree where a re-root lets logs part.

Independent of protocol.lineage: a log is weighed anew here, from its beginning.
"""

from collections.abc import Iterator

from shoal.protocol.messages import Certificate, Result
from shoal.protocol.quorum import REROOT_ATTEMPT, Head
from tests.sim import oracle

Weight = tuple[int, int, bytes]


class InvariantBroken(AssertionError):
    """Which invariant, where, and what was seen."""

    def __init__(self, name: str, detail: str) -> None:
        super().__init__(f"{name}: {detail}")
        self.name = name


def broken(name: str, detail: str) -> InvariantBroken:
    return InvariantBroken(name, detail)


class Logs:
    """Every certified head by its digest. Without `may_part` there is one result for each round."""

    def __init__(self, genesis: Head, *, may_part: bool) -> None:
        self.heads: dict[bytes, Head] = {genesis.digest: genesis}
        self._may_part = may_part
        self._of_round: dict[int, bytes] = {}
        self._previous: dict[bytes, bytes] = {}
        self._followed: set[bytes] = set()  # heads that are not the last of their log
        self._regular: dict[bytes, bytes] = {}  # what a quorum made of a head, by the head
        self._rerooted: set[bytes] = set()  # what was certified by a re-root
        self._weights: dict[bytes, Weight] = {genesis.digest: (0, 0, genesis.digest)}

    def add(self, certificate: Certificate, head: Head) -> bool:
        """A certified result and the head that it leads to; False when it led to another one elsewhere. Raises when it
        is a second result of its round on its log."""
        result, digest = certificate.result, head.digest
        is_reroot = certificate.attempt == REROOT_ATTEMPT
        if self._may_part:
            known = digest if is_reroot else self._regular.setdefault(result.previous, digest)
        else:
            known = b"" if is_reroot else self._of_round.setdefault(result.round, digest)
        if known != digest or result.previous not in self.heads:
            raise broken("one result per round", f"round {result.round}, attempt {certificate.attempt}")
        if is_reroot:
            self._rerooted.add(digest)
        if digest not in self.heads:
            tokens, rounds, _ = self._weights[result.previous]
            self._weights[digest] = (tokens + count_tokens(result), rounds + 1, digest)
            self._previous[digest] = result.previous
            self._followed.add(result.previous)
        return self.heads.setdefault(digest, head) == head

    def newest(self) -> Head:
        """The last of the longest log."""
        return max(self.heads.values(), key=lambda head: (head.round, self._weights[head.digest]))

    def ends(self) -> list[Head]:
        """The last head of each log."""
        return [head for digest, head in self.heads.items() if digest not in self._followed]

    def heaviest(self, heads: list[Head]) -> Head:
        return max(heads, key=lambda head: self._weights[head.digest])

    def back_from(self, head: Head) -> Iterator[Head]:
        """A log from this head back to its beginning."""
        digest: bytes | None = head.digest
        while digest is not None:
            yield self.heads[digest]
            digest = self._previous.get(digest)

    def leads_to(self, early: Head, late: Head) -> bool:
        """Whether both are on one log, in this order."""
        return next((head for head in self.back_from(late) if head.round <= early.round), None) == early

    def is_one(self, heads: list[Head]) -> bool:
        """Whether all of these are on one log."""
        newest = max(heads, key=lambda head: head.round)
        return all(self.leads_to(head, newest) for head in heads)

    def check_switch(self, number: int, mine: Head, theirs: bytes, first: int) -> None:
        """Raise unless the other log is heavier and parts lawfully from the own one, at round `first`."""
        if theirs not in self.heads:
            raise broken("rounds are undone for a heavier log", f"peer {number} goes over to what nobody certified")
        if self._weights[theirs] <= self._weights[mine.digest]:
            raise broken("rounds are undone for a heavier log", f"peer {number} goes over to a lighter one")
        own = {head.round: head.digest for head in self.back_from(mine)}
        other = {head.round: head.digest for head in self.back_from(self.heads[theirs])}
        if own[first - 1] != other[first - 1] or own[first] == other[first]:
            raise broken("rounds are undone for a heavier log", f"peer {number}: logs do not part at round {first}")
        if not {own[first], other[first]} & self._rerooted:
            raise broken("rounds are undone for a heavier log", f"peer {number}: no re-root in round {first}")

    def check_chosen(self, chosen: Head, lived: list[Head]) -> None:
        """Raise unless none of the logs that lived is heavier than the one that everybody is on now."""
        for one in lived:
            if not self.leads_to(one, chosen) and self._weights[one.digest] > self._weights[chosen.digest]:
                raise broken("the heaviest log stays", f"round {one.round} of another log weighs more")


def count_tokens(result: Result) -> int:
    """The tokens of everybody of whom any part is in the result."""
    bits = 0
    for part in result.parts:
        bits |= int.from_bytes(part.contributors, "little")
    members = oracle.list_indices(bits.to_bytes(len(result.members) // 8 + 1, "little"), len(result.members))
    return sum(result.members[index].tokens for index in members)
