"""An in-memory ControlPlane: the same port as the libp2p host, without sockets, threads or waiting.

Every plane of one MemoryNetwork lives on one asyncio loop. Gossip reaches whoever a chain of connections leads to, and
so does the DHT. Delivery is by `call_soon`, so a handler never runs within the call that caused it.
"""

import asyncio
from collections.abc import Callable, Iterator, Sequence

from shoal.dht.addresses import Address, parse_address, parse_peer_address
from shoal.node.control import (
    FRAME_BYTES_MAX,
    PRESENCE_BYTES_MAX,
    PROVIDERS_MAX,
    REQUEST_TIMEOUT_S,
    BootstrapFailed,
    ControlConfig,
    ControlHandlers,
    ControlReach,
    ControlStopped,
    PeerAddresses,
    PeerUnreachable,
    RequestRefused,
)
from shoal.node.reachability import ReachState
from shoal.protocol.errors import ConfigError, Failure, ProtocolError, Refusal, UriError
from shoal.protocol.identity import PeerId


class MemoryNetwork:
    """Who listens where. `ports` are given out from 1 up."""

    def __init__(self) -> None:
        self.planes: dict[PeerId, MemoryControl] = {}
        self.listening: dict[tuple[str, int], PeerId] = {}
        self.providers: dict[bytes, set[PeerId]] = {}
        self._ports = 0
        self._grown = asyncio.Event()

    async def wait_grown(self) -> None:
        """Until somebody else listens."""
        await self._grown.wait()

    def listen(self, config: ControlConfig) -> list[Address]:
        """The concrete addresses of a new plane; raises ConfigError when one is taken."""
        bound = []
        for address in map(parse_address, config.listen):
            port = address.port or self._free_port()
            if (address.host, port) in self.listening:
                problem = f"port {port} of {address.host} is in use by another program"
                raise ConfigError(config.listen_field, problem, "choose another port, or 0 for any that is free")
            bound.append(Address(net=address.net, host=address.host, port=port, peer=config.identity.peer))
        for address in bound:
            self.listening[address.host, address.port] = config.identity.peer
        self._grown.set()
        self._grown = asyncio.Event()
        return bound

    def _free_port(self) -> int:
        self._ports += 1
        return self._ports


class MemoryControl:
    """A ControlPlane over a MemoryNetwork."""

    def __init__(self, network: MemoryNetwork, config: ControlConfig, handlers: ControlHandlers) -> None:
        self._network = network
        self._config = config
        self._handlers = handlers
        self._me = config.identity.peer
        self._addresses: tuple[str, ...] = ()
        self._connected: dict[PeerId, MemoryControl] = {}
        self._dialled: set[PeerId] = set()
        self._is_running = False
        self._bootstraps: list[asyncio.Task[None]] = []
        self._requests: set[asyncio.Task[bytes]] = set()
        self._lost: dict[PeerId, asyncio.Event] = {}

    async def start(self) -> None:
        targets = [parse_peer_address(text) for text in self._config.bootstrap]
        self._addresses = tuple(str(address) for address in self._network.listen(self._config))
        self._network.planes[self._me] = self
        self._is_running = True
        for peer, address in targets:
            if peer != self._me:
                self._bootstraps.append(asyncio.create_task(self._keep_bootstrapped(peer, str(address))))

    async def stop(self) -> None:
        if not self._is_running:
            return
        self._is_running = False
        for task in (*self._bootstraps, *self._requests):
            task.cancel()
        for peer in tuple(self._connected):
            self._hang_up(peer)
        del self._network.planes[self._me]
        listening = self._network.listening
        for place in [place for place, peer in listening.items() if peer == self._me]:
            del listening[place]

    def addresses(self) -> tuple[str, ...]:
        self._check_running()
        return self._addresses

    def reach(self) -> ControlReach:
        self._check_running()
        return ControlReach(state=ReachState.REACHABLE, confirmed=self._addresses)

    def offer(self, addresses: Sequence[str]) -> None:
        self._check_running()
        for text in addresses:
            parse_address(text)

    def refresh(self) -> None:
        self._check_running()

    def peers(self) -> tuple[PeerAddresses, ...]:
        self._check_running()
        return tuple(
            PeerAddresses(peer=peer, addresses=plane._addresses, dialled=peer in self._dialled)
            for peer, plane in self._connected.items()
        )

    async def connect(self, addresses: Sequence[str]) -> PeerId:
        targets = [parse_peer_address(text) for text in addresses]
        if len({peer for peer, _ in targets}) != 1:
            raise UriError("multiaddr", "not exactly one peer is named", "give addresses of one peer")
        self._check_running()
        peer = targets[0][0]
        if peer in self._connected:
            return peer
        for _, address in targets:
            if peer != self._me and self._network.listening.get((address.host, address.port)) == peer:
                self._dialled.add(peer)
                self._join(self._network.planes[peer])
                return peer
        raise PeerUnreachable(peer, Failure.PEER_UNREACHABLE, "nobody listens there")

    async def disconnect(self, peer: PeerId) -> None:
        self._check_running()
        self._hang_up(peer)

    async def send(self, peer: PeerId, payload: bytes) -> None:
        assert len(payload) <= FRAME_BYTES_MAX, f"a message of {len(payload)} bytes"
        target = self._find_connected(peer)
        target._deliver(target._handlers.on_message, self._me, payload)

    async def request(self, peer: PeerId, payload: bytes, timeout_s: float = REQUEST_TIMEOUT_S) -> bytes:
        assert len(payload) <= FRAME_BYTES_MAX, f"a question of {len(payload)} bytes"
        target = self._find_connected(peer)
        task = asyncio.ensure_future(target._handlers.on_request(self._me, payload))
        self._requests.add(task)
        try:
            async with asyncio.timeout(timeout_s):
                answer = await asyncio.shield(task)
        except TimeoutError as error:
            raise PeerUnreachable(peer, Failure.PEER_SLOW, f"no answer within {timeout_s:g} s") from error
        except ProtocolError as error:
            raise RequestRefused(peer, error.refusal) from error
        except asyncio.CancelledError:
            if self._is_running:
                raise
            raise ControlStopped("the control plane stopped") from None
        finally:
            self._requests.discard(task)
            task.cancel()
        assert len(answer) <= FRAME_BYTES_MAX, f"an answer of {len(answer)} bytes"
        return answer

    async def publish(self, payload: bytes) -> None:
        assert len(payload) <= PRESENCE_BYTES_MAX, f"a presence of {len(payload)} bytes"
        self._check_running()
        reached, frontier = {self._me}, [self]
        while frontier:
            forwarder = frontier.pop()
            for peer, plane in forwarder._connected.items():
                if peer in reached or plane._config.swarm != self._config.swarm:
                    continue
                reached.add(peer)
                try:
                    plane._handlers.check_presence(self._me, payload)
                except ProtocolError as error:
                    plane._deliver(plane._handlers.on_misbehaviour, forwarder._me, error)
                    continue
                plane._deliver(plane._handlers.on_presence, self._me, payload)
                frontier.append(plane)

    async def provide(self, key: bytes) -> bool:
        self._check_running()
        self._network.providers.setdefault(key, set()).add(self._me)
        return bool(self._connected)

    async def find_providers(self, key: bytes) -> tuple[PeerAddresses, ...]:
        self._check_running()
        providers = self._network.providers.get(key, set())
        found = sorted((plane for plane in self._reachable() if plane._me in providers), key=lambda plane: plane._me)
        return tuple(PeerAddresses(peer=plane._me, addresses=plane._addresses) for plane in found[:PROVIDERS_MAX])

    async def find_peer(self, peer: PeerId) -> PeerAddresses | None:
        self._check_running()
        found = next((plane for plane in self._reachable() if plane._me == peer), None)
        return PeerAddresses(peer=peer, addresses=found._addresses) if found else None

    def _reachable(self) -> Iterator["MemoryControl"]:
        reached, frontier = {self._me}, [self]
        while frontier:
            for peer, plane in frontier.pop()._connected.items():
                if peer not in reached:
                    reached.add(peer)
                    frontier.append(plane)
                    yield plane

    def _find_connected(self, peer: PeerId) -> "MemoryControl":
        self._check_running()
        if peer not in self._connected:
            raise PeerUnreachable(peer, Failure.PEER_UNREACHABLE, "no address is known")
        return self._connected[peer]

    def _check_running(self) -> None:
        if not self._is_running:
            raise ControlStopped("the control plane is not running")

    def _deliver(self, handler: Callable[..., None], *args: object) -> None:
        asyncio.get_running_loop().call_soon(handler, *args)

    def _join(self, other: "MemoryControl") -> None:
        for plane, peer in ((self, other), (other, self)):
            plane._connected[peer._me] = peer
            plane._lost[peer._me] = asyncio.Event()
            plane._deliver(plane._handlers.on_peer_connected, peer._me)

    def _hang_up(self, peer: PeerId) -> None:
        other = self._connected.get(peer)
        if other is None:
            return
        for plane, lost in ((self, other), (other, self)):
            del plane._connected[lost._me]
            plane._dialled.discard(lost._me)
            plane._lost.pop(lost._me).set()
            plane._deliver(plane._handlers.on_peer_lost, lost._me)

    async def _keep_bootstrapped(self, peer: PeerId, address: str) -> None:
        """Dialled again as soon as that can lead somewhere, not by a clock."""
        attempts = 0
        while True:
            try:
                await self.connect([address])
                attempts = 0
                await self._lost[peer].wait()
            except PeerUnreachable as error:
                attempts += 1
                failed = BootstrapFailed(address=address, detail=error.detail, attempts=attempts, retry_s=0.0)
                self._deliver(self._handlers.on_bootstrap_failed, failed)
                await self._network.wait_grown()


def refuse_presence(marker: bytes) -> Callable[[PeerId, bytes], None]:
    """A `check_presence` that refuses payloads with this content."""

    def check(source: PeerId, payload: bytes) -> None:
        if payload == marker:
            raise ProtocolError(Refusal.MALFORMED, "a refused presence")

    return check
