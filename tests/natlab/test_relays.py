"""Control planes behind real routers: each knows whether it can be dialled, and reaches every other one."""

import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.natlab.lab import Host, Lab
from tests.natlab.rules import Nat

PATIENCE_S = 60.0
NATTED = (Nat.FULL_CONE, Nat.PORT_RESTRICTED, Nat.SYMMETRIC)


class Node:
    """One control plane on a host, and what it says last."""

    def __init__(self, host: Host, seed: int, folder: Path, *bootstraps: str) -> None:
        self.host = host
        self._log = folder / f"{host.name}.{seed}.log"
        with self._log.open("wb") as log:
            command = (sys.executable, "-m", "tests.natlab.control_node", str(seed), *bootstraps)
            self.process = host.popen(*command, stdout=log)

    def told(self) -> dict[str, Any]:
        lines = [line for line in self._log.read_text().splitlines(keepends=True) if line.endswith("}\n")]
        assert self.process.poll() is None, self._log.read_text()
        return json.loads(lines[-1]) if lines else {"state": "", "relays": [], "reached": {}, "addresses": [], "me": ""}

    def reaches(self, other: "Node") -> str:
        return str(self.told()["reached"].get(other.told()["me"], "")) if other.told()["me"] else ""

    def reaches_directly(self, other: "Node") -> bool:
        return self.reaches(other) == "direct"

    def relays(self) -> set[str]:
        return set(self.told()["relays"])

    def is_reachable(self) -> bool:
        return bool(self.told()["state"] == "reachable")


class Relay:
    """`shoal relay` on a host."""

    def __init__(self, host: Host, folder: Path) -> None:
        self._log = folder / f"{host.name}.relay.log"
        with self._log.open("wb") as log:
            command = (sys.executable, "-m", "shoal.node", "relay", "--data-dir", str(folder / f"{host.name}.relay"))
            self.process = host.popen(*command, stdout=log)
        wait("the relay's address", lambda: "    /ip4/" in self._log.read_text())
        self.address = next(line.strip() for line in self._log.read_text().splitlines() if line.startswith("    /ip4/"))


def wait(what: str, holds: Callable[[], object]) -> float:
    began_s = time.monotonic()
    while not holds():
        assert time.monotonic() - began_s < PATIENCE_S, what
        time.sleep(0.2)
    return time.monotonic() - began_s


def has_relay(node: Node, *, or_is_reachable: bool) -> bool:
    return bool(node.relays()) or (or_is_reachable and node.is_reachable())


def has_two(node: Node, but: str = "") -> bool:
    """Relays, beside this one."""
    return len(node.relays() - {but}) == 2


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab() as made:
        yield made


@pytest.mark.long
def test_every_pair_behind_routers_meets_through_a_relay(
    lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    relay = Relay(lab.add_host("relay"), tmp_path)
    nodes = {}
    for number, (nat, place) in enumerate(itertools.product(NATTED, ("a", "b")), 1):
        host = lab.add_peer(f"{nat.value}-{place}", nat)
        nodes[host.name] = Node(host, number, tmp_path, relay.address)
    for name, node in nodes.items():
        # A full cone lets everybody in where the peer has dialled from its listening port.
        opens = name.startswith(Nat.FULL_CONE.value)
        took_s = wait(f"{name} has a relay", partial(has_relay, node, or_is_reachable=opens))
        with capsys.disabled():
            print(f"\n{name}: {node.told()['state']}, relay after {took_s:.1f} s more", end="")
        assert node.told()["state"] == "private" or opens
    for (left, one), (right, other) in itertools.permutations(nodes.items(), 2):
        wait(f"{left} reaches {right}", partial(one.reaches, other))
        if "symmetric" not in left + right:
            wait(f"{left} and {right} need no relay", partial(one.reaches_directly, other))
    assert nodes["symmetric-a"].reaches(nodes["symmetric-b"]) == "relayed"


def test_two_behind_port_restricted_routers_do_without_the_relay(
    lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    relay = Relay(lab.add_host("relay"), tmp_path)
    pair = [
        Node(lab.add_peer(f"peer{number}", Nat.PORT_RESTRICTED), number, tmp_path, relay.address) for number in (1, 2)
    ]
    met_s = wait("they meet", lambda: pair[0].reaches(pair[1]))
    direct_s = wait("they do without it", lambda: {one.reaches(two) for one, two in (pair, pair[::-1])} == {"direct"})
    with capsys.disabled():
        print(f"\nmet after {met_s:.1f} s, direct after {direct_s:.1f} s more", end="")


@pytest.mark.long
def test_a_public_peer_relays_once_others_have_dialled_it(lab: Lab, tmp_path: Path) -> None:
    first = Node(lab.add_host("first"), 1, tmp_path)
    wait("it has started", lambda: first.told()["addresses"])
    address = first.told()["addresses"][0]
    public = Node(lab.add_host("public"), 2, tmp_path, address)
    hidden = Node(lab.add_peer("hidden", Nat.SYMMETRIC), 3, tmp_path, address)
    for node in (first, public):
        wait("it knows that it can be dialled", node.is_reachable)
    wait("two relays", partial(has_two, hidden))
    wait("all meet", lambda: public.reaches(hidden) and hidden.reaches(public) == "direct")


def test_a_dead_relay_is_replaced_and_the_pair_meets_again(lab: Lab, tmp_path: Path) -> None:
    relays = [Relay(lab.add_host(f"relay{number}"), tmp_path) for number in (1, 2, 3)]
    addresses = [relay.address for relay in relays]
    pair = [Node(lab.add_peer(f"peer{number}", Nat.SYMMETRIC), number, tmp_path, *addresses) for number in (1, 2)]
    for node in pair:
        wait("two relays", partial(has_two, node))
    wait("they meet", lambda: pair[0].reaches(pair[1]) and pair[1].reaches(pair[0]))
    before = pair[0].relays()
    victim = next(relay for relay in relays if relay.address.rsplit("/", 1)[1][-8:] in before)
    victim.process.kill()
    gone = victim.address.rsplit("/", 1)[1][-8:]
    for node in pair:
        wait("two others", partial(has_two, node, but=gone))
    wait("they meet again", lambda: pair[0].reaches(pair[1]) and pair[1].reaches(pair[0]))


@pytest.mark.long
def test_a_peer_that_moves_into_the_open_needs_no_relay_any_more(lab: Lab, tmp_path: Path) -> None:
    relay = Relay(lab.add_host("relay"), tmp_path)
    host = lab.add_peer("laptop", Nat.PORT_RESTRICTED)
    laptop = Node(host, 1, tmp_path, relay.address)
    wait("a relay", laptop.relays)
    host.move(lab.internet)
    wait("it can be dialled", lambda: laptop.is_reachable() and not laptop.relays())
    assert any(host.address in text for text in laptop.told()["addresses"])
