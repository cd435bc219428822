"""Bytes of an hour: in all, and for each peer."""

import random

from shoal.node import relay_budget
from shoal.node.relay_budget import PERIOD_S, SLOT_S, RelayBudget
from shoal.protocol.identity import PeerId

ANN, BOB, EVE = (PeerId(bytes([number]) * 32) for number in range(3))


def test_bytes_count_in_all_and_for_both_peers() -> None:
    budget = RelayBudget(bytes_max=100, bytes_per_peer_max=60)
    assert budget.left((), 0.0) == 100 and budget.left((ANN, BOB), 0.0) == 60
    assert budget.spend((ANN, BOB), 50, 0.0)
    assert (budget.left((), 0.0), budget.left((ANN, EVE), 0.0), budget.left((EVE,), 0.0)) == (50, 10, 50)
    assert not budget.spend((BOB, EVE), 11, 0.0), "one of the two has used up its share"
    assert budget.left((EVE,), 0.0) == 50, "what is not spent is not counted"
    assert budget.spend((BOB, EVE), 10, 0.0) and budget.left((EVE, PeerId(b"z" * 32)), 0.0) == 40


def test_what_is_spent_comes_back_after_an_hour_and_not_before() -> None:
    budget = RelayBudget(bytes_max=100, bytes_per_peer_max=100)
    assert budget.spend((ANN,), 100, SLOT_S - 1)
    assert not budget.spend((ANN,), 1, SLOT_S - 1 + PERIOD_S - 0.1)
    assert budget.spend((ANN,), 100, SLOT_S + PERIOD_S + SLOT_S)


def test_in_no_hour_more_passes_than_is_allowed() -> None:
    for seed in range(20):
        draw = random.Random(seed)
        budget, spent, now = RelayBudget(bytes_max=1000, bytes_per_peer_max=400), [], 0.0
        for _ in range(400):
            now += draw.expovariate(1 / 90)
            peers = tuple(draw.sample((ANN, BOB, EVE), 2))
            nbytes = draw.randrange(1, 200)
            if budget.spend(peers, nbytes, now):
                spent.append((now, peers, nbytes))
        assert len(spent) > 20
        for begin, _, _ in spent:
            hour = [(peers, nbytes) for at, peers, nbytes in spent if begin <= at < begin + PERIOD_S]
            assert sum(nbytes for _, nbytes in hour) <= 1000
            assert all(sum(nbytes for peers, nbytes in hour if one in peers) <= 400 for one in (ANN, BOB, EVE))


def test_whoever_is_forgotten_is_still_within_the_bound_of_all() -> None:
    budget = RelayBudget(bytes_max=10 * (relay_budget.PEERS_MAX + 10), bytes_per_peer_max=10)
    peers = [PeerId(number.to_bytes(32, "big")) for number in range(relay_budget.PEERS_MAX + 10)]
    assert all(budget.spend((peer,), 10, 0.0) for peer in peers)
    assert len(budget._by_peer) == relay_budget.PEERS_MAX
    assert not budget.spend((peers[0],), 1, 0.0)
