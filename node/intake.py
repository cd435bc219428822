"""What arrives on the control plane: decode it, hand it to whom it concerns, and keep account of who misbehaves.

Invariant: bytes from outside reach the rest of the daemon only as decoded messages of this swarm and version; a peer
that goes on sending what it must not is hung up on after MISBEHAVIOUR_MAX refusals.
"""

import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass

from shoal.node.control import ControlPlane, PeerUnreachable
from shoal.node.happenings import HappeningKind, Severity
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

MISBEHAVIOUR_MAX = 16
TOLD_MAX = 1024
TOLD = (Refusal.WRONG_SWARM, Refusal.WRONG_VERSION, Refusal.WRONG_BASE)

log = logging.getLogger("shoal")


@dataclass(frozen=True, slots=True, kw_only=True)
class IntakePorts:
    """Where decoded messages go."""

    round_message: Callable[[ROUND_MESSAGES, PeerId], None]
    presence: Callable[[bytes, PeerId], None]
    entries: Callable[[LedgerEntries], Awaitable[object]]
    answer: Callable[[PeerId, bytes], Awaitable[bytes]]
    spawn: Callable[[Coroutine[object, object, object]], None]


class Intake:
    """Refuses everything until `open` is called, and again after `close`."""

    def __init__(self, swarm: bytes, reporter: Reporter) -> None:
        self._swarm = swarm
        self._reporter = reporter
        self._control: ControlPlane
        self._ports: IntakePorts | None = None
        self._misbehaviour: Counter[PeerId] = Counter()
        self._told: set[tuple[PeerId, Refusal]] = set()

    def open(self, control: ControlPlane, ports: IntakePorts) -> None:
        self._control = control
        self._ports = ports

    def close(self) -> None:
        self._ports = None

    @property
    def is_open(self) -> bool:
        return self._ports is not None

    def take_presence(self, source: PeerId, payload: bytes) -> None:
        self._reporter.control_bytes[Direction.RECEIVED] += len(payload)
        if self._ports is not None:
            self._ports.presence(payload, source)

    def take_message(self, peer: PeerId, payload: bytes) -> None:
        self._reporter.control_bytes[Direction.RECEIVED] += len(payload)
        ports = self._ports
        if ports is None:
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
            await self._ports.entries(message)
        except ProtocolError as error:
            self.misbehaved(peer, error)

    async def answer(self, peer: PeerId, raw: bytes) -> bytes:
        """Raises ProtocolError for what is not answered."""
        self._reporter.control_bytes[Direction.RECEIVED] += len(raw)
        if self._ports is None:
            raise ProtocolError(Refusal.NOT_READY, "this peer is starting or leaving")
        answer = await self._ports.answer(peer, raw)
        self._reporter.control_bytes[Direction.SENT] += len(answer)
        return answer

    def misbehaved(self, peer: PeerId, error: ProtocolError) -> None:
        """Count it; tell a peer that is in the wrong place; hang up on one that goes on."""
        self._reporter.metrics.refusals[error.refusal, Plane.CONTROL].add()
        log.warning("refused something of %s: %s", short_peer_id(peer), error)
        if self._ports is None:
            return
        if error.refusal in TOLD and (peer, error.refusal) not in self._told and len(self._told) < TOLD_MAX:
            self._told.add((peer, error.refusal))
            told = Refused(refusal=error.refusal.value, detail=error.detail[:200])
            self._ports.spawn(self._tell(peer, encode_message(self._swarm, told)))
        self._misbehaviour[peer] += 1
        if self._misbehaviour[peer] == MISBEHAVIOUR_MAX:
            del self._misbehaviour[peer]
            text = f"hung up on {short_peer_id(peer)}: {error}"
            self._reporter.happen(HappeningKind.NETWORK, text, Severity.WARNING)
            self._ports.spawn(self._control.disconnect(peer))

    async def _tell(self, peer: PeerId, payload: bytes) -> None:
        with suppress(PeerUnreachable):
            await self._control.send(peer, payload)
