"""Files of older schema versions: opened, brought up to date, nothing lost; whatever happens in between."""

import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from shoal.node import ledger_store
from shoal.node.ledger_store import MIGRATIONS, LedgerStore, StoredCertificate, StoreError, compute_checksum
from shoal.node.repair import open_ledger
from shoal.protocol.errors import Failure
from tests.unit.protocol.samples import PEERS, SWARM

NEWEST = len(MIGRATIONS)
VERSIONS = range(1, NEWEST + 1)
RECORDS = {("round", b"vote"): b"what was voted", ("ledger", b"x"): b"", ("feedback", b"state"): bytes(5000)}
CERTIFICATES = [
    StoredCertificate(round=number, result_digest=bytes([number]) * 32, body=b"votes %d" % number)
    for number in range(1, 40)
]
ABANDONED = StoredCertificate(round=7, result_digest=b"a" * 32, body=b"of the other log")
ENTRIES_SINCE = 4  # older files have entries that nobody takes any more


def make_file(path: Path, version: int) -> None:
    """As a release with that schema left it, with rows in every table that it has."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.create_function("checksum", -1, compute_checksum, deterministic=True)
        connection.execute("PRAGMA journal_mode=WAL")
        for number, statements in enumerate(MIGRATIONS[:version], 1):
            for statement in statements:
                connection.execute(statement)
            connection.execute(f"PRAGMA application_id={ledger_store.APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version={number}")
        summed = ", checksum(?1, ?2, ?3)" if version >= ledger_store.CHECKSUMS_VERSION else ""
        for one in CERTIFICATES:
            row = one.round, one.result_digest, one.body
            connection.execute(f"INSERT INTO certificates VALUES (?1, ?2, ?3{summed})", row)
        for key, value in RECORDS.items():
            connection.execute(f"INSERT INTO records VALUES (?1, ?2, ?3{summed})", (*key, value))
        if version > 1:
            row = ABANDONED.round, ABANDONED.result_digest, ABANDONED.body
            connection.execute(f"INSERT INTO abandoned VALUES (?1, ?2, ?3{summed})", row)
        if version < ENTRIES_SINCE:
            columns = "author, last_seq, is_own, encoded"
            connection.execute(f"INSERT INTO batches ({columns}) VALUES (?, 3, 1, ?)", (PEERS[0], b"an old entry"))
            if summed:
                connection.execute(f"UPDATE batches SET checksum = checksum({columns})")


def expect_everything(path: Path, version: int) -> None:
    with LedgerStore.open(path) as store:
        assert store.list_certificates(0, 100) == tuple(CERTIFICATES)
        assert {key: store.get_record(*key) for key in RECORDS} == RECORDS
        assert store.load() == (), "entries of before the eras are left behind"
        assert not store.has_forgotten
        found = store._connection.execute("SELECT round, result_digest, body FROM abandoned").fetchall()
        assert found == ([(ABANDONED.round, ABANDONED.result_digest, ABANDONED.body)] if version > 1 else [])
        assert store._connection.execute("PRAGMA user_version").fetchone() == (NEWEST,)
        # It takes what a new file takes.
        store.put_record("round", b"later", b"yes")
        store.put_certificate(StoredCertificate(round=40, result_digest=b"d" * 32, body=b"x"))
        store.abandon_certificates(40)
        store.delete_record("round", b"later")
        store._connection.execute("DELETE FROM abandoned WHERE round = 40")


@pytest.mark.parametrize("version", VERSIONS)
def test_a_file_of_every_earlier_version_is_brought_up_to_date(tmp_path: Path, version: int) -> None:
    path = tmp_path / "ledger.sqlite"
    make_file(path, version)
    expect_everything(path, version)
    expect_everything(path, version)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_daemon_takes_over_an_older_file_as_it_is(tmp_path: Path, version: int) -> None:
    path = tmp_path / "ledger.sqlite"
    make_file(path, version)
    with LedgerStore.open(path) as store:
        store.delete_record("round", b"vote")
    store, repair = open_ledger(path, PEERS[0], SWARM)
    store.close()
    assert repair is None


def test_a_newer_file_is_refused_with_what_to_do_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    make_file(path, NEWEST)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE later (x INTEGER) STRICT")
        connection.execute(f"PRAGMA user_version={NEWEST + 1}")
        connection.commit()
    before = path.read_bytes()
    with pytest.raises(StoreError, match=f"schema version {NEWEST + 1}, this release knows {NEWEST}") as caught:
        open_ledger(path, PEERS[0], SWARM)
    assert caught.value.failure is Failure.STORE_FOREIGN
    assert caught.value.fix == "install the newer release of shoal again"
    assert path.read_bytes() == before


@pytest.mark.parametrize("version", range(1, NEWEST))
def test_a_step_that_is_cut_short_anywhere_is_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int
) -> None:
    later = MIGRATIONS[version:]
    places = [(step, at) for step, statements in enumerate(later) for at in range(len(statements) + 1)]
    for step, at in places:
        path = tmp_path / f"{step}-{at}" / "ledger.sqlite"
        path.parent.mkdir()
        make_file(path, version)
        cut = (*later[step][:at], "SELECT no_such_function()", *later[step][at:])
        with monkeypatch.context() as dying:
            dying.setattr(ledger_store, "MIGRATIONS", (*MIGRATIONS[: version + step], cut, *later[step + 1 :]))
            with pytest.raises(StoreError):
                LedgerStore.open(path)
        expect_everything(path, version)


# Ends without a word within the statement that computes checksums.
KILLED = """
import os, signal, sys
from pathlib import Path
from shoal.node import ledger_store

left = int(sys.argv[2])
real = ledger_store.compute_checksum

def count(*values):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*values)

ledger_store.compute_checksum = count
ledger_store.LedgerStore.open(Path(sys.argv[1]))
"""


@pytest.mark.parametrize("calls", [0, 20, 42])
def test_a_kill_within_a_step_loses_nothing(tmp_path: Path, calls: int) -> None:
    path = tmp_path / "ledger.sqlite"
    make_file(path, 2)
    killed = subprocess.run([sys.executable, "-c", KILLED, str(path), str(calls)], check=False)
    assert killed.returncode == -signal.SIGKILL
    expect_everything(path, 2)
