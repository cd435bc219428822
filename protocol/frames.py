"""The header in front of everything that crosses a tensor link: 64 bytes, little-endian, one layout for all kinds.

A frame is one header and, for the kinds that carry one, a payload of exactly `nbytes` raw bytes. The kinds are a closed
set; what each may carry stands in one table, so that a length is refused before anything is allocated for it.

Invariants: `decode_header_untrusted` raises nothing but ProtocolError, and whatever it returns encodes back to the
same 64 bytes; no header announces more than `PAYLOAD_BYTES_MAX` of its kind.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from types import MappingProxyType

from shoal.protocol.errors import ProtocolError, Refusal

FRAME_MAGIC = b"SHFR"
FRAME_VERSION = 1
HEADER_BYTES = 64
DIGEST_BYTES = 32
PART_BYTES_MAX = 8 * 1024 * 1024
BLOB_BYTES_MAX = 8 * 1024 * 1024
ROUND_MAX = 2**63 - 1
REQUEST_MAX = 2**32 - 1
NO_DIGEST = bytes(DIGEST_BYTES)

# magic, version, kind, refusal code, request, attempt, part, nbytes, round, digest
_LAYOUT = struct.Struct("<4sBBHIIIIQ32s")
assert _LAYOUT.size == HEADER_BYTES


class FrameKind(IntEnum):
    """What a frame is for; the number is what stands on the wire."""

    CONTRIBUTION = 1  # a sender's encoded part, to the part's owner
    RESULT = 2  # an owner's encoded aggregated part
    FETCH = 3  # asks for the blob with this digest and exactly `nbytes` bytes
    BLOB = 4  # the answer to FETCH that carries the bytes
    MISSING = 5  # the answer to FETCH: not here
    REFUSED = 6  # the answer to any frame with a payload, or to FETCH: `refusal` says why
    PING = 7
    PONG = 8
    ABANDON = 9  # the rest of the payload in progress will not come
    GOODBYE = 10  # nothing new will come on this link; with a `refusal`, nothing more is accepted either


@dataclass(frozen=True, slots=True)
class _Shape:
    """What a kind may carry."""

    announced_bytes_max: int = 0
    has_payload: bool = False
    request: bool | None = None  # must there be one; None: either
    refusal: bool | None = False


_SHAPES: Mapping[FrameKind, _Shape] = {
    FrameKind.CONTRIBUTION: _Shape(PART_BYTES_MAX, has_payload=True, request=False),
    FrameKind.RESULT: _Shape(PART_BYTES_MAX, has_payload=True, request=False),
    FrameKind.FETCH: _Shape(BLOB_BYTES_MAX, request=True),
    FrameKind.BLOB: _Shape(BLOB_BYTES_MAX, has_payload=True, request=True),
    FrameKind.MISSING: _Shape(request=True),
    FrameKind.REFUSED: _Shape(refusal=True),
    FrameKind.PING: _Shape(request=True),
    FrameKind.PONG: _Shape(request=True),
    FrameKind.ABANDON: _Shape(request=False),
    FrameKind.GOODBYE: _Shape(request=False, refusal=None),
}

# Bytes that may follow a header of this kind.
PAYLOAD_BYTES_MAX: Mapping[FrameKind, int] = MappingProxyType(
    {kind: shape.announced_bytes_max if shape.has_payload else 0 for kind, shape in _SHAPES.items()}
)

# A refusal's code is its place in the enum, which only ever grows at its end; 0 means none.
_REFUSALS = (None, *Refusal)
_CODES = {refusal: code for code, refusal in enumerate(_REFUSALS)}


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameHeader:
    """One frame's header.

    `nbytes` is the length of the payload and, in FETCH, of the blob asked for. `digest` is the BLAKE3 digest of those
    bytes. `request` pairs FETCH and PING with their answers; a pushed frame has none (0). An answer repeats round,
    attempt, part and digest of what it answers.
    """

    kind: FrameKind
    round: int = 0
    attempt: int = 0
    part: int = 0
    nbytes: int = 0
    digest: bytes = NO_DIGEST
    request: int = 0
    refusal: Refusal | None = None

    @property
    def payload_bytes(self) -> int:
        """How many bytes follow this header."""
        return self.nbytes if _SHAPES[self.kind].has_payload else 0


def encode_header(header: FrameHeader) -> bytes:
    """The 64 bytes of a header that keeps the rules of its kind (a broken rule is a programmer error)."""
    problem = _find_problem(header)
    assert problem is None, f"{header.kind.name}: {problem[1] if problem else ''}"
    return _LAYOUT.pack(
        FRAME_MAGIC,
        FRAME_VERSION,
        header.kind,
        _CODES[header.refusal],
        header.request,
        header.attempt,
        header.part,
        header.nbytes,
        header.round,
        header.digest,
    )


def decode_header_untrusted(raw: bytes | memoryview) -> FrameHeader:
    """The header in `raw`, 64 bytes; raises ProtocolError and nothing else."""
    if len(raw) != HEADER_BYTES:
        raise ProtocolError(Refusal.WRONG_LENGTH, f"a frame header of {len(raw)} bytes")
    magic, version, kind, code, request, attempt, part, nbytes, round_, digest = _LAYOUT.unpack(raw)
    if magic != FRAME_MAGIC:
        raise ProtocolError(Refusal.MALFORMED, "not a frame header")
    if version != FRAME_VERSION:
        raise ProtocolError(Refusal.WRONG_VERSION, f"frame version {version}, we speak {FRAME_VERSION}")
    try:
        kind = FrameKind(kind)
    except ValueError as error:
        raise ProtocolError(Refusal.UNKNOWN_TYPE, f"frame kind {kind}") from error
    if code >= len(_REFUSALS):
        raise ProtocolError(Refusal.MALFORMED, f"refusal code {code}")
    header = FrameHeader(
        kind=kind,
        round=round_,
        attempt=attempt,
        part=part,
        nbytes=nbytes,
        digest=digest,
        request=request,
        refusal=_REFUSALS[code],
    )
    problem = _find_problem(header)
    if problem is not None:
        raise ProtocolError(problem[0], f"{kind.name}: {problem[1]}")
    return header


def _find_problem(header: FrameHeader) -> tuple[Refusal, str] | None:
    shape = _SHAPES[header.kind]
    if header.nbytes > shape.announced_bytes_max:
        return Refusal.OVERSIZED, f"{header.nbytes} bytes, at most {shape.announced_bytes_max}"
    if shape.announced_bytes_max and not header.nbytes:
        return Refusal.WRONG_LENGTH, "an empty payload"
    if header.round > ROUND_MAX:
        return Refusal.OUT_OF_RANGE, f"round {header.round}"
    if shape.request is not None and shape.request != bool(header.request):
        return Refusal.MALFORMED, f"request {header.request}"
    if shape.refusal is not None and shape.refusal != (header.refusal is not None):
        return Refusal.MALFORMED, f"refusal {header.refusal}"
    return None
