"""What one tensor link asks of the table that it stands in: limits, the sink, and where to be counted."""

import asyncio
from collections.abc import Coroutine
from typing import Protocol, TypeVar

from shoal.node.link_pacing import StreamTurns
from shoal.node.link_port import LinkConfig, LinkSink
from shoal.node.link_traffic import PeerTraffic
from shoal.node.pacer import Pacer
from shoal.protocol.errors import Refusal
from shoal.protocol.identity import PeerId

L = TypeVar("L", contravariant=True)  # node.link_protocol.Link, which imports this module


class LinkHost(Protocol[L]):
    """What a link needs of the table that it stands in."""

    config: LinkConfig
    sink: LinkSink
    stopping: bool
    upload: Pacer
    download: Pacer
    turns: StreamTurns

    def connected(self, link: L) -> bool:
        """The socket is connected; False ends the link before its handshake."""

    def divert(self, transport: asyncio.Transport, first: memoryview) -> bool:
        """Whether an accepted connection that begins with these bytes is no link, and somebody else has it now."""

    def link_opened(self, link: L, peer: PeerId) -> Refusal | None:
        """The handshake has proven `peer`; a refusal ends the link."""

    def sent(self, peer: PeerId) -> None:
        """A payload to this peer is sent, or has failed."""

    def link_ended(self, link: L) -> None:
        """The link takes and brings nothing more."""

    def traffic_with(self, peer: PeerId) -> PeerTraffic:
        """The counters of this peer."""

    def disconnected(self, link: L) -> None:
        """The link's socket is gone."""

    def spawn(self, work: Coroutine[None, None, None]) -> object:
        """Run this as a task that ends with the table."""


class ConnectionTaker(Protocol):
    """Who shares the listening port with the links."""

    def take_connection(self, transport: asyncio.BaseTransport, first: memoryview) -> bool:
        """Whether a connection that begins with these bytes is its own; it is then taken over."""

    async def close(self) -> None:
        """Every connection that it has taken over is gone on return."""
