"""What lies around this machine: its networks, its router, its LAN. Watches them, and tells the rest of the daemon.

Invariants: nothing here can make a start fail or wait; mapped ports are only offered as candidates, which count once
others have dialled them; whoever is found on the LAN is dialled like any other address that nobody vouches for.
"""

import asyncio
import importlib
import logging
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import TYPE_CHECKING

from shoal.dht.addresses import parse_address
from shoal.node.config import NodeConfig
from shoal.node.control import ControlPlane, ControlStopped, PeerUnreachable
from shoal.node.endpoints import is_loopback
from shoal.node.happenings import REMEDIES, HappeningKind, Severity
from shoal.node.interfaces import InterfaceWatch
from shoal.node.port_mapping import Listener, MappingFailure, MappingState, PortMappings, Way
from shoal.node.portmap import PortMapper, PortMapperPorts, Wanted
from shoal.node.status import RouterStatus, clean_text
from shoal.protocol.errors import Failure, UriError
from shoal.protocol.identity import PeerId, short_peer_id

if TYPE_CHECKING:
    from shoal.node.mdns import Found, Mdns

Endpoint = tuple[str, int]

log = logging.getLogger(__name__)


class Surroundings:
    """All calls on the event loop, once the control plane has started. `begin` when there is somebody to tell."""

    def __init__(
        self,
        config: NodeConfig,
        me: PeerId,
        swarm: bytes,
        control: ControlPlane,
        happen: Callable[[HappeningKind, str, Severity], None],
        spawn: Callable[[Coroutine[object, object, object]], None],
    ) -> None:
        self.interfaces = InterfaceWatch()
        self.mappings = PortMappings(state=MappingState.OFF)
        self.failures: Counter[tuple[Way, MappingFailure]] = Counter()
        self._config = config
        self._me = me
        self._swarm = swarm
        self._control = control
        self._happen = happen
        self._spawn = spawn
        self._mapper: PortMapper | None = None
        self._mdns: Mdns | None = None
        self._told: tuple[MappingState, Failure | None] | None = None
        self._set_mapped: Callable[[str, Endpoint | None], None] = lambda source, address: None
        self._hear: Callable[[PeerId, tuple[str, ...]], None] | None = None

    def start(self) -> None:
        """Watch the networks, and look for the swarm on the LAN."""
        self._spawn(self.interfaces.run())
        if self._config.lan.mdns and not is_loopback(self._config.control.host):
            self._spawn(self._search_lan())

    def begin(
        self,
        tensor: Endpoint,
        set_mapped: Callable[[str, Endpoint | None], None],
        hear: Callable[[PeerId, tuple[str, ...]], None],
    ) -> None:
        """Ask the router for ports, that of the tensor links is bound to `tensor`. From now on `hear` is told who was
        found; before, nobody knows of any peers and they are dialled at once."""
        self._set_mapped, self._hear = set_mapped, hear
        wanted = list_wanted(self._config, self._control.addresses(), tensor) if self._config.nat.port_mapping else ()
        ports = PortMapperPorts(changed=self._mappings_changed, failed=self._mapping_failed)
        self._mapper = PortMapper(wanted, self.interfaces, ports)
        self.mappings = self._mapper.now
        self._spawn(self._mapper.run())

    async def close(self) -> None:
        """After what was spawned has ended: the router forgets the mappings."""
        if self._mapper is not None:
            await self._mapper.close()

    @property
    def lan_peers(self) -> int:
        """How many peers of the swarm were found on the LAN; the oldest are forgotten."""
        return 0 if self._mdns is None else len(self._mdns.found)

    def router_status(self) -> RouterStatus:
        """What is to be told of the router."""
        now = self.mappings
        return RouterStatus(
            state=now.state,
            reason="" if now.failure is None else now.failure.value,
            detail=clean_text(now.describe()),
            addresses=tuple(f"{one.external_ip}:{one.external_port}" for one in now.mapped),
        )

    def warning(self) -> str | None:
        """What a person should know of the router and would not look for."""
        if self.mappings.failure is not Failure.DOUBLE_NAT:
            return None
        return f"{clean_text(self.mappings.describe())}; {REMEDIES[Failure.DOUBLE_NAT]}"

    # -- the LAN -----------------------------------------------------------------------------------------------------

    async def _search_lan(self) -> None:
        # A tenth of a second and some megabytes.
        mdns = await asyncio.to_thread(importlib.import_module, "shoal.node.mdns")
        ports = mdns.MdnsPorts(addresses=self._lan_addresses, found=self._found, failed=self._no_multicast)
        self._mdns = mdns.Mdns(self._me, self._swarm, self.interfaces, ports)
        await self._mdns.run()

    def _found(self, found: "Found") -> None:
        log.info("%s of this swarm is on the LAN", short_peer_id(found.peer))
        if self._hear is not None:
            self._hear(found.peer, found.addresses)
        else:
            self._spawn(self._dial(found))

    async def _dial(self, found: "Found") -> None:
        """It may have the manifest."""
        try:
            await self._control.connect(found.addresses)
        except (PeerUnreachable, UriError) as error:
            log.debug("%s", error)

    def _lan_addresses(self) -> tuple[str, ...]:
        hosts = self.interfaces.now.hosts()
        own = (parse_address(text) for text in self._control.addresses())
        return tuple(str(replace(one, peer=self._me)) for one in own if one.host in hosts and not one.is_relayed)

    def _no_multicast(self, failure: Failure, detail: str) -> None:
        self._happen(HappeningKind.NETWORK, f"{failure}: {detail}; {REMEDIES[failure]}", Severity.INFO)

    # -- the router --------------------------------------------------------------------------------------------------

    def _mapping_failed(self, way: Way, failure: Failure) -> None:
        self.failures[way, MappingFailure(failure)] += 1

    def _mappings_changed(self, mappings: PortMappings) -> None:
        self.mappings = mappings
        tensor = mappings.addresses(Listener.TENSOR)
        self._set_mapped("router", (tensor[0].host, tensor[0].port) if tensor else None)
        try:
            self._control.offer(tuple(str(one) for one in mappings.addresses(Listener.CONTROL)))
        except ControlStopped:
            log.debug("mapped ports are not offered: the control plane has stopped")
        told = mappings.state, mappings.failure
        if mappings.state is MappingState.MAPPED or (mappings.state is MappingState.FAILED and told != self._told):
            severity = Severity.WARNING if mappings.failure is Failure.DOUBLE_NAT else Severity.INFO
            self._happen(HappeningKind.NETWORK, mappings.describe(), severity)
        self._told = told


def list_wanted(config: NodeConfig, control: tuple[str, ...], tensor: Endpoint) -> tuple[Wanted, ...]:
    """The listeners that others are to dial by way of a router, but for those whose address a person has given."""
    wanted = []
    ports = [one.port for one in map(parse_address, control) if one.net == "ip4" and not one.is_relayed]
    if not config.control.announce and not is_loopback(config.control.host) and ports:
        host = _ipv4_wildcard(config.control.host)
        wanted.append(Wanted(listener=Listener.CONTROL, host=host, port=config.control.port or ports[0]))
    given = config.tensor.announce_host is not None or config.tensor.announce_port
    if not given and not is_loopback(tensor[0]):
        wanted.append(Wanted(listener=Listener.TENSOR, host=_ipv4_wildcard(tensor[0]), port=tensor[1]))
    return tuple(wanted)


def _ipv4_wildcard(host: str) -> str:
    """Either wildcard stands for both families."""
    return "0.0.0.0" if host == "::" else host
