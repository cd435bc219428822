"""The store follows the ledger's eras: what was dropped is gone from the disk, what must stay comes back."""

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from shoal.crdt.clock import HLC_ZERO, Hlc
from shoal.crdt.entries import NO_ENTRY, Batch, ChainPosition, EntryContent, sign_batch
from shoal.crdt.kinds import Kind, RegisterBody, RoundBody
from shoal.crdt.ledger import Draft, Ledger, LedgerRules
from shoal.node.ledger_store import MIGRATIONS, LedgerStore, StoreError, compute_checksum, number_slot
from shoal.protocol.errors import Failure
from shoal.protocol.identity import Identity
from shoal.protocol.wire import encode_record
from tests.unit.crdt.certificates import make_authority, make_log

SWARM = b"s" * 32
OWNER, ANNA, LIAR = (Identity(name * 32) for name in (b"o", b"a", b"l"))
NOW_MS = 1_700_000_000_000
ERAS = 12
ROUNDS_PER_ERA = 8
RULES = LedgerRules(
    swarm=SWARM,
    owner=OWNER.peer,
    is_valid_snapshot=lambda *_: True,
    authority=make_authority(SWARM, OWNER.peer),
    founders=(ANNA.peer,),
    rounds_per_era=ROUNDS_PER_ERA,
)
LOG = make_log(SWARM, [ANNA], ERAS * ROUNDS_PER_ERA)


def make_ledger(identity: Identity = ANNA) -> Ledger:
    return Ledger(identity=identity, rules=RULES)


def reload(store: LedgerStore, identity: Identity = ANNA) -> Ledger:
    ledger = make_ledger(identity)
    ledger.restore(store.load(), store.load_base())
    return ledger


def lie(value: bytes) -> Batch:
    start = ChainPosition(era=1, seq=0, prev=NO_ENTRY, hlc=HLC_ZERO)
    return sign_batch(LIAR, SWARM, start, [EntryContent(deps=(), hlc=Hlc(1), kind="lease", body=value)])


def write(ledger: Ledger, store: LedgerStore, draft: Draft) -> None:
    batch = ledger.write([draft], NOW_MS)
    store.append([batch], own=True)
    ledger.accept(batch)


def enter(ledger: Ledger, store: LedgerStore, number: int) -> None:
    body = RoundBody(round=number, value=encode_record(LOG[number - 1]))
    write(ledger, store, Draft(kind=Kind.CERTIFICATE, body=body))
    # Something to fill the disk with.
    for _ in range(3):
        write(ledger, store, Draft(kind=Kind.LEASE, body=RegisterBody(value=bytes(1024))))


def test_the_file_stays_small_and_every_restart_reads_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    sizes: list[int] = []
    ledger = make_ledger()
    for number in range(1, len(LOG) + 1):
        with LedgerStore.open(path) as store:
            if number % 5 == 0:
                again = reload(store)
                assert again.fold(NOW_MS + 9999).encode() == ledger.fold(NOW_MS + 9999).encode()
                assert again.own_slot == ledger.own_slot
                ledger = again
            if number == 3:
                twins = [lie(b"one"), lie(b"other")]
                for batch in twins:
                    ledger.accept(batch)
                store.append(twins, own=False)
            enter(ledger, store, number)
            done = ledger.truncate()
            if done is not None:
                store.truncate(done)
        sizes.append(path.stat().st_size)
    assert (ledger.era, ledger.base.round) == (ERAS, (ERAS - 2) * ROUNDS_PER_ERA)
    assert ledger.forks == {LIAR.peer: (1, 0)}
    assert max(sizes[len(sizes) // 2 :]) <= max(sizes[: len(sizes) // 2])


def test_a_truncation_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = make_ledger()
    with LedgerStore.open(tmp_path / "ledger.db") as store:
        for number in range(1, 2 * ROUNDS_PER_ERA + 2):
            enter(ledger, store, number)
        before = store.load()
        done = ledger.truncate()
        assert done is not None
        with monkeypatch.context() as patched:
            patched.setattr("shoal.node.ledger_store._PUT_RECORD", "no SQL")
            with pytest.raises(StoreError):
                store.truncate(done)
        assert store.load() == before and store.load_base() is None
        store.truncate(done)
        assert len(store.load()) < len(before) and store.load_base() == done.base


def test_what_could_not_be_dropped_on_disk_is_dropped_at_the_next_start(tmp_path: Path) -> None:
    ledger = make_ledger()
    with LedgerStore.open(tmp_path / "ledger.db") as store:
        for number in range(1, 2 * ROUNDS_PER_ERA + 2):
            enter(ledger, store, number)
        again = reload(store)
        done = again.truncate()
        assert done is not None and done == ledger.truncate()


def test_the_own_chain_begins_anew_in_each_era_and_goes_back_in_none(tmp_path: Path) -> None:
    ledger, clone = make_ledger(), make_ledger()
    with LedgerStore.open(tmp_path / "ledger.db") as store:
        for number in range(1, ROUNDS_PER_ERA + 2):
            enter(ledger, store, number)
        assert ledger.own_slot == (2, 4)
        stale = clone.write([Draft(kind=Kind.LEASE, body=RegisterBody(value=b"stale"))], NOW_MS)
        assert number_slot(stale, -1) < number_slot(store.load()[-1], 0)
        with pytest.raises(AssertionError, match="has signed entry 0 before"):
            store.append([stale], own=True)
        # The owner's decrees are in an era of their own.
        owner = make_ledger(OWNER)
        write(owner, store, Draft(kind=Kind.LEASE, body=RegisterBody(value=b"")))
        assert owner.own_slot == (1, 1)


def test_a_file_of_an_earlier_release_is_taken_over_without_its_entries(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.create_function("checksum", -1, compute_checksum, deterministic=True)
        for statements in MIGRATIONS[:3]:
            for statement in statements:
                connection.execute(statement)
        connection.execute("PRAGMA application_id=0x73686F6C")
        connection.execute("PRAGMA user_version=3")
        row = (ANNA.peer, 4, 1, b"an entry without an era")
        connection.execute("INSERT INTO batches VALUES (1, ?1, ?2, ?3, ?4, checksum(?1, ?2, ?3, ?4))", row)
        query = "INSERT INTO certificates VALUES (?1, ?2, ?3, checksum(?1, ?2, ?3))"
        connection.execute(query, (1, b"d" * 32, b"votes"))
    with LedgerStore.open(path) as store:
        assert store.load() == () and store.load_base() is None
        assert store.get_certificate(1) is not None
        enter(reload(store), store, 1)
        assert len(store.load()) == 4


def test_a_damaged_sum_is_named(tmp_path: Path) -> None:
    with LedgerStore.open(tmp_path / "ledger.db") as store:
        store.put_base(RULES.begin_chain())
        assert store.load_base() == RULES.begin_chain()
        store.put_record("ledger", b"base", b"\xc1")
        with pytest.raises(StoreError) as caught:
            store.load_base()
        assert caught.value.failure is Failure.STORE_DAMAGED
