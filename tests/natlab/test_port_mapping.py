"""A real router program (miniupnpd) is asked to map ports, by NAT-PMP and by UPnP, and strangers come in by them."""

import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shoal.node.reachability import ReachState
from tests.natlab.daemons import LabSwarm
from tests.natlab.lab import Host, Lab, Router
from tests.natlab.rules import Nat

MINIUPNPD = shutil.which("miniupnpd", path="/usr/sbin:/usr/local/sbin:/usr/bin")
WAIT_S = 60.0
POLL_S = 0.05
GREETING = b"hello"

pytestmark = pytest.mark.skipif(
    MINIUPNPD is None, reason="needs miniupnpd: apt-get install -y --no-install-recommends miniupnpd-nftables"
)

TABLE = """
table inet miniupnpd
delete table inet miniupnpd
table inet miniupnpd {
  chain forward { type filter hook forward priority 0; policy accept; jump miniupnpd; }
  chain prerouting { type nat hook prerouting priority -100; policy accept; jump pcp_prerouting; }
  chain postrouting { type nat hook postrouting priority 100; policy accept; jump pcp_postrouting; }
  chain miniupnpd { }
  chain pcp_prerouting { }
  chain pcp_postrouting { }
}
"""
CONFIG = """ext_ifname=wan
listening_ip=lan
http_port=5000
enable_natpmp={natpmp}
enable_upnp={upnp}
uuid=00000000-0000-0000-0000-00000000000{natpmp:.1}
secure_mode=yes
system_uptime=no
upnp_table_name=miniupnpd
upnp_nat_table_name=miniupnpd
upnp_forward_chain=miniupnpd
upnp_nat_chain=pcp_prerouting
upnp_nat_postrouting_chain=pcp_postrouting
allow 1024-65535 0.0.0.0/0 1024-65535
deny 0-65535 0.0.0.0/0 0-65535
"""
# Both ports, as the daemon has them, without a daemon: a line for each state, until SIGTERM.
PROGRAM = """
import asyncio, json, signal, time
from shoal.node import portmap
from shoal.node.interfaces import InterfaceWatch
from shoal.node.port_mapping import Listener
from shoal.node.portmap import PortMapper, PortMapperPorts, Wanted

began_s = time.monotonic()
portmap.CHECK_PERIOD_S = 1.0
portmap.retry_after_s = lambda failures: 1.0

def tell(now):
    mapped = {one.listener: [one.external_ip, one.external_port] for one in now.mapped}
    said = {"after_s": time.monotonic() - began_s, "state": now.state, "way": now.way, "reason": now.failure}
    said |= {"mapped": mapped, "detail": now.describe()}
    print(json.dumps(said), flush=True)

async def greet(reader, writer):
    writer.write(b"hello")
    await writer.drain()
    writer.close()

async def main():
    end = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, end.set)
    server = await asyncio.start_server(greet, "0.0.0.0", 9460)
    wanted = tuple(Wanted(listener=one, host="0.0.0.0", port=9460 + n) for n, one in enumerate(Listener))
    watch = InterfaceWatch()
    mapper = PortMapper(wanted, watch, PortMapperPorts(changed=tell))
    tasks = [asyncio.create_task(watch.run()), asyncio.create_task(mapper.run())]
    await end.wait()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await mapper.close()
    server.close()

asyncio.run(main())
"""


class Mapper:
    """The program on a host, and the states that it tells."""

    def __init__(self, host: Host, folder: Path) -> None:
        self._log = folder / f"{host.name}.log"
        self._read = 0
        with self._log.open("wb") as file:
            self._process = host.popen(sys.executable, "-c", PROGRAM, stdout=file)

    def next(self) -> dict[str, Any]:
        """The next state."""
        end_s = time.monotonic() + WAIT_S
        while time.monotonic() < end_s:
            lines = self._log.read_text().split("\n")
            if len(lines) > self._read + 1:
                self._read += 1
                said: dict[str, Any] = json.loads(lines[self._read - 1])
                return said
            time.sleep(POLL_S)
        pytest.fail(f"nothing was told in {WAIT_S:g} s after {self._log.read_text()!r}")

    def await_mapped(self) -> dict[str, Any]:
        """The next state in which something is mapped."""
        while True:
            said = self.next()
            if said["mapped"]:
                return said

    def end(self) -> None:
        self._process.terminate()
        assert self._process.wait(WAIT_S) == 0, self._log.read_text()


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab() as made:
        yield made


def start_router(router: Router, folder: Path, *, natpmp: bool = False, upnp: bool = False) -> subprocess.Popen[bytes]:
    """The router program, with an empty table of mappings."""
    assert MINIUPNPD is not None
    router.space.exec("nft", "-f", "-", text=TABLE)
    config = folder / f"{router.name}.conf"
    words = {True: "yes", False: "no"}
    config.write_text(
        CONFIG.format(natpmp=words[natpmp], upnp=words[upnp]).replace("000y", "0001").replace("000n", "0002")
    )
    return router.popen(MINIUPNPD, "-d", "-f", str(config), "-P", str(folder / f"{router.name}.pid"))


def stop(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait(WAIT_S)


def greets(stranger: Host, ip: str, port: int) -> bool:
    """Whether the stranger gets through to the program."""

    def dial() -> bool:
        try:
            with socket.create_connection((ip, port), 2.0) as sock:
                return sock.recv(16) == GREETING
        except OSError:
            return False

    return stranger.call(dial)


@pytest.mark.parametrize("way", ["nat_pmp", "upnp"])
def test_strangers_come_in_by_a_mapped_port_until_it_is_taken_back(
    lab: Lab, tmp_path: Path, way: str, capsys: pytest.CaptureFixture[str]
) -> None:
    stranger = lab.add_host("stranger")
    home = lab.add_router("home", Nat.PORT_RESTRICTED)
    router = start_router(home, tmp_path, natpmp=way == "nat_pmp", upnp=way == "upnp")
    assert not greets(stranger, home.address, 9460)
    mapper = Mapper(home.add_host("peer"), tmp_path)
    said = mapper.await_mapped()
    with capsys.disabled():
        print(f"\n{way}: mapped after {said['after_s']:.2f} s")
    assert said["way"] == way and said["mapped"] == {"control": [home.address, 9460], "tensor": [home.address, 9461]}
    assert greets(stranger, home.address, 9460)

    stop(router)
    home.space.exec("nft", "-f", "-", text=TABLE)
    assert not greets(stranger, home.address, 9460)
    start_router(home, tmp_path, natpmp=way == "nat_pmp", upnp=way == "upnp")
    end_s = time.monotonic() + WAIT_S
    while not greets(stranger, home.address, 9460):
        assert time.monotonic() < end_s, "what the router forgot was not mapped again"
        time.sleep(POLL_S)

    mapper.end()
    assert not greets(stranger, home.address, 9460)


@pytest.mark.long
@pytest.mark.parametrize("way", ["nat_pmp", "upnp"])
def test_two_peers_behind_one_router_get_a_port_each(lab: Lab, tmp_path: Path, way: str) -> None:
    stranger = lab.add_host("stranger")
    home = lab.add_router("home", Nat.PORT_RESTRICTED)
    start_router(home, tmp_path, natpmp=way == "nat_pmp", upnp=way == "upnp")
    mappers, ports = [], set()
    for name in ("one", "two"):
        mappers.append(Mapper(home.add_host(name), tmp_path))
        mapped = mappers[-1].await_mapped()["mapped"]
        ports |= {tuple(one) for one in mapped.values()}
        assert greets(stranger, *mapped["control"])
    assert len(ports) == 4
    for mapper in mappers:
        mapper.end()


def test_a_router_that_does_not_map_ports_is_told_by_both_ways(lab: Lab, tmp_path: Path) -> None:
    mapper = Mapper(lab.add_router("home", Nat.PORT_RESTRICTED).add_host("peer"), tmp_path)
    said = mapper.next()
    assert said["state"] == "failed" and said["mapped"] == {}
    assert "nat_pmp: gateway_silent" in said["detail"] and "upnp: no_gateway" in said["detail"]
    mapper.end()


@pytest.mark.long
def test_a_peer_that_moves_asks_the_router_of_its_new_network(lab: Lab, tmp_path: Path) -> None:
    stranger = lab.add_host("stranger")
    homes = [lab.add_router(name, Nat.PORT_RESTRICTED) for name in ("first", "second")]
    for home in homes:
        start_router(home, tmp_path, natpmp=True)
    peer = homes[0].add_host("peer")
    mapper = Mapper(peer, tmp_path)
    assert mapper.await_mapped()["mapped"]["control"] == [homes[0].address, 9460]
    peer.move(homes[1])
    while mapper.next()["mapped"].get("control") != [homes[1].address, 9460]:
        continue
    assert greets(stranger, homes[1].address, 9460)
    mapper.end()


def test_a_carriers_nat_behind_the_router_is_no_way_in(lab: Lab, tmp_path: Path) -> None:
    home = lab.add_router("carrier", Nat.PORT_RESTRICTED, carrier=True).add_router("home", Nat.PORT_RESTRICTED)
    start_router(home, tmp_path, natpmp=True, upnp=True)
    mapper = Mapper(home.add_host("peer"), tmp_path)
    said = mapper.next()
    assert said["state"] == "failed" and said["mapped"] == {}
    assert said["reason"] == "gateway_refused" and said["detail"].count("another NAT behind it") == 2
    mapper.end()


@pytest.mark.long
def test_a_daemon_behind_a_router_that_maps_ports_owns_parts(lab: Lab, tmp_path: Path) -> None:
    """The mapped addresses are dialled back by a member before they count; on exit the router's table is empty."""
    home = lab.add_router("home", Nat.SYMMETRIC)
    start_router(home, tmp_path, natpmp=True)
    swarm = LabSwarm(tmp_path, founders=2)
    try:
        public = swarm.add_on(lab.add_host("public"), "peer1")
        uri = swarm.begin(public)
        hidden = swarm.add_on(home.add_host("peer"), "peer2").start("join", uri)

        def is_open() -> bool:
            status = hidden.status()
            return (
                status is not None
                and status.router.addresses == (f"{home.address}:9460", f"{home.address}:9461")
                and status.reach.state is ReachState.REACHABLE
                and status.control.state is ReachState.REACHABLE
            )

        swarm.wait("others dial both of its ports", is_open)
        swarm.wait("it owns parts", lambda: any(row.me and row.owner for row in hidden.rows()))
        assert "9461" in home.space.exec("nft", "list", "chain", "inet", "miniupnpd", "pcp_prerouting")
        assert hidden.leave() == 0
        assert "946" not in home.space.exec("nft", "list", "chain", "inet", "miniupnpd", "pcp_prerouting")
    finally:
        swarm.end()
