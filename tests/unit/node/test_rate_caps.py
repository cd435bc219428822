"""Caps by the time of day, and how a pacer keeps to one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.node.pacer import BURST_S, BYTES_PER_MBIT, TURN_S, WIRE_SHARE, Pacer
from shoal.node.rate_caps import DAY_MINUTES, CapHours, Caps, CapSchedule, format_minute, make_schedule, parse_hours
from shoal.protocol.secure_channel import RECORD_BYTES_MAX

MBIT = 8.0
RATE = MBIT * BYTES_PER_MBIT


def make_pacer(mbit: float = MBIT) -> Pacer:
    pacer = Pacer()
    pacer.set_mbit(mbit)
    return pacer


def test_without_a_cap_everything_passes_at_once() -> None:
    pacer = make_pacer(0.0)
    assert [pacer.reserve(RECORD_BYTES_MAX, 1.0) for _ in range(1000)] == [0.0] * 1000
    assert pacer.streams_max is None


def test_records_follow_one_another_at_the_rate() -> None:
    pacer = make_pacer()
    apart_s = RECORD_BYTES_MAX * WIRE_SHARE / RATE
    delays = [pacer.reserve(RECORD_BYTES_MAX, 5.0) for _ in range(100)]
    assert delays == pytest.approx([max(0.0, k * apart_s - BURST_S) for k in range(100)])


def test_a_rest_is_not_saved_up() -> None:
    pacer = make_pacer()
    for _ in range(10):
        pacer.reserve(RECORD_BYTES_MAX, 0.0)
    assert pacer.reserve(RECORD_BYTES_MAX, 1000.0) == 0.0
    assert pacer.reserve(RECORD_BYTES_MAX, 1000.0) == pytest.approx(RECORD_BYTES_MAX * WIRE_SHARE / RATE - BURST_S)


@given(st.lists(st.tuples(st.integers(1, RECORD_BYTES_MAX), st.floats(0, 3)), min_size=1, max_size=60))
def test_no_stretch_of_time_has_more_than_the_cap(asked: list[tuple[int, float]]) -> None:
    pacer, now, passed = make_pacer(), 0.0, []
    for nbytes, pause_s in asked:
        now += pause_s
        passed.append((now + pacer.reserve(nbytes, now), nbytes * WIRE_SHARE))
    for first, (begin_s, _) in enumerate(passed):
        for last in range(first, len(passed)):
            wire_bytes = sum(nbytes for _, nbytes in passed[first : last + 1])
            allowed = RATE * (passed[last][0] - begin_s + BURST_S) + passed[last][1]
            assert wire_bytes <= allowed * (1 + 1e-9)


def test_a_new_cap_counts_from_then_on() -> None:
    pacer = make_pacer()
    pacer.reserve(RECORD_BYTES_MAX, 0.0)
    pacer.set_mbit(0.0)
    assert pacer.reserve(RECORD_BYTES_MAX, 0.0) == 0.0
    pacer.set_mbit(2 * MBIT)
    assert pacer.reserve(RECORD_BYTES_MAX, 10.0) == 0.0
    assert pacer.reserve(RECORD_BYTES_MAX, 10.0) == pytest.approx(RECORD_BYTES_MAX * WIRE_SHARE / RATE / 2 - BURST_S)


@pytest.mark.parametrize("mbit", [1.0, 2.0, 5.0, 100.0])
def test_a_payload_that_has_begun_goes_on_before_anybody_finds_it_slow(mbit: float) -> None:
    pacer = make_pacer(mbit)
    streams = pacer.streams_max
    assert streams is not None
    assert streams == 1 or streams * RECORD_BYTES_MAX / (mbit * BYTES_PER_MBIT) <= TURN_S
    assert (streams + 1) * RECORD_BYTES_MAX / (mbit * BYTES_PER_MBIT) > TURN_S


def test_hours_are_read() -> None:
    day = parse_hours("08:00-18:30  upload 5 download 20.5")
    assert day == CapHours(first=480, end=1110, caps=Caps(upload_mbit=5.0, download_mbit=20.5))
    assert [day.has(minute) for minute in (479, 480, 1109, 1110)] == [False, True, True, False]
    night = parse_hours("22:00-06:00 upload 0 download 0")
    assert [night.has(minute) for minute in (1319, 1320, 0, 359, 360)] == [False, True, True, True, False]
    assert parse_hours("00:00-24:00 upload 1 download 0").has(1439)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("8-18 upload 5 download 20", "form"),
        ("08:00-18:00 upload five download 20", "form"),
        ("08:00-18:00 upload 5", "form"),
        (f"08:00-18:00 upload {'9' * 400} download 20", "form"),
        ("08:60-18:00 upload 5 download 20", "no day"),
        ("08:00-25:00 upload 5 download 20", "no day"),
        ("08:00-24:30 upload 5 download 20", "after 24:00"),
        ("08:00-08:00 upload 5 download 20", "same time"),
        ("08:00-18:00 upload 0.5 download 20", "less than links can live with"),
    ],
)
def test_hours_that_mean_nothing_are_refused(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        parse_hours(text)


def test_the_first_hours_that_hold_count() -> None:
    schedule = make_schedule(50.0, 0.0, ["08:00-18:00 upload 5 download 20", "12:00-13:00 upload 1 download 1"])
    assert schedule.at(12 * 60) == Caps(upload_mbit=5.0, download_mbit=20.0)
    assert schedule.at(19 * 60) == Caps(upload_mbit=50.0)
    assert not schedule.is_empty
    assert make_schedule(0.0, 0.0, []).is_empty
    assert not make_schedule(0.0, 0.0, ["08:00-18:00 upload 5 download 0"]).is_empty


CAPS = st.sampled_from([Caps(), Caps(upload_mbit=5.0), Caps(download_mbit=5.0)])
MINUTES = st.integers(0, DAY_MINUTES - 1)
HOURS = st.builds(lambda first, end, caps: CapHours(first=first, end=end, caps=caps), MINUTES, MINUTES, CAPS)


@given(st.builds(lambda otherwise, hours: CapSchedule(otherwise=otherwise, hours=tuple(hours)), CAPS, st.lists(HOURS)))
def test_the_next_change_is_the_first_minute_with_other_caps(schedule: CapSchedule) -> None:
    for minute in (0, 1, 719, 720, DAY_MINUTES - 1):
        later = ((minute + ahead) % DAY_MINUTES for ahead in range(1, DAY_MINUTES))
        wanted = next((one for one in later if schedule.at(one) != schedule.at(minute)), None)
        assert schedule.change_after(minute) == wanted


def test_the_next_change_may_be_tomorrow_and_is_written_as_people_do() -> None:
    night = make_schedule(5.0, 0.0, ["22:00-06:05 upload 0 download 0"])
    assert [format_minute(night.change_after(minute) or 0) for minute in (0, 364, 365, 1319, 1320)] == [
        "06:05",
        "06:05",
        "22:00",
        "22:00",
        "06:05",
    ]
    late = make_schedule(5.0, 0.0, ["22:00-24:00 upload 0 download 0"])
    change = late.change_after(23 * 60)
    assert change == 0 and format_minute(change) == "00:00"
    for hours in ([], ["08:00-18:00 upload 5 download 0"]):
        assert make_schedule(5.0, 0.0, hours).change_after(9 * 60) is None, "no hours change anything"
