"""DCUtR between js-libp2p and the production host, in both roles, where one of the two is behind a router that lets
nobody in. js-libp2p heeds public addresses alone, so the network is the NAT lab's."""

import asyncio
from collections.abc import Iterator

import pytest

from tests.interop.puppets import PATIENCE_S, Puppet, Theatre
from tests.interop.test_js_relay import REQUEST_PROTOCOL, ask_js, ask_ours, through
from tests.natlab.lab import Host, Lab
from tests.natlab.needs import find_missing
from tests.natlab.rules import Nat

MISSING = find_missing()
pytestmark = pytest.mark.skipif(MISSING is not None, reason=f"the lab {MISSING}")


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab() as made:
        yield made


async def start_ours(theatre: Theatre, host: Host, reachability: str, *bootstrap: str) -> Puppet:
    listen = f"/ip4/{host.address}/tcp/4001"
    prefix = tuple(host.space.prefix)
    return await theatre.start_ours(listen=listen, reachability=reachability, bootstrap=bootstrap, inside=prefix)


async def start_js(theatre: Theatre, host: Host) -> Puppet:
    own = (f"/ip4/{host.address}/tcp/4001",)
    js = await theatre.start_js(listen=own, announce=own, inside=tuple(host.space.prefix))
    await js.call("serve", REQUEST_PROTOCOL)
    return js


async def await_direct(js: Puppet, ours: Puppet) -> None:
    """Until js has a connection to ours that no relay carries."""
    async with asyncio.timeout(PATIENCE_S):
        while all(one["limited"] for one in await js.call("connections", ours.peer)):
            await asyncio.sleep(0.1)


async def test_js_that_we_dialled_through_a_relay_is_reached_directly(lab: Lab, theatre: Theatre) -> None:
    relay = await start_ours(theatre, lab.add_host("relay"), "reachable")
    js = await start_js(theatre, lab.add_host("js"))
    await js.call("listen", f"{relay.addresses[0]}/p2p-circuit")
    ours = await start_ours(theatre, lab.add_peer("ours", Nat.PORT_RESTRICTED), "private", relay.addresses[0])
    assert await ours.call("dial", through(relay, js)) == js.peer
    await js.expect("connected", peer=ours.peer)
    await await_direct(js, ours)
    await ask_js(ours, js, b"q" * 100_000)


async def test_js_that_dialled_us_through_a_relay_is_reached_directly(lab: Lab, theatre: Theatre) -> None:
    relay = await start_ours(theatre, lab.add_host("relay"), "reachable")
    ours = await start_ours(theatre, lab.add_host("ours"), "private", relay.addresses[0])
    async with asyncio.timeout(PATIENCE_S):
        while not any("/p2p-circuit/" in address for address in await ours.call("addresses")):
            await asyncio.sleep(0.1)
    js = await start_js(theatre, lab.add_peer("js", Nat.PORT_RESTRICTED))
    assert (await js.call("dial", through(relay, ours)))["limited"]
    await await_direct(js, ours)
    await ask_ours(js, ours, b"q" * 100_000)
