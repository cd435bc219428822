"""One simulated peer: the production cores behind a shell of virtual time, a virtual disk and the virtual network."""

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from blake3 import blake3

from shoal.protocol.contribution import Contributor, Frozen
from shoal.protocol.effects import (
    AttemptFailed,
    Behind,
    Commit,
    Effect,
    FetchBlob,
    PartReassigned,
    Persist,
    Phase,
    PhaseEntered,
    Planned,
    Reduce,
    Send,
    SenderMissing,
    SendPart,
    SendResult,
    VoteRecord,
)
from shoal.protocol.errors import ProtocolError
from shoal.protocol.identity import Identity, PeerId
from shoal.protocol.manifest import Manifest, genesis_head
from shoal.protocol.messages import (
    ROUND_MESSAGES,
    Certificate,
    Certified,
    Presence,
    Ready,
    SignedReady,
    Vote,
    digest_record,
    sign_message,
    sign_ready,
)
from shoal.protocol.presence import PresenceTable
from shoal.protocol.quorum import Head
from shoal.protocol.replica import Replica
from shoal.protocol.round_state import RESEND_AFTER, RESENDS_MAX, Offer, Setting
from shoal.protocol.rounds import RoundCore

if TYPE_CHECKING:
    from tests.sim.world import World

CONTROL_BYTES = 400
FETCH_TIMEOUT_S = 1.5


@dataclass(slots=True)
class Disk:
    """What a crash leaves: everything here was written by a `Persist` or a `Commit` that completed."""

    vote: VoteRecord | None = None
    certificates: dict[int, Certificate] = field(default_factory=dict)
    blobs: dict[bytes, bytes] = field(default_factory=dict)
    incarnation: int = 0


class SimPeer:
    def __init__(self, world: "World", number: int, identity: Identity, manifest: Manifest, swarm: bytes) -> None:
        self.world = world
        self.number = number
        self.identity = identity
        self.manifest = manifest
        self.swarm = swarm
        self.disk = Disk()
        self.up = False
        self.left = False
        self.leaving = False
        self.paused_until_s = 0.0
        self.rng = random.Random(f"{world.seed}/{number}")
        self.speed_s = self.rng.uniform(1.0, 4.0)

    # -- life ----------------------------------------------------------------------------------------------------

    def boot(self) -> None:
        """Start from the disk, as a daemon does: replay the certified updates, take up the vote record."""
        self.up, self.leaving = True, False
        self.disk.incarnation += 1
        self.sequence = 0
        elements = self.manifest.layout.elements
        self.replica = Replica(self.manifest, np.zeros(elements, np.float32), np.zeros(elements, np.float32))
        head = genesis_head(self.manifest, self.swarm, self.replica.reset())
        for number in sorted(self.disk.certificates):
            head = self._apply(self.disk.certificates[number])
        self.local = self.replica.params.copy()
        self.contributor = Contributor(self.manifest)
        self.frozen: Frozen | None = None
        self.ready: SignedReady | None = None
        self.steps = 0
        self.blobs: dict[bytes, bytes] = dict(self.disk.blobs)
        self.inbox: dict[tuple[PeerId, int, bytes], bytes] = {}
        self.queue: deque[Effect] = deque()
        self.busy = False
        self.armed_s: float | None = None
        self.table = PresenceTable(self.identity.peer, self.swarm, self.manifest.rounds.presence_timeout_s)
        self.table.expect(head.voters, self.world.now)
        setting = Setting(
            identity=self.identity, swarm=self.swarm, rules=self.manifest.rounds, parts=self.manifest.parts
        )
        self.core = RoundCore(setting, head, self.disk.vote, self.world.now)
        self._train()
        self._tick()
        self._drain()

    def crash(self) -> None:
        self.up = False

    def later(self, delay_s: float, action: Callable[[], None]) -> None:
        """Run `action` unless this life of the peer has ended by then; a paused peer does it when it wakes."""
        life = self.disk.incarnation

        def run() -> None:
            if not self.up or self.disk.incarnation != life:
                return
            if self.world.now < self.paused_until_s:
                self.world.schedule(min(1.0, self.paused_until_s - self.world.now) + 1e-6, run)
                return
            action()

        self.world.schedule(delay_s, run)

    def leave(self) -> None:
        self.leaving = True
        self.core.leave(self.world.now)
        self._announce()
        self._drain()
        self.later(12.0, self._gone)

    def _gone(self) -> None:
        self.up = False
        # Who goes for good while the swarm counts on its vote takes the quorum along; such a peer counts as crashed.
        self.left = self.identity.peer not in self.world.checker.newest_head().voters

    # -- training ------------------------------------------------------------------------------------------------

    def _train(self) -> None:
        self.later(self.speed_s * self.rng.uniform(0.8, 1.4), self._become_ready)

    def _become_ready(self) -> None:
        if self.leaving:
            return
        if self.core.phase is Phase.APPLY:
            self.later(0.05, self._become_ready)
            return
        noise = np.random.default_rng(self.rng.getrandbits(63)).standard_normal(self.local.size, dtype=np.float32)
        self.local = self.local - noise * np.float32(0.01)
        self.steps += 10
        head = self.core.head
        frozen = self.contributor.freeze(head.round + 1, self.replica.params, self.local)
        self.world.checker.froze(self, frozen)
        ready = Ready(
            round=frozen.round,
            base_root=head.state_root,
            contribution_root=frozen.root,
            tokens=self.steps * 100,
            steps=self.steps,
            norm=frozen.norm,
            owns=self.number % 4 != 3,
        )
        signed = sign_ready(self.identity, self.swarm, ready)
        if self.core.offer(Offer(signed=signed, digests=frozen.digests), self.world.now):
            self.frozen, self.ready = frozen, signed
            self._announce()
        self._drain()

    # -- presence ------------------------------------------------------------------------------------------------

    def _tick(self) -> None:
        for lost in self.table.handle_deadline(self.world.now):
            self.core.lose(lost.peer, self.world.now)
        self._announce()
        self._drain()
        self.later(self.manifest.rounds.presence_period_s, self._tick)

    def _announce(self) -> None:
        self.sequence += 1
        head = self.core.head
        presence = sign_message(
            self.identity,
            self.swarm,
            Presence(
                peer=self.identity.peer,
                incarnation=self.disk.incarnation,
                sequence=self.sequence,
                sent_at_s=self.world.now,
                agent="sim",
                trains=True,
                leaving=self.leaving,
                head_round=head.round,
                head_digest=head.digest,
                state_root=head.state_root,
                phase=self.core.phase.value,
                tensor_addresses=(),
                control_addresses=(),
                tokens_per_s=1.0,
                ready=self.ready,
            ),
        )
        for other in self.world.peers:
            if other is not self:
                self._transmit(other, CONTROL_BYTES, lambda other=other: other.hear(presence))

    def hear(self, presence: Presence) -> None:
        if self.table.receive(presence, self.world.now) is not None:
            self.core.observe(presence, self.world.now)
            self._drain()

    def connection_reset(self, peer: PeerId) -> None:
        if self.table.suspect(peer, self.world.now) is not None:
            self.core.lose(peer, self.world.now)
            self._drain()

    # -- effects -------------------------------------------------------------------------------------------------

    def _drain(self) -> None:
        self.queue.extend(self.core.take_effects())
        while self.queue and not self.busy:
            self._execute(self.queue.popleft())
            self.queue.extend(self.core.take_effects())
        deadline = self.core.next_deadline()
        if deadline is not None and deadline != self.armed_s:
            self.armed_s = deadline
            self.later(max(0.0, deadline - self.world.now) + 1e-9, self._wake)

    def _wake(self) -> None:
        self.armed_s = None
        self.core.handle_deadline(self.world.now)
        self._drain()

    def _resume(self) -> None:
        self.busy = False
        self._drain()

    def _execute(self, effect: Effect) -> None:
        match effect:
            case Send():
                self._send(effect)
            case Persist():
                self.busy = True
                self.later(self.rng.uniform(0.001, 0.02), lambda: self._persist(effect))
            case SendPart():
                self._send_part(effect)
            case SendResult():
                self._send_result(effect)
            case Reduce():
                self.later(self.rng.uniform(0.001, 0.05), lambda: self._reduce(effect))
            case FetchBlob():
                self._fetch(effect, effect.candidates)
            case Commit():
                self.busy = True
                self.later(self.rng.uniform(0.002, 0.05), lambda: self._commit(effect.certificate))
            case Behind():
                self._catch_up(effect)
            case PhaseEntered() | Planned() | AttemptFailed() | PartReassigned() | SenderMissing():
                self.world.note(self, effect)

    def _send(self, effect: Send) -> None:
        if isinstance(effect.message, Vote):
            self.world.checker.voted(self, effect.message)
        if effect.peer == self.identity.peer:
            self.take(effect.message, effect.peer)
            return
        other = self.world.by_id[effect.peer]
        self._transmit(other, CONTROL_BYTES, lambda: other.take(effect.message, self.identity.peer))

    def take(self, message: ROUND_MESSAGES, sender: PeerId) -> None:
        try:
            self.core.receive(message, sender, self.world.now)
        except ProtocolError as error:
            self.world.checker.accused(self, sender, message, error)
        self._drain()

    def _persist(self, effect: Persist) -> None:
        for digest in effect.digests:
            self.disk.blobs[digest] = self.blobs[digest]
        self.disk.vote = effect.vote
        self._resume()

    def _send_part(self, effect: SendPart, tries: int = RESENDS_MAX) -> None:
        frozen = self.frozen
        if frozen is None or frozen.round != effect.round or frozen.digests[effect.part] != effect.digest:
            return
        raw = frozen.encoded[effect.part]
        other = self.world.by_id[effect.peer]
        self._stream(other, len(raw), lambda: other.take_part(self, effect, raw, tries))

    def take_part(self, source: "SimPeer", effect: SendPart, raw: bytes, tries: int) -> None:
        sender, number, part, digest = source.identity.peer, effect.round, effect.part, effect.digest
        refusal = self.core.check_part(sender, number, part, digest)
        if refusal is not None:
            # As the tensor links do: the sender is told, and tries again what came too early.
            if refusal in RESEND_AFTER and tries > 1:
                self._transmit(source, 64, lambda: source.later(0.5, lambda: source._send_part(effect, tries - 1)))
            return
        self.inbox[sender, part, digest] = raw
        self.core.part_received(sender, number, part, digest, self.world.now)
        self._drain()

    def _reduce(self, effect: Reduce) -> None:
        if effect.round != self.core.round:
            return
        encoded = []
        for entry, digest in zip(effect.members, effect.digests, strict=True):
            if entry.signed.peer == self.identity.peer:
                assert self.frozen is not None
                encoded.append(self.frozen.encoded[effect.part])
            else:
                encoded.append(self.inbox[entry.signed.peer, effect.part, digest])
        raw = self.world.reduce(self.manifest, effect, encoded)
        digest = blake3(raw).digest()
        self.blobs[digest] = raw
        self.core.part_reduced(effect.round, effect.attempt, effect.part, digest, frozenset(effect.indices))
        self._drain()

    def _send_result(self, effect: SendResult) -> None:
        raw = self.blobs[effect.digest]
        other = self.world.by_id[effect.peer]
        me = self.identity.peer
        self._stream(other, len(raw), lambda: other.take_result(me, effect.round, effect.part, raw))

    def take_result(self, sender: PeerId, number: int, part: int, raw: bytes) -> None:
        if self.core.check_result_part(sender, number, part) is None:
            self._hold(raw)

    def _hold(self, raw: bytes) -> None:
        digest = blake3(raw).digest()
        self.blobs[digest] = raw
        self.core.blob_held(digest, self.world.now)
        self._drain()

    def _fetch(self, effect: FetchBlob, candidates: tuple[PeerId, ...]) -> None:
        """Ask one candidate after the other, each with its time-out."""
        if not candidates or effect.digest in self.blobs or effect.round != self.core.round:
            if effect.digest in self.blobs:
                self._hold(self.blobs[effect.digest])
            return
        other = self.world.by_id[candidates[0]]
        self._transmit(other, 64, lambda: other.serve(self, effect.digest))
        self.later(FETCH_TIMEOUT_S, lambda: self._fetch(effect, candidates[1:]))

    def serve(self, asker: "SimPeer", digest: bytes) -> None:
        raw = self.blobs.get(digest)
        if raw is not None:
            self._stream(asker, len(raw), lambda: asker._hold(raw))

    def _catch_up(self, effect: Behind) -> None:
        other = self.world.by_id[effect.peer]
        first = self.core.round
        self._transmit(other, 64, lambda: other.tell_certificates(self, first))

    def tell_certificates(self, asker: "SimPeer", first: int) -> None:
        for number in range(first, first + 16):
            certificate = self.disk.certificates.get(number)
            if certificate is not None:
                message = Certified(certificate=certificate)
                self._transmit(asker, CONTROL_BYTES, lambda message=message: asker.take(message, self.identity.peer))

    # -- the log -------------------------------------------------------------------------------------------------

    def _apply(self, certificate: Certificate) -> Head:
        root = self.replica.apply(certificate.result, self.disk.blobs)
        return Head(
            round=certificate.result.round,
            digest=digest_record(certificate.result),
            state_root=root,
            voters=certificate.result.voters,
        )

    def _commit(self, certificate: Certificate) -> None:
        result = certificate.result
        for part in result.parts:
            self.disk.blobs[part.digest] = self.blobs[part.digest]
        self.disk.certificates[result.round] = certificate
        head = self._apply(certificate)
        self.world.checker.committed(self, certificate, head)
        self._merge(certificate)
        self.frozen, self.ready = None, None
        self.inbox.clear()
        self.core.applied(head, self.world.now)
        self.busy = False
        self._announce()
        self._train()
        self._drain()

    def _merge(self, certificate: Certificate) -> None:
        """What the daemon and its trainer do with a certificate: settle the residual, merge the new base."""
        result = certificate.result
        members = [member.peer for member in result.members]
        if self.frozen is None or self.frozen.round != result.round or self.identity.peer not in members:
            return
        before = self.contributor.residual.copy()
        included = self.contributor.settle(self.frozen, result, members.index(self.identity.peer))
        for part in range(self.manifest.parts):
            first, end = self.manifest.part_range(part)
            if part in included:
                self.local[first:end] = self.replica.params[first:end]
            else:
                assert np.array_equal(before[first:end], self.contributor.residual[first:end])
        if included:
            self.steps = 0

    def _transmit(self, other: "SimPeer", size: int, deliver: Callable[[], None]) -> None:
        self.world.network.send(self.number, other.number, size, self.world.now, lambda: other.later(0.0, deliver))

    def _stream(self, other: "SimPeer", size: int, deliver: Callable[[], None]) -> None:
        self.world.network.stream(self.number, other.number, size, self.world.now, lambda: other.later(0.0, deliver))
