import itertools
from collections.abc import Callable, Sequence

import pytest

from shoal.crdt.clock import HLC_ZERO, Hlc, hlc_at, wall_ms_of
from shoal.crdt.entries import (
    DEPS_MAX,
    NO_ENTRY,
    Batch,
    ChainPosition,
    EntryContent,
    decode_batch_untrusted,
    encode_batch,
    sign_batch,
)
from shoal.crdt.eras import PERMANENT_ERA
from shoal.crdt.evidence import Evidence, check_evidence
from shoal.crdt.kinds import Body, EntryId, Kind, RegisterBody, RoundBody, TagBody, VersionedBody
from shoal.crdt.ledger import ChainForkedError, Draft, Ledger, LedgerRules
from shoal.protocol.errors import ProtocolError, Refusal
from shoal.protocol.identity import Identity

SWARM = b"s" * 32
OWNER, ANNA, BEN, CARL = (Identity(name * 32) for name in (b"o", b"a", b"b", b"c"))
NOW_MS = 1_700_000_000_000
LEASE = Draft(kind=Kind.LEASE, body=RegisterBody(value=b"lease"))


def make_ledger(
    identity: Identity, is_valid_snapshot: Callable[[int, bytes], bool] = lambda *_: True, bytes_max: int = 2**30
) -> Ledger:
    rules = LedgerRules(swarm=SWARM, owner=OWNER.peer, is_valid_snapshot=is_valid_snapshot)
    return Ledger(identity=identity, rules=rules, bytes_max=bytes_max)


def write(ledger: Ledger, kind: Kind = Kind.LEASE, body: Body = LEASE.body, wall_ms: int = NOW_MS) -> Batch:
    batch = ledger.write([Draft(kind=kind, body=body)], wall_ms)
    assert ledger.accept(batch).accepted == (batch,)
    return batch


def make_chain(identity: Identity, values: Sequence[bytes], start: ChainPosition | None = None) -> Batch:
    position = start or ChainPosition(seq=0, prev=NO_ENTRY, hlc=HLC_ZERO)
    contents = [
        EntryContent(deps=(), hlc=Hlc(position.hlc + index), kind="lease", body=value)
        for index, value in enumerate(values, 1)
    ]
    return sign_batch(identity, SWARM, position, contents)


def after(batch: Batch, count: int) -> ChainPosition:
    last = batch.entries[count - 1]
    return ChainPosition(seq=last.seq + 1, prev=batch.ids[count - 1], hlc=last.hlc)


def refusal_of(ledger: Ledger, batch: Batch) -> Refusal:
    with pytest.raises(ProtocolError) as caught:
        ledger.accept(batch)
    return caught.value.refusal


def test_what_one_writes_another_reads() -> None:
    anna, ben = make_ledger(ANNA), make_ledger(BEN)
    batch = anna.write([LEASE, Draft(kind=Kind.ADDRESSES, body=RegisterBody(value=b"/ip4"))], NOW_MS)
    outcome = ben.accept(decode_batch_untrusted(encode_batch(batch)))
    assert outcome.accepted == (batch,)
    state = ben.fold(NOW_MS)
    assert state.leases[ANNA.peer].value == b"lease"
    assert state.addresses[ANNA.peer].value == b"/ip4"
    assert ben.get(batch.tip) == batch.entries[1]
    assert batch.tip in ben and len(ben) == 2


def test_a_written_batch_is_not_in_the_ledger_until_it_is_accepted() -> None:
    anna = make_ledger(ANNA)
    first, second = anna.write([LEASE], NOW_MS), anna.write([LEASE], NOW_MS)
    assert (len(anna), anna.own_slot.seq) == (0, 2)
    assert second.entries[0].prev == first.tip
    assert anna.accept(second).wanted == (first.tip,)
    assert anna.accept(first).accepted == (first, second)


def test_an_entry_depends_on_the_heads_that_its_author_has_seen() -> None:
    ledger = make_ledger(CARL)
    tips = [write(make_ledger(identity), wall_ms=NOW_MS) for identity in (ANNA, BEN)]
    for batch in tips:
        ledger.accept(batch)
    written = write(ledger)
    assert written.entries[0].deps == tuple(sorted(batch.tip for batch in tips))
    assert ledger.heads == {written.tip}
    assert write(ledger).entries[0].deps == ()


def test_no_more_dependencies_are_named_than_allowed() -> None:
    ledger = make_ledger(CARL)
    others = [make_ledger(Identity(bytes([number]) * 32)) for number in range(1, DEPS_MAX + 3)]
    batches = [write(other, wall_ms=NOW_MS + number) for number, other in enumerate(others)]
    for batch in batches:
        ledger.accept(batch)
    deps = write(ledger, wall_ms=NOW_MS + 100).entries[0].deps
    assert set(deps) == {batch.tip for batch in batches[-DEPS_MAX:]}


def test_known_entries_are_recognized_and_an_overlap_is_cut_off() -> None:
    whole = make_chain(ANNA, [b"0", b"1", b"2"])
    head = make_chain(ANNA, [b"0", b"1"])
    ledger = make_ledger(BEN)
    ledger.accept(head)
    assert ledger.accept(head).is_known
    assert ledger.accept(whole).accepted == (whole.suffix(2),)
    assert ledger.accept(whole).is_known
    for entry_id, proof in zip(whole.ids, (head, head.suffix(1), whole.suffix(2)), strict=True):
        assert ledger.prove(entry_id) == proof


def test_batches_wait_for_their_ancestors_in_any_order() -> None:
    anna, ben = make_ledger(ANNA), make_ledger(BEN)
    batches = []
    for number in range(4):
        writer, reader = (anna, ben) if number % 2 else (ben, anna)
        batches.append(write(writer, wall_ms=NOW_MS + number))
        reader.accept(batches[-1])
    expected = anna.fold(NOW_MS + 9).encode()
    for order in itertools.permutations(batches):
        carl = make_ledger(CARL)
        accepted = [batch for arrived in order for batch in carl.accept(arrived).accepted]
        assert sorted(batch.tip for batch in accepted) == sorted(batch.tip for batch in batches)
        assert [accepted.index(batch) for batch in batches] == [0, 1, 2, 3]
        assert carl.list_wanted() == ()
        assert carl.fold(NOW_MS + 9).encode() == expected


def test_only_what_nobody_has_sent_yet_is_wanted() -> None:
    anna = make_ledger(ANNA)
    first, second, third = (write(anna) for _ in range(3))
    ben = make_ledger(BEN)
    assert ben.accept(third).wanted == (second.tip,)
    assert ben.accept(second).wanted == (first.tip,)
    assert ben.accept(third).wanted == ()
    assert ben.list_wanted() == (first.tip,)


def test_an_entry_from_the_future_is_held_and_counts_when_it_is_due() -> None:
    anna, ben = make_ledger(ANNA), make_ledger(BEN)
    batch = write(anna, wall_ms=NOW_MS + 60_000)
    assert ben.accept(batch).accepted == (batch,)
    assert ben.fold(NOW_MS + 59_999).leases == {}
    assert list(ben.fold(NOW_MS + 60_000).leases) == [ANNA.peer]
    # The fold is a function of the time that it is given, even where clocks run back.
    assert ben.fold(NOW_MS).leases == {}


def test_an_entry_from_the_future_does_not_drag_other_clocks_along() -> None:
    ben = make_ledger(BEN)
    ben.accept(write(make_ledger(ANNA), wall_ms=NOW_MS + 10**9))
    entry = write(ben, wall_ms=NOW_MS).entries[0]
    assert entry.deps == ()
    assert wall_ms_of(entry.hlc) == NOW_MS


def test_own_time_increases_even_when_the_wall_clock_runs_back() -> None:
    anna = make_ledger(ANNA)
    early = anna.write([LEASE, LEASE], NOW_MS)
    late = anna.write([LEASE], NOW_MS - 5000)
    times = [entry.hlc for entry in (*early.entries, *late.entries)]
    assert times == [hlc_at(NOW_MS), hlc_at(NOW_MS, 1), hlc_at(NOW_MS, 2)]


def test_another_swarms_entries_are_refused() -> None:
    start = ChainPosition(seq=0, prev=NO_ENTRY, hlc=HLC_ZERO)
    foreign = sign_batch(ANNA, b"t" * 32, start, [EntryContent(deps=(), hlc=Hlc(1), kind="lease", body=b"")])
    assert refusal_of(make_ledger(BEN), foreign) is Refusal.WRONG_SWARM


def test_a_forged_signature_is_refused_and_leaves_nothing_behind() -> None:
    batch = make_chain(ANNA, [b"0"])
    forged = Batch(entries=batch.entries, ids=batch.ids, signature=bytes(64))
    ledger = make_ledger(BEN)
    assert refusal_of(ledger, forged) is Refusal.BAD_SIGNATURE
    assert len(ledger) == 0


@pytest.mark.parametrize("kind", [Kind.MANIFEST, Kind.REROOT])
def test_only_the_owner_writes_decrees(kind: Kind) -> None:
    body = VersionedBody(version=1, value=b"x")
    ledger = make_ledger(BEN)
    ledger.accept(write(make_ledger(OWNER), kind, body))
    state = ledger.fold(NOW_MS)
    assert (state.manifest if kind is Kind.MANIFEST else state.reroot) is not None
    with pytest.raises(ProtocolError):
        make_ledger(ANNA).write([Draft(kind=kind, body=body)], NOW_MS)
    content = EntryContent(deps=(), hlc=Hlc(1), kind=kind, body=b"\x92\x01\xc4\x00")
    start = ChainPosition(era=PERMANENT_ERA, seq=0, prev=NO_ENTRY, hlc=HLC_ZERO)
    forged = sign_batch(ANNA, SWARM, start, [content])
    assert refusal_of(ledger, forged) is Refusal.NOT_A_MEMBER


def test_a_refused_draft_uses_up_no_sequence_number() -> None:
    anna = make_ledger(ANNA)
    with pytest.raises(ProtocolError):
        anna.write([Draft(kind=Kind.LEASE, body=RegisterBody(value=bytes(2000)))], NOW_MS)
    assert write(anna).entries[0].seq == 0


@pytest.mark.parametrize("fault", ["prev_of_another", "seq_jumps", "time_runs_back", "dep_is_later"])
def test_a_contradiction_with_the_ancestors_is_refused_whenever_they_arrive(fault: str) -> None:
    ancestor = make_chain(ANNA, [b"0"], ChainPosition(seq=0, prev=NO_ENTRY, hlc=Hlc(10)))
    identity = BEN if fault == "prev_of_another" else ANNA
    start = after(ancestor, 1)
    deps: tuple[EntryId, ...] = ()
    hlc = 20
    if fault == "seq_jumps":
        start = ChainPosition(seq=2, prev=start.prev, hlc=start.hlc)
    if fault == "time_runs_back":
        hlc = 11
    if fault == "dep_is_later":
        identity, start, deps, hlc = BEN, ChainPosition(seq=0, prev=NO_ENTRY, hlc=HLC_ZERO), (ancestor.tip,), 11
    bad = sign_batch(identity, SWARM, start, [EntryContent(deps=deps, hlc=Hlc(hlc), kind="lease", body=b"")])
    in_order, reversed_order = make_ledger(CARL), make_ledger(CARL)
    in_order.accept(ancestor)
    assert refusal_of(in_order, bad) is Refusal.MALFORMED
    assert reversed_order.accept(bad).wanted == (ancestor.tip,)
    assert reversed_order.accept(ancestor).accepted == (ancestor,)
    assert len(in_order) == len(reversed_order) == 1
    assert reversed_order.list_wanted() == ()


def test_equivocation_is_proved_and_only_the_common_prefix_counts() -> None:
    common = make_chain(ANNA, [b"0", b"1"])
    left = make_chain(ANNA, [b"left", b"more"], after(common, 2))
    right = make_chain(ANNA, [b"right"], after(common, 2))
    states = []
    for order in itertools.permutations([common, left, right]):
        ledger = make_ledger(BEN)
        for batch in order:
            ledger.accept(batch)
            ledger.fold(NOW_MS)
        assert len(ledger) == 5
        assert ledger.forks == {ANNA.peer: (1, 2)}
        (evidence,) = ledger.list_evidence()
        assert (evidence.author, evidence.slot) == (ANNA.peer, (1, 2))
        assert {evidence.first.ids[0], evidence.second.ids[0]} == {left.ids[0], right.ids[0]}
        check_evidence(evidence)
        states.append(ledger.fold(NOW_MS))
    assert len({state.encode() for state in states}) == 1
    assert states[0].leases[ANNA.peer].value == b"1"
    assert states[0].excluded == {ANNA.peer: (1, 2)}


def test_an_earlier_fork_that_comes_to_light_later_excludes_more() -> None:
    trunk = make_chain(ANNA, [b"0", b"1", b"2"])
    ledger = make_ledger(BEN)
    for batch in (trunk, make_chain(ANNA, [b"two"], after(trunk, 2))):
        ledger.accept(batch)
    assert ledger.fold(NOW_MS).leases[ANNA.peer].value == b"1"
    ledger.accept(make_chain(ANNA, [b"one", b"uno"], after(trunk, 1)))
    assert ledger.fold(NOW_MS).leases[ANNA.peer].value == b"0"
    ledger.accept(make_chain(ANNA, [b"zero"]))
    assert ledger.fold(NOW_MS).leases == {}


def test_honest_entries_that_depend_on_a_fork_still_count() -> None:
    left, right = make_chain(ANNA, [b"left"]), make_chain(ANNA, [b"right"])
    ben, carl = make_ledger(BEN), make_ledger(CARL)
    ben.accept(left)
    carl.accept(right)
    from_ben, from_carl = write(ben), write(carl)
    for batch in (right, from_carl):
        ben.accept(batch)
    for batch in (from_ben, left):
        carl.accept(batch)
    assert ben.fold(NOW_MS).encode() == carl.fold(NOW_MS).encode()
    assert set(ben.fold(NOW_MS).leases) == {BEN.peer, CARL.peer}
    # Nobody builds upon an excluded author's entries any more.
    assert not {left.tip, right.tip} & set(write(ben).entries[0].deps)


def test_evidence_must_be_a_contradiction_and_signed() -> None:
    left, right = make_chain(ANNA, [b"left"]), make_chain(ANNA, [b"right"])
    check_evidence(Evidence(first=left, second=right))
    later = make_chain(ANNA, [b"next"], after(left, 1))
    for second in (left, later, make_chain(BEN, [b"right"])):
        with pytest.raises(ProtocolError):
            check_evidence(Evidence(first=left, second=second))
    forged = Batch(entries=right.entries, ids=right.ids, signature=left.signature)
    with pytest.raises(ProtocolError) as caught:
        check_evidence(Evidence(first=left, second=forged))
    assert caught.value.refusal is Refusal.BAD_SIGNATURE


def test_a_peer_whose_own_chain_has_forked_stops_writing() -> None:
    anna = make_ledger(ANNA)
    write(anna)
    anna.accept(make_chain(ANNA, [b"clone"]))
    with pytest.raises(ChainForkedError, match="new identity"):
        anna.write([LEASE], NOW_MS)


def test_snapshots_are_checked_by_the_predicate_once_each() -> None:
    asked: list[tuple[int, bytes]] = []

    def is_valid(number: int, value: bytes) -> bool:
        asked.append((number, value))
        return value == b"root"

    anna = make_ledger(ANNA, is_valid_snapshot=is_valid)
    for number, value in ((1, b"root"), (2, b"no root"), (1, b"root")):
        write(anna, Kind.SNAPSHOT, RoundBody(round=number, value=value))
    assert anna.fold(NOW_MS + 1).snapshots == {1: (b"root",)}
    anna.accept(make_chain(BEN, [b"left"]))
    anna.accept(make_chain(BEN, [b"right"]))
    assert anna.fold(NOW_MS + 1).snapshots == {1: (b"root",)}
    assert asked == [(1, b"root"), (2, b"no root")]


def test_tags_are_removed_by_their_author_and_the_owner_only() -> None:
    anna, ben, owner = make_ledger(ANNA), make_ledger(BEN), make_ledger(OWNER)
    tagged = [write(anna, Kind.TAG, TagBody(name=name, value=b"", removes=())) for name in ("a", "b", "c")]
    removals = [
        write(ben, Kind.TAG, TagBody(name="", value=b"", removes=tuple(batch.tip for batch in tagged))),
        write(owner, Kind.TAG, TagBody(name="", value=b"", removes=(tagged[1].tip,))),
        write(anna, Kind.TAG, TagBody(name="", value=b"", removes=(tagged[2].tip,))),
    ]
    for batch in removals[:2]:
        anna.accept(batch)
    assert [tag.name for tag in anna.fold(NOW_MS + 1).tags] == ["a"]


def test_a_restored_ledger_goes_on_where_it_was() -> None:
    anna, ben = make_ledger(ANNA), make_ledger(BEN)
    stored = [write(ben), write(anna)]
    anna.accept(stored[0])
    stored.append(write(anna))
    reloaded = make_ledger(ANNA)
    reloaded.restore(stored)
    assert reloaded.fold(NOW_MS + 1).encode() == anna.fold(NOW_MS + 1).encode()
    assert reloaded.write([LEASE], NOW_MS) == anna.write([LEASE], NOW_MS)


def test_a_restored_ledger_signs_no_number_twice_even_if_an_ancestor_was_lost() -> None:
    anna, ben = make_ledger(ANNA), make_ledger(BEN)
    lost = write(ben)
    anna.accept(lost)
    own = write(anna)
    assert own.entries[0].deps == (lost.tip,)
    reloaded = make_ledger(ANNA)
    reloaded.restore([own])
    assert (len(reloaded), reloaded.own_slot.seq, reloaded.list_wanted()) == (0, 1, (lost.tip,))
    next_own = reloaded.write([LEASE], NOW_MS)
    assert (next_own.entries[0].seq, next_own.entries[0].prev) == (1, own.tip)
    reloaded.accept(next_own)
    assert reloaded.accept(lost).accepted == (lost, own, next_own)
    assert reloaded.forks == {}


def test_a_peer_that_lost_its_store_learns_its_own_chain_from_others() -> None:
    anna, ben = make_ledger(ANNA), make_ledger(BEN)
    ben.accept(write(anna))
    ben.accept(write(anna))
    from_ben = write(ben)
    anna.accept(from_ben)
    last = write(anna)
    ben.accept(last)
    reborn = make_ledger(ANNA)
    # The last entry waits for Ben's and is taken out of the buffer; it counts as well.
    for batch in (last, from_ben, *(ben.prove(entry_id) for entry_id in from_ben.entries[0].deps)):
        reborn.accept(batch)
    for entry_id in reborn.list_wanted():
        reborn.accept(ben.prove(entry_id))
    assert (reborn.own_slot.seq, len(reborn)) == (3, 4)


def test_a_damaged_store_does_not_restore() -> None:
    ancestor = make_chain(ANNA, [b"0"])
    jump = make_chain(ANNA, [b"2"], ChainPosition(seq=2, prev=ancestor.tip, hlc=Hlc(9)))
    with pytest.raises(ProtocolError):
        make_ledger(BEN).restore([ancestor, jump])


def test_a_full_ledger_takes_own_entries_only() -> None:
    anna = make_ledger(ANNA, bytes_max=1)
    theirs = make_chain(BEN, [b"0"])
    outcome = anna.accept(theirs)
    assert outcome.is_full and not outcome.accepted
    write(anna)
    assert len(anna) == 1
