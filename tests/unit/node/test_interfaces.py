"""node/interfaces.py: what is read from the system, and who is told of which change."""

import asyncio
import contextlib
import os
import shutil
import subprocess
import sys

import pytest

from shoal.node import interfaces
from shoal.node.interfaces import (
    Gateway,
    InterfaceAddress,
    Interfaces,
    InterfaceWatch,
    describe_change,
    has_address,
    parse_gateways,
    parse_stale,
    read_interfaces,
)
from tests.unit.node.node_samples import PATIENCE_S

ROUTES = """Iface	Destination	Gateway 	Flags	RefCnt	Use	Metric	Mask		MTU	Window	IRTT
wlan0	00000000	0101A8C0	0003	0	0	600	00000000	0	0	0
eth0	00000000	010200C0	0003	0	0	100	00000000	0	0	0
eth1	00000000	00000000	0001	0	0	50	00000000	0	0	0
eth2	00000000	0103000A	0002	0	0	10	00000000	0	0	0
eth0	000200C0	00000000	0001	0	0	0	00FFFFFF	0	0	0
short line
eth0	zzzzzzzz	010200C0	0003	0	0	0	00000000	0	0	0
"""
HOME = Interfaces(
    addresses=(InterfaceAddress(interface="eth0", ip="192.0.2.2", prefix_bits=24),),
    gateways=(Gateway(metric=100, interface="eth0", ip="192.0.2.1"),),
)
CAFE = Interfaces(
    addresses=(InterfaceAddress(interface="wlan0", ip="198.51.100.7", prefix_bits=24),),
    gateways=(Gateway(metric=600, interface="wlan0", ip="198.51.100.1"),),
)


def test_gateways_are_read_the_best_first() -> None:
    assert parse_gateways(ROUTES) == (
        Gateway(metric=100, interface="eth0", ip="192.0.2.1"),
        Gateway(metric=600, interface="wlan0", ip="192.168.1.1"),
    )
    assert parse_gateways("") == ()


def test_the_own_address_beside_a_gateway_is_the_one_on_its_link() -> None:
    two = Interfaces(
        addresses=(
            InterfaceAddress(interface="eth0", ip="10.0.0.2", prefix_bits=24),
            InterfaceAddress(interface="eth0", ip="192.0.2.2", prefix_bits=24),
            InterfaceAddress(interface="eth0", ip="fd00::2", prefix_bits=64),
            InterfaceAddress(interface="wlan0", ip="192.0.2.9", prefix_bits=24),
        )
    )
    assert two.beside(HOME.gateways[0]) == "192.0.2.2"
    assert two.beside(CAFE.gateways[0]) is None


def test_this_machine_is_read() -> None:
    found = read_interfaces()
    assert found == read_interfaces()
    assert not any(one.ip.startswith(("127.", "fe80:")) or one.ip == "::1" for one in found.addresses)
    assert list(found.addresses) == sorted(found.addresses)


@pytest.mark.parametrize(
    ("text", "mask", "bits"),
    [
        ("192.0.2.2", "255.255.255.0", 24),
        ("2001:db8::1%eth0", "ffff:ffff:ffff:ffff::", 64),
        ("192.0.2.2", None, 32),
        ("127.0.0.1", "255.0.0.0", None),
        ("fe80::1%eth0", "ffff:ffff:ffff:ffff::", None),
        ("02:fc:00:00:00:01", None, None),
    ],
)
def test_addresses_that_others_may_use_are_kept(text: str, mask: str | None, bits: int | None) -> None:
    read = interfaces._read_address("eth0", text, mask)
    assert (read.prefix_bits if read else None) == bits


IPV6 = """3ffe0045000000000000000000000001 02 40 00 {first} eth0
3ffe0045000000000000000000000002 02 40 00 {second} eth0
fe800000000000000000000000000001 02 40 20 80 eth0
00000000000000000000000000000001 01 80 10 80 lo
zz 02 40 00 20 eth0
short
"""


@pytest.mark.parametrize(
    ("first", "second", "stale"),
    [
        ("80", "00", ()),
        ("20", "01", ("3ffe:45::1",)),  # deprecated, beside a temporary one
        ("40", "08", ()),  # nothing else is there
        ("20", "20", ()),
        ("00", "48", ("3ffe:45::2",)),
    ],
)
def test_addresses_that_nothing_leaves_from_are_left_out(first: str, second: str, stale: tuple[str, ...]) -> None:
    assert parse_stale(IPV6.format(first=first, second=second)) == set(stale)


def test_a_change_is_told_once_to_everybody_who_listens() -> None:
    state = HOME
    watch = InterfaceWatch(lambda: state, lambda: 0.0)
    told: list[Interfaces] = []
    also: list[Interfaces] = []
    watch.subscribe(told.append)
    end = watch.subscribe(also.append)
    assert not watch.check()
    state = CAFE
    assert watch.check() and not watch.check()
    end()
    state = HOME
    assert watch.check()
    assert told == [CAFE, HOME] and also == [CAFE]
    assert watch.now == HOME


def test_a_machine_that_has_slept_is_a_change() -> None:
    slept_s = 100.0
    watch = InterfaceWatch(lambda: HOME, lambda: slept_s)
    told: list[Interfaces] = []
    watch.subscribe(told.append)
    slept_s += interfaces.SLEPT_S_MIN / 2
    assert not watch.check()
    slept_s += 3600.0
    assert watch.check() and not watch.check()
    assert [one.sleeps for one in told] == [1]
    assert describe_change(HOME, told[0]) == "addresses have changed: the machine has slept"


def test_people_are_told_what_has_changed() -> None:
    assert describe_change(HOME, CAFE) == (
        "addresses have changed: gone: 192.0.2.2; new: 198.51.100.7; default gateway: 198.51.100.1 (wlan0)"
    )
    assert describe_change(HOME, Interfaces()).endswith("gone: 192.0.2.2; default gateway: none")


async def test_the_watch_looks_at_a_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interfaces, "SETTLE_S", 0.0)
    state = HOME
    watch = InterfaceWatch(lambda: state, lambda: 0.0)
    told = asyncio.Event()
    watch.subscribe(lambda _: told.set())
    task = asyncio.create_task(watch.run())
    state = CAFE
    watch.notice()
    await asyncio.wait_for(told.wait(), PATIENCE_S)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_the_watch_looks_now_and_then_without_any_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interfaces, "PERIOD_S", 0.01)
    state = HOME
    watch = InterfaceWatch(lambda: state, lambda: 0.0)
    told = asyncio.Event()
    watch.subscribe(lambda _: told.set())
    task = asyncio.create_task(watch.run())
    await asyncio.sleep(0)
    state = CAFE
    await asyncio.wait_for(told.wait(), PATIENCE_S)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


_IN_NAMESPACE = """
import asyncio, subprocess
from shoal.node.interfaces import InterfaceWatch

async def main():
    watch = InterfaceWatch()
    assert watch.now.addresses == () and watch.now.gateways == (), watch.now
    told = asyncio.Event()
    watch.subscribe(lambda _: told.set())
    task = asyncio.create_task(watch.run())
    await asyncio.sleep(0)
    for line in ("link add v0 type veth peer name v1", "link set v0 up", "link set v1 up",
                 "addr add 192.0.2.2/24 dev v0", "route add default via 192.0.2.1"):
        subprocess.run(["ip", *line.split()], check=True)
    async with asyncio.timeout(60):
        while not (watch.now.addresses and watch.now.gateways):  # they may come one by one
            await told.wait()
            told.clear()
    now = watch.now
    print([(one.ip, one.prefix_bits) for one in now.addresses], [one.ip for one in now.gateways])
    print(now.beside(now.gateways[0]))
    task.cancel()

asyncio.run(main())
"""


def test_the_kernel_gives_notice_in_a_namespace() -> None:
    """A new address and its route are told before the next look is due."""
    if shutil.which("unshare") is None or shutil.which("ip") is None:
        pytest.skip("unshare and ip are needed (util-linux, iproute2)")
    if subprocess.run(["unshare", "--user", "--map-root-user", "--net", "true"], capture_output=True).returncode:
        pytest.skip("this user may not make a network namespace")
    command = ["unshare", "--user", "--map-root-user", "--net", sys.executable, "-c", _IN_NAMESPACE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["[('192.0.2.2', 24)] ['192.0.2.1']", "192.0.2.2"]


@pytest.mark.parametrize(("host", "has"), [("127.0.0.1", True), ("203.0.113.1", False), ("0.0.0.0", True)])
def test_an_address_is_this_machines_or_not(host: str, has: bool) -> None:
    assert has_address(host) is has
