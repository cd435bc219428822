"""One real daemon over a made-up log, in a process of its own: a donor behind a slow line, a liar, or a joiner that is
timed. `python -m tests.e2e.log_peer '{"data_dir": …}'`; the fields are those of LogPeer.

What it tells goes to `events` in its folder, one JSON object a line.
"""

import asyncio
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import uvloop

from shoal.node.config import BOOTSTRAP, ON_DISK, load_config
from shoal.node.daemon import Daemon
from shoal.node.identity_file import hold_identity, load_or_create_identity, next_incarnation
from shoal.node.process import set_up_log
from shoal.protocol.errors import Refusal
from shoal.protocol.identity import PeerId, format_peer_id
from tests.e2e.certified_log import spoil
from tests.e2e.shaping_proxy import HOST

EVENTS = "events"
LOOK_S = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class LogPeer:
    """`rate` is the uplink in bytes per second, 0 for none. A liar flips a byte of everything that it serves. A donor
    serves `stalls_after` blobs and then nothing. A joiner begins when it sees `donors` peers. `lean` keeps the state in
    a file, for machines with less memory than peers."""

    data_dir: str
    control_port: int
    tensor_port: int
    bootstraps: tuple[str, ...] = ()
    rate: float = 0.0
    lies: bool = False
    stalls_after: int = -1
    donors: int = 0
    lean: bool = False

    @property
    def peer(self) -> PeerId:
        return load_or_create_identity(Path(self.data_dir) / "identity.key").peer

    @property
    def address(self) -> str:
        """Where others dial it."""
        return f"/ip4/{HOST}/tcp/{self.control_port}/p2p/{format_peer_id(self.peer)}"

    def start(self) -> "subprocess.Popen[bytes]":
        """Run it; kill it in the end."""
        with (Path(self.data_dir) / "log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-P", "-m", "tests.e2e.log_peer", json.dumps(asdict(self))],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                start_new_session=True,
            )

    def events(self, kind: str) -> list[dict[str, Any]]:
        """What it has told so far."""
        path = Path(self.data_dir) / EVENTS
        lines = path.read_text().splitlines() if path.exists() else []
        found = [json.loads(line) for line in lines if line.endswith("}")]
        return [one for one in found if one["kind"] == kind]

    def log(self) -> str:
        path = Path(self.data_dir) / "log"
        return path.read_text(errors="replace") if path.exists() else ""


class _Bucket:
    """An uplink: bytes leave at a constant rate, one blob after the other."""

    def __init__(self, bytes_per_s: float) -> None:
        self._rate = bytes_per_s
        self._free_s = 0.0

    async def take(self, nbytes: int) -> None:
        now = asyncio.get_running_loop().time()
        self._free_s = max(self._free_s, now) + nbytes / self._rate
        await asyncio.sleep(self._free_s - now)


class _Process:
    """The daemon, with what the test asks of it."""

    def __init__(self, options: LogPeer, daemon: Daemon) -> None:
        self._options = options
        self._daemon = daemon
        self._bucket = _Bucket(options.rate) if options.rate else None
        self._served = 0
        self._came_s = 0.0
        self._file = (Path(options.data_dir) / EVENTS).open("a", buffering=1)

    def tell(self, kind: str, **fields: object) -> None:
        self._file.write(json.dumps({"kind": kind, "at_s": time.monotonic(), **fields}) + "\n")

    async def _watch_bytes(self) -> None:
        """When the last byte of a piece came."""
        before = -1
        while True:
            came = sum(one.payload_bytes_in for one in self._daemon.links.statistics().peers)
            if came != before:
                before, self._came_s = came, time.monotonic()
            await asyncio.sleep(LOOK_S)

    def change(self, daemon: Daemon) -> None:
        """The daemon is ready: put in place what the options ask for."""
        honest_serve, honest_run = daemon.exchange.serve, daemon.rejoin.catch_up.run

        async def serve(peer: PeerId, digest: bytes) -> memoryview | Refusal | None:
            if 0 <= self._options.stalls_after <= self._served:
                await asyncio.Event().wait()
            self._served += 1  # before it waits: as many more may be asked for meanwhile
            number, found = self._served, await honest_serve(peer, digest)
            if not isinstance(found, memoryview):
                self._served -= 1
                return found
            self.tell("served", nbytes=found.nbytes)
            if self._bucket is not None:
                await self._bucket.take(found.nbytes)
            return spoil(found, number * 7919) if self._options.lies else found

        async def run(peer: PeerId, target: int) -> None:
            if daemon.rejoin.catch_up.active:
                return
            while len(daemon.rejoin.catch_up.donors.of_round(target)) < self._options.donors:
                await asyncio.sleep(LOOK_S)
            if daemon.rejoin.catch_up.active or daemon.core.head.round >= target:
                return
            cpu_s = time.process_time()
            began_s, first, before = time.monotonic(), daemon.core.head.round, daemon.rejoin.catch_up.fetched_bytes
            self.tell("began", head=first, target=target)
            watching = asyncio.create_task(self._watch_bytes())
            await honest_run(peer, target)
            watching.cancel()
            self.tell(
                "ended",
                head=daemon.core.head.round,
                first=first,
                seconds=time.monotonic() - began_s,
                fetch_s=self._came_s - began_s,
                cpu_s=time.process_time() - cpu_s,
                nbytes=daemon.rejoin.catch_up.fetched_bytes - before,
                root=daemon.core.head.state_root.hex(),
                snapshots=daemon.rejoin.catch_up.snapshots_taken,
            )

        daemon.exchange.serve = serve  # type: ignore[method-assign]
        daemon.rejoin.catch_up.run = run  # type: ignore[method-assign]
        self.tell("ready", head=daemon.core.head.round)


def main() -> None:
    given = json.loads(sys.argv[1])
    options = LogPeer(**given | {"bootstraps": tuple(given["bootstraps"])})
    overrides = {
        "data-dir": options.data_dir,
        "role": BOOTSTRAP,
        "control-host": HOST,
        "control-port": str(options.control_port),
        "tensor-host": HOST,
        "tensor-port": str(options.tensor_port),
        "web-port": "0",
    }
    if options.bootstraps:
        overrides["bootstrap"] = ",".join(options.bootstraps)
    if options.lean:
        overrides["vectors"] = ON_DISK
    config = load_config(None, overrides)
    set_up_log("info", "text")
    with hold_identity(config.data_path / "identity.key") as identity:
        incarnation = next_incarnation(config.data_path / "incarnation", time.time())

        async def serve() -> None:
            daemon = Daemon(config, identity, incarnation)
            await daemon.run(_Process(options, daemon).change)

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve())


if __name__ == "__main__":
    main()
