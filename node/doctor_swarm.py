"""What `shoal doctor` sees of the swarm: peers that answer, their clocks and versions, the DHT, the rates to a member.

It is a visitor: a short-lived control host of its own, which announces nothing and answers no question. What it learns
stands in a SwarmView at once, so that whatever a time limit cuts off costs only what was not seen yet.

Invariants: every dial, question and measurement has a limit; at most RATE_BYTES_MAX bytes are moved in each direction;
nothing that others do or fail to do raises.
"""

import asyncio
import contextlib
import ipaddress
import os
import socket
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from blake3 import blake3

from shoal.dht.addresses import parse_peer_address
from shoal.dht.keys import lookup_keys
from shoal.node.control import (
    ControlConfig,
    ControlHandlers,
    ControlPlane,
    ControlStopped,
    PeerUnreachable,
    RequestRefused,
)
from shoal.node.doctor_network import BandwidthSeen, DhtSeen, PeerAnswer
from shoal.node.endpoints import is_loopback, parse_endpoint_untrusted, parse_endpoints_untrusted, parse_ip
from shoal.node.link_port import Address, FetchFailed, LinkConfig, LinkEnd, LinkLost
from shoal.node.links import TensorLinks
from shoal.node.upload_meter import PAUSE_S as UPLOAD_PAUSE_S
from shoal.node.upload_meter import TIMEOUT_S as UPLOAD_TIMEOUT_S
from shoal.protocol.errors import ProtocolError, Refusal, UriError
from shoal.protocol.frames import FrameHeader
from shoal.protocol.identity import Identity, PeerId, short_peer_id
from shoal.protocol.manifest import Manifest, read_manifest_untrusted
from shoal.protocol.messages import (
    UPLOAD_BYTES_MAX,
    CertificatesAnswer,
    GetCertificates,
    GetManifest,
    GetObserved,
    GetPeers,
    GetSnapshot,
    ManifestAnswer,
    MeasureUpload,
    ObservedAnswer,
    PeersAnswer,
    Presence,
    SnapshotAnswer,
    UploadAnswer,
    decode_message_untrusted,
    encode_message,
)
from shoal.protocol.state import decode_index_untrusted

DIAL_TIMEOUT_S = 3.0
ASK_TIMEOUT_S = 3.0
RATE_TIMEOUT_S = 3.0
RATE_BYTES_MAX = 4 << 20
FETCHES_AT_ONCE = 4
DIALS_MAX = 24
OBSERVERS_MAX = 4
MEMBERS_ASKED_MAX = 4  # until one lets itself be measured with
CUT_OFF = "the time was over"


@dataclass(slots=True, kw_only=True)
class SwarmView:
    """What was seen so far."""

    bootstraps: dict[str, PeerAnswer] = field(default_factory=dict)
    known: dict[str, PeerAnswer] = field(default_factory=dict)
    dials: list[tuple[str, str]] = field(default_factory=list)  # an IP address, and why it did not answer
    presences: dict[PeerId, Presence] = field(default_factory=dict)
    ahead_s: dict[PeerId, float] = field(default_factory=dict)
    refusing: list[str] = field(default_factory=list)  # they speak another protocol version
    dht: DhtSeen | None = None
    manifest: Manifest | None = None
    up_bytes_per_s: float | None = None
    down_bytes_per_s: float | None = None
    up_fault: str = ""
    down_fault: str = ""
    measured_with: str = ""
    rates_tried: bool = False
    relays: int = 0  # peers that give places at theirs
    observers: int = 0  # of one port of this machine
    observed: set[Address] = field(default_factory=set)
    port: int = 0

    @property
    def bandwidth(self) -> BandwidthSeen | None:
        """None before a member was found to measure with."""
        if not self.measured_with:
            return None
        return BandwidthSeen(
            up_bytes_per_s=self.up_bytes_per_s,
            down_bytes_per_s=self.down_bytes_per_s,
            up_fault=self.up_fault,
            down_fault=self.down_fault,
            source=f"measured with {self.measured_with}",
        )


class SwarmVisit:
    """One visit to a swarm over a control plane that is started already."""

    def __init__(self, identity: Identity, swarm: bytes, control: ControlPlane, view: SwarmView) -> None:
        self._identity = identity
        self._swarm = swarm
        self._control = control
        self._view = view

    async def look(self, bootstraps: Sequence[str], known: Sequence[tuple[PeerId, tuple[str, ...]]]) -> None:
        """Everything, into the view. Cancel it when the time is over."""
        named = _group(bootstraps)
        met = [peer for peer, _ in named]
        calls: list[Coroutine[None, None, None]] = [
            self._call(self._view.bootstraps, peer, texts) for peer, texts in named
        ]
        calls += [self._call(self._view.known, peer, texts) for peer, texts in known if peer not in met]
        hosts = [address for _, texts in (*named, *known) for address in texts]
        await asyncio.gather(*calls, self._dial_hosts(hosts))
        await self._fetch_manifest()
        self._count_relays()
        # One set of links: members serve and ask whichever link of a peer is open.
        async with open_links(self._identity, self._swarm, "0.0.0.0") as (links, offer, port):
            self._view.port = port
            # What is moved is small beside the time limit, and a look-up at peers that are gone takes long.
            await asyncio.gather(self._look_up(), self._observe(links), self._measure_rates(links, offer))
            self._count_relays()

    def _count_relays(self) -> None:
        self._view.relays = sum(one.relays for one in self._control.peers())

    async def _call(self, into: dict[str, PeerAnswer], peer: PeerId, addresses: tuple[str, ...]) -> None:
        """Connect to one peer and ask whom it knows."""
        name = addresses[0] if addresses else short_peer_id(peer)
        # Stands until there is an answer: a time limit must not make a peer disappear from the table.
        into[name] = PeerAnswer(address=name, reached=False, fault="no answer in time")
        began_s = time.monotonic()
        try:
            await self._control.connect(addresses)
        except (PeerUnreachable, UriError, ControlStopped) as error:
            fault = error.detail if isinstance(error, PeerUnreachable) else str(error)
            into[name] = PeerAnswer(address=name, reached=False, fault=fault)
            return
        took_s = time.monotonic() - began_s
        refusal = await self._meet(peer)
        into[name] = PeerAnswer(address=name, reached=True, took_s=took_s, refusal=refusal)

    async def _meet(self, peer: PeerId) -> Refusal | None:
        """Its presence and those that it knows; why it refuses to say, where it does."""
        asked_s = time.time()
        try:
            answer = await self._ask(peer, GetPeers())
        except RequestRefused as error:
            if error.refusal is Refusal.WRONG_VERSION:
                self._view.refusing.append(short_peer_id(peer))
            return error.refusal
        except ProtocolError as error:
            return error.refusal
        except (PeerUnreachable, ControlStopped):
            return Refusal.EXPIRED
        if isinstance(answer, PeersAnswer):
            for presence in answer.presences:
                self._view.presences.setdefault(presence.peer, presence)
                if presence.peer == peer:
                    # Described when the question came: half a round trip ago.
                    self._view.ahead_s[peer] = presence.sent_at_s - (asked_s + time.time()) / 2
        return None

    async def _ask(self, peer: PeerId, question: object, timeout_s: float = ASK_TIMEOUT_S) -> object:
        raw = await self._control.request(peer, encode_message(self._swarm, question), timeout_s)
        return decode_message_untrusted(self._swarm, raw)

    async def _ask_quietly(self, peer: PeerId, question: object) -> object | None:
        with contextlib.suppress(PeerUnreachable, RequestRefused, ProtocolError, ControlStopped):
            return await self._ask(peer, question)
        return None

    # -- address families ----------------------------------------------------------------------------------------------

    async def _dial_hosts(self, addresses: Sequence[str]) -> None:
        targets: dict[tuple[str, int], None] = {}
        for text in addresses:
            _, address = parse_peer_address(text)
            if address.net in ("ip4", "ip6"):
                targets[address.host, address.port] = None
                continue
            for host in await _resolve(address.host, address.port):
                targets[host, address.port] = None
        await asyncio.gather(*(self._dial(host, port) for host, port in list(targets)[:DIALS_MAX]))

    async def _dial(self, host: str, port: int) -> None:
        fault = ""
        try:
            async with asyncio.timeout(DIAL_TIMEOUT_S):
                _, writer = await asyncio.open_connection(host, port)
            writer.close()
        except TimeoutError:
            fault = f"no answer within {DIAL_TIMEOUT_S:.0f} s"
        except OSError as error:
            fault = error.strerror or str(error)
        self._view.dials.append((str(ipaddress.ip_address(host.partition("%")[0])), fault))

    # -- discovery -----------------------------------------------------------------------------------------------------

    async def _look_up(self) -> None:
        if not self._control.peers():
            return
        began_s = time.monotonic()
        found: set[PeerId] = set()
        for key in lookup_keys(self._swarm, time.time())[:2]:
            with contextlib.suppress(ControlStopped):
                found |= {one.peer for one in await self._control.find_providers(key)}
        self._view.dht = DhtSeen(providers=len(found), took_s=time.monotonic() - began_s)

    async def _fetch_manifest(self) -> None:
        for peer in list(self._view.ahead_s):
            if self._view.manifest is not None:
                return
            answer = await self._ask_quietly(peer, GetManifest())
            if isinstance(answer, ManifestAnswer):
                with contextlib.suppress(ProtocolError):
                    self._view.manifest, _ = read_manifest_untrusted(answer.signed_manifest, self._swarm)

    # -- the router ----------------------------------------------------------------------------------------------------

    async def _observe(self, links: TensorLinks) -> None:
        """By which address members see one port of this machine that dials them all."""
        members = [one for one in self._view.presences.values() if one.peer != self._identity.peer]
        await asyncio.gather(*(self._observe_by(links, one) for one in members[:OBSERVERS_MAX]))

    async def _observe_by(self, links: TensorLinks, presence: Presence) -> None:
        for endpoint in parse_endpoints_untrusted(presence.tensor_addresses):
            if ":" in endpoint[0] or is_loopback(endpoint[0]) or parse_ip(endpoint[0]) is None:
                continue
            with contextlib.suppress(LinkLost, TimeoutError):
                async with asyncio.timeout(DIAL_TIMEOUT_S):
                    binding = await links.dial_from_port(presence.peer, endpoint)
                answer = await self._ask_quietly(presence.peer, GetObserved(binding=binding))
                seen = parse_endpoint_untrusted(answer.address) if isinstance(answer, ObservedAnswer) else None
                if seen is not None:
                    self._view.observers += 1
                    self._view.observed.add(seen)
                return

    # -- rates ---------------------------------------------------------------------------------------------------------

    async def _measure_rates(self, links: TensorLinks, offer: memoryview) -> None:
        """With the first member that lets itself be dialled."""
        view = self._view
        # Who was asked itself before who was only heard of: it is there now.
        members = sorted(view.presences.values(), key=lambda one: one.peer not in view.ahead_s)
        for presence in members[:MEMBERS_ASKED_MAX]:
            view.rates_tried = True
            if not await _open_link(links, presence):
                continue
            view.measured_with = short_peer_id(presence.peer)
            view.up_fault = view.down_fault = CUT_OFF  # stands until there is an answer
            view.down_fault = await self._measure_down(links, presence)
            view.up_fault = await self._measure_up(presence.peer, offer)
            if not view.up_fault or not view.down_fault:
                return

    async def _measure_up(self, peer: PeerId, offer: memoryview, *, is_second: bool = False) -> str:
        """Let the member fetch the offer; why there is no rate, where there is none."""
        question = MeasureUpload(digest=blake3(offer).digest(), nbytes=len(offer))
        try:
            answer = await self._ask(peer, question, UPLOAD_TIMEOUT_S + ASK_TIMEOUT_S)
        except RequestRefused as error:
            if error.refusal is Refusal.LIMIT and not is_second:
                # The member has just measured for somebody else, or for an earlier look around of this machine.
                self._view.up_fault = f"refused: {error.refusal}"
                await asyncio.sleep(UPLOAD_PAUSE_S)
                return await self._measure_up(peer, offer, is_second=True)
            return f"refused: {error.refusal}"
        except (PeerUnreachable, ProtocolError, ControlStopped) as error:
            return str(error)
        if not isinstance(answer, UploadAnswer) or answer.seconds <= 0:
            return "the answer makes no sense"
        self._view.up_bytes_per_s = len(offer) / answer.seconds
        return ""

    async def _measure_down(self, links: TensorLinks, presence: Presence) -> str:
        """Fetch what the member holds for everybody: chunks of its snapshot, or the parts of the newest update. Why
        there is no rate, where there is none."""
        pieces = await self._list_chunks(presence) or await self._list_parts(presence)
        chosen, total = [], 0
        for digest, nbytes in pieces:
            if total + nbytes > RATE_BYTES_MAX:
                break
            chosen.append((digest, nbytes))
            total += nbytes
        places = asyncio.Semaphore(FETCHES_AT_ONCE)
        arrived_bytes = 0
        began_s = last_s = time.monotonic()

        async def fetch(digest: bytes, nbytes: int) -> None:
            nonlocal arrived_bytes, last_s
            async with places:
                left_s = began_s + RATE_TIMEOUT_S - time.monotonic()
                with contextlib.suppress(LinkLost, FetchFailed):
                    await links.fetch(presence.peer, (), digest, memoryview(bytearray(nbytes)), max(0.0, left_s))
                    arrived_bytes += nbytes
                    last_s = time.monotonic()

        await asyncio.gather(*(fetch(digest, nbytes) for digest, nbytes in chosen))
        if not chosen:
            return "nothing to fetch yet"
        if not arrived_bytes:
            return f"nothing came within {RATE_TIMEOUT_S:.0f} s"
        self._view.down_bytes_per_s = arrived_bytes / max(last_s - began_s, 1e-6)
        return ""

    async def _list_chunks(self, presence: Presence) -> list[tuple[bytes, int]]:
        if not presence.snapshots:
            return []
        answer = await self._ask_quietly(presence.peer, GetSnapshot(round_max=presence.head_round))
        if not isinstance(answer, SnapshotAnswer) or not answer.index:
            return []
        with contextlib.suppress(ProtocolError):
            index = decode_index_untrusted(answer.index)
            spans = [(index.digest(number), index.span(number)) for number in range(min(index.chunks, 64))]
            return [(digest, span.stop - span.start) for digest, span in dict(spans).items()]
        return []

    async def _list_parts(self, presence: Presence) -> list[tuple[bytes, int]]:
        manifest = self._view.manifest
        if manifest is None or presence.head_round < 1:
            return []
        question = GetCertificates(first_round=presence.head_round, count=1)
        answer = await self._ask_quietly(presence.peer, question)
        if not isinstance(answer, CertificatesAnswer) or not answer.certificates:
            return []
        result = answer.certificates[0].result
        if len(result.parts) != len(manifest.list_parts(result.round)):
            return []
        return [(one.digest, manifest.update_bytes(part)) for part, one in manifest.match_parts(result)]


class _VisitorSink:
    """Takes nothing, and serves the one blob that it offers for the upload's measurement."""

    def __init__(self, offer: memoryview) -> None:
        self._offer = offer
        self._digest = blake3(offer).digest()

    def admit(self, peer: PeerId) -> Refusal | None:
        return None

    def reserve(self, peer: PeerId, header: FrameHeader) -> memoryview | Refusal:
        return Refusal.NOT_READY

    async def complete(self, peer: PeerId, header: FrameHeader, buffer: memoryview) -> None:
        """Nothing was reserved."""

    def aborted(self, peer: PeerId, header: FrameHeader) -> None:
        """Nothing was reserved."""

    def refused(self, peer: PeerId, header: FrameHeader) -> None:
        """Nothing was pushed."""

    async def serve(self, peer: PeerId, digest: bytes) -> memoryview | Refusal | None:
        return self._offer if digest == self._digest else None

    def link_up(self, peer: PeerId) -> None:
        """Of no interest."""

    def link_lost(self, peer: PeerId, reason: LinkEnd) -> None:
        """The caller's fetch fails, too."""

    def on_refusal(self, peer: PeerId | None, refusal: Refusal) -> None:
        """A visitor keeps no accounts."""


@asynccontextmanager
async def open_links(identity: Identity, swarm: bytes, host: str) -> AsyncIterator[tuple[TensorLinks, memoryview, int]]:
    """Tensor links to dial with, what they offer, and their port."""
    offer = memoryview(os.urandom(UPLOAD_BYTES_MAX // 2))
    links = TensorLinks(identity, swarm, LinkConfig(host=host, goodbye_timeout_s=0.2), _VisitorSink(offer))
    _, port = await links.start()
    try:
        yield links, offer, port
    finally:
        await links.stop()


async def _open_link(links: TensorLinks, presence: Presence) -> bool:
    with contextlib.suppress(LinkLost, TimeoutError):
        async with asyncio.timeout(DIAL_TIMEOUT_S):
            for endpoint in parse_endpoints_untrusted(presence.tensor_addresses):
                if await links.probe(presence.peer, endpoint):
                    return True
    return False


def _group(addresses: Sequence[str]) -> list[tuple[PeerId, tuple[str, ...]]]:
    """Addresses by the peer that must answer there."""
    found: dict[PeerId, tuple[str, ...]] = {}
    for text in addresses:
        peer, _ = parse_peer_address(text)
        found[peer] = (*found.get(peer, ()), text)
    return list(found.items())


async def _resolve(host: str, port: int) -> list[str]:
    loop = asyncio.get_running_loop()
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(DIAL_TIMEOUT_S):
            found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            return list(dict.fromkeys(str(endpoint[0]) for *_, endpoint in found))
    return []


def visitor_config(identity: Identity, swarm: bytes) -> ControlConfig:
    """A host that others cannot dial and that keeps nothing for them."""
    listen = ("/ip4/127.0.0.1/tcp/0",)
    return ControlConfig(identity=identity, swarm=swarm, listen=listen, serves_dht=False, relay=None, relays_wanted=0)


def visitor_handlers() -> ControlHandlers:
    """It listens to nobody."""

    async def refuse(peer: PeerId, question: bytes) -> bytes:
        raise ProtocolError(Refusal.NOT_READY, "a visitor answers nothing")

    return ControlHandlers(
        on_message=lambda peer, payload: None,
        on_request=refuse,
        on_presence=lambda peer, payload: None,
        on_peer_connected=lambda peer: None,
        on_peer_lost=lambda peer: None,
    )
