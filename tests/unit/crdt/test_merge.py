"""Each merge rule is a function of the set of operations, and nobody moves what another owns."""

import itertools

from shoal.crdt.clock import Hlc
from shoal.crdt.kinds import EntryId
from shoal.crdt.merge import (
    AuthorRegister,
    GrowOnlySet,
    ObservedRemoveSet,
    OwnerRegister,
    OwnerValue,
    RegisterValue,
    RememberedPredicate,
    Tag,
)
from shoal.protocol.identity import PeerId

ANNA, BEN, OWNER = PeerId(b"a" * 32), PeerId(b"b" * 32), PeerId(b"o" * 32)


def register_value(seq: int, value: bytes) -> RegisterValue:
    return RegisterValue(era=1, seq=seq, hlc=Hlc(seq), value=value)


def test_an_author_register_keeps_each_authors_latest() -> None:
    puts = [(ANNA, register_value(0, b"x")), (ANNA, register_value(4, b"y")), (BEN, register_value(1, b"z"))]
    for order in itertools.permutations([*puts, puts[0]]):
        register = AuthorRegister()
        for author, value in order:
            register.put(author, value)
        assert register.values == {ANNA: puts[1][1], BEN: puts[2][1]}


def test_a_grow_only_set_keeps_every_valid_value_in_order() -> None:
    for order in itertools.permutations([(7, b"b"), (7, b"a"), (7, b"bad"), (8, b"c")]):
        rounds = GrowOnlySet(lambda _, value: value != b"bad")
        for number, value in (*order, order[0]):
            rounds.put(number, value)
        assert rounds.list_values() == {7: (b"a", b"b"), 8: (b"c",)}


def tag(name: str, author: PeerId, number: int) -> Tag:
    return Tag(name=name, value=b"", author=author, entry=EntryId(bytes([number]) * 32))


def test_a_removal_takes_only_the_adds_that_it_names() -> None:
    first, again = tag("best", ANNA, 1), tag("best", ANNA, 2)
    for removal_first in (True, False):
        tags = ObservedRemoveSet(OWNER)
        if removal_first:
            tags.remove(first.entry, ANNA)
        tags.add(first)
        tags.add(again)
        if not removal_first:
            tags.remove(first.entry, ANNA)
        assert tags.list_present() == (again,)


def test_only_the_author_and_the_owner_remove_a_tag() -> None:
    kept, removed = tag("kept", ANNA, 1), tag("removed", ANNA, 2)
    tags = ObservedRemoveSet(OWNER)
    tags.add(kept)
    tags.add(removed)
    tags.remove(kept.entry, BEN)
    tags.remove(removed.entry, BEN)
    tags.remove(removed.entry, OWNER)
    assert tags.list_present() == (kept,)


def test_without_an_owner_nobody_removes_for_others() -> None:
    tags = ObservedRemoveSet(None)
    tags.add(tag("kept", ANNA, 1))
    tags.remove(EntryId(bytes([1]) * 32), BEN)
    assert [present.name for present in tags.list_present()] == ["kept"]


def test_an_owner_register_takes_the_highest_version_and_of_equals_the_first() -> None:
    puts = [(0, 1, b"one"), (1, 5, b"five"), (2, 5, b"five again"), (3, 2, b"two")]
    for order in itertools.permutations(puts):
        register = OwnerRegister()
        for seq, version, value in order:
            register.put(seq, OwnerValue(version=version, value=value))
        assert register.value == OwnerValue(version=5, value=b"five")


def test_a_remembered_predicate_is_asked_once_for_each_value() -> None:
    asked: list[tuple[int, bytes]] = []

    def ask(number: int, value: bytes) -> bool:
        asked.append((number, value))
        return number == 1

    predicate = RememberedPredicate(ask)
    assert [predicate(number, b"x") for number in (1, 1, 2, 2)] == [True, True, False, False]
    assert asked == [(1, b"x"), (2, b"x")]
