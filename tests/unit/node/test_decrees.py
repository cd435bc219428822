"""The owner's decrees: written into a stopped peer's folder, from one chain that never has two branches."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from shoal.crdt.clock import HLC_ZERO, Hlc
from shoal.crdt.entries import NO_ENTRY, Batch, ChainPosition, EntryContent, sign_batch
from shoal.crdt.eras import PERMANENT_ERA
from shoal.crdt.fold import LedgerState
from shoal.crdt.kinds import ADMISSIONS_MAX
from shoal.crdt.ledger import Ledger
from shoal.node import decrees
from shoal.node.cli import main
from shoal.node.config import MANIFEST_FILE
from shoal.node.decrees import AlreadyDecreed, admit, ban, readmit, unban
from shoal.node.ledger_store import LedgerStore
from shoal.node.ledger_sync import make_rules
from shoal.protocol.errors import ConfigError
from shoal.protocol.identity import PeerId, format_peer_id
from tests.unit.node.node_samples import LEDGER, Swarm, make_samples
from tests.unit.protocol.samples import IDENTITIES, PEERS

NOW_MS = 1_700_000_000_000
OWNER, LIAR = IDENTITIES[0], IDENTITIES[3]


@pytest.fixture
def swarm() -> Swarm:
    return make_samples()


def make_folder(swarm: Swarm, path: Path) -> Path:
    path.mkdir()
    (path / MANIFEST_FILE).write_bytes(swarm.signed)
    return path


def make_key(path: Path, seed: bytes) -> Path:
    path.write_text(
        "# shoal Ed25519 seed. Keep it secret and keep a copy: whoever holds it is this peer or this swarm's owner.\n"
        f"{seed.hex()}\n"
    )
    path.chmod(0o600)
    return path


def find_seed() -> bytes:
    (seed,) = [bytes([number]) * 32 for number in range(1, 9) if _is_owner(bytes([number]) * 32)]
    return seed


def _is_owner(seed: bytes) -> bool:
    return type(OWNER)(seed).peer == OWNER.peer


def put(folder: Path, batches: Sequence[Batch]) -> None:
    with LedgerStore.open(folder / LEDGER) as store:
        store.append(batches, own=False)


def read(swarm: Swarm, folder: Path) -> LedgerState:
    ledger = Ledger(identity=IDENTITIES[1], rules=make_rules(swarm.manifest, swarm.id))
    with LedgerStore.open(folder / LEDGER) as store:
        ledger.restore(store.load(), store.load_base())
    return ledger.fold(NOW_MS)


def lie(swarm: Swarm, values: Sequence[bytes], era: int = 1) -> Batch:
    contents = [EntryContent(deps=(), hlc=Hlc(at), kind="lease", body=value) for at, value in enumerate(values, 1)]
    start = ChainPosition(era=era, seq=0, prev=NO_ENTRY, hlc=HLC_ZERO)
    return sign_batch(LIAR, swarm.id, start, contents)


def test_a_ban_holds_until_it_is_lifted(swarm: Swarm, tmp_path: Path) -> None:
    folder, key = make_folder(swarm, tmp_path / "peer"), make_key(tmp_path / "owner.key", find_seed())
    put(folder, [lie(swarm, [b"lease"])])
    assert LIAR.peer in read(swarm, folder).leases
    batch = ban(folder, key, LIAR.peer, "spam", NOW_MS)
    assert (batch.author, batch.era) == (swarm.manifest.owner, PERMANENT_ERA)
    state = read(swarm, folder)
    assert LIAR.peer not in state.leases and [one.reason for one in state.verdicts.bans] == ["spam"]
    lifting = unban(folder, key, LIAR.peer, NOW_MS)
    assert LIAR.peer in read(swarm, folder).leases
    again = ban(folder, key, LIAR.peer, "spam again", NOW_MS)
    assert [one.seq for one in (*batch.entries, *lifting.entries, *again.entries)] == [0, 1, 2]
    assert [one.entry for one in read(swarm, folder).verdicts.bans] == [again.tip]


def test_what_is_decreed_already_is_not_decreed_again(swarm: Swarm, tmp_path: Path) -> None:
    folder, key = make_folder(swarm, tmp_path / "peer"), make_key(tmp_path / "owner.key", find_seed())
    with pytest.raises(ConfigError, match="is not banned"):
        unban(folder, key, LIAR.peer, NOW_MS)
    other = ban(folder, key, PEERS[4], "", NOW_MS)
    first = ban(folder, key, LIAR.peer, "spam", NOW_MS)
    name = format_peer_id(LIAR.peer)
    text = f"{name} is banned already (spam)"
    assert ban(folder, key, LIAR.peer, "spam again", NOW_MS) == AlreadyDecreed(seq=1, entry=first.tip, text=text)
    text = f"{format_peer_id(PEERS[4])} is banned already (no reason given)"
    assert ban(folder, key, PEERS[4], "", NOW_MS) == AlreadyDecreed(seq=0, entry=other.tip, text=text)
    lifting = unban(folder, key, LIAR.peer, NOW_MS)
    text = f"the ban of {name} is lifted already"
    assert unban(folder, key, LIAR.peer, NOW_MS) == AlreadyDecreed(seq=2, entry=lifting.tip, text=text)
    put(folder, [lie(swarm, [b"one"]), lie(swarm, [b"other", b"longer"])])
    done = readmit(folder, key, LIAR.peer, NOW_MS)
    text = f"{name} is readmitted already"
    assert readmit(folder, key, LIAR.peer, NOW_MS) == AlreadyDecreed(seq=3, entry=done.tip, text=text)
    with pytest.raises(ConfigError, match="no two branches"):
        readmit(folder, key, LIAR.peer, NOW_MS, NO_ENTRY)
    assert ban(folder, key, LIAR.peer, "once more", NOW_MS).entries[0].seq == 4


def test_a_readmission_takes_the_longest_branch_or_the_one_that_is_named(swarm: Swarm, tmp_path: Path) -> None:
    folder, key = make_folder(swarm, tmp_path / "peer"), make_key(tmp_path / "owner.key", find_seed())
    short, long = lie(swarm, [b"short"]), lie(swarm, [b"long", b"longer"])
    with pytest.raises(ConfigError, match="no two branches"):
        readmit(folder, key, LIAR.peer, NOW_MS)
    put(folder, [short, long])
    assert read(swarm, folder).excluded == {LIAR.peer: (1, 0)}
    readmit(folder, key, LIAR.peer, NOW_MS)
    assert read(swarm, folder).leases[LIAR.peer].value == b"longer" and not read(swarm, folder).excluded
    other = make_folder(swarm, tmp_path / "other")
    key = make_key(tmp_path / "copy.key", find_seed())
    put(other, [short, long, lie(swarm, [b"one era later"], era=2)])
    with pytest.raises(ConfigError, match="is no entry of this peer in era 1"):
        readmit(other, key, LIAR.peer, NOW_MS, NO_ENTRY)
    assert readmit(other, key, LIAR.peer, NOW_MS, short.tip).entries[0].seq == 0
    assert read(swarm, other).leases[LIAR.peer].value == b"one era later"


def test_a_folder_that_has_not_heard_of_the_last_decree_signs_none(swarm: Swarm, tmp_path: Path) -> None:
    key = make_key(tmp_path / "owner.key", find_seed())
    one, other = make_folder(swarm, tmp_path / "one"), make_folder(swarm, tmp_path / "other")
    first = ban(one, key, LIAR.peer, "", NOW_MS)
    with pytest.raises(ConfigError, match="knows 0 of the owner's 1 decrees"):
        ban(other, key, PEERS[2], "", NOW_MS)
    put(other, [first])
    second = ban(other, key, PEERS[2], "", NOW_MS)
    assert second.entries[0].prev == first.tip
    (tmp_path / "owner.chain").write_bytes(b"?")
    with pytest.raises(ConfigError, match="is damaged"):
        ban(other, key, PEERS[2], "", NOW_MS)


def test_the_note_survives_a_power_cut_before_the_decree_is_stored(
    swarm: Swarm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, folder = make_key(tmp_path / "owner.key", find_seed()), make_folder(swarm, tmp_path / "peer")
    steps: list[str] = []
    append = LedgerStore.append

    def store(self: LedgerStore, batches: Sequence[Batch], *, own: bool) -> None:
        steps.append("stored")
        append(self, batches, own=own)

    monkeypatch.setattr(decrees, "sync_path", lambda path: steps.append(path.name))
    monkeypatch.setattr(LedgerStore, "append", store)
    ban(folder, key, LIAR.peer, "", NOW_MS)
    assert steps == [".owner.chain.new", tmp_path.name, "stored"]


def test_what_is_missing_or_wrong_is_named(swarm: Swarm, tmp_path: Path) -> None:
    folder = make_folder(swarm, tmp_path / "peer")
    stranger = make_key(tmp_path / "stranger.key", b"\x63" * 32)
    with pytest.raises(ConfigError, match="holds no manifest"):
        ban(tmp_path, stranger, LIAR.peer, "", NOW_MS)
    with pytest.raises(ConfigError, match="does not exist"):
        ban(folder, tmp_path / "no.key", LIAR.peer, "", NOW_MS)
    with pytest.raises(ConfigError, match="not the key of this swarm's owner"):
        ban(folder, stranger, LIAR.peer, "", NOW_MS)


def test_the_command_line_does_all_three(swarm: Swarm, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_folder(swarm, tmp_path / "peer")
    make_key(folder / "owner.key", find_seed())
    put(folder, [lie(swarm, [b"one"]), lie(swarm, [b"other"])])
    where = [format_peer_id(LIAR.peer), "--data-dir", str(folder)]
    assert main(["swarm", "ban", *where, "--reason", "two histories"]) == 0
    assert "decree     0 of the owner" in capsys.readouterr().out
    assert main(["swarm", "readmit", *where]) == 0
    assert main(["swarm", "unban", *where]) == 0
    assert read(swarm, folder).leases.keys() == {LIAR.peer}
    capsys.readouterr()
    assert main(["swarm", "unban", *where]) == 0
    assert capsys.readouterr().out.startswith(
        f"nothing    the ban of {where[0]} is lifted already: decree 2 of the owner, entry "
    )
    assert main(["swarm", "unban", format_peer_id(PEERS[4]), *where[1:]]) == 1
    assert "is not banned" in capsys.readouterr().err
    assert main(["swarm", "readmit", *where, "--entry", "xyz"]) == 1
    assert "is no entry id" in capsys.readouterr().err


# -- admissions ------------------------------------------------------------------------------------------------------


def test_peers_are_admitted_once_and_some_at_a_time(tmp_path: Path) -> None:
    swarm = make_samples(admission="listed")
    folder, key = make_folder(swarm, tmp_path / "peer"), make_key(tmp_path / "owner.key", find_seed())
    batch = admit(folder, key, (PEERS[4], LIAR.peer), NOW_MS)
    assert (batch.author, batch.era) == (swarm.manifest.owner, PERMANENT_ERA)
    assert read(swarm, folder).verdicts.admitted == {PEERS[4], LIAR.peer}
    text = f"{format_peer_id(LIAR.peer)} is admitted already"
    assert admit(folder, key, (LIAR.peer,), NOW_MS) == AlreadyDecreed(seq=0, entry=batch.tip, text=text)
    admit(folder, key, (LIAR.peer, PEERS[5]), NOW_MS)
    assert read(swarm, folder).verdicts.admitted == {PEERS[4], PEERS[5], LIAR.peer}
    crowd = [PeerId(number.to_bytes(32, "big")) for number in range(ADMISSIONS_MAX + 1)]
    with pytest.raises(ConfigError, match=f"admit at most {ADMISSIONS_MAX} at once"):
        admit(folder, key, crowd, NOW_MS)


def test_an_open_swarm_admits_nobody(swarm: Swarm, tmp_path: Path) -> None:
    folder, key = make_folder(swarm, tmp_path / "peer"), make_key(tmp_path / "owner.key", find_seed())
    with pytest.raises(ConfigError, match="this swarm is open"):
        admit(folder, key, (LIAR.peer,), NOW_MS)


def test_the_command_line_admits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    swarm = make_samples(admission="listed")
    folder = make_folder(swarm, tmp_path / "peer")
    make_key(folder / "owner.key", find_seed())
    ids = [format_peer_id(peer) for peer in (LIAR.peer, PEERS[4])]
    assert main(["swarm", "admit", *ids, "--data-dir", str(folder)]) == 0
    assert "decree     0 of the owner" in capsys.readouterr().out
    assert read(swarm, folder).verdicts.admitted == {LIAR.peer, PEERS[4]}
    assert main(["ledger", "show", "--data-dir", str(folder)]) == 0
    assert capsys.readouterr().out.count("admitted      12D3KooW") == 2
    assert main(["swarm", "admit", ids[0][:-1], "--data-dir", str(folder)]) == 1
    assert "is not an Ed25519 peer id" in capsys.readouterr().err
