"""The round core on asyncio: effects in order, nothing before what must be durable; a full disk halts the vote."""

import asyncio
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from shoal.node.disk_watch import DISK_PERIOD_S, DiskPorts, DiskWatch
from shoal.node.ledger_store import StoreError
from shoal.protocol.codecs import Float32s
from shoal.protocol.effects import AttemptFailed, Commit, Effect, Persist, PhaseEntered, Pledge, Send, VoteRecord
from shoal.protocol.errors import Failure, Refusal
from shoal.protocol.identity import PeerId
from shoal.protocol.messages import (
    Certified,
    Contribution,
    Prepare,
    Presence,
    Ready,
    SignedReady,
    Vote,
    contribution_root,
    decode_message_untrusted,
    sign_ready,
)
from shoal.protocol.quorum import Head
from tests.unit.node.exposition import read
from tests.unit.node.node_samples import Peer, make_chain, make_samples, open_peer, open_peers, wait_until
from tests.unit.node.puppet import Puppet, open_puppet

LIMITS = ("plan_timeout_s", "sender_timeout_s", "owner_timeout_s", "exchange_timeout_s")


def full_disk(*_: object, **__: object) -> None:
    raise StoreError(Path("ledger.sqlite"), Failure.DISK_FULL, "the disk is full", "make space")


def no_space(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


def proposer_of(peers: list[Peer]) -> Peer:
    return next(peer for peer in peers if peer.core.view().proposer == peer.me)


async def commit_one_round(peers: list[Peer], number: int = 1) -> None:
    for seed, peer in enumerate(peers):
        await peer.contribute(100 * number + seed)
    await wait_until(lambda: all(len(peer.commits) == number for peer in peers))


async def test_a_round_is_carried_out_from_ready_to_the_next_one(tmp_path: Path) -> None:
    async with open_peers(tmp_path, 3) as peers:
        for number in (1, 2):
            await commit_one_round(peers, number)
        assert len({peer.commits[-1].state_root for peer in peers}) == 1
        assert {peer.core.round for peer in peers} == {3}


async def test_rounds_exchange_one_fragment_after_the_other(tmp_path: Path) -> None:
    async with open_peers(tmp_path, 3, make_samples(founders=3, fragments=2)) as peers:
        start, manifest = peers[0].params.copy(), peers[0].swarm.manifest
        for number in (1, 2):
            before = peers[0].params.copy()
            await commit_one_round(peers, number)
            moved = {part for part in range(manifest.parts) if has_moved(manifest.part_range(part), before, peers[0])}
            assert moved == set(manifest.list_parts(number)), "and nothing else"
            assert len({peer.commits[-1].state_root for peer in peers}) == 1
        assert not np.array_equal(start, peers[0].params)
        assert [len(peers[0].offers[number].encoded) for number in (0, 1)] == [2, 1]


def has_moved(span: tuple[int, int], before: Float32s, peer: Peer) -> bool:
    return not np.array_equal(before[slice(*span)], peer.params[slice(*span)])


async def test_a_message_leaves_only_after_what_was_to_be_durable_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    swarm = make_samples(founders=3)
    async with open_peer(swarm, 0, tmp_path) as peer, open_puppet(swarm, 1, peer) as puppet:
        saved: list[VoteRecord] = []
        release = threading.Event()
        save = peer.state.save_vote

        def slowly(vote: VoteRecord) -> None:
            assert release.wait(20)
            saved.append(vote)
            save(vote)

        monkeypatch.setattr(peer.state, "save_vote", slowly)
        effects: list[Effect] = [
            Persist(vote=VoteRecord(round=1, promised=4)),
            Send(peer=puppet.me, message=Prepare(round=1, attempt=4)),
            PhaseEntered(round=1, attempt=4, phase=peer.core.phase, proposer=peer.me),
        ]
        before = len(peer.notes)
        peer.core._effects.extend(effects)  # as the core would
        peer.driver.pump()
        for _ in range(50):
            await asyncio.sleep(0)
        assert puppet.messages == [] and len(peer.notes) == before
        release.set()
        await wait_until(lambda: puppet.heard(Prepare))
        assert [one.promised for one in saved] == [4]
        await wait_until(lambda: len(peer.notes) == before + 1)


@pytest.mark.parametrize("fail", [full_disk, no_space], ids=["store", "file"])
async def test_a_disk_that_fails_before_the_vote_is_a_peer_that_does_not_vote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fail: Callable[..., None]
) -> None:
    async with open_peers(tmp_path, 3) as peers:
        ill = next(peer for peer in peers if peer is not proposer_of(peers))
        sent: list[object] = []  # messages that left it
        monkeypatch.setattr(ill.state, "save_vote", fail)
        transmit = ill.driver._transmit

        async def watch(peer: PeerId, payload: bytes) -> None:
            sent.append(decode_message_untrusted(ill.swarm.id, payload))
            await transmit(peer, payload)

        monkeypatch.setattr(ill.driver, "_transmit", watch)
        for seed, peer in enumerate(peers):
            await peer.contribute(seed)
        well = [peer for peer in peers if peer is not ill]
        await wait_until(lambda: all(peer.commits for peer in well))
        await wait_until(lambda: ill.disk_failures)
        ((reason, detail),) = ill.disk_failures
        assert reason is Failure.DISK_FULL and ("full" in detail or "No space" in detail)
        assert not any(isinstance(one, Vote) for one in sent), "what is not durable is not said"
        assert ill.commits == [] and ill.core.head.round == 0
        assert ill.reporter.build_status().disk.failing
        # It still serves what it has.
        assert await ill.exchange.serve(well[0].me, b"x" * 32) is None
        assert ill.links.is_linked(well[0].me) or ill.links.is_linked(well[1].me)


async def test_a_store_that_fails_at_the_commit_applies_nothing_and_a_restart_makes_it_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    swarm = make_samples()
    chain = make_chain(swarm, 1)
    async with open_peer(swarm, 0, tmp_path) as peer, open_puppet(swarm, 1, peer) as puppet:
        for digest, raw in chain.blobs.items():
            peer.state.stores.blobs.write(digest, raw)
        monkeypatch.setattr(peer.state.stores.ledger, "put_certificate", full_disk)
        await puppet.tell(peer, Certified(certificate=chain.certificates[0]))
        await wait_until(lambda: peer.disk_failures)
        assert peer.core.head.round == 0 and peer.commits == []
        assert peer.state.head.round == 0, "memory says what the disk says"
        monkeypatch.undo()
        await puppet.tell(peer, Certified(certificate=chain.certificates[0]))
        assert peer.commits == [], "it is halted until somebody says that the disk works"
    async with open_peer(make_samples(), 0, tmp_path) as again, open_puppet(again.swarm, 1, again) as puppet:
        assert again.core.head.round == 0
        await puppet.tell(again, Certified(certificate=chain.certificates[0]))
        await wait_until(lambda: again.commits)
        assert again.commits[0] == chain.heads[1]


async def test_a_peer_votes_again_by_itself_once_its_disk_has_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = dict.fromkeys((*LIMITS, "commit_timeout_s"), 0.5)
    swarm = make_samples(founders=2, grace_s=0.1, **limits)  # both votes are needed
    async with open_peers(tmp_path, 2, swarm) as peers:
        ill, well = peers
        ports = DiskPorts(
            halt=ill.driver.halt,
            resume=ill.driver.resume,
            stopped=ill.reporter.disk_stopped,
            resumed=ill.reporter.disk_resumed,
        )
        now_s = 0.0
        watch = DiskWatch(ill.folder, 0.0, ports, lambda: now_s)
        monkeypatch.setattr(ill, "disk_failed", watch.failed)
        monkeypatch.setattr(ill.state.stores.ledger, "put_record", full_disk)
        for seed, peer in enumerate(peers):
            await peer.contribute(seed)
        await wait_until(lambda: ill.reporter.build_status().disk.failing)
        now_s += DISK_PERIOD_S
        await watch.look()
        assert ill.reporter.build_status().disk.failing, "there is space, and yet no write comes through"
        assert ill.commits == well.commits == []
        monkeypatch.undo()
        now_s += DISK_PERIOD_S
        await watch.look()
        assert not ill.reporter.build_status().disk.failing
        await wait_until(lambda: bool(ill.commits and well.commits))
        assert ill.commits == well.commits
        members = {member.peer for member in ill.state.load_certificates(1, 1)[0].result.members}
        assert members == {ill.me, well.me}, "nothing that it had contributed was lost"
        await commit_one_round(peers, 2)


async def test_a_store_that_failed_at_the_commit_takes_the_same_certificate_once_it_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    swarm = make_samples()
    chain = make_chain(swarm, 2)
    async with open_peer(swarm, 0, tmp_path) as peer, open_puppet(swarm, 1, peer) as puppet:
        for digest, raw in chain.blobs.items():
            peer.state.stores.blobs.write(digest, raw)
        monkeypatch.setattr(peer.state.stores.ledger, "put_certificate", full_disk)
        await puppet.tell(peer, Certified(certificate=chain.certificates[0]))
        await wait_until(lambda: peer.disk_failures)
        with pytest.MonkeyPatch.context() as patches:
            patches.setattr(peer.state.stores.ledger, "put_record", full_disk)
            with pytest.raises(StoreError):
                await peer.driver.resume()
        await puppet.tell(peer, Certified(certificate=chain.certificates[0]))
        assert peer.commits == [], "a resumption that failed leaves it halted"
        monkeypatch.undo()
        await peer.driver.resume()
        for number in (1, 2):
            await puppet.tell(peer, Certified(certificate=chain.certificates[number - 1]))
            await wait_until(lambda number=number: len(peer.commits) == number)  # type: ignore[misc]
        assert peer.commits == list(chain.heads[1:])


@pytest.mark.parametrize("place", ["save_vote", "rewind"])
async def test_a_disk_that_fails_on_the_way_to_another_log_is_a_peer_that_does_not_vote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    async with open_peer(make_samples(), 0, tmp_path) as peer:
        before = peer.state.load_vote()
        with monkeypatch.context() as patches:
            patches.setattr(peer.state, place, full_disk)
            with pytest.raises(StoreError):
                await peer.driver.switch(Pledge(first=1, digest=b"d" * 32, end=9, tokens=9))
        assert [reason for reason, _ in peer.disk_failures] == [Failure.DISK_FULL]
        await peer.driver.resume()
        pledge = peer.core.pledge()
        assert (pledge is None) is (place == "save_vote"), "it is where the disk says"
        assert before is None and peer.core.round == 1


async def test_what_was_wanted_before_a_snapshot_is_not_done_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    swarm = make_samples()
    chain = make_chain(swarm, 5, (5,))
    async with open_peer(swarm, 0, tmp_path) as peer, open_puppet(swarm, 1, peer) as puppet:
        install = peer.state.install

        async def meanwhile(head: Head, params: Float32s, momentum: Float32s) -> None:
            peer.core._effects.append(Send(peer=puppet.me, message=Prepare(round=1, attempt=7)))
            peer.driver.pump()
            await install(head, params, momentum)
            peer.core._effects.append(Send(peer=puppet.me, message=Prepare(round=1, attempt=8)))

        monkeypatch.setattr(peer.state, "install", meanwhile)
        await peer.driver.install(chain.heads[5], *chain.states[5])
        assert (peer.core.round, peer.core.head) == (6, chain.heads[5])
        peer.core._effects.append(Send(peer=puppet.me, message=Prepare(round=6, attempt=9)))
        peer.driver.pump()
        await wait_until(lambda: puppet.heard(Prepare))
        assert [one.attempt for one in puppet.heard(Prepare)] == [9]


async def test_a_snapshot_that_live_rounds_have_led_past_is_not_taken_over(tmp_path: Path) -> None:
    swarm = make_samples()
    chain = make_chain(swarm, 5, (3, 5))
    async with open_peer(swarm, 0, tmp_path) as peer:
        await peer.driver.install(chain.heads[5], *chain.states[5])
        await peer.driver.install(chain.heads[3], *chain.states[3])
        assert peer.core.head == peer.state.head == chain.heads[5]


async def test_a_part_that_the_disk_has_lost_since_stops_the_peer_and_not_its_driver(tmp_path: Path) -> None:
    swarm = make_samples()
    (certificate,) = make_chain(swarm, 1).certificates
    async with open_peer(swarm, 0, tmp_path) as peer:
        peer.core._effects.append(Commit(certificate=certificate))
        peer.driver.pump()
        await wait_until(lambda: peer.disk_failures)
        assert [reason for reason, _ in peer.disk_failures] == [Failure.STORE_UNUSABLE]
        assert peer.state.head.round == 0 and peer.state.load_certificates(1, 1) == ()


async def test_a_message_that_no_honest_peer_sends_is_reported_and_one_that_is_late_is_counted(tmp_path: Path) -> None:
    swarm = make_samples(founders=3)
    chain = make_chain(swarm, 1)
    async with open_peer(swarm, 0, tmp_path) as peer, open_puppet(swarm, 5, peer) as puppet:
        digests = tuple(bytes(32) for _ in range(swarm.manifest.parts + 1))
        await puppet.tell(peer, Contribution(round=1, digests=digests))
        await wait_until(lambda: peer.misbehaviours)
        assert peer.misbehaviours == [(puppet.me, Refusal.WRONG_LENGTH)]
        unsigned = replace(chain.certificates[0], votes=chain.certificates[0].votes[:1])
        await puppet.tell(peer, Certified(certificate=unsigned))
        await wait_until(lambda: len(peer.misbehaviours) == 2)
        # A ballot out of turn proves nothing: there may be another log.
        await puppet.tell(peer, Prepare(round=1, attempt=3))
        await wait_until(lambda: read(peer, "refusals_total", reason="wrong_proposer", plane="control") == 1)
        await puppet.tell(peer, Prepare(round=9, attempt=0))
        await wait_until(lambda: read(peer, "refusals_total", reason="wrong_round", plane="control") == 1)
        assert len(peer.misbehaviours) == 2
        assert peer.core.round == 1


async def test_a_limit_that_passes_wakes_the_core(tmp_path: Path) -> None:
    swarm = make_samples(founders=3, grace_s=0.0, **dict.fromkeys(LIMITS, 0.2))
    async with open_peer(swarm, 0, tmp_path, trains=True) as peer, open_puppet(swarm, 1, peer) as puppet:
        # Two are ready. Whoever proposes, by the swarm's id: nobody sends a plan, or the puppet reduces nothing.
        await peer.contribute(1)
        ready = make_ready(peer, puppet)
        puppet.show(peer, ready)
        await wait_until(lambda: any(isinstance(note, AttemptFailed) for note in peer.notes))
        reasons = {note.reason for note in peer.notes if isinstance(note, AttemptFailed)}
        assert reasons <= {Failure.PROPOSER_SILENT, Failure.PROPOSER_LOST, Failure.NO_QUORUM, Failure.EXCHANGE_TIMEOUT}
        assert peer.core.attempt > 0
        assert peer.reporter.build_status().failures[-1].reason in {one.value for one in reasons}


def make_ready(peer: Peer, puppet: Puppet) -> SignedReady:
    digests = tuple(bytes([part]) * 32 for part in range(peer.swarm.manifest.parts))
    ready = Ready(
        round=1,
        base_root=peer.core.head.state_root,
        contribution_root=contribution_root(digests),
        tokens=1000,
        steps=10,
        norm=1.0,
        owns=True,
    )
    return sign_ready(puppet.identity, peer.swarm.id, ready)


async def test_after_stop_no_limit_wakes_anybody(tmp_path: Path) -> None:
    async with open_peers(tmp_path, 3) as peers:
        first = proposer_of(peers)
        await first.contribute(1)
        await next(peer for peer in peers if peer is not first).contribute(2)
        await wait_until(lambda: first.driver._timer is not None)
        timer = first.driver._timer
        first.driver.stop()
        assert timer is not None and timer.cancelled()


async def test_who_cannot_be_reached_holds_nobody_up(tmp_path: Path) -> None:
    async with open_peers(tmp_path, 3) as peers:
        gone = next(peer for peer in peers if peer is not proposer_of(peers))
        rest = [peer for peer in peers if peer is not gone]
        await gone.control.stop()
        await wait_until(lambda: all(gone.me not in peer.membership.table.live() for peer in rest))
        await commit_one_round(rest)
        assert rest[0].commits == rest[1].commits


async def test_the_own_vote_needs_no_network(tmp_path: Path) -> None:
    swarm = make_samples(founders=1, peers_min=1)
    async with open_peer(swarm, 0, tmp_path, trains=True) as peer:
        await commit_one_round([peer])
        assert peer.core.head.round == 1
        assert peer.control.peers() == ()


async def test_a_presence_that_tells_of_a_later_round_is_passed_on(tmp_path: Path) -> None:
    swarm = make_samples()
    async with open_peer(swarm, 0, tmp_path) as peer, open_puppet(swarm, 1, peer) as puppet:
        presence: Presence = puppet.make_presence(peer, head_round=9, head_digest=b"h" * 32)
        peer.membership.take_presence(puppet.encode(presence), puppet.me)
        await wait_until(lambda: peer.behinds)
        assert [(one.peer, one.round) for one in peer.behinds] == [(puppet.me, 9)]


async def test_the_end_of_training_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_peers(tmp_path, 3) as peers:
        told: list[int] = []
        late = peers[2]
        monkeypatch.setattr(late.compute, "end_training", told.append)
        await peers[0].contribute(0)
        await wait_until(lambda: told == [1])
