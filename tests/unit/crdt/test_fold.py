from shoal.crdt.clock import Hlc
from shoal.crdt.entries import NO_ENTRY, Entry
from shoal.crdt.fold import Fold, LedgerState
from shoal.crdt.kinds import Body, EntryId, Kind, RegisterBody, RoundBody, TagBody, VersionedBody, encode_body
from shoal.crdt.merge import OwnerValue, RegisterValue, Tag
from shoal.protocol.identity import PeerId

ANNA, OWNER = PeerId(b"a" * 32), PeerId(b"o" * 32)


def make_entry(author: PeerId, seq: int, kind: Kind, body: Body) -> tuple[EntryId, Entry]:
    entry = Entry(
        version=1,
        swarm=b"s" * 32,
        author=author,
        seq=seq,
        prev=NO_ENTRY,
        deps=(),
        hlc=Hlc(seq),
        kind=kind,
        body=encode_body(body),
    )
    return EntryId(author[:16] + seq.to_bytes(16, "big")), entry


def fold(entries: list[tuple[EntryId, Entry]]) -> LedgerState:
    made = Fold(owner=OWNER, is_valid_certificate=lambda _, value: value != b"bad", is_valid_snapshot=lambda *_: True)
    for entry_id, entry in entries:
        made.apply(entry_id, entry)
    return made.read({ANNA: 9})


ENTRIES = [
    make_entry(ANNA, 0, Kind.LEASE, RegisterBody(value=b"lease")),
    make_entry(ANNA, 1, Kind.ADDRESSES, RegisterBody(value=b"addresses")),
    make_entry(ANNA, 2, Kind.CERTIFICATE, RoundBody(round=1, value=b"votes")),
    make_entry(ANNA, 3, Kind.CERTIFICATE, RoundBody(round=2, value=b"bad")),
    make_entry(ANNA, 4, Kind.SNAPSHOT, RoundBody(round=1, value=b"root")),
    make_entry(ANNA, 5, Kind.TAG, TagBody(name="best", value=b"1", removes=())),
    make_entry(ANNA, 6, Kind.TAG, TagBody(name="gone", value=b"1", removes=())),
    make_entry(ANNA, 7, Kind.TAG, TagBody(name="", value=b"", removes=(EntryId(ANNA[:16] + (6).to_bytes(16, "big")),))),
    make_entry(OWNER, 0, Kind.MANIFEST, VersionedBody(version=1, value=b"manifest")),
    make_entry(OWNER, 1, Kind.REROOT, VersionedBody(version=4, value=b"reroot")),
]


def test_every_kind_arrives_in_its_place() -> None:
    state = fold(ENTRIES)
    assert state.leases == {ANNA: RegisterValue(seq=0, hlc=Hlc(0), value=b"lease")}
    assert state.addresses == {ANNA: RegisterValue(seq=1, hlc=Hlc(1), value=b"addresses")}
    assert state.certificates == {1: b"votes"}
    assert state.snapshots == {1: (b"root",)}
    assert state.tags == (Tag(name="best", value=b"1", author=ANNA, entry=ENTRIES[5][0]),)
    assert state.manifest == OwnerValue(version=1, value=b"manifest")
    assert state.reroot == OwnerValue(version=4, value=b"reroot")
    assert state.excluded == {ANNA: 9}


def test_equal_states_have_equal_bytes_whatever_the_order() -> None:
    assert fold(ENTRIES).encode() == fold(ENTRIES[::-1]).encode()
    assert fold(ENTRIES).digest() == fold(ENTRIES + ENTRIES).digest()


def test_each_entry_that_counts_moves_the_digest() -> None:
    whole = fold(ENTRIES).digest()
    for left_out in (0, 1, 2, 4, 5, 7, 8, 9):
        assert fold(ENTRIES[:left_out] + ENTRIES[left_out + 1 :]).digest() != whole


def test_a_state_stays_as_it_was_read() -> None:
    made = Fold(owner=None, is_valid_certificate=lambda *_: True, is_valid_snapshot=lambda *_: True)
    before = made.read({})
    made.apply(*ENTRIES[0])
    assert before.leases == {}
    assert list(made.read({}).leases) == [ANNA]
