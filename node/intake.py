"""What arrives on the control plane: decode it, hand it to whom it concerns; and, for both planes, who misbehaves.

Invariant: bytes from outside reach the rest of the daemon only as decoded messages of this swarm and version; whatever
is dropped is counted with its reason; a peer whose account (node.conduct) is full is hung up on over both planes, and
nothing of it is taken until its time is up.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass

from shoal.node.allowances import Allowances
from shoal.node.ban_watch import BanWatch
from shoal.node.conduct import REFUSED_S, Conduct, Fault, judge
from shoal.node.control import ControlPlane, PeerUnreachable
from shoal.node.happenings import HappeningKind, Severity
from shoal.node.ledger_sync import LedgerSync
from shoal.node.metrics import Direction, Plane
from shoal.node.reporting import Reporter
from shoal.protocol.errors import ProtocolError, Refusal
from shoal.protocol.identity import PeerId, short_peer_id
from shoal.protocol.messages import (
    ROUND_MESSAGES,
    LedgerEntries,
    Refused,
    decode_message_untrusted,
    encode_message,
)

TOLD_MAX = 1024
QUESTIONS_BURST = 256  # of one peer at once; a peer that catches up asks some dozens
QUESTIONS_PER_S = 32.0  # and for long; what comes faster is answered that much later
TOLD = (Refusal.WRONG_SWARM, Refusal.WRONG_VERSION, Refusal.WRONG_BASE)

log = logging.getLogger("shoal")


@dataclass(frozen=True, slots=True, kw_only=True)
class IntakePorts:
    """Where decoded messages go, and what else has to end when a peer is hung up on."""

    round_message: Callable[[ROUND_MESSAGES, PeerId], None]
    presence: Callable[[bytes, PeerId], None]
    answer: Callable[[PeerId, bytes], Awaitable[bytes]]
    hang_up: Callable[[PeerId, Refusal], None]  # on the tensor links
    forget: Callable[[PeerId], None]  # it counts as lost
    ledger: LedgerSync  # takes entries, and has the owner's bans
    spawn: Callable[[Coroutine[object, object, object]], None]


class Intake:
    """Refuses everything until `open` is called, and again after `close`."""

    def __init__(
        self, swarm: bytes, reporter: Reporter, conduct: Conduct, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._swarm = swarm
        self._reporter = reporter
        self._conduct = conduct
        self._clock = clock
        self._control: ControlPlane
        self._ports: IntakePorts | None = None
        self._questions: Allowances[PeerId] = Allowances(burst=QUESTIONS_BURST, per_s=QUESTIONS_PER_S)
        self._told: set[tuple[PeerId, Refusal]] = set()

    def open(self, control: ControlPlane, ports: IntakePorts) -> None:
        self._control = control
        self._ports = ports
        ports.spawn(BanWatch(self._conduct.me, ports.ledger.ledger.standing, self._end_banned).watch())

    def close(self) -> None:
        self._ports = None

    @property
    def is_open(self) -> bool:
        return self._ports is not None

    # -- what comes in -----------------------------------------------------------------------------------------------

    def take_presence(self, source: PeerId, payload: bytes) -> None:
        self._reporter.control_bytes[Direction.RECEIVED] += len(payload)
        if self._ports is not None and not self._ignores(source):
            self._ports.presence(payload, source)

    def take_message(self, peer: PeerId, payload: bytes) -> None:
        self._reporter.control_bytes[Direction.RECEIVED] += len(payload)
        ports = self._ports
        if ports is None or self._ignores(peer):
            return
        try:
            message = decode_message_untrusted(self._swarm, payload)
            if isinstance(message, ROUND_MESSAGES):
                ports.round_message(message, peer)
            elif isinstance(message, LedgerEntries):
                ports.spawn(self._take_entries(peer, message))
            elif isinstance(message, Refused):
                text = f"{self._reporter.name_of(peer)} refuses this peer: {message.refusal} ({message.detail})"
                self._reporter.happen(HappeningKind.NETWORK, text, Severity.WARNING)
            else:
                raise ProtocolError(Refusal.UNKNOWN_TYPE, f"{type(message).__name__} is no message")
        except ProtocolError as error:
            self.misbehaved(peer, error)

    async def _take_entries(self, peer: PeerId, message: LedgerEntries) -> None:
        assert self._ports is not None, "spawned by take_message"
        try:
            await self._ports.ledger.take(message)
        except ProtocolError as error:
            self.misbehaved(peer, error)

    async def answer(self, peer: PeerId, raw: bytes) -> bytes:
        """Raises ProtocolError for what is not answered."""
        self._reporter.control_bytes[Direction.RECEIVED] += len(raw)
        if self._ports is None:
            raise ProtocolError(Refusal.NOT_READY, "this peer is starting or leaving")
        if self._ignores(peer):
            raise ProtocolError(self.why_refused(peer) or Refusal.LIMIT, "nothing of it is taken now")
        # A flood waits in its own streams, of which a peer has few.
        if wait_s := self._questions.reserve(peer, self._clock()):
            await asyncio.sleep(wait_s)
            if self._ports is None:
                raise ProtocolError(Refusal.NOT_READY, "this peer is leaving")
        try:
            answer = await self._ports.answer(peer, raw)
        except ProtocolError as error:
            self.misbehaved(peer, error)
            raise
        self._reporter.control_bytes[Direction.SENT] += len(answer)
        return answer

    def _ignores(self, peer: PeerId) -> bool:
        """Whether this peer is refused, and so what just came of it is dropped and counted."""
        refusal = self.why_refused(peer)
        if refusal is not None:
            self._reporter.metrics.refusals[refusal, Plane.CONTROL].add()
        return refusal is not None

    # -- who misbehaves ----------------------------------------------------------------------------------------------

    def refuses(self, peer: PeerId) -> bool:
        """Whether nothing of this peer is taken for now."""
        return self.why_refused(peer) is not None

    def why_refused(self, peer: PeerId) -> Refusal | None:
        """Why this peer gets no connection now; None when it may have one."""
        if self._ports is not None and peer in self._ports.ledger.ledger.standing.banned:
            return Refusal.BANNED
        return self._conduct.refusal(peer, self._clock())

    def admits(self, peer: PeerId) -> bool:
        """Whether a new control connection to this peer may stay; otherwise it is ended."""
        refusal = self.why_refused(peer)
        if refusal is None:
            return True
        if self._ports is not None:
            told = self._dismiss(peer) if refusal is Refusal.BANNED else self._control.disconnect(peer)
            self._ports.spawn(told)
        return False

    def _end_banned(self, peer: PeerId, reason: str) -> None:
        """The owner has banned this peer: end what there is, and tell it why."""
        text = f"hung up on {self._reporter.name_of(peer)}: {Refusal.BANNED} by the swarm's owner ({reason})"
        self._reporter.happen(HappeningKind.NETWORK, text, Severity.WARNING)
        self._reporter.metrics.hang_ups[Refusal.BANNED].add()
        if self._ports is not None:
            self._ports.hang_up(peer, Refusal.BANNED)
            self._ports.forget(peer)
            self._ports.spawn(self._dismiss(peer))

    async def _dismiss(self, peer: PeerId) -> None:
        refused = Refused(refusal=Refusal.BANNED.value, detail="by the swarm's owner")
        await self._tell(peer, encode_message(self._swarm, refused))
        await self._control.disconnect(peer)

    def misbehaved(self, peer: PeerId, error: ProtocolError) -> None:
        """A control message was refused: count it, tell a peer that is in the wrong place, note who sent it."""
        told = error.refusal in TOLD and (peer, error.refusal) not in self._told and len(self._told) < TOLD_MAX
        if told and self._ports is not None:
            self._told.add((peer, error.refusal))
            message = Refused(refusal=error.refusal.value, detail=error.detail[:200])
            self._ports.spawn(self._tell(peer, encode_message(self._swarm, message)))
        self._note(Plane.CONTROL, peer, error.refusal, judge(error.refusal), error.detail)

    def drop(self, peer: PeerId, refusal: Refusal) -> None:
        """A control message came to nothing, as it happens to honest peers."""
        self._note(Plane.CONTROL, peer, refusal, Fault.LATE, "it came too late or twice")

    def link_refused(self, peer: PeerId | None, refusal: Refusal) -> None:
        """A tensor link was ended for this; None: nobody is to blame."""
        if peer is None:
            self._reporter.metrics.refusals[refusal, Plane.TENSOR].add()
        else:
            self._note(Plane.TENSOR, peer, refusal, judge(refusal), "over a tensor link")

    def part_dropped(self, peer: PeerId, refusal: Refusal) -> None:
        """A frame of a tensor link came to nothing, as it happens to honest peers."""
        self._note(Plane.TENSOR, peer, refusal, Fault.LATE_PART, "a part came too late or twice")

    def _note(self, plane: Plane, peer: PeerId, refusal: Refusal, fault: Fault, detail: str) -> None:
        self._reporter.metrics.refusals[refusal, plane].add()
        level = logging.WARNING if fault is Fault.LIE else logging.DEBUG
        log.log(level, "refused something of %s: %s: %s", short_peer_id(peer), refusal, detail)
        if self._conduct.note(peer, refusal, fault, self._clock()):
            self._reporter.metrics.hang_ups[refusal].add()
            text = f"hung up on {short_peer_id(peer)}: {refusal} ({detail}), too often; refused for {REFUSED_S:.0f} s"
            self._reporter.happen(HappeningKind.NETWORK, text, Severity.WARNING)
            if self._ports is not None:
                # Not from within: a link may be in the middle of taking the frame that was one too many.
                self._ports.spawn(self._hang_up(self._ports, peer, refusal))

    async def _hang_up(self, ports: IntakePorts, peer: PeerId, refusal: Refusal) -> None:
        ports.hang_up(peer, refusal)
        ports.forget(peer)
        await self._control.disconnect(peer)

    async def _tell(self, peer: PeerId, payload: bytes) -> None:
        with suppress(PeerUnreachable):
            await self._control.send(peer, payload)
