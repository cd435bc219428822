"""The state root: one hash for the global state of a round, and the index by which a snapshot is fetched and checked.

The state is two float32 vectors of D elements, params and momentum. A chunk is CHUNK_BYTES of the little-endian bytes
of one of them (its last may be shorter). The root is a BLAKE3 hash over the round, D and the BLAKE3 digests of all
chunks.
protocol/README.md, "State root", gives the bytes.

Invariant: no chunk that an index with the right root lists can be forged, so that donors need no trust.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from shoal.protocol.errors import ProtocolError, Refusal
from shoal.protocol.wire import DELTA_BYTES_MAX, U63, Bound, decode_record_untrusted

CHUNK_BYTES = 1 << 20
DIGEST_BYTES = 32
ROOT_DOMAIN = b"shoal state root 1"

_ELEMENT_BYTES = 4
# An index travels in one control message; the rest of the bytes are for its own fields and for the envelope.
_ENVELOPE_BYTES = 512
CHUNKS_MAX = (DELTA_BYTES_MAX - _ENVELOPE_BYTES) // DIGEST_BYTES
# 4,088 MiB of params and as much of momentum.
STATE_ELEMENTS_MAX = CHUNKS_MAX // 2 * CHUNK_BYTES // _ELEMENT_BYTES


class StateVector(StrEnum):
    PARAMS = "params"
    MOMENTUM = "momentum"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkSpan:
    """Where a chunk lies: the bytes start .. stop of one vector."""

    vector: StateVector
    start: int
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotIndex:
    """The chunk digests of a snapshot, params first, 32 bytes each. Untrusted until `verify` has passed."""

    round: U63
    elements: Annotated[int, Bound(1, STATE_ELEMENTS_MAX)]
    digests: Annotated[bytes, Bound(2 * DIGEST_BYTES, CHUNKS_MAX * DIGEST_BYTES)]

    def __post_init__(self) -> None:
        expected = 2 * count_chunks(self.elements) * DIGEST_BYTES
        if len(self.digests) != expected:
            raise ValueError(f"{self.elements} elements take {expected} bytes of digests, not {len(self.digests)}")

    @property
    def chunks(self) -> int:
        """How many chunks both vectors have together; they are numbered from 0, params first."""
        return len(self.digests) // DIGEST_BYTES

    @property
    def root(self) -> bytes:
        half = len(self.digests) // 2
        return state_root(self.round, self.elements, self.digests[:half], self.digests[half:])

    def verify(self, root: bytes) -> None:
        """Raise ProtocolError(WRONG_DIGEST) unless this is the index of the state with this root."""
        if self.root != root:
            raise ProtocolError(Refusal.WRONG_DIGEST, f"index of round {self.round} has not root {root.hex()[:16]}")

    def digest(self, number: int) -> bytes:
        """By this a chunk is asked for."""
        assert 0 <= number < self.chunks, f"no chunk {number}"
        return self.digests[number * DIGEST_BYTES : (number + 1) * DIGEST_BYTES]

    def span(self, number: int) -> ChunkSpan:
        """Which bytes of which vector are chunk `number`."""
        assert 0 <= number < self.chunks, f"no chunk {number}"
        momentum, position = divmod(number, self.chunks // 2)
        start = position * CHUNK_BYTES
        stop = min(start + CHUNK_BYTES, self.elements * _ELEMENT_BYTES)
        return ChunkSpan(vector=StateVector.MOMENTUM if momentum else StateVector.PARAMS, start=start, stop=stop)

    def check_chunk_untrusted(self, number: int, raw: bytes | bytearray | memoryview) -> None:
        """Raise ProtocolError unless `raw` is chunk `number`; write it to the vector only after this."""
        span = self.span(number)
        if memoryview(raw).nbytes != span.stop - span.start:
            detail = f"chunk {number} has {memoryview(raw).nbytes} bytes, not {span.stop - span.start}"
            raise ProtocolError(Refusal.WRONG_LENGTH, detail)
        if blake3(raw).digest() != self.digest(number):
            raise ProtocolError(Refusal.WRONG_DIGEST, f"chunk {number} is not what the index lists")


def decode_index_untrusted(raw: bytes | memoryview) -> SnapshotIndex:
    """The index in a snapshot answer; raises ProtocolError. Call `verify` with a certified root before using it."""
    return decode_record_untrusted(SnapshotIndex, raw, DELTA_BYTES_MAX)


def count_chunks(elements: int) -> int:
    """How many chunks one vector of this length has."""
    return -(-elements * _ELEMENT_BYTES // CHUNK_BYTES)


def chunk_digests(vector: NDArray[np.float32]) -> bytes:
    """The digests of a vector's chunks, 32 bytes each. A slice that starts at a multiple of CHUNK_BYTES gives the same
    digests as the whole does there, so that threads can share the work: BLAKE3 releases the interpreter lock."""
    assert vector.dtype == np.float32 and vector.ndim == 1 and vector.flags.c_contiguous, "contiguous float32[n]"
    raw = vector.astype("<f4", copy=False).data.cast("B")
    return b"".join(blake3(raw[start : start + CHUNK_BYTES]).digest() for start in range(0, raw.nbytes, CHUNK_BYTES))


def state_root(round_number: int, elements: int, params_digests: bytes, momentum_digests: bytes) -> bytes:
    """The 32-byte root of the state after this round, from `chunk_digests` of its two vectors."""
    assert len(params_digests) == len(momentum_digests) == count_chunks(elements) * DIGEST_BYTES, (
        "digests of all chunks"
    )
    head = ROOT_DOMAIN + round_number.to_bytes(8, "big") + elements.to_bytes(8, "big")
    return blake3(head + params_digests + momentum_digests).digest()
