"""Processes with many production libp2p hosts in each, driven over a pipe, for benchmarks.dht and .connections."""

import asyncio
import multiprocessing
import os
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from shoal.node.control import ControlConfig, ControlHandlers, PeerUnreachable
from shoal.node.libp2p_host import Libp2pHost
from shoal.protocol.identity import Identity

SWARM = bytes(range(32))
CALL_TIMEOUT_S = 900.0
TRIES_MAX = 20
AGAIN_S = 0.5


def identity_of(number: int) -> Identity:
    """The identity of the host with this number."""
    return Identity(number.to_bytes(32, "big"))


async def _answer(peer: object, question: bytes) -> bytes:
    return question


class Hosts:
    """The hosts of one process; what the parent may call."""

    def __init__(self) -> None:
        self._hosts: dict[int, Libp2pHost] = {}

    async def start(
        self, numbers: list[int], connections_max: int, ping_period_s: float | None = None
    ) -> dict[int, str]:
        """Start hosts on loopback; where each can be dialled."""
        if ping_period_s is not None:
            from shoal.node import libp2p_connections

            libp2p_connections.PING_PERIOD_S = ping_period_s
        for number in numbers:
            handlers = ControlHandlers(
                on_message=_ignore,
                on_request=_answer,
                on_presence=_ignore,
                on_peer_connected=_ignore,
                on_peer_lost=_ignore,
            )
            config = ControlConfig(
                identity=identity_of(number),
                swarm=SWARM,
                listen=("/ip4/127.0.0.1/tcp/0",),
                connections_max=connections_max,
            )
            self._hosts[number] = Libp2pHost(config, handlers)
            await self._hosts[number].start()
        return {number: host.addresses()[0] for number, host in self._hosts.items()}

    async def connect(self, number: int, addresses: list[str]) -> None:
        """Connect one host to these, one after the other, again where so many come from one machine at once that
        newcomers are turned away."""
        for address in addresses:
            for _ in range(TRIES_MAX):
                with suppress(PeerUnreachable):
                    await self._hosts[number].connect([address])
                    break
                await asyncio.sleep(AGAIN_S)
            else:
                await self._hosts[number].connect([address])

    async def join(self, number: int) -> None:
        """Look for the own neighbourhood."""
        await self._hosts[number].find_peer(identity_of(number).peer)

    async def provide(self, number: int, key: bytes) -> tuple[bool, float]:
        """Announce; whether a node took it, and how long that took."""
        began = time.perf_counter()
        stored = await self._hosts[number].provide(key)
        return stored, time.perf_counter() - began

    async def find(self, number: int, key: bytes, provider: int) -> tuple[bool, float]:
        """Whether the look-up names the provider, and how long it took."""
        began = time.perf_counter()
        found = await self._hosts[number].find_providers(key)
        return identity_of(provider).peer in {one.peer for one in found}, time.perf_counter() - began

    async def stop(self, numbers: list[int]) -> None:
        """End hosts."""
        await asyncio.gather(*(self._hosts.pop(number).stop() for number in numbers))

    async def count_connections(self, number: int) -> int:
        """How many peers a host is connected to."""
        return len(self._hosts[number].peers())


def _ignore(*_: object) -> None:
    return


def _serve(pipe: Connection) -> None:
    async def serve() -> None:
        hosts = Hosts()
        while (command := await asyncio.to_thread(pipe.recv)) is not None:
            name, args = command
            call: Callable[..., Coroutine[Any, Any, object]] = getattr(hosts, name)
            pipe.send(await call(*args))

    asyncio.run(serve())
    os._exit(0)  # threads of hosts that still run end with the process


class HostProcess:
    """The parent's end. One call at a time."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()

    @property
    def pid(self) -> int:
        """Of the process."""
        assert self._process.pid is not None
        return self._process.pid

    def call(self, name: str, *args: object) -> Any:
        """The result of a method of Hosts."""
        self._pipe.send((name, args))
        if not self._pipe.poll(CALL_TIMEOUT_S):
            raise TimeoutError(f"{name}: nothing for {CALL_TIMEOUT_S:.0f} s")
        return self._pipe.recv()

    def end(self) -> None:
        """End the process and its hosts."""
        self._pipe.send(None)
        self._process.join(10)
        self._process.kill()
