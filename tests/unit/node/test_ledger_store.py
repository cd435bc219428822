import random
import signal
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from shoal.crdt.entries import Batch
from shoal.crdt.kinds import Kind, RegisterBody
from shoal.crdt.ledger import Draft, Ledger, LedgerRules
from shoal.node import ledger_store
from shoal.node.ledger_store import LedgerStore, StoredCertificate, StoreError
from shoal.protocol.errors import Failure, ProtocolError, Refusal
from shoal.protocol.identity import Identity

NOW_MS = 1_700_000_000_000
KILL_TRIALS = 20


def make_ledger(number: int = 1) -> Ledger:
    rules = LedgerRules(swarm=b"s" * 32, owner=None, is_valid_snapshot=lambda *_: True)
    return Ledger(identity=Identity(number.to_bytes(32, "big")), rules=rules)


def write(ledger: Ledger, value: bytes = b"lease") -> Batch:
    batch = ledger.write([Draft(kind=Kind.LEASE, body=RegisterBody(value=value))], NOW_MS)
    ledger.accept(batch)
    return batch


def certificate(number: int, digest: bytes = b"d" * 32, body: bytes = b"votes") -> StoredCertificate:
    return StoredCertificate(round=number, result_digest=digest, body=body)


def error_of(path: Path) -> StoreError:
    with pytest.raises(StoreError) as caught:
        LedgerStore.open(path)
    assert str(path) in str(caught.value)
    assert caught.value.fix
    return caught.value


def test_batches_come_back_in_the_order_of_appending(tmp_path: Path) -> None:
    anna, ben = make_ledger(1), make_ledger(2)
    theirs = [write(ben), write(ben)]
    for batch in theirs:
        anna.accept(batch)
    own = write(anna)
    with LedgerStore.open(tmp_path / "ledger.db") as store:
        assert store.load() == ()
        store.append(theirs, own=False)
        store.append([own], own=True)
    with LedgerStore.open(tmp_path / "ledger.db") as store:
        assert store.load() == (*theirs, own)


def test_a_number_of_the_own_chain_is_stored_once(tmp_path: Path) -> None:
    one, clone = make_ledger(1), make_ledger(1)
    with LedgerStore.open(tmp_path / "ledger.db") as store:
        first = write(one)
        store.append([first], own=True)
        with pytest.raises(AssertionError, match="has signed entry 0 before"):
            store.append([write(clone, b"another")], own=True)
        # Nothing of the refused call remains, and the chain goes on.
        second = write(one)
        store.append([second], own=True)
        assert store.load() == (first, second)


def test_an_append_is_all_or_nothing(tmp_path: Path) -> None:
    anna = make_ledger(1)
    first, second = write(anna), write(anna)
    with LedgerStore.open(tmp_path / "ledger.db") as store:
        with pytest.raises(AssertionError):
            store.append([second, first], own=True)
        assert store.load() == ()


def test_records_are_kept_by_namespace_and_replaced(tmp_path: Path) -> None:
    with LedgerStore.open(tmp_path / "ledger.db") as store:
        store.put_record("vote", b"\x01", b"yes")
        store.put_record("vote", b"\x01", b"no")
        store.put_record("plan", b"\x01", b"")
    with LedgerStore.open(tmp_path / "ledger.db") as store:
        assert store.get_record("vote", b"\x01") == b"no"
        assert store.get_record("plan", b"\x01") == b""
        assert store.get_record("vote", b"\x02") is None
        store.delete_record("vote", b"\x01")
        store.delete_record("vote", b"\x01")
        assert store.get_record("vote", b"\x01") is None


def test_certificates_are_found_by_round_by_range_and_last(tmp_path: Path) -> None:
    with LedgerStore.open(tmp_path / "ledger.db") as store:
        assert store.get_last_certificate() is None
        for number in (3, 1, 7):
            store.put_certificate(certificate(number))
        assert store.get_certificate(3) == certificate(3)
        assert store.get_certificate(2) is None
        assert store.list_certificates(1, 7) == (certificate(1), certificate(3))
        assert store.get_last_certificate() == certificate(7)


def test_a_certified_result_never_changes(tmp_path: Path) -> None:
    with LedgerStore.open(tmp_path / "ledger.db") as store:
        store.put_certificate(certificate(1))
        store.put_certificate(certificate(1, body=b"other votes for the same"))
        assert store.get_certificate(1) == certificate(1)
        with pytest.raises(ProtocolError) as caught:
            store.put_certificate(certificate(1, digest=b"e" * 32))
        assert caught.value.refusal is Refusal.EQUIVOCATION
        assert store.get_certificate(1) == certificate(1)
        store.put_certificate(certificate(2))


def test_calls_may_come_from_a_worker_thread(tmp_path: Path) -> None:
    batches = [write(make_ledger(number)) for number in range(1, 31)]
    with LedgerStore.open(tmp_path / "ledger.db") as store, ThreadPoolExecutor(3) as threads:
        for done in [threads.submit(store.append, [batch], own=False) for batch in batches]:
            done.result()
        assert {batch.tip for batch in store.load()} == {batch.tip for batch in batches}


def test_own_entries_wait_for_the_disk_and_others_do_not(tmp_path: Path) -> None:
    with LedgerStore.open(tmp_path / "ledger.db") as store:
        modes = []
        for own, number in ((True, 1), (False, 2), (True, 3)):
            store.append([write(make_ledger(number))], own=own)
            modes.append(store._connection.execute("PRAGMA synchronous").fetchone()[0])
        assert modes == [2, 1, 2]
        assert store._connection.execute("PRAGMA journal_mode").fetchone()[0] == "wal"


def test_a_second_daemon_is_kept_out(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    with LedgerStore.open(path):
        assert error_of(path).failure is Failure.STORE_IN_USE
    LedgerStore.open(path).close()


def test_a_file_that_is_no_database_is_named_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    path.write_bytes(b"this is not a database" * 100)
    assert error_of(path).failure is Failure.STORE_DAMAGED
    assert path.read_bytes() == b"this is not a database" * 100


def test_another_programs_database_is_named_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE bookmarks (url TEXT)")
    other.close()
    before = path.read_bytes()
    assert error_of(path).failure is Failure.STORE_FOREIGN
    assert path.read_bytes() == before


def test_a_damaged_page_is_found_when_the_store_is_opened(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    with LedgerStore.open(path) as store:
        store.append([write(make_ledger(number)) for number in range(1, 60)], own=False)
    damaged = bytearray(path.read_bytes())
    for offset in range(4096, len(damaged), 4096):
        damaged[offset : offset + 64] = bytes(range(64))
    path.write_bytes(damaged)
    assert error_of(path).failure is Failure.STORE_DAMAGED


def test_a_damaged_batch_is_found_when_it_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    with LedgerStore.open(path) as store:
        store.append([write(make_ledger())], own=True)
        store._connection.execute("UPDATE batches SET encoded = x'00'")
        with pytest.raises(StoreError, match="stored batch is damaged") as caught:
            store.load()
    assert caught.value.failure is Failure.STORE_DAMAGED


def test_a_directory_that_does_not_exist_is_named(tmp_path: Path) -> None:
    assert error_of(tmp_path / "absent" / "ledger.db").failure is Failure.STORE_UNUSABLE


def test_a_full_disk_is_told_apart_and_loses_nothing(tmp_path: Path) -> None:
    with LedgerStore.open(tmp_path / "ledger.db") as store:
        store.put_record("vote", b"1", b"yes")
        (pages,) = store._connection.execute("PRAGMA page_count").fetchone()
        store._connection.execute(f"PRAGMA max_page_count={pages}")
        with pytest.raises(StoreError) as caught:
            store.put_record("vote", b"2", bytes(100_000))
        assert caught.value.failure is Failure.DISK_FULL
        assert store.get_record("vote", b"1") == b"yes"
        store._connection.execute(f"PRAGMA max_page_count={pages + 1000}")
        store.put_record("vote", b"2", bytes(100_000))


def test_an_older_file_is_brought_up_to_date_and_a_newer_one_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ledger.db"
    batch = write(make_ledger())
    with LedgerStore.open(path) as store:
        store.append([batch], own=True)
    with monkeypatch.context() as later:
        step = ("CREATE TABLE notes (text TEXT) STRICT", "INSERT INTO notes VALUES ('moved')")
        later.setattr(ledger_store, "MIGRATIONS", (*ledger_store.MIGRATIONS, step))
        for _ in range(2):
            with LedgerStore.open(path) as store:
                assert store.load() == (batch,)
                assert store._connection.execute("SELECT text FROM notes").fetchall() == [("moved",)]
    error = error_of(path)
    assert error.failure is Failure.STORE_FOREIGN
    assert "newer release" in error.fix


def flip(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 0x40
    path.write_bytes(raw)


@pytest.mark.parametrize("piece", [b"what was voted", b"votes of round 5", b"the last lease"])
def test_a_flipped_byte_in_any_row_is_found_when_the_store_is_opened(tmp_path: Path, piece: bytes) -> None:
    path = tmp_path / "ledger.db"
    with LedgerStore.open(path) as store:
        store.append([write(make_ledger(2), b"the last lease")], own=False)
        store.put_certificate(certificate(5, body=b"votes of round 5"))
        store.put_record("round", b"vote", b"what was voted")
    flip(path, path.read_bytes().index(piece) + 2)
    with sqlite3.connect(path) as other:
        assert other.execute("PRAGMA quick_check").fetchone() == ("ok",)  # SQLite itself sees nothing
    other.close()
    error = error_of(path)
    assert error.failure is Failure.STORE_DAMAGED
    assert "1 damaged row" in str(error)


def test_a_database_that_lost_what_was_durable_says_so_until_that_is_provided_for(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    with LedgerStore.open(path) as store:
        store.put_record("round", b"vote", b"the first")
    backup = path.read_bytes()
    with LedgerStore.open(path) as store:
        assert not store.has_forgotten
        store.put_record("round", b"vote", b"the second")
    path.write_bytes(backup)
    for _ in range(2):
        with LedgerStore.open(path) as store:
            assert store.has_forgotten
            store.put_certificate(certificate(1))  # further work does not cover it up
    with LedgerStore.open(path) as store:
        store.accept_loss()
    with LedgerStore.open(path) as store:
        assert not store.has_forgotten
    path.unlink()
    with LedgerStore.open(path) as store:
        assert store.has_forgotten


def test_the_end_of_a_damaged_write_ahead_log_is_missed(tmp_path: Path) -> None:
    path, copy = tmp_path / "ledger.db", tmp_path / "copy" / "ledger.db"
    copy.parent.mkdir()
    with LedgerStore.open(path) as store:
        for number in range(20):
            store.put_record("round", b"vote", b"vote %d" % number)
        # As kill -9 leaves them.
        for file in tmp_path.glob("ledger.*"):
            (copy.parent / file.name).write_bytes(file.read_bytes())
    log = copy.with_name("ledger.db-wal")
    flip(log, len(log.read_bytes()) - 100)
    with LedgerStore.open(copy) as store:
        assert store.get_record("round", b"vote") == b"vote 18"
        assert store.has_forgotten


def test_a_mark_that_is_damaged_or_behind_says_nothing(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    with LedgerStore.open(path) as store:
        store.put_record("round", b"vote", b"yes")
    flip(tmp_path / "ledger.mark", 0)
    with LedgerStore.open(path) as store:
        assert not store.has_forgotten
        store.put_record("round", b"vote", b"no")
    ledger_store.write_mark(path, 1)
    with LedgerStore.open(path) as store:
        assert not store.has_forgotten


# Writes entries for ever and reports each one after it is stored, as a daemon sends after it has persisted.
WRITER = """
import sys
from pathlib import Path
from shoal.crdt.kinds import Kind, RegisterBody
from shoal.crdt.ledger import Draft, Ledger, LedgerRules
from shoal.node.ledger_store import LedgerStore
from shoal.protocol.identity import Identity

rules = LedgerRules(swarm=b"s" * 32, owner=None, is_valid_snapshot=bool)
ledger = Ledger(identity=Identity((1).to_bytes(32, "big")), rules=rules)
with LedgerStore.open(Path(sys.argv[1])) as store:
    ledger.restore(store.load())
    value = sys.argv[2].encode()
    while True:
        batch = ledger.write([Draft(kind=Kind.LEASE, body=RegisterBody(value=value))], 1)
        store.append([batch], own=True)
        ledger.accept(batch)
        sys.stdout.write(f"{batch.entries[-1].seq} {batch.tip.hex()}\\n")
        sys.stdout.flush()
"""


def test_no_number_is_signed_twice_and_nothing_reported_is_lost_after_kill_9(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    source = random.Random(7)
    reported: dict[int, str] = {}
    for trial in range(KILL_TRIALS):
        command = [sys.executable, "-c", WRITER, str(path), f"trial {trial}"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            lines = [writer.stdout.readline() for _ in range(source.randrange(1, 40))]
            writer.send_signal(signal.SIGKILL)
            # What was still in the pipe has been sent, too; its last line may be cut off.
            lines += writer.stdout.read().splitlines(keepends=True)
        for line in lines:
            if line.endswith("\n"):
                seq, entry_id = line.split()
                assert reported.setdefault(int(seq), entry_id) == entry_id
    assert len(reported) >= KILL_TRIALS
    with LedgerStore.open(path) as store:
        ledger = make_ledger(1)
        ledger.restore(store.load())
    assert ledger.forks == {}
    assert ledger.own_slot.seq == len(ledger) >= len(reported)
    assert all(bytes.fromhex(entry_id) in ledger for entry_id in reported.values())
