"""Anti-entropy ends with equal sets, within the bounds of a message, and costs as much as there is to say."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.crdt.entries import Batch, decode_batch_untrusted, encode_batch
from shoal.crdt.key_set import KEY_END, KEY_FIRST
from shoal.crdt.kinds import Kind, RegisterBody
from shoal.crdt.ledger import Draft, Ledger, LedgerRules
from shoal.crdt.reconciliation import COMPARISON_BYTES_MAX, REPLY_BYTES_MAX, ROUND_TRIPS_MAX, answer, begin
from shoal.protocol.identity import Identity

START_MS = 1_700_000_000_000
ENTRIES = 10_000
RULES = LedgerRules(swarm=b"s" * 32, owner=None, is_valid_snapshot=lambda *_: True)


def write_many(count: int) -> list[Batch]:
    """Batches of one entry of 100 bytes, each by an author of its own, one a second."""
    drafts = [Draft(kind=Kind.LEASE, body=RegisterBody(value=bytes(100)))]
    ledgers = (Ledger(identity=Identity(number.to_bytes(32, "big")), rules=RULES) for number in range(1, count + 1))
    return [ledger.write(drafts, START_MS + 1000 * number) for number, ledger in enumerate(ledgers)]


def fill(batches: Iterable[Batch]) -> Ledger:
    ledger = Ledger(identity=Identity(bytes(32)), rules=RULES)
    ledger.restore(batches)
    return ledger


@dataclass(slots=True)
class Cost:
    """What a conversation took: messages both ways, their bytes, and the bytes of entries sent beside them."""

    messages: int = 0
    message_bytes: int = 0
    entry_bytes: int = 0


def converse(opener: Ledger, other: Ledger, messages_max: int = 1000) -> Cost:
    cost = Cost()
    request: bytes | None = begin(opener)
    asking, answering = opener, other
    while request is not None and cost.messages < messages_max:
        cost.messages += 1
        cost.message_bytes += len(request)
        response = answer(answering, request)
        sent = sum(map(len, response.batches))
        assert len(request) <= COMPARISON_BYTES_MAX
        assert len(response.reply or b"") + sent <= REPLY_BYTES_MAX
        cost.entry_bytes += sent
        for raw in response.batches:
            asking.accept(decode_batch_untrusted(raw))
        asking, answering, request = answering, asking, response.reply
    return cost


def list_keys(ledger: Ledger) -> list[bytes]:
    return list(ledger.keys.iterate(KEY_FIRST, KEY_END))


@pytest.fixture(scope="module")
def pool() -> Iterator[list[Batch]]:
    yield write_many(ENTRIES)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_two_sets_become_their_union(pool: list[Batch], data: st.DataObject) -> None:
    size = data.draw(st.sampled_from([0, 1, 20, 300]))
    only_left, only_right = (data.draw(st.sets(st.integers(0, 299), max_size=60)) for _ in range(2))
    common = set(range(size)) - only_left - only_right
    left, right = (fill(pool[number] for number in sorted(common | own)) for own in (only_left, only_right))
    cost = converse(left, right)
    union = sorted(common | only_left | only_right)
    assert list_keys(left) == list_keys(right) == list_keys(fill(pool[number] for number in union))
    assert cost.messages <= 2 * ROUND_TRIPS_MAX
    exchanged = only_left ^ only_right
    assert cost.entry_bytes == sum(len(encode_batch(pool[number])) for number in exchanged)
    # And it is settled: another conversation is one message long.
    assert converse(right, left).messages == 1


def test_equal_sets_cost_one_small_message(pool: list[Batch]) -> None:
    cost = converse(fill(pool), fill(pool))
    assert (cost.messages, cost.entry_bytes) == (1, 0)
    assert cost.message_bytes < 200


@pytest.mark.parametrize("count", [1, 10, 100])
def test_what_one_side_missed_lately_costs_little_more_than_itself(pool: list[Batch], count: int) -> None:
    for order in (1, -1):
        cost = converse(*[fill(pool[:-count]), fill(pool)][::order])
        assert cost.messages <= 2 * ROUND_TRIPS_MAX
        assert cost.message_bytes <= 2048 + 0.3 * cost.entry_bytes


@pytest.mark.parametrize(("count", "messages_max", "bytes_each"), [(1, 8, 1400), (10, 12, 900), (100, 24, 500)])
def test_differences_all_over_history_are_found(
    pool: list[Batch], count: int, messages_max: int, bytes_each: int
) -> None:
    missing = {number * 7919 % ENTRIES for number in range(1, count + 1)}
    left_misses = set(sorted(missing)[::2])
    left, right = (
        fill(batch for number, batch in enumerate(pool) if number not in misses)
        for misses in (left_misses, missing - left_misses)
    )
    cost = converse(left, right)
    assert len(left) == len(right) == ENTRIES
    assert cost.messages <= messages_max
    assert cost.message_bytes <= bytes_each * count


def test_a_newcomer_gets_all_of_history_in_sessions_of_few_round_trips(pool: list[Batch]) -> None:
    holder, newcomer = fill(pool[:4000]), fill([])
    converse(newcomer, holder, messages_max=2 * ROUND_TRIPS_MAX)
    assert len(newcomer) >= 2000
    converse(newcomer, holder, messages_max=2 * ROUND_TRIPS_MAX)
    assert list_keys(newcomer) == list_keys(holder)
