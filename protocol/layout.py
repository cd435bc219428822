"""The model's layout: which tensors the flat parameter vector holds, in which order, and how it starts.

The layout stands in the manifest, so that a daemon without torch can slice, hash and initialise the global state.

Invariants: no Layout exists that is empty, repeats a name or exceeds a bound here; `initialise` gives the same bits on
every machine: it draws integers from Philox (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011; numpy
keeps its stream fixed, NEP 19) and uses only conversions and multiplications that IEEE 754 rounds in one way, no libm.
"""

import math
from dataclasses import dataclass
from itertools import accumulate
from typing import Annotated

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from shoal.protocol.errors import ManifestError
from shoal.protocol.wire import U63, Bound, Choice, encode_record

TENSORS_MAX = 1024
NAME_BYTES_MAX = 128
DIMENSIONS_MAX = 8
ELEMENTS_MAX = 2**33
STD_MAX = 1000.0

ZEROS = "zeros"
ONES = "ones"
UNIFORM = "uniform"

# A uniform variable on (-a, a) has the standard deviation a / sqrt(3).
_SQRT_3 = 1.7320508075688772
_WORDS_PER_DRAW = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One tensor, row-major. `std` is the standard deviation of "uniform" (symmetric about 0), and 0.0 for the rest."""

    name: Annotated[str, Bound(1, NAME_BYTES_MAX)]
    shape: Annotated[tuple[Annotated[int, Bound(1, ELEMENTS_MAX)], ...], Bound(1, DIMENSIONS_MAX)]
    init: Annotated[str, Choice((ZEROS, ONES, UNIFORM))] = ZEROS
    std: Annotated[float, Bound(0.0, STD_MAX)] = 0.0

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def is_hidden(self) -> bool:
        """Whether this is a weight between two hidden layers: two dimensions or more, in one of the model's numbered
        layers, as "blocks.3.mlp_in.weight" is. Embeddings and heads stand outside of these, and a shape does not tell
        them from the others."""
        return len(self.shape) >= 2 and any(piece.isdecimal() for piece in self.name.split("."))


class _Counted:
    """What is asked of a layout for each part that comes and goes, and costs a look at every tensor."""

    __slots__ = ("_elements",)
    _elements: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout(_Counted):
    """The tensors of the flat vector, one after the other without gaps. Raises ValueError where they break a bound;
    whoever builds one from a person's input calls `make_layout`."""

    tensors: Annotated[tuple[TensorSpec, ...], Bound(1, TENSORS_MAX)]

    def __post_init__(self) -> None:
        if fault := _find_fault(self.tensors):
            raise ValueError(f"{fault[0]} {fault[1]}")

    @property
    def elements(self) -> int:
        """D, the length of the flat vector."""
        try:
            return self._elements
        except AttributeError:  # nobody has asked; a copy has the fields alone, too
            object.__setattr__(self, "_elements", sum(spec.elements for spec in self.tensors))
            return self._elements

    @property
    def offsets(self) -> tuple[int, ...]:
        """The first element of every tensor in the flat vector."""
        return (0, *accumulate(spec.elements for spec in self.tensors[:-1]))

    @property
    def digest(self) -> bytes:
        """BLAKE3 of the canonical bytes, 32 bytes: a trainer and its daemon agree on the layout by this."""
        return blake3(encode_record(self)).digest()


def make_layout(tensors: tuple[TensorSpec, ...]) -> Layout:
    """The layout of a task's tensors; raises ManifestError naming the tensor and the field."""
    if fault := _find_fault(tensors):
        raise ManifestError(*fault)
    return Layout(tensors=tensors)


def initialise(layout: Layout, seed: U63, out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
    """The parameters of round 0, float32[D], in `out` or in new memory. Every tensor has a stream of its own, keyed by
    the seed and its name, so that its values do not depend on the tensors before it."""
    flat = np.empty(layout.elements, dtype=np.float32) if out is None else out
    assert flat.shape == (layout.elements,), "one place for every element"
    for spec, offset in zip(layout.tensors, layout.offsets, strict=True):
        target = flat[offset : offset + spec.elements]
        if spec.init == UNIFORM:
            _fill_uniform(target, spec, seed)
        else:
            target.fill(1.0 if spec.init == ONES else 0.0)
    return flat


def _fill_uniform(target: NDArray[np.float32], spec: TensorSpec, seed: int) -> None:
    key = blake3(seed.to_bytes(8, "big") + spec.name.encode(), derive_key_context="shoal layout initialise").digest(16)
    stream = np.random.Philox(key=int.from_bytes(key, "big"))
    scale = np.float32(spec.std * _SQRT_3)
    for first in range(0, target.size, 2 * _WORDS_PER_DRAW):
        chunk = target[first : first + 2 * _WORDS_PER_DRAW]
        words = stream.random_raw((chunk.size + 1) // 2).astype("<u8").view("<u4")[: chunk.size]
        # Odd integers between -(2^24 - 1) and 2^24 - 1: exact in float32, symmetric about 0, and so is the power of 2.
        odd = (words >> np.uint32(8)).astype(np.int32) * 2 - (2**24 - 1)
        np.multiply(odd.astype(np.float32), np.float32(2.0**-24), out=chunk)
        np.multiply(chunk, scale, out=chunk)


def _find_fault(tensors: tuple[TensorSpec, ...]) -> tuple[str, str, str] | None:
    """The first thing wrong: (field, problem, fix)."""
    if not 1 <= len(tensors) <= TENSORS_MAX:
        return "layout.tensors", f"has {len(tensors)} tensors", f"use 1 to {TENSORS_MAX}"
    names: set[str] = set()
    for spec in tensors:
        where = f"layout.{spec.name[:NAME_BYTES_MAX]}"
        if not 1 <= len(spec.name.encode()) <= NAME_BYTES_MAX:
            return f"{where}.name", f"has {len(spec.name.encode())} bytes", f"use 1 to {NAME_BYTES_MAX}"
        if spec.name in names:
            return f"{where}.name", "occurs twice", "give every tensor a name of its own"
        names.add(spec.name)
        if not 1 <= len(spec.shape) <= DIMENSIONS_MAX or min(spec.shape) < 1:
            return f"{where}.shape", f"is {spec.shape}", f"use 1 to {DIMENSIONS_MAX} dimensions of at least 1"
        if spec.init not in (ZEROS, ONES, UNIFORM):
            return f"{where}.init", f"is {spec.init!r}", f"use {ZEROS}, {ONES} or {UNIFORM}"
        low = 0.0 if spec.init != UNIFORM else math.ulp(0.0)
        high = 0.0 if spec.init != UNIFORM else STD_MAX
        if not low <= spec.std <= high:
            return f"{where}.std", f"is {spec.std}", f'use 0.0, or with "{UNIFORM}" above 0 and at most {STD_MAX}'
    if (elements := sum(spec.elements for spec in tensors)) > ELEMENTS_MAX:
        return "layout.tensors", f"have {elements} elements", f"use at most {ELEMENTS_MAX}"
    return None
