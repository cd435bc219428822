"""Which secure channel should tensor links have? Noise with AEAD records against libp2p's TLS 1.3, on one thread.

    python benchmarks/secure_channel.py [--megabytes N] [--repeats N] [--json FILE]

Both ends run in this thread, without sockets: what is compared is the CPU time (not the wall time) of sealing one end's
memory into wire bytes and of opening those into the other end's memory. MB = 10^6 bytes; "both" is what one core
carries when it does both. A handshake is that of both ends together: two identities proven, libp2p's payload or
certificate checked.

Noise needs nothing but the project's dependencies; the TLS half needs pyOpenSSL.
"""

import argparse
import datetime
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from OpenSSL import SSL

from shoal.protocol.identity import Identity, PeerId, encode_libp2p_peer_id
from shoal.protocol.secure_channel import (
    RECORD_OVERHEAD_BYTES,
    ChannelKeys,
    Handshake,
    RecordOpener,
    RecordSealer,
)

RECORD_BYTES = (16 * 1024, 64 * 1024, 256 * 1024)
SWARM = bytes(32)
LIBP2P_EXTENSION = x509.ObjectIdentifier("1.3.6.1.4.1.53594.1.1")
TLS_SIGNED_PREFIX = b"libp2p-tls-handshake:"
BIO_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Rates:
    """MB/s."""

    seal: float
    open: float

    def as_json(self) -> dict[str, int]:
        both = 1 / (1 / self.seal + 1 / self.open)
        return {"seal": round(self.seal), "open": round(self.open), "both": round(both)}


Exchange = Callable[[memoryview, memoryview], tuple[float, float]]
"""Move one record from the first buffer to the second; seconds spent sealing and opening."""


def exchange_by_record_layer() -> Exchange:
    """The link's own record layer: AES-256-GCM."""
    sealer, opener = RecordSealer(bytes(32)), RecordOpener(bytes(32))
    wire = memoryview(bytearray(max(RECORD_BYTES) + RECORD_OVERHEAD_BYTES))

    def exchange(source: memoryview, target: memoryview) -> tuple[float, float]:
        began = time.thread_time()
        nbytes = sealer.seal_into(2, source, wire)
        middle = time.thread_time()
        opener.open_into(wire[:nbytes], target)
        return middle - began, time.thread_time() - middle

    return exchange


def exchange_by_aead(aead: AESGCM | ChaCha20Poly1305, *, in_place: bool) -> Exchange:
    """A bare AEAD of `cryptography`, writing into a buffer or returning new bytes."""
    counter = 0

    def exchange(source: memoryview, target: memoryview) -> tuple[float, float]:
        nonlocal counter
        counter += 1
        nonce = counter.to_bytes(12, "big")
        wire = memoryview(buffer)[: len(source) + 16]
        began = time.thread_time()
        sealed = wire
        if in_place:
            aead.encrypt_into(nonce, source, None, wire)
        else:
            sealed = memoryview(aead.encrypt(nonce, source, None))
        middle = time.thread_time()
        if in_place:
            aead.decrypt_into(nonce, sealed, None, target)
        else:
            target[:] = aead.decrypt(nonce, sealed, None)
        return middle - began, time.thread_time() - middle

    buffer = bytearray(max(RECORD_BYTES) + 16)
    return exchange


def exchange_by_tls(suite: bytes) -> Exchange:
    """pyOpenSSL with memory BIOs, as an asyncio protocol would pump it."""
    client, server = shake_hands_tls(make_tls_context(b"c" * 32, suite), make_tls_context(b"s" * 32, suite))

    def exchange(source: memoryview, target: memoryview) -> tuple[float, float]:
        began = time.thread_time()
        client.sendall(source)
        chunks = read_all(client)
        middle = time.thread_time()
        received = 0
        for chunk in chunks:
            server.bio_write(chunk)
            while received < len(target):
                try:
                    received += server.recv_into(target[received:])
                except SSL.WantReadError:
                    break
        assert received == len(target)
        return middle - began, time.thread_time() - middle

    return exchange


def read_all(connection: SSL.Connection) -> list[bytes]:
    """Everything that the connection wants to send."""
    chunks = []
    while True:
        try:
            chunks.append(connection.bio_read(BIO_BYTES))
        except SSL.WantReadError:
            return chunks


def make_tls_context(seed: bytes, suite: bytes) -> SSL.Context:
    """TLS 1.3 with a libp2p certificate on both sides."""
    identity = Ed25519PrivateKey.from_private_bytes(seed)
    key = ec.generate_private_key(ec.SECP256R1())
    spki = key.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    public = encode_libp2p_peer_id(PeerId(identity.public_key().public_bytes_raw()))[2:]
    signature = identity.sign(TLS_SIGNED_PREFIX + spki)
    octets = b"".join(b"\x04" + bytes([len(value)]) + value for value in (public, signature))
    extension = x509.UnrecognizedExtension(LIBP2P_EXTENSION, b"\x30" + bytes([len(octets)]) + octets)
    now = datetime.datetime.now(datetime.UTC)
    name = x509.Name([])
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(extension, critical=True)
        .sign(key, hashes.SHA256())
    )
    context = SSL.Context(SSL.TLS_METHOD)
    context.set_min_proto_version(SSL.TLS1_3_VERSION)
    context.set_tls13_ciphersuites(suite)
    context.use_certificate(certificate)
    context.use_privatekey(key)
    context.set_verify(SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT, lambda *_: True)
    return context


def check_tls_peer(connection: SSL.Connection) -> None:
    """Check the libp2p extension of the certificate that the other side showed."""
    certificate = connection.get_peer_certificate(as_cryptography=True)
    assert certificate is not None
    certificate.public_key()
    value = certificate.extensions.get_extension_for_oid(LIBP2P_EXTENSION).value
    assert isinstance(value, x509.UnrecognizedExtension)
    public, signature = value.value[8:40], value.value[42:]
    spki = certificate.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    Ed25519PublicKey.from_public_bytes(public).verify(signature, TLS_SIGNED_PREFIX + spki)


def shake_hands_tls(client_context: SSL.Context, server_context: SSL.Context) -> tuple[SSL.Connection, SSL.Connection]:
    client, server = SSL.Connection(client_context, None), SSL.Connection(server_context, None)
    client.set_connect_state()
    server.set_accept_state()
    unfinished = {client, server}
    while unfinished:
        for near, far in ((client, server), (server, client)):
            try:
                near.do_handshake()
                unfinished.discard(near)
            except SSL.WantReadError:
                pass
            for chunk in read_all(near):
                far.bio_write(chunk)
    check_tls_peer(client)
    check_tls_peer(server)
    return client, server


def shake_hands_noise(dialer: ChannelKeys, acceptor: ChannelKeys) -> None:
    near = Handshake(dialer, SWARM, dialer=True, expected=acceptor.peer)
    far = Handshake(acceptor, SWARM, dialer=False)
    far.receive(near.take_outgoing())
    assert near.receive(far.take_outgoing()) is not None
    assert far.receive(near.take_outgoing()) is not None


def measure_handshakes(repeats: int) -> dict[str, float]:
    """Milliseconds of CPU for both ends of one handshake; keys and certificates are made once, as a node makes them."""
    contexts = [make_tls_context(seed * 32, b"TLS_AES_256_GCM_SHA384") for seed in (b"c", b"s")]
    keys = [ChannelKeys(Identity(seed * 32), seed * 32) for seed in (b"c", b"s")]
    handshakes: dict[str, Callable[[], object]] = {
        "noise": lambda: shake_hands_noise(*keys),
        "tls": lambda: shake_hands_tls(*contexts),
    }
    figures = {}
    for name, shake in handshakes.items():
        times = []
        for _ in range(20 * repeats):
            began = time.thread_time()
            shake()
            times.append(time.thread_time() - began)
        figures[name] = round(statistics.median(times) * 1e3, 2)
    return figures


def measure_rates(exchange: Exchange, record_bytes: int, megabytes: int, repeats: int) -> Rates:
    source, target = memoryview(os.urandom(record_bytes)), memoryview(bytearray(record_bytes))
    records = max(1, megabytes * 1_000_000 // record_bytes)
    runs = []
    for _ in range(repeats + 1):
        times = [exchange(source, target) for _ in range(records)]
        sealing, opening = (sum(column) for column in zip(*times, strict=True))
        volume = records * record_bytes / 1e6
        runs.append((volume / sealing, volume / opening))
    assert target == source
    seals, opens = zip(*runs[1:], strict=True)
    return Rates(statistics.median(seals), statistics.median(opens))


def main() -> None:
    parser = argparse.ArgumentParser(description="Noise and AEAD records against TLS 1.3")
    parser.add_argument("--megabytes", type=int, default=200, help="per run (default 200)")
    parser.add_argument("--repeats", type=int, default=5, help="measured runs per case (default 5)")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    arguments = parser.parse_args()
    channels: dict[str, Callable[[], Exchange]] = {
        "link records (AES-256-GCM, encrypt_into)": exchange_by_record_layer,
        "AES-256-GCM, encrypt": lambda: exchange_by_aead(AESGCM(bytes(32)), in_place=False),
        "ChaCha20-Poly1305, encrypt_into": lambda: exchange_by_aead(ChaCha20Poly1305(bytes(32)), in_place=True),
        "TLS 1.3 AES-256-GCM, memory BIO": lambda: exchange_by_tls(b"TLS_AES_256_GCM_SHA384"),
        "TLS 1.3 AES-128-GCM, memory BIO": lambda: exchange_by_tls(b"TLS_AES_128_GCM_SHA256"),
        "TLS 1.3 ChaCha20-Poly1305, memory BIO": lambda: exchange_by_tls(b"TLS_CHACHA20_POLY1305_SHA256"),
    }
    results = {
        "handshake_ms": measure_handshakes(arguments.repeats),
        "megabytes_per_s": {
            name: {
                f"{record_bytes // 1024} KiB": measure_rates(
                    make(), record_bytes, arguments.megabytes, arguments.repeats
                ).as_json()
                for record_bytes in RECORD_BYTES
            }
            for name, make in channels.items()
        },
    }
    print(json.dumps(results, indent=2))
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=2)


if __name__ == "__main__":
    main()
