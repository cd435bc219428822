"""A lab to try things in by hand: `python -m tests.natlab full_cone symmetric` builds it and says how to get in.

One host and its router for each kind that is named, and a public host `relay` beside them. Ctrl-C removes everything.
"""

import argparse
import signal
import sys
from contextlib import suppress

from tests.natlab.lab import Lab, Router
from tests.natlab.needs import find_missing
from tests.natlab.rules import Nat


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.natlab", description=__doc__)
    kinds = [nat.value for nat in Nat]
    parser.add_argument("kind", nargs="+", choices=kinds, help="a host behind a router of this kind: peer1, peer2, …")
    arguments = parser.parse_args()
    missing = find_missing()
    if missing is not None:
        print(missing, file=sys.stderr)
        return 1
    with Lab() as lab:
        lab.add_host("relay")
        for number, kind in enumerate(arguments.kind, 1):
            lab.add_peer(f"peer{number}", Nat(kind))
        for node in lab.nodes:
            what = f"router, {node.policy.nat.value}" if isinstance(node, Router) else "host"
            print(f"{node.name:14} {what:24} {node.address:16} {' '.join(node.space.prefix)} bash")
        print("Ctrl-C removes all of it.", flush=True)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with suppress(KeyboardInterrupt):
            signal.pause()
    return 0


if __name__ == "__main__":
    sys.exit(main())
