from dataclasses import replace

import pytest

from shoal.crdt.clock import HLC_ZERO, Hlc
from shoal.crdt.entries import (
    BATCH_BYTES_MAX,
    ENTRIES_PER_BATCH_MAX,
    ENTRIES_PER_ERA_MAX,
    NO_ENTRY,
    Batch,
    ChainPosition,
    EntryContent,
    compute_entry_id,
    decode_batch_untrusted,
    encode_batch,
    sign_batch,
    verify_batch,
)
from shoal.crdt.kinds import EntryId
from shoal.protocol.errors import ProtocolError, Refusal
from shoal.protocol.identity import Identity
from shoal.protocol.wire import DELTA_BYTES_MAX

SWARM = b"s" * 32
ANNA, BEN = Identity(b"a" * 32), Identity(b"b" * 32)
START = ChainPosition(seq=0, prev=NO_ENTRY, hlc=HLC_ZERO)


def content(hlc: int, body: bytes = b"x", deps: tuple[EntryId, ...] = (), kind: str = "lease") -> EntryContent:
    return EntryContent(deps=deps, hlc=Hlc(hlc), kind=kind, body=body)


def make_batch(count: int = 3, identity: Identity = ANNA) -> Batch:
    return sign_batch(identity, SWARM, START, [content(number + 1) for number in range(count)])


def refusal_of(raw: bytes) -> Refusal:
    with pytest.raises(ProtocolError) as caught:
        decode_batch_untrusted(raw)
    return caught.value.refusal


def test_a_batch_survives_its_wire_form() -> None:
    batch = make_batch()
    assert decode_batch_untrusted(encode_batch(batch)) == batch
    verify_batch(batch)


def test_the_entries_of_a_batch_are_one_chain() -> None:
    batch = make_batch()
    assert [entry.seq for entry in batch.entries] == [0, 1, 2]
    assert [entry.prev for entry in batch.entries] == [NO_ENTRY, *batch.ids[:2]]
    assert batch.ids == tuple(map(compute_entry_id, batch.entries))
    assert (batch.author, batch.swarm, batch.tip) == (ANNA.peer, SWARM, batch.ids[2])


def test_every_suffix_of_a_batch_proves_itself_to_a_third_peer() -> None:
    batch = make_batch(5)
    for start in range(5):
        rest = decode_batch_untrusted(encode_batch(batch.suffix(start)))
        verify_batch(rest)
        assert rest.ids == batch.ids[start:]


def test_a_changed_entry_is_not_vouched_for() -> None:
    batch = make_batch()
    changed = list(batch.entries)
    changed[0] = replace(changed[0], body=b"y")
    forged = decode_batch_untrusted(encode_batch(replace(batch, entries=tuple(changed))))
    assert forged.ids[2] != batch.ids[2]
    with pytest.raises(ProtocolError) as caught:
        verify_batch(forged)
    assert caught.value.refusal is Refusal.BAD_SIGNATURE


def test_a_prefix_is_not_vouched_for_by_the_batchs_signature() -> None:
    batch = make_batch()
    prefix = Batch(entries=batch.entries[:2], ids=batch.ids[:2], signature=batch.signature)
    with pytest.raises(ProtocolError):
        verify_batch(prefix)


@pytest.mark.parametrize("field", ["swarm", "author"])
def test_a_signature_holds_in_its_swarm_and_for_its_author_only(field: str) -> None:
    batch = make_batch(1)
    changes = {"swarm": b"t" * 32, "author": BEN.peer}
    entry = replace(batch.entries[0], **{field: changes[field]})  # type: ignore[arg-type]  # one of two bytes fields
    forged = decode_batch_untrusted(encode_batch(replace(batch, entries=(entry,))))
    with pytest.raises(ProtocolError):
        verify_batch(forged)


def test_each_field_of_an_entry_moves_its_id() -> None:
    entry = make_batch(1).entries[0]
    variants = [
        replace(entry, version=3),
        replace(entry, era=2),
        replace(entry, swarm=b"t" * 32),
        replace(entry, author=BEN.peer),
        replace(entry, seq=1),
        replace(entry, prev=EntryId(b"p" * 32)),
        replace(entry, deps=(EntryId(b"d" * 32),)),
        replace(entry, hlc=Hlc(2)),
        replace(entry, kind="addresses"),
        replace(entry, body=b"y"),
    ]
    assert len({compute_entry_id(variant) for variant in (entry, *variants)}) == 11


def test_the_largest_batch_fits_a_control_message() -> None:
    assert 2 * BATCH_BYTES_MAX < DELTA_BYTES_MAX
    batch = make_batch(ENTRIES_PER_BATCH_MAX)
    assert decode_batch_untrusted(encode_batch(batch)) == batch
    with pytest.raises(ProtocolError):
        make_batch(ENTRIES_PER_BATCH_MAX + 1)
    assert refusal_of(bytes(BATCH_BYTES_MAX + 1)) is Refusal.OVERSIZED


def test_signing_refuses_what_others_would_refuse() -> None:
    for contents in (
        [content(1, body=bytes(1025))],
        [content(2), content(2)],
        [content(1, kind="gossip")],
        [content(1, deps=(EntryId(b"b" * 32), EntryId(b"a" * 32)))],
        [content(1, deps=(EntryId(b"a" * 32), EntryId(b"a" * 32)))],
        [content(1, deps=(NO_ENTRY,))],
        [content(1, deps=tuple(EntryId(bytes([number]) * 32) for number in range(1, 10)))],
    ):
        with pytest.raises(ProtocolError):
            sign_batch(ANNA, SWARM, START, contents)


@pytest.mark.parametrize(
    ("position", "refusal"),
    [
        (ChainPosition(seq=0, prev=EntryId(b"p" * 32), hlc=HLC_ZERO), Refusal.MALFORMED),
        (ChainPosition(seq=1, prev=NO_ENTRY, hlc=HLC_ZERO), Refusal.MALFORMED),
        (ChainPosition(seq=ENTRIES_PER_ERA_MAX, prev=EntryId(b"p" * 32), hlc=HLC_ZERO), Refusal.OUT_OF_RANGE),
    ],
)
def test_a_chain_begins_at_zero_without_a_previous_entry_and_is_bounded(
    position: ChainPosition, refusal: Refusal
) -> None:
    with pytest.raises(ProtocolError) as caught:
        sign_batch(ANNA, SWARM, position, [content(1), content(2)])
    assert caught.value.refusal is refusal


def test_another_version_is_refused() -> None:
    batch = make_batch(1)
    raw = encode_batch(replace(batch, entries=(replace(batch.entries[0], version=1),)))
    assert refusal_of(raw) is Refusal.WRONG_VERSION


def test_trailing_bytes_are_refused() -> None:
    assert refusal_of(encode_batch(make_batch()) + b"\x00") is Refusal.MALFORMED
