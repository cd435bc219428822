"""Replicas that were apart become one within five periods, though a fifth of all messages is lost.

The full size, 64 replicas and 10,000 entries, takes half a minute and runs with one seed; `benchmarks.ledger` measures
others with the same code.
"""

import random

import pytest

from shoal.crdt.anti_entropy import PERIOD_S
from tests.sim.replicas import ReplicaSwarm, measure_convergence, shared_verification

REPLICAS, LOSS, PERIODS_MAX = 16, 0.2, 5


@pytest.mark.parametrize(
    ("replicas", "entries", "seed"),
    [(16, 2_000, 1), (16, 2_000, 2), (64, 1_000, 3), pytest.param(64, 10_000, 3, marks=pytest.mark.long)],
)
def test_replicas_that_never_heard_of_each_other_converge_within_five_periods(
    replicas: int, entries: int, seed: int
) -> None:
    with shared_verification():
        periods, swarm = measure_convergence(replicas=replicas, entries=entries, loss=LOSS, seed=seed)
        assert periods <= PERIODS_MAX
        assert {len(replica.ledger) for replica in swarm.replicas} == {entries}
        assert len(swarm.fold_digests()) == 1
    assert swarm.traffic.lost > 0
    assert swarm.traffic.failed > 0


@pytest.mark.parametrize("seed", [4, 5])
def test_what_is_written_meanwhile_arrives_within_five_periods_of_the_last_entry(seed: int) -> None:
    with shared_verification():
        swarm = ReplicaSwarm(replicas=REPLICAS, loss=LOSS, seed=seed)
        swarm.start()
        entropy = random.Random(seed)
        written = 0
        for _ in range(50):
            entries = entropy.randrange(1, 20)
            swarm.write_at(entropy.uniform(0, 2 * PERIOD_S), entropy.randrange(REPLICAS), entries)
            written += entries
        swarm.run_until((2 + PERIODS_MAX) * PERIOD_S)
        assert swarm.have_converged()
        assert {len(replica.ledger) for replica in swarm.replicas} == {written}
        assert len(swarm.fold_digests()) == 1


def test_a_swarm_at_rest_pays_for_one_short_comparison_a_replica_and_period() -> None:
    with shared_verification():
        swarm = ReplicaSwarm(replicas=REPLICAS, loss=0.0, seed=6)
        swarm.start()
        swarm.write(0, 100, is_pushed=True)
        swarm.run_until(5 * PERIOD_S)
        assert swarm.have_converged()
        before = swarm.traffic.comparisons, swarm.traffic.frame_bytes
        swarm.run_until(15 * PERIOD_S)
        comparisons, sent = swarm.traffic.comparisons - before[0], swarm.traffic.frame_bytes - before[1]
    assert comparisons <= 10 * REPLICAS
    assert sent < 200 * comparisons


def test_a_run_is_a_function_of_its_seed() -> None:
    with shared_verification():
        runs = [measure_convergence(replicas=6, entries=60, loss=LOSS, seed=7)[1] for _ in range(2)]
    assert runs[0].traffic == runs[1].traffic
    assert runs[0].fold_digests() == runs[1].fold_digests()
