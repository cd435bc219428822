"""A flipped byte in each kind of file of a data folder: named, and mended or told how to mend; never trusted.

The ledger's file has its own tests (test_repair.py), a whole daemon is started on such a folder in tests/e2e.
"""

import logging
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from shoal.dht.peer_book import PeerBook
from shoal.node.config import MANIFEST_FILE, NodeConfig, NodeTable
from shoal.node.identity_file import create_identity, load_identity, next_incarnation
from shoal.node.manifest_source import choose_swarm
from shoal.node.peer_book_file import load_peer_book, save_peer_book
from shoal.node.snapshots import SnapshotStore, read_chunk
from shoal.protocol.errors import ConfigError
from shoal.protocol.manifest import SwarmUri
from tests.unit.node.node_samples import fill_folder, make_chain, make_samples, open_state
from tests.unit.protocol.samples import PEERS

ROUNDS = 9
KEPT = (4, 8)
FLIPS = 50
SWARM = make_samples(founders=3)
CHAIN = make_chain(SWARM, ROUNDS, kept=tuple(range(1, ROUNDS + 1)))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "peer"
    fill_folder(SWARM, folder, replace(CHAIN, states={number: CHAIN.states[number] for number in KEPT}))
    return folder


def flip(path: Path, source: random.Random, end: int | None = None) -> None:
    raw = bytearray(path.read_bytes())
    raw[source.randrange(end or len(raw))] ^= 1 << source.randrange(8)
    path.write_bytes(raw)


def pick_blob(folder: Path, source: random.Random) -> tuple[Path, int | None]:
    return source.choice(sorted((folder / "blobs").glob("??/*"))), None


def pick_snapshot(folder: Path, source: random.Random) -> tuple[Path, int | None]:
    return source.choice(sorted((folder / "snapshots").glob("*.safetensors"))), None


def pick_snapshot_header(folder: Path, source: random.Random) -> tuple[Path, int | None]:
    path, _ = pick_snapshot(folder, source)
    return path, 8 + int.from_bytes(path.read_bytes()[:8], "little")


def pick_index(folder: Path, source: random.Random) -> tuple[Path, int | None]:
    return source.choice(sorted((folder / "snapshots").glob("*.index"))), None


@pytest.mark.parametrize("pick", [pick_blob, pick_snapshot, pick_snapshot_header, pick_index])
def test_a_state_is_restored_from_what_is_whole(
    whole: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    pick: Callable[[Path, random.Random], tuple[Path, int | None]],
) -> None:
    source = random.Random(pick.__name__)
    named = further_back = 0
    for trial in range(FLIPS):
        folder = tmp_path / str(trial)
        shutil.copytree(whole, folder)
        path, end = pick(folder, source)
        flip(path, source, end)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            state = open_state(SWARM, folder)
            head = state.restore_now()
            state.stores.ledger.close()
        assert head == CHAIN.heads[head.round]
        if head.round:
            params, momentum = CHAIN.states[head.round]
            assert np.array_equal(state.replica.params, params)
            assert np.array_equal(state.replica.momentum, momentum)
        further_back += head.round < ROUNDS
        named += path.stem in caplog.text or path.name in caplog.text or "snapshot of round" in caplog.text
        assert head.round >= (KEPT[0] if pick is not pick_blob else KEPT[1])
        # What is not read at start is found when it is needed, and removed.
        again = open_state(SWARM, folder)
        again.restore_now()
        again.stores.ledger.close()
        shutil.rmtree(folder)
    if pick is pick_blob:
        assert further_back > 0, "blobs of the newest rounds were hit, too"
    else:
        assert named > FLIPS // 4
        assert further_back == 0, "an older snapshot and the updates after it lead to the same state"


def test_a_chunk_that_is_damaged_is_not_served(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "peer"
    shutil.copytree(whole, folder)
    path = folder / "snapshots" / "00000008.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    snapshot = SnapshotStore(folder / "snapshots").get(8)
    assert snapshot is not None
    served = [read_chunk(snapshot, number) for number in range(snapshot.index.chunks)]
    assert served.count(None) == 1


def test_every_flipped_byte_of_an_identity_is_told_with_its_fix(tmp_path: Path) -> None:
    path = tmp_path / "identity.key"
    made = create_identity(path)
    raw = path.read_bytes()
    for at in range(len(raw)):
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
        try:
            # Upper case, or a space at the end, is the same seed.
            assert load_identity(path).seed == made.seed, at
        except ConfigError as error:
            assert error.field == str(path) and "copy" in error.fix
    path.write_bytes(b"\n".join(raw.split(b"\n")[:2]) + b"\n")
    assert load_identity(path).seed == made.seed, "files of earlier releases have no peer id"


def config_of(folder: Path, **table: str) -> NodeConfig:
    return NodeConfig(node=NodeTable(data_dir=str(folder), **table))  # type: ignore[arg-type]


def test_a_damaged_manifest_is_had_again_or_told_with_its_fix(tmp_path: Path) -> None:
    source = random.Random(1)
    path = tmp_path / MANIFEST_FILE
    uri = str(SwarmUri(swarm=SWARM.id, bootstraps=()))
    for _ in range(FLIPS):
        path.write_bytes(SWARM.signed)
        flip(path, source)
        with pytest.raises(ConfigError) as caught:
            choose_swarm(config_of(tmp_path))
        assert caught.value.field == str(path) and "--swarm URI" in caught.value.fix
        choice = choose_swarm(config_of(tmp_path, swarm=uri))
        assert (choice.swarm, choice.signed) == (SWARM.id, None), "it is fetched"
        assert not path.exists() and path.with_suffix(".damaged").exists()
    good = tmp_path / "good.shoal"
    good.write_bytes(SWARM.signed)
    path.write_bytes(b"nonsense")
    choice = choose_swarm(config_of(tmp_path, manifest=str(good)))
    assert (choice.swarm, choice.signed) == (SWARM.id, SWARM.signed)


def test_a_damaged_peer_book_is_begun_anew_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    book = PeerBook(PEERS[0])
    for number, peer in enumerate(PEERS[1:4]):
        book.note_success(peer, (f"/ip4/1.2.3.{number}/tcp/5",), 1000.0)
    path, source = tmp_path / "peers.book", random.Random(2)
    damaged = 0
    for _ in range(FLIPS):
        save_peer_book(path, book.encode())
        flip(path, source)
        caplog.clear()
        loaded = load_peer_book(path, PEERS[0])
        if caplog.text:
            damaged += 1
            assert "peers.book is damaged and is begun anew" in caplog.text and loaded.ranked() == ()
    assert damaged > FLIPS // 8


def test_a_damaged_count_of_starts_is_told_with_its_fix_or_only_grows(tmp_path: Path) -> None:
    path, source = tmp_path / "incarnation", random.Random(3)
    for _ in range(FLIPS):
        path.unlink(missing_ok=True)
        assert next_incarnation(path, 1_763_700_000.0) == 1_763_700_000
        flip(path, source)
        try:
            assert next_incarnation(path, 1_763_700_100.0) >= 1_763_700_100
        except ConfigError as error:
            assert error.field == str(path) and "delete it" in error.fix
