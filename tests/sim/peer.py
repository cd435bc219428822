"""One simulated peer: the production cores behind a shell of virtual time, a virtual disk and the virtual network.

The shell does what the daemon's does (node/round_driver.py, node/exchange.py, node/compute.py, node/catchup.py), on a
heap instead of asyncio. Its time is its own clock's, which may drift.
"""

from collections import Counter, deque
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from blake3 import blake3

from shoal.protocol.abstention import ABSTAINING
from shoal.protocol.codecs import CODECS
from shoal.protocol.contribution import Contributor, Frozen
from shoal.protocol.effects import (
    AttemptFailed,
    Behind,
    Commit,
    Effect,
    EndTraining,
    FetchBlob,
    Forked,
    PartReassigned,
    Persist,
    Phase,
    PhaseEntered,
    Planned,
    QuorumSeen,
    Reduce,
    Send,
    SenderMissing,
    SendPart,
    SendResult,
)
from shoal.protocol.errors import ProtocolError, Refusal
from shoal.protocol.identity import Identity, PeerId
from shoal.protocol.manifest import Manifest
from shoal.protocol.messages import (
    ROUND_MESSAGES,
    Certificate,
    Certified,
    Presence,
    Proposal,
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
from tests.sim.catchup import ask_for_log, is_catching_up, write_snapshot
from tests.sim.checkers import RESULTS_PER_PART_MAX
from tests.sim.faults import Moment
from tests.sim.machine import SimMachine
from tests.sim.oracle import find_span
from tests.sim.parting import ask_where_parted, restore
from tests.sim.trace import describe
from tests.sim.training import STEPS, end_training, find_attendance, merge, train, train_alone

if TYPE_CHECKING:
    from tests.sim.world import World

CONTROL_BYTES = 1000
FETCH_TIMEOUT_S = 1.5
LEAVE_TIMEOUT_S = 12.0
PENDING_MAX = 4


class SimPeer(SimMachine):
    def __init__(self, world: "World", number: int, identity: Identity, manifest: Manifest, swarm: bytes) -> None:
        super().__init__(world, number)
        self.identity = identity
        self.manifest = manifest
        self.swarm = swarm
        self.left = False
        self.gone = False  # for good
        self.leaving = False
        self.training_s = self.rng.uniform(0.5, 3.0)
        self.training_steps = STEPS

    # -- life ----------------------------------------------------------------------------------------------------

    def boot(self) -> None:
        """Start from the disk, as a daemon does: replay the certified updates, take up the vote record."""
        self.start()
        self.leaving = False
        self.sequence = self.beats = 0
        elements = self.manifest.layout.elements
        self.replica = Replica(self.manifest, np.zeros(elements, np.float32), np.zeros(elements, np.float32))
        found = restore(self)
        self.world.checker.booted(self, found)
        head = found[-1]
        self.local = self.replica.params.copy()
        self.contributor = Contributor(self.manifest)
        self.frozen: Frozen | None = None
        self.ready: SignedReady | None = None
        self.taken_back: list[Frozen] = []  # of the open round, where a plan had them before
        self.parted: list[Frozen] = []  # made on a log that was left; their rounds are to come again on the other one
        self.alone_since_s: float | None = None
        self.steps = 0
        self.missed = 0
        self.training = 0
        self.waiting = False  # what was trained is handed over and waits for its round
        self.in_step = False  # it began to train with the round
        self.trains_s = (0.0, 0.0)  # since when, and how long that takes
        self.ended_round = 0  # the others have ended their training for it
        self.blobs: dict[bytes, bytes] = {}
        self.fetching: dict[bytes, int] = {}  # how many candidates are left after the one that is asked
        self.pushed: Counter[tuple[PeerId, int]] = Counter()
        self.inbox: dict[tuple[PeerId, int, bytes], bytes] = {}
        self.replay: dict[int, Certificate] = {}
        self.target = 0  # the round that catch-up goes to, while it is not given up
        self.target_until_s = 0.0
        self.queue: deque[Effect] = deque()
        self.busy = False
        self.armed_s: float | None = None
        self.timer = 0
        self.table = PresenceTable(self.identity.peer, self.swarm, self.manifest.rounds.presence_timeout_s)
        self.table.expect(head.voters, self.clock())
        self.core = RoundCore(self._setting(), head, self.disk.vote, self.clock())
        train(self)
        self._announce()
        self._drain()

    def _setting(self) -> Setting:
        authority = self.manifest.authority(self.swarm)
        return Setting(identity=self.identity, rules=self.manifest.rounds, authority=authority)

    def leave(self) -> None:
        self.leaving = True
        self.core.leave(self.clock())
        self._announce()
        self._drain()
        self.later(0.2, self._go, self.clock() + LEAVE_TIMEOUT_S)

    def _go(self, end_s: float) -> None:
        if self._is_needed() and self.clock() < end_s:
            self.later(0.2, self._go, end_s)
            return
        self._announce()
        self.up = False
        self.world.unsettle()
        # Who goes for good while the swarm counts on its vote takes the quorum along; such a peer counts as crashed.
        self.left = not self.world.counts_on(self)

    def _is_needed(self) -> bool:
        me, live = self.identity.peer, self.table.live()
        if not live:
            return False
        busy = self.core.phase is not Phase.GATHER and me in self.core.view().roster
        head = self.core.head
        others_vote = any(voter in live and not live[voter].leaving for voter in head.voters)
        # The certificate that drops this peer may be here only.
        known = any(live[voter].head_round >= head.round for voter in head.voters if voter in live)
        untold = others_vote and not known and me not in head.voters
        return busy or untold or (me in head.voters and others_vote)

    # -- training ------------------------------------------------------------------------------------------------

    def offer(self) -> None:
        """Freeze what was handed over, and become ready with it unless the round is over already."""
        if self.core.phase is Phase.APPLY or self.leaving or self.replica.round != self.core.head.round:
            return  # the next round begins with another try
        again = [one for one in self.parted if one.round == self.core.head.round + 1]
        if len(self.taken_back) + len(again) >= PENDING_MAX:
            return  # as node/feedback.py, which keeps no more residuals for one round
        frozen = self.contributor.freeze(self.core.head.round + 1, self.replica.params, self.local)
        self.world.checker.froze(self, frozen)
        frozen, said = self._word(frozen)
        self.world.checker.announced(self.identity.peer, said)
        signed = sign_ready(self.identity, self.swarm, said)
        if self.core.offer(Offer(signed=signed, digests=frozen.digests), self.clock()):
            self.frozen, self.ready = frozen, signed
            self._announce()
        self._drain()

    def _word(self, frozen: Frozen) -> tuple[Frozen, Ready]:
        """What this peer says of its contribution."""
        said = Ready(
            round=frozen.round,
            base_root=self.core.head.state_root,
            contribution_root=frozen.root,
            tokens=self.steps * 100,
            steps=self.steps,
            norm=frozen.norm,
            owns=self.number % 4 != 3,
            attendance=find_attendance(self, frozen.round),
        )
        return frozen, said

    # -- presence ------------------------------------------------------------------------------------------------

    def _tick(self, beat: int) -> None:
        """A period has passed without anything new to announce."""
        if beat == self.beats:
            self._announce()
            self._drain()
            self.world.checker.check_bounds(self)

    def _announce(self) -> None:
        """A beat: publish the presence, find peers that are lost. The next one comes a period later at the latest."""
        self.sequence += 1
        self.world.gossip(self, sign_message(self.identity, self.swarm, self._presence()))
        if self.world.cluster.may_part:
            self.world.checker.sees(self)
        for lost in self.table.handle_deadline(self.clock()):
            self.core.lose(lost.peer, self.clock())
        self.beats += 1
        self.later(self.manifest.rounds.presence_period_s, self._tick, self.beats)
        if self.world.cluster.gossip_after_s:
            train_alone(self)

    def _presence(self) -> Presence:
        head = self.core.head
        return Presence(
            peer=self.identity.peer,
            incarnation=self.disk.incarnation,
            sequence=self.sequence,
            sent_at_s=self.wall_s(),
            agent="sim",
            trains=True,
            leaving=self.leaving,
            head_round=head.round,
            head_digest=head.digest,
            state_root=head.state_root,
            attempt=self.core.attempt,
            phase=self.core.phase.value if self.core.abstention is None else ABSTAINING,
            tensor_addresses=(),
            control_addresses=(),
            tokens_per_s=1.0,
            ready=None if self.leaving else self.ready,
        )

    def hear(self, presence: Presence) -> None:
        """A presence came, by whatever way."""
        now = self.clock()
        try:
            seen = self.table.receive(presence, now)
        except ProtocolError as error:
            self.world.checker.accused(self, presence.peer, presence, error)
            return
        if seen is None:
            return
        self.core.observe(presence, now)
        if self.world.cluster.may_part:
            self.world.checker.sees(self)
        self._drain()
        head = self.core.head
        if presence.head_digest == head.digest and presence.state_root != head.state_root:
            forked = ProtocolError(Refusal.WRONG_BASE, f"round {head.round} has another root there")
            self.world.checker.accused(self, presence.peer, presence, forked)

    def connection_reset(self, peer: PeerId) -> None:
        if self.table.suspect(peer, self.clock()) is not None:
            self.core.lose(peer, self.clock())
            self._drain()

    # -- effects -------------------------------------------------------------------------------------------------

    def _drain(self) -> None:
        life = self.life
        self._take_effects()
        while self.queue and not self.busy:
            self._execute(self.queue.popleft())
            if not self.up or self.life != life:
                return
            self._take_effects()
        deadline = self.core.next_deadline()
        if deadline != self.armed_s:
            self.armed_s = deadline
            self.timer += 1
            if deadline is not None:
                self.later(max(0.0, deadline - self.clock()) + 1e-6, self._wake_core, self.timer)

    def _take_effects(self) -> None:
        effects = self.core.take_effects()
        for effect in effects:
            # A declaration is judged when it is made: until it is sent, a write may take its time and a quorum appear.
            if isinstance(effect, Send):
                self.world.checker.declared(self, effect.message)
            elif isinstance(effect, Commit):
                self.world.checker.declared_alone(self, effect.certificate)
        self.queue.extend(effects)

    def _wake_core(self, timer: int) -> None:
        if timer == self.timer:
            self.armed_s = None
            self.core.handle_deadline(self.clock())
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
                self.disk.begin(self._held(effect.digests), effect.vote)
                self.later(self.work_s(0.001, 0.02), self._persist, effect)
                self._may_crash(Moment.PERSISTING)
            case SendPart():
                self._send_part(effect)
                self._may_crash(Moment.PART_SENT)
            case SendResult():
                self._send_result(effect)
                self._may_crash(Moment.RESULT_SENT)
            case Reduce():
                self.later(self.work_s(0.001, 0.05), self._reduce, effect)
                self._may_crash(Moment.REDUCING)
            case FetchBlob():
                turn = effect.part % max(1, len(effect.candidates))
                self._fetch(effect, (*effect.candidates[turn:], *effect.candidates[:turn]))
            case Commit():
                self._begin_commit(effect.certificate)
                self._may_crash(Moment.COMMITTING)
            case Behind():
                self._catch_up(effect)
            case Forked():
                if self.world.cluster.may_part and not is_catching_up(self):
                    ask_where_parted(self, self.world.by_id[effect.peer])
            case EndTraining():
                end_training(self, effect.round)
            case PhaseEntered() | Planned() | AttemptFailed() | PartReassigned() | SenderMissing() | QuorumSeen():
                self.world.note(self, effect)
                if isinstance(effect, Planned):
                    self._may_crash(Moment.PLANNED)
            case _:
                raise AssertionError(f"the shell cannot carry out {effect}")

    def _may_crash(self, moment: Moment) -> None:
        if self.world.armed and self.up:
            self.world.strike_at(moment, self)

    def _send(self, effect: Send) -> None:
        message = effect.message
        if isinstance(message, Vote):
            self.world.checker.voted(self, message)
        self._say(effect.peer, message)
        if isinstance(message, Vote):
            self._may_crash(Moment.VOTED)
        elif isinstance(message, Proposal):
            self._may_crash(Moment.PROPOSED)
        elif isinstance(message, Certified):
            self._may_crash(Moment.CERTIFIED)

    def _say(self, peer: PeerId, message: ROUND_MESSAGES) -> None:
        if peer == self.identity.peer:
            self.take(message, peer)
        else:
            other, carried = self.world.by_id[peer], self.world.carry(message)
            self.transmit(other, CONTROL_BYTES, describe(message), other.take, carried, self.identity.peer)

    def take(self, message: ROUND_MESSAGES, sender: PeerId) -> None:
        try:
            self.core.receive(message, sender, self.clock())
        except ProtocolError as error:
            self.world.checker.accused(self, sender, message, error)
        self._drain()

    def _held(self, digests: tuple[bytes, ...]) -> dict[bytes, bytes]:
        """The bytes that a write needs and the disk has not; a KeyError here is bytes that nobody holds."""
        return {digest: self.blobs[digest] for digest in digests if self.disk.read(digest) is None}

    def _persist(self, effect: Persist) -> None:
        self.disk.finish()
        self._resume()

    # -- parts and results ---------------------------------------------------------------------------------------

    def _send_part(self, effect: SendPart, tries: int = RESENDS_MAX) -> None:
        frozen = self.frozen
        if frozen is None or frozen.round != effect.round or frozen.digests[effect.part] != effect.digest:
            return
        raw = self._part_bytes(frozen, effect.part)
        other = self.world.by_id[effect.peer]
        args = (self, effect, raw, tries)
        self.stream(other, f"part {effect.part}", len(raw), self._while(effect.round), other.take_part, *args)

    def _part_bytes(self, frozen: Frozen, part: int) -> bytes:
        return bytes(frozen.encoded[part])

    def take_part(self, source: "SimPeer", effect: SendPart, raw: bytes, tries: int) -> None:
        sender, number, part, digest = source.identity.peer, effect.round, effect.part, effect.digest
        refusal = self.core.check_part(sender, number, part, digest)
        if refusal is not None:
            # As the tensor links do: the sender is told, and tries again what came too early.
            if refusal in RESEND_AFTER and tries > 1:
                again = (0.5, source._send_part, effect, tries - 1)
                self.transmit(source, 64, f"refused {part}", source.later, *again)
            return
        try:
            self._check_bytes(self.manifest.rounds.codec, number, part, raw, digest)
        except ProtocolError as error:
            self.world.checker.accused(self, sender, effect, error)
            return
        self.inbox[sender, part, digest] = raw
        self.core.part_received(sender, number, part, digest, self.clock())
        self._drain()

    def _check_bytes(self, codec: str, number: int, part: int, raw: bytes, digest: bytes) -> None:
        """Raises ProtocolError unless these are the bytes of the digest and decode."""
        first, end = find_span(self.manifest, number, part)
        if len(raw) != CODECS[codec].encoded_bytes(end - first):
            raise ProtocolError(Refusal.WRONG_LENGTH, f"part {part} has {len(raw)} bytes")
        if blake3(raw).digest() != digest:
            raise ProtocolError(Refusal.WRONG_DIGEST, f"part {part} is not what its header says")
        _check_decodes(codec, raw, end - first)

    def _reduce(self, effect: Reduce) -> None:
        if effect.round != self.core.round:
            return
        encoded = []
        for entry, digest in zip(effect.members, effect.digests, strict=True):
            if entry.signed.peer == self.identity.peer:
                assert self.frozen is not None
                encoded.append(bytes(self.frozen.encoded[effect.part]))
            else:
                encoded.append(self.inbox[entry.signed.peer, effect.part, digest])
        raw = self.world.reduce(self.manifest, effect, encoded)
        digest = blake3(raw).digest()
        self.world.checker.reduced(effect, digest)
        self._reduced(effect, raw, digest)

    def _reduced(self, effect: Reduce, raw: bytes, digest: bytes) -> None:
        self.blobs[digest] = raw
        indices = frozenset(effect.indices)
        self.core.part_reduced(effect.round, effect.attempt, effect.part, digest, indices, self.clock())
        self._drain()

    def _send_result(self, effect: SendResult) -> None:
        raw = self.blobs.get(effect.digest)
        if raw is None:
            return  # the round has ended
        other = self.world.by_id[effect.peer]
        args = (self.identity.peer, effect.round, effect.part, effect.digest, raw)
        self.stream(other, f"result {effect.part}", len(raw), self._while(effect.round), other.take_result, *args)

    def _while(self, number: int) -> Callable[[], bool]:
        """Whether a round is still open."""
        return lambda: self.core.round == number

    def take_result(self, sender: PeerId, number: int, part: int, digest: bytes, raw: bytes) -> None:
        if digest in self.blobs or self.pushed[sender, part] >= RESULTS_PER_PART_MAX:
            return
        if self.core.check_result_part(sender, number, part) is not None:
            return
        try:
            self._check_bytes(self.manifest.rounds.codec_out, number, part, raw, digest)
        except ProtocolError as error:
            self.world.checker.accused(self, sender, None, error)
            return
        self.pushed[sender, part] += 1
        self._hold(raw, digest)

    def _hold(self, raw: bytes, digest: bytes) -> None:
        self.blobs[digest] = raw
        self.core.blob_held(digest, self.clock())
        self._drain()

    def _fetch(self, effect: FetchBlob, candidates: tuple[PeerId, ...]) -> None:
        """Look on the disk; then ask one candidate after the other, each with its time-out."""
        if effect.round != self.core.round or effect.digest in self.blobs:
            return
        stored = self.disk.read(effect.digest)
        if stored is not None:
            self._hold(stored, effect.digest)
        elif candidates:
            other = self.world.by_id[candidates[0]]
            rest = candidates[1:]
            self.fetching[effect.digest] = len(rest)
            self.transmit(other, 64, f"fetch {effect.part}", other.serve, self, effect, rest)
            self.later(FETCH_TIMEOUT_S, self._fetch_elsewhere, effect, rest)

    def _fetch_elsewhere(self, effect: FetchBlob, rest: tuple[PeerId, ...]) -> None:
        """The candidate does not hold it, or did not answer in time."""
        if self.fetching.get(effect.digest) == len(rest):
            self._fetch(effect, rest)

    def serve(self, asker: "SimPeer", effect: FetchBlob, rest: tuple[PeerId, ...]) -> None:
        raw = self.blobs.get(effect.digest) or self.disk.read(effect.digest)
        if raw is None:
            self.transmit(asker, 64, f"no blob {effect.part}", asker._fetch_elsewhere, effect, rest)
        else:
            args = (self.identity.peer, effect, raw)
            self.stream(asker, f"blob {effect.part}", len(raw), lambda: True, asker.take_fetched, *args)

    def take_fetched(self, sender: PeerId, effect: FetchBlob, raw: bytes) -> None:
        if effect.round != self.core.round or effect.digest in self.blobs:
            return
        try:
            self._check_bytes(self.manifest.rounds.codec_out, effect.round, effect.part, raw, effect.digest)
        except ProtocolError as error:
            self.world.checker.undecodable(self, sender, effect.digest, error)
            return
        self._hold(raw, effect.digest)

    # -- the log -------------------------------------------------------------------------------------------------

    def _catch_up(self, effect: Behind) -> None:
        ask_for_log(self, self.world.by_id[effect.peer], effect.round)

    def replay_next(self, sender: PeerId) -> None:
        following = self.replay.pop(self.core.round, None)
        if following is not None:
            self.take(Certified(certificate=following), sender)

    def _apply(self, certificate: Certificate) -> Head:
        root = self.replica.apply(certificate.result, self.disk.blobs)
        return Head(
            round=certificate.result.round,
            digest=digest_record(certificate.result),
            state_root=root,
            voters=certificate.result.voters,
        )

    def _begin_commit(self, certificate: Certificate) -> None:
        self.busy = True
        digests, number = tuple(part.digest for part in certificate.result.parts), certificate.result.round
        stored = self.disk.certificates.get(number)
        if stored is not None and stored.result != certificate.result:
            self.disk.put_aside(number)  # of another log, ahead of the state: a snapshot that was not installed
        self.disk.begin(self._held(digests), certificate)
        self.later(self.work_s(0.002, 0.05), self._commit, certificate)

    def _commit(self, certificate: Certificate) -> None:
        self.disk.finish()
        head = self._apply(certificate)
        self.world.checker.committed(self, certificate, head)
        waiting = merge(self, certificate)
        write_snapshot(self)
        self.begin_round(head)
        if waiting:
            self.later(self.work_s(0.01, 0.05), self._offer_again, self.training)
        self._drain()
        self.replay_next(self.identity.peer)

    def finish_round(self) -> None:
        """Let go of what was for this round alone."""
        self.frozen, self.ready = None, None
        self.taken_back.clear()
        self.inbox.clear()
        self.blobs.clear()
        self.fetching.clear()
        self.pushed.clear()

    def begin_round(self, head: Head) -> None:
        self.finish_round()
        self.parted = [one for one in self.parted if one.round > head.round]
        self.table.expect(head.voters, self.clock())
        self.core.applied(head, self.clock())
        self.busy = False
        self._announce()

    def _offer_again(self, training: int) -> None:
        if training == self.training and self.waiting:
            self.offer()


@lru_cache(maxsize=1 << 10)
def _check_decodes(codec: str, raw: bytes, elements: int) -> None:
    """Raises ProtocolError. The same bytes go to many peers."""
    CODECS[codec].check_untrusted(raw, elements)
