"""What the numbers of a round must be, written a second time and in another way than the production code.

Float32 arithmetic in roster order for the aggregate; exact fractions for the weights.
"""

import math
from collections.abc import Collection
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from shoal.protocol.codecs import CODECS
from shoal.protocol.manifest import Manifest
from shoal.protocol.messages import Member, Ready, Result

Vector = npt.NDArray[np.float32]
Claim = tuple[int, int, int, int, int]  # tokens, steps, intervals, their rounds, age of the base

BLOCK = 256
INT8 = "int8"


def decode(codec: str, raw: bytes | memoryview, elements: int) -> Vector:
    """What an encoded part stands for: one scale for each block of codes."""
    if codec != INT8:
        out = np.empty(elements, np.float32)
        CODECS[codec].decode_untrusted(raw, elements, out)
        return out
    blocks = -(-elements // BLOCK)
    scales = np.frombuffer(raw, "<f4", blocks)
    codes = np.frombuffer(raw, np.int8, elements, 4 * blocks)
    decoded: Vector = codes.astype(np.float32) * np.repeat(scales, BLOCK)[:elements]
    return decoded


def encode(codec: str, values: Vector) -> bytes:
    if codec != INT8:
        return bytes(CODECS[codec].encode(values))
    scales, codes = [], []
    for start in range(0, values.size, BLOCK):
        block = values[start : start + BLOCK]
        peak = np.abs(block).max()
        scale = np.float32(max(peak / np.float32(127), np.float32(2.0**-126)))
        scales.append(np.float32(0) if peak == 0 else scale)
        codes.append(np.rint(block / scale).astype(np.int8))
    return np.array(scales, "<f4").tobytes() + np.concatenate(codes).tobytes()


def aggregate(codec: str, vectors: list[Vector], weights: list[float], elements: int) -> bytes:
    """The encoded weighted mean."""
    total, weight_sum = np.zeros(elements, np.float32), np.float32(0.0)
    for vector, weight in zip(vectors, weights, strict=True):
        total = total + np.float32(weight) * vector
        weight_sum = np.float32(weight_sum + np.float32(weight))
    return encode(codec, total / weight_sum)


def list_indices(bitmap: bytes, count: int) -> tuple[int, ...]:
    """The roster indices in a contributor bitmap."""
    bits = int.from_bytes(bitmap, "little")
    return tuple(index for index in range(count) if bits >> index & 1)


def find_span(manifest: Manifest, number: int, place: int) -> tuple[int, int]:
    """First element and one past the last of what stands at this place of a round's plan."""
    rules = manifest.rounds
    part = [one for one in range(manifest.parts) if (one - number + 1) % rules.fragments == 0][place]
    return part * rules.part_elements, min((part + 1) * rules.part_elements, manifest.layout.elements)


def list_parts_with(result: Result, index: int) -> tuple[int, ...]:
    """The parts that were certified with this roster member."""
    count = len(result.members)
    return tuple(part for part, one in enumerate(result.parts) if index in list_indices(one.contributors, count))


def is_quorum(votes: int, voters: int, rule: str) -> bool:
    return 3 * votes > 2 * voters if rule == "two_thirds" else 2 * votes > voters


def read_claim(said: Ready | Member) -> Claim:
    """By what a member weighs."""
    also = said.attendance
    return said.tokens, said.steps, also.intervals, also.interval_rounds, also.base_age


def count_intervals(counted: Collection[int], number: int) -> tuple[int, int]:
    """How many intervals there are between the rounds that counted a peer and round `number`, and how long they are
    together: from round to round, where the 50th one without the peer ends an interval, too (FedAU)."""
    intervals = rounds = since = 0
    for at in range(min(counted, default=number) + 1, number + 1):
        since += 1
        if at in counted or at == number or since == 50:
            intervals, rounds, since = intervals + 1, rounds + since, 0
    return intervals, rounds


def _factor(claim: Claim, rule: str) -> Fraction:
    _, _, intervals, rounds, age = claim
    if rule == "participation":
        return Fraction(rounds, intervals) if intervals else Fraction(1)
    return Fraction(math.pow(1 + age, -0.5)) if rule == "freshness" else Fraction(1)


def find_wrong_weight(claims: list[Claim], weights: list[float], rule: str) -> str | None:
    """What is wrong with the planned weights, given what everybody claims and the manifest's rule."""
    if not claims:
        return None
    raw = [Fraction(max(one[0], 1) ** 2, max(one[1], 1)) * _factor(one, rule) for one in claims]
    ordered = sorted(raw)
    middle = len(ordered) // 2
    median = ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
    capped = [min(claim, 2 * median) for claim in raw]
    if len(capped) >= 4:
        capped = _cap_at_quarter(capped)
    floor = max(capped) / 2**20
    capped = [max(claim, floor) for claim in capped]
    total = sum(capped)
    for index, (claim, weight) in enumerate(zip(capped, weights, strict=True)):
        expected = float(claim / total)
        if abs(weight - expected) > 1e-6 * expected:
            return f"member {index} weighs {weight}, not {expected}"
    if len(weights) >= 4 and max(weights) > 0.25 * (1 + 1e-6):
        return f"a member weighs {max(weights)} of {len(weights)}"
    return None


def _cap_at_quarter(claims: list[Fraction]) -> list[Fraction]:
    """Lower the largest until none holds more than a quarter of the whole."""
    descending = sorted(claims, reverse=True)
    for capped in range(4):
        rest = sum(descending[capped:], Fraction(0))
        level = rest / (4 - capped) if capped else descending[0]
        if capped == 0 and 4 * level <= rest:
            return claims
        if capped and descending[capped] <= level:
            return [min(claim, level) for claim in claims]
    raise AssertionError("three capped members leave a quarter to the rest")
