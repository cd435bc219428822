"""Sentences for people, and the feed that carries them."""

import asyncio

import pytest

from shoal.node.happenings import (
    HAPPENINGS_MAX,
    QUEUED_MAX,
    REMEDIES,
    Happening,
    HappeningFeed,
    HappeningKind,
    Severity,
    describe_notes,
)
from shoal.protocol.effects import AttemptFailed, PartReassigned, Phase, PhaseEntered, SenderMissing
from shoal.protocol.errors import Failure
from shoal.protocol.identity import PeerId

ANN, BOB = PeerId(b"a" * 32), PeerId(b"b" * 32)
NAMES = {ANN: "ann", BOB: "bob"}


def name(peer: PeerId) -> str:
    return NAMES[peer]


def make(number: int) -> Happening:
    return Happening(at_s=float(number), severity=Severity.INFO, kind=HappeningKind.NETWORK, text=str(number))


def test_every_failure_has_a_remedy() -> None:
    assert set(REMEDIES) == set(Failure)
    assert all(remedy and not remedy.endswith(".") for remedy in REMEDIES.values())


def test_a_failed_attempt_names_the_reason_the_peer_and_the_remedy() -> None:
    notes = [
        PhaseEntered(round=5, attempt=0, phase=Phase.GATHER, proposer=ANN),
        AttemptFailed(round=5, attempt=0, reason=Failure.PROPOSER_LOST, peer=ANN),
        AttemptFailed(round=5, attempt=1, reason=Failure.NO_QUORUM, peer=None),
    ]
    told = describe_notes(notes, name, 12.0)
    assert [one.text for one in told] == [
        "attempt 1 of round 5 failed: proposer_lost (ann); the next proposer takes over",
        "attempt 2 of round 5 failed: no_quorum; training goes on until enough voters are back",
    ]
    assert {(one.at_s, one.severity, one.kind) for one in told} == {
        (12.0, Severity.WARNING, HappeningKind.ATTEMPT_FAILED)
    }


def test_alike_notes_about_many_parts_are_one_happening() -> None:
    moved = [
        PartReassigned(round=5, part=part, old_owner=ANN, new_owner=BOB, reason=Failure.OWNER_LOST) for part in range(3)
    ]
    missing = [SenderMissing(round=5, part=0, peer=ANN, reason=Failure.SENDER_SLOW)]
    told = describe_notes([*moved, *missing], name, 0.0)
    assert [(one.kind, one.text) for one in told] == [
        (HappeningKind.PART_REASSIGNED, "3 parts of round 5 went from ann to bob: owner_lost"),
        (HappeningKind.SENDER_MISSING, "1 part of round 5 reduced without ann: sender_slow"),
    ]


def test_the_feed_remembers_the_newest() -> None:
    feed = HappeningFeed()
    feed.publish(*(make(number) for number in range(HAPPENINGS_MAX + 3)))
    assert [one.text for one in feed.recent] == [str(number) for number in range(3, HAPPENINGS_MAX + 3)]


async def test_every_reader_gets_what_happens_while_it_reads() -> None:
    feed = HappeningFeed()
    feed.publish(make(0))
    with feed.read() as one, feed.read() as other:
        feed.publish(make(1), make(2))
        assert [(await one.next()).text, (await one.next()).text, (await other.next()).text] == ["1", "2", "1"]
    feed.publish(make(3))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await one.next()


async def test_a_slow_reader_loses_the_oldest_and_knows_it() -> None:
    feed = HappeningFeed()
    with feed.read() as reader:
        feed.publish(*(make(number) for number in range(QUEUED_MAX + 2)))
        assert reader.dropped == 2
        assert (await reader.next()).text == "2"
