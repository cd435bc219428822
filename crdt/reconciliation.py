"""Anti-entropy: two replicas find out what each lacks by comparing sums over ranges of their sorted keys.

Range-based set reconciliation (Meyer, "Range-based set reconciliation", SRDS 2023) with four kinds of range: a
fingerprint of all keys in it, the list of the short ids in it, a sketch of them from which the difference can be read
(`sketch.py`), or the short ids in it that the sender wants. Fingerprints find differences that lie together, which is
the common case, and tell how many there are where they do not; sketches then take the place of ever smaller ranges,
which would cost several times the bytes. The conversation goes through the key space, that is through history, from
old to new: what does not fit into a reply is summed up in one last range, so that nothing is kept between messages and
an interrupted conversation goes on wherever the sets stand by then.

How to use it: the opener sends `begin`; whoever gets a message first hands the entries that came with it to its
ledger, then calls `answer` and sends what that returns; a reply of None ends the conversation. `anti_entropy.py` does
so for the opener, within bounds.

Why short ids of six bytes and fingerprints of eight are enough: the opener draws a salt for each conversation, and
both depend on it. Two entries of one short id, or two sets of one fingerprint, are then an accident of one in 2^48, or
in 2^64, that lasts for one conversation. An author cannot prepare them, for it would have to know the salt when it
writes. An opener that chooses its salt, or lies in any other way, deceives nobody but itself: the other one sends it
what it does not need. What the salt does not cover is the sum below the fingerprint; see `key_set.py`.

Invariants: no message has more than RANGES_MAX ranges or COMPARISON_BYTES_MAX bytes; no reply comes with more than
BATCHES_MAX batches or ENTRIES_BYTES_MAX bytes of them, or costs more than KEYS_HASHED_MAX hashes. Every message that
finds a difference settles a stretch of keys, lays it out smaller, or doubles the sketch that was too small, up to where
a list is no longer; so two honest replicas that do not change end with equal sets.
"""

import math
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, replace
from enum import IntEnum
from itertools import islice, pairwise
from typing import Annotated

from blake3 import blake3

from shoal.crdt.entries import encode_batch
from shoal.crdt.eras import ERA_MAX, ERAS_AHEAD, FIRST_ERA, oldest_kept
from shoal.crdt.key_set import KEY_BYTES, KEY_END, KEY_FIRST, KeySet, find_separator, id_of_key
from shoal.crdt.kinds import ENTRY_ID_BYTES, EntryId
from shoal.crdt.ledger import Ledger
from shoal.crdt.sketch import (
    CELL_BYTES,
    CELLS_MIN,
    HASHES,
    SALT_BYTES,
    SHORT_ID_BYTES,
    Sketch,
    count_cells,
    round_cells,
    shorten,
)
from shoal.protocol.errors import ProtocolError, Refusal
from shoal.protocol.wire import DELTA_BYTES_MAX, Bound, Schema

RANGES_MAX = 64
FAN_OUT_MAX = 16
# Up to so many entries a range is listed, whatever is known about it.
LISTED_MAX = 32
COMPARISON_BYTES_MAX = 32 * 1024
# What protocol/messages.py lets one message carry, less the comparison and the headers.
BATCHES_MAX = 256
ENTRIES_BYTES_MAX = DELTA_BYTES_MAX - COMPARISON_BYTES_MAX - 4 * 1024
# Each takes some two microseconds; ranges without a difference cost none.
KEYS_HASHED_MAX = 24 * 1024
# Leaves the other side, which may have more keys in the range, room to do the same.
SKETCHED_KEYS_MAX = KEYS_HASHED_MAX // 2
FINGERPRINT_BYTES = 8
_COUNT_BYTES = 4
_COUNT_MAX = 2**32 - 1
_SUMMARY_BYTES = FINGERPRINT_BYTES + _COUNT_BYTES
# Both bounds of a range, and headers.
_RANGE_BYTES_MAX = 2 * KEY_BYTES + 16
# Room for the range that sums up the rest, and for what surrounds the ranges.
_RESERVED_BYTES = 2 * _RANGE_BYTES_MAX
PAYLOAD_BYTES_MAX = COMPARISON_BYTES_MAX - _RESERVED_BYTES - _RANGE_BYTES_MAX
# Cells are added by whole rows; after the count.
_SKETCH_SLACK = HASHES * CELL_BYTES + _COUNT_BYTES
_CELLS_TRIED_MAX = PAYLOAD_BYTES_MAX // (2 * CELL_BYTES)
# From so many fingerprints the share of those that differ tells something about the number of differences.
_TELLING_RANGES_MIN = 8
# Where all ranges differ, there is no telling how much; a sketch for so many in each finds out.
_DIFFERENCES_ASSUMED = 4.0
# On top of an estimate, whose standard deviation is a seventh with a hundred cells.
_MARGIN = 1.2


class RangeMode(IntEnum):
    """What a range's payload is."""

    FINGERPRINT = 0
    LISTED = 1
    WANTED = 2
    SKETCH = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyRange:
    """The keys from `low` (or, where that is None, from the end of the range before) up to but not including `high`.

    `payload`: short ids one after the other for LISTED and WANTED; otherwise the number of keys in four bytes, and then
    the fingerprint or the cells.
    """

    low: Annotated[bytes, Bound(0, KEY_BYTES)] | None
    high: Annotated[bytes, Bound(1, KEY_BYTES)]
    mode: Annotated[int, Bound(0, 3)]
    payload: Annotated[bytes, Bound(0, PAYLOAD_BYTES_MAX)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One message: the sender's era, the conversation's salt, and ranges in ascending order that do not overlap."""

    era: Annotated[int, Bound(FIRST_ERA, ERA_MAX)]
    salt: Annotated[bytes, Bound(SALT_BYTES, SALT_BYTES)]
    ranges: Annotated[tuple[KeyRange, ...], Bound(1, RANGES_MAX)]


RECONCILIATION_SCHEMA = Schema({1: Comparison})


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What to send back: the next message, None where nothing is left to compare, and encoded batches with it."""

    reply: bytes | None
    batches: tuple[bytes, ...]


def begin(ledger: Ledger, salt: bytes) -> bytes:
    """The message that opens a conversation about everything that `ledger` holds; `salt` is fresh entropy."""
    whole = _Span(low=KEY_FIRST, high=KEY_END)
    summary = _summarize(ledger.keys, salt, whole)
    return _encode(ledger.era, salt, [(whole, RangeMode.FINGERPRINT, summary.payload)])


def answer(ledger: Ledger, message: bytes) -> Answer:
    """Compare `message` with what `ledger` holds; raises ProtocolError for a message that no honest peer sends."""
    comparison = RECONCILIATION_SCHEMA.decode_untrusted(message, COMPARISON_BYTES_MAX)
    assert isinstance(comparison, Comparison)
    spans = _list_spans(comparison.ranges)
    reply = _Reply(ledger, comparison)
    for part in _find_differences(ledger.keys, comparison, spans):
        rest = reply.respond(part)
        if rest is not None:
            reply.sum_up(_Span(low=rest, high=spans[-1].high))
            break
    return reply.finish()


class BatchSelection:
    """Entries to send, as at most BATCHES_MAX encoded batches of at most `bytes_max` bytes in all."""

    def __init__(self, ledger: Ledger, bytes_max: int) -> None:
        self._ledger = ledger
        self._bytes_left = bytes_max
        self._selected: set[EntryId] = set()
        self.batches: list[bytes] = []

    def add(self, entry_id: EntryId) -> bool:
        """Select an entry that the ledger holds, with what proves it; False, and no change, where that does not fit."""
        if entry_id in self._selected:
            return True
        if len(self.batches) == BATCHES_MAX:
            return False
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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Summary:
    """What a fingerprint covers, and the payload that says so."""

    count: int
    payload: bytes


_Section = tuple[_Span, RangeMode, bytes]
# A key with the short id of its entry.
_HashedKey = tuple[bytes, bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """What there is to respond to: one range, or neighbouring ranges whose fingerprints all differ.

    `count` and `others_count` are the keys here and there. `expected`: how many differences fingerprints suggest, None
    where they do not tell. `is_narrow`: it is a small part of what the fingerprints cover.
    """

    span: _Span
    mode: RangeMode
    payload: bytes = b""
    count: int = 0
    others_count: int = 0
    expected: float | None = None
    is_narrow: bool = False


class _Reply:
    """A reply in the making: ranges and batches, within their bounds.

    What handles a part returns None, or the bound from which on there was no room for it. Of a reply's first part
    something always has room, so that every reply goes on.
    """

    def __init__(self, ledger: Ledger, comparison: Comparison) -> None:
        self._ledger = ledger
        self._keys = ledger.keys
        self._salt = comparison.salt
        self._eras = range(oldest_kept(comparison.era), comparison.era + ERAS_AHEAD + 1)
        self._sections: list[_Section] = []
        self._bytes_left = COMPARISON_BYTES_MAX - _RESERVED_BYTES
        self._hashes_left = KEYS_HASHED_MAX
        self._selection = BatchSelection(ledger, ENTRIES_BYTES_MAX)

    def respond(self, part: _Part) -> bytes | None:
        """Settle or narrow down one part."""
        match part.mode:
            case RangeMode.FINGERPRINT:
                return self._compare(part)
            case RangeMode.SKETCH:
                return self._read_sketch(part)
            case _:
                return self._read_list(part)

    def sum_up(self, span: _Span) -> None:
        """Leave `span` to the following messages."""
        self._append(span, RangeMode.FINGERPRINT, _summarize(self._keys, self._salt, span).payload)

    def finish(self) -> Answer:
        """The reply as it stands."""
        reply = _encode(self._ledger.era, self._salt, self._sections) if self._sections else None
        return Answer(reply=reply, batches=tuple(self._selection.batches))

    @property
    def _payload_bytes_left(self) -> int:
        """How long the payload of one more range may be; negative where there is no room for the range."""
        return self._bytes_left - _RANGE_BYTES_MAX if len(self._sections) < RANGES_MAX - 1 else -1

    def _append(self, span: _Span, mode: RangeMode, payload: bytes) -> None:
        self._bytes_left -= len(payload) + _RANGE_BYTES_MAX
        self._sections.append((span, mode, payload))

    def _compare(self, part: _Part) -> bytes | None:
        if part.others_count == 0:
            return self._send(self._keys.iterate(part.span.low, part.span.high))
        if part.count > LISTED_MAX:
            if part.expected is None:
                return self._split(part)
            surplus = abs(part.count - part.others_count)
            # Much more than fingerprints suggest lies together; a part that is no narrower would go to and fro.
            if part.is_narrow and surplus > 4 * part.expected + 16:
                return self._split(part)
            return self._narrow(part.span, part.count, max(part.expected, surplus))
        return self._list(part)

    def _list(self, part: _Part) -> bytes | None:
        if self._payload_bytes_left < part.count * SHORT_ID_BYTES or self._hashes_left < part.count:
            return part.span.low
        self._append(part.span, RangeMode.LISTED, b"".join(short_id for _, short_id in self._hash(part.span)))
        return None

    def _split(self, part: _Part) -> bytes | None:
        """Compare again in smaller ranges."""
        room = min(RANGES_MAX - 1 - len(self._sections), self._bytes_left // (_SUMMARY_BYTES + _RANGE_BYTES_MAX))
        parts = min(FAN_OUT_MAX, room)
        if parts < 2:
            return part.span.low
        for span in _split(self._keys, part.span, part.count, parts):
            self.sum_up(span)
        return None

    def _narrow(self, span: _Span, count: int, differences: float) -> bytes | None:
        """Lay out `span`, with `count` keys, for so many differences, as much of it as fits."""
        if self._hashes_left < min(count, SKETCHED_KEYS_MAX):
            return span.low
        return self._lay_out(span, self._hash(span, SKETCHED_KEYS_MAX), count, count_cells(differences))

    def _lay_out(self, span: _Span, hashed: Sequence[_HashedKey], count: int, cells: int) -> bytes | None:
        """Append a sketch of `cells` or, where that is shorter, a list of the first keys of `span`, `hashed`, as many
        as there is room for; of all `count` of them if possible."""
        share = len(hashed) / count
        list_bytes, sketch_bytes = len(hashed) * SHORT_ID_BYTES, math.ceil(cells * share) * CELL_BYTES + _SKETCH_SLACK
        fitting = min(1.0, self._payload_bytes_left / min(list_bytes, sketch_bytes))
        if fitting < 1.0 and self._sections:
            # There will be room in the next message.
            return span.low
        included = hashed if fitting == 1.0 else hashed[: max(1, int(len(hashed) * fitting))]
        rest = self._find_bound(span, len(included)) if len(included) < count else None
        laid_out = _Span(low=span.low, high=span.high if rest is None else rest)
        short_ids = [short_id for _, short_id in included]
        if list_bytes <= sketch_bytes:
            self._append(laid_out, RangeMode.LISTED, b"".join(short_ids))
        else:
            sketch = Sketch(self._salt, round_cells(cells * share * fitting))
            sketch.add(short_ids)
            self._append(laid_out, RangeMode.SKETCH, _encode_count(len(short_ids)) + sketch.encode())
        return rest

    def _read_sketch(self, part: _Part) -> bytes | None:
        """Send and ask for what differs; where the sketch does not show it, lay the range out again."""
        span, count = part.span, part.count
        if not count:
            return self._list(part)
        if count > KEYS_HASHED_MAX:
            # More than twice as many as there: a list is shortest.
            return self._narrow(span, count, count)
        if count > self._hashes_left:
            return span.low
        hashed = self._hash(span)
        sketch = Sketch(self._salt, (len(part.payload) - _COUNT_BYTES) // CELL_BYTES)
        sketch.add(short_id for _, short_id in hashed)
        subtracted = sketch.subtract(part.payload[_COUNT_BYTES:])
        difference = subtracted.read()
        if difference is not None:
            return self._settle(span, hashed, difference.own, difference.others)
        differences = _MARGIN * subtracted.estimate(count - part.others_count)
        cells = max(count_cells(differences), 2 * len(sketch))
        # What a second sketch of a whole message's length would not show is listed.
        return self._lay_out(span, hashed, count, cells if len(sketch) < _CELLS_TRIED_MAX else count)

    def _read_list(self, part: _Part) -> bytes | None:
        """Of all ids in a range: send what is missing there, ask for what is missing here. Of wanted ones: send."""
        span, named = part.span, _read_short_ids(part.payload)
        if not named:
            return self._send(self._keys.iterate(span.low, span.high))
        if not self._hashes_left:
            return span.low
        hashed = self._hash(span, self._hashes_left)
        rest = self._find_bound(span, len(hashed)) if len(hashed) < part.count else None
        looked_at = _Span(low=span.low, high=span.high if rest is None else rest)
        own = frozenset(short_id for _, short_id in hashed)
        is_all = part.mode is RangeMode.LISTED
        overflow = self._settle(
            looked_at, hashed, own - named if is_all else own & named, named - own if is_all else frozenset()
        )
        return rest if overflow is None else overflow

    def _settle(
        self, span: _Span, hashed: Sequence[_HashedKey], lacking: Set[bytes], unknown: Set[bytes]
    ) -> bytes | None:
        """Send the entries of `span` that the other is lacking and ask for those that are unknown here."""
        if self._payload_bytes_left < len(unknown) * SHORT_ID_BYTES:
            return span.low
        sent = [key for key, short_id in hashed if short_id in lacking]
        rest = self._send(iter(sent))
        end = span.high if rest is None else rest
        if unknown and end != span.low:
            # Those that lie above `rest` the other side does not find in this range; the next message names them again.
            self._append(_Span(low=span.low, high=end), RangeMode.WANTED, b"".join(sorted(unknown)))
        if rest is None:
            return None
        left = [(key, short_id) for key, short_id in hashed if key >= rest]
        differences = sum(short_id in lacking for _, short_id in left) + len(unknown) * len(left) / len(hashed)
        bound = self._lay_out(_Span(low=rest, high=span.high), left, len(left), count_cells(differences))
        return bound

    def _send(self, keys: Iterator[bytes]) -> bytes | None:
        useful = ((key, id_of_key(key)) for key in keys)
        return next((key for key, name in useful if self._is_kept_there(name) and not self._selection.add(name)), None)

    def _is_kept_there(self, entry_id: EntryId) -> bool:
        # What a peer in another era leaves out would be sent to it again and again, and nothing that comes after it.
        entry = self._ledger.get(entry_id)
        assert entry is not None, "keys are those of the ledger's entries"
        # What does not count here any more is evidence, and wanted by everybody.
        return entry.era in self._eras or entry.era < oldest_kept(self._ledger.era)

    def _hash(self, span: _Span, count_max: int = KEYS_HASHED_MAX) -> list[_HashedKey]:
        keys = islice(self._keys.iterate(span.low, span.high), count_max)
        hashed = [(key, shorten(self._salt, id_of_key(key))) for key in keys]
        self._hashes_left -= len(hashed)
        return hashed

    def _find_bound(self, span: _Span, count: int) -> bytes:
        """The bound above the first `count` keys of `span`, which has more."""
        first = self._keys.rank(span.low)
        return find_separator(self._keys.select(first + count - 1), self._keys.select(first + count))


def _find_differences(keys: KeySet, comparison: Comparison, spans: Sequence[_Span]) -> list[_Part]:
    """What there is to respond to in a message, in ascending order."""
    parts: list[_Part] = []
    told = differing = 0
    for span, received in zip(spans, comparison.ranges, strict=True):
        mode, count, others_count = RangeMode(received.mode), 0, 0
        if mode is RangeMode.FINGERPRINT:
            told += 1
            summary = _summarize(keys, comparison.salt, span)
            if summary.payload == received.payload:
                continue
            differing += 1
            count = summary.count
        else:
            count = keys.rank(span.high) - keys.rank(span.low)
        if mode in (RangeMode.FINGERPRINT, RangeMode.SKETCH):
            others_count = int.from_bytes(received.payload[:_COUNT_BYTES], "big")
        parts.append(_Part(span=span, mode=mode, payload=received.payload, count=count, others_count=others_count))
    return _join(parts, told, differing)


def _join(parts: Sequence[_Part], told: int, differing: int) -> list[_Part]:
    """Make one part of neighbouring fingerprints, for a sketch of many differences is shorter than many of few; but
    what only one side has anything of is dealt with at once, and by itself."""
    each: float | None = None
    if differing and told >= _TELLING_RANGES_MIN:
        # Differences that fall into ranges at random leave this many of them empty.
        each = _DIFFERENCES_ASSUMED if differing == told else -told * math.log(1 - differing / told) / differing
    joined: list[list[_Part]] = []
    for part in parts:
        last = joined[-1][-1] if joined else None
        if last is not None and _are_alike(last, part):
            joined[-1].append(part)
        else:
            joined.append([part])
    return [
        replace(
            first[0],
            span=_Span(low=first[0].span.low, high=first[-1].span.high),
            count=sum(part.count for part in first),
            others_count=sum(part.others_count for part in first),
            expected=None if each is None else each * len(first),
            is_narrow=4 * len(first) <= told,
        )
        for first in joined
    ]


def _are_alike(left: _Part, right: _Part) -> bool:
    return (
        left.mode is right.mode is RangeMode.FINGERPRINT
        and left.span.high == right.span.low
        and (left.count == 0, left.others_count == 0) == (right.count == 0, right.others_count == 0)
    )


def _summarize(keys: KeySet, salt: bytes, span: _Span) -> _Summary:
    """The number of keys in `span`, and a fingerprint: a hash of the salt, that number, and the sum of their ids."""
    count, total = keys.add_up(span.low, span.high)
    encoded = _encode_count(count)
    summed = salt + encoded + total.to_bytes(ENTRY_ID_BYTES, "big")
    return _Summary(count=count, payload=encoded + blake3(summed).digest(FINGERPRINT_BYTES))


def _split(keys: KeySet, span: _Span, count: int, parts: int) -> list[_Span]:
    """`span` in parts with about equally many of its `count` keys."""
    first = keys.rank(span.low)
    starts = [first + count * part // parts for part in range(1, parts)]
    bounds = [span.low, *(find_separator(keys.select(start - 1), keys.select(start)) for start in starts), span.high]
    return [_Span(low=low, high=high) for low, high in pairwise(bounds)]


def _encode_count(count: int) -> bytes:
    return min(count, _COUNT_MAX).to_bytes(_COUNT_BYTES, "big")


def _read_short_ids(payload: bytes) -> frozenset[bytes]:
    return frozenset(payload[at : at + SHORT_ID_BYTES] for at in range(0, len(payload), SHORT_ID_BYTES))


def _encode(era: int, salt: bytes, sections: Sequence[_Section]) -> bytes:
    end = KEY_FIRST
    ranges = []
    for span, mode, payload in sections:
        low = None if span.low == end else span.low
        ranges.append(KeyRange(low=low, high=span.high, mode=mode.value, payload=payload))
        end = span.high
    return RECONCILIATION_SCHEMA.encode(Comparison(era=era, salt=salt, ranges=tuple(ranges)))


def _list_spans(ranges: Sequence[KeyRange]) -> list[_Span]:
    spans: list[_Span] = []
    end = KEY_FIRST
    for received in ranges:
        low = end if received.low is None else received.low
        if (received.low is not None and low <= end) or received.high <= low:
            raise ProtocolError(Refusal.MALFORMED, "ranges are not in ascending order")
        _check_length(RangeMode(received.mode), len(received.payload))
        spans.append(_Span(low=low, high=received.high))
        end = received.high
    return spans


def _check_length(mode: RangeMode, length: int) -> None:
    match mode:
        case RangeMode.FINGERPRINT:
            if length != _SUMMARY_BYTES:
                raise ProtocolError(Refusal.WRONG_LENGTH, f"a fingerprint of {length} bytes")
        case RangeMode.SKETCH:
            cells, odd = divmod(length - _COUNT_BYTES, CELL_BYTES)
            if odd or cells < CELLS_MIN or cells % HASHES:
                raise ProtocolError(Refusal.WRONG_LENGTH, f"a sketch of {length} bytes")
        case _:
            if length % SHORT_ID_BYTES:
                raise ProtocolError(Refusal.WRONG_LENGTH, "a list of ids ends within one")
