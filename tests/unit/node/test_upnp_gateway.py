"""node/upnp_gateway.py against a router on loopback, and against one that lies."""

import random

import pytest

from shoal.node import upnp_gateway
from shoal.node.port_mapping import LEASE_S, GatewayFailed, Lease
from shoal.node.upnp_gateway import UpnpGateway, read_location_untrusted, search_upnp
from shoal.protocol.errors import Failure
from tests.unit.node.gateways import EXTERNAL_IP, OWN_IP, UpnpRouter, describe_device, run_upnp_router


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upnp_gateway, "SEARCH_REST_S", 0.01)


async def find(router: UpnpRouter) -> UpnpGateway:
    return await search_upnp(OWN_IP, random.Random(1).choice, target=(OWN_IP, router.search_port))


async def test_a_port_is_mapped_renewed_and_taken_back() -> None:
    async with run_upnp_router() as router:
        gateway = await find(router)
        assert gateway.host == OWN_IP and await gateway.external_ip() == EXTERNAL_IP
        assert await gateway.add(9460, 9460) == Lease(external_port=9460, lease_s=LEASE_S)
        assert router.mapped == {9460: (OWN_IP, 9460)} and await gateway.holds(9460, 9460)
        assert await gateway.add(9460, 9460) == Lease(external_port=9460, lease_s=LEASE_S)
        router.mapped.clear()
        assert not await gateway.holds(9460, 9460)
        router.mapped[9460] = "192.168.1.99", 9460
        assert not await gateway.holds(9460, 9460)
        router.mapped[9460] = OWN_IP, 9460
        await gateway.remove(9460, 9460)
        assert router.mapped == {}


async def test_another_port_is_taken_where_the_wanted_one_is_anothers() -> None:
    async with run_upnp_router(UpnpRouter(mapped={9460: ("192.168.1.99", 9460)})) as router:
        lease = await (await find(router)).add(9460, 9460)
        assert lease.external_port in range(20_000, 60_000)
        assert router.mapped[lease.external_port] == (OWN_IP, 9460)
        assert router.mapped[9460] == ("192.168.1.99", 9460)


async def test_when_every_port_is_taken_the_reason_says_so() -> None:
    async with run_upnp_router() as router:
        gateway = await search_upnp(OWN_IP, lambda ports: ports[0], target=(OWN_IP, router.search_port))
        router.mapped |= {9460: ("192.168.1.99", 9460), 20_000: ("192.168.1.99", 1)}
        with pytest.raises(GatewayFailed) as caught:
            await gateway.add(9460, 9460)
        assert caught.value.failure is Failure.PORT_TAKEN and "9460 20000" in caught.value.detail


async def test_a_router_that_grants_no_leases_maps_without_one() -> None:
    async with run_upnp_router(UpnpRouter(permanent_only=True)) as router:
        gateway = await find(router)
        assert await gateway.add(9460, 9460) == Lease(external_port=9460, lease_s=0)
        assert await gateway.add(9461, 9461) == Lease(external_port=9461, lease_s=0)
        assert router.leases == [0, 0]


async def test_a_refusal_has_its_number() -> None:
    async with run_upnp_router(UpnpRouter(refuse=606)) as router:
        gateway = await find(router)
        for work in (gateway.add(9460, 9460), gateway.remove(9460, 9460)):
            with pytest.raises(GatewayFailed) as caught:
                await work
            assert caught.value.failure is Failure.GATEWAY_REFUSED and "606" in caught.value.detail


async def test_nobody_there_ends_with_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upnp_gateway, "SEARCH_S", 0.05)
    async with run_upnp_router() as router:
        port = router.search_port
    with pytest.raises(GatewayFailed) as caught:
        await search_upnp(OWN_IP, random.choice, target=(OWN_IP, port))
    assert caught.value.failure is Failure.NO_GATEWAY
    with pytest.raises(GatewayFailed) as caught:
        await search_upnp("192.0.2.1", random.choice, target=(OWN_IP, port))
    assert caught.value.failure is Failure.NO_GATEWAY and "no search from" in caught.value.detail


# What a description may be, and what is made of it.
DEEP = "<a>" * 60_000
LIES = {
    "nothing": ("", Failure.GATEWAY_MALFORMED),
    "no xml": ("it is a router <&", Failure.GATEWAY_MALFORMED),
    "too long": ("<a>" + " " * (upnp_gateway.BODY_BYTES_MAX + 1), Failure.GATEWAY_MALFORMED),
    "deep": (DEEP, Failure.GATEWAY_MALFORMED),
    "deep devices": (
        "<root xmlns='urn:schemas-upnp-org:device-1-0'>"
        + "<device><deviceList>" * 3000
        + "</deviceList></device>" * 3000
        + "</root>",
        Failure.GATEWAY_MALFORMED,
    ),
    "an entity": (
        '<!DOCTYPE a [<!ENTITY b "bbbbbbbb"><!ENTITY c "&b;&b;&b;">]><root>&c;</root>',
        Failure.GATEWAY_MALFORMED,
    ),
    "an icon without a size": (
        describe_device().replace("<UDN>uuid:a", "<iconList><icon><width>x</width></icon></iconList><UDN>uuid:a"),
        Failure.GATEWAY_MALFORMED,
    ),
    "another device": (describe_device(service="urn:schemas-upnp-org:service:Printer:1"), Failure.NO_GATEWAY),
    "somebody else's address": (describe_device(control="http://192.0.2.1/control"), Failure.NO_GATEWAY),
    "many services": (
        describe_device().replace(
            "<serviceList>",
            "<serviceList>" + "<service><serviceType>x</serviceType><SCPDURL>/scpd.xml</SCPDURL></service>" * 200,
        ),
        Failure.GATEWAY_MALFORMED,
    ),
}


@pytest.mark.parametrize("lie", LIES)
async def test_a_description_that_lies_has_its_reason(lie: str) -> None:
    description, failure = LIES[lie]
    async with run_upnp_router(UpnpRouter(description=description)) as router:
        with pytest.raises(GatewayFailed) as caught:
            await find(router)
        assert caught.value.failure is failure, caught.value
        assert router.requests <= upnp_gateway.REQUESTS_MAX
        assert len(caught.value.detail) < 400


@pytest.mark.parametrize("service", ["", "<scpd/>", "<a" * 1000], ids=["nothing", "no actions", "no xml"])
async def test_a_service_that_cannot_be_read_maps_nothing(service: str) -> None:
    async with run_upnp_router(UpnpRouter(service_description=service)) as router:
        with pytest.raises(GatewayFailed):
            await find(router)


async def test_a_router_without_an_address_refuses() -> None:
    async with run_upnp_router(UpnpRouter(external_ip="0.0.0.0")) as router:
        with pytest.raises(GatewayFailed) as caught:
            await find(router)
        assert caught.value.failure is Failure.GATEWAY_REFUSED


async def test_a_router_that_goes_away_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    async with run_upnp_router() as router:
        gateway = await find(router)
    with pytest.raises(GatewayFailed) as caught:
        await gateway.external_ip()
    assert caught.value.failure is Failure.GATEWAY_SILENT


@pytest.mark.parametrize(
    ("datagram", "location"),
    [
        (b"HTTP/1.1 200 OK\r\nlocation:  http://10.0.0.1:5000/a.xml \r\n\r\n", "http://10.0.0.1:5000/a.xml"),
        (b"HTTP/1.1 200 OK\nLOCATION:http://10.0.0.1/a\n\n", "http://10.0.0.1/a"),
        (b"HTTP/1.1 200 OK\r\nLOCATION: http://10.0.0.2:5000/a.xml\r\n\r\n", None),
        (b"HTTP/1.1 200 OK\r\nLOCATION: https://10.0.0.1/a\r\n\r\n", None),
        (b"HTTP/1.1 200 OK\r\nLOCATION: http://10.0.0.1:99999/a\r\n\r\n", None),
        (b"HTTP/1.1 200 OK\r\nLOCATION: http://[::1/a\r\n\r\n", None),
        (b"HTTP/1.1 200 OK\r\nLOCATION: http://10.0.0.1/" + b"a" * 600 + b"\r\n\r\n", None),
        (b"HTTP/1.1 200 OK\r\nLOCATION: http://10.0.0.1/\xff\r\n\r\n", None),
        (b"HTTP/1.1 200 OK\r\nSERVER: x\r\n\r\n", None),
        (b"NOTIFY * HTTP/1.1\r\nLOCATION: http://10.0.0.1/a\r\n\r\n", None),
        (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 2000 + b"LOCATION: http://10.0.0.1/a\r\n\r\n", None),
    ],
)
def test_only_an_answer_that_leads_back_to_its_sender_is_followed(datagram: bytes, location: str | None) -> None:
    assert read_location_untrusted(datagram, "10.0.0.1") == location
