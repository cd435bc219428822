"""Rounds that exchange one fragment: which parts, what stays untouched, and the same as a plain loop computes."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from blake3 import blake3

from shoal.protocol.aggregators import WeightedPart
from shoal.protocol.codecs import CODECS, Float32s
from shoal.protocol.contribution import Contributor
from shoal.protocol.errors import ManifestError, ProtocolError, Refusal
from shoal.protocol.manifest import Draft, Manifest, Outer, Task, make_manifest, read_manifest_untrusted, sign_manifest
from shoal.protocol.messages import PartResult, Result
from shoal.protocol.quorum import check_certificate, list_parts, make_bitmap
from shoal.protocol.replica import Replica, make_reduction
from tests.unit.protocol.samples import (
    ELEMENTS,
    IDENTITIES,
    PARTS,
    PEERS,
    SWARM,
    certify,
    make_head,
    make_sample_manifest,
    make_sample_result,
    rules_with,
)

PART = 256
WORKERS = 3


def fragmented(fragments: int, codec: str = "fp32", **changes: Any) -> Manifest:
    return make_sample_manifest(rules=replace(rules_with(codec), fragments=fragments, **changes))


@pytest.mark.parametrize("fragments", [1, 2, 3, PARTS])
def test_so_many_rounds_in_a_row_exchange_each_part_once(fragments: int) -> None:
    manifest = fragmented(fragments)
    for first in (1, 2, 7):
        exchanged = [part for number in range(first, first + fragments) for part in manifest.list_parts(number)]
        assert sorted(exchanged) == list(range(PARTS))
    counts = [manifest.authority(SWARM).count_parts(number) for number in range(1, 9)]
    assert counts == [len(manifest.list_parts(number)) for number in range(1, 9)]
    assert max(counts) == counts[0], "no round has more parts than the first"


def test_the_parts_of_a_fragment_stand_apart() -> None:
    assert [list(list_parts(7, 3, number)) for number in range(1, 5)] == [[0, 3, 6], [1, 4], [2, 5], [0, 3, 6]]


def test_more_fragments_than_parts_are_refused() -> None:
    manifest = fragmented(1)
    rules = replace(manifest.rounds, fragments=PARTS + 1)
    draft = Draft(name="x", task=Task(kind="none"), rounds=rules)
    with pytest.raises(
        ManifestError, match=r"rounds\.fragments: is 5, of a vector with 4 parts.* use at most 4"
    ) as told:
        make_manifest(draft, manifest.layout, PEERS[0], PEERS[:1])
    assert told.value.field == "rounds.fragments"
    signed = sign_manifest(replace(manifest, owner=PEERS[0], rounds=rules), IDENTITIES[0])
    with pytest.raises(ProtocolError, match="fragments is 5, of 4 parts") as caught:
        read_manifest_untrusted(signed)
    assert caught.value.refusal is Refusal.OUT_OF_RANGE


def test_a_certificate_has_the_parts_of_its_round() -> None:
    manifest = fragmented(3)  # of four parts the first round has two, the others have one
    authority = manifest.authority(SWARM)
    head = make_head()
    whole = certify(make_sample_result(head, parts=len(manifest.list_parts(head.round + 1))))
    check_certificate(whole, head, authority)
    for parts in (1, 3, 4):
        with pytest.raises(ProtocolError, match=f"{parts} parts, expected 2 or none"):
            check_certificate(certify(make_sample_result(head, parts=parts)), head, authority)


def train(worker: int, number: int) -> Float32s:
    """What a worker's parameters move by in a round, whatever they are."""
    return np.random.default_rng(100 * number + worker).standard_normal(ELEMENTS, dtype=np.float32) * np.float32(0.01)


def run_plainly(start: Float32s, fragments: int, rounds: int, outer: Outer) -> tuple[Float32s, list[Float32s]]:
    """The base and the workers' parameters at the end, by arithmetic on whole vectors with masks."""
    base, momentum = start.astype(np.float64), np.zeros(ELEMENTS)
    locals_ = [start.astype(np.float64) for _ in range(WORKERS)]
    of_fragment = (np.arange(ELEMENTS) // PART) % fragments
    for number in range(1, rounds + 1):
        for worker, local in enumerate(locals_):
            local += train(worker, number)
        due = of_fragment == (number - 1) % fragments
        gradient = np.mean([base - local for local in locals_], axis=0)
        momentum[due] = outer.momentum * momentum[due] + gradient[due]
        base[due] -= outer.learning_rate * (gradient[due] + outer.momentum * momentum[due])
        for local in locals_:
            local[due] = base[due]
    return base.astype(np.float32), [local.astype(np.float32) for local in locals_]


class Round:
    """Real contributors, reduction and replica, and nothing else of a swarm."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.replica = Replica(manifest, np.empty(ELEMENTS, np.float32), np.empty(ELEMENTS, np.float32))
        self.replica.reset()
        self.contributors = [Contributor(manifest) for _ in range(WORKERS)]
        self.locals = [self.replica.params.copy() for _ in range(WORKERS)]

    def run(self, number: int, left_out: tuple[int, int] | None = None) -> None:
        """`left_out`: a worker, and the place of a part of which its contribution did not arrive."""
        manifest, parts = self.manifest, self.manifest.list_parts(number)
        for worker, local in enumerate(self.locals):
            local += train(worker, number)
        pairs = zip(self.contributors, self.locals, strict=True)
        frozen = [contributor.freeze(number, self.replica.params, local) for contributor, local in pairs]
        blobs, results = {}, []
        for place, part in enumerate(parts):
            first, end = manifest.part_range(part)
            members = [worker for worker in range(WORKERS) if (worker, place) != left_out]
            pieces = [WeightedPart(encoded=frozen[worker].encoded[place], weight=1 / 3) for worker in members]
            raw = make_reduction(manifest).reduce_part(pieces, end - first)
            digest = blake3(raw).digest()
            blobs[digest] = raw
            results.append(PartResult(digest=digest, contributors=make_bitmap(frozenset(members), WORKERS)))
        result = self._certify(number, tuple(results), [one.root for one in frozen])
        self.replica.apply(result, blobs)
        for worker, (contributor, local) in enumerate(zip(self.contributors, self.locals, strict=True)):
            included = contributor.settle(frozen[worker], result, worker)
            assert len(included) == len(parts) - (left_out is not None and left_out[0] == worker)
            for place in included:
                first, end = manifest.part_range(parts[place])
                local[first:end] = self.replica.params[first:end]

    def _certify(self, number: int, parts: tuple[PartResult, ...], roots: list[bytes]) -> Result:
        plain = make_sample_result(make_head(), members=WORKERS, codec=self.manifest.rounds.codec_out)
        members = tuple(replace(one, contribution_root=root) for one, root in zip(plain.members, roots, strict=True))
        return replace(plain, round=number, members=members, parts=parts)


@pytest.mark.parametrize("fragments", [1, 2, 3, 4])
def test_it_is_what_a_plain_loop_computes(fragments: int) -> None:
    manifest = fragmented(fragments)
    rounds = Round(manifest)
    start = rounds.replica.params.copy()
    for number in range(1, 10):
        rounds.run(number)
    base, locals_ = run_plainly(start, fragments, 9, manifest.outer)
    np.testing.assert_allclose(rounds.replica.params, base, rtol=0, atol=2e-6)
    for local, expected in zip(rounds.locals, locals_, strict=True):
        np.testing.assert_allclose(local, expected, rtol=0, atol=2e-6)
    assert not np.allclose(rounds.replica.params, start, atol=1e-3), "it has moved"


def test_what_is_not_exchanged_stays_as_it_was() -> None:
    manifest = fragmented(2, codec="int8")
    rounds = Round(manifest)
    for number in range(1, 7):
        before = rounds.replica.params.copy(), rounds.replica.momentum.copy()
        residuals = [one.residual.copy() for one in rounds.contributors]
        rounds.run(number)
        due = (np.arange(ELEMENTS) // PART) % 2 == (number - 1) % 2
        for now, then in zip((rounds.replica.params, rounds.replica.momentum), before, strict=True):
            assert np.array_equal(now[~due], then[~due])
            assert not np.array_equal(now[due], then[due])
        for contributor, residual in zip(rounds.contributors, residuals, strict=True):
            assert np.array_equal(contributor.residual[~due], residual[~due])
            assert not np.array_equal(contributor.residual[due], residual[due])


@pytest.mark.parametrize("kept", [1.0, 0.9])
def test_what_is_encoded_and_what_remains_are_what_was_produced(kept: float) -> None:
    manifest = fragmented(2, codec="int8", residual_kept=kept)
    rounds = Round(manifest)
    for number in (1, 2, 3):
        rounds.run(number)
    contributor, base = rounds.contributors[0], rounds.replica.params
    local = rounds.locals[0] + train(0, 4)
    frozen = contributor.freeze(4, base, local)
    parts = manifest.list_parts(4)
    assert len(frozen.encoded) == len(parts) == 2
    for part, raw in zip(parts, frozen.encoded, strict=True):
        first, end = manifest.part_range(part)
        decoded = np.empty(end - first, np.float32)
        CODECS["int8"].decode_untrusted(raw, end - first, decoded)
        produced = (base[first:end] - local[first:end]) + np.float32(kept) * contributor.residual[first:end]
        assert np.array_equal(decoded.astype(np.float64) + frozen.residual_next[first:end], produced.astype(np.float64))


def test_a_part_that_left_a_worker_out_waits_for_the_fragments_next_turn() -> None:
    manifest = fragmented(2, codec="int8")
    rounds = Round(manifest)
    for number in (1, 2):
        rounds.run(number)
    residual, params = rounds.contributors[1].residual.copy(), rounds.replica.params.copy()
    rounds.run(3, left_out=(1, 1))  # the second of parts 0 and 2
    first, end = manifest.part_range(2)
    assert np.array_equal(rounds.contributors[1].residual[first:end], residual[first:end])
    assert not np.array_equal(rounds.locals[1][first:end], rounds.replica.params[first:end]), "its work stays"
    for part in (0,):
        first, end = manifest.part_range(part)
        assert np.array_equal(rounds.locals[1][first:end], rounds.replica.params[first:end])
        assert not np.array_equal(params[first:end], rounds.replica.params[first:end])
    rounds.run(4)
    rounds.run(5)
    for part in (0, 2):
        first, end = manifest.part_range(part)
        assert np.array_equal(rounds.locals[1][first:end], rounds.replica.params[first:end])
