"""What one data folder keeps of the log, read without changing it: any retained round can be rebuilt from it.

Works beside a running daemon and on the folder of a stopped one. A round is rebuilt from the newest snapshot before it
(or from round 0) by the certified updates in between; every piece is checked on the way.

Invariant: a state that `rebuild` returns follows, certificate by certificate, from the snapshot that it began with, and
that snapshot has the root which the next certificate names, if there is one.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from blake3 import blake3

from shoal.node.blobs import blob_path
from shoal.node.certificate_source import CertificateSource, open_certificates
from shoal.node.config import MANIFEST_FILE
from shoal.node.manifest_source import read_manifest_file
from shoal.node.output_files import writing
from shoal.node.snapshots import SnapshotStore, load_snapshot
from shoal.protocol.errors import ConfigError, ProtocolError, ShoalError
from shoal.protocol.manifest import Manifest, genesis_head, read_manifest_untrusted
from shoal.protocol.messages import Certificate, Result, digest_record
from shoal.protocol.quorum import Head, check_certificate
from shoal.protocol.replica import Replica


class ArchiveError(ShoalError):
    """A round cannot be rebuilt from this folder: the text says what is missing or damaged."""


@dataclass(slots=True, kw_only=True)
class RebuiltState:
    """The state after a round, and where its rebuilding began. It can be led on, update by update."""

    replica: Replica
    head: Head
    start: int


class Archive:
    """One folder. Everything blocks."""

    def __init__(self, data_dir: Path, certificates: CertificateSource) -> None:
        self.signed_manifest, self.swarm = read_manifest_file(data_dir / MANIFEST_FILE)
        self.manifest: Manifest = read_manifest_untrusted(self.signed_manifest, self.swarm)[0]
        self.certificates = certificates
        self.snapshots = SnapshotStore(data_dir / "snapshots")
        self._blobs = data_dir / "blobs"

    def certificate(self, number: int) -> Certificate:
        """Raises ArchiveError where there is none that can be read."""
        try:
            found = self.certificates.get(number)
        except ProtocolError as error:
            raise ArchiveError(f"the certificate of round {number} is damaged: {error}") from error
        if found is None:
            raise ArchiveError(f"there is no certificate of round {number} here")
        return found

    def read_part(self, digest: bytes) -> bytes | None:
        """The bytes of an update's part, whatever they hash to."""
        try:
            return blob_path(self._blobs, digest).read_bytes()
        except OSError:
            return None

    def rebuild(self, number: int) -> RebuiltState:
        """The state after round `number`. Raises ArchiveError, ConfigError where there is no such round."""
        if not 0 <= number <= self.certificates.newest:
            newest = self.certificates.newest
            raise ConfigError("--round", f"{number} is not certified here", f"give a round from 0 to {newest}")
        starts = [one for one in reversed(self.snapshots.rounds()) if one <= number]
        usable = (state for start in starts if (state := self._load(start, number)) is not None)
        state = next(usable, None) or self._begin(number)
        while state.head.round < number:
            self.advance(state)
        return state

    def advance(self, state: RebuiltState) -> None:
        """Apply the next certified update. Raises ArchiveError; the state is then of no use any more."""
        number = state.head.round + 1
        certificate = self.certificate(number)
        try:
            check_certificate(certificate, state.head, self.manifest.authority(self.swarm))
            root = state.replica.apply(certificate.result, self.read_update(certificate.result, state.start))
        except ProtocolError as error:
            raise ArchiveError(f"the certified round {number} does not follow round {number - 1}: {error}") from error
        state.head = make_head(certificate.result, root)

    def read_update(self, result: Result, start: int) -> dict[bytes, bytes]:
        """A round's parts by digest. Raises ArchiveError naming the first that is missing or damaged; `start` is where
        the rebuilding began."""
        encoded = {}
        for part, one in self.manifest.match_parts(result):
            raw = self.read_part(one.digest)
            if raw is None:
                gone = f"part {part} of round {result.round} is not on this disk"
                raise ArchiveError(f"{gone}, and the newest snapshot before it is of round {start}")
            if blake3(raw).digest() != one.digest:
                raise ArchiveError(f"part {part} of round {result.round} is damaged on this disk")
            encoded[one.digest] = raw
        return encoded

    def _check_updates(self, start: int, number: int) -> None:
        """Raise ArchiveError where a part of the updates in between is not on this disk: before anything is read."""
        for between in range(start + 1, number + 1):
            for part, one in self.manifest.match_parts(self.certificate(between).result):
                if not blob_path(self._blobs, one.digest).exists():
                    gone = f"part {part} of round {between} is not on this disk"
                    raise ArchiveError(f"{gone}, and the newest snapshot before it is of round {start}")

    def _begin(self, number: int) -> RebuiltState:
        """Round 0."""
        self._check_updates(0, number)
        replica = self._allocate(0)
        return RebuiltState(replica=replica, head=genesis_head(self.manifest, self.swarm, replica.reset()), start=0)

    def _load(self, start: int, number: int) -> RebuiltState | None:
        """The state of a snapshot; None where it cannot be used. Raises ArchiveError where the updates from it to round
        `number` are not all here."""
        self._check_updates(start, number)
        snapshot = self.snapshots.get(start)
        assert snapshot is not None, "one of its rounds"
        own = self.certificate(start)
        if start < self.certificates.newest and self.certificate(start + 1).result.base_root != snapshot.index.root:
            return None
        replica = self._allocate(start)
        if not load_snapshot(snapshot, replica.params, replica.momentum):
            return None
        return RebuiltState(replica=replica, head=make_head(own.result, snapshot.index.root), start=start)

    def _allocate(self, start: int) -> Replica:
        params, momentum = (np.zeros(self.manifest.layout.elements, np.float32) for _ in range(2))
        return Replica(self.manifest, params, momentum, start)


def make_head(result: Result, root: bytes) -> Head:
    """The head that a result leads to."""
    return Head(round=result.round, digest=digest_record(result), state_root=root, voters=result.voters)


@contextmanager
def open_archive(data_dir: Path) -> Iterator[Archive]:
    """The archive of a peer's folder; raises ConfigError and StoreError."""
    if not (data_dir / MANIFEST_FILE).exists():
        fix = "give the --data-dir of a peer that has taken part in a swarm"
        raise ConfigError("--data-dir", f"{data_dir} holds no manifest", fix)
    with open_certificates(data_dir) as certificates:
        yield Archive(data_dir, certificates)


def write_checkout(archive: Archive, number: int, out: Path) -> RebuiltState:
    """Rebuild a round and write it as a snapshot, with the signed manifest beside it. Raises ArchiveError, and
    ConfigError where it cannot be written."""
    state = archive.rebuild(number)
    with writing("--out", out):
        SnapshotStore(out).write(state.replica.index(), state.replica.params, state.replica.momentum)
        (out / MANIFEST_FILE).write_bytes(archive.signed_manifest)
    return state
