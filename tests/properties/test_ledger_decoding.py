"""Whatever bytes come from outside, the ledger's decoders raise ProtocolError and nothing else."""

from collections.abc import Callable

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.crdt.clock import HLC_ZERO, Hlc
from shoal.crdt.entries import (
    NO_ENTRY,
    ChainPosition,
    EntryContent,
    decode_batch_untrusted,
    encode_batch,
    sign_batch,
)
from shoal.crdt.eras import PERMANENT_ERA
from shoal.crdt.key_set import KEY_END
from shoal.crdt.kinds import (
    EntryId,
    Kind,
    RoundBody,
    TagBody,
    VersionedBody,
    decode_body_untrusted,
    encode_body,
)
from shoal.crdt.ledger import Ledger, LedgerRules
from shoal.crdt.reconciliation import (
    FINGERPRINT_BYTES,
    RECONCILIATION_SCHEMA,
    Comparison,
    KeyRange,
    answer,
    begin,
)
from shoal.crdt.sketch import CELL_BYTES, SALT_BYTES, SHORT_ID_BYTES
from shoal.protocol.errors import ProtocolError
from shoal.protocol.identity import Identity

ANNA = Identity(b"a" * 32)
RULES = LedgerRules(swarm=b"s" * 32, owner=ANNA.peer, is_valid_snapshot=lambda *_: True)
BODIES = {
    Kind.LEASE: b"lease",
    Kind.CERTIFICATE: encode_body(RoundBody(round=3, value=b"votes")),
    Kind.TAG: encode_body(TagBody(name="best", value=b"", removes=())),
    Kind.MANIFEST: encode_body(VersionedBody(version=1, value=b"toml")),
}
START = ChainPosition(seq=0, prev=NO_ENTRY, hlc=HLC_ZERO)
BATCH = sign_batch(
    ANNA,
    RULES.swarm,
    START,
    [
        EntryContent(deps=(), hlc=Hlc(index + 1), kind=kind, body=body)
        for index, (kind, body) in enumerate(BODIES.items())
        if kind is not Kind.MANIFEST
    ],
)
DECREE = sign_batch(
    ANNA,
    RULES.swarm,
    ChainPosition(seq=0, prev=NO_ENTRY, hlc=HLC_ZERO, era=PERMANENT_ERA),
    [EntryContent(deps=(), hlc=Hlc(1), kind=Kind.MANIFEST, body=BODIES[Kind.MANIFEST])],
)
DEPENDENT = sign_batch(
    Identity(b"c" * 32),
    RULES.swarm,
    START,
    [EntryContent(deps=tuple(sorted((BATCH.tip, EntryId(b"d" * 32)))), hlc=Hlc(99), kind="lease", body=b"")],
)
MESSAGE = RECONCILIATION_SCHEMA.encode(
    Comparison(
        era=1,
        salt=bytes(SALT_BYTES),
        ranges=(
            KeyRange(low=None, high=b"\x01", mode=0, payload=bytes(FINGERPRINT_BYTES + 4)),
            KeyRange(low=b"\x02", high=b"\x03", mode=1, payload=bytes(3 * SHORT_ID_BYTES)),
            KeyRange(low=None, high=b"\x04", mode=2, payload=bytes(SHORT_ID_BYTES)),
            KeyRange(low=None, high=KEY_END, mode=3, payload=bytes(4 + 8 * CELL_BYTES)),
        ),
    )
)


def make_ledger() -> Ledger:
    ledger = Ledger(identity=Identity(b"b" * 32), rules=RULES)
    ledger.accept(BATCH)
    return ledger


def take_batch(raw: bytes) -> None:
    batch = decode_batch_untrusted(raw)
    assert encode_batch(batch) == raw
    make_ledger().accept(batch)


def take_body(raw: bytes) -> None:
    for kind in Kind:
        try:
            body = decode_body_untrusted(kind, raw)
        except ProtocolError:
            continue
        assert encode_body(body) == raw


def take_message(raw: bytes) -> None:
    answer(make_ledger(), raw)


TAKERS: list[tuple[Callable[[bytes], None], list[bytes]]] = [
    (take_batch, [encode_batch(batch) for batch in (BATCH, BATCH.suffix(2), DECREE, DEPENDENT)]),
    (take_body, list(BODIES.values())),
    (take_message, [begin(make_ledger(), bytes(SALT_BYTES)), MESSAGE]),
]

leaves = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.binary(max_size=40) | st.text()
trees = st.recursive(
    leaves,
    lambda children: st.lists(children, max_size=8) | st.dictionaries(st.text(max_size=3), children, max_size=2),
    max_leaves=20,
)
edits = st.lists(
    st.tuples(st.sampled_from(["set", "insert", "cut"]), st.integers(0, 10**6), st.integers(0, 255)),
    min_size=1,
    max_size=6,
)


def mutate(raw: bytes, changes: list[tuple[str, int, int]]) -> bytes:
    mutated = bytearray(raw)
    for how, position, value in changes:
        at = position % (len(mutated) + 1)
        if how == "insert":
            mutated.insert(at, value)
        elif how == "cut":
            del mutated[at : at + 1 + value % 8]
        elif at < len(mutated):
            mutated[at] = value
    return bytes(mutated)


def expect_no_other_error(take: Callable[[bytes], None], raw: bytes) -> None:
    try:
        take(raw)
    except ProtocolError as error:
        assert error.detail


@pytest.mark.parametrize(("take", "samples"), TAKERS)
def test_the_samples_are_accepted(take: Callable[[bytes], None], samples: list[bytes]) -> None:
    for sample in samples:
        take(sample)


@pytest.mark.parametrize(("take", "samples"), TAKERS)
@settings(max_examples=400, deadline=None)
@given(data=st.data(), changes=edits)
def test_mutated_bytes(
    take: Callable[[bytes], None], samples: list[bytes], data: st.DataObject, changes: list[tuple[str, int, int]]
) -> None:
    expect_no_other_error(take, mutate(data.draw(st.sampled_from(samples)), changes))


@pytest.mark.parametrize(("take", "samples"), TAKERS)
@settings(max_examples=200, deadline=None)
@given(raw=st.binary(max_size=300) | trees.map(msgpack.packb))
def test_arbitrary_bytes(take: Callable[[bytes], None], samples: list[bytes], raw: bytes) -> None:
    expect_no_other_error(take, raw)


def test_a_claim_of_great_length_is_refused_before_anything_is_allocated() -> None:
    for claim in (b"\xdd\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\x97\x01\xc6\xff\xff\xff\xff"):
        for take, _ in TAKERS:
            if take is not take_body:
                with pytest.raises(ProtocolError):
                    take(claim)
