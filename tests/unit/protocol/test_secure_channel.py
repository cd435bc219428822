"""The secure channel: who gets through, who is told what, and what a record protects."""

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from noise.connection import Keypair, NoiseConnection

from shoal.protocol import secure_channel
from shoal.protocol.errors import ProtocolError, Refusal
from shoal.protocol.identity import Identity, PeerId
from shoal.protocol.secure_channel import (
    HANDSHAKE_MESSAGE_BYTES_MAX,
    HELLO_BYTES,
    PREFIX_BYTES,
    RECORD_BYTES_MAX,
    RECORD_OVERHEAD_BYTES,
    ChannelKeys,
    Handshake,
    RecordCipher,
    RecordOpener,
    RecordSealer,
    SecureChannel,
    _decode_payload_untrusted,
    decode_prefix_untrusted,
)

SWARM, OTHER_SWARM = b"s" * 32, b"o" * 32
ALICE, BOB, CAROL = (ChannelKeys(Identity(seed * 32), seed * 32) for seed in (b"a", b"b", b"c"))


def dial(expected: PeerId = BOB.peer, swarm: bytes = SWARM, keys: ChannelKeys = ALICE) -> Handshake:
    return Handshake(keys, swarm, dialer=True, expected=expected)


def accept(swarm: bytes = SWARM, keys: ChannelKeys = BOB) -> Handshake:
    return Handshake(keys, swarm, dialer=False)


def shake_hands(dialer: Handshake, acceptor: Handshake) -> tuple[SecureChannel, SecureChannel]:
    """Both ends' channels, dialer first."""
    assert acceptor.receive(dialer.take_outgoing()) is None
    dialled = dialer.receive(acceptor.take_outgoing())
    accepted = acceptor.receive(dialer.take_outgoing())
    assert dialled is not None and accepted is not None
    return dialled, accepted


def refusal_of(side: Handshake, data: bytes) -> Refusal:
    with pytest.raises(ProtocolError) as caught:
        side.receive(data)
    return caught.value.refusal


def seal(channel: SecureChannel, plain: bytes, kind: int = 1) -> bytearray:
    record = bytearray(len(plain) + RECORD_OVERHEAD_BYTES)
    assert channel.sealer.seal_into(kind, plain, memoryview(record)) == len(record)
    return record


def open_record(channel: SecureChannel, record: bytearray) -> bytes:
    plain = bytearray(len(record) - RECORD_OVERHEAD_BYTES)
    channel.opener.open_into(memoryview(record), memoryview(plain))
    return bytes(plain)


def test_both_sides_learn_who_the_other_is() -> None:
    dialled, accepted = shake_hands(dial(), accept())
    assert (dialled.peer, accepted.peer) == (BOB.peer, ALICE.peer)


def test_records_go_both_ways_and_every_handshake_has_its_own_keys() -> None:
    dialled, accepted = shake_hands(dial(), accept())
    there, back = seal(dialled, b"there"), seal(accepted, b"back")
    assert open_record(accepted, there) == b"there"
    assert open_record(dialled, back) == b"back"
    assert there[PREFIX_BYTES:] != seal(shake_hands(dial(), accept())[0], b"there")[PREFIX_BYTES:]


@pytest.mark.parametrize("dialer_prefers", [False, True])
@pytest.mark.parametrize("acceptor_prefers", [False, True])
def test_one_side_that_is_faster_with_chacha20_decides(dialer_prefers: bool, acceptor_prefers: bool) -> None:
    alice = ChannelKeys(Identity(b"a" * 32), b"a" * 32, prefers_chacha20=dialer_prefers)
    bob = ChannelKeys(Identity(b"b" * 32), b"b" * 32, prefers_chacha20=acceptor_prefers)
    dialled, accepted = shake_hands(dial(keys=alice), accept(keys=bob))
    expected = RecordCipher.CHACHA20_POLY1305 if dialer_prefers or acceptor_prefers else RecordCipher.AES_256_GCM
    assert dialled.cipher is accepted.cipher is expected
    for number in range(3):
        plain = bytes([number]) * 1000
        assert open_record(accepted, seal(dialled, plain)) == plain
        assert open_record(dialled, seal(accepted, plain)) == plain
    altered = seal(dialled, b"there")
    altered[-1] ^= 1
    with pytest.raises(ProtocolError) as caught:
        open_record(accepted, altered)
    assert caught.value.refusal is Refusal.NOT_AUTHENTIC


def test_a_cipher_that_nobody_knows_is_passed_over() -> None:
    payload = ALICE.payload + bytes([15 << 3 | 2, 3]) + b"XYZ"
    assert _decode_payload_untrusted(payload)[15] == b"XYZ"
    strange = ChannelKeys(Identity(b"a" * 32), b"a" * 32)
    strange.payload = payload
    dialled, accepted = shake_hands(dial(keys=strange), accept())
    assert dialled.cipher is accepted.cipher is RecordCipher.AES_256_GCM


@pytest.mark.parametrize("cipher", RecordCipher)
def test_each_cipher_seals_with_noise_nonces_and_its_own_rekey(cipher: RecordCipher) -> None:
    aead = {RecordCipher.AES_256_GCM: AESGCM, RecordCipher.CHACHA20_POLY1305: ChaCha20Poly1305}[cipher]
    sealer, key, plain = RecordSealer(b"k" * 32, cipher, rekey_records=2), b"k" * 32, b"plain"
    record = memoryview(bytearray(len(plain) + RECORD_OVERHEAD_BYTES))
    for number in range(5):
        if number in (2, 4):
            key = aead(key).encrypt(bytes(4) + b"\xff" * 8, bytes(32), None)[:32]
        sealer.seal_into(7, plain, record)
        sealed = aead(key).encrypt(bytes(4) + number.to_bytes(8, "big"), plain, bytes(record[:PREFIX_BYTES]))
        assert bytes(record[PREFIX_BYTES:]) == sealed


def test_handshake_works_byte_by_byte_and_keeps_what_follows() -> None:
    dialer, acceptor = dial(), accept()
    for byte in dialer.take_outgoing():
        assert acceptor.receive(bytes([byte])) is None
    answer = acceptor.take_outgoing()
    for byte in answer[:-1]:
        assert dialer.receive(bytes([byte])) is None
    dialled = dialer.receive(answer[-1:])
    assert dialled is not None
    record = seal(dialled, b"first")
    accepted = acceptor.receive(dialer.take_outgoing() + record)
    assert accepted is not None
    assert accepted.leftover == record
    assert open_record(accepted, bytearray(accepted.leftover)) == b"first"


def test_dialer_refuses_any_other_peer_and_tells_it_nothing() -> None:
    dialer, acceptor = dial(expected=CAROL.peer), accept()
    acceptor.receive(dialer.take_outgoing())
    assert refusal_of(dialer, acceptor.take_outgoing()) is Refusal.WRONG_PEER
    assert dialer.take_outgoing() == b""


def test_acceptor_may_expect_somebody_too() -> None:
    dialer = dial()
    acceptor = Handshake(BOB, SWARM, dialer=False, expected=CAROL.peer)
    acceptor.receive(dialer.take_outgoing())
    dialer.receive(acceptor.take_outgoing())
    assert refusal_of(acceptor, dialer.take_outgoing()) is Refusal.WRONG_PEER


def test_peer_with_our_own_identity_is_refused() -> None:
    twin = ChannelKeys(Identity(b"b" * 32), b"t" * 32)
    dialer, acceptor = dial(keys=twin), accept()
    acceptor.receive(dialer.take_outgoing())
    assert refusal_of(dialer, acceptor.take_outgoing()) is Refusal.WRONG_PEER


def test_other_swarm_is_told_so_on_both_sides() -> None:
    dialer, acceptor = dial(swarm=OTHER_SWARM), accept()
    assert refusal_of(acceptor, dialer.take_outgoing()) is Refusal.WRONG_SWARM
    assert refusal_of(dialer, acceptor.take_outgoing()) is Refusal.WRONG_SWARM


def test_forged_hello_does_not_get_another_swarm_through() -> None:
    dialer, acceptor = dial(swarm=OTHER_SWARM), accept()
    hello = dial().take_outgoing()[:HELLO_BYTES]
    acceptor.receive(hello + dialer.take_outgoing()[HELLO_BYTES:])
    theirs = accept(swarm=OTHER_SWARM)
    theirs.receive(dial(swarm=OTHER_SWARM).take_outgoing())
    answer = theirs.take_outgoing()[:HELLO_BYTES] + acceptor.take_outgoing()[HELLO_BYTES:]
    assert refusal_of(dialer, answer) is Refusal.NOT_AUTHENTIC


def test_hello_does_not_show_the_swarm_id() -> None:
    assert SWARM[:4] not in dial().take_outgoing()


def test_other_version_is_told_so_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    acceptor = accept()
    monkeypatch.setattr(secure_channel, "LINK_VERSION", 7)
    newer = dial()
    hello = newer.take_outgoing()
    monkeypatch.undo()
    assert refusal_of(acceptor, hello) is Refusal.WRONG_VERSION
    answer = acceptor.take_outgoing()
    monkeypatch.setattr(secure_channel, "LINK_VERSION", 7)
    assert refusal_of(newer, answer) is Refusal.WRONG_VERSION


def test_scanner_learns_nothing() -> None:
    acceptor = accept()
    assert refusal_of(acceptor, b"GET / HTTP/1.1\r\n\r\n") is Refusal.MALFORMED
    assert acceptor.take_outgoing() == b""


def test_long_handshake_message_is_refused_before_it_arrives() -> None:
    acceptor = accept()
    hello = dial().take_outgoing()[:HELLO_BYTES]
    announced = (HANDSHAKE_MESSAGE_BYTES_MAX + 1).to_bytes(2, "big")
    assert refusal_of(acceptor, hello + announced) is Refusal.OVERSIZED


def test_low_order_key_is_refused() -> None:
    hello = dial().take_outgoing()[:HELLO_BYTES]
    assert refusal_of(accept(), hello + (32).to_bytes(2, "big") + bytes(32)) is Refusal.NOT_AUTHENTIC


def test_first_message_must_be_empty() -> None:
    hello, message = dial().take_outgoing()[:HELLO_BYTES], dial().take_outgoing()[HELLO_BYTES + 2 :]
    assert refusal_of(accept(), hello + (33).to_bytes(2, "big") + message + b"x") is Refusal.MALFORMED


def test_key_that_the_identity_did_not_sign_is_refused() -> None:
    stolen = ChannelKeys(Identity(b"b" * 32), b"z" * 32)
    stolen.payload = BOB.payload
    dialer, acceptor = dial(), accept(keys=stolen)
    acceptor.receive(dialer.take_outgoing())
    assert refusal_of(dialer, acceptor.take_outgoing()) is Refusal.BAD_SIGNATURE


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\x0a",
        b"\x0a\xff",
        b"\x0a\xff\xff\xff\x01",
        b"\x08\x01",
        b"\x0a\x05abc",
        BOB.payload + BOB.payload,
        BOB.payload.replace(b"\x0a\x24\x08\x01", b"\x0a\x24\x08\x00"),
    ],
)
def test_malformed_identity_payload_is_refused(payload: bytes) -> None:
    broken = ChannelKeys(Identity(b"b" * 32), b"b" * 32)
    broken.payload = payload
    dialer, acceptor = dial(), accept(keys=broken)
    acceptor.receive(dialer.take_outgoing())
    assert refusal_of(dialer, acceptor.take_outgoing()) is Refusal.MALFORMED


def test_payload_fields_of_other_libp2p_programs_are_ignored() -> None:
    extended = ChannelKeys(Identity(b"b" * 32), b"b" * 32)
    extended.payload = BOB.payload + b"\x22\x82\x01" + bytes(130)
    dialled, _ = shake_hands(dial(), accept(keys=extended))
    assert dialled.peer == BOB.peer


def test_handshake_is_plain_noise() -> None:
    """A bare Noise library, told our prologue, agrees on the traffic keys: nothing in between is ours."""
    acceptor = accept()
    hello = dial().take_outgoing()[:HELLO_BYTES]
    noise = NoiseConnection.from_name(b"Noise_XX_25519_ChaChaPoly_SHA256")
    noise.set_as_initiator()
    noise.set_prologue(b"shoal-link\x00\x00\x01AES256-GCM\x00" + SWARM)
    noise.set_keypair_from_private_bytes(Keypair.STATIC, ALICE.static_key)
    noise.start_handshake()
    acceptor.receive(hello + b"\x00\x20" + noise.write_message(b""))
    assert noise.read_message(acceptor.take_outgoing()[HELLO_BYTES + 2 :]) == BOB.payload
    last = noise.write_message(ALICE.payload)
    accepted = acceptor.receive(len(last).to_bytes(2, "big") + last)
    assert accepted is not None
    record = seal(accepted, b"hello", kind=2)
    key = noise.noise_protocol.cipher_state_decrypt.k
    assert record[:PREFIX_BYTES] == b"\x05\x00\x00\x02"
    plain = AESGCM(key).decrypt(bytes(12), bytes(record[PREFIX_BYTES:]), bytes(record[:PREFIX_BYTES]))
    assert plain == b"hello"


@pytest.mark.parametrize("at", [0, 3, PREFIX_BYTES, -1])
def test_altered_record_is_refused(at: int) -> None:
    dialled, accepted = shake_hands(dial(), accept())
    record = seal(dialled, bytes(100))
    record[at] ^= 1
    with pytest.raises(ProtocolError) as caught:
        open_record(accepted, record)
    assert caught.value.refusal is Refusal.NOT_AUTHENTIC


def test_replayed_or_swapped_records_are_refused() -> None:
    dialled, accepted = shake_hands(dial(), accept())
    first, second = seal(dialled, b"1"), seal(dialled, b"2")
    assert open_record(accepted, first) == b"1"
    with pytest.raises(ProtocolError):
        open_record(accepted, first)
    other = shake_hands(dial(), accept())
    seal(other[0], b"1")
    with pytest.raises(ProtocolError):
        open_record(other[1], second)


def test_own_record_sent_back_is_refused() -> None:
    dialled, _ = shake_hands(dial(), accept())
    with pytest.raises(ProtocolError):
        open_record(dialled, seal(dialled, b"mine"))


def test_keys_are_replaced_in_step() -> None:
    key = bytes(range(32))
    sealer, opener = RecordSealer(key, rekey_records=3), RecordOpener(key, rekey_records=3)
    records = []
    for number in range(8):
        record = bytearray(1 + RECORD_OVERHEAD_BYTES)
        sealer.seal_into(1, bytes([number]), memoryview(record))
        records.append(record)
    plain = bytearray(1)
    for number, record in enumerate(records):
        opener.open_into(memoryview(record), memoryview(plain))
        assert plain[0] == number
    fourth = records[3]
    nonce = bytes(4) + (3).to_bytes(8, "big")
    rekeyed = AESGCM(key).encrypt(bytes(4) + b"\xff" * 8, bytes(32), None)[:32]
    assert AESGCM(rekeyed).decrypt(nonce, bytes(fourth[PREFIX_BYTES:]), bytes(fourth[:PREFIX_BYTES])) == b"\x03"


def test_prefix_is_bounded() -> None:
    assert decode_prefix_untrusted(b"\x00\x00\x04\x02") == (2, RECORD_BYTES_MAX)
    with pytest.raises(ProtocolError) as caught:
        decode_prefix_untrusted(b"\x01\x00\x04\x02")
    assert caught.value.refusal is Refusal.OVERSIZED
