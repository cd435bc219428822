"""The replicated log's state machine: (parameters, outer momentum) at round r from r-1 and one certified update.

Invariant (the one idea of the design): the state at round r is a pure function of the manifest and the certified
updates 1..r, the same bits on every machine; `state_root` names it.
"""

from collections.abc import Mapping

import numpy as np

from shoal.protocol.aggregators import AGGREGATORS, Reduction, WeightedPart, squared_norm
from shoal.protocol.codecs import BLOCK_ELEMENTS, CODECS, Float32s, encode_with_feedback
from shoal.protocol.each import Each
from shoal.protocol.errors import ProtocolError
from shoal.protocol.identity import PeerId
from shoal.protocol.layout import initialise
from shoal.protocol.manifest import Manifest
from shoal.protocol.messages import Result
from shoal.protocol.outer_step import OUTER_OPTIMIZERS
from shoal.protocol.quorum import find_share
from shoal.protocol.state import CHUNK_BYTES, SnapshotIndex, chunk_digests

# What is hashed in one piece: 16 MiB.
DIGEST_SPAN_ELEMENTS = 16 * CHUNK_BYTES // 4


def make_reduction(manifest: Manifest) -> Reduction:
    """How this swarm reduces a part."""
    rules = manifest.rounds
    return Reduction(
        codec_in=CODECS[rules.codec], aggregator=AGGREGATORS[rules.aggregator], codec_out=CODECS[rules.codec_out]
    )


def rehearse(manifest: Manifest) -> None:
    """Run once, on a few values, what a round of this swarm computes, so that no round waits for kernels that are
    compiled or loaded at their first use."""
    reduction, zeros = make_reduction(manifest), np.zeros(BLOCK_ELEMENTS + 1, np.float32)
    squared_norm(zeros)
    encoded = encode_with_feedback(reduction.codec_in, zeros, zeros, zeros.copy())
    update = reduction.reduce_part([WeightedPart(encoded=encoded, weight=1.0)], zeros.size)
    reduction.codec_out.decode_untrusted(update, zeros.size, zeros)
    OUTER_OPTIMIZERS[manifest.outer.optimizer].apply(zeros.copy(), zeros.copy(), zeros, manifest.outer_rates(1))


def find_gain(manifest: Manifest, result: Result, peer: PeerId) -> float:
    """How far the base has moved with this result for each unit of this peer's pseudo-gradient: by a plain mean. 0 for
    a peer that contributed nothing, and of what was clipped or left out by the aggregator it is an estimate."""
    rates = manifest.outer_rates(result.round)
    return find_share(result, peer) * OUTER_OPTIMIZERS[manifest.outer.optimizer].gain(rates)


class Replica:
    """One peer's copy of the global state. The vectors may be views of shared memory; they are changed in place. `each`
    may work on several pieces of them at once."""

    def __init__(
        self, manifest: Manifest, params: Float32s, momentum: Float32s, round_number: int = 0, each: Each = map
    ) -> None:
        elements = manifest.layout.elements
        assert params.shape == momentum.shape == (elements,), "one value for every element of the layout"
        self._manifest = manifest
        self._each = each
        self.params = params
        self.momentum = momentum
        self.round = round_number

    def reset(self) -> bytes:
        """Become round 0, as the manifest's seed gives it; returns the state root."""
        initialise(self._manifest.layout, self._manifest.seed, self.params)
        self.momentum.fill(0.0)
        self.round = 0
        return self.root()

    def apply(self, result: Result, encoded: Mapping[bytes, bytes | memoryview]) -> bytes:
        """Run the outer step with a certified result, whose parts are in `encoded` by digest; the new state root.

        Raises ProtocolError when a part does not decode: then the state is half changed and must be rebuilt from a
        snapshot. That cannot happen to a certified update unless a quorum lied.
        """
        assert result.round == self.round + 1, "updates are applied in the order of the log"
        codec = CODECS[result.codec]
        optimizer, rates = OUTER_OPTIMIZERS[self._manifest.outer.optimizer], self._manifest.outer_rates(result.round)
        parts = self._manifest.list_parts(result.round)

        def apply_part(part: int) -> ProtocolError | None:
            first, end = self._manifest.part_range(parts[part])
            update = np.empty(end - first, np.float32)
            try:
                codec.decode_untrusted(encoded[result.parts[part].digest], end - first, update)
            except ProtocolError as error:
                return error
            optimizer.apply(self.params[first:end], self.momentum[first:end], update, rates)
            return None

        # Nothing writes to the vectors any more when this raises.
        faults = [error for error in list(self._each(apply_part, range(len(result.parts)))) if error is not None]
        if faults:
            raise faults[0]
        self.round = result.round
        return self.root()

    def root(self) -> bytes:
        """The state root: BLAKE3 over round, size and all chunk digests. Reads both vectors."""
        return self.index().root

    def index(self) -> SnapshotIndex:
        """What a snapshot of this state consists of, chunk by chunk."""
        spans = range(0, self.params.size, DIGEST_SPAN_ELEMENTS)

        def digest_span(piece: int) -> bytes:
            vector = self.params if piece < len(spans) else self.momentum
            start = spans[piece % len(spans)]
            return chunk_digests(vector[start : start + DIGEST_SPAN_ELEMENTS])

        digests = b"".join(self._each(digest_span, range(2 * len(spans))))
        return SnapshotIndex(round=self.round, elements=self.params.size, digests=digests)
