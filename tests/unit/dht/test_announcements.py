"""When a peer announces itself and when it looks for others."""

import pytest

from shoal.dht.announcements import (
    ANNOUNCE_RETRY_MAX_S,
    ANNOUNCE_RETRY_MIN_S,
    EPOCH_SPREAD_S,
    LOOKUP_IDLE_S,
    LOOKUP_MAX_S,
    LOOKUP_MIN_S,
    PEERS_WANTED,
    REANNOUNCE_S,
    Announce,
    AnnouncementSchedule,
    LookUp,
)
from shoal.dht.keys import EPOCH_S, lookup_keys, provider_key
from shoal.protocol.identity import PeerId

SWARM = bytes(range(32))
LOW, HIGH = PeerId(bytes(32)), PeerId(b"\xff" * 32)
START_S = 1000.0 * EPOCH_S


@pytest.fixture
def schedule() -> AnnouncementSchedule:
    """A schedule whose first peer has just connected."""
    schedule = AnnouncementSchedule(SWARM, LOW, START_S)
    schedule.note_peers(1, START_S)
    return schedule


def test_with_nobody_connected_there_is_nothing_to_do() -> None:
    schedule = AnnouncementSchedule(SWARM, LOW, START_S)
    assert schedule.next_deadline() is None
    assert schedule.poll(START_S + 10**6) == ()


def test_the_first_peer_is_told_and_asked_at_once(schedule: AnnouncementSchedule) -> None:
    assert schedule.next_deadline() == START_S
    assert schedule.poll(START_S) == (
        Announce(key=provider_key(SWARM, 1000)),
        LookUp(keys=lookup_keys(SWARM, START_S)),
    )
    assert schedule.next_deadline() is None
    assert schedule.poll(START_S + 10**6) == ()


def test_an_announcement_is_renewed(schedule: AnnouncementSchedule) -> None:
    schedule.poll(START_S)
    schedule.note_announced(stored=True, now_s=START_S + 2)
    assert schedule.next_deadline() == START_S + 2 + REANNOUNCE_S


@pytest.mark.parametrize(("me", "spread_s"), [(LOW, 0.0), (HIGH, EPOCH_SPREAD_S)])
def test_a_new_epoch_gets_its_own_announcement_spread_over_peers(me: PeerId, spread_s: float) -> None:
    late_s = START_S + EPOCH_S - 10
    schedule = AnnouncementSchedule(SWARM, me, late_s)
    schedule.note_peers(1, late_s)
    schedule.poll(late_s)
    schedule.note_announced(stored=True, now_s=late_s)
    deadline = schedule.next_deadline()
    assert deadline == pytest.approx(START_S + EPOCH_S + spread_s, abs=0.001)
    assert deadline is not None
    assert Announce(key=provider_key(SWARM, 1001)) in schedule.poll(deadline)


def test_a_failed_announcement_is_repeated_ever_more_slowly(schedule: AnnouncementSchedule) -> None:
    now_s, pauses = START_S, []
    for _ in range(10):
        assert any(isinstance(intent, Announce) for intent in schedule.poll(now_s))
        schedule.note_announced(stored=False, now_s=now_s)
        deadline = schedule.next_deadline()
        assert deadline is not None
        pauses.append(deadline - now_s)
        now_s = deadline
    assert pauses[0] == ANNOUNCE_RETRY_MIN_S and pauses[-1] == ANNOUNCE_RETRY_MAX_S and pauses == sorted(pauses)


def test_look_ups_that_bring_nothing_become_rarer_and_one_that_does_ends_that(schedule: AnnouncementSchedule) -> None:
    now_s, pauses = START_S, []
    schedule.poll(now_s)
    for new_peers in (0, 0, 0, 0, 0, 0, 2):
        schedule.note_looked_up(new_peers, now_s)
        deadline = schedule.next_deadline()
        assert deadline is not None
        pauses.append(deadline - now_s)
        now_s = deadline
        assert schedule.poll(now_s) == (LookUp(keys=lookup_keys(SWARM, now_s)),)
    assert pauses == [2 * LOOKUP_MIN_S, 4 * LOOKUP_MIN_S, 8 * LOOKUP_MIN_S, 16 * LOOKUP_MIN_S] + 2 * [LOOKUP_MAX_S] + [
        LOOKUP_MIN_S
    ]


def test_with_enough_peers_look_ups_are_rare_until_one_is_missing(schedule: AnnouncementSchedule) -> None:
    schedule.poll(START_S)
    schedule.note_peers(PEERS_WANTED, START_S + 1)
    schedule.note_looked_up(3, START_S + 2)
    assert schedule.next_deadline() == START_S + 2 + LOOKUP_IDLE_S
    schedule.note_peers(PEERS_WANTED - 1, START_S + 60)
    assert schedule.next_deadline() == START_S + 60


def test_a_peer_that_comes_and_goes_does_not_make_it_hurry(schedule: AnnouncementSchedule) -> None:
    schedule.poll(START_S)
    schedule.note_announced(stored=False, now_s=START_S + 1)
    schedule.note_looked_up(0, START_S + 1)
    for tenth in range(20):
        schedule.note_peers(tenth % 2, START_S + 1 + tenth / 10)
    assert schedule.next_deadline() == START_S + ANNOUNCE_RETRY_MIN_S
    assert schedule.poll(START_S + ANNOUNCE_RETRY_MIN_S - 0.1) == ()
    assert schedule.poll(START_S + LOOKUP_MIN_S - 0.1) == (Announce(key=provider_key(SWARM, 1000)),)


def test_other_addresses_are_announced_soon_and_not_at_every_change(schedule: AnnouncementSchedule) -> None:
    schedule.poll(START_S)
    schedule.note_addresses(START_S)  # it is being announced: what is stored may be either
    schedule.note_announced(stored=True, now_s=START_S)
    schedule.note_looked_up(1, START_S)
    for second in (1, 2):
        schedule.note_addresses(START_S + second)
        assert schedule.next_deadline() == START_S + ANNOUNCE_RETRY_MIN_S
    (intent,) = schedule.poll(START_S + ANNOUNCE_RETRY_MIN_S)
    assert isinstance(intent, Announce)
