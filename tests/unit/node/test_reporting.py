"""What the daemon tells of a round: phase, limit, whom it waits for and why an attempt failed, everywhere alike."""

import logging
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from shoal.node.happenings import REMEDIES, HappeningKind
from shoal.node.membership import CLOCK_SKEW_WARN_S
from shoal.node.metrics import Deadline
from shoal.node.status import Status
from shoal.node.terminal import describe_status
from shoal.protocol.effects import AttemptFailed, PartReassigned, Phase, PhaseEntered, SenderMissing
from shoal.protocol.errors import Failure
from shoal.protocol.identity import format_peer_id, short_peer_id
from shoal.protocol.manifest import SwarmUri, parse_uri
from tests.unit.node.exposition import read
from tests.unit.node.node_samples import Peer, make_samples, open_peer, open_peers, wait_until
from tests.unit.node.puppet import open_puppet
from tests.unit.protocol.samples import PEERS

BOB = PEERS[1]


@asynccontextmanager
async def open_reporter(folder: Path) -> AsyncIterator[Peer]:
    async with open_peer(make_samples(), 0, folder) as peer:
        yield peer


async def test_a_reason_reads_the_same_in_log_metrics_status_and_happenings(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_reporter(tmp_path) as peer:
        with caplog.at_level(logging.WARNING, logger="shoal"):
            for reason in Failure:
                peer.reporter.note(AttemptFailed(round=1, attempt=3, reason=reason, peer=BOB))
                (failed,) = peer.reporter.build_status().failures
                assert (failed.reason, failed.remedy) == (reason.value, REMEDIES[reason])
                assert read(peer, "round_attempt_failures_total", reason=reason.value) == 1
                assert read(peer, "round_last_failure", reason=reason.value) == 1
            await wait_until(lambda: len(caplog.messages) >= len(Failure))
        for reason, line in zip(Failure, caplog.messages, strict=True):
            assert f"attempt 4 of round 1 failed: {reason.value} ({short_peer_id(BOB)}); {REMEDIES[reason]}" == line
        assert [one.text for one in peer.reporter.feed.recent] == caplog.messages


async def test_the_newest_failure_of_each_kind_is_told_with_round_attempt_and_peer(tmp_path: Path) -> None:
    async with open_reporter(tmp_path) as peer:
        reporter = peer.reporter
        reporter.note(PhaseEntered(round=1, attempt=4, phase=Phase.EXCHANGE, proposer=BOB))
        reporter.note(AttemptFailed(round=1, attempt=3, reason=Failure.COMMIT_TIMEOUT, peer=BOB))
        reporter.note(PartReassigned(round=1, part=0, old_owner=BOB, new_owner=peer.me, reason=Failure.OWNER_SLOW))
        reporter.note(SenderMissing(round=1, part=0, peer=BOB, reason=Failure.SENDER_LOST))
        reporter.note(AttemptFailed(round=1, attempt=4, reason=Failure.NO_QUORUM, peer=None))
        rows = reporter.build_status().failures
        assert [(one.kind, one.reason, one.round, one.attempt, one.peer) for one in rows] == [
            (HappeningKind.ATTEMPT_FAILED, "no_quorum", 1, 4, ""),
            (HappeningKind.SENDER_MISSING, "sender_lost", 1, 4, short_peer_id(BOB)),
            (HappeningKind.PART_REASSIGNED, "owner_slow", 1, 4, short_peer_id(BOB)),
        ]
        assert all(0 <= one.age_s < 60 for one in rows)


async def test_the_next_round_has_no_failure_yet_and_the_total_stays(tmp_path: Path) -> None:
    async with open_reporter(tmp_path) as peer:
        reporter = peer.reporter
        reporter.note(PhaseEntered(round=1, attempt=0, phase=Phase.GATHER, proposer=BOB))
        reporter.note(AttemptFailed(round=1, attempt=0, reason=Failure.PROPOSER_LOST, peer=BOB))
        reporter.note(PhaseEntered(round=1, attempt=1, phase=Phase.GATHER, proposer=peer.me))
        assert read(peer, "round_last_failure", reason="proposer_lost") == 1
        reporter.note(PhaseEntered(round=2, attempt=0, phase=Phase.GATHER, proposer=BOB))
        assert read(peer, "round_last_failure", reason="proposer_lost") == 0
        assert read(peer, "round_attempt_failures_total", reason="proposer_lost") == 1
        assert [one.count for one in reporter.build_status().aborted] == [1]
        assert reporter.build_status().failures[0].round == 1, "people still want to know"


async def test_whom_a_round_waits_for_is_named_and_counted(tmp_path: Path) -> None:
    async with open_peers(tmp_path, 3) as (ann, bob, cara):
        await ann.contribute(1)
        status = ann.reporter.build_status()
        waited = {one.peer for one in status.round.waiting_for}
        assert waited == {format_peer_id(bob.me), format_peer_id(cara.me)}
        assert {one.name for one in status.round.waiting_for} == {
            f"peer1 ({short_peer_id(bob.me)})",
            f"peer2 ({short_peer_id(cara.me)})",
        }
        assert read(ann, "round_waiting_for_peers") == 2
        assert "waiting for peer" in describe_status(status)[0]
        assert Status.from_json(status.to_json()) == status


async def test_the_phase_its_age_and_its_limit_are_shown(tmp_path: Path) -> None:
    async with open_peers(tmp_path, 2) as (ann, bob):
        await wait_until(lambda: ann.reporter.build_status().round.phase_s > 0)
        first = ann.reporter.build_status().round
        assert first.phase == "gather"
        assert read(ann, "phase", phase="gather") == 1
        assert read(ann, "round_phase_age_seconds") >= first.phase_s
        await ann.contribute(1)
        await bob.contribute(2)
        await wait_until(lambda: ann.commits and bob.commits)
        assert ann.reporter.build_status().round.round == 2


async def test_the_limit_that_runs_is_named_and_counts_down(tmp_path: Path) -> None:
    async with open_peers(tmp_path, 3) as peers:
        (proposer,) = (peer for peer in peers if peer.core.view().proposer == peer.me)
        follower, laggard = (peer for peer in peers if peer is not proposer)
        await proposer.contribute(1)
        await follower.contribute(2)
        # Two are enough, and the third gets its grace.
        await wait_until(lambda: proposer.reporter.build_status().round.deadline == Deadline.GRACE)
        now = proposer.reporter.build_status().round
        limit_s = proposer.swarm.manifest.rounds.grace_s
        assert now.deadline_s is not None and 0 < now.deadline_s <= limit_s
        assert [one.peer for one in now.waiting_for] == [format_peer_id(laggard.me)]
        assert 0 < read(proposer, "round_deadline_seconds", deadline="grace_s") <= limit_s
        assert math.isnan(read(proposer, "round_deadline_seconds", deadline="plan_timeout_s"))
        assert "left (grace_s), waiting for peer" in describe_status(proposer.reporter.build_status())[0]
        await wait_until(lambda: follower.reporter.build_status().round.deadline == Deadline.PLAN)


async def test_limits_that_do_not_run_are_no_numbers(tmp_path: Path) -> None:
    async with open_reporter(tmp_path) as peer:
        status = peer.reporter.build_status().round
        assert status.deadline_s is None and status.deadline is None
        assert all(math.isnan(read(peer, "round_deadline_seconds", deadline=one.value)) for one in Deadline)


async def test_a_clock_that_is_far_off_is_told_once_and_warned_of(tmp_path: Path) -> None:
    async with open_reporter(tmp_path) as peer, open_puppet(peer.swarm, 1, peer) as puppet:
        puppet.show(peer)
        assert not any("clock" in one for one in peer.reporter.build_status().warnings)
        puppet.show(peer, sent_at_s=puppet.make_presence(peer).sent_at_s + 4 * CLOCK_SKEW_WARN_S)
        for _ in range(2):
            peer.reporter.check_clock()
        told = [one.text for one in peer.reporter.feed.recent if one.text.startswith(Failure.CLOCK_SKEW)]
        assert len(told) == 1
        (warning,) = (one for one in peer.reporter.build_status().warnings if one.startswith(Failure.CLOCK_SKEW))
        assert warning.endswith(REMEDIES[Failure.CLOCK_SKEW])
        assert read(peer, "peer_clock_skew_seconds") > CLOCK_SKEW_WARN_S


@pytest.mark.parametrize(
    ("reason", "until"), [(Failure.DISK_FULL, "there is space"), (Failure.STORE_UNUSABLE, "it is started again")]
)
async def test_a_disk_that_fails_and_works_again_is_told_both_times(
    tmp_path: Path, reason: Failure, until: str
) -> None:
    def warned(peer: Peer) -> list[str]:
        return [one for one in peer.reporter.build_status().warnings if one.startswith(reason)]

    async with open_reporter(tmp_path) as peer:
        assert read(peer, "disk_stopped") == 0
        peer.reporter.disk_stopped(reason, "no write came through")
        status = peer.reporter.build_status()
        assert (status.disk.failing, status.disk.errors) == (True, 1)
        assert warned(peer) == [f"{reason}: no write came through; {REMEDIES[reason]}"]
        assert (read(peer, "disk_stopped"), read(peer, "disk_errors_total")) == (1, 1)
        assert peer.reporter.feed.recent[-1].text.endswith(f"votes and contributes no more until {until}")
        peer.reporter.disk_resumed("2.00 GiB are free")
        status = peer.reporter.build_status()
        assert (status.disk.failing, status.disk.errors, warned(peer)) == (False, 1, [])
        assert (read(peer, "disk_stopped"), read(peer, "disk_errors_total")) == (0, 1)
        told = f"{reason} is over: 2.00 GiB are free; this peer votes and contributes again"
        assert peer.reporter.feed.recent[-1].text == told


async def test_too_few_peers_that_train_are_warned_of(tmp_path: Path) -> None:
    def warned(peer: Peer) -> list[str]:
        return [one for one in peer.reporter.build_status().warnings if one.startswith(Failure.TOO_FEW_READY)]

    async with open_peer(make_samples(), 0, tmp_path, trains=True) as peer, open_puppet(peer.swarm, 1, peer) as puppet:
        assert warned(peer) == [
            "too_few_ready: 1 of the 2 peers train that a round needs; the round waits for more peers"
        ]
        puppet.show(peer, trains=False)
        assert warned(peer)
        puppet.show(peer)
        assert warned(peer) == []


async def test_a_peer_that_went_is_told_with_its_reason(tmp_path: Path) -> None:
    async with open_reporter(tmp_path) as peer:
        peer.reporter.peer_lost(BOB, Failure.PEER_LEFT)
        peer.reporter.peer_lost(BOB, Failure.PEER_LOST)
        left, lost = (one for one in peer.reporter.feed.recent if one.kind is HappeningKind.PEER_LOST)
        assert (left.severity.value, lost.severity.value) == ("info", "warning")
        assert lost.text == f"lost {short_peer_id(BOB)}: peer_lost; {REMEDIES[Failure.PEER_LOST]}"
        assert read(peer, "peers_lost_total", reason="peer_left") == 1
        peer.reporter.peer_lost(BOB, Failure.PEER_UNSEEN)
        text = f"not seen since this peer's start: {short_peer_id(BOB)}: peer_unseen; {REMEDIES[Failure.PEER_UNSEEN]}"
        assert peer.reporter.feed.recent[-1].text == text


async def test_the_uri_follows_the_addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_reporter(tmp_path) as peer:
        for port in (9460, 9461):
            address = f"/ip4/203.0.113.5/tcp/{port}/p2p/{format_peer_id(peer.me)}"
            monkeypatch.setattr(peer.control, "addresses", lambda address=address: (address,))
            assert parse_uri(peer.reporter.build_status().uri) == SwarmUri(swarm=peer.swarm.id, bootstraps=(address,))
        peer.reporter.control_up = False
        assert parse_uri(peer.reporter.build_status().uri) == SwarmUri(swarm=peer.swarm.id)


async def test_a_turn_without_a_quorum_is_told_and_a_reason_only_once_in_a_row(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_reporter(tmp_path) as peer:
        reporter, bob = peer.reporter, short_peer_id(BOB)
        with caplog.at_level(logging.INFO, logger="shoal"):
            for _ in range(3):
                reporter.pair_told(None, Failure.NO_PARTNER)
            reporter.pair_told(BOB, Failure.PARTNER_LOST)
            for _ in range(2):
                reporter.pair_told(BOB, None)
            reporter.pair_told(None, Failure.NO_PARTNER)
        alone = f"no_quorum: mixed with nobody: no_partner; {REMEDIES[Failure.NO_PARTNER]}"
        assert caplog.messages == [
            alone,
            f"no_quorum: mixed with nobody: partner_lost ({bob}); {REMEDIES[Failure.PARTNER_LOST]}",
            *[f"no_quorum: mixed with {bob}; training goes on"] * 2,
            alone,
        ]
        assert [one.text for one in reporter.feed.recent] == caplog.messages
        for outcome in (None, Failure.NO_PARTNER):
            peer.compute.note_pair(outcome)
        assert "mixed in 1 pair without a quorum" in "\n".join(describe_status(reporter.build_status()))
