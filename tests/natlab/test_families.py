"""IPv6 in the shapes that homes have it: two daemons certify a round, over a direct link wherever there can be one."""

import pytest

from shoal.node.link_port import LinkPath
from tests.natlab.daemons import LabSwarm
from tests.natlab.families import CASES, run_case

PATHS = {
    "ipv6 / ipv6": LinkPath.PUNCHED,
    "ipv6 / both": LinkPath.PUNCHED,
    "ipv6 / ipv4": LinkPath.RELAYED,
    "ipv6 open / ipv4 public": LinkPath.RELAYED,
    "symmetric + ipv6 / symmetric + ipv6": LinkPath.PUNCHED,
    "symmetric + ipv6 / port_restricted + ipv6": LinkPath.PUNCHED,
    "dead ipv6 / public": LinkPath.DIRECT,
    "dead ipv6 / both": LinkPath.PUNCHED,
}
# Only IPv6 leads there without a relay; each has one family, and only a relay with both brings them together.
SHORT = ("symmetric + ipv6 / symmetric + ipv6", "ipv6 open / ipv4 public")


@pytest.fixture(scope="module")
def swarm(tmp_path_factory: pytest.TempPathFactory) -> LabSwarm:
    """Its folders are emptied by each try."""
    return LabSwarm(tmp_path_factory.mktemp("families"), founders=2)


@pytest.mark.parametrize(
    "case", [*SHORT, *(pytest.param(one, marks=pytest.mark.long) for one in CASES if one not in SHORT)]
)
def test_a_round_is_certified_over_the_best_link_there_is(swarm: LabSwarm, case: str) -> None:
    one = run_case(swarm, case)
    logs = "\n".join(f"--- {peer.name}\n{peer.log()[-2500:]}" for peer in swarm.peers)
    assert one.round_s is not None, f"{one}\n{logs}"
    assert one.path == PATHS[case], f"{one}\n{logs}"
