"""The replicated log's state machine: (parameters, outer momentum) at round r from r-1 and one certified update.

Invariant (the one idea of the design): the state at round r is a pure function of the manifest and the certified
updates 1..r, the same bits on every machine; `state_root` names it.
"""

from collections.abc import Mapping

import numpy as np

from shoal.protocol.aggregators import AGGREGATORS, Reduction, WeightedPart, squared_norm
from shoal.protocol.codecs import BLOCK_ELEMENTS, CODECS, Float32s, encode_with_feedback
from shoal.protocol.layout import initialise
from shoal.protocol.manifest import Manifest
from shoal.protocol.messages import Result
from shoal.protocol.outer_step import OUTER_OPTIMIZERS
from shoal.protocol.state import SnapshotIndex, chunk_digests


def make_reduction(manifest: Manifest) -> Reduction:
    """How this swarm reduces a part."""
    codec = CODECS[manifest.rounds.codec]
    return Reduction(codec_in=codec, aggregator=AGGREGATORS[manifest.rounds.aggregator], codec_out=codec)


def rehearse(manifest: Manifest) -> None:
    """Run once, on a few values, what a round of this swarm computes, so that no round waits for kernels that are
    compiled or loaded at their first use."""
    reduction, zeros = make_reduction(manifest), np.zeros(BLOCK_ELEMENTS + 1, np.float32)
    squared_norm(zeros)
    encoded = encode_with_feedback(reduction.codec_in, zeros, zeros, zeros.copy())
    update = reduction.reduce_part([WeightedPart(encoded=encoded, weight=1.0)], zeros.size)
    reduction.codec_out.decode_untrusted(update, zeros.size, zeros)
    outer = manifest.outer
    OUTER_OPTIMIZERS[outer.optimizer].apply(zeros.copy(), zeros.copy(), zeros, outer.learning_rate, outer.momentum)


class Replica:
    """One peer's copy of the global state. The vectors may be views of shared memory; they are changed in place."""

    def __init__(self, manifest: Manifest, params: Float32s, momentum: Float32s, round_number: int = 0) -> None:
        elements = manifest.layout.elements
        assert params.shape == momentum.shape == (elements,), "one value for every element of the layout"
        self._manifest = manifest
        self.params = params
        self.momentum = momentum
        self.round = round_number

    def reset(self) -> bytes:
        """Become round 0, as the manifest's seed gives it; returns the state root."""
        self.params[:] = initialise(self._manifest.layout, self._manifest.seed)
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
        outer = self._manifest.outer
        optimizer = OUTER_OPTIMIZERS[outer.optimizer]
        for part, one in enumerate(result.parts):
            first, end = self._manifest.part_range(part)
            update = np.empty(end - first, dtype=np.float32)
            codec.decode_untrusted(encoded[one.digest], end - first, update)
            params, momentum = self.params[first:end], self.momentum[first:end]
            optimizer.apply(params, momentum, update, outer.learning_rate, outer.momentum)
        self.round = result.round
        return self.root()

    def root(self) -> bytes:
        """The state root: BLAKE3 over round, size and all chunk digests. Reads both vectors."""
        return self.index().root

    def index(self) -> SnapshotIndex:
        """What a snapshot of this state consists of, chunk by chunk."""
        digests = chunk_digests(self.params) + chunk_digests(self.momentum)
        return SnapshotIndex(round=self.round, elements=self.params.size, digests=digests)
