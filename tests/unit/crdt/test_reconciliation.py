import pytest

from shoal.crdt.entries import Batch, decode_batch_untrusted
from shoal.crdt.key_set import KEY_BYTES, KEY_END
from shoal.crdt.kinds import Kind, RegisterBody
from shoal.crdt.ledger import Draft, Ledger, LedgerRules
from shoal.crdt.reconciliation import (
    COMPARISON_BYTES_MAX,
    FINGERPRINT_BYTES,
    LISTED_MAX,
    RANGES_MAX,
    RECONCILIATION_SCHEMA,
    REPLY_BYTES_MAX,
    SHORT_ID_BYTES,
    BatchSelection,
    Comparison,
    KeyRange,
    RangeMode,
    answer,
    begin,
)
from shoal.protocol.errors import ProtocolError, Refusal
from shoal.protocol.identity import Identity

NOW_MS = 1_700_000_000_000
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
    return RECONCILIATION_SCHEMA.encode(Comparison(ranges=ranges))


def key_range(
    high: bytes = KEY_END, low: bytes | None = None, mode: RangeMode = RangeMode.LISTED, payload: bytes = b""
) -> KeyRange:
    return KeyRange(low=low, high=high, mode=mode, payload=payload)


def test_equal_ledgers_are_done_after_one_message() -> None:
    batches = write_many(100)
    opening = begin(fill(batches))
    assert len(opening) < 200
    assert answer(fill(batches), opening) == answer(fill([]), begin(fill([])))
    assert answer(fill(batches), opening).reply is None


def test_a_small_range_that_differs_is_listed() -> None:
    batches = write_many(3)
    reply = answer(fill(batches), begin(fill(batches[:1]))).reply
    assert reply is not None
    (listed,) = RECONCILIATION_SCHEMA.decode_untrusted(reply).ranges
    assert listed.mode == RangeMode.LISTED
    assert listed.payload == b"".join(batch.tip[:SHORT_ID_BYTES] for batch in batches)


def test_a_list_is_answered_with_what_it_leaves_out_and_what_only_it_has() -> None:
    batches = write_many(3)
    listed = b"".join(batch.tip[:SHORT_ID_BYTES] for batch in batches[:2])
    reply = answer(fill(batches[1:]), message(key_range(payload=listed)))
    assert [decode_batch_untrusted(raw) for raw in reply.batches] == [batches[2]]
    assert reply.reply is not None
    (wanted,) = RECONCILIATION_SCHEMA.decode_untrusted(reply.reply).ranges
    assert (wanted.mode, wanted.payload) == (RangeMode.WANTED, batches[0].tip[:SHORT_ID_BYTES])
    final = answer(fill(batches[:2]), reply.reply)
    assert [decode_batch_untrusted(raw) for raw in final.batches] == [batches[0]]
    assert final.reply is None


def test_a_large_range_that_differs_is_split_within_bounds() -> None:
    batches = write_many(500)
    reply = answer(fill(batches), begin(fill(batches[:-1]))).reply
    assert reply is not None
    ranges = RECONCILIATION_SCHEMA.decode_untrusted(reply).ranges
    assert 2 <= len(ranges) <= RANGES_MAX
    assert {part.mode for part in ranges} == {RangeMode.FINGERPRINT}
    assert (ranges[0].low, ranges[-1].high) == (None, KEY_END)


def test_a_reply_stays_within_its_bytes_and_names_the_rest() -> None:
    batches = write_many(400, body_bytes=1024)
    holder, newcomer = fill(batches), make_ledger()
    request = begin(newcomer)
    for _ in range(20):
        response = answer(holder, request)
        sent = len(response.reply or b"") + sum(map(len, response.batches))
        assert sent <= REPLY_BYTES_MAX
        for raw in response.batches:
            newcomer.accept(decode_batch_untrusted(raw))
        if response.reply is None:
            break
        following = answer(newcomer, response.reply)
        assert following.batches == () and following.reply is not None
        request = following.reply
    assert len(newcomer) == 400


def converse(opener: Ledger, other: Ledger, round_trips: int) -> bool:
    """One session; returns whether it came to its end."""
    request: bytes | None = begin(opener)
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
    batches = write_many(3 * RANGES_MAX)
    ledger = fill(batches)
    keys = list(ledger.keys.iterate(b"", KEY_END))[: RANGES_MAX - 1]
    wrong = bytes(FINGERPRINT_BYTES)
    bounds = [*keys, KEY_END]
    request = message(*(key_range(high=bound, mode=RangeMode.FINGERPRINT, payload=wrong) for bound in bounds))
    reply = answer(ledger, request).reply
    assert reply is not None
    ranges = RECONCILIATION_SCHEMA.decode_untrusted(reply).ranges
    assert len(ranges) == RANGES_MAX
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
        ((key_range(mode=RangeMode.FINGERPRINT, payload=bytes(32)),), Refusal.WRONG_LENGTH),
        ((key_range(payload=bytes(SHORT_ID_BYTES + 1)),), Refusal.WRONG_LENGTH),
        ((key_range(payload=bytes((LISTED_MAX + 1) * SHORT_ID_BYTES)),), Refusal.OUT_OF_RANGE),
        ((), Refusal.OUT_OF_RANGE),
        (tuple(key_range(high=bytes([number + 1])) for number in range(RANGES_MAX + 1)), Refusal.OUT_OF_RANGE),
    ],
)
def test_a_message_that_no_honest_peer_sends_is_refused(ranges: tuple[KeyRange, ...], refusal: Refusal) -> None:
    with pytest.raises(ProtocolError) as caught:
        answer(make_ledger(), message(*ranges))
    assert caught.value.refusal is refusal


def test_the_largest_message_is_within_its_bound() -> None:
    payload = bytes(LISTED_MAX * SHORT_ID_BYTES)
    bounds = [bytes([number]) * KEY_BYTES for number in range(2 * RANGES_MAX)]
    ranges = (
        key_range(low=low, high=high, payload=payload) for low, high in zip(bounds[::2], bounds[1::2], strict=True)
    )
    largest = message(*ranges)
    assert len(largest) <= COMPARISON_BYTES_MAX
    assert answer(make_ledger(), largest).reply is not None
