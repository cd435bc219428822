"""What histories of the ledger are made of, honest and forged, for the property tests."""

import os

from hypothesis import strategies as st

from shoal.crdt.entries import (
    decode_batch_untrusted,
)
from shoal.crdt.eras import era_of_round
from shoal.crdt.kinds import (
    AdmissionBody,
    BanBody,
    Kind,
    RegisterBody,
    RoundBody,
    TagBody,
    VersionedBody,
)
from shoal.crdt.ledger import Draft, Ledger
from shoal.crdt.reconciliation import answer, begin
from shoal.crdt.sketch import SALT_BYTES
from shoal.protocol.messages import digest_record
from shoal.protocol.wire import encode_record
from tests.properties.ledger_model import (
    HONEST,
    LIARS,
    LOG,
    ROUNDS_PER_ERA,
    SWARM,
    assert_folds_like_the_model,
)
from tests.unit.crdt.certificates import certify, make_result

NIGHTLY = os.environ.get("SHOAL_NIGHTLY") == "1"
START_MS = 1_700_000_000_000
HOUR_MS = 3_600_000
END_MS = START_MS + 1000 * HOUR_MS
SALT = bytes(range(SALT_BYTES))
ERA_LAST = era_of_round(len(LOG), ROUNDS_PER_ERA)


def synchronize(opener: Ledger, other: Ledger, messages_max: int) -> None:
    """A session of anti-entropy that may be cut off after any message."""
    request: bytes | None = begin(opener, SALT)
    asking, answering = opener, other
    for _ in range(messages_max):
        if request is None:
            return
        response = answer(answering, request)
        for raw in response.batches:
            asking.accept(decode_batch_untrusted(raw))
        asking, answering, request = answering, asking, response.reply


register_bodies = st.builds(RegisterBody, value=st.binary(max_size=3))
round_bodies = st.builds(RoundBody, round=st.integers(0, 3), value=st.binary(max_size=3))
versioned_bodies = st.builds(VersionedBody, version=st.integers(0, 3), value=st.binary(max_size=2))
tag_bodies = st.builds(TagBody, name=st.sampled_from(["best", "worst"]), value=st.just(b""), removes=st.just(()))
peers_drafts = st.one_of(
    st.builds(Draft, kind=st.sampled_from([Kind.LEASE, Kind.ADDRESSES]), body=register_bodies),
    st.builds(Draft, kind=st.just(Kind.SNAPSHOT), body=round_bodies),
    st.builds(Draft, kind=st.just(Kind.TAG), body=tag_bodies),
)
ban_bodies = st.builds(
    BanBody, peer=st.sampled_from([one.peer for one in LIARS]), reason=st.just("x"), removes=st.just(())
)
admission_bodies = st.builds(
    AdmissionBody,
    peers=st.sets(st.sampled_from([one.peer for one in LIARS]), min_size=1).map(lambda peers: tuple(sorted(peers))),
)
owners_drafts = st.one_of(
    st.builds(Draft, kind=st.sampled_from([Kind.MANIFEST, Kind.REROOT]), body=versioned_bodies),
    st.builds(Draft, kind=st.just(Kind.BAN), body=ban_bodies),
    st.builds(Draft, kind=st.just(Kind.ADMISSION), body=admission_bodies),
)


def draft_certificate(number: int, signers: int = 3) -> Draft:
    """A round of the log, with the votes of so many."""
    certificate = certify(SWARM, LOG[number - 1].result, HONEST[:signers])
    return Draft(kind=Kind.CERTIFICATE, body=RoundBody(round=number, value=encode_record(certificate)))


def forge_certificate(number: int) -> Draft:
    """Liars name themselves voters of a round that follows a true one."""
    previous = digest_record(LOG[number - 2].result) if number > 1 else SWARM
    peers = [one.peer for one in LIARS]
    certificate = certify(SWARM, make_result(number, previous, peers, dict.fromkeys(peers, 10**6)), LIARS)
    return Draft(kind=Kind.CERTIFICATE, body=RoundBody(round=number, value=encode_record(certificate)))


def assert_folds_like_the_model_at_any_time(ledger: Ledger) -> None:
    assert_folds_like_the_model(ledger, END_MS, START_MS + HOUR_MS, START_MS, END_MS)
