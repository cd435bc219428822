"""Ordered pairs of routers: two daemons meet and certify a round across them."""

import itertools

import pytest

from shoal.node.link_port import LinkPath
from tests.natlab.daemons import LabSwarm
from tests.natlab.pairs import KINDS, NO_WAY, run_pair
from tests.natlab.rules import Nat

# One that is dialled, one that is punched, one that is relayed by the bootstrap peer.
SHORT = [
    (Nat.NONE, Nat.SYMMETRIC),
    (Nat.PORT_RESTRICTED, Nat.PORT_RESTRICTED),
    (Nat.SYMMETRIC, Nat.SYMMETRIC),
]
# No hole comes about between these.
CLOSED = [
    (Nat.PORT_RESTRICTED, Nat.SYMMETRIC),
    (Nat.SYMMETRIC, Nat.PORT_RESTRICTED),
    (Nat.SYMMETRIC, Nat.SYMMETRIC),
]
LONG = [pair for pair in itertools.product(KINDS, KINDS) if pair not in SHORT]
PAIRS = [*SHORT, *(pytest.param(*pair, marks=pytest.mark.long) for pair in LONG)]


@pytest.fixture(scope="module")
def swarm(tmp_path_factory: pytest.TempPathFactory) -> LabSwarm:
    """Its folders are emptied by each try."""
    return LabSwarm(tmp_path_factory.mktemp("pairs"), founders=2)


@pytest.mark.parametrize("left,right", PAIRS)
def test_a_pair_meets_and_certifies_a_round(swarm: LabSwarm, left: Nat, right: Nat) -> None:
    one = run_pair(swarm, left, right)
    logs = "\n".join(f"--- {peer.name}\n{peer.log()[-2500:]}" for peer in swarm.peers)
    assert one.round_s is not None, f"{one}\n{logs}"
    assert one.path != NO_WAY, f"{one}\n{logs}"
    if Nat.NONE in (left, right):
        assert one.path == LinkPath.DIRECT, f"{one}\n{logs}"
    if (left, right) in CLOSED:
        assert one.path == LinkPath.RELAYED, f"{one}\n{logs}"
