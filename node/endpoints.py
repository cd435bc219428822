"""Where a tensor port can be dialled: the text that presences carry, as a value; and what an address is good for.

    192.0.2.7:9461    [2001:db8::7]:9461    peer.example.org:9461

Invariant: what parses formats back to the same text; no wildcard, multicast or scoped address parses.
"""

import ipaddress
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import zip_longest
from typing import TypeVar

from shoal.node.link_port import Address

T = TypeVar("T")

_HOST_NAME = re.compile(r"(?=.{1,253}$)[A-Za-z0-9_][A-Za-z0-9_-]{0,62}(?:\.[A-Za-z0-9_][A-Za-z0-9_-]{0,62})*")
ENDPOINT_CHARS_MAX = 260  # a name's 253, and a port
ENDPOINTS_KEPT = 4096  # they are asked for with every part that is sent
_PORT = re.compile(r"[1-9][0-9]{0,4}")


def format_endpoint(address: Address) -> str:
    """The text of an address."""
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def parse_endpoint_untrusted(text: str) -> Address | None:
    """Inverse of `format_endpoint`; None for a text that is nothing to dial."""
    return _parse(text) if len(text) <= ENDPOINT_CHARS_MAX else None


@lru_cache(maxsize=ENDPOINTS_KEPT)
def _parse(text: str) -> Address | None:
    host, _, port = text.rpartition(":")
    if not _PORT.fullmatch(port) or int(port) > 65_535:
        return None
    bracketed = host.startswith("[") and host.endswith("]")
    host = host[1:-1] if bracketed else host
    ip = parse_ip(host)
    if ip is None:
        # Numbers and dots alone are a mistyped IP address, which resolvers read in surprising ways.
        named = not bracketed and _HOST_NAME.fullmatch(host) and not host.replace(".", "").isdigit()
        return (host, int(port)) if named else None
    if bracketed != (ip.version == 6) or str(ip) != host or ip.is_unspecified or ip.is_multicast:
        return None
    if isinstance(ip, ipaddress.IPv6Address) and (ip.scope_id is not None or ip.ipv4_mapped is not None):
        return None
    return host, int(port)


def parse_endpoints_untrusted(texts: Iterable[str]) -> tuple[Address, ...]:
    """The addresses among `texts`, each once."""
    found = (parse_endpoint_untrusted(text) for text in texts)
    return tuple(dict.fromkeys(one for one in found if one is not None))


def parse_ip(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The IP address that `host` is; None for a name."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def is_wildcard(host: str) -> bool:
    """Whether listening there means listening on every address of the machine."""
    ip = parse_ip(host)
    return ip is not None and ip.is_unspecified


def is_loopback(host: str) -> bool:
    """Whether only this machine can dial it."""
    ip = parse_ip(host)
    return host == "localhost" if ip is None else ip.is_loopback


def is_public(host: str) -> bool:
    """Whether it means the same machine everywhere; a name is taken to."""
    ip = parse_ip(host)
    return host != "localhost" if ip is None else ip.is_global


def interleave(addresses: Iterable[Address]) -> list[Address]:
    """IPv6 and the rest in turn, IPv6 first, each kind in the order given (RFC 8305, section 4)."""
    given = list(dict.fromkeys(addresses))
    six = [one for one in given if ":" in one[0]]
    rest = [one for one in given if ":" not in one[0]]
    return take_turns(six, rest)


def take_turns(first: Sequence[T], second: Sequence[T]) -> list[T]:
    """One of each in turn, then what is left of the longer one."""
    return [one for pair in zip_longest(first, second) for one in pair if one is not None]
