"""Entries of the ledger and the signed batches in which they travel and are stored.

An entry's id is the BLAKE3 hash of its canonical bytes, and an entry names its author's previous entry and the entries
of others that its author had seen, all by id and all of its own era: the ledger is a hash DAG (Kleppmann, PaPoC 2022).

A batch is a run of consecutive entries of one author with one signature, over the id of the *last* of them. As each
entry's id covers `prev`, that signature vouches for every earlier entry as well. Hence whoever holds an entry and the
rest of its batch can prove it to anybody, and the end of a batch is a batch again: a replica that knows the first
entries already keeps the others under the same signature.

Invariant: a Batch, however it came to be, has entries that are consecutive, of one author, era and swarm, because the
wire form states these once and the decoder derives the rest. Only its signature and its ancestors remain to be checked.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated

from blake3 import blake3

from shoal.crdt.clock import HLC_MAX, Hlc
from shoal.crdt.eras import FIRST_ERA, PERMANENT_ERA
from shoal.crdt.kinds import CERTIFICATE_BYTES_MAX, ENTRY_ID_BYTES, KIND_RULES, EntryId, decode_body_untrusted
from shoal.protocol.errors import ProtocolError, Refusal
from shoal.protocol.identity import PEER_ID_BYTES, Identity, PeerId, verify_signature
from shoal.protocol.wire import U16, U32, U63, Bound, Bytes32, Bytes64, decode_record_untrusted, encode_record

ENTRY_VERSION = 2  # 1 had no eras
ENTRIES_PER_BATCH_MAX = 64
DEPS_MAX = 8
# Room for the largest certificate.
BATCH_BYTES_MAX = 68 * 1024
# A peer enters at most one lease and every certificate of an era, each once; an owner has few decrees.
ENTRIES_PER_ERA_MAX = 65_536
DECREES_MAX = 1024
NO_ENTRY = EntryId(bytes(ENTRY_ID_BYTES))
SIGNATURE_DOMAIN = "ledger"
# An entry with its ids and its places in the indices.
_ENTRY_OVERHEAD_BYTES = 1024

_EntryIdField = Annotated[EntryId, Bound(ENTRY_ID_BYTES, ENTRY_ID_BYTES)]
_PeerIdField = Annotated[PeerId, Bound(PEER_ID_BYTES, PEER_ID_BYTES)]
_DepsField = Annotated[tuple[_EntryIdField, ...], Bound(0, DEPS_MAX)]
_HlcField = Annotated[Hlc, Bound(0, HLC_MAX)]
_KindField = Annotated[str, Bound(1, 16)]
_BodyField = Annotated[bytes, Bound(0, CERTIFICATE_BYTES_MAX)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One operation of one author. `seq` is dense from 0 in each era, `prev` is the author's entry before it in the era
    or NO_ENTRY."""

    version: U16
    swarm: Bytes32
    author: _PeerIdField
    era: U32
    seq: U63
    prev: _EntryIdField
    deps: _DepsField
    hlc: _HlcField
    kind: _KindField
    body: _BodyField


@dataclass(frozen=True, slots=True, kw_only=True)
class EntryContent:
    """What distinguishes an entry from its neighbours in a batch. `deps` are in ascending order, none twice."""

    deps: _DepsField
    hlc: _HlcField
    kind: _KindField
    body: _BodyField


@dataclass(frozen=True, slots=True, kw_only=True)
class _WireBatch:
    version: U16
    swarm: Bytes32
    author: _PeerIdField
    era: U32
    seq: U63
    prev: _EntryIdField
    contents: Annotated[tuple[EntryContent, ...], Bound(1, ENTRIES_PER_BATCH_MAX)]
    signature: Bytes64


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Consecutive entries of one author, their ids, and the author's signature over the last id.

    Made by `sign_batch`, `decode_batch_untrusted` and `suffix` only; `verify_batch` checks the signature.
    """

    entries: tuple[Entry, ...]
    ids: tuple[EntryId, ...]
    signature: bytes

    @property
    def swarm(self) -> bytes:
        return self.entries[0].swarm

    @property
    def author(self) -> PeerId:
        return self.entries[0].author

    @property
    def era(self) -> int:
        return self.entries[0].era

    @property
    def tip(self) -> EntryId:
        return self.ids[-1]

    def suffix(self, start: int) -> "Batch":
        """The batch without its first `start` entries; the signature holds for it as it stands."""
        assert 0 <= start < len(self.entries), "a batch has at least one entry"
        return Batch(entries=self.entries[start:], ids=self.ids[start:], signature=self.signature)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainPosition:
    """Where an author's chain of one era goes on: the next sequence number, the id and the time of the entry before."""

    seq: int
    prev: EntryId
    hlc: Hlc
    era: int = FIRST_ERA


def compute_entry_id(entry: Entry) -> EntryId:
    """The BLAKE3 hash of the entry's canonical bytes."""
    return EntryId(blake3(encode_record(entry)).digest())


def sign_batch(identity: Identity, swarm: bytes, start: ChainPosition, contents: Sequence[EntryContent]) -> Batch:
    """The entries with these contents from `start` on in the identity's chain.

    The caller must never sign two batches that differ in an entry of the same sequence number: that is equivocation.
    Raises ProtocolError if another peer would refuse to decode the result.
    """
    assert contents, "a batch has at least one entry"
    entries, ids = _chain(swarm, identity.peer, start, contents)
    signature = identity.sign(SIGNATURE_DOMAIN, swarm, ids[-1])
    batch = Batch(entries=entries, ids=ids, signature=signature)
    decode_batch_untrusted(encode_batch(batch))
    return batch


def verify_batch(batch: Batch) -> None:
    """Raise ProtocolError(BAD_SIGNATURE) unless the author vouches for these entries."""
    verify_signature(batch.author, SIGNATURE_DOMAIN, batch.swarm, batch.tip, batch.signature)


def encode_batch(batch: Batch) -> bytes:
    """The canonical bytes of a batch."""
    first = batch.entries[0]
    return encode_record(
        _WireBatch(
            version=first.version,
            swarm=first.swarm,
            author=first.author,
            era=first.era,
            seq=first.seq,
            prev=first.prev,
            contents=tuple(
                EntryContent(deps=entry.deps, hlc=entry.hlc, kind=entry.kind, body=entry.body)
                for entry in batch.entries
            ),
            signature=batch.signature,
        )
    )


def decode_batch_untrusted(raw: bytes | memoryview) -> Batch:
    """The batch in `raw`, well formed, signature and ancestors unchecked; raises ProtocolError and nothing else."""
    wire = decode_record_untrusted(_WireBatch, raw, BATCH_BYTES_MAX)
    if wire.version != ENTRY_VERSION:
        raise ProtocolError(Refusal.WRONG_VERSION, f"entry version {wire.version}, this is {ENTRY_VERSION}")
    if (wire.seq == 0) != (wire.prev == NO_ENTRY):
        raise ProtocolError(Refusal.MALFORMED, "only an author's first entry has no previous one")
    is_permanent = wire.era == PERMANENT_ERA
    entries_max = DECREES_MAX if is_permanent else ENTRIES_PER_ERA_MAX
    if wire.seq + len(wire.contents) > entries_max:
        raise ProtocolError(Refusal.OUT_OF_RANGE, f"an author writes at most {entries_max} entries an era")
    hlc = -1
    for content in wire.contents:
        if content.hlc <= hlc:
            raise ProtocolError(Refusal.MALFORMED, "entry times do not increase along the chain")
        # NO_ENTRY, the lowest of ids, in front refuses it as a dependency.
        if any(left >= right for left, right in pairwise((NO_ENTRY, *content.deps))):
            raise ProtocolError(Refusal.NON_CANONICAL, "dependencies are not ids in ascending order")
        decode_body_untrusted(content.kind, content.body)
        if KIND_RULES[content.kind].is_owners is not is_permanent:
            raise ProtocolError(Refusal.MALFORMED, f"an entry of kind {content.kind} in era {wire.era}")
        hlc = content.hlc
    start = ChainPosition(seq=wire.seq, prev=wire.prev, hlc=wire.contents[0].hlc, era=wire.era)
    entries, ids = _chain(wire.swarm, wire.author, start, wire.contents)
    return Batch(entries=entries, ids=ids, signature=wire.signature)


def measure_entry_bytes(entry: Entry) -> int:
    """About what an entry occupies in memory, in bytes."""
    return _ENTRY_OVERHEAD_BYTES + ENTRY_ID_BYTES * len(entry.deps) + len(entry.body)


def measure_batch_bytes(batch: Batch) -> int:
    """About what the batch occupies in memory, in bytes: what limits count."""
    return sum(map(measure_entry_bytes, batch.entries))


def _chain(
    swarm: bytes, author: PeerId, start: ChainPosition, contents: Sequence[EntryContent]
) -> tuple[tuple[Entry, ...], tuple[EntryId, ...]]:
    entries: list[Entry] = []
    ids = [start.prev]
    for seq, content in enumerate(contents, start.seq):
        entry = Entry(
            version=ENTRY_VERSION,
            swarm=swarm,
            author=author,
            era=start.era,
            seq=seq,
            prev=ids[-1],
            deps=content.deps,
            hlc=content.hlc,
            kind=content.kind,
            body=content.body,
        )
        entries.append(entry)
        ids.append(compute_entry_id(entry))
    return tuple(entries), tuple(ids[1:])
