"""Pieces of every kind with one byte flipped, wherever one comes from outside or from the disk: all must be refused.

What is counted is what was believed.
"""

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import uvloop
from blake3 import blake3

from shoal.node.blobs import BlobStore, blob_path
from shoal.node.link_port import FetchFailed, LinkConfig, LinkLost
from shoal.node.links import TensorLinks
from shoal.node.partial_snapshot import PartialSnapshot
from shoal.node.snapshots import SnapshotStore, chunk_offset, read_chunk
from shoal.protocol.errors import ProtocolError, Refusal
from shoal.protocol.frames import FrameHeader
from shoal.protocol.identity import Identity, PeerId
from shoal.protocol.lineage import check_stretch
from shoal.protocol.manifest import genesis_head
from shoal.protocol.messages import Certificate
from shoal.protocol.state import SnapshotIndex, decode_index_untrusted
from shoal.protocol.wire import DELTA_BYTES_MAX, decode_record_untrusted, encode_record
from tests.e2e.certified_log import Log, make_log

ELEMENTS = 600_000
ROUNDS = 3
SNAPSHOT = 2
LINK = LinkConfig(host="127.0.0.1", tick_s=0.05, goodbye_timeout_s=0.2, half_open_per_host_max=32)
ASKER, LIAR = Identity(b"\x01" * 32), Identity(b"\x02" * 32)


class _Sink:
    """The liar's side of a link: serves what it is told to, and takes nothing."""

    def __init__(self) -> None:
        self.blob = memoryview(b"")

    def admit(self, peer: PeerId) -> Refusal | None:
        return None

    def reserve(self, peer: PeerId, header: FrameHeader) -> memoryview | Refusal:
        return Refusal.NOT_PLANNED

    async def complete(self, peer: PeerId, header: FrameHeader, buffer: memoryview) -> None: ...

    def aborted(self, peer: PeerId, header: FrameHeader) -> None: ...

    def refused(self, peer: PeerId, header: FrameHeader) -> None: ...

    async def serve(self, peer: PeerId, digest: bytes) -> memoryview | Refusal | None:
        return self.blob

    def link_up(self, peer: PeerId) -> None: ...

    def link_lost(self, peer: PeerId, reason: object) -> None: ...

    def on_refusal(self, peer: PeerId | None, refusal: Refusal) -> None: ...


def count_refusals(folder: Path, trials: int, seed: int = 1) -> dict[str, dict[str, int]]:
    """For each kind, how many were tried and how many were believed; the trials are shared out evenly."""
    log = make_log(folder / "log", ELEMENTS, ROUNDS, snapshots=[SNAPSHOT], parts=4)
    flipper = _Flipper(log, folder, random.Random(seed))
    kinds: dict[str, Callable[[], bool]] = {
        "part in the blob store": flipper.believes_blob,
        "chunk of a stored snapshot": flipper.believes_chunk,
        "chunk of a snapshot in work": flipper.believes_partial,
        "snapshot index": flipper.believes_index,
        "certificate": flipper.believes_certificate,
    }
    tried, believed = Counter[str](), Counter[str]()
    over_link = trials * 2 // (len(kinds) + 2)
    believed.update(uvloop.run(flipper.believe_over_links(over_link, tried)))
    names = list(kinds)
    for number in range(trials - over_link):
        kind = names[number % len(names)]
        tried[kind] += 1
        believed[kind] += kinds[kind]()
    return {kind: {"tried": tried[kind], "believed": believed[kind]} for kind in tried}


class _Flipper:
    def __init__(self, log: Log, folder: Path, entropy: random.Random) -> None:
        self._log = log
        self._entropy = entropy
        self._folder = folder
        self._blobs = BlobStore(folder / "blobs")
        store = SnapshotStore(log.folder / "snapshots")
        snapshot = store.get(SNAPSHOT)
        assert snapshot is not None
        self._snapshot = snapshot
        self._raw = bytearray(snapshot.path.read_bytes())
        self._index = snapshot.index
        PartialSnapshot(folder / "catchup", self._index).close()
        self._partial = PartialSnapshot(folder / "catchup", self._index)  # one that is found after a restart
        chunks = [read_chunk(snapshot, number) for number in range(self._index.chunks)]
        self._chunks = [chunk for chunk in chunks if chunk is not None]
        assert len(self._chunks) == self._index.chunks
        parts = log.certificates[0].result.parts
        self._parts = [blob_path(log.folder / "blobs", part.digest).read_bytes() for part in parts]
        self._authority = log.manifest.authority(log.swarm)
        self._genesis = genesis_head(log.manifest, log.swarm, log.roots[0])

    def _flip(self, raw: bytes | bytearray | memoryview) -> bytes:
        changed = bytearray(raw)
        changed[self._entropy.randrange(len(changed))] ^= self._entropy.randrange(1, 256)
        return bytes(changed)

    def believes_blob(self) -> bool:
        raw = self._entropy.choice(self._parts)
        digest = blake3(raw).digest()
        self._blobs.write(digest, raw)
        blob_path(self._folder / "blobs", digest).write_bytes(self._flip(raw))
        return self._blobs.read(digest) is not None

    def believes_chunk(self) -> bool:
        """Of the file of a snapshot: the flipped byte lies in a chunk that is then asked for."""
        number = self._entropy.randrange(self._index.chunks)
        raw = self._chunks[number]
        place = self._snapshot.data_start + chunk_offset(self._index, number)
        at = place + self._entropy.randrange(len(raw))
        with self._snapshot.path.open("r+b") as file:
            file.seek(at)
            file.write(bytes([self._raw[at] ^ self._entropy.randrange(1, 256)]))
        believed = read_chunk(self._snapshot, number) is not None
        with self._snapshot.path.open("r+b") as file:
            file.seek(at)
            file.write(self._raw[at : at + 1])
        return believed

    def believes_partial(self) -> bool:
        """A restart finds a chunk in the file that is not what it was."""
        number = self._entropy.randrange(self._index.chunks)
        self._partial.write(number, memoryview(self._flip(self._chunks[number])))
        return number in self._partial.find_held()

    def believes_index(self) -> bool:
        raw = self._flip(encode_record(self._index))
        try:
            index: SnapshotIndex = decode_index_untrusted(raw)
            index.verify(self._log.certificates[SNAPSHOT].result.base_root)
        except ProtocolError:
            return False
        return True

    def believes_certificate(self) -> bool:
        number = self._entropy.randrange(ROUNDS)
        raw = self._flip(encode_record(self._log.certificates[number]))
        try:
            changed = decode_record_untrusted(Certificate, raw, DELTA_BYTES_MAX)
            chain = (*self._log.certificates[:number], changed)
            check_stretch(self._genesis.digest, self._genesis.voters, chain, self._authority)
        except ProtocolError:
            return False
        return True

    async def believe_over_links(self, trials: int, tried: Counter[str]) -> Counter[str]:
        """Parts and chunks that a donor serves over a tensor link. Every lie ends the link; the next dials anew."""
        sink, believed = _Sink(), Counter[str]()
        liar = TensorLinks(LIAR, self._log.swarm, LINK, sink)
        address = await liar.start()
        for number in range(trials):
            asker = TensorLinks(ASKER, self._log.swarm, LINK, _Sink())
            await asker.start()
            kind, raw = (
                ("part over a link", self._entropy.choice(self._parts))
                if number % 2
                else ("chunk over a link", self._entropy.choice(self._chunks))
            )
            tried[kind] += 1
            sink.blob = memoryview(self._flip(raw))
            into = memoryview(bytearray(len(raw)))
            try:
                await asker.fetch(LIAR.peer, (address,), blake3(raw).digest(), into, 10.0)
                believed[kind] += 1
            except (FetchFailed, LinkLost):
                pass
            await asker.stop()
        await liar.stop()
        return believed
