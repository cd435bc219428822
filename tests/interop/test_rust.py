"""rust-libp2p, in the PyPI package lattica, against the production host, each in a process of its own.

lattica hangs up on everybody whose identify names another protocol version than its own, and takes the same string for
the id of its DHT. So in these tests our node names the DHT's id as its protocol version; nothing else is changed.
"""

import asyncio

from tests.interop.puppets import KAD_PROTOCOL, PATIENCE_S, Puppet, Theatre


async def start_ours(theatre: Theatre, reachability: str | None = None) -> Puppet:
    return await theatre.start_ours(protocol_version=KAD_PROTOCOL, reachability=reachability)


async def find_key(finder: Puppet, key: bytes, provider: Puppet) -> None:
    """Wait until the finder's look-up names the provider."""
    async with asyncio.timeout(PATIENCE_S):
        while provider.peer not in str(await finder.call("find_providers", finder.name_key(key))):
            await asyncio.sleep(0.2)


async def test_rust_dials_us_and_both_identify(theatre: Theatre) -> None:
    ours = await start_ours(theatre)
    rust = await theatre.start_rust(bootstrap=(ours.addresses[0],))
    await ours.expect("connected", peer=rust.peer)
    assert await ours.call("connections", rust.peer) == ["/noise"]
    async with asyncio.timeout(PATIENCE_S):
        # It knows of a connection before it knows who is there.
        while (known := await rust.call("known", ours.peer)) is None or not known["protocols"]:
            await asyncio.sleep(0.1)
    assert {"/shoal/request/1", "/ipfs/ping/1.0.0", KAD_PROTOCOL} <= set(known["protocols"])
    assert [f"{address}/p2p/{ours.peer}" for address in known["listen_addresses"]] == list(ours.addresses)
    async with asyncio.timeout(PATIENCE_S):
        while (found := await ours.call("find_peer", rust.peer)) is None:
            await asyncio.sleep(0.1)
    assert tuple(found["addresses"]) == rust.addresses


async def test_we_dial_rust_and_it_pings_us(theatre: Theatre) -> None:
    ours, rust = await start_ours(theatre), await theatre.start_rust()
    assert await ours.call("dial", rust.addresses[0]) == rust.peer
    async with asyncio.timeout(PATIENCE_S):
        while await rust.call("peers") != [ours.peer]:
            await asyncio.sleep(0.1)
        while (await rust.call("known", ours.peer))["rtt_ms"] is None:
            await asyncio.sleep(0.1)


async def test_dht_finds_providers_both_ways_through_our_node(theatre: Theatre) -> None:
    hub, ours = await start_ours(theatre), await start_ours(theatre)
    await ours.call("dial", hub.addresses[0])
    rust, other = [await theatre.start_rust(bootstrap=(hub.addresses[0],)) for _ in range(2)]
    for node in (ours, rust, other):
        await hub.expect("connected", peer=node.peer)
    await rust.call("provide", "theirs")
    await find_key(ours, b"theirs", rust)
    await find_key(other, b"theirs", rust)
    assert await ours.call("provide", b"own".hex())
    await find_key(rust, b"own", ours)
    found = await ours.call("find_peer", rust.peer)
    assert tuple(found["addresses"]) == rust.addresses


async def test_rust_reserves_at_our_relay_and_is_reached_through_it(theatre: Theatre) -> None:
    relay, ours = await start_ours(theatre, "reachable"), await start_ours(theatre)
    rust = await theatre.start_rust(relays=(relay.addresses[0],), listens=False)
    circuit = f"{relay.addresses[0]}/p2p-circuit/p2p/{rust.peer}"
    async with asyncio.timeout(PATIENCE_S):
        while await rust.call("visible") != [circuit]:
            await asyncio.sleep(0.1)
    assert await ours.call("dial", circuit) == rust.peer
    assert await ours.call("connections", rust.peer) == ["/noise"]
    async with asyncio.timeout(PATIENCE_S):
        while await rust.call("known", ours.peer) is None:
            await asyncio.sleep(0.1)
