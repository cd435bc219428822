"""What the daemon and the tensor links say to each other: settings, the sink, typed losses, figures.

The sink owns every buffer that payloads arrive in and decides, from a header alone, whether a payload may arrive at
all; the links own sockets, keys and deadlines. All sink methods run on the event loop and must not block it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from shoal.protocol.errors import Refusal, ShoalError
from shoal.protocol.frames import FrameHeader
from shoal.protocol.identity import PeerId, short_peer_id
from shoal.protocol.messages import PARTS_MAX

Address = tuple[str, int]


class LinkEnd(StrEnum):
    """Why a link ended, or why there is none."""

    NO_ADDRESS = "no_address"
    UNREACHABLE = "unreachable"
    HANDSHAKE_TIMEOUT = "handshake_timeout"
    CLOSED_BY_PEER = "closed_by_peer"  # without a goodbye: a crash, a reset, a killed process
    SILENT = "silent"
    STALLED = "stalled"  # the peer takes no bytes
    SLOW = "slow"  # the peer's payload crawls
    REFUSED_BY_PEER = "refused_by_peer"
    MISBEHAVED = "misbehaved"  # we refused the peer
    IDLE = "idle"
    PEER_SAID_GOODBYE = "peer_said_goodbye"
    LIMIT = "limit"  # one of our own limits
    STOPPED = "stopped"
    OUTRUN = "outrun"  # another address of the peer answered first
    ADDRESS_GONE = "address_gone"  # this machine's, by which the connection was made
    DIVERTED = "diverted"  # the connection was no link, and somebody else has it
    RELAY_ENDED = "relay_ended"  # without a goodbye, by the peer or by the member that passed its bytes on


class LinkPath(StrEnum):
    """How the connection under a link came about."""

    DIRECT = "direct"
    PUNCHED = "punched"  # both sides dialled at once, through their routers
    RELAYED = "relayed"  # a member of the swarm passes the sealed bytes on


class LinkLost(ShoalError):
    """There is no link to `peer`, or it ended under the caller's hands. `refusal` is given when one side refused."""

    def __init__(self, peer: PeerId, reason: LinkEnd, refusal: Refusal | None = None) -> None:
        super().__init__(f"link to {short_peer_id(peer)}: {reason}" + (f" ({refusal})" if refusal else ""))
        self.peer = peer
        self.reason = reason
        self.refusal = refusal


class FetchFailure(StrEnum):
    """Why a donor did not give a blob."""

    MISSING = "missing"
    REFUSED = "refused"
    WRONG_DIGEST = "wrong_digest"
    ABANDONED = "abandoned"
    TIMEOUT = "timeout"


class FetchFailed(ShoalError):
    """The peer is there and did not give the blob; ask another donor. Nothing in the target buffer is valid."""

    def __init__(self, peer: PeerId, reason: FetchFailure, refusal: Refusal | None = None) -> None:
        super().__init__(f"fetch from {short_peer_id(peer)}: {reason}" + (f" ({refusal})" if refusal else ""))
        self.peer = peer
        self.reason = reason
        self.refusal = refusal


class LinkSink(Protocol):
    """What the daemon does with what arrives.

    A pushed payload goes reserve -> (complete | aborted), exactly one of the two for every buffer that was given out.
    """

    def admit(self, peer: PeerId) -> Refusal | None:
        """Whether this authenticated peer may have a link; a refusal is told to it and ends the link."""

    def reserve(self, peer: PeerId, header: FrameHeader) -> memoryview | Refusal:
        """Where the payload of this CONTRIBUTION or RESULT goes: a writable buffer of exactly `header.nbytes` bytes.

        Called before any byte of the payload is read. A returned Refusal is told to the peer, its bytes are thrown
        away and the link goes on (the honest case: too late, a duplicate, no room); who floods us with such is the
        sink's to judge. A raised ProtocolError ends the link (a header that no honest peer sends, such as a length that
        is not the plan's).
        """

    async def complete(self, peer: PeerId, header: FrameHeader, buffer: memoryview) -> None:
        """The reserved buffer is full and its digest is the header's.

        Until it returns, the payload counts against `completions_max`; past that the link reads nothing more, so a
        slow sink slows the sender. May raise ProtocolError: the link then ends.
        """

    def aborted(self, peer: PeerId, header: FrameHeader) -> None:
        """The reserved buffer will not be filled; what stands in it is not authentic."""

    def refused(self, peer: PeerId, header: FrameHeader) -> None:
        """The peer refuses a pushed frame: round, attempt, part and digest are as sent, `refusal` says why."""

    async def serve(self, peer: PeerId, digest: bytes) -> memoryview | Refusal | None:
        """The blob with this digest, None if it is not here. It must stay unchanged while anyone holds the view."""

    def link_up(self, peer: PeerId) -> None:
        """The first link to this peer is open."""

    def link_lost(self, peer: PeerId, reason: LinkEnd) -> None:
        """The last link to this peer has ended; IDLE, PEER_SAID_GOODBYE and STOPPED are orderly ends."""

    def on_refusal(self, peer: PeerId | None, refusal: Refusal) -> None:
        """A connection or a link was ended for this; `peer` is None where nothing proves that it was that peer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkConfig:
    """Settings of the tensor links. Port 0 lets the kernel choose; a wildcard host means IPv6 and IPv4.

    Every deadline is judged at each tick, so it holds to within `tick_s`.
    """

    host: str = "0.0.0.0"
    port: int = 0
    backlog: int = 64
    congestion_control: str | None = None  # of TCP; None: the system's
    tick_s: float = 0.5
    connect_timeout_s: float = 5.0
    head_start_s: float = 0.25  # of one address of a peer before the next one is tried beside it (RFC 8305)
    direct_head_start_s: float = 1.0  # of dialling a peer before a way round is sought beside it
    addresses_tried_max: int = 8  # of one peer, by one dial
    handshake_timeout_s: float = 5.0
    ping_period_s: float = 5.0
    silence_timeout_s: float = 15.0
    # The same, once there is reason to believe that the peer has gone: above its ping period.
    doubt_timeout_s: float = 6.0
    stall_timeout_s: float = 30.0
    idle_timeout_s: float = 300.0
    goodbye_timeout_s: float = 1.0
    # A record or a payload that has begun must bring this many bytes a second, judged over each window.
    rate_bytes_per_s_min: int = 4096
    rate_window_s: float = 10.0
    links_max: int = 256
    inbound_links_max: int = 192
    links_per_peer_max: int = 16
    half_open_max: int = 32
    half_open_per_host_max: int = 16
    links_per_host_max: int = 64  # proven ones that others have dialled; processes of this machine have no such limit
    arrivals_burst: int = 128  # connections from one address at once
    arrivals_per_s: float = 16.0  # and for long
    sends_queued_max: int = 2 * PARTS_MAX  # for one peer: all that a round can have
    completions_max: int = 4  # per link
    serves_max: int = 16  # per link
    fetches_max: int = 16  # per link
    bare_headers_per_tick_max: int = 4096  # per link
    peers_remembered_max: int = 1024
    hole_life_s: float = 600.0  # so long a router may let somebody in whom this port has dialled


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerLinkStatistics:
    """Counters since the peer was first met. Wire bytes include record overhead and handshakes.

    Rates are of the recent large payloads, None until one was moved; they measure path and peer together.
    """

    peer: PeerId
    links: int
    path: LinkPath | None  # the best that an open link has; None where there is none
    frames_in: int
    frames_out: int
    payload_bytes_in: int
    payload_bytes_out: int
    wire_bytes_in: int
    wire_bytes_out: int
    send_bytes_per_s: float | None
    receive_bytes_per_s: float | None
    round_trip_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkTotals:
    """Bytes of all links since the start, those to peers that are forgotten by now included: they never fall."""

    payload_bytes_in: int
    payload_bytes_out: int
    wire_bytes_in: int
    wire_bytes_out: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkStatistics:
    """A snapshot of all tensor links."""

    links: int
    paths: Mapping[LinkPath, int]  # how many of the links came about in which way
    half_open: int
    dials: int
    peers: tuple[PeerLinkStatistics, ...]
