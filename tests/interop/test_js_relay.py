"""Circuit relay v2 between js-libp2p and the production host, in all three roles: relay, behind it, and dialling."""

import asyncio

import pytest

from tests.interop.puppets import PATIENCE_S, CallFailed, Puppet, Theatre

REQUEST_PROTOCOL = "/shoal/request/1"


def through(relay: Puppet, target: Puppet) -> str:
    """Where the target is dialled through the relay."""
    return f"{relay.addresses[0]}/p2p-circuit/p2p/{target.peer}"


async def start_relay(theatre: Theatre) -> Puppet:
    """A host of ours that relays."""
    return await theatre.start_ours(reachability="reachable")


async def hide_ours(theatre: Theatre, relay: Puppet) -> Puppet:
    """A host of ours that nobody can dial and that holds a place at the relay."""
    ours = await theatre.start_ours(bootstrap=(relay.addresses[0],), reachability="private")
    async with asyncio.timeout(PATIENCE_S):
        while not any("/p2p-circuit/" in address for address in await ours.call("addresses")):
            await asyncio.sleep(0.1)
    return ours


async def hide_js(theatre: Theatre, relay: Puppet, security: tuple[str, ...] = ("noise",)) -> Puppet:
    """A js node that listens through the relay alone."""
    js = await theatre.start_js(listen=(), security=security)
    await js.call("serve", REQUEST_PROTOCOL)
    await js.call("listen", f"{relay.addresses[0]}/p2p-circuit")
    assert through(relay, js) in await js.call("addresses")
    return js


async def ask_js(ours: Puppet, js: Puppet, question: bytes) -> None:
    assert bytes.fromhex(await ours.call("ask", js.peer, question.hex())) == question


async def ask_ours(js: Puppet, ours: Puppet, question: bytes) -> None:
    answer = await js.call("ask", ours.peer, REQUEST_PROTOCOL, question.hex())
    assert bytes.fromhex(answer) == b"\0answer to " + question


@pytest.mark.parametrize("channel", ["noise", "tls"])
async def test_js_reserves_at_our_relay_and_is_dialled_by_ours(theatre: Theatre, channel: str) -> None:
    relay, ours = await start_relay(theatre), await theatre.start_ours()
    js = await hide_js(theatre, relay, security=(channel,))
    assert await ours.call("dial", through(relay, js)) == js.peer
    await js.expect("connected", peer=ours.peer)
    (connection,) = await js.call("connections", ours.peer)
    assert connection["limited"]
    assert "/p2p-circuit" in connection["address"]
    assert connection["encryption"] == {"noise": "/noise", "tls": "/tls/1.0.0"}[channel]
    await ask_js(ours, js, b"q" * 100_000)


async def test_js_reaches_js_through_our_relay(theatre: Theatre) -> None:
    relay = await start_relay(theatre)
    js, other = await hide_js(theatre, relay), await theatre.start_js(listen=())
    connection = await other.call("dial", through(relay, js))
    assert connection["peer"] == js.peer
    assert connection["limited"]
    question = b"q" * 100_000
    answer = await other.call("ask", js.peer, REQUEST_PROTOCOL, question.hex())
    assert bytes.fromhex(answer) == b"\0" + question


async def test_js_dials_ours_behind_our_relay(theatre: Theatre) -> None:
    relay = await start_relay(theatre)
    ours, js = await hide_ours(theatre, relay), await theatre.start_js(listen=())
    connection = await js.call("dial", through(relay, ours))
    assert connection["limited"]
    await ours.expect("connected", peer=js.peer)
    await ask_ours(js, ours, b"q" * 100_000)


async def test_ours_reserves_at_a_js_relay_and_is_dialled_by_js_and_by_ours(theatre: Theatre) -> None:
    relay = await theatre.start_js(relays=True)
    ours = await hide_ours(theatre, relay)
    js, other = await theatre.start_js(listen=()), await theatre.start_ours()
    assert (await js.call("dial", through(relay, ours)))["limited"]
    await ask_ours(js, ours, b"q" * 10_000)
    assert await other.call("dial", through(relay, ours)) == ours.peer
    answer = await other.call("ask", ours.peer, b"q".hex())
    assert bytes.fromhex(answer) == b"answer to q"


async def test_ours_dials_js_through_a_js_relay(theatre: Theatre) -> None:
    relay, ours = await theatre.start_js(relays=True), await theatre.start_ours()
    js = await hide_js(theatre, relay)
    assert await ours.call("dial", through(relay, js)) == js.peer
    await ask_js(ours, js, b"q" * 10_000)


async def test_our_relay_refuses_js_a_peer_that_has_no_place(theatre: Theatre) -> None:
    relay = await start_relay(theatre)
    absent, js = await theatre.start_js(listen=()), await theatre.start_js(listen=())
    await absent.call("dial", relay.addresses[0])
    with pytest.raises(CallFailed, match="NO_RESERVATION"):
        await js.call("dial", through(relay, absent))
