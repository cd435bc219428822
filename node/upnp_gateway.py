"""A router that is asked by UPnP: it is searched on the LAN by SSDP, and then spoken to as an Internet Gateway Device.

The library reads descriptions and makes calls; what it is given to read is bounded here. Invariants: whoever answers
the search is asked at its own address alone, over plain HTTP without redirects; a search and a request end within
SEARCH_S and REQUEST_TIMEOUT_S; one router costs at most REQUESTS_MAX requests of BODY_BYTES_MAX to be understood.
"""

import asyncio
import contextlib
import ipaddress
import socket
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from async_upnp_client.client import UpnpRequester, UpnpService
from async_upnp_client.client_factory import UpnpFactory
from async_upnp_client.const import HttpRequest, HttpResponse
from async_upnp_client.exceptions import UpnpActionError, UpnpConnectionError, UpnpContentError, UpnpError

from shoal.node.port_mapping import LEASE_S, NO_ADDRESS, GatewayFailed, Lease, Way, list_ports
from shoal.protocol.errors import Failure

SEARCH_TARGET = ("239.255.255.250", 1900)
SEARCH_TYPES = (
    "urn:schemas-upnp-org:device:InternetGatewayDevice:1",
    "urn:schemas-upnp-org:device:InternetGatewayDevice:2",
)
SEARCH_S = 3.0
SEARCH_AGAIN_S = 1.0  # datagrams get lost
SEARCH_REST_S = 0.5  # once one has answered, others get so long
SEARCH_HOPS = 2
ANSWERS_MAX = 8
ANSWER_BYTES_MAX = 4096
LOCATION_CHARS_MAX = 512
REQUEST_TIMEOUT_S = 5.0
REQUESTS_MAX = 32
BODY_BYTES_MAX = 256 * 1024
DESCRIPTION = "shoal"

# From WANIPConnection:2, section 2.5.
_NO_SUCH_ENTRY = 714
_CONFLICT = 718
_SAME_PORTS_REQUIRED = 724
_ONLY_PERMANENT = 725
_CONFLICTS = (_CONFLICT, _SAME_PORTS_REQUIRED)
_SERVICE_TYPES = (
    "urn:schemas-upnp-org:service:WANIPConnection:1",
    "urn:schemas-upnp-org:service:WANIPConnection:2",
    "urn:schemas-upnp-org:service:WANPPPConnection:1",
)
# What the library raises over a description or an answer that it was not written for.
_UNREADABLE = (UpnpError, LookupError, ValueError, TypeError, AttributeError, SyntaxError, RecursionError)


class UpnpGateway:
    """A port_mapping.Gateway. Made by `search_upnp`."""

    way = Way.UPNP

    def __init__(self, host: str, service: UpnpService, own_ip: str, choose: Callable[[range], int]) -> None:
        self.host = host
        self._service = service
        self._own_ip = own_ip
        self._choose = choose
        self._lease_s = LEASE_S

    async def external_ip(self) -> str:
        """As Gateway."""
        answer = await self._call("GetExternalIPAddress")
        return str(answer.get("NewExternalIPAddress") or "0.0.0.0")

    async def add(self, internal_port: int, external_port: int) -> Lease:
        """As Gateway."""
        taken = ""
        for port in list_ports(external_port, self._choose):
            try:
                return await self._add(internal_port, port)
            except UpnpActionError as error:
                if error.error_code not in _CONFLICTS:
                    raise _refused(self.host, "AddPortMapping", error) from error
                taken += f" {port}"
        raise GatewayFailed(Failure.PORT_TAKEN, f"{self.host} maps these ports to others:{taken}")

    async def _add(self, internal_port: int, external_port: int) -> Lease:
        try:
            await self._call_add(internal_port, external_port)
        except UpnpActionError as error:
            if error.error_code != _ONLY_PERMANENT or not self._lease_s:
                raise
            self._lease_s = 0
            await self._call_add(internal_port, external_port)
        return Lease(external_port=external_port, lease_s=self._lease_s)

    async def _call_add(self, internal_port: int, external_port: int) -> None:
        await self._call_raw(
            "AddPortMapping",
            NewRemoteHost="",
            NewExternalPort=external_port,
            NewProtocol="TCP",
            NewInternalPort=internal_port,
            NewInternalClient=self._own_ip,
            NewEnabled=True,
            NewPortMappingDescription=DESCRIPTION,
            NewLeaseDuration=self._lease_s,
        )

    async def holds(self, internal_port: int, external_port: int) -> bool:
        """As Gateway; a router that cannot be asked is taken to hold it."""
        name = "GetSpecificPortMappingEntry"
        if not self._service.has_action(name):
            return True
        try:
            entry = await self._call_raw(name, NewRemoteHost="", NewExternalPort=external_port, NewProtocol="TCP")
        except UpnpActionError as error:
            if error.error_code == _NO_SUCH_ENTRY:
                return False
            raise _refused(self.host, name, error) from error
        return entry.get("NewInternalClient") == self._own_ip and entry.get("NewInternalPort") == internal_port

    async def remove(self, internal_port: int, external_port: int) -> None:
        """As Gateway."""
        await self._call("DeletePortMapping", NewRemoteHost="", NewExternalPort=external_port, NewProtocol="TCP")

    async def close(self) -> None:
        """As Gateway; no connection is kept."""

    async def _call(self, name: str, **arguments: str | int | bool) -> Mapping[str, Any]:
        try:
            return await self._call_raw(name, **arguments)
        except UpnpActionError as error:
            raise _refused(self.host, name, error) from error

    async def _call_raw(self, name: str, **arguments: Any) -> Mapping[str, Any]:
        """One action. Raises UpnpActionError for the router's own no, GatewayFailed for everything else."""
        try:
            return await self._service.action(name).async_call(**arguments)
        except UpnpActionError:
            raise
        except UpnpConnectionError as error:
            raise GatewayFailed(Failure.GATEWAY_SILENT, f"{self.host} does not answer {name} by UPnP") from error
        except _UNREADABLE as error:
            raise GatewayFailed(Failure.GATEWAY_MALFORMED, f"{self.host}, {name}: {_short(error)}") from error


def _refused(host: str, name: str, error: UpnpActionError) -> GatewayFailed:
    told = (error.error_desc or "no reason given")[:64]
    return GatewayFailed(Failure.GATEWAY_REFUSED, f"{host} refuses {name} by UPnP: {error.error_code} {told}")


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error)[:128]}"


class _BoundedRequester(UpnpRequester):
    """The library's HTTP: to one host, so many requests and bytes, no proxy, no redirect."""

    def __init__(self, host: str) -> None:
        self._host = host
        self.requests_left: int | None = REQUESTS_MAX

    async def async_http_request(self, http_request: HttpRequest) -> HttpResponse:
        url = urlsplit(http_request.url)
        if url.scheme != "http" or url.hostname != self._host:
            raise UpnpContentError(message=f"it refers to {http_request.url[:128]!r}")
        if self.requests_left is not None:
            if self.requests_left == 0:
                raise UpnpContentError(message=f"it takes more than {REQUESTS_MAX} requests to be understood")
            self.requests_left -= 1
        timeout = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S)
        try:
            async with (
                aiohttp.ClientSession(timeout=timeout, trust_env=False) as session,
                session.request(
                    http_request.method,
                    http_request.url,
                    headers=http_request.headers,
                    data=http_request.body,
                    allow_redirects=False,
                ) as response,
            ):
                body = await _read_body(response.content)
                return HttpResponse(response.status, response.headers, body.decode("utf-8", "replace"))
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise UpnpConnectionError(message=_short(error)) from error


async def _read_body(stream: aiohttp.StreamReader) -> bytes:
    body = bytearray()
    while chunk := await stream.read(65_536):
        body += chunk
        if len(body) > BODY_BYTES_MAX:
            raise UpnpContentError(message=f"an answer of more than {BODY_BYTES_MAX} bytes")
    return bytes(body)


class _Search(asyncio.DatagramProtocol):
    """Collects who answers; `answered` is set with the first one."""

    def __init__(self) -> None:
        self.locations: dict[str, str] = {}  # by host
        self.answered = asyncio.Event()

    def datagram_received(self, data: bytes, addr: tuple[str | object, int]) -> None:
        location = read_location_untrusted(data, str(addr[0]))
        if location is not None and len(self.locations) < ANSWERS_MAX:
            self.locations.setdefault(str(addr[0]), location)
            self.answered.set()


def read_location_untrusted(datagram: bytes, sender: str) -> str | None:
    """Where the description is, in an answer to the search; None for what is no such answer or leads elsewhere."""
    if len(datagram) > ANSWER_BYTES_MAX or not datagram.startswith(b"HTTP/1.1 200"):
        return None
    for line in datagram.split(b"\n"):
        name, _, value = line.partition(b":")
        if name.strip().lower() != b"location":
            continue
        try:
            location = value.strip().decode("ascii")
            url = urlsplit(location)
            fits = url.scheme == "http" and url.hostname == sender and url.port != 0
        except ValueError:
            return None
        return location if fits and len(location) <= LOCATION_CHARS_MAX else None
    return None


def encode_search(device: str) -> bytes:
    """The datagram that asks devices of this kind to answer."""
    host, port = SEARCH_TARGET
    head = f'M-SEARCH * HTTP/1.1\r\nHOST: {host}:{port}\r\nMAN: "ssdp:discover"\r\n'
    return f"{head}MX: 1\r\nST: {device}\r\n\r\n".encode()


async def search_upnp(
    source: str, choose: Callable[[range], int], prefer: str = "", target: tuple[str, int] = SEARCH_TARGET
) -> UpnpGateway:
    """A router on the LAN of the own address `source`, `prefer` before others; raises GatewayFailed."""
    locations = await _search(source, target)
    if not locations:
        raise GatewayFailed(Failure.NO_GATEWAY, "no router answers to UPnP")
    problem = GatewayFailed(Failure.NO_GATEWAY, "no router that maps ports answers to UPnP")
    for host in sorted(locations, key=lambda one: one != prefer):
        try:
            return await _open(host, locations[host], choose)
        except GatewayFailed as error:
            problem = error
    raise problem


async def _search(source: str, target: tuple[str, int]) -> dict[str, str]:
    """The descriptions' addresses by host."""
    loop = asyncio.get_running_loop()
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    try:
        sock.setblocking(False)
        if ipaddress.ip_address(target[0]).is_multicast:
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(source))
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, SEARCH_HOPS)
        sock.bind((source, 0))
        transport, found = await loop.create_datagram_endpoint(_Search, sock=sock)
    except OSError as error:
        sock.close()
        raise GatewayFailed(Failure.NO_GATEWAY, f"no search from {source}: {error.strerror or error}") from error
    try:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SEARCH_S):
                while not found.answered.is_set():
                    for device in SEARCH_TYPES:
                        transport.sendto(encode_search(device), target)
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(SEARCH_AGAIN_S):
                            await found.answered.wait()
                await asyncio.sleep(SEARCH_REST_S)
    finally:
        transport.close()
    return found.locations


async def _open(host: str, location: str, choose: Callable[[range], int]) -> UpnpGateway:
    """What answered at `location`, where it can map ports; of several connections the one that is up."""
    requester = _BoundedRequester(host)
    try:
        device = await UpnpFactory(requester, non_strict=True).async_create_device(location)
        services = [
            one
            for one in device.all_services
            if one.service_type in _SERVICE_TYPES and one.has_action("AddPortMapping")
        ]
    except UpnpConnectionError as error:
        raise GatewayFailed(Failure.GATEWAY_SILENT, f"{host} does not give its UPnP description") from error
    except _UNREADABLE as error:
        raise GatewayFailed(Failure.GATEWAY_MALFORMED, f"{host}'s UPnP description: {_short(error)}") from error
    if not services:
        raise GatewayFailed(Failure.NO_GATEWAY, f"{host} maps no ports by UPnP")
    own_ip = _own_ip_towards(host)
    gateways = [UpnpGateway(host, one, own_ip, choose) for one in services]
    problem: GatewayFailed | None = None
    for one in gateways:
        try:
            if await one.external_ip() != "0.0.0.0":
                requester.requests_left = None  # it is known now; its owner asks it as long as it serves
                return one
        except GatewayFailed as error:
            problem = error
    raise problem or GatewayFailed(Failure.GATEWAY_REFUSED, f"{host}: {NO_ADDRESS}")


def _own_ip_towards(host: str) -> str:
    """This machine's address as that host sees it; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect((host, 1))
        except OSError as error:
            raise GatewayFailed(Failure.NO_GATEWAY, f"no way to {host}: {error.strerror or error}") from error
        return str(sock.getsockname()[0])
