"""What is held of the log, announced: the right keys, at the right times, bounded."""

from shoal.dht.holdings import (
    KEYS_MAX,
    REANNOUNCE_S,
    RETRY_MAX_S,
    RETRY_MIN_S,
    Holdings,
    HoldingsSchedule,
    donor_keys,
    list_keys,
)
from shoal.dht.keys import SEGMENT_ROUNDS, provider_key, snapshots_key, updates_key

SWARM = b"s" * 32
NOW = 1_000_000.0


def test_keys_differ_by_what_they_mean() -> None:
    keys = {updates_key(SWARM, 1), snapshots_key(SWARM, 1), provider_key(SWARM, 0), updates_key(SWARM, SEGMENT_ROUNDS)}
    assert len(keys) == 4 and {len(key) for key in keys} == {34}
    assert updates_key(SWARM, SEGMENT_ROUNDS) == updates_key(SWARM, 2 * SEGMENT_ROUNDS - 1)
    assert updates_key(SWARM, 1) != updates_key(b"t" * 32, 1)


def test_nothing_is_announced_of_nothing() -> None:
    schedule = HoldingsSchedule(SWARM)
    assert schedule.poll(Holdings(), NOW) is None
    assert schedule.poll(Holdings(head=9), NOW) is None
    schedule.note_announced(True, NOW)


def test_whole_segments_and_that_of_the_head_are_announced() -> None:
    held = Holdings(head=3 * SEGMENT_ROUNDS + 5, updates_from=SEGMENT_ROUNDS + 1, snapshots=(192, 196))
    assert list_keys(SWARM, held) == [
        snapshots_key(SWARM, 196),
        updates_key(SWARM, 3 * SEGMENT_ROUNDS),
        updates_key(SWARM, 2 * SEGMENT_ROUNDS),
    ]
    young = Holdings(head=5, updates_from=1)
    assert list_keys(SWARM, young) == [updates_key(SWARM, 1)]


def test_keys_are_bounded_and_the_newest_stay() -> None:
    held = Holdings(head=100 * SEGMENT_ROUNDS, updates_from=1, snapshots=tuple(range(64, 6400, 64)))
    keys = list_keys(SWARM, held)
    assert len(keys) == KEYS_MAX and keys[0] == snapshots_key(SWARM, 6336)
    assert len(donor_keys(SWARM, 1, 10**9)) == KEYS_MAX


def test_a_joiner_looks_where_the_holders_announce() -> None:
    held = Holdings(head=200, updates_from=100, snapshots=(192,))
    looked = donor_keys(SWARM, 120, 200)
    assert looked[0] == snapshots_key(SWARM, 192)
    assert set(list_keys(SWARM, held)) & set(looked[1:])


def test_one_key_at_a_time_and_again_after_a_while() -> None:
    schedule = HoldingsSchedule(SWARM)
    held = Holdings(head=5, updates_from=1, snapshots=(4,))
    first = schedule.poll(held, NOW)
    assert first == snapshots_key(SWARM, 4) and schedule.poll(held, NOW) is None
    schedule.note_announced(True, NOW)
    assert schedule.poll(held, NOW) == updates_key(SWARM, 5)
    schedule.note_announced(True, NOW)
    assert schedule.poll(held, NOW + REANNOUNCE_S - 1) is None
    assert schedule.poll(held, NOW + REANNOUNCE_S) == first


def test_a_key_that_nobody_stored_is_tried_less_and_less_often() -> None:
    schedule, held, now, pause_s = HoldingsSchedule(SWARM), Holdings(head=5, updates_from=1), NOW, RETRY_MIN_S
    assert schedule.poll(held, now) is not None
    for _ in range(9):
        schedule.note_announced(False, now)
        assert schedule.poll(held, now + pause_s - 0.1) is None
        now += pause_s
        assert schedule.poll(held, now) == updates_key(SWARM, 5)
        pause_s = min(2 * pause_s, RETRY_MAX_S)
    assert pause_s == RETRY_MAX_S
    schedule.note_announced(True, now)
    schedule.poll(held, now + REANNOUNCE_S)
    schedule.note_announced(False, now)
    assert schedule.poll(held, now + RETRY_MIN_S) is not None, "after a success the pause is short again"


def test_what_is_no_longer_held_is_forgotten() -> None:
    schedule = HoldingsSchedule(SWARM)
    assert schedule.poll(Holdings(head=5, updates_from=1), NOW) is not None
    assert schedule.poll(Holdings(head=400, updates_from=390), NOW) is None, "one is outstanding"
    schedule.note_announced(True, NOW)
    assert schedule.poll(Holdings(head=400, updates_from=390), NOW) is None, "its segment is not whole"
    assert schedule.poll(Holdings(head=448, updates_from=390), NOW) == updates_key(SWARM, 448)
