"""Home routers on loopback: one that speaks NAT-PMP over UDP, one that speaks UPnP over UDP and HTTP.

Both are real servers on a port that the kernel chose, with a table of mappings that a test looks at and changes.
"""

import asyncio
import ipaddress
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import cast
from xml.etree import ElementTree

from aiohttp import web

EXTERNAL_IP = "45.0.0.7"
OWN_IP = "127.0.0.1"


@dataclass
class PmpRouter(asyncio.DatagramProtocol):
    """`mapped` is internal port -> external port; `lost` questions are not answered; `answer` replaces every answer."""

    external_ip: str = EXTERNAL_IP
    epoch_s: int = 1000
    code: int = 0
    lost: int = 0
    answer: bytes | None = None
    taken: set[int] = field(default_factory=set)
    mapped: dict[int, int] = field(default_factory=dict)
    lifetimes: list[int] = field(default_factory=list)
    questions: int = 0
    port: int = 0

    def restart(self) -> None:
        """Forget everything."""
        self.epoch_s = 0
        self.mapped.clear()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: tuple[str | object, int]) -> None:
        self.questions += 1
        if self.lost:
            self.lost -= 1
            return
        self.transport.sendto(self.answer if self.answer is not None else self._answer(data), addr)

    def _answer(self, question: bytes) -> bytes:
        head = struct.pack("!BBHI", 0, 128 + question[1], self.code, self.epoch_s)
        if self.code:
            return head
        if question == b"\0\0":
            return head + ipaddress.IPv4Address(self.external_ip).packed
        _, opcode, _, internal, external, lifetime_s = struct.unpack("!BBHHHI", question)
        assert opcode == 2
        self.lifetimes.append(lifetime_s)
        if not lifetime_s:
            self.mapped.pop(internal, None)
            return head + struct.pack("!HHI", internal, 0, 0)
        others = {port for one, port in self.mapped.items() if one != internal} | self.taken
        while external in others:
            external += 1
        self.mapped[internal] = external
        return head + struct.pack("!HHI", internal, external, lifetime_s)


@asynccontextmanager
async def run_pmp_router(router: PmpRouter | None = None) -> AsyncIterator[PmpRouter]:
    """A router, until the context ends."""
    made = router or PmpRouter()
    transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(lambda: made, local_addr=(OWN_IP, 0))
    made.port = transport.get_extra_info("sockname")[1]
    try:
        yield made
    finally:
        transport.close()


_TYPES = {"NewExternalPort": "ui2", "NewInternalPort": "ui2", "NewEnabled": "boolean", "NewLeaseDuration": "ui4"}
_ENTRY = ("NewRemoteHost", "NewExternalPort", "NewProtocol")
_TARGET = ("NewInternalPort", "NewInternalClient", "NewEnabled", "NewPortMappingDescription", "NewLeaseDuration")
_ACTIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "GetExternalIPAddress": ((), ("NewExternalIPAddress",)),
    "AddPortMapping": ((*_ENTRY, *_TARGET), ()),
    "DeletePortMapping": (_ENTRY, ()),
    "GetSpecificPortMappingEntry": (_ENTRY, _TARGET),
}
SERVICE = "urn:schemas-upnp-org:service:WANIPConnection:1"


def describe_service() -> str:
    """The SCPD of a WANIPConnection, with the actions that are used."""
    actions, variables = "", ""
    for name, (ins, outs) in _ACTIONS.items():
        arguments = "".join(
            f"<argument><name>{one}</name><direction>{way}</direction>"
            f"<relatedStateVariable>{one[3:]}</relatedStateVariable></argument>"
            for way, ones in (("in", ins), ("out", outs))
            for one in ones
        )
        actions += f"<action><name>{name}</name><argumentList>{arguments}</argumentList></action>"
    for one in {one for ins, outs in _ACTIONS.values() for one in (*ins, *outs)}:
        kind = _TYPES.get(one, "string")
        variables += f"<stateVariable sendEvents='no'><name>{one[3:]}</name><dataType>{kind}</dataType></stateVariable>"
    table = f"<serviceStateTable>{variables}</serviceStateTable>"
    return f"<scpd xmlns='urn:schemas-upnp-org:service-1-0'><actionList>{actions}</actionList>{table}</scpd>"


def describe_device(control: str = "/control", service: str = SERVICE) -> str:
    """A device with one service, two levels down, as routers have it."""
    inner = (
        f"<serviceList><service><serviceType>{service}</serviceType><serviceId>a</serviceId>"
        f"<controlURL>{control}</controlURL><eventSubURL>/event</eventSubURL><SCPDURL>/scpd.xml</SCPDURL></service>"
        "</serviceList>"
    )
    for kind, udn in (("WANConnectionDevice", "c"), ("WANDevice", "b")):
        device = f"<deviceType>urn:schemas-upnp-org:device:{kind}:1</deviceType><UDN>uuid:{udn}</UDN>{inner}"
        inner = f"<deviceList><device>{device}</device></deviceList>"
    root = f"<deviceType>urn:schemas-upnp-org:device:InternetGatewayDevice:1</deviceType><UDN>uuid:a</UDN>{inner}"
    return f"<root xmlns='urn:schemas-upnp-org:device-1-0'><device>{root}</device></root>"


@dataclass
class UpnpRouter:
    """`mapped` is external port -> (client, internal port); `refuse` is the UPnP error of every change."""

    external_ip: str = EXTERNAL_IP
    refuse: int = 0
    permanent_only: bool = False
    mapped: dict[int, tuple[str, int]] = field(default_factory=dict)
    leases: list[int] = field(default_factory=list)
    description: str = field(default_factory=describe_device)
    service_description: str = field(default_factory=describe_service)
    location: str = ""
    search_port: int = 0
    requests: int = 0

    def handle_call(self, name: str, given: dict[str, str]) -> dict[str, object] | int:
        """What an action returns, or the number of its error."""
        if name == "GetExternalIPAddress":
            return {"NewExternalIPAddress": self.external_ip}
        port = int(given["NewExternalPort"])
        if name == "GetSpecificPortMappingEntry":
            if port not in self.mapped:
                return 714
            client, internal = self.mapped[port]
            values = (internal, client, 1, "shoal", 3600)
            return dict(zip(_TARGET, values, strict=True))
        if self.refuse:
            return self.refuse
        if name == "DeletePortMapping":
            return {} if self.mapped.pop(port, None) else 714
        lease_s = int(given["NewLeaseDuration"])
        if self.permanent_only and lease_s:
            return 725
        if self.mapped.get(port, ("", 0))[0] not in ("", given["NewInternalClient"]):
            return 718
        self.mapped[port] = given["NewInternalClient"], int(given["NewInternalPort"])
        self.leases.append(lease_s)
        return {}

    async def answer_call(self, request: web.Request) -> web.Response:
        self.requests += 1
        name = request.headers["SOAPAction"].strip('"').partition("#")[2]
        body = next(iter(ElementTree.fromstring(await request.text())))
        came = self.handle_call(name, {one.tag: one.text or "" for one in body[0]})
        envelope = "http://schemas.xmlsoap.org/soap/envelope/"
        if isinstance(came, int):
            error = f"<UPnPError xmlns='urn:schemas-upnp-org:control-1-0'><errorCode>{came}</errorCode></UPnPError>"
            told = f"<s:Fault><faultstring>UPnPError</faultstring><detail>{error}</detail></s:Fault>"
        else:
            values = "".join(f"<{key}>{value}</{key}>" for key, value in came.items())
            told = f"<u:{name}Response xmlns:u='{SERVICE}'>{values}</u:{name}Response>"
        text = f"<s:Envelope xmlns:s='{envelope}'><s:Body>{told}</s:Body></s:Envelope>"
        return web.Response(text=text, status=500 if isinstance(came, int) else 200, content_type="text/xml")

    async def give_description(self, request: web.Request) -> web.Response:
        self.requests += 1
        return web.Response(text=self.description, content_type="text/xml")

    async def give_service(self, request: web.Request) -> web.Response:
        self.requests += 1
        return web.Response(text=self.service_description, content_type="text/xml")


class _Answers(asyncio.DatagramProtocol):
    def __init__(self, router: UpnpRouter) -> None:
        self._router = router

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: tuple[str | object, int]) -> None:
        assert data.startswith(b"M-SEARCH * HTTP/1.1\r\n")
        answer = f"HTTP/1.1 200 OK\r\nST: x\r\nLocation: {self._router.location}\r\n\r\n"
        self._transport.sendto(b"NOTIFY * HTTP/1.1\r\n\r\n", addr)
        self._transport.sendto(answer.encode(), addr)


@asynccontextmanager
async def run_upnp_router(router: UpnpRouter | None = None) -> AsyncIterator[UpnpRouter]:
    """A router, until the context ends."""
    made = router or UpnpRouter()
    app = web.Application()
    app.router.add_get("/root.xml", made.give_description)
    app.router.add_get("/scpd.xml", made.give_service)
    app.router.add_post("/control", made.answer_call)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, OWN_IP, 0)
    await site.start()
    made.location = made.location or f"http://{OWN_IP}:{runner.addresses[0][1]}/root.xml"
    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_datagram_endpoint(lambda: _Answers(made), local_addr=(OWN_IP, 0))
    made.search_port = transport.get_extra_info("sockname")[1]
    try:
        yield made
    finally:
        transport.close()
        await runner.cleanup()
