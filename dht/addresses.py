"""Where a peer can be dialled: the part of multiaddr that this project uses, as text and as a value.

    /ip4|ip6|dns|dns4|dns6/<host>/tcp/<port>[/p2p/<peer id>]
    /ip4|ip6|dns|dns4|dns6/<host>/tcp/<port>/p2p/<relay's id>/p2p-circuit[/p2p/<peer id>]

The second form is a circuit: the endpoint is the relay's, and the peer is reached through it.

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
_CIRCUIT = "p2p-circuit"
_NETS = ("ip4", "ip6", "dns", "dns4", "dns6")
_PORT = re.compile(r"0|[1-9][0-9]{0,4}")
_HOST_NAME = re.compile(r"(?=.{1,253}$)[a-z0-9_](?:[a-z0-9_-]{0,62})(?:\.[a-z0-9_][a-z0-9_-]{0,62})*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """One TCP endpoint, and the peer that must answer there, where that is known.

    With `relay`, that peer answers at the endpoint, and `peer` is on the other side of it.
    """

    net: str
    host: str
    port: int
    peer: PeerId | None = None
    relay: PeerId | None = None

    def __str__(self) -> str:
        circuit = "" if self.relay is None else f"/p2p/{format_peer_id(self.relay)}/{_CIRCUIT}"
        tail = "" if self.peer is None else f"/p2p/{format_peer_id(self.peer)}"
        return f"/{self.net}/{self.host}/tcp/{self.port}{circuit}{tail}"

    @property
    def is_relayed(self) -> bool:
        """Whether this leads through another peer."""
        return self.relay is not None

    @property
    def is_global(self) -> bool:
        """Whether anybody on the internet may dial it; a name may."""
        return self.net not in ("ip4", "ip6") or ipaddress.ip_address(self.host).is_global

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
    if len(text) > ADDRESS_CHARS_MAX or len(parts) not in (5, 7, 8, 10) or parts[0] or parts[3] != "tcp":
        raise _malformed(text, "is not a TCP multiaddr")
    if parts[1] not in _NETS:
        raise _malformed(text, f"starts with {parts[1]!r}, not with one of {', '.join(_NETS)}")
    if not _PORT.fullmatch(parts[4]) or int(parts[4]) > 65535:
        raise _malformed(text, f"has the port {parts[4]!r}")
    _check_host(text, parts[1], parts[2])
    relay, rest = None, parts[5:]
    if len(rest) > 2:
        relay, rest = _parse_tail(text, rest[:2]), rest[3:]
        if parts[7] != _CIRCUIT:
            raise _malformed(text, f"goes on with {parts[7]!r}")
    peer = _parse_tail(text, rest) if rest else None
    if relay is not None and relay == peer:
        raise _malformed(text, "leads to a relay through itself")
    return Address(net=parts[1], host=parts[2], port=int(parts[4]), peer=peer, relay=relay)


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
    if address.relay == peer:
        raise ProtocolError(Refusal.OUT_OF_RANGE, f"{text!r} leads to a relay through itself")
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


def with_peer(texts: Iterable[str], peer: PeerId) -> tuple[str, ...]:
    """The addresses, none twice, each with the id of the peer that must answer there."""
    tail = f"/p2p/{format_peer_id(peer)}"
    return tuple(dict.fromkeys(text if text.endswith(tail) else text + tail for text in texts))


def _parse_tail(text: str, parts: list[str]) -> PeerId:
    if parts[0] != "p2p":
        raise _malformed(text, f"goes on with {parts[0]!r}")
    return parse_peer_id(parts[1])


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
