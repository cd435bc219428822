"""The lab is what it says: each kind of router maps and filters as named, proved by packets of plain sockets."""

import contextlib
import errno
import itertools
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.natlab import namespace, probes
from tests.natlab.lab import BOTH, Host, Lab
from tests.natlab.rules import Firewall, Nat
from tests.natlab.wire import SEGMENT_BYTES, Impairment

NATTED = (Nat.FULL_CONE, Nat.PORT_RESTRICTED, Nat.SYMMETRIC)
CONES = (Nat.FULL_CONE, Nat.PORT_RESTRICTED)
PORT6 = 7300
ANSWER6_S = 3.0  # the first packet also has to find its neighbours
PROBES = {"tcp": probes.probe_tcp, "udp": probes.probe_udp}
PUNCHES = {"tcp": probes.punch_tcp, "udp": probes.punch_udp}


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab() as made:
        yield made


@pytest.fixture
def servers(lab: Lab) -> tuple[Host, Host]:
    return lab.add_host("first"), lab.add_host("second")


@pytest.mark.parametrize("protocol", PROBES)
@pytest.mark.parametrize("nat", Nat)
def test_each_kind_maps_and_filters_as_named(lab: Lab, servers: tuple[Host, Host], nat: Nat, protocol: str) -> None:
    peer = lab.add_peer("peer", nat)
    found = PROBES[protocol](peer, *servers)
    outside = peer.address if nat is Nat.NONE else lab.nodes[2].address
    assert {address for address, _ in found.seen} == {outside}
    assert found.keeps_mapping is (nat is not Nat.SYMMETRIC), found.seen
    assert (found.seen[0][1] == probes.PORT) is (nat is not Nat.SYMMETRIC)
    assert found.known_port
    assert found.other_port is found.other_host is (nat in (Nat.NONE, Nat.FULL_CONE))
    assert found.unused_port is (nat is Nat.NONE)


@pytest.mark.parametrize("protocol", PUNCHES)
@pytest.mark.parametrize(
    "left,right", list(itertools.combinations_with_replacement(NATTED, 2)), ids=lambda nat: nat.value
)
def test_which_pairs_can_meet(lab: Lab, servers: tuple[Host, Host], left: Nat, right: Nat, protocol: str) -> None:
    """A symmetric NAT meets only who lets everybody in."""
    met = PUNCHES[protocol](lab.add_peer("left", left), lab.add_peer("right", right), servers[0])
    assert met is (Nat.SYMMETRIC not in (left, right) or Nat.FULL_CONE in (left, right))


@pytest.mark.parametrize("protocol", PUNCHES)
def test_routers_that_answer_unasked_packets(lab: Lab, servers: tuple[Host, Host], protocol: str) -> None:
    """They map and filter like the others. (Whether two can meet depends on whose packet is first.)"""
    router = lab.add_router("home", Nat.PORT_RESTRICTED, rejects=True)
    found = PROBES[protocol](router.add_host("peer"), *servers)
    assert found.keeps_mapping and not found.other_port and not found.other_host


@pytest.mark.parametrize("dialled_before", [True, False])
def test_a_dial_that_nobody_answered_is_in_the_way_of_a_hole(lab: Lab, dialled_before: bool) -> None:
    """The router lets the other side's knock in for it, the listener answers, and the router drops that answer, whose
    numbers are not those of the dial. The half-open connection then has the place that a knock of this side needs."""
    near, far = (lab.add_router(f"{name}-router", Nat.PORT_RESTRICTED) for name in ("near", "far"))
    here, there = near.add_host("near"), far.add_host("far")
    with (
        probes.open_socket(here, socket.SOCK_STREAM, probes.PORT, listens=True),
        probes.open_socket(there, socket.SOCK_STREAM, probes.PORT, listens=True),
    ):
        if dialled_before:
            assert _dial_from_port(here, far.address) == errno.ETIMEDOUT
        assert _dial_from_port(there, near.address) == errno.ETIMEDOUT
        assert _dial_from_port(here, far.address) == (errno.EADDRNOTAVAIL if dialled_before else errno.ETIMEDOUT)


def _dial_from_port(host: Host, address: str) -> int:
    """What came of it: 0 where somebody answered."""
    with probes.open_socket(host, socket.SOCK_STREAM, probes.PORT) as one:
        one.settimeout(probes.SILENCE_S)
        try:
            one.connect((address, probes.PORT))
        except TimeoutError:
            return errno.ETIMEDOUT
        except OSError as error:
            assert error.errno is not None
            return error.errno
    return 0


def test_double_nat(lab: Lab, servers: tuple[Host, Host]) -> None:
    carrier = lab.add_router("carrier", Nat.PORT_RESTRICTED, carrier=True)
    home = carrier.add_router("home", Nat.FULL_CONE)
    peer = home.add_host("peer")
    assert home.address.startswith("100.64.") and peer.address.startswith("192.168.")
    found = probes.probe_tcp(peer, *servers)
    assert set(found.seen) == {(carrier.address, probes.PORT)}
    assert not found.other_port and not found.other_host
    other = lab.add_peer("other", Nat.PORT_RESTRICTED)
    assert probes.punch_tcp(peer, other, servers[0])


def test_two_homes_with_the_same_addresses(lab: Lab, servers: tuple[Host, Host]) -> None:
    homes = [lab.add_router(name, Nat.PORT_RESTRICTED, base="192.168.1") for name in ("left", "right")]
    left, right = homes[0].add_host("in-left"), homes[1].add_host("in-right")
    assert left.address == right.address
    assert probes.punch_tcp(left, right, servers[0])


def test_blocked_udp(lab: Lab, servers: tuple[Host, Host]) -> None:
    router = lab.add_router("office", Nat.FULL_CONE)
    peer = router.add_host("peer")
    router.change(blocks_udp=True)
    assert probes.probe_tcp(peer, *servers).keeps_mapping
    with pytest.raises(TimeoutError):
        probes.probe_udp(peer, *servers)
    router.change(blocks_udp=False)
    assert probes.probe_udp(peer, *servers).keeps_mapping


@pytest.mark.parametrize("nat", NATTED)
@pytest.mark.parametrize("new_address", [True, False])
def test_a_rebooted_router_has_forgotten_everything(
    lab: Lab, servers: tuple[Host, Host], nat: Nat, new_address: bool
) -> None:
    router = lab.add_router("home", nat)
    peer = router.add_host("peer")
    before = router.address
    with (
        probes.open_socket(servers[0], socket.SOCK_STREAM, 7100, listens=True) as listener,
        probes.open_socket(peer, socket.SOCK_STREAM, probes.PORT) as own,
    ):
        own.connect((servers[0].address, 7100))
        accepted, _ = listener.accept()
        with accepted:
            router.reboot(new_address)
            assert (router.address != before) is new_address
            accepted.send(b"in?")
            own.settimeout(probes.SILENCE_S)
            with pytest.raises(TimeoutError):
                own.recv(64)
    assert {address for address, _ in probes.probe_tcp(peer, *servers).seen} == {router.address}


def test_a_host_moves(lab: Lab, servers: tuple[Host, Host]) -> None:
    home, cafe = lab.add_router("home", Nat.FULL_CONE), lab.add_router("cafe", Nat.SYMMETRIC)
    peer = home.add_host("peer")
    for network, outside in ((home, home), (cafe, cafe), (home, home)):
        peer.move(network)
        assert {address for address, _ in probes.probe_udp(peer, *servers).seen} == {outside.address}
    peer.move(lab.internet)
    assert {address for address, _ in probes.probe_udp(peer, *servers).seen} == {peer.address}


def test_a_foreign_private_address_is_silence(lab: Lab) -> None:
    """A dial to where nobody is waits, as on the real network; it is not refused at once."""
    peer = lab.add_peer("peer", Nat.PORT_RESTRICTED)
    with probes.open_socket(peer, socket.SOCK_STREAM, 0) as own:
        own.settimeout(probes.SILENCE_S)
        with pytest.raises(TimeoutError):
            own.connect(("192.168.77.7", 4001))


def test_a_wire_delays_loses_and_is_cut(lab: Lab) -> None:
    near = lab.add_host("near", Impairment(delay_s=0.05))
    far = lab.add_host("far")
    assert near.wire is not None
    assert 0.1 <= probes.measure_round_trip_s(near, far) < 1
    near.wire.impairment = Impairment(loss=0.5)
    with (
        probes.open_socket(near, socket.SOCK_DGRAM, 1) as sender,
        probes.open_socket(far, socket.SOCK_DGRAM, 2) as inbox,
    ):
        for _ in range(200):
            sender.sendto(b"x", (far.address, 2))
        got = 0
        with contextlib.suppress(TimeoutError):
            while inbox.recv(8):
                got += 1
        assert 50 < got < 150
        near.wire.is_cut = True
        sender.sendto(b"x", (far.address, 2))
        with pytest.raises(TimeoutError):
            inbox.recv(8)


@pytest.mark.parametrize("segmented", [True, False])
def test_a_wire_carries_a_stream_whole_in_frames_of_a_cable_or_many_at_once(lab: Lab, segmented: bool) -> None:
    near, far = lab.add_host("near", Impairment(delay_s=0.001, segmented=segmented)), lab.add_host("far")
    assert near.wire is not None
    payload = os.urandom(8 << 20)
    with (
        probes.open_socket(far, socket.SOCK_STREAM, 1) as listener,
        probes.open_socket(near, socket.SOCK_STREAM, 2) as sender,
    ):
        listener.listen()
        sender.connect((far.address, 1))
        with listener.accept()[0] as receiver:
            sending = threading.Thread(target=sender.sendall, args=(payload,))
            sending.start()
            got = _read(receiver, len(payload))
            sending.join()
    assert got == payload
    frames_of_a_cable = len(payload) // SEGMENT_BYTES
    assert near.wire.carried >= frames_of_a_cable if segmented else near.wire.carried < frames_of_a_cable / 2


def _read(receiver: socket.socket, nbytes: int) -> bytes:
    got = bytearray()
    while len(got) < nbytes and (piece := receiver.recv(1 << 20)):
        got += piece
    return bytes(got)


@pytest.mark.parametrize(
    ("firewall", "goes_out", "lets_in"),
    [(Firewall.OPEN, True, True), (Firewall.STATEFUL, True, False), (Firewall.BLACK_HOLE, False, False)],
)
def test_ipv6_is_filtered_and_not_rewritten(firewall: Firewall, goes_out: bool, lets_in: bool) -> None:
    with Lab() as lab:
        server = lab.add_host("server", families=BOTH)
        router = lab.add_router("home", Nat.SYMMETRIC, families=BOTH, firewall=firewall)
        peer = router.add_host("peer")
        assert _see6(peer, server) == (peer.address6 if goes_out else None)
        assert _see6(server, peer) == (server.address6 if lets_in else None)
        if goes_out:
            old = peer.begin_address6()
            assert _see6(peer, server) == peer.address6 != old, "nothing new leaves from a deprecated address"
            peer.end_address6(old)
            router.reboot()
            assert _see6(peer, server) == peer.address6


def _see6(dialer: Host, listener: Host) -> str | None:
    """As whom the listener sees the dialer by IPv6; None where it is not reached."""

    def listen() -> socket.socket:
        return socket.create_server(("::", PORT6), family=socket.AF_INET6)

    with listener.call(listen) as listening:
        listening.settimeout(ANSWER6_S)
        try:
            dialer.call(lambda: socket.create_connection((listener.address6, PORT6), ANSWER6_S).close())
        except TimeoutError:
            return None
        accepted, address = listening.accept()
        accepted.close()
        return str(address[0])


def test_the_machines_own_network_is_left_alone() -> None:
    def look() -> list[str]:
        forwarding = Path("/proc/sys/net/ipv4/ip_forward").read_text()
        return [forwarding, *(namespace.run("ip", "-o", *words) for words in (["link"], ["route"], ["address"]))]

    before = look(), namespace.list_own()
    with Lab() as lab:
        router = lab.add_router("home", Nat.FULL_CONE)
        router.add_host("peer", Impairment()).popen("sleep", "1000")
        assert look() == before[0]
        inside = namespace.run("ip", "netns", "pids", lab.nodes[1].space.name).split()
        assert len(inside) == 1
    assert (look(), namespace.list_own()) == before
    with pytest.raises(ProcessLookupError):
        os.kill(int(inside[0]), 0)


def test_what_a_dead_run_left_is_removed() -> None:
    """By the next one; what belongs to a run that lives stays."""
    script = """if True:
        import os, signal, subprocess
        from tests.natlab.lab import Lab
        from tests.natlab.namespace import list_own
        from tests.natlab.rules import Nat
        lab = Lab()
        host = lab.add_router("home", Nat.SYMMETRIC).add_host("peer")
        sleeper = host.popen("sh", "-c", "echo it is inside; exec sleep 1000", stdout=subprocess.PIPE)
        sleeper.stdout.readline()
        print(sleeper.pid, *list_own(), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)"""
    with Lab() as lab:
        lab.add_host("stays")
        mine = set(namespace.list_own())
        done = subprocess.run(
            [sys.executable, "-c", script], timeout=60, check=False, stdout=subprocess.PIPE, text=True
        )
        pid, *left = done.stdout.split()
        assert done.returncode == -9 and len(left) == 3
        namespace.remove_stale()
        present = {file.name for file in namespace.FOLDER.iterdir()}
        assert mine <= present and not present & set(left)
        with contextlib.suppress(FileNotFoundError):  # gone, or dead and not yet collected by its parent
            assert ") Z " in Path(f"/proc/{pid}/stat").read_text()
