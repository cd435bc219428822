"""libp2p's TLS 1.3 handshake over pyOpenSSL: mutual authentication by certificates that carry the libp2p key.

py-libp2p has a TLS transport of its own, which is not used: to see a client's certificate it writes a callback into
OpenSSL's SSL_CTX through ctypes, by the layout of one build of Python, and its certificates have two extensions before
libp2p's, where js-libp2p looks at the first alone. pyOpenSSL asks for the certificate by its public interface.

Follows the libp2p TLS specification 1.0.0: TLS 1.3 alone, ALPN "libp2p", a self-signed certificate of one signed-key
extension, no server name, no session resumption. Everything here runs in trio.

Invariants: a connection leaves the handshake only with a peer id whose key signed the certificate's key; the bytes of
a handshake are bounded, and its time is by the upgrade's own limit; what the peer can make fail fails as
HandshakeFailure, a write that was begun is finished before the next.
"""

import datetime
import secrets

import trio
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from libp2p.abc import IRawConnection, ISecureConn, ISecureTransport
from libp2p.connection_types import ConnectionType
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.keys import KeyPair, PublicKey
from libp2p.custom_types import TProtocol
from libp2p.io.abc import EncryptedMsgReadWriter
from libp2p.network.connection.exceptions import RawConnError
from libp2p.network.swarm import Swarm
from libp2p.peer.id import ID
from libp2p.security.exceptions import HandshakeFailure
from libp2p.security.secure_session import SecureSession
from libp2p.security.tls.certificate import generate_certificate, verify_certificate_chain
from libp2p.transport.upgrader import TransportUpgrader
from multiaddr import Multiaddr
from OpenSSL import SSL

from shoal.node.libp2p_connections import Contained
from shoal.protocol.identity import Identity

TLS_PROTOCOL = TProtocol("/tls/1.0.0")
# A certificate takes less than one; there is nothing else to send.
HANDSHAKE_BYTES_MAX = 32 * 1024
RECORD_BYTES_MAX = 16 * 1024
CLOCK_SKEW = datetime.timedelta(hours=1)
CERTIFICATE_LIFE = datetime.timedelta(days=100 * 365)

_ALPN = b"libp2p"


class TlsTransport(ISecureTransport):
    """Secures connections with the identity of `keys`."""

    def __init__(self, keys: KeyPair) -> None:
        self._keys = keys
        self._peer_id = ID.from_pubkey(keys.public_key)
        self._context = _build_context(keys)

    async def secure_inbound(self, conn: IRawConnection) -> ISecureConn:
        """As the accepting side; raises HandshakeFailure."""
        return await self._secure(conn, dials=False)

    async def secure_outbound(self, conn: IRawConnection, peer_id: ID) -> ISecureConn:
        """As the dialling side; raises HandshakeFailure, also when another peer answers."""
        session = await self._secure(conn, dials=True)
        if session.get_remote_peer() != peer_id:
            await session.close()
            raise HandshakeFailure(f"{session.get_remote_peer()} answered in the place of {peer_id}")
        return session

    async def _secure(self, conn: IRawConnection, *, dials: bool) -> SecureSession:
        tls = SSL.Connection(self._context, None)
        if dials:
            tls.set_connect_state()
        else:
            tls.set_accept_state()
        channel = TlsChannel(conn, tls)
        await channel.shake_hands()
        key = _authenticate(tls)
        return SecureSession(
            local_peer=self._peer_id,
            local_private_key=self._keys.private_key,
            remote_peer=ID.from_pubkey(key),
            remote_permanent_pubkey=key,
            is_initiator=dials,
            conn=channel,
        )


class TlsChannel(EncryptedMsgReadWriter):
    """Reads and writes over `raw` what `tls` seals and opens."""

    def __init__(self, raw: IRawConnection, tls: SSL.Connection) -> None:
        super().__init__(raw)
        self._raw = raw
        self._tls = tls
        self._writing = trio.Lock()

    async def shake_hands(self) -> None:
        """Raises HandshakeFailure."""
        received_bytes = 0
        while True:
            try:
                self._tls.do_handshake()
            except SSL.WantReadError:
                await self._flush()
            except SSL.Error as error:
                # The alert says why to the other side; it may be gone.
                with Contained("a TLS alert"):
                    await self._flush()
                raise HandshakeFailure(f"TLS: {_describe(error)}") from error
            else:
                await self._flush()
                return
            ciphertext = await self._raw.read()
            received_bytes += len(ciphertext)
            if not ciphertext or received_bytes > HANDSHAKE_BYTES_MAX:
                raise HandshakeFailure("TLS: hung up" if not ciphertext else f"TLS: {received_bytes} bytes and no end")
            self._tls.bio_write(ciphertext)

    async def read_msg(self) -> bytes:
        """The next bytes; none when the peer has hung up."""
        while True:
            try:
                return self._tls.recv(RECORD_BYTES_MAX)
            except SSL.WantReadError:
                # A key update, or an answer to one.
                await self._flush()
            except SSL.ZeroReturnError:
                return b""
            except SSL.Error as error:
                raise RawConnError(f"TLS: {_describe(error)}") from error
            ciphertext = await self._raw.read()
            if not ciphertext:
                return b""
            self._tls.bio_write(ciphertext)

    async def write_msg(self, msg: bytes) -> None:
        """Send all of `msg`."""
        async with self._writing:
            unsent = memoryview(msg)
            while unsent:
                try:
                    sent = self._tls.send(unsent[: 4 * RECORD_BYTES_MAX])
                except SSL.Error as error:
                    raise RawConnError(f"TLS: {_describe(error)}") from error
                unsent = unsent[sent:]
                await self._send_pending()

    async def close(self) -> None:
        """Close the connection; a farewell is worth no wait."""
        await self._raw.close()

    def encrypt(self, data: bytes) -> bytes:
        """Not a step of its own here."""
        return data

    def decrypt(self, data: bytes) -> bytes:
        """Not a step of its own here."""
        return data

    def get_remote_address(self) -> tuple[str, int] | None:
        """Of the connection below."""
        return self._raw.get_remote_address()

    def get_transport_addresses(self) -> list[Multiaddr]:
        """Of the connection below."""
        return self._raw.get_transport_addresses()

    def get_connection_type(self) -> ConnectionType:
        """Of the connection below."""
        return self._raw.get_connection_type()

    async def _flush(self) -> None:
        async with self._writing:
            await self._send_pending()

    async def _send_pending(self) -> None:
        while True:
            try:
                ciphertext = self._tls.bio_read(4 * RECORD_BYTES_MAX)
            except SSL.WantReadError:
                return
            await self._raw.write(ciphertext)


def add_tls(swarm: Swarm, identity: Identity) -> None:
    """Let the swarm's connections be secured by TLS where the other side does not speak what comes before."""
    assert isinstance(swarm.upgrader, TransportUpgrader)
    swarm.upgrader.security_multistream.add_transport(TLS_PROTOCOL, TlsTransport(create_new_key_pair(identity.seed)))


def build_certificate() -> x509.CertificateBuilder:
    """What a certificate says beside its key: nothing, so that libp2p's extension stays the only one."""
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "libp2p")])
    begins = datetime.datetime.now(datetime.UTC) - CLOCK_SKEW
    return (
        x509.CertificateBuilder()
        .serial_number(secrets.randbits(63) | 1)
        .not_valid_before(begins)
        .not_valid_after(begins + CERTIFICATE_LIFE)
        .subject_name(name)
        .issuer_name(name)
    )


def _build_context(keys: KeyPair) -> SSL.Context:
    certificate, key = generate_certificate(keys.private_key, build_certificate())
    context = SSL.Context(SSL.TLS_METHOD)
    context.set_min_proto_version(SSL.TLS1_3_VERSION)
    context.use_certificate(x509.load_pem_x509_certificate(certificate.encode()))
    private = serialization.load_pem_private_key(key.encode(), None)
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    context.use_privatekey(private)
    # Whom the certificate stands for is judged after the handshake; without one there is none.
    context.set_verify(SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT, lambda *_: True)
    context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
    context.set_options(SSL.OP_NO_TICKET)
    context.set_alpn_protos([_ALPN])
    context.set_alpn_select_callback(lambda _, offered: _ALPN if _ALPN in offered else SSL.NO_OVERLAPPING_PROTOCOLS)
    return context


def _authenticate(tls: SSL.Connection) -> PublicKey:
    """The key that vouches for the peer's certificate; raises HandshakeFailure."""
    if tls.get_alpn_proto_negotiated() != _ALPN:
        raise HandshakeFailure("TLS: this is not libp2p")
    certificate = tls.get_peer_certificate(as_cryptography=True)
    if certificate is None:
        raise HandshakeFailure("TLS: no certificate")
    key: PublicKey | None = None
    with Contained("checking a certificate"):
        key = verify_certificate_chain([certificate])
    if key is None:
        raise HandshakeFailure("TLS: the certificate does not vouch for a libp2p key")
    return key


def _describe(error: SSL.Error) -> str:
    # OpenSSL's queue of (library, function, reason); an empty one stands for a broken connection.
    reasons = error.args[0] if error.args and isinstance(error.args[0], list) else []
    return str(reasons[0][2]) if reasons else "the connection broke"
