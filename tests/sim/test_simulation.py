"""The simulator in the test run: fixed seeds are clean and repeatable, and planted bugs are caught."""

import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from shoal.protocol.effects import Persist
from tests.sim.checkers import InvariantBroken
from tests.sim.peer import SimPeer
from tests.sim.world import World

SEEDS = range(700, 716)
SEEDS_TO_CATCH = 60


@pytest.mark.parametrize("seed", SEEDS)
def test_seed_breaks_no_invariant(seed: int) -> None:
    outcome = World(seed).run()
    assert outcome.rounds >= 3


def test_same_seed_same_trace_whatever_the_hash_seed() -> None:
    code = "from tests.sim.world import World; print(World(703).run().trace)"
    traces = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("0", "1")
    ]
    assert traces[0] == traces[1] != ""


def _catches() -> str:
    for seed in range(1, SEEDS_TO_CATCH):
        try:
            World(seed).run()
        except (InvariantBroken, AssertionError, KeyError) as error:
            return str(error) or type(error).__name__
    return ""


def _vote_without_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def forget(self: SimPeer, effect: Persist) -> None:
        self._resume()

    monkeypatch.setattr(SimPeer, "_persist", forget)


def _forget_promises(monkeypatch: pytest.MonkeyPatch) -> None:
    boot = SimPeer.boot

    def restart(self: SimPeer) -> None:
        self.disk.vote = None
        boot(self)

    monkeypatch.setattr(SimPeer, "boot", restart)


def _settle_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    from shoal.protocol.contribution import Contributor, Frozen
    from shoal.protocol.messages import Result

    def settle(self: Contributor, frozen: Frozen, result: Result, index: int) -> tuple[int, ...]:
        self.residual[:] = frozen.residual_next
        return ()

    monkeypatch.setattr(Contributor, "settle", settle)


def _wrong_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from shoal.protocol.effects import Reduce
    from shoal.protocol.manifest import Manifest

    honest = World.reduce

    def reduce(self: World, manifest: Manifest, effect: Reduce, encoded: list[bytes]) -> bytes:
        equal = tuple(replace(entry, weight=0.5) for entry in effect.members[:1]) + effect.members[1:]
        return honest(self, manifest, replace(effect, members=equal), encoded)

    monkeypatch.setattr(World, "reduce", reduce)


@pytest.mark.parametrize(
    ("plant", "invariant"),
    [
        (_vote_without_disk, "persist before send"),
        (_forget_promises, ""),
        (_settle_everything, ""),
        (_wrong_weights, "result = aggregate"),
    ],
)
def test_planted_bug_is_caught(
    plant: Callable[[pytest.MonkeyPatch], None], invariant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    caught = _catches()
    assert caught, f"{plant.__name__} went unseen in {SEEDS_TO_CATCH} seeds"
    assert invariant in caught
