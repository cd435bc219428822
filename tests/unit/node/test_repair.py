"""A ledger file that is damaged, lost or too old: never trusted, never a reason not to start."""

import random
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from shoal.crdt.clock import HLC_ZERO, merge
from shoal.crdt.entries import NO_ENTRY, ChainPosition, EntryContent, sign_batch
from shoal.crdt.kinds import Kind, RegisterBody, encode_body
from shoal.node import ledger_store, repair
from shoal.node.ledger_store import LedgerStore, StoredCertificate, StoreError
from shoal.node.local_state import VOTE_KEY, VOTE_NAMESPACE
from shoal.node.repair import (
    ABSTENTION_KEY,
    DAMAGED_KEPT_MAX,
    abstains,
    begin_abstention,
    damaged_path,
    end_abstention,
    open_ledger,
)
from shoal.protocol.effects import VoteRecord
from shoal.protocol.errors import Failure
from shoal.protocol.messages import digest_record
from shoal.protocol.quorum import Head
from shoal.protocol.wire import encode_record
from tests.unit.protocol.samples import IDENTITIES, PEERS, SWARM, certify, make_head, make_sample_result

ME = PEERS[0]
NOW_MS = 1_700_000_000_000
VOTE = encode_record(VoteRecord(round=13, base=b"b" * 32, promised=2, led=1))
FLIPS = 120
Content = tuple[set[bytes], dict[int, StoredCertificate], bytes | None]


def make_chain(rounds: int) -> list[StoredCertificate]:
    head = make_head()
    chain = []
    for _ in range(rounds):
        certificate = certify(make_sample_result(head))
        digest = digest_record(certificate.result)
        chain.append(
            StoredCertificate(round=head.round + 1, result_digest=digest, body=encode_record(certificate)),
        )
        head = Head(round=head.round + 1, digest=digest, state_root=b"r" * 32, voters=certificate.result.voters)
    return chain


CHAIN = make_chain(12)


def write_store(path: Path) -> None:
    """A peer's ledger after twelve rounds, closed in good order."""
    with LedgerStore.open(path) as store:
        for number, identity in enumerate(IDENTITIES[:4]):
            position = ChainPosition(seq=0, prev=NO_ENTRY, hlc=HLC_ZERO)
            for at in range(6):
                body = encode_body(RegisterBody(value=b"lease %d of peer %d" % (at, number)))
                hlc = merge(position.hlc, HLC_ZERO, NOW_MS + at)
                content = EntryContent(deps=(), hlc=hlc, kind=Kind.LEASE.value, body=body)
                batch = sign_batch(identity, b"s" * 32, position, [content])
                store.append([batch], own=identity.peer == ME)
                position = ChainPosition(seq=at + 1, prev=batch.tip, hlc=hlc)
        for certificate in CHAIN:
            store.put_certificate(certificate)
        store.put_record(VOTE_NAMESPACE, VOTE_KEY, VOTE)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stored")
    write_store(folder / "ledger.sqlite")
    return folder


@pytest.fixture
def path(stored: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "peer"
    shutil.copytree(stored, folder)
    return folder / "ledger.sqlite"


def read(store: LedgerStore) -> Content:
    batches = {batch.tip for batch in store.load()}
    certificates = {one.round: one for one in store.list_certificates(0, 100)}
    return batches, certificates, store.get_record(VOTE_NAMESPACE, VOTE_KEY)


def content_of(path: Path) -> Content:
    with LedgerStore.open(path) as store:
        return read(store)


def flip(path: Path, at: int, mask: int = 0x40) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= mask
    path.write_bytes(raw)


def test_a_whole_file_is_opened_as_it_is(path: Path) -> None:
    before = content_of(path)
    store, found = open_ledger(path, ME, SWARM)
    with store:
        assert found is None
        assert read(store) == before
        assert not abstains(store)


@pytest.mark.parametrize("seed", range(4))
def test_whatever_byte_is_flipped_nothing_false_is_read_and_no_vote_is_forgotten_unnoticed(
    stored: Path, tmp_path: Path, seed: int
) -> None:
    source = random.Random(seed)
    before = content_of(stored / "ledger.sqlite")
    repaired = 0
    for trial in range(FLIPS // 4):
        path = tmp_path / str(trial) / "ledger.sqlite"
        shutil.copytree(stored, path.parent)
        flip(path, source.randrange(path.stat().st_size), 1 << source.randrange(8))
        store, found = open_ledger(path, ME, SWARM)
        with store:
            batches, certificates, vote = read(store)
            repaired += found is not None
            assert batches <= before[0]
            assert certificates.items() <= before[1].items()
            assert vote == before[2] or abstains(store)
            if found is None:
                assert (batches, certificates, vote) == before
            else:
                assert found.failure is Failure.STORE_DAMAGED
                assert path.with_name("ledger.damaged-1.sqlite").exists()
        again, found = open_ledger(path, ME, SWARM)
        with again:
            assert found is None
            assert read(again) == (batches, certificates, vote)
        names = {file.name for file in path.parent.iterdir()}
        assert names <= {"ledger.sqlite", "ledger.mark", "ledger.damaged-1.sqlite", "ledger.damaged-1.sqlite-wal"}
        shutil.rmtree(path.parent)
    assert repaired > 3, "flips must hit something"


def test_a_damaged_page_costs_what_is_on_it_and_no_more(path: Path) -> None:
    with sqlite3.connect(path) as other:
        (page,) = other.execute("SELECT rootpage FROM sqlite_master WHERE name = 'batches'").fetchone()
        (size,) = other.execute("PRAGMA page_size").fetchone()
    other.close()
    raw = bytearray(path.read_bytes())
    raw[(page - 1) * size : page * size] = bytes(size)
    path.write_bytes(raw)
    store, found = open_ledger(path, ME, SWARM)
    with store:
        assert found is not None
        batches, certificates, vote = read(store)
        assert len(batches) < 24
        assert list(certificates.values()) == CHAIN
        assert vote == VOTE
        assert not abstains(store), "the vote record is whole, and the mark says that it is the newest"
        assert "12 certificates of it are whole" in found.text
        # The store goes on as any other.
        store.put_certificate(StoredCertificate(round=13, result_digest=b"d" * 32, body=b"x"))


def test_a_damaged_vote_record_is_not_used(path: Path) -> None:
    flip(path, path.read_bytes().rindex(VOTE) + 5)
    store, found = open_ledger(path, ME, SWARM)
    with store:
        assert found is not None and "does not vote" in found.text
        assert store.get_record(VOTE_NAMESPACE, VOTE_KEY) is None
        assert abstains(store)


def test_a_file_that_is_no_database_is_replaced(path: Path) -> None:
    path.write_bytes(b"this is not a database" * 100)
    store, found = open_ledger(path, ME, SWARM)
    with store:
        assert found is not None
        assert read(store) == (set(), {}, None)
        assert abstains(store)
    assert damaged_path(path, 1).read_bytes() == b"this is not a database" * 100


def test_another_programs_database_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE bookmarks (url TEXT)")
    other.close()
    before = path.read_bytes()
    with pytest.raises(StoreError) as caught:
        open_ledger(path, ME, SWARM)
    assert caught.value.failure is Failure.STORE_FOREIGN
    assert path.read_bytes() == before


def lose(path: Path) -> None:
    path.unlink()


def roll_back(path: Path) -> None:
    with LedgerStore.open(path) as store:
        backup = path.read_bytes()
        store.put_record(VOTE_NAMESPACE, VOTE_KEY, b"a later vote")
    path.write_bytes(backup)


@pytest.mark.parametrize("happen", [lose, roll_back])
def test_a_file_that_is_lost_or_too_old_is_noticed(path: Path, happen: Callable[[Path], None]) -> None:
    happen(path)
    store, found = open_ledger(path, ME, SWARM)
    with store:
        assert found is not None and found.failure is Failure.STORE_BEHIND
        assert abstains(store)
    store, found = open_ledger(path, ME, SWARM)
    with store:
        assert found is None
        assert abstains(store), "until the round core says otherwise"
        end_abstention(store)
    store, _ = open_ledger(path, ME, SWARM)
    with store:
        assert not abstains(store)


def test_a_fresh_folder_has_forgotten_nothing(tmp_path: Path) -> None:
    store, found = open_ledger(tmp_path / "ledger.sqlite", ME, SWARM)
    with store:
        assert found is None
        assert not abstains(store)


def test_a_vote_record_of_another_release_is_not_used(path: Path) -> None:
    with LedgerStore.open(path) as store:
        store.put_record(VOTE_NAMESPACE, VOTE_KEY, b"\x93\x01\x02\x03")
    store, found = open_ledger(path, ME, SWARM)
    with store:
        assert found is not None and abstains(store)
        assert store.get_record(VOTE_NAMESPACE, VOTE_KEY) is None


def test_damaged_files_are_kept_under_a_bounded_number_of_names(path: Path) -> None:
    for number in range(DAMAGED_KEPT_MAX + 2):
        path.write_bytes(b"damaged for the time %d" % number)
        store, found = open_ledger(path, ME, SWARM)
        store.close()
        assert found is not None
    kept = sorted(path.parent.glob("*damaged*"))
    assert [file.name for file in kept] == [damaged_path(path, at).name for at in range(1, DAMAGED_KEPT_MAX + 1)]
    assert [file.read_bytes() for file in kept] == [b"damaged for the time %d" % number for number in (4, 3, 2)]


def test_certificates_that_do_not_follow_are_left_out(path: Path) -> None:
    stranger = make_sample_result(make_head(round_number=4), label="other")
    with sqlite3.connect(path) as other:
        other.create_function("checksum", -1, ledger_store.compute_checksum)
        other.execute("DELETE FROM certificates WHERE round IN (5, 9)")
        row = (5, digest_record(stranger), encode_record(certify(stranger)))
        other.execute("INSERT INTO certificates VALUES (?1, ?2, ?3, checksum(?1, ?2, ?3))", row)
        other.execute("UPDATE certificates SET body = x'00' WHERE round = 12")
    other.close()
    store, _ = open_ledger(path, ME, SWARM)
    with store:
        found = {one.round for one in store.list_certificates(0, 100)}
    assert found == {1, 2, 3, 4, 6, 7, 8, 10, 11}


STEPS = ("_put_aside", "_salvage", "_write_anew", "sync_path", "begin_abstention")


class KilledError(Exception):
    """The process ends here."""


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("step", STEPS)
def test_a_kill_within_a_repair_leads_to_a_repair_or_to_abstaining(
    path: Path, monkeypatch: pytest.MonkeyPatch, step: str, after: bool
) -> None:
    before = content_of(path)
    flip(path, path.read_bytes().rindex(VOTE) + 5)
    real = getattr(repair, step)

    def die(*given: object) -> None:
        if after:
            real(*given)
        raise KilledError

    with monkeypatch.context() as dying:
        dying.setattr(repair, step, die)
        with pytest.raises(KilledError):
            open_ledger(path, ME, SWARM)
    store, _ = open_ledger(path, ME, SWARM)
    with store:
        batches, certificates, _ = read(store)
        assert abstains(store)
        assert (batches, certificates) == before[:2]
    assert not list(path.parent.glob("*fresh*")) and not list(path.parent.glob("*salvaged*"))


def test_no_space_for_a_repair_is_told_and_nothing_is_lost(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flip(path, path.read_bytes().rindex(VOTE) + 5)
    damaged = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as ill:
        ill.setattr(shutil, "copyfile", full)
        with pytest.raises(StoreError, match="make space") as caught:
            open_ledger(path, ME, SWARM)
    assert caught.value.failure is Failure.STORE_UNUSABLE
    assert path.read_bytes()[100:] == damaged[100:]
    store, found = open_ledger(path, ME, SWARM)
    with store:
        assert found is not None and abstains(store)


def test_the_record_of_abstaining_stands_until_it_is_ended(path: Path) -> None:
    with LedgerStore.open(path) as store:
        begin_abstention(store)
        assert store.get_record(VOTE_NAMESPACE, ABSTENTION_KEY)
    flip(path, path.read_bytes().rindex(b"lease 3 of peer 2") + 2)
    store, found = open_ledger(path, ME, SWARM)
    with store:
        assert found is not None
        assert abstains(store)
