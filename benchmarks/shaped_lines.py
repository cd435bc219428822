"""Rounds between peers whose lines are slow and far: how much of the line an exchange uses.

    python -m benchmarks.shaped_lines [--peers 2] [--mib 64] [--codec int8] [--mbit 100] [--rtt-ms 20] [--loss 0]
                                      [--slow-mbit RATE] [--congestion NAME] [--rounds 5] [--folder DIR] [--json FILE]

Every peer is a process in a network namespace of its own, at the end of a line of so many Mbit/s in each direction; a
packet from one peer to another and its answer take the round-trip time. Needs what tests/natlab needs. The least time
is that of the payload bytes which a line must carry one way, at its whole rate. Headers of TCP, IP and Ethernet take
4.4 % of it and acknowledgements some 2 %, so that 94 % is the most that can be reached. A line holds half a second
of bytes before it drops packets. With --slow-mbit the last peer's line is of that rate; what it must carry at least is
then its contribution one way and the update the other, since such a peer need own no parts. --congestion is the
congestion control of the peers' TCP, such as cubic or bbr; without it the machine's own. After the rounds, and where
all lines are alike, plain TCP moves as many bytes between the same hosts over the same lines, by one connection a pair
and by four (benchmarks/plain_tcp.py): the better one is what these lines can do at most.
"""

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.plain_tcp import measure_plain
from shoal.node.bench.allreduce import AllreduceOptions, run_allreduce
from shoal.node.bench.commands import describe_machine
from shoal.node.bench.processes import Place
from shoal.node.pacer import BYTES_PER_MBIT
from shoal.protocol.codecs import CODECS
from tests.natlab.lab import Lab
from tests.natlab.needs import find_missing
from tests.natlab.wire import Impairment

SEGMENTED_MBIT_MAX = 100  # faster lines carry some dozens of packets at once, or this program could not keep up
LINES_PER_WAY = 4  # to the other peer and back again: two lines each
PLAIN_LINKS = (1, 4)

CONGESTION = Path("/proc/sys/net/ipv4/tcp_congestion_control")


def run_case(
    options: AllreduceOptions, line: Impairment, slow: Impairment | None = None, congestion: str | None = None
) -> dict[str, Any]:
    """The rounds, and what share of their time the lines would have needed at least; `slow` is that of the last."""
    with ExitStack() as stack:
        lab = stack.enter_context(Lab())
        lines = [line] * (options.peers - 1) + [slow or line]
        hosts = [lab.add_host(f"peer{number}", one) for number, one in enumerate(lines)]
        for host in hosts if congestion else ():
            host.space.call(lambda: CONGESTION.write_text(f"{congestion}\n"))
        used = {host.space.call(CONGESTION.read_text).strip() for host in hosts}
        places = [Place(host=host.address, prefix=tuple(host.space.prefix)) for host in hosts]
        result = run_allreduce(options, lambda text: None, places)
        plain_s = None if slow is not None else _measure_plain(options, places)
    encoded = _count_encoded(options)
    # A peer sends the parts that others own, and those that it owns to all others.
    least_s = (options.peers - 1) / options.peers * sum(encoded) / line.bytes_per_s
    if slow is not None:
        least_s = max(least_s, *(one / slow.bytes_per_s for one in encoded))
    return {
        **result.to_json(),
        "congestion": sorted(used),
        "line": asdict(line),
        "slow": asdict(slow) if slow is not None else None,
        "least_s": least_s,
        "share_of_exchange": least_s / result.median.exchange_s,
        "share_of_round": least_s / result.median.step_s,
        "plain_tcp_s": plain_s,
        "share_of_plain_tcp": None if plain_s is None else plain_s / result.median.exchange_s,
    }


def _count_encoded(options: AllreduceOptions) -> list[int]:
    """The bytes of a whole contribution and of a whole update."""
    return [CODECS[name].encoded_bytes(options.elements) for name in (options.codec, options.codec_out)]


def _measure_plain(options: AllreduceOptions, places: Sequence[Place]) -> float:
    """To each other peer go its parts of the contribution, and one's own of the update."""
    nbytes = sum(_count_encoded(options)) // options.peers
    return min(measure_plain(places, nbytes, links, options.rounds) for links in PLAIN_LINKS)


def main() -> int:
    parser = argparse.ArgumentParser(description="rounds between peers with slow and far lines")
    parser.add_argument("--peers", type=int, default=2)
    parser.add_argument("--mib", type=float, default=64.0)
    parser.add_argument("--codec", default="int8")
    parser.add_argument("--update-codec")
    parser.add_argument("--mbit", type=float, default=100.0)
    parser.add_argument("--rtt-ms", type=float, default=20.0)
    parser.add_argument("--loss", type=float, default=0.0, help="share of the packets, on every line and way")
    parser.add_argument("--slow-mbit", type=float, help="the rate of the last peer's line")
    parser.add_argument("--congestion", help="bbr, cubic, reno: what this kernel allows")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--part-elements", type=int)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    missing = find_missing()
    if missing is not None:
        print(f"skipped: {missing}", file=sys.stderr)
        return 1
    wanted = AllreduceOptions(
        peers=options.peers,
        mib=options.mib,
        codec=options.codec,
        update_codec=options.update_codec,
        rounds=options.rounds,
        part_elements=options.part_elements,
        folder=options.folder,
    )
    line, slow = (
        rate_mbit
        and Impairment(
            delay_s=options.rtt_ms / 1000 / LINES_PER_WAY,
            loss=options.loss,
            bytes_per_s=rate_mbit * BYTES_PER_MBIT,
            segmented=options.loss > 0 or rate_mbit <= SEGMENTED_MBIT_MAX,
        )
        for rate_mbit in (options.mbit, options.slow_mbit)
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the peers end with this process
    figures = run_case(wanted, line, slow, options.congestion)
    median = figures["median"]
    print(
        f"{options.peers} peers, {options.mib:g} MiB, {options.codec}, {options.mbit:g} Mbit/s"
        f"{f', the last one {options.slow_mbit:g}' if slow else ''}, {options.rtt_ms:g} ms, "
        f"{options.loss:.1%} lost, {', '.join(figures['congestion'])}: "
        f"round {median['step_s']:.2f} s, exchange {median['exchange_s']:.2f} s, "
        f"least {figures['least_s']:.2f} s: {figures['share_of_exchange']:.0%} of the exchange, "
        f"{figures['share_of_round']:.0%} of the round; loop p99 {figures['lag_p99_ms']:.0f} ms"
    )
    if figures["plain_tcp_s"] is not None:
        print(f"plain TCP {figures['plain_tcp_s']:.2f} s: {figures['share_of_plain_tcp']:.0%} of the exchange")
    if options.json:
        options.json.write_text(json.dumps({**describe_machine(), **figures}, indent=2, default=str) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
