"""js-libp2p against the production host, each in a process of its own, over real sockets on loopback."""

import asyncio
import hashlib

import pytest

from shoal.dht.keys import presence_topic, provider_key
from shoal.node.libp2p_connections import PING_PERIOD_S, SILENCE_TIMEOUT_S
from shoal.protocol.identity import encode_libp2p_peer_id, parse_peer_id
from tests.interop.host import SWARM
from tests.interop.puppets import PATIENCE_S, CallFailed, Puppet, Theatre

REQUEST_PROTOCOL = "/shoal/request/1"
CHANNELS = {"noise": "/noise", "tls": "/tls/1.0.0"}
TOPIC = presence_topic(SWARM)


async def meet(dialler: Puppet, listener: Puppet) -> None:
    """Connect, and wait until both have said so."""
    assert listener.peer in str(await dialler.call("dial", listener.addresses[0]))
    await dialler.expect("connected", peer=listener.peer)
    await listener.expect("connected", peer=dialler.peer)


@pytest.mark.parametrize("channel", ["noise", "tls"])
async def test_js_dials_us(theatre: Theatre, channel: str) -> None:
    ours, js = await theatre.start_ours(), await theatre.start_js(security=(channel,))
    connection = await js.call("dial", ours.addresses[0])
    assert connection["peer"] == ours.peer
    assert connection["encryption"] == CHANNELS[channel]
    assert connection["multiplexer"] == "/yamux/1.0.0"
    assert (await ours.expect("connected"))["peer"] == js.peer
    assert await ours.call("connections", js.peer) == [CHANNELS[channel]]


@pytest.mark.parametrize("channel", ["noise", "tls"])
async def test_we_dial_js(theatre: Theatre, channel: str) -> None:
    ours, js = await theatre.start_ours(), await theatre.start_js(security=(channel,))
    assert await ours.call("dial", js.addresses[0]) == js.peer
    assert (await js.expect("connected"))["peer"] == ours.peer
    assert await ours.call("connections", js.peer) == [CHANNELS[channel]]
    (connection,) = await js.call("connections", ours.peer)
    assert connection["encryption"] == CHANNELS[channel]


async def test_a_js_peer_with_another_identity_is_refused(theatre: Theatre) -> None:
    ours, js, other = await theatre.start_ours(), await theatre.start_js(), await theatre.start_js(security=("tls",))
    for node in (js, other):
        wrong = node.addresses[0].replace(node.peer, ours.peer[:-1] + ("A" if ours.peer[-1] != "A" else "B"))
        with pytest.raises(CallFailed):
            await ours.call("dial", wrong)
        mistaken = ours.addresses[0].replace(ours.peer, js.peer if node is other else other.peer)
        with pytest.raises(CallFailed):
            await node.call("dial", mistaken)
    assert await ours.call("peers") == []


async def test_identify_tells_both_sides_what_the_other_is(theatre: Theatre) -> None:
    ours, js = await theatre.start_ours(), await theatre.start_js()
    await meet(js, ours)
    told = await js.expect("identified", peer=ours.peer)
    assert {REQUEST_PROTOCOL, "/shoal/control/1", "/ipfs/ping/1.0.0", "/ipfs/kad/1.0.0"} <= set(told["protocols"])
    assert {"/meshsub/1.1.0", "/ipfs/id/1.0.0", "/ipfs/id/push/1.0.0"} <= set(told["protocols"])
    assert [address + f"/p2p/{ours.peer}" for address in told["addresses"]] == list(ours.addresses)
    assert told["signed"]
    # Ours has learnt where js listens, though js dialled.
    async with asyncio.timeout(PATIENCE_S):
        while (found := await ours.call("find_peer", js.peer)) is None:
            await asyncio.sleep(0.1)
    assert tuple(found["addresses"]) == js.addresses


async def test_js_pings_us(theatre: Theatre) -> None:
    ours, js = await theatre.start_ours(), await theatre.start_js()
    await meet(js, ours)
    for _ in range(3):
        assert 0 <= await js.call("ping", ours.peer) < PATIENCE_S * 1000


async def test_streams_of_ours_carry_questions_both_ways(theatre: Theatre) -> None:
    ours, js = await theatre.start_ours(), await theatre.start_js(security=("tls",))
    await js.call("serve", REQUEST_PROTOCOL)
    await meet(js, ours)
    for length in (0, 1, 65_536, 250_000):
        question = hashlib.shake_128(b"question").digest(length)
        answer = bytes.fromhex(await js.call("ask", ours.peer, REQUEST_PROTOCOL, question.hex()))
        assert answer == b"\0answer to " + question
        assert bytes.fromhex(await ours.call("ask", js.peer, question.hex())) == question


async def test_a_silent_connection_stays(theatre: Theatre) -> None:
    ours, js = await theatre.start_ours(), await theatre.start_js()
    await meet(js, ours)
    with pytest.raises(AssertionError, match="no lost"):
        await ours.expect("lost", within_s=PING_PERIOD_S + SILENCE_TIMEOUT_S + 1)


async def test_each_side_notices_that_the_other_hangs_up(theatre: Theatre) -> None:
    ours, js, leaver = await theatre.start_ours(), await theatre.start_js(), await theatre.start_js()
    await meet(js, ours)
    await meet(leaver, ours)
    # (It dials again by itself, to see whether the peer is still worth a place in its routing table.)
    await ours.call("hang_up", js.peer)
    await js.expect("lost", peer=ours.peer)
    await leaver.call("leave")
    await ours.expect("lost", peer=leaver.peer)


@pytest.mark.parametrize("js_dials", [True, False])
async def test_gossip_of_our_topic_goes_both_ways(theatre: Theatre, js_dials: bool) -> None:
    ours, js = await theatre.start_ours(), await theatre.start_js()
    await js.call("subscribe", TOPIC)
    await meet(*((js, ours) if js_dials else (ours, js)))
    async with asyncio.timeout(PATIENCE_S):
        while ours.peer not in await js.call("subscribers", TOPIC):
            await asyncio.sleep(0.1)
    for length in (1, 16 * 1024):
        payload = hashlib.shake_128(b"presence").hexdigest(length)
        assert await js.call("publish", TOPIC, payload) == [ours.peer]
        assert (await ours.expect("presence", data=payload))["peer"] == js.peer
        await ours.call("publish", payload)
        assert (await js.expect("gossip", data=payload))["source"] == ours.peer


async def test_our_node_passes_gossip_on_between_js_nodes(theatre: Theatre) -> None:
    # The js nodes can be dialled nowhere: their DHT tells them of each other, and they would connect.
    ours, left, right = await theatre.start_ours(), await theatre.start_js(listen=()), await theatre.start_js(listen=())
    for js in (left, right):
        await js.call("subscribe", TOPIC)
        await meet(js, ours)
        async with asyncio.timeout(PATIENCE_S):
            while ours.peer not in await js.call("subscribers", TOPIC):
                await asyncio.sleep(0.1)
    assert await left.call("publish", TOPIC, "ab") == [ours.peer]
    assert (await right.expect("gossip", data="ab"))["source"] == left.peer


async def settle(js: Puppet, size: int) -> None:
    """Wait until the js node has this many peers in its routing table."""
    async with asyncio.timeout(PATIENCE_S):
        while await js.call("routingTableSize") < size:
            await asyncio.sleep(0.1)


async def test_dht_finds_providers_both_ways_through_our_node(theatre: Theatre) -> None:
    hub, ours = await theatre.start_ours(), await theatre.start_ours()
    left, right = await theatre.start_js(), await theatre.start_js()
    for node in (ours, left, right):
        await meet(node, hub)
    for js in (left, right):
        await settle(js, 1)
    theirs, own = provider_key(SWARM, 1).hex(), provider_key(SWARM, 2).hex()
    assert hub.peer in await left.call("provide", theirs)
    assert [one["peer"] for one in await ours.call("find_providers", theirs)] == [left.peer]
    assert left.peer in {one["peer"] for one in await right.call("findProviders", theirs)}
    assert await ours.call("provide", own)
    found = await right.call("findProviders", own)
    assert ours.peer in {one["peer"] for one in found}
    assert any(ours.addresses[0].startswith(address) for one in found for address in one["addresses"])


async def test_dht_finds_peers_both_ways_through_our_node(theatre: Theatre) -> None:
    hub, ours = await theatre.start_ours(), await theatre.start_ours()
    left, right = await theatre.start_js(), await theatre.start_js()
    for node in (ours, left, right):
        await meet(node, hub)
    for js in (left, right):
        await settle(js, 1)
    found = await ours.call("find_peer", left.peer)
    assert tuple(found["addresses"]) == left.addresses
    for target in (ours, left):
        found = await right.call("findPeer", target.peer)
        assert found["peer"] == target.peer
        assert any(target.addresses[0].startswith(address) for address in found["addresses"]), (target.name, found)


async def test_a_node_of_ours_that_is_asked_for_itself_says_where_it_is(theatre: Theatre) -> None:
    ours, js = await theatre.start_ours(), await theatre.start_js()
    await meet(ours, js)
    await settle(js, 1)
    # From the addresses alone that its answer has: the js node was dialled, and what it was told before is passed over.
    found = await js.call("findPeer", ours.peer)
    assert found["peer"] == ours.peer
    assert any(ours.addresses[0].startswith(address) for address in found["addresses"]), found


async def test_our_nodes_store_no_values_and_lead_js_nodes_to_those_that_do(theatre: Theatre) -> None:
    hub = await theatre.start_ours()
    writer, keeper, reader = [await theatre.start_js() for _ in range(3)]
    for js in (writer, keeper, reader):
        await meet(js, hub)
        await settle(js, 1)
    # Every other implementation takes this one: a public key, under the id of the peer that has it.
    key = (b"/pk/" + encode_libp2p_peer_id(parse_peer_id(writer.peer))).hex()
    value = await writer.call("publicKey")
    async with asyncio.timeout(PATIENCE_S):
        while keeper.peer not in (stored := await writer.call("put", key, value)):
            await asyncio.sleep(0.2)
    assert hub.peer not in stored
    # A query passes over whoever is slow to answer; on a busy machine that may be everybody.
    async with asyncio.timeout(PATIENCE_S):
        while not (found := await reader.call("get", key)):
            await asyncio.sleep(0.2)
    assert {one["value"] for one in found} == {value}
    assert hub.peer not in {one["from"] for one in found}
