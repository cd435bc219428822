"""What a libp2p connection stands on: a TCP stream, or a circuit through a relay; Noise or TLS, and Yamux, above it.

Invariants: nothing that a peer sends or leaves unsent keeps a connection: one that is silent after a ping, takes no
bytes, or sends past its windows is dropped, over a relay as on its own socket; dropping one never waits for its peer;
a frame of Yamux is written whole or its connection is dropped, for half a frame of a circuit would spoil the relay's
connection for every other circuit in it.

Imported only in a process that starts a host: importing libp2p takes a second.
"""

import logging
import socket
import struct
import weakref
from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any

import trio
from libp2p.abc import (
    IListener,
    IMuxedConn,
    INetConn,
    INetStream,
    INetwork,
    INotifee,
    IRawConnection,
    ISecureConn,
)
from libp2p.connection_types import ConnectionType
from libp2p.custom_types import THandler
from libp2p.io.abc import ReadWriteCloser
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.io.trio import TrioTCPStream
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.peer.id import ID
from libp2p.protocol_muxer.exceptions import MultiselectError
from libp2p.security.secure_session import SecureSession
from libp2p.stream_muxer.yamux.yamux import FLAG_SYN, TYPE_PING, YAMUX_HEADER_FORMAT, Yamux, YamuxStream
from libp2p.transport.exceptions import MuxerUpgradeFailure
from libp2p.transport.tcp.tcp import TCP
from libp2p.transport.upgrader import TransportUpgrader
from libp2p.utils.multiaddr_utils import multiaddr_from_socket
from multiaddr import Multiaddr

from shoal.node.interfaces import has_address

# A peer whose kernel acknowledges nothing for this long is hung up on.
LINK_TIMEOUT_S = 20
# A peer of which no byte has come for this long is pinged. One ping shows both ends that the other lives.
PING_PERIOD_S = 4.0
# And one that sends no byte for this long after it is hung up on, too: a relay's kernel may acknowledge for it.
SILENCE_TIMEOUT_S = 8.0
SECOND_LOOK_S = 1.0
# The same, once the peer has made another connection: it may have moved, and cannot end this one.
DOUBT_TIMEOUT_S = 3.0
# A frame that the socket, or the relay, does not take for this long costs the connection.
FRAME_TIMEOUT_S = 5.0
# How long a circuit that this side has closed may stay open on the other.
LINGER_S = 2.0
RESET_TIMEOUT_S = 2.0
READ_BYTES_MAX = 64 * 1024
STREAM_WINDOW_BYTES = 1024 * 1024
CREDIT_BYTES_MIN = 16 * 1024
UNREAD_BYTES_PER_CONNECTION_MAX = 16 * STREAM_WINDOW_BYTES
UNREAD_BYTES_MAX = 64 * STREAM_WINDOW_BYTES

_log = logging.getLogger(__name__)


def undisturbed(timeout_s: float) -> trio.CancelScope:
    """A time limit within which nothing else cuts short what was begun."""
    return trio.CancelScope(deadline=trio.current_time() + timeout_s, shield=True)


class Contained:
    """A barrier for what remote bytes can make the library raise, which is anything.

    Its errors have no common root, and one that passes ends the run for every peer; so this ends what failed, and
    only that. Cancellation passes.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self.failed = False

    def __enter__(self) -> "Contained":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        self.failed = isinstance(error, Exception)
        if self.failed:
            _log.debug("%s failed: %r", self._what, error)
        return self.failed


class Transport(ReadWriteCloser):
    """Bytes to one peer and back, of which `read(n)` returns n unless the peer hangs up."""

    # Of the whole life of the transport: liveness is any byte at all.
    received_bytes = 0
    received_s = float("-inf")  # when the last of them came
    _unread: bytearray

    @abstractmethod
    async def _receive(self) -> bytes:
        """The next bytes, at most READ_BYTES_MAX; none at the end. Raises IOException."""

    @abstractmethod
    async def abort(self) -> None:
        """End it now, whatever the peer does."""

    def is_stranded(self) -> bool:
        """Whether it begins at an address that this machine no longer has, so that nothing comes back."""
        return False

    async def read(self, n: int | None = None) -> bytes:
        enough = 1 if n is None else min(n, READ_BYTES_MAX)
        while len(self._unread) < enough:
            chunk = await self._receive()
            if not chunk:
                break
            self.received_bytes += len(chunk)
            self.received_s = trio.current_time()
            self._unread += chunk
        count = len(self._unread) if n is None else enough
        taken = bytes(self._unread[:count])
        del self._unread[:count]
        return taken


class BufferedTcpStream(Transport, TrioTCPStream):
    """A TCP stream with one system call for many reads."""

    def __init__(self, stream: trio.SocketStream) -> None:
        super().__init__(stream)
        self._unread = bytearray()
        self._local_host = str(stream.socket.getsockname()[0])
        stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        # Not every system has these; there, the daemon's own heartbeats are all there is.
        for name, value in (
            ("TCP_USER_TIMEOUT", LINK_TIMEOUT_S * 1000),
            ("TCP_KEEPIDLE", LINK_TIMEOUT_S // 2),
            ("TCP_KEEPINTVL", LINK_TIMEOUT_S // 4),
        ):
            if hasattr(socket, name):
                stream.socket.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        try:
            # The library's own reading of it fails for IPv6.
            host, port = stream.socket.getpeername()[:2]
        except OSError:
            return
        self._cached_remote_address = (str(host), int(port))

    async def _receive(self) -> bytes:
        return await TrioTCPStream.read(self, READ_BYTES_MAX)

    def is_stranded(self) -> bool:
        return not has_address(self._local_host)

    async def abort(self) -> None:
        # Closing the socket never blocks, unlike the library's farewell to a peer that has stopped reading.
        await trio.aclose_forcefully(self.stream)


class CircuitStream(Transport):
    """A stream to a relay that carries a connection to another peer; `address` is that peer's, through the relay."""

    def __init__(self, stream: INetStream, address: Multiaddr, unread: bytes) -> None:
        self.address = address
        self.stream = stream
        self.ended = trio.Event()
        self._unread = bytearray(unread)
        self._reading = trio.CancelScope()

    async def _receive(self) -> bytes:
        if not self.ended.is_set():
            # A stream that is reset here would not wake its reader.
            with suppress(EOFError), trio.CancelScope() as self._reading:
                return await self.stream.read(READ_BYTES_MAX)
        return b""

    async def write(self, data: bytes) -> None:
        await self.stream.write(data)

    async def close(self) -> None:
        """Let the other side read what was written, then end."""
        if not self.ended.is_set():
            self._end()
            with Contained("the end of a circuit"), undisturbed(RESET_TIMEOUT_S):
                await self.stream.close()

    def _end(self) -> None:
        self.ended.set()
        self._reading.cancel()

    async def abort(self) -> None:
        self._end()
        # The reset is a frame to the relay, which may not take it: the ping there ends that.
        with undisturbed(RESET_TIMEOUT_S):
            await self.stream.reset()

    async def linger(self) -> None:
        """Return when this circuit is over; one that the other side leaves half open is reset."""
        await self.ended.wait()
        await trio.sleep(LINGER_S)
        await self.abort()

    def get_remote_address(self) -> tuple[str, int] | None:
        return None


def format_multiaddr_untrusted(raw: bytes) -> str | None:
    """The text of an address that somebody sent; None where it has none."""
    try:
        return str(Multiaddr(raw))
    except (ValueError, LookupError, TypeError):
        return None


def make_raw_connection(transport: ReadWriteCloser, *, is_initiator: bool) -> RawConnection:
    """The library's connection over a transport of this module."""
    if isinstance(transport, CircuitStream):
        return RawConnection(transport, is_initiator, ConnectionType.RELAYED, [transport.address])
    return RawConnection(transport, is_initiator)


class TcpListener(IListener):
    """Listens on sockets that were opened before, so that a port that is taken is known before anything else starts."""

    def __init__(self, handler: THandler, sockets: Sequence[trio.SocketListener]) -> None:
        self._handler = handler
        self._sockets = sockets
        self._scope = trio.CancelScope()
        self._addresses = tuple(multiaddr_from_socket(opened.socket) for opened in sockets)

    async def listen(self, maddr: Multiaddr) -> None:
        """Serve until `close`; the address was settled when the sockets were opened."""
        with self._scope:
            await trio.serve_listeners(self._serve, list(self._sockets))

    def get_addrs(self) -> tuple[Multiaddr, ...]:
        return self._addresses

    async def close(self) -> None:
        self._scope.cancel()
        for opened in self._sockets:
            await opened.aclose()

    async def _serve(self, stream: trio.SocketStream) -> None:
        with Contained("an incoming connection"):
            await self._handler(BufferedTcpStream(stream))


class TcpTransport(TCP):
    """The library's dialler over `BufferedTcpStream`."""

    def can_dial(self, maddr: Multiaddr) -> bool:
        # The library would dial the relay of a circuit and expect the peer behind it there.
        return super().can_dial(maddr) and "p2p-circuit" not in {protocol.name for protocol in maddr.protocols()}

    async def _dial_resolved(self, maddr: Multiaddr, source: tuple[str, int] | None = None) -> IRawConnection:
        dialled = await super()._dial_resolved(maddr, source)
        assert isinstance(dialled, RawConnection) and isinstance(dialled.stream, TrioTCPStream)
        return make_raw_connection(BufferedTcpStream(dialled.stream.stream), is_initiator=True)


class SteadyWindowStream(YamuxStream):
    """A stream with a window of STREAM_WINDOW_BYTES, topped up in few large steps.

    The library sends an update for every read, which costs more than a small message itself.
    """

    async def _auto_tune_and_send_window_update(self, *, bytes_read: int = 0) -> None:
        self._pending_recv_release += bytes_read
        if self._pending_recv_release < CREDIT_BYTES_MIN:
            return
        unread = len(self.conn.stream_buffers.get(self.stream_id, b""))
        missing = STREAM_WINDOW_BYTES - self.recv_window - unread
        if missing >= STREAM_WINDOW_BYTES // 2:
            self._pending_recv_release = 0
            self.recv_window += missing
            await self.send_window_update(missing)


class BoundedYamux(Yamux):
    """Yamux that hangs up on a peer that sends more than the windows it was given, and on one that falls silent.

    `siblings` are all connections of the node: when their unread bytes together are too many, it hangs up on those that
    have more than a window of them.
    """

    siblings: "weakref.WeakSet[BoundedYamux]"

    @property
    def unread_bytes(self) -> int:
        """What has arrived on all streams and was not read yet."""
        return sum(len(buffer) for buffer in self.stream_buffers.values())

    async def _measure_rtt_loop(self) -> None:
        transport = transport_of(self)
        while not self.event_shutting_down.is_set():
            silent_s = trio.current_time() - transport.received_s
            if silent_s >= PING_PERIOD_S:
                if not await self.prove_alive(SILENCE_TIMEOUT_S):
                    return
            else:
                with trio.move_on_after(PING_PERIOD_S - silent_s):
                    await self.event_shutting_down.wait()

    async def prove_alive(self, timeout_s: float) -> bool:
        """Ping, and watch for any byte in return; without one the connection is dropped."""
        transport = transport_of(self)
        before_bytes = transport.received_bytes
        with Contained("a ping"), trio.move_on_after(timeout_s):
            await self._ping()
        if transport.received_bytes == before_bytes and not self.event_shutting_down.is_set():
            # This process may have been stopped for so long itself, with the answer waiting to be read.
            await trio.sleep(SECOND_LOOK_S)
        if transport.received_bytes == before_bytes:
            await transport.abort()
            return False
        return True

    async def _ping(self) -> None:
        self._ping_id += 1
        self._ping_event = trio.Event()
        await self._write_frame(struct.pack(YAMUX_HEADER_FORMAT, 0, TYPE_PING, FLAG_SYN, 0, self._ping_id))
        self._ping_sent_time = trio.current_time()
        await self._ping_event.wait()

    async def _write_frame(self, data: bytes) -> None:
        async with self._write_lock:
            with undisturbed(FRAME_TIMEOUT_S) as limit:
                await self.secured_conn.write(data)
            if limit.cancelled_caught:
                await transport_of(self).abort()
                raise ConnectionClosedError(f"the peer took no bytes for {FRAME_TIMEOUT_S:.0f} s")
        await trio.lowlevel.checkpoint()

    async def _read_data_body(self, length: int) -> bytes:
        unread = self.unread_bytes
        crowded = unread + length > STREAM_WINDOW_BYTES and (
            unread + length > UNREAD_BYTES_PER_CONNECTION_MAX
            or sum(one.unread_bytes for one in self.siblings) + length > UNREAD_BYTES_MAX
        )
        if length > STREAM_WINDOW_BYTES or crowded:
            await self._cleanup_on_error()
            raise ConnectionClosedError(f"{unread} bytes unread and {length} more announced")
        return await super()._read_data_body(length)


def transport_of(muxed: IMuxedConn) -> Transport:
    """What carries a connection of this module."""
    assert isinstance(muxed, Yamux) and isinstance(muxed.secured_conn, SecureSession)
    raw = muxed.secured_conn.conn.conn
    assert isinstance(raw, RawConnection) and isinstance(raw.stream, Transport)
    return raw.stream


def is_relayed(muxed: IMuxedConn) -> bool:
    """Whether the connection goes through another peer."""
    return isinstance(transport_of(muxed), CircuitStream)


class YamuxUpgrader(TransportUpgrader):
    """Multiplexes every connection with `BoundedYamux`; the library takes its own class, whatever it is given."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._made: weakref.WeakSet[BoundedYamux] = weakref.WeakSet()

    async def upgrade_connection(self, conn: ISecureConn, peer_id: ID) -> IMuxedConn:
        try:
            await self.muxer_multistream.select_transport(conn)
        except MultiselectError as error:
            raise MuxerUpgradeFailure("the peer does not speak Yamux") from error
        made = BoundedYamux(conn, peer_id, is_initiator=conn.is_initiator)
        made.siblings = self._made
        self._made.add(made)
        return made


class ConnectionEvents(INotifee):
    """Hands the swarm's connection events on."""

    def __init__(self, on_connected: Callable[[INetConn], None], on_closed: Callable[[INetConn], None]) -> None:
        self._on_connected = on_connected
        self._on_closed = on_closed

    async def connected(self, network: INetwork, conn: INetConn) -> None:
        self._on_connected(conn)

    async def disconnected(self, network: INetwork, conn: INetConn) -> None:
        self._on_closed(conn)

    async def opened_stream(self, network: INetwork, stream: INetStream) -> None:
        return

    async def closed_stream(self, network: INetwork, stream: INetStream) -> None:
        return

    async def listen(self, network: INetwork, multiaddr: Multiaddr) -> None:
        return

    async def listen_close(self, network: INetwork, multiaddr: Multiaddr) -> None:
        return
