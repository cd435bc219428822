"""`shoal ledger show|verify|export` on real files, by the real command line, of peers that run and that do not."""

import asyncio
import io
import json
import shutil
import sqlite3
from collections.abc import Awaitable, Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from shoal.crdt.clock import HLC_ZERO, hlc_at
from shoal.crdt.entries import Batch, ChainPosition, EntryContent, encode_batch, sign_batch
from shoal.crdt.kinds import BanBody, Body, Kind, RegisterBody, RoundBody, TagBody
from shoal.crdt.ledger import Draft, Ledger
from shoal.crdt.measurements import HELD_OUT_TAG, HeldOutLoss
from shoal.node import cli, ledger_view
from shoal.node.answers import ANSWER_BYTES_MAX
from shoal.node.audit import EXIT_CODES, Finding
from shoal.node.config import MANIFEST_FILE
from shoal.node.happenings import HappeningFeed
from shoal.node.ledger_commands import PROGRESS_AFTER_S, Progress
from shoal.node.ledger_store import LedgerStore, compute_checksum
from shoal.node.ledger_view import PAGE_BYTES_MAX, LedgerPage, make_page, make_rules
from shoal.node.repair import begin_abstention
from shoal.node.running import note_running
from shoal.node.status import Status
from shoal.node.web import WebServer, WebSources
from shoal.protocol.identity import Identity, format_peer_id
from shoal.protocol.messages import CertificatesAnswer
from shoal.protocol.quorum import find_evaluator
from shoal.protocol.wire import DELTA_BYTES_MAX, decode_record_untrusted, encode_record
from tests.unit.node.node_samples import LEDGER, Chain, fill_folder, make_chain, make_samples
from tests.unit.protocol.samples import IDENTITIES, PEERS

ROUNDS = 6
NOW_MS = 1_763_700_000_000
SWARM = make_samples(founders=3)
CHAIN = make_chain(SWARM, ROUNDS)
Run = Callable[..., tuple[int, str, str]]


def write_batches() -> list[Batch]:
    """What three peers and the owner write in six rounds."""
    replicas = [Ledger(identity=one, rules=make_rules(SWARM.manifest, SWARM.id)) for one in IDENTITIES[:3]]
    batches: list[Batch] = []

    def write(number: int, kind: Kind, body: Body) -> None:
        batch = replicas[number].write([Draft(kind=kind, body=body)], NOW_MS + len(batches))
        for replica in replicas:
            replica.accept(batch)
        batches.append(batch)

    for number in range(3):
        write(number, Kind.LEASE, RegisterBody(value=(1000 + number).to_bytes(8, "big")))
    for at, certificate in enumerate(CHAIN.certificates):
        body = RoundBody(round=certificate.result.round, value=encode_record(certificate))
        write(at % 3, Kind.CERTIFICATE, body)
    write(1, Kind.TAG, TagBody(name="best", value=b"round 5", removes=()))
    write(0, Kind.BAN, BanBody(peer=PEERS[4], reason="spoils rounds", removes=()))
    return batches


BATCHES = write_batches()


def fork_of(batch: Batch, identity: Identity) -> Batch:
    """Another entry for the same slot."""
    first = batch.entries[0]
    content = EntryContent(deps=(), hlc=hlc_at(NOW_MS + 99), kind=Kind.LEASE.value, body=b"x" * 8)
    return sign_batch(
        identity, SWARM.id, ChainPosition(era=first.era, seq=first.seq, prev=first.prev, hlc=HLC_ZERO), [content]
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "peer"
    fill_folder(SWARM, made, replace(CHAIN, states={}))
    (made / MANIFEST_FILE).write_bytes(SWARM.signed)
    put(made, *BATCHES)
    return made


def put(folder: Path, *batches: Batch) -> None:
    with LedgerStore.open(folder / LEDGER) as store:
        store.append(batches, own=False)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def ledger(*arguments: object) -> tuple[int, str, str]:
        code = cli.main(["ledger", *(str(one) for one in arguments)])
        said = capsys.readouterr()
        return code, said.out, said.err

    return ledger


def test_show_tells_what_a_person_wants_to_know(folder: Path, run: Run) -> None:
    code, out, err = run("show", "--data-dir", folder)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    for wanted in (
        "swarm         samples",
        f"owner         {format_peer_id(PEERS[0])}",
        f"read from     {folder / LEDGER}",
        "entries       11 in 11 batches",
        "certified     rounds to 6",
        "by entries    rounds to 6, era 1",
        f"tag           best = round 5 (by {format_peer_id(PEERS[1])})",
        f"ban           {format_peer_id(PEERS[4])}: spoils rounds",
    ):
        assert any(line.startswith(wanted) for line in lines), wanted
    (row,) = (line for line in lines if line.startswith(format_peer_id(PEERS[2])))
    assert "2 certificate, 1 lease" in row and " 6  2025-11-21" in row
    assert "EQUIVOCATED" not in out and "ABSTAINING" not in out


def test_what_members_have_measured_is_told_with_its_author(folder: Path, run: Run) -> None:
    evaluator = find_evaluator(CHAIN.certificates[3].result, SWARM.manifest.training.evaluate_every)
    said = encode_record(HeldOutLoss(round=4, loss_nats=3.25, tokens=2048))
    tags = [(HELD_OUT_TAG, said), ("red \x1b[31m", b"x")]
    for identity in IDENTITIES[:3]:
        replica = Ledger(identity=identity, rules=make_rules(SWARM.manifest, SWARM.id))
        for batch in BATCHES:
            replica.accept(batch)
        drafts = [Draft(kind=Kind.TAG, body=TagBody(name=name, value=value, removes=())) for name, value in tags]
        put(folder, replica.write(drafts, NOW_MS + 1000))
    _, out, _ = run("show", "--data-dir", folder)
    lines = out.splitlines()
    assert evaluator is not None
    told = f"round 4: 3.2500 over 2,048 tokens (measured by {format_peer_id(evaluator)})"
    assert f"held out      {told}" in lines
    assert "held out      2 more: older, or not by whom their round names" in lines
    assert "\x1b" not in out and any(line.startswith("tag           'red \\x1b[31m' = x (by ") for line in lines)
    _, out, _ = run("export", "--data-dir", folder)
    says = [row["says"] for row in map(json.loads, out.splitlines()) if row["kind"] == "tag"]
    read = [(one["round"], one["loss_nats"], one["tokens"]) for one in says if one["name"] == HELD_OUT_TAG]
    assert read == [(4, 3.25, 2048)] * 3


def test_show_names_who_equivocated_and_that_this_peer_abstains(folder: Path, run: Run) -> None:
    put(folder, fork_of(BATCHES[1], IDENTITIES[1]))
    with LedgerStore.open(folder / LEDGER) as store:
        begin_abstention(store)
    _, out, _ = run("show", "--data-dir", folder)
    assert f"EQUIVOCATED   {format_peer_id(PEERS[1])}, from entry 0 of era 1 on nothing counts" in out
    assert "ABSTAINING    votes_forgotten" in out
    code, out, _ = run("verify", "--data-dir", folder)
    assert code == 0 and f"1 equivocated and are excluded, with proof: {format_peer_id(PEERS[1])}" in out


def test_verify_says_of_an_honest_ledger_that_it_holds(folder: Path, run: Run) -> None:
    before = (folder / LEDGER).read_bytes()[100:]  # the header counts openings
    code, out, _ = run("verify", "--data-dir", folder)
    assert code == 0
    assert out.splitlines()[-1] == "ledger holds"
    assert "signatures    holds: 11 batches are signed by their authors" in out
    assert "certificates  holds: 6 rounds, each decided by the voters of the one before" in out
    assert (folder / LEDGER).read_bytes()[100:] == before


def change(folder: Path, table: str, columns: str, where: str, *values: object) -> None:
    """Alter a row as somebody would who knows the checksums."""
    covered = {"batches": "author, last_seq, is_own, encoded", "certificates": "round, result_digest, body"}[table]
    with closing(sqlite3.connect(folder / LEDGER)) as connection, connection:
        connection.create_function("checksum", -1, compute_checksum)
        connection.execute(f"UPDATE {table} SET {columns} WHERE {where}", values)
        connection.execute(f"UPDATE {table} SET checksum = checksum({covered})")


def forge_signature(folder: Path) -> None:
    forged = replace(BATCHES[4], signature=bytes(64))
    change(folder, "batches", "encoded = ?", "position = 5", encode_batch(forged))


def swap_certificate(folder: Path) -> None:
    other = make_chain(SWARM, ROUNDS, seed=5).certificates[3]
    change(folder, "certificates", "body = ?", "round = 4", encode_record(other))


def drop_votes(folder: Path) -> None:
    poor = replace(CHAIN.certificates[2], votes=CHAIN.certificates[2].votes[:1])
    change(folder, "certificates", "body = ?", "round = 3", encode_record(poor))


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (forge_signature, f"signatures    does not hold: entry 1 of era 1 of {format_peer_id(PEERS[1])}"),
        (swap_certificate, "certificates  does not hold: round 4 does not follow round 3"),
        (drop_votes, "certificates  does not hold: round 3: no_quorum: 1 votes of 3"),
    ],
)
def test_verify_names_what_does_not_hold(folder: Path, run: Run, spoil: Callable[[Path], None], named: str) -> None:
    spoil(folder)
    code, out, _ = run("verify", "--data-dir", folder)
    assert code == EXIT_CODES[Finding.FAILS]
    assert named in out
    assert out.splitlines()[-1] == "ledger does not hold"


def test_verify_says_what_it_cannot_tell(folder: Path, run: Run) -> None:
    with closing(sqlite3.connect(folder / LEDGER)) as connection, connection:
        connection.execute("DELETE FROM certificates WHERE round IN (2, 3)")
        connection.execute("DELETE FROM batches WHERE position = 4")
    code, out, _ = run("verify", "--data-dir", folder)
    assert code == EXIT_CODES[Finding.UNKNOWN]
    assert "rounds 2 to 3 are not here, so what follows them is not proven by this disk" in out
    assert "ancestors     cannot be told" in out
    assert out.splitlines()[-1] == "ledger cannot be told"


def test_a_damaged_file_does_not_hold_and_is_left_as_it_is(folder: Path, run: Run) -> None:
    raw = bytearray((folder / LEDGER).read_bytes())
    raw[raw.index(b"best")] ^= 1
    (folder / LEDGER).write_bytes(raw)
    code, out, _ = run("verify", "--data-dir", folder)
    assert code == EXIT_CODES[Finding.FAILS] and "1 damaged row in the table batches. Fix: start the peer" in out
    code, _, err = run("show", "--data-dir", folder)
    assert code == cli.EXIT_INPUT and "Fix: start the peer" in err
    assert (folder / LEDGER).read_bytes()[100:] == raw[100:]


def test_an_export_is_the_same_whatever_the_order_of_storing(folder: Path, run: Run, tmp_path: Path) -> None:
    code, out, _ = run("export", "--data-dir", folder)
    assert code == 0
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["kind"] for row in rows].count("certificate") == ROUNDS
    assert {row["id"] for row in rows} == {batch.tip.hex() for batch in BATCHES}
    assert rows[0]["says"] == {"incarnation": 1000}
    assert rows[-1]["says"] == {"peer": format_peer_id(PEERS[4]), "reason": "spoils rounds"}
    assert all(row["signature"] and bytes.fromhex(row["body"]) for row in rows)
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(folder / MANIFEST_FILE, other)
    put(other, *reversed(BATCHES))
    target = tmp_path / "entries.jsonl"
    code, said, _ = run("export", "--data-dir", other, "--out", target)
    assert (code, said) == (0, f"{target}: 11 entries\n")
    assert target.read_text() == out


def test_mistakes_are_named_with_their_fix(folder: Path, run: Run, tmp_path: Path) -> None:
    code, _, err = run("show", "--data-dir", tmp_path / "nowhere")
    assert code == cli.EXIT_INPUT and "--data-dir" in err and "Fix: give the --data-dir of a peer" in err
    assert not (tmp_path / "nowhere").exists()
    code, _, err = run("export", "--data-dir", folder, "--out", tmp_path / "no" / "such" / "folder")
    assert code == cli.EXIT_INPUT and "--out" in err and "Fix: give a path" in err
    with LedgerStore.open(folder / LEDGER):
        code, _, err = run("show", "--data-dir", folder)
    assert code == cli.EXIT_INPUT and "no daemon runs" in err


async def test_a_running_peer_is_asked_and_tells_the_same(folder: Path, run: Run, status: Status) -> None:
    _, stopped, _ = run("export", "--data-dir", folder)
    status = replace(status, round=replace(status.round, round=ROUNDS + 1), warnings=("votes_forgotten: abstaining",))
    replica = Ledger(identity=IDENTITIES[3], rules=make_rules(SWARM.manifest, SWARM.id))
    with LedgerStore.open(folder / LEDGER) as store:
        sources = WebSources(
            status=lambda: status,
            metrics=lambda: b"",
            feed=HappeningFeed(),
            certificates=make_pages(CHAIN),
            ledger=lambda after: asyncio.to_thread(make_page, store, replica.base, after),
        )
        server = WebServer("127.0.0.1", 0, sources)
        note_running(folder, "127.0.0.1", await server.start())
        try:
            exported = await asyncio.to_thread(run, "export", "--data-dir", folder)
            shown = await asyncio.to_thread(run, "show", "--data-dir", folder)
            verified = await asyncio.to_thread(run, "verify", "--data-dir", folder)
        finally:
            await server.stop()
        stopped_answering = await asyncio.to_thread(run, "show", "--data-dir", folder)
    assert exported == (0, stopped, "")
    assert shown[0] == 0 and "the running peer at 127.0.0.1:" in shown[1] and "ABSTAINING" in shown[1]
    assert verified[0] == 0 and "ledger holds" in verified[1]
    assert stopped_answering[0] == cli.EXIT_INPUT and "no daemon answers" in stopped_answering[2]


def make_pages(chain: Chain) -> Callable[[int], Awaitable[bytes]]:
    async def answer(first: int) -> bytes:
        return encode_record(CertificatesAnswer(certificates=chain.certificates[first - 1 : first + 2]))

    return answer


def test_pages_are_bounded_and_lead_to_the_end(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_view, "PAGE_BYTES_MAX", 5000)
    base = make_rules(SWARM.manifest, SWARM.id).begin_chain()
    seen: list[bytes] = []
    with LedgerStore.open(folder / LEDGER) as store:
        after = 0
        while (page := decode_record_untrusted(LedgerPage, make_page(store, base, after), DELTA_BYTES_MAX)).batches:
            assert len(page.batches) == 1 or sum(map(len, page.batches)) <= 5000
            seen += page.batches
            after = page.last
    assert seen == [encode_batch(batch) for batch in BATCHES]
    assert PAGE_BYTES_MAX < ANSWER_BYTES_MAX


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_shown_after_two_seconds_and_cleared() -> None:
    times = [0.0]
    terminal, pipe = Terminal(), io.StringIO()
    shown, piped = Progress(terminal, lambda: times[-1]), Progress(pipe, lambda: times[-1])
    for now in (0.0, PROGRESS_AFTER_S - 0.1, PROGRESS_AFTER_S, PROGRESS_AFTER_S + 0.1, PROGRESS_AFTER_S + 1.0):
        times.append(now)
        shown(f"at {now}")
        piped(f"at {now}")
    shown.end()
    piped.end()
    assert terminal.getvalue() == "\rat 2.0\rat 3.0\r      \r"
    assert pipe.getvalue() == "at 2.0\n"
