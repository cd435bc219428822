"""Finds peers of the same swarm on the LAN, and is found: libp2p's mDNS discovery, over the zeroconf library.

After libp2p's mdns specification: a service of `_p2p._udp.local` under a random name, whose TXT record has a `dnsaddr=`
for each address. Other libp2p programs see a shoal so. One more text, `shoal=`, is a digest of the swarm, and who shows
another one or none is not dialled.

Invariants: what is found is a hint that proves nothing (the handshake does); at most PEERS_MAX peers are remembered,
each told to the daemon again after TELL_AGAIN_S at the earliest; a LAN without multicast costs one line in the log
and nothing else; on exit at most CLOSE_TIMEOUT_S are spent.
"""

import asyncio
import contextlib
import logging
import random
import string
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from blake3 import blake3
from zeroconf import BadTypeInNameException, IPVersion, ServiceStateChange, Zeroconf
from zeroconf import Error as ZeroconfError
from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf

from shoal.dht.addresses import ADDRESSES_PER_PEER_MAX, parse_peer_address
from shoal.node.interfaces import InterfaceWatch
from shoal.protocol.errors import Failure, ProtocolError, Refusal, UriError
from shoal.protocol.identity import PeerId

SERVICE = "_p2p._udp.local."
NAME_CHARS = 40
TXT_BYTES_MAX = 8192
TEXTS_MAX = 32
PEERS_MAX = 128
TELL_AGAIN_S = 30.0
LOOKUPS_AT_ONCE_MAX = 8
LOOKUP_TIMEOUT_S = 3.0
RETRY_S = 300.0
CLOSE_TIMEOUT_S = 2.0

_ADDRESS_KEY = b"dnsaddr="
_SWARM_KEY = b"shoal="
_FAILURES = (OSError, ZeroconfError, asyncio.TimeoutError)

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Who says to be on the LAN, and where; nothing of it is proven."""

    peer: PeerId
    addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class MdnsPorts:
    """`addresses` are those of this peer on the LAN, with its peer id; `failed` is told once, until it works again."""

    addresses: Callable[[], tuple[str, ...]]
    found: Callable[[Found], None]
    failed: Callable[[Failure, str], None]


def tag_swarm(swarm: bytes) -> bytes:
    """What peers of one swarm know each other by; it does not tell the swarm's id."""
    return blake3(b"shoal mdns" + swarm).hexdigest()[:16].encode()


def encode_txt(addresses: Iterable[str], tag: bytes) -> bytes:
    """The TXT record: texts with a byte of length each."""
    texts = [_SWARM_KEY + tag, *(_ADDRESS_KEY + one.encode() for one in addresses)]
    return b"".join(bytes((len(text),)) + text for text in texts[:TEXTS_MAX] if len(text) <= 255)


def decode_txt_untrusted(raw: bytes, tag: bytes) -> Found | None:
    """Who is announced; None for a program that is no peer of this swarm. Raises ProtocolError."""
    if len(raw) > TXT_BYTES_MAX:
        raise ProtocolError(Refusal.OVERSIZED, f"a TXT record of {len(raw)} bytes")
    texts: list[bytes] = []
    at = 0
    while at < len(raw):
        text = raw[at + 1 : at + 1 + raw[at]]
        if len(text) != raw[at] or len(texts) == TEXTS_MAX:
            raise ProtocolError(Refusal.MALFORMED, "no list of texts, or too long a one")
        texts.append(text)
        at += 1 + raw[at]
    if _SWARM_KEY + tag not in texts:
        return None
    found: dict[PeerId, dict[str, None]] = {}
    for text in texts:
        if text.startswith(_ADDRESS_KEY):
            with contextlib.suppress(UriError, UnicodeDecodeError):  # a transport that is not spoken here
                peer, address = parse_peer_address(text[len(_ADDRESS_KEY) :].decode("ascii"))
                found.setdefault(peer, {})[str(address)] = None
    if len(found) != 1:
        raise ProtocolError(Refusal.MALFORMED, f"addresses of {len(found)} peers, not of one")
    ((peer, addresses),) = found.items()
    return Found(peer=peer, addresses=tuple(addresses)[:ADDRESSES_PER_PEER_MAX])


class FoundPeers:
    """Remembers who was found and told when; the oldest goes first."""

    def __init__(self) -> None:
        self._told_s: dict[PeerId, tuple[float, Found]] = {}

    def is_news(self, found: Found, now_s: float) -> bool:
        """Whether the daemon is told: another address, or some time has passed."""
        known = self._told_s.pop(found.peer, None)
        news = known is None or known[1] != found or now_s - known[0] >= TELL_AGAIN_S
        self._told_s[found.peer] = (now_s, found) if news or known is None else known
        if len(self._told_s) > PEERS_MAX:
            del self._told_s[next(iter(self._told_s))]
        return news

    def __len__(self) -> int:
        return len(self._told_s)


class Mdns:
    """All calls on the event loop. `run` it in a task and cancel that: it says goodbye to the LAN."""

    def __init__(self, me: PeerId, swarm: bytes, watch: InterfaceWatch, ports: MdnsPorts) -> None:
        self.found = FoundPeers()
        self._me = me
        self._tag = tag_swarm(swarm)
        self._watch = watch
        self._ports = ports
        self._moved = asyncio.Event()
        self._failed = False
        self._lookups: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Announce and listen on every network that the machine is in, until cancelled."""
        # It warns, with a traceback, of a socket whose address has gone; the watch has told that already.
        logging.getLogger("zeroconf").setLevel(logging.CRITICAL)
        end = self._watch.subscribe(lambda _: self._moved.set())
        try:
            while True:
                self._moved.clear()
                try:
                    await self._serve()
                except _FAILURES as error:
                    self._tell(error)
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(RETRY_S):
                            await self._moved.wait()
        finally:
            end()

    async def _serve(self) -> None:
        """Until the machine's addresses change."""
        hosts = [host for host in self._watch.now.hosts() if ":" not in host]
        if not hosts:
            await self._moved.wait()
            return
        zero = AsyncZeroconf(interfaces=hosts, ip_version=IPVersion.V4Only)
        try:
            # Only watched for: who has no name of its own yet is not answered.
            browser = AsyncServiceBrowser(zero.zeroconf, SERVICE, handlers=[self._hear])
            # The name is random, so nobody needs to be asked whether it is taken.
            await zero.async_register_service(self._describe(), cooperating_responders=True)
            self._failed = False
            await self._moved.wait()
            await browser.async_cancel()
        finally:
            await self._close(zero)

    def _describe(self) -> AsyncServiceInfo:
        addresses = self._ports.addresses()
        name = "".join(random.choices(string.ascii_lowercase + string.digits, k=NAME_CHARS))
        port = parse_peer_address(addresses[0])[1].port if addresses else 0
        return AsyncServiceInfo(
            SERVICE,
            f"{name}.{SERVICE}",
            port=port,
            properties=encode_txt(addresses, self._tag),
            server=f"{name}.local.",
            parsed_addresses=[host for host in self._watch.now.hosts() if ":" not in host],
        )

    async def _close(self, zero: AsyncZeroconf) -> None:
        for task in list(self._lookups):
            task.cancel()
        with contextlib.suppress(*_FAILURES):
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await zero.async_close()

    def _tell(self, error: BaseException) -> None:
        """Once, until it works again."""
        if not self._failed:
            self._failed = True
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            self._ports.failed(Failure.MULTICAST_UNAVAILABLE, reason)

    # -- what is heard -----------------------------------------------------------------------------------------------

    def _hear(self, zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange) -> None:
        if state_change is ServiceStateChange.Removed or len(self._lookups) >= LOOKUPS_AT_ONCE_MAX:
            return  # it comes again with the next announcement
        task = asyncio.get_running_loop().create_task(self._look_up(zeroconf, name))
        self._lookups.add(task)
        task.add_done_callback(self._lookups.discard)

    async def _look_up(self, zeroconf: Zeroconf, name: str) -> None:
        try:
            info = AsyncServiceInfo(SERVICE, name)
            info.load_from_cache(zeroconf)
            if not info.text:
                # Its word for "complete" asks for more than the specification has: the TXT record is all.
                await info.async_request(zeroconf, LOOKUP_TIMEOUT_S * 1000)
            self.take(info.text or b"")
        except (*_FAILURES, BadTypeInNameException) as error:
            log.debug("%s was not looked up: %s", name, error)

    def take(self, raw: bytes) -> None:
        """A TXT record from the LAN."""
        try:
            found = decode_txt_untrusted(raw, self._tag)
        except ProtocolError as error:
            log.debug("an announcement on the LAN is passed over: %s", error)
            return
        if found is None or found.peer == self._me:
            return
        if self.found.is_news(found, asyncio.get_running_loop().time()):
            self._ports.found(found)
