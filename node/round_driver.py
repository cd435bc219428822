"""Runs the round core on asyncio: feed it, carry out its effects in order, re-arm one timer.

Contract with the core (protocol.effects): effects are carried out in their order, and nothing after a `Persist` or a
`Commit` starts before it is done. Messages go out in the order of their effects, per peer.

Invariants: a vote leaves this process only after its record and the update's bytes are durable; when the disk fails,
the driver stops carrying out effects (the peer no longer votes) and everything else goes on; a snapshot is taken over
between two effects, and nothing that was wanted before it is done after it. Once the disk works again, `resume` goes on
from what is durable.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass

from shoal.node.control import ControlPlane, PeerUnreachable
from shoal.node.exchange import PartExchange
from shoal.node.ledger_store import StoreError, classify_failure
from shoal.node.local_state import LocalState
from shoal.node.repair import begin_abstention, end_abstention
from shoal.node.run_clock import PULSE_S, RunClock
from shoal.node.verification import Verification
from shoal.protocol.codecs import Float32s
from shoal.protocol.effects import (
    AttemptFailed,
    Behind,
    Commit,
    Effect,
    EndTraining,
    FetchBlob,
    Forked,
    Note,
    PartReassigned,
    Persist,
    PhaseEntered,
    Planned,
    Pledge,
    QuorumSeen,
    Reduce,
    Send,
    SenderMissing,
    SendPart,
    SendResult,
)
from shoal.protocol.errors import Failure, ProtocolError, Refusal
from shoal.protocol.identity import PeerId
from shoal.protocol.messages import ROUND_MESSAGES, Certificate, encode_message
from shoal.protocol.quorum import Head
from shoal.protocol.rounds import RoundCore

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class DriverPorts:
    """What the driver tells the daemon. `committed` runs after a round is applied, before the next one begins; `begun`
    when it has."""

    note: Callable[[Note], None]
    committed: Callable[[Certificate, Head], Awaitable[None]]
    begun: Callable[[], None]
    end_training: Callable[[int], None]
    behind: Callable[[Behind], None]
    forked: Callable[[Forked], None]
    dropped: Callable[[PeerId, Refusal], None]
    misbehaved: Callable[[PeerId, ProtocolError], None]
    disk_failed: Callable[[Failure, str], None]
    spawn: Callable[[Coroutine[object, object, object]], None]


class RoundDriver:
    """All calls on the event loop. `pump` after every call to the core."""

    def __init__(
        self,
        *,
        me: PeerId,
        swarm: bytes,
        core: RoundCore,
        state: LocalState,
        exchange: PartExchange,
        control: ControlPlane,
        ports: DriverPorts,
    ) -> None:
        self.core = core
        self._me = me
        self._swarm = swarm
        self._state = state
        self._exchange = exchange
        self._control = control
        self._ports = ports
        self._effects: deque[Effect] = deque()
        self._wake = asyncio.Event()
        self._working = asyncio.Lock()  # held while an effect is carried out and while a snapshot is taken over
        self._halted = False
        self._forgot = False
        self._timer: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()
        self.clock = RunClock(self._loop.time)
        self._pulse: asyncio.TimerHandle | None = None
        self._verification = Verification(swarm, deliver=self._hand_over, drop=ports.dropped, spawn=ports.spawn)

    def now(self) -> float:
        """The core's clock, monotonic, in seconds: the loop's, while this process runs."""
        return self.clock.now()

    def pump(self) -> None:
        """Take over what the core wants done, and be woken when its next deadline passes."""
        effects = self.core.take_effects()
        if self._halted:
            return  # nobody carries them out any more
        self._effects.extend(effects)
        if self._effects:
            self._wake.set()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        deadline = self.core.next_deadline()
        if deadline is not None:
            self._timer = self._loop.call_at(self.clock.find(deadline), self._on_deadline)

    def _on_deadline(self) -> None:
        self._timer = None
        self.core.handle_deadline(self.now())
        self.pump()

    def receive(self, message: ROUND_MESSAGES, sender: PeerId) -> None:
        """Hand a peer's message to the core, behind those that it sent before; a peer that must not send it is
        reported."""
        self._verification.take(message, sender, self.core.head.voters)

    def _hand_over(self, message: ROUND_MESSAGES, sender: PeerId) -> None:
        try:
            dropped = self.core.receive(message, sender, self.now())
            if dropped is not None and sender != self._me:
                self._ports.dropped(sender, dropped)
        except ProtocolError as error:
            self._ports.misbehaved(sender, error)
        self.pump()

    async def run(self) -> None:
        """Carry out effects until cancelled. While the disk fails there are none."""
        self._look()
        self.pump()
        while True:
            async with self._working:
                if self._effects:
                    try:
                        await self._carry_out(self._effects.popleft())
                    except (OSError, StoreError) as error:
                        self._fail(error)
                    continue
            self._wake.clear()
            await self._wake.wait()

    def _look(self) -> None:
        self.clock.now()
        self._pulse = self._loop.call_later(PULSE_S, self._look)

    def _fail(self, error: OSError | StoreError) -> None:
        self.halt()
        self._ports.disk_failed(classify_failure(error), str(error))

    def halt(self) -> None:
        """Carry out nothing more: this peer votes and contributes no longer, and still serves what it has."""
        self._halted = True
        self._effects.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    async def resume(self) -> None:
        """Go on after `halt`, from what is durable. Raises OSError and StoreError, and stays halted, while the disk
        takes no writes."""
        async with self._working:
            vote = await asyncio.to_thread(self._state.renew_vote)
            self.core.take_effects()
            self.core.resume(vote, self.now())
            self._halted = False
        self.pump()

    def stop(self) -> None:
        """No deadline fires any more."""
        for timer in (self._timer, self._pulse):
            if timer is not None:
                timer.cancel()

    async def _carry_out(self, effect: Effect) -> None:
        match effect:
            case Send():
                self._send(effect)
            case Persist():
                await asyncio.to_thread(self._persist, effect)
            case SendPart():
                self._exchange.send_part(effect)
            case SendResult():
                self._exchange.send_result(effect)
            case Reduce():
                self._exchange.reduce(effect)
            case FetchBlob():
                self._exchange.fetch(effect)
            case Commit():
                await self._commit(effect)
            case Behind():
                self._ports.behind(effect)
            case Forked():
                self._ports.forked(effect)
            case EndTraining():
                self._ports.end_training(effect.round)
            case PhaseEntered() | Planned() | AttemptFailed() | PartReassigned() | SenderMissing() | QuorumSeen():
                self._ports.note(effect)

    def _send(self, effect: Send) -> None:
        if effect.peer == self._me:
            self._hand_over(effect.message, self._me)
        else:
            # Tasks start in the order in which they are made, so messages to one peer keep theirs.
            self._ports.spawn(self._transmit(effect.peer, encode_message(self._swarm, effect.message)))

    async def _transmit(self, peer: PeerId, payload: bytes) -> None:
        try:
            await self._control.send(peer, payload)
        except PeerUnreachable as error:
            log.debug("a round message was not sent: %s", error)

    def _persist(self, effect: Persist) -> None:
        if effect.digests:
            self._exchange.store_results(effect.digests)
        self._state.save_vote(effect.vote)

    async def _commit(self, effect: Commit) -> None:
        if effect.certificate.result.round != self.core.round:
            return  # a snapshot has led past this round meanwhile
        await self._note_memory((effect.certificate,))
        head = await self._state.commit(effect.certificate, self._exchange.result)
        await self._ports.committed(effect.certificate, head)
        self._exchange.finish_round()
        await self._apply(head)
        self.pump()
        self._ports.begun()

    async def _note_memory(self, certificates: Sequence[Certificate]) -> None:
        """Before this peer goes on from certificates that carry a vote of its own which it does not remember."""
        if any(self.core.has_forgotten(certificate) for certificate in certificates):
            log.warning("%s: certificates carry votes of this peer that its disk lacks", Failure.VOTES_FORGOTTEN)
            await asyncio.to_thread(begin_abstention, self._state.stores.ledger)
            self._forgot = True

    async def forget(self, *, for_good: bool) -> None:
        """There is proof that this peer does not know all that it has signed: vote no more until that can do no harm,
        or, where somebody else is signing with its key, `for_good`. Never raises."""
        abstention = self.core.abstention
        if abstention is not None and (abstention.lasts or not for_good):
            return
        async with self._working:
            try:
                await asyncio.to_thread(begin_abstention, self._state.stores.ledger)
            except StoreError as error:
                self._fail(error)
                return
            log.warning("%s: others hold entries of this peer that its disk lacks", Failure.VOTES_FORGOTTEN)
            self._effects.extend(self.core.take_effects())
            # What is certified is applied all the same; what was to be signed is not said.
            self._effects = deque(one for one in self._effects if not isinstance(one, Send | Persist))
            self.core.abstain(self.now(), for_good=for_good)
        self.pump()

    async def _apply(self, head: Head) -> None:
        if self._forgot and self.core.abstention is None:
            self.core.abstain(self.now())
        self._forgot = False
        abstained = self.core.abstention is not None
        self.core.applied(head, self.now())
        if abstained and self.core.abstention is None:
            await asyncio.to_thread(end_abstention, self._state.stores.ledger)
            log.info("what this peer has forgotten can do no harm any more: it votes from round %d on", self.core.round)

    async def install(self, head: Head, params: Float32s, momentum: Float32s) -> None:
        """Take over the state of a later round, checked against `head.state_root`, and go on from there; nothing where
        live rounds have led past it meanwhile.

        Raises StoreError.
        """
        async with self._working:
            if head.round <= self.core.head.round:
                return
            certificates = await asyncio.to_thread(self._state.list_certificates, self.core.round, head.round + 1)
            await self._note_memory(certificates)
            await self._state.install(head, params, momentum)
            self.core.take_effects()
            self._effects.clear()
            self._exchange.finish_round()
            await self._apply(head)
        self.pump()

    async def switch(self, pledge: Pledge) -> None:
        """Go over to the log of the pledge, from where it parts from ours. Raises OSError and StoreError; then it has
        halted."""
        async with self._working:
            # Durable first: after a crash in between, the peer still knows what it signed and where it goes.
            record = self.core.leave_log(pledge)
            try:
                await asyncio.to_thread(self._state.save_vote, record)
                head = await self._state.rewind(pledge.first)
            except (OSError, StoreError) as error:
                self._fail(error)  # the core is on its way already
                raise
            self.core.take_effects()
            self._effects.clear()
            self._exchange.finish_round()
            self.core.switch(head, self.now())
        self.pump()
