"""At start: a ledger file that is damaged, lost, or older than what this peer has signed.

It is never trusted and never a reason to stop. A damaged file is put aside, under a bounded number of names, for people
to look at; the rows that are whole go into a new one (batches by their signatures, certificates by their digests and by
the chain that they form); everything else comes from other peers, as it does for a newcomer.

What no other peer can give back is this peer's memory of what it has signed and contributed. Where that may be lost, a
record says so until the round core has found that it can do no harm (protocol.abstention): until then the peer votes
for nothing. What is remembered of contributions is dropped (node.feedback).

Invariants: while a repair is under way the mark says that whatever database is found has forgotten something, so that
a crash at any point leads to a repair or to abstaining, never to trust; the record that this peer abstains is durable
before the mark is lowered.
"""

import logging
import shutil
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from shoal.crdt.entries import Batch, decode_batch_untrusted, verify_batch
from shoal.node.durability import sync_path
from shoal.node.feedback import forget_contributions
from shoal.node.ledger_store import (
    CHECKPOINTS_VERSION,
    CHECKSUMS,
    CHECKSUMS_VERSION,
    GENERATION_KEY,
    MARK_UNKNOWN,
    STORE_NAMESPACE,
    LedgerStore,
    StoredCertificate,
    StoreError,
    compute_checksum,
    read_mark,
    write_mark,
)
from shoal.node.local_state import VOTE_KEY, VOTE_NAMESPACE
from shoal.protocol.effects import VoteRecord
from shoal.protocol.errors import Failure, ProtocolError
from shoal.protocol.identity import PeerId
from shoal.protocol.messages import Certificate, digest_record, verify_message
from shoal.protocol.wire import DELTA_BYTES_MAX, decode_record_untrusted

DAMAGED_KEPT_MAX = 3  # so many damaged files are kept, the newest as number 1
ABSTENTION_KEY = b"abstention"

log = logging.getLogger("shoal")


@dataclass(frozen=True, slots=True, kw_only=True)
class Repair:
    """What was found at start and done about it, in words for people."""

    failure: Failure
    text: str


@dataclass(slots=True)
class Salvage:
    """The rows of a damaged file that are whole. `votes_whole`: the vote record is among them and is the newest one."""

    batches: list[Batch] = field(default_factory=list)
    certificates: dict[int, StoredCertificate] = field(default_factory=dict)
    abandoned: list[StoredCertificate] = field(default_factory=list)
    checkpoints: list[tuple[int, bytes]] = field(default_factory=list)
    records: dict[tuple[str, bytes], bytes] = field(default_factory=dict)
    votes_whole: bool = False


def open_ledger(path: Path, me: PeerId, swarm: bytes) -> tuple[LedgerStore, Repair | None]:
    """The store at `path`, mended if need be. Raises StoreError for what only a person can mend: no space, no rights,
    another program's file, another process that has it open."""
    _remove_leftovers(path)
    with ExitStack() as stack:
        try:
            store = stack.enter_context(LedgerStore.open(path))
        except StoreError as error:
            if error.failure is not Failure.STORE_DAMAGED:
                raise
            return _rebuild(path, me, swarm, error)
        found = _provide(store, path)
        stack.pop_all()  # it stays open
        return store, found


def abstains(store: LedgerStore) -> bool:
    """Whether this peer has forgotten what it signed, and signs nothing for now."""
    return store.get_record(VOTE_NAMESPACE, ABSTENTION_KEY) is not None


def begin_abstention(store: LedgerStore) -> None:
    """Durable on return."""
    store.put_record(VOTE_NAMESPACE, ABSTENTION_KEY, b"1")


def end_abstention(store: LedgerStore) -> None:
    """What was forgotten can do no harm any more."""
    store.delete_record(VOTE_NAMESPACE, ABSTENTION_KEY)


def _provide(store: LedgerStore, path: Path) -> Repair | None:
    """For a file that is whole, and may be too old."""
    if store.has_forgotten:
        begin_abstention(store)
        forget_contributions(store)
        store.accept_loss()
        text = (
            f"{Failure.STORE_BEHIND}: {path} is older than what was stored last: it was lost or put back from a "
            "backup, or the disk lost writes; this peer does not vote until that can do no harm"
        )
        return Repair(failure=Failure.STORE_BEHIND, text=text)
    raw = store.get_record(VOTE_NAMESPACE, VOTE_KEY)
    try:
        if raw is not None:
            decode_record_untrusted(VoteRecord, raw, DELTA_BYTES_MAX)
    except ProtocolError as error:
        begin_abstention(store)
        store.delete_record(VOTE_NAMESPACE, VOTE_KEY)
        text = f"{Failure.STORE_BEHIND}: the vote record is of no form that this release knows ({error})"
        return Repair(failure=Failure.STORE_BEHIND, text=text)
    return None


# -- a damaged file ----------------------------------------------------------------------------------------------------


def _rebuild(path: Path, me: PeerId, swarm: bytes, error: StoreError) -> tuple[LedgerStore, Repair]:
    log.warning("%s; keeping what is whole", error)
    try:
        generation = read_mark(path)
        write_mark(path, MARK_UNKNOWN, durable=True)
        kept = _put_aside(path)
        salvage = _salvage(path, swarm, generation)
        _write_anew(path, me, salvage)
    except OSError as failed:
        problem = f"the file is damaged and cannot be put aside: {failed}"
        raise StoreError(path, Failure.STORE_UNUSABLE, problem, "make space, check the rights, start again") from failed
    with ExitStack() as stack:
        store = stack.enter_context(LedgerStore.open(path))
        if not salvage.votes_whole:
            begin_abstention(store)
            forget_contributions(store)
        store.accept_loss()
        stack.pop_all()
    entries = sum(len(batch.entries) for batch in salvage.batches)
    votes = "the vote record is whole" if salvage.votes_whole else "this peer does not vote until that can do no harm"
    text = (
        f"{error.failure}: {error.problem}; {path.name} is kept as {kept.name}, {entries} entries and "
        f"{len(salvage.certificates)} certificates of it are whole, the rest comes from other peers; {votes}"
    )
    return store, Repair(failure=error.failure, text=text)


def damaged_path(path: Path, number: int) -> Path:
    """Where the newest damaged file but `number - 1` is kept."""
    return path.with_name(f"{path.stem}.damaged-{number}{path.suffix}")


def _put_aside(path: Path) -> Path:
    """Copy the file and its log to the first of the kept names, under which the others move up."""
    for number in range(DAMAGED_KEPT_MAX, 1, -1):
        for suffix in ("", "-wal"):
            younger = Path(f"{damaged_path(path, number - 1)}{suffix}")
            older = Path(f"{damaged_path(path, number)}{suffix}")
            older.unlink(missing_ok=True)
            if younger.exists():
                younger.rename(older)
    for suffix in ("", "-wal"):
        source, target = Path(f"{path}{suffix}"), Path(f"{damaged_path(path, 1)}{suffix}")
        if source.exists():
            shutil.copyfile(source, target)
    return damaged_path(path, 1)


def _write_anew(path: Path, me: PeerId, salvage: Salvage) -> None:
    """Replace the file by a new one with these rows. A crash leaves the old one, or the new one."""
    fresh = _fresh_path(path)
    with LedgerStore.open(fresh) as store:
        store.fill(
            batches=[(batch, batch.author == me) for batch in salvage.batches],
            certificates=[salvage.certificates[number] for number in sorted(salvage.certificates)],
            abandoned=salvage.abandoned,
            checkpoints=salvage.checkpoints,
            records=salvage.records,
        )
    fresh.with_suffix(".mark").unlink(missing_ok=True)
    sync_path(fresh)
    # The old log must not be replayed into the new file.
    Path(f"{path}-wal").unlink(missing_ok=True)
    fresh.replace(path)
    sync_path(path.parent)


def _fresh_path(path: Path) -> Path:
    return path.with_name(f"{path.stem}.fresh{path.suffix}")


def _copy_path(path: Path) -> Path:
    return path.with_name(f"{path.stem}.salvaged{path.suffix}")


def _remove_leftovers(path: Path) -> None:
    """What a repair that was cut short left behind."""
    for base in (_fresh_path(path), _copy_path(path)):
        for leftover in (base, Path(f"{base}-wal"), Path(f"{base}-shm"), base.with_suffix(".mark")):
            leftover.unlink(missing_ok=True)


# -- row by row --------------------------------------------------------------------------------------------------------


def _salvage(path: Path, swarm: bytes, generation: int) -> Salvage:
    """The rows that are whole, read from a copy: SQLite may change what it opens."""
    copy = _copy_path(path)
    for suffix in ("", "-wal"):
        if Path(f"{path}{suffix}").exists():
            shutil.copyfile(f"{path}{suffix}", f"{copy}{suffix}")
    connection = sqlite3.connect(copy, isolation_level=None)
    try:
        return _read_rows(connection, swarm, generation)
    except sqlite3.Error as error:
        log.warning("nothing of %s can be read: %s", path, error)
        return Salvage()
    finally:
        connection.close()
        _remove_leftovers(path)


def _read_rows(connection: sqlite3.Connection, swarm: bytes, generation: int) -> Salvage:
    connection.create_function("checksum", -1, compute_checksum, deterministic=True)
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    salvage = Salvage()
    for (raw,) in _walk(connection, "SELECT position, encoded FROM batches NOT INDEXED", "position"):
        batch = _check_batch(raw)
        if batch is not None:
            salvage.batches.append(batch)
    has_checksums = version >= CHECKSUMS_VERSION
    whole = f"checksum IS checksum({CHECKSUMS['certificates']})" if has_checksums else "FALSE"
    found: dict[int, tuple[Certificate, StoredCertificate]] = {}
    for row in _walk(connection, f"SELECT round, round, result_digest, body, {whole} FROM certificates", "round"):
        checked = _check_certificate(row, swarm)
        if checked is not None:
            found[checked[1].round] = checked
    salvage.certificates = _follow_chain(found)
    if version > 1:
        for row in _walk(connection, f"SELECT rowid, round, result_digest, body, {whole} FROM abandoned", "rowid"):
            checked = _check_certificate(row, swarm)
            if checked is not None:
                salvage.abandoned.append(checked[1])
    if version >= CHECKPOINTS_VERSION:
        query = f"SELECT round, round, body FROM checkpoints WHERE checksum IS checksum({CHECKSUMS['checkpoints']})"
        for number, body in _walk(connection, query, "round"):
            assert isinstance(number, int) and isinstance(body, bytes), "checksums hold"
            salvage.checkpoints.append((number, body))
    if has_checksums:
        _read_records(connection, salvage, generation)
    return salvage


def _read_records(connection: sqlite3.Connection, salvage: Salvage, generation: int) -> None:
    whole = f"checksum IS checksum({CHECKSUMS['records']})"
    query = f"SELECT namespace || '/' || hex(key), namespace, key, value FROM records WHERE {whole}"
    for namespace, key, value in _walk(connection, query, "namespace, key"):
        assert isinstance(namespace, str) and isinstance(key, bytes) and isinstance(value, bytes), "checksums hold"
        salvage.records[namespace, key] = value
    counted = int.from_bytes(salvage.records.pop((STORE_NAMESPACE, GENERATION_KEY), b""), "big")
    vote = VOTE_NAMESPACE, VOTE_KEY
    if not _is_vote(salvage.records.get(vote)):
        salvage.records.pop(vote, None)
    salvage.votes_whole = vote in salvage.records and 0 < generation == counted


def _walk(connection: sqlite3.Connection, query: str, order: str) -> Iterator[tuple[object, ...]]:
    """The rows of a query from its beginning to the first page that is broken, and from its end to the last one. The
    first column is what tells rows apart."""
    seen: set[object] = set()
    rows: list[tuple[object, ...]] = []
    tail: list[tuple[object, ...]] = []
    for kept, direction in ((rows, ""), (tail, "DESC")):
        descending = ", ".join(f"{column} {direction}" for column in order.split(", "))
        try:
            for key, *values in connection.execute(f"{query} ORDER BY {descending}"):
                if key in seen:
                    break
                seen.add(key)
                kept.append(tuple(values))
        except (sqlite3.Error, OverflowError, UnicodeDecodeError) as error:
            log.warning("a part of the damaged ledger cannot be read: %s", error)
    yield from rows
    yield from reversed(tail)


def _check_batch(raw: object) -> Batch | None:
    try:
        if not isinstance(raw, bytes):
            return None
        batch = decode_batch_untrusted(raw)
        verify_batch(batch)
    except ProtocolError:
        return None
    return batch


def _check_certificate(row: tuple[object, ...], swarm: bytes) -> tuple[Certificate, StoredCertificate] | None:
    """A certificate whose result hashes to the digest beside it, and whose votes are signed by whom they name: where
    the checksum holds they were so when it was stored."""
    number, digest, body, is_whole = row
    if not (isinstance(number, int) and isinstance(digest, bytes) and isinstance(body, bytes)):
        return None
    try:
        certificate = decode_record_untrusted(Certificate, body, DELTA_BYTES_MAX)
        if digest_record(certificate.result) != digest or certificate.result.round != number:
            return None
        for vote in () if is_whole else certificate.votes:
            verify_message(vote.voter, swarm, vote)
    except ProtocolError:
        return None
    return certificate, StoredCertificate(round=number, result_digest=digest, body=body)


def _follow_chain(found: Mapping[int, tuple[Certificate, StoredCertificate]]) -> dict[int, StoredCertificate]:
    """Those that follow the one before them. What comes after a gap is kept: the rounds in it come from peers, who
    check that the log goes on there."""
    kept: dict[int, StoredCertificate] = {}
    for number in sorted(found):
        certificate, stored = found[number]
        before = kept.get(number - 1)
        if before is None or certificate.result.previous == before.result_digest:
            kept[number] = stored
    return kept


def _is_vote(raw: bytes | None) -> bool:
    try:
        return raw is not None and decode_record_untrusted(VoteRecord, raw, DELTA_BYTES_MAX) is not None
    except ProtocolError:
        return False
