"""Equivocation, readmission, bans and admissions, as every replica sees them."""

import itertools
from collections.abc import Iterable, Sequence

import msgpack
import pytest

from shoal.crdt.clock import HLC_ZERO, Hlc
from shoal.crdt.entries import NO_ENTRY, Batch, ChainPosition, EntryContent, sign_batch
from shoal.crdt.eras import PERMANENT_ERA
from shoal.crdt.kinds import (
    AdmissionBody,
    BanBody,
    Body,
    Decree,
    EntryId,
    Kind,
    ReadmissionBody,
    RegisterBody,
    TagBody,
    decode_body_untrusted,
    encode_body,
)
from shoal.crdt.ledger import ChainForkedError, Draft, Ledger, LedgerRules
from shoal.protocol.errors import ProtocolError, Refusal
from shoal.protocol.identity import Identity, PeerId

SWARM = b"s" * 32
OWNER, ANNA, BEN = (Identity(name * 32) for name in (b"o", b"a", b"b"))
NOW_MS = 1_700_000_000_000
LEASE = Draft(kind=Kind.LEASE, body=RegisterBody(value=b"lease"))


def make_ledger(identity: Identity = BEN, *, is_owned: bool = True) -> Ledger:
    owner = OWNER.peer if is_owned else None
    return Ledger(identity=identity, rules=LedgerRules(swarm=SWARM, owner=owner, is_valid_snapshot=lambda *_: True))


def make_chain(values: Sequence[bytes], start: ChainPosition | None = None, era: int = 1) -> Batch:
    position = start or ChainPosition(era=era, seq=0, prev=NO_ENTRY, hlc=HLC_ZERO)
    contents = [
        EntryContent(deps=(), hlc=Hlc(position.hlc + index), kind="lease", body=value)
        for index, value in enumerate(values, 1)
    ]
    return sign_batch(ANNA, SWARM, position, contents)


def after(batch: Batch, count: int) -> ChainPosition:
    last = batch.entries[count - 1]
    return ChainPosition(era=last.era, seq=last.seq + 1, prev=batch.ids[count - 1], hlc=last.hlc)


def decree(owner: Ledger, kind: Kind, body: Decree) -> Batch:
    batch = owner.write([Draft(kind=kind, body=body)], NOW_MS)
    assert batch.era == PERMANENT_ERA
    assert owner.accept(batch).accepted
    return batch


def readmit(owner: Ledger, stands: EntryId, era: int = 1) -> Batch:
    return decree(owner, Kind.READMISSION, ReadmissionBody(author=ANNA.peer, era=era, stands=stands))


def fill(batches: Iterable[Batch]) -> Ledger:
    ledger = make_ledger()
    for batch in batches:
        ledger.accept(batch)
        ledger.fold(NOW_MS)
    return ledger


def read_lease(ledger: Ledger) -> bytes | None:
    lease = ledger.fold(NOW_MS).leases.get(ANNA.peer)
    return lease.value if lease else None


COMMON = make_chain([b"0", b"1"])
LEFT = make_chain([b"left", b"left again"], after(COMMON, 2))
RIGHT = make_chain([b"right"], after(COMMON, 2))


def test_a_readmission_names_the_branch_that_stands_and_the_chain_goes_on_in_the_next_era() -> None:
    word = readmit(make_ledger(OWNER), LEFT.tip)
    following = make_chain([b"new era"], era=2)
    states = set()
    for order in itertools.permutations([COMMON, LEFT, RIGHT, word]):
        ledger = fill(order)
        assert (ledger.forks, read_lease(ledger)) == ({}, b"left again")
        ledger.accept(following)
        assert read_lease(ledger) == b"new era"
        states.add(ledger.fold(NOW_MS).encode())
        assert ledger.list_evidence() == ()
    assert len(states) == 1


def test_what_is_signed_on_either_branch_after_a_readmission_does_not_count() -> None:
    word = readmit(make_ledger(OWNER), LEFT.ids[0])
    late_left, late_right = make_chain([b"late"], after(LEFT, 2)), make_chain([b"late"], after(RIGHT, 1))
    for order in itertools.permutations([LEFT, RIGHT, word, late_left, late_right]):
        ledger = fill([COMMON, *order])
        assert (ledger.forks, read_lease(ledger)) == ({}, b"left")


def test_a_second_equivocation_excludes_again_until_the_owner_speaks_again() -> None:
    owner = make_ledger(OWNER)
    first_word = readmit(owner, LEFT.tip)
    twins = [make_chain([value], era=2) for value in (b"one", b"other")]
    for order in itertools.permutations([LEFT, RIGHT, first_word, *twins]):
        ledger = fill([COMMON, *order])
        assert (ledger.forks, read_lease(ledger)) == ({ANNA.peer: (2, 0)}, b"left again")
        (evidence,) = ledger.list_evidence()
        assert evidence.slot == (2, 0)
    second_word = readmit(owner, twins[1].tip, era=2)
    for order in itertools.permutations([LEFT, RIGHT, first_word, second_word, *twins]):
        ledger = fill([COMMON, *order])
        assert (ledger.forks, read_lease(ledger)) == ({}, b"other")


def test_a_readmission_of_an_earlier_era_takes_nothing_back() -> None:
    owner = make_ledger(OWNER)
    twins = [make_chain([value], era=2) for value in (b"one", b"other")]
    words = [readmit(owner, twins[0].tip, era=2), readmit(owner, LEFT.tip)]
    ledger = fill([COMMON, LEFT, RIGHT, *twins, *words])
    assert (ledger.forks, read_lease(ledger)) == ({}, b"one")


def test_of_two_readmissions_of_one_era_the_last_stands() -> None:
    owner = make_ledger(OWNER)
    words = [readmit(owner, LEFT.tip), readmit(owner, RIGHT.tip)]
    for order in itertools.permutations([COMMON, LEFT, RIGHT, *words]):
        assert read_lease(fill(order)) == b"right"


def test_a_branch_that_nobody_holds_counts_nothing_of_that_era() -> None:
    ledger = fill([COMMON, LEFT, RIGHT, readmit(make_ledger(OWNER), EntryId(b"?" * 32))])
    assert (ledger.forks, read_lease(ledger)) == ({}, None)


def test_a_readmission_names_an_entry_of_its_author_in_its_era() -> None:
    theirs = make_ledger(BEN)
    batch = theirs.write([LEASE], NOW_MS)
    theirs.accept(batch)
    ledger = fill([COMMON, LEFT, RIGHT, batch, readmit(make_ledger(OWNER), batch.tip)])
    assert read_lease(ledger) is None


def test_a_peer_that_was_readmitted_writes_again_in_the_next_era() -> None:
    anna = make_ledger(ANNA)
    for batch in (COMMON, LEFT, RIGHT):
        anna.accept(batch)
    with pytest.raises(ChainForkedError, match="shoal swarm readmit"):
        anna.write([LEASE], NOW_MS)
    anna.accept(readmit(make_ledger(OWNER), LEFT.tip))
    batch = anna.write([LEASE], NOW_MS)
    assert (batch.era, batch.entries[0].seq) == (2, 0)
    assert read_lease(fill([COMMON, LEFT, RIGHT, *anna.accept(batch).accepted])) == b"1", "not without the owner's word"


def test_without_an_owner_only_a_new_identity_helps() -> None:
    anna = make_ledger(ANNA, is_owned=False)
    for batch in (COMMON, LEFT, RIGHT):
        anna.accept(batch)
    with pytest.raises(ChainForkedError, match=r"no owner who could re-admit it") as caught:
        anna.write([LEASE], NOW_MS)
    assert "new identity" in str(caught.value)


@pytest.mark.parametrize("kind", [Kind.BAN, Kind.READMISSION, Kind.ADMISSION])
def test_nobody_but_the_owner_bans_readmits_or_admits(kind: Kind) -> None:
    bodies: dict[Kind, Body] = {
        Kind.BAN: BanBody(peer=BEN.peer, reason="", removes=()),
        Kind.READMISSION: ReadmissionBody(author=ANNA.peer, era=1, stands=LEFT.tip),
        Kind.ADMISSION: AdmissionBody(peers=(ANNA.peer,)),
    }
    content = EntryContent(deps=(), hlc=Hlc(1), kind=kind, body=encode_body(bodies[kind]))
    start = ChainPosition(era=PERMANENT_ERA, seq=0, prev=NO_ENTRY, hlc=HLC_ZERO)
    with pytest.raises(ProtocolError) as caught:
        make_ledger().accept(sign_batch(ANNA, SWARM, start, [content]))
    assert caught.value.refusal is Refusal.NOT_A_MEMBER
    with pytest.raises(ProtocolError):
        sign_batch(OWNER, SWARM, ChainPosition(era=1, seq=0, prev=NO_ENTRY, hlc=HLC_ZERO), [content])


def test_a_banned_authors_entries_do_not_count_until_the_ban_is_lifted() -> None:
    owner = make_ledger(OWNER)
    ban = decree(owner, Kind.BAN, BanBody(peer=ANNA.peer, reason="spam", removes=()))
    for order in itertools.permutations([COMMON, ban]):
        ledger = fill(order)
        assert read_lease(ledger) is None
        (held,) = ledger.fold(NOW_MS).verdicts.bans
        assert (held.peer, held.reason, held.entry) == (ANNA.peer, "spam", ban.tip)
    lifted = decree(owner, Kind.BAN, BanBody(peer=b"", reason="", removes=(ban.tip,)))
    again = decree(owner, Kind.BAN, BanBody(peer=ANNA.peer, reason="spam again", removes=()))
    assert read_lease(fill([COMMON, ban, lifted])) == b"1"
    assert read_lease(fill([COMMON, ban, lifted, again])) is None


def test_an_admission_holds_in_any_order_and_says_nothing_about_entries() -> None:
    owner = make_ledger(OWNER)
    first = decree(owner, Kind.ADMISSION, AdmissionBody(peers=tuple(sorted((ANNA.peer, BEN.peer)))))
    ban = decree(owner, Kind.BAN, BanBody(peer=BEN.peer, reason="", removes=()))
    second = decree(owner, Kind.ADMISSION, AdmissionBody(peers=(OWNER.peer,)))
    for order in itertools.permutations([COMMON, first, ban, second]):
        ledger = fill(order)
        assert ledger.standing.admitted == ledger.fold(NOW_MS).verdicts.admitted == {ANNA.peer, BEN.peer, OWNER.peer}
        assert ledger.standing.banned == {BEN.peer} and read_lease(ledger) == b"1"
        assert ledger.standing.last_decree == second.tip
    assert make_ledger().standing.last_decree is None


def test_an_owner_who_contradicts_itself_admits_nobody_from_there_on() -> None:
    owner, clone = make_ledger(OWNER), make_ledger(OWNER)
    first = decree(owner, Kind.ADMISSION, AdmissionBody(peers=(ANNA.peer,)))
    clone.accept(first)
    said = ((owner, BEN.peer), (clone, OWNER.peer))
    words = [decree(one, Kind.ADMISSION, AdmissionBody(peers=(peer,))) for one, peer in said]
    for order in itertools.permutations([first, *words]):
        assert fill(order).standing.admitted == {ANNA.peer}


@pytest.mark.parametrize(
    "peers",
    [(), (BEN.peer,) * 2, tuple(sorted((ANNA.peer, BEN.peer), reverse=True)), (b"short",), (ANNA.peer,) * 25],
    ids=["nobody", "twice", "descending", "short", "too many"],
)
def test_an_admission_names_peers_once_and_in_order(peers: tuple[PeerId, ...]) -> None:
    with pytest.raises(ProtocolError) as caught:
        decode_body_untrusted(Kind.ADMISSION, msgpack.packb([list(peers)]))
    assert caught.value.refusal is Refusal.OUT_OF_RANGE


def test_an_owner_who_contradicts_itself_is_heard_up_to_there() -> None:
    owner, clone = make_ledger(OWNER), make_ledger(OWNER)
    ban = decree(owner, Kind.BAN, BanBody(peer=ANNA.peer, reason="", removes=()))
    clone.accept(ban)
    lift = decree(owner, Kind.BAN, BanBody(peer=b"", reason="", removes=(ban.tip,)))
    other = decree(clone, Kind.BAN, BanBody(peer=BEN.peer, reason="", removes=()))
    for order in itertools.permutations([COMMON, ban, lift, other]):
        ledger = fill(order)
        assert (dict(ledger.forks), read_lease(ledger)) == ({OWNER.peer: (PERMANENT_ERA, 1)}, None)


def test_an_owner_may_be_a_peer_as_well() -> None:
    owner = make_ledger(OWNER)
    lease = owner.write([LEASE], NOW_MS)
    owner.accept(lease)
    assert lease.era == 1
    ban = decree(owner, Kind.BAN, BanBody(peer=OWNER.peer, reason="", removes=()))
    assert (ban.entries[0].seq, owner.own_slot) == (0, (1, 1))
    # It has banned itself as a peer; its decrees stand.
    state = fill([lease, ban]).fold(NOW_MS)
    assert (state.leases, len(state.verdicts.bans)) == ({}, 1)


def test_tags_of_a_banned_author_are_gone_and_its_removals_too() -> None:
    owner, ben = make_ledger(OWNER), make_ledger(BEN)
    tag = ben.write([Draft(kind=Kind.TAG, body=TagBody(name="best", value=b"", removes=()))], NOW_MS)
    ben.accept(tag)
    removal = ben.write([Draft(kind=Kind.TAG, body=TagBody(name="", value=b"", removes=(tag.tip,)))], NOW_MS)
    ban = decree(owner, Kind.BAN, BanBody(peer=BEN.peer, reason="", removes=()))
    assert fill([tag, removal, ban]).fold(NOW_MS).tags == ()
