"""Invitations at the edge of the program: the owner makes one, a joiner takes it from its URI and keeps the proof.

What a joiner keeps is the proof for its own peer id, not the ticket: whoever reads the file cannot let others in with
it. Invariant: the file is never readable by others and never half written.
"""

import logging
import os
import secrets
import time
from pathlib import Path

from shoal.node.config import NodeConfig
from shoal.node.decrees import load_swarm
from shoal.node.durability import sync_path
from shoal.node.running import read_running
from shoal.node.status import StatusError, fetch_status
from shoal.protocol.admission import (
    AdmissionProof,
    AdmissionRule,
    Ticket,
    is_expired,
    issue_ticket,
    prove_admission,
    verify_proof,
)
from shoal.protocol.errors import ConfigError, InputError, ProtocolError
from shoal.protocol.identity import SEED_BYTES, PeerId
from shoal.protocol.manifest import Manifest, SwarmUri, parse_uri
from shoal.protocol.wire import decode_record_untrusted, encode_record

PROOF_FILE = "invitation"
DAYS_DEFAULT = 30
DAYS_MAX = 3650
DAY_S = 86_400
_FILE_BYTES_MAX = 1024

log = logging.getLogger("shoal")


def make_invitation(data_dir: Path, owner_key: Path, bootstraps: tuple[str, ...], days: float) -> SwarmUri:
    """A URI that lets whoever has it in, for so many days; raises ConfigError."""
    owned = load_swarm(data_dir, owner_key)
    rule = owned.manifest.admission_rule
    if rule is not AdmissionRule.INVITED:
        fix = "use `shoal swarm admit PEER_ID`" if rule is AdmissionRule.LISTED else "give others the plain URI"
        raise ConfigError("admission.rule", f'is "{rule}": nobody is asked for an invitation', fix)
    if not 0 < days <= DAYS_MAX:
        raise ConfigError("--days", f"{days:g} is out of range", f"use more than 0, and at most {DAYS_MAX}")
    expires_s = int(time.time() + days * DAY_S)
    ticket = issue_ticket(owned.owner, owned.swarm, secrets.token_bytes(SEED_BYTES), expires_s)
    return SwarmUri(swarm=owned.swarm, bootstraps=bootstraps, ticket=ticket)


def find_bootstraps(data_dir: Path) -> tuple[str, ...]:
    """Where the running peer of this folder can be reached; nothing when none runs."""
    try:
        status = fetch_status(*read_running(data_dir))
    except (InputError, StatusError):
        return ()
    return parse_uri(status.uri).bootstraps


def load_proof(config: NodeConfig, me: PeerId, manifest: Manifest, swarm: bytes) -> AdmissionProof | None:
    """What this peer shows to others: the proof from the URI, or else that of an earlier start. Raises ConfigError for
    an invitation in the URI that is none of this swarm's owner."""
    if manifest.admission_rule is not AdmissionRule.INVITED:
        return None
    uri = parse_uri(config.node.swarm) if config.node.swarm else None
    if uri is None or uri.ticket is None:
        proof = _read_proof(config.data_path / PROOF_FILE, me, manifest, swarm)
    else:
        proof = _prove(uri.ticket, me, manifest, swarm)
        _write_proof(config.data_path / PROOF_FILE, proof)
    if proof is not None and is_expired(proof.invitation, time.time()):
        log.warning("the invitation of this peer has ended; ask the swarm's owner for another one")
    return proof


def _prove(ticket: Ticket, me: PeerId, manifest: Manifest, swarm: bytes) -> AdmissionProof:
    proof = prove_admission(ticket, swarm, me)
    try:
        verify_proof(proof, me, manifest.owner, swarm)
    except ProtocolError as error:
        fix = "copy the URI whole, or ask the owner for another one"
        raise ConfigError("node.swarm", "the invitation is not signed by this swarm's owner", fix) from error
    return proof


def _read_proof(path: Path, me: PeerId, manifest: Manifest, swarm: bytes) -> AdmissionProof | None:
    try:
        with path.open("rb") as file:
            proof = decode_record_untrusted(AdmissionProof, file.read(_FILE_BYTES_MAX))
        verify_proof(proof, me, manifest.owner, swarm)
    except FileNotFoundError:
        return None
    except (OSError, ProtocolError) as error:
        log.warning("%s is of no use (%s); join with the invitation's URI again", path, error)
        return None
    return proof


def _write_proof(path: Path, proof: AdmissionProof) -> None:
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(encode_record(proof))
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
        sync_path(path.parent)
    except OSError as error:
        raise ConfigError(str(path), f"cannot be written: {error.strerror}", "check the folder's rights") from error
    finally:
        draft.unlink(missing_ok=True)
