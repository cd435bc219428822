"""Keeps track of whether others can dial this peer's tensor port, and announces where: only who can be dialled may own
parts of a reduction.

Members are asked to dial every candidate address: when somebody is there to ask, again after a period that depends on
the state, at once when the machine's own addresses have changed, and soon after a dial-back has failed. A peer that
nobody can dial asks members how they see a connection from its tensor port: the address that its router has given it.

Invariants: what is announced has been found open or has not been tried yet; a link from a member that this peer has
dialled from its tensor port proves nothing, because that dial has opened the router for it.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass

from shoal.node.config import TensorTable
from shoal.node.control import ControlPlane, PeerUnreachable, RequestRefused
from shoal.node.endpoints import (
    format_endpoint,
    is_loopback,
    is_public,
    is_wildcard,
    parse_endpoint_untrusted,
    parse_ip,
)
from shoal.node.link_port import Address, LinkLost
from shoal.node.links import TensorLinks
from shoal.node.reachability import NatMapping, Reachability, ReachReason, ReachState, judge_mapping
from shoal.node.status import AddressStatus, ReachStatus
from shoal.protocol.errors import ProtocolError
from shoal.protocol.identity import PeerId, short_peer_id
from shoal.protocol.messages import (
    ADDRESSES_MAX,
    GetObserved,
    ObservedAnswer,
    Presence,
    ProbeAddresses,
    ProbeAnswer,
    decode_message_untrusted,
    encode_message,
)

# From one check to the next, by state.
UNKNOWN_PERIOD_S = 2.0
PRIVATE_PERIOD_S = 60.0
REACHABLE_PERIOD_S = 300.0
FAILED_PERIOD_S = 10.0  # after a dial-back of a reachable address has failed
ASKED_MAX = 3  # members, by one check
OBSERVERS_MAX = 2
OBSERVE_TIMEOUT_S = 2.0  # where somebody waits for it
OWN_HOSTS_MAX = 6
PUNCH_S = 12.0  # longer than all attempts at a hole

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReachPorts:
    """What reachability needs of the daemon."""

    live: Callable[[], Mapping[PeerId, Presence]]
    addresses_of: Callable[[PeerId], tuple[Address, ...]]
    hosts: Callable[[], tuple[str, ...]]  # this machine's own addresses, without loopback
    seen_hosts: Callable[[], tuple[str, ...]]  # those by which others see it on the control plane
    changed: Callable[[], None]  # the state, its reason or what is announced
    now: Callable[[], float] = time.monotonic


class Reach:
    """All calls on the event loop. `bound` is what the tensor links listen on."""

    def __init__(
        self,
        swarm: bytes,
        config: TensorTable,
        bound: Address,
        control: ControlPlane,
        links: TensorLinks,
        ports: ReachPorts,
    ) -> None:
        self._swarm = swarm
        self._config = config
        self._bound = bound
        self._control = control
        self._links = links
        self._ports = ports
        self._known = Reachability()
        self._mapped: dict[str, Address] = {}
        self._observed: dict[PeerId, Address] = {}  # the tensor port, as members see it
        self._observing: dict[PeerId, bytes] = {}  # the links that they see it by
        self._asking: dict[PeerId, asyncio.Task[bool]] = {}  # who is being asked for that
        self._dials: dict[PeerId, asyncio.Timeout] = {}  # to become such links
        self._punched: dict[PeerId, float] = {}  # when a hole to a peer was begun
        self._stale_before_s: float | None = None
        self._failed = False
        self._turn = 0
        self._poked = asyncio.Event()
        self._told: tuple[object, ...] = ()
        links.on_accepted = self.link_came_in
        self._known.set_candidates(self._list_candidates())

    # -- what is known -----------------------------------------------------------------------------------------------

    @property
    def state(self) -> ReachState:
        return self._known.judge(self._ports.now())[0]

    @property
    def reason(self) -> ReachReason:
        return self._known.judge(self._ports.now())[1]

    @property
    def reached(self) -> bool:
        """Whether this peer may own parts."""
        return self.state is ReachState.REACHABLE

    @property
    def mapping(self) -> NatMapping:
        """What routers on the way make of the tensor port."""
        return judge_mapping(self._ports.hosts(), tuple(self._observed.values()), self._bound[1])

    def announced(self) -> tuple[Address, ...]:
        """Where others should dial now."""
        return self._known.announced(self._ports.now())[:ADDRESSES_MAX]

    def observed(self) -> tuple[Address, ...]:
        """The tensor port as members see it: what a hole can be punched to."""
        return tuple(dict.fromkeys(self._observed.values()))

    async def find_outer(self, peer: PeerId) -> tuple[Address, ...]:
        """Where `peer` can punch a hole to: the tensor port as members see it now, and the machine's own addresses, for
        peers on the same network and for IPv6. A dial of that peer from the port would be in the way, so it ends, and
        there is none for PUNCH_S."""
        self._punched = {one: at for one, at in self._punched.items() if self._ports.now() - at < PUNCH_S}
        self._punched[peer] = self._ports.now()
        if (dial := self._dials.get(peer)) is not None:
            dial.reschedule(asyncio.get_running_loop().time())
        if not any(self._links.has_link(one, binding) for one, binding in self._observing.items()):
            with suppress(TimeoutError):
                async with asyncio.timeout(OBSERVE_TIMEOUT_S):
                    await self._observe(until_first=True)
        return tuple(dict.fromkeys((*self.observed(), *self._list_own())))[:ADDRESSES_MAX]

    def describe(self) -> str:
        """One sentence without its full stop, for people."""
        state, reason = self._known.judge(self._ports.now())
        found = self._known.describe(self._ports.now())
        where = ", ".join(format_endpoint(one.address) for one in found if one.state is ReachState.REACHABLE)
        return f"tensor port: {state} ({reason})" + (f" at {where}" if where else "")

    def status(self) -> ReachStatus:
        """All of it."""
        state, reason = self._known.judge(self._ports.now())
        rows = (
            AddressStatus(address=format_endpoint(one.address), state=one.state, reason=one.reason)
            for one in self._known.describe(self._ports.now())
        )
        return ReachStatus(state=state, reason=reason, mapping=self.mapping, addresses=tuple(rows))

    # -- what others tell --------------------------------------------------------------------------------------------

    def set_mapped(self, source: str, address: Address | None) -> None:
        """A router forwards this address to the tensor port, or no longer does; `source` names the way it was asked."""
        if address is None:
            self._mapped.pop(source, None)
        else:
            self._mapped[source] = address
        self.poke()

    def addresses_changed(self) -> None:
        """The machine's own addresses, its gateway, or the network behind it are others now."""
        self._stale_before_s = self._ports.now()
        self._observed.clear()
        self._observing.clear()
        self.poke()

    def poke(self) -> None:
        """Check again now."""
        self._poked.set()

    def link_came_in(self, peer: PeerId, local: Address, remote: Address) -> None:
        """A peer has dialled this one: proof for the address that it came to."""
        address = self._find_dialled(local, remote)
        if address is None or self._links.has_hole_to(peer):
            return
        self._known.note(address, peer, reached=True, reason=ReachReason.LINK_CAME_IN, now=self._ports.now())
        self._tell()

    def _find_dialled(self, local: Address, remote: Address) -> Address | None:
        own = self._list_own()
        if not is_public(remote[0]) or is_public(local[0]):
            return next((one for one in own if one[0] == local[0]), None)
        # It came from elsewhere to a private address: a router has passed it on, from the one that it knows.
        six = ":" in local[0]
        outer = [one for one in self._known.candidates if one not in own and (":" in one[0]) == six]
        return outer[0] if len(outer) == 1 else None

    # -- checking ----------------------------------------------------------------------------------------------------

    async def watch(self) -> None:
        """Check for ever."""
        while True:
            self._poked.clear()
            await self.check()
            with suppress(TimeoutError):
                async with asyncio.timeout(self._pause_s()):
                    await self._poked.wait()

    async def check(self) -> None:
        """Ask members to dial back; where nobody comes through, ask how they see this port, and to dial that."""
        self._known.set_candidates(self._list_candidates())
        began_s = self._stale_before_s
        await self._ask_members()
        if not self.reached or self._relies_on_holes():
            await self._observe()
            if self._known.set_candidates(self._list_candidates()):
                await self._ask_members()
        if began_s is not None:
            self._known.forget_before(began_s)
            if self._stale_before_s == began_s:
                self._stale_before_s = None
        self._tell()

    def _pause_s(self) -> float:
        match self.state:
            case ReachState.UNKNOWN:
                return UNKNOWN_PERIOD_S
            case ReachState.PRIVATE:
                return PRIVATE_PERIOD_S
            case _ if self._failed:
                return FAILED_PERIOD_S
            case _:
                return PRIVATE_PERIOD_S if self._relies_on_holes() else REACHABLE_PERIOD_S

    def _relies_on_holes(self) -> bool:
        """Whether others come in only where a router lets them because the tensor port has dialled out."""
        open_to_all = [
            one.address for one in self._known.describe(self._ports.now()) if one.state is ReachState.REACHABLE
        ]
        # What the machine has itself, or was told by its router or its owner, is open whatever members see.
        known = {*self._list_own(), *self._mapped.values()}
        holes = {*self._observed.values()} - known if self._config.announce_host is None else set()
        return bool(open_to_all) and holes.issuperset(open_to_all)

    def _tell(self) -> None:
        now = self._ports.now()
        told = (*self._known.judge(now), self._known.announced(now))
        if told != self._told:
            self._told = told
            self._ports.changed()

    async def _ask_members(self) -> None:
        addresses = self._known.candidates[:ADDRESSES_MAX]
        if addresses:
            told = await asyncio.gather(*(self._ask(peer, addresses) for peer in self._choose_members()))
            self._failed = any(told)

    def _choose_members(self) -> list[PeerId]:
        """Another part of them each time; those to whom no hole has been opened know more."""
        live = list(self._ports.live())
        turn = self._turn % len(live) if live else 0
        self._turn += ASKED_MAX
        return sorted((*live[turn:], *live[:turn]), key=self._links.has_hole_to)[:ASKED_MAX]

    async def _ask(self, peer: PeerId, addresses: tuple[Address, ...]) -> bool:
        """Let one member dial; whether it failed at an address that is reachable otherwise."""
        question = ProbeAddresses(addresses=tuple(format_endpoint(one) for one in addresses))
        answer = await self._request(peer, question)
        if not isinstance(answer, ProbeAnswer) or len(answer.reached) != len(addresses):
            return False
        now = self._ports.now()
        failed = False
        for address, reached in zip(addresses, answer.reached, strict=True):
            if reached is not None:
                reason = ReachReason.DIALLED_BACK if reached else ReachReason.DIAL_BACK_FAILED
                self._known.note(address, peer, reached=reached, reason=reason, now=now)
                failed |= not reached and address in self._known.announced(now)
        return failed

    async def _request(self, peer: PeerId, question: object) -> object:
        try:
            raw = await self._control.request(peer, encode_message(self._swarm, question))
            return decode_message_untrusted(self._swarm, raw)
        except (PeerUnreachable, RequestRefused, ProtocolError) as error:
            log.debug("%s is not answered: %s", type(question).__name__, error)
            return None

    # -- the observed address ----------------------------------------------------------------------------------------

    async def _observe(self, *, until_first: bool = False) -> None:
        """Learn the outer address of the tensor port from members that can be dialled; their links stay, and with them
        the router's mapping. `until_first`: one that tells is enough, others may be behind routers."""
        live = self._ports.live()
        for peer in [one for one in (*self._observed, *self._observing) if one not in live]:
            self._observed.pop(peer, None)
            self._observing.pop(peer, None)
        now = self._ports.now()
        able = [
            peer
            for peer in live
            if self._choose_address(peer) is not None and now - self._punched.get(peer, -PUNCH_S) >= PUNCH_S
        ]
        able.sort(key=lambda peer: peer not in self._observing)
        for answered in asyncio.as_completed([self._begin_observing(peer) for peer in able[:OBSERVERS_MAX]]):
            if await answered and until_first:
                return

    def _begin_observing(self, peer: PeerId) -> asyncio.Task[bool]:
        """One at a time by each member, for all who wait: the kernel has one connection between two ports."""
        if (asking := self._asking.get(peer)) is None:
            asking = self._asking[peer] = self._links.spawn(self._observe_by(peer))
            asking.add_done_callback(lambda _: self._asking.pop(peer))
        return asking

    def _choose_address(self, peer: PeerId) -> Address | None:
        """IPv4: a router that rewrites IPv6 addresses is rare, and an own address of the peer's is no news."""
        four = [one for one in self._ports.addresses_of(peer) if ":" not in one[0] and not is_loopback(one[0])]
        return min(four, key=lambda one: not is_public(one[0]), default=None)

    async def _observe_by(self, peer: PeerId) -> bool:
        """Whether this peer has told."""
        address = self._choose_address(peer)
        assert address is not None
        binding = self._observing.get(peer, b"")
        if not self._links.has_link(peer, binding):
            try:
                async with asyncio.timeout(None) as self._dials[peer]:
                    # Not at once from the port: what the router would remember of a dial that nobody answers is in the
                    # way of a hole for minutes.
                    if not await self._links.probe(peer, address):
                        return False
                    binding = await self._links.dial_from_port(peer, address)
            except (LinkLost, TimeoutError) as lost:
                why = "a hole is punched" if isinstance(lost, TimeoutError) else lost
                log.debug("%s cannot say how it sees this port: %s", short_peer_id(peer), why)
                return False
            finally:
                self._dials.pop(peer, None)
            self._observing[peer] = binding
        else:
            await self._links.touch(peer, binding)
        answer = await self._request(peer, GetObserved(binding=binding))
        seen = parse_endpoint_untrusted(answer.address) if isinstance(answer, ObservedAnswer) else None
        if seen is None or parse_ip(seen[0]) is None or is_loopback(seen[0]):
            return False
        self._observed[peer] = seen
        return True

    # -- candidates --------------------------------------------------------------------------------------------------

    def _list_candidates(self) -> tuple[Address, ...]:
        """The most promising first."""
        config = self._config
        port = config.announce_port or self._bound[1]
        if config.announce_host is not None:
            return ((config.announce_host, port),)
        own = self._list_own()
        if not is_wildcard(self._bound[0]):
            return own
        found = [*self._mapped.values(), *(one for one in own if is_public(one[0]))]
        if self.mapping is not NatMapping.ENDPOINT_DEPENDENT:
            found += self.observed()
        found += [(host, port) for host in self._ports.seen_hosts() if not is_loopback(host)]
        return tuple(dict.fromkeys((*found, *own)))[:ADDRESSES_MAX]

    def _list_own(self) -> tuple[Address, ...]:
        """Loopback is for want of others: then the whole swarm is on this machine."""
        host, port = self._bound
        port = self._config.announce_port or port
        if not is_wildcard(host):
            return ((host, port),)
        hosts = sorted(self._ports.hosts(), key=lambda one: not is_public(one))
        return tuple((one, port) for one in hosts[:OWN_HOSTS_MAX]) or (("127.0.0.1", port),)
