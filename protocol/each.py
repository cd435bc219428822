"""How work that falls into independent pieces is done: by `map`, or by a shell's threads.

Invariant: whatever is used, results come in the order of the pieces, so that what is made of them has the same bits.
"""

from collections.abc import Callable, Iterable
from typing import Protocol, TypeVar

T = TypeVar("T")


class Each(Protocol):
    """As the built-in `map`: what `work` returns for each of `pieces`, in their order; raises what `work` raises."""

    def __call__(self, work: Callable[[int], T], pieces: Iterable[int], /) -> Iterable[T]: ...
