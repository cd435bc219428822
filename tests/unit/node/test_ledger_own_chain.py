"""When a peer writes into the ledger, and what it makes up for: others tell where its chain ends, not its disk."""

import logging
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from shoal.crdt import eras, own_chain
from shoal.crdt.entries import Batch, encode_batch
from shoal.crdt.kinds import Kind, RegisterBody
from shoal.crdt.ledger import Draft, Ledger
from shoal.crdt.own_chain import CLONE_MARK, SKEW_MS, OwnChain
from shoal.node import ledger_sync
from shoal.protocol.errors import Failure, ProtocolError
from shoal.protocol.identity import PeerId
from shoal.protocol.messages import LedgerEntries, Presence, digest_record, encode_message, sign_message
from tests.unit.crdt.certificates import make_log, reroot
from tests.unit.node.node_samples import (
    Chain,
    Peer,
    fill_folder,
    make_chain,
    make_samples,
    open_peer,
    open_peers,
    wait_until,
)
from tests.unit.node.puppet import open_puppet
from tests.unit.protocol.samples import IDENTITIES

ROUNDS_PER_ERA = 8


@pytest.fixture(autouse=True)
def nothing_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(ledger_sync, "PERIOD_S", 0.01)
    monkeypatch.setattr(ledger_sync, "HELD_PERIOD_S", 0.01)
    monkeypatch.setattr(ledger_sync, "SPREAD_S", 0.0)
    monkeypatch.setattr(own_chain, "PATIENCE_S", 0.0)
    monkeypatch.setattr(eras, "ROUNDS_PER_ERA_MIN", ROUNDS_PER_ERA)
    yield


def keep_up(peer: Peer, incarnation: int = 1) -> None:
    peer.spawn(peer.ledger.keep_up(peer.membership.table.live, incarnation))


def write_elsewhere(peer: Peer, number: int, wall_ms: int, value: bytes = b"elsewhere") -> Batch:
    """What another process with the peer's key writes after the peer's own entries."""
    twin = Ledger(identity=IDENTITIES[number], rules=peer.ledger.ledger._rules)
    twin.restore(peer.state.stores.ledger.load(), peer.state.stores.ledger.load_base())
    return twin.write([Draft(kind=Kind.LEASE, body=RegisterBody(value=value))], wall_ms)


def certify_all(peer: Peer, chain: Chain) -> None:
    for certificate in chain.certificates:
        peer.state.save_certificate(certificate)


async def test_a_peer_that_sees_nobody_writes_nothing(tmp_path: Path) -> None:
    async with open_peer(make_samples(), 0, tmp_path) as peer:
        periods = 0

        def count() -> dict[PeerId, Presence]:
            nonlocal periods
            periods += 1
            return {}

        peer.spawn(peer.ledger.keep_up(count, incarnation=1))
        await wait_until(lambda: periods > 5)
        await peer.ledger.write_certificate(make_chain(peer.swarm, 1).certificates[0], [])
        assert len(peer.ledger.ledger) == 0
        assert peer.ledger.held is Failure.CHAIN_UNCONFIRMED


async def test_two_fresh_peers_that_meet_both_write(tmp_path: Path) -> None:
    async with open_peers(tmp_path, 2) as peers:
        for peer in peers:
            keep_up(peer)
        for peer in peers:
            await wait_until(lambda peer=peer: len(peer.ledger.state().leases) == 2)  # type: ignore[misc]
            assert peer.ledger.held is None


async def test_nobody_who_does_not_answer_lets_a_peer_write(tmp_path: Path) -> None:
    swarm = make_samples()
    async with open_peer(swarm, 0, tmp_path) as peer, open_puppet(swarm, 1, peer) as puppet:
        asked = 0

        def live() -> dict[PeerId, Presence]:
            nonlocal asked
            asked += 1
            return {puppet.me: peer.presence.describe()}

        peer.spawn(peer.ledger.keep_up(live, incarnation=1))
        await wait_until(lambda: asked > 5)
        assert len(peer.ledger.ledger) == 0


async def test_a_disk_that_was_put_back_from_a_backup_makes_no_equivocator(tmp_path: Path) -> None:
    swarm = make_samples()
    async with open_peer(swarm, 1, tmp_path, trains=True) as bob:
        async with open_peer(swarm, 0, tmp_path, trains=True) as ann:
            await ann.connect(bob)
            for peer in (ann, bob):
                peer.spawn(peer.membership.beat())
                keep_up(peer)
            await wait_until(lambda: len(bob.ledger.state().leases) == 2)
            # The backup is made here.
            backup = tmp_path / "backup" / "0"
            written = ann.state.stores.ledger.load()
            await ann.ledger.write_lease(b"later", [bob.me])
            await wait_until(lambda: bob.ledger.state().leases[ann.me].value == b"later")
            newest = ann.ledger.ledger.own_slot
        async with open_peer(swarm, 0, tmp_path / "backup", trains=True) as ann:
            assert backup.is_dir()
            ann.state.stores.ledger.append(written, own=False)
            await ann.ledger.start()
            assert ann.ledger.ledger.own_slot < newest
            await ann.connect(bob)
            ann.spawn(ann.membership.beat())
            keep_up(ann, incarnation=9)
            await wait_until(lambda: bob.ledger.state().leases[ann.me].value == (9).to_bytes(8, "big"))
            assert ann.ledger.ledger.forks == bob.ledger.ledger.forks == {}
            assert ann.ledger.held is None
            slots = [(batch.era, batch.entries[-1].seq) for batch in ann.state.stores.ledger.load()]
            assert newest in slots


async def test_a_clone_is_met_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    swarm = make_samples()
    async with open_peers(tmp_path, 2, swarm) as (ann, bob):
        for peer in (ann, bob):
            keep_up(peer)
        await wait_until(lambda: len(bob.ledger.state().leases) == len(ann.ledger.state().leases) == 2)
        theirs = write_elsewhere(ann, 0, time.time_ns() // 1_000_000 + SKEW_MS + 1000)
        caplog.set_level(logging.ERROR)
        await ann.ledger.take(LedgerEntries(payload=b"", batches=(encode_batch(theirs),)))
        assert ann.ledger.held is Failure.CHAIN_CLONED
        # One mark behind the clone's entry, so that it reads of it, and nothing else.
        await wait_until(lambda: bob.ledger.ledger.own_slot and bob.ledger.ledger.get(theirs.tip))
        mark = await _find_mark(ann)
        assert mark.entries[0].prev == theirs.tip
        await ann.ledger.write_lease(b"again", [bob.me])
        assert ann.ledger.ledger.own_slot.seq == mark.entries[0].seq + 1
        assert sum("chain_cloned" in one.message for one in caplog.records) == 1
        assert any("chain_cloned" in one for one in ann.reporter.build_status().warnings)
        assert b'shoal_ledger_held{reason="chain_cloned"} 1.0' in ann.reporter.render_metrics()
        assert ann.ledger.ledger.forks == {}


async def test_own_entries_of_a_dropped_era_that_come_back_are_no_clones(tmp_path: Path) -> None:
    """Peers that are a little behind keep an era longer, and send of it."""
    swarm = make_samples()
    async with open_peers(tmp_path, 2, swarm) as (ann, bob):
        forgotten: list[bool] = []
        ann.ledger.on_forgotten = forgotten.append
        for peer in (ann, bob):
            keep_up(peer)
        await wait_until(lambda: len(bob.ledger.state().leases) == len(ann.ledger.state().leases) == 2)
        # What is folded is stored a moment later.
        await wait_until(lambda: any(one.author == ann.me for one in bob.state.stores.ledger.load()))
        own = [one for one in bob.state.stores.ledger.load() if one.author == ann.me]
        assert {one.era for one in own} == {1}
        certify_all(ann, make_chain(swarm, 2 * ROUNDS_PER_ERA + 1))
        await wait_until(lambda: ann.ledger.ledger.next_seq(1) == 0 and ann.ledger.ledger.era == 3)
        ann.ledger.own_chain = OwnChain(started_ms=0, spread_s=0.0)  # it has run for long
        answer = LedgerEntries(payload=b"", batches=tuple(encode_batch(one) for one in own))
        await ann.ledger.take(answer)
        assert forgotten == [] and ann.ledger.held is not Failure.CHAIN_CLONED


async def test_a_clone_is_met_by_its_presence_as_others_know_it(tmp_path: Path) -> None:
    async with open_peers(tmp_path, 2) as (ann, bob):
        keep_up(ann)
        await wait_until(lambda: ann.ledger.held is None)
        forgotten: list[bool] = []
        ann.ledger.on_forgotten = forgotten.append
        clones = replace(ann.presence.describe(), incarnation=9, sent_at_s=time.time(), signature=bytes(64))
        with pytest.raises(ProtocolError):
            ann.ledger.meet_presence(clones)
        assert ann.ledger.held is None
        bob.membership.take_presence(
            encode_message(bob.swarm.id, sign_message(ann.identity, bob.swarm.id, clones)), ann.me
        )
        await ann.membership.exchange_peers(bob.me)
        assert ann.ledger.held is Failure.CHAIN_CLONED and forgotten == [True]


async def _find_mark(peer: Peer) -> Batch:
    def find() -> list[Batch]:
        stored = peer.state.stores.ledger.load()
        return [one for one in stored if one.author == peer.me and one.entries[0].body.startswith(CLONE_MARK)]

    await wait_until(find)
    (mark,) = find()
    return mark


async def test_whoever_is_told_by_a_mark_stops_and_does_not_answer(tmp_path: Path) -> None:
    async with open_peers(tmp_path, 2) as (ann, bob):
        for peer in (ann, bob):
            keep_up(peer)
        await wait_until(lambda: len(ann.ledger.state().leases) == 2)
        mark = write_elsewhere(ann, 0, time.time_ns() // 1_000_000 + SKEW_MS + 1000, CLONE_MARK + bytes(8))
        await ann.ledger.take(LedgerEntries(payload=b"", batches=(encode_batch(mark),)))
        assert ann.ledger.held is Failure.CHAIN_CLONED
        await wait_until(lambda: bob.ledger.ledger.get(mark.tip))
        assert ann.ledger.ledger.own_slot.seq == mark.entries[0].seq + 1


async def test_a_chain_with_two_branches_says_so(tmp_path: Path) -> None:
    async with open_peers(tmp_path, 2) as (ann, bob):
        for peer in (ann, bob):
            keep_up(peer)
        await wait_until(lambda: len(ann.ledger.state().leases) == 2)
        earlier = Ledger(identity=IDENTITIES[0], rules=ann.ledger.ledger._rules)
        twin = earlier.write([Draft(kind=Kind.LEASE, body=RegisterBody(value=b"twin"))], 1)
        await ann.ledger.take(LedgerEntries(payload=b"", batches=(encode_batch(twin),)))
        assert ann.ledger.forked and ann.ledger.held is Failure.CHAIN_FORKED
        assert any("chain_forked" in one for one in ann.reporter.build_status().warnings)
        await wait_until(lambda: ann.me in bob.ledger.ledger.forks)


async def test_certificates_that_nobody_entered_are_entered_later(tmp_path: Path) -> None:
    swarm = make_samples()
    chain = make_chain(swarm, 20)
    async with open_peers(tmp_path, 2, swarm) as peers:
        for peer in peers:
            certify_all(peer, chain)
            keep_up(peer)
        for peer in peers:
            await wait_until(lambda peer=peer: peer.ledger.state().verdicts.head.round == 20)  # type: ignore[misc]
        ann, bob = (peer.ledger.ledger for peer in peers)
        await wait_until(lambda: ann.fold(2**47).encode() == bob.fold(2**47).encode())
        # Rounds 1 to 8 are of an era that is over.
        assert (ann.era, ann.base.round) == (3, 8)

        def count_entered() -> int:
            stored = peers[0].state.stores.ledger.load()
            return sum(batch.entries[0].kind == Kind.CERTIFICATE for batch in stored)

        # What came last is stored a moment after it counts. Nobody's turn comes twice: at most both entered each.
        await wait_until(lambda: count_entered() >= 12)
        assert count_entered() <= 24
        assert sorted(peers[0].ledger.state().certificates) == list(range(9, 21))


async def test_a_ledger_that_is_eras_behind_its_own_log_follows_it(tmp_path: Path) -> None:
    swarm = make_samples()
    chain = make_chain(swarm, 30)
    async with open_peer(swarm, 0, tmp_path) as peer:
        certify_all(peer, chain)
        await peer.ledger._settle()
        assert peer.ledger.ledger.era == 4 and peer.ledger.ledger.base.round == 16
        assert peer.ledger.state().credit[peer.me].rounds == 16
        slot = peer.ledger.ledger.own_slot
        assert slot == (4, 0)
    # It is so after a restart, too.
    async with open_peer(swarm, 0, tmp_path) as peer:
        assert (peer.ledger.ledger.era, peer.ledger.ledger.base.round) == (4, 16)


async def test_a_newcomer_takes_the_sum_of_rounds_that_nobody_keeps_from_voters(tmp_path: Path) -> None:
    swarm = make_samples(founders=3)
    chain = make_chain(swarm, 30)
    async with open_peers(tmp_path, 3, swarm) as peers:
        *voters, newcomer = peers
        for peer in peers:
            certify_all(peer, chain)
        newcomer.state.trail.shorten(14)
        for peer in voters:
            keep_up(peer)
        await wait_until(lambda: all(peer.ledger.ledger.base.round == 16 for peer in voters))
        voters[0].state.trail.shorten(16)  # what its ledger stands on is not lost with them
        await newcomer.ledger._settle()
        assert newcomer.ledger.ledger.base.round == 0, "nobody is known to be there"
        keep_up(newcomer)
        await wait_until(lambda: newcomer.ledger.ledger.base.round == 16)
        assert newcomer.ledger.ledger.base == voters[0].ledger.ledger.base
        assert newcomer.state.stores.ledger.load_base() == voters[0].ledger.ledger.base
        one, other = (peer.ledger.ledger for peer in (voters[0], newcomer))
        await wait_until(lambda: one.fold(2**47).encode() == other.fold(2**47).encode())


async def test_after_a_reroot_the_ledger_follows_the_log_that_stays(tmp_path: Path) -> None:
    swarm = make_samples()
    async with open_peer(swarm, 0, tmp_path) as peer:
        certify_all(peer, make_chain(swarm, 30))
        await peer.ledger._settle()
        # The round core has left its log for another one, before round 9.
        peer.state.stores.ledger.abandon_certificates(1)
        other = make_chain(swarm, 20, seed=1)
        certify_all(peer, other)
        await peer.ledger._settle()
        assert peer.ledger.ledger.base.round == 16
        assert peer.ledger.ledger.base.digest == other.heads[16].digest
        assert peer.ledger.ledger.era == 4, "it never falls"


async def test_the_lease_is_renewed_in_each_era(tmp_path: Path) -> None:
    swarm = make_samples()
    chain = make_chain(swarm, 20)
    async with open_peers(tmp_path, 2, swarm) as peers:
        for peer in peers:
            keep_up(peer)
        await wait_until(lambda: len(peers[0].ledger.state().leases) == 2)
        assert {lease.era for lease in peers[0].ledger.state().leases.values()} == {1}
        for peer in peers:
            certify_all(peer, chain)
        await wait_until(lambda: {lease.era for lease in peers[0].ledger.state().leases.values()} == {3})


async def test_a_peer_that_is_eras_ahead_confirms_nothing(tmp_path: Path) -> None:
    """It has not sent what it holds of eras that the asker does not know yet."""
    swarm = make_samples()
    fill_folder(swarm, tmp_path / "1", make_chain(swarm, 30))
    async with open_peer(swarm, 0, tmp_path, trains=True) as ann, open_peer(swarm, 1, tmp_path, trains=True) as bob:
        await ann.connect(bob)
        await bob.ledger._settle()
        bob.ledger.ledger.accept(write_elsewhere(bob, 1, 1))
        assert (ann.ledger.ledger.era, bob.ledger.ledger.own_slot) == (1, (4, 1))
        periods = 0

        def live() -> dict[PeerId, Presence]:
            nonlocal periods
            periods += 1
            return {bob.me: bob.presence.describe()}

        ann.spawn(ann.ledger.keep_up(live, incarnation=1))
        await wait_until(lambda: periods > 5)
        assert len(ann.ledger.ledger) == 0 and ann.ledger.held is Failure.CHAIN_UNCONFIRMED
        certify_all(ann, make_chain(swarm, 30))
        await wait_until(lambda: ann.ledger.state().leases.keys() == {ann.me, bob.me})
        assert ann.ledger.held is None


@pytest.mark.parametrize("first", [0, 1], ids=["the lighter and longer first", "the heavier and shorter first"])
async def test_the_lighter_of_two_logs_is_entered_once(tmp_path: Path, first: int) -> None:
    """Nothing counts of it, and so it is missing in the fold for ever."""
    swarm = make_samples()
    async with open_peers(tmp_path, 2, swarm) as (ann, bob):
        theirs = reroot(swarm.id, 1, swarm.id, [IDENTITIES[2]], IDENTITIES[0])
        heavy = make_log(
            swarm.id, [IDENTITIES[2]], 1, previous=digest_record(theirs.result), first=2, tokens=10**9, parts=3
        )
        other = make_chain(swarm, 6)
        certify_all(ann, other)
        for certificate in (theirs, *heavy):
            bob.state.save_certificate(certificate)
        newest = digest_record(heavy[0].result)
        heads, peers = (other.heads[6].digest, newest), (ann, bob)
        keep_up(peers[first])
        await wait_until(lambda: peers[1 - first].ledger.ledger.follows(heads[first]))
        keep_up(peers[1 - first])
        for peer in (ann, bob):
            await wait_until(lambda peer=peer: peer.ledger.ledger.follows(other.heads[6].digest))  # type: ignore[misc]
            await wait_until(lambda peer=peer: peer.ledger.state().verdicts.head.digest == newest)  # type: ignore[misc]
        lengths = [len(peer.ledger.ledger) for peer in (ann, bob)]
        periods = 0

        def count() -> dict[PeerId, Presence]:
            nonlocal periods
            periods += 1
            return ann.membership.table.live()

        ann.spawn(ann.ledger.keep_up(count, 1))
        await wait_until(lambda: periods > 10)
        assert [len(peer.ledger.ledger) for peer in (ann, bob)] == lengths
