"""Sockets that listen, and sockets that dial from the same port, so that a router gives both the same mapping.

Invariant: nobody else has the port: SO_REUSEPORT, which dialling from it needs, would let two daemons share it unseen.
"""

import errno
import socket
from contextlib import ExitStack

from shoal.node.endpoints import is_wildcard
from shoal.node.link_port import Address

# Port 0 must be free for IPv4 and IPv6 alike; the kernel is asked so often.
PORTS_TRIED_MAX = 16
_NO_IPV6 = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL, errno.EPROTONOSUPPORT)


def open_listeners(host: str, port: int) -> list[socket.socket]:
    """Bound sockets, IPv4 first, on one port; a wildcard is both families where there are both. Raises OSError."""
    if not is_wildcard(host):
        return [open_exclusive(socket.AF_INET6 if ":" in host else socket.AF_INET, host, port)]
    for tries_left in reversed(range(PORTS_TRIED_MAX)):
        try:
            return _open_both(port)
        except OSError as error:
            if port != 0 or error.errno != errno.EADDRINUSE or not tries_left:
                raise
    raise AssertionError("the last try raises")


def open_dialling(family: socket.AddressFamily, bound: Address) -> socket.socket:
    """A socket that dials from the port of a listening one, to be connected; raises OSError."""
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setblocking(False)
        _share(made)
        host, port = bound
        wildcard = "::" if family == socket.AF_INET6 else "0.0.0.0"
        made.bind((wildcard if is_wildcard(host) else host, port))
    except OSError:
        made.close()
        raise
    return made


def _open_both(port: int) -> list[socket.socket]:
    with ExitStack() as opened:
        four = opened.enter_context(open_exclusive(socket.AF_INET, "0.0.0.0", port))
        sockets = [four]
        try:
            six = open_exclusive(socket.AF_INET6, "::", four.getsockname()[1])
            sockets.append(opened.enter_context(six))
        except OSError as error:
            if error.errno not in _NO_IPV6:
                raise
        opened.pop_all()
    return sockets


def open_exclusive(family: socket.AddressFamily, host: str, port: int) -> socket.socket:
    """A bound socket on a port that nobody else has, from which may be dialled, too; raises OSError."""
    if port:
        # Fails where another socket listens, which it would not with SO_REUSEPORT set.
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            _keep_to_family(probe)
            probe.bind((host, port))
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        _share(made)
        _keep_to_family(made)
        made.bind((host, port))
    except OSError:
        made.close()
        raise
    return made


def _share(made: socket.socket) -> None:
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)


def _keep_to_family(made: socket.socket) -> None:
    if made.family == socket.AF_INET6:
        made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
