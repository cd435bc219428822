"""Peer ids as text and as libp2p has them; signatures that hold in one place only."""

import pytest

from shoal.protocol import identity as module
from shoal.protocol.errors import ProtocolError, Refusal, UriError
from shoal.protocol.identity import (
    Identity,
    PeerId,
    decode_libp2p_peer_id,
    encode_libp2p_peer_id,
    format_peer_id,
    parse_peer_id,
    short_peer_id,
    verify_signature,
)

IDENTITY = Identity(bytes(range(32)))
OTHER = Identity(b"o" * 32)
SWARM = b"s" * 32


def refuse(*, domain: str = "vote", swarm: bytes = SWARM, payload: bytes = b"payload", signature: bytes = b"") -> None:
    signature = signature or IDENTITY.sign("vote", SWARM, b"payload")
    with pytest.raises(ProtocolError) as caught:
        verify_signature(IDENTITY.peer, domain, swarm, payload, signature)
    assert caught.value.refusal is Refusal.BAD_SIGNATURE
    assert caught.value.detail == f"{domain} is not signed by {short_peer_id(IDENTITY.peer)}"


def test_the_text_form_is_libp2ps() -> None:
    # RFC 8032, test 1, whose public key libp2p would write so.
    peer = Identity(bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")).peer
    assert peer.hex() == "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
    text = format_peer_id(peer)
    assert text.startswith("12D3KooW") and len(text) == 52
    assert encode_libp2p_peer_id(peer) == bytes.fromhex("002408011220") + peer
    assert parse_peer_id(text) == peer
    assert short_peer_id(peer) == text[-8:]


@pytest.mark.parametrize(
    "text",
    ["", "12D3KooW", "0OIl", "12D3KooWé", "x" * 52, format_peer_id(OTHER.peer)[:-1], format_peer_id(OTHER.peer) + "1"],
)
def test_a_text_that_is_no_peer_id_is_refused(text: str) -> None:
    with pytest.raises(UriError) as caught:
        parse_peer_id(text)
    assert caught.value.field == "peer id"
    assert repr(text) in caught.value.problem
    assert "12D3KooW" in caught.value.fix


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        IDENTITY.peer,
        encode_libp2p_peer_id(IDENTITY.peer)[:-1],
        encode_libp2p_peer_id(IDENTITY.peer) + b"\x00",
        bytes.fromhex("002408001220") + IDENTITY.peer,  # an RSA key
        bytes.fromhex("1220") + bytes(36),  # a SHA-256 multihash
    ],
)
def test_a_key_of_another_kind_is_refused(raw: bytes) -> None:
    with pytest.raises(ProtocolError) as caught:
        decode_libp2p_peer_id(raw)
    assert caught.value.refusal is Refusal.MALFORMED


def test_the_seed_makes_the_peer() -> None:
    assert Identity(IDENTITY.seed).peer == IDENTITY.peer != OTHER.peer
    with pytest.raises(AssertionError, match="32 bytes"):
        Identity(b"short")


def test_a_signature_holds_for_what_was_signed() -> None:
    signature = IDENTITY.sign("vote", SWARM, b"payload")
    assert len(signature) == 64
    verify_signature(IDENTITY.peer, "vote", SWARM, b"payload", signature)
    # Ed25519 signs without entropy.
    assert signature == IDENTITY.sign("vote", SWARM, b"payload")


def test_a_signature_holds_in_its_domain_and_swarm_only() -> None:
    refuse(domain="plan")
    refuse(swarm=b"t" * 32)
    refuse(swarm=b"")
    refuse(payload=b"payloae")
    refuse(payload=b"")
    refuse(signature=OTHER.sign("vote", SWARM, b"payload"))
    refuse(signature=bytes(64))
    refuse(signature=bytes(63))


def test_no_two_inputs_share_a_signed_text() -> None:
    # What moves from one field into its neighbour changes the length in front of it.
    refuse(domain="vot", swarm=b"e" + SWARM)
    refuse(domain="vote", swarm=SWARM[:-1], payload=SWARM[-1:] + b"payload")
    refuse(domain="vote", swarm=SWARM + b"p", payload=b"ayload")


def test_a_signature_ends_with_its_protocol_version(monkeypatch: pytest.MonkeyPatch) -> None:
    signature = IDENTITY.sign("vote", SWARM, b"payload")
    monkeypatch.setattr(module, "PROTOCOL_VERSION", module.PROTOCOL_VERSION + 1)
    refuse(signature=signature)


@pytest.mark.parametrize("key", [b"", b"k" * 31, b"k" * 33, b"\xff" * 32])
def test_a_key_that_is_none_verifies_nothing(key: bytes) -> None:
    with pytest.raises(ProtocolError) as caught:
        verify_signature(PeerId(key), "vote", SWARM, b"payload", bytes(64))
    assert caught.value.refusal is Refusal.BAD_SIGNATURE


def test_only_what_holds_is_remembered_and_only_where_it_is_short() -> None:
    module.forget_signatures()
    signature = IDENTITY.sign("vote", SWARM, b"payload")
    for _ in range(2):
        verify_signature(IDENTITY.peer, "vote", SWARM, b"payload", signature)
        refuse(payload=b"another payload")
        refuse(domain="ready")
    known = module._verify_once.cache_info()
    assert (known.hits, known.currsize, known.maxsize) == (1, 1, module.GOOD_SIGNATURES_MAX)
    long = bytes(module.GOOD_TEXT_BYTES_MAX)
    verify_signature(IDENTITY.peer, "vote", SWARM, long, IDENTITY.sign("vote", SWARM, long))
    assert module._verify_once.cache_info().currsize == 1
