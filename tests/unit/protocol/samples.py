"""A small swarm for tests: peers in the order of their ids, a manifest of four parts, and whatever such peers sign."""

from dataclasses import replace

import numpy as np
from blake3 import blake3

from shoal.protocol.attendance import NO_ATTENDANCE, WORK, Attendance
from shoal.protocol.codecs import CODECS, UPDATE_CODECS
from shoal.protocol.identity import Identity
from shoal.protocol.layout import Layout, TensorSpec
from shoal.protocol.manifest import Draft, Manifest, Rounds, Task, make_manifest
from shoal.protocol.messages import (
    Certificate,
    Member,
    PartResult,
    Presence,
    Ready,
    Result,
    SignedReady,
    Vote,
    contribution_root,
    digest_record,
    sign_message,
    sign_ready,
)
from shoal.protocol.proposer import list_weights
from shoal.protocol.quorum import Authority, Head, QuorumRule, make_bitmap

IDENTITIES = tuple(sorted((Identity(bytes([seed]) * 32) for seed in range(1, 9)), key=lambda one: one.peer))
PEERS = tuple(one.peer for one in IDENTITIES)
# The same and many more, for whoever needs a crowd; only the first eight are in the order of their ids.
CROWD = IDENTITIES + tuple(Identity(bytes([seed]) * 32) for seed in range(9, 49))
CROWD_PEERS = tuple(one.peer for one in CROWD)
BY_PEER = {one.peer: one for one in IDENTITIES}
SWARM = b"s" * 32
OTHER_SWARM = b"t" * 32
ELEMENTS = 900
PART_ELEMENTS = 256
PARTS = 4
LAYOUT = Layout(tensors=(TensorSpec(name="w", shape=(ELEMENTS,), init="uniform", std=0.02),))
RULES = Rounds(
    peers_min=2,
    grace_s=2.0,
    part_elements=PART_ELEMENTS,
    plan_timeout_s=2.0,
    sender_timeout_s=3.0,
    owner_timeout_s=5.0,
    exchange_timeout_s=15.0,
    commit_timeout_s=5.0,
    presence_period_s=2.0,
    presence_timeout_s=7.0,
    snapshot_every=4,
    rounds_kept=8,
)
DRAFT = Draft(name="tiny", task=Task(kind="none"), seed=1, rounds=RULES)


def rules_with(codec: str) -> Rounds:
    """Contributions in this codec, in parts that it can have; updates in another one where it must be."""
    return replace(
        RULES,
        codec=codec,
        update_codec=None if codec in UPDATE_CODECS else "int8",
        part_elements=max(PART_ELEMENTS, CODECS[codec].block_elements),
    )


def make_sample_manifest(founders: int = 4, rules: Rounds = RULES) -> Manifest:
    """The manifest of the first `founders` peers, the first of whom owns it."""
    return make_manifest(replace(DRAFT, rounds=rules), LAYOUT, PEERS[0], PEERS[:founders])


def make_authority(rules: Rounds = RULES) -> Authority:
    """Who decides in the sample swarm, which the first peer owns."""
    rule = QuorumRule(rules.quorum)
    may_declare = rules.reroot_after_s > 0 and rule is QuorumRule.MAJORITY
    return Authority(swarm=SWARM, rule=rule, owner=PEERS[0], parts=PARTS, may_declare=may_declare)


def make_head(voters: int = 4, round_number: int = 0) -> Head:
    """A head that the first `voters` peers vote after."""
    return Head(round=round_number, digest=b"h" * 32, state_root=b"r" * 32, voters=PEERS[:voters])


def make_digests(label: str, parts: int = PARTS) -> tuple[bytes, ...]:
    """The digests of an imagined contribution's parts."""
    return tuple(blake3(f"{label}/{part}".encode()).digest() for part in range(parts))


def make_ready(
    number: int,
    head: Head,
    *,
    tokens: int = 1000,
    owns: bool = True,
    label: str = "",
    swarm: bytes = SWARM,
    attendance: Attendance = NO_ATTENDANCE,
) -> SignedReady:
    """The READY of peer `number` for the round after `head`."""
    ready = Ready(
        round=head.round + 1,
        base_root=head.state_root,
        contribution_root=contribution_root(make_digests(f"{number}{label}")),
        tokens=tokens,
        steps=10,
        norm=1.0,
        owns=owns,
        attendance=attendance,
    )
    return sign_ready(CROWD[number], swarm, ready)


def make_presence(number: int, sequence: int = 1, **changes: object) -> Presence:
    """A signed presence of peer `number`; `changes` are other values of its fields."""
    presence = Presence(
        peer=CROWD_PEERS[number],
        incarnation=1,
        sequence=sequence,
        sent_at_s=0.0,
        agent="test",
        trains=True,
        leaving=False,
        head_round=0,
        head_digest=SWARM,
        state_root=b"r" * 32,
        attempt=0,
        phase="gather",
        tensor_addresses=(),
        control_addresses=(),
        tokens_per_s=1.0,
        ready=None,
    )
    return sign_message(CROWD[number], SWARM, replace(presence, **changes))  # type: ignore[arg-type]


def make_sample_result(
    head: Head, members: int = 3, parts: int = PARTS, label: str = "update", codec: str = "int8"
) -> Result:
    """A result that can follow `head`, with everybody in every part."""
    roster = tuple(make_ready(number, head) for number in range(members))
    bitmap = make_bitmap(frozenset(range(members)), members)
    return Result(
        round=head.round + 1,
        previous=head.digest,
        base_root=head.state_root,
        codec=codec,
        members=tuple(
            Member(
                peer=one.peer,
                contribution_root=one.ready.contribution_root,
                tokens=one.ready.tokens,
                steps=one.ready.steps,
                weight=weight,
            )
            for one, weight in zip(roster, list_weights(roster, WORK), strict=True)
        ),
        parts=tuple(PartResult(digest=digest, contributors=bitmap) for digest in make_digests(label, parts)),
        voters=head.voters,
    )


def make_vote(identity: Identity, result: Result, attempt: int = 0, swarm: bytes = SWARM) -> Vote:
    """This peer's signed vote for `result`."""
    vote = Vote(voter=identity.peer, round=result.round, attempt=attempt, result_digest=digest_record(result))
    return sign_message(identity, swarm, vote)


def certify(result: Result, voters: int = 3, attempt: int = 0, swarm: bytes = SWARM) -> Certificate:
    """The certificate of the first `voters` peers."""
    votes = tuple(make_vote(one, result, attempt, swarm) for one in IDENTITIES[:voters])
    return Certificate(result=result, attempt=attempt, votes=votes)


def make_update(manifest: Manifest, head: Head, seed: int, swarm: bytes) -> tuple[Certificate, dict[bytes, bytes]]:
    """A certified update of random values after `head`, and its encoded parts by digest."""
    codec = CODECS[manifest.rounds.codec_out]
    # Whole numbers of a stream that numpy keeps fixed (NEP 19), scaled by a power of two: the same bits everywhere.
    words = np.random.Philox(key=seed).random_raw(manifest.layout.elements) >> np.uint64(40)
    values = (words.astype(np.int32) - 2**23).astype(np.float32) * np.float32(2.0**-23)
    ranges = [manifest.part_range(part) for part in manifest.list_parts(head.round + 1)]
    encoded = [bytes(codec.encode(values[first:end])) for first, end in ranges]
    digests = tuple(blake3(raw).digest() for raw in encoded)
    plain = make_sample_result(head, members=len(manifest.founders), parts=len(ranges), codec=codec.name)
    parts = tuple(replace(part, digest=digest) for part, digest in zip(plain.parts, digests, strict=True))
    certificate = certify(replace(plain, parts=parts), len(manifest.founders), swarm=swarm)
    return certificate, dict(zip(digests, encoded, strict=True))
