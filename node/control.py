"""The control plane as the rest of the daemon sees it: who is there, and small messages to them.

One narrow asyncio port, so that the library behind it can be replaced: `Libp2pHost` on the network, an in-memory twin
in tests. Peers are the PeerIds of protocol.identity; addresses are multiaddrs as text that end in /p2p/<peer id>.

Invariants: a message's sender is the peer that the secure channel authenticated; handlers run on the asyncio loop, one
after the other, in the order in which things happened, and a peer's loss comes after its last message; no call waits
longer than its named timeout; every queue is bounded.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from shoal.node.reachability import ReachState
from shoal.protocol.errors import Failure, ProtocolError, Refusal, ShoalError
from shoal.protocol.identity import Identity, PeerId, short_peer_id
from shoal.protocol.wire import DELTA_BYTES_MAX

# The largest message body and the envelope around it.
FRAME_BYTES_MAX = DELTA_BYTES_MAX + 256
PRESENCE_BYTES_MAX = 16 * 1024
SEND_TIMEOUT_S = 5.0
REQUEST_TIMEOUT_S = 10.0
CONNECT_TIMEOUT_S = 5.0
LOOKUP_TIMEOUT_S = 20.0
STOP_TIMEOUT_S = 4.0
SENDS_QUEUED_MAX = 256
REQUESTS_PER_PEER_MAX = 16
PROVIDERS_MAX = 32


class PeerUnreachable(ShoalError):
    """Nothing went through to this peer; `failure` is PEER_UNREACHABLE, PEER_LOST or PEER_SLOW. An expected event."""

    def __init__(self, peer: PeerId, failure: Failure, detail: str) -> None:
        super().__init__(f"{short_peer_id(peer)}: {failure}: {detail}")
        self.peer = peer
        self.failure = failure
        self.detail = detail


class RequestRefused(ShoalError):
    """The peer is there and does not answer this question; `refusal` is the reason that it gives."""

    def __init__(self, peer: PeerId, refusal: Refusal) -> None:
        super().__init__(f"{short_peer_id(peer)} refused a request: {refusal}")
        self.peer = peer
        self.refusal = refusal


class ControlStopped(ShoalError):
    """The control plane is not running: not started yet, stopped, or crashed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerAddresses:
    """A peer and where it can be dialled, the most promising first; no addresses when only it can dial.

    `relayed`: it is connected, and through a relay only. `dialled`: it is connected because this peer has dialled it.
    `relays`: it is connected, and gives places at its relay.
    """

    peer: PeerId
    addresses: tuple[str, ...]
    relayed: bool = False
    dialled: bool = False
    relays: bool = field(default=False, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class BootstrapFailed:
    """A bootstrap peer was not reached; the next attempt follows by itself after `retry_s` seconds."""

    address: str
    detail: str
    attempts: int
    retry_s: float
    failure: Failure = Failure.BOOTSTRAP_UNREACHABLE


@dataclass(frozen=True, slots=True, kw_only=True)
class RelayLimits:
    """What a relay gives to others: circuits, each a stream of bytes between two peers that it cannot read.

    A reservation is a peer that may be reached through the relay. Beyond these numbers it refuses; a circuit past its
    time or bytes ends, and its peers make another.
    """

    reservations_max: int = 128
    reservations_per_host_max: int = 32
    reservation_s: float = 3600.0
    circuits_max: int = 256
    circuits_per_peer_max: int = 48
    circuit_s: float = 3600.0
    circuit_bytes_max: int = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class RelayCounts:
    """What a relay does at this moment, and how many bytes it has passed on so far."""

    reservations: int = 0
    circuits: int = 0
    relayed_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlConfig:
    """What a control plane is started with.

    `listen` and `announce` are multiaddrs without a peer id; port 0 lets the kernel choose. Without `announce`, the
    machine's own addresses are announced where `listen` has a wildcard. `bootstrap` addresses end in /p2p/<peer id>;
    any of them may be dead. `listen_field` is what an error about `listen` calls it. Without `relay` this peer relays
    for nobody; with `relays_unconfirmed` it does so before anybody has told that it can be dialled. `relays_wanted` is
    at how many others it asks to be relayed to while nobody can dial it. `reachability` stands instead of what would be
    found out. `upgrades_circuits`: whether peers that met through a relay try to reach each other without it.
    """

    identity: Identity
    swarm: bytes
    listen: tuple[str, ...]
    announce: tuple[str, ...] = ()
    bootstrap: tuple[str, ...] = ()
    connections_max: int = 200
    presences_per_s_max: float = 200.0
    serves_dht: bool = True
    relay: RelayLimits | None = RelayLimits()
    relays_unconfirmed: bool = False
    relays_wanted: int = 2
    reachability: ReachState | None = None
    upgrades_circuits: bool = True
    listen_field: str = "control.port"


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlReach:
    """How others reach this peer's control port, as of now.

    `confirmed` are the addresses that others have dialled when asked to, `seen_hosts` the IP addresses by which they
    see this peer, `relays` those at which it holds a place, `servers` how many have said something lately and
    `checked_s` how long ago one was asked. `serves`: it relays for others; `served` is what.
    """

    state: ReachState = ReachState.UNKNOWN
    confirmed: tuple[str, ...] = ()
    seen_hosts: tuple[str, ...] = ()
    relays: tuple[PeerId, ...] = ()
    servers: int = 0
    checked_s: float | None = None
    serves: bool = False
    served: RelayCounts = RelayCounts()


def _accept_presence(source: PeerId, payload: bytes) -> None:
    """Every presence is passed on."""


def _ignore(*_: object) -> None:
    """The daemon does not care about this event."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlHandlers:
    """What happens in the control plane. Plain callables return at once; they queue what takes time.

    `on_request` may raise ProtocolError to refuse. `check_presence` is the exception to the rule about the loop: it
    runs in the host's own thread before a presence is passed on to others, raises ProtocolError to refuse it at the
    expense of the peer that sent it on, and so must be a pure function of its arguments that every peer agrees on (no
    clock, no local state: an honest peer must never forward what another one refuses). `on_reach_changed` says that
    `addresses` or `reach` have another answer. After `on_crashed` the plane is over; the owner makes another.
    """

    on_message: Callable[[PeerId, bytes], None]
    on_request: Callable[[PeerId, bytes], Awaitable[bytes]]
    on_presence: Callable[[PeerId, bytes], None]
    on_peer_connected: Callable[[PeerId], None]
    on_peer_lost: Callable[[PeerId], None]
    on_misbehaviour: Callable[[PeerId, ProtocolError], None] = _ignore
    on_bootstrap_failed: Callable[[BootstrapFailed], None] = _ignore
    on_reach_changed: Callable[[], None] = _ignore
    on_crashed: Callable[[str], None] = _ignore
    check_presence: Callable[[PeerId, bytes], None] = _accept_presence


class ControlPlane(Protocol):
    """The port. Every call but `start` and `stop` raises ControlStopped while the plane is not running."""

    async def start(self) -> None:
        """Listen and begin to dial the bootstrap peers; raises ConfigError when an address cannot be listened on."""

    async def stop(self) -> None:
        """Hang up and end within STOP_TIMEOUT_S. Calls that are under way raise ControlStopped."""

    def addresses(self) -> tuple[str, ...]:
        """Where this peer can be dialled."""

    def reach(self) -> ControlReach:
        """Whether and how others reach this peer."""

    def offer(self, addresses: Sequence[str]) -> None:
        """Addresses at which this peer may be reachable, such as a router's: announced once others have dialled them.

        They take the place of those that were offered before. Raises UriError for a malformed one.
        """

    def refresh(self) -> None:
        """The machine's addresses may have changed, or it has slept: look again, now."""

    def peers(self) -> tuple[PeerAddresses, ...]:
        """Who is connected now."""

    async def connect(self, addresses: Sequence[str]) -> PeerId:
        """Connect to one peer by whichever of its addresses answers first; at once when it is connected already.

        Raises UriError for a malformed address and PeerUnreachable after CONNECT_TIMEOUT_S at the latest.
        """

    async def disconnect(self, peer: PeerId) -> None:
        """Hang up on a peer that has gone silent or misbehaves. `on_peer_lost` follows when it was connected."""

    async def send(self, peer: PeerId, payload: bytes) -> None:
        """Send one message of at most FRAME_BYTES_MAX bytes; returns when it is on its way.

        Messages of one caller to one peer arrive in the order of the calls. Dials the peer if it is not connected.
        Raises PeerUnreachable within SEND_TIMEOUT_S; whether the peer saw the message is then unknown.
        """

    async def request(self, peer: PeerId, payload: bytes, timeout_s: float = REQUEST_TIMEOUT_S) -> bytes:
        """Ask one question and return the answer, both of at most FRAME_BYTES_MAX bytes.

        Raises RequestRefused, PeerUnreachable (also after `timeout_s`), or ProtocolError for an answer out of bounds.
        """

    async def publish(self, payload: bytes) -> None:
        """Gossip this peer's presence, at most PRESENCE_BYTES_MAX bytes, to the swarm. Nobody need be there to hear."""

    async def provide(self, key: bytes) -> bool:
        """Announce this peer under a DHT key; whether another node stored that within LOOKUP_TIMEOUT_S."""

    async def find_providers(self, key: bytes) -> tuple[PeerAddresses, ...]:
        """Up to PROVIDERS_MAX peers that announced themselves under `key`, without this one; in LOOKUP_TIMEOUT_S."""

    async def find_peer(self, peer: PeerId) -> PeerAddresses | None:
        """Where the DHT says that `peer` can be dialled; None when it does not know within LOOKUP_TIMEOUT_S."""
