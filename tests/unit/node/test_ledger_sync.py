"""The ledger at work: durable before it is shown, pushed and compared, and no peer or disk that fails ends it."""

import asyncio
import math
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from shoal.crdt.anti_entropy import PUSH_PEERS, ROUND_TRIPS_MAX
from shoal.crdt.entries import Batch, decode_batch_untrusted, encode_batch
from shoal.crdt.kinds import Kind, RoundBody
from shoal.crdt.ledger import Draft, Ledger
from shoal.crdt.measurements import MEASUREMENTS_KEPT_MAX, HeldOutLoss, decode_measurement_untrusted
from shoal.crdt.own_chain import OwnChain
from shoal.crdt.reconciliation import Answer, answer, begin
from shoal.crdt.sketch import SALT_BYTES
from shoal.node import ledger_sync
from shoal.node.control import PeerUnreachable
from shoal.node.ledger_store import StoreError
from shoal.protocol.errors import Failure, ProtocolError, Refusal
from shoal.protocol.identity import PeerId, format_peer_id
from shoal.protocol.messages import LedgerEntries, Reconcile, decode_message_untrusted, encode_message
from shoal.protocol.quorum import find_evaluator
from tests.unit.node.exposition import read
from tests.unit.node.node_samples import PATIENCE_S, Peer, make_chain, make_samples, open_peer, open_peers, wait_until
from tests.unit.node.puppet import open_puppet

WALL_MS = 1_760_000_000_000


@pytest.fixture(autouse=True)
def chains_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a peer may write is the business of test_ledger_own_chain.py."""
    monkeypatch.setattr(OwnChain, "held", None)


def fail_to_store(batches: Sequence[Batch], *, own: bool) -> None:
    raise StoreError(Path("ledger.sqlite"), Failure.DISK_FULL, "the disk is full", "make space")


async def test_what_is_written_is_durable_before_anybody_sees_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_peers(tmp_path, 2) as (ann, bob):
        stored: list[int] = []
        append = ann.state.stores.ledger.append

        def watch(batches: Sequence[Batch], *, own: bool) -> None:
            assert len(ann.ledger.ledger) == len(bob.ledger.ledger) == 0
            append(batches, own=own)
            stored.append(len(batches))

        monkeypatch.setattr(ann.state.stores.ledger, "append", watch)
        await ann.ledger.write_lease(b"lease", [bob.me])
        assert stored == [1]
        # What others have written is theirs to lose: it may be seen before it is on this disk.
        await wait_until(lambda: len(bob.ledger.ledger) == len(bob.state.stores.ledger.load()) == 1)


async def test_new_entries_go_to_some_peers_and_who_is_away_costs_nothing(tmp_path: Path) -> None:
    swarm = make_samples()
    async with open_peer(swarm, 0, tmp_path) as peer, open_puppet(swarm, 1, peer) as puppet:
        strangers = [PeerId(bytes([number]) * 32) for number in range(1, PUSH_PEERS)]
        await peer.ledger.write_lease(b"lease", [*strangers, puppet.me])
        await wait_until(lambda: puppet.heard(LedgerEntries))
        (raw,) = puppet.heard(LedgerEntries)[0].batches
        assert decode_batch_untrusted(raw).author == peer.me


async def test_only_so_many_are_pushed_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_peer(make_samples(), 0, tmp_path) as peer:
        told: list[PeerId] = []

        async def send(peer: PeerId, payload: bytes) -> None:
            told.append(peer)

        monkeypatch.setattr(peer.ledger._control, "send", send)
        strangers = [PeerId(bytes([number]) * 32) for number in range(3 * PUSH_PEERS)]
        await peer.ledger.write_lease(b"lease", strangers)
        assert len(set(told)) == len(told) == PUSH_PEERS
        assert set(told) <= set(strangers)


async def test_two_ledgers_that_grew_apart_become_equal(tmp_path: Path) -> None:
    async with open_peers(tmp_path, 2) as (ann, bob):
        for number in range(5):
            await ann.ledger.write_lease(b"ann %d" % number, [])
            await bob.ledger.write_lease(b"bob %d" % number, [])
        assert await ann.ledger.reconcile(bob.me) == 5
        await wait_until(lambda: len(bob.ledger.ledger) == 10)
        assert ann.ledger.ledger.heads == bob.ledger.ledger.heads
        assert await bob.ledger.reconcile(ann.me) == 0
        await wait_until(lambda: len(bob.state.stores.ledger.load()) == 10)  # stored a moment after it counts


async def test_a_certificate_is_entered_once(tmp_path: Path) -> None:
    swarm = make_samples()
    chain = make_chain(swarm, 2)
    async with open_peer(swarm, 0, tmp_path) as peer:
        for _ in range(2):
            await peer.ledger.write_certificate(chain.certificates[0], [])
        await peer.ledger.write_certificate(chain.certificates[1], [])
        assert len(peer.ledger.ledger) == 2
        assert sorted(peer.ledger.state().certificates) == [1, 2]


async def test_certificates_count_by_the_chain_and_make_credit(tmp_path: Path) -> None:
    swarm = make_samples()
    other = make_samples(grace_s=7.0)
    chain = make_chain(swarm, 3)
    async with open_peer(swarm, 0, tmp_path) as peer:
        await peer.ledger.write_certificate(make_chain(other, 1).certificates[0], [])
        await peer.ledger.write_certificate(chain.certificates[1], [])
        assert peer.ledger.state().certificates == {}, "signed in another swarm, and of a round without the one before"
        await peer.ledger.write_certificate(chain.certificates[0], [])
        state = peer.ledger.state()
        assert sorted(state.certificates) == [1, 2]
        assert state.verdicts.head.digest == chain.heads[2].digest
        assert {credit.rounds for credit in state.credit.values()} == {2}


async def test_a_forged_certificate_is_in_nobodys_fold(tmp_path: Path) -> None:
    async with open_peers(tmp_path, 2) as (ann, bob):
        body = RoundBody(round=1, value=b"no certificate")
        batch = ann.ledger.ledger.write([Draft(kind=Kind.CERTIFICATE, body=body)], WALL_MS)
        ann.ledger.ledger.accept(batch)
        await bob.ledger.reconcile(ann.me)
        assert len(bob.ledger.ledger) == 1, "it is signed, and so it is kept"
        assert bob.ledger.state().certificates == {}


async def test_entries_that_do_not_decode_cost_their_sender_and_leave_nothing(tmp_path: Path) -> None:
    async with open_peer(make_samples(), 0, tmp_path) as peer:
        with pytest.raises(ProtocolError):
            await peer.ledger.take(LedgerEntries(payload=b"", batches=(b"no batch",)))
        assert len(peer.ledger.ledger) == 0
        with pytest.raises(ProtocolError):
            await peer.ledger.answer_reconcile(Reconcile(payload=b"\xff no step"))


async def test_while_a_thread_reads_the_ledger_it_does_not_change_and_the_loop_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_peers(tmp_path, 2) as (ann, bob):
        await bob.ledger.write_lease(b"bob", [])
        go_on, seen = threading.Event(), list[int]()

        def read(ledger: Ledger, message: bytes) -> Answer:
            assert go_on.wait(20), "the loop goes on"
            seen.append(len(ledger))
            return answer(ledger, message)

        monkeypatch.setattr(ledger_sync, "answer", read)
        question = Reconcile(payload=begin(bob.ledger.ledger, bytes(SALT_BYTES)))
        answering = asyncio.create_task(ann.ledger.answer_reconcile(question))
        await wait_until(lambda: ann.ledger._quiet.locked())
        (batch,) = bob.state.stores.ledger.load()
        taking = asyncio.create_task(ann.ledger.take(LedgerEntries(payload=b"", batches=(encode_batch(batch),))))
        await wait_until(lambda: ann.ledger._lock.locked() and bool(ann.ledger._quiet._waiters))
        assert len(ann.ledger.ledger) == 0
        go_on.set()
        await answering
        assert await taking == 1
        assert seen == [0] and len(ann.ledger.ledger) == 1


async def test_what_came_before_a_batch_that_does_not_hold_is_kept(tmp_path: Path) -> None:
    async with open_peers(tmp_path, 2) as (ann, bob):
        for number in range(3):
            await bob.ledger.write_lease(b"bob %d" % number, [])
        one, two, three = bob.state.stores.ledger.load()
        forged = encode_batch(replace(two, signature=bytes(64)))
        for spoilt, refusal in ((forged, Refusal.BAD_SIGNATURE), (b"no batch", Refusal.MALFORMED)):
            with pytest.raises(ProtocolError) as caught:
                batches = (encode_batch(one), spoilt, encode_batch(three))
                await ann.ledger.take(LedgerEntries(payload=b"", batches=batches))
            assert caught.value.refusal is refusal
            assert len(ann.ledger.ledger) == 1 and len(ann.state.stores.ledger.load()) == 1


async def test_a_key_that_is_in_use_elsewhere_stops_writing_and_nothing_else(tmp_path: Path) -> None:
    swarm = make_samples()
    async with open_peer(swarm, 0, tmp_path / "one") as one:
        await one.ledger.write_lease(b"written here", [])
        ours = one.state.stores.ledger.load()
    async with open_peer(make_samples(), 0, tmp_path / "other") as twin:
        await twin.ledger.write_lease(b"and there", [])
        theirs = twin.state.stores.ledger.load()
        assert [batch.author for batch in (*ours, *theirs)] == [twin.me, twin.me]
        await twin.ledger.take(LedgerEntries(payload=b"", batches=tuple(encode_batch(one) for one in ours)))
        held = len(twin.ledger.ledger)
        await twin.ledger.write_lease(b"again", [])
        assert twin.ledger.forked
        assert len(twin.ledger.ledger) == held
        assert any("chain_forked" in one for one in twin.reporter.build_status().warnings)


async def test_a_full_disk_shows_nobody_what_it_does_not_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_peers(tmp_path, 2) as (ann, bob):
        with monkeypatch.context() as patched:
            patched.setattr(ann.state.stores.ledger, "append", fail_to_store)
            await ann.ledger.write_lease(b"lost", [bob.me])
            assert len(ann.ledger.ledger) == len(bob.ledger.ledger) == 0
            assert "ledger entries were not stored" in caplog.text
            await bob.ledger.write_lease(b"theirs", [])
            assert await ann.ledger.reconcile(bob.me) == 1, (
                "what others wrote is taken, and comes again after a restart"
            )
            await ann.ledger.write_lease(b"not even signed", [bob.me])
            assert ann.ledger.ledger.own_slot.seq == 1, "nothing is signed on top of what is not durable"
        # The disk works again: what was signed first is stored first.
        await ann.ledger.write_lease(b"kept", [bob.me])
        await wait_until(lambda: len(bob.ledger.ledger) == 3)
        assert [batch.author for batch in ann.state.stores.ledger.load()] == [ann.me, ann.me]
        lease = bob.ledger.state().leases[ann.me]
        assert lease == ann.ledger.state().leases[ann.me] and lease.value == b"kept"


async def test_a_conversation_without_end_is_ended(tmp_path: Path) -> None:
    swarm = make_samples()
    async with open_peer(swarm, 0, tmp_path) as peer, open_puppet(swarm, 1, peer) as puppet:
        await peer.ledger.write_lease(b"lease", [])
        asked = 0

        async def answer(asker: PeerId, raw: bytes) -> bytes:
            # Always the whole range again, as if nothing had been said.
            nonlocal asked
            asked += 1
            question = decode_message_untrusted(swarm.id, raw)
            assert isinstance(question, Reconcile)
            return encode_message(swarm.id, LedgerEntries(payload=first, batches=()))

        first = begin(peer.ledger.ledger, bytes(SALT_BYTES))
        puppet.answer = answer
        async with asyncio.timeout(PATIENCE_S):
            assert await peer.ledger.reconcile(puppet.me) == 0
        assert 1 <= asked <= ROUND_TRIPS_MAX


async def test_a_peer_that_is_not_there_raises_what_the_caller_expects(tmp_path: Path) -> None:
    async with open_peer(make_samples(), 0, tmp_path) as peer:
        with pytest.raises(PeerUnreachable) as caught:
            await peer.ledger.reconcile(PeerId(b"x" * 32))
        assert caught.value.failure is Failure.PEER_UNREACHABLE


async def test_the_comparison_goes_on_after_peers_that_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_sync, "PERIOD_S", 0.0)
    swarm = make_samples()
    async with open_peer(swarm, 0, tmp_path) as peer, open_puppet(swarm, 1, peer) as puppet:
        asked = 0

        async def answer(asker: PeerId, raw: bytes) -> bytes:
            nonlocal asked
            asked += 1
            if asked == 1:
                raise ProtocolError(Refusal.NOT_READY, "by the test")
            if asked == 2:
                return b"no message"
            return encode_message(swarm.id, LedgerEntries(payload=b"", batches=()))

        puppet.answer = answer
        peer.spawn(peer.ledger.keep_up(lambda: {puppet.me: peer.presence.describe()}, incarnation=3))
        await wait_until(lambda: asked >= 4)
        await wait_until(lambda: peer.me in peer.ledger.state().leases)
        assert len(peer.ledger.ledger) == 1, "one lease, however often it is compared"


# -- what is measured ------------------------------------------------------------------------------------------------


def make_measured(number: int, loss: float = 3.0) -> HeldOutLoss:
    return HeldOutLoss(round=number, loss_nats=loss, tokens=64)


def choose_evaluator(peers: Sequence[Peer], number: int) -> tuple[Peer, list[Peer]]:
    """Whom this round names, and the others."""
    chain = make_chain(peers[0].swarm, number)
    named = find_evaluator(chain.certificates[number - 1].result, peers[0].swarm.manifest.training.evaluate_every)
    (chosen,) = (peer for peer in peers if peer.me == named)
    return chosen, [peer for peer in peers if peer is not chosen]


async def test_what_one_has_measured_all_of_them_show_and_nothing_of_others(tmp_path: Path) -> None:
    swarm = make_samples(founders=3)
    async with open_peers(tmp_path, 3, swarm) as peers:
        chosen, others = choose_evaluator(peers, 4)
        everybody = [peer.me for peer in peers]
        await others[0].ledger.write_measurement(make_measured(4, 0.5), everybody)
        await chosen.ledger.write_measurement(make_measured(4, 3.25), everybody)
        await wait_until(lambda: all(len(peer.ledger.ledger) == 2 for peer in peers))
        assert [peer.ledger.measurements() for peer in peers] == [()] * 3, "the round is in nobody's ledger"
        for certificate in make_chain(swarm, 4).certificates:
            await chosen.ledger.write_certificate(certificate, everybody)
        await wait_until(lambda: all(peer.ledger.measurements() for peer in peers))
        for peer in peers:
            (found,) = peer.ledger.measurements()
            assert (found.author, found.held_out) == (chosen.me, make_measured(4, 3.25))
            (row,) = peer.reporter.build_status().measured
            assert (row.round, row.loss, row.tokens, row.peer) == (4, 3.25, 64, format_peer_id(chosen.me))
            assert row.name == peer.reporter.name_of(chosen.me)
            assert read(peer, "swarm_held_out_loss") == 3.25 and read(peer, "swarm_held_out_round") == 4
            assert math.isnan(read(peer, "held_out_loss")), "it has measured none itself"


async def test_what_was_measured_while_nothing_may_be_written_is_written_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_peer(make_samples(), 0, tmp_path) as peer:
        monkeypatch.setattr(OwnChain, "held", Failure.CHAIN_UNCONFIRMED)
        for number in (4, 8):
            await peer.ledger.write_measurement(make_measured(number), [])
        assert len(peer.ledger.ledger) == 0
        monkeypatch.setattr(OwnChain, "held", None)
        keeping = asyncio.create_task(peer.ledger.keep_up(dict, 1))
        await wait_until(lambda: peer.ledger.state().tags)
        keeping.cancel()
        (tag,) = peer.ledger.state().tags
        assert tag.author == peer.me and decode_measurement_untrusted(tag.value).round == 8, "the newest one"


async def test_a_figure_that_nobody_could_read_is_not_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with open_peer(make_samples(), 0, tmp_path) as peer:
        await peer.ledger.write_measurement(make_measured(4, math.nan), [])
        assert len(peer.ledger.ledger) == 0 and "out of range" in caplog.text


async def test_an_own_measurement_of_long_ago_goes_when_there_are_enough(tmp_path: Path) -> None:
    async with open_peer(make_samples(founders=1), 0, tmp_path) as peer:
        for certificate in make_chain(peer.swarm, 4).certificates:
            await peer.ledger.write_certificate(certificate, [])
        for number in range(1, MEASUREMENTS_KEPT_MAX + 4):
            await peer.ledger.write_measurement(make_measured(number), [])
        kept = sorted(decode_measurement_untrusted(tag.value).round for tag in peer.ledger.state().tags)
        assert kept == list(range(4, MEASUREMENTS_KEPT_MAX + 4))
        assert [one.held_out.round for one in peer.ledger.measurements()] == [4], "the others are of no certified round"
