"""py-libp2p's own Noise implementation shakes hands with a tensor link: same keys, same peer ids, our prologue."""

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
import trio.testing
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_new_x25519_key_pair
from libp2p.peer.id import ID
from libp2p.security.noise.patterns import PatternXX

from shoal.protocol.identity import Identity, PeerId, encode_libp2p_peer_id
from shoal.protocol.secure_channel import HELLO_BYTES, ChannelKeys, Handshake, SecureChannel

SWARM = b"s" * 32
PROLOGUE = b"shoal-link\x00\x00\x01AES256-GCM\x00" + SWARM
OURS = ChannelKeys(Identity(b"o" * 32), b"o" * 32)
THEIR_KEYS = create_new_key_pair(b"t" * 32)
THEIR_PEER = Identity(b"t" * 32).peer


class PipeEnd:
    """What py-libp2p takes for a raw connection: an in-memory stream."""

    def __init__(self, stream: trio.StapledStream) -> None:
        self._stream = stream

    async def read(self, n: int | None = None) -> bytes:
        return bytes(await self._stream.receive_some(n))

    async def write(self, data: bytes) -> None:
        await self._stream.send_all(data)


def make_libp2p_side() -> PatternXX:
    return PatternXX(
        local_peer=ID(encode_libp2p_peer_id(THEIR_PEER)),
        libp2p_privkey=THEIR_KEYS.private_key,
        noise_static_key=create_new_x25519_key_pair().private_key,
        prologue=PROLOGUE,
    )


def hello_of(*, dialer: bool) -> bytes:
    """The clear hello that a libp2p program would have to say first."""
    side = Handshake(ChannelKeys(Identity(b"h" * 32), b"h" * 32), SWARM, dialer=dialer, expected=PeerId(OURS.peer))
    if not dialer:
        side.receive(Handshake(OURS, SWARM, dialer=True, expected=THEIR_PEER).take_outgoing()[:HELLO_BYTES])
    return side.take_outgoing()[:HELLO_BYTES]


async def drive(ours: Handshake, stream: trio.StapledStream) -> SecureChannel:
    """Pump our side over the stream, without its hello, until the channel is there."""
    ours.receive(hello_of(dialer=not ours.dialer))
    waiting = ours.take_outgoing()[HELLO_BYTES:]
    while True:
        if waiting:
            await stream.send_all(waiting)
        channel = ours.receive(await stream.receive_some(4096))
        waiting = ours.take_outgoing()
        if channel is not None:
            if waiting:
                await stream.send_all(waiting)
            return channel


@pytest.mark.parametrize("we_dial", [True, False])
def test_libp2p_peer_completes_the_handshake(we_dial: bool) -> None:
    ours = Handshake(OURS, SWARM, dialer=we_dial, expected=THEIR_PEER)
    channels: list[SecureChannel] = []
    peers_seen: list[bytes] = []

    async def run_theirs(shake: Callable[[], Awaitable[object]]) -> None:
        session = await shake()
        peers_seen.append(session.get_remote_peer().to_bytes())  # type: ignore[attr-defined]

    async def run() -> None:
        left, right = trio.testing.memory_stream_pair()
        theirs = make_libp2p_side()
        raw: Any = PipeEnd(right)  # what of a raw connection the handshake uses
        async with trio.open_nursery() as nursery:
            if we_dial:
                nursery.start_soon(run_theirs, lambda: theirs.handshake_inbound(raw))
            else:
                expected = ID(encode_libp2p_peer_id(OURS.peer))
                nursery.start_soon(run_theirs, lambda: theirs.handshake_outbound(raw, expected))
            channels.append(await drive(ours, left))

    with_deadline(run)
    assert channels[0].peer == THEIR_PEER
    assert peers_seen == [encode_libp2p_peer_id(OURS.peer)]


def with_deadline(main: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        with trio.fail_after(30):
            await main()

    trio.run(bounded)
