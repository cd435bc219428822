"""The invariants of a round, checked after every event that can break one."""

import itertools
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from shoal.protocol.codecs import CODECS
from shoal.protocol.contribution import Frozen
from shoal.protocol.errors import ProtocolError
from shoal.protocol.identity import PeerId
from shoal.protocol.manifest import Manifest
from shoal.protocol.messages import Certificate, Vote, digest_record
from shoal.protocol.quorum import Head, check_votes, list_members

if TYPE_CHECKING:
    from tests.sim.peer import SimPeer

Vector = npt.NDArray[np.float32]


class InvariantBroken(AssertionError):
    """Which invariant, where, and what was seen."""


def broken(name: str, detail: str) -> InvariantBroken:
    return InvariantBroken(f"{name}: {detail}")


class Checker:
    """Sees everything; independent of the cores' own bookkeeping."""

    def __init__(self, manifest: Manifest, swarm: bytes, genesis: Head) -> None:
        self.manifest = manifest
        self.swarm = swarm
        self.results: dict[int, bytes] = {}
        self.heads: dict[int, Head] = {0: genesis}
        self.attempts: dict[int, int] = {}
        self.participants: dict[int, int] = {}
        self.aggregated: set[int] = set()
        self.votes: dict[tuple[PeerId, int, int], bytes] = {}
        self.contributions: dict[tuple[PeerId, int], list[tuple[bytes, ...]]] = {}
        self.committed_round: dict[PeerId, int] = {}

    def newest_head(self) -> Head:
        """The head that the certificates lead to, whoever holds them."""
        return self.heads[max(self.heads)]

    def froze(self, peer: "SimPeer", frozen: Frozen) -> None:
        """Error feedback is exact: encoded + residual = produced, to the bit."""
        codec = CODECS[self.manifest.rounds.codec]
        for part, raw in enumerate(frozen.encoded):
            first, end = self.manifest.part_range(part)
            decoded = np.empty(end - first, np.float32)
            codec.decode_untrusted(raw, end - first, decoded)
            delta = peer.replica.params[first:end] - peer.local[first:end]
            produced = delta + peer.contributor.residual[first:end]
            if not np.array_equal(decoded + frozen.residual_next[first:end], produced):
                raise broken("error feedback is exact", f"peer {peer.number}, round {frozen.round}, part {part}")
        # A peer that crashed after READY freezes another contribution for the same round; the certificate names no
        # root, so every one is kept and the oracle accepts the combination that reproduces the bytes.
        self.contributions.setdefault((peer.identity.peer, frozen.round), []).append(frozen.encoded)

    def voted(self, peer: "SimPeer", vote: Vote) -> None:
        """An honest peer never signs two votes for one (round, attempt), and votes only for what its disk holds."""
        key = (vote.voter, vote.round, vote.attempt)
        if self.votes.setdefault(key, vote.result_digest) != vote.result_digest:
            raise broken("one vote per attempt", f"peer {peer.number} voted twice in {vote.round}/{vote.attempt}")
        record = peer.disk.vote
        if record is None or record.round != vote.round or record.promised < vote.attempt or record.accepted is None:
            raise broken("persist before send", f"peer {peer.number} voted in {vote.round}/{vote.attempt}")
        missing = [part for part in record.accepted.parts if part.digest not in peer.disk.blobs]
        if missing:
            raise broken("voters hold the bytes", f"peer {peer.number} misses {len(missing)} parts")

    def committed(self, peer: "SimPeer", certificate: Certificate, head: Head) -> None:
        """One result per round, the same bytes and the same state everywhere, in order, and never undone."""
        result = certificate.result
        number = result.round
        digest = digest_record(result)
        if self.results.setdefault(number, digest) != digest:
            raise broken("one result per round", f"round {number} at peer {peer.number}")
        check_votes(certificate, self.heads[number - 1].voters, self.manifest.quorum, self.swarm)
        if self.heads.setdefault(number, head) != head:
            raise broken("bit parity", f"round {number}: peer {peer.number} has another state root")
        before = self.committed_round.get(peer.identity.peer, 0)
        if number != before + 1:
            raise broken("rounds are never undone", f"peer {peer.number} went from {before} to {number}")
        self.committed_round[peer.identity.peer] = number
        self.attempts.setdefault(number, certificate.attempt)
        self.participants.setdefault(number, len(result.members))
        if number not in self.aggregated:
            self.aggregated.add(number)
            self._check_aggregate(certificate, peer)

    def _check_aggregate(self, certificate: Certificate, peer: "SimPeer") -> None:
        """An independent oracle: plain float32 arithmetic over exactly the bitmap's members, in roster order."""
        result = certificate.result
        for part, one in enumerate(result.parts):
            indices = list_members(one.contributors, len(result.members))
            frozen = [self.contributions[result.members[index].peer, result.round] for index in indices]
            weights = [np.float32(result.members[index].weight) for index in indices]
            expected = {
                self._aggregate(part, [encoded[part] for encoded in choice], weights)
                for choice in itertools.product(*frozen)
            }
            if peer.disk.blobs[one.digest] not in expected:
                raise broken("result = aggregate of the bitmap's members", f"round {result.round}, part {part}")

    def _aggregate(self, part: int, encoded: list[bytes], weights: list[np.float32]) -> bytes:
        codec = CODECS[self.manifest.rounds.codec]
        first, end = self.manifest.part_range(part)
        total, weight_sum = np.zeros(end - first, np.float32), np.float32(0.0)
        for raw, weight in zip(encoded, weights, strict=True):
            decoded = np.empty(end - first, np.float32)
            codec.decode_untrusted(raw, end - first, decoded)
            total = total + weight * decoded
            weight_sum = np.float32(weight_sum + weight)
        return bytes(codec.encode(total / weight_sum))

    def accused(self, peer: "SimPeer", sender: PeerId, message: object, error: ProtocolError) -> None:
        """There are only honest peers here: nobody may ever be refused."""
        raise broken("no honest peer is accused", f"peer {peer.number}: {type(message).__name__}: {error}")
