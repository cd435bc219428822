"""One peer of the punching tests: both planes and what leads to tensor links, without rounds.

    python -m tests.natlab.punch_peer NAME FOLDER [OTHER TRIES]

Peers find each other's addresses as files in FOLDER, in place of presences. With OTHER it makes TRIES links to it,
prints a line for each ("punched 0.84"), and ends the run for all by the file `done`.
"""

import asyncio
import sys
import time
from pathlib import Path

from shoal.node.config import CONTROL_PORT, TENSOR_PORT, TensorTable
from shoal.node.control import ControlConfig, ControlHandlers, PeerUnreachable
from shoal.node.interfaces import read_interfaces
from shoal.node.libp2p_host import Libp2pHost
from shoal.node.link_port import Address, FetchFailed, LinkConfig, LinkLost
from shoal.node.links import TensorLinks
from shoal.node.reach import ReachPorts
from shoal.node.reachability import NatMapping, ReachState
from shoal.node.tensor_paths import TensorPaths, list_seen_hosts
from shoal.protocol.errors import Failure, Refusal
from shoal.protocol.identity import Identity, PeerId
from shoal.protocol.messages import decode_message_untrusted, encode_message
from tests.unit.node.link_harness import RecordingSink

NAMES = ("relay", "witness", "left", "right")
IDENTITIES = {name: Identity(bytes([number]) * 32) for number, name in enumerate(NAMES, 1)}
SWARM = b"s" * 32
PATIENCE_S = 60.0
POLL_S = 0.1


class PunchPeer:
    """`relay` and `witness` are on the public network."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.folder = folder
        self.is_public = name in NAMES[:2]
        self.identity = IDENTITIES[name]
        self.failed: list[Failure] = []
        self.links = TensorLinks(self.identity, SWARM, LinkConfig(port=TENSOR_PORT), RecordingSink())

    async def start(self) -> None:
        bound = await self.links.start()
        bootstrap = () if self.name == "relay" else ((await self.read("relay.control")).split()[0],)
        config = ControlConfig(
            identity=self.identity,
            swarm=SWARM,
            listen=(f"/ip4/0.0.0.0/tcp/{CONTROL_PORT}",),
            bootstrap=bootstrap,
            relays_unconfirmed=self.is_public,
        )
        handlers = ControlHandlers(
            on_message=lambda peer, raw: None,
            on_request=self._answer,
            on_presence=lambda peer, raw: None,
            on_peer_connected=lambda peer: None,
            on_peer_lost=lambda peer: None,
        )
        self.control = Libp2pHost(config, handlers)
        await self.control.start()
        ports = ReachPorts(
            live=self._live,  # type: ignore[arg-type]
            addresses_of=self._addresses_of,
            hosts=lambda: read_interfaces().hosts(),
            seen_hosts=lambda: list_seen_hosts(self.control),
            changed=lambda: None,
        )
        self.paths = TensorPaths(self.identity.peer, SWARM, TensorTable(), bound, self.control, self.links, ports)
        self.paths.on_failed = lambda peer, failure: self.failed.append(failure)
        self.watching = asyncio.create_task(self.paths.reach.watch())
        if not self.is_public:
            await self.until(lambda: any("p2p-circuit" in one for one in self.control.addresses()))
            await self.control.connect((await self.read("witness.control")).split())
        else:
            (self.folder / f"{self.name}.tensor").write_text(read_interfaces().hosts()[0])
        (self.folder / f"{self.name}.control").write_text("\n".join(self.control.addresses()))

    async def link(self, other: str, tries: int) -> None:
        peer = IDENTITIES[other].peer
        addresses = (await self.read(f"{other}.control")).split()
        async with asyncio.timeout(PATIENCE_S):
            while peer not in [one.peer for one in self.control.peers()]:
                try:
                    await self.control.connect(addresses)
                except PeerUnreachable:
                    await asyncio.sleep(POLL_S)
        reach = self.paths.reach
        await self.until(lambda: reach.state is not ReachState.UNKNOWN and reach.mapping is not NatMapping.UNKNOWN)
        for _ in range(tries):
            began_s = time.monotonic()
            try:
                await self.links.fetch(peer, (), bytes(32), memoryview(bytearray(9)), PATIENCE_S)
            except FetchFailed:  # nobody has such a blob: the answer came over the link
                print(self.links.path_to(peer), f"{time.monotonic() - began_s:.2f}", flush=True)
            except LinkLost:
                print(self.failed[-1], f"{time.monotonic() - began_s:.2f}", flush=True)
            self.links.hang_up(peer, Refusal.EXPIRED)
            self.paths.punches.forget_pauses()
            self.paths.relayed.forget_pauses()
            await self.until(lambda: not self.links.is_linked(peer))
            await asyncio.sleep(2.5)  # an offer that comes sooner is refused
        (self.folder / "done").write_text("")

    async def stop(self) -> None:
        self.watching.cancel()
        await self.links.stop()
        await self.control.stop()

    async def read(self, name: str) -> str:
        path = self.folder / name
        await self.until(lambda: path.exists() and path.read_text())
        return path.read_text()

    async def until(self, condition: object) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not condition():  # type: ignore[operator]
                await asyncio.sleep(POLL_S)

    async def _answer(self, peer: PeerId, raw: bytes) -> bytes:
        return encode_message(SWARM, await self.paths.answer(peer, decode_message_untrusted(SWARM, raw)))

    def _live(self) -> dict[PeerId, None]:
        there = [name for name in NAMES if name != self.name and (self.folder / f"{name}.control").exists()]
        return {IDENTITIES[name].peer: None for name in there}

    def _addresses_of(self, peer: PeerId) -> tuple[Address, ...]:
        name = next(name for name, one in IDENTITIES.items() if one.peer == peer)
        path = self.folder / f"{name}.tensor"
        return ((path.read_text(), TENSOR_PORT),) if path.exists() else ()


async def main(name: str, folder: str, other: str = "", tries: str = "0") -> None:
    peer = PunchPeer(name, Path(folder))
    await peer.start()
    if other:
        await peer.link(other, int(tries))
    while not (peer.folder / "done").exists():
        await asyncio.sleep(POLL_S)
    await peer.stop()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
