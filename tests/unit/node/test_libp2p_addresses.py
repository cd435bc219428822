"""Where a node listens and what it announces for that."""

import socket

import pytest
import trio
from multiaddr import Multiaddr

from shoal.dht.addresses import ADDRESSES_PER_PEER_MAX, Address, parse_address
from shoal.node.control import ControlConfig
from shoal.node.libp2p_addresses import OwnAddresses, open_listeners
from shoal.protocol.errors import ConfigError
from shoal.protocol.identity import Identity

ME, RELAY = Identity(b"m" * 32), Identity(b"r" * 32)


def make_config(*listen: str, announce: tuple[str, ...] = ()) -> ControlConfig:
    return ControlConfig(identity=ME, swarm=bytes(32), listen=listen, announce=announce)


def own(hosts: list[str], *bound: str, announce: tuple[str, ...] = ()) -> OwnAddresses:
    addresses = OwnAddresses(make_config(announce=announce), lambda: tuple(hosts))
    addresses.read(Multiaddr(text) for text in bound)
    return addresses


def texts(addresses: list[Address]) -> list[str]:
    return [str(address) for address in addresses]


CIRCUIT = Address(net="ip4", host="45.0.0.9", port=1, relay=RELAY.peer, peer=ME.peer)


def test_the_most_useful_addresses_come_first() -> None:
    addresses = own(["10.0.0.2", "45.0.0.2", "2a00::2"], "/ip4/0.0.0.0/tcp/9", "/ip6/::/tcp/9")
    confirmed = parse_address("/ip4/45.0.0.3/tcp/9")
    told = addresses.announced([confirmed], [CIRCUIT])
    assert texts(told[:3]) == ["/ip4/45.0.0.3/tcp/9", "/ip4/45.0.0.2/tcp/9", "/ip6/2a00::2/tcp/9"]
    assert told[3].is_relayed and told[3].peer is None
    assert texts(told[4:]) == ["/ip4/10.0.0.2/tcp/9"]


def test_many_interfaces_do_not_crowd_out_the_relays() -> None:
    addresses = own([f"10.0.0.{number}" for number in range(1, 60)], "/ip4/0.0.0.0/tcp/9")
    told = addresses.announced([], [CIRCUIT])
    assert any(address.is_relayed for address in told) and len(told) <= ADDRESSES_PER_PEER_MAX


def test_what_is_configured_is_announced_and_nothing_else_but_relays() -> None:
    addresses = own(["10.0.0.2"], "/ip4/0.0.0.0/tcp/9", announce=("/dns4/shoal.example/tcp/1",))
    assert texts(addresses.announced([parse_address("/ip4/45.0.0.3/tcp/9")], [])) == ["/dns4/shoal.example/tcp/1"]
    assert len(addresses.announced([], [CIRCUIT])) == 2


@pytest.mark.parametrize(
    ("hosts", "lacks"),
    [
        (["45.0.0.2"], "ip6"),
        (["10.0.0.2"], "ip6"),
        (["10.0.0.2", "fd00::2"], "ip6"),
        (["2a00::2"], "ip4"),
        (["10.0.0.2", "2a00::2"], None),
        (["fd00::2"], None),
    ],
)
def test_a_machine_with_one_family_lacks_the_other(hosts: list[str], lacks: str | None) -> None:
    addresses = own(hosts, "/ip4/0.0.0.0/tcp/9", "/ip6/::/tcp/9")
    assert addresses.lacks == lacks
    relay = {"ip4": "/ip4/45.0.0.9/tcp/1", "ip6": "/ip6/2a00::9/tcp/1"}
    assert [net for net, text in relay.items() if addresses.is_bridge([text])] == ([] if lacks is None else [lacks])
    assert not addresses.is_bridge(["/ip4/10.0.0.9/tcp/1", "/ip6/fd00::9/tcp/1", f"{CIRCUIT}"])


def test_loopback_is_announced_for_want_of_others_only() -> None:
    assert texts(own([], "/ip4/0.0.0.0/tcp/9").announced([], [])) == ["/ip4/127.0.0.1/tcp/9"]
    assert texts(own(["10.0.0.2"], "/ip4/0.0.0.0/tcp/9", "/ip6/::/tcp/9").announced([], [])) == ["/ip4/10.0.0.2/tcp/9"]


def test_candidates_are_the_own_ports_where_others_see_them() -> None:
    addresses = own(["10.0.0.2"], "/ip4/0.0.0.0/tcp/9", "/ip6/::/tcp/9", announce=("/dns4/shoal.example/tcp/1",))
    addresses.offered = (parse_address("/ip4/45.0.0.7/tcp/7"),)
    assert texts(addresses.candidates(["45.0.0.3", "2a00::3"])) == [
        "/dns4/shoal.example/tcp/1",
        "/ip4/45.0.0.7/tcp/7",
        "/ip4/45.0.0.3/tcp/1",
        "/ip4/45.0.0.3/tcp/9",
        "/ip6/2a00::3/tcp/9",
        "/ip4/10.0.0.2/tcp/9",
    ]


def test_a_change_of_the_machines_addresses_is_noticed() -> None:
    hosts = ["10.0.0.2"]
    addresses = own(hosts, "/ip4/0.0.0.0/tcp/9")
    bound = [Multiaddr("/ip4/0.0.0.0/tcp/9")]
    assert not addresses.read(bound)
    hosts[:] = ["192.168.1.7"]
    assert addresses.read(bound)
    assert texts(addresses.announced([], [])) == ["/ip4/192.168.1.7/tcp/9"]


def listen(*addresses: str) -> list[tuple[int, int]]:
    """The family and port of each socket."""

    async def open_and_close() -> list[tuple[int, int]]:
        opened = await open_listeners(make_config(*addresses))
        found = [(one.socket.family, one.socket.getsockname()[1]) for sockets in opened for one in sockets]
        for sockets in opened:
            for one in sockets:
                await one.aclose()
        return found

    return trio.run(open_and_close)


def test_any_free_port_is_one_for_both_families() -> None:
    found = listen("/ip4/0.0.0.0/tcp/0", "/ip6/::/tcp/0")
    assert found[0][0] == socket.AF_INET and found[0][1] > 0
    assert {port for _, port in found} == {found[0][1]}


def test_a_port_that_is_taken_in_one_family_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port}"):
            listen(f"/ip4/127.0.0.1/tcp/{port}")
