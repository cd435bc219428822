"""Two real daemons and a public one with IPv6 in every shape that homes have it: alone, beside an IPv4 behind a NAT,
leading nowhere.

    python -m tests.natlab.families --tries 5 --out build/families.jsonl    # one line a try; goes on where it stopped
    python -m tests.natlab.families --table build/families.jsonl
"""

import argparse
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tests.natlab.daemons import LabSwarm
from tests.natlab.lab import BOTH, IPV4, IPV6, Host, Lab
from tests.natlab.needs import find_missing
from tests.natlab.pairs import Pair, Try, read_tries, record, write_cells
from tests.natlab.rules import Firewall, Nat

SYMMETRIC, RESTRICTED = Nat.SYMMETRIC, Nat.PORT_RESTRICTED
Hosts = tuple[Host, Host]


def _ipv6_alone(lab: Lab) -> Hosts:
    """Both have IPv6 alone, behind firewalls."""
    return _add_home(lab, "left", families=IPV6), _add_home(lab, "right", families=IPV6)


def _ipv6_and_dual(lab: Lab) -> Hosts:
    """One has IPv6 alone, the other one both."""
    return _add_home(lab, "left", families=IPV6), _add_home(lab, "right")


def _ipv6_and_ipv4(lab: Lab) -> Hosts:
    """One has IPv6 alone, the other one IPv4 alone: only a member that has both can bring them together."""
    return _add_home(lab, "left", families=IPV6), _add_home(lab, "right", families=IPV4)


def _ipv6_open_and_ipv4_public(lab: Lab) -> Hosts:
    """The same, and each of them can be dialled by whoever has its family."""
    return lab.add_host("left", families=IPV6), lab.add_host("right")


def _symmetric_beside_ipv6(lab: Lab) -> Hosts:
    """IPv4 behind carriers' NATs, through which nothing can be punched, and IPv6 beside it."""
    return _add_home(lab, "left", SYMMETRIC), _add_home(lab, "right", SYMMETRIC)


def _symmetric_and_restricted_beside_ipv6(lab: Lab) -> Hosts:
    return _add_home(lab, "left", SYMMETRIC), _add_home(lab, "right", RESTRICTED)


def _black_hole_and_public(lab: Lab) -> Hosts:
    """The IPv6 of one leads nowhere; the other one can be dialled by either."""
    return _add_home(lab, "left", firewall=Firewall.BLACK_HOLE), lab.add_host("right", families=BOTH)


def _black_hole_and_home(lab: Lab) -> Hosts:
    """The IPv6 of one leads nowhere; the other one's works, and its IPv4 can be punched."""
    return _add_home(lab, "left", firewall=Firewall.BLACK_HOLE), _add_home(lab, "right")


CASES: Mapping[str, Callable[[Lab], Hosts]] = {
    "ipv6 / ipv6": _ipv6_alone,
    "ipv6 / both": _ipv6_and_dual,
    "ipv6 / ipv4": _ipv6_and_ipv4,
    "ipv6 open / ipv4 public": _ipv6_open_and_ipv4_public,
    "symmetric + ipv6 / symmetric + ipv6": _symmetric_beside_ipv6,
    "symmetric + ipv6 / port_restricted + ipv6": _symmetric_and_restricted_beside_ipv6,
    "dead ipv6 / public": _black_hole_and_public,
    "dead ipv6 / both": _black_hole_and_home,
}


def _add_home(
    lab: Lab,
    name: str,
    nat: Nat = RESTRICTED,
    *,
    families: frozenset[int] = BOTH,
    firewall: Firewall = Firewall.STATEFUL,
) -> Host:
    return lab.add_router(f"{name}-router", nat, families=families, firewall=firewall).add_host(name)


def make_pair(lab: Lab, swarm: LabSwarm, case: str) -> Pair:
    """The case's two hosts, and a public one with both families beside them."""
    swarm.peers.clear()
    left, right = case.split(" / ")
    return Pair(swarm, (left, right), lab.add_host("relay", families=BOTH), *CASES[case](lab))


def run_case(swarm: LabSwarm, case: str, number: int = 0) -> Try:
    """One try, in a lab of its own; the swarm is only its manifest and its founders' keys."""
    with Lab() as lab:
        return make_pair(lab, swarm, case).run(number)


def write_table(tries: Sequence[Try]) -> str:
    """As Markdown, one row for each case."""
    lines = [
        "| left | right | tries | linked | how | wish to link, median / most | both up to link | round |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in dict.fromkeys((one.left, one.right) for one in tries):
        lines.append(write_cells(*case, [one for one in tries if (one.left, one.right) == case]))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.natlab.families", description=__doc__)
    parser.add_argument("--tries", type=int, default=1, help="of each case")
    parser.add_argument("--out", type=Path, default=Path("build/families.jsonl"))
    parser.add_argument("--only", choices=tuple(CASES), nargs="+", default=tuple(CASES))
    parser.add_argument("--table", type=Path, help="run nothing, show this")
    arguments = parser.parse_args()
    if arguments.table:
        print(write_table(read_tries(arguments.table)))
        return 0
    missing = find_missing()
    if missing is not None:
        print(f"skipped: {missing}", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the daemons end with this process
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="natlab-") as folder:
        swarm = LabSwarm(Path(folder), founders=2)
        for number in range(arguments.tries):
            for case in arguments.only:
                done = [(f"{one.left} / {one.right}", one.number) for one in read_tries(arguments.out)]
                if (case, number) not in done:
                    record(swarm, arguments.out, run_case(swarm, case, number))
    print(write_table(read_tries(arguments.out)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
