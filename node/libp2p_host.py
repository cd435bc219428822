"""The control plane over libp2p: the asyncio face of a py-libp2p node that runs in a trio thread of its own.

Nothing of libp2p is imported before `start`. Invariant: everything here runs on the loop that called `start`.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from shoal.dht.addresses import parse_address, parse_peer_address
from shoal.node.control import (
    FRAME_BYTES_MAX,
    PRESENCE_BYTES_MAX,
    REQUEST_TIMEOUT_S,
    SEND_TIMEOUT_S,
    STOP_TIMEOUT_S,
    ControlConfig,
    ControlHandlers,
    ControlReach,
    ControlStopped,
    PeerAddresses,
    PeerUnreachable,
)
from shoal.node.libp2p_thread import TrioThread
from shoal.protocol.errors import Failure, UriError
from shoal.protocol.identity import PeerId, short_peer_id

if TYPE_CHECKING:
    from shoal.node.libp2p_engine import ControlEngine

_log = logging.getLogger(__name__)


class Libp2pHost:
    """A ControlPlane on the network. Starts once and stops once."""

    def __init__(self, config: ControlConfig, handlers: ControlHandlers) -> None:
        self._config = config
        self._handlers = handlers
        name = f"libp2p {short_peer_id(config.identity.peer)}"
        self._thread: TrioThread[ControlEngine] = TrioThread(name, self._note_crash)
        self._engine: ControlEngine | None = None

    async def start(self) -> None:
        """As ControlPlane; raises UriError for a malformed bootstrap address."""
        self._engine = await self._thread.start(self._run_engine)

    async def stop(self) -> None:
        """As ControlPlane."""
        self._engine = None
        if not await self._thread.stop(STOP_TIMEOUT_S):
            _log.warning("the libp2p thread did not end within %.0f s and is left behind", STOP_TIMEOUT_S)

    def addresses(self) -> tuple[str, ...]:
        """As ControlPlane."""
        return self._running().addresses

    def reach(self) -> ControlReach:
        """As ControlPlane."""
        return self._running().reach()

    def offer(self, addresses: Sequence[str]) -> None:
        """As ControlPlane."""
        self._thread.post(self._running().offer, [parse_address(text) for text in addresses])

    def refresh(self) -> None:
        """As ControlPlane."""
        self._thread.post(self._running().refresh)

    def peers(self) -> tuple[PeerAddresses, ...]:
        """As ControlPlane."""
        return self._running().peers

    async def connect(self, addresses: Sequence[str]) -> PeerId:
        """As ControlPlane."""
        targets = [parse_peer_address(text) for text in addresses]
        peers = {peer for peer, _ in targets}
        if len(peers) != 1:
            raise UriError("multiaddr", f"{len(peers)} peers are named, not one", "give addresses of one peer")
        (peer,) = peers
        await self._thread.call(self._running().connect, peer, [address for _, address in targets])
        return peer

    async def disconnect(self, peer: PeerId) -> None:
        """As ControlPlane."""
        await self._thread.call(self._running().disconnect, peer)

    async def send(self, peer: PeerId, payload: bytes) -> None:
        """As ControlPlane."""
        assert len(payload) <= FRAME_BYTES_MAX, f"a message of {len(payload)} bytes"
        handover = self._thread.open_handover()
        self._thread.post(self._running().send, peer, payload, handover)
        try:
            async with asyncio.timeout(SEND_TIMEOUT_S):
                await handover.wait()
        except TimeoutError as error:
            raise PeerUnreachable(peer, Failure.PEER_SLOW, f"took nothing for {SEND_TIMEOUT_S:g} s") from error

    async def request(self, peer: PeerId, payload: bytes, timeout_s: float = REQUEST_TIMEOUT_S) -> bytes:
        """As ControlPlane."""
        assert len(payload) <= FRAME_BYTES_MAX, f"a question of {len(payload)} bytes"
        try:
            async with asyncio.timeout(timeout_s):
                return await self._thread.call(self._running().request, peer, payload)
        except TimeoutError as error:
            raise PeerUnreachable(peer, Failure.PEER_SLOW, f"no answer within {timeout_s:g} s") from error

    async def publish(self, payload: bytes) -> None:
        """As ControlPlane."""
        assert len(payload) <= PRESENCE_BYTES_MAX, f"a presence of {len(payload)} bytes"
        await self._thread.call(self._running().publish, payload)

    async def provide(self, key: bytes) -> bool:
        """As ControlPlane."""
        return await self._thread.call(self._running().discovery.provide, key)

    async def find_providers(self, key: bytes) -> tuple[PeerAddresses, ...]:
        """As ControlPlane."""
        return await self._thread.call(self._running().discovery.find_providers, key)

    async def find_peer(self, peer: PeerId) -> PeerAddresses | None:
        """As ControlPlane."""
        return await self._thread.call(self._running().discovery.find_peer, peer)

    def _running(self) -> "ControlEngine":
        if self._engine is None:
            raise ControlStopped("the control plane is not running")
        return self._engine

    @asynccontextmanager
    async def _run_engine(self) -> AsyncIterator["ControlEngine"]:
        # Runs in trio. The import takes a second of this thread, not of the loop.
        from shoal.node.libp2p_engine import ControlEngine

        async with ControlEngine(self._config, self._handlers, self._thread).running() as engine:
            yield engine

    def _note_crash(self, error: BaseException) -> None:
        self._engine = None
        _log.error("the libp2p host crashed", exc_info=error)
        self._handlers.on_crashed(f"{type(error).__name__}: {error}")
