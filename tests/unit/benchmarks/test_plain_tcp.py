"""What the exchange on shaped lines is compared with: plain TCP that moves as many bytes, and waits for all of them."""

import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from benchmarks import plain_tcp
from benchmarks.plain_tcp import BUFFER_BYTES, measure_plain
from shoal.node.bench.processes import BenchFailed, Place

TIMEOUT_S = 60.0
# Of loopback, and nobody else's.
HOSTS = tuple(f"127.48.1.{number}" for number in (1, 2, 3))


def make_links(count: int) -> tuple[list[socket.socket], list[socket.socket]]:
    pairs = [socket.socketpair() for _ in range(count)]
    for pair in pairs:
        for one in pair:
            one.settimeout(TIMEOUT_S)
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


@pytest.mark.parametrize("nbytes", [1, BUFFER_BYTES, 3 * BUFFER_BYTES + 17])
def test_so_many_bytes_go_each_way_on_every_link(nbytes: int) -> None:
    here, there = make_links(2)
    received = [bytearray() for _ in there]

    def swap(number: int) -> None:
        while len(received[number]) < nbytes:
            received[number] += there[number].recv(BUFFER_BYTES)
        there[number].sendall(b"x" * (nbytes + 1))

    with ThreadPoolExecutor() as pool:
        swaps = [pool.submit(swap, number) for number in range(len(there))]
        plain_tcp._transfer(here, nbytes)
        for one in swaps:
            one.result()
    for mine, other in zip(here, there, strict=True):
        assert mine.recv(2) == b"x", "what is not of this transfer is left for the next"
        mine.close()
        assert other.recv(1) == b"", "and no byte too many was sent"
        other.close()
    assert [len(one) for one in received] == [nbytes] * len(there)


def test_a_host_that_hangs_up_ends_the_transfer() -> None:
    (here,), (there,) = make_links(1)
    there.close()
    with here, pytest.raises(ConnectionError):
        plain_tcp._transfer([here], 10)


def test_hosts_are_measured_in_processes_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain_tcp, "PAUSE_S", 0.0)
    assert 0 < measure_plain([Place(host=host) for host in HOSTS], nbytes=1000, links=2, rounds=1) < TIMEOUT_S


def test_a_host_that_cannot_be_is_told_of_with_its_last_words() -> None:
    with pytest.raises(BenchFailed, match="a measured process ended"):
        measure_plain([Place(host="192.0.2.1")], nbytes=1000, links=1, rounds=1)
