"""Real daemons behind real routers: they find each other, train, and are not stopped by what somebody else lacks."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal.protocol.errors import Failure
from tests.natlab.daemons import NOBODY, LabSwarm
from tests.natlab.lab import Lab
from tests.natlab.rules import Nat

GONE = f"/ip4/45.0.9.9/tcp/9460/p2p/{NOBODY}"  # an address that nobody has
NATTED = (Nat.FULL_CONE, Nat.PORT_RESTRICTED, Nat.SYMMETRIC)


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab() as made:
        yield made


@pytest.fixture
def swarm(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[LabSwarm]:
    founders, peers_min = request.param
    made = LabSwarm(tmp_path, founders, peers_min)
    yield made
    made.end()


@pytest.mark.parametrize("swarm", [(4, 2)], indirect=True)
def test_one_public_peer_and_one_behind_each_kind_of_router_train(lab: Lab, swarm: LabSwarm) -> None:
    public = swarm.add_on(lab.add_host("public"), "peer1")
    uri = swarm.begin(public)
    hidden = [
        swarm.add_on(lab.add_peer(nat.value, nat), f"peer{number}").start("join", uri)
        for number, nat in enumerate(NATTED, 2)
    ]
    swarm.wait("rounds with all of them", lambda: all(peer.contributes_after(1) for peer in (public, *hidden)))
    swarm.wait("the public one owns parts", lambda: any(row.me and row.owner for row in public.rows()))
    swarm.check_roots()


@pytest.mark.parametrize("swarm", [(1, 1)], indirect=True)
def test_a_peer_starts_alone_while_all_bootstraps_are_dead_and_joins_when_one_comes(lab: Lab, swarm: LabSwarm) -> None:
    public = lab.add_host("public")
    late = swarm.add_on(public, "late")
    later = f"/ip4/{public.address}/tcp/9460/p2p/{late.id}"
    first = swarm.add_on(lab.add_peer("first", Nat.PORT_RESTRICTED), "peer1")
    swarm.begin(first, "--bootstrap", f"{GONE},{later}")
    swarm.wait("it trains alone", lambda: first.round >= 2)
    swarm.wait("it says why", lambda: first.log().count(Failure.BOOTSTRAP_UNREACHABLE) == 2)

    swarm.begin(late)
    swarm.wait("they train together", lambda: all("certified by 2 peers" in peer.log() for peer in (first, late)))
    swarm.check_roots()


@pytest.mark.long
@pytest.mark.parametrize("swarm", [(3, 2)], indirect=True)
def test_a_peer_that_was_in_the_swarm_needs_no_bootstrap(lab: Lab, swarm: LabSwarm) -> None:
    """It meets the peers whose addresses its book has."""
    bootstrap = swarm.add_on(lab.add_host("relay"), "relay")
    uri = swarm.begin(bootstrap, "--role", "bootstrap")
    public = [swarm.add_on(lab.add_host(f"public{number}"), f"peer{number}").start("join", uri) for number in (1, 2)]
    hidden = swarm.add_on(lab.add_peer("hidden", Nat.SYMMETRIC), "peer3").start("join", uri)
    swarm.wait("all train", lambda: all(peer.contributes_after(0) for peer in (*public, hidden)))

    hidden.kill()
    bootstrap.kill()
    at = public[0].round
    hidden.start("up")
    swarm.wait("it is back", lambda: hidden.contributes_after(at + 2))
    swarm.check_roots()
