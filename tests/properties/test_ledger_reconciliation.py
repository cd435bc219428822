"""Anti-entropy ends with equal sets, within the bounds of a message, and costs as much as there is to say."""

import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.crdt.entries import Batch, decode_batch_untrusted, encode_batch
from shoal.crdt.key_set import KEY_END, id_of_key
from shoal.crdt.ledger import Ledger
from shoal.crdt.reconciliation import (
    COMPARISON_BYTES_MAX,
    FINGERPRINT_BYTES,
    RECONCILIATION_SCHEMA,
    Comparison,
    KeyRange,
    RangeMode,
    answer,
)
from shoal.crdt.sketch import SALT_BYTES, SHORT_ID_BYTES, Sketch, shorten
from tests.properties.reconciliation_cost import (
    LAYOUTS,
    MISSED_BY,
    Cost,
    compare,
    converse,
    fill,
    list_keys,
    make_pair,
    write_many,
)

ENTRIES = 10_000


@pytest.fixture(scope="module")
def pool() -> Iterator[list[Batch]]:
    yield write_many(ENTRIES)


def test_equal_stores_cost_less_than_200_bytes_in_all(pool: list[Batch]) -> None:
    cost = compare(fill(pool), fill(pool))
    assert (cost.round_trips, cost.entry_bytes) == (1, 0)
    assert cost.frame_bytes < 200


@pytest.mark.parametrize("missed_by", MISSED_BY)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("count", [1, 10, 100, 1000])
def test_a_difference_costs_little_more_than_itself(pool: list[Batch], count: int, layout: str, missed_by: str) -> None:
    entropy = random.Random(f"{count} {layout} {missed_by}")
    opener, other, missing = make_pair(pool, layout, count, missed_by, entropy)
    assert len(set(missing)) == count
    cost = compare(opener, other, seed=entropy.randrange(2**32))
    assert len(opener) == len(other) == ENTRIES
    assert list_keys(opener) == list_keys(other)
    assert cost.conversations <= 2
    payload = sum(len(encode_batch(pool[number])) for number in missing)
    assert cost.entry_bytes == payload, "nothing is sent that the other has"
    assert cost.frame_bytes < 2048 + 1.3 * payload


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_two_sets_become_their_union(pool: list[Batch], data: st.DataObject) -> None:
    size = data.draw(st.sampled_from([0, 1, 20, 300, 600]))
    numbers = st.sets(st.integers(0, 599), max_size=150)
    only_left, only_right = data.draw(numbers), data.draw(numbers)
    common = set(range(size)) - only_left - only_right
    left, right = (fill(pool[number] for number in sorted(common | own)) for own in (only_left, only_right))
    seed = data.draw(st.integers(0, 2**32))
    cost = compare(left, right, seed)
    union = sorted(common | only_left | only_right)
    assert list_keys(left) == list_keys(right) == list_keys(fill(pool[number] for number in union))
    exchanged = only_left ^ only_right
    assert cost.entry_bytes == sum(len(encode_batch(pool[number])) for number in exchanged)
    # And it is settled: another conversation is one round trip long.
    assert compare(right, left, seed + 1).round_trips == 1


def make_range(entropy: random.Random, ledger: Ledger, salt: bytes, low: bytes, high: bytes) -> KeyRange:
    """A range as a peer might send it that knows what `ledger` holds: right, wrong, or something in between."""
    share = entropy.choice([0.0, 0.5, 1.0])
    keys = [key for key in ledger.keys.iterate(low, high) if entropy.random() < share]
    short_ids = [shorten(salt, id_of_key(key)) for key in keys]
    short_ids += [entropy.randbytes(SHORT_ID_BYTES) for _ in range(entropy.choice([0, 0, 1, 3]))]
    count = entropy.choice([0, len(short_ids), 2**32 - 1]).to_bytes(4, "big")
    match entropy.choice(list(RangeMode)):
        case RangeMode.FINGERPRINT as mode:
            own, total = ledger.keys.add_up(low, high)
            summed = own.to_bytes(4, "big") + total.to_bytes(32, "big")
            right = summed[:4] + blake3(salt + summed).digest(FINGERPRINT_BYTES)
            payload = entropy.choice([right, count + bytes(FINGERPRINT_BYTES)])
        case RangeMode.SKETCH as mode:
            sketch = Sketch(salt, entropy.choice([8, 24, 400]))
            sketch.add(short_ids)
            payload = count + sketch.encode()
        case mode:
            payload = b"".join(short_ids)
    return KeyRange(low=low, high=high, mode=mode.value, payload=payload)


@pytest.mark.parametrize("seed", range(300))
def test_whatever_well_formed_ranges_say_the_answer_is_in_order(pool: list[Batch], seed: int) -> None:
    entropy = random.Random(seed)
    ledger, salt = fill(pool[: entropy.choice([0, 1, 40, 120])]), entropy.randbytes(SALT_BYTES)
    cuts = sorted(entropy.sample([KEY_END, *list_keys(fill(pool[:120]))], entropy.randint(2, 24)))
    pairs = [pair for pair in pairwise(cuts) if entropy.random() < 0.7] or [(cuts[0], cuts[1])]
    ranges = [make_range(entropy, ledger, salt, low, high) for low, high in pairs]
    canonical = [
        replace(each, low=None) if before is not None and before.high == each.low else each
        for before, each in zip([None, *ranges], ranges, strict=False)
    ]
    message = RECONCILIATION_SCHEMA.encode(Comparison(era=1, salt=salt, ranges=tuple(canonical)))
    response = answer(ledger, message)
    for raw in response.batches:
        assert ledger.accept(decode_batch_untrusted(raw)).is_known
    if response.reply is not None:
        assert len(response.reply) <= COMPARISON_BYTES_MAX
        # Whoever gets it can go on from there.
        answer(fill(pool[60:90]), response.reply)


@pytest.mark.parametrize(("of_left", "of_right"), [(2, 3), (2, 2), (1, 2), (1, 10)])
def test_sets_that_differ_in_most_entries_become_equal(pool: list[Batch], of_left: int, of_right: int) -> None:
    left, right = fill(pool[::of_left]), fill(pool[1::of_right])
    union = {*range(0, ENTRIES, of_left), *range(1, ENTRIES, of_right)}
    compare(left, right)
    assert list_keys(left) == list_keys(right)
    assert len(left) == len(union)


@pytest.mark.parametrize("round_trips_max", [3, 4])
def test_a_conversation_that_is_always_broken_off_gets_there(pool: list[Batch], round_trips_max: int) -> None:
    newcomer, holder = fill(pool[:10]), fill(pool[:3000])
    cost = Cost()
    sizes = [len(newcomer)]
    for number in range(100):
        if converse(newcomer, holder, cost, number.to_bytes(SALT_BYTES, "big"), round_trips_max):
            break
        sizes.append(len(newcomer))
    assert list_keys(newcomer) == list_keys(holder)
    assert all(before < after for before, after in pairwise(sizes)), "each one brings something"


def test_a_newcomer_gets_all_of_history_in_conversations_of_few_round_trips(pool: list[Batch]) -> None:
    holder, newcomer = fill(pool[:4000]), fill([])
    cost = compare(newcomer, holder)
    assert list_keys(newcomer) == list_keys(holder)
    assert cost.conversations > 1
    assert cost.frame_bytes < 1.1 * cost.entry_bytes
