"""Anti-entropy ends with equal sets, within the bounds of a message, and costs as much as there is to say."""

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice, pairwise

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.crdt.anti_entropy import ROUND_TRIPS_MAX, Conversation
from shoal.crdt.entries import Batch, decode_batch_untrusted, encode_batch
from shoal.crdt.key_set import KEY_END, KEY_FIRST, id_of_key
from shoal.crdt.kinds import Kind, RegisterBody
from shoal.crdt.ledger import Draft, Ledger, LedgerRules
from shoal.crdt.reconciliation import (
    BATCHES_MAX,
    COMPARISON_BYTES_MAX,
    ENTRIES_BYTES_MAX,
    FINGERPRINT_BYTES,
    RECONCILIATION_SCHEMA,
    Comparison,
    KeyRange,
    RangeMode,
    answer,
)
from shoal.crdt.sketch import SALT_BYTES, SHORT_ID_BYTES, Sketch, shorten
from shoal.protocol.identity import Identity
from shoal.protocol.messages import LedgerEntries, Reconcile, decode_message_untrusted, encode_message

START_MS = 1_700_000_000_000
ENTRIES = 10_000
RULES = LedgerRules(swarm=b"s" * 32, owner=None, is_valid_snapshot=lambda *_: True)


def write_many(count: int) -> list[Batch]:
    """Batches of one entry, each by an author of its own, one a second: leases as the daemon writes them, which are the
    smallest entries there are, and so the hardest to find at a price in proportion to their size."""
    drafts = [Draft(kind=Kind.LEASE, body=RegisterBody(value=bytes(8)))]
    ledgers = (Ledger(identity=Identity(number.to_bytes(32, "big")), rules=RULES) for number in range(1, count + 1))
    return [ledger.write(drafts, START_MS + 1000 * number) for number, ledger in enumerate(ledgers)]


def fill(batches: Iterable[Batch]) -> Ledger:
    ledger = Ledger(identity=Identity(bytes(32)), rules=RULES)
    ledger.restore(batches)
    return ledger


@dataclass(slots=True)
class Cost:
    """What it took to compare: `frame_bytes` are those of all control messages, `entry_bytes` those of the batches in
    them."""

    conversations: int = 0
    round_trips: int = 0
    frame_bytes: int = 0
    entry_bytes: int = 0

    def send(self, message: Reconcile | LedgerEntries) -> None:
        """Put a message into a frame and take it out again, as the control plane does."""
        frame = encode_message(RULES.swarm, message)
        assert decode_message_untrusted(RULES.swarm, frame) == message
        assert len(message.payload) <= COMPARISON_BYTES_MAX
        self.frame_bytes += len(frame)
        if isinstance(message, LedgerEntries):
            sent = sum(map(len, message.batches))
            assert sent <= ENTRIES_BYTES_MAX
            assert len(message.batches) <= BATCHES_MAX
            self.entry_bytes += sent


def take(ledger: Ledger, batches: Iterable[bytes]) -> None:
    # Signatures are not the subject here: `restore` does not check them.
    ledger.restore(decode_batch_untrusted(raw) for raw in batches)


def converse(opener: Ledger, other: Ledger, cost: Cost, salt: bytes, round_trips_max: int = ROUND_TRIPS_MAX) -> bool:
    """One conversation; returns whether it came to its end."""
    conversation = Conversation(opener, salt)
    cost.conversations += 1
    for _ in range(round_trips_max):
        assert conversation.request is not None
        cost.round_trips += 1
        cost.send(Reconcile(payload=conversation.request))
        response = answer(other, conversation.request)
        reply = LedgerEntries(payload=response.reply or b"", batches=response.batches)
        cost.send(reply)
        take(opener, reply.batches)
        lacking = conversation.go_on(reply.payload, len(reply.batches))
        if lacking:
            cost.send(LedgerEntries(payload=b"", batches=lacking))
            take(other, lacking)
        if conversation.request is None:
            # What ended it: nothing to add, or the last round trip that it had.
            return not reply.payload or answer(opener, reply.payload).reply is None
    return False


def compare(opener: Ledger, other: Ledger, seed: int = 0, round_trips_max: int = ROUND_TRIPS_MAX) -> Cost:
    """Conversations until one comes to its end."""
    cost, entropy = Cost(), random.Random(seed)
    while not converse(opener, other, cost, entropy.randbytes(SALT_BYTES), round_trips_max):
        assert cost.conversations < 100, "it comes to an end"
    return cost


def list_keys(ledger: Ledger) -> list[bytes]:
    return list(ledger.keys.iterate(KEY_FIRST, KEY_END))


@pytest.fixture(scope="module")
def pool() -> Iterator[list[Batch]]:
    yield write_many(ENTRIES)


def test_equal_stores_cost_less_than_200_bytes_in_all(pool: list[Batch]) -> None:
    cost = compare(fill(pool), fill(pool))
    assert (cost.round_trips, cost.entry_bytes) == (1, 0)
    assert cost.frame_bytes < 200


def choose_missing(layout: str, count: int, entropy: random.Random) -> list[int]:
    """Which entries not both have: the newest, a stretch of history, stretches of it, or any."""
    match layout:
        case "end":
            return list(range(ENTRIES - count, ENTRIES))
        case "stretch":
            first = entropy.randrange(ENTRIES - count)
            return list(range(first, first + count))
        case "stretches":
            length = max(1, count // 5)
            starts = entropy.sample(range(0, ENTRIES - length, length), -(-count // length))
            return list(islice((start + index for start in starts for index in range(length)), count))
        case _:
            return entropy.sample(range(ENTRIES), count)


@pytest.mark.parametrize("missed_by", ["opener", "other", "both"])
@pytest.mark.parametrize("layout", ["end", "stretch", "stretches", "spread"])
@pytest.mark.parametrize("count", [1, 10, 100, 1000])
def test_a_difference_costs_little_more_than_itself(pool: list[Batch], count: int, layout: str, missed_by: str) -> None:
    entropy = random.Random(f"{count} {layout} {missed_by}")
    missing = choose_missing(layout, count, entropy)
    assert len(set(missing)) == count
    of_opener = {"opener": set(missing), "other": set(), "both": set(missing[::2])}[missed_by]
    of_other = set(missing) - of_opener
    opener, other = (
        fill(batch for number, batch in enumerate(pool) if number not in misses) for misses in (of_opener, of_other)
    )
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
