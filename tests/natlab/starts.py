"""How long a newcomer takes, by the way on which it finds and reaches the others: real daemons in the lab.

    python -m tests.natlab.starts --tries 5 --out build/starts.jsonl    # one line a try; goes on where it stopped
    python -m tests.natlab.starts --table build/starts.jsonl

Two trainers have certified rounds already, each on a host of its own. Then the newcomer starts with nothing but its key
and the swarm's URI. Times are from the start of its process.
"""

import argparse
import json
import re
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from shoal.node.reachability import ReachState
from tests.natlab.daemons import NOBODY, LabPeer, LabSwarm
from tests.natlab.lab import Host, Lab
from tests.natlab.needs import find_missing
from tests.natlab.rules import Nat

POLL_S = 0.1
TRY_S = 120.0
GONE = f"/ip4/45.0.9.9/tcp/9460/p2p/{NOBODY}"  # an address that nobody has
TIMES = ("up_s", "peer_s", "control_s", "tensor_s", "round_s")


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """What came of one try, None where it did not happen within TRY_S: until its status answers, until it sees another
    peer, until it knows whether its control port and its tensor port can be dialled, until it has contributed to a
    certified round; and by which ways its tensor links came about."""

    way: str
    number: int
    up_s: float | None
    peer_s: float | None
    control_s: float | None
    tensor_s: float | None
    round_s: float | None
    paths: tuple[str, ...]


class Scene:
    """The hosts of one try, and the swarm on them."""

    def __init__(self, lab: Lab, folder: Path) -> None:
        self.lab = lab
        self.swarm = LabSwarm(folder, founders=2)
        self.relay: LabPeer | None = None
        self.uri = ""

    def begin(self, hosts: Sequence[Host], *, relay: bool = True) -> None:
        """The two trainers on these hosts; with a bootstrap peer of their own, or the first is one."""
        # The founders' keys belong to the first two that are named.
        first, second = (self.swarm.add_on(host, f"peer{number}") for number, host in enumerate(hosts, 1))
        if relay:
            self.relay = self.swarm.add_on(self.lab.add_host("relay"), "relay")
            self.uri = self.swarm.begin(self.relay, "--role", "bootstrap")
            first.start("join", self.uri)
        else:
            self.uri = self.swarm.begin(first)
        second.start("join", self.uri)
        self.swarm.wait("two train", lambda: all(one.contributes_after(1) for one in (first, second)))

    def watch(self, way: str, number: int, newcomer: LabPeer, *arguments: str) -> Start:
        """Start it, and note when what has happened."""
        at = max(peer.round for peer in self.swarm.peers if peer is not newcomer)
        begin_s = time.monotonic()
        newcomer.start(*arguments)
        seen: dict[str, float] = {}
        paths: set[str] = set()
        while time.monotonic() < begin_s + TRY_S and len(seen) < len(TIMES):
            status, now_s = newcomer.status(), time.monotonic() - begin_s
            if status is not None:
                seen.setdefault("up_s", now_s)
                if any(row.alive and not row.me for row in status.peers):
                    seen.setdefault("peer_s", now_s)
                if status.control.state is not ReachState.UNKNOWN:
                    seen.setdefault("control_s", now_s)
                if status.reach.state is not ReachState.UNKNOWN:
                    seen.setdefault("tensor_s", now_s)
                paths |= {row.path for row in status.peers if row.path}
                if "round_s" not in seen and newcomer.contributes_after(at):
                    seen["round_s"] = now_s
            time.sleep(POLL_S)
        times = dict.fromkeys(TIMES) | {name: round(at_s, 2) for name, at_s in seen.items()}
        return Start(way=way, number=number, paths=tuple(sorted(paths)), **times)


def start_in_public(scene: Scene, number: int) -> Start:
    """All have public addresses."""
    scene.begin([scene.lab.add_host("one"), scene.lab.add_host("two")])
    return scene.watch("public", number, scene.swarm.add_on(scene.lab.add_host("new"), "new"), "join", scene.uri)


def start_on_lan(scene: Scene, number: int) -> Start:
    """All are in one house, and every bootstrap peer is dead."""
    home = scene.lab.add_router("home", Nat.PORT_RESTRICTED)
    scene.begin([home.add_host("one"), home.add_host("two")], relay=False)
    uri = re.sub(r"\?bootstrap=.*", f"?bootstrap={GONE}", scene.uri)
    return scene.watch("lan", number, scene.swarm.add_on(home.add_host("new"), "new"), "join", uri)


def start_at_home(scene: Scene, number: int) -> Start:
    """The newcomer is behind a port-restricted router, the others have public addresses."""
    scene.begin([scene.lab.add_host("one"), scene.lab.add_host("two")])
    host = scene.lab.add_peer("new", Nat.PORT_RESTRICTED)
    return scene.watch("home", number, scene.swarm.add_on(host, "new"), "join", scene.uri)


def start_punched(scene: Scene, number: int) -> Start:
    """Everybody is behind a port-restricted router of the own."""
    scene.begin([scene.lab.add_peer(name, Nat.PORT_RESTRICTED) for name in ("one", "two")])
    host = scene.lab.add_peer("new", Nat.PORT_RESTRICTED)
    return scene.watch("punched", number, scene.swarm.add_on(host, "new"), "join", scene.uri)


def start_relayed(scene: Scene, number: int) -> Start:
    """The newcomer's router is symmetric, and the others' are port-restricted: nothing can be punched."""
    scene.begin([scene.lab.add_peer(name, Nat.PORT_RESTRICTED) for name in ("one", "two")])
    host = scene.lab.add_peer("new", Nat.SYMMETRIC)
    return scene.watch("relayed", number, scene.swarm.add_on(host, "new"), "join", scene.uri)


def come_back_without_bootstrap(scene: Scene, number: int) -> Start:
    """It has been in the swarm before, and by now the bootstrap peer is dead: the peer book is all it has."""
    scene.begin([scene.lab.add_host("one"), scene.lab.add_host("two")])
    newcomer = scene.swarm.add_on(scene.lab.add_peer("new", Nat.PORT_RESTRICTED), "new").start("join", scene.uri)
    scene.swarm.wait("it trains", lambda: newcomer.contributes_after(1))
    assert scene.relay is not None
    newcomer.kill()
    scene.relay.kill()
    return scene.watch("book", number, newcomer, "up")


WAYS: Mapping[str, Callable[[Scene, int], Start]] = {
    "public": start_in_public,
    "lan": start_on_lan,
    "home": start_at_home,
    "punched": start_punched,
    "relayed": start_relayed,
    "book": come_back_without_bootstrap,
}


def run_way(way: str, number: int = 0) -> Start:
    """One try, in a lab and a swarm of its own."""
    with tempfile.TemporaryDirectory(prefix="natlab-starts-") as folder, Lab() as lab:
        scene = Scene(lab, Path(folder))
        try:
            return WAYS[way](scene, number)
        finally:
            scene.swarm.end()


def write_table(starts: Sequence[Start]) -> str:
    """As Markdown, one row for each way: medians of the tries."""
    lines = [
        "| way | tries | tensor links | up | first peer | control port known | tensor port known | first round |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for way in dict.fromkeys(one.way for one in starts):
        own = [one for one in starts if one.way == way]
        paths = ", ".join(sorted({path for one in own for path in one.paths}))
        cells = [_describe([getattr(one, name) for one in own]) for name in TIMES]
        lines.append(f"| {way} | {len(own)} | {paths} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _describe(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    missing = f", {len(values) - len(known)} never" if len(known) < len(values) else ""
    return f"{statistics.median(known):.1f} s{missing}" if known else "never"


def read_starts(file: Path) -> list[Start]:
    return [Start(**json.loads(line)) for line in file.read_text().splitlines()] if file.exists() else []


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.natlab.starts", description=__doc__)
    parser.add_argument("--tries", type=int, default=1, help="of each way")
    parser.add_argument("--out", type=Path, default=Path("build/starts.jsonl"))
    parser.add_argument("--only", choices=tuple(WAYS), nargs="+", default=tuple(WAYS))
    parser.add_argument("--table", type=Path, help="run nothing, show this")
    arguments = parser.parse_args()
    if arguments.table:
        print(write_table(read_starts(arguments.table)))
        return 0
    missing = find_missing()
    if missing is not None:
        print(f"skipped: {missing}", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the daemons end with this process
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    for number in range(arguments.tries):
        for way in arguments.only:
            if (way, number) in {(one.way, one.number) for one in read_starts(arguments.out)}:
                continue
            one = run_way(way, number)
            with arguments.out.open("a") as file:
                file.write(json.dumps(asdict(one)) + "\n")
            print(one, flush=True)
    print(write_table(read_starts(arguments.out)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
