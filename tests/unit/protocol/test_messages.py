"""The messages: their bounds, the envelope around them, and what their signatures are bound to."""

from collections.abc import Callable
from dataclasses import replace
from typing import get_args

import msgpack
import pytest
from blake3 import blake3

from shoal.protocol import messages as module
from shoal.protocol.admission import GetDecrees
from shoal.protocol.errors import ProtocolError, Refusal
from shoal.protocol.identity import PROTOCOL_VERSION, PeerId
from shoal.protocol.messages import (
    PARTS_MAX,
    ROSTER_MAX,
    ROUND_MESSAGES,
    SCHEMA,
    VOTERS_MAX,
    AskRelay,
    Certificate,
    CertificatesAnswer,
    Certified,
    Checkpoint,
    CheckpointsAnswer,
    Contribution,
    Envelope,
    Evidence,
    GetCertificates,
    GetCheckpoints,
    GetLedgerBase,
    GetManifest,
    GetObserved,
    GetPeers,
    GetPunchClock,
    GetSnapshot,
    LedgerBaseAnswer,
    LedgerEntries,
    Lock,
    LockCertificate,
    Locked,
    ManifestAnswer,
    MeasureUpload,
    Member,
    Nack,
    ObservedAnswer,
    PartDone,
    PartResult,
    PeersAnswer,
    Plan,
    Prepare,
    Presence,
    ProbeAddresses,
    ProbeAnswer,
    Promise,
    Proposal,
    PunchAnswer,
    PunchClock,
    PunchOffer,
    PunchSync,
    Reconcile,
    Refused,
    RelayCall,
    RelayTicket,
    Result,
    RosterEntry,
    SnapshotAnswer,
    UploadAnswer,
    Vote,
    contribution_root,
    decode_message_untrusted,
    digest_record,
    encode_message,
    sign_message,
    sign_ready,
    verify_message,
    verify_ready,
)
from shoal.protocol.pairing import AskPair, PairAnswer, PairOffer
from shoal.protocol.wire import DELTA_BYTES_MAX, MESSAGE_BYTES_MAX, encode_record
from tests.unit.protocol.samples import (
    IDENTITIES,
    OTHER_SWARM,
    PEERS,
    SWARM,
    certify,
    make_digests,
    make_head,
    make_presence,
    make_ready,
    make_sample_result,
    make_vote,
)

HEAD = make_head()
READY = make_ready(0, HEAD)
RESULT = make_sample_result(HEAD)
CERTIFICATE = certify(RESULT)
U63_MAX, U32_MAX = 2**63 - 1, 2**32 - 1

PLAN = sign_message(
    IDENTITIES[1],
    SWARM,
    Plan(
        round=1,
        attempt=0,
        revision=0,
        previous=HEAD.digest,
        base_root=HEAD.state_root,
        codec="int8",
        roster=(RosterEntry(signed=READY, weight=1.0),),
        owners=(0, 0, 0, 0),
    ),
)
PART_DONE = sign_message(
    IDENTITIES[1],
    SWARM,
    PartDone(round=1, attempt=0, roster_digest=bytes(32), part=2, digest=b"d" * 32, contributors=b"\x07"),
)
LOCK = sign_message(IDENTITIES[1], SWARM, Lock(voter=PEERS[1], round=1, attempt=2, result_digest=digest_record(RESULT)))
LOCKS = LockCertificate(attempt=2, locks=(LOCK,))
OFFER = PairOffer(round=1, base_root=HEAD.state_root, tokens=300, steps=5, digests=make_digests("a"))
SAMPLES = (
    make_presence(1, ready=READY, tensor_addresses=("/ip4/1.2.3.4/tcp/5",)),
    Refused(refusal="wrong_swarm", detail="elsewhere"),
    Prepare(round=1, attempt=2),
    Promise(round=1, attempt=2, accepted_attempt=1, accepted=RESULT),
    Nack(round=1, attempt=2, promised=3),
    PLAN,
    Contribution(round=1, digests=make_digests("a")),
    PART_DONE,
    Proposal(attempt=3, result=RESULT, evidence=Evidence(plan=PLAN, done=(PART_DONE,), lock=LOCKS)),
    LOCK,
    Locked(round=1, certificate=LOCKS),
    make_vote(IDENTITIES[0], RESULT),
    Certified(certificate=CERTIFICATE),
    GetManifest(),
    ManifestAnswer(signed_manifest=b"m"),
    GetCertificates(first_round=1, count=16),
    CertificatesAnswer(certificates=(CERTIFICATE,)),
    GetSnapshot(round_max=7),
    SnapshotAnswer(index=b""),
    Reconcile(payload=b"r"),
    LedgerEntries(payload=b"", batches=(b"one", b"two")),
    GetPeers(),
    PeersAnswer(presences=(make_presence(0),)),
    ProbeAddresses(addresses=("192.0.2.7:9461", "[2001:db8::7]:9461")),
    ProbeAnswer(reached=(True, False, None)),
    GetObserved(binding=b"b" * 32),
    ObservedAnswer(address="192.0.2.7:1024"),
    PunchOffer(token=b"t" * 32, addresses=("192.0.2.7:9461",), varies=False),
    PunchAnswer(addresses=("192.0.2.8:9461",), varies=True, clock_s=12.5),
    GetPunchClock(token=b"t" * 32),
    PunchSync(token=b"t" * 32, at_s=13.5),
    PunchClock(clock_s=12.75),
    AskRelay(peer=PeerId(b"p" * 32)),
    RelayCall(peer=PeerId(b"p" * 32), token=b"t" * 32),
    RelayTicket(token=b"t" * 32),
    MeasureUpload(digest=b"u" * 32, nbytes=1),
    UploadAnswer(seconds=0.5),
    AskPair(offer=OFFER),
    PairAnswer(offer=OFFER),
    GetCheckpoints(after_round=9),
    CheckpointsAnswer(checkpoints=(Checkpoint(before=RESULT, certificate=CERTIFICATE),)),
    GetLedgerBase(offset=0),
    GetDecrees(first=7),
    LedgerBaseAnswer(round=256, digest=bytes(32), nbytes=4, piece=b"base"),
)
SIGNED = {
    Presence: make_presence(1),
    Plan: PLAN,
    PartDone: PART_DONE,
    Lock: LOCK,
    Vote: make_vote(IDENTITIES[1], RESULT),
}


def refuse(raw: bytes, swarm: bytes = SWARM) -> ProtocolError:
    with pytest.raises(ProtocolError) as caught:
        decode_message_untrusted(swarm, raw)
    return caught.value


def seal(body: bytes, version: int = PROTOCOL_VERSION) -> bytes:
    return encode_record(Envelope(version=version, swarm=SWARM, body=body))


def largest_result() -> Result:
    member = Member(peer=PEERS[0], contribution_root=bytes(32), tokens=U63_MAX, steps=U63_MAX, weight=0.5)
    part = PartResult(digest=b"d" * 32, contributors=b"\xff" * 8)
    return Result(
        round=U63_MAX,
        previous=b"p" * 32,
        base_root=b"b" * 32,
        codec="c" * 64,
        members=(member,) * ROSTER_MAX,
        parts=(part,) * PARTS_MAX,
        voters=(PEERS[0],) * VOTERS_MAX,
    )


def largest_plan() -> Plan:
    signed = replace(READY, ready=replace(READY.ready, round=U63_MAX, tokens=U63_MAX, steps=2**40))
    return replace(
        PLAN,
        round=U63_MAX,
        attempt=U32_MAX,
        revision=2**16 - 1,
        codec="c" * 64,
        roster=(RosterEntry(signed=signed, weight=0.5),) * ROSTER_MAX,
        owners=(2**16 - 1,) * PARTS_MAX,
    )


def largest_locks() -> LockCertificate:
    return LockCertificate(attempt=U32_MAX, locks=(replace(LOCK, round=U63_MAX, attempt=U32_MAX),) * VOTERS_MAX)


def largest_offer() -> PairOffer:
    digests = (b"d" * 32,) * PARTS_MAX
    return PairOffer(round=U63_MAX, base_root=bytes(32), tokens=U63_MAX, steps=2**40, digests=digests)


def largest_evidence() -> Evidence:
    done = replace(PART_DONE, round=U63_MAX, attempt=U32_MAX, part=PARTS_MAX - 1, contributors=b"\xff" * 8)
    return Evidence(plan=largest_plan(), done=(done,) * PARTS_MAX, lock=largest_locks())


def test_there_is_a_sample_of_every_message() -> None:
    assert {type(sample) for sample in SAMPLES} == set(SCHEMA._classes.values())
    assert set(get_args(ROUND_MESSAGES)) < set(SCHEMA._classes.values())


@pytest.mark.parametrize("message", SAMPLES, ids=lambda one: type(one).__name__)
def test_every_message_comes_back(message: object) -> None:
    raw = encode_message(SWARM, message)
    assert decode_message_untrusted(SWARM, raw) == message
    assert decode_message_untrusted(SWARM, memoryview(raw)) == message


def test_another_version_is_told_from_a_malformed_message() -> None:
    error = refuse(seal(b"what only that version can read", version=PROTOCOL_VERSION + 1))
    assert error.refusal is Refusal.WRONG_VERSION
    assert f"version {PROTOCOL_VERSION + 1}, we speak {PROTOCOL_VERSION}" in error.detail


def test_another_swarm_is_told_from_a_malformed_message() -> None:
    error = refuse(encode_message(OTHER_SWARM, GetPeers()))
    assert error.refusal is Refusal.WRONG_SWARM
    assert OTHER_SWARM.hex()[:16] in error.detail


@pytest.mark.parametrize(
    ("raw", "refusal"),
    [
        (b"", Refusal.MALFORMED),
        (seal(b"\xc0"), Refusal.MALFORMED),
        (seal(b"\x92\x63\x90"), Refusal.UNKNOWN_TYPE),
        (seal(b"\x92\x1e\x91\x00"), Refusal.MALFORMED),  # GetManifest has no fields
        (seal(b"\x92\xcc\x1e\x90"), Refusal.NON_CANONICAL),
        (encode_message(SWARM, GetPeers()) + b"\x00", Refusal.MALFORMED),
        (bytes(DELTA_BYTES_MAX + 257), Refusal.OVERSIZED),
    ],
)
def test_a_frame_that_is_no_message_is_refused(raw: bytes, refusal: Refusal) -> None:
    assert refuse(raw).refusal is refusal


def test_only_answers_that_carry_state_may_be_large() -> None:
    large = ManifestAnswer(signed_manifest=bytes(MESSAGE_BYTES_MAX + 1))
    assert decode_message_untrusted(SWARM, encode_message(SWARM, large)) == large
    error = refuse(encode_message(SWARM, Reconcile(payload=bytes(MESSAGE_BYTES_MAX + 1))))
    assert error.refusal is Refusal.OVERSIZED
    assert error.detail.startswith("Reconcile of ")


@pytest.mark.parametrize(
    ("message", "bytes_max"),
    [
        (largest_plan(), MESSAGE_BYTES_MAX),
        (Contribution(round=U63_MAX, digests=(b"d" * 32,) * PARTS_MAX), MESSAGE_BYTES_MAX),
        (PairAnswer(offer=largest_offer()), MESSAGE_BYTES_MAX),
        (Proposal(attempt=U32_MAX, result=largest_result(), evidence=largest_evidence()), DELTA_BYTES_MAX),
        (Locked(round=U63_MAX, certificate=largest_locks()), MESSAGE_BYTES_MAX),
        (
            Promise(
                round=U63_MAX,
                attempt=U32_MAX,
                accepted_attempt=U32_MAX,
                accepted=largest_result(),
                lock=largest_locks(),
            ),
            DELTA_BYTES_MAX,
        ),
        (
            Certified(
                certificate=Certificate(
                    result=largest_result(),
                    attempt=U32_MAX,
                    votes=(replace(make_vote(IDENTITIES[0], RESULT), round=U63_MAX, attempt=U32_MAX),) * VOTERS_MAX,
                )
            ),
            DELTA_BYTES_MAX,
        ),
    ],
    ids=lambda one: type(one).__name__,
)
def test_the_largest_round_messages_fit(message: object, bytes_max: int) -> None:
    assert len(SCHEMA.encode(message)) <= bytes_max
    assert decode_message_untrusted(SWARM, encode_message(SWARM, message)) == message


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (replace(PLAN, roster=()), "Plan.roster"),
        (replace(PLAN, roster=PLAN.roster * (ROSTER_MAX + 1)), "Plan.roster"),
        (replace(PLAN, owners=()), "Plan.owners"),
        (replace(PLAN, owners=(0,) * (PARTS_MAX + 1)), "Plan.owners"),
        (replace(PLAN, codec=""), "Plan.codec"),
        (replace(PLAN, attempt=2**32), "Plan.attempt"),
        (replace(PLAN, roster=(RosterEntry(signed=READY, weight=float("nan")),)), "Plan.roster[0].weight"),
        (Contribution(round=1, digests=(b"short",)), "Contribution.digests[0]"),
        (replace(PART_DONE, contributors=b""), "PartDone.contributors"),
        (replace(PART_DONE, contributors=bytes(9)), "PartDone.contributors"),
        (replace(PART_DONE, signature=bytes(63)), "PartDone.signature"),
        (Proposal(attempt=0, result=replace(RESULT, voters=())), "Proposal.result.voters"),
        (Proposal(attempt=0, result=replace(RESULT, round=-1)), "Proposal.result.round"),
        (Certified(certificate=replace(CERTIFICATE, votes=())), "Certified.certificate.votes"),
        (Locked(round=1, certificate=replace(LOCKS, locks=())), "Locked.certificate.locks"),
        (Locked(round=1, certificate=replace(LOCKS, locks=(LOCK,) * (VOTERS_MAX + 1))), "Locked.certificate.locks"),
        (replace(LOCK, result_digest=b"short"), "Lock.result_digest"),
        (
            Proposal(attempt=0, result=RESULT, evidence=Evidence(plan=None, done=(PART_DONE,) * 1025, lock=None)),
            "Proposal.evidence.done",
        ),
        (GetCertificates(first_round=1, count=0), "GetCertificates.count"),
        (GetCertificates(first_round=1, count=17), "GetCertificates.count"),
        (make_presence(1, agent="x" * 257), "Presence.agent"),
        (make_presence(1, tensor_addresses=("/",) * 9), "Presence.tensor_addresses"),
        (make_presence(1, tokens_per_s=float("inf")), "Presence.tokens_per_s"),
        (make_presence(1, ready=replace(READY, ready=replace(READY.ready, norm=-1.0))), "Presence.ready.ready.norm"),
        (make_presence(1, ready=replace(READY, ready=replace(READY.ready, steps=0))), "Presence.ready.ready.steps"),
    ],
)
def test_a_field_out_of_its_bounds_is_named(message: object, field: str) -> None:
    error = refuse(encode_message(SWARM, message))
    assert error.refusal in (Refusal.OUT_OF_RANGE, Refusal.NOT_FINITE)
    assert error.detail.startswith(f"{field}: ")


@pytest.mark.parametrize("kind", SIGNED, ids=lambda kind: kind.__name__)
def test_a_signature_is_bound_to_the_peer_the_swarm_and_every_field(kind: type) -> None:
    message = SIGNED[kind]
    verify_message(PEERS[1], SWARM, message)
    round_or_phase = {"phase": "commit"} if kind is Presence else {"round": 2}
    for peer, swarm, changed in (
        (PEERS[0], SWARM, message),
        (PEERS[1], OTHER_SWARM, message),
        (PEERS[1], SWARM, replace(message, **round_or_phase)),  # type: ignore[arg-type]
        (PEERS[1], SWARM, replace(message, signature=bytes(64))),
    ):
        with pytest.raises(ProtocolError) as caught:
            verify_message(peer, swarm, changed)
        assert caught.value.refusal is Refusal.BAD_SIGNATURE


def test_a_signature_of_one_kind_is_none_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    vote = SIGNED[Vote]
    assert len({*module._DOMAINS.values(), "ready", "manifest"}) == len(module._DOMAINS) + 2
    monkeypatch.setitem(module._DOMAINS, Vote, "part-done")
    with pytest.raises(ProtocolError, match="part-done is not signed"):
        verify_message(PEERS[1], SWARM, vote)


def test_signing_again_changes_nothing() -> None:
    assert sign_message(IDENTITIES[1], SWARM, PLAN) == PLAN


@pytest.mark.parametrize(
    "forge",
    [
        lambda signed: replace(signed, peer=PEERS[1]),
        lambda signed: replace(signed, ready=replace(signed.ready, tokens=signed.ready.tokens + 1)),
        lambda signed: replace(signed, signature=bytes(64)),
        lambda signed: sign_ready(IDENTITIES[0], OTHER_SWARM, signed.ready),
        lambda signed: replace(sign_ready(IDENTITIES[1], SWARM, signed.ready), peer=PEERS[0]),
    ],
)
def test_nobody_can_invent_a_ready(forge: Callable[[module.SignedReady], module.SignedReady]) -> None:
    verify_ready(SWARM, READY)
    with pytest.raises(ProtocolError) as caught:
        verify_ready(SWARM, forge(READY))
    assert caught.value.refusal is Refusal.BAD_SIGNATURE


def test_digests_name_values() -> None:
    assert digest_record(RESULT) == digest_record(replace(RESULT, codec="int8"))
    assert digest_record(RESULT) != digest_record(replace(RESULT, round=2))
    first, second = make_digests("a", 2)
    assert contribution_root((first, second)) != contribution_root((second, first))


def test_a_result_is_named_by_the_same_digest_everywhere() -> None:
    # If this fails, two versions of shoal no longer agree on what a round decided.
    result = Result(
        round=3,
        previous=b"p" * 32,
        base_root=b"b" * 32,
        codec="int8",
        members=(Member(peer=PeerId(b"m" * 32), contribution_root=b"c" * 32, tokens=300, steps=5, weight=0.5),),
        parts=(PartResult(digest=b"d" * 32, contributors=b"\x01"),),
        voters=(PeerId(b"v" * 32),),
    )
    members = [[b"m" * 32, b"c" * 32, 300, 5, 0.5]]
    tree = [3, b"p" * 32, b"b" * 32, "int8", members, [[b"d" * 32, b"\x01"]], [b"v" * 32]]
    assert digest_record(result) == blake3(msgpack.packb(tree)).digest()
    assert digest_record(result).hex() == "63499439734691243bbac199010fb3bfe0faf47f0a689a3a7a691f6c40e53455"
