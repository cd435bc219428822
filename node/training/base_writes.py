"""The memory that a daemon shares with its trainer, and how the trainer never takes a base that is half written.

Two rows of float32[D], `base` and `local`, and behind them a count of the base's writes, odd while the daemon writes,
and the round whose state the base is. A trainer reads at an even count, and once more where the count is another one
afterwards. That happens to one that is slower than a whole round; for all others nothing is copied or waited for, and
the daemon never waits for a trainer.

Invariant: what `BaseWrites.read` has returned from was read from one whole base.
"""

import mmap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

POLL_S = 0.001
_COUNTS = 2
_COUNTS_BYTES = _COUNTS * np.dtype(np.uint64).itemsize

FloatRows = NDArray[np.float32]


class WriterGone(Exception):
    """The daemon has gone in the middle of a base. With `is_torn` some of it was taken, else nothing was."""

    def __init__(self, *, is_torn: bool) -> None:
        super().__init__("the daemon is gone, in the middle of a new base")
        self.is_torn = is_torn


def _rest() -> bool:
    time.sleep(POLL_S)
    return True


class BaseWrites:
    """The count and the round, uint64[2]; without them, those of a base that nobody writes. `rest` waits a moment for
    the writer; it returns False where that one is gone. `round` is that of the base that `read` has last read."""

    def __init__(self, counts: NDArray[np.uint64] | None = None, rest: Callable[[], bool] = _rest) -> None:
        self._counts = np.zeros(_COUNTS, np.uint64) if counts is None else counts
        self._rest = rest
        self.round = 0

    @contextmanager
    def writing(self) -> Iterator[Callable[[int], None]]:
        """The daemon writes the base meanwhile, and says of which round it is. Only one may, at a time."""
        assert not self._counts[0] % 2, "one writer"
        self._counts[0] += 1
        try:
            yield self._name
        finally:
            self._counts[0] += 1

    def _name(self, round: int) -> None:
        self._counts[1] = round

    def read(self, take: Callable[[], None], again: Callable[[], None] | None = None) -> bool:
        """Take something of the base. Where that was written meanwhile do `again`, or the same once more, until it was
        not; False where that was so. Raises WriterGone."""
        found = self._settle(is_torn=False)
        take()
        self.round = int(self._counts[1])
        whole = True
        while self._counts[0] != found:
            whole = False
            found = self._settle(is_torn=True)
            (take if again is None else again)()
            self.round = int(self._counts[1])
        return whole

    def _settle(self, *, is_torn: bool) -> int:
        """The count while nobody writes."""
        while (count := int(self._counts[0])) % 2:
            if not self._rest():
                raise WriterGone(is_torn=is_torn)
        return count


def measure_memory(elements: int) -> int:
    """How many bytes the memory has for so many parameters."""
    return 2 * elements * np.dtype(np.float32).itemsize + _COUNTS_BYTES


def map_memory(descriptor: int, rest: Callable[[], bool] = _rest) -> tuple[FloatRows, BaseWrites]:
    """The rows of the whole memory behind a descriptor, float32[2, D], and the counts. Raises OSError."""
    shared = mmap.mmap(descriptor, 0)
    counts = np.frombuffer(shared, dtype=np.uint64, offset=len(shared) - _COUNTS_BYTES)
    rows = np.frombuffer(shared, dtype=np.float32, count=(len(shared) - _COUNTS_BYTES) // 4).reshape(2, -1)
    return rows, BaseWrites(counts, rest)
