"""Rebuilding retained rounds and computing certified ones anew: what holds, and what is named where something fails."""

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from shoal.node import cli
from shoal.node.archive import ArchiveError, open_archive, write_checkout
from shoal.node.audit import EXIT_CODES, Audit, Finding, audit_round, audit_rounds
from shoal.node.blobs import blob_path
from shoal.node.certificate_source import AskedCertificates, open_certificates
from shoal.node.config import MANIFEST_FILE
from shoal.node.ledger_store import LedgerStore, StoreError, compute_checksum
from shoal.node.manifest_source import read_manifest_file
from shoal.node.snapshots import SnapshotStore
from shoal.protocol.aggregators import planned_weights
from shoal.protocol.attendance import FRESHNESS, PARTICIPATION, WORK, Attendance, weight_factor
from shoal.protocol.errors import ConfigError
from shoal.protocol.messages import Certificate, CertificatesAnswer, Result, digest_record
from shoal.protocol.wire import encode_record
from tests.unit.node.node_samples import LEDGER, Chain, Swarm, fill_folder, make_chain, make_samples
from tests.unit.protocol.samples import certify

ROUNDS = 12
KEPT = (4, 8)


@pytest.fixture
def swarm() -> Swarm:
    return make_samples(founders=3)


@pytest.fixture
def chain(swarm: Swarm) -> Chain:
    return make_chain(swarm, ROUNDS, kept=tuple(range(1, ROUNDS + 1)))


@pytest.fixture
def folder(swarm: Swarm, chain: Chain, tmp_path: Path) -> Path:
    """Of a peer that took part in all rounds and has two snapshots."""
    made = tmp_path / "peer"
    fill_folder(swarm, made, replace(chain, states={number: chain.states[number] for number in KEPT}))
    (made / MANIFEST_FILE).write_bytes(swarm.signed)
    return made


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and LEDGER not in path.name}


def put_certificate(folder: Path, certificate: Certificate) -> None:
    put_body(folder, certificate.result.round, digest_record(certificate.result), encode_record(certificate))


def put_body(folder: Path, number: int, digest: bytes, body: bytes) -> None:
    row = digest, body, compute_checksum(number, digest, body), number
    with closing(sqlite3.connect(folder / LEDGER)) as connection, connection:
        connection.execute("UPDATE certificates SET result_digest = ?, body = ?, checksum = ? WHERE round = ?", row)


def audit(folder: Path, number: int) -> Audit:
    with open_archive(folder) as archive:
        return audit_round(archive, number)


def failed(one: Audit) -> dict[str, Finding]:
    return {check.name: check.finding for check in one.checks if check.finding is not Finding.HOLDS}


def flip(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


# -- rebuilding ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(ROUNDS + 1))
def test_every_round_is_rebuilt_from_the_snapshot_before_it(folder: Path, chain: Chain, number: int) -> None:
    before = contents(folder)
    with open_archive(folder) as archive:
        state = archive.rebuild(number)
    assert state.head == chain.heads[number]
    assert state.start == max([0, *(one for one in KEPT if one <= number)])
    if number:
        params, momentum = chain.states[number]
        assert np.array_equal(state.replica.params, params) and np.array_equal(state.replica.momentum, momentum)
    assert contents(folder) == before, "reading changes nothing"


def test_a_damaged_or_foreign_snapshot_is_passed_over(folder: Path, chain: Chain, swarm: Swarm) -> None:
    flip(folder / "snapshots" / "00000008.safetensors", -1)
    with open_archive(folder) as archive:
        assert archive.rebuild(10).start == 4
        assert (folder / "snapshots" / "00000008.safetensors").exists(), "whose it is removes it"
    store = SnapshotStore(folder / "snapshots")
    other = make_chain(swarm, 4, kept=(4,), seed=9)
    store.write(other.index(4), *other.states[4])
    with open_archive(folder) as archive:
        state = archive.rebuild(10)
        assert (state.start, state.head) == (0, chain.heads[10]), "no certificate names the root of round 4's"


def test_what_is_missing_is_named(folder: Path, chain: Chain) -> None:
    blob_path(folder / "blobs", chain.certificates[9].result.parts[1].digest).unlink()
    with open_archive(folder) as archive:
        assert archive.rebuild(9).head == chain.heads[9]
        with pytest.raises(ArchiveError, match=r"part 1 of round 10 is not on this disk, and the newest .* round 8"):
            archive.rebuild(10)
        with pytest.raises(ConfigError, match=r"--round: 13 is not certified here. Fix: give a round from 0 to 12"):
            archive.rebuild(ROUNDS + 1)


def test_a_checkout_is_a_snapshot_with_its_manifest(folder: Path, chain: Chain, swarm: Swarm, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with open_archive(folder) as archive:
        write_checkout(archive, 6, out)
    params, momentum = np.empty_like(chain.states[6][0]), np.empty_like(chain.states[6][1])
    store = SnapshotStore(out)
    assert store.rounds() == [6] and store.read(6, params, momentum)
    assert np.array_equal(params, chain.states[6][0]) and np.array_equal(momentum, chain.states[6][1])
    found = store.get(6)
    assert found is not None and found.index.root == chain.heads[6].state_root
    with safe_open(found.path, framework="numpy") as file:
        assert set(file.keys()) == {"params", "momentum"}
    assert read_manifest_file(out / MANIFEST_FILE) == (swarm.signed, swarm.id)


def test_a_checkout_that_cannot_be_written_says_so(folder: Path, tmp_path: Path) -> None:
    (out := tmp_path / "out").touch()
    with open_archive(folder) as archive, pytest.raises(ConfigError, match=r"--out: .*out cannot be written: "):
        write_checkout(archive, 6, out)


# -- verifying -------------------------------------------------------------------------------------------------------


def test_rounds_of_an_honest_folder_hold(folder: Path) -> None:
    with open_archive(folder) as archive:
        audits = list(audit_rounds(archive, 1, ROUNDS))
        alone = [audit_round(archive, number) for number in range(1, ROUNDS + 1)]
    assert [one.finding for one in audits] == [Finding.HOLDS] * ROUNDS
    assert audits == alone, "led on from round to round, or rebuilt for each"
    assert [check.name for check in audits[0].checks] == [
        "certificate",
        "members",
        "parts",
        "state before",
        "outer step",
    ]


def test_a_flipped_byte_of_a_part_is_found(folder: Path, chain: Chain) -> None:
    flip(blob_path(folder / "blobs", chain.certificates[9].result.parts[2].digest), 7)
    one = audit(folder, 10)
    assert one.finding is Finding.FAILS
    assert failed(one) == {"parts": Finding.FAILS, "outer step": Finding.UNKNOWN}
    assert any("part 2 has not the digest" in check.detail for check in one.checks)
    assert audit(folder, 9).finding is Finding.HOLDS
    assert failed(audit(folder, 11)) == {"state before": Finding.UNKNOWN}, "it cannot be rebuilt any more"


def test_what_is_not_retained_cannot_be_told(folder: Path, chain: Chain) -> None:
    blob_path(folder / "blobs", chain.certificates[1].result.parts[0].digest).unlink()
    assert failed(audit(folder, 2)) == {"parts": Finding.UNKNOWN, "outer step": Finding.UNKNOWN}
    with closing(sqlite3.connect(folder / LEDGER)) as connection, connection:
        connection.execute("DELETE FROM certificates WHERE round = 6")
    assert failed(audit(folder, 6)) == {"certificate": Finding.UNKNOWN}
    assert failed(audit(folder, 7)) == {"certificate": Finding.UNKNOWN, "state before": Finding.UNKNOWN}


def reweigh(result: Result) -> Result:
    members = (replace(result.members[0], weight=0.5), *result.members[1:])
    return replace(result, members=members)


def declare(result: Result, said: Attendance, rule: str) -> Result:
    """The first member has declared this, and all weigh accordingly."""
    first, *others = result.members
    factors = [weight_factor(one, rule) for one in (said, *(other.attendance for other in others))]
    weights = planned_weights([one.tokens for one in result.members], [one.steps for one in result.members], factors)
    members = (replace(first, attendance=said), *others)
    return replace(result, members=tuple(replace(one, weight=float(weights[at])) for at, one in enumerate(members)))


@pytest.mark.parametrize(
    ("rule", "said", "holds"),
    [
        (PARTICIPATION, Attendance(intervals=1, interval_rounds=1), True),
        (PARTICIPATION, Attendance(intervals=2, interval_rounds=2), True),
        (PARTICIPATION, Attendance(intervals=2, interval_rounds=3), False),  # it was in round 5
        (PARTICIPATION, Attendance(intervals=1, interval_rounds=6), False),  # more rounds than there were
        (PARTICIPATION, Attendance(base_age=1), False),
        (FRESHNESS, Attendance(base_age=2), True),
        (FRESHNESS, Attendance(base_age=6), False),
        (FRESHNESS, Attendance(intervals=1, interval_rounds=1), False),
        (WORK, Attendance(base_age=1), False),
    ],
)
def test_what_members_declare_is_checked_by_the_rule_and_the_rounds_before(
    rule: str, said: Attendance, holds: bool, tmp_path: Path
) -> None:
    swarm = make_samples(founders=3, weights=rule)
    folder = tmp_path / "peer"
    chain = make_chain(swarm, 6)
    fill_folder(swarm, folder, chain)
    (folder / MANIFEST_FILE).write_bytes(swarm.signed)
    assert not failed(audit(folder, 6)), "nothing was declared"
    changed = declare(chain.certificates[5].result, said, rule)
    put_certificate(folder, certify(changed, swarm=swarm.id))
    assert failed(audit(folder, 6)) == ({} if holds else {"members": Finding.FAILS})


def test_weights_that_leave_out_what_was_declared_do_not_hold(tmp_path: Path) -> None:
    swarm = make_samples(founders=3, weights=FRESHNESS)
    folder = tmp_path / "peer"
    chain = make_chain(swarm, 6)
    fill_folder(swarm, folder, chain)
    (folder / MANIFEST_FILE).write_bytes(swarm.signed)
    changed = declare(chain.certificates[5].result, Attendance(base_age=2), WORK)
    put_certificate(folder, certify(changed, swarm=swarm.id))
    (check,) = [one for one in audit(folder, 6).checks if one.finding is not Finding.HOLDS]
    assert check.detail == "the weight of member 0 does not follow from its tokens and base"


LIES: dict[str, tuple[Callable[[Certificate, Swarm], Certificate], dict[str, Finding]]] = {
    "too few votes": (
        lambda one, swarm: replace(one, votes=one.votes[:1]),
        {"certificate": Finding.FAILS},
    ),
    "a vote twice": (
        lambda one, swarm: replace(one, votes=(one.votes[0], one.votes[0], one.votes[1])),
        {"certificate": Finding.FAILS},
    ),
    "a forged vote": (
        lambda one, swarm: replace(one, votes=(*one.votes[:2], replace(one.votes[2], signature=bytes(64)))),
        {"certificate": Finding.FAILS},
    ),
    "votes for another swarm": (
        lambda one, swarm: certify(one.result, swarm=bytes(32)),
        {"certificate": Finding.FAILS},
    ),
    "votes of strangers": (
        lambda one, swarm: certify(one.result, voters=5, swarm=swarm.id),
        {"certificate": Finding.FAILS},
    ),
    "it follows another round": (
        lambda one, swarm: certify(replace(one.result, previous=b"p" * 32), swarm=swarm.id),
        {"certificate": Finding.FAILS},
    ),
    "a quorum has agreed on other weights": (
        lambda one, swarm: certify(reweigh(one.result), swarm=swarm.id),
        {"members": Finding.FAILS},
    ),
    "a quorum has agreed on another base": (
        lambda one, swarm: certify(replace(one.result, base_root=b"b" * 32), swarm=swarm.id),
        {"state before": Finding.FAILS},
    ),
    "a quorum has agreed on a bitmap of nobody": (
        lambda one, swarm: certify(
            replace(one.result, parts=(replace(one.result.parts[0], contributors=b"\x80"), *one.result.parts[1:])),
            swarm=swarm.id,
        ),
        {"certificate": Finding.FAILS},
    ),
    "parts in another order": (
        lambda one, swarm: certify(replace(one.result, parts=tuple(reversed(one.result.parts))), swarm=swarm.id),
        {"parts": Finding.FAILS, "outer step": Finding.UNKNOWN},
    ),
}


@pytest.mark.parametrize("name", LIES)
def test_each_lie_is_found_where_it_is(folder: Path, chain: Chain, swarm: Swarm, name: str) -> None:
    make, expected = LIES[name]
    put_certificate(folder, make(chain.certificates[9], swarm))
    one = audit(folder, 10)
    assert one.finding is Finding.FAILS
    assert failed(one) == expected


def test_an_outer_step_that_leads_elsewhere_is_found(folder: Path, chain: Chain, swarm: Swarm) -> None:
    following = replace(chain.certificates[10].result, base_root=b"x" * 32)
    put_certificate(folder, certify(following, swarm=swarm.id))
    assert failed(audit(folder, 10)) == {"outer step": Finding.FAILS}


def test_damaged_bytes_of_a_certificate_are_no_crash(folder: Path) -> None:
    put_body(folder, 10, bytes(32), b"\0")
    assert failed(audit(folder, 10)) == {"certificate": Finding.FAILS}
    with open_archive(folder) as archive, pytest.raises(ArchiveError, match="certificate of round 10 is damaged"):
        archive.rebuild(11)


# -- beside a running daemon ---------------------------------------------------------------------------------------


@contextmanager
def answering(monkeypatch: pytest.MonkeyPatch, folder: Path, pages: dict[int, bytes], root: bytes) -> Iterator[None]:
    """The store is held by a daemon, which answers in the test's place."""

    class Answer:
        def __init__(self, raw: bytes) -> None:
            self._raw = raw

        def __enter__(self) -> "Answer":
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def read(self, size: int) -> bytes:
            return self._raw[:size]

    def ask(url: str, timeout: float) -> Answer:
        return Answer(pages[int(url.rpartition("=")[2])])

    class Stood:
        class round:
            round = ROUNDS + 1
            state_root = root.hex()

    monkeypatch.setattr("shoal.node.certificate_source.urllib.request.urlopen", ask)
    monkeypatch.setattr("shoal.node.certificate_source.fetch_status", lambda host, port: Stood)
    (folder / "running.json").write_text('{"pid": 1, "web": "127.0.0.1:9"}')
    with LedgerStore.open(folder / LEDGER):
        yield


def make_pages(chain: Chain) -> dict[int, bytes]:
    return {
        number: encode_record(CertificatesAnswer(certificates=chain.certificates[number - 1 : number + 4]))
        for number in range(1, ROUNDS + 2)
    }


def test_a_running_daemon_is_asked(monkeypatch: pytest.MonkeyPatch, folder: Path, chain: Chain) -> None:
    pages, root = make_pages(chain), chain.heads[ROUNDS].state_root
    with answering(monkeypatch, folder, pages, root), open_archive(folder) as archive:
        assert isinstance(archive.certificates, AskedCertificates)
        audits = list(audit_rounds(archive, 1, ROUNDS))
        assert archive.rebuild(10).head == chain.heads[10]
    assert [one.finding for one in audits] == [Finding.HOLDS] * ROUNDS
    assert "the daemon stands at" in audits[-1].checks[-1].detail
    with answering(monkeypatch, folder, make_pages(chain), b"y" * 32), open_archive(folder) as archive:
        assert failed(audit_round(archive, ROUNDS)) == {"outer step": Finding.FAILS}


def test_a_daemon_that_answers_other_rounds_is_not_believed(
    monkeypatch: pytest.MonkeyPatch, folder: Path, chain: Chain
) -> None:
    pages = make_pages(chain) | {10: make_pages(chain)[9]}
    with answering(monkeypatch, folder, pages, b"y" * 32), open_archive(folder) as archive:
        assert failed(audit_round(archive, 10)) == {"certificate": Finding.FAILS}


def test_a_held_folder_without_a_daemon_is_explained(folder: Path) -> None:
    held, refused = LedgerStore.open(folder / LEDGER), pytest.raises(ConfigError, match="no daemon runs")
    with held, refused, open_certificates(folder):
        pass
    with pytest.raises(ConfigError, match="holds no manifest"), open_archive(folder / "snapshots"):
        pass
    (folder / LEDGER).write_bytes(b"no database" * 999)
    with pytest.raises(StoreError), open_archive(folder):
        pass


# -- the command line ------------------------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = cli.main([str(one) for one in arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_the_commands_say_plainly_what_holds(
    folder: Path, chain: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def verify(*more: object) -> tuple[int, str, str]:
        return run(capsys, "verify", "--data-dir", folder, *more)

    code, out, _ = verify("--round", 10)
    assert code == 0 and out.startswith(
        "round 10 holds\n  certificate   holds: it follows round 9; 3 of 3 votes, 2 needed"
    )
    code, out, _ = verify("--all")
    assert (code, out.splitlines()[-1]) == (0, f"{ROUNDS} rounds: holds")
    code, _, err = verify("--round", ROUNDS + 1)
    assert code == 1 and f"{ROUNDS + 1} is not certified here" in err

    code, out, _ = run(capsys, "checkout", "--round", 5, "--data-dir", folder, "--out", tmp_path / "five")
    assert code == 0 and "round 5, from the snapshot of round 4 and 1 certified updates" in out
    assert chain.heads[5].state_root.hex() in out

    path = blob_path(folder / "blobs", chain.certificates[9].result.parts[2].digest)
    flip(path, 0)
    code, out, _ = verify("--round", 10)
    assert code == EXIT_CODES[Finding.FAILS] and "round 10 does not hold" in out and "part 2 has not the digest" in out
    path.unlink()
    code, out, _ = verify("--all")
    assert (
        code == EXIT_CODES[Finding.UNKNOWN]
        and out.splitlines()[-1] == f"{ROUNDS - 3} rounds: holds, 3 rounds: cannot be told"
    )
    code, _, err = run(capsys, "checkout", "--round", 11, "--data-dir", folder, "--out", tmp_path / "eleven")
    assert code == 1 and "part 2 of round 10 is not on this disk" in err
    assert not (tmp_path / "eleven").exists()
