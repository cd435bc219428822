"""Paces: smoothed as RFC 6298 says, inside the manifest's limits, bounded in memory."""

import pytest

from shoal.protocol import pace as module
from shoal.protocol.identity import PeerId
from shoal.protocol.pace import (
    ALLOWANCE_MIN,
    FIRST_DEVIATION,
    MARGIN_S,
    PATIENCE,
    SPEED_MIN,
    PartPace,
    ReadyPace,
    find_worthy_end_s,
)
from tests.unit.protocol.samples import PEERS

A, B, C = PEERS[:3]
LIMIT_S = 8.0


def train(pace: ReadyPace, peer: PeerId, *durations: float) -> float:
    """Rounds in which the peer's work counts, one after the other; when the last one ended."""
    now = 0.0
    for duration_s in durations:
        pace.include((peer,), now)
        now += duration_s
        pace.note_ready(peer, now)
    pace.include((peer,), now)
    return now


def usual_s(pace: ReadyPace, peer: PeerId) -> float:
    expected = pace.expected_s(peer)
    assert expected is not None
    usual, latest = expected
    assert latest >= usual + MARGIN_S
    return usual


# -- smoothing ------------------------------------------------------------------------------------------------------


def test_mean_and_deviation_are_smoothed_as_in_rfc_6298() -> None:
    pace = PartPace()
    samples = (1.0, 2.0, 1.5, *[1.7] * 20)
    mean, deviation = samples[0], samples[0] * FIRST_DEVIATION
    for sample in samples:
        pace.note_part(A, sample)
    for count, sample in enumerate(samples[1:], 2):
        deviation_gain, mean_gain = max(1 / 4, 1 / count), max(1 / 8, 1 / count)
        deviation += deviation_gain * (abs(sample - mean) - deviation)
        mean += mean_gain * (sample - mean)
    assert pace.allowance_s(A, 20.0) == pytest.approx(PATIENCE * (mean + 4 * deviation))


def test_a_steady_peer_is_known_ever_more_exactly() -> None:
    pace = ReadyPace()
    bounds = []
    for count in (1, 4, 16, 64):
        now = train(pace, A, *[2.0] * count)
        expected = pace.expected_s(A)
        assert expected is not None
        usual, latest = expected
        assert usual - now == pytest.approx(2.0)
        bounds.append(latest - now)
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[-1] == pytest.approx(2.0 + MARGIN_S, abs=1e-3)


def test_one_odd_first_sample_is_soon_forgotten() -> None:
    pace = ReadyPace()
    now = train(pace, A, 20.0, *[2.0] * 7)
    assert usual_s(pace, A) - now < 2.0 + 20.0 / 8 + MARGIN_S, "the first samples count alike"
    now = train(pace, B, 0.1, *[2.0] * 3)
    assert usual_s(pace, B) - now > 1.5


# -- ready ----------------------------------------------------------------------------------------------------------


def test_a_peer_that_was_never_measured_is_expected_at_no_time() -> None:
    pace = ReadyPace()
    assert pace.expected_s(A) is None
    pace.include((A,), 0.0)
    assert pace.expected_s(A) is None
    pace.note_ready(B, 1.0)
    assert pace.expected_s(B) is None, "nobody knows since when it was at work"


def test_what_is_measured_may_span_rounds() -> None:
    # B's work is in every round, A's in the first and the last: it worked six seconds, not two.
    pace = ReadyPace()
    pace.include((A, B), 0.0)
    for end in (2.0, 4.0):
        pace.note_ready(B, end)
        pace.include((B,), end)
    pace.note_ready(A, 6.0)
    pace.note_ready(B, 6.0)
    pace.include((A, B), 6.0)
    assert usual_s(pace, A) == pytest.approx(12.0)
    assert usual_s(pace, B) == pytest.approx(8.0)


def test_only_the_first_ready_since_the_work_began_counts() -> None:
    pace = ReadyPace()
    pace.include((A,), 0.0)
    pace.note_ready(A, 1.0)
    pace.note_ready(A, 9.0)
    pace.include((A,), 10.0)
    assert usual_s(pace, A) == pytest.approx(11.0)


def test_who_was_waited_for_in_vain_is_expected_no_earlier_than_that() -> None:
    pace = ReadyPace()
    pace.note_missing(A, 1.0, 4.0)
    assert usual_s(pace, A) == pytest.approx(4.0), "it takes three seconds or more"
    pace.note_missing(A, 4.0, 7.0)
    assert usual_s(pace, A) <= 7.0, "it works since the first one, and is late already"
    pace.note_ready(A, 9.0)
    pace.include((A,), 10.0)
    assert usual_s(pace, A) == pytest.approx(18.0), "what is measured takes the place of what was guessed"


def test_a_measured_peer_that_is_missing_keeps_its_measure() -> None:
    pace = ReadyPace()
    now = train(pace, A, 3.0, 3.0)
    pace.note_missing(A, 0.0, now + 50.0)
    assert usual_s(pace, A) == pytest.approx(now + 3.0)


def test_a_peer_that_was_gone_begins_anew() -> None:
    pace = ReadyPace()
    train(pace, A, 3.0, 3.0)
    pace.forget(A)
    assert pace.expected_s(A) is None
    pace.include((A,), 100.0)
    assert usual_s(pace, A) == pytest.approx(103.0), "but is remembered"


# -- what a wait is worth -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ready", "expected", "end_s"),
    [
        (3, (), 0.0),
        (3, (2.0,), 2.0),  # three idle for 2 s, one brings 10
        (3, (4.0,), 0.0),
        (2, (9.0, 9.0, 9.0, 9.0), 9.0),  # a minimum quorum waits for the others, nearly a round long
        (4, (4.5, 4.5), 4.5),
        (4, (5.5, 5.5), 0.0),
        (3, (1.0, 8.0), 1.0),  # the second one would cost more than it brings
        (3, (1.0, 3.0, 3.5, 3.5), 3.5),
        (1, (10.0, 11.0), 0.0),  # no longer than a round
    ],
)
def test_a_wait_ends_where_it_is_worth_most(ready: int, expected: tuple[float, ...], end_s: float) -> None:
    assert find_worthy_end_s(0.0, ready, 10.0, reversed(expected)) == end_s
    assert find_worthy_end_s(50.0, ready, 10.0, [50.0 + at for at in expected]) == 50.0 + end_s


@pytest.mark.parametrize("one", range(1, 9))
@pytest.mark.parametrize("other", range(1, 9))
def test_of_two_groups_that_are_out_of_step_one_waits_for_the_other(one: int, other: int) -> None:
    for offset_s in (0.5, 2.5, 5.0, 7.5, 9.5):
        first = find_worthy_end_s(0.0, one, 10.0, [offset_s] * other)
        second = find_worthy_end_s(0.0, other, 10.0, [10.0 - offset_s] * one)
        assert first or second


def test_what_is_usual_is_the_middle_one_of_those_that_were_measured() -> None:
    pace = ReadyPace()
    assert pace.usual_s(PEERS) is None
    for peer, duration_s in zip(PEERS[:3], (1.0, 2.0, 30.0), strict=True):
        train(pace, peer, duration_s)
    assert pace.usual_s(PEERS) == 2.0
    assert pace.usual_s(PEERS[3:]) is None


# -- parts ----------------------------------------------------------------------------------------------------------


def test_who_was_never_measured_has_the_manifests_limit() -> None:
    pace = PartPace()
    pace.note_part(A, 0.1)
    assert pace.allowance_s(B, LIMIT_S) == LIMIT_S


@pytest.mark.parametrize(
    ("duration_s", "allowance_s"),
    [(0.0, ALLOWANCE_MIN * LIMIT_S), (0.001, ALLOWANCE_MIN * LIMIT_S), (1e6, LIMIT_S)],
)
def test_an_allowance_stays_between_its_floor_and_the_manifests_limit(duration_s: float, allowance_s: float) -> None:
    pace = PartPace()
    pace.note_part(A, duration_s)
    assert pace.allowance_s(A, LIMIT_S) == allowance_s


def test_a_fast_peer_among_slow_ones_is_allowed_what_is_usual() -> None:
    alone, among = PartPace(), PartPace()
    for pace in (alone, among):
        pace.note_part(A, 0.1)
    for peer in (B, C):
        among.note_part(peer, 0.9)
    assert alone.allowance_s(A, LIMIT_S) == ALLOWANCE_MIN * LIMIT_S
    assert among.allowance_s(A, LIMIT_S) == pytest.approx(PATIENCE * 0.9)


# -- memory ---------------------------------------------------------------------------------------------------------


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PEERS_MAX", 3)
    ready, parts = ReadyPace(), PartPace()
    for number, peer in enumerate(PEERS):
        train(ready, peer, 1.0)
        for other in PEERS:
            ready.note_missing(other, 0.0, float(number))
        parts.note_part(peer, 0.1)
    assert len(ready._began_s) <= 3 and len(ready._durations) <= 3 and len(parts._durations) <= 3
    assert ready.expected_s(PEERS[-1]) is not None, "the newest are kept"
    assert parts.allowance_s(PEERS[0], LIMIT_S) == LIMIT_S
    assert parts.allowance_s(PEERS[-1], LIMIT_S) == ALLOWANCE_MIN * LIMIT_S


def test_a_much_slower_owner_counts_by_its_rate_until_what_is_known_grows_old() -> None:
    pace = PartPace()
    for number, duration_s in enumerate((0.1, 0.1, 0.15, 1.0)):
        pace.note_part(PEERS[number], duration_s)
    assert [pace.speed(peer) for peer in PEERS[:3]] == [1.0, 1.0, 1.0], "a little slower is noise"
    assert pace.speed(PEERS[3]) == pytest.approx(0.1), "of two middle ones the faster"
    assert pace.speed(PEERS[5]) == 1.0, "nothing is known of it"
    for _ in range(20):
        pace.relax(PEERS[3])
    assert pace.speed(PEERS[3]) == 1.0
    pace.note_part(PEERS[4], 100.0)
    assert pace.speed(PEERS[4]) == SPEED_MIN
