"""The control plane of one peer alone, for the lab: meets everybody whom it finds in the DHT, and says how.

    python -m tests.natlab.control_node SEED BOOTSTRAP…

Prints a line of JSON whenever something has changed: whether it can be dialled, its relays, and whom it reaches how; a
peer counts as reached while it answers requests.
"""

import asyncio
import contextlib
import json
import sys
import time

from shoal.dht.keys import lookup_keys
from shoal.node.config import CONTROL_PORT
from shoal.node.control import ControlConfig, ControlHandlers, PeerUnreachable, RequestRefused
from shoal.node.interfaces import InterfaceWatch
from shoal.node.libp2p_host import Libp2pHost
from shoal.protocol.identity import Identity, PeerId, short_peer_id

SWARM = bytes(range(32))
PERIOD_S = 1.0


async def answer(peer: PeerId, question: bytes) -> bytes:
    return question


def ignore(*_: object) -> None:
    return


async def meet(host: Libp2pHost, me: PeerId) -> None:
    """Announce this peer, and connect to everybody else who has."""
    key = lookup_keys(SWARM, time.time())[0]
    await host.provide(key)
    connected = {one.peer for one in host.peers()}
    for one in await host.find_providers(key):
        if one.peer not in connected and one.peer != me and one.addresses:
            with contextlib.suppress(PeerUnreachable):
                await host.connect(one.addresses)


async def find_reached(host: Libp2pHost) -> dict[str, str]:
    reached = {}
    for one in host.peers():
        with contextlib.suppress(PeerUnreachable, RequestRefused):
            if await host.request(one.peer, b"there?", timeout_s=3.0) == b"there?":
                reached[short_peer_id(one.peer)] = "relayed" if one.relayed else "direct"
    return reached


async def main(seed: int, bootstrap: tuple[str, ...]) -> None:
    identity = Identity(bytes([seed]) * 32)
    listen = (f"/ip4/0.0.0.0/tcp/{CONTROL_PORT}", f"/ip6/::/tcp/{CONTROL_PORT}")
    config = ControlConfig(identity=identity, swarm=SWARM, listen=listen, bootstrap=bootstrap)
    handlers = ControlHandlers(
        on_message=ignore, on_request=answer, on_presence=ignore, on_peer_connected=ignore, on_peer_lost=ignore
    )
    host = Libp2pHost(config, handlers)
    await host.start()
    watch = InterfaceWatch()
    watch.subscribe(lambda _: host.refresh())
    watching = asyncio.create_task(watch.run())
    told = ""
    while not watching.done():
        await meet(host, identity.peer)
        reach = host.reach()
        now = {
            "me": short_peer_id(identity.peer),
            "state": reach.state,
            "relays": [short_peer_id(relay) for relay in reach.relays],
            "addresses": host.addresses(),
            "reached": await find_reached(host),
        }
        if json.dumps(now) != told:
            told = json.dumps(now)
            print(told, flush=True)
        await asyncio.sleep(PERIOD_S)


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), tuple(sys.argv[2:])))
