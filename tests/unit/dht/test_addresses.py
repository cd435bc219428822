"""Multiaddrs as text and as values."""

import pytest

from shoal.dht.addresses import (
    ADDRESS_CHARS_MAX,
    ADDRESSES_PER_PEER_MAX,
    Address,
    keep_dialable,
    parse_address,
    parse_address_untrusted,
    parse_peer_address,
    with_peer,
)
from shoal.protocol.errors import ProtocolError, Refusal, UriError
from shoal.protocol.identity import Identity, format_peer_id

PEER = Identity(b"p" * 32).peer
OTHER = Identity(b"o" * 32).peer
TAIL = f"/p2p/{format_peer_id(PEER)}"


@pytest.mark.parametrize(
    ("text", "net", "host", "port"),
    [
        ("/ip4/203.0.113.5/tcp/4001", "ip4", "203.0.113.5", 4001),
        ("/ip6/2001:db8::1/tcp/1", "ip6", "2001:db8::1", 1),
        ("/dns/peer.example/tcp/65535", "dns", "peer.example", 65535),
        ("/dns4/localhost/tcp/0", "dns4", "localhost", 0),
        ("/dns6/a-b.c_d.example/tcp/80", "dns6", "a-b.c_d.example", 80),
    ],
)
def test_what_parses_formats_back(text: str, net: str, host: str, port: int) -> None:
    for whole, peer in ((text, None), (text + TAIL, PEER)):
        address = parse_address(whole)
        assert address == Address(net=net, host=host, port=port, peer=peer)
        assert str(address) == whole


@pytest.mark.parametrize("endpoint", ["/ip4/203.0.113.5/tcp/4001", "/dns/relay.example/tcp/1"])
def test_a_circuit_names_the_relay_and_the_peer(endpoint: str) -> None:
    through = f"{endpoint}/p2p/{format_peer_id(OTHER)}/p2p-circuit"
    for whole, peer in ((through, None), (through + TAIL, PEER)):
        address = parse_address(whole)
        assert (address.relay, address.peer, address.is_relayed) == (OTHER, peer, True)
        assert str(address) == whole
    assert parse_peer_address(through + TAIL) == (PEER, parse_address(through + TAIL))
    assert keep_dialable([through], PEER) == (through,)
    assert not parse_address(endpoint).is_relayed


@pytest.mark.parametrize(
    "text",
    [
        "/ip4/1.2.3.4/tcp/1/p2p-circuit",
        "/ip4/1.2.3.4/tcp/1/p2p-circuit" + TAIL,
        f"/ip4/1.2.3.4/tcp/1{TAIL}/p2p-circuit/",
        f"/ip4/1.2.3.4/tcp/1{TAIL}/p2p-circuit{TAIL}",
        f"/ip4/1.2.3.4/tcp/1{TAIL}/p2p-circuit/ip4/1.2.3.4",
        f"/ip4/1.2.3.4/tcp/1{TAIL}/circuit{TAIL}",
        f"/ip4/1.2.3.4/tcp/1/ip4/1.2.3.4/p2p-circuit{TAIL}",
        f"/ip4/1.2.3.4/tcp/1{TAIL}/p2p-circuit{TAIL}/p2p-circuit",
    ],
)
def test_what_is_no_circuit_is_refused(text: str) -> None:
    with pytest.raises(UriError):
        parse_address(text)


def test_nobody_is_reached_through_himself_or_through_a_wildcard() -> None:
    for text in (
        f"/ip4/1.2.3.4/tcp/1{TAIL}/p2p-circuit",
        f"/ip4/0.0.0.0/tcp/1/p2p/{format_peer_id(OTHER)}/p2p-circuit",
    ):
        with pytest.raises(ProtocolError) as caught:
            parse_address_untrusted(text, PEER)
        assert caught.value.refusal is Refusal.OUT_OF_RANGE


@pytest.mark.parametrize(
    ("text", "is_global"),
    [
        ("/ip4/45.0.0.1/tcp/1", True),
        ("/ip4/10.0.0.1/tcp/1", False),
        ("/ip6/fd00::1/tcp/1", False),
        ("/dns/a/tcp/1", True),
    ],
)
def test_what_the_internet_may_dial_is_told_apart(text: str, is_global: bool) -> None:
    assert parse_address(text).is_global == is_global


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/",
        "nonsense",
        "ip4/1.2.3.4/tcp/1",
        "/ip4/1.2.3.4",
        "/ip4/1.2.3.4/udp/1",
        "/ip4/1.2.3.4/tcp/1/",
        "/ip4/1.2.3.4/tcp/1/ws",
        "/ip4/1.2.3.4/tcp/1/ws/x",
        "/ip4/1.2.3.4/tcp/65536",
        "/ip4/1.2.3.4/tcp/01",
        "/ip4/1.2.3.4/tcp/-1",
        "/ip4/1.2.3.4/tcp/١",
        "/ip4/1.2.3.256/tcp/1",
        "/ip4/01.2.3.4/tcp/1",
        "/ip4/::1/tcp/1",
        "/ip6/1.2.3.4/tcp/1",
        "/ip6/2001:DB8::1/tcp/1",
        "/ip6/fe80::1%eth0/tcp/1",
        "/ip6/::ffff:1.2.3.4/tcp/1",
        "/ip6/::ffff:102:304/tcp/1",
        "/dns4//tcp/1",
        "/dns4/-a/tcp/1",
        "/dns4/a..b/tcp/1",
        "/dns4/UPPER/tcp/1",
        "/dns4/" + "a" * ADDRESS_CHARS_MAX + "/tcp/1",
        "/unix/tmp/tcp/1",
        "/ip4/1.2.3.4/tcp/1/p2p/",
        "/ip4/1.2.3.4/tcp/1/p2p/QmNotEd25519",
    ],
)
def test_what_is_malformed_is_an_input_error_and_a_refusal(text: str) -> None:
    with pytest.raises(UriError):
        parse_address(text)
    with pytest.raises(ProtocolError) as caught:
        parse_address_untrusted(text, PEER)
    assert caught.value.refusal is Refusal.MALFORMED


@pytest.mark.parametrize("text", ["/ip4/1.2.3.4/tcp/1", "/ip4/0.0.0.0/tcp/1" + TAIL, "/ip4/1.2.3.4/tcp/0" + TAIL])
def test_a_peer_address_says_whose_and_where(text: str) -> None:
    with pytest.raises(UriError):
        parse_peer_address(text)


def test_a_peer_address_parses_to_both() -> None:
    address = Address(net="ip4", host="1.2.3.4", port=5, peer=PEER)
    assert parse_peer_address(str(address)) == (PEER, address)


@pytest.mark.parametrize(
    ("host", "loopback", "wildcard"),
    [("127.0.0.1", True, False), ("127.9.9.9", True, False), ("10.0.0.1", False, False), ("0.0.0.0", False, True)],
)
def test_loopback_and_wildcard_are_told_apart(host: str, loopback: bool, wildcard: bool) -> None:
    address = Address(net="ip4", host=host, port=1)
    assert (address.is_loopback, address.is_wildcard) == (loopback, wildcard)


def test_ipv6_and_names_have_loopbacks_too() -> None:
    assert Address(net="ip6", host="::1", port=1).is_loopback
    assert Address(net="dns4", host="localhost", port=1).is_loopback
    assert not Address(net="dns4", host="peer.example", port=1).is_loopback


@pytest.mark.parametrize(
    ("text", "refusal"),
    [
        ("/ip4/0.0.0.0/tcp/1", Refusal.OUT_OF_RANGE),
        ("/ip6/::/tcp/1", Refusal.OUT_OF_RANGE),
        ("/ip4/1.2.3.4/tcp/0", Refusal.OUT_OF_RANGE),
        (f"/ip4/1.2.3.4/tcp/1/p2p/{format_peer_id(OTHER)}", Refusal.WRONG_PEER),
    ],
)
def test_claimed_addresses_can_be_dialled_and_are_the_claimants(text: str, refusal: Refusal) -> None:
    with pytest.raises(ProtocolError) as caught:
        parse_address_untrusted(text, PEER)
    assert caught.value.refusal is refusal


def test_good_addresses_survive_bad_ones() -> None:
    good = ["/ip4/1.2.3.4/tcp/1", "/ip4/1.2.3.5/tcp/1" + TAIL]
    assert keep_dialable([good[0], "bad", good[0], "/ip4/0.0.0.0/tcp/1", good[1]], PEER) == tuple(good)


def test_no_more_addresses_are_kept_than_a_peer_may_have() -> None:
    many = [f"/ip4/1.2.3.4/tcp/{port}" for port in range(1, 2 * ADDRESSES_PER_PEER_MAX)]
    assert keep_dialable(many, PEER) == tuple(many[:ADDRESSES_PER_PEER_MAX])


def test_addresses_get_the_id_of_the_peer_once() -> None:
    direct, circuit = "/ip4/1.2.3.4/tcp/1", f"/ip4/1.2.3.4/tcp/1/p2p/{format_peer_id(OTHER)}/p2p-circuit"
    assert with_peer([direct, direct + TAIL, circuit], PEER) == (direct + TAIL, circuit + TAIL)
