"""A process with one production libp2p host in it, driven by a test: JSON lines in, JSON lines out.

The first line says what to start: {seed, listen, security, serves_dht, bootstrap, reachability, protocol_version}. A
command is {id, call, args}; its answer is {id, result} or {id, error}. Events are {event, ...}. Bytes travel as hex.
The same words as js/node.mjs. Ends with its stdin.
"""

import asyncio
import dataclasses
import json
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from shoal.node.control import ControlConfig, ControlHandlers
from shoal.node.libp2p_host import Libp2pHost
from shoal.node.reachability import ReachState
from shoal.protocol.errors import ProtocolError, ShoalError
from shoal.protocol.identity import Identity, PeerId, encode_libp2p_peer_id, format_peer_id, parse_peer_id

SWARM = bytes(range(32))


def say(**line: object) -> None:
    """Print one line."""
    print(json.dumps(line), flush=True)


def note(event: str) -> Callable[..., None]:
    """A handler that says what it was told."""

    def tell(peer: PeerId, payload: bytes | ProtocolError = b"") -> None:
        data = payload.hex() if isinstance(payload, bytes) else str(payload)
        say(event=event, peer=format_peer_id(peer), data=data)

    return tell


async def answer(peer: PeerId, question: bytes) -> bytes:
    """What this process says to every question."""
    return b"answer to " + question


class Calls:
    """What a test may ask of the host."""

    def __init__(self, host: Libp2pHost) -> None:
        self._host = host

    async def addresses(self) -> object:
        return self._host.addresses()

    async def peers(self) -> object:
        return [format_peer_id(one.peer) for one in self._host.peers()]

    async def dial(self, *addresses: str) -> object:
        return format_peer_id(await self._host.connect(addresses))

    async def hang_up(self, peer: str) -> None:
        await self._host.disconnect(parse_peer_id(peer))

    async def ask(self, peer: str, question: str) -> object:
        return (await self._host.request(parse_peer_id(peer), bytes.fromhex(question))).hex()

    async def publish(self, payload: str) -> None:
        await self._host.publish(bytes.fromhex(payload))

    async def provide(self, key: str) -> object:
        return await self._host.provide(bytes.fromhex(key))

    async def find_providers(self, key: str) -> object:
        return [_describe(one) for one in await self._host.find_providers(bytes.fromhex(key))]

    async def find_peer(self, peer: str) -> object:
        found = await self._host.find_peer(parse_peer_id(peer))
        return None if found is None else _describe(found)

    async def connections(self, peer: str) -> object:
        """How the connections to this peer are secured: this looks below the port, as nothing else here does."""
        engine = self._host._running()

        async def look() -> list[str]:
            from libp2p.peer.id import ID

            wanted = ID(encode_libp2p_peer_id(parse_peer_id(peer)))
            connections: list[Any] = list(engine._swarm.get_connections(wanted))
            return [one.muxed_conn.secured_conn.negotiated_security_protocol for one in connections]

        return await self._host._thread.call(look)


def _describe(found: Any) -> dict[str, object]:
    return {**dataclasses.asdict(found), "peer": format_peer_id(found.peer)}


async def offer_only(host: Libp2pHost, security: list[str]) -> None:
    """Take the secure channels that the test does not want out of the running host."""
    engine = host._running()

    async def remove() -> None:
        from libp2p.custom_types import TProtocol

        names = {"noise": TProtocol("/noise"), "tls": TProtocol("/tls/1.0.0")}
        selector: Any = engine._swarm.upgrader.security_multistream._selector
        for name, protocol in names.items():
            if name not in security:
                del selector.handlers[protocol]
                selector.multiselect.handlers.pop(protocol, None)

    await host._thread.call(remove)


def claim_protocol(version: str) -> None:
    """Let identify name this protocol version, without which some programs hang up."""
    from libp2p.identity.identify import identify

    identify.PROTOCOL_VERSION = version


async def main() -> None:
    """Start what the first line says, then obey."""
    lines = asyncio.StreamReader(limit=2**24)
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    start = json.loads(await lines.readline())
    config = ControlConfig(
        identity=Identity(bytes.fromhex(start["seed"])),
        swarm=SWARM,
        listen=tuple(start["listen"]),
        serves_dht=start["serves_dht"],
        bootstrap=tuple(start["bootstrap"]),
        reachability=None if start["reachability"] is None else ReachState(start["reachability"]),
    )
    handlers = ControlHandlers(
        on_message=note("message"),
        on_request=answer,
        on_presence=note("presence"),
        on_peer_connected=note("connected"),
        on_peer_lost=note("lost"),
        on_misbehaviour=note("misbehaviour"),
        on_crashed=lambda why: say(event="crashed", why=why),
    )
    host = Libp2pHost(config, handlers)
    await host.start()
    if start["protocol_version"] is not None:
        claim_protocol(start["protocol_version"])
    await offer_only(host, start["security"])
    say(event="started", peer=format_peer_id(config.identity.peer), addresses=host.addresses())
    calls = Calls(host)

    async def obey(number: int, call: Awaitable[object]) -> None:
        try:
            say(id=number, result=await call)
        except ShoalError as error:
            say(id=number, error=f"{type(error).__name__}: {error}")

    tasks: set[asyncio.Task[None]] = set()
    while line := await lines.readline():
        command = json.loads(line)
        task = asyncio.create_task(obey(command["id"], getattr(calls, command["call"])(*command["args"])))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    with suppress(ShoalError):
        await host.stop()


if __name__ == "__main__":
    asyncio.run(main())
