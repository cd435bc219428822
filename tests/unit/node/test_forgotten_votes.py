"""A real driver and ledger store of a peer that has forgotten what it signed: what is durable, and when it ends."""

import asyncio
import time
from functools import partial
from pathlib import Path

import pytest

from shoal.crdt.clock import HLC_ZERO, hlc_at
from shoal.crdt.entries import NO_ENTRY, ChainPosition, EntryContent, encode_batch, sign_batch
from shoal.crdt.kinds import Kind
from shoal.node.ledger_store import LedgerStore, StoreError
from shoal.node.repair import abstains
from shoal.node.reporting import tell_abstention
from shoal.protocol.abstention import Abstention
from shoal.protocol.effects import Send
from shoal.protocol.errors import Failure
from shoal.protocol.messages import LedgerEntries, Plan, Promise, Proposal, Vote
from tests.unit.node.node_samples import Peer, make_samples, open_peer, open_peers, wait_until
from tests.unit.protocol.samples import IDENTITIES, PEERS, make_presence


def have_reached(peers: list[Peer], number: int) -> bool:
    return all(peer.core.head.round >= number for peer in peers)


async def commit_rounds(peers: list[Peer], first: int, last: int) -> None:
    for number in range(first, last + 1):
        for seed, peer in enumerate(peers):
            await peer.contribute(100 * number + seed)
        await wait_until(partial(have_reached, peers, number))


def watch_ballots(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> list[Vote | Promise | Plan | Proposal]:
    said: list[Vote | Promise | Plan | Proposal] = []
    send = peer.driver._send

    def note(effect: Send) -> None:
        if isinstance(effect.message, Vote | Promise | Plan | Proposal):
            said.append(effect.message)
        send(effect)

    monkeypatch.setattr(peer.driver, "_send", note)
    return said


async def test_it_is_durable_before_the_next_round_and_ends_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_peers(tmp_path, 4) as peers:
        await commit_rounds(peers, 1, 1)
        ill = peers[2]
        said = watch_ballots(ill, monkeypatch)
        await ill.driver.forget(for_good=False)
        assert ill.core.abstention is not None
        assert abstains(ill.state.stores.ledger)
        ill.core.abstention._settles_s = asyncio.get_running_loop().time()  # the gossip of before has been heard
        assert any("votes_forgotten: abstaining since" in text for text in ill.reporter.build_status().warnings)
        await commit_rounds(peers, 2, 3)
        # The certificate of round 3 was its end, and round 4 may have begun.
        assert [one for one in said if one.round < 4] == []
        await commit_rounds(peers, 4, 4)
        assert ill.core.abstention is None
        await wait_until(lambda: not abstains(ill.state.stores.ledger))
        await commit_rounds(peers, 5, 8)
        assert said != []


async def test_a_disk_that_does_not_take_the_record_halts_the_vote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_peers(tmp_path, 3) as peers:
        ill = peers[0]

        def full(*_: object) -> None:
            raise StoreError(tmp_path, Failure.DISK_FULL, "the disk is full", "make space")

        monkeypatch.setattr(LedgerStore, "put_record", full)
        await ill.driver.forget(for_good=False)
        assert ill.disk_failures and ill.driver._halted


async def test_a_clone_makes_it_last(tmp_path: Path) -> None:
    async with open_peers(tmp_path, 3) as peers:
        ill = peers[0]
        await ill.driver.forget(for_good=False)
        first = ill.core.abstention
        await ill.driver.forget(for_good=False)
        assert ill.core.abstention is first, "told again, it does not begin anew"
        await ill.driver.forget(for_good=True)
        assert ill.core.abstention is not None and ill.core.abstention.lasts


@pytest.mark.parametrize(("ahead_ms", "cloned"), [(-60_000, False), (60_000, True)])
async def test_own_entries_that_others_hold_and_this_disk_lacks_give_it_away(
    tmp_path: Path, ahead_ms: int, cloned: bool
) -> None:
    swarm = make_samples()
    start = ChainPosition(seq=0, prev=NO_ENTRY, hlc=HLC_ZERO)
    hlc = hlc_at(time.time_ns() // 1_000_000 + ahead_ms)
    content = EntryContent(deps=(), hlc=hlc, kind=Kind.LEASE, body=b"12345678")
    async with open_peer(swarm, 0, tmp_path) as peer:
        told: list[bool] = []
        peer.ledger.on_forgotten = told.append
        raw = encode_batch(sign_batch(IDENTITIES[0], swarm.id, start, [content]))
        other = encode_batch(sign_batch(IDENTITIES[1], swarm.id, start, [content]))
        assert await peer.ledger.take(LedgerEntries(payload=b"", batches=(other,))) == 1
        assert told == []
        assert await peer.ledger.take(LedgerEntries(payload=b"", batches=(raw,))) == 1
        assert told == [cloned]
        assert await peer.ledger.take(LedgerEntries(payload=b"", batches=(raw,))) == 0
        assert told == [cloned], "it is known by now"


def test_status_says_until_when() -> None:
    abstention = Abstention(PEERS[0], 0.0, 7.0)
    assert "when it has heard the other voters" in tell_abstention(abstention)
    abstention.observe(make_presence(1, 1, head_round=11), 1.0)
    assert tell_abstention(abstention) == (
        "votes_forgotten: abstaining since the vote record was lost, until about round 14"
    )
    abstention.goes_on = True
    assert "no quorum is possible without it" in tell_abstention(abstention)
    assert "another process" in tell_abstention(Abstention(PEERS[0], 0.0, 7.0, lasts=True))
