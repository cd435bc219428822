"""What plain TCP makes of given lines: each of some hosts sends each other one as many bytes, all of them at once.

Nothing is encoded, sealed, reduced or decided, no byte waits for another one: what an exchange that must move as much
can reach at most. Connections stay from one transfer to the next, as those of a swarm do. Used by
benchmarks.shaped_lines, which runs one process of this module at each host:

    python -m benchmarks.plain_tcp     # standard input: a PlainSpec as JSON, then a line for every transfer
"""

import json
import socket
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass

from shoal.node.bench.allreduce import WARMUP_ROUNDS
from shoal.node.bench.processes import Place, measured

PORT = 4801
BUFFER_BYTES = 1 << 18
CONNECT_TIMEOUT_S = 30.0
TRANSFER_TIMEOUT_S = 600.0
PAUSE_S = 1.0  # between transfers, as between rounds


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainSpec:
    """`nbytes` go from each host to each other one, over `links` connections."""

    me: int
    hosts: tuple[str, ...]
    links: int
    nbytes: int


def measure_plain(places: Sequence[Place], nbytes: int, links: int, rounds: int) -> float:
    """The median of the seconds until the last host has all bytes. Raises BenchFailed."""
    hosts = tuple(place.host for place in places)
    with ExitStack() as stack:
        specs = [PlainSpec(me=number, hosts=hosts, links=links, nbytes=nbytes) for number in range(len(hosts))]
        ends = [
            stack.enter_context(measured(place, ("-m", "benchmarks.plain_tcp"), asdict(spec)))
            for place, spec in zip(places, specs, strict=True)
        ]
        for end in ends:
            end.wait("connected", CONNECT_TIMEOUT_S)
        times_s = []
        for _ in range(WARMUP_ROUNDS + rounds):
            time.sleep(PAUSE_S)
            began_s = time.monotonic()
            for end in ends:
                end.tell("go")
            for end in ends:
                end.wait("done", TRANSFER_TIMEOUT_S)
            times_s.append(time.monotonic() - began_s)
    return statistics.median(times_s[WARMUP_ROUNDS:])


def _connect(spec: PlainSpec) -> list[socket.socket]:
    """All connections of a host: those before it in the list are dialled, those after it dial."""
    deadline_s = time.monotonic() + CONNECT_TIMEOUT_S
    with socket.create_server((spec.hosts[spec.me], PORT), backlog=128) as server:
        server.settimeout(CONNECT_TIMEOUT_S)
        made = [_dial(host, deadline_s) for host in spec.hosts[: spec.me] for _ in range(spec.links)]
        later = len(spec.hosts) - spec.me - 1
        made += [server.accept()[0] for _ in range(later * spec.links)]
    for one in made:
        one.settimeout(TRANSFER_TIMEOUT_S)
    return made


def _dial(host: str, deadline_s: float) -> socket.socket:
    while True:
        try:
            return socket.create_connection((host, PORT), timeout=CONNECT_TIMEOUT_S)
        except ConnectionRefusedError:  # it is not up yet
            if time.monotonic() > deadline_s:
                raise
            time.sleep(0.05)


def _send(link: socket.socket, nbytes: int) -> None:
    buffer = memoryview(bytes(BUFFER_BYTES))
    for first in range(0, nbytes, BUFFER_BYTES):
        link.sendall(buffer[: nbytes - first])


def _receive(link: socket.socket, nbytes: int) -> None:
    buffer = memoryview(bytearray(BUFFER_BYTES))
    while nbytes:
        count = link.recv_into(buffer[:nbytes])
        if not count:
            raise ConnectionError("the other host hung up")
        nbytes -= count


def _transfer(links: Sequence[socket.socket], nbytes: int) -> None:
    with ThreadPoolExecutor(max_workers=2 * len(links)) as pool:
        for done in [pool.submit(step, link, nbytes) for link in links for step in (_send, _receive)]:
            done.result()


def main() -> int:
    fields = json.loads(sys.stdin.readline())
    spec = PlainSpec(**{**fields, "hosts": tuple(fields["hosts"])})
    links = _connect(spec)
    print('{"event": "connected"}', flush=True)
    for _ in sys.stdin:
        _transfer(links, spec.nbytes // spec.links)
        print('{"event": "done"}', flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
