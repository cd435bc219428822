from pathlib import Path

import pytest
from blake3 import blake3

from shoal.crdt.entries import Batch, decode_batch_untrusted
from shoal.crdt.key_set import KEY_BYTES, KEY_END
from shoal.crdt.kinds import Kind, RegisterBody
from shoal.crdt.ledger import Draft, Ledger, LedgerRules
from shoal.crdt.reconciliation import (
    BATCHES_MAX,
    COMPARISON_BYTES_MAX,
    ENTRIES_BYTES_MAX,
    FINGERPRINT_BYTES,
    PAYLOAD_BYTES_MAX,
    RANGES_MAX,
    RECONCILIATION_SCHEMA,
    BatchSelection,
    Comparison,
    KeyRange,
    RangeMode,
    answer,
    begin,
)
from shoal.crdt.sketch import CELL_BYTES, CELLS_MIN, HASHES, SHORT_ID_BYTES, Sketch, shorten
from shoal.protocol.errors import ProtocolError, Refusal
from shoal.protocol.identity import Identity
from shoal.protocol.messages import LedgerEntries, Reconcile, decode_message_untrusted, encode_message
from tests.unit.protocol.test_readme import describe

NOW_MS = 1_700_000_000_000
SALT = b"saltsalt"
RULES = LedgerRules(swarm=b"s" * 32, owner=None, is_valid_snapshot=lambda *_: True)


def make_ledger(number: int = 0) -> Ledger:
    return Ledger(identity=Identity(number.to_bytes(32, "big")), rules=RULES)


def write_many(count: int, body_bytes: int = 8) -> list[Batch]:
    """Batches of one entry, each by an author of its own."""
    drafts = [Draft(kind=Kind.LEASE, body=RegisterBody(value=bytes(body_bytes)))]
    return [make_ledger(number + 1).write(drafts, NOW_MS + number) for number in range(count)]


def fill(batches: list[Batch]) -> Ledger:
    ledger = make_ledger()
    ledger.restore(batches)
    return ledger


def message(*ranges: KeyRange) -> bytes:
    return RECONCILIATION_SCHEMA.encode(Comparison(era=1, salt=SALT, ranges=ranges))


def key_range(
    high: bytes = KEY_END, low: bytes | None = None, mode: RangeMode = RangeMode.LISTED, payload: bytes = b""
) -> KeyRange:
    return KeyRange(low=low, high=high, mode=mode, payload=payload)


def sketch_range(batches: list[Batch], cells: int) -> KeyRange:
    sketch = Sketch(SALT, cells)
    sketch.add(shorten(SALT, batch.tip) for batch in batches)
    return key_range(mode=RangeMode.SKETCH, payload=len(batches).to_bytes(4, "big") + sketch.encode())


def read(reply: bytes | None) -> tuple[KeyRange, ...]:
    assert reply is not None
    comparison = RECONCILIATION_SCHEMA.decode_untrusted(reply, COMPARISON_BYTES_MAX)
    assert isinstance(comparison, Comparison)
    return comparison.ranges


def test_equal_ledgers_are_done_after_one_message() -> None:
    batches = write_many(100)
    opening = begin(fill(batches), SALT)
    assert len(opening) < 200
    assert answer(fill(batches), opening) == answer(fill([]), begin(fill([]), SALT))
    assert answer(fill(batches), opening).reply is None


def test_a_small_range_that_differs_is_listed() -> None:
    batches = write_many(3)
    reply = answer(fill(batches), begin(fill(batches[:1]), SALT)).reply
    assert reply is not None
    (listed,) = RECONCILIATION_SCHEMA.decode_untrusted(reply).ranges
    assert listed.mode == RangeMode.LISTED
    assert listed.payload == b"".join(shorten(SALT, batch.tip) for batch in batches)


def test_a_list_is_answered_with_what_it_leaves_out_and_what_only_it_has() -> None:
    batches = write_many(3)
    listed = b"".join(shorten(SALT, batch.tip) for batch in batches[:2])
    reply = answer(fill(batches[1:]), message(key_range(payload=listed)))
    assert [decode_batch_untrusted(raw) for raw in reply.batches] == [batches[2]]
    assert reply.reply is not None
    (wanted,) = RECONCILIATION_SCHEMA.decode_untrusted(reply.reply).ranges
    assert (wanted.mode, wanted.payload) == (RangeMode.WANTED, shorten(SALT, batches[0].tip))
    final = answer(fill(batches[:2]), reply.reply)
    assert [decode_batch_untrusted(raw) for raw in final.batches] == [batches[0]]
    assert final.reply is None


def test_a_large_range_that_differs_is_split_within_bounds() -> None:
    batches = write_many(500)
    reply = answer(fill(batches), begin(fill(batches[:-1]), SALT)).reply
    ranges = read(reply)
    assert 2 <= len(ranges) <= RANGES_MAX
    assert {part.mode for part in ranges} == {RangeMode.FINGERPRINT}
    assert (ranges[0].low, ranges[-1].high) == (None, KEY_END)


def test_differences_all_over_are_sketched_at_once() -> None:
    batches = write_many(1000)
    left, right = fill(batches), fill([batch for number, batch in enumerate(batches) if number % 200])
    reply = answer(left, begin(right, SALT)).reply
    assert reply is not None
    sketches = read(answer(right, reply).reply)
    assert sketches
    assert {part.mode for part in sketches} == {RangeMode.SKETCH}


def test_a_sketch_is_answered_with_what_it_shows() -> None:
    batches = write_many(200)
    left, right = fill(batches[5:]), fill(batches[:-3])
    reply = answer(left, message(sketch_range(batches[:-3], 64)))
    assert [decode_batch_untrusted(raw) for raw in reply.batches] == batches[-3:]
    (wanted,) = read(reply.reply)
    assert wanted.mode == RangeMode.WANTED
    assert reply.reply is not None
    assert [decode_batch_untrusted(raw) for raw in answer(right, reply.reply).batches] == batches[:5]


def test_a_sketch_that_shows_too_little_is_answered_with_a_larger_one_or_a_list() -> None:
    batches = write_many(400)
    (larger,) = read(answer(fill(batches), message(sketch_range(batches[30:], CELLS_MIN))).reply)
    assert larger.mode == RangeMode.SKETCH
    assert 2 * CELLS_MIN * CELL_BYTES <= len(larger.payload) <= 80 * CELL_BYTES
    (listed,) = read(answer(fill(batches), message(sketch_range(batches[350:], CELLS_MIN))).reply)
    assert listed.mode == RangeMode.LISTED
    assert len(listed.payload) == 400 * SHORT_ID_BYTES


def test_a_reply_stays_within_its_bytes_and_names_the_rest() -> None:
    batches = write_many(400, body_bytes=1024)
    holder, newcomer = fill(batches), make_ledger()
    request = begin(newcomer, SALT)
    for _ in range(20):
        response = answer(holder, request)
        assert sum(map(len, response.batches)) <= ENTRIES_BYTES_MAX
        for raw in response.batches:
            newcomer.accept(decode_batch_untrusted(raw))
        if response.reply is None:
            break
        following = answer(newcomer, response.reply)
        assert following.batches == () and following.reply is not None
        request = following.reply
    assert len(newcomer) == 400


def test_many_small_batches_fit_into_one_message() -> None:
    batches = write_many(2 * BATCHES_MAX, body_bytes=0)
    response = answer(fill(batches), begin(make_ledger(), SALT))
    assert len(response.batches) == BATCHES_MAX
    entries = LedgerEntries(payload=response.reply or b"", batches=response.batches)
    assert decode_message_untrusted(RULES.swarm, encode_message(RULES.swarm, entries)) == entries


def test_the_fullest_messages_fit_into_a_frame() -> None:
    sizes = [ENTRIES_BYTES_MAX // BATCHES_MAX] * BATCHES_MAX
    entries = LedgerEntries(payload=bytes(COMPARISON_BYTES_MAX), batches=tuple(map(bytes, sizes)))
    assert decode_message_untrusted(RULES.swarm, encode_message(RULES.swarm, entries)) == entries
    question = Reconcile(payload=bytes(COMPARISON_BYTES_MAX))
    assert decode_message_untrusted(RULES.swarm, encode_message(RULES.swarm, question)) == question


def test_entries_of_an_era_that_the_other_does_not_keep_are_not_sent() -> None:
    batches = write_many(3)
    holder = fill(batches)
    for era, sent in ((1, 3), (2, 3), (3, 0)):
        comparison = Comparison(era=era, salt=SALT, ranges=(key_range(),))
        assert len(answer(holder, RECONCILIATION_SCHEMA.encode(comparison)).batches) == sent


def converse(opener: Ledger, other: Ledger, round_trips: int) -> bool:
    """One session; returns whether it came to its end."""
    request: bytes | None = begin(opener, SALT)
    for _ in range(round_trips):
        assert request is not None
        for answering, asking in ((other, opener), (opener, other)):
            response = answer(answering, request)
            for raw in response.batches:
                asking.accept(decode_batch_untrusted(raw))
            if response.reply is None:
                return True
            request = response.reply
    return False


def test_a_conversation_may_be_broken_off_and_begun_again() -> None:
    batches = write_many(1000, body_bytes=1024)
    holder, newcomer = fill(batches), make_ledger()
    sizes = [0]
    while not converse(newcomer, holder, 3):
        sizes.append(len(newcomer))
        assert sizes[-1] > sizes[-2]
    assert len(newcomer) == 1000
    assert len(sizes) > 2


def test_entries_are_sent_after_their_ancestors() -> None:
    anna, ben = make_ledger(1), make_ledger(2)
    drafts = [Draft(kind=Kind.LEASE, body=RegisterBody(value=b""))]
    for number in range(20):
        writer, reader = (anna, ben) if number % 2 else (ben, anna)
        batch = writer.write(drafts, NOW_MS + number)
        writer.accept(batch)
        reader.accept(batch)
    newcomer = make_ledger(3)
    for raw in answer(anna, message(key_range())).batches:
        assert newcomer.accept(decode_batch_untrusted(raw)).accepted
    assert len(newcomer) == 20


def test_ranges_beyond_the_room_of_one_reply_are_summed_up_in_the_last() -> None:
    ledger = fill(write_many(3 * RANGES_MAX))
    bounds = [*list(ledger.keys.iterate(b"", KEY_END))[1:RANGES_MAX], KEY_END]
    request = message(*(key_range(high=bound, payload=bytes(SHORT_ID_BYTES)) for bound in bounds))
    ranges = read(answer(ledger, request).reply)
    assert len(ranges) == RANGES_MAX
    assert {part.mode for part in ranges[:-1]} == {RangeMode.WANTED}
    assert (ranges[-1].mode, ranges[-1].high) == (RangeMode.FINGERPRINT, KEY_END)


def test_a_selection_takes_each_entry_once_and_knows_when_it_is_full() -> None:
    batches = write_many(3)
    ledger = fill(batches)
    size = len(answer(ledger, message(key_range())).batches[0])
    selection = BatchSelection(ledger, 2 * size)
    assert [selection.add(batch.tip) for batch in (batches[0], batches[0], batches[1], batches[2])] == [True] * 3 + [
        False
    ]
    assert [decode_batch_untrusted(raw) for raw in selection.batches] == batches[:2]


@pytest.mark.parametrize(
    ("ranges", "refusal"),
    [
        ((key_range(low=b""),), Refusal.MALFORMED),
        ((key_range(low=b"\x05", high=b"\x04"),), Refusal.MALFORMED),
        ((key_range(high=b"\x05"), key_range(low=b"\x05")), Refusal.MALFORMED),
        ((key_range(high=b"\x05"), key_range(low=b"\x04")), Refusal.MALFORMED),
        ((key_range(), key_range()), Refusal.MALFORMED),
        ((key_range(mode=RangeMode.FINGERPRINT, payload=bytes(FINGERPRINT_BYTES)),), Refusal.WRONG_LENGTH),
        ((key_range(payload=bytes(SHORT_ID_BYTES + 1)),), Refusal.WRONG_LENGTH),
        ((key_range(mode=RangeMode.SKETCH, payload=bytes(4)),), Refusal.WRONG_LENGTH),
        ((key_range(mode=RangeMode.SKETCH, payload=bytes(2)),), Refusal.WRONG_LENGTH),
        ((key_range(mode=RangeMode.SKETCH, payload=bytes(4 + (CELLS_MIN + 1) * CELL_BYTES)),), Refusal.WRONG_LENGTH),
        ((key_range(mode=RangeMode.SKETCH, payload=bytes(5 + CELLS_MIN * CELL_BYTES)),), Refusal.WRONG_LENGTH),
        ((key_range(payload=bytes(PAYLOAD_BYTES_MAX + 1)),), Refusal.OUT_OF_RANGE),
        ((key_range(payload=bytes(COMPARISON_BYTES_MAX)),), Refusal.OVERSIZED),
        ((), Refusal.OUT_OF_RANGE),
        (tuple(key_range(high=bytes([number + 1])) for number in range(RANGES_MAX + 1)), Refusal.OUT_OF_RANGE),
    ],
)
def test_a_message_that_no_honest_peer_sends_is_refused(ranges: tuple[KeyRange, ...], refusal: Refusal) -> None:
    with pytest.raises(ProtocolError) as caught:
        answer(make_ledger(), message(*ranges))
    assert caught.value.refusal is refusal


def test_many_equal_fingerprints_beside_something_else_are_no_estimate() -> None:
    ledger = make_ledger()
    equal = (0).to_bytes(4, "big") + blake3(SALT + bytes(4 + 32)).digest(FINGERPRINT_BYTES)
    ranges = [key_range(bytes([number]), mode=RangeMode.FINGERPRINT, payload=equal) for number in range(1, 21)]
    reply = answer(ledger, message(*ranges, key_range(payload=bytes(SHORT_ID_BYTES)))).reply
    assert [part.mode for part in read(reply)] == [RangeMode.WANTED]


def test_a_reply_to_the_most_that_can_be_asked_is_within_its_bound() -> None:
    # Every range has as many ids as fit, and none of them is known: all of them are wanted.
    ids = (COMPARISON_BYTES_MAX // RANGES_MAX - 2 * KEY_BYTES - 32) // SHORT_ID_BYTES
    bounds = [bytes([number]) * KEY_BYTES for number in range(2 * RANGES_MAX)]
    payload = b"".join(number.to_bytes(SHORT_ID_BYTES, "big") for number in range(ids))
    ranges = (
        key_range(low=low, high=high, payload=payload) for low, high in zip(bounds[::2], bounds[1::2], strict=True)
    )
    reply = answer(make_ledger(), message(*ranges)).reply
    assert reply is not None
    assert len(reply) <= COMPARISON_BYTES_MAX
    assert len(read(reply)) == RANGES_MAX


@pytest.mark.parametrize("record", [Comparison, KeyRange], ids=lambda one: one.__name__)
def test_the_protocols_book_has_the_fields_and_bounds(record: type) -> None:
    text = (Path(__file__).parents[3] / "protocol" / "README.md").read_text()
    assert f"| {record.__name__} | {describe(record)} |" in text
    assert f"at most {COMPARISON_BYTES_MAX:,} bytes" in text
    assert f"the first {SHORT_ID_BYTES} bytes of BLAKE3(salt, id)" in text
    assert f"at least {CELLS_MIN} cells of {CELL_BYTES} bytes, a multiple of {HASHES}" in text
    assert f"count u32 big-endian, the first {FINGERPRINT_BYTES} bytes" in text
