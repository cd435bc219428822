"""Tensors yield to everything else on the way out."""

import socket

import pytest

from shoal.node.link_pacing import LOWER_EFFORT, PRIORITY_BULK, find_congestion_fault, set_bulk
from tests.unit.node.link_harness import ALICE, BOB, node, on_both_loops


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_a_connection_is_marked_in_both_families(family: socket.AddressFamily) -> None:
    with socket.socket(family, socket.SOCK_STREAM) as connection:
        set_bulk(connection, 4096)
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT) == 4096
        assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY) == PRIORITY_BULK
        assert connection.getsockopt(socket.IPPROTO_IP, socket.IP_TOS) == LOWER_EFFORT
        if family == socket.AF_INET6:
            assert connection.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_TCLASS) == LOWER_EFFORT


def test_what_a_system_does_not_know_it_does_without(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TCP_NOTSENT_LOWAT", "SO_PRIORITY"):
        monkeypatch.delattr(socket, name)
    with socket.socket() as connection:
        set_bulk(connection, 4096)
        assert connection.getsockopt(socket.IPPROTO_IP, socket.IP_TOS) == LOWER_EFFORT


def test_a_connection_that_is_gone_is_no_error() -> None:
    connection = socket.socket()
    connection.close()
    set_bulk(connection, 4096)


@on_both_loops
async def test_both_ends_of_a_link_are_marked() -> None:
    async with node(BOB) as bob, node(ALICE) as alice:
        await alice.push(bob, b"x")
        await bob.sink.until(lambda: bob.sink.payloads)
        for one in (alice, bob):
            (link,) = one.links._connected
            connection = link._transport.get_extra_info("socket")
            assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY) == PRIORITY_BULK
            assert connection.getsockopt(socket.IPPROTO_IP, socket.IP_TOS) == LOWER_EFFORT


@on_both_loops
async def test_both_ends_of_a_link_have_the_congestion_control_that_was_chosen() -> None:
    chosen = "reno"  # every kernel allows it to everybody
    async with node(BOB) as bob, node(ALICE, congestion_control=chosen) as alice:
        await alice.push(bob, b"x")
        await bob.sink.until(lambda: bob.sink.payloads)
        found = []
        for one in (alice, bob):
            (link,) = one.links._connected
            connection = link._transport.get_extra_info("socket")
            found.append(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0"))
        with socket.socket() as other:
            own = other.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0")
        assert found == [chosen.encode(), own], "of its own end alone"


def test_a_congestion_control_that_cannot_be_had_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_congestion_fault("reno") is None
    assert find_congestion_fault("no-such-one") == "is not known to this kernel"
    monkeypatch.delattr(socket, "TCP_CONGESTION")
    assert find_congestion_fault("reno") == "cannot be chosen on this system"
