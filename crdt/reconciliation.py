"""Anti-entropy: two replicas find out what each lacks by comparing sums over ranges of their sorted keys.

Range-based set reconciliation (Meyer, "Range-based set reconciliation", SRDS 2023) with three kinds of range: a
fingerprint of all keys in it, the list of the ids in it, or the ids in it that the sender wants. The conversation
goes through the key space, that is through history, from old to new: what does not fit into a reply is summed up in
one last range, so that nothing is kept between messages and an interrupted conversation goes on wherever the sets
stand by then.

How to use it: the opener sends `begin`; whoever gets a message first hands the entries that came with it to its
ledger, then calls `answer` and sends what that returns; a reply of None ends the conversation. At most
ROUND_TRIPS_MAX exchanges make one session; the rest is left to the next.

Invariants: no reply has more than RANGES_MAX ranges or, with its entries, REPLY_BYTES_MAX bytes; every message that
finds a difference settles or halves at least one range, so two honest replicas that do not change end with equal
sets.
"""

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise
from typing import Annotated

from blake3 import blake3

from shoal.crdt.entries import encode_batch
from shoal.crdt.key_set import KEY_BYTES, KEY_END, KEY_FIRST, KeySet, find_separator, id_of_key
from shoal.crdt.kinds import ENTRY_ID_BYTES, EntryId
from shoal.crdt.ledger import Ledger
from shoal.protocol.errors import ProtocolError, Refusal
from shoal.protocol.wire import DELTA_BYTES_MAX, Bound, Schema

# With 10,000 entries and 100 differences all over them, 16 ranges a message take 31 round trips and 64 take 10, for
# as many bytes; a single difference is found with fewest bytes if a range is split in no more than 16.
RANGES_MAX = 64
FAN_OUT_MAX = 16
ROUND_TRIPS_MAX = 8
REPLY_BYTES_MAX = DELTA_BYTES_MAX
# Up to so many entries a range is listed, above it is split.
LISTED_MAX = 16
FINGERPRINT_BYTES = 16
# Within one range, half of an id tells two entries apart; an author who makes two of its own agree hides one of them.
SHORT_ID_BYTES = 16
_KEYS_WALKED_MAX = 4096
# Both bounds of a range, its payload and their headers.
COMPARISON_BYTES_MAX = RANGES_MAX * (LISTED_MAX * SHORT_ID_BYTES + 2 * KEY_BYTES + 16)


class RangeMode(IntEnum):
    """What a range's payload is."""

    FINGERPRINT = 0
    LISTED = 1
    WANTED = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyRange:
    """The keys from `low` (or, where that is None, from the end of the range before) up to but not including `high`.

    `payload`: FINGERPRINT_BYTES of hash, or short ids one after the other, without a separator.
    """

    low: Annotated[bytes, Bound(0, KEY_BYTES)] | None
    high: Annotated[bytes, Bound(1, KEY_BYTES)]
    mode: Annotated[int, Bound(0, 2)]
    payload: Annotated[bytes, Bound(0, LISTED_MAX * SHORT_ID_BYTES)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One message: ranges in ascending order that do not overlap."""

    ranges: Annotated[tuple[KeyRange, ...], Bound(1, RANGES_MAX)]


RECONCILIATION_SCHEMA = Schema({1: Comparison})


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What to send back: the next message, None where nothing is left to compare, and encoded batches with it."""

    reply: bytes | None
    batches: tuple[bytes, ...]


def begin(ledger: Ledger) -> bytes:
    """The message that opens a conversation about everything that `ledger` holds."""
    whole = _Span(low=KEY_FIRST, high=KEY_END)
    fingerprint, _ = _summarize(ledger.keys, whole)
    return _encode([(whole, RangeMode.FINGERPRINT, fingerprint)])


def answer(ledger: Ledger, message: bytes) -> Answer:
    """Compare `message` with what `ledger` holds; raises ProtocolError for a message that no honest peer sends."""
    comparison = RECONCILIATION_SCHEMA.decode_untrusted(message, COMPARISON_BYTES_MAX)
    assert isinstance(comparison, Comparison)
    spans = _list_spans(comparison.ranges)
    reply = _Reply(ledger)
    for span, received in zip(spans, comparison.ranges, strict=True):
        rest = reply.respond(span, RangeMode(received.mode), received.payload)
        if rest is not None:
            reply.sum_up(_Span(low=rest, high=spans[-1].high))
            break
    return reply.finish()


class BatchSelection:
    """Entries to send, as encoded batches of at most `bytes_max` bytes in all."""

    def __init__(self, ledger: Ledger, bytes_max: int) -> None:
        self._ledger = ledger
        self._bytes_left = bytes_max
        self._selected: set[EntryId] = set()
        self.batches: list[bytes] = []

    def add(self, entry_id: EntryId) -> bool:
        """Select an entry that the ledger holds, with what proves it; False, and no change, where that does not fit."""
        if entry_id in self._selected:
            return True
        batch = self._ledger.prove(entry_id)
        encoded = encode_batch(batch)
        if len(encoded) > self._bytes_left:
            return False
        self._bytes_left -= len(encoded)
        self._selected.update(batch.ids)
        self.batches.append(encoded)
        return True


@dataclass(frozen=True, slots=True, kw_only=True)
class _Span:
    low: bytes
    high: bytes


_Section = tuple[_Span, RangeMode, bytes]


class _Reply:
    """A reply in the making: ranges and batches, within their bounds."""

    def __init__(self, ledger: Ledger) -> None:
        self._keys = ledger.keys
        self._sections: list[_Section] = []
        self._selection = BatchSelection(ledger, REPLY_BYTES_MAX - COMPARISON_BYTES_MAX)

    def respond(self, span: _Span, mode: RangeMode, payload: bytes) -> bytes | None:
        """Settle or narrow down one range; returns None, or the bound from which on there was no room for it."""
        if mode is RangeMode.FINGERPRINT:
            return self._compare(span, payload)
        named = {payload[at : at + SHORT_ID_BYTES] for at in range(0, len(payload), SHORT_ID_BYTES)}
        if mode is RangeMode.WANTED:
            return self._send(span, lambda short: short in named)
        return self._complete(span, named)

    def sum_up(self, span: _Span) -> None:
        """Leave `span` to the following messages."""
        fingerprint, _ = _summarize(self._keys, span)
        self._sections.append((span, RangeMode.FINGERPRINT, fingerprint))

    def finish(self) -> Answer:
        """The reply as it stands."""
        reply = _encode(self._sections) if self._sections else None
        return Answer(reply=reply, batches=tuple(self._selection.batches))

    @property
    def _room(self) -> int:
        # One range is kept for the sum of the rest.
        return RANGES_MAX - 1 - len(self._sections)

    def _compare(self, span: _Span, fingerprint: bytes) -> bytes | None:
        own_fingerprint, count = _summarize(self._keys, span)
        if own_fingerprint == fingerprint:
            return None
        parts = min(FAN_OUT_MAX, self._room, -(-count // LISTED_MAX))
        if count > LISTED_MAX and parts >= 2:
            for part in _split(self._keys, span, count, parts):
                self.sum_up(part)
            return None
        if count > LISTED_MAX or not self._room:
            return span.low
        listed = b"".join(map(_shorten, self._keys.iterate(span.low, span.high)))
        self._sections.append((span, RangeMode.LISTED, listed))
        return None

    def _complete(self, span: _Span, named: Set[bytes]) -> bytes | None:
        """Send what the other's list leaves out and ask for what only the other has."""
        if named and not self._room:
            return span.low
        rest = self._send(span, lambda short: short not in named)
        if rest is not None:
            # What lies above `rest` was not looked at, so the other's list cannot be told to be unknown here.
            return span.low if named else rest
        unknown = named - {_shorten(key) for key in self._keys.iterate(span.low, span.high)} if named else named
        if unknown:
            self._sections.append((span, RangeMode.WANTED, b"".join(sorted(unknown))))
        return None

    def _send(self, span: _Span, is_lacking: Callable[[bytes], bool]) -> bytes | None:
        for walked, key in enumerate(self._keys.iterate(span.low, span.high)):
            if walked == _KEYS_WALKED_MAX:
                return key
            if is_lacking(_shorten(key)) and not self._selection.add(id_of_key(key)):
                return key
        return None


def _summarize(keys: KeySet, span: _Span) -> tuple[bytes, int]:
    """The fingerprint of the keys in `span`, a hash of their number and of the sum of their ids, and their number."""
    count, total = keys.add_up(span.low, span.high)
    summed = count.to_bytes(8, "big") + total.to_bytes(ENTRY_ID_BYTES, "big")
    return blake3(summed).digest(FINGERPRINT_BYTES), count


def _split(keys: KeySet, span: _Span, count: int, parts: int) -> list[_Span]:
    """`span` in parts with about equally many of its `count` keys."""
    first = keys.rank(span.low)
    starts = [first + count * part // parts for part in range(1, parts)]
    bounds = [span.low, *(find_separator(keys.select(start - 1), keys.select(start)) for start in starts), span.high]
    return [_Span(low=low, high=high) for low, high in pairwise(bounds)]


def _shorten(key: bytes) -> bytes:
    return id_of_key(key)[:SHORT_ID_BYTES]


def _encode(sections: Sequence[_Section]) -> bytes:
    end = KEY_FIRST
    ranges = []
    for span, mode, payload in sections:
        low = None if span.low == end else span.low
        ranges.append(KeyRange(low=low, high=span.high, mode=mode.value, payload=payload))
        end = span.high
    return RECONCILIATION_SCHEMA.encode(Comparison(ranges=tuple(ranges)))


def _list_spans(ranges: Sequence[KeyRange]) -> list[_Span]:
    spans: list[_Span] = []
    end = KEY_FIRST
    for received in ranges:
        low = end if received.low is None else received.low
        if (received.low is not None and low <= end) or received.high <= low:
            raise ProtocolError(Refusal.MALFORMED, "ranges are not in ascending order")
        if received.mode == RangeMode.FINGERPRINT and len(received.payload) != FINGERPRINT_BYTES:
            raise ProtocolError(Refusal.WRONG_LENGTH, f"a fingerprint of {len(received.payload)} bytes")
        if len(received.payload) % SHORT_ID_BYTES:
            raise ProtocolError(Refusal.WRONG_LENGTH, "a list of ids ends within one")
        spans.append(_Span(low=low, high=received.high))
        end = received.high
    return spans
