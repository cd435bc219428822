"""Addresses of tensor ports as text: one text each, and nothing that cannot be dialled."""

import pytest

from shoal.node.endpoints import (
    format_endpoint,
    interleave,
    is_loopback,
    is_public,
    is_wildcard,
    parse_endpoint_untrusted,
    parse_endpoints_untrusted,
)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("192.0.2.7:9461", ("192.0.2.7", 9461)),
        ("[2001:db8::7]:65535", ("2001:db8::7", 65_535)),
        ("peer.example.org:1", ("peer.example.org", 1)),
        ("localhost:80", ("localhost", 80)),
    ],
)
def test_an_address_has_one_text(text: str, address: tuple[str, int]) -> None:
    assert parse_endpoint_untrusted(text) == address
    assert format_endpoint(address) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "9461",
        "192.0.2.7",
        "192.0.2.7:",
        "192.0.2.7:0",
        "192.0.2.7:09461",
        "192.0.2.7:65536",
        "192.0.2.7:-1",
        "192.0.2.7:9461 ",
        "192.0.2:9461",
        "192.0.2.007:9461",
        "1234:9461",
        "0.0.0.0:9461",
        "[::]:9461",
        "224.0.0.1:9461",
        "[ff02::1]:9461",
        "2001:db8::7:9461",
        "[2001:DB8::7]:9461",
        "[::ffff:192.0.2.7]:9461",
        "[fe80::1%eth0]:9461",
        "[192.0.2.7]:9461",
        "[example.org]:9461",
        "-:9461",
        "a b:9461",
        "a/b:9461",
        "x" * 254 + ":9461",
    ],
)
def test_what_cannot_be_dialled_does_not_parse(text: str) -> None:
    assert parse_endpoint_untrusted(text) is None


def test_bad_addresses_do_not_cost_the_good_ones() -> None:
    texts = ("192.0.2.7:1", "rubbish", "192.0.2.7:1", "[2001:db8::7]:2")
    assert parse_endpoints_untrusted(texts) == (("192.0.2.7", 1), ("2001:db8::7", 2))


def test_both_families_take_turns_and_ipv6_begins() -> None:
    given = (("192.0.2.1", 1), ("192.0.2.2", 1), ("192.0.2.1", 1), ("2001:db8::1", 1), ("192.0.2.3", 1))
    assert [host for host, _ in interleave(given)] == ["2001:db8::1", "192.0.2.1", "192.0.2.2", "192.0.2.3"]


def test_kinds_of_addresses() -> None:
    assert [is_wildcard(host) for host in ("0.0.0.0", "::", "::1", "example.org")] == [True, True, False, False]
    assert [is_loopback(host) for host in ("127.0.0.2", "::1", "localhost", "192.0.2.1")] == [True, True, True, False]
    public = {"8.8.8.8": True, "10.1.2.3": False, "fd00::1": False, "2a00::1": True, "example.org": True}
    assert {host: is_public(host) for host in public} == public
