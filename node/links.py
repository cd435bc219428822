"""Tensor links, the data plane: one listening port, dialled and accepted links by peer, and what is sent over them.

A link serves both directions, whoever dialled it, so two peers that dial each other at once end up with two good links;
each send takes the one with the shortest queue and an idle one is closed later. Control traffic never comes here.

Copies of a payload byte in user space: one at the sender (sealing, from the caller's memory into the link's record
buffer) and one at the receiver (opening, from the inbox into the sink's buffer); the kernel adds one on each side.

Invariants: memory that others can make us hold is bounded by LinkConfig (links, half-open links, one inbox and one
record buffer of 256 KiB each per busy link) plus what the sink reserves; every dial, fetch and silent or stuck link
ends within its deadline; after `stop` no task and no socket is left; several addresses of a peer are dialled with a
head start each, and all but the first link that has proven its peer are closed.

Memory handed to `send` is read until the call returns or is cancelled, memory handed to `fetch` is written until then.
"""

import asyncio
import errno
import logging
import os
import socket
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import TypeVar

from shoal.node.arrivals import ArrivalLimits, Arrivals
from shoal.node.cipher_speed import is_chacha20_faster
from shoal.node.interfaces import has_address
from shoal.node.link_host import ConnectionTaker
from shoal.node.link_listen import open_dialling, open_listeners
from shoal.node.link_pacing import StreamTurns
from shoal.node.link_port import (
    Address,
    FetchFailed,
    FetchFailure,
    LinkConfig,
    LinkEnd,
    LinkLost,
    LinkPath,
    LinkSink,
    LinkStatistics,
    LinkTotals,
)
from shoal.node.link_protocol import Link
from shoal.node.link_race import race, resolve
from shoal.node.link_traffic import PeerTraffic
from shoal.node.link_width import LinkWidth
from shoal.node.pacer import Pacer
from shoal.node.rate_caps import Caps
from shoal.node.send_queues import SendQueues
from shoal.protocol.errors import Refusal
from shoal.protocol.frames import FrameHeader, FrameKind
from shoal.protocol.identity import Identity, PeerId
from shoal.protocol.secure_channel import STATIC_KEY_BYTES, ChannelKeys, Handshake

# One is under way and the next one ready; others wait for whichever link is free first.
SENDS_PER_LINK = 2
# A frame that met the orderly end of its link goes to another one, this often.
LINKS_TRIED_MAX = 3
_ORDERLY_ENDS = (LinkEnd.IDLE, LinkEnd.PEER_SAID_GOODBYE, LinkEnd.OUTRUN)
# After these no other way to the peer is tried.
_FINAL_ENDS = (LinkEnd.REFUSED_BY_PEER, LinkEnd.LIMIT, LinkEnd.STOPPED)
_NO_WAY = (errno.ENETUNREACH, errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)
_PUSHED = (FrameKind.CONTRIBUTION, FrameKind.RESULT)

log = logging.getLogger(__name__)

Result = TypeVar("Result")


class TensorLinks:
    """All tensor links of this process. Call `start` once, and `stop` before the loop ends."""

    def __init__(self, identity: Identity, swarm_id: bytes, config: LinkConfig, sink: LinkSink) -> None:
        self.config = config
        self.sink = sink
        self.stopping = False
        self.upload, self.download = Pacer(), Pacer()
        self.turns = StreamTurns(self.upload)
        self.accepted = 0  # proven links that others have dialled
        # A proven link that a peer has dialled, with its local and its remote address.
        self.on_accepted: Callable[[PeerId, Address, Address], None] = lambda peer, local, remote: None
        # Takes over a connection that begins with these bytes, where it is no link, and holds it until `close`.
        self.relay: ConnectionTaker | None = None
        # Makes a link to a peer that cannot be dialled directly, or raises LinkLost.
        self.detour: Callable[[PeerId], Awaitable[None]] | None = None
        self._peer = identity.peer
        self._swarm = swarm_id
        self._keys = ChannelKeys(identity, os.urandom(STATIC_KEY_BYTES), prefers_chacha20=is_chacha20_faster())
        self._bound: Address = config.host, config.port
        self._holes: OrderedDict[PeerId, float] = OrderedDict()  # when the listening port last dialled a peer
        self._punching: dict[str, tuple[PeerId, bool]] = {}  # whose dial may come from this host, and our role in it
        self._opening = asyncio.Event()  # set at the next opened link, and then replaced
        self._servers: list[asyncio.Server] = []
        self._timer: asyncio.TimerHandle | None = None
        self._connected: set[Link] = set()  # every link whose socket is still there
        self._arrivals: Arrivals[Link] = Arrivals(
            ArrivalLimits(
                half_open_max=config.half_open_max,
                half_open_per_group_max=config.half_open_per_host_max,
                proven_per_group_max=config.links_per_host_max,
                burst=config.arrivals_burst,
                per_s=config.arrivals_per_s,
            )
        )
        self._links: dict[PeerId, list[Link]] = {}
        self._dials: dict[PeerId, asyncio.Task[Link]] = {}
        self._tasks: set[asyncio.Task[object]] = set()
        self._waiting = SendQueues(config.sends_queued_max)
        self._width = LinkWidth()
        self._traffic: OrderedDict[PeerId, PeerTraffic] = OrderedDict()
        self._forgotten = PeerTraffic()  # of the peers that are not remembered any more, together

    async def start(self) -> Address:
        """Listen; returns the bound host and port. Raises OSError when the port cannot be had."""
        loop = asyncio.get_running_loop()
        sockets = open_listeners(self.config.host, self.config.port)
        port = sockets[0].getsockname()[1]
        for one in sockets:
            server = await loop.create_server(self._make_inbound, sock=one, backlog=self.config.backlog)
            self._servers.append(server)
        self._timer = loop.call_later(self.config.tick_s, self._tick)
        self._bound = self.config.host, port
        return self._bound

    async def stop(self) -> None:
        """Say goodbye to every peer, then close everything. Waiting senders and fetchers get LinkLost(STOPPED)."""
        self.stopping = True
        for server in self._servers:
            server.close()
        for dial in list(self._dials.values()):
            dial.cancel()
        if self.relay is not None:
            await self.relay.close()
        for link in list(self._connected):
            link.leave(LinkEnd.STOPPED)
        await self._wait_closed(self.config.goodbye_timeout_s)
        for link in list(self._connected):
            link.end(LinkEnd.STOPPED)
        await self._wait_closed(None)
        if self._timer is not None:
            self._timer.cancel()
        running: list[asyncio.Task[object]] = [*self._tasks, *self._dials.values()]
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        for server in self._servers:
            await server.wait_closed()

    async def send(self, peer: PeerId, addresses: Sequence[Address], header: FrameHeader, payload: memoryview) -> None:
        """Push a CONTRIBUTION or a RESULT, over an open link or a new one by `addresses`; raises LinkLost.

        Returns when the kernel has taken the last byte, which is no receipt: a refusal comes to `sink.refused`.
        Cancelling stops the payload and tells the peer so.
        """
        assert header.kind in _PUSHED and header.nbytes == payload.nbytes, "send pushes what its header describes"
        if self._waiting.is_full(peer):
            raise LinkLost(peer, LinkEnd.LIMIT)
        lost: LinkLost | None = None
        for _ in range(LINKS_TRIED_MAX):
            link = await self._free_link_to(peer, addresses)
            try:
                await link.send_frame(header, payload.cast("B"))
                return
            except LinkLost as error:
                # The peer may have taken one link of ours for one too many, and have others.
                is_one_too_many = error.refusal is Refusal.LIMIT and self.is_linked(peer)
                if error.reason not in _ORDERLY_ENDS and not is_one_too_many:
                    raise
                lost = error
        assert lost is not None
        raise lost

    async def fetch(
        self, peer: PeerId, addresses: Sequence[Address], digest: bytes, into: memoryview, timeout_s: float
    ) -> None:
        """Fill `into` with the blob of exactly its length that has this digest; it has been checked on return.

        Raises LinkLost or FetchFailed; then, and when cancelled, `into` holds rubbish and is no longer written to.
        """
        target = into.cast("B")
        lost: LinkLost | None = None
        try:
            async with asyncio.timeout(timeout_s):
                for _ in range(LINKS_TRIED_MAX):
                    link = await self._link_to(peer, addresses)
                    try:
                        await link.fetch(digest, target)
                        return
                    except LinkLost as error:
                        if error.reason not in _ORDERLY_ENDS:
                            raise
                        lost = error
        except TimeoutError:
            raise FetchFailed(peer, FetchFailure.TIMEOUT) from None
        assert lost is not None
        raise lost

    async def adopt(self, connection: socket.socket, peer: PeerId, *, dialer: bool, path: LinkPath) -> bytes:
        """Make a link of a connected socket, such as one that came through a punched hole; its channel binding.
        Raises LinkLost.

        The two sides must have agreed on which of them is the dialer. The socket is ours from here on.
        """
        loop = asyncio.get_running_loop()
        try:
            _, link = await loop.create_connection(lambda: self._make_link(peer, dialer, path), sock=connection)
        except OSError as error:
            connection.close()
            raise LinkLost(peer, LinkEnd.UNREACHABLE) from error
        try:
            await asyncio.shield(link.opened)
        except asyncio.CancelledError:
            if not link.is_usable:
                link.leave(LinkEnd.OUTRUN)
            raise
        return link.binding

    async def dial_from_port(self, peer: PeerId, address: Address) -> bytes:
        """A link that is dialled from the listening port, so that routers treat it like that port; its channel binding.
        Raises LinkLost."""
        connection = await self.connect_from_port(peer, address, self.config.connect_timeout_s)
        return await self.adopt(connection, peer, dialer=True, path=LinkPath.DIRECT)

    async def connect_from_port(self, peer: PeerId, address: Address, timeout_s: float) -> socket.socket:
        """A socket from the listening port to an IP address of `peer`, to be adopted; raises LinkLost."""
        if self.is_full:
            raise LinkLost(peer, LinkEnd.LIMIT)
        self._note_hole(peer)
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        try:
            connection = open_dialling(family, self._bound)
        except OSError as error:
            raise LinkLost(peer, LinkEnd.UNREACHABLE) from error
        try:
            async with asyncio.timeout(timeout_s):
                await asyncio.get_running_loop().sock_connect(connection, address)
        except (OSError, TimeoutError) as error:
            connection.close()
            raise LinkLost(peer, LinkEnd.UNREACHABLE) from error
        except asyncio.CancelledError:
            connection.close()
            raise
        return connection

    def set_caps(self, caps: Caps) -> None:
        """How fast the payloads of all links together may leave and come, from now on."""
        self.upload.set_mbit(caps.upload_mbit)
        self.download.set_mbit(caps.download_mbit)
        self.turns.wake()

    @property
    def is_full(self) -> bool:
        """Whether no connection may be made now."""
        return self.stopping or len(self._connected) + len(self._dials) >= self.config.links_max

    async def wait_linked(self, peer: PeerId, *, relayed: bool = False) -> None:
        """Until a link to this peer is open, one that no relay carries unless `relayed`."""
        ways = [path for path in LinkPath if relayed or path is not LinkPath.RELAYED]
        while not any(link.is_usable and link.path in ways for link in self._links.get(peer, ())):
            await self._opening.wait()

    @contextmanager
    def punching(self, peer: PeerId, hosts: Iterable[str], *, dialer: bool) -> Iterator[None]:
        """While both sides dial at once, a connection from one of these hosts that reaches the listener is the other
        side's: the roles that were agreed on hold for it, too."""
        expected = dict.fromkeys(hosts, (peer, dialer))
        self._punching |= expected
        try:
            yield
        finally:
            for host in expected:
                self._punching.pop(host, None)

    def has_hole_to(self, peer: PeerId) -> bool:
        """Whether this peer has lately dialled that one from its listening port: routers may let it in for that."""
        opened_s = self._holes.get(peer)
        return opened_s is not None and asyncio.get_running_loop().time() - opened_s < self.config.hole_life_s

    def has_link(self, peer: PeerId, binding: bytes) -> bool:
        """Whether the link with this channel binding is open."""
        return any(link.binding == binding and link.is_usable for link in self._links.get(peer, ()))

    async def touch(self, peer: PeerId, binding: bytes) -> None:
        """Keep the link with this channel binding from idling: it is asked for a blob that nobody has."""
        link = next((one for one in self._links.get(peer, ()) if one.binding == binding and one.is_usable), None)
        with suppress(LinkLost, FetchFailed, TimeoutError):
            async with asyncio.timeout(self.config.connect_timeout_s):
                if link is not None:
                    await link.fetch(bytes(32), memoryview(bytearray(1)))

    def find_remote(self, peer: PeerId, binding: bytes) -> Address | None:
        """The address by which `peer` came here on the link with this channel binding."""
        found = (link for link in self._links.get(peer, ()) if link.binding == binding and link.expected is None)
        return next((link.remote for link in found), None)

    def hang_up(self, peer: PeerId, refusal: Refusal) -> None:
        """End every link to this peer and tell it why; whether it may come back is `sink.admit`'s to say."""
        for link in list(self._links.get(peer, ())):
            link.dismiss(refusal)

    def path_to(self, peer: PeerId) -> LinkPath | None:
        """The best way to this peer that is open."""
        open_ways = {link.path for link in self._links.get(peer, ()) if link.is_usable}
        return next((path for path in LinkPath if path in open_ways), None)

    def is_linked(self, peer: PeerId) -> bool:
        """Whether a frame to this peer would find an open link."""
        return any(link.is_usable for link in self._links.get(peer, ()))

    async def probe(self, peer: PeerId, address: Address) -> bool | None:
        """Whether `peer` can be dialled there now, whatever links to it are open; None where this machine has no way to
        such an address at all. Raises LinkLost(LIMIT)."""
        if self.is_full:
            raise LinkLost(peer, LinkEnd.LIMIT)
        try:
            link = await self._dial_address(peer, address)
        except LinkLost as lost:
            cause = lost.__cause__
            return None if isinstance(cause, OSError) and cause.errno in _NO_WAY else False
        if len(self._links.get(peer, ())) > 1:
            # It has told what it was made for, and would count against the other side's limit.
            link.leave(LinkEnd.IDLE)
        return True

    def doubt(self, peer: PeerId) -> None:
        """The peer may be gone, or be elsewhere: its links end soon unless it answers on them."""
        for link in self._links.get(peer, ()):
            link.doubt()

    def end_stranded(self, is_own: Callable[[str], bool] = has_address) -> int:
        """End every connection by an address which this machine has no more; how many. Their silence would be noticed,
        but late, and no other link be made before."""
        hosts = {link.local[0] for link in self._connected}
        gone = {host for host in hosts if host and not is_own(host)}
        stranded = [link for link in self._connected if link.local[0] in gone and link.ended is None]
        for link in stranded:
            link.end(LinkEnd.ADDRESS_GONE)
        return len(stranded)

    def statistics(self) -> LinkStatistics:
        """A snapshot; peers in the order in which they were last met."""
        return LinkStatistics(
            links=sum(len(links) for links in self._links.values()),
            paths=Counter(link.path for links in self._links.values() for link in links),
            half_open=sum(1 for link in self._half_open() if link.ended is None),
            dials=len(self._dials),
            peers=tuple(
                traffic.describe(peer, len(self._links.get(peer, ())), self.path_to(peer))
                for peer, traffic in self._traffic.items()
            ),
        )

    def totals(self) -> LinkTotals:
        """What all links have moved up to now."""
        counted = (self._forgotten, *self._traffic.values())
        return LinkTotals(
            payload_bytes_in=sum(one.payload_bytes_in for one in counted),
            payload_bytes_out=sum(one.payload_bytes_out for one in counted),
            wire_bytes_in=sum(one.wire_bytes_in for one in counted),
            wire_bytes_out=sum(one.wire_bytes_out for one in counted),
        )

    # What links ask of their host

    def connected(self, link: Link) -> bool:
        """Count a connected socket in, unless a limit says no."""
        self._connected.add(link)
        if self.stopping:
            return False
        punch = self._punching.get(link.remote[0]) if link.expected is None else None
        if punch is not None:
            link.path = LinkPath.PUNCHED
            if punch[1]:
                link.become_dialer(Handshake(self._keys, self._swarm, dialer=True, expected=punch[0]), punch[0])
        if link.expected is not None:
            return True
        gone: Link | None = link
        if sum(1 for other in self._connected if other.expected is None) <= self.config.inbound_links_max:
            gone = self._arrivals.arrive(link, link.remote[0], asyncio.get_running_loop().time())
        if gone is not None:
            self.sink.on_refusal(None, Refusal.LIMIT)
        if gone not in (None, link):
            gone.end(LinkEnd.LIMIT)
        return gone is not link

    def divert(self, transport: asyncio.Transport, first: memoryview) -> bool:
        """Whether an accepted connection that begins with these bytes is no link, and somebody else has it now."""
        return self.relay is not None and not self.stopping and self.relay.take_connection(transport, first)

    def link_opened(self, link: Link, peer: PeerId) -> Refusal | None:
        """Enter a proven link in the table, unless a limit or the sink says no."""
        links = self._links.get(peer, [])
        if len(links) >= self.config.links_per_peer_max:
            return Refusal.LIMIT
        refusal = self.sink.admit(peer)
        if refusal is not None:
            return refusal
        self.doubt(peer)  # who has moved opens a new one, and cannot end the old ones
        self._links[peer] = [*links, link]
        self._waiting.wake(peer)
        self._opening.set()
        self._opening = asyncio.Event()
        self._arrivals.prove(link)
        if link.expected is None:
            self.accepted += 1
            self.on_accepted(peer, link.local, link.remote)
        if not links:
            self.sink.link_up(peer)
        return None

    def sent(self, peer: PeerId) -> None:
        """A link to this peer has room for one more payload."""
        self._waiting.wake(peer)

    def link_ended(self, link: Link) -> None:
        """Strike a link from the table."""
        peer, reason = link.peer, link.ended
        assert reason is not None
        self._arrivals.leave(link)
        if peer is None or link not in self._links.get(peer, ()):
            return
        self._links[peer].remove(link)
        self._waiting.wake_all(peer)
        if link.refusal is Refusal.LIMIT:
            self._width.refuse(peer, asyncio.get_running_loop().time())
        if not self._links[peer]:
            del self._links[peer]
            self.sink.link_lost(peer, reason)

    def disconnected(self, link: Link) -> None:
        """Forget a link whose socket is gone."""
        self._connected.discard(link)

    def traffic_with(self, peer: PeerId) -> PeerTraffic:
        """The peer's counters; those of peers without a link that were met longest ago are forgotten first."""
        traffic = self._traffic.setdefault(peer, PeerTraffic())
        self._traffic.move_to_end(peer)
        for other in list(self._traffic)[: max(0, len(self._traffic) - self.config.peers_remembered_max)]:
            if other not in self._links:
                self._forgotten.count_in(self._traffic.pop(other))
        return traffic

    def spawn(self, work: Coroutine[None, None, Result]) -> asyncio.Task[Result]:
        """Run `work` until it is done or the links stop."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finish_task)
        return task

    # Inside

    def _finish_task(self, task: asyncio.Task[object]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            task.get_loop().call_exception_handler({"message": "a sink failed", "exception": error, "task": task})

    def _note_hole(self, peer: PeerId) -> None:
        self._holes[peer] = asyncio.get_running_loop().time()
        self._holes.move_to_end(peer)
        if len(self._holes) > self.config.peers_remembered_max:
            self._holes.popitem(last=False)

    def _make_inbound(self) -> Link:
        return Link(self, Handshake(self._keys, self._swarm, dialer=False), expected=None)

    def _make_link(self, peer: PeerId, dialer: bool, path: LinkPath = LinkPath.DIRECT) -> Link:
        return Link(self, Handshake(self._keys, self._swarm, dialer=dialer, expected=peer), peer, path)

    def _half_open(self) -> Iterable[Link]:
        return (link for link in self._connected if link.peer is None and link.expected is None)

    async def _free_link_to(self, peer: PeerId, addresses: Sequence[Address]) -> Link:
        """A link that has next to nothing to send, which may take its time. Raises LinkLost."""
        if not self._waiting.has_waiting(peer):
            link = await self._link_to(peer, addresses)
            if link.waiting_sends < SENDS_PER_LINK:
                return link
            self._widen(peer, addresses)
        with self._waiting.line_up(peer) as place:
            while True:
                await self._waiting.wait(place)
                link = await self._link_to(peer, addresses)
                if link.waiting_sends < SENDS_PER_LINK:
                    return link
                self._widen(peer, addresses)

    def _widen(self, peer: PeerId, addresses: Sequence[Address]) -> None:
        """Begin to open one more link to a peer for which payloads wait, where that pays."""
        links, now = self._links.get(peer, ()), asyncio.get_running_loop().time()
        is_dialled = any(link.path is LinkPath.DIRECT and link.expected is not None for link in links)
        has_room = 2 * len(self._connected) < self.config.links_max
        if addresses and is_dialled and has_room and self._width.begin(peer, self.traffic_with(peer), len(links), now):
            self.spawn(self._dial_further(peer, addresses))

    async def _dial_further(self, peer: PeerId, addresses: Sequence[Address]) -> None:
        try:
            await self._dial_directly(peer, addresses)
        except LinkLost as lost:
            log.debug("no further link: %s", lost)
            self._width.refuse(peer, asyncio.get_running_loop().time())
        finally:
            self._width.end(peer)

    async def _link_to(self, peer: PeerId, addresses: Sequence[Address]) -> Link:
        usable = [link for link in self._links.get(peer, ()) if link.is_usable]
        if usable:
            return min(usable, key=lambda link: link.waiting_sends)
        assert peer != self._peer, "nobody links to itself"
        if self.stopping:
            raise LinkLost(peer, LinkEnd.STOPPED)
        dial = self._dials.get(peer)
        if dial is None:
            if not addresses and self.detour is None:
                raise LinkLost(peer, LinkEnd.NO_ADDRESS)
            if len(self._connected) + len(self._dials) >= self.config.links_max:
                raise LinkLost(peer, LinkEnd.LIMIT)
            dial = asyncio.get_running_loop().create_task(self._dial(peer, addresses))
            self._dials[peer] = dial
            dial.add_done_callback(lambda done: self._finish_dial(peer, done))
        try:
            # One dial serves all who wait; none of them may cancel it for the others.
            return await asyncio.shield(dial)
        except asyncio.CancelledError:
            if dial.cancelled() and self.stopping:
                raise LinkLost(peer, LinkEnd.STOPPED) from None
            raise

    async def _dial(self, peer: PeerId, addresses: Sequence[Address]) -> Link:
        if self.detour is None:
            return await self._dial_directly(peer, addresses)
        if not addresses:
            return await self._dial_round(peer, self.detour)
        # Routers drop what they do not let in, and say nothing: who waited for that would wait for long.
        return await race(
            (partial(self._dial_directly, peer, addresses), partial(self._dial_round, peer, self.detour)),
            lambda dial: dial(),
            self.config.direct_head_start_s,
            discard=lambda link: None,
            is_final=lambda lost: lost.reason in _FINAL_ENDS,
        )

    async def _dial_round(self, peer: PeerId, detour: Callable[[PeerId], Awaitable[None]]) -> Link:
        await detour(peer)
        usable = [link for link in self._links.get(peer, ()) if link.is_usable]
        if not usable:
            raise LinkLost(peer, LinkEnd.UNREACHABLE)
        return usable[-1]

    async def _dial_directly(self, peer: PeerId, addresses: Sequence[Address]) -> Link:
        if not addresses:
            raise LinkLost(peer, LinkEnd.NO_ADDRESS)
        found = await resolve(addresses, self.config.addresses_tried_max, self.config.connect_timeout_s)
        if not found:
            raise LinkLost(peer, LinkEnd.UNREACHABLE)
        return await race(
            found,
            lambda address: self._dial_address(peer, address),
            self.config.head_start_s,
            discard=lambda link: link.leave(LinkEnd.OUTRUN),
        )

    async def _dial_address(self, peer: PeerId, address: Address) -> Link:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self.config.connect_timeout_s):
                _, link = await loop.create_connection(lambda: self._make_link(peer, True), *address)
        except (OSError, TimeoutError) as error:
            raise LinkLost(peer, LinkEnd.UNREACHABLE) from error
        try:
            # The link's own deadline bounds the handshake.
            await asyncio.shield(link.opened)
        except asyncio.CancelledError:
            link.leave(LinkEnd.OUTRUN)
            raise
        return link

    def _finish_dial(self, peer: PeerId, dial: asyncio.Task[Link]) -> None:
        del self._dials[peer]
        if not dial.cancelled():
            # Retrieved here, because those who waited for it may have gone.
            dial.exception()

    def _tick(self) -> None:
        loop = asyncio.get_running_loop()
        now_s = loop.time()
        for link in list(self._connected):
            link.tick(now_s)
        self._timer = loop.call_later(self.config.tick_s, self._tick)

    async def _wait_closed(self, timeout_s: float | None) -> None:
        closing = [link.closed for link in self._connected]
        if closing:
            await asyncio.wait(closing, timeout=timeout_s)
