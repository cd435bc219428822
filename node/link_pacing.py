"""When a tensor link may send and read: as the caps on this machine's line and the sink allow. And behind whom: tensors
yield to the control plane and to whatever else this machine sends, in its own queue and in routers that can tell.

Invariants: who waits for a turn gets one in the order of asking; a link that is held up reads nothing from its socket,
so that the peer's kernel holds its sender up; no timer is left after `stop`.
"""

import asyncio
import errno
import socket
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType

from shoal.node.pacer import Pacer

LOWER_EFFORT = 0x04  # DSCP LE in the octet that IP carries it in: RFC 8622
PRIORITY_BULK = 2  # TC_PRIO_BULK of linux/pkt_sched.h


def find_congestion_fault(name: str) -> str | None:
    """Why connections of this process cannot have this congestion control; None where they can."""
    option = getattr(socket, "TCP_CONGESTION", None)
    if option is None:
        return "cannot be chosen on this system"
    with socket.socket() as connection:
        try:
            connection.setsockopt(socket.IPPROTO_TCP, option, name.encode())
        except OSError as error:
            return "is not known to this kernel" if error.errno == errno.ENOENT else "is not allowed by this kernel"
    return None


def set_bulk(connection: socket.socket, unsent_bytes_max: int, congestion_control: str | None = None) -> None:
    """Let a connection's bytes go behind those of others, and the kernel hold no more of them unsent than this. What a
    system does not know it does without. `congestion_control` None: the system's own."""
    lowat = getattr(socket, "TCP_NOTSENT_LOWAT", None)
    wanted = [(socket.IPPROTO_TCP, lowat, unsent_bytes_max)]
    if connection.family == socket.AF_INET6:
        wanted.append((socket.IPPROTO_IPV6, getattr(socket, "IPV6_TCLASS", None), LOWER_EFFORT))
    # Also of an IPv6 socket, which may carry IPv4. It sets a priority, too, so that this comes after it.
    wanted.append((socket.IPPROTO_IP, getattr(socket, "IP_TOS", None), LOWER_EFFORT))
    wanted.append((socket.SOL_SOCKET, getattr(socket, "SO_PRIORITY", None), PRIORITY_BULK))
    for level, option, value in wanted:
        if option is not None:
            with suppress(OSError):
                connection.setsockopt(level, option, value)
    if congestion_control is not None:
        with suppress(OSError):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, congestion_control.encode())


async def pace(pacer: Pacer, nbytes: int) -> None:
    """Return when so many bytes may leave."""
    delay_s = pacer.reserve(nbytes, asyncio.get_running_loop().time())
    if delay_s > 0:
        await asyncio.sleep(delay_s)


class StreamTurns:
    """So many payloads at once as the pacer says; `async with` it to send one."""

    def __init__(self, pacer: Pacer) -> None:
        self._pacer = pacer
        self._active = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def __aenter__(self) -> None:
        if self._waiting or self._is_full():
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            try:
                await turn
            except asyncio.CancelledError:
                if not turn.cancelled():
                    self._active -= 1  # it was given just before
                self.wake()
                raise
        else:
            self._active += 1

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._active -= 1
        self.wake()

    def wake(self) -> None:
        """Give free turns to who waits; call it when the cap has changed."""
        while self._waiting and not self._is_full():
            turn = self._waiting.popleft()
            if not turn.done():  # who waited may have been cancelled
                self._active += 1
                turn.set_result(None)

    def _is_full(self) -> bool:
        most = self._pacer.streams_max
        return most is not None and self._active >= most


class Reading:
    """Whether one link reads its socket: not while the sink has enough to do, nor ahead of the cap."""

    def __init__(self, transport: asyncio.Transport, pacer: Pacer, go_on: Callable[[], None]) -> None:
        self._transport = transport
        self._pacer = pacer
        self._go_on = go_on
        self._sink_is_full = False
        self._timer: asyncio.TimerHandle | None = None

    @property
    def is_held(self) -> bool:
        """Whether nothing more is read for now."""
        return self._sink_is_full or self._timer is not None

    def hold(self) -> None:
        """The sink has enough to do."""
        if not self.is_held:
            self._transport.pause_reading()
        self._sink_is_full = True

    def release(self) -> None:
        """The sink takes more."""
        if self._sink_is_full:
            self._sink_is_full = False
            self._resume()

    def took(self, nbytes: int) -> None:
        """So many bytes have come."""
        loop = asyncio.get_running_loop()
        delay_s = self._pacer.reserve(nbytes, loop.time())
        if delay_s > 0 and self._timer is None:
            if not self._sink_is_full:
                self._transport.pause_reading()
            self._timer = loop.call_later(delay_s, self._come_due)

    def stop(self) -> None:
        """The link has ended."""
        self._sink_is_full = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _come_due(self) -> None:
        self._timer = None
        self._resume()

    def _resume(self) -> None:
        if not self.is_held:
            self._go_on()
            if not self.is_held:
                self._transport.resume_reading()
