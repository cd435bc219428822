import pytest

from shoal.crdt.kinds import (
    CERTIFICATE_BYTES_MAX,
    KIND_RULES,
    BanBody,
    Body,
    EntryId,
    Kind,
    ReadmissionBody,
    RegisterBody,
    RoundBody,
    TagBody,
    VersionedBody,
    decode_body_untrusted,
    encode_body,
)
from shoal.protocol.errors import ProtocolError, Refusal
from shoal.protocol.identity import PeerId
from shoal.protocol.wire import encode_record

BODIES: list[tuple[Kind, Body]] = [
    (Kind.LEASE, RegisterBody(value=b"until noon")),
    (Kind.ADDRESSES, RegisterBody(value=b"")),
    (Kind.CERTIFICATE, RoundBody(round=3, value=b"votes")),
    (Kind.SNAPSHOT, RoundBody(round=2**63 - 1, value=b"root")),
    (Kind.TAG, TagBody(name="best", value=b"7", removes=())),
    (Kind.TAG, TagBody(name="", value=b"", removes=(EntryId(bytes(32)),))),
    (Kind.MANIFEST, VersionedBody(version=2, value=b"toml")),
    (Kind.REROOT, VersionedBody(version=0, value=b"root")),
    (Kind.BAN, BanBody(peer=b"p" * 32, reason="spam", removes=())),
    (Kind.BAN, BanBody(peer=b"", reason="", removes=(EntryId(bytes(32)),))),
    (Kind.READMISSION, ReadmissionBody(author=PeerId(b"p" * 32), era=3, stands=EntryId(bytes(32)))),
]


@pytest.mark.parametrize(("kind", "body"), BODIES)
def test_a_body_survives_its_wire_form(kind: Kind, body: Body) -> None:
    assert decode_body_untrusted(kind, encode_body(body)) == body


def test_every_kind_has_a_rule_and_no_rule_lacks_a_kind() -> None:
    assert set(KIND_RULES) == {kind.value for kind in Kind}
    assert all(0 < rule.body_bytes_max <= CERTIFICATE_BYTES_MAX for rule in KIND_RULES.values())
    assert {kind for kind, rule in KIND_RULES.items() if rule.is_owners} == {
        Kind.MANIFEST,
        Kind.REROOT,
        Kind.BAN,
        Kind.READMISSION,
        Kind.ADMISSION,
    }


@pytest.mark.parametrize("kind", list(Kind))
def test_a_body_longer_than_its_kind_allows_is_refused(kind: Kind) -> None:
    with pytest.raises(ProtocolError) as caught:
        decode_body_untrusted(kind, bytes(KIND_RULES[kind].body_bytes_max + 1))
    assert caught.value.refusal is Refusal.OVERSIZED


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ProtocolError) as caught:
        decode_body_untrusted("gossip", b"")
    assert caught.value.refusal is Refusal.UNKNOWN_TYPE


def test_a_tag_body_adds_or_removes_but_not_both_and_not_neither() -> None:
    entry_id = EntryId(bytes(32))
    for name, value, removes in [("x", b"", (entry_id,)), ("", b"", ()), ("", b"v", (entry_id,))]:
        with pytest.raises(ValueError, match="either a name or removals"):
            TagBody(name=name, value=value, removes=removes)


def test_a_ban_names_a_peer_or_lifts_bans() -> None:
    entry_id = EntryId(bytes(32))
    for peer, reason, removes in [(b"p" * 32, "", (entry_id,)), (b"", "", ()), (b"", "x", (entry_id,)), (b"p", "", ())]:
        with pytest.raises(ValueError, match="either a peer or removals"):
            BanBody(peer=peer, reason=reason, removes=removes)


def test_a_body_of_another_kind_is_refused() -> None:
    with pytest.raises(ProtocolError):
        decode_body_untrusted(Kind.TAG, encode_record(RoundBody(round=1, value=b"")))
