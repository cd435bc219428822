"""Certified logs without training: made-up updates, applied and signed by production code, in data folders of peers."""

import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from blake3 import blake3

from shoal.node.blobs import BlobStore, blob_path
from shoal.node.config import MANIFEST_FILE
from shoal.node.ledger_store import LedgerStore, StoredCertificate
from shoal.node.snapshots import SnapshotStore
from shoal.protocol.codecs import BLOCK_ELEMENTS, CODECS
from shoal.protocol.identity import Identity, PeerId
from shoal.protocol.layout import Layout, TensorSpec
from shoal.protocol.manifest import (
    Draft,
    Manifest,
    Rounds,
    Task,
    genesis_head,
    make_manifest,
    read_manifest_untrusted,
    sign_manifest,
)
from shoal.protocol.messages import (
    Certificate,
    Member,
    PartResult,
    Result,
    Vote,
    digest_record,
    sign_message,
)
from shoal.protocol.quorum import Head, make_bitmap
from shoal.protocol.replica import Replica
from shoal.protocol.state import chunk_digests, state_root
from shoal.protocol.wire import encode_record

FOUNDERS = tuple(Identity(bytes([number]) * 32) for number in (201, 202, 203))  # who certifies; none of them runs
PART_ELEMENTS_MAX = 1 << 20  # the manifest's
CODEC = CODECS["int8"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Log:
    """Rounds 1 .. head, with the updates of `updates_from` and later ones and some snapshots, in `folder`."""

    folder: Path
    signed: bytes
    swarm: bytes
    manifest: Manifest
    certificates: tuple[Certificate, ...]
    roots: tuple[bytes, ...]  # by round, from round 0 on
    updates_from: int
    snapshots: tuple[int, ...]

    @property
    def head(self) -> int:
        return len(self.certificates)

    @property
    def update_bytes(self) -> int:
        ranges = map(self.manifest.part_range, range(self.manifest.parts))
        return sum(CODEC.encoded_bytes(end - first) for first, end in ranges)


def make_log(
    folder: Path, elements: int, rounds: int, *, updates_from: int = 1, snapshots: Iterable[int] = (), parts: int = 128
) -> Log:
    """Make one. Rounds before `updates_from` change the voters' order and nothing else, so that a long log is made
    quickly."""
    part_elements = min(max(1024, -(-elements // parts // BLOCK_ELEMENTS) * BLOCK_ELEMENTS), PART_ELEMENTS_MAX)
    rules = Rounds(part_elements=part_elements, presence_period_s=0.5, presence_timeout_s=8.0, rounds_kept=1000)
    layout = Layout(tensors=(TensorSpec(name="w", shape=(elements,), init="uniform", std=0.02),))
    draft = Draft(name="log", task=Task(kind="none"), seed=5, rounds=rules)
    founders = tuple(one.peer for one in FOUNDERS)
    signed = sign_manifest(make_manifest(draft, layout, FOUNDERS[0].peer, founders), FOUNDERS[0])
    manifest, swarm = read_manifest_untrusted(signed)
    kept = tuple(sorted(snapshots))
    maker = _Maker(folder, manifest, swarm)
    for number in range(1, rounds + 1):
        if number < updates_from:
            maker.add_empty(number)
        else:
            maker.add(number)
        if number in kept:
            maker.snapshots.write(maker.replica.index(), maker.replica.params, maker.replica.momentum)
    return Log(
        folder=folder,
        signed=signed,
        swarm=swarm,
        manifest=manifest,
        certificates=tuple(maker.certificates),
        roots=tuple(maker.roots),
        updates_from=updates_from,
        snapshots=kept,
    )


class _Maker:
    def __init__(self, folder: Path, manifest: Manifest, swarm: bytes) -> None:
        elements = manifest.layout.elements
        self.blobs = BlobStore(folder / "blobs")
        self.snapshots = SnapshotStore(folder / "snapshots")
        self.replica = Replica(manifest, np.zeros(elements, np.float32), np.zeros(elements, np.float32))
        self.certificates: list[Certificate] = []
        self._manifest = manifest
        self._swarm = swarm
        self._digests: tuple[bytes, bytes] | None = None
        self._head = genesis_head(manifest, swarm, self.replica.reset())
        self.roots = [self._head.state_root]
        entropy = np.random.default_rng(7)
        sizes = {end - first for first, end in map(manifest.part_range, range(manifest.parts))}
        noise = {size: entropy.standard_normal(size, dtype=np.float32) * np.float32(1e-3) for size in sizes}
        self._pattern = {size: bytes(CODEC.encode(values)) for size, values in noise.items()}

    def add_empty(self, number: int) -> None:
        """The vectors stay as they are, and with them their digests."""
        replica = self.replica
        if self._digests is None:
            self._digests = chunk_digests(replica.params), chunk_digests(replica.momentum)
        replica.round = number
        voters = (*self._head.voters[1:], self._head.voters[0])
        result = self._make_result(number, (), (), voters)
        self._append(result, state_root(number, replica.params.size, *self._digests))

    def add(self, number: int) -> None:
        """A round with an update of its own."""
        self._digests = None
        encoded: dict[bytes, bytes] = {}
        digests = []
        for part in range(self._manifest.parts):
            first, end = self._manifest.part_range(part)
            raw = bytearray(self._pattern[end - first])
            # The last codes tell parts and rounds from each other.
            raw[-4:] = bytes(value % 100 for value in (part, part // 100, number, number // 100))
            digest = blake3(raw).digest()
            encoded[digest] = bytes(raw)
            digests.append(digest)
            self.blobs.write(digest, memoryview(raw))
        bitmap = make_bitmap(frozenset({0}), 1)
        member = Member(peer=FOUNDERS[0].peer, contribution_root=bytes(32), tokens=1000, steps=10, weight=1.0)
        parts = tuple(PartResult(digest=digest, contributors=bitmap) for digest in digests)
        result = self._make_result(number, (member,), parts, self._head.voters)
        self._append(result, self.replica.apply(result, encoded))

    def _make_result(
        self, number: int, members: tuple[Member, ...], parts: tuple[PartResult, ...], voters: tuple[PeerId, ...]
    ) -> Result:
        return Result(
            round=number,
            previous=self._head.digest,
            base_root=self._head.state_root,
            codec="int8",
            members=members,
            parts=parts,
            voters=voters,
        )

    def _append(self, result: Result, root: bytes) -> None:
        number, digest = result.round, digest_record(result)
        votes = tuple(
            sign_message(one, self._swarm, Vote(voter=one.peer, round=number, attempt=0, result_digest=digest))
            for one in FOUNDERS
        )
        self.certificates.append(Certificate(result=result, attempt=0, votes=votes))
        self.roots.append(root)
        self._head = Head(round=number, digest=digest, state_root=root, voters=result.voters)


def fill_folder(log: Log, folder: Path, head: int, *, updates_after: int = 0, snapshots: Iterable[int] = ()) -> None:
    """What the disk of a peer holds that stands at `head`, with the updates of later rounds than `updates_after`. Large
    files are linked, not copied."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST_FILE).write_bytes(log.signed)
    with LedgerStore.open(folder / "ledger.sqlite") as ledger:
        for certificate in log.certificates[:head]:
            result = certificate.result
            stored = StoredCertificate(
                round=result.round, result_digest=digest_record(result), body=encode_record(certificate)
            )
            ledger.put_certificate(stored)
    (folder / "snapshots").mkdir(exist_ok=True)
    for number in snapshots:
        for suffix in ("safetensors", "index"):
            name = f"{number:08d}.{suffix}"
            os.link(log.folder / "snapshots" / name, folder / "snapshots" / name)
    for certificate in log.certificates[max(log.updates_from - 1, updates_after) : head]:
        for part in certificate.result.parts:
            place = blob_path(folder / "blobs", part.digest)
            place.parent.mkdir(parents=True, exist_ok=True)
            os.link(blob_path(log.folder / "blobs", part.digest), place)


def spoil(raw: memoryview, place: int) -> memoryview:
    """The same bytes with one flipped."""
    changed = bytearray(raw)
    changed[place % len(changed)] ^= 0xFF
    return memoryview(changed)


def forget(folder: Path) -> None:
    """Remove a peer's folder."""
    shutil.rmtree(folder, ignore_errors=True)
