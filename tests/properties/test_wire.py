"""Any bytes decode to a record that encodes back to them, or are refused; nothing else happens."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.protocol.effects import VoteRecord
from shoal.protocol.errors import ProtocolError, Refusal
from shoal.protocol.layout import Layout
from shoal.protocol.manifest import Draft, Manifest, Rounds, SignedManifest, Task, Training
from shoal.protocol.messages import SCHEMA, Certificate, Envelope, Plan, Presence, Result, SignedReady
from shoal.protocol.state import SnapshotIndex
from shoal.protocol.wire import decode_record_untrusted, encode_record
from tests.properties.wire_strategies import mutated, packed, records

RECORDS = (
    *SCHEMA._classes.values(),
    Certificate,
    Draft,
    Envelope,
    Result,
    Rounds,
    SignedManifest,
    SignedReady,
    Task,
    Training,
    VoteRecord,
)
# Not every combination of their fields exists, so that none can be drawn field by field.
CONSTRAINED = (Layout, Manifest, SnapshotIndex)


def decodes_or_is_refused(cls: type, raw: bytes) -> None:
    try:
        value: Any = decode_record_untrusted(cls, raw)
    except ProtocolError as error:
        assert isinstance(error.refusal, Refusal) and error.detail
    else:
        assert encode_record(value) == raw


@pytest.mark.parametrize("cls", RECORDS, ids=lambda cls: cls.__name__)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_records_come_back(cls: type, data: st.DataObject) -> None:
    value = data.draw(records(cls))
    raw = encode_record(value)
    assert decode_record_untrusted(cls, raw, len(raw)) == value
    assert encode_record(decode_record_untrusted(cls, raw, len(raw))) == raw


@given(raw=st.binary(max_size=300))
@settings(max_examples=60, deadline=None)
def test_random_bytes_are_no_way_to_crash_a_decoder(raw: bytes) -> None:
    for cls in (*RECORDS, *CONSTRAINED):
        decodes_or_is_refused(cls, raw)


@given(raw=packed)
@settings(max_examples=60, deadline=None)
def test_random_trees_are_no_way_to_crash_a_decoder(raw: bytes) -> None:
    for cls in (*RECORDS, *CONSTRAINED):
        decodes_or_is_refused(cls, raw)


@pytest.mark.parametrize("cls", [Plan, Presence, VoteRecord, Rounds, Certificate], ids=lambda cls: cls.__name__)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_nearly_good_bytes_decode_or_are_refused(cls: type, data: st.DataObject) -> None:
    decodes_or_is_refused(cls, data.draw(mutated(records(cls).map(encode_record))))


@given(lengths=st.lists(st.sampled_from([b"\xdc\xff\xff", b"\xdd\x00\x01\x00\x00", b"\xdc\x10\x00"]), max_size=20000))
@settings(max_examples=15, deadline=None)
def test_arrays_that_announce_more_than_they_hold_are_refused(lengths: list[bytes]) -> None:
    with pytest.raises(ProtocolError):
        decode_record_untrusted(Plan, b"".join(lengths))
