"""What a set of ledger entries means, told a second time: slowly, in one go, and with none of the code under test but
the decoders, the vote's signature and the state's own encoding.

A log of certified rounds by real keys comes with it, which everybody in the tests' swarm knows.
"""

from collections.abc import Mapping

from blake3 import blake3

from shoal.crdt.certified import CertifiedRound, ChainBase, Credit, list_credit
from shoal.crdt.clock import is_due
from shoal.crdt.entries import Entry
from shoal.crdt.evidence import Slot
from shoal.crdt.fold import LedgerState, Verdicts
from shoal.crdt.key_set import KEY_END, KEY_FIRST, id_of_key
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
from shoal.crdt.ledger import Ledger, LedgerRules
from shoal.crdt.merge import OwnerValue, RegisterValue, Tag
from shoal.crdt.standing import Ban
from shoal.protocol.errors import ProtocolError
from shoal.protocol.identity import Identity, PeerId
from shoal.protocol.messages import Certificate, Result, digest_record, verify_message
from shoal.protocol.wire import decode_record_untrusted
from tests.unit.crdt.certificates import make_authority, make_log

SWARM = b"s" * 32
IDENTITIES = [Identity(bytes([number]) * 32) for number in range(1, 7)]
OWNER = IDENTITIES[0].peer
# The last three lie; none of them votes, as a quorum of liars may do what it likes.
HONEST, LIARS = IDENTITIES[:3], IDENTITIES[3:]
ROUNDS_PER_ERA = 2
LOG = make_log(SWARM, HONEST, 16)


def is_valid_snapshot(round_number: int, value: bytes) -> bool:
    return (round_number + len(value)) % 3 != 0


RULES = LedgerRules(
    swarm=SWARM,
    owner=OWNER,
    is_valid_snapshot=is_valid_snapshot,
    authority=make_authority(SWARM, OWNER),
    founders=tuple(one.peer for one in HONEST),
    rounds_per_era=ROUNDS_PER_ERA,
)


def list_entries(ledger: Ledger) -> dict[EntryId, Entry]:
    """Everything that a ledger shows to others."""
    entries = {}
    for key in ledger.keys.iterate(KEY_FIRST, KEY_END):
        entry = ledger.get(id_of_key(key))
        assert entry is not None
        entries[id_of_key(key)] = entry
    return entries


def sum_up(rounds: int) -> ChainBase:
    """The first rounds of the log as one base."""
    results = [certificate.result for certificate in LOG[:rounds]]
    if not results:
        return ChainBase(round=0, digest=SWARM, voters=RULES.founders)
    digest = digest_record(results[-1])
    return ChainBase(round=rounds, digest=digest, voters=results[-1].voters, credit=list_credit(_count_credit(results)))


def _count_credit(results: list[Result]) -> dict[PeerId, Credit]:
    pairs = [
        (member.peer, member.tokens)
        for result in results
        for index, member in enumerate(result.members)
        if any(part.contributors[index // 8] >> index % 8 & 1 for part in result.parts)
    ]
    return {
        peer: Credit(
            tokens=sum(tokens for other, tokens in pairs if other == peer),
            rounds=sum(other == peer for other, _ in pairs),
        )
        for peer, _ in pairs
    }


class Model:
    """The meaning of `entries` at `wall_ms`, for a replica that has summed up `base_rounds` rounds."""

    def __init__(self, entries: Mapping[EntryId, Entry], base_rounds: int, wall_ms: int) -> None:
        self.entries = entries
        self.bodies = {one: decode_body_untrusted(entry.kind, entry.body) for one, entry in entries.items()}
        self.wall_ms = wall_ms
        self.base_rounds = base_rounds
        self.conflicts = self._find_conflicts()
        self._read_decrees()
        self._follow_certificates()

    def _find_conflicts(self) -> dict[PeerId, set[Slot]]:
        slots: dict[tuple[PeerId, Slot], int] = {}
        for entry in self.entries.values():
            key = entry.author, Slot(entry.era, entry.seq)
            slots[key] = slots.get(key, 0) + 1
        conflicts: dict[PeerId, set[Slot]] = {}
        for (author, slot), count in slots.items():
            if count > 1:
                conflicts.setdefault(author, set()).add(slot)
        return conflicts

    def _read_decrees(self) -> None:
        end = min((slot.seq for slot in self.conflicts.get(OWNER, ()) if slot.era == 0), default=2**63)
        chain = sorted(
            (entry.seq, entry_id) for entry_id, entry in self.entries.items() if entry.era == 0 and entry.seq < end
        )
        bodies = [(entry_id, self.bodies[entry_id]) for _, entry_id in chain]
        lifted = {one for _, body in bodies if isinstance(body, BanBody) for one in body.removes}
        self.bans = [
            Ban(peer=body.peer, reason=body.reason, entry=entry_id)
            for entry_id, body in bodies
            if isinstance(body, BanBody) and body.peer and entry_id not in lifted
        ]
        self.admitted = {peer for _, body in bodies if isinstance(body, AdmissionBody) for peer in body.peers}
        self.readmissions: dict[PeerId, ReadmissionBody] = {}
        for _, body in bodies:
            if isinstance(body, ReadmissionBody):
                standing = self.readmissions.get(body.author)
                if standing is None or standing.era <= body.era:
                    self.readmissions[body.author] = body
        self.excluded = {}
        for author, slots in self.conflicts.items():
            until = self.readmissions[author].era if author in self.readmissions else 0
            standing_slots = [slot for slot in slots if slot.era == 0 or slot.era > until]
            if standing_slots:
                self.excluded[author] = min(standing_slots)

    def _follow_certificates(self) -> None:
        found: dict[bytes, list[tuple[Certificate, bytes]]] = {}
        for entry_id, entry in self.entries.items():
            body = self.bodies[entry_id]
            if entry.kind == Kind.CERTIFICATE and isinstance(body, RoundBody):
                try:
                    certificate = decode_record_untrusted(Certificate, body.value)
                except ProtocolError:
                    continue
                if certificate.result.round == body.round:
                    found.setdefault(certificate.result.previous, []).append((certificate, body.value))
        base = sum_up(self.base_rounds)
        results = [certificate.result for certificate in LOG[: self.base_rounds]]
        digest, voters = base.digest, base.voters
        values: dict[int, bytes] = {}
        while True:
            number = len(results) + 1
            valid = [
                (blake3(value).digest(), value, certificate)
                for certificate, value in found.get(digest, ())
                if certificate.result.round == number and _is_decided(certificate, voters)
            ]
            if not valid:
                break
            _, value, certificate = min(valid, key=lambda one: one[0])
            values[number] = value
            results.append(certificate.result)
            digest, voters = digest_record(certificate.result), certificate.result.voters
        self.head = CertifiedRound(round=len(results), digest=digest)
        # Whoever was told of rounds up to the end of era n is in era n + 2 at least.
        told = self.base_rounds // ROUNDS_PER_ERA + 2 if self.base_rounds else 1
        self.era = max(told, 1 + max(0, len(results) - 1) // ROUNDS_PER_ERA)
        settled = max(0, self.era - 2) * ROUNDS_PER_ERA
        self.certificates = {number: value for number, value in values.items() if number > settled}
        self.credit = _count_credit(results)

    def _counts(self, entry_id: EntryId, entry: Entry) -> bool:
        slot, author = Slot(entry.era, entry.seq), entry.author
        if entry.era != 0 and entry.era < self.era - 1:
            return False
        if author in self.excluded and slot >= self.excluded[author]:
            return False
        if entry.era == 0:
            return True
        if any(ban.peer == author for ban in self.bans):
            return False
        if author not in self.readmissions or entry.era > self.readmissions[author].era:
            return True
        word = self.readmissions[author]
        if entry.era < word.era:
            return not any(
                other.era == entry.era and other.seq <= entry.seq for other in self.conflicts.get(author, ())
            )
        name = word.stands
        while name in self.entries:
            link = self.entries[name]
            if (link.author, link.era) != (author, word.era):
                return False
            if name == entry_id:
                return True
            name = link.prev
        return False

    def state(self) -> LedgerState:
        """What every replica must make of it."""
        counting = [
            (entry_id, entry, self.bodies[entry_id])
            for entry_id, entry in sorted(self.entries.items(), key=lambda item: (item[1].era, item[1].seq))
            if is_due(entry.hlc, self.wall_ms) and self._counts(entry_id, entry)
        ]
        snapshots: dict[int, set[bytes]] = {}
        decrees: dict[str, OwnerValue] = {}
        registers: dict[str, dict[PeerId, RegisterValue]] = {Kind.LEASE: {}, Kind.ADDRESSES: {}}
        for _, entry, body in counting:
            if (
                entry.kind == Kind.SNAPSHOT
                and isinstance(body, RoundBody)
                and is_valid_snapshot(body.round, body.value)
            ):
                snapshots.setdefault(body.round, set()).add(body.value)
            standing = decrees.get(entry.kind)
            if isinstance(body, VersionedBody) and (standing is None or standing.version < body.version):
                decrees[entry.kind] = OwnerValue(version=body.version, value=body.value)
            if isinstance(body, RegisterBody):
                value = RegisterValue(era=entry.era, seq=entry.seq, hlc=entry.hlc, value=body.value)
                registers[entry.kind][entry.author] = value
        removals = {
            (removed, entry.author)
            for _, entry, body in counting
            if isinstance(body, TagBody)
            for removed in body.removes
        }
        tags = [
            Tag(name=body.name, value=body.value, author=entry.author, entry=entry_id)
            for entry_id, entry, body in counting
            if isinstance(body, TagBody) and body.name and not removals & {(entry_id, entry.author), (entry_id, OWNER)}
        ]
        return LedgerState(
            leases=registers[Kind.LEASE],
            addresses=registers[Kind.ADDRESSES],
            snapshots={number: tuple(sorted(values)) for number, values in snapshots.items()},
            tags=tuple(sorted(tags, key=lambda tag: (tag.name, tag.entry))),
            manifest=decrees.get(Kind.MANIFEST),
            reroot=decrees.get(Kind.REROOT),
            verdicts=Verdicts(
                era=self.era,
                head=self.head,
                certificates=self.certificates,
                credit=self.credit,
                excluded=self.excluded,
                readmissions=self.readmissions,
                bans=tuple(sorted(self.bans, key=lambda ban: (ban.peer, ban.entry))),
                admitted=self.admitted,
            ),
        )


def _is_decided(certificate: Certificate, voters: tuple[PeerId, ...]) -> bool:
    result = certificate.result
    if len(result.parts) != 1 or not result.members:
        return False
    if not {*voters, *(member.peer for member in result.members)}.issuperset(result.voters):
        return False
    signers = {vote.voter for vote in certificate.votes}
    if len(signers) != len(certificate.votes) or not signers <= set(voters) or 2 * len(signers) <= len(voters):
        return False
    for vote in certificate.votes:
        if (vote.round, vote.attempt, vote.result_digest) != (
            result.round,
            certificate.attempt,
            digest_record(result),
        ):
            return False
        try:
            verify_message(vote.voter, SWARM, vote)
        except ProtocolError:
            return False
    return True


def assert_folds_like_the_model(ledger: Ledger, *times_ms: int) -> None:
    """At each of these times, in this order."""
    entries = list_entries(ledger)
    assert ledger.base == sum_up(ledger.base.round)
    for wall_ms in times_ms:
        assert ledger.fold(wall_ms).encode() == Model(entries, ledger.base.round, wall_ms).state().encode()
