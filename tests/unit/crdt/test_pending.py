from shoal.crdt.clock import HLC_ZERO, Hlc
from shoal.crdt.entries import NO_ENTRY, Batch, ChainPosition, EntryContent, measure_batch_bytes, sign_batch
from shoal.crdt.kinds import EntryId
from shoal.crdt.pending import PendingBatches
from shoal.protocol.identity import Identity

SWARM = b"s" * 32
FIRST, SECOND = EntryId(b"1" * 32), EntryId(b"2" * 32)


def make_batch(number: int, count: int = 1) -> Batch:
    contents = [EntryContent(deps=(), hlc=Hlc(1 + index), kind="lease", body=b"x") for index in range(count)]
    identity = Identity(number.to_bytes(32, "big"))
    return sign_batch(identity, SWARM, ChainPosition(seq=0, prev=NO_ENTRY, hlc=HLC_ZERO), contents)


def test_a_batch_is_given_back_once_when_something_it_waits_for_arrives() -> None:
    pending = PendingBatches()
    batch = make_batch(1)
    pending.add(batch, {FIRST, SECOND})
    assert pending.list_wanted() == (FIRST, SECOND)
    assert pending.take(SECOND) == (batch,)
    assert pending.take(FIRST) == ()
    assert (len(pending), pending.list_wanted()) == (0, ())


def test_what_waits_here_itself_is_not_wanted() -> None:
    pending = PendingBatches()
    earlier, later = make_batch(1), make_batch(2)
    pending.add(later, {earlier.tip})
    assert pending.list_wanted() == (earlier.tip,)
    pending.add(earlier, {FIRST})
    assert pending.list_wanted() == (FIRST,)
    assert pending.take(FIRST) == (earlier,)
    assert pending.list_wanted() == (earlier.tip,)


def test_the_oldest_batches_give_way_to_new_ones() -> None:
    batches = [make_batch(number) for number in range(1, 5)]
    by_count = PendingBatches(batches_max=2)
    by_bytes = PendingBatches(bytes_max=2 * measure_batch_bytes(batches[0]))
    for pending in (by_count, by_bytes):
        for batch in batches:
            pending.add(batch, {FIRST})
        assert len(pending) == 2
        assert set(pending.take(FIRST)) == set(batches[2:])


def test_a_suffix_does_not_take_the_place_of_the_whole_batch() -> None:
    pending = PendingBatches()
    whole = make_batch(1, count=3)
    pending.add(whole.suffix(2), {whole.ids[1]})
    pending.add(whole, {FIRST})
    pending.add(whole.suffix(1), {whole.ids[0]})
    assert len(pending) == 1
    assert pending.take(FIRST) == (whole,)
