"""Asks the router to map the ports that others dial, renews that, and takes it back on exit.

NAT-PMP first, which takes a few datagrams, then UPnP; the way that serves is kept until it fails. Everything is asked
anew when the machine's addresses or gateway change, when it has slept, and when the router has forgotten the mappings.

Invariants: nothing waits for it; each way is tried for at most WAY_TIMEOUT_S, and both again after retry_after_s at the
earliest; on exit at most CLOSE_TIMEOUT_S are spent; `now` names no address that is not a public one.
"""

import asyncio
import contextlib
import importlib
import logging
import random
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

from shoal.node.endpoints import is_public
from shoal.node.interfaces import Interfaces, InterfaceWatch
from shoal.node.nat_pmp_gateway import open_nat_pmp
from shoal.node.port_mapping import (
    CHECK_PERIOD_S,
    Gateway,
    GatewayFailed,
    Listener,
    MappedPort,
    MappingState,
    PortMappings,
    Way,
    WayTried,
    check_external,
    renew_after_s,
    retry_after_s,
)
from shoal.protocol.errors import Failure

WAY_TIMEOUT_S = 20.0
CLOSE_TIMEOUT_S = 2.0
WILDCARD = "0.0.0.0"

log = logging.getLogger(__name__)

Open = Callable[[Interfaces], Awaitable[Gateway]]


async def open_by_nat_pmp(interfaces: Interfaces) -> Gateway:
    """The default gateway, asked by NAT-PMP."""
    if not interfaces.gateways:
        raise GatewayFailed(Failure.NO_GATEWAY, "this machine has no default gateway")
    return await open_nat_pmp(interfaces.gateways[0].ip)


async def open_by_upnp(interfaces: Interfaces) -> Gateway:
    """A router that answers the search on the default gateway's LAN."""
    best = interfaces.gateways[0] if interfaces.gateways else None
    own = interfaces.beside(best) if best is not None else None
    if own is None and not interfaces.addresses:
        raise GatewayFailed(Failure.NO_GATEWAY, "this machine has no address on any network")
    # A tenth of a second, and memory that a machine without a router does not spend.
    upnp = await asyncio.to_thread(importlib.import_module, "shoal.node.upnp_gateway")
    prefer = best.ip if best is not None else ""
    gateway: Gateway = await upnp.search_upnp(own or WILDCARD, random.choice, prefer)
    return gateway


WAYS: Mapping[Way, Open] = {Way.NAT_PMP: open_by_nat_pmp, Way.UPNP: open_by_upnp}


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A port of this machine that others should reach; `host` is what it listens on."""

    listener: Listener
    host: str
    port: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PortMapperPorts:
    """`changed` hears of every other state of `PortMappings`, `failed` of every way that did not serve."""

    changed: Callable[[PortMappings], None]
    failed: Callable[[Way, Failure], None] = lambda way, failure: None


class PortMapper:
    """All calls on the event loop. `run` it in a task; `close` after that has been cancelled."""

    def __init__(
        self,
        wanted: tuple[Wanted, ...],
        watch: InterfaceWatch,
        ports: PortMapperPorts,
        ways: Mapping[Way, Open] = WAYS,
    ) -> None:
        self.now = PortMappings(state=MappingState.TRYING if wanted else MappingState.OFF)
        self._wanted = wanted
        self._watch = watch
        self._ports = ports
        self._ways = dict(ways)
        self._gateway: Gateway | None = None
        self._renew_s: dict[Listener, float] = {}  # when each mapping is due, on the loop's clock
        self._moved = asyncio.Event()
        self._failures = 0

    async def run(self) -> None:
        """Map, and keep it so, until cancelled."""
        if not self._wanted:
            return
        end = self._watch.subscribe(lambda _: self._moved.set())
        try:
            while True:
                self._moved.clear()
                await self._step()
                wait_s = CHECK_PERIOD_S if self._gateway is not None else retry_after_s(self._failures)
                # Not wait_for: Python 3.11's swallows a cancellation that meets the event.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(wait_s):
                        await self._moved.wait()
                if self._moved.is_set():
                    self._failures = 0
                    await self._forget_gateway()
        finally:
            end()

    async def close(self) -> None:
        """Take the mappings back, as far as the router answers in CLOSE_TIMEOUT_S."""
        gateway, self._gateway = self._gateway, None
        if gateway is None:
            return
        mapped = self.now.mapped
        self._set(PortMappings(state=MappingState.OFF))
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                for one in mapped:
                    await gateway.remove(one.internal_port, one.external_port)
        except (GatewayFailed, TimeoutError) as error:
            log.info("a mapped port was not taken back (%s); it ends with its lease", error or "no answer in time")
        finally:
            await gateway.close()

    # -- one look ----------------------------------------------------------------------------------------------------

    async def _step(self) -> None:
        """Keep what is mapped, or else try every way."""
        if self._gateway is not None:
            failed = await self._try(self._gateway.way, self._keep)
            if failed is None:
                return
            log.info("the mapped ports are lost: %s", failed.detail)
            await self._forget_gateway()
        wanted = self._list_wanted()
        if not wanted:
            state = MappingState.NOT_NEEDED if self._is_public() else MappingState.OFF
            self._set(PortMappings(state=state))
            return
        tried: list[WayTried] = []
        for way, open_gateway in self._ways.items():
            failed = await self._try(way, partial(self._map, open_gateway, wanted))
            if failed is None:
                self._failures = 0
                self._set(replace(self.now, tried=(*tried, WayTried(way=way, failure=None, detail=""))))
                return
            tried.append(failed)
        self._failures += 1
        gateways = self._watch.now.gateways
        gateway = gateways[0].ip if gateways else ""
        self._set(PortMappings(state=MappingState.FAILED, gateway=gateway, tried=tuple(tried)))

    async def _try(self, way: Way, work: Callable[[], Awaitable[None]]) -> WayTried | None:
        """Why it did not serve, where it did not."""
        try:
            async with asyncio.timeout(WAY_TIMEOUT_S):
                await work()
        except TimeoutError:
            failed = WayTried(way=way, failure=Failure.GATEWAY_SILENT, detail=f"not done within {WAY_TIMEOUT_S:g} s")
        except GatewayFailed as error:
            failed = WayTried(way=way, failure=error.failure, detail=error.detail)
        else:
            return None
        assert failed.failure is not None
        self._ports.failed(way, failed.failure)
        log.debug("%s: %s: %s", way, failed.failure, failed.detail)
        return failed

    async def _map(self, open_gateway: Open, wanted: tuple[Wanted, ...]) -> None:
        """Every wanted port by this way, or none."""
        gateway = await open_gateway(self._watch.now)
        mapped: list[MappedPort] = []
        try:
            external_ip = check_external(await gateway.external_ip())
            known = {one.listener: one.external_port for one in self.now.mapped}
            for one in wanted:
                port = known.get(one.listener, one.port)
                mapped.append(await self._add(gateway, external_ip, one.listener, one.port, port))
            self._gateway = gateway
        finally:
            if self._gateway is not gateway:
                await self._undo(gateway, mapped)
        self._set(PortMappings(state=MappingState.MAPPED, gateway=gateway.host, way=gateway.way, mapped=tuple(mapped)))

    async def _undo(self, gateway: Gateway, mapped: list[MappedPort]) -> None:
        """What was done before the rest failed."""
        with contextlib.suppress(GatewayFailed, TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                for one in mapped:
                    await gateway.remove(one.internal_port, one.external_port)
        await gateway.close()

    async def _keep(self) -> None:
        """Renew what is due or was forgotten, and see whether the router has another address now."""
        gateway = self._gateway
        assert gateway is not None
        external_ip = check_external(await gateway.external_ip())
        now_s = asyncio.get_running_loop().time()
        kept = []
        for one in self.now.mapped:
            due = now_s >= self._renew_s[one.listener]
            if due or not await gateway.holds(one.internal_port, one.external_port):
                kept.append(await self._add(gateway, external_ip, one.listener, one.internal_port, one.external_port))
            else:
                kept.append(replace(one, external_ip=external_ip))
        self._set(replace(self.now, mapped=tuple(kept)))

    async def _add(
        self, gateway: Gateway, external_ip: str, listener: Listener, internal_port: int, external_port: int
    ) -> MappedPort:
        lease = await gateway.add(internal_port, external_port)
        self._renew_s[listener] = asyncio.get_running_loop().time() + renew_after_s(lease.lease_s)
        return MappedPort(
            listener=listener,
            internal_port=internal_port,
            external_ip=external_ip,
            external_port=lease.external_port,
            lease_s=lease.lease_s,
        )

    # -- what there is to map ----------------------------------------------------------------------------------------

    def _list_wanted(self) -> tuple[Wanted, ...]:
        """Listeners that packets from the router reach."""
        return () if self._is_public() else tuple(one for one in self._wanted if self._is_reached(one.host))

    def _own(self) -> str | None:
        interfaces = self._watch.now
        return interfaces.beside(interfaces.gateways[0]) if interfaces.gateways else None

    def _is_public(self) -> bool:
        """By IPv4; where there is none, by IPv6, which no router maps."""
        hosts = self._watch.now.hosts()
        own = self._own()
        if own is None and not any(":" not in host for host in hosts):
            return any(map(is_public, hosts))
        return own is not None and is_public(own)

    def _is_reached(self, host: str) -> bool:
        return host in (WILDCARD, self._own())

    async def _forget_gateway(self) -> None:
        """The mappings are not to be taken back: the router that knew them is not there, or has forgotten them."""
        gateway, self._gateway = self._gateway, None
        if gateway is not None:
            await gateway.close()

    def _set(self, mappings: PortMappings) -> None:
        if mappings != self.now:
            self.now = mappings
            self._ports.changed(mappings)
