"""The fold: from a set of ledger entries to the replicated state that the rest of the node reads.

Invariant: the state is a function of the set of entries that were applied, whatever their order, and `encode` gives the
same bytes wherever the state is the same.
"""

from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from typing import assert_never

from blake3 import blake3

from shoal.crdt.certified import CertifiedRound, Credit, CreditRecord, list_credit
from shoal.crdt.entries import Entry
from shoal.crdt.eras import FIRST_ERA
from shoal.crdt.evidence import Slot
from shoal.crdt.kinds import (
    AdmissionBody,
    BanBody,
    EntryId,
    Kind,
    ReadmissionBody,
    RegisterBody,
    RoundBody,
    TagBody,
    VersionedBody,
    decode_body_untrusted,
)
from shoal.crdt.merge import (
    AuthorRegister,
    GrowOnlySet,
    ObservedRemoveSet,
    OwnerRegister,
    OwnerValue,
    RegisterValue,
    RoundPredicate,
    Tag,
)
from shoal.crdt.standing import Ban
from shoal.protocol.identity import PeerId
from shoal.protocol.wire import U32, U63, Bytes32, encode_record

NO_ROUND = CertifiedRound(round=0, digest=bytes(32))


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdicts:
    """What stands without regard to any clock: the certified chain, and who counts.

    `certificates`: those of the rounds that are not settled yet. `head`: the newest round that counts; `credit` is that
    of all rounds up to it. `contradiction`: a round with two certified results, from which on nothing counts.
    `excluded` maps an author that equivocated to the slot from which on nothing of it counts; `readmissions` are the
    owner's words about such authors. `admitted`: whom the owner has let into the swarm.
    """

    era: int = FIRST_ERA
    head: CertifiedRound = NO_ROUND
    certificates: Mapping[int, bytes] = field(default_factory=dict)
    credit: Mapping[PeerId, Credit] = field(default_factory=dict)
    contradiction: int | None = None
    excluded: Mapping[PeerId, Slot] = field(default_factory=dict)
    readmissions: Mapping[PeerId, ReadmissionBody] = field(default_factory=dict)
    bans: tuple[Ban, ...] = ()
    admitted: Set[PeerId] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerState:
    """The replicated state at one time. Nobody may change the mappings; a later fold makes new ones."""

    leases: Mapping[PeerId, RegisterValue]
    addresses: Mapping[PeerId, RegisterValue]
    snapshots: Mapping[int, tuple[bytes, ...]]
    tags: tuple[Tag, ...]
    manifest: OwnerValue | None
    reroot: OwnerValue | None
    verdicts: Verdicts

    @property
    def certificates(self) -> Mapping[int, bytes]:
        """The certificates that count, by round."""
        return self.verdicts.certificates

    @property
    def credit(self) -> Mapping[PeerId, Credit]:
        """Certified tokens and rounds of every peer."""
        return self.verdicts.credit

    @property
    def excluded(self) -> Mapping[PeerId, Slot]:
        """The authors that equivocated."""
        return self.verdicts.excluded

    def encode(self) -> bytes:
        """Canonical bytes of the whole state."""
        verdicts = self.verdicts
        return encode_record(
            _StateRecord(
                era=verdicts.era,
                head=verdicts.head,
                certificates=tuple(
                    _RoundRecord(round=number, values=(value,))
                    for number, value in sorted(verdicts.certificates.items())
                ),
                credit=list_credit(verdicts.credit),
                contradiction=verdicts.contradiction,
                excluded=tuple(
                    _ExcludedRecord(author=author, era=slot.era, seq=slot.seq)
                    for author, slot in sorted(verdicts.excluded.items())
                ),
                readmissions=tuple(body for _, body in sorted(verdicts.readmissions.items())),
                bans=verdicts.bans,
                admitted=tuple(sorted(verdicts.admitted)),
                leases=_list_registers(self.leases),
                addresses=_list_registers(self.addresses),
                snapshots=tuple(
                    _RoundRecord(round=number, values=values) for number, values in sorted(self.snapshots.items())
                ),
                tags=self.tags,
                manifest=self.manifest,
                reroot=self.reroot,
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
    era: U32
    seq: U63


@dataclass(frozen=True, slots=True, kw_only=True)
class _StateRecord:
    era: U32
    head: CertifiedRound
    certificates: tuple[_RoundRecord, ...]
    credit: tuple[CreditRecord, ...]
    contradiction: U63 | None
    excluded: tuple[_ExcludedRecord, ...]
    readmissions: tuple[ReadmissionBody, ...]
    bans: tuple[Ban, ...]
    admitted: tuple[Bytes32, ...]
    leases: tuple[_RegisterRecord, ...]
    addresses: tuple[_RegisterRecord, ...]
    snapshots: tuple[_RoundRecord, ...]
    tags: tuple[Tag, ...]
    manifest: OwnerValue | None
    reroot: OwnerValue | None


def _list_registers(registers: Mapping[PeerId, RegisterValue]) -> tuple[_RegisterRecord, ...]:
    return tuple(_RegisterRecord(author=author, value=value) for author, value in sorted(registers.items()))


class Fold:
    """The state in the making. `apply` takes entries that count, in any order; `read` gives the state so far."""

    def __init__(self, *, owner: PeerId | None, is_valid_snapshot: RoundPredicate) -> None:
        self._leases = AuthorRegister()
        self._addresses = AuthorRegister()
        self._snapshots = GrowOnlySet(is_valid_snapshot)
        self._tags = ObservedRemoveSet(owner)
        self._manifest = OwnerRegister()
        self._reroot = OwnerRegister()

    def apply(self, entry_id: EntryId, entry: Entry) -> None:
        """Merge one entry, whose body its batch's decoder has checked. Certificates and decrees about peers are
        judged elsewhere: they do not depend on who wrote them, or when."""
        body = decode_body_untrusted(entry.kind, entry.body)
        match body:
            case RegisterBody():
                register = self._leases if entry.kind == Kind.LEASE else self._addresses
                register.put(entry.author, RegisterValue(era=entry.era, seq=entry.seq, hlc=entry.hlc, value=body.value))
            case RoundBody():
                if entry.kind == Kind.SNAPSHOT:
                    self._snapshots.put(body.round, body.value)
            case TagBody():
                if not body.removes:
                    self._tags.add(Tag(name=body.name, value=body.value, author=entry.author, entry=entry_id))
                for removed in body.removes:
                    self._tags.remove(removed, entry.author)
            case VersionedBody():
                decree = self._manifest if entry.kind == Kind.MANIFEST else self._reroot
                decree.put(entry.seq, OwnerValue(version=body.version, value=body.value))
            case BanBody() | ReadmissionBody() | AdmissionBody():
                pass
            case _:
                assert_never(body)

    def read(self, verdicts: Verdicts) -> LedgerState:
        """The state so far, independent of what is applied later."""
        return LedgerState(
            leases=dict(self._leases.values),
            addresses=dict(self._addresses.values),
            snapshots=self._snapshots.list_values(),
            tags=self._tags.list_present(),
            manifest=self._manifest.value,
            reroot=self._reroot.value,
            verdicts=verdicts,
        )
