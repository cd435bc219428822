"""Manifests and URIs: whatever comes in is read, or refused with an error that says what to do."""

import string
from dataclasses import replace

from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.protocol.admission import Ticket
from shoal.protocol.errors import ManifestError, ProtocolError, UriError
from shoal.protocol.identity import Identity
from shoal.protocol.layout import Layout, TensorSpec
from shoal.protocol.manifest import (
    BOOTSTRAPS_MAX,
    Admission,
    Draft,
    Manifest,
    Outer,
    Rounds,
    SignedManifest,
    SwarmUri,
    Task,
    Training,
    make_manifest,
    parse_draft,
    parse_uri,
    read_manifest_untrusted,
    sign_manifest,
)
from shoal.protocol.messages import PARTS_MAX
from shoal.protocol.wire import encode_record
from tests.properties.wire_strategies import mutated, packed, records

OWNER = Identity(b"o" * 32)
LAYOUT = Layout(
    tensors=(TensorSpec(name="w", shape=(900,), init="uniform", std=0.02), TensorSpec(name="b", shape=(3,)))
)

drafts = st.builds(
    Draft,
    name=st.text(st.characters(codec="utf-8"), min_size=1, max_size=16),
    task=records(Task),
    seed=st.integers(0, 2**63 - 1),
    training=records(Training),
    outer=records(Outer),
    rounds=records(Rounds),
    admission=records(Admission),
)
GOOD = make_manifest(Draft(name="good", task=Task(kind="none")), LAYOUT, OWNER.peer, (OWNER.peer,))
SIGNED = sign_manifest(GOOD, OWNER)


def is_read_or_refused(signed: bytes) -> Manifest | None:
    try:
        manifest, swarm = read_manifest_untrusted(signed)
    except ProtocolError:
        return None
    assert blake3(encode_record(manifest)).digest() == swarm
    assert manifest.parts <= PARTS_MAX
    return manifest


@given(draft=drafts)
@settings(max_examples=80, deadline=None)
def test_a_draft_makes_a_manifest_that_comes_back_or_says_what_does_not_fit(draft: Draft) -> None:
    try:
        manifest = make_manifest(draft, LAYOUT, OWNER.peer, (OWNER.peer,))
    except ManifestError as error:
        assert error.field.partition(".")[0] in ("rounds", "training", "outer", "task") and error.fix
        return
    assert is_read_or_refused(sign_manifest(manifest, OWNER)) == manifest
    covered = [manifest.part_range(part) for part in range(manifest.parts)]
    assert [first for first, _ in covered] == [0, *(end for _, end in covered[:-1])]
    assert covered[-1][1] == LAYOUT.elements and all(first < end for first, end in covered)


@given(raw=st.one_of(st.binary(max_size=400), packed, mutated(st.just(SIGNED))))
@settings(max_examples=150, deadline=None)
def test_bytes_are_a_signed_manifest_or_refused(raw: bytes) -> None:
    if is_read_or_refused(raw) is not None:
        assert raw == SIGNED, "nobody can change a manifest but its owner"


@given(raw=mutated(st.just(encode_record(GOOD))))
@settings(max_examples=150, deadline=None)
def test_whatever_an_owner_signs_is_read_or_refused(raw: bytes) -> None:
    if raw:
        signature = OWNER.sign("manifest", blake3(raw).digest(), raw)
        is_read_or_refused(encode_record(SignedManifest(manifest=raw, signature=signature)))


pieces = st.sampled_from(
    [
        "shoal",
        "://",
        "?",
        "&",
        "bootstrap",
        "=",
        "#",
        "/",
        "[",
        "]",
        "%",
        "ab" * 32,
        "é",
        "℀",
        "/p2p/",
        ":",
        "@",
        "\x00",
        " ",
    ]
)
near_uris = st.lists(pieces, max_size=14).map("".join)
uris = st.builds(
    SwarmUri,
    swarm=st.binary(min_size=32, max_size=32),
    bootstraps=st.lists(
        st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=30).map(
            lambda text: f"/dns/{text}/p2p/x"
        ),
        max_size=BOOTSTRAPS_MAX,
    ).map(tuple),
    ticket=st.none() | records(Ticket),
)


@given(uri=uris)
@settings(max_examples=100, deadline=None)
def test_every_uri_comes_back(uri: SwarmUri) -> None:
    assert parse_uri(str(uri)) == uri


@given(text=st.one_of(st.text(max_size=200), near_uris, near_uris.map(lambda rest: f"shoal://{rest}")))
@settings(max_examples=300, deadline=None)
def test_text_is_a_uri_or_an_error(text: str) -> None:
    try:
        uri = parse_uri(text)
    except UriError as error:
        assert error.field and error.fix
    else:
        assert parse_uri(str(uri)) == uri


toml_lines = st.lists(
    st.one_of(
        st.sampled_from(
            ["[task]", "[rounds]", "[[rounds]]", 'kind = "x"', "peers_min = 2", "seed = 1", 'name = "n"', "a = {}"]
        ),
        st.text(string.printable, max_size=30),
        st.builds("{} = {}".format, st.sampled_from(["name", "seed", "task", "rounds", "grace_s"]), st.integers()),
    ),
    max_size=8,
).map("\n".join)


@given(text=toml_lines)
@settings(max_examples=150, deadline=None)
def test_text_is_a_draft_or_an_error(text: str) -> None:
    try:
        draft = parse_draft(text, "{}")
    except ManifestError as error:
        assert error.field and error.fix
    else:
        assert replace(draft, name="n").name == "n"
