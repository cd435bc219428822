"""What a NAT does, seen with plain sockets: which address others see, who gets in, whether two sides can meet.

The questions of RFC 5780 (STUN), with all ends in one process: a socket belongs to the namespace that it was opened in,
whoever uses it.
"""

import errno
import select
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from tests.natlab.lab import Host

PORT = 4001
ANSWER_S = 1.0  # within one machine a packet takes microseconds; on two busy cores, some milliseconds
SILENCE_S = 0.4  # a packet that has not come by then was dropped
PUNCH_S = 3.0
RETRY_S = 0.1

Address = tuple[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Behaviour:
    """`seen` holds the host's outside address as each destination saw it; `lets_in` who reaches that address."""

    seen: Sequence[Address]
    known_port: bool  # the address and port that the host has sent to
    other_port: bool  # the same address, another port
    other_host: bool
    unused_port: bool  # anybody, at an outside port that nothing was sent from

    @property
    def keeps_mapping(self) -> bool:
        return len(set(self.seen)) == 1


def open_socket(host: Host, kind: socket.SocketKind, port: int, listens: bool = False) -> socket.socket:
    """Bound to this port beside others, as a listener that also dials from its port."""

    def make() -> socket.socket:
        opened = socket.socket(socket.AF_INET, kind)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        opened.bind(("", port))
        if listens:
            opened.listen()
        opened.settimeout(ANSWER_S)
        return opened

    return host.call(make)


def probe_udp(host: Host, first: Host, second: Host) -> Behaviour:
    """The host sends to the first server; then others send to where it seems to be."""
    with ExitStack() as stack:
        enter = stack.enter_context
        own = enter(open_socket(host, socket.SOCK_DGRAM, PORT))
        servers = [enter(open_socket(one, socket.SOCK_DGRAM, port)) for one, port in _destinations(first, second)]
        seen = []
        for server, destination in zip(servers, _destinations(first, second), strict=True):
            own.sendto(b"hello", (destination[0].address, destination[1]))
            seen.append(server.recvfrom(64)[1])
        known = servers[0]
        stranger = enter(open_socket(first, socket.SOCK_DGRAM, 7009))
        other = enter(open_socket(second, socket.SOCK_DGRAM, 7009))
        unused = (seen[0][0], PORT + 1)
        second_own = enter(open_socket(host, socket.SOCK_DGRAM, PORT + 1))
        return Behaviour(
            seen=seen,
            known_port=_arrives(known, own, seen[0]),
            other_port=_arrives(stranger, own, seen[0]),
            other_host=_arrives(other, own, seen[0]),
            unused_port=_arrives(other, second_own, unused),
        )


def _destinations(first: Host, second: Host) -> list[tuple[Host, int]]:
    return [(first, 7001), (first, 7002), (second, 7001)]


def _arrives(sender: socket.socket, receiver: socket.socket, address: Address) -> bool:
    _drain(receiver)
    with _ignored(errno.ECONNREFUSED):
        sender.sendto(b"in?", address)
    receiver.settimeout(SILENCE_S)
    try:
        return receiver.recv(64) == b"in?"
    except TimeoutError:
        return False


def _drain(receiver: socket.socket) -> None:
    receiver.setblocking(False)
    with _ignored(errno.EAGAIN):
        while True:
            receiver.recv(64)


@contextmanager
def _ignored(code: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno != code:
            raise


def probe_tcp(host: Host, first: Host, second: Host) -> Behaviour:
    """The host listens, and dials the servers from that port; then others dial where it seems to be."""
    with ExitStack() as stack:
        enter = stack.enter_context
        listener = enter(open_socket(host, socket.SOCK_STREAM, PORT, listens=True))
        second_listener = enter(open_socket(host, socket.SOCK_STREAM, PORT + 1, listens=True))
        seen = []
        for server, port in _destinations(first, second):
            accepting = enter(open_socket(server, socket.SOCK_STREAM, port, listens=True))
            own = enter(open_socket(host, socket.SOCK_STREAM, PORT))
            own.connect((server.address, port))
            accepted, address = accepting.accept()
            enter(accepted)
            seen.append(address)
        return Behaviour(
            seen=seen,
            known_port=True,  # the connection to it is open
            other_port=_connects(first, listener, seen[0]),
            other_host=_connects(second, listener, seen[0]),
            unused_port=_connects(second, second_listener, (seen[0][0], PORT + 1)),
        )


def _connects(dialer: Host, listener: socket.socket, address: Address) -> bool:
    with open_socket(dialer, socket.SOCK_STREAM, 7009) as dialling:
        dialling.settimeout(SILENCE_S)
        try:
            dialling.connect(address)
        except (TimeoutError, ConnectionRefusedError):
            return False
        accepted, _ = listener.accept()
        accepted.close()
        return True


def find_outside(host: Host, kind: socket.SocketKind, server: Host) -> Address:
    """Where the host's port seems to be, as the server sees it: what a peer is told before it punches."""
    listens = kind is socket.SOCK_STREAM
    with open_socket(server, kind, 7100, listens) as answering, open_socket(host, kind, PORT) as own:
        own.connect((server.address, 7100))
        if not listens:
            own.send(b"hello")
            address: Address = answering.recvfrom(64)[1]
            return address
        accepted, address = answering.accept()
        accepted.close()
        return address


def measure_round_trip_s(near: Host, far: Host) -> float:
    """The shortest of some: a busy machine makes others longer."""
    with open_socket(near, socket.SOCK_DGRAM, 7200) as own, open_socket(far, socket.SOCK_DGRAM, 7200) as other:
        found = []
        for _ in range(5):
            begin_s = time.monotonic()
            own.sendto(b"there", (far.address, 7200))
            other.sendto(b"back", other.recvfrom(64)[1])
            own.recv(64)
            found.append(time.monotonic() - begin_s)
        return min(found)


def punch_udp(left: Host, right: Host, server: Host) -> bool:
    """Both send to where the other seems to be, and answer whoever comes, until both have heard."""
    kind = socket.SOCK_DGRAM
    outside = {left: find_outside(left, kind, server), right: find_outside(right, kind, server)}
    with open_socket(left, kind, PORT) as first, open_socket(right, kind, PORT) as second:
        targets = {first: outside[right], second: outside[left]}
        heard: set[socket.socket] = set()
        end_s = time.monotonic() + PUNCH_S
        while len(heard) < 2 and time.monotonic() < end_s:
            for own, target in targets.items():
                with _ignored(errno.ECONNREFUSED):
                    own.sendto(b"punch", target)
            for own in select.select([first, second], [], [], RETRY_S)[0]:
                with _ignored(errno.ECONNREFUSED):
                    _, targets[own] = own.recvfrom(64)
                    heard.add(own)
        return len(heard) == 2


def punch_tcp(left: Host, right: Host, server: Host) -> bool:
    """Both dial where the other seems to be, from the port that they listen on, until one connection is whole."""
    kind = socket.SOCK_STREAM
    outside = {left: find_outside(left, kind, server), right: find_outside(right, kind, server)}
    with ExitStack() as stack:
        enter = stack.enter_context
        listeners = [enter(open_socket(one, kind, PORT, listens=True)) for one in (left, right)]
        end_s = time.monotonic() + PUNCH_S
        while time.monotonic() < end_s:
            dials = [enter(open_socket(one, kind, PORT)) for one in (left, right)]
            for own, target in zip(dials, (outside[right], outside[left]), strict=True):
                own.setblocking(False)
                own.connect_ex(target)
            if _any_whole(dials, listeners):
                return True
            for own in dials:
                own.close()
        return False


def _any_whole(dials: Sequence[socket.socket], listeners: Sequence[socket.socket]) -> bool:
    """Whether a byte comes through: a connection that one side alone believes in is none."""
    end_s = time.monotonic() + 5 * RETRY_S
    accepted: list[socket.socket] = []
    waiting = [*dials, *listeners]
    try:
        while waiting and time.monotonic() < end_s:
            arrived, sendable, _ = select.select(waiting + accepted, dials, [], RETRY_S)
            for one in sendable:
                if one.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0:
                    with _ignored(errno.EPIPE):
                        one.send(b"punch")
            for one in arrived:
                if one in listeners:
                    accepted.append(one.accept()[0])
                elif _reads(one):
                    return True
                else:
                    waiting = [other for other in waiting if other is not one]
                    accepted = [other for other in accepted if other is not one]
            if not any(one in waiting for one in dials) and not accepted:
                return False
        return False
    finally:
        for one in accepted:
            one.close()


def _reads(one: socket.socket) -> bool:
    try:
        return one.recv(64).startswith(b"punch")
    except OSError:
        return False
