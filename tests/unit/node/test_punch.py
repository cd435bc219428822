"""Holes: both sides dial at once from their tensor ports, members only, within bounds; every failure has a reason.

On loopback there is no router, so that the two dials meet as they come: in a simultaneous open, or one of them at the
other side's listener. The roles of the handshake have to fit in each case.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from shoal.node import punch
from shoal.node.control import PeerUnreachable, RequestRefused
from shoal.node.link_port import Address, FetchFailed, LinkEnd, LinkLost, LinkPath
from shoal.node.punch import PunchFailed
from shoal.protocol.errors import Failure, ProtocolError, Refusal
from shoal.protocol.frames import FrameHeader
from shoal.protocol.identity import PeerId
from shoal.protocol.messages import GetPunchClock, PunchAnswer, PunchOffer, PunchSync
from tests.unit.node.link_harness import describe
from tests.unit.node.node_samples import Peer, open_peers, wait_until

HEADER: FrameHeader = describe(b"x")
TOKEN = b"t" * 32


@asynccontextmanager
async def open_private(folder: Path) -> AsyncIterator[tuple[Peer, Peer]]:
    """Two peers who see each other on the control plane, and of whom neither can dial the other."""
    async with open_peers(folder, 2) as (ann, bob):
        ann.swarm.addresses.clear()
        yield ann, bob


def paths_of(peer: Peer, other: Peer) -> list[LinkPath]:
    return [link.path for link in peer.links._links.get(other.me, ()) if link.is_usable]


def deafen(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The peer's own dials lead nowhere."""

    async def lead_nowhere(to: PeerId, address: Address, timeout_s: float) -> None:
        raise LinkLost(to, LinkEnd.UNREACHABLE)

    monkeypatch.setattr(peer.links, "connect_from_port", lead_nowhere)


async def check_link(ann: Peer, bob: Peer) -> None:
    assert paths_of(ann, bob) == [LinkPath.PUNCHED]
    await wait_until(lambda: paths_of(bob, ann) == [LinkPath.PUNCHED])
    assert await _fetch(ann, bob) == await _fetch(bob, ann) == "missing", "frames pass in both directions"


async def _fetch(peer: Peer, other: Peer) -> str:
    with pytest.raises(FetchFailed) as caught:
        await peer.links.fetch(other.me, (), bytes(32), memoryview(bytearray(9)), 30.0)
    return caught.value.reason


async def test_a_peer_that_nobody_can_dial_is_reached_through_a_hole(tmp_path: Path) -> None:
    async with open_private(tmp_path) as (ann, bob):
        opened: list[tuple[PeerId, LinkPath]] = []
        ann.paths.on_opened = lambda peer, path: opened.append((peer, path))
        assert await _fetch(ann, bob) == "missing"
        assert opened == [(bob.me, LinkPath.PUNCHED)]
        await check_link(ann, bob)
        assert (ann.links.accepted, bob.links.accepted) == (0, 0) or not bob.paths.reach.reached, "it proves nothing"


async def test_only_the_dialer_comes_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_private(tmp_path) as (ann, bob):
        deafen(bob, monkeypatch)
        await ann.paths.punches.punch(bob.me)
        await check_link(ann, bob)


async def test_only_the_other_side_comes_through_and_the_roles_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_private(tmp_path) as (ann, bob):
        deafen(ann, monkeypatch)
        await ann.paths.punches.punch(bob.me)
        await check_link(ann, bob)


async def test_both_want_a_link_at_once_and_get_one(tmp_path: Path) -> None:
    async with open_private(tmp_path) as (ann, bob):
        await asyncio.gather(ann.paths.punches.punch(bob.me), bob.paths.punches.punch(ann.me))
        assert ann.links.is_linked(bob.me) and bob.links.is_linked(ann.me)
        assert ann.misbehaviours == bob.misbehaviours == []


async def test_a_failure_has_a_reason_and_a_pause_that_an_own_change_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(punch, "WINDOW_S", 0.02)
    async with open_private(tmp_path) as (ann, bob):
        deafen(ann, monkeypatch)
        deafen(bob, monkeypatch)
        failed: list[Failure] = []
        ann.paths.on_failed = lambda peer, failure: failed.append(failure)
        for _ in range(2):
            with pytest.raises(LinkLost) as caught:
                await ann.links.send(bob.me, (), HEADER, memoryview(b"x"))
            assert caught.value.reason is LinkEnd.UNREACHABLE
        assert [one for one in failed if one.startswith("punch")] == [Failure.PUNCH_TIMEOUT, Failure.PUNCH_PAUSED]
        ann.paths.addresses_changed()
        pass_time(bob, 2 * punch.SESSION_LIFE_S)
        with pytest.raises(PunchFailed) as again:
            await ann.paths.punches.punch(bob.me)
        assert again.value.failure is Failure.PUNCH_TIMEOUT


async def test_pauses_grow_and_end(tmp_path: Path) -> None:
    async with open_private(tmp_path) as (ann, bob):
        now = 0.0
        ann.paths.punches._ports = punch.PunchPorts(
            is_member=lambda peer: True,
            own_addresses=lambda peer: _nothing(),
            varies=lambda: False,
            now=lambda: now,
        )
        begun = []
        while now < 4 * punch.PAUSE_S_MAX:
            try:
                await ann.paths.punches.punch(bob.me)
            except PunchFailed as error:
                if error.failure is Failure.NO_OBSERVED_ADDRESS:
                    begun.append(now)
            now += punch.PAUSE_S / 4
        waits = [later - earlier for earlier, later in pairwise(begun)]
        assert waits == [60.0, 120.0, 240.0, 480.0, 900.0, 900.0]


async def _nothing() -> tuple[Address, ...]:
    return ()


@pytest.mark.parametrize(
    ("raised", "failure"),
    [
        (PeerUnreachable(PeerId(bytes(32)), Failure.PEER_SLOW, "no answer"), Failure.PEER_SLOW),
        (RequestRefused(PeerId(bytes(32)), Refusal.LIMIT), Failure.PUNCH_REFUSED),
        (ProtocolError(Refusal.OVERSIZED, "by the test"), Failure.PUNCH_REFUSED),
    ],
)
async def test_what_the_control_plane_says_is_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raised: Exception, failure: Failure
) -> None:
    async with open_private(tmp_path) as (ann, bob):

        async def fail(peer: PeerId, payload: bytes, timeout_s: float) -> bytes:
            raise raised

        monkeypatch.setattr(ann.paths.punches._control, "request", fail)
        with pytest.raises(PunchFailed) as caught:
            await ann.paths.punches.punch(bob.me)
        assert caught.value.failure is failure


def set_outer(peer: Peer, *addresses: Address, varies: bool = False) -> None:
    """Where the peer believes to be seen, and whether everybody sees it elsewhere."""

    async def tell(_: PeerId) -> tuple[Address, ...]:
        return addresses

    peer.paths.punches._ports = replace(peer.paths.punches._ports, own_addresses=tell, varies=lambda: varies)


@pytest.mark.parametrize(
    ("beside", "attempts"),
    [((), 1), ((("2a00::1", 1),), punch.ATTEMPTS_MAX)],
    ids=["a NAT that gives everybody another address", "IPv6 beside it"],
)
async def test_what_looks_hopeless_is_tried_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beside: tuple[Address, ...], attempts: int
) -> None:
    async with open_private(tmp_path) as (ann, bob):
        for one in (ann, bob):
            set_outer(one, ("45.0.0.1", 1), *beside, varies=True)
        tried: list[tuple[Address, ...]] = []

        async def attempt(peer: PeerId, token: bytes, addresses: tuple[Address, ...], clock: object) -> bool:
            tried.append(addresses)
            return False

        monkeypatch.setattr(ann.paths.punches, "_attempt", attempt)
        with pytest.raises(PunchFailed):
            await ann.paths.punches.punch(bob.me)
        assert tried == [(("45.0.0.1", 1), *beside)] * attempts


async def test_without_a_family_in_common_no_hole_is_tried(tmp_path: Path) -> None:
    async with open_private(tmp_path) as (ann, bob):
        set_outer(ann, ("45.0.0.1", 1))
        set_outer(bob, ("2a00::1", 1))
        with pytest.raises(PunchFailed) as caught:
            await ann.paths.punches.punch(bob.me)
        assert (caught.value.failure, bob.paths.punches._sessions) == (Failure.PUNCH_REFUSED, {})
    # A peer of an older version answers all the same.
    assert punch._list_dialable(("[2a00::1]:1", "45.0.0.2:1"), (("45.0.0.1", 1),)) == (("45.0.0.2", 1),)


# -- what others may ask -----------------------------------------------------------------------------------------------


def offer(token: bytes = TOKEN, *addresses: str) -> PunchOffer:
    return PunchOffer(token=token, addresses=addresses or ("127.0.0.1:1",), varies=False)


def pass_time(peer: Peer, seconds: float) -> None:
    now_s = peer.now_s
    peer.now_s = lambda: now_s() + seconds


async def refusal_of(peer: Peer, asker: PeerId, question: object) -> Refusal:
    with pytest.raises(ProtocolError) as caught:
        await peer.paths.answer(asker, question)
    return caught.value.refusal


async def test_offers_are_for_members_and_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_private(tmp_path) as (ann, bob):
        assert await refusal_of(ann, PeerId(b"s" * 32), offer()) is Refusal.NOT_A_MEMBER
        names = offer(TOKEN, "localhost:1", "no address", "0.0.0.0:1")
        assert await refusal_of(ann, bob.me, names) is Refusal.NOT_READY, "names are not looked up for others"
        assert await refusal_of(ann, bob.me, offer()) is Refusal.LIMIT, "one in a while"
        pass_time(ann, punch.OFFER_PERIOD_S)
        assert await refusal_of(ann, bob.me, offer(TOKEN, "[2a00::1]:1")) is Refusal.NOT_READY, "no family in common"
        pass_time(ann, punch.OFFER_PERIOD_S)
        assert isinstance(await ann.paths.answer(bob.me, offer()), PunchAnswer)
        pass_time(ann, punch.OFFER_PERIOD_S)
        assert await refusal_of(ann, bob.me, offer()) is Refusal.LIMIT, "one at a time"
        pass_time(ann, 2 * punch.SESSION_LIFE_S)
        monkeypatch.setattr(punch, "SESSIONS_MAX", 0)
        assert await refusal_of(ann, bob.me, offer()) is Refusal.LIMIT, "so many at all"


async def test_of_two_offers_the_one_of_the_lower_peer_stands(tmp_path: Path) -> None:
    async with open_private(tmp_path) as (ann, bob):
        low, high = sorted((ann, bob), key=lambda peer: peer.me)
        low.paths.punches._offering.add(high.me)
        high.paths.punches._offering.add(low.me)
        assert await refusal_of(low, high.me, offer()) is Refusal.DUPLICATE
        assert isinstance(await high.paths.answer(low.me, offer()), PunchAnswer)


async def test_only_an_offer_that_stands_is_dialled_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_private(tmp_path) as (ann, bob):
        deafen(ann, monkeypatch)
        answer = await ann.paths.answer(bob.me, offer())
        assert isinstance(answer, PunchAnswer)
        for question in (GetPunchClock(token=bytes(32)), PunchSync(token=bytes(32), at_s=answer.clock_s)):
            assert await refusal_of(ann, bob.me, question) is Refusal.EXPIRED
        late = PunchSync(token=TOKEN, at_s=answer.clock_s + 2 * punch.START_LATEST_S)
        assert await refusal_of(ann, bob.me, late) is Refusal.OUT_OF_RANGE
        ann.now_s = lambda: answer.clock_s + 2 * punch.SESSION_LIFE_S
        assert await refusal_of(ann, bob.me, PunchSync(token=TOKEN, at_s=answer.clock_s)) is Refusal.EXPIRED


async def test_nobody_makes_a_peer_dial_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(punch, "KNOCK_PAUSE_S", 0.0)
    async with open_private(tmp_path) as (ann, bob):
        dialled: list[Address] = []

        async def count(to: PeerId, address: Address, timeout_s: float) -> None:
            dialled.append(address)
            raise LinkLost(to, LinkEnd.UNREACHABLE)

        monkeypatch.setattr(ann.links, "connect_from_port", count)
        many = offer(TOKEN, *(f"192.0.2.{number}:1" for number in range(1, 9)))
        answer = await ann.paths.answer(bob.me, many)
        assert isinstance(answer, PunchAnswer)
        await ann.paths.answer(bob.me, PunchSync(token=TOKEN, at_s=answer.clock_s))
        await wait_until(lambda: len(dialled) >= 8 * punch.KNOCKS_MAX)
        assert len(dialled) == 8 * punch.KNOCKS_MAX
