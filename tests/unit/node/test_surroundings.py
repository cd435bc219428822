"""node/surroundings.py: what is mapped and announced of which listener, and who is told of what was found."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from shoal.node.config import ControlTable, LanTable, NatTable, NodeConfig, TensorTable, load_config
from shoal.node.control import ControlStopped, PeerUnreachable
from shoal.node.happenings import HappeningKind, Severity
from shoal.node.interfaces import InterfaceAddress, Interfaces
from shoal.node.mdns import Found
from shoal.node.port_mapping import (
    Listener,
    MappedPort,
    MappingFailure,
    MappingState,
    PortMappings,
    Way,
    WayTried,
)
from shoal.node.portmap import Wanted
from shoal.node.surroundings import Surroundings, list_wanted
from shoal.protocol.errors import Failure
from shoal.protocol.identity import PeerId, format_peer_id
from tests.unit.protocol.samples import PEERS, SWARM

ME, OTHER = PEERS[:2]
PUBLIC = "/ip4/45.0.0.7/tcp/9470"


def mapped(listener: Listener, port: int) -> MappedPort:
    return MappedPort(
        listener=listener, internal_port=port, external_ip="45.0.0.7", external_port=port + 10, lease_s=3600
    )


MAPPED = PortMappings(
    state=MappingState.MAPPED,
    gateway="192.168.1.1",
    way=Way.UPNP,
    mapped=(mapped(Listener.CONTROL, 9460), mapped(Listener.TENSOR, 9461)),
)
TWO_ROUTERS = PortMappings(
    state=MappingState.FAILED,
    tried=(WayTried(way=Way.UPNP, failure=Failure.DOUBLE_NAT, detail="its own address 10.0.0.2 is private"),),
)


@dataclass
class Control:
    """As much of a control plane as is used."""

    own: tuple[str, ...] = ("/ip4/192.168.1.5/tcp/9460", "/ip6/2001:db8::5/tcp/9460", "/ip4/45.0.0.9/tcp/9460")
    offered: list[tuple[str, ...]] = field(default_factory=list)
    dialled: list[tuple[str, ...]] = field(default_factory=list)
    stopped: bool = False
    silent: bool = False

    def addresses(self) -> tuple[str, ...]:
        return self.own

    def offer(self, addresses: tuple[str, ...]) -> None:
        if self.stopped:
            raise ControlStopped("x")
        self.offered.append(addresses)

    async def connect(self, addresses: tuple[str, ...]) -> PeerId:
        self.dialled.append(addresses)
        if self.silent:
            raise PeerUnreachable(OTHER, Failure.PEER_UNREACHABLE, "x")
        return OTHER


@dataclass
class Lab:
    surroundings: Surroundings
    control: Control
    told: list[tuple[str, Severity]]
    tasks: list[asyncio.Task[object]]


@contextlib.asynccontextmanager
async def make_lab(config: NodeConfig | None = None) -> AsyncIterator[Lab]:
    told: list[tuple[str, Severity]] = []
    tasks: list[asyncio.Task[object]] = []

    def happen(kind: HappeningKind, text: str, severity: Severity) -> None:
        assert kind is HappeningKind.NETWORK
        told.append((text, severity))

    def spawn(work: Coroutine[object, object, object]) -> None:
        tasks.append(asyncio.ensure_future(work))

    control = Control()
    surroundings = Surroundings(config or NodeConfig(), ME, SWARM, control, happen, spawn)  # type: ignore[arg-type]
    try:
        yield Lab(surroundings=surroundings, control=control, told=told, tasks=tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


# -- which ports -----------------------------------------------------------------------------------------------------


ADDRESSES = ("/ip6/2001:db8::5/tcp/7000", "/ip4/192.168.1.5/tcp/7001")
CONTROL = Wanted(listener=Listener.CONTROL, host="0.0.0.0", port=9460)
TENSOR = Wanted(listener=Listener.TENSOR, host="0.0.0.0", port=9461)


@pytest.mark.parametrize(
    ("control", "tensor", "bound", "wanted"),
    [
        (ControlTable(), TensorTable(), ("0.0.0.0", 9461), (CONTROL, TENSOR)),
        (ControlTable(host="::"), TensorTable(), ("::", 9461), (CONTROL, TENSOR)),
        (ControlTable(port=0), TensorTable(), ("0.0.0.0", 9461), (replace(CONTROL, port=7001), TENSOR)),
        (ControlTable(host="127.0.0.1"), TensorTable(), ("127.0.0.1", 9461), ()),
        (ControlTable(host="::1"), TensorTable(), ("0.0.0.0", 9461), (TENSOR,)),
        (ControlTable(host="localhost"), TensorTable(), ("localhost", 9461), ()),
        (ControlTable(announce=(PUBLIC,)), TensorTable(), ("0.0.0.0", 9461), (TENSOR,)),
        (ControlTable(), TensorTable(announce_host="a.example"), ("0.0.0.0", 9461), (CONTROL,)),
        (ControlTable(), TensorTable(announce_port=1), ("0.0.0.0", 9461), (CONTROL,)),
        (ControlTable(host="192.168.1.5"), TensorTable(), ("::1", 1), (replace(CONTROL, host="192.168.1.5"),)),
    ],
)
def test_ports_are_mapped_whose_address_nobody_has_given(
    control: ControlTable, tensor: TensorTable, bound: tuple[str, int], wanted: tuple[Wanted, ...]
) -> None:
    assert list_wanted(NodeConfig(control=control, tensor=tensor), ADDRESSES, bound) == wanted


def test_a_peer_without_ipv4_has_no_control_port_to_map() -> None:
    assert list_wanted(NodeConfig(), ADDRESSES[:1], ("0.0.0.0", 9461)) == (TENSOR,)


def test_both_can_be_switched_off(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text("[node]\nrole = 'bootstrap'\n[nat]\nport_mapping = false\n[lan]\nmdns = false\n")
    config = load_config(file, {})
    assert not config.nat.port_mapping and not config.lan.mdns
    assert NodeConfig().nat.port_mapping and NodeConfig().lan.mdns


async def test_what_is_switched_off_does_not_run() -> None:
    config = NodeConfig(nat=NatTable(port_mapping=False), lan=LanTable(mdns=False))
    async with make_lab(config) as lab:
        lab.surroundings.start()
        lab.surroundings.begin(("0.0.0.0", 9461), lambda source, address: None, lambda peer, addresses: None)
        assert len(lab.tasks) == 2  # the networks are watched, the mapper has nothing to do
        await lab.tasks[1]
        assert lab.surroundings.router_status().state is MappingState.OFF
        await lab.surroundings.close()


async def test_a_loopback_listener_says_nothing_on_the_lan() -> None:
    async with make_lab(NodeConfig(control=ControlTable(host="127.0.0.1"))) as lab:
        lab.surroundings.start()
        assert len(lab.tasks) == 1


# -- what is told ----------------------------------------------------------------------------------------------------


async def test_mapped_ports_are_candidates_of_both_planes() -> None:
    given: list[tuple[str, object]] = []
    async with make_lab() as lab:
        one = lab.surroundings
        one._set_mapped = lambda source, address: given.append((source, address))
        one._mappings_changed(MAPPED)
        assert lab.control.offered == [(PUBLIC,)]
        assert given == [("router", ("45.0.0.7", 9471))]
        assert one.router_status().addresses == ("45.0.0.7:9470", "45.0.0.7:9471")
        assert one.router_status().state is MappingState.MAPPED and one.warning() is None
        assert len(lab.told) == 1 and "9471 leads to the tensor port 9461" in lab.told[0][0]
        one._mappings_changed(PortMappings(state=MappingState.TRYING))
        assert lab.control.offered[-1] == () and given[-1] == ("router", None)


async def test_two_routers_are_a_warning_and_told_once() -> None:
    async with make_lab() as lab:
        one = lab.surroundings
        one._mappings_changed(TWO_ROUTERS)
        one._mappings_changed(replace(TWO_ROUTERS, gateway="192.168.1.1"))
        assert [severity for _, severity in lab.told] == [Severity.WARNING]
        assert one.router_status().reason == "double_nat"
        warning = one.warning()
        assert warning is not None and warning.startswith("upnp: double_nat: its own address 10.0.0.2 is private; ")


async def test_a_router_that_does_nothing_is_no_warning() -> None:
    async with make_lab() as lab:
        tried = (WayTried(way=Way.NAT_PMP, failure=Failure.GATEWAY_SILENT, detail="x"),)
        lab.surroundings._mappings_changed(PortMappings(state=MappingState.FAILED, tried=tried))
        assert [severity for _, severity in lab.told] == [Severity.INFO]
        assert lab.surroundings.warning() is None
        assert lab.surroundings.router_status().reason == "gateway_silent"


async def test_failures_are_counted_by_way() -> None:
    async with make_lab() as lab:
        for _ in range(2):
            lab.surroundings._mapping_failed(Way.UPNP, Failure.PORT_TAKEN)
        assert lab.surroundings.failures == {(Way.UPNP, MappingFailure.PORT_TAKEN): 2}


async def test_a_control_plane_that_has_stopped_does_not_matter() -> None:
    async with make_lab() as lab:
        lab.control.stopped = True
        lab.surroundings._mappings_changed(MAPPED)
        assert lab.surroundings.mappings is MAPPED


# -- the LAN ---------------------------------------------------------------------------------------------------------


FOUND = Found(peer=OTHER, addresses=("/ip4/192.168.1.6/tcp/9460",))


async def test_who_is_found_is_dialled_until_there_is_a_book() -> None:
    heard: list[tuple[PeerId, tuple[str, ...]]] = []
    async with make_lab() as lab:
        for lab.control.silent in (False, True):
            lab.surroundings._found(FOUND)
            await lab.tasks[-1]
        assert lab.control.dialled == [FOUND.addresses] * 2
        config = NodeConfig(nat=NatTable(port_mapping=False))
        lab.surroundings._config = config
        lab.surroundings.begin(("0.0.0.0", 1), lambda *_: None, lambda *one: heard.append(one))
        lab.surroundings._found(FOUND)
        assert heard == [(OTHER, FOUND.addresses)] and len(lab.control.dialled) == 2


async def test_on_the_lan_only_addresses_of_the_lan_are_announced() -> None:
    async with make_lab() as lab:
        one = InterfaceAddress(interface="eth0", ip="192.168.1.5", prefix_bits=24)
        lab.surroundings.interfaces.now = Interfaces(addresses=(one,))
        assert lab.surroundings._lan_addresses() == (f"/ip4/192.168.1.5/tcp/9460/p2p/{format_peer_id(ME)}",)


async def test_no_multicast_is_told_with_its_reason() -> None:
    async with make_lab() as lab:
        lab.surroundings._no_multicast(Failure.MULTICAST_UNAVAILABLE, "no route")
        assert lab.told[0][0].startswith("multicast_unavailable: no route; peers on the LAN")
        assert lab.surroundings.lan_peers == 0
