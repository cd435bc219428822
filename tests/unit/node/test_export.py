"""From a data folder to a model file that others can read."""

from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from shoal.node.blobs import BlobStore
from shoal.node.export import CertifiedModel, read_certified_model, split_tensors, write_model
from shoal.node.ledger_store import LedgerStore, StoreError
from shoal.node.local_state import LocalState, Stores
from shoal.node.manifest_source import MANIFEST_FILE
from shoal.node.snapshots import SnapshotStore
from shoal.protocol.codecs import Float32s
from shoal.protocol.errors import ConfigError, Failure
from shoal.protocol.layout import Layout, TensorSpec, initialise
from shoal.protocol.manifest import Manifest, make_manifest, sign_manifest
from shoal.protocol.messages import digest_record
from shoal.protocol.quorum import Head
from tests.unit.protocol.samples import DRAFT, IDENTITIES, PEERS, make_update

LAYOUT = Layout(
    tensors=(
        TensorSpec(name="embedding", shape=(20, 30), init="uniform", std=0.02),
        TensorSpec(name="gain", shape=(30,), init="ones"),
        TensorSpec(name="head.weight", shape=(2, 5, 10)),
    )
)
MANIFEST: Manifest = make_manifest(DRAFT, LAYOUT, PEERS[0], PEERS[:4])
SWARM = digest_record(MANIFEST)
ROUNDS = 6  # a snapshot is written after the fourth


def open_state(folder: Path, ledger: LedgerStore, params: Float32s, momentum: Float32s) -> LocalState:
    blobs, snapshots = BlobStore(folder / "blobs"), SnapshotStore(folder / "snapshots")
    stores = Stores(ledger=ledger, blobs=blobs, snapshots=snapshots, snapshots_kept=2)
    return LocalState(MANIFEST, SWARM, stores, params, momentum)


async def take_part(folder: Path, rounds: int) -> dict[int, tuple[Head, Float32s]]:
    """Fill a data folder; the heads and parameters of every round."""
    (folder / MANIFEST_FILE).write_bytes(sign_manifest(MANIFEST, IDENTITIES[0]))
    params, momentum = (np.zeros(LAYOUT.elements, np.float32) for _ in range(2))
    history = {}
    with LedgerStore.open(folder / "ledger.sqlite") as ledger:
        state = open_state(folder, ledger, params, momentum)
        history[0] = (await state.restore(), params.copy())
        for number in range(1, rounds + 1):
            certificate, encoded = make_update(MANIFEST, state.head, number, SWARM)
            await state.commit(certificate, lambda digest, encoded=encoded: memoryview(encoded[digest]))
            await state.finish()
            history[number] = (state.head, params.copy())
    return history


def matches(model: CertifiedModel, history: dict[int, tuple[Head, Float32s]], number: int) -> bool:
    head, params = history[number]
    return (model.round, model.state_root, model.params.tobytes()) == (number, head.state_root, params.tobytes())


async def test_a_stopped_peer_gives_its_newest_certified_state(tmp_path: Path) -> None:
    history = await take_part(tmp_path, ROUNDS)
    model = read_certified_model(tmp_path)
    assert matches(model, history, ROUNDS)
    assert model.manifest == MANIFEST and not model.is_snapshot


async def test_reading_changes_nothing(tmp_path: Path) -> None:
    history = await take_part(tmp_path, ROUNDS)

    def contents() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and "ledger" not in path.name}

    before = contents()
    assert matches(read_certified_model(tmp_path), history, ROUNDS)
    assert contents() == before
    assert matches(read_certified_model(tmp_path), history, ROUNDS)


async def test_a_running_peer_gives_its_newest_snapshot(tmp_path: Path) -> None:
    history = await take_part(tmp_path, ROUNDS)
    half = tmp_path / "snapshots" / "00000008.partial"
    half.write_bytes(b"the running peer writes this")
    with LedgerStore.open(tmp_path / "ledger.sqlite"):
        model = read_certified_model(tmp_path)
    assert matches(model, history, 4) and model.is_snapshot
    assert half.exists()


async def test_a_running_peer_without_a_snapshot_is_explained(tmp_path: Path) -> None:
    await take_part(tmp_path, 3)
    with LedgerStore.open(tmp_path / "ledger.sqlite"), pytest.raises(ConfigError) as caught:
        read_certified_model(tmp_path)
    assert caught.value.field == "--data-dir" and "no snapshot yet" in caught.value.problem
    assert "--round" in caught.value.fix, "retained rounds can be had beside a running peer"


async def test_a_peer_that_saw_no_round_gives_round_0(tmp_path: Path) -> None:
    history = await take_part(tmp_path, 0)
    model = read_certified_model(tmp_path)
    assert matches(model, history, 0)
    assert np.array_equal(model.params, initialise(LAYOUT, MANIFEST.seed))


def test_a_folder_without_a_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read_certified_model(tmp_path)
    assert caught.value.field == "--data-dir" and str(tmp_path) in caught.value.problem
    assert list(tmp_path.iterdir()) == [], "and nothing is created there"


def test_a_damaged_manifest_is_named(tmp_path: Path) -> None:
    (tmp_path / MANIFEST_FILE).write_bytes(b"damaged")
    with pytest.raises(ConfigError) as caught:
        read_certified_model(tmp_path)
    assert caught.value.field == str(tmp_path / MANIFEST_FILE)


async def test_a_damaged_ledger_is_explained(tmp_path: Path) -> None:
    await take_part(tmp_path, 1)
    (tmp_path / "ledger.sqlite").write_bytes(b"this is no database, whatever its name says" * 50)
    with pytest.raises(StoreError) as caught:
        read_certified_model(tmp_path)
    assert caught.value.failure is Failure.STORE_DAMAGED


def test_tensors_are_views_of_the_flat_vector() -> None:
    params = np.arange(LAYOUT.elements, dtype=np.float32)
    tensors = split_tensors(LAYOUT, params)
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        "embedding": (20, 30),
        "gain": (30,),
        "head.weight": (2, 5, 10),
    }
    assert tensors["gain"][0] == 600 and tensors["head.weight"][1, 0, 0] == 680
    assert all(np.shares_memory(tensor, params) for tensor in tensors.values())
    assert np.array_equal(np.concatenate([tensor.ravel() for tensor in tensors.values()]), params)


async def test_the_file_holds_the_named_tensors_and_says_what_they_are(tmp_path: Path) -> None:
    history = await take_part(tmp_path, ROUNDS)
    out = tmp_path / "deep" / "model.safetensors"
    model = read_certified_model(tmp_path)
    write_model(model, out)
    tensors = load_file(out)
    expected = split_tensors(LAYOUT, history[ROUNDS][1])
    assert set(tensors) == set(expected)
    assert all(np.array_equal(tensors[name], expected[name]) for name in expected)
    with safe_open(out, framework="numpy") as file:
        assert file.metadata() == {
            "format": "pt",
            "task": "none",
            "task_options": "{}",
            "round": str(ROUNDS),
            "state_root": history[ROUNDS][0].state_root.hex(),
        }
    assert [path.name for path in out.parent.iterdir()] == [out.name], "and nothing half-written beside it"


async def test_what_cannot_be_written_is_the_persons_to_mend_and_leaves_nothing(tmp_path: Path) -> None:
    await take_part(tmp_path, 1)
    model = read_certified_model(tmp_path)
    (taken := tmp_path / "out" / "model.safetensors").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"--out: .*model.safetensors cannot be written: Is a directory"):
        write_model(model, taken)
    assert list(taken.parent.iterdir()) == [taken] and not list(taken.iterdir())
    (file := tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"--out: .* cannot be written"):
        write_model(model, file / "model.safetensors")


async def test_an_older_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    await take_part(tmp_path, 1)
    out = tmp_path / "model.safetensors"
    out.write_bytes(b"an older export")
    write_model(read_certified_model(tmp_path), out)
    assert set(load_file(out)) == {"embedding", "gain", "head.weight"}
