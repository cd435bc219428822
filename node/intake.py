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
from shoal.node.ban_watch import BanPorts, BanWatch
from shoal.node.conduct import REFUSED_S, Conduct, Fault, judge
from shoal.node.control import ControlPlane, PeerUnreachable
from shoal.node.decree_exchange import list_newest_decrees
from shoal.node.gate import Gate, GatePorts
from shoal.node.happenings import HappeningKind, Severity
from shoal.node.ledger_sync import LedgerSync
from shoal.node.membership import Membership
from shoal.node.metrics import Direction, Plane
from shoal.node.reminders import Reminders
from shoal.node.reporting import Reporter
from shoal.protocol.admission import GetDecrees
from shoal.protocol.errors import ProtocolError, Refusal
from shoal.protocol.identity import PeerId, short_peer_id
from shoal.protocol.messages import (
    ROUND_MESSAGES,
    GetManifest,
    LedgerEntries,
    Presence,
    Refused,
    decode_message_untrusted,
    encode_message,
)

TOLD_MAX = 1024
QUESTIONS_BURST = 256  # of one peer at once; a peer that catches up asks some dozens
QUESTIONS_PER_S = 32.0  # and for long; what comes faster is answered that much later
STRANGER_BURST = 8  # of one that is not admitted
STRANGER_PER_S = 0.5
DECREES = "decrees"
BY_OWNER = "by the swarm's owner"
OWNERS_WORD = (Refusal.NOT_ADMITTED, Refusal.BANNED)  # every member says the same
TOLD = (Refusal.WRONG_SWARM, Refusal.WRONG_VERSION, Refusal.WRONG_BASE)

log = logging.getLogger("shoal")


@dataclass(frozen=True, slots=True, kw_only=True)
class IntakePorts:
    """Where decoded messages go, and what else has to end when a peer is hung up on."""

    round_message: Callable[[ROUND_MESSAGES, PeerId], None]
    membership: Membership  # takes presences; who is hung up on counts there as lost
    answer: Callable[[PeerId, bytes], Awaitable[bytes]]
    hang_up: Callable[[PeerId, Refusal], None]  # on the tensor links
    ledger: LedgerSync  # takes entries, and has the owner's bans
    gate: Gate  # knows who is admitted
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
        self._strangers: Allowances[PeerId] = Allowances(burst=STRANGER_BURST, per_s=STRANGER_PER_S)
        self._told: set[tuple[PeerId, Refusal]] = set()
        self._reminders: Reminders[tuple[PeerId, str]] = Reminders()

    def open(self, control: ControlPlane, ports: IntakePorts) -> None:
        self._control = control
        self._ports = ports
        bans = BanPorts(end=self._end_banned, lifted=self._meet_again, tell=self._tell_own_ban)
        ports.spawn(BanWatch(self._conduct.me, ports.ledger.ledger.standing, bans).watch())
        gate_ports = GatePorts(
            control=control,
            membership=ports.membership,
            ledger=ports.ledger,
            turn_away=self._turn_away,
            end=self._end_stranger,
            round_message=ports.round_message,
            misbehaved=self.misbehaved,
            spawn=ports.spawn,
        )
        ports.gate.open(gate_ports)

    def close(self) -> None:
        self._ports = None

    @property
    def is_open(self) -> bool:
        return self._ports is not None

    # -- what comes in -----------------------------------------------------------------------------------------------

    def take_presence(self, source: PeerId, payload: bytes) -> None:
        self._reporter.control_bytes[Direction.RECEIVED] += len(payload)
        if self._ports is not None and not self._ignores(source, unless=Refusal.NOT_ADMITTED):
            self._take_presence(self._ports, source, payload)

    def _take_presence(self, ports: IntakePorts, source: PeerId, payload: bytes) -> None:
        ports.membership.take_presence(payload, source)
        if self.why_refused(source) is Refusal.NOT_ADMITTED:  # the presence has shown nothing that changes that
            self._reporter.metrics.refusals[Refusal.NOT_ADMITTED, Plane.CONTROL].add()

    def take_message(self, peer: PeerId, payload: bytes) -> None:
        self._reporter.control_bytes[Direction.RECEIVED] += len(payload)
        ports = self._ports
        if ports is None or self._ignores(peer, unless=Refusal.NOT_ADMITTED):
            return
        try:
            message = decode_message_untrusted(self._swarm, payload)
            if isinstance(message, Presence):
                self._take_presence(ports, peer, payload)
            elif isinstance(message, Refused):
                self._note_refused(ports, peer, message)
            elif self._ignores(peer):
                return
            elif isinstance(message, ROUND_MESSAGES):
                if ports.gate.find_refused(message):
                    ports.spawn(ports.gate.judge(message, peer))
                else:
                    ports.round_message(message, peer)
            elif isinstance(message, LedgerEntries):
                ports.spawn(self._take_entries(peer, message))
            else:
                raise ProtocolError(Refusal.UNKNOWN_TYPE, f"{type(message).__name__} is no message")
        except ProtocolError as error:
            self.misbehaved(peer, error)

    def _note_refused(self, ports: IntakePorts, peer: PeerId, message: Refused) -> None:
        if message.refusal == Refusal.BANNED and self._conduct.me in ports.ledger.ledger.standing.banned:
            return  # the decree has been told, which says more
        told = f"{self._reporter.name_of(peer)} refuses this peer: {message.refusal}"
        if message.refusal == Refusal.NOT_ADMITTED and not ports.gate.is_open:
            text = f"{told}; {ports.gate.was_refused(peer)}. It goes on trying"
        else:
            text = f"{told} ({message.detail})"
        who = self._conduct.me if message.refusal in OWNERS_WORD else peer
        if (ending := self._reminders.take((who, message.refusal), self._clock())) is not None:
            self._reporter.happen(HappeningKind.NETWORK, text + ending, Severity.WARNING)

    async def _take_entries(self, peer: PeerId, message: LedgerEntries) -> None:
        if self._ports is None:
            return  # closed before this had its turn
        try:
            await self._ports.ledger.take(message)
        except ProtocolError as error:
            self.misbehaved(peer, error)

    async def answer(self, peer: PeerId, raw: bytes) -> bytes:
        """Raises ProtocolError for what is not answered."""
        self._reporter.control_bytes[Direction.RECEIVED] += len(raw)
        if self._ports is None:
            raise ProtocolError(Refusal.NOT_READY, "this peer is starting or leaving")
        refusal = self.why_refused(peer)
        is_stranger = refusal is Refusal.NOT_ADMITTED and self._may_ask(raw)
        if refusal is not None and not is_stranger:
            self._reporter.metrics.refusals[refusal, Plane.CONTROL].add()
            raise ProtocolError(refusal, "nothing of it is taken now")
        # A flood waits in its own streams, of which a peer has few.
        allowances = self._strangers if is_stranger else self._questions
        if wait_s := allowances.reserve(peer, self._clock()):
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

    def _may_ask(self, raw: bytes) -> bool:
        """Whether this question is answered to one that is not admitted: it needs that in order to be so."""
        try:
            return isinstance(decode_message_untrusted(self._swarm, raw), GetManifest | GetDecrees)
        except ProtocolError:
            return False

    def _ignores(self, peer: PeerId, *, unless: Refusal | None = None) -> bool:
        """Whether this peer is refused, and so what just came of it is dropped and counted."""
        refusal = self.why_refused(peer)
        if refusal is None or refusal is unless:
            return False
        self._reporter.metrics.refusals[refusal, Plane.CONTROL].add()
        return True

    # -- who misbehaves ----------------------------------------------------------------------------------------------

    def refuses(self, peer: PeerId) -> bool:
        """Whether nothing of this peer is taken for now."""
        return self.why_refused(peer) is not None

    def why_refused(self, peer: PeerId) -> Refusal | None:
        """Why nothing of this peer is taken now; None when it may take part."""
        if self._ports is not None and peer in self._ports.ledger.ledger.standing.banned:
            return Refusal.BANNED
        refusal = self._conduct.refusal(peer, self._clock())
        if refusal is None and self._ports is not None and not self._ports.gate.admits(peer):
            return Refusal.NOT_ADMITTED
        return refusal

    def shuns(self, peer: PeerId) -> bool:
        """Whether this peer gets no connection at all; one that is not admitted may wait at the gate."""
        return self.why_refused(peer) not in (None, Refusal.NOT_ADMITTED)

    def admits(self, peer: PeerId) -> bool:
        """Whether the new control connection is that of a peer that takes part; otherwise it is ended, or waits."""
        refusal = self.why_refused(peer)
        if self._ports is None:
            return refusal is None
        if refusal in (None, Refusal.NOT_ADMITTED):
            self._ports.gate.greet(peer)
        elif refusal is Refusal.BANNED:
            self._ports.spawn(self._dismiss_banned(peer))
        else:
            self._ports.spawn(self._control.disconnect(peer))
        return refusal is None

    def _turn_away(self, peer: PeerId, ends: bool) -> None:
        """The gate has let it wait for long enough. It looks until the daemon's tasks end, also when this is closed."""
        if self._ports is None:
            return
        if ends:
            self._reporter.metrics.hang_ups[Refusal.NOT_ADMITTED].add()
            if (peer, Refusal.NOT_ADMITTED) not in self._told and len(self._told) < TOLD_MAX:
                self._told.add((peer, Refusal.NOT_ADMITTED))
                text = f"hung up on {short_peer_id(peer)}: {Refusal.NOT_ADMITTED} by the swarm's owner"
                self._reporter.happen(HappeningKind.NETWORK, text)
        self._ports.spawn(self._dismiss(peer, Refusal.NOT_ADMITTED, "ask the swarm's owner", ends=ends))

    def _end_stranger(self, peer: PeerId) -> None:
        """It was admitted and is so no more."""
        if self._ports is None:
            return
        self._ports.hang_up(peer, Refusal.NOT_ADMITTED)
        self._ports.membership.connection_lost(peer)

    def _end_banned(self, peer: PeerId, reason: str) -> None:
        """The owner has banned this peer: end what there is, and tell it why."""
        text = f"hung up on {self._reporter.name_of(peer)}: {Refusal.BANNED} by the swarm's owner ({reason})"
        self._reporter.happen(HappeningKind.NETWORK, text, Severity.WARNING)
        self._reporter.metrics.hang_ups[Refusal.BANNED].add()
        if self._ports is not None:
            self._ports.hang_up(peer, Refusal.BANNED)
            self._ports.membership.connection_lost(peer)
            self._ports.spawn(self._dismiss_banned(peer))

    def _meet_again(self, peer: PeerId) -> None:
        """It is banned no more, and may not know it: it tries rarely by itself."""
        if self._ports is not None:
            self._ports.spawn(self._ports.membership.connect(peer))

    def _tell_own_ban(self, text: str, banned: bool) -> None:
        self._reporter.happen(HappeningKind.NETWORK, text, Severity.ERROR if banned else Severity.INFO)

    async def _dismiss_banned(self, peer: PeerId) -> None:
        """Show it the owner's word first, which proves itself; not each time that it comes."""
        if self._ports is not None and self._reminders.take((peer, DECREES), self._clock()) is not None:
            decrees = list_newest_decrees(self._ports.ledger.ledger)
            await self._tell(peer, encode_message(self._swarm, decrees))
        await self._dismiss(peer, Refusal.BANNED, BY_OWNER)

    async def _dismiss(self, peer: PeerId, refusal: Refusal, detail: str, *, ends: bool = True) -> None:
        await self._tell(peer, encode_message(self._swarm, Refused(refusal=refusal.value, detail=detail)))
        if ends:
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
        if fault is not Fault.LIE:
            log.debug("refused something of %s: %s: %s", short_peer_id(peer), refusal, detail)
        elif (ending := self._reminders.take((peer, refusal), self._clock())) is not None:
            log.warning("refused something of %s: %s: %s%s", short_peer_id(peer), refusal, detail, ending)
        if self._conduct.note(peer, refusal, fault, self._clock()):
            self._reporter.metrics.hang_ups[refusal].add()
            text = f"hung up on {short_peer_id(peer)}: {refusal} ({detail}), too often; refused for {REFUSED_S:.0f} s"
            self._reporter.happen(HappeningKind.NETWORK, text, Severity.WARNING)
            if self._ports is not None:
                # Not from within: a link may be in the middle of taking the frame that was one too many.
                self._ports.spawn(self._hang_up(self._ports, peer, refusal))

    async def _hang_up(self, ports: IntakePorts, peer: PeerId, refusal: Refusal) -> None:
        ports.hang_up(peer, refusal)
        ports.membership.connection_lost(peer)
        await self._control.disconnect(peer)

    async def _tell(self, peer: PeerId, payload: bytes) -> None:
        with suppress(PeerUnreachable):
            await self._control.send(peer, payload)
