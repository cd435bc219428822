"""Hole punching: two peers behind routers dial each other at the same moment from their tensor ports, so that each
router takes the other side's packets for answers (TCP simultaneous open; the exchange is that of libp2p's DCUtR).

    offer       both sides tell by which addresses others see their tensor port, and their clocks
    clock       asked again, and the quickest answer counts: then both know the other's clock to within half of its way
    sync        a moment on the other side's clock; at that moment both dial

The clocks are compared rather than one side told "now", because control messages may go through a relay and take their
time. The sender of the offer is the dialer of the handshake, on whichever connection comes about.

Invariants: only members are served; one punch of a peer at a time, ATTEMPTS_MAX attempts of WINDOW_S each, and after a
failure a pause that doubles; nobody makes this peer dial more than KNOCKS_MAX times at ADDRESSES_MAX addresses.
"""

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

from shoal.node.allowances import Allowances
from shoal.node.control import ControlPlane, PeerUnreachable, RequestRefused
from shoal.node.endpoints import format_endpoint, parse_endpoints_untrusted, parse_ip
from shoal.node.link_port import Address, LinkLost, LinkPath
from shoal.node.links import TensorLinks
from shoal.node.pauses import Pauses
from shoal.protocol.errors import Failure, ProtocolError, Refusal, ShoalError
from shoal.protocol.identity import PeerId, short_peer_id
from shoal.protocol.messages import (
    ADDRESSES_MAX,
    GetPunchClock,
    PunchAnswer,
    PunchClock,
    PunchOffer,
    PunchSync,
    decode_message_untrusted,
    encode_message,
)

ATTEMPTS_MAX = 2
WINDOW_S = 1.6  # of one attempt: the kernel sends its first packet again after one second
CLOCKS_MAX = 3  # answers that tell the other side's clock, by one attempt
LEAD_S = 0.05  # from the last word to the moment, on top of the way there
START_LATEST_S = 5.0  # the moment is no later than this
REQUEST_TIMEOUT_S = 3.0
TIMEOUT_S = 9.0  # of all attempts and what is said for them
KNOCKS_MAX = 6  # dials of one address in a window, where it is refused at once
KNOCK_PAUSE_S = 0.2
PAUSE_S = 60.0  # after a failure, twice as long after each further one
PAUSE_S_MAX = 900.0
OFFER_PERIOD_S = 2.0  # from one offer of a peer to the next
SESSIONS_MAX = 16
SESSION_LIFE_S = 10.0
PEERS_MAX = 1024

log = logging.getLogger(__name__)

A = TypeVar("A", PunchAnswer, PunchClock)


class PunchFailed(ShoalError):
    """No hole to `peer`; `failure` says why. An expected event."""

    def __init__(self, peer: PeerId, failure: Failure, detail: str = "") -> None:
        super().__init__(f"no hole to {short_peer_id(peer)}: {failure}" + (f" ({detail})" if detail else ""))
        self.failure = failure


@dataclass(frozen=True, slots=True, kw_only=True)
class PunchPorts:
    """What punching needs of the daemon."""

    is_member: Callable[[PeerId], bool]
    # Where this peer can punch a hole to: the tensor port as others see it, and the machine's own addresses.
    own_addresses: Callable[[PeerId], Awaitable[tuple[Address, ...]]]
    varies: Callable[[], bool]  # whether everybody sees it at another address
    now: Callable[[], float] = time.monotonic


@dataclass(slots=True, kw_only=True)
class _Session:
    """An offer of another peer that this one has agreed to."""

    token: bytes
    until_s: float
    addresses: tuple[Address, ...] = ()
    dialling: "asyncio.Task[None] | None" = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Clock:
    """The other side's clock is ours plus `ahead_s`; `round_trip_s` is twice the most by which that may be wrong."""

    ahead_s: float
    round_trip_s: float


class Punches:
    """Both sides of every punch of this peer. All calls on the event loop."""

    def __init__(self, me: PeerId, swarm: bytes, control: ControlPlane, links: TensorLinks, ports: PunchPorts) -> None:
        self._me = me
        self._swarm = swarm
        self._control = control
        self._links = links
        self._ports = ports
        self._offering: set[PeerId] = set()
        self._sessions: dict[PeerId, _Session] = {}
        self._offers: Allowances[PeerId] = Allowances(burst=1, per_s=1 / OFFER_PERIOD_S, keys_max=PEERS_MAX)
        self._pauses: Pauses[PeerId] = Pauses(first_s=PAUSE_S, last_s=PAUSE_S_MAX, keys_max=PEERS_MAX)

    # -- the side that wants a link ----------------------------------------------------------------------------------

    async def punch(self, peer: PeerId) -> None:
        """Make a link to `peer`; raises PunchFailed."""
        if self._pauses.has(peer, self._ports.now()):
            raise PunchFailed(peer, Failure.PUNCH_PAUSED)
        assert peer not in self._offering, "one dial of a peer at a time"
        self._offering.add(peer)
        try:
            async with asyncio.timeout(TIMEOUT_S):
                await self._punch(peer)
        except TimeoutError:
            self._pauses.begin(peer, self._ports.now())
            raise PunchFailed(peer, Failure.PUNCH_TIMEOUT) from None
        except PunchFailed:
            self._pauses.begin(peer, self._ports.now())
            raise
        finally:
            self._offering.discard(peer)
        self._pauses.end(peer)

    def forget_pauses(self) -> None:
        """What failed may work now: this peer's addresses have changed."""
        self._pauses.clear()

    async def _punch(self, peer: PeerId) -> None:
        if self._find_session(peer) is not None:
            await self._links.wait_linked(peer)
            return
        own = (await self._ports.own_addresses(peer))[:ADDRESSES_MAX]
        if not own:
            raise PunchFailed(peer, Failure.NO_OBSERVED_ADDRESS)
        token, varies = os.urandom(32), self._ports.varies()
        offer = PunchOffer(token=token, addresses=tuple(map(format_endpoint, own)), varies=varies)
        try:
            answer, clock = await self._ask(peer, offer, PunchAnswer)
        except RequestRefused as error:
            if error.refusal is Refusal.DUPLICATE:
                # Both have made an offer, and theirs stands: the link comes from there.
                await self._links.wait_linked(peer)
                return
            raise PunchFailed(peer, Failure.PUNCH_REFUSED, error.refusal) from error
        addresses = _list_dialable(answer.addresses, own)
        if not addresses:
            raise PunchFailed(peer, Failure.PUNCH_REFUSED, "no address family in common")
        # What varies is the IPv4 address behind a NAT; nobody rewrites those of IPv6.
        is_hopeless = (varies or answer.varies) and not any(":" in host for host, _ in addresses)
        for _ in range(1 if is_hopeless else ATTEMPTS_MAX):
            if await self._attempt(peer, token, addresses, clock):
                return
        raise PunchFailed(peer, Failure.PUNCH_TIMEOUT)

    async def _attempt(self, peer: PeerId, token: bytes, addresses: tuple[Address, ...], clock: _Clock) -> bool:
        try:
            for _ in range(CLOCKS_MAX - 1):
                _, again = await self._ask(peer, GetPunchClock(token=token), PunchClock)
                clock = min(clock, again, key=lambda one: one.round_trip_s)
            at_s = self._ports.now() + clock.round_trip_s + LEAD_S
            sync = PunchSync(token=token, at_s=at_s + clock.ahead_s)
            agreeing = asyncio.ensure_future(self._ask(peer, sync, PunchClock))
            try:
                opened = await self._dial(peer, addresses, at_s, dialer=True)
            finally:
                agreeing.cancel()
                with suppress(asyncio.CancelledError, RequestRefused, PunchFailed):
                    await agreeing
        except RequestRefused as error:
            raise PunchFailed(peer, Failure.PUNCH_REFUSED, error.refusal) from error
        return opened

    async def _ask(self, peer: PeerId, question: object, kind: type[A]) -> tuple[A, _Clock]:
        """The answer, and what it says of the other side's clock; raises PunchFailed or RequestRefused."""
        began_s = self._ports.now()
        try:
            raw = await self._control.request(peer, encode_message(self._swarm, question), REQUEST_TIMEOUT_S)
            answer = decode_message_untrusted(self._swarm, raw)
        except PeerUnreachable as error:
            raise PunchFailed(peer, error.failure, error.detail) from error
        except ProtocolError as error:
            raise PunchFailed(peer, Failure.PUNCH_REFUSED, error.refusal) from error
        if not isinstance(answer, kind):
            raise PunchFailed(peer, Failure.PUNCH_REFUSED, type(answer).__name__)
        ended_s = self._ports.now()
        ahead_s = answer.clock_s - (began_s + ended_s) / 2
        return answer, _Clock(ahead_s=ahead_s, round_trip_s=ended_s - began_s)

    # -- the side that is asked --------------------------------------------------------------------------------------

    async def take_offer(self, peer: PeerId, offer: PunchOffer) -> PunchAnswer:
        """Raises ProtocolError where this peer does not take part."""
        now = self._ports.now()
        if not self._ports.is_member(peer):
            raise ProtocolError(Refusal.NOT_A_MEMBER, "holes are for members")
        if peer in self._offering and self._me < peer:
            raise ProtocolError(Refusal.DUPLICATE, "an offer of this peer stands")
        self._sessions = {one: kept for one, kept in self._sessions.items() if kept.until_s > now}
        if self._find_session(peer) is not None or len(self._sessions) >= SESSIONS_MAX:
            raise ProtocolError(Refusal.LIMIT, f"{len(self._sessions)} holes are being punched")
        if not self._offers.take(peer, now):
            raise ProtocolError(Refusal.LIMIT, f"one offer in {OFFER_PERIOD_S:g} s")
        session = _Session(token=offer.token, until_s=now + SESSION_LIFE_S)
        self._sessions[peer] = session
        own = (await self._ports.own_addresses(peer))[:ADDRESSES_MAX]
        session.addresses = _list_dialable(offer.addresses, own)
        if not session.addresses:
            self._sessions.pop(peer, None)
            raise ProtocolError(Refusal.NOT_READY, "no address to dial")
        return PunchAnswer(
            addresses=tuple(map(format_endpoint, own)), varies=self._ports.varies(), clock_s=self._ports.now()
        )

    def tell_clock(self, peer: PeerId, question: GetPunchClock) -> PunchClock:
        """Raises ProtocolError unless an offer with this token stands."""
        self._require_session(peer, question.token)
        return PunchClock(clock_s=self._ports.now())

    def take_sync(self, peer: PeerId, sync: PunchSync) -> PunchClock:
        """Dial at that moment; raises ProtocolError."""
        session = self._require_session(peer, sync.token)
        now = self._ports.now()
        if sync.at_s > now + START_LATEST_S:
            raise ProtocolError(Refusal.OUT_OF_RANGE, f"{sync.at_s - now:.0f} s ahead")
        if session.dialling is not None:
            session.dialling.cancel()  # the other side has given that attempt up
        session.until_s = max(session.until_s, sync.at_s + WINDOW_S + SESSION_LIFE_S / 2)
        session.dialling = self._links.spawn(self._follow(peer, session, sync.at_s))
        return PunchClock(clock_s=now)

    def _find_session(self, peer: PeerId) -> _Session | None:
        """What goes on with this peer; after an attempt it may make another one."""
        session = self._sessions.get(peer)
        if session is None or session.until_s <= self._ports.now():
            return None
        return None if session.dialling is not None and session.dialling.done() else session

    def _require_session(self, peer: PeerId, token: bytes) -> _Session:
        session = self._sessions.get(peer)
        if session is None or session.token != token or session.until_s <= self._ports.now():
            raise ProtocolError(Refusal.EXPIRED, "no such offer stands")
        return session

    async def _follow(self, peer: PeerId, session: _Session, at_s: float) -> None:
        if await self._dial(peer, session.addresses, at_s, dialer=False) and self._sessions.get(peer) is session:
            del self._sessions[peer]

    # -- both --------------------------------------------------------------------------------------------------------

    async def _dial(self, peer: PeerId, addresses: tuple[Address, ...], at_s: float, *, dialer: bool) -> bool:
        """Knock at every address from that moment on; whether a link came about."""
        await asyncio.sleep(max(0.0, at_s - self._ports.now()))
        knocks: list[asyncio.Task[None]] = []
        try:
            with self._links.punching(peer, [host for host, _ in addresses], dialer=dialer):
                knocks += [asyncio.ensure_future(self._knock(peer, one, dialer=dialer)) for one in addresses]
                async with asyncio.timeout(WINDOW_S):
                    await self._links.wait_linked(peer)
        except TimeoutError:
            return False
        finally:
            for one in knocks:
                one.cancel()
            await asyncio.gather(*knocks, return_exceptions=True)
        return True

    async def _knock(self, peer: PeerId, address: Address, *, dialer: bool) -> None:
        for _ in range(KNOCKS_MAX):
            try:
                connection = await self._links.connect_from_port(peer, address, WINDOW_S)
                await self._links.adopt(connection, peer, dialer=dialer, path=LinkPath.PUNCHED)
                return
            except LinkLost as lost:
                log.debug("knocking at %s: %s (%s)", format_endpoint(address), lost, lost.__cause__)
            await asyncio.sleep(KNOCK_PAUSE_S)


def _list_dialable(texts: tuple[str, ...], own: tuple[Address, ...]) -> tuple[Address, ...]:
    """What another peer says of itself, without what this one has no address of the family for, and without names:
    they would be looked up first."""
    families = {":" in host for host, _ in own}
    found = (one for one in parse_endpoints_untrusted(texts) if parse_ip(one[0]) is not None)
    return tuple(one for one in found if (":" in one[0]) in families)
