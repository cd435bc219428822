"""Whatever bytes or text come in, the discovery decoders raise ProtocolError or return what encodes back."""

import string
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from shoal.dht.addresses import Address, keep_dialable, parse_address, parse_address_untrusted
from shoal.dht.peer_book import PeerBook, decode_peer_book_untrusted
from shoal.dht.records import AddressRecord, decode_address_record_untrusted, encode_signed_record
from shoal.protocol.errors import ProtocolError, UriError
from shoal.protocol.identity import Identity, PeerId, format_peer_id

SWARM = bytes(range(32))
IDENTITY = Identity(b"i" * 32)
RECORD = AddressRecord(
    peer=IDENTITY.peer, control=("/ip4/1.2.3.4/tcp/5",), tensor=(), issued_s=1_000_000, expires_s=1_003_600
)
GOOD_RECORD = encode_signed_record(IDENTITY, SWARM, RECORD)

ports = st.integers(1, 65535)
ip4 = st.ip_addresses(v=4).map(lambda ip: ("ip4", str(ip)))
ip6 = st.ip_addresses(v=6).map(str).filter(lambda text: not text.startswith("::ffff:")).map(lambda text: ("ip6", text))
names = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,20})(\.[a-z]{1,10}){0,3}", fullmatch=True).map(lambda name: ("dns4", name))
peers = st.binary(min_size=32, max_size=32).map(PeerId)


@st.composite
def addresses(draw: st.DrawFn) -> Address:
    net, host = draw(st.one_of(ip4, ip6, names))
    return Address(net=net, host=host, port=draw(ports), peer=draw(st.none() | peers))


pieces = st.sampled_from(["ip4", "ip6", "dns", "tcp", "udp", "p2p", "1.2.3.4", "::1", "0", "80", "", "x", "\x00", "é"])
near_addresses = st.lists(pieces, max_size=9).map("/".join)


@given(addresses())
def test_every_address_formats_and_parses_back(address: Address) -> None:
    assert parse_address(str(address)) == address


@given(st.one_of(st.text(max_size=300), near_addresses, st.text(alphabet=string.printable + "/", max_size=60)))
def test_text_is_an_address_or_an_error(text: str) -> None:
    try:
        assert str(parse_address(text)) == text
    except UriError:
        pass
    try:
        assert str(parse_address_untrusted(text, IDENTITY.peer)) == text
    except ProtocolError:
        pass


@given(st.lists(st.one_of(near_addresses, addresses().map(str)), max_size=20))
def test_what_is_kept_of_hearsay_can_be_dialled(texts: list[str]) -> None:
    kept = keep_dialable(texts, IDENTITY.peer)
    assert len(kept) == len(set(kept)) <= 8
    for text in kept:
        assert text in texts and parse_address_untrusted(text, IDENTITY.peer).peer in (None, IDENTITY.peer)


@given(st.binary(max_size=400))
def test_bytes_are_a_record_or_refused(raw: bytes) -> None:
    for decode in (
        lambda: decode_address_record_untrusted(raw, SWARM, 1_000_000),
        lambda: decode_peer_book_untrusted(raw, IDENTITY.peer),
    ):
        try:
            decode()
        except ProtocolError:
            pass


@given(st.integers(0, len(GOOD_RECORD) - 1), st.integers(1, 255))
def test_a_record_with_one_byte_changed_is_refused(index: int, difference: int) -> None:
    forged = bytearray(GOOD_RECORD)
    forged[index] ^= difference
    try:
        decode_address_record_untrusted(bytes(forged), SWARM, 1_000_000)
    except ProtocolError:
        return
    raise AssertionError("a forged record was taken")


@given(st.binary(min_size=32, max_size=32), st.lists(addresses(), max_size=8, unique=True), st.integers(1, 86_400))
def test_every_record_that_may_be_signed_comes_back(seed: bytes, places: list[Address], lifetime_s: int) -> None:
    identity = Identity(seed)
    texts = tuple(str(replace(place, peer=identity.peer)) for place in places if not place.is_wildcard)
    record = AddressRecord(
        peer=identity.peer, control=texts, tensor=texts, issued_s=5_000, expires_s=5_000 + lifetime_s
    )
    assert decode_address_record_untrusted(encode_signed_record(identity, SWARM, record), SWARM, 5_000) == record
    assert all(format_peer_id(identity.peer) in text for text in texts)


@given(st.binary(max_size=60))
def test_bytes_around_a_book_are_refused(tail: bytes) -> None:
    raw = PeerBook(IDENTITY.peer).encode()
    try:
        decode_peer_book_untrusted(raw + tail, IDENTITY.peer)
    except ProtocolError:
        assert tail
    else:
        assert not tail
