"""What the library may read and keep for others: every length is looked at before anything is read for it."""

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import pytest
import trio
import trio.testing
from libp2p.host import basic_host
from libp2p.io.exceptions import IncompleteReadError, MessageTooLarge
from libp2p.kad_dht import kad_dht, peer_routing, provider_store, value_store
from libp2p.peer.id import ID
from libp2p.protocol_muxer.exceptions import MultiselectCommunicatorError
from libp2p.protocol_muxer.multiselect_communicator import MultiselectCommunicator
from multiaddr import Multiaddr

from shoal.node.libp2p_limits import (
    ADDRESSES_MAX,
    DHT_MESSAGE_BYTES_MAX,
    DHT_SILENCE_S,
    DHT_STREAMS_PER_PEER_MAX,
    IDENTIFY_BYTES_MAX,
    MULTISTREAM_BYTES_MAX,
    PROTOCOLS_MAX,
    BoundedDht,
    BoundedPeerStore,
    cap_readers,
)
from shoal.node.libp2p_stack import build_dht, build_host
from shoal.node.libp2p_streams import encode_frame
from tests.unit.node.test_libp2p_stack import CONFIG, peer_id

T = TypeVar("T")


class FakeStream:
    """Bytes that a peer has sent; then its end, or silence."""

    def __init__(self, sent: bytes, silent: bool = False) -> None:
        self._sent = sent
        self._silent = silent
        self.largest_read = 0
        self.was_reset = False

    async def read(self, n: int | None = None) -> bytes:
        assert n is not None, "nothing is read without a bound"
        self.largest_read = max(self.largest_read, n)
        taken, self._sent = self._sent[:n], self._sent[n:]
        if not taken and self._silent:
            await trio.sleep_forever()
        return taken

    async def reset(self) -> None:
        self.was_reset = True

    async def close(self) -> None:
        """Nobody reads it."""


def run(work: Callable[[], Awaitable[T]]) -> T:
    """On a clock that jumps over what would be waited for, with the readers in place."""
    cap_readers()

    async def bounded() -> T:
        with trio.fail_after(3600):
            return await work()

    return trio.run(bounded, clock=trio.testing.MockClock(autojump_threshold=0))


def announce(length: int) -> bytes:
    """The length prefix of a message that is never sent."""
    prefix = bytearray()
    while length >= 0x80:
        prefix.append(length & 0x7F | 0x80)
        length >>= 7
    return bytes((*prefix, length))


@pytest.mark.parametrize("length", [MULTISTREAM_BYTES_MAX + 1, 1 << 31, (1 << 64) - 1])
def test_a_line_of_multistream_has_a_bound(length: int) -> None:
    stream: Any = FakeStream(announce(length) + bytes(10_000))
    with pytest.raises(MultiselectCommunicatorError):
        run(MultiselectCommunicator(stream).read)
    assert stream.largest_read == 1


def test_a_line_of_multistream_is_read_as_before() -> None:
    line = b"/multistream/1.0.0\n"
    stream: Any = FakeStream(encode_frame(line) + b"rest")
    assert run(MultiselectCommunicator(stream).read) == "/multistream/1.0.0"


@pytest.mark.parametrize("sent", [b"\x03abc", b"\x01"], ids=["no line's end", "cut short"])
def test_a_broken_line_is_refused(sent: bytes) -> None:
    stream: Any = FakeStream(sent)
    with pytest.raises(MultiselectCommunicatorError):
        run(MultiselectCommunicator(stream).read)


def test_identify_has_a_bound_and_is_not_read_to_its_end_after_it() -> None:
    cap_readers()
    stream: Any = FakeStream(announce(IDENTIFY_BYTES_MAX + 1) + bytes(100_000))
    with pytest.raises(MessageTooLarge):
        run(lambda: basic_host.read_length_prefixed_protobuf(stream, use_varint_format=True))
    # The library goes on to read an answer of any length; from a stream that is reset there is none.
    assert stream.was_reset and stream.largest_read == 1
    good: Any = FakeStream(encode_frame(b"me"))
    assert run(lambda: basic_host.read_length_prefixed_protobuf(good, use_varint_format=True)) == b"me"
    assert not good.was_reset


@pytest.mark.parametrize("module", [kad_dht, peer_routing, provider_store, value_store])
def test_dht_messages_have_a_bound_and_a_time_limit(module: Any) -> None:
    cap_readers()
    large: Any = FakeStream(announce(DHT_MESSAGE_BYTES_MAX + 1))
    with pytest.raises(MessageTooLarge):
        run(lambda: module.read_varint_prefixed_bytes_limited(large, 1 << 22))
    silent: Any = FakeStream(announce(100) + b"half of it", silent=True)
    with pytest.raises(IncompleteReadError):
        run(lambda: module.read_varint_prefixed_bytes_limited(silent, 1 << 22))
    good: Any = FakeStream(encode_frame(bytes(1000)))
    assert run(lambda: module.read_varint_prefixed_bytes_limited(good, 1 << 22)) == bytes(1000)


def test_what_a_peer_says_of_itself_has_a_bound() -> None:
    store = BoundedPeerStore()
    peer = peer_id(1)
    for first in range(0, 3 * ADDRESSES_MAX, ADDRESSES_MAX):
        ports = range(1 + first, 1 + first + ADDRESSES_MAX)
        store.add_addrs(peer, [Multiaddr(f"/ip4/1.2.3.4/tcp/{port}") for port in ports], 600)
    assert len(store.addrs(peer)) == ADDRESSES_MAX
    # The newest stay: a peer that moves is found.
    assert Multiaddr(f"/ip4/1.2.3.4/tcp/{3 * ADDRESSES_MAX}") in store.addrs(peer)
    store.add_addrs(peer, [Multiaddr(f"/ip4/1.2.3.4/tcp/{port}") for port in range(1, 5000)], 600)
    assert len(store.addrs(peer)) == ADDRESSES_MAX
    names = [f"/p/{number}" for number in range(PROTOCOLS_MAX)]
    store.set_protocols(peer, [*names, "/more"])
    store.add_protocols(peer, ["/and/more"])
    assert store.get_protocols(peer) == names


def test_one_peer_cannot_hold_all_streams_of_the_dht() -> None:
    class Muxed:
        def __init__(self, peer: ID) -> None:
            self.peer_id = peer

    class DhtStream(FakeStream):
        def __init__(self, peer: ID) -> None:
            super().__init__(b"", silent=True)
            self.muxed_conn = Muxed(peer)

    async def hold() -> None:
        host, _ = build_host(CONFIG, list)
        dht = build_dht(host, serves=True)
        assert isinstance(dht, BoundedDht)
        held: list[Any] = [DhtStream(peer_id(1)) for _ in range(DHT_STREAMS_PER_PEER_MAX + 1)]
        async with trio.open_nursery() as nursery:
            for stream in held:
                nursery.start_soon(dht.handle_stream, stream)
            await trio.testing.wait_all_tasks_blocked()
            assert sum(stream.was_reset for stream in held) == 1
            other: Any = DhtStream(peer_id(2))
            nursery.start_soon(dht.handle_stream, other)
            await trio.testing.wait_all_tasks_blocked()
            assert not other.was_reset
            clock.jump(DHT_SILENCE_S + 1)
        # Silence has ended them all, and the places are free again.
        assert not dht._streams_of
        async with trio.open_nursery() as nursery:
            again: Any = DhtStream(peer_id(1))
            nursery.start_soon(dht.handle_stream, again)
            await trio.testing.wait_all_tasks_blocked()
            assert dht._streams_of[peer_id(1)] == 1
            clock.jump(DHT_SILENCE_S + 1)

    clock = trio.testing.MockClock()
    trio.run(hold, clock=clock)
