"""A bad network in user space: a proxy in front of every peer's ports that delays, loses, throttles and cuts.

Peers announce the proxies' addresses, so that every connection of the swarm passes through one. A peer may be given an
access line (`Line`): all of its connections, whoever dialled them, then share one queue for each direction, and each
behaves like a TCP connection over that line: segments, a congestion window that a loss halves, later bytes that wait
for a lost segment to be sent again. Connections may be frozen: no byte passes any more and nobody is told, which is
what a peer sees behind a relay that forgot its connection. (The kernels' own acknowledgements still come, from the
proxy: only the daemon's pings can tell.)

Everything runs on one event loop in a thread of its own; the public methods may be called from any thread.
"""

import asyncio
import random
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import psutil

HOST = "127.0.0.1"
SEGMENT_BYTES = 1448
UNSENT_BYTES_MAX = 64 * 1024  # what a connection takes from its sender before it is sent
QUEUE_S_MAX = 0.5  # a line drops what would wait longer than this
RETRANSMIT_TIMEOUT_S_MIN = 0.2  # Linux' TCP_RTO_MIN
DUPLICATES_TO_NOTICE = 3  # later segments under way by which a loss is noticed within a round trip
CONNECT_RETRY_S = 1.0  # a lost SYN
WINDOW_FIRST = 10.0  # segments (RFC 6928)
WINDOW_MIN = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A peer's access line: the same in both directions. `delay_s` is one way, `loss` a share of the segments."""

    bytes_per_s: float
    delay_s: float = 0.0
    loss: float = 0.0


class _Queue:
    """One direction of a line: segments leave one after the other."""

    def __init__(self, line: Line, entropy: random.Random) -> None:
        self.line = line
        self.free_s = 0.0
        self.sent_bytes = 0
        self.lost = 0
        self.waited_s_max = 0.0
        self._entropy = entropy

    def send(self, nbytes: int, now_s: float) -> float | None:
        """When these bytes arrive; None when they are lost."""
        if self.free_s - now_s > QUEUE_S_MAX:
            self.lost += 1
            return None
        self.waited_s_max = max(self.waited_s_max, self.free_s - now_s)
        self.free_s = max(self.free_s, now_s) + nbytes / self.line.bytes_per_s
        self.sent_bytes += nbytes
        if self._entropy.random() < self.line.loss:
            self.lost += 1
            return None
        return self.free_s + self.line.delay_s


class _Side(asyncio.Protocol):
    """One socket of a proxied connection. What it reads goes to the other one's `write`."""

    def __init__(self, connection: "_Connection") -> None:
        self.connection = connection
        self.transport: asyncio.Transport
        self.flow: _Flow | None = None  # carries what this side reads
        self.writable = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.connection.made(self)

    def data_received(self, data: bytes) -> None:
        assert self.flow is not None, "reading begins when both sides are there"
        self.flow.take(data)

    def eof_received(self) -> bool:
        if self.flow is not None:
            self.flow.end()
        return True

    def connection_lost(self, error: Exception | None) -> None:
        self.writable = False
        self.connection.lost(self)

    def pause_writing(self) -> None:
        self.writable = False

    def resume_writing(self) -> None:
        self.writable = True
        self.connection.resumed(self)


class _Flow:
    """One direction of a connection: bytes from `source` to `sink`. Without a queue they pass as they come."""

    def __init__(self, source: _Side, sink: _Side, queue: _Queue | None) -> None:
        self._source = source
        self._sink = sink
        self._queue = queue
        self._loop = asyncio.get_running_loop()
        self._unsent = bytearray()
        self._ended = False
        self._next_sent = 0
        self._next_delivered = 0
        self._arrived: dict[int, bytes] = {}
        self._in_flight = 0
        self._window = WINDOW_FIRST
        self._threshold = float("inf")
        self._halved_s = -1.0
        self.frozen = False
        self.finished = False

    @property
    def _round_trip_s(self) -> float:
        assert self._queue is not None
        waiting_s = max(0.0, self._queue.free_s - self._loop.time())
        return 2 * self._queue.line.delay_s + waiting_s

    def take(self, data: bytes) -> None:
        if self._sink.transport.is_closing():
            return
        if self._queue is None:
            self._sink.transport.write(data)
            if not self._sink.writable:
                self._source.transport.pause_reading()
            return
        self._unsent += data
        if len(self._unsent) > UNSENT_BYTES_MAX:
            self._source.transport.pause_reading()
        self._fill_window()

    def end(self) -> None:
        """The source sends no more: so it is told when the last byte has arrived."""
        self._ended = True
        self._pass_end()

    def go_on(self) -> None:
        """The sink takes bytes again."""
        if self.frozen:
            return
        if self._queue is None:
            _resume(self._source)
        else:
            self._deliver()

    def _fill_window(self) -> None:
        while self._unsent and self._in_flight < int(self._window) and not self.frozen:
            segment = bytes(self._unsent[:SEGMENT_BYTES])
            del self._unsent[:SEGMENT_BYTES]
            self._in_flight += 1
            self._transmit(self._next_sent, segment, 0)
            self._next_sent += 1
        if len(self._unsent) <= UNSENT_BYTES_MAX // 2 and not self.frozen:
            _resume(self._source)

    def _transmit(self, number: int, segment: bytes, tries: int) -> None:
        assert self._queue is not None
        now_s = self._loop.time()
        arrival_s = self._queue.send(len(segment), now_s)
        if arrival_s is not None:
            self._loop.call_at(arrival_s, self._arrive, number, segment)
            return
        # A loss shows by the segments behind it, or where there are none, by silence.
        noticed = tries == 0 and self._in_flight > DUPLICATES_TO_NOTICE
        silence_s = max(RETRANSMIT_TIMEOUT_S_MIN, 2 * self._round_trip_s) * 2**tries
        self._loop.call_later(
            self._round_trip_s if noticed else silence_s, self._send_again, number, segment, tries + 1
        )

    def _send_again(self, number: int, segment: bytes, tries: int) -> None:
        if self.frozen:
            return
        now_s = self._loop.time()
        if now_s - self._halved_s > self._round_trip_s:  # all losses of one round trip count once
            self._halved_s = now_s
            self._window = self._threshold = max(WINDOW_MIN, self._window / 2)
        self._transmit(number, segment, tries)

    def _arrive(self, number: int, segment: bytes) -> None:
        if not self.frozen:
            self._arrived[number] = segment
            self._deliver()

    def _deliver(self) -> None:
        assert self._queue is not None
        while self._next_delivered in self._arrived and self._sink.writable:
            if self._sink.transport.is_closing():
                return
            self._sink.transport.write(self._arrived.pop(self._next_delivered))
            self._next_delivered += 1
            self._loop.call_later(self._queue.line.delay_s, self._acknowledge)
        self._pass_end()

    def _acknowledge(self) -> None:
        self._in_flight -= 1
        self._window += 1 if self._window < self._threshold else 1 / self._window
        self._fill_window()
        self._pass_end()

    def _pass_end(self) -> None:
        idle = not self._unsent and self._next_delivered == self._next_sent
        if self._ended and idle and not self.frozen and not self._sink.transport.is_closing():
            with suppress(OSError):  # the other end has gone without waiting for this one
                self._sink.transport.write_eof()
            self.finished = True
            self._source.connection.close_when_finished()


class _Connection:
    """Two sockets: the dialer's and the one to the peer behind the proxy."""

    def __init__(self, proxy: "_Proxy") -> None:
        self.proxy = proxy
        self.frozen = False
        self.dialer_port = 0
        self._dialer: _Side | None = None
        self._target: _Side | None = None

    def made(self, side: _Side) -> None:
        if self._dialer is None:
            self._dialer = side
            self.dialer_port = side.transport.get_extra_info("peername")[1]
            side.transport.pause_reading()
            self.proxy.spawn(self._connect(side))

    async def _connect(self, dialer: _Side) -> None:
        loop = asyncio.get_running_loop()
        lines = self.proxy.lines_between(self.dialer_port)
        if lines is not None:
            await asyncio.sleep(2 * lines[0].line.delay_s + CONNECT_RETRY_S * self.proxy.loses_one(lines[0].line))
        try:
            _, target = await loop.create_connection(lambda: _Side(self), HOST, self.proxy.target_port)
        except OSError:
            dialer.transport.abort()
            return
        self._target = target
        if dialer.transport.is_closing():
            target.transport.abort()
            return
        inward, outward = lines or (None, None)
        dialer.flow, target.flow = _Flow(dialer, target, inward), _Flow(target, dialer, outward)
        if self.frozen:
            self.freeze()
        else:
            dialer.transport.resume_reading()

    def lost(self, side: _Side) -> None:
        other = self._target if side is self._dialer else self._dialer
        if not self.frozen:
            self.proxy.connections.discard(self)
            if other is not None:
                other.transport.abort()

    def close_when_finished(self) -> None:
        """Both peers have said their last."""
        sides = [side for side in (self._dialer, self._target) if side is not None]
        if all(side.flow is not None and side.flow.finished for side in sides):
            for side in sides:
                side.transport.close()

    def resumed(self, side: _Side) -> None:
        other = self._target if side is self._dialer else self._dialer
        if other is not None and other.flow is not None:
            other.flow.go_on()

    def freeze(self) -> None:
        """Nothing passes any more, in either direction, and no end is told."""
        self.frozen = True
        for side in (self._dialer, self._target):
            if side is not None and side.flow is not None:
                side.flow.frozen = True
                if not side.transport.is_closing():
                    side.transport.pause_reading()

    def abort(self) -> None:
        for side in (self._dialer, self._target):
            if side is not None:
                side.transport.abort()


class _Proxy:
    """One port in front of one port of a peer."""

    def __init__(self, network: "ShapedNetwork", peer: str, target_port: int) -> None:
        self.network = network
        self.peer = peer
        self.target_port = target_port
        self.connections: set[_Connection] = set()
        self.server: asyncio.Server
        self._tasks: set[asyncio.Task[None]] = set()

    def make_side(self) -> _Side:
        connection = _Connection(self)
        self.connections.add(connection)
        return _Side(connection)

    def lines_between(self, dialer_port: int) -> tuple[_Queue, _Queue] | None:
        """The queues towards the peer behind this proxy and back."""
        lines = self.network.lines
        if self.peer in lines:
            return lines[self.peer]
        for name, (inward, outward) in lines.items():
            if dialer_port in self.network.ports_of(name):
                return outward, inward
        return None

    def loses_one(self, line: Line) -> bool:
        return self.network.entropy.random() < line.loss

    def spawn(self, work: "asyncio._CoroutineLike[None]") -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class ShapedNetwork:
    """All proxies of one swarm. Lines must be set before the peers start."""

    def __init__(self, seed: int = 0) -> None:
        self.entropy = random.Random(seed)
        self.lines: dict[str, tuple[_Queue, _Queue]] = {}
        self.pids: dict[str, Callable[[], int | None]] = {}
        self._proxies: list[_Proxy] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="shaped network", daemon=True)
        self._thread.start()

    def set_line(self, peer: str, line: Line, pid: Callable[[], int | None]) -> None:
        """Give a peer an access line. `pid` tells its process, to know the connections that it dials."""
        self.lines[peer] = _Queue(line, self.entropy), _Queue(line, self.entropy)
        self.pids[peer] = pid

    def open(self, peer: str, target_port: int) -> int:
        """A port that leads to `target_port` of `peer`."""
        return asyncio.run_coroutine_threadsafe(self._open(peer, target_port), self._loop).result(10)

    async def _open(self, peer: str, target_port: int) -> int:
        proxy = _Proxy(self, peer, target_port)
        proxy.server = await asyncio.get_running_loop().create_server(proxy.make_side, HOST, 0)
        self._proxies.append(proxy)
        port: int = proxy.server.sockets[0].getsockname()[1]
        return port

    def freeze(self, peer: str, pid: int | None = None) -> int:
        """Freeze the connections that others have dialled to this peer and, given its process, those that it has
        dialled itself; new ones are free. Returns their number."""
        dialled = frozenset(_ports_of(pid)) if pid is not None else frozenset()
        return asyncio.run_coroutine_threadsafe(self._freeze(peer, dialled), self._loop).result(10)

    async def _freeze(self, peer: str, dialled: frozenset[int]) -> int:
        chosen = [
            one
            for proxy in self._proxies
            for one in proxy.connections
            if not one.frozen and (proxy.peer == peer or one.dialer_port in dialled)
        ]
        for connection in chosen:
            connection.freeze()
        return len(chosen)

    def sent_bytes(self, peer: str) -> tuple[int, int]:
        """What has passed the line of this peer, towards it and from it."""
        inward, outward = self.lines[peer]
        return inward.sent_bytes, outward.sent_bytes

    def waited_s_max(self, peer: str) -> tuple[float, float]:
        """How long a segment has waited at most for those before it, towards this peer and from it."""
        inward, outward = self.lines[peer]
        return inward.waited_s_max, outward.waited_s_max

    def ports_of(self, peer: str) -> set[int]:
        """Local ports of the connections of this peer's process."""
        return _ports_of(self.pids[peer]())

    def close(self) -> None:
        """Cut every connection and end the thread."""
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _close(self) -> None:
        for proxy in self._proxies:
            proxy.server.close()
            for connection in list(proxy.connections):
                connection.abort()
        await asyncio.sleep(0.1)  # for the transports to close


def choose_port(taken: set[int]) -> int:
    """A free port below the range from which the kernel chooses for outgoing connections; added to `taken`."""
    while True:
        port = random.SystemRandom().randrange(15_000, 32_000)
        if port in taken:
            continue
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
        taken.add(port)
        return port


def _ports_of(pid: int | None) -> set[int]:
    try:
        found = psutil.Process(pid).net_connections("tcp") if pid is not None else []
    except psutil.Error:
        return set()
    return {one.laddr.port for one in found}


def _resume(side: _Side) -> None:
    if not side.transport.is_closing() and not side.transport.is_reading():
        side.transport.resume_reading()
