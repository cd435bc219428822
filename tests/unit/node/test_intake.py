"""What comes in and must not: counted with its reason on its plane; liars are hung up on over both, the late never."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from blake3 import blake3

from shoal.crdt.entries import Batch, decode_batch_untrusted, encode_batch
from shoal.crdt.kinds import BanBody, Kind
from shoal.crdt.ledger import Draft, Ledger
from shoal.node import ban_watch
from shoal.node.conduct import LATE_MAX, LIES_MAX, REFUSED_S
from shoal.node.control import PeerUnreachable, RequestRefused
from shoal.node.happenings import HappeningKind, Severity
from shoal.node.ledger_sync import make_rules
from shoal.node.link_port import LinkLost
from shoal.node.reminders import REMIND_S
from shoal.protocol.errors import Failure, ProtocolError, Refusal
from shoal.protocol.frames import FrameHeader, FrameKind
from shoal.protocol.identity import PeerId, short_peer_id
from shoal.protocol.messages import (
    Contribution,
    GetPeers,
    LedgerEntries,
    ManifestAnswer,
    Nack,
    PeersAnswer,
    Prepare,
    Refused,
    decode_message_untrusted,
)
from tests.unit.node.exposition import count_refused, read
from tests.unit.node.link_harness import Proxy
from tests.unit.node.node_samples import (
    PATIENCE_S,
    Peer,
    make_samples,
    open_peer,
    open_peers,
    wait_until,
)
from tests.unit.node.planes import MakeControl, in_memory, over_libp2p
from tests.unit.node.puppet import Puppet, open_puppet
from tests.unit.protocol.samples import IDENTITIES

# An account drains while it is filled: one lie more than fill it at once is enough within some seconds.
ENOUGH = LIES_MAX + 1


@asynccontextmanager
async def open_target(folder: Path, make_control: MakeControl = in_memory) -> AsyncIterator[tuple[Peer, Puppet]]:
    """A peer in round 1, and somebody who is connected to it and known to it as a trainer."""
    swarm = make_samples()
    async with (
        open_peer(swarm, 0, folder, trains=True, make_control=make_control) as peer,
        open_puppet(swarm, 1, peer, make_control=make_control) as puppet,
    ):
        puppet.show(peer)
        await wait_until(lambda: is_connected(peer, puppet))
        yield peer, puppet


def is_connected(peer: Peer, puppet: Puppet) -> bool:
    return puppet.me in {one.peer for one in peer.control.peers()}


def make_part(peer: Peer, number: int = 1, part: int = 0, fill: int = 0) -> tuple[FrameHeader, bytes]:
    """A contribution part of round `number` that decodes."""
    payload = bytes([0] * 4 + [fill] * (peer.exchange.part_bytes(FrameKind.CONTRIBUTION, 1, part) - 4))
    header = FrameHeader(
        kind=FrameKind.CONTRIBUTION, round=number, part=part, nbytes=len(payload), digest=blake3(payload).digest()
    )
    return header, payload


async def push(puppet: Puppet, peer: Peer, header: FrameHeader, payload: bytes) -> None:
    """Push a frame until the peer has judged it: a link that the frame before it has ended may have swallowed it."""
    judged = count_judged(peer)
    while count_judged(peer) == judged:
        with contextlib.suppress(LinkLost):
            await puppet.push(peer, header, payload)
        await wait_until(lambda: count_judged(peer) > judged or not puppet.links.is_linked(peer.me))


def count_judged(peer: Peer) -> int:
    return len(peer.tensor_refusals) + len(peer.dropped)


def hang_ups(peer: Peer) -> list[str]:
    return [one.text for one in peer.reporter.feed.recent if one.text.startswith("hung up on")]


# -- dropped with a counted reason -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda raw: raw[:-1], "malformed"),
        (lambda raw: raw[:1], "malformed"),
        (lambda raw: b"", "malformed"),
        (lambda raw: raw + b"\x00", "malformed"),
        (lambda raw: b"\xff" * len(raw), "malformed"),
    ],
    ids=["truncated", "one byte", "nothing", "too long", "garbage"],
)
async def test_bytes_that_are_no_message_are_counted(tmp_path: Path, spoil: object, reason: str) -> None:
    assert callable(spoil)
    async with open_target(tmp_path) as (peer, puppet):
        raw = puppet.encode(Prepare(round=1, attempt=1))
        await puppet.control.send(peer.me, spoil(raw))
        await wait_until(lambda: count_refused(peer, reason, "control") == 1)
        assert is_connected(peer, puppet), "once is no habit"


async def test_what_has_its_turn_when_the_intake_is_closed_is_dropped(tmp_path: Path) -> None:
    """The daemon ends its tasks a while after it has closed the intake."""
    async with open_target(tmp_path) as (peer, puppet):
        entries = puppet.encode(LedgerEntries(payload=b"", batches=(b"no batch",)))
        before = asyncio.all_tasks()
        peer.intake.take_message(puppet.me, entries)
        (taking,) = asyncio.all_tasks() - before
        peer.intake.close()
        await taking
        assert peer.misbehaviours == []


async def test_a_message_of_another_swarm_is_counted_and_told_once(tmp_path: Path) -> None:
    swarm = make_samples()
    async with (
        open_peer(swarm, 0, tmp_path) as peer,
        open_puppet(swarm, 1, peer, speaks_for=b"o" * 32) as puppet,
    ):
        await puppet.tell(peer, Prepare(round=1, attempt=1), Prepare(round=1, attempt=2))
        await wait_until(lambda: count_refused(peer, "wrong_swarm", "control") == 2)
        await wait_until(lambda: puppet.heard(Refused))
        assert [one.refusal for one in puppet.heard(Refused)] == ["wrong_swarm"]


async def test_an_answer_that_nobody_asked_for_is_no_message(tmp_path: Path) -> None:
    async with open_target(tmp_path) as (peer, puppet):
        await puppet.tell(peer, ManifestAnswer(signed_manifest=b"x"))
        await wait_until(lambda: count_refused(peer, "unknown_type", "control") == 1)


async def test_ledger_entries_that_do_not_decode_cost_their_sender(tmp_path: Path) -> None:
    async with open_target(tmp_path) as (peer, puppet):
        await puppet.tell(peer, LedgerEntries(payload=b"", batches=(b"no batch",)))
        await wait_until(lambda: count_refused(peer, "malformed", "control") == 1)
        assert len(peer.ledger.ledger) == 0


async def test_a_question_that_no_honest_peer_asks_costs_the_asker(tmp_path: Path) -> None:
    async with open_target(tmp_path) as (peer, puppet):
        with pytest.raises(RequestRefused) as caught:
            await puppet.control.request(peer.me, puppet.encode(Prepare(round=1, attempt=1)))
        assert caught.value.refusal is Refusal.UNKNOWN_TYPE
        assert count_refused(peer, "unknown_type", "control") == 1


async def test_parts_of_another_round_and_parts_twice_are_counted(tmp_path: Path) -> None:
    async with open_target(tmp_path) as (peer, puppet):
        header, payload = make_part(peer)
        await puppet.push(peer, header, payload)
        await wait_until(lambda: peer.core.check_part(puppet.me, 1, 0, header.digest) is Refusal.DUPLICATE)
        await push(puppet, peer, header, payload)
        await push(puppet, peer, *make_part(peer, number=7))
        assert peer.dropped == [(puppet.me, Refusal.DUPLICATE), (puppet.me, Refusal.WRONG_ROUND)]
        assert count_refused(peer, "duplicate", "tensor") == count_refused(peer, "wrong_round", "tensor") == 1
        assert peer.links.is_linked(puppet.me)


async def test_a_part_that_is_not_finished_is_counted_and_costs_next_to_nothing(tmp_path: Path) -> None:
    async with open_target(tmp_path) as (peer, puppet):
        header, _ = make_part(peer)
        assert isinstance(peer.exchange.reserve(puppet.me, header), memoryview)
        peer.exchange.aborted(puppet.me, header)
        assert count_refused(peer, "expired", "tensor") == 1
        assert peer.conduct.list_refused(peer.now_s()) == {}


# -- the late are never hung up on -----------------------------------------------------------------------------------


async def test_who_is_late_and_repeats_itself_is_never_hung_up_on(tmp_path: Path) -> None:
    async with open_peers(tmp_path, 2) as (ann, bob):
        await ann.contribute(1)
        await bob.contribute(2)
        await wait_until(lambda: ann.core.round == bob.core.round == 2)
        async with open_puppet(ann.swarm, 2, ann) as puppet:
            puppet.show(ann)
            old = [Nack(round=1, attempt=0, promised=2), Contribution(round=1, digests=(bytes(32),) * 3)]
            for _ in range(10 * LIES_MAX):
                await puppet.tell(ann, *old)
            await wait_until(lambda: count_refused(ann, "wrong_round", "control") == 20 * LIES_MAX)
            for number in range(3 * LIES_MAX):
                await push(puppet, ann, *make_part(ann, number=1, fill=number))
            assert count_refused(ann, "wrong_round", "tensor") == 3 * LIES_MAX
            assert is_connected(ann, puppet) and ann.links.is_linked(puppet.me)
            assert hang_ups(ann) == []


async def test_bytes_that_are_altered_on_the_way_accuse_nobody(tmp_path: Path) -> None:
    async with open_target(tmp_path) as (peer, puppet):
        for number in range(LIES_MAX + 2):
            async with Proxy.before(peer.swarm.addresses[peer.me]) as (proxy, address):
                proxy.flip_at = 600 + 40 * number  # behind the handshake: in a prefix, a header or a payload
                header, payload = make_part(peer, number=7)
                ended = len(peer.tensor_refusals)
                for _ in range(8):
                    with contextlib.suppress(LinkLost):
                        await puppet.links.send(peer.me, (address,), header, memoryview(payload))
                await wait_until(lambda ended=ended: len(peer.tensor_refusals) > ended)  # type: ignore[misc]
                await wait_until(lambda: not peer.links.is_linked(puppet.me))
        assert {accused for accused, _ in peer.tensor_refusals} == {None}
        assert is_connected(peer, puppet) and hang_ups(peer) == []


async def test_a_flood_of_late_messages_is_too_much(tmp_path: Path) -> None:
    async with open_target(tmp_path) as (peer, puppet):
        with contextlib.suppress(PeerUnreachable):
            for _ in range(LATE_MAX + LATE_MAX // 4):
                await puppet.tell(peer, Prepare(round=9, attempt=0))
        await wait_until(lambda: not is_connected(peer, puppet))
        assert peer.conduct.refusal(puppet.me, peer.now_s()) is Refusal.WRONG_ROUND


# -- liars are, over both planes, for a while ------------------------------------------------------------------------


async def lie_until_refused(peer: Peer, puppet: Puppet) -> None:
    with contextlib.suppress(PeerUnreachable):
        for _ in range(ENOUGH):
            await puppet.control.send(peer.me, b"\xff")
    await wait_until(lambda: peer.intake.refuses(puppet.me) and not is_connected(peer, puppet))


async def test_a_liar_loses_both_planes_and_its_place_in_the_round(tmp_path: Path) -> None:
    async with open_target(tmp_path) as (peer, puppet):
        header, payload = make_part(peer)
        await puppet.push(peer, header, payload)
        await wait_until(lambda: peer.links.is_linked(puppet.me))
        await lie_until_refused(peer, puppet)
        await wait_until(lambda: not peer.links.is_linked(puppet.me))
        await wait_until(lambda: puppet.me not in peer.membership.table.live())
        assert [(one.peer, one.reason) for one in peer.lost] == [(puppet.me, Failure.PEER_LOST)]
        (told,) = hang_ups(peer)
        assert told.startswith(f"hung up on {short_peer_id(puppet.me)}: malformed")
        assert read(peer, "hang_ups_total", reason="malformed") == read(peer, "peers_refused") == 1
        assert count_refused(peer, "malformed", "control") == ENOUGH
        status = peer.reporter.build_status()
        assert any("misbehaved (malformed) and is refused for" in one for one in status.warnings)
        assert any(one.kind is HappeningKind.NETWORK and one.text == told for one in status.happenings)


async def test_nothing_of_a_refused_peer_is_taken(tmp_path: Path) -> None:
    async with open_target(tmp_path) as (peer, puppet):
        await lie_until_refused(peer, puppet)
        seen = len(peer.seen)
        puppet.show(peer)
        peer.intake.take_presence(puppet.me, puppet.encode(puppet.make_presence(peer)))
        peer.intake.take_message(puppet.me, puppet.encode(Prepare(round=1, attempt=1)))
        with pytest.raises(ProtocolError) as caught:
            await peer.intake.answer(puppet.me, puppet.encode(GetPeers()))
        assert caught.value.refusal is Refusal.MALFORMED
        assert len(peer.seen) == seen
        assert puppet.me not in peer.membership.table.live()
        assert count_refused(peer, "malformed", "control") == ENOUGH + 3
        await push(puppet, peer, *make_part(peer))
        assert peer.tensor_refusals[-1] == (puppet.me, Refusal.MALFORMED), "it is not admitted"
        assert not await peer.membership.connect(puppet.me), "it is not dialled either"


async def test_a_refused_peer_that_keeps_trying_is_told_of_once_a_minute(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def lines() -> list[str]:
        return [one.getMessage() for one in caplog.records if "malformed" in one.getMessage()]

    async with open_target(tmp_path) as (peer, puppet):
        await lie_until_refused(peer, puppet)
        for _ in range(50):
            peer.intake.link_refused(puppet.me, Refusal.MALFORMED)
        assert count_refused(peer, "malformed", "control") == ENOUGH
        assert count_refused(peer, "malformed", "tensor") == 50, "counted to the last"
        assert len(lines()) == 2, "that something was refused, and that it was hung up on"
        peer.now_s = lambda: time.monotonic() + REMIND_S
        peer.intake.link_refused(puppet.me, Refusal.MALFORMED)
        assert lines()[2].endswith(f"over a tensor link (and {ENOUGH + 49} times more since it was last said)")


async def test_who_is_refused_by_everybody_says_so_once_a_minute(tmp_path: Path) -> None:
    def told(peer: Peer) -> list[str]:
        return [one.text for one in peer.reporter.feed.recent if "refuses this peer" in one.text]

    async with open_target(tmp_path) as (peer, puppet), open_puppet(peer.swarm, 2, peer) as other:
        for one in (puppet, other, puppet):
            peer.intake.take_message(one.me, one.encode(Refused(refusal="banned", detail="by the swarm's owner")))
            peer.intake.take_message(one.me, one.encode(Refused(refusal="wrong_base", detail="another log")))
        owners, *others = told(peer)
        assert owners.endswith("banned (by the swarm's owner)")
        assert len(others) == 2 and all("wrong_base" in one for one in others), "of each peer"
        peer.now_s = lambda: time.monotonic() + REMIND_S
        peer.intake.take_message(puppet.me, puppet.encode(Refused(refusal="banned", detail="by the swarm's owner")))
        assert told(peer)[-1].endswith("banned (by the swarm's owner) (and 2 times more since it was last said)")


async def test_a_refused_peer_that_connects_again_is_disconnected_at_once(tmp_path: Path) -> None:
    async with open_target(tmp_path) as (peer, puppet):
        await lie_until_refused(peer, puppet)
        await puppet.control.connect(peer.control.addresses())
        await wait_until(lambda: not is_connected(peer, puppet))


async def test_a_refused_peer_gets_another_chance(tmp_path: Path) -> None:
    async with open_target(tmp_path) as (peer, puppet):
        await lie_until_refused(peer, puppet)
        await wait_until(lambda: puppet.me not in peer.membership.table.live())
        peer.now_s = lambda: time.monotonic() + REFUSED_S
        await puppet.control.connect(peer.control.addresses())
        puppet.show(peer)
        assert puppet.me in peer.membership.table.live()
        header, payload = make_part(peer)
        await puppet.push(peer, header, payload)
        await wait_until(lambda: peer.core.check_part(puppet.me, 1, 0, header.digest) is Refusal.DUPLICATE)
        assert is_connected(peer, puppet)
        for _ in range(LIES_MAX - 1):
            await puppet.control.send(peer.me, b"\xff")
        await wait_until(lambda: count_refused(peer, "malformed", "control") == ENOUGH + LIES_MAX - 1)
        assert is_connected(peer, puppet), "its account was empty again"


async def test_a_refused_voter_does_not_stop_the_others(tmp_path: Path) -> None:
    async with open_peers(tmp_path, 3) as (ann, bob, cara):
        for peer in (ann, bob):
            for _ in range(ENOUGH):
                await cara.control.send(peer.me, b"\xff")
        await wait_until(lambda: ann.intake.refuses(cara.me) and bob.intake.refuses(cara.me))
        await wait_until(lambda: all(cara.me not in one.membership.table.live() for one in (ann, bob)))
        await ann.contribute(1)
        await bob.contribute(2)
        await wait_until(lambda: ann.commits and bob.commits)
        assert ann.commits[0] == bob.commits[0]


async def ask_until_answered(peer: Peer, puppet: Puppet) -> bytes:
    """As a peer does that was hung up on: it may learn only now that its last connection is gone."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                await puppet.control.connect(peer.control.addresses())
                return await puppet.control.request(peer.me, puppet.encode(GetPeers()))
            except (PeerUnreachable, RequestRefused):
                await asyncio.sleep(0)


@pytest.mark.parametrize("make_control", [in_memory, over_libp2p], ids=["memory", "libp2p"])
async def test_lies_over_tensor_links_end_the_control_connection_too(tmp_path: Path, make_control: MakeControl) -> None:
    async with open_target(tmp_path, make_control) as (peer, puppet):
        header, payload = make_part(peer)
        wrong = replace(header, nbytes=len(payload) - 1)
        for number in range(ENOUGH):
            assert is_connected(peer, puppet) and not peer.intake.refuses(puppet.me), number
            await push(puppet, peer, wrong, payload[:-1])
        await wait_until(lambda: not is_connected(peer, puppet))
        await wait_until(lambda: not peer.links.is_linked(puppet.me))
        assert count_refused(peer, "wrong_length", "tensor") == ENOUGH
        assert peer.intake.why_refused(puppet.me) is Refusal.WRONG_LENGTH
        await push(puppet, peer, header, payload)
        assert peer.tensor_refusals[-1] == (puppet.me, Refusal.WRONG_LENGTH), "it is not admitted"
        with contextlib.suppress(PeerUnreachable):
            await puppet.control.connect(peer.control.addresses())
        await wait_until(lambda: not is_connected(peer, puppet))
        peer.now_s = lambda: time.monotonic() + REFUSED_S
        raw = await ask_until_answered(peer, puppet)
        assert isinstance(decode_message_untrusted(peer.swarm.id, raw), PeersAnswer)
        await puppet.push(peer, header, payload)
        await wait_until(lambda: peer.links.is_linked(puppet.me))


async def test_lies_over_the_real_control_plane_end_the_tensor_links_too(tmp_path: Path) -> None:
    async with open_target(tmp_path, over_libp2p) as (peer, puppet):
        header, payload = make_part(peer)
        await puppet.push(peer, header, payload)
        await wait_until(lambda: peer.core.check_part(puppet.me, 1, 0, header.digest) is Refusal.DUPLICATE)
        # The round has just ended, or it hears the same again: that is no lie.
        for _ in range(2 * LIES_MAX):
            await puppet.tell(peer, Prepare(round=9, attempt=0))
        await wait_until(lambda: count_refused(peer, "wrong_round", "control") == 2 * LIES_MAX)
        assert is_connected(peer, puppet) and peer.links.is_linked(puppet.me)
        await lie_until_refused(peer, puppet)
        await wait_until(lambda: not peer.links.is_linked(puppet.me))
        assert LIES_MAX <= count_refused(peer, "malformed", "control") <= ENOUGH


# -- the owner's bans ------------------------------------------------------------------------------------------------


def sign_ban(peer: Peer, banned: PeerId) -> Batch:
    """The owner's decree."""
    owner = Ledger(identity=IDENTITIES[0], rules=make_rules(peer.swarm.manifest, peer.swarm.id))
    body = BanBody(peer=banned, reason="it lies", removes=())
    return owner.write([Draft(kind=Kind.BAN, body=body)], time.time_ns() // 1_000_000)


def ban(peer: Peer, banned: Puppet) -> None:
    """The owner's decree reaches this peer's ledger."""
    assert peer.ledger.ledger.accept(sign_ban(peer, banned.me)).accepted


async def test_a_peer_that_is_banned_itself_says_so_once_and_lets_nobody_repeat_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ban_watch, "PERIOD_S", 0.01)
    async with open_target(tmp_path) as (peer, puppet):
        told = peer.reporter.feed
        refused = puppet.encode(Refused(refusal="banned", detail="by the swarm's owner"))
        decree = sign_ban(peer, peer.me)
        peer.intake.take_message(puppet.me, puppet.encode(LedgerEntries(payload=b"", batches=(encode_batch(decree),))))
        await wait_until(lambda: any("has banned this peer" in one.text for one in told.recent))
        peer.intake.take_message(puppet.me, refused)
        (one,) = (one for one in told.recent if "banned" in one.text)
        assert one.severity is Severity.ERROR and decree.tip.hex()[:16] in one.text
        assert any("has banned this peer" in warning for warning in peer.reporter.build_status().warnings)


async def test_a_banned_peer_loses_both_planes_at_once_and_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ban_watch, "PERIOD_S", 0.01)
    async with open_target(tmp_path) as (peer, puppet):
        header, payload = make_part(peer)
        await puppet.push(peer, header, payload)
        await wait_until(lambda: peer.links.is_linked(puppet.me))
        assert is_connected(peer, puppet) and not peer.intake.refuses(puppet.me)
        ban(peer, puppet)
        # Nothing of it is taken from here on, even before what it has is ended.
        assert peer.intake.why_refused(puppet.me) is Refusal.BANNED
        await wait_until(lambda: not is_connected(peer, puppet) and not peer.links.is_linked(puppet.me))
        await wait_until(lambda: puppet.me not in peer.membership.table.live())
        (told,) = hang_ups(peer)
        assert "banned by the swarm's owner (it lies)" in told
        # It is shown the owner's word before it is told, and not each time that it comes.
        await wait_until(lambda: bool(puppet.heard(Refused)))
        (shown,) = puppet.heard(LedgerEntries)
        assert [decode_batch_untrusted(raw).author for raw in shown.batches] == [IDENTITIES[0].peer]
        assert puppet.messages.index(shown) < puppet.messages.index(puppet.heard(Refused)[0])
        # It does not come back, on either plane.
        with pytest.raises(LinkLost) as refused:
            await puppet.push(peer, header, payload)
            await puppet.links.fetch(
                peer.me, (peer.swarm.addresses[peer.me],), bytes(32), memoryview(bytearray(1)), 5.0
            )
        assert refused.value.refusal is Refusal.BANNED
        with contextlib.suppress(PeerUnreachable):
            await puppet.tell(peer, Prepare(round=1, attempt=0))
        await wait_until(lambda: not is_connected(peer, puppet))
        assert peer.conduct.refusal(puppet.me, peer.now_s()) is None
        assert len(puppet.heard(LedgerEntries)) == 1
