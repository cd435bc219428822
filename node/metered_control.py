"""The control plane with its payload bytes counted, by direction; libp2p's own overhead is not in them."""

from collections.abc import Sequence

from shoal.node.control import REQUEST_TIMEOUT_S, ControlPlane, ControlReach, PeerAddresses
from shoal.node.metrics import Direction
from shoal.protocol.identity import PeerId


class MeteredControl:
    """A ControlPlane in front of another one. Who receives messages and questions adds to `bytes` itself."""

    def __init__(self, inner: ControlPlane) -> None:
        self.bytes: dict[Direction, int] = dict.fromkeys(Direction, 0)
        self._inner = inner

    async def start(self) -> None:
        await self._inner.start()

    async def stop(self) -> None:
        await self._inner.stop()

    def addresses(self) -> tuple[str, ...]:
        return self._inner.addresses()

    def reach(self) -> ControlReach:
        return self._inner.reach()

    def offer(self, addresses: Sequence[str]) -> None:
        self._inner.offer(addresses)

    def refresh(self) -> None:
        self._inner.refresh()

    def peers(self) -> tuple[PeerAddresses, ...]:
        return self._inner.peers()

    async def connect(self, addresses: Sequence[str]) -> PeerId:
        return await self._inner.connect(addresses)

    async def disconnect(self, peer: PeerId) -> None:
        await self._inner.disconnect(peer)

    async def send(self, peer: PeerId, payload: bytes) -> None:
        self.bytes[Direction.SENT] += len(payload)
        await self._inner.send(peer, payload)

    async def request(self, peer: PeerId, payload: bytes, timeout_s: float = REQUEST_TIMEOUT_S) -> bytes:
        self.bytes[Direction.SENT] += len(payload)
        answer = await self._inner.request(peer, payload, timeout_s)
        self.bytes[Direction.RECEIVED] += len(answer)
        return answer

    async def publish(self, payload: bytes) -> None:
        self.bytes[Direction.SENT] += len(payload)
        await self._inner.publish(payload)

    async def provide(self, key: bytes) -> bool:
        return await self._inner.provide(key)

    async def find_providers(self, key: bytes) -> tuple[PeerAddresses, ...]:
        return await self._inner.find_providers(key)

    async def find_peer(self, peer: PeerId) -> PeerAddresses | None:
        return await self._inner.find_peer(peer)
