"""node/portmap.py and node/port_mapping.py: what is mapped when, kept how, and told as what."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest

from shoal.node import nat_pmp_gateway, portmap
from shoal.node.interfaces import Gateway as DefaultGateway
from shoal.node.interfaces import InterfaceAddress, Interfaces, InterfaceWatch
from shoal.node.nat_pmp_gateway import open_nat_pmp
from shoal.node.port_mapping import (
    LEASE_S,
    RETRY_S_MAX,
    RETRY_S_MIN,
    Gateway,
    GatewayFailed,
    Lease,
    Listener,
    MappedPort,
    MappingState,
    PortMappings,
    Way,
    WayTried,
    check_external,
    list_ports,
    renew_after_s,
    retry_after_s,
)
from shoal.node.portmap import Open, PortMapper, PortMapperPorts, Wanted, open_by_nat_pmp, open_by_upnp
from shoal.protocol.errors import Failure
from tests.unit.node.gateways import EXTERNAL_IP, OWN_IP, run_pmp_router
from tests.unit.node.node_samples import PATIENCE_S

HOME = Interfaces(
    addresses=(InterfaceAddress(interface="eth0", ip="192.168.1.5", prefix_bits=24),),
    gateways=(DefaultGateway(metric=100, interface="eth0", ip="192.168.1.1"),),
)
IPV6_ALONE = Interfaces(addresses=(InterfaceAddress(interface="eth0", ip="2a00::5", prefix_bits=64),))
PUBLIC = Interfaces(
    addresses=(InterfaceAddress(interface="eth0", ip="45.0.0.5", prefix_bits=24),),
    gateways=(DefaultGateway(metric=100, interface="eth0", ip="45.0.0.1"),),
)
BOTH = (
    Wanted(listener=Listener.CONTROL, host="0.0.0.0", port=9460),
    Wanted(listener=Listener.TENSOR, host="0.0.0.0", port=9461),
)


@dataclass
class FakeGateway:
    """A router that does what it is told. `asked` has every change."""

    way: Way = Way.NAT_PMP
    host: str = "192.168.1.1"
    ip: str = EXTERNAL_IP
    failure: Failure | None = None
    refuses: set[int] = field(default_factory=set)
    hangs: bool = False
    lease_s: int = LEASE_S
    shift: int = 0
    forgot: bool = False
    closed: bool = False
    asked: list[str] = field(default_factory=list)

    async def external_ip(self) -> str:
        await self._check()
        return self.ip

    async def add(self, internal_port: int, external_port: int) -> Lease:
        await self._check()
        if internal_port in self.refuses:
            raise GatewayFailed(Failure.PORT_TAKEN, "x")
        self.asked.append(f"add {internal_port} {external_port}")
        return Lease(external_port=external_port + self.shift, lease_s=self.lease_s)

    async def holds(self, internal_port: int, external_port: int) -> bool:
        await self._check()
        return not self.forgot

    async def remove(self, internal_port: int, external_port: int) -> None:
        await self._check()
        self.asked.append(f"remove {internal_port} {external_port}")

    async def close(self) -> None:
        self.closed = True

    async def _check(self) -> None:
        if self.hangs:
            await asyncio.Event().wait()
        if self.failure is not None:
            raise GatewayFailed(self.failure, "as told")


def opens(gateway: FakeGateway) -> Open:
    async def open_gateway(interfaces: Interfaces) -> Gateway:
        return gateway

    return open_gateway


@dataclass
class Lab:
    """A mapper, what it has told, and the interfaces that it sees."""

    mapper: PortMapper
    told: list[PortMappings]
    failed: list[tuple[Way, Failure]]
    watch: InterfaceWatch
    seen: list[Interfaces]

    def move(self, interfaces: Interfaces) -> None:
        self.seen.append(interfaces)
        self.watch.check()


def make_lab(*gateways: FakeGateway, wanted: tuple[Wanted, ...] = BOTH, interfaces: Interfaces = HOME) -> Lab:
    seen = [interfaces]
    watch = InterfaceWatch(lambda: seen[-1], lambda: 0.0)
    told: list[PortMappings] = []
    failed: list[tuple[Way, Failure]] = []
    ports = PortMapperPorts(changed=told.append, failed=lambda way, failure: failed.append((way, failure)))
    mapper = PortMapper(wanted, watch, ports, {one.way: opens(one) for one in gateways})
    return Lab(mapper=mapper, told=told, failed=failed, watch=watch, seen=seen)


@contextmanager
def running(mapper: PortMapper) -> Iterator[asyncio.Task[None]]:
    task = asyncio.create_task(mapper.run())
    try:
        yield task
    finally:
        task.cancel()


async def until(lab: Lab, count: int) -> PortMappings:
    """The so-manieth state that was told."""
    async with asyncio.timeout(PATIENCE_S):
        while len(lab.told) < count:
            await asyncio.sleep(0)
    return lab.told[count - 1]


# -- the rules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "failure"),
    [
        ("45.0.0.7", None),
        ("192.168.0.2", Failure.DOUBLE_NAT),
        ("10.1.2.3", Failure.DOUBLE_NAT),
        ("100.64.0.9", Failure.DOUBLE_NAT),
        ("169.254.1.1", Failure.DOUBLE_NAT),
        ("127.0.0.1", Failure.DOUBLE_NAT),
        ("0.0.0.0", Failure.GATEWAY_REFUSED),
        ("", Failure.GATEWAY_MALFORMED),
        ("::1", Failure.GATEWAY_MALFORMED),
        ("router.example" * 99, Failure.GATEWAY_MALFORMED),
    ],
)
def test_an_external_address_must_be_one_that_others_reach(text: str, failure: Failure | None) -> None:
    if failure is None:
        assert check_external(text) == text
        return
    with pytest.raises(GatewayFailed) as caught:
        check_external(text)
    assert caught.value.failure is failure and len(caught.value.detail) < 200


def test_leases_are_renewed_at_half_their_time() -> None:
    assert renew_after_s(3600) == 1800.0
    assert renew_after_s(0) == 1800.0  # one without an end is looked after all the same
    assert renew_after_s(1) == 30.0


def test_retries_come_less_and_less_often() -> None:
    waits = [retry_after_s(failures) for failures in range(1, 40)]
    assert waits[0] == RETRY_S_MIN and waits[1] == 2 * RETRY_S_MIN and waits[-1] == RETRY_S_MAX
    assert waits == sorted(waits)


def test_the_wanted_port_is_tried_first() -> None:
    assert list_ports(9460, lambda ports: ports[-1]) == (9460, 59_999, 59_999, 59_999, 59_999)


def test_the_reason_that_tells_most_is_the_reason() -> None:
    tried = (
        WayTried(way=Way.NAT_PMP, failure=Failure.GATEWAY_SILENT, detail="a"),
        WayTried(way=Way.UPNP, failure=Failure.DOUBLE_NAT, detail="b"),
    )
    failed = PortMappings(state=MappingState.FAILED, tried=tried)
    assert failed.failure is Failure.DOUBLE_NAT
    assert failed.describe() == "nat_pmp: gateway_silent: a; upnp: double_nat: b"
    assert PortMappings(state=MappingState.MAPPED, tried=tried).failure is None


@pytest.mark.parametrize("state", list(MappingState))
def test_every_state_reads_as_a_sentence(state: MappingState) -> None:
    tried = (WayTried(way=Way.UPNP, failure=Failure.NO_GATEWAY, detail="none"),)
    assert len(PortMappings(state=state, tried=tried).describe()) > 10


# -- the mapper ------------------------------------------------------------------------------------------------------


async def test_both_ports_are_mapped_and_given_as_addresses() -> None:
    gateway = FakeGateway(shift=7)
    lab = make_lab(gateway)
    with running(lab.mapper):
        now = await until(lab, 1)
    assert now.state is MappingState.MAPPED and now.way is Way.NAT_PMP and now.gateway == "192.168.1.1"
    assert [str(one) for one in now.addresses(Listener.CONTROL)] == [f"/ip4/{EXTERNAL_IP}/tcp/9467"]
    assert [str(one) for one in now.addresses(Listener.TENSOR)] == [f"/ip4/{EXTERNAL_IP}/tcp/9468"]
    assert now.describe() == (
        "the router 192.168.1.1 maps by nat_pmp: 45.0.0.7:9467 leads to the control port 9460, "
        "45.0.0.7:9468 leads to the tensor port 9461"
    )


async def test_the_next_way_is_tried_where_one_does_not_serve() -> None:
    lab = make_lab(FakeGateway(failure=Failure.GATEWAY_SILENT), FakeGateway(way=Way.UPNP))
    with running(lab.mapper):
        now = await until(lab, 2)
    assert now.state is MappingState.MAPPED and now.way is Way.UPNP
    assert [(one.way, one.failure) for one in now.tried] == [
        (Way.NAT_PMP, Failure.GATEWAY_SILENT),
        (Way.UPNP, None),
    ]
    assert lab.failed == [(Way.NAT_PMP, Failure.GATEWAY_SILENT)]


async def test_where_no_way_serves_every_reason_is_told() -> None:
    first = FakeGateway(ip="100.64.0.9")
    lab = make_lab(first, FakeGateway(way=Way.UPNP, failure=Failure.GATEWAY_REFUSED))
    with running(lab.mapper):
        now = await until(lab, 1)
    assert now.state is MappingState.FAILED and now.mapped == () and now.failure is Failure.DOUBLE_NAT
    assert lab.failed == [(Way.NAT_PMP, Failure.DOUBLE_NAT), (Way.UPNP, Failure.GATEWAY_REFUSED)]
    assert first.asked == [] and first.closed  # a mapping that helps nobody is not made


async def test_a_way_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(portmap, "WAY_TIMEOUT_S", 0.02)
    monkeypatch.setattr(portmap, "CLOSE_TIMEOUT_S", 0.02)
    lab = make_lab(FakeGateway(hangs=True))
    with running(lab.mapper):
        now = await until(lab, 1)
    assert now.failure is Failure.GATEWAY_SILENT and "within 0.02 s" in now.describe()


async def test_all_ports_are_mapped_or_none() -> None:
    gateway = FakeGateway(refuses={9461})
    lab = make_lab(gateway)
    with running(lab.mapper):
        now = await until(lab, 1)
    assert now.failure is Failure.PORT_TAKEN
    assert gateway.asked == ["add 9460 9460", "remove 9460 9460"] and gateway.closed


@pytest.mark.parametrize(
    ("wanted", "interfaces", "state"),
    [
        (BOTH, PUBLIC, MappingState.NOT_NEEDED),
        (BOTH, IPV6_ALONE, MappingState.NOT_NEEDED),
        ((Wanted(listener=Listener.TENSOR, host="127.0.0.1", port=1),), HOME, MappingState.OFF),
        ((Wanted(listener=Listener.TENSOR, host="192.168.1.5", port=1),), HOME, MappingState.MAPPED),
        ((Wanted(listener=Listener.TENSOR, host="192.168.1.6", port=1),), HOME, MappingState.OFF),
    ],
)
async def test_only_what_a_router_can_lead_to_is_mapped(
    wanted: tuple[Wanted, ...], interfaces: Interfaces, state: MappingState
) -> None:
    lab = make_lab(FakeGateway(), wanted=wanted, interfaces=interfaces)
    with running(lab.mapper):
        assert (await until(lab, 1)).state is state


async def test_nothing_to_map_asks_nobody() -> None:
    lab = make_lab(FakeGateway(failure=Failure.NO_GATEWAY), wanted=())
    await lab.mapper.run()
    assert lab.mapper.now.state is MappingState.OFF and lab.failed == []


async def test_another_network_is_asked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    gateway = FakeGateway()
    lab = make_lab(gateway)
    with running(lab.mapper):
        await until(lab, 2)
        gateway.ip = "45.0.0.8"
        lab.move(PUBLIC)
        assert (await until(lab, 3)).state is MappingState.NOT_NEEDED
        lab.move(HOME)
        now = await until(lab, 5)
    assert now.mapped[0].external_ip == "45.0.0.8"
    assert gateway.asked == ["add 9460 9460", "add 9461 9461"] * 2


async def look_again(lab: Lab) -> None:
    """As the next check does."""
    await lab.mapper._step()


async def test_what_the_router_has_forgotten_is_mapped_again_at_the_same_ports() -> None:
    gateway = FakeGateway(shift=7)
    lab = make_lab(gateway)
    await look_again(lab)
    gateway.shift = 0
    await look_again(lab)
    assert gateway.asked == ["add 9460 9460", "add 9461 9461"]
    gateway.forgot = True
    await look_again(lab)
    assert gateway.asked[2:] == ["add 9460 9467", "add 9461 9468"]


async def test_a_lease_is_renewed_when_it_is_due() -> None:
    gateway = FakeGateway()
    lab = make_lab(gateway)
    await look_again(lab)
    lab.mapper._renew_s[Listener.CONTROL] = asyncio.get_running_loop().time()
    await look_again(lab)
    assert gateway.asked[2:] == ["add 9460 9460"]


async def test_a_new_external_address_is_told() -> None:
    gateway = FakeGateway()
    lab = make_lab(gateway)
    await look_again(lab)
    gateway.ip = "45.0.0.9"
    await look_again(lab)
    assert {one.external_ip for one in lab.mapper.now.mapped} == {"45.0.0.9"}
    gateway.ip = "10.0.0.1"
    await look_again(lab)
    assert lab.mapper.now.failure is Failure.DOUBLE_NAT and lab.mapper.now.mapped == ()


async def test_a_router_that_fails_is_left_for_the_other_way() -> None:
    gateway, other = FakeGateway(shift=7), FakeGateway(way=Way.UPNP)
    lab = make_lab(gateway, other)
    await look_again(lab)
    gateway.failure = Failure.GATEWAY_SILENT
    await look_again(lab)
    assert lab.mapper.now.way is Way.UPNP and gateway.closed
    assert other.asked == ["add 9460 9467", "add 9461 9468"]  # others know these addresses


async def test_on_exit_the_mappings_are_taken_back() -> None:
    gateway = FakeGateway()
    lab = make_lab(gateway)
    await look_again(lab)
    await lab.mapper.close()
    assert gateway.asked[2:] == ["remove 9460 9460", "remove 9461 9461"] and gateway.closed
    assert lab.mapper.now.mapped == ()
    await lab.mapper.close()


async def test_on_exit_a_router_that_hangs_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(portmap, "CLOSE_TIMEOUT_S", 0.02)
    gateway = FakeGateway()
    lab = make_lab(gateway)
    await look_again(lab)
    gateway.hangs = True
    await lab.mapper.close()
    assert gateway.closed


async def test_a_mapper_that_is_stopped_in_the_middle_undoes_its_half() -> None:
    gateway = FakeGateway()
    lab = make_lab(gateway)
    add, reached = gateway.add, asyncio.Event()

    async def add_slowly(internal_port: int, external_port: int) -> Lease:
        if internal_port == 9461:
            reached.set()
            await asyncio.Event().wait()
        return await add(internal_port, external_port)

    gateway.add = add_slowly  # type: ignore[method-assign]
    with running(lab.mapper) as task:
        await asyncio.wait_for(reached.wait(), PATIENCE_S)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert gateway.asked == ["add 9460 9460", "remove 9460 9460"] and gateway.closed


# -- with routers ----------------------------------------------------------------------------------------------------


async def test_a_router_on_loopback_that_restarts_gets_the_mappings_again() -> None:
    async with run_pmp_router() as router:

        async def open_router(interfaces: Interfaces) -> Gateway:
            return await open_nat_pmp(OWN_IP, router.port)

        watch = InterfaceWatch(lambda: HOME, lambda: 0.0)
        mapper = PortMapper(BOTH, watch, PortMapperPorts(changed=lambda _: None), {Way.NAT_PMP: open_router})
        await mapper._step()
        assert router.mapped == {9460: 9460, 9461: 9461}
        router.restart()
        router.external_ip = "45.0.0.9"
        await mapper._step()
        assert router.mapped == {9460: 9460, 9461: 9461}
        assert mapper.now.mapped[0] == MappedPort(
            listener=Listener.CONTROL, internal_port=9460, external_ip="45.0.0.9", external_port=9460, lease_s=LEASE_S
        )
        await mapper.close()
        assert router.mapped == {}


@pytest.mark.parametrize("open_way", [open_by_nat_pmp, open_by_upnp])
async def test_a_machine_without_a_network_has_no_gateway(open_way: Open) -> None:
    with pytest.raises(GatewayFailed) as caught:
        await open_way(Interfaces())
    assert caught.value.failure is Failure.NO_GATEWAY


async def test_the_default_gateway_is_the_one_that_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    async def open_router(host: str, port: int = 0) -> object:
        asked.append(host)
        raise GatewayFailed(Failure.GATEWAY_SILENT, "x")

    monkeypatch.setattr(portmap, "open_nat_pmp", open_router)
    with pytest.raises(GatewayFailed):
        await open_by_nat_pmp(HOME)
    assert asked == ["192.168.1.1"]
    assert nat_pmp_gateway.PORT == 5351
