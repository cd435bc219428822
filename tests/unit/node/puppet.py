"""A peer whose every move is the test's: what liars, laggards and strangers do, over the real planes."""

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TypeVar

from shoal.node.control import ControlConfig, ControlHandlers
from shoal.node.links import TensorLinks
from shoal.protocol.errors import ProtocolError, Refusal
from shoal.protocol.frames import FrameHeader
from shoal.protocol.identity import PeerId
from shoal.protocol.messages import (
    Presence,
    SignedReady,
    decode_message_untrusted,
    encode_message,
    sign_message,
)
from tests.unit.node.link_harness import RecordingSink
from tests.unit.node.node_samples import LINKS, Peer, Swarm
from tests.unit.node.planes import MakeControl, in_memory
from tests.unit.protocol.samples import IDENTITIES

M = TypeVar("M")


class Puppet:
    """Control messages, presences and frames as the test makes them."""

    def __init__(
        self, swarm: Swarm, number: int, *, speaks_for: bytes | None = None, make_control: MakeControl = in_memory
    ) -> None:
        self.swarm = swarm
        self.identity = IDENTITIES[number]
        self.me = self.identity.peer
        self.messages: list[object] = []
        self.payloads: list[bytes] = []
        self.answer: Callable[[PeerId, bytes], Awaitable[bytes]] = self._refuse
        self.sink = RecordingSink()
        self.links = TensorLinks(self.identity, swarm.id, LINKS, self.sink)
        self._speaks_for = swarm.id if speaks_for is None else speaks_for
        self._sequence = 0
        config = ControlConfig(identity=self.identity, swarm=swarm.id, listen=("/ip4/127.0.0.1/tcp/0",))
        handlers = ControlHandlers(
            on_message=self._hear,
            on_request=lambda peer, raw: self.answer(peer, raw),
            on_presence=lambda peer, raw: None,
            on_peer_connected=lambda peer: None,
            on_peer_lost=lambda peer: None,
        )
        self.control = make_control(swarm.network, config, handlers)

    def _hear(self, peer: PeerId, payload: bytes) -> None:
        self.payloads.append(payload)
        self.messages.append(decode_message_untrusted(self.swarm.id, payload))

    async def _refuse(self, peer: PeerId, raw: bytes) -> bytes:
        raise ProtocolError(Refusal.NOT_READY, "a puppet answers when it is told what")

    def heard(self, kind: type[M]) -> list[M]:
        """The messages of this kind that it got."""
        return [message for message in self.messages if isinstance(message, kind)]

    def encode(self, message: object) -> bytes:
        """The bytes of a message of the swarm that it speaks for."""
        return encode_message(self._speaks_for, message)

    async def tell(self, peer: Peer, *messages: object) -> None:
        for message in messages:
            await self.control.send(peer.me, self.encode(message))

    def make_presence(self, peer: Peer, ready: SignedReady | None = None, **changes: object) -> Presence:
        """A newer presence of a trainer at the head of `peer`."""
        self._sequence += 1
        head = peer.core.head
        presence = Presence(
            peer=self.me,
            incarnation=1,
            sequence=self._sequence,
            sent_at_s=time.time(),
            agent="puppet/1 judy",
            trains=True,
            leaving=False,
            head_round=head.round,
            head_digest=head.digest,
            state_root=head.state_root,
            attempt=0,
            phase="gather",
            tensor_addresses=(),
            control_addresses=self.control.addresses(),
            tokens_per_s=1.0,
            ready=ready,
        )
        return sign_message(self.identity, self.swarm.id, replace(presence, **changes))  # type: ignore[arg-type]

    def show(self, peer: Peer, ready: SignedReady | None = None, **changes: object) -> None:
        """Let `peer` take a presence of it."""
        peer.membership.take_presence(self.encode(self.make_presence(peer, ready, **changes)), self.me)

    async def push(self, peer: Peer, header: FrameHeader, payload: bytes) -> None:
        """Send a frame over a tensor link."""
        await self.links.send(peer.me, self.swarm.addresses_of(peer.me), header, memoryview(payload))


@asynccontextmanager
async def open_puppet(
    swarm: Swarm,
    number: int,
    *peers: Peer,
    speaks_for: bytes | None = None,
    make_control: MakeControl = in_memory,
) -> AsyncIterator[Puppet]:
    """A puppet with control connections to `peers`."""
    puppet = Puppet(swarm, number, speaks_for=speaks_for, make_control=make_control)
    await puppet.control.start()
    swarm.addresses[puppet.me] = await puppet.links.start()
    try:
        for peer in peers:
            await puppet.control.connect(peer.control.addresses())
        yield puppet
    finally:
        await puppet.links.stop()
        await puppet.control.stop()
