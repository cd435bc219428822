"""Relayed tensor links over real sockets: two members that can only dial out are linked through a third one, which
serves members alone, within its bounds, and sees nothing but sealed bytes."""

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, suppress
from pathlib import Path

import pytest

from shoal.node import relayed_links, tensor_relay
from shoal.node.config import TensorTable
from shoal.node.link_port import FetchFailed, LinkEnd, LinkLost, LinkPath
from shoal.node.links import SENDS_PER_LINK
from shoal.node.punch import PunchFailed
from shoal.node.reachability import ReachReason
from shoal.node.relay_budget import RelayBudget
from shoal.node.relayed_links import RelayFailed
from shoal.node.splice import BUFFER_BYTES, MAGIC, Side, Splice
from shoal.protocol import secure_channel
from shoal.protocol.errors import Failure, ProtocolError, Refusal
from shoal.protocol.identity import PeerId
from shoal.protocol.messages import RelayCall
from tests.unit.node.link_harness import on_both_loops
from tests.unit.node.node_samples import PATIENCE_S, Peer, open_peers, wait_until
from tests.unit.node.relay_samples import Member, open_village, payloads_of, way_between

MIB = 1024 * 1024
OPEN = TensorTable()
BOTH_RELAYED = (LinkPath.RELAYED, LinkPath.RELAYED)
STRANGER = PeerId(b"s" * 32)
ONE, TWO = b"1" * 32, b"2" * 32


@pytest.fixture
def patched() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


# -- what it is for ----------------------------------------------------------------------------------------------------


@on_both_loops
async def test_two_that_cannot_be_dialled_are_linked_through_a_member() -> None:
    async with open_village(OPEN) as (_, (ann, bob, relay)):
        there, back = os.urandom(5 * MIB), os.urandom(3 * MIB)
        await ann.push(bob, there)
        await asyncio.gather(bob.push(ann, back, 1), ann.push(bob, back, 2))
        await bob.sink.until(lambda: len(bob.sink.payloads) == 2)
        await ann.sink.until(lambda: len(ann.sink.payloads) == 1)
        assert payloads_of(bob.sink) == [there, back] and payloads_of(ann.sink) == [back]
        assert way_between(ann, bob) == BOTH_RELAYED
        assert (ann.opened, ann.failed) == ([LinkPath.RELAYED], [Failure.PUNCH_TIMEOUT]), "the hole was tried first"
        assert relay.sink.ups == [] and relay.links.statistics().links == 0, "it is no peer of either link"
        status = relay.relay.status()
        assert (status.active, status.links, relay.relay.opened) == (True, 1, 1)
        assert status.relayed_bytes > len(there) + 2 * len(back)
        assert status.budget_bytes == 4096 * MIB - status.relayed_bytes
        assert not ann.relay.status().active, "nobody can dial this one"


@on_both_loops
async def test_both_may_ask_at_once_and_one_link_is_made() -> None:
    async with open_village(OPEN) as (_, (ann, bob, relay)):
        await asyncio.gather(ann.paths.relayed.link(bob.me), bob.paths.relayed.link(ann.me))
        assert way_between(ann, bob) == BOTH_RELAYED
        assert relay.relay.opened == 1
        assert relay.relay.refusals in ({}, {Refusal.DUPLICATE: 1})


@on_both_loops
async def test_an_orderly_end_passes_through() -> None:
    async with open_village(OPEN) as (_, (ann, bob, relay)):
        await ann.push(bob, b"x")
        await ann.links.stop()
        await bob.sink.until(lambda: bob.sink.ends)
        assert bob.sink.ends == [(ann.me, LinkEnd.PEER_SAID_GOODBYE)]
        await wait_until(lambda: not relay.relay._splices and not relay.relay._sides)
        assert relay.relay.ends == {}


@on_both_loops
async def test_a_killed_end_is_noticed_by_the_other_one() -> None:
    async with open_village(OPEN) as (_, (ann, bob, relay)):
        await ann.push(bob, b"x")
        next(iter(ann.links._connected))._transport.abort()
        await bob.sink.until(lambda: bob.sink.ends)
        assert bob.sink.ends == [(ann.me, LinkEnd.RELAY_ENDED)]
        await wait_until(lambda: not relay.relay._splices and not relay.relay._sides)


async def test_the_member_between_them_sees_nothing_and_forges_nothing(patched: pytest.MonkeyPatch) -> None:
    seen = bytearray()
    forward, flips = Splice.forward, False

    def look(self: Splice, side: Side, data: bytes | memoryview) -> None:
        altered = bytearray(data)
        seen.extend(data)
        if flips:
            altered[-1] ^= 1
        forward(self, side, bytes(altered))

    patched.setattr(Splice, "forward", look)
    async with open_village(OPEN) as (_, (ann, bob, _)):
        await ann.push(bob, b"nobody reads this " * 1000)
        await bob.sink.until(lambda: bob.sink.payloads)
        assert len(seen) > 18_000 and b"nobody reads" not in seen
        flips = True
        await ann.push(bob, b"nobody alters this " * 1000)
        await bob.sink.until(lambda: bob.sink.refusals_made)
        assert bob.sink.refusals_made == [(None, Refusal.NOT_AUTHENTIC)], "held against nobody"
        assert payloads_of(bob.sink) == [b"nobody reads this " * 1000]


@on_both_loops
async def test_a_slow_reader_slows_its_writer_and_buffers_stay_small() -> None:
    async with open_village(OPEN, completions_max=1) as (_, (ann, bob, relay)):
        bob.sink.completing = asyncio.Event()
        payloads = [os.urandom(4 * MIB) for _ in range(8)]
        sends = [asyncio.ensure_future(ann.push(bob, one, part)) for part, one in enumerate(payloads)]
        held = bob.links.config.completions_max * 4 * MIB
        await wait_until(lambda: relay.relay.relayed_bytes >= held)
        await wait_until(lambda: any(_waiting(side) for side in relay.relay._sides))
        (between,) = relay.relay._splices.values()
        assert all(side.transport.get_write_buffer_size() <= BUFFER_BYTES for side in between.sides)
        assert all(len(side.buffer) == BUFFER_BYTES for side in between.sides)
        assert not sends[-1].done()
        bob.sink.completing.set()
        await asyncio.gather(*sends)
        await bob.sink.until(lambda: len(bob.sink.payloads) == len(payloads))
        assert sorted(payloads_of(bob.sink)) == sorted(payloads)


def _waiting(side: Side) -> bool:
    return side.transport.get_write_buffer_size() > 0


# -- the budget --------------------------------------------------------------------------------------------------------


@on_both_loops
async def test_spent_bytes_end_a_link_and_the_transfer_goes_on_through_another_member() -> None:
    async with open_village(OPEN, OPEN) as (village, (ann, bob, *relays)):
        first = village.members[ann.paths.relayed._rank(bob.me)[0]]
        (other,) = (one for one in relays if one is not first)
        first.relay._budget = RelayBudget(bytes_max=4 * MIB, bytes_per_peer_max=4 * MIB)
        payload = os.urandom(8 * MIB)
        with pytest.raises(LinkLost) as lost:
            await ann.push(bob, payload)
        assert lost.value.reason is LinkEnd.RELAY_ENDED
        await wait_until(lambda: first.relay.ends)
        assert first.relay.ends == {Failure.BUDGET_SPENT: 1} and first.relay.relayed_bytes <= 4 * MIB
        await bob.sink.until(lambda: bob.sink.aborts)
        await ann.push(bob, payload)
        await bob.sink.until(lambda: bob.sink.payloads)
        assert payloads_of(bob.sink) == [payload] and other.relay.opened == 1


async def test_with_nothing_left_a_link_is_refused_for_that_reason() -> None:
    async with open_village(TensorTable(relay_mib_per_hour=2)) as (_, (ann, bob, relay)):
        with pytest.raises(LinkLost):
            await ann.push(bob, bytes(4 * MIB))
        with pytest.raises(RelayFailed) as failed:
            await ann.paths.relayed.link(bob.me)
        assert failed.value.failure is Failure.RELAY_REFUSED and Refusal.BUDGET_SPENT in str(failed.value)
        assert relay.relay.refusals == {Refusal.BUDGET_SPENT: 1}
        assert relay.relay.status().budget_bytes < MIB


async def test_an_hour_later_it_relays_again() -> None:
    async with open_village(TensorTable(relay_mib_per_hour=2)) as (village, (ann, bob, relay)):
        with pytest.raises(LinkLost):
            await ann.push(bob, bytes(4 * MIB))
        assert await ann.ask(relay, bob.me) is Refusal.BUDGET_SPENT
        village.ahead_s += 3700.0
        relay.become_reachable()
        await ann.push(bob, bytes(MIB))
        assert way_between(ann, bob) == BOTH_RELAYED


async def test_a_member_has_a_share_of_its_own() -> None:
    table = TensorTable(relay_mib_per_hour=64, relay_peer_mib_per_hour=2)
    async with open_village(table, ends=4) as (_, (ann, bob, cyd, dan, relay)):
        with pytest.raises(LinkLost):
            await ann.push(bob, bytes(4 * MIB))
        assert await cyd.ask(relay, bob.me) is Refusal.BUDGET_SPENT
        await cyd.push(dan, bytes(MIB))
        assert way_between(cyd, dan) == BOTH_RELAYED


# -- when members fail -------------------------------------------------------------------------------------------------


@on_both_loops
async def test_a_relaying_member_dies_and_another_one_takes_its_place() -> None:
    async with open_village(OPEN, OPEN, completions_max=1) as (village, (ann, bob, *relays)):
        await ann.push(bob, b"x")
        await bob.sink.until(lambda: bob.sink.payloads)
        dying = next(one for one in relays if one.relay.opened)
        other = next(one for one in relays if one is not dying)
        bob.sink.completing = asyncio.Event()  # so that the transfer cannot be over before that member is
        payloads = [os.urandom(4 * MIB) for _ in range(8)]
        sends = [asyncio.ensure_future(ann.push(bob, one, part)) for part, one in enumerate(payloads)]
        await wait_until(lambda: dying.relay.relayed_bytes > MIB)
        village.silent.add(dying.me)
        await dying.links.stop()
        bob.sink.completing.set()
        told = await asyncio.gather(*sends, return_exceptions=True)
        lost = [one for one in told if one is not None]
        # Those that were under way: the others still waited for a link, and go over the next one.
        assert 0 < len(lost) <= SENDS_PER_LINK
        assert all(isinstance(one, LinkLost) and one.reason is LinkEnd.RELAY_ENDED for one in lost)
        # All of them: what a link has taken need not have arrived.
        await asyncio.gather(*(ann.push(bob, one, part) for part, one in enumerate(payloads)))
        await bob.sink.until(lambda: set(payloads) <= set(payloads_of(bob.sink)))
        assert other.relay.opened == 1 and way_between(ann, bob) == BOTH_RELAYED


async def test_members_that_say_no_or_nothing_are_passed_over(patched: pytest.MonkeyPatch) -> None:
    patched.setattr(relayed_links, "RELAYS_TRIED_MAX", 4)
    async with open_village(OPEN, OPEN, TensorTable(relay=False), OPEN) as (village, (ann, bob, *relays)):
        village.silent.add(relays[0].me)
        patched.setattr(relays[1].paths.reach._known, "judge", lambda now: (None, ReachReason.NOT_ASKED))
        await ann.push(bob, b"x")
        assert relays[3].relay.opened == 1
        tried = set(ann.paths.relayed._shunned._known)
        assert relays[3].me not in tried and tried <= {one.me for one in relays}
        assert ann.paths.relayed._rank(bob.me)[-len(tried) :] != [] and (
            set(ann.paths.relayed._rank(bob.me)[4 - len(tried) :]) == tried
        ), "who has failed comes last"


async def test_both_ends_ask_the_same_member_and_pairs_are_spread() -> None:
    async with open_village(*[OPEN] * 4, ends=6) as (_, members):
        ends = members[:6]
        first = {}
        for one in ends:
            for other in ends:
                if one is not other:
                    first[one.me, other.me] = one.paths.relayed._rank(other.me)[0]
        assert all(first[one, other] == first[other, one] for one, other in first)
        assert len(set(first.values())) > 1


async def test_without_a_member_that_can_be_dialled_there_is_no_relay() -> None:
    async with open_village(ends=3) as (_, (ann, bob, _)):
        with pytest.raises(LinkLost) as lost:
            await ann.push(bob, b"x")
        assert lost.value.reason is LinkEnd.UNREACHABLE
        assert ann.failed == [Failure.PUNCH_TIMEOUT, Failure.NO_RELAY]


async def test_a_member_that_agrees_and_hangs_up_is_a_reason(patched: pytest.MonkeyPatch) -> None:
    def hang_up(transport: asyncio.Transport, first: memoryview) -> bool:
        transport.set_protocol(asyncio.Protocol())
        transport.abort()
        return True

    async with open_village(OPEN) as (_, (ann, bob, relay)):
        patched.setattr(relay.relay, "take_connection", hang_up)
        with pytest.raises(RelayFailed) as failed:
            await ann.paths.relayed.link(bob.me)
        assert failed.value.failure is Failure.RELAY_LOST


async def test_a_change_of_the_own_addresses_ends_the_pause() -> None:
    async with open_village(TensorTable(relay=False)) as (_, (ann, bob, _)):
        for expected in (Failure.RELAY_REFUSED, Failure.RELAY_PAUSED):
            with pytest.raises(RelayFailed) as failed:
                await ann.paths.relayed.link(bob.me)
            assert failed.value.failure is expected
        ann.paths.addresses_changed()
        with pytest.raises(RelayFailed) as failed:
            await ann.paths.relayed.link(bob.me)
        assert failed.value.failure is Failure.RELAY_REFUSED


# -- never an open relay -----------------------------------------------------------------------------------------------


async def test_relaying_is_for_members_and_for_both_of_them(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with open_village(OPEN) as (village, (ann, bob, relay)):
        assert await ann.ask(relay, STRANGER) is Refusal.NOT_A_MEMBER
        village.strangers.add(ann.me)
        assert await ann.ask(relay, bob.me) is Refusal.NOT_A_MEMBER
        assert await bob.ask(relay, ann.me) is Refusal.NOT_A_MEMBER
        village.strangers.clear()
        village.banned.add(ann.me)
        assert await ann.ask(relay, bob.me) is Refusal.BANNED
        assert await bob.ask(relay, ann.me) is Refusal.BANNED
        assert relay.relay.refusals == {Refusal.NOT_A_MEMBER: 3, Refusal.BANNED: 2}
        lines = [one for one in caplog.messages if "a link is not relayed" in one]
        assert len(lines) == 4, "one for each who asks and each reason"
        assert not relay.relay._splices and not relay.relay._tickets


async def test_it_relays_only_for_others_and_only_where_it_can_be_dialled() -> None:
    async with open_village(TensorTable(relay=False)) as (_, (ann, bob, relay)):
        for other in (relay.me, ann.me):
            assert await ann.ask(relay, other) is Refusal.MALFORMED
        assert await ann.ask(relay, bob.me) is Refusal.NOT_READY, "it may not"
        assert await relay.ask(bob, ann.me) is Refusal.NOT_READY, "nobody has dialled this one"


async def test_a_token_is_of_one_use_and_of_the_side_it_was_given_to() -> None:
    async with open_village(OPEN) as (_, (ann, bob, relay)):
        token = await ann.ask(relay, bob.me)
        assert isinstance(token, bytes)
        async with raw_connection(relay, MAGIC + token):
            await wait_until(lambda: relay.relay.carried == 1)
            async with raw_connection(relay, MAGIC + token) as (reader, _):
                assert await _ended(reader)
            assert relay.relay.refusals == {Refusal.EXPIRED: 1} and relay.relay.carried == 1
            assert relay.sink.refusals_made == [(None, Refusal.EXPIRED)], "nothing proves who that was"


async def test_who_has_stolen_a_token_gets_no_link() -> None:
    """The token opens a way to the other end; the handshake on it fails."""
    async with open_village(OPEN, ends=3) as (_, (ann, bob, eve, relay)):
        token = await ann.ask(relay, bob.me)
        assert isinstance(token, bytes)
        with suppress(LinkLost):
            await eve.paths.relayed._join(relay.me, bob.me, token, dialer=True)
        await bob.sink.until(lambda: bob.sink.refusals_made)
        assert bob.sink.refusals_made == [(None, Refusal.WRONG_PEER)] and bob.sink.ups == []
        assert not bob.links.is_linked(ann.me) and not bob.links.is_linked(eve.me)


async def test_tokens_expire_and_half_open_splices_end(patched: pytest.MonkeyPatch) -> None:
    patched.setattr(tensor_relay, "JOIN_TIMEOUT_S", 0.05)
    async with open_village(OPEN) as (_, (ann, bob, relay)):
        promise(relay, ann, bob)
        async with raw_connection(relay, MAGIC + ONE) as (reader, _):
            assert await _ended(reader), "the other one does not come"
        await wait_until(lambda: not relay.relay._splices)
        assert relay.relay.ends == {Failure.RELAY_HALF_OPEN: 1} and relay.relay._tickets == {}
        async with raw_connection(relay, MAGIC + TWO) as (reader, _):
            assert await _ended(reader)
        async with raw_connection(relay, MAGIC) as (reader, _):
            assert await _ended(reader), "who names nothing has to go in time"
        assert relay.relay.refusals == {Refusal.EXPIRED: 2}


@pytest.mark.parametrize("first", [b"R", MAGIC[:3] + b"X" + bytes(32), MAGIC + bytes(32), MAGIC + bytes(5000)])
async def test_what_names_no_token_is_turned_away(patched: pytest.MonkeyPatch, first: bytes) -> None:
    patched.setattr(tensor_relay, "JOIN_TIMEOUT_S", 0.05)
    async with open_village(OPEN) as (_, (_, _, relay)):
        async with raw_connection(relay, first) as (reader, _):
            assert await _ended(reader)
        assert relay.relay.refusals == {Refusal.EXPIRED: 1}
        await wait_until(lambda: not relay.relay._sides)


@on_both_loops
async def test_a_preamble_may_come_byte_by_byte_and_with_what_follows() -> None:
    async with open_village(OPEN) as (_, (ann, bob, relay)):
        promise(relay, ann, bob)
        early = raw_connection(relay, MAGIC + ONE + b"early")
        async with early as (_, one), raw_connection(relay, b"") as (reader, two):
            for byte in MAGIC + TWO:
                two.write(bytes([byte]))
                await two.drain()
                await asyncio.sleep(0)
            assert await reader.readexactly(5) == b"early"
            one.write(b" and late")
            one.write_eof()
            assert await reader.read() == b" and late", "the end of one direction passes, too"
            two.write(b"still")
            assert relay.relay.carried == 1
        await wait_until(lambda: not relay.relay._splices)
        assert relay.relay.relayed_bytes >= len(b"early and late") and relay.relay.ends == {}


async def test_connections_that_name_nothing_are_few(patched: pytest.MonkeyPatch) -> None:
    patched.setattr(tensor_relay, "UNNAMED_MAX", 2)
    async with open_village(OPEN) as (_, (_, _, relay)):
        async with raw_connection(relay, b"R") as (first, _), raw_connection(relay, b"R"):
            await wait_until(lambda: len(relay.relay._unnamed) == 2)
            async with raw_connection(relay, b"R"):
                assert await _ended(first), "the oldest goes for the newest"
                await wait_until(lambda: len(relay.relay._unnamed) == 2)
        assert relay.relay.refusals == {Refusal.LIMIT: 1}


async def test_links_are_bounded_in_all_and_for_each_member() -> None:
    async with open_village(TensorTable(relay_links_max=2), ends=6) as (_, members):
        *ends, relay = members
        for one, other in (ends[0:2], ends[2:4]):
            await one.push(other, b"x")
        assert await ends[4].ask(relay, ends[5].me) is Refusal.LIMIT
    async with open_village(TensorTable(relay_links_per_peer_max=1), ends=4) as (_, (ann, bob, cyd, dan, relay)):
        await ann.push(bob, b"x")
        assert await ann.ask(relay, cyd.me) is Refusal.LIMIT
        assert await cyd.ask(relay, bob.me) is Refusal.LIMIT, "it counts for both"
        assert isinstance(await cyd.ask(relay, dan.me), bytes)


async def test_nobody_asks_without_end() -> None:
    async with open_village(OPEN) as (village, (ann, bob, relay)):
        village.silent.add(bob.me)
        village.stop_clock()
        answers = [await ann.ask(relay, bob.me) for _ in range(tensor_relay.ASKS_BURST + 1)]
        assert set(answers[:-1]) == {Refusal.NOT_READY} and answers[-1] is Refusal.LIMIT
        await wait_until(lambda: not relay.relay._splices)
        assert relay.relay.ends == {Failure.PEER_UNREACHABLE: tensor_relay.ASKS_BURST}


async def test_an_old_splice_goes_for_a_new_one_and_a_young_one_stays() -> None:
    async with open_village(OPEN) as (village, (ann, bob, relay)):
        await ann.push(bob, b"x")
        assert await bob.ask(relay, ann.me) is Refusal.DUPLICATE
        village.ahead_s += tensor_relay.REPLACE_AFTER_S + 1
        token = await bob.ask(relay, ann.me)
        assert isinstance(token, bytes)
        await ann.sink.until(lambda: ann.sink.ends)
        assert ann.sink.ends == [(bob.me, LinkEnd.RELAY_ENDED)]
        await wait_until(lambda: [one.held for one in relay.relay._sides] == [b""])  # the called one has come


@pytest.mark.parametrize(
    ("ahead_s", "idle_s", "reason"),
    [
        (tensor_relay.IDLE_TIMEOUT_S, tensor_relay.IDLE_TIMEOUT_S, Failure.RELAY_IDLE),
        (tensor_relay.LIFE_S_MAX, 1e12, Failure.RELAY_EXPIRED),
        (0.0, tensor_relay.IDLE_TIMEOUT_S, Failure.PEER_LOST),
    ],
)
async def test_each_splice_has_an_end_with_its_reason(
    patched: pytest.MonkeyPatch, ahead_s: float, idle_s: float, reason: Failure
) -> None:
    patched.setattr(tensor_relay, "CHECK_PERIOD_S", 0.01)
    patched.setattr(tensor_relay, "IDLE_TIMEOUT_S", idle_s)
    async with open_village(OPEN) as (village, (ann, bob, relay)):
        await ann.push(bob, b"x")
        await wait_until(lambda: relay.relay.carried == 1)
        if reason is Failure.PEER_LOST:
            village.banned.add(ann.me)

        def pass_time() -> bool:
            village.ahead_s += ahead_s
            return bool(bob.sink.ends)

        await wait_until(pass_time)
        assert bob.sink.ends == [(ann.me, LinkEnd.RELAY_ENDED)]
        await wait_until(lambda: relay.relay.ends)
        assert relay.relay.ends == {reason: 1}


async def test_calls_are_taken_from_members_for_members_and_few_at_once(patched: pytest.MonkeyPatch) -> None:
    async with open_village(OPEN) as (_, (ann, bob, relay)):

        def refusal_of(caller: PeerId, peer: PeerId) -> Refusal | None:
            try:
                ann.paths.relayed.take_call(caller, RelayCall(peer=peer, token=bytes(32)))
            except ProtocolError as error:
                return error.refusal
            return None

        assert refusal_of(STRANGER, bob.me) is refusal_of(relay.me, STRANGER) is Refusal.NOT_A_MEMBER
        assert refusal_of(bob.me, relay.me) is Refusal.NOT_READY, "it announces no address"
        assert refusal_of(relay.me, relay.me) is Refusal.MALFORMED
        assert refusal_of(relay.me, bob.me) is None
        assert refusal_of(relay.me, bob.me) is Refusal.LIMIT, "one at a time"
        await wait_until(lambda: not ann.paths.relayed._called)
        patched.setattr(relayed_links, "CALLS_MAX", 0)
        assert refusal_of(relay.me, bob.me) is Refusal.LIMIT


# -- in the daemon -----------------------------------------------------------------------------------------------------


async def test_status_and_metrics_tell_what_is_relayed(tmp_path: Path) -> None:
    async with open_peers(tmp_path, 3) as (ann, bob, relay):
        for peer in (ann, bob):
            del peer.swarm.addresses[peer.me]
            peer.paths.punches.punch = _fail_to_punch  # type: ignore[method-assign]
        relay.paths.reach.link_came_in(ann.me, relay.swarm.addresses[relay.me], ("127.0.0.1", 1))
        with pytest.raises(FetchFailed):
            await ann.links.fetch(bob.me, (), bytes(32), memoryview(bytearray(9)), 30.0)
        assert [row.path for row in ann.reporter.build_status().peers if row.path] == [LinkPath.RELAYED]
        status = relay.reporter.build_status().tensor_relay
        assert status.active and status.links == 1 and status.relayed_bytes > 0
        told = _read_metrics(relay)
        assert told["shoal_tensor_relay_links"] == told["shoal_tensor_relay_opened_total"] == 1
        assert told["shoal_tensor_relay_bytes_total"] == relay.paths.relay.relayed_bytes
        assert told['shoal_tensor_relay_ends_total{reason="budget_spent"}'] == 0
        assert _read_metrics(ann)['shoal_tensor_links{path="relayed"}'] == 1
        donors = ann.catch_up.donors
        assert [one.peer for one in donors.of_updates(0)] == [relay.me], "a relay costs a third peer twice the bytes"
        donors.liars.add(relay.me)
        assert [one.peer for one in donors.of_updates(0)] == [bob.me], "where there is no other donor it is worth that"


async def _fail_to_punch(peer: PeerId) -> None:
    raise PunchFailed(peer, Failure.PUNCH_TIMEOUT)


def _read_metrics(peer: Peer) -> dict[str, float]:
    lines = peer.reporter.render_metrics().decode().splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[:1] != "#")}


def promise(relay: Member, asker: Member, other: Member) -> None:
    """A splice whose tokens are ONE and TWO, of which the two know nothing."""
    made = relay.relay._promise(asker.me, other.me)
    relay.relay._tickets |= {ONE: (made, 0), TWO: (made, 1)}
    relay.links.spawn(relay.relay._watch(made))


@asynccontextmanager
async def raw_connection(to: Member, first: bytes) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection to a tensor port that begins so."""
    reader, writer = await asyncio.open_connection(*to.node.address)
    with closing(writer):
        if first:
            writer.write(first)
            await writer.drain()
        yield reader, writer


async def _ended(reader: asyncio.StreamReader) -> bool:
    """Whether the other side has hung up; waits for it."""
    try:
        async with asyncio.timeout(PATIENCE_S):
            return await reader.read() == b""
    except ConnectionError:
        return True


def test_nobody_mistakes_a_preamble_for_a_link() -> None:
    assert MAGIC[:1] != secure_channel._HELLO_MAGIC[:1]
