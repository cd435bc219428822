"""The secure channel under a tensor link: a clear hello, libp2p's Noise handshake, then sealed records. Sans-IO.

Handshake: Noise_XX_25519_ChaChaPoly_SHA256 with libp2p's signed payload (the Noise Protocol Framework, revision 34;
libp2p specifications, "noise-libp2p"), so that both sides prove the Ed25519 identity that they have on the control
plane. The prologue binds the link protocol's version, the usual record cipher and the swarm id: nobody of another swarm
gets through.
A clear hello in front of it names the version and a one-way tag of the swarm, only so that a mistake can be told by
name (WRONG_VERSION, WRONG_SWARM); nothing is trusted because of it.

Records: the handshake's two traffic keys drive AES-256-GCM with Noise's nonce (a counter) and Noise's rekey; or, where
one side says in its signed payload (field 15, "ChaCha20-Poly1305") that its processor is faster with it,
ChaCha20-Poly1305: the side without AES instructions would be the slow one. A record is a 4-byte prefix (8 bits of kind,
24 bits of length), which is authenticated, the ciphertext and a 16-byte tag.
What is ours is this framing, because Noise's own messages end at 65,535 bytes.

Why this and not TLS 1.3: `benchmarks/secure_channel.py`, one core with VAES that seals and opens, MB per CPU second
with records of 16 / 64 / 256 KiB; a handshake's CPU for both ends, identities checked:

    these records, AES-256-GCM          3,200 / 5,900 / 7,500        Noise XX   0.70 ms
    ChaCha20-Poly1305 in their place    1,400 / 1,800 / 2,100
    libp2p TLS 1.3, AES-256-GCM         1,400 / 1,900 / 1,900        TLS 1.3    1.11 ms
    libp2p TLS 1.3, AES-128-GCM         1,500 / 1,900 / 2,000
    libp2p TLS 1.3, ChaCha20-Poly1305     800 /   900 / 1,000

TLS copies through its own buffers and ends its records at 16 KiB; `encrypt_into` and `decrypt_into` write from the
caller's memory to the wire buffer and from there into the reduction's.

Invariants: whatever the other side sends, only ProtocolError is raised; no nonce is used twice under one key; nothing
is handed out that was not authenticated (the target of a record that failed holds rubbish and must not be read).
"""

import struct
from dataclasses import dataclass
from enum import StrEnum

from blake3 import blake3
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from noise.connection import Keypair, NoiseConnection
from noise.exceptions import NoiseHandshakeError, NoiseInvalidMessage, NoiseValueError

from shoal.protocol.errors import ProtocolError, Refusal
from shoal.protocol.identity import Identity, PeerId, decode_libp2p_peer_id, encode_libp2p_peer_id, short_peer_id

LINK_VERSION = 1
NOISE_NAME = b"Noise_XX_25519_ChaChaPoly_SHA256"
STATIC_KEY_BYTES = 32
HELLO_BYTES = 14
HANDSHAKE_MESSAGE_BYTES_MAX = 1024

RECORD_BYTES_MAX = 256 * 1024
PREFIX_BYTES = 4
TAG_BYTES = 16
RECORD_OVERHEAD_BYTES = PREFIX_BYTES + TAG_BYTES
# 2^20 records of 2^14 cipher blocks: the volume after which TLS 1.3, too, wants a new key (RFC 8446, section 5.5).
REKEY_RECORDS = 2**20

_HELLO = struct.Struct("<4sH8s")
_HELLO_MAGIC = b"SHLK"
_PROLOGUE = b"shoal-link\x00" + LINK_VERSION.to_bytes(2, "big") + b"AES256-GCM\x00"
_SIGNED_PREFIX = b"noise-libp2p-static-key:"
_PREFIX = struct.Struct("<I")
_NONCE_REKEY = 2**64 - 1
# A libp2p peer id is an identity multihash (two bytes) in front of the protobuf-encoded key.
_MULTIHASH_HEAD = encode_libp2p_peer_id(PeerId(b""))[:2]
_IDENTITY_KEY_FIELD = 1
_IDENTITY_SIGNATURE_FIELD = 2
_CIPHER_FIELD = 15  # the last one with a tag of one byte; libp2p uses 1 to 4
_LENGTH_DELIMITED = 2
# What the Noise library and the primitives under it raise at messages that are short, forged or of a low-order key.
_NOISE_ERRORS = (InvalidTag, ValueError, NoiseHandshakeError, NoiseInvalidMessage, NoiseValueError)


class RecordCipher(StrEnum):
    """What seals the records of a link."""

    AES_256_GCM = "AES-256-GCM"
    CHACHA20_POLY1305 = "ChaCha20-Poly1305"


_AEADS: dict[RecordCipher, type[AESGCM] | type[ChaCha20Poly1305]] = {
    RecordCipher.AES_256_GCM: AESGCM,
    RecordCipher.CHACHA20_POLY1305: ChaCha20Poly1305,
}


class ChannelKeys:
    """A peer's side of every handshake: one X25519 key and the payload that ties it to the identity.

    `static_key` is 32 bytes of entropy from the shell, fresh with every start of the process. `prefers_chacha20`: this
    machine seals faster with it.
    """

    __slots__ = ("payload", "peer", "prefers_chacha20", "static_key")

    def __init__(self, identity: Identity, static_key: bytes, *, prefers_chacha20: bool = False) -> None:
        assert len(static_key) == STATIC_KEY_BYTES, "an X25519 key has 32 bytes"
        public = X25519PrivateKey.from_private_bytes(static_key).public_key().public_bytes_raw()
        # libp2p fixes these signed bytes; their prefix keeps them apart from everything that Identity.sign signs.
        signature = Ed25519PrivateKey.from_private_bytes(identity.seed).sign(_SIGNED_PREFIX + public)
        self.static_key = static_key
        self.peer = identity.peer
        self.prefers_chacha20 = prefers_chacha20
        self.payload = _encode_payload(identity.peer, signature, prefers_chacha20)


@dataclass(frozen=True, slots=True, kw_only=True)
class SecureChannel:
    """What a finished handshake yields. `cipher` seals the records; `leftover` are bytes that arrived behind it: the
    first records. `binding` is Noise's handshake hash: the same at both ends, and of no other connection."""

    peer: PeerId
    binding: bytes
    cipher: RecordCipher
    sealer: "RecordSealer"
    opener: "RecordOpener"
    leftover: bytes


class Handshake:
    """One side of one handshake, hello included.

    Send whatever `take_outgoing` returns, at the start and after every `receive`, also when that has raised: the last
    bytes tell the other side why. `expected` is the only peer that will do; a dialer must name it.
    """

    __slots__ = (
        "_cipher",
        "_expected",
        "_greeted",
        "_inbox",
        "_keys",
        "_noise",
        "_outbox",
        "_state",
        "_swarm_tag",
        "dialer",
    )

    def __init__(self, keys: ChannelKeys, swarm: bytes, *, dialer: bool, expected: PeerId | None = None) -> None:
        assert expected is not None or not dialer, "a dialer knows whom it dials"
        self._keys = keys
        self.dialer = dialer
        self._expected = expected
        self._cipher = RecordCipher.CHACHA20_POLY1305 if keys.prefers_chacha20 else RecordCipher.AES_256_GCM
        self._greeted = False
        self._swarm_tag = blake3(swarm, derive_key_context="shoal tensor link hello").digest(8)
        self._inbox = bytearray()
        self._outbox = bytearray()
        self._noise = NoiseConnection.from_name(NOISE_NAME)
        self._noise.set_prologue(_PROLOGUE + swarm)
        self._noise.set_keypair_from_private_bytes(Keypair.STATIC, keys.static_key)
        if dialer:
            self._noise.set_as_initiator()
        else:
            self._noise.set_as_responder()
        self._noise.start_handshake()
        # The library forgets its state, and with it the remote key, as soon as the last message is through.
        self._state = self._noise.noise_protocol.handshake_state
        if dialer:
            self._say_hello()
            self._write_message(b"")

    def take_outgoing(self) -> bytes:
        """The bytes to send now, possibly none."""
        outgoing = bytes(self._outbox)
        self._outbox.clear()
        return outgoing

    def receive(self, data: bytes | memoryview) -> SecureChannel | None:
        """Take bytes in; the channel once the handshake is done. Raises ProtocolError, after which it is over."""
        self._inbox += data
        if not self._greeted and not self._read_hello():
            return None
        while (message := self._next_message()) is not None:
            try:
                peer = self._advance(message)
            except _NOISE_ERRORS as error:
                raise ProtocolError(Refusal.NOT_AUTHENTIC, f"handshake: {type(error).__name__}") from error
            if peer is not None:
                return self._finish(peer)
        return None

    def _say_hello(self) -> None:
        self._outbox += _HELLO.pack(_HELLO_MAGIC, LINK_VERSION, self._swarm_tag)

    def _read_hello(self) -> bool:
        if not _HELLO_MAGIC.startswith(self._inbox[: len(_HELLO_MAGIC)]):
            raise ProtocolError(Refusal.MALFORMED, "not a tensor link")
        if len(self._inbox) < HELLO_BYTES:
            return False
        if not self.dialer:
            # Not earlier: a scanner that does not speak the protocol learns nothing.
            self._say_hello()
        _, version, tag = _HELLO.unpack_from(self._inbox)
        if version != LINK_VERSION:
            raise ProtocolError(Refusal.WRONG_VERSION, f"peer speaks link version {version}, we speak {LINK_VERSION}")
        if tag != self._swarm_tag:
            raise ProtocolError(Refusal.WRONG_SWARM, "peer is in another swarm")
        del self._inbox[:HELLO_BYTES]
        self._greeted = True
        return True

    def _next_message(self) -> bytes | None:
        nbytes = int.from_bytes(self._inbox[:2], "big")
        if nbytes > HANDSHAKE_MESSAGE_BYTES_MAX:
            raise ProtocolError(Refusal.OVERSIZED, f"a handshake message of {nbytes} bytes")
        end = 2 + nbytes
        if len(self._inbox) < max(end, 2):
            return None
        message = bytes(self._inbox[2:end])
        del self._inbox[:end]
        return message

    def _write_message(self, payload: bytes) -> None:
        message = self._noise.write_message(payload)
        self._outbox += len(message).to_bytes(2, "big") + message

    def _advance(self, message: bytes) -> PeerId | None:
        """Take one message and answer it; the other side's peer id once it is proven."""
        payload = bytes(self._noise.read_message(message))
        if not self.dialer and not self._noise.handshake_finished:
            if payload:
                raise ProtocolError(Refusal.MALFORMED, "the first handshake message has a payload")
            self._write_message(self._keys.payload)
            return None
        peer, prefers_chacha20 = _verify_payload_untrusted(payload, self._state.rs.public_bytes)
        if prefers_chacha20:
            self._cipher = RecordCipher.CHACHA20_POLY1305
        if peer == self._keys.peer or self._expected not in (None, peer):
            raise ProtocolError(Refusal.WRONG_PEER, f"the key is that of {short_peer_id(peer)}")
        if self.dialer:
            self._write_message(self._keys.payload)
        return peer

    def _finish(self, peer: PeerId) -> SecureChannel:
        noise = self._noise.noise_protocol
        return SecureChannel(
            peer=peer,
            binding=bytes(noise.handshake_hash),
            cipher=self._cipher,
            sealer=RecordSealer(noise.cipher_state_encrypt.k, self._cipher),
            opener=RecordOpener(noise.cipher_state_decrypt.k, self._cipher),
            leftover=bytes(self._inbox),
        )


class _RecordKey:
    """One direction's key: the nonce counts records, and the key is replaced every `rekey_records` of them."""

    __slots__ = ("_aead", "_key", "_make_aead", "_records", "_rekey_records")

    def __init__(
        self,
        key: bytes,
        cipher: RecordCipher = RecordCipher.AES_256_GCM,
        *,
        rekey_records: int = REKEY_RECORDS,
    ) -> None:
        self._key = key
        self._make_aead = _AEADS[cipher]
        self._aead = self._make_aead(key)
        self._records = 0
        self._rekey_records = rekey_records

    def _next_nonce(self) -> bytes:
        """Call it before `_aead` is looked up: it may replace the key."""
        if self._records and self._records % self._rekey_records == 0:
            self._key = self._aead.encrypt(_encode_nonce(_NONCE_REKEY), bytes(32), None)[:32]
            self._aead = self._make_aead(self._key)
        nonce = _encode_nonce(self._records)
        self._records += 1
        return nonce


class RecordSealer(_RecordKey):
    """Seals the records of one direction, in the order in which they are sent."""

    __slots__ = ()

    def seal_into(self, kind: int, plain: bytes | memoryview, out: memoryview) -> int:
        """Write one record into `out` and return its length, len(plain) + RECORD_OVERHEAD_BYTES.

        `kind` is 0..255 and is authenticated; `plain` has at most RECORD_BYTES_MAX bytes and does not overlap `out`.
        """
        assert len(plain) <= RECORD_BYTES_MAX, "a record is a slice of a payload"
        end = len(plain) + RECORD_OVERHEAD_BYTES
        prefix = _PREFIX.pack(kind << 24 | len(plain))
        out[:PREFIX_BYTES] = prefix
        nonce = self._next_nonce()
        self._aead.encrypt_into(nonce, plain, prefix, out[PREFIX_BYTES:end])
        return end


class RecordOpener(_RecordKey):
    """Opens the records of one direction, in the order in which they arrive."""

    __slots__ = ()

    def open_into(self, record: memoryview, out: memoryview) -> None:
        """Decrypt a whole record, prefix included, into `out`, which has exactly the announced length.

        Raises ProtocolError(NOT_AUTHENTIC); the channel is then unusable and `out` holds rubbish.
        """
        prefix, sealed = record[:PREFIX_BYTES], record[PREFIX_BYTES:]
        nonce = self._next_nonce()
        try:
            self._aead.decrypt_into(nonce, sealed, prefix, out)
        except InvalidTag as error:
            raise ProtocolError(Refusal.NOT_AUTHENTIC, "a record was altered") from error


def decode_prefix_untrusted(prefix: bytes | memoryview) -> tuple[int, int]:
    """The kind and the plain length that a record's four prefix bytes announce; raises ProtocolError(OVERSIZED).

    They are authentic only once the record has been opened: use them to bound what is read, nothing else.
    """
    word: int = _PREFIX.unpack(prefix)[0]
    kind, nbytes = word >> 24, word & 0xFFFFFF
    if nbytes > RECORD_BYTES_MAX:
        raise ProtocolError(Refusal.OVERSIZED, f"a record of {nbytes} bytes")
    return kind, nbytes


def _encode_nonce(counter: int) -> bytes:
    return bytes(4) + counter.to_bytes(8, "big")


def _encode_payload(peer: PeerId, signature: bytes, prefers_chacha20: bool) -> bytes:
    """libp2p's NoiseHandshakePayload: identity_key = 1, identity_sig = 2, both bytes; and our own field, where the
    records' cipher is not to be the usual one."""
    key = encode_libp2p_peer_id(peer)[len(_MULTIHASH_HEAD) :]
    fields = [(_IDENTITY_KEY_FIELD, key), (_IDENTITY_SIGNATURE_FIELD, signature)]
    if prefers_chacha20:
        fields.append((_CIPHER_FIELD, RecordCipher.CHACHA20_POLY1305.encode()))
    return b"".join(bytes([field << 3 | _LENGTH_DELIMITED, len(value)]) + value for field, value in fields)


def _verify_payload_untrusted(payload: bytes, static_public: bytes) -> tuple[PeerId, bool]:
    """The peer whose identity key signed the X25519 key that the handshake has just proven, and whether it prefers
    ChaCha20-Poly1305; raises ProtocolError."""
    fields = _decode_payload_untrusted(payload)
    key, signature = fields.get(_IDENTITY_KEY_FIELD, b""), fields.get(_IDENTITY_SIGNATURE_FIELD, b"")
    peer = decode_libp2p_peer_id(_MULTIHASH_HEAD + key)
    try:
        Ed25519PublicKey.from_public_bytes(peer).verify(signature, _SIGNED_PREFIX + static_public)
    except (InvalidSignature, ValueError) as error:
        raise ProtocolError(
            Refusal.BAD_SIGNATURE, f"the channel's key is not signed by {short_peer_id(peer)}"
        ) from error
    return peer, fields.get(_CIPHER_FIELD) == RecordCipher.CHACHA20_POLY1305.encode()


def _decode_payload_untrusted(raw: bytes) -> dict[int, bytes]:
    """The length-delimited protobuf fields in `raw` by number; other libp2p programs send more than we need."""
    fields: dict[int, bytes] = {}
    at = 0
    while at < len(raw):
        field, wire_type = raw[at] >> 3, raw[at] & 7
        length, shift = 0, 0
        at += 1
        while at < len(raw) and shift < 14:
            length |= (raw[at] & 0x7F) << shift
            shift += 7
            at += 1
            if raw[at - 1] < 0x80:
                break
        else:
            raise ProtocolError(Refusal.MALFORMED, "handshake payload: a length is cut short")
        if wire_type != _LENGTH_DELIMITED or at + length > len(raw) or field in fields:
            raise ProtocolError(Refusal.MALFORMED, f"handshake payload: field {field}")
        fields[field] = raw[at : at + length]
        at += length
    return fields
