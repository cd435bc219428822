"""Cut a failing run's faults down to few that still break the same invariant (Zeller and Hildebrandt, "Simplifying and
Isolating Failure-Inducing Input", 2002).
"""

from collections.abc import Callable, Sequence

from shoal.protocol.errors import ShoalError
from tests.sim.checkers import InvariantBroken
from tests.sim.world import Outcome, World

RUNS_MAX = 120
# A core that trips over itself fails as surely as one that breaks an invariant.
FAILURES = (AssertionError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError, ShoalError)

Indices = tuple[int, ...]


def run_seed(seed: int, chosen: Sequence[int] | None = None) -> tuple[World, Outcome | BaseException]:
    """Run a seed, with all of its faults or with the chosen ones; the world, and how it ended."""
    world = World(seed)
    if chosen is not None:
        world = World(seed, faults=[world.faults[index] for index in chosen])
    try:
        return world, world.run()
    except FAILURES as error:
        return world, error


def name_failure(error: BaseException) -> str:
    """What two failures must share to be taken for the same."""
    return error.name if isinstance(error, InvariantBroken) else type(error).__name__


def shrink_seed(seed: int, name: str) -> Indices:
    """Indices of faults of this seed that suffice for the failure `name`."""

    def fails(chosen: Indices) -> bool:
        _, end = run_seed(seed, chosen)
        return isinstance(end, BaseException) and name_failure(end) == name

    return shrink(tuple(range(len(World(seed).faults))), fails, RUNS_MAX)


def shrink(indices: Indices, fails: Callable[[Indices], bool], runs_max: int) -> Indices:
    """Delta debugging: a subset that fails; no smaller one was found in `runs_max` runs."""
    pieces = 2
    runs = 0
    if fails(()):
        return ()
    while len(indices) > 1:
        size = -(-len(indices) // pieces)
        for start in range(0, len(indices), size):
            rest = indices[:start] + indices[start + size :]
            runs += 1
            if runs > runs_max:
                return indices
            if rest and fails(rest):
                indices, pieces = rest, max(2, pieces - 1)
                break
        else:
            if size == 1:
                return indices
            pieces = min(len(indices), 2 * pieces)
    return indices
