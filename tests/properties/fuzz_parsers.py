"""Every parser of bytes from outside, with valid inputs to start from."""

import contextlib
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, TypeVar
from urllib.parse import urlsplit

import numpy as np
from blake3 import blake3
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from shoal.crdt.certified import CertifiedChain, ChainBase, decode_base_untrusted
from shoal.crdt.clock import HLC_ZERO, Hlc
from shoal.crdt.entries import NO_ENTRY, ChainPosition, EntryContent, decode_batch_untrusted, encode_batch, sign_batch
from shoal.crdt.kinds import (
    KIND_RULES,
    AdmissionBody,
    BanBody,
    Body,
    Kind,
    ReadmissionBody,
    RegisterBody,
    RoundBody,
    TagBody,
    VersionedBody,
    decode_body_untrusted,
    encode_body,
)
from shoal.crdt.ledger import Draft, Ledger, LedgerRules
from shoal.crdt.measurements import HeldOutLoss, decode_measurement_untrusted
from shoal.crdt.reconciliation import answer, begin
from shoal.crdt.sketch import SALT_BYTES
from shoal.dht.addresses import parse_address_untrusted
from shoal.dht.peer_book import PeerBook, decode_peer_book_untrusted
from shoal.dht.records import AddressRecord, decode_address_record_untrusted, encode_signed_record
from shoal.node.ledger_view import LedgerPage
from shoal.node.mdns import decode_txt_untrusted, encode_txt
from shoal.node.nat_pmp import decode_answer_untrusted
from shoal.node.upnp_gateway import read_location_untrusted
from shoal.protocol.admission import (
    AdmissionProof,
    AdmissionRule,
    AdmissionTable,
    Known,
    issue_ticket,
    parse_ticket,
    prove_admission,
)
from shoal.protocol.codecs import CODECS
from shoal.protocol.effects import VoteRecord
from shoal.protocol.errors import ProtocolError, UriError
from shoal.protocol.frames import HEADER_BYTES, decode_header_untrusted, encode_header
from shoal.protocol.identity import format_peer_id
from shoal.protocol.manifest import SignedManifest, SwarmUri, parse_uri, read_manifest_untrusted
from shoal.protocol.messages import SCHEMA, Certificate, decode_message_untrusted, encode_message
from shoal.protocol.quorum import Authority, QuorumRule
from shoal.protocol.secure_channel import (
    PREFIX_BYTES,
    ChannelKeys,
    Handshake,
    _encode_payload,
    _verify_payload_untrusted,
    decode_prefix_untrusted,
)
from shoal.protocol.state import SnapshotIndex, chunk_digests, decode_index_untrusted
from shoal.protocol.wire import DELTA_BYTES_MAX, decode_record_untrusted, encode_record
from tests.properties.fuzz import Parser
from tests.properties.test_frames import headers
from tests.properties.test_manifest import GOOD, OWNER, SIGNED
from tests.properties.wire_strategies import records
from tests.unit.protocol.samples import IDENTITIES, PEERS, SWARM, certify, make_head, make_presence, make_sample_result

T = TypeVar("T")
ANNA, BEN, CARL = IDENTITIES[:3]
NOW_S = 1_000_000
ELEMENTS = 700
SAMPLES_PER_TYPE = 3


def draw(strategy: st.SearchStrategy[T], count: int) -> list[T]:
    """The same examples each time."""
    drawn: list[T] = []

    @settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def gather(value: T) -> None:
        drawn.append(value)

    gather()
    return drawn


# -- messages and records ---------------------------------------------------------------------------------------------


TICKET = issue_ticket(ANNA, SWARM, b"t" * 32, NOW_S)
PROOF = prove_admission(TICKET, SWARM, BEN.peer)


def take_proof(raw: bytes) -> None:
    """What a stranger shows: it is good, or it is refused and changes nothing."""
    table = AdmissionTable(AdmissionRule.INVITED, SWARM, ANNA.peer, ())
    nobody = Known(voters=frozenset(), admitted=frozenset(), banned=frozenset())
    try:
        table.take(BEN.peer, decode_record_untrusted(AdmissionProof, raw), frozenset())
    finally:
        assert table.admits(BEN.peer, nobody, NOW_S) == (raw == encode_record(PROOF))


def draw_messages() -> list[Any]:
    """Some of every type."""
    classes: Iterable[type[Any]] = SCHEMA._classes.values()
    return [message for cls in classes for message in draw(records(cls), SAMPLES_PER_TYPE)]


@cache
def list_messages() -> list[bytes]:
    made = [encode_message(SWARM, make_presence(1)), encode_message(SWARM, make_presence(1, admission=PROOF))]
    return made + [encode_message(SWARM, message) for message in draw_messages()]


def list_bodies() -> list[bytes]:
    """Messages without their envelope, so that a change is not caught by its checksum or swarm."""
    return [SCHEMA.encode(message) for message in draw_messages()]


CERTIFICATE = certify(make_sample_result(make_head()))


def take_record(cls: type[Any]) -> Callable[[bytes], object]:
    def take(raw: bytes) -> None:
        value = decode_record_untrusted(cls, raw, DELTA_BYTES_MAX)
        assert encode_record(value) == raw, "one way to write a value"

    return take


def take_certificate_value() -> Callable[[bytes], object]:
    """What the ledger makes of a certificate in somebody's entry: it counts or it does not, and nothing is raised."""
    authority = Authority(swarm=SWARM, rule=QuorumRule.MAJORITY, owner=ANNA.peer, parts=3, may_declare=False)
    base = ChainBase(round=0, digest=SWARM, voters=PEERS[:4])

    def take(raw: bytes) -> None:
        CertifiedChain(authority=authority, base=base, rounds_per_era=256).add(1, raw, 1)

    return take


# -- the ledger -------------------------------------------------------------------------------------------------------

ROUND = RoundBody(round=1, value=encode_record(CERTIFICATE))
RULES = LedgerRules(swarm=SWARM, owner=ANNA.peer, is_valid_snapshot=lambda *_: True)
START = ChainPosition(seq=0, prev=NO_ENTRY, hlc=HLC_ZERO)
CONTENTS = [
    EntryContent(deps=(), hlc=Hlc(1), kind=Kind.LEASE, body=b"12345678"),
    EntryContent(deps=(), hlc=Hlc(2), kind=Kind.TAG, body=encode_body(TagBody(name="best", value=b"1", removes=()))),
    EntryContent(
        deps=(),
        hlc=Hlc(3),
        kind=Kind.CERTIFICATE,
        body=encode_body(RoundBody(round=1, value=encode_record(CERTIFICATE))),
    ),
]
BATCH = sign_batch(ANNA, SWARM, START, CONTENTS)
OTHERS = [sign_batch(one, SWARM, START, CONTENTS[:2]) for one in (BEN, CARL)]


def list_batches() -> list[bytes]:
    depending = EntryContent(deps=(BATCH.tip,), hlc=Hlc(9), kind=Kind.LEASE, body=b"")
    later = sign_batch(BEN, SWARM, ChainPosition(seq=2, prev=OTHERS[0].tip, hlc=Hlc(2)), [depending])
    return [encode_batch(batch) for batch in (BATCH, BATCH.suffix(1), *OTHERS, later)]


def make_ledger() -> Ledger:
    ledger = Ledger(identity=IDENTITIES[3], rules=RULES)
    for batch in (BATCH, *OTHERS):
        ledger.accept(batch)
    return ledger


def take_batch() -> Callable[[bytes], object]:
    ledger = make_ledger()

    def take(raw: bytes) -> None:
        batch = decode_batch_untrusted(raw)
        assert encode_batch(batch) == raw, "one way to write a batch"
        ledger.accept(batch)

    return take


def take_body(raw: bytes) -> None:
    """The first byte chooses the kind."""
    kinds = sorted(KIND_RULES)
    body = decode_body_untrusted(kinds[(raw[0] if raw else 0) % len(kinds)], raw[1:])
    assert encode_body(body) == raw[1:], "one way to write a body"


def list_entry_bodies() -> list[bytes]:
    kinds = sorted(KIND_RULES)
    bodies: list[Body] = [
        RegisterBody(value=b"12345678"),
        RoundBody(round=1, value=encode_record(CERTIFICATE)),
        TagBody(name="best", value=b"1", removes=()),
        TagBody(name="", value=b"", removes=(BATCH.tip,)),
        VersionedBody(version=2, value=SIGNED),
        BanBody(peer=BEN.peer, reason="lies", removes=()),
        BanBody(peer=b"", reason="", removes=(BATCH.tip,)),
        ReadmissionBody(author=BEN.peer, era=1, stands=BATCH.tip),
        AdmissionBody(peers=tuple(sorted((ANNA.peer, BEN.peer)))),
    ]
    made = [bytes([at]) + encode_body(body) for at in range(len(kinds)) for body in bodies]
    return [raw for raw in made if _is_body(raw)]


def _is_body(raw: bytes) -> bool:
    try:
        take_body(raw)
    except ProtocolError:
        return False
    return True


def take_comparison() -> Callable[[bytes], object]:
    ledger = make_ledger()
    return lambda raw: answer(ledger, raw)


def list_comparisons() -> list[bytes]:
    """What two replicas say to each other that differ in much: fingerprints, lists, sketches."""
    opener, other = make_ledger(), Ledger(identity=IDENTITIES[5], rules=RULES)
    for replica, count in ((opener, 90), (other, 40)):
        for at in range(count):
            body = RegisterBody(value=b"%d" % at)
            replica.accept(replica.write([Draft(kind=Kind.LEASE, body=body)], 1000 + at))
    said, turns = [begin(opener, bytes(range(SALT_BYTES)))], (other, opener)
    for at in range(8):
        reply = answer(turns[at % 2], said[-1]).reply
        if reply is None:
            break
        said.append(reply)
    assert len(said) > 2, "they have something to say"
    return said


# -- discovery, manifest, state ---------------------------------------------------------------------------------------


def list_address_records() -> list[bytes]:
    record = AddressRecord(
        peer=ANNA.peer, control=("/ip4/1.2.3.4/tcp/5",), tensor=(), issued_s=NOW_S, expires_s=NOW_S + 3600
    )
    return [encode_signed_record(ANNA, SWARM, record)]


def list_books() -> list[bytes]:
    book = PeerBook(ANNA.peer)
    for number, identity in enumerate(IDENTITIES[1:4]):
        book.note_success(identity.peer, (f"/ip4/1.2.3.{number}/tcp/5",), NOW_S)
    book.note_failure(BEN.peer, NOW_S)
    return [PeerBook(ANNA.peer).encode(), book.encode()]


def take_text(parse: Callable[[str], object]) -> Callable[[bytes], object]:
    def take(raw: bytes) -> None:
        with contextlib.suppress(UriError):
            parse(raw.decode(errors="replace"))

    return take


def take_owners_word(raw: bytes) -> None:
    """What an owner signs may be nonsense, too."""
    signature = OWNER.sign("manifest", blake3(raw).digest(), raw)
    read_manifest_untrusted(encode_record(SignedManifest(manifest=raw, signature=signature)))


def list_indices() -> list[bytes]:
    vector = np.arange(ELEMENTS, dtype=np.float32)
    digests = chunk_digests(vector) + chunk_digests(vector)
    return [encode_record(SnapshotIndex(round=4, elements=ELEMENTS, digests=digests))]


# -- tensor links -----------------------------------------------------------------------------------------------------


def take_header(raw: bytes) -> None:
    assert encode_header(decode_header_untrusted(raw)) == raw, "one way to write a header"


@cache
def make_keys() -> tuple[ChannelKeys, ChannelKeys]:
    return ChannelKeys(ANNA, b"a" * 32), ChannelKeys(BEN, b"b" * 32)


def take_handshake(raw: bytes) -> None:
    """What a stranger says to a listener, in two pieces."""
    listener = Handshake(make_keys()[1], SWARM, dialer=False)
    assert listener.receive(raw[: len(raw) // 2]) is None
    assert listener.receive(raw[len(raw) // 2 :]) is None


def list_dials() -> list[bytes]:
    anna = make_keys()[0]
    return [Handshake(anna, SWARM, dialer=True, expected=BEN.peer).take_outgoing() for _ in range(2)]


def take_contribution(codec: str) -> Callable[[bytes], object]:
    out = np.empty(ELEMENTS, np.float32)

    def take(raw: bytes) -> None:
        CODECS[codec].decode_untrusted(raw, ELEMENTS, out)
        assert np.isfinite(out).all(), "what is taken can be summed up"

    return take


def list_contributions(codec: str) -> list[bytes]:
    values = np.linspace(-1, 1, ELEMENTS, dtype=np.float32)
    return [bytes(CODECS[codec].encode(values)), bytes(CODECS[codec].encode(values * 1e-6))]


# -- the LAN -----------------------------------------------------------------------------------------------------------


def take_location(raw: bytes) -> None:
    location = read_location_untrusted(raw, "192.168.1.1")
    assert location is None or urlsplit(location).hostname == "192.168.1.1", "a router is asked at its own address"


def list_pmp_answers() -> list[bytes]:
    answers = ("0080000000000100cb007105", "008200000000010024f424f400000e10", "0082000200000100")
    return [bytes.fromhex(one) for one in answers]


def list_txt_records() -> list[bytes]:
    addresses = (f"/ip4/10.0.0.{host}/tcp/9460/p2p/{format_peer_id(ANNA.peer)}" for host in range(1, 4))
    return [encode_txt(addresses, b"tag")]


# -- all of them ------------------------------------------------------------------------------------------------------

CERTIFICATES = [encode_record(CERTIFICATE), encode_record(certify(make_sample_result(make_head(), label="b"), 4, 2))]

PARSERS: tuple[Parser, ...] = (
    Parser(
        name="message",
        take=lambda raw: decode_message_untrusted(SWARM, raw),
        samples=list_messages,
        covers=("protocol.messages.decode_message_untrusted",),
    ),
    Parser(
        name="body",
        take=SCHEMA.decode_untrusted,
        samples=list_bodies,
        covers=("protocol.wire.decode_untrusted",),
    ),
    Parser(
        name="certificate",
        take=take_record(Certificate),
        samples=lambda: CERTIFICATES,
        covers=("protocol.wire.decode_record_untrusted",),
    ),
    Parser(
        name="vote_record",
        take=take_record(VoteRecord),
        samples=lambda: [encode_record(one) for one in draw(records(VoteRecord), 8)],
        covers=("protocol.wire.decode_record_untrusted",),
    ),
    Parser(
        name="ledger_page",
        take=take_record(LedgerPage),
        samples=lambda: [encode_record(LedgerPage(base=b"", batches=tuple(list_batches()), last=9))],
        covers=("protocol.wire.decode_record_untrusted",),
    ),
    Parser(
        name="measurement",
        take=decode_measurement_untrusted,
        samples=lambda: [encode_record(one) for one in draw(records(HeldOutLoss), 6)],
        covers=("crdt.measurements.decode_measurement_untrusted",),
    ),
    Parser(name="batch", take=take_batch(), samples=list_batches, covers=("crdt.entries.decode_batch_untrusted",)),
    Parser(name="entry_body", take=take_body, samples=list_entry_bodies, covers=("crdt.kinds.decode_body_untrusted",)),
    Parser(
        name="counted",
        take=take_certificate_value(),
        samples=lambda: CERTIFICATES,
        covers=("crdt.certified.CertifiedChain",),
    ),
    Parser(
        name="chain_base",
        take=decode_base_untrusted,
        samples=lambda: [one.encode() for one in draw(records(ChainBase), 6)],
        covers=("crdt.certified.decode_base_untrusted",),
    ),
    Parser(name="comparison", take=take_comparison(), samples=list_comparisons, covers=("crdt.reconciliation.answer",)),
    Parser(
        name="address_record",
        take=lambda raw: decode_address_record_untrusted(raw, SWARM, NOW_S),
        samples=list_address_records,
        covers=("dht.records.decode_address_record_untrusted",),
    ),
    Parser(
        name="peer_book",
        take=lambda raw: decode_peer_book_untrusted(raw, ANNA.peer),
        samples=list_books,
        covers=("dht.peer_book.decode_peer_book_untrusted",),
    ),
    Parser(
        name="address",
        take=take_text(lambda text: parse_address_untrusted(text, BEN.peer)),
        samples=lambda: [b"/ip4/1.2.3.4/tcp/5", b"/dns4/a.example/tcp/443", b"/ip6/::1/tcp/9"],
        covers=("dht.addresses.parse_address_untrusted",),
        is_packed=False,
    ),
    Parser(
        name="uri",
        take=take_text(parse_uri),
        samples=lambda: [
            str(SwarmUri(swarm=SWARM, bootstraps=("/ip4/1.2.3.4/tcp/5/p2p/12D3",))).encode(),
            str(SwarmUri(swarm=SWARM, ticket=TICKET)).encode(),
        ],
        covers=("protocol.manifest.parse_uri",),
        is_packed=False,
    ),
    Parser(
        name="ticket",
        take=take_text(parse_ticket),
        samples=lambda: [str(TICKET).encode()],
        covers=("protocol.admission.parse_ticket",),
        is_packed=False,
    ),
    Parser(
        name="admission_proof",
        take=take_proof,
        samples=lambda: [encode_record(PROOF)],
        covers=("protocol.admission.AdmissionTable",),
    ),
    Parser(
        name="manifest",
        take=read_manifest_untrusted,
        samples=lambda: [SIGNED],
        covers=("protocol.manifest.read_manifest_untrusted",),
    ),
    Parser(
        name="owners_word",
        take=take_owners_word,
        samples=lambda: [encode_record(GOOD)],
        covers=("protocol.manifest.read_manifest_untrusted",),
    ),
    Parser(
        name="snapshot_index",
        take=decode_index_untrusted,
        samples=list_indices,
        covers=("protocol.state.decode_index_untrusted",),
    ),
    Parser(
        name="frame_header",
        take=take_header,
        samples=lambda: [encode_header(one) for one in draw(headers(), 40)],
        covers=("protocol.frames.decode_header_untrusted",),
        is_packed=False,
        fixed_bytes=HEADER_BYTES,
    ),
    Parser(
        name="record_prefix",
        take=decode_prefix_untrusted,
        samples=lambda: [bytes(PREFIX_BYTES), b"\x01\x00\x00\x10"],
        covers=("protocol.secure_channel.decode_prefix_untrusted",),
        is_packed=False,
        fixed_bytes=PREFIX_BYTES,
    ),
    Parser(
        name="handshake",
        take=take_handshake,
        samples=list_dials,
        covers=("protocol.secure_channel.Handshake",),
        is_packed=False,
    ),
    Parser(
        name="noise_payload",
        take=lambda raw: _verify_payload_untrusted(raw, b"k" * 32),
        samples=lambda: [
            _encode_payload(ANNA.peer, ANNA.sign("x", b"y" * 32, b"z"), prefers) for prefers in (False, True)
        ],
        covers=(
            "protocol.secure_channel._verify_payload_untrusted",
            "protocol.secure_channel._decode_payload_untrusted",
        ),
        is_packed=False,
    ),
    Parser(
        name="nat_pmp",
        take=decode_answer_untrusted,
        samples=list_pmp_answers,
        covers=("node.nat_pmp.decode_answer_untrusted",),
        is_packed=False,
    ),
    Parser(
        name="mdns_txt",
        take=lambda raw: decode_txt_untrusted(raw, b"tag"),
        samples=list_txt_records,
        covers=("node.mdns.decode_txt_untrusted",),
        is_packed=False,
    ),
    Parser(
        name="upnp_search",
        take=take_location,
        samples=lambda: [b"HTTP/1.1 200 OK\r\nLOCATION: http://192.168.1.1:5000/a.xml\r\nST: x\r\n\r\n"],
        covers=("node.upnp_gateway.read_location_untrusted",),
        is_packed=False,
    ),
    *(
        Parser(
            name=f"codec_{codec}",
            take=take_contribution(codec),
            samples=lambda codec=codec: list_contributions(codec),  # type: ignore[misc]
            covers=("protocol.codecs.decode_untrusted", "protocol.codecs.check_untrusted"),
            is_packed=False,
        )
        for codec in sorted(CODECS)
    ),
)
