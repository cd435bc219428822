"""Where a peer can be dialled: the part of multiaddr that this project uses, as text and as a value.

    /ip4|ip6|dns|dns4|dns6/<host>/tcp/<port>[/p2p/<peer id>]

Invariant: one address, one text; what parses formats back to the same text (libp2p addressing specification).
"""

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

from shoal.protocol.errors import ProtocolError, Refusal, UriError
from shoal.protocol.identity import PeerId, format_peer_id, parse_peer_id
from shoal.protocol.wire import Bound

ADDRESS_CHARS_MAX = 256
ADDRESSES_PER_PEER_MAX = 8

AddressText = Annotated[str, Bound(1, ADDRESS_CHARS_MAX)]
Addresses = Annotated[tuple[AddressText, ...], Bound(0, ADDRESSES_PER_PEER_MAX)]

_EXAMPLE = "/ip4/203.0.113.5/tcp/4001/p2p/12D3KooW…"
_NETS = ("ip4", "ip6", "dns", "dns4", "dns6")
_PORT = re.compile(r"0|[1-9][0-9]{0,4}")
_HOST_NAME = re.compile(r"(?=.{1,253}$)[a-z0-9_](?:[a-z0-9_-]{0,62})(?:\.[a-z0-9_][a-z0-9_-]{0,62})*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """One TCP endpoint, and the peer that must answer there, where that is known."""

    net: str
    host: str
    port: int
    peer: PeerId | None = None

    def __str__(self) -> str:
        tail = "" if self.peer is None else f"/p2p/{format_peer_id(self.peer)}"
        return f"/{self.net}/{self.host}/tcp/{self.port}{tail}"

    @property
    def is_wildcard(self) -> bool:
        """Whether this is a place to listen on and not one to dial."""
        return self.host in ("0.0.0.0", "::") or self.port == 0

    @property
    def is_loopback(self) -> bool:
        """Whether only processes of the same machine can dial it."""
        return self.host == "localhost" or (self.net in ("ip4", "ip6") and ipaddress.ip_address(self.host).is_loopback)


def parse_address(text: str) -> Address:
    """Inverse of `str(Address)`; raises UriError naming what is wrong with `text`."""
    parts = text.split("/")
    if len(text) > ADDRESS_CHARS_MAX or len(parts) not in (5, 7) or parts[0] or parts[3] != "tcp":
        raise _malformed(text, "is not a TCP multiaddr")
    if parts[1] not in _NETS:
        raise _malformed(text, f"starts with {parts[1]!r}, not with one of {', '.join(_NETS)}")
    if not _PORT.fullmatch(parts[4]) or int(parts[4]) > 65535:
        raise _malformed(text, f"has the port {parts[4]!r}")
    if len(parts) == 7 and parts[5] != "p2p":
        raise _malformed(text, f"goes on with {parts[5]!r}")
    _check_host(text, parts[1], parts[2])
    peer = parse_peer_id(parts[6]) if len(parts) == 7 else None
    return Address(net=parts[1], host=parts[2], port=int(parts[4]), peer=peer)


def parse_peer_address(text: str) -> tuple[PeerId, Address]:
    """An address that can be dialled and says who answers there; raises UriError."""
    address = parse_address(text)
    if address.peer is None:
        raise _malformed(text, "does not say whose it is")
    if address.is_wildcard:
        raise _malformed(text, "is an address to listen on, not one to dial")
    return address.peer, address


def parse_address_untrusted(text: str, peer: PeerId) -> Address:
    """An address that `peer` claims; raises ProtocolError when it is malformed, undialable or another peer's."""
    try:
        address = parse_address(text)
    except UriError as error:
        raise ProtocolError(Refusal.MALFORMED, f"address {error.problem}") from error
    if address.is_wildcard:
        raise ProtocolError(Refusal.OUT_OF_RANGE, f"{text!r} cannot be dialled")
    if address.peer not in (None, peer):
        raise ProtocolError(Refusal.WRONG_PEER, f"{text!r} is another peer's address")
    return address


def keep_dialable(texts: Iterable[str], peer: PeerId) -> tuple[str, ...]:
    """The addresses among `texts` that may stand for `peer`: without duplicates, at most ADDRESSES_PER_PEER_MAX.

    For what others hand on about a peer in bulk, where one bad address must not cost the good ones.
    """
    kept: dict[str, None] = {}
    for text in texts:
        if len(kept) == ADDRESSES_PER_PEER_MAX:
            break
        try:
            kept[str(parse_address_untrusted(text, peer))] = None
        except ProtocolError:
            continue
    return tuple(kept)


def _check_host(text: str, net: str, host: str) -> None:
    if net.startswith("dns"):
        if not _HOST_NAME.fullmatch(host):
            raise _malformed(text, f"has the host name {host!r}")
        return
    try:
        ip = ipaddress.ip_address(host)
    except ValueError as error:
        raise _malformed(text, f"has {host!r} for an IP address") from error
    if isinstance(ip, ipaddress.IPv6Address) and (ip.ipv4_mapped is not None or ip.scope_id is not None):
        # The one has two texts, the other means something on one machine only.
        raise _malformed(text, f"has {host!r}, which is no address that others can dial")
    if ip.version != (4 if net == "ip4" else 6) or str(ip) != host:
        raise _malformed(text, f"has {host!r}, where {net} wants {ip}")


def _malformed(text: str, problem: str) -> UriError:
    return UriError("multiaddr", f"{text[:ADDRESS_CHARS_MAX]!r} {problem}", f"write it like {_EXAMPLE}")
