"""Freezing and settling a pseudo-gradient: exact to the bit, and settled only where it was certified."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from blake3 import blake3

from shoal.protocol.codecs import CODECS, Float32s
from shoal.protocol.contribution import Contributor, Frozen, NonFiniteContribution
from shoal.protocol.manifest import Manifest
from shoal.protocol.messages import PartResult, Result, contribution_root
from shoal.protocol.quorum import make_bitmap
from tests.unit.protocol.samples import ELEMENTS, PARTS, make_head, make_sample_manifest, make_sample_result, rules_with

MANIFEST = make_sample_manifest()
RNG = np.random.default_rng(5)
BASE = RNG.standard_normal(ELEMENTS, dtype=np.float32)
LOCAL = BASE - RNG.standard_normal(ELEMENTS, dtype=np.float32) * np.float32(0.01)


def decode(manifest: Manifest, frozen: Frozen) -> Float32s:
    decoded = np.empty(ELEMENTS, np.float32)
    for part, raw in enumerate(frozen.encoded):
        first, end = manifest.part_range(part)
        CODECS[manifest.rounds.codec].decode_untrusted(raw, end - first, decoded[first:end])
    return decoded


def certified(contributors: dict[int, set[int]], frozen: Frozen, index: int = 0, round_number: int = 1) -> Result:
    """A result whose part `p` was reduced from `contributors[p]`, of three members; `frozen` is member `index`'s."""
    plain = make_sample_result(make_head())
    members = list(plain.members)
    members[index] = replace(members[index], contribution_root=frozen.root)
    parts = tuple(
        PartResult(digest=b"d" * 32, contributors=make_bitmap(frozenset(contributors[part]), 3))
        for part in sorted(contributors)
    )
    return replace(plain, round=round_number, members=tuple(members), parts=parts)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, np.float32(1e38)])
@pytest.mark.parametrize("at", [0, 700, ELEMENTS - 1])
def test_a_pseudo_gradient_that_is_not_finite_is_never_encoded(value: float, at: int) -> None:
    local = LOCAL.copy()
    local[at] = value
    contributor = Contributor(MANIFEST)
    with pytest.raises(NonFiniteContribution, match=f"part {at // 256} of the pseudo-gradient of round 3"):
        contributor.freeze(3, BASE, local)
    assert not contributor.residual.any(), "and leaves the residual as it was"


def test_threads_that_share_the_work_freeze_the_same() -> None:
    alone = Contributor(MANIFEST).freeze(1, BASE, LOCAL)
    with ThreadPoolExecutor(4) as threads:
        shared = Contributor(MANIFEST, each=threads.map).freeze(1, BASE, LOCAL)
    assert (shared.encoded, shared.digests, shared.root) == (alone.encoded, alone.digests, alone.root)
    assert shared.norm == alone.norm
    assert np.array_equal(shared.residual_next, alone.residual_next)


@pytest.mark.parametrize("kept", [1.0, 0.95])
@pytest.mark.parametrize("codec", sorted(CODECS))
def test_what_is_encoded_and_what_remains_are_what_was_produced(codec: str, kept: float) -> None:
    manifest = make_sample_manifest(rules=rules_with(codec))
    manifest = replace(manifest, rounds=replace(manifest.rounds, residual_kept=kept))  # of fp32, too
    contributor = Contributor(manifest)
    for number in range(1, 6):
        local = BASE - np.random.default_rng(number).standard_normal(ELEMENTS, dtype=np.float32)
        produced = (BASE - local) + np.float32(kept) * contributor.residual
        frozen = contributor.freeze(number, BASE, local)
        assert np.array_equal(decode(manifest, frozen) + frozen.residual_next, produced), "to the bit"
        contributor.settle(frozen, certified({part: {0} for part in range(manifest.parts)}, frozen, 0, number), 0)
        assert np.array_equal(contributor.residual, frozen.residual_next)


def test_a_frozen_contribution_is_named_by_its_bytes() -> None:
    frozen = Contributor(MANIFEST).freeze(1, BASE, LOCAL)
    assert frozen.digests == tuple(blake3(raw).digest() for raw in frozen.encoded)
    assert frozen.root == contribution_root(frozen.digests)
    assert [len(raw) for raw in frozen.encoded] == [CODECS["int8"].encoded_bytes(n) for n in (256, 256, 256, 132)]
    assert frozen.norm == pytest.approx(float(np.linalg.norm(BASE - LOCAL)), rel=1e-6)


def test_freezing_changes_nothing_until_it_is_settled() -> None:
    contributor = Contributor(MANIFEST, np.full(ELEMENTS, 0.25, np.float32))
    base, local = BASE.copy(), LOCAL.copy()
    first = contributor.freeze(1, base, local)
    assert np.array_equal(base, BASE) and np.array_equal(local, LOCAL)
    assert np.all(contributor.residual == np.float32(0.25))
    assert contributor.freeze(1, base, local).digests == first.digests


def test_only_certified_parts_take_over_the_residual() -> None:
    before = np.full(ELEMENTS, 0.25, np.float32)
    contributor = Contributor(MANIFEST, before.copy())
    frozen = contributor.freeze(1, BASE, LOCAL)
    included = contributor.settle(frozen, certified({0: {0, 1}, 1: {0, 2}, 2: {1, 2}, 3: {2}}, frozen, 1), 1)
    assert included == (0, 2)
    for part in range(PARTS):
        first, end = MANIFEST.part_range(part)
        expected = frozen.residual_next if part in included else before
        assert np.array_equal(contributor.residual[first:end], expected[first:end])


def test_a_round_without_this_peer_settles_nothing() -> None:
    contributor = Contributor(MANIFEST)
    frozen = contributor.freeze(1, BASE, LOCAL)
    assert contributor.settle(frozen, certified({part: {0, 2} for part in range(PARTS)}, frozen, 1), 1) == ()
    assert not contributor.residual.any()
    without_parts = replace(certified({part: {1} for part in range(PARTS)}, frozen, 1), parts=())
    assert contributor.settle(frozen, without_parts, 1) == ()


def test_a_contribution_from_before_a_restart_settles_nothing_of_the_one_after_it() -> None:
    before = np.full(ELEMENTS, 0.25, np.float32)
    contributor = Contributor(MANIFEST, before.copy())
    first, second = contributor.freeze(1, BASE, LOCAL), contributor.freeze(1, BASE, LOCAL * np.float32(2))
    result = certified({part: {0, 1, 2} for part in range(PARTS)}, first, 1)
    assert contributor.settle(second, result, 1) == (), "the certificate counts the first"
    assert np.array_equal(contributor.residual, before)
    assert contributor.settle(first, result, 1) == tuple(range(PARTS))


def test_missed_work_is_in_the_next_contribution() -> None:
    contributor = Contributor(MANIFEST)
    frozen = contributor.freeze(1, BASE, LOCAL)
    contributor.settle(frozen, certified({part: {0} for part in range(PARTS)}, frozen, 1), 1)
    assert contributor.freeze(2, BASE, LOCAL).digests == frozen.digests


def test_a_contribution_is_settled_by_its_own_round() -> None:
    contributor = Contributor(MANIFEST)
    frozen = contributor.freeze(1, BASE, LOCAL)
    with pytest.raises(AssertionError, match="its own round"):
        contributor.settle(frozen, certified({part: {0} for part in range(PARTS)}, frozen, 0, 2), 0)


def test_clearing_forgets_the_residual() -> None:
    contributor = Contributor(MANIFEST, np.full(ELEMENTS, 0.25, np.float32))
    contributor.clear()
    assert not contributor.residual.any()


def test_the_residual_has_one_value_for_every_element() -> None:
    with pytest.raises(AssertionError, match="every element"):
        Contributor(MANIFEST, np.zeros(ELEMENTS - 1, np.float32))
