"""In which order addresses are dialled, and that lost bootstrap peers are dialled when the way out has changed."""

from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing

from shoal.dht.addresses import Address, parse_address
from shoal.node.control import BootstrapFailed, PeerUnreachable
from shoal.node.libp2p_dialer import Dialer, order_targets
from shoal.protocol.errors import Failure
from shoal.protocol.identity import Identity, PeerId

ME, PEER, RELAY = (Identity(bytes([number]) * 32).peer for number in range(1, 4))


def make(host: str, relay: PeerId | None = None) -> Address:
    return Address(net="ip6" if ":" in host else "ip4", host=host, port=1, relay=relay)


@pytest.mark.parametrize(
    ("given", "ordered"),
    [
        (["2a00::1", "2a00::2", "45.0.0.1", "45.0.0.2"], ["2a00::1", "45.0.0.1", "2a00::2", "45.0.0.2"]),
        (["45.0.0.1", "45.0.0.2", "2a00::1"], ["45.0.0.1", "2a00::1", "45.0.0.2"]),
        (["45.0.0.1", "45.0.0.1"], ["45.0.0.1"]),
        ([], []),
    ],
)
def test_the_families_take_turns(given: list[str], ordered: list[str]) -> None:
    assert order_targets([make(host) for host in given]) == [make(host) for host in ordered]


def test_relays_come_last_whatever_the_order() -> None:
    given = [make("45.0.0.9", RELAY), make("2a00::9", RELAY), make("2a00::1"), make("45.0.0.1")]
    assert order_targets(given) == [given[2], given[3], given[0], given[1]]


class Network:
    """Addresses with 192 in them never answer, those with 10 refuse at once, the others accept."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.began: list[tuple[float, str]] = []
        self.connected = False
        self.peerstore = self
        self.dialer = Dialer(self, ME)  # type: ignore[arg-type]
        monkeypatch.setattr(self.dialer, "is_connected", lambda peer: self.connected)

    async def dial_addr(self, address: object, peer: object) -> None:
        self.began.append((trio.current_time(), str(address).split("/")[2]))
        if "/192." in str(address):
            await trio.sleep_forever()
        if "/10." in str(address):
            raise OSError("refused")
        self.connected = True

    def add_addr(self, *_: object) -> None:
        """What worked is remembered elsewhere."""

    def addrs(self, peer: object) -> list[object]:
        return []


def run(work: Callable[[], Awaitable[None]]) -> None:
    trio.run(work, clock=trio.testing.MockClock(autojump_threshold=0))


def test_a_broken_path_costs_one_head_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first address never answers: the second is dialled after HEAD_START_S of the clock, and no later."""
    network = Network(monkeypatch)
    run(lambda: network.dialer.connect(PEER, [make("192.0.0.1"), make("45.0.0.1")]))
    assert [host for _, host in network.began] == ["192.0.0.1", "45.0.0.1"]
    assert network.began[1][0] - network.began[0][0] == pytest.approx(0.25)


def test_an_address_that_is_told_while_others_hang_is_dialled_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    network = Network(monkeypatch)
    ended: list[float] = []

    async def dial() -> None:
        began_s = trio.current_time()

        async def connect(*hosts: str) -> None:
            await network.dialer.connect(PEER, [make(host) for host in hosts])
            ended.append(trio.current_time() - began_s)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(connect, "192.0.0.1", "10.0.0.1")
            with trio.move_on_after(2.0):
                await trio.sleep_forever()
            nursery.start_soon(connect, "192.0.0.1", "45.0.0.1")

    run(dial)
    assert [host for _, host in network.began] == ["192.0.0.1", "10.0.0.1", "45.0.0.1"], "and none is dialled twice"
    assert ended == [pytest.approx(2.0), pytest.approx(2.0)]


def test_a_dial_ends_when_nothing_is_left_to_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    network = Network(monkeypatch)

    async def dial() -> None:
        with pytest.raises(PeerUnreachable, match=r"10\.0\.0\.1 port 1: refused; 10\.0\.0\.2 port 1: refused"):
            await network.dialer.connect(PEER, [make("10.0.0.1"), make("10.0.0.2")])
        assert trio.current_time() - network.began[0][0] < 0.1
        began_s = trio.current_time()
        with pytest.raises(PeerUnreachable, match="no answer within 5 s"):
            await network.dialer.connect(PEER, [make("192.0.0.1"), make("10.0.0.1")])
        assert trio.current_time() - began_s == pytest.approx(5.0)

    run(dial)


def test_a_bootstrap_peer_is_dialled_at_once_when_the_way_out_has_changed() -> None:
    tries: list[float] = []

    async def run() -> None:
        dialer = Dialer(None, ME)  # type: ignore[arg-type]

        async def fail(peer: PeerId, addresses: object = ()) -> None:
            tries.append(trio.current_time())
            raise PeerUnreachable(peer, Failure.PEER_UNREACHABLE, "nobody there")

        dialer.connect = fail  # type: ignore[method-assign,assignment]
        told: list[BootstrapFailed] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(
                dialer.keep_bootstrapped,
                PEER,
                [parse_address("/ip4/1.2.3.4/tcp/1")],
                lambda peer: trio.Event(),
                told.append,
            )
            await trio.sleep_until(trio.current_time() + 300)
            before = len(tries)
            dialer.retry()
            await trio.sleep_until(trio.current_time() + 0.1)
            assert len(tries) == before + 1
            await trio.sleep_until(trio.current_time() + 2)
            assert len(tries) > before + 1, "the pause begins anew"
            nursery.cancel_scope.cancel()

    trio.run(run, clock=trio.testing.MockClock(autojump_threshold=0))
