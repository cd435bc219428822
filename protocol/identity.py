"""Who a peer is: Ed25519 keys, peer ids, domain-separated signatures.

A peer id is the 32-byte Ed25519 public key; its text form is libp2p's (base58 of the identity multihash of the
protobuf-encoded key, "12D3KooW…"; libp2p peer-ids specification), so that both transports name a peer alike.

Signatures that were found good are remembered, in bounds: most are met again (a vote alone and in its certificate),
and what a thread has checked costs the event loop nothing. What is remembered changes no answer.

Invariant: no signature is valid in another domain, another swarm or under another protocol version.
"""

from functools import lru_cache
from typing import NewType

import base58
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from shoal.protocol.errors import ProtocolError, Refusal, UriError

PeerId = NewType("PeerId", bytes)

PEER_ID_BYTES = 32
SIGNATURE_BYTES = 64
SEED_BYTES = 32
PROTOCOL_VERSION = 1
PEER_ID_CHARS_MAX = 64  # 52, and what base58 forgives behind them
TEXTS_KEPT = 4096  # base58 in Python takes 0.1 ms
GOOD_SIGNATURES_MAX = 8192  # more than the largest proposal has
GOOD_TEXT_BYTES_MAX = 1024  # longer signed texts, such as plans, are not remembered: 10 MiB in all

# identity multihash (0x00), 36 bytes, of the protobuf PublicKey{Type: Ed25519 (1), Data: 32 bytes}
_LIBP2P_PREFIX = bytes.fromhex("0024080112 20".replace(" ", ""))


def encode_libp2p_peer_id(peer: PeerId) -> bytes:
    """The 38-byte multihash that libp2p uses for this peer."""
    return _LIBP2P_PREFIX + peer


def decode_libp2p_peer_id(raw: bytes) -> PeerId:
    """Inverse of `encode_libp2p_peer_id`; raises ProtocolError for a key that is not an inlined Ed25519 key."""
    if len(raw) != len(_LIBP2P_PREFIX) + PEER_ID_BYTES or not raw.startswith(_LIBP2P_PREFIX):
        raise ProtocolError(Refusal.MALFORMED, "peer id is not an inlined Ed25519 key")
    return PeerId(raw[len(_LIBP2P_PREFIX) :])


@lru_cache(maxsize=TEXTS_KEPT)
def format_peer_id(peer: PeerId) -> str:
    """libp2p's text form, 52 characters."""
    return base58.b58encode(encode_libp2p_peer_id(peer)).decode("ascii")


@lru_cache(maxsize=TEXTS_KEPT)
def parse_peer_id(text: str) -> PeerId:
    """Inverse of `format_peer_id`; raises UriError."""
    try:
        if len(text) > PEER_ID_CHARS_MAX:
            raise ValueError("too long")
        return decode_libp2p_peer_id(base58.b58decode(text))
    except (ValueError, ProtocolError) as error:
        raise UriError(
            "peer id", f"{text!r} is not an Ed25519 peer id", "copy it whole; it starts with 12D3KooW"
        ) from error


def short_peer_id(peer: PeerId) -> str:
    """The last eight characters of the text form: for people, never for look-ups."""
    return format_peer_id(peer)[-8:]


class Identity:
    """A peer's key pair. The seed comes from the shell; this module reads no entropy."""

    __slots__ = ("_private", "peer", "seed")

    def __init__(self, seed: bytes) -> None:
        assert len(seed) == SEED_BYTES, "an Ed25519 seed has 32 bytes"
        self.seed = seed
        self._private = Ed25519PrivateKey.from_private_bytes(seed)
        self.peer = PeerId(self._private.public_key().public_bytes_raw())

    def sign(self, domain: str, swarm: bytes, payload: bytes) -> bytes:
        """A 64-byte signature over `payload`, bound to the domain, the swarm and the protocol version."""
        return self._private.sign(_signed_bytes(domain, swarm, payload))


def verify_signature(peer: PeerId, domain: str, swarm: bytes, payload: bytes, signature: bytes) -> None:
    """Raise ProtocolError(BAD_SIGNATURE) unless `peer` signed `payload` in this domain and swarm."""
    text = _signed_bytes(domain, swarm, payload)
    verify = _verify_once if len(text) <= GOOD_TEXT_BYTES_MAX else _verify
    try:
        verify(peer, text, signature)
    except (InvalidSignature, ValueError) as error:
        raise ProtocolError(Refusal.BAD_SIGNATURE, f"{domain} is not signed by {short_peer_id(peer)}") from error


def _verify(peer: PeerId, text: bytes, signature: bytes) -> None:
    Ed25519PublicKey.from_public_bytes(peer).verify(signature, text)


# What raises is not remembered.
_verify_once = lru_cache(maxsize=GOOD_SIGNATURES_MAX)(_verify)


def forget_signatures() -> None:
    """Check everything anew: for measurements."""
    _verify_once.cache_clear()


def _signed_bytes(domain: str, swarm: bytes, payload: bytes) -> bytes:
    # Every variable-length piece is preceded by its length, so that no two inputs share one signed text.
    name = domain.encode("ascii")
    head = b"shoal" + PROTOCOL_VERSION.to_bytes(2, "big") + len(name).to_bytes(1, "big") + name
    return head + len(swarm).to_bytes(1, "big") + swarm + payload
