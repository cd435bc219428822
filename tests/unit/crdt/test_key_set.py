import random

import pytest

from shoal.crdt.clock import HLC_MAX, Hlc
from shoal.crdt.key_set import (
    CHUNK_KEYS_MAX,
    KEY_BYTES,
    KEY_END,
    KEY_FIRST,
    KeySet,
    find_separator,
    id_of_key,
    make_key,
)
from shoal.crdt.kinds import EntryId


def make_keys(count: int, seed: int = 1) -> list[bytes]:
    source = random.Random(seed)
    return [make_key(Hlc(source.randrange(2**62)), EntryId(source.randbytes(32))) for _ in range(count)]


def fill(keys: list[bytes]) -> KeySet:
    key_set = KeySet()
    for key in keys:
        key_set.add(key)
    return key_set


def sum_ids(keys: list[bytes]) -> int:
    return sum(int.from_bytes(id_of_key(key), "big") for key in keys) % 2**256


def test_an_empty_set_answers_everything() -> None:
    key_set = KeySet()
    assert len(key_set) == 0
    assert list(key_set.iterate(KEY_FIRST, KEY_END)) == []
    assert key_set.add_up(KEY_FIRST, KEY_END) == (0, 0)
    assert key_set.rank(KEY_END) == 0


def test_ranges_agree_with_a_plain_sorted_list() -> None:
    keys = make_keys(3 * CHUNK_KEYS_MAX)
    key_set = fill(keys)
    keys.sort()
    source = random.Random(2)
    bounds = [KEY_FIRST, KEY_END, *(key[: source.randrange(1, KEY_BYTES)] for key in keys[::97]), *keys[::89]]
    assert len(key_set) == len(keys)
    for low in bounds:
        assert key_set.rank(low) == sum(key < low for key in keys)
        for high in bounds:
            inside = [key for key in keys if low <= key < high]
            assert list(key_set.iterate(low, high)) == inside
            assert key_set.add_up(low, high) == (len(inside), sum_ids(inside))


def test_select_is_the_inverse_of_rank() -> None:
    keys = make_keys(2 * CHUNK_KEYS_MAX)
    key_set = fill(keys)
    for rank in (0, 1, CHUNK_KEYS_MAX - 1, CHUNK_KEYS_MAX, len(keys) - 1):
        assert key_set.rank(key_set.select(rank)) == rank
    with pytest.raises(AssertionError):
        key_set.select(len(keys))


def test_the_order_of_adding_does_not_matter() -> None:
    keys = make_keys(CHUNK_KEYS_MAX + 100)
    one, other = fill(sorted(keys)), fill(sorted(keys, reverse=True))
    assert list(one.iterate(KEY_FIRST, KEY_END)) == list(other.iterate(KEY_FIRST, KEY_END))
    assert one.add_up(KEY_FIRST, KEY_END) == other.add_up(KEY_FIRST, KEY_END)


def test_keys_sort_by_time_first_and_end_above_every_key() -> None:
    early, late = make_key(Hlc(255), EntryId(b"\xff" * 32)), make_key(Hlc(256), EntryId(bytes(32)))
    assert early < late < make_key(HLC_MAX, EntryId(b"\xff" * 32)) < KEY_END


def test_a_separator_is_short_and_lies_between() -> None:
    left, right = make_key(Hlc(5), EntryId(b"\x01" * 32)), make_key(Hlc(5), EntryId(b"\x02" * 32))
    separator = find_separator(left, right)
    assert left < separator <= right
    assert len(separator) == 9
