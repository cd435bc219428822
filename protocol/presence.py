"""Who is there: the newest signed presence of every peer, and a deadline for each.

A presence is also the heartbeat. Nothing in the transports notices a peer that vanished without a word, so every peer
that was seen, and every peer that is expected, is lost when its deadline passes.

Invariants: per peer only a newer (incarnation, sequence) is taken; the table is bounded; time is an argument.
"""

from dataclasses import dataclass

from shoal.protocol.errors import Failure, ProtocolError, Refusal
from shoal.protocol.identity import PeerId
from shoal.protocol.messages import Presence, verify_message, verify_ready

PEERS_MAX = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerSeen:
    """A peer is alive; `first` when it was not so before. `presence` is its newest."""

    presence: Presence
    first: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerLost:
    """A peer is no longer counted as alive: PEER_LOST, or PEER_UNSEEN where it was expected and never heard of."""

    peer: PeerId
    reason: Failure


class PresenceTable:
    """Live peers by their presences. `receive`, `suspect` and `handle_deadline` return what changed."""

    def __init__(self, me: PeerId, swarm: bytes, timeout_s: float) -> None:
        self._me = me
        self._swarm = swarm
        self._timeout_s = timeout_s
        self._newest: dict[PeerId, Presence] = {}
        self._deadlines: dict[PeerId, float] = {}

    def receive(self, presence: Presence, now: float) -> PeerSeen | None:
        """Take a presence; None when it is not newer than what is known. Raises ProtocolError for a forged one."""
        if presence.peer == self._me:
            return None
        known = self._newest.get(presence.peer)
        if known and (presence.incarnation, presence.sequence) <= (known.incarnation, known.sequence):
            return None
        verify_message(presence.peer, self._swarm, presence)
        if presence.ready:
            if presence.ready.peer != presence.peer:
                raise ProtocolError(Refusal.WRONG_PEER, "a presence carries the READY of another peer")
            # A proposer answers for the READYs that it plans with, so none may get that far with a bad signature.
            verify_ready(self._swarm, presence.ready)
        if known is None and len(self._newest) >= PEERS_MAX:
            self._drop_oldest_dead()
        first = known is None or presence.peer not in self._deadlines  # an expected peer has a deadline already
        self._newest[presence.peer] = presence
        if presence.leaving and presence.peer not in self._deadlines:
            return None  # its farewell came after its connection ended
        self._deadlines[presence.peer] = now + self._timeout_s
        return PeerSeen(presence=presence, first=first)

    def expect(self, peers: tuple[PeerId, ...], now: float) -> None:
        """Start the deadline of peers that have not been heard yet, so that they, too, can be found lost."""
        for peer in peers:
            if peer != self._me and peer not in self._newest and peer not in self._deadlines:
                self._deadlines[peer] = now + self._timeout_s

    def suspect(self, peer: PeerId, now: float) -> PeerLost | None:
        """The transport says that the peer's connection is gone and cannot be made again."""
        if self._deadlines.pop(peer, None) is None:
            return None
        return self._report(peer)

    def next_deadline(self) -> float | None:
        """When `handle_deadline` is due."""
        return min(self._deadlines.values(), default=None)

    def handle_deadline(self, now: float) -> list[PeerLost]:
        """Peers whose deadline has passed."""
        late = [peer for peer, deadline in self._deadlines.items() if deadline <= now]
        for peer in late:
            del self._deadlines[peer]
        return [self._report(peer) for peer in late]

    def live(self) -> dict[PeerId, Presence]:
        """The newest presence of every live peer, by peer id."""
        return {peer: self._newest[peer] for peer in sorted(self._deadlines) if peer in self._newest}

    def newest(self, peer: PeerId) -> Presence | None:
        """What was last heard of a peer, alive or not."""
        return self._newest.get(peer)

    def _report(self, peer: PeerId) -> PeerLost:
        return PeerLost(peer=peer, reason=Failure.PEER_LOST if peer in self._newest else Failure.PEER_UNSEEN)

    def _drop_oldest_dead(self) -> None:
        dead = [peer for peer in self._newest if peer not in self._deadlines]
        if not dead:
            raise ProtocolError(Refusal.LIMIT, f"{PEERS_MAX} live peers are known already")
        del self._newest[dead[0]]
