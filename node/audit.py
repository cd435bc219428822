"""A certified round, computed anew from what a peer's folder holds of it, and what does not hold, by name.

What is looked at: the certificate (it follows the round before, a quorum of that round's voters signed this result),
the members (weights follow from what they declared, bitmaps name members), the parts (their bytes have the digests that
were voted for, and decode), the outer step (base root before, state root after as the next certificate names it).

Nothing is believed because it lies on the own disk; but where a piece is not retained any more the verdict says so
instead of guessing.
"""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum

from blake3 import blake3

from shoal.node.archive import Archive, ArchiveError, RebuiltState, make_head
from shoal.protocol.aggregators import planned_weights
from shoal.protocol.attendance import (
    FRESHNESS,
    INTERVAL_ROUNDS_MAX,
    PARTICIPATION,
    WORK,
    Counted,
    check_attendance,
    exceeds,
    expect_attendance,
    weight_factor,
)
from shoal.protocol.codecs import CODECS
from shoal.protocol.errors import ProtocolError
from shoal.protocol.identity import PeerId
from shoal.protocol.messages import Certificate, Result, digest_record
from shoal.protocol.quorum import Head, check_result, check_votes, is_reroot, list_counted, list_members, quorum_size

# What weights follow from, by the manifest's rule.
BASES = {WORK: "tokens", PARTICIPATION: "tokens and intervals", FRESHNESS: "tokens and base"}


class Finding(StrEnum):
    HOLDS = "holds"
    FAILS = "does not hold"
    UNKNOWN = "cannot be told"


# Of every command that verifies.
EXIT_CODES = {Finding.HOLDS: 0, Finding.FAILS: 3, Finding.UNKNOWN: 4}


def conclude(findings: Iterable[Finding]) -> Finding:
    """What several findings come to: one that fails decides, then one that cannot be told."""
    found = set(findings)
    return next((one for one in (Finding.FAILS, Finding.UNKNOWN) if one in found), Finding.HOLDS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing that was looked at."""

    name: str
    finding: Finding
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """All checks of one round. It holds when every one of them does."""

    round: int
    checks: tuple[Check, ...]

    @property
    def finding(self) -> Finding:
        return conclude(check.finding for check in self.checks)


def audit_round(archive: Archive, number: int) -> Audit:
    """Everything about one round, from 1 on."""
    return next(audit_rounds(archive, number, number))


def audit_rounds(archive: Archive, first: int, last: int) -> Iterator[Audit]:
    """Consecutive rounds; the state is led on from one to the next."""
    state: RebuiltState | None = None
    counted = _find_counted(archive, first)
    for number in range(first, last + 1):
        auditor = _Auditor(archive, number, counted)
        state = auditor.look(state if state is not None and state.head.round == number - 1 else None)
        yield Audit(round=number, checks=tuple(auditor.checks))


def _find_counted(archive: Archive, number: int) -> dict[PeerId, Counted]:
    """The newest rounds before this one that counted each peer, of the last ones that are here and can be read."""
    found: dict[PeerId, Counted] = {}
    if archive.manifest.rounds.weights != PARTICIPATION:
        return found
    for before in range(max(1, number - INTERVAL_ROUNDS_MAX), number):
        with contextlib.suppress(ProtocolError):  # its own audit says so
            certificate = archive.certificates.get(before)
            found |= {} if certificate is None else list_counted(certificate.result)
    return found


class _Auditor:
    """One round's checks, in the order in which they depend on each other. `counted` grows by the round."""

    def __init__(self, archive: Archive, number: int, counted: dict[PeerId, Counted]) -> None:
        self.checks: list[Check] = []
        self._archive = archive
        self._number = number
        self._counted = counted

    def look(self, before: RebuiltState | None) -> RebuiltState | None:
        """Fill `checks`; the state after the round, where it could be computed and is the certified one."""
        certificate = self._read_certificate()
        if certificate is None:
            return None
        self._check_certificate(certificate)
        self._check_members(certificate.result)
        self._counted |= list_counted(certificate.result)
        whole = self._check_parts(certificate.result)
        before = before or self._rebuild_before()
        if before is None:
            return None
        self._check(
            "state before",
            before.head.state_root == certificate.result.base_root,
            f"root {before.head.state_root.hex()[:16]}, the certificate builds on"
            f" {certificate.result.base_root.hex()[:16]}",
        )
        if not whole:
            self._tell("outer step", Finding.UNKNOWN, "without all of its parts it cannot be computed")
            return None
        return self._check_step(certificate.result, before)

    def _tell(self, name: str, finding: Finding, detail: str) -> None:
        self.checks.append(Check(name=name, finding=finding, detail=detail))

    def _check(self, name: str, holds: bool, detail: str) -> None:
        self._tell(name, Finding.HOLDS if holds else Finding.FAILS, detail)

    def _read_certificate(self) -> Certificate | None:
        try:
            certificate = self._archive.certificates.get(self._number)
        except ProtocolError as error:
            self._tell("certificate", Finding.FAILS, f"its bytes are damaged: {error}")
            return None
        if certificate is None:
            self._tell("certificate", Finding.UNKNOWN, "it is not in this folder")
            return None
        if certificate.result.round != self._number:
            self._tell("certificate", Finding.FAILS, f"it is that of round {certificate.result.round}")
            return None
        return certificate

    def _head_before(self) -> tuple[bytes, tuple[PeerId, ...]] | None:
        """Digest and next voters of the round before."""
        if self._number == 1:
            return self._archive.swarm, self._archive.manifest.founders
        try:
            previous = self._archive.certificates.get(self._number - 1)
        except ProtocolError:
            return None
        return None if previous is None else (digest_record(previous.result), previous.result.voters)

    def _check_certificate(self, certificate: Certificate) -> None:
        known = self._head_before()
        if known is None:
            detail = f"round {self._number - 1}, which names its voters, cannot be read here"
            self._tell("certificate", Finding.UNKNOWN, detail)
            return
        digest, voters = known
        manifest, result = self._archive.manifest, certificate.result
        # The base root has a check of its own: here the result is only asked whether it follows the other one.
        head = Head(round=self._number - 1, digest=digest, state_root=result.base_root, voters=voters)
        try:
            check_result(result, head, len(manifest.list_parts(self._number)), is_reroot=is_reroot(certificate))
            check_votes(certificate, voters, manifest.authority(self._archive.swarm))
        except ProtocolError as error:
            self._tell("certificate", Finding.FAILS, str(error))
            return
        needed = f"{quorum_size(len(voters), manifest.quorum)} needed"
        said = "a re-root" if is_reroot(certificate) else f"{len(certificate.votes)} of {len(voters)} votes, {needed}"
        self._tell("certificate", Finding.HOLDS, f"it follows round {self._number - 1}; {said}")

    def _check_members(self, result: Result) -> None:
        if not result.members:
            self._tell("members", Finding.HOLDS, "none: the round changes the voters and nothing else")
            return
        members, rule = result.members, self._archive.manifest.rounds.weights
        try:
            for member in members:
                check_attendance(member.attendance, rule, result.round)
        except ProtocolError as error:
            self._tell("members", Finding.FAILS, str(error))
            return
        for number, member in enumerate(members):
            last = self._counted.get(member.peer)
            if last is not None and exceeds(member.attendance, expect_attendance(last, result.round)):
                detail = f"member {number} declares longer intervals than those from round {last.round} on"
                self._tell("members", Finding.FAILS, detail)
                return
        factors = (weight_factor(member.attendance, rule) for member in members)
        weights = planned_weights((member.tokens for member in members), (member.steps for member in members), factors)
        wrong = [
            number
            for number, (member, weight) in enumerate(zip(result.members, weights, strict=True))
            if member.weight != float(weight)
        ]
        if wrong:
            detail = f"the weight of member {wrong[0]} does not follow from its {BASES[rule]}"
            self._tell("members", Finding.FAILS, detail)
            return
        counts = [len(list_members(one.contributors, len(result.members))) for one in result.parts]
        least = f"; {min(counts)} to {max(counts)} in a part" if min(counts) < len(result.members) else " in every part"
        self._tell("members", Finding.HOLDS, f"{len(result.members)} with the weights of their {BASES[rule]}{least}")

    def _check_parts(self, result: Result) -> bool:
        """Whether all of them are here and what was voted for."""
        codec = CODECS[result.codec]
        gone = []
        manifest = self._archive.manifest
        for part, one in manifest.match_parts(result):
            raw = self._archive.read_part(one.digest)
            first, end = manifest.part_range(part)
            if raw is None:
                gone.append(part)
                continue
            if blake3(raw).digest() != one.digest:
                self._tell("parts", Finding.FAILS, f"part {part} has not the digest that was voted for")
                return False
            try:
                codec.check_untrusted(raw, end - first)
            except ProtocolError as error:
                self._tell("parts", Finding.FAILS, f"part {part} cannot be decoded: {error}")
                return False
        if gone:
            numbers = ", ".join(map(str, gone[:8]))
            self._tell("parts", Finding.UNKNOWN, f"{len(gone)} of {len(result.parts)} are not here: {numbers}")
            return False
        self._tell("parts", Finding.HOLDS, f"{len(result.parts)} with the digests that were voted for")
        return True

    def _rebuild_before(self) -> RebuiltState | None:
        try:
            return self._archive.rebuild(self._number - 1)
        except ArchiveError as error:
            self._tell("state before", Finding.UNKNOWN, str(error))
            return None

    def _check_step(self, result: Result, state: RebuiltState) -> RebuiltState | None:
        try:
            root = state.replica.apply(result, self._archive.read_update(result, state.start))
        except (ArchiveError, ProtocolError) as error:
            self._tell("outer step", Finding.FAILS, str(error))
            return None
        state.head = make_head(result, root)
        named, by_whom = self._named_root()
        if named is None:
            self._tell("outer step", Finding.HOLDS, f"root {root.hex()[:16]}, which {by_whom}")
            return state
        self._check("outer step", named == root, f"root {root.hex()[:16]}, {by_whom} {named.hex()[:16]}")
        return state if named == root else None

    def _named_root(self) -> tuple[bytes | None, str]:
        """The state root after this round as somebody else named it, and who."""
        certificates = self._archive.certificates
        try:
            following = certificates.get(self._number + 1)
        except ProtocolError:
            following = None  # its own audit says so
        if following is not None:
            return following.result.base_root, f"round {self._number + 1} builds on"
        if certificates.own_root is not None and certificates.own_root[0] == self._number:
            return certificates.own_root[1], "the daemon stands at"
        snapshot = self._archive.snapshots.get(self._number)
        if snapshot is not None:
            return snapshot.index.root, "its snapshot has"
        return None, "no later round names yet"
