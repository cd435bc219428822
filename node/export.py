"""From a peer's disk to a model file: the certified parameters as named tensors in safetensors.

A running daemon holds its store for itself; then its newest snapshot is taken.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from shoal.node.archive import open_archive
from shoal.node.blobs import BlobStore
from shoal.node.config import MANIFEST_FILE
from shoal.node.ledger_store import LedgerStore, StoreError
from shoal.node.local_state import LocalState, Stores
from shoal.node.manifest_source import read_manifest_file
from shoal.node.output_files import replacing
from shoal.node.snapshots import SnapshotStore
from shoal.protocol.codecs import Float32s
from shoal.protocol.errors import ConfigError, Failure
from shoal.protocol.layout import Layout
from shoal.protocol.manifest import Manifest, read_manifest_untrusted


@dataclass(frozen=True, slots=True, kw_only=True)
class CertifiedModel:
    """The state at a certified round, as this disk can prove it."""

    manifest: Manifest
    round: int
    state_root: bytes
    params: Float32s
    is_snapshot: bool = False  # the peer is running, and this is what it last wrote down


def read_retained_model(data_dir: Path, number: int) -> CertifiedModel:
    """The state after an older round, rebuilt; raises ConfigError, StoreError or ArchiveError."""
    with open_archive(data_dir) as archive:
        state = archive.rebuild(number)
        root = state.head.state_root
        return CertifiedModel(manifest=archive.manifest, round=number, state_root=root, params=state.replica.params)


def read_certified_model(data_dir: Path) -> CertifiedModel:
    """The newest certified state in a peer's folder; raises ConfigError or StoreError."""
    path = data_dir / MANIFEST_FILE
    if not path.exists():
        fix = "give the --data-dir of a peer that has taken part in a swarm"
        raise ConfigError("--data-dir", f"{data_dir} holds no manifest", fix)
    signed, swarm = read_manifest_file(path)
    manifest, _ = read_manifest_untrusted(signed, swarm)
    params, momentum = (np.zeros(manifest.layout.elements, np.float32) for _ in range(2))
    snapshots = SnapshotStore(data_dir / "snapshots")
    try:
        ledger = LedgerStore.open(data_dir / "ledger.sqlite")
    except StoreError as error:
        if error.failure is not Failure.STORE_IN_USE:
            raise
        return _read_snapshot(manifest, snapshots, params, momentum)
    with ledger:
        stores = Stores(ledger=ledger, blobs=BlobStore(data_dir / "blobs"), snapshots=snapshots, snapshots_kept=1)
        head = LocalState(manifest, swarm, stores, params, momentum).restore_now()
    return CertifiedModel(manifest=manifest, round=head.round, state_root=head.state_root, params=params)


def _read_snapshot(
    manifest: Manifest, snapshots: SnapshotStore, params: Float32s, momentum: Float32s
) -> CertifiedModel:
    for number in reversed(snapshots.rounds()):
        snapshot = snapshots.get(number)
        if snapshot is not None and snapshots.read(number, params, momentum):
            root = snapshot.index.root
            return CertifiedModel(manifest=manifest, round=number, state_root=root, params=params, is_snapshot=True)
    fix = "name a certified round with --round, wait for its first snapshot, or stop it"
    raise ConfigError("--data-dir", "the peer is running and has written no snapshot yet", fix)


def split_tensors(layout: Layout, params: Float32s) -> dict[str, Float32s]:
    """The flat vector as the layout's named tensors; views, not copies."""
    tensors = {}
    for spec, first in zip(layout.tensors, layout.offsets, strict=True):
        tensors[spec.name] = params[first : first + spec.elements].reshape(spec.shape)
    return tensors


def describe_model(model: CertifiedModel) -> dict[str, str]:
    """A file's metadata: the swarm's task, the round and the state root."""
    return {
        "format": "pt",
        "task": model.manifest.task.kind,
        "task_options": model.manifest.task.options,
        "round": str(model.round),
        "state_root": model.state_root.hex(),
    }


def write_model(model: CertifiedModel, out: Path) -> None:
    """Write the safetensors file. Raises ConfigError where it cannot be written."""
    with replacing("--out", out) as temporary:
        save_file(split_tensors(model.manifest.layout, model.params), temporary, metadata=describe_model(model))
