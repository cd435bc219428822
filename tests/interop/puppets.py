"""Processes that tests drive by JSON lines: our own host, and nodes of other implementations.

Invariants: every wait has a limit; what a process says on stderr is shown when a test fails; all end with the test.
"""

import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
# How long a test waits for what must come; nothing waits this long when all is well.
PATIENCE_S = 30.0
START_TIMEOUT_S = 60.0
LINE_BYTES_MAX = 2**24
KAD_PROTOCOL = "/ipfs/kad/1.0.0"
RUST_PYTHON = ROOT / "build/interop/rust/bin/python"
LOOPBACK = "/ip4/127.0.0.1/tcp/0"


def choose_port() -> int:
    """A port of loopback that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class CallFailed(Exception):
    """The process answered a command with an error."""


class Puppet:
    """One process, after `start`. `peer` and `addresses` are what it said of itself."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.peer = ""
        self.addresses: tuple[str, ...] = ()
        self._process: asyncio.subprocess.Process | None = None
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._events: list[dict[str, Any]] = []
        self._news = asyncio.Condition()
        self._reading: asyncio.Task[None] | None = None
        self._calls = 0

    async def start(self, command: list[str], first_line: Mapping[str, object], environment: dict[str, str]) -> None:
        """Start the process and wait until it says that it has."""
        self._process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=LINE_BYTES_MAX,
            env={**os.environ, **environment},
            cwd=ROOT,
            start_new_session=True,
        )
        self._reading = asyncio.create_task(self._read())
        self._write(first_line)
        started = await self.expect("started", within_s=START_TIMEOUT_S)
        self.peer, self.addresses = started["peer"], tuple(started["addresses"])

    async def call(self, call: str, *args: object) -> Any:
        """What the process answers; raises CallFailed."""
        self._calls += 1
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._answers[self._calls] = future
        self._write({"id": self._calls, "call": call, "args": args})
        async with asyncio.timeout(PATIENCE_S):
            return await future

    async def expect(self, event: str, within_s: float = PATIENCE_S, **values: object) -> dict[str, Any]:
        """The first event of this kind with these values that was not taken yet."""

        def find() -> dict[str, Any] | None:
            for one in self._events:
                if one["event"] == event and all(one.get(name) == value for name, value in values.items()):
                    return one
            return None

        try:
            async with asyncio.timeout(within_s), self._news:
                await self._news.wait_for(lambda: find() is not None or self._has_ended())
        except TimeoutError:
            raise AssertionError(f"{self.name}: no {event} {values} among {self._events}") from None
        found = find()
        assert found is not None, f"{self.name} has ended, without {event} {values}"
        self._events.remove(found)
        return found

    def name_key(self, key: bytes) -> str:
        """How this process is told a key of the DHT."""
        return key.decode() if self.name.startswith("rust") else key.hex()

    async def stop(self) -> None:
        """End the process."""
        if self._process is None:
            return
        assert self._process.stdin is not None and self._reading is not None
        self._process.stdin.close()
        with suppress(TimeoutError):
            async with asyncio.timeout(5):
                await self._process.wait()
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        await self._process.wait()
        await self._reading

    def _has_ended(self) -> bool:
        return self._reading is not None and self._reading.done()

    def _write(self, line: Mapping[str, object]) -> None:
        assert self._process is not None and self._process.stdin is not None
        self._process.stdin.write(json.dumps(line).encode() + b"\n")

    async def _read(self) -> None:
        assert self._process is not None and self._process.stdout is not None
        while (line := await self._process.stdout.readline()).endswith(b"\n"):
            said = json.loads(line)
            if "event" in said:
                self._events.append(said)
                async with self._news:
                    self._news.notify_all()
                continue
            future = self._answers.pop(said["id"])
            if future.done():
                continue
            if "error" in said:
                future.set_exception(CallFailed(f"{self.name}: {said['error']}"))
            else:
                future.set_result(said["result"])
        for future in self._answers.values():
            if not future.done():
                future.set_exception(CallFailed(f"{self.name} has ended"))
        asyncio.get_running_loop().call_soon(asyncio.ensure_future, self._tell_ended())

    async def _tell_ended(self) -> None:
        async with self._news:
            self._news.notify_all()


class Theatre:
    """Starts puppets and stops them all. Each has a seed of its own, and so a peer id that is the same in every run."""

    def __init__(self) -> None:
        self._puppets: list[Puppet] = []

    async def start_ours(
        self,
        *,
        security: tuple[str, ...] = ("noise", "tls"),
        serves_dht: bool = True,
        listen: str = LOOPBACK,
        bootstrap: tuple[str, ...] = (),
        reachability: str | None = None,
        protocol_version: str | None = None,
        inside: tuple[str, ...] = (),
    ) -> Puppet:
        """The production host in a process. `reachability` is given to it, for on loopback nobody would find it out:
        one that is "reachable" relays, one that is "private" keeps a place at a relay. `inside` is a command that runs
        another one elsewhere."""
        first = {
            "security": security,
            "serves_dht": serves_dht,
            "listen": [listen],
            "bootstrap": bootstrap,
            "reachability": reachability,
            "protocol_version": protocol_version,
            "seed": self._seed(),
        }
        return await self._start("ours", [*inside, sys.executable, "-m", "tests.interop.host"], first, {})

    async def start_js(
        self,
        *,
        security: tuple[str, ...] = ("noise",),
        serves_dht: bool = True,
        relays: bool = False,
        listen: tuple[str, ...] = (LOOPBACK,),
        announce: tuple[str, ...] = (),
        inside: tuple[str, ...] = (),
    ) -> Puppet:
        """A js-libp2p node. Without AutoNAT it tells nobody of a public address but of what it is to `announce`."""
        scripts = HERE / "js"
        command = [*inside, "node", "--import", str(scripts / "polyfill.mjs"), str(scripts / "node.mjs")]
        first = {
            "security": security,
            "serves_dht": serves_dht,
            "relays": relays,
            "listen": listen,
            "announce": announce,
            "seed": self._seed(),
        }
        return await self._start("js", command, first, {})

    async def start_rust(
        self,
        *,
        bootstrap: tuple[str, ...] = (),
        relays: tuple[str, ...] = (),
        listens: bool = True,
    ) -> Puppet:
        """A rust-libp2p node, which takes up connections by itself: to `bootstrap`, and to `relays` for a place."""
        first = {
            "listen": [f"/ip4/127.0.0.1/tcp/{choose_port()}"] if listens else [],
            "bootstrap": bootstrap,
            "relays": relays,
            "protocol": KAD_PROTOCOL,
        }
        return await self._start("rust", [str(RUST_PYTHON), str(HERE / "rust_node.py")], first, {})

    async def stop(self) -> None:
        """End all processes."""
        await asyncio.gather(*(puppet.stop() for puppet in self._puppets))

    def _seed(self) -> str:
        return bytes([len(self._puppets) + 1]).hex() * 32

    async def _start(
        self, name: str, command: list[str], first_line: Mapping[str, object], environment: dict[str, str]
    ) -> Puppet:
        puppet = Puppet(f"{name} {len(self._puppets)}")
        self._puppets.append(puppet)
        await puppet.start(command, first_line, environment)
        return puppet
