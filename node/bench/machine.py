"""What this machine can do at best, without anything of ours: memory, hashes, ciphers, loopback TCP and TLS."""

import datetime
import os
import socket
import ssl
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from blake3 import blake3
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from cryptography.x509.oid import NameOID

from shoal.node.bench.rates import measure_rate
from shoal.protocol.secure_channel import RECORD_BYTES_MAX

MEMORY_BYTES = 64 << 20  # more than the caches hold
WIRE_BYTES = 256 << 20
CHUNK_BYTES = 256 << 10
CONNECT_TIMEOUT_S = 5.0
_TAG_BYTES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineRates:
    """GB (10^9 bytes) a second: of one core, and of one connection with a core at either end for the last two."""

    memory_copy: float
    blake3: float
    aes_256_gcm: float
    chacha20_poly1305: float
    tcp: float
    tls: float


def measure_machine(repeats: int, say: Callable[[str], None]) -> MachineRates:
    """Some seconds."""
    source, target = np.ones(MEMORY_BYTES, np.uint8), np.zeros(MEMORY_BYTES, np.uint8)
    say("memory")
    memory_copy = measure_rate(lambda: np.copyto(target, source), MEMORY_BYTES, repeats, time.thread_time)
    say("hash and ciphers")
    hashed = measure_rate(lambda: blake3(source.data).digest(), MEMORY_BYTES, repeats, time.thread_time)
    aes = _measure_cipher(AESGCM(os.urandom(32)), repeats)
    chacha = _measure_cipher(ChaCha20Poly1305(os.urandom(32)), repeats)
    say("TCP and TLS on loopback")
    tcp = measure_rate(lambda: _transfer(None), WIRE_BYTES, repeats, time.perf_counter)
    with tempfile.TemporaryDirectory() as folder:
        contexts = _make_contexts(Path(folder))
        tls = measure_rate(lambda: _transfer(contexts), WIRE_BYTES, repeats, time.perf_counter)
    return MachineRates(
        memory_copy=memory_copy, blake3=hashed, aes_256_gcm=aes, chacha20_poly1305=chacha, tcp=tcp, tls=tls
    )


def _measure_cipher(cipher: AESGCM | ChaCha20Poly1305, repeats: int) -> float:
    """Sealing in records as long as those of a tensor link, into memory that is there."""
    plain, sealed = bytes(RECORD_BYTES_MAX), bytearray(RECORD_BYTES_MAX + _TAG_BYTES)
    records = MEMORY_BYTES // RECORD_BYTES_MAX

    def seal() -> None:
        for number in range(records):
            cipher.encrypt_into(number.to_bytes(12, "big"), plain, None, sealed)

    return measure_rate(seal, records * RECORD_BYTES_MAX, repeats, time.thread_time)


Contexts = tuple[ssl.SSLContext, ssl.SSLContext]


def _transfer(contexts: Contexts | None) -> None:
    """WIRE_BYTES over a new connection, from one thread to another; both let go of the interpreter while they work."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        sender = threading.Thread(target=_send, args=(server.getsockname(), contexts))
        sender.start()
        server.settimeout(CONNECT_TIMEOUT_S)
        connection, _ = server.accept()
        if contexts is not None:
            connection = contexts[0].wrap_socket(connection, server_side=True)
        buffer, left = bytearray(CHUNK_BYTES), WIRE_BYTES
        with connection:
            while left:
                got = connection.recv_into(buffer)
                assert got, "the sender sends all"
                left -= got
        sender.join()


def _send(address: tuple[str, int], contexts: Contexts | None) -> None:
    connection = socket.create_connection(address, CONNECT_TIMEOUT_S)
    if contexts is not None:
        connection = contexts[1].wrap_socket(connection)
    chunk = bytes(CHUNK_BYTES)
    with connection:
        for _ in range(WIRE_BYTES // CHUNK_BYTES):
            connection.sendall(chunk)


def _make_contexts(folder: Path) -> Contexts:
    """Those of a server with a certificate for a minute, and of a client that takes any: nothing secret is sent."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "shoal bench")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now)
        .not_valid_after(now + datetime.timedelta(minutes=10))
        .sign(key, hashes.SHA256())
    )
    form = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    path = folder / "bench.pem"
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, *form) + certificate.public_bytes(serialization.Encoding.PEM)
    )
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    server.load_cert_chain(path)
    server.num_tickets = 0  # the client reads nothing: closing upon a ticket would reset the connection
    client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
    return server, client
