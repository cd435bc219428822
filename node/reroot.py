"""The owner's word when a quorum of voters is gone for good: the next round is without an update and names new voters.

It is written into the folder of a peer that is not running; when that peer is started again, everybody who is left gets
it by catch-up, and the swarm goes on. If the old voters were not gone after all, there are two logs, and the one with
more certified tokens stays (protocol.lineage).
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shoal.node.blobs import BlobStore
from shoal.node.config import MANIFEST_FILE
from shoal.node.identity_file import load_identity
from shoal.node.ledger_store import LedgerStore
from shoal.node.local_state import LocalState, Stores
from shoal.node.manifest_source import read_manifest_file
from shoal.node.repair import end_abstention
from shoal.node.snapshots import SnapshotStore
from shoal.protocol.errors import ConfigError
from shoal.protocol.identity import Identity, PeerId
from shoal.protocol.manifest import read_manifest_untrusted
from shoal.protocol.messages import VOTERS_MAX, Certificate, Vote, digest_record, sign_message
from shoal.protocol.proposer import make_voters_result
from shoal.protocol.quorum import REROOT_ATTEMPT, Head, check_certificate

OWNER_KEY_FILE = "owner.key"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reroot:
    """What was signed: the round, the voters before and after it."""

    round: int
    old_voters: tuple[PeerId, ...]
    voters: tuple[PeerId, ...]


def sign_reroot(data_dir: Path, owner_key: Path, voters: tuple[PeerId, ...]) -> Reroot:
    """Write the owner's re-root into a peer's folder; raises ConfigError, StoreError."""
    manifest_path = data_dir / MANIFEST_FILE
    if not manifest_path.exists():
        fix = "give the --data-dir of a peer that has taken part in the swarm"
        raise ConfigError("--data-dir", f"{data_dir} holds no manifest", fix)
    if not owner_key.exists():
        raise ConfigError("--owner-key", f"{owner_key} does not exist", "give the key that `shoal swarm create` made")
    if not 1 <= len(voters) <= VOTERS_MAX:
        raise ConfigError("--voter", f"names {len(voters)} peers", f"name 1 to {VOTERS_MAX} peers that are there")
    signed, swarm = read_manifest_file(manifest_path)
    manifest, _ = read_manifest_untrusted(signed, swarm)
    owner = load_identity(owner_key)
    if owner.peer != manifest.owner:
        fix = "give the key that `shoal swarm create` made for this swarm"
        raise ConfigError("--owner-key", f"{owner_key} is not the key of this swarm's owner", fix)
    params, momentum = (np.zeros(manifest.layout.elements, np.float32) for _ in range(2))
    with LedgerStore.open(data_dir / "ledger.sqlite") as ledger:
        snapshots = SnapshotStore(data_dir / "snapshots")
        stores = Stores(ledger=ledger, blobs=BlobStore(data_dir / "blobs"), snapshots=snapshots, snapshots_kept=1)
        state = LocalState(manifest, swarm, stores, params, momentum)
        head = state.restore_now()
        certificate = _certify(owner, swarm, head, manifest.rounds.codec_out, voters)
        check_certificate(certificate, head, manifest.authority(swarm))
        state.save_certificate(certificate)
        # Nothing that was signed before can be of the log that begins here.
        end_abstention(ledger)
        ledger.accept_loss()
    return Reroot(round=head.round + 1, old_voters=head.voters, voters=voters)


def _certify(owner: Identity, swarm: bytes, head: Head, codec: str, voters: tuple[PeerId, ...]) -> Certificate:
    result = make_voters_result(head, codec, voters)
    vote = Vote(voter=owner.peer, round=result.round, attempt=REROOT_ATTEMPT, result_digest=digest_record(result))
    return Certificate(result=result, attempt=REROOT_ATTEMPT, votes=(sign_message(owner, swarm, vote),))
