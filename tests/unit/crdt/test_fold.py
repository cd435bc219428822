from shoal.crdt.certified import CertifiedRound, Credit
from shoal.crdt.clock import Hlc
from shoal.crdt.entries import NO_ENTRY, Entry
from shoal.crdt.evidence import Slot
from shoal.crdt.fold import Fold, LedgerState, Verdicts
from shoal.crdt.kinds import (
    Body,
    EntryId,
    Kind,
    ReadmissionBody,
    RegisterBody,
    RoundBody,
    TagBody,
    VersionedBody,
    encode_body,
)
from shoal.crdt.merge import OwnerValue, RegisterValue, Tag
from shoal.crdt.standing import Ban
from shoal.protocol.identity import PeerId

ANNA, OWNER = PeerId(b"a" * 32), PeerId(b"o" * 32)


VERDICTS = Verdicts(excluded={ANNA: Slot(1, 9)})


def make_entry(author: PeerId, seq: int, kind: Kind, body: Body) -> tuple[EntryId, Entry]:
    entry = Entry(
        version=1,
        swarm=b"s" * 32,
        author=author,
        era=1,
        seq=seq,
        prev=NO_ENTRY,
        deps=(),
        hlc=Hlc(seq),
        kind=kind,
        body=encode_body(body),
    )
    return EntryId(author[:16] + seq.to_bytes(16, "big")), entry


def fold(entries: list[tuple[EntryId, Entry]]) -> LedgerState:
    made = Fold(owner=OWNER, is_valid_snapshot=lambda _, value: value != b"bad")
    for entry_id, entry in entries:
        made.apply(entry_id, entry)
    return made.read(VERDICTS)


ENTRIES = [
    make_entry(ANNA, 0, Kind.LEASE, RegisterBody(value=b"lease")),
    make_entry(ANNA, 1, Kind.ADDRESSES, RegisterBody(value=b"addresses")),
    make_entry(ANNA, 2, Kind.CERTIFICATE, RoundBody(round=1, value=b"votes")),
    make_entry(ANNA, 3, Kind.SNAPSHOT, RoundBody(round=2, value=b"bad")),
    make_entry(ANNA, 4, Kind.SNAPSHOT, RoundBody(round=1, value=b"root")),
    make_entry(ANNA, 5, Kind.TAG, TagBody(name="best", value=b"1", removes=())),
    make_entry(ANNA, 6, Kind.TAG, TagBody(name="gone", value=b"1", removes=())),
    make_entry(ANNA, 7, Kind.TAG, TagBody(name="", value=b"", removes=(EntryId(ANNA[:16] + (6).to_bytes(16, "big")),))),
    make_entry(OWNER, 0, Kind.MANIFEST, VersionedBody(version=1, value=b"manifest")),
    make_entry(OWNER, 1, Kind.REROOT, VersionedBody(version=4, value=b"reroot")),
]


def test_every_kind_arrives_in_its_place() -> None:
    state = fold(ENTRIES)
    assert state.leases == {ANNA: RegisterValue(era=1, seq=0, hlc=Hlc(0), value=b"lease")}
    assert state.addresses == {ANNA: RegisterValue(era=1, seq=1, hlc=Hlc(1), value=b"addresses")}
    assert state.certificates == {}, "they are judged by the chain"
    assert state.snapshots == {1: (b"root",)}
    assert state.tags == (Tag(name="best", value=b"1", author=ANNA, entry=ENTRIES[5][0]),)
    assert state.manifest == OwnerValue(version=1, value=b"manifest")
    assert state.reroot == OwnerValue(version=4, value=b"reroot")
    assert state.excluded == {ANNA: (1, 9)}


def test_equal_states_have_equal_bytes_whatever_the_order() -> None:
    assert fold(ENTRIES).encode() == fold(ENTRIES[::-1]).encode()
    assert fold(ENTRIES).digest() == fold(ENTRIES + ENTRIES).digest()


def test_each_entry_that_counts_moves_the_digest() -> None:
    whole = fold(ENTRIES).digest()
    for left_out in (0, 1, 4, 5, 7, 8, 9):
        assert fold(ENTRIES[:left_out] + ENTRIES[left_out + 1 :]).digest() != whole


def test_each_verdict_moves_the_digest() -> None:
    read = Fold(owner=None, is_valid_snapshot=lambda *_: True).read
    verdicts = [
        Verdicts(),
        Verdicts(era=2),
        Verdicts(head=CertifiedRound(round=1, digest=bytes(32))),
        Verdicts(certificates={1: b"votes"}),
        Verdicts(credit={ANNA: Credit(tokens=1, rounds=1)}),
        Verdicts(contradiction=1),
        Verdicts(excluded={ANNA: Slot(1, 9)}),
        Verdicts(readmissions={ANNA: ReadmissionBody(author=ANNA, era=1, stands=EntryId(bytes(32)))}),
        Verdicts(bans=(Ban(peer=ANNA, reason="", entry=EntryId(bytes(32))),)),
        Verdicts(admitted=frozenset((ANNA,))),
    ]
    assert len({read(one).digest() for one in verdicts}) == len(verdicts)


def test_a_state_stays_as_it_was_read() -> None:
    made = Fold(owner=None, is_valid_snapshot=lambda *_: True)
    before = made.read(Verdicts())
    made.apply(*ENTRIES[0])
    assert before.leases == {}
    assert list(made.read(Verdicts()).leases) == [ANNA]
