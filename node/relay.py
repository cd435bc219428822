"""A bootstrap and relay node: introduces peers to each other, and carries control connections for those that nobody can
dial. It holds no state of a swarm and needs no torch.

With a swarm it also takes part in that swarm's gossip, announces itself in the DHT under the swarm's keys and connects
to members. It reads no messages: who asks it for a manifest is refused, and finds members through its DHT.

Invariants: nobody else can make the start fail; after `run` returns no task or thread of it is left.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine, Iterable
from importlib.metadata import version

import prometheus_client
from aiohttp import web
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from shoal.dht.addresses import parse_address
from shoal.dht.announcements import Announce, AnnouncementSchedule, LookUp
from shoal.node.config import NodeConfig
from shoal.node.control import (
    BootstrapFailed,
    ControlHandlers,
    ControlPlane,
    ControlReach,
    PeerUnreachable,
)
from shoal.node.control_setup import make_control_config
from shoal.node.interfaces import InterfaceWatch
from shoal.node.libp2p_host import Libp2pHost
from shoal.node.metrics import CONTENT_TYPE
from shoal.node.reachability import ReachState
from shoal.node.running import forget_running, note_running
from shoal.node.status import Verdict
from shoal.node.task_set import TaskSet
from shoal.node.web import WebPort, answer_verdict
from shoal.protocol.errors import ProtocolError, Refusal, ShoalError
from shoal.protocol.identity import Identity, PeerId
from shoal.protocol.manifest import parse_uri

NO_SWARM = bytes(32)
DISCOVERY_PERIOD_S = 5.0
MEMBERS_WANTED = 16

log = logging.getLogger("shoal")


class RelayFailed(ShoalError):
    """The node has come to its end by a mistake of its own."""


class RelayNode:
    """`run` it once; `stop` from a signal handler or a test."""

    def __init__(self, config: NodeConfig, identity: Identity) -> None:
        self._config = config
        self._identity = identity
        uri = parse_uri(config.node.swarm) if config.node.swarm else None
        self._swarm = uri.swarm if uri else None
        bootstraps = (*(uri.bootstraps if uri else ()), *config.control.bootstraps)
        control = make_control_config(
            config.control, identity, self._swarm or NO_SWARM, tuple(dict.fromkeys(bootstraps)), relays_unconfirmed=True
        )
        handlers = ControlHandlers(
            on_message=lambda peer, payload: None,
            on_request=_refuse,
            on_presence=lambda peer, payload: None,
            on_peer_connected=lambda peer: self._note_peers(),
            on_peer_lost=lambda peer: self._note_peers(),
            on_bootstrap_failed=_tell_failed,
            on_reach_changed=self._tell_reach,
            on_crashed=self._crashed,
        )
        self.control: ControlPlane = Libp2pHost(control, handlers)
        self._schedule = AnnouncementSchedule(self._swarm or NO_SWARM, identity.peer, time.time())
        self._failure = ""
        self._is_running = False
        self._told: tuple[object, ...] = ()
        self._stop = asyncio.Event()
        self._tasks = TaskSet()
        self._started = time.monotonic()
        self.web_port = 0

    def stop(self) -> None:
        """Leave gracefully; `run` returns when that is done."""
        self._stop.set()

    async def run(self, on_ready: Callable[["RelayNode"], None]) -> None:
        """Start, serve until `stop`, leave. Raises ConfigError for what a person must mend."""
        port = WebPort(self._config.web.host, self._config.web.port, self._routes())
        try:
            await self.control.start()
            self._is_running = True
            self._note_peers()
            self.web_port = await port.start()
            note_running(self._config.data_path, self._config.web.host, self.web_port)
            watch = InterfaceWatch()
            watch.subscribe(lambda _: self.control.refresh())
            works: list[Coroutine[object, object, object]] = [watch.run()]
            if self._swarm is not None:
                works.append(self._discover())
            for work in works:
                self._tasks.spawn(work)
            on_ready(self)
            self._told = (self.control.reach().state, self.addresses())
            await self._stop.wait()
            if self._failure:
                # A service manager starts it again; nothing of worth is held here.
                raise RelayFailed(self._failure)
            log.info("stopping: %d peers lose this relay and ask another", self.control.reach().served.reservations)
        finally:
            self._is_running = False
            await self._tasks.end()
            await port.stop()
            forget_running(self._config.data_path)
            await self.control.stop()

    def addresses(self) -> tuple[str, ...]:
        """What volunteers put into their configuration: those that everybody can dial, where there are such."""
        direct = [text for text in self.control.addresses() if not parse_address(text).is_relayed]
        return tuple(text for text in direct if parse_address(text).is_global) or tuple(direct)

    # -- the swarm's DHT keys

    async def _discover(self) -> None:
        while True:
            for intent in self._schedule.poll(time.time()):
                match intent:
                    case Announce():
                        stored = await self.control.provide(intent.key)
                        self._schedule.note_announced(stored, time.time())
                    case LookUp():
                        self._schedule.note_looked_up(await self._meet(intent.keys), time.time())
            await asyncio.sleep(DISCOVERY_PERIOD_S)

    async def _meet(self, keys: Iterable[bytes]) -> int:
        """Connect to members, so that presences find their way through here; how many are new."""
        met = 0
        for key in keys:
            for one in await self.control.find_providers(key):
                connected = {known.peer for known in self.control.peers()}
                if one.peer in connected or not one.addresses or len(connected) >= MEMBERS_WANTED:
                    continue
                with contextlib.suppress(PeerUnreachable):
                    await self.control.connect(one.addresses)
                    met += 1
        return met

    def _note_peers(self) -> None:
        if not self._is_running:
            return
        self._schedule.note_peers(len(self.control.peers()), time.time())

    # -- what is told

    def _tell_reach(self) -> None:
        if not self._is_running:
            return
        reach = self.control.reach()
        told = (reach.state, self.addresses())
        if told == self._told:
            return
        self._told = told
        if reach.state is ReachState.PRIVATE:
            log.warning("others cannot dial this relay: open its port, or give --announce where it is another address")
        for text in self.addresses():
            log.info("%s: %s", "others have dialled" if _is_confirmed(text, reach) else "address", text)

    def _crashed(self, detail: str) -> None:
        self._failure = f"the control plane has stopped: {detail}"
        self.stop()

    def _routes(self) -> dict[str, Callable[[web.Request], Coroutine[object, object, web.StreamResponse]]]:
        registry = prometheus_client.CollectorRegistry()
        registry.register(RelayCollector(self))
        prometheus_client.ProcessCollector(registry=registry)

        async def serve_metrics(_: web.Request) -> web.StreamResponse:
            body = prometheus_client.generate_latest(registry)
            return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE})

        async def serve_health(_: web.Request) -> web.StreamResponse:
            return answer_verdict(Verdict(reasons=(self._failure,) if self._failure else ()))

        async def serve_readiness(_: web.Request) -> web.StreamResponse:
            state = self.control.reach().state
            reasons = () if state is ReachState.REACHABLE else (f"whether others can dial it is {state}",)
            return answer_verdict(Verdict(reasons=reasons))

        return {"/metrics": serve_metrics, "/healthz": serve_health, "/readyz": serve_readiness}


class RelayCollector(Collector):
    """The relay's series, made anew at each scrape."""

    def __init__(self, node: RelayNode) -> None:
        self._node = node

    def collect(self) -> Iterable[Metric]:
        reach, peers = self._node.control.reach(), self._node.control.peers()
        build = GaugeMetricFamily("shoal_build_info", "1, with the version.", labels=["version"])
        build.add_metric([version("shoal")], 1)
        state = GaugeMetricFamily(
            "shoal_control_reachability", "1 for whether others can dial the control port.", labels=["state"]
        )
        for one in ReachState:
            state.add_metric([one], reach.state is one)
        yield build
        yield state
        for name, text, value in (
            ("shoal_relay_connections", "Peers that are connected.", len(peers)),
            ("shoal_relay_reservations", "Peers that are reached through this one.", reach.served.reservations),
            ("shoal_relay_circuits", "Control connections of others that it carries.", reach.served.circuits),
        ):
            yield GaugeMetricFamily(name, text, value=value)
        yield CounterMetricFamily(
            "shoal_relayed_bytes", "Bytes of such connections, both ways.", value=reach.served.relayed_bytes
        )


async def _refuse(peer: PeerId, question: bytes) -> bytes:
    raise ProtocolError(Refusal.UNKNOWN_TYPE, "a relay answers no questions")


def _tell_failed(failed: BootstrapFailed) -> None:
    if failed.attempts == 1:
        log.warning("%s: %s (%s); it is tried again", failed.failure, failed.address, failed.detail)


def _is_confirmed(text: str, reach: ControlReach) -> bool:
    return text.partition("/p2p/")[0] in reach.confirmed
