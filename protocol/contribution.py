"""A peer's own side of the update: freeze the pseudo-gradient, encode it with error feedback, settle it when certified.

The pseudo-gradient is always anchored at the current certified base (Decoupled DiLoCo, arXiv 2604.21428): base minus
local parameters, so work that missed a round is carried by the next contribution.

Invariant: decode(encoded) + residual' = produced, to the bit, and residual' replaces the residual only for the parts
that were certified with this peer.
"""

import math
from dataclasses import dataclass

import numpy as np
from blake3 import blake3

from shoal.protocol.aggregators import squared_norm
from shoal.protocol.codecs import CODECS, Float32s, encode_with_feedback, is_encodable
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
    encoded: tuple[bytes, ...]
    digests: tuple[bytes, ...]
    root: bytes
    norm: float
    residual_next: Float32s


class Contributor:
    """The residual of error feedback, float32[D], and what may be done with it. `freeze` is CPU-heavy and touches
    nothing that `settle` changes except by reading: never run the two at once."""

    def __init__(self, manifest: Manifest, residual: Float32s | None = None) -> None:
        self._manifest = manifest
        self._codec = CODECS[manifest.rounds.codec]
        elements = manifest.layout.elements
        self.residual: Float32s = np.zeros(elements, dtype=np.float32) if residual is None else residual
        assert self.residual.shape == (elements,), "one residual for every element"

    def freeze(self, round_number: int, base: Float32s, local: Float32s) -> Frozen:
        """Encode base - local plus the residual; raises NonFiniteContribution."""
        encoded: list[bytes] = []
        residual_next = np.empty_like(self.residual)
        square = 0.0
        for part in range(self._manifest.parts):
            first, end = self._manifest.part_range(part)
            delta = base[first:end] - local[first:end]
            if not is_encodable(delta):
                problem = f"part {part} of the pseudo-gradient of round {round_number} is not finite or has exploded"
                raise NonFiniteContribution(problem)
            square += squared_norm(delta)
            residual = self.residual[first:end]
            encoded.append(bytes(encode_with_feedback(self._codec, delta, residual, residual_next[first:end])))
        digests = tuple(blake3(raw).digest() for raw in encoded)
        return Frozen(
            round=round_number,
            encoded=tuple(encoded),
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
        for part in included:
            first, end = self._manifest.part_range(part)
            self.residual[first:end] = frozen.residual_next[first:end]
        return included

    def clear(self) -> None:
        """Forget the residual: after restarting from the base it belongs to parameters that are gone."""
        self.residual.fill(0.0)
