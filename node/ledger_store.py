"""The ledger on disk: one SQLite file with the batches, the certificates and small records that must not be forgotten.

The caller's contract is *persist before send*: an own batch, a vote or a certificate leaves this peer only after the
call that stores it has returned. A peer that sends first and crashes then may sign something else in the same place,
and to others that is equivocation.

What is promised for each call that returned: after the process is killed, everything is there; after a power cut,
everything that was stored with full durability is there, together with all that was stored before it (write-ahead
log, `synchronous=FULL`). Other peers' batches are stored without waiting for the disk: what a power cut takes of them
comes back by reconciliation. Batches are to be appended in the order in which the ledger accepted or wrote them.

What must not be forgotten is guarded twice. Every row carries a checksum, and opening the file checks them all: SQLite
notices torn pages, not flipped bytes within a value, and of a damaged write-ahead log it silently drops the end. So a
small file beside it, the *mark*, counts the fully durable transactions: a database that has fewer has forgotten some.

Invariants: the file belongs to one process at a time, so that two daemons cannot sign with one chain; no own batch is
stored whose sequence numbers are not above all own ones before; a round's certified result never changes, unless a
re-root has parted the log: then what is given up is put aside and kept as long as the log's certificates of that time.
"""

import errno
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from blake3 import blake3

from shoal.crdt.certified import ChainBase, decode_base_untrusted
from shoal.crdt.entries import ENTRIES_PER_ERA_MAX, Batch, decode_batch_untrusted, encode_batch
from shoal.crdt.eras import FIRST_ERA
from shoal.crdt.ledger import Truncation
from shoal.protocol.errors import Failure, ProtocolError, Refusal, ShoalError
from shoal.protocol.identity import short_peer_id

# "shol": marks the file as ours (https://www.sqlite.org/pragma.html#pragma_application_id).
APPLICATION_ID = 0x73686F6C
RECORD_BYTES_MAX = 1024 * 1024

# What leads from each schema version to the next, from the empty file on. Released steps are never changed, only
# added to.
MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """CREATE TABLE batches (
            position INTEGER PRIMARY KEY,
            author BLOB NOT NULL,
            last_seq INTEGER NOT NULL,
            is_own INTEGER NOT NULL,
            encoded BLOB NOT NULL
        ) STRICT""",
        "CREATE UNIQUE INDEX own_chain ON batches (author, last_seq) WHERE is_own",
        """CREATE TABLE certificates (
            round INTEGER PRIMARY KEY,
            result_digest BLOB NOT NULL,
            body BLOB NOT NULL
        ) STRICT""",
        """CREATE TABLE records (
            namespace TEXT NOT NULL,
            key BLOB NOT NULL,
            value BLOB NOT NULL,
            PRIMARY KEY (namespace, key)
        ) STRICT, WITHOUT ROWID""",
    ),
    (
        """CREATE TABLE abandoned (
            round INTEGER NOT NULL,
            result_digest BLOB NOT NULL,
            body BLOB NOT NULL,
            PRIMARY KEY (round, result_digest)
        ) STRICT""",
    ),
    (
        "ALTER TABLE batches ADD COLUMN checksum BLOB",
        "UPDATE batches SET checksum = checksum(author, last_seq, is_own, encoded)",
        "ALTER TABLE certificates ADD COLUMN checksum BLOB",
        "UPDATE certificates SET checksum = checksum(round, result_digest, body)",
        "ALTER TABLE abandoned ADD COLUMN checksum BLOB",
        "UPDATE abandoned SET checksum = checksum(round, result_digest, body)",
        "ALTER TABLE records ADD COLUMN checksum BLOB",
        "UPDATE records SET checksum = checksum(namespace, key, value)",
    ),
    # Entries of version 1 have no era; nobody takes them any more, and the chains begin anew. From here on the column
    # last_seq holds `number_slot`.
    ("DELETE FROM batches",),
    # Of certified rounds whose certificates are not kept: what leads from the manifest to those that are.
    (
        """CREATE TABLE checkpoints (
            round INTEGER PRIMARY KEY,
            body BLOB NOT NULL,
            checksum BLOB NOT NULL
        ) STRICT""",
    ),
)
# What each table's checksum covers.
CHECKSUMS = {
    "batches": "author, last_seq, is_own, encoded",
    "certificates": "round, result_digest, body",
    "abandoned": "round, result_digest, body",
    "checkpoints": "round, body",
    "records": "namespace, key, value",
}
CHECKSUM_BYTES = 16
CHECKSUMS_VERSION = 3  # the first schema that has them
CHECKPOINTS_VERSION = 5
STORE_NAMESPACE = "store"
GENERATION_KEY = b"generation"
MARK_SUFFIX = ".mark"
LEDGER_NAMESPACE = "ledger"
BASE_KEY = b"base"
MARK_UNKNOWN = 2**63 - 1  # more than any database has: whatever is found beside it has forgotten something

_REFETCH = "start the peer: it puts the file aside, keeps what is whole, and fetches the rest from other peers"


class StoreError(ShoalError):
    """The database file cannot be used. `failure` says how, `fix` what a person can do about it."""

    def __init__(self, path: Path, failure: Failure, problem: str, fix: str) -> None:
        super().__init__(f"{path}: {problem}. Fix: {fix}")
        self.path = path
        self.failure = failure
        self.problem = problem
        self.fix = fix


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredCertificate:
    """A certified round: the digest of its result and the certificate's bytes."""

    round: int
    result_digest: bytes
    body: bytes


class LedgerStore:
    """An open store. All calls block; one runs at a time, from whichever thread. Each may raise StoreError."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self._path = path
        self._connection = connection
        self._lock = threading.Lock()
        self._is_full_durability: bool | None = None
        self._generation = _read_generation(connection)
        # Whether transactions that had reached the disk are missing: a backup was put back, or the disk lost them.
        self.has_forgotten = read_mark(path) > self._generation

    @classmethod
    def open(cls, path: Path) -> "LedgerStore":
        """Open or create the store at `path`, bring its schema up to date and check the file for damage."""
        with _explain(path):
            connection = sqlite3.connect(path, timeout=0, isolation_level=None, check_same_thread=False)
        try:
            with _explain(path):
                # Set before the first access, this keeps every other process out until the file is closed.
                connection.execute("PRAGMA locking_mode=EXCLUSIVE")
                version = _read_version(path, connection)
                # Of a new file only: an old one keeps the size that it has reached.
                connection.execute("PRAGMA auto_vacuum=INCREMENTAL")
                connection.execute("PRAGMA journal_mode=WAL")
                connection.create_function("checksum", -1, compute_checksum, deterministic=True)
                _migrate(connection, version)
                _check_rows(path, connection)
                return cls(path, connection)
        except StoreError:
            connection.close()
            raise

    def __enter__(self) -> "LedgerStore":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; no other call may follow."""
        with self._lock, _explain(self._path):
            self._connection.close()

    def load(self) -> tuple[Batch, ...]:
        """All batches in the order in which they were appended: what `Ledger.restore` takes."""
        with self._lock, _explain(self._path):
            rows = self._connection.execute("SELECT encoded FROM batches ORDER BY position").fetchall()
        try:
            return tuple(decode_batch_untrusted(encoded) for (encoded,) in rows)
        except ProtocolError as error:
            problem = f"a stored batch is damaged ({error})"
            raise StoreError(self._path, Failure.STORE_DAMAGED, problem, _REFETCH) from error

    def list_batches(self, after: int, count: int) -> list[tuple[int, bytes]]:
        """Positions and bytes of at most `count` batches after a position, in order."""
        query = "SELECT position, encoded FROM batches WHERE position > ? ORDER BY position LIMIT ?"
        with self._lock, _explain(self._path):
            return self._connection.execute(query, (after, count)).fetchall()

    def append(self, batches: Sequence[Batch], *, own: bool) -> None:
        """Store batches, all or none; of this peer's own chain (`own`) with full durability."""
        rows = [_make_row(batch, own) for batch in batches]
        with self._transaction(is_full=own):
            for batch, row in zip(batches, rows, strict=True):
                if own:
                    self._assert_goes_on(batch)
                self._connection.execute(_PUT_BATCH, row)

    def append_recovered(self, batch: Batch) -> None:
        """Store an own batch that came from another peer, with full durability: as part of the own chain where it goes
        on from what is stored, and otherwise as what anybody wrote."""
        with self._transaction(is_full=True):
            last = self._read_last_own(batch)
            self._connection.execute(_PUT_BATCH, _make_row(batch, last is None or number_slot(batch, 0) > last))

    def truncate(self, truncation: Truncation) -> None:
        """Drop the batches of the eras that the ledger has dropped and put what stays of them in their place, all or
        nothing, with full durability; give the room back to the file system."""
        first, end = (era * ENTRIES_PER_ERA_MAX for era in (FIRST_ERA, truncation.oldest_era))
        rows = [_make_row(batch, False) for batch in truncation.evidence]
        with self._transaction(is_full=True):
            self._connection.execute("DELETE FROM batches WHERE last_seq >= ? AND last_seq < ?", (first, end))
            self._connection.executemany(_PUT_BATCH, rows)
            self._connection.execute(_PUT_RECORD, (LEDGER_NAMESPACE, BASE_KEY, truncation.base.encode()))
        self._give_back_room()

    def _give_back_room(self) -> None:
        with self._lock, _explain(self._path):
            self._connection.execute("PRAGMA incremental_vacuum").fetchall()
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def load_base(self) -> ChainBase | None:
        """What stands for the eras that were dropped, None where none were."""
        raw = self.get_record(LEDGER_NAMESPACE, BASE_KEY)
        try:
            return None if raw is None else decode_base_untrusted(raw)
        except ProtocolError as error:
            problem = f"the stored sum of the certified rounds is damaged ({error})"
            raise StoreError(self._path, Failure.STORE_DAMAGED, problem, _REFETCH) from error

    def put_base(self, base: ChainBase) -> None:
        """Store what the ledger was settled on, with full durability."""
        self.put_record(LEDGER_NAMESPACE, BASE_KEY, base.encode())

    def put_record(self, namespace: str, key: bytes, value: bytes) -> None:
        """Store `value` under `key` with full durability, in place of what stood there."""
        assert len(value) <= RECORD_BYTES_MAX, "records are small"
        with self._transaction(is_full=True):
            self._connection.execute(_PUT_RECORD, (namespace, key, value))

    def get_record(self, namespace: str, key: bytes) -> bytes | None:
        """The value under `key`, or None."""
        row = self._read_one("SELECT value FROM records WHERE namespace = ? AND key = ?", (namespace, key))
        value = None if row is None else row[0]
        assert value is None or isinstance(value, bytes), "a STRICT table"
        return value

    def delete_record(self, namespace: str, key: bytes) -> None:
        """Forget the value under `key`, if there is one."""
        with self._transaction(is_full=True):
            self._connection.execute("DELETE FROM records WHERE namespace = ? AND key = ?", (namespace, key))

    def put_certificate(self, certificate: StoredCertificate) -> None:
        """Store a round's certificate with full durability; one that is there already stays.

        Raises ProtocolError(EQUIVOCATION) if the round is certified with another result: a quorum has voted twice.
        """
        with self._transaction(is_full=True):
            row = self._connection.execute(
                "SELECT result_digest FROM certificates WHERE round = ?", (certificate.round,)
            ).fetchone()
            if row is None:
                values = certificate.round, certificate.result_digest, certificate.body
                self._connection.execute("INSERT INTO certificates VALUES (?1, ?2, ?3, checksum(?1, ?2, ?3))", values)
            elif row != (certificate.result_digest,):
                raise ProtocolError(Refusal.EQUIVOCATION, f"round {certificate.round} is certified with another result")

    def fill(
        self,
        *,
        batches: Iterable[tuple[Batch, bool]],
        certificates: Iterable[StoredCertificate],
        abandoned: Iterable[StoredCertificate],
        checkpoints: Iterable[tuple[int, bytes]],
        records: Mapping[tuple[str, bytes], bytes],
    ) -> None:
        """Put rows of another file into this one, which is empty, all or none; batches with whether they are own ones.

        Of own batches with the same numbers, as a chain that forked has them, the first is the own chain.
        """
        own_slots: dict[int, int] = {}
        with self._transaction(is_full=True):
            for batch, own in batches:
                is_next = own and number_slot(batch, 0) > own_slots.get(batch.era, -1)
                if is_next:
                    own_slots[batch.era] = number_slot(batch, -1)
                self._connection.execute(_PUT_BATCH, _make_row(batch, is_next))
            for table, kept in (("certificates", certificates), ("abandoned", abandoned)):
                rows = [(one.round, one.result_digest, one.body) for one in kept]
                query = f"INSERT OR IGNORE INTO {table} VALUES (?1, ?2, ?3, checksum(?1, ?2, ?3))"
                self._connection.executemany(query, rows)
            self._connection.executemany(_PUT_CHECKPOINT, checkpoints)
            self._connection.executemany(_PUT_RECORD, [(*key, value) for key, value in records.items()])

    def abandon_certificates(self, first: int) -> None:
        """Put the certificates from round `first` on aside, with full durability: another log goes on from there."""
        with self._transaction(is_full=True):
            self._connection.execute(
                "INSERT OR IGNORE INTO abandoned "
                "SELECT round, result_digest, body, checksum FROM certificates WHERE round >= ?",
                (first,),
            )
            self._connection.execute("DELETE FROM certificates WHERE round >= ?", (first,))

    def shorten_log(self, first: int, checkpoints: Iterable[tuple[int, bytes]]) -> None:
        """Drop the certificates before round `first`, also those that were put aside, and keep these checkpoints, by
        round, in place of all others: all or nothing, with full durability. Gives the room back."""
        with self._transaction(is_full=True):
            for table in ("certificates", "abandoned"):
                self._connection.execute(f"DELETE FROM {table} WHERE round < ?", (first,))
            self._connection.execute("DELETE FROM checkpoints")
            self._connection.executemany(_PUT_CHECKPOINT, checkpoints)
        self._give_back_room()

    def list_checkpoints(self, after: int, count: int) -> tuple[bytes, ...]:
        """The bodies of at most `count` checkpoints of the rounds behind this one, in order."""
        query = "SELECT body FROM checkpoints WHERE round > ? ORDER BY round LIMIT ?"
        with self._lock, _explain(self._path):
            return tuple(body for (body,) in self._connection.execute(query, (after, count)))

    def get_first_round(self) -> int | None:
        """The oldest round of which there is a certificate."""
        row = self._read_one("SELECT MIN(round) FROM certificates", ())
        first = None if row is None else row[0]
        assert first is None or isinstance(first, int), "a STRICT table"
        return first

    def list_rounds(self, first: int, end: int) -> list[int]:
        """The rounds from `first` up to but not including `end` of which there is a certificate, in order."""
        with self._lock, _explain(self._path):
            query = "SELECT round FROM certificates WHERE round >= ? AND round < ? ORDER BY round"
            return [number for (number,) in self._connection.execute(query, (first, end))]

    def get_certificate(self, round_number: int) -> StoredCertificate | None:
        """The certificate of this round, or None."""
        return _certificate_of(self._read_one(f"{_SELECT_CERTIFICATES} WHERE round = ?", (round_number,)))

    def get_last_certificate(self) -> StoredCertificate | None:
        """The certificate of the highest certified round, or None."""
        return _certificate_of(self._read_one(f"{_SELECT_CERTIFICATES} ORDER BY round DESC LIMIT 1", ()))

    def list_certificates(self, first: int, end: int) -> tuple[StoredCertificate, ...]:
        """The certificates of the rounds from `first` up to but not including `end`, in order; rounds may be absent."""
        with self._lock, _explain(self._path):
            query = f"{_SELECT_CERTIFICATES} WHERE round >= ? AND round < ? ORDER BY round"
            rows = self._connection.execute(query, (first, end)).fetchall()
        return tuple(certificate for row in rows if (certificate := _certificate_of(row)) is not None)

    def _read_one(self, query: str, values: tuple[object, ...]) -> tuple[object, ...] | None:
        with self._lock, _explain(self._path):
            row: tuple[object, ...] | None = self._connection.execute(query, values).fetchone()
            return row

    def _assert_goes_on(self, batch: Batch) -> None:
        last = self._read_last_own(batch)
        assert last is None or number_slot(batch, 0) > last, (
            f"{short_peer_id(batch.author)} has signed entry {batch.entries[0].seq} before"
        )

    def _read_last_own(self, batch: Batch) -> int | None:
        """The last slot of the own chain of the batch's author in its era."""
        query = "SELECT MAX(last_seq) FROM batches WHERE author = ? AND is_own AND last_seq >= ? AND last_seq < ?"
        first, end = (era * ENTRIES_PER_ERA_MAX for era in (batch.era, batch.era + 1))
        (last,) = self._connection.execute(query, (batch.author, first, end)).fetchone()
        assert last is None or isinstance(last, int), "a STRICT table"
        return last

    @contextmanager
    def _transaction(self, *, is_full: bool) -> Iterator[None]:
        with self._lock, _explain(self._path):
            if self._is_full_durability is not is_full:
                self._connection.execute(f"PRAGMA synchronous={'FULL' if is_full else 'NORMAL'}")
                self._is_full_durability = is_full
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                counts = is_full and not self.has_forgotten  # a database that is behind must not catch up by going on
                if counts:
                    number = (self._generation + 1).to_bytes(8, "big")
                    self._connection.execute(_PUT_RECORD, (STORE_NAMESPACE, GENERATION_KEY, number))
                self._connection.execute("COMMIT")
            finally:
                # After an error SQLite may or may not have rolled back by itself.
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
            if counts:
                self._generation += 1
                write_mark(self._path, self._generation)

    def accept_loss(self) -> None:
        """What was forgotten is known and provided for, durably: from now on the mark follows this database."""
        with self._lock:
            write_mark(self._path, self._generation, durable=True)
            self.has_forgotten = False


def number_slot(batch: Batch, index: int) -> int:
    """The slot of one of the batch's entries as one number, in the order of eras and then of sequence numbers."""
    return batch.era * ENTRIES_PER_ERA_MAX + batch.entries[index].seq


def _make_row(batch: Batch, own: bool) -> tuple[bytes, int, bool, bytes]:
    return batch.author, number_slot(batch, -1), own, encode_batch(batch)


_PUT_BATCH = (
    "INSERT INTO batches (author, last_seq, is_own, encoded, checksum) "
    "VALUES (?1, ?2, ?3, ?4, checksum(?1, ?2, ?3, ?4))"
)
_PUT_CHECKPOINT = "INSERT INTO checkpoints VALUES (?1, ?2, checksum(?1, ?2))"
_PUT_RECORD = "INSERT OR REPLACE INTO records VALUES (?1, ?2, ?3, checksum(?1, ?2, ?3))"
_SELECT_CERTIFICATES = "SELECT round, result_digest, body FROM certificates"


def _certificate_of(row: tuple[object, ...] | None) -> StoredCertificate | None:
    if row is None:
        return None
    number, result_digest, body = row
    assert isinstance(number, int) and isinstance(result_digest, bytes) and isinstance(body, bytes), "a STRICT table"
    return StoredCertificate(round=number, result_digest=result_digest, body=body)


def _read_version(path: Path, connection: sqlite3.Connection) -> int:
    (application_id,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (tables,) = connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
    assert isinstance(version, int)
    is_other = application_id != APPLICATION_ID and bool(application_id or version or tables)
    if (is_other or version > len(MIGRATIONS)) and _list_schema(connection) == _expect_schema():
        # The tables are ours, to the letter: it is the header that is wrong.
        raise StoreError(path, Failure.STORE_DAMAGED, "the header of the database is damaged", _REFETCH)
    if is_other:
        problem = "the file is a database of another program"
        raise StoreError(path, Failure.STORE_FOREIGN, problem, "give the daemon a data directory of its own")
    if version > len(MIGRATIONS):
        problem = f"the file has schema version {version}, this release knows {len(MIGRATIONS)}"
        raise StoreError(path, Failure.STORE_FOREIGN, problem, "install the newer release of shoal again")
    return version


def _list_schema(connection: sqlite3.Connection) -> list[tuple[str, str]]:
    return connection.execute("SELECT name, sql FROM sqlite_master ORDER BY name").fetchall()


def _expect_schema() -> list[tuple[str, str]]:
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as empty:
        empty.create_function("checksum", -1, compute_checksum, deterministic=True)
        _migrate(empty, 0)
        return _list_schema(empty)


def _migrate(connection: sqlite3.Connection, version: int) -> None:
    for target, statements in enumerate(MIGRATIONS[version:], version + 1):
        connection.execute("BEGIN IMMEDIATE")
        for statement in statements:
            connection.execute(statement)
        connection.execute(f"PRAGMA application_id={APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version={target}")
        connection.execute("COMMIT")


def compute_checksum(*values: object) -> bytes:
    """Of one row's values: enough against accidents. Nobody else writes here."""
    hashed = blake3()
    for value in values:
        raw = value if isinstance(value, bytes) else str(value).encode()
        hashed.update(len(raw).to_bytes(8, "big") + raw)
    return hashed.digest(CHECKSUM_BYTES)


def _check_rows(path: Path, connection: sqlite3.Connection) -> None:
    """Raise StoreError where a page or a row is not what was written."""
    faults = connection.execute("PRAGMA quick_check(1)").fetchone()
    if faults != ("ok",):
        raise StoreError(path, Failure.STORE_DAMAGED, f"the database is damaged ({faults[0]})", _REFETCH)
    for table, columns in CHECKSUMS.items():
        query = f"SELECT COUNT(*) FROM {table} WHERE checksum IS NOT checksum({columns})"
        (damaged,) = connection.execute(query).fetchone()
        if damaged:
            problem = f"{damaged} damaged {'row' if damaged == 1 else 'rows'} in the table {table}"
            raise StoreError(path, Failure.STORE_DAMAGED, problem, _REFETCH)


def _read_generation(connection: sqlite3.Connection) -> int:
    query = "SELECT value FROM records WHERE namespace = ? AND key = ?"
    row = connection.execute(query, (STORE_NAMESPACE, GENERATION_KEY)).fetchone()
    return 0 if row is None else int.from_bytes(row[0], "big")


def read_mark(path: Path) -> int:
    """How many fully durable transactions the database at `path` must have; 0 where no mark says so."""
    try:
        raw = path.with_suffix(MARK_SUFFIX).read_bytes()
    except OSError:
        return 0
    return int.from_bytes(raw[:8], "big") if raw[8:] == compute_checksum(raw[:8]) else 0


def write_mark(path: Path, generation: int, *, durable: bool = False) -> None:
    """In place, and as a rule without waiting for the disk: after a power cut the mark may be behind, never ahead."""
    number = generation.to_bytes(8, "big")
    try:
        descriptor = os.open(path.with_suffix(MARK_SUFFIX), os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            os.pwrite(descriptor, number + compute_checksum(number), 0)
            if durable:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        problem = f"the mark beside it cannot be written: {error.strerror}"
        raise StoreError(path, Failure.STORE_UNUSABLE, problem, "check that the directory is writable") from error


@contextmanager
def _explain(path: Path) -> Iterator[None]:
    """Turn SQLite's errors into the one that says what to do."""
    try:
        yield
    except sqlite3.Error as error:
        failure, problem, fix = _EXPLANATIONS.get(_primary_code(error), _UNUSABLE)
        raise StoreError(path, failure, f"{problem} ({error})", fix) from error


_UNUSABLE = (
    Failure.STORE_UNUSABLE,
    "the file cannot be read or written",
    "check that the directory exists and is writable",
)
_EXPLANATIONS = {
    sqlite3.SQLITE_NOTADB: (Failure.STORE_DAMAGED, "the file is not a database or is damaged", _REFETCH),
    sqlite3.SQLITE_CORRUPT: (Failure.STORE_DAMAGED, "the database is damaged", _REFETCH),
    # Tables that lack what our statements name: their definitions are damaged.
    sqlite3.SQLITE_ERROR: (Failure.STORE_DAMAGED, "the database is damaged", _REFETCH),
    sqlite3.SQLITE_BUSY: (Failure.STORE_IN_USE, "another process uses the file", "stop the other daemon first"),
    sqlite3.SQLITE_LOCKED: (Failure.STORE_IN_USE, "another process uses the file", "stop the other daemon first"),
    sqlite3.SQLITE_FULL: (Failure.DISK_FULL, "the disk is full", "free some space"),
}


def classify_failure(error: OSError | StoreError) -> Failure:
    """What a write of this disk failed of."""
    if isinstance(error, StoreError):
        return error.failure
    return Failure.DISK_FULL if error.errno in (errno.ENOSPC, errno.EDQUOT) else Failure.STORE_UNUSABLE


def _primary_code(error: sqlite3.Error) -> int:
    # Extended codes carry the primary one in their lowest byte; errors of the Python module itself have none.
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_MISUSE) & 0xFF
