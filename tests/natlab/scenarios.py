"""What happens to a peer's network while it trains, and how long it takes until the peer is in rounds again.

Every scenario leaves all daemons running: who has to be started again has not recovered.
"""

import time
from collections.abc import Callable, Mapping

from tests.natlab.daemons import LabPeer, LabSwarm
from tests.natlab.lab import BOTH, IPV6, Lab, Router
from tests.natlab.rules import Nat
from tests.natlab.wire import Impairment

FAR = Impairment(delay_s=0.05)  # so that an exchange takes long enough to be met
POWER_OFF_S = 4.0
ROUNDS_BEFORE = 2


class Scene:
    """Two peers who train together, one of them at home."""

    def __init__(self, lab: Lab, swarm: LabSwarm, outside: LabPeer, inside: LabPeer) -> None:
        self.lab = lab
        self.swarm = swarm
        self.outside = outside
        self.inside = inside
        self.wait_for_rounds(-1)

    @property
    def peers(self) -> tuple[LabPeer, LabPeer]:
        return self.outside, self.inside

    def wait_for_rounds(self, number: int) -> None:
        """Until both were in a certified round later than this one, and in some more after it."""
        self.swarm.wait(
            "both train together", lambda: all(one.contributes_after(number + ROUNDS_BEFORE) for one in self.peers)
        )

    def wait_for_exchange(self) -> None:
        def exchanges() -> bool:
            status = self.inside.status()
            return status is not None and status.round.phase == "exchange"

        self.swarm.wait("a round is being exchanged", exchanges)

    def measure_s(self, change: Callable[[], None]) -> float:
        """From the end of the change to the first certified round with both of them."""
        change()
        begin_s = time.monotonic()
        at = max(peer.round for peer in self.peers)
        self.swarm.wait("both are in a round again", lambda: all(peer.contributes_after(at) for peer in self.peers))
        taken_s = time.monotonic() - begin_s
        self.wait_for_rounds(at)
        for peer in self.peers:
            assert peer.process is not None and peer.process.poll() is None, f"{peer.name} did not live through it"
        self.swarm.check_roots()
        return taken_s


class Home(Scene):
    """A public peer and one at home; `inside` is behind a carrier's NAT as well if it is double."""

    def __init__(self, lab: Lab, swarm: LabSwarm, nat: Nat, *, double: bool = False, blocks_udp: bool = False) -> None:
        public = swarm.add_on(lab.add_host("public"), "peer1")
        uri = swarm.begin(public)
        outer = lab.add_router("carrier", Nat.PORT_RESTRICTED, carrier=True) if double else None
        self.router: Router = lab.add_router("home", nat) if outer is None else outer.add_router("home", nat)
        self.router.change(blocks_udp=blocks_udp)
        self.host = self.router.add_host("inside", FAR)
        super().__init__(lab, swarm, public, swarm.add_on(self.host, "peer2").start("join", uri))


class Homes(Scene):
    """Two peers at home, behind firewalls and with IPv6 alone; a public one brings them together."""

    def __init__(self, lab: Lab, swarm: LabSwarm) -> None:
        self.hosts = [
            lab.add_router(f"{name}-router", Nat.NONE, families=IPV6).add_host(name) for name in ("one", "two")
        ]
        relay = swarm.add_on(lab.add_host("relay", families=BOTH), "relay")
        peers = [swarm.add_on(host, f"peer{number}") for number, host in enumerate(self.hosts, 1)]
        uri = swarm.begin(relay, "--role", "bootstrap")
        super().__init__(lab, swarm, *(peer.start("join", uri) for peer in peers))


def reboot_router(lab: Lab, swarm: LabSwarm) -> float:
    """The home router loses its power in the middle of an exchange and comes back with another address."""
    scene = Home(lab, swarm, Nat.PORT_RESTRICTED)

    def change() -> None:
        scene.wait_for_exchange()
        scene.router.stop()
        time.sleep(POWER_OFF_S)
        scene.router.start()

    return scene.measure_s(change)


def reboot_router_at_once(lab: Lab, swarm: LabSwarm) -> float:
    """It forgets all connections and keeps its address: both ends believe in connections that are gone."""
    scene = Home(lab, swarm, Nat.PORT_RESTRICTED)

    def change() -> None:
        scene.wait_for_exchange()
        scene.router.reboot(new_address=False)

    return scene.measure_s(change)


def move_to_another_network(lab: Lab, swarm: LabSwarm) -> float:
    """From home to a network with another kind of router: the machine's own address changes, too."""
    scene = Home(lab, swarm, Nat.PORT_RESTRICTED)
    cafe = lab.add_router("cafe", Nat.SYMMETRIC)
    return scene.measure_s(lambda: scene.host.move(cafe, FAR))


def move_to_the_public_network(lab: Lab, swarm: LabSwarm) -> float:
    """From behind a router to a machine with a public address."""
    scene = Home(lab, swarm, Nat.SYMMETRIC)
    return scene.measure_s(lambda: scene.host.move(lab.internet, FAR))


def begin_behind_two_nats(lab: Lab, swarm: LabSwarm) -> float:
    """Nothing happens to it: a home router behind a carrier's."""
    return Home(lab, swarm, Nat.PORT_RESTRICTED, double=True).measure_s(lambda: None)


def begin_without_udp(lab: Lab, swarm: LabSwarm) -> float:
    """A network that lets no UDP through."""
    return Home(lab, swarm, Nat.PORT_RESTRICTED, blocks_udp=True).measure_s(lambda: None)


def change_ipv6_address(lab: Lab, swarm: LabSwarm) -> float:
    """Both homes have a hole to each other. One machine gets a new address, and later its old one is gone in the middle
    of an exchange, as every day where addresses change for privacy."""
    scene = Homes(lab, swarm)
    old = scene.hosts[1].begin_address6()
    scene.wait_for_rounds(max(peer.round for peer in scene.peers))

    def change() -> None:
        scene.wait_for_exchange()
        scene.hosts[1].end_address6(old)

    return scene.measure_s(change)


SCENARIOS: Mapping[str, Callable[[Lab, LabSwarm], float]] = {
    one.__name__: one
    for one in (
        reboot_router,
        reboot_router_at_once,
        move_to_another_network,
        move_to_the_public_network,
        begin_behind_two_nats,
        begin_without_udp,
        change_ipv6_address,
    )
}
