"""Whether others can dial the control port: AutoNAT v1, asked of connected peers and answered for them.

After libp2p's autonat-v1 specification, over py-libp2p's messages and not its service: that one counts the connection
on which it was asked as a success, so that everybody is public.

Invariants: nobody is dialled but the asker, at the IP address that it is seen by, with its key; dial-backs are bounded
in number, per address and in time; an address that others saw is announced only after one of them has dialled it; a
verdict is forgotten after VERDICT_TTL_S, and whenever the machine's addresses change.
"""

import ipaddress
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from time import monotonic

import trio
from libp2p.abc import INetConn, INetStream
from libp2p.custom_types import TProtocol
from libp2p.exceptions import BaseLibp2pError
from libp2p.host.autonat.pb.autonat_pb2 import Message
from libp2p.host.observed_addr_manager import ObservedAddrManager
from libp2p.peer.id import ID
from libp2p.transport.upgrader import TransportUpgrader
from multiaddr import Multiaddr

from shoal.dht.addresses import Address, parse_address
from shoal.node.allowances import Allowances
from shoal.node.arrivals import group_of
from shoal.node.libp2p_connections import (
    BufferedTcpStream,
    format_multiaddr_untrusted,
    is_relayed,
    make_raw_connection,
    transport_of,
)
from shoal.node.libp2p_hop import MESSAGE_BYTES_MAX, read_message, write_message
from shoal.node.libp2p_streams import STREAM_ERRORS, FrameReader
from shoal.node.reachability import ReachState
from shoal.protocol.errors import ProtocolError, ShoalError, UriError
from shoal.protocol.identity import PeerId, encode_libp2p_peer_id

AUTONAT_PROTOCOL = TProtocol("/libp2p/autonat/1.0.0")
QUESTION_TIMEOUT_S = 5.0
# All addresses of one asker together.
DIAL_BACK_TIMEOUT_S = 5.0
DIAL_BACK_ADDRESSES_MAX = 4
DIAL_BACKS_AT_ONCE_MAX = 8
# A swarm may well live behind one address.
DIAL_BACKS_PER_BLOCK_MAX = 16
DIAL_BACK_WINDOW_S = 10.0
ASKERS_REMEMBERED_MAX = 1024
ADDRESSES_READ_MAX = 32
# Others dial with longer limits than this node does.
ANSWER_TIMEOUT_S = 20.0
SERVERS_ASKED_MAX = 4
CANDIDATES_MAX = 16
SCOPE_MAX = 2
VERDICT_TTL_S = 15 * 60.0
RECHECK_S = 5 * 60.0
# While nobody has said anything, or a server was just met.
RECHECK_SOON_S = 15.0
OBSERVATIONS_MAX = 1024


class Observations(ObservedAddrManager):
    """By which addresses connected peers see this one; the library's own announces them unchecked."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: OrderedDict[INetConn, str] = OrderedDict()

    def record_observation(self, conn: INetConn, observed: Multiaddr, local_listen_addrs: Sequence[Multiaddr]) -> None:
        """A peer says on this connection by which address it sees us."""
        try:
            address = parse_address(str(observed))
        except UriError:
            return
        if not address.is_relayed and not is_relayed(conn.muxed_conn):
            self._seen[conn] = address.host
            if len(self._seen) > OBSERVATIONS_MAX:
                self._seen.popitem(last=False)

    def remove_conn(self, conn: INetConn) -> None:
        """The connection is closed, and what was seen on it says nothing any more."""
        self._seen.pop(conn, None)

    def addrs(self, min_observers: int = 0) -> list[Multiaddr]:
        """None to be announced unchecked."""
        return []

    def hosts(self) -> tuple[str, ...]:
        """The IP addresses by which others see this peer, those that most of them see first."""
        return tuple(host for host, _ in Counter(self._seen.values()).most_common())


class DialBacks:
    """The server's side: dials who asks, on a new connection that ends when the asker has proved its key."""

    def __init__(self, upgrader: TransportUpgrader) -> None:
        self._upgrader = upgrader
        self._places = trio.CapacityLimiter(DIAL_BACKS_AT_ONCE_MAX)
        self._askers: Allowances[str] = Allowances(
            burst=DIAL_BACKS_PER_BLOCK_MAX,
            per_s=DIAL_BACKS_PER_BLOCK_MAX / DIAL_BACK_WINDOW_S,
            keys_max=ASKERS_REMEMBERED_MAX,
        )

    async def serve(self, stream: INetStream) -> None:
        """Answer one question."""
        with trio.fail_after(QUESTION_TIMEOUT_S):
            question = await read_message(FrameReader(stream, MESSAGE_BYTES_MAX), Message())
        answer = Message(type=Message.DIAL_RESPONSE)
        answer.dialResponse.status = await self._judge(stream, question, answer)
        with trio.fail_after(QUESTION_TIMEOUT_S):
            await write_message(stream, answer)
            await stream.close()

    async def _judge(self, stream: INetStream, question: Message, answer: Message) -> Message.ResponseStatus.ValueType:
        peer_id = stream.muxed_conn.peer_id
        remote = transport_of(stream.muxed_conn).get_remote_address()
        if question.type != Message.DIAL or question.dial.peer.id != peer_id.to_bytes():
            return Message.E_BAD_REQUEST
        if remote is None or is_relayed(stream.muxed_conn):
            return Message.E_DIAL_REFUSED
        targets = choose_targets(question.dial.peer.addrs, remote[0])
        if not targets or not self._askers.take(group_of(remote[0]), trio.current_time()):
            return Message.E_DIAL_REFUSED
        try:
            self._places.acquire_on_behalf_of_nowait(stream)
        except trio.WouldBlock:
            return Message.E_DIAL_REFUSED
        try:
            reached = await self._dial(targets, peer_id)
        finally:
            self._places.release_on_behalf_of(stream)
        if reached is None:
            return Message.E_DIAL_ERROR
        answer.dialResponse.addr = Multiaddr(str(reached)).to_bytes()
        return Message.OK

    async def _dial(self, targets: Sequence[Address], peer_id: ID) -> Address | None:
        reached: list[Address] = []

        async def attempt(target: Address) -> None:
            if await self._prove(target, peer_id):
                reached.append(target)
                attempts.cancel_scope.cancel()

        with trio.move_on_after(DIAL_BACK_TIMEOUT_S):
            async with trio.open_nursery() as attempts:
                for target in targets:
                    attempts.start_soon(attempt, target)
        return reached[0] if reached else None

    async def _prove(self, target: Address, peer_id: ID) -> bool:
        """Whether this very peer answers there."""
        try:
            transport = BufferedTcpStream(await trio.open_tcp_stream(target.host, target.port))
        except OSError:
            return False
        try:
            await self._upgrader.upgrade_security(make_raw_connection(transport, is_initiator=True), True, peer_id)
        except (BaseLibp2pError, OSError, ValueError):
            return False
        finally:
            await transport.abort()
        return True


def choose_targets(addresses: Iterable[bytes], seen_host: str) -> list[Address]:
    """Those of the asker's addresses that may be dialled for it: plain TCP at the address that it is seen by."""
    targets: dict[Address, None] = {}
    for raw in list(addresses)[:ADDRESSES_READ_MAX]:
        try:
            address = parse_address(format_multiaddr_untrusted(raw) or "")
        except (UriError, ProtocolError):
            continue
        if address.host == seen_host and not address.is_relayed and not address.is_wildcard:
            targets[Address(net=address.net, host=address.host, port=address.port)] = None
    return list(targets)[:DIAL_BACK_ADDRESSES_MAX]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What one server said: the address that it reached, or None; and as what it saw this peer."""

    reached: Address | None
    scope: int
    at_s: float


class ReachCheck:
    """The client's side: asks servers, and keeps what they said."""

    def __init__(
        self,
        me: PeerId,
        observations: Observations,
        open_stream: Callable[[PeerId, TProtocol], Awaitable[INetStream]],
        forced: ReachState | None,
    ) -> None:
        self._me = me
        self._observations = observations
        self._open_stream = open_stream
        self._forced = forced
        self._verdicts: dict[PeerId, Verdict] = {}
        self._wake = trio.Event()
        self._checked_s: float | None = None

    @property
    def state(self) -> ReachState:
        """What most of the servers say that see the most public of this peer's addresses."""
        if self._forced is not None:
            return self._forced
        verdicts = self._weighty()
        if not verdicts:
            return ReachState.UNKNOWN
        reached = sum(verdict.reached is not None for verdict in verdicts)
        return ReachState.REACHABLE if 2 * reached >= len(verdicts) else ReachState.PRIVATE

    def confirmed(self) -> tuple[Address, ...]:
        """The addresses by which others have reached this peer, where most say that it can be reached."""
        if self.state is not ReachState.REACHABLE:
            return ()
        reached = Counter(verdict.reached for verdict in self._weighty() if verdict.reached is not None)
        return tuple(address for address, _ in reached.most_common())

    def _weighty(self) -> list[Verdict]:
        since_s = trio.current_time() - VERDICT_TTL_S
        fresh = [verdict for verdict in self._verdicts.values() if verdict.at_s >= since_s]
        scope = max((verdict.scope for verdict in fresh), default=0)
        return [verdict for verdict in fresh if verdict.scope == scope]

    def seen_hosts(self) -> tuple[str, ...]:
        """The IP addresses by which others see this peer."""
        return self._observations.hosts()

    def checked_ago_s(self) -> float | None:
        """How long ago somebody was asked. Callable from any thread."""
        return None if self._checked_s is None else round(monotonic() - self._checked_s, 1)

    def count(self) -> int:
        """How many servers have said something lately."""
        return len(self._verdicts)

    def forget(self) -> None:
        """The machine's addresses have changed, and nothing that was said holds."""
        self._verdicts.clear()
        self.wake()

    def wake(self) -> None:
        """Something has changed: ask soon."""
        self._wake.set()

    async def keep_checked(
        self,
        servers: Callable[[], Sequence[PeerId]],
        candidates: Callable[[], Sequence[Address]],
        on_checked: Callable[[], Awaitable[None]],
    ) -> None:
        """Ask now and then, and whenever there is a server that has not been asked yet; for ever."""
        while self._forced is None:
            self._wake = trio.Event()
            now_s = trio.current_time()
            for server in [one for one, verdict in self._verdicts.items() if verdict.at_s < now_s - VERDICT_TTL_S]:
                del self._verdicts[server]
            asked = self._choose_servers(servers())
            async with trio.open_nursery() as asking:
                for server in asked:
                    asking.start_soon(self._ask, server, candidates())
            if asked:
                self._checked_s = monotonic()
                await on_checked()
            with trio.move_on_after(RECHECK_S if self._verdicts else RECHECK_SOON_S):
                await self._wake.wait()

    def _choose_servers(self, servers: Sequence[PeerId]) -> list[PeerId]:
        """Those that have not been asked for longest, and none again before RECHECK_S is over."""
        due_s = trio.current_time() - RECHECK_S
        due = [one for one in servers if one not in self._verdicts or self._verdicts[one].at_s <= due_s]
        fresh = sum(verdict.at_s > due_s for verdict in self._verdicts.values())
        due.sort(key=lambda one: self._verdicts[one].at_s if one in self._verdicts else 0.0)
        return due[: max(0, SERVERS_ASKED_MAX - fresh)]

    async def _ask(self, server: PeerId, candidates: Sequence[Address]) -> None:
        question = Message(type=Message.DIAL)
        question.dial.peer.id = encode_libp2p_peer_id(self._me)
        question.dial.peer.addrs.extend(Multiaddr(str(one)).to_bytes() for one in candidates[:CANDIDATES_MAX])
        answer: Message | None = None
        with trio.move_on_after(ANSWER_TIMEOUT_S):
            try:
                stream = await self._open_stream(server, AUTONAT_PROTOCOL)
                remote = stream.muxed_conn
                try:
                    await write_message(stream, question)
                    answer = await read_message(FrameReader(stream, MESSAGE_BYTES_MAX), Message())
                finally:
                    with trio.CancelScope(shield=True):
                        await stream.reset()
            except (*STREAM_ERRORS, ShoalError, trio.TooSlowError):
                return
        if answer is None or answer.type != Message.DIAL_RESPONSE:
            return
        remote_address = transport_of(remote).get_remote_address()
        scope = scope_of(remote_address[0]) if remote_address else 0
        status, now_s = answer.dialResponse.status, trio.current_time()
        if status == Message.OK:
            reached = self._read_reached(answer.dialResponse.addr, candidates)
            if reached is not None:
                self._verdicts[server] = Verdict(reached=reached, scope=scope_of(reached.host), at_s=now_s)
        elif status == Message.E_DIAL_ERROR:
            self._verdicts[server] = Verdict(reached=None, scope=scope, at_s=now_s)

    def _read_reached(self, raw: bytes, candidates: Sequence[Address]) -> Address | None:
        try:
            reached = parse_address(format_multiaddr_untrusted(raw) or "")
        except (UriError, ProtocolError):
            return None
        same = (one for one in candidates if (one.host, one.port) == (reached.host, reached.port))
        return next(same, None)


def scope_of(host: str) -> int:
    """Who can reach an address: 0 this machine, 1 its network, SCOPE_MAX everybody."""
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        return SCOPE_MAX
    return 0 if ip.is_loopback else SCOPE_MAX if ip.is_global else 1
