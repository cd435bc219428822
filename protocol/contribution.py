"""A peer's own side of the update: freeze the pseudo-gradient, encode it with error feedback, settle it when certified.

The pseudo-gradient is always anchored at the current certified base (Decoupled DiLoCo, arXiv 2604.21428): base minus
local parameters, so work that missed a round is carried by the next contribution.

Invariant: decode(encoded) + residual' = produced, to the bit, where produced is the pseudo-gradient and what the
manifest keeps of the residual; and residual' replaces the residual only for the parts that were certified with this
peer.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from blake3 import blake3

from shoal.protocol.aggregators import squared_norm
from shoal.protocol.codecs import CHUNK_ELEMENTS, CODECS, Float32s, add_residual, is_encodable, take_fresh
from shoal.protocol.each import Each
from shoal.protocol.errors import ShoalError
from shoal.protocol.manifest import Manifest
from shoal.protocol.messages import Result, contribution_root
from shoal.protocol.quorum import has_member


class NonFiniteContribution(ShoalError):
    """The pseudo-gradient has an infinity or a NaN in it; it is never encoded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Frozen:
    """An encoded contribution: immutable until its round is certified."""

    round: int
    encoded: tuple[memoryview, ...]  # one a part, read-only
    digests: tuple[bytes, ...]
    root: bytes
    norm: float
    residual_next: Float32s


class Contributor:
    """The residual of error feedback, float32[D], and what may be done with it. `freeze` is CPU-heavy and touches
    nothing that `settle` changes except by reading: never run the two at once."""

    def __init__(
        self,
        manifest: Manifest,
        residual: Float32s | None = None,
        take: Callable[[int], memoryview] = take_fresh,
        take_residual: Callable[[int], Float32s] | None = None,
        each: Each = map,
    ) -> None:
        """`take` gives memory of so many bytes for what is frozen, `take_residual` a vector of so many elements for
        what that leaves, by default from `take`, too; `each` may work on several parts at once."""
        self._manifest = manifest
        self._take = take
        self._take_residual = take_residual or (lambda count: np.frombuffer(take(4 * count), np.float32))
        self._each = each
        self._codec = CODECS[manifest.rounds.codec]
        self._kept = manifest.rounds.residual_kept
        elements = manifest.layout.elements
        self.residual: Float32s = np.zeros(elements, dtype=np.float32) if residual is None else residual
        assert self.residual.shape == (elements,), "one residual for every element"

    def freeze(self, round_number: int, base: Float32s, local: Float32s) -> Frozen:
        """Encode base - local plus the residual; raises NonFiniteContribution."""
        parts = self._manifest.list_parts(round_number)
        ranges = [self._manifest.part_range(part) for part in parts]
        encoded = [self._take(self._manifest.contribution_bytes(part)) for part in parts]
        residual_next = self._take_residual(self.residual.size)
        if len(parts) < self._manifest.parts:
            residual_next[:] = self.residual  # of what the round does not exchange it stays

        def freeze_part(part: int) -> tuple[float, bytes]:
            first, end = ranges[part]
            square, scratch = 0.0, np.empty(min(end - first, CHUNK_ELEMENTS), np.float32)
            # One chunk after the other, so that all passes but the first find it in the cache. The pseudo-gradient is
            # made where its residual will be.
            for low in range(first, end, CHUNK_ELEMENTS):
                high = min(low + CHUNK_ELEMENTS, end)
                delta = np.subtract(base[low:high], local[low:high], out=residual_next[low:high])
                if not is_encodable(delta):
                    which = f"part {parts[part]} of the pseudo-gradient of round {round_number}"
                    raise NonFiniteContribution(f"{which} is not finite or has exploded")
                square += squared_norm(delta)
                add_residual(delta, self.residual[low:high], self._kept, delta, scratch[: delta.size])
                self._codec.split_range(delta, end - first, low - first, encoded[part], scratch[: delta.size])
            return square, blake3(encoded[part]).digest()

        square = 0.0
        squares, digests = zip(*self._each(freeze_part, range(len(ranges))), strict=True)
        for one in squares:  # one after the other: `sum` rounds in its own way from Python 3.12 on
            square += one
        return Frozen(
            round=round_number,
            encoded=tuple(raw.toreadonly() for raw in encoded),
            digests=digests,
            root=contribution_root(digests),
            norm=math.sqrt(square),
            residual_next=residual_next,
        )

    def settle(self, frozen: Frozen, result: Result, index: int) -> tuple[int, ...]:
        """Take over the residual of the parts that were certified with roster member `index`; which parts those are.
        None, where the certificate counts another contribution of this peer: one that it made before a restart."""
        assert frozen.round == result.round, "a contribution is settled by its own round"
        if result.members[index].contribution_root != frozen.root:
            return ()
        included = tuple(part for part, one in enumerate(result.parts) if has_member(one.contributors, index))
        if len(included) == len(result.parts):
            self.residual = frozen.residual_next
        else:
            parts = self._manifest.list_parts(result.round)
            for part in included:
                first, end = self._manifest.part_range(parts[part])
                self.residual[first:end] = frozen.residual_next[first:end]
        return included

    def clear(self) -> None:
        """Forget the residual: after restarting from the base it belongs to parameters that are gone."""
        self.residual = np.zeros(self.residual.size, np.float32)
