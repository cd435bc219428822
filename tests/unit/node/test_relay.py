"""The relay node, in this process and as a command."""

import asyncio
import dataclasses
import os
import re
import signal
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from shoal.dht.keys import lookup_keys
from shoal.node.config import BOOTSTRAP, ControlTable, NodeConfig, NodeTable, WebTable
from shoal.node.control import PeerUnreachable, RequestRefused
from shoal.node.manifest_source import _meet_members
from shoal.node.reachability import ReachState
from shoal.node.relay import RelayNode
from shoal.protocol.errors import Refusal
from shoal.protocol.identity import Identity
from shoal.protocol.manifest import SwarmUri
from tests.unit.node.control_contract import PATIENCE_S, SWARM, gossip_until_heard
from tests.unit.node.test_libp2p_relays import Net, circuits, path, until

ROOT = Path(__file__).parents[3]


def make_config(folder: Path, swarm: str | None = None) -> NodeConfig:
    return NodeConfig(
        node=NodeTable(data_dir=str(folder), role=BOOTSTRAP, swarm=swarm),
        control=ControlTable(host="127.0.0.1", port=0),
        web=WebTable(port=0),
    )


class Running:
    """A relay node that runs in a task."""

    def __init__(self, config: NodeConfig) -> None:
        self.node = RelayNode(config, Identity(b"relay".ljust(32)))
        self._ready = asyncio.Event()
        self._task = asyncio.create_task(self.node.run(lambda node: self._ready.set()))

    async def start(self) -> "Running":
        async with asyncio.timeout(PATIENCE_S):
            await self._ready.wait()
        return self

    async def stop(self) -> None:
        self.node.stop()
        await self._task

    async def get(self, path: str) -> tuple[int, str]:
        url = f"http://127.0.0.1:{self.node.web_port}{path}"

        def fetch() -> tuple[int, str]:
            try:
                with urllib.request.urlopen(url, timeout=PATIENCE_S) as reply:
                    return reply.status, reply.read().decode()
            except urllib.error.HTTPError as error:
                return error.code, error.read().decode()

        return await asyncio.to_thread(fetch)


@pytest.fixture
async def net() -> AsyncIterator[Net]:
    net = Net()
    yield net
    await net.members.stop()


async def test_it_introduces_and_relays_without_any_swarm(tmp_path: Path, net: Net) -> None:
    running = await Running(make_config(tmp_path)).start()
    (address,) = running.node.addresses()
    one = await net.start(reachability=ReachState.PRIVATE, bootstrap=(address,))
    other = await net.start(reachability=ReachState.PRIVATE, bootstrap=(address,))
    for member in (one, other):
        await until(member, lambda member=member: circuits(member), "a place at the relay")
    key = lookup_keys(SWARM, time.time())[0]
    assert await one.plane.provide(key)
    await _meet_members(other.plane, SWARM)
    assert path(other, one.peer) == "direct"
    assert await other.plane.request(one.peer, b"there?") == b"answer to there?"
    third = await net.start(relays_wanted=0)
    await third.plane.connect(circuits(one))
    assert path(third, one.peer) == "relayed"
    with pytest.raises(RequestRefused) as refused:
        await other.plane.request(running.node._identity.peer, b"there?")
    assert refused.value.refusal is Refusal.UNKNOWN_TYPE
    status, text = await running.get("/metrics")
    assert status == 200
    assert "shoal_relay_reservations 2.0" in text and "shoal_relay_circuits 1.0" in text
    await running.stop()
    await until(other, lambda: path(other, running.node._identity.peer) == "none", "the relay's loss is noticed")
    with pytest.raises(PeerUnreachable):
        await other.plane.connect([address])


async def test_with_a_swarm_it_passes_presences_on(tmp_path: Path, net: Net) -> None:
    running = await Running(make_config(tmp_path, str(SwarmUri(swarm=SWARM)))).start()
    bootstrap = running.node.addresses()
    one, other = await net.start(bootstrap=bootstrap), await net.start(bootstrap=bootstrap)
    for member in (one, other):
        await member.find("connected")
    await gossip_until_heard(one, other, b"here")
    assert path(one, other.peer) == "none"
    await running.stop()


async def test_health_and_readiness(tmp_path: Path, net: Net) -> None:
    running = await Running(make_config(tmp_path)).start()
    assert await running.get("/healthz") == (200, '{"ok": true, "reasons": []}')
    status, text = await running.get("/readyz")
    assert status == 503 and "unknown" in text
    member = await net.start(bootstrap=running.node.addresses())
    await until(member, lambda: running.node.control.reach().state is ReachState.REACHABLE, "confirmation")
    assert (await running.get("/readyz"))[0] == 200
    assert (await running.get("/status.json"))[0] == 404
    await running.stop()


async def test_the_command_prints_its_address_and_stops_gracefully(tmp_path: Path, net: Net) -> None:
    options = ("--data-dir", str(tmp_path), "--control-host", "127.0.0.1", "--control-port", "0", "--web-port", "0")
    config = str(ROOT / "configs/relay.toml")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "shoal.node", "relay", "--config", config, *options),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=dict(os.environ),
    )
    assert process.stdout is not None and process.stderr is not None
    async with asyncio.timeout(6 * PATIENCE_S):
        lines = [(await process.stdout.readline()).decode() for _ in range(3)]
        address = lines[1].strip()
        member = await net.start(bootstrap=(address,))
        await member.find("connected")
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0
        log = (await process.stderr.read()).decode()
    await member.find("lost")
    assert "stopping" in log and "Traceback" not in log


def test_the_relay_needs_no_torch() -> None:
    text = (ROOT / "node/relay.py").read_text() + (ROOT / "node/control_setup.py").read_text()
    assert "torch" not in re.sub(r'""".*?"""', "", text, flags=re.S)


def test_every_series_is_described() -> None:
    section = (ROOT / "docs/operations.md").read_text().partition("\n## `shoal relay`\n")[2].partition("\n## ")[0]
    described = set(re.findall(r"(?m)^\| `(\w+)`", section))
    source = (ROOT / "node/relay.py").read_text()
    named = set(re.findall(r'"(shoal_\w+)"', source)) - {"shoal_build_info"}
    assert described == {name + "_total" if name == "shoal_relayed_bytes" else name for name in named}


def test_the_unit_starts_what_there_is() -> None:
    unit = (ROOT / "configs/shoal-relay.service").read_text()
    (command,) = re.findall(r"(?m)^ExecStart=(.*)$", unit)
    assert command.split()[1:] == ["relay", "--config", "/etc/shoal/relay.toml", "--data-dir", "%S/shoal-relay"]
    assert {field.name for field in dataclasses.fields(ControlTable)} >= {"relay_reservations_max", "connections_max"}
