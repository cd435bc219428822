"""The replicated log: the same certified updates give the same bits, whoever applies them and how often."""

import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import pytest

from shoal.protocol import replica as replica_module
from shoal.protocol.aggregators import AGGREGATORS
from shoal.protocol.codecs import CODECS, Float32s
from shoal.protocol.errors import ProtocolError, Refusal
from shoal.protocol.layout import TensorSpec, initialise, make_layout
from shoal.protocol.manifest import Outer
from shoal.protocol.messages import Certificate, digest_record
from shoal.protocol.outer_step import OUTER_OPTIMIZERS, OuterRates
from shoal.protocol.quorum import Head
from shoal.protocol.replica import Replica, find_gain, make_reduction
from shoal.protocol.state import CHUNK_BYTES, chunk_digests, state_root
from tests.unit.protocol.samples import ELEMENTS, LAYOUT, PEERS, RULES, SWARM, make_sample_manifest, make_update

T = TypeVar("T")

MANIFEST = make_sample_manifest()
# If this fails, two versions of shoal no longer agree on the state of a swarm.
GOLDEN_ROOT = "7c129562a7fd137b6eb0c276d8a31dba3b80eff55edb3d954b09c5e2eeba7be8"


def make_replica() -> Replica:
    replica = Replica(MANIFEST, np.empty(ELEMENTS, np.float32), np.empty(ELEMENTS, np.float32))
    replica.reset()
    return replica


def make_log(rounds: int) -> tuple[list[Certificate], dict[bytes, bytes], list[bytes]]:
    """Certified updates, the encoded parts of all of them, and the state roots after each, round 0 first."""
    replica = make_replica()
    head = Head(round=0, digest=SWARM, state_root=replica.root(), voters=MANIFEST.founders)
    log, blobs, roots = [], {}, [head.state_root]
    for number in range(1, rounds + 1):
        certificate, encoded = make_update(MANIFEST, head, number, SWARM)
        blobs |= encoded
        root = replica.apply(certificate.result, encoded)
        head = replace(head, round=number, digest=digest_record(certificate.result), state_root=root)
        log.append(certificate)
        roots.append(root)
    return log, blobs, roots


LOG, BLOBS, ROOTS = make_log(5)


def update_of(certificate: Certificate) -> Float32s:
    update = np.empty(ELEMENTS, np.float32)
    for part, one in enumerate(certificate.result.parts):
        first, end = MANIFEST.part_range(part)
        CODECS["int8"].decode_untrusted(BLOBS[one.digest], end - first, update[first:end])
    return update


def test_round_0_is_what_the_seed_gives() -> None:
    replica = Replica(MANIFEST, np.full(ELEMENTS, 9, np.float32), np.full(ELEMENTS, 9, np.float32), round_number=7)
    assert replica.reset() == ROOTS[0]
    assert replica.round == 0
    assert np.array_equal(replica.params, initialise(LAYOUT, MANIFEST.seed))
    assert not replica.momentum.any()


def test_the_root_is_the_same_everywhere() -> None:
    assert ROOTS[5].hex() == GOLDEN_ROOT
    assert len(set(ROOTS)) == 6


def test_the_root_covers_round_parameters_and_momentum() -> None:
    replica = make_replica()
    zeros = np.zeros(ELEMENTS, np.float32)
    assert replica.root() == state_root(0, ELEMENTS, chunk_digests(replica.params), chunk_digests(zeros))
    assert replica.index().root == replica.root()
    roots = {replica.root()}
    replica.params[ELEMENTS - 1] += 1
    roots.add(replica.root())
    replica.momentum[0] = 1
    roots.add(replica.root())
    replica.round = 1
    roots.add(replica.root())
    assert len(roots) == 4


def test_replaying_the_log_is_applying_it() -> None:
    replica = make_replica()
    assert [replica.apply(one.result, BLOBS) for one in LOG] == ROOTS[1:]
    assert replica.round == 5


def test_two_replicas_agree_to_the_bit_wherever_their_memory_lies() -> None:
    shared = np.zeros(3 * ELEMENTS + 7, np.float32)
    params, momentum = shared[1 : ELEMENTS + 1], shared[2 * ELEMENTS + 5 : 3 * ELEMENTS + 5]
    one, two = make_replica(), Replica(MANIFEST, params, momentum)
    two.reset()
    for certificate in LOG:
        assert one.apply(certificate.result, BLOBS) == two.apply(
            certificate.result, {digest: memoryview(raw) for digest, raw in BLOBS.items()}
        )
    assert one.params.tobytes() == params.tobytes() and one.momentum.tobytes() == momentum.tobytes()
    assert np.shares_memory(two.params, shared), "it is changed in place"
    assert not shared[ELEMENTS + 1 : 2 * ELEMENTS + 5].any(), "and nothing beside it"


def test_going_on_from_a_copy_of_the_state_is_replaying_from_the_start() -> None:
    replica = make_replica()
    for certificate in LOG[:3]:
        replica.apply(certificate.result, BLOBS)
    joiner = Replica(MANIFEST, replica.params.copy(), replica.momentum.copy(), round_number=3)
    assert joiner.root() == ROOTS[3]
    assert [joiner.apply(one.result, BLOBS) for one in LOG[3:]] == ROOTS[4:]


def test_a_round_is_one_nesterov_step_of_what_its_bytes_decode_to() -> None:
    replica = make_replica()
    params, momentum = replica.params.copy(), replica.momentum.copy()
    eta, mu = np.float32(MANIFEST.outer.learning_rate), np.float32(MANIFEST.outer.momentum)
    for certificate in LOG[:2]:
        update = update_of(certificate)
        momentum = momentum * mu + update
        params = params - (momentum * mu + update) * eta
        replica.apply(certificate.result, BLOBS)
        assert np.array_equal(replica.params, params) and np.array_equal(replica.momentum, momentum)


def test_the_manifest_chooses_the_outer_optimizer() -> None:
    manifest = replace(MANIFEST, outer=Outer(optimizer="sgd", learning_rate=0.5))
    replica = Replica(manifest, np.zeros(ELEMENTS, np.float32), np.zeros(ELEMENTS, np.float32))
    replica.reset()
    before = replica.params.copy()
    replica.apply(LOG[0].result, BLOBS)
    assert np.array_equal(replica.params, before - update_of(LOG[0]) * np.float32(0.5))
    assert not replica.momentum.any()


@pytest.mark.parametrize(
    "numbers",
    [
        {"optimizer": "nesterov", "momentum_clip": 0.001, "momentum_every": 2},
        {"optimizer": "adam", "second_moment": 0.9, "epsilon": 0.01},
    ],
    ids=["nesterov", "adam"],
)
def test_a_round_is_a_step_with_the_manifests_numbers(numbers: dict[str, Any]) -> None:
    outer = Outer(learning_rate=0.25, momentum=0.75, **numbers)
    of_the_step = {name: value for name, value in numbers.items() if name != "optimizer"}
    replica = Replica(replace(MANIFEST, outer=outer), np.zeros(ELEMENTS, np.float32), np.zeros(ELEMENTS, np.float32))
    replica.reset()
    params, momentum = replica.params.copy(), replica.momentum.copy()
    for turn, certificate in enumerate(LOG[:2]):
        rates = OuterRates(learning_rate=0.25, momentum=0.75, **of_the_step)
        rates = replace(rates, turn=turn % rates.momentum_every)
        OUTER_OPTIMIZERS[outer.optimizer].apply(params, momentum, update_of(certificate), rates)
        replica.apply(certificate.result, BLOBS)
        assert np.array_equal(replica.params, params) and replica.momentum.tobytes() == momentum.tobytes()


def test_the_gain_is_a_members_share_of_the_mean_times_that_of_the_outer_step() -> None:
    first = LOG[0].result.members[0]
    weights = zip(PEERS[:3], (0.5, 0.2, 0.3), strict=True)
    members = tuple(replace(first, peer=peer, weight=weight) for peer, weight in weights)
    parts = tuple(replace(part, contributors=b"\x05") for part in LOG[0].result.parts)
    result = replace(LOG[0].result, members=members, parts=parts)
    rate = MANIFEST.outer.learning_rate * (1 + MANIFEST.outer.momentum)
    assert [find_gain(MANIFEST, result, peer) for peer in PEERS[:3]] == pytest.approx([rate * 5 / 8, 0, rate * 3 / 8])
    assert find_gain(MANIFEST, replace(result, parts=(), members=()), PEERS[0]) == 0
    sgd = replace(MANIFEST, outer=Outer(optimizer="sgd", learning_rate=0.5))
    assert find_gain(sgd, result, PEERS[0]) == pytest.approx(0.5 * 5 / 8)


def test_a_round_without_parts_changes_the_round_only() -> None:
    replica = make_replica()
    params = replica.params.copy()
    root = replica.apply(replace(LOG[0].result, parts=(), members=()), {})
    assert (replica.round, np.array_equal(replica.params, params)) == (1, True)
    assert root not in ROOTS, "the root names the round"


@pytest.mark.parametrize("first", [1, 4])
def test_updates_are_applied_in_the_order_of_the_log(first: int) -> None:
    replica = make_replica()
    with pytest.raises(AssertionError, match="order of the log"):
        replica.apply(LOG[first].result, BLOBS)
    assert replica.root() == ROOTS[0]


@pytest.mark.parametrize(
    ("spoil", "refusal"),
    [(lambda raw: raw[:-1], Refusal.WRONG_LENGTH), (lambda raw: b"\xff" * 4 + raw[4:], Refusal.NOT_FINITE)],
)
def test_a_part_that_does_not_decode_is_refused(spoil: object, refusal: Refusal) -> None:
    assert callable(spoil)
    digest = LOG[0].result.parts[0].digest
    with pytest.raises(ProtocolError) as caught:
        make_replica().apply(LOG[0].result, {**BLOBS, digest: spoil(BLOBS[digest])})
    assert caught.value.refusal is refusal


def test_threads_that_share_the_work_compute_the_same() -> None:
    with ThreadPoolExecutor(4) as threads:
        replica = Replica(MANIFEST, np.empty(ELEMENTS, np.float32), np.empty(ELEMENTS, np.float32), each=threads.map)
        assert replica.reset() == ROOTS[0]
        for certificate, root in zip(LOG, ROOTS[1:], strict=True):
            assert replica.apply(certificate.result, BLOBS) == root


def test_spans_that_are_hashed_apart_make_the_same_root(monkeypatch: pytest.MonkeyPatch) -> None:
    elements = 3 * CHUNK_BYTES // 4 + 5
    layout = make_layout((TensorSpec(name="w", shape=(elements,)),))
    vectors = np.random.default_rng(3).standard_normal((2, elements), np.float32)
    whole = Replica(replace(MANIFEST, layout=layout), *vectors).root()
    assert whole == state_root(0, elements, *map(chunk_digests, vectors))
    monkeypatch.setattr(replica_module, "DIGEST_SPAN_ELEMENTS", CHUNK_BYTES // 4)
    assert Replica(replace(MANIFEST, layout=layout), *vectors).root() == whole


def test_when_a_part_does_not_decode_nothing_is_at_work_any_more() -> None:
    """Whoever rebuilds the vectors then must find them left alone."""
    ended: list[int] = []

    def each(work: Callable[[int], T], pieces: Iterable[int]) -> Iterator[T]:
        for piece in pieces:
            yield work(piece)
            ended.append(piece)

    replica = Replica(MANIFEST, np.empty(ELEMENTS, np.float32), np.empty(ELEMENTS, np.float32), each=each)
    replica.reset()
    result = LOG[0].result
    spoiled = BLOBS | {result.parts[0].digest: b"short"}
    ended.clear()
    with pytest.raises(ProtocolError) as caught:
        replica.apply(result, spoiled)
    assert caught.value.refusal is Refusal.WRONG_LENGTH
    assert ended == list(range(len(result.parts)))


def test_vectors_of_another_length_are_a_mistake() -> None:
    with pytest.raises(AssertionError, match="every element"):
        Replica(MANIFEST, np.zeros(ELEMENTS, np.float32), np.zeros(ELEMENTS + 1, np.float32))


def test_the_reduction_is_the_manifests() -> None:
    manifest = make_sample_manifest(rules=replace(RULES, codec="fp16", aggregator="norm_clipped_mean"))
    reduction = make_reduction(manifest)
    assert reduction.codec_in is reduction.codec_out is CODECS["fp16"]
    assert reduction.aggregator is AGGREGATORS["norm_clipped_mean"]


def test_updates_have_a_codec_of_their_own() -> None:
    manifest = make_sample_manifest(rules=replace(RULES, codec="ternary", update_codec="bf16"))
    reduction = make_reduction(manifest)
    assert (reduction.codec_in, reduction.codec_out) == (CODECS["ternary"], CODECS["bf16"])
    replica = make_replica()
    before = replica.root()
    head = Head(round=0, digest=SWARM, state_root=before, voters=manifest.founders)
    certificate, blobs = make_update(manifest, head, 1, SWARM)
    assert certificate.result.codec == "bf16"
    assert replica.apply(certificate.result, blobs) != before


IN_A_PROCESS_OF_ITS_OWN = """
from dataclasses import replace
import numpy as np
from shoal.protocol import kernels, outer_kernels, sparse_kernels
from shoal.protocol.codecs import CODECS
from shoal.protocol.contribution import Contributor
from shoal.protocol.outer_step import OUTER_OPTIMIZERS
from shoal.protocol.aggregators import AGGREGATORS, WeightedPart
from shoal.protocol.replica import make_reduction, rehearse
from tests.unit.protocol.samples import RULES, make_sample_manifest, rules_with

def count():
    both = {**vars(kernels), **vars(sparse_kernels), **vars(outer_kernels)}
    found = {name: one for name, one in both.items() if hasattr(one, "signatures") and name[0] != "_"}
    return {name: len(one.signatures) for name, one in found.items()}

rules = [rules_with(codec) for codec in CODECS] + [replace(RULES, aggregator=name) for name in AGGREGATORS]
manifests = [make_sample_manifest(rules=one) for one in rules]
assert not any(count().values())
for manifest in manifests:
    rehearse(manifest)
rehearsed = count()
missing = [name for name, times in rehearsed.items() if not times]
assert missing == ["sgd", "adam"], missing  # these swarms have another optimizer
for manifest in manifests:
    base, reduction, part = np.ones(manifest.layout.elements, np.float32), make_reduction(manifest), 0
    frozen = Contributor(manifest).freeze(1, base, base * np.float32(0.5))
    first, end = manifest.part_range(part)
    received = memoryview(bytearray(frozen.encoded[part]))
    parts = [WeightedPart(encoded=one, weight=0.5) for one in (frozen.encoded[part], received)]
    update = np.empty(end - first, np.float32)
    reduction.codec_out.decode_untrusted(bytes(reduction.reduce_part(parts, end - first)), end - first, update)
    optimizer, rates = OUTER_OPTIMIZERS[manifest.outer.optimizer], manifest.outer_rates(3)
    optimizer.apply(base[first:end], base.copy()[first:end], update, rates)
assert count() == rehearsed, (count(), rehearsed)
"""


def test_after_a_rehearsal_a_round_finds_its_kernels_ready() -> None:
    ended = subprocess.run([sys.executable, "-c", IN_A_PROCESS_OF_ITS_OWN], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
