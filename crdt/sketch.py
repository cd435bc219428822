"""A sketch of a set: a table much smaller than the set, from which with another's sketch their difference can be read.

An invertible Bloom lookup table (Goodrich and Mitzenmacher, 2011; for reconciliation Eppstein et al., "What's the
difference?", SIGCOMM 2011). Each item, a 48-bit short id, is added to one cell of each of HASHES rows. Subtracting the
other side's cells leaves the difference; a cell with one item left shows that item, and so the others are laid open
one after the other. Where that ends early the sketch was too small, and the spread of its counts tells about by how
much (as in Alon, Matias and Szegedy, 1996).

Short ids and places depend on a salt that is drawn anew for every conversation. An author who wants two entries to
have one short id, or many to meet in few cells, would have to know it before it writes them. Two entries of one short
id are an accident of one in 2^48; a cell with several items passes for one with a single item in fewer than one of 2^16
cases, which mostly is found out at the end, when not all cells are empty. What either may do is to have an entry sent
twice, or only after the next conversation, which has another salt.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from blake3 import blake3

from shoal.crdt.kinds import EntryId
from shoal.protocol.errors import ProtocolError, Refusal

SHORT_ID_BYTES = 6
SALT_BYTES = 8
HASHES = 4
CELL_BYTES = 9
CELLS_MIN = 2 * HASHES
_CHECK_BITS = 16
_VALUE_BYTES = CELL_BYTES - 1
_PLACE_BITS = 20
_CELLS_LIMIT: int = HASHES * 2**_PLACE_BITS
_MASK = 2**128 - 1


def shorten(salt: bytes, entry_id: EntryId) -> bytes:
    """The short id of an entry under this salt."""
    return blake3(salt + entry_id).digest(SHORT_ID_BYTES)


def count_cells(differences: float) -> int:
    """How many cells show so many differences in all but one or two of a hundred cases (by trial)."""
    return round_cells(1.35 * differences + 2.5 * math.sqrt(differences) + 5)


def round_cells(cells: float) -> int:
    """The next number of cells that makes whole rows."""
    return max(CELLS_MIN, HASHES * math.ceil(cells / HASHES))


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """What only one side has, as short ids."""

    own: frozenset[bytes]
    others: frozenset[bytes]


class Sketch:
    """The cells of one set."""

    def __init__(self, salt: bytes, cells: int) -> None:
        assert cells % HASHES == 0 and CELLS_MIN <= cells < _CELLS_LIMIT, "whole rows"
        self._row = cells // HASHES
        # Odd, and unknown to whoever wrote the entries.
        self._multiplier = int.from_bytes(blake3(salt).digest(16), "big") | 1
        self._values = [0] * cells
        self._counts = [0] * cells

    def __len__(self) -> int:
        return len(self._values)

    def add(self, short_ids: Iterable[bytes]) -> None:
        """Put items in, none that is in already."""
        values, counts = self._values, self._counts
        for short_id in short_ids:
            value, cells = self._place(int.from_bytes(short_id, "big"))
            for cell in cells:
                values[cell] ^= value
                counts[cell] += 1

    def encode(self) -> bytes:
        """CELL_BYTES for each cell: ids and checks added bit by bit, and the lowest byte of the count."""
        cells = zip(self._values, self._counts, strict=True)
        return b"".join(value.to_bytes(_VALUE_BYTES, "big") + bytes((count & 0xFF,)) for value, count in cells)

    def subtract(self, encoded: bytes) -> "SketchDifference":
        """What is left without the other side's cells; raises ProtocolError unless these are as many."""
        if len(encoded) != CELL_BYTES * len(self):
            raise ProtocolError(Refusal.WRONG_LENGTH, f"{len(encoded)} bytes for {len(self)} cells")
        starts = range(0, len(encoded), CELL_BYTES)
        others = (int.from_bytes(encoded[start : start + _VALUE_BYTES], "big") for start in starts)
        counts = encoded[_VALUE_BYTES::CELL_BYTES]
        return SketchDifference(
            sketch=self,
            values=[own ^ other for own, other in zip(self._values, others, strict=True)],
            counts=[(own - other) & 0xFF for own, other in zip(self._counts, counts, strict=True)],
        )

    def locate(self, value: int) -> tuple[int, int, int, int] | None:
        """The cells of the one item that a cell with this value holds, or None if it does not hold just one."""
        expected, cells = self._place(value >> _CHECK_BITS)
        return cells if expected == value else None

    def _place(self, item: int) -> tuple[int, tuple[int, int, int, int]]:
        """What is added for `item`, with its check, and one cell in each row. Written out: it is most of the cost."""
        row = self._row
        mixed = item * self._multiplier & _MASK
        cells = (
            (mixed >> 92 & 0xFFFFF) * row >> _PLACE_BITS,
            row + ((mixed >> 72 & 0xFFFFF) * row >> _PLACE_BITS),
            2 * row + ((mixed >> 52 & 0xFFFFF) * row >> _PLACE_BITS),
            3 * row + ((mixed >> 32 & 0xFFFFF) * row >> _PLACE_BITS),
        )
        return item << _CHECK_BITS | mixed >> 112, cells


class SketchDifference:
    """The cells of two sets' difference; counts are modulo 256."""

    def __init__(self, *, sketch: Sketch, values: list[int], counts: list[int]) -> None:
        self._sketch = sketch
        self._values = values
        self._counts = counts

    def estimate(self, surplus: int) -> float:
        """About how many items differ, where this side has `surplus` more than the other."""
        row = len(self._values) // HASHES
        mean = surplus / row
        middle = round(mean)
        # Counts scatter around their mean by far less than the 128 that a byte can tell.
        deviations = (((count - middle + 128) & 0xFF) - 128 + middle - mean for count in self._counts)
        scattered = sum(deviation * deviation for deviation in deviations) / (HASHES * (1 - 1 / row))
        return max(abs(surplus), scattered)

    def read(self) -> Difference | None:
        """The whole difference, or None where the sketch does not show it."""
        values, counts = list(self._values), list(self._counts)
        found: dict[int, set[bytes]] = {1: set(), 0xFF: set()}
        open_cells = list(range(len(values)))
        steps_left = len(values)
        while open_cells:
            at = open_cells.pop()
            value, count = values[at], counts[at]
            if count not in found:
                continue
            cells = self._sketch.locate(value)
            if cells is None or at not in cells:
                continue
            if not steps_left:
                return None
            steps_left -= 1
            found[count].add((value >> _CHECK_BITS).to_bytes(SHORT_ID_BYTES, "big"))
            for cell in cells:
                values[cell] ^= value
                counts[cell] = (counts[cell] - count) & 0xFF
                open_cells.append(cell)
        if any(values) or any(counts):
            return None
        return Difference(own=frozenset(found[1]), others=frozenset(found[0xFF]))
