"""node/mdns.py: what is said on the LAN, what is heard from whom, and two peers that find each other by loopback."""

import asyncio
import contextlib
from dataclasses import dataclass, field

import pytest
from zeroconf.asyncio import AsyncZeroconf

from shoal.node import mdns
from shoal.node.interfaces import InterfaceAddress, Interfaces, InterfaceWatch
from shoal.node.mdns import Found, FoundPeers, Mdns, MdnsPorts, decode_txt_untrusted, encode_txt, tag_swarm
from shoal.protocol.errors import Failure, ProtocolError, Refusal
from shoal.protocol.identity import PeerId, format_peer_id
from tests.unit.node.node_samples import PATIENCE_S
from tests.unit.protocol.samples import PEERS, SWARM

ANNA, BEN, CARL = PEERS[:3]
TAG = tag_swarm(SWARM)
LOOPBACK = Interfaces(addresses=(InterfaceAddress(interface="lo", ip="127.0.0.1", prefix_bits=8),))


def address(peer: PeerId, host: str = "192.168.1.5", port: int = 9460) -> str:
    return f"/ip4/{host}/tcp/{port}/p2p/{format_peer_id(peer)}"


def pack(*texts: bytes) -> bytes:
    return b"".join(bytes((len(text),)) + text for text in texts)


# -- the record ------------------------------------------------------------------------------------------------------


def test_a_record_reads_back() -> None:
    addresses = (address(ANNA), address(ANNA, "10.0.0.5"))
    assert decode_txt_untrusted(encode_txt(addresses, TAG), TAG) == Found(peer=ANNA, addresses=addresses)


def test_the_addresses_are_written_as_libp2p_has_them() -> None:
    raw = encode_txt((address(ANNA),), TAG)
    assert pack(b"shoal=" + TAG, b"dnsaddr=" + address(ANNA).encode()) == raw


def test_another_swarm_and_another_program_are_passed_over() -> None:
    assert decode_txt_untrusted(encode_txt((address(ANNA),), tag_swarm(b"x" * 32)), TAG) is None
    assert decode_txt_untrusted(pack(b"dnsaddr=" + address(ANNA).encode()), TAG) is None
    assert decode_txt_untrusted(b"", TAG) is None
    assert decode_txt_untrusted(b"\0", TAG) is None
    assert SWARM.hex().encode() not in TAG


def test_addresses_of_other_transports_are_left_out() -> None:
    quic = f"/ip4/192.168.1.5/udp/1/quic-v1/p2p/{format_peer_id(ANNA)}".encode()
    raw = pack(b"shoal=" + TAG, b"dnsaddr=" + quic, b"dnsaddr=\xff", b"dnsaddr=" + address(ANNA).encode())
    assert decode_txt_untrusted(raw, TAG) == Found(peer=ANNA, addresses=(address(ANNA),))


def test_a_peer_has_so_many_addresses() -> None:
    raw = encode_txt((address(ANNA, port=port) for port in range(1, 20)), TAG)
    found = decode_txt_untrusted(raw, TAG)
    assert found is not None and len(found.addresses) == 8


@pytest.mark.parametrize(
    ("raw", "refusal"),
    [
        (b"\x05abc", Refusal.MALFORMED),
        (b"\0" * 33, Refusal.MALFORMED),
        (b"\0" * 8193, Refusal.OVERSIZED),
        (pack(b"shoal=" + TAG), Refusal.MALFORMED),
        (pack(b"shoal=" + TAG, b"dnsaddr=/ip4/192.168.1.5/tcp/1"), Refusal.MALFORMED),
        (
            pack(b"shoal=" + TAG, b"dnsaddr=" + address(ANNA).encode(), b"dnsaddr=" + address(BEN).encode()),
            Refusal.MALFORMED,
        ),
    ],
)
def test_a_record_that_lies_is_refused(raw: bytes, refusal: Refusal) -> None:
    with pytest.raises(ProtocolError) as caught:
        decode_txt_untrusted(raw, TAG)
    assert caught.value.refusal is refusal


# -- who is told -----------------------------------------------------------------------------------------------------


def test_the_daemon_is_told_once_in_a_while() -> None:
    peers = FoundPeers()
    here, there = (Found(peer=ANNA, addresses=(address(ANNA, host),)) for host in ("10.0.0.1", "10.0.0.2"))
    assert peers.is_news(here, 0.0)
    assert not peers.is_news(here, 1.0)
    assert not peers.is_news(here, mdns.TELL_AGAIN_S - 0.1)
    assert peers.is_news(here, mdns.TELL_AGAIN_S)
    assert peers.is_news(there, mdns.TELL_AGAIN_S + 0.1)
    assert peers.is_news(Found(peer=BEN, addresses=()), 0.0)


def test_a_lan_full_of_names_costs_a_bounded_table() -> None:
    peers = FoundPeers()
    for number in range(3 * mdns.PEERS_MAX):
        assert peers.is_news(Found(peer=PeerId(number.to_bytes(32, "big")), addresses=()), float(number))
    assert len(peers) == mdns.PEERS_MAX


@dataclass
class Side:
    """One peer on the LAN and what it was told."""

    peer: PeerId
    swarm: bytes = SWARM
    interfaces: Interfaces = LOOPBACK
    found: asyncio.Queue[Found] = field(default_factory=asyncio.Queue)
    failures: list[Failure] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.watch = InterfaceWatch(lambda: self.interfaces, lambda: 0.0)
        ports = MdnsPorts(
            addresses=lambda: (address(self.peer),),
            found=self.found.put_nowait,
            failed=lambda failure, _: self.failures.append(failure),
        )
        self.mdns = Mdns(self.peer, self.swarm, self.watch, ports)

    @contextlib.asynccontextmanager
    async def running(self):  # type: ignore[no-untyped-def]
        task = asyncio.create_task(self.mdns.run())
        try:
            yield self
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


async def test_own_words_and_rubbish_are_not_told() -> None:
    side = Side(ANNA)
    side.mdns.take(encode_txt((address(ANNA),), TAG))
    side.mdns.take(b"\x05abc")
    side.mdns.take(encode_txt((address(BEN),), tag_swarm(b"x" * 32)))
    assert side.found.empty()
    side.mdns.take(encode_txt((address(BEN),), TAG))
    assert side.found.get_nowait().peer == BEN


async def test_two_peers_of_one_swarm_find_each_other_and_no_other() -> None:
    anna, ben, stranger = Side(ANNA), Side(BEN), Side(CARL, swarm=b"x" * 32)
    async with stranger.running(), anna.running(), ben.running():
        assert await asyncio.wait_for(anna.found.get(), PATIENCE_S) == Found(peer=BEN, addresses=(address(BEN),))
        assert await asyncio.wait_for(ben.found.get(), PATIENCE_S) == Found(peer=ANNA, addresses=(address(ANNA),))
    assert stranger.found.empty() and anna.failures == ben.failures == []


async def test_no_multicast_is_told_once_and_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = asyncio.Semaphore(0)

    def refuse(*_: object, **__: object) -> AsyncZeroconf:
        tried.release()
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr(mdns, "AsyncZeroconf", refuse)
    monkeypatch.setattr(mdns, "RETRY_S", 0.01)
    side = Side(ANNA)
    async with side.running():
        for _ in range(3):
            await asyncio.wait_for(tried.acquire(), PATIENCE_S)
    assert side.failures == [Failure.MULTICAST_UNAVAILABLE]


async def test_without_a_network_it_waits_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = asyncio.Event()

    def refuse(*_: object, **__: object) -> AsyncZeroconf:
        opened.set()
        raise OSError("x")

    monkeypatch.setattr(mdns, "AsyncZeroconf", refuse)
    side = Side(ANNA, interfaces=Interfaces())
    async with side.running():
        await asyncio.sleep(0)
        assert not opened.is_set()
        side.interfaces = LOOPBACK
        assert side.watch.check()
        await asyncio.wait_for(opened.wait(), PATIENCE_S)
