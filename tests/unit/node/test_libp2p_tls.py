"""TLS of libp2p's control connections: who gets through the handshake, who does not, and what it carries."""

import hashlib
from collections.abc import Awaitable, Callable
from contextlib import suppress

import pytest
import trio
import trio.testing
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from libp2p.abc import ISecureConn
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.keys import KeyPair
from libp2p.exceptions import BaseLibp2pError
from libp2p.io.exceptions import IOException
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.peer.id import ID
from libp2p.security.exceptions import HandshakeFailure
from libp2p.security.tls.certificate import LIBP2P_EXTENSION_OID, create_cert_template, generate_certificate
from OpenSSL import SSL

from shoal.node.libp2p_connections import Transport
from shoal.node.libp2p_tls import HANDSHAKE_BYTES_MAX, TlsTransport, build_certificate

DIALLER, LISTENER, STRANGER = (create_new_key_pair(bytes([seed]) * 32) for seed in (1, 2, 3))


class PipeEnd(Transport):
    """A transport in memory."""

    def __init__(self, stream: trio.StapledStream) -> None:
        self.stream = stream
        self._unread = bytearray()

    async def _receive(self) -> bytes:
        return bytes(await self.stream.receive_some(4096))

    async def write(self, data: bytes) -> None:
        try:
            await self.stream.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise IOException("the other side is gone") from error

    async def close(self) -> None:
        await self.stream.aclose()

    async def abort(self) -> None:
        await self.stream.aclose()

    def get_remote_address(self) -> tuple[str, int] | None:
        return None


def peer_of(keys: KeyPair) -> ID:
    return ID.from_pubkey(keys.public_key)


def run(main: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        with trio.fail_after(30):
            await main()

    trio.run(bounded)


class Meeting:
    """A handshake of two sides, and what came of it on each."""

    def __init__(self, dialler: TlsTransport, listener: TlsTransport, expected: ID) -> None:
        self._dialler, self._listener, self._expected = dialler, listener, expected
        self.left, self.right = trio.testing.memory_stream_pair()
        self.dialled: ISecureConn | BaseLibp2pError | None = None
        self.accepted: ISecureConn | BaseLibp2pError | None = None

    async def shake_hands(self) -> None:
        async with trio.open_nursery() as both:
            both.start_soon(self._dial)
            both.start_soon(self._accept)

    async def _dial(self) -> None:
        try:
            raw = RawConnection(PipeEnd(self.left), True)
            self.dialled = await self._dialler.secure_outbound(raw, self._expected)
        except BaseLibp2pError as error:
            self.dialled = error
            await self.left.aclose()

    async def _accept(self) -> None:
        try:
            self.accepted = await self._listener.secure_inbound(RawConnection(PipeEnd(self.right), False))
        except BaseLibp2pError as error:
            self.accepted = error
            await self.right.aclose()


def offer(keys: KeyPair, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> TlsTransport:
    """A peer that shows this certificate."""
    transport = TlsTransport(keys)
    transport._context.use_certificate(certificate)
    transport._context.use_privatekey(key)
    return transport


def forge(extension: bytes | None) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """A self-signed certificate with this for libp2p's extension."""
    key = ec.generate_private_key(ec.SECP256R1())
    builder = build_certificate().public_key(key.public_key())
    if extension is not None:
        builder = builder.add_extension(x509.UnrecognizedExtension(LIBP2P_EXTENSION_OID, extension), critical=False)
    return builder.sign(key, hashes.SHA256()), key


def extension_of(keys: KeyPair) -> bytes:
    """The signed key in an honest certificate of these keys, which belongs to the key of that certificate alone."""
    text, _ = generate_certificate(keys.private_key, build_certificate())
    certificate = x509.load_pem_x509_certificate(text.encode())
    value = certificate.extensions.get_extension_for_oid(LIBP2P_EXTENSION_OID).value
    assert isinstance(value, x509.UnrecognizedExtension)
    return value.value


def test_both_sides_learn_who_the_other_is() -> None:
    async def main() -> None:
        meeting = Meeting(TlsTransport(DIALLER), TlsTransport(LISTENER), peer_of(LISTENER))
        await meeting.shake_hands()
        assert isinstance(meeting.dialled, ISecureConn) and isinstance(meeting.accepted, ISecureConn)
        assert meeting.dialled.get_remote_peer() == peer_of(LISTENER)
        assert meeting.accepted.get_remote_peer() == peer_of(DIALLER)
        assert (meeting.dialled.is_initiator, meeting.accepted.is_initiator) == (True, False)

    run(main)


def test_bytes_arrive_both_ways_at_once() -> None:
    async def main() -> None:
        meeting = Meeting(TlsTransport(DIALLER), TlsTransport(LISTENER), peer_of(LISTENER))
        await meeting.shake_hands()
        payload = hashlib.shake_128(b"payload").digest(1_000_000)
        received: dict[int, bytes] = {}

        async def send(side: ISecureConn, part: bytes) -> None:
            await side.write(part)

        async def receive(number: int, side: ISecureConn) -> None:
            taken = bytearray()
            while len(taken) < len(payload):
                taken += await side.read()
            received[number] = bytes(taken)

        async with trio.open_nursery() as all_ways:
            for number, side in enumerate((meeting.dialled, meeting.accepted)):
                assert isinstance(side, ISecureConn)
                all_ways.start_soon(send, side, payload)
                all_ways.start_soon(receive, number, side)
        assert received == {0: payload, 1: payload}

    run(main)


def test_the_end_of_the_transport_is_the_end() -> None:
    async def main() -> None:
        meeting = Meeting(TlsTransport(DIALLER), TlsTransport(LISTENER), peer_of(LISTENER))
        await meeting.shake_hands()
        assert isinstance(meeting.dialled, ISecureConn) and isinstance(meeting.accepted, ISecureConn)
        await meeting.dialled.write(b"last")
        await meeting.left.aclose()
        assert await meeting.accepted.read() == b"last"
        with pytest.raises(BaseLibp2pError):
            await meeting.accepted.read()

    run(main)


def test_another_peer_than_the_dialled_one_is_refused() -> None:
    async def main() -> None:
        meeting = Meeting(TlsTransport(DIALLER), TlsTransport(LISTENER), peer_of(STRANGER))
        await meeting.shake_hands()
        assert isinstance(meeting.dialled, HandshakeFailure)

    run(main)


@pytest.mark.parametrize(
    "certificate",
    [
        forge(None),
        forge(b""),
        forge(b"\x30\x84\xff\xff\xff\xff"),
        forge(extension_of(STRANGER)),
    ],
    ids=["no extension", "empty", "cut short", "another key's"],
)
@pytest.mark.parametrize("dials", [True, False])
def test_a_certificate_that_vouches_for_nobody_is_refused(
    certificate: tuple[x509.Certificate, ec.EllipticCurvePrivateKey], dials: bool
) -> None:
    async def main() -> None:
        liar = offer(STRANGER, *certificate)
        if dials:
            meeting = Meeting(liar, TlsTransport(LISTENER), peer_of(LISTENER))
        else:
            meeting = Meeting(TlsTransport(DIALLER), liar, peer_of(STRANGER))
        await meeting.shake_hands()
        assert isinstance(meeting.accepted if dials else meeting.dialled, HandshakeFailure)

    run(main)


def test_a_certificate_with_more_in_it_is_accepted() -> None:
    """As py-libp2p itself makes them, with its extension last."""

    async def main() -> None:
        text, key = generate_certificate(STRANGER.private_key, create_cert_template())
        private = load_pem_private_key(key.encode(), None)
        assert isinstance(private, ec.EllipticCurvePrivateKey)
        other = offer(STRANGER, x509.load_pem_x509_certificate(text.encode()), private)
        meeting = Meeting(other, TlsTransport(LISTENER), peer_of(LISTENER))
        await meeting.shake_hands()
        assert isinstance(meeting.accepted, ISecureConn)
        assert meeting.accepted.get_remote_peer() == peer_of(STRANGER)

    run(main)


@pytest.mark.parametrize(
    "first_bytes", [b"GET / HTTP/1.1\r\n\r\n", b"\0" * 64, b"\x16\x03\x01\xff\xff" + b"\1" * 70000]
)
def test_what_is_no_handshake_is_refused(first_bytes: bytes) -> None:
    async def main() -> None:
        near, far = trio.testing.memory_stream_pair()
        await far.send_all(first_bytes)
        await far.send_eof()
        with pytest.raises(HandshakeFailure):
            await TlsTransport(LISTENER).secure_inbound(RawConnection(PipeEnd(near), False))

    run(main)


def test_a_handshake_without_end_is_refused() -> None:
    async def main() -> None:
        near, far = trio.testing.memory_stream_pair()
        # A record that says it is a long hello, and more of it in every further record.
        record = b"\x16\x03\x01\x40\x00"
        await far.send_all(record + b"\x01\xff\xff\xff" + b"\0" * (0x4000 - 4))
        for _ in range(HANDSHAKE_BYTES_MAX // 0x4000 + 1):
            await far.send_all(record + b"\0" * 0x4000)
        with pytest.raises(HandshakeFailure):
            await TlsTransport(LISTENER).secure_inbound(RawConnection(PipeEnd(near), False))

    run(main)


def make_client(lacks: str) -> SSL.Context:
    """A TLS client that is libp2p's but for one thing."""
    context = TlsTransport(DIALLER)._context
    if lacks == "version":
        context.set_min_proto_version(SSL.TLS1_2_VERSION)
        context.set_max_proto_version(SSL.TLS1_2_VERSION)
    elif lacks == "application protocol":
        context.set_alpn_protos([b"h2"])
    else:
        context = SSL.Context(SSL.TLS_METHOD)
        context.set_alpn_protos([b"libp2p"])
    return context


@pytest.mark.parametrize("lacks", ["certificate", "version", "application protocol"])
def test_a_client_of_something_else_is_refused(lacks: str) -> None:
    async def main() -> None:
        near, far = trio.testing.memory_stream_pair()
        tls = SSL.Connection(make_client(lacks), None)
        tls.set_connect_state()

        async def accept() -> None:
            with pytest.raises(HandshakeFailure):
                await TlsTransport(LISTENER).secure_inbound(RawConnection(PipeEnd(near), False))
            await near.aclose()

        async def dial() -> None:
            with suppress(SSL.Error, trio.BrokenResourceError):
                while True:
                    with suppress(SSL.WantReadError):
                        tls.do_handshake()
                    with suppress(SSL.WantReadError):
                        await far.send_all(tls.bio_read(65536))
                    tls.bio_write(await far.receive_some(65536))

        async with trio.open_nursery() as both:
            both.start_soon(accept)
            both.start_soon(dial)

    run(main)
