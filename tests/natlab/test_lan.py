"""Peers in one network find each other by multicast alone: nobody tells them an address that works."""

import json
import re
import statistics
import sys
import time
from pathlib import Path

import pytest

from tests.natlab.daemons import NOBODY, LabSwarm
from tests.natlab.lab import Host, Lab
from tests.natlab.rules import Nat

WAIT_S = 60.0
POLL_S = 0.02
TRIES = 10
GONE = f"/ip4/45.0.9.9/tcp/9460/p2p/{NOBODY}"  # an address that nobody has

# A peer of the swarm that says when it began and whom it found when, until it is stopped.
PROGRAM = """
import asyncio, hashlib, json, sys, time
from shoal.node.interfaces import InterfaceWatch
from shoal.node.mdns import Mdns, MdnsPorts
from shoal.protocol.identity import Identity, format_peer_id

name, swarm, host = sys.argv[1:]
me = Identity(hashlib.sha256(name.encode()).digest()).peer
address = f"/ip4/{host}/tcp/9460/p2p/{format_peer_id(me)}"

def tell(what, text):
    print(json.dumps([what, text, time.time()]), flush=True)

async def main():
    ports = MdnsPorts(
        addresses=lambda: (address,),
        found=lambda one: tell("found", one.addresses[0]),
        failed=lambda *why: tell("failed", str(why)),
    )
    tell("began", address)
    await Mdns(me, swarm.encode(), InterfaceWatch(), ports).run()

asyncio.run(main())
"""


class LanPeer:
    """The program on a host."""

    def __init__(self, host: Host, folder: Path, swarm: str, number: int) -> None:
        self._log = folder / f"{host.name}-{number}.log"
        with self._log.open("wb") as file:
            arguments = (f"{host.name}{number}", swarm, host.address)
            self._process = host.popen(sys.executable, "-c", PROGRAM, *arguments, stdout=file)

    def said(self) -> list[tuple[str, str, float]]:
        """Everything so far."""
        return [json.loads(line) for line in self._log.read_text().split("\n")[:-1]]

    def await_said(self, what: str) -> tuple[str, float]:
        """What it said of this kind first, and when."""
        end_s = time.monotonic() + WAIT_S
        while time.monotonic() < end_s:
            for kind, text, at_s in self.said():
                if kind == what:
                    return text, at_s
            time.sleep(POLL_S)
        pytest.fail(f"it did not say {what!r} in {WAIT_S:g} s, but {self._log.read_text()!r}")

    def end(self) -> None:
        self._process.terminate()
        self._process.wait(WAIT_S)


def test_two_peers_of_one_swarm_find_each_other_and_no_stranger(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The figure is from the start of the later one, with Python and its libraries loaded, to when each has found the
    other."""
    found_s = []
    with Lab() as lab:
        home = lab.add_router("home", Nat.PORT_RESTRICTED)
        hosts = [home.add_host(name) for name in ("one", "two", "three")]
        elsewhere = lab.add_router("elsewhere", Nat.PORT_RESTRICTED).add_host("far")
        stranger = LanPeer(hosts[2], tmp_path, "another swarm", 0)
        far = LanPeer(elsewhere, tmp_path, "swarm", 0)
        first = LanPeer(hosts[0], tmp_path, "swarm", 0)
        first.await_said("began")
        address = first.said()[0][1]
        for number in range(1, TRIES + 1):
            second = LanPeer(hosts[1], tmp_path, "swarm", number)
            own, began_s = second.await_said("began")
            text, at_s = second.await_said("found")
            assert text == address
            end_s = time.monotonic() + WAIT_S
            while not (other := [at for kind, one, at in first.said() if (kind, one) == ("found", own)]):
                assert time.monotonic() < end_s, "it is not found by the first one"
                time.sleep(POLL_S)
            found_s.append(max(at_s, other[0]) - began_s)
            second.end()
        for one in (stranger, far):
            assert [kind for kind, _, _ in one.said()] == ["began"]
            one.end()
        first.end()
    with capsys.disabled():
        median_s = statistics.median(found_s)
        print(f"\nLAN: found after {min(found_s):.2f} to {max(found_s):.2f} s, median {median_s:.2f} s")


@pytest.mark.long
def test_a_peer_joins_on_the_lan_while_every_bootstrap_is_dead(tmp_path: Path) -> None:
    """Not even the manifest is there: the URI names the swarm, and an address that nobody has."""
    with Lab() as lab:
        home = lab.add_router("home", Nat.SYMMETRIC)
        swarm = LabSwarm(tmp_path, founders=2)
        try:
            first = swarm.add_on(home.add_host("first"), "peer1")
            uri = re.sub(r"\?bootstrap=.*", f"?bootstrap={GONE}", swarm.begin(first))
            second = swarm.add_on(home.add_host("second"), "peer2").start("join", uri)
            swarm.wait("rounds with both", lambda: all(peer.contributes_after(1) for peer in (first, second)))
            assert "is on the LAN" in second.log()
            swarm.check_roots()
        finally:
            swarm.end()
