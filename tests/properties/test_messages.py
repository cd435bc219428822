"""Control frames: every message comes back through the envelope, and no bytes do anything but that or be refused."""

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.protocol.errors import ProtocolError, Refusal
from shoal.protocol.identity import PROTOCOL_VERSION, Identity
from shoal.protocol.messages import (
    SCHEMA,
    Envelope,
    Lock,
    PartDone,
    Plan,
    Presence,
    Ready,
    S,
    Vote,
    decode_message_untrusted,
    encode_message,
    sign_message,
    sign_ready,
    verify_message,
    verify_ready,
)
from shoal.protocol.wire import encode_record
from tests.properties.wire_strategies import mutated, packed, records

SWARM = b"s" * 32
IDENTITY, OTHER = Identity(b"i" * 32), Identity(b"o" * 32)

messages = st.one_of([records(cls) for cls in SCHEMA._classes.values()])
signed_classes = st.sampled_from([Presence, Plan, PartDone, Lock, Vote])


def decodes_or_is_refused(raw: bytes) -> None:
    try:
        message = decode_message_untrusted(SWARM, raw)
    except ProtocolError as error:
        assert isinstance(error.refusal, Refusal)
    else:
        assert encode_message(SWARM, message) == raw


@given(message=messages)
@settings(max_examples=100, deadline=None)
def test_every_message_comes_back(message: object) -> None:
    raw = encode_message(SWARM, message)
    assert decode_message_untrusted(SWARM, raw) == message


@given(raw=st.one_of(st.binary(max_size=400), packed))
@settings(max_examples=150, deadline=None)
def test_random_bytes_are_refused(raw: bytes) -> None:
    decodes_or_is_refused(raw)


@given(body=st.one_of(st.binary(min_size=1, max_size=400), packed))
@settings(max_examples=150, deadline=None)
def test_random_bodies_in_a_good_envelope_are_refused(body: bytes) -> None:
    decodes_or_is_refused(encode_record(Envelope(version=PROTOCOL_VERSION, swarm=SWARM, body=body)))


@given(raw=mutated(messages.map(lambda message: encode_message(SWARM, message))))
@settings(max_examples=150, deadline=None)
def test_nearly_good_frames_decode_or_are_refused(raw: bytes) -> None:
    decodes_or_is_refused(raw)


@given(body=mutated(messages.map(SCHEMA.encode)))
@settings(max_examples=100, deadline=None)
def test_nearly_good_bodies_decode_or_are_refused(body: bytes) -> None:
    decodes_or_is_refused(encode_record(Envelope(version=PROTOCOL_VERSION, swarm=SWARM, body=body)))


def is_signed(message: S, by: Identity = IDENTITY, swarm: bytes = SWARM) -> bool:
    try:
        verify_message(by.peer, swarm, message)
    except ProtocolError as error:
        assert error.refusal is Refusal.BAD_SIGNATURE
        return False
    return True


@given(data=st.data(), cls=signed_classes)
@settings(max_examples=40, deadline=None)
def test_a_signature_is_for_one_message_of_one_peer_in_one_swarm(data: st.DataObject, cls: type) -> None:
    first, second = data.draw(records(cls)), data.draw(records(cls))
    signed = sign_message(IDENTITY, SWARM, first)
    assert is_signed(signed)
    assert not is_signed(signed, by=OTHER)
    assert not is_signed(signed, swarm=b"t" * 32)
    moved = replace(second, signature=signed.signature)
    assert is_signed(moved) == (moved == signed)


@given(first=records(Ready), second=records(Ready))
@settings(max_examples=30, deadline=None)
def test_a_ready_is_signed_as_a_whole(first: Ready, second: Ready) -> None:
    signed = sign_ready(IDENTITY, SWARM, first)
    verify_ready(SWARM, signed)
    try:
        verify_ready(SWARM, replace(signed, ready=second))
    except ProtocolError as error:
        assert error.refusal is Refusal.BAD_SIGNATURE and first != second
    else:
        assert first == second
