"""Eras: what is dropped, what stays, and that no fold tells the difference."""

from collections.abc import Iterable, Sequence

import pytest

from shoal.crdt.clock import HLC_ZERO, Hlc
from shoal.crdt.entries import NO_ENTRY, Batch, ChainPosition, EntryContent, sign_batch
from shoal.crdt.eras import ROUNDS_PER_ERA_MIN, choose_rounds_per_era, era_of_round, last_settled_round, oldest_kept
from shoal.crdt.evidence import check_evidence
from shoal.crdt.key_set import KEY_END, KEY_FIRST, id_of_key
from shoal.crdt.kinds import AdmissionBody, BanBody, EntryId, Kind, ReadmissionBody, RegisterBody, RoundBody
from shoal.crdt.ledger import Draft, Ledger, LedgerRules
from shoal.protocol.errors import ProtocolError, Refusal
from shoal.protocol.identity import Identity
from shoal.protocol.messages import (
    PARTS_MAX,
    ROSTER_MAX,
    VOTERS_MAX,
    Certificate,
    Member,
    PartResult,
    Result,
    Vote,
    digest_record,
)
from shoal.protocol.quorum import REROOT_ATTEMPT
from shoal.protocol.wire import encode_record
from tests.unit.crdt.certificates import make_authority, make_log, reroot

SWARM = b"s" * 32
OWNER, ANNA, BEN, LIAR = (Identity(name * 32) for name in (b"o", b"a", b"b", b"l"))
VOTERS = [ANNA, BEN]
NOW_MS = 1_700_000_000_000
ROUNDS_PER_ERA = 4
RULES = LedgerRules(
    swarm=SWARM,
    owner=OWNER.peer,
    is_valid_snapshot=lambda *_: True,
    authority=make_authority(SWARM, OWNER.peer),
    founders=tuple(one.peer for one in VOTERS),
    rounds_per_era=ROUNDS_PER_ERA,
)
LOG = make_log(SWARM, VOTERS, 20)
LEASE = Draft(kind=Kind.LEASE, body=RegisterBody(value=b"lease"))


def make_ledger(identity: Identity = ANNA) -> Ledger:
    return Ledger(identity=identity, rules=RULES)


def enter(ledger: Ledger, certificates: Iterable[Certificate]) -> list[Batch]:
    batches = []
    for certificate in certificates:
        body = RoundBody(round=certificate.result.round, value=encode_record(certificate))
        batches.append(ledger.write([Draft(kind=Kind.CERTIFICATE, body=body)], NOW_MS))
        assert ledger.accept(batches[-1]).accepted
    return batches


def write(ledger: Ledger, draft: Draft = LEASE) -> Batch:
    batch = ledger.write([draft], NOW_MS)
    ledger.accept(batch)
    return batch


def sign(identity: Identity, values: Sequence[bytes], era: int) -> Batch:
    contents = [
        EntryContent(deps=(), hlc=Hlc(index), kind="lease", body=value) for index, value in enumerate(values, 1)
    ]
    return sign_batch(identity, SWARM, ChainPosition(era=era, seq=0, prev=NO_ENTRY, hlc=HLC_ZERO), contents)


def list_ids(ledger: Ledger) -> set[EntryId]:
    return {id_of_key(key) for key in ledger.keys.iterate(KEY_FIRST, KEY_END)}


def copy(source: Ledger, target: Ledger) -> None:
    for entry_id in sorted(list_ids(source)):
        target.accept(source.prove(entry_id))
    # What waited for others came in on the way; what did not is not in it.
    for entry_id in list_ids(source):
        target.accept(source.prove(entry_id))


def test_eras_follow_from_rounds_and_end_with_snapshots() -> None:
    assert [era_of_round(number, 4) for number in (0, 1, 4, 5, 8, 9)] == [1, 1, 1, 2, 2, 3]
    assert [oldest_kept(era) for era in (1, 2, 3, 4)] == [1, 1, 2, 3]
    assert [last_settled_round(era, 4) for era in (1, 2, 3, 4)] == [0, 0, 4, 8]
    for snapshot_every in (1, 8, 7, 10_000):
        rounds = choose_rounds_per_era(snapshot_every)
        assert rounds % snapshot_every == 0 and rounds >= ROUNDS_PER_ERA_MIN
        assert rounds < ROUNDS_PER_ERA_MIN + snapshot_every


def test_an_author_begins_anew_in_each_era() -> None:
    anna = make_ledger()
    slots = [(batch.era, batch.entries[0].seq) for batch in enter(anna, LOG[:10])]
    # The first round of an era is entered in that era, which it opens.
    assert slots == [(1, 0), (1, 1), (1, 2), (1, 3), (2, 0), (2, 1), (2, 2), (2, 3), (3, 0), (3, 1)]
    assert (anna.era, anna.own_slot) == (3, (3, 2))


def test_truncation_drops_whole_eras_and_changes_no_fold() -> None:
    anna = make_ledger()
    write(anna)
    enter(anna, LOG[:8])
    assert anna.truncate() is None
    enter(anna, LOG[8:10])
    before = anna.fold(NOW_MS + 1000).encode()
    done = anna.truncate()
    assert done is not None and (done.oldest_era, done.base.round, done.evidence) == (2, 4, ())
    assert anna.fold(NOW_MS + 1000).encode() == before
    assert len(anna) == len(list_ids(anna)) == 6
    assert anna.truncate() is None
    state = anna.fold(NOW_MS + 1000)
    assert sorted(state.certificates) == [5, 6, 7, 8, 9, 10]
    assert state.credit[BEN.peer].rounds == 10
    assert state.leases == {}, "the lease of era 1 was not renewed"


def test_replicas_that_truncate_at_different_times_are_equal() -> None:
    eager, lazy, never = (make_ledger() for _ in range(3))
    writer = make_ledger(BEN)
    for certificate in LOG:
        batches = [write(writer), *enter(writer, [certificate])]
        for ledger in (eager, lazy, never):
            for batch in batches:
                ledger.accept(batch)
        eager.truncate()
        if certificate.result.round % 7 == 0:
            lazy.truncate()
        assert len({ledger.fold(NOW_MS + 1000).encode() for ledger in (eager, lazy, never)}) == 1
    lazy.truncate()
    assert list_ids(eager) == list_ids(lazy) < list_ids(never)
    never.truncate()
    assert list_ids(eager) == list_ids(never)
    assert eager.base == lazy.base == never.base and eager.base.round == 12


def test_what_a_restart_reads_is_what_was_there() -> None:
    anna = make_ledger()
    stored = enter(anna, LOG[:12])
    done = anna.truncate()
    assert done is not None
    kept = [batch for batch in stored if batch.era >= done.oldest_era]
    reloaded = make_ledger()
    reloaded.restore([*kept, *done.evidence], done.base)
    assert reloaded.fold(NOW_MS + 1000).encode() == anna.fold(NOW_MS + 1000).encode()
    assert reloaded.own_slot == anna.own_slot
    assert reloaded.truncate() is None


def test_a_joiner_starts_from_a_truncated_replica_and_its_own_log() -> None:
    anna = make_ledger()
    enter(anna, LOG[:18])
    anna.truncate()
    joiner = make_ledger(LIAR)
    copy(anna, joiner)
    assert len(joiner) == 0, "eras so far ahead come when the rounds before them are known"
    joiner.settle(anna.base)
    copy(anna, joiner)
    assert joiner.fold(NOW_MS + 1000).encode() == anna.fold(NOW_MS + 1000).encode()
    assert list_ids(joiner) == list_ids(anna)
    assert joiner.truncate() is not None
    assert write(joiner).era == 5


def test_entries_of_dropped_and_of_far_eras_are_left_out() -> None:
    anna = make_ledger()
    enter(anna, LOG[:13])
    anna.truncate()
    assert anna.era == 4
    assert anna.accept(sign(BEN, [b"late"], 2)).is_expired
    assert anna.accept(sign(BEN, [b"just in time"], 3)).accepted
    assert anna.accept(sign(BEN, [b"ahead"], 5)).accepted
    assert anna.accept(sign(BEN, [b"far ahead"], 6)).is_early


def test_the_owners_decrees_are_never_dropped() -> None:
    anna, owner = make_ledger(), make_ledger(OWNER)
    ban = write(owner, Draft(kind=Kind.BAN, body=BanBody(peer=BEN.peer, reason="spam", removes=())))
    anna.accept(ban)
    anna.accept(write(owner, Draft(kind=Kind.ADMISSION, body=AdmissionBody(peers=(BEN.peer,)))))
    enter(anna, LOG)
    done = anna.truncate()
    assert done is not None and ban.tip in anna
    assert anna.standing.admitted == {BEN.peer} == anna.fold(NOW_MS).verdicts.admitted
    anna.accept(sign(BEN, [b"lease"], 5))
    state = anna.fold(NOW_MS)
    assert len(state.verdicts.bans) == 1 and BEN.peer not in state.leases
    assert state.credit[BEN.peer].rounds == 20, "credit is not the owner's to take"


def test_evidence_outlives_its_era_and_reaches_those_who_never_saw_it() -> None:
    anna, late = make_ledger(), make_ledger(BEN)
    twins = [sign(LIAR, [value, b"more"], 1) for value in (b"one", b"other")]
    for batch in twins:
        anna.accept(batch)
    for batch in enter(anna, LOG[:9]):
        late.accept(batch)
    before = anna.fold(NOW_MS + 1000).encode()
    done = anna.truncate()
    assert done is not None and {batch.ids[0] for batch in done.evidence} == {batch.ids[0] for batch in twins}
    assert anna.fold(NOW_MS + 1000).encode() == before
    (evidence,) = anna.list_evidence()
    check_evidence(evidence)
    late.truncate()
    copy(anna, late)
    assert late.forks == anna.forks == {LIAR.peer: (1, 0)}
    assert list_ids(late) == list_ids(anna)
    reloaded = make_ledger()
    reloaded.restore(done.evidence, done.base)
    assert reloaded.forks == anna.forks
    # Nothing of such an author counts in any later era.
    late.accept(sign(LIAR, [b"new"], 3))
    assert LIAR.peer not in late.fold(NOW_MS).leases


def test_one_entry_of_a_dropped_era_proves_nothing_and_is_not_kept() -> None:
    anna = make_ledger()
    enter(anna, LOG[:9])
    anna.truncate()
    one, other = (sign(LIAR, [value], 1) for value in (b"one", b"other"))
    assert anna.accept(one).is_expired and anna.accept(one).is_expired
    assert (len(list_ids(anna)), one.tip in anna) == (len(anna), False)
    assert len(anna.accept(other).accepted) == 2
    assert one.tip in anna and other.tip in anna


def test_a_readmission_clears_the_shelf() -> None:
    anna, owner = make_ledger(), make_ledger(OWNER)
    twins = [sign(LIAR, [value], 1) for value in (b"one", b"other")]
    for batch in twins:
        anna.accept(batch)
    enter(anna, LOG[:9])
    anna.truncate()
    body = ReadmissionBody(author=LIAR.peer, era=1, stands=twins[0].tip)
    anna.accept(write(owner, Draft(kind=Kind.READMISSION, body=body)))
    assert anna.forks == {} and not {batch.tip for batch in twins} & list_ids(anna)
    for batch in twins:
        assert anna.accept(batch).is_expired
    assert anna.forks == {}


def test_a_certificate_is_entered_no_earlier_than_in_its_rounds_era() -> None:
    body = RoundBody(round=5, value=encode_record(LOG[4]))
    content = EntryContent(deps=(), hlc=Hlc(1), kind=Kind.CERTIFICATE, body=encode_record(body))
    early = sign_batch(BEN, SWARM, ChainPosition(seq=0, prev=NO_ENTRY, hlc=HLC_ZERO), [content])
    with pytest.raises(ProtocolError) as caught:
        make_ledger().accept(early)
    assert caught.value.refusal is Refusal.MALFORMED


def test_entries_depend_on_their_own_era_alone() -> None:
    anna = make_ledger()
    old = sign(BEN, [b"old"], 1)
    anna.accept(old)
    content = EntryContent(deps=(old.tip,), hlc=Hlc(99), kind="lease", body=b"")
    start = ChainPosition(era=2, seq=0, prev=NO_ENTRY, hlc=HLC_ZERO)
    with pytest.raises(ProtocolError) as caught:
        anna.accept(sign_batch(LIAR, SWARM, start, [content]))
    assert caught.value.refusal is Refusal.MALFORMED
    previous = ChainPosition(era=2, seq=1, prev=old.tip, hlc=old.entries[0].hlc)
    with pytest.raises(ProtocolError):
        anna.accept(sign_batch(BEN, SWARM, previous, [EntryContent(deps=(), hlc=Hlc(99), kind="lease", body=b"")]))


def test_a_ledger_may_be_settled_on_another_log() -> None:
    anna = make_ledger()
    enter(anna, LOG[:9])
    anna.truncate()
    parting = digest_record(LOG[1].result)
    new_voters = reroot(SWARM, 3, parting, [LIAR], OWNER)
    other = [*LOG[:2], new_voters]
    other += make_log(SWARM, [LIAR], 5, previous=digest_record(new_voters.result), first=4, tokens=1000)
    fresh = make_ledger(BEN)
    batches = enter(fresh, other)
    for batch in batches:
        anna.accept(batch)
    assert anna.fold(NOW_MS).verdicts.head.digest == digest_record(LOG[8].result), "it parted before the base"
    for batch in batches[:4]:
        fresh.accept(batch)
    base = make_ledger().base
    anna.settle(base)
    assert anna.fold(NOW_MS).verdicts.head.round == 0
    assert anna.era == 3, "it never falls"
    for batch in batches:
        anna.accept(batch)


def test_the_largest_certificate_fits_an_entry() -> None:
    member = Member(peer=ANNA.peer, contribution_root=bytes(32), tokens=2**63 - 1, steps=2**63 - 1, weight=0.1)
    part = PartResult(digest=bytes(32), contributors=b"\xff" * (ROSTER_MAX // 8))
    vote = Vote(voter=ANNA.peer, round=ROUNDS_PER_ERA, attempt=REROOT_ATTEMPT, result_digest=bytes(32))
    result = Result(
        round=ROUNDS_PER_ERA,
        previous=bytes(32),
        base_root=bytes(32),
        codec="x" * 64,
        members=(member,) * ROSTER_MAX,
        parts=(part,) * PARTS_MAX,
        voters=(ANNA.peer,) * VOTERS_MAX,
    )
    certificate = Certificate(result=result, attempt=REROOT_ATTEMPT, votes=(vote,) * VOTERS_MAX)
    anna = make_ledger()
    body = RoundBody(round=ROUNDS_PER_ERA, value=encode_record(certificate))
    assert write(anna, Draft(kind=Kind.CERTIFICATE, body=body)).tip in anna
