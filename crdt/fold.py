"""The fold: from a set of ledger entries to the replicated state that the rest of the node reads.

Invariant: the state is a function of the set of entries that were applied, whatever their order, and `encode` gives the
same bytes wherever the state is the same.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import assert_never

from blake3 import blake3

from shoal.crdt.entries import Entry
from shoal.crdt.kinds import EntryId, Kind, RegisterBody, RoundBody, TagBody, VersionedBody, decode_body_untrusted
from shoal.crdt.merge import (
    AuthorRegister,
    GrowOnlyMap,
    GrowOnlySet,
    ObservedRemoveSet,
    OwnerRegister,
    OwnerValue,
    RegisterValue,
    RoundPredicate,
    Tag,
)
from shoal.protocol.identity import PeerId
from shoal.protocol.wire import U63, Bytes32, encode_record


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerState:
    """The replicated state at one time. Nobody may change the mappings; a later fold makes new ones.

    `excluded` maps an author that equivocated to the sequence number from which on nothing of it counts.
    """

    leases: Mapping[PeerId, RegisterValue]
    addresses: Mapping[PeerId, RegisterValue]
    certificates: Mapping[int, bytes]
    snapshots: Mapping[int, tuple[bytes, ...]]
    tags: tuple[Tag, ...]
    manifest: OwnerValue | None
    reroot: OwnerValue | None
    excluded: Mapping[PeerId, int]

    def encode(self) -> bytes:
        """Canonical bytes of the whole state."""
        return encode_record(
            _StateRecord(
                leases=_list_registers(self.leases),
                addresses=_list_registers(self.addresses),
                certificates=tuple(
                    _RoundRecord(round=number, values=(value,)) for number, value in sorted(self.certificates.items())
                ),
                snapshots=tuple(
                    _RoundRecord(round=number, values=values) for number, values in sorted(self.snapshots.items())
                ),
                tags=self.tags,
                manifest=self.manifest,
                reroot=self.reroot,
                excluded=tuple(
                    _ExcludedRecord(author=author, seq=seq) for author, seq in sorted(self.excluded.items())
                ),
            )
        )

    def digest(self) -> bytes:
        """BLAKE3 of `encode`: equal at two peers whose states are equal."""
        return blake3(self.encode()).digest()


@dataclass(frozen=True, slots=True, kw_only=True)
class _RegisterRecord:
    author: Bytes32
    value: RegisterValue


@dataclass(frozen=True, slots=True, kw_only=True)
class _RoundRecord:
    round: U63
    values: tuple[bytes, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _ExcludedRecord:
    author: Bytes32
    seq: U63


@dataclass(frozen=True, slots=True, kw_only=True)
class _StateRecord:
    leases: tuple[_RegisterRecord, ...]
    addresses: tuple[_RegisterRecord, ...]
    certificates: tuple[_RoundRecord, ...]
    snapshots: tuple[_RoundRecord, ...]
    tags: tuple[Tag, ...]
    manifest: OwnerValue | None
    reroot: OwnerValue | None
    excluded: tuple[_ExcludedRecord, ...]


def _list_registers(registers: Mapping[PeerId, RegisterValue]) -> tuple[_RegisterRecord, ...]:
    return tuple(_RegisterRecord(author=author, value=value) for author, value in sorted(registers.items()))


class Fold:
    """The state in the making. `apply` takes entries that count, in any order; `read` gives the state so far."""

    def __init__(
        self, *, owner: PeerId | None, is_valid_certificate: RoundPredicate, is_valid_snapshot: RoundPredicate
    ) -> None:
        self._leases = AuthorRegister()
        self._addresses = AuthorRegister()
        self._certificates = GrowOnlyMap(is_valid_certificate)
        self._snapshots = GrowOnlySet(is_valid_snapshot)
        self._tags = ObservedRemoveSet(owner)
        self._manifest = OwnerRegister()
        self._reroot = OwnerRegister()

    def apply(self, entry_id: EntryId, entry: Entry) -> None:
        """Merge one entry, whose body its batch's decoder has checked."""
        body = decode_body_untrusted(entry.kind, entry.body)
        match body:
            case RegisterBody():
                register = self._leases if entry.kind == Kind.LEASE else self._addresses
                register.put(entry.author, RegisterValue(seq=entry.seq, hlc=entry.hlc, value=body.value))
            case RoundBody():
                rounds = self._certificates if entry.kind == Kind.CERTIFICATE else self._snapshots
                rounds.put(body.round, body.value)
            case TagBody():
                if not body.removes:
                    self._tags.add(Tag(name=body.name, value=body.value, author=entry.author, entry=entry_id))
                for removed in body.removes:
                    self._tags.remove(removed, entry.author)
            case VersionedBody():
                decree = self._manifest if entry.kind == Kind.MANIFEST else self._reroot
                decree.put(entry.seq, OwnerValue(version=body.version, value=body.value))
            case _:
                assert_never(body)

    def read(self, excluded: Mapping[PeerId, int]) -> LedgerState:
        """The state so far, independent of what is applied later."""
        return LedgerState(
            leases=dict(self._leases.values),
            addresses=dict(self._addresses.values),
            certificates=dict(self._certificates.values),
            snapshots=self._snapshots.list_values(),
            tags=self._tags.list_present(),
            manifest=self._manifest.value,
            reroot=self._reroot.value,
            excluded=dict(excluded),
        )
