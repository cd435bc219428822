"""In which order addresses are dialled, and that lost bootstrap peers are dialled when the way out has changed."""

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


def test_a_broken_path_costs_one_head_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first address never answers: the second is dialled after HEAD_START_S of the clock, and no later."""
    began: list[tuple[float, str]] = []

    class Swarm:
        connected = False

        def get_connections(self, peer: object) -> list[object]:
            return []

        async def dial_addr(self, address: object, peer: object) -> None:
            began.append((trio.current_time(), str(address)))
            if "/ip6/" in str(address):
                await trio.sleep_forever()
            Swarm.connected = True

        class peerstore:
            @staticmethod
            def add_addr(*_: object) -> None:
                return

    async def dial() -> None:
        dialer = Dialer(Swarm(), ME)  # type: ignore[arg-type]
        monkeypatch.setattr(dialer, "is_connected", lambda peer: Swarm.connected)
        await dialer.connect(PEER, [make("2a00::1"), make("45.0.0.1")])

    trio.run(dial, clock=trio.testing.MockClock(autojump_threshold=0))
    assert [address.split("/")[1] for _, address in began] == ["ip6", "ip4"]
    assert began[1][0] - began[0][0] == pytest.approx(0.25)


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
