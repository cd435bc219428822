"""Bugs that are planted on purpose: switches of the test tree, to prove that the simulator bites.

A bug is a function that patches production code or a duty of the simulated shell; `planted` switches one on for a
while. Where they stand: planted_votes.py, planted_exchange.py, planted_state.py.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from tests.sim import signatures


class Arena(StrEnum):
    """Where a bug is looked for."""

    WORLD = "world"  # tests.sim.world: machines and networks that fail
    STORM = "storm"  # the world with every kind of fault at once
    LIARS = "liars"  # the world with a member that lies in every way
    SCHEDULE = "schedule"  # tests.sim.schedules: any order of events
    DRILL = "drill"  # tests.sim.drills: one death in a world without chance
    HASH_SEEDS = "hash seeds"  # one seed of the world in two processes: their traces must be one


@dataclass(frozen=True, slots=True, kw_only=True)
class Bug:
    """`wrong` says what the planted code does; `seed` is the first that caught it, to be tried first; `by` is the
    invariant that broke there."""

    name: str
    wrong: str
    plant: "Callable[[Patches], None]"
    arena: Arena
    seed: int
    by: str


BUGS: dict[str, Bug] = {}


class Patches:
    """Attributes that are replaced until `undo`."""

    def __init__(self) -> None:
        self._old: list[tuple[object, str, object, bool]] = []

    def set(self, owner: object, name: str, new: object) -> None:
        """Replace one attribute of a class or a module."""
        self._old.append((owner, name, getattr(owner, name), name in vars(owner)))
        setattr(owner, name, new)

    def wrap(self, owner: object, name: str, around: Callable[..., Any]) -> None:
        """Replace a function by `around`, which gets the old one before its own arguments."""
        old = getattr(owner, name)
        self.set(owner, name, lambda *args, **kwargs: around(old, *args, **kwargs))

    def everywhere(self, old: Callable[..., Any], new: Callable[..., Any]) -> None:
        """Replace a function in every production module that knows it, and in none of the test tree."""
        for name, module in sorted(sys.modules.items()):
            if name.startswith("shoal."):
                for key in [key for key, value in vars(module).items() if value is old]:
                    self.set(module, key, new)

    def undo(self) -> None:
        for owner, name, old, is_own in reversed(self._old):
            if is_own:
                setattr(owner, name, old)
            else:
                delattr(owner, name)  # inherited


def bug(
    *, arena: Arena = Arena.WORLD, seed: int, by: str
) -> "Callable[[Callable[[Patches], None]], Callable[[Patches], None]]":
    """Register a planted bug: its name is the function's, what is wrong its docstring."""

    def register(plant: Callable[[Patches], None]) -> Callable[[Patches], None]:
        assert plant.__doc__, "a planted bug says what is wrong"
        BUGS[plant.__name__] = Bug(name=plant.__name__, wrong=plant.__doc__, plant=plant, arena=arena, seed=seed, by=by)
        return plant

    return register


@contextlib.contextmanager
def planted(one: Bug) -> Iterator[None]:
    """The bug is there."""
    signatures.install()  # first, so that what is put back are its stand-ins
    patches = Patches()
    try:
        one.plant(patches)
        yield
    finally:
        patches.undo()
